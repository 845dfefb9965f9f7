"""Messages: a line for each pruning that one sees in a script or a notebook without setting logging up."""

import logging
import sys

from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import final, override

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
