"""Every test runs on one thread, from a seed, away from the repository, and leaves logging as it was."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    assert not logging.root.manager.disable, "what is logged would be lost to all tests that follow"
    assert torch.get_num_threads() == 1


def pytest_configure():
    torch.set_num_threads(1)
    # Processes of their own find this tree, and import torch once for all of them.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    preloaded = ["tests.interrupted", "tests.ranks", "tests.sweeping"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)


def pytest_terminal_summary(terminalreporter):
    """What tests counted is shown, also where they ran in other processes."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "counts":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
