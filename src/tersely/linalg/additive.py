"""Additive codes: every group of neighbouring weights of a row as a sum of vectors, one out of each of several books.

    W'[i, jg:(j+1)g] = s_i · Σ_m C[m, code[i, j, m]],     C of shape [M, 2^B, g]

for a weight of N rows, cut into groups of g columns.  Given a metric G (of inputs: E[x xᵀ]), this file lowers

    L(C, s, code) = tr((W - W') G (W - W')ᵀ)

over one of the three at a time.  Everything is vectorised over rows and codewords; loops run over groups and books.

Start: residual k-means.  Rows are divided by their root mean square; the vectors of all groups are clustered, their
centres subtracted, what is left clustered again, M times.  G plays no part.

Scales, for fixed codes and books: with v_i the decoded row before scaling, s_i = w_i G v_iᵀ / v_i G v_iᵀ, row by row.

Books, for fixed codes and scales: W' = A C is linear in C, so L is quadratic, with the normal equations

    Aᵀ((A C) G) = Aᵀ(W G).

A gathers rows of the books, Aᵀ adds up what was gathered; neither is ever a matrix.  Conjugate gradients solve for C,
preconditioned by the blocks [g, g] on the diagonal, one for every codeword: Σ s_i² G_jj over the groups (i, j) that use
it.  A codeword that nobody uses stays as it is.  An iteration costs one product with G, as does a step of gradient
descent; one iteration gets lower than a hundred steps of Adam, and five or so get all there is.

Codes, all over again: error feedback (`linalg.hessian`) group by group.  With G⁻¹ = Uᵀ U, a group that is off by d
costs ‖d U_jj⁻¹‖² once all later groups have made up for it; the sum of codewords that is nearest in this metric is
found by a beam search over the books, and the rest of the row moves by what it is off.  Unlike the search below it does
not start from codes, and so does not end in the valley that is next to them.

Codes, from those there are: beam search.  Groups are visited one after the other, and in each one the books.  With P
the columns of (W - W') G that belong to the group, o the codeword that stands there and u = s (c - o), a codeword c in
its place has

    L_i(c) = L_i - 2 u·P_i + uᵀ G_jj u,

for all rows and codewords one product of [N, g] with [g, 2^B].  A row keeps the `beam` best of all that its hypotheses
offer.  What stands there is on offer too, so the best hypothesis never gets worse.  Each place is visited once, and
hypotheses are therefore never twice the same.

P of some groups at a time is made by one product, and changes inside them are carried over with the small blocks of G;
hypotheses are sorted out in those blocks, and in the whole row only at their end.

Source: Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization, 2024, section 3
(arXiv 2401.06118), for k-means and beam search; conjugate gradients and the feedback over vectors are ours, after
Frantar et al., GPTQ, 2022 (arXiv 2210.17323).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tersely.linalg.hessian import Feedback, feedback, sweep

POINTS = 256
"""Vectors for every centre that k-means looks at; more take longer and move no centre."""

AT_ONCE = 2**18
"""Scores of codewords that are in memory at the same time: few enough to stay in a cache."""

SEARCHED = 2**24
"""Numbers of hypotheses that are in memory at the same time; changes the memory, not the result."""

VISITED_TOGETHER = 16
"""Groups between two products with all of the metric; changes the time, not the result."""


@dataclass(frozen=True)
class Additive:
    """A weight in additive codes, with nothing rounded or packed."""

    codebooks: Float[Tensor, "books entries group"]
    scales: Float[Tensor, " rows"]
    codes: Int[Tensor, "rows groups books"]

    def unscaled(self) -> Float[Tensor, "rows columns"]:
        """Each row before it is multiplied by its scale.  Whole groups: as many columns as they have."""
        return gathered(self.codebooks, self.codes)

    def values(self) -> Float[Tensor, "rows columns"]:
        return self.unscaled() * self.scales[:, None]


@dataclass(frozen=True)
class Wanted:
    """What is to be coded, and how an error in it is measured; whole groups, filled up with columns that do not
    count."""

    weight: Float[Tensor, "rows columns"]
    metric: Float[Tensor, "columns columns"]
    group: int

    @classmethod
    def of(cls, weight: Float[Tensor, "rows width"], metric: Float[Tensor, "width width"], group: int) -> Self:
        spare = -weight.shape[1] % group
        return cls(pad(weight, (0, spare)), pad(metric.to(weight.dtype), (0, spare, 0, spare)), group)

    @property
    def groups(self) -> int:
        return self.weight.shape[1] // self.group

    def losses(self, values: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        """L, row by row."""
        off = self.weight - values
        return ((off @ self.metric) * off).sum(1)

    def loss(self, now: Additive) -> float:
        return float(self.losses(now.values()).sum(dtype=torch.float64))

    def blocks(self) -> Float[Tensor, "groups group group"]:
        """The blocks of the metric on its diagonal, G_jj."""
        parted = self.metric.unflatten(0, (self.groups, self.group)).unflatten(2, (self.groups, self.group))
        return parted.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


# --- the start --------------------------------------------------------------------------------------------------------


def residual_kmeans(wanted: Wanted, books: int, entries: int, generator: torch.Generator) -> Additive:
    """Books and codes by clustering what the books before have left; scales are root mean squares of rows."""
    scales = wanted.weight.square().mean(1).sqrt()
    left = (wanted.weight / torch.where(scales > 0, scales, 1.0)[:, None]).view(-1, wanted.group)
    found, codes = [], []
    for _ in range(books):
        centres = kmeans(left, entries, generator)
        nearest = nearest_centre(left, centres)
        left = left - centres.index_select(0, nearest)
        found.append(centres)
        codes.append(nearest.view(-1, wanted.groups))
    return Additive(torch.stack(found), scales, torch.stack(codes, -1))


def kmeans(
    vectors: Float[Tensor, "vectors group"], centres: int, generator: torch.Generator, *, iterations: int = 50
) -> Float[Tensor, "centres group"]:
    """Centres of clusters, from a random draw of vectors.

    A centre that no vector is nearest to moves to one of those that are worst off.  At most `POINTS` vectors for a
    centre are looked at.  Where there are no more vectors than centres, each is a centre, and the rest are zero.
    """
    drawn = torch.randperm(len(vectors), generator=generator)[: POINTS * centres]
    vectors = vectors[drawn.to(vectors.device)]
    found = pad(vectors[:centres], (0, 0, 0, max(0, centres - len(vectors))))
    if len(vectors) <= centres:
        return found
    last = torch.inf
    for _ in range(iterations):
        nearest = nearest_centre(vectors, found)
        lost = (vectors - found.index_select(0, nearest)).square().sum(1)
        count = torch.bincount(nearest, minlength=centres)
        found = torch.zeros_like(found).index_add_(0, nearest, vectors) / count.clamp(min=1)[:, None]
        idle = (count == 0).nonzero()[:, 0]
        found[idle] = vectors[lost.topk(len(idle)).indices]
        now = float(lost.sum())
        if not len(idle) and now >= last * (1 - 1e-4):
            break
        last = now
    return found


def nearest_centre(
    vectors: Float[Tensor, "vectors group"], centres: Float[Tensor, "centres group"]
) -> Int[Tensor, " vectors"]:
    """argmax v·c - |c|²/2, which is the nearest."""
    halves = centres.square().sum(1) / -2
    parts = vectors.split(max(1, AT_ONCE // len(centres)))
    return torch.cat([torch.addmm(halves, part, centres.T).argmax(1) for part in parts])


# --- books and scales -------------------------------------------------------------------------------------------------


def fit_scales(now: Additive, wanted: Wanted) -> Additive:
    """The best scales for these codes and books.  A row of which they say nothing keeps its own."""
    rows = now.unscaled()
    seen = rows @ wanted.metric
    power = (seen * rows).sum(1)
    tells = power > 0
    best = (seen * wanted.weight).sum(1) / torch.where(tells, power, 1.0)
    return replace(now, scales=torch.where(tells, best, now.scales))


def fit_codebooks(now: Additive, wanted: Wanted, *, iterations: int = 10, tolerance: float = 1e-4) -> Additive:
    """The best books for these codes and scales, by conjugate gradients that start at the ones there are.

    Stops after `iterations`, or when the preconditioned residual has shrunk by `tolerance`.  Never worse than before.
    """

    def spread(books: Tensor) -> Tensor:
        return gathered(books, now.codes) * now.scales[:, None]

    def collected(rows: Tensor) -> Tensor:
        return _added_up(rows * now.scales[:, None], now.codes, now.codebooks)

    solve = _preconditioner(now, wanted)
    books = now.codebooks
    gradient = collected((wanted.weight - now.values()) @ wanted.metric)
    direction = solve(gradient)
    slope = float((gradient * direction).sum())
    least = tolerance**2 * slope
    for _ in range(iterations):
        change = spread(direction)
        seen = change @ wanted.metric
        bend = float((seen * change).sum())
        if not (slope > least and bend > 0):
            break
        step = slope / bend
        books = books + step * direction
        gradient = gradient - step * collected(seen)
        towards = solve(gradient)
        slope, former = float((gradient * towards).sum()), slope
        direction = towards + (slope / former) * direction
    fitted = replace(now, codebooks=books)
    return fitted if wanted.loss(fitted) <= wanted.loss(now) else now


def _preconditioner(now: Additive, wanted: Wanted) -> Callable[[Tensor], Tensor]:
    """Divides books by the diagonal blocks of the normal equations."""
    books, entries, group = now.codebooks.shape
    groups = wanted.groups
    places = torch.arange(groups, device=now.codes.device)
    squares = now.scales.square()[:, None].expand(-1, groups).flatten()
    uses = [
        torch.bincount((codes * groups + places).flatten(), squares, entries * groups) for codes in now.codes.unbind(2)
    ]
    weights = torch.stack(uses).to(wanted.metric).view(books * entries, groups)
    blocks = (weights @ wanted.blocks().flatten(1)).view(-1, group, group)
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
    idle = mean <= 0
    # a block may be singular, of an input that was silent or of columns that do not count
    ridge = torch.where(idle, 1.0, 1e-5 * mean)
    factors = torch.linalg.cholesky(blocks + torch.diag_embed(ridge[:, None].expand(-1, group)))

    def solve(gradient: Tensor) -> Tensor:
        found = torch.cholesky_solve(gradient.view(-1, group, 1), factors)[..., 0]
        return found.masked_fill(idle[:, None], 0.0).view_as(gradient)

    return solve


def gathered(
    books: Float[Tensor, "books entries group"], codes: Int[Tensor, "rows groups books"]
) -> Float[Tensor, "rows columns"]:
    """A: sums of codewords, as rows."""
    chosen = (_rows(book, of_book) for book, of_book in zip(books, codes.unbind(2), strict=True))
    return reduce(torch.add, chosen).flatten(1)


def _added_up(rows: Float[Tensor, "rows columns"], codes: Int[Tensor, "rows groups books"], like: Tensor) -> Tensor:
    """Aᵀ: for every codeword the sum of the groups that use it."""
    vectors, found = rows.reshape(-1, like.shape[2]), torch.zeros_like(like)
    for m in range(len(like)):
        found[m].index_add_(0, codes[..., m].flatten(), vectors)
    return found


# --- codes, all over again --------------------------------------------------------------------------------------------


def group_feedback(wanted: Wanted) -> Feedback:
    """How errors spread from group to group, by falling power of their inputs."""
    power = wanted.metric.diagonal()
    # columns that do not count keep their place in the group, at next to no price
    price = power + torch.where(power > 0, 0.0, 1e-6 * power.mean())
    order = power.view(wanted.groups, -1).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * wanted.group + torch.arange(wanted.group, device=order.device)).flatten()
    metric = wanted.metric + torch.diag(price - power)
    spread = feedback(metric[columns][:, columns], damping=0.0, loudest_first=False)
    return replace(spread, order=columns, dead=power <= 0)


def feed_back(now: Additive, wanted: Wanted, spread: Feedback, beam: int) -> Additive:
    """Codes for these books and scales that do not depend on the codes there are.  They may be worse."""
    group, order = now.codebooks.shape[2], spread.order.tolist()
    codes, values = torch.empty_like(now.codes), torch.empty_like(wanted.weight.T)

    def decide(place: int, columns: Tensor) -> Tensor:
        if place % group == 0:
            own = spread.root[place : place + group, place : place + group].T.to(now.codebooks)
            chosen = _nearest_sums(columns[:group].T @ own, now.codebooks @ own, now.scales, beam)
            codes[:, order[place] // group] = chosen
            decoded = gathered(now.codebooks, chosen[:, None]) * now.scales[:, None]
            values[place : place + group] = decoded.T
        return values[place]

    sweep(wanted.weight, spread, decide, block=VISITED_TOGETHER * group)
    return replace(now, codes=codes)


def _nearest_sums(
    wanted: Float[Tensor, "rows group"],
    codebooks: Float[Tensor, "books entries group"],
    scales: Float[Tensor, " rows"],
    beam: int,
) -> Int[Tensor, "rows books"]:
    """One codeword of each book, so that scale · sum is near; with one book, the nearest."""
    entries, parts = codebooks.shape[1], []
    size = max(1, AT_ONCE // (beam * entries))
    powers = codebooks.square().sum(2)
    for left, scale in zip(wanted[:, None].split(size), scales[:, None, None].split(size), strict=True):
        chosen = torch.empty(len(left), 1, 0, dtype=torch.long, device=left.device)
        for m, book in enumerate(codebooks):
            scores = (left @ book.T).mul_(-2).add_(scale * powers[m]).mul_(scale)
            scores += left.square().sum(2, keepdim=True)
            scores = scores.flatten(1)
            best = scores.topk(min(beam, scores.shape[1]), dim=1, largest=False).indices
            parent, code = best // entries, best % entries
            chosen = torch.cat([_pick(chosen, parent), code[..., None]], 2)
            left = _pick(left, parent) - scale * _rows(book, code)
        parts.append(_pick(chosen, left.square().sum(2).argmin(1, keepdim=True))[:, 0])
    return torch.cat(parts)


# --- codes, from those there are --------------------------------------------------------------------------------------


def beam_search(
    now: Additive, wanted: Wanted, beam: int, generator: torch.Generator
) -> tuple[Additive, Float[Tensor, " rows"]]:
    """Better codes for these books and scales, and by how much L of each row has changed, which is never upwards.

    Groups, and the books in each of them, are visited in random order.
    """
    order = torch.randperm(wanted.groups, generator=generator).to(wanted.metric.device)
    turns = torch.rand(wanted.groups, len(now.codebooks), generator=generator).argsort(1).tolist()
    entries = now.codebooks.shape[1]
    size = max(1, SEARCHED // (beam * max(entries, wanted.weight.shape[1])))
    codes, changes = [], []
    for start in range(0, len(now.codes), size):
        rows = slice(start, start + size)
        search = _Search(replace(now, scales=now.scales[rows], codes=now.codes[rows]), wanted.weight[rows])
        for together in order.split(VISITED_TOGETHER):
            search.visit(together, wanted, beam, turns)
        codes.append(search.codes[:, 0])
        changes.append(search.change[:, 0])
    return replace(now, codes=torch.cat(codes)), torch.cat(changes)


class _Search:
    """Hypotheses for some rows, the best one first: ``[rows, hypotheses, …]`` throughout."""

    def __init__(self, now: Additive, weight: Float[Tensor, "rows columns"]) -> None:
        self._books, self._scales = now.codebooks, now.scales[:, None, None]
        self.codes = now.codes[:, None].clone()
        self.change = torch.zeros_like(self._scales[..., 0])
        """Of L, since the start."""
        self._off = (weight - now.values())[:, None]

    def visit(self, together: Int[Tensor, " visited"], wanted: Wanted, beam: int, turns: list[list[int]]) -> None:
        """Choose again in some groups."""
        group, entries = wanted.group, self._books.shape[1]
        columns = (together[:, None] * group + torch.arange(group, device=together.device)).flatten()
        metric = wanted.metric[columns][:, columns]
        pull = (self._off @ wanted.metric[:, columns]).unflatten(2, (-1, group))
        moved, chosen = torch.zeros_like(pull), self.codes[:, :, together]
        origin = torch.arange(pull.shape[1], device=pull.device).expand(len(pull), -1)
        for place, j in enumerate(together.tolist()):
            mine = slice(place * group, (place + 1) * group)
            for m in turns[j]:
                book = self._books[m]
                seen = book @ metric[mine, mine]
                before = chosen[:, :, place, m]
                old = _rows(book, before)
                aim = pull[:, :, place] + self._scales * (old @ metric[mine, mine])
                scores = (aim @ book.T).mul_(-2).add_(self._scales * (seen * book).sum(1)).mul_(self._scales)
                scores += self.change[..., None] - scores.gather(2, before[..., None])
                self.change, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1, largest=False)
                parent, code = best // entries, best % entries
                if beam > 1:
                    pull, moved, chosen, old = (_pick(x, parent) for x in (pull, moved, chosen, old))
                    origin = origin.gather(1, parent)
                chosen[:, :, place, m] = code
                change = self._scales * (_rows(book, code) - old)
                moved[:, :, place] += change
                pull -= (change @ metric[mine]).unflatten(2, (-1, group))
        if beam > 1:
            self._off, self.codes = _pick(self._off, origin), _pick(self.codes, origin)
        self._off[:, :, columns] -= moved.flatten(2)
        self.codes[:, :, together] = chosen


def _pick(of: Tensor, parents: Int[Tensor, "rows beam"]) -> Tensor:
    """For every row, the hypotheses with these numbers."""
    index = parents.view(*parents.shape, *[1] * (of.ndim - 2)).expand(-1, -1, *of.shape[2:])
    return of.gather(1, index)


def _rows(book: Float[Tensor, "entries group"], codes: Int[Tensor, "*places"]) -> Float[Tensor, "*places group"]:
    return book.index_select(0, codes.flatten()).view(*codes.shape, -1)
