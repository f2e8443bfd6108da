"""What a model is made of: families are told apart here, and nowhere else."""

from tersely.anatomy.families import FAMILIES, FUSED, READS, Family
from tersely.anatomy.parts import (
    Anatomy,
    Heads,
    Kept,
    Norm,
    Place,
    Site,
    Unit,
    anatomy_of,
    fused_rows,
    model_class,
    needs_first_token,
)

__all__ = [
    "FAMILIES",
    "FUSED",
    "READS",
    "Anatomy",
    "Family",
    "Heads",
    "Kept",
    "Norm",
    "Place",
    "Site",
    "Unit",
    "anatomy_of",
    "fused_rows",
    "model_class",
    "needs_first_token",
]
