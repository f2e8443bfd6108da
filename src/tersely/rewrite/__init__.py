"""The rewrites, by their names in recipes: the same function, with friendlier numbers in it."""

from tersely.rewrite.base import Rewrite
from tersely.rewrite.merge_adapter import MergeAdapter
from tersely.rewrite.pre_sinq import FoldedSinkhorn
from tersely.rewrite.rotate import Rotate
from tersely.rewrite.smooth import Smooth

REWRITES: dict[str, type[Rewrite]] = {
    "merge_adapter": MergeAdapter,
    "pre_sinq": FoldedSinkhorn,
    "rotate": Rotate,
    "smooth": Smooth,
}

__all__ = ["REWRITES", "Rewrite", "Rotate", "Smooth"]
