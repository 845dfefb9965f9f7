"""One way to time: alternated runs, the fastest tenth of them, and only ratios that the runs agree on."""

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from typing_extensions import override

_MOST = 1000  # rounds: more tell nothing new
_PARTS = 3  # of the runs, each of which gives a ratio of its own
_PATIENCE = 4  # times as many runs, if they disagree
_AGREE = 1.25  # the highest of these ratios over the lowest, at most


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another, and the range of what parts of the runs say.

    >>> str(Ratio(2.0, 1.9, 2.1)), str(Ratio(0.9, 0.4, 2.1))
    ('2.00x', '0.40x to 2.10x (too noisy to say)')
    """

    value: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the runs disagree by more than a quarter: the machine was busy, or they were too few."""
        return self.high > _AGREE * self.low

    def exceeds(self, gain: float) -> bool:
        """Whether this is such a gain or a higher one, and no part of the runs says that it is a loss."""
        return self.value >= gain and self.low >= 1

    @override
    def __str__(self) -> str:
        return (
            f"{self.low:.2f}x to {self.high:.2f}x (too noisy to say)" if self.noisy else f"{self.value:.2f}x"
        )


def wait() -> None:
    """Wait for what was started on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Time of one call, with what it starts on a GPU."""
    wait()
    start = perf_counter()
    work()
    wait()
    return perf_counter() - start


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A call that measures how long `work` takes."""
    return partial(seconds, work)


def alternated(
    candidates: Mapping[str, Callable[[], float]], rounds: int = 5, at_least: float = 0.0, warm_up: int = 0
) -> dict[str, list[float]]:
    """What each candidate measures, in turn, A B C A B C ..., so that a drift of the machine meets all alike.

    >>> times = alternated({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=3)
    >>> times
    {'a': [1.0, 1.0, 1.0], 'b': [2.0, 2.0, 2.0]}

    Args:
        candidates: calls that return seconds, or anything else that is compared.
        rounds: how often each is called, or oftener:
        at_least: seconds that all of it takes, but no more than 1,000 rounds.
        warm_up: rounds before, which do not count.
    """
    for _ in range(warm_up):
        for measure in candidates.values():
            measure()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end, done = perf_counter() + at_least, 0
    while done < rounds or (done < _MOST and perf_counter() < end):
        for name, measure in candidates.items():
            times[name].append(measure())
        done += 1
    return times


def settled(candidates: Mapping[str, Callable[[], float]], at_least: float) -> dict[str, list[float]]:
    """Alternated runs after a warm-up, and more of them as long as they disagree, up to four times as many.

    Args:
        candidates: calls that return seconds; the others are compared with the first.
        at_least: seconds that the runs take, or four times as long on a busy machine.
    """
    times = alternated(candidates, at_least=at_least, warm_up=2)
    for _ in range(_PATIENCE - 1):
        first = next(iter(times.values()))
        if not any(ratio(first, others).noisy for others in times.values()):
            break
        more = alternated(candidates, at_least=at_least)
        times = {name: [*before, *more[name]] for name, before in times.items()}
    return times


def low(times: Sequence[float]) -> float:
    """The time that the fastest tenth of the runs keep: others only ever make a run slower.

    >>> low([3.0, 1.0, 2.0]), low([float(i) for i in range(100)])
    (1.0, 9.0)
    """
    return sorted(times)[(len(times) - 1) // 10]


def parts(times: Sequence[float]) -> list[Sequence[float]]:
    """Up to three parts of the runs, one after the other.

    >>> parts([1, 2, 3, 4, 5]), parts([1])
    ([[1], [2, 3], [4, 5]], [[1]])
    """
    n = min(_PARTS, len(times))
    return [times[len(times) * i // n : len(times) * (i + 1) // n] for i in range(n)]


def ratio(of: Sequence[float], against: Sequence[float]) -> Ratio:
    """How many times as long the first takes, from alternated runs: the ratio of the times of `low`.

    >>> ratio([2.0, 2.2, 2.0, 9.0], [1.0, 1.0, 1.1, 1.0])
    Ratio(value=2.0, low=2.0, high=2.2)
    """
    value = low(of) / low(against)
    found = [low(a) / low(b) for a, b in zip(parts(of), parts(against), strict=True)]
    return Ratio(value, min(value, *found), max(value, *found))


def yardstick(device: torch.device) -> Callable[[], float]:
    """A fixed piece of work: if it takes longer at another time, the machine is slower then."""
    square = torch.ones(256, 256, device=device)
    return timed(lambda: square @ square)


def hardware(device: torch.device | None = None) -> str:
    """The name of the processor, or of the GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: torch.device | None = None) -> str:
    """One line that says where and when figures were measured."""
    date, threads = datetime.now(timezone.utc).date(), torch.get_num_threads()
    return f"{hardware(device)}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, {date}"
