"""Layers: which weights may be pruned, why others may not, and which dimension of a weight is what."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lightning_prune as lp
from lightning_prune.layers import Layout, layouts, prunable
from tests import reference_methods as oracle
from tests.naming import in_words


def reasons(model, **options):
    return {target.parameter: target.why_not for target in lp.targets(model, **options)}


# ---------------------------------------------------------------------------------------------------- experts


class Bank(nn.Module):
    """Experts as transformers keeps them: one tensor for each of their two layers."""

    def __init__(self, inputs=4, hidden=6, experts=3):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, inputs))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, inputs, hidden))
        self.down_proj_bias = nn.Parameter(torch.randn(experts, inputs))
        self.router = nn.Parameter(torch.randn(experts, inputs))
        self.gain = nn.Parameter(torch.ones(experts, 1, 1))


class BankOfExperts(Bank):
    pass


MATRICES = ["gate_up_proj", "down_proj"]


def test_matrices_of_any_name_are_prunable_where_their_type_is_among_layers():
    net = nn.Sequential(nn.Linear(4, 4), Bank())
    assert list(prunable(net)) == ["0.weight"]
    assert reasons(net)["1.down_proj"] == "Bank is not in layers="
    assert list(prunable(net, layers=["Bank"])) == [f"1.{name}" for name in MATRICES]
    assert list(prunable(net, layers=["Linear", "Ba*"])) == ["0.weight", *(f"1.{name}" for name in MATRICES)]


def test_biases_and_routers_of_experts_are_no_matrices():
    why = reasons(nn.Sequential(BankOfExperts()))
    assert {name for name, reason in why.items() if not reason} == {f"0.{name}" for name in MATRICES}
    for name in ("gate_up_proj_bias", "down_proj_bias", "router", "gain"):
        assert why[f"0.{name}"] == "no weight matrix"


def test_other_matrices_beside_a_weight_are_left_alone():
    class Linear(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.positions = nn.Parameter(torch.randn(5, 4))

    assert list(prunable(Linear())) == ["weight"]
    attention = nn.MultiheadAttention(8, 2, kdim=6, add_bias_kv=True)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert list(prunable(attention)) == names


def test_the_scales_of_a_quantized_weight_are_no_matrix():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.weight_scale_inv = nn.Parameter(torch.ones(2, 2))

    assert list(prunable(Linear())) == ["weight"]


CLASSES = {  # of transformers: whether their experts are inputs x outputs
    "mixtral.modeling_mixtral.MixtralExperts": False,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts": False,
    "gpt_oss.modeling_gpt_oss.GptOssExperts": True,
    "llama4.modeling_llama4.Llama4TextExperts": True,
}


@pytest.mark.parametrize("name", CLASSES)
def test_experts_of_transformers_are_prunable_and_laid_out_as_they_compute(name):
    """The dimension of inputs of the first matrix is as long as the hidden size, which nothing else is."""
    transformers = pytest.importorskip("transformers")
    module, _, cls = name.rpartition(".")
    make = getattr(pytest.importorskip(f"transformers.models.{module}"), cls, None)
    if make is None:
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    config = transformers.PretrainedConfig(
        hidden_size=10, intermediate_size=7, moe_intermediate_size=7, num_local_experts=3, num_experts=3,
        hidden_act="silu", swiglu_alpha=1.0, swiglu_limit=1.0,
    )  # fmt: skip
    net = nn.Sequential(nn.Linear(10, 10), make(config))
    weights = prunable(net)
    assert list(weights) == ["0.weight", "1.gate_up_proj", "1.down_proj"]
    assert list(prunable(net, layers=[cls])) == ["1.gate_up_proj", "1.down_proj"]
    found = layouts(net, weights)
    for own, outputs, inputs in (("gate_up_proj", 14, 10), ("down_proj", 10, 7)):
        layout = found[f"1.{own}"]
        assert layout.experts
        assert (layout.outputs == 2) == CLASSES[name]
        assert tuple(layout.split(weights[f"1.{own}"]).shape) == (3, outputs, inputs, 1)


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(), (6, 4)),
        (Layout(), (6, 4, 3, 2)),
        (Layout(groups=3), (6, 4, 3)),
        (Layout(1, 0), (6, 4)),
        (Layout(1, 0, groups=2), (6, 4, 3, 2)),
        (Layout(1, 2, experts=True), (2, 6, 4)),
        (Layout(2, 1, experts=True), (2, 6, 4)),
    ],
)
def test_join_undoes_split(layout, shape):
    weight = torch.rand(shape)
    parts = layout.split(weight)
    assert torch.equal(layout.join(parts, weight.shape), weight)
    assert parts.dim() == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(5, 3),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 5),
    ],
    ids=["Linear", "Conv2d", "ConvTranspose2d", "Conv1D"],
)
def test_split_orders_channels_as_the_layer_does(make):
    layer = make()
    pairs = oracle.connections(layer)
    layout = layouts(layer, ["weight"])["weight"]
    outputs, inputs = (layout.split(pairs[..., k]) for k in (0, 1))
    groups, rows, columns, _ = outputs.shape
    expected = torch.arange(groups * rows).view(groups, rows, 1, 1).expand(outputs.shape)
    assert torch.equal(outputs, expected)
    expected = torch.arange(groups * columns).view(groups, 1, columns, 1).expand(outputs.shape)
    assert torch.equal(inputs, expected)


def test_layouts_of_attention_embeddings_and_lists():
    net = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "e": nn.Embedding(5, 4)})
    net["l"] = nn.ParameterList([torch.rand(3, 4)])
    names = [name for name, p in net.named_parameters() if p.dim() > 1]
    assert set(layouts(net, names[:-1]).values()) == {Layout()}
    assert layouts(net, names)["l.0"] == Layout(head=True)  # the last matrix that there is


def test_a_module_of_ones_own_says_that_inputs_come_first():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.rand(4, 3))
            self.is_transposed = True

    net = nn.Sequential(Mixer(), nn.Linear(2, 2))
    assert layouts(net, ["0.mix"])["0.mix"] == Layout(outputs=1, inputs=0)
    mask = lp.prune(net, 0.5, layers=["Mixer"], granularity=lp.granularity.NM(2, 4))["0.mix"]
    assert mask.sum(0).tolist() == [2, 2, 2]


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        if tied:
            self.head.weight = self.embed.weight


def test_the_head_is_the_last_layer_and_none_where_it_is_tied_to_an_embedding():
    free, tied = Language(tied=False), Language(tied=True)
    found = layouts(free, prunable(free))
    assert {name for name, layout in found.items() if layout.head} == {"head.weight"}
    assert not any(layout.head for layout in layouts(tied, ["embed.weight", "inner.weight"]).values())
    assert not layouts(free, ["head.weight"])["head.weight"].head  # whoever names it alone means it


# -------------------------------------------------------------------------------------- entries of `layers`


def test_an_entry_that_is_no_class_of_the_model_is_refused_with_the_close_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"layers: 'Conv2D' is the class of no module.*you mean 'Conv2d'\?"):
        lp.targets(net, layers=["Linear", "Conv2D"])
    with pytest.raises(ValueError, match=r"'LSTM' is the class of no module.*classes.*: Conv2d, Linear\."):
        lp.targets(net, layers=["Linear", "LSTM"])
    with pytest.raises(ValueError, match=r"layers: <class .*Linear'> is given; allowed are class names"):
        lp.targets(net, layers=[nn.Linear])
    assert len(prunable(net, layers=["Linear", "Conv3d"])) == 1  # a default need not occur


def test_an_entry_without_effect_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="the entry 'Block' has no effect"):
        lp.targets(nn.Sequential(Block(), nn.Linear(3, 3)), layers=["Block", "Linear"])


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.bias = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(2, 2))


@pytest.mark.parametrize(
    "net", [nn.Embedding(5, 4), Mixer(), nn.LSTM(3, 2), Bank()], ids=lambda n: type(n).__name__
)
def test_the_advice_works_when_it_is_followed(net):
    name = type(net).__name__
    with pytest.raises(ValueError, match=rf"nothing to prune.*to be named in `layers`: {name}\."):
        prunable(net)
    assert prunable(net, layers=[name])
    with pytest.raises(ValueError, match=r"has nothing to prune.*It has no weight matrices"):
        prunable(nn.LayerNorm(3))


# ------------------------------------------------------------------------------- weights that are not plain


class Lora(nn.Module):
    """As peft wraps a layer: `weight` is the base layer's, and the adapter has layers of its own."""

    def __init__(self, base, own=False):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        if own:
            self.magnitude = nn.Parameter(torch.rand(3, 3))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


Lora.__name__ = "Linear"


@pytest.mark.parametrize("own", [False, True])
def test_the_base_weight_under_an_adapter_is_prunable(own):
    net = nn.Sequential(Lora(nn.Linear(4, 6), own), nn.Linear(6, 2))
    assert [*prunable(net, include=["*base_layer*", "1.*"])] == ["0.base_layer.weight", "1.weight"]
    masks = lp.prune(net, 0.5, exclude=["*lora*"])
    assert list(masks) == ["0.base_layer.weight", "1.weight"]
    assert layouts(net, masks)["0.base_layer.weight"] == Layout()


def test_a_base_layer_under_weight_norm_is_refused_by_its_own_name():
    net = nn.Sequential(Lora(parametrizations.weight_norm(nn.Linear(4, 6))))
    with pytest.raises(ValueError, match=r"^0\.base_layer\.weight is computed .* parametrization"):
        prunable(net)
    assert len(prunable(net, exclude=["*base_layer*"])) == 2


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def doubled(layer, name="weight"):
    parametrize.register_parametrization(layer, name, Doubled())
    return layer


COMPUTED = {
    "parametrized": (doubled, "Doubled", lambda m: parametrize.remove_parametrizations(m, "weight")),
    "weight_norm": (
        parametrizations.weight_norm,
        "remove_parametrizations",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "the older weight_norm": (nn.utils.weight_norm, "remove_weight_norm", nn.utils.remove_weight_norm),
    "the older spectral_norm": (
        nn.utils.spectral_norm,
        "remove_spectral_norm",
        nn.utils.remove_spectral_norm,
    ),
    "torch's own pruning": (
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
        r"torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)",
        lambda m: nn.utils.prune.remove(m, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_refused_with_the_true_reason_and_a_remedy_that_works(name):
    compute, message, remedy = COMPUTED[name]
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    compute(net[0])
    generator = torch.get_rng_state()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"^0\.weight is computed from others by .*{message}.* or exclude it"
    ):
        prunable(net)
    why = reasons(net, exclude=["0.*"])
    assert [parameter for parameter, reason in why.items() if not reason] == ["1.weight"]
    sources = [p for p in why if p.startswith("0.") and "bias" not in p]
    assert {why[p] for p in sources} == {"another tensor is computed from it"}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    remedy(net[0])
    assert list(prunable(net)) == ["0.weight", "1.weight"]


def test_computed_weights_of_other_names_are_refused_too():
    attention = doubled(nn.MultiheadAttention(4, 2), "in_proj_weight")
    with pytest.raises(ValueError, match=r"^in_proj_weight is computed from others by a parametrization"):
        prunable(attention)
    bank = nn.Sequential(nn.utils.prune.identity(BankOfExperts(), "down_proj"))
    with pytest.raises(ValueError, match=r"^0\.down_proj is computed from others by torch\.nn\.utils\.prune"):
        prunable(bank)
    assert list(prunable(bank, exclude=["0.down_proj"])) == ["0.gate_up_proj"]
    assert list(prunable(doubled(nn.Linear(3, 2), "bias"), exclude=None)) == ["weight"]


def test_a_layer_that_multiplies_its_weight_from_factors_is_refused():
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.rand(4, 2)), nn.Parameter(torch.rand(2, 4))

        @property
        def weight(self):
            return self.u @ self.v

    Factors.__name__ = "Linear"
    with pytest.raises(ValueError, match=r"^0\.weight is computed from others by Linear"):
        prunable(nn.Sequential(Factors(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=in_words
)
def test_a_weight_that_cannot_be_trained_is_refused_by_name(dtype):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"^0\.weight has the dtype {name}; allowed are float32.* or exclude"
    ):
        prunable(net)
    assert list(prunable(net, exclude=["0.*"])) == ["1.weight"]
    assert list(prunable(net, include=["1.*"])) == ["1.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=in_words)
def test_a_weight_of_a_floating_point_type_is_prunable(dtype):
    net = nn.Linear(4, 4).to(dtype)
    assert int(lp.prune(net, 0.5)["weight"].sum()) == 8


def test_weights_without_elements_are_left_alone():
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4))
    assert list(prunable(net)) == ["2.weight"]
    assert reasons(net)["0.weight"] == "it has no elements"


def test_a_model_on_the_meta_device_has_targets_and_layouts():
    with torch.device("meta"):
        net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Linear(4, 4))
    assert list(layouts(net, prunable(net)).values()) == [Layout(1, 0), Layout(head=True)]
    with pytest.raises(ValueError, match=r"^0\.weight is on the meta device, and values are needed"):
        lp.prune(net, 0.5)
