import copy
import gzip
import importlib
import io
import pickle
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_prune as lp
from lightning_prune.deploy import timing
from lightning_prune.deploy.sizes import gzipped, size
from lightning_prune.deploy.timing import Ratio
from lightning_prune.study.models import LeNet

accelerating = importlib.import_module("lightning_prune.deploy.accelerate")
FORMS = {"csr": accelerating._csr, "compact": accelerating._compact}


def sparse(model, sparsity=0.9):
    lp.prune(model, sparsity)
    return model.eval()


def faster(monkeypatch, form="csr"):
    """Let `form` win all races, so that what it computes can be tested on any machine."""

    def race(candidates, _):
        return {name: [1.0 if name in (form, "fast") else 2.0] for name in candidates}

    monkeypatch.setattr(accelerating, "settled", race)


def packed(model):
    forms = {name: vars(layer).get("forward") for name, layer in model.named_modules()}
    return {name: form for name, form in forms.items() if isinstance(form, accelerating._Packed)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(20, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 6)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.out(x + torch.relu(self.second(x)))


class Viewing(nn.Module):
    """Its view fails on a transposed result."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(8, 6)

    def forward(self, x):
        return self.second(self.first(x).view(-1, 8))


def mobile():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 24, 1, stride=2),
        nn.ReLU(),
        nn.Conv2d(24, 24, 1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


CASES = {
    "lenet": (lambda: LeNet(40, (30, 20), 10), (7, 40), ["fc1", "fc2", "out"]),
    "no bias and a residual": (Residual, (5, 20), ["first", "second", "out"]),
    "a view": (Viewing, (6, 12), ["first", "second"]),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        (3, 4, 8),
        ["0", "2"],
    ),
    "one example": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (8,), ["0", "2"]),
    "convolutions": (mobile, (2, 3, 9, 9), ["2", "4", "9"]),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(6, 9, 1), nn.ReLU(), nn.Conv1d(9, 4, 1, stride=3)),
        (3, 6, 11),
        ["0", "2"],
    ),
    "a single layer": (lambda: nn.Linear(10, 4), (3, 10), [""]),
}


# ------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_computes_what_the_model_does(case, form, monkeypatch):
    build, shape, names = CASES[case]
    model, x = sparse(build(), 0.7), torch.randn(shape)
    for layer in model.modules():  # rows and columns for the compact form to drop
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.weight.data[::3] = 0
            layer.weight.data[:, 1::3] = 0
    faster(monkeypatch, form)
    before = copy.deepcopy(model.state_dict())
    fast = lp.accelerate(model, x)
    assert list(packed(fast)) == names
    for other in (x, torch.randn(shape), torch.randn(2 * shape[0], *shape[1:]) if len(shape) > 1 else -x):
        torch.testing.assert_close(fast(other), model(other))
        with torch.inference_mode():
            torch.testing.assert_close(fast(other), model(other))
    assert fast(x).is_contiguous()
    assert {choice.layer: choice.form for choice in fast.acceleration.layers} == dict.fromkeys(names, form)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not packed(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
def test_a_product_equals_the_obvious_sum(form, bias, density):
    weight = torch.randn(9, 12, dtype=torch.float64) * (torch.rand(9, 12) < density)
    offset = torch.randn(9, dtype=torch.float64) if bias else None
    for n in (0, 1, 5):
        x = torch.randn(12, n, dtype=torch.float64)
        obvious = torch.zeros(9, n, dtype=torch.float64)
        for row in range(9):
            for column in range(12):
                obvious[row] += weight[row, column] * x[column]
            obvious[row] += offset[row] if bias else 0
        torch.testing.assert_close(FORMS[form](weight, offset)(x), obvious)


def test_activations_stay_transposed_from_one_product_to_the_next_only(monkeypatch):
    faster(monkeypatch)
    stays = {
        case: [
            form.stays_transposed
            for form in packed(lp.accelerate(sparse(build()), torch.randn(shape))).values()
        ]
        for case, (build, shape, _) in CASES.items()
    }
    assert stays["lenet"] == [True, True, False]
    assert stays["no bias and a residual"] == [True, False, False]  # a sum has the layout of its first term
    assert stays["sequences"] == [True, False]
    assert stays["a view"] == [False, False]
    assert stays["a single layer"] == [False]


def test_empty_batches_pass(monkeypatch):
    faster(monkeypatch)
    fast = lp.accelerate(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))
    assert fast(torch.randn(0, 40)).shape == (0, 10)


def test_shared_layers_and_tied_weights_stay_shared(monkeypatch):
    faster(monkeypatch)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 8))
    model[3].weight = layer.weight
    fast = lp.accelerate(sparse(model), x := torch.randn(3, 8))
    assert fast[0] is fast[2]
    assert fast[0].weight is fast[3].weight
    torch.testing.assert_close(fast(x), model(x))


def test_inputs_may_be_tuples_and_dicts(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a, b):
            return {"sum": self.layer(a) + b}

    faster(monkeypatch)
    model, a, b = sparse(Two(), 0.5), torch.randn(3, 4), torch.randn(3, 4)
    for example in ((a, b), {"a": a, "b": b}):
        fast = lp.accelerate(model, example)
        assert list(packed(fast)) == ["layer"]
        torch.testing.assert_close(fast(a, b)["sum"], model(a, b)["sum"])


def test_what_is_more_than_its_weight_is_left_alone(monkeypatch):
    faster(monkeypatch)

    class Mine(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, args, result: -result)
    attention = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0)
    model = sparse(
        nn.Sequential(Mine(8, 8), hooked, nn.Linear(8, 8), attention),
        0.5,
    )
    nn.utils.parametrizations.weight_norm(model[2]).eval()
    fast = lp.accelerate(model, x := torch.randn(2, 5, 8))
    assert not {"0", "1", "2"} & set(packed(fast))
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_dense_on_a_cpu(dtype):
    model = sparse(LeNet(40, (30, 20), 10)).to(dtype)
    fast = lp.accelerate(model, x := torch.randn(4, 40, dtype=dtype))
    assert not any("csr" in str(choice.form) for choice in fast.acceleration.layers)
    torch.testing.assert_close(fast(x), model(x))


# -------------------------------------------------------------------------------- a copy behaves like a model


@pytest.fixture
def pair(monkeypatch):
    faster(monkeypatch)
    model = sparse(LeNet(40, (30, 20), 10))
    return model, lp.accelerate(model, torch.randn(4, 40))


def test_copies_and_pickles_compute_the_same(pair):
    _, fast = pair
    x = torch.randn(5, 40)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), fast(x))
        assert other.acceleration == fast.acceleration


def test_state_dicts_are_those_of_the_model_and_can_be_loaded(pair):
    model, fast = pair
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fast.state_dict().items())
    other, x = sparse(LeNet(40, (30, 20), 10), 0.5), torch.randn(5, 40)
    fast(x)
    for assign in (False, True):
        fast.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign)
        torch.testing.assert_close(fast(x), other(x))
        other.load_state_dict({key: -value for key, value in other.state_dict().items()})
    model.load_state_dict(fast.state_dict(), strict=True)


def test_a_copy_follows_changes_of_its_weights_and_type(pair):
    model, fast = pair
    x = torch.randn(5, 40)
    fast(x)
    with torch.no_grad():
        for m in (model, fast):
            m.fc1.weight.mul_(2)
            m.fc1.bias.add_(1)
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast.double()(x.double()), model.double()(x.double()))


def test_a_copy_made_in_inference_mode_is_none_the_worse(monkeypatch):
    faster(monkeypatch)
    model, x = sparse(LeNet(40, (30, 20), 10)), torch.randn(5, 40)
    with torch.inference_mode():
        fast = lp.accelerate(model, x)
        fast(x)
    fast.load_state_dict(model.state_dict())
    x.requires_grad_()
    fast(x).sum().backward()
    grad, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(grad, x.grad)


class Touchy(nn.Module):
    """Reads its layers, counts, caches, draws: all that a forward may do besides computing."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 8), nn.BatchNorm1d(8)
        self.calls, self.seen, self.cache = 0, [], {}
        self.generator = torch.Generator().manual_seed(1)
        self.register_buffer("count", torch.zeros(1).expand(3))
        self.layer.note = "a user's"

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.cache.setdefault("first", {})[self.calls] = x
        self.count[:1] += 1
        if not hasattr(self, "table"):
            self.table = x.new_zeros(self.layer.out_features)
            self.register_buffer("made", torch.ones(2))
        noise = torch.rand(1) + random.random() + np.random.rand() + torch.rand(1, generator=self.generator)
        x = x.reshape(-1, self.layer.in_features) * (noise.to(x.dtype) > 0)
        return self.norm(self.layer(x) + self.table + (self.layer.bias is None) * self.layer.weight.sum())


def everything_of(model):
    held = {}
    for name, module in model.named_modules():
        held[name] = {k: copy.deepcopy(v) for k, v in vars(module).items() if k != "generator"}
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    own = model.generator.get_state().tolist(), model.count.tolist()
    return repr(held), generators, own, list(model.state_dict())


@pytest.mark.parametrize("function", [lp.accelerate, lp.summarize])
def test_neither_the_model_nor_the_generators_notice(function):
    model, x = sparse(Touchy(), 0.5), torch.randn(4, 12)
    before = everything_of(model)
    function(model, x)
    assert everything_of(model) == before
    assert not hasattr(model, "table")


def test_a_copy_is_as_new_and_has_all_that_models_read(monkeypatch):
    faster(monkeypatch)
    model, x = sparse(Touchy(), 0.5), torch.randn(4, 12)
    fast = lp.accelerate(model, x)
    assert list(packed(fast)) == ["layer"]
    assert (fast.calls, fast.seen, fast.cache, fast.count.tolist()) == (0, [], {}, [0, 0, 0])
    torch.testing.assert_close(fast(x), model(x))
    assert fast.calls == 1
    assert isinstance(fast.layer, nn.Linear)
    assert (fast.layer.in_features, fast.layer.out_features, fast.layer.note) == (12, 8, "a user's")
    assert repr(fast) == repr(model)
    for layer in (nn.Conv2d(4, 6, 1, stride=2), nn.Conv1d(4, 6, 1)):
        copied = lp.accelerate(sparse(layer, 0.5), torch.randn(2, 4, *[5] * (layer.weight.dim() - 2)))
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(copied, name) == getattr(layer, name)


def test_a_graph_that_a_model_keeps_does_no_harm(monkeypatch):
    faster(monkeypatch)
    model, x = sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40)
    model.last = model(x)
    fast = lp.accelerate(model, x)
    assert torch.equal(fast.last, model.last)
    assert not fast.last.requires_grad
    lp.summarize(model, x)
    model.last.sum().backward()


def test_a_model_that_cannot_be_copied_is_refused_by_name():
    model = sparse(LeNet(40, (30, 20), 10))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"the LeNet cannot be copied \(.*lock.*\); allowed are models"):
        lp.accelerate(model, torch.randn(4, 40))
    lp.summarize(model, torch.randn(4, 40))


def test_a_copy_of_a_copy_is_measured_anew(pair):
    model, fast = pair
    again, x = lp.accelerate(fast, torch.randn(4, 40)), torch.randn(5, 40)
    assert list(packed(again)) == list(packed(fast)) == ["fc1", "fc2", "out"]
    assert again.fc1.forward.layer is again.fc1
    torch.testing.assert_close(again(x), model(x))


def test_new_weights_in_the_memory_of_old_ones_are_packed_anew(pair):
    _, fast = pair
    x = torch.randn(5, 40)
    for _ in range(20):  # the memory that is given back is given out again
        fast.fc1.weight = nn.Parameter(torch.randn(30, 40))
        fast.fc1.weight = nn.Parameter(weight := torch.randn(30, 40))
        torch.testing.assert_close(fast.fc1(x), functional.linear(x, weight, fast.fc1.bias))


def test_nothing_of_the_surroundings_is_changed():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    model = sparse(LeNet(40, (30, 20), 10))
    state = torch.get_rng_state()
    lp.accelerate(model, torch.ones(4, 40))
    lp.summarize(model, torch.ones(4, 40))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------- what is not faster


def test_a_copy_that_is_not_faster_is_dense_and_says_so(monkeypatch, caplog):
    model, x = sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40)
    monkeypatch.setattr(accelerating, "settled", lambda candidates, _: {name: [1.0] for name in candidates})
    fast = lp.accelerate(model, x)
    assert not packed(fast)
    assert fast is not model
    assert torch.equal(fast(x), model(x))
    assert fast.acceleration.speed_up == 1
    assert "nothing is gained (1.00x as fast), so the copy is dense" in caplog.text
    assert "dense: these forms are 1.00x as fast" in str(fast.acceleration)


def test_a_layer_that_loses_its_neighbours_is_measured_again(monkeypatch):
    """`out` is slower as csr; then `fc2` is as well."""
    rounds = []

    def race(candidates, _):
        if "fast" in candidates:
            return {"dense": [1.5], "fast": [1.0]}
        if "csr" not in candidates:
            return {name: [1.0] for name in candidates}
        form = candidates["csr"].args[0].func  # of the call that is timed
        outputs = len(form.layer.weight)
        rounds.append(outputs)
        slow = outputs == 10 or (outputs == 20 and not form.stays_transposed)
        return {key: [1.0] for key in candidates} | {"csr": [2.0 if slow else 0.5]}

    monkeypatch.setattr(accelerating, "settled", race)
    fast = lp.accelerate(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))
    assert list(packed(fast)) == ["fc1"]
    assert not packed(fast)["fc1"].stays_transposed
    assert rounds == [30, 20, 10, 30, 20, 30]


def times_of(dense, fast):
    """A race of whole models whose runs take these times; of layers, csr wins."""

    def race(candidates, _):
        if "fast" in candidates:
            return {"dense": dense, "fast": fast}
        return {key: [2.0] for key in candidates} | {"csr": [1.0]}

    return race


def test_a_copy_timed_on_a_busy_machine_is_dense_and_says_so(monkeypatch, caplog):
    """The parts of the runs say 0.4, 0.99 and 2.1."""
    model, x = sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40)
    monkeypatch.setattr(accelerating, "settled", times_of([1.2, 0.99, 2.1], [3.0, 1.0, 1.0]))
    fast = lp.accelerate(model, x)
    assert not packed(fast)
    assert fast.acceleration.speed_up == 1
    assert "0.40x to 2.10x (too noisy to say) as fast, so the copy is dense. Try again when" in caplog.text
    assert "dense: these forms are 0.40x to 2.10x (too noisy to say) as fast" in str(fast.acceleration)


def test_a_copy_that_is_faster_in_every_part_of_noisy_runs_is_taken(monkeypatch):
    model, x = sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40)
    monkeypatch.setattr(accelerating, "settled", times_of([2.0, 9.0, 3.0], [1.0, 1.0, 1.0]))
    fast = lp.accelerate(model, x)
    assert list(packed(fast)) == ["fc1", "fc2", "out"]
    assert fast.acceleration.measured == Ratio(2.0, 2.0, 9.0)
    assert "these forms are 2.00x to 9.00x (too noisy to say) as fast" in str(fast.acceleration)


@pytest.mark.parametrize("function", [lp.accelerate, lp.summarize])
def test_training_mode_is_refused(function):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model.eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode; allowed .* model.eval\(\)"):
        function(model, torch.randn(2, 4))


def test_a_copy_refuses_to_train(pair):
    _, fast = pair
    with pytest.raises(RuntimeError, match="allowed to infer only"):
        fast.train()(torch.randn(2, 40))


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)),
    reason="2:4 needs a GPU of compute capability 8.0 or above",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_runs_on_a_gpu_that_supports_it(dtype, monkeypatch):
    FORMS["2:4"] = accelerating._two_four
    faster(monkeypatch, "2:4")
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data.view(-1, 4)[:, 1:3] = 0
    model, x = model.to("cuda", dtype), torch.randn(64, 128, device="cuda", dtype=dtype)
    fast = lp.accelerate(model, x)
    assert [choice.form for choice in fast.acceleration.layers] == ["2:4", "2:4"]
    torch.testing.assert_close(fast(x), model(x), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))


def test_two_of_four_is_told_from_other_patterns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    alive = torch.tensor([True, False, False, True]).repeat(32, 16)
    assert accelerating._is_two_four(alive, torch.float16)
    assert not accelerating._is_two_four(alive, torch.float32)
    assert not accelerating._is_two_four(alive[:31], torch.float16)
    alive[3, 1] = True
    assert not accelerating._is_two_four(alive, torch.float16)


# -------------------------------------------------------------------------------------------------- summarize


def test_multiply_adds_equal_the_obvious_count():
    model = sparse(mobile(), 0.5)
    x = torch.randn(2, 3, 8, 8)
    rows = {row.layer: row for row in lp.summarize(model, x).layers}
    sides = {"0": 64, "2": 64, "4": 16, "6": 16, "9": 1}  # places where each filter is applied
    for name, places in sides.items():
        weight = model.get_submodule(name).weight
        assert rows[name].multiply_adds == 2 * places * weight.numel()
        assert rows[name].effective_multiply_adds == 2 * places * int(weight.count_nonzero())
    assert rows["1"].multiply_adds == 0


def test_totals_are_those_of_the_network_and_both_ratios_as_defined():
    model = sparse(LeNet(), 0.9)
    summary = lp.summarize(model, torch.randn(8, 784))
    alive = sum(int(p.count_nonzero()) for p in model.parameters())
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert (summary.total.parameters, summary.total.alive) == (266_610, alive)
    assert summary.total.multiply_adds == 8 * 266_200
    assert summary.compression_ratio == 266_610 / alive
    assert summary.theoretical_speed_up == pytest.approx(
        266_200 / sum(int(w.count_nonzero()) for w in weights)
    )
    assert summary.total.raw_size == 4 * 266_610
    lp.save_sparse(model.state_dict(), "x")
    with open("x", "rb") as file:
        assert summary.total.sparse_size == len(file.read())
    assert summary.total.sparse_size < summary.total.gzip_size < summary.total.raw_size
    assert "batch 8, 1 threads, float32" in summary.where
    assert all(0 < row.latency_us < summary.total.latency_us * 10 for row in summary.layers)


def test_attention_counts_and_shared_tensors_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, tokens):
            return self.head(self.block(self.embed(tokens)))

    model = Tied().eval()
    summary = lp.summarize(model, torch.zeros(3, 5, dtype=torch.int64))
    assert summary.total.parameters == sum(p.numel() for p in model.parameters())
    places, products = 15, 8 * 24 + 8 * 8 + 2 * 8 * 16 + 8 * 10
    assert summary.total.multiply_adds == places * products + 2 * 3 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_two_summaries_are_compared_only_as_far_as_the_machine_was_the_same():
    summary = lp.summarize(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))

    def took(low, high, yardstick):
        total = replace(summary.total, latency_us=low)
        return replace(summary, total=total, spread_us=(low, high), yardstick_us=yardstick)

    before = took(100, 103, 10)
    assert took(50, 52, 10).against(before).startswith("1.00x smaller, 2.00x as fast (batch 4")
    assert "1.92x to 6.00x (too noisy to say) as fast" in took(50, 52, 30).against(before)  # busier, after
    assert "0.67x to 2.06x (too noisy to say) as fast" in took(50, 150, 10).against(before)
    assert "0.20x to 1.03x (too noisy to say) as fast" in took(100, 101, 10).against(took(100, 103, 50))
    assert summary.speed_up(summary).value == 1


def test_a_summary_is_a_table_for_people_and_a_dict_for_programs():
    summary = lp.summarize(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))
    text, values = str(summary), summary.to_dict()
    assert all(word in text for word in ("fc1", "total", "compression", "theoretical", "batch 4"))
    assert "(parameters over those that are not 0)" in " ".join(text.split())
    assert "(multiply-adds over those with a weight that is not 0" in " ".join(text.split())
    assert values["layers"][0]["layer"] == "fc1"
    assert values["compression_ratio"] == summary.compression_ratio
    assert pickle.loads(pickle.dumps(summary)) == summary


def test_an_acceleration_is_a_table_for_people_and_a_dict_for_programs(pair):
    _, fast = pair
    text, values = str(fast.acceleration), fast.acceleration.to_dict()
    assert all(word in text for word in ("fc1", "30 x 40", "csr", "end to end"))
    assert [row["form"] for row in values["layers"]] == ["csr"] * 3


# ------------------------------------------------------------------------------------------- size and time


def test_sizes_are_those_of_the_bytes_and_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 20))
    model[3].weight = model[2].weight
    lp.prune(model, 0.8)
    state = model.state_dict(keep_vars=True)
    sizes = size(state)
    parameters = list(model.parameters())
    once = [tensor for name, tensor in state.items() if name != "3.weight"]
    assert sizes.parameters == sum(p.numel() for p in parameters) == 620 + 40 + 420 + 20
    assert sizes.alive == sum(int(p.count_nonzero()) for p in parameters)
    assert sizes.raw == sum(t.nbytes for t in once)
    content = b"".join(t.detach().numpy().tobytes() for t in once)
    assert sizes.gzip == len(gzip.compress(content, 6))
    lp.save_sparse(state, tmp_path / "file")
    assert sizes.sparse == (tmp_path / "file").stat().st_size
    assert size(model.state_dict()) == replace(sizes, parameters=0, alive=0)
    assert size({"a": torch.ones(3).conj(), "extra": {}}).raw == 12
    assert gzipped([]) == len(gzip.compress(b""))


def test_runs_are_alternated_and_as_many_as_asked_for(monkeypatch):
    order = []

    def measuring(name):
        return lambda: order.append(name) or float(len(order))

    times = timing.alternated({"a": measuring("a"), "b": measuring("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert times == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert timing.alternated({}, rounds=3) == {}
    clock = iter(range(100))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    assert len(timing.alternated({"a": lambda: 1.0}, rounds=2, at_least=10)["a"]) == 11
    monkeypatch.setattr(timing, "perf_counter", lambda: 0.0)
    assert len(timing.alternated({"a": lambda: 1.0}, at_least=1.0)["a"]) == 1000


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.85])
def test_a_ratio_is_true_however_often_others_interrupt(share):
    """Each run of two works of 2 and 1 seconds is interrupted with this probability, for up to 30 seconds."""
    draw = random.Random(0)

    def runs(seconds):
        return [seconds + draw.expovariate(1 / 10) * (draw.random() < share) for _ in range(300)]

    found = timing.ratio(runs(2.0), runs(1.0))
    assert found.value == pytest.approx(2, rel=0.02)
    assert not found.noisy


@pytest.mark.parametrize("n", [5, 9, 60])
def test_what_the_runs_disagree_on_is_not_said(n):
    draw = random.Random(0)
    said = wrong = 0
    for _ in range(200):
        a, b = ([1 + draw.expovariate(1) for _ in range(n)] for _ in range(2))  # always disturbed
        found = timing.ratio(a, b)
        assert found.low <= found.value <= found.high
        said += not found.noisy
        wrong += not found.noisy and not 0.75 < found.value < 1.33
    assert wrong <= 4
    assert n == 60 or said < 100


def test_runs_that_disagree_are_repeated_until_they_agree_or_patience_ends(monkeypatch):
    done = []

    def runs(candidates, at_least, warm_up=0):
        done.append((at_least, warm_up))
        return {"a": [1.0, 1.0, 1.0], "b": [disturbed, 1.0, 1.0]}

    monkeypatch.setattr(timing, "alternated", runs)
    disturbed = 9.0
    assert timing.settled({"a": None, "b": None}, 0.5)["b"] == [9, 1, 1, 9, 1, 1]  # whose parts agree
    assert done == [(0.5, 2), (0.5, 0)]
    disturbed = 1.1
    assert timing.settled({"a": None, "b": None}, 0.5)["b"] == [1.1, 1, 1]
    slower = iter([1, 2, 4, 8, 16])
    monkeypatch.setattr(timing, "alternated", lambda *_, **__: {"a": [1] * 3, "b": [next(slower)] * 3})
    monkeypatch.setattr(timing, "ratio", lambda a, b: Ratio(1.0, 0.5, 2.0))
    assert timing.settled({"a": None, "b": None}, 0.5)["b"] == [1] * 3 + [2] * 3 + [4] * 3 + [8] * 3


def test_a_measurement_waits_for_what_was_started_on_a_gpu(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert timing.seconds(lambda: order.append("work")) > 0
    assert order == ["wait", "work", "wait"]


def test_the_machine_is_named():
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in timing.machine()
    assert timing.hardware() in timing.machine()


# ----------------------------------------------------------------------------------------------------- export


@pytest.mark.filterwarnings("ignore")  # those of the exporter
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 exports functions of its own")
def test_a_pruned_model_exports_without_custom_operators():
    onnxruntime = pytest.importorskip("onnxruntime")
    model = sparse(nn.Sequential(mobile(), nn.ReLU(), nn.Linear(5, 3)), 0.8)
    x = torch.randn(2, 3, 9, 9)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    onnx_program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    onnx_program.save("model.onnx")
    assert {node.domain for node in onnx_program.model_proto.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(result), functional.relu(model[0](x)) @ model[2].weight.t() + model[2].bias
    )
