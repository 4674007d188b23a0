"""The `dijiang` program. Its commands are imported when they are called, so that `--help` is quick."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

# Everything behind the command's name goes to the real command, `--help` included.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
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
        "dijiang_model.conversion.merge.merge_command",
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
}
"""What each imports and runs, and what it is for."""

app = typer.Typer(
    name="dijiang",
    help="DiJiang models: linear attention with a constant-size state, served with the OpenAI API.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `dijiang` command."""
    app()


@app.callback()
def _options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"dijiang {version('dijiang')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run_as_program(target: str, name: str, args: list[str]) -> None:
    """Runs the function `package.module.function` as a program of that name."""
    module, _, function = target.rpartition(".")
    command: Callable[..., Any] = getattr(import_module(module), function)
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(command)
    program(args=args, prog_name=name)


def add_command(group: typer.Typer, name: str, target: str, purpose: str) -> None:
    """Adds a command, the last word of `name`, that imports and runs `target` when it is called."""

    @group.command(name.split()[-1], help=purpose, context_settings=PASS_ON, add_help_option=False)
    def _run(context: typer.Context) -> None:
        run_as_program(target, name, context.args)


for _name, (_target, _purpose) in COMMANDS.items():
    add_command(app, f"dijiang {_name}", _target, _purpose)


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure this machine: decoding, prompts, serving, training."""
    import_module("benchmarks.cli").app(args=context.args, prog_name="dijiang bench")


@app.command(context_settings=PASS_ON, add_help_option=False)
def state(context: typer.Context) -> None:
    """List, export, import, fork, rewind and delete saved conversations; `repair FOLDER` mends a server's store."""
    if context.args[:1] == ["repair"]:
        run_as_program("server.states.repair.repair_command", "dijiang state repair", context.args[1:])
    else:
        import_module("clients.state_cli").app(args=context.args, prog_name="dijiang state")
