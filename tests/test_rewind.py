"""A snapshot copies in and copies out, bit for bit, and shares no storage with anything."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched

from lightning_prune.copies import copied
from lightning_prune.rewind import Snapshot
from tests.naming import in_words
from tests.networks import Net, same, samples
from tests.test_holding import OPTIMIZERS, OPTIONS, RUNNING

SCHEDULERS = {
    "StepLR": lambda o: sched.StepLR(o, 2),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 4]),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.StepLR(o, 2)], [3]),
    "ChainedScheduler": lambda o: sched.ChainedScheduler([sched.LinearLR(o), sched.StepLR(o, 2)], o),
}


class Everything(nn.Module):
    """Parameters, tied and frozen, buffers of all kinds, and extra state beside them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.count = 0

    def forward(self, x):
        self.hidden += 1
        self.count += 1
        return self.norm(self.b(self.a(x))) * self.scale.sum()

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def all_of(model, optimizers=(), schedulers=()):
    return deepcopy(
        (
            {n: p.detach() for n, p in model.named_parameters()},
            dict(model.named_buffers()),
            getattr(model, "count", 0),
            [o.state_dict() for o in optimizers],
            [s.state_dict() for s in schedulers],
        )
    )


def train(model, optimizer, scheduler=None, steps=3):
    x, y = samples().tensors
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduler:
            scheduler.step()


def test_everything_of_the_model_comes_back():
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    before, ids = all_of(model, [optimizer]), [id(p) for p in model.parameters()]
    snapshot = Snapshot.take(model, [optimizer])
    train(model, optimizer)
    with torch.no_grad():
        model.frozen.add_(1)
    assert not same(all_of(model, [optimizer]), before)
    snapshot.restore(model, [optimizer])
    assert same(all_of(model, [optimizer]), before)
    assert [id(p) for p in model.parameters()] == ids
    assert model.b.weight is model.a.weight


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", RUNNING)
def test_the_state_of_every_optimizer_comes_back_and_training_repeats_itself(name, steps):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    train(model, optimizer, steps=steps)
    before = all_of(model, [optimizer])
    snapshot = Snapshot.take(model, [optimizer])
    train(model, optimizer)
    first = all_of(model, [optimizer])
    for _ in range(3):  # every round
        snapshot.restore(model, [optimizer])
        assert same(all_of(model, [optimizer]), before)
        train(model, optimizer)
        assert same(all_of(model, [optimizer]), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=in_words)
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RAdam", "ASGD", "Adamax", "Rprop", "RMSprop"])
def test_optimizer_state_comes_back_in_its_own_precision(name, dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    x, y = samples().tensors
    step = lambda: (nn.functional.cross_entropy(model(x.to(dtype)), y).backward(), optimizer.step())  # noqa: E731
    step(), step()
    before = all_of(model, [optimizer])
    snapshot = Snapshot.take(model, [optimizer])
    step()
    snapshot.restore(model, [optimizer])
    assert same(all_of(model, [optimizer]), before)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_every_scheduler_comes_back(name):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, scheduler)
    before = all_of(model, [optimizer], [scheduler])
    snapshot = Snapshot.take(model, [optimizer], [scheduler])

    def rates():
        return [train(model, optimizer, scheduler, 1) or optimizer.param_groups[0]["lr"] for _ in range(5)]

    first = rates()
    for _ in range(2):
        snapshot.restore(model, [optimizer], [scheduler])
        assert same(all_of(model, [optimizer], [scheduler]), before)
        assert rates() == first


def test_a_plateau_scheduler_comes_back():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = sched.ReduceLROnPlateau(optimizer, patience=1)
    scheduler.step(1.0)
    before = all_of(model, [optimizer], [scheduler])
    snapshot = Snapshot.take(model, [optimizer], [scheduler])
    for value in (2.0, 3.0, 4.0):
        scheduler.step(value)
    assert optimizer.param_groups[0]["lr"] < 0.05
    snapshot.restore(model, [optimizer], [scheduler])
    assert same(all_of(model, [optimizer], [scheduler]), before)


def test_nothing_can_change_a_snapshot():
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    snapshot = Snapshot.take(model, [optimizer])
    before = deepcopy(snapshot.state_dict())
    pointers = lambda value: {t.untyped_storage().data_ptr() for t in tensors_in(value) if t.numel()}  # noqa: E731
    mine = pointers(snapshot.state_dict())
    for _ in range(2):
        assert not mine & pointers([list(model.parameters()), list(model.buffers()), optimizer.state_dict()])
        train(model, optimizer)
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.mul_(3)
        for group in optimizer.param_groups:
            group["lr"] *= 2
        snapshot.restore(model, [optimizer])
        assert same(snapshot.state_dict(), before)


def tensors_in(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)


def test_a_snapshot_survives_a_file_of_plain_containers(tmp_path):
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = sched.MultiStepLR(optimizer, [2])
    train(model, optimizer, scheduler)
    before = all_of(model, [optimizer], [scheduler])
    torch.save(Snapshot.take(model, [optimizer], [scheduler]).state_dict(), tmp_path / "early")
    train(model, optimizer, scheduler)
    snapshot = Snapshot(**torch.load(tmp_path / "early", weights_only=True))
    snapshot.restore(model, [optimizer], [scheduler])
    assert same(all_of(model, [optimizer], [scheduler]), before)


def test_another_training_is_refused_and_nothing_is_changed():
    model, other = nn.Linear(3, 3), nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters())
    snapshot = Snapshot.take(model, [optimizer])
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"tensors: .*weight: \(3, 3\) in the snapshot, \(4, 3\) here"):
        snapshot.restore(other, [optimizer])
    assert same(other.state_dict(), before)
    with torch.no_grad():
        model.weight.add_(1)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"optimizers: .*1 in the snapshot, 0 here"):
        snapshot.restore(model)
    with pytest.raises(ValueError, match=r"schedulers: .*0 in the snapshot, 1 here"):
        snapshot.restore(model, [optimizer], [sched.StepLR(optimizer, 1)])
    assert same(model.state_dict(), before)


def test_a_copy_keeps_types_and_shares_nothing():
    value = {"a": [torch.ones(2), (torch.zeros(1), 3)], "b": None, 3: "x"}
    copy = copied(value)
    assert same(copy, value)
    copy["a"][0].add_(1)
    copy["a"][1][0].add_(1)
    assert same(value, {"a": [torch.ones(2), (torch.zeros(1), 3)], "b": None, 3: "x"})
