"""Pages that are made, not written: the reference from the docstrings, the tutorials from their scripts."""

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


def on_files(files, config):
    """Add the pages."""
    made = {f"reference/{name}.md": f"# {name}\n\n::: {name}\n" for name in modules()}
    for path in sorted((DOCS / "tutorials").glob("*.py")):
        made[f"tutorials/{path.stem}.md"] = page(path.read_text())
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    reference = [
        {name.removeprefix("reference/")[:-3]: name} for name in made if name.startswith("reference/")
    ]
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = reference
    return files
