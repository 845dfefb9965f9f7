"""Trainings on several processes that talk by gloo: each process does them all and leaves what it saw."""

import multiprocessing
import os
import socket
import traceback
import warnings
from copy import deepcopy
from functools import partial

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import masked
from lightning_prune.evidence import gradients
from lightning_prune.schedules import Explicit, Geometric, OneShot
from tests.networks import Net, bits_of, fitter, samples

RUNS = {}


def run(scenario):
    RUNS[scenario.__name__] = scenario
    return scenario


def pruning(schedule=None, **options):
    return lp.IterativeMagnitudePruning(schedule or Geometric(0.3), **{"rounds": 2, **options})


class Diary(Callback):
    """What this rank trains on, and its weights and masks before and after each pruning."""

    def __init__(self, pruner):
        self.pruner, self.batches, self.before, self.masks, self.after = pruner, [], [], [], []
        self.gradients = []  # those of dead weights, as an optimizer steps
        self.early = {}  # the weights after the first step

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.batches.append(batch[0].clone())
        if trainer.global_step == 1:
            self.early = weights(model, self.pruner.masks)
        if len(self.after) < len(self.masks):
            optimizers = deepcopy([o.state_dict() for o in trainer.optimizers])
            self.after.append({"weights": weights(model, self.pruner.masks), "optimizers": optimizers})

    def on_train_epoch_end(self, trainer, model):
        self.before.append(weights(model, self.pruner.masks))

    def on_before_optimizer_step(self, trainer, model, optimizer):
        for name, mask in self.pruner.masks.items():
            if (grad := model.get_parameter(name).grad) is not None:
                self.gradients.append(int(bits_of(grad)[~mask].count_nonzero()))

    def on_prune(self, trainer, model, masks):
        self.masks.append({n: m.clone() for n, m in masks.items()})


def weights(model, names):
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in names}


def fit(pruner, *others, model=None, world, epochs=3, ddp=None, ckpt_path=None, **options):
    """Fit on all processes, and say what this one saw."""
    model, diary = model or Net(), Diary(pruner)
    start = weights(model, [n for n, _ in model.named_parameters()])
    strategy = DDPStrategy(process_group_backend="gloo", **(ddp or {}))
    options = {"devices": world, "strategy": strategy, **options}
    trainer = fitter(pruner, *others, diary, epochs=epochs, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return {
        "start": start,
        "batches": diary.batches,
        "before": diary.before,
        "prunings": diary.masks,
        "early": diary.early,
        "after": diary.after,
        "gradients": diary.gradients,
        "masks": pruner.masks,
        "weights": dict(model.state_dict()),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "random": torch.get_rng_state(),
        "round": pruner.round,
        "seed": pruner.state_dict()["seed"],
    }


# ------------------------------------------------------------------------------------------------- trainings


@run
def magnitude(world, rank, folder):
    """Rewinding, clipping, a data set whose last batch is short (Lightning's sampler fills it up)."""
    return fit(pruning(), lp.LotteryTicketRewind(1), model=Net(n=59), world=world, gradient_clip_val=0.1)


def rewound(rewind, world, rank, folder):
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = Net(make, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), n=64)
    return fit(pruning(every_n_epochs=3), rewind, model=model, world=world, epochs=9)


POLICIES = {
    "policy_everything": lp.LotteryTicketRewind(1),
    "policy_weights": lp.LotteryTicketRewind(policy=lp.rewind.weights),
    "policy_learning_rate": lp.LotteryTicketRewind(policy=lp.rewind.learning_rate),
    "policy_fine_tune": lp.LotteryTicketRewind(policy=lp.rewind.fine_tune),
    "policy_nothing": lp.LotteryTicketRewind(policy=lp.rewind.nothing),
    "policy_early_bird": lp.LotteryTicketRewind(until=lp.rewind.EarlyBird(distance=0.5, masks=2)),
}
RUNS |= {name: partial(rewound, rewind) for name, rewind in POLICIES.items()}


@run
def weights_that_stand_still(world, rank, folder):
    """So that the masks of every round can be compared with those of one process."""
    return fit(pruning(), model=Net(still), world=world)


still = partial(torch.optim.SGD, lr=0.0)


class Eve(Callback):
    """The state of the model after each step, and the batch of the next one."""

    def __init__(self):
        self.states, self.batches = {}, {}

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.batches[trainer.global_step] = deepcopy(batch)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.states[trainer.global_step] = deepcopy(model.state_dict())


def grown(granularity, world, rank, folder):
    pruner = lp.DynamicSparseTraining(0.8, fraction=0.5, every_n_train_steps=2, granularity=granularity)
    eve = Eve()
    seen = fit(pruner, eve, model=Net(dropout=0.0, n=64), world=world, epochs=4)
    return {**seen, "states": eve.states, "labelled": eve.batches, "explored": pruner.explored}


GROWN = {"rigl": lp.granularity.single, "srigl": lp.growth.FanIn(0.3)}
RUNS |= {name: partial(grown, granularity) for name, granularity in GROWN.items()}


class Troubled(Net):
    """At some steps there is no loss for scores, or an error; the step itself is trained."""

    def __init__(self, at):
        super().__init__(dropout=0.0, n=64)
        self.at = at

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        if "log" not in vars(self) or step not in self.at:  # nothing is logged while scores are made
            return super().training_step(batch, batch_idx)
        if self.at[step] is None:
            return None
        raise OSError(self.at[step])


def by_own_loss(params, model, loss, batches):
    return {n: g.abs() for n, g in gradients(params, model, loss, batches[0]).items()}


def growing_with_trouble(grow, at, world, rank, folder):
    """Updates are due at the steps 2, 4 and 6; `at[rank]` says what is wrong on a rank at which step."""
    pruner, eve = lp.DynamicSparseTraining(0.8, every_n_train_steps=2, until_step=8, grow=grow), Eve()
    model = Troubled(at.get(rank, {}))
    told = "nothing"
    try:
        fit(pruner, eve, model=model, world=world, epochs=3)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    steps = [row.steps for row in pruner.history]
    return {"error": told, "steps": steps, "round": pruner.round, "masks": pruner.masks}


WAITS = {
    f"{name}_{kind}": (grow, at)
    for name, grow in {"gradient": lp.criteria.gradient, "own_loss": by_own_loss}.items()
    for kind, at in {
        "without_loss_on_0": {0: {2: None}},
        "without_loss_on_1": {1: {2: None, 3: None, 4: None}},
        "without_loss_on_both": {0: {2: None}, 1: {2: None, 0: None}},
        "failing_on_1": {0: {4: None}, 1: {4: "no space left"}},
    }.items()
}
RUNS |= {name: partial(growing_with_trouble, *case) for name, case in WAITS.items()}


@run
def random(world, rank, folder):
    return fit(pruning(criterion=lp.criteria.Random(seed=3)), world=world)


def drawn(params, generator):
    return {n: torch.rand(p.shape, generator=generator) for n, p in params.items()}


@run
def drawn_from_the_generator(world, rank, folder):
    return fit(pruning(criterion=drawn), world=world)


def data_driven(criterion, world, **options):
    seen = {}

    def spy(params, grads, batches):
        if not seen:
            seen.update(batches=[tuple(t.clone() for t in b) for b in batches], weights=params)
            seen["weights"] = {n: p.clone() for n, p in params.items()}
        return criterion(params, grads)

    model = Net(dropout=0.0)
    model.norm = nn.Identity()
    pruner = pruning(Explicit([0.5]), rounds=0, criterion=spy, score_batches=2)
    return {**fit(pruner, model=model, world=world, epochs=1, **options), "seen": seen}


@run
def snip(world, rank, folder):
    return data_driven(lp.criteria.snip, world)


class Own(Net):
    """Each rank has data of its own, and their last batches are of different sizes."""

    def __init__(self, rank, **options):
        super().__init__(**options)
        self.rank = rank

    def train_dataloader(self):
        return DataLoader(samples(16 + 3 + self.rank, seed=self.rank), batch_size=8, shuffle=True)


@run
def uneven(world, rank, folder):
    options = {"use_distributed_sampler": False}
    return fit(pruning(), lp.LotteryTicketRewind(1), model=Own(rank), world=world, **options)


class Branched(Net):
    """Every second batch leaves a layer unused."""

    def __init__(self):
        super().__init__()
        self.other, self.calls = nn.Linear(16, 16), 0

    def forward(self, x):
        self.calls += 1
        layer = self.other if self.calls % 2 else self.body
        return self.head(torch.relu(layer(self.drop(torch.relu(self.norm(self.stem(x)))))))


@run
def unused_parameters(world, rank, folder):
    ddp = {"find_unused_parameters": True}
    return fit(pruning(), model=Branched(), world=world, ddp=ddp)


class Checkpointed(Net):
    def forward(self, x):
        hidden = self.drop(torch.relu(self.norm(self.stem(x))))
        return self.head(checkpoint(lambda h: torch.relu(self.body(h)), hidden, use_reentrant=False))


@run
def static_graph(world, rank, folder):
    ddp = {"static_graph": True}
    options = {"model": Checkpointed(n=64), "world": world, "gradient_clip_val": 0.1}
    return fit(pruning(), lp.LotteryTicketRewind(1), ddp=ddp, **options)


@run
def gradients_in_buckets(world, rank, folder):
    ddp = {"gradient_as_bucket_view": True}
    return fit(pruning(), world=world, ddp=ddp, gradient_clip_val=0.1, accumulate_grad_batches=2)


@run
def channels(world, rank, folder):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    class Small(Net):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.drop = model, nn.Identity(), nn.Identity()
            del self.body, self.head

        def forward(self, x):
            return self.stem(x)

    pruner = lp.StructuredChannelPruning(OneShot(0.5))
    return {**fit(pruner, model=Small(), world=world, epochs=2), "masks": pruner.channels}


def own_random(params):
    """What must not be: numbers of the process's own generator."""
    return {n: torch.rand(p.shape) for n, p in params.items()}


@run
def rank_local(world, rank, folder):
    """A criterion that draws for itself: the masks of rank 0 hold; without that step, they would differ."""
    result = fit(pruning(criterion=own_random), world=world)
    decided = masked.decided_masks
    masked.decided_masks = lambda trainer, decide: decide()
    try:
        result["alone"] = fit(pruning(criterion=own_random, verify=False), world=world)["masks"]
        try:
            fit(pruning(criterion=own_random), world=world)
        except RuntimeError as error:
            result["error"] = str(error)
    finally:
        masked.decided_masks = decided
    return result


@run
def other_masks_on_every_rank(world, rank, folder):
    model = Net()
    masks = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if n.endswith("t")}
    masks = {n: m for n, m in masks.items() if m.dim() > 1}
    try:
        return fit(pruning(masks=masks), model=model, world=world)
    except ValueError as error:
        return {"error": str(error)}


class Alone(Net):
    """Logs a metric that is its own on each rank, and lets one rank have a trouble of its own."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.revives = rank, lambda: False

    def optimizer_step(self, *args, **options):
        super().optimizer_step(*args, **options)
        if self.revives():
            with torch.no_grad():
                self.body.weight.add_(1.0)

    def on_validation_epoch_end(self):
        # below the threshold after two epochs on rank 0, after three on rank 1
        self.log("own", 1.0 if self.trainer.current_epoch < 1 + self.rank else 0.0)


@run
def stopped_by_a_metric_of_each_rank(world, rank, folder):
    pruner = pruning(rounds=5, stop_below={"own": 0.5})
    return fit(pruner, model=Alone(rank), world=world, epochs=6)


@run
def patience_of_each_rank(world, rank, folder):
    """On rank 1 the metric is no better in the second epoch, on rank 0 only in the third."""
    stopper = EarlyStopping("own", patience=1)
    pruner = pruning(rounds=1, every_n_epochs=9, end_round_on_early_stop=True)
    return fit(pruner, stopper, model=Alone(rank), world=world, epochs=4)


def trouble_of_one_rank(world, rank, *others, **options):
    """What each rank says when something goes wrong on rank 1 alone."""
    revives, pruner, model = options.pop("revives", False), pruning(**options), Alone(rank)
    if revives and rank == 1:
        model.revives = lambda: pruner.round == 1
    try:
        fit(pruner, lp.LotteryTicketRewind(), *others, model=model, world=world)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    else:
        told = "nothing"
    return {"error": told, "round": pruner.round, "masks": pruner.masks, "history": len(pruner.history)}


class FailsOn1(Callback):
    def __init__(self, rank, hook):
        if rank == 1:
            setattr(self, hook, self.fail)

    def fail(self, *_):
        raise OSError("no space left")


@run
def one_rank_fails_in_on_prune(world, rank, folder):
    return trouble_of_one_rank(world, rank, FailsOn1(rank, "on_prune"))


@run
def one_rank_fails_in_on_round_start(world, rank, folder):
    return trouble_of_one_rank(world, rank, FailsOn1(rank, "on_round_start"))


@run
def one_rank_has_no_masks(world, rank, folder):
    if rank != 1:
        torch.save(
            {n: torch.ones_like(p).bool() for n, p in Net().named_parameters() if p.dim() > 1}, folder / "m"
        )
    return trouble_of_one_rank(world, rank, masks=folder / ("m" if rank != 1 else "none"))


@run
def one_rank_has_other_layers(world, rank, folder):
    return trouble_of_one_rank(world, rank, include=["body*" if rank != 1 else "nothing*"])


@run
def one_rank_cannot_score(world, rank, folder):
    def criterion(params):
        calls.append(1)
        if rank == 1 and len(calls) > 2:
            raise ValueError("score: not on this machine")
        return {n: w.abs() for n, w in params.items()}

    calls = []
    return trouble_of_one_rank(world, rank, criterion=criterion)


@run
def one_rank_has_dead_weights_alive(world, rank, folder):
    return trouble_of_one_rank(world, rank, revives=True)


class Loaded(Own):
    """Its loader shuffles with a generator of its own."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        generator = torch.Generator().manual_seed(self.rank)
        return DataLoader(loader.dataset, batch_size=8, shuffle=True, generator=generator)


def resumable(world, rank, folder, epoch=None, **options):
    """Dropout, shuffling and a schedule; from the checkpoint of an epoch, if one is given."""
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    model = Loaded(rank, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
    path = None if epoch is None else f"{folder}/epoch={epoch}.ckpt"
    callbacks = pruning(every_n_epochs=2, save_sparse="end.safetensors"), lp.LotteryTicketRewind(2)
    options |= {
        # By default DDP arranges its buckets anew after its first step, so that a resumed run adds more than
        # two gradients up in another order; where parameters may be unused it leaves them.
        "ddp": {"bucket_cap_mb": 1e-6, "find_unused_parameters": world > 2},
        "enable_checkpointing": True,
        "use_distributed_sampler": False,
        "ckpt_path": path,
    }
    return fit(*callbacks, *([saver] if epoch is None else []), model=model, world=world, epochs=6, **options)


@run
def straight(world, rank, folder):
    return resumable(world, rank, folder / str(world), num_sanity_val_steps=2)


@run
def resumed(world, rank, folder):
    result = []
    for epoch in (0, 1, 4):
        torch.manual_seed(77)  # nothing may come from here
        result.append(resumable(world, rank, folder / str(world), epoch, num_sanity_val_steps=2))
    return result


@run
def resumed_by_more(world, rank, folder):
    """From a checkpoint of two processes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = resumable(world, rank, folder / "2", 1)
    return {**result, "warnings": [str(w.message) for w in caught]}


# ----------------------------------------------------------------------------------------------- processes


def work(rank, world, port, folder, names):
    """All trainings, in a process of its own."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"},
        **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test: Lightning would seed every rank alike
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for name in names:
        torch.manual_seed(1000 * world + rank)  # other weights, other dropout on every rank
        try:
            results[name] = RUNS[name](world, rank, folder)
        except Exception:  # the others run all the same, so that all failures are seen
            results[name] = {"failed": traceback.format_exc()}
    torch.save(results, folder / f"{world}-{rank}.pt")


def started(world, work, *args):
    """Start processes: each does `work(rank, world, port, *args)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "tests.sharded"])  # imported once, and not by each of them
    processes = [context.Process(target=work, args=(rank, world, port, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def processes(world, folder, names=tuple(RUNS), work=work):
    """Start them, wait, and bring what they saw: {name of a training: what each rank saw}."""
    running = started(world, work, folder, names)
    for process in running:
        process.join(600)
    assert [process.exitcode for process in running] == [0] * world
    ranks = [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}
