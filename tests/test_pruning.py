"""Pruning: what is prunable, exact budgets, and the same masks as the peers."""

import sys
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as peer

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.allocation import global_rank, per_output, uniform
from lightning_prune.layers import prunable
from lightning_prune.masks import alive
from lightning_prune.pruning import budget, next_masks, scheduled
from lightning_prune.schedules import Geometric
from tests.limited import in_a_process
from tests.naming import in_words
from tests.networks import Net, dead_are_zero, same
from tests.reference import global_selection, per_output_selection, uniform_selection


def dense(params):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_prunable_are_the_weights_of_linear_and_convolution_layers_only():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "conv": nn.Conv2d(1, 2, 3),
            "up": nn.ConvTranspose1d(1, 2, 3),
            "norm": nn.BatchNorm2d(2),
            "layer_norm": nn.LayerNorm([2, 3]),  # two dimensions, and still a norm
            "embedding": nn.Embedding(5, 2),
            "lstm": nn.LSTM(2, 2),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert list(prunable(model)) == ["linear.weight", "conv.weight", "up.weight", *attention]
    assert list(prunable(model, layers=["Embedding"])) == ["embedding.weight"]
    assert list(prunable(model, layers=["LSTM"])) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


def test_a_subclass_of_a_layer_is_a_layer():
    assert list(prunable(nn.Sequential(type("Special", (nn.Linear,), {})(2, 2)))) == ["0.weight"]


def test_a_weight_tied_to_an_embedding_is_left_alone():
    assert list(prunable(Tied())) == ["inner.weight"]


def test_a_dry_run_says_of_every_parameter_whether_and_why_not(monkeypatch):
    model = Tied()
    model.other, model.norm = nn.Linear(4, 4), nn.LayerNorm([2, 4])
    rows = lp.targets(model, include=["inner.*"])
    assert [(t.parameter, t.shape) for t in rows] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    why = {t.parameter: t.why_not for t in rows}
    assert why == {
        "embed.weight": "Embedding is not in layers=",
        "inner.weight": "",
        "inner.bias": "no weight matrix",
        "other.weight": "not included",
        "other.bias": "no weight matrix",
        "norm.weight": "LayerNorm is not in layers=",
        "norm.bias": "LayerNorm is not in layers=",
    }
    assert all(t.prunable == (not t.why_not) for t in rows)
    assert {t.parameter for t in lp.targets(model, exclude=["other*"]) if t.why_not == "excluded"} == {
        "other.weight"
    }
    monkeypatch.setenv("COLUMNS", "100")
    text = str(rows)
    assert text.startswith("16 of ")
    for t in rows:
        line = next(line for line in text.splitlines() if t.parameter in line)
        assert t.why_not in line
        assert " x ".join(map(str, t.shape)) in line


def test_a_head_that_comes_before_its_embedding_is_told_why():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.inner, self.embed = nn.Linear(4, 9), nn.Linear(4, 4), nn.Embedding(9, 4)
            self.head.weight = self.embed.weight

    assert lp.targets(Backwards())[0].why_not == "tied to embed: Embedding is not in layers="


def test_a_shared_weight_is_counted_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert alive(lp.prune(model, 0.5)) == 8
    assert int((model[1].weight != 0).sum()) == 8


def test_patterns_choose_among_the_names():
    model = Net()
    assert list(prunable(model)) == ["stem.weight", "body.weight", "head.weight"]
    assert list(prunable(model, include=["stem*", "head*"], exclude=["h*"])) == ["stem.weight"]
    assert list(prunable(model, exclude=["body.weight"])) == ["stem.weight", "head.weight"]


def test_the_first_pattern_that_matches_drives_the_weight():
    a, b = Geometric(0.1), Geometric(0.2)
    assert scheduled(["x", "y", "out"], {"out": a, "*": b}) == [(["out"], a), (["x", "y"], b)]
    assert scheduled(["x", "y"], a) == [(["x", "y"], a)]


@pytest.mark.parametrize("allocate", [global_rank, uniform, per_output])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.2, 1 / 3, 0.5, 0.777, 0.999, 1.0])
def test_the_budget_is_met_exactly_whatever_the_ties(sparsity, allocate):
    for weights in (torch.randn, torch.ones, torch.zeros, lambda *s: torch.randint(-1, 2, s).float()):
        model = nn.Sequential(nn.Linear(7, 11), nn.Conv1d(3, 5, 2), nn.Linear(1, 1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(weights(*p.shape))
        masks = lp.prune(model, sparsity, allocate=allocate)
        assert alive(masks) == round((1 - sparsity) * (77 + 30 + 1))
        assert dead_are_zero(dict(model.named_parameters()), masks)


@pytest.mark.parametrize(
    ("allocate", "oracle"),
    [(global_rank, global_selection), (uniform, uniform_selection), (per_output, per_output_selection)],
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, "mixed"], ids=in_words
)
def test_masks_equal_the_oracle_round_after_round(allocate, oracle, dtype):
    generator = torch.Generator().manual_seed(5)
    dtypes = [torch.bfloat16, torch.float32, torch.float64] if dtype == "mixed" else [dtype] * 3
    params = {
        name: torch.randn(shape, generator=generator).mul(4).round().div(4).to(d)  # with ties and zeros
        for name, shape, d in zip("abc", [(6, 16), (16, 4, 2, 2), (3, 16)], dtypes, strict=True)
    }
    params["b"] = params["b"].to(memory_format=torch.channels_last)
    size, masks = sum(p.numel() for p in params.values()), dense(params)
    for r in range(1, 9):
        before, kept = masks, {name: p.clone() for name, p in params.items()}
        scores = {n: p.abs().masked_fill(~masks[n], -torch.inf) for n, p in params.items()}
        masks = next_masks(params, masks, [("abc", 1 - 0.7**r)], allocate=allocate)
        assert same(masks, oracle(scores, round((1 - (1 - 0.7**r)) * size)))
        assert all(not bool((masks[n] & ~before[n]).any()) for n in masks)  # masks only shrink
        assert same(params, kept)
        params = {n: torch.where(masks[n], p.flip(0) + 0.25, 0) for n, p in params.items()}  # some training


def test_each_pattern_has_an_exact_budget_of_its_own():
    params = {"a": torch.randn(10, 10), "b": torch.randn(7, 3), "c": torch.randn(5, 5)}
    masks = next_masks(params, dense(params), [(["a", "c"], 0.3), (["b"], 0.15)])
    assert alive({n: masks[n] for n in "ac"}) == round(0.7 * 125)
    assert alive({"b": masks["b"]}) == round(0.85 * 21)
    assert list(masks) == ["a", "b", "c"]
    alone = next_masks({"b": params["b"]}, dense({"b": params["b"]}), [(["b"], 0.15)])
    assert torch.equal(masks["b"], alone["b"])


def test_the_dead_are_never_candidates_whatever_a_criterion_scores_them():
    masks = {"w": torch.tensor([[True, True, False, False, True, True]])}
    w = {"w": torch.zeros(1, 6)}
    for worth in (1e30, 0.0, torch.inf, torch.nan):
        scores = torch.tensor([[-5.0, -4.0, worth, worth, -3.0, -2.0]])
        new = next_masks(w, masks, [(["w"], 0.5)], criterion=lambda params, scores=scores: {"w": scores})
        assert new["w"].tolist() == [[False, True, False, False, True, True]]


def test_fewer_alive_than_the_budget_stay_as_they_are():
    masks = {"w": torch.tensor([[True, False, False, False]])}
    new = next_masks({"w": torch.tensor([[0.0, 5.0, 5.0, 5.0]])}, masks, [(["w"], 0.25)])
    assert same(new, masks)


def test_an_alive_weight_may_be_zero():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert lp.prune(model, 0.5)["weight"].tolist() == [[True, True, False, False]]


def test_a_criterion_gets_by_keyword_what_it_names():
    seen = {}

    def newest(params, masks):
        seen.update(masks)
        return {name: -p.abs() for name, p in params.items()}  # the smallest survive

    model = nn.Linear(8, 8)
    weight = model.weight.detach().clone()
    masks = lp.prune(model, 0.75, criterion=newest)
    assert torch.equal(masks["weight"], global_selection({"": -weight.abs()}, 16)[""])
    assert bool(seen["weight"].all())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_global_masks_equal_those_of_torch_global_unstructured(sparsity):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Linear(30, 7))
    theirs = deepcopy(model)
    pairs = [(m, "weight") for m in theirs if hasattr(m, "weight")]
    peer.global_unstructured(pairs, pruning_method=peer.L1Unstructured, amount=sparsity)
    masks = lp.prune(model, sparsity, allocate=lp.allocation.AtLeast(0))  # torch may empty a layer
    assert [
        torch.equal(mine, m.weight_mask.bool()) for mine, (m, _) in zip(masks.values(), pairs, strict=True)
    ] == ([True] * 3)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_masks_of_one_layer_equal_those_of_torch_l1_unstructured(sparsity):
    model = nn.Linear(30, 20)
    theirs = deepcopy(model)
    peer.l1_unstructured(theirs, "weight", amount=sparsity)
    assert torch.equal(lp.prune(model, sparsity)["weight"], theirs.weight_mask.bool())


def test_prune_changes_nothing_but_the_dead_weights():
    model = Net()
    before, ids = deepcopy(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    masks = lp.prune(model, 0.6)
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        expected = before[name].masked_fill(~masks[name], 0) if name in masks else before[name]
        assert same(value, expected), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pruning_draws_no_random_number():
    model = nn.Linear(4, 4)
    before = torch.get_rng_state()
    lp.prune(model, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_and_the_model_stays(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 2] = value
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the weight 1\.weight holds NaN or infinity; allowed are finite"):
        lp.prune(model, 0.5)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_score_of_a_living_weight_that_is_not_finite_is_refused(value):
    scores = torch.arange(6.0).view(2, 3)
    scores[1, 1] = value
    masks = {"w": torch.tensor([[True, True, True], [False, True, True]])}
    with pytest.raises(ValueError, match="the score of w holds NaN or infinity"):
        next_masks({"w": torch.ones(2, 3)}, masks, [(["w"], 0.5)], criterion=lambda params: {"w": scores})


def test_a_criterion_of_the_wrong_form_is_refused():
    model = nn.Linear(3, 3)
    for scores in ({}, {"weight": torch.rand(9)}, {"weight": torch.ones(3, 3, dtype=torch.long)}):
        with pytest.raises(
            ValueError, match=r"criterion: .* must give floating point scores of weight's shape"
        ):
            lp.prune(model, 0.5, criterion=lambda params, scores=scores: scores)


def test_an_allocation_that_does_not_add_up_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"allocate: .* gave 4 survivors; allowed are the 9 that were asked for"
    ):
        lp.prune(model, 0.5, allocate=lambda scores, total: dict.fromkeys(scores, 2))
    masks = {"a": torch.eye(3, dtype=torch.bool), "b": torch.ones(3, 3, dtype=torch.bool)}
    params = {"a": torch.eye(3), "b": torch.ones(3, 3)}
    with pytest.raises(
        ValueError, match=r"allocate: .* gave a 5 survivors; allowed are 3, what it has alive"
    ):
        next_masks(params, masks, [("ab", 0.5)], allocate=lambda scores, total: {"a": 5, "b": 4})
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity):
    model = nn.Linear(3, 3)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"sparsity={sparsity}: allowed is 0"):
        lp.prune(model, sparsity)
    assert same(model.state_dict(), before)


def test_the_budget_rounds_what_is_left():
    assert [budget(s, 10) for s in (0, 0.04, 0.06, 0.5, 0.96, 1)] == [10, 10, 9, 5, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA and /proc")
@pytest.mark.parametrize("millions", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_a_model_that_fills_a_quarter_of_the_memory_is_pruned_with_six_bytes_a_weight(millions):
    code = """
n = int(sys.argv[1]) * 10**6
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for layers in (1, 8):
        build = lambda n: torch.nn.Sequential(*[
            torch.nn.Linear(n // 1000, 1000 // layers, bias=False, dtype=dtype) for _ in range(layers)
        ])
        lp.prune(build(10**5))  # what is loaded on first use
        model = build(n)
        size = sum(p.nbytes for p in model.parameters())
        limit(3 * size)
        assert refused(lambda: torch.empty(3 * size + (1 << 20), dtype=torch.uint8))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the high-water mark
        before = status("VmRSS")
        masks = lp.prune(model, 0.8)
        assert sum(int(m.count_nonzero()) for m in masks.values()) == round(0.2 * n)
        extra = status("VmHWM") - before
        assert extra <= 6 * n, f"{extra / n} bytes a weight, {layers} tensors of {dtype}"
        limit(2**40)
        del model, masks
"""
    in_a_process(code, millions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "magnitude"}, "criterion='magnitude': allowed are functions"),
        ({"criterion": lp.criteria.Random}, "criterion=Random: a class is given"),
        ({"allocate": 3}, "allocate=3: allowed are functions, such as those of lightning_prune.allocation"),
        ({"granularity": lp.granularity.Block}, "granularity=Block: a class is given"),
    ],
    ids=in_words,
)
def test_functions_are_checked_before_anything_is_pruned(options, said):
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=said):
        lp.prune(layer, 0.5, **options)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("prune", [lp.prune, partial(lp.prune_channels, example_input=[2, 4])])
@pytest.mark.parametrize(
    ("criterion", "given", "idle"),
    [
        (criteria.magnitude, ("data", "loss", "initial"), ("data", "loss", "initial")),
        (criteria.taylor, ("data", "loss", "initial"), ("initial",)),
        (criteria.wanda, ("data", "loss"), ("loss",)),
        (criteria.movement, ("data", "initial"), ("data",)),
    ],
)
def test_what_no_criterion_asks_for_is_said(prune, criterion, given, idle):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {
        "data": [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))],
        "loss": nn.functional.cross_entropy,
        "initial": {name: torch.randn_like(p) for name, p in model.named_parameters()},
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune(model, 0.5, criterion=criterion, **{name: options[name] for name in given})
    assert [str(w.message).split()[0] for w in said if "has no effect" in str(w.message)] == list(idle)
