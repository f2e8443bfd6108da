"""Orthogonal changes of basis that spread every channel over all others, made from a seed and never stored.

A Hadamard matrix of order n has entries ±1 and orthogonal rows.  Scaled by 1/√n it is orthogonal, and as flat as an
orthogonal matrix can be: a spike of size a in one of n channels comes out as ±a/√n in every channel.  Orders are 1, 2
and multiples of four.  Three constructions cover nearly all widths that models have:

    Sylvester   H_{2n} = [[H_n, H_n], [H_n, -H_n]]                          every power of two
    Paley I     [[0, 1ᵀ], [-1, Q]] + I                                      p + 1     for primes p ≡ 3 (mod 4)
    Paley II    C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]             2(p + 1)  for primes p ≡ 1 (mod 4)
                with C = [[0, 1ᵀ], [1, Q]]

where Q holds Legendre symbols, Q_ij = χ(j - i): 1 for squares modulo p, -1 for the rest, 0 on the diagonal.  A product
order takes the Kronecker product, so n = k · 2ᵐ needs a Paley matrix of one order k only.  Orders without one (6, 52,
…), or only with a very large one (11008 = 43 · 256), take the discrete Hartley matrix of their odd part n,
cas(2π jk / n) / √n with cas = cos + sin: orthogonal, symmetric, and with no entry above √2/√n still nearly flat.

A Kronecker product is never multiplied out: a vector of length n is folded into a box with one axis for each factor,
and each factor acts along its own axis.  With powers of two in factors of at most 64 that is a few passes over the
data, instead of the n multiplications for each element that a full matrix costs.

All factors here begin with a constant column, so the all-ones vector is the first basis vector of the new basis.  That
makes two random rotations, with s a vector of random signs:

    R = diag(s) H              flattens whatever it meets: the signs come first, because a vector that happens to be a
                               row of H (the constant one, say) would otherwise become a spike
    R = H diag(1, s) Hᵀ        also leaves the all-ones vector where it is, so it commutes with subtracting the mean
                               over channels; each entry is a mean of n random signs, nearly Gaussian of variance 1/n

Source: Paley, On orthogonal matrices, 1933 (Journal of Mathematics and Physics 12).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

WIDEST_FACTOR = 64
"""Powers of two are cut into factors of this order: wide enough for matrix products to be fast."""

WIDEST_CORE = 512
"""Paley matrices above this order are not used: the Hartley matrix of an odd part is smaller, and nearly as flat."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R of some order, as a function of rows; see the head of this file."""

    factors: tuple[Float[Tensor, "_ _"], ...]
    """Orthogonal, each with a constant first column; H is their Kronecker product."""
    signs: Float[Tensor, " order"]
    keeps_mean: bool
    """R = H diag(signs) Hᵀ instead of diag(signs) H."""

    @property
    def order(self) -> int:
        return self.signs.numel()

    def apply(self, rows: Float[Tensor, "*batch order"]) -> Float[Tensor, "*batch order"]:
        """x R for every row x, in float64."""
        signs = self.signs.to(rows.device)
        if self.keeps_mean:
            turned = kronecker_apply(rows.double(), self.factors) * signs
            return kronecker_apply(turned, tuple(factor.T for factor in self.factors))
        return kronecker_apply(rows.double() * signs, self.factors)


def random_rotation(
    order: int, generator: torch.Generator, *, keep_mean: bool = False, hadamard: bool = True
) -> Rotation:
    """A rotation with random signs; with `hadamard=False` in a basis drawn at random, for comparison: it spreads as
    well on average, but without a bound for a single channel, and is slow."""
    factors = flat_factors(order) if hadamard else (_random_basis(order, generator),)
    signs = torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1
    if keep_mean:
        signs[0] = 1
    return Rotation(factors, signs, keep_mean)


def kronecker_apply(
    rows: Float[Tensor, "*batch order"], factors: tuple[Float[Tensor, "_ _"], ...]
) -> Float[Tensor, "*batch order"]:
    """x (F₁ ⊗ F₂ ⊗ …) for every row x, without forming the product."""
    shape = rows.shape
    rows = rows.reshape(-1, shape[-1])
    for factor in reversed(factors):
        side = factor.shape[0]
        # the last axis of the box is multiplied and becomes its first one; after all factors each is back in its place
        box = rows.view(len(rows), -1, side) @ factor.to(rows)
        rows = box.mT.reshape(rows.shape)
    return rows.reshape(shape)


def flat_factors(order: int) -> tuple[Float[Tensor, "_ _"], ...]:
    """Orthogonal matrices whose Kronecker product has the given order and is flat: Hadamard where the constructions
    reach, else with a Hartley matrix for the odd part.  Float64, each with a constant first column."""
    if order < 1:
        raise ValueError(f"order {order} of a rotation; wanted 1 or more")
    core, power = _split(order)
    first = _paley(core) if _is_core(core) else _hartley(core)
    twos = []
    while power > 1:
        twos.append(_sylvester(min(power, WIDEST_FACTOR)))
        power //= min(power, WIDEST_FACTOR)
    return (first, *twos) if core > 1 or not twos else tuple(twos)


def has_hadamard(order: int) -> bool:
    """Whether `flat_factors` of this order multiply to a Hadamard matrix (over √order)."""
    return _is_core(_split(order)[0])


def _split(order: int) -> tuple[int, int]:
    """(k, 2ᵐ) with k · 2ᵐ the order and k the least order of a Paley matrix, or 1; the odd part where there is none."""
    power = order & -order
    odd = order // power
    cores = (odd << shift for shift in range(power.bit_length()))
    core = next((core for core in cores if _is_core(core)), odd)
    return core, order // core


def _is_core(order: int) -> bool:
    return order == 1 or (order <= WIDEST_CORE and _paley_prime(order) is not None)


def _paley_prime(order: int) -> int | None:
    """The prime p of a Paley matrix of this order; type I where both exist."""
    if order % 4:
        return None
    if _is_prime(order - 1):  # 3 modulo 4, as the order is a multiple of four
        return order - 1
    second = order // 2 - 1
    return second if second % 4 == 1 and _is_prime(second) else None


def _paley(order: int) -> Float[Tensor, "order order"]:
    """The Hadamard matrix of Paley over √order, its first column positive."""
    prime = _paley_prime(order)
    if prime is None:
        return torch.ones(1, 1, dtype=torch.float64)
    border = torch.ones(prime, dtype=torch.float64)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = border
    matrix[1:, 1:] = _legendre(prime)
    if order == prime + 1:
        matrix[1:, 0] = -border
        matrix += torch.eye(order, dtype=torch.float64)
    else:
        matrix[1:, 0] = border
        spread = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(matrix, spread) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)
    return matrix * matrix[:, :1] / math.sqrt(order)


def _legendre(prime: int) -> Float[Tensor, "prime prime"]:
    """χ(j - i): 0 on the diagonal, 1 where the difference is a square modulo the prime, -1 elsewhere."""
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    numbers = torch.arange(prime)
    symbol[numbers.square() % prime] = 1.0
    symbol[0] = 0.0
    return symbol[(numbers[None, :] - numbers[:, None]) % prime]


def _sylvester(order: int) -> Float[Tensor, "order order"]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(order)


def _hartley(order: int) -> Float[Tensor, "order order"]:
    numbers = torch.arange(order)
    # the product is reduced as an integer: a large angle would lose digits
    angle = (numbers[:, None] * numbers % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def _random_basis(order: int, generator: torch.Generator) -> Float[Tensor, "order order"]:
    """Evenly distributed among the orthogonal matrices whose first column is constant."""
    columns = torch.randn(order, order, dtype=torch.float64, generator=generator)
    columns[:, 0] = 1
    basis, triangle = torch.linalg.qr(columns)
    return basis * triangle.diagonal().sign()  # a positive diagonal makes the factorisation unique


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
