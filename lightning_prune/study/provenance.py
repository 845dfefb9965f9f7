"""What a run was made with: command, commit, versions, machine; and digests of sources and data."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_prune.study.configs import build, flattened, plain
from lightning_prune.study.data import Batches

NAMED = (
    "lightning-prune",
    "torch",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "torchvision",
)


def provenance() -> dict[str, Any]:
    """What a run is made with, here and now.

    Returns:
        `command`, `date`, `commit` and `changed` (the files that differ from it) of this package, the same
        of the folder in which the command was given as `here`, `versions`, `python`, `machine`, `cpu` and
        `gpus`.
    """
    return {
        "command": " ".join(["lightning-prune run", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **checkout(Path(__file__).parent, "."),
        "here": checkout(Path.cwd()),
        "versions": {name: number for name in NAMED if (number := _version(name))},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def checkout(folder: Path, tracked: str | None = None) -> dict[str, Any]:
    """The commit of a folder, and which files differ from it; an installed package is in none."""
    if tracked is not None and not _git(folder, "ls-files", tracked):
        return {"commit": "not a git checkout", "changed": []}
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else ""
    changed = [line.strip().split(maxsplit=1)[1] for line in status.splitlines()]
    return {"commit": commit or "not a git checkout", "changed": changed}


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The model of the processor, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------- digests


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """What the code is that a config names: {package: version, or digest of the files that it may change}."""
    named = [v for k, v in flattened(config).items() if k.split(".")[-1] in ("_target_", "path") and v]
    packages = {name.split(".")[0] for name in named if isinstance(name, str) and "/" not in name}
    found = {name: source(name) for name in sorted({*packages, "lightning_prune", "torch", "lightning"})}
    return {name: code for name, code in found.items() if code}


def made_of(cfg: DictConfig) -> dict[str, str]:
    """`sources` of a config, and as `the data` their `content`, where they can be read."""
    found = sources(plain(cfg))
    try:
        return {**found, "the data": content(build(cfg, "batches"), plain(cfg.batches))}
    except ValueError:
        return found


def changed_since(folder: Path, now: Mapping[str, str]) -> list[str]:
    """What is another now than when the run in a folder was made, as far as it says: packages, the data."""
    try:
        then = json.loads((folder / "run.json").read_text()).get("sources", {})
    except (OSError, json.JSONDecodeError):
        return []
    return sorted(name for name in then.keys() & now.keys() if then[name] != now[name])


@cache
def source(package: str) -> str | None:
    """The version of an installed package; of any other the digest of its files; None: there is none."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin)
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    if installed and package != "lightning_prune":
        return ", ".join(version(name) for name in _distributions().get(package, ()))
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return _digest((str(f.relative_to(path.parent)).encode(), f.read_bytes()) for f in files)


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Which distributions installed packages come from: all of them are read for it, which takes seconds."""
    return packages_distributions()


def content(batches: Any, config: Mapping[str, Any]) -> str:
    """A digest of the data: of the tensors of `Batches`; of any other the files that its config names.

    Of a folder it holds names, sizes and times of what is in it.
    """
    if isinstance(batches, Batches):
        splits = (batches.splits.train, batches.splits.val, batches.splits.test)
        tensors = [tensor.contiguous() for pair in splits for tensor in pair]
        return _digest((str(t.shape).encode(), t.numpy().tobytes()) for t in tensors)
    paths = [Path(v) for v in flattened(config).values() if isinstance(v, str) and v and Path(v).exists()]
    parts: list[tuple[bytes, Any]] = []
    for path in paths:
        if path.is_file():
            parts.append((str(path).encode(), path.read_bytes()))
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            stat = file.stat()
            parts.append((str(file).encode(), f"{stat.st_size} {stat.st_mtime_ns}".encode()))
    return _digest(parts)


def _digest(parts: Iterable[tuple[bytes, Any]]) -> str:
    found = hashlib.sha256()
    for name, content in parts:
        found.update(name)
        found.update(content)
    return found.hexdigest()[:16]
