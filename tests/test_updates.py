"""Updates of survivors: equal to slow versions, never worse, whatever the data."""

import pytest
import torch
from torch import nn

from lightning_prune.criteria import SparseGPT
from lightning_prune.layers import Layout, layouts
from lightning_prune.selection import keep_top
from lightning_prune.updates import (
    LeastSquares,
    from_matrices,
    inverse_root,
    matrices,
    moments,
    no_worse,
    patches,
)
from tests import reference_methods as oracle


def inputs(samples=60, width=10, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, rank or width, generator=generator, dtype=torch.float64)
    return x @ torch.randn(rank or width, width, generator=generator, dtype=torch.float64)


def hessian(x):
    return x.T @ x / len(x)


def half(scores):
    return keep_top(scores, scores.numel() // 2)


@pytest.mark.parametrize("block", [1, 3, 5, 128])
@pytest.mark.parametrize("rank", [None, 4])
def test_sparsegpt_equals_surgery_with_the_inverse_of_what_is_left(block, rank):
    weight = torch.randn(6, 10, dtype=torch.float64)
    x = inputs(rank=rank)
    parts = [(start, min(start + block, 10)) for start in range(0, 10, block)]
    found, mask = SparseGPT(block, 0.01).solve(weight, hessian(x), lambda a, b, s: half(s), parts)
    damped = hessian(x) + 0.01 * hessian(x).diagonal().mean() * torch.eye(10, dtype=torch.float64)
    expected, expected_mask = oracle.sparsegpt(weight, damped, half, parts)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert not bool(found[~mask].any())


@pytest.mark.parametrize("block", [4, 6, 8])
def test_blocks_do_not_change_what_groups_of_columns_become(block):
    weight, x = torch.randn(5, 12, dtype=torch.float64), inputs(width=12)
    parts = [(start, start + 4) for start in range(0, 12, 4)]
    found, mask = SparseGPT(block).solve(weight, hessian(x), lambda a, b, s: half(s), parts)
    whole, whole_mask = SparseGPT(128).solve(weight, hessian(x), lambda a, b, s: half(s), parts)
    assert torch.equal(mask, whole_mask)
    assert torch.allclose(found, whole)


def test_the_root_is_upper_triangular_and_of_the_inverse():
    h = hessian(inputs())
    root = inverse_root(h, 0.0)
    assert torch.equal(root, root.triu())
    assert torch.allclose(root.T @ root, torch.linalg.inv(h))


@pytest.mark.parametrize("dampening", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_is_dampened_until_it_has_an_inverse(dampening, dtype):
    h = hessian(inputs(3, 40)).to(dtype)
    root = inverse_root(h, dampening)
    assert bool(torch.isfinite(root).all())
    assert bool((root.diagonal() > 0).all())


def test_inputs_that_are_always_0_lose_their_weights_first_and_change_no_other():
    x = inputs(width=8)
    x[:, [1, 6]] = 0
    weight = torch.randn(4, 8, dtype=torch.float64)
    found, mask = SparseGPT().solve(weight, hessian(x), lambda a, b, s: keep_top(s, 24), [(0, 8)])
    assert torch.equal(mask, (torch.arange(8) != 1) & (torch.arange(8) != 6) & torch.ones(4, 8).bool())
    assert torch.equal(found[mask], weight[mask])


def test_without_any_input_the_largest_weights_stay_as_they_are():
    weight = torch.randn(4, 8)
    found, mask = SparseGPT().solve(weight, torch.zeros(8, 8), lambda a, b, s: half(s), [(0, 8)])
    assert torch.equal(mask, keep_top(weight.abs(), 16))
    assert torch.equal(found, weight * mask)


@pytest.mark.parametrize("rank", [None, 4])
def test_least_squares_is_the_closest_that_survivors_can_give(rank):
    weight, x = torch.randn(6, 10, dtype=torch.float64), inputs(rank=rank)
    mask = torch.rand(6, 10) < 0.6
    mask[0] = False
    mask[1] = True
    fit = LeastSquares(200)(weight, mask, hessian(x))
    expected = oracle.least_squares(weight, mask, x)
    assert not bool(fit[~mask].any())
    assert torch.allclose(x @ fit.T, x @ expected.T, atol=1e-6)
    if rank is None:
        assert torch.allclose(fit, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_never_changes_an_output_more_than_the_mask_alone(steps, dtype):
    for seed in range(5):
        x = inputs(20, 30, rank=25, seed=seed)
        x[:, 3] = 0
        h, weight = hessian(x).to(dtype), torch.randn(8, 30, dtype=dtype)
        mask = torch.rand(8, 30) < 0.4
        fit = LeastSquares(steps)(weight, mask, h)
        errors = [((x @ (w.double() - weight.double()).T) ** 2).sum(0) for w in (fit, weight * mask)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
        assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def test_of_each_output_the_better_weights_are_kept():
    weight, h = torch.zeros(3, 2), torch.eye(2)
    fit = torch.tensor([[1.0, 0.0], [3.0, 0.0], [torch.nan, 0.0]])
    assert torch.equal(
        no_worse(fit, torch.full((3, 2), 1.0), weight, h), torch.tensor([[1.0, 0], [1, 1], [1, 1]])
    )


def test_steps_are_whole_numbers():
    with pytest.raises(ValueError, match="steps=0: allowed are whole numbers from 1 on"):
        LeastSquares(0)
    with pytest.raises(ValueError, match="block=0: allowed are whole numbers from 1 on"):
        SparseGPT(block=0)
    with pytest.raises(ValueError, match=r"dampening=-0\.1: allowed are numbers from 0 on"):
        SparseGPT(dampening=-0.1)


# ------------------------------------------------------------------------------------------------ any layer


def gpt2():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)


LAYERS = {
    "Linear": (lambda: nn.Linear(8, 6), (5, 7, 8)),
    "transformers' Conv1D": (gpt2, (5, 7, 8)),
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), (3, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (3, 4, 8, 9)),
    "circular Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "grouped Conv2d": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "depthwise Conv2d": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 3, stride=2, output_padding=1), (2, 8, 5)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2, padding=1), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_product_of_its_matrices_and_what_reaches_them(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layout = layouts(layer, ["weight"])["weight"]
    rows = matrices(layer.weight.detach(), layout)
    assert torch.equal(from_matrices(rows, layout, layer.weight.shape), layer.weight)
    product = patches(layer, "weight", layout, x) @ rows.mT
    spatial = layer.weight.dim() - 2
    output = layer(x).movedim(-1 - spatial, 0)
    if layer.bias is not None:
        output = output - layer.bias.view(-1, *[1] * (output.dim() - 1))
    assert torch.allclose(product.mT.reshape(output.shape), output)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_the_mean_of_products_of_what_reaches_a_layer(name):
    make, shape = LAYERS[name]
    layer, batches = make().double(), [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    laid_out = layouts(layer, ["weight"])
    found = moments(["weight"], laid_out, layer, batches, lambda m, x: m(x))["weight"]
    x = torch.cat([patches(layer, "weight", laid_out["weight"], batch) for batch in batches], 1)
    assert found.samples == x.shape[1]
    assert torch.allclose(found.mean, x.mT @ x / x.shape[1])


def test_layers_of_one_input_share_what_is_held():
    model = nn.ModuleDict({"q": nn.Linear(4, 3), "k": nn.Linear(4, 2)})
    names = ["q.weight", "k.weight"]
    x = torch.randn(9, 4)
    found = moments(names, layouts(model, names), model, [x], lambda m, x: (m["q"](x), m["k"](x)))
    assert found["q.weight"] is found["k.weight"]
    assert torch.allclose(found["q.weight"].mean[0], x.T @ x / 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_summed_in_float32(dtype):
    layer, x = nn.Linear(4, 3).to(dtype), torch.full((64, 4), 300.0).to(dtype)
    found = moments(["weight"], {"weight": Layout()}, layer, [x], lambda m, x: m(x))["weight"].mean
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.full((1, 4, 4), 300.0**2))


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_layer():
    layer, batches = nn.Linear(4, 3), [torch.tensor([[1, torch.nan, 1, 1]])]
    with pytest.raises(ValueError, match="what reaches the layer of weight holds NaN or infinity"):
        moments(["weight"], {"weight": Layout()}, layer, batches, lambda m, x: m(x))
