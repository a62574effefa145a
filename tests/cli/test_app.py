"""The commands and their options, before any of them does anything."""

from __future__ import annotations

import itertools
import runpy
import sys
import types

import pytest
from typer.testing import CliRunner

import vit_engine
from vit_engine.cli.app import app, main


def test_version_and_help():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, vit_engine.__version__)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("run", "verify", "info"))


@pytest.mark.parametrize("command", ["run", "verify", "tune", "bench", "report", "profile attention", "profile model"])
def test_help_fills_the_width_of_the_terminal(command):
    """Not with the line breaks of docstrings among its own."""
    result = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    said = [line.strip() for line in result.stdout.partition("Usage")[2].partition("╭")[0].splitlines()[1:]]
    assert len(said) > 5
    for line, following in itertools.pairwise(said):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 78, line


@pytest.mark.parametrize("module", ["vit_engine", "vit_engine.cli"])
def test_as_a_module(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out.strip() == vit_engine.__version__


def test_verify_passes_its_options_on(monkeypatch):
    seen = []

    def verify_command(model: str = "none", as_json: bool = False) -> None:
        seen.append((model, as_json))
        raise SystemExit(5)

    module = types.ModuleType("vit_engine.cli.verify")
    vars(module)["verify_command"] = verify_command
    monkeypatch.setitem(sys.modules, "vit_engine.cli.verify", module)
    result = CliRunner().invoke(app, ["verify", "--model", "vit_tiny", "--as-json"])
    assert (result.exit_code, seen) == (5, [("vit_tiny", True)])
    assert "--model" in CliRunner().invoke(app, ["verify", "--help"]).stdout


def test_without_triton_a_command_that_needs_it_says_so(monkeypatch, capsys):
    def inspecting():
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr("vit_engine.cli.app.app", inspecting)
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "needs Triton, which is not installed" in said.err

    def broken():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("vit_engine.cli.app.app", broken)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        main()
