"""What is compared: the entries of every bench.  A system that is new is one more line here.

A low-rank entry has one line: method, allocator, propagation, and what else is to be said of it by name, such as
`options`, the plain values of `steps` before and `then` after it, and the `group` of rows that it may be compared with.
"""

from typing import Any

from tersely.bench.entry import Entry

LORA = {"train": ["tokens"], "relax": "adapter", "rank": 8, "tokens": 150_000, "rate": 1e-3}
"""SVD-LLM's healing: adapters on one factor of every product, merged, then on the other."""

REFINE = {"samples": 512, "epochs": 5}

SHRUNK = {"shrink_inputs": 0.3, "shrink_gradients": 0.4, "damping": 0.03}
"""Metrics that give way to the identity further than by default: a little less of the calibration text is learned, and
more is left for others (docs/lab.md)."""

BEST = {"shrink_inputs": 0.2, "shrink_gradients": 0.2, "damping": 0.02, "residual": 0.5, "pivot": True, "temper": True}
"""Of recipes/low_rank_best.toml: the same, less far; half of the drift of the residual stream made up for, and the
logits as sure as the dense model's."""

BEST_TRAINED = {"pivot": True, **SHRUNK, "refine": REFINE | {"epochs": 2}}
TAUGHT = {"train": ["logits"], "relax": "full", "tokens": 820_000, "patience": 8}
"""Of recipes/low_rank_best_trained.toml, which names texts to learn; here it has what the others have."""

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
    Entry("anchored_kfac", "consensus", "input", {"pivot": True, **SHRUNK}),
    Entry("anchored_kfac", "gates", "input", BEST),
    # what the factor of the logits alone does for the strongest others
    Entry("kfac_svd", "lems", "none", {"temper": True, "pivot": True}),
    Entry("aa_svd", "lems", "input", {"temper": True, "anchor": 0.5, "pivot": True}),
    Entry("modegpt", "block_influence", "block", {"temper": True}),
)

TRAINED = (
    Entry("svd_llm", "uniform", "none", then=(LORA | {"factors": ["up"]}, LORA | {"factors": ["down"]})),
    Entry("aa_svd", "uniform", "input", {"refine": REFINE}),
    Entry("anchored_kfac", "consensus", "input", {"pivot": True, "refine": REFINE}),
    Entry("anchored_kfac", "consensus", "input", BEST_TRAINED, then=(TAUGHT | {"rate": 2e-3}, TAUGHT | {"rate": 5e-4})),
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
            {"width": 8, "group": 0, "target": ["*.down", "*.rest", "attention", "mlp"]},
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

WIDTHS = (8, 4, 3, 2)

NEAREST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rtn", {}),
    ("rtn", {"grid": "symmetric"}),
    ("rtn", {"group": 128}),
    ("hqq", {}),
    ("sinq", {}),
    ("sinq", {"scale": "log8"}),
)
"""Data-free quantizers, at every width."""

SMALL_GROUPS = {"group": 32, "scale": "log8", "shrink": True}
"""As many bytes as groups of 64 with scales of 16 bits, and a finer grid."""

CALIBRATED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gptq", {}),
    ("gptq", {"group": 32, "shrink": True}),
    ("gptq", {"shrink": True}),
    ("gptq", {"group": 128, "shrink": True}),
    ("gptq", SMALL_GROUPS),
    ("sinq", {"calibrated": True}),
    ("sinq", {"feedback": True, "scale": "log8"}),
    ("awq", {}),
    ("awq", {"rounding": "gptq"}),
    ("gwq", {}),
    ("gwq", {"score": "random"}),
    ("gwq", {"score": "magnitude", "rounding": "gptq"}),
    ("spqr", {"group": 32, "share": 0.005, "shrink": True}),
)
"""Those that read the inputs of the dense model, at 4, 3 and 2 bits."""

BLOCKS = {"epochs": 8}
CODES = {"objective": ["logits"], "tokens": 410_000, "patience": 3, "rate": 0.01}
"""Codes and ranges of the whole model together, towards the dense model's predictions: one pass over the text and more,
the numbers kept that were best on the windows held out."""
LEARNED = {
    width: Entry("rounding", options=CODES | {"rate": rate}, sizes=None, steps=({"method": "gptq", **codes},))
    for width, rate, codes in (
        (4, 0.005, {"width": 4, "group": 43, "scale": "log8"}),
        (3, 0.01, {"width": 3, **SMALL_GROUPS, "group": 43, "propagate": "input", "refine": {"epochs": 4}}),
        (2, 0.01, {"width": 2, **SMALL_GROUPS, "propagate": "input", "refine": {"epochs": 4}}),
    )
}
"""Width → the way that was best at that width on validation text (docs/lab.md), as recipes/quantize_best_WIDTH.toml."""
COMBINED = (3.3, 3.0, 2.5, 2.3, 2.0)
"""Bits per weight, everything stored counted, at which ranks, branches, widths and groups compete for the bytes."""

QUANTIZE = (
    *(
        Entry(method, propagate="none", options={"width": width, **options}, sizes=None)
        for width in WIDTHS
        for method, options in (*NEAREST, *(CALIBRATED if width < 8 else CALIBRATED[:1]))
    ),
    *(
        Entry("gptq", propagate="input", options={"width": width}, sizes=None, steps=steps)
        for width in WIDTHS[1:]
        for steps in ((), ({"rewrite": "smooth"},), ({"rewrite": "rotate"},))
    ),
    *(Entry("rtn", options={"width": w}, sizes=None, steps=({"rewrite": "pre_sinq"},)) for w in WIDTHS[1:]),
    *(Entry("nf4", options={"levels": levels}, sizes=None) for levels in ("nf4", "nf3", "fp4")),
    Entry("mxfp4", sizes=None),
    *(Entry("finequant", options={"width": width, "bits": width + 1.0}, sizes=None) for width in (8, 4)),
    Entry("spike_aware", options={"width": 8}, sizes=None),
    *(
        Entry("aqlm", propagate="none", options={"codebooks": count, "width": width, "group": 4}, sizes=None)
        for count, width in ((3, 5), (2, 5), (2, 4), (1, 6))
    ),
    *(
        Entry("mg_ptq", "knapsack", "none", {"bits": bits, "group": 128, "network": network}, sizes=None)
        for bits in (3.0, 2.5, 2.25)
        for network in ("graph", "mlp", "none")
    ),
    *(Entry("gptq", "knapsack", "none", {"bits": bits, "shrink": True}, sizes=None) for bits in (3.0, 2.5)),
    # the papers' order, integers and then one branch, and both made for each other
    *(
        Entry("qera", propagate="none", options={"width": width, "rank": 4, **order}, sizes=None)
        for width in (3, 2)
        for order in ({"rounds": 0}, {})
    ),
    # integers alone at every width and group, then with ranks and branches beside them
    *(
        Entry("mixed", "lems", "none", {"bits": bits, **offered}, sizes=None)
        for bits in COMBINED
        for offered in ({"branches": [], "ranks": 0}, {})
    ),
    *(
        Entry(method, propagate="input", options={"width": width, "refine": BLOCKS, **options}, sizes=None)
        for width in WIDTHS[1:]
        for method, options in (("rtn", {}), ("gptq", {"shrink": True}))
    ),
    Entry("aqlm", propagate="input", options={"codebooks": 2, "width": 4, "group": 4, "refine": BLOCKS}, sizes=None),
    *LEARNED.values(),
    *(Entry("rounding", options=CODES | {"options": {"width": width}}, sizes=None) for width in (3, 2)),
    *(
        Entry(
            "rounding",
            options=CODES,
            sizes=None,
            steps=(
                {"method": "mixed", "bits": bits, "allocate": "lems", "propagate": "input", "refine": {"epochs": 4}}
                # two bits and a scale for every weight are more than 2.0 together: only factors go below
                | ({"ranks": 0} if bits > 2.0 else {}),
            ),
        )
        for bits in COMBINED
    ),
)
"""The weight-only quantizers of this release: at fixed widths of their codes, in groups of 64 where nothing else is
said, at bits that are asked for, after a rewrite, and trained, block by block or all together."""

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

BENCHES: dict[str, tuple[Entry, ...]] = {"low-rank": LOW_RANK, "quantize": QUANTIZE, "shapes": SHAPES, "peers": ()}
