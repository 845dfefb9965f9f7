"""The papers' experiments: their networks and budgets exactly, and each of them from end to end, tiny."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from lightning_prune.layers import prunable
from lightning_prune.masks import alive
from lightning_prune.pruning import next_masks, scheduled
from lightning_prune.study.controls import initialize
from lightning_prune.study.data import Batches, Splits, pad_crop_flip, per_channel, per_image
from lightning_prune.study.models import VGG16, Conv, ResNet20, glorot, kaiming
from lightning_prune.study.records import read
from lightning_prune.study.run import run
from tests.test_experiments import ROOT

# Weights left after n rounds, in percent, from the shapes and rates of Frankle & Carbin (2019), Figure 2.
LADDERS = {
    "conv2": [100, 80.10, 64.16, 51.41, 41.20, 33.02, 26.47, 21.23, 17.03, 13.66, 10.97],
    "conv4": [100, 81.08, 65.84, 53.55, 43.63, 35.61, 29.13, 23.88, 19.62, 16.16, 13.35],
    "conv6": [100, 82.54, 68.20, 56.39, 46.68, 38.67, 32.07, 26.61, 22.11, 18.38, 15.29],
}
LADDERS["conv2"] += [8.81, 7.08, 5.69, 4.57, 3.68, 2.97, 2.39, 1.93, 1.56, 1.26]
LADDERS["conv4"] += [11.06, 9.18, 7.65, 6.40, 5.37, 4.51, 3.81, 3.23, 2.75, 2.34]
LADDERS["conv6"] += [12.74, 10.62, 8.86, 7.39, 6.18, 5.17, 4.32, 3.62, 3.03, 2.54]
WEIGHTS = {"conv2": 4_300_992, "conv4": 2_425_024, "conv6": 2_261_184}
CONVOLUTIONS = {"conv2": 38_592, "conv4": 259_776, "conv6": 1_144_512}


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_conv_networks_have_the_papers_weights_and_walk_down_its_ladder(name):
    cfg = composed(f"experiment={name}_cifar10")
    params = prunable(instantiate(cfg.model))
    sizes = {n: p.numel() for n, p in params.items()}
    assert sum(sizes.values()) == WEIGHTS[name]
    assert sum(n for name_, n in sizes.items() if name_.startswith("conv.")) == CONVOLUTIONS[name]
    pruner = instantiate(cfg.pruner)
    params = {f"net.{n}": p.detach() for n, p in params.items()}
    dense = {n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()}
    for round in (1, 7, 13, 20):
        sparsities = [
            (names, schedule(round)) for names, schedule in scheduled(list(params), pruner.schedule)
        ]
        masks = next_masks(params, dense, sparsities, pruner.criterion, pruner.allocate)
        assert 100 * alive(masks) / WEIGHTS[name] == pytest.approx(LADDERS[name][round], abs=0.05)
    # and what the claims of the config say is that ladder
    claim = instantiate(cfg.claims, _convert_="all")[0]
    assert list(claim.left) == pytest.approx([percent / 100 for percent in LADDERS[name]])
    assert 0.19 < 1 - masks["net.fc1.weight"].float().mean() ** (1 / 20) < 0.21
    convolution = 1 - masks["net.conv.0.weight"].float().mean() ** (1 / 20)
    assert convolution == pytest.approx(0.15 if name == "conv6" else 0.1, abs=0.003)


def test_vgg16_and_resnet20_are_those_of_the_papers():
    sizes = {n: p.numel() for n, p in prunable(VGG16()).items()}
    assert sum(sizes.values()) == 14_715_584
    assert sizes["out.weight"] == 5_120
    assert len(sizes) == 14
    assert VGG16(width=4)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    cfg = composed("experiment=vgg16_cifar10")
    assert set(instantiate(cfg.pruner).prunable(instantiate(cfg.task))) == {f"net.{n}" for n in sizes} - {
        "net.out.weight"
    }


def test_a_network_is_initialised_as_its_experiment_says():
    net = ResNet20(init=kaiming)
    scales = torch.cat([m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0 <= float(scales.min()) < 0.05
    assert 0.95 < float(scales.max()) < 1
    assert net.blocks[0].conv1.weight.detach().std() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    assert (ResNet20().stem[1].weight == 1).all()
    layer = nn.Conv2d(8, 16, 3)
    glorot(layer)
    assert not layer.bias.any()
    assert layer.weight.detach().std() == pytest.approx((2 / (24 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "make", [lambda: ResNet20(init=kaiming), lambda: VGG16(width=16, init=kaiming), Conv]
)
def test_a_network_is_initialised_anew_as_it_was_at_first(make):
    net = make()
    first = {n: p.detach().clone() for n, p in net.named_parameters()}
    anew = initialize(net, torch.Generator().manual_seed(0))
    for name, w in first.items():
        if w.dim() > 1 and w.numel() > 400:
            assert not torch.equal(anew[name], w)
            assert anew[name].std() == pytest.approx(float(w.std()), rel=0.2)
        elif isinstance(net.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d) and name.endswith(
            "weight"
        ):
            assert anew[name].std() > 0.15  # uniform, not 1
        elif name.endswith("bias") and name != "out.bias":
            assert not anew[name].any()


def test_augmentation_is_pad_crop_and_flip_of_each_image():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 6, 5, generator=generator)
    found = pad_crop_flip(x, 2, torch.Generator().manual_seed(1))
    seen = set()
    for image, result in zip(x, found, strict=True):
        padded = torch.zeros(3, 10, 9)
        padded[:, 2:8, 2:7] = image
        matches = []
        for top in range(5):
            for left in range(5):
                crop = padded[:, top : top + 6, left : left + 5]
                matches += [
                    (top, left, flip)
                    for flip in (0, 1)
                    if torch.equal(crop.flip(2) if flip else crop, result)
                ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {t for t, _, _ in seen} == {left for _, left, _ in seen} == {0, 1, 2, 3, 4}
    assert {flip for _, _, flip in seen} == {0, 1}
    assert torch.equal(pad_crop_flip(x, 2, torch.Generator().manual_seed(1)), found)


def test_only_training_batches_are_augmented_and_the_runs_seed_decides():
    x, y = torch.rand(40, 3, 8, 8), torch.arange(40) % 10
    batches = Batches(Splits((x, y), (x, y), (x, y)), 20, augment=pad_crop_flip)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(torch.cat([images for images, _ in batches.train_dataloader()]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(torch.equal(next(iter(loader))[0], x) for loader in batches.val_dataloader())
    plain = Batches(Splits((x, y), (x, y), (x, y)), 40)
    assert torch.equal(next(iter(plain.train_dataloader()))[0].sort(0)[0], x.sort(0)[0])


def test_normalization_is_per_channel_of_the_training_images_or_per_image():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(n, 3, 8, 8, generator=generator) * 2 + 1 for n in (30, 5))
    y = torch.zeros(30, dtype=torch.long)
    splits = Splits((train, y), (test, y[:5]), (test, y[:5]))
    channels = per_channel(splits)
    for c in range(3):
        mean, std = train[:, c].mean(), train[:, c].std()
        assert torch.allclose(channels.train[0][:, c], (train[:, c] - mean) / std, atol=1e-5)
        assert torch.allclose(channels.test[0][:, c], (test[:, c] - mean) / std, atol=1e-5)
    test[0] = 0.5  # one colour
    images = per_image(Splits((train, y), (test, y[:5]), (test, y[:5]))).test[0]
    assert not images[0].any()
    assert images[1:].mean((1, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(images[1:].std((1, 2, 3), correction=0), torch.ones(4), atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz file of twelve images a split, so that nothing depends on data that may be absent."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    pixels = {
        f"x_{s}": generator.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8) for s in ("train", "test")
    }
    np.savez(path, **pixels, y_train=np.arange(24) % 10, y_test=np.arange(24) % 10)
    return path


RUNS = [(f"conv{n}_cifar10", "ticket", {}) for n in (2, 4, 6)]
RUNS += [("resnet20_cifar10", "ticket", {}), ("vgg16_cifar10", "ticket", {"model.width": 8})]
RUNS += [("renda_resnet20", kind, {}) for kind in ("fine_tune", "weight_rewinding", "lr_rewinding")]
RATES = {  # learning rates of the last two steps of the last round of four steps, milestones after 2 and 3
    ("resnet20_cifar10", "ticket"): [0.01, 0.001],
    ("renda_resnet20", "fine_tune"): [0.001, 0.001],
    ("renda_resnet20", "weight_rewinding"): [0.01, 0.001],
    ("renda_resnet20", "lr_rewinding"): [0.01, 0.001],
}


@pytest.mark.parametrize(("name", "kind", "options"), RUNS)
def test_every_papers_experiment_runs_from_end_to_end(name, kind, options, images, tmp_path, monkeypatch):
    tiny = [f"runs={tmp_path}", "data=npz", f"data.path={images}", "data.validation=12", "batch_size=6"]
    tiny += [
        "rounds=1",
        "steps_per_round=4",
        "evaluate_every=2",
        "progress=false",
        "checkpoint_every_n_epochs=99",
    ]
    if "conv" not in name:
        tiny += ["task.scheduler.milestones=[2,3]", "rewind_step=1"]
        tiny += ["rewind.to_step=1"] if kind == "ticket" else []
    rates = []

    from lightning_prune.study.tasks import Classification

    original = Classification.training_step

    def watched(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", watched)
    options = [f"{key}={value}" for key, value in options.items()]
    folder = run(composed(f"experiment={name}", f"kind={kind}", *tiny, *options))
    first, last = read(folder / "records.jsonl")[0]
    assert (first["round"], first["alive"]) == (0, first["total"])
    assert 0.79 < last["alive"] / last["total"] < 0.83
    assert ("net.out.weight" in last["layers"]) == (
        name in ("resnet20_cifar10", *[f"conv{n}_cifar10" for n in (2, 4, 6)])
    )
    shortened = kind == "weight_rewinding" or name in ("resnet20_cifar10", "vgg16_cifar10")
    assert len(rates) == (7 if shortened else 8)
    # at the end of the round too, which evaluate_every=2 does not come to
    assert last["curve"]["step"] == ([2, 3] if shortened else [2, 4])
    assert rates[-2:] == pytest.approx(RATES.get((name, kind), rates[-2:]))
    if "conv" in name:
        assert set(rates) == {2e-4 if name == "conv2_cifar10" else 3e-4}


def test_a_study_of_rates_has_a_folder_for_each_and_halves_the_output_layers(tmp_path):
    cfg = composed("experiment=lenet_mnist_rates", "kind=rate", "rate=0.4")
    assert cfg.kind == "rate-0.4"
    rates = {pattern: schedule.rate for pattern, schedule in instantiate(cfg.pruner).schedule.items()}
    assert rates == {"*out.weight": 0.2, "*": 0.4}
    assert instantiate(cfg.pruner).max_sparsity == 0.99


def test_lenets_studies_run_from_the_tickets_of_its_experiments(images, tmp_path):
    tiny = [f"runs={tmp_path}", "data=npz", f"data.path={images}", "data.validation=12", "batch_size=6"]
    tiny += ["steps_per_round=4", "evaluate_every=2", "progress=false", "checkpoint_every_n_epochs=99"]
    tiny += ["+model.inputs=3072"]

    def found(*overrides):
        return read(run(composed(*overrides, *tiny)) / "records.jsonl")[0]

    ticket = found("experiment=lenet_mnist", "rounds=2")
    one_shot = found("experiment=lenet_mnist_one_shot", "kind=one_shot", "rounds=2")
    assert [(r["round"], r["alive"]) for r in one_shot] == [(r["round"], r["alive"]) for r in ticket]
    assert one_shot[0]["metrics"] == ticket[0]["metrics"]

    rates = found("experiment=lenet_mnist_rates", "kind=rate", "rate=0.8")
    kept = [r["layers"]["net.fc1.weight"] for r in rates]
    assert kept == pytest.approx([0.2**round for round in range(len(rates))], rel=0.01)
    assert [r["layers"]["net.out.weight"] for r in rates][:2] == [1.0, 0.6]
    left = [r["alive"] / r["total"] for r in rates]
    assert left[-1] >= 0.01 > left[-1] * 0.21  # a further round would leave fewer than 1 %

    found("experiment=lenet_mnist_controls", "rounds=2")
    pairs = found("experiment=lmc_lenet", "rounds=2", "controls_at=[0,2]")
    assert [(r["round"], len(r["path"]["alpha"])) for r in pairs] == [(0, 30), (2, 30)]
