"""Masks that grow: SET, RigL and their kin equal the papers' pseudocode, and resume bit for bit."""

import math
from copy import deepcopy
from pathlib import Path

import jsonargparse
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from omegaconf import OmegaConf
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation, criteria, granularity, growth, schedules
from lightning_prune.granularity import NM, Block
from lightning_prune.layers import Layout, layouts
from lightning_prune.masks import alive, unpack
from lightning_prune.pruning import next_masks
from tests.naming import in_words
from tests.networks import Net, dead_are_zero, fitter, same, state

SGD = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)  # noqa: E731


def slow_exchange(mask, number, drop, grow, before=None):
    """One tensor by sorting, a connection at a time; nothing moves twice since `before` the update."""
    flat = mask.flatten().tolist()
    was = flat if before is None else before.flatten().tolist()
    living = [i for i, m in enumerate(flat) if m and was[i]]
    dead = [i for i, m in enumerate(flat) if not m and not was[i]]
    d, g = drop.double().flatten().tolist(), grow.double().flatten().tolist()
    goes = sorted(living, key=lambda i: (d[i], -i))[:number]
    comes = sorted(dead, key=lambda i: (-g[i], i))[:number]
    for i in goes:
        flat[i] = False
    for i in comes:
        flat[i] = True
    return torch.tensor(flat).view(mask.shape)


@pytest.mark.parametrize("seed", range(20))
def test_an_exchange_equals_sorting_and_keeps_the_number_alive(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (3, 2, 3), "c": (0, 2), "d": (4,)}
    draw = lambda s: torch.randint(-2, 3, s, generator=generator).float()  # noqa: E731 with many ties
    masks = {n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}
    drop, grow = ({n: draw(s) for n, s in shapes.items()} for _ in range(2))
    for fraction in (0.0, 0.3, 0.9):
        number = growth.in_exchange(masks, fraction)
        found = growth.exchanged(masks, number, drop, grow)
        for name, mask in masks.items():
            expected = min(round(fraction * int(mask.sum())), int((~mask).sum()))
            assert number[name] == expected
            assert torch.equal(found[name], slow_exchange(mask, expected, drop[name], grow[name]))
            assert found[name].sum() == mask.sum()


def erk_masks(model, sparsity, names):
    weights = {n: p for n, p in model.named_parameters() if n in names}
    scores = criteria.Random()(weights)
    total = round((1 - sparsity) * sum(p.numel() for p in weights.values()))
    keep = allocation.erk(scores, total, params=weights)
    return {n: slow_exchange(torch.zeros_like(s).bool(), keep[n], s, s) for n, s in scores.items()}


def slow_resize(masks, total, drop, grow):
    """GraNet's shrink, or a regrowth, over all tensors, a connection at a time."""
    masks = {n: m.clone() for n, m in masks.items()}
    order = [(n, i) for n in masks for i in range(masks[n].numel())]
    value = lambda scores, n, i: float(scores[n].flatten()[i])  # noqa: E731
    while (there := sum(int(m.sum()) for m in masks.values())) != total:
        shrinks = there > total
        candidates = [(n, i) for n, i in order if bool(masks[n].flatten()[i]) is shrinks]
        if shrinks:
            n, i = min(reversed(candidates), key=lambda at: value(drop, *at))
        else:
            n, i = max(candidates, key=lambda at: value(grow, *at))
        masks[n].view(-1)[i] = not shrinks
    return masks


def slow_training(
    model,
    batches,
    masks,
    grow,
    every,
    last,
    fraction,
    exchange=None,
    accumulate=1,
    seen=1,
    alive_at=None,
):
    """RigL's Algorithm 1 in a plain loop: a sparse start, exchanges, the optimizer forgets what is dead.

    But for one thing: what was just dropped is no candidate to grow.

    A step has `accumulate` batches, and what grows is chosen by the gradients of the first `seen` of them.
    """
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    exchange = exchange or (lambda n, *rest: slow_exchange(*rest))
    masks = dict(masks)
    optimizer, history = model.configure_optimizers(), []
    weights = dict(model.named_parameters())

    @torch.no_grad()
    def put_on():
        for n in names:
            weights[n].mul_(masks[n])

    put_on()
    for step in range(len(batches) // accumulate):
        of_step = batches[step * accumulate :][:accumulate]
        if step and step % every == 0 and step < last:
            rate = fraction / 2 * (1 + math.cos(math.pi * step / last))
            buffers = deepcopy(dict(model.named_buffers()))
            optimizer.zero_grad()
            for batch in of_step[:seen]:
                (model.training_step(batch, 0) / seen).backward()
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
            before = dict(masks)
            if alive_at is not None:
                magnitude = {n: weights[n].detach().abs() for n in names}
                gradient = {n: grow(n, step // every, weights[n].grad) for n in names}
                masks = slow_resize(masks, alive_at(step // every), magnitude, gradient)
            for n in names:
                w, mask = weights[n].detach(), masks[n]
                since = int((mask & before[n]).sum()), int((~mask & ~before[n]).sum())
                number = min(round(rate * int(mask.sum())), *since)
                came = grow(n, step // every, weights[n].grad)
                for value in optimizer.state[weights[n]].values():  # nothing is remembered of the dead
                    value.mul_(before[n])
                masks[n] = exchange(
                    n, mask, number, w.abs(), came, *([] if alive_at is None else [before[n]])
                )
                for value in optimizer.state[weights[n]].values():
                    value.mul_(masks[n])
            put_on()
            history.append({n: m.clone() for n, m in masks.items()})
        optimizer.zero_grad()
        for batch in of_step:
            (model.training_step(batch, 0) / accumulate).backward()
        optimizer.step()
        put_on()
    return masks, history


class Quiet(Net):
    """Without dropout, and with a log that a plain loop can call."""

    def __init__(self, **options):
        super().__init__(SGD, dropout=0.0, **options)

    def log(self, *args, **kwargs):
        if self._trainer is not None:
            super().log(*args, **kwargs)


class Watch(Callback):
    def __init__(self):
        self.batches, self.masks, self.found = [], [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.batches.append(deepcopy(batch))

    def on_prune(self, trainer, model, masks):
        self.masks.append({n: m.clone() for n, m in masks.items()})


def dst(**options):
    return lp.DynamicSparseTraining(**{"sparsity": 0.8, "every_n_train_steps": 2, "until": 0.75, **options})


def matrices(model):
    return {n: p for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("name", ["RigL", "SET"])
def test_masks_and_weights_equal_the_papers_pseudocode(name):
    torch.manual_seed(0)
    model, slow = Quiet(), Quiet()
    slow.load_state_dict(model.state_dict())
    grow = {"RigL": criteria.gradient, "SET": criteria.Random(7)}[name]
    grown = {
        "RigL": lambda n, update, g: g.abs(),
        "SET": lambda n, update, g: criteria.Random(7 + update)(matrices(slow))[n],  # others each time
    }[name]
    pruner, watch = dst(grow=grow, fraction=schedules.CosineDecay(0.5)), Watch()
    fitter(pruner, watch, epochs=48).fit(model)
    steps = len(watch.batches)
    first = erk_masks(slow, 0.8, list(matrices(slow)))
    assert same(watch.masks[0], first)
    masks, history = slow_training(slow, watch.batches, first, grown, 2, int(0.75 * steps), 0.5)
    assert len(history) == pruner.round > 50
    assert all(same(a, b) for a, b in zip(watch.masks[1:], history, strict=True))
    assert same(pruner.masks, masks)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), slow.parameters(), strict=True)
    )


@pytest.mark.parametrize("together", [2, 3])
def test_with_accumulation_the_first_batch_of_a_step_says_what_grows(together):
    """The others are not drawn yet as it starts, and the step trains the new masks on all of them."""
    torch.manual_seed(0)
    model = Quiet(n=48)
    slow = [deepcopy(model), deepcopy(model)]
    pruner, watch = dst(fraction=schedules.CosineDecay(0.5)), Watch()
    fitter(pruner, watch, epochs=12, accumulate_grad_batches=together).fit(model)
    steps = len(watch.batches) // together
    arguments = watch.masks[0], lambda n, update, g: g.abs(), 2, int(0.75 * steps), 0.5
    found = []
    for net, seen in zip(slow, (1, together), strict=True):
        found.append(slow_training(net, watch.batches, *arguments, accumulate=together, seen=seen)[1])
    assert len(found[0]) == pruner.round > 7
    assert all(same(a, b) for a, b in zip(watch.masks[1:], found[0], strict=True))
    assert not all(same(a, b) for a, b in zip(*found, strict=True))  # all of its batches would say otherwise
    for a, b in zip(model.parameters(), slow[0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def slow_structured(mask, number, drop, grow, gamma, rows_of, keeps_all=False):
    """SRigL's steps (Lasby et al. 2024, Section 3.1), a weight at a time; `rows_of`: position -> its row."""
    flat, d, g = mask.flatten().tolist(), drop.double().flatten().tolist(), grow.double().flatten().tolist()
    rows = {}
    for i in range(len(flat)):
        rows.setdefault(rows_of(i), []).append(i)
    rows.pop(None, None)  # the remainder of a row is in no group
    inside = [i for row in rows.values() for i in row]
    if not inside:
        return mask
    living = [i for i in inside if flat[i]]
    dead = [i for i in inside if not flat[i]]
    # 1 to 3: who stays, who would grow, and how many of these each row has
    goes = set(sorted(living, key=lambda i: (d[i], -i))[:number])
    wished = set(sorted(dead, key=lambda i: (-g[i], i))[:number])
    stays = {i for i in living if i not in goes}
    salient = {r: sum(i in stays or i in wished for i in row) for r, row in rows.items()}
    # 4: rows that few weights speak for are ablated
    active = [r for r, row in rows.items() if any(flat[i] for i in row)]
    if gamma and not keeps_all:
        fan_in = len(living) // len(active)
        width = len(next(iter(rows.values())))
        ranked = sorted(rows, key=lambda r: (-salient[r], r))
        active = [r for r in rows if salient[r] >= max(1, gamma * fan_in)]
        if len(active) * width < len(living):
            active = sorted(ranked[: math.ceil(len(living) / width)])
    # 5: the new fan-in, one more where most weights stay
    held = {r: sorted((i for i in rows[r] if i in stays), key=lambda i: (-d[i], i)) for r in active}
    fan_in, more = divmod(len(living), len(active))
    first = sorted(active, key=lambda r: (-len(held[r]), r))[:more]
    # 6 and 7: each row keeps its best and grows until it is full
    new = [bool(m) and rows_of(i) is None for i, m in enumerate(flat)]
    for r in active:
        full = fan_in + (r in first)
        kept = held[r][:full]
        kept += sorted((i for i in rows[r] if not flat[i]), key=lambda i: (-g[i], i))[: full - len(kept)]
        again = sorted((i for i in rows[r] if flat[i] and i not in kept), key=lambda i: (-d[i], i))
        for i in kept + again[: full - len(kept)]:
            new[i] = True
    return torch.tensor(new).view(mask.shape)


def row_of(pattern, shape):
    """Position in a matrix of outputs x inputs -> its output, or its group; None: in none."""
    width = shape[1]
    if isinstance(pattern, growth.FanIn):
        return lambda i: i // width
    full = width // pattern.m * pattern.m
    return lambda i: (i // width, i % width // pattern.m) if i % width < full else None


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.95])
def test_an_exchange_of_constant_fan_in_equals_the_papers_steps(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    mask = allocation.EvenOutputs(allocation.uniform)({"w": torch.rand(7, 9)}, 25)["w"]
    mask = growth.keep_top_of_rows(torch.rand(7, 9, generator=generator), mask)
    for update in range(50):
        drop = torch.rand(7, 9, generator=generator) * torch.rand(7, 1, generator=generator)
        grow = torch.randint(0, 9, (7, 9), generator=generator).float()  # with ties
        number = growth.in_exchange({"w": mask}, 0.6 / (1 + update / 10))["w"]
        found = growth.exchanged_in_rows(mask, number, drop, grow, gamma)
        assert torch.equal(found, slow_structured(mask, number, drop, grow, gamma, lambda i: i // 9))
        assert found.sum() == 25
        assert growth.fits(growth.FanIn(), found, Layout())
        mask = found
    assert bool(gamma == 0) <= bool(mask.any(1).all())


PATTERNS = {
    "SRigL": (growth.FanIn(0.3), 0.8),
    "SRigL, 0.95": (growth.FanIn(0.95), 0.8),
    "without ablation": (growth.FanIn(0), 0.8),
    "2:4": (NM(2, 4), 0.5),
    "1:8": (NM(1, 8), 0.875),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_structured_masks_and_weights_equal_the_papers_steps_over_fifty_updates(name):
    pattern, sparsity = PATTERNS[name]
    torch.manual_seed(0)
    model, slow = Quiet(), Quiet()
    slow.load_state_dict(model.state_dict())
    pruner = dst(granularity=pattern, sparsity=sparsity, fraction=schedules.CosineDecay(0.5))
    watch = Watch()
    fitter(pruner, watch, epochs=48).fit(model)
    last = list(matrices(slow))[-1]  # of which no output is ablated

    def exchange(n, mask, number, drop, grow):
        rows = row_of(pattern, mask.shape)
        inside = torch.tensor([rows(i) is not None for i in range(mask.numel())]).view(mask.shape)
        number = min(round(rate() * int((mask & inside).sum())), int((~mask).sum()))
        return slow_structured(mask, number, drop, grow, getattr(pattern, "ablate", 0), rows, n == last)

    steps, calls = len(watch.batches), []

    def rate():  # of the update that is under way: every tensor is exchanged once in each
        calls.append(1)
        step = 2 * (1 + (len(calls) - 1) // len(matrices(slow)))
        return 0.25 * (1 + math.cos(math.pi * step / int(0.75 * steps)))

    masks, history = slow_training(
        *(slow, watch.batches, watch.masks[0], lambda n, update, g: g.abs(), 2, int(0.75 * steps), 0.5),
        exchange,
    )
    assert len(history) == pruner.round > 50
    assert all(same(a, b) for a, b in zip(watch.masks[1:], history, strict=True))
    assert same(pruner.masks, masks)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), slow.parameters(), strict=True)
    )
    for masks in watch.masks:
        assert {n: int(m.sum()) for n, m in masks.items()} == {
            n: int(m.sum()) for n, m in watch.masks[0].items()
        }
        assert all(growth.fits(pattern, m, Layout()) for m in masks.values())


@pytest.mark.parametrize("grow", [criteria.gradient, criteria.Random(), criteria.momentum], ids=in_words)
@pytest.mark.parametrize("make", [SGD, lambda p: torch.optim.Adam(p, 0.01)])
def test_the_number_alive_is_constant_in_each_layer_and_what_grows_starts_at_zero(grow, make):
    counts, fresh = set(), []

    class Look(Watch):
        def on_round_start(self, trainer, model, masks):
            before = self.found[-1] if self.found else None
            for n, m in masks.items():
                came = m & ~before[n] if before else torch.zeros_like(m)
                p = model.get_parameter(n)
                fresh.append(bool((p.detach()[came] == 0).all()))
                for value in trainer.optimizers[0].state.get(p, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        fresh.append(bool((value[came] == 0).all()))
            self.found.append({n: m.clone() for n, m in masks.items()})
            counts.add(tuple(int(m.sum()) for m in masks.values()))

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            assert dead_are_zero(dict(model.named_parameters()), pruner.masks)

    pruner, model = dst(grow=grow), Net(make)
    fitter(pruner, Look(), epochs=8).fit(model)
    assert len(counts) == 1
    assert sum(next(iter(counts))) == 80
    assert all(fresh)
    assert pruner.sparsity == 0.8
    assert 0.2 < pruner.explored <= 1
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_sparsity_may_be_a_schedule_while_connections_are_exchanged():
    cubic = schedules.Cubic(sparsity=0.9, rounds=5, initial=0.5)
    pruner, watch = dst(sparsity=cubic), Watch()
    fitter(pruner, watch, epochs=8).fit(Net(SGD))
    assert [alive(m) for m in watch.masks] == [round((1 - cubic(k)) * 400) for k in range(pruner.round + 1)]
    moved = [
        any(bool((b[n] & ~a[n]).any()) for n in a) for a, b in zip(watch.masks, watch.masks[1:], strict=False)
    ]
    assert all(moved[:4])  # GraNet grows, too


def up_and_down(update):
    return (0.6, 0.75, 0.7, 0.85, 0.5)[min(update, 4)]


@pytest.mark.parametrize(
    "sparsity", [schedules.Cubic(sparsity=0.9, rounds=5, initial=0.4), up_and_down], ids=in_words
)
def test_granet_equals_its_pseudocode_and_what_it_has_just_removed_stays_away(sparsity):
    """Where the schedule rises or falls, and connections are exchanged in the same update."""
    torch.manual_seed(0)
    model, slow = Quiet(), Quiet()
    slow.load_state_dict(model.state_dict())
    fresh = []

    class Look(Watch):
        def on_prune(self, trainer, model, masks):
            super().on_prune(trainer, model, masks)
            self.found.append(trainer.global_step)

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            super().on_train_batch_start(trainer, model, batch, batch_idx)
            if self.found and len(self.masks) > 1:
                for n, p in matrices(model).items():
                    fresh.append(bool((p.detach()[self.masks[-1][n] & ~self.masks[-2][n]] == 0).all()))
            self.found = []

    pruner = dst(sparsity=sparsity, allocate=allocation.global_rank, fraction=schedules.CosineDecay(0.5))
    watch = Look()
    fitter(pruner, watch, epochs=8).fit(model)
    steps = len(watch.batches)
    _, history = slow_training(
        *(slow, watch.batches, watch.masks[0], lambda n, update, g: g.abs(), 2, int(0.75 * steps), 0.5),
        alive_at=lambda update: round((1 - sparsity(update)) * 400),
    )
    assert len(history) == pruner.round > 5
    assert all(same(a, b) for a, b in zip(watch.masks[1:], history, strict=True))
    assert fresh
    assert all(fresh)
    for a, b in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for row, before, after in zip(pruner.history[1:], watch.masks, watch.masks[1:], strict=False):
        shrinks = alive(after) - alive(before)
        assert row.metrics["grown"] - row.metrics["dropped"] == shrinks


def test_a_group_without_other_candidates_keeps_its_best_and_they_count_as_alive():
    mask = torch.tensor([[True, True, True, False]])
    drop, grow = torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([[9.0, 8.0, 0.0, 1.0]])
    found = growth.exchanged_in_rows(mask, 2, drop, grow)
    assert found.tolist() == [[False, True, True, True]]  # by the drop score, not by the gradient
    counted = growth.exchange_of({"w": mask}, {"w": found}, {"w": mask})
    assert counted == {"dropped": 1, "grown": 1, "returned": 0}


def test_dense_and_sparse_phases_alternate():
    pruner, watch = (
        dst(sparsity=schedules.Alternating(0.8), fraction=0, allocate=allocation.global_rank, until_step=16),
        Watch(),
    )
    fitter(pruner, watch, epochs=8).fit(Net(SGD))
    assert (pruner.round, pruner.sparsity) == (7, 0.8)
    assert [alive(m) for m in watch.masks] == [
        80,
        400,
        80,
        400,
        80,
        400,
        80,
    ]  # an even update is a dense phase


def test_with_no_exchange_the_first_masks_stay():
    pruner, watch = dst(fraction=0), Watch()
    fitter(pruner, watch, epochs=4).fit(Net(SGD))
    assert all(same(m, pruner.masks) for m in watch.masks)
    assert alive(pruner.masks) == 80


def test_masks_stay_from_until_on():
    pruner, watch = dst(until_step=5), Watch()
    fitter(pruner, watch, epochs=8).fit(Net(SGD))
    assert pruner.round == 2  # steps 2 and 4


@pytest.mark.parametrize("grow", [criteria.gradient, criteria.Random(), criteria.momentum], ids=in_words)
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resume_equals_straight_run(grow, at_epoch_end, tmp_path):
    def run(epochs, folder, ckpt_path=None):
        torch.manual_seed(3)
        pruner, model = dst(grow=grow, until_step=18), Net(SGD)
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
        trainer = fitter(pruner, saving, epochs=epochs, enable_checkpointing=True)
        trainer.fit(model, ckpt_path=ckpt_path)
        return pruner, {k: v for k, v in state(trainer).items() if k != "buffers"}  # one is in no checkpoint

    straight, expected = run(8, tmp_path / "a")
    for path in sorted((tmp_path / "a").glob("*.ckpt"))[:4]:
        resumed, found = run(8, tmp_path / path.stem, ckpt_path=path)
        assert same(found, expected), path
        assert same(resumed.masks, straight.masks)
        assert resumed.explored == straight.explored
        kept = next(v for k, v in torch.load(path)["callbacks"].items() if "Dynamic" in k)
        assert alive(unpack(kept["masks"])) == 80


def test_a_found_mask_is_trained_again_by_a_second_fit():
    pruner = dst()
    fitter(pruner, epochs=4).fit(Net(SGD))
    again, watch = lp.IterativeMagnitudePruning(schedules.Hold(), rounds=0, masks=pruner.masks), Watch()
    model = Net(SGD)
    fitter(again, watch, epochs=2).fit(model)
    assert same(again.masks, pruner.masks)
    assert dead_are_zero(model.state_dict(), pruner.masks)
    static = dst(masks=pruner.masks, fraction=0)
    fitter(static, epochs=2).fit(Net(SGD))
    assert same(static.masks, pruner.masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0: allowed are fractions from 0 to below 1"),
        ({"fraction": 1.5}, "fraction=1.5: allowed are fractions"),
        ({"until": 0}, "until=0: allowed is above 0"),
        ({"until_step": 0}, "until_step=0: allowed are whole numbers from 1"),
        ({"every_n_train_steps": 0}, "every_n_train_steps=0: allowed"),
        ({"grow": "gradient"}, "grow='gradient': allowed are functions"),
        ({"criterion": criteria.Random}, "criterion=Random: a class is given"),
        ({"sparsity": schedules.Cubic(), "masks": {}}, "allowed is one of them"),
        ({"granularity": Block()}, r"granularity=Block.*: allowed here are single, NM and growth\.FanIn"),
        ({"granularity": NM}, r"granularity=.*: allowed here are single, NM and growth\.FanIn"),
        ({"granularity": NM(2, 4)}, r"sparsity=0.9, granularity=NM\(n=2, m=4\).* allowed is 0.5"),
        ({"granularity": growth.FanIn(), "sparsity": schedules.Cubic()}, "allowed is a number"),
        (
            {"granularity": NM(2, 4), "sparsity": 0.5, "allocate": allocation.uniform},
            "allocate=.* no allocation is allowed beside it",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        lp.DynamicSparseTraining(**options)


UNEVEN = {n: torch.ones_like(p, dtype=torch.bool) for n, p in matrices(Net()).items()}
UNEVEN["body.weight"] = torch.eye(16).bool() | (torch.arange(16) == 3)[:, None]


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ({"every_n_train_steps": 100}, (), "so there is no update. Allowed are 1 to"),
        ({}, (lp.LotteryTicketRewind(),), "goes alone; LotteryTicketRewind is here"),
        ({}, (lp.IterativeMagnitudePruning(rounds=1),), "goes alone; IterativeMagnitudePruning is here"),
        ({"sparsity": lambda k: 1.5}, (), r"sparsity\(0\)=1.5: allowed"),
        ({"fraction": lambda x: 2.0}, (), r"fraction\(0.000\)=2.0: allowed"),
        (
            {"granularity": growth.FanIn(), "masks": UNEVEN},
            (),
            r"masks: those of body.weight are none of granularity=FanIn.* Give such masks",
        ),
        ({"granularity": NM(2, 4), "masks": UNEVEN}, (), "masks: those of stem.weight, .* are none of"),
        ({"masks": {"other": torch.ones(2).bool()}}, (), "masks: body.weight is in the model"),
    ],
)
def test_wrong_trainings_are_refused_before_anything_is_trained(options, others, message):
    class Never(Callback):
        def on_train_start(self, trainer, model):
            raise AssertionError("training has begun")

    with pytest.raises(ValueError, match=message):
        fitter(dst(**options), *others, Never(), epochs=4).fit(Net(SGD))


def test_momentum_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="of which the optimizer keeps none"):
        fitter(dst(grow=criteria.momentum), epochs=4).fit(Net(lambda p: torch.optim.SGD(p, 0.1)))
    with pytest.raises(ValueError, match="their gradients are masked"):
        fitter(dst(grow=criteria.momentum), epochs=4, gradient_clip_val=1.0).fit(Net(SGD))


@pytest.mark.filterwarnings("ignore:.*no weight is dead as training begins")
def test_an_update_leaves_the_training_that_it_watches_undisturbed():
    """With a grow criterion that runs the model and one that does not, dropout and batch norm go on alike."""
    ends = []
    for grow in (criteria.gradient, lambda params: criteria.magnitude(params)):
        torch.manual_seed(1)
        pruner = dst(grow=grow, sparsity=0.0, fraction=0.3)  # nothing is dead, so nothing is exchanged
        model = Net(SGD)
        fitter(pruner, epochs=4).fit(model)
        ends.append((dict(model.state_dict()), model.seen.clone(), torch.get_rng_state()))
    assert same(*ends)


def test_it_works_with_conv_layers_and_reads_its_masks_as_any_other():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    number = growth.in_exchange(masks, 0.5)
    scores = {n: p.detach().abs() for n, p in model.named_parameters() if n in masks}
    assert alive(growth.exchanged(masks, number, scores, scores)) == alive(masks)


@pytest.mark.parametrize("pattern", [growth.FanIn(0.5), growth.FanIn(0), NM(1, 2)], ids=in_words)
def test_patterns_are_those_of_outputs_and_inputs_wherever_a_layer_counts_them(pattern):
    """Groups of a convolution, a transposed one, and inputs that come first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 3), nn.Conv1d(6, 4, 2))
    weights = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
    laid_out = layouts(model, weights)
    allocate, within = (
        (allocation.uniform, pattern) if isinstance(pattern, NM) else (None, granularity.single)
    )
    allocate = allocate or allocation.EvenOutputs(allocation.uniform)
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    evidence = {"layouts": laid_out, "generator": torch.Generator()}
    masks = next_masks(
        weights, masks, [(list(weights), 0.5)], criteria.Random(), allocate, within, **evidence
    )
    for update in range(5):
        drop, grow = ({n: torch.rand_like(w) for n, w in weights.items()} for _ in range(2))
        found = growth.exchanged_within(pattern, masks, dict.fromkeys(masks, 9), drop, grow, laid_out)
        for name, mask in found.items():
            assert growth.fits(pattern, mask, laid_out[name])
            assert mask.sum() == masks[name].sum()
            rows = laid_out[name].rows(mask).sum(1)
            assert mask.shape == weights[name].shape
            assert (mask & ~masks[name]).any(), update
            if pattern == growth.FanIn(0):
                assert rows.max() - rows.min() <= 1
        masks = found


CONFIGS = (Path(__file__).parents[1] / "conf" / "growth").glob("*.yaml")
METHODS = sorted({path.stem for path in CONFIGS} - {"none"})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_from_its_yaml(name):
    values = {"sparsity": 0.8, "every_n_train_steps": 2, "updates": 6}
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "growth" / f"{name}.yaml")
    pruner = instantiate(OmegaConf.merge(values, {"growth": config}).growth)
    model = Net(SGD)
    fitter(pruner, epochs=7).fit(model)
    assert pruner.sparsity == pytest.approx(0.8)
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_a_dynamic_sparse_training_is_built_from_type_hints():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    cubic = {"class_path": "lightning_prune.schedules.Cubic"}
    options = {"grow": {"class_path": "lightning_prune.criteria.Random"}, "sparsity": cubic}
    given = {"class_path": "lightning_prune.DynamicSparseTraining", "init_args": options}
    built = parser.instantiate(parser.parse_object({"callback": given})).callback
    assert built.grow == criteria.Random()
    assert built.target == schedules.Cubic()


def test_a_frozen_backbone_stays_dense_unless_it_is_named():
    for include, dense in ((None, True), (["*"], False)):
        model, pruner = Net(lambda params: SGD([p for p in params if p.requires_grad])), dst(include=include)
        model.stem.requires_grad_(False), model.body.requires_grad_(False)
        fitter(pruner, epochs=4).fit(model)
        assert (list(pruner.masks) == ["head.weight"]) is dense
        assert bool((model.body.weight != 0).all()) is dense


def test_a_network_that_diverged_is_not_exchanged_by_its_nans():
    class Diverges(Net):
        def on_before_optimizer_step(self, optimizer):
            self.body.weight.grad.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"weight holds NaN or infinity.*diverged"):
        fitter(dst(), epochs=4).fit(Diverges(SGD))


@pytest.mark.parametrize(
    "options", [{}, {"sparsity": schedules.Alternating(0.8), "fraction": 0.0}], ids=in_words
)
def test_the_history_says_what_each_update_dropped_and_grew_and_how_much_was_explored(options, tmp_path):
    pruner, watch = dst(until_step=20, **options), Watch()
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    fitter(pruner, watch, saving, epochs=8, enable_checkpointing=True).fit(Net(SGD))
    dense = {n: torch.ones_like(m) for n, m in pruner.masks.items()}
    masks = [*([dense] if options else []), *watch.masks]  # a dense beginning is no pruning
    ever = masks[0]
    assert [row.round for row in pruner.history] == list(range(10))
    for row, before, after in zip(pruner.history[1:], masks[:-1], masks[1:], strict=True):
        came = {n: after[n] & ~before[n] for n in after}
        assert row.metrics["dropped"] == sum(int((before[n] & ~after[n]).sum()) for n in after)
        assert row.metrics["grown"] == alive(came)
        assert row.metrics["returned"] == sum(int((came[n] & ever[n]).sum()) for n in after)
        ever = {n: ever[n] | after[n] for n in after}
        assert row.metrics["explored"] == alive(ever) / 400
    assert "grown" not in pruner.history[0].metrics
    assert pruner.history[-1].metrics["explored"] == pruner.explored
    resumed = dst(until_step=20, **options)
    path = sorted(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))[3]
    with pytest.warns(UserWarning, match="Be aware"):
        fitter(resumed, epochs=8).fit(Net(SGD), ckpt_path=path)
    ours = "dropped", "grown", "explored"
    at = [[{k: row.metrics.get(k) for k in ours} for row in p.history[:7]] for p in (pruner, resumed)]
    assert at[0][:6] == at[1][:6]


def test_set_grows_in_another_order_at_every_update():
    explored = []
    for grow in (criteria.Random(), lambda params: criteria.Random()(params)):  # the same few come and go
        pruner = dst(grow=grow)
        fitter(pruner, epochs=12).fit(Net(SGD))
        explored.append(pruner.explored)
    assert explored[0] > 1.2 * explored[1]


class _Never(Callback):
    def on_before_optimizer_step(self, trainer, model, optimizer):
        raise AssertionError("a step was trained")


def _of(change):
    return lambda params, grads: {n: change(g) for n, g in grads.items()}


@pytest.mark.parametrize("argument", ["drop", "grow"])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (_of(lambda g: g[:1]), "must give floating point scores of stem.weight's shape"),
        (_of(lambda g: g > 0), "must give floating point scores"),
        (_of(lambda g: g * torch.nan), "the score of stem.weight holds NaN"),
        (criteria.SparseGPT(), "SparseGPT"),
        (criteria.SynFlow(), "."),
    ],
)
def test_scores_that_no_update_can_read_are_refused_before_the_first_step(argument, scores, message):
    with pytest.raises(ValueError, match=f"^{argument}: .*{message}"):
        fitter(dst(**{argument: scores}), _Never(), epochs=4).fit(Net(SGD))


@pytest.mark.parametrize("argument", ["drop", "grow"])
def test_who_asks_for_gradients_or_momentum_that_are_not_there_is_named(argument):
    class Manual(Net):
        def __init__(self):
            super().__init__(SGD)
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=f"^{argument}: gradient asks for grads"):
        fitter(dst(**{"grow": criteria.Random(), argument: criteria.gradient}), epochs=4).fit(Manual())
    plain = Net(lambda p: torch.optim.SGD(p, 0.1))
    with pytest.raises(ValueError, match=rf"^{argument}: it reads the momentum.*\(SGD\)"):
        fitter(dst(**{argument: criteria.momentum}), _Never(), epochs=4).fit(plain)


def test_a_fast_dev_run_is_accepted_and_the_fit_after_it_has_all_updates():
    pruner = dst()
    fitter(pruner, fast_dev_run=True).fit(model := Net(SGD))
    assert pruner.round == 0
    fitter(pruner, epochs=8).fit(model)
    assert pruner.round == pruner.rounds == 8


class _Blind(Net):
    """Whose loss is no number, or none at all, on two batches; such a batch trains nothing."""

    def __init__(self, what, n=80):
        super().__init__(SGD, dropout=0.0, n=n)
        self.what = what

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step not in (4, 5):
            return loss
        return None if self.what == "None" else loss * self.what

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                p.grad = None


@pytest.mark.filterwarnings(
    "ignore:.*training_step. returned .None.",
    "ignore:.*waits for the next step",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
)
@pytest.mark.parametrize("what", ["None", math.nan], ids=str)
def test_an_update_without_evidence_waits_for_the_next_step_and_resumes(what, tmp_path):
    class Look(Watch):
        def on_prune(self, trainer, model, masks):
            self.found.append(trainer.global_step)

    def run(folder, ckpt_path=None):
        torch.manual_seed(3)
        pruner, look = dst(until_step=18, every_n_train_steps=4), Look()
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = fitter(pruner, look, saving, epochs=8, enable_checkpointing=True)
        trainer.fit(_Blind(what), ckpt_path=ckpt_path)
        return pruner, look.found, {k: v for k, v in state(trainer).items() if k != "buffers"}

    straight, steps, expected = run(tmp_path / "a")
    assert steps == [0, 6, 8, 12, 16]  # step 4 had no evidence
    for at in (4, 5, 6):
        resumed, _, found = run(tmp_path / f"{at}", tmp_path / "a" / f"step={at}.ckpt")
        assert same(resumed.masks, straight.masks)
        assert same(found, expected)


def test_an_update_that_waits_says_so_once():
    with pytest.warns(
        UserWarning, match="update 2 of .* waits for the next step: grow: the gradient"
    ) as said:
        fitter(dst(), epochs=4).fit(_Blind(math.nan))
    assert sum("waits" in str(w.message) for w in said) == 1


def test_a_far_until_step_costs_nothing_as_the_fit_starts():
    pruner = dst(until_step=10**12, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="room for .* of the 999999999999 updates"):
        fitter(pruner, epochs=1).fit(Net(SGD))
    assert pruner.round > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_train_steps": None}, "every_n_train_steps=None: allowed are whole numbers"),
        ({"fraction": schedules.CosineDecay}, "fraction=CosineDecay: a class is given"),
        ({"sparsity": schedules.Cubic}, "sparsity=Cubic: a class is given"),
        ({"masks": UNEVEN, "allocate": allocation.uniform}, "nothing reads allocate"),
        ({"masks": UNEVEN, "criterion": criteria.magnitude}, "nothing reads criterion"),
    ],
)
def test_what_no_update_could_read_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        dst(**options)


def test_a_fit_without_steps_is_refused_as_such():
    with pytest.raises(ValueError, match="the fit has no step"):
        fitter(dst(), max_steps=0).fit(Net(SGD))


def test_what_has_no_effect_is_said():
    masks = {n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in matrices(Net()).items()}
    with pytest.warns(UserWarning, match=r"masks=, sparsity=0.8: the masks are at 0.5000"):
        fitter(dst(masks=masks), epochs=4).fit(Net(SGD))
    masks["body.weight"][:] = False
    with pytest.warns(UserWarning, match="masks: all weights of body.weight are dead"):
        fitter(dst(masks=masks, sparsity=0.9), epochs=4).fit(Net(SGD))
    pruner, model = dst(), Net(SGD)
    fitter(pruner, epochs=4).fit(model)
    with pytest.warns(UserWarning, match="updates were done in the fits before"):
        fitter(pruner, epochs=4).fit(model)


@pytest.mark.parametrize(
    "pruner", [dst, lp.IterativeMagnitudePruning, lp.StructuredChannelPruning], ids=in_words
)
def test_lightnings_own_pruning_is_refused_by_name(pruner):
    for order in (1, -1):
        callbacks = [pruner(), ModelPruning("l1_unstructured", amount=0.2)][::order]
        with pytest.raises(ValueError, match="Lightning's ModelPruning is here"):
            fitter(*callbacks, epochs=2).fit(Net(SGD))


@pytest.mark.parametrize(
    ("make", "key", "fresh"),
    [
        (lambda p: torch.optim.Rprop(p, 0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, 0.02, initial_accumulator_value=0.5), "sum", 0.5),
        (lambda p: torch.optim.Adagrad(p, 0.02), "sum", 0.0),
        (lambda p: torch.optim.ASGD(p, 0.02), "ax", 0.0),
    ],
)
def test_what_grows_has_the_state_of_a_fresh_optimizer_and_learns(make, key, fresh):
    seen, moved = [], []

    class Look(Callback):
        came = None

        def on_round_start(self, trainer, model, masks):
            self.before = {n: m.clone() for n, m in pruner.masks.items()}

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            state = trainer.optimizers[0].state
            self.came = None
            if pruner.round and trainer.global_step == 2 * pruner.round:
                self.came = {n: m & ~self.last[n] for n, m in pruner.masks.items()}
                seen.extend(
                    state[p][key][self.came[n]] for n, p in model.named_parameters() if n in self.came
                )
            self.last = {n: m.clone() for n, m in pruner.masks.items()}

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if self.came:
                moved.extend(
                    bool((p.detach()[self.came[n]] != 0).any())
                    for n, p in model.named_parameters()
                    if n in self.came
                )

    pruner = dst()
    fitter(pruner, Look(), epochs=6).fit(Net(make))
    values = torch.cat(seen)
    assert len(values) > 20
    assert torch.allclose(values, torch.full_like(values, fresh))
    assert any(moved)


def test_a_copy_of_a_callback_carries_no_network():
    pruner, rewinder = lp.IterativeMagnitudePruning(rounds=1), lp.LotteryTicketRewind()
    fitter(pruner, rewinder, epochs=2).fit(Net(SGD))
    for callback in (pruner, rewinder):
        assert "log" in vars(callback)
        assert not {"log", "log_dict"} & set(vars(deepcopy(callback)))


def test_an_early_end_names_only_what_there_is():
    class Ends(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 5

    with pytest.warns(UserWarning, match=r"the fit ended after \d of \d+ updates") as said:
        fitter(dst(), Ends(), epochs=8).fit(Net(SGD))
    assert not any("end_round_on_early_stop" in str(w.message) for w in said)
