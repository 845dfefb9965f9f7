"""Modules and data of one's own, from a package of one's own; objectives; what a run was made with."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

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


# ------------------------------------------------------------------------------------------- objectives


def test_an_objective_is_a_metric_of_the_last_round_or_at_a_fraction_of_weights(tmp_path):
    rows = [
        {"round": r, "kind": "ticket", "alive": alive, "total": 100, "metrics": {"test_acc": acc}}
        for r, alive, acc in ((0, 100, 0.9), (1, 50, 0.8), (2, 25, 0.7))
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def its(metric, at=None):
        return objective(OmegaConf.create({"objective": metric, "objective_at": at}), tmp_path)

    assert its(None) is None
    assert its("test_acc") == 0.7
    assert its("test_acc", 0.45) == 0.8
    with pytest.raises(ValueError, match=r"objective=acc: .* Allowed is one of test_acc"):
        its("acc")


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


def test_the_command_takes_a_config_dir_wherever_it_stands(tmp_path):
    found = command(tmp_path, "run", "experiment=own", "--config-dir", str(EXAMPLE / "conf"), *SHORT)
    assert found.returncode == 0, found.stderr
    (records,) = tmp_path.glob("runs/own/ticket-1,*/records.jsonl")
    assert [r["round"] for r in read(records)[0]] == [0, 1]


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


def test_unknown_commands_are_refused_and_help_is_printed(tmp_path):
    assert "usage: lightning-prune" in command(tmp_path, "--help").stdout
    wrong = command(tmp_path, "train")
    assert wrong.returncode == 2
    assert "train: there is no such command" in wrong.stdout


@pytest.mark.skipif(
    not find_spec("hydra_plugins.hydra_optuna_sweeper"),
    reason="hydra-optuna-sweeper is not installed",
)
def test_optuna_maximizes_accuracy_over_rate_and_learning_rate(tmp_path):
    sweep = ["--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1"]
    sweep += ["hydra.sweeper.direction=maximize", "objective=test_acc", "objective_at=0.5"]
    sweep += ["rate=interval(0.1,0.5)", "optimizer.lr=tag(log,interval(0.0005,0.05))"]
    done = {}
    for trials in (2, 3):  # the same command again goes on: what is finished gives its number at once
        again = ["hydra.sweeper.sampler.seed=1", f"hydra.sweeper.n_trials={trials}"]
        found = command(tmp_path, "run", "experiment=mnist1d", *SHORT, *sweep, *again)
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("is finished already") == len(done)
        before, done = (
            done,
            {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/mnist1d/ticket-1,*/DONE")},
        )
        assert len(done) == trials
        assert before.items() <= done.items()
    rows = [read(path.parent / "records.jsonl")[0] for path in done]
    at = [min(its, key=lambda r: abs(r["alive"] / r["total"] - 0.5))["metrics"]["test_acc"] for its in rows]
    best = yaml.safe_load((tmp_path / "runs" / "mnist1d" / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(max(at))


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
    same, again, other = (provenance.content(Batches(its, 2), {}) for its in splits)
    assert same == again != other
    (tmp_path / "data.bin").write_bytes(b"1")
    files = {"path": str(tmp_path / "data.bin")}
    before = provenance.content(object(), files)
    (tmp_path / "data.bin").write_bytes(b"2")
    assert provenance.content(object(), files) != before


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


@pytest.mark.slow
def test_a_wheel_outside_any_clone_runs_sweeps_and_reports(tmp_path):
    """Its dependencies are lent by this environment, so that nothing large is downloaded."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    (entry,) = (
        line
        for line in next(site.glob("*.dist-info/entry_points.txt")).read_text().splitlines()
        if "=" in line
    )
    module, function = entry.split("=")[1].strip().split(":")
    code = f"from {module} import {function}; {function}()"
    path = os.pathsep.join([str(site), str(EXAMPLE)])

    def lightning_prune(*arguments):
        call = [sys.executable, "-c", code, *arguments]
        found = subprocess.run(
            call,
            cwd=work,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout + found.stderr

    lightning_prune("run", "experiment=mnist1d", *SHORT)
    made = json.loads(next(work.glob("runs/mnist1d/*/run.json")).read_text())
    assert made["commit"] == "not a git checkout"
    sweep = [
        "experiment=own",
        *SHORT,
        "task.lr=0.01,0.1",
        "seed=1,2",
        f"hydra.searchpath=[file://{EXAMPLE}/conf]",
    ]
    assert "4 runs" in lightning_prune("plan", "--multirun", *sweep)
    lightning_prune("run", "--multirun", *sweep)
    assert len(list(work.glob("runs/own/*task.lr=*/DONE"))) == 4
    lightning_prune("report", "runs/own", "--x", "task.lr", "--out", "out")
    assert (work / "out" / "parameter.png").is_file()
    assert "task.lr=0.01" in (work / "out" / "report.md").read_text()
