"""MaskedTraining: what every callback has in common that trains a network under masks."""

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from lightning_prune import doctor
from lightning_prune.callbacks import _lightning, home, resumption
from lightning_prune.callbacks.beside import (
    averaging_of,
    best_of_round,
    compare_anew,
    monitor_of_rounds,
    monitors_of_all_rounds,
    show,
)
from lightning_prune.callbacks.checkpoints import make_plain, read_shards, write_shards
from lightning_prune.callbacks.fits import Fit, check_free, reads_gradients
from lightning_prune.callbacks.history import RoundRecord, best_checkpoint, tell, with_round
from lightning_prune.callbacks.learning_rates import steps_per_epoch
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.networks import taken_up
from lightning_prune.callbacks.patience import RoundPatience, exhausted
from lightning_prune.callbacks.ranks import check_arguments, check_ranks, decided, decided_masks, together
from lightning_prune.callbacks.resumption import Resumption
from lightning_prune.callbacks.rounds import Clock, Rounds
from lightning_prune.callbacks.shortfall import ended_early, without_room
from lightning_prune.callbacks.state import (
    VERSION,
    check_begun,
    check_settings,
    check_version,
    own,
    say_changed,
)
from lightning_prune.checks import check_path, named, whole, yes_or_no
from lightning_prune.deploy import storage
from lightning_prune.masks import Masks, alive, bits, pack_whole, unpack, zero_dead_
from lightning_prune.shards import is_sharded, like, settle

log = logging.getLogger(__name__)

# Arguments that decide no mask as training goes on: a checkpoint of other layers is none of this callback.
_BESIDE = ("layers", "include", "exclude", "example_input", "masks", "save_sparse", "verify")


class MaskedTraining(Callback, ABC):
    """Train in rounds under masks that change from round to round, and keep dead weights exactly zero.

    A round ends with the epoch or the step that it has the length of, and is over as the next one starts; so
    what validation, checkpoints and `fit` leave behind is the trained network of a round with its masks.
    Masks are kept here and in the checkpoint, never in the model.

    A subclass says what is held (`_prepare`), which units the next round has (`_next`) and how they become
    masks (`_put_on`). This class says when.

    Attributes:
        masks: {parameter name: bool tensor, True = alive}; empty before the first fit.
        removed: how many units the last pruning took.
        history: one `RoundRecord` for each round that is over, in order.
        resumption: what a checkpoint still has to give back to this fit; None once training has begun.
    """

    _unit: ClassVar[str]  # what sparsity counts, in the plural
    counted: ClassVar[str] = "round"  # what `round` is the number of, in what is said
    compares: ClassVar[bool] = True  # whether a round is compared within itself, and shown as a fit ends

    def __init__(
        self,
        *,
        rounds: int,
        every_n_epochs: int,
        every_n_train_steps: int | None,
        include: list[str] | None,
        exclude: list[str] | None,
        save_sparse: str | Path | None,
        verify: bool,
        key: Mapping[str, Any],
        end_round_on_early_stop: bool = False,
    ) -> None:
        yes_or_no("end_round_on_early_stop", end_round_on_early_stop)
        yes_or_no("verify", verify)
        whole("rounds", rounds, 0)
        whole("every_n_epochs", every_n_epochs, 1)
        if every_n_train_steps is not None:
            whole("every_n_train_steps", every_n_train_steps, 1)
        if save_sparse is not None:
            check_path("save_sparse", save_sparse)
        self.rounds = rounds
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.include = include
        self.exclude = exclude
        self.save_sparse = save_sparse
        if save_sparse is not None:
            storage.libraries()  # Import now, so that a missing package fails before training.
        self.verify = verify
        self.end_round_on_early_stop = end_round_on_early_stop

        self.masks: Masks = {}
        self.removed = 0
        self.history: list[RoundRecord] = []
        self.resumption: Resumption | None = None
        length = every_n_epochs if every_n_train_steps is None else every_n_train_steps
        clock = Clock.EPOCHS if every_n_train_steps is None else Clock.STEPS
        self._at = Rounds(clock, length, ends=length)
        # Lightning asks for it at every hook of every step.
        self._key = self._generate_state_key(include=include, exclude=exclude, **key)
        self._seed: int | None = None  # of what criteria draw
        self._network: weakref.ref[nn.Module] | None = None  # that the last fit trained
        self._home = home.settle(self)
        self._fit: Fit | None = None
        self._interrupted: dict[str, Any] | None = None  # of a fit that an exception ended
        self._counted: tuple[Masks, int] | None = None  # masks, and how many units they leave alive

    # ----------------------------------------------------------------------------------------- what is public

    @property
    def round(self) -> int:
        """The round in progress."""
        return self._at.number

    @property
    def round_ends(self) -> int:
        """What `clock` says when the round in progress is over."""
        return self._at.ends

    @property
    def sparsity(self) -> float:
        """Fraction of what may be pruned that is dead, 0 before the first fit."""
        units = self._units
        total = sum(mask.numel() for mask in units.values())
        return (total - self._alive_of(units)) / total if total else 0.0

    def _alive_of(self, units: Masks) -> int:
        """How many of these units are alive, counted once.

        Of shards all processes must count together, and one of them may ask alone later.
        """
        if self._counted is None or self._counted[0] is not units:
            self._counted = units, alive(units)
        return self._counted[1]

    @property
    def varies_rounds(self) -> bool:
        """Whether rounds may have other lengths than the arguments say."""
        return self.end_round_on_early_stop

    def best(self, round: int | None = None, sparsity: float | None = None) -> Path:
        """The file of the best checkpoint of a round, by a `ModelCheckpoint` whose file name has `{round`.

        Args:
            round: which one; None: the last.
            sparsity: instead, the first round at least as sparse, in [0, 1].

        Raises:
            ValueError: when both are given, when there is no such round, and when it kept no file.
        """
        return best_checkpoint(self.history, round, sparsity)

    @property
    def steps_per_round(self) -> int | float:
        """Optimizer steps of a round, for learning rate schedules made in `configure_optimizers`.

        Rounds counted in epochs: of one optimizer that steps once for each batch or, with gradient
        accumulation, for several; infinite for epochs of unknown length. Rounds counted in steps: of all
        optimizers together, as `trainer.global_step`.
        """
        if self.every_n_train_steps is not None:
            return self.every_n_train_steps
        if self._fit is None:
            raise RuntimeError(
                "steps_per_round is known during a fit, from `configure_optimizers` on, and there is none. "
                "Ask there, or give every_n_train_steps."
            )
        self._fit.trainer.fit_loop.setup_data()
        return steps_per_epoch(self._fit.trainer) * self.every_n_epochs

    @property
    @override
    def state_key(self) -> str:
        return self._key

    def start_from(self, masks: Masks, round: int = 0) -> None:
        """Let the next fit begin in this round with these masks.

        Raises:
            RuntimeError: during a fit.
        """
        if self._fit is not None:
            raise RuntimeError("start_from: a fit is under way; allowed is before a fit. Call it there.")
        self.masks, self._at = dict(masks), replace(self._at, number=round)
        self._network = None

    def clock(self, trainer: Trainer) -> int:
        """What rounds are counted in: epochs, or the steps of all optimizers."""
        return self._at.clock.read(trainer)

    def is_over(self, trainer: Trainer) -> bool:
        """Whether the round in progress has come to its end."""
        return self._at.is_over(self.clock(trainer))

    def is_last(self) -> bool:
        """Whether no pruning comes after the round in progress."""
        return self.round >= self.rounds

    def end_round(self, trainer: Trainer) -> None:
        """Let the round in progress end with the step, or the epoch, that was trained last."""
        self._at = self._at.ending(self.clock(trainer) + (self._at.clock is Clock.EPOCHS))

    def shorten_round(self, by: int) -> None:
        """Let the round in progress end so many epochs, or steps, earlier."""
        self._at = self._at.shorter(by)

    def stop(self, trainer: Trainer, reason: str) -> None:
        """End the fit with this round, before its next batch."""
        log.info("round %d is the last: %s", self.round, reason)
        if self._fit is not None:
            self._fit.explained = True
        trainer.should_stop = True
        raise StopIteration  # Lightning's own way out of an epoch before its next batch

    def drawn(self, trainer: Trainer, pl_module: LightningModule) -> Masks:
        """The units that the next pruning would leave alive if it were now. Training is not disturbed."""
        return self._decided(trainer, pl_module, self.round + 1)

    # ------------------------------------------------------------------------------- what a subclass says

    @property
    @abstractmethod
    def _units(self) -> Masks:
        """What sparsity counts: True = alive."""

    @abstractmethod
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """As a fit starts: check what was asked for, set the masks, return the weights to hold by name."""

    @abstractmethod
    def _next(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        """The units of a round, drawn from the state of training, which is not changed."""

    @abstractmethod
    def _put_on(self, trainer: Trainer, pl_module: LightningModule, units: Masks) -> None:
        """Make these units those of the network, and `masks` the masks of its weights."""

    def _begins_pruned(self) -> bool:
        """Whether a pruning may be due before the first step of round 0."""
        return False

    def _try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training: run once what a pruning will run, so that what is wrong with it is found now."""

    def _before_pruning(self, trainer: Trainer) -> str | None:
        """Why the fit ends with this round instead of another pruning, or None."""
        return None

    def _too_few(self, units: Masks) -> str | None:
        """Why these units make no round, so that the fit ends with the one before; or None."""
        return None

    def _missed(self, before: Masks) -> list[str]:
        """What the masks are not that was asked for."""
        return []

    def _of_round(self) -> dict[str, float]:
        """What the history says of the round in progress beside what was logged."""
        return {}

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must not change: plain values, kept in the checkpoint."""
        return {"every_n_epochs": self.every_n_epochs, "every_n_train_steps": self.every_n_train_steps}

    def _given(self) -> dict[str, str]:
        """The arguments in words, to be compared between processes; files may have another name on each."""
        given = {name: named(self._argument(name)) for name in signature(type(self)).parameters}
        return {**given, "save_sparse": "None" if self.save_sparse is None else "a path"}

    def _argument(self, name: str) -> object:
        """What an argument was given as."""
        return getattr(self, name, None)

    def _begun_with(self) -> dict[str, str]:
        """What only the beginning of a fit reads, in words: it has no effect on a resumed run."""
        return {}

    def _goes_by(self) -> dict[str, str]:
        """What is read again and again, in words: on a resumed run it holds from there on."""
        others = {*self._settings(), *self._begun_with(), *_BESIDE}
        return {n: named(self._argument(n)) for n in signature(type(self)).parameters if n not in others}

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _lightning.prepare_for_weights(trainer, pl_module)
        if stage != "fit":
            return
        check_free(type(self).__name__, self._fit and self._fit.trainer, trainer)
        if any(isinstance(other, ModelPruning) for other in _lightning.callbacks_of(trainer)):
            raise ValueError(
                f"{type(self).__name__}: Lightning's ModelPruning is here, too, which puts other "
                "parameters in the place of the weights; allowed is one of the two. Leave ModelPruning out."
            )
        check_arguments(trainer, self._given())
        if self._fit is not None:  # Another callback failed as that fit ended, so that ours was not told.
            self._fit.leave()
        self._interrupted = None
        self._fit = Fit(trainer, vars(self))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = self._running
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62)
        settle(pl_module)
        self._check_network(pl_module)
        if self.save_sparse is not None:
            check_path("save_sparse", self._sparse_path(trainer, self.save_sparse))
        fit.params = together(trainer, lambda: self._prepare(trainer, pl_module))
        if self.verify:
            check_ranks(trainer, {name: m for name, m in self.masks.items() if not is_sharded(m)})
            advice = "Masks and weights of this checkpoint are not of one training; resume from another."
            found = doctor.awake(fit.params, self.masks, advice) if self.resumption else []
            together(trainer, lambda: doctor.report(found))
        self.masks = {name: like(self.masks[name].to(p.device), p) for name, p in fit.params.items()}
        self._alive_of(self._units)  # now, by all processes
        fit.hold(pl_module, self.masks, self._reads_gradients(trainer, pl_module))
        self._network = weakref.ref(pl_module)

    @property
    def _running(self) -> Fit:
        """The fit under way."""
        assert self._fit is not None
        return self._fit

    def _check_network(self, pl_module: LightningModule) -> None:
        """Refuse a network that cannot be the one whose rounds these are, or say that it is taken for it."""
        last = self._network() if self._network is not None else None
        if self._network is None or self.resumption or last is pl_module or not (self.round or self.sparsity):
            return
        place = f"{type(self).__name__}: it is in {self.counted} {self.round} at sparsity {self.sparsity:.4f}"
        warn(taken_up(pl_module, self.masks, place))

    def _reads_gradients(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether a dead weight's gradient may reach a living one."""
        return reads_gradients(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit and self._fit.trainer is trainer and self.resumption:
            self._fit.before = {}  # The network has the checkpoint's weights by now, which go with its masks.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running.late:
            self.on_fit_start(trainer, pl_module)
            self._running.late = False
        self._running.begun, self._running.since = True, trainer.global_step
        others = _lightning.callbacks_of(trainer)
        self._running.varies = any(getattr(other, "varies_rounds", False) for other in others)
        self._wait(trainer)
        self._say_if_idle(trainer)
        self._say_if_changed()
        self._say_if_rounds_mix(trainer)
        if self.resumption is None:  # Lightning restores its counters just before this hook.
            self._at = self._at.on(self.clock(trainer), trainer.global_step)
        elif next(c for c in _lightning.callbacks_of(trainer) if isinstance(c, MaskedTraining)) is self:
            self._running.epoch = self.resumption.on_train_start(trainer, pl_module)
        if self.resumption and self._has_had_its_length(trainer) and not _lightning.is_within_epoch(trainer):
            trainer.should_stop = True  # The fit had ended; no other epoch begins.
        self.resumption = None
        self._say_if_short(trainer)

    def _wait(self, trainer: Trainer) -> None:
        """Let `EarlyStopping` end this round instead of the fit, if it is to and another one follows."""
        fit = self._running
        if fit.patience is not None:
            fit.patience.give_back()
        fit.patience = RoundPatience(trainer) if self.end_round_on_early_stop and not self.is_last() else None

    def _say_if_idle(self, trainer: Trainer) -> None:
        """Say that no round can end early, where it was asked for."""
        if self.end_round_on_early_stop and not trainer.early_stopping_callbacks:
            warn(
                "end_round_on_early_stop=True ends no round: there is no EarlyStopping. Add one, or leave it "
                "out."
            )

    def _say_if_changed(self) -> None:
        """Say which arguments a resumed fit goes on with that are not those of the checkpoint."""
        if self.resumption is None:
            return
        last = f"{self.counted} {self.round} was the last" if self.is_last() else None
        say_changed(type(self).__name__, self.resumption.arguments, self._goes_by(), last)

    def _say_if_rounds_mix(self, trainer: Trainer) -> None:
        """Say which `ModelCheckpoint` compares networks of several sparsities."""
        if self.compares and self.rounds and not _lightning.is_a_trial(trainer):
            for monitor in monitors_of_all_rounds(trainer):
                log.info(
                    f"ModelCheckpoint(monitor={monitor!r}) compares over all rounds, so what it keeps as the "
                    "best may be of a round that is less sparse than the last. To keep the best of each "
                    "round, name it by the round: filename='{round:.0f}'."
                )

    def _patience_is_due(self) -> None:
        """Let patience be asked with the next batch, as there is a new metric."""
        if self._fit is not None and self._fit.patience is not None:
            self._fit.patience.due = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._patience_is_due()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._patience_is_due()

    def _say_if_short(self, trainer: Trainer) -> None:
        """Say at the start of a fit that it has no room for all prunings, where that can be known."""
        if _lightning.is_a_trial(trainer) or self._running.varies:
            return
        if said := self._without_room(trainer):
            self._running.explained = True
            warn(said)

    def _without_room(self, trainer: Trainer) -> str | None:
        """What to say of a fit that ends before all prunings have come."""
        return without_room(trainer, self._at, self.rounds)

    def _say_if_fewer(self, trainer: Trainer) -> None:
        """Say at the end of a fit that there were fewer prunings than asked for, unless it was said."""
        fit = self._running
        if fit.explained or _lightning.is_a_trial(trainer):
            return
        fit.explained = True
        if said := self._ended_early(fit.begun, trainer.global_step > fit.since):
            warn(said)

    def _ended_early(self, trained: bool, moved: bool) -> str | None:
        """What to say of a fit that has ended before all prunings have come."""
        return ended_early(self._at, self.rounds, self.sparsity, trained, moved)

    # ----------------------------------------------------------------------------------------- between rounds

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch(trainer)
        self._end_if_exhausted(trainer)
        self._begin_round_if_due(trainer, pl_module)

    def _begin_epoch(self, trainer: Trainer) -> None:
        """Note how the epoch's batches are drawn again; from here on training may change the network."""
        fit = self._running
        fit.before = {}
        if fit.noted != trainer.current_epoch:
            fit.epoch = resumption.beginning(trainer)
        fit.announce = True

    def note_order(self, trainer: Trainer) -> None:
        """As an epoch starts: its order is about to be drawn with the random numbers as they are now."""
        self._running.epoch = {**resumption.beginning(trainer), "drawn": False}
        self._running.noted = trainer.current_epoch

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        fit = self._running
        fit.before = {}
        if fit.has_new_optimizers():
            fit.watch(gradients=self._reads_gradients(trainer, pl_module))
        if not self._at.opened:
            self._at = replace(self._at, opened=True)
            self._open(trainer, pl_module)
        # Here too: rounds in steps begin within an epoch, and a checkpoint of an epoch's last batch resumes
        # here.
        if self._at.clock is Clock.STEPS:
            self._end_if_exhausted(trainer)
        self._begin_round_if_due(trainer, pl_module)
        if fit.announce or (trainer.global_step + 1) % _lightning.log_interval(trainer) == 0:
            self._show(trainer)

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch of round 0 begins."""
        if self._begins_pruned():
            units = self._decided(trainer, pl_module, 0)
            if alive(units) != alive(self._units):
                self._prune(trainer, pl_module, units, replace(self._at, number=0, step=trainer.global_step))
        elif not self.is_last() and not _lightning.is_a_trial(trainer):
            self._try(trainer, pl_module)

    def _show(self, trainer: Trainer) -> None:
        """Log round and sparsity where they are seen; with loggers, each layer's density once a round."""
        fit = self._running
        if trainer.barebones:
            return
        values = {"round_step": float(trainer.global_step - self._at.step)}
        if fit.announce and trainer.loggers:
            values |= {f"density/{name}": alive({name: m}) / m.numel() for name, m in self.masks.items()}
        fit.announce = False
        show(trainer, {"round": float(self.round), "sparsity": self.sparsity}, values)

    def _end_if_exhausted(self, trainer: Trainer) -> None:
        """Let the round end now if the patience of an `EarlyStopping` is over that ends rounds."""
        patience = self._running.patience
        if patience is not None and patience.due and patience.is_exhausted(trainer):
            self._running.cut = not self.is_over(trainer)
            self._at = self._at.ending(self.clock(trainer))

    def _is_cut(self, trainer: Trainer) -> bool:
        """As a fit ends: whether an `EarlyStopping` ended it within a round."""
        return not self.is_over(trainer) and exhausted(trainer)

    def _has_had_its_length(self, trainer: Trainer) -> bool:
        """Rounds of several lengths: whether the last one has come to its own."""
        return self._running.varies and self.is_last() and self.is_over(trainer)

    def _begin_round_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune and begin the next round, or end the fit, where the round has come to its end."""
        if self.is_last():
            if self._has_had_its_length(trainer):
                self.stop(trainer, "it has come to its end, so the fit ends.")
            return
        if not self.is_over(trainer):
            return
        if any(trainer.current_epoch > averaging.swa_end for averaging in averaging_of(trainer)):
            return  # an epoch that trains nothing: the statistics of the averaged network
        settle(pl_module)
        if reason := decided(trainer, lambda: self._before_pruning(trainer)):
            self.stop(trainer, reason)
        units = self._decided(trainer, pl_module, self.round + 1)
        if reason := self._too_few(units):
            self.stop(trainer, reason)
        at, history = self._at, self.history
        self._record(trainer)
        try:
            self._prune(trainer, pl_module, units, self._at.next(self.clock(trainer), trainer.global_step))
        except BaseException:
            if self._at is at:
                self.history = history
            raise

    def _decided(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        """The units of a round, on which all processes agree."""
        self._running.apply()
        if self._running.sharded:
            return together(trainer, lambda: self._next(trainer, pl_module, round))
        units = decided_masks(trainer, lambda: self._next(trainer, pl_module, round))
        there = self._units
        return {name: mask.to(there[name].device) for name, mask in units.items()}

    def _prune(self, trainer: Trainer, pl_module: LightningModule, units: Masks, then: Rounds) -> None:
        """Begin a round: put its masks on, tell the other callbacks, and only then change the weights."""
        fit, before = self._running, (self.masks, self._units, self._at, self.removed)
        candidates = alive(self._units)
        self._put_on(trainer, pl_module, units)
        self.removed, self._at = candidates - alive(units), then
        told: list[Callback] = []
        try:
            together(trainer, lambda: self._tell("on_prune", trainer, pl_module, []))
            together(trainer, lambda: self._tell("on_round_start", trainer, pl_module, told))
        except BaseException:
            if told:  # A rewind may have changed the weights already, so the round has begun.
                fit.set(self.masks)
            else:
                self._take_back(*before)
            raise
        fit.set(self.masks)
        for p in settle(pl_module).values():
            p.grad = None  # of another network
        fit.announce, fit.looked, fit.since = True, False, trainer.global_step
        if self.verify:
            together(trainer, partial(self._verify, trainer, pl_module, before[0]))
            if not fit.sharded:
                check_ranks(trainer, self.masks)
        self._begun(trainer)

    def _begun(self, trainer: Trainer) -> None:
        """A round has begun with its masks on: what is compared from here on, and what is said."""
        compare_anew(trainer)
        self._running.cut = False
        self._wait(trainer)
        left = alive(self._units)
        log.info(
            f"round {self.round} of {self.rounds}: pruned {self.removed}, "
            f"{left} {self._unit} left ({100 * (1 - self.sparsity):.2f} %)"
        )

    def _tell(self, hook: str, trainer: Trainer, pl_module: LightningModule, told: list[Callback]) -> None:
        """Call a hook of ours on every callback that has it; note those on which it went well."""
        for other in _lightning.callbacks_of(trainer):
            if tell := getattr(other, hook, None):
                tell(trainer, pl_module, self.masks)
                told.append(other)

    def _take_back(self, masks: Masks, units: Masks, at: Rounds, removed: int) -> None:
        """Undo a pruning whose masks are not on the weights yet."""
        self.masks, self._at, self.removed = masks, at, removed

    def _verify(self, trainer: Trainer, pl_module: LightningModule, before: Masks) -> None:
        """Look whether weights, masks and optimizers are as a pruning has to leave them."""
        params = self._running.params
        found = doctor.awake(params, self.masks, "Something wrote to them after the masks were put on.")
        found += doctor.replaced(params, pl_module, trainer.optimizers, self._running.trained)
        doctor.report([*found, *self._missed(before)])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit = self._running
        if fit.looked or not self.verify:
            return
        # Optimizers that a module steps itself need not count in `global_step`.
        if trainer.global_step <= fit.since and pl_module.automatic_optimization:
            return
        fit.looked = trainer.global_step > fit.since or bool(batch_idx)
        advice = (
            "An optimizer's step revived them, which calls no hook of torch's, or something wrote to them "
            "after the step. Let the trainer have the optimizer, or call `super().__init__` in its class."
        )
        together(trainer, lambda: doctor.report(doctor.awake(fit.params, self.masks, advice)))

    def _record(self, trainer: Trainer) -> None:
        """Add the round that is over to the history; one that goes on in another fit replaces its row."""
        steps = trainer.global_step - self._at.step
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if v.numel() == 1}
        metrics = {**logged, **self._of_round()}
        kept = best_of_round(trainer) if self.compares else (None, "")
        cut = self._running.cut
        self.history = with_round(self.history, self.round, self._units, steps, metrics, kept, cut)

    # -------------------------------------------------------------------- wherever weights leave the training

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit and self._fit.trainer is trainer:
            self._fit.apply()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._fit:
            self._fit.apply()
        if self.verify:
            together(trainer, lambda: doctor.report(self._doubts(trainer, checkpoint)))
        if self._fit and self._fit.patience:
            self._fit.patience.write(checkpoint)
        if not self.resumption and "callbacks" in checkpoint:
            resumption.complete(trainer, checkpoint["callbacks"][self.state_key]["resumption"], checkpoint)
        write_shards(trainer, checkpoint, self.state_key)
        make_plain(checkpoint, pl_module)

    def _doubts(self, trainer: Trainer, checkpoint: dict[str, Any]) -> list[str]:
        """List disagreements between the checkpoint's weights, masks and logged values."""
        stored = checkpoint["state_dict"]
        # Not what the module leaves out of its checkpoints, nor what has been cut since.
        masks = {n: m for n, m in self.masks.items() if n in stored and stored[n].shape == m.shape}
        found = doctor.awake(stored, masks, "The checkpoint was not written.")
        others = (c for c in _lightning.callbacks_of(trainer) if isinstance(c, MaskedTraining))
        if [*others] == [self] and self._fit and not self._fit.announce and not trainer.barebones:
            shown = {"round": float(self.round), "sparsity": self.sparsity}
            found += doctor.disagreeing(trainer.callback_metrics, shown)
        return found

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = self._running
        fit.cut = self._is_cut(trainer)
        self._at = self._at_now()
        self._record(trainer)
        fit.apply()
        self._say_if_fewer(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fewer(trainer)
        if self.resumption and not self._running.begun:  # a finished run, of which no batch was left
            steps = trainer.global_step - self._at.step
            row = self.resumption.metrics, best_of_round(trainer), self._is_cut(trainer)
            self.history = with_round(self.history, self.round, self._units, steps, *row)
        self._tell_history(trainer)
        self._leave()
        parameters = settle(pl_module)
        for name, mask in self.masks.items():  # whatever other callbacks did when training ended
            p = parameters[name]
            zero_dead_(p, bits(mask, like=p))
        writes = trainer.is_global_zero or any(map(is_sharded, self.masks.values()))
        if self.save_sparse is not None and not _lightning.is_a_trial(trainer):
            path = self._sparse_path(trainer, self.save_sparse)
            make = partial(path.parent.mkdir, parents=True, exist_ok=True)
            together(trainer, lambda: make() if trainer.is_global_zero else None)
            write = partial(storage.save_sparse, pl_module.state_dict(), path)
            together(trainer, lambda: write() if writes else None)
        home.write_home(trainer, self, self._home)

    def _tell_history(self, trainer: Trainer) -> None:
        """As a fit ends: what its rounds came to. The last checkpoint may have been written just now."""
        if not self._running.begun or _lightning.is_a_trial(trainer):
            return
        if not self.compares:
            return
        best, path = best_of_round(trainer)
        self.history = [*self.history[:-1], replace(self.history[-1], best=best, checkpoint=path)]
        if self.round:
            monitor, schedules = monitor_of_rounds(trainer), bool(trainer.lr_scheduler_configs)
            tell(self.history, self._unit, monitor, schedules)

    def _sparse_path(self, trainer: Trainer, given: str | Path) -> Path:
        """Where the sparse file goes: beside the checkpoints, unless the path is absolute."""
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return Path(folder, given)

    def come_home(self, state: dict[str, Any]) -> None:
        """Take over the state that a copy had when a fit ended, in a process of its own."""
        self.load_state_dict(state)
        self.resumption = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        fit = self._fit
        if fit is None or fit.trainer is not trainer:
            return
        self._at = self._at_now()
        fit.apply()
        if isinstance(exception, KeyboardInterrupt):
            log.info(
                "interrupted in %s %d of %d. Fit again with ckpt_path=<the last checkpoint> to go on from "
                "there, or without it to go on from the weights as they are.",
                self.counted,
                self.round,
                self.rounds,
            )
        left = resumption.interrupted(trainer, fit.begun, fit.epoch)
        self._leave()
        vars(self).update(fit.before)
        self._interrupted = left  # Who writes a checkpoint of the exception is told of it after us.

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fit is None:
            self.resumption = None  # A validation of a checkpoint is no resumption.
        elif self._fit.trainer is trainer and stage == "fit":
            self._leave()

    def _leave(self) -> None:
        """Take away everything of ours that acts on module, optimizers, strategy or trainer."""
        fit, self._fit, self.resumption = self._fit, None, None
        if fit is not None:
            fit.leave()

    def _at_now(self) -> Rounds:
        """The rounds, in line with what the clock says now, to be taken up by another fit."""
        fit = self._fit
        if fit is None or not fit.begun:
            return self._at
        return self._at.at(self.clock(fit.trainer), fit.trainer.global_step)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit: hooks and trainers cannot be pickled, and a copy has none."""
        left = {"_fit": None, "_network": None, "_interrupted": None}
        return {**own(self), "_at": self._at_now(), **left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._home = home.settle(self, state["_home"])

    def __repr__(self) -> str:
        at = f"{self.counted} {self.round} of {self.rounds}"
        return f"{type(self).__name__}({at}, sparsity {self.sparsity:.4f})"

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "settings": self._settings(),
            "begun_with": self._begun_with(),
            "goes_by": self._goes_by(),
            "rounds": self._at_now().state_dict(),
            "seed": self._seed,
            "masks": pack_whole(self.masks),
            "removed": self.removed,
            "history": [asdict(record) for record in self.history],
            "resumption": self._to_resume(),
        }

    def _to_resume(self) -> dict[str, Any]:
        """What a checkpoint keeps of the place in the training, beside what Lightning keeps."""
        if self.resumption is not None:
            return self.resumption.state
        if self._interrupted is not None:
            return dict(self._interrupted)  # a checkpoint completes it
        fit = self._fit
        return resumption.capture(*((fit.trainer, fit.epoch) if fit and fit.begun else (None, None)))

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._fit is not None and self._fit.trainer is not trainer:
            checkpoint["callbacks"].pop(self.state_key, None)  # A second trainer validates in mid-fit.
            return
        read_shards(trainer, checkpoint, self.state_key)
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and self.history and trainer.state.fn != TrainerFn.FITTING:
            # Masks go with the weights that are looked at; what the rounds of the fit came to stays known.
            history = [asdict(record) for record in self.history]
            checkpoint["callbacks"][self.state_key] = {**state, "history": history}
        there = [key for key in checkpoint["callbacks"] if key.startswith(type(self).__qualname__)]
        if there and self.state_key not in there:
            raise ValueError(
                f"ckpt_path: the checkpoint holds the masks of {', '.join(there)}, and this callback is "
                f"{self.state_key}; the same is needed. Give layers, include and exclude as they were."
            )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(type(self).__name__, state_dict)
        check_settings(type(self).__name__, state_dict["settings"], self._settings())
        there = {**state_dict.get("goes_by", {}), **state_dict.get("begun_with", {})}
        check_begun(type(self).__name__, there, self._begun_with())
        self._at = Rounds.of(state_dict["rounds"])
        self._seed = state_dict["seed"]
        self.masks = unpack(state_dict["masks"])
        self.removed = state_dict["removed"]
        self.history = [RoundRecord(**record) for record in state_dict["history"]]
        self.resumption = Resumption(state_dict["resumption"], there)
        if self._fit is not None:  # Some strategies restore after `on_fit_start`: what it made is old.
            self._fit.late = bool(self._fit.params)
