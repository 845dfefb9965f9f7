"""Ways to run a training, drawn at random: lengths of epochs, evaluations, checkpoints, clocks, loaders."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

import lightning_prune as lp
from tests.networks import Manual, Net, fitter, samples

BATCH = 4


class Noisy(Dataset):
    """Samples with noise from generators of the data set's own."""

    def __init__(self, n):
        self.samples = samples(n)
        self.noise, self.torch = np.random.default_rng(3), torch.Generator().manual_seed(4)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        x, y = self.samples[i]
        return x + 0.1 * float(self.noise.normal()) + 0.1 * torch.randn((), generator=self.torch), y


class Stateful:
    """A loader that keeps its place, as torchdata's StatefulDataLoader does.

    Its state is that of the running iterator, and the first iterator made after loading goes on from there.
    """

    def __init__(self, n, seed=5):
        self.data, self.draws, self.at, self.order, self.loaded = samples(n), None, 0, None, False
        self.draws = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.data) // BATCH

    def __iter__(self):
        if not self.loaded:
            self.at, self.order = 0, torch.randperm(len(self.data), generator=self.draws)
        self.loaded = False
        return self._batches()

    def _batches(self):
        while self.at < len(self):
            picked = self.order[self.at * BATCH : (self.at + 1) * BATCH]
            self.at += 1
            yield tuple(torch.stack(column) for column in zip(*(self.data[i] for i in picked), strict=True))

    def state_dict(self):
        return {"at": self.at, "order": self.order, "draws": self.draws.get_state()}

    def load_state_dict(self, state):
        self.at, self.order, self.loaded = state["at"], state["order"], True
        self.draws.set_state(state["draws"])


LOADERS = {
    "shuffled": lambda n: DataLoader(samples(n), BATCH, shuffle=True),
    "with a generator": lambda n: DataLoader(
        samples(n), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "noisy": lambda n: DataLoader(Noisy(n), BATCH, shuffle=True),
    "stateful": Stateful,
}
SCHEDULES = {
    "none": (None, {}),
    "each step": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97), {"interval": "step"}),
    "each epoch": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8), {"interval": "epoch"}),
    "plateau, each step": (
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.9, patience=0),
        {"interval": "step", "monitor": "val_loss", "strict": False},
    ),
    "plateau, each epoch": (
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        {"interval": "epoch", "monitor": "val_loss", "strict": False},
    ),
}


@dataclass(frozen=True)
class Mode:
    """One way to run a training."""

    batches: int  # of an epoch
    accumulate: int
    evaluate: int | float  # val_check_interval
    every_epochs: int | None  # check_val_every_n_epoch
    sanity: int
    clock: dict[str, int]
    ends: dict[str, int]  # max_epochs or max_steps
    saves: dict[str, Any]  # of ModelCheckpoint, or {"everywhere": True}
    to_step: int | None
    loader: str
    schedule: str
    patience: int | None = None  # of EarlyStopping
    manual: bool = False
    ends_rounds: bool = False  # the patience
    same_batches: bool = False


def a_mode(draw):
    """A mode at random."""
    batches, accumulate = draw.randint(1, 7), draw.choice([1, 1, 2, 3])
    every_epochs = draw.choice([1, 1, 2, None, None])
    evaluate = draw.choice([1.0, 0.5, draw.randint(1, batches), batches])
    if every_epochs is None:
        evaluate = draw.randint(1, 2 * batches + 1)
    steps = -(-batches // accumulate)  # of an epoch
    clock = draw.choice([{"every_n_epochs": draw.randint(1, 2)}, {"every_n_train_steps": draw.randint(2, 6)}])
    length = clock.get("every_n_train_steps") or clock["every_n_epochs"] * steps
    epochs = draw.randint(3, 5) if batches > 2 else draw.randint(4, 9)
    ends = draw.choice([{"max_epochs": epochs}, {"max_steps": epochs * steps - draw.choice([0, 0, 1])}])
    saves = draw.choice(
        [
            {"every_n_train_steps": draw.randint(1, 4)},
            {"every_n_epochs": draw.randint(1, 2), "save_on_train_epoch_end": True},
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"monitor": "val_loss"},
            {"everywhere": True},
        ]
    )
    if draw.random() < 0.1:  # two optimizers that step every second batch
        steps = {"max_epochs": ends.get("max_epochs", 3)}
        to_step = draw.choice([None, 0])
        return Mode(
            batches, 1, evaluate, every_epochs, 2, clock, steps, saves, to_step, "noisy", "none", None, True
        )
    return Mode(
        batches,
        accumulate,
        evaluate,
        every_epochs,
        draw.choice([0, 2]),
        clock,
        ends,
        saves,
        draw.choice([None, 0, draw.randrange(length)]),
        draw.choice(list(LOADERS)),
        draw.choice(list(SCHEDULES)),
        draw.choice([None, None, None, 1, 2]),
    )


def a_mode_of_rounds(draw):
    """One in which patience ends rounds, or every round sees the same batches."""
    while True:
        mode = a_mode(draw)
        if draw.random() < 0.5 and not mode.manual:
            return replace(
                mode, patience=draw.choice([1, 2]), ends_rounds=True, to_step=draw.choice([None, 0])
            )
        if "every_n_epochs" in mode.clock and not mode.manual:
            return replace(mode, to_step=0, same_batches=True)


class Trace(Callback):
    """What happened, in order; the checkpoint knows how much of it had happened."""

    def __init__(self):
        self.seen, self.before = [], 0

    def note(self, hook, trainer, *more):
        self.seen.append((hook, trainer.current_epoch, trainer.global_step, *more))

    def on_train_epoch_start(self, trainer, model):
        self.note("epoch starts", trainer)

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.note("batch", trainer, batch_idx, batch[0].sum().item())

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.note("batch ends", trainer, outputs["loss"].item() if outputs else None)

    def on_validation_end(self, trainer, model):
        if not trainer.sanity_checking:
            self.note("validation", trainer, trainer.callback_metrics["val_loss"].item())

    def on_train_epoch_end(self, trainer, model):
        self.note("epoch ends", trainer)

    def on_prune(self, trainer, model, masks):
        self.note("pruning", trainer)

    def state_dict(self):
        return {"happened": self.before + len(self.seen)}

    def load_state_dict(self, state):
        self.before = state["happened"]


class Everywhere(Callback):
    """A checkpoint at the end of each batch, validation and epoch."""

    def __init__(self, folder):
        self.folder, self.saved = folder, 0

    def save(self, trainer, *_):
        if not trainer.sanity_checking:
            self.saved += 1
            trainer.save_checkpoint(self.folder / f"{self.saved:03}.ckpt")

    on_train_batch_end = on_validation_end = on_train_epoch_end = save

    def state_dict(self):
        return {"saved": self.saved}

    def load_state_dict(self, state):
        self.saved = state["saved"]


def train(mode, folder, resume=None, before=(), **options):
    """Train in this mode. Returns all that the run ends with, and its trace."""
    # From the seed of a resumed run nothing may come.
    seed_everything(0 if resume is None else 1, verbose=False)
    schedule, how = SCHEDULES[mode.schedule]

    class Task(Manual if mode.manual else Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("seen", self.seen)  # else it is in no checkpoint

        def train_dataloader(self):
            return LOADERS[mode.loader](BATCH * mode.batches)

        def configure_optimizers(self):
            configured = super().configure_optimizers()
            if isinstance(configured, dict):
                configured["lr_scheduler"] |= how
            return configured

    model = Task() if mode.manual else Task(schedule=schedule)
    options_of_rounds = {**mode.clock, "end_round_on_early_stop": mode.ends_rounds}
    pruner = lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.3), rounds=3, **options_of_rounds)
    again = {"same_batches": mode.same_batches}
    rewinder = [] if mode.to_step is None else [lp.LotteryTicketRewind(mode.to_step, **again)]
    stopper = [EarlyStopping("val_loss", patience=mode.patience, strict=False)] if mode.patience else []
    if "everywhere" in mode.saves:
        saver = Everywhere(folder)
    else:
        saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **mode.saves)
    trace = Trace()
    trainer = fitter(
        *before,
        trace,
        pruner,
        *rewinder,
        *stopper,
        saver,
        enable_checkpointing=True,
        num_sanity_val_steps=mode.sanity,
        val_check_interval=mode.evaluate,
        check_val_every_n_epoch=mode.every_epochs,
        accumulate_grad_batches=mode.accumulate,
        **{"max_epochs": -1, **mode.ends},
        **options,
    )
    trainer.fit(model, ckpt_path=resume)
    return trace, {
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "masks": pruner.masks,
        "round": pruner.round,
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "rewinder": rewinder[0].state_dict() if rewinder else None,
        "round ends": pruner.round_ends,
        "history": [asdict(record) for record in pruner.history],
        "random": torch.get_rng_state(),
    }
