"""95 % confidence intervals: of a share of examples, and of a mean or a ratio of sums over examples."""

import math

CONFIDENCE = 0.95
_NORMAL = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Interval of a share, which stays within 0 .. 1 and has a width even where all or none succeeded.

    Args:
        successes: How many of the examples succeeded.
        n: Number of examples, at least 1.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    z, share = _NORMAL, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula is exact and only rounding leaves them.
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    return low, 1.0 if successes == n else min(centre + half, 1.0)


def student(value: float, standard_error: float, n: int) -> tuple[float, float]:
    """Interval of a mean, by Student's distribution of ``n - 1`` degrees of freedom.

    Args:
        value: The mean.
        standard_error: Its standard error, from the variance with ``n - 1`` in the denominator.
        n: Number of examples, at least 2.
    """
    half = t_quantile(n - 1) * standard_error
    return value - half, value + half


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, to a thousandth of itself.

    Source: closed forms for 1 and 2 degrees of freedom, else the expansion about the normal quantile of
    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    p = 0.5 + CONFIDENCE / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
