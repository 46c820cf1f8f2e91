"""Who ends a run that several processes make of one text: each says so beside what they add up in every step anyway.

rank 0   step k: nothing  |            | step k + 1: nothing      |--> both end here, with the same memory
rank 1   step k: nothing  | Ctrl-C     | step k + 1: it leaves    |
"""

from collections.abc import Callable

import torch

from locas_ext.errors import LocasError
from locas_ext.ops.ranks import Ranks

_PRESSED, _FAILED = 1, 2  # what a rank says that leaves: by Ctrl-C, with an error


class Leaving:
    """Attributes:
    flags: [n] float32, what this rank says: 0 in the places of the others; a CUDA graph reads it where it lies
    ending: what this rank ends with once it has said so
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        with torch.inference_mode(False):  # what is made there cannot be written elsewhere
            self.flags = torch.zeros(ranks.size, dtype=torch.float32, device=ranks.device)
        self.ending: BaseException | None = None
        self._heard: list[float] | None = None  # since the latest `between_chunks`

    def leave(self, error: BaseException) -> None:
        """This rank ends with an error when it has said so. Nothing waits."""
        self.ending = error
        self.flags[self.ranks.rank] = _PRESSED if isinstance(error, KeyboardInterrupt) else _FAILED

    def hear(self, said: list[float]) -> None:
        """Takes in what the step's sum holds of all ranks' flags."""
        self._heard = said

    def between_chunks(self, check_interrupt: Callable[[], None]) -> None:
        """Ends the run on all ranks where one has said that it leaves; asks them where no step has said it.

        KeyboardInterrupt on all for Ctrl-C on one; LocasError on those that go on, which names who failed.
        """
        if self.ending is None:
            try:
                check_interrupt()
            except KeyboardInterrupt as pressed:
                self.leave(pressed)
        heard, self._heard = self._heard, None
        if heard is None:
            heard = self.ranks.agreed(self.flags.clone()).tolist()
        if not any(heard):
            return
        if self.ending is not None:
            raise self.ending
        said = [round(flag * self.ranks.size) for flag in heard]  # which came as means
        if _FAILED in said:
            raise LocasError(f"rank {said.index(_FAILED)} ended the run here with an error; the memory is as it was there")
        raise KeyboardInterrupt
