"""One-shot pruning of a trained network at many levels, by several methods, without retraining."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_prune.deploy.sizes import gzipped
from lightning_prune.masks import Masks
from lightning_prune.schedules import Schedule
from lightning_prune.study.records import described
from lightning_prune.study.tasks import Classification


@dataclass(frozen=True)
class Method:
    """A way to prune, and how far.

    Args:
        prune: `lightning_prune.prune` with everything but the model and the sparsity.
        levels: how far, from the least on.
        schedule: level -> sparsity, or a schedule that reads the scores; None: the level is the sparsity.
    """

    prune: Callable[..., Masks]
    levels: Sequence[float]
    schedule: Callable[[float], Schedule] | None = None

    def __call__(self, task: Classification, level: float) -> Masks:
        """Prune the network of the task in place."""
        return self.prune(task.net, self.schedule(level) if self.schedule else level)


def sweep(
    task: Classification, methods: Mapping[str, Method], test: Iterable[tuple[Tensor, Tensor]], seed: int
) -> list[dict[str, Any]]:
    """Prune a copy of the trained task by each method at each level, and test it.

    Returns:
        Records, the level's place as `round` and the method as `kind`. Metrics: `level`, `test_loss`,
        `test_acc`, `relative_loss` (a multiple of the unpruned test loss) and `gzip_bytes` (of the state
        dict, level 6).
    """
    batches = list(test)
    dense_loss, _ = evaluate(task, batches)
    records: list[dict[str, Any]] = []
    for kind, method in methods.items():
        for round, level in enumerate(method.levels):
            start = time.monotonic()
            pruned = deepcopy(task)
            masks = method(pruned, level)
            loss, accuracy = evaluate(pruned, batches)
            metrics = {
                "level": level,
                "test_loss": loss,
                "test_acc": accuracy,
                "relative_loss": loss / dense_loss,
                "gzip_bytes": gzipped(list(pruned.net.state_dict().values())),
            }
            record = {"kind": kind, "seed": seed, **described(round, masks), "metrics": metrics}
            records.append({**record, "seconds": float(f"{time.monotonic() - start:.3f}")})
    return records


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    network.eval()
    loss = correct = n = 0.0
    for x, y in batches:
        logits = network(x)
        loss += float(cross_entropy(logits, y, reduction="sum"))
        correct += float((logits.argmax(1) == y).sum())
        n += len(y)
    return loss / n, correct / n
