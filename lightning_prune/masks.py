"""Masks: which weights are alive, how one is born, how it is put on a tensor, how it is stored.

A mask is a bool tensor of its weight's shape, True where the weight is alive. `keep_top` is the only place
where a mask is born.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

Masks = dict[str, Tensor]
Scores = dict[str, Tensor]

DEAD = float(
    "-inf"
)  # the score of a dead weight: below every score a weight can have, so it is never a candidate

# Selection reads its tensors in pieces of this many elements: one that stays in the processor's cache is read
# from memory once and worked on several times.
_CHUNK = 1 << 18
_DIGIT = 1 << 16


class Keep(dict[str, int]):
    """Survivors per tensor. A plain dict does as well.

    `near` is a score that separates survivors from losers in most of the tensors. An allocation that ranks
    all tensors by one threshold knows it, and saves `keep_top` the search for each tensor's own.
    """

    near: float | None = None


def _chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    size = _CHUNK if tensor.device.type == "cpu" else _CHUNK << 8
    for chunk in tensor.detach().reshape(-1).split(size):
        yield chunk.to(dtype)


def _integer(dtype: torch.dtype) -> torch.dtype:
    """The integer type as wide as `dtype`."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _flip(bits: Tensor) -> Tensor:
    """Turn the bits of floats into integers of the same order, or back (it is its own inverse)."""
    highest = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & highest)


def threshold(scores: Iterable[Tensor], keep: int) -> tuple[float, int]:
    """The `keep`-th highest of all scores, and how many of those equal to it are among the `keep` highest.

    A radix select on the bits of the floats, mapped to integers of the same order, 16 bits a pass: exact,
    linear, and without a copy of its input. The histograms of several tensors simply add up.

    >>> threshold([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], keep=2)
    (2.0, 1)

    Args:
        scores: floating point tensors of any shapes, without NaN.
        keep: 1 ... number of scores.
    """
    tensors = list(scores)
    total = sum(t.numel() for t in tensors)
    if not 1 <= keep <= total:
        raise ValueError(f"keep={keep}: allowed is 1 to {total}, the number of scores.")
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    integer, width = _integer(dtype), dtype.itemsize * 8
    tensors = [t for t in tensors if t.numel()]
    signed = any(bool(c.view(integer).amin() < 0) for t in tensors for c in _chunks(t, dtype))

    prefix = 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(_DIGIT, dtype=torch.int64)
        for tensor in tensors:
            for chunk in _chunks(tensor, dtype):
                # -0.0 + 0.0 is +0.0: the two zeros are equal as scores
                key = _flip((chunk + 0.0).view(integer)) if signed else chunk.view(integer)
                if shift == width - 16:  # the first digit carries the sign
                    digit = (key >> shift).to(torch.int32) + _DIGIT // 2
                else:
                    digit = (key[(key >> (shift + 16)) == prefix] >> shift) & (_DIGIT - 1)
                counts += torch.bincount(digit, minlength=_DIGIT).cpu()
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, keep))
        keep -= int(from_top[place - 1]) if place else 0
        bucket = _DIGIT - 1 - place
        prefix = bucket - _DIGIT // 2 if shift == width - 16 else (prefix << 16) | bucket
    key = torch.tensor(prefix, dtype=integer)
    return (_flip(key) if signed else key).view(dtype).item(), keep


def count_above(scores: Tensor, score: float, *, or_equal: bool = False) -> int:
    """How many of the scores are above `score`, without a temporary as large as the scores."""
    compare = torch.ge if or_equal else torch.gt
    # torch rounds a number to the dtype of the tensor that it is compared with
    exact = torch.tensor(score, dtype=scores.dtype).item() == score
    dtype = scores.dtype if exact else torch.float64
    return sum(int(compare(c, score).count_nonzero()) for c in _chunks(scores, dtype))


def keep_top(scores: Tensor, keep: int, near: float | None = None) -> Tensor:
    """The mask of the `keep` highest scores; of equal scores the one of the lower index (row-major) is kept.

    >>> keep_top(torch.tensor([1.0, 3.0, 1.0, 2.0]), keep=3)
    tensor([ True,  True, False,  True])

    Args:
        scores: a floating point tensor of any shape, without NaN.
        keep: 0 ... number of scores.
        near: a score that may separate the two sets exactly. It only saves time: the result is the same
            without it.
    """
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"keep={keep}: allowed is 0 to {scores.numel()}, the number of scores.")
    flat = scores.detach().reshape(-1)
    if keep in (0, flat.numel()):
        return torch.full_like(scores, keep > 0, dtype=torch.bool, memory_format=torch.contiguous_format)
    if near is not None:
        for compare in (torch.ge, torch.gt):
            mask = compare(flat, near)
            if int(mask.count_nonzero()) == keep:
                return mask.view(scores.shape)
    cut, ties = threshold([flat], keep)
    mask = flat > cut
    for part, chunk in zip(mask.split(_CHUNK), flat.split(_CHUNK), strict=True):
        here = (chunk == cut).nonzero().flatten()[:ties]
        part[here] = True
        ties -= len(here)
        if not ties:
            break
    return mask.view(scores.shape)


def alive(masks: Mapping[str, Tensor]) -> int:
    """How many weights the masks leave alive."""
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many weights are alive in both, and how many in either.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> overlap({"w": a}, {"w": b}), jaccard({"w": a}, {"w": b})
    ((1, 3), 0.3333333333333333)

    Raises:
        ValueError: when the two are not masks of the same weights.
    """
    if (these := _shapes(masks)) != (those := _shapes(others)):
        name = next(n for n in {**these, **those} if these.get(n) != those.get(n))
        raise ValueError(
            f"masks: {name} has the shape {these.get(name)} in one and {those.get(name)} in the other; "
            "allowed are two masks of the same weights. Compare runs of the same network."
        )
    pairs = [(mask.bool(), others[name].to(mask.device).bool()) for name, mask in masks.items()]
    return sum(int((a & b).sum()) for a, b in pairs), sum(int((a | b).sum()) for a, b in pairs)


def jaccard(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The Jaccard index of two masks: alive in both over alive in either; 1 where nothing is alive."""
    both, either = overlap(masks, others)
    return both / either if either else 1.0


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def bits(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as integers as wide as the elements of `like`: all ones where alive, all zeros where dead."""
    return mask.to(device=like.device, dtype=_integer(like.dtype)).neg_()


def zero_dead_(tensor: Tensor, alive_bits: Tensor) -> None:
    """Set dead elements to +0.0 in place, whatever they hold; leave the others as they are, bit for bit.

    A bitwise AND: as fast as the multiplication `tensor * mask`, which leaves -0.0 and turns infinity into
    NaN.

    >>> x = torch.tensor([-1.0, float("inf"), 2.0])
    >>> zero_dead_(x, bits(torch.tensor([False, False, True]), like=x))
    >>> x
    tensor([0., 0., 2.])
    """
    tensor.detach().view(alive_bits.dtype).bitwise_and_(alive_bits)


def pack(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | list[int]]]:
    """Masks at one bit a weight, in plain containers and tensors.

    >>> packed = pack({"w": torch.tensor([[True, False, True]])})
    >>> packed
    {'w': {'shape': [1, 3], 'bits': tensor([160], dtype=torch.uint8)}}
    >>> unpack(packed)
    {'w': tensor([[ True, False,  True]])}
    """
    return {name: {"shape": list(mask.shape), "bits": _pack(mask)} for name, mask in masks.items()}


def unpack(packed: Mapping[str, Mapping[str, Tensor | list[int]]]) -> Masks:
    """The masks that `pack` stored."""
    return {
        name: _unpack(torch.as_tensor(p["bits"]), [int(n) for n in p["shape"]]) for name, p in packed.items()
    }


def _pack(mask: Tensor) -> Tensor:
    flat = mask.detach().cpu().reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(rows), dtype=torch.uint8)
    for place in range(8):
        packed |= rows[:, place].to(torch.uint8) << (7 - place)
    return packed


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    rows = torch.stack([(packed >> (7 - place)) & 1 for place in range(8)], dim=1)
    return rows.to(torch.bool).view(-1)[: torch.Size(shape).numel()].view(shape).clone()
