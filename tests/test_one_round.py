"""While schedules are made, the trainer says how long a round is, and they are compared with that."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim import lr_scheduler as sched

import lightning_prune as lp
from lightning_prune import rewind
from lightning_prune.schedules import Geometric
from tests.naming import in_words
from tests.networks import Gan, Net, fitter, same
from tests.test_lightning import At

pytestmark = pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")


class Asks(Net):
    """Made for plain training: it asks the trainer how long the fit is."""

    def setup(self, stage):
        self.at_setup = self.says()

    def says(self):
        trainer = self.trainer
        return trainer.max_epochs, trainer.max_steps, trainer.estimated_stepping_batches

    def configure_optimizers(self):
        self.heard = self.says()
        return super().configure_optimizers()


class Truth(Callback):
    """What the trainer says from `on_fit_start` on, first or last in the list of callbacks."""

    def __init__(self):
        self.said = []

    def on_fit_start(self, trainer, model):
        self.said.append((trainer.max_epochs, trainer.max_steps))

    on_train_start = on_train_end = on_fit_end = on_fit_start

    def teardown(self, trainer, model, stage):
        self.on_fit_start(trainer, model)


def asked(model=None, every=None, rewinder=True, order=(0, 1, 2, 3), rounds=2, rewinds=None, **trainer):
    """What a module heard in `setup` and `configure_optimizers`, and what all others heard."""
    clock = {"every_n_epochs": 2} if every is None else {"every_n_train_steps": every}
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=rounds, **clock)
    ours = [pruner, lp.LotteryTicketRewind(**(rewinds or {})) if rewinder else Callback(), Truth(), Truth()]
    model = model or Asks()
    fit = fitter(*(ours[i] for i in order), **{"epochs": 6, **trainer})
    fit.fit(model)
    said = {*ours[2].said, *ours[3].said}
    assert said == {(fit.max_epochs, fit.max_steps)}
    return model.at_setup, model.heard, said.pop()


ROUND = [
    ({}, {}, (2, -1, 6)),
    ({"to_epoch": 1, "shorten": False}, {}, (3, -1, 9)),  # rewound rounds end one epoch later in the schedule
    ({"to_epoch": 1, "shorten": True}, {}, (2, -1, 6)),
    ({"to_epoch": 1}, {}, (2, -1, 6)),
    ({"to_step": 1}, {}, (3, 7, 7)),
    ({"to_step": 4}, {}, (4, 10, 10)),
    ({}, {"max_steps": 15}, (2, 6, 6)),
    ({}, {"epochs": -1, "max_steps": 18}, (2, 6, 6)),
    ({}, {"accumulate_grad_batches": 2}, (2, -1, 4)),
    ({}, {"every": 5, "epochs": -1, "max_steps": 15}, (-1, 5, 5)),
    ({}, {"every": 5}, (2, 5, 5)),
    ({"to_step": 3, "shorten": True}, {"every": 5}, (2, 5, 5)),
    ({"to_step": 3}, {"every": 5}, (2, 5, 5)),
    ({"to_step": 3, "shorten": False}, {"every": 5}, (3, 8, 8)),
    ({"to_epoch": 1, "shorten": False}, {"every": 5}, (3, 8, 8)),
    ({"policy": rewind.learning_rate}, {}, (2, -1, 6)),
    ({"policy": rewind.fine_tune, "to_epoch": 1}, {}, (2, -1, 6)),
    # Here schedules run on, so the truth is what they are made for.
    ({"policy": rewind.weights}, {}, (6, -1, 18)),
    ({"policy": rewind.nothing}, {}, (6, -1, 18)),
    ({}, {"rewinder": False}, (6, -1, 18)),
    ({}, {"rounds": 0}, (6, -1, 18)),
]


@pytest.mark.filterwarnings("ignore:the fit has room for")
@pytest.mark.parametrize(("rewinds", "options", "expected"), ROUND, ids=in_words)
def test_the_trainer_says_how_long_a_round_is_while_schedules_are_made_and_then_the_truth(
    rewinds, options, expected
):
    _, seen, truth = asked(rewinds=rewinds, **options)
    assert seen == expected
    assert truth == (options.get("epochs", 6), options.get("max_steps", -1))


@pytest.mark.filterwarnings("ignore:the fit has room for")
@pytest.mark.parametrize(("rewinds", "options", "expected"), ROUND, ids=in_words)
def test_setup_of_a_module_hears_of_a_round_too(rewinds, options, expected):
    at_setup, _, _ = asked(rewinds=rewinds, **options)
    mixed = "to_epoch" if "every" in options else "to_step"  # which no limit in epochs, or steps, can say
    if (rewinds.get("shorten") is not False and "to_step" not in rewinds) or mixed not in rewinds:
        assert at_setup[2] == expected[2]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=in_words)
def test_the_order_of_callbacks_does_not_matter_to_what_the_trainer_says(order):
    assert asked(order=(*order, 3)) == ((2, -1, 6), (2, -1, 6), (6, -1))


@pytest.mark.filterwarnings("ignore:StepLR. a round ends at")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("start", [5, 0.7])
def test_stochastic_weight_averaging_hears_the_truth(first, start):
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=start, annealing_epochs=1)
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=1, every_n_epochs=2)
    rewinder, model = lp.LotteryTicketRewind(), Asks(schedule=lambda o: sched.StepLR(o, 2))
    trainer = fitter(*([swa, rewinder, pruner] if first else [rewinder, pruner, swa]), epochs=6)
    trainer.fit(model)
    assert model.heard == (2, -1, 6)
    assert (swa.swa_start, swa.swa_end, trainer.max_epochs) == (
        int(start * 6 if start < 1 else start) - 1,
        5,
        6,
    )
    assert pruner.round == 1


def test_optimizers_that_are_made_anew_in_mid_fit_get_schedules_of_a_round_too():
    class Anew(Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 1:
                model.heard = None
                trainer.strategy.setup_optimizers(trainer)
                assert (trainer.max_epochs, trainer.max_steps) == (6, -1)

    model = Asks()
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
    fitter(pruner, lp.LotteryTicketRewind(), Anew(), epochs=6).fit(model)
    assert model.heard == (2, -1, 6)


def test_a_fit_shorter_than_a_round_is_what_the_trainer_says():
    with pytest.warns(UserWarning, match="the fit has room for 0 of the 2"):
        assert asked(epochs=1)[1] == (1, -1, 3)
    with pytest.warns(UserWarning, match="the fit has room for 0 of the 2"):
        assert asked(every=50, max_steps=4)[1] == (6, 4, 4)


TORCH = {
    "LambdaLR": lambda o, n: sched.LambdaLR(o, lambda i: max(0.0, 1 - i / n)),
    "MultiplicativeLR": lambda o, n: sched.MultiplicativeLR(o, lambda i: 0.01 ** (1 / n)),
    "StepLR": lambda o, n: sched.StepLR(o, max(1, n // 3), 0.1),
    "MultiStepLR": lambda o, n: sched.MultiStepLR(o, [n // 2, 3 * n // 4]),
    "ConstantLR": lambda o, n: sched.ConstantLR(o, total_iters=n),
    "LinearLR": lambda o, n: sched.LinearLR(o, 1.0, 0.01, total_iters=n),
    "ExponentialLR": lambda o, n: sched.ExponentialLR(o, 0.01 ** (1 / n)),
    "PolynomialLR": lambda o, n: sched.PolynomialLR(o, total_iters=n),
    "CosineAnnealingLR": lambda o, n: sched.CosineAnnealingLR(o, n),
    "CosineAnnealingWarmRestarts": lambda o, n: sched.CosineAnnealingWarmRestarts(o, n),
    "OneCycleLR": lambda o, n: sched.OneCycleLR(o, 0.1, total_steps=n),
    "CyclicLR": lambda o, n: sched.CyclicLR(o, 0.001, 0.1, step_size_up=n // 2, step_size_down=n - n // 2),
    "SequentialLR": lambda o, n: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=n // 4), sched.CosineAnnealingLR(o, n - n // 4)], [n // 4]
    ),
    "ChainedScheduler": lambda o, n: sched.ChainedScheduler(
        [sched.LinearLR(o, 0.5, total_iters=2), sched.CosineAnnealingLR(o, n)], optimizer=o
    ),
}


def transformers_schedules():
    from transformers import optimization as of

    return {
        "linear": lambda o, n: of.get_linear_schedule_with_warmup(o, n // 10, n),
        "cosine": lambda o, n: of.get_cosine_schedule_with_warmup(o, n // 10, n),
        "polynomial": lambda o, n: of.get_polynomial_decay_schedule_with_warmup(o, n // 10, n),
    }


ENDLESS = ("ConstantLR", "ReduceLROnPlateau")
STEPS = 10  # an epoch


class Plain(Net):
    """Made for plain training: its schedule is as long as the trainer says that the fit is."""

    def __init__(self, make, interval, length=None):
        super().__init__(n=80, interval=interval)
        self.make_schedule, self.length, self.rates = make, length, []

    def configure_optimizers(self):
        own = self.trainer.max_epochs if self.interval == "epoch" else self.trainer.estimated_stepping_batches
        self.schedule = lambda o: self.make_schedule(o, self.length or own)
        return super().configure_optimizers()

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def fit_plain(make, interval, rewinds=None, length=None, **clock):
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=3, **(clock or {"every_n_epochs": 4}))
    model = Plain(make, interval, length)
    trainer = fitter(lp.LotteryTicketRewind(**(rewinds or {})), pruner, epochs=16, limit_val_batches=0)
    trainer.fit(model)
    return model.rates


@pytest.mark.parametrize("rewinds", [{}, {"to_epoch": 1}], ids=in_words)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", TORCH)
def test_a_module_made_for_plain_training_gets_a_schedule_of_one_round(name, interval, rewinds):
    """Every round goes through it to its end, without a warning: warnings are errors here."""
    rates = fit_plain(TORCH[name], interval, rewinds)
    later = 40 - 10 * rewinds.get("to_epoch", 0)
    rounds = [rates[:40], *(rates[i : i + later] for i in range(40, len(rates), later))]
    assert len(rounds) == 4
    for rewound in rounds[1:]:
        assert rewound == rounds[0][40 - later :]


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_schedule_of_transformers_is_of_one_round_too(name):
    pytest.importorskip("transformers")
    rates = fit_plain(transformers_schedules()[name], "step")
    assert rates[:40] == rates[40:80] == rates[120:]
    assert rates[39] < 0.01 < rates[20]
    rates = fit_plain(transformers_schedules()[name], "step", every_n_train_steps=40)
    assert rates[:40] == rates[40:80]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", [name for name in TORCH if name not in ENDLESS])
def test_a_schedule_made_for_the_whole_fit_gets_one_warning_whatever_the_class(name, interval):
    length = 160 if interval == "step" else 16
    expected = f": a round ends at the learning rate .* Make it for {length // 4} {interval}s, as the trainer"
    with pytest.warns(UserWarning, match=expected) as caught:
        fit_plain(TORCH[name], interval, length=length)
    assert len([w for w in caught if "a round ends at" in str(w.message)]) == 1


@pytest.mark.parametrize("rewinds", [{}, {"to_epoch": 1}, {"to_step": 7}], ids=in_words)
@pytest.mark.parametrize("name", ["OneCycleLR", "LambdaLR"])
def test_a_resumed_run_has_the_schedules_of_a_straight_one(name, rewinds, tmp_path):
    def go(epochs, resume=None):
        torch.manual_seed(0)
        pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
        model = Plain(TORCH[name], "step")
        stop = At("on_train_epoch_end", lambda t, m: setattr(t, "should_stop", t.current_epoch + 1 == epochs))
        trainer = fitter(lp.LotteryTicketRewind(**rewinds), pruner, stop, epochs=6)
        trainer.fit(model, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    straight = go(6)
    with pytest.warns(UserWarning, match="the fit ended in round 1"):
        first = go(3)
    second = go(6, tmp_path / "3.ckpt")
    assert first.rates + second.rates == straight.rates
    assert same(dict(second.state_dict()), dict(straight.state_dict()))


def test_two_optimizers_that_the_module_steps_get_schedules_of_a_round_in_epochs():
    class Scheduled(Gan):
        def configure_optimizers(self):
            self.heard = self.trainer.max_epochs, self.trainer.estimated_stepping_batches
            optimizers = super().configure_optimizers()
            return list(optimizers), [sched.OneCycleLR(o, 0.1, total_steps=self.heard[1]) for o in optimizers]

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            rates.append([o.param_groups[0]["lr"] for o in self.optimizers()])
            for scheduler in self.lr_schedulers():
                scheduler.step()

    rates, model = [], Scheduled()
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
    fitter(pruner, lp.LotteryTicketRewind(), epochs=6).fit(model)
    assert model.heard == (2, 6)
    assert rates[:6] == rates[6:12] == rates[12:]
    assert rates[5][0] < 1e-4 < rates[2][0]


def test_a_second_fit_in_the_last_round_is_as_long_as_it_is():
    pruner, rewinder = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=1), lp.LotteryTicketRewind()
    model = Asks()
    fitter(pruner, rewinder, epochs=2).fit(model)
    assert model.heard == (1, -1, 3)
    fitter(pruner, rewinder, epochs=5).fit(model)
    assert model.heard == (5, -1, 15)


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_fit_start"])
def test_a_fit_that_fails_leaves_the_trainer_with_its_true_limits(hook):
    class Fails(Asks):
        failed = False

        def fail(self):
            if not self.failed:
                self.failed = True
                raise RuntimeError("the user's own")

        def setup(self, stage):
            if hook == "setup":
                self.fail()
            super().setup(stage)

        def configure_optimizers(self):
            if hook == "configure_optimizers":
                self.fail()
            return super().configure_optimizers()

        def on_fit_start(self):
            if hook == "on_fit_start":
                self.fail()

    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
    trainer, model = fitter(lp.LotteryTicketRewind(), pruner, epochs=6, max_steps=17), Fails()
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.fit(model)
    assert (trainer.max_epochs, trainer.max_steps) == (6, 17)
    assert "setup_optimizers" not in vars(trainer.strategy)
    trainer.fit(model)
    assert model.heard == (2, 6, 6)
    assert (pruner.round, trainer.global_step) == (2, 17)
