"""The callbacks are built from YAML alone: by their type hints (LightningCLI) and by `_target_` (Hydra)."""

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf

import lightning_prune as lp
from tests.naming import in_words
from tests.networks import Net

BY_HINTS = """
callbacks:
- class_path: lightning_prune.IterativeMagnitudePruning
  init_args:
    schedule:
      "*head*": {class_path: lightning_prune.schedules.Geometric, init_args: {rate: 0.1}}
      "*": {class_path: lightning_prune.schedules.OneShot}
    criterion: {class_path: lightning_prune.criteria.Random, init_args: {seed: 3}}
    allocate: lightning_prune.allocation.uniform
    granularity: {class_path: lightning_prune.granularity.NM}
    include: ["body*", "head*"]
    stop_below: {val_acc: 0.5}
    every_n_train_steps: 5
- class_path: lightning_prune.LotteryTicketRewind
  init_args:
    to_epoch: 4
    policy: lightning_prune.rewind.learning_rate
    until: {class_path: lightning_prune.rewind.EarlyBird, init_args: {distance: 0.2}}
"""

BY_TARGET = """
_target_: lightning_prune.IterativeMagnitudePruning
_convert_: all
schedule:
  "*head*": {_target_: lightning_prune.schedules.Geometric, rate: 0.1}
  "*": {_target_: lightning_prune.schedules.OneShot}
criterion: {_target_: lightning_prune.criteria.Random, seed: 3}
allocate: {_target_: hydra.utils.get_method, path: lightning_prune.allocation.uniform}
granularity: {_target_: lightning_prune.granularity.NM}
include: ["body*", "head*"]
stop_below: {val_acc: 0.5}
every_n_train_steps: 5
"""


def check(pruner):
    assert pruner.schedule == {"*head*": lp.schedules.Geometric(0.1), "*": lp.schedules.OneShot()}
    assert pruner.criterion == lp.criteria.Random(3)
    assert pruner.allocate is lp.allocation.uniform
    assert pruner.granularity == lp.granularity.NM()
    assert pruner.include == ["body*", "head*"]
    assert pruner.stop_below == {"val_acc": 0.5}
    assert pruner.every_n_train_steps == 5


def given(callback):
    """The arguments that a callback keeps, by name: those of its own and of what it inherits."""
    names = {n for c in type(callback).__mro__ for n in inspect.signature(c.__init__).parameters}
    return {name: value for name, value in vars(callback).items() if name in names}


OTHERS = """
callbacks:
- class_path: lightning_prune.DynamicSparseTraining
  init_args:
    sparsity: {class_path: lightning_prune.schedules.Cubic, init_args: {sparsity: 0.9, rounds: 3}}
    criterion: {class_path: lightning_prune.criteria.Random}
    allocate: {class_path: lightning_prune.allocation.AtLeast, init_args: {n: 2}}
    every_n_train_steps: 3
- class_path: lightning_prune.StructuredChannelPruning
  init_args:
    schedule: {class_path: lightning_prune.schedules.OneShot, init_args: {sparsity: 0.4}}
    criterion: lightning_prune.filters.geometric_median
"""


ONE_SCHEDULE = BY_HINTS.replace(
    """
      "*head*": {class_path: lightning_prune.schedules.Geometric, init_args: {rate: 0.1}}
      "*": {class_path: lightning_prune.schedules.OneShot}""",
    " {class_path: lightning_prune.schedules.Geometric, init_args: {rate: 0.1}}",
)


def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--callbacks", type=list[Callback])
    return made


def by_hints(text):
    made = parser()
    return made.instantiate(made.parse_string(text)).callbacks


def test_from_type_hints():
    pruner, rewind = by_hints(BY_HINTS)
    check(pruner)
    assert rewind.to_epoch == 4
    assert rewind.policy is lp.rewind.learning_rate
    assert rewind.until == lp.rewind.EarlyBird(0.2)


def test_from_type_hints_with_no_arguments():
    (pruner,) = by_hints("callbacks: [{class_path: lightning_prune.IterativeMagnitudePruning}]")
    assert pruner.schedule == lp.schedules.Geometric(0.2)


# Not of a schedule for each of several patterns: what jsonargparse writes of one it cannot read (4.53).
@pytest.mark.parametrize("text", [ONE_SCHEDULE, OTHERS], ids=["pruning", "others"])
def test_what_a_command_line_writes_down_reads_back_as_the_same(text):
    written = parser().dump(parser().parse_string(text))
    assert parser().dump(parser().parse_string(written)) == written
    for first, again in zip(by_hints(text), by_hints(written), strict=True):
        assert given(first) == given(again)


def of(path, **init_args):
    return {"class_path": f"lightning_prune.{path}", **({"init_args": init_args} if init_args else {})}


WRITTEN = [  # (callback, argument, value), for each class that an argument may be an instance of
    ("DynamicSparseTraining", "granularity", of("growth.FanIn", ablate=0.2)),
    ("DynamicSparseTraining", "granularity", "lightning_prune.granularity.single"),
    ("DynamicSparseTraining", "sparsity", of("schedules.Alternating", sparsity=0.8)),
    ("DynamicSparseTraining", "sparsity", 0.8),
    ("DynamicSparseTraining", "fraction", of("schedules.CosineDecay", initial=0.2)),
    ("DynamicSparseTraining", "fraction", 0.2),
    ("DynamicSparseTraining", "grow", of("criteria.Random", seed=2)),
    ("IterativeMagnitudePruning", "granularity", of("granularity.NM", n=1, m=4)),
    ("IterativeMagnitudePruning", "granularity", of("granularity.Block", rows=2, columns=2)),
    ("IterativeMagnitudePruning", "granularity", of("granularity.Kernel", n=2)),
    ("IterativeMagnitudePruning", "granularity", of("granularity.Filter", dim=1)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Geometric", to=0.9)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.OneShot", sparsity=0.4)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.TopK", count=5)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Amounts", amount=of("schedules.OneShot"))),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Linear", rounds=3)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Cubic", rounds=3)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.OneCycle", rounds=3)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Explicit", sparsities=[0.1, 0.2])),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Hold")),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Threshold", theta=0.1)),
    ("IterativeMagnitudePruning", "schedule", of("schedules.Bucket", beta=2.0)),
    ("IterativeMagnitudePruning", "criterion", of("criteria.Ln", n=1)),
    ("IterativeMagnitudePruning", "criterion", of("criteria.GraSP")),
    ("IterativeMagnitudePruning", "criterion", of("criteria.SynFlow", rounds=5, input_shape=[1, 8])),
    (
        "IterativeMagnitudePruning",
        "allocate",
        of("allocation.EvenOutputs", of="lightning_prune.allocation.erk"),
    ),
    ("IterativeMagnitudePruning", "allocate", of("allocation.AtLeast", of=of("allocation.OWL", lam=0.1))),
    ("IterativeMagnitudePruning", "allocate", of("allocation.PerLayer", densities={"a*": 0.5})),
    ("LotteryTicketRewind", "until", of("rewind.EarlyBird", distance=0.2)),
    ("StructuredChannelPruning", "criterion", of("filters.RandomChannels", seed=3)),
    ("StructuredChannelPruning", "schedule", of("filters.Removed", schedule=0.5, of="multiply_adds")),
    ("StructuredChannelPruning", "schedule", of("filters.Removed", schedule=of("schedules.Linear"))),
    ("StructuredChannelPruning", "schedule", of("filters.Smaller", bytes=5000)),
    ("StructuredChannelPruning", "schedule", of("filters.Faster", times=2.0)),
]
ROOMS = (lp.allocation, lp.criteria, lp.filters, lp.granularity, lp.growth, lp.rewind, lp.schedules)
NO_ARGUMENT = {"Snapshot", "Coupling", "Layout", "SparseGPT"}  # of a callback


def cli(config):
    return LightningCLI(BoringModel, run=False, args=config, save_config_callback=None)


@pytest.mark.filterwarnings("ignore")  # Lightning's: the process of the tests, what jsonargparse deprecates
@pytest.mark.parametrize(("callback", "argument", "value"), WRITTEN, ids=in_words)
def test_the_config_that_lightning_writes_reads_back_as_the_same(callback, argument, value, tmp_path):
    """As its `SaveConfigCallback` writes it."""
    callbacks = [of(callback, **{argument: value})]
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    first = cli({"trainer": {**quiet, "callbacks": callbacks}})
    first.parser.save(first.config, tmp_path / "config.yaml", skip_none=False)
    again = cli(["--config", str(tmp_path / "config.yaml")])
    one, other = (given(run.trainer.callbacks[0]) for run in (first, again))
    assert one == other
    if isinstance(value, dict):
        kept = "target" if argument == "sparsity" else argument
        made = [getattr(run.trainer.callbacks[0], kept) for run in (first, again)]
        assert [type(instance).__name__ for instance in made] == [value["class_path"].split(".")[-1]] * 2
        assert made[0] == made[1]


@pytest.mark.filterwarnings("ignore")
def test_masks_grow_from_the_yaml_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "growth.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = yaml.safe_load(text.replace("every_n_train_steps: 100", "every_n_train_steps: 2"))
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 4}
    trainer = cli({"trainer": {**quiet, **config["trainer"]}}).trainer
    trainer.fit(Net())
    pruner = trainer.callbacks[0]
    assert (pruner.round, pruner.sparsity) == (4, 0.9)
    assert pruner.granularity == lp.growth.FanIn(0.3)
    assert pruner.fraction == lp.schedules.CosineDecay(0.3)


def test_each_class_that_an_argument_may_be_an_instance_of_is_written_and_read():
    classes = {
        name
        for room in ROOMS
        for name, kind in vars(room).items()
        if is_dataclass(kind) and isinstance(kind, type)
    }
    named = {name for name in classes for *_, value in WRITTEN if f".{name}'" in str(value)}
    assert classes - named == NO_ARGUMENT


def test_from_hydras_target():
    check(instantiate(OmegaConf.create(BY_TARGET)))


def test_without_convert_hydra_hands_over_no_schedules_and_the_error_says_so():
    cfg = OmegaConf.create(BY_TARGET)
    del cfg["_convert_"]
    with pytest.raises(Exception, match="_convert_: all"):
        instantiate(cfg)
