"""Every benchmark, one after the other, and one table of their headlines: `make bench`.

`python -m experiments.benchmarks [NAME ...]`: those of these names, or all. What each prints is shown as it
comes. A benchmark that fails has a row that says so, the others go on, and the exit status is 1.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from experiments.benchmarks.headlines import Headline, headlines
from lightning_prune.deploy.timing import machine
from lightning_prune.tables import table

BENCHMARKS = (
    "selection",
    "sharded",
    "scale",
    "step",
    "growth",
    "imports",
    "doctor",
    "experiment",
    "size",
    "inference",
    "exports",
    "channels",
    "users",
    "calibration",
)


def run(name: str) -> list[Headline]:
    """Run a benchmark in a process of its own, show what it prints, and return its headlines."""
    command = [sys.executable, "-u", "-m", f"experiments.benchmarks.{name}"]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    failed = [Headline(name, f"failed with exit status {process.returncode}")] if process.returncode else []
    return [*headlines(lines), *failed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if one failed."""
    parser = argparse.ArgumentParser("python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args(arguments).names or BENCHMARKS
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; allowed are {', '.join(BENCHMARKS)}")
    rows = [row for name in names for row in run(name)]
    print()
    print(table(machine(), rows) if rows else f"No headlines. {machine()}")
    return int(any(row.measured.startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
