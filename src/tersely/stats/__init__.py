"""What calibration can measure.  The keys of the table name statistics on disk."""

from tersely.stats.base import Statistic, Stats, keyed_by, of_shift
from tersely.stats.channel import AbsMax, AbsMean, Power
from tersely.stats.cross import Cross
from tersely.stats.drift import Drift
from tersely.stats.gradient import DiagonalFisher, Fisher, MeanGradient, OutputGram
from tersely.stats.gram import BucketGram, Gram
from tersely.stats.peaks import Peaks
from tersely.stats.windows import WindowFactors

STATISTICS: dict[str, type[Statistic]] = {
    "abs_max": AbsMax,
    "abs_mean": AbsMean,
    "bucket_gram": BucketGram,
    "cross": Cross,
    "diagonal_fisher": DiagonalFisher,
    "drift": Drift,
    "fisher": Fisher,
    "gram": Gram,
    "mean_gradient": MeanGradient,
    "output_gram": OutputGram,
    "peaks": Peaks,
    "power": Power,
    "window_factors": WindowFactors,
}

__all__ = [
    "STATISTICS",
    "AbsMax",
    "AbsMean",
    "BucketGram",
    "Cross",
    "DiagonalFisher",
    "Drift",
    "Fisher",
    "Gram",
    "MeanGradient",
    "OutputGram",
    "Peaks",
    "Power",
    "Statistic",
    "Stats",
    "WindowFactors",
    "keyed_by",
    "of_shift",
]
