"""When the callbacks act: clocks, second fits, stops, what starts a fit, what is logged."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch.optim import lr_scheduler as sched

import lightning_prune as lp
from lightning_prune.masks import alive, pack
from lightning_prune.schedules import Geometric
from tests.naming import in_words
from tests.networks import Gan, Manual, Net, Watch, dead_are_zero, fitter, same


def pruning(rate=0.3, **options):
    return lp.IterativeMagnitudePruning(Geometric(rate), **{"rounds": 2, **options})


class Rounds(Callback):
    """The round at each batch."""

    def __init__(self, pruner):
        self.pruner, self.rounds, self.steps = pruner, [], []

    def on_train_batch_end(self, trainer, *_):
        self.rounds.append(self.pruner.round)
        self.steps.append(trainer.global_step)


def rounds_of(model=None, epochs=6, trainer=None, **options):
    pruner = pruning(**options)
    seen = Rounds(pruner)
    fitter(pruner, seen, epochs=epochs, **(trainer or {})).fit(model or Net())
    return seen.rounds


# ----------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("epochs", range(1, 9))
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_round_lasts_as_many_epochs_as_asked(rounds, every, epochs):
    seen = rounds_of(epochs=epochs, rounds=rounds, every_n_epochs=every, trainer={"limit_train_batches": 1})
    assert seen == [min(rounds, epoch // every) for epoch in range(epochs)]
    assert seen[-1] == min(rounds, -(-epochs // every) - 1)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_a_round_lasts_as_many_steps_as_asked(every):
    assert rounds_of(rounds=4, every_n_train_steps=every) == [min(4, step // every) for step in range(18)]


def test_the_step_clock_replaces_the_epoch_clock():
    assert rounds_of(every_n_epochs=1, every_n_train_steps=6) == [0] * 6 + [1] * 6 + [2] * 6


def test_steps_are_optimizer_steps_where_gradients_accumulate():
    seen = rounds_of(rounds=9, every_n_train_steps=2, trainer={"accumulate_grad_batches": 2})
    # three batches an epoch make two steps: after the second and, as the epoch ends, after the third batch
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]


def test_steps_of_all_optimizers_count():
    assert rounds_of(Gan(), rounds=9, every_n_train_steps=4, epochs=4) == [i // 2 for i in range(12)]


def test_a_fit_limited_in_steps_has_its_rounds():
    assert rounds_of(epochs=-1, rounds=9, every_n_train_steps=3, trainer={"max_steps": 8}) == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
    ]


def test_validation_within_an_epoch_sees_the_round_in_progress():
    class Look(Callback):
        def on_validation_start(self, trainer, model):
            seen.append((trainer.global_step, pruner.round, dead_are_zero(model.state_dict(), pruner.masks)))

    seen, pruner = [], pruning(rounds=5, every_n_train_steps=2)
    fitter(pruner, Look(), epochs=3, val_check_interval=1).fit(Net())
    assert seen == [(step, (step - 1) // 2, True) for step in range(1, 10)]  # the round that ends, trained


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_batch_of_an_epoch_has_the_masks_of_its_round(workers):
    class Look(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            assert pruner.round == min(2, trainer.current_epoch)
            if batch_idx == 0:
                assert dead_are_zero(model.state_dict(), pruner.masks)

    class Workers(Net):
        def train_dataloader(self):
            data = super().train_dataloader().dataset
            return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)

    pruner = pruning()
    fitter(pruner, Look(), epochs=4).fit(Workers())


# ----------------------------------------------------------------------------------------------- a second fit


def second_fit(new_trainer, clock):
    torch.manual_seed(0)
    pruner, model = pruning(0.2, rounds=5, **clock), Net()
    watch, rounds = Watch(pruner), Rounds(pruner)
    trainer = fitter(pruner, watch, rounds, epochs=3)
    trainer.fit(model)
    first = pruner.masks
    if new_trainer:
        trainer = fitter(pruner, watch, rounds, epochs=3)
    else:
        trainer.fit_loop.max_epochs = 6
    trainer.fit(model)
    return rounds.rounds, watch.masks, first


@pytest.mark.parametrize("new_trainer", [False, True])
@pytest.mark.parametrize(
    "clock", [{"every_n_epochs": 1}, {"every_n_epochs": 2}, {"every_n_train_steps": 4}], ids=in_words
)
def test_a_second_fit_goes_on_from_the_round_and_masks_of_the_first(clock, new_trainer):
    rounds, masks, first = second_fit(new_trainer, clock)
    every = clock.get("every_n_train_steps", 3 * clock.get("every_n_epochs", 0))
    assert rounds == [min(5, step // every) for step in range(18)]  # as one fit of six epochs
    for name, mask in first.items():
        assert not bool((masks[-1][name] & ~mask).any())


@pytest.mark.parametrize("new_trainer", [False, True])
def test_a_second_fit_rewinds_to_the_snapshot_of_the_first(new_trainer):
    pruner, rewinder, model = pruning(rounds=5), lp.LotteryTicketRewind(1), Net()
    trainer = fitter(pruner, rewinder, epochs=2)
    trainer.fit(model)
    early = rewinder.snapshot
    if new_trainer:
        trainer = fitter(pruner, rewinder, epochs=2)
    else:
        trainer.fit_loop.max_epochs = 4
    trainer.fit(model)
    assert rewinder.snapshot is early
    assert pruner.round == 3
    assert int(model.seen) == 1 + 3


def test_a_fit_after_one_that_failed_goes_on():
    class Fail(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4 and not failed:
                failed.append(True)
                raise RuntimeError("stop")

    failed, pruner, model = [], pruning(rounds=5), Net()
    with pytest.raises(RuntimeError, match="stop"):
        fitter(pruner, Fail(), epochs=3).fit(model)
    masks = pruner.masks
    assert pruner.round == 1
    watch = Watch(pruner)
    fitter(pruner, watch, epochs=3).fit(model)
    assert all(not bool((pruner.masks[n] & ~masks[n]).any()) for n in masks)
    assert watch.rounds[-1] >= 3


def test_validating_and_testing_between_fits_change_nothing(tmp_path):
    results = []
    for between in (False, True):
        torch.manual_seed(0)
        pruner, model = pruning(rounds=4), Net()
        trainer = fitter(pruner, epochs=2)
        trainer.fit(model)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        random = torch.get_rng_state()
        if between:
            other = fitter(pruner)
            other.validate(model, verbose=False)
            other.validate(model, ckpt_path=tmp_path / "two.ckpt", verbose=False)
        torch.set_rng_state(random)
        fitter(pruner, epochs=2).fit(model)
        results.append((pruner.round, pruner.masks, dict(model.state_dict())))
    assert results[0][0] == 3
    assert same(*results)


# --------------------------------------------------------------------------------------------- early stopping


class Scripted(Net):
    """Logs a metric that says what the test wants."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_validation_epoch_end(self):
        self.log("scripted", float(self.values[self.trainer.current_epoch]))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_patience_of_early_stopping_restarts_with_each_round(mode):
    sign = 1 if mode == "min" else -1
    values = [
        sign * v for v in (1, 2, 3, 4, 5, 6, 7, 8, 9)
    ]  # worse and worse: never better than the round before
    stopper = EarlyStopping("scripted", patience=3, mode=mode)
    pruner = pruning(rounds=2, every_n_epochs=3)
    watch = Watch(pruner)
    fitter(pruner, stopper, watch, epochs=9).fit(Scripted(values))
    assert watch.rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_if_early_stopping_stops_the_fit_ends():
    pruner = pruning(rounds=5, every_n_epochs=4)
    watch, model = Watch(pruner), Scripted(range(30))
    fitter(pruner, EarlyStopping("scripted", patience=2), watch, epochs=30).fit(model)
    assert watch.rounds == [0, 0, 0]
    assert alive(pruner.masks) == 400


# ---------------------------------------------------------------------------------------------- stop criteria


def test_the_fit_ends_trained_before_a_pruning_beyond_max_sparsity():
    pruner = pruning(0.3, rounds=50, max_sparsity=0.7)
    watch, model = Watch(pruner), Net()
    trainer = fitter(pruner, lp.LotteryTicketRewind(), watch, epochs=50)
    trainer.fit(model)
    assert watch.rounds == [0, 1, 2, 3]  # 0, 0.3, 0.51, 0.657; 0.76 would be too much
    assert pruner.sparsity == pytest.approx(0.657, abs=1 / 400)
    assert all(bool((model.get_parameter(n)[m] != 0).all()) for n, m in pruner.masks.items())
    assert trainer.state.finished


def test_the_sparsity_may_reach_max_sparsity():
    pruner = pruning(0.5, rounds=9, max_sparsity=0.75)
    fitter(pruner, epochs=9).fit(Net())
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("clock", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}], ids=in_words)
def test_the_fit_ends_after_a_round_whose_metric_fell_below_its_threshold(clock):
    pruner = pruning(rounds=9, stop_below={"scripted": 5.0}, **clock)
    model = Scripted([9, 8, 5, 4.9, 9, 9, 9, 9, 9])
    fitter(pruner, epochs=9).fit(model)
    assert pruner.round == 3
    assert alive(pruner.masks) == round(0.7**3 * 400)
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_a_metric_is_looked_at_when_a_round_ends_and_not_before():
    pruner = pruning(rounds=9, every_n_epochs=2, stop_below={"scripted": 5.0})
    watch = Watch(pruner)
    fitter(pruner, watch, epochs=8).fit(Scripted([1, 9, 1, 9, 9, 1, 9, 9]))
    assert watch.rounds == [0, 0, 1, 1, 2, 2]


def test_a_metric_that_is_not_a_number_stops_nothing():
    pruner = pruning(rounds=2, stop_below={"scripted": 5.0})
    fitter(pruner, epochs=3).fit(Scripted([float("nan")] * 3))
    assert pruner.round == 2


# ------------------------------------------------------------------------------------- what a fit starts from


def sparse_net():
    model = Net()
    return model, lp.prune(model, 0.5)


def test_zeros_are_dead_from_the_start():
    model, masks = sparse_net()
    pruner = pruning(0.7, rounds=1, masks="zeros")
    watch = Watch(pruner)
    fitter(pruner, watch, epochs=2).fit(model)
    assert same(watch.masks[0], masks)
    assert alive(pruner.masks) == round(0.3 * 400)
    assert all(not bool((pruner.masks[n] & ~masks[n]).any()) for n in masks)


@pytest.mark.parametrize("form", ["dict", "file", "path of a checkpoint", "string"])
def test_masks_come_from_a_dict_a_file_or_a_checkpoint(form, tmp_path):
    donor = pruning(0.6, rounds=1)
    trainer = fitter(donor, epochs=2)
    trainer.fit(Net())
    masks, path = donor.masks, tmp_path / "donor"
    if form == "file":
        torch.save(masks, path)
    else:
        trainer.save_checkpoint(path)
    pruner = pruning(0.1, rounds=1, masks={"dict": masks, "string": str(path)}.get(form, path))
    watch, model = Watch(pruner), Net()
    with pytest.warns(UserWarning, match="none of the prunings takes a weight"):
        fitter(pruner, lp.LotteryTicketRewind(), watch, epochs=2).fit(model)
    assert same(watch.masks[0], masks)
    assert same(watch.masks[1], masks)  # fewer alive than the schedule would leave
    assert dead_are_zero(model.state_dict(), masks)


def test_masks_that_were_given_are_not_changed():
    _, masks = sparse_net()
    before = pack(masks)
    fitter(pruning(0.7, rounds=1, masks=masks), epochs=2).fit(Net())
    assert same(pack(masks), before)


def test_two_pruning_callbacks_divide_a_model(tmp_path):
    head = pruning(0.5, rounds=1, include=["head.*"])
    rest = pruning(0.2, rounds=2, exclude=["head.*"])
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    torch.manual_seed(0)
    model = Net()
    fitter(rest, head, checkpoint, epochs=3, enable_checkpointing=True).fit(model)
    assert (alive(head.masks), alive(rest.masks)) == (24, round(0.64 * 352))
    torch.manual_seed(1)
    again, both = (
        Net(),
        [pruning(0.5, rounds=1, include=["head.*"]), pruning(0.2, rounds=2, exclude=["head.*"])],
    )
    fitter(
        *both, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), epochs=3, enable_checkpointing=True
    ).fit(again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(both[0].masks, head.masks)
    assert same(both[1].masks, rest.masks)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("options", "trainer", "expected"),
    [
        ({"every_n_epochs": 2}, {}, 6),
        ({"every_n_epochs": 3}, {"accumulate_grad_batches": 2}, 6),
        ({"every_n_epochs": 1}, {"limit_train_batches": 2}, 2),
        ({"every_n_train_steps": 5}, {}, 5),
    ],
    ids=in_words,
)
def test_the_length_of_a_round_is_known_when_optimizers_are_configured(options, trainer, expected):
    pruner, seen = pruning(**options), []

    class Cosine(Net):
        def configure_optimizers(self):
            seen.append(pruner.steps_per_round)
            return super().configure_optimizers()

    fitter(pruner, epochs=2, **trainer).fit(Cosine())
    assert seen == [expected]


def test_the_length_of_a_round_is_unknown_without_a_fit():
    with pytest.raises(RuntimeError, match="steps_per_round is known during a fit"):
        _ = pruning().steps_per_round
    assert pruning(every_n_train_steps=4).steps_per_round == 4


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Net().train_dataloader().dataset)


def test_the_length_of_a_round_is_infinite_where_the_data_do_not_say():
    class Streamed(Net):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Endless(), batch_size=8)

    pruner = pruning()
    seen = Rounds(pruner)

    class Ask(Callback):
        def on_train_start(self, trainer, model):
            assert pruner.steps_per_round == float("inf")

    fitter(pruner, lp.LotteryTicketRewind(2), seen, Ask(), epochs=3).fit(Streamed())
    assert seen.rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2]


LONG = {
    "CosineAnnealingLR": lambda o, n: sched.CosineAnnealingLR(o, n),
    "OneCycleLR": lambda o, n: sched.OneCycleLR(o, 0.1, total_steps=n),
    "LinearLR": lambda o, n: sched.LinearLR(o, total_iters=n),
    "PolynomialLR": lambda o, n: sched.PolynomialLR(o, total_iters=n),
    "SequentialLR": lambda o, n: sched.SequentialLR(
        o, [sched.LinearLR(o, total_iters=2), sched.CosineAnnealingLR(o, n - 2)], [2]
    ),
}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("name", LONG)
def test_a_schedule_made_for_longer_than_a_round_gets_a_warning_that_names_it(name):
    model = Net(schedule=lambda o: LONG[name](o, 18), interval="step")
    with pytest.warns(UserWarning, match=f"{name}: a round ends at .*, .* Make it for 6 steps"):
        fitter(pruning(every_n_epochs=2), lp.LotteryTicketRewind(), epochs=6).fit(model)
    model = Net(schedule=lambda o: LONG[name](o, 6))
    with pytest.warns(UserWarning, match=f"{name}: a round ends at .*, .* Make it for 2 epochs"):
        fitter(pruning(every_n_epochs=2), lp.LotteryTicketRewind(), epochs=4).fit(model)


@pytest.mark.parametrize("name", LONG)
def test_a_schedule_of_the_length_of_a_round_gets_none(name):
    pruner = pruning(every_n_epochs=2)
    model = Net(schedule=lambda o: LONG[name](o, pruner.steps_per_round), interval="step")
    fitter(pruner, lp.LotteryTicketRewind(), epochs=6).fit(model)  # warnings are errors here
    rate = model.trainer.optimizers[0].param_groups[0]["lr"]
    other = Net(schedule=lambda o: LONG[name](o, 6), interval="step")
    fitter(epochs=2).fit(other)
    assert (
        rate == other.trainer.optimizers[0].param_groups[0]["lr"]
    )  # each round ends where a fit of it would


# ---------------------------------------------------------------------------------------------------- logging


def test_round_and_sparsity_are_logged_and_shown(tmp_path):
    bars = []

    class Bar(Callback):
        def on_train_batch_end(self, trainer, *_):
            bars.append({k: v for k, v in trainer.progress_bar_metrics.items() if k in ("round", "sparsity")})

    logger = CSVLogger(tmp_path)
    pruner = pruning(rounds=2)
    fitter(pruner, lp.LotteryTicketRewind(), Bar(), epochs=3, logger=logger).fit(Net())
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["round"]]
    assert [float(row["round"]) for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [float(row["round_step"]) for row in rows] == [0, 1, 2] * 3
    assert [float(row["sparsity"]) for row in rows] == pytest.approx([0] * 3 + [0.3] * 3 + [0.51] * 3)
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert [bar["round"] for bar in bars] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [bar["sparsity"] for bar in bars] == pytest.approx([0] * 3 + [0.3] * 3 + [0.51] * 3)


def test_a_new_round_is_logged_whatever_the_interval(tmp_path):
    pruner, bars = pruning(rounds=2, every_n_train_steps=4), []

    class Bar(Callback):
        def on_train_batch_end(self, trainer, *_):
            bars.append(trainer.callback_metrics["round"].item())

    fitter(pruner, Bar(), epochs=4, log_every_n_steps=1000).fit(Net())
    assert bars == [0] * 4 + [1] * 4 + [2] * 4


# ------------------------------------------------------------------------------------------- hyper-parameters


class Configured(Net):
    def __init__(self, config=None, width=3):
        super().__init__()
        self.save_hyperparameters()


class ConfiguredWhole(Net):
    def __init__(self, config=None):
        super().__init__()
        self.save_hyperparameters(config)


def plain(value):
    if isinstance(value, dict):
        return type(value) is dict and all(map(plain, value.values()))
    return all(map(plain, value)) if type(value) is list else isinstance(value, (str, int, float, type(None)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_dictconfig_among_hyper_parameters_ends_in_the_checkpoint_as_plain_containers(whole, tmp_path):
    config = OmegaConf.create({"lr": 0.1, "layers": [1, {"a": 2}], "twice": "${lr}"})
    kind = ConfiguredWhole if whole else Configured
    trainer = fitter(pruning(), epochs=2)
    trainer.fit(kind(config))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    stored = file["hyper_parameters"]
    expected = {"lr": 0.1, "layers": [1, {"a": 2}], "twice": 0.1}
    assert stored == (expected if whole else {"config": expected, "width": 3})
    assert plain(stored)
    assert OmegaConf.is_config(config)  # the user's own is as it was
    again = kind.load_from_checkpoint(tmp_path / "x.ckpt")
    assert (again.hparams if whole else again.hparams.config)["lr"] == 0.1
    pruner = pruning()
    fitter(pruner, epochs=3).fit(kind(config), ckpt_path=tmp_path / "x.ckpt")
    assert pruner.round == 2


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
def test_a_model_without_an_optimizer_is_pruned_too():
    class Fixed(Net):
        def configure_optimizers(self):
            return None

    pruner, model = pruning(), Fixed()
    fitter(pruner, lp.LotteryTicketRewind(), epochs=3).fit(model)
    assert alive(pruner.masks) == round(0.49 * 400)
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_a_checkpoint_of_an_exception_holds_exact_zeros(tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                raise RuntimeError("stop")

    pruner = pruning()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=0, save_on_exception=True)
    with pytest.raises(RuntimeError, match="stop"):
        fitter(checkpoint, Fail(), pruner, epochs=3, enable_checkpointing=True).fit(Net())
    (path,) = tmp_path.glob("*.ckpt")
    assert pruner.round == 1
    assert dead_are_zero(torch.load(path, weights_only=True)["state_dict"], pruner.masks)


def test_a_rewind_to_a_step_that_two_optimizers_jump_over_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"to_step=1: training is at step 2 without a snapshot.*all optimizers"
    ):
        fitter(pruning(every_n_epochs=2), lp.LotteryTicketRewind(1), epochs=4).fit(Manual())
