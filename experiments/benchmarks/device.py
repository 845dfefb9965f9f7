"""A GPU: a step with masks, one global pruning, 2:4 kernels, and networks with fewer channels, beside dense.

`python -m experiments.benchmarks.device [--device cpu]`: on the first GPU, or a rehearsal at small sizes on
the CPU, whose figures say nothing of a GPU. `make gpu` runs it.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from lightning.pytorch import Callback
from torch import nn
from torch.sparse import to_sparse_semi_structured

from experiments.benchmarks.headlines import headline
from experiments.benchmarks.selection import NEEDS, SPARSITY, ours, torchs, weights
from experiments.benchmarks.step import Task, holding, step_time
from lightning_prune import prune, prune_channels
from lightning_prune.deploy.timing import alternated, low, machine, ratio, settled, timed
from lightning_prune.granularity import NM
from lightning_prune.study.models import LeNet, ResNet20

WIDE, BATCHES = 4096, (16, 256, 4096)


def step(
    name: str, net: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device, n: int
) -> None:
    """A step with fixed masks over one of the same Trainer without it; batches come from the CPU."""
    batch = torch.rand(shape), torch.randint(0, 10, shape[:1])
    kind = "gpu" if device.type == "cuda" else "cpu"

    def of(callbacks: Callable[[Task], list[Callback]]) -> Callable[[], float]:
        return lambda: step_time(net, partial(torch.optim.SGD, lr=0.1, fused=True), batch, n, callbacks, kind)

    times = alternated({"plain": of(lambda task: []), "ours": of(holding)}, 5)
    print(f"{name}: " + ", ".join(f"{key} {1000 * low(found):.3f} ms" for key, found in times.items()))
    headline(
        f"a step with masks over one without, {name}", ratio(times["ours"], times["plain"]), at_most=1.03
    )


def selections(device: torch.device, sizes: tuple[int, ...]) -> None:
    """One global pruning, and what torch takes for it."""
    for n in sizes:
        need = NEEDS["ours"] * n
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else need
        if free < need:
            print(f"{n:,} weights need {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
            continue
        params = {name: p.to(device) for name, p in weights(n).items()}
        works = {"ours": ours(params)} | ({"torch": torchs(params)} if free > NEEDS["torch"] * n else {})
        times = alternated({name: timed(work) for name, work in works.items()}, 3, warm_up=1)
        mine = low(times["ours"])
        print(f"{n:,} weights to {SPARSITY:.0%}: {1000 * mine:.2f} ms, {1e9 * mine / n:.3f} ns a weight")
        if "torch" in times:
            headline(
                f"one global pruning of {n / 1e6:g}M weights, torch over ours",
                ratio(times["torch"], times["ours"]),
            )
        del params, works


def two_of_four(device: torch.device) -> None:
    """A linear layer whose weights are 2:4 over dense, in half precision."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        print("2:4 needs a GPU of compute capability 8.0 or above: not measured")
        return
    dense = nn.Linear(WIDE, WIDE, bias=False, device=device, dtype=torch.float16).eval().requires_grad_(False)
    prune(dense, 0.5, granularity=NM(2, 4))
    sparse = (
        nn.Linear(WIDE, WIDE, bias=False, device="meta", dtype=torch.float16).eval().requires_grad_(False)
    )
    sparse.weight = nn.Parameter(to_sparse_semi_structured(dense.weight), requires_grad=False)
    for n in BATCHES:
        x = torch.randn(n, WIDE, device=device, dtype=torch.float16)
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-2, atol=1e-2)
        times = settled({"dense": timed(lambda: dense(x)), "2:4": timed(lambda: sparse(x))}, 1.0)  # noqa: B023
        headline(
            f"a layer of {WIDE} x {WIDE}, batch {n}, half precision: dense over 2:4",
            ratio(times["dense"], times["2:4"]),
        )


def channels(device: torch.device, small: bool) -> None:
    """Networks that lost half of their channels over the full ones, in half precision."""
    pixels, batch = (64, 2) if small else (224, 64)
    dtype = torch.float32 if small else torch.float16
    for name in ("resnet18",) if small else ("resnet18", "resnet50", "mobilenet_v2"):
        torch.manual_seed(0)
        full = torchvision.models.get_model(name, weights=None).eval()
        cut = torchvision.models.get_model(name, weights=None).eval()
        prune_channels(cut, 0.5, example_input=[1, 3, 64, 64])
        x = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)
        both = [model.to(device, dtype).requires_grad_(False) for model in (full, cut)]
        times = settled({str(i): timed(lambda model=model: model(x)) for i, model in enumerate(both)}, 1.0)  # noqa: B023
        what = f"{name}, batch {batch}: the full network over one without half of its channels"
        headline(what, ratio(times["0"], times["1"]))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU that torch can use here. `--device cpu` rehearses at small sizes.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rehearsed = device.type == "cpu"
    print(f"{machine(device)}{'; a rehearsal at small sizes' if rehearsed else ''}")
    step("LeNet-300-100, batch 60", LeNet, (60, 1, 28, 28), device, 10 if rehearsed else 300)
    if not rehearsed:
        step("ResNet-20, batch 128", ResNet20, (128, 3, 32, 32), device, 300)
    selections(device, (100_000,) if rehearsed else (1_000_000, 10_000_000, 100_000_000, 1_000_000_000))
    two_of_four(device)
    channels(device, rehearsed)


if __name__ == "__main__":
    main()
