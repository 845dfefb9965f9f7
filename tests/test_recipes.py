"""The recipes and the newcomer's trial: each runs, and the pages say what the records say."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import language, recipes, trial
from lightning_prune.study.data import Splits
from lightning_prune.study.records import read

ROOT = Path(__file__).parents[1]
WAYS = [(name, way) for name, ways in recipes.RECIPES.items() for way in ways]
RECORDS = read(recipes.RESULTS)[0]
LEFT = {
    "mlp": 0.1,
    "mnist": 0.1,
    "cnn": 0.1,
    "transformer": 0.14,
    "frozen": 0.3,
    "channels": 0.25,
    "zeros": 0.1,
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*isinstance.treespec, LeafSpec.*")


def splits(*shape, examples=64):
    def pair():
        return torch.randn(examples, *shape), torch.randint(10, (examples,))

    return Splits(pair(), pair(), pair())


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_recipe_trains_two_tiny_rounds_to_the_sparsity_that_its_page_says(name, way):
    recipe = recipes.RECIPES[name][way]
    shape = (28, 28) if name == "mnist" else (40,)
    tiny = replace(recipe, rounds=min(recipe.rounds, 2), epochs=2, data=lambda: splits(*shape), latency=False)
    record = recipes.train(name, way, tiny, seed=1)
    left = record["alive"] / record["total"]
    if way == "dense" or "no masks" in way:
        assert left > 0.5
    else:
        assert left == pytest.approx(LEFT[name], abs=0.03)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_page_of_recipes_has_the_numbers_of_the_records(name):
    assert recipes.table(RECORDS, name) in (ROOT / "docs" / "recipes.md").read_text()
    assert all(len([r for r in RECORDS if r["kind"].endswith(f" · {way}")]) >= 3 for _, way in WAYS)


def test_the_page_of_recipes_has_the_perplexities_of_the_records():
    records = read(language.RESULTS)[0]
    assert language.table(records) in (ROOT / "docs" / "recipes.md").read_text()
    assert {r["seed"] for r in records} == {1, 2, 3}
    for way in language.WAYS:
        found = [r for r in records if r["kind"] == way]
        assert len(found) == (1 if way in language.WITHOUT_DATA else 3)
        left = [r["alive"] / r["total"] for r in found]
        assert left == pytest.approx([1.0 if way == "dense" else 0.5] * len(found), abs=1e-3)


def test_times_as_fast_is_the_ratio_of_two_latencies():
    slow = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(40)))
    assert recipes.times_as_fast(slow[:1], slow, torch.randn(64, 256)) > 3


@pytest.mark.parametrize("kind", ["round", "fit"])
def test_the_trial_reaches_90_percent_and_only_a_schedule_of_the_fit_is_warned_of(kind):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = trial.train(1, kind, splits(3, 16, 16, examples=256), rounds=2, epochs=1)
    assert [r["alive"] / r["total"] for r in records] == pytest.approx([1, 0.316, 0.1], abs=1e-3)
    warned = any("every round rewinds it before" in str(w.message) for w in said)
    assert warned == (kind == "fit")


def test_the_page_of_schedules_has_the_table_of_the_trial():
    records = read(trial.RESULTS)[0]
    assert {r["seed"] for r in records} == {1, 2, 3, 4, 5}
    assert trial.table(records) in (ROOT / "docs" / "schedules.md").read_text()
