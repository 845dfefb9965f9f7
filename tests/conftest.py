"""Every test runs on one thread, from a fixed seed, and away from the repository."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def pytest_configure():
    torch.set_num_threads(1)
    # Processes of their own find this tree, and import torch once for all of them.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    preloaded = ["tests.interrupted", "tests.ranks", "tests.sweeping"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
