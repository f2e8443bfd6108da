"""A factor that several linears share: computed once, stored once, counted once; and the two methods that make such.

W_i are the members of a group, up_i · down what stands in their places, M the metric of what they read.
"""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from families import tiny_batch, tiny_model
from tersely.allocate import curve_of, uniform
from tersely.anatomy import Site, Unit, anatomy_of, depth_units, reading_units
from tersely.bench import entry_of
from tersely.calibrate import Blocks, Replay
from tersely.checkpoint import open_source
from tersely.errors import CheckpointError, RecipeError
from tersely.estimate import estimate
from tersely.export import export
from tersely.gradients import gather
from tersely.hf import manifest_config
from tersely.kernels import Quicker
from tersely.kinds import (
    Kind,
    LowRankLinear,
    Made,
    PivotedLinear,
    QuantizedLinear,
    SharedLinear,
    SumLinear,
    link,
    manifest_of,
    shared_bytes,
    shared_from_factors,
)
from tersely.kinds.pivoted import BOUND
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.basis_sharing import BasisSharing
from tersely.methods.low_rank.joint import JointRank
from tersely.pipeline import Result, load, run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.stats import Fisher, Gram, MeanGradient, Stats
from tersely.train.relax.adapter import Adapter
from tersely.train.relax.full import Full
from tersely.train.standing import harden, relax_sites
from tersely.verify import verify
from test_resume import Kill, contents

ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(first: Tensor, second: Tensor) -> float:
    """‖first - second‖ / ‖second‖."""
    whole = second.norm().item()
    return (first - second).norm().item() / whole if whole else first.norm().item()


def factors(model: nn.Module, names: list[str], rank: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    weights = {name: model.get_submodule(name).weight for name in names}
    first = next(iter(weights.values()))
    ups = {n: normal(len(w), rank, seed=i).to(w) for i, (n, w) in enumerate(weights.items())}
    return ups, normal(rank, first.shape[1], seed=9).to(first) / 6


def sharing(
    dtype: torch.dtype = torch.float32, *, pivot: bool = False, link_blocks: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Kind]]:
    """A tiny Llama whose q, k, v and gate, up share a factor in every block (or q and k over both blocks); the same
    with factors of their own; and the shared modules."""
    model, alone = tiny_model("llama").to(dtype), tiny_model("llama").to(dtype)
    if link_blocks:
        groups = [[ATTENTION.format(block, role) for block in range(2)] for role in "qk"]
    else:
        groups = [[ATTENTION.format(block, role) for role in "qkv"] for block in range(2)]
        groups += [[MLP.format(block, role) for role in ("gate", "up")] for block in range(2)]
    made: dict[str, Kind] = {}
    for names in groups:
        ups, down = factors(model, names)
        made |= shared_from_factors(ups, down, pivot=pivot, same_input=not link_blocks)
        for name, up in ups.items():
            alone.set_submodule(name, LowRankLinear.from_factors(up, down))
    for name, kind in made.items():
        model.set_submodule(name, kind.eval())
    link(model)
    return model.eval(), alone.eval(), made


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that are called within, once for every call."""
    calls: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda module, read, out: calls.append(module)) for m in modules]
    yield calls
    for hook in hooks:
        hook.remove()


def downs(model: nn.Module) -> list[nn.Module]:
    return [module.down for module in model.modules() if isinstance(module, SharedLinear) and module.owner]


def holds_nothing(model: nn.Module) -> bool:
    return all(module._latest._held is None for module in model.modules() if isinstance(module, SharedLinear))


MODES = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}


# --- computed once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_forward_pass_computes_each_factor_once_and_says_the_same_bit_for_bit(mode, dtype):
    model, alone, _ = sharing(dtype)
    batch = tiny_batch()
    with mode(), counted(*downs(model)) as calls:
        logits = model(**batch).logits
        assert len(calls) == len(set(calls)) == 4
        assert holds_nothing(model)
        assert torch.equal(logits, alone(**batch).logits)
        calls.clear()
        cached = model.generate(batch["input_ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert len(calls) == 4 * 4  # a prompt and three tokens
    assert torch.equal(
        cached, model.generate(batch["input_ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_of_factors_of_their_own_with_and_without_checkpoints(reentrant):
    model, alone, _ = sharing(torch.float64)
    batch = tiny_batch()["input_ids"]
    for made in (model, alone):
        made(batch).logits.square().mean().backward()
    wanted = model.get_input_embeddings().weight.grad.clone()
    assert off(wanted, alone.get_input_embeddings().weight.grad) < 1e-12
    first = ATTENTION.format(0, "q")
    summed = sum(alone.get_submodule(ATTENTION.format(0, role)).down.weight.grad for role in "qkv")
    assert off(model.get_submodule(first).down.weight.grad, summed) < 1e-12
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with counted(*downs(model)) as calls:
        model(batch).logits.square().mean().backward()
    assert len(calls) == 2 * 4  # and once more in the backward pass
    assert off(model.get_input_embeddings().weight.grad, wanted) < 1e-12


def test_checkpoints_of_one_input_again_and_again_never_see_old_numbers():
    """The recomputation stops where it has what it needs; what it left must not reach the next pass."""
    _, _, made = sharing(torch.float64)
    q, k, v = (made[ATTENTION.format(0, role)] for role in "qkv")
    x = normal(2, 32).requires_grad_()
    for step in range(3):
        out = checkpoint(lambda read: v(read).sum() + q(read).sum() + k(read)[..., :3].sum(), x, use_reentrant=False)
        wanted = (x @ v.to_dense().T).sum() + (x @ q.to_dense().T).sum() + (x @ k.to_dense().T)[..., :3].sum()
        torch.testing.assert_close(out, wanted)
        out.backward()
        with torch.no_grad():
            q.down.weight.add_(step + 1.0)


def test_every_order_of_calls_gives_the_right_numbers():
    _, _, made = sharing(torch.float64)
    owner, *_ = members = [made[ATTENTION.format(0, role)] for role in "qkv"]
    x = normal(3, 32)
    wanted = [x @ module.to_dense().T for module in members]
    with torch.no_grad(), counted(owner.down) as calls:
        for order, computed in ([2, 1, 0], 1), ([1], 1), ([1], 1), ([0, 2], 1), ([1, 1, 0, 2, 2], 3):
            calls.clear()
            owner._latest._held = None
            for place in order:
                assert off(members[place](x), wanted[place]) < 1e-13
            assert len(calls) == computed, order


def test_what_changed_between_two_calls_is_seen():
    _, _, made = sharing(torch.float64)
    owner, member = made[ATTENTION.format(0, "q")], made[ATTENTION.format(0, "k")]
    x = normal(3, 32)
    with torch.no_grad():
        owner(x)
        x.mul_(2)  # the same tensor, other numbers
        assert off(member(x), x @ member.to_dense().T) < 1e-13
        owner(x)
        owner.down.weight.mul_(3)
        assert off(member(x), x @ member.to_dense().T) < 1e-13
        owner(x)
        owner.down = nn.Linear(32, 6, bias=False, dtype=torch.float64)
        assert off(member(x), x @ member.to_dense().T) < 1e-13
        owner(x)
    assert member(x).requires_grad, "computed without gradients, and taken where they are wanted"


def test_a_product_goes_with_its_input():
    _, _, made = sharing(torch.float64)
    owner = made[ATTENTION.format(0, "q")]
    x = normal(3, 32)
    with torch.no_grad():
        owner(x)
    assert owner._latest._held is not None
    del x
    assert owner._latest._held is None


def test_members_that_read_different_tensors_remember_nothing():
    model, alone, _ = sharing(link_blocks=True)
    with torch.no_grad(), counted(*downs(model)) as calls:
        assert torch.equal(model(**tiny_batch()).logits, alone(**tiny_batch()).logits)
    assert len(calls) == 4
    assert holds_nothing(model)


def test_a_compiler_is_given_plain_products(monkeypatch):
    """It finds those that are one by itself; what is remembered between calls would be no graph."""
    _, _, made = sharing()
    members, x = [made[ATTENTION.format(0, role)] for role in "qkv"], normal(3, 32).float()
    wanted = [module(x) for module in members]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with counted(members[0].down) as calls:
        for module, out in zip(members, wanted, strict=True):
            assert torch.equal(module(x), out)
    assert len(calls) == 3
    assert members[0]._latest._held is None


# --- one owner --------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_stay_together():
    model, _, _ = sharing()
    batch = tiny_batch()
    model.get_submodule(ATTENTION.format(0, "q"))(normal(2, 32).float())  # something to remember
    with torch.no_grad():
        wanted = model(**batch).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            owner, member = (twin.get_submodule(ATTENTION.format(0, role)) for role in "qk")
            assert member.holder is owner is not model.get_submodule(ATTENTION.format(0, "q"))
            assert twin.state_dict().keys() == model.state_dict().keys()
            with counted(*downs(twin)) as calls:
                assert torch.equal(twin(**batch).logits, wanted)
            assert len(calls) == 4
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".down.weight")]
    assert len(names) == 4 and all("q_proj" in name or "gate_proj" in name for name in names)


def test_an_owner_is_found_wherever_it_went():
    model, _, _ = sharing(torch.float64)
    name = ATTENTION.format(0, "q")
    owner = copy.deepcopy(model.get_submodule(name))
    with torch.no_grad():
        owner.down.weight.mul_(2)
    update = LowRankLinear.from_factors(normal(32, 2), normal(2, 32))
    model.set_submodule(name, SumLinear.of([owner, update]))
    link(model)
    member = model.get_submodule(ATTENTION.format(0, "k"))
    assert member.holder is owner
    with torch.no_grad(), counted(*downs(model)) as calls:
        model(**tiny_batch())
    assert len(calls) == 4


def test_who_has_no_owner_or_two_is_refused():
    _, _, made = sharing()
    member = copy.deepcopy(made[ATTENTION.format(0, "k")])
    member._owner = ()
    with pytest.raises(CheckpointError, match=r"shared factor model\.layers\.0\.self_attn\.q_proj is missing"):
        member(torch.zeros(1, 32))
    with pytest.raises(CheckpointError, match="missing"):
        link(nn.ModuleDict({"k": member}))
    owner = made[ATTENTION.format(0, "q")]
    with pytest.raises(CheckpointError, match=r"b: the shared factor .* has an owner already"):
        link(nn.ModuleDict({"a": owner, "b": copy.deepcopy(owner)}))
    member.rank = 5
    with pytest.raises(CheckpointError, match="k: a member of rank 5"):
        link(nn.ModuleDict({"q": owner, "k": member}))


def test_a_folder_whose_owner_is_missing_is_refused(tmp_path, tokenizer):
    model, _, _ = sharing()
    manifest = manifest_of(model)
    manifest[ATTENTION.format(0, "q")]["owner"] = False
    model.config.quantization_config = manifest_config(manifest)
    model.save_pretrained(tmp_path)
    for read in (open_source, load):
        with pytest.raises(CheckpointError, match=r"q_proj: the owner of the shared factor .* is missing"):
            read(tmp_path)


# --- pivoted ----------------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    width=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_a_pivoted_stack_is_the_same_in_fewer_numbers(counts, width, rank, seed):
    rank = min(rank, sum(counts) - 1)
    ups = {f"w{i}": normal(rows, rank, seed=seed + i) for i, rows in enumerate(counts)}
    down = normal(rank, width, seed=seed + 9)
    made = shared_from_factors(ups, down, pivot=True)
    plain = shared_from_factors(ups, down)
    x = normal(4, width, seed=seed)
    for name, up in ups.items():
        assert off(made[name].to_dense(), up @ down) <= 1e-11
        assert off(made[name](x), x @ (up @ down).T) <= 1e-11
        if made[name].rows:
            assert made[name].rest.weight.abs().max() <= BOUND * (1 + 1e-9)
        assert torch.equal(plain[name].to_dense(), up @ down)
    numbers = sum(t.numel() for kind in made.values() for n, t in kind.state_dict().items() if n != "place")
    assert numbers == rank * (sum(counts) + width) - rank**2
    assert sum(kind.nbytes() for kind in made.values()) == shared_bytes(counts, width, rank, 8, pivot=True)
    assert sum(kind.nbytes() for kind in plain.values()) == shared_bytes(counts, width, rank, 8)


def test_a_member_all_of_whose_rows_are_chosen_stores_none():
    ups = {"loud": torch.eye(3, 3).double() * 100, "quiet": normal(5, 3) * 0.01}
    made = shared_from_factors(ups, normal(3, 7), pivot=True)
    assert made["loud"].rows == 0 and not hasattr(made["loud"], "rest")
    assert off(made["loud"].to_dense(), ups["loud"] @ normal(3, 7)) < 1e-12
    with pytest.raises(CheckpointError, match="rank 8 with 8 rows"):
        shared_from_factors({"a": normal(3, 8), "b": normal(5, 8)}, normal(8, 9), pivot=True)


# --- who shares -------------------------------------------------------------------------------------------------------


def words(units: tuple[Unit, ...]) -> list[list[str]]:
    return [list(unit.sites) for unit in units]


def test_linears_that_read_one_tensor_stand_together():
    sites = anatomy_of(tiny_model("llama")).sites
    units = reading_units(sites)
    assert words(units) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] * 2
    assert [unit.name for unit in units[:3]] == [
        "model.layers.0:attention.q+k+v", "model.layers.0:attention.o", "model.layers.0:mlp.gate+up"
    ]  # fmt: skip
    assert words(JointRank().units(sites))[:3] == [["q", "k"], ["v"], ["o"]]
    assert words(reading_units(sites[1:3])) == [["k", "v"]], "of what was chosen"
    for unit in units:
        assert len({site.reads for site in unit.sites.values()}) == 1
    fused = reading_units(anatomy_of(tiny_model("gpt2")).sites)
    assert words(fused)[:4] == [["qkv"], ["o"], ["up"], ["down"]]


def test_blocks_share_by_role():
    config = tiny_model("llama").config
    config.num_hidden_layers = 5
    sites = anatomy_of(tiny_model("llama", config=config)).sites
    units = depth_units(sites, 2, ("q", "k"))
    assert {tuple(unit.sites) for unit in units if "q" in unit.name.rpartition(".")[2]} == {
        ("q.0", "q.1"), ("q.2", "q.3"), ("q.4",)
    }  # fmt: skip
    assert {unit.name for unit in units} >= {"model.layers.0-1:attention.q", "model.layers.4:attention.q"}
    assert (
        sum(len(unit.sites) for unit in units) == len(sites) == len({s.name for u in units for s in u.sites.values()})
    )
    for unit in units:
        assert unit.block == max(site.block for site in unit.sites.values())


def test_later_steps_see_one_input_where_there_is_one():
    model, _, _ = sharing()
    by_input = dict(anatomy_of(model).inputs(0))
    names = [[site.name.removeprefix("model.layers.0.") for site in sites] for sites in by_input.values()]
    assert names[:2] == [["self_attn.q_proj.down"], [f"self_attn.{role}_proj.up" for role in "qkv"]]
    apart, _, _ = sharing(link_blocks=True)
    for sites in dict(anatomy_of(apart).inputs(0)).values():
        assert len([site for site in sites if site.name.endswith(".up")]) <= 1


# --- joint rank -------------------------------------------------------------------------------------------------------


def unit_of(*shapes: tuple[int, int], role: str = "reads") -> Unit:
    """Linears of these shapes, by the words a, b, …; `reads` and blocks as the role has them."""
    sites = {}
    for number, ((rows, columns), word) in enumerate(zip(shapes, "abcd", strict=False)):
        block = number if role == "depth" else 0
        sites[word] = Site(f"blocks.{block}.{word}", word, block, f"blocks.{block}:in", rows, columns, False, False)
    return Unit("unit", role, 0, sites, "", None, True)


def seen(width: int, seed: int = 1, tokens: int = 100) -> Stats:
    stats = Stats({Gram: Gram(width)})
    stats.update(normal(tokens, width, seed=seed) * torch.logspace(0.5, -1, width, dtype=torch.float64))
    return stats


SHAPES = {"square": ((10, 10), (10, 10)), "grouped": ((12, 8), (3, 8), (3, 8)), "wide": ((2, 9), (3, 9))}
every_group = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


def lost(kinds: dict[str, Kind], weights: dict[str, Tensor], metrics: dict[str, Tensor]) -> float:
    """Σ_i ‖(W_i - W'_i) M_i^½‖²."""
    differences = {role: weights[role] - kinds[role].to_dense() for role in weights}
    return sum(((d @ metrics[role]) * d).sum().item() for role, d in differences.items())


@every_group
@pytest.mark.parametrize("normalise", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("metric", ["none", "gram"])
def test_the_joint_loss_is_what_was_dropped(shapes, metric, normalise):
    unit, width = unit_of(*shapes), shapes[0][1]
    weights = {role: normal(rows, width, seed=i) * 10**i for i, (role, (rows, _)) in enumerate(named(shapes))}
    stats = dict.fromkeys(weights, seen(width))
    measured = stats["a"][Gram].mean() if metric == "gram" else torch.eye(width).double()
    method = JointRank(metric, normalise=normalise, damping=0.0)
    scales = method.scales(list(weights.values()), measured)
    stacked = torch.cat([weight / scale for weight, scale in zip(weights.values(), scales, strict=True)])
    values = torch.linalg.svdvals(stacked @ torch.linalg.cholesky(measured)).square()
    metrics = {role: measured / scale**2 for role, scale in zip(weights, scales, strict=True)}
    energy = sum(((weight @ measured) * weight).sum().item() for weight in weights.values())
    for pivot in (False, True):
        chosen = replace(method, pivot=pivot)
        options = chosen.options(unit, weights, stats)
        assert options[0].error == pytest.approx(energy, rel=1e-10)
        for option in options[1:]:
            made = chosen.compress(unit, weights, {}, stats, option.amount)
            assert lost(made, weights, metrics) == pytest.approx(option.error, rel=1e-6, abs=1e-10 * energy)
            assert sum(kind.nbytes() for kind in made.values()) == option.nbytes
            if isinstance(option.amount, int):
                assert option.error == pytest.approx(values[option.amount :].sum().item(), abs=1e-10 * energy)
    whole = method.compress(unit, weights, {}, stats, min(len(stacked), width))
    assert all(off(whole[role].to_dense(), weights[role]) < 1e-10 for role in weights)


def named(shapes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    return zip("abc"[: len(shapes)], shapes, strict=True)


def test_normalised_members_count_by_their_size_and_what_rank_one_leaves():
    """One of them is ten thousand times as loud, and has a direction that is louder still; the others do not notice."""
    unit, stats = unit_of((8, 8), (8, 8)), dict.fromkeys("ab", seen(8))
    quiet, loud = normal(8, 8), normal(8, 8, seed=1)
    weights = {"a": 1e4 * (loud + 1e3 * normal(8, 1, seed=2) @ normal(1, 8, seed=3)), "b": quiet}
    gram = stats["a"][Gram].mean()

    def shares(normalise: bool) -> list[float]:
        """What is lost, over what the best rank 1 leaves."""
        made = JointRank("gram", normalise=normalise).compress(unit, weights, {}, stats, 6)
        of_one = [output_basis(weights[role], gram).left_over()[1].item() for role in "ab"]
        return [lost({r: made[r]}, {r: weights[r]}, {r: gram}) / one for r, one in zip("ab", of_one, strict=True)]

    assert max(shares(False)) > 5 * max(shares(True))
    scales = JointRank("gram", normalise=True).scales(list(weights.values()), gram)
    far = JointRank("gram", normalise=True).scales([weight * 1e12 for weight in weights.values()], gram)
    assert far == pytest.approx(scales)
    flat = [torch.ones(3, 8).double(), torch.zeros(2, 8).double()]
    assert all(0 < scale < float("inf") for scale in JointRank(normalise=True).scales(flat, None))


def spectrum(power: float, width: int = 256) -> Tensor:
    return torch.arange(1, width + 1, dtype=torch.float64) ** -power


def turned(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


@pytest.mark.parametrize(
    ("power", "related", "ratio"),
    [
        (0.0, True, 1.01),
        (0.5, True, 0.91),
        (1.0, True, 0.76),
        (1.5, True, 0.61),
        (0.5, False, 1.14),
        (1.0, False, 1.45),
    ],
    ids=["white", "slow", "falling", "steep", "slow, unrelated", "falling, unrelated"],
)
def test_sharing_pays_where_input_spaces_are_alike_and_the_better_one_is_taken(power, related, ratio):
    """Two square weights at half of their numbers: squared error of one factor over that of two."""
    width = 256
    weights = {}
    for number, role in enumerate("ab"):
        turn = torch.eye(width).double() if related else turned(width, 10 + number)
        weights[role] = normal(width, width, seed=number) * spectrum(power) @ turn
    unit = unit_of((width, width), (width, width))
    options = JointRank().options(unit, weights, {})
    by_amount = {str(option.amount): option for option in options}
    shared, alone = by_amount["85"], by_amount["[64, 64]"]
    assert shared.nbytes == pytest.approx(alone.nbytes, rel=0.01)
    assert shared.error / alone.error == pytest.approx(ratio, abs=0.02)
    offered = curve_of("unit", options, 2 * width**2 * 8).options[:-1]
    near = [o for o in offered if abs(o.nbytes - alone.nbytes) < 0.05 * alone.nbytes]
    joint = sum(isinstance(option.amount, int) for option in near) / len(near)
    assert joint > 0.9 if ratio < 0.95 else joint < 0.6


def test_members_by_themselves_take_the_same_share_each():
    unit = unit_of((12, 8), (3, 8))
    for option in JointRank(share="all").sizes(unit, 4):
        if isinstance(option.amount, list):
            shares = [
                (rank * (rows + 8) / (rows * 8), (rank + 1) * (rows + 8) / (rows * 8), rank == min(rows, 8))
                for rank, rows in zip(option.amount, (12, 3), strict=True)
            ]
            # no rank more would fit into a share that the other one needs
            assert all(least < above or most for least, _, _ in shares for _, above, most in shares)
    assert not any(isinstance(o.amount, list) for o in JointRank(compare=False).sizes(unit, 4))


def test_what_makes_no_sense_is_refused():
    unit, weights = unit_of((4, 8), (3, 8)), {"a": normal(4, 8), "b": normal(3, 8)}
    for amount in (8, 0, None, True, "2", {"rank": 2}, [1], [1, 9]):
        with pytest.raises(RecipeError):
            JointRank().compress(unit, weights, {}, {}, amount)
    with pytest.raises(RecipeError, match="layers 1"):
        BasisSharing(layers=1)
    for method in (JointRank, BasisSharing):
        with pytest.raises(RecipeError, match="damping -1"):
            method(damping=-1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_change_nothing(scale):
    unit = unit_of((6, 8), (5, 8))
    weights = {"a": normal(6, 8), "b": normal(5, 8, seed=1)}
    plain, far = seen(8), Stats({Gram: Gram(8)})
    far.update(normal(100, 8, seed=1) * torch.logspace(0.5, -1, 8, dtype=torch.float64) * scale)
    for method in (JointRank("gram", normalise=True), JointRank("gram", pivot=True)):
        first = method.compress(unit, weights, {}, dict.fromkeys("ab", plain), 4)
        second = method.compress(unit, weights, {}, dict.fromkeys("ab", far), 4)
        for role in "ab":
            assert off(second[role].to_dense(), first[role].to_dense()) < 1e-6


# --- basis sharing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [False, True])
def test_the_pooled_loss_is_what_was_dropped_and_predicted_is_what_each_loses_on_its_own_inputs(pivot):
    unit = unit_of((7, 9), (7, 9), role="depth")
    weights = {role: normal(7, 9, seed=i) for i, role in enumerate("ab")}
    stats = {role: seen(9, seed=5 + i) for i, role in enumerate("ab")}
    grams = {role: stats[role][Gram].mean() for role in "ab"}
    pooled = grams["a"] + grams["b"]
    values = torch.linalg.svdvals(torch.cat(list(weights.values())) @ torch.linalg.cholesky(pooled)).square()
    method = BasisSharing(damping=0.0, pivot=pivot)
    options = method.options(unit, weights, stats)
    errors = []
    for option in options[1:]:
        made = method.compress(unit, weights, {}, stats, option.amount)
        of_pool = lost(made, weights, dict.fromkeys("ab", pooled))
        assert of_pool == pytest.approx(values[option.amount :].sum().item(), rel=1e-9, abs=1e-10 * values.sum().item())
        errors.append(lost(made, weights, grams))
        assert sum(kind.nbytes() for kind in made.values()) == option.nbytes
        assert not any(kind.same_input for kind in made.values())
    for option, after in zip(options[1:], range(len(errors)), strict=True):
        assert option.error == pytest.approx(max(errors[after:]), rel=1e-8, abs=1e-9 * options[0].error)
    assert options[-1].error < 1e-9 * options[0].error


def test_shared_bases_and_coefficients_are_those_of_the_paper():
    """Basis S⁻¹ U_k Σ_k and coefficients V_kᵀ of U Σ Vᵀ = S [W_1 W_2], weights as [in, out] and SᵀS the pooled Gram
    matrix."""
    unit = unit_of((7, 9), (7, 9), role="depth")
    weights = {role: normal(7, 9, seed=i) for i, role in enumerate("ab")}
    stats = {role: seen(9, seed=5 + i) for i, role in enumerate("ab")}
    root = torch.linalg.cholesky(stats["a"][Gram].mean() + stats["b"][Gram].mean()).T
    u, s, vh = torch.linalg.svd(root @ torch.cat([weight.T for weight in weights.values()], 1), full_matrices=False)
    for rank in (1, 4, 8):
        made = BasisSharing(damping=0.0).compress(unit, weights, {}, stats, rank)
        basis = torch.linalg.solve(root, u[:, :rank] * s[:rank])
        for role, coefficients in zip("ab", vh[:rank].split(7, dim=1), strict=True):
            assert off(made[role].to_dense(), (basis @ coefficients).T) < 1e-9


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_a_shared_rank_is_that_of_the_papers(keep):
    """⌊ρ n Σm / (n + Σm)⌋: two square weights 2ρd/3, gate and up 2ρfd / (2f + d), g blocks ρ n m g / (n + m g)."""
    for shapes in (((32, 32),) * 2, ((20, 32),) * 3, ((88, 32),) * 2, ((32, 32), (8, 32), (8, 32))):
        rows, width = sum(shape[0] for shape in shapes), 32
        wanted = int(Fraction(str(keep)) * rows * width / (rows + width))
        for method, unit in (
            (JointRank(share="all", compare=False), unit_of(*shapes)),
            (BasisSharing(layers=len(shapes)), unit_of(*shapes, role="depth")),
        ):
            curve = curve_of("unit", method.sizes(unit, 2), rows * width * 2)
            plan = uniform([curve], int(Fraction(str(keep)) * rows * width * 2))
            assert plan.choices["unit"].amount == wanted


# --- runs -------------------------------------------------------------------------------------------------------------


def recipe(model: Path, text: Path, *steps: dict[str, object]):
    calibration = {"source": [str(text)], "length": 32, "samples": 16}
    return recipe_from({"model": str(model), "step": list(steps), "calibration": calibration})


JOINT = {"method": "joint_rank", "keep": 0.6, "metric": "gram", "share": "all", "compare": False, "allocate": "uniform"}
DEEP = {"method": "basis_sharing", "keep": 0.6, "propagate": "none", "allocate": "greedy"}
STEPS = {
    "reads": JOINT,
    "reads, pivoted": JOINT | {"pivot": True, "allocate": "greedy", "compare": True},
    "data-free": {"method": "joint_rank", "keep": 0.6, "allocate": "greedy"},
    "depth": DEEP,
    "depth, pivoted": DEEP | {"pivot": True, "allocate": "uniform"},
}
LATER = {"method": "gptq", "target": ["*.down", "*.up"], "width": 4, "group": 0, "allocate": "uniform"}
NEAREST = LATER | {"method": "rtn", "target": ["*.down", "*.rest"]}
RUNS = {name: [step] for name, step in STEPS.items()} | {
    "reads, then rounded": [JOINT, LATER],
    "depth, then rounded": [DEEP, LATER],
    "depth, pivoted, then rounded": [DEEP | {"pivot": True}, NEAREST],
}


@pytest.fixture(scope="module")
def result(tmp_path_factory, model_folder, text_file) -> Callable[[str], Result]:
    """A function: name of a run → what it left.  Read-only."""
    found: dict[str, Result] = {}

    def make(name: str) -> Result:
        if name not in found:
            out = tmp_path_factory.mktemp("shared-") / "out"
            found[name] = run(prepare(recipe(model_folder(), text_file, *RUNS[name]), out))
            assert found[name].report.degraded == {}
            assert all(check.passed for check in verify(out))
        return found[name]

    return make


@pytest.mark.parametrize("name", STEPS)
def test_bytes_on_disk_are_those_of_the_formula_and_counted_once(name, result):
    done, step = result(name), STEPS[name]
    model, stored = load(done.out), load_file(done.out / "model.safetensors")
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, Kind)}
    groups: dict[str, list[SharedLinear]] = {}
    formula = 0
    for module in kinds.values():
        if isinstance(module, SharedLinear):
            groups.setdefault(module.group, []).append(module)
        else:
            assert isinstance(module, LowRankLinear | PivotedLinear)
            formula += module.nbytes()
    assert groups, "nothing is shared"
    for members in groups.values():
        assert len(members) > 1 and sum(module.owner for module in members) == 1
        counts = [module.out_features for module in members]
        formula += shared_bytes(counts, members[0].in_features, members[0].rank, 4, bool(step.get("pivot")))
    ours = [tensor for name, tensor in stored.items() if name.startswith(tuple(f"{kind}." for kind in kinds))]
    assert sum(tensor.nbytes for tensor in ours) == formula
    dense = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("proj.weight"))
    (row,) = [row for row in done.report.rows if row.name == "touched weights"]
    assert row.value == formula + dense
    cut = [site for site in done.report.sites if site.amount is not None]
    assert cut
    for site in cut:
        assert 0 < site.measured_error < 1


@pytest.mark.parametrize("name", ["reads, pivoted", "depth"])
def test_stopped_it_ends_with_the_same_bytes(name, result, model_folder, text_file, tmp_path, monkeypatch):
    asked, kill = recipe(model_folder(), text_file, *RUNS[name]), Kill(monkeypatch)
    with kill.at(9), pytest.raises(KeyboardInterrupt):
        run(prepare(asked, tmp_path / "out"))
    run(prepare(asked, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(result(name).out)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in STEPS])
def test_a_later_step_quantizes_the_parts_and_the_model_exports(name, result, tmp_path):
    model = load(result(name).out)
    found = [module for module in model.modules() if isinstance(module, SharedLinear)]
    assert found
    for module in found:
        assert isinstance(module.holder.down, QuantizedLinear)
        assert isinstance(module.up if module.rows is None else module.rest, QuantizedLinear)
        assert off(module(torch.eye(module.in_features)).T.detach(), module.to_dense()) < 1e-5
    export(result(name).out, tmp_path / "dense", "dense")
    with torch.no_grad():
        wanted, dense = model(**tiny_batch()).logits, load(tmp_path / "dense")(**tiny_batch()).logits
    assert off(dense, wanted) < 1e-5


def test_sharing_in_depth_need_not_be_told_what_it_can_do_alone(model_folder, text_file, tmp_path):
    left_open = {key: value for key, value in DEEP.items() if key != "propagate"}
    asked = recipe(model_folder(), text_file, left_open)
    assert prepare(asked, tmp_path / "out").recipe.step[0].propagate == "none"
    estimate(asked)
    assert entry_of(asked).propagate == "none"
    assert prepare(recipe(model_folder(), text_file, JOINT), tmp_path / "out").recipe.step[0].propagate == "block"


def test_blocks_that_share_are_cut_after_all_of_them_were_seen(model_folder, text_file, tmp_path):
    for propagate in ("block", "input"):
        with pytest.raises(RecipeError, match=r'several blocks share a factor, .* propagate = "none"'):
            prepare(recipe(model_folder(), text_file, DEEP | {"propagate": propagate}), tmp_path / "out")
    only = DEEP | {"target": ["attention.o", "mlp.down"], "propagate": "block"}
    prepare(recipe(model_folder(), text_file, only), tmp_path / "out")  # none of these is shared


@pytest.mark.parametrize("name", ["depth", "depth, pivoted, then rounded"])
def test_a_block_by_itself_reads_the_factor_that_another_one_owns(name, result):
    """In replay, as it is and after a step that has cut the owner."""
    windows = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    source = open_source(result(name).out)
    anatomy = anatomy_of(source.skeleton())
    blocks, replay = Blocks(source, anatomy, "cpu"), Replay(source, anatomy, windows, "cpu")
    for index in range(2):
        replay.observe(blocks.dense(index), {}, advance=True)
    model = load(source.folder)
    with torch.no_grad(), Quicker():
        wanted = model.model(windows, use_cache=False).last_hidden_state
        assert torch.equal(model.model.norm(replay.hidden(0)), wanted)


def test_a_second_step_sees_what_it_has_made_of_an_owner_in_a_block_before(result, model_folder, text_file, tmp_path):
    """With propagate = "block" the last block is observed behind cut ones, of which one owns its factors."""
    seen = []

    class Watching(Blocks):
        def cut(self, index: int, replaced: Mapping[str, Made]) -> nn.Module:
            block = super().cut(index, replaced)
            seen.extend(
                isinstance(module.holder.down, QuantizedLinear)
                for module in block.modules()
                if index == 1 and replaced and isinstance(module, SharedLinear) and not module.owner
            )
            return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersely.sweeps.Blocks", Watching)
        run(prepare(recipe(result("depth").out, text_file, LATER | {"propagate": "block"}), tmp_path / "out"))
    assert seen and all(seen)


def test_a_group_is_measured_in_the_model_and_put_back(model_folder, text_file, tmp_path):
    """An allocator that has the model measured."""
    done = run(prepare(recipe(model_folder(), text_file, DEEP | {"allocate": "lems"}), tmp_path / "out"))
    assert all(check.passed for check in verify(done.out))


def test_an_adapter_heals_a_shared_model(result, text_file, tmp_path):
    heal = {"train": ["logits"], "relax": "adapter", "rank": 2, "tokens": 256, "batch": 4, "held_out": 0}
    done = run(prepare(recipe(result("depth").out, text_file, heal), tmp_path / "out"))
    assert all(check.passed for check in verify(done.out))
    owners = [name for name, part in load(done.out).named_modules() if isinstance(part, SharedLinear) and part.owner]
    assert owners and all(owner.endswith(".terms.0") for owner in owners)


@pytest.mark.parametrize("pivot", [False, True])
def test_each_factor_of_a_shared_model_heals_by_itself(pivot):
    """`down` with its owner, whoever else is named; after it the group is still one."""
    model, _, made = sharing(pivot=pivot)
    batch = tiny_batch()
    with torch.no_grad():
        before = model(**batch).logits
    stored = sum(kind.nbytes() for kind in made.values())
    for factor in ("rest" if pivot else "up", "down"):
        generator = torch.Generator().manual_seed(0)
        relaxed = relax_sites(model, list(made), Adapter(rank=2, factors=(factor,)), {}, generator)
        trained = {name for name, module in relaxed.items() if module.groups()["adapters"]}
        assert factor != "down" or trained == {name for name, kind in made.items() if kind.owner}
        torch.testing.assert_close(model(**batch).logits, before)
        with torch.no_grad():
            for parameter in (p for module in relaxed.values() for p in module.groups()["adapters"]):
                parameter.add_(0.01)
            after = model(**batch).logits
            harden(model, relaxed)
            torch.testing.assert_close(model(**batch).logits, after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)
        before = model(**batch).logits.detach()
    now = [model.get_submodule(name) for name in made]
    assert sum(kind.nbytes() for kind in now) == stored and len(downs(model)) == 4


def test_numbers_that_others_compute_with_do_not_train_in_another_dtype():
    names = [ATTENTION.format(0, role) for role in "qkv"]
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(RecipeError, match=f"shared with other linears, which compute with it in {dtype}"):
            relax_sites(sharing(dtype)[0], names, Full(), {}, torch.Generator())
    model, _, _ = sharing()
    relax_sites(model, names, Full(), {}, torch.Generator())
    model(**tiny_batch()).logits.sum().backward()


@pytest.mark.parametrize("pivot", [False, True])
def test_all_numbers_of_a_shared_model_train_in_float32(pivot):
    model, _, made = sharing(pivot=pivot)
    relaxed = relax_sites(model, list(made), Full(), {}, torch.Generator())
    before = model(**tiny_batch()).logits
    before.sum().backward()
    assert all(p.grad is not None for module in relaxed.values() for p in module.groups()["weights"])
    assert sum(module.bits().item() for module in relaxed.values()) == 8 * sum(kind.nbytes() for kind in made.values())
    harden(model, relaxed)
    torch.testing.assert_close(model(**tiny_batch()).logits, before)


@pytest.mark.parametrize("step", [JOINT, DEEP], ids=["reads", "depth"])
def test_what_cannot_train_is_refused_before_anything_is_cut(step, model_folder, text_file, tmp_path):
    heal = {"train": ["logits"], "relax": "full", "tokens": 256, "batch": 4, "held_out": 0}
    asked = recipe(model_folder(), text_file, step, heal)
    with pytest.raises(RecipeError, match=r"shared with other linears, .* in torch\.bfloat16"):
        prepare(replace(asked, dtype="bfloat16"), tmp_path / "out")
    prepare(asked, tmp_path / "out")
    elsewhere = replace(asked.step[1], target=["mlp.down"])
    prepare(replace(asked, dtype="bfloat16", step=[asked.step[0], elsewhere]), tmp_path / "out")


def test_a_factor_of_several_blocks_has_one_gradient(result):
    source = open_source(result("depth").out)
    anatomy, model = anatomy_of(source.skeleton()), load(source.folder)
    sites = [site for site in anatomy.sites if site.name.endswith((".down", ".up"))]
    windows = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    felt = gather(source, anatomy, sites, [MeanGradient, Fisher], windows)
    owners = [name for name, part in model.named_modules() if isinstance(part, SharedLinear) and part.owner]
    assert owners and all(f"{name}.down" in felt for name in owners)
    for name in [*felt][:8]:
        weight, gradients = model.get_submodule(name).weight, []
        for rows in windows:
            loss = cross_entropy(model(rows[None]).logits[0, :-1], rows[1:], reduction="sum")
            gradients += torch.autograd.grad(loss, weight)
        wanted = torch.stack(gradients).double()
        torch.testing.assert_close(felt[name][MeanGradient].mean(), wanted.mean(0).flatten() / 11, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(felt[name][Fisher].mean(), wanted.square().mean((0, 1)), rtol=1e-3, atol=1e-6)
