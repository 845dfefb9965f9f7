"""Networks in any precision, and with tensors that nobody may write to, are cut as any other."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import filters, prune_channels
from lightning_prune.structured import cut, cut_of, discover
from tests.naming import in_words
from tests.networks import Net, fitter, same
from tests.test_channels import masked


def layers(norm=False):
    norms = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(
        nn.Linear(4, 16), *norms, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()


# ------------------------------------------------------------------------------------------- precision


class Casts(nn.Module):
    """Casts what comes in, and multiplies by a tensor that it keeps beside its weights."""

    def __init__(self, dtype, how=lambda x, dtype: x.to(dtype)):
        super().__init__()
        self.net, self.dtype, self.how = layers().to(dtype), dtype, how
        self.turn = torch.eye(4, dtype=dtype)

    def forward(self, x):
        x = self.how(x, self.dtype)
        y = self.net(x @ self.turn) + torch.zeros(3, dtype=self.dtype)
        return y.float()


class Mixed(nn.Module):
    """Each layer in a precision of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16).half(), nn.Linear(16, 16).bfloat16(), nn.Linear(16, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x.half()).relu().bfloat16()).relu().float())


class Narrow(nn.Module):
    """Weights in full precision, and what lies between them is rounded to half of it."""

    def __init__(self):
        super().__init__()
        self.net = layers()

    def forward(self, x):
        x = self.net[:2](x).half().float()
        return self.net[2:](x)


HOW = {
    "to": lambda x, dtype: x.to(dtype),
    "type": lambda x, dtype: x.type(dtype),
    "method": lambda x, dtype: {2: x.half(), 8: x.double()}[dtype.itemsize],
    "like another": lambda x, dtype: x.type_as(torch.ones((), dtype=dtype)),
    "text": lambda x, dtype: x.type({2: "torch.HalfTensor", 8: "torch.DoubleTensor"}[dtype.itemsize]),
}
OWN_CASTS = {
    **{f"half, {name}": (Casts, torch.float16, how) for name, how in HOW.items()},
    **{f"double, {name}": (Casts, torch.float64, how) for name, how in HOW.items()},
    "bfloat16": (Casts, torch.bfloat16),
    "mixed": (Mixed,),
    "narrow": (Narrow,),
}


@pytest.mark.parametrize("name", OWN_CASTS)
def test_a_network_that_casts_is_cut_as_one_in_full_precision(name):
    make, *arguments = OWN_CASTS[name]
    torch.manual_seed(0)
    model, x = make(*arguments), torch.randn(5, 4)
    couplings = discover(model, x)
    assert [coupling.units for coupling in couplings.values()] == [16, 16]
    some = {n: torch.rand(16).argsort() >= 6 for n in couplings}
    removed = cut_of(couplings, some)
    twin, dtypes = masked(model, removed), [p.dtype for p in model.parameters()]
    cut(model, removed)
    assert [p.dtype for p in model.parameters()] == dtypes
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=in_words)
def test_a_target_counts_on_numbers_of_the_networks_precision(dtype):
    before = sum(p.numel() for p in layers().parameters())
    for target in (filters.Removed(0.3, "multiply_adds"), filters.Smaller(dtype.itemsize * before * 0.7)):
        model = layers().to(dtype)
        prune_channels(model, target, [2, 4])
        assert sum(p.numel() for p in model.parameters()) <= 0.72 * before
    model = layers().to(dtype)
    for target in (filters.Removed(0.3, "multiply_adds"), filters.Faster(1.1)):
        with pytest.raises(ValueError, match=r"example_input: Sequential does not run on it \(RuntimeError"):
            prune_channels(model, target, torch.randn(2, 4))
    assert sum(p.numel() for p in model.parameters()) == before


# ---------------------------------------------------------------------------------------------- memory


def of_inference():
    with torch.inference_mode():
        return torch.ones(8)


KEPT = {
    "expanded": lambda: torch.ones(1).expand(8),
    "expanded rows": lambda: torch.ones(3, 1).expand(3, 8),
    "overlapping": lambda: torch.arange(8.0).unfold(0, 4, 1),
    "a part of a larger one": lambda: torch.ones(100)[3:11],
    "of inference": of_inference,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "half": lambda: torch.ones(1).half().expand(8),
}


class Keeps(Net):
    """A buffer, and a frozen parameter, of some memory."""

    def __init__(self, make):
        super().__init__()
        self.register_buffer("kept", make())
        if self.kept.layout == torch.strided:
            self.frozen = nn.Parameter(make(), requires_grad=False)

    def forward(self, x):
        return super().forward(x) + self.kept.to_dense().sum()


@pytest.mark.parametrize("name", KEPT)
def test_tensors_of_any_memory_stay_as_they_are_in_a_cut(name):
    model = Keeps(KEPT[name]).eval()
    kept, own, stride = model.kept, model.kept.clone(), model.kept.layout == torch.strided
    steps = kept.stride() if stride else None
    prune_channels(model, 0.5, [2, 6])
    assert model.kept is kept
    assert torch.equal(kept.to_dense(), own.to_dense())
    assert not stride or kept.stride() == steps
    assert model.stem.out_features == model.body.out_features == 8


@pytest.mark.parametrize("remove", ["end", "each_round"])
@pytest.mark.parametrize("name", ["expanded", "overlapping", "half"])
def test_tensors_of_any_memory_go_through_a_fit_and_load_again(name, remove, tmp_path):
    model = Keeps(KEPT[name])
    pruner = lp.StructuredChannelPruning(lp.schedules.OneShot(0.5), remove=remove, calibrate=1)
    trainer = fitter(pruner, epochs=2)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    again = lp.load_pruned(Keeps(KEPT[name]), tmp_path / "small.ckpt")
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_statistics_that_are_one_in_memory_are_cut_and_taken_anew():
    for data in (None, [torch.randn(32, 4)]):
        model = layers(norm=True)
        model[1].running_mean, model[1].running_var = torch.zeros(1).expand(16), torch.ones(1).expand(16)
        plain = deepcopy(model)
        plain[1].running_mean, plain[1].running_var = torch.zeros(16), torch.ones(16)
        for net in (model, plain):
            prune_channels(net, 0.5, [2, 4], data=data, calibrate=data is not None, include=["3.*"])
        assert same(dict(model.state_dict()), dict(plain.state_dict()))


def test_a_network_made_in_inference_mode_is_cut_loaded_and_stays_one(tmp_path):
    plain, x = layers(norm=True), torch.randn(5, 4)
    with torch.inference_mode():
        model, fresh = layers(norm=True), layers(norm=True)
        model.load_state_dict(plain.state_dict())
    for net in (model, plain):
        prune_channels(net, 0.5, [2, 4], data=[torch.ones(8, 4), x], calibrate=True)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    lp.load_pruned(fresh, tmp_path / "small.pt")
    for net in (model, fresh):
        assert all(p.is_inference() for p in net.parameters())
        with torch.no_grad():
            assert torch.equal(net(x), plain(x))


def test_a_network_that_is_cut_in_inference_mode_trains_on():
    model = layers(norm=True).train()
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()

    step()
    with torch.inference_mode():
        prune_channels(model, 0.5, [2, 4], optimizer=optimizer)
    step()
    assert model[0].out_features == 8
