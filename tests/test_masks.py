"""Masks equal the oracle's, whatever the scores; they lose no bit on the way to a tensor or a file."""

import pytest
import torch

from lightning_prune import allocation
from lightning_prune.masks import alive, bits, pack, unpack, zero_dead_
from lightning_prune.selection import count_above, keep_top, threshold
from tests.naming import in_words
from tests.networks import bits_of, same
from tests.reference import global_selection

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def selected(scores, keep):
    counts = allocation.global_rank(scores, keep)
    assert sum(counts.values()) == keep
    return {name: keep_top(s, counts[name], near=counts.near) for name, s in scores.items()}


def kinds(shape, generator):
    """Scores of every kind that a criterion can give."""
    normal = torch.randn(shape, generator=generator)
    few = torch.randint(-2, 3, shape, generator=generator).float()
    return {
        "positive": normal.abs(),
        "signed": normal,
        "few values": few,
        "many zeros": torch.where(normal > 0.5, normal, 0.0),
        "both zeros": few * torch.where(normal > 0, 1.0, -1.0) * 0,
        "both zeros and more": few * normal.sign(),
        "all equal": torch.full(shape, 0.25),
        "denormal": normal * 1e-39,
        "denormal in half": normal * 3e-8,
        "huge": normal * 1e37,
        "some dead": normal.masked_fill(normal > 0.3, -torch.inf),
        "ties among the dead": few.masked_fill(normal > 0, -torch.inf),
    }


KINDS = list(kinds((1,), torch.Generator()))


@pytest.mark.parametrize("dtype", FLOATS, ids=in_words)
@pytest.mark.parametrize("kind", KINDS)
def test_global_selection_equals_sorting(kind, dtype):
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    shapes = ((3, 4), (17,), (0, 5), (1,), (2, 3, 2, 2))
    scores = {str(i): kinds(shape, generator)[kind].to(dtype) for i, shape in enumerate(shapes)}
    if kind == "huge" and dtype == torch.float16:
        scores = {name: s.clamp(-60000, 60000) for name, s in scores.items()}
    total = sum(s.numel() for s in scores.values())
    for keep in range(total + 1):
        assert same(selected(scores, keep), global_selection(scores, keep)), keep


@pytest.mark.parametrize("dtype", FLOATS, ids=in_words)
@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_are_kept_of_equals_the_first(kind, dtype):
    scores = (
        kinds((31,), torch.Generator().manual_seed(7))[kind]
        .to(dtype)
        .nan_to_num(posinf=1.0, neginf=-torch.inf)
    )
    for keep in range(32):
        expected = global_selection({"": scores}, keep)[""]
        assert torch.equal(keep_top(scores, keep), expected), keep
        for near in (0.0, 0.25, -torch.inf, torch.inf, float(scores[3]), 1e300):  # a hint changes nothing
            assert torch.equal(keep_top(scores, keep, near=near), expected), (keep, near)


def test_tensors_of_different_precision_share_one_exact_threshold():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        scores = {
            str(i): (1 + torch.randn(12, generator=generator, dtype=torch.float64) * 0.004).to(dtype)
            for i, dtype in enumerate(FLOATS)
        }
        for keep in range(0, 49, 3):
            assert same(selected(scores, keep), global_selection(scores, keep))


def test_a_threshold_between_two_numbers_of_the_lower_precision():
    # 1.001 is 1.0 in bfloat16: a comparison that rounds it would let the 1.0 in
    scores = {"low": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "high": torch.tensor([1.001, 0.5])}
    assert allocation.global_rank(scores, 2) == {"low": 1, "high": 1}
    scores = {"low": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "high": torch.tensor([0.999, 0.5])}
    assert allocation.global_rank(scores, 3) == {"low": 2, "high": 1}


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_the_memory_layout_of_scores_does_not_matter(layout):
    s = torch.randint(0, 4, (4, 6, 3, 3), generator=torch.Generator().manual_seed(1)).float()
    s = {
        "channels_last": lambda: s.to(memory_format=torch.channels_last),
        "transposed": lambda: s.permute(3, 1, 0, 2),
        "strided": lambda: s[::2, 1::3],
        "expanded": lambda: s[:1].expand(5, -1, -1, -1),
    }[layout]()
    assert not s.is_contiguous()
    for keep in (0, 1, s.numel() // 3, s.numel() - 1, s.numel()):
        assert torch.equal(keep_top(s, keep), global_selection({"": s.contiguous()}, keep)[""])
        assert same(selected({"": s}, keep), {"": keep_top(s, keep)})


def test_selection_over_several_chunks_equals_sorting():
    generator = torch.Generator().manual_seed(2)
    scores = {
        "ties": torch.randint(0, 50, (700_001,), generator=generator).float(),
        "plain": torch.rand(300_000, generator=generator) * 60,
    }
    flat = torch.cat(list(scores.values()))
    for keep in (1, 333_333, 999_999):
        order = torch.sort(flat, descending=True, stable=True).indices[:keep]
        expected = torch.zeros_like(flat, dtype=torch.bool)
        expected[order] = True
        assert torch.equal(torch.cat(list(selected(scores, keep).values())), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=in_words)
@pytest.mark.parametrize(
    "kind", ["in the sample", "not in the sample", "tied", "two values", "sorted", "signed"]
)
def test_selection_is_exact_whatever_the_sample_says(kind, dtype):
    n = 129 * 2400
    flat = torch.rand(n, generator=torch.Generator().manual_seed(4))
    sampled = torch.arange(n) % 129 == 0
    flat = {
        "in the sample": lambda: torch.where(sampled, flat + 1, flat),
        "not in the sample": lambda: torch.where(sampled, flat - 1, flat),
        "tied": lambda: torch.where(flat < 0.9, 0.5, flat),
        "two values": lambda: (flat < 0.3).float(),
        "sorted": lambda: flat.sort().values,
        "signed": lambda: flat - 0.7,
    }[kind]().to(dtype)
    order = torch.sort(flat, descending=True, stable=True).indices
    scores = {"small": flat[:300], "large": flat[300:-1], "one": flat[-1:]}
    for keep in (1, n // 200, n // 3, n - 5):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:keep]] = True
        assert torch.equal(torch.cat(list(selected(scores, keep).values())), expected), keep


def test_the_threshold_is_the_kth_highest_score():
    s = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for keep in (1, 2, 500, 1000):
        assert threshold([s[:300], s[300:]], keep) == (float(s.sort(descending=True).values[keep - 1]), 1)
    assert threshold([torch.tensor([2.0, 1.0, 2.0, 2.0])], 2) == (2.0, 2)
    assert count_above(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2.0) == 0
    assert count_above(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2.0, or_equal=True) == 3


@pytest.mark.parametrize("keep", [-1, 5])
def test_more_or_fewer_than_there_are_cannot_be_kept(keep):
    with pytest.raises(ValueError, match=f"keep={keep}: allowed is 0 to 4"):
        keep_top(torch.rand(2, 2), keep)
    with pytest.raises(ValueError, match="keep=0: allowed is 1 to 4"):
        threshold([torch.rand(4)], 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=in_words)
def test_a_dead_weight_becomes_plus_zero_whatever_it_was(dtype):
    odd = torch.tensor([-1.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.0], dtype=dtype)
    x = torch.stack([odd, odd])
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[1] = True
    zero_dead_(x, bits(mask, like=x))
    assert not bits_of(x[0]).any()
    assert torch.equal(bits_of(x[1]), bits_of(odd))  # the living keep every bit, NaN and -0.0 as well


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_mask_fits_its_weight_in_any_memory_layout(layout):
    x = torch.randn(4, 3, 2, 2).to(memory_format=layout)
    mask = torch.rand(4, 3, 2, 2) > 0.5
    expected = x.masked_fill(~mask, 0.0)
    zero_dead_(x, bits(mask, like=x))
    assert same(x, expected)
    y = torch.randn(6, 4).t()
    mask = torch.rand(4, 6) > 0.5
    expected = y.masked_fill(~mask, 0.0)
    zero_dead_(y, bits(mask, like=y))
    assert same(y, expected)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 0, 2), (5, 3), (2, 3, 2, 2), ()])
def test_a_packed_mask_comes_back_the_same(shape):
    masks = {"w": torch.rand(shape) > 0.5, "ones": torch.ones(shape, dtype=torch.bool)}
    packed = pack(masks)
    assert same(unpack(packed), masks)
    assert len(packed["w"]["bits"]) == -(-masks["w"].numel() // 8)  # one bit a weight
    assert alive(unpack(packed)) == alive(masks)


def test_a_packed_mask_of_any_layout_comes_back_the_same():
    mask = (torch.rand(4, 6, 3, 3) > 0.5).to(memory_format=torch.channels_last)
    assert torch.equal(unpack(pack({"w": mask}))["w"], mask)
