"""What the masks of a run are worth on this machine: size on disk, multiply-adds, latency."""

from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import seed_everything

from lightning_prune.deploy.accelerate import accelerate
from lightning_prune.deploy.summary import summarize
from lightning_prune.masks import bits, zero_dead_
from lightning_prune.rng import capture, restore
from lightning_prune.study.records import described, kinds_of
from lightning_prune.study.run_folders import Runs


def measure(runs: Runs, examples: int = 256) -> list[dict[str, Any]]:
    """Put the masks of each round on the network of its config, and weigh and time it.

    The weights below the masks are initial ones: neither size nor time depends on them by more than a percent
    or two. Of each kind the first run that has masks is taken.

    Args:
        runs: of one experiment.
        examples: size of the batch, from the test set.

    Returns:
        Rows of kind, round, sparsity, `raw_bytes`, `gzip_bytes`, `sparse_bytes`, `theoretical_speed_up`,
        `dense_us` and `accelerated_us` (microseconds a batch), `speed_up`, `noisy` (whether the machine was
        too busy to say), and where it was measured.
    """
    torch.set_num_threads(runs.config.threads)
    state = capture()
    seed_everything(0, verbose=False)
    task = instantiate(runs.config.task).eval()
    _, test = instantiate(runs.config.batches).val_dataloader()
    restore(state)
    example = next(iter(test))[0][:examples]
    initial = {name: value.clone() for name, value in task.state_dict().items()}
    rows: list[dict[str, Any]] = []
    for kind in kinds_of(runs.records):
        run = next((run for run in runs.of(kind) if run.masks), None)
        if run is None:
            continue
        for record in (r for r in run.records if r["kind"] == kind and r["round"] in run.masks):
            masks = run.masks[record["round"]]
            task.load_state_dict(initial)
            for name, mask in masks.items():
                zero_dead_(p := task.get_parameter(name), bits(mask, like=p))
            cost = summarize(task.net, example)
            fast: Any = accelerate(task.net, example).acceleration
            row = {"kind": kind, **{k: described(record["round"], masks)[k] for k in ("round", "sparsity")}}
            row |= {
                f"{form}_bytes": getattr(cost.total, f"{form}_size") for form in ("raw", "gzip", "sparse")
            }
            row |= {"theoretical_speed_up": cost.theoretical_speed_up, "dense_us": fast.dense_us}
            row |= {"accelerated_us": fast.dense_us / fast.speed_up, "speed_up": fast.speed_up}
            row |= {"noisy": fast.measured.noisy}
            rows.append(
                {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
                | {"where": cost.where}
            )
    return rows
