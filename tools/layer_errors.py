"""Output error of every linear under the three truncations, on the calibration data itself.

    python tools/layer_errors.py MODEL TEXT... [--keep 0.8]

Prints Markdown: whitening must be at or below both others on every layer, by theorem; channel scaling is usually below
plain SVD, which no theorem says.
"""

import argparse
import tempfile
from pathlib import Path

from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe

METHODS = ("svd", "asvd", "svd_llm")


def errors(model: str, texts: list[str], method: str, keep: float, work: Path) -> dict[str, float]:
    step = MethodStep(method, keep=keep, allocate="uniform", propagate="none")
    recipe = Recipe(model, [step], Calibration(texts, order="first"))
    result = run(prepare(recipe, work / f"{method}-{keep}"), statistics=work / "statistics")
    return {site.name: site.measured_error for site in result.report.sites}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    asked = parser.parse_args()
    print("| keep | layers | whitening ≤ both | ASVD < SVD | mean svd / asvd / svd_llm | worst svd / asvd / svd_llm |")
    print("|---|--:|--:|--:|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for keep in asked.keep:
            found = {method: errors(asked.model, asked.text, method, keep, Path(work)) for method in METHODS}
            rows = [tuple(found[method][name] for method in METHODS) for name in found["svd"]]
            whitening = sum(white <= min(plain, scaled) for plain, scaled, white in rows)
            scaling = sum(scaled < plain for plain, scaled, _ in rows)
            columns = list(zip(*rows, strict=True))
            means = " / ".join(f"{sum(column) / len(column):.4f}" for column in columns)
            worst = " / ".join(f"{max(column):.4f}" for column in columns)
            print(f"| {keep} | {len(rows)} | {whitening} | {scaling} | {means} | {worst} |")


if __name__ == "__main__":
    main()
