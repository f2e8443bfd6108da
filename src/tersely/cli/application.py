"""What all commands stand on: the application, its exit statuses, lines for people."""

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from tersely.errors import AnatomyError, DamageError, NumericalError, RecipeError, TerselyError

LOOK, MAKE, PROVE, SHIP = "look", "make", "prove", "ship"

# Options that take several values, and how many positional arguments their commands have.
SEVERAL = {"--text", "--calibrate", "--evaluate", "--objective", "--set", "--target", "--tasks", "--what"}
POSITIONALS = {
    "bench": 2, "compress": 2, "convert": 2, "diagnose": 1, "eval": 1, "export": 2, "plan": 1, "train": 2,
}  # fmt: skip

RESUMABLE = {"bench", "compress", "convert", "demo", "push", "train"}
"""Commands that find what they had finished when they are given again; the others begin anew."""

ALONE = {"--card", "--debug", "--drift", "--dry-run", "--fresh", "--speed", "--trust-remote-code"}
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
typed: list[str] = []
"""The arguments as they came."""
signalled = False
"""Whether the process was told to end.  An exception that is raised in the middle of a library's C code may come out of
it as another one, or not at all."""


class Interrupted(TerselyError):
    """Work had begun when it failed; what is done so far is kept."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: 0 done, 2 wrong input with nothing written, 1 failed midway.  No traceback without --debug."""
    global typed, signalled
    typed, signalled = list(sys.argv[1:] if arguments is None else arguments), False
    try:
        with _heeding_signals():
            status = typer.main.get_command(app).main(spread(typed), "tersely", standalone_mode=False)
        if status == SILENTLY_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except (Interrupted, NumericalError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail(_interrupted(), 1)
    except TerselyError as error:
        _fail(str(error), 2)
    except Exception as error:
        if signalled:
            _fail(_interrupted(), 1)
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong flag or value, in typer's own words
            error.show()
            sys.exit(error.exit_code)
        _fail(f"{type(error).__name__}: {error} (unexpected; run `tersely --debug …` for the traceback)", 1)


def _interrupted() -> str:
    """What to say where no work had begun, or none that is kept."""
    verb = next((argument for argument in typed if not argument.startswith("-")), "")
    return f"interrupted; {'go on with' if verb in RESUMABLE else 'begin anew with'}: {_retyped(typed)}"


def _goes_on() -> str:
    """The command line that goes on with work that has begun: without ``--fresh``, which would throw away all of it."""
    return f"what is finished is kept, go on with: {_retyped([one for one in typed if one != '--fresh'])}"


def _retyped(arguments: Sequence[str]) -> str:
    """A command line, quoted for a shell, that calls what was called."""
    program, found = Path(sys.argv[0]), shutil.which("tersely")
    name = ["tersely"]
    if program.name == "__main__.py" and program.parent.name == "tersely":
        name = [sys.executable, "-m", "tersely"]
    elif program.stem == "tersely" and (found is None or Path(found).resolve() != program.resolve()):
        name = [str(program)]  # another one than the shell would find
    return shlex.join([*name, *arguments])


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """A polite request to end is an interrupt, too: what is done is kept, and how to go on is said."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        global signalled
        signalled = True
        raise KeyboardInterrupt

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # whoever has asked for them already, or wants to be left alone, is to have it so; they are the main thread's
    untouched = (signal.default_int_handler, signal.SIG_DFL)
    is_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in usual.items() if is_main and handler in untouched]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def is_to_end() -> bool:
    return signalled


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
    most = os.cpu_count() or 1
    if not 1 <= count <= most:  # more make nothing faster, and thousands end the process in the libraries
        raise RecipeError(f"--threads {count}; wanted 1 to {most}, the processors of this machine")
    import torch

    torch.set_num_threads(count)


@contextmanager
def working(reached: Callable[[], str] | None = None) -> Iterator[None]:
    """Work has begun: what goes wrong from here on leaves a run that can be resumed.

    `reached` says how far it has come.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if signalled or isinstance(error, KeyboardInterrupt):  # the library would end with 130 and no word
            how_far = reached() if reached is not None else ""
            where = f" at {how_far}" if how_far else ""
            raise Interrupted(f"interrupted{where}; {_goes_on()}") from error
        if isinstance(error, DamageError):  # it says itself that nothing can go on
            raise Interrupted(str(error)) from error
        if isinstance(error, AnatomyError | NumericalError | RecipeError):  # nothing about these is a matter of luck
            raise Interrupted(f"{error}; the same command would end here again, so change it") from error
        what = str(error) if isinstance(error, TerselyError) else f"{type(error).__name__}: {error}"
        raise Interrupted(f"{what}; {_goes_on()}") from error


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _fail(line: str, status: int) -> None:
    if debugging:
        raise
    say(f"error: {line}")
    raise SystemExit(status)
