"""The laws that the two callbacks keep, one test or a few for each."""

import itertools
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler as sched

import lightning_prune as lp
from lightning_prune.allocation import global_rank, uniform
from lightning_prune.masks import alive, unpack
from lightning_prune.schedules import Geometric, OneShot
from tests.naming import in_words
from tests.networks import Gan, Manual, Net, Watch, dead_are_zero, fitter, loader, same, samples, sgd, state
from tests.reference import global_selection, lottery_ticket, uniform_selection
from tests.test_holding import OPTIMIZERS, OPTIONS, REFUSED, RUNNING

pytestmark = pytest.mark.filterwarnings("ignore:.* a round (ends at|takes it to)")


def pruning(rate=0.3, **options):
    return lp.IterativeMagnitudePruning(Geometric(rate), **{"rounds": 2, "every_n_epochs": 2, **options})


class Bare(Net):
    """Without biases and norms, which some optimizers refuse."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm = nn.Identity()
        for layer in (self.stem, self.body, self.head):
            layer.bias = None


# ------------------------------------------------------------------------ the procedure, against a plain loop


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"to_step": 0},
        {"to_step": 4},
        {"to_step": 4, "make": lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.01)},
        {"to_step": 1, "schedule": lambda o: sched.StepLR(o, 1, 0.5)},
        {"to_step": 4, "clip": 0.1},
        {"to_step": 4, "select": uniform_selection},
        {"to_step": 0, "make": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True)},
    ],
    ids=lambda options: (
        ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()) or "no rewind"
    ),
)
def test_a_fit_is_the_lottery_ticket_procedure_bit_for_bit(options):
    make, schedule = options.get("make", sgd), options.get("schedule")
    to_step, clip, select = (
        options.get("to_step"),
        options.get("clip"),
        options.get("select", global_selection),
    )
    allocate = uniform if select is uniform_selection else global_rank
    model = Net(make, schedule)
    plain, seed = deepcopy(model), torch.get_rng_state()
    pruner = pruning(allocate=allocate)
    watch = Watch(pruner)
    rewinder = [] if to_step is None else [lp.LotteryTicketRewind(to_step)]
    trained = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, model):
            trained.append(deepcopy(model.state_dict()))

    fitter(pruner, *rewinder, watch, Keep(), epochs=6, limit_val_batches=0, gradient_clip_val=clip).fit(model)
    torch.set_rng_state(seed)
    optimizer = make(plain.parameters())
    scheduler = schedule(optimizer) if schedule else None
    loop = lottery_ticket(plain, optimizer, loader(), 2, 2, 0.3, scheduler, to_step, clip, select)
    for round_, (masks, weights) in enumerate(loop):
        assert same(watch.masks[2 * round_ + 1], masks)
        assert same(dict(trained[2 * round_ + 1]), dict(weights))


# ------------------------------------------------------------------------------------- dead weights stay dead


def fit_watched(model, *, epochs=6, rounds=2, to_step=2, **options):
    pruner = pruning(rounds=rounds)
    watch = Watch(pruner)
    fitter(pruner, lp.LotteryTicketRewind(to_step), watch, epochs=epochs, **options).fit(model)
    assert pruner.round == rounds
    assert watch.checked > 2 * epochs
    assert dead_are_zero(model.state_dict(), pruner.masks)
    assert any(
        bool((p[pruner.masks[n]] != 0).any()) for n, p in model.named_parameters() if n in pruner.masks
    )
    return pruner


def test_every_optimizer_of_torch_is_fitted_or_refused():
    assert set(RUNNING) | set(REFUSED) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", RUNNING)
def test_dead_weights_stay_dead_under_every_optimizer(name):
    pruner = fit_watched(Bare(lambda params: OPTIMIZERS[name](params, **OPTIONS[name])))
    assert alive(pruner.masks) == round(0.7**2 * 400)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3, "to_step": 1},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"val_check_interval": 1},
    ],
    ids=in_words,
)
def test_dead_weights_stay_dead_however_one_trains(options):
    class Typed(Net):  # data in the precision of the weights
        def forward(self, x):
            return super().forward(x.to(self.stem.weight.dtype))

    fit_watched(Typed(), **options)


def test_dead_weights_stay_dead_where_lightning_logs_and_shows_nothing():
    class Silent(Net):
        def log(self, *_, **__):
            raise AssertionError("nothing may be logged")

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    pruner, model = pruning(), Silent()
    Trainer(max_epochs=6, barebones=True, callbacks=[pruner], accelerator="cpu", devices=1).fit(model)
    assert pruner.round == 2
    assert dead_are_zero(model.state_dict(), pruner.masks)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_dead_weights_stay_dead_with_a_gradient_scaler(clip):
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**40, growth_interval=3
    )  # overflows: steps are skipped
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit_watched(Net(), plugins=[plugin], gradient_clip_val=clip, epochs=8)
    assert scaler.get_scale() < 2.0**40


def test_dead_weights_stay_dead_in_manual_optimization_with_two_optimizers():
    fit_watched(Manual())


def test_dead_weights_stay_dead_in_both_networks_of_a_gan():
    model = Gan()
    pruner = fit_watched(model)
    assert {name.split(".")[0] for name in pruner.masks} == {"generator", "critic"}


def test_dead_weights_are_zero_wherever_weights_leave_whatever_someone_put_there(tmp_path):
    class Vandal(Callback):
        """Writes into dead weights after the last step of an epoch, and again when the epoch ends."""

        def on_train_batch_end(self, trainer, model, outputs=None, batch=None, batch_idx=2):
            with torch.no_grad():
                for i, (name, mask) in enumerate(pruner.masks.items() if batch_idx == 2 else ()):
                    model.get_parameter(name)[~mask] = (-0.0, torch.nan, torch.inf)[i % 3]

        def on_train_epoch_end(self, trainer, model):
            self.on_train_batch_end(trainer, model)

    class Look(Callback):
        def on_validation_batch_start(self, trainer, model, *_):
            seen.append(dead_are_zero(model.state_dict(), pruner.masks))

    seen, pruner, model = [], pruning(rounds=2, every_n_epochs=1), Net()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fitter(pruner, Vandal(), Look(), checkpoint, epochs=3, enable_checkpointing=True).fit(model)
    assert len(seen) == 6
    assert all(seen)
    for epoch in range(3):
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        masks = unpack(next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))["masks"])
        assert dead_are_zero(file["state_dict"], masks)
        assert alive(masks) == round(0.7**epoch * 400)
    assert dead_are_zero(model.state_dict(), pruner.masks)


class ClippedByHand(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippedInAHook(Net):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippedAfterBackward(Net):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippedInItsStep(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        def clipped():
            loss = closure()
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            return loss

        optimizer.step(clipped)


class Clip(Callback):
    def on_before_optimizer_step(self, trainer, model, optimizer):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Net, {"gradient_clip_val": 0.1}),
        (ClippedByHand, {}),
        (ClippedInAHook, {}),
        (ClippedAfterBackward, {}),
        (ClippedInItsStep, {}),
        (Net, {"callbacks": [Clip()]}),
    ],
    ids=["trainer", "configure_gradient_clipping", "hook", "after backward", "optimizer_step", "callback"],
)
def test_pruned_weights_contribute_nothing_to_the_clipped_norm(kind, options):
    model = kind(lambda params: torch.optim.SGD(params, lr=1.0))
    plain, seed = deepcopy(model), torch.get_rng_state()
    pruner = pruning(0.6)
    others = options.pop("callbacks", [])
    fitter(*others, pruner, epochs=6, limit_val_batches=0, **options).fit(model)
    torch.set_rng_state(seed)
    *_, (masks, weights) = lottery_ticket(
        plain, plain.make(plain.parameters()), loader(), 2, 2, 0.6, clip=0.1
    )
    assert same(pruner.masks, masks)
    assert same(dict(model.state_dict()), dict(weights))


def test_pruned_weights_contribute_nothing_to_a_manually_clipped_norm():
    class Norms(Manual):
        def clip_gradients(self, optimizer, **options):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for name, p in self.named_parameters():
                if name in pruner.masks and any(p is q for q in params):
                    seen.append(bool(p.grad[~pruner.masks[name]].any()))
            super().clip_gradients(optimizer, **options)

    seen, pruner = [], pruning(0.6)
    fitter(pruner, epochs=6).fit(Norms())
    assert len(seen) == 6 * 3
    assert not any(seen)


# ---------------------------------------------------------------------- the model is never changed by masking


def hooks_of(model, trainer):
    modules = [
        *(m._forward_hooks for m in model.modules()),
        *(m._forward_pre_hooks for m in model.modules()),
        *(m._backward_hooks for m in model.modules()),
        *(m._state_dict_hooks for m in model.modules()),
        *(m._load_state_dict_pre_hooks for m in model.modules()),
    ]
    params = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    params += [p._backward_hooks or {} for p in model.parameters()]
    optimizers = [o._optimizer_step_post_hooks for o in trainer.optimizers]
    optimizers += [o._optimizer_step_pre_hooks for o in trainer.optimizers]
    return [dict(h) for h in (*modules, *params, *optimizers) if h]


def description(model):
    return {
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "keys": {n: v.shape for n, v in model.state_dict().items()},
        "modules": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules() if m is not model},
    }


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_model_is_never_changed_by_masking(clip):
    class During(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            assert description(model) == before
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    model = Net()
    before = description(model)
    trainer = fitter(pruning(), lp.LotteryTicketRewind(), During(), epochs=6, gradient_clip_val=clip)
    trainer.fit(model)
    assert description(model) == before
    assert hooks_of(model, trainer) == []
    Net().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_validation_start", "on_train_start", "on_prune"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_behind_after_an_exception(error, where):
    class Fail(Callback):
        def fail(self, trainer, *_):
            if pruner.round or where == "on_train_start":
                raise error("stop")

    setattr(Fail, where, Fail.fail)
    model, pruner = Net(), pruning()
    before = description(model)
    trainer = fitter(pruner, lp.LotteryTicketRewind(), Fail(), epochs=6, gradient_clip_val=0.1)
    with pytest.raises((error, SystemExit)):
        trainer.fit(model)
    assert description(model) == before
    assert hooks_of(model, trainer) == []
    if where != "on_prune":
        assert dead_are_zero(model.state_dict(), pruner.masks)


# ---------------------------------------------------------------------------------- the budget is met exactly


@pytest.mark.parametrize("allocate", [global_rank, uniform])
def test_the_budget_is_met_exactly_and_masks_only_shrink(allocate):
    pruner = pruning(0.2, rounds=6, every_n_epochs=1, allocate=allocate)
    watch = Watch(pruner)
    fitter(pruner, lp.LotteryTicketRewind(), watch, epochs=7).fit(Net())
    assert [alive(masks) for masks in watch.masks] == [round((1 - (1 - 0.8**r)) * 400) for r in range(7)]
    for before, after in itertools.pairwise(watch.masks):
        assert all(not bool((after[n] & ~before[n]).any()) for n in after)
    assert pruner.sparsity == pytest.approx(1 - alive(pruner.masks) / 400)


def test_each_pattern_has_its_own_exact_budget_in_every_round():
    schedule = {"head.*": Geometric(0.1), "*": Geometric(0.2)}
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=4)
    watch = Watch(pruner)
    fitter(pruner, watch, epochs=5).fit(Net())
    for r, masks in enumerate(watch.masks):
        assert int(masks["head.weight"].sum()) == round((1 - (1 - 0.9**r)) * 48)
        assert int(masks["stem.weight"].sum() + masks["body.weight"].sum()) == round((1 - (1 - 0.8**r)) * 352)


def test_the_budget_is_met_where_all_weights_are_equal():
    model = Net()
    with torch.no_grad():
        for layer in (model.stem, model.body, model.head):
            layer.weight.fill_(0.1)
    pruner = pruning(0.35, rounds=1, every_n_epochs=1)
    fitter(pruner, lp.LotteryTicketRewind(), epochs=2, limit_train_batches=1).fit(model)
    assert alive(pruner.masks) == round((1 - (1 - 0.65)) * 400)


# -------------------------------------------------------------------------------------- a rewind is bit-exact


class Recorder(Callback):
    """Independent of the package: the state at step k, and at the first batch after each pruning."""

    def __init__(self, k):
        self.k, self.early, self.rewound, self.pruned = k, None, [], False

    def on_train_batch_start(self, trainer, model, *_):
        if self.early is None and trainer.global_step >= self.k:
            self.early = state(trainer)
        if self.pruned:
            self.rewound.append(state(trainer))
        self.pruned = False

    def on_prune(self, trainer, model, masks):
        self.pruned, self.masks = True, masks


def expected_after(early, masks, model):
    """The early state, with the dead at zero, and what optimizers keep for them."""
    early = deepcopy(early)
    places = {}
    for i, group in enumerate(o["param_groups"] for o in early["optimizers"]):
        numbers = itertools.chain.from_iterable(g["params"] for g in group)
        params = (p for g in model.trainer.optimizers[i].param_groups for p in g["params"])
        places.update({id(p): (i, number) for p, number in zip(params, numbers, strict=True)})
    for name, mask in masks.items():
        early["params"][name][~mask] = 0.0
        i, number = places[id(model.get_parameter(name))]
        for value in early["optimizers"][i]["state"].get(number, {}).values():
            if torch.is_tensor(value) and value.shape == mask.shape:
                value[~mask] = 0.0
    return early


@pytest.mark.parametrize("clock", [{"every_n_epochs": 2}, {"every_n_train_steps": 5}], ids=in_words)
@pytest.mark.parametrize("to_step", [0, 1, 4])
@pytest.mark.parametrize("kind", ["sgd", "adam", "one cycle", "plateau", "manual", "accumulating"])
def test_a_rewind_is_bit_exact_every_round(kind, to_step, clock):
    options = {"accumulate_grad_batches": 2} if kind == "accumulating" else {}
    if kind == "manual":
        model, to_step = Manual(), to_step - to_step % 2  # two optimizers step at once
    elif kind == "one cycle":
        model = Net(schedule=lambda o: sched.OneCycleLR(o, 0.1, total_steps=40), interval="step")
    elif kind == "plateau":
        model = Net(schedule=lambda o: sched.ReduceLROnPlateau(o, patience=0))
        model.configure_optimizers = lambda: {
            "optimizer": (o := sgd(model.parameters())),
            "lr_scheduler": {"scheduler": model.schedule(o), "monitor": "val_loss"},
        }
    else:
        make = {"adam": lambda params: torch.optim.Adam(params, lr=0.02, amsgrad=True)}.get(kind, sgd)
        model = Net(make, schedule=lambda o: sched.StepLR(o, 1, 0.7))
    to_step = min(to_step, 3) if kind in ("accumulating", "manual") else to_step
    to_step -= to_step % 2 if kind == "manual" else 0
    pruner, rewinder, recorder = (
        pruning(rounds=3, **clock),
        lp.LotteryTicketRewind(to_step),
        Recorder(to_step),
    )
    kept, masks = [], []

    class Keep(Callback):
        def on_prune(self, trainer, model, new):
            kept.append(deepcopy(rewinder.snapshot.state_dict()))
            masks.append(new)

    fitter(rewinder, pruner, Keep(), recorder, epochs=12, **options).fit(model)
    assert pruner.round == 3
    assert len(recorder.rewound) == 3
    for rewound, new in zip(recorder.rewound, masks, strict=True):
        expected = expected_after(recorder.early, new, model)
        assert [key for key in expected if not same(rewound[key], expected[key])] == []
    assert len({int(m["stem.weight"].sum() + m["body.weight"].sum()) for m in masks}) == 3
    for snapshot in kept:  # the snapshot never changes
        assert same(snapshot, kept[0])
    assert same(kept[0]["tensors"], {**recorder.early["params"], **recorder.early["buffers"]})


def test_a_rewind_brings_back_what_is_no_parameter():
    recorder, model = Recorder(2), Net()
    fitter(pruning(), lp.LotteryTicketRewind(2), recorder, epochs=6).fit(model)
    assert int(recorder.early["buffers"]["seen"]) == 2  # not persistent
    assert int(recorder.early["buffers"]["norm.num_batches_tracked"]) == 2
    for rewound in recorder.rewound:
        assert same(rewound["buffers"], recorder.early["buffers"])
    assert int(model.seen) == 2 + 6


def test_to_step_may_be_a_step_within_a_later_epoch_of_the_first_round():
    recorder, rewinder = Recorder(5), lp.LotteryTicketRewind(5)
    fitter(pruning(), rewinder, recorder, epochs=6).fit(Net())
    assert same(rewinder.snapshot.tensors, {**recorder.early["params"], **recorder.early["buffers"]})


# ----------------------------------------------------------------------------------- checkpoints are truthful


def score(model):
    x, y = samples(16, seed=1).tensors
    with torch.no_grad():
        model.eval()
        return float(sum(nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]) for i in (0, 8)) / 2)


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("clock", [{"every_n_epochs": 2}, {"every_n_train_steps": 6}], ids=in_words)
def test_checkpoints_are_truthful(clock, first, at_epoch_end, tmp_path):
    """A file of each epoch, evaluated again, has the score it was saved with, and the masks of its round."""
    logged = {}

    class Log(Callback):
        def on_validation_end(self, trainer, model):
            logged[trainer.current_epoch] = (float(trainer.callback_metrics["val_loss"]), pruner.round)

    pruner = pruning(rounds=2, **clock)
    checkpoint = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=at_epoch_end
    )
    ours = [pruner, lp.LotteryTicketRewind(2, shorten=False)]
    callbacks = [checkpoint, *ours, Log()] if first else [Log(), *ours, checkpoint]
    trainer, model = fitter(*callbacks, epochs=6, enable_checkpointing=True), Net()
    trainer.fit(model)
    assert [r for _, r in logged.values()] == [0, 0, 1, 1, 2, 2]
    for epoch, (loss, round_) in logged.items():
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        bare = Net()
        bare.load_state_dict(file["state_dict"], strict=True)
        assert score(bare) == pytest.approx(loss, abs=1e-6)
        kept = next(v for k, v in file["callbacks"].items() if k.startswith("IterativeMagnitudePruning"))
        masks = unpack(kept["masks"])
        assert kept["rounds"]["number"] == round_
        assert alive(masks) == round((1 - (1 - 0.7**round_)) * 400)
        assert dead_are_zero(file["state_dict"], masks)
        for name, mask in masks.items():  # trained: no living weight rests at zero
            assert bool((file["state_dict"][name][mask] != 0).all())
    # what fit leaves behind is the trained network of the last round
    assert same(dict(model.state_dict()), dict(file["state_dict"]))
    assert score(model) == pytest.approx(logged[5][0], abs=1e-6)
    assert float(checkpoint.best_model_score) == pytest.approx(min(loss for loss, _ in logged.values()))


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 7])
def test_the_last_round_ends_trained(epochs):
    pruner, rewinder, model = pruning(rounds=2), lp.LotteryTicketRewind(0), Net()
    watch = Watch(pruner)
    fitter(pruner, rewinder, watch, epochs=epochs).fit(model)
    assert pruner.round == watch.rounds[-1] == min(2, -(-epochs // 2) - 1)
    early = rewinder.snapshot.tensors
    assert all(not torch.equal(model.state_dict()[n][m], early[n][m]) for n, m in pruner.masks.items())


def test_a_checkpoint_is_read_without_pickle_and_says_what_it_holds(tmp_path):
    pruner = pruning(rounds=1, every_n_epochs=1)
    trainer = fitter(pruner, lp.LotteryTicketRewind(1), epochs=2)
    trainer.fit(Net(lambda params: torch.optim.Adam(params), schedule=lambda o: sched.MultiStepLR(o, [1])))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {"IterativeMagnitudePruning", "LotteryTicketRewind"} <= {
        k.split("{")[0] for k in file["callbacks"]
    }
    assert same(lp.callbacks.checkpoints.load_masks(tmp_path / "x.ckpt"), pruner.masks)


# -------------------------------------------------------------------------------------- order does not matter


def results_in_order(clock, order, folder):
    torch.manual_seed(0)
    prunings = []

    class Listener(Callback):
        def on_prune(self, trainer, model, masks):
            prunings.append((trainer.global_step, masks))

    pruner, checkpoint = pruning(**clock), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [pruner, lp.LotteryTicketRewind(3, shorten=False), checkpoint, Listener()]
    model = Net()
    fitter(*(callbacks[place] for place in order), epochs=6, enable_checkpointing=True).fit(model)
    assert len(prunings) == 2
    files = [torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True) for epoch in range(6)]
    stored = [(dict(file["state_dict"]), file["optimizer_states"]) for file in files]
    return dict(model.state_dict()), pruner.masks, prunings, stored


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("clock", [{"every_n_epochs": 2}, {"every_n_train_steps": 5}], ids=in_words)
def test_order_does_not_matter(clock, tmp_path):
    first, *others = [results_in_order(clock, order, tmp_path / str(order)) for order in ORDERS[::5]]
    assert all(same(other, first) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("clock", [{"every_n_epochs": 2}, {"every_n_train_steps": 5}], ids=in_words)
def test_no_order_matters(clock, tmp_path):
    first, *others = [results_in_order(clock, order, tmp_path / str(order)) for order in ORDERS]
    assert all(same(other, first) for other in others)


# ---------------------------------------------------------------------------------- training is not disturbed


def test_without_a_pruning_training_is_what_it_is_without_the_callbacks():
    results = []
    for callbacks in ([], [pruning(rounds=0)], [pruning(rounds=0), lp.LotteryTicketRewind(2)]):
        torch.manual_seed(0)
        model = Net(lambda params: torch.optim.Adam(params, lr=0.02))
        trainer = fitter(*callbacks, epochs=3, gradient_clip_val=0.2)
        trainer.fit(model)
        results.append((state(trainer), torch.get_rng_state()))
    assert same(results[1], results[0])
    assert same(results[2], results[0])


def test_pruning_and_rewinding_draw_no_random_number():
    ends = []
    for callbacks in ([], [pruning(rounds=2), lp.LotteryTicketRewind(2)]):
        torch.manual_seed(0)
        fitter(*callbacks, epochs=6).fit(Net())
        ends.append(torch.get_rng_state())
    assert same(*ends)


def test_one_shot_prunes_once():
    pruner = lp.IterativeMagnitudePruning(OneShot(0.75), rounds=3)
    watch = Watch(pruner)
    fitter(pruner, watch, epochs=4).fit(Net())
    assert [alive(masks) for masks in watch.masks] == [400, 100, 100, 100]
    assert same(watch.masks[1], watch.masks[3])
