"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from tersely.settings import check_seed


def _seed(given: int | None) -> int | None:
    if given is not None:
        check_seed("--seed", given)
    return given


Model = Annotated[str, typer.Argument(help="A model folder or a hub name.", show_default=False)]
Method = Annotated[str | None, typer.Option(help="Name of a method, as `tersely list` shows them.")]
Keep = Annotated[float | None, typer.Option(help="Bytes of the touched weights, as a fraction of before.")]
Bits = Annotated[float | None, typer.Option(help="Bits per touched weight, metadata included.")]
Size = Annotated[str | None, typer.Option(help="Bytes of the whole output folder, such as 300MB.")]
Perplexity = Annotated[
    float | None, typer.Option(help="The perplexity of calibration windows to stay below, as small as that allows.")
]
Base = Annotated[str | None, typer.Option(help="Compress the difference to this checkpoint.", metavar="MODEL")]
Calibrate = Annotated[
    list[str] | None, typer.Option(help="Calibration texts: files, .jsonl, datasets names, or stdlib.", metavar="TEXT…")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens in a window.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", callback=_seed)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="An option of the method or the step.", metavar="KEY=VALUE…")
]
Target = Annotated[list[str] | None, typer.Option(help="Roles or patterns; also embeddings, head.", metavar="TARGET…")]
Device = Annotated[str | None, typer.Option(help="Where blocks are computed: cpu, cuda, …")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the checkpoint's own.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the processor.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept checkpoints that bring their own code.")]
RecipeFile = Annotated[Path | None, typer.Option(help="A TOML recipe of several steps.")]
Order = Annotated[str | None, typer.Option(help="Calibration windows: random, or the first of the text.")]
OwnText = Annotated[float | None, typer.Option(help="Share of the calibration windows that MODEL itself writes.")]
Text = Annotated[list[str] | None, typer.Option(help="Texts to measure on.", metavar="TEXT…")]
Evaluate = Annotated[list[str] | None, typer.Option(help="Measure the result on these texts.", metavar="TEXT…")]
Statistics = Annotated[Path | None, typer.Option(help="Keep statistics here, for later runs to reuse.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an unfinished run in OUT.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
MaybeModel = Annotated[str | None, typer.Argument(help="A model folder or a hub name.", show_default=False)]
Out = Annotated[Path | None, typer.Argument(help="The folder to make.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", metavar="FILE")]
