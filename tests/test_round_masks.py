"""Masks of rounds: what is read is what was written, in more rounds than a byte counts, and of old runs."""

import json
import os
import re

import pytest
import torch

import lightning_prune as lp
from lightning_prune.masks import alive
from lightning_prune.study import round_masks
from lightning_prune.study.recording import Records
from lightning_prune.study.records import described, read, write
from lightning_prune.study.round_masks import lifetimes, masks_of, save
from tests.networks import Net, fitter, same

SHAPES = {"a": (13, 7), "b": (5,), "none": (0, 3)}


def drawn(round, density=0.5):
    generator = torch.Generator().manual_seed(round)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def test_masks_of_any_rounds_are_read_as_they_were_written(tmp_path):
    for round in (0, 1, 7, 99, 100, 255, 256, 300):  # these grow as well as shrink
        save(tmp_path, round, drawn(round))
    found = masks_of(tmp_path)
    assert list(found) == [0, 1, 7, 99, 100, 255, 256, 300]
    assert all(same(found[round], drawn(round)) for round in found)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_round_that_is_trained_again_takes_the_place_of_what_was_there(tmp_path):
    for round in range(4):
        save(tmp_path, round, drawn(round))
    save(tmp_path, 1, drawn(9))
    found = masks_of(tmp_path)
    assert list(found) == [0, 1]  # the others come again
    assert same(found[0], drawn(0))
    assert same(found[1], drawn(9))


def test_lifetimes_count_the_rounds_in_which_a_weight_was_alive():
    masks = {round: drawn(round) for round in range(300)}
    expected = {name: sum(masks[r][name].int() for r in masks) for name in SHAPES}
    assert same(lifetimes(masks), expected)


def test_a_folder_without_masks_has_none(tmp_path):
    assert len(masks_of(tmp_path)) == 0


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_file_is_refused_by_name(content, tmp_path):
    for round in range(3):
        save(tmp_path, round, drawn(round))
    path = tmp_path / "masks" / "round-01.pt"
    path.write_bytes(content) if content is not None else torch.save({"a": [1]}, path)
    with pytest.raises(ValueError, match=r"round-01\.pt: it is damaged, .* start it again"):
        masks_of(tmp_path)


# ------------------------------------------------------------------------------------- what a training writes


def train(folder, rounds, **options):
    torch.manual_seed(0)
    pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.01), rounds=rounds, every_n_train_steps=1)
    recorder = Records(folder, "ticket", 0, evaluate_every=10**6)
    trainer = fitter(pruner, recorder, max_steps=rounds + 1, epochs=-1, limit_val_batches=0, **options)
    trainer.fit(Net())
    return pruner, recorder


def test_three_hundred_rounds_have_the_masks_that_their_records_speak_of(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the disk is not what is looked at
    pruner, _ = train(tmp_path, 300)
    records, masks = read(tmp_path / "records.jsonl")[0], masks_of(tmp_path)
    assert [r["round"] for r in records] == list(range(301)) == list(masks)
    for r in records:
        assert described(r["round"], masks[r["round"]])["layers"] == r["layers"]
    assert records[300]["alive"] < records[255]["alive"] < records[45]["alive"]
    assert same(masks[300], pruner.masks)
    assert alive(masks[300]) == records[300]["alive"]


def test_the_state_of_the_records_does_not_grow_with_the_rounds(tmp_path):
    states = [train(tmp_path, rounds)[1].state_dict() for rounds in (1, 20)]
    few, many = (len(json.dumps({**state, "seconds": 0})) for state in states)
    assert many < few + 100


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    recorder = Records(tmp_path, "ticket", 0, evaluate_every=1)
    message = rf"holds records of version 1; allowed is version 2.*Delete {re.escape(str(tmp_path))}"
    with pytest.raises(ValueError, match=message):
        recorder.load_state_dict({"survived": {}, "round": {}, "evaluations": [], "began": 0, "seconds": 0})


# --------------------------------------------------------------------------------- runs of the first version


def old_run(folder, rounds, counted=0):
    """A run as the first version left it: `survived.pt` counts prunings in a byte, one in each round."""
    generator = torch.Generator().manual_seed(0)
    masks = [{"w": torch.ones(50, 20, dtype=torch.bool)}]
    survived = {"w": masks[0]["w"].to(torch.uint8) * counted}
    for _ in range(rounds):
        masks.append({"w": masks[-1]["w"] & (torch.rand(50, 20, generator=generator) < 1 - 2 / rounds)})
        survived["w"] += masks[-1]["w"]
    rows = [{"kind": "ticket", "seed": 1, **described(r, m), "metrics": {}} for r, m in enumerate(masks)]
    rows += [{**rows[0], "kind": "threshold", "round": r, "alive": 3} for r in range(2)]  # a one-shot sweep
    write(folder / "records.jsonl", rows)
    torch.save(survived, folder / "survived.pt")
    return masks


@pytest.mark.parametrize("rounds", [3, 254, 255])
def test_the_counts_of_an_old_run_become_masks(rounds, tmp_path):
    masks = old_run(tmp_path, rounds)
    found = masks_of(tmp_path)
    assert list(found) == list(range(rounds + 1))
    assert all(same(found[r], masks[r]) for r in found)


@pytest.mark.parametrize(("rounds", "counted"), [(256, 0), (300, 0), (3, 1)])
def test_counts_that_wrapped_or_counted_twice_are_refused(rounds, counted, tmp_path):
    old_run(tmp_path, rounds, counted)
    message = r"survived\.pt: .* in one byte .*records.jsonl says .*Delete the folder of the run and start it"
    with pytest.raises(ValueError, match=message):
        masks_of(tmp_path)


def test_masks_that_are_there_come_before_old_counts(tmp_path):
    old_run(tmp_path, 300)
    save(tmp_path, 0, drawn(0))
    assert same(masks_of(tmp_path)[0], drawn(0))
    assert round_masks.file_size(drawn(0)) == pytest.approx(
        (tmp_path / "masks" / "round-00.pt").stat().st_size, rel=0.05
    )
