"""What the quantizing methods share: code widths, their bytes, and what can be wrong with a request."""

from typing import Any

from tersely.errors import RecipeError, unknown
from tersely.kinds.quantized import quantized_bytes
from tersely.linalg.grid import FORMS, Form
from tersely.linalg.packing import WIDEST
from tersely.option import Option

WIDTHS = (2, 3, 4, 8)
"""Bits of a code that a method offers where none were asked for.  Any other width is to be had by naming it."""


def check_grid(method: str, group: int, form: Form, width: int | None) -> None:
    """Raises RecipeError for a grid that does not exist."""
    if group < 0:
        raise RecipeError(f"{method}: group {group}; wanted 0 for whole rows, or the columns that share a scale")
    if form not in FORMS:
        raise RecipeError(f"{method}: {unknown('grid', str(form), FORMS)}")
    if width is not None and width not in _possible(form):
        raise RecipeError(f"{method}: width {width} on the {form} grid; wanted {_words(form)}")


def width_sizes(shape: tuple[int, int], group: int, form: Form, width: int | None) -> list[Option]:
    """Nothing at all, then every offered width, with the bytes of codes, scales and zero points."""
    widths = WIDTHS if width is None else (width,)
    zeros = form == "asymmetric"
    return [Option(0, 0, None), *(Option(w, quantized_bytes(shape, w, group, zeros=zeros), None) for w in widths)]


def width_of(amount: Any, form: Form, width: int | None) -> int:
    """The bits that an amount asks for.  Raises RecipeError for bits that these settings do not allow."""
    if amount not in (_possible(form) if width is None else (width,)):
        wanted = _words(form) if width is None else f"{width}, the width of this step"
        raise RecipeError(f"{amount} bits on the {form} grid; wanted {wanted}")
    return int(amount)


def _possible(form: Form) -> range:
    """A symmetric grid of 1 bit would have zero and one other level."""
    return range(1 if form == "asymmetric" else 2, WIDEST + 1)


def _words(form: Form) -> str:
    return f"{_possible(form)[0]} to {WIDEST}"
