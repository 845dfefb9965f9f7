"""Schedules: the published numbers, and no others."""

import dataclasses
import itertools
import pickle
import warnings
from pathlib import Path

import pytest

import lightning_prune as lp
from lightning_prune.masks import alive
from lightning_prune.schedules import Cubic, Explicit, Geometric, Linear, OneCycle, OneShot
from tests.naming import in_words
from tests.networks import Net, fitter

# weights left in percent: Frankle & Carbin (2019), Figure 4
LADDER = [100.0, 80.04, 64.06, 51.28, 41.05, 32.87, 26.32, 21.07, 16.88, 13.52]


def test_the_lenet_ladder_of_the_paper():
    hidden, output = 784 * 300 + 300 * 100, 100 * 10
    for r, paper in enumerate(LADDER):
        left = hidden * (1 - Geometric(0.2)(r)) + output * (1 - Geometric(0.1)(r))
        assert 100 * left / (hidden + output) == pytest.approx(paper, abs=0.05)


def test_geometric_removes_the_same_fraction_of_what_is_left():
    left = [1 - Geometric(0.3)(r) for r in range(12)]
    assert left[0] == 1
    assert all(b / a == pytest.approx(0.7) for a, b in itertools.pairwise(left))


def test_one_shot_is_dense_first_and_then_all_at_once():
    assert [OneShot(0.7)(r) for r in range(4)] == [0.0, 0.7, 0.7, 0.7]


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize(("make", "name"), [(Geometric, "rate"), (OneShot, "sparsity")])
def test_fractions_outside_0_and_1_are_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}: allowed are fractions between 0 and 1"):
        make(value)


def test_a_schedule_is_a_value():
    assert Geometric(0.2) == Geometric(0.2) != Geometric(0.3)
    assert pickle.loads(pickle.dumps(OneShot(0.5))) == OneShot(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Geometric(0.2).rate = 0.3


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_the_last_round_has_exactly_the_sparsity_that_was_asked_for(rounds):
    schedule = Geometric(to=0.9)
    reached = [schedule(r, rounds=rounds) for r in range(rounds + 1)]
    assert (reached[0], reached[-1]) == (0.0, 0.9)
    left = [1 - s for s in reached]
    assert all(b / a == pytest.approx(0.1 ** (1 / rounds)) for a, b in itertools.pairwise(left))
    pruner = lp.IterativeMagnitudePruning({"head*": Geometric(to=0.5), "*": schedule}, rounds=rounds)
    fitter(pruner, epochs=rounds + 1).fit(Net())
    assert alive(pruner.masks) == 24 + round(0.1 * 352)


def test_a_final_sparsity_without_rounds_is_refused_and_so_is_one_beside_a_rate():
    with pytest.raises(ValueError, match="nobody says which one that is"):
        Geometric(to=0.9)(1)
    with pytest.raises(ValueError, match=r"rate=0.1, to=0.9: allowed is one of them"):
        Geometric(0.1, to=0.9)
    with pytest.raises(ValueError, match=r"to=1\.0: allowed are fractions"):
        Geometric(to=1.0)
    assert Geometric() == Geometric(0.2)
    assert alive(lp.prune(Net(), Geometric(to=0.9))) == 40


@pytest.mark.parametrize("given", [None, 0.5, "0.5"])
def test_explicit_sparsities_are_several(given):
    with pytest.raises(ValueError, match=r"sparsities=.*: allowed are several fractions.*Give a list"):
        lp.schedules.Explicit(given)


CUT = [
    (Cubic(0.9, rounds=20), 2, 20),
    (Linear(0.9, rounds=4, start=2), 5, 6),
    (OneCycle(0.9, rounds=4), 3, 4),
    (Explicit([0.0, 0.5, 0.75]), 1, 2),
    (OneShot(0.5), 0, 1),
]


@pytest.mark.parametrize(("schedule", "rounds", "needed"), CUT, ids=in_words)
def test_a_schedule_that_goes_on_after_the_last_round_is_said_where_the_callback_is_made(
    schedule, rounds, needed
):
    with pytest.warns(
        UserWarning, match=rf"only in round {needed}\. Give the callback rounds={needed}"
    ) as said:
        lp.IterativeMagnitudePruning({"*": schedule}, rounds=rounds)
    assert [Path(w.filename).name for w in said] == ["test_schedules.py"]
    lp.IterativeMagnitudePruning(schedule, rounds=needed)  # says nothing


def test_a_schedule_of_channels_that_goes_on_is_said_too_and_inside_a_target():
    pytest.importorskip("torch_pruning")
    for schedule in (Linear(0.5, rounds=4), lp.filters.Removed(Linear(0.5, rounds=4))):
        with pytest.warns(UserWarning, match="rounds=4"):
            lp.StructuredChannelPruning(schedule, rounds=2)


GIVEN = [
    (Geometric(0.5), 3, "the first 2 prunings take"),  # 0.5, 0.75, 0.875
    (Geometric(0.3), 2, "none of the prunings takes"),
    (Geometric(to=0.9), 1, None),
    (lp.schedules.Hold(), 2, None),
]


@pytest.mark.parametrize(("schedule", "rounds", "said"), GIVEN, ids=in_words)
def test_masks_that_are_sparser_than_the_first_rounds_say_which_prunings_take_nothing(schedule, rounds, said):
    masks = lp.prune(Net(), 0.8)
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=rounds, masks=masks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter(pruner, epochs=rounds + 1).fit(Net())
    told = [w for w in caught if "masks: they are at sparsity 0.8" in str(w.message)]
    assert len(told) == bool(said)
    assert all(said in str(w.message) for w in told)
    assert all(Path(w.filename).name == "test_schedules.py" for w in told)  # the line that called fit


@pytest.mark.parametrize(
    "schedule",
    [
        OneShot(0.5),
        lp.schedules.Linear(0.9, rounds=5, start=2),
        lp.schedules.Cubic(0.9, rounds=4),
        lp.schedules.OneCycle(0.9, rounds=6, start=1),
        lp.schedules.Explicit([0.0, 0.5, 0.7]),
    ],
    ids=in_words,
)
def test_a_schedule_changes_up_to_its_last_round_and_no_further(schedule):
    values = [schedule(round) for round in range(20)]
    assert values[schedule.last - 1] < values[schedule.last]
    assert set(values[schedule.last :]) == {values[schedule.last]}


def test_a_schedule_of_ones_own_may_say_which_round_is_its_last():
    class Mine:
        last = 3

        def __call__(self, round: int) -> float:
            return 0.2 * min(round, 3)

    with pytest.warns(UserWarning, match="in round 2, the last one, .* only in round 3"):
        lp.IterativeMagnitudePruning(Mine(), rounds=2)
