"""Each policy of LotteryTicketRewind: what exactly a round begins with, bit for bit; and how long it is."""

import csv
import itertools
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as sched

import lightning_prune as lp
from lightning_prune import rewind
from lightning_prune.masks import alive, unpack
from lightning_prune.rewind import EarlyBird, Snapshot
from lightning_prune.schedules import Geometric
from tests.naming import in_words
from tests.networks import Gan, Manual, Net, Watch, dead_are_zero, fitter, same, samples, sgd, state
from tests.test_bad_input import Never

K = 2  # the step that is gone back to
POLICIES = {
    p.__name__: p for p in (rewind.everything, rewind.weights, rewind.learning_rate, rewind.fine_tune)
}
POLICIES["nothing"] = rewind.nothing

# Where each part of the state comes from: the early snapshot, the end of the round, or its last step.
FROM = {
    "everything": {"weights": "early", "memory": "early", "rates": "early", "schedulers": "early"},
    "weights": {"weights": "early", "memory": "final", "rates": "final", "schedulers": "final"},
    "learning_rate": {"weights": "final", "memory": "final", "rates": "early", "schedulers": "early"},
    "fine_tune": {"weights": "final", "memory": "final", "rates": "last", "schedulers": "final"},
    "nothing": {"weights": "final", "memory": "final", "rates": "final", "schedulers": "final"},
}


def adam(params):
    return torch.optim.Adam(params, lr=0.02, amsgrad=True, weight_decay=0.01)


class Plateau(Net):
    def configure_optimizers(self):
        optimizer = sgd(self.parameters())
        scheduler = sched.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


MODELS = {
    "sgd, steps": lambda: Net(schedule=lambda o: sched.StepLR(o, 1, 0.7)),
    "adam, one cycle": lambda: Net(
        adam, schedule=lambda o: sched.OneCycleLR(o, 0.1, total_steps=40), interval="step"
    ),
    "sgd, cosine": lambda: Net(schedule=lambda o: sched.CosineAnnealingLR(o, 6), interval="step"),
    "adam, warm-up": lambda: Net(
        adam, schedule=lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.StepLR(o, 2)], [3])
    ),
    "sgd, plateau": Plateau,
    "two optimizers": Manual,
}


class Look(Callback):
    """Stands first and last: what a round ended with, and what the next one begins with."""

    def __init__(self):
        self.early, self.final, self.last, self.begun, self.masks = None, [], [], [], []
        self.first = Look.First(self)

    class First(Callback):
        def __init__(self, look):
            self.look = look

        def on_train_epoch_start(self, trainer, model):
            self.look.now = parts(trainer)

        def on_train_batch_start(self, trainer, model, *_):
            look = self.look
            if look.early is None and trainer.global_step >= K:
                look.early = parts(trainer)

        def on_train_batch_end(self, trainer, model, *_):
            self.look.rates = self.look.begin_rates

    def on_train_batch_start(self, trainer, model, *_):
        if len(self.masks) > len(self.begun):
            self.begun.append(parts(trainer))
        self.begin_rates = parts(trainer)["rates"]

    def on_prune(self, trainer, model, masks):
        self.masks.append(masks)
        self.final.append(self.now)
        self.last.append({"rates": self.rates})


def parts(trainer):
    """The state of a training, cut into what policies treat differently."""
    whole = state(trainer)
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in o["param_groups"]]
        for o in whole["optimizers"]
    ]
    return {
        "weights": (whole["params"], whole["buffers"]),
        "memory": [o["state"] for o in whole["optimizers"]],
        "rates": deepcopy(groups),
        "schedulers": whole["schedulers"],
    }


def put_on(expected, masks, trainer):
    """The dead at zero, and what optimizers keep for them."""
    expected = deepcopy(expected)
    names = {id(p): n for n, p in trainer.lightning_module.named_parameters()}
    for name, mask in masks.items():
        expected["weights"][0][name][~mask] = 0.0
    for optimizer, memory in zip(trainer.optimizers, expected["memory"], strict=True):
        params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
        for number, p in enumerate(params):
            for value in memory.get(number, {}).values():
                if names[id(p)] in masks and value.shape == p.shape:
                    value[~masks[names[id(p)]]] = 0.0
    return expected


@pytest.mark.filterwarnings("ignore:.* a round (ends at|takes it to)")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FROM)
def test_a_round_begins_with_exactly_what_its_policy_says(name, kind, ours_first):
    look, model = Look(), MODELS[kind]()
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=3, every_n_epochs=2)
    ours = [pruner, lp.LotteryTicketRewind(K, policy=getattr(rewind, name))]
    trainer = fitter(look.first, *(ours if ours_first else reversed(ours)), look, epochs=8)
    trainer.fit(model)
    assert pruner.round == len(look.begun) == 3
    for final, last, begun, masks in zip(look.final, look.last, look.begun, look.masks, strict=True):
        sources = {"early": look.early, "final": final, "last": last}
        expected = {part: sources[source][part] for part, source in FROM[name].items()}
        if name == "fine_tune":
            expected["rates"] = look.last[0]["rates"]  # held from the first pruning on
        expected = put_on(expected, masks, trainer)
        assert [part for part in expected if not same(begun[part], expected[part])] == []
        for part in ("weights", "memory"):  # else early and final could be told apart by nothing
            assert not same(look.early[part], final[part])
    if kind != "two optimizers":
        assert not same(look.early["schedulers"], look.final[0]["schedulers"])


class Steps(Callback):
    """The round, learning rate and batch of every step."""

    def __init__(self, pruner):
        self.pruner, self.rounds, self.rates, self.batches = pruner, [], [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.rounds.append(self.pruner.round)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.batches.append(batch[0])


def trained(
    model=None, epochs=12, rate=0.3, rounds=2, every=None, callbacks=(), trainer=None, include=None, **rewinds
):
    clock = {"every_n_epochs": 2} if every is None else {"every_n_train_steps": every}
    pruner = lp.IterativeMagnitudePruning(Geometric(rate), rounds=rounds, include=include, **clock)
    steps, rewinder = Steps(pruner), lp.LotteryTicketRewind(**rewinds)
    model = model or Net()
    fitter(rewinder, pruner, *callbacks, steps, epochs=epochs, **(trainer or {})).fit(model)
    return steps, rewinder, model


FINE = {"policy": rewind.fine_tune}


def one_cycle(steps):
    return Net(schedule=lambda o: sched.OneCycleLR(o, 0.1, total_steps=steps), interval="step")


def test_fine_tuning_holds_the_last_learning_rate_of_the_first_round_to_the_end():
    steps, _, _ = trained(one_cycle(6), policy=rewind.fine_tune)
    first = steps.rates[:6]
    assert len(set(first)) == 6  # it changed with every step
    assert set(steps.rates[6:]) == {first[-1]}
    assert steps.rounds[-1] == 2
    steps, _, _ = trained(Net(schedule=lambda o: sched.CosineAnnealingLR(o, 6), interval="step"), **FINE)
    assert set(steps.rates[6:]) == {steps.rates[5]}
    assert steps.rates[5] > 0  # where the schedule itself would have come to 0


def test_fine_tuning_without_a_schedule_goes_on_at_its_rate():
    steps, _, _ = trained(**FINE)
    assert set(steps.rates) == {0.1}


@pytest.mark.filterwarnings("ignore:LambdaLR. a round ends at")
def test_schedules_go_on_from_the_step_that_is_gone_back_to():
    model = Net(schedule=lambda o: sched.LambdaLR(o, lambda step: 0.9**step), interval="step")
    rates = [0.1 * 0.9**step for step in range(8)]
    for policy in (rewind.everything, rewind.learning_rate):
        steps, _, _ = trained(deepcopy(model), to_step=2, policy=policy, epochs=6)
        assert steps.rates == pytest.approx(rates[:6] + rates[2:8] + rates[2:8])
    steps, _, _ = trained(deepcopy(model), to_step=2, policy=rewind.weights, epochs=6)
    assert steps.rates == pytest.approx([0.1 * 0.9**step for step in range(18)])


def test_an_epoch_is_gone_back_to_as_its_first_step_is():
    torch.manual_seed(0)
    _, by_epoch, model = trained(to_epoch=1, shorten=False)
    torch.manual_seed(0)
    _, by_step, other = trained(to_step=3)
    assert same(by_epoch.snapshot.state_dict(), by_step.snapshot.state_dict())
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_ones_own_policy_is_a_function_of_snapshots():
    def signs(early: Snapshot) -> Snapshot:
        """The signs of the early weights at one magnitude a tensor."""
        tensors = {n: t.sign() * t.std() if n.endswith("weight") else t for n, t in early.tensors.items()}
        return rewind.replace(early, tensors=tensors)

    look = Look()
    _, rewinder, _ = trained(policy=signs, callbacks=[look, look.first])
    early = rewinder.snapshot.tensors["body.weight"]
    begun, mask = look.begun[0]["weights"][0]["body.weight"], look.masks[0]["body.weight"]
    assert same(begun, torch.where(mask, early.sign() * early.std(), 0.0))


# --------------------------------------------------------------------------------------- how long a round is


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"to_epoch": 1, "shorten": False}, [6, 6, 24]),  # the fit goes on to its end
        ({"to_epoch": 1, "shorten": True}, [6, 3, 3]),
        ({"to_epoch": 1}, [6, 3, 3]),
        ({"to_step": 2}, [6, 6, 24]),  # which epochs cannot count
        ({"to_step": 0}, [6, 6, 24]),
        ({"to_step": 0, "shorten": True}, [6, 6, 6]),
        ({"to_step": 2, "shorten": True, "every": 7}, [7, 5, 5]),
        ({"to_epoch": 1, "shorten": True, "every": 7}, [7, 4, 4]),
        ({"to_step": 2, "every": 7}, [7, 5, 5]),
        ({"to_step": 2, "shorten": False, "every": 7}, [7, 7, 22]),
    ],
    ids=in_words,
)
def test_a_round_after_a_rewind_ends_as_much_sooner_unless_told_otherwise(options, lengths):
    steps, _, _ = trained(**options)
    assert [steps.rounds.count(r) for r in range(3)] == lengths


def test_a_schedule_made_for_a_round_is_not_overrun_by_shortened_rounds():
    steps, _, _ = trained(one_cycle(6), to_epoch=1, shorten=True)  # one step more and it raises
    assert steps.rates[6:9] == steps.rates[9:12] == steps.rates[3:6]


def test_a_schedule_that_would_be_overrun_gets_a_warning_that_names_the_way_out():
    message = "OneCycleLR: a round takes it to 9 steps, and it ends after 6. Make it for 9 steps"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match="Tried to step 7 times"),
    ):
        trained(one_cycle(6), to_epoch=1, shorten=False)


@pytest.mark.parametrize("clock", [{}, {"every": 6}], ids=in_words)
def test_a_fit_that_goes_on_beyond_a_schedule_is_told_beforehand_where_to_end(clock):
    ends = "max_steps=18" if clock else "max_epochs=6"
    message = rf"beyond its end, where it raises an error\. Let the fit end with the last round \({ends}\)"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match="Tried to step 7 times"),
    ):
        trained(one_cycle(6), to_step=0, **clock)


@pytest.mark.parametrize("every", [1, 3, 5])
def test_rounds_do_not_drift_where_two_optimizers_step_at_once(every):
    pruner = lp.IterativeMagnitudePruning(Geometric(0.1), rounds=5, every_n_train_steps=every)
    seen = Steps(pruner)
    fitter(pruner, seen, epochs=6).fit(Gan())
    due = [min(5, 2 * batch // every, batch) for batch in range(18)]  # and each round trains
    assert seen.rounds == due


def test_a_second_fit_goes_on_with_shortened_rounds():
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=3, every_n_epochs=2)
    steps, rewinder = Steps(pruner), lp.LotteryTicketRewind(to_epoch=1, shorten=True)
    model = Net()
    for epochs in (2, 2, 9):
        fitter(pruner, rewinder, steps, epochs=epochs).fit(model)
    assert [steps.rounds.count(r) for r in range(4)] == [6, 3, 3, 3]


# ----------------------------------------------------------------------------------------- early-bird tickets


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("every", [None, 30])
def test_a_round_ends_when_the_last_masks_hardly_differ(first, every):
    drawn = []

    class Draw(Callback):
        def on_train_epoch_end(self, trainer, model):
            if pruner.round == 0:  # independent of the callback: what global magnitude would leave
                drawn.append(lp.prune(deepcopy(model), 0.5))

    clock = {"every_n_epochs": 10} if every is None else {"every_n_train_steps": every}
    pruner = lp.IterativeMagnitudePruning(lp.schedules.OneShot(0.5), rounds=1, **clock)
    rewinder = lp.LotteryTicketRewind(policy=rewind.nothing, until=EarlyBird(distance=0.078, masks=3))
    steps, ours = Steps(pruner), [pruner, rewinder]
    random = fitter(*(ours if first else ours[::-1]), Draw(), steps, epochs=40)
    random.fit(Net())
    far = [[1 - agreement(drawn[i - j], drawn[i]) for j in (1, 2)] for i in range(2, len(drawn))]
    emerged = [max(distances) < 0.078 for distances in far]
    assert emerged.index(True) == len(emerged) - 1  # the round went on until then, and not further
    assert 3 < len(drawn) < 10
    assert [steps.rounds.count(r) for r in (0, 1)] == [3 * len(drawn), 30]
    assert same(pruner.masks, drawn[-1])


def agreement(a, b):
    return sum(int((a[n] == b[n]).sum()) for n in a) / sum(mask.numel() for mask in a.values())


def test_early_bird_checks_may_be_counted_in_steps():
    steps, rewinder, _ = trained(until=EarlyBird(1.0, masks=2, every_n_train_steps=2), rounds=2)
    assert [steps.rounds.count(r) for r in (0, 1, 2)] == [6, 6, 6]  # epochs are the clock: they end whole
    steps, rewinder, _ = trained(until=EarlyBird(1.0, masks=2, every_n_train_steps=2), rounds=2, every=9)
    assert [steps.rounds.count(r) for r in (0, 1, 2)] == [4, 4, 9]
    assert rewinder._drawn == []


def test_looking_for_an_early_bird_ticket_disturbs_nothing():
    ends = []
    for until in (None, EarlyBird(1e-9)):
        torch.manual_seed(0)
        _, _, model = trained(until=until, epochs=6, policy=rewind.nothing)
        ends.append((dict(model.state_dict()), torch.get_rng_state()))
    assert same(*ends)


def test_channels_have_early_bird_tickets_too():
    pytest.importorskip("torch_pruning")
    pruner = lp.StructuredChannelPruning(rounds=1, every_n_epochs=9, example_input=[2, 6])
    steps, ticket = Steps(pruner), lp.LotteryTicketRewind(until=EarlyBird(1.0, masks=2))
    fitter(pruner, ticket, steps, epochs=30).fit(Net())
    assert [steps.rounds.count(r) for r in (0, 1)] == [6, 27]


# ------------------------------------------------------------------------------------------- the same batches


class OwnGenerator(Net):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        return torch.utils.data.DataLoader(samples(), batch_size=8, shuffle=True, generator=generator)


@pytest.mark.parametrize("kind", [Net, OwnGenerator])
@pytest.mark.parametrize("k", [{"to_step": 0}, {"to_epoch": 1}, {"to_step": 3}, {"to_epoch": 0, "every": 6}])
def test_with_the_same_batches_a_round_repeats_the_training_from_the_snapshot_on(k, kind):
    """Only a spare layer is pruned here, so each round must come to the same weights, dropout included."""
    ends = []

    class End(Callback):
        def on_train_epoch_end(self, trainer, model):
            state = {name: t for name, t in model.state_dict().items() if "spare" not in name}
            ends.append(deepcopy(state))

    model = kind()
    model.spare = nn.Linear(4, 4)
    options = {"epochs": 6, "callbacks": [End()], "include": ["spare*"], "same_batches": True}
    options["shorten"] = False
    steps, _, _ = trained(model, **options, **k)
    behind = k.get("to_epoch", k.get("to_step", 0) // 3)
    first = slice(3 * behind, 6)
    for r in (1, 2):
        assert same(steps.batches[6 * r : 6 * r + 6 - 3 * behind], steps.batches[first])
        assert same(ends[2 * r + 1 - behind], ends[1])
    assert not same(steps.batches[0], steps.batches[3])  # shuffled anew each epoch


def test_without_it_every_round_sees_other_batches():
    steps, _, _ = trained(epochs=6)
    assert not same(steps.batches[:3], steps.batches[6:9])


# ------------------------------------------------------------------------------- beside Lightning's callbacks


ORDERS = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", [None, "zeros"])
def test_averaged_weights_are_masked_and_rewound(order, start, tmp_path):
    class Seen(Callback):
        def on_validation_batch_start(self, trainer, model, *_):  # the averages are in the model now
            seen.append(dead_are_zero(model.state_dict(), pruner.masks))

        def on_train_batch_start(self, trainer, model, *_):
            tensors = rewind._tensors(average._average_model)
            if trainer.global_step == 2:
                early.append(deepcopy(tensors))
            if pruned:
                begun.append((pruned.pop(), deepcopy(tensors)))

        def on_prune(self, trainer, model, masks):
            pruned.append(masks)

    seen, early, begun, pruned, average = [], [], [], [], EMAWeightAveraging(decay=0.8)
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2, masks=start)
    model = Net()
    if start:
        lp.prune(model, 0.2)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    ours = [pruner, lp.LotteryTicketRewind(2), average]
    callbacks = [*(ours[i] for i in order), checkpoint, Seen()]
    fitter(*callbacks, epochs=6, enable_checkpointing=True).fit(model)
    assert seen == [True] * 12
    assert len(begun) == 2
    for masks, averages in begun:
        expected = deepcopy(early[0])
        for name, mask in masks.items():
            expected[f"module.{name}"][~mask] = 0.0
        assert same(averages, expected)
    assert int(early[0]["n_averaged"]) == 2
    for epoch in range(6):
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert dead_are_zero(file["state_dict"], masks_in(file))
        assert dead_are_zero(file["current_model_state"], masks_in(file))
    assert dead_are_zero(model.state_dict(), pruner.masks)
    assert all(bool((model.get_parameter(n)[m] != 0).all()) for n, m in pruner.masks.items())


@pytest.mark.parametrize("order", ORDERS)
def test_averages_are_cut_and_rewound_with_channels_that_go_away(order):
    pytest.importorskip("torch_pruning")
    average = EMAWeightAveraging(decay=0.8)
    pruner = lp.StructuredChannelPruning(rounds=1, remove="each_round", example_input=[2, 6])
    ours = [pruner, lp.LotteryTicketRewind(1), average]
    model, shapes = Net(), []

    class Shapes(Callback):
        def on_validation_end(self, trainer, model):
            of_average = {n: t.shape for n, t in average._average_model.module.named_parameters()}
            shapes.append(of_average == {n: t.shape for n, t in model.named_parameters()})

    fitter(*(ours[i] for i in order), Shapes(), epochs=3).fit(model)
    assert shapes == [True] * 3
    assert model.body.weight.shape != (16, 16)


def masks_in(file):
    return unpack(next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))["masks"])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.filterwarnings("ignore:StepLR. a round ends at")
def test_stochastic_weight_averaging_works_in_the_last_round(norm, order):
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=6, annealing_epochs=1)
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
    watch, model = Watch(pruner), Net(schedule=lambda o: sched.StepLR(o, 2))
    if not norm:
        model.norm = torch.nn.Identity()
    ours = [pruner, lp.LotteryTicketRewind(2), swa]
    fitter(*(ours[i] for i in order), watch, epochs=8).fit(model)
    assert pruner.round == 2
    assert watch.rounds[-1] == 2
    assert int(swa.n_averaged) == 3
    assert same(dict(model.named_parameters()), dict(swa._average_model.named_parameters()))
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_stochastic_weight_averaging_prunes_nothing_after_the_last_step():
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    pruner, model = lp.IterativeMagnitudePruning(Geometric(0.3)), Net()
    fitter(swa, pruner, epochs=3).fit(model)
    assert pruner.round == 2  # and not 3, in the epoch that only takes statistics
    assert dead_are_zero(model.state_dict(), pruner.masks)


@pytest.mark.parametrize("start", [2, 5])
def test_stochastic_weight_averaging_is_refused_where_a_rewind_comes_after_it(start):
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=start)
    with pytest.raises(ValueError, match=r"it must start in the last round. Set swa_epoch_start=6 or later"):
        trained(callbacks=[swa], epochs=8)
    with pytest.raises(ValueError, match=r"it must start in the last round. Start it later"):
        trained(callbacks=[StochasticWeightAveraging(0.01, swa_epoch_start=2)], every=6, epochs=8)


class Scripted(Net):
    """Logs a metric that says what the test wants."""

    def on_validation_epoch_end(self):
        value = [1.0, 3.0, 2.0, 5.0, 9.0, 8.0][self.trainer.current_epoch]
        self.log_dict({"scripted": value, "again": value})


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_a_checkpoint_named_after_the_round_is_the_best_of_each_round(at_epoch_end, mode, tmp_path):
    best = ModelCheckpoint(
        tmp_path,
        "{round:.0f}-{sparsity:.2f}-{epoch}",
        monitor="scripted",
        mode=mode,
        save_on_train_epoch_end=at_epoch_end,
    )
    overall = ModelCheckpoint(tmp_path / "all", "{epoch}", monitor="again", mode=mode)
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
    callbacks = [best, overall, pruner, lp.LotteryTicketRewind()]
    fitter(*callbacks, epochs=6, enable_checkpointing=True).fit(Scripted())
    names = {
        "min": ["0-sparsity=0.00-epoch=0", "1-sparsity=0.30-epoch=2", "2-sparsity=0.51-epoch=5"],
        "max": ["0-sparsity=0.00-epoch=1", "1-sparsity=0.30-epoch=3", "2-sparsity=0.51-epoch=4"],
    }[mode]
    assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == [f"round={name}" for name in names]
    for r, name in enumerate(names):
        file = torch.load(tmp_path / f"round={name}.ckpt", weights_only=True)
        assert alive(masks_in(file)) == round(0.7**r * 400)
    assert best.best_model_path == str(tmp_path / f"round={names[-1]}.ckpt")
    (path,) = (tmp_path / "all").glob("*.ckpt")  # any other compares over all rounds
    assert path.stem == {"min": "epoch=0", "max": "epoch=4"}[mode]


def test_the_best_of_a_round_is_remembered_across_a_resume(tmp_path):
    def go(folder, epochs, resume=None):
        best = ModelCheckpoint(tmp_path, "{round:.0f}-{epoch}", monitor="scripted", save_last=True)
        pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=2, every_n_epochs=2)
        fitter(pruner, best, epochs=epochs, enable_checkpointing=True).fit(Scripted(), ckpt_path=resume)

    go(tmp_path, 3)
    go(tmp_path, 6, tmp_path / "last.ckpt")
    stems = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    assert stems == ["last", "round=0-epoch=0", "round=1-epoch=2", "round=2-epoch=5"]


@pytest.mark.filterwarnings("ignore:StepLR. a round ends at")
def test_the_learning_rate_monitor_shows_the_rewound_rate(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor(logging_interval="epoch")
    model = Net(schedule=lambda o: sched.StepLR(o, 1, 0.5))
    steps, _, _ = trained(model, callbacks=[monitor], epochs=6, trainer={"logger": logger})
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert rates == [0.1, 0.05] * 3 == steps.rates[::3]


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to_epoch": -1}, "to_epoch=-1: allowed are whole numbers from 0"),
        ({"to_epoch": 0.5}, "to_epoch=0.5: allowed are whole numbers from 0"),
        ({"to_step": 1, "to_epoch": 1}, "to_step=1, to_epoch=1: only one of them"),
        ({"to_epoch": 2}, "to_epoch=2: allowed is 0 to 1, within a round"),
        ({"to_epoch": 3, "every": 9}, "to_epoch=3: it begins after the first round, of 9 steps"),
        ({"shorten": "no"}, "shorten='no': allowed are True, False and None"),
        ({"shorten": 1}, "shorten=1: allowed are True, False and None"),
        ({"to_step": 2, "shorten": True}, "shorten=True with to_step=2: allowed is to_epoch"),
        ({"same_batches": True, "to_step": 2}, r"same_batches=True: .* begin with an epoch \(of 3 steps\)"),
        ({"same_batches": True, "every": 7}, r"same_batches=True: .* begin with an epoch \(of 3 steps\)"),
    ],
    ids=in_words,
)
def test_bad_rewinds(options, message):
    with pytest.raises(ValueError, match=message):
        trained(callbacks=[Never()], **options)


@pytest.mark.parametrize("options", [{"distance": 0}, {"distance": 1.5}, {"masks": 1}, {"masks": 2.5}])
def test_bad_early_birds(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: allowed"):
        EarlyBird(**options)


def test_fine_tuning_is_refused_where_a_module_steps_its_schedulers_itself():
    class Scheduled(Manual):
        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            return list(optimizers), [sched.StepLR(optimizers[0], 1)]

    with pytest.raises(ValueError, match="Scheduled steps its schedulers itself"):
        trained(Scheduled(), callbacks=[Never()], **FINE)


def test_a_step_of_two_optimizers_may_lie_beyond_the_batches_of_a_round():
    _, rewinder, _ = trained(Gan(), to_step=10)  # 6 batches of two steps a round
    assert rewinder.snapshot is not None
    with pytest.raises(ValueError, match=r"to_step=12, .*: the first round is over without having"):
        trained(Gan(), to_step=12)
