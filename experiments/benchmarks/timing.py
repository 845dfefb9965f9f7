"""How the benchmarks measure: alternated runs, medians, and the machine they ran on."""

import os
import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from statistics import median
from time import perf_counter

import torch


def machine() -> str:
    """One line that says where and when figures were measured."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    date = datetime.now(timezone.utc).date()
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, {date}"


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def alternated(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each candidate measures, in turn, A B C A B C ..., so that drift meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, measure in candidates.items():
            times[name].append(measure())
    return times


def ratio(of: list[float], against: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return median(a / b for a, b in zip(of, against, strict=True))
