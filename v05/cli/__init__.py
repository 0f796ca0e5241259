"""The command line, `v05`: each command is a file of its own."""

from __future__ import annotations

import sys

import typer

from v05 import __version__
from v05.cli import study
from v05.cli.doctor import doctor
from v05.cli.evaluate import evaluate_command
from v05.cli.fit_adapter import fit_adapter
from v05.cli.fuse import fuse
from v05.cli.predict import predict
from v05.cli.simulate import simulate
from v05.cli.train import train
from v05.errors import InputError

app = typer.Typer(
    help="V0.5: a value prior, empirical shrinkage and fused kernels for RL with sparse rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"v05 {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    pass


app.command()(train)
app.command()(fuse)
app.command()(predict)
app.command("evaluate")(evaluate_command)
app.command("fit-adapter")(fit_adapter)
app.command()(simulate)
app.command()(doctor)
app.add_typer(study.app, name="study")


def main() -> None:
    """Runs the command line; what the user can mend is said in one line, with exit status 2."""
    try:
        app()
    except InputError as error:
        typer.echo(f"v05: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(
            f"v05: {error.filename}: {error.strerror}", err=True
        )  # a folder that cannot be written, and the like
        sys.exit(2)
