"""Masks as images, for the loggers that can hold them."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from typing_extensions import final

from lightning_prune.masks import Masks


@final
class MaskImages(Callback):
    """After each pruning, every mask as a picture: outputs downwards, inputs to the right, alive is white.

    Args:
        side: of the picture, in pixels, at most; the pixels of a larger mask are means.
    """

    def __init__(self, side: int = 256) -> None:
        self.side = side

    def on_prune(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """Hand the pictures to the loggers."""
        if not trainer.is_global_zero:
            return
        for name, mask in masks.items():
            for logger in trainer.loggers:
                log_image(logger, f"mask/{name}", picture(mask, self.side), trainer.global_step)


def picture(mask: Tensor, side: int) -> Tensor:
    """A mask as an image of bytes, at most `side` pixels high and wide.

    >>> picture(torch.tensor([[True, False], [False, False]]), 2).tolist()
    [[255, 0], [0, 0]]
    >>> picture(torch.ones(9, 2, 2), 4).shape
    torch.Size([4, 4])
    """
    image = mask.detach().cpu().float().flatten(1) if mask.dim() > 1 else mask.detach().cpu().float()[None]
    shape = min(image.shape[0], side), min(image.shape[1], side)
    return (255 * adaptive_avg_pool2d(image[None], shape)[0]).round().to(torch.uint8)


def log_image(logger: Logger, name: str, image: Tensor, step: int) -> None:
    """One image to a logger, if it has a place for images."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HW")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [image.numpy()], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image.numpy(), f"{name}/{step}.png")
