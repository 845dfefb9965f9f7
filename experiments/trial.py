"""The first hour of a newcomer: 90 % sparsity on a small ResNet, with OneCycle, patience and checkpoints.

`python -m experiments.trial SEED...` trains, for each seed, as the README leads one, and once more with a
learning rate schedule as long as the whole fit, which a module made for plain training had in the first
version of this library. It writes `experiments/results/trial/records.jsonl` and prints the table of
`docs/schedules.md`.

At a reduced scale, so that ten fits take a few minutes on one core: 2,000 images of 16x16 pixels, 8 to 32
channels, 4 epochs a round. The data are `data/cifar10_12k.npz`, or the file that `--data` names.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import lightning_prune as lp
from lightning_prune.study.data import Batches, Pair, Splits, npz, per_channel
from lightning_prune.study.models import Block
from lightning_prune.study.records import Record, described, read, write
from lightning_prune.study.statistics import by_seed, interval, paired

RESULTS = Path(__file__).parent / "results" / "trial" / "records.jsonl"
ROUNDS, EPOCHS = 4, 4  # prunings, and the epochs of a round


class Net(LightningModule):
    """A small ResNet, made for plain training: its schedule is as long as the trainer says.

    Args:
        total_steps: instead, how long the schedule is.
    """

    def __init__(self, total_steps: int | None = None) -> None:
        super().__init__()
        self.total_steps = total_steps
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.features = nn.Sequential(stem, Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x).mean((2, 3)))

    def training_step(self, batch: Pair) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Pair) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def halved(splits: Splits) -> Splits:
    """Images of half the height and width, each channel with mean 0 and deviation 1."""
    smaller = Splits(*((avg_pool2d(x, 2), y) for x, y in (splits.train, splits.val, splits.test)))
    return per_channel(smaller)


def train(seed: int, kind: str, splits: Splits, rounds: int = ROUNDS, epochs: int = EPOCHS) -> list[Record]:
    """One fit, and the test accuracy of the best checkpoint of each of the rounds in the bare class.

    Args:
        seed: of initialization and data order.
        kind: "round" or "fit": what the learning-rate schedule is as long as.
        splits: the data.
        rounds: prunings.
        epochs: of a round.
    """
    seed_everything(seed, verbose=False)
    data = Batches(splits, batch_size=64)
    steps = (rounds + 1) * epochs * len(data.train_dataloader())
    model = Net(total_steps=steps if kind == "fit" else None)
    with tempfile.TemporaryDirectory() as folder:
        pruner = lp.IterativeMagnitudePruning(
            lp.schedules.Geometric(to=0.9), rounds=rounds, every_n_epochs=epochs, end_round_on_early_stop=True
        )
        best = ModelCheckpoint(folder, "{round:.0f}", monitor="val_loss")
        patience = EarlyStopping("val_loss", patience=3)
        trainer = Trainer(
            max_epochs=(rounds + 1) * epochs,
            callbacks=[pruner, lp.LotteryTicketRewind(to_step=0), patience, best],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data.train_dataloader(), data.in_order(splits.val))
        records: list[Record] = []
        for row in pruner.history:
            bare = Net()
            bare.load_state_dict(torch.load(pruner.best(row.round))["state_dict"], strict=True)
            masks = {name: p != 0 for name, p in bare.named_parameters() if name in pruner.masks}
            metrics = {"test_acc": accuracy(bare, splits.test), "steps": row.steps}
            records.append({"kind": kind, "seed": seed, **described(row.round, masks), "metrics": metrics})
    return records


@torch.no_grad()
def accuracy(model: nn.Module, test: Pair) -> float:
    """Of the test images, the fraction that is right."""
    model.eval()
    right = torch.cat([model(x).argmax(1) == y for x, y in zip(*(t.split(500) for t in test), strict=True)])
    return float(right.float().mean())


def table(records: Sequence[Record]) -> str:
    """Test accuracies in percent by round, and paired differences, with 95 % intervals over the seeds."""
    rows = [
        "| sparsity | schedule of the whole fit, rewound | schedule of a round | difference |",
        "|---|---|---|---|",
    ]
    for left in dict.fromkeys(round(r["alive"] / r["total"], 4) for r in records):
        kinds = [by_seed(records, "test_acc", kind, left) for kind in ("fit", "round")]
        values = [*map(list, (kind.values() for kind in kinds)), paired(kinds[1], kinds[0])]
        cells = [_percent(v) for v in values]
        rows.append(f"| {1 - left:.1%} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _percent(values: Sequence[float]) -> str:
    low, mean, high = interval([100 * v for v in values])
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Train both ways with each seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--data", default="data/cifar10_12k.npz")
    given = parser.parse_args()
    torch.set_num_threads(1)
    splits = npz(given.data, validation=500, normalize=halved, examples=2500)
    for seed in given.seeds:
        for kind in ("round", "fit"):
            others = [r for r in read(RESULTS)[0] if (r["seed"], r["kind"]) != (seed, kind)]
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            write(RESULTS, [*others, *train(seed, kind, splits)])
    print(table(read(RESULTS)[0]))


if __name__ == "__main__":
    main()
