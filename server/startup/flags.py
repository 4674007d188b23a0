"""`dijiang serve` as typer sees it: one option for each setting, made from `Settings` itself."""

import inspect
import os
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ByteSize, SecretStr

from server.startup.logs import configure_logging
from server.startup.notices import Notices
from server.startup.settings import Settings, SettingsError, StoreUrl, flag_of, read_settings, variable_of

METAVARS = {int: "N", float: "SECONDS", ByteSize: "SIZE", Path: "PATH", str: "TEXT", SecretStr: "KEYS", StoreUrl: "URL"}


def serve(**values: Any) -> None:
    """Serve a model over HTTP, with the OpenAI API.

    Every option is an environment variable too: --state-memory 2GiB is DIJIANG_STATE_MEMORY=2GiB.
    """
    as_json = (values.get("log_format") or os.environ.get(variable_of("log_format"))) == "json"
    configure_logging(level="info", log_format="json" if as_json else "console")
    notices = Notices(as_json=as_json)
    try:
        settings = read_settings({name: value for name, value in values.items() if value is not None})
    except SettingsError as error:
        notices.fail(str(error))
        raise typer.Exit(1) from error
    # Imported late: `--help` and mistakes in settings need nothing of the server.
    from server.startup.errors import StartError
    from server.startup.run import run

    try:
        run(settings, notices)
    except StartError as error:
        notices.fail(str(error))
        raise typer.Exit(1) from error


def _escaped(text: str) -> str:
    """Square brackets are text here, not rich's markup."""
    return text.replace("[", "\\[")


def _parameter(name: str) -> inspect.Parameter:
    """A setting as typer wants it; values stay text here, `Settings` checks them."""
    field = Settings.model_fields[name]
    help_text = " ".join((field.description or "").split())
    extra = field.json_schema_extra
    panel = extra["panel"] if isinstance(extra, dict) else None
    assert isinstance(panel, str)
    note = (
        help_text
        if field.default is None or field.default == ()
        else f"{help_text} \\[default: {_shown(field.default)}]"
    )
    kind: Any = bool if field.annotation is bool else str
    annotation: Any
    if name == "model":
        annotation = Annotated[kind | None, typer.Argument(help=note, show_default=False)]
    else:
        flags = f"{flag_of(name)}/--no-{flag_of(name)[2:]}" if kind is bool else flag_of(name)
        annotation = Annotated[
            kind | None,
            typer.Option(flags, help=note, rich_help_panel=panel, show_default=False, metavar=_metavar(name)),
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown(default: object) -> str:
    if isinstance(default, ByteSize):
        return default.human_readable(separator="")
    return f"{default:g}" if isinstance(default, float) else str(default)


def _metavar(name: str) -> str:
    """What to write behind the flag: the words that are allowed, or the kind of value."""
    annotation = Settings.model_fields[name].annotation
    parts = _leaves(annotation)
    words = [part for part in parts if isinstance(part, str)]
    kinds = [METAVARS[part] for part in parts if part in METAVARS]
    return "|".join([*words, *kinds])


def _leaves(annotation: Any) -> list[Any]:
    """Types and literal words in an annotation, from left to right."""
    arguments = get_args(annotation)
    return [leaf for part in arguments for leaf in _leaves(part)] if arguments else [annotation]


_PARAMETERS = [_parameter(name) for name in Settings.model_fields]
serve.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
