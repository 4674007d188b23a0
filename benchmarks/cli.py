"""`dijiang bench`: the commands are imported when they are called, so that `--help` is quick."""

from importlib import import_module

import typer

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
COMMANDS = ("decode", "prefill", "serve", "train")

app = typer.Typer(
    help="Measure this machine: each command ends with one line of JSON.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(context_settings=PASS_ON, add_help_option=False)
def decode(context: typer.Context) -> None:
    """Decode steps beside HF transformers and llama.cpp, and against the memory they must move."""
    _call(context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def prefill(context: typer.Context) -> None:
    """The reading of prompts beside HF transformers, alone and in ragged batches."""
    _call(context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """The service over a real socket: throughput and latencies by the number of clients."""
    _call(context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Training steps of both stages: tokens per second and peak memory."""
    _call(context)


def _call(context: typer.Context) -> None:
    """Runs a command as a program of its own, with the arguments that were left for it."""
    name = context.info_name
    assert name in COMMANDS
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(getattr(import_module(f"benchmarks.{name}"), f"{name}_command"))
    program(args=context.args, prog_name=f"dijiang bench {name}")
