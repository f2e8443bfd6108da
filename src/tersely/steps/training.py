"""Steps that train: relaxed modules stand in for the targets, the one loop runs, and what they harden into is kept."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from tersely.anatomy import Place, model_class
from tersely.calibrate import Blocks, Replay
from tersely.checkpoint import Edit, Source, State
from tersely.errors import RecipeError
from tersely.job import Clock
from tersely.kinds import Made
from tersely.opening import load_with_report
from tersely.recipe import TrainStep
from tersely.stats import Stats
from tersely.steps.scene import Done, Scene
from tersely.tables import build
from tersely.train.loop import TrainingOutcome, train
from tersely.train.objectives import OBJECTIVES
from tersely.train.relax import Relaxation, Relaxed
from tersely.train.relax.rounding import weight_of
from tersely.train.settings import Training
from tersely.train.standing import harden, relax_sites

UNIT = "trained"


def run(step: TrainStep, scene: Scene) -> Done:
    places = scene.anatomy.select_places(step.target)
    if not scene.journal.has(f"{UNIT}.json"):  # written after the tensors
        clock = Clock(scene.device)
        with clock("train"):
            made, outcome = _train(step, scene, places)
        states = {name: m.state if isinstance(m, Made) else m for name, m in made.items()}
        tensors = {f"{name}.{part}": tensor for name, state in states.items() for part, tensor in state.items()}
        scene.journal.write_tensors(f"{UNIT}.safetensors", tensors)
        plain = {
            "specs": {name: m.specs if isinstance(m, Made) else None for name, m in made.items()},
            "figures": _figures(outcome),
            "seconds": clock.seconds["train"],
            "peaks": clock.peaks,
        }
        scene.journal.write_json(f"{UNIT}.json", plain)
    plain = scene.journal.read_json(f"{UNIT}.json")
    tensors = scene.journal.read_tensors(f"{UNIT}.safetensors")
    states = {name: _below(name, tensors) for name in plain["specs"]}
    edit = Edit(
        replaced={name: Made(specs, states[name]) for name, specs in plain["specs"].items() if specs is not None},
        plain={name: states[name] for name, specs in plain["specs"].items() if specs is None},
    )
    touched = tuple(place.name for place in places)
    seconds, peaks = {"train": plain["seconds"]}, plain.get("peaks", {})
    return Done(edit, touched, seconds=seconds, peaks=peaks, figures={"training": plain["figures"]})


def settings_of(step: TrainStep) -> Training:
    """What the loop is told.  Raises RecipeError for values out of range."""
    return Training(**{f.name: getattr(step, f.name) for f in fields(Training) if hasattr(step, f.name)})


def _train(step: TrainStep, scene: Scene, places: tuple[Place, ...]) -> tuple[dict[str, Made | State], TrainingOutcome]:
    if scene.text is None:
        raise RecipeError("a step that trains needs text")
    relaxation: Relaxation = build(step)
    student = _opened(scene.source, scene.device)
    stats = _statistics(scene, places, relaxation) if relaxation.needs else {}
    generator = torch.Generator(scene.device).manual_seed(scene.seed)
    relaxed = relax_sites(student, [place.name for place in places], relaxation, stats, generator)
    teacher = _opened(scene.dense, scene.device) if any(OBJECTIVES[name].teaches for name in step.train) else None
    if teacher is not None:
        _lean(relaxed, teacher)
    outcome = train(
        student,
        settings_of(step),
        objectives={name: OBJECTIVES[name]() for name in step.train},
        windows=scene.text,
        generator=generator,
        relaxation=relaxation,
        bits=step.bits,
        teacher=teacher,
        journal=scene.journal,
        progress=scene.progress,
    )
    return harden(student, relaxed), outcome


def _lean(relaxed: Mapping[str, Relaxed], teacher: nn.Module) -> None:
    """Tell every relaxed module what its linear was in the dense model."""
    dense = dict(teacher.named_modules())
    for name, module in relaxed.items():
        weight = weight_of(dense.get(name))
        if weight is not None:
            module.towards(weight)


def _opened(source: Source, device: str) -> nn.Module:
    model: Any = load_with_report(source.folder, model_class(source.config))[0]
    return model.to(source.dtype).to(device).eval()


def _statistics(scene: Scene, places: tuple[Place, ...], relaxation: Relaxation) -> dict[str, Stats]:
    """What the inputs of the places look like, whatever stands there."""
    if scene.windows is None:
        raise RecipeError("a relaxation that reads statistics needs calibration text")
    blocks = Blocks(scene.source, scene.anatomy, scene.device)
    replay = Replay(scene.source, scene.anatomy, scene.windows, scene.device)
    found: dict[str, Stats] = {}
    scene.progress("measuring blocks", 0, len(scene.anatomy.blocks))
    for index, path in enumerate(scene.anatomy.blocks):
        block = blocks.dense(index)
        here = [place for place in places if place.block == index]
        watched = {}
        for place in here:
            inside = place.name.removeprefix(f"{path}.")
            width = _width(block.get_submodule(inside))
            watched[place.name] = inside, Stats({kind: kind(width, scene.device) for kind in relaxation.needs})
        replay.observe(block, watched, advance=True)
        found |= {name: stats for name, (_, stats) in watched.items()}
        scene.progress("measuring blocks", index + 1, len(scene.anatomy.blocks))
    return found


def _width(linear: nn.Module) -> int:
    """Features that a linear of whatever class reads."""
    return int(linear.nx) if hasattr(linear, "nx") else int(linear.in_features)  # type: ignore[arg-type]


def _figures(outcome: TrainingOutcome) -> dict[str, Any]:
    """For the report: how far it went, and the held-out losses on the way."""
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "kept_step": outcome.kept,
        "held_out": [asdict(measured) for measured in outcome.held_out],
    }


def _below(name: str, tensors: State) -> State:
    return {n.removeprefix(f"{name}."): tensor for n, tensor in tensors.items() if n.startswith(f"{name}.")}
