"""What is seen while an experiment runs."""

import logging
import os
import re
import subprocess
import sys

import pytest
from hydra.utils import get_class

from lightning_prune.study import progress
from lightning_prune.study.run import run
from tests.test_experiments import config


@pytest.mark.parametrize("bar", ["tqdm.tqdm", "tqdm.rich.tqdm"])
def test_the_bar_shows_round_weights_left_best_validation_and_time_left(bar, tmp_path, monkeypatch):
    said = []

    class Watched(get_class(bar)):
        def update(self, n=1):
            shown = super().update(n)
            said.append(
                (self.desc, self.n, self.total, self.format_dict["rate"], self.format_dict["elapsed"])
            )
            return shown

    monkeypatch.setattr(
        progress.ExperimentProgress, "__init__", with_bar(progress.ExperimentProgress.__init__, Watched)
    )
    folder = run(config(tmp_path, f"progress={bar}"))
    assert (folder / "DONE").is_file()
    descriptions = [desc.removesuffix(": ") for desc, *_ in said]
    assert descriptions[0] == "ticket: round 0/2, 100.0% of weights"
    assert re.fullmatch(r"ticket: round 2/2, 49\.9% of weights, best val_acc 0\.\d+", descriptions[-1])
    best = [float(desc.split("val_acc ")[1]) for desc in descriptions if "val_acc" in desc]
    assert best == sorted(best)
    assert said[-1][1:3] == (120, 120)  # of the whole experiment: the time left is that of all rounds
    assert [n for _, n, *_ in said] == sorted(n for _, n, *_ in said)


def with_bar(original, bar):
    def init(self, kind, _, every=10):
        original(self, kind, bar, every)

    return init


def test_the_best_so_far_survives_a_restart():
    first = progress.ExperimentProgress("ticket")
    first.best = {"val_acc": 0.9}
    second = progress.ExperimentProgress("ticket")
    second.load_state_dict(first.state_dict())
    assert second.best == {"val_acc": 0.9}


def test_the_log_says_in_a_line_what_each_pruning_did(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning_prune"):
        run(config(tmp_path))
    assert [r.getMessage() for r in caplog.records if r.name == "lightning_prune.callbacks.masked"] == [
        "round 1 of 2: pruned 14700, 35300 weights left (70.60 %)",
        "round 2 of 2: pruned 10335, 24965 weights left (49.93 %)",
    ]


def shown(text, columns):
    """The lines that a terminal of so many columns shows in the end."""
    screen, row, at = {}, 0, 0
    for _, keys, what, plain in re.findall(r"(\x1b\[([?\d;]*)([A-Za-z]))|([^\x1b])", text):
        if what == "A":
            row -= int(keys or 1)
        elif what == "K":
            screen = {place: c for place, c in screen.items() if place[0] != row}
        elif plain == "\r":
            at = 0
        elif plain == "\n":
            row += 1
        elif plain:
            if at == columns:
                row, at = row + 1, 0
            screen[row, at] = plain
            at += 1
    rows = [[screen.get((r, c), " ") for c in range(columns)] for r in range(row + 1)]
    return [line for r in rows if (line := "".join(r).rstrip())]


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("bar", ["tqdm.tqdm", "tqdm.rich.tqdm"])
def test_in_a_terminal_of_80_columns_one_bar_stays_and_every_line_of_the_log(bar, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = "from lightning_prune.study.command import main; main()"
    short = ["rounds=2", "steps_per_round=60", "evaluate_every=20", f"progress={bar}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "experiment=mnist1d", *short],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # nobody writes any more
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    lines = shown(written.decode(), 80)
    assert lines[:2] == [
        "round 1 of 2: pruned 14700, 35300 weights left (70.60 %)",
        "round 2 of 2: pruned 10335, 24965 weights left (49.93 %)",
    ]
    assert re.match(r"ticket: round 2/2, 49\.9% of weights, best val_acc 0\.\d+:.*100%", lines[2])
    assert lines[3].startswith("written: ")
    assert len(lines) == 4
