"""The networks of the experiments. Their last layer is named `out`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import final


def glorot(module: nn.Module) -> None:
    """Gaussian Glorot initialization of weights, zero biases (Frankle & Carbin 2019)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def kaiming(module: nn.Module) -> None:
    """Gaussian Kaiming initialization, BatchNorm scales uniform in [0, 1) (Frankle et al. 2020)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight)


@final
class LeNet(nn.Module):
    """LeNet-300-100: a fully connected network, Gaussian Glorot initialization, zero biases.

    Reference: LeCun et al. (1998); as in Frankle & Carbin (2019), arXiv:1803.03635, Figure 2: 266,200
        weights.
    """

    def __init__(self, inputs: int = 784, hidden: Sequence[int] = (300, 100), classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.out = nn.Linear(hidden[1], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(glorot)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


@final
class ResidualMLP(nn.Module):
    """The network of the MNIST-1D lottery ticket study: h = relu(fc1(x)); h += relu(fc2(h)); out(h).

    Reference: Greydanus & Kobak (2024), arXiv:2011.14439.
    """

    def __init__(self, inputs: int = 40, hidden: int = 200, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x.flatten(1)))
        return self.out(h + torch.relu(self.fc2(h)))


@final
class Conv(nn.Module):
    """Conv-2, -4 or -6 for 32x32 images: pairs of 3x3 convolutions with max-pooling, three linear layers.

    Gaussian Glorot initialization, zero biases. Convolutions keep the size of the image, so Conv-6 has
    2,261,184 weights; the paper's table says 1.7M, its fractions of weights left agree with 2.26M.

    Args:
        widths: of the pairs: [64] for Conv-2, [64, 128] for Conv-4, [64, 128, 256] for Conv-6.
        hidden: of the two hidden linear layers.
        classes: number of classes.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Figure 2.
    """

    def __init__(
        self, widths: Sequence[int] = (64,), hidden: Sequence[int] = (256, 256), classes: int = 10
    ) -> None:
        super().__init__()
        convs: list[nn.Module] = []
        for before, width in zip((3, *widths[:-1]), widths, strict=True):
            convs += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            convs += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv = nn.Sequential(*convs)
        self.fc1 = nn.Linear(widths[-1] * (32 >> len(widths)) ** 2, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.out = nn.Linear(hidden[1], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(glorot)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(self.conv(x).flatten(1)))
        return self.out(torch.relu(self.fc2(h)))


@final
class VGG16(nn.Module):
    """VGG-16 for 32x32 images: thirteen 3x3 convolutions with BatchNorm, one linear layer.

    Args:
        width: of the first convolutions; the others have 2, 4, 8 and 8 times as many channels.
        classes: number of classes.
        init: called on each module after its own initialization; None: nothing.

    Reference: Simonyan & Zisserman (2015), arXiv:1409.1556; as in Frankle et al. (2020), arXiv:1912.05671.
    """

    def __init__(
        self, width: int = 64, classes: int = 10, init: Callable[[nn.Module], None] | None = None
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for times, n in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(n):
                conv = nn.Conv2d(channels, times * width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(times * width), nn.ReLU()]
                channels = times * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(channels, classes)
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init is not None:
            self.apply(self.init)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x).mean((2, 3)))


@final
class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images: three stages of three blocks, with 1x1 convolution shortcuts.

    Args:
        classes: number of classes.
        width: channels of the first stage; the others have 2 and 4 times as many.
        init: called on each module after its own initialization; None: nothing.

    Reference: He et al. (2016), arXiv:1512.03385, Section 4.2.
    """

    def __init__(
        self, classes: int = 10, width: int = 16, init: Callable[[nn.Module], None] | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = width
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for i in range(3):
                blocks.append(Block(channels, out, stride if i == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(channels, classes)
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init is not None:
            self.apply(self.init)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


@final
class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(h + self.shortcut(x))


@final
class ResNeXt(nn.Module):
    """A small ResNeXt for 32x32 images: grouped convolutions in bottleneck blocks with BatchNorm.

    Reference: Xie et al. (2017), arXiv:1611.05431.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256), groups: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = 32
        for width in widths:
            blocks += [
                Bottleneck(channels, width, groups, stride=2),
                Bottleneck(width, width, groups, stride=1),
            ]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


@final
class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int, out: int, groups: int, stride: int) -> None:
        super().__init__()
        inner = out // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))
