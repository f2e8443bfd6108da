"""Theorems of the truncations, linear by linear, on the calibration data itself.

    python tools/layer_errors.py MODEL TEXT... [--keep 0.9 0.8 0.6 0.4] [--shift 0.6]

Prints Markdown.  All methods get the same rank, that which fits into `keep` of a linear's bytes, and their defaults.
Ratios up to 1 + 1e-5 count as at most 1: factors are stored in float32, and dampings differ between methods.

output     E‖W x - W' x‖² / E‖W x‖² on the inputs x of the dense model.  Whitening has the least of all W' of its rank.
anchored   E‖W x - W' x̂‖² / E‖W x‖², x̂ the inputs in a model that `svd_llm` has cut to `--shift` with propagate =
           "input".  That of `aa_svd` with anchor 1 is the least; anchor 0 and whitening fit W x̂ instead.
two-sided  tr(R Δ G Δᵀ), Δ = W - W', in the metrics of outputs and inputs as `kfac_svd` shrinks them: its own is least.
both       tr(R Δ Ĝ Δᵀ), Δ = W* - W', Ĝ of the shifted inputs, W* the best linear of full rank for the target of
           `anchored_kfac`, whose own is the least.  Its parents are `kfac_svd` and `aa_svd` with the same anchor.

That channel scaling (`asvd`) is below plain SVD is no theorem.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from tersely.calibrate import Blocks, Replay, StatisticsStore, watch_list
from tersely.checkpoint import open_source
from tersely.gradients import GradientStatistics
from tersely.job import as_weight, of_inputs
from tersely.methods import METHODS, Method
from tersely.methods.low_rank.aa_svd import AnchoredSVD, anchored_target
from tersely.methods.low_rank.anchored_kfac import AnchoredTwoSidedSVD
from tersely.methods.low_rank.kfac_svd import TwoSidedSVD, felt_root, shrunk
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import quiet, run
from tersely.prepare import Prepared, prepare
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.stats import Cross, Gram, Stats, keyed_by
from tersely.targets import of_site

ONE_SIDED = ("svd", "asvd", "fwsvd", "nsvd", "adasvd", "dobi")
WHITENING, TWO_SIDED, ANCHORED = WhitenedSVD(), TwoSidedSVD(), AnchoredTwoSidedSVD()
ANCHOR_1, ANCHOR_0 = AnchoredSVD(anchor=1.0), AnchoredSVD(anchor=0.0)
PARENT = AnchoredSVD(anchor=ANCHORED.anchor)
ROUNDING = 1e-5


@dataclass(frozen=True)
class Layer:
    """A linear with what is known of it: its inputs and gradients in the dense model, and its shifted inputs."""

    weight: Tensor
    dense: Stats
    shifted: Stats

    def rank(self, keep: float) -> int:
        return int(keep * self.weight.numel() / sum(self.weight.shape))

    def cut(self, method: Method, stats: Stats, keep: float) -> Tensor:
        """W', as it is stored, in float64."""
        dense: Tensor = method.compress(self.weight, stats, self.rank(keep)).to_dense()
        return dense.double()


def layers(ready: Prepared, compressed: Path) -> Iterator[Layer]:
    """All linears of the blocks, observed in the dense and in the compressed model at once."""
    assert ready.windows is not None  # the step calibrates
    source, anatomy, tokens = ready.source, ready.anatomy, ready.windows.tokens
    methods = [*(METHODS[name]() for name in ONE_SIDED), WHITENING, TWO_SIDED, ANCHORED]
    kinds = {kind for method in methods for kind in method.needs}
    felt = [kind for kind in kinds if keyed_by(kind) != "input"]
    store = StatisticsStore(compressed.parent / "gradients", {}, shared=False)
    gradients = GradientStatistics(source, anatomy, anatomy.sites, felt, tokens, store, "cpu", quiet)
    dense, cut = Blocks(source, anatomy, "cpu"), Blocks(open_source(compressed), anatomy, "cpu")
    stream = Replay(source, anatomy, tokens, "cpu")
    shifted = stream.fork()
    for index in range(len(anatomy.blocks)):
        block, sites = dense.dense(index), [site for site in anatomy.sites if site.block == index]
        seen = watch_list(anatomy, index, sites, of_inputs(list(kinds - {Cross})), "cpu")
        moved = watch_list(anatomy, index, sites, (Gram, Cross), "cpu")
        shifted.observe(cut.dense(index), moved, advance=True, beside=(stream, block))
        stream.observe(block, seen, advance=True)
        of_block = gradients.of_block(index)
        for site in sites:
            yield Layer(
                as_weight(source.tensor(f"{site.name}.weight"), site),
                of_site(site, {key: stats for key, (_, stats) in seen.items()} | of_block),
                of_site(site, {key: stats for key, (_, stats) in moved.items()} | of_block),
            )


def output_error(layer: Layer, method: Method, keep: float) -> float:
    """E‖W x - W' x‖² / E‖W x‖², x the dense inputs."""
    return _share(layer.weight.double(), layer.cut(method, layer.dense, keep), layer.dense)


def anchored_error(layer: Layer, method: Method, keep: float) -> float:
    """E‖W x - W' x̂‖² / E‖W x‖²."""
    return _share(layer.weight.double(), layer.cut(method, layer.shifted, keep), layer.shifted)


def two_sided_error(layer: Layer, method: Method, keep: float) -> float:
    """tr(R Δ G Δᵀ) on the dense inputs."""
    return _felt(layer.weight.double() - layer.cut(method, layer.dense, keep), layer.dense)


def own_error(layer: Layer, method: Method, keep: float) -> float:
    """tr(R Δ Ĝ Δᵀ), Δ from the anchored target."""
    wanted = anchored_target("anchored_kfac", layer.weight.double(), layer.shifted, ANCHORED.anchor, ANCHORED.damping)
    return _felt(wanted - layer.cut(method, layer.shifted, keep), layer.shifted)


def _share(weight: Tensor, cut: Tensor, stats: Stats) -> float:
    gram = stats[Gram].mean()
    cross, dense = (stats[Cross].mean() + gram, stats[Cross].dense()) if Cross in stats else (gram, gram)
    energy = ((weight @ dense) * weight).sum()
    lost = energy - 2 * ((weight @ cross) * cut).sum() + ((cut @ gram) * cut).sum()
    return float(lost / energy)


def _felt(difference: Tensor, stats: Stats) -> float:
    turned = felt_root(stats, ANCHORED.shrink_gradients).T @ difference
    return float(((turned @ shrunk(stats[Gram].mean(), ANCHORED.shrink_inputs)) * turned).sum())


@dataclass(frozen=True)
class Claim:
    """That one method has the least error of some kind."""

    name: str
    error: Callable[[Layer, Method, float], float]
    best: tuple[str, Method]
    others: Mapping[str, Method]


PLAIN = {name: METHODS[name]() for name in ONE_SIDED}
CLAIMS = (
    Claim("output", output_error, ("svd_llm", WHITENING), PLAIN),
    Claim("anchored", anchored_error, ("anchor 1", ANCHOR_1), {"anchor 0": ANCHOR_0, "svd_llm": WHITENING}),
    Claim("two-sided", two_sided_error, ("kfac_svd", TWO_SIDED), {"svd_llm": WHITENING}),
    Claim("both", own_error, ("anchored_kfac", ANCHORED), {"kfac_svd": TWO_SIDED, "aa_svd": PARENT}),
    # no theorem
    Claim("output", output_error, ("asvd", PLAIN["asvd"]), {"svd": PLAIN["svd"]}),
)


def tables(found: Sequence[Layer], keeps: Sequence[float]) -> Iterator[str]:
    """Of how many linears every claim holds, with the largest ratio of the two errors; then the mean errors."""
    means: dict[str, list[str]] = {}
    yield "| error | claim | " + " | ".join(f"keep {keep}" for keep in keeps) + " |"
    yield "|---|---|" + "--:|" * len(keeps)
    for claim in CLAIMS:
        methods = dict([claim.best]) | dict(claim.others)
        errors = {n: [[claim.error(layer, m, keep) for layer in found] for keep in keeps] for n, m in methods.items()}
        means |= {f"{claim.name} | {n}": [f"{fmean(at_keep):.4f}" for at_keep in errors[n]] for n in methods}
        best = claim.best[0]
        for other in claim.others:
            cells = []
            for mine, its in zip(errors[best], errors[other], strict=True):
                ratios = [a / b for a, b in zip(mine, its, strict=True)]
                held = sum(ratio <= 1 + ROUNDING for ratio in ratios)
                cells.append(f"{held} of {len(ratios)}, {max(ratios):.6f}")
            yield f"| {claim.name} | {best} ≤ {other} | " + " | ".join(cells) + " |"
    yield ""
    yield "| error | mean of | " + " | ".join(f"keep {keep}" for keep in keeps) + " |"
    yield "|---|---|" + "--:|" * len(keeps)
    yield from (f"| {what} | " + " | ".join(cells) + " |" for what, cells in means.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--shift", type=float, default=0.6, help="How much the model behind x̂ keeps.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        step = MethodStep("svd_llm", keep=asked.shift, allocate="uniform", propagate="input")
        ready = prepare(Recipe(asked.model, [step], Calibration(asked.text, order="first")), Path(work) / "cut")
        found = list(layers(ready, run(ready).out))
        for line in tables(found, asked.keep):
            print(line, flush=True)


if __name__ == "__main__":
    main()
