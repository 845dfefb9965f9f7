"""One way to size: how many parameters there are, and the bytes of them raw, gzipped and in a sparse file."""

import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.deploy import storage
from lightning_prune.shards import local, sum_of, whole


@dataclass(frozen=True)
class Size:
    """What tensors take. Those that share their memory count once."""

    parameters: int  # elements of parameters, not of buffers
    alive: int  # parameters that are not 0
    raw: int  # bytes of all tensors
    gzip: int  # bytes of the same, gzipped (-6)
    sparse: int  # bytes of the file that `save_sparse` writes


def size(tensors: Mapping[str, Tensor]) -> Size:
    """Size a state dict, without a file. Of sharded tensors all processes must call it.

    >>> layer = nn.Linear(100, 100, bias=False)
    >>> _ = layer.weight.data.copy_(torch.eye(100))
    >>> its = size(layer.state_dict(keep_vars=True))
    >>> its.parameters, its.alive, its.raw, its.gzip < 600, its.sparse < 600
    (10000, 100, 40000, True, True)

    Args:
        tensors: by name, as `state_dict(keep_vars=True)` gives them; without `keep_vars` it does not say
            which of them are parameters. What is no tensor is left out.

    Raises:
        ValueError: when there is a tensor that `save_sparse` cannot store.
        ModuleNotFoundError: without the extra `storage`.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    with tempfile.TemporaryFile() as file:
        storage.write(tensors, file)
        sparse = file.seek(0, 2)
    once = list({storage.memory(tensor): tensor for tensor in tensors.values()}.values())
    parameters = [tensor for tensor in once if isinstance(tensor, nn.Parameter)]
    return Size(
        parameters=sum(p.numel() for p in parameters),
        alive=sum(sum_of(int(local(p).count_nonzero()), p) for p in parameters),
        raw=sum(tensor.nbytes for tensor in once),
        gzip=gzipped(once),
        sparse=sparse,
    )


def gzipped(tensors: list[Tensor]) -> int:
    """Bytes of the elements of these tensors, gzipped as one stream."""
    packer, done = zlib.compressobj(6, wbits=31), 0
    for tensor in tensors:
        data = storage.plain(whole(tensor)).reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), 1 << 20):
            done += len(packer.compress(data[start : start + (1 << 20)]))
    return done + len(packer.flush())
