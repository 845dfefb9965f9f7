"""Controls: a finished ticket's masks again, on other weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.masks import Scores


@dataclass(frozen=True)
class Replay:
    """How many prunings each weight survived in the ticket's run: a criterion that prunes in its order.

    With the ticket's schedule and allocation each round gets exactly the ticket's masks of that round,
    because the weights it is to lose are those of the lowest score.

    Args:
        survived: the file `survived.pt` in the folder of the ticket's run.

    Reference: the re-initialised control of Frankle & Carbin (2019), arXiv:1803.03635.
    """

    survived: str

    def __call__(self, params: dict[str, Tensor]) -> Scores:
        if not Path(self.survived).is_file():
            raise FileNotFoundError(
                f"survived={self.survived}: there is no such file. A control needs the ticket's finished "
                "run: start the same command with kind=ticket first."
            )
        rounds = torch.load(self.survived, weights_only=True)
        return {name: rounds[name].to(w) for name, w in params.items()}
