"""The masks of a run's rounds: one file a round in its folder, `masks/round-<n>.pt`, one bit a weight.

The file of a round is written when the round begins. A run that is killed and goes on from a checkpoint
writes the files of the rounds that it trains again once more, with the same content.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.files import replacing
from lightning_prune.masks import Masks, alive, pack, unpack
from lightning_prune.study.records import read

Packed = Mapping[str, Mapping[str, Any]]
OLD = "survived.pt"  # of the first version: how many prunings each weight survived, as one byte


@dataclass(frozen=True)
class RoundMasks(Mapping[int, Masks]):
    """Masks by round, held at one bit a weight and unpacked when they are asked for.

    >>> masks = RoundMasks({0: pack({"w": torch.tensor([True, True])})})
    >>> list(masks), masks[0]
    ([0], {'w': tensor([True, True])})

    Args:
        packed: {round: what `lightning_prune.masks.pack` made of its masks}.
    """

    packed: Mapping[int, Packed]

    @override
    def __getitem__(self, round: int) -> Masks:
        return unpack(self.packed[round])

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.packed)

    @override
    def __len__(self) -> int:
        return len(self.packed)


def save(folder: Path, round: int, masks: Masks) -> None:
    """Write the masks of a round to its file, all or nothing, and remove the files of later rounds."""
    files = _files(folder)
    for later in (r for r in files if r > round):
        files[later].unlink()
    path = folder / "masks" / f"round-{round:02}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(pack(masks), file)


def masks_of(folder: Path) -> Mapping[int, Masks]:
    """The masks of the run in a folder by round, in order; none where it has no such files.

    Raises:
        ValueError: when a file is damaged, or the counts of the first version are not those of the records.
    """
    files = _files(folder)
    if not files and (folder / OLD).is_file():
        return _converted(folder)
    found: dict[int, Packed] = {}
    for round in sorted(files):
        found[round] = _load(files[round])
        _unpacked(files[round], found[round])
    return RoundMasks(found)


def lifetimes(masks: Mapping[int, Masks]) -> dict[str, Tensor]:
    """In how many rounds each weight was alive; where masks only shrink, who died first has the fewest.

    >>> a, b = {"w": torch.tensor([True, True])}, {"w": torch.tensor([True, False])}
    >>> lifetimes({0: a, 1: b})
    {'w': tensor([2, 1], dtype=torch.int32)}
    """
    total: dict[str, Tensor] = {}
    for of_round in (masks[round] for round in masks):
        for name, mask in of_round.items():
            total[name] = total[name] + mask if name in total else mask.to(torch.int32)
    return total


def file_size(masks: Masks) -> int:
    """Bytes of the file of a round."""
    buffer = io.BytesIO()
    torch.save(pack(masks), buffer)
    return buffer.tell()


def _files(folder: Path) -> dict[int, Path]:
    numbered = ((path.stem.removeprefix("round-"), path) for path in (folder / "masks").glob("round-*.pt"))
    return {int(number): path for number, path in numbered if number.isdecimal()}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file may end with
        raise _damaged(path) from error


def _unpacked(path: Path, packed: Any) -> Masks:
    try:
        return unpack(packed)
    except Exception as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path}: it is damaged, or does not hold the masks of a round, which are needed. Delete the "
        "folder of the run and start it again."
    )


def _converted(folder: Path) -> RoundMasks:
    """The masks that the counts of the first version stand for, if they agree with the run's records."""
    survived = _load(folder / OLD)
    if not isinstance(survived, dict):
        raise _damaged(folder / OLD)
    records, _ = read(folder / "records.jsonl")
    kinds = [record["kind"] for record in records]
    found: dict[int, Packed] = {}
    for record in (r for r in records if r["kind"] == kinds[0]):  # others are one-shot prunings of the result
        round = record["round"]
        masks = {name: counts >= round for name, counts in survived.items()}
        if round > 255 or alive(masks) != record["alive"]:
            raise ValueError(
                f"{folder / OLD}: the first version of this project counted there, in one byte a weight, how "
                f"many prunings it survived. In round {round} that leaves {alive(masks)} weights alive, and "
                f"records.jsonl says {record['alive']}. Allowed are counts that agree, of at most 255 "
                "rounds. Delete the folder of the run and start it again."
            )
        found[round] = pack(masks)
    return RoundMasks(found)
