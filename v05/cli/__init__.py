"""The command line, `v05`: each command is a file of its own, imported when it is run."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import typer

from v05 import __version__
from v05.errors import InputError

# Name, where it is, and what `v05 --help` says of it without importing torch.
COMMANDS: Final = (
    (
        "train",
        "v05.cli.train:train",
        "Train a small policy, or a model of yours on your data, by reinforcement learning; or compare algorithms.",
    ),
    (
        "fuse",
        "v05.cli.fuse:fuse",
        "Turn rollout records into baselines, conflicts, plans and advantages, a line for a line.",
    ),
    (
        "predict",
        "v05.cli.predict:predict",
        "Add to each prompt the probability that the policy behind the context succeeds.",
    ),
    (
        "evaluate",
        "v05.cli.evaluate:evaluate_command",
        "Sample a model's answers to problems and report mean@n and pass@k.",
    ),
    (
        "fit-adapter",
        "v05.cli.fit_adapter:fit_adapter",
        "Train V0's adapter, which `v05 predict --checkpoint` then uses with the same --backbone.",
    ),
    (
        "simulate",
        "v05.cli.simulate:simulate",
        "Drive the real scheduler with a simulated engine: every mode, groups of fixed size, and other budget rules.",
    ),
    (
        "doctor",
        "v05.cli.doctor:doctor",
        "Show versions, devices, and which backend runs each op and why the others do not.",
    ),
    ("study", "v05.cli.study:app", "Studies: what was measured, reproducible on your records."),
)
PLAIN: Final[dict[str, Any]] = {"add_completion": False, "pretty_exceptions_enable": False}

app = typer.Typer(
    help="V0.5: a value prior, empirical shrinkage and fused kernels for RL with sparse rollouts.",
    no_args_is_help=True,
    **PLAIN,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"v05 {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    pass


def load(place: str) -> typer.Typer:
    """Import a command, or a group of them, as an application of its own."""
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(module), name)
    if isinstance(found, typer.Typer):
        return found
    alone = typer.Typer(**PLAIN)
    alone.command()(found)
    return alone


def _passing_on(place: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        typer.main.get_command(load(place)).main(context.args, prog_name=context.command_path)

    return command


for _name, _place, _help in COMMANDS:
    _anything = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command(_name, help=_help, add_help_option=False, context_settings=_anything)(_passing_on(_place))


def main() -> None:
    """Run the command line; what the user can mend is said in one line, with exit status 2."""
    try:
        app()
    except InputError as error:
        typer.echo(f"v05: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk, and the like
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"v05: {place}{error.strerror}", err=True)
        _drop_unwritten()
        sys.exit(2)


def _drop_unwritten() -> None:
    """Where standard output takes no more, leave nothing in it that the interpreter's end would stumble over."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
