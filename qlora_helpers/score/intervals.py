"""How sure a mean is: intervals over the same questions."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values, confidence=0.95) -> Interval:
    """The mean of some values and its percentile bootstrap interval.

    Where every value is 0, or every one 1, resampling would claim certainty: the
    interval then ends at the exact (Clopper-Pearson) bound. Source: Efron 1979.
    Raises ValueError for no values, for one that is not a number, and unless
    `confidence` lies between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence!r}: give a share between 0 and 1, such as 0.95"
        )
    values = np.asarray(values, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers, at least one, got {values}")
    mean, tail = float(values.mean()), (1 - confidence) / 2
    unseen = 1 - tail ** (1 / values.size)  # as likely as this, and yet never seen
    if (values == 0).all():
        return Interval(mean, 0.0, unseen)
    if (values == 1).all():
        return Interval(mean, 1 - unseen, 1.0)
    # scipy.stats.bootstrap refuses a single value, which a text of one block gives.
    rng = np.random.default_rng(0)
    chosen = rng.integers(values.size, size=(RESAMPLES, values.size))
    low, high = np.quantile(values[chosen].mean(axis=1), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def paired_interval(before, after, confidence=0.95) -> Interval:
    """The mean of after - before, question by question, and its interval.

    It is narrower than two separate intervals, since both saw the same questions. Where
    no right-or-wrong verdict differs, the ends say how much could have gone unseen.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"expected pairs, got shapes {before.shape}, {after.shape}")
    change = after - before
    mean, low, high = bootstrap_interval(change, confidence)
    if np.isin([before, after], [0, 1]).all() and len(set(change)) == 1:
        unseen = 1 - ((1 - confidence) / 2) ** (1 / change.size)
        reach = unseen * (1 + abs(mean))  # a pair can differ by one from 0, two from 1
        low, high = max(-1.0, mean - reach), min(1.0, mean + reach)
    return Interval(mean, low, high)
