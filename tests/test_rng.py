"""The random state comes back whole, also through a file read with weights_only."""

import random

import numpy as np
import torch

from lightning_prune import rng


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_restored_generators_draw_the_same_again():
    random.gauss(0, 1), np.random.randn()  # each has half of a pair in store now
    state = rng.capture()
    first = draws()
    rng.restore(state)
    assert draws() == first


def test_capturing_draws_nothing():
    rng.restore(state := rng.capture())
    expected = draws()
    rng.restore(state)
    rng.capture()
    assert draws() == expected


def test_the_state_survives_a_file_of_plain_containers(tmp_path):
    random.gauss(0, 1), np.random.randn()
    state = rng.capture()
    first = draws()
    torch.save(state, tmp_path / "state")
    rng.restore(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == first


def test_what_was_captured_does_not_change_with_the_generators():
    state = rng.capture()
    first = draws()
    rng.restore(state)
    draws()
    rng.restore(state)
    assert draws() == first
