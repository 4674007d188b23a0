"""Everything an operator may set, each as a flag of `dijiang serve` and as an environment variable.

`state_memory` is `--state-memory` and `DIJIANG_STATE_MEMORY`; a flag wins over the variable. This is the
only place where the service reads the environment. Names that do not exist are errors, and so are
settings that cannot take effect together.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dijiang_model.formats.dtype_names import dtype_name

PREFIX = "DIJIANG_"
CLIENT_VARIABLES = frozenset({"DIJIANG_BASE_URL", "DIJIANG_API_KEY"})
"""Read by `dijiang chat` and `dijiang complete`, so they are no mistakes here."""


class SettingsError(ValueError):
    """Settings that are unknown, wrong or contradictory; the text is one sentence a line, for the operator."""


def _list(value: object) -> object:
    """`a, b` -> `["a", "b"]`."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class StoreUrl(SecretStr):
    """The address of a database, which may hold a password."""


def _is_store_url(url: StoreUrl) -> StoreUrl:
    if not url.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must be the address of a PostgreSQL: postgresql://user@host:port/database")
    return url


Auto = Literal["auto"]
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_list)]
SecretList = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_list)]


def _in(panel: str, default: Any, **limits: Any) -> Any:
    """A setting with its group in `--help`."""
    return Field(default, json_schema_extra={"panel": panel}, **limits)


class Settings(BaseSettings):
    """All settings of `dijiang serve`; frozen."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    model: Path | None = _in("Model", None)
    """Folder of the model. Default: SmolLM2-135M-Instruct, converted once to a DiJiang hybrid and kept."""
    served_model_name: CommaList = _in("Model", ())
    """Names that clients ask for, separated by commas; the first is the default. Default: the name of the folder."""
    default_sampling: str = _in("Model", "model")
    """Sampling of requests that do not say otherwise: `model` (what its generation_config.json names), `neutral`
    (temperature 1 and nothing else), or values such as temperature=0.7,top_p=0.9 in place of the model's."""
    context_length: int = _in("Model", 1 << 20, ge=1)
    """Number of tokens that /v1/models tells clients who want to know one; there is no longest conversation."""
    cache_dir: Path | None = _in("Model", None)
    """Where the converted default model is kept. Default: ~/.cache/dijiang."""
    device: str = _in("Model", "auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    """auto, cpu, cuda or cuda:N. auto takes the first CUDA device if there is one."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"], BeforeValidator(dtype_name)] = (
        _in("Model", "auto")
    )
    """Data type of the weights: auto is what they are stored in if that is int8 or int4, else float32 on a CPU and
    bfloat16 on CUDA; int8 and int4 quantize while loading, for memory, and on a CPU for speed, as bfloat16 there.
    Running sums are float32 (`state_dtype`)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = _in("Model", "auto")
    """CPU threads for tensor work. auto: both of two cores, one less than there are up to 8, then half."""
    decode_graphs: bool = _in("Model", True)
    """On CUDA: capture decode steps as CUDA graphs at the start, one for each batch size, and replay them, which leaves
    the CPU hardly anything to do per step. Off: every step is launched anew."""
    reasoning_parser: Literal["auto", "none", "think"] = _in("Model", "auto")
    """think: split the text between <think> and </think> at the beginning of chat answers out, as reasoning_content.
    auto: if the model's chat template or vocabulary has these marks."""
    tensor_parallel: int = _in("Model", 1, ge=1, le=1024)
    """Processes that heads, states and weights are split over, each on a CUDA device of its own (device and those that
    follow it) or with its share of the threads. Must divide the model's key-value heads."""

    state_dtype: Annotated[Literal["float32", "bfloat16", "int8"], BeforeValidator(dtype_name)] = _in(
        "Capacity", "float32"
    )
    """Data type of a conversation's state. bfloat16 halves its memory: twice as many conversations fit; its sums are
    rounded stochastically, so that long ones do not drift. int8 keeps the window's keys and values in a quarter.
    A saved state can only be resumed with the dtype it was saved in."""
    state_memory: Annotated[ByteSize, Field(ge=1)] | Auto = _in("Capacity", "auto")
    """Memory for the states of conversations, such as 2GiB. auto: a share of what is free."""
    max_conversations: int = _in("Capacity", 512, ge=1, le=1_000_000)
    """Most conversations that run at once, even if the memory would hold more."""
    max_step_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = _in("Capacity", "auto")
    """Tokens computed in one step, prompts and answers together: more is faster for long prompts, but makes running
    answers wait longer. auto: 512 on a CPU, 2048 on CUDA, or max_conversations if that is more."""
    speculate: Annotated[int, Field(ge=0, le=64)] | Auto = _in("Capacity", "auto")
    """Draft up to so many next tokens of an answer from what it repeats, and verify them in one step: faster answers,
    the same tokens. 0: never; auto: 15 where the compiled CPU kernels run, which it needs."""
    max_queue: int = _in("Capacity", 1024, ge=0, le=1_000_000)
    """Requests that may wait for a free conversation before new ones are refused with 503."""
    target_gap_ms: int = _in("Capacity", 100, ge=0)
    """On a CPU: a step reads only so many prompt tokens that the next tokens of answers come after that many
    milliseconds; 0: as many as there is room for."""
    reserved_queue: Annotated[int, Field(ge=0)] | Auto = _in("Fair shares", "auto")
    """Places in the queue for keys of which nothing waits. auto: an eighth of max_queue if there are several keys."""
    max_running_per_key: int = _in("Fair shares", 0, ge=0)
    """Most requests of one key that run at once; the others wait. 0: no limit."""
    max_queue_per_key: int = _in("Fair shares", 0, ge=0)
    """Most requests of one key that wait; further ones are refused with 429. 0: no limit."""
    max_queue_tokens_per_key: int = _in("Fair shares", 0, ge=0)
    """Most prompt tokens of one key that wait; further requests are refused with 429. 0: no limit."""
    preemption_memory: ByteSize | Auto = _in("Fair shares", "auto")
    """Memory for the states of running conversations that wait because another key is due; while it is used up, no
    key's slot is taken for another. 0: never. auto: a quarter of state_memory."""
    priority_across_keys: bool = _in("Fair shares", False)
    """Let the priority of a request count against the requests of other keys too, not only among those of its own."""

    prefix_cache_memory: ByteSize | Auto = _in("Prefix cache", "auto")
    """Memory for states after prompts that were seen before; 0 turns the cache off. auto: a quarter of state_memory, at
    most 1GiB."""
    prefix_cache_device_memory: ByteSize = _in("Prefix cache", ByteSize(0))
    """Memory on the CUDA device for those used last, before they move to prefix_cache_memory; no use on a CPU."""
    prefix_cache_disk: ByteSize = _in("Prefix cache", ByteSize(0))
    """Disk space for those that leave prefix_cache_memory, beside the saved states; emptied at every start."""
    prefix_cache_min_tokens: int = _in("Prefix cache", 64, ge=1)
    """Shorter prefixes are computed again: keeping a state costs more than they do."""
    prefix_cache_spacing: int = _in("Prefix cache", 0, ge=0)
    """Keep a state after every so many tokens of a prompt too; 0: only where system prompt, prompt and answer end."""

    states_folder: Path | None = _in("States", None)
    """Folder of saved states and responses, of this server alone. Default: states/NAME in cache_dir, by the name of the
    model; if that is in use or cannot be written, none are kept."""
    states: bool = _in("States", True)
    """Keep states and responses; without it, requests for any are refused."""
    state_store: Annotated[StoreUrl, AfterValidator(_is_store_url)] | None = _in("States", None)
    """Keep states and responses in PostgreSQL, where several servers share them: postgresql://user@host:port/database.
    states_folder then holds working copies."""
    state_store_schema: str = _in("States", "dijiang", pattern=r"^[a-z_][a-z0-9_]{0,62}$")
    """Schema of the tables in state_store: one for each model."""
    state_store_bytes: str | None = _in("States", None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?$")
    """With state_store: keep the content of states in an object store that speaks S3, s3://bucket/prefix; the index
    stays where it is. Address, region and keys as AWS's tools take them from the environment (AWS_ENDPOINT_URL_S3)."""
    state_store_copies: ByteSize = _in("States", ByteSize(1 << 30))
    """With state_store: disk space for copies of states that may be used again here."""
    state_store_connections: int = _in("States", 8, ge=1, le=100)
    """With state_store: connections to it that this server may have open at once."""
    state_store_timeout_s: float = _in("States", 5.0, ge=1, le=60)
    """With state_store: seconds after which it is taken to be away, whether a connection or an answer is missing."""
    states_disk: Annotated[ByteSize, Field(ge=1)] = _in("States", ByteSize(10 << 30))
    """Space for all that is saved, states and texts of responses, such as 10GiB; of state_store as a whole, if there is
    one."""
    states_per_key: Annotated[ByteSize, Field(ge=1)] | Auto = _in("States", "auto")
    """Space of that for each API key. auto: equal shares, so that no key can take another's."""
    states_eviction: Literal["lru", "refuse"] = _in("States", "lru")
    """When a key's space is used up: lru deletes what the same key has not used for longest, refuse refuses what is
    new."""
    state_ttl_s: float = _in("States", 30 * 86400.0, ge=0)
    """Seconds without use after which a state or response is deleted, unless a request says; 0: never."""

    host: str = _in("Address", "127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 for every network."""
    port: int = _in("Address", 8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    tls_cert: Path | None = _in("Address", None)
    """Certificate chain (PEM) for HTTPS; needs tls_key."""
    tls_key: Path | None = _in("Address", None)
    """Private key (PEM) of tls_cert."""
    allowed_hosts: CommaList = _in("Address", ())
    """Host names that requests may name, separated by commas. Default: any; only local ones where the server listens on
    this machine alone and asks for no key, so that no web page reaches it by a name of its own."""
    cors_origins: CommaList = _in("Address", ())
    """Web origins whose pages may call the server, separated by commas, or *. Default: none."""

    api_keys: SecretList = _in("Keys", ())
    """Keys that give access, separated by commas: as they are, or as sha256:HEX. Default: everybody has access."""
    api_keys_file: Path | None = _in("Keys", None)
    """File with further keys, one a line."""
    keys_file: Path | None = _in("Keys", None)
    """TOML file with a [[keys]] for each key: name, key (as it is, or as sha256:HEX), role, weight and limits. Files of
    keys are read again when they change, and on SIGHUP."""
    admin_keys: SecretList = _in("Keys", ())
    """Keys for /admin/ alone, separated by commas: as they are, or as sha256:HEX. Default: nobody has access."""
    admin_keys_file: Path | None = _in("Keys", None)
    """File with further ones, one a line."""
    metrics_need_key: bool = _in("Keys", False)
    """Ask for a key on /metrics too."""

    max_prompt_tokens: int = _in("Limits", 0, ge=0)
    """Longest prompt in tokens; 0: no limit."""
    max_answer_tokens: int = _in("Limits", 65_536, ge=0)
    """Longest answer in tokens; it ends with `length`. 0: no limit."""
    default_answer_tokens: int = _in("Limits", 4096, ge=0)
    """Longest answer in tokens to chats and responses that set no limit. 0: only --max-answer-tokens limits."""
    max_body_bytes: ByteSize = _in("Limits", ByteSize(16 << 20), ge=1024)
    """Largest request body, such as 16MiB."""
    max_arriving_bytes: ByteSize = _in("Limits", ByteSize(256 << 20), ge=1 << 20)
    """Memory for the bodies of all requests that are arriving, such as 256MiB, half of it for one key; further ones are
    refused with 503 meanwhile."""
    max_n: int = _in("Limits", 16, ge=1)
    """Most answers per prompt (n)."""
    max_prompts: int = _in("Limits", 128, ge=1)
    """Most prompts in one completion request."""
    max_choices: int = _in("Limits", 128, ge=1)
    """Most answers in one request: prompts times n."""
    max_stop: int = _in("Limits", 16, ge=1, le=1024)
    """Most stop strings."""
    max_grammar_bytes: ByteSize = _in("Limits", ByteSize(256 << 10), ge=1024)
    """Largest schema, regular expression or grammar that an answer is to follow, such as 256KiB."""
    grammar_timeout_s: float = _in("Limits", 5.0, gt=0)
    """Longest time to compile one, seconds."""
    header_timeout_s: float = _in("Limits", 10.0, gt=0)
    """Longest time for the headers of a request to arrive, and for a new connection to say anything, seconds."""
    body_timeout_s: float = _in("Limits", 60.0, gt=0)
    """Longest time for a request body to arrive, seconds."""
    unread_timeout_s: float = _in("Limits", 60.0, gt=0)
    """A client that has not read what was sent for that many seconds is cut off; its request ends."""
    request_timeout_s: float = _in("Limits", 0.0, ge=0)
    """Longest time for an answer, seconds; 0: no limit."""
    rate_limit_requests: int = _in("Limits", 0, ge=0)
    """Most generating requests a minute of one key, with bursts up to that many; 0: no limit."""
    rate_limit_tokens: int = _in("Limits", 0, ge=0)
    """Most tokens a minute of one key, prompts and answers together; 0: no limit."""

    heartbeat_s: float = _in("Operation", 30.0, ge=0)
    """An engine that says nothing for that many seconds (10 times as long on CUDA, where a step may compile), and
    for 5 times its longest step, is ended and started again. 0: never."""
    playground: bool = _in("Operation", True)
    """Serve a page at / to talk to the model, to look at probabilities, and to save, fork and rewind conversations."""
    retry_after_s: int = _in("Operation", 2, ge=1, le=3600)
    """Retry-After of answers while the server starts or takes no requests, seconds; while its engine starts
    again, not before it can be there."""
    replica_name: str | None = _in("Operation", None, max_length=100, pattern=r"^[A-Za-z0-9._:-]+$")
    """Name of this server among those that share its work, in the header X-Dijiang-Replica of every answer. Default: a
    random one, another at every start."""
    drain_delay_s: float = _in("Operation", 0.0, ge=0)
    """After SIGTERM: seconds in which `/ready` says 503 and new work is still taken, so that a balancer has time to see
    it; a little more than its health checks take to notice."""
    drain_timeout_s: float = _in("Operation", 30.0, ge=0)
    """After SIGTERM and drain_delay_s: longest time to finish what runs, seconds."""
    keepalive_s: float = _in("Operation", 15.0, gt=0)
    """A stream that sends nothing gets a comment before that many seconds are over, so that proxies keep it open."""
    idle_connection_s: float = _in("Operation", 120.0, gt=0)
    """A connection without a request is closed after that many seconds; keep it above what proxies before it keep."""
    otlp_traces_endpoint: str | None = _in("Operation", None, pattern=r"^https?://.+")
    """Send OpenTelemetry traces of requests to this address of a collector, as OTLP over HTTP, such as
    http://localhost:4318/v1/traces; needs the extra `otel`. Default: none are made."""
    log_level: Literal["debug", "info", "warning", "error"] = _in("Operation", "info")
    """Least important messages to log."""
    log_format: Literal["console", "json"] = _in("Operation", "console")
    """console for eyes, json for machines: then every line that is written is an object. Prompts and answers are never
    logged."""

    @model_validator(mode="after")
    def _take_effect(self) -> Self:
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Sentences about settings that cannot take effect together."""
        step_tokens = self.max_step_tokens
        return [
            "tls_cert and tls_key are only of use together"
            if (self.tls_cert is None) != (self.tls_key is None)
            else "",
            *(
                f"{name}: the file {path} does not exist"
                for name in ("tls_cert", "tls_key", "api_keys_file", "keys_file", "admin_keys_file")
                if (path := getattr(self, name)) is not None and not path.is_file()
            ),
            f"max_n is {self.max_n}, but max_choices allows only {self.max_choices} answers in one request"
            if self.max_n > self.max_choices
            else "",
            f"max_conversations is {self.max_conversations}, but a step has only {step_tokens} tokens "
            "(max_step_tokens), and each running conversation needs one of them"
            if step_tokens != "auto" and self.max_conversations > step_tokens
            else "",
            "states_folder has no effect with --no-states"
            if not self.states and self.states_folder is not None
            else "",
            "state_store has no effect with --no-states" if not self.states and self.state_store is not None else "",
            "state_store_schema, _bytes, _copies, _connections and _timeout_s have no effect without state_store"
            if self.state_store is None and any(name.startswith("state_store_") for name in self.model_fields_set)
            else "",
            "prefix_cache_disk has no effect while prefix_cache_memory is 0, or with --no-states"
            if self.prefix_cache_disk and (self.prefix_cache_memory == 0 or not self.states)
            else "",
            f"state_dtype {self.state_dtype} cannot be split over {self.tensor_parallel} processes (tensor_parallel)"
            if self.state_dtype != "float32" and self.tensor_parallel > 1
            else "",
            "prefix_cache_device_memory has no effect while prefix_cache_memory is 0"
            if self.prefix_cache_memory == 0 and self.prefix_cache_device_memory
            else "",
            "metrics_need_key has no effect without api_keys or api_keys_file"
            if self.metrics_need_key and not (self.api_keys or self.api_keys_file or self.keys_file)
            else "",
        ]


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags (by field name; only those given) and the environment.

    Raises:
        SettingsError: all that is wrong, a sentence a line.
    """
    problems = unknown_variables(os.environ)
    try:
        settings = Settings(**flags)
    except ValidationError as error:
        # Of a setting with alternatives (a number or `auto`) the first complaint says enough.
        first = {item["loc"][:1]: item for item in reversed(error.errors())}
        problems += [line for item in reversed(first.values()) for line in _describe(item)]
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each `DIJIANG_` variable that is no setting."""
    known = {variable_of(name) for name in Settings.model_fields}
    problems = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known | CLIENT_VARIABLES:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"the environment variable {name} is not a setting{hint}")
    return problems


def misplaced_key(settings: Settings) -> bool:
    """Whether the clients' key is set but no key of the server: a likely mistake that leaves the server open."""
    return "DIJIANG_API_KEY" in os.environ and not (settings.api_keys or settings.api_keys_file or settings.keys_file)


def flag_of(name: str) -> str:
    """`state_memory` -> `--state-memory`."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """`state_memory` -> `DIJIANG_STATE_MEMORY`."""
    return PREFIX + name.upper()


def _describe(error: Mapping[str, Any]) -> list[str]:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return list(message.split("\n"))
    if error["type"].startswith("byte_size"):
        message = "must be a size, such as 512MiB or 2GiB"
    name = str(error["loc"][0])
    return [f"{flag_of(name)} ({variable_of(name)}): {message}"]
