"""Keys of a command that nothing of the run reads have no effect, and that is said."""

import logging
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from lightning_prune.study import reading
from lightning_prune.study.configs import flattened
from lightning_prune.study.densities import longer
from lightning_prune.study.names import FREE, GROWTH, PLACED
from lightning_prune.study.plan import Plan
from lightning_prune.study.reading import READ, unread
from lightning_prune.study.run import run
from tests.sweeping import SMALL

ROOT = Path(__file__).parents[1]
OWN = f"hydra.searchpath=[file://{ROOT}/examples/own_module/conf]"


def config(*overrides, **options):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides), **options)


def test_the_keys_that_are_taken_as_read_are_those_that_the_code_reads():
    text = "".join(path.read_text() for path in Path(reading.__file__).parent.glob("*.py"))
    named = set(re.findall(r"\bcfg\.([a-z_]+)\b(?!\()", text))
    # `criterion`, `data` and `model` are named in errors and by one kind; the sparsity stands in `growth`
    named -= {*FREE, *GROWTH, *PLACED, "criterion", "data", "model"}
    assert named == set(READ)


def changed(cfg, key):
    """The config with another value of a key."""
    other = cfg.copy()
    value = OmegaConf.select(other, key)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    OmegaConf.update(other, key, value + 1 if numeric else f"{value}-another", force_add=True)
    return other


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=mnist1d"],
        ["experiment=lenet_mnist", "schedule=geometric"],
        ["experiment=resnet20_cifar10_reduced", "rewind=none"],
        ["experiment=mnist1d", "kind=rigl"],
        ["experiment=mnist1d", "kind=granet", "model=lenet"],
        ["experiment=own", OWN, "+task.of={width: 2}", "+more={x: 3}", "+task.x=${more.x}", "+task.y=${.of}"],
    ],
)
def test_a_key_is_unread_where_no_change_of_it_changes_what_the_run_is_made_of(overrides):
    cfg = config(*overrides)

    def made(given):
        return OmegaConf.to_container(OmegaConf.masked_copy(whole(given), [k for k in READ if k in given]))

    def whole(given):
        return OmegaConf.create(OmegaConf.to_container(given, resolve=True))

    expected, leaves = made(cfg), flattened(OmegaConf.to_container(cfg))
    out = tuple(f"{key}." for key in (*FREE, *PLACED))
    keys = [k for k in leaves if k.replace(".", "").isidentifier() and not f"{k}.".startswith(out)]
    keys = [k for k in keys if not isinstance(leaves[k], str) or "${" not in leaves[k]]
    found = set(unread(cfg, [f"{key}=1" for key in keys]))
    assert found == {key for key in keys if made(changed(cfg, key)) == expected}
    assert 0 < len(found) < len(keys)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr=0.1", "model=lenet", "seed=2", "logger=csv", "kind=reinit"], []),
        (["conv_rate=0.1", "rate=0.1", "+width=3", "~optimizer.lr"], ["conv_rate", "width"]),
        (["schedule=three_rates", "conv_rate=0.1"], []),
        (["experiment=own", OWN, "optimizer=sgd", "model.hidden=3"], ["optimizer", "model.hidden"]),
        (["kind=rigl", "growth=rigl", "sparsity=0.8", "conv_rate=0.3"], ["conv_rate"]),
        (["+run.mine=1", "optimizer.lr=2"], []),
        (["run._target_=mine.main", "+width=3"], []),  # a function of one's own may read anything
    ],
)
def test_what_has_no_effect_is_named(overrides, said):
    assert unread(config(*overrides), overrides) == said


def test_a_run_and_a_plan_say_that_rounds_make_a_training_longer_whose_masks_grow(tmp_path, caplog, capsys):
    given = [*SMALL, f"runs={tmp_path}", "kind=rigl", "rounds=1", "every_n_train_steps=2"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", given, return_hydra_config=True))
    try:
        cfg = config(*given)
        with caplog.at_level(logging.WARNING):
            folder = run(cfg)
        plan = Plan()
        plan.add(cfg, folder, "finished", [], longer(cfg))
    finally:
        HydraConfig.instance().cfg = None
    plan.show(Console(width=200))
    said = (
        f"rounds=1: masks of kind=rigl grow in one training, as long as 2 rounds ({2 * cfg.steps_per_round} "
        "steps). For one as long as a round leave rounds out."
    )
    assert said in capsys.readouterr().out
    assert [r.message for r in caplog.records if "as long as" in r.message] == [said]
    assert torch.load(folder / "final.ckpt", weights_only=True)["global_step"] == 2 * cfg.steps_per_round
    for others in (["kind=rigl"], ["kind=rigl", "rounds=0"], ["kind=rigl-5x"], ["kind=ticket", "rounds=1"]):
        assert longer(config("experiment=mnist1d", *others), others) is None


LONG = (
    "refused: granularity=lightning_prune.granularity.NM: kind=rigl is made by none. Leave that option out."
)


@pytest.mark.parametrize("width", [30, 60, 80, 100, 140])
def test_a_plan_can_be_read_at_any_width(width, capsys):
    plan = Plan()
    plan.rows = [
        ("mnist1d/ticket-1", "new", "5 of 5", "14 (0.03%)", "12.3 MB", "1 h 13 min"),
        ("mnist1d/rigl-1,note=[b],s=0.75", "interrupted", "3 of 4", "12500 (25.00%)", "112.3 MB", "3 min"),
        ("mnist1d/rigl-1,granularity=nm", LONG, "0", "", "", ""),
    ]
    plan.show(Console(width=width))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert "\u2026" not in shown  # nothing is cut off
    said = " ".join(shown.split())
    assert f"mnist1d/rigl-1,granularity=nm: {LONG}" in said or width == 30
    assert ("\u2503" in said) == (width >= 100)  # a table
    if width < 100:
        lines = [line.strip() for line in shown.splitlines()]
        assert {name for name, *_ in plan.rows} <= {*lines} or width == 30
        assert "interrupted, rounds to train: 3 of 4, weights left: 12500 (25.00%), 112.3 MB, 3 min" in said
    else:
        (line,) = (line for line in shown.splitlines() if "interrupted" in line)
        cells = [cell.strip() for cell in line.split("\u2502")[2:-1]]
        assert cells == ["interrupted", "3 of 4", "12500 (25.00%)", "112.3 MB", "3 min"]


def test_a_run_and_a_plan_say_what_has_no_effect(tmp_path, caplog, capsys):
    given = [*SMALL, "rounds=0", f"runs={tmp_path}", "conv_rate=0.3", "rate=0.1"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", given, return_hydra_config=True))
    try:
        cfg, plan = config(*given), Plan()
        for seed in (1, 2):
            plan.add(cfg, tmp_path / "mnist1d" / f"ticket-{seed}", "finished", unread(config(*given)))
        with caplog.at_level(logging.WARNING):
            run(config(*given))
    finally:
        HydraConfig.instance().cfg = None
    plan.show()
    said = " ".join(capsys.readouterr().out.split())
    assert "conv_rate: nothing of mnist1d/ticket-1 and 1 more reads it, so that it has no effect." in said
    assert [r.message for r in caplog.records if "no effect" in r.message] == [
        "conv_rate: nothing of this run reads it, so that it has no effect. Leave it out."
    ]
    assert said.count("no effect") == 1
