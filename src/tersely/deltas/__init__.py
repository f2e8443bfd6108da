"""Many fine-tuned models over one base: small folders of differences, and all of them served at once.

A delta folder holds what a fine-tuned model does not share with its base: a small update for each linear (kind `sum`,
whose first term is the base's own weight), and every other tensor that is not bit-equal to the base's, such as norms.
The base's tensors are not stored again.  `config.json` names the base and a checksum of its weights; opening the folder
fetches them from there and refuses any other base.  Without tersely the folder is refused, as all of ours are.

`load_deltas` keeps the base in memory once and any number of deltas beside it.  Which row of a batch is answered by
which delta is said explicitly:

    model = load_deltas("base", {"math": "delta-math", "code": "delta-code"})
    with choose(model, ["math", None, "code"]):          # None: the base itself
        model.generate(**batch)

Each linear computes the base's product once for the whole batch and each update on its own rows only.
"""

from tersely.deltas.folder import (
    Borrowed,
    base_record,
    check_pair,
    digest,
    open_any,
    open_base,
    open_delta,
    write_delta,
)
from tersely.deltas.serving import choose, load_deltas

__all__ = [
    "Borrowed",
    "base_record",
    "check_pair",
    "choose",
    "digest",
    "load_deltas",
    "open_any",
    "open_base",
    "open_delta",
    "write_delta",
]
