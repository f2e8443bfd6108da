"""What is compared: the entries of every bench.  A system that is new is one more line here.

A low-rank entry has one line: method, allocator, propagation, and what else is to be said of it by name, such as
`options`, the plain values of `steps` before and `then` after it, and the `group` of rows that it may be compared with.
"""

from tersely.bench.entry import Entry

LORA = {"train": ["tokens"], "relax": "adapter", "rank": 8, "tokens": 150_000, "rate": 1e-3}
"""SVD-LLM's healing: adapters on one factor of every product, merged, then on the other."""

REFINE = {"samples": 512, "epochs": 5}

UNTRAINED = (
    Entry("svd", "uniform", "none"),
    Entry("asvd", "uniform", "none"),
    Entry("asvd", "sensitivity", "none"),
    Entry("fwsvd", "uniform", "none"),
    # one method under every allocator
    Entry("svd_llm", "uniform", "none"),
    Entry("svd_llm", "svd_llm_v2", "none"),
    Entry("svd_llm", "effective_rank", "none"),
    Entry("svd_llm", "importance", "none"),
    Entry("svd_llm", "greedy", "none"),
    Entry("svd_llm", "sensitivity", "none"),
    Entry("svd_llm", "lems", "none"),
    Entry("svd_llm", "dobi", "none"),
    Entry("svd_llm", "gates", "none"),
    Entry("svd_llm", "uniform", "none", {"pivot": True}),
    Entry("svd_llm", "uniform", "none", {"damping": 0.1}),
    Entry("svd_llm", "uniform", "block"),
    Entry("svd_llm", "uniform", "block", {"update": True}),
    Entry("nsvd", "uniform", "none"),
    Entry("nsvd", "uniform", "none", {"second": "id"}),
    Entry("adasvd", "uniform", "none"),
    Entry("adasvd", "uniform", "none", {"buckets": True}),
    Entry("adasvd", "importance", "block"),
    Entry("dobi", "uniform", "block"),
    Entry("dobi", "dobi", "block"),
    Entry("joint_rank", "uniform", "none", {"compare": False}),
    Entry("joint_rank", "greedy", "none", {"metric": "gram", "normalise": True}),
    Entry("basis_sharing", "uniform", "none"),
    Entry("zs_svd", "uniform", "none"),
    Entry("zs_svd", "zero_sum", "none"),
    Entry("kfac_svd", "uniform", "none"),
    Entry("kfac_svd", "total", "none"),
    Entry("kfac_svd", "lems", "none"),
    Entry("kfac_svd", "lems", "none", {"pivot": True}),
    # the four objectives of AA-SVD: plain SVD and whitening stand above
    Entry("aa_svd", "uniform", "input", {"anchor": 0.0}),
    Entry("aa_svd", "uniform", "input"),
    Entry("aa_svd", "lems", "input", {"anchor": 0.5, "pivot": True}),
    Entry("modegpt", "uniform", "block"),
    Entry("modegpt", "block_influence", "block"),
    Entry("anchored_kfac", "lems", "input", {"pivot": True}),
    Entry("anchored_kfac", "gates", "input", {"pivot": True}),
    Entry("anchored_kfac", "consensus", "input", {"pivot": True}),
)

TRAINED = (
    Entry("svd_llm", "uniform", "none", then=(LORA | {"factors": ["up"]}, LORA | {"factors": ["down"]})),
    Entry("aa_svd", "uniform", "input", {"refine": REFINE}),
    Entry("anchored_kfac", "consensus", "input", {"pivot": True, "refine": REFINE}),
)

EIGHT_BITS = (
    *(
        Entry(method, "gates", "block", {"bits": bits, "remap": True}, sizes=None, group="8-bit factors")
        for bits in (8.0, 6.4, 4.8)
        for method in ("svd_llm", "dobi")
    ),
    *(
        Entry(
            "gptq",
            None,
            "input",
            {"width": 8, "group": 0, "target": ["*.down", "*.rest"]},
            steps=(
                {"method": "anchored_kfac", "keep": keep, "allocate": "gates", "propagate": "input", "pivot": True},
            ),
            sizes=None,
            group="8-bit factors",
        )
        for keep in (0.9, 0.75, 0.55)
    ),
    Entry("rtn", None, "none", {"width": 8, "group": 0}, sizes=None, group="8-bit factors"),
)

LOW_RANK = (*UNTRAINED, *TRAINED, *EIGHT_BITS)
"""The low-rank systems of this release: weights that no gradient touches, weights that train on the calibration text,
and factors in 8 bits beside plain 8-bit weights."""

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
