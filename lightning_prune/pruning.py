"""Pruning: score the weights, select those that stay. The four axes meet here, and nowhere else."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import allocation, criteria
from lightning_prune.allocation import Allocation, AtLeast
from lightning_prune.checks import check_alike, check_callable, check_takes, named, number
from lightning_prune.criteria import Criterion
from lightning_prune.evidence import (
    OF_A_RUN,
    asked,
    call,
    check_asked,
    mean_gradients,
    parameters_of,
    run,
    undisturbed,
    without_use,
)
from lightning_prune.granularity import Granularity, single, within_outputs
from lightning_prune.granularity import units as units_of
from lightning_prune.layers import LAYERS, Layout, layouts, matching, prunable
from lightning_prune.layerwise import prune_in_order
from lightning_prune.masks import Masks, alive, bits, count, integer, masks_of, zero_dead_
from lightning_prune.schedules import Schedule
from lightning_prune.selection import DEAD, Scores, Together, counted, only, select
from lightning_prune.shards import (
    Part,
    Shards,
    check_given,
    cut,
    in_words,
    is_sharded,
    like,
    local,
    placed,
    refuse,
    settle,
)
from lightning_prune.updates import Update

Scheduled = list[tuple[list[str], Schedule]]  # names of weights, and the schedule that drives them
Sparsity = float | Callable[..., float]


def by_argument(schedule: Schedule | Mapping[str, Schedule]) -> dict[str, Schedule]:
    """Schedules by the argument that gives them: one for all, or one for each pattern.

    >>> by_argument(max), by_argument({"*": max})
    ({'schedule': <built-in function max>}, {"schedule['*']": <built-in function max>})
    """
    if isinstance(schedule, Mapping):
        return {f"schedule[{pattern!r}]": one for pattern, one in schedule.items()}
    return {"schedule": schedule}


def check_schedule(schedule: Schedule, rounds: int, argument: str = "schedule") -> None:
    """Refuse a schedule that leaves [0, 1), or falls, within these rounds.

    Args:
        schedule: given.
        rounds: from 0 to this one.
        argument: that gives it.

    Raises:
        ValueError: then.
    """
    if isinstance(schedule, type):
        check_callable(argument, schedule, 1)
    if not callable(schedule):
        raise ValueError(
            f"{argument}: {schedule!r} is given; allowed are callables round -> sparsity. "
            "Give one of lightning_prune.schedules; from a Hydra config set `_convert_: all` beside "
            "the callback's `_target_`."
        )
    check_takes(argument, schedule, 1)
    schedule = told(schedule, rounds)
    check_asked(f"{argument}={named(schedule)}", schedule, 1)
    if asked(schedule):
        return  # it reads the scores, and there are none yet
    reached = 0.0
    for r in range(rounds + 1):
        sparsity = sparsity_in(schedule, r, argument)
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"{argument}: {named(schedule)} gives sparsity {sparsity} in round {r}; "
                "allowed is from 0 up to, and not including, 1. Change the schedule, or rounds."
            )
        if sparsity < reached:
            raise ValueError(
                f"{argument}: {named(schedule)} falls from sparsity {reached} to {sparsity} in round {r}; "
                "allowed is one that does not fall, as masks only shrink. Change it, or rounds."
            )
        reached = sparsity


def sparsity_in(schedule: Schedule, round: int, argument: str = "schedule") -> float:
    """What a schedule that reads no scores says of a round, as a number.

    >>> sparsity_in([0.0, torch.tensor(0.5)].__getitem__, 1)
    0.5

    Raises:
        ValueError: when it says nothing of this round, or no number.
    """
    try:
        return _number(schedule(round), argument)
    except LookupError as error:  # of a table's __getitem__
        raise ValueError(
            f"{argument}: {named(schedule)} has no sparsity for round {round}, and each round needs "
            "one. Give more, or lower rounds."
        ) from error


def _number(sparsity: Any, argument: str = "schedule") -> float:
    try:
        return float(sparsity)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument}: {sparsity!r} is given as a sparsity; allowed are numbers, such as 0.5. Return one."
        ) from error


def told(schedule: Schedule, rounds: int | None) -> Schedule:
    """The schedule, with the number of rounds where its signature names `rounds`.

    >>> from lightning_prune.schedules import Geometric
    >>> round(told(Geometric(to=0.9), rounds=4)(4), 6)
    0.9
    """
    if rounds is None or "rounds" not in parameters_of(schedule):
        return schedule
    return partial(schedule, rounds=rounds)


def scheduled(
    names: Sequence[str], schedule: Schedule | Mapping[str, Schedule], rounds: int | None = None
) -> Scheduled:
    """Which schedule drives which weights: one for all, or one per name pattern; the first that matches wins.

    >>> import lightning_prune as lp
    >>> half, all_ = lp.schedules.OneShot(0.1), lp.schedules.OneShot(0.2)
    >>> by_pattern = {"out.*": half, "*": all_}
    >>> [(names, s.sparsity) for names, s in scheduled(["fc1.weight", "out.weight"], by_pattern)]
    [(['out.weight'], 0.1), (['fc1.weight'], 0.2)]

    Raises:
        ValueError: when a pattern gets no weight, or a weight no pattern.
    """
    if not isinstance(schedule, Mapping):
        return [(list(names), told(schedule, rounds))]
    left, result = list(names), Scheduled()
    for pattern, one in schedule.items():
        mine = matching(left, "schedule", [pattern])
        left = [name for name in left if name not in mine]
        result.append((mine, told(one, rounds)))
    if left:
        raise ValueError(
            f"schedule: no pattern matches {', '.join(left)}; every weight needs one. "
            "Add the pattern '*' as the last one, or exclude them."
        )
    return result


def budget(sparsity: float, n: int) -> int:
    """The survivors that a sparsity leaves of `n` weights: round((1 - sparsity) * n).

    Raises:
        ValueError: when the sparsity is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity}: allowed is 0 (dense) to 1, such as 0.5.")
    return round((1 - sparsity) * n)


def sparsities_of(groups: Scheduled, round: int) -> list[tuple[list[str], Sparsity]]:
    """How far each group's schedule goes in a round: a number, or a function of the scores."""
    return [
        (names, partial(schedule, round) if asked(schedule) else sparsity_in(schedule, round))
        for names, schedule in groups
    ]


def next_masks(
    params: Mapping[str, Tensor],
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], Sparsity]],
    criterion: Criterion = criteria.magnitude,
    allocate: Allocation = allocation.global_rank,
    granularity: Granularity = single,
    **evidence: Any,
) -> Masks:
    """One pruning: score the weights, allocate each group's budget, keep the best. Masks only shrink.

    Args:
        params: the weights, by name.
        masks: which of them are alive now.
        sparsities: pairs of a group's names and the sparsity it is to have, or a function that reads the
            scores to say it; the budget is met exactly, unless fewer are alive already. Sparsity 0 leaves a
            group as it is.
        criterion: weights -> scores.
        allocate: scores and survivors in a group -> survivors per tensor. None is left empty, unless it is an
            `AtLeast(0, ...)` or the total is too small.
        granularity: what lives and dies together; budgets and survivors count its units.
        evidence: what criteria may ask for besides; see `lightning_prune.criteria`. Of `layouts`, or else of
            `model`, a granularity has the layouts of the weights; without both outputs come first.

    Returns:
        The new masks, in the order of `params`. Nothing that was given is changed.

    Raises:
        ValueError: when a weight or a score of a living weight is not finite.
    """
    weights = {name: p.detach() for name, p in params.items()}
    if any(map(is_sharded, weights.values())):
        return _next_shards(weights, masks, sparsities, criterion, allocate, granularity, evidence)
    for name, weight in weights.items():
        check_finite(name, weight)
    if not any(sparsity for _, sparsity in sparsities):
        return {name: masks[name].clone() for name in weights}
    evidence |= _known(weights, sparsities)
    laid_out: Mapping[str, Layout] = evidence.get("layouts") or {}
    if not laid_out and (model := evidence.get("model")) is not None:
        laid_out = evidence["layouts"] = layouts(model, weights)
    scores = score(criterion, weights, {"masks": masks, **evidence})
    of_a_run = {name: evidence[name] for name in OF_A_RUN & evidence.keys()}
    return chosen(scores, weights, masks, sparsities, allocate, granularity, laid_out, **of_a_run)


def _known(
    weights: Mapping[str, Tensor], sparsities: Sequence[tuple[Sequence[str], Sparsity]]
) -> dict[str, float]:
    """The sparsity of all weights together, where it is known before the scores are."""
    known = [(s, sum(weights[n].numel() for n in names)) for names, s in sparsities if not callable(s)]
    if len(known) < len(sparsities):
        return {}
    return {"sparsity": sum(s * n for s, n in known) / max(1, sum(n for _, n in known))}


def _next_shards(
    weights: dict[str, Tensor],
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], Sparsity]],
    criterion: Criterion,
    allocate: Allocation,
    granularity: Granularity,
    evidence: dict[str, Any],
) -> Masks:
    """`next_masks` of weights that are sharded over processes, which must all call it.

    Scores are made of the sharded tensors, so that what a criterion sums up it sums over the whole. What is
    selected of them each process selects in its own part.
    """
    masks = {name: like(masks[name], w) for name, w in weights.items()}
    runs = OF_A_RUN & {*asked(criterion), *asked(allocate, 2)}
    batches, failed = evidence.get("batches") if runs else None, None
    laid_out: Mapping[str, Layout] = evidence.pop("layouts", None) or {}
    try:  # what goes wrong is told to the others, so that none of them waits for this process
        if not laid_out and (model := evidence.get("model")) is not None:
            laid_out = layouts(model, weights)
        check_shards(weights, sparsities, {"criterion": criterion}, granularity, laid_out)
        for name, weight in weights.items():
            check_finite(name, local(weight))
    except Exception as error:
        failed = error
    together = Shards(weights, failed)
    if not any(sparsity for _, sparsity in sparsities):
        return {name: placed(local(masks[name]).clone(), w) for name, w in weights.items()}
    if batches is not None and len({*(numbers := together.told(len(batches)))}) > 1:
        raise ValueError(
            f"batches: processes have {', '.join(map(str, numbers))} of them, and they run the model "
            "together. Allowed are as many on each. Give each as many."
        )
    told = [{"sparsity": s} for s in together.told(", ".join(f"{s}" for _, s in sparsities))]
    check_alike(told)
    evidence |= _known(weights, sparsities)
    scores: Scores = {}
    try:
        if (initial := evidence.get("initial")) is not None:
            evidence["initial"] = {
                n: like(initial[n].to(w.device), w) if initial[n].shape == w.shape else initial[n]
                for n, w in weights.items()
                if n in initial
            }
        scores = score(criterion, weights, {"masks": masks, "layouts": laid_out, **evidence})
    except Exception as error:
        if runs:  # the others may be within the model, where nothing can be told
            raise
        failed = error
    try:
        scores = {name: local(like(s, weights[name])) for name, s in scores.items()}
        for name, values in scores.items():
            check_finite(name, values, local(masks[name]))
    except Exception as error:
        failed = error
    together.agree(failed)
    if runs:
        check_replicas(scores, weights, together)
    here = {name: local(mask) for name, mask in masks.items()}
    of_a_run = {name: evidence[name] for name in OF_A_RUN & evidence.keys()}
    if granularity is not single:
        laid_out = {n: layout.of_part() if cut(weights[n]) else layout for n, layout in laid_out.items()}
    new = chosen(
        scores, weights, here, sparsities, allocate, granularity, laid_out, together=together, **of_a_run
    )
    return {name: placed(mask, weights[name]) for name, mask in new.items()}


def check_replicas(
    scores: Scores, weights: Mapping[str, Tensor], together: Shards, argument: str = "criterion"
) -> None:
    """Refuse scores that differ between processes which have the weight whole: nobody reduced them.

    Raises:
        ValueError: on every process, naming the argument that gave them.
    """
    sums = {
        n: int(s.view(integer(s.dtype)).sum(dtype=torch.int64))
        for n, s in scores.items()
        if not is_sharded(weights[n])
    }
    first, *others = together.told(sums)
    if wrong := [name for name in sums if any(theirs[name] != first[name] for theirs in others)]:
        raise ValueError(
            f"{argument}: the scores of {', '.join(wrong)} differ between processes, on all of which the "
            "weight is whole, and one mask is needed. Exclude it, or shard it as the others."
        )


def check_shards(
    weights: Mapping[str, Tensor],
    sparsities: Sequence[tuple[Sequence[str], Sparsity]],
    criteria_of: Mapping[str, Criterion],
    granularity: Granularity,
    laid_out: Mapping[str, Layout],
) -> None:
    """Refuse what cannot be done on shards, of criteria by the arguments that gave them.

    Raises:
        ValueError: naming it.
    """
    if any(callable(sparsity) for _, sparsity in sparsities):
        raise ValueError(
            "schedule: it reads the scores, and weights are sharded over processes, each of which has a part "
            "of them. Allowed are schedules of the round alone. Use one of these."
        )
    for name, weight in weights.items() if granularity is not single else ():
        outputs, _ = laid_out.get(name, Layout()).axes(weight.dim())
        if cut(weight) and not (within_outputs(granularity) and cut(weight) <= {*outputs}):
            raise ValueError(
                f"granularity: {named(granularity)} puts weights of {name} together that may lie on several "
                f"processes, over which dimension {min(cut(weight))} is divided. Allowed are single weights, "
                "and, where whole outputs lie on a process, NM, Kernel, Filter(dim=0) and Block(rows=1), of "
                "which it is known that their units lie within one output. Use one, or prune before sharding."
            )
    for argument, criterion in criteria_of.items():
        if criterion is criteria.large_init_large_final:
            raise ValueError(
                f"{argument}: {named(criterion)} ranks all weights of a layer, and they are sharded over "
                "processes, each of which has a part. Allowed are criteria that score each weight by itself, "
                "such as movement. Use one of these."
            )
        wanted = (OF_A_RUN & asked(criterion).keys()) - {"grads"}
        if wanted and criterion not in (criteria.taylor, criteria.wanda):
            raise ValueError(
                f"{argument}: {named(criterion)} asks for {', '.join(sorted(wanted))}, to run the model in a "
                "way of its own, and weights are sharded over processes, which must put together what they "
                "find. Allowed are criteria of the weights, of `grads`, such as snip, and taylor and wanda. "
                "Use one, or prune before you shard the model."
            )


def chosen(
    scores: Scores,
    params: Mapping[str, Tensor],
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], Sparsity]],
    allocate: Allocation,
    granularity: Granularity,
    laid_out: Mapping[str, Layout] | None = None,
    together: Together | None = None,
    **evidence: Any,
) -> Masks:
    """The second half of `next_masks`: of scores that are known, who lives on. `scores` is emptied.

    With `together`, scores and masks are those of the parts of tensors that this process has.

    Raises:
        ValueError: when a score of a living weight is not finite.
    """
    units: Scores = {}
    candidates: Masks = {}
    expand: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, mask in masks.items():
        check_finite(name, values := scores.pop(name), mask)
        if granularity is single:
            units[name], candidates[name], expand[name] = values, mask, _as_it_is
            continue
        living = values if count(mask) == mask.numel() else torch.where(mask, values, DEAD)
        units[name], expand[name] = units_of(granularity, living, (laid_out or {}).get(name))
        candidates[name] = units[name] > DEAD
    if together is not None and granularity is not single:
        together = together.of({n: _part_of_units(units[n], n, together, laid_out or {}) for n in units})
    allocate = allocate if isinstance(allocate, AtLeast) else AtLeast(1, of=allocate)
    new: Masks = {}
    for names, sparsity in sparsities:
        group = {name: units.pop(name) for name in names}
        if callable(sparsity):
            sparsity = _number(call(sparsity, scores=only(group, candidates)))
        if not sparsity:
            new.update({name: masks[name].clone() for name in names})
            continue
        there = {name: candidates[name] for name in names}
        size = sum(counted({name: s.numel() for name, s in group.items()}, together).values())
        if not size and any(masks[name].numel() for name in names):
            warnings.warn(
                f"granularity: {named(granularity)} finds no unit in {', '.join(names)}, which stay dense. "
                "Use another.",
                stacklevel=2,
            )
        total = min(
            budget(sparsity, size), sum(counted({n: count(c) for n, c in there.items()}, together).values())
        )
        rows = laid_out if granularity is single else None  # units say by their shape what outputs are
        axes = total, allocate, together, rows
        best = select(group, there, *axes, params=params, masks=masks, **evidence)
        new.update({n: expand[n](best.pop(n)).contiguous().logical_and_(masks[n]) for n in names})
    return {name: new[name] for name in params}


def _part_of_units(units: Tensor, name: str, together: Together, laid_out: Mapping[str, Layout]) -> Part:
    """Which of all units a process has: those of its outputs, where outputs are divided over processes."""
    part = together.part(name)
    rest = [torch.arange(size) for size in units.shape[1:]]
    if not part.cut:
        return Part((torch.arange(len(units)), *rest), tuple(units.shape))
    outputs, _ = laid_out.get(name, Layout()).axes(len(part.shape))
    shape = (part.size(outputs), *units.shape[1:])
    return Part((part.along(outputs), *rest), shape, frozenset([0]))


def _as_it_is(mask: Tensor) -> Tensor:
    return mask


def score(
    criterion: Criterion, weights: dict[str, Tensor], evidence: dict[str, Any], argument: str = "criterion"
) -> Scores:
    """The criterion's scores, of each weight's shape; it gets the evidence that its signature names.

    Errors name it as the `argument` that it was given as.

    Raises:
        ValueError: when evidence is missing, or the scores are not one floating point number for each weight.
    """
    if "grads" in asked(criterion) and evidence.get("batches") and evidence.get("loss"):
        run = (evidence[name] for name in ("model", "loss", "batches"))
        evidence = {**evidence, "grads": mean_gradients(weights, *run)}
    if (initial := evidence.get("initial")) is not None:
        for name, w in weights.items():
            if name not in initial or initial[name].shape != w.shape:
                given = tuple(initial[name].shape) if name in initial else "none"
                raise ValueError(
                    f"initial: {name} of shape {tuple(w.shape)} is needed, and {given} is given. "
                    "Give the weights of this model at initialization."
                )
    versions = {name: _version(w) for name, w in weights.items()}
    scores = call(criterion, weights, **evidence)
    if changed := [name for name, w in weights.items() if _version(w) != versions[name]]:
        raise ValueError(
            f"{argument}: {named(criterion)} changed {', '.join(changed)} in place; allowed is to read "
            "weights. Make it change copies, and load the weights again."
        )
    for name, w in weights.items():
        values = scores.get(name) if isinstance(scores, Mapping) else None
        if not isinstance(values, Tensor) or values.shape != w.shape or not values.is_floating_point():
            raise ValueError(
                f"{argument}: {named(criterion)} must give floating point scores of {name}'s shape "
                f"{tuple(w.shape)}. Return one score for each weight."
            )
    return {name: scores[name].detach() for name in weights}


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as torch counts."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - it has no public name


def check_finite(name: str, tensor: Tensor, mask: Tensor | None = None) -> None:
    """Refuse a weight that is not finite, or the score, where the mask is True, of a living one."""
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device, and values are needed. Nothing was pruned. Load them first."
        )
    if not tensor.numel() or _is_finite(tensor) or (mask is not None and _is_finite(tensor[mask])):
        return
    what = "the weight" if mask is None else "the score of"
    raise ValueError(
        f"{what} {name} holds NaN or infinity; allowed are finite numbers. "
        "Nothing was pruned. Look where the training diverged."
    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = (float(x) for x in torch.aminmax(tensor))
    return low > -math.inf and high < math.inf  # NaN compares false


def prune(
    model: nn.Module,
    sparsity: float | Schedule = 0.5,
    criterion: Criterion = criteria.magnitude,
    allocate: Allocation | None = None,
    granularity: Granularity = single,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    layer_by_layer: bool = False,
    update: Update | None = None,
) -> Masks:
    """Prune any module once, in place, without training: dead weights become exactly 0. Returns the masks.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -2.0], [3.0, 0.2]]))
    >>> prune(model, sparsity=0.5)["weight"]
    tensor([[False,  True],
            [ True, False]])
    >>> model.weight.data
    tensor([[ 0., -2.],
            [ 3.,  0.]])

    Args:
        model: any module; parameters keep their identity and their names.
        sparsity: fraction of the prunable weights (of the units, with a granularity) to remove, in [0, 1]; or
            a schedule, of which this is round 1.
        criterion: which weights; see `lightning_prune.criteria`. One that needs data runs the model in the
            mode it is in, and leaves it and the random number generators as they were.
        allocate: how many where; see `lightning_prune.allocation`. None: `global_rank`, or `uniform` where
            layers are pruned one by one.
        granularity: what lives and dies together; see `lightning_prune.granularity`.
        layers: layer types whose weights are prunable.
        include: fnmatch patterns over parameter names; only these.
        exclude: fnmatch patterns over parameter names; not these.
        data: batches, pairs (input, target), inputs, or mappings of keyword arguments, on the model's device;
            all of it is held in memory.
        loss: (output, target) -> scalar.
        initial: {name: weight at initialization}, a `state_dict` say, for criteria that compare with it.
        masks: {name: bool tensor} of a pruning before. What is dead there stays dead, and counts in the
            sparsity, so that a sparsity below theirs changes nothing. Weights without a mask are alive.
        layer_by_layer: prune in the order in which data reach the layers, each on what the pruned ones before
            it give, with counts that do not depend on scores. Of blocks that are called one after the other
            only one at a time is run, on its inputs, which are held.
        update: what the survivors of a layer become, such as `lightning_prune.updates.LeastSquares()`, where
            layers are pruned one by one. The outputs of a layer never change more than without it.

    Raises:
        ValueError: when a pattern matches nothing, nothing is prunable, a weight is not finite, a schedule
            leaves nothing, masks are not those of the weights, or the criterion asks for something that is
            not given. The model is then as it was.
    """
    if any(map(is_sharded, settle(model).values())):
        axes = {
            "sparsity": sparsity,
            "criterion": criterion,
            "allocate": allocate,
            "granularity": granularity,
        }
        which = {"layers": layers, "include": include, "exclude": exclude}
        how = {"loss": loss, "layer_by_layer": layer_by_layer, "update": update}
        given = {name: named(value) for name, value in {**axes, **which, **how}.items()}
        given |= {name: in_words(t or {}) for name, t in (("initial", initial), ("masks", masks))}
        if callable(criterion) and "generator" in asked(criterion):
            given["torch.manual_seed"] = f"{torch.initial_seed()}"
        check_given(given)  # what is looked at below goes wrong on all processes or on none
    params = prunable(model, layers, include, exclude)
    if layer_by_layer:
        refuse(
            params.values(),
            "layer_by_layer=True",
            "Allowed is to prune before the model is sharded. Prune there, or leave it out.",
        )
    check_callable("criterion", criterion, 1)
    if allocate is not None:  # else one that goes with the criterion
        check_callable("allocate", allocate, 2)
    check_callable("granularity", granularity, 1)
    there = _dense(params) if masks is None else {**_dense(params), **masks_of(params, masks, "prunable")}
    evidence: dict[str, Any] = {"initial": initial, "model": model}
    if "generator" in asked(criterion):
        evidence["generator"] = torch.Generator().manual_seed(torch.initial_seed())
    if data is not None:
        evidence["batches"] = list(data)
        evidence["forward"] = run
        if loss is not None:
            evidence["loss"] = lambda model, batch: loss(model(batch[0]), batch[1])
    if not callable(sparsity):
        number("sparsity", sparsity, "is 0 (dense) to 1, such as 0.5", lambda v: 0 <= v <= 1)
    schedule = sparsity if callable(sparsity) else lambda round: sparsity
    if layer_by_layer:
        ((_, far),) = sparsities_of(scheduled(list(params), schedule, 1), 1)
        if callable(far):
            raise ValueError(
                f"layer_by_layer=True: {named(sparsity)} reads the scores of all layers, which do not exist "
                "together here. Allowed are numbers, and schedules that do not read scores. Give one."
            )
        size = sum(p.numel() for p in params.values())
        if not budget(far, size) and callable(sparsity):
            raise _nothing_left(sparsity, size)
        axes = criterion, allocate or allocation.uniform, granularity, update
        for name, p in params.items():
            check_finite(name, p.detach())
        with undisturbed(model):
            new = prune_in_order(model, params, there, far, *axes, next_masks, evidence)
        _say_unused(criterion, axes[1], {"loss": loss, "initial": initial})
        return new
    if update is not None:
        raise ValueError(
            f"update: {named(update)} needs what reaches a layer. Allowed with layer_by_layer=True "
            "and data. Give both."
        )
    allocate = allocate or allocation.global_rank
    wanted = asked(criterion).keys() | asked(allocate, 2).keys()
    with undisturbed(model) if OF_A_RUN & wanted else nullcontext():
        new = next_masks(
            params,
            there,
            sparsities_of(scheduled(list(params), schedule, 1), 1),
            criterion,
            allocate,
            granularity,
            **evidence,
        )
    if callable(sparsity) and not alive(new):
        raise _nothing_left(sparsity, sum(p.numel() for p in params.values()))
    _say_unused(criterion, allocate, {"data": data, "loss": loss, "initial": initial})
    for name, p in params.items():
        zero_dead_(p, bits(new[name], like=p))
    return new


def _say_unused(criterion: Criterion, allocate: Allocation, given: Mapping[str, object]) -> None:
    """Say which of the arguments that were given change nothing."""
    for said in without_use({"criterion": (criterion, 1), "allocate": (allocate, 2)}, given):
        warnings.warn(said, stacklevel=3)


def _nothing_left(schedule: Schedule, size: int) -> ValueError:
    return ValueError(
        f"sparsity: {named(schedule)} leaves none of {size} weights, and one is needed. Nothing was "
        "pruned. Give a schedule that leaves some."
    )


def _dense(params: Mapping[str, Tensor]) -> Masks:
    one = torch.ones((), dtype=torch.bool)
    # without memory of theirs
    return {name: placed(one.to(p.device).expand(local(p).shape), p) for name, p in params.items()}
