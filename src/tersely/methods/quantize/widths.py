"""What the quantizing methods share: code widths, their bytes, and what can be wrong with a request."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from tersely.errors import RecipeError, unknown
from tersely.kinds.quantized import Zeros, quantized_bytes
from tersely.linalg.grid import FORMS, Form, ScaleFormat
from tersely.linalg.packing import WIDEST
from tersely.option import Option

WIDTHS = (2, 3, 4, 8)
"""Bits of a code that a method offers where none were asked for.  Any other width is to be had by naming it."""

StoredScale = Literal["float16", "log8"]
"""How a method stores scales: in 16 bits, or in a byte (`linalg.grid`)."""


def check_group(method: str, group: int) -> None:
    """Raises RecipeError for fewer than no columns."""
    if group < 0:
        raise RecipeError(f"{method}: group {group}; wanted 0 for whole rows, or the columns that share a scale")


def check_scale(method: str, scale: str) -> None:
    """Raises RecipeError for a format that is not offered."""
    if scale not in get_args(StoredScale):
        raise RecipeError(f"{method}: {unknown('scale', str(scale), get_args(StoredScale))}")


def check_grid(method: str, group: int, form: Form, width: int | None) -> None:
    """Raises RecipeError for a grid that does not exist."""
    check_group(method, group)
    if form not in FORMS:
        raise RecipeError(f"{method}: {unknown('grid', str(form), FORMS)}")
    if width is not None and width not in _possible(form):
        raise RecipeError(f"{method}: width {width} on the {form} grid; wanted {_words(form)}")


def width_sizes(
    shape: tuple[int, int], group: int, form: Form, width: int | None, scale: StoredScale = "float16"
) -> list[Option]:
    """Nothing at all, then every offered width, with the bytes of codes, scales and zero points."""
    return sizes_of(shape, group, WIDTHS if width is None else (width,), zeros=form == "asymmetric", scale=scale)


def sizes_of(
    shape: tuple[int, int],
    group: int,
    widths: Sequence[int],
    *,
    zeros: Zeros,
    scale: ScaleFormat = "float16",
    columns: bool = False,
) -> list[Option]:
    """Nothing at all, then every width, with the bytes of everything that is stored."""
    made = ((w, quantized_bytes(shape, w, group, zeros=zeros, scale=scale, columns=columns)) for w in widths)
    return [Option(0, 0, None), *(Option(width, nbytes, None) for width, nbytes in made)]


def width_of(amount: Any, form: Form, width: int | None) -> int:
    """The bits that an amount asks for.  Raises RecipeError for bits that these settings do not allow."""
    if amount not in (_possible(form) if width is None else (width,)):
        wanted = _words(form) if width is None else f"{width}, the width of this step"
        raise RecipeError(f"{amount} bits on the {form} grid; wanted {wanted}")
    return int(amount)


def check_width(amount: Any, width: int, of: str) -> None:
    """Raises RecipeError for bits other than those of a table."""
    if amount != width:
        raise RecipeError(f"{amount} bits of {of}; wanted {width}, as it has {2**width} levels")


def _possible(form: Form) -> range:
    """A symmetric grid of 1 bit would have zero and one other level."""
    return range(1 if form == "asymmetric" else 2, WIDEST + 1)


def _words(form: Form) -> str:
    return f"{_possible(form)[0]} to {WIDEST}"
