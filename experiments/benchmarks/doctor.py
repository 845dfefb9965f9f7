"""What `verify=True` costs: the doctor's look after a pruning and in a checkpoint, against an epoch of LeNet.

`python -m experiments.benchmarks.doctor`: LeNet-300-100 at batch 60, 55,000 images an epoch, fused Adam.
"""

import logging
import warnings

import torch

from experiments.benchmarks.headlines import headline
from experiments.benchmarks.step import Task, holding, step_time
from lightning_prune import doctor
from lightning_prune.deploy.timing import low, machine, seconds
from lightning_prune.layers import prunable
from lightning_prune.pruning import next_masks
from lightning_prune.study.models import LeNet

BATCH, IMAGES = 60, 55_000


def examination() -> float:
    """Seconds of one look at everything, at 80 % sparsity."""
    task = Task(LeNet(), torch.optim.Adam)
    params, optimizers = prunable(task), [torch.optim.Adam(task.parameters())]
    before = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    sparsities = [(list(params), 0.8)]
    masks = next_masks(params, before, sparsities)
    for name, p in params.items():
        p.data.masked_fill_(~masks[name], 0)

    trained = {id(p) for p in task.parameters()}

    def look() -> None:
        found = [*doctor.awake(params, masks, ""), *doctor.replaced(params, task, optimizers, trained)]
        found += [*doctor.emptied(masks, before), *doctor.missed(masks, before, sparsities)]
        found += doctor.awake(dict(task.state_dict()), masks, "")  # in a checkpoint
        doctor.report(found)

    return low([seconds(look) for _ in range(21)])


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    batch = (torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,)))

    def fused(params: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1.2e-3, fused=True)  # type: ignore[arg-type]

    epoch = IMAGES / BATCH * low([step_time(LeNet, fused, batch, 300, holding) for _ in range(3)])
    look = examination()
    print(f"The doctor, LeNet-300-100. {machine()}")
    print(f"  a look {1000 * look:.2f} ms, an epoch {epoch:.2f} s")
    headline("a look of verify=True over an epoch of LeNet", 100 * look / epoch, at_most=1, unit=" %")


if __name__ == "__main__":
    main()
