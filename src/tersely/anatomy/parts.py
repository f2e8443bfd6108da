"""What a model is made of: its blocks, the linears a method may replace, and what has to stay.

Everything else in tersely works on *sites* and never asks which model it sees.  This file is where the families differ,
and they differ in names rather than in kind: every one of them is a stack of blocks that map a hidden state to the next
one, and in every block an attention part and a feed-forward part read their inputs through four doors:

    block input ─ norm ─►(attention.in)─► q, k, v ─► softmax(q kᵀ) v ─►(attention.mix)─► o ─►
                ─ norm ─►(mlp.in)─► gate, up ─► act(gate) · up ─►(mlp.middle)─► down ─►

Sites behind one door read the very same tensor, so they share one statistic; a role alone tells the door.  A family is
therefore one entry of `FAMILIES`: where its blocks are, and which path inside a block plays which role.  Paths are
relative to `model.base_model`, so that one entry serves the bare model and every head put on top of it.

Three things complicate the picture.  Some families store q, k and v (or gate and up) as one fused matrix; that is one
site, and `fused_rows` tells its parts apart.  Mixtures of experts store all experts of a block in one tensor of three
axes; these weights and their routers are no sites, and like every linear left alone they are listed in `Anatomy.kept`
with the reason.  And a site may have been replaced before, say by the two factors of a low-rank product: whatever
linears are found below its path are sites in turn, so that compression steps can be stacked.

Replaying a model block by block relies on facts that hold for every family here and hence are no columns of the table:
a block is called with the hidden state as first positional argument, it returns the next hidden state as a plain
tensor, and it runs once per forward pass, in the order of the list it is stored in.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_CLASSES
from transformers.pytorch_utils import Conv1D

from tersely.anatomy.families import (
    FAMILIES,
    FUSED,
    LINEARS,
    OUTSIDE,
    POST_NORM,
    READS,
    SAME_INPUT,
    WRITES_BEHIND,
    Family,
)
from tersely.anatomy.nouns import Heads, Kept, Norm, Place, Site, Table, Unit
from tersely.anatomy.outside import outer_path, output_of, path_of_head, shape_of, table_of, tied_names
from tersely.errors import AnatomyError, unknown
from tersely.kinds import SharedLinear


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model; see `anatomy_of`."""

    family: str
    """The `model_type` of its configuration, a key of `FAMILIES`."""
    blocks: tuple[str, ...]
    """Paths of the blocks, in order of execution."""
    sites: tuple[Site, ...]
    """All sites, in order of execution."""
    places: tuple[Place, ...]
    """Where the family has its linears, in order of execution."""
    kept: tuple[Kept, ...]
    """Every other linear of the model, and every weight of a mixture of experts."""
    heads: Heads
    tied: tuple[str, ...]
    """Parameters that are another one under a second name, and hence stored once: ``("lm_head.weight",)``."""
    needs_first_token: bool
    """Texts have to begin with a BOS token."""
    units: tuple[Unit, ...]
    """Attention and MLP of every block whose linears are all untouched sites, in order of execution."""
    norms: tuple[Norm, ...]
    """The norms in front of linears, in order of execution, the one before the head last."""
    embeddings: tuple[str, ...]
    """Paths of the tables that make the first hidden state, the token embedding first."""
    head: str | None
    """Path of the linear that makes logits out of the last hidden state."""
    mixed_norms: str | None
    """Why the residual stream cannot be turned into another basis; None where it can."""
    streams: Mapping[str, str]
    """Path of a site whose output is added to the residual stream → path of the norm that reads the stream as it is
    before that; empty where what linears write is changed on the way."""
    table: Table | None
    """The token embedding, if it is a table as the library makes them; its block counts as one behind the last."""
    output: Site | None
    """The head, if it is a linear with a weight of its own; its block counts as one behind the last, and `reads` is ""
    unless it reads what the base model returns."""
    unfit: Mapping[str, str]
    """Of ``embeddings`` and ``head`` those that are no target, each with the reason."""

    @property
    def outside(self) -> tuple[Site, ...]:
        """What can be a target outside of the blocks: the token embedding and the head; of a tied pair the former."""
        return (*((self.table.site,) if self.table else ()), *((self.output,) if self.output else ()))

    @property
    def head_is_tied(self) -> bool:
        """Whether the head reads the weight of another part."""
        return self.head is not None and f"{self.head}.weight" in self.tied

    def untied(self) -> "Anatomy":
        """The same model, its head given a weight of its own."""
        if not self.head_is_tied or self.table is None or self.table.head is None:
            return self
        own = replace(self.table.head, reads="head" if FAMILIES[self.family].final_norm is not None else "")
        return replace(
            self,
            tied=tuple(name for name in self.tied if name != f"{own.name}.weight"),
            table=replace(self.table, head=None),
            output=own,
            kept=tuple(replace(kept, reason="output head") if kept.name == own.name else kept for kept in self.kept),
        )

    def inputs(self, block: int) -> tuple[tuple[str, tuple[Site, ...]], ...]:
        """The inputs of a block, in order of execution: pairs of the key and the sites that read this tensor."""
        groups: dict[str, list[Site]] = {}
        for site in (*self.sites, *self.outside):
            if site.block == block and site.reads:
                groups.setdefault(site.reads, []).append(site)
        return tuple((reads, tuple(sites)) for reads, sites in groups.items())

    def select(self, target: Sequence[str]) -> tuple[Site, ...]:
        """The sites a target names, each once, in order of execution.

        A plain word names a role and all roles below it: ``mlp``, ``attention``, ``attention.v``, and ``all``.  A word
        with ``*`` is a pattern over module paths: ``*.down``, ``model.layers.0.*``.  Only ``embeddings`` and ``head``
        name what is outside of the blocks; of a tied model both name the one table that is there.

        Raises AnatomyError for a word that names no site, with what there is and the nearest name.
        """
        chosen: set[Site] = set()
        for word in target:
            if word in OUTSIDE:
                if word in self.unfit:
                    raise AnatomyError(f"target {word!r}: {self.unfit[word]}")
                matching = {site for site in self.outside if word == site.role or self.head_is_tied}
            elif "*" in word:
                matching = {site for site in self.sites if fnmatchcase(site.name, word)}
            else:
                matching = {site for site in self.sites if word == "all" or f"{site.role}.".startswith(f"{word}.")}
            if not matching:
                raise AnatomyError(self._no_such_target(word))
            chosen |= matching
        return tuple(site for site in (*self.sites, *self.outside) if site in chosen)

    def select_places(self, target: Sequence[str]) -> tuple[Place, ...]:
        """As `select`, of places: a word names them by role or by path, and what has become of them does not count."""
        chosen: set[Place] = set()
        for word in target:
            named = {p for p in self.places if word == "all" or f"{p.role}.".startswith(f"{word}.")}
            named |= {p for p in self.places if "*" in word and fnmatchcase(p.name, word)}
            if not named:
                raise AnatomyError(unknown("target", word, {"all", *(p.role for p in self.places)}))
            chosen |= named
        return tuple(place for place in self.places if place in chosen)

    def select_units(self, target: Sequence[str], roles: Sequence[str]) -> tuple[Unit, ...]:
        """The units of some roles all of whose linears a target names; see `select`.

        Raises AnatomyError where there are none.
        """
        chosen = {site.name for site in self.select(target)}
        units = tuple(
            unit for unit in self.units if unit.role in roles and all(s.name in chosen for s in unit.sites.values())
        )
        if not units:
            raise AnatomyError(
                f"target {list(target)} holds no whole unit of {' or '.join(roles)} that is still as the model had it; "
                f"name {' or '.join(roles)}, before steps that replace their linears"
            )
        return units

    def coverage(self, selected: Sequence[Site], left_dense: Mapping[str, str] | None = None) -> str:
        """One sentence: how many linears `selected` touches, how many are kept, and why.

        `left_dense`: names of those selected that stayed as they are, each with the reason.
        """
        names = {site.name for site in selected}
        left = {name: reason for name, reason in (left_dense or {}).items() if name in names}
        table = self.table.site.name if self.table and self.table.site.name in names else None
        reasons = [kept.reason for kept in self.kept_beside(selected)]
        reasons += ["not among the targets" for site in self.sites if site.name not in names]
        reasons += [r for name, r in left.items() if name != table or (self.table and self.table.head)]
        total = len(self.sites) + len(self.kept)
        touched = f"{total - len(reasons)} of {total} linears touched"
        if table is not None and table not in left:
            touched += ", and the token embedding"
        return f"{touched}, {len(reasons)} kept: {_tally(reasons)}" if reasons else touched

    def kept_beside(self, selected: Sequence[Site]) -> tuple[Kept, ...]:
        """What is kept if these sites are targets: all of `kept` but the head, if it is one of them."""
        names = {site.name for site in selected}
        if self.table and self.table.head and self.table.site.name in names:
            names.add(self.table.head.name)
        return tuple(kept for kept in self.kept if kept.name not in names)

    def _no_such_target(self, word: str) -> str:
        for fused, parts in FUSED.items():
            here = fused in FAMILIES[self.family].linears
            if here and word in {f"{fused.partition('.')[0]}.{part}" for part in parts}:
                return f"target {word!r}: {self.family} stores {', '.join(parts)} fused in one matrix; name {fused!r}"
        if "*" in word:
            # One line for each kind of path, not one for each block.
            return unknown("target", word, {re.sub(r"\.\d+(?=\.)", ".*", site.name) for site in self.sites})
        if not self.sites:
            return f"target {word!r}: no linear is left to compress ({_tally(kept.reason for kept in self.kept)})"
        roles = {site.role for site in self.sites}
        known = {"all", *(OUTSIDE - self.unfit.keys()), *roles, *(role.partition(".")[0] for role in roles)}
        message, never = unknown("target", word, known), self.kept_beside(self.outside)
        return f"{message}; never a target: {_tally(kept.reason for kept in never)}" if never else message


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Name the parts of a model of a known family, whatever its head; tensors are not read, so the meta device will do.

    Raises AnatomyError for an unknown family, and for a model that does not look as its family does.
    """
    name = model.config.model_type
    if name not in FAMILIES:
        raise AnatomyError(unknown("model family", name, FAMILIES))
    family = FAMILIES[name]
    blocks = _blocks(model, family)
    parts = [part for index, block in enumerate(blocks) for part in _parts_of_block(model, family, block, index)]
    sites = tuple(part for part in parts if isinstance(part, Site))
    places = tuple(part for part in parts if isinstance(part, Place))
    tied = tied_names(model)
    heads = _heads(model)
    unfit: dict[str, str] = {}
    table = table_of(model, family, len(blocks), unfit)
    return Anatomy(
        family=name,
        blocks=blocks,
        sites=sites,
        places=places,
        kept=(*(part for part in parts if isinstance(part, Kept)), *_other_linears(model, blocks, sites, tied)),
        heads=heads,
        tied=tied,
        needs_first_token=family.needs_first_token,
        units=tuple(unit for index, block in enumerate(blocks) for unit in _units(family, block, index, sites, heads)),
        norms=tuple(_norms(model, family, blocks)),
        embeddings=tuple(outer_path(model, path) for path in family.embeddings),
        head=path_of_head(model),
        mixed_norms=_mixed_norms(model, family),
        streams=_streams(model, family, sites, blocks),
        table=table,
        output=output_of(model, family, len(blocks), table, unfit),
        unfit=unfit,
    )


def needs_first_token(config: PreTrainedConfig) -> bool:
    """Whether texts have to begin with a BOS token; of a family that is not known here, no."""
    return config.model_type in FAMILIES and FAMILIES[config.model_type].needs_first_token


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint with this configuration is opened with.

    That is ``architectures[0]``, looked up in transformers.  A configuration without architectures gets the causal
    language model of its family, unless the family consists of encoders, whose head cannot be guessed.

    Raises AnatomyError for a class that transformers does not have, and where there is nothing to follow.
    """
    if config.architectures:
        name = config.architectures[0]
    # BERT can be made causal, but it is no decoder for that: a family with a masked language model is one of encoders.
    elif config.model_type in CAUSAL_CLASSES and config.model_type not in MASKED_CLASSES:
        name = CAUSAL_CLASSES[config.model_type]
    else:
        raise AnatomyError(
            f"the configuration of model family {config.model_type!r} names no architecture, and the family has no "
            "usual one; write the class into `architectures` of config.json"
        )
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise AnatomyError(
            f"architecture {name!r} is no model class of transformers {transformers.__version__}; write one into "
            "`architectures` of config.json (code that comes with a model folder is not run)"
        )
    return found


def fused_rows(site: Site, anatomy: Anatomy) -> dict[str, Tensor]:
    """The output channels of each part of a fused site: indices into the rows of its (out, in) weight, in the order in
    which an unfused family would store them, head by head.

    Keys are ``q``, ``k``, ``v`` for ``attention.qkv`` and ``gate``, ``up`` for ``mlp.gate_up``.
    Raises AnatomyError for a site that is not fused.
    """
    if site.role not in FUSED:
        raise AnatomyError(f"{site.name} ({site.role}) is not fused; only {' and '.join(FUSED)} have parts")
    rows = torch.arange(site.out_features)
    heads = anatomy.heads
    if site.role == "mlp.gate_up":
        pieces = rows.chunk(2)
    elif FAMILIES[anatomy.family].interleaved:
        pieces = tuple(piece.flatten() for piece in rows.view(heads.query, 3, heads.width).unbind(1))
    else:
        pieces = rows.split([count * heads.width for count in (heads.query, heads.key_value, heads.key_value)])
    return dict(zip(FUSED[site.role], pieces, strict=True))


def _heads(model: PreTrainedModel) -> Heads:
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    return Heads(
        query=heads,
        key_value=getattr(settings, "num_key_value_heads", heads),
        # Qwen3 and Gemma choose the width of a head freely; elsewhere the heads divide the hidden state.
        width=getattr(settings, "head_dim", None) or settings.hidden_size // heads,
    )


def _units(family: Family, block: str, index: int, sites: Sequence[Site], heads: Heads) -> Iterator[Unit]:
    """The attention and the MLP of a block, as far as all their linears are still sites of their own."""
    here = {site.role: site for site in sites if site.block == index}
    for role in ("attention", "mlp"):
        wanted = [name for name in family.linears if name.startswith(f"{role}.")]
        if not wanted or not all(name in here for name in wanted):
            continue
        parts = {name.partition(".")[2]: here[name] for name in wanted}
        if role == "mlp":
            yield Unit(f"{block}:mlp", role, index, parts, "", None, True)
            continue
        # heads may have been removed before: what counts is the width that is there
        fused = "qkv" in parts
        query = heads.query if fused else parts["q"].out_features // heads.width
        key_value = heads.key_value if fused else parts["k"].out_features // heads.width
        of_unit = Heads(query, key_value, heads.width)
        yield Unit(
            f"{block}:attention", role, index, parts, f"{block}.{family.attention}", of_unit, family.flexible_heads
        )


def _norms(model: PreTrainedModel, family: Family, blocks: Sequence[str]) -> Iterator[Norm]:
    if _mixed_norms(model, family) == POST_NORM:
        return
    paths = [(f"{block}.{path}", f"{block}:{door}") for block in blocks for door, path in family.norms.items()]
    if family.final_norm is not None:
        paths.append((outer_path(model, family.final_norm), "head"))
    modules = dict(model.named_modules())
    for path, feeds in paths:
        if getattr(modules.get(path), "weight", None) is not None:  # a norm may go without a gain
            bias = getattr(modules[path], "bias", None) is not None
            yield Norm(path, feeds, bias, family.gain_offset)


def _streams(model: PreTrainedModel, family: Family, sites: Sequence[Site], blocks: Sequence[str]) -> dict[str, str]:
    """See `Anatomy.streams`.  Where attention and MLP run side by side and are added up, the MLP alone counts: both
    would find the drift of what the block reads."""
    if _mixed_norms(model, family) is not None:
        return {}
    doors = {role: door for role, door in WRITES_BEHIND.items() if door in family.norms}
    if getattr(model.config, "use_parallel_residual", False):
        doors.pop("attention.o", None)
    return {s.name: f"{blocks[s.block]}.{family.norms[doors[s.role]]}" for s in sites if s.role in doors}


def _mixed_norms(model: PreTrainedModel, family: Family) -> str | None:
    """As the family says; of OPT, one size norms after the sublayers and not before."""
    return family.mixed_norms if getattr(model.config, "do_layer_norm_before", True) else POST_NORM


def _blocks(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Paths of the blocks in the model; the base model is the model itself when it carries no head."""
    path = outer_path(model, family.blocks)
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.ModuleList):
        raise AnatomyError(
            f"{type(model).__name__} has no list of blocks at {path!r}, where {model.config.model_type} has it; "
            "open the model with a class that contains its whole body"
        )
    return tuple(f"{path}.{index}" for index in range(len(stack)))


def _parts_of_block(model: PreTrainedModel, family: Family, block: str, index: int) -> Iterator[Site | Place | Kept]:
    modules = dict(model.get_submodule(block).named_modules(remove_duplicate=False))
    parameters = dict(model.get_submodule(block).named_parameters(remove_duplicate=False))
    has_experts = not parameters.keys().isdisjoint(family.experts)
    for role, path in family.linears.items():
        if path in modules:
            yield Place(f"{block}.{path}", role, index, f"{block}:{READS[role]}")
            yield from _parts_below(modules[path], f"{block}.{path}", role, index, f"{block}:{READS[role]}")
        elif not (has_experts and role.startswith("mlp.")):
            raise AnatomyError(
                f"{block} has no {path!r}, where {model.config.model_type} has its {role}; transformers "
                f"{transformers.__version__} may have renamed it, or a step has replaced the module around it"
            )
    for path, reason in family.experts.items():
        if path in parameters:
            yield Kept(f"{block}.{path}", tuple(parameters[path].shape), reason)


def _parts_below(module: nn.Module, name: str, role: str, block: int, reads: str) -> Iterator[Site | Kept]:
    """The module at a declared path, if it is a linear; else the linears of what has taken its place.

    Of the children of a replacement some read what the replaced linear read (`SAME_INPUT`, and the numbered terms of a
    sum).  What the others read is not known here (`up` reads the output of `down`), so each has an input of its own;
    but those of linears that share a factor, and the input, all read its product.
    """
    if isinstance(module, LINEARS):
        rows, columns = shape_of(module)
        yield Site(name, role, block, reads, rows, columns, module.bias is not None, isinstance(module, Conv1D))
        return
    # A child without weights (an activation, a dropout) is no part.
    children = [(child, part) for child, part in module.named_children() if part.state_dict()]
    if not children:
        yield Kept(name, shape_of(module), f"already {type(module).__name__}")
    for child, part in children:
        same = child in SAME_INPUT or child.isdecimal()
        reads_below = reads if same else f"{reads}:{role}.{child}"
        if isinstance(module, SharedLinear) and module.same_input and not same:
            reads_below = f"{reads}:{module.group}"
        yield from _parts_below(part, f"{name}.{child}", f"{role}.{child}", block, reads_below)


def _other_linears(
    model: PreTrainedModel, blocks: tuple[str, ...], sites: tuple[Site, ...], tied: tuple[str, ...]
) -> Iterator[Kept]:
    """The linears of the whole model that are no sites: heads, poolers, projections, cross-attention, vision towers."""
    head = model.get_output_embeddings()
    names = {site.name for site in sites}
    inside = tuple(f"{block}." for block in blocks)
    for name, module in model.named_modules():
        if isinstance(module, LINEARS) and name not in names:
            if module is head:
                reason = "output head tied to the embedding" if f"{name}.weight" in tied else "output head"
            else:
                reason = "inside a block without a known role" if name.startswith(inside) else "outside the blocks"
            yield Kept(name, shape_of(module), reason)


def _tally(reasons: Iterable[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).items())
