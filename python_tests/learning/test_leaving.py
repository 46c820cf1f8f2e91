"""Who ends a run that several processes make: what one says is told from what all of them hear, however many they are."""

import pytest
import torch

from locas_ext.errors import LocasError
from locas_ext.learning.leaving import Leaving
from locas_ext.ops.ranks import Ranks


class Together(Ranks):
    """One of some processes that say the same; the others' flags are added by the test."""

    def add_up(self, y):
        pass


def heard_by(size, leaver, error):
    """What one process hears, as a mean in float32, when another one leaves."""
    other = Leaving(Together(None, leaver, size, torch.device("cpu")))
    other.leave(error)
    return other.ranks.agreed(other.flags.clone()).tolist()


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("error, raised", [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("full"), LocasError)])
def test_each_of_any_number_of_processes_ends_as_the_one_that_leaves_says(size, error, raised):
    for leaver in range(1, size):
        mine = Leaving(Together(None, 0, size, torch.device("cpu")))
        mine.hear(heard_by(size, leaver, error))
        with pytest.raises((KeyboardInterrupt, LocasError)) as ended:
            mine.between_chunks(lambda: None)
        assert ended.type is raised and (raised is KeyboardInterrupt or str(ended.value).startswith(f"rank {leaver} ended"))
