"""What is outside of the blocks and may be compressed: the token embedding and the head.

Of a tied model both are one table.  What cannot be treated is told with the reason, so that whoever names it as a
target is told in turn.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tersely.anatomy.families import LINEARS, Family
from tersely.anatomy.nouns import Site, Table
from tersely.kinds import Kind


def table_of(model: PreTrainedModel, family: Family, block: int, unfit: dict[str, str]) -> Table | None:
    """The token embedding; where it cannot be a target, `unfit` is told why."""
    path = outer_path(model, family.embeddings[0])
    module = dict(model.named_modules()).get(path)
    scale = getattr(module, "scalar_embed_scale", None)  # of a class that differs from the plain one in this alone
    if isinstance(module, Kind):
        unfit["embeddings"] = f"{path} is already {type(module).__name__}"
    elif type(module) is not nn.Embedding and not (isinstance(module, nn.Embedding) and scale is not None):
        unfit["embeddings"] = f"{path} is a {type(module).__name__}; wanted a plain table of embeddings"
    elif module.max_norm is not None:
        unfit["embeddings"] = f"{path} renormalises its rows as they are looked up; wanted a table that stays as it is"
    if "embeddings" in unfit:
        return None
    assert isinstance(module, nn.Embedding)
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight} - {f"{path}.weight"}
    head = path_of_head(model)
    others = names - {f"{head}.weight"}
    if others:
        unfit["embeddings"] = f"{path} shares its table with {', '.join(sorted(others))}"
        return None
    rows, columns = module.weight.shape
    tied = _head_site(model, block, "") if names else None
    site = Site(path, "embeddings", block, "", rows, columns, False, False)
    return Table(site, module.padding_idx, None if scale is None else float(scale), tied)


def output_of(
    model: PreTrainedModel, family: Family, block: int, table: Table | None, unfit: dict[str, str]
) -> Site | None:
    """The head, unless it is tied; where it cannot be a target, `unfit` is told why."""
    path = path_of_head(model)
    if table is not None and table.head is not None:
        return None
    if path is None:
        unfit["head"] = f"{type(model).__name__} has no output head that makes logits of tokens"
        return None
    module = model.get_submodule(path)
    if not isinstance(module, LINEARS):
        already = "already " if isinstance(module, Kind) else ""
        unfit["head"] = f"{path} is {already}{type(module).__name__}; wanted a plain linear"
    elif f"{path}.weight" in tied_names(model):
        unfit["head"] = f"{path} is tied to the embedding, and {unfit.get('embeddings', 'shares it with other parts')}"
    if "head" in unfit:
        return None
    # a head with layers of its own in front of its last linear does not read what the base returns
    return _head_site(model, block, "head" if family.final_norm is not None else "")


def _head_site(model: PreTrainedModel, block: int, reads: str) -> Site:
    name = path_of_head(model) or ""
    module = model.get_submodule(name)
    rows, columns = shape_of(module)
    bias = getattr(module, "bias", None) is not None
    return Site(name, "head", block, reads, rows, columns, bias, isinstance(module, Conv1D))


def path_of_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def outer_path(model: PreTrainedModel, path: str) -> str:
    """A path relative to the base model as one in the model."""
    return path if model.base_model is model else f"{model.base_model_prefix}.{path}"


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(out, in) of a linear or of a module that has taken its place; empty for one that does not say."""
    sides = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    return tuple(getattr(module, side) for side in sides if hasattr(module, side))


def tied_names(model: PreTrainedModel) -> tuple[str, ...]:
    """All names but the first of each parameter that has several.  By identity: on meta no storage has an address."""
    first: dict[int, str] = {}
    names = ((name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False))
    return tuple(name for name, identity in names if first.setdefault(identity, name) != name)
