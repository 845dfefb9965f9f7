"""The LeNet ticket as a plain PyTorch loop, without this library: the check on our own numbers.

`python -m experiments.plain SEED...` prints, for each seed, the step of minimum validation loss of the dense
network and of the ticket at 21.1 % of the weights, and the test accuracies there. Settings as in
`lenet_mnist_short`.
"""

import sys
from copy import deepcopy

import torch
from torch.nn.functional import cross_entropy

from lightning_prune.study.data import Splits, mnist
from lightning_prune.study.models import LeNet


def train(net: LeNet, masks: dict[str, torch.Tensor], data: Splits, steps: int) -> tuple[int, float]:
    """Train, and return the step of minimum validation loss and the test accuracy there."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)
    (x, y), best, step = data.train, (float("inf"), 0, 0.0), 0
    while step < steps:
        for at in torch.randperm(len(x)).split(60):
            optimizer.zero_grad()
            cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
            step += 1
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.mul_(masks.get(name, torch.tensor(1.0)))
                if step % 100 == 0:
                    loss = cross_entropy(net(data.val[0]), data.val[1]).item()
                    accuracy = (net(data.test[0]).argmax(1) == data.test[1]).float().mean().item()
                    best = min(best, (loss, step, accuracy), key=lambda b: b[0])
            if step == steps:
                break
    return best[1], best[2]


def main() -> None:
    """Eight rounds for each seed."""
    torch.set_num_threads(1)
    data = mnist("data", download=True)
    for seed in map(int, sys.argv[1:]):
        torch.manual_seed(seed)
        start = LeNet()
        masks = {name: torch.ones_like(p) for name, p in start.named_parameters() if p.dim() > 1}
        for round in range(8):
            net = deepcopy(start)
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.mul_(masks.get(name, torch.tensor(1.0)))
            step, accuracy = train(net, masks, data, 5000)
            if round in (0, 7):
                left = sum(float(m.sum()) for m in masks.values()) / 266_200
                print(
                    f"seed {seed}: {left:.1%} left, minimum at step {step}, test {accuracy:.2%}", flush=True
                )
            for name, p in net.named_parameters():
                if name in masks:  # the smallest of the living, 20 % of them, 10 % in the output layer
                    keep = int(masks[name].sum().item() * (0.9 if name == "out.weight" else 0.8) + 0.5)
                    cut = p.detach().abs().flatten().topk(keep).values[-1]
                    masks[name] = (p.detach().abs() >= cut).float()


if __name__ == "__main__":
    main()
