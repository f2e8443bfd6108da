"""Gradients of the loss, as one backward pass shows them, against derivatives taken one window at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import TINY, tiny_config, tiny_model
from tersely import gradients
from tersely.anatomy import Anatomy, Site, anatomy_of
from tersely.calibrate import StatisticsStore, watch_list
from tersely.checkpoint import ForeignNamesError, Source, open_source
from tersely.errors import AnatomyError, NumericalError
from tersely.gradients import CLIP, GradientStatistics, gather
from tersely.opening import rewrite_names
from tersely.stats import Fisher, Gram, OutputGram, Stats

KINDS = (OutputGram, Fisher)
ENCODERS = ("bert", "distilbert")
DECODERS = [family for family in TINY if family not in ENCODERS]
ROWS, LENGTH = 5, 16
KEPT = slice(2, 14)  # without an eighth at either end


@dataclass(frozen=True)
class Case:
    model: PreTrainedModel
    source: Source
    anatomy: Anatomy


@pytest.fixture(scope="module")
def case(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    def make(family: str = "llama", dtype: torch.dtype = torch.float64, **settings: object) -> Case:
        folder = model_folder(family, dtype=dtype, **settings)
        try:
            source = open_source(folder)
        except ForeignNamesError:
            renamed = tmp_path_factory.mktemp("renamed") / "model"
            rewrite_names(folder, renamed)
            source = open_source(renamed)
        model = type(tiny_model(family)).from_pretrained(folder, dtype=dtype).eval()
        return Case(model, source, anatomy_of(source.skeleton()))

    return make


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 2 * LENGTH)  # the last batch is smaller


def windows(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def gathered(tried: Case, rows: Tensor | None = None) -> dict[str, Stats]:
    sites = tried.anatomy.sites
    return gather(tried.source, tried.anatomy, sites, KINDS, windows() if rows is None else rows)


def loss_of(model: nn.Module, row: Tensor) -> Tensor:
    """Every token but the first, given those before it; position by position."""
    chances = model(row[None], use_cache=False).logits[0].log_softmax(-1)
    return -sum(chances[place, row[place + 1]] for place in range(len(row) - 1))


def in_weight(model: nn.Module, row: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """∂L/∂W of one window, [out, in]."""
    weights = [model.get_submodule(site.name).weight for site in sites]
    found = torch.autograd.grad(loss_of(model, row), weights)
    return {s.name: grad.T if s.transposed else grad for s, grad in zip(sites, found, strict=True)}


def in_output(model: nn.Module, row: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """∂L/∂y of one window, [length, out]."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site.name).register_forward_hook(
            lambda module, arguments, out, name=site.name: outputs.update({name: out})
        )
        for site in sites
    ]
    loss = loss_of(model, row)
    for hook in hooks:
        hook.remove()
    found = torch.autograd.grad(loss, [outputs[site.name] for site in sites])
    return {site.name: grad.reshape(len(row), -1) for site, grad in zip(sites, found, strict=True)}


def clipped(gradient: Tensor) -> Tensor:
    kept = gradient[KEPT]
    norms = kept.norm(dim=1, keepdim=True)
    return kept / norms * norms.clamp(CLIP[0] * norms.mean(), CLIP[1] * norms.mean())


# --- against autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_they_are_those_of_one_window_at_a_time(family, case):
    experts = family in ("mixtral", "qwen3_moe")  # torch groups their products in float32 or less
    tried = case(family, torch.float32 if experts else torch.float64)
    found, sites = gathered(tried), tried.anatomy.sites
    assert found.keys() == {site.name for site in sites}
    squares, felt = {s.name: 0.0 for s in sites}, {s.name: [] for s in sites}
    for row in windows():
        for name, gradient in in_weight(tried.model, row, sites).items():
            squares[name] = squares[name] + gradient.double().square().mean(0) / ROWS
        for name, gradient in in_output(tried.model, row, sites).items():
            felt[name].append(clipped(gradient.double()))
    for site in sites:
        rows = torch.cat(felt[site.name])
        wanted = rows.T @ rows / len(rows)
        scale = wanted.diagonal().mean().item()
        # families that norm in float32 whatever comes are as exact as that
        torch.testing.assert_close(found[site.name][OutputGram].mean(), wanted, rtol=1e-3, atol=1e-4 * scale)
        scale = squares[site.name].mean().item()
        torch.testing.assert_close(found[site.name][Fisher].mean(), squares[site.name], rtol=1e-3, atol=1e-4 * scale)
        assert found[site.name][OutputGram].tokens == ROWS * (KEPT.stop - KEPT.start)
        assert found[site.name][Fisher].tokens == ROWS * site.out_features


def test_labels_are_shifted_once(case):
    """The loss is the one that transformers computes from labels that are the tokens themselves."""
    tried = case()
    (site,) = tried.anatomy.select(["*.0.mlp.down_proj"])
    weight = tried.model.get_submodule(site.name).weight
    once, twice = torch.zeros(site.in_features).double(), torch.zeros(site.in_features).double()
    for row in windows()[:, None]:
        loss = tried.model(row, labels=row).loss * (LENGTH - 1)
        once += torch.autograd.grad(loss, weight)[0].square().mean(0) / ROWS
        shifted = tried.model(row[:, :-1], labels=row[:, 1:]).loss * (LENGTH - 2)
        twice += torch.autograd.grad(shifted, weight)[0].square().mean(0) / ROWS
    found = gathered(tried)[site.name][Fisher].mean()
    torch.testing.assert_close(found, once, rtol=1e-4, atol=1e-6 * once.mean().item())
    assert (found - twice).norm() > 0.1 * once.norm()


def test_a_step_along_the_gradient_changes_the_loss_as_it_says(case):
    """By finite differences, of the whole path from the folder to the number."""
    tried = case()
    site = tried.anatomy.select(["attention.v"])[0]
    row, weight, column, slopes = windows()[0], tried.model.get_submodule(site.name).weight, 3, []
    with torch.no_grad():
        for output in range(site.out_features):
            before = []
            for step in (1e-3, -2e-3):
                weight[output, column] += step
                before.append(loss_of(tried.model, row).item())
            weight[output, column] += 1e-3
            slopes.append((before[0] - before[1]) / 2e-3)
    found = gathered(tried, row[None])[site.name][Fisher].mean()[column].item()
    assert found == pytest.approx(sum(slope**2 for slope in slopes) / site.out_features, rel=3e-3)


def test_tied_embeddings_are_one_tensor_with_the_head(case):
    tied = case("llama", tie_word_embeddings=True)
    assert tied.anatomy.tied
    found, (site,) = gathered(tied, windows(1)), tied.anatomy.select(["*.1.mlp.up_proj"])
    wanted = in_weight(tied.model, windows(1)[0], (site,))[site.name].square().mean(0)
    torch.testing.assert_close(found[site.name][Fisher].mean(), wanted, rtol=1e-4, atol=1e-6 * wanted.mean().item())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_they_are_about_the_same(family, case):
    rough, fine = case(family, torch.bfloat16), case(family)
    fine.model.load_state_dict(rough.model.state_dict())
    found, site = gathered(rough), rough.anatomy.sites[-1]
    wanted = torch.zeros(site.in_features).double()
    for row in windows():
        wanted += in_weight(fine.model, row, (site,))[site.name].square().mean(0) / ROWS
    got = found[site.name][Fisher].mean()
    assert got.dtype == torch.float64
    assert (got - wanted).norm() < 0.05 * wanted.norm()


# --- what is left out -------------------------------------------------------------------------------------------------


def test_batches_of_any_size_give_the_same_and_a_second_time_every_bit(case, monkeypatch):
    tried = case()
    first, again = gathered(tried), gathered(tried)
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 10**6)
    at_once = gathered(tried)
    for name, stats in first.items():
        for kind in KINDS:
            assert torch.equal(stats[kind].mean(), again[name][kind].mean())
            torch.testing.assert_close(at_once[name][kind].mean(), stats[kind].mean(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("length", [2, 3, 7, 8])
def test_short_windows_keep_some_tokens(length, case):
    found = gathered(case(), windows(2, length))
    for stats in found.values():
        assert stats[OutputGram].tokens == 2 * (length - length // 8 - max(1, length // 8))
        assert stats[OutputGram].mean().isfinite().all()


def test_loud_and_quiet_tokens_are_brought_within_reason():
    gradient = torch.ones(1, 40, 2, dtype=torch.float64)
    gradient[0, 10], gradient[0, 11], gradient[0, 12] = 1e6, 1e-9, 0.0
    got = gradients.clipped(gradient)
    assert got.shape == (1, 30, 2)
    norms, mean = got[0].norm(dim=1), gradient[0, 5:35].norm(dim=1).mean()
    assert norms[5].item() == pytest.approx(10 * mean.item())
    assert norms[6].item() == pytest.approx(0.1 * mean.item())
    assert norms[7].item() == 0  # a direction that nobody knows
    assert not gradients.clipped(torch.zeros(2, 9, 3)).any()


def test_the_model_is_left_without_hooks_and_gradients(case, monkeypatch):
    tried, seen = case(), []
    usual = gradients.whole_model
    monkeypatch.setattr(gradients, "whole_model", lambda *arguments: seen.append(usual(*arguments)) or seen[0])
    before = torch.is_grad_enabled()
    with torch.no_grad():
        gathered(tried)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() == before
    assert not any(module._forward_hooks for module in seen[0].modules())
    assert all(parameter.grad is None for parameter in seen[0].parameters())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_refused_with_the_reason(family, case):
    with pytest.raises(AnatomyError, match="predicts no next token"):
        gathered(case(family, torch.float32))


def test_a_head_of_a_decoder_on_an_encoder_is_seen_through(tmp_path):
    config = tiny_config("bert")
    model = tiny_model("bert", "BertLMHeadModel", config)
    model.config.architectures = ["BertLMHeadModel"]
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    with pytest.raises(AnatomyError, match="sees the tokens that it would have to predict"):
        gathered(Case(model, source, anatomy_of(source.skeleton())))


def test_a_body_without_a_head_is_refused(tmp_path):
    tiny_model("llama", "LlamaModel").save_pretrained(tmp_path)
    source = open_source(tmp_path)
    with pytest.raises(AnatomyError, match="LlamaModel predicts no next token"):
        gather(source, anatomy_of(source.skeleton()), (), KINDS, windows())


def broken(tried: Case, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """The last linear does something else on the way forward."""
    usual = gradients.whole_model

    def whole(*arguments: object) -> nn.Module:
        model = usual(*arguments)
        linear = model.get_submodule(tried.anatomy.sites[-1].name)
        linear.register_forward_hook(lambda module, arguments, out: change(out))
        return model

    monkeypatch.setattr(gradients, "whole_model", whole)


def test_a_gradient_that_is_not_finite_names_its_site(case, monkeypatch):
    tried = case()

    def infinite(out: Tensor) -> Tensor:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.inf)
        return out

    broken(tried, monkeypatch, infinite)
    name = tried.anatomy.sites[-1].name.replace(".", r"\.")
    with pytest.raises(NumericalError, match=rf"{name}: the gradient in its output is not finite for .* batch 0"):
        gathered(tried)


def test_a_loss_that_is_not_finite_is_refused(case, monkeypatch):
    tried = case()
    broken(tried, monkeypatch, lambda out: out * torch.nan if out.requires_grad else out)
    with pytest.raises(NumericalError, match="the loss of calibration batch 0 is not finite"):
        gathered(tried)


def test_a_part_without_a_backward_pass_is_named(case, monkeypatch):
    tried = case()
    broken(tried, monkeypatch, lambda out: out.detach())
    with pytest.raises(AnatomyError, match=r"no gradient of the loss reaches model.layers.1.mlp.gate_proj"):
        gathered(tried)


def test_a_replay_cannot_be_asked_for_gradients(case):
    anatomy = case().anatomy
    with pytest.raises(ValueError, match=r"OutputGram, Fisher: no statistic of inputs"):
        watch_list(anatomy, 0, anatomy.sites, [Gram, *KINDS], "cpu")


# --- kept on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by the number of sites at every backward pass over the calibration windows."""
    passes: list[int] = []
    usual = gradients.gather

    def gather(source: Source, anatomy: Anatomy, sites: tuple[Site, ...], *others: object) -> dict[str, Stats]:
        passes.append(len(sites))
        return usual(source, anatomy, sites, *others)

    monkeypatch.setattr(gradients, "gather", gather)
    yield passes


def kept(tried: Case, store: StatisticsStore, sites: tuple[Site, ...]) -> GradientStatistics:
    return GradientStatistics(
        tried.source, tried.anatomy, sites, KINDS, windows(), store, "cpu", lambda what, done, of: None
    )


@pytest.mark.parametrize("shared", [True, False])
def test_one_pass_serves_all_blocks_and_whoever_comes_later(shared, case, counted, tmp_path):
    tried, wanted = case(), None
    chosen = tried.anatomy.select(["*.1.mlp.*"])
    for _ in range(2):
        found = kept(tried, StatisticsStore(tmp_path, {"of": 1}, shared=shared), chosen)
        assert {site.name for site in chosen} <= found.of_block(1).keys()
        assert bool(found.of_block(0)) == shared
        wanted = wanted or gather(tried.source, tried.anatomy, chosen, KINDS, windows())
        for site in chosen:
            for kind in KINDS:
                assert torch.equal(found.of_block(1)[site.name][kind].mean(), wanted[site.name][kind].mean())
    assert counted[0] == (len(tried.anatomy.sites) if shared else len(chosen))
    assert len(counted) == 1
