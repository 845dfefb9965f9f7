"""Channels cut from a trained network, and what is left trained on: accuracy against size and latency."""

import time
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.deploy.timing import alternated, low, ratio
from lightning_prune.files import replacing
from lightning_prune.structured.calibration import calibrate
from lightning_prune.study.data import Batches
from lightning_prune.study.oneshot import evaluate
from lightning_prune.study.records import read, write
from lightning_prune.study.training import built, hush


def sweep(cfg: DictConfig, folder: Path) -> None:
    """Train a network; by each method and at each level cut a copy of it and train that; test them.

    `records.jsonl` has the method as `kind`, the fraction of channels removed as `sparsity`, and in `alive`
    and `total` the parameters left and there were. Metrics: `test_loss`, `test_acc`, `test_acc_untrained`
    (just after the cut), `test_acc_calibrated` (the same with statistics of batch normalizations from some
    training batches), `parameters`, `multiply_adds` of one input, `raw_bytes`, `cpu_ms`, the processor time
    of a batch, and `speed_up`, the ratio of alternated runs of the network before the cut and after. What
    was done is not done again.
    """
    hush()
    batches: Batches = instantiate(cfg.batches)
    test = list(batches.val_dataloader()[1])
    trained, path = folder / "trained.pt", folder / "records.jsonl"
    task = built(cfg)
    methods = instantiate(cfg.methods, _convert_="all")
    for method in methods.values():  # what cannot run fails here, not after the training
        method(deepcopy(task), 0)
    if trained.is_file():
        task.load_state_dict(torch.load(trained, weights_only=True))
    else:
        fit(cfg, task, batches, cfg.steps_per_round)
        with replacing(trained) as file:
            torch.save(task.state_dict(), file)
    x = test[0][0][: cfg.latency_batch]
    some = batches.splits.train[0].split(batches.batch_size)[: cfg.calibration_batches]
    levels = sorted({level for method in methods.values() for level in method.levels})
    for kind, method in methods.items():
        for level in method.levels:
            about = {"kind": kind, "seed": cfg.seed, "round": levels.index(level)}
            done = read(path)[0]
            if any(about.items() <= record.items() for record in done):
                continue
            start, net = time.monotonic(), deepcopy(task.net)
            again: Any = instantiate(cfg.retraining)(net)
            method(again, level)
            untrained = evaluate(again, test)[1]
            calibrate(calibrated := deepcopy(again), some, lambda network, batch: network(batch))
            calibrated = evaluate(calibrated, test)[1]
            fit(cfg, again, batches, cfg.retraining_steps)
            loss, accuracy = evaluate(again, test)
            metrics = {"test_loss": loss, "test_acc": accuracy, "test_acc_untrained": untrained}
            metrics |= {"test_acc_calibrated": calibrated}
            metrics |= costs(task.net, net, x)
            total = sum(p.numel() for p in task.net.parameters())
            about |= {"sparsity": level, "alive": metrics["parameters"], "total": total, "layers": {}}
            record = {**about, "metrics": metrics, "seconds": round(time.monotonic() - start, 3)}
            write(path, [*done, record])


def fit(cfg: DictConfig, task: LightningModule, batches: Batches, steps: int) -> None:
    """Train for a number of steps, in an order of the data that depends on the seed alone."""
    seed_everything(cfg.seed, verbose=False)
    trainer: Trainer = instantiate(cfg.trainer, max_steps=steps, logger=False, enable_checkpointing=False)
    trainer.fit(task.train(), batches)


def costs(dense: nn.Module, net: nn.Module, x: torch.Tensor, rounds: int = 31) -> dict[str, Any]:
    """Parameters, multiply-adds, size and time of a network, and how that compares with another's."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net.eval()(x)
    with torch.inference_mode():
        works = {"dense": partial(cpu_seconds, dense.eval(), x), "cut": partial(cpu_seconds, net, x)}
        times = alternated(works, rounds)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "multiply_adds": counter.get_total_flops() // 2 // len(x),
        "raw_bytes": sum(t.nbytes for t in net.state_dict().values()),
        "cpu_ms": 1000 * low(times["cut"]),
        "speed_up": ratio(times["dense"], times["cut"]).value,
    }


def cpu_seconds(net: nn.Module, x: torch.Tensor) -> float:
    """Processor time of a forward pass: on one thread its latency, also where others share the machine."""
    start = time.process_time()
    net(x)
    return time.process_time() - start


def torch_pruning(net: nn.Module, sparsity: float, shape: list[int]) -> None:
    """The peer: torch-pruning's own pruner with its L1 criterion, the last layer left alone."""
    import torch_pruning as tp

    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    tp.pruner.MagnitudePruner(
        net,
        torch.rand(shape),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=sparsity,
        ignored_layers=[last],
        in_channel_groups={},  # its defaults are shared by all pruners of a process
        out_channel_groups={},
        num_heads={},
    ).step()


def torch_kirigami(net: nn.Module, sparsity: float, shape: list[int]) -> None:
    """The newer peer: torch-kirigami's own pruner with its L1 criterion, outputs left alone.

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    try:
        kirigami: Any = import_module("torch_kirigami")
        pruning: Any = import_module("torch_kirigami.pruning")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"methods: torch-kirigami is one of them, and {error.name} is not installed; it is needed. "
            "Install it by `pip install torch-kirigami==0.2.1`, or leave that method out."
        ) from error
    pruner = pruning.Pruner(net, graph=kirigami.DependencyGraph.build(net.eval(), args=(torch.rand(shape),)))
    strategy = pruning.Greedy(pruning.GroupMagnitude(p=1))
    pruner.prune(pruner.discover_candidates(), budget=pruning.ChannelRatio(sparsity), strategy=strategy)
