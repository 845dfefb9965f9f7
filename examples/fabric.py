"""Lightning Fabric: prune once, then train with the masks held on."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp

fabric = Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(0, verbose=False)
x = torch.randn(256, 8)
data = DataLoader(TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long()), batch_size=32, shuffle=True)

net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
model, wrapped = fabric.setup(net, optimizer)
loader = fabric.setup_dataloaders(data)

masks = lp.prune(net, sparsity=0.7, allocate=lp.allocation.uniform)  # the module that Fabric wrapped
handle = lp.hold(net, optimizer, masks)
for _ in range(5):
    for inputs, labels in loader:
        wrapped.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        fabric.backward(loss)
        wrapped.step()
handle.remove()

weights = lp.pruning.prunable(net)
print(f"sparsity {lp.metrics.Sparsity()(weights):.3f}, loss {loss:.3f}")
