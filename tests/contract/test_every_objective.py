"""Every objective is a mean over positions, of which a teacher loses nothing to itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from contract.material import normal, nothing_changes
from tersely.errors import TerselyError
from tersely.train.objectives import OBJECTIVES, Objective

TOKENS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))

every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
every_teaching = pytest.mark.parametrize(
    "objective", [pytest.param(kind, id=name) for name, kind in OBJECTIVES.items() if kind.teaches]
)


def output(seed: int, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    return SimpleNamespace(logits=normal(2, 6, 11, seed=seed).to(dtype).requires_grad_())


def loss(
    objective: type[Objective], student: SimpleNamespace, teacher: SimpleNamespace, tokens: Tensor = TOKENS
) -> Tensor:
    return objective()(student, teacher if objective.teaches else None, tokens)


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_a_precise_scalar_with_a_gradient(objective, dtype):
    student, teacher = output(1, dtype), output(2, dtype)
    with nothing_changes(TOKENS):
        found = loss(objective, student, teacher)
    assert found.shape == () and found.isfinite() and found > 0
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    found.backward()
    assert student.logits.grad.isfinite().all() and student.logits.grad.any()
    assert torch.equal(loss(objective, student, teacher), found)


@every_objective
def test_it_is_a_mean_over_windows(objective):
    """A batch in two halves gives the same gradient."""
    student, teacher = output(1), output(2)
    halves = [
        loss(objective, *(SimpleNamespace(logits=o.logits[row : row + 1]) for o in (student, teacher)), TOKENS[[row]])
        for row in range(2)
    ]
    torch.testing.assert_close(loss(objective, student, teacher), sum(halves) / 2)


@every_teaching
def test_a_teacher_loses_nothing_to_itself(objective):
    student = output(1)
    found = loss(objective, student, SimpleNamespace(logits=student.logits.detach()))
    assert abs(found.item()) < 1e-12
    found.backward()
    assert student.logits.grad.abs().max() < 1e-12


@every_teaching
def test_a_token_that_both_deem_impossible_spoils_nothing(objective):
    """A padded vocabulary."""
    student, teacher = output(1), output(2)
    with torch.no_grad():
        student.logits[..., -1] = teacher.logits[..., -1] = -torch.inf
    found = loss(objective, student, teacher)
    found.backward()
    assert found.isfinite()
    assert student.logits.grad.isfinite().all()


@every_teaching
def test_another_vocabulary_is_refused(objective):
    with pytest.raises(TerselyError):
        loss(objective, output(1), SimpleNamespace(logits=normal(2, 6, 7)))
