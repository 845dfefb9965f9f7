"""Time to import lightning_prune against lightning.pytorch, which it imports.

`python -m experiments.benchmarks.imports [--pairs N]`: fresh interpreters, alternated; user and system time,
which other jobs disturb less than the clock on the wall.
"""

import argparse
import resource
import subprocess
import sys
from functools import partial

from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.timing import alternated, low, machine, ratio


def cost(module: str) -> float:
    """Seconds of processor time of an interpreter that imports a module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    print(machine())
    ways = {module: partial(cost, module) for module in ("lightning.pytorch", "lightning_prune")}
    alternated(ways, 1)  # which writes the byte code
    times = alternated(ways, pairs)
    for module, seconds in times.items():
        print(f"import {module}: {low(seconds):.2f} s")
    against = ratio(times["lightning_prune"], times["lightning.pytorch"])
    headline("import lightning_prune over lightning.pytorch", against, at_most=1.05)


if __name__ == "__main__":
    main()
