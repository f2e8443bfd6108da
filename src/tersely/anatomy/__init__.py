"""What a model is made of: families are told apart here, and nowhere else."""

from tersely.anatomy.families import FAMILIES, FUSED, OUTSIDE, READS, Family
from tersely.anatomy.groups import DEPTH, READING, depth_units, reading_units
from tersely.anatomy.nouns import Heads, Kept, Norm, Place, Site, Table, Unit
from tersely.anatomy.parts import Anatomy, anatomy_of, fused_rows, model_class, needs_first_token

__all__ = [
    "DEPTH",
    "FAMILIES",
    "FUSED",
    "OUTSIDE",
    "READING",
    "READS",
    "Anatomy",
    "Family",
    "Heads",
    "Kept",
    "Norm",
    "Place",
    "Site",
    "Table",
    "Unit",
    "anatomy_of",
    "depth_units",
    "fused_rows",
    "model_class",
    "needs_first_token",
    "reading_units",
]
