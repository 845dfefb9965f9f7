"""Every exception of the package says what was given, what is allowed, and what to do."""

import ast
import re
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
VALUE = "\N{WHITE SQUARE}"  # stands for what is filled in

# The value that was given, or the argument by name, or what is missing.
GIVEN = re.compile(rf"{VALUE}|^\w+(=|: )|there (is|are) (none|no)|is not installed")
ALLOWED = re.compile(
    r"\b(allowed|needs?|needed|known|must|asks for|goes|They are|of the types)\b", re.IGNORECASE
)
ORDERS = """
    add ask build call cap change choose compare connect convert cut delete divide exclude fit give keep load
    leave look lower make mend name pass prune put raise read remove resume return run save set sort start
    take train use write
"""
DO = re.compile(
    rf"(^|[.;:,{VALUE}] |or |and )({'|'.join(ORDERS.split())}|pip install|such as)\b", re.IGNORECASE
)


def text(node, known):
    """The message that an expression makes, with VALUE for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, known) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left, known) + text(node.right, known)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List):  # "...".join([...])
        return "\n".join(text(part, known) for part in node.args[0].elts)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return known.get(node.value.id, VALUE)
    if isinstance(node, ast.Name):
        return known.get(node.id, VALUE)
    return VALUE


def raised(path):
    """(line, class, message) of every exception that is made in a file and raised, here or by its caller."""
    tree = ast.parse(path.read_text())
    of_all = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            of_all[node.targets[0].id] = text(node.value, {})
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        known = dict(of_all)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                message = text(node.value, {})
                if not isinstance(node.value, ast.Call) and message != VALUE:
                    known[node.targets[0].id] = message
        if (path.name, function.name) == ("checks.py", "number"):
            continue  # whose callers say what is allowed
        if (path.name, function.name) == ("shards.py", "refuse"):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            name = node.func.id
            if name == "number":
                yield node.lineno, name, f"{VALUE}={VALUE}: allowed {text(node.args[2], known)}."
            if name == "refuse":
                yield node.lineno, name, f"{VALUE} does not work on shards. {text(node.args[2], known)}"
            if name.startswith("_") or not name.endswith(("Error", "Exception")):
                continue  # one of our own that never leaves its module; the one that tells of it is here too
            yield node.lineno, name, text(node.args[0], known) if node.args else ""


# `files` passes on those of the operating system.
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "files.py"]


def every():
    found = {}
    for path in FILES:
        for line, name, message in raised(path):
            found[f"{path.relative_to(PACKAGE)}:{line} {name}"] = message
    return found


EVERY = every()


def test_none_is_overlooked():
    plain = re.compile(r"\braise (?!StopIteration|_|error\b|NotImplementedError)\w+\(")
    count = sum(len(plain.findall(path.read_text())) for path in FILES)
    assert len(EVERY) >= count > 60


@pytest.mark.parametrize("place", EVERY)
def test_an_exception_says_what_was_given_what_is_allowed_and_what_to_do(place):
    message = EVERY[place]
    lacks = [
        part
        for part, pattern in (("what was given", GIVEN), ("what is allowed", ALLOWED), ("what to do", DO))
        if not pattern.search(message)
    ]
    assert not lacks, f"{place} does not say {' nor '.join(lacks)}: {message}"
