"""The `dijiang` program. A command is imported when it is called or completed, so that `--help` is quick."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_command

COMMANDS = {
    "serve": ("server.startup.flags.serve", "Serve a model over HTTP; without a model: the default one."),
    "convert": ("dijiang_model.conversion.cli.convert_command", "Make a DiJiang model of a pretrained transformer."),
    "quantize": (
        "dijiang_model.conversion.quantize_cli.quantize_command",
        "Quantize a model's weights to int8 or int4 and save it.",
    ),
    "train": (
        "dijiang_model.conversion.training.cli.train_command",
        "Train the linear branch of a converted model to imitate its teacher.",
    ),
    "evaluate": (
        "dijiang_model.conversion.evaluation.cli.evaluate_command",
        "Measure what a conversion lost, and what its linear branch brings.",
    ),
    "merge": (
        "dijiang_model.conversion.merge_cli.merge_command",
        "Merge a trained adapter into its model, ready to be served.",
    ),
    "top": ("clients.top.top_command", "Watch a running server: slots, queue by key, tokens a second, gaps."),
    "chat": ("clients.cli.chat_command", "Talk to a served model in the terminal."),
    "complete": ("clients.cli.complete_command", "Complete the text on standard input."),
    "score": ("clients.measuring_cli.score_command", "Say how likely a served model finds texts."),
    "doctor": (
        "server.startup.doctor.doctor_command",
        "Say what this machine offers, what is wrong, and what to type.",
    ),
    "selfcheck": (
        "clients.measuring_cli.selfcheck_command",
        "Measure on a running server that its answers do not depend on how they are computed.",
    ),
    "ray": ("server.fleet.cli.app", "Serve with many engines behind one address, with Ray Serve."),
    "bench": ("benchmarks.cli.app", "Measure this machine: decoding, prompts, serving, training."),
    "state": (
        "clients.state_cli.app",
        "List, export, import, fork, rewind and delete saved conversations; `repair FOLDER` mends a server's store.",
    ),
}
"""The function, or the program of several commands, that each imports, and what it is for."""
ADDED = {"state": {"repair": "server.states.repair.repair_command"}}
"""Commands of a program that do not lie where the others do."""


class LazyGroup(TyperGroup):
    """A group of commands that have only names and purposes until one of them is called or completed."""

    targets: ClassVar[Mapping[str, str]]

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0] if args else ""
        if name in self.targets:
            self.commands[name] = _imported(self.targets[name], name)
        return super().resolve_command(ctx, args)


def lazy_app(commands: Mapping[str, tuple[str, str]], **options: Any) -> typer.Typer:
    """A program of commands that are imported late; `commands` as `COMMANDS`, `options` as of `typer.Typer`."""
    targets = {name: target for name, (target, _) in commands.items()}
    group = type("Commands", (LazyGroup,), {"targets": targets})
    program = typer.Typer(cls=group, pretty_exceptions_enable=False, **options)
    for name, (_, purpose) in commands.items():
        program.command(name, help=purpose)(_stand_in)
    return program


def _stand_in() -> None:
    """Shown in the list of commands."""


def _imported(target: str, name: str) -> Any:
    """The function or program `package.module.name` as a command of typer's."""
    module, _, attribute = target.rpartition(".")
    program = getattr(import_module(module), attribute)
    if not isinstance(program, typer.Typer):
        function, program = program, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        program.command(name)(function)
    command = get_command(program)
    for added, other in ADDED.get(name, {}).items():
        assert isinstance(command, TyperGroup)
        command.add_command(_imported(other, added))
    return command


app = lazy_app(
    COMMANDS,
    name="dijiang",
    help="DiJiang models: linear attention with a constant-size state, served with the OpenAI API.",
    invoke_without_command=True,
)


def main() -> None:
    """Entry point of the `dijiang` command."""
    app(prog_name="dijiang")


@app.callback()
def _options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"dijiang {version('dijiang')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
