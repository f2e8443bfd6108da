"""What trains in a model: relaxed modules that stand in the places of linears, and parameters chosen by name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tersely.errors import RecipeError
from tersely.kinds import Kind, Made, link
from tersely.stats import Stats
from tersely.train.relax.base import GROUPS, Relaxation, Relaxed


def relax_sites(
    model: nn.Module,
    names: Sequence[str],
    relaxation: Relaxation,
    stats: Mapping[str, Stats],
    generator: torch.Generator,
) -> dict[str, Relaxed]:
    """Put relaxed modules in the places of the named linears.  `stats`: name → statistics of its input, for
    relaxations that need some."""
    relaxed = {}
    for name in names:
        linear = module_of(model, name)
        try:
            relaxed[name] = relaxation.relax(linear, stats.get(name, Stats()), generator).train(linear.training)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error
    for name, module in relaxed.items():
        model.set_submodule(name, module)
    link(model)
    return relaxed


def harden(model: nn.Module, relaxed: Mapping[str, Relaxed]) -> dict[str, Made | dict[str, Tensor]]:
    """Put the hardened modules in their places, and give them as what a checkpoint holds: a kind with its numbers, or
    the numbers of a plain linear."""
    made: dict[str, Made | dict[str, Tensor]] = {}
    for name, module in relaxed.items():
        hard = module.harden().train(module.training)
        model.set_submodule(name, hard)
        link(model)
        made[name] = Made.of(hard) if isinstance(hard, Kind) else _host(hard.state_dict())
    return made


def module_of(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise RecipeError(f"{name}: the model has no such module; name linears by their full path") from error


def _host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


@dataclass(frozen=True)
class Trained:
    """What trains."""

    relaxed: tuple[Relaxed, ...]
    groups: Mapping[str, Mapping[str, nn.Parameter]]
    """Group → name in the model → parameter."""
    buffers: Mapping[str, Tensor]
    """Buffers of relaxed modules, which forward passes may change."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for group in self.groups.values() for name, parameter in group.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters().items()} | dict(self.buffers)


@contextmanager
def standing(model: nn.Module, teacher: nn.Module | None, patterns: Sequence[str]) -> Iterator[Trained]:
    """The models as training needs them, and as they were afterwards: modes, and what may have a gradient."""
    modules = [*model.modules(), *(teacher.modules() if teacher is not None else ())]
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        trained = _trained(model, patterns)
        for module in trained.relaxed:
            module.train()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        for parameter in trained.parameters().values():
            parameter.requires_grad_(True)
        yield trained
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
            parameter.grad = None


def _trained(model: nn.Module, patterns: Sequence[str]) -> Trained:
    relaxed = {name: module for name, module in model.named_modules() if isinstance(module, Relaxed)}
    of = {parameter: (group, name) for name, module in relaxed.items() for group, parameter in _grouped(name, module)}
    inside = {parameter for module in relaxed.values() for parameter in module.parameters()}
    groups: dict[str, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter in of:
            groups[of[parameter][0]][name] = parameter
        elif parameter not in inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            if parameter.dtype.itemsize < 4:
                raise RecipeError(
                    f"{name} is to train in place in {parameter.dtype}, which is too coarse for small steps; open the "
                    "model in float32, or relax its linears"
                )
            groups["weights"][name] = parameter
    if not any(groups.values()):
        named = f"; no parameter is named like {', '.join(patterns)}" if patterns else ""
        raise RecipeError(f"nothing in the model would train: no linear is relaxed{named}")
    return Trained(tuple(relaxed.values()), groups, _buffers(relaxed))


def _grouped(name: str, module: Relaxed) -> Iterator[tuple[str, nn.Parameter]]:
    for group, parameters in module.groups().items():
        if group not in GROUPS:
            raise RecipeError(f"{name}: a relaxation trains a group {group!r}; known: {', '.join(GROUPS)}")
        yield from ((group, parameter) for parameter in parameters)


def _buffers(relaxed: Mapping[str, Relaxed]) -> dict[str, Tensor]:
    """Buffers that belong to the relaxation, by name; those of a frozen kind below it never change."""
    found = {}
    for outer, module in relaxed.items():
        kinds = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, Kind))
        for name in module.state_dict():
            if not name.startswith(kinds) and name in dict(module.named_buffers()):
                found[f"{outer}.{name}"] = module.get_buffer(name)
    return found
