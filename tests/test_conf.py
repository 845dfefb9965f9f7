"""Every config composes, and what it names comes out of the right type."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

import lightning_prune as lp
from lightning_prune.study import run as entry  # noqa: F401  whose resolvers the configs use
from lightning_prune.study.configs import CONF

EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
OTHERS = [
    "channels_resnet20",
    "efficientnet_oneshot",
    "minilm_oneshot",
    "smollm2_oneshot",
]  # run something else than a training, so they have no controls


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize("kind", ["ticket", "reinit"])
@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - {*OTHERS}))
def test_every_experiment_composes_and_its_parts_instantiate(experiment, kind):
    cfg = composed(f"experiment={experiment}", f"kind={kind}", "seed=3")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    run = {"ticket": "training", "reinit": "controls"}[kind]
    run = "connectivity" if experiment.startswith("lmc_") and kind == "ticket" else run
    assert cfg.run._target_ == f"lightning_prune.study.{run}.train"
    pruner = instantiate(cfg.pruner)
    assert isinstance(pruner, lp.IterativeMagnitudePruning)
    assert pruner.rounds == cfg.rounds
    schedules = pruner.schedule.values() if isinstance(pruner.schedule, dict) else [pruner.schedule]
    assert all(type(schedule).__module__ == "lightning_prune.schedules" for schedule in schedules)
    assert cfg.kind == kind
    assert isinstance(instantiate(cfg.task), LightningModule)
    if cfg.rewind:
        assert isinstance(instantiate(cfg.rewind), lp.LotteryTicketRewind)
    assert instantiate(cfg.claims, _convert_="all") is not None


@pytest.mark.parametrize("experiment", OTHERS)
def test_what_is_no_training_composes_and_instantiates(experiment):
    cfg = composed(f"experiment={experiment}", "seed=3")
    assert callable(instantiate(cfg.run))
    assert cfg.name == experiment
    parts = {"figures": cfg.figures, "claims": cfg.claims, "tables": cfg.tables, "run": cfg.run}
    OmegaConf.to_container(OmegaConf.create(parts), resolve=True, throw_on_missing=True)
    assert all(callable(figure) for figure in instantiate(cfg.figures, _convert_="all"))


@pytest.mark.parametrize(
    ("group", "name"),
    [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name != "experiment"],
)
def test_every_choice_of_every_group_composes(group, name):
    assert group in composed(f"{group}={name}")


POLICIES = {"weights", "learning_rate", "fine_tune", "early_bird"}


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "rewind").glob("*.yaml")))
def test_every_rewind_is_one_changed_line_of_an_experiment(name):
    k = {"step": ["rewind.to_step=3"], "epoch": ["rewind.to_epoch=1"], "rewind_step": ["rewind_step=9"]}
    k = k.get(name, [])
    cfg = composed("experiment=lenet_mnist_short", f"rewind={name}", *k)
    if name == "none":
        assert not cfg.rewind
        return
    rewinder = instantiate(cfg.rewind)
    policy = {"early_bird": "nothing"}.get(name, name if name in POLICIES else "everything")
    assert rewinder.policy is getattr(lp.rewind, policy)
    assert rewinder.until == (lp.rewind.EarlyBird() if name == "early_bird" else None)
    assert (rewinder.to_step, rewinder.to_epoch) == {
        "step": (3, None),
        "epoch": (0, 1),
        "step_2": (2, None),
        "step_500": (500, None),
        "step_1000": (1000, None),
        "rewind_step": (9, None),
    }.get(name, (0, None))


@pytest.mark.parametrize("kind", sorted(p.stem for p in (CONF / "kind").glob("*.yaml")))
def test_every_kind_is_one_changed_line_of_an_experiment_and_names_itself(kind):
    cfg = composed("experiment=lenet_mnist_controls", f"kind={kind}")
    assert cfg.kind == (f"rate-{cfg.rate}" if kind == "rate" else kind)
    assert callable(instantiate(cfg.run))
    assert (cfg.controls_at is None) == (kind == "reinit")  # the others at five densities


def test_the_trainer_instantiates():
    assert isinstance(instantiate(composed().trainer, max_steps=3, logger=False), Trainer)


def test_an_unknown_name_is_told_apart_by_hydra():
    with pytest.raises(MissingConfigException, match="lenet_mnist_short"):
        composed("experiment=lenet_mnst")


def test_optimizers_are_fused():
    for name in ("adam", "sgd"):
        make = instantiate(composed(f"optimizer={name}").optimizer)
        assert make([torch.nn.Parameter(torch.zeros(1))]).defaults["fused"]
