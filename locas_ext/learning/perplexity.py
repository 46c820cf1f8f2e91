"""From a summed negative log-likelihood to a perplexity."""

import math


def perplexity(nll: float, tokens: int) -> float:
    """exp(nll / tokens), nll in nats; infinite where no float can hold it, NaN without tokens.

    >>> perplexity(6.0, 2), perplexity(1e6, 2), perplexity(0.0, 0)
    (20.085536923187668, inf, nan)
    """
    try:
        return math.exp(nll / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf
