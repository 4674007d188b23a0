"""The frozen part of the settings that the HTTP side gets; only the composition root makes one."""

from dataclasses import dataclass

from dijiang_model.checkpoints.default_sampling import NEUTRAL, DefaultSampling
from server.keys import KeyFacts


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Limits and names of the HTTP side; 0 means none where a limit can be off.

    Attributes:
        model_name: the name clients ask for.
        other_names: further names of it.
        host_names: that requests may name in their Host header; one with a dot at its end or beginning stands for all
            that begin or end so; empty: any.
        context_length: what clients are told who want to know a longest conversation.
        sampling: of requests that do not say otherwise.
        version: of this server.
        fingerprint: `system_fingerprint` of answers.
        replica: name of this server among those that share its work; clients are told.
        max_prompt_tokens: longest prompt in tokens; 0: no limit.
        max_answer_tokens: of each answer; 0: no limit.
        default_answer_tokens: of answers to chats and responses that set no limit; 0: only `max_answer_tokens` limits.
        max_n: most answers per prompt.
        max_prompts: most prompts in one request.
        max_choices: most answers in one request (prompts times `n`).
        max_stop: most stop strings.
        max_body_bytes: largest request body.
        max_arriving_bytes: memory for all bodies that are arriving.
        body_timeout_s: longest time for a body to arrive.
        request_timeout_s: longest time for an answer; 0: no limit.
        keepalive_s: longest silence in a stream: a comment is sent in time.
        key_hashes: SHA-256 of the keys that are let in; empty: everybody is.
        admin_key_hashes: likewise, of the keys for `/admin/`; empty: nobody may go there.
        keys: what is known of some of these.
        metrics_need_key: whether `/metrics` asks for a key too.
        cors_origins: web origins that may call; empty: none.
        state_ttl_s: how long states and responses live without being used, unless a request says; 0: for ever.
        rate_limit_requests / rate_limit_tokens: most of one key in a minute; 0: no limit.
        playground: whether the playground is served at `/`.
        reasoning_parser: `think`: answers may begin with a thought; `none`; `auto`: as the tokenizer says.
        retry_after_s: when clients are told to try again while no requests are taken; see `Service.retry_after_s`.
        max_running_per_key / max_queue_per_key / max_queue_tokens_per_key / priority_across_keys: see `Tenant`.
    """

    model_name: str
    other_names: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    context_length: int = 1 << 20
    sampling: DefaultSampling = NEUTRAL
    version: str = "0"
    fingerprint: str = "fp_0"
    replica: str = "server"
    max_prompt_tokens: int = 0
    max_answer_tokens: int = 0
    default_answer_tokens: int = 0
    max_n: int = 16
    max_prompts: int = 128
    max_choices: int = 128
    max_stop: int = 16
    max_body_bytes: int = 16 << 20
    max_arriving_bytes: int = 256 << 20
    body_timeout_s: float = 60.0
    request_timeout_s: float = 0.0
    keepalive_s: float = 15.0
    key_hashes: frozenset[bytes] = frozenset()
    admin_key_hashes: frozenset[bytes] = frozenset()
    keys: tuple[KeyFacts, ...] = ()
    metrics_need_key: bool = False
    cors_origins: tuple[str, ...] = ()
    state_ttl_s: float = 0.0
    rate_limit_requests: int = 0
    rate_limit_tokens: int = 0
    playground: bool = True
    reasoning_parser: str = "auto"
    retry_after_s: int = 2
    max_running_per_key: int = 0
    max_queue_per_key: int = 0
    max_queue_tokens_per_key: int = 0
    priority_across_keys: bool = False
