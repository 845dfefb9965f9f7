"""Checkpoints: written all or nothing, checked when they are read, in plain containers; masks out of them."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import final, override

from lightning_prune import folders
from lightning_prune.callbacks import _lightning
from lightning_prune.checks import named
from lightning_prune.copies import gathered
from lightning_prune.files import check_archive, is_archive, replacing
from lightning_prune.masks import Masks, pack_one, unpack
from lightning_prune.shards import in_words


@final
class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, in its own format, written all or nothing and checked when they are read.

    They are written as `lightning_prune.files` does it, so that a kill or a full disk leaves the checkpoint
    that was there. (Lightning writes to the system's temporary folder, and where that is on
    another device, copies from there over the old file.) As a file is read, its checksums are compared, which
    torch does not do. Remote paths are left to Lightning.

    The pruning callbacks put it in the place of Lightning's default; give the Trainer another `CheckpointIO`
    plugin to have that one instead.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or (target := _local(path)) is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause: BaseException = error
            while cause.__context__ and not isinstance(cause, OSError):  # torch has an error of its own
                cause = cause.__context__
            kept = "the one that was there is as it was" if target.exists() else "there was none before"
            raise OSError(
                f"the checkpoint {str(target)!r} could not be written ({cause}); {kept}. "
                "A place with room is needed. Make room, or give ModelCheckpoint another dirpath, and resume."
            ) from error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if (local := _local(path)) is not None and folders.is_folder(local):
            return folders.whole(local, weights_only)
        try:
            if local is not None and local.is_file():
                check_archive(local)
            checkpoint = super().load_checkpoint(path, map_location, weights_only)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"ckpt_path={str(path)!r}: it is cut off, damaged, or no checkpoint at all ({error}). "
                "Allowed are whole files that a Trainer wrote; resume from the one before it."
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(
            checkpoint
        ):
            raise ValueError(
                f"ckpt_path={str(path)!r}: it is no checkpoint of a Trainer. Load a bare state_dict into the "
                "model before `fit`, without ckpt_path, which needs a Trainer's."
            )
        return checkpoint


def _local(path: str | Path) -> Path | None:
    """Where on this machine a path or URL is, if it is here at all."""
    return Path(url_to_fs(str(path))[1]) if get_protocol(str(path)) in ("file", "local") else None


def write_shards(trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """As a checkpoint is written: let it have what is sharded in the state of a callback.

    Of callbacks Lightning writes what process 0 has. A checkpoint in a folder gets the shards beside those of
    the optimizers, each process writes its own, and Lightning reads only what it has an optimizer for; a
    checkpoint in one file gets them gathered, as Lightning gathers the weights, masks at one bit a weight.
    """
    if key not in checkpoint.get("callbacks", {}):
        return
    states = checkpoint["callbacks"]
    if _lightning.writes_folders(trainer):
        states[key], shards = folders.set_apart(states[key], key)
        if shards:
            checkpoint.setdefault("optimizer_states", []).append({"callbacks": shards})
    else:
        states[key] = whole_state(states[key])


def whole_state(state: Any) -> Any:
    """The state of a callback with what is sharded gathered on process 0, masks at one bit a weight."""
    return gathered(state, lambda t: pack_one(t) if t.dtype == torch.bool else t.cpu())


def read_shards(trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """As a checkpoint is read: give the state of a callback what `write_shards` set apart, in even shards."""
    path = trainer.strategy.broadcast(trainer.ckpt_path)
    if key in checkpoint["callbacks"] and path and (local := _local(path)) and folders.is_folder(local):
        state = checkpoint["callbacks"][key]
        checkpoint["callbacks"][key] = folders.put_together(state, local, shards=trainer.world_size > 1)


def make_plain(checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
    """Make the hyper-parameters plain: a DictConfig would be unreadable with `weights_only=True`."""
    for key in (pl_module.CHECKPOINT_HYPER_PARAMS_KEY, "datamodule_hyper_parameters"):
        if key in checkpoint:
            checkpoint[key] = _plain(checkpoint[key])
    checkpoint.pop(pl_module.CHECKPOINT_HYPER_PARAMS_TYPE, None)


def _plain(value: Any) -> Any:
    """Containers of any library, such as omegaconf's, as dicts and lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [_plain(v) for v in value]
    return value


def first_masks(given: str | Path | Mapping[str, Tensor] | None, params: Mapping[str, Tensor]) -> Masks:
    """The masks that a callback starts from, as its argument `masks=` says.

    >>> first_masks("zeros", {"w": torch.tensor([0.0, 2.0])}), first_masks(None, {"w": torch.zeros(2)})
    ({'w': tensor([False,  True])}, {'w': tensor([True, True])})

    Args:
        given: None: all are alive; "zeros": those that are not zero; masks; or the path of a file of some.
        params: the weights, by name.

    Raises:
        ValueError: when the file holds none.
    """
    if given is None:
        return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    if given == "zeros":
        return {name: p.detach() != 0 for name, p in params.items()}
    return dict(given) if isinstance(given, Mapping) else load_masks(given)


def first_in_words(given: str | Path | Mapping[str, Tensor] | None) -> str:
    """What `masks=` is, to be compared between processes, on each of which a file may have another name."""
    if isinstance(given, Mapping):
        return in_words(given)
    return named(given) if given in (None, "zeros") else "a path"


def load_masks(path: str | Path) -> Masks:
    """The masks in a checkpoint of a callback that prunes or grows, or in a file of {name: bool tensor}.

    Raises:
        ValueError: when the file holds neither, or is a folder.
    """
    if isinstance(path, (str, Path)) and folders.is_folder(path):
        raise ValueError(
            f"masks={str(path)!r}: it is a folder of torch.distributed.checkpoint, which is read by pickle; "
            "allowed are files of tensors. Resume from it with ckpt_path=, or load it into the model by "
            'lp.load_pruned(model, folder, weights_only=False) and give masks="zeros".'
        )
    error = ValueError(
        f"masks={str(path)!r}: allowed is a checkpoint written with IterativeMagnitudePruning or "
        "DynamicSparseTraining, or a file in "
        'which torch.save put {parameter name: bool tensor}; or "zeros". Name one of these.'
    )
    try:
        if is_archive(Path(path)):
            check_archive(Path(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # whatever reading a file of another kind may end with
        raise error from cause
    if not isinstance(stored, dict):
        raise error
    for key, state in stored.get("callbacks", {}).items():
        if key.startswith(("IterativeMagnitudePruning", "DynamicSparseTraining")):
            return unpack(state["masks"])
    if stored and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in stored.values()):
        return stored
    raise error
