"""Small LightningModules that have what real ones have, and a Trainer that says nothing."""

from copy import deepcopy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fitter(*callbacks, epochs=None, **options):
    """A Trainer that writes nothing and shows nothing, unless told to."""
    if epochs is not None:
        options["max_epochs"] = epochs
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    quiet |= {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def samples(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] * x[:, 2] > 0).long() + (x[:, 3] > 1).long())


def loader(n=24, batch=8, shuffle=True):
    return DataLoader(samples(n), batch_size=batch, shuffle=shuffle)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


class Net(LightningModule):
    """Batch normalization, dropout, a non-persistent buffer; 6*16 + 16*16 + 16*3 = 400 prunable weights."""

    def __init__(self, make=sgd, schedule=None, dropout=0.2, batch=8, n=24, interval="epoch"):
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(dropout)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)
        self.make, self.schedule, self.interval = make, schedule, interval
        self.n, self.batch = n, batch

    def forward(self, x):
        return self.head(torch.relu(self.body(self.drop(torch.relu(self.norm(self.stem(x)))))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += 1
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self):
        return loader(self.n, self.batch)

    def val_dataloader(self):
        return DataLoader(samples(16, seed=1), batch_size=8)


class Manual(Net):
    """Manual optimization: two optimizers, accumulation over two batches, clipping before the step."""

    def __init__(self, clip=0.5):
        super().__init__()
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        first = [*self.stem.parameters(), *self.norm.parameters(), *self.body.parameters()]
        return sgd(first), torch.optim.Adam(self.head.parameters(), lr=0.01)


class Gan(LightningModule):
    """Two networks against each other: toggled optimizers, one step of each a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))
        self.critic = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        first, second = self.optimizers()
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        bce = nn.functional.binary_cross_entropy_with_logits

        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(bce(self.critic(self.generator(torch.randn(len(x), 4))), ones))
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        second.zero_grad()
        fake = self.generator(torch.randn(len(x), 4)).detach()
        self.manual_backward(bce(self.critic(x), ones) + bce(self.critic(fake), zeros))
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        make = lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.5, 0.999), weight_decay=0.1)  # noqa: E731
        return make(self.generator.parameters()), make(self.critic.parameters())

    def train_dataloader(self):
        return loader()


def bits_of(tensor):
    return tensor.detach().contiguous().view(INTEGER[tensor.dtype.itemsize])


def same(a, b):
    """Equal bit for bit: tensors, and dicts, lists and tuples of them."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if a.is_floating_point():
            return torch.equal(bits_of(a), bits_of(b))
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def dead_are_zero(tensors, masks):
    """Dead weights are +0.0, every bit of them."""
    return all(not bits_of(tensors[name])[~mask].any() for name, mask in masks.items())


def state(trainer):
    """A copy of all that a training changes."""
    model = trainer.lightning_module
    return deepcopy(
        {
            "params": {n: p.detach() for n, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        }
    )


class Watch(Callback):
    """Looks at the dead weights at every moment a user could, and keeps what it saw."""

    def __init__(self, pruner):
        self.pruner, self.checked, self.rounds, self.masks = pruner, 0, [], []

    def look(self, trainer, model, *_):
        assert dead_are_zero(dict(model.named_parameters()), self.pruner.masks)
        self.checked += 1

    on_train_batch_end = on_before_zero_grad = on_validation_start = on_validation_batch_end = look
    on_train_end = on_fit_end = look

    def on_train_epoch_end(self, trainer, model):
        self.look(trainer, model)
        self.rounds.append(self.pruner.round)
        self.masks.append(self.pruner.masks)
