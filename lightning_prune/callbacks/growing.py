"""DynamicSparseTraining: when connections are exchanged, and how many."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from typing_extensions import final, override

from lightning_prune import allocation, criteria
from lightning_prune.allocation import Allocation, AtLeast, EvenOutputs, may_empty
from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.beside import monitors_of_all_rounds
from lightning_prune.callbacks.checkpoints import first_in_words, first_masks
from lightning_prune.callbacks.evidence import NoEvidence, check_run, evidence_of
from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.pruning import trained
from lightning_prune.callbacks.ranks import gathered, together
from lightning_prune.callbacks.rewinding import LotteryTicketRewind
from lightning_prune.callbacks.rounds import Clock, Rounds, end_of_fit
from lightning_prune.callbacks.shortfall import cut_off
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.checks import check_alike, check_callable, named, number, whole
from lightning_prune.criteria import Criterion
from lightning_prune.evidence import Loss, asked, mean_gradients, parameters_of
from lightning_prune.granularity import NM, Granularity, single
from lightning_prune.growth import (
    FanIn,
    exchange_of,
    exchanged,
    exchanged_within,
    fits,
    in_exchange,
    regrown,
    tells_dead_apart,
    updates_before,
)
from lightning_prune.holding import ELEMENTWISE, check_fit
from lightning_prune.layers import LAYERS, Layout, check_layers, layouts, prunable
from lightning_prune.masks import Masks, alive, count, pack_whole, unpack
from lightning_prune.pruning import (
    budget,
    check_finite,
    check_replicas,
    check_shards,
    next_masks,
    score,
    sparsity_in,
)
from lightning_prune.schedules import CosineDecay, Schedule
from lightning_prune.selection import Scores, select
from lightning_prune.shards import Shards, is_sharded, like, local, placed

log = logging.getLogger(__name__)

# The updates whose sparsity and fraction are looked at before training; those of later ones as they come.
_FIRST = 10_000


def _check_fraction(name: str, value: object) -> None:
    number(name, value, "are fractions from 0 to below 1, such as 0.9", lambda v: 0 <= v < 1)


@final
class DynamicSparseTraining(MaskedTraining):
    """Train a network that is sparse from the first step, and exchange connections while it trains.

    As training begins, `criterion` and `allocate` choose the masks. At every update the `fraction` of the
    living connections with the lowest `drop` scores goes, layer by layer, and as many of the dead with the
    highest `grow` scores come; so the number alive is constant, in each layer and in all. What grows starts
    at +0.0, and what the optimizers remember of it at zero. With `grow=criteria.Random()` this is SET, with
    `criteria.gradient` RigL, with `criteria.momentum` SNFS.

    An update happens as the first batch of a step starts, so that validation and checkpoints show what was
    trained; the step trains the new masks on the same batch. Gradients for `grow` are taken on that batch,
    through `training_step`, without a trace in the training (with gradient accumulation: on the first batch
    of the step; over processes: their mean). Between updates nothing dense is kept.

    A schedule as `sparsity` is GraNet: its round k is the k-th update. Where it rises, `allocate` first
    shrinks the masks by the `drop` scores; where it falls, as many of the dead with the highest `grow` scores
    come as it says; then connections are exchanged. `Alternating(0.9)` with `fraction=0` is AC/DC. After
    `until` masks stay.

    With `granularity=NM(n, m)` every group of m keeps n alive, and with `FanIn()` every output of a layer
    equally many, within one (SRigL): the weights that go are the lowest of their layer, and each group, or
    output, grows what it lacks. `sparsity` is then a number, of N:M that of the pattern.

    Args:
        sparsity: fraction of the prunable weights that is dead, in [0, 1); or a schedule: update -> sparsity.
        allocate: how many are alive in each tensor.
        criterion: the masks it begins with: params -> scores, higher = alive; by default `criteria.Random()`.
        drop: params -> scores, higher = keep.
        grow: params -> scores, higher = grow.
        fraction: of the living, exchanged at an update: a number in [0, 1), or progress in [0, 1] ->
            fraction.
        every_n_train_steps: optimizer steps (`trainer.global_step`) between two updates.
        until: fraction of the fit's steps after which masks stay, in (0, 1].
        until_step: the step from which masks stay, instead of `until`; for fits of unknown length.
        granularity: `single`; or `NM`, or `growth.FanIn`, whose patterns the masks then keep.
        layers: layer types whose weights are prunable.
        include: fnmatch patterns over parameter names; only these. None: all.
        exclude: fnmatch patterns over parameter names; not these.
        masks: instead of `sparsity`, `allocate` and `criterion`: "zeros", a path, or a dict, as those of
            `IterativeMagnitudePruning`.
        save_sparse: file that gets the model's `state_dict` when a fit ends; see `IterativeMagnitudePruning`.
        verify: look, after each update and in each checkpoint, whether all is as it should be.

    Attributes:
        masks: {parameter name: bool tensor, True = alive}.
        round: the number of updates so far.
        sparsity: fraction of the prunable weights that is dead.
        explored: fraction of the prunable weights that has ever been alive ("in-time over-parameterization").
        history: a row for what each update began, with `dropped`, `grown`, `returned` (of the grown, those
            that had been alive before) and `explored` among its metrics; with `FanIn` also
            `ablated`, the outputs that have no living weight.

    Raises:
        ValueError: at construction, or as the fit starts and before anything is trained, naming the argument.

    Reference: Mocanu et al. (2018), arXiv:1707.04780 (SET); Evci et al. (2020), arXiv:1911.11134 (RigL);
        Dettmers & Zettlemoyer (2019), arXiv:1907.04840 (SNFS); Liu et al. (2021), arXiv:2106.10404 (GraNet);
        Lasby et al. (2024), arXiv:2305.02299 (SRigL);
        Peste et al. (2021), arXiv:2106.12379 (AC/DC); Liu et al. (2021), arXiv:2102.02887 (exploration).
    """

    _unit = "weights"
    counted = "update"
    compares = False  # An update begins nothing that would be compared anew.

    def __init__(
        self,
        sparsity: float | Schedule = 0.9,
        allocate: Allocation = allocation.erk,
        criterion: Criterion | None = None,
        drop: Criterion = criteria.magnitude,
        grow: Criterion = criteria.gradient,
        fraction: float | Callable[[float], float] | None = None,
        every_n_train_steps: int = 100,
        until: float = 0.75,
        until_step: int | None = None,
        granularity: FanIn | Granularity = single,  # in this order, or its config could not be read back
        layers: Sequence[str] = LAYERS,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        masks: str | Path | dict[str, Tensor] | None = None,
        save_sparse: str | Path | None = None,
        verify: bool = True,
    ) -> None:
        check_layers(layers)
        whole("every_n_train_steps", every_n_train_steps, 1, such_as=100)
        super().__init__(
            rounds=0,
            every_n_epochs=1,
            every_n_train_steps=every_n_train_steps,
            include=include,
            exclude=exclude,
            save_sparse=save_sparse,
            verify=verify,
            key={} if tuple(layers) == LAYERS else {"layers": list(layers)},
        )
        if not callable(sparsity):
            number("sparsity", sparsity, "are fractions from 0 to below 1, such as 0.9", lambda v: 0 <= v < 1)
        elif masks is not None:
            raise ValueError(
                f"masks=, sparsity={sparsity}: a schedule says how sparse each update is, and masks how "
                "sparse the beginning; allowed is one of them. Leave masks out, or give a number."
            )
        for name, given, default in (("allocate", allocate, allocation.erk), ("criterion", criterion, None)):
            if masks is not None and given is not default:
                raise ValueError(
                    f"masks=, {name}={named(given)}: masks say who is alive as training "
                    f"begins, so nothing reads {name}; allowed is one of them. Leave {name} out."
                )
        # Instances as defaults could not be built from type hints.
        criterion = criteria.Random() if criterion is None else criterion
        fraction = CosineDecay(0.3) if fraction is None else fraction
        if not callable(fraction):
            number("fraction", fraction, "are fractions from 0 to below 1, such as 0.3", lambda v: 0 <= v < 1)
        number("until", until, "is above 0 and at most 1, such as 0.75", lambda v: 0 < v <= 1)
        if until_step is not None:
            whole("until_step", until_step, 1, such_as=1000)
            if until != 0.75:
                raise ValueError(f"until={until}, until_step={until_step}: allowed is one. Leave one out.")
        for name, function in (("sparsity", sparsity), ("fraction", fraction)):
            if callable(function):
                check_callable(name, function, 1)
        _check_takes_progress(fraction)
        if callable(sparsity) and asked(sparsity):
            raise ValueError(
                f"sparsity: {sparsity} reads the scores; allowed are numbers, and schedules of the update "
                "alone, such as schedules.Cubic(0.9). Give one of these."
            )
        check_callable("allocate", allocate, 2)
        for name, function in (("criterion", criterion), ("drop", drop), ("grow", grow)):
            check_callable(name, function, 1)
        _check_granularity(granularity, sparsity, allocate, masks is not None)
        self.target = sparsity
        self.granularity = granularity
        self.allocate = allocate
        self.criterion = criterion
        self.drop = drop
        self.grow = grow
        self.fraction = fraction
        self.until = until
        self.until_step = until_step
        self.layers = layers
        self._start_from = masks
        self._last: int | None = None  # the step from which masks stay, fixed by the first fit
        self._ever: Masks = {}  # who has ever been alive
        self._lived: tuple[Masks, int] | None = None  # these masks, and how many that are
        self._exchange: dict[str, float] = {}  # what the last update did, in numbers of connections
        self._batch: Any = None  # that the step trains on
        self._layouts: dict[str, Layout] = {}
        self._waits: tuple[int, int] | None = None  # the update that had no evidence, and at which step
        self._tried = False  # whether the last fit was a fast_dev_run, whose length is that of no training

    @property
    @override
    def _units(self) -> Masks:
        return self.masks

    @property
    def explored(self) -> float:
        """Fraction of the prunable weights that has ever been alive, 0 before the first fit."""
        total = sum(mask.numel() for mask in self._ever.values())
        return self._lived_of(self._ever) / total if total else 0.0

    def _lived_of(self, ever: Masks) -> int:
        """How many of these have ever been alive, counted once, as `_alive_of` does."""
        if self._lived is None or self._lived[0] is not ever:
            self._lived = ever, alive(ever)
        return self._lived[1]

    def sparsity_of(self, update: int) -> float:
        """The sparsity that the weights have after an update; 0: as training begins."""
        return sparsity_in(self.target, update, "sparsity") if callable(self.target) else self.target

    @override
    def best(self, round: int | None = None, sparsity: float | None = None) -> Path:
        """Refused: there are no rounds, which would be trained and compared on their own.

        Raises:
            ValueError: naming what there is.
        """
        raise ValueError(
            f"best(round={round}, sparsity={sparsity}): DynamicSparseTraining has updates of one training, "
            "and no rounds; allowed is with callbacks that prune. Use best_model_path of the ModelCheckpoint."
        )

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer)
        super().setup(trainer, pl_module, stage)

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        allowed = prunable(pl_module, self.layers, self.include, self.exclude)
        params = trained(trainer, allowed, self.include)
        if self.masks:  # of a fit before, or of a checkpoint
            params = {name: p for name, p in allowed.items() if name in self.masks}
        elif left := [name for name in allowed if name not in params]:
            log.info(
                f"{type(self).__name__}: {', '.join(left)}: no optimizer trains them, so they stay dense. "
                "Name them in include= to prune them."
            )
        others = _lightning.callbacks_of(trainer)
        if wrong := [
            c for c in others if isinstance(c, (MaskedTraining, LotteryTicketRewind)) and c is not self
        ]:
            raise ValueError(
                f"DynamicSparseTraining goes alone; {type(wrong[0]).__name__} is here, too. To train a mask "
                "that was found again, fit a second time with masks=<its checkpoint>."
            )
        checked = ("criterion", "drop", "grow") if self._changes else ("criterion",)
        for argument in checked:
            check_run(pl_module, getattr(self, argument), argument)
            _check_initial(getattr(self, argument), argument)
        if any(map(is_sharded, params.values())):
            self._check_shards(params, checked)
        for argument in checked[1:]:
            if "momentum" in asked(getattr(self, argument)):
                _check_momentum(trainer, argument)
        if self._changes and "momentum" in asked(self.grow) and self._reads_gradients(trainer, pl_module):
            other = "criteria.gradient" if pl_module.automatic_optimization else "criteria.Random()"
            raise ValueError(
                "grow: it reads the momentum of dead weights, and here their gradients are masked, since "
                "something reads gradients before or across the step (clipping, an optimizer that mixes "
                "weights, manual optimization). Allowed are criteria without momentum, such as "
                f"{other}. Use one."
            )
        self._plan_updates(trainer)
        if self._start_from is None and (callable(self.target) or not self.masks):
            self._check_room(params)  # else a resumed fit has its masks, whatever is asked for now
        self._layouts = layouts(pl_module, params)
        if not self.masks:
            first = first_masks(self._start_from, params)  # without any, they are chosen with the first batch
            check_fit(first, params)
            self.masks = first
            size = sum(mask.numel() for mask in first.values())
            if self.target == 0 if self._start_from is None else alive(first) == size:
                warn(
                    "DynamicSparseTraining: no weight is dead as training begins, so updates have nothing to "
                    "exchange. Give sparsity= above 0, or masks= of a network that is sparse."
                )
        if self._start_from is not None or self.round or self.resumption:
            self._check_pattern()
        self._say_without_effect(trainer)
        self._ever = {n: like(mask.to(params[n].device), params[n]) for n, mask in self._ever.items()}
        self._lived_of(self._ever)  # now, by all processes
        return params

    def _check_shards(self, params: Mapping[str, nn.Parameter], arguments: Sequence[str]) -> None:
        """Refuse what cannot be done on weights that are sharded over processes."""
        if self.granularity is not single:
            raise ValueError(
                f"granularity={self.granularity}: its rows share the weights of a layer, which are sharded "
                "over processes, each of which has a part. Allowed are single weights. Leave granularity "
                "out, or train with DDP."
            )
        Shards(params)  # the same weights on all processes, or some would wait for the others
        check_shards(params, [], {name: getattr(self, name) for name in arguments}, single, {})

    def _say_without_effect(self, trainer: Trainer) -> None:
        """Say what has no effect: another sparsity than that of masks=, dead layers, a time that is over."""
        if self._start_from is not None and not self.round and not self.resumption:
            size = sum(mask.numel() for mask in self.masks.values())
            default = signature(type(self)).parameters["sparsity"].default
            left = alive(self.masks)
            if self.target != default and budget(self.sparsity_of(0), size) != left:
                warn(
                    f"masks=, sparsity={self.target}: the masks are at {1 - left / size:.4f}, and stay "
                    "as sparse as they are. Leave sparsity out, or masks."
                )
            if dead := [name for name, mask in self.masks.items() if mask.numel() and not count(mask)]:
                warn(
                    f"masks: all weights of {', '.join(dead)} are dead, and as many are alive in each layer "
                    "after an update as before, so none will grow there. Give masks with living weights in "
                    "each layer, or exclude= these."
                )
        if 0 < self.rounds <= self.round and self._changes and not self.resumption:
            warn(
                f"DynamicSparseTraining: all {self.rounds} updates were done in the fits before, so masks "
                "stay as they are in this one. To go on exchanging, give a new callback their masks=."
            )

    @property
    def _changes(self) -> bool:
        """Whether an update changes masks."""
        return self._exchanges or callable(self.target)

    @property
    def _exchanges(self) -> bool:
        """Whether updates exchange connections; without a schedule as sparsity masks stay otherwise."""
        return callable(self.fraction) or self.fraction > 0

    def _check_room(self, params: Mapping[str, nn.Parameter]) -> None:
        """Refuse a sparsity that leaves a layer without a weight."""
        if may_empty(self.allocate):
            return
        size, layers = sum(p.numel() for p in params.values()), [n for n, p in params.items() if p.numel()]
        for update in range(min(self.rounds, _FIRST) + 1 if callable(self.target) else 1):
            if (left := budget(self.sparsity_of(update), size)) < len(layers):
                raise ValueError(
                    f"sparsity={self.target}: it leaves {left} of {size} weights alive in {len(layers)} "
                    "layers; allowed is what leaves one in each. Lower it, exclude layers, or allow it with "
                    "allocate=AtLeast(0, of=...)."
                )

    def _check_pattern(self) -> None:
        """Refuse masks that are none of the granularity."""
        if wrong := [n for n, mask in self.masks.items() if not self._fits(n, mask)]:
            given = "ckpt_path, masks" if self.resumption else "masks"
            raise ValueError(
                f"{given}: those of {', '.join(wrong)} are none of granularity={self.granularity}; its "
                "updates need masks of its pattern. Give such masks, or the granularity that they have."
            )

    def _fits(self, name: str, mask: Tensor) -> bool:
        """Whether a mask has the pattern of the granularity."""
        pattern = self.granularity
        return not isinstance(pattern, (NM, FanIn)) or fits(pattern, mask, self._layouts[name])

    def _plan_updates(self, trainer: Trainer) -> None:
        """Fix the step from which masks stay, and with it the number of updates; refuse what leaves none."""
        trial = _lightning.is_a_trial(trainer)
        if self._last is None or self._tried:
            if self.until_step is not None:
                self._last = self.until_step
            else:
                steps = trainer.estimated_stepping_batches
                if not steps:
                    raise ValueError(
                        "max_steps, max_epochs: the fit has no step, so there is nothing to train; allowed "
                        "is one or more. Raise max_steps, max_epochs or limit_train_batches."
                    )
                if not 0 < steps < float("inf"):
                    raise ValueError(
                        f"until={self.until}: the fit has no known length; allowed is one with max_steps, "
                        "or with max_epochs and a loader of known length. Give until_step instead."
                    )
                self._last = int(self.until * steps)
        self._tried = trial
        assert self.every_n_train_steps is not None
        self.rounds = updates_before(self._last, self.every_n_train_steps)
        if not self.rounds and self._changes and not trial:
            allowed = f"1 to {self._last - 1}" if self._last > 1 else "none in a time as short"
            raise ValueError(
                f"every_n_train_steps={self.every_n_train_steps}: masks stay from step {self._last} on, so "
                f"there is no update. Allowed are {allowed}. Lower it, let masks change for longer, or set "
                "fraction=0."
            )
        for update in range(min(self.rounds, _FIRST) + 1):
            _check_fraction(f"sparsity({update})", self.sparsity_of(update))
            self._fraction_of(update)
        if callable(self.target) and not trial:
            self._check_end(self.target)

    def _check_end(self, schedule: Schedule) -> None:
        """Refuse a schedule whose last update makes the network dense; warn where it would go on."""
        assert self.every_n_train_steps is not None
        ends = next((k for k in reversed(range(self.rounds + 1)) if self.sparsity_of(k) > 0), self.rounds)
        if ends < self.rounds:
            raise ValueError(
                f"sparsity={schedule}: its update {self.rounds}, the last one, makes the network dense, and "
                "it would end so; allowed is what ends sparse. Give "
                f"until_step={(ends + 1) * self.every_n_train_steps} instead of until, after whose last "
                "update it is sparse, or another every_n_train_steps."
            )
        if said := cut_off(schedule, self.rounds, "sparsity", "update"):
            warn(said)

    def _progress(self, update: int) -> float:
        """How much of the time until masks stay is over at an update, in [0, 1]."""
        assert self._last is not None
        assert self.every_n_train_steps is not None
        return min(1.0, update * self.every_n_train_steps / max(1, self._last))

    def _fraction_of(self, update: int) -> float:
        """The fraction of the living that is exchanged at an update."""
        if not callable(self.fraction):
            return self.fraction
        given: Any = self.fraction(progress := self._progress(update))
        given = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
        _check_fraction(f"fraction({progress:.3f})", given)
        return float(given)

    # ---------------------------------------------------------------------------------------- between updates

    @override
    def _begins_pruned(self) -> bool:
        return self._start_from is None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch(trainer)  # An update waits for the batch of its step.

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if not self._running.tried:
                self._running.tried = True
                self._check_alike(trainer, range(min(self.rounds, _FIRST) + 1))
                self._try_scores(trainer, pl_module)
        finally:
            self._batch = None
        if not self._ever:  # it began with masks
            self._ever = {name: mask.clone() for name, mask in self.masks.items()}
            self._lived_of(self._ever)  # now, by all processes

    def _check_alike(self, trainer: Trainer, updates: Iterable[int]) -> None:
        """Refuse functions that give other numbers on each process, of which none decides for all."""
        if not self._running.sharded:
            return
        of_ranks = gathered(trainer, lambda: [(self.sparsity_of(u), self._fraction_of(u)) for u in updates])
        for update, numbers in zip(updates, zip(*of_ranks, strict=True), strict=True):
            where = f"in update {update}"
            check_alike([{f"sparsity {where}": f"{s}", f"fraction {where}": f"{f}"} for s, f in numbers])

    def _try_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step: score once as an update will, so that what is wrong is found now."""
        if not self._changes or (self.is_last() and not _lightning.is_a_trial(trainer)):
            return
        params = {name: p.detach() for name, p in self._running.params.items()}
        for argument in ("drop", "grow"):
            run = partial(self._scores, trainer, pl_module, argument, params, self.round + 1, trial=True)
            with suppress(NoEvidence):  # this batch has none; others may
                scores = together(trainer, run)
                if argument == "grow" and self._exchanges:
                    together(trainer, partial(self._check_apart, scores, params))

    def _check_apart(self, scores: dict[str, Tensor], params: Mapping[str, Tensor]) -> None:
        """Refuse what would grow weights in the order in which they lie.

        Raises:
            ValueError: then. What gradients say of the dead differs from batch to batch, and is left out.
        """
        if {"grads", "loss", "momentum"} & asked(self.grow).keys():
            return
        shards = Shards(params) if self._running.sharded else None
        if tells_dead_apart(scores, {name: local(mask) for name, mask in self.masks.items()}, shards):
            return
        raise ValueError(
            f"grow={named(self.grow)}: it gives all dead weights of a layer the same score, so that they "
            "would grow in the order in which they lie; allowed are criteria that tell them apart, such "
            "as criteria.gradient and criteria.Random(). Use one."
        )

    @override
    def _begin_round_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        update, step = self.round + 1, trainer.global_step
        if self._waits == (update, step) or (self._last is not None and step >= self._last):
            return  # within a step that began without evidence; or an update that waited until masks stay
        try:
            super()._begin_round_if_due(trainer, pl_module)
        except NoEvidence as error:  # still due at the next step: the clock of the updates has not moved
            if self._waits is None or self._waits[0] != update:
                warn(f"update {update} of {self.rounds} waits for the next step: {error}")
            self._waits = update, step

    @override
    def _next(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        assert self._seed is not None
        self._check_alike(trainer, [round])
        params = {name: p.detach() for name, p in self._running.params.items()}
        total = budget(self.sparsity_of(round), sum(p.numel() for p in params.values()))
        if not round:
            allocate, pattern = self.allocate, single
            if isinstance(self.granularity, NM):
                allocate, pattern = allocation.uniform, self.granularity
            elif isinstance(self.granularity, FanIn):
                allocate = EvenOutputs(self.allocate)
            with evidence_of(trainer, pl_module, self.criterion, 1, self._seed) as evidence:
                given = params, self.masks, [(list(params), self.sparsity_of(0))], self.criterion
                return next_masks(*given, allocate, pattern, layouts=self._layouts, **evidence)
        there = self._alive_of(self.masks) if callable(self.target) else total
        fraction = self._fraction_of(round)
        if not fraction and total == there:
            return self.masks
        # Of shards the parts that this process has; numbers are those of whole tensors.
        shards = Shards(params) if self._running.sharded else None
        masks = before = {name: local(mask) for name, mask in self.masks.items()}
        drop = self._scores(trainer, pl_module, "drop", params, round)
        if total < there:
            allocate = self.allocate if isinstance(self.allocate, AtLeast) else AtLeast(1, of=self.allocate)
            masks = select(drop, masks, total, allocate, shards, params=params, masks=masks)
        if total > there or fraction:
            grow = self._scores(trainer, pl_module, "grow", params, round)
            if total > there:
                masks = regrown(masks, total, grow, self.allocate, shards, params=params, masks=masks)
            masks = self._exchanged(masks, before, fraction, drop, grow, shards)
        return {name: placed(mask, params[name]) for name, mask in masks.items()}

    def _exchanged(
        self, masks: Masks, before: Masks, fraction: float, drop: Scores, grow: Scores, shards: Shards | None
    ) -> Masks:
        """The masks with a fraction of the living exchanged, within the granularity."""
        if not fraction:
            return masks
        if not isinstance(pattern := self.granularity, (NM, FanIn)):
            number = in_exchange(masks, fraction, before, shards)
            return exchanged(masks, number, drop, grow, before, shards)
        rows = {name: pattern.rows(mask, self._layouts[name])[0] for name, mask in masks.items()}
        return exchanged_within(pattern, masks, in_exchange(rows, fraction), drop, grow, self._layouts)

    def _anew(self, criterion: Criterion, round: int) -> Criterion:
        """Random numbers are others at every update; those of a seed, the same in every run."""
        return (
            replace(criterion, seed=criterion.seed + round)
            if isinstance(criterion, criteria.Random)
            else criterion
        )

    def _scores(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        argument: str,
        params: dict[str, Tensor],
        round: int,
        *,
        trial: bool = False,
    ) -> dict[str, Tensor]:
        """The scores by which connections go, or come, of the batch that the step trains on.

        Of shards those of the parts that this process has.

        Raises:
            NoEvidence: on all processes, when the loss of this batch is None, or a gradient is not finite, on
                one of them.
        """
        assert self._seed is not None
        criterion = self._anew(getattr(self, argument), round)
        wanted = asked(criterion)
        for name, p in params.items():
            check_finite(name, local(p))
        with evidence_of(trainer, pl_module, criterion, 1, self._seed + round, [self._batch]) as evidence:
            if "momentum" in wanted:
                evidence["momentum"] = (
                    {name: torch.zeros_like(p) for name, p in params.items()}  # before the first step
                    if trial
                    else momentum_of(trainer, self._running.params, argument)
                )
            if "grads" in wanted:
                run = (evidence.pop(name) for name in ("model", "loss", "batches"))
                with self._running.gradients_of_all():
                    evidence["grads"] = _of_all_batches(trainer, argument, params, *run)
            make = partial(_scored, criterion, params, {"masks": self.masks, **evidence}, argument)
            scores = together(trainer, make, NoEvidence)
        if self._running.sharded:
            check_replicas(scores, params, Shards(params), argument)
        return scores

    @override
    def _put_on(self, trainer: Trainer, pl_module: LightningModule, units: Masks) -> None:
        self._running.forget()  # What the optimizers remember of the dead is gone before some of them grow.
        self.masks = units

    @override
    def _prune(self, trainer: Trainer, pl_module: LightningModule, units: Masks, then: Rounds) -> None:
        before, ever = self.masks, self._ever
        super()._prune(trainer, pl_module, units, then)
        if self.round:  # else these are the first masks
            self._exchange = exchange_of(before, self.masks, ever)

    @override
    def _of_round(self) -> dict[str, float]:
        found = {**self._exchange, "explored": self.explored}
        if isinstance(pattern := self.granularity, FanIn):
            rows = [pattern.rows(mask, self._layouts[name])[0] for name, mask in self.masks.items()]
            found["ablated"] = sum(len(of) - count(of.any(1)) for of in rows)
        return found

    @override
    def _say_if_rounds_mix(self, trainer: Trainer) -> None:
        """Say which `ModelCheckpoint` compares networks of several sparsities."""
        if not callable(self.target) or _lightning.is_a_trial(trainer):
            return
        least, last = (
            min(map(self.sparsity_of, range(min(self.rounds, _FIRST) + 1))),
            self.sparsity_of(self.rounds),
        )
        for monitor in monitors_of_all_rounds(trainer) if least < last else ():
            log.info(
                f"ModelCheckpoint(monitor={monitor!r}) compares over all updates, so what it keeps as the "
                f"best may be of sparsity {least:.4g} instead of {last:.4g}, that of the last update. With "
                "save_last=True the network that the fit ends with is kept, too."
            )

    @override
    def _say_if_short(self, trainer: Trainer) -> None:
        """Say at the start of a fit what its updates will be, and whether it has no room for them all."""
        super()._say_if_short(trainer)
        if _lightning.is_a_trial(trainer) or self.round >= self.rounds:
            return
        log.info(
            f"{self.rounds - self.round} updates are to come, every {self.every_n_train_steps} steps, before "
            f"step {self._last}"
        )

    @override
    def _tell_history(self, trainer: Trainer) -> None:
        """As a fit ends: what its updates came to."""
        if not self._running.begun or _lightning.is_a_trial(trainer):
            return
        grown = sum(row.metrics.get("grown", 0.0) for row in self.history)
        log.info(
            f"after {self.round} of {self.rounds} updates: {alive(self.masks)} weights left "
            f"({100 * (1 - self.sparsity):.2f} %), {grown:.0f} grown in all, {100 * self.explored:.2f} % "
            "were alive at some time"
        )

    @override
    def _begun(self, trainer: Trainer) -> None:
        """An update begins nothing that would be compared anew, and there are many of them."""
        self._ever = {name: mask | self._ever.get(name, mask) for name, mask in self.masks.items()}
        log.debug(
            f"update {self.round} of {self.rounds}: {self.removed} fewer alive, {self.explored:.4f} explored"
        )

    @override
    def _without_room(self, trainer: Trainer) -> str | None:
        end = end_of_fit(trainer, Clock.STEPS)
        left, room = self.rounds - self.round, self._at.to_come(end)
        if left <= room:
            return None
        return (
            f"the fit has room for {room} of the {left} updates that are left (it ends with step {end:.0f}, "
            f"and masks stay from step {self._last} on). Train longer, or give an earlier until_step; a "
            "later fit goes on from there."
        )

    @override
    def _ended_early(self, trained: bool, moved: bool) -> str | None:
        if self.is_last() or not trained or not moved:
            return super()._ended_early(trained, moved)
        return (
            f"the fit ended after {self.round} of {self.rounds} updates. Train longer, or let EarlyStopping "
            "wait longer; a later fit goes on from here."
        )

    @override
    def _missed(self, before: Masks) -> list[str]:
        if wrong := [name for name, mask in self.masks.items() if not self._fits(name, mask)]:
            return [
                f"{', '.join(wrong)}: the masks must be of granularity={self.granularity}, and are not. "
                "Change no masks in on_prune."
            ]
        if isinstance(self.granularity, NM):
            return []
        total = sum(mask.numel() for mask in self.masks.values())
        asked_for = budget(self.sparsity_of(self.round), total)
        if self.round and not callable(self.target):
            asked_for = alive(before)  # as many as the first masks have, whatever a resumed fit was given
        if (left := alive(self.masks)) == asked_for:
            return []
        return [
            f"{left} of {total} weights are alive, {asked_for} were asked for. Change no masks in on_prune."
        ]

    @override
    def _settings(self) -> dict[str, Any]:
        return {"every_n_train_steps": self.every_n_train_steps, "until_step": self.until_step}

    @override
    def _given(self) -> dict[str, str]:
        return {**super()._given(), "masks": first_in_words(self._start_from)}

    @override
    def _argument(self, name: str) -> object:
        return self.target if name == "sparsity" else super()._argument(name)

    @override
    def _begun_with(self) -> dict[str, str]:
        first = {"masks": named(self._start_from), "criterion": named(self.criterion)}
        if not callable(self.target):  # else every update reads them
            first |= {"sparsity": str(self.target), "allocate": named(self.allocate)}
        return first if self.until_step is not None else {**first, "until": named(self.until)}

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "last": self._last,
            "ever": pack_whole(self._ever),
            "exchange": self._exchange,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last = state_dict["last"]
        self._ever = unpack(state_dict["ever"])
        self._exchange = dict(state_dict.get("exchange", {}))


def _check_granularity(
    granularity: Any, sparsity: Any, allocate: Allocation, begins_with_masks: bool
) -> None:
    """Refuse a granularity in which no connections are exchanged, and what does not go with it.

    Raises:
        ValueError: then.
    """
    if granularity is single:
        return
    if not isinstance(granularity, (NM, FanIn)):
        raise ValueError(
            f"granularity={named(granularity)}: allowed here are single, NM and growth.FanIn, within which "
            "connections are exchanged. Give one of them, such as growth.FanIn()."
        )
    if callable(sparsity):
        raise ValueError(
            f"sparsity={named(sparsity)}, granularity={named(granularity)}: its masks stay as sparse as they "
            "are, and allowed is a number. Give one, such as 0.9."
        )
    if not isinstance(granularity, NM):
        return
    of_pattern = 1 - granularity.n / granularity.m
    if abs(sparsity - of_pattern) > 1e-9 and not begins_with_masks:
        raise ValueError(
            f"sparsity={sparsity}, granularity={named(granularity)}: this pattern is as sparse as it is, and "
            f"allowed is {of_pattern:g}. Give that, or another pattern."
        )
    if allocate is not allocation.erk:
        raise ValueError(
            f"allocate={named(allocate)}, granularity={named(granularity)}: the pattern says how many are "
            "alive where, and no allocation is allowed beside it. Leave it out, or give growth.FanIn()."
        )


def _check_initial(criterion: Criterion, argument: str) -> None:
    """Refuse a criterion that compares with the weights at initialization: what grows begins at 0."""
    if asked(criterion).get("initial"):
        raise ValueError(
            f"{argument}: {named(criterion)} compares with the weights at initialization, and what grows "
            "begins at 0 while it trains; allowed are criteria of the weights as they are, of gradients, of "
            "the momentum, and Random. Use one, such as criteria.magnitude."
        )


def _check_momentum(trainer: Trainer, argument: str) -> None:
    """Refuse an optimizer of torch that keeps no momentum as it is set."""
    for optimizer in trainer.optimizers:
        settings = optimizer.param_groups
        kept = any(group.get("momentum") or "betas" in group for group in settings)
        if type(optimizer) in ELEMENTWISE and not kept:
            _refuse_momentum(argument, type(optimizer).__name__)


def _refuse_momentum(argument: str, who: str) -> NoReturn:
    raise ValueError(
        f"{argument}: it reads the momentum, of which the optimizer keeps none ({who}). Allowed are SGD with "
        f"momentum and the Adam family. Use one of them, or {argument}=criteria.gradient."
    )


def _check_takes_progress(fraction: Any) -> None:
    """Refuse a function that needs more than progress, and a schedule, which would take it for a round.

    Raises:
        ValueError: then.
    """
    parameters = list(parameters_of(fraction).values()) if callable(fraction) else []
    more = [
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not more and [p.name for p in parameters[:1]] != ["round"]:
        return
    wants = f"it needs {', '.join(more)}, too" if more else "it takes a round"
    raise ValueError(
        f"fraction={named(fraction)}: {wants}, and it is called with progress alone, from 0 to 1; allowed "
        "are numbers, and functions of progress, such as schedules.CosineDecay(0.3). Give one of these."
    )


def _of_all_batches(
    trainer: Trainer,
    argument: str,
    params: dict[str, Tensor],
    model: nn.Module,
    loss: Loss,
    batches: list[Any],
) -> dict[str, Tensor]:
    """The mean over all processes of the gradient of the loss, each with its own batches.

    Raises:
        NoEvidence: on all of them, when one has no loss, or the mean is not finite.
    """
    grads = together(trainer, lambda: mean_gradients(params, model, loss, batches), NoEvidence)
    if trainer.world_size > 1 and not any(map(is_sharded, params.values())):  # of shards they are the mean
        for g in grads.values():
            distributed.all_reduce(g)
            g /= trainer.world_size

    def finite() -> dict[str, Tensor]:
        if wrong := [name for name, g in grads.items() if not bool(local(g).isfinite().all())]:
            raise NoEvidence(
                f"{argument}: the gradient of {', '.join(wrong)} holds NaN or infinity on this batch; "
                "allowed are finite numbers. Look whether the loss is finite."
            )
        return grads

    return together(trainer, finite, NoEvidence)


def _scored(
    criterion: Criterion, params: dict[str, Tensor], evidence: dict[str, Any], argument: str
) -> dict[str, Tensor]:
    """The scores of a criterion, all of them finite; what is wrong with them names the argument.

    Of shards those of the parts that this process has.
    """
    try:
        scores = score(criterion, params, evidence, argument)
        scores = {name: local(like(values, params[name])) for name, values in scores.items()}
        for name, values in scores.items():
            check_finite(name, values, torch.ones_like(values, dtype=torch.bool))
    except NoEvidence:
        raise
    except ValueError as error:
        if not str(error).startswith(argument):
            error.args = (f"{argument}: {error}",)
        raise
    return scores


def momentum_of(
    trainer: Trainer, params: dict[str, nn.Parameter], argument: str = "grow"
) -> dict[str, Tensor]:
    """The momentum that the optimizers keep for these weights: SGD's buffer, or Adam's first moment.

    Raises:
        ValueError: when an optimizer keeps none.
    """
    found: dict[str, Tensor] = {}
    for name, p in params.items():
        for optimizer in trainer.optimizers:
            state = optimizer.state.get(p, {})
            for key in ("momentum_buffer", "exp_avg"):
                if isinstance(state.get(key), Tensor):
                    found[name] = state[key]
    if missing := [name for name in params if name not in found]:
        _refuse_momentum(argument, ", ".join(missing))
    return found
