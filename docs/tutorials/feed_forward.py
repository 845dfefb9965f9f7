# %% [markdown]
# # Pruning feed-forward networks
#
# Class-blind, class-uniform and class-distributed pruning (See, Luong & Manning 2016), thresholds and
# buckets, once and step by step, and what masks look like. The data is MNIST-1D (Greydanus & Kobak 2024),
# which is generated. This page is the script `docs/tutorials/feed_forward.py`.

# %%
import copy
import os

import matplotlib.pyplot as plt
import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import nn

import lightning_prune as lp

STEPS = int(os.environ.get("STEPS", 1500))
torch.manual_seed(0)
data = make_dataset(get_dataset_args())
x, x_test = (torch.tensor(data[key], dtype=torch.float32) for key in ("x", "x_test"))
y, y_test = (torch.tensor(data[key]) for key in ("y", "y_test"))

# %% [markdown]
# ## A network in one line
#
# The masks are not part of it, so there is nothing special about its layers.

# %%
net = lp.models.DeepFFN(40, hidden=(200, 100, 50), classes=10)
print(net)


# %%
def train(net, steps, masks=None):
    """Adam on random batches, with masks held on; the seed makes every training draw the same batches."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    handle = lp.hold(net, optimizer, masks or {})
    for _ in range(steps):
        batch = torch.randint(len(x), (100,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    handle.remove()


@torch.no_grad()
def accuracy(net):
    """On the test split."""
    return (net(x_test).argmax(1) == y_test).float().mean().item()


train(net, STEPS)
print(f"dense: {accuracy(net):.1%}")

# %% [markdown]
# ## Three schemes, without training again
#
# *Class-blind* ranks all weights together, *class-uniform* takes the same fraction of every layer,
# *class-distributed* cuts each layer at the same multiple of its standard deviation. In this library each
# is an allocation.

# %%
SCHEMES = {
    "class-blind": {"allocate": lp.allocation.global_rank},
    "class-uniform": {"allocate": lp.allocation.uniform},
    "class-distributed": {"allocate": lp.allocation.class_distributed},
    "random": {"allocate": lp.allocation.uniform, "criterion": lp.criteria.Random()},
}
LEVELS = [0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]


def once(options, sparsity):
    """Accuracy after pruning a copy."""
    pruned = copy.deepcopy(net)
    lp.prune(pruned, sparsity, **options)
    return accuracy(pruned)


at_once = {name: [once(options, s) for s in LEVELS] for name, options in SCHEMES.items()}

# %% [markdown]
# ## Thresholds and buckets
#
# A schedule may read the scores instead of naming a sparsity: below a threshold, or the smallest weights
# as long as their sum fits into a bucket. Both are class-blind by another name.

# %%
for schedule in (lp.schedules.Threshold(0.05), lp.schedules.Bucket(100)):
    pruned = copy.deepcopy(net)
    masks = lp.prune(pruned, schedule)
    print(f"{schedule}: sparsity {lp.metrics.Sparsity()(masks):.3f}, accuracy {accuracy(pruned):.1%}")


# %% [markdown]
# ## Step by step
#
# Prune a little, train, prune again: the same masks as the callback `IterativeMagnitudePruning` makes in
# a Trainer.


# %%
def step_by_step(options):
    """Accuracy after each of the levels, each reached from the one before with a fifth of the training."""
    pruned, found = copy.deepcopy(net), []
    params = lp.pruning.prunable(pruned)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    for sparsity in LEVELS:
        masks = lp.pruning.next_masks(params, masks, [(list(params), sparsity)], **options)
        train(pruned, STEPS // 5, masks)
        found.append(accuracy(pruned))
    return found, masks


iterative, last = {}, {}
for name, options in SCHEMES.items():
    iterative[name], last[name] = step_by_step(options)

figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for axis, curves, title in zip(
    axes, (at_once, iterative), ("at once", "step by step, with training"), strict=True
):
    for name, values in curves.items():
        axis.plot(LEVELS, values, marker="o", markersize=3, label=name)
    axis.set(title=title, xlabel="sparsity")
axes[0].set_ylabel("test accuracy")
axes[0].legend(frameon=False)
figure.savefig("feed_forward.png", dpi=110)

# %% [markdown]
# ![Accuracy of the four schemes](feed_forward.png)
#
# ## Pictures of masks
#
# Rows are neurons of the first layer, columns the 40 places of the signal. Class-blind pruning decides per
# weight: the last places of the signal, which tell little, fade. A random mask keeps all places alike.

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
weight = net.hidden[0].weight.detach().abs()
for row, name in zip(axes, ("class-blind", "random"), strict=True):
    mask = last[name]["hidden.0.weight"]
    row[0].imshow(mask, cmap="gray_r", aspect="auto", interpolation="nearest")
    row[1].imshow(weight * mask, cmap="magma", aspect="auto", interpolation="nearest")
    row[0].set(title=f"mask, {name}, {float(mask.float().mean()):.0%} alive", ylabel="neuron")
    row[1].set(title="size of the weights that it keeps")
for axis in axes[1]:
    axis.set_xlabel("place in the signal")
figure.savefig("masks.png", dpi=110)

# %% [markdown]
# ![Masks and weights of the first layer](masks.png)
#
# ## Do two schemes keep the same weights?

# %%
for name in ("class-uniform", "class-distributed", "random"):
    print(f"class-blind and {name}: Jaccard {lp.metrics.MaskOverlap()(last['class-blind'], last[name]):.2f}")
