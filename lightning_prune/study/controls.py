"""Controls: what a finished ticket began with, one thing of it changed, trained again.

A control is a function `(start, **asked) -> Start`, trained once for each of the ticket's rounds in question,
from the state that the ticket rewound to, for as long as its rounds were. It gets, by keyword, those of the
following that its signature names:

- `generator`: of the run's kind and seed, the same in every round;
- `other`: that of `kind=reinit`, for what is compared with it;
- `network`: a freshly built one that it may change;
- `lifetimes`: in how many of the ticket's rounds each weight was alive;
- `dense`: the weights of the dense network at the end of its training, which is then trained first;
- `trained`: tensors -> the state dict of the dense network that is trained from them;
- `inputs`: batches of the inputs of the training set;
- `prune`: (criterion, weights, parts) -> masks of the ticket's size in this round. Each part, a list of names
  of weights, keeps its size; None: weights that share a budget, divided by the experiment's allocation.
"""

import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from typing_extensions import final, override

from lightning_prune.allocation import AtLeast, global_rank
from lightning_prune.criteria import Random
from lightning_prune.evidence import OF_A_RUN, asked
from lightning_prune.files import replacing
from lightning_prune.layers import layouts
from lightning_prune.masks import Masks, alive
from lightning_prune.pruning import Criterion, scheduled
from lightning_prune.selection import Scores
from lightning_prune.shards import checksum
from lightning_prune.structured import discover
from lightning_prune.study import tickets
from lightning_prune.study.alignment import matched, permuted
from lightning_prune.study.equal_size import of_equal_size
from lightning_prune.study.records import Record, read
from lightning_prune.study.round_masks import lifetimes
from lightning_prune.study.tickets import (
    Begin,
    Start,
    Ticket,
    chosen,
    each_round,
    finished,
    finished_masks,
    train_from,
    trained_from,
)
from lightning_prune.study.training import built

Prune = Callable[[Criterion, Mapping[str, Tensor], Sequence[Sequence[str]] | None], Masks]
Control = Callable[..., Start]


# ------------------------------------------------------------------------------------------ other weights


def reinitialized(
    start: Start,
    network: nn.Module,
    generator: torch.Generator,
    init: Callable[[nn.Module], None] | None = None,
) -> Start:
    """The ticket's masks on another initialization.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Section 2.
    """
    return replace(start, tensors=initialize(network, generator, init))


def signed_reinit(
    start: Start,
    network: nn.Module,
    generator: torch.Generator,
    init: Callable[[nn.Module], None] | None = None,
) -> Start:
    """Magnitudes of another initialization, signs of the ticket's; other parameters are the ticket's.

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 4.1.
    """
    new = initialize(network, generator, init)
    weights = {name: new[name].abs() * start.tensors[name].sign() for name in start.masks}
    return replace(start, tensors={**start.tensors, **weights})


def sign_only(start: Start) -> Start:
    """The ticket's signs, and one magnitude in each tensor: the standard deviation of all of its weights.

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 4.1 ("constant").
    """
    weights = {n: start.tensors[n].sign() * start.tensors[n].std(correction=0) for n in start.masks}
    return replace(start, tensors={**start.tensors, **weights})


def aligned(
    start: Start,
    network: nn.Module,
    other: torch.Generator,
    trained: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    init: Callable[[nn.Module], None] | None = None,
) -> Start:
    """The ticket's masks on the initialization of `kind=reinit`, in the order of that one's units.

    The dense network is trained from both initializations, and the units of the one are matched to those of
    the other by what they compute.

    Raises:
        ValueError: when the network has no channels that can be exchanged.
        ImportError: without torch-pruning (the extra `channels`).

    Reference: Adnan et al. (2025), arXiv:2505.05143.
    """
    tensors = initialize(network, other, init)
    couplings = discover(network, inputs[0][:2])
    orders = matched(network, couplings, trained(start.tensors), trained(tensors), inputs)
    return Start(tensors, permuted(start.masks, couplings, orders))


def initialize(
    network: nn.Module, generator: torch.Generator, init: Callable[[nn.Module], None] | None = None
) -> dict[str, Tensor]:
    """Initialize a network anew, and return its parameters and buffers.

    Args:
        network: every module of it that has parameters of its own is initialized by its `reset_parameters`,
            inner modules before those that contain them.
        generator: gives the seed; the global generators are left alone.
        init: called on each of these modules instead.

    Raises:
        ValueError: naming the modules that have parameters and no `reset_parameters`.
    """
    owners = {n: m for n, m in network.named_modules() if next(m.parameters(recurse=False), None) is not None}
    if init is None and (lacking := [n for n, m in owners.items() if not hasattr(m, "reset_parameters")]):
        types = ", ".join(f"{name} ({type(owners[name]).__name__})" for name in lacking)
        raise ValueError(
            f"these modules have parameters and no reset_parameters: {types}. Give them one, or set "
            "run.control.init to a function that initializes a module: each module needs one of the two."
        )
    seed = int(torch.randint(2**62, (), generator=generator))
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in owners.values() if init else reversed(list(network.modules())):
            if init is not None:
                init(module)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    return {n: t.detach().clone() for n, t in (*network.named_parameters(), *network.named_buffers())}


# -------------------------------------------------------------------------------------------- other masks


def shuffled(start: Start, prune: Prune, generator: torch.Generator) -> Start:
    """The ticket's masks, shuffled within each layer, in whole units of the granularity.

    Reference: Frankle et al. (2021), arXiv:2009.08576, Section 4.
    """
    layers = [[name] for name in start.masks]
    return replace(start, masks=prune(_drawn(generator), start.tensors, layers))


def shuffled_globally(start: Start, prune: Prune, generator: torch.Generator) -> Start:
    """The ticket's masks, shuffled across all layers, in whole units of the granularity."""
    return replace(start, masks=prune(_drawn(generator), start.tensors, [list(start.masks)]))


def random(start: Start, prune: Prune, generator: torch.Generator) -> Start:
    """As many weights as the ticket has, drawn at random, divided by the experiment's allocation.

    With a layer-wise allocation that is another draw of what `shuffled` draws, with a global one of what
    `shuffled_globally` draws.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Appendix E.
    """
    return replace(start, masks=prune(_drawn(generator), start.tensors, None))


def inverted(start: Start, prune: Prune, lifetimes: dict[str, Tensor], generator: torch.Generator) -> Start:
    """As many weights as the ticket has, those that it lost first; equals are drawn.

    Reference: Frankle et al. (2021), arXiv:2009.08576, Section 4.
    """

    def lost_first(params: dict[str, Tensor]) -> Scores:
        return {n: torch.rand(w.shape, generator=generator) - lifetimes[n].float() for n, w in params.items()}

    return replace(start, masks=prune(lost_first, start.tensors, None))


@dataclass(frozen=True)
class OneShot:
    """As many weights as the ticket has, chosen by the dense network's training alone.

    Args:
        criterion: which.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Figure 4c.
    """

    criterion: Criterion

    def __call__(self, start: Start, prune: Prune, dense: dict[str, Tensor]) -> Start:
        return replace(start, masks=prune(self.criterion, dense, None))


def _drawn(generator: torch.Generator) -> Random:
    return Random(int(torch.randint(2**62, (), generator=generator)))


# ------------------------------------------------------------------------------------------- their training


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be a control of this experiment, before its ticket is trained.

    Raises:
        ValueError: naming the key.
    """
    if OmegaConf.select(cfg, "run.control") is None:
        return  # a small dense network starts from weights of its own
    tickets.check(cfg)
    control = instantiate(cfg.run.control)
    if isinstance(control, OneShot):
        if data := sorted(OF_A_RUN & asked(control.criterion).keys()):
            raise ValueError(
                f"criterion={cfg.criterion}: kind={cfg.kind} ranks the weights of the trained dense network, "
                f"and this criterion asks for {', '.join(data)}. Allowed are criteria that read weights "
                "alone, such as criterion=magnitude."
            )
        schedule = instantiate(cfg.pruner).schedule
        for of_group in schedule.values() if isinstance(schedule, dict) else [schedule]:
            if not asked(of_group) and of_group(0) > 0:
                raise ValueError(
                    f"schedule={of_group}: kind={cfg.kind} prunes the trained dense network, and there is "
                    f"none where round 0 has sparsity {of_group(0)}. Allowed are schedules that are 0 in "
                    "round 0, such as schedule=geometric."
                )


def train(cfg: DictConfig, folder: Path, control: Control) -> None:
    """Train a control at the ticket's rounds `cfg.controls_at`, None for all of them.

    Raises:
        ValueError: before anything is trained, when the control has none of the ticket's size in some round.
    """
    check(cfg)
    ticket = finished(cfg)
    asked_for = signature(control).parameters

    def begin(round: int, first: "_First") -> Start:
        start = ticket.start(round)
        evidence = {
            "generator": lambda: generator_of(cfg, cfg.kind),
            "other": lambda: generator_of(cfg, "reinit"),
            "network": lambda: built(cfg),
            "lifetimes": lambda: lifetimes(ticket.masks),
            "dense": lambda: first.dense,
            "trained": lambda: first.trained,
            "inputs": lambda: first.inputs,
            "prune": lambda: partial(_prune, cfg, start),
        }
        return control(start, **{name: value() for name, value in evidence.items() if name in asked_for})

    def train_one(round: int, folder: Path) -> list[Record]:
        if round or "dense" not in asked_for:
            start = begin(round, _Trained(cfg, folder.parent, ticket))
        else:
            start = ticket.start(0)
        task = built(cfg)
        train_from(cfg, folder, task, round, ticket.steps, Begin(start, ticket.snapshot))
        if not round and "dense" in asked_for:
            with replacing(folder.parent / _DENSE) as file:
                torch.save({name: w.detach().clone() for name, w in task.named_parameters()}, file)
        return read(folder / "records.jsonl")[0]

    for round in chosen(cfg, ticket.rounds):
        begin(round, _Untrained(cfg, ticket))
    each_round(cfg, folder, ticket.rounds, train_one, dense="dense" in asked_for)
    shutil.rmtree(folder / _TRAINED, ignore_errors=True)


_DENSE = "dense.pt"
_TRAINED = "trained"  # the folder of what is trained for a control, beside it


class _First(ABC):
    """What is trained before a control can begin."""

    @property
    @abstractmethod
    def dense(self) -> Mapping[str, Tensor]:
        """The weights of the dense network at the end of its training."""

    @abstractmethod
    def trained(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict of the dense network that is trained from these tensors."""

    @property
    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """Batches of the training set."""


@final
@dataclass(frozen=True)
class _Trained(_First):
    cfg: DictConfig
    folder: Path
    ticket: Ticket

    @property
    @override
    def dense(self) -> Mapping[str, Tensor]:
        return torch.load(self.folder / _DENSE, weights_only=True)

    @override
    def trained(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        masks = {name: torch.ones_like(mask) for name, mask in self.ticket.start(0).masks.items()}
        begin = Begin(Start(dict(tensors), masks), self.ticket.snapshot)
        own = self.folder / _TRAINED / f"{checksum(tensors):08x}"
        own.parent.mkdir(exist_ok=True)
        return trained_from(self.cfg, own, 0, self.ticket.steps, begin)

    @property
    @override
    def inputs(self) -> list[Tensor]:
        batches = instantiate(self.cfg.batches)
        return [x for x, _ in batches.in_order(batches.splits.train)]


@final
@dataclass(frozen=True)
class _Untrained(_First):
    """In place of the trained ones, to see what fails before anything is trained."""

    cfg: DictConfig
    ticket: Ticket

    @property
    @override
    def dense(self) -> Mapping[str, Tensor]:
        return self.ticket.snapshot.tensors

    @override
    def trained(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        task = built(self.cfg)
        task.load_state_dict(tensors, strict=False)
        return task.state_dict()

    @property
    @override
    def inputs(self) -> list[Tensor]:
        batches = instantiate(self.cfg.batches)
        return [next(iter(batches.train_dataloader()))[0]]


def generator_of(cfg: DictConfig, kind: str) -> torch.Generator:
    """The same in every round, and another for each kind and seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{kind}-{cfg.seed}".encode()))


def _prune(
    cfg: DictConfig,
    start: Start,
    criterion: Criterion,
    weights: Mapping[str, Tensor],
    parts: Sequence[Sequence[str]] | None,
) -> Masks:
    """Masks of the size of the start's, in each part; None: each group of one schedule."""
    pruner = instantiate(cfg.pruner)
    allocate = pruner.allocate if parts is None else AtLeast(0, of=global_rank)
    parts = parts or [names for names, _ in scheduled(list(start.masks), pruner.schedule)]
    axes = criterion, allocate, pruner.granularity, layouts(instantiate(cfg.task), start.masks)
    return of_equal_size(start.masks, weights, parts, *axes, initial=start.tensors)


# ------------------------------------------------------------------------------------- a small dense network


def small_dense(cfg: DictConfig, folder: Path) -> None:
    """Train, for each of the rounds, a dense network with about as many weights as the ticket had left."""
    masks_of_ticket, pruner = finished_masks(cfg), instantiate(cfg.pruner)
    classes = int(instantiate(cfg.batches).splits.train[1].max()) + 1

    def count(network: nn.Module) -> int:
        weights = pruner.prunable(nn.ModuleDict({"net": network})).values()  # named as in the task
        return sum(w.numel() for w in weights)

    def train_one(round: int, folder: Path) -> list[Record]:
        masks = masks_of_ticket[round]
        total = sum(mask.numel() for mask in masks.values())
        small = OmegaConf.merge(cfg, {"model": narrowed(cfg.model, alive(masks), count, classes)})
        assert isinstance(small, DictConfig)
        train_from(small, folder, built(small), round, cfg.steps_per_round)
        records, _ = read(folder / "records.jsonl")
        return [{**r, "total": total, "sparsity": (total - r["alive"]) / total} for r in records]

    each_round(cfg, folder, list(masks_of_ticket), train_one)


WIDTHS = ("hidden", "width", "widths")


def narrowed(
    model: DictConfig, weights: int, count: Callable[[nn.Module], int], least: int = 1
) -> dict[str, Any]:
    """The widths of a network, scaled so that the number of its weights is nearest to a given one.

    No fully connected layer (`hidden`) gets fewer units than `least`: with fewer than there are classes it
    would be a bottleneck that the ticket does not have.

    Args:
        model: the config of a network; its entries named in `WIDTHS`, numbers or lists, are scaled.
        weights: how many it is to have.
        count: counts them.
        least: units that a fully connected layer has at least.

    Raises:
        ValueError: when the config has no such entry.
    """
    widths = {
        key: OmegaConf.to_object(model[key]) if OmegaConf.is_list(model[key]) else model[key]
        for key in WIDTHS
        if key in model
    }
    if not widths:
        raise ValueError(
            f"model: none of {', '.join(WIDTHS)} is in {model}; a small network needs a width to change. "
            "Choose a model= that has one, or leave kind=small_dense out."
        )

    def scaled(by: float) -> dict[str, Any]:
        def one(key: str, width: Any) -> int:
            return max(min(width, least) if key == "hidden" else 1, round(width * by))

        return {
            key: [one(key, w) for w in width] if isinstance(width, list) else one(key, width)
            for key, width in widths.items()
        }

    def size(by: float) -> int:
        with torch.device("meta"):
            network = instantiate({**model, **scaled(by)})
        return count(network)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < weights else (low, middle)
    best = min((low, high), key=lambda by: abs(size(by) - weights))
    return scaled(best)
