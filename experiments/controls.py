"""Controls: what a finished ticket began with, one thing of it changed, trained again.

A control is a function `(start, **asked) -> Start`, trained once for each of the ticket's rounds in question,
from the state that the ticket rewound to, for as long as its rounds were. It gets, by keyword, those of the
following that its signature names:

- `generator`: of the run's kind and seed, the same in every round;
- `network`: a freshly built one that it may change;
- `survived`: how many prunings each weight survived in the ticket's run;
- `dense`: the weights of the dense network at the end of its training, which is then trained first;
- `prune`: (criterion, weights) -> masks of the ticket's size in this round, by the experiment's allocation.
"""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from typing_extensions import override

from experiments.records import read, write
from experiments.statistics import masks_of
from experiments.training import built, fit
from lightning_prune.criteria import Random
from lightning_prune.masks import Masks, Scores, alive
from lightning_prune.pruning import Criterion, groups, next_masks
from lightning_prune.rewind import Snapshot

Prune = Callable[[Criterion, Mapping[str, Tensor]], Masks]


@dataclass(frozen=True)
class Start:
    """What a training begins with: parameters and buffers by name, and the masks put on them."""

    tensors: dict[str, Tensor]
    masks: Masks


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
            "run.control.init to a function that initializes a module."
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


def shuffled(start: Start, generator: torch.Generator) -> Start:
    """The ticket's masks, shuffled within each layer.

    Reference: Frankle et al. (2021), arXiv:2009.08576, Section 4.
    """
    masks = {
        name: _permuted(mask.flatten(), generator).view(mask.shape) for name, mask in start.masks.items()
    }
    return replace(start, masks=masks)


def shuffled_globally(start: Start, generator: torch.Generator) -> Start:
    """The ticket's masks, shuffled across all layers."""
    flat = _permuted(torch.cat([mask.flatten() for mask in start.masks.values()]), generator)
    parts = flat.split([mask.numel() for mask in start.masks.values()])
    return replace(
        start, masks={n: p.view(m.shape) for (n, m), p in zip(start.masks.items(), parts, strict=True)}
    )


def random(start: Start, prune: Prune, generator: torch.Generator) -> Start:
    """As many weights as the ticket has, drawn at random, divided by the experiment's allocation.

    With a layer-wise allocation that is another draw of what `shuffled` draws, with a global one of what
    `shuffled_globally` draws.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Appendix E.
    """
    criterion = Random(int(torch.randint(2**62, (), generator=generator)))
    return replace(start, masks=prune(criterion, start.tensors))


def inverted(start: Start, prune: Prune, survived: dict[str, Tensor], generator: torch.Generator) -> Start:
    """As many weights as the ticket has, those that it lost first; equals are drawn.

    Reference: Frankle et al. (2021), arXiv:2009.08576, Section 4.
    """

    def lost_first(params: dict[str, Tensor]) -> Scores:
        return {n: torch.rand(w.shape, generator=generator) - survived[n].float() for n, w in params.items()}

    return replace(start, masks=prune(lost_first, start.tensors))


@dataclass(frozen=True)
class OneShot:
    """As many weights as the ticket has, chosen by the dense network's training alone.

    Args:
        criterion: which.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Figure 4c.
    """

    criterion: Criterion

    def __call__(self, start: Start, prune: Prune, dense: dict[str, Tensor]) -> Start:
        return replace(start, masks=prune(self.criterion, dense))


def _permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    return flat[torch.randperm(len(flat), generator=generator)]


# ------------------------------------------------------------------------------------------- their training


@dataclass(frozen=True)
class Ticket:
    """What a finished run left behind.

    Args:
        snapshot: the state that it rewound to.
        steps: for which it trained after a rewind.
        survived: how many prunings each weight survived.
        rounds: those that it trained.
    """

    snapshot: Snapshot
    steps: int
    survived: dict[str, Tensor]
    rounds: list[int]

    def start(self, round: int) -> Start:
        """What this round began with."""
        return Start(self.snapshot.tensors, masks_of(self.survived, round))


def finished(cfg: DictConfig) -> Ticket:
    """The ticket in the folder `cfg.ticket`.

    Raises:
        FileNotFoundError: when there is no finished run.
        ValueError: when it did not rewind.
    """
    folder = Path(to_absolute_path(cfg.ticket))
    if not (folder / "final.ckpt").is_file():
        raise FileNotFoundError(
            f"ticket={cfg.ticket}: there is no finished run. A control starts from the ticket's: start the "
            "same command with kind=ticket first."
        )
    if not cfg.rewind:
        raise ValueError(
            f"ticket={cfg.ticket}: it did not rewind, so a control has nothing to start from. Choose an "
            "experiment, or a rewind, that goes back to an early step."
        )
    rewind: Any = instantiate(cfg.rewind)
    state = torch.load(folder / "final.ckpt", map_location="cpu", weights_only=True)["callbacks"]
    rewind.load_state_dict(state[rewind.state_key])
    return Ticket(
        rewind.snapshot,
        cfg.steps_per_round - (state[rewind.state_key]["behind"] if rewind.shorten else 0),
        torch.load(folder / "survived.pt", map_location="cpu", weights_only=True),
        sorted(r["round"] for r in read(folder / "records.jsonl")[0]),
    )


def train(cfg: DictConfig, folder: Path, control: Control) -> None:
    """Train a control at the ticket's rounds `cfg.controls_at`, None for all of them."""
    ticket = finished(cfg)
    asked = signature(control).parameters
    path = folder / "dense.pt"

    def train_one(round: int, folder: Path) -> list[dict[str, Any]]:
        start = ticket.start(round)
        if round or "dense" not in asked:
            evidence = {
                "generator": lambda: generator_of(cfg),
                "network": lambda: built(cfg),
                "survived": lambda: ticket.survived,
                "dense": lambda: torch.load(path, weights_only=True),
                "prune": lambda: partial(_prune, cfg, start),
            }
            start = control(start, **{name: value() for name, value in evidence.items() if name in asked})
        task = built(cfg)
        train_from(cfg, folder, task, round, ticket.steps, Begin(start, ticket.snapshot))
        if not round and "dense" in asked:
            torch.save({name: w.detach().clone() for name, w in task.named_parameters()}, path)
        return read(folder / "records.jsonl")[0]

    each_round(cfg, folder, ticket, train_one, dense="dense" in asked)


def each_round(
    cfg: DictConfig,
    folder: Path,
    ticket: Ticket,
    train_one: Callable[[int, Path], list[dict[str, Any]]],
    dense: bool = False,
) -> None:
    """Train a round at a time, each in a folder of its own; what is recorded already is done."""
    rounds = ticket.rounds if cfg.controls_at is None else list(cfg.controls_at)
    if missing := sorted(set(rounds) - set(ticket.rounds)):
        raise ValueError(f"controls_at: the ticket's run has no rounds {missing}; it has {ticket.rounds}.")
    path = folder / "records.jsonl"
    for round in sorted({*rounds, 0} if dense else rounds):
        records, _ = read(path)
        if any(r["round"] == round for r in records):
            continue
        own = folder / f"round-{round:02}"
        own.mkdir(exist_ok=True)
        records += train_one(round, own)
        write(path, sorted(records, key=lambda r: r["round"]))
        shutil.rmtree(own)


def train_from(
    cfg: DictConfig,
    folder: Path,
    task: LightningModule,
    round: int,
    steps: int,
    begin: "Begin | None" = None,
    order: int | None = None,
) -> None:
    """Train one round, from a start or from initialization, and record it as that round."""
    pruner = instantiate(cfg.pruner)
    pruner.round = round
    callbacks: list[Callback] = [pruner]
    if begin is not None:
        pruner.masks = begin.masks
        if not (folder / "resume.ckpt").is_file():
            callbacks = [begin, pruner]  # which puts the masks on what the other has begun with
    fit(cfg, folder, task, instantiate(cfg.batches), callbacks, steps, order)


class Begin(Callback):
    """Training begins with this start.

    Learning rates and their schedules go on from the snapshot, and so does the rest of the optimizers' state,
    unless the weights are others.

    Args:
        start: what the control made of the ticket's.
        snapshot: the ticket's.
    """

    def __init__(self, start: Start, snapshot: Snapshot) -> None:
        self.masks = start.masks
        self._state = replace(snapshot, tensors=start.tensors, averages=[])
        if start.tensors is not snapshot.tensors:
            without = [{**optimizer, "state": {}} for optimizer in snapshot.optimizers]
            self._state = replace(self._state, optimizers=without)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._state.restore(pl_module, trainer.optimizers, schedulers)


def generator_of(cfg: DictConfig) -> torch.Generator:
    """The same in every round, and another for each kind and seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{cfg.kind}-{cfg.seed}".encode()))


def _prune(cfg: DictConfig, start: Start, criterion: Criterion, weights: Mapping[str, Tensor]) -> Masks:
    """Masks of the size of the start's, in each group of weights that has a schedule of its own."""
    pruner = instantiate(cfg.pruner)
    dense = {name: torch.ones_like(mask) for name, mask in start.masks.items()}
    sparsities = [
        (names, 1 - alive(_only(start.masks, names)) / alive(_only(dense, names)))
        for names, _ in groups(list(dense), pruner.schedule)
    ]
    params = _only(weights, list(dense))
    return next_masks(
        params, dense, sparsities, criterion, pruner.allocate, pruner.granularity, initial=start.tensors
    )


def _only(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


# ------------------------------------------------------------------------------------- a small dense network


def small_dense(cfg: DictConfig, folder: Path) -> None:
    """Train, for each of the rounds, a dense network with about as many weights as the ticket had left."""
    ticket, pruner = finished(cfg), instantiate(cfg.pruner)

    def count(network: nn.Module) -> int:
        weights = pruner.prunable(nn.ModuleDict({"net": network})).values()  # named as in the task
        return sum(w.numel() for w in weights)

    def train_one(round: int, folder: Path) -> list[dict[str, Any]]:
        masks = ticket.start(round).masks
        total = sum(mask.numel() for mask in masks.values())
        small = OmegaConf.merge(cfg, {"model": narrowed(cfg.model, alive(masks), count)})
        assert isinstance(small, DictConfig)
        train_from(small, folder, built(small), round, cfg.steps_per_round)
        records, _ = read(folder / "records.jsonl")
        return [{**r, "total": total, "sparsity": (total - r["alive"]) / total} for r in records]

    each_round(cfg, folder, ticket, train_one)


WIDTHS = ("hidden", "width", "widths")


def narrowed(model: DictConfig, weights: int, count: Callable[[nn.Module], int]) -> dict[str, Any]:
    """The widths of a network, scaled so that the number of its weights is nearest to a given one.

    Args:
        model: the config of a network; its entries named in `WIDTHS`, numbers or lists, are scaled.
        weights: how many it is to have.
        count: counts them.

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
            f"model: none of {', '.join(WIDTHS)} is in {model}; a small network needs a width to change."
        )

    def scaled(by: float) -> dict[str, Any]:
        one = lambda width: max(1, round(width * by))  # noqa: E731
        return {
            k: [one(w) for w in width] if isinstance(width, list) else one(width)
            for k, width in widths.items()
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
