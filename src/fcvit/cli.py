"""The command line: one table of commands, one printer of results, exit codes.

A command is imported when it runs. Tables and JSON go to the standard output; progress, notes and errors to the
standard error. Exit codes are in `fcvit.errors` and docs/cli.md.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Group, MissingArgumentError, UnusedCliTokensError

from fcvit import __version__, interrupts
from fcvit.errors import INTERRUPTED, FcvitError, FreshWeights, UnreadableFile, UsageError
from fcvit.text import printable

# name: function, what its line of usage shows, help
COMMANDS = {
    "Weights": {
        "convert": ("convert:convert", "SOURCE -o FILE", "Convert a checkpoint between PyTorch and Paddle, verified."),
        "verify": ("verify:verify", "FILE --against FILE", "Verify that two weights files are one network."),
        "inspect": ("inspect:inspect", "FILE", "Describe a weights file; executes nothing in it."),
        "models": ("models:models", "", "List the variants and where the authors' checkpoints are."),
    },
    "Use": {
        "predict": ("predict:predict", "IMAGE... --weights FILE", "Classify images."),
        "eval": ("evaluate:command", "--weights FILE --data FOLDER", "Measure accuracy on labeled images."),
        "compare": ("compare:compare", "FIRST SECOND", "Compare two results of eval over the same images."),
        "export": ("export:export", "FILE -o FILE.onnx", "Export for ONNX Runtime, Paddle Inference or OpenVINO."),
        "bench": ("bench:bench", "--weights FILE", "Measure how fast the engines are on this machine."),
        "demo": ("demo:demo", "--weights FILE", "Serve a local page with classes and similarity maps."),
    },
    "Train": {
        "train": ("train:train", "RECIPE", "Train a network by a recipe; every field is an option too."),
        "finetune": ("finetune:finetune", "--weights FILE --data FOLDER", "Train weights on your own images."),
        "recipes": ("recipes:recipes", "", "List the shipped recipes, or print one."),
        "check-data": ("check_data:check_data", "FOLDER", "Check class folders before training."),
        "resume": ("resume:resume", "RUN", "Go on with an interrupted evaluation or training."),
    },
    "Analyze": {
        "similarity": ("similarity:similarity", "IMAGE... --weights FILE", "Draw token-global similarity maps."),
        "head-stats": ("head_stats:head_stats", "IMAGE... --weights FILE", "Measure how attention heads differ."),
        "faithfulness": (
            "faithfulness:faithfulness",
            "IMAGE... --weights FILE",
            "Measure whether maps mark what predictions rest on.",
        ),
    },
    "Setup": {
        "quickstart": ("quickstart:quickstart", "", "Run the whole path on shipped data."),
        "doctor": ("doctor:doctor", "", "Print versions, devices, and what is missing."),
        "cache": ("cache:cache", "", "Show, limit or empty the cache of exports and operators."),
    },
}
RENAMED = {"heads": "head-stats", "trust": "faithfulness"}
FORMS = {name: row[1] for group in COMMANDS.values() for name, row in group.items()}
OPTIONS = "Every command takes --json (print JSON), -q (no notes, no progress), -v (more notes), --debug (a traceback)."

app = App(
    name="fcvit",
    help="FCViT for PaddlePaddle: convert, verify, evaluate, predict, train.",
    help_epilogue=OPTIONS,
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
for position, (title, group) in enumerate(COMMANDS.items()):
    heading = Group(title, sort_key=position)
    for name, (path, _, text) in group.items():
        app.command(f"fcvit.commands.{path}", name=name, help=text, group=heading, help_epilogue=OPTIONS)
app.register_install_completion_command(name="--install-completion")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {"debug": ["--debug"], "json": ["--json"], "quiet": ["-q", "--quiet"], "verbose": ["-v", "--verbose"]}
    asked = {flag: any(word in words for word in spellings) for flag, spellings in flags.items()}
    words = [word for word in words if not any(word in spellings for spellings in flags.values())]
    debug = asked["debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    level = logging.ERROR if asked["quiet"] else logging.DEBUG if asked["verbose"] else logging.INFO
    try:
        with _interruptions(keep=arguments is None), _shown_notes(level, debug):
            if words and words[0] in RENAMED:
                _note(f"fcvit {words[0]} is now fcvit {RENAMED[words[0]]}; the old name goes with the next version")
                words[0] = RENAMED[words[0]]
            if words and words[0] and words[0][0] != "-" and words[0] not in FORMS:
                near = difflib.get_close_matches(words[0], FORMS, 1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise UsageError(f'unknown command "{words[0]:.60}".{hint} (fcvit --help lists the commands)')
            result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
            code = _print_result(result, asked["json"])
            sys.stdout.flush()
        return code
    except CycloptsError as error:
        return _fail(_usage(error, words), UsageError.exit_code, debug)
    except FcvitError as error:
        if hasattr(error, "result"):
            _print_result(error.result, asked["json"])
        code = _fail(error, error.exit_code, debug)
        if len(problems := getattr(error, "problems", ())) > 1:
            from fcvit.report.tables import problems as listing

            _show(listing(problems), error=True)
        return code
    except KeyboardInterrupt:
        print("fcvit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that went away
        text = f"{error.filename or 'reading or writing failed'}: {error.strerror or error}"
        return _fail(text, UnreadableFile.exit_code, debug)
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}"[:300]
        return _fail(f"{text} (please report it; --debug shows where)", FcvitError.exit_code, debug)


def _print_result(result: Any, as_json: bool) -> int:
    """Print what a command returned; return the exit code.

    A result may have `tables()` (renderables or lines), `to_json()` (else its fields), `exit_code`, `unreadable`
    (images that were left out) and `problem` (why it failed).
    """
    if not hasattr(result, "tables"):
        return result if isinstance(result, int) else 0
    if as_json:
        from fcvit.run_folder import to_json

        as_fields = dict if isinstance(result, dict) else dataclasses.asdict
        content = result.to_json() if hasattr(result, "to_json") else as_fields(result)
        if content is not None:
            print(to_json(content), end="")
    else:
        for part in result.tables():
            print(printable(part, keep="\n")) if isinstance(part, str) else _show(part)
    if unreadable := getattr(result, "unreadable", ()):
        from fcvit.report.tables import unreadable as listing

        if getattr(result, "first", True):
            _show(listing(unreadable), error=True)
    if problem := getattr(result, "problem", ""):
        return _fail(problem, result.exit_code, False)
    return getattr(result, "exit_code", 0)


def _show(part: object, error: bool = False) -> None:
    from fcvit.report.tables import console

    try:
        console(error).print(part)
    except SystemExit as end:  # what rich makes of a pipe that was closed
        raise BrokenPipeError from end


def _note(text: str) -> None:
    print(printable(f"fcvit: note: {text}"), file=sys.stderr)


class _Notes(logging.Handler):
    """Show what the package logs as notes on the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


@contextlib.contextmanager
def _shown_notes(level: int, debug: bool) -> Iterator[None]:
    """Show notes and our warnings while a command runs; others only with --debug."""
    logger, handler = logging.getLogger("fcvit"), _Notes()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
            if not debug:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", FreshWeights)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _interruptions(keep: bool) -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: in order, and saying how to go on.

    Signals within a second are one: Paddle's launcher passes on what the terminal has sent already.

    Args:
        keep: leave the handlers to the process, which ends.
    """
    came = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal came
        now, before = time.monotonic(), came
        if now - before > 1:
            came = now
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                # A shell lets processes in the background ignore Ctrl-C.
                if before is not None and (number == signal.SIGTERM or before is signal.default_int_handler):
                    signal.signal(number, interrupt)
                    if not keep:
                        stack.callback(signal.signal, number, before)
        stack.enter_context(interrupts.kept())
        yield


_LONGEST = 1500  # characters of an error
_WEIGHTS = (".pth", ".tar", ".pt", ".safetensors", ".pdparams", ".bin", ".ckpt")


def _usage(error: CycloptsError, words: list[str]) -> str:
    """Return what is wrong with a command line, and how it is meant to be."""
    text = str(error)
    command = words[0] if words else ""
    if command.startswith("-"):
        later = next((place for place, word in enumerate(words) if word in FORMS), None)
        if later is not None:
            return f"the command comes first: {_line([words[later], *words[:later], *words[later + 1 :]])}"
    form = _slots(FORMS.get(command, ""))
    missing = error.argument if type(error) is MissingArgumentError else None
    if missing or isinstance(error, UnusedCliTokensError):
        if missing:
            # A field of a recipe has no parameter of its own; only the text names it.
            field = re.search(r"parameter (--[\w.-]+) requires an argument", text)
            name = field[1] if field and missing.name.startswith("--[") else missing.name
            given = any(word.partition("=")[0] in (name, *missing.names) for word in words[1:])
            text = f"{command}: {name} has no value" if given else f"{command}: {name} is missing"
        else:
            extra = error.unused_tokens or []
            text = f"{command}: {' '.join(map(shlex.quote, extra)):.80} stands where no argument is expected"
        if form:
            return f"{text}; as in: {_example(command, form, words[1:])} (fcvit {command} --help has all options)"
    where = f"fcvit {command} --help lists its options" if command in FORMS else "fcvit --help lists the commands"
    return f"{text} ({where})"


def _slots(form: str) -> tuple[str, ...]:
    """Return the arguments of a line of usage, an option together with its value."""
    return tuple(re.findall(r"-\S+ \S+|\S+", form))


def _example(command: str, form: tuple[str, ...], words: list[str]) -> str:
    """The form of a command, filled with the words that were given."""
    loose = [word for before, word in zip(["", *words], words, strict=False) if word[:1] != "-" and before[:1] != "-"]
    options = {word.partition("=")[0] for word in words if word[:1] == "-"}
    kept = [word for word in words if word not in loose]
    files = [word for word in loose if word.lower().endswith(_WEIGHTS) and not Path(word).is_dir()]
    if "--weights FILE" in form and "--weights" not in options:
        if not files and "IMAGE..." not in form:
            files = [word for word in loose if not Path(word).is_dir()]
        weights = files[0] if files else "FILE"
        loose = [word for word in loose if word != weights]
    else:
        weights = ""
    filled: list[str] = []
    for slot in form:
        option, _, placeholder = slot.partition(" ")
        if slot == "IMAGE...":
            filled += loose or [slot]
        elif not placeholder:
            filled.append(loose.pop(0) if loose else slot)
        elif option == "--weights":
            filled += [option, weights] if weights else []
        elif not options & ({"-o", "--output"} if option == "-o" else {option}):
            filled += [option, loose.pop(0) if loose else placeholder]
    if kept and kept[-1][:1] == "-" and "=" not in kept[-1]:  # the one without its value
        value = next((slot.partition(" ")[2] for slot in form if slot.startswith(f"{kept[-1]} ")), "VALUE")
        kept.append(value)
    return _line([command, *filled, *kept])


def _line(words: list[str]) -> str:
    line = shlex.join(["fcvit", *words]).replace("'IMAGE...'", "IMAGE...")
    return line if len(line) <= 300 else f"{line[:300]}..."


def _fail(message: object, code: int, debug: bool) -> int:
    """Print one line for a person, with --debug the traceback before it; return the exit code."""
    if debug:
        print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
    text = " ".join(str(message).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    print(printable(f"fcvit: {text}"), file=sys.stderr)
    return code
