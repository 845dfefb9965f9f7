"""Architectures: what goes with a third of the channels of other people's networks, and whether it is right.

`python -m experiments.benchmarks.architectures FOLDER [--only PATTERN] [--seconds N] [--one NAME]`. Each
model runs in a process of its own, with a time limit, with random weights. FOLDER gets `records.jsonl`, a
line a model, and `table.md`; what is there is not run again. Beside it is torch-pruning alone: the same
sparsity, the L1 criterion, and the layers that make outputs left out, as we tell it.
"""

import argparse
import json
import subprocess
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.allocation import uniform
from lightning_prune.criteria import magnitude
from lightning_prune.deploy.timing import machine
from lightning_prune.structured import cut, cut_of, discover
from lightning_prune.structured.coupling import HEAD, coupled
from lightning_prune.structured.filters import next_units, unit_scores
from lightning_prune.structured.trial import Through, first_line, run, synthetic, tensors_in
from lightning_prune.structured.units import all_units, parameters

LIBRARIES = ["lightning_prune", "torch_pruning", "torchvision", "timm", "transformers"]
SPARSITY = 0.3
RIGHT = 1e-4  # relative difference of outputs, in float32
LESS = {
    "35 %": 0.35,
    "15 %": 0.15,
}  # expected of the parameters: plain networks; those with attention, layer norm

# "size of the image: names"
TORCHVISION = """
64: convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet1_0 mobilenet_v2
64: mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet34 resnet50
64: resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn wide_resnet50_2
64: alexnet deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large
96: inception_v3
224: maxvit_t vit_b_16
"""
DETECTION = """
128: fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn retinanet_resnet50_fpn
128: ssdlite320_mobilenet_v3_large
"""
VIDEO = """
56: mc3_18 r2plus1d_18 r3d_18
64: swin3d_t
224: s3d
"""
TIMM = """
64: mobileone_s0 convmixer_768_32 convnext_atto convnext_atto_rms cpubone_nano cs3darknet_s cspnext_tiny
64: davit_tiny densenet121 dla34 dpn48b edgenext_xx_small tinynet_e efficientvim_m1 efficientvit_b0
64: fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 ghostnet_100 hardcorenas_b hgnetv2_b0
64: hrnet_w18_small iformer_t inception_next_atto lcnetv2_small lowformer_b0 mambaout_femto
64: mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs nf_regnet_b0 poolformerv2_s12 pvt_v2_b0
64: rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvit_m1 res2net50_26w_4s resnest14d resnet10t
64: resnet50 resnet50_gn resnetv2_18 resnetv2_50d_gn rexnet_100 legacy_seresnet18 selecsls42 shvit_s1
64: skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224 twins_svt_small vovnet39a legacy_xception
64: mixnet_s efficientnet_lite0 ese_vovnet19b_dw gernet_s semnasnet_075 spnasnet_100 fbnetc_100 vgg11
64: xception41 tresnet_m
96: inception_v3
224: cait_xxs24_224 coat_tiny convit_tiny deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0
224: efficientvit_m0 gcvit_xxtiny hiera_tiny_224 levit_128 gmlp_ti16_224 mixer_s32_224 mvitv2_tiny
224: nest_tiny_jx pit_xs_224 sequencer2d_s swin_tiny_patch4_window7_224 tnt_s_legacy_patch16_224
224: visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
224: xcit_nano_12_p16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
224: vit_relpos_small_patch16_224
240: crossvit_tiny_240
256: eca_botnext26ts_256 maxvit_pico_rw_256 swinv2_tiny_window8_256 vit_tiny_patch16_dinov3_qkvb
"""
SMP = "Unet UnetPlusPlus FPN PSPNet DeepLabV3 DeepLabV3Plus Linknet MAnet PAN UPerNet"
YOLO = "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-cls yolov8n-seg yolov9t yolov10n yolo11n yolo12n"

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
WORDS: dict[str, Any] = {
    **SIZES,
    "max_position_embeddings": 32,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
BOTH = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 1} | {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("attention_heads", 4), ("ffn_dim", 96))
}
STAGES = {"depths": [2, 2], "hidden_sizes": [32, 64]}
ENCODERS: dict[str, dict[str, Any]] = {
    "Albert": {**WORDS, "embedding_size": 16},
    "Bert": WORDS,
    "Camembert": WORDS,
    "ConvBert": WORDS,
    "Deberta": WORDS,
    "DebertaV2": WORDS,
    "DistilBert": {"vocab_size": 60, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    "Electra": {**WORDS, "embedding_size": 48},
    "FNet": WORDS,
    "MPNet": WORDS,
    "ModernBert": {**WORDS, "cls_token_id": 1, "sep_token_id": 2},
    "Roberta": WORDS,
    "SqueezeBert": {**WORDS, "embedding_size": 48},
    "XLMRoberta": WORDS,
}
DECODERS: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": 60, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "Cohere": {**WORDS, "num_key_value_heads": 2},
    "Falcon": {**WORDS, "multi_query": False},
    "GPT2": {
        "vocab_size": 60,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "GPTNeo": {**WORDS, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "GPTNeoX": WORDS,
    "Gemma": {**WORDS, "head_dim": 12, "num_key_value_heads": 2},
    "Granite": {**WORDS, "num_key_value_heads": 2},
    "Llama": {**WORDS, "num_key_value_heads": 2},
    "Mamba": WORDS,
    "Mistral": {**WORDS, "num_key_value_heads": 2},
    "Mixtral": {**WORDS, "num_key_value_heads": 2, "num_local_experts": 2},
    "OPT": {**WORDS, "ffn_dim": 96, "word_embed_proj_dim": 48},
    "Olmo2": {**WORDS, "num_key_value_heads": 2},
    "Phi": WORDS,
    "Phi3": {**WORDS, "num_key_value_heads": 2},
    "Qwen2": {**WORDS, "num_key_value_heads": 2},
    "Qwen3": {**WORDS, "num_key_value_heads": 2, "head_dim": 12},
    "StableLm": {
        **WORDS,
        "num_key_value_heads": 4,
        "hidden_size": 64,
    },
    "Starcoder2": {**WORDS, "num_key_value_heads": 2},
}
VISION: dict[str, dict[str, Any]] = {
    "Beit": {**IMAGES},
    "CLIPVision": IMAGES,
    "ConvNext": {**STAGES, "num_stages": 2},
    "ConvNextV2": {**STAGES, "num_stages": 2},
    "Data2VecVision": IMAGES,
    "DeiT": IMAGES,
    "Dinov2": {**IMAGES, "mlp_ratio": 2},
    "MobileNetV2": {},
    "PoolFormer": {},
    "PvtV2": {},
    "RegNet": {**STAGES, "groups_width": 8},
    "ResNet": {**STAGES, "layer_type": "basic"},
    "Segformer": {},
    "SiglipVision": IMAGES,
    "Swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "ViT": IMAGES,
    "ViTMSN": IMAGES,
}
SEQUENCES: dict[str, dict[str, Any]] = {
    "Bart": {**WORDS, **BOTH},
    "MBart": {**WORDS, **BOTH},
    "Marian": {**WORDS, **BOTH},
    "T5": {"vocab_size": 60, "d_model": 48, "d_kv": 12, "num_heads": 4, "num_layers": 2, "d_ff": 96},
}
SOUND: dict[str, dict[str, Any]] = {
    "Wav2Vec2": {**WORDS, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
    | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
    "WavLM": {**WORDS, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
    | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}
WHISPER = {**WORDS, **BOTH, "num_mel_bins": 8, "max_source_positions": 16}


def models() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """{library and name: a maker of the model and an input}."""
    found: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}
    for library, listed in (
        ("torchvision", TORCHVISION),
        ("torchvision detection", DETECTION),
        ("torchvision video", VIDEO),
        ("timm", TIMM),
    ):
        for line in listed.split("\n"):
            size, _, names = line.partition(":")
            found |= {
                f"{library} {name}": partial(_image, library, name, int(size)) for name in names.split()
            }
    found |= {f"smp {name}": partial(_smp, name) for name in SMP.split()}
    found |= {f"ultralytics {name}": partial(_yolo, name) for name in YOLO.split()}
    for table in (ENCODERS, DECODERS, VISION, SEQUENCES, SOUND, {"Whisper": WHISPER}):
        found |= {
            f"transformers {name}": partial(_transformer, name, config) for name, config in table.items()
        }
    found |= {f"diffusers {name}": partial(_diffusers, name) for name in DIFFUSERS}
    found |= {
        f"torch {make.__name__}": make for make in (_lstm, _gru_cnn, _tcn, _encoder, _transformer_of_torch)
    }
    return found


def _image(library: str, name: str, size: int) -> tuple[nn.Module, Any]:
    models, options = import_module("torchvision").models, dict[str, Any](weights=None)
    x = torch.rand(1 if size > 128 else 2, 3, size, size)
    if library == "timm":
        return import_module("timm").create_model(name), x
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = True
    if any(part in name for part in ("lraspp", "deeplab", "fcn", "fcos", "retinanet", "rcnn", "ssdlite")):
        options["weights_backbone"] = None
    if library.endswith("video"):
        x = torch.rand(1, 3, 16 if name == "s3d" else 8, size, size)
    if library.endswith("detection"):  # its losses: what it detects is selected, and tells little
        boxes = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 70.0]]), "labels": torch.tensor([1])}
        return models.get_model(name, **options), Through(_losses, ([*x], [boxes] * 2))
    return models.get_model(name, **options), x


def _losses(model: Any, batch: Any) -> Any:
    return model(*batch)


def _smp(name: str) -> tuple[nn.Module, Any]:
    make = getattr(import_module("segmentation_models_pytorch"), name)
    return make("resnet18", encoder_weights=None, classes=3), torch.rand(2, 3, 128, 128)


def _yolo(name: str) -> tuple[nn.Module, Any]:
    kinds = {"cls": "ClassificationModel", "seg": "SegmentationModel"}
    kind = kinds.get(name.partition("-")[2], "DetectionModel")
    return getattr(import_module("ultralytics.nn.tasks"), kind)(f"{name}.yaml", verbose=False), torch.rand(
        2, 3, 64, 64
    )


def _transformer(name: str, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    library = import_module("transformers")
    model = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**config))
    words = torch.randint(3, 50, (2, 9))
    if name in VISION:
        return model, {
            "pixel_values": torch.rand(2, 3, config.get("image_size", 64), config.get("image_size", 64))
        }
    if name in SOUND:
        return model, {"input_values": torch.rand(2, 400)}
    if name == "Whisper":
        return model, {"input_features": torch.rand(2, 8, 32), "decoder_input_ids": words, "use_cache": False}
    if name in SEQUENCES:
        return model, {"input_ids": words, "decoder_input_ids": words, "use_cache": False}
    return model, {"input_ids": words, **({"use_cache": False} if name in DECODERS else {})}


UNET = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DModel": (
        {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"sample": (1, 3, 16, 16), "timestep": ()},
    ),
    "UNet2DConditionModel": (
        {**UNET, **CROSS},
        {"sample": (1, 4, 16, 16), "timestep": (), "encoder_hidden_states": (1, 5, 24)},
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
        }
        | {"up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (1, 3, 16, 16)},
    ),
    "VQModel": (
        {
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
        }
        | {"up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (1, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        {
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
        }
        | {"num_embeds_ada_norm": 10, "norm_num_groups": 4},
        {"hidden_states": (1, 4, 8, 8), "timestep": (1,), "class_labels": (1,)},
    ),
}


def _diffusers(name: str) -> tuple[nn.Module, Any]:
    config, shapes = DIFFUSERS[name]
    whole = {"timestep", "class_labels"}
    x = {key: torch.full(shape, 3) if key in whole else torch.rand(shape) for key, shape in shapes.items()}
    return getattr(import_module("diffusers"), name)(**config), x


class _Recurrent(nn.Module):
    def __init__(self, before: nn.Module, recurrent: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.recurrent, self.after = before, recurrent, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(x))[0][:, -1])


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _lstm() -> tuple[nn.Module, Any]:
    before = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 24))
    after = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5))
    return _Recurrent(before, nn.LSTM(24, 16, bidirectional=True, batch_first=True), after), torch.rand(
        3, 7, 12
    )


def _gru_cnn() -> tuple[nn.Module, Any]:
    before = nn.Sequential(*_conv1d(4, 32), *_conv1d(32, 32), *_conv1d(32, 24), _Swap())
    return _Recurrent(before, nn.GRU(24, 16, batch_first=True), nn.Linear(16, 5)), torch.rand(3, 4, 50)


def _conv1d(a: int, b: int, **options: Any) -> list[nn.Module]:
    return [nn.Conv1d(a, b, 3, padding="same", **options), nn.BatchNorm1d(b), nn.ReLU()]


def _tcn() -> tuple[nn.Module, Any]:
    layers = [*_conv1d(4, 32), *_conv1d(32, 48, dilation=2), *_conv1d(48, 64, dilation=4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 5)), torch.rand(
        3, 4, 50
    )


def _encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    return nn.Sequential(nn.Linear(12, 48), nn.TransformerEncoder(layer, 2), nn.Linear(48, 5)), torch.rand(
        3, 7, 12
    )


def _transformer_of_torch() -> tuple[nn.Module, Any]:
    return nn.Transformer(48, 4, 2, 2, 96, batch_first=True), (torch.rand(3, 7, 48), torch.rand(3, 5, 48))


# ------------------------------------------------------------------------------------------------- one model


def one(name: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """Tell what became of one model, by us and then by torch-pruning alone."""
    torch.manual_seed(0)
    model, x = models()[name]()
    randomize(model.eval())
    kinds = {type(m).__name__.lower() for m in model.modules()}
    normed = any("layernorm" in kind or "rmsnorm" in kind for kind in kinds)
    normed |= any(isinstance(m, nn.GroupNorm) and m.num_groups == 1 for m in model.modules())
    attentions = [m for m in model.modules() if "attention" in type(m).__name__.lower()]
    attends = any(True for m in attentions for _ in m.parameters())
    record: dict[str, Any] = {"name": name, "expected": "15 %" if normed or attends else "35 %"}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["peer"] = {"came out": "took too long"}
    with suppress(Exception):  # what is imported at the first call counts for nobody
        _peer(*_tcn())
        _ours(*_tcn())
    for who, how in (("ours", _ours), ("peer", _peer)):
        start = perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                record[who] = how(deepcopy(model), x)
        except Exception as error:  # whatever it raises is what is recorded
            refused = isinstance(error, ValueError) and who == "ours"
            record[who] = {"came out": "refused" if refused else "crashed", "why": first_line(error)[:300]}
        record[who].setdefault("seconds", round(perf_counter() - start, 2))
        if record[who]["came out"] == "right" and record[who]["lost"] < LESS[record["expected"]]:
            record[who]["came out"] = "too little"
        tell(record)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights that are all equal, as zeros at the end of a residual branch, would hide what goes wrong."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.numel() and p.min() == p.max():
            p.uniform_(*((-0.2, 0.2) if name.endswith("bias") or p.dim() > 1 else (0.5, 1.5)))
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b.uniform_(*((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))


def _ours(model: nn.Module, x: Any) -> dict[str, Any]:
    before, start = deepcopy(model), perf_counter()
    couplings = discover(model, x)
    scores = unit_scores(couplings, magnitude, parameters(couplings, model))
    units = next_units(couplings, scores, all_units(couplings), [(list(couplings), SPARSITY)], uniform)
    removed = cut_of(couplings, units)
    cut(model, removed)
    seconds = perf_counter() - start
    for (module, name, dim), gone in removed.items():
        tensor = getattr(before.get_submodule(module), name)
        if isinstance(tensor, nn.Parameter):
            tensor.data.index_fill_(dim, gone, 0)
    return _compared(before, model, x) | {"seconds": round(seconds, 2)}


def _peer(model: nn.Module, x: Any) -> dict[str, Any]:
    import torch_pruning as tp

    _, reasons = coupled(*synthetic(model, x))
    heads = [
        model.get_submodule(name.removesuffix(".weight")) for name, why in reasons.items() if why == HEAD
    ]
    start = perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model,
        x,
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=SPARSITY,
        ignored_layers=heads,
        forward_fn=run,
        in_channel_groups={},  # its defaults are shared by all pruners of a process
        out_channel_groups={},
        num_heads={},
    )
    groups: list[Any] = [*(pruner.step(interactive=True) or ())]
    seconds, before = perf_counter() - start, deepcopy(model)
    copies = dict(zip(model.modules(), before.modules(), strict=True))
    params = {id(p): q for p, q in zip(model.parameters(), before.parameters(), strict=True)}
    for dependency, gone in (item for group in groups for item in group):
        _zero(dependency.target.module, dependency.handler.__name__, list(gone), copies, params)
    start = perf_counter()
    for group in groups:
        group.prune()
    return _compared(before, model, x) | {"seconds": round(seconds + perf_counter() - start, 2)}


def _zero(
    module: Any, handler: str, gone: list[int], copies: Mapping[Any, Any], params: Mapping[int, Any]
) -> None:
    """Zero what the peer is about to take, in a copy."""
    if isinstance(module, nn.Parameter):
        dims = [d for d in range(module.dim()) if module.shape[d] > max(gone)]
        params[id(module)].data.index_fill_(dims[-1] if module.dim() < 3 else dims[0], torch.tensor(gone), 0)
        return
    twin = copies.get(module)
    if twin is None:
        return
    out = "out" in handler or "Norm" in type(module).__name__
    for name, p in twin.named_parameters(recurse=False):
        transposed = bool(getattr(module, "transposed", False))
        dim = 0 if p.dim() == 1 else int(out == transposed)
        if (out or p.dim() > 1) and max(gone) < p.shape[dim] and name in ("weight", "bias"):
            p.data.index_fill_(dim, torch.tensor(gone), 0)


@torch.no_grad()
def _compared(before: nn.Module, after: nn.Module, x: Any) -> dict[str, Any]:
    lost = 1 - sum(p.numel() for p in after.parameters()) / sum(p.numel() for p in before.parameters())
    want, got = _outputs(before, x), _outputs(after, x)
    found: dict[str, Any] = {"lost": round(lost, 4)}
    if [t.shape for t in want] != [t.shape for t in got]:
        return {"came out": "wrong", "why": "outputs of another shape", **found}
    scale = max((float(t.abs().max()) for t in want if t.numel()), default=0.0)
    if not scale:
        return {"came out": "nothing to compare", **found}
    far = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel()) / scale
    if far > RIGHT and want[0].dtype != torch.float64:  # rounding may decide what is selected
        exact = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, x)
        with suppress(Exception):
            return _compared(before.double(), after.double(), exact)
    return {"came out": "right" if far <= RIGHT else "wrong", "difference": far, **found}


def _outputs(model: nn.Module, x: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [t for t in tensors_in(run(model, x)) if t.is_floating_point()]


# ------------------------------------------------------------------------------------------------ all of them


def record_of(name: str, limit: float) -> dict[str, Any]:
    """The record of a model that runs in a process of its own."""
    processes = get_context("forkserver")
    processes.set_forkserver_preload(LIBRARIES)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = processes.Process(target=_one_into, args=(name, path))
        process.start()
        process.join(limit)
        late = process.is_alive()
        process.kill()
        process.join()
        if path.exists():
            return json.loads(path.read_text())
    came = {"came out": "took too long" if late else "not built"}
    return {"name": name, "ours": came, "peer": came}


def _one_into(name: str, path: Path) -> None:
    def write(record: dict[str, Any]) -> None:
        path.with_suffix(".new").write_text(json.dumps(record))
        path.with_suffix(".new").replace(path)  # whole at any time

    torch.set_num_threads(1)
    one(name, write)


def table(records: list[dict[str, Any]], where: str) -> str:
    """The records as text."""
    lines = [where, ""]
    built = [r for r in records if r["ours"]["came out"] != "not built"]
    for who, title in (("ours", "Cut by lightning_prune"), ("peer", "torch-pruning alone")):
        kinds = [r[who]["came out"] for r in built]
        counts = ", ".join(
            f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds), key=kinds.count)[::-1]
        )
        lines.append(f"{title}, of {len(built)} models: {counts}.")
    lines += ["", "| model | parameters | ours | lost | s | alone | lost | s | why |", "|---|" + "---|" * 8]
    for r in built:
        ours, peer = r["ours"], r["peer"]
        cells = [r["name"], f"{r.get('parameters', 0):,}"]
        for one in (ours, peer):
            cells += [
                one["came out"],
                f"{one['lost']:.0%}" if "lost" in one else "",
                str(one.get("seconds", "")),
            ]
        why = ours.get("why", "") if ours["came out"] != "right" else ""
        lines.append("| " + " | ".join([*cells, why.replace("|", "/")[:160]]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the models that are not in the folder's records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        one(given.one, lambda record: print(json.dumps(record)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    path: Path = given.folder / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {r["name"] for r in records}
    for name in models():
        if name not in done and fnmatch(name, given.only):
            records.append(record_of(name, given.seconds))
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    where = f"{machine()}; commit {commit.stdout.strip()}."
    (given.folder / "table.md").write_text(table(records, where))


if __name__ == "__main__":
    main()
