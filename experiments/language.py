"""The causal language model of `docs/recipes.md`: SmolLM2-135M, pruned to half, once, without training.

`python -m experiments.language [--seeds N]` writes `experiments/results/recipes/language.jsonl` and prints
the table of the page. The seed draws the calibration text. At a reduced scale, for one core: 2,048 tokens to
calibrate and 2,048 to test. It needs the packages that `lightning_prune.study.smollm2` names.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import lightning_prune as lp
from lightning_prune.masks import Masks
from lightning_prune.study import smollm2
from lightning_prune.study.records import Record, read, write
from lightning_prune.study.statistics import interval

RESULTS = Path(__file__).parent / "results" / "recipes" / "language.jsonl"
CALIBRATION, TEST = (8, 256), (8, 256)  # parts of a text, tokens of each

_wanda = partial(
    lp.prune, criterion=lp.criteria.wanda, allocate=lp.allocation.per_output, layer_by_layer=True
)
_sparse_gpt = partial(
    lp.prune, criterion=lp.criteria.SparseGPT(), allocate=lp.allocation.uniform, layer_by_layer=True
)
WAYS: dict[str, Callable[..., Masks] | None] = {
    "dense": None,
    "magnitude, every layer alike": partial(lp.prune, allocate=lp.allocation.uniform),
    "Wanda, every output alike": _wanda,
    "SparseGPT, every layer alike": _sparse_gpt,
}
WITHOUT_DATA = ("dense", "magnitude, every layer alike")  # which no seed changes


def measure(seeds: Sequence[int], ways: Sequence[str] = tuple(WAYS)) -> Iterator[Record]:
    """The perplexity of the network after each way to half of the weights, for each seed that changes it."""
    model, tokenize = smollm2.load()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    text = tokenize(smollm2.calibration_text())
    held_out = smollm2.parts(tokenize(smollm2.held_out_text()), *TEST)
    names = [target.parameter for target in lp.targets(model) if target.prunable]
    for seed in seeds:
        data = smollm2.parts(text, *CALIBRATION, seed=seed)
        for way in ways:
            if way in WITHOUT_DATA and seed != seeds[0]:
                continue
            model.load_state_dict(start)
            prune = WAYS[way]
            if prune:
                prune(model, 0.5, data=data)
            weights = [model.get_parameter(name) for name in names]
            alive = sum(int(weight.count_nonzero()) for weight in weights)
            count = {"alive": alive, "total": sum(weight.numel() for weight in weights)}
            metrics = {"perplexity": smollm2.perplexity(model, held_out)}
            yield {"kind": way, "seed": seed, "round": 0, **count, "metrics": metrics}


def table(records: Sequence[Record]) -> str:
    """Perplexity, mean over seeds and its 95 % interval, of each way."""
    lines = ["| way | weights left | perplexity |", "|---|---|---|"]
    for way in WAYS:
        found = [r for r in records if r["kind"] == way]
        values = [r["metrics"]["perplexity"] for r in found]
        low, mean, high = interval(values)
        said = f"{mean:.1f}" if way in WITHOUT_DATA else f"{mean:.1f} [{low:.1f}, {high:.1f}]"
        lines.append(f"| {way} | {found[0]['alive'] / found[0]['total']:.0%} | {said} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for record in measure(range(1, given.seeds + 1)):
        records.append(record)
        write(RESULTS, records)
    print(table(read(RESULTS)[0]))


if __name__ == "__main__":
    main()
