"""Run the command line: define the commands, print results, notes and errors, and return exit codes.

Each command is imported when it runs. Tables and JSON go to the standard output. Progress, notes and errors go to
the standard error. The exit codes are listed in `fcvit.errors` and docs/guides/troubleshooting.md.
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

# name: (function, arguments in the usage line, help)
COMMANDS = {
    "Weights": {
        "convert": (
            "convert:convert",
            "SOURCE -o FILE",
            "Convert weights between PyTorch and Paddle and verify them.",
        ),
        "verify": ("verify:verify", "FILE --against FILE", "Verify a converted weights file against its source."),
        "inspect": ("inspect:inspect", "FILE", "Describe a weights file without executing its content."),
        "models": ("models:models", "", "List the variants and links to the authors' checkpoints."),
    },
    "Use": {
        "predict": ("predict:predict", "IMAGE... --weights FILE", "Classify images, segment them, or detect objects."),
        "eval": ("evaluate:command", "--weights FILE --data FOLDER", "Measure accuracy on labeled images."),
        "compare": ("compare:compare", "FIRST SECOND", "Compare two evaluations on the same images."),
        "export": ("export:export", "FILE -o FILE.onnx", "Export to ONNX, Paddle Inference or OpenVINO, and check it."),
        "bench": ("bench:bench", "--weights FILE", "Measure the speed of the engines on this machine."),
        "serve": ("serve:serve", "--weights FILE", "Serve predictions over HTTP, and compute requests in batches."),
        "demo": ("demo:demo", "--weights FILE", "Serve a local page with predictions and similarity maps."),
    },
    "Train": {
        "train": ("train:train", "RECIPE", "Train a network with a recipe. Options override its fields."),
        "finetune": ("finetune:finetune", "--weights FILE --data FOLDER", "Fine-tune weights on your own images."),
        "recipes": ("recipes:recipes", "", "List the included recipes, or print one."),
        "check-data": (
            "check_data:check_data",
            "FOLDER",
            "Check class folders, label maps or COCO annotations before training.",
        ),
        "resume": ("resume:resume", "RUN", "Resume an interrupted evaluation, prediction or training run."),
    },
    "Analyze": {
        "similarity": ("similarity:similarity", "IMAGE... --weights FILE", "Draw token-global similarity maps."),
        "head-stats": ("head_stats:head_stats", "IMAGE... --weights FILE", "Measure how attention heads differ."),
        "faithfulness": (
            "faithfulness:faithfulness",
            "IMAGE... --weights FILE",
            "Measure whether maps mark the pixels that predictions need.",
        ),
    },
    "Setup": {
        "quickstart": ("quickstart:quickstart", "", "Convert, verify, evaluate and predict with included data."),
        "doctor": ("doctor:doctor", "", "Print versions and devices, and how to install missing parts."),
        "cache": ("cache:cache", "", "Show, limit or empty the cache of exports and operators."),
    },
}
RENAMED = {"heads": "head-stats", "trust": "faithfulness"}
USAGE = {name: row[1] for group in COMMANDS.values() for name, row in group.items()}
OPTIONS = "All commands accept --json (print JSON), -q (hide notes and progress), -v (more notes), --debug (traceback)."

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
    """Run a command line and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {"debug": ["--debug"], "json": ["--json"], "quiet": ["-q", "--quiet"], "verbose": ["-v", "--verbose"]}
    given = {flag: any(word in words for word in spellings) for flag, spellings in flags.items()}
    words = [word for word in words if not any(word in spellings for spellings in flags.values())]
    debug = given["debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    level = logging.ERROR if given["quiet"] else logging.DEBUG if given["verbose"] else logging.INFO
    try:
        with _interruptions(keep=arguments is None), _shown_notes(level, debug):
            if words and words[0] in RENAMED:
                old, new = words[0], RENAMED[words[0]]
                _note(f"fcvit {old} was renamed to fcvit {new}; the next version will not accept the old name")
                words[0] = RENAMED[words[0]]
            if words and words[0] and words[0][0] != "-" and words[0] not in USAGE:
                near = difflib.get_close_matches(words[0], USAGE, 1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise UsageError(f'unknown command "{words[0]:.60}".{hint} (fcvit --help lists the commands)')
            result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
            code = _print_result(result, given["json"])
            sys.stdout.flush()
        return code
    except CycloptsError as error:
        return _fail(_usage(error, words), UsageError.exit_code, debug)
    except FcvitError as error:
        if hasattr(error, "result"):
            _print_result(error.result, given["json"])
        code = _fail(error, error.exit_code, debug)
        if len(problems := getattr(error, "problems", ())) > 1:
            from fcvit.report.tables import problems as listing

            _show(listing(problems), error=True)
        return code
    except KeyboardInterrupt:
        print("fcvit: interrupted", file=sys.stderr)
        _report("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # for example a full disk or a deleted folder
        text = f"{error.filename or 'reading or writing failed'}: {error.strerror or error}"
        return _fail(text, UnreadableFile.exit_code, debug)
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}"[:300]
        return _fail(f"{text} (please report this; --debug prints the traceback)", FcvitError.exit_code, debug)


def _print_result(result: Any, as_json: bool) -> int:
    """Print the result of a command and return the exit code.

    A result may define `tables()` (renderables or lines), `to_json()` (default: its fields), `exit_code`, `unreadable`
    (images that were skipped) and `problem` (why the command failed).
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
    except SystemExit as end:  # rich exits when the pipe is closed
        raise BrokenPipeError from end


def _note(text: str) -> None:
    print(printable(f"fcvit: note: {text}"), file=sys.stderr)


class _Notes(logging.Handler):
    """A logging handler that prints records as notes to the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


@contextlib.contextmanager
def _shown_notes(level: int, debug: bool) -> Iterator[None]:
    """Show notes and warnings of this package while a command runs. Other warnings are shown only with --debug."""
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
    """Handle SIGTERM and SIGUSR1 like Ctrl-C: clean up, and print how to resume.

    Signals within one second count as one (see `fcvit.interrupts.SAME_PRESS`).

    Args:
        keep: Whether to leave the handlers in place, because the process ends after the command.
    """
    last = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal last
        now, before = time.monotonic(), last
        if now - before > interrupts.SAME_PRESS:
            last = now
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in interrupts.SIGNALS:
                before = signal.getsignal(number)
                # A shell makes background processes ignore Ctrl-C. Keep this.
                if before is not None and (number != signal.SIGINT or before is signal.default_int_handler):
                    signal.signal(number, interrupt)
                    if not keep:
                        stack.callback(signal.signal, number, before)
        stack.enter_context(interrupts.kept())
        yield


_LONGEST = 1500  # maximum number of characters of an error message
_WEIGHTS = (".pth", ".tar", ".pt", ".safetensors", ".pdparams", ".bin", ".ckpt")


def _usage(error: CycloptsError, words: list[str]) -> str:
    """Return a message with the error in a command line and a corrected command line."""
    text = str(error)
    command = words[0] if words else ""
    if command.startswith("-"):
        later = next((position for position, word in enumerate(words) if word in USAGE), None)
        if later is not None:
            return f"the command must come first: {_line([words[later], *words[:later], *words[later + 1 :]])}"
    usage = _arguments(USAGE.get(command, ""))
    missing = error.argument if type(error) is MissingArgumentError else None
    if missing or isinstance(error, UnusedCliTokensError):
        if missing:
            # A recipe field has no parameter, so its name is only in the message.
            field = re.search(r"parameter (--[\w.-]+) requires an argument", text)
            name = field[1] if field and missing.name.startswith("--[") else missing.name
            given = any(word.partition("=")[0] in (name, *missing.names) for word in words[1:])
            text = f"{command}: {name} has no value" if given else f"{command}: {name} is missing"
        else:
            extra = error.unused_tokens or []
            text = f"{command}: unexpected argument: {' '.join(map(shlex.quote, extra)):.80}"
        if usage:
            return f"{text}; expected: {_example(command, usage, words[1:])} (fcvit {command} --help lists all options)"
    where = f"fcvit {command} --help lists its options" if command in USAGE else "fcvit --help lists the commands"
    return f"{text} ({where})"


def _arguments(usage: str) -> tuple[str, ...]:
    """Split a usage line into arguments. An option and its value form one argument."""
    return tuple(re.findall(r"-\S+ \S+|\S+", usage))


def _example(command: str, usage: tuple[str, ...], words: list[str]) -> str:
    """Return the usage line of a command, filled with the given words."""
    loose = [word for before, word in zip(["", *words], words, strict=False) if word[:1] != "-" and before[:1] != "-"]
    options = {word.partition("=")[0] for word in words if word[:1] == "-"}
    kept = [word for word in words if word not in loose]
    files = [word for word in loose if word.lower().endswith(_WEIGHTS) and not Path(word).is_dir()]
    if "--weights FILE" in usage and "--weights" not in options:
        if not files and "IMAGE..." not in usage:
            files = [word for word in loose if not Path(word).is_dir()]
        weights = files[0] if files else "FILE"
        loose = [word for word in loose if word != weights]
    else:
        weights = ""
    filled: list[str] = []
    for argument in usage:
        option, _, placeholder = argument.partition(" ")
        if argument == "IMAGE...":
            filled += loose or [argument]
        elif not placeholder:
            filled.append(loose.pop(0) if loose else argument)
        elif option == "--weights":
            filled += [option, weights] if weights else []
        elif not options & ({"-o", "--output"} if option == "-o" else {option}):
            filled += [option, loose.pop(0) if loose else placeholder]
    if kept and kept[-1][:1] == "-" and "=" not in kept[-1]:  # the option without a value
        values = (argument.partition(" ")[2] for argument in usage if argument.startswith(f"{kept[-1]} "))
        kept.append(next(values, "VALUE"))
    return _line([command, *filled, *kept])


def _line(words: list[str]) -> str:
    line = shlex.join(["fcvit", *words]).replace("'IMAGE...'", "IMAGE...")
    return line if len(line) <= 300 else f"{line[:300]}..."


def _fail(message: object, code: int, debug: bool) -> int:
    """Print an error message in one line, after the traceback if `debug` is set, and return the exit code."""
    if debug:
        print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
    text = " ".join(str(message).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    print(printable(f"fcvit: {text}"), file=sys.stderr)
    _report(f"{text} (exit code {code})")
    return code


def _report(error: str) -> None:
    """Tell the other processes of the job that this one fails."""
    from fcvit.processes import report

    report(error)
