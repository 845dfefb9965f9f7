"""Every way into the library: its examples run, and print what the documentation says they print."""

import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import lightning_prune

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as `python script arguments` would, and give what it prints."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(Path(script).parent))
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_plain_loop_prunes_step_by_step_and_rewinds(run):
    printed = run(EXAMPLES / "plain.py")
    assert re.findall(r"sparsity ([\d.]+)", printed) == ["0.000", "0.500", "0.750", "0.875"]
    assert all(float(loss) < 0.2 for loss in re.findall(r"loss ([\d.]+)", printed))
    assert "640 of 706 parameters are prunable" in printed


def test_fabric_trains_with_masks_held_on(run):
    sparsity, loss = re.findall(r"[\d.]+", run(EXAMPLES / "fabric.py").splitlines()[-1])
    assert float(sparsity) == 0.7
    assert float(loss) < 0.4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's, of jsonargparse
def test_lightning_cli_prunes_from_its_yaml_alone(run):
    config = EXAMPLES / "cli" / "config.yaml"
    printed = run(EXAMPLES / "cli" / "main.py", "fit", "--config", str(config))
    assert "sparsity 0.750 after 2 prunings" in printed
    printed = run(EXAMPLES / "cli" / "main.py", "fit", "--config", str(config), "--trainer.max_epochs=2")
    assert "sparsity 0.500 after 1 prunings" in printed


def app(run, *overrides):
    GlobalHydra.instance().clear()
    try:
        return run(EXAMPLES / "hydra_app" / "app.py", *overrides)
    finally:
        GlobalHydra.instance().clear()


def test_hydra_builds_callbacks_in_a_users_own_app_with_the_groups_of_the_wheel(
    run, wheel, tmp_path, monkeypatch
):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    monkeypatch.setattr(
        lightning_prune, "__path__", [*lightning_prune.__path__, f"{tmp_path}/lightning_prune"]
    )
    printed = app(run)
    assert "sparsity 0.750 after 2 prunings, Geometric(rate=0.5), <function magnitude" in printed
    printed = app(run, "schedule=cubic", "criterion=random", "allocation=global_rank", "rewind=none")
    assert "sparsity 0.900 after 2 prunings, Cubic(sparsity=0.9, rounds=2" in printed
    assert "Random(seed=" in printed
    for option in ("schedule=half_rate_output", "rewind=weights"):
        assert "after 2 prunings" in app(run, option)


def test_the_app_runs_as_its_docstring_says(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    said = (EXAMPLES / "hydra_app" / "app.py").read_text().split("`")[1:4:2]
    for command in said:
        call = [sys.executable, str(EXAMPLES / "hydra_app" / "app.py"), *command.split()[2:]]
        found = subprocess.run(
            call, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
    assert "after 2 prunings" in found.stdout


def test_what_the_wheel_ships_needs_nothing_of_this_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    shipped = {name: archive.read(name).decode() for name in archive.namelist() if "/conf/" in name}
    here = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("lightning_prune/conf/") for name in shipped if name.endswith(".yaml")} == here
    assert "lightning_prune/conf/__init__.py" in shipped
    assert not [name for name, text in shipped.items() if "experiments." in text]
    assert "lightning_prune/py.typed" in archive.namelist()
    assert not [n for n in archive.namelist() if not n.startswith(("lightning_prune/", "lightning_prune-"))]


@pytest.mark.filterwarnings("ignore")  # the peers'
@pytest.mark.parametrize("name", ["from_model_pruning", "from_torch_prune"])
def test_the_peers_behave_as_the_pages_on_migration_say(run, name):
    printed, written = run(EXAMPLES / f"{name}.py").strip(), (EXAMPLES / f"{name}.txt").read_text().strip()
    number = re.compile(r"\d[\d.,]*")
    assert number.sub("#", printed) == number.sub("#", written)
    for got, want in zip(printed.splitlines(), written.splitlines(), strict=True):
        if "bytes" not in written.splitlines()[written.splitlines().index(want) - 1].lower():
            numbers = [[float(n.strip(".").replace(",", "")) for n in number.findall(t)] for t in (got, want)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.05), got


# ------------------------------------------------------------------------------------ packages, installed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_installs_and_runs_in_a_clean_environment(kind, tmp_path):
    """Its dependencies are lent by this environment, so that nothing large is downloaded."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = (p for p in tmp_path.iterdir() if p.suffix in (".whl", ".gz"))
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = next(str(p) for p in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if p.exists())
    site = next(venv.rglob("site-packages"))
    ours = Path(pytest.__file__).parents[1]
    (site / "lent.pth").write_text(f"{ours}\n")  # a plain path: the editable install of this one stays behind
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--ignore-installed", "--no-deps", "--no-build-isolation", "-q", str(built)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    code = (
        "import sys, lightning.pytorch  # which takes what it finds\n"
        "for name in ('hydra', 'omegaconf', 'matplotlib', 'torch_pruning', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import lightning_prune as lp, torch\n"
        "net = torch.nn.Linear(4, 4)\n"
        "lp.prune(net, 0.5)\n"
        "print(lp.targets(net))\n"
        "print(lp.__file__, lp.metrics.Sparsity()({'w': net.weight}))\n"
    )
    run = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert str(site) in run.stdout
    assert "tensor(0.5000)" in run.stdout
    command = [python, "-I", str(EXAMPLES / "hydra_app" / "app.py"), "schedule=one_shot"]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "sparsity 0.800 after 2 prunings, OneShot" in run.stdout
