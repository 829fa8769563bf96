"""How far chance moves a metric: 95 % intervals."""

import math


def wilson(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many images (Wilson 1927)."""
    z = 1.96
    centre, spread = share + z * z / (2 * images), z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    ends = (centre - spread) / (1 + z * z / images), (centre + spread) / (1 + z * z / images)
    return max(0.0, ends[0]), min(1.0, ends[1])  # but for rounding they are within


def exact_interval(hits: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share, of `hits` in a `number` (Clopper and Pearson 1934); 0 to 1 of none."""

    def at_most(most: int, share: float) -> float:
        """The probability of so many hits or fewer."""
        yes, no, ways = math.log(share), math.log1p(-share), math.lgamma(number + 1)
        logs = (ways - math.lgamma(i + 1) - math.lgamma(number - i + 1) + i * yes + (number - i) * no for i in range(most + 1))
        return math.fsum(map(math.exp, logs))

    def solve(most: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(most, middle) > wanted else (low, middle)
        return low

    return solve(hits - 1, 0.975) if hits else 0.0, solve(hits, 0.025) if hits < number else 1.0
