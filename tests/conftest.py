"""Every test runs on one thread, from a fixed seed, and away from the repository."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def pytest_configure():
    torch.set_num_threads(1)
