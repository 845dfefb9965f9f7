"""On a GPU what holds on the CPU: each test runs on the CPU, and `make gpu` runs it on a GPU."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation, criteria, rng, schedules
from lightning_prune.granularity import NM, single
from lightning_prune.masks import alive
from tests.naming import in_words
from tests.networks import Net, Watch, dead_are_zero, fitter, same, state
from tests.ranks import started
from tests.sharded import on_gpus

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
ON = ["cpu", pytest.param("cuda", marks=GPU)]
ACCELERATOR = {"cpu": "cpu", "cuda": "gpu"}
HALF = {"cpu": "bf16-mixed", "cuda": "16-mixed"}  # on a GPU with a scaler of the loss

pytestmark = pytest.mark.filterwarnings("ignore:.*the fit (has room for|ended in round)")


@pytest.fixture(params=ON)
def device(request):
    return request.param


def on(device, *callbacks, **options):
    return fitter(*callbacks, accelerator=ACCELERATOR[device], **options)


def network(dtype=torch.float32):
    """Weights of few different values, so that many scores are equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    for p in model.parameters():
        p.data = (p.data * 40).round() / 8
    return model.to(dtype)


def batches(device, n=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 24, generator=generator).to(device), torch.arange(16).to(device) % 8)] * n


def on_the_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def pruner(**options):
    return lp.IterativeMagnitudePruning(schedules.Geometric(0.3), **{"rounds": 3, **options})


# ------------------------------------------------------------------------------------ masks and selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("allocate", "granularity"),
    [
        (allocation.global_rank, single),
        (allocation.uniform, single),
        (allocation.erk, single),
        (allocation.per_output, single),
        (allocation.uniform, NM(2, 4)),
    ],
    ids=["global_rank", "uniform", "erk", "per_output", "2:4"],
)
def test_masks_are_those_of_the_cpu(allocate, granularity, dtype, device):
    how = {"sparsity": 0.5, "allocate": allocate, "granularity": granularity}
    expected = lp.prune(network(dtype), **how)
    found = lp.prune(model := network(dtype).to(device), **how)
    assert {mask.device.type for mask in found.values()} == {device}
    assert same(on_the_cpu(found), expected)
    assert dead_are_zero(dict(model.named_parameters()), found)


def test_one_large_selection_is_that_of_the_cpu(device):
    layer = nn.Linear(1000, 2000, bias=False)
    expected = lp.prune(deepcopy(layer), 0.9)
    assert same(on_the_cpu(lp.prune(layer.to(device), 0.9)), expected)
    assert alive(expected) == 200_000


def test_random_scores_are_drawn_from_the_seed(device):
    torch.manual_seed(3)
    expected = lp.prune(network(), 0.5, criteria.Random())
    torch.manual_seed(3)
    assert same(on_the_cpu(lp.prune(network().to(device), 0.5, criteria.Random())), expected)


@pytest.mark.parametrize("criterion", [criteria.wanda, criteria.snip, criteria.GraSP()], ids=in_words)
def test_scores_that_run_the_model_leave_its_generators_alone(criterion, device):
    model = nn.Sequential(nn.Dropout(0.5), *network()).to(device)
    before = rng.capture()
    loss = None if criterion is criteria.wanda else nn.functional.cross_entropy
    masks = lp.prune(model, 0.5, criterion, data=batches(device), loss=loss)
    assert same(rng.capture(), before)
    assert alive(masks) == sum(mask.numel() for mask in masks.values()) // 2


def test_files_are_those_of_the_cpu(device, tmp_path):
    lp.prune(model := network(torch.bfloat16), 0.9)
    lp.save_sparse(model.state_dict(), tmp_path / "cpu")
    lp.save_sparse(model.to(device).state_dict(), tmp_path / "device")
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "device").read_bytes()


# ------------------------------------------------------------------------------------ trainings


@pytest.mark.parametrize("precision", ["32-true", "half"])
def test_dead_weights_are_zero_at_every_moment(precision, device):
    pruning = pruner()
    precision = HALF[device] if precision == "half" else precision
    watch = Watch(pruning)
    on(device, pruning, lp.LotteryTicketRewind(2), watch, epochs=4, precision=precision).fit(Net())
    assert watch.checked > 20
    assert {mask.device.type for mask in pruning.masks.values()} <= {device, "cpu"}


OPTIMIZERS = {  # those that are capturable are for graphs of steps, which a GPU records
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adam, capturable": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
    "AdamW, fused and capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, "cpu") for name in OPTIMIZERS if "capturable" not in name),
        *(pytest.param(name, "cuda", marks=GPU) for name in OPTIMIZERS),
    ],
)
def test_dead_weights_are_zero_with_fused_and_captured_steps(name, device):
    watch = Watch(pruning := pruner())
    on(device, pruning, watch, epochs=4).fit(Net(OPTIMIZERS[name]))
    assert watch.checked > 20
    assert alive(pruning.masks) == round(400 * 0.7**3)


@pytest.mark.parametrize("precision", ["32-true", "half"])
def test_a_fit_that_is_resumed_ends_with_the_same_bits(precision, device, tmp_path):
    precision = HALF[device] if precision == "half" else precision

    def run(folder, resume=None):
        saver = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        callbacks = pruner(), lp.LotteryTicketRewind(2), saver
        trainer = on(device, *callbacks, epochs=4, precision=precision, enable_checkpointing=True)
        torch.manual_seed(7)
        trainer.fit(Net(), ckpt_path=resume)
        return state(trainer)

    expected = run("straight")
    for epoch in range(3):
        torch.manual_seed(epoch)  # what is drawn goes on from the checkpoint
        torch.rand(9, device=device)
        assert same(run("again", tmp_path / "straight" / f"epoch={epoch}.ckpt"), expected)


@pytest.mark.parametrize("grow", [criteria.gradient, criteria.Random()], ids=["RigL", "SET"])
def test_growth_keeps_as_many_alive(grow, device):
    training = lp.DynamicSparseTraining(0.8, grow=grow, every_n_train_steps=2)
    watch = Watch(training)
    on(device, training, watch, epochs=6).fit(Net())
    assert watch.checked > 20
    assert alive(training.masks) == 80
    assert sum(row.metrics.get("grown", 0.0) for row in training.history) > 0


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ between versions
def test_a_compiled_network_sees_the_masks(device):
    """On a GPU steps are recorded as CUDA graphs, which read weights where they lay when recorded."""
    model, pruning = Net(dropout=0.0), pruner()
    eager = model.forward
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    model.forward = torch.compile(model.forward, **how)
    on(device, pruning, lp.LotteryTicketRewind(1), Watch(pruning), epochs=4).fit(model)
    x = torch.randn(8, 6, device=device)
    model.eval().to(device)
    with torch.no_grad():
        compiled, other = model(x).clone(), eager(x)
        torch.testing.assert_close(compiled, other)
        for p in model.parameters():
            p.mul_(0.5)
        lp.apply_masks(model, pruning.masks)
        torch.testing.assert_close(model(x).clone(), eager(x))
        assert not torch.equal(eager(x), other)


# ------------------------------------------------------------------------------------ channels


def test_channels_are_cut_as_on_the_cpu(device, tmp_path):
    example = torch.randn(4, 24)
    expected = lp.prune_channels(small := network(), 0.5, example_input=example)
    units = lp.prune_channels(model := network().to(device), 0.5, example_input=example.to(device))
    assert same(on_the_cpu(units), expected)
    torch.testing.assert_close(model(example.to(device)).cpu(), small(example))
    torch.save(model.state_dict(), tmp_path / "small.pt")
    loaded = lp.load_pruned(network(), tmp_path / "small.pt")
    assert same(loaded.state_dict(), on_the_cpu(model.state_dict()))


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_a_fit_cuts_channels(remove, device):
    channels = lp.StructuredChannelPruning(schedules.Linear(0.5, rounds=2), rounds=2, remove=remove)
    on(device, channels, epochs=3, precision=HALF[device]).fit(model := Net())
    assert (model.stem.out_features, model.body.out_features) == (8, 8)
    model.to(device)(torch.randn(4, 6, device=device)).sum().backward()


def test_a_summary_counts_and_times_on_the_device(device):
    lp.prune(model := network().to(device).eval(), 0.5)
    found = lp.summarize(model, torch.randn(4, 24, device=device))
    expected = lp.summarize(deepcopy(model).cpu(), torch.randn(4, 24))
    assert (found.total.alive, found.total.multiply_adds) == (
        expected.total.alive,
        expected.total.multiply_adds,
    )
    assert found.total.latency_us > 0


# ------------------------------------------------------------------------------------ processes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_masks_on_shards_of_one_process_are_those_of_the_cpu(tmp_path):
    """On the CPU `test_shards.py` has processes."""
    (process,) = started(1, on_gpus, tmp_path)
    process.join(300)
    assert process.exitcode == 0
    assert torch.load(tmp_path / "0.pt", weights_only=True) == []
