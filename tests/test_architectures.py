"""Other people's networks: none is cut wrongly, none crashes, and most lose what they are expected to."""

import json

import pytest

from experiments.benchmarks import architectures

FEW = ("torch _encoder", "torch _lstm", "torch _tcn")


def test_the_table_says_what_became_of_each_model():
    records = []
    for name in FEW:
        told = []
        architectures.one(name, told.append)
        records.append(told[-1])
    came = {record["name"]: record["ours"]["came out"] for record in records}
    assert came == {"torch _encoder": "right", "torch _lstm": "too little", "torch _tcn": "right"}
    text = architectures.table(records, "Here.")
    assert "Cut by lightning_prune, of 3 models: 2 right, 1 too little." in text
    assert [line.split("|")[1].strip() for line in text.splitlines()[-3:]] == list(FEW)
    assert json.loads(json.dumps(records)) == records


@pytest.mark.slow
def test_no_model_is_cut_wrongly_and_most_lose_the_expected_part():
    records = [architectures.record_of(name, limit=180) for name in architectures.models()]
    came = [record["ours"]["came out"] for record in records]
    built = [one for one in came if one != "not built"]  # by the libraries that are installed
    assert not {"wrong", "crashed"} & set(built)
    assert built.count("right") >= 0.85 * len(built)
