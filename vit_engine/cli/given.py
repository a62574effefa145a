"""What stands on the command line, as opposed to what has a default."""

from __future__ import annotations

from collections.abc import Collection

import typer


def refuse_beside(context: typer.Context, option: str, why: str, *, but: Collection[str] = ()) -> None:
    """Raises typer.BadParameter where the command line has parameters beside `option`, which it would have no use for.

    why: begins the message, before their names; but: names of parameters, as the command's function has them, that may
    stand beside it.
    """
    names = [
        parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or str(parameter.name))
        for parameter in context.command.params
        if parameter.name not in but and _given(context, str(parameter.name))
    ]
    if names:
        raise typer.BadParameter(f"{why} {', '.join(names)}", param_hint=option)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
