"""What the tests of the life of a memory share."""

import pytest

from support.helpers import (
    FAMILIES,
    random_ids,
)

families = pytest.mark.parametrize("family", FAMILIES)
IDS = random_ids(20, seed=5)
