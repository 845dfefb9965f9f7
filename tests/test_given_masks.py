"""Masks of before: the dead stay dead and count, and masks are put on any module."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.masks import alive
from lightning_prune.schedules import Bucket, Explicit, OneShot, Threshold, TopK
from tests.naming import in_words
from tests.networks import bits_of, dead_are_zero, same, samples, sgd


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))  # 108 prunable weights


def train(model, steps=5):
    optimizer, (x, y) = sgd(model.parameters()), samples().tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


AXES = [
    {},
    {"allocate": lp.allocation.uniform},
    {"allocate": lp.allocation.erk},
    {"criterion": lp.criteria.Random()},
    {"granularity": lp.granularity.Block(1, 3)},
]


@pytest.mark.parametrize("axes", AXES, ids=in_words)
def test_the_dead_stay_dead_and_count(axes):
    model = network()
    first = lp.prune(model, 0.5, **axes)
    train(model)  # nothing holds them: they live again
    assert not dead_are_zero(dict(model.named_parameters()), first)
    second = lp.prune(model, 0.75, masks=first, **axes)
    assert not any(bool((second[n] & ~first[n]).any()) for n in first)
    assert alive(second) == 27
    assert dead_are_zero(dict(model.named_parameters()), second)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, OneShot(0.2)], ids=in_words)
def test_a_sparsity_below_that_of_the_masks_changes_no_mask(sparsity):
    model = network()
    first = lp.prune(model, 0.5)
    train(model)
    before = deepcopy(dict(model.named_parameters()))
    second = lp.prune(model, sparsity, masks=first)
    assert same(second, first)
    for name, p in model.named_parameters():
        assert same(p.detach(), before[name].detach().where(first.get(name, torch.ones_like(p).bool()), 0.0))


def test_without_masks_a_second_pruning_knows_nothing_of_the_first():
    model = network()
    first = lp.prune(model, 0.5)
    train(model)
    second = lp.prune(model, 0.5)
    assert any(bool((second[n] & ~first[n]).any()) for n in first)


def test_weights_without_a_mask_are_alive():
    model = network()
    first = lp.prune(model, 0.5, include=["0.*"])
    second = lp.prune(model, 0.6, masks=first)
    assert list(second) == ["0.weight", "2.weight"]
    assert alive(second) == round(0.4 * 108)
    assert not bool((second["0.weight"] & ~first["0.weight"]).any())


def test_masks_that_were_given_are_not_changed():
    model = network()
    first = lp.prune(model, 0.5)
    before = deepcopy(first)
    second = lp.prune(model, 0.8, masks=first)
    lp.apply_masks(model, first)
    assert same(first, before)
    second["0.weight"].zero_()
    assert same(first, before)


def test_masks_are_put_on_to_the_bit_and_some_names_suffice():
    model = network()
    masks = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters()}  # biases too
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    masks["0.weight"][0, :3] = False
    ids, before = [id(p) for p in model.parameters()], deepcopy(model.state_dict())
    assert lp.apply_masks(model, {n: masks[n] for n in ("0.weight", "2.bias")}) is None
    assert [id(p) for p in model.parameters()] == ids
    for name, p in model.named_parameters():
        expected = before[name]
        if name in ("0.weight", "2.bias"):
            assert not bits_of(p)[~masks[name]].any()
            assert same(p.detach()[masks[name]], expected[masks[name]])
        else:
            assert same(p.detach(), expected)


WRONG = [
    (
        lambda m: m.update(other=m["0.weight"]),
        r"masks: other: allowed are names of the .*They are: 0\.weight",
    ),
    (
        lambda m: m.update({"0.weight": m["2.weight"]}),
        r"0\.weight is torch\.bool \(3, 12\); allowed is .*\(12, 6\)",
    ),
    (lambda m: m.update({"0.weight": m["0.weight"].float()}), r"0\.weight is torch\.float32"),
    (lambda m: m.update({"0.weight": [True]}), r"0\.weight is a list; allowed is torch\.bool"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_masks_of_another_network_are_refused_and_nothing_is_changed(change, message):
    model = network()
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    before = deepcopy(model.state_dict())
    change(masks)
    for put_on in (lambda: lp.apply_masks(model, masks), lambda: lp.prune(model, 0.5, masks=masks)):
        with pytest.raises(ValueError, match=message):
            put_on()
        assert same(dict(model.state_dict()), dict(before))


def test_masks_of_what_is_not_to_be_pruned_are_refused_by_prune():
    model = network()
    masks = lp.prune(model, 0.5)
    with pytest.raises(ValueError, match=r"masks: 2\.weight: allowed are names of the prunable parameters"):
        lp.prune(model, 0.6, exclude=["2.*"], masks=masks)
    lp.prune(model, 0.6, exclude=["2.*"], masks={"0.weight": masks["0.weight"]})


class Peft(nn.Module):
    """As peft wraps: `base_model.model.` before the names, and `base_layer.` within them."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        layer = nn.Module()
        layer.base_layer = model[0]
        model[0] = layer


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda m: torch.compile(m), "_orig_mod."),
        (lambda m: nn.ModuleDict({"module": m}), "module."),
        (Peft, "base_model.model."),
        (lambda m: nn.ModuleDict({"module": torch.compile(m)}), "_orig_mod."),
    ],
    ids=["compile", "DDP", "peft", "both"],
)
def test_a_wrapper_that_changed_the_names_is_named_on_either_side(wrap, prefix):
    model = network()
    masks = lp.prune(model, 0.5)
    wrapped = wrap(model)
    with pytest.raises(ValueError, match=r"a wrapper put .* into the names of the parameters") as error:
        lp.apply_masks(wrapped, masks)
    assert repr(prefix) in str(error.value)
    of_wrapper = {
        n: torch.zeros_like(p, dtype=torch.bool) for n, p in wrapped.named_parameters() if p.dim() > 1
    }
    with pytest.raises(ValueError, match=r"a wrapper put .* into the names of the masks") as error:
        lp.apply_masks(network(), of_wrapper)
    assert repr(prefix) in str(error.value)
    lp.apply_masks(wrapped, of_wrapper)  # by the wrapper's own names


@pytest.mark.parametrize("schedule", [TopK(108), TopK(999), Threshold(1e9), Bucket(1e9)], ids=in_words)
def test_a_schedule_that_would_leave_nothing_is_refused_and_nothing_is_changed(schedule):
    model = network()
    before = deepcopy(dict(model.state_dict()))
    with pytest.raises(
        ValueError, match=r"leaves none of 108 weights, and one is needed\. Nothing was pruned"
    ):
        lp.prune(model, schedule)
    assert same(dict(model.state_dict()), before)


def test_a_sparsity_of_one_is_taken_at_its_word():
    model = network()
    assert alive(lp.prune(model, 1.0)) == 0


def test_a_schedule_of_tensors_prunes_as_one_of_numbers():
    one, other = network(), network()
    other.load_state_dict(one.state_dict())
    table = torch.tensor([0.0, 0.5])
    assert same(lp.prune(one, table.__getitem__), lp.prune(other, Explicit([0, 0.5])))
