"""A plan is carried out all or nothing, on everything that has the channels, and nothing else notices."""

from copy import deepcopy

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from lightning_prune.holding import Handle
from lightning_prune.rewind import Snapshot
from lightning_prune.structured import discover
from lightning_prune.structured import units as structure
from lightning_prune.structured.surgery import cut, cut_snapshot
from tests.networks import same
from tests.test_channels import IMAGE, Residual, alive, masked, relative

OPTIMIZERS = {
    "SGD nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam decay": lambda p: optim.Adam(p, lr=1e-3, weight_decay=1e-3),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-3),
    "AdamW amsgrad fused": lambda p: optim.AdamW(p, lr=1e-3, amsgrad=True, fused=True),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-3),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-3),
}


class Net(Residual):
    """Without the biases before batch normalization, whose gradient is rounding noise."""


def steps(model, optimizer, n):
    losses = []
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(8, *IMAGE[1:], generator=generator, dtype=next(model.parameters()).dtype)
        y = torch.arange(8) % 5
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(make=OPTIMIZERS["AdamW"], n=3, dtype=torch.float32):
    model = Net().to(dtype)
    nn.init.ones_(model.scale)
    optimizer = make(model.parameters())
    steps(model, optimizer, n)
    groups = discover(model, torch.randn(IMAGE, dtype=dtype))
    return model, optimizer, groups, alive(groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cut_training_goes_on_as_the_masked_one_does(name):
    # in double precision: adaptive optimizers divide rounding noise by its own size
    model, optimizer, groups, masks = trained(OPTIMIZERS[name], dtype=torch.float64)
    twin, of_twin = deepcopy((model, optimizer))
    of_twin.param_groups[0]["params"] = list(twin.parameters())
    of_twin.state.clear()
    of_twin.load_state_dict(deepcopy(optimizer.state_dict()))
    params = structure.parameters(groups, twin)
    Handle(params, structure.weight_masks(groups, masks, params), [of_twin], gradients=True)
    cut(model, structure.cut_of(groups, masks), [optimizer])
    mine, theirs = steps(model, optimizer, 10), steps(twin, of_twin, 10)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)
    assert relative(model.eval(), twin.eval(), torch.randn(IMAGE, dtype=torch.float64)) < 1e-6


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_the_momentum_of_muon_is_cut_along():
    model, x = (
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        torch.ones(4, 6),
    )
    optimizer = optim.Muon(model.parameters(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    before = [optimizer.state[layer.weight]["momentum_buffer"].clone() for layer in (model[0], model[2])]
    groups = discover(model, x)
    stay = torch.arange(8) % 3 > 0
    cut(model, structure.cut_of(groups, {"0.weight": stay}), [optimizer])
    after = [optimizer.state[layer.weight]["momentum_buffer"] for layer in (model[0], model[2])]
    assert same(after, [before[0][stay], before[1][:, stay]])
    model(x).square().sum().backward()
    optimizer.step()


def test_everything_that_can_stay_the_same_stays_the_same():
    model, optimizer, groups, masks = trained()
    model = model.to(memory_format=torch.channels_last)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2)
    model.stem.requires_grad_(False)
    params, buffers = list(model.named_parameters()), list(model.named_buffers())
    before, schedule = deepcopy(model.state_dict()), deepcopy(scheduler.state_dict())
    grads = {n: p.grad.clone() for n, p in params}
    plan = structure.cut_of(groups, masks)
    cut(model, plan, [optimizer])
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in params]
    assert [(n, id(b)) for n, b in model.named_buffers()] == [(n, id(b)) for n, b in buffers]
    assert [p.requires_grad for p in model.stem.parameters()] == [False] * 3
    assert model.head.weight.requires_grad
    assert model.plain[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.plain[0][0].weight.is_contiguous()
    assert same(scheduler.state_dict(), schedule)
    for name, tensor in model.state_dict().items():
        want, grad = before[name], grads.get(name)
        for (module, key, dim), gone in plan.items():
            if f"{module}.{key}".strip(".") == name:
                stay = [i for i in range(want.shape[dim]) if i not in gone.tolist()]
                want = want.index_select(dim, torch.tensor(stay))
                grad = grad if grad is None else grad.index_select(dim, torch.tensor(stay))
        assert torch.equal(tensor, want)
        assert grad is None or torch.equal(dict(params)[name].grad, grad)
        if grad is not None:
            assert all(s.shape == grad.shape for s in optimizer.state[dict(params)[name]].values() if s.dim())
    assert (model.grouped[1][0].groups, model.depthwise[1][0].groups) == (
        4,
        model.depthwise[1][0].in_channels,
    )


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(torch.relu(self.body(torch.relu(self.embed(i)))) + self.embed(i))

    model, x = Tied(), torch.arange(6).view(2, 3)
    groups = discover(model, x)
    removed = structure.cut_of(groups, alive(groups))
    twin = masked(model, removed)
    cut(model, removed)
    assert model.head.weight is model.embed.weight
    assert (model.embed.embedding_dim, model.head.in_features, model.head.out_features) == (5, 5, 11)
    assert relative(model, twin, x) < 1e-5


@pytest.mark.parametrize("how", ["plan", "LBFGS", "odd state", "copy"])
def test_a_cut_that_fails_changes_nothing(how):
    model, optimizer, groups, masks = trained()
    plan, copies = structure.cut_of(groups, masks), []
    if how == "plan":
        plan["head", "weight", 1] = torch.tensor([99])
    elif how == "LBFGS":
        optimizer = optim.LBFGS(model.parameters())
    elif how == "odd state":
        optimizer.state[model.gate[0].weight]["row"] = torch.ones(4)
    else:
        copies = [nn.Linear(2, 2)]
    before = deepcopy((model.state_dict(), optimizer.state_dict(), str(model)))
    with pytest.raises(ValueError, match=r"[Aa]llowed|Make the plan"):
        cut(model, plan, [optimizer], copies)
    assert same((model.state_dict(), optimizer.state_dict(), str(model)), before)


def test_averaged_copies_are_cut_along():
    model, optimizer, groups, masks = trained()
    average = AveragedModel(model)
    cut(model, structure.cut_of(groups, masks), [optimizer], [average.module])
    steps(model, optimizer, 1)
    average.update_parameters(model)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]


def test_a_snapshot_is_cut_with_the_same_plan():
    model, optimizer, groups, masks = trained()
    snapshot, plan = Snapshot.take(model, [optimizer]), structure.cut_of(groups, masks)
    kept = deepcopy(snapshot.state_dict())
    cut(model, plan, [optimizer])
    want = deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 2)
    cut_snapshot(snapshot, plan, model, [optimizer]).restore(model, [optimizer])
    assert same((model.state_dict(), optimizer.state_dict()), want)
    assert same(snapshot.state_dict(), kept)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 exports functions of its own")
def test_a_cut_network_exports_to_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, _, groups, masks = trained()
    cut(model, structure.cut_of(groups, masks))
    model.eval()
    x = torch.randn(IMAGE)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.onnx.export(model, (x,), tmp_path / "cut.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "cut.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
