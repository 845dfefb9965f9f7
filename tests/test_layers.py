"""Imports point one way, and heavy ones stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
ROOT = PACKAGE.parent

# from the foundation upwards: a module imports from the layers below its own, or from its own
LAYERS = (
    {"checks", "masks", "models", "tables"},
    {"criteria", "allocation", "schedules", "rng", "evidence", "granularity", "storage", "metrics"},
    {"pruning", "holding", "rewind", "surgery", "channels", "filters", "inference", "doctor"},
    {"callbacks"},
)
ONLY_IN = {
    "lightning": {"callbacks"},
    "pytorch_lightning": {"callbacks"},
    "torchmetrics": {"callbacks", "metrics"},
    "torch_pruning": {"channels"},
    "hydra": set(),
    "omegaconf": set(),
    "altair": set(),
    "experiments": set(),
}


def imported(path):
    """Every module that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert part(path) in level, f"{part(path)} has no layer yet: give it one in this test"
    for module in imported(path):
        top, *rest = module.split(".")
        assert part(path) in ONLY_IN.get(top, {part(path)}), f"{path} imports {module}"
        if top == "lightning_prune" and rest and rest[0] in level:
            assert level[rest[0]] <= level[part(path)], f"{path} imports {module}, from a layer above"


def test_the_package_does_not_import_itself_in_a_circle():
    graph = {}
    for path in FILES:
        names = {m.split(".")[1] for m in imported(path) if m.startswith("lightning_prune.")}
        graph.setdefault(part(path), set()).update(names & {part(p) for p in FILES} - {part(path)})
    while graph:
        leaves = [name for name, needs in graph.items() if not needs & set(graph)]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_importing_the_package_imports_neither_hydra_nor_plotting():
    code = (
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)  # what Lightning imports is not ours to answer for\n"
        "import lightning_prune\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(run.stdout.split())
    assert "lightning_prune" in new
    assert not new & {"hydra", "omegaconf", "altair", "torch_pruning", "torchvision", "experiments"}
