"""A sweep in a process of its own, which can be killed, or left to come to its end."""

import multiprocessing
import os
import sys
import warnings

import mnist1d.data  # noqa: F401  so that no process has to import it again

from lightning_prune.study import run

CONTEXT = multiprocessing.get_context("forkserver")

SMALL = ["experiment=mnist1d", "rounds=2", "steps_per_round=40", "evaluate_every=20", "progress=false"]
SMALL += ["checkpoint_every_n_epochs=1"]


def command(output, *arguments):
    """`lightning-prune run` with these arguments, in a process group of its own."""
    warnings.simplefilter("ignore")
    os.setsid()
    os.environ["COLUMNS"] = "140"  # of the terminal
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    sys.argv = ["lightning-prune"]
    run.command(list(arguments))
    if loky := sys.modules.get("joblib.externals.loky"):
        # multiprocessing waits for all children, and joblib's live on idle for five minutes
        loky.get_reusable_executor().shutdown()


def start(output, *arguments):
    """Start the command."""
    process = CONTEXT.Process(target=command, args=(output, *arguments))
    process.start()
    return process
