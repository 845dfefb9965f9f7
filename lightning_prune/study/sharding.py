"""Sharding: FSDP2 in processes that are forked by a run and end with it."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import final, override

from lightning_prune.shards import is_sharded, whole


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network over the processes of a mesh, each module that has parameters of its own as a group."""
    from torch.distributed.fsdp import fully_shard

    if any(map(is_sharded, net.parameters())):
        return  # of a fit before
    for module in [*net.modules()][::-1]:  # from the leaves on
        if module is net or next(module.parameters(recurse=False), None) is not None:
            fully_shard(module, mesh=mesh)


@final
class ForkedModelParallel(ModelParallelStrategy):
    """`ModelParallelStrategy` whose processes are forked, as those of `ddp_fork`.

    Lightning's own starts the command anew for each of them, which a run in a locked folder cannot be. The
    module of the first process has the trained weights afterwards, whole.
    """

    @override
    def _configure_launcher(self) -> None:
        self._launcher = _Forked(self, start_method="fork")

    @override
    def setup_environment(self) -> None:
        # In a forked process the first call replaces torch's pool of threads, which it does not guard: two
        # threads that come to it at once, as autograd's may, abort the process.
        torch.set_num_threads(torch.get_num_threads())
        super().setup_environment()


@final
class _Forked(_MultiProcessingLauncher):
    @override
    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> Any:
        module = trainer.lightning_module
        handle = module.register_state_dict_post_hook(_put_together)
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            handle.remove()


def _put_together(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            state[name] = whole(value.detach())
