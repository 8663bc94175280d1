"""The one command, ``searchr1`` (or ``python -m searchr1_lib``). A subcommand's module is loaded when it is called.

Each module has ``add_arguments(parser)`` and ``run(args)``, whose docstring says what the command does; the examples of
its ``--help`` are the command lines in the module's own docstring.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin

COMMANDS = {
    "run": ("suite.runs", "run the notebooks in reading order"),
    "sweep": ("suite.sweep", "run an experiment: settings x seeds; what is complete is skipped"),
    "evaluate": ("study.evaluate", "the seven-set table of the Search-R1 paper, for a model"),
    "baselines": ("study.baselines", "what the same model reaches in other ways"),
    "warmstart": ("study.warmstart", "make the tiny Qwen (about an hour on 2 cores)"),
    "recollection": ("study.recollection", "teach the tiny Qwen to ask its notes (some minutes)"),
    "form": ("study.form", "teach a real model the form of an episode, not when to search"),
    "knowledge": ("study.knowledge", "what a model knows: measured, and what the best policy would earn with it"),
    "compare": ("study.compare", "ideas against one another and against the optimum, in the laboratory"),
    "prepare": ("worlds.prepare", "make a folder of data as the notebooks read it"),
    "almanac": ("worlds.almanac", "write the almanac: passages and questions of a half-remembered world"),
    "trl": ("engines.trl", "train in TRL; under accelerate launch in several processes"),
    "serve": ("search.server", "serve an index over HTTP"),
    "badges": ("suite.colab", "stamp the repository's address into badges and notebooks"),
}


class _Parser(argparse.ArgumentParser):
    def add_argument(self, *names, **how):
        """A type may be ``Count`` or ``Whole`` of ``environment.limits``: its range is checked with it."""
        if get_origin(kind := how.get("type")) is Annotated:
            how["type"] = partial(_number, kind)
        return super().add_argument(*names, **how)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _number(kind: Any, text: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError:
        least = get_args(kind)[1].metadata[0].ge
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, not {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code.

    0: all went well; 1: something failed on the way; 2: refused before any work; 130: interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args, module = _read(arguments)
        return module.run(args) or 0
    except (ValueError, OSError, RuntimeError) as e:  # the last: a notebook of a seed, an engine that cannot answer
        print(f"error: {e}", file=sys.stderr)
        return 1 if isinstance(e, RuntimeError) else 2
    except KeyboardInterrupt as e:
        print(f"interrupted: go on with: {str(e) or shlex.join(['searchr1', *arguments])}", file=sys.stderr)
        return 130


def _read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments of a command line, and the module of its subcommand."""
    parser = _Parser("searchr1", description="Search-R1: train, measure and study agents that search.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, (home, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if arguments[:1] == [name]:
            module = import_module(f"searchr1_lib.{home}")
            lines = re.findall(r"^ *(searchr1 .*)", str(module.__doc__), re.MULTILINE)
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            command.epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)
            module.add_arguments(command)
    return parser.parse_args(arguments), module
