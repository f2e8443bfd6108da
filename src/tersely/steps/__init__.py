"""The steps of a recipe: one file per verb, one function that chooses."""

from tersely.recipe import CacheStep, ConvertStep, MethodStep, RewriteStep, Step, TrainStep
from tersely.steps import compressing, converting, rewriting, training
from tersely.steps.scene import Done, Scene


def run_step(step: Step, scene: Scene) -> Done:
    """Do one step, or hand back what an interrupted run has done of it."""
    match step:
        case MethodStep() | CacheStep():
            return compressing.run(step, scene)
        case RewriteStep():
            return rewriting.run(step, scene)
        case ConvertStep():
            return converting.run(step, scene)
        case TrainStep():
            return training.run(step, scene)


__all__ = ["Done", "Scene", "run_step"]
