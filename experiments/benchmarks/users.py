"""Users: other people's networks become smaller and faster with one callback, and load again elsewhere.

`python -m experiments.benchmarks.users [--only PATTERN] [--seconds S]`. Each network is trained for two
epochs of one batch, and loses half of its channels between them. Prints what is left of it, how many times as
fast it is by alternated runs, and whether a new process that has only the checkpoint, or only the sparse
file, computes the same to the bit. Networks whose library is not installed are named and left out.
"""

import argparse
import fnmatch
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_prune as lp
from experiments.benchmarks import architectures
from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.summary import multiply_adds
from lightning_prune.deploy.timing import machine, ratio, settled, timed
from lightning_prune.structured.trial import run, tensors_in

Example = tuple[nn.Module, Any]


def bert() -> Example:
    """Four layers of half of BERT-base's width, with a head for three classes, and sequences of 128 words."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "num_labels": 3,
    }
    return BertForSequenceClassification(BertConfig(**sizes)), {
        "input_ids": torch.randint(0, 30000, (4, 128))
    }


def diffusion_unet() -> Example:
    """The small UNet2DModel of the table of architectures."""
    return architectures.models()["diffusers UNet2DModel"]()


def yolo() -> Example:
    """YOLOv8n, from its yaml."""
    tasks: Any = import_module("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolov8n.yaml", verbose=False), torch.rand(4, 3, 128, 128)


def of_timm(name: str) -> Example:
    """A network of timm, and four images."""
    import timm

    return timm.create_model(name, num_classes=10), torch.rand(4, 3, 128, 128)


NETWORKS: dict[str, Callable[[], Example]] = {
    "BERT": bert,
    "diffusion UNet": diffusion_unet,
    "ResNet-50 with group normalization": partial(of_timm, "resnet50_gn"),
    "YOLOv8n": yolo,
    "ResNet-18": partial(of_timm, "resnet18"),
}


class User(LightningModule):
    """A network that is trained on inputs alone, by the squares of what it gives."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        squares = [
            t.square().mean() for t in tensors_in(run_in_training(self.net, batch)) if t.is_floating_point()
        ]
        return torch.stack(squares).sum()

    @override
    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def run_in_training(net: nn.Module, batch: Any) -> Any:
    """Call a network with what it takes."""
    return net(**batch) if isinstance(batch, dict) else net(batch)


@torch.no_grad()  # in inference mode a detector would keep anchors that no other mode can read
def outputs(net: nn.Module, x: Any) -> list[Tensor]:
    """What a network gives in evaluation."""
    return [t.clone() for t in tensors_in(run(net.eval(), x))]


def trained(net: nn.Module, x: Any, folder: Path) -> None:
    """Fit with one callback, as a user would, and write a checkpoint and a sparse file."""
    pruner = lp.StructuredChannelPruning(lp.schedules.OneShot(0.5), save_sparse=folder / "small.safetensors")
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[pruner], **quiet)
    data: Any = [x]
    trainer.fit(User(net), DataLoader(data, batch_size=None))
    trainer.save_checkpoint(folder / "small.ckpt")


def loaded(name: str, folder: Path) -> None:
    """Build the full-size network anew, load each file into it, and compare; in a process of its own."""
    torch.set_num_threads(1)
    expected = torch.load(folder / "expected.pt")
    task = lp.load_pruned(User(NETWORKS[name]()[0]), folder / "small.ckpt")
    bare = lp.load_pruned(NETWORKS[name]()[0], folder / "small.safetensors")  # under the prefix `net.`
    for file, net in (("checkpoint", task.net), ("sparse file", bare)):
        got = outputs(net, expected["x"])  # pyright: ignore[reportArgumentType]
        same = len(got) == len(expected["outputs"]) and all(map(torch.equal, got, expected["outputs"]))
        print(f"{file}: {'equal' if same else 'OTHER OUTPUTS'}")
    print(f"torch-pruning {'imported' if 'torch_pruning' in sys.modules else 'not needed'}")


def measured(name: str, seconds: float, folder: Path) -> str:
    """One line of what became of a network."""
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    dense = deepcopy(net).eval()
    trained(net, x, folder)
    torch.save({"x": x, "outputs": outputs(net, x)}, folder / "expected.pt")
    with torch.no_grad():
        works = {key: timed(partial(run, each, x)) for key, each in (("dense", dense), ("cut", net.eval()))}
        times = settled(works, at_least=seconds)
        done = multiply_adds(net, x, run)[""] / multiply_adds(dense, x, run)[""]
    left = sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in dense.parameters())
    command = [sys.executable, "-m", "experiments.benchmarks.users", "--load", name, str(folder)]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    gain = ratio(times["dense"], times["cut"])
    headline(f"{name} without half of its channels, as fast as dense", gain)
    return (
        f"{name}: {left:.0%} of the parameters, {done:.0%} of the multiply-adds, "
        f"{gain} as fast; in a new process " + ", ".join(again.stdout.strip().splitlines())
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--seconds", type=float, default=2.0, help="that alternated runs take")
    parser.add_argument("--load", nargs=2, metavar=("NAME", "FOLDER"), help="what the new process does")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_prune").setLevel(logging.ERROR)
    if given.load:
        return loaded(given.load[0], Path(given.load[1]))
    torch.set_num_threads(1)
    print(machine())
    for name in fnmatch.filter(NETWORKS, given.only):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(measured(name, given.seconds, Path(folder)), flush=True)
            except ModuleNotFoundError as error:
                print(f"{name}: left out, as {error.name} is not installed")
    return None


if __name__ == "__main__":
    main()
