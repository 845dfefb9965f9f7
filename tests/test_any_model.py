"""The laws on third-party models, unmodified, random weights: two prunings with rewinding on each.

One fit for each model; every law is then a test of its own on what that fit left and was seen to do.
"""

import itertools
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.layers import prunable
from lightning_prune.masks import alive
from tests.networks import dead_are_zero, fitter, same
from tests.test_laws import description, hooks_of

RATE, ROUNDS, STEPS, TO_STEP = 0.3, 2, 2, 1

# one of the smallest builders of each family of torchvision.models -> size of the image
TORCHVISION = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_16": 224,
}
# one module of timm.models each: the smallest of at most 30M parameters
TIMM = {
    "eca_botnext26ts_256": 256,
    "mobileone_s0": 64,
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "convit_tiny": 224,
    "convmixer_768_32": 64,
    "convnext_atto_rms": 64,
    "cpubone_nano": 64,
    "crossvit_tiny_240": 240,
    "cs3darknet_s": 64,
    "cspnext_tiny": 64,
    "davit_tiny": 64,
    "deit_tiny_patch16_224": 224,
    "densenet121": 64,
    "dla34": 64,
    "dpn48b": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "tinynet_e": 64,
    "efficientvim_m1": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "vit_tiny_patch16_dinov3_qkvb": 256,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "gcvit_xxtiny": 224,
    "ghostnet_050": 64,
    "hardcorenas_b": 64,
    "hgnetv2_b0": 64,
    "hiera_tiny_224": 224,
    "hrnet_w18_small": 64,
    "iformer_t": 64,
    "inception_next_atto": 64,
    "inception_v3": 96,
    "lcnetv2_small": 64,
    "levit_128": 224,
    "lowformer_b0": 64,
    "mambaout_femto": 64,
    "maxvit_pico_rw_256": 256,
    "poolformerv2_s12": 64,
    "gmlp_ti16_224": 224,
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,
    "mvitv2_tiny": 224,
    "nest_tiny_jx": 224,
    "nf_regnet_b0": 64,
    "pit_xs_224": 224,
    "pvt_v2_b0": 64,
    "rdnet_tiny": 64,
    "regnetx_002": 64,
    "repghostnet_050": 64,
    "repvit_m1": 64,
    "res2net50_26w_4s": 64,
    "resnest14d": 64,
    "resnet10t": 64,
    "resnetv2_18": 64,
    "rexnet_100": 64,
    "legacy_seresnet18": 64,
    "sequencer2d_s": 224,
    "shvit_s1": 64,
    "skresnet18": 64,
    "starnet_s050": 64,
    "swiftformer_xs": 64,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "tiny_vit_5m_224": 64,
    "tnt_s_legacy_patch16_224": 224,
    "twins_svt_small": 64,
    "visformer_tiny": 224,
    "vit_tiny_patch16_224": 224,
    "vit_tiny_r_s16_p8_224": 224,
    "vitamin_small_224": 224,
    "volo_d1_224": 224,
    "vovnet39a": 64,
    "legacy_xception": 64,
    "xcit_nano_12_p16_224": 224,
}
# by their config classes, tiny: name -> (model, config, its arguments, the inputs' kind)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", {**SMALL, "vocab_size": 99, "max_position_embeddings": 32}),
    "BertForSequenceClassification": ("BertConfig", {**SMALL, "vocab_size": 99}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 99, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}),
    "LlamaForCausalLM": ("LlamaConfig", {**SMALL, "vocab_size": 99, "num_key_value_heads": 2}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "decoder_start_token_id": 0},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
        | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
        | {"max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0}
        | dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    ),
}
TIED = {  # what a head shares with an embedding, under its first name
    "BertForMaskedLM": "bert.embeddings.word_embeddings.weight",
    "GPT2LMHeadModel": "transformer.wte.weight",
    "T5ForConditionalGeneration": "shared.weight",
    "WhisperForConditionalGeneration": "model.decoder.embed_tokens.weight",
}
MODELS = [
    *(f"torchvision {name}" for name in TORCHVISION),
    *(f"timm {name}" for name in TIMM),
    *(f"transformers {name}" for name in TRANSFORMERS),
]
FAST = {
    "timm starnet_s050",
    "timm xcit_nano_12_p16_224",
    "torchvision mobilenet_v3_small",
    "torchvision squeezenet1_1",
    *(f"transformers {name}" for name in TRANSFORMERS),
}
# over 100M parameters: which of them would be pruned, on the meta device
LARGE = [
    "vit_huge_patch14_224",
    "convnext_xxlarge",
    "resnetv2_152x4_bit",
    "swinv2_cr_giant_224",
    "regnety_1280",
    "eva02_large_patch14_224",
    "beit_large_patch16_224",
    "deit3_huge_patch14_224",
    "tf_efficientnet_l2",
    "maxvit_xlarge_tf_224",
    "vgg16",
    "mixer_l16_224",
    "deepseek_vit_412m",
    "gemma4_vit_167m",
]


def table(names, fast=FAST):
    return [pytest.param(n, marks=[] if n in fast else pytest.mark.slow) for n in names]


def build(name):
    """The model, and a batch of the arguments that it is called with."""
    library, name = name.split()
    images = lambda size: torch.randn(2, 3, size, size)  # noqa: E731
    if library == "torchvision":
        models = pytest.importorskip("torchvision").models
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, num_classes=10, **options), {
            "": images(TORCHVISION[name])
        }
    if library == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=10), {"": images(TIMM[name])}
    library = pytest.importorskip("transformers")
    config, options = TRANSFORMERS[name]
    model = getattr(library, name)(getattr(library, config)(**options))
    tokens = torch.randint(2, 99, (2, 12))
    inputs = {
        "ViTForImageClassification": {"pixel_values": images(32), "labels": torch.tensor([0, 1])},
        "BertForSequenceClassification": {"input_ids": tokens, "labels": torch.tensor([0, 1])},
        "WhisperForConditionalGeneration": {"input_features": torch.randn(2, 8, 32), "labels": tokens},
    }
    return model, inputs.get(name, {"input_ids": tokens, "labels": tokens})


class Task(LightningModule):
    """Any model, trained on one batch; the names and tensors of its state are its own."""

    def __init__(self, net, batch):
        super().__init__()
        self.net, self.batch = net, batch

    def training_step(self, batch, batch_idx):
        out = self.net(batch[""]) if "" in batch else self.net(**batch)
        loss = getattr(out, "loss", None)
        return loss if loss is not None else sum(t.float().square().log1p().mean() for t in tree_leaves(out))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)

    def train_dataloader(self):
        return DataLoader([self.batch] * STEPS, batch_size=None)


@dataclass
class Seen(Callback):
    """What is to be seen from outside, tensor by tensor, so that large models need few copies."""

    pruner: lp.IterativeMagnitudePruning
    early: dict[str, Any] = field(default_factory=dict)
    pruned: bool = False
    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)
    revived: list[str] = field(default_factory=list)
    looks: int = 0
    not_rewound: list[list[str]] = field(default_factory=list)

    __hash__ = object.__hash__

    @staticmethod
    def state(trainer, model):
        """(what, name) -> tensor: parameters, buffers, and what the optimizer keeps for each parameter."""
        optimizer = trainer.optimizers[0]
        found = {("value", n): p.detach() for n, p in model.named_parameters()}
        found |= {("buffer", n): b for n, b in model.named_buffers()}
        for n, p in model.named_parameters():
            found |= {(what, n): v for what, v in optimizer.state.get(p, {}).items() if v is not None}
        return found

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step == TO_STEP and not self.early:
            self.early = deepcopy(self.state(trainer, model))
        if self.pruned:
            now, masks = self.state(trainer, model), self.pruner.masks
            wrong = [str(key) for key in now.keys() ^ self.early.keys()]
            for (what, name), early in self.early.items():
                if name in masks and what != "buffer" and torch.is_tensor(early):
                    early = torch.where(masks[name], early, 0.0)
                if not same(now.get((what, name)), early):
                    wrong.append(f"{what} of {name}")
            self.not_rewound.append(wrong)
        self.pruned = False

    def on_prune(self, trainer, model, masks):
        self.pruned = True
        self.masks.append(masks)

    def on_train_batch_end(self, trainer, model, *_):
        self.looks += 1
        weights = dict(model.named_parameters())
        self.revived += [
            f"{name} after step {trainer.global_step}"
            for name, mask in self.pruner.masks.items()
            if not dead_are_zero(weights, {name: mask})
        ]


@dataclass
class Fitted:
    name: str
    model: LightningModule
    trainer: Any
    pruner: lp.IterativeMagnitudePruning
    seen: Seen
    before: dict[str, Any]


@pytest.fixture(scope="module", params=table(MODELS))
def fitted(request):
    torch.manual_seed(0)
    net, batch = build(request.param)
    model = Task(net, batch)
    before = description(model)
    pruner = lp.IterativeMagnitudePruning(
        lp.schedules.Geometric(RATE), rounds=ROUNDS, every_n_train_steps=STEPS
    )
    seen = Seen(pruner)
    options = {"max_steps": (ROUNDS + 1) * STEPS, "gradient_clip_val": 1.0}  # random weights diverge easily
    trainer = fitter(seen, lp.LotteryTicketRewind(TO_STEP, shorten=False), pruner, **options)
    trainer.fit(model)
    return Fitted(request.param, model, trainer, pruner, seen, before)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`loss_type=None` was set in the config",  # transformers' own
    "ignore:.*is deprecated",
    "ignore:Mem Efficient attention",
)


def test_dead_weights_stay_dead_in_any_model(fitted):
    assert fitted.seen.looks == (ROUNDS + 1) * STEPS
    assert fitted.seen.revived == []
    assert dead_are_zero(fitted.model.state_dict(), fitted.pruner.masks)
    changed = [
        n for n, p in fitted.model.named_parameters() if not same(p.detach(), fitted.seen.early[("value", n)])
    ]
    assert {*changed} & {*fitted.pruner.masks}, "nothing was trained"


def test_the_budget_is_met_exactly_in_any_model(fitted):
    total = sum(p.numel() for p in prunable(fitted.model).values())
    left = [alive(masks) for masks in fitted.seen.masks]
    assert left == [round((1 - RATE) ** r * total) for r in range(1, ROUNDS + 1)]
    for before, after in itertools.pairwise(fitted.seen.masks):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after)


def test_any_model_is_never_changed_by_masking(fitted):
    assert description(fitted.model) == fitted.before
    assert hooks_of(fitted.model, fitted.trainer) == []


def test_a_rewind_is_bit_exact_in_any_model(fitted):
    assert fitted.seen.not_rewound == [[]] * ROUNDS


def test_a_checkpoint_of_any_model_loads_into_the_bare_one(fitted, tmp_path):
    fitted.trainer.save_checkpoint(tmp_path / "any.ckpt")
    file = torch.load(tmp_path / "any.ckpt", weights_only=True, mmap=True)
    bare = Task(*build(fitted.name))
    bare.load_state_dict(file["state_dict"], strict=True)
    assert dead_are_zero(dict(bare.named_parameters()), fitted.pruner.masks)


# ------------------------------------------------------------------------------------------ default targets


def check_targets(model):
    """Weights of linear, convolution and attention layers, all of them, and nothing else."""
    linear = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    rows = {row.parameter: row for row in lp.targets(model)}
    parameters = dict(model.named_parameters())
    assert [*rows] == [*parameters]
    owners = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    for name, p in parameters.items():
        modules = owners[id(p)]
        layers = all(isinstance(m, linear) or type(m).__name__ == "Conv1D" for m in modules)
        matrix = p.dim() > 1 and not name.endswith(".gain")  # a scale of standardized convolutions
        assert rows[name].prunable == (layers and matrix), (name, rows[name])
        assert rows[name].prunable != bool(rows[name].why_not)
        if rows[name].prunable:
            assert not name.endswith("bias")
            assert not any(word in type(m).__name__ for m in modules for word in ("Norm", "Embedding"))
    others = (nn.Embedding, nn.RNNBase)  # layers that one has to ask for
    asked_for = sum(p.numel() for m in model.modules() if isinstance(m, others) for p in m.parameters())
    pruned = sum(parameters[name].numel() for name, row in rows.items() if row.prunable)
    assert pruned > 0.8 * (sum(p.numel() for p in parameters.values()) - asked_for)


@pytest.mark.parametrize("name", table(MODELS))
def test_default_targets_are_all_weight_matrices_and_nothing_else(name):
    net, _ = build(name)
    check_targets(net)
    if tied := TIED.get(name.split()[1]):
        row = next(row for row in lp.targets(net) if row.parameter == tied)
        assert "Embedding is not in layers=" in row.why_not


@pytest.mark.parametrize("name", table(LARGE, LARGE[:1]))
def test_default_targets_of_large_models(name):
    with torch.device("meta"):
        model = pytest.importorskip("timm").create_model(name)
    assert sum(p.numel() for p in model.parameters()) > 1e8
    check_targets(model)
    assert all(p.is_meta for p in prunable(model).values())
