"""The house: which way imports point, where heavy ones stay, what a class is, and what no name is."""

import ast
import dataclasses
import enum
import importlib
import inspect
import io
import pkgutil
import subprocess
import sys
import tokenize
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
from typing_extensions import final

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent

# The floors, from the ground up. A room is a file or a folder of the package; it imports from its own floor
# and from those below.
FLOORS = (
    {"masks", "checks", "copies", "files", "folders", "rng", "models", "shards", "tables"},
    {
        "selection",
        "criteria",
        "allocation",
        "granularity",
        "schedules",
        "layers",
        "evidence",
        "metrics",
        "updates",
        "adaptive",
    },
    {
        "growth",
        "pruning",
        "layerwise",
        "reaching",
        "rewind",
        "holding",
        "doctor",
        "structured",
        "deploy",
        "adapters",
    },
    {"callbacks"},
    {"study"},
)
# The only rooms that may import these; no room at all where the set is empty.
ONLY_IN = {
    "lightning": {"callbacks", "study"},
    "pytorch_lightning": set(),
    "torchmetrics": {"metrics", "callbacks", "study"},
    "torch_pruning": {"structured", "study"},  # there as a peer to compare with
    "hydra": {"study"},
    "omegaconf": {"study"},
    "altair": {"study"},
    "vl_convert": {"study"},
    "matplotlib": {"study"},
    "rich": {"study"},
    "experiments": set(),
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imported(source):
    """The dotted name of everything that a piece of code imports, at any depth of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import, of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    """`lightning_prune.structured.surgery` -> `structured`; None for what is not of the package."""
    top, *rest = module.split(".")
    return rest[0] if top == "lightning_prune" and rest else None


def circle(graph):
    """The names that lie on a circle or lead to one, in {name: names that it imports}."""
    graph = {name: set(needs) - {name} for name, needs in graph.items()}
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    return set(graph)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    here = room(module)
    assert here in floor, f"{here} is on no floor yet: give it one in this test"
    for name in imported(MODULES[module].read_text()):
        top = name.split(".")[0]
        assert here in ONLY_IN.get(top, {here}), f"{module} imports {name}"
        assert floor.get(room(name), 0) <= floor[here], f"{module} imports {name}, from a floor above"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_the_map_of_the_package(module):
    """`from lightning_prune import criteria` is a module; `import prune` from there would need them all."""
    rooms = {room(name) for name in MODULES}
    names = set(imported(MODULES[module].read_text()))
    assert {room(name) for name in names if name.split(".")[0] == "lightning_prune"} <= rooms


def test_no_circle_of_modules():
    graph = {}
    for module, path in MODULES.items():
        # `from package import module` needs the module, `from module import name` the module as well
        names = set(imported(path.read_text()))
        graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    assert circle(graph) == set()


def test_no_circle_of_rooms():
    graph = {}
    for module, path in MODULES.items():
        graph.setdefault(room(module), set()).update(map(room, imported(path.read_text())))
    assert circle(graph) == set()


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"torch"}}) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"torch"}}) == {"a", "b", "c"}


def test_one_file_knows_torch_pruning():
    def knows(path):
        return any(name.split(".")[0] == "torch_pruning" for name in imported(path.read_text()))

    rooms = [path.parent.name for path in FILES if knows(path)]
    assert rooms == ["structured", "study"]  # in an experiment it is the peer


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
    others = {"hydra", "omegaconf", "altair", "torch_pruning", "torchvision", "experiments"}
    assert not new & others


# --- classes ---


def abstract(cls):
    return inspect.isabstract(cls) or getattr(cls, "_is_protocol", False)


def value(cls):
    """Nobody expects to subclass these: frozen dataclasses, named tuples, enumerations, exceptions."""
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    return frozen or hasattr(cls, "_fields") or issubclass(cls, (enum.Enum, BaseException))


def subclassed(classes):
    """The pairs (subclass, class) of which the second is concrete."""
    return {
        (sub.__name__, cls.__name__)
        for cls in classes
        for sub in classes
        if cls in sub.__bases__ and not abstract(cls)
    }


def open_ended(classes):
    """The public concrete classes that do not say `@typing_extensions.final`, nor are values."""
    public = {cls for cls in classes if not cls.__name__.startswith("_")}
    return {
        cls.__name__
        for cls in public
        if not abstract(cls) and not value(cls) and "__final__" not in vars(cls)
    }


def classes_of_the_package():
    for info in pkgutil.walk_packages([str(PACKAGE)], "lightning_prune."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                yield cls


def test_a_concrete_class_has_no_subclass():
    assert subclassed(set(classes_of_the_package())) == set()


def test_a_public_class_is_abstract_or_final():
    assert open_ended(set(classes_of_the_package())) == set()


class Abstract(ABC):
    @abstractmethod
    def act(self): ...


class Interface(Protocol):
    def act(self): ...


class Concrete(Abstract):
    def act(self): ...


class Sub(Concrete):
    pass


@final
class Last(Abstract):
    def act(self): ...


class Pair(NamedTuple):
    one: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    one: int


@dataclasses.dataclass
class Changeable:
    one: int


class Broken(Exception):
    pass


def test_a_class_that_is_neither_abstract_nor_final_is_found():
    classes = {Abstract, Interface, Concrete, Sub, Last, Pair, Frozen, Changeable, Broken}
    assert subclassed(classes) == {("Sub", "Concrete")}
    assert open_ended(classes) == {"Concrete", "Sub", "Changeable"}


# --- names ---


def spelled(source):
    """The names in a piece of code, also within its f-strings, but no word of a text or a comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.string
        elif token.type == tokenize.STRING:  # an f-string as well, before Python 3.12
            yield from (node.id for node in ast.walk(ast.parse(token.string)) if isinstance(node, ast.Name))


def test_no_name_is_its():
    """It does not say what it is."""
    root = PACKAGE.parent
    paths = sorted(
        path for top in ("lightning_prune", "experiments", "tests") for path in (root / top).rglob("*.py")
    )
    found = [path for path in paths if "its" in spelled(path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(root)) for path in found] == []


@pytest.mark.parametrize(
    "code",
    [
        "its = 1",
        "def f(its): ...",
        "lambda *its: 0",
        "[n for its in n]",
        "its.size",
        "f'{its}'",
        "f'{a[its]:.1f}'",
    ],
)
def test_a_name_that_is_its_is_found(code):
    assert "its" in spelled(code)


@pytest.mark.parametrize(
    "code", ["x = 1  # its", "'its'", "f'its {x}'", 'def f():\n    """its"""\n', "bits = 1"]
)
def test_a_word_of_a_text_is_no_name(code):
    assert "its" not in spelled(code)
