"""Modules and data of one's own, from a package of one's own; objectives; what a run was made with."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_prune.study import command as commands
from lightning_prune.study import provenance, report
from lightning_prune.study import run as entry
from lightning_prune.study.configs import CONF
from lightning_prune.study.data import Batches, Splits
from lightning_prune.study.objective import objective
from lightning_prune.study.records import read
from lightning_prune.study.run import folder_of, run

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_module"
SHORT = ["rounds=1", "steps_per_round=8", "evaluate_every=4", "progress=false"]
SEARCHED = ["rounds=3", "steps_per_round=8", "evaluate_every=4", "hydra.sweeper.n_trials=4"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Compose with the configs of the example, in a folder that knows nothing of this repository."""
    monkeypatch.syspath_prepend(str(EXAMPLE))

    def composed(*overrides):
        searched = f"hydra.searchpath=[file://{EXAMPLE}/conf]"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", ["experiment=own", searched, f"runs={tmp_path}", *SHORT, *overrides])

    yield composed
    sys.modules.pop("own_module", None)


def test_a_module_and_data_of_ones_own_leave_no_keys_over(own):
    cfg = own()
    assert OmegaConf.to_container(cfg.task, resolve=True) == {"_target_": "own_module.Regression", "lr": 0.05}
    assert OmegaConf.to_container(cfg.batches, resolve=True) == {
        "_target_": "own_module.Waves",
        "batch_size": 32,
    }


def test_they_train_with_controls_and_a_metric_of_any_name_decides_and_is_reported(own, tmp_path):
    folder = run(own())
    run(own("kind=reinit"))
    rows = read(folder / "records.jsonl")[0]
    assert [r["round"] for r in rows] == [0, 1]
    for r in rows:
        assert set(r["metrics"]) >= {"val/error", "early_stop_step", "val/error_at_early_stop"}
        best = min(r["curve"]["val/error"])
        assert r["metrics"]["val/error_at_early_stop"] == pytest.approx(best, rel=1e-5)
    report.report(folder.parent, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Validation error" in text
    assert "re-initialised" in text
    assert (tmp_path / "out" / "figure.png").is_file()


def test_a_metric_that_is_not_logged_is_refused_before_training(own, tmp_path):
    with pytest.raises(
        ValueError, match=r"monitor=val_loss: no evaluation logs it\. Allowed is .* val/error\."
    ):
        run(own("monitor=val_loss"))
    assert not (tmp_path / "own" / "ticket-1" / "resume.ckpt").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threads=0", "threads=0: allowed are whole numbers from 1 on"),
        ("checkpoint_every_n_epochs=0", "checkpoint_every_n_epochs=0: allowed are whole numbers from 1 on"),
        ("task.lr=abc", "task.lr='abc': allowed are numbers from 0 on"),
        ("objective_at=2", "objective_at=2: allowed are fractions of the weights"),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_key_before_the_training(option, message, own, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(own(option))
    assert not list(tmp_path.rglob("config.yaml"))


# ------------------------------------------------------------------------------------------- objectives


def test_an_objective_is_a_metric_of_the_last_round_or_at_a_fraction_of_weights(tmp_path):
    rows = [
        {"round": r, "kind": "ticket", "alive": alive, "total": 100, "metrics": {"test_acc": acc}}
        for r, alive, acc in ((0, 100, 0.9), (1, 50, 0.8), (2, 25, 0.7))
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def goal(metric, at=None):
        return objective(OmegaConf.create({"objective": metric, "objective_at": at}), tmp_path)

    assert goal(None) is None
    assert goal("test_acc") == 0.7
    assert goal("test_acc", 0.45) == 0.8
    with pytest.raises(ValueError, match=r"objective=acc: .* Allowed is one of test_acc"):
        goal("acc")


def test_an_objective_that_no_record_will_have_is_refused_before_training(own, tmp_path):
    message = (
        r"objective=nope: no record will have it\. Allowed is one of censored, .* val/error_at_early_stop"
    )
    with pytest.raises(ValueError, match=message):
        run(own("objective=nope"))
    assert not list(tmp_path.rglob("records.jsonl"))


def command(folder, *arguments, **environment):
    """`lightning-prune` with these arguments, in a process and a folder of its own."""
    code = "from lightning_prune.study.command import main; main()"
    path = os.pathsep.join([str(ROOT), str(EXAMPLE)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_entry_returns_the_objective_also_of_a_run_that_is_finished(own):
    cfg = own("objective=val/error")
    told = entry.main.__wrapped__(cfg)
    assert told == read(folder_of(cfg) / "records.jsonl")[0][-1]["metrics"]["val/error"]
    assert entry.main.__wrapped__(cfg) == told


def test_modules_in_the_folder_of_the_command_are_found_and_what_is_missing_is_named(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "own")
    # flags anywhere
    arguments = ["run", "experiment=own", "--config-dir", str(tmp_path / "own" / "conf"), *SHORT]
    found = command(tmp_path / "own", *arguments, PYTHONPATH=str(ROOT))
    assert found.returncode == 0, found.stderr
    (records,) = tmp_path.glob("own/runs/own/ticket-1,*/records.jsonl")
    assert [r["round"] for r in read(records)[0]] == [0, 1]
    found = command(tmp_path, *arguments, PYTHONPATH=str(ROOT))
    assert found.returncode == 1
    assert "batches of own, kind=ticket: Error loading 'own_module.Waves'" in found.stderr
    assert "Give the command in the folder of that module, or PYTHONPATH=<that folder>." in found.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["kind=rigl"], None),
        (["kind=rigl-5x"], None),
        (["kind=static-uniform"], None),
        (["kind=rigl", "growth=set"], "growth=set: kind=rigl is made by rigl, and its runs are recorded"),
        (
            ["kind=static-5x", "growth=static-uniform"],
            "growth=static-uniform: kind=static-5x is made by static,",
        ),
        (["kind=ticket", "growth=rigl"], "growth=rigl: kind=ticket is made by no growth"),
    ],
)
def test_a_kind_says_how_it_grows_and_another_way_under_that_name_is_refused(given, message):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["experiment=mnist1d", *given])
        HydraConfig.instance().set_config(
            compose("config", ["experiment=mnist1d", *given], return_hydra_config=True)
        )
    try:
        with pytest.raises(ValueError, match=re.escape(message)) if message else nullcontext():
            entry.check(cfg)
    finally:
        HydraConfig.instance().cfg = None


def test_a_plan_finds_the_configs_that_a_run_finds_and_does_not_guess_what_a_sweeper_will_choose(tmp_path):
    searched = ["experiment=own", f"hydra.searchpath=[file://{EXAMPLE}/conf]", *SHORT]
    found = command(tmp_path, "plan", "--multirun", *searched, "task.lr=0.01,0.1")
    assert "2 runs: " in found.stdout, found.stderr
    assert not list(tmp_path.iterdir())
    if find_spec("hydra_plugins.hydra_optuna_sweeper"):
        found = command(
            tmp_path, "plan", "--multirun", *searched, "hydra/sweeper=optuna", "rate=interval(0.1,0.5)"
        )
        assert found.returncode == 1
        assert "hydra/sweeper: this sweeper chooses each run by what those before it gave" in found.stderr


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ([], 0, "usage: lightning-prune COMMAND"),
        (["--help"], 0, "usage: lightning-prune COMMAND"),
        (["train"], 2, "train: there is no such command"),
    ],
)
def test_unknown_commands_are_refused_and_help_is_printed(given, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-prune", *given])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("module", "does"), [("run", "run.command"), ("report", "report.main")])
def test_in_a_clone_modules_of_these_names_do_the_same(module, does, monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["-m", "a", "b"])
    monkeypatch.setattr(f"lightning_prune.study.{does}", lambda arguments=None: given.append(arguments))
    runpy.run_module(f"experiments.{module}", run_name="__main__")
    assert given in ([["a", "b"]], [None])  # None: those of the command line


@pytest.mark.skipif(
    not find_spec("hydra_plugins.hydra_optuna_sweeper"),
    reason="hydra-optuna-sweeper is not installed",
)
def test_optuna_maximizes_accuracy_over_rate_and_learning_rate(tmp_path):
    conf = str(ROOT / "examples" / "search" / "conf")
    sweep = ["--multirun", "--config-dir", conf, "experiment=search"]
    done = {}
    for trials in (2, 3):  # the same command again goes on: what is finished gives its number at once
        found = command(tmp_path, "run", *sweep, *SHORT, f"hydra.sweeper.n_trials={trials}")
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("is finished already") == len(done)
        before, done = (
            done,
            {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/search/ticket-1,*/DONE")},
        )
        assert len(done) == trials
        assert before.items() <= done.items()
    rows = [read(path.parent / "records.jsonl")[0] for path in done]
    at = [
        min(rounds, key=lambda r: abs(r["alive"] / r["total"] - 0.5))["metrics"]["test_acc"]
        for rounds in rows
    ]
    best = yaml.safe_load((tmp_path / "runs" / "search" / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(max(at))
    assert set(best["best_params"]) == {"rate", "optimizer.lr"}


# ---------------------------------------------------------------------------------------- nothing stale


def test_the_digest_of_sources_and_data_follows_what_it_depends_on(tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"task": {"_target_": "mine.net.Net"}, "optimizer": {"_target_": "torch.optim.SGD"}}

    def now():
        provenance.source.cache_clear()
        return provenance.sources(config)

    first = now()
    assert set(first) == {"mine", "torch", "lightning", "lightning_prune"}
    assert first["torch"] == torch.__version__.split("+")[0]
    assert now() == first
    (package / "net.py").write_text("x = 2\n")
    assert {name for name in first if now()[name] != first[name]} == {"mine"}
    x, y = torch.arange(6.0)[:, None], torch.arange(6)
    splits = [Splits(*[(x + d, y)] * 3) for d in (0, 0, 1e-6)]
    same, again, other = (provenance.content(Batches(split, 2), {}) for split in splits)
    assert same == again != other
    (tmp_path / "data.bin").write_bytes(b"1")
    files = {"path": str(tmp_path / "data.bin")}
    before = provenance.content(object(), files)
    (tmp_path / "data.bin").write_bytes(b"2")
    assert provenance.content(object(), files) != before


def a_change_is_said(own, caplog, folder, what, change):
    """Of finished and of resumed runs; and no control mixes with it."""
    run(own())
    assert "has changed" not in caplog.text
    change()
    run(own())
    assert f"{what} has changed since that run was made, and its numbers do not show it." in caplog.text
    with pytest.raises(ValueError, match=rf"{what} has changed since it was made\. A control must differ"):
        run(own("kind=reinit"))
    (folder / "DONE").unlink()
    run(own())  # as one that was killed
    assert re.search(rf"{what} has changed since .*ticket-1 began, which goes on with", caplog.text)


def test_code_that_has_changed_since_is_said_and_no_control_mixes_with_it(own, monkeypatch, caplog):
    folder, original, other = run(own()), provenance.source, []
    made = json.loads((folder / "run.json").read_text())
    assert set(made["sources"]) >= {"own_module", "torch", "lightning_prune"}
    changed = lambda package: "another" if package in other else original(package)  # noqa: E731
    monkeypatch.setattr(provenance, "source", changed)
    a_change_is_said(own, caplog, folder, "own_module", lambda: other.append("own_module"))
    other[:] = ["own_module", "torch"]
    run(own("kind=reinit"))
    assert re.search(r"torch has changed since the ticket .*ticket-1 was made", caplog.text)


def test_data_that_have_changed_since_are_said_and_no_control_mixes_with_them(own, monkeypatch, caplog):
    folder, original, there = run(own()), provenance.content, []
    assert len(json.loads((folder / "run.json").read_text())["sources"]["the data"]) == 16
    monkeypatch.setattr(provenance, "content", lambda *arguments: "".join([original(*arguments), *there]))
    a_change_is_said(own, caplog, folder, "the data", lambda: there.append("another"))


def test_a_finished_run_needs_no_data(own, monkeypatch, caplog):
    folder = run(own())
    monkeypatch.setattr(provenance, "build", lambda *_: (_ for _ in ()).throw(ValueError("there are none")))
    with caplog.at_level("INFO"):
        assert run(own()) == folder
    assert "is finished already" in caplog.text
    assert "has changed" not in caplog.text


def test_what_is_not_a_number_is_said_with_its_round_and_null_in_the_records(own, monkeypatch, caplog):
    import own_module

    def step(self, batch, batch_idx, original=own_module.Regression.validation_step):
        original(self, batch, batch_idx)
        self.log("val/late", float("nan") if self.trainer.global_step > 8 else 1.0)
        self.log("val/far", float("inf"))

    monkeypatch.setattr(own_module.Regression, "validation_step", step)
    folder = run(own())
    said = [r.message.partition(": ")[2] for r in caplog.records if "finite" in r.message]
    assert said == ["val/far is no finite number in rounds 0, 1.", "val/late is no finite number in round 1."]

    def refused(constant):
        raise AssertionError(constant)

    text = (folder / "records.jsonl").read_text()
    first, last = (json.loads(line, parse_constant=refused) for line in text.splitlines())
    assert (first["metrics"]["val/late"], last["metrics"]["val/late"]) == (1.0, None)
    assert last["curve"]["val/far"] == [None, None]
    rows, broken = read(folder / "records.jsonl")
    assert not broken
    assert math.isnan(rows[1]["metrics"]["val/late"])
    assert all(map(math.isnan, rows[1]["curve"]["val/far"]))


def test_a_run_says_commit_changed_files_processor_and_versions(tmp_path, monkeypatch):
    made = provenance.provenance()
    assert {"command", "date", "commit", "changed", "here", "versions", "python", "cpu", "gpus"} <= set(made)
    assert made["cpu"]
    assert isinstance(made["changed"], list)
    assert made["here"]["commit"] == "not a git checkout"

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "a")
    assert provenance.checkout(tmp_path)["changed"] == []
    (tmp_path / "a.py").write_text("2")
    assert provenance.checkout(tmp_path)["changed"] == ["a.py"]
    assert provenance.checkout(tmp_path / "untracked", "b.py")["commit"] == "not a git checkout"


# ------------------------------------------------------------------------------------------- from a wheel

PAGE = (ROOT / "docs" / "your-own.md").read_text()
FILES = dict(re.findall(r'title="([^"]+)"\n--8<-- "([^"]+)"', PAGE))
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


class Newcomer:
    """Someone with a wheel, an environment of their own and an empty folder, who follows the page.

    Args:
        tmp_path: where all of it goes.
        lent: the environment takes what the package depends on from this one, so that nothing is downloaded.
    """

    def __init__(self, tmp_path, lent):
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = (tmp_path / "dist").glob("*.whl")
        self.bin, self.work = tmp_path / "venv" / "bin", tmp_path / "work"
        venv.create(tmp_path / "venv", with_pip=not lent)
        self.work.mkdir()
        if lent:
            (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
            (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
            pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--no-deps"]
            subprocess.run([*pip, "--quiet", str(wheel)], check=True)
        else:
            (install,) = (command for command in COMMANDS if command.startswith("pip "))
            assert f"dist/{wheel.name}[experiments]" in install
            self("pip", "install", "--quiet", f"{wheel}[experiments]")
        for path, source in FILES.items():
            (self.work / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, self.work / path)

    def __call__(self, command, *arguments):
        """What a command prints, given in the folder."""
        without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        call = [str(self.bin / command), *arguments]
        found = subprocess.run(call, cwd=self.work, env=without, capture_output=True, text=True, check=False)
        assert found.returncode == 0, (arguments, found.stderr)
        return found.stdout + found.stderr

    def follow(self, command, *more):
        """What a command of the page prints."""
        return self(*shlex.split(command), *more)


def compared(folder, several):
    """Whether the page's sweep has its runs and the report tells them apart."""
    assert len(list(folder.glob("runs/own/ticket-*,task.lr=*/DONE"))) == several
    assert (folder / "report" / "parameter.png").is_file()
    text = (folder / "report" / "report.md").read_text()
    assert "task.lr=0.01" in text
    assert "task.lr=0.1" in text


def test_a_wheel_in_an_environment_of_its_own_sweeps_and_reports_as_the_page_says(tmp_path):
    there = Newcomer(tmp_path, lent=True)
    sweep, report = (
        c
        for c in COMMANDS
        if ("run --multirun" in c and "kind=" not in c and "own" in c) or "report runs/own" in c
    )
    assert "6 jobs" in there.follow(sweep, *SHORT)
    made = json.loads(next(there.work.glob("runs/own/*/run.json")).read_text())
    assert made["commit"] == "not a git checkout"
    there.follow(report)
    compared(there.work, 6)


@pytest.mark.slow
@pytest.mark.parametrize("lent", [True, False])
def test_every_command_of_the_page_runs_from_a_wheel_outside_any_clone(lent, tmp_path):
    if not lent and shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("what the package depends on needs 12 GB of disk")
    there = Newcomer(tmp_path, lent)
    for command in COMMANDS[1:]:
        extra = re.search(
            r"logger=(tensorboard|mlflow|wandb)|experiment=(search)|report runs/(search)", command
        )
        needed = extra and (extra[1] or "hydra_plugins.hydra_optuna_sweeper")
        if needed and not (lent and find_spec(needed.split(".")[0]) and find_spec(needed)):
            continue  # of an extra that is not installed
        # of the search fewer and shorter trials, which take the same way
        said = there.follow(command, *(SEARCHED if "experiment=search" in command else ()))
        assert "6 runs" in said or " plan " not in command
    compared(there.work, 6)
    assert (there.work / "runs/mnist1d/ticket-1/DONE").is_file()
    if lent and find_spec("hydra_plugins.hydra_optuna_sweeper"):
        assert len(list(there.work.glob("runs/search/*/DONE"))) == 4
        search = next(c for c in COMMANDS if "experiment=search" in c)
        assert "is finished already" in there.follow(search, *SEARCHED)
        assert len(list(there.work.glob("runs/search/*/DONE"))) == 4
