"""Killed at any moment, with a full disk, or given a broken file: nothing is lost and nothing is believed."""

import functools
import os
import random
import resource
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune import rewind
from lightning_prune.callbacks import masked
from lightning_prune.callbacks import pruning as callback_module
from lightning_prune.callbacks.checkpoints import WholeCheckpointIO
from lightning_prune.holding import Handle
from lightning_prune.study import round_masks
from lightning_prune.study.recording import Records
from lightning_prune.study.records import read
from lightning_prune.study.round_masks import masks_of
from tests.networks import Net, fitter, same
from tests.test_resume import in_another_process

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


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(spot, n, spots=SPOTS):
    """The process ends without another instruction at the n-th call of a function."""
    owner, name = spots[spot]
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def deadly(*args, **options):
        calls.append(1)
        if len(calls) == n:
            die()
        return original(*args, **options)

    setattr(owner, name, deadly)


def die_in_a_write(n, share):
    """In the n-th checkpoint, when about this share of its bytes is written."""
    save, calls = torch.save, []

    class Deadly:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += self.file.write(data)
            self.file.flush()
            if self.written > share * 60_000:
                die()
            return len(data)

        def flush(self):
            self.file.flush()

    def deadly(value, file):
        whole = "state_dict" in value  # a checkpoint: the masks of a round are small
        calls.extend([1] * whole)
        return save(value, Deadly(file) if whole and len(calls) == n else file)

    torch.save = deadly


def die_after(seconds):
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


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
    torch.set_num_threads(1)
    for way, *arguments in ways:
        {"at": die_at, "in a write": die_in_a_write, "after": die_after}[way](*arguments)
    result = train(folder, setting)
    torch.save(result, folder / "final.pt")


def differences(folder, setting, ways, expected, target=train_to_file):
    """Kill a run in these ways, one after the other, starting it again each time; then let it end."""
    folder.mkdir()
    kills = 0
    for way in (*ways, None):
        code = in_another_process(folder, setting, [way] if way else [], target=target)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            break
    result = torch.load(folder / "final.pt", weights_only=True)
    if result["random"] is None:
        expected = {**expected, "random": None}
    different = [key for key in expected if not same(result[key], expected[key])]
    left = sorted(path.name for path in folder.rglob("*") if path.suffix == ".tmp" or "sparse" in path.name)
    return kills, [*different, *(f"left behind: {name}" for name in left)]


def a_way(draw):
    """A way to die, at random."""
    kind = draw.choice(["at", "at", "in a write", "after"])
    if kind == "at":
        spot = draw.choice(list(SPOTS))
        often = {"a step": 24, "masking after a step": 40, "between rewinding and masking": 4}
        seldom = {"before a file is on the disk": 8, "before a file has its name": 8}
        return "at", spot, draw.randint(1, {**often, **seldom}.get(spot, 3))
    if kind == "in a write":
        return kind, draw.randint(1, 5), draw.random()
    return kind, draw.uniform(0.05, 0.8)


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
    kills, different = differences(tmp_path / "run", SETTINGS[name], ways, expected)
    assert different == []
    assert kills >= len(ways) - 1


def test_every_moment_to_be_killed_at_is_there():
    """A function that has moved would be found by the slow suite alone."""
    assert not [spot for spot, (owner, name) in SPOTS.items() if not hasattr(owner, name)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_runs_killed_at_random_moments_end_with_the_same_bits(seed, tmp_path, capsys):
    draw, total, runs, different = random.Random(seed), 0, 0, []
    while total < 30:
        setting, ways = a_setting(draw), [a_way(draw) for _ in range(draw.randint(2, 6))]
        (tmp_path / f"straight {runs}").mkdir()
        expected = train(tmp_path / f"straight {runs}", setting)
        kills, its = differences(tmp_path / str(runs), setting, ways, expected)
        runs, total = runs + 1, total + kills
        different += [(setting, ways, what) for what in its]
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
    for _ in range(300):
        content = bytearray(good)
        content[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = WholeCheckpointIO().load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert same(found, expected)
    assert refused > 200  # the others hit what pads the file


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
