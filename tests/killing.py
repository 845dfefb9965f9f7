"""Killing: trainings that die by SIGKILL at some moment, and are started again until they end."""

import functools
import os
import random
import signal
import threading

import torch

from tests.networks import same
from tests.test_resume import in_another_process


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(spot, n, spots):
    """The process ends without another instruction at the n-th call of a function."""
    owner, name = spots[spot]
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def deadly(*args, **options):
        calls.append(1)
        if len(calls) == n:
            die()
        return original(*args, **options)

    setattr(owner, name, deadly)


def die_in_a_write(n, share):
    """In the n-th checkpoint, when about this share of its bytes is written."""
    save, calls = torch.save, []

    class Deadly:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += self.file.write(data)
            self.file.flush()
            if self.written > share * 60_000:
                die()
            return len(data)

        def flush(self):
            self.file.flush()

    def deadly(value, file):
        whole = "state_dict" in value  # a checkpoint: the masks of a round are small
        calls.extend([1] * whole)
        return save(value, Deadly(file) if whole and len(calls) == n else file)

    torch.save = deadly


def die_after(seconds):
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def arm(ways, spots):
    """Die in these ways: at a call of one of the spots, in a write, or after a time."""
    torch.set_num_threads(1)
    for way, *arguments in ways:
        if way == "at":
            die_at(*arguments, spots)
        else:
            {"in a write": die_in_a_write, "after": die_after}[way](*arguments)


def a_way(draw, spots, often):
    """A way to die, at random.

    Args:
        draw: of random numbers.
        spots: {name: (owner, name of a function)}, at a call of which one may die.
        often: of the spots that are passed many times, at which of these calls at most.
    """
    kind = draw.choice(["at", "at", "in a write", "after"])
    if kind == "at":
        spot = draw.choice(list(spots))
        seldom = {"before a file is on the disk": 8, "before a file has its name": 8}
        return "at", spot, draw.randint(1, {**often, **seldom}.get(spot, 3))
    if kind == "in a write":
        return kind, draw.randint(1, 5), draw.random()
    return kind, draw.uniform(0.05, 0.8)


def missing(spots):
    """The spots that have moved: no kill would come to them."""
    return [spot for spot, (owner, name) in spots.items() if not hasattr(owner, name)]


def differences(folder, setting, ways, expected, target):
    """Kill a run in these ways, one after the other, starting it again each time; then let it end.

    Args:
        folder: of the run.
        setting: of the training.
        ways: to die.
        expected: what the same training came to that was not killed.
        target: (folder, setting, ways) -> None, which writes what it came to to final.pt.
    """
    folder.mkdir()
    kills = 0
    for way in (*ways, None):
        code = in_another_process(folder, setting, [way] if way else [], target=target)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            break
    result = torch.load(folder / "final.pt", weights_only=True)
    if result["random"] is None:
        expected = {**expected, "random": None}
    different = [key for key in expected if not same(result[key], expected[key])]
    left = sorted(path.name for path in folder.rglob("*") if path.suffix == ".tmp" or "sparse" in path.name)
    return kills, [*different, *(f"left behind: {name}" for name in left)]


def killed_at_random(seed, least, folder, a_setting, die_by, train, target):
    """Trainings that are drawn, and killed at least so many times: how many kills and runs, what differs."""
    draw, total, runs, different = random.Random(seed), 0, 0, []
    while total < least:
        setting, ways = a_setting(draw), [die_by(draw) for _ in range(draw.randint(2, 6))]
        straight = folder / f"straight {runs}"
        straight.mkdir()
        kills, found = differences(folder / str(runs), setting, ways, train(straight, setting), target)
        runs, total = runs + 1, total + kills
        different += [(setting, ways, what) for what in found]
    return total, runs, different
