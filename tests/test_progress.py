"""What is seen while an experiment runs."""

import logging
import re

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
    assert [r.getMessage() for r in caplog.records if r.name.startswith("lightning_prune.callbacks")] == [
        "round 1 of 2: pruned 14700, 35300 weights left (70.60 %)",
        "round 2 of 2: pruned 10335, 24965 weights left (49.93 %)",
    ]
