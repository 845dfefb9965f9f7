"""Criteria: which weights to keep. A criterion turns parameters into scores, higher = keep.

A criterion is any callable `(params, **evidence) -> {name: scores of the parameter's shape}`. `params` maps
names to detached tensors. Of the evidence it receives, by keyword, what its signature names:

- `masks`: the masks so far, {name: bool tensor}.
"""

from torch import Tensor

from lightning_prune.masks import Scores


def magnitude(params: dict[str, Tensor]) -> Scores:
    """Magnitude |w| of each weight.

    >>> import torch
    >>> magnitude({"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([2., 1.])}

    Reference: Han et al. (2015), arXiv:1506.02626.
    """
    return {name: w.abs() for name, w in params.items()}
