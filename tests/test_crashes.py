"""Killed at any moment, with a full disk, or given a broken file: nothing is lost and nothing is believed."""

import os
import random
import resource
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune import load_pruned, rewind
from lightning_prune.callbacks import masked
from lightning_prune.callbacks import pruning as callback_module
from lightning_prune.callbacks.checkpoints import WholeCheckpointIO, load_masks
from lightning_prune.holding import Handle
from lightning_prune.study import round_masks
from lightning_prune.study.recording import Records
from lightning_prune.study.records import read
from lightning_prune.study.round_masks import masks_of
from tests.killing import a_way, arm, differences, killed_at_random, missing
from tests.networks import Net, fitter, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* a round (ends at|takes it to)"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL"),
]

SPOTS = {
    "a step": (torch.optim.SGD, "step"),
    "masking after a step": (Handle, "apply"),
    "choosing masks": (callback_module, "next_masks"),
    "between pruning and rewinding": (lp.LotteryTicketRewind, "on_round_start"),
    "within a rewind": (rewind, "_keep_precision"),
    "between rewinding and masking": (Handle, "set"),
    "collecting a checkpoint": (masked, "pack_whole"),
    "before a file is on the disk": (os, "fsync"),
    "before a file has its name": (os, "replace"),
    "writing the masks of a round": (round_masks, "save"),
    "writing a record": (Records, "_finish"),
    "removing the masks of later rounds": (Path, "unlink"),
}


@dataclass(frozen=True)
class Setting:
    """A training as experiments train: so many steps, evaluated every few of them wherever an epoch ends."""

    batches: int  # of an epoch
    evaluate_every: int  # steps of a round, as `Records` counts them
    clock: dict[str, int]
    steps: int  # in all
    saves: dict[str, Any]  # of ModelCheckpoint


def a_setting(draw):
    """A setting at random: epoch, evaluation, round and checkpoint rarely end together."""
    batches = draw.randint(2, 7)
    clock = draw.choice([{"every_n_epochs": 2}, {"every_n_train_steps": draw.randint(3, 9)}])
    length = clock.get("every_n_train_steps", 2 * batches)
    saves = draw.choice(
        [
            {"every_n_epochs": draw.randint(1, 2), "save_on_train_epoch_end": True},
            {"every_n_epochs": draw.randint(1, 2), "save_on_train_epoch_end": True},
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"every_n_train_steps": draw.randint(2, 5)},
        ]
    )
    steps = 4 * length + draw.randint(0, 3)
    steps += (
        steps % saves.get("every_n_train_steps", steps + 1) == 0
    )  # the last evaluation comes after a step
    return Setting(batches, draw.randint(1, batches + 3), clock, steps, saves)


SETTINGS = {
    "as shipped": Setting(
        5, 4, {"every_n_train_steps": 7}, 30, {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    ),
    "within epochs": Setting(5, 3, {"every_n_epochs": 2}, 41, {"every_n_train_steps": 4}),
}


def train(folder, setting):
    """As an experiment trains: one checkpoint, written over the last, and records of the rounds."""
    torch.manual_seed(0)
    path = folder / "resume.ckpt"
    resume = path if path.is_file() else None
    if resume:
        torch.manual_seed(1)  # nothing may come from here
    pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.3), rounds=3, **setting.clock)
    rewinder, began = lp.LotteryTicketRewind(2), []

    class Began(Callback):
        def on_train_batch_start(self, *_):
            began.append(1)

    class Task(Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("seen", self.seen)  # else it is in no checkpoint

    writer = ModelCheckpoint(folder, path.stem, enable_version_counter=False, **setting.saves)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = {"schedule": lambda o: one_cycle(o, 0.2, total_steps=100), "interval": "step"}
    model = Task(batch=4, n=4 * setting.batches, **schedule)
    records = Records(folder, "ticket", 0, evaluate_every=setting.evaluate_every)
    trainer = fitter(
        *(rewinder, pruner, records, writer, Began()),
        epochs=-1,
        max_steps=setting.steps,
        enable_checkpointing=True,
        check_val_every_n_epoch=None,
        val_check_interval=setting.evaluate_every,
    )
    trainer.fit(model, ckpt_path=resume)
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in read(folder / "records.jsonl")[0]]
    return {
        "weights": dict(model.state_dict()),
        "masks": pruner.masks,
        "round": pruner.round,
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "snapshot": rewinder.snapshot.state_dict(),
        "records": records,
        "masks of the rounds": {str(r): masks for r, masks in masks_of(folder).items()},
        # a process with nothing left to train makes the iterator of an epoch, which draws
        "random": torch.get_rng_state() if began else None,
    }


def train_to_file(folder, setting, ways):
    arm(ways, SPOTS)
    torch.save(train(folder, setting), folder / "final.pt")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_at_the_worst_moments_ends_with_the_same_bits(name, tmp_path):
    ways = [
        ("at", "between pruning and rewinding", 1),
        ("in a write", 1, 0.5),
        ("at", "within a rewind", 2),
        ("at", "before a file has its name", 2),
        ("at", "writing the masks of a round", 2),
        ("after", 0.3),
    ]
    if name == "within epochs":
        ways = [("at", "a step", 6), ("at", "masking after a step", 9), ("at", "a step", 7)]
    (tmp_path / "straight").mkdir()
    expected = train(tmp_path / "straight", SETTINGS[name])
    kills, different = differences(tmp_path / "run", SETTINGS[name], ways, expected, train_to_file)
    assert different == []
    assert kills >= len(ways) - 1


def test_every_moment_to_be_killed_at_is_there():
    """A function that has moved would be found by the slow suite alone."""
    assert not missing(SPOTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_runs_killed_at_random_moments_end_with_the_same_bits(seed, tmp_path, capsys):
    often = {"a step": 24, "masking after a step": 40, "between rewinding and masking": 4}
    die_by = partial(a_way, spots=SPOTS, often=often)
    total, runs, different = killed_at_random(seed, 30, tmp_path, a_setting, die_by, train, train_to_file)
    with capsys.disabled():
        print(f"\n{total} kills by SIGKILL in {runs} runs, {len(different)} differences")
    assert different == []


# -------------------------------------------------------------------------------------------- disks and files


class Full(Callback):
    """From an epoch on no file may become larger than so many bytes, as on a full disk."""

    def __init__(self, epoch, size):
        self.epoch, self.size = epoch, size

    def on_train_epoch_start(self, trainer, model):
        if trainer.current_epoch == self.epoch:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


@pytest.mark.parametrize("size", [0, 20_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(size, tmp_path):
    def go(folder, *callbacks, resume=None):
        torch.manual_seed(0 if resume is None else 1)
        pruner, model = lp.IterativeMagnitudePruning(rounds=3), Net()
        writer = ModelCheckpoint(folder, "one", save_on_train_epoch_end=True, enable_version_counter=False)
        callbacks = pruner, lp.LotteryTicketRewind(1), writer, *callbacks
        fitter(*callbacks, epochs=4, enable_checkpointing=True).fit(model, ckpt_path=resume)
        return pruner.masks, dict(model.state_dict()), torch.get_rng_state()

    expected, limits = go(tmp_path / "straight"), resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "full"
    try:
        with pytest.raises(
            OSError, match=r"one.ckpt' could not be written .*File too large.*is as it was.*Make room"
        ):
            go(folder, Full(2, size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in folder.iterdir()] == ["one.ckpt"]
    assert torch.load(folder / "one.ckpt", weights_only=True)["epoch"] == 1
    assert same(go(folder, resume=folder / "one.ckpt"), expected)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    trainer = fitter(lp.IterativeMagnitudePruning(rounds=2), lp.LotteryTicketRewind(1), epochs=2)
    trainer.fit(Net())
    trainer.save_checkpoint(folder / "good.ckpt")
    return (folder / "good.ckpt").read_bytes()


def resume(path):
    pruner = lp.IterativeMagnitudePruning(rounds=2)
    fitter(pruner, lp.LotteryTicketRewind(1), epochs=3).fit(Net(), ckpt_path=path)
    return pruner


BROKEN = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-10],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"no file of torch.save" * 9,
    "a bit flipped": lambda content: content[:9000] + bytes([content[9000] ^ 4]) + content[9001:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_before_anything_is_loaded(name, good, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(BROKEN[name](good))
    message = (
        r"ckpt_path='.*x.ckpt': it is cut off, damaged, or no checkpoint at all .*resume from the one before"
    )
    with pytest.raises(ValueError, match=message):
        resume(path)
    path.write_bytes(good)
    assert resume(path).round == 2


def test_a_flipped_bit_is_found_or_harmless(good, tmp_path):
    """Everywhere in the file: what is read is what was written, or nothing."""
    path, draw, refused = tmp_path / "x.ckpt", random.Random(0), 0
    path.write_bytes(good)
    expected = WholeCheckpointIO().load_checkpoint(path)
    directory = zipfile.ZipFile(path).start_dir  # of the archive: names, places, attributes; to the end
    attributes = [(directory + 38, bit) for bit in range(8)]  # of the first file
    drawn = [(draw.randrange(len(good)), draw.randrange(8)) for _ in range(300)]
    drawn += [(draw.randrange(directory, len(good)), draw.randrange(8)) for _ in range(300)]
    for place, bit in [*attributes, *drawn]:
        content = bytearray(good)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        try:
            found = WholeCheckpointIO().load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert same(found, expected)
    assert refused > 200  # the others hit what pads the file, and what nobody reads


def test_damaged_files_give_no_masks_and_no_network(tmp_path):
    """As checkpoints: a bit that has changed is found, or changes nothing."""
    path, draw, net = tmp_path / "x.pt", random.Random(0), torch.nn.Linear(30, 20)
    masks = lp.prune(net, 0.5)
    for stored, reading in (
        (masks, load_masks),
        (net.state_dict(), lambda path: load_pruned(torch.nn.Linear(30, 20), path).state_dict()),
    ):
        torch.save(stored, path)
        content, refused = path.read_bytes(), 0
        for _ in range(60):
            damaged = bytearray(content)
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                found = reading(path)
            except ValueError:
                refused += 1
            else:
                assert same(dict(found), dict(stored))
        assert refused > 20


def test_a_foreign_file_is_refused(tmp_path):
    for content in (Net().state_dict(), [1], {"epoch": 3}):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(
            ValueError, match=r"x.ckpt': it is no checkpoint of a Trainer. Load a bare state_dict"
        ):
            resume(tmp_path / "x.ckpt")


def test_the_checkpoint_of_another_callback_is_refused(tmp_path):
    trainer = fitter(lp.IterativeMagnitudePruning(rounds=1, include=["head*"]), epochs=2)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with (
        pytest.warns(UserWarning, match="Be aware"),
        pytest.raises(ValueError, match="Give layers, include and exclude as"),
    ):
        resume(tmp_path / "x.ckpt")


def test_a_missing_checkpoint_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.ckpt"):
        resume(tmp_path / "x.ckpt")


def test_a_checkpoint_plugin_of_ones_own_stays():
    class Mine(TorchCheckpointIO):
        pass

    mine = Mine()
    trainer = fitter(lp.IterativeMagnitudePruning(rounds=1), epochs=1, plugins=[mine])
    trainer.fit(Net())
    assert trainer.strategy.checkpoint_io is mine

    class Look(Callback):
        def on_train_start(self, trainer, model):
            assert type(trainer.strategy.checkpoint_io) is WholeCheckpointIO

    trainer = fitter(lp.IterativeMagnitudePruning(rounds=1), Look(), epochs=1)
    trainer.fit(Net())
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO  # nothing of ours stays behind
