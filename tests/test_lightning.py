"""What we use of Lightning that is private to it, or not declared, is there and means what we take it for."""

from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks import _lightning, beside
from lightning_prune.callbacks.rounds import Clock, end_of_fit
from tests.naming import in_words
from tests.networks import Manual, Net, fitter, loader, same, samples


class At(Callback):
    """Calls a function in one hook, each time."""

    def __init__(self, hook, act):
        setattr(self, hook, lambda trainer, model, *_: act(trainer, model))


def seen_at(hook, look, model=None, *callbacks, ckpt_path=None, **options):
    """What `look` saw in a hook, each time."""
    seen = []
    options = {"epochs": 2, **options}
    trainer = fitter(*callbacks, At(hook, lambda t, m: seen.append(look(t, m))), **options)
    trainer.fit(model or Net(), ckpt_path=ckpt_path)
    return seen


OF_A_RESUMPTION = {
    "go_on_from",
    "load_places",
    "prepare_for_weights",
    "Place",
}  # which the tests of tests/test_resume.py go through


def test_every_touch_has_a_test_here():
    source = Path(__file__).read_text()
    own = {
        name for name, f in vars(_lightning).items() if getattr(f, "__module__", "") == _lightning.__name__
    }
    own = {name for name in own - OF_A_RESUMPTION if not name.startswith("_")}
    assert len(own) >= 20
    assert not [name for name in own if f"_lightning.{name}" not in source]


def test_a_trainer_is_running_until_its_fit_has_ended_or_failed():
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(_lightning.is_running(trainer))

    class Fails(Look):
        def on_train_batch_end(self, *_):
            raise RuntimeError("mine")

    for look in (Look(), Fails()):
        trainer = fitter(look, epochs=1)
        assert not _lightning.is_running(trainer)
        with nullcontext() if type(look) is Look else pytest.raises(RuntimeError, match="mine"):
            trainer.fit(Net())
        assert all(seen)
        assert not _lightning.is_running(trainer)


def test_callbacks_are_those_of_trainer_and_module():
    class Own(Net):
        def configure_callbacks(self):
            return [own]

    own, mine = Callback(), At("on_fit_start", lambda t, m: seen.extend(_lightning.callbacks_of(t)))
    seen = []
    fitter(mine, epochs=1).fit(Own())
    assert own in seen
    assert mine in seen


def test_the_log_interval_and_whether_it_is_a_trial():
    assert _lightning.log_interval(fitter(log_every_n_steps=7)) == 7
    assert _lightning.log_interval(fitter(log_every_n_steps=0)) == 1
    assert [_lightning.is_a_trial(fitter(fast_dev_run=run)) for run in (False, True, 3)] == [
        False,
        True,
        True,
    ]


def test_the_trainer_says_other_limits_until_the_strategy_has_made_optimizers_and_whenever_it_does():
    class Shows(Callback):
        def setup(self, trainer, model, stage):
            self.shown = _lightning.ShownLimits(trainer, lambda true: (true[0] - 1, 7), lambda true: (2, 8))
            says(trainer, model)

        def on_fit_start(self, trainer, model):
            says(trainer, model)
            trainer.strategy.setup_optimizers(trainer)
            says(trainer, model)
            self.shown.leave()
            trainer.strategy.setup_optimizers(trainer)

    class Listens(Net):
        def setup(self, stage):
            says(self.trainer, self)

        def configure_optimizers(self):
            says(self.trainer, self)
            return super().configure_optimizers()

    said = []
    says = lambda trainer, _: said.append((trainer.max_epochs, trainer.max_steps))  # noqa: E731
    trainer = fitter(Shows(), epochs=4)
    trainer.fit(Listens())
    assert said == [(3, 7), (3, 7), (2, 8), (4, -1), (2, 8), (4, -1), (4, -1)]
    assert "setup_optimizers" not in vars(trainer.strategy)


def test_averages_are_copies_with_the_modules_names_once_they_are_there():
    assert _lightning.averages_of(fitter(WeightAveraging())) == []

    def look(trainer, model):
        (average,) = _lightning.averages_of(trainer)
        (whole,) = _lightning.averaged_models(trainer)
        assert [n for n, _ in average.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert whole.module is average
        assert "n_averaged" in dict(whole.named_buffers())
        return average.head.weight is not model.head.weight

    assert all(seen_at("on_train_batch_end", look, None, WeightAveraging()))


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_replaces_its_scheduler_as_it_starts():
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=2)
    model = Net(schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
    look = lambda t, m: (_lightning.has_replaced_its_scheduler(averaging), len(_lightning.averages_of(t)))  # noqa: E731
    seen = seen_at("on_train_batch_end", look, model, averaging, epochs=4)
    replaced = [r for r, _ in seen][:12]  # the epoch after these trains nothing
    assert replaced == [epoch >= averaging.swa_start for epoch in range(4) for _ in range(3)]
    assert beside.averaging_of(fitter(averaging)) == [averaging]


def test_the_training_loaders_are_there_in_a_fit_with_what_draws():
    assert _lightning.loaders_of(fitter()) is None

    class Two(Net):
        def train_dataloader(self):
            return CombinedLoader([mine, loader()], "min_size")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    mine = loader()

    def look(trainer, _):
        loaders = _lightning.loaders_of(trainer)
        return loaders.flattened[0] is mine, _lightning.mode_of(loaders)

    assert seen_at("on_train_batch_start", look, Two())[0] == (True, "min_size")


def test_the_validation_loaders_are_there_once_validation_has_been():
    class Mine(Net):
        def val_dataloader(self):
            return mine

    assert _lightning.validation_loaders_of(fitter()) is None
    mine = DataLoader(samples(16, seed=1), batch_size=8)
    look = lambda t, m: _lightning.validation_loaders_of(t).flattened[0] is mine  # noqa: E731
    assert all(seen_at("on_validation_end", look, Mine()))


def test_a_loader_that_keeps_its_place_is_known():
    class Stateful(DataLoader):
        def state_dict(self):
            return {"at": 0}

        def load_state_dict(self, state):
            pass

    assert _lightning.keeps_its_place(Stateful(samples()))
    assert not _lightning.keeps_its_place(DataLoader(samples()))


def test_an_iterator_can_be_made_again_and_draws_its_order_then():
    class Batches(Callback):
        def __init__(self, again):
            self.again = again

        def on_train_start(self, trainer, model):
            torch.manual_seed(7)
            if self.again:
                _lightning.draw_anew(trainer)

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.current_epoch == 0:
                seen.append(batch[0].clone())

    orders = []
    for again in (False, True):
        seen = []
        fitter(Batches(again), epochs=1).fit(Net(dropout=0.0))
        orders.append(seen)
    torch.manual_seed(7)
    expected = [x for x, _ in loader()]
    assert same(orders[1], expected)
    assert not same(orders[0], expected)


def test_as_an_epoch_starts_the_first_order_is_drawn_already_and_later_ones_are_not():
    look = lambda t, m: _lightning.has_drawn(t)  # noqa: E731
    assert seen_at("on_train_epoch_start", look, epochs=3) == [True, False, False]


def test_whether_an_epoch_is_under_way():
    look = lambda t, m: _lightning.is_within_epoch(t)  # noqa: E731
    assert seen_at("on_train_start", look) == [False]
    assert seen_at("on_train_batch_start", look) == [True] * 6
    assert seen_at("on_train_end", look) == [False]


def test_whether_gradients_wait_for_a_step():
    look = lambda t, m: (_lightning.accumulates(t), t.global_step)  # noqa: E731
    seen = seen_at("on_train_batch_end", look, epochs=1, accumulate_grad_batches=2)
    assert seen == [(True, 0), (False, 1), (False, 2)]  # the last batch of an epoch steps in any case


def batches_of(act, hook="on_train_start", model=None):
    """The batches that are trained when something is done with the loop before."""
    seen, done = [], []

    def once(trainer, _):
        if not done:
            done.append(act(trainer))

    class Note(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            seen.append(batch[0].clone())

    class Plain(Net):
        def train_dataloader(self):
            return loader(shuffle=False)

    fitter(At(hook, once), Note(), epochs=1).fit(model or Plain())
    return seen, [x for x, _ in loader(shuffle=False)]


def test_batches_can_be_passed_over_as_training_starts():
    seen, whole = batches_of(lambda trainer: _lightning.pass_over(trainer, 2))
    assert same(seen, whole[2:])
    with pytest.raises(ValueError, match="was written after 9 batches of an epoch"):
        batches_of(lambda trainer: _lightning.pass_over(trainer, 9))


def test_an_epoch_can_be_ended():
    seen, whole = batches_of(_lightning.end_epoch, "on_train_batch_end")
    assert same(seen, whole[:1])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(samples())


class Streamed(Net):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=8)


class Fetches(Net):
    def training_step(self, dataloader_iter):
        (x, _), _, _ = next(dataloader_iter)
        return self(x).square().mean()


@pytest.mark.filterwarnings("ignore:.*.dataloader_iter.")
@pytest.mark.parametrize(("model", "ahead", "itself"), [(Net, 0, 0), (Streamed, 1, 0), (Fetches, 0, 1)])
def test_how_batches_are_fetched(model, ahead, itself):
    look = lambda t, m: (_lightning.fetches_ahead(t), _lightning.lets_module_fetch(t))  # noqa: E731
    assert seen_at("on_train_start", look, model(), epochs=1) == [(bool(ahead), bool(itself))]


def test_metrics_can_be_shown_as_if_they_were_logged():
    def look(trainer, model):
        _lightning.show_metrics(trainer, {"mine": torch.tensor(2.0)})
        return float(trainer.callback_metrics["mine"])

    assert seen_at("on_train_epoch_end", look) == [2.0, 2.0]


def test_a_batch_goes_through_the_modules_hook_and_the_precision_before_its_transfer():
    class Doubled(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2, batch[1]]

    def look(trainer, model):
        x, y = samples(4).tensors
        return _lightning.batch_before_transfer(trainer, model, [x, y])[0]

    (seen,) = seen_at("on_train_start", look, Doubled(), precision="64-true")
    assert same(seen, samples(4).tensors[0].double() * 2)


def test_strategies_that_leave_their_processes_are_known():
    assert not _lightning.leaves_its_processes(fitter())
    assert _lightning.leaves_its_processes(fitter(strategy="ddp_fork", devices=2))
    assert _lightning.leaves_its_processes(fitter(strategy="ddp_spawn", devices=2))
    assert not _lightning.leaves_its_processes(fitter(strategy="ddp", devices=1))


@pytest.mark.parametrize("writes", [True, False])
def test_a_strategy_of_shards_says_whether_checkpoints_are_folders(writes):
    strategy = ModelParallelStrategy(save_distributed_checkpoint=writes, process_group_backend="gloo")
    assert _lightning.writes_folders(fitter(strategy=strategy, devices=2)) is writes
    assert not _lightning.writes_folders(fitter())


# --- what is public, and not promised ---


def test_a_stop_iteration_leaves_an_epoch_before_its_next_batch():
    def stop(trainer, model):
        if trainer.global_step == 4:
            trainer.should_stop = True
            raise StopIteration

    ends = []
    trainer = fitter(
        At("on_train_batch_start", stop), At("on_train_end", lambda t, m: ends.append(t)), epochs=9
    )
    trainer.fit(Net())
    assert trainer.global_step == 4
    assert ends == [trainer]
    assert trainer.state.finished


def test_what_is_shown_reaches_bar_metrics_and_loggers():
    def look(trainer, model):
        beside.show(trainer, {"round": 3.0}, {"more": 1.0})
        return (
            trainer.progress_bar_metrics.get("round"),
            float(trainer.callback_metrics["round"]),
            float(trainer.logged_metrics["more"]),
            "more" in trainer.callback_metrics,
        )

    assert seen_at("on_train_batch_start", look)[-1] == (3.0, 3.0, 1.0, False)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_compared_anew_is_what_lightning_compares_by(mode, tmp_path):
    worst = torch.tensor(float("inf") if mode == "min" else -float("inf"))
    stopper = EarlyStopping("val_loss", patience=9, mode=mode)
    saver = ModelCheckpoint(tmp_path, "{round}", monitor="val_loss", mode=mode, save_on_train_epoch_end=False)
    fresh = ModelCheckpoint(tmp_path, "{round}", monitor="val_loss", mode=mode)
    trainer = fitter(stopper, saver, epochs=2, enable_checkpointing=True)
    trainer.fit(Net())
    assert stopper.best_score != worst
    assert saver.best_k_models
    beside.compare_anew(trainer)
    assert (stopper.wait_count, stopper.best_score) == (0, worst)
    names = ("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value")
    for name in (*names, "current_score"):
        assert getattr(saver, name) == getattr(fresh, name), name


def test_what_writes_checkpoints_can_be_replaced():
    trainer = fitter()
    before = trainer.strategy.checkpoint_io
    assert type(before) is TorchCheckpointIO
    trainer.strategy.checkpoint_io = other = TorchCheckpointIO()
    assert trainer.strategy.checkpoint_io is other


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"epochs": 4}, 4, 12),
        ({"max_steps": 7}, 7 / 3, 7),
        ({"epochs": 4, "max_steps": 7}, 7 / 3, 7),
        ({"epochs": 2, "accumulate_grad_batches": 2}, 2, 4),
        ({"epochs": 3, "limit_train_batches": 1}, 3, 3),
    ],
    ids=in_words,
)
def test_the_end_of_a_fit_is_known_by_both_clocks(options, epochs, steps):
    ends = lambda t, m: (end_of_fit(t, Clock.EPOCHS), end_of_fit(t, Clock.STEPS))  # noqa: E731
    assert seen_at("on_train_start", ends, **{"epochs": None, **options}) == [(epochs, steps)]
    last = lambda t, m: (t.current_epoch, t.global_step)  # noqa: E731
    assert seen_at("on_train_batch_end", last, **{"epochs": None, **options})[-1][1] == steps


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_the_place_of_a_checkpoint_is_read_off_the_loops():
    """An epoch has three batches; after the first, and between two epochs."""
    within = seen_at("on_train_batch_end", lambda t, m: deepcopy(t.fit_loop.state_dict()))[0]
    between = seen_at("on_train_epoch_start", lambda t, m: deepcopy(t.fit_loop.state_dict()))[1]

    def look(progress):
        def at(trainer, model):
            _lightning.load_places(trainer)  # no loader has a place of its own here
            place = _lightning.go_on_from(trainer, progress)
            return place, _lightning.counts(trainer.fit_loop.epoch_progress)[1].processed

        return seen_at("on_train_start", at)

    place, epochs = look(within)[0]
    assert isinstance(place, _lightning.Place)
    assert (place.within_epoch, place.batches, place.is_last, epochs) == (True, 1, False, 0)
    assert not place.within_batch
    place, epochs = look(between)[0]
    assert (place.within_epoch, epochs) == (False, 1)


def test_what_saves_between_validations_is_known():
    assert _lightning.saves_between_validations(ModelCheckpoint(every_n_train_steps=2))
    assert _lightning.saves_between_validations(ModelCheckpoint(train_time_interval=timedelta(seconds=1)))
    assert not _lightning.saves_between_validations(ModelCheckpoint())
    assert not _lightning.saves_between_validations(
        ModelCheckpoint(every_n_epochs=2, save_on_train_epoch_end=True)
    )


class Heard(Callback):
    """Notes what a hook round a step is told."""

    def __init__(self):
        self.heard = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.heard.append((trainer.global_step, batch_idx, batch[0].sum().item()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        shown = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.heard.append((trainer.global_step, batch_idx, outputs["loss"].item(), shown))
        pl_module.log("heard", float(batch_idx))


def trained_by_steps_of(plain, make, **options):
    """What is left of a training by our own plain steps, or by Lightning's."""
    torch.manual_seed(0)
    model, heard, taken = Net(make, interval="step"), Heard(), []
    model.schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    at = At("on_train_start", lambda t, m: taken.append(_lightning.PlainSteps(t)) if plain else None)
    trainer = fitter(heard, at, **{"epochs": 4, "val_check_interval": 2, **options})
    trainer.fit(model)
    for steps in taken:
        steps.leave()
    assert "advance" not in vars(trainer.fit_loop.epoch_loop)
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    loops = trainer.fit_loop.state_dict(), trainer.fit_loop.epoch_loop.state_dict()
    return model.state_dict(), optimizers, loops, heard.heard, torch.get_rng_state()


@pytest.mark.parametrize("options", [{}, {"max_steps": 8}, {"limit_train_batches": 2}], ids=in_words)
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
        lambda params: torch.optim.LBFGS(params, lr=0.01, max_iter=3),
    ],
    ids=["sgd", "adam", "lbfgs"],
)
def test_a_plain_step_does_what_lightnings_own_does(make, options):
    """Weights, optimizers, counters, what hooks are told and what they log: bit for bit."""
    mine, theirs = (trained_by_steps_of(plain, make, **options) for plain in (True, False))
    for ours, of_lightning in zip(mine, theirs, strict=True):
        assert same(ours, of_lightning)


class Listening(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


class Transferring(Net):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


@pytest.mark.parametrize(
    ("plain", "model", "callbacks", "options"),
    [
        (True, Net, [], {}),
        (True, Net, [Heard()], {"max_steps": 2}),
        (False, Manual, [], {}),
        (False, Transferring, [], {}),
        (False, Net, [Listening()], {}),
        (False, Net, [], {"gradient_clip_val": 1.0}),
        (False, Net, [], {"accumulate_grad_batches": 2}),
        (False, Net, [], {"precision": "bf16-mixed"}),
        (False, Net, [], {"profiler": "simple"}),
    ],
    ids=in_words,
)
def test_a_training_is_plain_where_nothing_else_is_asked_of_a_step(plain, model, callbacks, options):
    look = lambda trainer, _: _lightning.trains_plainly(trainer)  # noqa: E731
    seen = seen_at("on_train_start", look, model(), *callbacks, **options)
    assert seen == [plain]
