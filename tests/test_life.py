"""The life of a fit: however it ends nothing stays behind, and what was asked for and not done is said."""

import gc
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy
from functools import partial
from types import FunctionType

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, Timer
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import optimizer as torch_optimizer

import lightning_prune as lp
from lightning_prune.callbacks.strategies import check_optimizers
from lightning_prune.growth import FanIn
from lightning_prune.masks import alive
from lightning_prune.rewind import EarlyBird, Snapshot
from lightning_prune.schedules import Bucket, Explicit, Geometric, Linear, Threshold, TopK
from tests.naming import in_words
from tests.networks import Net, dead_are_zero, fitter, same, sgd, state


@pytest.fixture(autouse=True)
def _no_hooks_of_other_tests():
    """What other tests hold to their end is no trace of what is tested here."""
    gc.collect()
    torch_optimizer._global_optimizer_post_hooks.clear()


def pruning(schedule=None, **options):
    return lp.IterativeMagnitudePruning(schedule or Geometric(0.3), **{"rounds": 2, **options})


def tensors(model):
    return deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})


class Diary(Callback):
    """The round and the number of living weights at each batch, and what the other callbacks are told."""

    def __init__(self, pruner):
        self.pruner, self.rounds, self.told = pruner, [], []

    def on_train_batch_end(self, *_):
        self.rounds.append(self.pruner.round)

    def on_prune(self, trainer, model, masks):
        self.told.append((self.pruner.round, alive(masks)))


# --- nothing stays behind ---


def traces(trainer, model):
    """All that could go on acting after a fit: hooks everywhere, what writes checkpoints, attributes."""
    found = [d for m in model.modules() for name, d in vars(m).items() if name.endswith("_hooks") and d]
    found += [vars(p) for p in model.parameters() if vars(p)]
    found += [h for p in model.parameters() if (h := p._post_accumulate_grad_hooks)]
    found += [h for p in model.parameters() if (h := p._backward_hooks)]
    for o in trainer.optimizers:
        found += [h for h in (o._optimizer_step_post_hooks, o._optimizer_step_pre_hooks) if h]
        found += ["step"] * ("step" in vars(o))
    found += list(torch_optimizer._global_optimizer_post_hooks.values())
    found += list(torch_optimizer._global_optimizer_pre_hooks.values())
    found += ["setup_optimizers"] * ("setup_optimizers" in vars(trainer.strategy))
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    return found, type(trainer.strategy.checkpoint_io), attributes


@pytest.fixture(scope="module")
def plain():
    """What a fit without our callbacks leaves behind."""
    gc.collect()  # holds that other tests have let go without removing them go with the next one
    model, trainer = Net(), fitter(epochs=1)
    lp.hold(model, sgd(model.parameters()), lp.prune(model, 0.0)).remove()
    trainer.fit(model)
    return traces(trainer, model)


def callbacks(**options):
    return [pruning(**options), lp.LotteryTicketRewind()]


def trained(folder):
    trainer, model = fitter(*callbacks(), epochs=3, gradient_clip_val=0.1), Net()
    trainer.fit(model)
    return trainer, model


def finished_and_fitted_again(folder):
    trainer, model = trained(folder)
    trainer.fit(model)
    return trainer, model


def finished_and_resumed(folder):
    trainer, _ = trained(folder)
    trainer.save_checkpoint(folder / "end.ckpt")
    model, trainer = Net(), fitter(*callbacks(), epochs=3)
    trainer.fit(model, ckpt_path=folder / "end.ckpt")
    return trainer, model


def without_an_epoch(folder):
    trainer, model = fitter(*callbacks(), max_epochs=0), Net()
    trainer.fit(model)
    return trainer, model


def without_a_batch(folder):
    trainer, model = fitter(*callbacks(), epochs=2, limit_train_batches=0), Net()
    trainer.fit(model)
    return trainer, model


def without_time(folder):
    trainer, model = fitter(*callbacks(), Timer(duration={"seconds": 0}), epochs=9), Net()
    trainer.fit(model)
    return trainer, model


def in_a_trial(folder):
    trainer, model = fitter(*callbacks(), fast_dev_run=True), Net()
    trainer.fit(model)
    return trainer, model


def stopped_by_the_callback(folder):
    trainer, model = fitter(*callbacks(max_sparsity=0.4), epochs=9), Net()
    trainer.fit(model)
    return trainer, model


def with_channels(folder):
    trainer, model = fitter(lp.StructuredChannelPruning(), epochs=2), Net()
    trainer.fit(model)
    return trainer, model


ENDS = [
    trained,
    finished_and_fitted_again,
    finished_and_resumed,
    without_an_epoch,
    without_a_batch,
    without_time,
]
ENDS += [in_a_trial, stopped_by_the_callback, with_channels]


@pytest.mark.filterwarnings("ignore:.*max_epochs")
@pytest.mark.filterwarnings("ignore:Be aware that")
@pytest.mark.parametrize("end", ENDS)
def test_nothing_stays_behind_however_a_fit_ends(end, plain, tmp_path):
    trainer, model = end(tmp_path)
    assert traces(trainer, model) == plain


@pytest.mark.filterwarnings("ignore:Be aware that")
def test_a_checkpoint_that_is_validated_after_a_finished_fit_is_looked_at_as_it_is(tmp_path):
    """The last masks are not put on the weights of an earlier checkpoint."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fitter(*callbacks(), saver, epochs=3, enable_checkpointing=True)
    trainer.fit(Net())
    early = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    for again in (False, True):
        model = Net()
        other = fitter(*callbacks(), epochs=3) if again else trainer
        if again:
            other.fit(model, ckpt_path=tmp_path / "epoch=2.ckpt")
        other.validate(model, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert same(dict(model.state_dict()), early)


BEFORE = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_validation_batch_start",
    "on_sanity_check_end",
]
DURING = ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"]
DURING += ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"]
DURING += ["on_validation_end", "on_train_epoch_end", "on_save_checkpoint", "on_prune", "on_round_start"]
AFTER = ["on_train_end", "on_fit_end", "teardown"]


class Fail(Callback):
    """Raises in one hook, the first time it is called once `when` is true."""

    def __init__(self, hook, error=RuntimeError, when=lambda: True):
        self.error, self.when, self.failed = error, when, False
        setattr(self, hook, self.fail)

    def fail(self, *_, **__):
        if not self.failed and self.when():
            self.failed = True
            raise self.error("the user's own")


def fails(hook, folder, error=RuntimeError, first=True, pruner=None, model=None, **options):
    pruner = pruner or pruning()
    rewinder, model = lp.LotteryTicketRewind(1), model or Net()
    in_training = hook in DURING and hook not in ("on_train_start", "on_save_checkpoint")
    fail = Fail(hook, error, (lambda: pruner.round == 1) if in_training else lambda: True)
    saver = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    order = [fail, pruner, rewinder] if first else [pruner, rewinder, fail]
    options |= {"enable_checkpointing": True, "num_sanity_val_steps": 2, "gradient_clip_val": 0.1}
    trainer = fitter(*order, saver, epochs=3, **options)
    with pytest.raises((error, SystemExit), match="the user's own" if error is RuntimeError else None):
        trainer.fit(model)
    return trainer, model, pruner, rewinder


@pytest.mark.filterwarnings("ignore:.*max_epochs")
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("hook", BEFORE + DURING + AFTER)
def test_nothing_stays_behind_after_an_exception_in_any_hook(hook, first, plain, tmp_path):
    trainer, model, pruner, _ = fails(hook, tmp_path, first=first)
    found, writes, _ = traces(trainer, model)
    assert (found, writes) == plain[:2]
    if hook not in ("setup", "on_fit_start"):
        assert dead_are_zero(dict(model.named_parameters()), pruner.masks)


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start", "on_train_batch_start", "on_prune"])
def test_nothing_stays_behind_after_an_interrupt(hook, plain, tmp_path):
    trainer, model, _, _ = fails(hook, tmp_path, error=KeyboardInterrupt)
    assert traces(trainer, model)[:2] == plain[:2]


def test_what_stayed_behind_as_another_callback_failed_in_on_exception_goes_with_the_next_fit(plain):
    class Fails(Fail):
        def on_exception(self, *_):
            raise RuntimeError("again")

    pruner, model = pruning(), Net()
    with pytest.raises(RuntimeError, match="again"):
        fitter(Fails("on_train_batch_end"), pruner, epochs=2).fit(model)
    trainer = fitter(pruner, epochs=2)
    trainer.fit(model)
    assert traces(trainer, model)[0] == plain[0]


def rounds_and_end(pruner, rewinder, model):
    torch.manual_seed(5)
    diary = Diary(pruner)
    fitter(pruner, rewinder, diary, epochs=5, num_sanity_val_steps=2).fit(model)
    return (
        diary.rounds,
        diary.told,
        pruner.history,
        pruner.masks,
        tensors(model),
        rewinder.snapshot.state_dict(),
    )


@pytest.mark.parametrize("hook", [*BEFORE, "on_train_start"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_next_fit_begins_as_if_one_that_failed_before_training_had_not_been(hook, first, tmp_path):
    model = Net()
    start, options = model.state_dict(), {"every_n_epochs": 2, "masks": "zeros"}
    lp.prune(model, 0.2)
    other = Net()
    other.load_state_dict(start)
    expected = rounds_and_end(pruning(**options), lp.LotteryTicketRewind(1), other)
    _, _, pruner, rewinder = fails(hook, tmp_path, first=first, pruner=pruning(**options), model=model)
    again = Net()
    again.load_state_dict(start)
    assert same(list(rounds_and_end(pruner, rewinder, again)), list(expected))


def test_a_refused_checkpoint_leaves_the_callbacks_as_they_were(tmp_path):
    trainer = fitter(*callbacks(), epochs=2)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    masks = next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))["masks"]
    masks["body.weight"] = masks["head.weight"]
    torch.save(file, tmp_path / "a.ckpt")
    pruner, rewinder = callbacks()
    with pytest.raises(ValueError, match=r"masks: body\.weight is"):
        fitter(pruner, rewinder, epochs=3).fit(Net(), ckpt_path=tmp_path / "a.ckpt")
    assert (pruner.round, pruner.masks, pruner.history, rewinder.snapshot) == (0, {}, [], None)
    fitter(pruner, rewinder, epochs=3).fit(Net())
    assert pruner.round == 2


@pytest.mark.parametrize("clock", [{"every_n_epochs": 2}, {"every_n_train_steps": 7}], ids=in_words)
def test_a_round_that_failed_goes_on_for_as_long_as_was_left_of_it(clock):
    pruner, model = pruning(rounds=9, **clock), Net()
    diary = Diary(pruner)
    fail = Fail("on_train_batch_start", when=lambda: len(diary.rounds) == 9)
    with pytest.raises(RuntimeError, match="own"):
        fitter(pruner, diary, fail, epochs=9).fit(model)
    fitter(pruner, diary, epochs=9).fit(model)
    length = clock.get("every_n_train_steps", 6)
    assert diary.rounds == [min(9, i // length) for i in range(9 + 27)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_exception_in_on_prune_is_raised_and_leaves_the_state_before_the_pruning(error, first, tmp_path):
    class Look(Callback):
        def on_train_epoch_end(self, trainer, model):
            self.seen = [state(trainer), pruner.masks, pruner.round, pruner.removed, pruner.sparsity]

    pruner, rewinder, look, model = pruning(), lp.LotteryTicketRewind(1), Look(), Net()
    fail = Fail("on_prune", error)
    saver = ModelCheckpoint(tmp_path, save_on_exception=True)  # which must not hide the error
    order = [saver, fail, pruner, rewinder] if first else [pruner, rewinder, look, fail, saver]
    trainer = fitter(*order, *([look] if first else []), epochs=3, enable_checkpointing=True)
    with pytest.raises((error, SystemExit), match="the user's own" if error is RuntimeError else None):
        trainer.fit(model)
    expected = [state(trainer), pruner.masks, pruner.round, pruner.removed, pruner.sparsity]
    assert same(expected, look.seen)
    assert (pruner.round, pruner.history) == (0, [])
    diary = Diary(pruner)
    fitter(pruner, rewinder, diary, epochs=2).fit(model)
    assert diary.told == [(1, 280), (2, 196)]  # the pruning that failed comes as the next fit starts
    assert int(model.seen) == 1 + 3  # and rewinds


@pytest.mark.parametrize("first", [True, False], ids=["before the rewind", "after it"])
def test_an_exception_in_on_round_start_leaves_the_old_round_or_the_new_one_whole(first):
    class Look(Callback):
        def on_train_epoch_end(self, trainer, model):
            self.seen = tensors(model)

    pruner, rewinder, look, model = pruning(), lp.LotteryTicketRewind(1), Look(), Net()
    fail = Fail("on_round_start")
    order = [fail, pruner, rewinder] if first else [pruner, rewinder, fail]
    with pytest.raises(RuntimeError, match="the user's own"):
        fitter(*order, look, epochs=3).fit(model)
    if first:
        assert (pruner.round, pruner.removed, pruner.sparsity, pruner.history) == (0, 0, 0.0, [])
        assert same(tensors(model), look.seen)
        return
    assert (pruner.round, len(pruner.history)) == (1, 1)
    for name, value in tensors(model).items():
        mask = pruner.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        early = rewinder.snapshot.tensors[name]
        assert same(value.detach(), early.where(mask, torch.zeros((), dtype=value.dtype)))
    diary = Diary(pruner)
    fitter(pruner, rewinder, diary, epochs=2).fit(model)
    assert diary.told == [(2, 196)]
    assert diary.rounds == [1, 1, 1, 2, 2, 2]


# --- what was asked for and not done is said ---


def warned(fit):
    """What a fit warns of, about its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [text for w in caught if (text := str(w.message)).startswith("the fit ")]


class Worse(Net):
    """Its validation loss gets worse from epoch to epoch."""

    def on_validation_epoch_end(self):
        self.log("worse", float(self.current_epoch))


def unknown(n):
    """Batches of which nobody knows how many there are."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Net().train_dataloader().dataset)

    class Streamed(Net):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Stream(), batch_size=8)

    return Streamed()


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"rounds": 1}, {"epochs": 1}, r"room for 0 of the 1 prunings that are left \(it ends with epoch 1"),
        ({"rounds": 4}, {"epochs": 3}, "room for 2 of the 4 prunings"),
        (
            {"rounds": 4, "every_n_epochs": 2},
            {"epochs": 4},
            r"room for 1 of the 4 .*epoch 4, a round has 2\)",
        ),
        ({"rounds": 4}, {"max_steps": 7}, "room for 2 of the 4 prunings"),
        (
            {"rounds": 4, "every_n_train_steps": 3},
            {"epochs": 3},
            r"room for 2 of the 4 .*step 9, a round has 3",
        ),
        ({"rounds": 4, "every_n_train_steps": 3}, {"max_steps": 10}, "room for 3 of the 4 prunings"),
        ({"rounds": 4}, {"epochs": 9, "limit_train_batches": 2, "max_steps": 5}, "room for 2 of the 4"),
        (
            {"rounds": 4, "every_n_train_steps": 2},
            {"epochs": 3, "accumulate_grad_batches": 2},
            "room for 2 of",
        ),
    ],
    ids=in_words,
)
def test_a_fit_without_room_for_all_prunings_says_so_at_the_start_and_once(options, trainer, message):
    class At(Callback):
        def on_train_epoch_start(self, *_):
            raise KeyError  # before anything is trained

    pruner, model = pruning(**options), Net()
    (text,) = warned(lambda: fitter(pruner, **trainer).fit(model))
    assert re.search(message, text)
    assert pruner.round == int(text.split(" of the ")[0].split()[-1])  # what it says is what happens
    with pytest.raises(KeyError), pytest.warns(UserWarning, match=message):
        fitter(pruning(**options), At(), **trainer).fit(Net())


@pytest.mark.parametrize(
    ("options", "trainer", "model"),
    [
        ({"rounds": 2}, {"epochs": 3}, Net),
        ({"rounds": 1, "every_n_epochs": 2}, {"epochs": 4}, Net),
        ({"rounds": 2, "every_n_train_steps": 3}, {"max_steps": 9}, Net),
        ({"rounds": 0}, {"epochs": 1}, Net),
        ({"rounds": 9, "max_sparsity": 0.4}, {"epochs": 10}, Net),
        ({"rounds": 4}, {"fast_dev_run": True}, Net),
        ({"rounds": 2}, {"epochs": 3}, lambda: unknown(3)),
    ],
    ids=in_words,
)
def test_nothing_is_said_where_all_prunings_come_or_the_callback_ends_the_fit_itself(options, trainer, model):
    assert warned(lambda: fitter(pruning(**options), **trainer).fit(model())) == []


def test_what_could_not_be_known_at_the_start_is_said_at_the_end():
    stopper = EarlyStopping("worse", patience=1)
    (text,) = warned(lambda: fitter(pruning(rounds=4, every_n_epochs=3), stopper, epochs=99).fit(Worse()))
    assert "ended in round 0, after 0 of 4 prunings and at sparsity 0.0000. Train longer" in text
    timer = Timer(duration={"seconds": 0})
    (text,) = warned(lambda: fitter(pruning(rounds=4), timer, max_epochs=99).fit(Net()))
    assert "ended in round" in text
    (text,) = warned(
        lambda: fitter(pruning(rounds=4, every_n_train_steps=4), epochs=3).fit(unknown(3))
    )  # of data of unknown length
    assert "ended in round 2, after 2 of 4 prunings" in text


def test_a_shortened_round_is_not_short_of_room():
    pruner = pruning(rounds=2, every_n_train_steps=6)
    fit = fitter(pruner, lp.LotteryTicketRewind(3, shorten=True), max_steps=13).fit
    assert warned(lambda: fit(Net())) == []
    assert pruner.round == 2


@pytest.mark.filterwarnings("ignore:.*max_epochs")
def test_a_fit_that_trains_nothing_says_so(tmp_path):
    (text,) = warned(lambda: fitter(pruning(rounds=4), max_epochs=0).fit(Net()))
    assert "ended in round 0 without a step, after 0 of 4 prunings" in text
    trainer = fitter(pruning(rounds=1), epochs=2)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    more = fitter(pruning(rounds=3), epochs=2)
    (text,) = warned(lambda: more.fit(Net(), ckpt_path=tmp_path / "end.ckpt"))
    assert "ended in round 1 without a step, after 1 of 3 prunings and at sparsity 0.3000" in text
    same_again = fitter(pruning(rounds=1), epochs=2)
    assert warned(lambda: same_again.fit(Net(), ckpt_path=tmp_path / "end.ckpt")) == []


def test_a_second_fit_counts_the_prunings_that_are_left():
    pruner, model = pruning(rounds=5), Net()
    (text,) = warned(lambda: fitter(pruner, epochs=3).fit(model))
    assert "room for 2 of the 5 prunings" in text
    (text,) = warned(lambda: fitter(pruner, epochs=2).fit(model))
    assert "room for 2 of the 3 prunings" in text
    assert warned(lambda: fitter(pruner, epochs=2).fit(model)) == []
    assert pruner.round == 5


def test_a_dry_run_writes_no_sparse_file(tmp_path):
    path = tmp_path / "trained.safetensors"
    path.write_bytes(b"trained before")
    fitter(pruning(save_sparse=path), fast_dev_run=True).fit(Net())
    fitter(lp.StructuredChannelPruning(save_sparse=path), fast_dev_run=True).fit(Net())
    assert path.read_bytes() == b"trained before"
    fitter(pruning(save_sparse=path), epochs=3).fit(Net())
    assert path.read_bytes() != b"trained before"


# --- a resumed run ---


def checkpoint_of(folder, *callbacks, epochs=2, **options):
    trainer = fitter(*callbacks, epochs=epochs, **options)
    trainer.fit(Net())
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


BASE = {"rounds": 2, "every_n_epochs": 2}
REWIND = {"to_step": 1}


@pytest.mark.parametrize(
    ("pruner", "rewind", "message"),
    [
        ({"every_n_epochs": 3}, {}, "every_n_epochs=2 there, every_n_epochs=3 here"),
        (
            {"every_n_epochs": 1, "every_n_train_steps": 6},
            {},
            "every_n_train_steps=None there, every_n_train_steps=6 here",
        ),
        ({}, {"to_step": 2}, "to_step=1 there, to_step=2 here"),
        (
            {},
            {"to_step": 0, "to_epoch": 1},
            "to_step=1 there, to_step=0 here; to_epoch=None there, to_epoch=1 here",
        ),
        ({}, {"policy": lp.rewind.weights}, "policy='everything' there, policy='weights' here"),
        ({}, {"until": EarlyBird()}, "until='None' there, until='EarlyBird"),
        ({}, {"to_step": 0, "to_epoch": 1, "shorten": True}, "shorten=None there, shorten=True here"),
        ({}, {"same_batches": True, "to_step": 0}, "same_batches=False there, same_batches=True here"),
    ],
    ids=in_words,
)
def test_a_resumed_run_with_other_settings_is_refused_naming_both(pruner, rewind, message, tmp_path):
    path = checkpoint_of(tmp_path, pruning(**BASE), lp.LotteryTicketRewind(**REWIND))
    other, model = [pruning(**{**BASE, **pruner}), lp.LotteryTicketRewind(**{**REWIND, **rewind})], Net()
    with pytest.raises(ValueError, match=message):
        fitter(*other, epochs=6).fit(model, ckpt_path=path)
    assert other[0].masks == {}


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lp.LotteryTicketRewind, {"until": 3}, "until=3: allowed are instances of .*EarlyBird"),
        (lp.LotteryTicketRewind, {"until": EarlyBird}, "until=<class .*: allowed are instances"),
        (lp.LotteryTicketRewind, {"same_batches": 1}, "same_batches=1: allowed are True and False"),
        (pruning, {"verify": "yes"}, "verify='yes': allowed are True and False"),
        (pruning, {"verify": None}, "verify=None: allowed are True and False"),
        (pruning, {"stop_below": 0.5}, "stop_below=0.5: allowed are dicts"),
        (pruning, {"follow": "a"}, "follow='a': allowed are dicts"),
        (lp.StructuredChannelPruning, {"follow": "a"}, "follow='a': allowed are dicts"),
        (
            lp.IterativeMagnitudePruning,
            {"schedule": {1: Geometric(0.2)}},
            "schedule={1: .*: allowed are dicts",
        ),
    ],
    ids=in_words,
)
def test_arguments_of_another_kind_are_refused_as_they_are_given(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


@pytest.mark.parametrize("returned", [None, 5])
def test_a_policy_that_returns_no_snapshot_is_named(returned):
    rewind = lp.LotteryTicketRewind(policy=lambda early: returned)
    with pytest.raises(ValueError, match=f"policy=.*it returned {returned}; allowed are snapshots"):
        fitter(pruning(rounds=1), rewind, epochs=2).fit(Net())


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"masks": "zeros"}], ids=in_words)
def test_growth_of_a_dense_network_is_said_to_exchange_nothing(options):
    pruner = lp.DynamicSparseTraining(every_n_train_steps=2, **options)
    with pytest.warns(UserWarning, match="no weight is dead as training begins"):
        fitter(pruner, epochs=2).fit(Net())


def grows(**options):
    return lp.DynamicSparseTraining(
        options.pop("sparsity", 0.8), every_n_train_steps=2, include=["body*"], **options
    )


@pytest.mark.parametrize(
    ("make", "before", "here", "said"),
    [
        (pruning, {}, {"masks": "zeros"}, "masks='zeros'.* begun with masks=None"),
        (grows, {}, {"criterion": lp.criteria.magnitude}, "criterion=magnitude.* begun with criterion=Ran"),
        (grows, {}, {"sparsity": 0.6}, r"sparsity=0\.6.* begun with sparsity=0\.8"),
        (grows, {}, {"allocate": lp.allocation.uniform}, "allocate=uniform.* begun with allocate=erk"),
        (grows, {"until": 0.5}, {"until": 0.9}, "until=0.9.* begun with until=0.5"),
        (grows, {"sparsity": Explicit([0.5, 0.8])}, {}, r"sparsity=0\.8.* begun with sparsity=Explicit"),
    ],
    ids=in_words,
)
def test_what_only_the_beginning_of_a_fit_reads_is_said_to_have_no_effect_on_resume(
    make, before, here, said, tmp_path
):
    path = checkpoint_of(tmp_path, make(**before), epochs=3)
    with pytest.warns(UserWarning, match=rf"\({said}"):
        fitter(make(**here), epochs=4).fit(Net(), ckpt_path=path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitter(make(**before), epochs=4).fit(Net(), ckpt_path=path)
    assert not [w for w in told if "has no effect" in str(w.message)]


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"until_step": 5}, "until_step=None there, until_step=5 here"),
        (
            {"granularity": FanIn()},
            "ckpt_path, masks: .*body.weight are none of .*or the granularity that they have",
        ),
    ],
    ids=in_words,
)
def test_growth_that_cannot_go_on_from_a_checkpoint_is_refused(here, said, tmp_path):
    path = checkpoint_of(tmp_path, grows(), epochs=3)
    with pytest.raises(ValueError, match=said):
        fitter(grows(**here), epochs=4).fit(Net(), ckpt_path=path)


def channels(**options):
    return lp.StructuredChannelPruning(lp.schedules.Explicit([0.0, 0.2, 0.4]), rounds=2, **options)


@pytest.mark.parametrize(
    ("make", "before", "here", "said"),
    [
        (
            pruning,
            {},
            {"criterion": lp.criteria.Random()},
            r"criterion=Random\(seed=0\) instead of magnitude",
        ),
        (pruning, {}, {"rounds": 3, "max_sparsity": 0.9}, "rounds=3 instead of 2, max_sparsity=0.9 instead"),
        (channels, {}, {"at_least": 12}, "at_least=12 instead of 1"),
        (grows, {}, {"grow": lp.criteria.Random()}, r"grow=Random\(seed=0\) instead of gradient"),
        (grows, {}, {"drop": lp.criteria.Random()}, r"drop=Random\(seed=0\) instead of magnitude"),
        (grows, {}, {"fraction": 0.5}, r"fraction=0.5 instead of CosineDecay\(initial=0.3\)"),
        (grows, {"granularity": FanIn()}, {}, r"granularity=single instead of FanIn\(ablate=0.3\)"),
        (
            grows,
            {},
            {"sparsity": lp.schedules.Explicit([0.8, 0.8, 0.9])},
            "sparsity=Explicit.* instead of 0.8",
        ),
    ],
    ids=in_words,
)
def test_what_a_resumed_fit_does_otherwise_is_said_and_after_the_last_pruning_has_no_effect(
    make, before, here, said, tmp_path, caplog
):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fitter(make(**before), kept, epochs=4, enable_checkpointing=True).fit(Net())

    def resumed(epoch, epochs, **options):
        caplog.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fitter(pruner := make(**options), epochs=epochs).fit(
                Net(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
            )
        return pruner, caplog.text, [str(w.message) for w in told if "has no effect" in str(w.message)]

    straight, text, idle = resumed(0, 4, **before)
    assert "instead of" not in text
    assert not idle
    other, text, idle = resumed(0, 4, **here)
    assert re.search(f"from here on with other arguments than those of the checkpoint: {said}", text)
    assert not idle
    assert other.round > 1
    assert (other.rounds, other.sparsity) != (straight.rounds, straight.sparsity) or not same(
        other.masks, straight.masks
    )
    _, text, idle = resumed(3, 5, **here)
    assert [line for line in idle if " was the last, and the fit that ckpt_path= goes on" in line] == idle
    assert len(idle) == ("rounds" not in here)
    assert "rounds" in here or "instead of" not in text


def test_a_policy_of_ones_own_is_known_again_in_another_process(tmp_path):
    def policy(early, final, part):
        return early

    rewind = lp.LotteryTicketRewind(policy=partial(policy, part=1))
    path = checkpoint_of(tmp_path, pruning(rounds=1), rewind)
    same_policy = partial(FunctionType(policy.__code__, globals(), "policy"), part=1)  # another address
    same_policy.func.__qualname__ = policy.__qualname__
    fitter(pruning(rounds=1), lp.LotteryTicketRewind(policy=same_policy), epochs=3).fit(Net(), ckpt_path=path)
    trainer = fitter(pruning(rounds=1), lp.LotteryTicketRewind(policy=partial(policy, part=2)), epochs=3)
    with pytest.raises(ValueError, match=r"policy\(part=1\)' there, policy='.*policy\(part=2\)' here"):
        trainer.fit(Net(), ckpt_path=path)


@pytest.mark.parametrize(
    "kind", ["IterativeMagnitudePruning", "StructuredChannelPruning", "LotteryTicketRewind"]
)
def test_the_state_of_another_version_is_refused_naming_both(kind, tmp_path):
    make = lp.StructuredChannelPruning if kind.startswith("Str") else pruning
    path = checkpoint_of(tmp_path, make(rounds=1), lp.LotteryTicketRewind())
    file = torch.load(path, weights_only=True)
    key = next(key for key in file["callbacks"] if key.startswith(kind))
    for version in (None, 1, 99):
        file["callbacks"][key].pop("version", None)
        if version:
            file["callbacks"][key]["version"] = version
        torch.save(file, path)
        message = f"the state of a {kind} of version {version or 1}, and this is version 2"
        with pytest.raises(ValueError, match=message):
            fitter(make(rounds=1), lp.LotteryTicketRewind(), epochs=3).fit(Net(), ckpt_path=path)


def test_more_rounds_are_welcome_on_resume(tmp_path):
    path = checkpoint_of(tmp_path, pruning(rounds=1), lp.LotteryTicketRewind())
    pruner = pruning(rounds=3)
    fitter(pruner, lp.LotteryTicketRewind(), epochs=4).fit(Net(), ckpt_path=path)
    assert pruner.round == 3
    assert [row.round for row in pruner.history] == [0, 1, 2, 3]


# --- prunings that are not due, and rounds that change nothing ---


@pytest.mark.parametrize("schedule", [TopK(20), Threshold(0.05), Bucket(0.5), Geometric(0.2)], ids=in_words)
@pytest.mark.parametrize("rewind", [False, True])
def test_no_pruning_happens_that_is_not_due_and_history_has_one_row_a_round(schedule, rewind):
    pruner = pruning(schedule, rounds=2)
    diary, others = Diary(pruner), [lp.LotteryTicketRewind()] if rewind else []
    fitter(pruner, *others, diary, epochs=3).fit(Net())
    assert [round for round, _ in diary.told] == [1, 2]
    assert [row.round for row in pruner.history] == [0, 1, 2]
    assert pruner.history[0].sparsity == 0
    assert [row.steps for row in pruner.history] == [3, 3, 3]
    assert [row.alive for row in pruner.history[1:]] == [left for _, left in diary.told]


def test_a_schedule_above_zero_prunes_in_round_0_and_has_one_row_for_it():
    pruner = pruning(Explicit([0.5, 0.6]), rounds=1)
    diary = Diary(pruner)
    fitter(pruner, diary, epochs=2).fit(Net())
    assert diary.told == [(0, 200), (1, 160)]
    assert [(row.round, row.alive) for row in pruner.history] == [(0, 200), (1, 160)]


@pytest.mark.parametrize(
    ("schedule", "rounds", "rewinds"),
    [
        (Explicit([0, 0, 0, 0.5]), 3, 1),
        (Linear(0.6, rounds=1, start=3), 4, 1),
        (Explicit([0, 0.3, 0.3, 0.5]), 3, 2),
        (Threshold(1e-9), 3, 0),
        (Threshold(0.02), 2, None),
    ],
    ids=in_words,
)
def test_there_is_no_rewind_where_no_mask_changed(schedule, rounds, rewinds):
    class Restores(Callback):
        def on_round_start(self, trainer, model, masks):
            changed.append(pruner.removed > 0)
            now.append(same(tensors(model), before[-1]))

        def on_train_epoch_end(self, trainer, model):
            before.append(tensors(model))

    pruner, changed, now, before = pruning(schedule, rounds=rounds), [], [], []
    fitter(pruner, lp.LotteryTicketRewind(), Restores(), epochs=rounds + 1).fit(Net())
    assert len(changed) == rounds
    assert now == [not c for c in changed]  # the network is as the round before it ended, bit for bit
    assert rewinds is None or sum(changed) == rewinds


# --- parameter groups that come in mid-fit ---


class Unfreeze(BaseFinetuning):
    """Trains the stem from the second epoch on, in a group of its own."""

    def __init__(self, at=1):
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.stem)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer, lr=0.05)


class Head(Net):
    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("policy", ["everything", "weights", "learning_rate", "fine_tune", "nothing"])
def test_groups_that_an_optimizer_got_in_mid_fit_survive_a_rewind(policy, first):
    class Look(Callback):
        def on_train_batch_start(self, trainer, model, *_):
            if pruner.round == 1 and not seen:
                groups = trainer.optimizers[0].state_dict()
                now = tensors(model)
                seen.append((now, groups, rewinder.snapshot))

    torch.manual_seed(3)
    pruner, seen = pruning(rounds=1, every_n_epochs=3), []
    rewinder, model = lp.LotteryTicketRewind(1, policy=getattr(lp.rewind, policy)), Head()
    order = [Unfreeze(), pruner, rewinder, Look()] if first else [pruner, rewinder, Look(), Unfreeze()]
    trainer = fitter(*order, epochs=4)
    trainer.fit(model)
    ((now, groups, early),) = seen
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [6, 2]
    assert [g["lr"] for g in groups["param_groups"]] == [0.1, 0.05]
    if policy == "everything":
        kept = early.optimizers[0]["state"]
        assert set(groups["state"]) == set(kept)  # nothing is known of the parameters that came later
        for name, value in now.items():
            alive_now = pruner.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert same(value, early.tensors[name].where(alive_now, torch.zeros((), dtype=value.dtype)))


def test_an_optimizer_with_other_groups_is_refused_before_anything_is_touched():
    model = Net()
    optimizer = sgd(model.parameters())
    snapshot = Snapshot.take(model, [optimizer])
    with torch.no_grad():
        model.stem.weight.add_(1.0)
    before = tensors(model)
    other = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(
        ValueError, match=r"parameter groups: of optimizer 0: \[8\] in the snapshot, \[1\] here"
    ):
        snapshot.restore(model, [other])
    assert same(tensors(model), before)


def test_an_optimizer_that_is_sharded_over_ranks_is_refused_with_a_rewind():
    class Sharded(Callback):
        def on_fit_start(self, trainer, model):
            sharded = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)
            sharded.state, sharded.param_groups = {}, []
            trainer.strategy.optimizers = [sharded]

    rewinder = lp.LotteryTicketRewind()
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer keeps a part of its state on each rank"):
        fitter(Sharded(), rewinder, pruning(), epochs=1).fit(Net())
    assert rewinder.snapshot is None
    trainer = fitter()
    trainer.strategy.optimizers = []
    check_optimizers(trainer)


# --- another network, another trainer ---


@pytest.mark.parametrize("order", ["pruner first", "rewinder first"])
def test_callbacks_of_one_network_are_refused_with_another_one(order):
    pruner, rewinder = pruning(), lp.LotteryTicketRewind()
    fitter(pruner, rewinder, epochs=3).fit(Net())
    other = Net()
    before = tensors(other)
    both = [pruner, rewinder] if order == "pruner first" else [rewinder, pruner]
    with pytest.raises(ValueError, match="Make new callbacks for a new network"):
        fitter(*both, epochs=3).fit(other)
    assert same(tensors(other), before)
    assert pruner.round == 2
    with pytest.raises(ValueError, match=r"it is in round 2 at sparsity 0\.5100 of another network"):
        fitter(pruner, epochs=3).fit(other)


def test_a_network_object_with_the_trained_weights_goes_on_and_it_is_said():
    pruner, model = pruning(rounds=3), Net()
    fitter(pruner, epochs=2).fit(model)
    again = Net()
    again.load_state_dict(model.state_dict())
    with pytest.warns(
        UserWarning, match=r"in round 1 at sparsity 0\.3000 of another network object, and goes on"
    ):
        fitter(pruner, epochs=2).fit(again)
    assert pruner.round == 3


def test_a_callback_that_has_pruned_nothing_yet_says_in_which_round_it_takes_up_another_network():
    pruner = pruning(Explicit([0, 0, 0, 0.5]), rounds=3)
    fitter(pruner, epochs=3).fit(Net())
    with pytest.warns(UserWarning, match=r"in round 2 at sparsity 0\.0000 of another network object"):
        fitter(pruner, epochs=1).fit(Net())


def test_a_second_trainer_validates_tests_and_predicts_in_mid_fit(tmp_path):
    """With the same callbacks, which belong to the fit that is under way, also from a checkpoint."""

    class Aside(Callback):
        def on_train_epoch_end(self, trainer, model):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "x.ckpt")  # of another round than where it is read
            if trainer.current_epoch == 1:
                with torch.random.fork_rng():
                    self.aside(trainer, model)

        def aside(self, trainer, model):
            other = fitter(pruner, rewinder)
            copy = deepcopy_of(model)
            other.validate(copy, verbose=False)
            other.validate(copy, ckpt_path=tmp_path / "x.ckpt", verbose=False)
            with torch.no_grad():
                copy.body.weight.fill_(1.0)
            other.validate(copy, verbose=False)
            assert bool((copy.body.weight == 1).all())  # no mask of this fit is put on another network
            other.predict(copy, copy.val_dataloader())

    results = []
    for aside in (False, True):
        torch.manual_seed(0)
        pruner, rewinder = callbacks(rounds=3)
        model = Predicts()
        fitter(pruner, rewinder, *([Aside()] if aside else []), epochs=4).fit(model)
        results.append((pruner.round, pruner.masks, tensors(model)))
    assert same(*results)


class Predicts(Net):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def deepcopy_of(model):
    copy = Predicts()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("which", ["pruner", "rewind"])
def test_a_callback_that_is_in_a_fit_is_refused_in_another_one_within_it(which):
    pruner, rewind, said, another = pruning(rounds=2), lp.LotteryTicketRewind(), [], Net()

    class Nested(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            others = (pruner,) if which == "pruner" else (pruning(rounds=1), rewind)
            with pytest.raises(
                ValueError, match="is in a fit of another Trainer that is still under way"
            ) as e:
                fitter(*others, epochs=2).fit(another)
            said.append(e)

    plain, model = Net(), Net()
    plain.load_state_dict(model.state_dict())
    for callbacks, net in (
        ((pruner, rewind, Nested()), model),
        ((pruning(rounds=2), lp.LotteryTicketRewind()), plain),
    ):
        torch.manual_seed(1)
        fitter(*callbacks, epochs=3).fit(net)
    assert len(said) == 3
    assert same(model.state_dict(), plain.state_dict())
    assert pruner.round == 2


def test_a_second_trainer_may_fit_another_network_in_mid_fit():
    class Aside(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 4:
                inner = pruning(Geometric(0.5), rounds=1)
                with torch.random.fork_rng():
                    fitter(inner, lp.LotteryTicketRewind(), epochs=2).fit(other)
                assert dead_are_zero(dict(other.named_parameters()), inner.masks)

    results = []
    for aside in (False, True):
        torch.manual_seed(0)
        model, other = Net(), Net()
        pruner = pruning()
        fitter(pruner, *([Aside()] if aside else []), epochs=3).fit(model)
        results.append((pruner.round, pruner.masks, tensors(model)))
    assert same(*results)


# --- early birds ---


class Checks(EarlyBird):
    """Notes the steps at which it is asked."""


def checks(rewinder, folder=None, epochs=4, ckpt_path=None, **options):
    steps = []
    pruner = pruning(rounds=1, every_n_epochs=9)
    draw = pruner.drawn
    pruner.drawn = lambda trainer, model: steps.append(trainer.global_step) or draw(trainer, model)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options) if folder else None
    extra = {"enable_checkpointing": True} if folder else {}
    fitter(pruner, rewinder, *([saver] if saver else []), epochs=epochs, **extra).fit(
        Net(), ckpt_path=ckpt_path
    )
    return steps


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_an_epoch_that_was_checked_is_not_checked_again_on_resume(at_epoch_end, tmp_path):
    make = lambda: lp.LotteryTicketRewind(until=EarlyBird(distance=1e-9, masks=3))  # noqa: E731
    options = {"save_on_train_epoch_end": at_epoch_end}
    assert checks(make(), tmp_path, **options) == [3, 6, 9, 12]
    rewinder = make()
    assert checks(rewinder, tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt", **options) == (
        [9, 12] if at_epoch_end else [6, 9, 12]
    )
    assert len(rewinder.state_dict()["drawn"]) == 3


def test_no_early_bird_is_looked_for_before_the_snapshot():
    assert checks(lp.LotteryTicketRewind(7, until=EarlyBird(masks=2, distance=1e-9))) == [9, 12]
    every = EarlyBird(masks=2, distance=1e-9, every_n_train_steps=2)
    assert checks(lp.LotteryTicketRewind(7, until=every)) == [8, 10, 12]


def test_a_second_fit_checks_its_own_epochs():
    rewinder = lp.LotteryTicketRewind(until=EarlyBird(masks=2, distance=1e-9))
    pruner, model, steps = pruning(rounds=1, every_n_epochs=99), Net(), []
    draw = pruner.drawn
    pruner.drawn = lambda trainer, model: steps.append(trainer.global_step) or draw(trainer, model)
    for _ in range(2):
        fitter(pruner, rewinder, epochs=1).fit(model)
    assert steps == [3, 3]


# --- seen without setting anything up ---


SCRIPT = """
import sys, torch, logging, warnings
warnings.simplefilter("ignore")
{setup}
import lightning_prune as lp
from lightning.pytorch import Callback
from tests.networks import Net, fitter
class Interrupt(Callback):
    def on_train_batch_start(self, trainer, *_):
        if {interrupt} and trainer.global_step == 4:
            raise KeyboardInterrupt
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
fitter(lp.IterativeMagnitudePruning(rounds=2, max_sparsity=0.3), Interrupt(), epochs=3).fit(Net())
"""


def shown(setup="", interrupt=False, **env):
    code = SCRIPT.format(setup=textwrap.dedent(setup), interrupt=interrupt)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert run.returncode == (1 if interrupt else 0), run.stderr
    assert not run.stdout
    return [line for line in run.stderr.splitlines() if "round" in line]


PRUNED = "round 1 of 2: pruned 80, 320 weights left (80.00 %)"


def test_a_script_without_logging_set_up_shows_a_line_for_each_pruning_and_why_it_ended_early():
    lines = shown()
    assert lines[0] == PRUNED
    assert lines[2] == "the rounds (alive: weights):"
    assert lines[3].split() == ["round", "sparsity", "alive", "steps"]
    assert lines[1].startswith("round 1 is the last: the next sparsity, 0.3600, is above max_sparsity=0.3")


def test_a_script_that_sets_logging_up_has_each_line_once_and_as_it_says():
    setup = "logging.basicConfig(format='mine %(message)s', level=logging.INFO)"
    assert [line for line in shown(setup) if "pruned" in line] == [f"mine {PRUNED}"]
    setup = "logging.getLogger('lightning_prune').setLevel(logging.WARNING)"
    assert shown(setup) == []


def test_only_the_first_process_shows_lines():
    assert shown("from lightning.pytorch.utilities import rank_zero_only\nrank_zero_only.rank = 1") == []


def test_an_interrupt_says_how_to_go_on():
    lines = shown(interrupt=True)
    assert lines[0] == PRUNED
    assert lines[1].startswith(
        "interrupted in round 1 of 2. Fit again with ckpt_path=<the last checkpoint> to go on"
    )


# --- copies of callbacks ---


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "moment", ["on_sanity_check_end", "on_train_batch_start", "on_validation_end", "on_prune"]
)
def test_callbacks_can_be_copied_and_pickled_in_mid_fit(copied, moment):
    class Copy(Callback):
        pass

    def copy(self, trainer, model, *_):
        if pruner.round == 1 or moment == "on_sanity_check_end":
            copies[:] = copied((pruner, rewinder))

    setattr(Copy, moment, copy)
    pruner, rewinder, copies, model = pruning(), lp.LotteryTicketRewind(1), [], Net()
    order = [pruner, rewinder, Copy()] if moment != "on_train_batch_start" else [Copy(), pruner, rewinder]
    fitter(*order, epochs=3, num_sanity_val_steps=1, gradient_clip_val=0.1).fit(model)
    assert (pruner.round, int(model.seen)) == (2, 1 + 3)  # this fit does not feel it
    other, theirs = copies
    assert other.round == (0 if moment == "on_sanity_check_end" else 1)
    if other.round:
        assert alive(other.masks) == 280
        assert same(theirs.snapshot.state_dict(), rewinder.snapshot.state_dict())
        start = Net()
        start.load_state_dict(model.state_dict())
        fitter(other, epochs=2).fit(start)  # a copy goes on by itself
        assert other.round == 2
    assert not torch_optimizer._global_optimizer_post_hooks


def test_a_copy_of_a_callback_of_channels_in_mid_fit_is_independent():
    class Copy(Callback):
        def on_train_epoch_end(self, trainer, model):
            copies.append(deepcopy(pruner))

    copies, pruner = [], lp.StructuredChannelPruning(rounds=1)
    fitter(pruner, Copy(), epochs=2).fit(Net())
    assert [c.round for c in copies] == [0, 1]
    assert copies[1].sparsity > copies[0].sparsity == 0


def test_a_callback_says_its_round_and_sparsity():
    pruner = pruning()
    assert repr(pruner) == "IterativeMagnitudePruning(round 0 of 2, sparsity 0.0000)"
    fitter(pruner, epochs=2).fit(Net())
    assert repr(pruner) == "IterativeMagnitudePruning(round 1 of 2, sparsity 0.3000)"


def test_history_of_a_finished_run_is_whole_when_it_is_resumed(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", every_n_epochs=1)
    straight = pruning(rounds=2, every_n_epochs=1)
    fitter(straight, keep, epochs=3, enable_checkpointing=True).fit(Net())
    again = pruning(rounds=2, every_n_epochs=1)
    here = ModelCheckpoint(tmp_path / "again", save_top_k=-1, filename="{epoch}", every_n_epochs=1)
    trainer = fitter(again, here, epochs=3, enable_checkpointing=True)
    trainer.fit(Net(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [row.round for row in again.history] == [0, 1, 2]
    assert again.history == straight.history


# ----------------------------------------------------------------------------- of length and optimizers


@pytest.mark.parametrize(
    ("options", "length", "said"),
    [
        ({"every_n_epochs": 5}, {"epochs": 6}, r"room for 1 of the 5 epochs of the last round"),
        ({"every_n_train_steps": 6}, {"max_steps": 9}, r"room for 3 of the 6 steps of the last round"),
        ({"every_n_epochs": 3}, {"epochs": 6}, None),
        ({"every_n_train_steps": 6}, {"max_steps": 12}, None),
    ],
)
def test_a_last_round_that_is_cut_short_is_said_as_the_fit_starts(options, length, said):
    pruner = lp.IterativeMagnitudePruning(Geometric(0.5), rounds=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter(pruner, **length).fit(Net())
    found = [str(w.message) for w in caught if "last round" in str(w.message)]
    assert len(found) == bool(said)
    assert all(re.search(said, text) for text in found)
    assert pruner.round == 1


def test_steps_that_lightning_does_not_count_are_said():
    class Raw(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            super().training_step(batch, batch_idx).backward()
            optimizer.step()

    pruner = lp.IterativeMagnitudePruning(Geometric(0.5), rounds=1, every_n_train_steps=2)
    with pytest.warns(UserWarning, match="counted in steps, and none was counted"):
        fitter(pruner, epochs=3).fit(Raw())


def test_a_fit_without_batches_is_said_to_have_none():
    pruner = lp.IterativeMagnitudePruning(Geometric(0.5), rounds=1)
    with pytest.warns(UserWarning, match="or had no batches. Raise max_epochs, max_steps"):
        fitter(pruner, epochs=3, limit_train_batches=0).fit(Net())


def test_a_rewind_into_an_optimizer_of_another_class_is_refused_by_name():
    class Replaced(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers = [torch.optim.Adam(pl_module.parameters(), lr=0.01)]

    pruner = lp.IterativeMagnitudePruning(Geometric(0.5), rounds=2, every_n_epochs=2)
    with pytest.raises(ValueError, match=r"settings: of optimizer 0 \(Adam\).*betas"):
        fitter(pruner, lp.LotteryTicketRewind(), Replaced(), epochs=6).fit(Net())


def test_a_hold_that_was_removed_holds_no_other_masks():
    model = Net()
    masks = lp.prune(model, 0.5)
    handle = lp.hold(model, sgd(model.parameters()), masks)
    handle.remove()
    with pytest.raises(ValueError, match="masks: this hold was removed"):
        handle.set(masks)


class _Later(Net):
    """A part of the network comes to the optimizer in the second epoch."""

    def configure_optimizers(self):
        return sgd([*self.stem.parameters(), *self.norm.parameters()])

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            more = [*self.body.parameters(), *self.head.parameters()]
            self.optimizers().add_param_group({"params": more, "lr": 0.01})


@pytest.mark.parametrize("remove", ["end", "each_round"])
@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.filterwarnings("ignore:.*no optimizer trains them")
def test_channels_go_where_a_part_of_the_network_is_trained_later(remove, rewinds):
    pruner = lp.StructuredChannelPruning(lp.schedules.Geometric(0.3), rounds=2, remove=remove)
    model = _Later()
    fitter(pruner, *([lp.LotteryTicketRewind()] if rewinds else []), epochs=4).fit(model)
    assert pruner.round == 2
    assert model.stem.out_features < 16


@pytest.mark.parametrize("compiled", ["torch.compile", "compile"])
@pytest.mark.filterwarnings("ignore")  # torch's own, as it compiles
def test_channels_go_from_a_compiled_module(compiled):
    plain, model = Net(dropout=0.0), Net(dropout=0.0)
    model.load_state_dict(plain.state_dict())
    given = torch.compile(model, backend="eager") if compiled == "torch.compile" else model
    if compiled == "compile":
        model.compile(backend="eager")
    for each in (plain, given):
        torch.manual_seed(0)
        pruner = lp.StructuredChannelPruning(lp.schedules.Geometric(0.3), rounds=1)
        fitter(pruner, epochs=2).fit(each)
    assert model.stem.out_features == plain.stem.out_features < 16
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
