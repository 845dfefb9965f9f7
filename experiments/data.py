"""Data sets as tensors in memory, batches sliced from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Splits:
    """Inputs and labels of the three splits."""

    train: Pair
    val: Pair
    test: Pair


@cache
def mnist1d(seed: int = 42) -> Splits:
    """MNIST-1D: 4,000 training and 1,000 test signals of length 40 in 10 classes, generated, not downloaded.

    The validation split is another 1,000 signals of the same distribution.

    Reference: Greydanus & Kobak (2024), arXiv:2011.14439.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    args: Any = get_dataset_args()
    with isolate_rng():  # the generator seeds the global ones
        args.seed = seed
        published: Any = make_dataset(args)
        args.seed, args.num_samples, args.train_split = seed + 1, 1000, 0.999
        fresh: Any = make_dataset(args)
    return Splits(
        train=_pair(published["x"], published["y"]),
        val=_pair(
            np.concatenate([fresh["x"], fresh["x_test"]]), np.concatenate([fresh["y"], fresh["y_test"]])
        ),
        test=_pair(published["x_test"], published["y_test"]),
    )


def mnist(root: str, download: bool = True, seed: int = 0) -> Splits:
    """MNIST as in the lottery ticket papers: 55,000 / 5,000 (a random sample) / 10,000, pixels in [0, 1].

    Args:
        root: the folder that holds `MNIST/raw`.
        download: fetch the files into `root` where they are missing.
        seed: draws the validation split.

    Raises:
        FileNotFoundError: when the files are neither there nor to be had.
    """
    from torchvision.datasets import MNIST

    try:
        train, test = (MNIST(root, train=t, download=download) for t in (True, False))
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"data.root={root}: MNIST is not in {Path(root).resolve() / 'MNIST' / 'raw'} and could not be "
            f"downloaded ({error}). Set data.root to a folder that holds it, or connect to the internet."
        ) from error
    order = torch.randperm(len(train.data), generator=torch.Generator().manual_seed(seed))
    x, y = train.data[order] / 255, train.targets[order]
    return Splits((x[5000:], y[5000:]), (x[:5000], y[:5000]), (test.data / 255, test.targets))


def npz(path: str, validation: int = 1000, seed: int = 0) -> Splits:
    """Any file of arrays `x_train`, `y_train`, `x_test`, `y_test`, for instance a subset of CIFAR-10.

    Integer inputs are pixels and become [0, 1].

    Args:
        path: the .npz file.
        validation: training examples set aside, drawn at random.
        seed: draws them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.path={path}: there is no such file. Set data.path to an .npz file.")
    arrays = np.load(path)
    if missing := [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]:
        raise ValueError(f"data.path={path}: lacks the arrays {missing}; it has {sorted(arrays)}.")
    order = np.random.default_rng(seed).permutation(len(arrays["x_train"]))
    x, y = arrays["x_train"][order], arrays["y_train"][order]
    return Splits(
        train=_pair(x[validation:], y[validation:]),
        val=_pair(x[:validation], y[:validation]),
        test=_pair(arrays["x_test"], arrays["y_test"]),
    )


def _pair(x: np.ndarray, y: np.ndarray) -> Pair:
    inputs = torch.from_numpy(x / 255 if np.issubdtype(x.dtype, np.integer) else x).float()
    return inputs, torch.from_numpy(y).long()


class Sliced(Dataset[Pair]):
    """Tensors of which a whole batch is sliced at once, not collated sample by sample."""

    def __init__(self, tensors: Pair) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Pair:
        return self.tensors[0][index], self.tensors[1][index]

    def __getitems__(self, indices: Sequence[int]) -> Pair:
        at = torch.tensor(indices)
        return self.tensors[0][at], self.tensors[1][at]


class Batches(LightningDataModule):
    """Loaders over splits: shuffled training batches; validation and test in large ones, in this order.

    Args:
        splits: the data.
        batch_size: training batch.
        eval_batch_size: validation and test batch.
    """

    def __init__(self, splits: Splits, batch_size: int, eval_batch_size: int = 5000) -> None:
        super().__init__()
        self.splits = splits
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size

    @override
    def train_dataloader(self) -> DataLoader[Pair]:
        data = Sliced(self.splits.train)
        return DataLoader(data, self.batch_size, shuffle=True, collate_fn=_as_it_is)

    @override
    def val_dataloader(self) -> list[DataLoader[Pair]]:
        return [self.in_order(self.splits.val), self.in_order(self.splits.test)]

    def in_order(self, pair: Pair) -> DataLoader[Pair]:
        """Large batches of a split, in its order."""
        return DataLoader(Sliced(pair), self.eval_batch_size, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
