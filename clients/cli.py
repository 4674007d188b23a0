"""The commands `dijiang chat` and `dijiang complete`: functions for typer, which the `dijiang` program mounts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Annotated, cast

import typer
from rich.console import Console

from clients.client import DEFAULT_BASE_URL, Client
from clients.conversation import Conversation
from clients.errors import APIConnectionError, APIResponseError, ClientError
from clients.resumed import ResumedConversation
from clients.terminal import INTERRUPTED, Terminal
from clients.types import GenerationOptions

BROKEN_PIPE = 141
"""Exit status of a program whose reader went away, as shells have it."""

BaseUrl = Annotated[
    str, typer.Option(envvar="DIJIANG_BASE_URL", help="Address of an OpenAI-style server, with or without /v1.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="DIJIANG_API_KEY", help="Sent as bearer token, if the server asks.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Model to ask; the first one served if not given.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer; the server's limit if absent.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 is greedy decoding; the server's default if absent.")
]
TopP = Annotated[float | None, typer.Option(help="Sample from the fewest tokens that together have this probability.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]


def chat_command(
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with the conversation saved under this name, or begin and save one."),
    ] = None,
) -> None:
    """Talk to a model. Reads lines from the terminal, or from a pipe (one turn each); /help lists the commands."""
    options = _given(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    notices = Console(stderr=True)
    with connected(base_url, api_key, model, notices) as (client, name):
        if resume is None:
            conversation = Conversation(client, name, options=options, system=system)
        else:
            conversation = _resumed(client, name, resume, options, system, notices)
        if sys.stdin.isatty():
            _enable_line_editing()
            notices.print(f"{name} at {client.root}. /help lists the commands.", style="dim", highlight=False)
        status = Terminal(conversation, output=Console(), notices=notices).run()
    raise typer.Exit(status)


def complete_command(
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: ModelName = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = 128,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on through the end of the text.")] = False,
) -> None:
    """Continue the text on standard input (without its last line break); the continuation goes to standard output."""
    options = _given(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop if stop else None,
        ignore_eos=True if ignore_eos else None,
    )
    notices = Console(stderr=True)
    prompt = _read_prompt(notices)
    with (
        connected(base_url, api_key, model, notices) as (client, name),
        client.stream_complete(prompt, model=name, **options) as stream,
    ):
        for piece in stream.text_stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        if sys.stdout.isatty():
            sys.stdout.write("\n")


def _resumed(
    client: Client, model: str, name: str, options: GenerationOptions, system: str | None, notices: Console
) -> ResumedConversation:
    conversation = ResumedConversation(client, model, name=name, options=options, system=system)
    state = conversation.state
    text = f"{name}: a new conversation" if state is None else f"{name}: resumed after {state.num_tokens:,} tokens"
    notices.print(text, style="dim", markup=False, highlight=False)
    return conversation


@contextmanager
def connected(base_url: str, api_key: str | None, model: str | None, notices: Console) -> Iterator[tuple[Client, str]]:
    """A client and the name of the model to ask. What goes wrong inside ends the program with one clear line."""
    try:
        client = Client(base_url, api_key=api_key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--base-url") from error
    try:
        with client:
            yield client, model if model is not None else _first_model(client)
    except ClientError as error:
        notices.print(_explained(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        _discard_output()
        raise typer.Exit(BROKEN_PIPE) from error


def _first_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise APIResponseError("the server serves no model")
    return models[0].id


def _explained(error: ClientError) -> str:
    if isinstance(error, APIConnectionError):
        remedy = "Start a server with `make serve` or `dijiang serve`, or name another one with --base-url."
        return f"error: {error}\n{remedy}"
    return f"error: {error}"


def _read_prompt(notices: Console) -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        notices.print(f"error: standard input is not UTF-8 (byte {error.start:,})", style="red", highlight=False)
        raise typer.Exit(1) from error


def _given(**options: object) -> GenerationOptions:
    """Only what was set: the rest is the server's to choose."""
    return cast(GenerationOptions, {name: value for name, value in options.items() if value is not None})


def _enable_line_editing() -> None:
    # Importing it is what gives `input` history and cursor keys; not every Python has it.
    with suppress(ImportError):
        readline = import_module("readline")
        # What is pasted is one message, with its lines; Alt-Enter begins another line.
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')


def _discard_output() -> None:
    # What is still buffered would raise again when the interpreter flushes it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
