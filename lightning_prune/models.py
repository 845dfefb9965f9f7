"""Networks for pruning studies: the feed-forward network of any depth. Others come from where you like."""

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import final


@final
class DeepFFN(nn.Module):
    """A deep feed-forward network with ReLU, and optionally layer norm before each activation.

    >>> sum(p.numel() for p in DeepFFN(784, hidden=(300, 100), classes=10).parameters())
    266610

    Args:
        inputs: features of an example; images are flattened.
        hidden: widths of the hidden layers.
        classes: outputs.
        layer_norm: normalize before each activation.

    Raises:
        ValueError: when `hidden` is empty.
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: Sequence[int] = (1000, 500, 200, 100),
        classes: int = 10,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError(f"hidden={hidden!r}: allowed are one or more widths. Name those of the layers.")
        layers: list[nn.Module] = []
        for before, after in zip((inputs, *hidden[:-1]), hidden, strict=True):
            norm = [nn.LayerNorm(after)] if layer_norm else []
            layers += [nn.Linear(before, after), *norm, nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(hidden[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x.flatten(1)))
