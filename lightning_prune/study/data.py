"""Data sets as tensors in memory, batches sliced from them."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from typing_extensions import final, override

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

    train, test = _downloaded(MNIST, root, "MNIST/raw", download)
    order = torch.randperm(len(train.data), generator=torch.Generator().manual_seed(seed))
    x, y = train.data[order] / 255, train.targets[order]
    return Splits((x[5000:], y[5000:]), (x[:5000], y[:5000]), (test.data / 255, test.targets))


def cifar10(
    root: str, download: bool = True, seed: int = 0, normalize: Callable[[Splits], Splits] | None = None
) -> Splits:
    """CIFAR-10 as in the lottery ticket papers: 45,000 / 5,000 (a random sample) / 10,000, pixels in [0, 1].

    Args:
        root: the folder that holds `cifar-10-batches-py`.
        download: fetch the files into `root` where they are missing.
        seed: draws the validation split.
        normalize: applied to all of it, such as `per_channel`.

    Raises:
        FileNotFoundError: when the files are neither there nor to be had.
    """
    from torchvision.datasets import CIFAR10

    train, test = _downloaded(CIFAR10, root, "cifar-10-batches-py", download)
    order = np.random.default_rng(seed).permutation(len(train.data))
    x, y = train.data.transpose(0, 3, 1, 2)[order], np.asarray(train.targets)[order]
    held_out = _pair(test.data.transpose(0, 3, 1, 2), np.asarray(test.targets))
    splits = Splits(_pair(x[5000:], y[5000:]), _pair(x[:5000], y[:5000]), held_out)
    return normalize(splits) if normalize else splits


def _downloaded(dataset: Any, root: str, folder: str, download: bool) -> list[Any]:
    """The training and the test part of a data set of torchvision."""
    try:
        return [dataset(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"data.root={root}: {dataset.__name__} is not in {Path(root).resolve() / folder} and could not "
            f"be downloaded ({error}). It must be in one of them. Set data.root to a folder that holds "
            "it, or connect to the internet."
        ) from error


def npz(
    path: str,
    validation: int = 1000,
    seed: int = 0,
    normalize: Callable[[Splits], Splits] | None = None,
    examples: int | None = None,
    pixels: int | None = None,
) -> Splits:
    """Any file of arrays `x_train`, `y_train`, `x_test`, `y_test`, for instance a subset of CIFAR-10.

    Integer inputs are pixels and become [0, 1].

    Args:
        path: the .npz file.
        validation: training examples set aside, drawn at random.
        seed: draws them.
        normalize: applied to all of it, such as `per_channel`.
        examples: use only so many of the training and of the test examples; None: all.
        pixels: images become so high and so wide, each pixel a mean; None: as they are. Allowed are divisors
            of their size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"data.path={path}: there is no such file. It must be an .npz file: set data.path to one."
        )
    arrays = np.load(path)
    if missing := [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]:
        raise ValueError(
            f"data.path={path}: lacks the arrays {missing}; it has {sorted(arrays)}. It needs x_train, "
            "y_train, x_test and y_test. Save them under these names."
        )
    order = np.random.default_rng(seed).permutation(len(arrays["x_train"]))[:examples]
    x, y = arrays["x_train"][order], arrays["y_train"][order]
    splits = Splits(
        train=_pair(x[validation:], y[validation:], pixels),
        val=_pair(x[:validation], y[:validation], pixels),
        test=_pair(arrays["x_test"][:examples], arrays["y_test"][:examples], pixels),
    )
    return normalize(splits) if normalize else splits


def _pair(x: np.ndarray, y: np.ndarray, pixels: int | None = None) -> Pair:
    inputs = torch.from_numpy(x).float()
    if np.issubdtype(x.dtype, np.integer):
        inputs = inputs.div_(255)
    return inputs if pixels is None else _smaller(inputs, pixels), torch.from_numpy(y).long()


def _smaller(images: Tensor, pixels: int) -> Tensor:
    size = images.shape[2:]
    if len(size) != 2 or pixels < 1 or any(n % pixels for n in size):
        raise ValueError(
            f"data.pixels={pixels}: the inputs have the shape {tuple(images.shape[1:])}; allowed are "
            "divisors of the height and width of images. Give one, such as half of it."
        )
    return torch.nn.functional.avg_pool2d(images, [n // pixels for n in size])


def per_channel(splits: Splits) -> Splits:
    """Images with mean 0 and standard deviation 1 in each channel, over the training images."""
    x = splits.train[0]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Splits(*(((x - mean) / std, y) for x, y in (splits.train, splits.val, splits.test)))


def per_image(splits: Splits) -> Splits:
    """Images with mean 0 and standard deviation 1 each ("per-image standardization")."""

    def standardized(x: Tensor) -> Tensor:
        least = x[0].numel() ** -0.5  # an image of one colour has no deviation
        std = x.std((1, 2, 3), correction=0, keepdim=True).clamp(min=least)
        return (x - x.mean((1, 2, 3), keepdim=True)) / std

    return Splits(*((standardized(x), y) for x, y in (splits.train, splits.val, splits.test)))


def pad_crop_flip(x: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """The standard augmentation of CIFAR, on a batch: zero-pad, crop at random, mirror half of the images.

    Args:
        x: images (N, C, H, W).
        padding: on each side.
        generator: of the draws; None: the global one, which the run's seed starts.

    Reference: He et al. (2016), arXiv:1512.03385, Section 4.2.
    """
    n, channels, height, width = x.shape
    top, left = (torch.randint(2 * padding + 1, (n, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows, across = top + torch.arange(height), torch.arange(width)
    columns = left + torch.where(mirrored, across.flip(0), across)
    padded = torch.nn.functional.pad(x, [padding] * 4)
    at = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[(*at, rows[:, None, :, None], columns[:, None, None, :])]


@final
class Sliced(Dataset[Pair]):
    """Tensors of which a whole batch is sliced at once, not collated sample by sample."""

    def __init__(self, tensors: Pair) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Pair:
        return self.tensors[0][index], self.tensors[1][index]

    def __getitems__(self, at: Any) -> Pair:
        return self.tensors[0][at], self.tensors[1][at]


@final
class Places(BatchSampler):
    """Where the examples of each batch lie: one tensor a batch, or one slice where they follow each other.

    Lists of numbers take longer to make than a small network takes to train on the batch, and a slice copies
    nothing. The order is drawn as torch's own `BatchSampler` draws it.
    """

    @override
    def __iter__(self) -> Generator[Any, None, None]:
        if isinstance(self.sampler, SequentialSampler):
            n = len(self.sampler)
            yield from (slice(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size))
        else:
            yield from torch.tensor(list(self.sampler)).split(self.batch_size)


@final
class Batches(LightningDataModule):
    """Loaders over splits: shuffled training batches; validation and test in large ones, in this order.

    Args:
        splits: the data.
        batch_size: training batch.
        eval_batch_size: validation and test batch.
        augment: applied to the inputs of each training batch, such as `pad_crop_flip`.
    """

    def __init__(
        self,
        splits: Splits,
        batch_size: int,
        eval_batch_size: int = 5000,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.augment = augment
        self.splits = splits
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size

    @override
    def train_dataloader(self) -> DataLoader[Pair]:
        return self._loader(self.splits.train, RandomSampler, self.batch_size, self._augmented)

    def _augmented(self, batch: Any) -> Any:
        return (self.augment(batch[0]), batch[1]) if self.augment else batch

    @override
    def val_dataloader(self) -> list[DataLoader[Pair]]:
        return [self.in_order(self.splits.val), self.in_order(self.splits.test)]

    def in_order(self, pair: Pair) -> DataLoader[Pair]:
        """Large batches of a split, in its order."""
        return self._loader(pair, SequentialSampler, self.eval_batch_size, _as_it_is)

    def _loader(
        self, pair: Pair, sampler: Callable[[Any], Sampler[int]], size: int, collate: Callable[[Any], Any]
    ) -> DataLoader[Pair]:
        data = Sliced(pair)
        places = Places(sampler(data), size, drop_last=False)
        return DataLoader(data, batch_sampler=places, collate_fn=collate)


def _as_it_is(batch: Any) -> Any:
    return batch
