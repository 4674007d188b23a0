"""The `dijiang` program. Its commands are imported when they are called, so that `--help` is quick."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

# Everything behind the command's name goes to the real command, `--help` included.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

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


@app.command(context_settings=PASS_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a model over HTTP; without a model: the default one."""
    _call(import_module("server.startup.flags").serve_command(), context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def convert(context: typer.Context) -> None:
    """Make a DiJiang model of a pretrained transformer."""
    _call(import_module("dijiang_model.conversion.cli").convert_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def quantize(context: typer.Context) -> None:
    """Round a model's weights to int8 or int4 and save it."""
    _call(import_module("dijiang_model.conversion.quantize_cli").quantize_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train the linear part of a converted model to imitate its teacher."""
    _call(import_module("dijiang_model.conversion.training.cli").train_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Measure what a conversion lost, and what its linear part brings."""
    _call(import_module("dijiang_model.conversion.evaluation.cli").evaluate_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def merge(context: typer.Context) -> None:
    """Merge a trained adapter into its model, ready to be served."""
    _call(import_module("dijiang_model.conversion.merge").merge_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def chat(context: typer.Context) -> None:
    """Talk to a served model in the terminal."""
    _call(import_module("clients.cli").chat_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def complete(context: typer.Context) -> None:
    """Complete the text on standard input."""
    _call(import_module("clients.cli").complete_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def score(context: typer.Context) -> None:
    """Say how likely a served model finds texts."""
    _call(import_module("clients.measuring_cli").score_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def selfcheck(context: typer.Context) -> None:
    """Measure on a running server that its answers do not depend on how they are computed."""
    _call(import_module("clients.measuring_cli").selfcheck_command, context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure this machine: decoding, prompts, serving, training."""
    import_module("benchmarks.cli").app(args=context.args, prog_name="dijiang bench")


@app.command(context_settings=PASS_ON, add_help_option=False)
def state(context: typer.Context) -> None:
    """List, export, import, fork, rewind and delete saved conversations; `repair FOLDER` mends a server's store."""
    if context.args[:1] == ["repair"]:
        program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        program.command()(import_module("server.states.repair").repair_command)
        program(args=context.args[1:], prog_name="dijiang state repair")
    import_module("clients.state_cli").app(args=context.args, prog_name="dijiang state")


def _call(command: Callable[..., Any], context: typer.Context) -> None:
    """Runs a command as a program of its own, with the arguments that were left for it."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(command)
    program(args=context.args, prog_name=f"dijiang {context.info_name}")
