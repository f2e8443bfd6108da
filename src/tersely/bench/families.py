"""What is compared: the entries of every bench.  A system that is new is one more line here.

A low-rank entry has one line: method, allocator, propagation, and what else is to be said of it by name, such as
`options`, the plain values of `steps` before and `then` after it, and the `group` of rows that it may be compared with.
"""

from tersely.bench.entry import Entry

LOW_RANK = (
    Entry("svd", "uniform", "none"),
    Entry("asvd", "uniform", "none"),
    Entry("svd_llm", "uniform", "none"),
    Entry("svd_llm", "uniform", "block"),
    Entry("svd_llm", "uniform", "input"),
    Entry("svd", "greedy", "none"),
    Entry("asvd", "greedy", "none"),
    Entry("svd_llm", "greedy", "none"),
    Entry("svd_llm", "greedy", "block"),
    Entry("svd_llm", "greedy", "input"),
    Entry("svd_llm", "knapsack", "none"),
    Entry("svd_llm", "lems", "none"),
    Entry("nsvd", "uniform", "none"),
    Entry("adasvd", "uniform", "none"),
    Entry("fwsvd", "uniform", "none"),
    Entry("kfac_svd", "uniform", "none"),
    Entry("kfac_svd", "total", "none"),
    Entry("aa_svd", "uniform", "input"),
    Entry("aa_svd", "lems", "input"),
    Entry("modegpt", "uniform", "block"),
)
"""The low-rank systems of this release."""

WIDTHS = (4, 3, 2)

QUANTIZE = tuple(
    Entry(method, propagate=propagate, options={"width": width, **options}, sizes=None, steps=steps)
    for width in WIDTHS
    for method, propagate, options, steps in (
        ("rtn", "none", {}, ()),
        ("rtn", "none", {"grid": "symmetric"}, ()),
        ("gptq", "none", {}, ()),
        ("gptq", "input", {}, ()),
        ("gptq", "input", {}, ({"rewrite": "smooth"},)),
        ("gptq", "input", {}, ({"rewrite": "rotate"},)),
    )
)
"""The weight-only quantizers of this release, at fixed widths of their codes, alone and after a rewrite."""

FACTORS = {"method": "svd_llm", "keep": 0.6}
HEAL = {"objective": ["logits"], "tokens": 300_000, "rate": 2e-3, "options": {"rank": 8}}
NOISE = {"tokens": 300_000, "rate": 5e-4, "quantizer_rate": 0.02, "activations": False}

SHAPES = (
    *(Entry("stat", "uniform", options={"target": ["mlp"], "keep": keep}, sizes=None) for keep in (0.9, 0.75, 0.5)),
    *(
        Entry("latent", options={"keep": keep, "metric": metric}, sizes=None)
        for keep in (0.5, 0.25)
        for metric in ("channels", "gram")
    ),
    Entry("fope", sizes=None),
    Entry("full", options={"tokens": 300_000, "rate": 5e-4}, sizes=None, steps=({"convert": "fope"},)),
    *(Entry("mixed", options={"bits": bits, "allocate": "knapsack"}, sizes=None) for bits in (4.0, 3.0, 2.5)),
    *(Entry("mixed", options={"bits": bits, "allocate": "greedy"}, sizes=None) for bits in (4.0, 3.0, 2.5)),
    Entry("svd_llm", options={"keep": 0.6}, sizes=None),
    Entry("adapter", options=HEAL, sizes=None, steps=(FACTORS,)),
    Entry("kasa", options=HEAL | {"options": {"rank": 8, "truncate": False}}, sizes=None, steps=(FACTORS,)),
    *(Entry("nipq", options=NOISE | {"bits": bits}, sizes=None) for bits in (4.0, 3.0)),
    Entry(
        "adapter",
        options=HEAL | {"options": {"rank": 4}},
        sizes=None,
        steps=(
            {"rewrite": "smooth"},
            {"method": "svd_llm", "keep": 0.8},
            {"method": "gptq", "target": ["*.down", "*.up"], "width": 4, "propagate": "input"},
        ),
    ),
)
"""One system of every shape: units, caches, conversions, relaxations, mixed options, and all of them in a row."""

BENCHES: dict[str, tuple[Entry, ...]] = {"low-rank": LOW_RANK, "quantize": QUANTIZE, "shapes": SHAPES}
