"""Calibration: statistics of batch normalizations for a network whose channels have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from lightning_prune.evidence import undisturbed


def _with_statistics(model: nn.Module) -> list[BatchNorm]:
    """The batch normalizations that have running statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


def without_effect(model: nn.Module) -> str | None:
    """Why a calibration would change nothing, in words; None where it changes something."""
    if _with_statistics(model):
        return None
    return (
        f"{type(model).__name__} has no batch normalization with running statistics, so there is nothing to "
        "take anew. Leave it out."
    )


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    """Set running means and variances to the averages over batches; returns how many layers have some.

    All else is as in evaluation: dropout is off, and other statistics stay.

    >>> norm = nn.BatchNorm1d(1)
    >>> calibrate(norm, [torch.tensor([[1.0], [3.0]])], lambda model, batch: model(batch))
    1
    >>> norm.running_mean, norm.training
    (tensor([2.]), True)

    Args:
        model: any module; the random number generators and its mode stay as they are.
        batches: at least one.
        forward: (model, batch) -> anything.

    Reference: Li et al. (2020), EagleEye, arXiv:2007.02491, "adaptive batch normalization".
    """
    norms = _with_statistics(model)
    found: list[tuple[Tensor, Tensor]] = []
    with undisturbed(model), torch.no_grad():
        model.eval()
        for norm in norms:
            for name, tensor in list(norm.named_buffers(recurse=False)):
                # not in place: an expanded tensor has one element for all, inference tensors are not written
                fresh = torch.ones if name == "running_var" else torch.zeros
                setattr(norm, name, fresh(tensor.shape, dtype=tensor.dtype, device=tensor.device))
                if name != "num_batches_tracked":
                    found.append((tensor, norm.get_buffer(name)))
            norm.momentum, norm.training = None, True  # the average of all batches
        for batch in batches if norms else ():
            forward(model, batch)
    for tensor, value in found:
        if tensor.is_inference() or 0 in tensor.stride():
            tensor.data = value
        else:
            tensor.copy_(value)
    return len(norms)
