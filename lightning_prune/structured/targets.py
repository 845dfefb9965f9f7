"""Targets: which units stay, as far as a pruning goes; sparsity may be of parameters or multiply-adds, too.

Budgets, ties and masks are those of weight pruning.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import final, override

from lightning_prune.allocation import Allocation, AtLeast, global_rank
from lightning_prune.checks import check_callable, named, number
from lightning_prune.deploy.summary import multiply_adds as all_multiply_adds
from lightning_prune.evidence import asked, call, parameters_of, undisturbed
from lightning_prune.masks import Masks, alive
from lightning_prune.pruning import Sparsity, budget, told
from lightning_prune.selection import DEAD, Scores, keep_top, only, select
from lightning_prune.structured.surgery import Site
from lightning_prune.structured.trial import first_line, input_of, run, runs_itself
from lightning_prune.structured.units import (
    HEADS,
    Coupling,
    Couplings,
    cut_of,
    is_maker,
    out_dimension,
    parameter,
)

# of weights by name, and of a site whose indices count besides: the shape, and how often each element counts
Elements = Mapping[str | Site, tuple[Sequence[int], float]]
Quantity = Literal["parameters", "multiply_adds", "bytes"]
FRACTIONS = "are schedules and fractions from 0 to below 1, such as 0.5"
SIZES = "are sizes in bytes, above 0, such as 5_000_000"
_SLACK = 0.02  # of all units: so many more than were asked for stay without a word
REST = ""  # what is counted of no weight and no site


class Now(NamedTuple):
    """The network as it is before a pruning, measured when it is asked for."""

    removed: Callable[[Quantity], float]  # the part of it that is gone
    stored: Callable[[], float]  # its bytes
    faster: Callable[[], float]  # how many times as fast it is as with all channels


class Target(ABC):
    """A schedule of what a network is to come to: the sparsity of a round is the least that reaches it.

    Called with a round, it asks for `removed`, `stored` or `faster`, as a schedule may ask for scores.
    """

    @abstractmethod
    def comparison(self, round: int, now: Now, rounds: int | None = None) -> str | None:
        """What is asked for in a round, and what there is now, in words; None where nothing is asked for."""


@final
@dataclass(frozen=True)
class Removed(Target):
    """A schedule of what is removed of the parameters or multiply-adds: the least sparsity that reaches it.

    Fractions are those of the whole model. Where a schedule is given for each of several patterns, what each
    removes is counted alone.

    >>> Removed(0.75)(1, removed=lambda sparsity, multiply_adds: 1 - (1 - sparsity) ** 2)
    0.5

    Args:
        schedule: round -> fraction that is to be gone; or a number in [0, 1), that of every round from 1 on.
        of: "parameters", or "multiply_adds": those on the example input, as `summarize` counts them, products
            of attentions among them.

    Raises:
        ValueError: when the removable channels do not make up as much.
    """

    schedule: float | Callable[[int], float]
    of: Literal["parameters", "multiply_adds"] = "parameters"

    def __post_init__(self) -> None:
        if self.of not in ("parameters", "multiply_adds"):
            raise ValueError(f"of={self.of!r}: allowed are 'parameters' and 'multiply_adds'. Give one.")
        if callable(self.schedule):
            check_aim("schedule", self.schedule, FRACTIONS)
        else:
            number("schedule", self.schedule, FRACTIONS, lambda v: 0 <= v < 1)

    def __call__(
        self, round: int, removed: Callable[[float, Quantity], float], rounds: int | None = None
    ) -> float:
        if not (target := self._of(round, rounds)):
            return 0.0
        if (most := removed(1.0, self.of)) < target:
            raise ValueError(
                f"schedule: {target} of the {self.of.replace('_', '-')} is to be removed in round {round}, "
                "and without all removable channels but the few that each layer has to keep, "
                f"{most:.4f} would be; allowed is less than that. Lower the schedule."
            )
        return _least(lambda sparsity: removed(sparsity, self.of) >= target)

    @override
    def comparison(self, round: int, now: Now, rounds: int | None = None) -> str | None:
        if not (target := self._of(round, rounds)):
            return None
        what = self.of.replace("_", "-")
        return f"{target:g} of the {what} are to be gone, and {now.removed(self.of):.4f} are"

    def _of(self, round: int, rounds: int | None) -> float:
        target = aim(self.schedule, round, rounds, 0.0)
        number(f"schedule({round})", target, FRACTIONS, lambda v: 0 <= v < 1)
        return target


@final
@dataclass(frozen=True)
class Smaller(Target):
    """A schedule of the size that the weights have in a file: the least sparsity that comes down to it.

    The size is that of all parameters and persistent buffers, in bytes, as `torch.save(model.state_dict())`
    stores them: the whole memory of those that are a part of a larger one, once where they share it, and what
    modules give as `get_extra_state`. Names and places take some hundred bytes a tensor more.

    It is the size of the whole network: where each of several patterns has a schedule, each goes on from what
    those before it leave.

    >>> Smaller(1_000_000)(1, stored=lambda sparsity: 4_000_000 * (1 - sparsity) ** 2)
    0.5

    Args:
        bytes: at most so many, above 0, from round 1 on; or round -> bytes.

    Raises:
        ValueError: when the network without all removable channels is larger.
    """

    bytes: float | Callable[[int], float]

    def __post_init__(self) -> None:
        if callable(self.bytes):
            check_aim("bytes", self.bytes, SIZES)
        else:
            number("bytes", self.bytes, SIZES, lambda v: v > 0)

    def __call__(self, round: int, stored: Callable[[float], float], rounds: int | None = None) -> float:
        target = self._of(round, rounds)
        if stored(0.0) <= target:
            return 0.0
        if (least := stored(1.0)) > target:
            raise ValueError(
                f"bytes: {target:g} are wanted in round {round}, and without all removable channels but the "
                f"few that each layer has to keep the weights are {least:g}; allowed are at least as many. "
                "Raise it."
            )
        return _least(lambda sparsity: stored(sparsity) <= target)

    @override
    def comparison(self, round: int, now: Now, rounds: int | None = None) -> str | None:
        if (target := self._of(round, rounds)) == math.inf:
            return None
        return f"at most {target:.0f} bytes are wanted, and the weights take {now.stored():.0f}"

    def _of(self, round: int, rounds: int | None) -> float:
        target = aim(self.bytes, round, rounds, math.inf)
        number(f"bytes({round})", target, SIZES, lambda v: v > 0)
        return target


def check_aim(argument: str, given: Callable[..., Any], allowed: str) -> None:
    """Refuse a function that a target cannot aim at: it may ask for a round, and for `rounds`.

    >>> check_aim("bytes", Smaller(3), SIZES)
    Traceback (most recent call last):
    ValueError: bytes=Smaller(bytes=3): a target is given to a target; allowed are sizes in bytes, ...

    Raises:
        ValueError: then.
    """
    kind = given if isinstance(given, type) else type(given)
    if issubclass(kind, Target):
        raise ValueError(
            f"{argument}={named(given)}: a target is given to a target; allowed {allowed}, and schedules of "
            "them. Give one, or that target alone."
        )
    check_callable(argument, given, 1)
    rest = list(parameters_of(given).values())[1:]
    named_ones = [
        p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "rounds"
    ]
    if needed := [p.name for p in named_ones if p.default is p.empty]:
        raise ValueError(
            f"{argument}={named(given)}: it asks for `{'`, `'.join(needed)}`, which a target does not have; "
            "allowed are functions of the round, and of `rounds`. Give one."
        )


def aim(given: Callable[..., Any] | float, round: int, rounds: int | None, dense: float) -> Any:
    """What a target says of a round: a number of all rounds but 0, or what its schedule says.

    >>> aim(100, 0, None, math.inf), aim(lambda round: 100 - round, 2, None, math.inf)
    (inf, 98)

    Args:
        given: the number, or round -> number.
        round: the round.
        rounds: how many there are, for schedules that ask for it.
        dense: what holds in round 0, if a number was given.
    """
    if not callable(given):
        return given if round else dense
    target = told(given, rounds)(round)
    return target.item() if isinstance(target, Tensor) and target.numel() == 1 else target


def _least(reached: Callable[[float], bool]) -> float:
    """The least sparsity that reaches a target, which 1 reaches."""
    low, high = 0.0, 1.0
    for _ in range(30):  # halves of halves: exact to far less than a channel
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


class Memory(NamedTuple):
    """Bytes that a file holds as long as one of the tensors of these names is not cut."""

    bytes: int
    names: frozenset[str]


def cost(couplings: Couplings, alive: Masks, weights: Elements, memories: Sequence[Memory] = ()) -> float:
    """The elements left of all weights, each counted as often as it says, with these units.

    Args:
        couplings: in the coordinates of the full-size network.
        alive: the units.
        weights: as `elements` gives them.
        memories: what the tensors in them take until they are cut, whatever their elements count.
    """
    sizes = {name: list(shape) for name, (shape, _) in weights.items()}
    smaller: set[str | Site] = set()
    for site, gone in cut_of(couplings, alive).items():
        smaller.add(parameter(site))
        if parameter(site) in sizes:
            sizes[parameter(site)][site[2]] -= len(gone)
        if site in sizes:
            sizes[site][0] -= len(gone)
    whole = {name for memory in memories for name in memory.names} - smaller
    counted = sum(math.prod(size) * weights[name][1] for name, size in sizes.items() if name not in whole)
    return counted + sum(memory.bytes for memory in memories if not memory.names <= smaller)


def elements(model: nn.Module, example: Any, couplings: Couplings, of: Quantity) -> Elements:
    """The elements of a model's weights, each as often as it counts: for multiply-adds, on the example."""
    if of == "multiply_adds":
        shapes: dict[str | Site, Sequence[int]] = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return with_shapes(uses(model, example, couplings), shapes, couplings)
    return {name: (tuple(t.shape), count) for name, (t, count) in held(model, of).items()}


def held(model: nn.Module, of: Quantity) -> dict[str, tuple[Tensor, float]]:
    """What a model has by name, each tensor once: its parameters, or what its state dict takes in bytes.

    >>> {name: count for name, (_, count) in held(nn.BatchNorm1d(3), "bytes").items()}
    {'weight': 4.0, 'bias': 4.0, 'running_mean': 4.0, 'running_var': 4.0, 'num_batches_tracked': 8.0}
    """
    if of != "bytes":
        return {name: (p, 1.0) for name, p in model.named_parameters()}
    return {name: (t, float(t.element_size())) for name, t in _in_state(model) if _in_plain_memory(t)}


def memories(model: nn.Module) -> list[Memory]:
    """What `torch.save` writes of a model's state dict: memory after memory, and all else as one.

    >>> memories(nn.Linear(3, 2, bias=False))
    [Memory(bytes=24, names=frozenset({'weight'}))]

    Raises:
        ValueError: when it cannot write what a module gives as its extra state.
    """
    places: dict[tuple[int, str], tuple[int, set[str]]] = {}
    others: dict[str, Any] = {}
    for name, value in _in_state(model):
        if _in_plain_memory(value):
            memory = value.untyped_storage()
            place = places.setdefault((memory.data_ptr(), str(value.device)), (memory.nbytes(), set()))
            place[1].add(name)
        else:
            others[name] = value
    found = [Memory(size, frozenset(names)) for size, names in places.values() if size]
    return [*found, Memory(_written(others) - _written({}), frozenset({REST}))] if others else found


def _in_state(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """What is in a model's state dict, by the names that its tensors have in the model, each tensor once."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = {id(t): name for name, t in tensors}
    state = model.state_dict(keep_vars=True)
    return {names.get(id(value), key): value for key, value in state.items()}.items()


def _in_plain_memory(value: Any) -> bool:
    """Whether a tensor is its elements, one after the other, in a memory of its own or of others, too."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _written(state: Mapping[str, Any]) -> int:
    file = io.BytesIO()
    try:
        torch.save(dict(state), file)
    except Exception as error:  # whatever a user's object raises
        raise ValueError(
            f"bytes: torch.save cannot write {', '.join(state)} of the state dict ({first_line(error)}), so "
            "it has no size; allowed is what it can. Give tensors and plain containers in get_extra_state."
        ) from error
    return file.tell()


def with_shapes(
    often: Mapping[str | Site, float], shapes: Mapping[str | Site, Sequence[int]], couplings: Couplings
) -> Elements:
    """How often elements count, of `uses`, with the shapes of weights in the full-size network."""
    sizes = {site: (len(c.sites[site][0]),) for c in couplings.values() for site in c.filters}
    every = {REST: (1,), **shapes, **sizes}
    return {key: (every[key], count) for key, count in often.items()}


def uses(model: nn.Module, example: Any, couplings: Couplings | None = None) -> dict[str | Site, float]:
    """How many multiply-adds each element of a weight does on the example: {weight name: uses}.

    >>> uses(nn.Linear(3, 2), [4, 3])
    {'weight': 4.0}

    Args:
        model: any module.
        example: an input.
        couplings: of heads count what products in the same module do, under the site of their first weight:
            so many an index.

    Returns:
        The counts, and what is left of all multiply-adds of the model under "".
    """
    found: dict[str | Site, float] = {}
    layers = {m: name for name, m in model.named_modules() if is_maker(m)}
    names = {id(p): name for name, p in model.named_parameters()}
    elements: dict[str | Site, int] = {}

    def count(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        wide = args[0] if getattr(module, "transposed", False) else output  # it is used at its inputs
        channels = module.weight.shape[0] if getattr(module, "transposed", False) else _outputs(module)
        name = names.get(id(module.weight), f"{layers[module]}.weight")
        found[name] = found.get(name, 0.0) + wide.numel() / channels
        elements[name] = module.weight.numel()

    handles = [layer.register_forward_hook(count) for layer in layers]
    here = input_of(model, example)
    try:
        with torch.no_grad(), undisturbed(model), runs_itself(model):
            model.eval()
            counts = all_multiply_adds(model, here, run)
    finally:
        for handle in handles:
            handle.remove()
    rest = counts[""] - sum(found[name] * elements[name] for name in found)
    for coupling in (couplings or {}).values():
        if coupling.structure == HEADS:
            owners = {parameter(site).rpartition(".")[0].rpartition(".")[0] for site in coupling.filters}
            if coupling.filters[0][1] != "weight":  # of the module itself
                owners = {coupling.filters[0][0]}
            own = sum(_alone(model, counts, name) for name in owners)
            found[coupling.filters[0]] = own / len(coupling.sites[coupling.filters[0]][0])
            rest -= own
    return found if rest < 1 else {**found, REST: rest}


def _outputs(module: Any) -> int:
    return module.weight.shape[out_dimension(module)]


def _alone(
    model: nn.Module,
    counts: Mapping[str, int],
    name: str,
) -> float:
    """Multiply-adds that a module does itself, in none of the modules in it."""
    children = [f"{name}.{child}".lstrip(".") for child, _ in model.get_submodule(name).named_children()]
    return float(counts[name] - sum(counts[child] for child in children))


class Wanted(NamedTuple):
    """What is wanted of some couplings: a fraction of their units to be gone, or a function that says it."""

    names: Sequence[str]
    sparsity: Sparsity
    argument: str = ""  # that says it, for messages


def next_units(
    couplings: Couplings,
    scores: Scores,
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], Sparsity] | Wanted],
    allocate: Allocation = global_rank,
    round_to: int = 1,
    at_least: int = 1,
    cost: Callable[[Masks, Quantity], float] | None = None,
    speed: Callable[[Masks], float] | None = None,
    say: Callable[[str, str, str], None] | None = None,
) -> Masks:
    """One pruning of units: which are alive after it. Masks only shrink, and no coupling is left empty.

    Args:
        couplings: from `discover`.
        scores: of the units, from `unit_scores`.
        masks: which of them are alive now.
        sparsities: names of couplings and the fraction of their units that is to be gone, or a function that
            says it of what its signature names: `scores`; `removed`, (sparsity, quantity) -> the part of the
            whole network that is gone with these couplings alone; `stored`, sparsity -> the bytes of the
            network then; or `faster`, sparsity -> how many times as fast it is then. These two are of the
            network as those before leave it.
        allocate: how many where.
        round_to: the channels left of each coupling are rounded up to a multiple of this; then fewer go than
            `sparsities` say, as they do where else nothing would be left of a tensor.
        at_least: units left of each.
        cost: (units alive, quantity) -> how much of it the network has, for `Removed` and `Smaller`.
        speed: units alive -> how many times as fast the network is with these, for `Faster`.
        say: is told where something is wanted of couplings that are whole, and nothing goes, or where units
            stay that were to go, because something has to (what `round_to` and `at_least` keep is no
            surprise): the argument that wants it, why, and what to do.

    Returns:
        The new masks of the names in `sparsities`.

    Raises:
        ValueError: when the score of a unit that is alive is not finite, or a target cannot be reached.
    """
    if needed := {name for name, must in asked(allocate, 2).items() if must} - {"channels", "scores"}:
        raise ValueError(
            f"allocate={named(allocate)} asks for {', '.join(sorted(needed))}; allowed are allocations that "
            "count channels by their scores alone, such as uniform and global_rank. Use one of these."
        )
    if "channels" in asked(allocate, 2):
        allocate = partial(allocate, channels=couplings)
    dense, new = {name: torch.ones_like(mask) for name, mask in masks.items()}, Masks()
    for each in sparsities:
        names, wanted, argument = each if isinstance(each, Wanted) else Wanted(*each)
        own = {name: masks[name] for name in names}
        stay = partial(
            _staying,
            {name: couplings[name] for name in names},
            {name: scores[name] for name in names},
            own,
            allocate=allocate,
            round_to=round_to,
            at_least=at_least,
        )
        others = {**masks, **new}

        def removed(sparsity: float, of: Quantity, stay: Callable[[float], Masks] = stay) -> float:
            assert cost is not None
            return 1 - cost({**dense, **stay(sparsity)}, of) / cost(dense, of)

        def stored(sparsity: float, stay: Callable[[float], Masks] = stay, others: Masks = others) -> float:
            assert cost is not None
            return cost({**others, **stay(sparsity)}, "bytes")

        def faster(sparsity: float, stay: Callable[[float], Masks] = stay, others: Masks = others) -> float:
            assert speed is not None
            return speed({**others, **stay(sparsity)})

        sparsity = 0.0 if callable(wanted) else wanted
        if callable(wanted):
            living = only({name: scores[name] for name in names}, masks)
            by_cost = {"removed": removed, "stored": stored} if cost else {}
            try:
                found: float = call(wanted, scores=living, faster=faster if speed else None, **by_cost)
            except ValueError as error:
                if argument:
                    error.args = (f"{argument}: {error}",)
                raise
            sparsity = found
        units = stay(sparsity)
        as_asked = _compares(wanted) is not None or (round_to, at_least) != (1, 1)
        if say is not None and alive(units) == sum(mask.numel() for mask in own.values()):
            now = Now(partial(removed, 0.0), partial(stored, 0.0), partial(faster, 0.0))
            rest = f"round_to={round_to}, at_least={at_least}"
            if why := _comparison(wanted, sparsity, now, rest):
                say(
                    argument,
                    f"nothing goes of {alive(units)} units, since {why}",
                    "Ask for more, or leave it out",
                )
        elif say is not None and not as_asked and (short := _shortfall(sparsity, units, couplings)):
            say(argument, short, "Ask for less, or leave some of them out with exclude=")
        new.update(units)
    return {name: new[name] for name in masks if name in new}


def without_measuring(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those that need no measured speed, nor the size of what is left after one that does."""
    found: list[Wanted] = []
    measured = False
    for one in wanted:
        wants = asked(one.sparsity, 0) if callable(one.sparsity) else {}
        measured |= "faster" in wants
        if not ("faster" in wants or (measured and "stored" in wants)):
            found.append(one)
    return found


def _comparison(wanted: Sparsity, sparsity: float, now: Now, rest: str) -> str | None:
    """What is wanted of couplings that are whole, and what there is, in words; None where nothing is."""
    if (compare := _compares(wanted)) is not None:
        return compare(now=now)
    return f"{sparsity:g} of them is less than one with {rest}" if sparsity else None


def _compares(wanted: Sparsity) -> Callable[..., str | None] | None:
    """How a target says in a round what is wanted and what there is; None of what is no target."""
    if isinstance(wanted, partial) and isinstance(wanted.func, Target):  # and the round
        return partial(wanted.func.comparison, *wanted.args, **wanted.keywords)
    return None


def _shortfall(sparsity: float, units: Masks, couplings: Couplings) -> str | None:
    """That more units stay than were asked for, in words; None where they are few."""
    total = sum(couplings[name].units for name in units)
    asked_for, stay = budget(sparsity, total), alive(units)
    if stay - asked_for <= _SLACK * total:
        return None
    return (
        f"{stay} of {total} units stay, where {asked_for} were asked for, since one is left of each of "
        f"{len(units)} layers and of each tensor that they lie in"
    )


def _staying(
    couplings: Couplings,
    scores: Scores,
    masks: Masks,
    sparsity: float,
    allocate: Allocation,
    round_to: int,
    at_least: int,
) -> Masks:
    """Which units of these couplings stay at a sparsity."""
    for name, values in scores.items():
        if not bool(values[masks[name]].isfinite().all()):
            raise ValueError(
                f"the scores of {name}'s units hold NaN or infinity; allowed are finite numbers. "
                "Nothing was pruned. Look where the training diverged."
            )
    total = budget(sparsity, sum(coupling.units for coupling in couplings.values()))
    if not sparsity or total >= alive(masks):
        return {name: mask.clone() for name, mask in masks.items()}
    total = max(total, sum(min(at_least, int(mask.sum())) for mask in masks.values()))
    new = select(scores, masks, total, AtLeast(at_least, of=allocate), params=scores, masks=masks)
    for name, mask in new.items():
        step, left, before = _step(couplings[name], round_to), int(mask.sum()), int(masks[name].sum())
        rounded = min(before, -(-left // step) * step)
        ranked = scores[name].masked_fill(~masks[name], DEAD)
        if rounded > left:
            new[name] = keep_top(ranked, rounded)
        for part in couplings[name].parts:
            if not new[name][part].any():
                new[name][part[ranked[part].argmax()]] = True
    return new


def _step(coupling: Coupling, round_to: int) -> int:
    """The units of which a multiple has a width that is a multiple of `round_to`."""
    return math.lcm(round_to, coupling.per_unit) // coupling.per_unit


def check_widths(couplings: Couplings, round_to: int, at_least: int) -> None:
    """Refuse widths that leave nothing to remove.

    Raises:
        ValueError: when every coupling is as narrow as `round_to` or `at_least` wants it to stay.
    """
    widest = max(couplings.values(), key=lambda coupling: coupling.units * coupling.per_unit)
    for coupling in couplings.values():
        step = _step(coupling, round_to)
        if -(-at_least // step) * step < coupling.units:
            return
    raise ValueError(
        f"round_to={round_to}, at_least={at_least}: no channel could go. The widest layer, {widest.name}, "
        f"has {widest.units * widest.per_unit} channels in {widest.units} units; allowed are numbers below "
        "these. Give smaller ones."
    )
