"""The list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

import pathnet
from pathnet.commands import experiments, figures
from pathnet.commands.bench import Bench, bench
from pathnet.commands.demo import Demo, demo
from pathnet.commands.doctor import Doctor, doctor
from pathnet.commands.failures import Command, OneLineFailures
from pathnet.commands.flags import command_of
from pathnet.commands.gradients import Gradients, gradients
from pathnet.commands.streams import say
from pathnet.commands.train import Train, train
from pathnet.paper import EXPERIMENTS

__all__ = ["app"]

app = typer.Typer(cls=OneLineFailures, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"pathnet {pathnet.__version__}")
        raise typer.Exit


@app.callback()
def _pathnet(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", metavar="", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Measure gradients along single paths of residual networks."""


app.command(cls=Command)(command_of(Train, train))
app.command(cls=Command)(command_of(Gradients, gradients))
app.command(cls=Command, epilog=figures.EPILOG)(command_of(figures.Figures, figures.figures))
app.command(cls=Command)(command_of(Demo, demo))
app.command(cls=Command)(command_of(Bench, bench))
app.command(cls=Command)(command_of(Doctor, doctor))
for name in EXPERIMENTS:
    app.command(name, cls=Command, rich_help_panel="Experiments of the paper", epilog=experiments.EPILOG)(
        experiments.experiment_command(name)
    )
