"""The token embedding and the head, rounded: what is looked up, what a tied head computes, what is stored."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

from contract.material import normal
from families import tiny_batch, tiny_config, tiny_model
from tersely.anatomy import anatomy_of
from tersely.checkpoint import open_source
from tersely.errors import TerselyError
from tersely.export import export
from tersely.kinds import QuantizedEmbedding, QuantizedLinear, TiedHead, dense_weight, link_tables
from tersely.linalg.grid import fit_grid, fit_table
from tersely.pipeline import compress, load, run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.verify import verify

EVERYTHING = ["all", "embeddings", "head"]


def rounded(form: str) -> QuantizedLinear:
    weight = normal(11, 13)
    grid = fit_table(weight, "nf4", 5, shift=True, format="log8") if form == "nf4" else fit_grid(weight, 3, 5, form)
    return QuantizedLinear.from_codes(grid.nearest(weight), grid, torch.float64)


@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "nf4"])
def test_rows_are_those_of_the_dense_weight(form: str) -> None:
    module = rounded(form)
    places = torch.tensor([[3, 0, 10], [3, 3, 7]])
    assert torch.equal(module.rows(places), module.to_dense()[places])
    table = QuantizedEmbedding.of(module, "table", padding=0, multiplier=3.5)
    assert torch.equal(table(places), module.to_dense().double()[places] * 3.5)
    assert torch.equal(table(torch.tensor(4)), module.to_dense().double()[4] * 3.5)


def test_a_tied_head_computes_from_the_table() -> None:
    table = QuantizedEmbedding.of(rounded("asymmetric"), "table", multiplier=3.5)
    head, x, bias = TiedHead.of(table), normal(2, 13), normal(11, seed=1)
    head.set_bias(bias)
    torch.testing.assert_close(head(x), functional.linear(x, table.to_dense().double()) + bias)
    assert head.nbytes() == bias.nbytes  # what it reads is stored, and counted, by its owner


def test_a_head_without_its_table_says_so() -> None:
    head = TiedHead(13, 11, "table")
    with pytest.raises(TerselyError, match="the table table of the head is missing"):
        link_tables(torch.nn.ModuleList([head]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bert", "opt"])
def test_tied_models_share_one_table(family: str) -> None:
    anatomy = anatomy_of(tiny_model(family))
    if not anatomy.head_is_tied:
        config = tiny_config(family)
        config.tie_word_embeddings = True
        anatomy = anatomy_of(tiny_model(family, config=config))
    assert anatomy.table is not None and anatomy.output is None and not anatomy.unfit
    assert anatomy.select(["head"]) == anatomy.select(["embeddings"]) == (anatomy.table.site,)
    assert anatomy.table.site not in anatomy.select(["all"])


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("gemma3", True), ("gpt2", True), ("bert", True)]
)
def test_folders_reopen_as_they_were(
    family: str, tied: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_folder(family, tie_word_embeddings=tied)
    out = tmp_path / "out"
    report = compress(folder, out, method="rtn", bits=6, target=["embeddings", "head"]).report
    assert all(check.passed for check in verify(out))
    source = open_source(out)
    model, again, stock = load(out), load(out), load(folder)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, TiedHead if tied else QuantizedLinear)
    # bytes that are said are those that lie there: the table once
    touched = report.rows[0]
    stored = [
        n for n in source.stored if "table" in n or n.startswith(("lm_head.codes", "lm_head.scales", "lm_head.z"))
    ]
    assert touched.value == sum(source.stored_bytes(name) for name in stored)
    assert touched.before == (1 if tied else 2) * table.num_embeddings * table.embedding_dim * stock.dtype.itemsize
    assert not [kept for kept in report.kept if "output head" in kept["reason"]]
    assert "and the token embedding" in report.coverage
    # the same model with the weights that the codes stand for
    stock.get_input_embeddings().weight.data = table.to_dense()
    stock.get_output_embeddings().weight.data = dense_weight(head)
    with torch.no_grad():
        logits = model(**tiny_batch()).logits
        torch.testing.assert_close(logits, stock(**tiny_batch()).logits, atol=2e-5, rtol=2e-5)
        assert torch.equal(logits, again(**tiny_batch()).logits)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits, type(model).from_pretrained(tmp_path / "saved")(**tiny_batch()).logits)
    if family == "llama":
        tokens = tiny_batch()["input_ids"][:1]
        assert AutoModelForCausalLM.from_pretrained(out).generate(tokens, max_new_tokens=2).shape[1] == 14
        export(out, tmp_path / "dense", "dense")
        with torch.no_grad():
            assert torch.allclose(load(tmp_path / "dense")(**tiny_batch()).logits, logits, atol=2e-5)


def test_the_library_may_tie_again(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Of BERT's head the bias has a second name: it is stored once, and tying does not trim it."""
    folder, out = model_folder("bert", tie_word_embeddings=True), tmp_path / "out"
    compress(folder, out, method="rtn", bits=6, target=["embeddings"])
    stored = open_source(out).stored
    assert "cls.predictions.bias" in stored and "cls.predictions.decoder.bias" not in stored
    model = load(out)
    with torch.no_grad():
        logits = model(**tiny_batch()).logits
        model.tie_weights()
        assert torch.equal(model(**tiny_batch()).logits, logits)
        export(out, tmp_path / "dense", "dense")
        assert torch.allclose(load(tmp_path / "dense")(**tiny_batch()).logits, logits, atol=2e-5)


def test_a_table_has_as_many_rows_as_it_says(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    compress(model_folder("llama", tie_word_embeddings=True), tmp_path / "out", method="rtn", bits=6, target=["head"])
    model = load(tmp_path / "out")
    assert isinstance(model.resize_token_embeddings(64), QuantizedEmbedding)
    with pytest.raises(TypeError, match="not an instance of"):
        model.resize_token_embeddings(70)


def test_a_bare_model_opens_with_the_head_that_is_tied_to_it(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    compress(model_folder("llama", tie_word_embeddings=True), tmp_path / "out", method="rtn", bits=6, target=["head"])
    AutoModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "bare")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch()).logits, load(tmp_path / "out")(**tiny_batch()).logits)


def test_a_head_that_a_rewrite_unties_is_a_target_of_its_own(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(
        {
            "model": str(model_folder("llama", tie_word_embeddings=True)),
            "step": [
                {"rewrite": "rotate"},
                {"method": "rtn", "target": ["embeddings"], "bits": 6},
                {"method": "gptq", "target": ["head"], "bits": 6},
            ],
            "calibration": {"source": [str(text_file)], "length": 32, "samples": 16},
        }
    )
    report = run(prepare(recipe, tmp_path / "out")).report
    source = open_source(tmp_path / "out")
    stored = [n for n in source.stored if n.startswith(("model.embed_tokens.", "lm_head."))]
    assert report.rows[0].value == sum(source.stored_bytes(name) for name in stored)
    assert report.rows[0].before == 64 * 32 * 4  # once: the two were tied
    assert report.coverage.startswith("1 of 15 linears touched, and the token embedding")


def test_a_head_is_fitted_to_what_it_reads(model_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    folder = model_folder("llama", tie_word_embeddings=False)
    how = {"bits": 3.9, "target": ["all", "head"], "calibrate": [str(text_file)], "length": 32, "samples": 16}
    out = tmp_path / "out"
    report = compress(folder, out, method="gptq", **how).report
    (row,) = [row for row in report.sites if row.role == "head"]
    assert row.measured_error is not None and 0 < row.measured_error < 0.1
    assert isinstance(load(out).get_output_embeddings(), QuantizedLinear)


@pytest.mark.parametrize(
    ("method", "target", "tied", "said"),
    [
        ("gptq", ["embeddings"], False, "reads statistics of inputs"),
        ("gptq", ["head"], True, "is tied to it"),
        ("svd", ["embeddings"], False, "rows cannot be looked up"),
        ("joint_rank", ["all", "head"], False, "treats linears of the blocks together"),
        ("fwsvd", ["head"], False, "gathered in the blocks alone"),
    ],
)
def test_what_cannot_be_treated_is_refused(
    method: str, target: list[str], tied: bool, said: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(TerselyError, match=said):
        compress(
            model_folder("llama", tie_word_embeddings=tied), tmp_path / "out", method=method, keep=0.8, target=target
        )
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_head_of_tokens(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("bert", "BertForSequenceClassification")
    with pytest.raises(TerselyError, match="has no output head"):
        compress(folder, tmp_path / "out", method="rtn", bits=6, target=["head"])


def test_a_stopped_run_goes_on_to_the_same_bytes(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama", tie_word_embeddings=True)
    compress(folder, tmp_path / "whole", method="rtn", bits=6, target=EVERYTHING)
    with monkeypatch.context() as patch:
        patch.setattr("tersely.targets.TableTarget.compress", _stop)
        with pytest.raises(KeyboardInterrupt):
            compress(folder, tmp_path / "stopped", method="rtn", bits=6, target=EVERYTHING)
    assert (tmp_path / "stopped" / ".tersely").exists()
    copy = Path(shutil.copytree(tmp_path / "stopped", tmp_path / "copy"))
    assert compress(folder, copy, method="rtn", bits=6, target=EVERYTHING).report.resumed
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (copy / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _stop(*arguments: object) -> None:
    raise KeyboardInterrupt
