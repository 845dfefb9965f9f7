"""The doctor: do the laws hold? Looked at on the tensors themselves; a finding says what to do."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from torch import Tensor, nn, optim

from lightning_prune.masks import Masks, alive, bits, count, pack
from lightning_prune.pruning import budget
from lightning_prune.shards import like, local, settle

_CHUNK = 1 << 18  # elements that are looked at together, so that memory stays small


def awake(tensors: Mapping[str, Tensor], masks: Masks, advice: str) -> list[str]:
    """Dead weights that are not +0.0, every bit of it.

    >>> awake({"w": Tensor([1.0, 2.0])}, {"w": Tensor([1, 0]).bool()}, "Train on.")
    ['w: 1 of 1 dead weights are not 0. Train on.']
    """
    found: list[str] = []
    for name, mask in masks.items():
        wrong = 0
        here = local(like(tensors[name], mask)), local(mask)  # of shards, each process looks at its own
        pieces = (t.reshape(-1).split(_CHUNK) for t in here)
        for weights, living in zip(*pieces, strict=True):
            alive_bits = bits(living, like=weights)
            wrong += int((weights.view(alive_bits.dtype) & ~alive_bits).count_nonzero())
        if wrong:
            dead = here[1].numel() - count(here[1])
            found.append(f"{name}: {wrong} of {dead} dead weights are not 0. {advice}")
    return found


def emptied(masks: Masks, before: Masks) -> list[str]:
    """Tensors that a pruning left without a weight."""
    return [
        f"{name}: no weight is left, and nothing passes through its layer. Ask for a lower sparsity, exclude "
        "it, or allow it with allocate=AtLeast(0, of=...)."
        for name, mask in masks.items()
        if not count(mask) and count(before[name])
    ]


def replaced(
    params: Mapping[str, nn.Parameter],
    model: nn.Module,
    optimizers: Iterable[optim.Optimizer],
    trained: Collection[int],
) -> list[str]:
    """Masked parameters that are no longer those of the model, or that no optimizer holds any more.

    Args:
        params: masked, by name.
        model: that they are to be of.
        optimizers: as they are now.
        trained: the ids of the parameters that optimizers held as the fit started.
    """
    live = settle(model)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found: list[str] = []
    for name, p in params.items():
        if live.get(name) is not p:
            found.append(
                f"{name}: the model has another parameter there than when the fit started, which no mask is "
                "put on. Change it in place, `with torch.no_grad(): parameter.copy_(...)`."
            )
        elif held and p.requires_grad and id(p) in trained and id(p) not in held:
            found.append(
                f"{name}: no optimizer holds it any more, so that what trains it, if anything does, is a "
                "copy. Give the optimizer the model's own parameter, or freeze or exclude it."
            )
    return found


def missed(
    masks: Masks, before: Masks, sparsities: Sequence[tuple[Sequence[str], float | Callable[..., float]]]
) -> list[str]:
    """Groups of weights that have another sparsity than was asked for, or weights that came back to life.

    >>> dense = {"w": Tensor([1, 1, 1, 1]).bool()}
    >>> missed({"w": Tensor([1, 1, 1, 0]).bool()}, dense, [(["w"], 0.5)])
    ['w: 3 of 4 weights are alive, 2 were asked for. Callbacks may look at masks, not change them.']

    Args:
        masks: after the pruning.
        before: before it.
        sparsities: pairs of names and the sparsity they are to have together; one that depends on the scores
            cannot be checked.
    """
    advice = "Callbacks may look at masks, not change them."
    found = [
        f"{name}: weights are alive again that were dead. {advice}"
        for name, mask in masks.items()
        if count(local(mask) & ~local(before[name]))
    ]
    for names, sparsity in sparsities:
        if callable(sparsity):
            continue
        size = sum(masks[name].numel() for name in names)
        left, asked = (alive({name: each[name] for name in names}) for each in (masks, before))
        if left != (asked := min(asked, budget(sparsity, size))):
            found.append(
                f"{', '.join(names)}: {left} of {size} weights are alive, {asked} were asked for. {advice}"
            )
    return found


def digest(masks: Masks) -> str:
    """A hash of masks, to compare those of ranks."""
    h = sha256()
    for name, packed in pack(masks).items():
        h.update(f"{name} {packed['shape']}".encode())
        h.update(memoryview(packed["bits"].numpy()))  # type: ignore[union-attr]
    return h.hexdigest()


def disagreeing(logged: Mapping[str, Any], stored: Mapping[str, float]) -> list[str]:
    """What was logged otherwise than a checkpoint says.

    >>> disagreeing({"round": 1.0, "loss": 0.3}, {"round": 2.0})
    ["round: 1.0 was logged, and the checkpoint says 2.0. Log nothing under this name; it is the callback's."]
    """
    return [
        f"{name}: {float(logged[name])} was logged, and the checkpoint says {value}. "
        "Log nothing under this name; it is the callback's."
        for name, value in stored.items()
        if name in logged and abs(float(logged[name]) - value) > 1e-6
    ]


def report(found: Sequence[str]) -> None:
    """Stop, if there is something to say.

    Raises:
        RuntimeError: then, with all of it.
    """
    if found:
        raise RuntimeError(
            "\n".join(
                [*found, "(verify=True found this. Mend what must be mended; verify=False does not look.)"]
            )
        )
