"""LotteryTicketRewind: when to take the snapshot, when to go back to it."""

import weakref
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import final, override

from lightning_prune import rewind
from lightning_prune.callbacks import _lightning, generators, home, learning_rates
from lightning_prune.callbacks.beside import averaging_of
from lightning_prune.callbacks.checkpoints import read_shards, write_shards
from lightning_prune.callbacks.fits import check_free
from lightning_prune.callbacks.learning_rates import Rates, steps_per_epoch
from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.callbacks.one_round import OneRound
from lightning_prune.callbacks.ranks import check_arguments
from lightning_prune.callbacks.rounds import Clock, end_of_fit
from lightning_prune.callbacks.state import VERSION, check_settings, check_version, own
from lightning_prune.callbacks.strategies import check_optimizers
from lightning_prune.checks import check_callable, named, whole, yes_or_no
from lightning_prune.evidence import asked, call, check_asked
from lightning_prune.masks import Masks, pack_whole, unpack
from lightning_prune.rewind import EarlyBird, Policy, Snapshot, copied
from lightning_prune.structured.surgery import Cut, cut_snapshot


@final
class LotteryTicketRewind(Callback):
    """After each pruning, go back to the state of an early step: the lottery ticket procedure.

    The snapshot is taken at the start of the first batch with `trainer.global_step == to_step`, or of the
    epoch `to_epoch`, and holds parameters, all buffers, optimizers, learning rate schedulers and the averages
    of `WeightAveraging`. It is part of the checkpoint. After each pruning the policy says what of it is
    restored, bit for bit, and the masks are put on. The gradient scaler of mixed precision is not rewound.

    While `setup` and `configure_optimizers` of the module run, the trainer says how long a round is, and not
    the whole fit (`max_epochs`, `max_steps`, `estimated_stepping_batches`), unless the policy lets schedules
    run on. So a module that is made for plain training makes learning rate schedules of one round.

    Args:
        to_step: the optimizer step to rewind to; 0 is initialization. Less than the length of the first
            round.
        to_epoch: the epoch to rewind to, instead of a step.
        policy: what a round begins with. `lightning_prune.rewind.everything`, `weights`, `learning_rate`,
            `fine_tune`, `nothing`, or your own function of snapshots.
        shorten: whether a round that begins at step or epoch k ends as much sooner, as in the papers, and the
            fit with the last round; if not, every round has the same length, and schedules run on from k.
            None: wherever k is above 0 and can be counted as the rounds are, which leaves out `to_step` where
            they are counted in epochs.
        until: end a round, but not the last one, as soon as an early-bird ticket has emerged. Then too the
            fit ends with the last round.
        same_batches: the random number generators are part of the snapshot, so that every round sees the same
            batches in the same order and drops out the same units. Only for rounds of whole epochs, and in
            one process.

    Raises:
        ValueError: for arguments that are not allowed, or as training starts: without a pruning callback,
            with several, or with a step or epoch to rewind to beyond the first round.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635; to a later step: Frankle et al. (2020),
        arXiv:1912.05671; Renda et al. (2020), arXiv:2003.02389.
    """

    def __init__(
        self,
        to_step: int = 0,
        to_epoch: int | None = None,
        policy: Policy = rewind.everything,
        shorten: bool | None = None,
        until: EarlyBird | None = None,
        same_batches: bool = False,
    ) -> None:
        whole("to_step", to_step, 0, such_as=0)
        if to_epoch is not None:
            whole("to_epoch", to_epoch, 0, such_as=0)
        if to_step and to_epoch is not None:
            raise ValueError(
                f"to_step={to_step}, to_epoch={to_epoch}: only one of them is allowed. Leave one out."
            )
        if shorten is not None and not isinstance(shorten, bool):
            raise ValueError(f"shorten={shorten!r}: allowed are True, False and None. Give one of them.")
        if until is not None and not isinstance(until, EarlyBird):
            raise ValueError(
                f"until={until!r}: allowed are instances of lightning_prune.rewind.EarlyBird, and None. Give "
                "EarlyBird(), say."
            )
        yes_or_no("same_batches", same_batches)
        self.to_step = to_step
        self.to_epoch = to_epoch
        self.policy = policy
        self.shorten = shorten
        self.until = until
        self.same_batches = same_batches
        self.snapshot: Snapshot | None = None
        self._behind = 0  # what the pruning callback's clock read when the snapshot was taken
        self._rates: Rates = []  # learning rates after the last scheduled step
        self._held = False  # whether they hold
        self._may_hold = False
        self._drawn: list[Masks] = []  # at the last checks of this round
        self._checked = 0  # the step of the last check
        self._random: dict[str, Any] | None = None  # as the epoch of the snapshot began
        self._network: weakref.ref[nn.Module] | None = None  # that the snapshot was taken of
        self._resumed = False  # whether this fit goes on from a checkpoint
        self._shortens = bool(shorten)  # whether rounds do, under the clock of the fit
        self._before: dict[str, Any] = {}  # the attributes before a fit, until it has begun
        self._limits: _lightning.ShownLimits | None = None  # what the trainer says while schedules are made
        self._trainer: Trainer | None = None  # of the fit under way
        self._home = home.settle(self)

    @property
    def varies_rounds(self) -> bool:
        """Whether rounds have other lengths than the pruning callback's arguments say."""
        return self._shortens or self.until is not None

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._limits is not None:  # Another callback failed as that fit ended, so that we were not told.
            self._limits.leave()
            self._limits = None
        check_free(type(self).__name__, self._trainer, trainer)
        check_arguments(trainer, {name: named(value) for name, value in self._settings().items()})
        self._before, self._trainer = dict(vars(self)), trainer
        pruner = _pruner(trainer)
        check_callable("policy", self.policy, 1)
        check_asked("policy", self.policy, 1)
        if pruner.every_n_train_steps is not None:
            self._check_step(pruner.every_n_train_steps)
        elif (self.to_epoch or 0) >= pruner.every_n_epochs:
            raise ValueError(
                f"to_epoch={self.to_epoch}: allowed is 0 to {pruner.every_n_epochs - 1}, within a round. "
                "Lower it."
            )
        elif self.shorten and self.to_step:
            raise ValueError(
                f"shorten=True with to_step={self.to_step}: allowed is to_epoch, as rounds are counted in "
                "epochs. Give to_epoch, or the pruning callback every_n_train_steps."
            )
        self._shortens = self._shortens_under(pruner)
        if self._rewinds_schedules and pruner.rounds and not (pruner.is_last() and not trainer.ckpt_path):
            one = self._one_round(pruner)
            self._limits = _lightning.ShownLimits(trainer, one.early, partial(one.exact, trainer))

    def _shortens_under(self, pruner: MaskedTraining) -> bool:
        """Whether the rounds after the first begin at step k, and so are shorter by k."""
        if self.shorten is not None:
            return self.shorten
        return bool(self.to_epoch or (self.to_step and pruner.every_n_train_steps is not None))

    @property
    def _rewinds_schedules(self) -> bool:
        """Whether learning rate schedules are for a round, and not for the whole fit."""
        return self.policy not in (rewind.weights, rewind.nothing)

    def _one_round(self, pruner: MaskedTraining) -> OneRound:
        """What the trainer says how long training is while schedules are made: one round."""
        every = pruner.every_n_train_steps
        clock, length = (Clock.EPOCHS, pruner.every_n_epochs) if every is None else (Clock.STEPS, every)
        if self._shortens or self.policy is rewind.fine_tune:
            return OneRound(clock, length)
        return OneRound(clock, length, self.to_step, self.to_epoch or 0)

    def _check_step(self, length: int | float) -> None:
        """Refuse a step that no round has."""
        if self.to_step >= length:
            raise ValueError(
                f"to_step={self.to_step}: allowed is 0 to {length - 1}, within a round. Lower it."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer)
        last = self._network() if self._network is not None else None
        if (
            self.snapshot is not None
            and self._network is not None
            and not self._resumed
            and last is not pl_module
        ):
            raise ValueError(
                "LotteryTicketRewind: it has the snapshot of another network, and would rewind this one to "
                "it. Allowed is the network of the fit before. Make new callbacks for a new network."
            )
        if self.snapshot is not None:
            self._network = weakref.ref(pl_module)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:  # The network has the checkpoint's weights by now, which go with this snapshot.
            self._before = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed and self.snapshot is not None:
            # Where a strategy restores after `on_fit_start`; of shards, each process keeps its part.
            self._network = weakref.ref(pl_module)
            self.snapshot = self.snapshot.cut(pl_module, trainer.optimizers)
        pruner = _pruner(trainer)
        if pl_module.automatic_optimization:  # else nobody knows how many steps an epoch makes
            self._check_step(pruner.steps_per_round)
            if self.to_epoch and self.to_epoch * steps_per_epoch(trainer) >= pruner.steps_per_round:
                raise ValueError(
                    f"to_epoch={self.to_epoch}: it begins after the first round, of {pruner.steps_per_round} "
                    f"steps. Allowed is an epoch within it, of {steps_per_epoch(trainer)} steps. Lower it."
                )
        if not self._resumed:
            self._checked = trainer.global_step  # by the counters of this fit
        self._check_averaging(trainer, pruner)
        if self.same_batches:
            self._check_whole_epochs(trainer, pruner)
        if self.policy is rewind.fine_tune or self._held:
            learning_rates.check_held(trainer, self.policy)
        if self._held:
            learning_rates.hold(trainer, self._rates)
        self._may_hold = "final" in asked(self.policy)
        if self._rewinds_schedules and not self._resumed:
            self._warn_of_schedules(trainer, pruner)

    def _check_averaging(self, trainer: Trainer, pruner: MaskedTraining) -> None:
        """Averaging replaces the scheduler as it starts, so there is no way back from there."""
        every, regular = pruner.every_n_epochs, not (self.varies_rounds or pruner.varies_rounds)
        if pruner.every_n_train_steps is None and regular:
            for averaging in averaging_of(trainer):
                begin = [r * every for r in range(1, pruner.rounds + 1)]
                if after := [e for e in begin if averaging.swa_start <= e <= averaging.swa_end]:
                    raise _averaged(f"Set swa_epoch_start={after[-1] + 2} or later")

    def _check_whole_epochs(self, trainer: Trainer, pruner: MaskedTraining) -> None:
        """Refuse rounds in which a checkpoint within an epoch would not resume exactly."""
        steps = steps_per_epoch(trainer)
        k = self.to_step if self.to_epoch is None else 0
        length = pruner.every_n_train_steps or 0
        whole = steps < float("inf") and k % steps == 0 and length % steps == 0
        if trainer.world_size > 1 or not whole or (self.until and self.until.every_n_train_steps):
            raise ValueError(
                "same_batches=True: allowed in one process, where rewind and rounds begin with an epoch "
                f"(of {steps} steps). Give the pruning callback every_n_epochs, and to_epoch here."
            )

    def _warn_of_schedules(self, trainer: Trainer, pruner: MaskedTraining) -> None:
        """Say which schedules end elsewhere than a round does."""
        if pruner.is_last() or _lightning.is_a_trial(trainer):
            return
        per_epoch, one = steps_per_epoch(trainer), self._one_round(pruner)
        spans: dict[str, learning_rates.Span] = {}
        for interval, clock in (("step", Clock.STEPS), ("epoch", Clock.EPOCHS)):
            fit, round = end_of_fit(trainer, clock), one.end(interval, per_epoch)
            more = fit - (pruner.rounds + 1) * one.first(interval, per_epoch)
            held = self.policy is rewind.fine_tune
            varied = self.varies_rounds or pruner.varies_rounds
            goes_on = 0 < more < float("inf") and not varied and not held
            spans[interval] = learning_rates.Span(round, round + more if goes_on else round, fit)
        name = "max_epochs" if pruner.every_n_train_steps is None else "max_steps"
        length = pruner.every_n_train_steps or pruner.every_n_epochs
        learning_rates.warn_of_schedules(trainer, spans, f"{name}={(pruner.rounds + 1) * length}")

    # -------------------------------------------------------------------------------------- while it trains

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = {}
        if self.same_batches and self._random is None and self._now(trainer) == self._k:
            self._random = generators.capture(trainer)
            if trainer.current_epoch == 0:  # Lightning has drawn the order of this one epoch before
                _pruner(trainer).note_order(trainer)
                _lightning.draw_anew(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resumed, self._before = False, {}
        if self._may_hold and not self._held:
            self._rates = learning_rates.rates_of(trainer)
        if self.snapshot is None:
            self._take_if_due(trainer, pl_module)

    @property
    def _k(self) -> int:
        """The step, or the epoch, of the snapshot."""
        return self.to_step if self.to_epoch is None else self.to_epoch

    def _now(self, trainer: Trainer) -> int:
        """The step, or the epoch, in which training is."""
        return trainer.global_step if self.to_epoch is None else trainer.current_epoch

    def _take_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the snapshot at its step, and refuse a training that is past it without one."""
        if (now := self._now(trainer)) < self._k:
            return
        if now > self._k:
            what = "step" if self.to_epoch is None else "epoch"
            raise ValueError(
                f"to_{what}={self._k}: training is at {what} {now} without a snapshot. "
                "Allowed is a step still to come at which a batch begins (those of all optimizers count), or "
                "a checkpoint of a run with this callback. Use one of these."
            )
        self.snapshot, self._network = Snapshot.take(*_parts(trainer, pl_module)), weakref.ref(pl_module)
        self._behind = _pruner(trainer).clock(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.until.every_n_train_steps if self.until else None
        if every is not None and trainer.global_step // every != self._checked // every:
            self._check_ticket(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.until and self.until.every_n_train_steps is None:
            self._check_ticket(trainer, pl_module)

    def _check_ticket(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the round where the masks that it would draw have settled."""
        assert self.until is not None
        pruner = _pruner(trainer)
        # No round ends before its snapshot, and a resumed epoch's end is not looked at twice.
        if not pruner.is_last() and self.snapshot is not None and trainer.global_step != self._checked:
            self._checked = trainer.global_step
            self._drawn = [*self._drawn, pruner.drawn(trainer, pl_module)][-self.until.masks :]
            if self.until(self._drawn):
                pruner.end_round(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer is self._trainer:
            self._leave(self._before)  # A fit that fails before it has begun leaves nothing.

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer is self._trainer:
            self._leave()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        home.write_home(trainer, self, self._home)

    def come_home(self, state: dict[str, Any]) -> None:
        """Take over the state that a copy had when a fit ended, in a process of its own."""
        self.load_state_dict(state)
        self._resumed = False

    def _leave(self, before: dict[str, Any] | None = None) -> None:
        """Take away what belongs to the fit, and take up the attributes of before."""
        if self._limits is not None:
            self._limits.leave()
        vars(self).update(before or {})
        self._before, self._trainer, self._limits, self._resumed = {}, None, None, False

    def on_cut(self, trainer: Trainer, pl_module: LightningModule, what: Cut) -> None:
        """Channels were removed from the network: the snapshot loses the same ones."""
        if self.snapshot is not None:
            self.snapshot = cut_snapshot(self.snapshot, what, pl_module, trainer.optimizers)

    def on_round_start(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """Rewind; the pruning callback puts the masks on."""
        pruner = _pruner(trainer)
        if not pruner.round or not pruner.removed:  # at initialization, or where nothing was pruned
            self._drawn = []
            return
        if self.snapshot is None:
            raise ValueError(
                f"to_step={self.to_step}, to_epoch={self.to_epoch}: the first round is over without having "
                "come to it. Allowed is a step (those of all optimizers count) or epoch within that round; "
                "name one."
            )
        if any(map(_lightning.has_replaced_its_scheduler, averaging_of(trainer))):
            raise _averaged("Start it later")
        parts = _parts(trainer, pl_module)
        final = Snapshot.take(*parts) if "final" in asked(self.policy) else None
        state = call(self.policy, self.snapshot, final=final)
        if not isinstance(state, Snapshot):
            raise ValueError(
                f"policy={named(self.policy)}: it returned {state!r}; allowed are snapshots. Return the one "
                "that it was called with, or a changed copy."
            )
        state.restore(*parts)
        if state.schedulers is None:
            learning_rates.check_held(trainer, self.policy)
            self._held = True
            learning_rates.hold(trainer, self._rates)
        if self._shortens:
            pruner.shorten_round(self._behind)
        self._drawn = []
        if self.same_batches and self._random is not None:
            generators.restore(trainer, self._random)
            pruner.note_order(trainer)
            if trainer.current_epoch == 0:  # a second fit
                _lightning.draw_anew(trainer)

    # -------------------------------------------------------------------------------------------- checkpoints

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must not change."""
        return {
            "to_step": self.to_step,
            "to_epoch": self.to_epoch,
            "policy": named(self.policy),
            "shorten": self.shorten if self._k else bool(self.shorten),
            "until": named(self.until),
            "same_batches": self.same_batches,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**own(self), "_network": None, "_before": {}, "_trainer": None, "_limits": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._home = home.settle(self, state["_home"])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "settings": self._settings(),
            "snapshot": self.snapshot.state_dict() if self.snapshot else None,
            "behind": self._behind,
            "rates": copied(self._rates),
            "held": self._held,
            "drawn": [pack_whole(masks) for masks in self._drawn],
            "checked": self._checked,
            "random": self._random,
        }

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        write_shards(trainer, checkpoint, self.state_key)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._trainer is not None and self._trainer is not trainer:
            checkpoint["callbacks"].pop(self.state_key, None)  # A second trainer validates in mid-fit.
        read_shards(trainer, checkpoint, self.state_key)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(type(self).__name__, state_dict)
        check_settings(type(self).__name__, state_dict["settings"], self._settings())
        self._resumed = True
        snapshot = state_dict["snapshot"]
        self.snapshot = Snapshot(**snapshot) if snapshot else None
        self._behind = state_dict["behind"]
        self._rates = state_dict["rates"]
        self._held = state_dict["held"]
        self._drawn = [unpack(masks) for masks in state_dict["drawn"]]
        self._checked = state_dict["checked"]
        self._random = state_dict["random"]


def _pruner(trainer: Trainer) -> MaskedTraining:
    pruners = [c for c in _lightning.callbacks_of(trainer) if isinstance(c, MaskedTraining)]
    if len(pruners) != 1:
        raise ValueError(
            f"LotteryTicketRewind goes with exactly one pruning callback; here are {len(pruners)}. Add "
            "IterativeMagnitudePruning, or put several schedules into one: schedule={pattern: schedule}."
        )
    return pruners[0]


def _parts(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, ...]:
    """What a snapshot is of."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return pl_module, trainer.optimizers, schedulers, _lightning.averaged_models(trainer)


def _averaged(what: str) -> ValueError:
    return ValueError(
        "StochasticWeightAveraging replaces the learning rate scheduler as it starts, so a training cannot "
        f"be rewound from there: it must start in the last round. {what}, or use WeightAveraging."
    )
