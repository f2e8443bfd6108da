"""What a model is made of: families are told apart here, and nowhere else."""

from tersely.anatomy.families import FAMILIES, FUSED, READS, Family
from tersely.anatomy.groups import DEPTH, READING, depth_units, reading_units
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
    "DEPTH",
    "FAMILIES",
    "FUSED",
    "READING",
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
    "depth_units",
    "fused_rows",
    "model_class",
    "needs_first_token",
    "reading_units",
]
