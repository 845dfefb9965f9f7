"""Masks that grow, in a training that is killed at any moment: resumed, it ends with the same bits."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune import allocation, criteria, growth, schedules
from lightning_prune.callbacks import growing, masked
from lightning_prune.granularity import NM
from lightning_prune.holding import Handle
from lightning_prune.study import round_masks
from lightning_prune.study.recording import Records
from lightning_prune.study.records import read
from lightning_prune.study.round_masks import masks_of
from tests.killing import a_way, arm, differences, killed_at_random, missing
from tests.networks import Net, fitter, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL"),
]

SPOTS = {
    "a step": (torch.optim.SGD, "step"),
    "masking after a step": (Handle, "apply"),
    "choosing the first masks": (growing, "next_masks"),
    "scoring": (growing, "score"),
    "exchanging": (growing, "in_exchange"),
    "masking after an update": (Handle, "set"),
    "collecting a checkpoint": (masked, "pack_whole"),
    "before a file is on the disk": (os, "fsync"),
    "before a file has its name": (os, "replace"),
    "writing the masks": (round_masks, "save"),
    "writing a record": (Records, "_finish"),
}
METHODS = {  # what differs from RigL
    "RigL": {},
    "SET": {"grow": criteria.Random(5)},
    "SNFS": {"grow": criteria.momentum},
    "GraNet": {"sparsity": schedules.Cubic(0.8, rounds=4, initial=0.5), "allocate": allocation.global_rank},
    "AC/DC": {"sparsity": schedules.Alternating(0.8), "fraction": 0.0, "allocate": allocation.global_rank},
    "SRigL": {"granularity": growth.FanIn(0.3)},
    "2:4": {"granularity": NM(2, 4), "sparsity": 0.5},
}


@dataclass(frozen=True)
class Setting:
    """A training of so many steps, with updates and checkpoints that rarely fall together."""

    method: str
    batches: int  # of an epoch
    evaluate_every: int
    every: int  # steps between two updates
    steps: int  # in all
    saves: dict[str, Any]  # of ModelCheckpoint


def a_setting(draw):
    batches, every = draw.randint(2, 7), draw.randint(1, 6)
    saves = draw.choice(
        [
            {"every_n_epochs": draw.randint(1, 2), "save_on_train_epoch_end": True},
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"every_n_train_steps": draw.randint(2, 5)},
        ]
    )
    steps = 5 * every + draw.randint(12, 20)
    steps += (
        steps % saves.get("every_n_train_steps", steps + 1) == 0
    )  # the last evaluation comes after a step
    return Setting(draw.choice(list(METHODS)), batches, draw.randint(1, batches + 3), every, steps, saves)


def train(folder, setting):
    """As an experiment trains: one checkpoint, written over the last, and a record of the training."""
    torch.manual_seed(0)
    path = folder / "resume.ckpt"
    resume = path if path.is_file() else None
    if resume:
        torch.manual_seed(1)  # nothing may come from here
    options = {"sparsity": 0.8, "fraction": schedules.CosineDecay(0.5), "every_n_train_steps": setting.every}
    if setting.method == "AC/DC":
        options["until_step"] = 4 * setting.every  # three updates, so that it ends sparse
    pruner, began = lp.DynamicSparseTraining(**{**options, **METHODS[setting.method]}), []

    class Began(Callback):
        def on_train_batch_start(self, *_):
            began.append(1)

    class Task(Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("seen", self.seen)  # else it is in no checkpoint

    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = {"schedule": lambda o: one_cycle(o, 0.2, total_steps=100), "interval": "step"}
    model = Task(batch=4, n=4 * setting.batches, **schedule)
    trainer = fitter(
        pruner,
        Records(folder, "rigl", 0, evaluate_every=setting.evaluate_every),
        ModelCheckpoint(folder, path.stem, enable_version_counter=False, **setting.saves),
        Began(),
        epochs=-1,
        max_steps=setting.steps,
        enable_checkpointing=True,
        check_val_every_n_epoch=None,
        val_check_interval=setting.evaluate_every,
    )
    trainer.fit(model, ckpt_path=resume)
    return {
        "weights": dict(model.state_dict()),
        "masks": pruner.masks,
        "round": pruner.round,
        "explored": pruner.explored,
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "records": [
            {k: v for k, v in r.items() if k != "seconds"} for r in read(folder / "records.jsonl")[0]
        ],
        "written masks": {str(r): masks for r, masks in masks_of(folder).items()},
        # a process with nothing left to train makes the iterator of an epoch, which draws
        "random": torch.get_rng_state() if began else None,
    }


def train_to_file(folder, setting, ways):
    arm(ways, SPOTS)
    torch.save(train(folder, setting), folder / "final.pt")


def test_a_training_whose_masks_grow_is_killed_in_its_updates_and_ends_with_the_same_bits(tmp_path):
    setting = Setting("SRigL", 5, 3, 4, 30, {"every_n_train_steps": 3})
    (tmp_path / "straight").mkdir()
    expected = train(tmp_path / "straight", setting)
    assert expected["round"] == 5
    ways = [("at", "exchanging", 2), ("at", "masking after an update", 1), ("in a write", 2, 0.5)]
    kills, different = differences(tmp_path / "run", setting, ways, expected, train_to_file)
    assert different == []
    assert kills == len(ways)


def test_every_moment_to_be_killed_at_is_there():
    """A function that has moved would be found by the slow suite alone."""
    assert not missing(SPOTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_trainings_whose_masks_grow_are_killed_at_random_and_end_with_the_same_bits(seed, tmp_path, capsys):
    often = {"a step": 24, "masking after a step": 40, "scoring": 8, "exchanging": 4}
    die_by = partial(a_way, spots=SPOTS, often=often)

    def straight(folder, setting):
        result = train(folder, setting)
        assert result["round"] > 0
        return result

    total, runs, different = killed_at_random(seed, 20, tmp_path, a_setting, die_by, straight, train_to_file)
    with capsys.disabled():
        print(f"\n{total} kills by SIGKILL in {runs} runs, {len(different)} differences")
    assert different == []


def test_bits_are_compared(tmp_path):
    """A training that differs in one number is found out."""
    results = []
    for every in (2, 3):
        folder = tmp_path / str(every)
        folder.mkdir()
        results.append(train(folder, Setting("RigL", 3, 2, every, 12, {"every_n_epochs": 1})))
    assert not same(results[0]["weights"], results[1]["weights"])
