"""A fit in processes of its own: callbacks of the first process say what it came to, and go on from there."""

import copy
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from tests.networks import Net, dead_are_zero, fitter, same

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="there is no fork"),
    pytest.mark.filterwarnings("ignore:.*the fit (has room for|ended in round)"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


FORKED = {"strategy": "ddp_fork", "devices": 2, "limit_val_batches": 0}


def left_behind():
    return list(Path(tempfile.gettempdir()).glob("lightning_prune-*"))


def halving(**options):
    return lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.5), **{"rounds": 4, **options})


def test_after_a_fit_in_forked_processes_the_callbacks_say_what_it_came_to_and_the_next_goes_on():
    torch.manual_seed(0)
    pruner, rewinder, model, before = halving(), lp.LotteryTicketRewind(1), Net(), left_behind()
    fitter(pruner, rewinder, epochs=3, **FORKED).fit(model)
    assert (pruner.round, pruner.sparsity, pruner.removed) == (2, 0.75, 100)
    assert [record.round for record in pruner.history] == [0, 1, 2]
    assert rewinder.snapshot is not None
    assert dead_are_zero(dict(model.state_dict()), pruner.masks)
    first, snapshot = pruner.masks, rewinder.snapshot.state_dict()

    fitter(pruner, rewinder, epochs=1).fit(model)  # in this process
    fitter(pruner, rewinder, epochs=1, **FORKED).fit(model)
    assert (pruner.round, pruner.sparsity) == (4, 0.9375)
    assert all((first[name] | ~mask).all() for name, mask in pruner.masks.items())  # nothing was revived
    assert dead_are_zero(dict(model.state_dict()), pruner.masks)
    assert same(rewinder.snapshot.state_dict(), snapshot)
    assert left_behind() == before


def test_a_copy_is_another_callback():
    pruner = halving(rounds=1)
    others = [copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))]
    fitter(pruner, epochs=2, **FORKED).fit(Net())
    assert pruner.sparsity == 0.5
    assert [other.sparsity for other in others] == [0, 0]


def test_a_fit_that_fails_in_its_processes_leaves_callbacks_and_weights_as_they_were():
    class Failing(Net):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                raise RuntimeError("stop")

    pruner, model = halving(), Failing()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match="stop"):
        fitter(pruner, epochs=3, **FORKED).fit(model)
    assert (pruner.round, pruner.sparsity, pruner.history) == (0, 0, [])
    assert same(dict(model.state_dict()), dict(weights))
