"""A structured pruning on two processes, as a script that Lightning starts twice; each writes what it has."""

import os
import sys
import warnings
from copy import deepcopy

import torch
from lightning.pytorch import Callback

import lightning_prune as lp
from tests.networks import Net, fitter


class Keep(Callback):
    """The network as it was trained, before it is cut."""

    def on_train_end(self, trainer, pl_module):
        self.trained = deepcopy(pl_module).eval()


if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, keep = Net(), Keep()
    pruner = lp.StructuredChannelPruning(
        lp.schedules.Linear(sparsity=0.5, rounds=2), rounds=2, criterion=lp.criteria.taylor
    )
    trainer = fitter(keep, pruner, lp.LotteryTicketRewind(), epochs=3, strategy=strategy, devices=2)
    trainer.fit(model)
    x = torch.ones(5, 6)
    with torch.no_grad():
        outputs = keep.trained(x), model.eval()(x)
    result = {"state": model.state_dict(), "outputs": outputs, "world": trainer.world_size}
    torch.save({**result, "channels": pruner.channels}, os.path.join(folder, f"{trainer.global_rank}.pt"))
    trainer.save_checkpoint(os.path.join(folder, "small.ckpt"))
