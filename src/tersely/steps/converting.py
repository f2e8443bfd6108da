"""Steps that exchange a part of the architecture: unit by unit, each a unit of the journal."""

from tersely.anatomy import Unit
from tersely.checkpoint import Edit
from tersely.convert import Conversion, attention_settings, norm_tensors
from tersely.job import Clock, tell_site
from tersely.kinds import Kind, Made
from tersely.recipe import ConvertStep
from tersely.steps.scene import Done, Scene
from tersely.tables import build

CONVERTING = "converting units"


def run(step: ConvertStep, scene: Scene) -> Done:
    conversion: Conversion = build(step)
    clock = Clock(scene.device)
    skeleton = scene.source.skeleton()
    units = scene.anatomy.select_units(["all"], conversion.roles)
    settings = [attention_settings(skeleton, unit) for unit in units]
    replaced: dict[str, Made] = {}
    scene.progress(CONVERTING, 0, len(units))
    for number, (unit, attention) in enumerate(zip(units, settings, strict=True)):
        names = {role: f"{site.name}.weight" for role, site in unit.sites.items()} | norm_tensors(unit, attention)
        biases = {role: f"{site.name}.bias" for role, site in unit.sites.items() if site.bias}
        with clock("convert"):
            made = conversion.convert(
                unit,
                {role: scene.source.tensor(name) for role, name in names.items()},
                {role: scene.source.tensor(name) for role, name in biases.items()},
                attention,
            )
            replaced |= _kept(scene, number, unit, made)
        tell_site(scene.progress, unit.name)
        scene.progress(CONVERTING, number + 1, len(units))
    touched = tuple(site.name for unit in units for site in unit.sites.values())
    return Done(Edit(replaced=replaced), touched, seconds=dict(clock.seconds), peaks=clock.peaks)


def _kept(scene: Scene, number: int, unit: Unit, made: dict[str, Kind]) -> dict[str, Made]:
    """What was made, its numbers mapped from disk: memory holds one unit."""
    kept = {}
    for path, kind in made.items():
        plain = Made.of(kind)
        file = f"units/{number:04}.{path or 'module'}.safetensors"
        scene.journal.write_tensors(file, plain.state)
        name = f"{unit.module}.{path}" if path else unit.module
        kept[name] = Made(plain.specs, scene.journal.read_tensors(file))
    return kept
