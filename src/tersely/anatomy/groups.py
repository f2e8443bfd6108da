"""Linears that can share a factor: those that read one tensor, and those of one role in neighbouring blocks.

Both are units of a kind of their own, made of whatever sites were chosen: a group may have a single member, and a
linear that a step before has replaced is in none.  In attention and MLP (`Anatomy.units`) linears hang together because
one makes what another reads; here, because they read alike.
"""

from collections.abc import Collection, Iterable, Sequence

from tersely.anatomy.families import READS
from tersely.anatomy.parts import Site, Unit

READING, DEPTH = "reads", "depth"
"""The roles of the two."""


def reading_units(
    sites: Iterable[Site], together: Sequence[Collection[str]] = (("q", "k", "v"), ("gate", "up"))
) -> tuple[Unit, ...]:
    """The chosen linears by the tensor that they read, in order of execution.

    `together`: last words of roles that may share; a linear that stands in none of these sets is a unit by itself.
    Sites are named by the last word of their role: q, k, v, o, gate, up, down, or a fused name.
    """
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in _untouched(sites):
        word = _word(site)
        of = next((",".join(words) for words in together if word in words), word)
        groups.setdefault((site.reads, of), []).append(site)
    return tuple(_reading(reads, members) for (reads, _), members in groups.items())


def _reading(reads: str, members: Sequence[Site]) -> Unit:
    words = [_word(site) for site in members]
    part = members[0].role.partition(".")[0]
    block = reads.partition(":")[0]
    return Unit(
        f"{block}:{part}.{'+'.join(words)}",
        READING,
        members[0].block,
        dict(zip(words, members, strict=True)),
        "",
        None,
        True,
    )


def depth_units(sites: Iterable[Site], count: int, shared: Collection[str]) -> tuple[Unit, ...]:
    """The chosen linears by role and by `count` consecutive blocks; those of roles whose last word is not in `shared`
    are units by themselves.

    Blocks are counted from the first, so that groups of all roles have the same limits.  Sites are named by the last
    word of their role and the index of their block, as in ``q.3``.  A unit belongs to the last block that it touches;
    where inputs have another width the group begins anew.
    """
    groups: dict[tuple[str, int, int], list[Site]] = {}
    for site in _untouched(sites):
        first = site.block // count * count if _word(site) in shared else site.block
        groups.setdefault((site.role, first, site.in_features), []).append(site)
    units = [_in_depth(role, members) for (role, _, _), members in groups.items()]
    return tuple(sorted(units, key=lambda unit: unit.block))


def _in_depth(role: str, members: Sequence[Site]) -> Unit:
    first, last = members[0], members[-1]
    path = first.reads.partition(":")[0]
    stack = path.rpartition(".")[0]
    where = path if first.block == last.block else f"{stack}.{first.block}-{last.block}"
    named = {f"{_word(site)}.{site.block}": site for site in members}
    return Unit(f"{where}:{role}", DEPTH, last.block, named, "", None, True)


def _untouched(sites: Iterable[Site]) -> Iterable[Site]:
    return (site for site in sites if site.role in READS)


def _word(site: Site) -> str:
    return site.role.rpartition(".")[2]
