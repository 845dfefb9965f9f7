"""The architectures of torchvision and timm: what is cut computes what was masked, or it is refused."""

import re
import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

import lightning_prune as lp
from experiments.benchmarks import users
from lightning_prune import allocation, criteria, filters
from lightning_prune.deploy import summary
from lightning_prune.structured import discover
from lightning_prune.structured import units as structure
from lightning_prune.structured.surgery import cut
from lightning_prune.structured.trial import run, tensors_in
from tests.networks import fitter
from tests.test_channels import masked

# name -> (size of the input, parameters lost at sparsity 0.3 at least)
CUT = {
    "torchvision resnet18": (64, 0.35),
    "torchvision resnet50": (64, 0.35),
    "torchvision resnext50_32x4d": (64, 0.35),
    "torchvision mobilenet_v2": (64, 0.35),
    "torchvision mobilenet_v3_small": (64, 0.35),
    "torchvision mobilenet_v3_large": (64, 0.35),
    "torchvision efficientnet_b0": (64, 0.35),
    "torchvision regnet_y_400mf": (64, 0.35),
    "torchvision googlenet": (64, 0.35),
    "torchvision densenet121": (64, 0.35),
    "torchvision vgg11_bn": (64, 0.35),
    "torchvision squeezenet1_1": (64, 0.35),
    "torchvision lraspp_mobilenet_v3_large": (64, 0.35),
    "timm resnet50": (64, 0.35),
    "timm mobilenetv4_conv_small": (64, 0.35),
    "timm ghostnet_100": (64, 0.35),
}
INNER = {  # layer normalization or attention hold the stream together: only what is inside a block can go
    "torchvision convnext_tiny": (64, 0.2),
    "timm convnext_atto": (64, 0.2),
    "torchvision vit_b_16": (224, 0.15),
    "timm vit_tiny_patch16_224": (224, 0.15),
    "torchvision swin_t": (64, 0.15),
    "timm swin_tiny_patch4_window7_224": (224, 0.15),
    "timm res2net50_26w_4s": (64, 0.2),  # splits of a split
    "torchvision shufflenet_v2_x0_5": (64, 0.15),  # halves that are shuffled: what is inside a branch goes
}
REFUSED = {
    "timm convnextv2_atto": (64, "LayerNorm.* takes its mean over them"),
}
FAST = (
    "torchvision resnet18",
    "torchvision mobilenet_v3_small",
    "torchvision squeezenet1_1",
    "timm mobilenetv4_conv_small",
    "timm vit_tiny_patch16_224",
    "torchvision shufflenet_v2_x0_5",
)


def table(names):
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


def build(name, size):
    library, name = name.split()
    torch.manual_seed(0)
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, pretrained=False)
    else:
        options = {"init_weights": True} if name == "googlenet" else {}
        if name.startswith("lraspp"):
            options = {"weights_backbone": None}
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None, **options)
    x = torch.randn(2, 3, size, size)
    for name, p in model.named_parameters():  # a head, a scale or a residual branch of zeros would hide all
        if p.min() == p.max():
            p.data.uniform_(*((-0.2, 0.2) if name.endswith("bias") or p.dim() > 1 else (0.5, 1.5)))
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b.uniform_(*((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    return model.eval(), x


def outputs(model, x):
    with torch.no_grad():
        got = model(x)
    return list(got.values()) if isinstance(got, dict) else [got]


@pytest.mark.parametrize("name", table({**CUT, **INNER}))
def test_a_cut_architecture_computes_what_the_masked_one_did(name):
    size, lost = {**CUT, **INNER}[name]
    model, x = build(name, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name in CUT else "ignore")  # nothing of these may be left alone
        groups = discover(model, x)
    scores = filters.unit_scores(groups, criteria.magnitude, structure.parameters(groups, model))
    dense = {n: torch.ones(g.units, dtype=torch.bool) for n, g in groups.items()}
    units = filters.next_units(groups, scores, dense, [(list(groups), 0.3)], allocation.uniform)
    plan = structure.cut_of(groups, units)
    twin, before = masked(model, plan), sum(p.numel() for p in model.parameters())
    cut(model, plan)
    for want, got in zip(outputs(twin, x), outputs(model, x), strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert 1 - sum(p.numel() for p in model.parameters()) / before >= lost
    if "googlenet" not in name:  # its auxiliary heads want larger images
        model.train()(x)


def bert():
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = library.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32, num_labels=3)
    return library.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 50, (4, 16))}


def resnet18():
    return build("torchvision resnet18", 32)[0], torch.randn(4, 3, 32, 32)


def resnet18_with_group_norm():
    models = pytest.importorskip("torchvision").models
    return models.resnet18(norm_layer=lambda width: nn.GroupNorm(8, width)), torch.randn(4, 3, 32, 32)


def diffusion_unet():
    library = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8}
    return library.UNet2DModel(**sizes, **blocks), {"sample": torch.randn(4, 3, 16, 16), "timestep": 3}


def yolo():
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolov8n.yaml", verbose=False), torch.randn(4, 3, 64, 64)


USERS = {  # a network, and the part of its parameters that is left without half of its channels
    bert: 0.6,
    resnet18: 0.3,
    resnet18_with_group_norm: 0.3,
    diffusion_unet: 0.35,
    yolo: 0.5,
}


class User(LightningModule):
    """A network that is trained on inputs alone, by the squares of what it gives."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        out = self.net(**batch) if isinstance(batch, dict) else self.net(batch)
        return sum(t.square().mean() for t in tensors_in(out) if t.is_floating_point())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


@pytest.mark.parametrize("make", USERS, ids=lambda make: make.__name__)
def test_a_users_network_becomes_smaller_with_one_callback_and_loads_again(make, tmp_path):
    """How much faster is measured by `experiments.benchmarks.users`."""
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    net, x = make()
    bare = deepcopy(net)
    task, fresh, before = User(net), User(deepcopy(net)), sum(p.numel() for p in net.parameters())
    multiply_adds = summary.multiply_adds(net.eval(), x, run)[""]
    file = tmp_path / "small.safetensors"
    pruner = lp.StructuredChannelPruning(lp.schedules.OneShot(0.5), save_sparse=str(file))
    trainer = fitter(pruner, epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "channels left as they are")
        trainer.fit(task.train(), DataLoader([x], batch_size=None))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    assert sum(p.numel() for p in net.parameters()) < USERS[make] * before
    assert summary.multiply_adds(net.eval(), x, run)[""] < USERS[make] * multiply_adds
    for again in (lp.load_pruned(fresh, tmp_path / "small.ckpt").net, lp.load_pruned(bare, file)):
        with torch.no_grad():
            for want, got in zip(tensors_in(run(net, x)), tensors_in(run(again.eval(), x)), strict=True):
                assert torch.equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("name", users.NETWORKS)
def test_a_users_network_is_faster_and_loads_in_a_new_process(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            line = users.measured(name, 1.0, tmp_path)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
    assert "checkpoint: equal, sparse file: equal, torch-pruning not needed" in line
    assert float(re.search(r"([0-9.]+)x(?: to .*)? as fast", line)[1]) > 1, line


@pytest.mark.parametrize("name", table(REFUSED))
def test_what_cannot_be_cut_is_refused_with_a_reason(name):
    size, reason = REFUSED[name]
    model, x = build(name, size)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        discover(model, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
