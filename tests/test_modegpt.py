"""MoDeGPT: the identities of its three decompositions in float64, and the models that it leaves behind.

z are neurons [tokens, n], x inputs of attention [tokens, hidden], C their Gram matrix, J what is kept.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import tersely
from families import tiny_batch, tiny_model
from tersely.anatomy import Heads, Site, Unit, anatomy_of
from tersely.convert import AttentionSettings, attention_settings, norm_tensors
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.hf import manifest_config
from tersely.kinds import Kind, Made, manifest_of
from tersely.kinds.attention import LINEARS, Attention, AttentionShape
from tersely.methods import UNIT_METHODS, RebuildsAttention
from tersely.methods.prune.modegpt import ModularDecomposition, NarrowHeads, leverage
from tersely.methods.prune.stat import InterpolativePruning
from tersely.stats import Gram, Stats

METHOD = ModularDecomposition(damping=1e-12)
REBUILT = ["llama", "mistral", "qwen2", "qwen3"]
"""Families with an attention that ours can stand for; the last one norms queries and keys."""

HEADS = [(4, 2), (4, 4), (6, 1)]
heads = pytest.mark.parametrize(("query", "key_value"), HEADS, ids=["grouped", "plain", "one"])
every_family = pytest.mark.parametrize("family", REBUILT)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 300) -> Tensor:
    """Some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) * loudness.flip(0).sqrt()


def observed(x: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1])})
    stats.update(x)
    return stats


def mean_gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def site(role: str, rows: int, columns: int) -> Site:
    return Site(f"block.{role}", f"unit.{role}", 0, "block:in", rows, columns, False, False)


def mlp(neurons: int, width: int = 12) -> Unit:
    parts = {role: site(role, neurons, width) for role in ("gate", "up")}
    return Unit("block:mlp", "mlp", 0, parts | {"down": site("down", width, neurons)}, "", None, True)


def weights_of(unit: Unit) -> dict[str, Tensor]:
    return {
        role: normal(part.out_features, part.in_features, seed=seed)
        for seed, (role, part) in enumerate(unit.sites.items())
    }


def attention(
    query: int, key_value: int, width: int = 8, hidden: int = 20, **changes: object
) -> tuple[Unit, NarrowHeads]:
    q, kv = query * width, key_value * width
    sites = {"q": site("q", q, hidden), "k": site("k", kv, hidden), "v": site("v", kv, hidden)}
    sites["o"] = site("o", hidden, q)
    unit = Unit("block:attention", "attention", 0, sites, "block.attn", Heads(query, key_value, width), True)
    shape = AttentionShape(0, hidden, query, key_value, width, width, 0.37, None, 0.0, None)
    frequencies = tuple(torch.logspace(0, -2, width // 2, dtype=torch.float32).tolist())
    settings = AttentionSettings(replace(shape, **changes), frequencies, 1.25, 64)  # type: ignore[arg-type]
    method = METHOD.for_attention(settings)
    assert isinstance(method, NarrowHeads)
    return unit, method


def statistics(unit: Unit, x: Tensor) -> dict[str, Stats]:
    inputs = observed(x)
    return {"q": inputs, "k": inputs, "v": inputs, "o": observed(correlated(unit.sites["o"].in_features))}


def built(kinds: Mapping[str, Kind]) -> Attention:
    """The attention, after a round trip through plain values."""
    made = Made.of(kinds[""])
    again = Made(json.loads(json.dumps(made.specs)), made.state).build()
    again.load_state_dict(made.state, assign=True)
    assert isinstance(again, Attention)
    return again.eval()


def weight(module: Attention, role: str) -> Tensor:
    return module.get_parameter(f"{LINEARS[role]}.weight").detach()


# --- neurons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_leverage_is_what_it_says_and_the_largest_have_the_smallest_inverse(ridge):
    gram = mean_gram(correlated(15))
    regular = gram + ridge * torch.eye(15, dtype=gram.dtype)
    torch.testing.assert_close(leverage(gram, ridge), (gram @ regular.inverse()).diagonal(), rtol=1e-8, atol=1e-10)
    stays = leverage(gram, ridge).argsort(descending=True)
    assert torch.equal(stays, regular.inverse().diagonal().argsort())
    assert 0 <= leverage(gram, ridge).min() and leverage(gram, ridge).max() <= 1


@pytest.mark.parametrize("kept", [1, 4, 15, 19])
def test_the_refit_is_least_squares_and_its_loss_the_schur_complement(kept):
    unit, z = mlp(20), correlated(20)
    weights, stats, gram = weights_of(unit), {"down": observed(z)}, mean_gram(z)
    made = METHOD.compress(unit, weights, {}, stats, kept)
    order = leverage(gram, gram.diagonal().mean()).argsort(descending=True)
    stays, rest = order[:kept].sort().values, order[kept:]
    for role in ("gate", "up"):
        assert torch.equal(made[role].to_dense(), weights[role][stays])
    wanted = torch.linalg.lstsq(z[:, stays], z @ weights["down"].T).solution.T
    torch.testing.assert_close(made["down"].to_dense(), wanted, rtol=1e-6, atol=1e-6)
    schur = gram[rest][:, rest] - gram[rest][:, stays] @ gram[stays][:, stays].inverse() @ gram[stays][:, rest]
    lost = (weights["down"][:, rest] @ schur @ weights["down"][:, rest].T).trace().item()
    measured = (z @ weights["down"].T - z[:, stays] @ made["down"].to_dense().T).square().sum(-1).mean().item()
    option = METHOD.options(unit, weights, stats)[kept]
    assert option.amount == kept and option.nbytes == kept * 3 * 12 * 8
    assert option.error == pytest.approx(lost, rel=1e-6) == pytest.approx(measured, rel=1e-6)


def test_an_error_in_the_damped_metric_is_an_upper_bound():
    unit, z = mlp(20), correlated(20)
    weights, stats = weights_of(unit), {"down": observed(z)}
    method = ModularDecomposition(damping=0.1)
    for option in method.options(unit, weights, stats)[1::4]:
        made = method.compress(unit, weights, {}, stats, option.amount)
        # gate and up, cut, name the neurons that stay
        stays = [int((weights["up"] == row).all(1).nonzero()) for row in made["up"].to_dense()]
        error = (z @ weights["down"].T - z[:, stays] @ made["down"].to_dense().T).square().sum(-1).mean().item()
        assert error <= option.error
    assert option.error > 0 and METHOD.options(unit, weights, stats)[20].error == 0


def test_silent_neurons_go_first_and_without_loss():
    unit, z = mlp(20), correlated(20)
    z[:, [0, 7, 19]] = 0
    weights, stats = weights_of(unit), {"down": observed(z)}
    made = METHOD.compress(unit, weights, {}, stats, 17)
    stays = [n for n in range(20) if n not in (0, 7, 19)]
    assert torch.equal(made["up"].to_dense(), weights["up"][stays])
    torch.testing.assert_close(made["down"].to_dense(), weights["down"][:, stays], rtol=1e-9, atol=1e-9)
    assert METHOD.options(unit, weights, stats)[17].error <= 1e-9 * METHOD.options(unit, weights, stats)[0].error


# --- pairs of queries and keys ----------------------------------------------------------------------------------------


@heads
def test_scores_of_pairs_are_mean_squares_of_what_they_add(query, key_value):
    unit, method = attention(query, key_value)
    weights, x = weights_of(unit), correlated(20)
    group = query // key_value
    q = (x @ weights["q"].T).unflatten(1, (query, 8)).square().mean(0)
    k = (x @ weights["k"].T).unflatten(1, (key_value, 8)).square().mean(0)
    scores = torch.zeros(key_value, 4, dtype=x.dtype)
    for head in range(query):
        for pair in range(4):
            scores[head // group, pair] += sum(q[head, i] * k[head // group, i] for i in (pair, pair + 4))
    torch.testing.assert_close(method._scores(weights, {}, statistics(unit, x)), scores, rtol=1e-9, atol=0)
    options = method.options(unit, weights, statistics(unit, x))
    kept = scores.sort(dim=1, descending=True).values
    for option in options[1:]:
        if option.amount["vo"] == 8:  # values whole: all of the error is the half of the share of scores
            lost = kept[:, option.amount["qk"] :].sum() / kept.sum() / 2
            assert option.error / options[0].error == pytest.approx(lost.item(), abs=1e-12)


@heads
def test_the_best_pairs_stay_together_with_their_frequencies(query, key_value):
    unit, method = attention(query, key_value)
    weights, stats = weights_of(unit), statistics(unit, correlated(20))
    biases = {role: normal(unit.sites[role].out_features, seed=ord(role)) for role in "qk"}
    made = built(method.compress(unit, weights, biases, stats, {"qk": 3, "vo": 8}))
    best = method._scores(weights, biases, stats).topk(3).indices.sort().values
    frequencies = made.positions.frequencies.view(torch.float32)
    for head in range(query):
        pairs = best[head // (query // key_value)]
        rows = torch.cat([pairs, pairs + 4])
        of_head = slice(head * 6, head * 6 + 6)
        assert torch.equal(weight(made, "q")[of_head], weights["q"][head * 8 + rows])
        assert torch.equal(made.q_proj.bias[of_head], biases["q"][head * 8 + rows])
    for head, pairs in enumerate(best):
        rows, of_head = torch.cat([pairs, pairs + 4]), slice(head * 6, head * 6 + 6)
        assert torch.equal(weight(made, "k")[of_head], weights["k"][head * 8 + rows])
        assert torch.equal(made.k_proj.bias[of_head], biases["k"][head * 8 + rows])
        assert torch.equal(frequencies[head], torch.tensor(method.attention.frequencies)[pairs])
    assert made.shape.scaling == 0.37 and made.positions.shape.scaling == 1.25
    assert torch.equal(weight(made, "v"), weights["v"]) and torch.equal(weight(made, "o"), weights["o"])


def test_a_pair_with_large_biases_stays():
    unit, method = attention(4, 2)
    weights, stats = weights_of(unit), statistics(unit, correlated(20))
    weights["q"][torch.arange(4) * 8 + 2] = weights["k"][torch.arange(2) * 8 + 2] = 0
    weights["q"][torch.arange(4) * 8 + 6] = weights["k"][torch.arange(2) * 8 + 6] = 0
    silent = method._scores(weights, {}, stats)
    assert (silent[:, 2] == 0).all()
    biases = {"q": torch.zeros(32, dtype=torch.float64), "k": torch.zeros(16, dtype=torch.float64)}
    biases["q"][2::8] = biases["k"][2::8] = 1e4
    made = built(method.compress(unit, weights, biases, stats, {"qk": 1, "vo": 8}))
    assert (made.positions.frequencies.view(torch.float32) == method.attention.frequencies[2]).all()
    assert (made.q_proj.bias[0::2] == 1e4).all() and (weight(made, "q") == 0).all()


# --- values and output ------------------------------------------------------------------------------------------------


def products(v: Tensor, o: Tensor, query: int, key_value: int) -> Tensor:
    """What every query head makes of an input if it looks at nothing else: W_o^h W_v, [heads, hidden, hidden]."""
    makers = v.unflatten(0, (key_value, -1)).repeat_interleave(query // key_value, dim=0)
    return o.unflatten(1, (query, -1)).transpose(0, 1) @ makers


@heads
@pytest.mark.parametrize("values", [1, 4, 7])
def test_what_is_lost_of_values_are_the_dropped_singular_values(query, key_value, values):
    unit, method = attention(query, key_value)
    weights, x = weights_of(unit), correlated(20)
    made = built(method.compress(unit, weights, {}, statistics(unit, x), {"qk": 4, "vo": values}))
    dense = products(weights["v"], weights["o"], query, key_value)
    difference = dense - products(weight(made, "v"), weight(made, "o"), query, key_value)
    lost = (difference @ x.T).square().sum().item() / len(x)
    root = torch.linalg.cholesky(mean_gram(x))
    stacked = dense.unflatten(0, (key_value, -1)).flatten(1, 2) @ root
    singular = torch.linalg.svdvals(stacked)
    assert lost == pytest.approx(singular[:, values:].square().sum().item(), rel=1e-7)
    assert singular[:, 8:].max() < 1e-9 * singular.max()  # no more than the width of a head
    options = method.options(unit, weights, statistics(unit, x))
    share = lost / singular.square().sum().item()
    if values % 2 == 0:  # what else is lost of scores was checked above
        option = next(o for o in options if o.amount == {"qk": values // 2, "vo": values})
        scores = method._scores(weights, {}, statistics(unit, x)).sort(dim=1, descending=True).values
        of_scores = (scores[:, values // 2 :].sum() / scores.sum()).item()
        assert option.error / options[0].error == pytest.approx((share + of_scores) / 2, rel=1e-7)


@heads
def test_all_values_in_another_basis_are_the_same_function(query, key_value):
    """As many as can be told apart: a head is wider than the input here, so that it is factorised all the same."""
    unit, method = attention(query, key_value, width=8, hidden=5)
    weights, x = weights_of(unit), correlated(5)
    made = built(method.compress(unit, weights, {}, statistics(unit, x), {"qk": 4, "vo": 5}))
    assert weight(made, "v").shape == (key_value * 5, 5)
    after = products(weight(made, "v"), weight(made, "o"), query, key_value)
    torch.testing.assert_close(after, products(weights["v"], weights["o"], query, key_value), rtol=0, atol=1e-12)
    assert method.options(unit, weights, statistics(unit, x))[-1].error == 0


def test_values_are_shared_evenly_between_the_matrices():
    unit, method = attention(4, 2)
    made = built(method.compress(unit, weights_of(unit), {}, statistics(unit, correlated(20)), {"qk": 4, "vo": 6}))
    rows = weight(made, "v").unflatten(0, (2, 6)).norm(dim=2)
    columns = weight(made, "o").unflatten(1, (2, 2, 6)).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(rows, columns, rtol=1e-10, atol=0)


# --- bytes and amounts ------------------------------------------------------------------------------------------------


@heads
@pytest.mark.parametrize(("width", "hidden"), [(8, 20), (6, 20), (2, 9), (8, 5)])
def test_sizes_are_the_bytes_of_the_four_linears_and_widths_are_even(query, key_value, width, hidden):
    unit, method = attention(query, key_value, width, hidden)
    method.check(unit)
    weights, stats = weights_of(unit), statistics(unit, correlated(hidden))
    sizes, options = method.sizes(unit, 8), method.options(unit, weights, stats)
    assert [(s.amount, s.nbytes) for s in sizes] == [(o.amount, o.nbytes) for o in options]
    assert sizes[-1].amount == {"qk": width // 2, "vo": min(width, hidden)}
    assert all(s.amount["vo"] % 2 == 0 or s.amount["vo"] == hidden for s in sizes[1:])
    # the same share of both, up to one step
    assert all(s.amount["vo"] in (2 * s.amount["qk"], 2 * s.amount["qk"] + 2, hidden) for s in sizes[1:])
    assert [o.error for o in options] == sorted((o.error for o in options), reverse=True)
    for size in sizes[1:]:
        made = built(method.compress(unit, weights, {}, stats, size.amount))
        assert sum(weight(made, role).nbytes for role in LINEARS) == size.nbytes
        assert all(p.dtype == torch.float64 for p in made.parameters())
    assert not made.biases
    if width <= hidden:
        assert sizes[-1].nbytes == sum(w.nbytes for w in weights.values())
        assert options[-1].error == 0


def test_the_first_option_is_the_energy_of_the_output():
    unit, method = attention(4, 2)
    weights, stats = weights_of(unit), statistics(unit, correlated(20))
    energy = (correlated(32) @ weights["o"].T).square().sum(-1).mean().item()
    assert method.options(unit, weights, stats)[0].error == pytest.approx(energy, rel=1e-10)


def test_heads_that_are_normed_lose_only_values():
    unit, method = attention(4, 2, norm_eps=1e-6)
    weights, stats = weights_of(unit), statistics(unit, correlated(20))
    options = method.options(unit, weights, stats)
    assert [o.amount for o in options[1:]] == [{"qk": 4, "vo": n} for n in (2, 4, 6, 8)]
    stacked = products(weights["v"], weights["o"], 4, 2).unflatten(0, (2, -1)).flatten(1, 2)
    energy = torch.linalg.svdvals(stacked @ torch.linalg.cholesky(mean_gram(correlated(20)))).square()
    for option in options[1:]:
        lost = (energy[:, option.amount["vo"] :].sum() / energy.sum()).item()
        assert option.error / options[0].error == pytest.approx(lost, rel=1e-7, abs=1e-12)
    with pytest.raises(RecipeError, match="normed queries and keys keep all pairs"):
        method.compress(unit, weights, {}, stats, {"qk": 3, "vo": 4})


# --- whole models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(model: PreTrainedModel, **more: object) -> Tensor:
    return model(**tiny_batch(), **more).logits


def treated(model: PreTrainedModel, amount: object, method: ModularDecomposition = METHOD) -> PreTrainedModel:
    """A copy with narrower attention, whose parts went through plain values; `amount` may be asked of the settings."""
    changed, anatomy = copy.deepcopy(model), anatomy_of(model)
    for unit in anatomy.units:
        if unit.role != "attention":
            continue
        settings = attention_settings(model, unit)
        stats = {role: observed(correlated(s.in_features)) for role, s in unit.sites.items()}
        linears = {role: model.get_submodule(s.name) for role, s in unit.sites.items()}
        weights = {role: linear.weight.detach() for role, linear in linears.items()}
        weights |= {name: model.get_parameter(path).detach() for name, path in norm_tensors(unit, settings).items()}
        biases = {role: linear.bias.detach() for role, linear in linears.items() if linear.bias is not None}
        bound = method.for_attention(settings)
        bound.check(unit)
        asked = amount(settings) if callable(amount) else amount
        changed.set_submodule(unit.module, built(bound.compress(unit, weights, biases, stats, asked)))
    return changed


def whole(settings: AttentionSettings) -> dict[str, int]:
    return {"qk": settings.shape.key_width // 2, "vo": settings.shape.value_width}


def smaller(settings: AttentionSettings) -> dict[str, int]:
    """All pairs where heads are normed, one less elsewhere; two values less."""
    pairs = settings.shape.key_width // 2
    return {"qk": pairs if settings.shape.norm_eps is not None else pairs - 1, "vo": settings.shape.value_width - 2}


GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kept_whole_it_is_the_same_model(family, implementation):
    model = tiny_model(family).double()
    model.set_attn_implementation(implementation)
    same = treated(model, whole)
    torch.testing.assert_close(run(same), run(model), rtol=0, atol=1e-6)  # position tables are of float32 in both
    tokens = tiny_batch()["input_ids"][:1]
    assert torch.equal(same.generate(tokens, **GENERATE), model.generate(tokens, **GENERATE))


@torch.no_grad()
def silence(model: PreTrainedModel, *, pairs: bool, values: bool) -> None:
    """In every key head another pair says nothing, neither weight nor bias, on the side of the keys; and the values of
    every head lie in all but two directions of it."""
    for number, unit in enumerate(u for u in anatomy_of(model).units if u.role == "attention"):
        found, width = unit.heads, unit.heads.width
        linears = {role: model.get_submodule(s.name) for role, s in unit.sites.items()}
        for head in range(found.key_value):
            if pairs:
                pair = (head + number) % (width // 2)
                rows = [head * width + pair, head * width + pair + width // 2]
                linears["k"].weight[rows] = 0
                if linears["k"].bias is not None:
                    linears["k"].bias[rows] = 0
            if values:  # W_v is projected onto a random space; its bias lies anywhere
                of_head = slice(head * width, (head + 1) * width)
                basis = torch.linalg.qr(normal(width, width - 2, seed=head)).Q
                linears["v"].weight[of_head] = basis @ basis.T @ linears["v"].weight[of_head]


@every_family
def test_silent_pairs_and_directions_vanish_without_a_trace(family):
    """With biases of q, k and v (Qwen 2), heads of other widths, windows, grouped queries and padded rows."""
    model = tiny_model(family).double()
    silence(model, pairs=family != "qwen3", values=True)
    cut = treated(model, smaller)
    torch.testing.assert_close(run(cut), run(model), rtol=0, atol=1e-6)
    tokens = tiny_batch()["input_ids"][:1]
    assert torch.equal(cut.generate(tokens, **GENERATE), model.generate(tokens, **GENERATE))
    later = torch.arange(12)[None] + 40  # it is the pairs' own frequencies that turn them, at any distance
    with torch.no_grad():
        far = [m(tokens, position_ids=later).logits for m in (cut, model)]
    torch.testing.assert_close(*far, rtol=0, atol=1e-6)


def test_a_bias_of_values_moves_into_that_of_the_output_exactly():
    model = tiny_model("qwen2").double()
    silence(model, pairs=False, values=True)
    attention_of = treated(model, lambda s: whole(s) | {"vo": s.shape.value_width - 2}).model.layers[0].self_attn
    stock = model.model.layers[0].self_attn
    assert attention_of.biases == ("q", "k", "o") and attention_of.v_proj.bias is None
    heads_of_v = stock.v_proj.bias.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten()
    torch.testing.assert_close(attention_of.o_proj.bias, stock.o_proj.weight @ heads_of_v, rtol=0, atol=1e-12)
    assert torch.equal(attention_of.q_proj.bias, stock.q_proj.bias)


@every_family
def test_with_a_cache_it_answers_as_without_and_the_cache_is_narrower(family):
    model = tiny_model(family)
    cut = treated(model, lambda s: {"qk": s.shape.key_width // 2 if s.shape.norm_eps is not None else 2, "vo": 2})
    tokens = tiny_batch()["input_ids"][:1]
    for more in ({}, {"cache_implementation": "static"}):
        cached, plain = cut.generate(tokens, **GENERATE, **more), cut.generate(tokens, **GENERATE, use_cache=False)
        assert torch.equal(cached, plain)
    held = DynamicCache()
    run(cut, past_key_values=held)
    width = 16 if family == "qwen3" else 4
    assert {layer.keys.shape[-1] for layer in held.layers} == {width}
    assert {layer.values.shape[-1] for layer in held.layers} == {2}


def test_norms_of_heads_keep_their_gains():
    model = tiny_model("qwen3")
    cut = treated(model, smaller)
    for name in ("q_norm", "k_norm"):
        gain = cut.model.layers[1].self_attn.get_submodule(name).weight
        assert torch.equal(gain, model.model.layers[1].self_attn.get_submodule(name).weight)


def test_a_folder_opens_to_the_same_model_and_only_with_the_manifest(tmp_path):
    cut = treated(tiny_model("llama"), smaller)
    cut.config.quantization_config = manifest_config(manifest_of(cut))
    cut.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)), run(cut))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["none", "block", "input"])
@pytest.mark.parametrize("allocate", ["uniform", "greedy"])
def test_a_run_makes_a_folder_with_the_promised_bytes(model_folder, text_file, tmp_path, propagate, allocate):
    settings = {"keep": 0.5, "calibrate": [str(text_file)], "samples": 8, "length": 32, "allocate": allocate}
    settings |= {"propagate": propagate}
    done = tersely.compress(model_folder("llama"), tmp_path / "out", method="modegpt", **settings)
    (plan,) = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"]
    opened = tersely.load(tmp_path / "out")
    assert run(opened).isfinite().all()
    assert Attention in {type(layer.self_attn) for layer in opened.model.layers}
    held = 0
    for layer in opened.model.layers:
        linears = [*layer.self_attn.children(), *layer.mlp.children()]
        held += sum(p.nbytes for m in linears for n, p in m.named_parameters() if not n.endswith("bias"))
    row = next(row for row in done.report.rows if row.name == "touched weights")
    assert held == plan["nbytes"] == row.value <= 0.5 * plan["dense_bytes"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_it_runs_on_families_with_biases_norms_and_windows(family, model_folder, text_file, tmp_path):
    settings = {"keep": 0.7, "calibrate": [str(text_file)], "samples": 8, "length": 32, "allocate": "uniform"}
    tersely.compress(model_folder(family), tmp_path / "out", method="modegpt", **settings)
    assert run(tersely.load(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "opt", "bert"])
def test_where_attention_cannot_be_built_anew_it_is_refused_and_mlps_still_go(
    family, model_folder, text_file, tmp_path
):
    settings = {"keep": 0.7, "calibrate": [str(text_file)], "samples": 8, "length": 32}
    with pytest.raises(AnatomyError, match=r"attention.*; with target = \['mlp'\] attention is left as it is"):
        tersely.compress(model_folder(family), tmp_path / "out", method="modegpt", **settings)
    with pytest.raises(AnatomyError) as refused:
        tersely.compress(model_folder(family), tmp_path / "out", method="modegpt", target=["attention"], **settings)
    assert "left as it is" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    tersely.compress(model_folder(family), tmp_path / "out", method="modegpt", target=["mlp"], **settings)
    assert run(tersely.load(tmp_path / "out")).isfinite().all()


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_only_who_asks_is_told_what_an_attention_does():
    assert UNIT_METHODS["modegpt"]() == ModularDecomposition()
    assert isinstance(ModularDecomposition(), RebuildsAttention)
    assert not isinstance(InterpolativePruning(), RebuildsAttention)
    unit, _ = attention(4, 2)
    with pytest.raises(AnatomyError, match="for_attention"):
        ModularDecomposition().check(unit)


def test_nothing_observed_and_few_tokens_are_no_trouble():
    unit, method = attention(4, 2)
    weights = weights_of(unit)
    for x in (torch.zeros(5, 20, dtype=torch.float64), correlated(20, tokens=3)):
        stats = statistics(unit, x) | {"o": observed(torch.zeros(2, 32, dtype=torch.float64))}
        for option in method.options(unit, weights, stats)[1:]:
            assert 0 <= option.error < float("inf")
            made = method.compress(unit, weights, {}, stats, option.amount)[""]
            assert all(p.isfinite().all() for p in made.parameters())
    neurons, few = mlp(20), {"down": observed(correlated(20, tokens=3))}
    method = ModularDecomposition()
    for option in method.options(neurons, weights_of(neurons), few)[1::6]:
        made = method.compress(neurons, weights_of(neurons), {}, few, option.amount)
        assert made["down"].to_dense().isfinite().all()
    dead = {role: torch.zeros_like(w) for role, w in weights.items()}
    _, method = attention(4, 2)
    assert {o.error for o in method.options(unit, dead, statistics(unit, correlated(20)))} == {0.0}


def test_numbers_keep_their_dtype_and_are_its_own():
    unit, method = attention(4, 2)
    weights = {role: w.bfloat16() for role, w in weights_of(unit).items()}
    biases = {role: normal(s.out_features, seed=7).bfloat16() for role, s in unit.sites.items()}
    for amount in ({"qk": 2, "vo": 4}, {"qk": 4, "vo": 8}):
        made = method.compress(unit, weights, biases, statistics(unit, correlated(20)), amount)[""]
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        given = {t.data_ptr() for t in (*weights.values(), *biases.values())}
        assert not given & {p.data_ptr() for p in made.parameters()}


@pytest.mark.parametrize(
    "amount",
    [0, 3, None, {"qk": 4}, {"qk": 0, "vo": 4}, {"qk": 5, "vo": 4}, {"qk": 4, "vo": 9}, {"qk": True, "vo": 4},
     {"qk": 2.0, "vo": 4}, {"qk": 2, "vo": 4, "mlp": 1}, {"qk": 2, "up": 4}],
)  # fmt: skip
def test_an_amount_that_heads_do_not_have_is_refused(amount):
    unit, method = attention(4, 2)
    with pytest.raises(RecipeError, match="wanted"):
        method.compress(unit, weights_of(unit), {}, statistics(unit, correlated(20)), amount)


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"ridge": float("nan")}, {"damping": -1.0}, {"damping": 0.0}])
def test_a_field_out_of_range_is_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        ModularDecomposition(**wrong)


def test_numbers_that_are_not_finite_are_refused():
    unit, method = attention(4, 2)
    weights, stats = weights_of(unit), statistics(unit, correlated(20))
    for role in weights:
        broken = {name: w.clone() for name, w in weights.items()}
        broken[role][1, 1] = torch.nan
        with pytest.raises(NumericalError, match="finite"):
            method.options(unit, broken, stats)
        with pytest.raises(NumericalError, match="finite"):
            method.compress(unit, broken, {}, stats, {"qk": 2, "vo": 4})
    x = correlated(20)
    x[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="finite"):
        method.options(unit, weights, statistics(unit, x))


def test_heads_that_do_not_fit_are_refused():
    unit, _ = attention(4, 2)
    for changes in ({"query_heads": 3}, {"key_width": 6}, {"hidden": 19}):
        _, other = attention(4, 2, **changes)
        with pytest.raises(AnatomyError, match=r"divide|ask for weights"):
            other.check(unit)


def test_a_gram_matrix_without_a_factor_says_what_would_help():
    gram = torch.ones(4, 4, dtype=torch.float64)
    gram[0, 0] = -1.0
    with pytest.raises(NumericalError, match="calibrate on more tokens than inputs, or give a larger ridge"):
        leverage(gram, 0.0)
