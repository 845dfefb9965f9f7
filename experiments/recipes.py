"""The recipes of `docs/recipes.md`, on MNIST-1D and MNIST: what each way to a sparse network comes to.

`python -m experiments.recipes [--seeds N] [NAME...]` trains the recipes of these names, or all, with N seeds.
It writes `experiments/results/recipes/records.jsonl` and prints the tables of the page. MNIST is in the
folder that `--data` names, or is downloaded into it.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_prune as lp
from lightning_prune.deploy.summary import multiply_adds
from lightning_prune.deploy.timing import alternated, ratio
from lightning_prune.study.data import Batches, Pair, Splits, mnist, mnist1d
from lightning_prune.study.models import LeNet, ResidualMLP
from lightning_prune.study.records import SEPARATOR, Record, read, write
from lightning_prune.study.statistics import interval

RESULTS = Path(__file__).parent / "results" / "recipes" / "records.jsonl"
Callbacks = Callable[[int, int], list[Callback]]  # prunings, epochs of a round -> callbacks


@dataclass(frozen=True)
class Recipe:
    """A way to a sparse network.

    Args:
        network: makes the full-size network.
        callbacks: (prunings, epochs of a round) -> what the Trainer gets.
        rounds: prunings.
        epochs: of a round; a fit has `(rounds + 1) * epochs`.
        rate: the highest learning rate of one cycle, of Adam.
        before: what happens to the network before the fit: called with it, the data and the epochs.
        data: makes the data of the fit.
        latency: whether to measure how many times as fast as the full-size network it has become.
    """

    network: Callable[[], nn.Module]
    callbacks: Callbacks
    rounds: int = 4
    epochs: int = 5
    rate: float = 1e-2
    before: Callable[[nn.Module, Splits, int], None] = lambda network, splits, epochs: None
    data: Callable[[], Splits] = mnist1d
    latency: bool = False


class Task(LightningModule):
    """Classification by what of a network may be trained, at a learning rate of one cycle."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net = net
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Pair) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(
    network: nn.Module, splits: Splits, callbacks: list[Callback], epochs: int, rate: float = 1e-2
) -> nn.Module:
    """Train a network, which may come back smaller."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Task(network, rate)
    trainer.fit(task, Batches(splits, batch_size=128).train_dataloader())
    return task.net


# ------------------------------------------------------------------------------------------ networks and data


def convolutional() -> nn.Module:
    """Three convolutions with batch normalizations."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv1d(before, after, 5, stride, 2, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


_folder = ["data"]  # that holds MNIST


def some_of_mnist() -> Splits:
    """4,000 training images of MNIST, as many as MNIST-1D has, and all for tests."""
    splits = mnist(_folder[0])
    return Splits((splits.train[0][:4000], splits.train[1][:4000]), splits.val, splits.test)


class Encoder(nn.Module):
    """A transformer encoder of one layer over ten tokens of four values."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(4, 24)
        self.positions = nn.Parameter(0.02 * torch.randn(10, 24))
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(self.tokens(x.unflatten(1, (10, 4))) + self.positions).mean(1))


# -------------------------------------------------------------------------------------------------- callbacks


def dense(rounds: int, epochs: int) -> list[Callback]:
    """Nothing is pruned: the network to compare with, trained as long."""
    return []


def rewound(
    policy: lp.rewind.Policy = lp.rewind.everything,
    to_epoch: int = 0,
    allocate: lp.allocation.Allocation | None = None,
) -> Callbacks:
    """To 90 %, the same fraction of what is left in each round, rewound after each."""

    def callbacks(rounds: int, epochs: int) -> list[Callback]:
        pruner = lp.IterativeMagnitudePruning(
            lp.schedules.Geometric(to=0.9),
            rounds=rounds,
            every_n_epochs=epochs,
            allocate=allocate or lp.allocation.global_rank,
        )
        return [pruner, lp.LotteryTicketRewind(to_epoch=min(to_epoch, epochs - 1), policy=policy)]

    return callbacks


def gradual(rounds: int, epochs: int) -> list[Callback]:
    """To 90 % in the first half of one training, a little after each epoch, and no rewind."""
    prunings = max(1, (rounds + 1) * epochs // 2)
    return [lp.IterativeMagnitudePruning(lp.schedules.Cubic(0.9, rounds=prunings), rounds=prunings)]


def channels(**how: Any) -> Callbacks:
    """Half of the channels go at once, and the others train on through another cycle of learning rates."""

    def callbacks(rounds: int, epochs: int) -> list[Callback]:
        pruner = lp.StructuredChannelPruning(
            lp.schedules.OneShot(0.5), rounds=1, every_n_epochs=epochs, remove="each_round", **how
        )
        return [pruner, lp.LotteryTicketRewind(policy=lp.rewind.learning_rate)]

    return callbacks


def zeros_kept(rounds: int, epochs: int) -> list[Callback]:
    """Zeros stay zeros."""
    return [lp.IterativeMagnitudePruning(lp.schedules.Hold(), rounds=0, masks="zeros")]


# --------------------------------------------------------------------------------------------- before the fit


def pretrained(prune: Callable[[nn.Module, Splits], object] | None = None) -> Callable[..., None]:
    """The backbone has been trained on the signals backwards; it is pruned, frozen, and gets a new head."""

    def before(network: nn.Module, splits: Splits, epochs: int) -> None:
        fit(network, backwards(splits), [], 2 * epochs)
        network.eval()  # statistics of batch normalizations are frozen, too
        if prune:
            prune(network, splits)
        network.requires_grad_(False)
        assert isinstance(network, nn.Sequential)
        network[-1] = nn.Linear(32, 10)

    return before


def less_of_the_backbone(**how: Any) -> Callable[[nn.Module, Splits], object]:
    """70 % of the backbone's weights go, with 512 training signals for what asks for data."""

    def prune(network: nn.Module, splits: Splits) -> object:
        batches = list(splits.train[0][:512].split(128))
        return lp.prune(network, 0.7, exclude=["12.weight"], data=batches, **how)

    return prune


def dense_already(network: nn.Module, splits: Splits, epochs: int) -> None:
    """The network has been trained on the signals backwards."""
    fit(network, backwards(splits), [], 2 * epochs)


def sparse_already(network: nn.Module, splits: Splits, epochs: int) -> None:
    """The network has been trained on the signals backwards, to 90 %."""
    fit(network, backwards(splits), gradual(1, epochs), 2 * epochs)


def backwards(splits: Splits) -> Splits:
    """The same signals backwards: another task that is like it."""
    return Splits(*((x.flip(1), y) for x, y in (splits.train, splits.val, splits.test)))


# ---------------------------------------------------------------------------------------------------- recipes

RECIPES: dict[str, dict[str, Recipe]] = {
    "mlp": {
        "dense": Recipe(ResidualMLP, dense),
        "rewound to initialization, all weights ranked together": Recipe(ResidualMLP, rewound()),
        "rewound to initialization, every layer alike": Recipe(
            ResidualMLP, rewound(allocate=lp.allocation.uniform)
        ),
        "learning rates rewound": Recipe(ResidualMLP, rewound(lp.rewind.learning_rate)),
        "gradual": Recipe(ResidualMLP, gradual),
    },
    "cnn": {
        "dense": Recipe(convolutional, dense),
        "rewound to initialization": Recipe(convolutional, rewound()),
        "rewound to epoch 1": Recipe(convolutional, rewound(to_epoch=1)),
        "learning rates rewound": Recipe(convolutional, rewound(lp.rewind.learning_rate)),
        "gradual": Recipe(convolutional, gradual),
    },
    "transformer": {
        "dense": Recipe(Encoder, rate=3e-3, callbacks=dense),
        "learning rates rewound, all weights ranked together": Recipe(
            Encoder, rate=3e-3, callbacks=rewound(lp.rewind.learning_rate)
        ),
        "learning rates rewound, every layer alike": Recipe(
            Encoder, rate=3e-3, callbacks=rewound(lp.rewind.learning_rate, allocate=lp.allocation.uniform)
        ),
        "gradual": Recipe(Encoder, rate=3e-3, callbacks=gradual),
    },
    "mnist": {
        "dense": Recipe(LeNet, dense, rate=3e-3, data=some_of_mnist),
        "rewound to initialization, all weights ranked together": Recipe(
            LeNet, rewound(), rate=3e-3, data=some_of_mnist
        ),
        "learning rates rewound": Recipe(
            LeNet, rewound(lp.rewind.learning_rate), rate=3e-3, data=some_of_mnist
        ),
        "gradual": Recipe(LeNet, gradual, rate=3e-3, data=some_of_mnist),
    },
    "frozen": {
        "dense": Recipe(convolutional, dense, rounds=0, before=pretrained()),
        "magnitude, all weights ranked together": Recipe(
            convolutional, dense, rounds=0, before=pretrained(less_of_the_backbone())
        ),
        "magnitude, every layer alike": Recipe(
            convolutional,
            dense,
            rounds=0,
            before=pretrained(less_of_the_backbone(allocate=lp.allocation.uniform)),
        ),
        "SparseGPT layer by layer, every layer alike": Recipe(
            convolutional,
            dense,
            rounds=0,
            before=pretrained(less_of_the_backbone(criterion=lp.criteria.SparseGPT(), layer_by_layer=True)),
        ),
    },
    "channels": {
        "dense": Recipe(convolutional, dense, rounds=1, latency=True),
        "L1 norm, every layer alike": Recipe(convolutional, channels(), rounds=1, latency=True),
        "random channels": Recipe(
            convolutional, channels(criterion=lp.filters.RandomChannels()), rounds=1, latency=True
        ),
    },
    "zeros": {
        "dense network, no masks": Recipe(ResidualMLP, dense, rounds=0, before=dense_already),
        "90 % sparse network, no masks": Recipe(ResidualMLP, dense, rounds=0, before=sparse_already),
        "90 % sparse network, zeros kept": Recipe(ResidualMLP, zeros_kept, rounds=0, before=sparse_already),
    },
}


def train(name: str, way: str, recipe: Recipe, seed: int) -> Record:
    """Follow a recipe. The record says what is left of the weights of the full-size network."""
    seed_everything(seed, verbose=False)
    network, splits = recipe.network(), recipe.data()
    full = deepcopy(network).eval()
    total = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    recipe.before(network, splits, recipe.epochs)
    callbacks = recipe.callbacks(recipe.rounds, recipe.epochs)
    trained = fit(network, splits, callbacks, (recipe.rounds + 1) * recipe.epochs, recipe.rate).eval()
    alive = sum(int(p.count_nonzero()) for p in trained.parameters() if p.dim() > 1)
    x, y = splits.test
    with torch.inference_mode():
        right = float((trained(x).argmax(1) == y).float().mean())
    metrics: dict[str, float] = {"test_acc": right, "multiply_adds": multiply_adds(trained, x[:1])[""]}
    if recipe.latency:
        metrics["times_as_fast"] = times_as_fast(trained, full, x[:128])
    return {
        "kind": f"{name}{SEPARATOR}{way}",
        "seed": seed,
        "round": recipe.rounds,
        "sparsity": 1 - alive / total,
        "alive": alive,
        "total": total,
        "metrics": metrics,
    }


@torch.inference_mode()
def times_as_fast(network: nn.Module, full: nn.Module, batch: Tensor) -> float:
    """The latency of the full-size network over that of this one: alternated runs, the fastest tenth of them.

    In CPU time of one thread, which other jobs of a machine disturb least.
    """

    def work(net: nn.Module) -> Callable[[], float]:
        def spent() -> float:
            start = process_time()
            net(batch)
            return process_time() - start

        return spent

    times = alternated({"full": work(full), "own": work(network)}, at_least=2.0, warm_up=3)
    return ratio(times["full"], times["own"]).value


def table(records: Sequence[Record], name: str) -> str:
    """Test accuracy in percent, mean over seeds and its 95 % interval, of each way of a recipe.

    Where latency was measured, how many times as fast the network became: the median of the seeds.
    """
    measured = any(recipe.latency for recipe in RECIPES[name].values())
    lines = [
        f"| way | weights left | multiply-adds |{' times as fast |' if measured else ''} test accuracy |",
        "|---|---|---|---|" + "---|" * measured,
    ]
    for way in RECIPES[name]:
        found = [r for r in records if r["kind"] == f"{name}{SEPARATOR}{way}"]
        low, mean, high = interval([100 * r["metrics"]["test_acc"] for r in found])
        left, count = found[0]["alive"] / found[0]["total"], found[0]["metrics"]["multiply_adds"]
        fast = f" {median(r['metrics']['times_as_fast'] for r in found):.1f} |" if measured else ""
        lines.append(f"| {way} | {left:.0%} | {count:,} |{fast} {mean:.1f} [{low:.1f}, {high:.1f}] |")
    return "\n".join(lines)


def main() -> None:
    """Train what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default=_folder[0], help="the folder of MNIST")
    given = parser.parse_args()
    _folder[0] = given.data
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in given.names or RECIPES:
        ways = RECIPES[name].items()
        new = [train(name, way, recipe, s) for way, recipe in ways for s in range(1, given.seeds + 1)]
        kept = [r for r in read(RESULTS)[0] if not r["kind"].startswith(f"{name}{SEPARATOR}")]
        write(RESULTS, [*kept, *new])
        print(f"{name}\n\n{table(new, name)}\n", flush=True)


if __name__ == "__main__":
    main()
