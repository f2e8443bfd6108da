"""Methods side by side: the same model, the same calibration, the same budgets, the same texts.

Every row takes the path that ships: compress to a folder, open the folder, evaluate it beside the dense model.
`families` says what is compared, `entry` what a way to compress is, `peers` how other people's packages become rows,
`running` makes the rows, `markdown` shows them.
"""

from tersely.bench.entry import GROUPS, Entry, Setting, entry_of, way
from tersely.bench.families import BENCHES, LEARNED, LOW_RANK, QUANTIZE, SHAPES
from tersely.bench.markdown import markdown
from tersely.bench.peers import PEERS, Dequantized, Peer, dequantized, peers_in, run_script
from tersely.bench.running import (
    NO_RESULT,
    Bench,
    Compressed,
    Row,
    bench_content,
    check_bench,
    compressed,
    costs,
    named,
    rows_so_far,
    run_bench,
)

__all__ = [
    "BENCHES",
    "GROUPS",
    "LEARNED",
    "LOW_RANK",
    "NO_RESULT",
    "PEERS",
    "QUANTIZE",
    "SHAPES",
    "Bench",
    "Compressed",
    "Dequantized",
    "Entry",
    "Peer",
    "Row",
    "Setting",
    "bench_content",
    "check_bench",
    "compressed",
    "costs",
    "dequantized",
    "entry_of",
    "markdown",
    "named",
    "peers_in",
    "rows_so_far",
    "run_bench",
    "run_script",
    "way",
]
