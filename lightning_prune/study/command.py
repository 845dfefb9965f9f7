"""The command line: `lightning-prune run | plan | controls | report`."""

import os
import sys
from collections.abc import Callable

from lightning_prune.study import report, run
from lightning_prune.study.configs import CONF, load

USAGE = """usage: lightning-prune COMMAND ...

  run OVERRIDES [--multirun]   train what a config describes: `lightning-prune run experiment=mnist1d seed=1`
  plan OVERRIDES [--multirun]  say what `run` would do, and do nothing
  controls OVERRIDES           `run --multirun` with every control of the ticket, whatever it may be
  report FOLDER...             a page, figures and tables of the runs in a folder

OVERRIDES are those of Hydra; `lightning-prune run --help` lists the choices of every axis."""


def main() -> None:
    """What `lightning-prune` calls."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": run.command,
        "plan": run.dry_run,
        "controls": controls,
        "report": report.main,
    }
    sys.path.insert(0, os.getcwd())  # modules of one's own, as `python -m` finds them
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in commands:
        wanted = name in ("-h", "--help")
        print(USAGE if wanted else f"{name}: there is no such command.\n\n{USAGE}")
        sys.exit(0 if wanted else 2)
    commands[name](arguments)


def controls(arguments: list[str]) -> None:
    """Run every control that starts from a ticket, and the tickets that are missing."""
    kinds = {path.stem: load(path) for path in sorted((CONF / "kind").glob("*.yaml"))}
    after = [kind for kind, config in kinds.items() if config.get("after") == "ticket"]
    run.command(["--multirun", f"kind={','.join(after)}", *arguments])
