"""Other ways to run a network on a CPU: what `accelerate` is compared with, and exports are run by.

What is not installed, or does not take a network, is left out, and `Case.left_out` says why. Nothing of
this is needed by the package: `pip install onnx onnxruntime onnxscript openvino nncf`.
"""

import logging
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Run: TypeAlias = Callable[[], Tensor]  # the network on its input


@dataclass
class Case:
    """A network, an input of the batch that is measured, and a folder for the files made of them."""

    model: nn.Module
    x: Tensor
    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)  # name of a peer: why

    def onnx(self) -> Path:
        """The network as an ONNX file."""
        path = self.folder / "float32.onnx"
        if not path.exists():
            names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
            torch.onnx.export(
                self.model, (self.x,), path, dynamo=True, external_data=False, verbose=False, **names
            )
        return path


@dataclass(frozen=True)
class Peer:
    """A way to run a network."""

    name: str
    needs: tuple[str, ...]  # modules that must be installed
    build: Callable[[Case], Run]
    int8: bool = False


def eager(case: Case) -> Run:
    """PyTorch as it is."""
    return lambda: case.model(case.x)


def compiled(case: Case) -> Run:
    """`torch.compile`."""
    torch.compiler.reset()
    model = torch.compile(case.model)
    return lambda: model(case.x)


def onnx_runtime(case: Case, path: Path | None = None) -> Run:
    """ONNX Runtime with as many threads as PyTorch has."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path or case.onnx()), options, providers=["CPUExecutionProvider"])
    inputs = {"x": case.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def quantized(case: Case) -> Path:
    """ONNX with int8 weights, one scale for each output, and scales of inputs that are found as it runs."""
    path = case.folder / "dynamic.onnx"
    if not path.exists():
        quantization = import_module("onnxruntime.quantization")
        weights = quantization.QuantType.QInt8
        quantization.quantize_dynamic(case.onnx(), path, weight_type=weights, per_channel=True)
    return path


def calibrated(case: Case) -> Path:
    """ONNX with int8 weights and inputs, with scales of inputs that the example gives."""
    path = case.folder / "static.onnx"
    if not path.exists():
        quantization = import_module("onnxruntime.quantization")

        class Once(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = iter([{"x": case.x.numpy()}])

            def get_next(self) -> Any:
                return next(self.batches, None)

        weights = quantization.QuantType.QInt8
        quantization.quantize_static(case.onnx(), path, Once(), weight_type=weights, per_channel=True)
    return path


def openvino(case: Case, path: Path | None = None, **options: Any) -> Run:
    """OpenVINO, for latency, with as many threads as PyTorch has."""
    core = import_module("openvino").Core()
    given = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        **options,
    }
    model = core.compile_model(core.read_model(path or case.onnx()), "CPU", given)
    request = model.create_infer_request()
    inputs = {0: case.x.numpy()}

    def run() -> Tensor:
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(found.values())))

    return run


def by_nncf(case: Case) -> Path:
    """OpenVINO's files, weights and inputs in int8 by NNCF, with scales that the example gives."""
    path = case.folder / "int8.xml"
    if not path.exists():
        ov, nncf = import_module("openvino"), import_module("nncf")
        whole = ov.Core().read_model(case.onnx())
        ov.save_model(nncf.quantize(whole, nncf.Dataset([case.x.numpy()])), path)
    return path


_ONNX = ("onnx", "onnxscript")
PEERS = (
    Peer("torch", (), eager),
    Peer("torch.compile", (), compiled),
    Peer("ONNX Runtime", (*_ONNX, "onnxruntime"), onnx_runtime),
    Peer("OpenVINO", (*_ONNX, "openvino"), openvino),
    Peer("ORT int8 dynamic", (*_ONNX, "onnxruntime"), lambda c: onnx_runtime(c, quantized(c)), int8=True),
    Peer("ORT int8 static", (*_ONNX, "onnxruntime"), lambda c: onnx_runtime(c, calibrated(c)), int8=True),
    Peer("OpenVINO int8", (*_ONNX, "openvino", "nncf"), lambda c: openvino(c, by_nncf(c)), int8=True),
)


def missing(needs: Iterable[str]) -> str:
    """What to say of modules that are not installed; nothing, if all are.

    >>> missing(["torch"]), missing(["torch", "no_such_module"])
    ('', 'no_such_module is not installed: pip install no_such_module')
    """
    absent = [name for name in needs if find_spec(name) is None]
    are = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {are} not installed: pip install {' '.join(absent)}" if absent else ""


def runs(case: Case, peers: Iterable[Peer] = PEERS) -> dict[str, Run]:
    """How to run the network in each way that is possible here; `case.left_out` has the others."""
    found: dict[str, Run] = {}
    for peer in peers:
        if run := attempt(case, peer.name, peer.needs, lambda build=peer.build: called(build(case))):
            found[peer.name] = run
    return found


def called(run: Run) -> Run:
    """Called once: what cannot run fails here."""
    run()
    return run


def attempt(case: Case, name: str, needs: Iterable[str], make: Callable[[], T]) -> T | None:
    """What is made, or None where a module is missing or anything fails: `case.left_out` says why."""
    why = missing(needs)
    if not why:
        try:
            with quiet():
                return make()
        except Exception as error:  # whatever a library of others raises
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    case.left_out[name] = why
    return None


@contextmanager
def unlogged() -> Generator[None]:
    """Without what is logged, below errors; afterwards as before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet() -> Generator[None]:
    """Without what exporters and compilers print, warn of and log, below errors."""
    with unlogged(), warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest output.

    >>> error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0]))
    0.25
    """
    return float((found - expected).abs().max() / expected.abs().max())
