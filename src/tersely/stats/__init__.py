"""What calibration can measure.  The keys of the table name statistics on disk."""

from tersely.stats.base import Statistic, Stats
from tersely.stats.channel import AbsMax, AbsMean, Power
from tersely.stats.cross import Cross
from tersely.stats.gram import Gram

STATISTICS: dict[str, type[Statistic]] = {
    "abs_max": AbsMax,
    "abs_mean": AbsMean,
    "cross": Cross,
    "gram": Gram,
    "power": Power,
}

__all__ = ["STATISTICS", "AbsMax", "AbsMean", "Cross", "Gram", "Power", "Statistic", "Stats"]
