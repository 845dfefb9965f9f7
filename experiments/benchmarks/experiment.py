"""The whole LeNet experiment against a plain PyTorch loop on the same tensors, in iterations a second.

`python -m experiments.benchmarks.experiment`: three rounds of 1,000 iterations with evaluation every 100, on
random images of MNIST's number and size, since time does not depend on what they show. What a run takes
before it trains (config, data, the hash of the data) is measured apart, by rounds of one iteration, since
rounds have 5,000 or 50,000 iterations as shipped.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import cross_entropy

from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.timing import alternated, low, machine, ratio, timed
from lightning_prune.study.data import Splits, npz
from lightning_prune.study.models import LeNet
from lightning_prune.study.run import run

ROUNDS, STEPS, EVERY = 3, 1000, 100


def plain(splits: Splits, batch_size: int) -> None:
    """Iterative magnitude pruning with rewinding, as one would write it without a library."""
    net = LeNet()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    weights = {k: p for k, p in net.named_parameters() if p.dim() > 1}
    masks = {k: torch.ones_like(p) for k, p in weights.items()}
    x, y = splits.train
    for round in range(ROUNDS):
        optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3, fused=True)
        step = 0
        while step < STEPS:
            for at in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                cross_entropy(net(x[at]), y[at]).backward()
                optimizer.step()
                with torch.no_grad():
                    for k, p in weights.items():
                        p.mul_(masks[k])
                step += 1
                if step % EVERY == 0:
                    with torch.no_grad():
                        for inputs, labels in (splits.val, splits.test):
                            for part, targets in zip(inputs.split(5000), labels.split(5000), strict=True):
                                logits = net(part)
                                _ = (
                                    cross_entropy(logits, targets).item(),
                                    (logits.argmax(1) == targets).sum().item(),
                                )
                if step == STEPS:
                    break
        if round < ROUNDS - 1:
            for k, p in weights.items():
                keep = round_half(masks[k].sum().item(), 0.1 if k.startswith("out") else 0.2)
                masks[k] = (p.detach().abs() >= p.detach().abs().flatten().topk(keep).values[-1]).float()
            net.load_state_dict(start)


def round_half(alive: float, rate: float) -> int:
    """Survivors of a pruning."""
    return round(alive * (1 - rate))


def ours(path: Path, batch_size: int, folder: str, steps: int = STEPS) -> None:
    """The same from config: Trainer, callbacks, records, checkpoints."""
    overrides = [
        "experiment=lenet_mnist_short",
        "data=npz",
        f"data.path={path}",
        "data.validation=5000",
        f"rounds={ROUNDS - 1}",
        f"steps_per_round={steps}",
        f"batch_size={batch_size}",
        f"runs={folder}",
        "progress=false",
    ]
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        run(compose("config", overrides))


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        arrays: dict[str, Any] = {
            f"{k}_{split}": generator.integers(0, high, shape).astype(np.uint8)
            for split, n in (("train", 60_000), ("test", 10_000))
            for k, high, shape in (("x", 256, (n, 28, 28)), ("y", 10, (n,)))
        }
        path = Path(folder) / "random.npz"
        np.savez(path, **arrays)
        splits = npz(str(path), validation=5000)
        print(
            f"LeNet experiment, {ROUNDS} rounds of {STEPS} iterations, evaluation every {EVERY}. {machine()}"
        )
        for batch_size in (60, 128):
            works = {
                "ours": timed(lambda b=batch_size: ours(path, b, tempfile.mkdtemp(dir=folder))),
                "plain loop": timed(lambda b=batch_size: plain(splits, b)),
                "start": timed(lambda b=batch_size: ours(path, b, tempfile.mkdtemp(dir=folder), 1)),
            }
            times = alternated(works, 5)
            start = low(times.pop("start"))
            times["ours"] = [t - start for t in times["ours"]]
            speed = {k: ROUNDS * STEPS / low(v) for k, v in times.items()}
            against = ratio(times["plain loop"], times["ours"])
            print(
                f"  batch {batch_size}: ours {speed['ours']:.0f} it/s, "
                f"plain loop {speed['plain loop']:.0f} it/s, "
                f"ours/plain loop {against}; a run starts in {start:.1f} s"
            )
            headline(f"LeNet experiment, batch {batch_size}, over a plain loop", against, at_least=0.9)


if __name__ == "__main__":
    main()
