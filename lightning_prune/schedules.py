"""Schedules: how far. A schedule maps the round (0, 1, 2, ...) to the sparsity to have in it, in [0, 1).

Any callable `int -> float` is a schedule; those here are frozen dataclasses, so that YAML can name them. A
schedule whose signature has `scores`, {name: scores of its weights (of their units, with a granularity),
minus infinity where dead}, reads them to say how far.

The round is whatever the clock of the callback counts: with `every_n_train_steps=100` and `Linear` or `Cubic`
it is gradual pruning during training; with a sparsity above 0 in round 0 it is pruning at initialization.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate

import torch
from torch import Tensor

from lightning_prune.checks import number, whole
from lightning_prune.selection import DEAD, Scores, count_above

# (round, and by keyword what it asks for) -> sparsity
if TYPE_CHECKING:
    Schedule = Callable[Concatenate[int, ...], float]
else:  # LightningCLI reads type hints at run time, and knows no Concatenate
    Schedule = Callable[..., float]


def _check_fraction(name: str, value: object) -> None:
    number(name, value, "are fractions between 0 and 1, both excluded, such as 0.2", lambda v: 0 < v < 1)


@dataclass(frozen=True, repr=False)
class Geometric:
    """Prune the same fraction of what is left in every round: 1 - (1 - rate)**round.

    >>> [round(Geometric(rate=0.2)(r), 4) for r in range(4)]
    [0.0, 0.2, 0.36, 0.488]
    >>> [round(Geometric(to=0.9)(r, rounds=4), 4) for r in range(5)]
    [0.0, 0.4377, 0.6838, 0.8222, 0.9]

    Args:
        rate: fraction of the remaining weights that each pruning removes, in (0, 1); by default 0.2.
        to: instead of a rate, the sparsity of the last round, in (0, 1), as the callback says which that is:
            1 - (1 - to)**(round / rounds).

    Raises:
        ValueError: when both are given, or one is out of range.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Section 2.
    """

    rate: float | None = None
    to: float | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.to is not None:
            raise ValueError(f"rate={self.rate}, to={self.to}: allowed is one of them. Leave one out.")
        if self.to is not None:
            _check_fraction("to", self.to)
        else:
            object.__setattr__(self, "rate", 0.2 if self.rate is None else self.rate)
            _check_fraction("rate", self.rate)

    def __repr__(self) -> str:
        return f"Geometric(rate={self.rate})" if self.to is None else f"Geometric(to={self.to})"

    def __call__(self, round: int, *, rounds: int | None = None) -> float:
        if self.to is None:
            assert self.rate is not None
            return 1 - (1 - self.rate) ** round
        if rounds is None:
            raise ValueError(
                f"to={self.to}: it says how sparse the last round is, and nobody says which one that is. "
                "Allowed is a callback's schedule, or a call with rounds=. Give a rate elsewhere."
            )
        return self.to if round == rounds else 1 - (1 - self.to) ** (round / max(1, rounds))


@dataclass(frozen=True)
class OneShot:
    """Dense in round 0, all of the pruning at once after it.

    >>> [OneShot(sparsity=0.9)(r) for r in range(3)]
    [0.0, 0.9, 0.9]

    Args:
        sparsity: fraction of the weights removed, in (0, 1).
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)

    def __call__(self, round: int) -> float:
        return self.sparsity if round else 0.0

    @property
    def last(self) -> int:
        """The round from which on it stays as it is."""
        return 1


@dataclass(frozen=True)
class TopK:
    """Prune the same number of units in every round: round * count of all.

    >>> TopK(count=2)(round=3, scores={"w": torch.rand(10)})
    0.6

    Args:
        count: units that each pruning removes, 1 or more. When nothing would be left, the fit ends.
    """

    count: int = 1000

    def __post_init__(self) -> None:
        whole("count", self.count, 1)

    def __call__(self, round: int, scores: Scores) -> float:
        return min(1.0, round * self.count / _size(scores))


@dataclass(frozen=True)
class Amounts:
    """Prune what a function says: of what is left, a fraction or a number of units.

    It is what Lightning's `ModelPruning` takes as `amount`: called with the round that is over, counted from
    0, which there is the epoch.

    >>> halves = Amounts(lambda over: 0.5 if over < 2 else 0)
    >>> [halves(round, scores={"w": torch.rand(100)}) for round in range(4)]
    [0.0, 0.5, 0.75, 0.75]
    >>> Amounts(lambda over: 3)(round=2, scores={"w": torch.rand(10)})
    0.6

    Args:
        amount: round -> a fraction of what is left, in [0, 1], as float, or a number of units, 0 or more, as
            int. When nothing would be left, the fit ends.

    Raises:
        ValueError: when it is no function, or, as it is asked, what it says is not allowed.
    """

    amount: Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.amount):
            raise ValueError(
                f"amount={self.amount!r}: allowed are functions of the round. For the same amount in each, "
                "take Geometric(rate) for a fraction or TopK(count) for a number."
            )

    def __call__(self, round: int, scores: Scores) -> float:
        left = size = _size(scores)
        for over in range(round):
            amount = self.amount(over)
            amount = amount.item() if isinstance(amount, Tensor) and amount.numel() == 1 else amount
            highest = 1 if isinstance(amount, float) else size
            if type(amount) not in (int, float) or not 0 <= amount <= highest:
                raise ValueError(
                    f"schedule=Amounts: amount({over})={amount!r}: allowed are fractions from 0 to 1 as "
                    f"float, and whole numbers from 0 to {size}. Let it return one, such as 0.2."
                )
            left -= min(left, _of(amount, left))
        return 1 - left / size if size else 0.0


@dataclass(frozen=True)
class Linear:
    """From `initial` to `sparsity` in equal steps: initial + (sparsity - initial) * x.

    x = (round - start) / rounds, from 0 to 1.

    >>> [round(Linear(sparsity=0.8, rounds=4)(r), 2) for r in range(6)]
    [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]

    Args:
        sparsity: reached at round `start + rounds` and held, in [initial, 1).
        rounds: length of the ramp, 1 or more.
        start: round of its beginning, 0 or more; `initial` holds until then.
        initial: in [0, 1).
    """

    sparsity: float = 0.9
    rounds: int = 10
    start: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, round: int) -> float:
        return self.initial + (self.sparsity - self.initial) * _progress(self, round)

    @property
    def last(self) -> int:
        """The round from which on it stays as it is."""
        return self.start + self.rounds


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning, fast at first: sparsity + (initial - sparsity) * (1 - x)^3.

    x = (round - start) / rounds, from 0 to 1. With `every_n_train_steps=dt` in the callback these are the
    paper's t0 = start * dt and n = rounds.

    >>> [round(Cubic(sparsity=0.8, rounds=4)(r), 4) for r in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]

    Args:
        sparsity: reached at round `start + rounds` and held, in [initial, 1).
        rounds: length of the ramp, 1 or more.
        start: round of its beginning, 0 or more; `initial` holds until then.
        initial: in [0, 1).

    Reference: Zhu & Gupta (2017), arXiv:1710.01878, Section 3.
    """

    sparsity: float = 0.9
    rounds: int = 10
    start: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, round: int) -> float:
        return self.sparsity + (self.initial - self.sparsity) * (1 - _progress(self, round)) ** 3

    @property
    def last(self) -> int:
        """The round from which on it stays as it is."""
        return self.start + self.rounds


@dataclass(frozen=True)
class OneCycle:
    """One-cycle pruning: initial + (sparsity - initial) * (1 + e^(b - a)) / (1 + e^(b - a x)).

    x = (round - start) / rounds. Up to round `start` it is `initial`, where the formula gives 0.2 % of the
    way.

    >>> [round(OneCycle(sparsity=0.8, rounds=4)(r), 4) for r in range(6)]
    [0.0, 0.0607, 0.585, 0.7915, 0.8, 0.8]

    Args:
        sparsity: reached at round `start + rounds` and held, in [initial, 1).
        rounds: length of the ramp, 1 or more.
        start: round of its beginning, 0 or more.
        initial: in [0, 1).
        a: steepness, above 0.
        b: place of the steepest slope, x = b / a.

    Reference: Hubens et al. (2021), arXiv:2107.02086.
    """

    sparsity: float = 0.9
    rounds: int = 10
    start: int = 0
    initial: float = 0.0
    a: float = 14.0
    b: float = 6.0

    def __post_init__(self) -> None:
        _check_ramp(self)
        number("a", self.a, "are finite numbers above 0, such as 14", lambda v: 0 < v < math.inf)
        number("b", self.b, "are finite numbers, such as 5", math.isfinite)

    def __call__(self, round: int) -> float:
        if round <= self.start:
            return self.initial
        x = _progress(self, round)
        rise = (1 + math.exp(self.b - self.a)) / (1 + math.exp(self.b - self.a * x))
        return self.initial + (self.sparsity - self.initial) * rise

    @property
    def last(self) -> int:
        """The round from which on it stays as it is."""
        return self.start + self.rounds


@dataclass(frozen=True)
class Explicit:
    """The sparsities of the rounds 0, 1, ... as they are given; the last one holds.

    >>> [Explicit([0.0, 0.5, 0.75])(r) for r in range(4)]
    [0.0, 0.5, 0.75, 0.75]

    Args:
        sparsities: at least one, each in [0, 1); none below the one before it where masks only shrink.
            `[0.9]` prunes at initialization.
    """

    sparsities: Sequence[float]

    def __post_init__(self) -> None:
        given: object = self.sparsities
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(
                f"sparsities={given!r}: allowed are several fractions from 0 to below 1, one for each round. "
                "Give a list, such as [0.0, 0.5]."
            )
        object.__setattr__(self, "sparsities", tuple(self.sparsities))
        if not self.sparsities:
            raise ValueError("sparsities=(): allowed are one or more. Give at least one, such as 0.5.")
        for sparsity in self.sparsities:
            number(
                "sparsities", sparsity, "are fractions from 0 to below 1, such as 0.5", lambda v: 0 <= v < 1
            )

    def __call__(self, round: int) -> float:
        return self.sparsities[min(round, len(self.sparsities) - 1)]

    @property
    def last(self) -> int:
        """The round from which on it stays as it is."""
        return len(self.sparsities) - 1


@dataclass(frozen=True)
class Alternating:
    """Phases of a dense and a sparse network in turn, a dense one first: AC/DC.

    For `DynamicSparseTraining`, whose masks may grow again; its rounds are its updates.

    >>> [Alternating(0.9, dense=1, sparse=2)(r) for r in range(6)]
    [0.0, 0.9, 0.9, 0.0, 0.9, 0.9]

    Args:
        sparsity: of the sparse phases, in (0, 1).
        dense: rounds of a dense phase, 1 or more.
        sparse: rounds of a sparse phase, 1 or more.

    Reference: Peste et al. (2021), arXiv:2106.12379.
    """

    sparsity: float = 0.9
    dense: int = 1
    sparse: int = 1

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)
        whole("dense", self.dense, 1)
        whole("sparse", self.sparse, 1)

    def __call__(self, round: int) -> float:
        return 0.0 if round % (self.dense + self.sparse) < self.dense else self.sparsity


@dataclass(frozen=True)
class CosineDecay:
    """What fraction of the living connections is exchanged: initial / 2 * (1 + cos(pi * progress)).

    For `DynamicSparseTraining(fraction=...)`; progress goes from 0 to 1, where exchanges end.

    >>> [round(CosineDecay(0.3)(x), 3) for x in (0.0, 0.5, 1.0)]
    [0.3, 0.15, 0.0]

    Args:
        initial: fraction at the start, in (0, 1).

    Reference: Dettmers & Zettlemoyer (2019), arXiv:1907.04840; Evci et al. (2020), arXiv:1911.11134, Section
        3.
    """

    initial: float = 0.3

    def __post_init__(self) -> None:
        _check_fraction("initial", self.initial)

    def __call__(self, progress: float) -> float:
        return self.initial / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Hold:
    """Prune nothing: keep the masks that one starts from, for instance `masks="zeros"`.

    >>> [Hold()(r) for r in range(3)]
    [0.0, 0.0, 0.0]
    """

    def __call__(self, round: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Threshold:
    """Prune, in every round from 1 on, what has a score below theta.

    Which units these are is up to the allocation: with `global_rank` exactly those below theta.

    >>> Threshold(theta=0.5)(round=1, scores={"w": torch.tensor([0.1, 0.4, 0.5, 2.0])})
    0.5

    Args:
        theta: any finite number; its scale is that of the criterion. When nothing would be left, the fit
            ends.

    Reference: Han et al. (2015), arXiv:1506.02626, Section 3.
    """

    theta: float = 0.01

    def __post_init__(self) -> None:
        number("theta", self.theta, "are finite numbers, such as 0.05", math.isfinite)

    def __call__(self, round: int, scores: Scores) -> float:
        if not round:
            return 0.0
        size = _size(scores)
        return 1 - sum(count_above(s, self.theta, or_equal=True) for s in scores.values()) / size


@dataclass(frozen=True)
class Bucket:
    """Prune, in every round from 1 on, the smallest scores as long as their sum stays within beta.

    The scores of all the tensors are poured into one bucket in ascending order; the first that does not fit,
    and all after it, are kept. Each round has a bucket of its own.

    >>> Bucket(beta=1.0)(round=1, scores={"a": torch.tensor([0.5, 0.75]), "b": torch.tensor([0.25, 2.0])})
    0.5

    Args:
        beta: the sum that a pruning may remove, above 0. When everything fits, the fit ends.

    Reference: the bucket strategy of J. Stier's deepstruct, github.com/innvariant/deepstruct.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        number("beta", self.beta, "are finite numbers above 0, such as 5", lambda v: 0 < v < math.inf)

    def __call__(self, round: int, scores: Scores) -> float:
        if not round:
            return 0.0
        living = torch.cat([s[s > DEAD].cpu().double() for s in scores.values()])
        over = (living.sort().values.cumsum(0) > self.beta).nonzero()
        kept = len(living) - int(over[0]) if len(over) else 0
        return 1 - kept / _size(scores)


def _of(amount: float, left: int) -> int:
    """So many units, or such a fraction of those that are left, rounded as torch rounds it."""
    return round(amount * left) if isinstance(amount, float) else amount


def _size(scores: Scores) -> int:
    return max(1, sum(s.numel() for s in scores.values()))


def _check_ramp(ramp: Linear | Cubic | OneCycle) -> None:
    whole("rounds", ramp.rounds, 1)
    whole("start", ramp.start, 0)
    for name in ("initial", "sparsity"):
        number(
            name, getattr(ramp, name), "are fractions from 0 to below 1, such as 0.9", lambda v: 0 <= v < 1
        )
    if not 0 <= ramp.initial <= ramp.sparsity < 1:
        raise ValueError(
            f"initial={ramp.initial}, sparsity={ramp.sparsity}: allowed is 0 <= initial <= sparsity < 1, "
            "such as 0 and 0.9."
        )


def _progress(ramp: Linear | Cubic | OneCycle, round: int) -> float:
    return min(1.0, max(0.0, (round - ramp.start) / ramp.rounds))
