"""The report: its numbers, what it does with broken runs, and the page in a real browser."""

import csv
import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import vl_convert
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf

import lightning_prune as lp
from lightning_prune.study import figures, records, report, round_masks
from lightning_prune.study.costs import measure
from lightning_prune.study.run_folders import load
from tests.naming import in_words

ROOT = Path(__file__).parents[1]
SHAPES = {"net.fc1.weight": (64, 49), "net.out.weight": (10, 64)}
TOTAL = 64 * 49 + 640


def written(folder, kinds=("ticket", "reinit"), seeds=(1, 2, 3), rounds=3, config=(), evaluations=5):
    """A folder of runs as `experiments.run` leaves it, with made-up numbers."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base = compose("config", ["experiment=lenet_mnist", f"rounds={rounds}", *config])
    generator = torch.Generator().manual_seed(0)
    for kind in kinds:
        for seed in seeds:
            run = folder / "lenet_mnist" / f"{kind}-{seed}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(
                OmegaConf.to_yaml(OmegaConf.merge(base, {"kind": kind, "seed": seed}), resolve=True)
            )
            versions = {"torch": "2.14.1", "lightning": "2.6.6"}
            made = {
                "command": f"python -m experiments.run kind={kind}",
                "commit": "0123456789abcdef",
                "versions": versions,
            }
            (run / "run.json").write_text(json.dumps({**made, "date": "2026-11-25T20:00:00+00:00"}))
            deaths = {n: torch.randint(1, rounds + 2, s, generator=generator) for n, s in SHAPES.items()}
            for r in range(rounds + 1):
                round_masks.save(run, r, {n: death > r for n, death in deaths.items()})
            with (run / "records.jsonl").open("w") as file:
                for r in range(rounds + 1):
                    layers = dict.fromkeys(SHAPES, 0.8**r)
                    steps = list(range(10, 10 * evaluations + 1, 10))
                    noise = torch.rand(evaluations, generator=generator).tolist()
                    loss = [0.5 - 0.02 * r + 0.1 * x + (kind != "ticket") * 0.05 * r for x in noise]
                    metrics = {"val_loss": loss[-1], "test_loss": loss[-1] + 0.1, "test_acc": 1 - loss[-1]}
                    metrics |= {
                        "early_stop_step": 10 * (1 + loss.index(min(loss))),
                        "censored": loss[-1] == min(loss),
                    }
                    record = {
                        "kind": kind,
                        "seed": seed,
                        "round": r,
                        "alive": round(0.8**r * TOTAL),
                        "total": TOTAL,
                    }
                    record |= {
                        "sparsity": 1 - round(0.8**r * TOTAL) / TOTAL,
                        "layers": layers,
                        "metrics": metrics,
                    }
                    curve = {"step": steps, "val_loss": loss, "test_acc": [1 - x for x in loss]}
                    file.write(json.dumps({**record, "curve": curve, "seconds": 60.0}) + "\n")
            (run / "DONE").write_text("0\n")
    return folder / "lenet_mnist"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A sweep with everything that can be wrong with one, and its report."""
    folder = written(tmp_path_factory.mktemp("runs"))
    with (folder / "ticket-2" / "records.jsonl").open("a") as file:
        file.write('{"round": 4, "kind": "ti\n[1, 2]\n\n')
        file.write('{"round": "5", "kind": "ticket", "metrics": {}, "alive": 1, "total": 2}\n')
    (folder / "reinit-1" / "DONE").unlink()
    (folder / "reinit-2" / "DONE").unlink()
    (folder / "reinit-2" / "FAILED").write_text("Traceback\nValueError: <b>the loss</b> is NaN\n")
    (folder / "reinit-3" / "masks" / "round-02.pt").write_bytes(b"half")
    measured = [
        {
            "kind": "ticket",
            "round": r,
            "sparsity": 1 - 0.8**r,
            "gzip_bytes": 9000 - r,
            "sparse_bytes": 8000 - r,
            "theoretical_speed_up": 1 / 0.8**r,
            "accelerated_us": 100 - r,
        }
        for r in range(4)
    ]
    (folder / "measured.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
    out = tmp_path_factory.mktemp("out")
    report.report(folder, out=out)
    return folder, out, (out / "report.html").read_text()


def specs(html):
    return json.loads(re.search(r'id="specs">(.*?)</script>', html, re.DOTALL)[1].replace("<\\/", "</"))


def values_of(spec):
    return (
        spec["data"]["values"]
        if "data" in spec
        else next(layer for layer in spec["layer"] if len(layer["data"]["values"]) > 1)["data"]["values"]
    )


def test_it_writes_a_page_figures_and_tables(reported):
    folder, out, html = reported
    names = {"figure", "from_dense", "relative_loss", "sizes", "pareto", "density", "overlap", "curves"}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")} == names
    for path in out.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert (out / f"{path.stem}.svg").read_text().startswith("<svg")
    assert {key.rpartition("-")[0] for key in specs(html)} == names
    rows = list(csv.DictReader(io.StringIO((out / "records.csv").read_text())))
    assert len(rows) == 6 * 4
    assert float(rows[1]["density net.out.weight"]) == 0.8
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra report is not installed")
    table = parquet.read_table(out / "records.parquet").to_pylist()
    assert [row["test_acc"] for row in table] == [float(row["test_acc"]) for row in rows]
    for claim in load(folder).config.claims:
        assert str(claim.name).split("'")[0] in html
    assert html.count("undecided") + html.count("not held") + html.count(">held<") >= 5
    assert "commit 0123456789abcdef" in html
    assert "python -m experiments.run kind=reinit" in html
    assert "torch 2.14.1" in html
    assert "http://" not in re.sub(r"http://www\.w3\.org/[\w/.]+", "", html.split("<script>")[0])


def test_what_is_wrong_with_a_sweep_is_said_and_the_rest_is_shown(reported, capsys):
    folder, _, html = reported
    text = re.sub(r"\s+", " ", html)
    assert "6 runs (1 unfinished, 1 failed, 4 finished)" in text
    assert "1 unfinished run: reinit-1." in text
    assert "1 failed run: reinit-2." in text
    assert "ValueError: &lt;b&gt;the loss&lt;/b&gt; is NaN" in text
    assert "ticket-2/records.jsonl: 3 lines no record and skipped (number 5, 6, 8)" in text
    assert len(load(folder).records) == 24
    report.say(load(folder), [], [])
    assert (
        "ticket-2/records.jsonl: 3 lines are no records and were skipped: 5, 6, 8" in capsys.readouterr().out
    )


def test_the_lines_show_means_and_intervals(reported):
    folder, _, html = reported
    drawn = {(p["kind"], p["round"]): p for p in values_of(specs(html)["figure-0"])}
    for kind, label in (("ticket", "ticket"), ("reinit", "re-initialised")):
        for r in range(4):
            values = [
                x["metrics"]["test_acc"] for x in load(folder).records if (x["kind"], x["round"]) == (kind, r)
            ]
            point = drawn[label, r]
            half = 4.302652729911275 * statistics.stdev(values) / 3**0.5  # Student's t at 97.5 %, two degrees
            assert point["y"] == pytest.approx(statistics.fmean(values))
            assert point["high"] - point["y"] == pytest.approx(half)
            assert point["y"] - point["low"] == pytest.approx(half)
            assert point["x"] == pytest.approx(100 * 0.8**r, abs=0.02)
            assert point["n"] == 3
    relative = {(p["kind"], p["round"]): p["y"] for p in values_of(specs(html)["relative_loss-0"])}
    losses = {
        (x["seed"], x["round"]): x["metrics"]["test_loss"]
        for x in load(folder).records
        if x["kind"] == "ticket"
    }
    assert relative["ticket", 2] == pytest.approx(
        statistics.fmean(losses[s, 2] / losses[s, 0] for s in (1, 2, 3))
    )
    density = {(p["round"], p["layer"]): p["density"] for p in values_of(specs(html)["density-0"])}
    assert density == {(r, layer): pytest.approx(0.8**r) for r in range(4) for layer in SHAPES}


def test_the_front_is_what_no_other_beats(reported):
    rows = values_of(specs(reported[2])["pareto-0"])
    for row in rows:
        beaten = any(o["cost"] <= row["cost"] and o["y"] >= row["y"] and o is not row for o in rows)
        assert row["front"] == (not beaten)


def test_the_overlap_is_that_of_the_masks(reported):
    folder, _, html = reported
    a, b = (round_masks.masks_of(folder / f"ticket-{s}")[3] for s in (1, 2))
    both = sum(int((a[n] & b[n]).sum()) for n in a)
    either = sum(int((a[n] | b[n]).sum()) for n in a)
    last = max(
        (key for key in specs(html) if key.startswith("overlap")), key=lambda key: int(key.split("-")[1])
    )
    pairs = {(p["mask"], p["other mask"]): p["overlap"] for p in values_of(specs(html)[last])}
    assert pairs["ticket 1", "ticket 2"] == pytest.approx(both / either)
    assert pairs["ticket 1", "ticket 1"] == 1


def test_one_seed_one_round_and_nothing_beside_the_records(tmp_path, capsys):
    folder = written(tmp_path / "runs", kinds=["ticket"], seeds=[7], rounds=0)
    shutil.rmtree(folder / "ticket-7" / "masks")
    report.report(folder, out=tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "One seed: no intervals" in html
    assert all(
        "low" not in p
        for p in values_of(specs(html)["figure-0"] | {"data": specs(html)["figure-0"]["layer"][-1]["data"]})
    )
    shutil.copytree(tmp_path / "out", tmp_path / "merged")
    report.report(tmp_path / "merged", out=tmp_path / "again")  # of the merged records alone
    assert (tmp_path / "again" / "records.jsonl").read_text() == (
        tmp_path / "out" / "records.jsonl"
    ).read_text()
    with pytest.raises(SystemExit, match="no records"):
        report.report(tmp_path / "nothing", out=tmp_path / "out")


def test_a_run_that_diverged_breaks_nothing(tmp_path):
    folder = written(tmp_path / "runs", kinds=["ticket"], seeds=[1, 2], rounds=1)
    path = folder / "ticket-1" / "records.jsonl"
    path.write_text(re.sub(r'"test_acc": [\d.]+', '"test_acc": NaN', path.read_text()))
    report.report(folder, out=tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert values_of(specs(html)["figure-0"])[0]["n"] == 1
    assert figures.finite({"a": [math.nan, 1.0, -math.inf]}) == {"a": [None, 1.0, None]}


def test_what_masks_are_worth_is_measured(tmp_path, monkeypatch):
    from hydra import compose as composed

    from tests.sweeping import SMALL

    folder = written(tmp_path / "runs", kinds=["ticket"], seeds=[1], rounds=2)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = composed("config", [*SMALL, "model.hidden=20"])
    runs = load(folder)
    runs.config = cfg
    task_shapes = {"net.fc1.weight": (20, 40), "net.fc2.weight": (20, 20), "net.out.weight": (10, 20)}
    generator = torch.Generator().manual_seed(0)
    deaths = {n: torch.randint(1, 4, s, generator=generator) for n, s in task_shapes.items()}
    masks = runs.runs[0].masks = {r: {n: death > r for n, death in deaths.items()} for r in range(3)}
    rows = measure(runs, examples=8)
    assert [row["round"] for row in rows] == [0, 1, 2]
    alive = [sum(int(mask.sum()) for mask in masks[r].values()) for r in range(3)]
    assert [1 - row["sparsity"] for row in rows] == pytest.approx([n / 1400 for n in alive], rel=1e-3)
    assert [row["theoretical_speed_up"] for row in rows] == pytest.approx([1400 / n for n in alive], rel=1e-3)
    assert rows[0]["sparse_bytes"] > rows[1]["sparse_bytes"] > rows[2]["sparse_bytes"] > 0
    seed_everything(0, verbose=False)
    task = instantiate(cfg.task).eval()
    for name, mask in masks[2].items():
        task.get_parameter(name).data.masked_fill_(~mask, 0.0)  # +0.0, which costs nothing
    assert rows[2]["sparse_bytes"] == lp.summarize(task.net, torch.zeros(8, 40)).total.sparse_size
    assert all(row["accelerated_us"] > 0 and "threads" in row["where"] for row in rows)


@pytest.mark.slow
def test_a_thousand_runs_fit_on_a_page(tmp_path):
    folder = written(
        tmp_path / "runs", kinds=[f"kind{k}" for k in range(10)], seeds=range(100), rounds=10, evaluations=50
    )
    report.report(folder, out=tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert len(html) < 20e6
    assert html.count('<td class="finished">') == 1000


# ------------------------------------------------------------------------------------------------ the browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (path := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("there is no Chromium here")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


def test_the_page_works_in_a_browser_without_a_network(reported, browser):
    _, out, _ = reported
    said, asked = [], []
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(180_000)  # other work may be going on
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{out / 'report.html'}")
    charts = page.locator("[data-chart]")
    for i in range(charts.count()):
        charts.nth(i).scroll_into_view_if_needed()
        charts.nth(i).locator("svg.marks").wait_for()
    assert charts.count() == len(specs((out / "report.html").read_text()))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # on a phone, nothing sideways

    page.fill("[data-filter=runs]", "reinit failed")
    rows = page.locator("[data-table=runs] tbody tr:visible")
    assert rows.count() == 1
    assert "2" in rows.first.inner_text()
    assert page.locator("[data-count=runs]").inner_text() == "1 of 6"
    page.fill("[data-filter=runs]", "")
    assert rows.count() == 6

    head = page.locator("[data-table=rounds] th button", has_text="test accuracy at the end")
    for order, sign in (("ascending", 1), ("descending", -1)):
        head.focus()
        page.keyboard.press("Enter")
        assert page.locator(f"[data-table=rounds] th[aria-sort={order}]").count() == 1
        cells = page.locator("[data-table=rounds] tbody tr td:nth-child(5)").all_inner_texts()
        numbers = [sign * float(cell.split("%")[0]) for cell in cells]
        assert len(numbers) == 8
        assert numbers == sorted(numbers)

    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    with page.expect_download() as download:
        page.click("#csv")
    assert Path(download.value.path()).read_text() == (out / "records.csv").read_text()
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("blob:")] == [f"file://{out / 'report.html'}"]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def hexed(rgb):
    return "#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", rgb)[:3])


PAPER = {"light": "#ffffff", "dark": "#14171b"}


def test_lines_have_a_contrast_of_three_to_one_on_either_paper():
    for theme, palette in (("light", figures.PALETTE), ("dark", figures.DARK)):
        assert len(set(palette)) == 10
        for colour in (*palette, "#888888"):
            assert contrast(colour, PAPER[theme]) >= 3, (theme, colour)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_can_be_read_in_either_theme_on_a_phone_and_on_a_desk(theme, width, reported, browser):
    _, out, _ = reported
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    page.set_default_timeout(180_000)
    page.goto(f"file://{out / 'report.html'}")
    n = page.locator("[data-chart]").count()
    page.wait_for_function(
        f"document.querySelectorAll('svg.marks').length === {n}"
    )  # also those out of sight
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heads = page.locator("main h2").all_inner_texts()
    assert heads[0] == "Claims"
    for cell in page.locator(".claims tbody td").all():  # nothing to scroll for, whatever the width
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    found = page.evaluate("""() => [...document.querySelectorAll(
        "h1,h2,p,td,th button,a:not(.skip),summary,small,header span,label,button,.notice"
        )].filter(e => e.offsetParent).map(e => {
          let on = e;
          while (getComputedStyle(on).backgroundColor === "rgba(0, 0, 0, 0)") on = on.parentElement;
          const paper = getComputedStyle(on).backgroundColor;
          return [getComputedStyle(e).color, paper, e.textContent.slice(0, 40)]; })""")
    for ink, paper, what in {tuple(text) for text in found}:
        assert contrast(hexed(ink), hexed(paper)) >= 4.5, what
    assert page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert hexed(page.evaluate("getComputedStyle(document.body).backgroundColor")) == PAPER[theme]
    texts = page.evaluate(
        "[...document.querySelectorAll('svg.marks text')].map(e => getComputedStyle(e).fill)"
    )
    assert all(contrast(hexed(ink), PAPER[theme]) >= 4.5 for ink in set(texts))
    lines = page.evaluate(
        "[...document.querySelectorAll('svg.marks .mark-line path')].map(e => getComputedStyle(e).stroke)"
    )
    palette = {"light": figures.PALETTE, "dark": figures.DARK}[theme]
    assert {hexed(stroke) for stroke in lines} & {*palette}
    first = page.locator("[data-chart=figure-0]")
    names = first.locator(".role-legend-label text").all_text_contents()
    assert names == ["ticket", "re-initialised"]
    for label in first.locator(".role-legend-label text").all():  # not cut off
        box, place = label.bounding_box(), first.bounding_box()
        assert box["x"] + box["width"] <= place["x"] + place["width"] + 1
    first.locator(".role-legend-label text").first.click()  # the other line steps back
    page.wait_for_function(
        "[...document.querySelectorAll('[data-chart=figure-0] .mark-line path')].some("
        "e => (e.getAttribute('opacity') ?? getComputedStyle(e).opacity) < 0.2)"
    )
    page.emulate_media(media="print")
    assert hexed(page.evaluate("getComputedStyle(document.body).backgroundColor")) == "#ffffff"
    assert not page.locator("nav").is_visible()
    assert not page.locator("#theme").is_visible()
    page.emulate_media(media="screen")
    page.screenshot(path=out / f"{theme}-{width}.png", full_page=True)
    context.close()


def test_what_leaves_a_figure_is_marked_at_the_edge_with_the_value(tmp_path):
    folder = written(tmp_path / "runs", kinds=["ticket"], seeds=[1, 2], rounds=2)
    for path in folder.glob("*/records.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["metrics"]["relative_loss"] = {0: 1.0, 1: 3.0, 2: 1e7}[row["round"]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = {"relative_loss": (0.8, 20.0)}
    make = figures.BySparsity("figure", {"relative_loss": "loss"}, log=["relative_loss"], limits=limits)
    (spec,) = make(load(folder)).specs()
    assert "triangles lie beyond the axis, up to 1e+07 (ticket)" in spec["title"]["subtitle"]
    marks = [layer for layer in spec["layer"] if "triangle-up" in str(layer["mark"])]
    assert [(row["edge"], row["y"]) for row in marks[0]["data"]["values"]] == [(20.0, 1e7)]
    assert "clamp" not in json.dumps(spec)
    round_points = [
        layer for layer in spec["layer"] if layer["mark"]["type"] == "point" and layer not in marks
    ]
    assert {row["y"] for layer in round_points for row in layer["data"]["values"]} == {1.0, 3.0}


def test_the_difference_from_dense_is_paired_by_seed_and_has_a_scale_of_its_own(reported):
    folder, _, html = reported
    rows = {(p["kind"], p["round"]): p["y"] for p in values_of(specs(html)["from_dense-0"]) if "kind" in p}
    accs = {(r["kind"], r["seed"], r["round"]): r["metrics"]["test_acc"] for r in load(folder).records}
    for kind, label in (("ticket", "ticket"), ("reinit", "re-initialised")):
        less = [100 * (accs[kind, s, 2] - accs["ticket", s, 0]) for s in (1, 2, 3)]
        assert rows[label, 2] == pytest.approx(statistics.fmean(less))
    assert '"type":"symlog"' in json.dumps(specs(html)["from_dense-0"], separators=(",", ":"))
    assert '"labelOverlap": false' in json.dumps(specs(html)["from_dense-0"])  # the tick at 0 stays


def test_a_picture_says_of_which_runs_it_is_how_many_and_what_the_band_means(reported):
    folder, out, _ = reported
    text = re.sub(r"<[^>]*>", " ", (out / "figure.svg").read_text())
    assert "lenet_mnist, n = 3 seeds." in text
    assert "95 % interval" in re.sub(r"\s+", " ", text)
    assert report.about(load(folder)) == "lenet_mnist, n = 3 seeds"


# ------------------------------------------------------------------------------------- sweeps of anything


@pytest.fixture
def swept(tmp_path):
    """Runs of two learning rates and two seeds, as `run` names them, and one of another experiment."""
    for lr in (0.001, 0.01):
        own = written(tmp_path / str(lr), seeds=(1, 2), rounds=2, config=[f"optimizer.lr={lr}"])
        for run in own.iterdir():
            target = tmp_path / "lenet_mnist" / f"{run.name},optimizer.lr={lr}"
            target.parent.mkdir(exist_ok=True)
            run.rename(target)
    return tmp_path / "lenet_mnist"


def test_the_runs_of_a_sweep_are_told_apart_by_what_varies(swept):
    runs = report.load(swept)
    assert len(runs.runs) == 8
    assert {(run.parameters["optimizer.lr"], run.seed) for run in runs.runs} == {
        (lr, seed) for lr in (0.001, 0.01) for seed in (1, 2)
    }
    assert all(list(run.parameters) == ["optimizer.lr"] for run in runs.runs)
    kinds = records.kinds_of(runs.records)
    assert kinds[:2] == ["ticket · optimizer.lr=0.001", "ticket · optimizer.lr=0.01"]
    assert len(kinds) == 4
    assert all(len(runs.of(kind)) == 2 for kind in kinds)
    pairs = report.differences(runs.records, "test_acc")
    assert pairs[0] == ["round", *(f"re-initialised · optimizer.lr={lr}" for lr in (0.001, 0.01))]
    assert len(pairs) == 4  # each paired with the ticket of its own learning rate


def test_several_folders_patterns_and_single_runs_are_read_together(swept):
    one = swept / "ticket-1,optimizer.lr=0.001"
    assert [run.parameters for run in report.load(one).runs] == [{}]
    both = report.load(one, f"{swept}/reinit-*lr=0.001")
    assert [(run.kind, run.seed) for run in both.runs] == [("ticket", 1), ("reinit", 1), ("reinit", 2)]


def test_a_sweep_is_reported_with_its_parameter_on_the_axis_and_claims_for_each_value(swept, capsys):
    out = swept.parent / "out"
    report.main([f"{swept}/*", "--out", str(out), "--x", "optimizer.lr", "--by", "optimizer.lr"])
    assert (out / "parameter.png").read_bytes()[:4] == b"\x89PNG"
    multiples = [spec for key, spec in specs((out / "report.html").read_text()).items() if "multiples" in key]
    assert [spec["title"] for spec in multiples] == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert len({json.dumps(spec["layer"][-1]["encoding"]["y"]["scale"]) for spec in multiples}) == 1
    text = (out / "report.md").read_text()
    assert "ticket · optimizer.lr=0.001" in text
    claims = [
        line for line in text.splitlines() if line.startswith("| the weights left") or "(optimizer" in line
    ]
    assert {value for value in ("0.001", "0.01") if any(f"(optimizer.lr={value})" in c for c in claims)} == {
        "0.001",
        "0.01",
    }
    merged = report.load(out)  # what was merged is told apart as the runs were
    assert {run.kind for run in merged.runs} == set(records.kinds_of(report.load(swept).records))
    for wrong, message in (("rate", "it does not vary .* optimizer.lr"), ("nothing", "does not vary")):
        with pytest.raises(SystemExit):
            report.main([str(swept), "--out", str(out), "--x", wrong])
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        report.main([str(swept), str(swept)])
    assert "Give a folder to write to" in capsys.readouterr().err


def test_a_parameter_whose_values_are_lists_has_a_chart_for_each_and_no_axis(tmp_path, capsys):
    for n, widths in enumerate(("[8,4]", "[16,4]")):
        own = written(tmp_path / str(n), seeds=(1,), rounds=1, config=[f"+task.widths={widths}"])
        shutil.copytree(own, tmp_path / "both" / f"{n}")
    places = [str(tmp_path / "both" / f"{n}") for n in (0, 1)]
    report.main([*places, "--out", str(tmp_path / "out"), "--by", "task.widths"])
    charts = specs((tmp_path / "out" / "report.html").read_text())
    titles = [spec["title"] for key, spec in charts.items() if "multiples" in key]
    assert titles == ["task.widths=[8, 4]", "task.widths=[16, 4]"]
    with pytest.raises(SystemExit):
        report.main([*places, "--out", str(tmp_path / "out"), "--x", "task.widths"])
    assert re.search(r"x=task.widths: \[8, 4\] is no\s+number", capsys.readouterr().err)


def sweep_of(folder, key, values, **options):
    """Runs of each value of a parameter, as a sweep leaves them."""
    (folder / "lenet_mnist").mkdir(parents=True)
    for n, value in enumerate(values):
        own = written(folder / str(n), kinds=("ticket",), config=[f"{key}={value}"], **options)
        for run in own.iterdir():
            run.rename(folder / "lenet_mnist" / f"{run.name},{n}")
    return folder / "lenet_mnist"


def test_rounds_that_are_not_drawn_and_values_that_lack_one_are_said(tmp_path):
    folders = [sweep_of(tmp_path / str(n), "rate", (0.1 * n,), seeds=(1, 2), rounds=n) for n in (2, 4)]
    figure = figures.AgainstParameter("rate")(report.load(*folders))
    titles = [chart.to_dict()["title"] for chart in figure.charts]
    assert titles[:3] == [
        "test accuracy at the end of the round, round 0 (100 % left)",
        "test accuracy at the end of the round, round 2 (64 % left)",
        "test accuracy at the end of the round, round 4 (41 % left)",
    ]
    assert "Drawn are rounds 0, 2, 4 of the 5 that there are." in figure.caption
    assert figure.caption.endswith("Runs of rate=0.2 have no round 4.")


def test_runs_that_differ_by_a_key_that_changes_nothing_are_named(swept, capsys):
    report.main([str(swept), "--out", str(swept.parent / "out")])
    said = "ticket, seed 1; 2: optimizer.lr=0.001 and optimizer.lr=0.01 gave the same records."
    printed = " ".join(capsys.readouterr().out.split())
    for text in (printed, *((swept.parent / "out" / f"report.{end}").read_text() for end in ("md", "html"))):
        assert said in text
    path = swept / "ticket-1,optimizer.lr=0.01" / "records.jsonl"
    path.write_text(path.read_text().replace('"val_loss": 0.5', '"val_loss": 0.6'))
    assert [words.partition(":")[0] for words in report.load(swept).idle] == [
        "reinit, seed 1; 2",
        "ticket, seed 2",
    ]
    assert (
        report.load(swept / "ticket-1,optimizer.lr=0.001", swept / "reinit-1,optimizer.lr=0.001").idle == []
    )


def test_a_text_is_told_apart_from_the_number_that_it_looks_like(tmp_path):
    folder = sweep_of(tmp_path, "+task.note", ("1", "'1'", "true"), seeds=(1,), rounds=1)
    runs = report.load(folder)
    assert [run.kind for run in runs.runs] == [f"ticket · task.note={note}" for note in ("1", "'1'", "True")]
    assert [row["task.note"] for row in report.listed(runs)] == [1, "'1'", True]
    assert len(figures.ByParameter("task.note")(runs).charts) == 3
    with pytest.raises(ValueError, match=r"x=task.note: '1' is no number"):
        figures.AgainstParameter("task.note")(runs)


@pytest.mark.parametrize(("value", "shown"), [(0.988, "98.8%"), (0.55, "55%"), (0.9, "90%")])
def test_a_chart_of_one_dot_has_a_tick_that_says_the_value(value, shown):
    row = {"kind": "ticket", "round": 0, "x": 100.0, "y": value, "n": 1, "censored": 0}
    x = figures.Axis("weights left (%)", log=True, reverse=True, values=[100])
    chart = figures.lines([row], ["ticket"], x, figures.axis_of("test_acc", "accuracy"), "accuracy")
    svg = vl_convert.vegalite_to_svg(chart.properties(width=300).to_dict())
    written = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert shown in written
    assert [text for text in written if text[0].isdigit()] == ["100", shown]


def test_an_axis_of_fractions_ends_at_what_a_fraction_can_be():
    rows = [{"kind": "ticket", "round": i, "x": i, "y": 0.5, "low": -0.4, "high": 1.2 - i} for i in (0, 1)]
    x, y = figures.Axis("round"), figures.axis_of("test_acc", "accuracy")

    def shown(rows):
        chart = figures.lines(rows, ["ticket"], x, y, "accuracy").to_dict()
        return [layer["encoding"]["y"]["scale"].get("domain") for layer in chart["layer"]]

    assert set(map(tuple, shown(rows))) == {(0, 1)}
    assert set(map(tuple, shown([{**rows[0], "high": 0.7}]))) == {(0, 0.7)}
    assert set(shown([{**row, "low": 0.3, "high": 0.9 + row["x"] / 99} for row in rows])) == {None}
    differences = [{**rows[0], "y": -0.2}, {**rows[1], "y": 0.1}]
    assert set(shown(differences)) == {None}


def test_seeds_are_what_means_are_taken_over_and_no_axis(swept, capsys):
    for key in ("seed", "order_seed"):
        with pytest.raises(SystemExit):
            report.main([str(swept), "--x", key])
        assert f"x={key}: figures show means over the seeds" in capsys.readouterr().err


def test_a_folder_without_records_says_why_it_has_none(swept, tmp_path):
    def said(folder):
        with pytest.raises(SystemExit) as refused:
            report.main([str(folder)])
        return str(refused.value)

    assert said(tmp_path / "absent").endswith(
        "absent: no records. There is no such folder. Name one that `lightning-prune run` has written, "
        "such as runs/mnist1d."
    )
    assert not (tmp_path / "absent").exists()
    parent = tmp_path / "runs"
    parent.mkdir()
    swept.rename(parent / "lenet_mnist")
    assert f"Name an experiment, such as {parent / 'lenet_mnist'}, or all: '{parent}/*'" in said(parent)
    for run in list((parent / "lenet_mnist").iterdir()):
        (run / "records.jsonl").unlink()
    (run / "FAILED").write_text("Traceback\nValueError: the loss is NaN\n")
    assert "failed: Traceback\nValueError: the loss is NaN\nMend that" in said(parent / "lenet_mnist")


def test_a_run_that_says_what_is_the_default_is_counted_once(swept, caplog):
    one = swept / "ticket-1,optimizer.lr=0.001"
    shutil.copytree(one, swept / "ticket-1,optimizer.lr=0.001,rate=0.2")
    runs = report.load(swept)
    assert len(runs.runs) == 8
    assert re.search(r"is the same run as .*, and counted once", caplog.text)
    assert all(len(runs.of(kind)) == 2 for kind in records.kinds_of(runs.records))


def test_where_data_lie_tells_no_runs_apart(swept):
    config = swept / "ticket-1,optimizer.lr=0.001" / "config.yaml"
    before = report.load(swept)
    there = OmegaConf.load(config)
    for place in (there.data, there.batches.splits):
        place.root = "/another/place"
    OmegaConf.save(there, config)
    moved = report.load(swept)
    assert [run.parameters for run in moved.runs] == [run.parameters for run in before.runs]
    shutil.copytree(config.parent, swept / "ticket-1,optimizer.lr=0.001,rate=0.2")
    there.data.root = there.batches.splits.root = "/a/third"
    OmegaConf.save(there, config)
    assert len(report.load(swept).runs) == len(before.runs)  # the copy is the same run, elsewhere


def test_networks_of_several_sizes_are_reported_together(swept, capsys):
    """A sweep over the width of a network: masks of other shapes have no overlap, all else is shown."""
    for folder in swept.glob("*lr=0.01"):
        for r, masks in {r: dict(stored) for r, stored in round_masks.masks_of(folder).items()}.items():
            round_masks.save(folder, r, {n: m[:, :9].clone() for n, m in masks.items()})
    out = swept.parent / "out"
    report.main([str(swept), "--out", str(out)])
    assert (out / "report.html").is_file()
    charts = specs((out / "report.html").read_text())
    whole = [
        s for key, s in charts.items() if "overlap" in key and s.get("title") == "last round, every pair"
    ]
    cells = whole[0]["data"]["values"]
    pairs = {(cell["mask"].split(" ")[-2], cell["other mask"].split(" ")[-2]) for cell in cells}
    assert pairs == {(lr, lr) for lr in ("optimizer.lr=0.001", "optimizer.lr=0.01")}


def test_a_network_that_is_sparse_from_the_first_step_is_no_dense_one(tmp_path):
    folder = written(tmp_path, kinds=("rigl",), seeds=(1, 2), rounds=0)
    for path in folder.glob("*/records.jsonl"):
        records.write(path, [{**row, "alive": row["total"] // 10} for row in records.read(path)[0]])
    runs = report.load(folder)
    assert figures.from_dense(runs) is None
    assert figures.relative_loss(runs) is None


def test_names_that_are_long_are_whole_in_a_legend(swept):
    out = swept.parent / "out"
    report.main([str(swept), "--out", str(out)])
    charts = specs((out / "report.html").read_text())
    text = json.dumps(charts["figure-0"])
    assert '"columns": 1' in text
    assert "re-initialised \\u00b7 optimizer.lr=0.001" in text


def test_a_metric_of_ones_own_is_what_the_report_shows(tmp_path):
    folder = written(tmp_path, kinds=("ticket",), seeds=(1, 2), rounds=2)
    for path in folder.glob("*/records.jsonl"):
        rows = records.read(path)[0]
        for row in rows:
            metrics = {
                k.replace("val_loss", "val/mae"): v for k, v in row["metrics"].items() if "_acc" not in k
            }
            row["metrics"] = {**metrics, "val/mae_at_early_stop": metrics["val/mae"]}
        records.write(path, rows)
    for path in folder.glob("*/config.yaml"):
        path.write_text(path.read_text().replace("monitor: val_loss", "monitor: val/mae"))
    shown = report.panels(report.load(folder))
    assert shown == {
        "val/mae_at_early_stop": "the lowest val/mae",
        "val/mae": "val/mae at the end of the round",
        "early_stop_step": "step of the lowest val/mae",
    }
    report.main([str(folder), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The lowest val/mae, mean over 2 seeds" in text
    assert "the lowest val/mae" in report.listed(report.load(folder))[0]


def test_data_orders_of_one_seed_are_told_apart_as_seeds_are(tmp_path):
    folder = written(tmp_path, kinds=("ticket",), seeds=(1,), rounds=1)
    config = (folder / "ticket-1" / "config.yaml").read_text()
    shutil.copytree(folder / "ticket-1", folder / "ticket-1,order_seed=7")
    other = config.replace("order_seed: 1", "order_seed: 7")
    assert other != config
    (folder / "ticket-1,order_seed=7" / "config.yaml").write_text(other)
    runs = report.load(folder)
    assert [(run.kind, run.seed) for run in runs.runs] == [("ticket", "1, order 1"), ("ticket", "1, order 7")]
    assert len({r["seed"] for r in runs.records}) == 2


@pytest.mark.parametrize(
    ("pairs", "over", "each"),
    [
        ([(1, 1), (2, 2)], "seeds", "2 seeds"),
        ([(1, 5)], "seeds", "1 seed"),
        ([(1, 1), (1, 2), (1, 3)], "data orders of one seed", "3 data orders of one seed"),
        ([(1, 1), (2, 1)], "seeds with one data order", "2 seeds with one data order"),
        ([(1, 1), (1, 2), (2, 1), (2, 2)], "pairs of seed and data order", "4 pairs of seed and data order"),
    ],
)
def test_what_n_counts_and_a_mean_is_over_is_said_everywhere(pairs, over, each, tmp_path):
    folder = tmp_path / "lenet_mnist"
    for n, (seed, order) in enumerate(pairs):
        made = written(
            tmp_path / str(n), kinds=("ticket",), seeds=(seed,), rounds=1, config=[f"order_seed={order}"]
        )
        shutil.copytree(made / f"ticket-{seed}", folder / f"ticket-{seed},order_seed={order}")
    runs = report.load(folder)
    assert runs.over == over
    assert report.about(runs) == f"lenet_mnist, n = {each}"
    assert f"Mean over {over} in the band" in figures.WeightsLeft()(runs).caption
    assert report.rounds(runs, {"test_acc": "accuracy"})[0]["n"] == len(pairs)
    text = report.text(runs, report.judged(runs))
    assert (f"mean over {each} (lowest to highest)" in text) == (len(pairs) > 1)
    html = report.page(runs, [], [], report.flat(runs.records))
    assert f"{each}, kinds: ticket" in " ".join(html.split())
    assert f"Mean over {over} [95 % interval], n: of how many runs." in html
    (tmp_path / "merged").mkdir()
    records.write(tmp_path / "merged" / "records.jsonl", runs.records)
    shutil.copy(
        folder / f"ticket-{pairs[0][0]},order_seed={pairs[0][1]}" / "config.yaml", tmp_path / "merged"
    )
    assert report.load(tmp_path / "merged").over == over


def test_what_a_run_of_the_first_version_left_is_read(tmp_path):
    folder = written(tmp_path, kinds=("ticket",), seeds=(1,), rounds=1)
    config = folder / "ticket-1" / "config.yaml"
    config.write_text(config.read_text().replace("lightning_prune.study.", "experiments."))
    assert "experiments.figures." in config.read_text()
    report.report(folder, out=tmp_path / "out")
    assert (tmp_path / "out" / "figure.png").is_file()
    assert "## Claims" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "results").glob("*/config.yaml")), ids=in_words
)
def test_every_committed_result_is_read(path):
    runs = report.load(path.parent)
    assert runs.records
    assert instantiate(runs.config.figures, _convert_="all")
