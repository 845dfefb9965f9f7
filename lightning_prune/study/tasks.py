"""What is trained: a network on a task, with its optimizer."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import final, override

from lightning_prune.study.sharding import shard

SPLITS = ("val", "test")


@final
class Classification(LightningModule):
    """Classification with cross-entropy; loss and accuracy on the validation and test loaders, in this order.

    Args:
        net: inputs -> logits.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning rate scheduler, stepped every optimizer step.
        classes: number of classes.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], Any] | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.net = net
        self._optimizer = optimizer
        self._scheduler = scheduler
        metrics: dict[str, Metric] = {}
        for split in SPLITS:
            metrics[f"{split}_loss"] = MeanMetric()
            metrics[f"{split}_acc"] = MulticlassAccuracy(classes, average="micro")
        self.metrics = nn.ModuleDict(metrics)

    @override
    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of a strategy that shards
            shard(self.net, self.device_mesh["data_parallel"])

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        if self.trainer.loggers and self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        logits, split = self(batch[0]), SPLITS[dataloader_idx]
        loss, accuracy = self.metrics[f"{split}_loss"], self.metrics[f"{split}_acc"]
        loss.update(cross_entropy(logits, batch[1]), weight=len(batch[1]))  # type: ignore[operator]
        accuracy.update(logits, batch[1])  # type: ignore[operator]
        for name, metric in ((f"{split}_loss", loss), (f"{split}_acc", accuracy)):
            self.log(name, metric, add_dataloader_idx=False)  # type: ignore[arg-type]

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self._scheduler(optimizer), "interval": "step"}]
