"""Slow, obvious versions of what the package does fast. The tests demand equality."""

import itertools
from copy import deepcopy
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from lightning_prune.rewind import Snapshot


def global_selection(scores, keep):
    """Masks of the `keep` highest scores of all tensors; of equals the earlier tensor, then the index."""
    entries = [
        (-value, place, index)
        for place, name in enumerate(scores)
        for index, value in enumerate(scores[name].double().flatten().tolist())
    ]
    masks = {name: np.zeros(s.numel(), dtype=bool) for name, s in scores.items()}
    names = list(scores)
    for _, place, index in sorted(entries)[:keep]:
        masks[names[place]][index] = True
    return {name: torch.from_numpy(mask).view(scores[name].shape) for name, mask in masks.items()}


def largest_remainder(total, shares, caps):
    """Split `total` like `shares`, none above its cap, exactly; equal remainders: the earlier first."""
    quota = {}
    free = dict(shares)
    while free:
        rest, mass = total - sum(quota.values()), sum(map(Fraction, free.values())) or 1
        due = {name: Fraction(rest) * Fraction(share) / mass for name, share in free.items()}
        full = [name for name in free if due[name] >= caps[name]]
        quota.update({name: caps[name] for name in full} if full else due)
        free = {name: share for name, share in free.items() if full and name not in full}
    keep = {name: int(quota[name]) for name in shares}
    order = sorted(shares, key=lambda name: keep[name] - quota[name])  # a stable sort
    for name in itertools.cycle(order):
        if sum(keep.values()) == total:
            return keep
        keep[name] += keep[name] < caps[name]
    return keep


def uniform_selection(scores, keep):
    """Masks by `largest_remainder` over the sizes, and the highest scores in each tensor."""
    caps = {name: int((s > -torch.inf).sum()) for name, s in scores.items()}
    keep = largest_remainder(keep, {name: s.numel() for name, s in scores.items()}, caps)
    return {name: global_selection({name: s}, keep[name])[name] for name, s in scores.items()}


def per_output_selection(scores, keep):
    """Masks by `uniform`'s counts, shared out among the rows (dimension 0) by the largest remainder."""
    caps = {name: int((s > -torch.inf).sum()) for name, s in scores.items()}
    keep = largest_remainder(keep, {name: s.numel() for name, s in scores.items()}, caps)
    masks = {}
    for name, s in scores.items():
        rows = dict(enumerate(s.flatten(1)))
        caps = {i: int((row > -torch.inf).sum()) for i, row in rows.items()}
        counts = largest_remainder(keep[name], dict.fromkeys(rows, 1), caps)
        masks[name] = torch.stack([global_selection({0: row}, counts[i])[0] for i, row in rows.items()])
        masks[name] = masks[name].view(s.shape)
    return masks


def lottery_ticket(
    model,
    optimizer,
    batches,
    rounds,
    epochs,
    rate,
    scheduler=None,
    to_step=None,
    clip=None,
    select=global_selection,
):
    """The lottery ticket procedure as a plain loop: train, prune by magnitude, rewind, again.

    `batches` is iterated once an epoch. `to_step=None` goes on without rewinding. Masks are put on after
    every step by assignment, and on gradients where these are clipped. Yields (masks, trained state_dict) a
    round.
    """
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in weights.items()}
    early, step, size = None, 0, sum(p.numel() for p in weights.values())
    for round_ in range(rounds + 1):
        if round_:
            scores = {n: p.detach().abs().masked_fill(~masks[n], -torch.inf) for n, p in weights.items()}
            masks = select(scores, round((1 - (1 - (1 - rate) ** round_)) * size))
            if early is not None:
                early.restore(model, [optimizer], [scheduler] if scheduler else [])
            _put_on(weights, masks)
            for name, p in weights.items():  # a dead weight has no momentum
                for value in optimizer.state[p].values():
                    if torch.is_tensor(value) and value.shape == p.shape:
                        value[~masks[name]] = 0
        for _ in range(epochs):
            for x, y in batches:
                if step == to_step:
                    early = Snapshot.take(model, [optimizer], [scheduler] if scheduler else [])
                step += 1
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if clip:
                    for name, p in weights.items():
                        p.grad[~masks[name]] = 0
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                _put_on(weights, masks)
            if scheduler:
                scheduler.step()
        yield deepcopy(masks), deepcopy(model.state_dict())


@torch.no_grad()
def _put_on(weights, masks):
    for name, p in weights.items():
        p[~masks[name]] = 0.0
