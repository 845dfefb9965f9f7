"""The callbacks are built from YAML alone: by their type hints (LightningCLI) and by `_target_` (Hydra)."""

import inspect

import pytest
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import lightning_prune as lp

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


def test_from_hydras_target():
    check(instantiate(OmegaConf.create(BY_TARGET)))


def test_without_convert_hydra_hands_over_no_schedules_and_the_error_says_so():
    cfg = OmegaConf.create(BY_TARGET)
    del cfg["_convert_"]
    with pytest.raises(Exception, match="_convert_: all"):
        instantiate(cfg)
