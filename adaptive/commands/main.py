"""The ``adaptive`` command line: parses the words and runs a sub-command's module, which is imported only then."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from adaptive import standard_streams
from adaptive.errors import AdaptiveError, nearest, refusal
from adaptive.foreign_text import say
from adaptive.requirements import missing_package, name_taken

COMMANDS = {
    "pack": "turn folders of images into WebDataset shards",
    "train": "train a network with early exits, or continue a run",
    "evaluate": "measure every exit of a run, and policies",
    "calibrate": "choose on held-out images who leaves where",
    "policy": "check whether images are still like the calibration's",
    "predict": "classify images, each as deep as it needs",
    "report": "draw a page about runs, with curves and images",
    "dashboard": "set up a W&B workspace, upload offline runs",
    "export": "write one file per block, to run without torch",
    "checkpoint": "list and verify what a run saved, write plain weights",
    "submit": "train as a Slurm job, on one node or many",
    "models": "list backbones, and where exits can branch off",
    "plan": "tell what a run on many ranks will need, before it starts",
    "bench": "measure where the time goes on this machine",
    "doctor": "check what training needs here, and how to get it",
}


INTERMIXED = ("train", "submit", "plan", "evaluate", "calibrate", "report", "bench")  # commands that take overrides


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors here."""

    def error(self, message: str) -> NoReturn:
        """Print one line and end the process with argparse's code 2."""
        say(f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Build the parser; only the called command's module is imported, which keeps ``--help`` fast."""
    parser = Parser(prog="adaptive", description="Train and run image classifiers that stop early.")
    parser.add_argument("--version", action="store_true", help="print versions and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            module = importlib.import_module(f"adaptive.commands.{name}")
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; ends the process with 0, or 1 and one line on stderr."""
    standard_streams.prepare()
    words = sys.argv[1:] if arguments is None else arguments
    called = next((word for word in words if word in COMMANDS), None)
    code = _ended(words, called)
    if code is not None:
        sys.exit(code)


def _ended(words: list[str], called: str | None) -> int | None:
    """Run a command, and write what it has printed; tell what went wrong, and return the exit code."""
    try:
        try:
            code = _run(words, called)
        except SystemExit as asked:  # of argparse, which has printed
            code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        standard_streams.finish()
    except AdaptiveError as error:
        if line := error.told(str(called)):
            say(line, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more, in what Python does at its end, ends it in silence
        print(f"adaptive {called}: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except Exception as error:
        known: AdaptiveError | None = None
        if isinstance(error, ImportError | OSError):
            known = missing_package(error) if isinstance(error, ImportError) else refusal(error)
        # A fault of ours is told whole, but for the secrets that a library's words may hold.
        say(*([known.told(str(called))] if known else traceback.format_exc().splitlines()), file=sys.stderr)
        code = known.exit_code if known else 1
    with suppress(AdaptiveError):
        standard_streams.finish()
    return code


def _run(words: list[str], called: str | None) -> int | None:
    """Parse the words and run the command; None where no command was to be run."""
    if taken := name_taken():
        raise taken
    first = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(called)
    if first is not None and first not in COMMANDS:
        remedy = nearest(first, COMMANDS, f"commands: {', '.join(COMMANDS)}", most=1)
        parser.error(f"unknown command {first!r}; {remedy}")
    if words and words[0] in INTERMIXED:
        intermixed = _parse_intermixed(words[0], words[1:])
    else:
        intermixed = parser.parse_args(words)
    if intermixed.version:
        print(_versions())
        return None
    if not intermixed.command:
        parser.print_help()
        return None
    return intermixed.run(intermixed)


def _parse_intermixed(command: str, words: list[str]) -> argparse.Namespace:
    """Allow options, with values or without, anywhere among the overrides; argparse's sub-commands do not."""
    module = importlib.import_module(f"adaptive.commands.{command}")
    summary = COMMANDS[command]
    parser = Parser(prog=f"adaptive {command}", description=f"{summary[0].upper()}{summary[1:]}.")
    module.add_arguments(parser)
    parser.set_defaults(command=command, run=module.run, version=False)
    return parser.parse_intermixed_args(words)


def _versions() -> str:
    from adaptive.files import installed_version

    packages = ("adaptive-training", "torch", "deepspeed", "timm", "webdataset", "wandb")
    return "\n".join(f"{name} {installed_version(name) or '(not installed)'}" for name in packages)


if __name__ == "__main__":
    main()
