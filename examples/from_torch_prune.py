"""What changes on the way from `torch.nn.utils.prune`: both behaviours, side by side."""

import io

import torch
from torch import nn
from torch.nn.utils import prune as peer

import lightning_prune as lp


def net():
    """The same two layers every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def both(model):
    """Both weights, as the peer wants them."""
    return [(model[0], "weight"), (model[2], "weight")]


def masks():
    """Global magnitude pruning by a half: how many weights are kept by one and not by the other."""
    theirs, mine = net(), net()
    peer.global_unstructured(both(theirs), peer.L1Unstructured, amount=0.5)
    kept = lp.prune(mine, sparsity=0.5)
    different = sum(
        int((m[0].weight_mask.bool() != kept[f"{i}.weight"]).sum()) for i, m in ((0, theirs), (2, theirs[2:]))
    )
    return f"{different} weights differ", f"{different} weights differ"


def state_dict_keys():
    """Names in the state_dict after pruning."""
    theirs, mine = net(), net()
    peer.global_unstructured(both(theirs), peer.L1Unstructured, amount=0.5)
    lp.prune(mine, 0.5)
    return ", ".join(theirs.state_dict()), ", ".join(mine.state_dict())


def pruning_twice():
    """Sparsity after pruning by 0.5 and then by 0.75: of what is left, or of all."""
    theirs, mine = net(), net()
    for amount in (0.5, 0.75):
        peer.global_unstructured(both(theirs), peer.L1Unstructured, amount=amount)
        kept = lp.prune(mine, amount)
    weights = {f"{i}": m.weight for i, (m, _) in enumerate(both(theirs))}
    return (f"{lp.metrics.Sparsity()(weights):.4f}", f"{lp.metrics.Sparsity()(kept):.4f}")


def training_on():
    """Largest dead weight after pruning for good and one step with momentum and weight decay."""
    results = []
    x = torch.randn(16, 64)
    for library in ("torch", "ours"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if library == "torch":
            peer.global_unstructured(both(model), peer.L1Unstructured, amount=0.5)
            for module, name in both(model):
                peer.remove(module, name)  # without it the weight stays a product, recomputed in each forward
            dead = {f"{i}.weight": model[i].weight == 0 for i in (0, 2)}
        else:
            kept = lp.prune(model, 0.5)
            lp.hold(model, optimizer, kept)
            dead = {name: ~mask for name, mask in kept.items()}
        model(x).square().sum().backward()
        optimizer.step()
        weights = dict(model.named_parameters())
        largest = max(float(weights[name].detach()[mask].abs().max()) for name, mask in dead.items())
        results.append(f"{largest:.4f}")
    return tuple(results)


def size():
    """Bytes of the file, at 95 %: torch.save with its buffers, save_sparse."""
    theirs, mine = net(), net()
    peer.global_unstructured(both(theirs), peer.L1Unstructured, amount=0.95)
    torch.save(theirs.state_dict(), file := io.BytesIO())
    lp.prune(mine, 0.95)
    lp.save_sparse(mine.state_dict(), "pruned.safetensors")
    with open("pruned.safetensors", "rb") as sparse:
        return f"{file.tell():,}", f"{len(sparse.read()):,}"


ROWS = (masks, state_dict_keys, pruning_twice, training_on, size)

if __name__ == "__main__":
    for row in ROWS:
        theirs, mine = row()
        print(f"{row.__doc__}\n  torch.nn.utils.prune: {theirs}\n  lightning_prune:      {mine}\n")
