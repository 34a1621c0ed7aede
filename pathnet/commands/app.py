"""The list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

import pathnet
from pathnet.commands import experiments, figures
from pathnet.commands.bench import BenchSettings, bench
from pathnet.commands.demo import DemoSettings, demo
from pathnet.commands.doctor import DoctorSettings, doctor
from pathnet.commands.failures import OneLineFailures, PlainCommand
from pathnet.commands.flags import command_of
from pathnet.commands.folders import CompactSettings, ExportSettings, compact, export
from pathnet.commands.gradients import GradientsSettings, gradients
from pathnet.commands.streams import say
from pathnet.commands.train import TrainSettings, train
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
    """Measure gradients along individual paths of residual networks."""


app.command(cls=PlainCommand)(command_of(TrainSettings, train))
app.command(cls=PlainCommand)(command_of(GradientsSettings, gradients))
app.command(cls=PlainCommand, epilog=figures.EPILOG)(command_of(figures.FiguresSettings, figures.figures))
app.command(cls=PlainCommand)(command_of(CompactSettings, compact))
app.command(cls=PlainCommand)(command_of(ExportSettings, export))
app.command(cls=PlainCommand)(command_of(DemoSettings, demo))
app.command(cls=PlainCommand)(command_of(BenchSettings, bench))
app.command(cls=PlainCommand)(command_of(DoctorSettings, doctor))
for name in EXPERIMENTS:
    app.command(name, cls=PlainCommand, rich_help_panel="Experiments of the paper", epilog=experiments.EPILOG)(
        experiments.experiment_command(name)
    )
