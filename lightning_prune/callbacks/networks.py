"""Networks: whether callbacks that are in some round are given the network of the fit before, or another."""

from torch import nn

from lightning_prune import doctor
from lightning_prune.masks import Masks


def taken_up(network: nn.Module, masks: Masks, place: str) -> str:
    """Make sure that another network object can be the one that was trained, and say that it is taken for it.

    Args:
        network: that a callback is given now.
        masks: of the network that it was given before.
        place: what the callback is, in which round, and at which sparsity.

    Returns:
        The warning.

    Raises:
        ValueError: when a weight is missing, has another shape, or is not zero where its mask is dead.
    """
    parameters = dict(network.named_parameters())
    there = {n: m for n, m in masks.items() if n in parameters and parameters[n].shape == m.shape}
    if not masks or len(there) < len(masks) or doctor.awake(parameters, there, ""):
        raise ValueError(
            f"{place} of another network, and the weights of this one are not zero where its masks are. "
            "Allowed is the network of the fit before. Make new callbacks for a new network, or load the "
            "weights that were trained."
        )
    return (
        f"{place} of another network object, and goes on from there, as the zeros of this one are those of "
        "its masks. Make new callbacks to start anew."
    )
