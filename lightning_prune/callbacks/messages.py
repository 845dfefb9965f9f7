"""Messages: lines that are seen without setting logging up, and warnings that point at the user's line."""

import inspect
import logging
import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import final, override

_BETWEEN = {"lightning_prune", "lightning", "lightning_utilities", "torch", "contextlib", "functools"}
LOGGER = logging.getLogger("lightning_prune")


@final
class ShownWhereNothingElseIs(logging.Handler):
    """Write messages to the standard error stream while the root logger has no handler.

    As soon as a program sets logging up, its handlers get the messages and this one is silent. Of several
    processes only the first one writes.
    """

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or getattr(rank_zero_only, "rank", 0):
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # as handlers do: a closed stream ends no training
            self.handleError(record)


def show_messages() -> None:
    """Give the package's logger its handler, once, and let it pass what is informative."""
    if not any(isinstance(handler, ShownWhereNothingElseIs) for handler in LOGGER.handlers):
        LOGGER.addHandler(ShownWhereNothingElseIs())
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)


@rank_zero_only
def warn(message: str) -> None:
    """Warn, in the first of several processes, at the user's line that led here: that of `fit`, say."""
    warnings.warn(message, stacklevel=_level())


def _level() -> int:
    """How far up the first frame is that is neither ours nor of what calls us; of `warn` it is 1."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_back is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in _BETWEEN or module.startswith("lightning_prune.study"):
            return level
        frame, level = frame.f_back, level + 1
    return level
