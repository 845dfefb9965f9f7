import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_prune as lp
from experiments.models import LeNet
from lightning_prune.deploy import inference

FORMS = {"csr": inference._csr, "compact": inference._compact}


def sparse(model, sparsity=0.9):
    lp.prune(model, sparsity)
    return model.eval()


def faster(monkeypatch, form="csr"):
    """Let `form` win all races, so that what it computes can be tested on any machine."""

    def race(works, seconds):
        forms = [work.func.pack if isinstance(work.func, inference._Packed) else None for work in works]
        return [[1.0 if its is FORMS[form] else 2.0] for its in forms[:-1]] + [
            [1.0 if forms[-1] is FORMS[form] else 1.9]
        ]

    monkeypatch.setattr(inference, "_alternated", race)


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, inference._Packed)}


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
            layer.stays_transposed
            for layer in packed(lp.accelerate(sparse(build()), torch.randn(shape))).values()
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
    monkeypatch.setattr(inference, "_alternated", lambda works, seconds: [[1.0] for _ in works])
    fast = lp.accelerate(model, x)
    assert not packed(fast)
    assert fast is not model
    assert torch.equal(fast(x), model(x))
    assert fast.acceleration.speed_up == 1
    assert "nothing is gained (1.00x as fast)" in caplog.text
    assert "dense: these forms are 1.00x as fast" in str(fast.acceleration)


def test_a_layer_that_loses_its_neighbours_is_measured_again(monkeypatch):
    """`out` is slower as csr; then `fc2` is as well."""
    rounds = []

    def race(works, seconds):
        if not isinstance(works[-1].func, inference._Packed):
            return [[1.5 if work.func is inference._call else 1.0] for work in works[:-1]] + [[1.0]]
        layer = next((work.func for work in works if FORMS["csr"] is getattr(work.func, "pack", None)), None)
        if layer is None:
            return [[1.0]] * len(works)
        rounds.append(len(layer.weight))
        slow = len(layer.weight) == 10 or (len(layer.weight) == 20 and not layer.stays_transposed)
        return [[1.0], [2.0 if slow else 0.5], *([[1.0]] * (len(works) - 2))]

    monkeypatch.setattr(inference, "_alternated", race)
    fast = lp.accelerate(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))
    assert list(packed(fast)) == ["fc1"]
    assert not fast.fc1.stays_transposed
    assert rounds == [30, 20, 10, 30, 20, 30]


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


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)),
    reason="2:4 needs a GPU of compute capability 8.0 or above",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_runs_on_a_gpu_that_supports_it(dtype, monkeypatch):
    FORMS["2:4"] = inference._two_four
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
    assert inference._is_two_four(alive, torch.float16)
    assert not inference._is_two_four(alive, torch.float32)
    assert not inference._is_two_four(alive[:31], torch.float16)
    alive[3, 1] = True
    assert not inference._is_two_four(alive, torch.float16)


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


def test_a_summary_is_a_table_for_people_and_a_dict_for_programs():
    summary = lp.summarize(sparse(LeNet(40, (30, 20), 10)), torch.randn(4, 40))
    text, values = str(summary), summary.to_dict()
    assert all(word in text for word in ("fc1", "total", "compression", "theoretical", "batch 4"))
    assert values["layers"][0]["layer"] == "fc1"
    assert values["compression_ratio"] == summary.compression_ratio
    assert pickle.loads(pickle.dumps(summary)) == summary


def test_an_acceleration_is_a_table_for_people_and_a_dict_for_programs(pair):
    _, fast = pair
    text, values = str(fast.acceleration), fast.acceleration.to_dict()
    assert all(word in text for word in ("fc1", "30 x 40", "csr", "end to end"))
    assert [row["form"] for row in values["layers"]] == ["csr"] * 3


# ----------------------------------------------------------------------------------------------------- export


@pytest.mark.filterwarnings("ignore")  # those of the exporter
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
