"""What all commands stand on: the application, its exit statuses, lines for people."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from tersely.errors import AnatomyError, NumericalError, RecipeError, TerselyError

LOOK, MAKE, PROVE, SHIP = "look", "make", "prove", "ship"

# Options that take several values, and how many positional arguments their commands have.
SEVERAL = {"--text", "--calibrate", "--evaluate", "--objective", "--set", "--target", "--tasks", "--what"}
POSITIONALS = {
    "bench": 2, "compress": 2, "convert": 2, "diagnose": 1, "eval": 1, "export": 2, "plan": 1, "train": 2,
}  # fmt: skip

ALONE = {"--debug", "--drift", "--dry-run", "--fresh", "--speed", "--trust-remote-code"}
"""Options that take no value."""

SILENTLY_INTERRUPTED = 130
"""What the library makes of an interrupt where no work had begun, without a word."""

app = typer.Typer(
    help="Makes language models smaller and proves that they still work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
# without a terminal there is no edge to keep to: what is piped into a file must not lose the ends of its cells
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
debugging = False


class Interrupted(TerselyError):
    """Work had begun when it failed; what is done so far is kept."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: 0 done, 2 wrong input with nothing written, 1 failed midway.  No traceback without --debug."""
    given = spread(list(sys.argv[1:] if arguments is None else arguments))
    try:
        status = typer.main.get_command(app).main(given, "tersely", standalone_mode=False)
        if status == SILENTLY_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; give the same command again", 1)
    except (Interrupted, NumericalError) as error:
        _fail(str(error), 1)
    except TerselyError as error:
        _fail(str(error), 2)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong flag or value, in typer's own words
            error.show()
            sys.exit(error.exit_code)
        _fail(f"{type(error).__name__}: {error} (unexpected; run `tersely --debug …` for the traceback)", 1)


def spread(arguments: list[str]) -> list[str]:
    """``--text a b`` as ``--text a --text b``, once the command has its positional arguments."""
    result: list[str] = []
    option, positionals, command = None, 0, None
    for i, argument in enumerate(arguments):
        before = arguments[i - 1] if i else ""
        if argument.startswith("-") and argument != "-":
            several = SEVERAL | {"--keep"} if command == "bench" else SEVERAL
            option = argument if argument in several else None
        elif command is None and argument in POSITIONALS:
            command = argument
        elif option is not None and before != option and positionals >= POSITIONALS.get(command or "", 99):
            result.append(option)
        elif option is None and (not before.startswith("--") or "=" in before or before in ALONE):
            positionals += 1
        elif option is not None and before != option:
            option, positionals = None, positionals + 1
        result.append(argument)
    return result


@app.callback()
def settings(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    global debugging
    debugging = debug
    # what the libraries say of opening folders would drown what is said here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def use_threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise RecipeError(f"--threads {count}; wanted 1 or more")
    import torch

    torch.set_num_threads(count)


@contextmanager
def working() -> Iterator[None]:
    """Work has begun: what goes wrong from here on leaves a run that can be resumed."""
    try:
        yield
    except KeyboardInterrupt as error:  # the library would end with 130 and no word
        raise Interrupted("interrupted; give the same command again to go on") from error
    except (AnatomyError, NumericalError, RecipeError) as error:  # nothing about these is a matter of luck
        raise Interrupted(f"{error}; the same command would end here again, so change it") from error
    except Exception as error:
        what = str(error) if isinstance(error, TerselyError) else f"{type(error).__name__}: {error}"
        raise Interrupted(f"{what}; what is done so far is kept, give the same command again to go on") from error


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _fail(line: str, status: int) -> None:
    if debugging:
        raise
    say(f"error: {line}")
    raise SystemExit(status)
