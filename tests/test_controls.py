"""Controls: which tensors and masks equal the ticket's, bit for bit, and which do not."""

import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import nn

import lightning_prune as lp
from lightning_prune.criteria import Random
from lightning_prune.granularity import NM, Block, Filter, Kernel, single, units
from lightning_prune.layers import Layout, prunable
from lightning_prune.masks import alive
from lightning_prune.pruning import next_masks
from lightning_prune.rewind import Snapshot
from lightning_prune.structured import discover
from lightning_prune.study import controls
from lightning_prune.study.alignment import permuted
from lightning_prune.study.equal_size import of_equal_size
from lightning_prune.study.models import LeNet
from lightning_prune.study.recording import Records
from lightning_prune.study.records import read
from lightning_prune.study.round_masks import lifetimes, masks_of
from lightning_prune.study.run import run
from lightning_prune.study.tasks import Classification
from lightning_prune.study.tickets import Begin, Start
from tests.networks import Net, fitter, same
from tests.test_experiments import ROOT

# Of a schedule that is short, so that a step shows.
pytestmark = pytest.mark.filterwarnings("ignore:StepLR. a round ends at")

KINDS = [
    "reinit",
    "aligned",
    "signed_reinit",
    "sign_only",
    "shuffled",
    "shuffled_globally",
    "random",
    "inverted",
]
KINDS += ["one_shot", "small_dense"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(3)
    return LeNet(20, (30, 10), 5)


@pytest.fixture
def masks():
    """Masks of four rounds, which shrink; the middle layer is pruned hardest."""
    densities = {"fc1.weight": 0.7, "fc2.weight": 0.4, "out.weight": 0.9}
    shapes = {n: p.shape for n, p in network().named_parameters() if n in densities}
    rounds = [{n: torch.ones(shape, dtype=torch.bool) for n, shape in shapes.items()}]
    for round in (1, 2, 3):
        generator = seeded(round)
        rounds.append(
            {n: m & (torch.rand(m.shape, generator=generator) < densities[n]) for n, m in rounds[-1].items()}
        )
    return dict(enumerate(rounds))


@pytest.fixture
def start(masks):
    tensors = {n: t.detach() for n, t in network().named_parameters()}
    tensors["fc1.bias"] = torch.linspace(-1, 1, 30)  # as after some steps of training
    return Start(tensors, masks[2])


def prune_to(start):
    """As the experiments do: each part, or each layer, keeps as many as the ticket has in it."""

    def prune(criterion, weights, parts):
        scores = criterion({n: weights[n] for n in start.masks})
        masks = {n: torch.zeros_like(mask) for n, mask in start.masks.items()}
        for part in parts or [[n] for n in start.masks]:
            every = [(n, i) for n in part for i in range(masks[n].numel())]
            every.sort(key=lambda place: -float(scores[place[0]].flatten()[place[1]]))
            for n, i in every[: sum(int(start.masks[n].sum()) for n in part)]:
                masks[n].view(-1)[i] = True
        return masks

    return prune


def counts(masks):
    return {n: int(m.sum()) for n, m in masks.items()}


def test_reinit_changes_every_weight_and_no_mask(start):
    new = controls.reinitialized(start, network(), seeded())
    assert same(new.masks, start.masks)
    assert list(new.tensors) == list(start.tensors)
    for name, w in new.tensors.items():
        assert (w != start.tensors[name]).all() if name in start.masks else not w.any()  # biases start at 0
    assert same(controls.reinitialized(start, network(), seeded()).tensors, new.tensors)
    assert not same(controls.reinitialized(start, network(), seeded(1)).tensors, new.tensors)


def test_reinit_draws_from_the_distribution_of_the_constructor_without_touching_the_global_generator():
    net = LeNet()
    state = torch.get_rng_state()
    new = controls.initialize(net, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(new) == [n for n, _ in net.named_parameters()]
    for name, fan in (("fc1.weight", 1084), ("fc2.weight", 400)):
        assert new[name].std() == pytest.approx((2 / fan) ** 0.5, rel=0.02)  # Glorot's, not nn.Linear's


def test_batch_normalization_is_reinitialised_with_its_statistics():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    net(torch.randn(16, 4) + 3)
    net[1].weight.data.fill_(7.0)
    new = controls.initialize(net, seeded())
    assert not new["1.running_mean"].any()
    assert (new["1.weight"] == 1).all()
    assert new["1.num_batches_tracked"] == 0


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.full((3,), 5.0))


def test_what_cannot_be_reinitialised_is_an_error_unless_an_init_is_given(start):
    net = nn.Sequential(nn.Linear(4, 3), Scale())
    with pytest.raises(
        ValueError, match=r"no reset_parameters: 1 \(Scale\)\. Give them one, or set run\.control"
    ):
        controls.initialize(net, seeded())

    def init(module):
        for p in module.parameters(recurse=False):
            nn.init.uniform_(p, 1, 2)

    new = controls.initialize(net, seeded(), init)
    assert all(((w >= 1) & (w <= 2)).all() for w in new.values())


def test_signed_reinit_has_the_tickets_signs_and_the_magnitudes_of_another_initialization(start):
    new, other = (f(start, network(), seeded()) for f in (controls.signed_reinit, controls.reinitialized))
    assert same(new.masks, start.masks)
    for name, w in new.tensors.items():
        if name in start.masks:
            assert torch.equal(w.sign(), start.tensors[name].sign())
            assert torch.equal(w.abs(), other.tensors[name].abs())
            assert not torch.equal(w, other.tensors[name])
        else:
            assert same(w, start.tensors[name])


def test_sign_only_has_the_tickets_signs_and_one_magnitude_a_tensor(start):
    new = controls.sign_only(start)
    assert same(new.masks, start.masks)
    for name, w in new.tensors.items():
        if name in start.masks:
            assert torch.equal(w.sign(), start.tensors[name].sign())
            assert w.abs().unique().numel() == 1
            values = start.tensors[name].double()
            std = ((values - values.mean()) ** 2).mean().sqrt()
            assert float(w.abs().max()) == pytest.approx(float(std), rel=1e-5)
        else:
            assert same(w, start.tensors[name])


def test_shuffled_masks_keep_every_layers_count_and_the_weights(start):
    new = controls.shuffled(start, prune_to(start), seeded())
    assert new.tensors is start.tensors
    assert counts(new.masks) == counts(start.masks)
    for name, mask in new.masks.items():
        n = mask.numel()
        agree = int((mask & start.masks[name]).sum())
        assert agree < int(mask.sum())
        if n > 200:  # by chance, within five standard deviations
            expected = int(mask.sum()) ** 2 / n
            assert abs(agree - expected) < 5 * expected**0.5
    assert same(controls.shuffled(start, prune_to(start), seeded()).masks, new.masks)


def test_shuffles_of_the_same_seed_are_nested_as_the_tickets_masks_are(start, masks):
    starts = [Start(start.tensors, masks[r]) for r in (1, 3)]
    early, late = (controls.shuffled(each, prune_to(each), seeded()).masks for each in starts)
    assert all(not (late[n] & ~early[n]).any() for n in early)


def test_globally_shuffled_masks_keep_the_total_and_level_the_layers(start):
    new = controls.shuffled_globally(start, prune_to(start), seeded())
    assert new.tensors is start.tensors
    assert alive(new.masks) == alive(start.masks)
    assert {n: m.shape for n, m in new.masks.items()} == {n: m.shape for n, m in start.masks.items()}
    density = alive(start.masks) / sum(m.numel() for m in start.masks.values())
    assert start.masks["fc2.weight"].float().mean() < density - 0.15
    assert new.masks["fc2.weight"].float().mean() == pytest.approx(density, abs=0.12)


def test_random_masks_are_drawn_from_the_generator_alone(start):
    new = controls.random(start, prune_to(start), seeded())
    assert new.tensors is start.tensors
    assert counts(new.masks) == counts(start.masks)
    assert not same(new.masks, start.masks)
    assert same(controls.random(start, prune_to(start), seeded()).masks, new.masks)
    assert not same(controls.random(start, prune_to(start), seeded(1)).masks, new.masks)


def test_inverted_masks_keep_what_the_ticket_lost_first(start, masks):
    survived = lifetimes(masks)
    new = controls.inverted(start, prune_to(start), survived, seeded())
    assert new.tensors is start.tensors
    assert counts(new.masks) == counts(start.masks)
    for name, mask in new.masks.items():
        kept, lost = survived[name][mask], survived[name][~mask]
        assert int(kept.max()) <= int(lost.min())


def test_one_shot_masks_are_those_of_the_dense_networks_trained_weights(start):
    dense = {n: torch.randn(t.shape, generator=seeded(5)) for n, t in start.tensors.items()}
    new = controls.OneShot(lp.criteria.magnitude)(start, prune_to(start), dense)
    assert new.tensors is start.tensors
    assert counts(new.masks) == counts(start.masks)
    for name, mask in new.masks.items():
        assert dense[name][mask].abs().min() > dense[name][~mask].abs().max()


def count(network):
    return sum(p.numel() for p in prunable(network).values())


@pytest.mark.parametrize("weights", [5_000, 20_000, 40_000, 80_000, 180_000, 266_200])
def test_a_small_dense_network_has_the_nearest_number_of_weights(weights):
    model = OmegaConf.create({"_target_": "lightning_prune.study.models.LeNet", "hidden": [300, 100]})
    first, second = controls.narrowed(model, weights, count)["hidden"]
    scales = [(i + 0.3) / 9000 for i in range(9001)]  # never half way between two whole widths
    both = {(max(1, round(300 * by)), max(1, round(100 * by))) for by in scales}
    assert (first, second) in both
    nearest = min(abs(784 * h1 + h1 * h2 + 10 * h2 - weights) for h1, h2 in both)
    assert abs(784 * first + first * second + 10 * second - weights) == nearest
    assert weights != 266_200 or (first, second) == (300, 100)
    with pytest.raises(ValueError, match="none of hidden"):
        controls.narrowed(OmegaConf.create({"_target_": "x"}), 10, count)


# -------------------------------------------------------------------------------------------- their training


class First(Callback):
    """Sees the first batch of a round; everything before it has happened."""

    seen = None

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if self.seen is None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self.seen = Snapshot.take(model, trainer.optimizers, schedulers)


def step_schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


@pytest.fixture(scope="module")
def ticket():
    """A run that rewinds to step 4, after a change of the learning rate: its snapshot and its first masks."""
    torch.manual_seed(0)
    pruner = lp.IterativeMagnitudePruning(rounds=1, every_n_train_steps=9)
    rewind = lp.LotteryTicketRewind(4)
    fitter(pruner, rewind, epochs=6).fit(Net(schedule=step_schedule, interval="step"))
    return rewind.snapshot, pruner.masks


@pytest.mark.parametrize("change", ["masks", "weights"])
def test_training_begins_in_the_state_that_the_ticket_rewound_to(ticket, change):
    snapshot, masks = ticket
    start = Start(snapshot.tensors, {n: m.flip(0) for n, m in masks.items()})
    if change == "weights":
        start = Start({n: t + 1 for n, t in snapshot.tensors.items()}, masks)
    pruner, first = lp.IterativeMagnitudePruning(rounds=3, every_n_train_steps=9), First()
    pruner.start_from(start.masks, round=2)
    net = Net(schedule=step_schedule, interval="step")
    fitter(Begin(start, snapshot), pruner, first, max_steps=9, max_epochs=-1).fit(net)
    assert pruner.round == 2
    seen = first.seen
    for name, tensor in start.tensors.items():
        expected = torch.where(start.masks[name], tensor, 0.0) if name in masks else tensor
        assert same(seen.tensors[name], expected), name
    assert same(seen.schedulers, snapshot.schedulers)
    assert seen.schedulers[0]["last_epoch"] == 4
    assert same(seen.optimizers[0]["param_groups"], snapshot.optimizers[0]["param_groups"])
    assert seen.optimizers[0]["param_groups"][0]["lr"] == 0.1 / 4
    state = seen.optimizers[0]["state"]
    if change == "weights":  # no history of other weights
        assert state == {}
    else:
        names = [n for n, _ in net.named_parameters()]
        for key, memory in snapshot.optimizers[0]["state"].items():
            momentum = memory["momentum_buffer"]
            if names[key] in masks:
                momentum = torch.where(start.masks[names[key]], momentum, 0.0)
            assert same(state[key]["momentum_buffer"], momentum)


def config(folder, *overrides):
    small = ["rounds=2", "steps_per_round=20", "evaluate_every=10", "progress=false", f"runs={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["experiment=mnist1d", *small, *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(config(folder))
    return folder


def lines(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read(folder / "records.jsonl")[0]]


def test_aligned_masks_are_on_the_weights_of_reinit_in_the_order_of_its_units(start):
    """The other network is trained to be the ticket's with its units in another order: it is found."""
    x, net = torch.randn(50, 20, generator=seeded(7)), network()
    couplings = discover(net, x)
    orders = {n: torch.randperm(c.units, generator=seeded(8)) for n, c in couplings.items()}
    shown = permuted(start.tensors, couplings, orders)

    def trained(tensors):
        return start.tensors if same(tensors, start.tensors) else shown

    found = controls.aligned(start, net, seeded(), trained, [x])
    assert same(found.tensors, controls.reinitialized(start, network(), seeded()).tensors)
    assert same(found.masks, permuted(start.masks, couplings, orders))
    assert not same(found.masks, start.masks)
    assert counts(found.masks) == counts(start.masks)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_at_the_tickets_sizes_and_is_recorded_as_its_round(kind, runs):
    at = [] if kind == "reinit" else ["controls_at=[2]"]
    folder = run(config(runs, f"kind={kind}", *at))
    ticket, found = lines(runs / "mnist1d" / "ticket-1"), lines(folder)
    assert [r["round"] for r in found] == {"reinit": [0, 1, 2], "one_shot": [0, 2]}.get(kind, [2])
    assert {r["kind"] for r in found} == {kind}
    for r in found:
        of = ticket[r["round"]]
        assert (r["total"], r["seed"]) == (of["total"], of["seed"])
        assert r["curve"]["step"] == [10, 20]
        if kind == "small_dense":
            assert r["alive"] == pytest.approx(of["alive"], rel=0.02)
            assert set(r["layers"].values()) == {1.0}
        else:
            assert r["alive"] == of["alive"]
            assert (r["layers"] == of["layers"]) == (kind != "shuffled_globally")
        assert r["sparsity"] == (r["total"] - r["alive"]) / r["total"]
    if kind == "one_shot":  # the dense network is the ticket's, trained the same, bit for bit
        assert found[0]["metrics"] == ticket[0]["metrics"]
        assert found[0]["curve"] == ticket[0]["curve"]
    elif kind != "small_dense":
        assert found[-1]["metrics"]["val_loss"] != ticket[2]["metrics"]["val_loss"]
    assert not list(folder.glob("round-*"))


@pytest.mark.parametrize("weights", [9_000, 30_000])
def test_a_small_dense_network_has_no_bottleneck_of_fewer_units_than_classes(weights):
    model = OmegaConf.create({"_target_": "lightning_prune.study.models.LeNet", "hidden": [300, 100]})
    first, second = controls.narrowed(model, weights, count, least=10)["hidden"]
    assert second >= 10
    assert abs(second - max(10, first / 3)) <= 1
    assert 784 * first + first * second + 10 * second == pytest.approx(weights, abs=500)
    convolutional = OmegaConf.create({"_target_": "lightning_prune.study.models.ResNet20", "width": 16})
    narrow = [controls.narrowed(convolutional, weights, count, least) for least in (1, 10)]
    assert narrow[0] == narrow[1]


def test_a_small_dense_network_may_be_convolutional():
    for name, share in (("resnet20", 0.2), ("vgg16", 0.05), ("conv4", 0.1)):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            model = compose("config", [f"model={name}"]).model
        full = count(instantiate(model))
        narrow = count(instantiate({**model, **controls.narrowed(model, int(share * full), count)}))
        assert narrow == pytest.approx(share * full, rel=0.15)


class PowerCut(BaseException):
    """No error of the run, after which it would be started anew."""


@pytest.mark.parametrize(("hook", "n"), [("on_validation_end", 4), ("on_train_end", 2)])
def test_an_interrupted_control_goes_on_to_the_same_records(hook, n, tmp_path, monkeypatch):
    long = ["steps_per_round=80", "evaluate_every=40", "checkpoint_every_n_epochs=1", "rounds=1"]
    run(config(tmp_path, *long))
    again = ["kind=shuffled", *long]
    straight = lines(run(config(tmp_path, *again)))
    shutil.rmtree(tmp_path / "mnist1d" / "shuffled-1")

    calls, original = [], getattr(Records, hook)

    def crash(self, trainer, module):
        calls.append(trainer.global_step)
        if len(calls) == n:
            raise PowerCut
        original(self, trainer, module)

    monkeypatch.setattr(Records, hook, crash)
    with pytest.raises(PowerCut):
        run(config(tmp_path, *again))
    folder = tmp_path / "mnist1d" / "shuffled-1"
    assert [r["round"] for r in lines(folder)] == [0]
    assert (folder / "round-01" / "resume.ckpt").is_file()
    assert not (folder / "FAILED").exists()
    monkeypatch.undo()
    assert lines(run(config(tmp_path, *again))) == straight


def test_an_interrupted_alignment_trains_no_network_twice(tmp_path, monkeypatch):
    long = ["steps_per_round=80", "evaluate_every=40", "checkpoint_every_n_epochs=1", "rounds=1"]
    run(config(tmp_path, *long))
    again = ["kind=aligned", "controls_at=[1]", *long]
    folder = run(config(tmp_path, *again))
    straight = lines(folder)
    assert not (folder / "trained").exists()
    shutil.rmtree(folder)

    ends, original = [], Records.on_train_end

    def crash(self, trainer, module):
        ends.append(trainer.global_step)
        if len(ends) == 2:  # of both dense networks
            raise PowerCut
        original(self, trainer, module)

    monkeypatch.setattr(Records, "on_train_end", crash)
    with pytest.raises(PowerCut):
        run(config(tmp_path, *again))
    assert len(list((folder / "trained").glob("*/end.pt"))) == 1
    assert lines(run(config(tmp_path, *again))) == straight
    assert len(ends) == 3  # of the second no step was left


def test_a_control_without_a_finished_ticket_is_told_what_to_do(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="kind=ticket first"):
        run(config(tmp_path, "kind=reinit"))
    finished = f"ticket={runs}/mnist1d/ticket-1"
    with pytest.raises(ValueError, match=r"has no rounds \[7\]; it has \[0, 1, 2\]"):
        run(config(tmp_path, "kind=random", "controls_at=[1,7]", finished))
    with pytest.raises(ValueError, match=r"trained in another way \(batch_size: 100 there, 50 here"):
        run(config(tmp_path, "kind=shuffled", "batch_size=50", finished))


@pytest.mark.parametrize(
    ("rewind", "message"),
    [
        ("none", "rewind=none: kind=reinit trains from the state that the ticket rewound to"),
        ("fine_tune", "rewind.policy=fine_tune: kind=reinit trains from what each of the ticket's rounds"),
        ("learning_rate", "rewind.policy=learning_rate: .*is not kept"),
        ("weights", "rewind.policy=weights: .*is not kept"),  # optimizers and schedules go on
        ("early_bird", "rewind.policy=nothing: .*is not kept"),
    ],
)
def test_controls_of_tickets_that_go_on_from_trained_weights_are_refused_before_anything_is_trained(
    rewind, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(Classification, "training_step", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=message + ".*Give rewind=initialization, step or epoch"):
        run(config(tmp_path, "kind=reinit", f"rewind={rewind}"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_controls_of_rounds_of_several_lengths_are_refused(tmp_path):
    until = ["+rewind.until={_target_: lightning_prune.rewind.EarlyBird}"]
    with pytest.raises(ValueError, match=r"rewind.until=EarlyBird.*end at different steps"):
        run(config(tmp_path, "kind=random", *until))


def test_a_one_shot_control_is_refused_where_it_could_not_prune_a_trained_dense_network(tmp_path):
    with pytest.raises(ValueError, match=r"kind=one_shot ranks the weights .* asks for grads"):
        run(config(tmp_path, "kind=one_shot", "criterion=snip"))
    with pytest.raises(ValueError, match=r"there is none where round 0 has sparsity 0\.9"):
        run(config(tmp_path, "kind=one_shot", "schedule=at_initialization"))


def test_a_small_dense_network_needs_no_ticket_that_rewinds(tmp_path):
    same = ["rewind=none", "rounds=1"]
    ticket = lines(run(config(tmp_path, *same)))
    small = lines(run(config(tmp_path, *same, "kind=small_dense")))
    assert [r["alive"] for r in small] == pytest.approx([r["alive"] for r in ticket], rel=0.02)


def test_a_control_of_a_ticket_pruned_at_initialization_has_the_masks_of_its_own_round(tmp_path):
    early = ["schedule=at_initialization", "rounds=1"]
    ticket, masks = lines(folder := run(config(tmp_path, *early))), masks_of(folder)
    assert same(masks[0], masks[1])
    assert [r["alive"] for r in ticket] == [5000, 5000]
    for kind in ("sign_only", "random"):
        found = lines(run(config(tmp_path, *early, f"kind={kind}")))
        assert [(r["round"], r["alive"], r["layers"]) for r in found] == [
            (r["round"], r["alive"], r["layers"]) for r in ticket
        ]


GRANULARITIES = {
    "single": single,
    "filters": Filter(0),
    "input channels": Filter(1),
    "blocks": Block(2, 3),
    "kernels": Kernel(),
    "2:4": NM(2, 4),
}
SHAPES = {"conv.weight": (7, 5, 3, 3), "up.weight": (6, 9), "fc.weight": (20, 63), "out.weight": (10, 20)}
LAYOUTS = {name: Layout(1, 0) if name == "up.weight" else Layout() for name in SHAPES}


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("allocate", [lp.allocation.global_rank, lp.allocation.uniform])
def test_masks_of_equal_size_have_the_weights_and_the_units_of_the_given_ones(name, allocate):
    granularity = GRANULARITIES[name]
    weights = {n: torch.rand(shape, generator=seeded(1)) for n, shape in SHAPES.items()}
    dense = {n: torch.ones(shape, dtype=torch.bool) for n, shape in SHAPES.items()}
    parts = [["conv.weight", "up.weight", "fc.weight"], ["out.weight"]]
    sparsities = [(parts[0], 0.6), (parts[1], 0.55)]
    axes = lp.criteria.magnitude, allocate, granularity
    ticket = next_masks(weights, dense, sparsities, *axes, layouts=LAYOUTS)
    for seed in range(5):
        new = of_equal_size(ticket, weights, parts, Random(seed), allocate, granularity, LAYOUTS)
        alone = [[n] for n in SHAPES]
        shuffled = of_equal_size(ticket, weights, alone, Random(seed), allocate, granularity, LAYOUTS)
        assert counts(shuffled) == counts(ticket)
        assert not same(new, ticket)
        for names in parts:
            assert alive({n: new[n] for n in names}) == alive({n: ticket[n] for n in names})
        for name_of, mask in new.items():  # whole units: those of the granularity, and no others
            scores, expand = units(granularity, mask.float(), LAYOUTS[name_of])
            assert torch.equal(expand(scores > 0) & mask, mask)
            if name != "2:4":
                assert torch.equal(expand(scores > 0), mask)
    assert same(of_equal_size(dense, weights, parts, Random(0), allocate, granularity, LAYOUTS), dense)


def test_masks_that_are_no_whole_units_have_no_equals():
    masks = {"w": torch.tensor([[True, False, True], [True, True, False]])}
    axes = Random(0), lp.allocation.global_rank, Filter(0), {"w": Layout()}
    with pytest.raises(ValueError, match=r"masks of w have 4 weights alive, .* whole units of Filter"):
        of_equal_size(masks, {"w": torch.rand(2, 3)}, [["w"]], *axes)


@pytest.mark.filterwarnings("ignore:.*prunes whole outputs")
@pytest.mark.parametrize("kind", ["random", "shuffled", "shuffled_globally", "inverted", "one_shot"])
@pytest.mark.parametrize("granularity", ["filter", "block", "nm"])
def test_controls_have_the_tickets_size_under_every_granularity(kind, granularity, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / granularity
    given = [f"granularity={granularity}", "allocation=global_rank", "schedule=geometric", "rounds=2"]
    given += ["steps_per_round=6", "evaluate_every=6", "model.hidden=33"]
    ticket = lines(run(config(folder, *given)))
    found = lines(run(config(folder, *given, f"kind={kind}", "controls_at=[1,2]")))
    assert [(r["round"], r["alive"]) for r in found if r["round"]] == [
        (r["round"], r["alive"]) for r in ticket if r["round"]
    ]


def test_controls_can_be_extended_to_more_rounds(runs):
    folder = run(config(runs, "kind=sign_only", "controls_at=[2]"))
    first = lines(folder)
    (folder / "DONE").unlink()
    assert [r["round"] for r in lines(run(config(runs, "kind=sign_only")))] == [0, 1, 2]
    assert lines(folder)[2] == first[0]


def test_each_kind_and_seed_draws_from_a_generator_of_its_own(tmp_path):
    draws = {
        (kind, seed): torch.rand(1, generator=controls.generator_of(config(tmp_path, f"seed={seed}"), kind))
        for kind in ("shuffled", "random")
        for seed in (1, 2)
    }
    assert len({float(draw) for draw in draws.values()}) == 4
