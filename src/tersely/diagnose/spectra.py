"""How many directions a weight really has, and how many its inputs let it use.

With singular values σ_i and their shares of the energy p_i = σ_i² / Σ σ²:

    stable rank       Σ σ² / max σ²          blind to all but the largest; 1 for rank one, n for an orthogonal n x n
    effective rank    exp(-Σ p ln p)         the number of equal directions with the same entropy
    rank 90 %, 99 %   how many directions, largest first, hold that share of the energy

All lie between 1 and the rank, and do not change with the scale of the weight.

Two weights are measured: W itself, and the whitened W C with C Cᵀ = E[x xᵀ].  The energy of the second one is the
energy of the outputs, so that `whitened rank 99 %` is the rank at which a truncation loses 1 % of it; of W alone the
spectrum says little about truncation, since it does not know which directions occur.  C is never formed: the squares of
the singular values are the eigenvalues of W E[x xᵀ] Wᵀ.

A site is flagged *low-rank* where two factors of `whitened rank 99 %` take at most half of its bytes.  A small stable
rank alone says less: one direction common to all tokens can carry most of the energy and little of the message.

Source: Rudelson and Vershynin, Sampling from large matrices, 2007 (arXiv math/0503442), for the stable rank; Roy and
Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.diagnose.base import Row, Subject, row
from tersely.errors import NumericalError
from tersely.linalg.truncation import output_basis
from tersely.stats import Gram

PAYS = 0.5
"""Share of its bytes that two factors with 99 % of a site's energy may take where the site is called low-rank."""


@dataclass(frozen=True)
class Spectrum:
    stable_rank: float
    effective_rank: float
    rank90: int
    rank99: int


def spectrum(energy: Float[Tensor, " k"]) -> Spectrum:
    """Of squared singular values in any order.  All zero for a zero matrix, which has no direction at all.

    Raises NumericalError for entries that are negative or not finite.
    """
    if not torch.isfinite(energy).all() or (energy < 0).any():
        raise NumericalError("a spectrum has entries that are negative or not finite; check weight and inputs")
    falling = energy.double().sort(descending=True).values
    if not len(falling) or falling[0] == 0:
        return Spectrum(0.0, 0.0, 0, 0)
    falling = falling / falling[0]
    total = falling.sum()
    shares = falling / total
    entropy = -torch.xlogy(shares, shares).sum()
    # what is left is summed from the small end, where accuracy is
    left = shares.flip(0).cumsum(0).flip(0)
    rank90, rank99 = (int((left > lost + 1e-12).sum()) for lost in (0.1, 0.01))
    return Spectrum(total.item(), entropy.exp().item(), rank90, rank99)


def look(subject: Subject) -> list[Row]:
    """The spectra of every site, of the weight alone and of the weight as its inputs see it."""
    rows = []
    for seen in subject.blocks([Gram]):
        for site in seen.sites:
            weight = subject.weight(site)
            try:
                plain = spectrum(output_basis(weight, vectors=False).energy)
                whitened = spectrum(output_basis(weight, seen.inputs[site.reads][Gram].mean(), vectors=False).energy)
            except NumericalError as error:
                raise NumericalError(f"{site.name}: {error}") from error
            side = min(site.out_features, site.in_features)
            rows.append(row(site.name, "smaller side", side, "channels"))
            rows += _rows(site.name, "", plain) + _rows(site.name, "whitened ", whitened)
            factors = whitened.rank99 * (site.out_features + site.in_features)
            low = factors <= PAYS * site.out_features * site.in_features
            rows.append(row(site.name, "flag", "low-rank" if low else None))
    return rows


def _rows(name: str, prefix: str, found: Spectrum) -> list[Row]:
    return [
        row(name, f"{prefix}stable rank", found.stable_rank),
        row(name, f"{prefix}effective rank", found.effective_rank),
        row(name, f"{prefix}rank 90 %", found.rank90),
        row(name, f"{prefix}rank 99 %", found.rank99),
    ]
