"""What changes on the way from `lightning.pytorch.callbacks.ModelPruning`: both behaviours, side by side."""

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(LightningModule):
    """Two layers and a batch normalization."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 2)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.last(self.norm(self.first(batch[0])).relu()), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def loader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16)

    train_dataloader = val_dataloader = loader


def fit(*callbacks, model=None, epochs=3, ckpt_path=None, checkpointing=False):
    """A short fit from the same initialization; returns the model."""
    torch.manual_seed(0)
    model = model or Net()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=checkpointing,
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


def peer(amount=0.5, **options):
    """ModelPruning on the two linear layers of the model that `setup` will see."""

    class Of(ModelPruning):
        def setup(self, trainer, pl_module, stage):
            self._parameters_to_prune = [(pl_module.first, "weight"), (pl_module.last, "weight")]
            super().setup(trainer, pl_module, stage)

    return Of("l1_unstructured", parameters_to_prune=None, amount=amount, **options)


def ours(rate=0.5, rounds=2, **options):
    """The same amount of what is left, at every epoch but the first."""
    return lp.IterativeMagnitudePruning(lp.schedules.Geometric(rate), rounds=rounds, **options)


def zeros(model):
    """Fraction of the weights of both layers that is 0."""
    weights = torch.cat([model.first.weight.flatten(), model.last.weight.flatten()])
    return f"{float((weights == 0).double().mean()):.3f}"


def default_targets():
    """Which parameters are pruned when none are named."""
    with_defaults = ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)
    theirs = [name for name, p in fit(with_defaults, epochs=1).named_parameters() if bool((p == 0).any())]
    pruner = ours(rounds=1)
    fit(pruner, epochs=2)
    return ", ".join(theirs), ", ".join(pruner.masks)


def state_dict_keys():
    """The names in a checkpoint's state_dict during training."""
    seen = []

    class Keys(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append([key for key in pl_module.state_dict() if key.startswith("first")])

    fit(peer(), Keys(), epochs=2)
    fit(ours(), Keys(), epochs=2)
    return ", ".join(seen[1]), ", ".join(seen[-1])


def rewinding():
    """How far the kept weights are from initialization when an epoch starts, rewinding to it (0 is right)."""

    class Distance(Callback):
        def __init__(self):
            self.seen = []

        def on_train_start(self, trainer, pl_module):
            self.start = pl_module.first.weight.detach().clone()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                kept = pl_module.first.weight != 0
                distance = (pl_module.first.weight - self.start)[kept].norm()
                self.seen.append(f"{float(distance):.2f}")

    theirs, mine = Distance(), Distance()
    fit(peer(amount=0.2, use_lottery_ticket_hypothesis=True), theirs, epochs=5)
    fit(ours(rate=0.2, rounds=4), lp.LotteryTicketRewind(), mine, epochs=5)
    return " ".join(theirs.seen), " ".join(mine.seen)


def after_the_fit():
    """The model that `fit` leaves after one pruning with rewinding: trained, or at its initialization."""
    torch.manual_seed(0)
    start = Net().first.weight
    verdicts = []
    for callbacks, epochs in (([peer()], 1), ([ours(rounds=1), lp.LotteryTicketRewind()], 2)):
        weight = fit(*callbacks, epochs=epochs).first.weight
        kept = weight != 0
        verdicts.append("untrained" if torch.equal(weight[kept], start[kept]) else "trained")
    return tuple(verdicts)


def several_fits():
    """Sparsity after each of three fits of one epoch and one pruning, with the same callback."""
    theirs, mine, seen = peer(use_lottery_ticket_hypothesis=False), ours(rounds=3), ([], [])
    model, other = Net(), Net()
    for _ in range(3):
        seen[0].append(zeros(fit(theirs, model=model, epochs=1)))
    fit(mine, model=other, epochs=1)  # the first round is dense
    for _ in range(3):
        seen[1].append(zeros(fit(mine, model=other, epochs=1)))
    return " ".join(seen[0]), " ".join(seen[1])


def resumption():
    """Sparsity after three prunings, stopped after the second one and resumed from its checkpoint."""
    results = []
    with TemporaryDirectory() as folder:
        for make, epochs in (
            (lambda: peer(use_lottery_ticket_hypothesis=False), 3),
            (lambda: ours(rounds=3), 4),
        ):
            path = Path(folder, f"{epochs}")
            save = ModelCheckpoint(path, "last")
            fit(make(), save, epochs=epochs - 1, checkpointing=True)
            results.append(zeros(fit(make(), epochs=epochs, ckpt_path=path / "last.ckpt")))
    return tuple(results)


def checkpoint_scores():
    """The validation loss a checkpoint was saved with, and that of its weights."""
    results = []
    with TemporaryDirectory() as folder:
        for i, callback in enumerate((peer(use_lottery_ticket_hypothesis=False), ours(rounds=1))):
            save = ModelCheckpoint(Path(folder, str(i)), "best", monitor="val_loss", save_top_k=1)
            fit(callback, save, epochs=2, checkpointing=True)
            model = Net()
            stored = torch.load(save.best_model_path, weights_only=True)["state_dict"]
            model.load_state_dict(stored)
            model.eval()
            with torch.no_grad():
                again = sum(float(model.loss(batch)) for batch in model.loader()) / 4
            results.append(f"{float(save.best_model_score):.4f} is {again:.4f}")
    return tuple(results)


def structured_with_norms():
    """Pruning whole neurons of a model with batch normalization, with default targets."""
    try:
        options = {"use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 2}
        fit(ModelPruning("ln_structured", amount=0.5, **options), epochs=1)
        theirs = "works"
    except ValueError as error:
        theirs = f"ValueError: {error}".split(".")[0]
    pruner = ours(rounds=1, granularity=lp.granularity.Filter(dim=0, n=2))
    fit(pruner, epochs=2)
    dead = sum(int((~mask.any(1)).sum()) for mask in pruner.masks.values())
    return theirs, f"{dead} neurons are off"


ROWS = (
    default_targets,
    state_dict_keys,
    rewinding,
    after_the_fit,
    several_fits,
    resumption,
    checkpoint_scores,
    structured_with_norms,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for row in ROWS:
        theirs, mine = row()
        print(f"{row.__doc__}\n  ModelPruning:    {theirs}\n  lightning_prune: {mine}\n")
