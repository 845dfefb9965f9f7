"""What benchmarks say: headlines in one table, which way is the fastest, what is left out and why."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import gpu
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import device, exports, inference, peers
from experiments.benchmarks.headlines import headline, headlines
from experiments.benchmarks.inference import DENSE, Measured
from experiments.benchmarks.peers import Case, Peer
from lightning_prune.deploy.timing import Ratio
from tests.test_conf import composed

EXACT, WIDE = Ratio(1.0, 1.0, 1.0), Ratio(2.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("measured", "aim", "verdict"),
    [
        (EXACT, {"at_least": 1}, "met"),
        (EXACT, {"at_least": 1.1}, "missed"),
        (EXACT, {"at_most": 1}, "met"),
        (EXACT, {"at_most": 0.9}, "missed"),
        (EXACT, {}, "-"),
        (WIDE, {"at_least": 1}, "met"),  # wherever in its range it is
        (WIDE, {"at_least": 3}, "too noisy to say"),
        (WIDE, {"at_most": 0.5}, "missed"),
        (0.5, {"at_most": 1, "unit": " %"}, "met"),
    ],
)
def test_a_headline_is_read_as_it_was_said(capsys, measured, aim, verdict):
    headline("a, over b", measured, **aim)
    (row,) = headlines(["before", *capsys.readouterr().out.splitlines(), "| a | table | of | its own |"])
    assert (row.what, row.verdict) == ("a, over b", verdict)
    shown = str(measured) if isinstance(measured, Ratio) else "0.5 %"
    assert row.measured == shown


def test_one_table_has_the_headlines_of_all_and_says_what_failed(monkeypatch, capsys, tmp_path):
    package = tmp_path / "experiments" / "benchmarks"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "good.py").write_text("print('a long table')\nprint('headline | a step | 1.05x | - | -')")
    (package / "bad.py").write_text("print('headline | before | 2.00x | - | -')\nraise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(benchmarks, "BENCHMARKS", ("bad", "good"))
    assert benchmarks.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "a long table" in lines
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = [line.split()[:2] for line in lines[rule + 1 :] if line.strip()]
    assert rows == [["before", "2.00x"], ["bad", "failed"], ["a", "step"]]
    assert benchmarks.main(["good"]) == 0


def test_a_benchmark_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["speed"])
    assert "unknown: speed; allowed are selection, sharded" in capsys.readouterr().err


def test_every_benchmark_of_the_table_is_a_module_and_has_headlines():
    for name in benchmarks.BENCHMARKS:
        source = (Path(benchmarks.__file__).parent / f"{name}.py").read_text()
        assert "headline(" in source, name


def test_without_a_gpu_nothing_is_run_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--folder", str(tmp_path / "results")]) == 1
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit, match="There is no GPU that torch can use here"):
        device.main([])


def test_what_ran_on_a_gpu_is_written_with_its_name_and_what_failed_is_said(tmp_path, monkeypatch):
    (tmp_path / "writes.py").write_text(
        "import pathlib, sys\nrun = pathlib.Path(sys.argv[1], 'name', 'ticket-1')\nrun.mkdir(parents=True)\n"
        "(run / 'records.jsonl').write_text('a record')\nprint('it ran')"
    )
    (tmp_path / "fails.py").write_text("print('it began')\nraise SystemExit(3)")
    (tmp_path / "lasts.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card 80 (PCIe)")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu")
    parts = (
        gpu.Part("one", ("writes", "{}/runs"), 30),
        gpu.Part("two", ("fails",), 30),
        gpu.Part("three", ("lasts",), 1),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    for _ in range(2):  # the second time anew
        assert gpu.main([]) == 1
    folder = tmp_path / "gpu" / "a_card_80_pcie"
    assert (folder / "records.jsonl").read_text() == "a record"
    assert (folder / "one.txt").read_text() == "it ran\n"
    assert (folder / "two.txt").read_text() == "it began\n"
    said = (folder / "README.md").read_text()
    assert said.startswith("A Card 80 (PCIe), ")
    assert "one: passed" in said
    assert "two: failed with exit status 3" in said
    assert "three: was ended after 1 s" in said


def test_the_parts_that_run_on_a_gpu_exist_and_end_within_ten_minutes():
    assert sum(part.seconds for part in gpu.PARTS) < 600
    tests, benchmark, experiment = (part.command for part in gpu.PARTS)
    assert tests[:4] == ("pytest", "-q", "-m", "gpu")
    assert find_spec(benchmark[0])
    cfg = composed(*(argument.format("results") for argument in experiment[1:]))
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.runs) == ("gpu", 1, "results/runs")


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_can_be_rehearsed_on_the_cpu(capsys):
    device.main(["--device", "cpu"])
    out = capsys.readouterr().out
    assert "a rehearsal at small sizes" in out
    said = [row.what for row in headlines(out.splitlines())]
    assert [what.split(",")[0] for what in said] == ["a step with masks over one without", "resnet18"]
    assert "100,000 weights to 80%" in out


def fail(case):
    raise RuntimeError("no such operator\nand a long trace")


def test_what_is_missing_or_fails_is_left_out_and_said(tmp_path):
    case = Case(nn.Linear(2, 2), torch.ones(1, 2), tmp_path)
    ways = (
        peers.PEERS[0],
        Peer("absent", ("torch", "no_such_module"), fail),
        Peer("failing", ("torch",), fail),
        Peer("failing later", (), lambda case: lambda: fail(case)),
    )
    found = peers.runs(case, ways)
    assert list(found) == ["torch"]
    assert torch.equal(found["torch"](), case.model(case.x))
    assert case.left_out == {
        "absent": "no_such_module is not installed: pip install no_such_module",
        "failing": "RuntimeError: no such operator",
        "failing later": "RuntimeError: no such operator",
    }


def measured(fast, peers, forms=None):
    forms = forms or dict.fromkeys(fast, "2 csr")
    ours = {sparsity: 30 * [time] for sparsity, time in fast.items()}
    return Measured("a network", {name: 30 * [time] for name, time in peers.items()}, ours, forms, {})


def test_the_fastest_dense_way_decides_from_where_a_sparse_form_wins():
    one = measured(
        {0.8: 9.0, 0.9: 5.0, 0.95: 3.0, 0.98: 1.0},
        {"torch": 8.0, "ONNX Runtime": 6.0, "ORT int8 static": 2.0},
    )
    assert (one.fastest(int8=False), one.fastest(int8=True)) == ("ONNX Runtime", "ORT int8 static")
    assert (one.wins_from(int8=False), one.wins_from(int8=True)) == ("90%", "98%")
    assert one.gain(0.95, "torch").value == pytest.approx(8 / 3)


def test_a_dense_copy_wins_nothing_and_a_gain_below_a_loss_does_not_count():
    ways = {"torch": 8.0}
    assert measured({0.9: 4.0, 0.98: 4.0}, ways, {0.9: "2 csr", 0.98: DENSE}).wins_from(int8=False) == "-"
    assert measured({0.8: 4.0, 0.9: 9.0, 0.98: 4.0}, ways).wins_from(int8=False) == "98%"


def test_inference_is_measured_with_nothing_but_torch_installed(monkeypatch, capsys):
    only = (peers.PEERS[0], Peer("OpenVINO", ("no_such_module",), fail))
    monkeypatch.setattr(inference, "runs", lambda case: peers.runs(case, only))
    small = (inference.Network("small", lambda: nn.Linear(8, 8), (8,), (4,)),)
    monkeypatch.setattr(inference, "NETWORKS", small)
    threads = torch.get_num_threads()
    command = ["inference", "--rounds", "3", "--seconds", "0", "--threads", "1", "--sparsity", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    try:
        inference.main()
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "Left out: OpenVINO (no_such_module is not installed: pip install no_such_module)" in shown
    assert "small, batch 4, 1 threads: measured 3 times" in shown
    assert "|  | torch | ours 50% |" in shown


def test_an_export_has_its_bytes_and_its_difference(tmp_path, monkeypatch):
    """A file of fixed bytes, one that runs, and one that is only written."""

    def write(case):
        path = case.folder / "file"
        path.write_bytes(1000 * bytes([int(case.model.weight.detach().sum() != 0)]))
        return path

    double = exports.Export("doubled", (), write, lambda case, path: lambda: 2 * case.model(case.x))
    kinds = (double, exports.Export("only written", (), write), exports.Export("absent", ("no_such",), write))
    monkeypatch.setattr(exports, "EXPORTS", kinds)
    model = nn.Linear(2, 2, bias=False)
    cases = [exports.case(model, torch.ones(1, 2), tmp_path / name) for name in ("dense", "pruned")]
    first, second = exports.measured(*cases, rounds=2, at_least=0)
    assert (first.dense, first.pruned, first.difference, len(first.times)) == (1000, 1000, 1.0, 2)
    assert first.zipped < 100
    assert (second.difference, second.times) == (None, [])
    assert second.cells()[-2:] == ("not run", "-")
    assert list(cases[1].left_out) == ["absent"]


def test_the_bytes_of_an_export_are_those_of_all_its_files(tmp_path):
    (tmp_path / "graph.xml").write_bytes(b"12")
    (tmp_path / "graph.bin").write_bytes(b"345")
    assert exports.contents(tmp_path / "graph.xml") == b"12345"
    assert len(exports.contents(tmp_path)) == 5
