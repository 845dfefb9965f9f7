"""Each policy of LotteryTicketRewind: what exactly a round begins with, bit for bit; and how long it is."""

import itertools
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import lr_scheduler as sched

import lightning_prune as lp
from lightning_prune import rewind
from lightning_prune.schedules import Geometric
from tests.networks import Manual, Net, fitter, same, sgd, state

K = 2  # the step that is gone back to
POLICIES = {
    p.__name__: p for p in (rewind.everything, rewind.weights, rewind.learning_rate, rewind.fine_tune)
}
POLICIES["nothing"] = rewind.nothing

# Where each part of the state comes from: the early snapshot, the end of the round, or its last step.
FROM = {
    "everything": {"weights": "early", "memory": "early", "rates": "early", "schedulers": "early"},
    "weights": {"weights": "early", "memory": "final", "rates": "final", "schedulers": "final"},
    "learning_rate": {"weights": "final", "memory": "final", "rates": "early", "schedulers": "early"},
    "fine_tune": {"weights": "final", "memory": "final", "rates": "last", "schedulers": "final"},
    "nothing": {"weights": "final", "memory": "final", "rates": "final", "schedulers": "final"},
}


def adam(params):
    return torch.optim.Adam(params, lr=0.02, amsgrad=True, weight_decay=0.01)


class Plateau(Net):
    def configure_optimizers(self):
        optimizer = sgd(self.parameters())
        scheduler = sched.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


MODELS = {
    "sgd, steps": lambda: Net(schedule=lambda o: sched.StepLR(o, 1, 0.7)),
    "adam, one cycle": lambda: Net(
        adam, schedule=lambda o: sched.OneCycleLR(o, 0.1, total_steps=40), interval="step"
    ),
    "sgd, cosine": lambda: Net(schedule=lambda o: sched.CosineAnnealingLR(o, 6), interval="step"),
    "adam, warm-up": lambda: Net(
        adam, schedule=lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.StepLR(o, 2)], [3])
    ),
    "sgd, plateau": Plateau,
    "two optimizers": Manual,
}


class Look(Callback):
    """Stands first and last: what a round ended with, and what the next one begins with."""

    def __init__(self):
        self.early, self.final, self.last, self.begun, self.masks = None, [], [], [], []
        self.first = Look.First(self)

    class First(Callback):
        def __init__(self, look):
            self.look = look

        def on_train_epoch_start(self, trainer, model):
            self.look.now = parts(trainer)

        def on_train_batch_start(self, trainer, model, *_):
            look = self.look
            if look.early is None and trainer.global_step >= K:
                look.early = parts(trainer)

        def on_train_batch_end(self, trainer, model, *_):
            self.look.rates = self.look.begin_rates

    def on_train_batch_start(self, trainer, model, *_):
        if len(self.masks) > len(self.begun):
            self.begun.append(parts(trainer))
        self.begin_rates = parts(trainer)["rates"]

    def on_prune(self, trainer, model, masks):
        self.masks.append(masks)
        self.final.append(self.now)
        self.last.append({"rates": self.rates})


def parts(trainer):
    """The state of a training, cut into what policies treat differently."""
    its = state(trainer)
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in o["param_groups"]] for o in its["optimizers"]
    ]
    return {
        "weights": (its["params"], its["buffers"]),
        "memory": [o["state"] for o in its["optimizers"]],
        "rates": deepcopy(groups),
        "schedulers": its["schedulers"],
    }


def put_on(its, masks, trainer):
    """The dead at zero, and what optimizers keep for them."""
    its = deepcopy(its)
    names = {id(p): n for n, p in trainer.lightning_module.named_parameters()}
    for name, mask in masks.items():
        its["weights"][0][name][~mask] = 0.0
    for optimizer, memory in zip(trainer.optimizers, its["memory"], strict=True):
        params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
        for number, p in enumerate(params):
            for value in memory.get(number, {}).values():
                if names[id(p)] in masks and value.shape == p.shape:
                    value[~masks[names[id(p)]]] = 0.0
    return its


@pytest.mark.filterwarnings("ignore:.* is made for .* and a round has")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FROM)
def test_a_round_begins_with_exactly_what_its_policy_says(name, kind, ours_first):
    look, model = Look(), MODELS[kind]()
    pruner = lp.IterativeMagnitudePruning(Geometric(0.3), rounds=3, every_n_epochs=2)
    ours = [pruner, lp.LotteryTicketRewind(K, policy=getattr(rewind, name))]
    trainer = fitter(look.first, *(ours if ours_first else reversed(ours)), look, epochs=8)
    trainer.fit(model)
    assert pruner.round == len(look.begun) == 3
    for final, last, begun, masks in zip(look.final, look.last, look.begun, look.masks, strict=True):
        sources = {"early": look.early, "final": final, "last": last}
        expected = {part: sources[source][part] for part, source in FROM[name].items()}
        if name == "fine_tune":
            expected["rates"] = look.last[0]["rates"]  # held from the first pruning on
        expected = put_on(expected, masks, trainer)
        assert [part for part in expected if not same(begun[part], expected[part])] == []
        for part in ("weights", "memory"):  # else early and final could be told apart by nothing
            assert not same(look.early[part], final[part])
    if kind != "two optimizers":
        assert not same(look.early["schedulers"], look.final[0]["schedulers"])
