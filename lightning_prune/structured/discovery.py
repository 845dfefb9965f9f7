"""Discovery: the coupled channels of a network that may be removed, and why the others stay."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune import rng
from lightning_prune.layers import matching
from lightning_prune.structured.coupling import HEAD, coupled
from lightning_prune.structured.heads import Watch, attention_heads
from lightning_prune.structured.trial import as_input, first_line, refused, synthetic, why_not
from lightning_prune.structured.units import Couplings, is_maker, parameter

SHOWN = 8  # names in a message for one reason; a network may have hundreds


def discover(
    model: nn.Module,
    example: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Couplings:
    """The coupled channels of a model that may be removed, by name; each tried on a copy.

    Channels that are outputs of the model stay. A trial removes some of the units: the copy must run, in
    training and in evaluation, give outputs of the same shapes, and those of the network in which the same
    channels are zero. Channels that fail are left out, with a warning that names them and says why.

    >>> sorted(discover(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), [1, 2]))
    ['0.weight']

    Args:
        model: any module; it is not changed, nor are the random number generators.
        example: an input: a tensor, its shape, a tuple of arguments or a dict of keyword arguments.
        include: fnmatch patterns over weight names; only channels that one of these makes.
        exclude: fnmatch patterns over weight names; no channels that one of these makes.

    Raises:
        ValueError: when a pattern matches nothing, the model cannot be traced, or no channels are left.
        ImportError: without torch-pruning.

    Reference: Fang et al. (2023), "DepGraph", arXiv:2301.12900.
    """
    _check(model)
    generators = rng.capture()
    try:
        device = next(model.parameters()).device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            copy, example = synthetic(model, as_input(example))
            try:
                with Watch(example) as watch:
                    found, reasons = coupled(copy, example)
            except (ImportError, ValueError):
                raise
            except Exception as error:  # a graph that torch-pruning has drawn wrongly, in a way not met yet
                raise refused(model, first_line(error)) from error
            heads = attention_heads(copy, example, watch.multiplied)
            theirs = {parameter(site) for coupling in heads.values() for site in coupling.filters}
            found = {n: c for n, c in found.items() if theirs.isdisjoint(map(parameter, c.filters))} | heads
            reasons = {name: reason for name, reason in reasons.items() if name not in theirs}
            chosen = _chosen(found, reasons, include, exclude)
            good = {name: found[name] for name in chosen if name not in reasons}
            copy.requires_grad_(False)
            reasons |= why_not(copy, example, good)
    finally:
        rng.restore(generators)
    stay = _shown({name: reasons[name] for name in chosen if reasons.get(name, HEAD) != HEAD})
    good = {name: coupling for name, coupling in good.items() if name not in reasons and coupling.units > 1}
    if not good:
        raise ValueError(
            f"{type(model).__name__} has no channels to remove: "
            f"{stay or _why_nothing(model, found, reasons, chosen)}. "
            "Use IterativeMagnitudePruning or lightning_prune.prune, which need no structure."
        )
    if stay:
        warnings.warn(f"channels left as they are: {stay}. Exclude them to silence this.", stacklevel=2)
    return good


def _check(model: nn.Module) -> None:
    """Refuse what has no weights to be copied, or code that cannot be followed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or type(model).__name__} is a torch.jit.ScriptModule, whose layers cannot be "
                "traced; allowed are modules that Python runs. Cut what it was made of, then script it."
            )
    params = dict(model.named_parameters())
    if not params:
        raise ValueError(
            f"{type(model).__name__} has no channels, as it has no parameters; some are needed. Give another."
        )
    for name, p in params.items():
        if is_lazy(p):
            raise ValueError(
                f"{name} is not initialized yet, as is needed; run a batch through the lazy layer first."
            )
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device, and values are needed; load the weights first.")


def _chosen(
    found: Couplings, reasons: Mapping[str, str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    """The names of channels that the patterns leave, of those that stay for a reason, too."""
    makers = {name: [name] for name in reasons}
    for name, coupling in found.items():
        makers[name] = [parameter(site) for site in coupling.filters] or [name]
    weights = list(dict.fromkeys(weight for made in makers.values() for weight in made))
    kept = set(weights if include is None else matching(weights, "include", include))
    gone = set(matching(weights, "exclude", exclude or []))
    return [name for name in makers if kept & {*makers[name]} and not gone & {*makers[name]}]


def _why_nothing(
    model: nn.Module, found: Couplings, reasons: Mapping[str, str], chosen: Sequence[str]
) -> str:
    """The true reason, where none of the chosen channels has one of its own."""
    left = [name for name in found if name not in chosen and name not in reasons]
    if left:
        return f"`include` and `exclude` leave none of {_some(left)}; change the patterns"
    if any(coupling.units == 1 for name, coupling in found.items() if name not in reasons):
        return "its layers have one unit each"
    others = [m for m in model.modules() if not is_maker(m) and not isinstance(m, nn.Embedding)]
    unknown = {type(m).__name__ for m in others if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    if unknown:
        kinds = ", ".join(sorted(unknown))
        return f"the channels of {kinds} cannot be traced, and all others are its outputs"
    return "all are its outputs"


def _shown(reasons: Mapping[str, str]) -> str:
    names = {reason: [name for name in reasons if reasons[name] == reason] for reason in reasons.values()}
    return "; ".join(f"{reason}: {_some(those)}" for reason, those in names.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
