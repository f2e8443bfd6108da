"""What calibration can measure.  The keys of the table name statistics on disk."""

from tersely.stats.base import Statistic, Stats, keyed_by
from tersely.stats.channel import AbsMax, AbsMean, Power
from tersely.stats.cross import Cross
from tersely.stats.gradient import Fisher, OutputGram
from tersely.stats.gram import Gram

STATISTICS: dict[str, type[Statistic]] = {
    "abs_max": AbsMax,
    "abs_mean": AbsMean,
    "cross": Cross,
    "fisher": Fisher,
    "gram": Gram,
    "output_gram": OutputGram,
    "power": Power,
}

__all__ = [
    "STATISTICS",
    "AbsMax",
    "AbsMean",
    "Cross",
    "Fisher",
    "Gram",
    "OutputGram",
    "Power",
    "Statistic",
    "Stats",
    "keyed_by",
]
