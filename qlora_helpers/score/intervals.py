"""How sure a mean or a difference is: intervals and an exact test."""

import collections
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def exact_interval(right: int, n: int, confidence=0.95) -> Interval:
    """The share of right answers among n, and its exact (Clopper-Pearson) interval.

    Raises ValueError unless 0 <= right <= n, for n = 0, and unless `confidence` lies
    between 0 and 1. Source: Clopper and Pearson 1934.
    """
    found = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
    return Interval(right / n, float(found.low), float(found.high))


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
    if len(set(change)) == 1:
        low = high = mean
        if np.isin([before, after], [0, 1]).all():  # verdicts
            unseen = 1 - ((1 - confidence) / 2) ** (1 / change.size)
            reach = unseen * (1 + abs(mean))  # a pair can differ by 1 from 0, 2 from 1
            low, high = max(-1.0, mean - reach), min(1.0, mean + reach)
    return Interval(mean, low, high)


class PairedTest(NamedTuple):
    """Answers lost and gained, and the probability of so uneven a split by chance."""

    lost: int
    gained: int
    p: float


def paired_test(before, after, families=None) -> PairedTest:
    """Compare right-or-wrong verdicts on the same questions: the exact McNemar test.

    before, after: 0 or 1 for each question, as numbers or as text ("0110"). `p` is
    two-sided: if a lost answer and a gained one were equally likely, a split at least
    as uneven as this one would have this probability. Source: McNemar 1947; the exact
    form is a binomial test of the pairs that differ.
    The test takes the questions as independent. Where they come in families, give the
    family of each: then a family counts once, as lost if it loses more than it gains.
    Raises ValueError for verdicts that are not 0 or 1, or not in pairs.
    """
    before, after = [[*map(float, verdicts)] for verdicts in (before, after)]
    if len(before) != len(after) or not set(before + after) <= {0, 1}:
        raise ValueError(
            f"got {len(before)} and {len(after)} verdicts, with the values "
            f"{sorted(set(before + after))}: give 0 or 1 for each of the same questions"
        )
    pairs = [*zip(before, after, strict=True)]
    net = collections.Counter()
    names = range(len(pairs)) if families is None else families
    for family, (was, now) in zip(names, pairs, strict=True):
        net[family] += int(now - was)
    lost, gained = (sum(sign * n > 0 for n in net.values()) for sign in (-1, 1))
    if lost == gained:  # scipy refuses a test of no pair at all
        return PairedTest(lost, gained, 1.0)
    p = stats.binomtest(lost, lost + gained).pvalue
    return PairedTest(lost, gained, float(p))
