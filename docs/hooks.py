"""Pages that are made, not written: the reference from the docstrings, the tutorials from their scripts.

Files of the repository that lie outside of this folder are pages too (`OUTSIDE`), under the path that they
have in the repository; links between files of the repository become links between pages.
"""

import ast
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "lightning_prune"
OUTSIDE = ("experiments/README.md", "experiments/results/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)")  # to a file; not to an address, nor to a heading of the page


class Doctests(griffe.Extension):
    """Doctests in docstrings are code, not quotations in quotations."""

    def on_object(self, *, obj, **_):
        """Put fences around the doctests of a docstring, once."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring):
    """A docstring with fences around each paragraph of doctests."""
    if "```" in docstring:  # it has fences already
        return docstring
    return re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", docstring, flags=re.MULTILINE)


def modules():
    """Every public module of the package, by its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts[-1].startswith("_"):
            yield ".".join(parts)


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
    """A table of each axis, from the docstrings: the names that the page on methods has, and what they do."""
    there = set(re.findall(r"`(\w+)`", (DOCS / "methods.md").read_text()))
    text = "\n## Every method\n\nThese tables are made of the docstrings.\n"
    for axis in ("criteria", "schedules", "allocation", "granularity", "rewind"):
        tree = ast.parse((PACKAGE / f"{axis}.py").read_text())
        first = (ast.get_docstring(tree) or "").splitlines()[0]
        text += f"\n### {axis.capitalize()}\n\n{first}\n\n| name | what it is | reference |\n|---|---|---|\n"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in there:
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


def place(path):
    """Where a file of the repository lies in the site; tutorials are pages there."""
    path = re.sub(r"^(docs/tutorials/\w+)\.py$", r"\1.md", path)
    return path.removeprefix("docs/")


def targets(text, path):
    """The files of the repository that a file of it shows or links to."""
    return [
        posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        for _, target in LINK.findall(text)
    ]


def linked(text, path):
    """The text of a file of the repository, its links to other files as links within the site."""
    here = posixpath.dirname(place(path))

    def moved(link):
        (target,) = targets(link[0], path)
        return link[1] + posixpath.relpath(place(target), here or ".")

    return LINK.sub(moved, text)


def on_files(files, config):
    """Add the pages, and what those from outside of this folder show or link to."""
    made = {f"reference/{name}.md": f"::: {name}\n" for name in modules()}
    for path in sorted((DOCS / "tutorials").glob("*.py")):
        made[f"tutorials/{path.stem}.md"] = page(path.read_text())
    for path in OUTSIDE:
        made[path] = linked((ROOT / path).read_text(), path)
    for path in (*OUTSIDE, *(f"docs/{p.name}" for p in DOCS.glob("*.md"))):
        for target in targets((ROOT / path).read_text(), path):
            if not target.startswith("docs/") and target not in made and target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = reference()
    return files


def on_page_markdown(markdown, page, **_):
    """Add the tables to the page on methods; links that lead out of this folder lead into the site."""
    uri = page.file.src_uri
    if (DOCS / uri).is_file():
        markdown = linked(markdown, f"docs/{uri}")
    return markdown + methods() if uri == "methods.md" else markdown


def reference():
    """The pages of the reference, those of a room of several modules under its name."""
    nav, rooms = [], {}
    for name in modules():
        entry, room = f"reference/{name}.md", name.split(".")[1:2]
        short = name.removeprefix("lightning_prune.")
        if room and (PACKAGE / room[0]).is_dir():
            if room[0] not in rooms:
                rooms[room[0]] = []
                nav.append({room[0]: rooms[room[0]]})
            rooms[room[0]].append(entry if short == room[0] else {short.partition(".")[2]: entry})
        else:
            nav.append({short: entry})
    return nav
