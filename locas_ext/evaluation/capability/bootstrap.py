"""The bootstrap: how sure a figure is that was measured on a sample (Efron 1979; percentile intervals)."""

import numpy as np

_BLOCK = 1 << 22  # numbers drawn at once


def resampled_sums(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Column sums of resamples: n units drawn with replacement, each with its whole row, so that what is compared stays
    paired.

    values: [n, k], a row per unit (a window, a question), a column per quantity

    Returns [resamples, k] float64; the same for the same seed. Raises ValueError for fewer than 2 units, of which no
    spread can be told, and for resamples < 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"values has shape {list(values.shape)}; expected [n, k] with at least 2 units")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected a number >= 1")
    n = len(values)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, values.shape[1]))
    block = max(1, _BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        # How often each unit was drawn says as much as the draws, and makes the sums one product.
        times = generator.multinomial(n, np.full(n, 1 / n), size=size)
        sums[start : start + size] = times @ values
    return sums


def interval(statistics: np.ndarray, confidence: float = 0.95) -> list[float]:
    """[low, high] between which the middle `confidence` of a statistic's resamples lies.

    statistics: [resamples]
    """
    tail = (1 - confidence) / 2
    return [float(bound) for bound in np.quantile(statistics, [tail, 1 - tail])]
