"""Arguments of a kind, such as numbers: an error says what was given, what is allowed, and what to do."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path, PurePath

from torch import Tensor

# Of what an argument may be given.
_ROOMS = {"allocate": "allocation", "granularity": "granularity", "policy": "rewind"}


def whole(name: str, value: object, lowest: int, such_as: int | None = None) -> None:
    """Make sure that a value is a whole number, not below the lowest.

    >>> whole("rounds", 2.5, 0)
    Traceback (most recent call last):
    ValueError: rounds=2.5: allowed are whole numbers from 0 on, such as 1.

    Raises:
        ValueError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        example = lowest + 1 if such_as is None else such_as
        raise ValueError(f"{name}={value!r}: allowed are whole numbers from {lowest} on, such as {example}.")


def number(name: str, value: object, allowed: str, within: Callable[[float], bool]) -> None:
    """Make sure that a value is a number within bounds.

    >>> number("rate", "some", "are fractions, such as 0.2", lambda rate: 0 < rate < 1)
    Traceback (most recent call last):
    ValueError: rate='some': allowed are fractions, such as 0.2.

    Args:
        name: of the argument.
        value: given.
        allowed: which numbers are, with an example.
        within: whether a number is one of them.

    Raises:
        ValueError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not within(float(value)):
        raise ValueError(f"{name}={value!r}: allowed {allowed}.")


def yes_or_no(name: str, value: object) -> None:
    """Make sure that a value is True or False.

    >>> yes_or_no("verify", "no")
    Traceback (most recent call last):
    ValueError: verify='no': allowed are True and False. Give one of them.

    Raises:
        ValueError: when it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: allowed are True and False. Give one of them.")


def by_name(name: str, value: object, example: str) -> None:
    """Make sure that a value is a mapping whose keys are text, or None.

    >>> by_name("follow", "net.*", "{'target.*': 'net.*'}")
    Traceback (most recent call last):
    ValueError: follow='net.*': allowed are dicts whose keys are text. Give one, such as ...

    Raises:
        ValueError: when it is none.
    """
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ValueError(
            f"{name}={value!r}: allowed are dicts whose keys are text. Give one, such as {example}."
        )


def check_callable(name: str, given: object, takes: int) -> None:
    """Refuse an argument that is no function, or a class where one of its instances is meant.

    >>> check_callable("criterion", lambda: 0, 1)
    Traceback (most recent call last):
    ValueError: criterion: its signature is (), and it is called with 1 positional argument; allowed are ...

    Args:
        name: of the argument.
        given: to be a function.
        takes: how many positional arguments it is called with.

    Raises:
        ValueError: then, and when its signature does not take as many positional arguments.
    """
    if isinstance(given, type):
        raise ValueError(
            f"{name}={given.__name__}: a class is given; allowed are its instances. Give {_instance(given)}."
        )
    if not callable(given):
        raise ValueError(
            f"{name}={given!r}: allowed are functions, such as those of "
            f"lightning_prune.{_ROOMS.get(name, 'criteria')}. Give one; "
            "from a Hydra config with `_target_: hydra.utils.get_method`."
        )
    check_takes(name, given, takes)


def _instance(kind: type) -> str:
    """How an instance of a class is made, with the arguments that it must have.

    >>> from lightning_prune import filters, schedules
    >>> _instance(filters.Smaller), _instance(schedules.Geometric)
    ('Smaller(bytes)', 'Geometric()')
    """
    try:
        parameters = inspect.signature(kind).parameters.values()
    except ValueError:  # as of some builtins
        return f"{kind.__name__}()"
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return f"{kind.__name__}({', '.join(needed)})"


def check_takes(name: str, function: Callable[..., object], takes: int) -> None:
    """Refuse a function whose signature does not take so many positional arguments.

    Raises:
        ValueError: then.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # as of some builtins
        return
    try:
        signature.bind_partial(*range(takes))
    except TypeError as error:
        raise ValueError(
            f"{name}: its signature is {signature}, and it is called with {takes} positional "
            f"argument{'s' * (takes > 1)}; allowed are functions that take as many. Change it."
        ) from error


def check_path(name: str, value: object) -> None:
    """Make sure that a value is the path of a file that may be written, as far as can be known now.

    What is on the disk is looked at where the path is absolute.

    >>> check_path("save_sparse", "/")
    Traceback (most recent call last):
    ValueError: save_sparse='/': that is a folder; allowed are paths of files. Name a file in it.

    Raises:
        ValueError: when it is no path, or is a folder, or a file stands where a folder of it would.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"{name}={value!r}: allowed are paths of files, such as 'pruned.safetensors'.")
    path = Path(value)
    if not path.is_absolute():  # relative to a folder that is not known here
        return
    if path.is_dir():
        raise ValueError(
            f"{name}={str(value)!r}: that is a folder; allowed are paths of files. Name a file in it."
        )
    if wrong := next(
        (str(folder) for folder in path.parents if folder.exists() and not folder.is_dir()), None
    ):
        raise ValueError(
            f"{name}={str(value)!r}: {wrong} is a file, and a folder is needed. Choose another path."
        )


def named(value: object) -> str:
    """What a value is called, the same in every process: no address in memory is part of it.

    >>> from lightning_prune import allocation, rewind
    >>> named(rewind.weights), named(functools.partial(pow, exp=2)), named(allocation.AtLeast(1))
    ('weights', 'pow(exp=2)', 'AtLeast(n=1, of=global_rank)')
    """
    if isinstance(value, functools.partial):
        given = [*map(named, value.args), *(f"{key}={named(v)}" for key, v in value.keywords.items())]
        return f"{named(value.func)}({', '.join(given)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f"{field.name}={named(getattr(value, field.name))}" for field in dataclasses.fields(value)]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, PurePath):
        return repr(str(value))
    if isinstance(value, Mapping):
        if any(isinstance(v, Tensor) for v in value.values()):
            return f"a mapping of {', '.join(map(str, value))}"
        return f"{{{', '.join(f'{key!r}: {named(v)}' for key, v in value.items())}}}"
    if (name := getattr(value, "__qualname__", None)) is not None:
        return name
    return type(value).__qualname__ if " at 0x" in repr(value) else repr(value)


def check_alike(of_processes: Sequence[Mapping[str, str]]) -> None:
    """Make sure that several processes were given the same.

    >>> check_alike([{"sparsity": "0.5"}, {"sparsity": "0.6"}])
    Traceback (most recent call last):
    ValueError: sparsity: process 1 has 0.6, and process 0 has 0.5; allowed is the same on all. Give all ...

    Args:
        of_processes: what each of them was given, in words, by name.

    Raises:
        ValueError: naming what differs.
    """
    first, *others = of_processes
    for rank, theirs in enumerate(others, 1):
        if wrong := [name for name in first if theirs.get(name) != first[name]]:
            shown = "; ".join(
                f"{n}: process {rank} has {theirs.get(n)}, and process 0 has {first[n]}" for n in wrong
            )
            raise ValueError(f"{shown}; allowed is the same on all. Give all processes the same.")
