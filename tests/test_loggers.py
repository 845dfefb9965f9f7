"""What reaches the loggers, read back from their own files."""

import csv
import json
import struct

import pytest
import torch

from lightning_prune.study import records
from lightning_prune.study.mask_images import picture
from lightning_prune.study.run import run
from tests.sweeping import start
from tests.test_experiments import config

LAYERS = ("net.fc1.weight", "net.fc2.weight", "net.out.weight")
NAMES = {"round", "sparsity", *(f"density/{name}" for name in LAYERS)}


def logged(logger, tmp_path):
    folder = run(config(tmp_path, f"logger={logger}", "+trainer.log_every_n_steps=10"))
    return folder, records.read(folder / "records.jsonl")[0]


def agree(history, found):
    """history {name: values over time} has every round's sparsity and densities."""
    assert set(history) >= NAMES
    assert sorted(set(history["round"])) == [0, 1, 2]
    assert sorted(set(history["sparsity"])) == pytest.approx([r["sparsity"] for r in found])
    for name in LAYERS:
        densities = sorted(set(history[f"density/{name}"]), reverse=True)
        assert densities == pytest.approx([r["layers"][name] for r in found])


def test_csv(tmp_path):
    folder, found = logged("csv", tmp_path)
    rows = list(csv.DictReader((folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    agree({name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}, found)


def test_tensorboard_with_mask_images(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra loggers is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, found = logged("tensorboard", tmp_path)
    events = EventAccumulator(str(folder))
    events.Reload()
    history = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    agree(history, found)
    assert set(events.Tags()["images"]) == {f"mask/{name}" for name in LAYERS}
    assert [image.step for image in events.Images("mask/net.fc2.weight")] == [40, 80]
    image = events.Images("mask/net.fc2.weight")[-1]
    assert (image.width, image.height) == (200, 200)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_mlflow_with_mask_images(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra loggers is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back afterwards: processes inherit it
    folder, found = logged("mlflow", tmp_path)
    client = mlflow.tracking.MlflowClient(f"file:{folder}/mlflow")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist1d'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    history = {
        name: [m.value for m in client.get_metric_history(tracked.info.run_id, name)]
        for name in tracked.data.metrics
    }
    agree(history, found)
    images = {path.name for path in folder.rglob("*.png") if path.parent.name == "net.fc2.weight"}
    assert images == {"40.png", "80.png"}


def leveldb_log(content, block=32768):
    """The records of the file that W&B writes offline: LevelDB's log format behind a header of 7 bytes."""
    at, data = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block  # no record begins there
            continue
        _, length, place = struct.unpack("<IHB", content[at : at + 7])
        data, at = data + content[at + 7 : at + 7 + length], at + 7 + length
        if place in (1, 4):  # whole, or its last piece
            yield data
            data = b""


def test_weights_and_biases_offline_with_mask_images(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra loggers is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, found = logged("wandb", tmp_path)
    import wandb

    wandb.finish()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history = {}
    for data in leveldb_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            history.setdefault(item.key or item.nested_key[0], []).append(json.loads(item.value_json))
    agree({name: values for name, values in history.items() if name in NAMES}, found)
    assert {f"mask/{name}" for name in LAYERS} <= set(history)
    images = list(path.parent.rglob("*.png"))
    assert len(images) == 2 * len(LAYERS)


def test_a_large_mask_is_shown_by_means():
    mask = torch.rand(1000, 300, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.25
    image = picture(mask, 256)
    assert image.shape == (256, 256)
    assert float(image.float().mean() / 255) == pytest.approx(0.25, abs=0.01)
    assert picture(torch.tensor([True, False]), 256).tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("logger", "package", "written"),
    [
        ("csv", "lightning", "csv/version_0/metrics.csv"),
        ("tensorboard", "tensorboard", "events.out.tfevents.*"),
        ("mlflow", "mlflow", "mlflow/*/*/metrics/val_loss"),
        ("wandb", "wandb", "wandb/offline-run-*"),
    ],
)
def test_a_logger_is_one_word_of_the_command_and_of_a_sweep(logger, package, written, tmp_path):
    pytest.importorskip(package, reason="the extra loggers is not installed")
    short = ["experiment=mnist1d", "rounds=0", "steps_per_round=8", "evaluate_every=4", "progress=false"]
    log = tmp_path / "log"
    for sweep in ([], ["--multirun", "seed=1,2"]):
        runs = tmp_path / ("many" if sweep else "one")
        process = start(log, *sweep, *short, f"runs={runs}", f"logger={logger}")
        process.join(300)
        assert process.exitcode == 0, log.read_text()
        found = {path.relative_to(runs).parts[1].split(",")[0] for path in runs.glob(f"mnist1d/*/{written}")}
        assert found == ({"ticket-1", "ticket-2"} if sweep else {"ticket-1"})
