"""Resume equals straight run: killed anywhere and started again, a run ends with the same bits."""

import multiprocessing
import os
import random
import signal
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, Dataset

import lightning_prune as lp
from tests.interrupted import CLOCKS, EPOCHS, REWINDS, Stopped, run, run_to_file
from tests.modes import a_mode, a_mode_of_rounds, train
from tests.networks import Net, fitter, same, samples, state

pytestmark = pytest.mark.filterwarnings("ignore:.* a round (ends at|takes it to)")

SAVED = ["epoch end", "validation end"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Uninterrupted runs with all their checkpoints, each made once."""
    made = {}

    def make(clock, saved, **options):
        key = (clock, saved, *sorted(options.items(), key=str))
        if key not in made:
            folder = tmp_path_factory.mktemp("straight")
            made[key] = folder, run(folder, clock, saved, **options)
        return made[key]

    return make


def equal(result, expected):
    different = [key for key in expected if not same(result[key], expected[key])]
    assert not different


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_resume_equals_straight_run(epoch, clock, saved, straight, tmp_path):
    folder, expected = straight(clock, saved)
    equal(run(tmp_path, clock, saved, resume=folder / f"epoch={epoch}.ckpt"), expected)


def unlike_the_straight_run(mode, folder, draw=None):
    """Train in a mode, then go on from its checkpoints: from all, or from three at random. What differs?"""
    (folder / "straight").mkdir()
    whole, expected = train(mode, folder / "straight")
    files = sorted((folder / "straight").glob("*.ckpt"))
    different = []
    for file in files if draw is None else draw.sample(files, min(3, len(files))):
        happened = torch.load(file, weights_only=True)["callbacks"]["Trace"]["happened"]
        trace, result = train(mode, folder / f"from {file.stem}", resume=file)
        wrong = [key for key in expected if not same(result[key], expected[key])]
        if trace.seen or any(what == "batch" for what, *_ in whole.seen[happened:]):
            wrong += ["trace"] * (not same(trace.seen, whole.seen[happened:]))
        else:  # Nothing was left to train, and Lightning ends at once.
            wrong = [what for what in wrong if what in ("weights", "masks", "round")]
        different += [(file.name, what) for what in wrong]
    return different


IN_ANY_MODE = [
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",  # it does not know
    "ignore:ReduceLROnPlateau conditioned on metric",
    "ignore:Early stopping conditioned on metric",
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:.*the fit (has room for|ended in round)",
    "ignore:ModelCheckpoint.monitor='val_loss'.* could not find the monitored key",
]


def in_any_mode(test):
    for message in IN_ANY_MODE:
        test = pytest.mark.filterwarnings(message)(test)
    return test


@in_any_mode
@pytest.mark.parametrize("seed", range(20))
def test_resume_equals_straight_run_in_any_mode(seed, tmp_path):
    draw = random.Random(seed)
    mode = a_mode(draw)
    assert unlike_the_straight_run(mode, tmp_path, draw) == [], mode


@in_any_mode
@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 120))]
)
def test_resume_equals_straight_run_in_any_mode_of_rounds(seed, tmp_path):
    mode = a_mode_of_rounds(random.Random(seed))
    assert unlike_the_straight_run(mode, tmp_path) == [], mode


@pytest.mark.slow
@in_any_mode
@pytest.mark.parametrize("seed", range(100, 420))
def test_resume_equals_straight_run_in_every_mode(seed, tmp_path):
    mode = a_mode(random.Random(seed))
    assert unlike_the_straight_run(mode, tmp_path) == [], mode


class InWorkers(Net):
    """Samples with noise that is drawn in a worker process."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def train_dataloader(self):
        noisy = [lambda x: x + 0.1 * torch.randn(6)]
        return DataLoader(Augmented(noisy), 8, shuffle=True, num_workers=1, **self.options)


class Augmented(Dataset):
    def __init__(self, transforms):
        self.samples, self.transforms = samples(), transforms

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        x, y = self.samples[i]
        return self.transforms[0](x), y


@pytest.mark.skipif(os.name != "posix", reason="a lambda does not go to a spawned process")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("persistent", "step", "said"),
    [
        (False, 3, None),  # an epoch's end
        (False, 5, None),
        (False, 2, "first epoch of a fit, whose order the workers"),
        (True, 5, "random numbers that data sets draw in worker processes"),
    ],
)
def test_with_worker_processes_resuming_is_exact_or_says_why_not(persistent, step, said, tmp_path):
    def go(resume=None):
        torch.manual_seed(0 if resume is None else 1)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        pruner, model = lp.IterativeMagnitudePruning(rounds=2), InWorkers(persistent_workers=persistent)
        options = {"limit_val_batches": 0, "enable_checkpointing": True}
        fitter(pruner, checkpoint, epochs=3, **options).fit(model, ckpt_path=resume)
        return pruner.masks, dict(model.state_dict())

    expected = go()
    saying = pytest.warns(UserWarning, match=f"not bit for bit .*{said}") if said else nullcontext()
    with saying:
        result = go(tmp_path / f"step={step}.ckpt")
    assert same(result, expected) == (said is None)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("to_step", [None, 0])
def test_resume_equals_straight_run_without_a_rewind_and_from_initialization(
    to_step, clock, saved, straight, tmp_path
):
    folder, expected = straight(clock, saved, to_step=to_step)
    for epoch in (1, 4):
        resume = folder / f"epoch={epoch}.ckpt"
        equal(run(tmp_path, clock, saved, resume=resume, to_step=to_step), expected)


@pytest.mark.parametrize(
    ("saved", "epoch"), [("epoch end", 1), ("epoch end", 2), ("epoch end", 4), ("validation end", 3)]
)
@pytest.mark.parametrize("rewinds", REWINDS)
def test_resume_equals_straight_run_under_every_policy(rewinds, saved, epoch, straight, tmp_path):
    clock = "epochs" if rewinds in ("same batches", "shortened") else ("steps", "epochs")[epoch % 2]
    folder, expected = straight(clock, saved, rewinds=rewinds)
    result = run(tmp_path, clock, saved, resume=folder / f"epoch={epoch}.ckpt", rewinds=rewinds)
    if rewinds == "shortened" and epoch == 4:  # nothing was left to do but to make an iterator, which draws
        result["random"] = expected["random"]
    equal(result, expected)


@pytest.mark.parametrize("name", ["Adam", "RAdam", "Adamax", "NAdam"])
def test_resume_equals_straight_run_under_other_optimizers(name, straight, tmp_path):
    def make(params):
        return getattr(torch.optim, name)(params, lr=0.02, weight_decay=0.05)

    folder, expected = straight("epochs", "epoch end", make=make)
    for epoch in (1, 2):
        equal(
            run(tmp_path, "epochs", "epoch end", resume=folder / f"epoch={epoch}.ckpt", make=make), expected
        )


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_start", 2),  # no checkpoint yet: from the start
        ("on_train_batch_end", 8),
        ("on_prune", 1),
        ("on_train_batch_start", 17),
        ("on_validation_start", 6),
        ("on_train_epoch_end", 5),
    ],
)
def test_a_run_that_failed_goes_on_as_if_it_had_not(hook, n, saved, straight, tmp_path):
    _, expected = straight("epochs", saved)
    with pytest.raises(Stopped):
        run(tmp_path, "epochs", saved, stop=(hook, n))
    equal(run(tmp_path, "epochs", saved), expected)


def test_a_run_that_fails_again_and_again_ends_the_same(straight, tmp_path):
    _, expected = straight("steps", "epoch end")
    for n in (4, 5, 4, 3, 5):
        with pytest.raises(Stopped):
            run(tmp_path, "steps", "epoch end", stop=("on_train_batch_start", n))
    equal(run(tmp_path, "steps", "epoch end"), expected)


def in_another_process(*args, target=run_to_file):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=args)
    process.start()
    process.join(120)
    return process.exitcode


LAST = [("on_train_epoch_end", EPOCHS), ("on_train_end", 1)]
KILLS = [("on_train_batch_start", 8), ("on_prune", 2), ("on_save_checkpoint", 5)]
MORE_KILLS = [
    *((hook, n) for n in range(1, 25, 3) for hook in ("on_train_batch_start", "on_train_batch_end")),
    *(
        (hook, n)
        for n in range(1, 9)
        for hook in ("on_train_epoch_start", "on_train_epoch_end", "on_save_checkpoint")
    ),
    *((hook, n) for n in range(1, 9, 2) for hook in ("on_validation_start", "on_validation_end")),
    ("on_prune", 1),
    ("on_prune", 3),
    ("on_train_end", 1),
]


def killed_and_resumed(hook, n, clock, saved, straight, folder, rewinds=None):
    _, expected = straight(clock, saved, rewinds=rewinds)
    assert in_another_process(folder, clock, saved, (hook, n, True), rewinds) == -signal.SIGKILL
    assert not (folder / "final.pt").exists()
    assert in_another_process(folder, clock, saved, None, rewinds) == 0
    result = torch.load(folder / "final.pt", weights_only=True)
    if (hook, n) in LAST:  # nothing was left to do but to make an iterator, which draws
        result["random"] = expected["random"]
    equal(result, expected)


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize(("hook", "n"), KILLS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(hook, n, straight, tmp_path):
    killed_and_resumed(hook, n, "epochs", "epoch end", straight, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize(("hook", "n"), MORE_KILLS)
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(hook, n, clock, saved, straight, tmp_path):
    killed_and_resumed(hook, n, clock, saved, straight, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("rewinds", REWINDS)
@pytest.mark.parametrize(("hook", "n"), [*KILLS, ("on_train_epoch_end", 4), ("on_validation_start", 4)])
def test_a_run_killed_under_any_policy_goes_on_as_if_it_had_not_been(
    hook, n, rewinds, saved, straight, tmp_path
):
    killed_and_resumed(hook, n, "epochs", saved, straight, tmp_path, rewinds)


def test_the_stop_criterion_holds_across_a_resume(tmp_path):
    """What a metric said before the checkpoint decides after it."""

    class Falling(Net):
        def on_validation_epoch_end(self):
            self.log("left_to_learn", 10.0 - self.trainer.current_epoch)

    def go(resume=None):
        pruner = lp.IterativeMagnitudePruning(rounds=5, stop_below={"left_to_learn": 7.5})
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = fitter(pruner, checkpoint, epochs=8, enable_checkpointing=True)
        model = Falling()
        trainer.fit(model, ckpt_path=resume)
        return pruner.round, trainer.current_epoch, model.state_dict()

    torch.manual_seed(0)
    expected = go()
    assert expected[0] == 3  # 10, 9, 8, 7
    for epoch in (0, 1, 2, 3):
        torch.manual_seed(5)
        assert same(go(tmp_path / f"epoch={epoch}.ckpt"), expected)


def test_a_finished_run_resumed_with_more_epochs_goes_on(straight, tmp_path):
    """One more epoch, from the checkpoint of the last: as if it had been asked for at once."""

    def go(epochs, resume=None):
        torch.manual_seed(1 if resume else 0)
        pruner = lp.IterativeMagnitudePruning(rounds=4, every_n_epochs=1)
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        model = Net()
        fitter(pruner, lp.LotteryTicketRewind(1), checkpoint, epochs=epochs, enable_checkpointing=True).fit(
            model, ckpt_path=resume
        )
        return pruner.round, pruner.masks, model.state_dict()

    expected = go(5)
    assert expected[0] == 4
    assert go(3)[0] == 2
    assert same(go(5, tmp_path / "epoch=2.ckpt"), expected)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("rewind_first", [False, True])
@pytest.mark.parametrize("to_epoch", [0, 1])
def test_resume_equals_straight_run_within_any_epoch_of_the_same_batches(
    accumulate, rewind_first, to_epoch, tmp_path
):
    def run(folder, ckpt_path=None):
        torch.manual_seed(5)
        model = Net(batch=4, n=28)
        pruner = lp.IterativeMagnitudePruning(
            lp.schedules.Geometric(0.3), rounds=2, every_n_epochs=1 + to_epoch
        )
        rewind = lp.LotteryTicketRewind(to_epoch=to_epoch, same_batches=True)
        callbacks = [rewind, pruner] if rewind_first else [pruner, rewind]
        every = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
        trainer = fitter(*callbacks, every, epochs=3 + 3 * to_epoch, **options)
        trainer.fit(model, ckpt_path=ckpt_path)
        return state(trainer)["params"]

    straight, saved = run(tmp_path / "a"), tmp_path / "a"
    different = [path.stem for path in saved.glob("*.ckpt") if not same(run(tmp_path / "b", path), straight)]
    assert not different


@pytest.mark.parametrize("masked", [True, False])
def test_resume_equals_straight_run_in_float64(masked, tmp_path):
    """Lightning alone rounds the weights of the checkpoint; should it cease to, ours is no longer needed."""

    class Double(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].double(), batch[1]], batch_idx)

    def run(ckpt_path=None):
        torch.manual_seed(5)
        pruner = [lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.3), rounds=2)] if masked else []
        trainer = fitter(*pruner, epochs=3, precision="64-true")
        trainer.fit(Double(dropout=0.0), ckpt_path=ckpt_path)
        return trainer

    straight = run()
    straight.save_checkpoint(tmp_path / "x.ckpt")
    resumed = run(tmp_path / "x.ckpt")
    assert state(straight)["params"]["head.weight"].dtype == torch.float64
    assert same(state(resumed)["params"], state(straight)["params"]) is masked


def test_what_is_validated_of_a_checkpoint_in_float64_is_what_was_trained(tmp_path):
    def trainer():
        pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.3), rounds=1)
        return fitter(pruner, epochs=2, precision="64-true")

    trained, fresh = Net(), Net()
    first, loaded = trainer(), trainer()
    trained.loader = DataLoader([(x.double(), y) for x, y in samples(8)], 4)
    first.fit(trained, trained.loader)
    first.save_checkpoint(tmp_path / "x.ckpt")
    loaded.validate(fresh, trained.loader, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert same(dict(fresh.named_parameters()), dict(trained.named_parameters()))


@pytest.mark.filterwarnings("default")  # Lightning has its own doubts
@pytest.mark.parametrize("writer", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize(
    ("hook", "at", "said"), [("on_validation_end", 5, True), ("on_train_batch_end", 4, False)]
)
def test_a_checkpoint_of_an_exception_within_an_epoch_resumes_exactly(writer, hook, at, said, tmp_path):
    class Stop(Callback):
        pass

    def stop(self, trainer, *args):
        if trainer.global_step == at and not trainer.sanity_checking:
            raise Stopped

    setattr(Stop, hook, stop)

    def fit(*others, ckpt_path=None):
        torch.manual_seed(0)
        model = Net(n=40)
        pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.5), rounds=2)
        options = {"enable_checkpointing": bool(others), "val_check_interval": 5 if said else 1.0}
        callbacks = (pruner, lp.LotteryTicketRewind(), *others)
        trainer = fitter(*callbacks, epochs=3, **options)
        trainer.fit(model, ckpt_path=ckpt_path)
        return state(trainer)

    expected = fit()
    write = {
        "OnExceptionCheckpoint": OnExceptionCheckpoint(tmp_path, "left"),
        "ModelCheckpoint": ModelCheckpoint(tmp_path, every_n_epochs=100, save_on_exception=True),
    }[writer]
    with pytest.raises(Stopped):
        fit(Stop(), write)
    (left,) = tmp_path.glob("*.ckpt")
    with (
        pytest.warns(UserWarning, match="within a validation, which is not done again")
        if said
        else nullcontext()
    ):
        assert same(fit(ckpt_path=left), expected)
