"""Steps that change weights and not the function: block by block, each block a unit of the journal."""

from collections.abc import Callable, Mapping

from torch import Tensor

from tersely.calibrate import Blocks, Replay, watch_list
from tersely.checkpoint import Edit, State
from tersely.errors import RecipeError
from tersely.job import Clock
from tersely.recipe import RewriteStep
from tersely.rewrite import Rewrite
from tersely.stats import Stats
from tersely.steps.scene import Done, Scene
from tersely.tables import build

REWRITING = "rewriting blocks"


def run(step: RewriteStep, scene: Scene) -> Done:
    rewrite: Rewrite = build(step)
    rewrite.check(scene.anatomy, scene.source.config)
    clock = Clock(scene.device)
    with clock("rewrite"):
        changed = _changed(step.name, rewrite, scene)
    return Done(
        Edit(changed=changed, settings=rewrite.settings(scene.anatomy)),
        (),
        seconds=dict(clock.seconds),
        peaks=clock.peaks,
        figures={"left_alone": rewrite.left_alone(scene.anatomy)},
    )


def _changed(name: str, rewrite: Rewrite, scene: Scene) -> State:
    """Every tensor that is another now.

    Statistics are those of the model as it came: what a rewrite does to a block changes no later input.
    """
    changed: State = dict(_unit(scene, "outside", lambda: rewrite.outside(scene.anatomy, _outside(scene))))
    replay = None
    count = len(scene.anatomy.blocks)
    blocks = Blocks(scene.source, scene.anatomy, scene.device)
    scene.progress(REWRITING, 0, count)
    for index in range(count):
        unit = f"blocks/{index:04}"
        if rewrite.needs and not scene.journal.has(f"{unit}.safetensors"):
            if scene.windows is None:
                raise RecipeError(f"step {name!r} needs calibration text")
            replay = replay or Replay(scene.source, scene.anatomy, scene.windows, scene.device)
            while replay.at < index:
                replay.observe(blocks.dense(replay.at), {}, advance=True)
            watched = watch_list(scene.anatomy, index, scene.anatomy.sites, rewrite.needs, scene.device)
            replay.observe(blocks.dense(index), watched, advance=True)
            stats = {key: of_input for key, (_, of_input) in watched.items()}
        else:
            stats = {}
        changed |= _unit(scene, unit, lambda i=index, s=stats: _block(rewrite, scene, i, s))  # type: ignore[misc]
        scene.progress(REWRITING, index + 1, count)
    return changed


def _unit(scene: Scene, name: str, make: Callable[[], Mapping[str, Tensor]]) -> State:
    """Tensors from the journal, made first if they are not there yet; mapped from disk, so memory holds one block."""
    if not scene.journal.has(f"{name}.safetensors"):
        scene.journal.write_tensors(f"{name}.safetensors", make())
    return scene.journal.read_tensors(f"{name}.safetensors")


def _outside(scene: Scene) -> State:
    inside = tuple(f"{block}." for block in scene.anatomy.blocks)
    return {name: scene.source.tensor(name) for name in scene.source.stored if not name.startswith(inside)}


def _block(rewrite: Rewrite, scene: Scene, index: int, stats: Mapping[str, Stats]) -> State:
    prefix = f"{scene.anatomy.blocks[index]}."
    state = {name: scene.source.tensor(name) for name in scene.source.stored if name.startswith(prefix)}
    return rewrite.block(scene.anatomy, index, state, stats)
