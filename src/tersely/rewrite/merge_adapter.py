"""Merging a LoRA adapter of peft into the weights: the function of both, in the weights alone.

For each linear the adapter names, W' = W + scale · up · down, formed in float64 and rounded once to the dtype of the
weight.  What changes is not what model and adapter compute together but where it is stored; every later step then sees
an ordinary model.  An adapter for linears that a step before has replaced is refused: it belongs to the weights that it
was trained on.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1 (arXiv 2106.09685).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tersely.anatomy import Anatomy, Site
from tersely.errors import AnatomyError
from tersely.rewrite.fold_norms import rounded
from tersely.stats import Statistic, Stats
from tersely.train.peft_format import Update, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class MergeAdapter:
    adapter: str = ""
    """Folder of the adapter, as peft saves it."""

    paper: ClassVar[str] = "Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)"
    summary: ClassVar[str] = "a LoRA adapter of peft merged into the weights"

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @cached_property
    def _updates(self) -> dict[str, Update]:
        return read_adapter(Path(self.adapter).expanduser())

    def check(self, anatomy: Anatomy, config: "PreTrainedConfig") -> None:
        if not self.adapter:
            raise AnatomyError("merge_adapter: no adapter is named; give adapter = FOLDER")
        sites = {site.name: site for site in anatomy.sites}
        for name, update in self._updates.items():
            if name not in sites:
                raise AnatomyError(
                    f"merge_adapter: {self.adapter} updates {name}, which is no plain linear of a block of this model; "
                    "merge before steps that replace linears"
                )
            wanted = (sites[name].out_features, sites[name].in_features)
            if (update.up.shape[0], update.down.shape[1]) != wanted:
                came = (update.up.shape[0], update.down.shape[1])
                raise AnatomyError(f"merge_adapter: the update of {name} is {came}, the weight {wanted}; another base?")

    def left_alone(self, anatomy: Anatomy) -> dict[str, str]:
        return {}

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {}

    def outside(self, anatomy: Anatomy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def block(
        self, anatomy: Anatomy, index: int, state: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Tensor]:
        here = [site for site in anatomy.sites if site.block == index and site.name in self._updates]
        return {f"{site.name}.weight": self._merged(site, state[f"{site.name}.weight"]) for site in here}

    def _merged(self, site: Site, weight: Tensor) -> Tensor:
        update = self._updates[site.name]
        delta = update.scale * (update.up.to(weight.device).double() @ update.down.to(weight.device).double())
        merged = weight.double() + (delta.T if site.transposed else delta)
        return rounded(f"{site.name}.weight", merged, weight)
