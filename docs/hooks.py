"""Pages that are made, not written: the reference from the docstrings, the tutorials from their scripts."""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "lightning_prune"


def modules():
    """Every module of the package, by its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def page(script):
    """A script in percent format as Markdown: `# %% [markdown]` cells are text, the others code."""
    text = ""
    for head, cell in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, re.MULTILINE):
        if "[markdown]" in head:
            text += re.sub(r"^# ?", "", cell, flags=re.MULTILINE)
        elif cell.strip():
            text += f"\n```python\n{cell.strip()}\n```\n\n"
    return text


def methods():
    """A table of each axis: name, what it does, and its reference, from the docstrings."""
    text = "# Methods\n\nEach is a function or a frozen dataclass; your own is as good as a built-in one.\n"
    for axis in ("criteria", "schedules", "allocation", "granularity", "rewind"):
        tree = ast.parse((PACKAGE / f"{axis}.py").read_text())
        first = (ast.get_docstring(tree) or "").splitlines()[0]
        text += f"\n## {axis.capitalize()}\n\n{first}\n\n| name | what it is | reference |\n|---|---|---|\n"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                doc = ast.get_docstring(node) or ""
                reference = re.search(r"Reference:((?:.*\n?)*?)(?:\n\n|$)", doc)
                cells = (
                    f"[`{node.name}`][lightning_prune.{axis}.{node.name}]",
                    doc.split("\n\n")[0],
                    reference and reference[1],
                )
                text += (
                    "".join("| " + " ".join((cell or "").split()).replace("|", "\\|") + " " for cell in cells)
                    + "|\n"
                )
    return text


def on_files(files, config):
    """Add the pages."""
    made = {f"reference/{name}.md": f"::: {name}\n" for name in modules()}
    made["methods.md"] = methods()
    for path in sorted((DOCS / "tutorials").glob("*.py")):
        made[f"tutorials/{path.stem}.md"] = page(path.read_text())
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    reference = [{name.removeprefix("lightning_prune."): f"reference/{name}.md"} for name in modules()]
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = reference
    return files
