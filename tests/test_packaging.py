"""What users install: imports are declared, versions agree, and what CI runs are targets of the Makefile."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_prune

ROOT = Path(__file__).parents[1]
PROJECT = ProjectMetadata(str(ROOT), PluginManager())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
GROUPS = PROJECT.config["dependency-groups"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
DISTRIBUTIONS = {"skimage": ["scikit-image"], **packages_distributions()}  # which an extra brings


def requirements(texts):
    """Requirements by canonical name, without those on extras of this project and on other groups."""
    found = [Requirement(text) for text in texts if isinstance(text, str)]
    return {canonicalize_name(r.name): r for r in found if canonicalize_name(r.name) != "lightning-prune"}


NEEDED = requirements(PROJECT.core.dependencies)
OPTIONAL = requirements(text for texts in PROJECT.core.optional_dependencies.values() for text in texts)
TOOLS = requirements(text for texts in GROUPS.values() for text in texts)


def imports(node, at_once=True):
    """(top name of what is imported, whether importing the module imports it at once)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.split(".")[0], at_once
        yield from imports(child, at_once and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def undeclared(files, at_once, later):
    """The imports whose distribution is not among those given: of all files, {what: file}."""
    found = {}
    for path in files:
        for name, first in imports(ast.parse(path.read_text())):
            if name in sys.stdlib_module_names or name in ("lightning_prune", "experiments"):
                continue
            distributions = {canonicalize_name(d) for d in DISTRIBUTIONS.get(name, [name.replace("_", "-")])}
            if not distributions & set(at_once if first else later):
                found[name] = str(path)
    return found


def test_every_import_of_the_package_is_a_dependency_and_what_is_imported_later_at_least_an_extra():
    study = ROOT / "lightning_prune" / "study"
    core = [path for path in (ROOT / "lightning_prune").rglob("*.py") if study not in path.parents]
    assert not undeclared(core, NEEDED, {**NEEDED, **OPTIONAL})
    extra = PROJECT.core.optional_dependencies
    experiments = requirements([*extra["experiments"], *extra["report"]])
    assert not undeclared(study.rglob("*.py"), {**NEEDED, **experiments}, {**NEEDED, **OPTIONAL})


def test_every_import_of_the_experiments_is_declared():
    """Benchmarks run where tests do: `make bench` installs the same."""
    declared, benchmarks = {**NEEDED, **OPTIONAL}, ROOT / "experiments" / "benchmarks"
    others = [path for path in (ROOT / "experiments").rglob("*.py") if benchmarks not in path.parents]
    assert not undeclared(others, declared, declared)
    peers = {**declared, **requirements(text for text in GROUPS["test"] if isinstance(text, str))}
    assert not undeclared(benchmarks.rglob("*.py"), declared, peers)


def test_an_import_that_is_not_declared_is_found(tmp_path):
    (tmp_path / "a.py").write_text(
        "import os, numpy\nfrom yaml import load\ndef f():\n    import torch_pruning\n"
    )
    files, torch_pruning = [tmp_path / "a.py"], requirements(["torch-pruning"])
    assert set(undeclared(files, {}, {})) == {"numpy", "yaml", "torch_pruning"}
    assert set(undeclared(files, requirements(["PyYAML"]), torch_pruning)) == {"numpy"}
    assert set(undeclared(files, torch_pruning, {})) == {"numpy", "yaml", "torch_pruning"}


def test_there_is_one_version_number():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT.version == lightning_prune.__version__ == citation["version"]
    assert f"\n## {PROJECT.version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_lower_bound():
    for requirement in [*NEEDED.values(), *OPTIONAL.values(), *TOOLS.values()]:
        assert {">=", "=="} & {bound.operator for bound in requirement.specifier}, requirement


def test_a_dependency_has_the_same_bounds_wherever_it_is_named():
    named = [*PROJECT.core.optional_dependencies.values(), PROJECT.core.dependencies, *GROUPS.values()]
    every = {**NEEDED, **OPTIONAL, **TOOLS}
    for texts in named:
        for name, requirement in requirements(texts).items():
            assert requirement.specifier == every[name].specifier, requirement


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_oldest_versions_are_the_lower_bounds(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["make", "--silent", "oldest.txt"], cwd=tmp_path, check=True)
    pins = requirements((tmp_path / "oldest.txt").read_text().split())
    every = {**NEEDED, **OPTIONAL, **TOOLS, **requirements(PROJECT.config["build-system"]["requires"])}
    assert set(pins) == set(every)
    for name, requirement in every.items():
        (lower,) = (s.version for s in requirement.specifier if s.operator in (">=", "=="))
        assert str(pins[name].specifier) == f"=={lower}"


@pytest.mark.parametrize("python", PYTHONS)
def test_ci_installs_versions_that_are_allowed_and_one_of_each(python):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    every = [canonicalize_name(Requirement(line).name) for line in lines]
    pins = [
        pin
        for pin in map(Requirement, lines)
        if not pin.marker or pin.marker.evaluate({"python_version": python})
    ]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert sorted(names) == sorted(set(every)), "a package without a version for this Python, or with two"
    for name, pin in zip(names, pins, strict=True):
        (version,) = (s.version for s in pin.specifier)
        wanted = {**NEEDED, **OPTIONAL, **TOOLS}.get(name)
        assert wanted is None or wanted.specifier.contains(version), pin


def test_what_the_makefile_installs_is_declared():
    extras = set(re.findall(r"[\w-]+", re.search(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)[1]))
    extras |= set(re.findall(r'"\.\[(\w+)\]"', MAKEFILE))
    assert extras <= set(PROJECT.core.optional_dependencies)
    assert set(re.findall(r"--group (\w+)", MAKEFILE)) == set(GROUPS)


def test_the_demo_installs_neither_test_tools_nor_loggers():
    (needs,) = re.findall(r"^\$\(VENV\)/demo: NEEDS := (.*)$", MAKEFILE, re.MULTILINE)
    assert needs == '--editable ".[experiments]"'
    installed = set(requirements(PROJECT.core.optional_dependencies["experiments"]))
    assert not installed & ({*TOOLS} | set(requirements(PROJECT.core.optional_dependencies["loggers"])))


def workflow(name):
    parsed = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    return {
        "on" if key is True else key: value for key, value in parsed.items()
    }  # YAML 1.1 reads `on` as true


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_the_steps_of_a_workflow_are_actions_of_a_version_or_targets_of_the_makefile(name):
    steps = [step for job in workflow(name)["jobs"].values() for step in job["steps"]]
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
        elif step["run"].startswith("make "):
            assert step["run"].split()[1] in TARGETS
        else:
            assert step["name"], "a command of its own says what it is for"


def test_ci_runs_on_the_oldest_python_that_is_allowed():
    (lowest,) = re.findall(r"[\d.]+", PROJECT.core.requires_python)
    jobs = workflow("ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [lowest, "3.11", "3.13"]
    runs = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert runs == {"make test", "make demo", "make test-oldest", "make lint", "make docs"}


def test_a_release_is_checked_and_published_without_a_password():
    release = workflow("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    publish = release["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert "make dist" in [step.get("run") for step in release["jobs"]["build"]["steps"]]
    assert "twine check --strict" in MAKEFILE


def test_the_commands_of_ci_are_targets_of_the_makefile():
    script = ROOT / ".ci" / "run"
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    commands = set(
        re.findall(r"^\s*(?:if )?(?:timeout \d+ )?make ([a-z-]+)", script.read_text(), re.MULTILINE)
    )
    assert commands <= TARGETS
    assert commands >= {"test", "lint", "docs", "test-oldest"}
