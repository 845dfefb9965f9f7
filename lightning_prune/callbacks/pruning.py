"""IterativeMagnitudePruning: when to prune weights, and how far."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import final, override

from lightning_prune import allocation, criteria, doctor
from lightning_prune.allocation import Allocation, may_empty
from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.checkpoints import first_in_words, first_masks
from lightning_prune.callbacks.evidence import check_run, evidence_of
from lightning_prune.callbacks.following import following, look_like_copies
from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.ranks import together
from lightning_prune.callbacks.shortfall import cut_off, without_effect
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.checks import by_name, check_callable, named, number, whole
from lightning_prune.copies import copied
from lightning_prune.criteria import Criterion
from lightning_prune.evidence import asked, runs_model
from lightning_prune.granularity import Granularity, single
from lightning_prune.holding import check_fit
from lightning_prune.layers import LAYERS, check_layers, layouts, prunable
from lightning_prune.masks import Masks, alive
from lightning_prune.pruning import (
    Sparsity,
    budget,
    by_argument,
    check_schedule,
    check_shards,
    next_masks,
    scheduled,
    sparsities_of,
)
from lightning_prune.schedules import Geometric, Schedule
from lightning_prune.shards import Shards, is_sharded, like

log = logging.getLogger(__name__)


@final
class IterativeMagnitudePruning(MaskedTraining):
    """Prune between rounds of training and keep dead weights exactly zero during them.

    A fit is a sequence of rounds. Round 0 trains the dense network; each of the `rounds`
    prunings opens another, and the last round ends trained. A schedule that is above 0 in round 0 prunes at
    initialization, as the first batch starts; one with many short rounds is gradual pruning. A pruning
    happens as the next round starts, so validation, checkpoints and the model that `fit` leaves behind show
    the trained network of a round with the masks of that round. Masks are kept here and in the checkpoint,
    never in the model: its `state_dict` has the names and shapes of the unpruned model and exact zeros. A
    second `fit` goes on from the masks and the clock of the first.

    Patience and best score of `EarlyStopping` are those of the round. So is what a `ModelCheckpoint` compares
    whose file name has `{round...}`, such as "{round:.0f}-{sparsity:.3f}": it keeps the best of each round.

    Weights that no optimizer trains when the first fit starts, being frozen or a copy, are pruned only where
    `include` names them.

    Logged as `round`, `sparsity` and, with the loggers, `round_step`, the optimizer steps since the round
    began, and `density/<name>` of each tensor as a round or an epoch begins. As each round begins
    `on_prune(trainer, pl_module, masks)` is called on every callback that has it, and after all of these
    `on_round_start`, in which weights may change: `LotteryTicketRewind` rewinds there.

    Args:
        schedule: round (and scores) -> sparsity in [0, 1), by default `Geometric(0.2)`; or a dict {pattern
            over parameter names: schedule}, in which the first pattern that matches wins and each pattern's
            weights have an exact budget of their own.
        rounds: number of prunings, 0 or more.
        every_n_epochs: length of a round in epochs.
        criterion: which weights: params -> scores, higher = keep.
        allocate: how many survive in each tensor.
        granularity: what lives and dies together: single weights, blocks, kernels, filters.
        layers: layer types whose weights are prunable.
        include: fnmatch patterns over parameter names; only these. None: all.
        exclude: fnmatch patterns over parameter names; not these.
        follow: {pattern: pattern}, each with one `*`: parameters that copy others, such as those of an
            average, a teacher or a target network, {"target.*": "net.*"}. They take the masks of their
            originals.
        masks: the masks of round 0. None: dense. "zeros": weights that are 0 are dead. A path: the masks in a
            checkpoint of such a run, or a file of {name: bool tensor}. Or such a dict.
        every_n_train_steps: length of a round in optimizer steps (`trainer.global_step`); replaces the epoch
            clock.
        max_sparsity: end the fit after the round whose next pruning would exceed this.
        stop_below: {metric: threshold}: end the fit after a round at whose end a logged metric is below its
            threshold.
        score_batches: number of training batches, from each rank, that a criterion that reads data gets.
        verify: look, after each pruning and in each checkpoint, whether the dead are zero, no layer is empty
            without consent, the optimizers hold the parameters, all processes the same masks, and sparsity
            and log are as asked for; a RuntimeError says what is not, and what to do.
        save_sparse: file that gets the model's `state_dict` when a fit ends, as `lightning_prune.save_sparse`
            writes it; in the folder of the checkpoints, or where an absolute path says. None: no file.
        end_round_on_early_stop: a round but the last ends where the patience of an `EarlyStopping` would end
            the fit; the last one ends after the length of a round, or by its patience.

    Attributes:
        masks: {parameter name: bool tensor, True = alive}; empty before the first fit.
        round: the round in progress.
        removed: how many weights (or units, with a granularity) the last pruning took.
        history: one row for each round that is over: round, sparsity, alive, total, steps, metrics, and which
            checkpoint is its best. A fit that ends shows them as a table.
        sparsity: fraction of the prunable weights that is dead.

    Raises:
        ValueError: at construction, or as the fit starts and before anything is trained, naming the argument.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635; Han et al. (2015), arXiv:1506.02626.
    """

    _unit = "weights"

    def __init__(
        self,
        schedule: Schedule | dict[str, Schedule] | None = None,
        rounds: int = 10,
        every_n_epochs: int = 1,
        criterion: Criterion = criteria.magnitude,
        allocate: Allocation = allocation.global_rank,
        granularity: Granularity = single,
        layers: Sequence[str] = LAYERS,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        masks: str | Path | dict[str, Tensor] | None = None,
        every_n_train_steps: int | None = None,
        max_sparsity: float = 1.0,
        stop_below: dict[str, float] | None = None,
        score_batches: int = 1,
        save_sparse: str | Path | None = None,
        verify: bool = True,
        follow: dict[str, str] | None = None,
        end_round_on_early_stop: bool = False,
    ) -> None:
        check_layers(layers)
        super().__init__(
            rounds=rounds,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            include=include,
            exclude=exclude,
            save_sparse=save_sparse,
            verify=verify,
            end_round_on_early_stop=end_round_on_early_stop,
            key={} if tuple(layers) == LAYERS else {"layers": list(layers)},
        )
        whole("score_batches", score_batches, 1)
        allowed = "is above 0 and at most 1, such as 0.95"
        number("max_sparsity", max_sparsity, allowed, lambda v: 0 < v <= 1)
        by_name("stop_below", stop_below, "{'val_acc': 0.9}")
        by_name("follow", follow, "{'target.*': 'net.*'}")
        by_name("schedule", schedule if isinstance(schedule, Mapping) else None, "{'*': Geometric(0.2)}")
        for metric, lowest in (stop_below or {}).items():
            number(f"stop_below[{metric!r}]", lowest, "are numbers, such as 0.9", lambda v: v == v)
        self.schedule = dict(schedule) if isinstance(schedule, Mapping) else schedule or Geometric(0.2)
        for argument, one in by_argument(self.schedule).items():
            check_schedule(one, rounds, argument)
            if said := cut_off(one, rounds, argument):
                warn(said)
        for name, function, takes in (
            ("criterion", criterion, 1),
            ("allocate", allocate, 2),
            ("granularity", granularity, 1),
        ):
            check_callable(name, function, takes)
        self.criterion = criterion
        self.allocate = allocate
        self.granularity = granularity
        self.layers = layers
        self.max_sparsity = max_sparsity
        self.stop_below = dict(stop_below or {})
        self.score_batches = score_batches
        self.follow = dict(follow or {})
        self._start_from = masks
        self._initial: dict[
            str, Tensor
        ] = {}  # the weights at the first batch, if the criterion asks for them
        self._metrics: dict[str, float] = {}  # those of stop_below when a checkpoint was written

    @property
    @override
    def _units(self) -> Masks:
        return self.masks

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of `model` that the arguments allow to prune, by name."""
        return prunable(model, self.layers, self.include, self.exclude)

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer)
        super().setup(trainer, pl_module, stage)

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        prunable = self.prunable(pl_module)
        if self.masks:  # Of a fit before, or of a checkpoint. Which weights are pruned stays as it was then.
            first = self.masks
            params = {name: p for name, p in prunable.items() if name in first}
        else:
            by_optimizers = trained(trainer, prunable, self.include)
            first = first_masks(self._start_from, by_optimizers)
            params = {name: p for name, p in prunable.items() if name in first or name in by_optimizers}
        check_fit(first, params)
        scheduled(list(params), self.schedule, self.rounds)
        check_run(pl_module, self.criterion)
        if any(map(is_sharded, params.values())):
            Shards(params)  # the same weights on all processes, or some would wait for the others
            sparsities, laid_out = (
                self._sparsities(list(params), self.rounds),
                layouts(pl_module, list(params)),
            )
            check_shards(params, sparsities, {"criterion": self.criterion}, self.granularity, laid_out)
        self._check_others(trainer, pl_module, params)
        names = [name for name, _ in pl_module.named_parameters()]
        self._running.followed = following(self.follow, list(params), names)
        if not self.masks:
            self._say_if_without_effect(list(params), first)
            self._say_untrained(trainer, pl_module, list(prunable), params)
        self._dry_run(pl_module, params, first)
        self.masks = first
        return params

    def _check_others(
        self, trainer: Trainer, pl_module: LightningModule, params: dict[str, nn.Parameter]
    ) -> None:
        """Refuse another callback that prunes some of the same weights.

        Raises:
            ValueError: naming them.
        """
        for other in _lightning.callbacks_of(trainer):
            if not isinstance(other, IterativeMagnitudePruning) or other is self:
                continue
            if shared := sorted(set(params) & set(other.prunable(pl_module))):
                raise ValueError(
                    f"two pruning callbacks hold the same weights: {', '.join(shared)}. Divide them with "
                    "include=, exclude= or layers=, or use one callback with a schedule per pattern; each "
                    "weight goes to one."
                )

    def _say_if_without_effect(self, names: list[str], first: Masks) -> None:
        """Say that prunings would take nothing, as the masks to start from are sparser."""
        total = sum(mask.numel() for mask in first.values())
        if self._start_from is None or not total:
            return
        rounds = (self._sparsities(names, round) for round in range(1, self.rounds + 1))
        levels = [max((s for _, s in each if not callable(s)), default=0.0) for each in rounds]
        if said := without_effect(1 - alive(first) / total, levels):
            warn(said)

    def _say_untrained(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prunable: list[str],
        pruned: dict[str, nn.Parameter],
    ) -> None:
        """Say which weights stay dense as no optimizer trains them, and which are pruned all the same."""
        held = trained_by(trainer)
        if held and (idle := [name for name, p in pruned.items() if id(p) not in held]):
            warn(
                f"include: {', '.join(idle)} are pruned, and no optimizer trains them. Exclude them to leave "
                "them as they are."
            )
        left = [name for name in prunable if name not in pruned and name not in self._running.followed]
        if not left:
            return
        why = f"{', '.join(left)}: no optimizer trains them, so they stay dense."
        if follow := look_like_copies(pl_module, list(pruned), left):
            warn(
                f"{why} Some look like copies of weights that are pruned. To put the masks of the originals "
                f"on these: follow={follow}. To prune them on their own, name them in include=."
            )
        else:
            log.info(f"{type(self).__name__}: {why} Name them in include= to prune them.")

    @override
    def _given(self) -> dict[str, str]:
        return {**super()._given(), "masks": first_in_words(self._start_from)}

    @override
    def _begun_with(self) -> dict[str, str]:
        return {"masks": named(self._start_from)}

    def _dry_run(self, pl_module: LightningModule, params: Mapping[str, nn.Parameter], first: Masks) -> None:
        """Draw the masks of the next and of the last round from the weights as they are.

        A criterion that runs the model is stood in for by the magnitude; see `_try_run`.

        Raises:
            ValueError: what a pruning would raise, or that a layer, or all of them, would be left empty.
        """
        criterion = criteria.magnitude if runs_model(self.criterion) else self.criterion
        weights = {name: p.detach() for name, p in params.items()}
        masks = {name: like(first[name].to(p.device), p) for name, p in weights.items()}
        for round in dict.fromkeys((self.round + 1, self.rounds)):
            if round > self.rounds:
                continue
            sparsities = self._sparsities(list(params), round)
            drawn = next_masks(
                weights,
                masks,
                sparsities,
                criterion,
                self.allocate,
                self.granularity,
                layouts=layouts(pl_module, list(params)),
                initial=self._initial or weights,
                generator=torch.Generator().manual_seed(0),
            )
            fixed = not any(callable(sparsity) for _, sparsity in sparsities)
            if fixed and not alive(drawn) and alive(masks) and self.max_sparsity == 1:
                raise ValueError(
                    f"schedule: in round {round} it leaves none of {sum(p.numel() for p in params.values())} "
                    "weights, and one is needed. Choose a lower sparsity, or fewer rounds."
                )
            if not self.verify or may_empty(self.allocate) or self._too_few(drawn):
                continue
            if found := doctor.emptied(drawn, masks):
                shown = "\n".join(found)
                raise ValueError(
                    f"schedule: in round {round} it leaves layers empty, and each needs a weight. Change "
                    f"it, or:\n{shown}"
                )

    # ----------------------------------------------------------------------------------------- between rounds

    @override
    def _try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if runs_model(self.criterion):
            together(trainer, lambda: self._draw(trainer, pl_module, self.round + 1, batches=1))

    @override
    def _begins_pruned(self) -> bool:
        return any(callable(sparsity) or sparsity for _, sparsity in self._sparsities(list(self.masks), 0))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._at.opened and "initial" in asked(self.criterion):
            self._initial = copied(dict(self._running.params))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._metrics = {}

    def _sparsities(self, names: Sequence[str], round: int) -> list[tuple[list[str], Sparsity]]:
        """The weights of each schedule, with what it says of a round."""
        return sparsities_of(scheduled(names, self.schedule, self.rounds), round)

    @override
    def _next(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        return self._draw(trainer, pl_module, round, self.score_batches)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, round: int, batches: int) -> Masks:
        """The masks of a round. A criterion that reads data gets so many training batches from each rank."""
        assert self._seed is not None
        params = self._running.params
        initial = {name: like(w.to(params[name].device), params[name]) for name, w in self._initial.items()}
        with evidence_of(trainer, pl_module, self.criterion, batches, self._seed + round) as evidence:
            return next_masks(
                params,
                self.masks,
                self._sparsities(list(params), round),
                self.criterion,
                self.allocate,
                self.granularity,
                layouts=layouts(pl_module, list(params)),
                initial=initial or None,
                **evidence,
            )

    @override
    def _put_on(self, trainer: Trainer, pl_module: LightningModule, units: Masks) -> None:
        self.masks = units

    @override
    def _before_pruning(self, trainer: Trainer) -> str | None:
        metrics = self._metrics | self._logged(trainer)
        for metric, lowest in self.stop_below.items():
            if metric not in metrics:
                raise ValueError(
                    f"stop_below: no metric {metric!r} was logged in this round; allowed is what was. "
                    f"Logged are: {', '.join(trainer.callback_metrics) or 'none'}. Name one of these."
                )
            if (value := metrics[metric]) < lowest:
                return f"{metric} is {value:.4g}, below {lowest}."
        return None

    @override
    def _too_few(self, units: Masks) -> str | None:
        total = sum(mask.numel() for mask in units.values())
        if (left := alive(units)) >= max(1, budget(self.max_sparsity, total)):
            return None
        sparsity = f"the next sparsity, {1 - left / total:.4f},"
        return f"{sparsity} is above max_sparsity={self.max_sparsity}, or leaves nothing."

    def _logged(self, trainer: Trainer) -> dict[str, float]:
        """What stop_below looks at. In a checkpoint too: the next round begins after it, or does not."""
        logged = trainer.callback_metrics
        return {metric: float(logged[metric]) for metric in self.stop_below if metric in logged}

    @override
    def _missed(self, before: Masks) -> list[str]:
        # A granularity counts in units.
        exact = self._sparsities(list(self.masks), self.round) if self.granularity is single else []
        found = [] if may_empty(self.allocate) else doctor.emptied(self.masks, before)
        return [*found, *doctor.missed(self.masks, before, exact)]

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        logged = self._logged(self._fit.trainer) if self._fit else {}
        return {**super().state_dict(), "initial": self._initial, "metrics": self._metrics | logged}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._initial = state_dict["initial"]
        self._metrics = state_dict["metrics"]


def trained(
    trainer: Trainer, params: dict[str, nn.Parameter], include: list[str] | None
) -> dict[str, nn.Parameter]:
    """Of prunable weights those that an optimizer trains, or that `include` names.

    Raises:
        ValueError: when an optimizer trains none of them.
    """
    held = trained_by(trainer)
    if not held or include is not None:
        return params
    found = {name: p for name, p in params.items() if id(p) in held}
    if not found:
        raise ValueError(
            "no optimizer trains any of the prunable weights: they are frozen, or the optimizers hold "
            "others, such as copies. Give an optimizer the model's own parameters; or name those to prune "
            f"all the same in include=: {', '.join(params)}."
        )
    return found


def trained_by(trainer: Trainer) -> set[int]:
    """The ids of the parameters that the optimizers train."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return {id(p) for group in groups for p in group["params"] if p.requires_grad}
