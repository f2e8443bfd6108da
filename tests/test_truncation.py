"""The strongest directions alone: what is found without the others is what is found with them."""

import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from contract.material import normal
from tersely.linalg import truncation
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.svd import PlainSVD
from tersely.stats import Stats

every_shape = pytest.mark.parametrize("shape", [(10, 24), (24, 10), (16, 16)], ids=["wide", "tall", "square"])


def close(first: Tensor, second: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.linalg.norm(first - second).item() <= tolerance * torch.linalg.norm(second).item()


@every_shape
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_strongest_directions_alone_are_those_of_all(shape, scale, monkeypatch):
    monkeypatch.setattr(truncation, "SMALL", 0)
    weight, x = normal(*shape) * scale, normal(300, shape[1], seed=1) * torch.logspace(0, -2, shape[1]).double()
    gram = x.T @ x / len(x)
    whole = output_basis(weight, gram)
    for rank in range(1, min(shape) + 1):
        alone = output_basis(weight, gram, rank=rank)
        assert close(alone.energy, whole.energy[:rank])
        up, down = alone.factors(rank)
        wanted = torch.mm(*whole.factors(rank))
        assert close(up @ down, wanted, 1e-7)  # what separates two directions may be small
        again = output_basis(weight, gram, rank=rank).factors(rank)
        assert torch.equal(up, again[0]) and torch.equal(down, again[1])
    with pytest.raises(ValueError, match="only the strongest"):
        output_basis(weight, gram, rank=1).left_over()


@pytest.mark.parametrize("shape", [(640, 600), (600, 640)])
def test_a_wide_weight_is_truncated_as_by_a_full_decomposition(shape):
    weight = normal(*shape, seed=4) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    made = PlainSVD().compress(weight, Stats(), 60)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    assert close(made.to_dense(), u[:, :60] * s[:60] @ vt[:60], 1e-7)


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_without_energy_are_directions_still(rank, monkeypatch):
    monkeypatch.setattr(truncation, "SMALL", 0)
    basis = output_basis(torch.zeros(8, 9, dtype=torch.float64), rank=rank)
    assert basis.vectors is not None and not basis.energy.any()
    assert close(basis.vectors.T @ basis.vectors, torch.eye(rank, dtype=torch.float64))


def test_directions_are_sought_with_as_many_threads_as_torch_may_have(monkeypatch):
    monkeypatch.setattr(truncation, "SMALL", 0)
    seen = []
    usual = truncation.linalg.eigh
    monkeypatch.setattr(truncation.linalg, "eigh", lambda *a, **k: seen.append(threads()) or usual(*a, **k))
    before, asked = threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output_basis(normal(9, 9), rank=2)
    finally:
        torch.set_num_threads(asked)
    assert seen == [{1}] and threads() == before


def test_a_gradient_passes_through_the_strongest_directions(monkeypatch):
    monkeypatch.setattr(truncation, "SMALL", 0)
    weight = normal(9, 11).requires_grad_()
    output_basis(weight, rank=2).energy.sum().backward()
    u, _, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    s = torch.linalg.svdvals(weight.detach())
    assert weight.grad is not None and close(weight.grad, 2 * u[:, :2] * s[:2] @ vt[:2])


def threads() -> set[int]:
    """Of the linear algebra that SciPy brings along."""
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
