"""Every rewrite keeps the contract of `tersely.rewrite.base`: pure functions whose result is the same model."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contract.material import TOKENS, asked_of, for_every, nothing_changes, observed, other_random_numbers
from families import tiny_model
from tersely.anatomy import Anatomy, anatomy_of
from tersely.errors import AnatomyError, TerselyError
from tersely.rewrite import REWRITES, Rewrite
from tersely.stats import Stats

FAMILIES = ("llama", "gpt2", "bert")
"""RMS norms and grouped queries; layer norms with biases and a tied head; an encoder.  Only the first must be taken."""

every_rewrite = for_every("name", {name: name for name in REWRITES})
every_family = pytest.mark.parametrize("family", FAMILIES)


def inputs_of(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """Key of an input → the tokens that were read."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, arguments, reads=site.reads: found.update({reads: arguments[0].detach().flatten(0, -2)})
        )
        for site in anatomy.sites
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Case:
    rewrite: Rewrite
    model: PreTrainedModel
    same: PreTrainedModel
    """The model whose function is to be kept."""
    anatomy: Anatomy
    inputs: dict[str, Tensor]

    @property
    def stats(self) -> dict[str, Stats]:
        return {reads: observed(self.rewrite.needs, x) for reads, x in self.inputs.items()}


def case(name: str, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    model = tiny_model(family).to(dtype)
    anatomy = anatomy_of(model)
    fields, same = asked_of(name, model, folder)
    rewrite = REWRITES[name](**fields)
    try:
        rewrite.check(anatomy, model.config)
    except AnatomyError as reason:
        if family == FAMILIES[0]:
            raise AssertionError(
                f"{name} refuses a Llama ({reason}); if it needs more than its defaults, add to INGREDIENTS of "
                "contract/material.py how to get that"
            ) from reason
        pytest.skip(f"refused: {reason}")
    return Case(rewrite, model, same, anatomy, inputs_of(model, anatomy))


def changes(rewrite: Rewrite, anatomy: Anatomy, state: dict[str, Tensor], stats: dict[str, Stats]) -> dict[str, Tensor]:
    """What the runner gathers: first outside the blocks, then block by block."""
    blocks = tuple(f"{block}." for block in anatomy.blocks)
    changed = rewrite.outside(anatomy, {name: t for name, t in state.items() if not name.startswith(blocks)})
    for index, block in enumerate(blocks):
        inside = {name: tensor for name, tensor in state.items() if name.startswith(block)}
        new = rewrite.block(anatomy, index, inside, stats)
        assert new.keys() <= inside.keys(), "a block may change its own tensors alone"
        changed |= new
    return changed


@every_rewrite
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pure_functions_change_tensors_and_not_the_model(name, family, dtype, tmp_path):
    asked = case(name, family, tmp_path, dtype)
    rewrite, model, anatomy, stats = asked.rewrite, asked.model, asked.anatomy, asked.stats
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in anatomy.tied}
    with nothing_changes(state, stats):
        changed = changes(rewrite, anatomy, state, stats)
        settings = rewrite.settings(anatomy)
        left = rewrite.left_alone(anatomy)
    assert changed
    assert all(isinstance(path, str) and reason for path, reason in left.items())
    with other_random_numbers():
        again = changes(rewrite, anatomy, state, stats)
    assert again.keys() == changed.keys() and all(torch.equal(again[name], changed[name]) for name in again)
    assert changed.keys() - state.keys() <= set(anatomy.tied), "a new tensor that no tie was broken for"
    whole = model.state_dict()
    for name, tensor in changed.items():
        assert (tensor.dtype, tensor.shape) == (whole[name].dtype, whole[name].shape), name
        assert tensor.is_contiguous() and tensor.isfinite().all(), name
    config = copy.deepcopy(model.config)
    for setting, value in settings.items():
        setattr(config, setting, value)
    with torch.random.fork_rng(devices=[]):
        result = type(model)(config).to(dtype).eval()
    result.load_state_dict(whole | changed, strict=True)
    with torch.no_grad():
        said, wanted = result(TOKENS).logits, asked.same(TOKENS).logits
    if dtype == torch.float32:
        torch.testing.assert_close(said, wanted, rtol=0, atol=1e-4)
    else:
        assert said.dtype == dtype and said.isfinite().all()


@for_every("name", {name: name for name in REWRITES})
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(name, bad, tmp_path):
    asked = case(name, FAMILIES[0], tmp_path)
    for site in asked.anatomy.sites:
        state = {name: tensor.clone() for name, tensor in asked.model.state_dict().items()}
        state[f"{site.name}.weight"][1, 1] = bad
        try:
            changed = changes(asked.rewrite, asked.anatomy, state, asked.stats)
        except TerselyError as error:
            assert "finite" in str(error)
        else:  # it was not read
            assert all(tensor.isfinite().all() for tensor in changed.values()), site.name


@pytest.mark.parametrize("name", [name for name, rewrite in REWRITES.items() if rewrite().needs])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(name, bad, tmp_path):
    asked = case(name, FAMILIES[0], tmp_path)
    broken = {reads: torch.where(torch.arange(x.shape[1]) == 1, bad, x) for reads, x in asked.inputs.items()}
    stats = {reads: observed(asked.rewrite.needs, x) for reads, x in broken.items()}
    with pytest.raises(TerselyError, match="finite"):
        changes(asked.rewrite, asked.anatomy, dict(asked.model.state_dict()), stats)
