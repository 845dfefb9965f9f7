"""Sweeps that survive: kills, failures, several workers, shared work, launchers."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_prune.study import configs, locks, records
from lightning_prune.study.names import FREE, GROWTH, shared, variant
from lightning_prune.study.round_masks import masks_of
from lightning_prune.study.run import run, state_of
from lightning_prune.study.tasks import Classification
from lightning_prune.study.training import built
from tests.sweeping import CONTEXT, SMALL, start

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")


def config(folder, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, f"runs={folder}", *overrides])


def multirun(output, folder, *arguments, launcher="serial"):
    return start(output, "--multirun", *SMALL, f"runs={folder}", f"hydra/launcher={launcher}", *arguments)


def finished(process, output, seconds=600):
    process.join(seconds)
    assert process.exitcode == 0, Path(output).read_text()


def results(folder):
    """Everything that the runs below a folder ended with: records, survivors, weights."""
    found = {}
    for path in sorted(folder.glob("*/*/records.jsonl")):
        rows, broken = records.read(path)
        assert not broken
        assert (path.parent / "DONE").is_file()
        assert not list(path.parent.rglob("*.tmp"))
        tensors = {}
        if (path.parent / "final.ckpt").is_file():  # controls have records alone
            masks = masks_of(path.parent)
            assert list(masks) == [r["round"] for r in rows]
            tensors = {f"{r} {name}": mask for r in masks for name, mask in masks[r].items()}
            tensors |= torch.load(path.parent / "final.ckpt", weights_only=True)["state_dict"]
        tensors = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        name = re.sub(r",(evaluate_every|rounds|steps_per_round)=[^,]*", "", path.parent.name)  # of SMALL
        found[name] = [{k: v for k, v in r.items() if k != "seconds"} for r in rows], tensors
    return found


# ------------------------------------------------------------------------------------- killed, and failed


def begun(folder, output, *arguments):
    """A sweep that has just come to its first run: however long Python takes to start, kills hit runs."""
    before = output.read_text().count("Launching") if output.is_file() else 0
    process = multirun(output, folder, *arguments)
    while process.exitcode is None and (
        not output.is_file() or output.read_text().count("Launching") == before
    ):
        time.sleep(0.01)
    return process


def killed_and_restarted(tmp_path, arguments, kills, seed):
    process, began = begun(tmp_path / "straight", tmp_path / "log", *arguments), time.monotonic()
    finished(process, tmp_path / "log")
    whole = time.monotonic() - began
    expected = results(tmp_path / "straight")
    moments, killed, interrupted, places = random.Random(seed), 0, 0, set()
    done = lambda: len(list((tmp_path / "runs").rglob("DONE")))  # noqa: E731

    def within_a_run():
        configs = (tmp_path / "runs").glob("*/*/config.yaml")
        return any(not (path.parent / "DONE").is_file() for path in configs)

    while killed < kills:
        process, before = begun(tmp_path / "runs", tmp_path / "log", *arguments), done()
        # However slow the machine is, some kills hit a run, and others come after one more has been finished.
        waits = {1: within_a_run, 2: lambda before=before: done() > before}.get(killed % 3, lambda: True)
        while process.exitcode is None and not waits():
            time.sleep(0.01)
        if killed % 3 != 1:
            process.join(moments.uniform(0, 2 * whole / kills))  # so that the kills are spread over all runs
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:  # it came to its end just before
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        places.add(done())
        interrupted += within_a_run()
    assert killed
    assert interrupted  # in the middle of a run
    finished(begun(tmp_path / "runs", tmp_path / "log", *arguments), tmp_path / "log")
    print(
        f"{killed} kills, {interrupted} of them in the middle of a run, after {sorted(places)} finished runs"
    )
    assert results(tmp_path / "runs") == expected
    return expected


@posix
def test_a_sweep_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path):
    arguments = ["kind=ticket,reinit", "optimizer.lr=0.001,0.005"]
    found = killed_and_restarted(tmp_path, arguments, kills=4, seed=0)
    assert set(found) == {
        f"{kind}-1,optimizer.lr={lr}" for kind in ("ticket", "reinit") for lr in (0.001, 0.005)
    }


@posix
@pytest.mark.slow
def test_a_long_sweep_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path):
    arguments = ["kind=ticket,reinit,class_random,class_blind", "seed=1,2,3", "batch_size=60,120"]
    assert len(killed_and_restarted(tmp_path, arguments, kills=60, seed=1)) == 24


@posix
def test_two_workers_never_make_the_same_run(tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    workers = [multirun(log, tmp_path / "runs", "kind=ticket,class_random", "seed=1") for log in logs]
    for worker, log in zip(workers, logs, strict=True):
        finished(worker, log)
    said = "".join(log.read_text() for log in logs)
    assert len(results(tmp_path / "runs")) == 2
    assert said.count("written: ") == 2
    assert said.count("is finished already") == 2


def test_done_is_written_last_and_holds_the_hash_of_the_config(tmp_path, monkeypatch):
    on_disk = []
    monkeypatch.setattr("lightning_prune.study.run.sync", lambda path: on_disk.append(path.name))
    cfg = config(tmp_path, "rounds=0")
    folder = run(cfg)
    assert {"records.jsonl", "final.ckpt", "resume.ckpt"} <= set(on_disk)
    assert not (tmp_path / "mnist1d" / "ticket-1" / "FAILED").exists()
    assert (folder / "DONE").read_text().strip() == configs.digest(configs.plain(cfg, (*FREE, *GROWTH)))
    other = config(tmp_path, "rounds=0", "batch_size=50")
    assert configs.digest(configs.plain(other, (*FREE, *GROWTH))) != (folder / "DONE").read_text().strip()
    assert state_of(config(tmp_path, "rounds=0", "progress=true")) == "finished"
    with pytest.raises(ValueError, match=r"seed: 1 there, '1' now\)"):
        state_of(config(tmp_path, "rounds=0", "seed='1'"))
    (folder / "DONE").write_text("0123456789abcdef\n")
    with pytest.raises(ValueError, match="DONE is that of another config"):
        run(cfg)


def test_what_failed_is_started_anew_and_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    calls, faults = [], []

    def step(self, batch, batch_idx, original=Classification.training_step):
        calls.append(self.trainer.global_step)
        if len(calls) == 70:
            raise faults[-1]
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", step)
    for fault, ends, state, again in (
        (ValueError("a bug"), ValueError, "failed", 0),
        (KeyboardInterrupt(), SystemExit, "interrupted", 40),
    ):
        faults.append(fault)
        cfg = config(tmp_path / state, "rounds=1")
        with pytest.raises(ends):
            run(cfg)
        folder = tmp_path / state / "mnist1d" / "ticket-1"
        assert state_of(cfg) == state
        assert (folder / "FAILED").is_file() == (state == "failed")
        if state == "failed":
            assert "a bug" in (folder / "FAILED").read_text()
            shutil.rmtree(tmp_path / state / ".dense")  # which is not to be done again
        before = len(calls)
        run(cfg)
        assert calls[before] == again
        assert state_of(cfg) == "finished"
        assert not (folder / "FAILED").exists()
        calls.clear()


def hold(path, ready):
    lock = locks.locked(path, "it")
    ready.set()
    time.sleep(600)
    lock.release()


@posix
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path / "lock", ready))
    process.start()
    assert ready.wait(120)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "lock").exists()
    locks.locked(tmp_path / "lock", "it").release()


# ------------------------------------------------------------------------------------------- shared work


def test_the_dense_round_is_trained_once_and_changes_nothing(tmp_path, monkeypatch):
    steps = []

    def step(self, batch, batch_idx, original=Classification.training_step):
        steps.append(batch_idx)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", step)
    run(config(tmp_path / "shared"))
    assert len(steps) == 120
    run(config(tmp_path / "shared", "kind=class_random"))
    assert len(steps) == 120 + 80
    run(config(tmp_path / "alone", "kind=class_random"))
    assert len(steps) == 120 + 80 + 120
    alone = results(tmp_path / "alone")["class_random-1"]
    assert results(tmp_path / "shared")["class_random-1"] == alone
    # a round of 60 steps ends in the middle of an epoch of 40: the first epoch is shared
    for n, kind in enumerate(("ticket", "class_random")):
        run(config(tmp_path / "longer", f"kind={kind}", "rounds=1", "steps_per_round=60"))
        assert len(steps) == 320 + (n + 1) * 120 - n * 40


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["kind=class_random"], True),
        (["schedule=one_shot", "rounds=1", "allocation=global_rank", "name=other"], True),
        (["seed=2"], False),
        (["order_seed=2"], False),
        (["logger=csv", "variant=x"], True),
        (["optimizer.lr=0.1"], False),
        (["steps_per_round=20"], False),
        (["criterion=movement"], False),  # keeps the initial weights in its checkpoint
        (["rewind=none"], False),
    ],
)
def test_a_dense_round_is_shared_by_what_begins_with_the_same(overrides, same, tmp_path):
    from hydra.utils import instantiate

    from lightning_prune.study.shared_rounds import dense_round

    def path(*given):
        cfg = config(tmp_path, *given)
        return dense_round(cfg, tmp_path / "a" / "b", instantiate(cfg.pruner), "data").path

    assert (path() == path(*overrides)) == same


def test_a_run_is_named_by_what_its_command_changes():
    lrs, sizes = (0.001, 0.005), (60, 120)
    names = {variant([f"optimizer.lr={lr}", f"batch_size={n}", "seed=3"]) for lr in lrs for n in sizes}
    assert names == {f",batch_size={n},optimizer.lr={lr}" for lr in lrs for n in sizes}
    assert variant(["optimizer.lr=1e-3"]) == variant(["optimizer.lr=0.001"])  # one value has one name
    assert variant(["experiment=mnist1d", "seed=2", "kind=reinit", "progress=false", "logger=csv"]) == ""
    assert variant(["run.points=3", "rate=0.1"], without=["run"]) == ",rate=0.1"
    assert variant(["+trainer.x=1", "~batches.augment"]) == ",batches.augment=deleted,trainer.x=1"
    lists = {variant([f"a={value}"]) for value in ("[1,2]", "[12]", "[1-2]", "'1,2'", "1/2", "'1 2'")}
    assert len(lists) == 6
    typed = {variant([f"a={value}"]) for value in ("1", "'1'", "true", "'true'", "null", "None", "1.0")}
    assert len(typed) == 7
    assert variant(["a='adam'"]) == variant(["a=adam"]) == ",a=adam"  # the same text
    long = [variant([f"key_{i}=0.123456789" for i in range(20)] + [f"z={z}"]) for z in (1, 2)]
    assert long[0] != long[1]
    assert all(re.fullmatch(r"[\w.,=+@-]{1,120}", name) for name in [*names, *lists, *long])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["optimizer.lr=0.1,0.2", "seed=1,2", "kind=ticket,reinit"], None),
        (["experiment=mnist1d,lenet_mnist", "seed=1"], None),
        (["runs=a,b"], None),
        (["name=x", "experiment=mnist1d,lenet_mnist"], "experiment=.* one folder. experiment "),
        (["seed=1,1"], "the same again would be two runs in one folder"),
        (["seed=1,2", "logger=csv,none"], "logger=csv and logger=none would be two runs in one folder"),
        (["controls_at=[1],[2]", "kind=reinit"], r"controls_at=\[1\] and controls_at=\[2\]"),
        (["optimizer.lr=0.001,1e-3"], "optimizer.lr"),
    ],
)
def test_two_runs_that_would_share_a_folder_are_found_before_anything_starts(sweep, message):
    found = shared(sweep)
    assert found is None if message is None else re.search(message, found)


@posix
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_sweep_of_runs_that_would_share_a_folder_is_refused_and_nothing_made(dry, tmp_path):
    process = multirun(tmp_path / "log", tmp_path / "runs", "logger=csv,none", *dry)
    process.join(300)
    assert process.exitcode == 1
    assert "would be two runs in one folder" in (tmp_path / "log").read_text()
    assert not (tmp_path / "runs").exists()


def test_the_data_order_has_a_seed_of_its_own(tmp_path):
    def begun(*given):
        cfg = config(tmp_path / "-".join(given or ["plain"]).replace("=", ""), "rounds=0", *given)
        folder = run(cfg)
        weights = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
        return torch.cat([w.flatten() for w in built(cfg).parameters()]), weights["net.fc1.weight"]

    first, plain = begun()
    same, other_order = begun("order_seed=2")
    other, other_both = begun("seed=2")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(plain, other_order)
    _, mixed = begun("seed=2", "order_seed=1")
    assert not torch.equal(mixed, other_both)
    again, equal = begun("order_seed=1")
    assert torch.equal(again, first)
    assert torch.equal(equal, plain)


def test_a_pruning_at_initialization_has_no_dense_round_to_share(tmp_path):
    run(config(tmp_path, "schedule=at_initialization", "rounds=0"))
    assert not (tmp_path / ".dense").exists()


@posix
def test_a_control_makes_the_ticket_that_it_starts_from(tmp_path):
    finished(multirun(tmp_path / "log", tmp_path / "runs", "kind=reinit", "seed=1"), tmp_path / "log")
    assert set(results(tmp_path / "runs")) == {"reinit-1", "ticket-1"}


# ---------------------------------------------------------------------------------------- plans and launchers


@posix
def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(tmp_path):
    short = ",evaluate_every=20,rounds=2,steps_per_round=40"
    ticket = run(config(tmp_path / "runs", f"variant='{short}'"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    sweep = [
        "--multirun",
        "--dry-run",
        *SMALL,
        f"runs={tmp_path / 'runs'}",
        "kind=ticket,reinit,class_random",
        "seed=1,2",
    ]
    finished(start(tmp_path / "log", *sweep, "hydra/launcher=parallel"), tmp_path / "log")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before
    rows = [line.strip("│ \n") for line in (tmp_path / "log").read_text().split("\n") if "mnist1d/" in line]
    cells = [[cell.strip() for cell in row.split("│")] for row in rows]
    assert [c[:4] for c in cells] == [
        [f"mnist1d/ticket-1{short}", "finished", "0", "24965 (49.93%)"],
        [f"mnist1d/ticket-2{short}", "new", "3 of 3", "24965 (49.93%)"],
        [f"mnist1d/reinit-1{short}", "new", "3 of 3", "24965 (49.93%)"],
        [f"mnist1d/reinit-2{short}", "new", "3 of 3", "24965 (49.93%)"],
        [f"mnist1d/class_random-1{short}", "new", "2 of 3", "24965 (49.93%)"],
        [f"mnist1d/class_random-2{short}", "new", "2 of 3", "24965 (49.93%)"],
    ]
    assert all("MB" in c[4] and c[5].endswith(" s") for c in cells[1:])
    expected = sum(
        (ticket / name).stat().st_size
        for name in ("final.ckpt", "resume.ckpt", *(f"masks/round-{r:02}.pt" for r in range(3)))
    )
    assert float(cells[1][4].split()[0]) == pytest.approx(expected / 1e6, rel=0.1)


@posix
def test_a_dry_run_says_what_a_fit_would_refuse(tmp_path):
    far = ["kind=rigl", "sparsity=0.9", "every_n_train_steps=100000"]
    finished(start(tmp_path / "log", "--dry-run", *SMALL, f"runs={tmp_path}", *far), tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert "refused" in said
    assert "Traceback" not in said


def launched(launcher, tmp_path, jobs=2):
    log, seeds = tmp_path / "log", range(1, jobs + 1)
    short = ["rounds=1", "steps_per_round=40", "kind=ticket", f"seed={','.join(map(str, seeds))}"]
    finished(multirun(log, tmp_path / "runs", *short, launcher=launcher), log)
    assert set(results(tmp_path / "runs")) == {f"ticket-{seed}" for seed in seeds}


@posix
@pytest.mark.parametrize(
    ("launcher", "package", "jobs"),
    [("parallel", "joblib", 2), ("submitit", "submitit", 2), ("ray_local", "ray", 8)],
)
def test_a_sweep_runs_with_every_launcher(launcher, package, jobs, tmp_path):
    if find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
        pytest.skip(f"hydra-{package}-launcher is not installed")
    launched(launcher, tmp_path, jobs)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no Slurm here")
def test_a_sweep_runs_on_slurm(tmp_path):
    launched("slurm", tmp_path)


STAND_IN = {  # for Slurm: each job of an array is started at once, on this machine
    "sbatch": """
cp "$1" "$STAND_IN/submitted"
for i in 0 1; do
  SLURM_JOB_ID=7$i SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_NAME=sweep SLURM_NTASKS=1 \\
    SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 bash "$1" > "$STAND_IN/$i" 2>&1 &
done
echo Submitted batch job 7
""",
    "srun": """
while case "$1" in --unbuffered) shift;; --*) shift 2;; *) false;; esac; do :; done
exec "$@"
""",
    "sacct": "echo 'JobID|State|NodeList'",
}


@posix
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is Slurm here")
def test_a_sweep_is_handed_to_slurm_as_one_array_whose_jobs_are_the_runs(tmp_path):
    if find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra-submitit-launcher is not installed")
    for name, text in STAND_IN.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / name).chmod(0o755)
    code = "from lightning_prune.study.command import main; main()"
    short = ["experiment=mnist1d", "rounds=1", "steps_per_round=40", "evaluate_every=20", "progress=false"]
    sweep = ["--multirun", *short, "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.partition=short"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code, "run", *sweep],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr + "".join(p.read_text() for p in tmp_path.glob("[01]"))
    assert set(results(tmp_path / "runs")) == {"ticket-1", "ticket-2"}
    asked = re.findall(r"^#SBATCH --(.*)$", (tmp_path / "submitted").read_text(), re.MULTILINE)
    expected = {
        "array=0-1%2",
        "cpus-per-task=1",
        "job-name=mnist1d",
        "mem=8GB",
        "partition=short",
        "time=240",
    }
    assert expected <= set(asked)


@pytest.mark.parametrize(
    "launcher", sorted(p.stem for p in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
)
def test_every_launcher_composes(launcher):
    package = {"parallel": "joblib", "submitit": "submitit", "slurm": "submitit", "ray_local": "ray"}.get(
        launcher
    )
    if package and find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
        pytest.skip(f"hydra-{package}-launcher is not installed")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config", [*SMALL, "seed=1", f"hydra/launcher={launcher}", "threads=1"], return_hydra_config=True
        )
    assert cfg.hydra.launcher._target_.endswith("Launcher")
    if launcher == "parallel":
        assert 1 <= cfg.hydra.launcher.n_jobs <= os.cpu_count()
        cfg.threads = 10**6
        assert cfg.hydra.launcher.n_jobs == 1


@posix
def test_two_jobs_with_two_processes_each_finish_and_leave_none_behind(tmp_path):
    log = tmp_path / "log"
    sweep = ["trainer=ddp", "rounds=1", "seed=1,2"]
    process = multirun(log, tmp_path / "runs", *sweep)
    finished(process, log)
    with pytest.raises(ProcessLookupError):  # its group is empty
        os.killpg(process.pid, 0)
    for rows, _ in results(tmp_path / "runs").values():
        assert [r["round"] for r in rows] == [0, 1]
        assert rows[1]["sparsity"] > 0.2
    assert len(results(tmp_path / "runs")) == 2


def test_a_strategy_that_starts_the_command_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.strategy=ddp: .* Allowed are .* ddp_fork"):
        run(config(tmp_path, "trainer=ddp", "trainer.strategy=ddp"))
