"""One training that can be stopped anywhere and started again with the same call."""

import os
import signal

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lightning_prune as lp
from lightning_prune import rewind
from tests.networks import Net, fitter

EPOCHS = 8
EARLY_BIRD = rewind.EarlyBird(distance=0.3, masks=2)
REWINDS = {  # what stands beside the pruning callback, by name: another process has to be told
    "weights": {"to_step": 2, "policy": rewind.weights},
    "learning_rate": {"to_step": 2, "policy": rewind.learning_rate},
    "fine_tune": {"policy": rewind.fine_tune},
    "nothing": {"policy": rewind.nothing},
    "to an epoch": {"to_epoch": 1},
    "shortened": {"to_epoch": 1, "shorten": True},
    "early bird": {"until": EARLY_BIRD},
    "same batches": {"to_epoch": 1, "same_batches": True},
    "averaged": {"to_step": 2},
}
CLOCKS = {"epochs": {"every_n_epochs": 2}, "steps": {"every_n_train_steps": 7}}  # of three steps an epoch


class Stopped(Exception):
    """What a training is stopped with, where it is not killed."""


class Stop(Callback):
    """At the n-th call of a hook the training ends: by an exception, or without another instruction."""

    def __init__(self, hook, n, kill=False):
        self.calls, self.n, self.kill = 0, n, kill
        setattr(self, hook, self.count)

    def count(self, *_):
        self.calls += 1
        if self.calls == self.n:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped


def last_checkpoint(folder):
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    return found[-1] if found else None


def run(
    folder,
    clock,
    saved,
    stop=None,
    rewinds=None,
    resume="last",
    seed=0,
    to_step=2,
    make=None,
    rate=0.3,
    **options,
):
    """Train, from the last checkpoint in the folder if there is one. Returns all that the run ends with."""
    resume = last_checkpoint(folder) if resume == "last" else resume
    # from the seed of a resumed run nothing may come
    seed_everything(seed if resume is None else seed + 1, verbose=False)
    pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(rate), rounds=3, **CLOCKS[clock], **options)
    rewinder = [] if to_step is None else [lp.LotteryTicketRewind(to_step)]
    if rewinds is not None:
        rewinder = [lp.LotteryTicketRewind(**REWINDS[rewinds])]
    average = [EMAWeightAveraging(decay=0.5)] if rewinds == "averaged" else []
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    model = Net(
        *[make] if make else [],
        schedule=lambda o: one_cycle(o, 0.2, total_steps=max(21, pruner.steps_per_round * 4)),
        interval="step",
    )
    checkpoint = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=saved == "epoch end", every_n_epochs=1
    )
    callbacks = [pruner, *rewinder, *average, checkpoint, *([Stop(*stop)] if stop else [])]
    trainer = fitter(*callbacks, epochs=EPOCHS, enable_checkpointing=True, num_sanity_val_steps=2)
    trainer.fit(model, ckpt_path=resume)
    return {
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "masks": pruner.masks,
        "round": pruner.round,
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "rewinder": rewinder[0].state_dict() if rewinder else None,
        "round ends": pruner.round_ends,
        "random": torch.get_rng_state(),
    }


def run_to_file(folder, *args):
    """The same in a process of its own."""
    torch.set_num_threads(1)
    result = run(folder, *args)
    torch.save(result, folder / "final.pt")
