"""What every suite of the contract uses: awkward matrices, what inputs look like, and eyes for what must not change."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_config, tiny_model
from tersely.anatomy import Unit, anatomy_of, depth_units, reading_units
from tersely.kinds import Kind, Made, TiedHead, link_tables
from tersely.option import Option
from tersely.stats import STATISTICS, Statistic, Stats, keyed_by
from tersely.train.peft_format import Update, write_adapter

SHAPES = {"1x9": (1, 9), "9x1": (9, 1), "3x5": (3, 5), "5x3": (5, 3), "17x31": (17, 31), "2x130": (2, 130)}
"""[out, in] of the weights."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SLACK = 2.0**-20  # as a share of the whole: the square of what is rounded away where a number is stored in 16 bits


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def for_every(
    argument: str, table: Mapping[str, Any], defects: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """A test once for every entry of a table.  `defects`: name → what is known to be wrong with this entry and is not
    mended yet; the test must fail then, so that the mark goes when the defect does."""
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for name, reason in (defects or {}).items()}
    assert marks.keys() <= table.keys(), "a defect of nothing"
    cases = [pytest.param(entry, id=name, marks=marks.get(name, [])) for name, entry in table.items()]
    return pytest.mark.parametrize(argument, cases)


# --- inputs -----------------------------------------------------------------------------------------------------------


def correlated(width: int, tokens: int = 200) -> Tensor:
    """Some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) / width**0.5


def white(width: int) -> Tensor:
    """Signs with orthogonal columns: |x| is 1 everywhere and the Gram matrix is the identity, so that every metric that
    a statistic can give is the same one, that of the weight itself."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < width:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs[:, :width]


def silent(width: int) -> Tensor:
    """Every third channel never says anything."""
    return correlated(width) * (torch.arange(width) % 3 < 2)


INPUTS = {
    "correlated": correlated,
    "white": white,
    "fewer tokens than channels": lambda width: correlated(width, max(1, width // 2)),
    "one token": lambda width: correlated(width, 1),
    "silent channels": silent,
    "zeros": lambda width: torch.zeros(10, width, dtype=torch.float64),
}
"""Name → tokens of a width."""

TELLING = ("correlated", "white")
"""Those that excite every direction: only there can rounding with feedback be expected to gain from every bit."""

POOR = tuple(name for name in INPUTS if name not in TELLING)


def observed(
    needs: Sequence[type[Statistic]],
    x: Tensor,
    of_outputs: Tensor | None = None,
    of_weight: Tensor | None = None,
    flat: Tensor | None = None,
) -> Stats:
    """Exactly the statistics that were asked for: whoever reads another one gets an error.

    x: tokens of the input; the others are gradients of the loss in the outputs, in rows of the weight, and in all of
    it, one window a row.
    """
    rows = {"input": x, "output": of_outputs, "weight": of_weight, "flat": flat}
    found = {}
    for kind in needs:
        shown = rows[keyed_by(kind)]
        assert shown is not None, f"{kind.__name__}: there is no gradient of the {keyed_by(kind)} here"
        found[kind] = kind(shown.shape[1])
        found[kind].update(shown)
    return Stats(found)


def seen_by(shape: tuple[int, int], needs: Sequence[type[Statistic]], look: Callable[[int], Tensor]) -> Stats:
    """What a weight of a shape (out, in) is shown, all of it made by one function of a width."""
    return observed(needs, look(shape[1]), look(shape[0]), look(shape[1]), look(shape[0] * shape[1]))


def variants(table: Mapping[str, type]) -> dict[str, Any]:
    """Every entry once for every other value of an option that is a choice: what else can be asked for by a word."""
    found = {}
    for name, entry in table.items():
        hints = get_type_hints(entry)
        for field in fields(entry):
            hint = hints[field.name]
            values = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
            for value in values:
                if value != field.default:
                    found[f"{name}-{field.name}={value}"] = entry(**{field.name: value})
    return found


@dataclass(frozen=True)
class Scene:
    """The first attention of a tiny model in float64, or its first MLP, or the first linears that read alike, and what
    they read."""

    model: PreTrainedModel
    unit: Unit
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    """Role → the tokens that this linear reads."""

    def stats(
        self, needs: Sequence[type[Statistic]], look: Callable[[Tensor], Tensor] = lambda x: x, only: str | None = None
    ) -> dict[str, Stats]:
        """What is known of every linear; `look` changes what is seen, of one role `only` or of all."""
        found = {}
        for role, x in self.inputs.items():
            shown = (x, *(normal(len(x), width, seed=9) for width in self.weights[role].shape))
            found[role] = observed(needs, *(look(rows) if only in (None, role) else rows for rows in shown))
        return found


# One key head and a single neuron are the least there can be.
NARROW = {"hidden_size": 15, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 1}
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "narrow": ("llama", NARROW),
    "bert": ("bert", {}),
}
"""Name → family, and what differs from its tiny configuration."""

TOKENS = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(0))


@cache
def scene(model_name: str, role: str) -> Scene:
    """Read-only, as every test sees the same one."""
    family, changes = MODELS[model_name]
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = tiny_model(family, config=config).double()
    anatomy = anatomy_of(model)
    words = {site.role.rpartition(".")[2] for site in anatomy.sites}
    units = (*anatomy.units, *reading_units(anatomy.sites), *depth_units(anatomy.sites, 2, words))
    unit = next(unit for unit in units if unit.role == role)
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, arguments, role=role: inputs.update({role: arguments[0].detach().flatten(0, -2)})
        )
        for role, site in unit.sites.items()
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    linears = {role: model.get_submodule(site.name) for role, site in unit.sites.items()}
    weights = {role: linear.weight.detach() for role, linear in linears.items()}
    biases = {role: linear.bias.detach() for role, linear in linears.items() if linear.bias is not None}
    return Scene(model, unit, weights, biases, inputs)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


# --- rewrites ---------------------------------------------------------------------------------------------------------


def with_adapter(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Any], PreTrainedModel]:
    """A LoRA of two linears, and the model with it."""
    sites, together, updates = anatomy_of(model).sites[::3], copy.deepcopy(model), {}
    for number, site in enumerate(sites):
        up, down = normal(site.out_features, 2, seed=number), normal(2, site.in_features, seed=number + 50)
        updates[site.name] = Update(up.float(), down.float(), 0.05)
        update = 0.05 * up.float().double() @ down.float().double()
        weight = together.get_parameter(f"{site.name}.weight").data
        weight.copy_(weight.double() + (update.T if site.transposed else update))
    write_adapter(folder, model, updates)
    return {"adapter": str(folder)}, together


INGREDIENTS: dict[str, Callable[[PreTrainedModel, Path], tuple[dict[str, Any], PreTrainedModel]]] = {
    "merge_adapter": with_adapter,
}
"""Rewrite that needs more than its defaults → from a model and an empty folder, its fields and the model whose function
it is to keep."""


def asked_of(name: str, model: PreTrainedModel, folder: Path) -> tuple[dict[str, Any], PreTrainedModel]:
    """The fields of a rewrite, and the model whose function it is to keep: usually none, and the model itself."""
    return INGREDIENTS[name](model, folder) if name in INGREDIENTS else ({}, model)


# --- what must not change ---------------------------------------------------------------------------------------------


def tensors_in(thing: Any) -> Iterator[Tensor]:
    match thing:
        case Tensor():
            yield thing
        case Stats():
            for kind in STATISTICS.values():
                if kind in thing:
                    yield from thing[kind].state().values()
        case nn.Module():
            yield from thing.state_dict().values()
        case Mapping():
            for value in thing.values():
                yield from tensors_in(value)


def global_state() -> tuple[Any, ...]:
    """Whatever a function could leave behind in the process; not Python's own random numbers, which the checks of
    shapes draw from, see `other_random_numbers`."""
    numbers = numpy.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        (numbers[0], numbers[1].tolist(), *numbers[2:]),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


@contextmanager
def nothing_changes(*arguments: Any) -> Iterator[None]:
    """Fails where tensors in the arguments change, or anything global: random numbers, default dtype, threads."""
    before, world = [tensor.clone() for tensor in tensors_in(arguments_of(arguments))], global_state()
    yield
    assert global_state() == world, "global state changed: pass a torch.Generator, and restore what you set"
    for old, new in zip(before, tensors_in(arguments_of(arguments)), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True, msg="an argument was written into")


def arguments_of(arguments: tuple[Any, ...]) -> dict[int, Any]:
    return dict(enumerate(arguments))


@contextmanager
def other_random_numbers() -> Iterator[None]:
    """The process's random numbers stand elsewhere meanwhile: what is deterministic does not notice."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(12345)
        yield
    random.setstate(python)
    numpy.random.set_state(numbers)


# --- kinds ------------------------------------------------------------------------------------------------------------


def assert_same(first: Any, second: Any) -> None:
    """The same modules bit for bit, or mappings of such."""
    if isinstance(first, Mapping):
        assert list(first) == list(second)
        for name in first:
            assert_same(first[name], second[name])
        return
    if isinstance(first, Kind):
        assert Made.of(first).specs == Made.of(second).specs, "other descriptions"
    old, new = first.state_dict(), second.state_dict()
    assert list(old) == list(new), "other names"
    for name in old:
        assert old[name].dtype == new[name].dtype, f"{name} is of another dtype"
        assert torch.equal(old[name], new[name]), f"{name} has other numbers"


def assert_storable(module: nn.Module, *arguments: Any) -> None:
    """A file can hold its tensors: contiguous, finite, each in memory of its own and not in that of an argument."""
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(arguments_of(arguments)) if tensor.numel()}
    taken: set[int] = set()
    for name, tensor in module.state_dict().items():
        assert tensor.is_contiguous(), f"{name} is not contiguous; safetensors refuses it"
        assert tensor.isfinite().all(), f"{name} is not finite"
        if tensor.numel():
            place = tensor.untyped_storage().data_ptr()
            assert place not in taken, f"{name} shares memory with another tensor of the result"
            assert place not in given, f"{name} shares memory with an argument; copy it"
            taken.add(place)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all stored numbers, bias left out."""
    return sum(tensor.nbytes for name, tensor in module.state_dict().items() if name.rpartition(".")[2] != "bias")


def rebuilt(module: Kind) -> Kind:
    """As from a checkpoint: from its plain values, on the meta device, then its numbers."""
    made = Made.of(module)
    again = made.build()
    assert {tensor.device.type for tensor in again.state_dict().values()} <= {"meta"}, "built with memory of its own"
    again.load_state_dict(made.state, strict=True, assign=True)
    if isinstance(module, TiedHead):  # what a whole model would be asked for
        link_tables(nn.ModuleList([module.holder, again]))
    return again.train(module.training)


# --- options ----------------------------------------------------------------------------------------------------------


def spread(options: Sequence[Option], count: int = 5) -> list[Option]:
    """A handful, the first and the last among them, without the one that is nothing."""
    real = [option for option in options if option.amount != 0]
    if len(real) <= count:
        return real
    return [real[round(place * (len(real) - 1) / (count - 1))] for place in range(count)]


def is_more(second: Any, first: Any) -> bool:
    """Whether an amount is more than another.  Amounts are plain values: numbers are ordered; of those with several
    parts one is more where every part is.  0 is nothing at all."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(is_more(second[key], first[key]) for key in first)
    numbers = isinstance(first, int | float) and isinstance(second, int | float)
    return first == 0 or (numbers and second > first)


def assert_more_is_never_worse(options: Sequence[Option]) -> None:
    """More of an amount takes no fewer bytes and leaves no more error."""
    whole = max(option.error or 0.0 for option in options)
    for place, less in enumerate(options):
        for more in options[place + 1 :]:
            if is_more(more.amount, less.amount):
                assert more.nbytes >= less.nbytes, f"{more.amount} takes fewer bytes than {less.amount}"
                lost = more.error - less.error
                assert lost <= SLACK * whole, f"{more.amount} loses {lost / whole:.1e} more than {less.amount}"


def assert_predicted(method: Any, predicted: float, measured: float, whole: float) -> None:
    """What was predicted is what came, as far as the docstring of `options` does not say otherwise: it may call its
    errors bounds (or those of a damped metric, which are), or estimates, which may be too high but never promise more
    than there is.  `whole`: the error of nothing at all."""
    said = (method.options.__doc__ or "").lower()
    bound = "bound" in said or "damped" in said
    came = f"predicted {predicted:.6g}, measured {measured:.6g}, of {whole:.6g}"
    if bound:
        assert predicted >= measured - SLACK * whole, f"an upper bound that does not hold: {came}"
    if "estimate" in said:
        assert measured - predicted <= 0.05 * whole, f"an estimate that promises too much: {came}"
    elif bound and "exact" not in said:
        assert abs(predicted - measured) <= 0.05 * whole, f"a poor bound: {came}"
    else:
        assert abs(predicted - measured) <= 1e-3 * measured + 1e-5 * whole, came
