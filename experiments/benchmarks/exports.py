"""A pruned network in the files of other runtimes: bytes, differences of outputs, latency.

`python -m experiments.benchmarks.exports [--sparsity S] [--threads N] [--batch N] [--folder FOLDER]`. The
network has linear layers 1024-2048-1024. What is not installed is left out with a line that says so:
`pip install onnx onnxruntime onnxscript openvino nncf coremltools`. Core ML predicts on macOS only, so its
file is measured and not run.
"""

import argparse
import gzip
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from experiments.benchmarks.inference import burst, wide
from experiments.benchmarks.peers import (
    Case,
    Run,
    attempt,
    by_nncf,
    calibrated,
    called,
    eager,
    error,
    onnx_runtime,
    openvino,
    unlogged,
)
from lightning_prune.deploy.timing import alternated, low, machine, ratio


@dataclass(frozen=True)
class Export:
    """A kind of file, and how it runs here, if it does."""

    name: str
    needs: tuple[str, ...]
    write: Callable[[Case], Path]
    run: Callable[[Case, Path], Run] | None = None
    exact: bool = True  # in float32


def state_dict(case: Case) -> Path:
    """What torch saves."""
    path = case.folder / "torch.pt"
    torch.save(case.model.state_dict(), path)
    return path


def sparse_file(case: Case) -> Path:
    """`lp.save_sparse`."""
    path = case.folder / "sparse.safetensors"
    lp.save_sparse(case.model.state_dict(), path)
    return path


def accelerated(case: Case, path: Path) -> Run:
    """The file in a network of its class, accelerated."""
    model = wide().eval()
    model.load_state_dict(lp.load_sparse(path))
    fast = lp.accelerate(model, case.x)
    return lambda: fast(case.x)


def program(case: Case) -> Path:
    """`torch.export`."""
    path = case.folder / "program.pt2"
    torch.export.save(torch.export.export(case.model, (case.x,)), path)
    return path


def loaded(case: Case, path: Path) -> Run:
    """The graph of a file of `torch.export`."""
    model = torch.export.load(path).module()
    return lambda: model(case.x)


def openvino_files(case: Case) -> Path:
    """OpenVINO's graph and weights, in float32."""
    ov, path = import_module("openvino"), case.folder / "float32.xml"
    ov.save_model(ov.convert_model(case.onnx()), path, compress_to_fp16=False)
    return path


def core_ml(case: Case) -> Path:
    """Core ML, zeros as sparse constants."""
    ct, path = import_module("coremltools"), case.folder / "sparse.mlpackage"
    exported = torch.export.export(case.model, (case.x,)).run_decompositions({})
    options: dict[str, Any] = {
        "compute_precision": ct.precision.FLOAT32,
        "minimum_deployment_target": ct.target.iOS16,  # the first with sparse constants
        "pass_pipeline": ct.PassPipeline.DEFAULT_PRUNING,
    }
    ct.convert(exported, convert_to="mlprogram", **options).save(str(path))
    return path


def without_zeros(case: Case, path: Path) -> Run:
    """OpenVINO that reads int8 weights of more than 80 % zeros packed, where the CPU has AMX."""
    return openvino(case, path, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.8)


_ONNX = ("onnx", "onnxscript")
_NNCF = (*_ONNX, "openvino", "nncf")
EXPORTS = (
    Export("torch.save of the state_dict", (), state_dict, lambda case, path: eager(case)),
    Export("save_sparse, then accelerate", ("safetensors", "zstandard"), sparse_file, accelerated),
    Export("torch.export", (), program, loaded),
    Export("ONNX, by ONNX Runtime", (*_ONNX, "onnxruntime"), Case.onnx, onnx_runtime),
    Export("ONNX int8 static, by ONNX Runtime", (*_ONNX, "onnxruntime"), calibrated, onnx_runtime, False),
    Export("OpenVINO", (*_ONNX, "openvino"), openvino_files, openvino),
    Export("OpenVINO int8 by NNCF", _NNCF, by_nncf, openvino, False),
    Export("the same, sparse weights decompressed", _NNCF, by_nncf, without_zeros, False),
    Export("Core ML, sparse constants", ("coremltools",), core_ml),
)


def contents(path: Path) -> bytes:
    """Of a file, of all files of a folder, or of both files of OpenVINO."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files += [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return b"".join(file.read_bytes() for file in files if file.is_file())


@dataclass(frozen=True)
class Row:
    """What was found of an export."""

    export: Export
    dense: int  # bytes
    pruned: int
    zipped: int
    difference: float | None  # of outputs, over the largest; None where it does not run
    times: list[float]  # seconds

    def cells(self) -> tuple[str, ...]:
        """As text."""
        sizes = (f"{n / 1e6:.2f}" for n in (self.dense, self.pruned, self.zipped))
        difference = "not run" if self.difference is None else f"{self.difference:.0e}"
        return (self.export.name, *sizes, difference, f"{1e6 * low(self.times):,.0f}" if self.times else "-")


def measured(dense: Case, pruned: Case, rounds: int, at_least: float) -> list[Row]:
    """A row for each export that is possible here; `pruned.left_out` has the others."""
    expected = pruned.model(pruned.x).detach()
    files: dict[str, tuple[Path, Path]] = {}
    works: dict[str, Run] = {}
    for export in EXPORTS:

        def write(export: Export = export) -> tuple[Path, Path]:
            return export.write(dense), export.write(pruned)

        if found := attempt(pruned, export.name, export.needs, write):
            files[export.name] = found
            if export.run is not None:
                make = partial(export.run, pruned, found[1])
                if run := attempt(pruned, export.name, (), lambda make=make: called(make())):
                    works[export.name] = run
    with torch.inference_mode():
        errors = {name: error(run(), expected) for name, run in works.items()}
        times = alternated({n: burst(run) for n, run in works.items()}, rounds, at_least, warm_up=3)
    result: list[Row] = []
    for export in EXPORTS:
        if export.name in files:
            before, after = (contents(path) for path in files[export.name])
            zipped, runs = len(gzip.compress(after, 6)), times.get(export.name, [])
            result.append(
                Row(export, len(before), len(after), zipped, errors.get(export.name), runs),
            )
    return result


def case(model: nn.Module, x: torch.Tensor, folder: Path) -> Case:
    """A network and where its files go."""
    folder.mkdir(parents=True, exist_ok=True)
    return Case(model, x, folder)


def tell(rows: list[Row]) -> None:
    """The headlines."""
    times = {row.export.name: row.times for row in rows if row.times}
    worst = max(row.difference for row in rows if row.export.exact and row.difference is not None)
    headline("exports in float32: largest difference of outputs", worst, at_most=1e-5, unit="")
    plain, packed = "OpenVINO int8 by NNCF", "the same, sparse weights decompressed"
    if {plain, packed} <= times.keys():
        headline("OpenVINO int8, sparse weights decompressed over not", ratio(times[plain], times[packed]))


@unlogged()
def main() -> None:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--folder", type=Path, help="keep the files here")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    model, thin = wide().eval(), wide().eval()
    thin.load_state_dict(model.state_dict())
    lp.prune(thin, given.sparsity, allocate=lp.allocation.uniform)
    x = torch.randn(given.batch, 1024)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        dense, pruned = case(model, x, folder / "dense"), case(thin, x, folder / "pruned")
        rows = measured(dense, pruned, given.rounds, given.seconds)
    print(f"1024-2048-1024 at {given.sparsity:.0%}, batch {given.batch}. {machine()}\n")
    print("| file | dense, MB | pruned, MB | pruned and gzip -6, MB | largest difference | us |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |")
    for name, why in pruned.left_out.items():
        print(f"Left out: {name} ({why})")
    tell(rows)


if __name__ == "__main__":
    main()
