"""`make gpu`: what holds on a GPU, in ten minutes and without internet: tests, benchmarks, an experiment.

`python -m experiments.gpu [--folder FOLDER]` writes what each of them printed, with the card's name, and the
experiment's records. A part that fails or takes too long is said, and the others go on; the status is 1 then.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_prune.deploy.timing import machine

RESULTS = Path("experiments/results/gpu")


@dataclass(frozen=True)
class Part:
    """What is run, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


PARTS = (
    Part("tests", ("pytest", "-q", "-m", "gpu", "tests"), 240),
    Part("benchmarks", ("experiments.benchmarks.device",), 180),
    Part(
        "experiment",
        (
            "experiments.run",
            "experiment=mnist1d",
            "kind=ticket",
            "trainer=gpu",
            "progress=false",
            "runs={}/runs",
        ),
        150,
    ),
)


def run(part: Part, folder: Path) -> str:
    """Run a part, show and keep what it prints. Returns how it ended."""
    given = [argument.format(folder) for argument in part.command]
    command = ["timeout", str(part.seconds), sys.executable, "-u", "-m", *given]
    with (
        (folder / f"{part.name}.txt").open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        for line in process.stdout or ():
            print(line, end="", flush=True)
            kept.write(line)
    ends = {0: "passed", 124: f"was ended after {part.seconds} s"}
    return ends.get(process.returncode, f"failed with exit status {process.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; 1 if one failed."""
    parser = argparse.ArgumentParser("python -m experiments.gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, help=f"the results (default: {RESULTS}/CARD)")
    given = parser.parse_args(arguments).folder
    if not torch.cuda.is_available():
        print("There is no GPU that torch can use here, so nothing was run.", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    card = re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).strip("_").lower()
    folder = given or RESULTS / card
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)  # or a run that is done would not be made again
    ends = {part.name: run(part, folder) for part in PARTS}
    for records in folder.glob("runs/*/*/records.jsonl"):
        shutil.copy(records, folder)
    lines = [machine(device), *(f"{name}: {end}" for name, end in ends.items())]
    (folder / "README.md").write_text("\n\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(end != "passed" for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
