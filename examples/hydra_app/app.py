"""A Hydra app of one's own that takes schedules, criteria and so on from the installed package.

`python app.py`, then `python app.py --multirun schedule=cubic criterion=random rounds=2,3`.
"""

from collections import OrderedDict

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Nothing here knows of pruning."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"hidden": nn.Linear(8, 64), "relu": nn.ReLU(), "out": nn.Linear(64, 2)}
        self.net = nn.Sequential(OrderedDict(layers))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16, shuffle=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Train what the config says."""
    seed_everything(cfg.seed, verbose=False)
    callbacks = [callback for callback in map(instantiate, cfg.callbacks) if callback]  # rewind=none is empty
    trainer = instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(Classifier())
    pruner = trainer.callbacks[0]
    print(
        f"sparsity {pruner.sparsity:.3f} after {pruner.round} prunings, {pruner.schedule}, {pruner.criterion}"
    )


if __name__ == "__main__":
    main()
