"""Pseudo-quantization noise: widths and clipping bounds that are learned by gradient descent (NIPQ).

Rounding has no gradient.  Training through it as if it were the identity (straight-through) lets weights near a
threshold flip between two levels for ever.  Noise of the size of a rounding error teaches the same robustness without
a threshold, and since its size depends on the width, the width gets a gradient.  For a tensor x, a bound α and b bits,

    target    q(x) = round(clip(x / α, ±1) · n) · Δ        n = 2^(b-1) - 1,   Δ = α / n
    noise     x + ε Δ  for |x| < α,  else ±α               ε uniform in ±½, drawn anew in every forward pass

    ∂/∂x = 1,  ∂/∂α = ε / n,  ∂/∂b = -ε α ln2 · 2^(b-1) / n²   inside;      0, ±1, 0   beyond

and the target has the same gradients with its true error in place of ε.  Learned are α = u softplus(a) and
b = min_bits + (max_bits - min_bits) σ(r), u being the largest |x| at the start.  While the noise is on, every forward
pass computes with round(b + U(±½)) bits: whole, and b on average.  The budget prices |average bits - asked|.

Two phases.  In the last share `finetune` of the training the noise is off, the widths are whole and fixed, and weights
and bounds train through the rounding.  `advance` tells a module how far the training is.

From the first price on, every module holds the whole width that hardening would give it.  These are the learned
widths, rounded, and then made to fit: while too many bits are stored, the module that rounding raised most goes down by
one; then the one that it lowered most goes up, as long as one fits.  So the average that was asked for is never
exceeded, and missed by less than the smallest step there is.  Scales count: it is the average of the stored file.

Differs from the paper: a bound per output row of a weight; widths from 2 to 8 (their 2 to 14), which is what can be
packed, with 16-bit scales; the unit u, by which a step of the optimizer is a share of α whatever its size; the inverse
softplus at the start, without which α begins at 0.72 for any small weight; widths begin at the average that is asked
for, not at 8, which after a short training is better by far; the price is that of the expected width and per weight,
not of the drawn width and of the whole model; and the fit.  All inputs are signed.

Source: Shin et al., NIPQ: Noise Proxy-Based Integrated Pseudo-Quantization, 2022 (arXiv 2206.00820).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import DenseLinear
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.linalg.grid import Grid, Scales
from tersely.stats import AbsMax, Statistic, Stats
from tersely.train.relax.adapter import master
from tersely.train.relax.base import Relaxed

WIDTHS = range(2, 9)  # at 1 bit n is 0; more than 8 cannot be packed
NEAR = 0.05  # bits: nearer to the target than that, the price is a parabola and no longer pulls with full strength
BOUND_BITS = 32  # what `quantized` stores for the bound of an input
EDGE = 1e-3  # of the range of widths: how near to its ends one may begin; at the very ends it would never move


@dataclass(frozen=True)
class PseudoNoise:
    activations: bool = True
    """Round inputs too, each to a grid that is the same for all tokens, with a learned bound and width."""

    activation_bits: float | None = None
    """Average bits of the inputs, every channel counted once; None: what is asked of the weights, where that is a
    width."""

    min_bits: int = 2
    """The least width."""

    max_bits: int = 8
    """The largest width."""

    start: float | None = None
    """Width at which everything begins; None: the average that is asked for, from the first step on."""

    price: float = 1.0
    """Loss for every bit by which the average misses what was asked."""

    finetune: float = 0.25
    """Share of the training, at its end, in which the noise is off and the widths are fixed."""

    paper: ClassVar[str] = (
        "Shin et al., 2022, NIPQ: Noise Proxy-Based Integrated Pseudo-Quantization (arXiv 2206.00820)"
    )
    summary: ClassVar[str] = "rounding imitated by noise, with learned bit widths and clipping (NIPQ)"

    def __post_init__(self) -> None:
        low, high = self.min_bits, self.max_bits
        if low not in WIDTHS or high not in WIDTHS or low > high:
            raise RecipeError(f"nipq: widths from {low} to {high}; wanted a range within 2 to {WIDTHS[-1]}")
        for name in ("start", "activation_bits"):
            width = getattr(self, name)
            if width is not None and not low <= width <= high:
                raise RecipeError(f"nipq: {name} = {width}; wanted a width from {low} to {high}")
        if self.activation_bits is not None and not self.activations:
            raise RecipeError("nipq: activation_bits without activations; leave one of the two away")
        if not 0 < self.price < math.inf:
            raise RecipeError(f"nipq: price = {self.price}; wanted above 0")
        if not 0 <= self.finetune < 1:
            raise RecipeError(f"nipq: finetune = {self.finetune}; wanted 0 or more, below 1")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (AbsMax,) if self.activations else ()

    @property
    def leaves(self) -> tuple[str, ...] | None:
        return ()

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        if kinds:
            raise RecipeError(
                f"nipq: of the targets {len(kinds)} are compressed already, and such a one has no weight of its own "
                "that could be rounded; name others"
            )
        self._check_asked(bits)
        if bits is None:
            return
        count = sum(rows * columns for rows, columns in shapes)
        stored = sum(8 * quantized_bytes(shape, self.min_bits, 0, zeros=False) for shape in shapes)
        least = (stored + self.activations * BOUND_BITS * len(shapes)) / count
        if least > bits:
            raise _too_few(bits, self.min_bits, least)

    def _check_asked(self, bits: float | None) -> None:
        if bits is None and self.min_bits < self.max_bits:
            raise RecipeError("nipq learns widths under a budget; say bits, the average that they have to reach")

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> "NoisyLinear":
        reach = None
        if self.activations:
            if not stats[AbsMax].tokens:
                raise NumericalError("nipq: the statistics of an input saw no token; calibrate with some text")
            reach = stats[AbsMax].mean().max()
        return NoisyLinear(linear, reach, self, generator)

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        """The price; and modules whose widths are not fixed yet are told the whole ones that hardening would give.

        Raises RecipeError for an average that the least widths exceed, and for none at all where widths can differ.
        """
        ours = [module for module in modules if isinstance(module, NoisyLinear)]
        self._check_asked(bits)
        if bits is None or not ours:
            return modules[0].bits().new_zeros(())
        sides = [(_Side.of_weights(ours), bits)]
        if self.activations:
            asked = self.activation_bits or min(max(bits, self.min_bits), self.max_bits)
            sides.append((_Side.of_inputs(ours), asked))
        learning = any(module.noisy for module in ours)
        for side, asked in sides:
            if self.start is None and not side.settled():
                side.begin(asked)
            if learning or not side.settled():
                side.fit(asked)
        price = self.price * torch.stack([side.price(asked) for side, asked in sides]).sum()
        return price if learning else price.detach()


def _too_few(asked: float, width: int, least: float) -> RecipeError:
    return RecipeError(f"nipq: bits = {asked}, but widths of {width} take {least:.3f} with their scales; ask for more")


class NoisyLinear(Relaxed):
    """A linear whose weight, and perhaps input, is blurred as rounding would, and in the end rounded."""

    def __init__(
        self, linear: nn.Module, reach: Float[Tensor, ""] | None, asked: PseudoNoise, generator: torch.Generator
    ) -> None:
        """reach: the largest |x| of the input, None to leave the input alone."""
        super().__init__()
        weight, bias = _plain(linear)
        like = master(linear)
        self._stored = weight.dtype
        self._generator = generator
        self._finetune = asked.finetune
        self.noisy = True
        self.weight = nn.Parameter(weight.detach().to(like, copy=True).contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(like, copy=True))
        self.of_weight = Quantizer(self.weight.detach().abs().amax(1), asked)
        self.of_input = None if reach is None else Quantizer(reach.to(like), asked)

    def advance(self, done: float) -> None:
        """`done`: the share of the training that is over, 0 to 1."""
        self.noisy = done < 1 - self._finetune

    def forward(self, x: Tensor) -> Tensor:
        if self.of_input is not None:
            x = self._rounded_input(x, self.of_input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self._rounded_weight().to(x.dtype), bias)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        quantizers = [self.of_weight, *([] if self.of_input is None else [self.of_input])]
        return {
            "weights": [self.weight, *([] if self.bias is None else [self.bias])],
            "quantizers": [parameter for quantizer in quantizers for parameter in quantizer.parameters()],
        }

    def bits(self) -> Tensor:
        """In the noise phase those of the learned width, which need not be whole."""
        if self.training and self.noisy:
            return interpolated(self.stored_bits, self.of_weight.width())
        return self.weight.new_tensor(float(self.stored_bits(self.of_weight.bits())))

    def stored_bits(self, width: int) -> int:
        """Bits of the weight, its scales and the bound of its input in a checkpoint."""
        rows, columns = self.weight.shape
        return 8 * quantized_bytes((rows, columns), width, 0, zeros=False) + (self.of_input is not None) * BOUND_BITS

    @torch.no_grad()
    def harden(self) -> QuantizedLinear:
        bits = self.of_weight.bits()
        scales = self._scales(bits)
        counts = steps(self.weight, self._bound(scales, bits), levels(bits)).round()
        codes = (counts + 2 ** (bits - 1)).to(torch.uint8)
        made = QuantizedLinear.from_codes(codes, Grid(bits, 0, scales, None), self._stored)
        if self.bias is not None:
            made.set_bias(self.bias)
        if self.of_input is not None:
            made.round_input(self.of_input.bits(), self.of_input.bound().item())
        return made

    def _rounded_weight(self) -> Float[Tensor, "out in"]:
        quantizer = self.of_weight
        if self.training and self.noisy:
            drawn = quantizer.drawn(self._generator)
            return with_noise(self.weight, quantizer.bound()[:, None], drawn, self._noise(self.weight))
        bits = quantizer.bits()
        bound = pretend(self._bound(self._scales(bits), bits), quantizer.bound()[:, None])
        return rounded(self.weight, bound, bits)

    def _rounded_input(self, x: Float[Tensor, "*batch in"], quantizer: "Quantizer") -> Float[Tensor, "*batch in"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.noisy:
            blurred = with_noise(wide, quantizer.bound(), quantizer.drawn(self._generator), self._noise(wide))
            return blurred.to(x.dtype)
        bound = quantizer.bound()
        return rounded(wide, pretend(bound.float(), bound), quantizer.bits()).to(x.dtype)

    def _noise(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=self._generator, device=self._generator.device).to(x) - 0.5

    @torch.no_grad()
    def _scales(self, bits: int) -> Scales:
        return Scales.of(self.of_weight.bound()[:, None] / levels(bits))

    def _bound(self, scales: Scales, bits: int) -> Float[Tensor, "out 1"]:
        """The bound that stored scales stand for: a little above the learned one, since they are rounded up."""
        return scales.values().to(self.weight) * levels(bits)


class Quantizer(nn.Module):
    """A learned width, and learned bounds of which each holds for a row, or one for everything."""

    def __init__(self, bound: Float[Tensor, "*rows"], asked: PseudoNoise) -> None:
        super().__init__()
        self.range = self._low, self._high = asked.min_bits, asked.max_bits
        largest = bound.max()
        silent = torch.where(largest > 0, largest, torch.ones_like(largest))  # a row of zeros has no size of its own
        self.register_buffer("unit", torch.where(bound > 0, bound, silent))
        self.register_buffer("whole", torch.zeros((), dtype=torch.int32, device=bound.device))
        self.raw_bound = nn.Parameter(torch.full_like(bound, inverse_softplus(1.0)))
        self.raw_width = nn.Parameter(bound.new_zeros(()))  # in the middle of the range
        if asked.start is not None:
            self.begin(asked.start)

    unit: Tensor
    whole: Tensor  # the width that was settled on; 0: none yet

    def bound(self) -> Float[Tensor, "*rows"]:
        return self.unit * functional.softplus(self.raw_bound)

    def width(self) -> Float[Tensor, ""]:
        """The learned width."""
        return self._low + (self._high - self._low) * torch.sigmoid(self.raw_width)

    def drawn(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """A whole width whose mean is the learned one; backwards as if it were that."""
        width = self.width()
        uniform = torch.rand((), generator=generator, device=generator.device).to(width) - 0.5
        return pretend((width + uniform).round().clamp(self._low, self._high), width)

    def bits(self) -> int:
        """The width that hardening gives."""
        return int(self.whole) or round(self.width().item())

    @torch.no_grad()
    def begin(self, width: float) -> None:
        """Make `width` the learned one, or the nearest to it from which it can still move."""
        if self._low < self._high:
            share = (width - self._low) / (self._high - self._low)
            share = min(max(share, EDGE), 1 - EDGE)
            self.raw_width.fill_(math.log(share / (1 - share)))


@dataclass(frozen=True)
class _Side:
    """All weights, or all inputs: what a budget counts together."""

    quantizers: Sequence[Quantizer]
    stored: Sequence[Callable[[int], int]]
    """Width → bits, of each."""
    count: int
    """Numbers that are stored."""

    @classmethod
    def of_weights(cls, modules: Sequence[NoisyLinear]) -> "_Side":
        stored = [module.stored_bits for module in modules]
        return cls([module.of_weight for module in modules], stored, sum(module.weight.numel() for module in modules))

    @classmethod
    def of_inputs(cls, modules: Sequence[NoisyLinear]) -> "_Side":
        """Per token, so that an input counts by its channels."""
        found = [(module.of_input, module.weight.shape[1]) for module in modules if module.of_input is not None]
        stored = [channels.__mul__ for _, channels in found]
        return cls([quantizer for quantizer, _ in found], stored, sum(channels for _, channels in found))

    def settled(self) -> bool:
        return all(int(quantizer.whole) for quantizer in self.quantizers)

    def price(self, asked: float) -> Float[Tensor, ""]:
        """|average - asked|, a parabola close to 0."""
        paired = zip(self.quantizers, self.stored, strict=True)
        total = torch.stack([interpolated(stored, quantizer.width()) for quantizer, stored in paired]).sum()
        average = total / self.count
        return functional.smooth_l1_loss(average, torch.full_like(average, asked), beta=NEAR)

    def begin(self, asked: float) -> None:
        """One width for all, with which the average is the asked one."""
        low, _ = self.quantizers[0].range
        least, more = (sum(stored(width) for stored in self.stored) for width in (low, low + 1))
        for quantizer in self.quantizers:
            quantizer.begin(low + (asked * self.count - least) / (more - least))

    @torch.no_grad()
    def fit(self, asked: float) -> None:
        """Tell the quantizers the whole widths of hardening."""
        low, high = self.quantizers[0].range
        least = sum(stored(low) for stored in self.stored) / self.count
        if least > asked:
            raise _too_few(asked, low, least)
        learned = [quantizer.width().item() for quantizer in self.quantizers]
        allowed = math.floor(asked * self.count + 1e-6)
        for quantizer, width in zip(
            self.quantizers, whole_widths(learned, self.stored, allowed, range(low, high + 1)), strict=True
        ):
            quantizer.whole.fill_(width)


def whole_widths(
    learned: Sequence[float], stored: Sequence[Callable[[int], int]], allowed: int, within: range
) -> list[int]:
    """Whole widths near the learned ones that store at most `allowed` bits, and of which none could be larger by one.

    The least widths must fit.  Among equals the first is changed.
    """
    widths = [min(max(round(width), within[0]), within[-1]) for width in learned]
    places = range(len(widths))
    spare = allowed - sum(stored[i](widths[i]) for i in places)
    while spare < 0:
        i = max((i for i in places if widths[i] > within[0]), key=lambda i: widths[i] - learned[i])
        spare += stored[i](widths[i]) - stored[i](widths[i] - 1)
        widths[i] -= 1
    while larger := [
        i for i in places if widths[i] < within[-1] and stored[i](widths[i] + 1) - stored[i](widths[i]) <= spare
    ]:
        i = max(larger, key=lambda i: learned[i] - widths[i])
        spare -= stored[i](widths[i] + 1) - stored[i](widths[i])
        widths[i] += 1
    return widths


def levels(bits: int | Tensor) -> int | Tensor:
    """n: levels above zero, and as many below."""
    return 2 ** (bits - 1) - 1


def with_noise(
    x: Float[Tensor, "*shape"], bound: Tensor, bits: Float[Tensor, ""], noise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """x + noise · Δ, and ±bound where x is not below it.  `noise` is that of one step, within ±½."""
    blurred = x + noise * (bound / levels(bits))
    return torch.where(x >= bound, bound, torch.where(x <= -bound, -bound, blurred))


def rounded(x: Float[Tensor, "*shape"], bound: Tensor, bits: int | Tensor) -> Float[Tensor, "*shape"]:
    """The nearest level; backwards as if rounding changed nothing."""
    count = levels(bits)
    real = steps(x, bound, count)
    return pretend(real.round(), real) * (bound / count)


def steps(x: Float[Tensor, "*shape"], bound: Tensor, count: int | Tensor) -> Float[Tensor, "*shape"]:
    """How many steps x lies from zero, in the order of operations of the kind `quantized`."""
    return (x / bound).clamp(-1, 1) * count


def pretend(value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, number for number, with the gradient of the other."""
    return value.detach() + (gradient - gradient.detach())


def interpolated(stored: Callable[[int], int], width: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Bits that are stored at a width that need not be whole: the mean over the two whole ones around it."""
    below = math.floor(width.item())
    return stored(below) + (width - below) * (stored(below + 1) - stored(below))


def inverse_softplus(value: float) -> float:
    """log(exp(value) - 1), exact for small values, finite for large ones."""
    return value + math.log(-math.expm1(-value))


def _plain(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear whose weight is a matrix of floats."""
    match linear:
        case nn.Linear():
            return linear.weight, linear.bias
        case Conv1D():
            return linear.weight.T, linear.bias
        case DenseLinear(dense=nn.Linear()):
            return linear.dense.weight, linear.dense.bias
    raise RecipeError(
        f"nipq: a {type(linear).__name__} has no weight of its own that could be rounded; name plain linears, or the "
        "parts of a factorised one"
    )
