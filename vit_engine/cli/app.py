"""Entry point of ``vit-engine``.

Nothing heavy is imported here or at the top of the command modules: ``vit-engine --help`` must not wait for PyTorch,
and the interpreter of Triton has to be asked for before anybody imports triton.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .bench import bench_command
from .info import info_command
from .inspect import inspect_command
from .profile import profile_app
from .report_page import report_command
from .run import run_command
from .streams import run_with_streams
from .tune import tune_command
from .warmup import warmup_command

app = typer.Typer(
    name="vit-engine",
    help="Vision Transformer forward passes through fused Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    # Paragraphs of docstrings are filled anew for the width of the terminal.
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("run")(run_command)
app.command("info")(info_command)
app.command("inspect")(inspect_command)
app.add_typer(profile_app, name="profile")
app.command("report")(report_command)
app.command("bench")(bench_command)
app.command("tune")(tune_command)
app.command("warmup")(warmup_command)


@app.command(
    "verify",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def verify(context: typer.Context) -> None:
    """Compare every kernel and a whole model with float64 references on this machine (see verify --help)."""
    from .verify import verify_command

    command = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    command.command("verify")(verify_command)
    command(context.args, prog_name="vit-engine verify")


def _print_version(wanted: bool) -> None:
    if wanted:
        from vit_engine import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision Transformer forward passes through fused Triton kernels."""


def main() -> None:
    """Run the command line; the exit code is the command's."""
    run_with_streams(_main)


def _main() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        # Not a requirement where it is not published; what needs no kernels does without.
        if error.name != "triton":
            raise
        print(
            "vit-engine: this command needs Triton, which is not installed (it is published for Linux): "
            "pip install triton",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
