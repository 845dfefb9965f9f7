"""`python -m experiments.run`, the same as `lightning-prune run`; with `--dry-run` the same as `plan`."""

import sys

from lightning_prune.study import run

if __name__ == "__main__":
    run.command(sys.argv[1:])
