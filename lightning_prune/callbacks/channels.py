"""StructuredChannelPruning: when channels are chosen, and when they go."""

import fnmatch
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map
from typing_extensions import final, override

from lightning_prune import allocation, criteria, rng
from lightning_prune.allocation import Allocation
from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.evidence import check_run, evidence_of, first_batches, traced_step
from lightning_prune.callbacks.following import following, look_like_copies
from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.pruning import trained_by
from lightning_prune.callbacks.ranks import decided, together
from lightning_prune.callbacks.rounds import Rounds
from lightning_prune.callbacks.shortfall import cut_off
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.checks import by_name, check_callable, named, number, whole
from lightning_prune.criteria import Criterion
from lightning_prune.evidence import inputs, runs_model, undisturbed
from lightning_prune.masks import Masks
from lightning_prune.pruning import by_argument, check_schedule, scheduled, sparsities_of
from lightning_prune.schedules import OneShot, Schedule
from lightning_prune.selection import Scores
from lightning_prune.structured import Couplings, cut, cut_of, discover
from lightning_prune.structured.calibration import calibrate, without_effect
from lightning_prune.structured.filters import unit_scores
from lightning_prune.structured.loading import reshape
from lightning_prune.structured.speed import speed
from lightning_prune.structured.surgery import Site, check_optimizers, in_a_graph
from lightning_prune.structured.targets import (
    Quantity,
    Wanted,
    check_widths,
    cost,
    held,
    memories,
    next_units,
    uses,
    with_shapes,
    without_measuring,
)
from lightning_prune.structured.trial import Through, input_of, kept_graphs, run
from lightning_prune.structured.units import (
    after,
    all_units,
    as_state,
    of_state,
    parameter,
    parameters,
    weight_masks,
    with_copies,
)

log = logging.getLogger(__name__)


@final
class StructuredChannelPruning(MaskedTraining):
    """Remove whole channels, so that the network becomes smaller and faster on any machine.

    Rounds, clock, logging and resumption are those of `IterativeMagnitudePruning`; sparsity is the fraction
    of channels that is gone, counted in units that go together: residual branches, concatenations, grouped
    and depthwise convolutions share theirs. Channels that are outputs of the model stay, and so do those that
    a trial on a copy shows cannot go, with a warning. With `remove="end"` they are zero during training and
    cut when the fit ends; with `remove="each_round"` they are cut as a round begins, from the model, the
    optimizers, the averaged weights of `WeightAveraging` and the snapshot of `LotteryTicketRewind`.
    Parameters keep their identity. A checkpoint resumes with the same command, whatever its shapes;
    `lightning_prune.load_pruned` loads it anywhere. Planning runs copies of the module, and on these the
    forward hooks that are registered on it.

    Args:
        schedule: round (and scores of units) -> fraction of channels removed, by default `OneShot(0.3)`; or a
            dict {pattern over weight names: schedule}. `filters.Removed(schedule)` is a target on parameters
            or multiply-adds instead, `filters.Smaller(5_000_000)` one on the bytes of the weights, and
            `filters.Faster(2.0)` one on the measured speed on the example input. Of several patterns each
            `Removed` counts what its own channels remove of the whole network; `Smaller` and `Faster` are of
            the whole network, and each goes on from what the patterns before it leave.
        rounds: number of prunings, 0 or more.
        every_n_epochs: length of a round in epochs.
        criterion: which channels: the mean of these scores over the weights that make a channel (`magnitude`:
            the L1 norm of filters, `Ln(2)`: L2, `taylor`), or one of `lightning_prune.filters`:
            `batch_norm_scale`, `geometric_median`, `RandomChannels`.
        allocate: how many stay where: `uniform` (in each layer alike), `global_rank`, `filters.isomorphic`.
        include: fnmatch patterns over weight names; only channels that one of these weights makes. None: all.
        exclude: fnmatch patterns over weight names; no channels that one of these makes.
        example_input: an input of `forward`, or its shape with the batch dimension; a tuple is its arguments,
            a dict its keyword arguments. Or, where `forward` cannot take it, a batch for `training_step`;
            then the loss is what a cut network must have in common with the masked one. None: the module's
            `example_input_array`, or else two samples of the training data, to either of them.
        remove: "end" or "each_round".
        every_n_train_steps: length of a round in optimizer steps; replaces the epoch clock.
        round_to: the channels left in each layer are rounded up to a multiple of this, 1 or more.
        at_least: units left in each layer, 1 or more.
        slimming: weight of an L1 penalty on the scales of batch normalizations while training, 0 or more.
        score_batches: number of training batches that a criterion that reads data gets.
        save_sparse: file that gets the `state_dict` of the smaller network when a fit ends; see
            `IterativeMagnitudePruning`.
        verify: look, after each pruning and in each checkpoint, whether all is as it should be, as
            `IterativeMagnitudePruning` does.
        follow: {pattern: pattern}, each with one `*`: tensors that copy others, such as those of an average,
            `{"average.module.*": "net.*"}`; they lose the channels of their originals.
        calibrate: number of training batches from which the statistics of batch normalizations are taken anew
            after each pruning; 0: they are left as they are.
        end_round_on_early_stop: as that of `IterativeMagnitudePruning`.

    Channels that layers in no optimizer make stay, unless `include` names them.

    Attributes:
        channels: {name of the first weight that makes them: bool tensor of units, True = alive}.
        masks: what is zero in the weights as they are now; empty with `remove="each_round"`.
        round: the round in progress.
        sparsity: fraction of the removable channels that is dead or gone.

    Raises:
        ValueError: at construction, or as the fit starts and before anything is trained, naming the argument.

    Reference: Li et al. (2017), arXiv:1608.08710; Liu et al. (2017), arXiv:1708.06519 (slimming); Fang et al.
        (2023), arXiv:2301.12900.
    """

    _unit = "channels"

    def __init__(
        self,
        schedule: Schedule | dict[str, Schedule] | None = None,
        rounds: int = 1,
        every_n_epochs: int = 1,
        criterion: Criterion = criteria.magnitude,
        allocate: Allocation = allocation.uniform,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        example_input: Tensor | list[int] | tuple[Any, ...] | dict[str, Any] | None = None,
        remove: str = "end",
        every_n_train_steps: int | None = None,
        round_to: int = 1,
        at_least: int = 1,
        slimming: float = 0.0,
        score_batches: int = 1,
        save_sparse: str | Path | None = None,
        verify: bool = True,
        follow: dict[str, str] | None = None,
        calibrate: int = 0,
        end_round_on_early_stop: bool = False,
    ) -> None:
        if remove not in ("end", "each_round"):
            raise ValueError(f"remove={remove!r}: allowed are 'end' and 'each_round'.")
        for name, value in (("round_to", round_to), ("at_least", at_least)):
            whole(name, value, 1, such_as=1)
        allowed = "are finite numbers from 0 on, such as 1e-4"
        number("slimming", slimming, allowed, lambda v: 0 <= v < float("inf"))
        whole("score_batches", score_batches, 1)
        whole("calibrate", calibrate, 0, such_as=8)
        super().__init__(
            rounds=rounds,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            include=include,
            exclude=exclude,
            save_sparse=save_sparse,
            verify=verify,
            end_round_on_early_stop=end_round_on_early_stop,
            key={},
        )
        self.schedule = OneShot(0.3) if schedule is None else schedule
        for argument, one in by_argument(self.schedule).items():
            check_schedule(one, rounds, argument)
            if said := cut_off(one, rounds, argument):
                warn(said)
        check_callable("criterion", criterion, 1)
        check_callable("allocate", allocate, 2)
        self.criterion = criterion
        self.allocate = allocate
        self.score_batches = score_batches
        self.example_input = example_input
        self.remove = remove
        self.round_to = round_to
        self.at_least = at_least
        self.slimming = slimming
        by_name("follow", follow, "{'average.module.*': 'net.*'}")
        self.follow = dict(follow or {})
        self.calibrate = calibrate
        self.channels: Masks = {}
        self._couplings: Couplings = {}  # in the coordinates of the full-size network
        self._left: Masks = {}  # the units that are still in the network
        self._left_before: Masks = {}  # those before a checkpoint is loaded, in averages, too
        self._uses: dict[str | Site, float] = {}  # of each weight's elements in a forward pass
        self._measure: Callable[[Masks], float] | None = None  # the speed, in the round that begins
        self._told: set[str] = set()  # arguments of which it was said what comes out
        self._hooks: list[Any] = []

    @property
    @override
    def _units(self) -> Masks:
        return self.channels

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that lose channels, by name."""
        return parameters(self._couplings, model)

    # ----------------------------------------------------------------------------------------- the fit starts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer, whole="a channel is cut out of whole weights")
        allowed = (
            (SingleDeviceStrategy,) if self.remove == "each_round" else (SingleDeviceStrategy, DDPStrategy)
        )
        if not isinstance(trainer.strategy, allowed):
            raise ValueError(
                f"remove={self.remove!r}: the strategy is {type(trainer.strategy).__name__}, which holds "
                "shapes of the parameters that a cut would change. Allowed are a single device, and with "
                "remove='end' DDP."
            )
        if _lightning.leaves_its_processes(trainer):
            raise ValueError(
                "strategy: forked and spawned processes hand their weights back to the full-size model they "
                "came from. Allowed is strategy='ddp', in a script; use that."
            )
        super().setup(trainer, pl_module, stage)
        # Lightning loads a checkpoint into the model before it gives the callbacks their state.
        modules = (pl_module, *_lightning.averages_of(trainer))
        self._left_before = self._left  # averages are loaded after the state; copies keep an earlier hook

        def take_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            given = {name.removeprefix(prefix): value for name, value in state_dict.items()}
            reshape(module, given, self._full_sizes(module, self._left_before))

        self._hooks = [module.register_load_state_dict_pre_hook(take_shapes) for module in modules]

    def _full_sizes(self, module: nn.Module, left: Masks) -> dict[str, list[int]]:
        """The shapes before any cut, of tensors that a module has in which these units are left."""
        tensors = (*module.named_parameters(), *module.named_buffers())
        shapes = {name: list(t.shape) for name, t in tensors}
        for site, gone in cut_of(self._couplings, left or all_units(self._couplings)).items():
            if (name := parameter(site)) in shapes:
                shapes[name][site[2]] += len(gone)
        return shapes

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        others = [
            c for c in _lightning.callbacks_of(trainer) if isinstance(c, MaskedTraining) and c is not self
        ]
        if others:
            raise ValueError(
                f"StructuredChannelPruning goes alone; {type(others[0]).__name__} is here, too. Put several "
                "schedules into one callback, schedule={pattern: schedule}, or fit one after the other."
            )
        check_run(pl_module, self.criterion)
        check_optimizers(trainer.optimizers)
        if not self._couplings:
            self._couplings = self._found(trainer, pl_module)
            self.channels, self._left = all_units(self._couplings), all_units(self._couplings)
        check_widths(self._couplings, self.round_to, self.at_least)
        self._say_what_has_no_effect(pl_module)
        scheduled(list(self._couplings), self.schedule, self.rounds)
        self._dry_run(trainer, pl_module)
        params = self.prunable(pl_module) if self.remove == "end" else {}
        self.masks = weight_masks(self._here(), self._alive_here(), params)
        return params

    def _say_what_has_no_effect(self, pl_module: LightningModule) -> None:
        if self.calibrate and (idle := without_effect(pl_module)):
            warn(f"calibrate={self.calibrate}: {idle}")
        if self.slimming and not any(coupling.scales for coupling in self._couplings.values()):
            warn(
                f"slimming={self.slimming}: none of the channels that can go passes a batch normalization "
                "with a scale, so nothing is penalized. Leave it out."
            )

    def _dry_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the units of the next and of the last round from the weights as they are.

        A criterion that runs the model is stood in for by the magnitude; it is tried on a batch as training
        starts. A speed is not measured here.

        Raises:
            ValueError: what a pruning would raise.
        """
        here, generator = self._here(), torch.Generator().manual_seed(0)
        criterion = criteria.magnitude if runs_model(self.criterion) else self.criterion
        params = parameters(here, pl_module)
        found = unit_scores(here, criterion, params, masks=self.masks, generator=generator)
        self._told = set()
        for round in dict.fromkeys((self.round + 1, self.rounds)):
            if round <= self.rounds:
                sparsities = without_measuring(self._sparsities(round))
                self._drawn_of(trainer, pl_module, found, sparsities, says=round == self.rounds)

    @override
    def _try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if runs_model(self.criterion):
            together(trainer, lambda: self._scores(trainer, pl_module, self.round + 1, batches=1))

    @override
    def _given(self) -> dict[str, str]:
        return {**super()._given(), "example_input": "any"}  # one of a process's own data is as good

    @override
    def _reads_gradients(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        # A dead channel's weights get gradients, and their noise reaches living ones through a clipped norm.
        return True

    def _found(self, trainer: Trainer, pl_module: LightningModule) -> Couplings:
        """The channels that may go: they are trained, or included; and what copies them."""
        held, params = trained_by(trainer), dict(pl_module.named_parameters())
        copied = {pattern: fnmatch.filter(params, pattern) for pattern in self.follow}
        exclude = [*(self.exclude or []), *(pattern for pattern, names in copied.items() if names)]
        found = self._traced(trainer, pl_module, exclude)
        makers = {name: [parameter(site) for site in c.filters] for name, c in found.items()}
        if held and self.include is None:
            frozen = {name: [m for m in makers[name] if id(params[m]) not in held] for name in found}
            found = {name: coupling for name, coupling in found.items() if not frozen[name]}
            left = list(dict.fromkeys(weight for name in frozen for weight in frozen[name]))
            if not found:
                raise ValueError(
                    "no optimizer trains the layers whose channels could go: they are frozen, or the "
                    "optimizers hold others. Give an optimizer the model's own parameters; or name those to "
                    f"cut all the same in include=: {', '.join(left)}."
                )
            if left:
                warn(
                    f"{', '.join(left)}: no optimizer trains them, so their channels stay, and those that go "
                    "with them. Name them in include= to cut them, or exclude them."
                )
        names = [*params, *(name for name, _ in pl_module.named_buffers())]
        own = dict.fromkeys(parameter(site) for coupling in found.values() for site in coupling.sites)
        copies = following(self.follow, list(own), names)
        idle = [name for name, p in params.items() if held and id(p) not in held]
        others = [name for name in idle if name not in own and not any(name in c for c in copied.values())]
        if alike := look_like_copies(pl_module, list(own), others):
            warn(
                f"{', '.join(alike)} look like copies of a network that is cut. To cut these, too: "
                f"follow={alike}."
            )
        return with_copies(found, copies)

    def _traced(self, trainer: Trainer, pl_module: LightningModule, exclude: list[str]) -> Couplings:
        """What is found with the first of the examples by which the module can be traced."""
        errors: list[ValueError] = []
        for example in self._examples(trainer, pl_module):
            try:
                return discover(pl_module, example, self.include, exclude)
            except ValueError as error:
                errors.append(error)
        if len({str(error) for error in errors}) == 1 and pl_module.automatic_optimization:
            raise errors[0]
        raise _no_example(pl_module, errors[0], errors[-1]) from errors[0]

    def _examples(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        """Inputs to try: the one that is given, or else what a batch of training may be."""
        if self.example_input is not None:
            given = input_of(pl_module, self.example_input)
            is_batch = not isinstance(given, Tensor) or type(pl_module).forward is LightningModule.forward
            if is_batch and pl_module.automatic_optimization:
                return [given, Through(traced_step(trainer, pl_module), given)]
            return [given]
        if pl_module.example_input_array is not None:
            return [pl_module.example_input_array]
        trainer.fit_loop.setup_data()
        with undisturbed(pl_module):
            batch = first_batches(trainer, pl_module, 1)[0]
        two = tree_map(lambda t: t[:2] if isinstance(t, Tensor) and t.dim() else t, batch)
        first = inputs(two)
        found = [first, (first,)] if isinstance(first, (dict, list)) else [first]
        if pl_module.automatic_optimization:
            step = traced_step(trainer, pl_module)
            found += [Through(step, two), Through(step, batch)]
        return found

    def _example(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """The first of the inputs on which the module runs."""
        errors: list[Exception] = []
        for example in self._examples(trainer, pl_module):
            try:
                with undisturbed(pl_module), torch.no_grad():
                    run(pl_module, example)
            except Exception as error:  # whatever a user's forward raises on what is not meant for it
                errors.append(error)
            else:
                return example
        raise _no_example(pl_module, errors[0], errors[-1]) from errors[0]

    # ----------------------------------------------------------------------------------------- between rounds

    def _here(self) -> Couplings:
        """The couplings in the coordinates of the network as it is now."""
        return after(self._couplings, self._left)

    def _alive_here(self) -> Masks:
        """The units that stay, of those that are still in the network."""
        return {name: mask[self._left[name]] for name, mask in self.channels.items()}

    @override
    def _begins_pruned(self) -> bool:
        return any(callable(wanted.sparsity) or wanted.sparsity for wanted in self._sparsities(0))

    def _sparsities(self, round: int) -> list[Wanted]:
        """The couplings of each schedule, with what it says of a round."""
        groups = scheduled(list(self._couplings), self.schedule, self.rounds)
        arguments = by_argument(self.schedule) if isinstance(self.schedule, dict) else [""]
        wanted = zip(sparsities_of(groups, round), arguments, strict=True)
        return [Wanted(names, sparsity, argument) for (names, sparsity), argument in wanted]

    @override
    def _next(self, trainer: Trainer, pl_module: LightningModule, round: int) -> Masks:
        found = self._scores(trainer, pl_module, round, self.score_batches)
        self._measure = None
        return self._drawn_of(trainer, pl_module, found, self._sparsities(round), says=round == self.rounds)

    def _scores(self, trainer: Trainer, pl_module: LightningModule, round: int, batches: int) -> Scores:
        """Those of the units left. A criterion that reads data gets so many batches from each rank."""
        assert self._seed is not None
        here = self._here()
        with evidence_of(trainer, pl_module, self.criterion, batches, self._seed + round) as evidence:
            params = parameters(here, pl_module)
            return unit_scores(here, self.criterion, params, masks=self.masks, **evidence)

    def _drawn_of(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        found: Scores,
        sparsities: Sequence[Wanted],
        says: bool,
    ) -> Masks:
        """The units of a round, by the scores of those left; it may say that fewer go than asked for."""
        scores = {name: torch.zeros(mask.shape) for name, mask in self.channels.items()}
        for name, score in found.items():
            scores[name][self._left[name]] = score.cpu()
        return next_units(
            self._couplings,
            scores,
            self.channels,
            sparsities,
            self.allocate,
            self.round_to,
            self.at_least,
            partial(self._cost, trainer, pl_module),
            partial(self._speed, trainer, pl_module),
            self._say_what_comes_out if says else None,
        )

    def _say_what_comes_out(self, argument: str, said: str, do: str) -> None:
        """Say once in a fit that a schedule has no effect, or not the one asked for, in the last round."""
        if argument not in self._told:
            schedule = by_argument(self.schedule)[argument or "schedule"]
            warn(f"{argument or 'schedule'}={named(schedule)}: {said}. {do}.")
        self._told.add(argument)

    @override
    def _put_on(self, trainer: Trainer, pl_module: LightningModule, units: Masks) -> None:
        self.channels = units
        if self.remove == "each_round":
            self._cut(trainer, pl_module)
        params = self._running.params
        self.masks = weight_masks(self._here(), self._alive_here(), params)
        self._measure = None

    @override
    def _begun(self, trainer: Trainer) -> None:
        if self.calibrate:
            model = trainer.lightning_module
            with rng.kept():  # the order of the epoch that begins is drawn after this
                batches = first_batches(trainer, model, self.calibrate)
            automatic = model.automatic_optimization
            forward = traced_step(trainer, model) if automatic else lambda model, batch: model(inputs(batch))
            calibrate(model, batches, forward)
        super()._begun(trainer)

    @override
    def _take_back(self, masks: Masks, units: Masks, at: Rounds, removed: int) -> None:
        if self.remove == "end":  # What has been cut does not come back: then the round has begun.
            self.channels = units
            super()._take_back(masks, units, at, removed)

    def _cost(self, trainer: Trainer, pl_module: LightningModule, units: Masks, of: Quantity) -> float:
        """Parameters, multiply-adds or bytes of the network with these units."""
        own = held(pl_module, of)
        taken = memories(pl_module) if of == "bytes" else ()
        shapes: dict[str | Site, Sequence[int]] = {name: list(t.shape) for name, (t, _) in own.items()}
        shapes |= self._full_sizes(pl_module, self._left)
        if of == "multiply_adds" and not self._uses:
            self._uses = uses(pl_module, self._example(trainer, pl_module), self._here())
        counts: dict[str | Site, float] = {name: count for name, (_, count) in own.items()}
        often = self._uses if of == "multiply_adds" else counts
        return cost(self._couplings, units, with_shapes(often, shapes, self._couplings), taken)

    def _speed(self, trainer: Trainer, pl_module: LightningModule, units: Masks) -> float:
        """How many times as fast the network is with these units, as the first process measures it."""
        if (measure := self._measure) is None:  # by all processes, which draw the example together
            example = self._example(trainer, pl_module)
            measure = self._measure = speed(pl_module, example, self._couplings, self._left)
        return float(decided(trainer, lambda: measure(units) if trainer.is_global_zero else 0.0))

    def _cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the dead channels out of model, optimizers and averages, and tell the other callbacks."""
        removed = cut_of(self._here(), self._alive_here())
        self._free(pl_module)
        cut(pl_module, removed, trainer.optimizers, _lightning.averages_of(trainer))
        self._left = self.channels
        for callback in _lightning.callbacks_of(trainer):
            if on_cut := getattr(callback, "on_cut", None):
                on_cut(trainer, pl_module, removed)

    def _free(self, pl_module: LightningModule) -> None:
        """Detach what modules keep of a forward pass: in its graph weights have the shapes before the cut."""
        for name, tensor in kept_graphs(pl_module):
            warn(
                f"{name} keeps a graph of the network before the cut, and is detached. Detach what you keep."
            )
            with suppress(RuntimeError):  # of a view
                tensor.detach_()
        kept = [name for name, p in self.prunable(pl_module).items() if in_a_graph(p)]
        if kept and self.remove == "each_round":
            raise ValueError(
                f"{', '.join(kept)}: a graph of the network before the cut is kept, by which no backward "
                "pass can go any more. Allowed is to keep what is detached. Detach what you keep of a "
                "forward pass, or use remove='end'."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: optim.Optimizer
    ) -> None:
        if not self.slimming:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for site in {site for coupling in self._couplings.values() for site in coupling.scales}:
            gamma = pl_module.get_parameter(parameter(site))
            if id(gamma) in own and gamma.grad is not None:
                gamma.grad.add_(gamma.detach().sign(), alpha=self.slimming)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.remove == "end":
            self._cut(trainer, pl_module)
            self.masks = {}  # of weights that are no longer there
        super().on_fit_end(trainer, pl_module)
        smaller = not all(bool(left.all()) for left in self._left.values())
        if smaller:
            name = type(pl_module).__name__
            log.info(
                f"{name} is smaller than its class builds it: lightning_prune.load_pruned({name}(...), path) "
                f"loads its checkpoints, as does {name}.load_from_checkpoint(path) if its on_load_checkpoint "
                "cuts it."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        """Let the modules load checkpoints as they did before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        own = as_state(self._couplings, self.channels, self._left)
        return {**super().state_dict(), "masks": {}, **own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._couplings, self.channels, self._left = of_state(state_dict)


def _no_example(pl_module: LightningModule, *errors: Exception) -> ValueError:
    name = type(pl_module).__name__
    first, *_, last = (str(error).partition(". Allowed")[0] for error in (*errors, errors[-1]))
    step = (
        f"nor with a batch through training_step ({last})"
        if pl_module.automatic_optimization
        else "and training_step steps its optimizers itself (automatic_optimization=False), so that no batch "
        "can be traced through it"
    )
    return ValueError(
        f"{name}: channels cannot be found with the first of a batch as the input of forward ({first}), "
        f"{step}. Allowed is what forward takes. Give it as example_input=, or set example_input_array of "
        f"{name} to it."
    )
