"""The networks of the experiments. Their last layer is named `out`."""

import torch
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-300-100: a fully connected network, Gaussian Glorot initialization, zero biases.

    Reference: LeCun et al. (1998); as in Frankle & Carbin (2019), arXiv:1803.03635, Figure 2: 266,200 weights.
    """

    def __init__(self, inputs: int = 784, hidden: tuple[int, int] = (300, 100), classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.out = nn.Linear(hidden[1], classes)
        for layer in (self.fc1, self.fc2, self.out):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


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
