"""Shards: tensors of which each process holds a part, as FSDP2 and tensor parallel hold parameters.

Such a tensor is a DTensor. Here it says which part of the whole a process has (rows, columns, strided ones,
uneven, empty, or all of it), and processes tell each other what it takes to select together. What a process
tells does not grow with the number of weights.
"""

import copy
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs, final

from lightning_prune.checks import check_alike

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> "TypeIs[DTensor]":
    """Whether a tensor is a DTensor: one of which each process may hold a part.

    >>> is_sharded(torch.ones(2))
    False
    """
    room = sys.modules.get("torch.distributed.tensor")  # which takes long to import, where nobody has yet
    return room is not None and isinstance(tensor, room.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process has, in the same memory; of a whole tensor, all of it.

    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local().detach()


def placed(part: Tensor, like: Tensor) -> Tensor:
    """What this process has of a tensor as one that lies as `like` does: the inverse of `local`."""
    if not is_sharded(like):
        return part
    # A part keeps its device: that of a snapshot is the CPU, wherever the parameter is.
    mesh, places = like.device_mesh, like.placements
    return type(like).from_local(
        part, mesh, places, run_check=False, shape=like.shape, stride=_strides(like.shape)
    )


def evenly(tensor: Tensor) -> "DTensor":
    """An empty tensor of this shape and dtype on the CPU, of which each of all processes has as many rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, empty

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return empty(
        tensor.shape,
        dtype=tensor.dtype,
        device_mesh=mesh,
        placements=[Shard(0) if tensor.dim() else Replicate()],
    )


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor of the shape of `other`, lying as that one does. A whole one is cut here, nothing is sent.

    All processes must call it where `tensor` is sharded in another way.
    """
    if is_sharded(other):
        if not is_sharded(tensor):
            return placed(part_of(tensor, other), other)
        if (tensor.device_mesh, tensor.placements) == (other.device_mesh, other.placements):
            return tensor
        if tensor.device_mesh != other.device_mesh:
            return placed(part_of(whole(tensor), other), other)
        with torch.no_grad():
            return tensor.redistribute(placements=other.placements)
    return whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. All processes must call it where it is sharded."""
    if not is_sharded(tensor):
        return tensor
    here, device = tensor.to_local(), tensor.device_mesh.device_type
    if here.device.type != device:  # a snapshot is on the CPU, and processes may talk by their GPUs only
        return whole(placed(here.to(device), tensor))
    with torch.no_grad():
        return tensor.full_tensor()


def part_of(tensor: Tensor, other: Tensor) -> Tensor:
    """What this process would have of a whole tensor that lay as `other` does: a copy.

    Where the tensor has size 1, and the other one more, it stays so, to be broadcast.
    """
    part = tensor.detach()
    for dim, indices in enumerate(indices_of(other)):
        if tensor.shape[dim] == other.shape[dim] and len(indices) != tensor.shape[dim]:
            part = part.index_select(dim, indices.to(part.device))
    return part.contiguous()


def indices_of(tensor: Tensor) -> list[Tensor]:
    """Of each dimension of a whole tensor the indices that this process has, in its order.

    >>> indices_of(torch.ones(2, 1))
    [tensor([0, 1]), tensor([0])]
    """
    indices = [torch.arange(size) for size in tensor.shape]
    if not is_sharded(tensor):
        return indices
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # the tensor is that of other processes
        return [along[:0] for along in indices]
    for mesh_dim, dim, stride in _cuts(tensor):
        n, mine = tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim]
        # a strided shard has a chunk of each of so many pieces, which a later dimension of the mesh divides
        chunks = [_chunk(piece, n, mine) for piece in indices[dim].chunk(stride)]
        indices[dim] = torch.cat(chunks)
    return indices


@final
@dataclass(frozen=True)
class Part:
    """Which part of a whole tensor a process has: in each dimension the elements of some indices.

    Args:
        indices: of each dimension of the whole tensor, in the order of the part.
        shape: of the whole tensor.
        cut: the dimensions that are divided over processes: the same on all of them.
    """

    indices: tuple[Tensor, ...]
    shape: tuple[int, ...]
    cut: frozenset[int] = frozenset()

    def places(self, elements: Tensor) -> Tensor:
        """Where elements of the part, by flat index, lie in the whole tensor, by flat index.

        >>> Part((torch.tensor([1, 3]), torch.tensor([0, 1])), (4, 2)).places(torch.arange(4))
        tensor([2, 3, 6, 7])
        """
        place, rest, stride = torch.zeros_like(elements), elements, 1
        for along, size in zip(reversed(self.indices), reversed(self.shape), strict=True):
            place += along.to(elements.device)[rest % max(1, len(along))] * stride
            rest, stride = rest // max(1, len(along)), stride * size
        return place

    def along(self, dims: Sequence[int]) -> Tensor:
        """Flat indices, in the whole, of what the part has along some of the dimensions.

        >>> Part((torch.tensor([1, 3]), torch.tensor([0, 1])), (4, 2)).along([0])
        tensor([1, 3])
        """
        found = torch.zeros(1, dtype=torch.int64)
        for dim in dims:
            found = (found.unsqueeze(1) * self.shape[dim] + self.indices[dim]).flatten()
        return found

    def size(self, dims: Sequence[int]) -> int:
        """How many there are along these dimensions in the whole tensor."""
        return math.prod(self.shape[dim] for dim in dims)


def part(tensor: Tensor) -> Part:
    """Which part of a tensor this process has."""
    return Part(tuple(indices_of(tensor)), tuple(tensor.shape), cut(tensor))


def cut(tensor: Tensor) -> frozenset[int]:
    """The dimensions of a tensor that are divided over processes.

    >>> cut(torch.ones(2))
    frozenset()
    """
    if not is_sharded(tensor):
        return frozenset()
    return frozenset(dim for mesh_dim, dim, _ in _cuts(tensor) if tensor.device_mesh.size(mesh_dim) > 1)


def _chunk(indices: Tensor, n: int, i: int) -> Tensor:
    chunks = indices.chunk(n)
    return chunks[i] if i < len(chunks) else indices[:0]


def _cuts(tensor: "DTensor") -> list[tuple[int, int, int]]:
    """(dimension of the mesh, dimension of the tensor that it divides, of how many pieces a chunk)."""
    return [
        (mesh_dim, getattr(placement, "dim", 0) % tensor.dim(), getattr(placement, "split_factor", 1))
        for mesh_dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    ]


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def sum_of(number: int, tensor: Tensor) -> int:
    """The sum of a number over the processes that hold a tensor, replicas once. All of them must call it."""
    if not is_sharded(tensor):
        return number
    mesh = tensor.device_mesh
    here = torch.tensor(number, device=_device(mesh.device_type))
    for mesh_dim, _, _ in _cuts(tensor):
        torch.distributed.all_reduce(here, group=mesh.get_group(mesh_dim))
    return int(here)


def sum_of_data(found: Tensor, used: Tensor, weight: Tensor) -> Tensor:
    """The sum of what processes found that have other data, and of it what belongs to this one's part.

    Processes along the dimensions of the mesh over which FSDP2 put the weight together have other data; along
    those of tensor parallel they have the same. Added in float64, so that their number does not show.

    Args:
        found: of the whole weight's shape, or with size 1 in some dimensions. It may be sharded over
            processes that have the same data.
        used: the weight as it was computed with.
        weight: as it is kept.
    """
    total = whole(found)
    if not is_sharded(weight):
        return total
    mesh = weight.device_mesh
    dims = list(range(mesh.ndim))
    if is_sharded(used):
        same = used.device_mesh
        dims = [] if same == mesh else [dim for dim in dims if _names(mesh)[dim] not in _names(same)]
    if dims:
        exact = total.double()
        for dim in dims:
            torch.distributed.all_reduce(exact, group=mesh.get_group(dim))
        total = exact.to(total.dtype)
    return part_of(total, weight)


def _names(mesh: Any) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def _device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, getattr(torch, kind).current_device())


@final
class Shards:
    """What the processes that hold parts of the same tensors tell each other, to select as one does.

    Args:
        tensors: by name, in the same order on every process; sharded or whole.
        failed: what went wrong on this process before it came here, or None.

    Raises:
        ValueError: on every process, when something went wrong on one, or a tensor is a sum yet to be made.
    """

    def __init__(self, tensors: Mapping[str, Tensor], failed: Exception | None = None) -> None:
        self._parts: Mapping[str, Part] = {name: part(tensor) for name, tensor in tensors.items()}
        meshes = [t.device_mesh for t in tensors.values() if is_sharded(t)]
        self._device = _device(meshes[0].device_type)
        said = failed or _unfit(tensors)
        keys = {name: _key(tensor) for name, tensor in tensors.items()}
        of_ranks = self.told((f"{said}" if said else None, keys))
        if failed is not None:
            raise failed
        for rank, (wrong, theirs) in enumerate(of_ranks):
            if wrong:
                raise ValueError(f"process {rank} failed, and all are needed. Look at its error: {wrong}")
            if list(theirs) != list(keys):
                raise ValueError(
                    f"process {rank} has the weights {', '.join(theirs)}, and this one {', '.join(keys)}; "
                    "allowed is the same model on all. Build it alike."
                )
        first = {name: [theirs for _, theirs in of_ranks] for name in keys}
        me = torch.distributed.get_rank()
        self._counts = {
            name: next(rank for rank, theirs in enumerate(parts) if theirs[name] == keys[name]) == me
            for name, parts in first.items()
        }

    def told(self, value: Any) -> list[Any]:
        """What each process tells, in their order."""
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, value)
        return of_ranks

    def of(self, parts: Mapping[str, Part]) -> "Shards":
        """The same processes, with parts of other tensors: of units of weights, for instance."""
        other = copy.copy(self)
        other._parts = parts  # noqa: SLF001  of the same class
        return other

    def add(self, counts: Tensor) -> Tensor:
        """The sum over all processes of numbers, int64 or float64, equal on each."""
        total = counts.to(self._device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(counts.device)

    def span(self, low: int, high: int) -> tuple[int, int]:
        """The lowest `low` and the highest `high` of all processes."""
        bounds = [torch.tensor(bound, device=self._device) for bound in (low, high)]
        for bound, most in zip(
            bounds, (torch.distributed.ReduceOp.MIN, torch.distributed.ReduceOp.MAX), strict=True
        ):
            torch.distributed.all_reduce(bound, most)
        return int(bounds[0]), int(bounds[1])

    def counts(self, name: str) -> bool:
        """Whether this process is the first that has its part of a tensor; of replicas only one counts."""
        return self._counts[name]

    def part(self, name: str) -> Part:
        """Which part of a tensor this process has."""
        return self._parts[name]

    def agree(self, failed: Exception | None) -> None:
        """Go on if nothing went wrong on any process.

        Raises:
            Exception: `failed`, where it is given; else a ValueError, when another process has one.
        """
        of_ranks = self.told(None if failed is None else f"{failed}")
        if failed is not None:
            raise failed
        for rank, wrong in enumerate(of_ranks):
            if wrong is not None:
                raise ValueError(f"process {rank} failed, and all are needed. Look at its error: {wrong}")


def _key(tensor: Tensor) -> tuple[int, ...]:
    """What tells apart the parts of one tensor: the place of a process in the dimensions that divide it."""
    if not is_sharded(tensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate() or [-1] * tensor.device_mesh.ndim
    return tuple(coordinate[mesh_dim] for mesh_dim, _, _ in _cuts(tensor))


def _unfit(tensors: Mapping[str, Tensor]) -> Exception | None:
    for name, tensor in tensors.items():
        if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
            return ValueError(
                f"{name} is placed as {tensor.placements}: a sum that is yet to be made. Allowed are shards "
                "and replicas. Make it one of them with its `redistribute`."
            )
    return None


def check_given(arguments: Mapping[str, str]) -> None:
    """Make sure that all processes make a call with the same arguments. All of them must call it.

    Raises:
        ValueError: on every process, naming those that differ.
    """
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, dict(arguments))
    check_alike(of_ranks)


def in_words(tensors: Mapping[str, Any]) -> str:
    """What tells apart other tensors of the same names; of shards where they lie, as each process has others.

    >>> in_words({"w": torch.ones(2)}) == in_words({"w": torch.ones(2).bool()})
    False
    """
    return f"{len(tensors)} tensors of the checksum {checksum(tensors):08x}"


def checksum(tensors: Mapping[str, Any]) -> int:
    """Of names, dtypes, shapes and elements; of shards of where they lie in place of their elements."""
    found = 0
    for name, tensor in tensors.items():
        said = f"{name} {type(tensor).__name__}"
        if isinstance(tensor, Tensor):
            said = f"{name} {tensor.dtype} {tuple(tensor.shape)} {getattr(tensor, 'placements', '')}"
            if not is_sharded(tensor) and tensor.layout == torch.strided and not tensor.is_meta:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                found = crc32(flat.view(torch.uint8).numpy().data, found)
        found = crc32(said.encode(), found)
    return found


# ------------------------------------------------------------------------------------------ models of shards


def settle(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, its shards, of which FSDP2 may have left some gathered by a forward.

    Whoever reads parameters of a model has them from here: those that were gathered lose their memory as soon
    as somebody else lets the model show its shards.

    >>> list(settle(nn.Linear(2, 1)))
    ['weight', 'bias']

    Raises:
        ValueError: when the model is sharded in a way in which its parameters are no longer there.
    """
    for module in model.modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if found := sorted(kinds & _FLAT):
            raise ValueError(f"the model is wrapped in {found[0]}, {_INSTEAD}")
        if "FSDPModule" in kinds:
            module.reshard()  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if hasattr(p, "ds_id"):  # of DeepSpeed's ZeRO-3
            raise ValueError(f"{name} is a parameter of DeepSpeed's ZeRO, {_INSTEAD}")
    return parameters


_FLAT = {"FullyShardedDataParallel", "DeepSpeedEngine"}
_INSTEAD = (
    "which keeps parts of weights where no mask can be put on them. Allowed are whole weights and those that "
    "torch.distributed.fsdp.fully_shard (FSDP2) or tensor parallel makes; with Lightning that is "
    "ModelParallelStrategy. Use one of these."
)


def refuse(tensors: Iterable[Tensor], what: str, instead: str) -> None:
    """Refuse what cannot be done on shards.

    Raises:
        ValueError: naming it, when one of the tensors is sharded.
    """
    if any(map(is_sharded, tensors)):
        raise ValueError(f"{what} does not work on weights that are sharded over processes. {instead}")
