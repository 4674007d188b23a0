"""The plain values that cross the engine's process boundary. Standard library only.

Everything here is frozen and serialisable by field: the service builds requests, the engine answers
with events, and nothing else (no tensor, no pickle) passes between them.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from server.engine.types.logprobs import NO_LOGPROBS, LogprobOptions, LogprobTable
from server.engine.types.position_stats import NOTHING_OBSERVED, PositionHistogram
from server.engine.types.state import (
    NO_PREFIX_CACHE,
    NO_STATE,
    PrefixCacheStats,
    Resumption,
    SavedState,
    StateLayout,
    StateOptions,
)


class FinishReason(StrEnum):
    """Why a sequence ended. Every submitted request ends with exactly one of these."""

    STOP = "stop"
    """End-of-sequence token, or a stop token of the request."""
    LENGTH = "length"
    """`max_tokens` reached."""
    ABORT = "abort"
    """The client left, or the service cancelled the request."""
    ERROR = "error"
    """The request failed; `TokenEvent.error` says how."""
    SUSPENDED = "suspended"
    """The server stops: it can be gone on with later, from the state that was saved, if there was one."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen and when it ends. Ranges are checked by the service.

    Attributes:
        max_tokens: most new tokens, >= 0 (0: the prompt is only read, or scored); None: no limit.
        min_tokens: end-of-sequence and stop tokens are suppressed before that many new tokens.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
        typical_p: keep the tokens whose information is nearest to the entropy of what is left, as many as reach this
            probability, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: > 0, over prompt and output; 1 is off.
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: (token id, added bias) pairs.
        seed: 64-bit; equal seeds give equal tokens whatever runs beside them.
        stop_token_ids: further ids that end the sequence.
        allowed_token_ids: the only tokens that may be sampled; empty: all of them.
        bad_words: sequences of tokens, none of them empty, that must not be in the output as they are.
        ignore_eos: go on through the model's end-of-sequence tokens.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def behind(self, num_outputs: int) -> "SamplingParams":
        """The same for the rest of an answer that has so many tokens: they count in neither limit."""
        if num_outputs == 0 or self.max_tokens == 0:
            return self
        limit = None if self.max_tokens is None else self.max_tokens + num_outputs
        return replace(self, max_tokens=limit, min_tokens=self.min_tokens + num_outputs)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The language that an answer must be in, compiled once by the service already.

    Attributes:
        text: Lark in llguidance's dialect; see `server.engine.grammars.grammar`.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose a request is, and what that one may have.

    Attributes:
        name: opaque; requests of one name are one tenant's.
        weight: its part of slots and prompt tokens among those who want any, >= 1.
        max_running: of its requests at once; the others wait. 0: no limit.
        max_waiting: of its requests without a slot; further ones are refused. 0: no limit.
        max_waiting_tokens: of the prompts of these. 0: no limit.
        outranks: whether its priorities count against other tenants too.
    """

    name: str = ""
    weight: int = 1
    max_running: int = 0
    max_waiting: int = 0
    max_waiting_tokens: int = 0
    outranks: bool = False


ANYBODY = Tenant()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: a prompt of token ids (at least one) and how to go on from it.

    Attributes:
        states: where the conversation before the prompt comes from, and what is kept of this one.
        logprobs: what is to be reported beside the tokens.
        group: name that requests of one prompt and one `states.load_from` share, so that the prompt is computed once;
            None: there are no others.
        tenant: whose it is.
        priority: of its tenant's requests those of lower numbers get slots first.
        cuts: lengths of the prompt at which a step ends, so that the prompt is computed in exactly these chunks (or
            smaller ones, where a step has no room); for measuring.
        grammar: the language that the answer must be in; None: any text.
        resumed: of a request that was suspended: how far it had come; None: it begins here.
        predicted_token_ids: what the answer may well be: a source of drafts, which changes no token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    states: StateOptions = NO_STATE
    logprobs: LogprobOptions = NO_LOGPROBS
    group: str | None = None
    priority: int = 0
    grammar: GrammarSpec | None = None
    cuts: tuple[int, ...] = ()
    resumed: Resumption | None = None
    predicted_token_ids: tuple[int, ...] = ()
    tenant: Tenant = ANYBODY


@dataclass(frozen=True, slots=True)
class EngineError:
    """What went wrong with one request, in words for its client.

    Attributes:
        code: stable machine-readable name: `grammar_invalid`, `grammar_failed`, `numerical_error`,
            `engine_restarting`, `overloaded`, `internal_error`, or of a state's file `state_invalid`,
            `state_of_another_model`, `state_not_found`, `state_not_saved`, `state_storage_full`, `states_unavailable`.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Progress of one request: new tokens in order, and the end if `finish_reason` is set.

    A terminal event may carry the last tokens too. The end-of-sequence or stop token that ended a
    sequence is included in `token_ids` (the text layer leaves it out).

    Attributes:
        num_cached_tokens: with the first token: tokens of the prompt that were not computed again.
        saved: in the terminal event of a request that asked for it: its state, on the disk.
        save_error: instead of that: why the disk did not take it.
        logprobs: of `token_ids`, a row for each, if the request wants them.
        prompt_logprobs: of the next tokens of the prompt, from its second one on, if the request wants them; all
            of them have come with the first token at the latest.
        num_accepted: the first so many of `token_ids` were drafted from the request's prediction.
        num_rejected: drafts from it that did not become tokens.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: EngineError | None = None
    num_cached_tokens: int = 0
    saved: SavedState | None = None
    save_error: EngineError | None = None
    logprobs: LogprobTable | None = None
    prompt_logprobs: LogprobTable | None = None
    num_accepted: int = 0
    num_rejected: int = 0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The frozen part of the settings that the engine process gets.

    Attributes:
        model_path: folder of the model.
        device: `cpu`, `cuda` or `cuda:N`.
        weights_dtype: `float32`, `bfloat16`, `float16`, `int8` or `int4` (rounded while loading, if not before).
        num_threads: CPU threads for tensor work, >= 1.
        state_memory_bytes: budget from which the number of slots is computed.
        max_num_slots: upper bound on the slots, whatever the budget.
        preemption_bytes: of the host, for states of running requests that had to give their slot up for a while.
        max_step_tokens: tokens (decode rows and prefill chunks together) in one step.
        max_waiting: requests that may wait for a slot before new ones are refused.
        reserved_waiting: places among these for tenants of whom nothing waits.
        scratch_folder: of files that end with the process; None: the system's.
        heartbeat_s: after so long without a sign of life, and after several times its longest step, the process is
            ended and another one started; 0: never.
        target_gap_ms: on a CPU: how long a step that reads prompts may keep running answers waiting; 0: any time.
        max_drafts: most guesses of next tokens that a step verifies for one sequence; 0: none; None: as many as are
            good where guesses can be verified.
        decode_graphs: whether a CUDA device replays captured decode steps.
        states_folder: of state files, shared with the service; None: there are none.
        prefix_cache_host_bytes / prefix_cache_device_bytes: budgets of the prefix cache's tiers; both 0: no cache.
        prefix_cache_disk_bytes / prefix_cache_folder: of its tier on the disk, in a folder of this engine alone.
        prefix_cache_min_tokens: shorter prefixes are computed again.
        prefix_cache_spacing: a cached state after every so many tokens of a prompt; 0: only at its ends.
        tensor_parallel: processes that the network is split over; on CUDA each takes a device, from `device` on.
        state_dtype: of the running sums, and of windows that are not narrower by the weights: `float32` or `bfloat16`;
            `int8`: windows in int8, sums in bfloat16.
    """

    model_path: str
    device: str
    weights_dtype: str
    num_threads: int
    state_memory_bytes: int
    max_num_slots: int
    max_step_tokens: int
    max_waiting: int
    reserved_waiting: int = 0
    preemption_bytes: int = 1 << 30
    scratch_folder: str | None = None
    heartbeat_s: float = 0.0
    target_gap_ms: int = 100
    max_drafts: int | None = None
    decode_graphs: bool = True
    states_folder: str | None = None
    prefix_cache_host_bytes: int = 0
    prefix_cache_device_bytes: int = 0
    prefix_cache_disk_bytes: int = 0
    prefix_cache_folder: str | None = None
    prefix_cache_min_tokens: int = 64
    prefix_cache_spacing: int = 0
    tensor_parallel: int = 1
    state_dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine says about itself, once, when it is ready."""

    num_slots: int
    state_bytes_per_slot: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    device_name: str
    weights_dtype: str
    num_parameters: int
    load_s: float
    state_layout: StateLayout | None = None
    """What saved states look like; None where none can be saved."""
    num_ranks: int = 1
    """Processes that the network is split over."""
    state_bytes_per_rank: int = 0
    """Of a slot, on each of them."""
    max_drafts: int = 0
    """Guesses of next tokens that a step verifies for one sequence at most; 0: none are made."""
    state_dtype: str = "float32"
    """Of the running sums in a state."""
    steps: Literal["native", "triton", "torch"] = "torch"
    """What computes: the compiled kernels, Triton's, or torch operations."""
    kernels: str = ""
    """Which of the compiled kernels: those for one kind of processor; empty: none of them."""
    slow_because: str | None = None
    """Why the compiled kernels do not, where they could be expected to (one process, a CPU), in a sentence."""
    kv_cache_bytes_per_token: int = 0
    """For comparison: what ordinary attention of this shape keeps of each token, in 16-bit numbers."""
    memory: str = ""
    """Which tokens a state holds, in words; empty: not known."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and totals of the engine, sent with the events about once a second."""

    num_running: int
    num_waiting: int
    num_free_slots: int
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    step_time_s: float
    """Sum over all steps, seconds."""
    longest_step_s: float = 0.0
    """The longest of them."""
    num_drafted_tokens: int = 0
    """Guesses of next tokens that were verified."""
    num_preemptions: int = 0
    """Running requests that had to wait again, since another tenant was due."""
    preempted_bytes: int = 0
    """Memory of the states of those that wait now."""
    num_accepted_tokens: int = 0
    """Those of them that were right; they are among the decoded tokens."""
    prefix_cache: PrefixCacheStats = NO_PREFIX_CACHE
    token_times: PositionHistogram = NOTHING_OBSERVED
    """Seconds of decoded tokens, in steps that read no prompt."""
    state_norms: PositionHistogram = NOTHING_OBSERVED
    """Norms of states of running conversations, one about every second."""
    largest_state_norm: float = 0.0
    """Of those."""
    num_not_finite: int = 0
    """Requests that ended because their logits or their state were not finite."""
