"""Plain PyTorch, no Trainer: iterative pruning with rewinding in a loop of one's own."""

import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.rewind import Snapshot

torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x[:, 0] * x[:, 1] > 0).long()

net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
start = Snapshot.take(net, [optimizer])

print(lp.targets(net))  # a dry run: what would be pruned, and why the rest would not
params = lp.pruning.prunable(net)
masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
handle = lp.hold(net, optimizer, masks)
for round in range(4):
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()  # the hold sets dead weights to zero after it
    sparsity = lp.metrics.Sparsity()(masks)
    print(f"round {round}: sparsity {sparsity:.3f}, loss {loss:.3f}")
    if round < 3:
        masks = lp.pruning.next_masks(params, masks, [(list(params), 1 - 0.5 ** (round + 1))])
        start.restore(net, [optimizer])
        handle.set(masks)
handle.remove()
