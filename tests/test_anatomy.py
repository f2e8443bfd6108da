"""The anatomy is held against what models do: which tensors they read, in which order, what their attention sees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RwkvConfig,
    RwkvModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from families import TINY, tiny_batch, tiny_config, tiny_model
from tersely.anatomy import FAMILIES, READS, Site, anatomy_of, fused_rows, model_class
from tersely.errors import AnatomyError

every_family = pytest.mark.parametrize("family", TINY)
FUSED_FAMILIES = ("phi3", "gpt2", "gpt_neox")
ENCODERS = ("bert", "distilbert")
# Their blocks get different masks, Gemma 3's also different rotary tables.
HYBRIDS = ("qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")


def test_the_tiny_models_are_the_known_families():
    assert TINY.keys() == FAMILIES.keys()


# --- what is found ----------------------------------------------------------------------------------------------------


@every_family
def test_every_linear_is_either_a_site_or_kept(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    named = [part.name for part in (*anatomy.sites, *anatomy.kept)]
    assert len(named) == len(set(named))
    assert linears <= set(named)
    # Weights that are no linears by type: in the blocks, nothing of two or more axes may go unmentioned.
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    matrices = {name for name in matrices if name.startswith(tuple(f"{block}." for block in anatomy.blocks))}
    assert {name for name in matrices if name not in named} == {f"{site.name}.weight" for site in anatomy.sites}


@every_family
def test_sites_tell_the_shapes_of_their_weights(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    for site in anatomy.sites:
        module = model.get_submodule(site.name)
        stored = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        assert module.weight.shape == stored
        assert (module.bias is not None) == site.bias
        assert site.name.startswith(f"{anatomy.blocks[site.block]}.")


@every_family
def test_heads_and_roles_fit_the_shapes(family):
    anatomy = anatomy_of(tiny_model(family))
    query, key_value = (heads * anatomy.heads.width for heads in (anatomy.heads.query, anatomy.heads.key_value))
    hidden = 32
    wanted = {
        "attention.q": (query, hidden),
        "attention.k": (key_value, hidden),
        "attention.v": (key_value, hidden),
        "attention.qkv": (query + 2 * key_value, hidden),
        "attention.o": (hidden, query),
        "mlp.gate": (44, hidden),
        "mlp.up": (44, hidden),
        "mlp.gate_up": (88, hidden),
        "mlp.down": (hidden, 44),
    }
    for site in anatomy.sites:
        assert (site.out_features, site.in_features) == wanted[site.role]


@every_family
def test_what_writes_to_the_residual_stream_is_added_to_what_its_norm_reads(family):
    """The stream before and what attention writes are the stream before the MLP; that, and what the MLP writes, are the
    output.  Where both run side by side the MLP alone counts, and all three add up to the output."""
    model = tiny_model(family).eval()
    anatomy, read, given = anatomy_of(model), {}, {}

    def note(name):
        def hook(module, arguments, out):
            read[name], given[name] = (t.reshape(-1, t.shape[-1]) for t in (arguments[0], out))

        return hook

    doors = FAMILIES[family].norms
    before_mlp = [f"{block}.{doors['mlp.in']}" for block in anatomy.blocks] if anatomy.streams else []
    for name in (*(s.name for s in anatomy.sites), *anatomy.streams.values(), *anatomy.blocks, *before_mlp):
        model.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        model(**tiny_batch())
    writers = [site for site in anatomy.sites if site.name in anatomy.streams]
    assert bool(writers) != bool(anatomy.mixed_norms)
    beside = {s.block: given[s.name] for s in anatomy.sites if s.role == "attention.o" and s not in writers}
    for site in writers:
        after = read[before_mlp[site.block]] if site.role == "attention.o" else given[anatomy.blocks[site.block]]
        summed = read[anatomy.streams[site.name]] + given[site.name] + beside.get(site.block, 0)
        torch.testing.assert_close(summed, after, rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("head", [AutoModel, AutoModelForSequenceClassification])
def test_the_head_does_not_matter(family, head):
    model = tiny_model(family)
    usual, other = anatomy_of(model), anatomy_of(head.from_config(tiny_config(family)))
    prefix = f"{model.base_model_prefix}." if head is AutoModel else ""
    assert [f"{prefix}{site.name}" for site in other.sites] == [site.name for site in usual.sites]
    assert [site.role for site in other.sites] == [site.role for site in usual.sites]
    assert other.heads == usual.heads


@every_family
def test_the_meta_device_gives_the_same_anatomy(family):
    with torch.device("meta"):
        hollow = model_class(tiny_config(family))(tiny_config(family))
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert anatomy_of(hollow) == anatomy_of(tiny_model(family))


@every_family
@pytest.mark.parametrize("tie", [True, False])
def test_tied_parameters_are_those_stored_once(family, tie):
    config = tiny_config(family)
    config.tie_word_embeddings = tie
    model = tiny_model(family, config=config)
    anatomy = anatomy_of(model)
    assert set(anatomy.tied) == model.all_tied_weights_keys.keys()
    assert bool(anatomy.tied) == tie
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {parameter.data_ptr() for name, parameter in parameters.items() if name not in anatomy.tied}
    assert len(stored) == len(parameters) - len(anatomy.tied)
    assert all(parameters[name].data_ptr() in stored for name in anatomy.tied)
    reason = "output head tied to the embedding" if tie else "output head"
    assert [kept.shape[0] for kept in anatomy.kept if kept.reason == reason] == [64]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_kept_with_a_reason(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    parameters = dict(model.named_parameters())
    fused = [kept for kept in anatomy.kept if kept.reason == "fused over all experts"]
    routers = [kept for kept in anatomy.kept if kept.reason == "routing among experts"]
    blocks_with_experts = 2 if family == "mixtral" else 1
    assert (len(fused), len(routers)) == (2 * blocks_with_experts, blocks_with_experts)
    assert all(kept.shape == tuple(parameters[kept.name].shape) for kept in (*fused, *routers))
    assert {len(kept.shape) for kept in fused} == {3}


def test_cross_attention_is_kept_with_a_reason():
    config = tiny_config("gpt2")
    config.add_cross_attention = True
    anatomy = anatomy_of(tiny_model("gpt2", config=config))
    unknown = {kept.name for kept in anatomy.kept if kept.reason == "inside a block without a known role"}
    linears = ("c_attn", "q_attn", "c_proj")
    assert unknown == {f"{block}.crossattention.{linear}" for block in anatomy.blocks for linear in linears}


def test_a_dense_block_beside_experts_has_its_sites():
    anatomy = anatomy_of(tiny_model("qwen3_moe"))
    assert {site.block for site in anatomy.select(["mlp"])} == {0}


def test_only_gemma_needs_a_first_token():
    needing = {family for family in TINY if anatomy_of(tiny_model(family)).needs_first_token}
    assert needing == {"gemma2", "gemma3_text", "gemma3"}


def test_an_unknown_family_is_refused_with_the_known_ones():
    model = RwkvModel(RwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8))
    with pytest.raises(AnatomyError, match=r"unknown model family 'rwkv'.*bert, distilbert, gemma2.*qwen3_moe"):
        anatomy_of(model)
    model.config.model_type = "lama"
    with pytest.raises(AnatomyError, match="did you mean 'llama'"):
        anatomy_of(model)


def test_a_moved_linear_is_an_error_and_no_gap():
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(AnatomyError, match=r"model\.layers\.1 has no 'self_attn\.k_proj'.*attention\.k"):
        anatomy_of(model)
    del model.model.layers
    with pytest.raises(AnatomyError, match=r"LlamaForCausalLM has no list of blocks at 'model\.layers'"):
        anatomy_of(model)


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """The inputs of sites during one forward pass, in order of the calls; held, lest an address be used twice."""

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def note(self, name: str, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self.names.append(name)
        self.tensors.append(arguments[0])


def read(model: PreTrainedModel, sites: Sequence[Site]) -> Reading:
    reading = Reading()
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(partial(reading.note, site.name)) for site in sites
    ]
    with torch.no_grad():
        model(**tiny_batch(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return reading


@every_family
def test_sites_are_in_order_of_execution_and_keys_are_tensors(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    reading = read(model, anatomy.sites)
    assert reading.names == [site.name for site in anatomy.sites]
    tensor_of_key = {site.reads: tensor for site, tensor in zip(anatomy.sites, reading.tensors, strict=True)}
    for site, tensor in zip(anatomy.sites, reading.tensors, strict=True):
        assert [reads for reads, other in tensor_of_key.items() if other is tensor] == [site.reads]


@every_family
def test_inputs_group_all_sites_of_a_block(family):
    anatomy = anatomy_of(tiny_model(family))
    groups = [group for block in range(len(anatomy.blocks)) for group in anatomy.inputs(block)]
    assert sorted(site.name for _, sites in groups for site in sites) == sorted(site.name for site in anatomy.sites)
    assert all(site.reads == reads for reads, sites in groups for site in sites)
    doors = [reads.partition(":")[2] for reads, _ in anatomy.inputs(0)]
    assert doors == [door for door in dict.fromkeys(READS.values()) if door in doors]


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Tensor]) -> Iterator[None]:
    for index, block in enumerate(blocks):
        block.forward = partial(stub, index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def noted_arguments(model: PreTrainedModel, names: Sequence[str]) -> list[tuple[Tensor, tuple, dict]]:
    """What each block is called with, found without the weights of any block and without running the head."""
    noted = {}

    def note(index: int, hidden: Tensor, *arguments: object, **keywords: object) -> Tensor:
        noted[index] = (hidden, arguments, keywords)
        return hidden

    hollow = deepcopy(model)
    blocks = [hollow.get_submodule(name).to("meta") for name in names]
    with stubbed(blocks, note):
        hollow.base_model(**tiny_batch(), use_cache=False)
    return [noted[index] for index in range(len(blocks))]


@every_family
@torch.no_grad()
def test_replay_of_the_blocks_is_the_forward_pass(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    blocks = [model.get_submodule(name) for name in anatomy.blocks]
    noted = noted_arguments(model, anatomy.blocks)
    finals = []
    hook = blocks[-1].register_forward_hook(lambda _, __, output: finals.append(output))
    logits = model(**tiny_batch(), use_cache=False).logits
    hook.remove()

    hidden, *_ = noted[0]
    for block, (_, arguments, keywords) in zip(blocks, noted, strict=True):
        hidden = block(hidden, *arguments, **keywords)
        assert type(hidden) is Tensor
    assert torch.equal(hidden, finals[0])
    with stubbed(blocks, lambda index, *_, **__: hidden):
        assert torch.equal(model(**tiny_batch(), use_cache=False).logits, logits)

    # The arguments of the first block do for all only where the blocks are alike.
    hidden, arguments, keywords = noted[0]
    for block in blocks:
        hidden = block(hidden, *arguments, **keywords)
    assert torch.equal(hidden, finals[0]) == (family not in HYBRIDS)


@every_family
def test_without_a_cache_blocks_receive_nothing_that_remembers(family):
    """With a cache, a block that is replayed after its compression would attend to the keys of the dense block."""
    model = tiny_model(family)
    for _, arguments, keywords in noted_arguments(model, anatomy_of(model).blocks):
        flat = [*arguments, *keywords.values()]
        flat += [element for value in flat if isinstance(value, tuple) for element in value]
        assert {type(value) for value in flat} <= {Tensor, tuple, bool, type(None)}


# --- fused weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED_FAMILIES)
@torch.no_grad()
def test_fused_rows_are_what_the_attention_sees(family, monkeypatch):
    """At position 0 the rotation is the identity, so that with one token the heads are the raw rows."""
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    seen, outputs = [], []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watching(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: object, **keywords: object):
        seen.append({"q": query, "k": key, "v": value})
        return attend(module, query, key, value, *arguments, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watching)
    sites = anatomy.select(["attention.qkv"])
    for site in sites:
        model.get_submodule(site.name).register_forward_hook(lambda _, __, output: outputs.append(output))
    model(torch.tensor([[7]]), use_cache=False)

    assert len(seen) == len(outputs) == len(sites) == 2
    for site, heads, output in zip(sites, seen, outputs, strict=True):
        rows = fused_rows(site, anatomy)
        assert list(rows) == ["q", "k", "v"]
        for part, tensor in heads.items():  # (batch, heads, tokens, width)
            torch.testing.assert_close(output[..., rows[part]].flatten(), tensor.flatten(), rtol=0, atol=0)
        assert torch.cat(list(rows.values())).sort().values.equal(torch.arange(site.out_features))


@torch.no_grad()
def test_fused_gate_and_up_are_what_the_mlp_multiplies():
    model = tiny_model("phi3")
    anatomy = anatomy_of(model)
    fused, down = anatomy.select(["mlp"])[:2]
    rows = fused_rows(fused, anatomy)
    x, middle = torch.randn(3, 32), []
    model.get_submodule(down.name).register_forward_pre_hook(lambda _, arguments: middle.append(arguments[0]))
    model.model.layers[0].mlp(x)
    both = model.get_submodule(fused.name)(x)
    torch.testing.assert_close(middle[0], nn.functional.silu(both[:, rows["gate"]]) * both[:, rows["up"]])


def test_a_site_that_is_not_fused_has_no_parts():
    anatomy = anatomy_of(tiny_model("llama"))
    with pytest.raises(AnatomyError, match=r"self_attn\.q_proj \(attention\.q\) is not fused"):
        fused_rows(anatomy.sites[0], anatomy)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        (["all"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2),
        (["mlp"], ["gate_proj", "up_proj", "down_proj"] * 2),
        (["attention.v"], ["v_proj"] * 2),
        (["*.down_proj", "attention.o"], ["o_proj", "down_proj"] * 2),
        (["model.layers.0.mlp.*", "mlp.up"], ["gate_proj", "up_proj", "down_proj", "up_proj"]),
        ([], []),
    ],
)
def test_select_names_roles_or_paths(target, leaves):
    selected = anatomy_of(tiny_model("llama")).select(target)
    assert [site.name.rpartition(".")[2] for site in selected] == leaves


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_a_fused_site_answers_to_its_name_and_to_its_group(family):
    anatomy = anatomy_of(tiny_model(family))
    assert {site.role for site in anatomy.select(["attention"])} == {"attention.qkv", "attention.o"}
    assert {site.role for site in anatomy.select(["attention.qkv"])} == {"attention.qkv"}
    with pytest.raises(AnatomyError, match=rf"'attention\.q': {family} stores q, k, v fused .* 'attention\.qkv'"):
        anatomy.select(["attention.q"])


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("llama", "mpl", r"unknown target 'mpl'; did you mean 'mlp'\?.*attention\.q.*mlp\.up$"),
        ("llama", "atention.v", r"did you mean 'attention\.v'\?"),
        ("llama", "model.layers.*.mlp.donw_proj", r"did you mean 'model\.layers\.\*\.mlp\.down_proj'\?"),
        ("llama", "attention.qkv", r"unknown target 'attention\.qkv'"),
        ("phi3", "mlp.up", r"phi3 stores gate, up fused in one matrix; name 'mlp\.gate_up'"),
        ("gpt2", "mlp.gate", r"unknown target 'mlp\.gate'; did you mean 'mlp\.up'\?|known: .*mlp\.up"),
        ("mixtral", "mlp", r"unknown target 'mlp'; .*never a target: 2 routing among experts, 4 fused"),
    ],
)
def test_a_target_that_names_nothing_is_an_error_that_helps(family, target, message):
    with pytest.raises(AnatomyError, match=message):
        anatomy_of(tiny_model(family)).select(["attention", target])


def test_coverage_accounts_for_every_linear():
    mixtral, llama = anatomy_of(tiny_model("mixtral")), anatomy_of(tiny_model("llama", "LlamaModel"))
    assert mixtral.coverage(mixtral.select(["attention.v"])) == (
        "2 of 15 linears touched, 13 kept: 2 routing among experts, 4 fused over all experts, 1 output head, "
        "6 not among the targets"
    )
    assert llama.coverage(llama.sites) == "14 of 14 linears touched"
    bert = anatomy_of(tiny_model("bert"))
    assert bert.coverage(bert.sites).endswith("1 outside the blocks, 1 output head tied to the embedding")


# --- what has been replaced before ------------------------------------------------------------------------------------


class Factors(nn.Module):
    """The shape of a low-rank kind: in → rank → out."""

    def __init__(self, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Sum(nn.Module):
    """The shape of a residual correction: a base and an update."""

    def __init__(self, base: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.base, self.update = base, update

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)


class Packed(nn.Module):
    """The shape of a quantized kind: no linear inside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.register_buffer("words", linear.weight.detach().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.words.to(x.dtype))


def test_the_factors_of_a_replaced_site_are_sites():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.k_proj = Factors(32, 8, 32), Factors(32, 4, 16)
    attention.k_proj.up = Factors(4, 2, 16)
    attention.v_proj = Sum(attention.v_proj, Factors(32, 2, 16))
    attention.o_proj = Packed(attention.o_proj)
    anatomy = anatomy_of(model)
    below = [site for site in anatomy.sites if site.block == 0 and site.role.startswith("attention")]
    assert [(site.role, site.out_features, site.in_features) for site in below] == [
        ("attention.q.down", 8, 32),
        ("attention.q.up", 32, 8),
        ("attention.k.down", 4, 32),
        ("attention.k.up.down", 2, 4),
        ("attention.k.up.up", 16, 2),
        ("attention.v.base", 16, 32),
        ("attention.v.update.down", 2, 32),
        ("attention.v.update.up", 16, 2),
    ]
    assert [kept for kept in anatomy.kept if "o_proj" in kept.name] == [
        type(anatomy.kept[0])("model.layers.0.self_attn.o_proj", (32, 32), "already Packed")
    ]
    assert anatomy.select(["attention.q"])[:2] == tuple(below[:2])
    assert {site.role for site in anatomy.select(["*.up"])} == {
        "attention.q.up",
        "attention.k.up.up",
        "attention.v.update.up",
    }
    name, sites = anatomy.inputs(0)[0]
    assert name == "model.layers.0:attention.in"
    assert [site.role for site in sites] == ["attention.q.down", "attention.k.down"]

    reading = read(model, anatomy.sites)
    assert reading.names == [site.name for site in anatomy.sites]
    tensors: dict[str, Tensor] = {}
    for site, tensor in zip(anatomy.sites, reading.tensors, strict=True):
        assert tensors.setdefault(site.reads, tensor) is tensor


# --- the class to open a checkpoint with ------------------------------------------------------------------------------


@every_family
def test_the_class_follows_the_architectures(family):
    config = tiny_config(family)
    assert model_class(config).__name__ == config.architectures[0]
    assert model_class(config).config_class is type(config)


@every_family
def test_without_architectures_decoders_are_causal_and_encoders_are_not_guessed(family):
    config = tiny_config(family)
    config.architectures = None
    if family in ENCODERS:
        with pytest.raises(AnatomyError, match=rf"'{family}' names no architecture"):
            model_class(config)
    else:
        with torch.device("meta"):
            assert model_class(config) is type(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", ["LlamaForEverything", "AutoTokenizer", "logging"])
def test_an_architecture_that_is_no_model_is_refused(name):
    config = tiny_config("llama")
    config.architectures = [name]
    with pytest.raises(AnatomyError, match=rf"architecture '{name}' is no model class of transformers"):
        model_class(config)
