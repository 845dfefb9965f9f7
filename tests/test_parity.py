"""Parity: the same masks as torch.nn.utils.prune, and as open_lth apart from its off-by-one.

Torch rounds the number of the pruned, we that of the survivors: at exact halves they may differ by one.
"""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune as peer

import lightning_prune as lp
from lightning_prune.allocation import AtLeast, uniform
from lightning_prune.criteria import Random
from lightning_prune.granularity import Filter
from lightning_prune.masks import alive
from lightning_prune.pruning import next_masks
from tests import reference_methods as oracle
from tests.networks import Net, fitter

LAYERS = [lambda: nn.Linear(40, 30), lambda: nn.Conv2d(6, 10, 3), lambda: nn.Conv1d(8, 10, 5)]
AMOUNTS = [0.1, 0.25, 0.5, 0.9]


def theirs(prune, layer, **options):
    twin = deepcopy(layer)
    prune(twin, "weight", **options)
    return twin.weight_mask.bool()


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_l1_unstructured(make, amount):
    layer = make()
    expected = theirs(peer.l1_unstructured, layer, amount=amount)
    assert torch.equal(lp.prune(layer, amount)["weight"], expected)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_random_unstructured_has_the_same_count(make, amount):
    layer = make()
    expected = theirs(peer.random_unstructured, layer, amount=amount)
    assert int(lp.prune(layer, amount, Random(1))["weight"].sum()) == int(expected.sum())


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", [1, 2, float("inf")])
def test_ln_structured(make, amount, dim, n):
    layer = make()
    expected = theirs(peer.ln_structured, layer, amount=amount, n=n, dim=dim)
    assert torch.equal(lp.prune(layer, amount, granularity=Filter(dim, n))["weight"], expected)


RESNET18 = {
    "conv1": lambda: nn.Conv2d(3, 64, 7),
    "layer1": lambda: nn.Conv2d(64, 64, 3),
    "downsample": lambda: nn.Conv2d(64, 128, 1),
    "layer4": lambda: nn.Conv2d(256, 512, 3),
    "fc": lambda: nn.Linear(512, 1000),
}


@pytest.mark.filterwarnings("ignore:granularity. .* and those of the last layer")
@pytest.mark.parametrize(("dim", "n"), [(0, 1), (0, 2), (1, 2)])
def test_ln_structured_of_each_layer_of_a_resnet(dim, n):
    """The same fraction of every layer: Lightning's `use_global_unstructured=False`."""
    net = nn.ModuleDict({name: make() for name, make in RESNET18.items()})
    with torch.no_grad():
        for layer, scale in zip(net.values(), (30, 1, 5, 0.1, 1), strict=True):
            layer.weight *= scale  # whatever the scale of a layer
    for amount in (0.25, 0.5):
        # the counts are whole numbers, but for the three inputs of the first layer
        names = list(net) if dim == 0 else list(net)[1:]
        granularity, include = Filter(dim, n), [f"{name}.weight" for name in names]
        masks = lp.prune(deepcopy(net), amount, allocate=uniform, granularity=granularity, include=include)
        for name in names:
            expected = theirs(peer.ln_structured, net[name], amount=amount, n=n, dim=dim)
            assert torch.equal(masks[f"{name}.weight"], expected), name


def test_ln_structured_of_a_transposed_convolution_has_its_dimensions_the_other_way_round():
    layer = nn.ConvTranspose2d(6, 10, 3)
    for dim in (0, 1):
        expected = theirs(peer.ln_structured, layer, amount=0.5, n=2, dim=1 - dim)
        ours = lp.prune(deepcopy(layer), 0.5, granularity=Filter(dim, 2))["weight"]
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_global_unstructured(amount):
    layers = nn.ModuleList([make() for make in LAYERS])
    twins = nn.ModuleList([make() for make in LAYERS])
    twins.load_state_dict(layers.state_dict())
    peer.global_unstructured([(m, "weight") for m in twins], peer.L1Unstructured, amount=amount)
    masks = lp.prune(layers, amount, allocate=AtLeast(0))
    assert all(torch.equal(mask, m.weight_mask.bool()) for mask, m in zip(masks.values(), twins, strict=True))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_the_same_fraction_of_every_layer(amount):
    layers = nn.ModuleList([nn.Linear(40, 30), nn.Linear(30, 20)])  # amounts of these are whole numbers
    expected = [theirs(peer.l1_unstructured, m, amount=amount) for m in layers]
    masks = lp.prune(layers, amount, allocate=uniform)
    assert all(torch.equal(mask, e) for mask, e in zip(masks.values(), expected, strict=True))


def test_open_lth_removes_one_weight_more_and_is_the_same_otherwise():
    weights = {"a": torch.randn(30, 20), "b": torch.randn(10, 30)}
    ours = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    for _ in range(5):
        left = sum(int(m.sum()) for m in ours.values())
        expected, cut = oracle.open_lth(weights, ours, fraction=0.2)
        count = -(-left // 5)  # theirs is rounded up
        ours = next_masks(weights, ours, [(list(weights), 1 - (left - count) / 900)])
        extra = {n: ours[n] & ~expected[n] for n in ours}
        assert [float(weights[n][e].abs()) for n, e in extra.items() if bool(e.any())] == [cut]
        assert not any(bool((expected[n] & ~ours[n]).any()) for n in ours)


class Counted(Callback):
    """How many weights are alive as each epoch but the first begins."""

    def __init__(self, count):
        self.count, self.seen = count, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not batch_idx and trainer.current_epoch:
            self.seen.append(self.count(pl_module))


@pytest.mark.parametrize("lottery", [False, True])
@pytest.mark.parametrize(
    ("amount", "schedule"),
    [
        (0.2, lp.schedules.Geometric(0.2)),
        (60, lp.schedules.TopK(60)),
        (
            lambda epoch: 0.5 if epoch < 2 else 0.1,
            lp.schedules.Amounts(lambda over: 0.5 if over < 2 else 0.1),
        ),
        (lambda epoch: [50, 0.25, 0, 7][epoch], lp.schedules.Amounts(lambda over: [50, 0.25, 0, 7][over])),
    ],
    ids=["fraction", "number", "function", "fractions and numbers"],
)
def test_the_sparsities_of_model_pruning_epoch_by_epoch(amount, schedule, lottery):
    """With `lottery` weights are reset after each pruning, which changes no count."""
    model = Net()
    layers = [(model.get_submodule(name), "weight") for name in ("stem", "body", "head")]
    theirs = Counted(lambda m: sum(int(b.sum()) for n, b in m.named_buffers() if n.endswith("weight_mask")))
    peer = ModelPruning("l1_unstructured", layers, amount=amount, use_lottery_ticket_hypothesis=lottery)
    quiet = {"epochs": 4, "enable_checkpointing": False}
    fitter(peer, theirs, **quiet).fit(model)
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=3)
    ours = Counted(lambda m: alive(pruner.masks))
    fitter(pruner, *[lp.LotteryTicketRewind()] * lottery, ours, **quiet).fit(Net())
    assert ours.seen == theirs.seen
    assert len(set(ours.seen)) >= 2


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (0.2, "amount=0.2: allowed are functions of the round.*Geometric"),
        (lambda over: 1.5, r"amount\(0\)=1.5: allowed are fractions from 0 to 1 as float"),
        (lambda over: -1, r"amount\(0\)=-1: .* whole numbers from 0 to 10"),
        (lambda over: True, r"amount\(0\)=True: allowed"),
        (lambda over: "a", r"amount\(0\)='a': allowed"),
        (lambda over: None, r"amount\(0\)=None: allowed"),
        (lambda over: torch.rand(2), r"amount\(0\)=tensor.*: allowed"),
    ],
)
def test_amounts_that_are_none(amount, said):
    with pytest.raises(ValueError, match=said):
        lp.schedules.Amounts(amount)(1, {"w": torch.rand(10)})


def test_an_amount_may_be_a_tensor():
    scores = {"w": torch.rand(10)}
    assert lp.schedules.Amounts(lambda over: torch.tensor(0.2))(1, scores) == pytest.approx(0.2)
    assert lp.schedules.Amounts(lambda over: torch.tensor(3))(1, scores) == pytest.approx(0.3)
