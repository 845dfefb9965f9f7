"""Every bad value in a config gives an error that names it, before training, and no half-written run."""

import random

import pytest
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.study.records import read
from lightning_prune.study.run import run
from lightning_prune.study.tasks import Classification
from tests.naming import in_words
from tests.test_experiments import config, lines

pytestmark = pytest.mark.filterwarnings("ignore:.* a round (ends at|takes it to)")

# what is wrong: values that it may not have, and other settings that bring it into play
BAD = {
    "rounds": ([-1, 1.5, "many", "null"], []),
    "steps_per_round": ([0, -3, 2.5, "many"], []),
    "rate": ([0, 1, -0.1, 2, "nan", "inf", "some"], []),
    "output_rate": ([0, 1, -0.1, "nan"], []),
    "batch_size": ([0, -1, 2.5, "all"], []),
    "evaluate_every": ([0, -1, "often"], []),
    "threads": ([0, -1, "all"], []),
    "seed": (["one", -1], []),
    "checkpoint_every_n_epochs": ([-1, "often"], []),
    "optimizer.lr": ([-1, "nan", "fast"], []),
    "criterion": (["magnitud"], []),
    "schedule": (["geometrik"], []),
    "allocation": (["globl"], []),
    "granularity": (["blok"], []),
    "model": (["lenett"], []),
    "rewind.to_step": ([-1, 0.5, 40, 10**9], []),
    "schedule.sparsity": ([-0.1, 1.0, 1.5, "nan", "half"], ["schedule=one_shot"]),
    "granularity.n": ([-1, 0, 9], ["granularity=nm"]),
    "granularity.rows": ([-1, 0, 1.5], ["granularity=block"]),
    "+pruner.max_sparsity": ([0, -1, 1.5, "nan"], []),
    "+pruner.include": (["[nope*]", "[]"], []),
    "+pruner.exclude": (["[nope*]", "[*]"], []),
    "+pruner.layers": (["[Conv2d]", "Linear"], []),
    "+pruner.every_n_epochs": ([0, -1, 1.5], []),
    "+pruner.score_batches": ([0, -1, 1.5], []),
    "+pruner.masks": (["zeroes", "nowhere.ckpt"], []),
    "+pruner.nonsense": ([1], []),
}
CASES = [(key, value, others) for key, (values, others) in BAD.items() for value in values]
SAMPLE = random.Random(8).sample(CASES, 12)


def refused(key, value, others, folder, monkeypatch):
    began = []
    monkeypatch.setattr(Classification, "training_step", lambda *_: began.append(1))
    libraries = (HydraException, OmegaConfBaseException, MisconfigurationException)
    with pytest.raises((ValueError, TypeError, LookupError, RuntimeError, OSError, *libraries)) as error:
        run(config(folder, *others, f"{key}={value}"))
    assert began == []
    told = str(error.value).lower()
    name, given = key.lstrip("+").split(".")[-1], str(value).strip("[]")
    assert name in told or (given and given in told), told
    for path in folder.rglob("*"):
        assert path.suffix != ".ckpt"
        assert path.name not in ("DONE", "masks")
        assert path.name != "records.jsonl" or read(path) == ([], 0)


@pytest.mark.parametrize(("key", "value", "others"), SAMPLE, ids=in_words)
def test_a_bad_value_is_refused_before_training(key, value, others, tmp_path, monkeypatch):
    refused(key, value, others, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value", "others"), CASES, ids=in_words)
def test_every_bad_value_is_refused_before_training(key, value, others, tmp_path, monkeypatch):
    refused(key, value, others, tmp_path, monkeypatch)


def test_the_same_command_mended_runs_where_the_bad_one_was_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        refused("rate", 2, [], tmp_path, patch)
    assert [r["round"] for r in lines(run(config(tmp_path, "rate=0.3")))] == [0, 1, 2]
