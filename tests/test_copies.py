"""What is copied can be put back, and a model that ran on the side is as it was, whatever it keeps."""

import random
import threading
from collections import OrderedDict, deque
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.copies import put_back, remember
from lightning_prune.evidence import undisturbed
from lightning_prune.rewind import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def coo(values):
    return torch.tensor(values).to_sparse()


KINDS = {  # of tensors: how to make one, and another content for it
    "plain": (lambda: torch.arange(6.0).view(2, 3), lambda t: t.mul_(-2)),
    "transposed": (lambda: torch.arange(6.0).view(2, 3).t(), lambda t: t.add_(1)),
    "a scalar": (lambda: torch.tensor(3), lambda t: t.add_(1)),
    "empty": (lambda: torch.empty(0, 3), lambda t: t),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda t: t[:1].fill_(2)),
    "expanded in the middle": (
        lambda: torch.arange(6.0).view(2, 1, 3).expand(2, 4, 3),
        lambda t: t[:, :1].mul_(-2),
    ),
    "bool": (lambda: torch.tensor([True, False]), lambda t: t.logical_not_()),
    "NaN and -0": (lambda: torch.tensor([float("nan"), -0.0]), lambda t: t.fill_(1)),
    "sparse": (lambda: coo([[0.0, 1.0], [2.0, 0.0]]), lambda t: t.copy_(coo([[5.0, 0.0], [0.0, 0.0]]))),
    "sparse rows": (
        lambda: torch.eye(3).to_sparse_csr(),
        lambda t: t.resize_as_sparse_(ones := torch.ones(3, 3).to_sparse_csr()).copy_(ones),
    ),
    "made in inference mode": (lambda: made_in_inference_mode(), lambda t: in_inference_mode(t)),
}


@torch.inference_mode()
def made_in_inference_mode():
    return torch.arange(3.0)


@torch.inference_mode()
def in_inference_mode(tensor):
    tensor.mul_(-2)


def bits(tensor):
    dense = tensor.detach().to_dense().contiguous()
    return dense.dtype, tuple(dense.shape), dense.view(-1).view(torch.uint8).tolist()


class Holds(nn.Module):
    """A layer, and whatever is given: as a buffer, as an attribute and in a container."""

    def __init__(self, tensor, change):
        super().__init__()
        self.layer, self.change = nn.Linear(3, 2), change
        self.register_buffer("buffer", tensor)

    def forward(self, x):
        self.change(self)
        return self.layer(x)


@pytest.mark.parametrize("where", ["buffer", "attribute", "in a list", "in a dict of tuples"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind_come_back_into_the_same_object(kind, where):
    make, change = KINDS[kind]
    tensor = make()
    before, step = bits(tensor), tensor.stride() if tensor.layout == torch.strided else None
    model = Holds(tensor if where == "buffer" else None, lambda _: change(tensor))
    model.kept = {"buffer": None, "attribute": tensor, "in a list": [tensor]}.get(
        where, {"a": ((tensor, 1),)}
    )
    with undisturbed(model):
        model(torch.ones(1, 3)).sum().backward()
        assert kind == "empty" or bits(tensor) != before
    assert bits(tensor) == before
    assert step is None or tensor.stride() == step
    assert (
        tensor
        is {
            "buffer": lambda: model.buffer,
            "attribute": lambda: model.kept,
            "in a list": lambda: model.kept[0],
            "in a dict of tuples": lambda: model.kept["a"][0][0],
        }[where]()
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "made in inference mode"])
def test_buffers_of_every_kind_are_rewound_bit_for_bit(kind):
    make, change = KINDS[kind]
    model = Holds(tensor := make(), lambda _: change(tensor))
    before = bits(tensor)
    snapshot = Snapshot.take(model)
    for _ in range(2):
        with torch.no_grad():
            model(torch.ones(1, 3))
        assert kind == "empty" or bits(tensor) != before
        snapshot.restore(model)
        assert bits(model.buffer) == before
        assert model.buffer is tensor


def test_a_buffer_that_is_a_view_of_another_stays_one():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("all", torch.arange(6.0))
            self.register_buffer("some", self.all[2:5])
            self.register_buffer("spread", self.all[:1].expand(4))

        def forward(self, x):
            self.some.add_(x)
            self.all.mul_(2)
            return self.some.sum()

    model = Viewing()
    snapshot, before = Snapshot.take(model), deepcopy(model.state_dict())
    for back in ("undisturbed", "rewound"):
        with undisturbed(model):
            model(1)
        if back == "rewound":
            model(1)
            snapshot.restore(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model.all[2] = 7
        assert model.some[0] == 7
        model.all[2] = 2


def test_a_tensor_attribute_that_requires_grad_keeps_its_gradient():
    model = Holds(None, lambda self: None)
    model.scale = torch.tensor([2.0], requires_grad=True)
    model.forward = lambda x: model.layer(x) * model.scale
    model.scale.grad = grad = torch.tensor([5.0])
    model.layer.bias.requires_grad_(False)
    with undisturbed(model):
        assert model.scale.grad is None
        model(torch.ones(1, 3)).sum().backward()
        model.scale.requires_grad_(False).mul_(3)
        model.layer.bias.requires_grad_(True)
    assert model.scale.tolist() == [2]
    assert model.scale.requires_grad
    assert model.scale.grad is grad
    assert grad.tolist() == [5]
    assert model.layer.weight.grad is None
    assert not model.layer.bias.requires_grad


def test_a_graph_that_a_module_keeps_can_still_be_differentiated():
    """`self.last = out`: it is no leaf, and the graph saved it."""
    model = Holds(None, lambda self: None)
    model.last = model.layer(torch.ones(1, 3)).exp()
    loss, before = model.last.sum(), model.last.detach().clone()
    with undisturbed(model):
        model(torch.ones(1, 3))
        model.last.data.mul_(2)
    assert torch.equal(model.last.detach(), before)
    loss.backward()
    assert torch.equal(model.layer.bias.grad, before[0])


def test_what_is_made_on_the_first_call_is_gone():
    class Lazily(nn.Module):
        def forward(self, x):
            if not hasattr(self, "made"):
                self.made = x.clone()
                self.register_buffer("scratch", x.clone(), persistent=False)
                self.weight = nn.Parameter(x.clone())
                self.child = nn.Linear(2, 2)
                self.register_forward_hook(lambda *_: None)
            self.cache[len(self.cache)] = [x]
            return x

    model = nn.Sequential(Lazily())
    model[0].cache = {}
    before = {name: deepcopy(value) for name, value in vars(model[0]).items()}
    with undisturbed(model):
        model(torch.ones(2))
        model(torch.ones(2))
    assert vars(model[0]) == before
    assert not list(model.state_dict())


def test_containers_arrays_and_generators_come_back_however_deep_they_lie():
    held = {
        "nested": {"a": [1, {2, 3}], "b": (deque([4]), [])},
        "ordered": OrderedDict(x=1, y=2),
        "array": np.arange(3.0),
        "generators": [torch.Generator().manual_seed(3), random.Random(4), np.random.default_rng(5)],
    }
    held["itself"] = held

    def draw():
        mine, python, numpy = held["generators"]
        return float(torch.rand(1, generator=mine)), python.random(), numpy.random()

    undo = remember(held)
    first = draw()
    held["nested"]["a"][1].add(9)
    held["nested"]["b"][0].append(9)
    held["nested"]["b"][1].append(held)
    held["ordered"].move_to_end("x")
    held["array"][:] = -1
    held["new"] = 1
    undo()
    assert held["nested"] == {"a": [1, {2, 3}], "b": (deque([4]), [])}
    assert list(held["ordered"].items()) == [("x", 1), ("y", 2)]
    assert held["array"].tolist() == [0, 1, 2]
    assert list(held) == ["nested", "ordered", "array", "generators", "itself"]
    assert draw() == first


def test_attributes_that_cannot_be_copied_do_no_harm():
    model = Holds(None, lambda self: setattr(self, "count", self.count + 1))
    model.count = 0
    kept = {"lock": threading.Lock(), "running": (i for i in range(3)), "file": open(__file__)}  # noqa: SIM115
    vars(model).update(kept)
    with undisturbed(model):
        model(torch.ones(1, 3))
        model.lock = None
    kept["file"].close()
    assert model.count == 0
    assert {name: getattr(model, name) for name in kept} == kept


def test_a_lazy_layer_is_left_to_its_first_call():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    state = torch.get_rng_state()
    with undisturbed(model):
        model(torch.ones(3, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.ones(3, 2)).shape == (3, 4)


def test_an_error_inside_is_raised_and_everything_is_put_back():
    model = nn.BatchNorm1d(2)
    model.register_forward_hook(lambda *_: {}["missing"])
    with pytest.raises(KeyError), undisturbed(model):
        model(torch.rand(8, 2))
    assert model.running_mean.tolist() == [0, 0]
    assert int(model.num_batches_tracked) == 0


def test_parameters_stay_what_was_made_of_them():
    layer = nn.Linear(2, 2)
    with undisturbed(layer):
        layer.weight.data.fill_(3)
    assert layer.weight.tolist() == [[3, 3], [3, 3]]


def test_elements_of_one_memory_are_written_once():
    tensor = torch.tensor([1.0, 2.0]).view(2, 1).expand(2, 5)
    put_back(tensor, torch.tensor([[3.0] * 5, [4.0] * 5]))
    assert tensor.tolist() == [[3] * 5, [4] * 5]
