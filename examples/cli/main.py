"""LightningCLI: pruning from the YAML alone. `python main.py fit --config config.yaml`."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Nothing here knows of pruning."""

    def __init__(self, width: int = 32, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16, shuffle=True)


if __name__ == "__main__":
    cli = LightningCLI(Classifier, save_config_callback=None, seed_everything_default=0)
    pruner = cli.trainer.callbacks[0]
    print(f"sparsity {pruner.sparsity:.3f} after {pruner.round} prunings")
