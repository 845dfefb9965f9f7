"""Following: averages, teachers, targets and other copies of a network take the masks of their originals."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn


def following(follow: Mapping[str, str], masked: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Which parameters are copies of which masked ones, by patterns in which `*` stands for the same text.

    >>> following({"target.*": "net.*"}, ["net.fc.weight"], ["net.fc.weight", "target.fc.weight"])
    {'target.fc.weight': 'net.fc.weight'}

    Args:
        follow: {pattern of copies: pattern of originals}, each with one `*`.
        masked: names of the originals that have masks.
        names: of all parameters.

    Returns:
        {name of a copy: name of its original}.

    Raises:
        ValueError: when a pattern has not exactly one `*`, leads to no copy, or leads to a parameter that has
            a mask of its own.
    """
    found: dict[str, str] = {}
    for copies, originals in follow.items():
        given = f"follow={{{copies!r}: {originals!r}}}"
        if copies.count("*") != 1 or originals.count("*") != 1:
            raise ValueError(
                f"{given}: allowed are patterns with exactly one *. Write them like {{'target.*': 'net.*'}}."
            )
        (before, after), (start, end) = originals.split("*"), copies.split("*")
        shortest = len(before) + len(after)
        fit = [n for n in masked if len(n) >= shortest and n.startswith(before) and n.endswith(after)]
        new = {start + n[len(before) : len(n) - len(after)] + end: n for n in fit}
        new = {copy: n for copy, n in new.items() if copy in names and copy != n}
        if not new:
            raise ValueError(
                f"{given}: no parameter is such a copy; allowed are copies of masked ones. They are: "
                f"{', '.join(masked)}. Name patterns of these and of their copies."
            )
        if own := [copy for copy in new if copy in masked]:
            raise ValueError(
                f"{given}: allowed are copies without masks of their own, and these are pruned themselves: "
                f"{', '.join(own)}. Leave them out of include=, or exclude them."
            )
        found |= new
    return found


def look_like_copies(model: nn.Module, pruned: Collection[str], left: Collection[str]) -> dict[str, str]:
    """Patterns for `follow` of submodules that look like copies of a pruned one.

    A copy has parameters of the same names and shapes as its original, and its weights are left dense.

    >>> model = nn.ModuleDict({"net": nn.Linear(2, 2), "target": nn.Linear(2, 2)})
    >>> look_like_copies(model, ["net.weight"], ["target.weight"])
    {'target.*': 'net.*'}

    Args:
        model: that has both.
        pruned: names of the weights that are pruned.
        left: names of the weights that could be pruned and are not.

    Returns:
        {pattern of the copies: pattern of the originals}, of the outermost submodules.
    """
    modules = dict(model.named_modules())
    shapes = {path: {n: p.shape for n, p in module.named_parameters()} for path, module in modules.items()}
    found: dict[str, str] = {}
    for copy in modules:
        if not copy or any(f"{copy}.".startswith(pattern[:-1]) for pattern in found):
            continue
        if not _holds(copy, left) or _holds(copy, pruned):
            continue
        for path in modules:
            alike = shapes[path] == shapes[copy] and _holds(path, pruned) and not _holds(path, left)
            if path and alike:
                found[f"{copy}.*"] = f"{path}.*"
                break
    return found


def _holds(path: str, names: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in names)
