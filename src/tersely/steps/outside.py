"""What a step does to the token embedding and the output head: targets, and what is refused before any work.

Both are outside of the blocks, where statistics, curves and refinement come from.  A head is a linear like others: it
takes every method on single linears, those that read inputs too, since what it reads is the final norm's output behind
the last block.  A table of embeddings is looked up by token numbers and has no input to be fitted to: it takes the
methods that read none and make plain integers.  With tied weights both are the one table.
"""

import torch

from tersely.anatomy import OUTSIDE, Anatomy, Site, Table
from tersely.checkpoint import Source
from tersely.errors import AnatomyError, RecipeError
from tersely.kinds import QuantizedLinear
from tersely.methods import METHODS, Method
from tersely.recipe import MethodStep
from tersely.stats import Stats, keyed_by
from tersely.tables import build_allocator
from tersely.targets import SiteTarget, TableTarget, Target

PROBED = 8
"""Rows of a table on which is tried what a method makes of it."""


def check_outside(step: MethodStep, method: object, anatomy: Anatomy, itemsize: int) -> None:
    """Raises AnatomyError or RecipeError where a step names something outside of the blocks that it cannot treat."""
    if OUTSIDE.isdisjoint(step.target):
        return
    chosen = [site for site in anatomy.select(step.target) if site in anatomy.outside]
    words = " and ".join(sorted(OUTSIDE.intersection(step.target)))
    said = f"step {step.name!r}, target {words}"
    if step.method not in METHODS:
        raise AnatomyError(
            f"{said}: {step.name} treats linears of the blocks together, and nothing outside of them; name it in a "
            "step of another method, such as rtn"
        )
    if step.base is not None:
        raise RecipeError(f"{said}: differences to a base are taken of the linears of the blocks; leave it out")
    allocator = build_allocator(step.allocate)
    if allocator.reads_model or step.perplexity is not None:
        asked = "a perplexity" if step.perplexity is not None else f"the allocator {step.allocate}"
        raise RecipeError(
            f"{said}: for {asked} the model is measured with single linears of the blocks cut; give it a step of its "
            "own, with keep or bits and the allocator uniform"
        )
    for site in chosen:
        if anatomy.table is not None and site == anatomy.table.site:
            _check_table(step, METHODS[step.method], method, anatomy.table, said, itemsize)
        else:
            _check_head(method, site, said)


def _check_table(step: MethodStep, kind: type[Method], method: object, table: Table, said: str, itemsize: int) -> None:
    assert isinstance(method, kind)
    what = f"{said}: {table.site.name} is a table that is looked up by token numbers"
    if table.head is not None:
        what += f" (and {table.head.name} is tied to it)"
    hint = "take a method that reads no inputs and rounds, such as rtn, hqq, sinq, nf4 or mxfp4, in a step of its own"
    if method.needs:
        names = ", ".join(one.__name__ for one in method.needs)
        raise RecipeError(f"{what}, and {step.name} reads statistics of inputs ({names}); {hint}")
    if step.refine is not None:
        raise RecipeError(f"{what}, and refinement trains blocks behind the table as it was; round it in a step before")
    width = table.site.in_features
    sizes = method.sizes((PROBED, width), itemsize)
    weight = torch.randn(PROBED, width, generator=torch.Generator().manual_seed(0))
    made = method.compress(weight, Stats(), sizes[-1].amount) if sizes else None
    if not isinstance(made, QuantizedLinear) or made.input_bits is not None:
        named = "nothing" if made is None else f"the kind {made.name!r}"
        raise RecipeError(f"{what}, and {step.name} makes {named} of it, whose rows cannot be looked up; {hint}")


def _check_head(method: object, site: Site, said: str) -> None:
    needs = getattr(method, "needs", ())
    foreign = [kind.__name__ for kind in needs if keyed_by(kind) != "input"]
    if foreign:
        raise RecipeError(
            f"{said}: {', '.join(foreign)} is gathered in the blocks alone; for {site.name} take a method that reads "
            "inputs, or none"
        )
    if needs and not site.reads:
        raise RecipeError(
            f"{said}: {site.name} reads what layers of its own make, which is not observed; take a method that reads "
            "no inputs, such as rtn"
        )


def outside_target(site: Site, method: Method, anatomy: Anatomy, source: Source) -> Target:
    """The target of a site outside of the blocks."""
    table = anatomy.table
    if table is None or site != table.site:
        return SiteTarget(site, method)
    with_bias = table.head is not None and table.head.bias and not source.is_outline
    bias = source.tensor(f"{table.head.name}.bias") if table.head is not None and with_bias else None
    return TableTarget(site, method, table=table, head_bias=bias)
