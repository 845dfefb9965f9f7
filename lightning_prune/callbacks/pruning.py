"""IterativeMagnitudePruning: when to prune, what to log, what to checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import allocation, criteria
from lightning_prune.allocation import AtLeast
from lightning_prune.callbacks import generators
from lightning_prune.callbacks.beside import averaging_of, callbacks_of, compare_anew, mask_averages, show
from lightning_prune.callbacks.checkpoints import WholeCheckpointIO, load_masks, make_plain
from lightning_prune.callbacks.evidence import check_run, evidence_of
from lightning_prune.callbacks.learning_rates import steps_per_epoch
from lightning_prune.callbacks.ranks import agreed, check_ranks, of_ranks
from lightning_prune.checks import number, whole
from lightning_prune.deploy import storage
from lightning_prune.doctor import awake, disagreeing, emptied, missed, replaced, report
from lightning_prune.evidence import asked
from lightning_prune.granularity import Granularity, single
from lightning_prune.holding import Hold, check_fit, mixes_weights
from lightning_prune.layers import LAYERS, prunable
from lightning_prune.masks import Masks, alive, pack, unpack
from lightning_prune.pruning import Allocation, Criterion, budget, check_schedule, groups, next_masks, plan
from lightning_prune.rewind import copied
from lightning_prune.schedules import Geometric, Schedule

log = logging.getLogger(__name__)


class IterativeMagnitudePruning(Callback):
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

    Logged as `round`, `sparsity` and, with the loggers, `round_step`, the optimizer steps since the round
    began, and `density/<name>` of each tensor as a round or an epoch begins. After each pruning
    `on_prune(trainer, pl_module, masks)` is called on every callback that has it.

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

    Attributes:
        masks: {parameter name: bool tensor, True = alive}; empty before the first fit.
        round: the round in progress.
        round_ends: what `clock` reads when the round in progress is over. Each round has the length that the
            arguments say unless a callback changes this; the last one lasts until the fit ends.
        sparsity: fraction of the prunable weights that is dead.

    Raises:
        ValueError: at construction, or as the fit starts and before anything is trained, naming the argument.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635; Han et al. (2015), arXiv:1506.02626.
    """

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
    ) -> None:
        for name, value, lowest in (
            ("rounds", rounds, 0),
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_train_steps", 1 if every_n_train_steps is None else every_n_train_steps, 1),
            ("score_batches", score_batches, 1),
        ):
            whole(name, value, lowest)
        allowed = "is above 0 and at most 1, such as 0.95"
        number("max_sparsity", max_sparsity, allowed, lambda v: 0 < v <= 1)
        for metric, lowest in (stop_below or {}).items():
            number(f"stop_below[{metric!r}]", lowest, "are numbers, such as 0.9", lambda v: v == v)
        self.schedule = dict(schedule) if isinstance(schedule, Mapping) else schedule or Geometric(0.2)
        for its in self.schedule.values() if isinstance(self.schedule, dict) else [self.schedule]:
            check_schedule(its, rounds)
        self.rounds = rounds
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.criterion = criterion
        self.allocate = allocate
        self.granularity = granularity
        self.layers = layers
        self.include = include
        self.exclude = exclude
        self.max_sparsity = max_sparsity
        self.stop_below = dict(stop_below or {})
        self.save_sparse = save_sparse
        if save_sparse is not None:
            storage.libraries()  # which fail now or never
        self.score_batches = score_batches
        self.verify = verify

        self.masks: Masks = {}
        self.round = 0
        self.round_ends = self._length
        self._start_from = masks
        self._rest = self._length  # of the round in progress, when the last fit ended
        # Lightning asks for it at every hook of every step
        self._key = self._generate_state_key(include=include, exclude=exclude)
        self._began = 0  # the global step at which the round in progress began
        self._started = False  # whether the first batch of round 0 has started
        self._seed: int | None = None  # of what criteria draw
        self._initial: dict[
            str, Tensor
        ] = {}  # the weights at the first batch, if the criterion asks for them
        self._resumed: list[Any] | None = None  # generators of a checkpoint's ranks, until training goes on
        self._metrics: dict[str, float] = {}  # those of stop_below when that checkpoint was written
        self._params: dict[str, nn.Parameter] = {}
        self._hold: Hold | None = None
        self._trainer: Trainer | None = None
        self._announce = True

    # ----------------------------------------------------------------------------------------- what is public

    @property
    def sparsity(self) -> float:
        """Fraction of what may be pruned that is dead, 0 before the first fit."""
        total = sum(mask.numel() for mask in self._units.values())
        return (total - alive(self._units)) / total if total else 0.0

    @property
    def steps_per_round(self) -> int | float:
        """Optimizer steps of a round, for learning rate schedules made in `configure_optimizers`.

        Rounds counted in epochs: of one optimizer that steps once for each batch or, with gradient
        accumulation, for several; infinite for epochs of unknown length. Rounds counted in steps: of all
        optimizers together, as `trainer.global_step`.
        """
        if self.every_n_train_steps is not None:
            return self.every_n_train_steps
        if self._trainer is None:
            raise RuntimeError(
                "steps_per_round is known during a fit, from `configure_optimizers` on, and there is none. "
                "Ask there, or give every_n_train_steps."
            )
        self._trainer.fit_loop.setup_data()
        return steps_per_epoch(self._trainer) * self.every_n_epochs

    @property
    @override
    def state_key(self) -> str:
        return self._key

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        strategy = trainer.strategy
        whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        if not whole or isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                f"strategy: {type(strategy).__name__} may shard parameters over devices, and masks need "
                "whole ones. Allowed are a single device and DDP. Use one of them."
            )
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._params = self.prunable(pl_module)
        groups(self._names(), self.schedule)
        check_run(pl_module, self.criterion)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62)
        for other in callbacks_of(trainer):
            if not isinstance(other, IterativeMagnitudePruning) or other is self:
                continue
            if shared := sorted(set(self._params) & set(other.prunable(pl_module))):
                raise ValueError(
                    f"two pruning callbacks hold the same weights: {', '.join(shared)}. Divide them with "
                    "include= and exclude=, or use one callback with a schedule per pattern; each "
                    "weight goes to one."
                )
        masks = self.masks or self._first_masks()
        check_fit(masks, self._params)
        self.masks = {name: masks[name].to(p.device) for name, p in self._params.items()}
        if self.verify:
            check_ranks(trainer, self.masks)
            advice = "Masks and weights of this checkpoint are not of one training; resume from another."
            report(awake(self._params, self.masks, advice) if self._resumed else [])
        gradients = _gradients_are_read(trainer, pl_module)
        self._hold = Hold(self._params, self.masks, trainer.optimizers, gradients=gradients)
        mask_averages(trainer, self.masks)

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of `model` that this callback prunes, by name."""
        return prunable(model, self.layers, self.include, self.exclude)

    def _first_masks(self) -> Masks:
        if self._start_from is None:
            return {name: torch.ones_like(p, dtype=torch.bool) for name, p in self._params.items()}
        if self._start_from == "zeros":
            return {name: p.detach() != 0 for name, p in self._params.items()}
        return (
            dict(self._start_from) if isinstance(self._start_from, Mapping) else load_masks(self._start_from)
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is None:  # only now does the clock show the truth
            self.round_ends = self.clock(trainer) + self._rest
            self._began = trainer.global_step
            return
        generators.go_on(trainer, self._resumed)

    # ----------------------------------------------------------------------------------------- between rounds

    @property
    def _length(self) -> int:
        return self.every_n_epochs if self.every_n_train_steps is None else self.every_n_train_steps

    def clock(self, trainer: Trainer) -> int:
        """What rounds are counted in: epochs, or the steps of all optimizers."""
        return trainer.current_epoch if self.every_n_train_steps is None else trainer.global_step

    def is_over(self, trainer: Trainer) -> bool:
        """Whether the round in progress has come to its end."""
        return self.clock(trainer) >= self.round_ends

    def end_round(self, trainer: Trainer) -> None:
        """Let the round in progress end with the step, or the epoch, that was trained last."""
        now = self.clock(trainer) + (self.every_n_train_steps is None)
        self.round_ends = min(self.round_ends, now)

    def drawn(self, trainer: Trainer, pl_module: LightningModule) -> Masks:
        """What the next pruning would leave alive if it were now. Training is not disturbed."""
        return agreed(trainer, self._drawn(trainer, pl_module, self.round + 1))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        if (
            self._resumed
            and trainer.current_epoch > 0
            and not (loop.is_resuming or loop.epoch_loop.restarting)
        ):
            # From a checkpoint written at the end of a validation Lightning first replays the end of that
            # epoch, and makes this epoch's data iterator anew, which draws again.
            generators.restore_own(trainer, self._resumed)
        self._begin_round_if_due(trainer, pl_module)
        self._announce = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resumed = None
        if not self._started:
            self._started = True
            if "initial" in asked(self.criterion):
                self._initial = copied(dict(self._params))
            if any(sparsity for _, sparsity in self._sparsities(0)):
                self._prune(trainer, pl_module, 0)
        # Here too: rounds in steps begin within an epoch, and a checkpoint of an epoch's last batch resumes
        # here.
        self._begin_round_if_due(trainer, pl_module)
        if trainer.barebones:
            return
        if self._announce or (trainer.global_step + 1) % _log_interval(trainer) == 0:
            values = {"round_step": float(trainer.global_step - self._began)}
            if self._announce and trainer.loggers:
                values |= {f"density/{name}": alive({name: m}) / m.numel() for name, m in self.masks.items()}
            self._announce = False
            show(trainer, {"round": float(self.round), "sparsity": self.sparsity}, values)

    def _begin_round_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.round < self.rounds and self.is_over(trainer):
            if any(trainer.current_epoch > its.swa_end for its in averaging_of(trainer)):
                return  # an epoch that trains nothing: the statistics of the averaged network
            if reason := self._below(trainer):
                self.stop(trainer, reason)
            self._prune(trainer, pl_module, self.round + 1)

    _of = "weights"

    @property
    def _units(self) -> Masks:
        """What sparsity counts, which are `_of` its kind."""
        return self.masks

    def _names(self) -> list[str]:
        """Of what the schedule counts."""
        return list(self._params)

    def _sparsities(self, round: int) -> list[tuple[list[str], Any]]:
        return plan(groups(self._names(), self.schedule), round)

    def _drawn(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        assert self._seed is not None
        assert self._hold is not None
        self._hold.apply()
        initial = {
            name: self._initial[name].to(p.device) for name, p in self._params.items() if self._initial
        }
        with evidence_of(
            trainer, pl_module, self.criterion, self.score_batches, self._seed + round
        ) as evidence:
            return next_masks(
                self._params,
                self.masks,
                self._sparsities(round),
                self.criterion,
                self.allocate,
                self.granularity,
                initial=initial or None,
                **evidence,
            )

    def _prune(self, trainer: Trainer, pl_module: LightningModule, round: int) -> None:
        masks = agreed(trainer, self._drawn(trainer, pl_module, round))
        total = sum(mask.numel() for mask in masks.values())
        if (left := alive(masks)) < max(1, budget(self.max_sparsity, total)):
            sparsity = f"the next sparsity, {1 - left / total:.4f},"
            self.stop(trainer, f"{sparsity} is above max_sparsity={self.max_sparsity}, or leaves nothing.")
        before, candidates = self.masks, alive(self._units)
        self._carry_out(trainer, pl_module, masks)
        if round:  # no drift where the clock jumps over an end; and every round trains
            self.round_ends = max(self.round_ends + self._length, self.clock(trainer) + 1)
        self.round, self._began = round, trainer.global_step
        for callback in callbacks_of(trainer):
            if on_prune := getattr(callback, "on_prune", None):
                on_prune(trainer, pl_module, self.masks)
        assert self._hold is not None
        self._hold.set(self.masks)
        mask_averages(trainer, self.masks)
        compare_anew(trainer)
        self._announce = True
        if self.verify:
            self._verify(trainer, pl_module, before)
        left = alive(self._units)
        log.info(
            f"round {self.round} of {self.rounds}: pruned {candidates - left}, "
            f"{left} {self._of} left ({100 * (1 - self.sparsity):.2f} %)"
        )

    def _verify(self, trainer: Trainer, pl_module: LightningModule, before: Masks) -> None:
        found = awake(self._params, self.masks, "Something wrote to them after the masks were put on.")
        found += replaced(self._params, pl_module, trainer.optimizers)
        if not (isinstance(self.allocate, AtLeast) and self.allocate.n == 0):
            found += emptied(self.masks, before)
        report([*found, *missed(self.masks, before, self._exact(self.round))])
        check_ranks(trainer, self.masks)

    def _exact(self, round: int) -> list[tuple[list[str], Any]]:
        """The sparsities that the masks of a round have exactly; a granularity counts in units."""
        return self._sparsities(round) if self.granularity is single else []

    def _carry_out(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        self.masks = masks

    def stop(self, trainer: Trainer, reason: str) -> None:
        """End the fit with this round, before its next batch."""
        log.info("round %d is the last: %s", self.round, reason)
        trainer.should_stop = True
        raise StopIteration  # Lightning's own way out of an epoch before its next batch

    def _below(self, trainer: Trainer) -> str | None:
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

    def _logged(self, trainer: Trainer) -> dict[str, float]:
        """What stop_below looks at. In a checkpoint too: the next round begins after it, or does not."""
        logged = trainer.callback_metrics
        return {metric: float(logged[metric]) for metric in self.stop_below if metric in logged}

    # -------------------------------------------------------------------- wherever weights leave the training

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hold:
            self._hold.apply()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._hold:
            self._hold.apply()
        if self.verify:
            report(self._doubts(trainer, checkpoint))
        if trainer.world_size > 1 and not self._resumed:
            state = checkpoint["callbacks"][self.state_key]
            state["rng"] = of_ranks(trainer, state["rng"][0])
        make_plain(checkpoint, pl_module)

    def _doubts(self, trainer: Trainer, checkpoint: dict[str, Any]) -> list[str]:
        """Where weights, masks and log of a checkpoint are not of one state."""
        stored = checkpoint["state_dict"]
        # not what the module leaves out of its checkpoints, nor what has been cut since
        masks = {n: m for n, m in self.masks.items() if n in stored and stored[n].shape == m.shape}
        found = awake(stored, masks, "The checkpoint was not written.")
        alone = not any(
            isinstance(c, IterativeMagnitudePruning) and c is not self for c in callbacks_of(trainer)
        )
        if alone and self._hold and not self._announce and not trainer.barebones:
            its = {"round": float(self.round), "sparsity": self.sparsity}
            found += disagreeing(trainer.callback_metrics, its)
        return found

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rest = self.round_ends - self.clock(trainer)
        if self._hold:
            self._hold.apply()
            self._hold.remove()
            self._hold = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_sparse is not None and trainer.is_global_zero:
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            path = Path(folder, self.save_sparse)
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.save_sparse(pl_module.state_dict(), path)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._hold:
            self.on_train_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = None
        self._resumed = None  # a validation of a checkpoint is no resume
        self._params = {}

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "round_ends": self.round_ends,
            "began": self._began,
            "started": self._started,
            "seed": self._seed,
            "initial": self._initial,
            "masks": pack(self.masks),
            "metrics": self._metrics | (self._logged(self._trainer) if self._trainer else {}),
            "rng": self._resumed or [generators.capture(self._trainer)],
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        its = [key for key in checkpoint["callbacks"] if key.startswith(type(self).__qualname__)]
        if its and self.state_key not in its:
            raise ValueError(
                f"ckpt_path: the checkpoint holds the masks of {', '.join(its)}, and this callback is "
                f"{self.state_key}; the same is needed. Give include and exclude as they were."
            )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round = state_dict["round"]
        self.round_ends = state_dict["round_ends"]
        self._began = state_dict["began"]
        self._started = state_dict["started"]
        self._seed = state_dict["seed"]
        self._initial = state_dict["initial"]
        self.masks = unpack(state_dict["masks"])
        self._metrics = state_dict["metrics"]
        self._resumed = state_dict["rng"]


def _gradients_are_read(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the gradient of a dead weight may reach a living one, by clipping or in an optimizer's step."""
    hooks = ("on_after_backward", "on_before_optimizer_step")
    of_module = (*hooks, "backward", "configure_gradient_clipping", "optimizer_step")
    return bool(
        trainer.gradient_clip_val
        or not pl_module.automatic_optimization
        or any(mixes_weights(optimizer) for optimizer in trainer.optimizers)
        or any(is_overridden(hook, pl_module) for hook in of_module)
        or any(is_overridden(hook, callback) for callback in callbacks_of(trainer) for hook in hooks)
    )


def _log_interval(trainer: Trainer) -> int:
    return trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
