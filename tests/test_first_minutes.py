"""What a newcomer may stumble over: no data and no network, a typo, names that Windows has no files for."""

import re
import subprocess
from pathlib import Path
from urllib.error import URLError

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException

from lightning_prune.study import run as entry
from lightning_prune.study.records import read

ROOT = Path(__file__).parents[1]
FORBIDDEN = re.compile(r'[<>:"|?*\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def numbers(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder / "records.jsonl")[0]]


def test_without_mnist_and_without_network_one_is_told_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets.mnist")

    def unreachable(*_, **__):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(datasets, "download_and_extract_archive", unreachable)
    cfg = composed("experiment=lenet_mnist_short", f"data.root={tmp_path}/none", f"runs={tmp_path}/runs")
    with pytest.raises(Exception, match="MNIST is not in") as error:
        entry.run(cfg)
    message = str(error.value)
    assert str(tmp_path / "none" / "MNIST" / "raw") in message
    assert "Set data.root to a folder that holds it, or connect to the internet" in message
    assert not list((tmp_path / "runs").rglob("records.jsonl"))


def test_an_interrupted_or_refused_run_leaves_a_folder_that_can_be_started_again(tmp_path):
    small = ["rounds=0", "steps_per_round=40", "evaluate_every=20", "progress=false", f"runs={tmp_path}"]
    folder = entry.run(composed("experiment=mnist1d", *small))
    assert (folder / "DONE").is_file()
    (folder / "DONE").unlink()  # as if the power had failed before the last line
    before = numbers(folder)
    assert entry.run(composed("experiment=mnist1d", *small)) == folder
    assert numbers(folder) == before
    with pytest.raises(ValueError, match="Set runs=<another folder> or name=<another name>, or delete"):
        entry.run(composed("experiment=mnist1d", *small, "rate=0.5"))
    names = [path.name for path in tmp_path.rglob("*")]
    assert len(names) > 4
    assert not [name for name in names if FORBIDDEN.search(name)]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("experiment=lenet_mnst", MissingConfigException, "lenet_mnist_short"),
        ("critrion=random", ConfigCompositionException, "critrion"),
        ("rouds=3", ConfigCompositionException, "rouds"),
    ],
)
def test_a_typo_is_named(override, error, message):
    with pytest.raises(error, match=message):
        composed(override)


def test_no_file_of_the_repository_has_a_name_that_windows_cannot_have():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listed.stdout.split("\n")
    assert "README.md" in names
    assert not [name for name in names if any(FORBIDDEN.search(part) for part in name.split("/"))]
    assert len({name.lower() for name in names}) == len(names)
