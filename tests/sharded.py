"""What processes that hold shards do: each process does all of it and leaves what it saw."""

import itertools
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune import granularity, growth
from lightning_prune.adapters import attach
from lightning_prune.allocation import (
    OWL,
    AtLeast,
    EvenOutputs,
    PerLayer,
    class_distributed,
    erk,
    global_rank,
    lamp,
    per_output,
    uniform,
)
from lightning_prune.deploy import pieces
from lightning_prune.evidence import undisturbed
from lightning_prune.selection import counted
from lightning_prune.shards import Shards, is_sharded, like, local, placed, settle, whole
from tests.networks import dead_are_zero, fitter, same

RUNS = {}


def run(scenario):
    RUNS[scenario.__name__] = scenario
    return scenario


# ------------------------------------------------------------------------------------------ models of shards


def linears(sizes=(6, 9, 5, 3), dtype=torch.float32):
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.Tanh())][:-1])


def fsdp(model, mesh=None):
    """Each layer a group of its own, and the model one of what is left."""
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh=None):
    """Columns, rows, columns, ... of linear layers; others stay whole on every process."""
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    names = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    plan = {name: (ColwiseParallel, RowwiseParallel)[i % 2]() for i, name in enumerate(names[:2])}
    return parallelize_module(model, mesh, plan)


@cache
def four(*names):
    """Two times two processes, made once: each group of gloo has threads that never sleep for long."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def both(model):
    mesh = four("data", "tensor")
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def hybrid(model):
    """Replicas of shards."""
    return fsdp(model, four("replicas", "shards"))


def rooted(model):
    """The first layer is a group of its own, and the model one of all others: FSDP2 leaves it gathered."""
    fully_shard(model[0])
    return fully_shard(model)


WAYS = {2: (fsdp, tensor_parallel), 4: (fsdp, tensor_parallel, both, hybrid)}


def wholes(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def weights_of(model):
    return {name: whole(p).clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ scenarios


@run
def parts(world, rank, folder):
    """Weights that are the numbers of their places say where they are."""
    wrong, seen = [], set()
    for way in WAYS[world]:
        model = linears((5, 8, 4, 1, 3)) if way in (tensor_parallel, both) else linears((5, 7, 1, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(p.numel()).view(p.shape))
        way(model)
        shards = Shards(dict(model.named_parameters()))
        for name, p in model.named_parameters():
            here = local(p)
            places = shards.part(name).places(torch.arange(here.numel()))
            counted = torch.tensor(here.numel() if shards.counts(name) else 0)
            numbers = torch.arange(p.numel()).view(p.shape).to(p.dtype)
            seen.add(str(p.placements) if is_sharded(p) else "whole")
            if not (
                torch.equal(places.view(here.shape), here.long())
                and int(shards.add(counted)) == p.numel()
                and same(local(like(numbers, p)), here)
                and same(whole(placed(here, p)), numbers)
            ):
                wrong.append(f"{way.__name__} {name} {p.placements}")
    return {"wrong": wrong, "placements": sorted(seen)}


ALLOCATIONS = (
    global_rank,
    uniform,
    erk,
    PerLayer({"0.*": 0.3, "*": 0.6}),
    AtLeast(0, of=global_rank),
    AtLeast(3, of=uniform),
    per_output,
    EvenOutputs(of=erk),
    class_distributed,
    AtLeast(2, of=class_distributed),
    lamp,
    EvenOutputs(of=lamp),
)
CRITERIA = (
    lp.criteria.magnitude,
    lp.criteria.small_final,
    lp.criteria.Random(seed=3),
    lp.criteria.Ln(2),
    lp.criteria.movement,
    lp.criteria.large_init,
)


def case(seed, way):
    """Random shapes, dtypes, ties, criterion, allocation: masks on shards and those of one process."""
    g = torch.Generator().manual_seed(seed)

    def draw(n, start=0):
        return start + int(torch.randint(n, (), generator=g))

    even = way.__name__ in ("tensor_parallel", "both")  # which torch itself asks for
    sizes = [4 * draw(4, 1) if even else draw(12, 1) for _ in range(draw(3, 3))]
    model = linears(sizes)
    # one dtype for each layer that is sharded
    for layer in model:
        layer.to((torch.float32, torch.float32, torch.bfloat16, torch.float64)[draw(4)])
    values = draw(3)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=g)
            p.copy_(drawn if not values else (drawn * values).round())  # many ties
    initial = {n: torch.randint(-2, 3, p.shape, generator=g).to(p) for n, p in model.named_parameters()}
    before = {n: torch.rand(p.shape, generator=g) < 0.8 for n, p in model.named_parameters() if p.dim() > 1}
    options = {
        "sparsity": draw(100) / 100,
        "allocate": ALLOCATIONS[draw(len(ALLOCATIONS))],
        "criterion": CRITERIA[draw(len(CRITERIA))],
        "initial": initial,
        "masks": before if draw(2) else None,
    }
    sharded = way(deepcopy(model))
    expected = lp.prune(model, **options)
    found = lp.prune(sharded, **options)
    for name, p in sharded.named_parameters():
        if name in found and is_sharded(p):
            assert (found[name].placements, found[name].device_mesh) == (p.placements, p.device_mesh)
    masks = wholes(found)
    bits = sum(int((masks[n] ^ m).sum()) for n, m in expected.items())
    equal = same(masks, expected) and same(weights_of(sharded), weights_of(model))
    size, left = (sum(f(m) for m in expected.values()) for f in (torch.Tensor.numel, torch.Tensor.sum))
    shown = {k: str(v) for k, v in options.items() if k not in ("initial", "masks")}
    return {"bits": bits, "equal": equal, "size": size, "left": int(left), "options": str((sizes, shown))}


@run
def cases(world, rank, folder, n=8):
    return [case(seed, way) for way in WAYS[world] for seed in range(n)]


@run
def many_cases(world, rank, folder):
    """With those of two and of four processes, 200 in all and more."""
    return cases(world, rank, folder, {2: 40, 4: 40}[world])


# ------------------------------------------------------------------------------------------ models that run


def exact(sizes, g):
    """Whole numbers: what is summed up is exact in whichever order."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return _whole_numbers(nn.Sequential(*[e for layer in layers for e in (layer, nn.ReLU())][:-1]), g)


def images(g):
    """Convolutions, one of them in groups, on images of 2 x 6 x 6."""
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4)
    return _whole_numbers(nn.Sequential(*layers), g)


def _whole_numbers(model, g):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=g))
    return model


def part_of_data(way, world, rank):
    """(how many parts the data have, which of them is that of this process)."""
    return {"tensor_parallel": (1, 0), "both": (2, rank // 2)}.get(way.__name__, (world, rank))


DRIVEN = (
    (lp.criteria.snip, granularity.single),
    (lp.criteria.taylor, granularity.single),
    (lp.criteria.wanda, granularity.single),
    (lp.criteria.gradient, granularity.Kernel()),
    (lp.criteria.saliency, granularity.Filter()),
    (lp.criteria.wanda, granularity.NM(1, 2)),
    (lp.criteria.taylor, granularity.Block(1, 3)),
)
OF_DATA = (global_rank, lamp, per_output, OWL(m=1.5), OWL(m=1.5, of=per_output), class_distributed, uniform)


def mean(output, target):
    return output.mean()


def driven_case(seed, way, world, rank):
    """Gradients and activations of data of which each process has a part."""
    g = torch.Generator().manual_seed(seed)

    def draw(n, start=0):
        return start + int(torch.randint(n, (), generator=g))

    convolutions = way in (fsdp, hybrid) and not seed % 3
    sizes = [4 * draw(3, 1) for _ in range(4)]
    model = images(g) if convolutions else exact(sizes, g)
    criterion, units = DRIVEN[seed % len(DRIVEN)]
    if way not in (fsdp, hybrid):
        units = granularity.single
    allocate = OF_DATA[draw(len(OF_DATA))]
    if isinstance(units, granularity.Filter) and allocate in (per_output, OF_DATA[4]):
        allocate = uniform
    shape = (2, 2, 6, 6) if convolutions else (2, sizes[0])
    parts, mine = part_of_data(way, world, rank)
    data = [[torch.randint(-1, 2, shape, generator=g).float() for _ in range(parts)] for _ in range(2)]
    options = {
        **{"sparsity": draw(90, 5) / 100, "allocate": allocate, "criterion": criterion},
        **{"granularity": units, "loss": mean},
    }
    sharded = way(deepcopy(model))
    expected = lp.prune(model, data=[(torch.cat(each), 0) for each in data], **options)
    grads = [torch.zeros_like(p) for p in sharded.parameters()]
    for p, grad in zip(sharded.parameters(), grads, strict=True):
        p.grad = grad
    found = wholes(lp.prune(sharded, data=[(each[mine], 0) for each in data], **options))
    kept = all(p.grad is grad for p, grad in zip(sharded.parameters(), grads, strict=True))
    bits = sum(int((found[n] ^ m).sum()) for n, m in expected.items())
    equal = kept and same(weights_of(sharded), weights_of(model))
    size, left = (sum(f(m) for m in expected.values()) for f in (torch.Tensor.numel, torch.Tensor.sum))
    shown = str((way.__name__, sizes, {k: str(v) for k, v in options.items()}))
    return {"bits": bits, "equal": equal, "size": size, "left": int(left), "options": shown}


@run
def driven(world, rank, folder, n=7):
    return [driven_case(seed, way, world, rank) for way in WAYS[world] for seed in range(n)]


@run
def many_driven(world, rank, folder):
    return driven(world, rank, folder, 42)


@run
def drawn(world, rank, folder):
    """Random scores are drawn piece by piece; the pieces here are smaller than the tensors."""
    wrong = []
    for way in WAYS[world]:
        plain = linears((8, 260, 300, 4))
        sharded = way(deepcopy(plain))
        scores = [lp.criteria.Random(4)(dict(m.named_parameters())) for m in (plain, sharded)]
        wrong += [f"{way.__name__} {n}" for n, s in scores[0].items() if not same(whole(scores[1][n]), s)]
    return wrong


def loop(model, masks, optimizers, way, steps=4):
    """Train, with clipping and accumulation; the dead are looked at after every step."""
    wrong, handle = [], lp.hold(model, optimizers, masks)
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        for _ in range(2):
            first = next(model.parameters())
            x = torch.randn(8, first.shape[1], generator=g).to(first.dtype)
            model(x).square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n in masks}
        wrong += [] if dead_are_zero(wholes(grads), wholes(masks)) else [f"gradient of step {step}"]
        # of shards alone: torch takes no norm of them and of whole tensors together
        if way is not both:  # nor of shards of two meshes
            nn.utils.clip_grad_norm_(filter(is_sharded, model.parameters()), 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for n, p in model.named_parameters():
            if n in masks and not dead_are_zero({n: local(p)}, {n: local(masks[n])}):
                wrong.append(f"{n} after step {step}")
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            mask = next((masks[n] for n, q in model.named_parameters() if q is p and n in masks), None)
            for what, value in state.items():
                if mask is not None and value.shape == p.shape and bool(local(value)[~local(mask)].any()):
                    wrong.append(f"{what} of the dead")
    handle.remove()
    return wrong


@run
def held(world, rank, folder):
    wrong = {}
    for way in WAYS[world]:
        for make in (
            lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
            lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        ):
            torch.manual_seed(1)
            model = way(linears((8, 12, 4, 4)))
            masks = lp.prune(model, sparsity=0.6)
            optimizer = make(model.parameters())
            wrong[f"{way.__name__} {type(optimizer).__name__}"] = loop(model, masks, [optimizer], way)
    return wrong


class Checkpointed(nn.Sequential):
    """Layers whose activations are computed again in the backward pass."""

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def compiled(model):
    """Each block on its own, as is usual with FSDP2."""
    for layer in model:
        layer.compile(backend="eager")
    return model


def mixed(model):
    """Weights in float32, computed with in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


SETTINGS = {
    "bfloat16": lambda: fsdp(linears((8, 12, 4, 4), torch.bfloat16)),
    "mixed precision": lambda: mixed(linears((8, 12, 4, 4))),
    "activation checkpointing": lambda: fsdp(Checkpointed(*linears((8, 12, 4, 4)))),
    "compiled blocks": lambda: fsdp(compiled(linears((8, 12, 4, 4)))),
    "compiled, checkpointed": lambda: fsdp(compiled(Checkpointed(*linears((8, 12, 4, 4))))),
}


@run
def settings(world, rank, folder):
    """The law of the dead, with clipping and accumulation, however a sharded model computes."""
    wrong = {}
    for name, make in SETTINGS.items():
        torch.manual_seed(1)
        model = make()
        masks = lp.prune(model, sparsity=0.6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        before = weights_of(model)
        wrong[name] = loop(model, masks, [optimizer], fsdp)
        if all(same(before[n], w) for n, w in weights_of(model).items()):
            wrong[name].append("nothing was trained")
    return wrong


@run
def put_on(world, rank, folder):
    """`apply_masks` takes masks that are whole, and such that are sharded; `targets` sees whole shapes."""
    torch.manual_seed(2)
    plain = linears()
    model = fsdp(deepcopy(plain))
    rows = list(lp.targets(model)) == list(lp.targets(plain))
    masks = lp.prune(deepcopy(plain), sparsity=0.5)
    lp.apply_masks(plain, masks)
    lp.apply_masks(model, masks)
    again = fsdp(linears())
    shards = {n: like(masks[n], p) for n, p in again.named_parameters() if n in masks}
    lp.apply_masks(again, shards)
    zero = dead_are_zero(weights_of(again), masks)
    return {"rows": rows, "same": same(weights_of(model), weights_of(plain)), "zero": zero}


@run
def gathered(world, rank, folder):
    """Whoever reads weights, after a forward without a backward, which leaves the root's gathered."""
    torch.manual_seed(2)
    plain, x, data = linears(), torch.ones(1, 6), [(torch.ones(1, 6), 0)]
    masks = lp.prune(deepcopy(plain), sparsity=0.5)
    mine = folder / f"gathered-{rank}.safetensors"
    lp.save_sparse(linears().state_dict(), mine)
    wrong = {}

    def forward(model):
        with torch.no_grad():
            model(x)
        return sum(not is_sharded(p) for p in model.parameters())

    def holds(model):
        optimizer = torch.optim.SGD(parameters[id(model)], lr=0.1)
        lp.hold(model, optimizer, masks)
        model(x).square().mean().backward()
        optimizer.step()

    def rewinds(model):
        snapshot = lp.rewind.Snapshot.take(model)
        with torch.no_grad():
            for p in parameters[id(model)]:
                p.zero_()
        forward(model)
        snapshot.restore(model)

    def saves(model):
        lp.save_sparse(model.state_dict(), path := folder / f"gathered-{id(model) in whole_ones}.safetensors")
        distributed.barrier()
        return lp.load_sparse(path)

    def disturbs(model):
        with undisturbed(model):
            model(x).sum().backward()
        return {name: whole(p).detach().clone() for name, p in model.named_parameters()}

    of_data = {name: getattr(lp.criteria, name) for name in ("snip", "taylor", "wanda")}
    acts = {
        "prune": lambda m: lp.prune(m, 0.5),
        **{n: lambda m, c=c: lp.prune(m, 0.5, c, data=data, loss=mean) for n, c in of_data.items()},
        "apply_masks": lambda m: lp.apply_masks(m, masks),
        "targets": lambda m: {row.parameter: torch.tensor(row.shape) for row in lp.targets(m)},
        "load_pruned": lambda m: lp.load_pruned(m, mine) and None,
        **{act.__name__: act for act in (holds, rewinds, saves, disturbs)},
    }
    for name, act in acts.items():
        one, many = deepcopy(plain), rooted(deepcopy(plain))
        parameters = {id(m): list(m.parameters()) for m in (one, many)}
        whole_ones = {id(one)}
        expected = act(one)
        n, found = forward(many), act(many)
        settle(many)
        if n != 4 or not same(wholes(found or {}), expected or {}):
            wrong[name] = f"{n} gathered, {found}, not {expected}"
        if not same(weights_of(many), weights_of(one)):
            wrong[name] = "other weights"
    refuse = {
        "accelerate": lambda m: lp.accelerate(m, x),
        "prune_channels": lambda m: lp.prune_channels(m, 0.5, x),
    }
    for name, act in refuse.items():
        forward(many := rooted(deepcopy(plain)))
        if f"ValueError: {name} does not work on weights that are sharded" not in (
            words := said(lambda act=act, model=many: act(model))
        ):
            wrong[name] = words
    forward(many)
    if "sharded; allowed are whole weights" not in (words := said(lambda: attach(many, masks))):
        wrong["attach"] = words
    return wrong


def said(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Mixed(nn.Sequential):
    """A convolution, which is a group of its own or not, a norm with buffers, and a tied weight."""

    def __init__(self):
        tied = nn.Linear(12, 12)
        super().__init__(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), tied, nn.ReLU(), nn.Linear(12, 12)
        )
        self[5].weight = tied.weight


def costs(model, x):
    """All that `summarize` says, but latencies, classes of modules, which FSDP2 renames, and the place."""
    said = lp.summarize(model, x)
    rows = [replace(row, latency_us=0.0, type="") for row in (*said.layers, said.total)]
    return {row.layer: row for row in rows}, said


@run
def summarized(world, rank, folder):
    """Counts and sizes are those of one process; nothing is timed."""
    torch.manual_seed(3)
    layers, mixed = linears((6, 12, 8, 3)), Mixed()  # tensor parallel divides evenly
    for model in (layers, mixed):
        lp.prune(model, 0.6)
    cases = {way.__name__: (layers, way, torch.ones(4, 6)) for way in (*WAYS[world], rooted)}
    cases["mixed"] = (mixed, rooted, torch.ones(4, 2, 4, 4))
    wrong = {}
    for name, (model, way, x) in cases.items():
        expected, _ = costs(deepcopy(model).eval(), x)
        many = way(deepcopy(model)).eval()
        with torch.no_grad():
            before = many(x)
        found, said = costs(many, x)
        if found != expected or not same({"": whole(many(x))}, {"": whole(before)}):
            wrong[name] = f"{found}, not {expected}"
        if not math.isnan(said.total.latency_us) or "over shards, not timed" not in said.where:
            wrong[name] = said.where
        if "not timed" not in said.against(said):
            wrong[name] = said.against(said)
    return wrong


@run
def refused(world, rank, folder):
    model = fsdp(linears())

    def spoilt():
        other = fsdp(linears())
        if rank == world - 1:
            with torch.no_grad():
                local(other[0].weight).fill_(torch.nan)
        return said(lambda: lp.prune(other))

    def breaks(params):
        if rank == world - 1:
            raise OSError("no space left")
        return lp.criteria.magnitude(params)

    before = weights_of(model)
    prune = {
        "granularity": {"granularity": lp.granularity.Filter(dim=1)},
        "blocks": {"granularity": lp.granularity.Block(2, 2)},
        "run": {"criterion": lp.criteria.SynFlow(input_shape=(6,))},
        "ranks": {"criterion": lp.criteria.large_init_large_final, "initial": before},
        "batches": {"criterion": lp.criteria.wanda, "data": [torch.ones(1, 6)] * (1 + rank)},
        "schedule": {"sparsity": lp.schedules.Threshold(0.1)},
        "allocation": {"allocate": lambda scores, total: dict.fromkeys(scores, total)},
        "twice": {"criterion": lp.criteria.GraSP(), "data": [(torch.ones(1, 6), 0)], "loss": mean},
        "layer_by_layer": {"layer_by_layer": True, "data": [torch.ones(1, 6)]},
        "one_fails": {"criterion": breaks},
    }
    words = {name: said(lambda o=options: lp.prune(model, **o)) for name, options in prune.items()}
    columns = tensor_parallel(linears((4, 8, 4)))
    words["columns"] = said(lambda: lp.prune(columns, granularity=lp.granularity.NM()))
    words["nan"] = spoilt()
    words["accelerate"] = said(lambda: lp.accelerate(model.eval(), torch.ones(1, 6)))
    flat = torch.distributed.fsdp.FullyShardedDataParallel(linears(), device_id=torch.device("cpu"))
    for what in (lambda: lp.prune(flat), lambda: lp.targets(flat), lambda: lp.apply_masks(flat, {})):
        words[f"fsdp1 {len(words)}"] = said(what)
    words["unchanged"] = same(weights_of(model), before)
    return words


# ------------------------------------------------------------------------------------------------ Lightning


class Sides(nn.Sequential):
    """Layers side by side."""

    def forward(self, x):
        return sum(layer(x).sum() for layer in self)


class Whole(LightningModule):
    """Sums are exact: they are of small whole numbers, and no gradient depends on a weight."""

    def __init__(self, way=None, fail_at=None):
        super().__init__()
        torch.manual_seed(5)
        self.net = Sides(nn.Linear(8, 12), nn.Linear(8, 4))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-8, 9, p.shape))
        self.way, self.fail_at = way, fail_at
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def configure_model(self):
        if self.way is not None and not any(map(is_sharded, self.parameters())):
            mesh = self._device_mesh
            if self.way == "root":
                rooted(self.net)
                return
            if self.way != "fsdp":
                columns = ColwiseParallel(output_layouts=Replicate())
                plan = {"0": columns}  # the other layer stays whole
                if self.way != "columns":
                    plan["1"] = RowwiseParallel(input_layouts=Replicate())
                parallelize_module(self.net, mesh["tensor_parallel"], plan)
            if self.way not in ("tensor", "columns"):
                fsdp(self.net, mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.trainer.global_step == self.fail_at:
            raise RuntimeError("killed")
        self.seen += 1
        return self.net(batch[0]) / 64 * self.share

    @property
    def share(self):
        """Shards of the data are averaged, and each has so much less of them."""
        return {"fsdp": self.trainer.world_size, "root": self.trainer.world_size, "both": 2}.get(self.way, 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]), sync_dist=True)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        o = torch.optim.SGD(trained, lr=2.0**-3, momentum=0.5)
        return [o], [torch.optim.lr_scheduler.StepLR(o, 1, 0.5)]

    def train_dataloader(self):
        g = torch.Generator().manual_seed(7)
        data = torch.randint(-1, 2, (32, 8), generator=g).float()
        if self.share > 1:  # a part of each batch
            data = data[self._device_mesh["data_parallel"].get_local_rank() :: self.share]
        return DataLoader(TensorDataset(data), batch_size=8 // self.share)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 8)), batch_size=2)


class Looks(Callback):
    """Dead weights on this process after every step, and the masks of each pruning."""

    def __init__(self, pruner):
        self.pruner, self.wrong, self.prunings = pruner, [], []

    def on_train_batch_end(self, trainer, model, *_):
        masks = self.pruner.masks
        for name, p in model.named_parameters():
            if name in masks and not dead_are_zero({name: local(p)}, {name: local(masks[name])}):
                self.wrong.append(f"{name} after step {trainer.global_step}")

    def on_prune(self, trainer, model, masks):
        self.prunings.append({name: whole(mask).clone() for name, mask in masks.items()})


class Dies(Callback):
    """Kills this process, as the kernel does, in a hook of a step."""

    HOOKS = (
        *("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
        *("on_save_checkpoint", "on_validation_start", "on_prune"),
    )

    def __init__(self, step, hook):
        self.step = step
        setattr(self, hook, self.die)

    def die(self, trainer, *_):
        if trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(
    way,
    world,
    folder=None,
    ckpt_path=None,
    fail_at=None,
    save=False,
    pruning=None,
    growing=None,
    frozen=False,
    to_step=2,
    others=(),
    **options,
):
    """A lottery ticket in three rounds of two epochs, rewound to a step; or masks that grow."""
    if growing is None:
        pruner = lp.IterativeMagnitudePruning(
            lp.schedules.Geometric(0.4), **{"rounds": 2, "every_n_epochs": 2, **(pruning or {})}
        )
        others = [lp.LotteryTicketRewind(to_step), *others]
    else:
        pruner = lp.DynamicSparseTraining(
            **{"sparsity": 0.7, "fraction": 0.4, "every_n_train_steps": 3, "until_step": 20, **growing}
        )
    looks = Looks(pruner)
    callbacks = [pruner, looks, *others]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1))
        options["enable_checkpointing"] = True
    if way is not None:
        sizes = {"fsdp": (world, 1), "root": (world, 1), "both": (2, world // 2)}.get(way, (1, world))
        options |= {"devices": world, "use_distributed_sampler": False}
        options["strategy"] = ModelParallelStrategy(
            *sizes, save_distributed_checkpoint=save, process_group_backend="gloo"
        )
    model = Whole(way, fail_at)
    model.net[1].requires_grad_(not frozen)
    trainer = fitter(*callbacks, epochs=6, **options)
    died = False
    try:
        trainer.fit(model, ckpt_path=ckpt_path)
    except RuntimeError as error:
        if "killed" not in str(error):
            raise
        died = True
    return {
        "died": died,
        "masks": wholes(pruner.masks),
        "weights": weights_of(model),
        "seen": int(model.seen),
        "optimizers": [whole(trainer.optimizers[0].state[p]["momentum_buffer"]) for p in model.parameters()],
        "prunings": looks.prunings,
        "wrong": looks.wrong,
        "round": pruner.round,
        "sparsity": pruner.sparsity,
        "explored": getattr(pruner, "explored", None),
        "history": [
            (row.round, row.alive, row.steps, *(row.metrics.get(name) for name in EXCHANGED))
            for row in pruner.history
        ],
    }


LIGHTNING = {2: ("fsdp", "tensor"), 4: ("fsdp", "both")}
EXCHANGED = ("dropped", "grown", "returned", "explored")
ENDS = ("masks", "weights", "optimizers", "seen", "round", "sparsity", "explored", "history")


@run
def tickets(world, rank, folder):
    """Weights and masks of one process, and of shards of the same training."""
    return {"alone": fit(None, 1), **{way: fit(way, world) for way in LIGHTNING[world]}}


@run
def tickets_of_gradients(world, rank, folder):
    """Whose criterion runs the training step, on two batches of each process."""
    pruning = {"criterion": lp.criteria.snip, "score_batches": 2, "allocate": per_output}
    ways = {way: fit(way, world, pruning=pruning) for way in LIGHTNING[world]}
    return {"alone": fit(None, 1, pruning=pruning), **ways}


@run
def tickets_of_activations(world, rank, folder):
    """The criterion is tried, and the snapshot taken, after a validation that leaves the root's gathered."""
    options = {"pruning": {"criterion": lp.criteria.wanda}, "to_step": 0, "num_sanity_val_steps": 2}
    return {"alone": fit(None, 1, **options), "root": fit("root", world, **options)}


GROWING = {
    "set": {"grow": lp.criteria.Random(3)},
    "rigl": {"grow": lp.criteria.gradient, "criterion": lp.criteria.magnitude},
    "snfs": {"grow": lp.criteria.momentum, "allocate": uniform},
    "granet": {"sparsity": lp.schedules.Cubic(0.8, rounds=6, initial=0.4), "allocate": global_rank},
    "acdc": {"sparsity": lp.schedules.Alternating(0.7), "fraction": 0.0, "until_step": 16},
    "saliency": {"drop": lp.criteria.saliency, "grow": lp.criteria.gradient},
}

GROWN = {2: ("rigl", "snfs", "granet", "acdc"), 4: (*GROWING,)}  # of two processes "set" is resumed


@run
def grown(world, rank, folder):
    """Masks that grow on one process, and on shards of the same training; gradients of the dead are masked,
    as something clips, and updates see them all the same."""
    ways, found = LIGHTNING[world], {}
    for name in GROWN[world]:
        growing = GROWING[name]
        options = {"growing": growing}
        if name == "rigl":
            options |= {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
        runs = ways[:1] if name == "rigl" else ways  # torch clips no whole tensors beside shards
        found[name] = {"alone": fit(None, 1, **options), **{way: fit(way, world, **options) for way in runs}}
    return found


@run
def grown_and_resumed(world, rank, folder):
    """From files and from folders, in the middle of the updates and after them."""
    found = {}
    for save in (False, True):
        place = folder / f"grown-{save}"
        options = {"growing": GROWING["snfs" if save else "set"], "save": save}
        straight = fit("fsdp", world, place, **options)
        distributed.barrier()
        runs = [fit("fsdp", world, ckpt_path=place / f"step={step}.ckpt", **options) for step in (9, 22)]
        found["folders" if save else "files"] = {"straight": straight, "resumed": runs}
    distributed.barrier()
    return found


def exchange(seed, way):
    """Random shapes, ties, masks: one update of the parts that processes have, and of the whole."""
    g = torch.Generator().manual_seed(seed)

    def draw(n, start=0):
        return start + int(torch.randint(n, (), generator=g))

    even = way.__name__ in ("tensor_parallel", "both")
    model = linears([4 * draw(4, 1) if even else draw(12, 1) for _ in range(draw(3, 3))])
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() > 1}
    masks = {n: torch.rand(s, generator=g) < draw(10) / 9 for n, s in shapes.items()}
    drop, grow = (
        {n: torch.randint(draw(9, 1), s, generator=g).float() for n, s in shapes.items()} for _ in "ab"
    )
    if draw(2):
        grow = {n: torch.full(s, 2.0) for n, s in shapes.items()}
    fraction, more = draw(9) / 10, draw(10) / 10
    weights = {n: p.detach() for n, p in way(model).named_parameters() if n in shapes}

    def update(masks, drop, grow, shards):
        there = sum(growth.in_exchange(masks, 1.0, None, shards).values())  # an upper bound of what may come
        number = growth.in_exchange(masks, fraction, None, shards)
        living = sum(counted({n: int(m.sum()) for n, m in masks.items()}, shards).values())
        new = growth.exchanged(masks, number, drop, grow, None, shards)
        denser = growth.regrown(new, living + round(more * there), grow, global_rank, shards)
        again = growth.exchanged(
            denser, growth.in_exchange(denser, fraction, masks, shards), drop, grow, masks, shards
        )
        return new, denser, again, growth.tells_dead_apart(grow, masks, shards)

    parts = [{n: local(like(t, weights[n])) for n, t in each.items()} for each in (masks, drop, grow)]
    *expected, apart = update(masks, drop, grow, None)
    *found, found_apart = update(*parts, Shards(weights))
    found = [{n: whole(placed(m, weights[n])) for n, m in each.items()} for each in found]
    changed = not same(expected[0], masks)
    return same(found, expected) and apart == found_apart, changed


@run
def exchanges(world, rank, folder, n=20):
    return [exchange(seed, way) for way in WAYS[world] for seed in range(n)]


@run
def many_exchanges(world, rank, folder):
    return exchanges(world, rank, folder, 100)


@run
def refused_growth(world, rank, folder):
    ways = {
        "rows": {"granularity": growth.FanIn()},
        "pattern": {"sparsity": 0.5, "granularity": lp.granularity.NM(2, 4)},
        "runs": {"grow": lp.criteria.GraSP()},
        "ranks": {"drop": lp.criteria.large_init_large_final},
        "alone": {"allocate": lambda scores, total: dict.fromkeys(scores, total // 2)},
        "same": {"grow": lp.criteria.magnitude},
    }

    def own(update):
        return 0.5 + 0.1 * rank

    ways |= {"sparsity": {"sparsity": own}, "fraction": {"fraction": own}}
    words = {name: said(lambda o=options: fit("fsdp", world, growing=o)) for name, options in ways.items()}
    words["grown elsewhere"] = said(lambda: fit("fsdp", world, growing={}, frozen=rank))
    words["pruned elsewhere"] = said(lambda: fit("fsdp", world, frozen=rank))
    words["schedule"] = said(lambda: lp.prune(fsdp(linears()), own))
    return words


@run
def refused_fits(world, rank, folder):
    """What Lightning averages, and a folder that a kill left without its end."""
    averages = {"averages": EMAWeightAveraging(), "swa": StochasticWeightAveraging(0.1)}
    words = {n: said(lambda c=c: fit("fsdp", world, others=(c,))) for n, c in averages.items()}
    torn, whole_one = folder / "torn" / "step=9.ckpt", folder / "torn" / "step=8.ckpt"
    for path in (torn, whole_one):
        path.mkdir(parents=True, exist_ok=True)
        (path / "__0_0.distcp").touch()
    (whole_one / "meta.pt").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words["torn"] = said(lambda: fit("fsdp", world, folder / "torn", ckpt_path=torn, save=True))
    words["warned"] = [str(w.message) for w in caught if "meta.pt" in str(w.message)]
    return words


@run
def resumed(world, rank, folder):
    """Killed in the middle of a round, and in its first step after a rewind."""
    folder = folder / "checkpoints"
    straight = fit("fsdp", world, folder)
    found = [fit("fsdp", world, ckpt_path=folder / f"step={step}.ckpt") for step in (5, 8, 9, 17)]
    distributed.barrier()
    return {"straight": straight, "resumed": found}


@run
def resumed_folders(world, rank, folder):
    """The same from folders to which each process writes its part."""
    folder = folder / "folders"
    straight = fit("fsdp", world, folder, save=True)
    found = [fit("fsdp", world, ckpt_path=folder / f"step={step}.ckpt", save=True) for step in (8, 17)]
    distributed.barrier()
    return {"straight": straight, "resumed": found}


@run
def resumed_from_two(world, rank, folder):
    """What two processes wrote, on other numbers of them, and sharded in another way."""
    ways = {2: ("tensor", "columns"), 4: ("fsdp", "both")}[world]
    return [fit(way, world, ckpt_path=folder / "folders" / "step=8.ckpt", save=True) for way in ways]


@run
def documented(world, rank, folder):
    """The examples of docs/distributed.md, one after the other."""
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    names, blocks = {"__name__": "documented"}, re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(block, names)
    pruner = names["ticket"][0]
    return {"blocks": len(blocks), "round": pruner.round, "sparsity": round(pruner.sparsity, 2)}


@run
def stored(world, rank, folder):
    """`save_sparse` writes of shards what one process would."""
    model = linears()
    lp.prune(model, sparsity=0.7)
    lp.save_sparse(dict(model.state_dict()), folder / f"whole-{world}-{rank}.safetensors")
    lp.save_sparse(dict(fsdp(model).state_dict()), folder / f"shards-{world}.safetensors")
    distributed.barrier()
    names = (f"whole-{world}-{rank}", f"shards-{world}")
    one, other = ((folder / f"{name}.safetensors").read_bytes() for name in names)
    return one == other


@run
def given_otherwise(world, rank, folder):
    """Each argument in turn is another one on each process."""
    model, other = fsdp(linears()), bool(rank)
    before = weights_of(model)

    def own(params, generator):
        return lp.criteria.magnitude(params)

    masks = {n: torch.full(p.shape, other) for n, p in linears().named_parameters() if p.dim() > 1}
    options = {
        "sparsity": {"sparsity": 0.5 + 0.1 * rank},
        "criterion": {"criterion": lp.criteria.Random(rank)},
        "allocate": {"allocate": uniform if other else global_rank},
        "granularity": {"granularity": lp.granularity.NM(1 + other, 4)},
        "exclude": {"exclude": ["0.*"] if other else None},
        "layers": {"layers": ["Linear"] if other else ["Linear", "Conv1d"]},
        "masks": {"masks": masks},
        "initial": {"initial": {n: p + rank for n, p in before.items()}},
        "loss": {"loss": mean if other else None},
    }
    words = {name: said(lambda o=option: lp.prune(model, **o)) for name, option in options.items()}
    torch.manual_seed(rank)
    words["torch.manual_seed"] = said(lambda: lp.prune(model, 0.5, own))
    words["unchanged"] = same(weights_of(model), before)
    masks = {"net.0.weight": torch.full((12, 8), other)}
    for changed in ({"criterion": lp.criteria.Random(rank)}, {"rounds": 1 + rank}, {"masks": masks}):
        words[f"fit {next(iter(changed))}"] = said(lambda o=changed: fit("fsdp", world, pruning=o))
    words["fit to_step"] = said(lambda: fit("fsdp", world, to_step=rank))
    return words


@run
def spoilt_files(world, rank, folder):
    """What processes hear where the first one cannot write, at the beginning, in the middle, after a fit."""
    state = dict(fsdp(linears()).state_dict())
    missing, calls, encode = folder / "missing" / "weights", itertools.count(), pieces.encode

    def fills_up(*args):
        if next(calls) == 2:
            raise OSError("no space left")
        return encode(*args)

    words = {"missing": said(lambda: lp.save_sparse(state, missing))}
    with patch.object(pieces, "encode", fills_up):
        words["full"] = said(lambda: lp.save_sparse(state, folder / "full"))
    words["left"] = (folder / "full").exists()
    words["fit"] = said(lambda: fit("fsdp", world, pruning={"save_sparse": "/proc/missing/weights"}))
    torch.save(linears((6, 8, 5, 3)).state_dict(), cut := folder / f"cut-{rank}.pt")
    words["cut"] = said(lambda: lp.load_pruned(fsdp(linears()), cut))
    return words


# ------------------------------------------------------------------------------------------------ processes


def on_gpus(rank, world, port, folder):
    """Masks and held weights on GPUs that talk by NCCL, and those of one process on the CPU."""
    torch.cuda.set_device(rank)
    join(rank, world, port, backend="nccl")
    mesh, g = init_device_mesh("cuda", (world,)), torch.Generator().manual_seed(0)
    wrong = []
    for way, (criterion, _), allocate in itertools.product((fsdp, tensor_parallel), DRIVEN[:3], OF_DATA):
        model = exact((8, 12, 4, 4), g)
        parts, mine = part_of_data(way, world, rank)
        data = [[torch.randint(-1, 2, (2, 8), generator=g).float() for _ in range(parts)] for _ in range(2)]
        options = {"sparsity": 0.6, "criterion": criterion, "allocate": allocate, "loss": mean}
        sharded = way(deepcopy(model).cuda(), mesh)
        expected = lp.prune(model, data=[(torch.cat(each), 0) for each in data], **options)
        found = lp.prune(sharded, data=[(each[mine].cuda(), 0) for each in data], **options)
        if not same({n: whole(m).cpu() for n, m in found.items()}, expected):
            wrong.append(f"{way.__name__} {criterion} {allocate}")
        optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.01)
        handle = lp.hold(sharded, optimizer, found)
        for _ in range(3):
            sharded(data[0][mine].cuda()).square().mean().backward()
            optimizer.step()
            if not dead_are_zero(
                *({n: local(t) for n, t in tensors.items()} for tensors in (pruned(sharded, found), found))
            ):
                wrong.append(f"{way.__name__}: dead weights live")
        handle.remove()
    torch.save(wrong, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def pruned(model, masks):
    return {name: p for name, p in model.named_parameters() if name in masks}


def join(rank, world, port, seconds=60, backend="gloo"):
    """Be one of the processes."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"},
        **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))


def work(rank, world, port, folder, names):
    """All scenarios, in a process of its own."""
    join(rank, world, port)
    results = {}
    for name in names:
        torch.manual_seed(0)
        try:
            results[name] = RUNS[name](world, rank, folder)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
            print(results[name]["failed"], file=sys.stderr)  # the others may wait until they give up
    distributed.barrier()
    distributed.destroy_process_group()
    torch.save(results, folder / f"{world}-{rank}.pt")


def last_whole(folder):
    """The newest checkpoint, of those that were written to their end."""
    there = [path for path in folder.glob("*.ckpt") if path.is_file() or (path / "meta.pt").is_file()]
    return max(there, key=lambda path: int(path.stem.removeprefix("step=")), default=None)


def live_and_die(rank, world, port, folder, save, deaths):
    """Fit until the first of the deaths, and so on with the next; at the end, say what came of it."""
    join(rank, world, port)
    path, others = last_whole(folder / "checkpoints"), [Dies(*deaths[0])] if deaths else []
    torch.manual_seed(0)
    found = fit("fsdp", world, folder / "checkpoints", path, save=save, others=others)
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def be_left_alone(rank, world, port, folder):
    """The last process dies in a step; how long the first one waits, and what it is told."""
    join(rank, world, port, seconds=30)
    others, start = [Dies(3, "on_after_backward")] if rank == world - 1 else [], time.monotonic()
    words = said(lambda: fit("fsdp", world, others=others))
    torch.save({"words": words, "seconds": time.monotonic() - start}, folder / f"{rank}.pt")
    os._exit(0)  # torch would wait for the other one
