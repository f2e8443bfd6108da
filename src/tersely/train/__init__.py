"""Training: the one loop, what it minimises, and weights that pretend to be something else meanwhile."""

from tersely.train.loop import Measured, TrainingOutcome, train
from tersely.train.objectives import OBJECTIVES, Objective
from tersely.train.relax import RELAXATIONS, Relaxation, Relaxed
from tersely.train.settings import Training
from tersely.train.standing import harden, relax_sites

__all__ = [
    "OBJECTIVES",
    "RELAXATIONS",
    "Measured",
    "Objective",
    "Relaxation",
    "Relaxed",
    "Training",
    "TrainingOutcome",
    "harden",
    "relax_sites",
    "train",
]
