"""Updates beside frozen linears: they begin as nothing, harden into what they were, and travel to peft and back."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from families import tiny_batch, tiny_model
from tersely.errors import AnatomyError, CheckpointError, NumericalError, RecipeError
from tersely.kinds import DenseLinear, LinearKind, LowRankLinear, PivotedLinear, dense_weight
from tersely.kinds.sum import SumLinear
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.stats import Stats
from tersely.train import RELAXATIONS, harden, relax_sites
from tersely.train.peft_format import CONFIG, TENSORS, Update, apply_adapter, read_adapter, updates_of, write_adapter
from tersely.train.relax.adapter import Adapted, AdaptedFactors, Adapter
from tersely.train.relax.full import Full
from tersely.train.relax.kasa import KnowledgeAdapter, distance_from_orthonormal

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16)}
ATTENTION = [f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qkvo"]

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_update = pytest.mark.parametrize("name", ["adapter", "kasa"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(shape: tuple[int, int], kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A linear of shape (out, in), with a bias."""
    weight, bias = normal(*shape).to(dtype), normal(shape[0], seed=1).to(dtype)
    match kind:
        case "linear":
            made = nn.Linear(shape[1], shape[0], dtype=dtype)
            made.weight.data, made.bias.data = weight, bias
        case "conv1d":
            made = Conv1D(shape[0], shape[1]).to(dtype)
            made.weight.data, made.bias.data = weight.T.contiguous(), bias
        case "dense":
            made = DenseLinear.from_weight(weight, bias)
        case "sum":
            return SumLinear.of([linear(shape)])
        case "low_rank":
            made = LowRankLinear.from_factors(normal(shape[0], 5, seed=2).to(dtype), normal(5, shape[1]).to(dtype))
            made.set_bias(bias)
    return made


def relaxed(relaxation, base: nn.Module, *, learned: bool = True):
    """A relaxed linear; `learned` puts numbers where zeros stand at the start."""
    module = relaxation.relax(base, Stats(), generator())
    if learned:
        module.up.data = normal(*module.up.shape, seed=3).to(module.up)
    return module


def update_of(name: str, **fields):
    return RELAXATIONS[name](**fields)


# --- the start --------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("kind", ["linear", "conv1d", "dense", "low_rank"])
def test_an_adapter_begins_as_nothing(shape, kind):
    base, x = linear(shape, kind), normal(7, shape[1], seed=4)
    for relaxation in (Adapter(), KnowledgeAdapter(truncate=False)):
        assert torch.equal(relaxed(relaxation, base, learned=False)(x), base(x))


@every_shape
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_kasa_drops_are_the_weakest_singular_directions(shape, kind):
    base, x, rank = linear(shape, kind), normal(7, shape[1], seed=4), 3
    before = copy.deepcopy(base.state_dict())
    module = relaxed(KnowledgeAdapter(rank=rank), base, learned=False)
    weight, world = (m.weight.T if kind == "conv1d" else m.weight for m in (base, module.base))
    values = torch.linalg.svdvals(weight)
    assert len(values) == min(shape)
    # the theorem of Eckart, Young and Mirsky; the smaller side counts, whichever it is
    assert (weight - world).square().sum().item() == pytest.approx(values[-rank:].square().sum().item(), rel=1e-10)
    torch.testing.assert_close(torch.linalg.svdvals(world)[:-rank], values[:-rank])
    torch.testing.assert_close(module(x), x @ world.T + base.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.dropped_up @ module.dropped_down, weight - world, rtol=0, atol=1e-12)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_gradient_of_the_update_is_that_of_the_weight_through_the_other_factor():
    base, x, wanted = linear((10, 24)), normal(7, 24, seed=4), normal(7, 10, seed=5)
    module = relaxed(Adapter(rank=3, alpha=6.0), base)
    hard = module.harden()
    for tried in (module, hard):
        (tried(x) - wanted).square().sum().backward()
    slope = hard.weight.grad
    torch.testing.assert_close(module.up.grad, module.scale * slope @ module.down.detach().T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.down.grad, module.scale * module.up.detach().T @ slope, rtol=1e-10, atol=1e-10)


def test_the_first_factor_is_drawn_from_the_generator_alone():
    torch.manual_seed(1)
    first = relaxed(Adapter(), linear((10, 24))).down
    torch.manual_seed(2)
    assert torch.equal(first, relaxed(Adapter(), linear((10, 24))).down)
    assert first.abs().max() <= 1 / math.sqrt(24)
    assert first.std().item() == pytest.approx(1 / math.sqrt(3 * 24), rel=0.1)


# --- the end ----------------------------------------------------------------------------------------------------------


@every_update
@every_shape
@pytest.mark.parametrize("kind", ["linear", "conv1d", "dense", "low_rank"])
@pytest.mark.parametrize("merge", [True, False])
def test_hardened_and_relaxed_are_one_function(name, shape, kind, merge):
    base, x = linear(shape, kind), normal(7, shape[1], seed=4)
    fields = {"truncate": kind in ("linear", "conv1d")} if name == "kasa" else {}
    module = relaxed(update_of(name, rank=3, merge=merge, **fields), base).eval()
    hard = module.harden()
    torch.testing.assert_close(hard(x), module(x), rtol=1e-10, atol=1e-10)
    form = type(base) if merge else SumLinear
    assert type(hard) is form
    assert hard(x).dtype == torch.float64
    if kind == "low_rank" and merge:
        assert hard.rank == 5 + 3
    # bits are those of the stored numbers, bias aside
    numbers = sum(t.numel() for path, t in hard.state_dict().items() if not path.endswith("bias"))
    assert module.bits().item() == 64 * numbers


def test_an_update_of_a_sum_is_one_more_term():
    base, x = relaxed(Adapter(merge=False), linear((10, 24))).harden(), normal(7, 24, seed=4)
    again = relaxed(Adapter(rank=2), base)
    hard = again.harden()
    assert len(hard.terms) == 3
    torch.testing.assert_close(hard(x), again(x), rtol=1e-10, atol=1e-10)


@every_update
def test_what_kasa_learned_is_an_update_of_the_original_weight(name):
    base = linear((10, 24))
    module = relaxed(update_of(name, rank=3), base)
    up, down = module.update()
    assert len(down) == (6 if name == "kasa" else 3)
    torch.testing.assert_close(base.weight + up @ down, dense_weight(module.harden()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "dense", "low_rank"])
def test_in_half_precision_the_update_is_held_and_rounded_once_in_full(kind):
    base, x = linear((10, 24), kind, torch.bfloat16), normal(7, 24, seed=4).bfloat16()
    module = relaxed(Adapter(rank=3), base)
    assert module.up.dtype == module.down.dtype == torch.float32
    assert module(x).dtype == torch.bfloat16
    hard = module.harden()
    assert {tensor.dtype for tensor in hard.state_dict().values()} == {torch.bfloat16}
    if kind != "low_rank":
        up, down = module.update()
        wanted = (
            dense_weight(linear((10, 24), "linear", torch.bfloat16)).double() + up.double() @ down.double()
        ).bfloat16()
        got = dense_weight(hard).T if kind == "conv1d" else dense_weight(hard)
        assert torch.equal(got, wanted.float())


def test_all_numbers_of_a_linear_can_train_and_return_to_their_dtype():
    base, x = linear((10, 24), "conv1d", torch.bfloat16), normal(7, 24, seed=4).bfloat16()
    module = Full().relax(base, Stats(), generator())
    assert torch.equal(module(x), base(x))
    assert {parameter.dtype for parameter in module.groups()["weights"]} == {torch.float32}
    module(x).float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.groups()["weights"])
    hard = module.harden()
    assert type(hard) is Conv1D
    assert all(torch.equal(hard.state_dict()[name], tensor) for name, tensor in base.state_dict().items())
    assert module.bits().item() == 16 * 240


# --- factors ----------------------------------------------------------------------------------------------------------


def factorised(shape: tuple[int, int], kind: str) -> LinearKind:
    up, down, bias = normal(shape[0], 5, seed=2), normal(5, shape[1]), normal(shape[0], seed=1)
    made = {"low_rank": LowRankLinear, "pivoted": PivotedLinear}[kind].from_factors(up, down)
    made.set_bias(bias)
    return made


def learned(module: AdaptedFactors) -> AdaptedFactors:
    with torch.no_grad():
        for seed, parameter in enumerate(module.groups()["adapters"]):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return module


@every_shape
@pytest.mark.parametrize(
    ("kind", "factors"),
    [("low_rank", ("up",)), ("low_rank", ("down",)), ("low_rank", ("down", "up")), ("pivoted", ("rest",)),
     ("pivoted", ("down", "up", "rest"))],
)  # fmt: skip
def test_updates_of_factors_are_merged_into_them_and_cost_nothing(shape, kind, factors):
    base, x = factorised(shape, kind), normal(7, shape[1], seed=4)
    before = copy.deepcopy(base.state_dict())
    module = Adapter(rank=3, factors=factors).relax(base, Stats(), generator())
    assert isinstance(module, AdaptedFactors)
    assert torch.equal(module(x), base(x))  # they begin as nothing
    hard = learned(module).eval().harden()
    # merged and unmerged are one function
    torch.testing.assert_close(hard(x), module(x), rtol=1e-12, atol=1e-10)
    assert type(hard) is type(base) and hard.spec() == base.spec()
    assert {name: (t.shape, t.dtype) for name, t in hard.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name, tensor in hard.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in factors if hasattr(base, name)}
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    numbers = sum(t.numel() for name, t in base.state_dict().items() if name not in ("bias", "up.bias", "place"))
    places = 2 * shape[0] if kind == "pivoted" else 0
    assert module.bits().item() == 64 * numbers + 8 * places
    # of the one factor the update is that of a plain linear
    if factors == ("up",):
        alone = base.up.weight + 16.0 / 3 * module.base.up.up @ module.base.up.down
        torch.testing.assert_close(hard.up.weight, alone, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_one_factor_passes_through_the_other():
    base, x, wanted = factorised((10, 24), "low_rank"), normal(7, 24, seed=4), normal(7, 10, seed=5)
    module = learned(Adapter(rank=3, factors=("down",)).relax(base, Stats(), generator()))
    hard = module.harden()
    for tried in (module, hard):
        (tried(x) - wanted).square().sum().backward()
    child = module.base.down
    slope = child.scale * hard.down.weight.grad @ child.down.detach().T
    torch.testing.assert_close(child.up.grad, slope, rtol=1e-10, atol=1e-10)
    assert {id(p) for p in module.groups()["adapters"]} == {id(child.down), id(child.up)}


def test_a_linear_that_was_left_dense_is_updated_as_a_whole():
    module = Adapter(factors=("up",)).relax(linear((10, 24)), Stats(), generator())
    assert isinstance(module, Adapted) and type(module.harden()) is nn.Linear


def test_factors_that_are_not_there_are_refused():
    with pytest.raises(RecipeError, match=r"has no plain linear rest .*it has down, up"):
        Adapter(factors=("rest",)).relax(factorised((10, 24), "low_rank"), Stats(), generator())
    with pytest.raises(RecipeError, match="it has none"):
        Adapter(factors=("up",)).relax(linear((10, 24), "sum"), Stats(), generator())
    with pytest.raises(RecipeError, match="no target is factorised"):
        Adapter(factors=("up",)).check([(8, 8)], [], 0, None)
    Adapter(factors=("up",)).check([(8, 8)], [(8, 8)], 0, None)
    for fields in ({"factors": ("side",)}, {"factors": ("up", "up")}, {"factors": ("up",), "merge": False}):
        with pytest.raises(RecipeError, match="adapter"):
            Adapter(**fields)


def test_one_factor_after_the_other_heals_and_leaves_bytes_and_manifest_alone(model_folder, text_file, tmp_path):
    """SVD-LLM's sequential LoRA, two steps of a recipe."""
    heal = {"train": ["logits"], "relax": "adapter", "rank": 2, "tokens": 2048, "batch": 4, "rate": 3e-3, "held_out": 8}
    cut = {"method": "svd_llm", "keep": 0.6, "allocate": "uniform"}
    steps = [cut, heal | {"factors": ["up"]}, heal | {"factors": ["down"]}]
    plain = {"model": str(model_folder()), "calibration": {"source": [str(text_file)], "samples": 16, "length": 16}}
    found = {}
    for name, chosen in (("cut", steps[:1]), ("healed", steps)):
        report = run(prepare(recipe_from(plain | {"step": chosen}), tmp_path / name)).report
        found[name] = load_file(tmp_path / name / "model.safetensors")
    shapes = [{path: tensor.shape for path, tensor in tensors.items()} for tensors in found.values()]
    assert shapes[0] == shapes[1]
    manifests = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in found]
    assert manifests[0] == manifests[1]
    changed = {path for path in found["cut"] if not torch.equal(found["cut"][path], found["healed"][path])}
    assert changed == {path for path in found["cut"] if path.endswith((".up.weight", ".down.weight"))}
    held_out = [figures["training"]["held_out"] for figures in report.steps[1:]]
    assert all(losses[-1]["losses"]["logits"] < losses[0]["losses"]["logits"] for losses in held_out)
    # the second step goes on from what the first one ended with
    assert held_out[1][0]["losses"]["logits"] == pytest.approx(held_out[0][-1]["losses"]["logits"], rel=1e-3)


# --- between ----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_rests_while_measuring():
    module = relaxed(Adapter(dropout=0.25), linear((10, 24)))
    x = normal(1, 24).expand(20_000, 24)
    measured = module.eval()(x)
    torch.testing.assert_close(measured[:1].expand_as(measured), measured)
    learning = module.train()(x)
    spread = (learning - measured).std(0)
    assert spread.min() > 0
    assert ((learning.mean(0) - measured[0]).abs() < 5 * spread / math.sqrt(len(x))).all()


@pytest.mark.parametrize("shape", [(3, 24), (3, 3), (1, 7)])
def test_outer_and_inner_products_are_as_far_from_the_identity_up_to_a_constant(shape):
    rows = normal(*shape)
    outer = torch.linalg.matrix_norm(rows.T @ rows - torch.eye(shape[1]))
    wanted = distance_from_orthonormal(rows).square() + shape[1] - shape[0]
    assert outer.square().item() == pytest.approx(wanted.item(), rel=1e-12)


def test_the_distance_from_orthonormal_has_a_gradient_everywhere():
    rows = torch.eye(3, 8, dtype=torch.float64, requires_grad=True)
    distance_from_orthonormal(rows).backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_the_penalty_straightens_the_update_and_quiets_what_is_unused():
    module = relaxed(KnowledgeAdapter(rank=4, beta=0.1, gamma=1.0), linear((10, 24)))
    steps = torch.optim.Adam(module.parameters(), lr=0.02)
    before = [distance_from_orthonormal(rows).item() for rows in (module.up.T, module.down)]
    loud = module.values.abs().max().item()
    for _ in range(150):
        steps.zero_grad()
        module.penalty().backward()
        steps.step()
    assert distance_from_orthonormal(module.up.T).item() < 0.1 * before[0]
    assert distance_from_orthonormal(module.down).item() < 0.1 * before[1]
    assert module.values.abs().max().item() < 0.5 * loud


def test_kasa_learns_better_where_the_weakest_directions_are_noise_and_worse_where_they_are_not():
    """A weight of rank 4 with noise on top, and a task that moves it by rank 3, with or without that noise."""
    clean, noise = normal(24, 4) @ normal(4, 16, seed=1), 0.1 * normal(24, 16, seed=2)
    task, x = 0.3 * normal(24, 3, seed=3) @ normal(3, 16, seed=4), normal(256, 16, seed=5)
    base = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    base.weight.data = clean + noise
    left = {}
    for wanted in ("clean", "noisy"):
        y = x @ (clean + task + (noise if wanted == "noisy" else 0)).T
        for name in ("adapter", "kasa"):
            module = update_of(name, rank=4).relax(base, Stats(), generator())
            steps = torch.optim.Adam(module.groups()["adapters"], lr=0.02)
            for _ in range(150):
                steps.zero_grad()
                loss = (module(x) - y).square().sum(-1).mean()
                (loss + module.penalty()).backward()
                steps.step()
            left[name, wanted] = loss.item()
    assert left["kasa", "clean"] < left["adapter", "clean"]
    assert left["adapter", "noisy"] < left["kasa", "noisy"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adapter(rank=0),
        lambda: Adapter(alpha=0.0),
        lambda: Adapter(dropout=1.0),
        lambda: KnowledgeAdapter(gamma=-1.0),
        lambda: KnowledgeAdapter(beta=math.nan),
        lambda: relaxed(KnowledgeAdapter(rank=16), linear((16, 16))),
        lambda: relaxed(KnowledgeAdapter(), linear((16, 16), "low_rank")),
        lambda: relaxed(Adapter(), nn.Embedding(4, 4)),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(RecipeError):
        make()


def test_a_weight_that_is_not_finite_is_not_truncated():
    base = linear((10, 24))
    base.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match="finite"):
        relaxed(KnowledgeAdapter(), base)


# --- peft -------------------------------------------------------------------------------------------------------------


def adapted_model(family: str, names: list[str], relaxation) -> tuple[nn.Module, dict]:
    model = tiny_model(family)
    modules = relax_sites(model, names, relaxation, {}, generator())
    for seed, module in enumerate(modules.values()):
        module.up.data = 0.1 * normal(*module.up.shape, seed=seed).to(module.up)
    return model.eval(), modules


PEFT_CASES = {
    "llama": ("llama", ATTENTION, Adapter(rank=3)),
    "llama-kasa": ("llama", ATTENTION, KnowledgeAdapter(rank=3)),
    "gpt2": ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], Adapter(rank=4)),
}
# the libraries' own quarrel: peft asks transformers by an old name
peft_tests = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
every_case = pytest.mark.parametrize("case", PEFT_CASES.values(), ids=PEFT_CASES)


@peft_tests
@every_case
def test_peft_opens_what_we_write(case, tmp_path):
    peft = pytest.importorskip("peft")
    family, names, relaxation = case
    model, modules = adapted_model(family, names, relaxation)
    write_adapter(tmp_path / "adapter", model, updates_of(modules), base="some/model")
    opened = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(opened(**tiny_batch()).logits, model(**tiny_batch()).logits, rtol=1e-4, atol=1e-5)


@peft_tests
def test_peft_sees_unlike_ranks_and_scales_as_we_do(tmp_path):
    peft = pytest.importorskip("peft")
    ours, updates = tiny_model("llama"), {}
    for rank, name in enumerate(ATTENTION, start=1):
        shape = ours.get_submodule(name).weight.shape
        up, down = 0.1 * normal(shape[0], rank).float(), normal(rank, shape[1], seed=1).float()
        updates[name] = Update(up, down, rank % 3 + 0.5)
    write_adapter(tmp_path, ours, updates)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    apply_adapter(ours, updates)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny_batch()).logits, ours(**tiny_batch()).logits, rtol=1e-4, atol=1e-4)


@peft_tests
@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_what_peft_writes(rslora, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 7}, use_rslora=rslora, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    changed = apply_adapter(ours, read_adapter(tmp_path))
    assert len(changed) == 4
    with torch.no_grad():
        batch = tiny_batch()
        torch.testing.assert_close(ours(**batch).logits, theirs.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


@every_case
def test_written_read_and_applied_is_hardened(case, tmp_path):
    family, names, relaxation = case
    model, modules = adapted_model(family, names, relaxation)
    write_adapter(tmp_path, model, updates_of(modules))
    applied = tiny_model(family)
    apply_adapter(applied, read_adapter(tmp_path))
    harden(model, modules)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(applied.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_updates_of_unlike_rank_and_scale_keep_both(tmp_path):
    model = tiny_model("llama")
    updates = {
        name: Update(torch.randn(model.get_submodule(name).out_features, rank), torch.randn(rank, 32), 1 / rank)
        for rank, name in enumerate([f"model.layers.1.self_attn.{short}_proj" for short in "qkv"], start=1)
    }
    updates["model.layers.0.self_attn.q_proj"] = Update(torch.randn(32, 2), torch.randn(2, 32), 3.0)
    write_adapter(tmp_path, model, updates)
    for name, update in read_adapter(tmp_path).items():
        assert torch.equal(update.up, updates[name].up)
        assert torch.equal(update.down, updates[name].down)
        assert update.scale == pytest.approx(updates[name].scale)


def test_an_adapter_goes_onto_a_compressed_linear():
    model, name = tiny_model("llama"), ATTENTION[0]
    model.set_submodule(name, linear((32, 32), "low_rank", torch.float32))
    old = model.get_submodule(name).to_dense()
    apply_adapter(model, {name: Update(torch.ones(32, 1), torch.ones(1, 32), 0.5)})
    torch.testing.assert_close(model.get_submodule(name).to_dense(), old + 0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("a_setting_of_the_future", {"on": True}),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(key, value, tmp_path):
    model, modules = adapted_model(*PEFT_CASES["llama"])
    write_adapter(tmp_path, model, updates_of(modules))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=str(value) if key == "peft_type" else key):
        read_adapter(tmp_path)


def damaged(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(next(iter(tensors))),
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2)}),
        lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(5, 32)}),
    ],
    ids=["half", "whole", "rank"],
)
def test_tensors_that_are_no_updates_are_refused(change, tmp_path):
    model, modules = adapted_model(*PEFT_CASES["llama"])
    write_adapter(tmp_path, model, updates_of(modules))
    damaged(tmp_path, change)
    with pytest.raises(CheckpointError):
        read_adapter(tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path)
    model = tiny_model("llama")
    with pytest.raises(AnatomyError, match="another base"):
        apply_adapter(model, {ATTENTION[0]: Update(torch.zeros(8, 1), torch.zeros(1, 8), 1.0)})
    with pytest.raises(RecipeError, match="no such module"):
        apply_adapter(model, {"model.nothing": Update(torch.zeros(8, 1), torch.zeros(1, 8), 1.0)})
    with pytest.raises(CheckpointError, match="nothing to write"):
        write_adapter(tmp_path, model, {})
    model.set_submodule(ATTENTION[0], linear((32, 32), "low_rank", torch.float32))
    modules = relax_sites(model, ATTENTION[:1], Adapter(), {}, generator())
    with pytest.raises(CheckpointError, match="plain linears only"):
        write_adapter(tmp_path, model, updates_of(modules))
    assert isinstance(modules[ATTENTION[0]], Adapted)
    with pytest.raises(CheckpointError, match="no low-rank update"):
        updates_of(relax_sites(tiny_model("llama"), ATTENTION[:1], Full(), {}, generator()))
