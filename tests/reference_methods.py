"""Slow, obvious versions of the published methods. The tests demand equality."""

import itertools
import math

import numpy as np
import torch
from torch import nn

# --------------------------------------------------------------------------------------------------- criteria


def hessian(loss, weights):
    """The Hessian of `loss(flat weights)`."""
    return torch.autograd.functional.hessian(loss, weights)


def grasp(loss, flat):
    """w * (H g) from the whole Hessian."""
    flat = flat.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(flat), flat)
    return flat.detach() * (hessian(loss, flat.detach()) @ g)


def synflow(weights, density, rounds):
    """Masks of SynFlow on a chain of matrices, by the paper's Algorithm 1: score, keep the top, again."""
    masks = [np.ones_like(w, dtype=bool) for w in weights]
    for k in range(1, rounds + 1):
        m = [np.abs(w) * mask for w, mask in zip(weights, masks, strict=True)]
        scores = []
        for i, w in enumerate(m):  # R = 1' W_L ... W_1 1, so dR/dW_i = (1' W_L ... W_i+1)' (W_i-1 ... W_1 1)'
            left = np.ones(m[-1].shape[0])
            for later in reversed(m[i + 1 :]):
                left = left @ later
            right = np.ones(m[0].shape[1])
            for earlier in m[:i]:
                right = earlier @ right
            scores.append(w * np.outer(left, right))
        flat = np.concatenate([np.where(mask, s, -1).ravel() for s, mask in zip(scores, masks, strict=True)])
        keep = np.argsort(-flat, kind="stable")[: round(flat.size * density ** (k / rounds))]
        new = np.zeros(flat.size, dtype=bool)
        new[keep] = True
        masks = [
            p.reshape(w.shape)
            for p, w in zip(np.split(new, np.cumsum([w.size for w in weights])[:-1]), weights, strict=True)
        ]
    return masks


def wanda_linear(w, x):
    return torch.tensor(
        [[abs(w[o, i]) * x[:, i].norm() for i in range(w.shape[1])] for o in range(w.shape[0])]
    )


def ria(w, x):
    """(|w_oi| / sum over o + |w_oi| / sum over i) * sqrt(||x_i||), one weight at a time."""
    a, scores = w.abs(), torch.zeros_like(w)
    for o, i in itertools.product(*map(range, w.shape)):
        if a[o, i]:
            scores[o, i] = (a[o, i] / a[:, i].sum() + a[o, i] / a[o].sum()) * x[:, i].norm().sqrt()
    return scores


def sparsegpt(weight, hessian, choose, parts):
    """Optimal brain surgery of column after column, each with the inverse over the columns that are left."""
    w, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start, stop in parts:
        growth = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)])
        mask[:, start:stop] = choose(w[:, start:stop] ** 2 / growth)
        for j in range(start, stop):
            inverse = torch.linalg.inv(hessian[j:, j:])
            for o in range(len(w)):
                if not mask[o, j]:
                    w[o, j:] -= w[o, j] / inverse[0, 0] * inverse[0]
                    w[o, j] = 0
    return w, mask


def least_squares(weight, mask, x):
    """For each output the survivors whose product with the inputs is closest to that of all weights."""
    fit = torch.zeros_like(weight)
    for o, row in enumerate(mask):
        fit[o, row] = torch.linalg.lstsq(x[:, row], x @ weight[o]).solution
    return fit


def wanda_conv(conv, x):
    """Unfold the input to the patches that each weight of a convolution meets."""
    w, per_group = conv.weight.detach(), conv.out_channels // conv.groups
    patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    norms = patches.pow(2).sum((0, 2)).sqrt().view(conv.in_channels, *conv.kernel_size)
    inputs = conv.in_channels // conv.groups
    return torch.stack([w[o].abs() * norms[o // per_group * inputs :][:inputs] for o in range(len(w))])


def large_init_large_final(now, start, alive, keep):
    """The mask of what is above the same percentile in both, the highest that keeps `keep` weights."""
    living = [i for i in range(now.numel()) if alive.flatten()[i]]
    a, b = now.abs().flatten(), start.abs().flatten()
    by_now, by_start = (sorted(living, key=lambda i, x=x: float(x[i])) for x in (a, b))
    for cut in range(len(living), -1, -1):
        kept = set(by_now[cut:]) & set(by_start[cut:])
        if len(kept) == keep:
            return torch.tensor([i in kept for i in range(now.numel())]).view(now.shape)
    return None  # two weights cross the same percentile at once


# ---------------------------------------------------------------------------------------------- allocations


def class_distributed(weights, total):
    """Bisect lambda until the thresholds lambda * sigma leave `total` weights. None where ties forbid it."""
    low, high = 0.0, 1e6
    for _ in range(200):
        lam = (low + high) / 2
        keep = {n: int((w.abs() >= lam * w.std(correction=0)).sum()) for n, w in weights.items()}
        left = sum(keep.values())
        if left == total:
            return keep
        low, high = (lam, high) if left > total else (low, lam)
    return None


def erk(shapes, density):
    """Densities by the published loop: whatever would exceed 1 becomes dense and leaves the equation."""
    dense = set()
    while True:
        total = density * sum(math.prod(s) for s in shapes.values())
        total -= sum(math.prod(shapes[n]) for n in dense)
        raw = {n: sum(s) / math.prod(s) for n, s in shapes.items() if n not in dense}
        eps = total / sum(raw[n] * math.prod(shapes[n]) for n in raw)
        full = {n for n in raw if eps * raw[n] > 1}
        if not full:
            return {n: 1.0 if n in dense else eps * raw[n] for n in shapes}
        dense |= full


def owl(scores, m, lam, sparsity):
    """Densities by the authors' loop, around a mean weighted by size, from Wanda's scores."""
    ratios = np.array([float((s > m * s.mean()).double().mean()) for s in scores.values()])
    sizes = np.array([s.numel() for s in scores.values()])
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lam * 2)
    return dict(zip(scores, ratios - np.average(ratios, weights=sizes) + 1 - sparsity, strict=True))


def lamp(scores, total):
    """The LAMP score of every weight by its definition, and the count of the highest."""
    entries = []
    for place, (name, s) in enumerate(scores.items()):
        values = sorted((v for v in s.double().flatten().tolist() if v > -math.inf), reverse=True)
        for rank, value in enumerate(values):
            entries.append((-(value**2) / sum(v**2 for v in values[: rank + 1]), place, name))
    kept = [name for _, _, name in sorted(entries)[:total]]
    return {name: kept.count(name) for name in scores}


# -------------------------------------------------------------------------------------------------- schedules


def bucket(values, beta):
    """How many of the values, from the smallest, go into a bucket of size beta."""
    filled = 0.0
    for n, value in enumerate(sorted(values)):
        filled += value
        if filled > beta:
            return n
    return len(values)


# -------------------------------------------------------------------------------------------- granularity


def nm(scores, n, m):
    """Of every m along dimension 1 the n highest; the remainder is kept."""
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for place in itertools.product(*(range(size) for d, size in enumerate(scores.shape) if d != 1)):
        for start in range(0, scores.shape[1] // m * m, m):
            at = [(place[0], start + j, *place[1:]) for j in range(m)]
            for loser in sorted(at, key=lambda i: (-float(scores[i]), i))[n:]:
                mask[loser] = False
    return mask


def block_scores(scores, rows, columns, n):
    """Ln norms, per weight, of the blocks of a matrix, smaller ones at the edges."""
    return torch.tensor(
        [
            [
                float((scores[r : r + rows, c : c + columns].double() ** n).mean() ** (1 / n))
                for c in range(0, scores.shape[1], columns)
            ]
            for r in range(0, scores.shape[0], rows)
        ]
    )


def connections(layer):
    """Which (output channel, input channel) each weight of a plain layer joins: an integer each, -1 where it
    joins none. Found by trying: an input channel of ones, and which outputs each weight then moves.
    """
    weight = layer.weight
    inputs = getattr(layer, "in_channels", None) or getattr(layer, "in_features", None) or weight.shape[0]
    pairs = torch.full((*weight.shape, 2), -1)
    spatial = (9,) * (weight.dim() - 2)
    for i in range(inputs):
        x = torch.zeros(1, inputs, *spatial)
        x[:, i] = 1
        y = layer(x).flatten(2).sum(-1)[0] if spatial else layer(x)[0]
        for o, out in enumerate(y):
            (moved,) = torch.autograd.grad(out, weight, retain_graph=True)
            pairs[moved != 0] = torch.tensor([o, i])
    return pairs


# ------------------------------------------------------------------------------------------------------ peers


def open_lth(weights, masks, fraction):
    """open_lth's rule: of the living, all above the k-th lowest magnitude, k = ceil(fraction * left)."""
    living = np.concatenate([w[masks[n]].numpy() for n, w in weights.items()])
    cut = np.sort(np.abs(living))[math.ceil(fraction * living.size)]
    return {n: (w.abs() > cut) & masks[n] for n, w in weights.items()}, float(cut)
