"""Ours beside other people's packages: the same windows, difference by difference.

For every row of a package (`peers`) there are rows of ours to be held against it: those of the same algorithm and group
on codes of the same width, whatever else they say, and the way that was chosen for that width on other texts.  Per text
the losses of windows are paired (`evaluation.paired`), so an interval says whether a difference is one of the models or
of the windows.  It says nothing of other texts and of other calibration seeds, and bits may differ: they are shown.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tersely.bench.peers import Peer
from tersely.evaluation import paired
from tersely.report.naming import way

Row = dict[str, Any]
Losses = Mapping[str, Tensor]
"""Text → the mean loss of each of its windows."""


def beside_peers(
    peers: Sequence[Peer], rows: Sequence[Row], chosen: Mapping[int, str], losses_of: Callable[[Row], Losses | None]
) -> list[dict[str, Any]]:
    """One comparison for each text, row of a package and row of ours that belongs beside it.

    `chosen`: width of a code → the way that was chosen for it.  `losses_of`: a row → its losses, None where they are
    gone; such rows are left out.
    """
    found: list[dict[str, Any]] = []
    for peer in peers:
        theirs = [row for row in rows if _way(row) == way(peer.method, peer.described()) and "perplexity" in row]
        for their in theirs:
            for our in _ours(peer, rows, chosen):
                if our["text"] == their["text"]:
                    found += _pair(our, their, losses_of)
    return found


def _ours(peer: Peer, rows: Sequence[Row], chosen: Mapping[int, str]) -> Iterator[Row]:
    width = peer.options["width"]
    for row in rows:
        alike = row["method"] == peer.counterpart and row["group"] == peer.group
        alike = alike and row["options"].get("width") == width
        if "perplexity" in row and (alike or _way(row) == chosen.get(width)):
            yield row


def _pair(our: Row, their: Row, losses_of: Callable[[Row], Losses | None]) -> Iterator[dict[str, Any]]:
    of_ours, of_theirs = losses_of(our), losses_of(their)
    if of_ours is None or of_theirs is None:
        return
    pair = paired(of_ours[our["text"]], of_theirs[our["text"]])
    yield {
        "peer": _way(their),
        "ours": _way(our),
        "text": our["text"],
        "bits_per_weight": [our["bits_per_weight"], their["bits_per_weight"]],
        "perplexity": [our["perplexity"], their["perplexity"]],
        "ratio": pair.ratio,
        "ratio_interval": pair.ratio_interval,
        "lower": pair.is_lower,
        "seconds": [our["seconds"], their["seconds"]],
    }


def _way(row: Row) -> str:
    return way(row["method"], row["options"])
