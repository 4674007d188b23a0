"""Request fields that completions and chat share: sampling, stopping, output."""

import uuid
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.engine.types.logprobs import LogprobOptions
from server.errors import InvalidRequestError
from server.protocol.logprobs import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS
from server.protocol.response_format import ResponseFormat, wanted_grammar
from server.protocol.states import StateFields
from server.protocol.structure import OTHER_NAMES, StructuredOutputs, WantedGrammar, with_structure
from server.protocol.wire import RequestModel

MAX_TOKENS = 2**31 - 1
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 4096
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 256
MAX_ALLOWED = 1 << 20


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value  # None, or left to the type check
    for stop in value:
        if not isinstance(stop, str):
            raise PydanticCustomError("stop", "must be a string or a list of strings")
        if not stop:
            raise PydanticCustomError("stop", "a stop string must not be empty")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise PydanticCustomError("stop", "a stop string has {n} characters, the limit is 1024", {"n": len(stop)})
    return value


def _bias_by_token(value: object) -> object:
    """JSON keys are strings: `{"50256": -100}` -> `{50256: -100.0}`."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("logit_bias", "has {n} entries, the limit is 4096", {"n": len(value)})
    biases: dict[int, float] = {}
    for key, bias in value.items():
        about = {"key": str(key)[:40]}
        is_read = type(key) is int  # of a body in another dialect
        if not is_read and not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12):
            raise PydanticCustomError("logit_bias", "keys must be token ids, and '{key}' is none", about)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", "the value of '{key}' must be a number from -100 to 100", about)
        biases[int(key)] = float(bias)
    return biases


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """Send one more chunk with the token counts before `[DONE]`; all others then have `usage: null`."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: send the token counts so far in every chunk."""


class SamplingFields(RequestModel):
    """How tokens are chosen and when an answer ends; the same for every endpoint that generates, of every dialect."""

    other_names = OTHER_NAMES

    temperature: float | None = Field(None, ge=0, le=2)
    """0 (and below 0.0001): greedy decoding; 1 (default): the model's own distribution."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches it; 1 (default): from all."""
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    """Sample from the k most likely tokens; 0 or -1: from all (default)."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Leave out tokens less likely than this fraction of the most likely one; 0 (default): none."""
    typical_p: float | None = Field(None, ge=0, le=1)
    """Sample from the tokens that surprise about as much as is to be expected, as many as reach this probability; 1
    (default): from all."""
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    """No end of sequence, stop token or stop string before that many tokens."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Above 1: tokens already in prompt or answer become less likely. Default 1."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted once from the logit of each token already in the answer. Default 0."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from a token's logit as often as it is in the answer. Default 0."""
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(_bias_by_token),
        WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}),
    ] = None
    """Token id (as a string) -> bias from -100 to 100 added to its logit."""
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    """Equal seeds give equal answers. Choice number i uses seed + i. Absent: a random one."""
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_stop_list),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
        ),
    ] = None
    """Texts that end the answer (a string or a list of them); not part of it."""
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    """Further tokens that end the answer."""
    allowed_token_ids: list[int] | None = Field(None, min_length=1, max_length=MAX_ALLOWED)
    """The only tokens that may come, the end of the sequence included. Not together with a grammar."""
    bad_words: list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]] | None = Field(
        None, max_length=MAX_BAD_WORDS
    )
    """Words that are not generated, as the tokenizer spells them, with and without a space before."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string at the end of the text."""
    ignore_eos: bool | None = None
    """Go on through the model's end-of-sequence token."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (default true)."""
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Use only that many tokens of the prompt, the last ones."""
    truncation_side: Literal["left", "right"] | None = None
    """With `truncate_prompt_tokens`: which end is left out; `right`: the first tokens are used."""
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    """Requests of lower numbers are begun first when all conversations are taken; default 0."""
    timeout: float | None = Field(None, gt=0, le=86400)
    """Seconds after which the request ends with an error."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the answer as a JSON schema, a regular expression, a choice of texts or a grammar."""

    @model_validator(mode="before")
    @classmethod
    def _structure(cls, body: Any) -> Any:
        return with_structure(body)


class GenerationFields(StateFields, SamplingFields):
    """How to generate; the same for every endpoint that does."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    """Most tokens of one answer. Completions: 16 if absent. Chat: `--default-answer-tokens` if absent. 0 only with
    `echo`, `prompt_logprobs` or `return_state`: the prompt is read and nothing is generated."""
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    """Newer name of `max_tokens`; wins when both are given."""
    n: int | None = Field(None, ge=1)
    """Answers per prompt. Default 1."""
    return_token_ids: bool | None = None
    """Return token ids beside the text: `token_ids`, and `prompt_token_ids` of the prompt."""
    return_tokens_as_token_ids: bool | None = None
    """In log-probabilities write `token_id:7` for the text of token 7, so that tokens of equal text stay apart."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Return the log-probability of each token of the prompt, and of that many most likely tokens in its place."""
    logprob_token_ids: list[int] | None = Field(None, max_length=MAX_LOGPROB_TOKEN_IDS)
    """With `logprobs`: at each place of the answer, report these tokens in place of the most likely ones."""
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    """Name of the request, part of the answer's `id`; no two may run at once under one name."""
    response_format: ResponseFormat | None = None
    """The form of the answer: any text (default), a JSON object, JSON that follows a schema, a pattern or a grammar."""
    stream: bool | None = None
    """Send the answer as server-sent events while it grows."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("`stream_options` is only allowed with `stream: true`", param="stream_options")
        if self.logprob_token_ids and (self.num_top_logprobs is None or self.token_limit == 0):
            missing = "an answer: `max_tokens` is 0" if self.token_limit == 0 else "`logprobs`"
            raise InvalidRequestError(f"`logprob_token_ids` needs {missing}", param="logprob_token_ids")
        return self

    @cached_property
    def own_id(self) -> str:
        """`request_id`, or a random name."""
        return uuid.uuid4().hex if self.request_id is None else self.request_id

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, else `max_tokens`, else None."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the most likely tokens are shown at each place of the answer; None: no log-probabilities are."""
        return None

    @property
    def logprob_options(self) -> LogprobOptions:
        """What the engine has to report."""
        shown = self.num_top_logprobs
        of_prompt = [num for num in (self.prompt_logprobs, shown if self.echoes else None) if num is not None]
        named = tuple(self.logprob_token_ids or ())
        return LogprobOptions(0 if named else shown, max(of_prompt, default=None), named)

    @property
    def wanted_grammar(self) -> WantedGrammar | None:
        """What the answer must look like; None: any text. Raises `InvalidRequestError`."""
        return wanted_grammar(self.response_format, self.structured_outputs)

    @property
    def prompt_field(self) -> str:
        """Where prompts come from."""
        return "prompt"

    @property
    def num_prompts(self) -> int:
        """How many there are."""
        return 1

    @property
    def num_choices(self) -> int:
        """`n`, 1 if absent."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream carries token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_usage_in_every_chunk(self) -> bool:
        """Whether they are in every chunk instead of null."""
        return (
            self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats is True
        )


FinishReasonText = Literal["stop", "length"]
