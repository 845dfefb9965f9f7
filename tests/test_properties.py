"""Properties: whatever the network, the sparsity and the numbers, and whatever comes after what."""

import io
import itertools
import os
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lightning_prune as lp
from lightning_prune import doctor
from lightning_prune.allocation import AtLeast, global_rank, uniform
from lightning_prune.granularity import NM, Block, Filter, Kernel
from lightning_prune.holding import Handle
from lightning_prune.masks import alive, pack, unpack
from lightning_prune.pruning import budget, next_masks
from lightning_prune.rewind import Snapshot
from lightning_prune.selection import keep_top, threshold
from tests.networks import bits_of, dead_are_zero, same
from tests.reference import global_selection, uniform_selection

# The same examples on every run; `make test-slow` takes more of them, and others each time.
few = {"derandomize": True, "deadline": None, "database": None}
few["suppress_health_check"] = [HealthCheck.too_slow, HealthCheck.data_too_large]
MANY = {**few, "derandomize": False, "max_examples": int(os.environ.get("EXAMPLES", "1000"))}

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-41, 6e-8, 1.0, -1.0, 1.0000001, 3e38, -3e38, 65504.0, 0.1]


@st.composite
def tensors(draw, dtype=None, odd=()):
    """Of any shape, some empty; numbers that tie, zeros of both signs, denormals, the largest; and `odd`."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple) | st.just((0, 3)))
    size = int(torch.Size(shape).numel())
    number = st.sampled_from([*ODD, *odd]) | st.floats(-4, 4, width=16)
    values = draw(st.lists(number, min_size=size, max_size=size))
    dtype = dtype or draw(DTYPES)
    return torch.tensor(values, dtype=torch.float64).to(dtype).nan_to_num(posinf=6e4).reshape(shape)


@st.composite
def weights(draw, **options):
    made = draw(st.lists(tensors(**options), min_size=1, max_size=4))
    return {f"layer{i}.weight": t for i, t in enumerate(made)}


SPARSITIES = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 1 / 3, 1e-9, 1 - 1e-9])


def dense(params):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}


# -------------------------------------------------------------------------------------------------- selection


def selection_equals_sorting(data):
    scores = data.draw(weights(odd=[float("-inf")]))
    total = sum(s.numel() for s in scores.values())
    keep = data.draw(st.integers(0, total))
    counts = global_rank(scores, keep)
    masks = {name: keep_top(s, counts[name], near=counts.near) for name, s in scores.items()}
    assert same(masks, global_selection(scores, keep))
    event(f"{len(scores)} tensors")
    if keep:
        cut, ties = threshold(scores.values(), keep)
        above = sum(int((s.double() > cut).sum()) for s in scores.values())
        assert above + ties == keep


def pruning_meets_its_budget(data):
    """Round after round, in any order of sparsities; masks only shrink, and the given is left alone."""
    params = data.draw(weights())
    allocate, oracle = data.draw(
        st.sampled_from(
            [(AtLeast(0, of=global_rank), global_selection), (AtLeast(0, of=uniform), uniform_selection)]
        )
    )
    size, masks, kept = sum(p.numel() for p in params.values()), dense(params), deepcopy(params)
    for sparsity in sorted(data.draw(st.lists(SPARSITIES, min_size=1, max_size=3))):
        scores = {n: p.abs().masked_fill(~masks[n], -torch.inf) for n, p in params.items()}
        total = min(budget(sparsity, size), alive(masks))
        new = next_masks(params, masks, [(list(params), sparsity)], allocate=allocate)
        assert alive(new) == (total if sparsity else alive(masks))
        assert same(new, oracle(scores, total) if sparsity else masks)
        assert not any(bool((new[n] & ~masks[n]).any()) for n in new)
        assert doctor.missed(new, masks, [(list(params), sparsity)]) == []
        assert same(params, kept)
        masks = new


def coarse_pruning_only_takes_away(data):
    """Units live and die together, and what was dead stays dead whatever a unit is."""
    params = data.draw(weights(dtype=torch.float32))
    params = {n: p for n, p in params.items() if p.dim() > 1 and p.numel()}
    if not params:
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    masks = {n: torch.rand(p.shape, generator=generator) < 0.7 for n, p in params.items()}
    granularity = data.draw(
        st.sampled_from([NM(1, 2), NM(2, 4), Block(2, 2), Block(1, 3), Kernel(), Filter()])
    )
    allocate = data.draw(st.sampled_from([AtLeast(0, of=global_rank), global_rank, uniform]))
    sparsity = data.draw(st.floats(0.01, 1))
    new = next_masks(params, masks, [(list(params), sparsity)], granularity=granularity, allocate=allocate)
    for name, mask in new.items():
        assert not bool((mask & ~masks[name]).any())
        if isinstance(granularity, Filter):  # a filter loses all of its living weights, or none
            for row, before in zip(mask, masks[name], strict=True):
                assert torch.equal(row, before) or not bool(row.any())


def numbers_that_are_none_are_refused(data):
    params = data.draw(weights(dtype=torch.float32))
    sizes = {n: p.numel() for n, p in params.items() if p.numel()}
    if not sizes:
        return
    name = data.draw(st.sampled_from(list(sizes)))
    place = data.draw(st.integers(0, sizes[name] - 1))
    params[name].view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    before = deepcopy(params)
    with pytest.raises(ValueError, match=f"the weight {name} holds NaN or infinity"):
        next_masks(params, dense(params), [(list(params), 0.5)])
    assert same(params, before)


def masks_and_files_lose_no_bit(data):
    params = data.draw(weights(odd=[float("nan"), float("inf"), float("-inf")]))
    masks = {name: p.abs() > 0.5 for name, p in params.items()}
    file = io.BytesIO()
    torch.save(pack(masks), file)
    file.seek(0)
    assert same(unpack(torch.load(file, weights_only=True)), masks)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    held = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    hold = Handle(held, masks, [optimizer], gradients=False)
    assert dead_are_zero(held, masks)  # whatever they were
    assert all(torch.equal(bits_of(held[n])[m], bits_of(params[n])[m]) for n, m in masks.items())
    assert doctor.awake(held, masks, "") == []
    hold.remove()


def a_network_is_pruned_and_nothing_else_is_touched(data):
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), data.draw(st.sampled_from([nn.ReLU(), nn.BatchNorm1d(after)]))]
    net, sparsity = nn.Sequential(*layers), data.draw(SPARSITIES)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((p * 4).round() / 4)  # with ties and zeros
    state, total = deepcopy(net.state_dict()), sum(p.numel() for p in net.parameters() if p.dim() > 1)
    masks = lp.prune(net, sparsity)
    assert alive(masks) == budget(sparsity, total)
    for name, value in net.state_dict().items():
        expected = state[name].masked_fill(~masks[name], 0) if name in masks else state[name]
        assert same(value, expected)
    if alive(masks) >= len(masks):
        assert all(bool(mask.any()) for mask in masks.values())


PROPERTIES = [
    selection_equals_sorting,
    pruning_meets_its_budget,
    coarse_pruning_only_takes_away,
    numbers_that_are_none_are_refused,
    masks_and_files_lose_no_bit,
    a_network_is_pruned_and_nothing_else_is_touched,
]


@pytest.mark.filterwarnings("ignore:.*finds no unit")
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__)
def test_a_property_holds_for_some_examples(holds):
    given(st.data())(settings(**few, max_examples=60)(holds))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*finds no unit")
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__)
def test_a_property_holds_for_many_examples(holds):
    given(st.data())(settings(**MANY)(holds))()


# -------------------------------------------------------------------------------------------------- sequences


class Sequences(RuleBasedStateMachine):
    """Train, prune, rewind, save, resume in any order; beside it a slow version with plain tensors."""

    @initialize(seed=st.integers(0, 99), name=st.sampled_from(["SGD", "Adam"]))
    def start(self, seed, name):
        torch.manual_seed(seed)
        self.name = name
        self.net, self.optimizer, self.hold = self.fresh()
        self.masks = dense(self.params(self.net))
        self.hold.set(self.masks)
        self.theirs = {n: p.detach().clone() for n, p in self.net.named_parameters()}  # the slow version
        self.snapshot = self.early = self.file = None
        self.early_was = self.saved = None

    def fresh(self):
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if self.name == "SGD" else {})}
        optimizer = getattr(torch.optim, self.name)(net.parameters(), **options)
        params = self.params(net)
        return net, optimizer, Handle(params, dense(params), [optimizer], gradients=True)

    def params(self, net):
        return {n: p for n, p in net.named_parameters() if p.dim() > 1}

    @rule(steps=st.integers(1, 3))
    def train(self, steps):
        x = torch.linspace(-1, 1, 12).view(4, 3)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.net(x).square().sum().backward()
            self.optimizer.step()
        self.theirs = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        for name, mask in self.masks.items():
            self.theirs[name][~mask] = 0

    @rule(sparsity=st.floats(0, 0.95))
    def prune(self, sparsity):
        scores = {n: self.theirs[n].abs().masked_fill(~m, -torch.inf) for n, m in self.masks.items()}
        left = min(round((1 - sparsity) * 25), alive(self.masks)) if sparsity else alive(self.masks)
        expected = global_selection(scores, left)
        allocate = AtLeast(0, of=global_rank)
        params = self.params(self.net)
        self.masks = next_masks(params, self.masks, [(list(params), sparsity)], allocate=allocate)
        assert same(self.masks, expected)
        self.hold.set(self.masks)
        for name, mask in self.masks.items():
            self.theirs[name][~mask] = 0

    @rule()
    def snap(self):
        self.snapshot = Snapshot.take(self.net, [self.optimizer])
        self.early_was = deepcopy(self.snapshot.state_dict())
        self.early = {n: v.clone() for n, v in self.theirs.items()}

    @precondition(lambda self: self.snapshot)
    @rule()
    def rewind(self):
        self.snapshot.restore(self.net, [self.optimizer])
        self.hold.set(self.masks)
        self.theirs = {n: v.clone() for n, v in self.early.items()}
        for name, mask in self.masks.items():
            self.theirs[name][~mask] = 0

    @rule()
    def save(self):
        self.file = io.BytesIO()
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"masks": pack(self.masks), "early": self.snapshot.state_dict() if self.snapshot else None}
        torch.save(state, self.file)
        self.saved = deepcopy((self.theirs, self.masks, self.early, self.early_was))

    @precondition(lambda self: self.file)
    @rule()
    def resume(self):
        self.file.seek(0)
        state = torch.load(self.file, weights_only=True)
        self.hold.remove()
        self.net, self.optimizer, self.hold = self.fresh()
        self.net.load_state_dict(state["net"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.theirs, self.masks, self.early, self.early_was = deepcopy(self.saved)
        assert same(unpack(state["masks"]), self.masks)
        self.hold.set(self.masks)
        self.snapshot = Snapshot(**state["early"]) if state["early"] else None

    @invariant()
    def the_laws_hold(self):
        if not hasattr(self, "net"):
            return
        assert dead_are_zero(dict(self.net.named_parameters()), self.masks)
        assert same({n: p.detach() for n, p in self.net.named_parameters()}, self.theirs)
        assert doctor.awake(self.params(self.net), self.masks, "") == []
        assert (
            doctor.replaced(
                self.params(self.net), self.net, [self.optimizer], {id(p) for p in self.net.parameters()}
            )
            == []
        )
        for name, mask in self.masks.items():  # what an optimizer remembers of the dead is nothing
            for value in self.optimizer.state.get(self.net.get_parameter(name), {}).values():
                assert value.shape != mask.shape or not bool(value[~mask].any())
        if self.snapshot:
            assert same(self.snapshot.state_dict(), self.early_was)


Sequences.TestCase.settings = settings(**few, max_examples=15, stateful_step_count=20)
TestSequences = Sequences.TestCase


@pytest.mark.slow
def test_many_sequences_keep_the_laws():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Sequences, settings=settings(**{**MANY, "max_examples": 300}))
