# %% [markdown]
# # One-shot pruning of a trained network
#
# How much can be taken from a trained network without training it again, what does that do to its file,
# and what makes it faster? A small ResNeXt on MNIST-1D (Greydanus & Kobak 2024), which is generated, so
# nothing is downloaded. This page is the script `docs/tutorials/one_shot.py`.

# %%
import copy
import gzip
import io
import os

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from mnist1d.data import get_dataset_args, make_dataset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp

EPOCHS = int(os.environ.get("EPOCHS", 30))
seed_everything(0, verbose=False)
data = make_dataset(get_dataset_args())
x, x_test = (torch.tensor(data[key], dtype=torch.float32)[:, None] for key in ("x", "x_test"))
y, y_test = (torch.tensor(data[key]) for key in ("y", "y_test"))


# %% [markdown]
# ## The network
#
# Grouped convolutions beside shortcuts, with batch normalization: what makes pruning less simple than in
# a chain of layers. Nothing in it knows of pruning.


# %%
class Block(nn.Module):
    """Two convolutions, the first in groups, beside a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, channels, 5, padding=2, groups=4, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 1, bias=False),
            nn.BatchNorm1d(channels),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


class ResNeXt(LightningModule):
    """A stem, three blocks, a head."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, channels, 5, stride=2, padding=2), nn.BatchNorm1d(channels), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(3)))
        self.head = nn.Linear(channels, 10)
        self.example_input_array = torch.zeros(1, 1, 40)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(-1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(model, epochs, *callbacks):
    """Train, and say nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_model_summary=False, accelerator="cpu", **quiet
    )
    trainer.fit(model.train(), DataLoader(TensorDataset(x, y), 100, shuffle=True))


@torch.no_grad()
def evaluate(model):
    """Loss and accuracy on the test split."""
    logits = model.eval()(x_test)
    return nn.functional.cross_entropy(logits, y_test).item(), (
        logits.argmax(1) == y_test
    ).float().mean().item()


model = ResNeXt()
fit(model, EPOCHS)
dense_loss, dense_accuracy = evaluate(model)
print(f"dense: loss {dense_loss:.3f}, accuracy {dense_accuracy:.1%}")

# %% [markdown]
# ## What would be pruned
#
# Weights of convolutions and linear layers; never biases and norms.

# %%
print(lp.targets(model))

# %% [markdown]
# ## Five ways to prune it once
#
# The criterion says which weights, the allocation how many where, the granularity what goes together.
# Each way is one call, on a copy.

# %%
WAYS = {
    "L1 global": {},
    "L1 per layer": {"allocate": lp.allocation.uniform},
    "L1 filters per layer": {"allocate": lp.allocation.uniform, "granularity": lp.granularity.Filter(dim=0)},
    "L2 filters, global": {"granularity": lp.granularity.Filter(dim=0, n=2)},
    "random per layer": {"allocate": lp.allocation.uniform, "criterion": lp.criteria.Random()},
}
LEVELS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def gzipped(model):
    """Bytes of the file, compressed."""
    torch.save(model.state_dict(), file := io.BytesIO())
    return len(gzip.compress(file.getvalue(), 6))


curves = {way: [] for way in WAYS}
for way, options in WAYS.items():
    for sparsity in LEVELS:
        pruned = copy.deepcopy(model)
        lp.prune(pruned, sparsity, exclude=["head.*"], **options)
        curves[way].append((evaluate(pruned)[0] / dense_loss, gzipped(pruned)))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for way, points in curves.items():
    left.plot(LEVELS, [loss for loss, _ in points], marker="o", markersize=3, label=way)
    right.plot(LEVELS, [size / 1000 for _, size in points], marker="o", markersize=3, label=way)
left.set(xlabel="sparsity", ylabel="test loss, dense = 1", yscale="log", ylim=(0.8, 30))
right.set(xlabel="sparsity", ylabel="kB after gzip", ylim=(0, None))
left.legend(frameon=False)
figure.savefig("one_shot.png", dpi=110)

# %% [markdown]
# ![Loss and compressed size against sparsity](one_shot.png)
#
# Single weights ranked over all layers can go the furthest before it is felt, whole filters cost at once,
# and a random choice destroys the network: what is kept matters. The compressed file gets smaller with
# the zeros, whatever the way.
#
# ## Files
#
# gzip has to find the zeros again. A sparse file stores positions and survivors, without loss and without
# pickle.

# %%
pruned = copy.deepcopy(model)
lp.prune(pruned, 0.9, exclude=["head.*"])
lp.save_sparse(pruned.state_dict(), "pruned.safetensors")
sparse = os.path.getsize("pruned.safetensors")
print(f"dense {gzipped(model):,} bytes, at 90 % {gzipped(pruned):,}, as a sparse file {sparse:,}")
ResNeXt().load_state_dict(lp.load_sparse("pruned.safetensors"), strict=True)

# %% [markdown]
# ## What makes it faster
#
# Zeros do not: a dense kernel multiplies by them. `accelerate` measures each layer in every form it knows
# on this machine and keeps what is faster, which takes large linear layers and a sparsity of about 90 %
# or more.

# %%
large = lp.models.DeepFFN(784, hidden=(1024, 1024), classes=10).eval()
lp.prune(large, 0.95, allocate=lp.allocation.uniform)
print(lp.accelerate(large, torch.rand(64, 784)).acceleration)

# %% [markdown]
# Removing channels does, on any machine, as the network becomes a smaller dense one. Half of the
# channels, with a third of the training again to recover:

# %%
small = copy.deepcopy(model)
before = sum(p.numel() for p in small.parameters())
pruner = lp.StructuredChannelPruning(lp.schedules.OneShot(0.5), remove="each_round")
fit(small, 1 + EPOCHS // 3, pruner)
after = sum(p.numel() for p in small.parameters())
loss, accuracy = evaluate(small)
print(f"{before:,} parameters, then {after:,}: accuracy {accuracy:.1%}, dense {dense_accuracy:.1%}")

# %% [markdown]
# How much time that saves depends on the machine and the batch; `lp.summarize(small.eval(), x_test)`
# measures it.
