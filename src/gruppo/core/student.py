"""Student's t distribution for whole degrees of freedom: the width of an interval around a mean of few numbers."""

from __future__ import annotations

import math
from functools import lru_cache

from gruppo.types import GruppoError


def student_cdf(t: float, df: int) -> float:
    """P(T <= t), by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    cos2, term = math.cos(angle) ** 2, 1.0
    if df % 2:  # 2/pi (angle + sin cos (1 + 2/3 cos^2 + 2*4/(3*5) cos^4 + ...)), (df - 1) / 2 terms
        total = 0.0
        for k in range((df - 1) // 2):
            total += term
            term *= cos2 * (2 * k + 2) / (2 * k + 3)
        inside = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    else:  # sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...), df / 2 terms
        total = 0.0
        for k in range(df // 2):
            total += term
            term *= cos2 * (2 * k + 1) / (2 * k + 2)
        inside = math.sin(angle) * total
    return 0.5 + 0.5 * inside


@lru_cache(maxsize=4096)
def student_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, by bisection; df at least 1."""
    if not (0 < p < 1 and df >= 1):
        raise GruppoError(f"Student's t has no quantile {p} with {df} degrees of freedom")
    low, high = -math.pi / 2, math.pi / 2  # of the angle, which stays bounded where t does not
    for _ in range(60):
        middle = (low + high) / 2
        if student_cdf(math.sqrt(df) * math.tan(middle), df) < p:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan((low + high) / 2)
