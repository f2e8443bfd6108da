"""The relaxations, by their names in recipes."""

from tersely.train.relax.adapter import Adapter
from tersely.train.relax.base import GROUPS, Relaxation, Relaxed
from tersely.train.relax.full import Full
from tersely.train.relax.kasa import KnowledgeAdapter
from tersely.train.relax.noise import PseudoNoise
from tersely.train.relax.rounding import Rounding

RELAXATIONS: dict[str, type[Relaxation]] = {
    "adapter": Adapter,
    "full": Full,
    "kasa": KnowledgeAdapter,
    "nipq": PseudoNoise,
    "rounding": Rounding,
}

__all__ = ["GROUPS", "RELAXATIONS", "Relaxation", "Relaxed"]
