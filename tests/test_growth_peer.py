"""The exchanges of another implementation, rigl-torch, on a small network and fixed batches."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune.growth import exchanged
from lightning_prune.selection import keep_top


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_exchanges_are_those_of_rigl_torch_but_for_what_it_drops_and_grows_at_once(seed):
    """It lets a connection grow that it has just dropped; with these as candidates, too, all is equal."""
    peer = pytest.importorskip(
        "rigl_torch.RigL", reason="rigl-torch is not installed: pip install rigl-torch"
    )
    torch.manual_seed(seed)
    sizes = 20, 40, 40, 5
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(256, 20)
    y = (x[:, :5] * x[:, 5:10]).argmax(1)
    options = {"sparsity_distribution": "uniform", "ignore_linear_layers": False}
    theirs = peer.RigLScheduler(model, optimizer, 0.2, T_end=250, delta=4, alpha=0.5, **options)
    sparse = [i for i, s in enumerate(theirs.S) if s > 0]  # its "uniform" leaves the first layer dense
    equal, again = 0, 0
    for step in range(1, 260):
        batch = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        before = {i: (theirs.backward_masks[i].clone(), theirs.W[i].detach().clone()) for i in sparse}
        if theirs():
            optimizer.step()
            continue
        fraction = 0.25 * (1 + math.cos(math.pi * step / 250))
        for i, (mask, weight) in before.items():
            drop, grow = weight.abs(), theirs.backward_hook_objects[i].dense_grad.abs()
            number = int(int(mask.sum()) * fraction)  # ours is rounded, and theirs cut off
            stays = keep_top(drop.masked_fill(~mask, -torch.inf), int(mask.sum()) - number)
            found = theirs.backward_masks[i]
            ours = exchanged({"w": mask}, {"w": number}, {"w": drop}, {"w": grow})["w"]
            assert int(found.sum()) == int(ours.sum()) == int(mask.sum())
            assert bool(found[stays].all())
            assert torch.equal(found, stays | keep_top(grow.masked_fill(stays, -torch.inf), number))
            back = found & mask & ~stays
            again += int(back.any())
            if not back.any():
                equal += 1
                assert torch.equal(found, ours)
    assert theirs.rigl_steps > 50
    assert equal > 5
    assert again > 5
