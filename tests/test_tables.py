"""Tables are text: everywhere, in any locale, no wider than the terminal, and without a side effect."""

import builtins
import html
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from torch import nn

import lightning_prune as lp
from lightning_prune.tables import table


@dataclass(frozen=True)
class Row:
    layer: str
    shape: tuple[int, ...]
    share_of_all: float
    size: int
    why_not: str = ""


ROWS = [
    Row(
        "encoder.layers.0.attention.self.query.weight",
        (1024, 768),
        0.5,
        786432,
        "Embedding is not in layers=",
    ),
    Row("b", (), 12345.6, 3),
]


def rows_of(text):
    """The cells of a table that was not wrapped."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_a_table_has_a_line_for_each_row_and_its_title_above(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    title, names, rule, first, second = rows_of(table("two of them", ROWS))
    assert title == ["two of them"]
    assert names == ["layer", "shape", "share of all", "size", "why not"]
    assert set("".join(rule)) == {"-"}
    assert first == [ROWS[0].layer, "1024 x 768", "0.500", "786,432", ROWS[0].why_not]
    assert second == ["b", "12,346", "3"]


def test_numbers_are_aligned_on_the_right_and_text_on_the_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = table("", ROWS).splitlines()
    assert lines[3].index("786,432") + len("786,432") == lines[4].index(" 3") + 2
    assert lines[4].startswith("b ")


@pytest.mark.parametrize("width", [50, 60, 80, 100])
def test_a_table_is_no_wider_than_the_terminal_and_loses_nothing(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = table("a long title " * 20, ROWS)
    assert max(map(len, text.splitlines())) <= width
    letters = sorted(c for c in text if c.isalnum())
    monkeypatch.setenv("COLUMNS", "1000")
    assert sorted(c for c in table("a long title " * 20, ROWS) if c.isalnum()) == letters


def test_a_table_without_rows_is_its_title():
    assert table("nothing", []).split() == ["nothing"]


class ZMQInteractiveShell:
    """What tells rich and others that this is a notebook."""


def test_in_a_notebook_text_is_text_and_nothing_appears(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    rows = lp.targets(nn.Linear(3, 2))
    assert "6 of 8 parameters are prunable" in str(rows)
    assert f"{rows}" == str(rows) == format(rows)
    assert capsys.readouterr() == ("", "")
    with open(tmp_path / "table.txt", "w") as file:
        print(rows, file=file)
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "table.txt").read_text() == str(rows) + "\n"


def test_a_notebook_shows_a_table_of_html_with_every_cell_escaped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"a<b&c": nn.Linear(3, 2)})

    shown = lp.targets(Odd())._repr_html_()
    assert shown.startswith("<table>")
    assert "<b&" not in shown
    assert html.unescape(shown).count("a<b&c") == 2
    assert shown.count("<tr>") == 3


def test_a_strict_ascii_locale_prints_it():
    code = (
        "import torch, lightning_prune as lp\n"
        "print(lp.targets(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))))"
    )
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "48"}
    environment = {**os.environ, **ascii_only}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    text = run.stdout.decode("ascii")
    assert text.startswith("6 of 12 parameters are prunable\n")
    assert max(map(len, text.splitlines())) <= 48
