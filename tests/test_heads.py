"""Heads of attentions go as a whole, whatever class an attention is of, and load again in a fresh network."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_prune import load_pruned
from lightning_prune.structured import discover
from lightning_prune.structured import units as structure
from lightning_prune.structured.multihead import FewerHeads
from lightning_prune.structured.surgery import cut
from lightning_prune.structured.trial import run, tensors_in
from tests.test_channels import masked, randomized

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
WORDS = {"input_ids": torch.tensor([[1, 5, 3, 9, 2], [4, 2, 8, 8, 7]])}
NO_CACHE = {**WORDS, "use_cache": False}
PIXELS = {"pixel_values": torch.rand(2, 3, 32, 32)}
# class of transformers -> (its configuration, input, a layer that makes heads, how many of them, its counts)
TRANSFORMERS = {
    "Bert": (
        {**SMALL, "vocab_size": 19},
        WORDS,
        ("encoder.layer.1.attention.self.query", 4),
        {"num_attention_heads": 3, "all_head_size": 24, "attention_head_size": 8},
    ),
    "DebertaV2": (  # which multiplies samples and heads in one dimension
        {**SMALL, "vocab_size": 19},
        WORDS,
        ("encoder.layer.1.attention.self.query_proj", 4),
        {"num_attention_heads": 3, "all_head_size": 24},
    ),
    "ViT": (
        {**SMALL, "image_size": 32, "patch_size": 8},
        PIXELS,
        ("layers.1.attention.q_proj", 4),
        {"num_attention_heads": 3, "head_dim": 8},
    ),
    "GPT2": (
        {"vocab_size": 19, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
        NO_CACHE,
        ("h.1.attn.c_attn", 4),
        {"num_heads": 3, "split_size": 24, "head_dim": 8, "embed_dim": 32},
    ),
    "Llama": (
        {**SMALL, "vocab_size": 19, "num_key_value_heads": 2},
        NO_CACHE,
        ("layers.1.self_attn.q_proj", 2),  # key and value heads; each goes with two query heads
        {"head_dim": 8, "num_key_value_groups": 2},
    ),
    "Mistral": (
        {**SMALL, "vocab_size": 19, "num_key_value_heads": 2},
        NO_CACHE,
        ("layers.1.self_attn.q_proj", 2),
        {"head_dim": 8, "num_key_value_groups": 2},
    ),
    "Qwen2": (
        {**SMALL, "vocab_size": 19, "num_key_value_heads": 4},
        NO_CACHE,
        ("layers.1.self_attn.q_proj", 4),
        {"head_dim": 8},
    ),
    "T5": (
        {"vocab_size": 19, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        {**NO_CACHE, "decoder_input_ids": WORDS["input_ids"]},
        ("encoder.block.0.layer.0.SelfAttention.q", 4),  # of all layers: they share the bias of positions
        {"n_heads": 3, "inner_dim": 24, "key_value_proj_dim": 8},
    ),
    "Whisper": (
        {"vocab_size": 19, "d_model": 32, "num_mel_bins": 8, "encoder_layers": 1, "decoder_layers": 1}
        | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40)
        | {"max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0}
        | dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        {"input_features": torch.rand(2, 8, 16), "decoder_input_ids": WORDS["input_ids"], "use_cache": False},
        ("decoder.layers.0.encoder_attn.q_proj", 4),
        {"num_heads": 3, "head_dim": 8},
    ),
}


def transformer(name):
    library = pytest.importorskip("transformers")
    config, x, layer, counts = TRANSFORMERS[name]
    return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**config)), x, layer, counts


def outputs(model, x):
    with torch.no_grad():
        return [t for t in tensors_in(run(model, x)) if t.is_floating_point()]


def far(model, other, x):
    pairs = list(zip(outputs(model, x), outputs(other, x), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def couplings(model, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LayerNorm takes its mean over them")
        return discover(model, x)


def one_less(found):
    """All units but the second of each coupling."""
    return {n: torch.arange(c.units) != 1 for n, c in found.items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_heads_go_whole_in_any_attention_and_load_again(name, tmp_path):
    model, x, (layer, heads), counts = transformer(name)
    if layer not in dict(model.named_modules()):
        pytest.skip(f"this version of transformers has no {layer} in {name}")
    fresh = transformer(name)[0]
    randomized(model)
    found = couplings(model, x)
    (own,) = [c for c in found.values() if (layer, "weight") in [site[:2] for site in c.filters]]
    assert own.units == heads
    removed = structure.cut_of(found, one_less(found))
    twin, whole = masked(model, removed), deepcopy(model)
    cut(model, removed)
    assert far(model, twin, x) < 1e-5 < 1e-3 < far(model, whole, x)
    attention = model.get_submodule(layer.rpartition(".")[0])
    assert {name: getattr(attention, name) for name in counts} == counts
    torch.save(model.state_dict(), tmp_path / "small.pt")
    loaded = load_pruned(fresh, tmp_path / "small.pt")
    assert far(loaded, model, x) == 0.0
    there = loaded.get_submodule(layer.rpartition(".")[0])
    assert {name: getattr(there, name) for name in counts} == counts


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_what_each_head_has_of_its_own_goes_with_it(name):
    """Biases of relative positions, in a windowed attention."""
    timm = pytest.importorskip("timm")
    options = {"depths": (2, 2)} if name.startswith("swin") else {"depth": 1}
    model = randomized(timm.create_model(name, img_size=64 if "vit" in name else 56, **options))
    x = torch.randn(1, 3, 64, 64) if "vit" in name else torch.randn(1, 3, 56, 56)
    found = couplings(model, x)
    heads = {n: c for n, c in found.items() if c.structure == ("heads",)}
    if not heads and "vit" in name and not hasattr(model.blocks[0].attn, "attn_dim"):
        pytest.skip("this version of timm reshapes to the width of the input, which needs all heads")
    assert [c.units for c in heads.values()] == ([3] if "vit" in name else [3, 3, 6, 6])
    tables = [site for c in heads.values() for site in c.sites if site[1] == "relative_position_bias_table"]
    assert len(tables) == (0 if "vit" in name else 4)
    removed = structure.cut_of(found, one_less(found))
    twin = masked(model, removed)
    cut(model, removed)
    assert far(model, twin, x) < 1e-5


def test_what_is_kept_for_evaluation_is_that_of_the_cut_network():
    """Biases of positions, which are computed once in evaluation."""
    timm = pytest.importorskip("timm")
    model, x = (
        randomized(timm.create_model("tiny_vit_5m_224", depths=(1, 1, 1, 1))),
        torch.randn(1, 3, 64, 64),
    )
    outputs(model, x)
    kept = [m for m in model.modules() if getattr(m, "attention_bias_cache", None)]
    assert kept
    found = couplings(model, x)
    assert any(c.structure == ("heads",) for c in found.values())
    removed = structure.cut_of(found, one_less(found))
    twin = masked(model, removed)
    twin.train().eval()  # which forgets
    cut(model, removed)
    assert not any(m.training for m in model.modules())
    assert far(model, twin, x) < 1e-5


# ---------------------------------------------------------------------------- nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_of_torch_loses_heads(tmp_path):
    def make():
        return nn.Transformer(16, 4, 2, 2, 24, batch_first=True)

    model, x = randomized(make()), (torch.randn(3, 6, 16), torch.randn(3, 5, 16))
    found = couplings(model, x)
    assert sum(name.endswith("in_proj_weight") for name in found) == 6
    removed = structure.cut_of(found, one_less(found))
    twin = masked(model, removed)
    cut(model, removed)
    assert far(model, twin, x) < 1e-5
    torch.save(model.state_dict(), tmp_path / "small.pt")
    assert far(load_pruned(make(), tmp_path / "small.pt"), model, x) == 0.0
    torch.save(model, tmp_path / "all.pt")
    whole = torch.load(tmp_path / "all.pt", weights_only=False)
    assert far(whole, model, x) == 0.0
    padding = torch.arange(6) > torch.tensor([[5], [3], [1]])
    with torch.no_grad():  # torch has a fused path for masks of padding
        encoded = (net.eval().encoder(x[0], src_key_padding_mask=padding) for net in (model, twin))
        torch.testing.assert_close(*(e[:, :2] for e in encoded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_with_fewer_heads_is_that_of_torch_otherwise(batch_first):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    own = deepcopy(whole)
    own.__class__ = FewerHeads
    q, kv = torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    causal = torch.ones(4, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    for options in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": torch.randn(6, 4, 5)},
        {"attn_mask": causal.float() * -5, "key_padding_mask": padding.float() * -9},
        {"key_padding_mask": padding, "need_weights": False},
    ):
        order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
        want, got = (m(order(q), order(kv), order(kv), **options) for m in (whole, own))
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) == (want[1] is None)
        if want[1] is not None:
            torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(own(q[0], kv[0], kv[0]), whole(q[0], kv[0], kv[0]))
    with pytest.raises(ValueError, match="attn_mask=None"):
        own(q, q, q, is_causal=True)
