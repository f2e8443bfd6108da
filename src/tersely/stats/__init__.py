"""What calibration can measure.  The keys of the table name statistics on disk."""

from tersely.stats.base import Statistic, Stats, keyed_by
from tersely.stats.channel import AbsMax, AbsMean, Power
from tersely.stats.cross import Cross
from tersely.stats.gradient import Fisher, MeanGradient, OutputGram
from tersely.stats.gram import BucketGram, Gram
from tersely.stats.windows import WindowFactors

STATISTICS: dict[str, type[Statistic]] = {
    "abs_max": AbsMax,
    "abs_mean": AbsMean,
    "bucket_gram": BucketGram,
    "cross": Cross,
    "fisher": Fisher,
    "gram": Gram,
    "mean_gradient": MeanGradient,
    "output_gram": OutputGram,
    "power": Power,
    "window_factors": WindowFactors,
}

__all__ = [
    "STATISTICS",
    "AbsMax",
    "AbsMean",
    "BucketGram",
    "Cross",
    "Fisher",
    "Gram",
    "MeanGradient",
    "OutputGram",
    "Power",
    "Statistic",
    "Stats",
    "WindowFactors",
    "keyed_by",
]
