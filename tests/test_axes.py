"""Axes are free: an option chosen on the command line wins whole, with every experiment, or is refused."""

import random
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lightning_prune.callbacks.checkpoints import load_masks
from lightning_prune.callbacks.growing import DynamicSparseTraining
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.study import configs, training
from lightning_prune.study.densities import at, steps_of
from lightning_prune.study.records import read
from lightning_prune.study.report import report
from lightning_prune.study.round_masks import masks_of
from lightning_prune.study.run import check, folder_of, run
from tests.networks import same

CONF = configs.CONF
AXES = ("model", "data", "optimizer", "logger", "schedule", "criterion", "allocation", "granularity")
AXES += ("rewind", "growth", "task", "batches")
OPTIONS = {axis: sorted(path.stem for path in (CONF / axis).glob("*.yaml")) for axis in AXES}
OPTIONS |= {axis: sorted(path.stem for path in (CONF / axis).glob("*.yaml")) for axis in ("kind", "trainer")}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GRID = [(e, axis, option) for e in EXPERIMENTS for axis, options in OPTIONS.items() for option in options]
# What these options leave open, and a command has to say.
OPEN = {"rewind=step": "rewind.to_step", "rewind=epoch": "rewind.to_epoch", "data=npz": "data.path"}
LONGER = {f"{kind}-{length}" for kind in ("rigl", "static") for length in ("5x", "equal")}
GROWN = ({*OPTIONS["growth"]} & {*OPTIONS["kind"]}) | LONGER
REMEDY = r"[Gg]ive|[Nn]ame some|[Aa]llowed|[Cc]hoose|[Ll]eave"


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@cache
def alone(axis, option):
    """An option without any experiment."""
    return OmegaConf.to_container(composed("experiment=mnist1d", f"{axis}={option}"))[axis]


def refusal(act):
    """What a ValueError says, which names a key and what to do; None where there is none."""
    try:
        act()
    except ValueError as error:
        said = str(error)
    else:
        return None
    assert re.search(REMEDY, said), said
    assert re.search(r"\w+[=:]", said), said
    return said


def sampled(grid, n, seed=0):
    return random.Random(seed).sample(grid, n)


# ----------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("group", ["experiment", "kind"])
def test_no_experiment_and_no_kind_writes_into_an_option_that_another_may_replace(group):
    """What one sets for its own option would be merged into the option of the command line."""
    for path in (CONF / group).glob("*.yaml"):
        assert not {*AXES} & {*yaml.safe_load(path.read_text())}, path


def composes(experiment, axis, option):
    """Compose and build; what is left open is refused and named."""
    choice = f"{axis}={option}"
    cfg = composed(f"experiment={experiment}", choice)
    if axis in AXES:
        assert OmegaConf.to_container(cfg)[axis] == alone(axis, option)  # it wins whole
    if choice in OPEN:
        with pytest.raises(ValueError, match=f"{OPEN[choice]}: .*Give it a value: {OPEN[choice]}=..."):
            check(cfg)
        return
    if refusal(lambda: check(cfg)) or cfg.kinds is not None:  # no training in rounds
        return
    kind = DynamicSparseTraining if axis == "kind" and option in GROWN else IterativeMagnitudePruning
    assert isinstance(instantiate(cfg.pruner), kind)
    instantiate(cfg.optimizer)
    if cfg.rewind:
        instantiate(cfg.rewind)


@pytest.mark.parametrize(("experiment", "axis", "option"), sampled(GRID, 25))
def test_an_option_wins_whole_over_what_an_experiment_sets(experiment, axis, option):
    composes(experiment, axis, option)


TURNS = range(max(map(len, OPTIONS.values())))

# At every push a third of the turns of each experiment, and others of the next one.
THIRDS = [
    pytest.param(experiment, first, marks=[] if first == n % 3 else pytest.mark.slow)
    for n, experiment in enumerate(EXPERIMENTS)
    for first in range(3)
]


@pytest.mark.parametrize(("experiment", "first"), THIRDS)
def test_the_grid_composes(experiment, first):
    """Options of all axes at once, until each of every axis has had its turn."""
    for turn in TURNS[first::3]:
        choice = {axis: options[turn % len(options)] for axis, options in OPTIONS.items()}
        cfg = composed(f"experiment={experiment}", *(f"{axis}={option}" for axis, option in choice.items()))
        for axis in AXES:
            assert OmegaConf.to_container(cfg[axis]) == alone(axis, choice[axis])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_option_wins_whole_over_what_every_experiment_sets(experiment):
    for other, axis, option in GRID:
        if other == experiment:
            composes(experiment, axis, option)


def test_what_used_to_be_merged_is_not():
    late = composed("experiment=resnet20_cifar10", "rewind=initialization")
    assert late.rewind.to_step == 0
    assert "shorten" not in late.rewind
    assert composed("experiment=lenet_mnist", "optimizer=sgd").optimizer.lr == 0.1
    assert composed("experiment=conv2_cifar10", "schedule=cubic").schedule._target_.endswith("Cubic")
    assert "init" not in composed("experiment=resnet20_cifar10", "model=lenet").model
    assert composed("experiment=resnet20_cifar10", "rewind.to_step=7").rewind == {
        **composed("experiment=resnet20_cifar10").rewind,
        "to_step": 7,
    }


# -------------------------------------------------------------------------------------------- training


# The others are no trainings in rounds.
TRAINS = [
    e for e in EXPERIMENTS if "kinds" not in yaml.safe_load((CONF / "experiment" / f"{e}.yaml").read_text())
]
SHORT = ["steps_per_round=6", "evaluate_every=6", "batch_size=8", "checkpoint_every_n_epochs=1", "rate=0.5"]
SHORT += ["progress=false", "claims=[]", "figures=[]", "oneshot={}", "controls_at=null", "rewind_step=1"]
TRAINED = [
    (e, axis, option)
    for e, axis, option in GRID
    if e in TRAINS and axis not in ("data", "logger", "trainer", "growth") and f"{axis}={option}" not in OPEN
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files that stand for MNIST and CIFAR-10, 40 examples each."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("cifar10", (3, 32, 32))):
        parts = (("train", 48), ("test", 10))
        arrays = {f"x_{part}": draw.integers(0, 256, (n, *shape), np.uint8) for part, n in parts}
        arrays |= {f"y_{part}": np.arange(n) % 10 for part, n in parts}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def trains(experiment, axis, option, folder, images):
    """Train the experiment with the option for two prunings, and a control from its ticket."""
    cfg = composed(f"experiment={experiment}", f"{axis}={option}")
    words = [f"experiment={experiment}", f"rounds={min(cfg.rounds, 2)}", f"runs={folder}", *SHORT]
    if not cfg.data._target_.endswith("mnist1d"):
        like = "mnist" if cfg.data._target_.endswith("mnist") else "cifar10"
        words += ["data=npz", f"data.path={images}/{like}.npz", "data.validation=8"]
    if cfg.rewind and cfg.rewind.get("to_step"):
        words += ["rewind.to_step=1"]
    words += ["every_n_train_steps=2"] if option in GROWN else []
    words += [] if axis == "kind" else [f"{axis}={option}"]
    kind = option if axis == "kind" else "ticket"

    def made():
        if cfg.after:
            check(composed(*words, f"kind={kind}"))
            run(composed(*words, "kind=ticket"))
        run(composed(*words, f"kind={kind}"))

    if refusal(made):
        return False
    found, ticket = (folder_of(composed(*words, f"kind={kind}")) for kind in (kind, "ticket"))
    rows = read(found / "records.jsonl")[0]
    if option in GROWN:
        asked_for = {k: s for k, s in enumerate(cfg.sparsities or [cfg.sparsity]) if s}
        assert {r["round"]: r["alive"] for r in rows} == {
            k: round((1 - s) * rows[0]["total"]) for k, s in asked_for.items()
        }
        assert cfg.sparsity == 0.9
    else:
        assert [r["round"] for r in rows] == list(range(min(cfg.rounds, 2) + 1))
    assert all(0 < a["alive"] >= b["alive"] for a, b in pairwise(rows))
    if cfg.after:
        sizes = [r["alive"] for r in read(ticket / "records.jsonl")[0]]
        near = 0.05 if kind == "small_dense" else 0  # whole channels, or neurons
        assert [r["alive"] for r in rows] == pytest.approx(sizes, rel=near)
    return True


@pytest.mark.filterwarnings("ignore")  # of what short trainings of unusual pairs do
@pytest.mark.parametrize(("experiment", "axis", "option"), sampled(TRAINED, 4, seed=3))
def test_an_experiment_trains_with_an_option_or_is_refused(experiment, axis, option, tmp_path, images):
    trains(experiment, axis, option, tmp_path, images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("experiment", "axis"), sorted({(e, axis) for e, axis, _ in TRAINED}))
def test_every_experiment_trains_with_every_option_or_is_refused(experiment, axis, tmp_path, images):
    options = [option for e, a, option in TRAINED if (e, a) == (experiment, axis)]
    trained = [trains(experiment, axis, option, tmp_path / option, images) for option in options]
    assert any(trained)


@pytest.mark.parametrize(("model", "data"), [("lenet", "mnist1d"), ("resnet20", "mnist1d")])
def test_a_network_that_cannot_take_the_data_is_refused_before_training(model, data, tmp_path):
    cfg = composed("experiment=mnist1d", f"model={model}", f"data={data}", f"runs={tmp_path}", *SHORT)
    with pytest.raises(ValueError, match=r"model=.*, data=.* do not go together .* Choose those that do"):
        run(cfg)


# ---------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("kind", sorted(GROWN))
def test_a_kind_whose_masks_grow_is_one_round_of_its_sparsity(kind, tmp_path, images):
    assert trains("mnist1d", "kind", kind, tmp_path, images)
    (folder,) = (path.parent for path in tmp_path.glob(f"*/{kind}-1*/DONE"))
    (row,) = read(folder / "records.jsonl")[0]
    (masks,) = masks_of(folder).values()
    assert sum(int(mask.sum()) for mask in masks.values()) == row["alive"] == 0.1 * row["total"]
    assert same(load_masks(folder / "final.ckpt"), masks)  # a second training may start from them
    state = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
    assert not any(bool(state[name][~mask].any()) for name, mask in masks.items())
    report(folder.parent, out=tmp_path / "out")
    assert "| 0 | 10.00% | " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=abc"], r"seed='?abc'?: allowed are whole numbers from 0 on"),
        (["batch_size=0"], r"batch_size=0: allowed are whole numbers from 1 on"),
        (["steps_per_round=0.5"], r"steps_per_round=0\.5: allowed are whole numbers from 1 on"),
        (["growth=set"], r"growth=.*: kind=ticket is made by no growth, .* give kind=rigl"),
        (["kind=rigl", "criterion=movement"], r"criterion=.*movement: kind=rigl is made by no criterion"),
        (["kind=rigl", "rewind=weights"], r"rewind=.*: kind=rigl is made by no rewind"),
        (["sparsity=0.8"], r"sparsity=0\.8: kind=ticket prunes.* Leave it out, or give kind=rigl"),
        (["kind=rigl", "sparsity=1.5"], r"sparsity=1\.5: allowed are fractions"),
        (["kind=rigl"], r"every_n_train_steps=100: masks stay from step 4 on, .* Lower it"),
    ],
)
def test_what_does_not_go_together_or_is_no_number_is_refused_and_named(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(composed(*SHORT, f"runs={tmp_path}", *overrides))
    assert not list(tmp_path.glob("*/*/resume.ckpt"))


def test_growth_goes_on_after_a_kill_to_the_same_weights(tmp_path, monkeypatch):
    words = [*SHORT, "kind=rigl", "rounds=1", "every_n_train_steps=2", "steps_per_round=100"]
    straight = run(composed(*words, f"runs={tmp_path}/straight"))
    with monkeypatch.context() as broken:
        calls, save = [], Trainer.save_checkpoint

        def interrupted(*args, **options):
            save(*args, **options)
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt

        broken.setattr(Trainer, "save_checkpoint", interrupted)
        with pytest.raises(BaseException):  # noqa: B017, PT011  Lightning makes a SystemExit of it
            run(composed(*words, f"runs={tmp_path}/again"))
    again = run(composed(*words, f"runs={tmp_path}/again"))
    found, expected = (torch.load(f / "final.ckpt", weights_only=True) for f in (again, straight))
    assert same(found["state_dict"], expected["state_dict"])
    without = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read(f / "records.jsonl")[0]]
        for f in (again, straight)
    ]
    assert without[0] == without[1]


@pytest.mark.parametrize(("experiment", "kind"), [("dst_mnist1d", "rigl"), ("dst_lenet", "granet")])
def test_masks_grow_once_for_each_density_beside_the_rounds_of_a_ticket(experiment, kind, tmp_path, images):
    assert trains(experiment, "kind", kind, tmp_path, images)
    (folder,) = (path.parent for path in tmp_path.glob(f"*/{kind}-1*/DONE"))
    rows, masks = read(folder / "records.jsonl")[0], masks_of(folder)
    for row in rows:
        assert sum(int(mask.sum()) for mask in masks[row["round"]].values()) == row["alive"]
        assert 1 - row["sparsity"] <= row["metrics"]["explored"] <= 1
    assert not list(folder.glob("round-*"))


def test_a_training_whose_masks_grow_is_as_long_as_its_kind_says_and_so_is_its_schedule():
    steps = {"rigl": [1500] * 4, "rigl-5x": [7500] * 4, "static-equal": [7500, 15_000, 30_000, 75_000]}
    for kind, expected in steps.items():
        cfg = composed("experiment=dst_mnist1d", f"kind={kind}", "task=one_cycle")
        assert [*steps_of(cfg).values()] == expected
        assert [at(cfg, k).task.scheduler.total_steps for k in steps_of(cfg)] == expected
    assert composed("experiment=dst_mnist1d", "task=one_cycle").task.scheduler.total_steps == 1500


def test_a_density_that_was_cut_short_goes_on_and_those_before_it_are_left_alone(tmp_path, monkeypatch):
    words = [
        *SHORT,
        "experiment=dst_mnist1d",
        "kind=rigl",
        "every_n_train_steps=2",
        "sparsities=[0.0,0.5,0.8]",
    ]
    straight = run(composed(*words, f"runs={tmp_path}/straight"))
    with monkeypatch.context() as broken:
        calls, trained = [], training.train

        def interrupted(cfg, folder):
            calls.append(cfg.sparsity)
            if len(calls) == 2:
                raise KeyboardInterrupt
            trained(cfg, folder)

        broken.setattr(training, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(composed(*words, f"runs={tmp_path}/again"))
        assert calls == [0.5, 0.8]
    again = run(composed(*words, f"runs={tmp_path}/again"))
    one, other = ([{**r, "seconds": 0} for r in read(f / "records.jsonl")[0]] for f in (straight, again))
    assert one == other
    assert all(same(a, b) for a, b in zip(masks_of(straight).values(), masks_of(again).values(), strict=True))
