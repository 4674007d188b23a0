"""From a request of the Responses API to its generation: the same when it begins and when it goes on after a stop."""

from collections.abc import Sequence

from server.engine.types.requests import EngineInfo
from server.generation.generation import Generation
from server.generation.logprobs import logprob_format
from server.generation.planning import plan_generation
from server.generation.thinking import answer_parser, shown_token_ids, thinking_of
from server.generation.tools import checked_form
from server.protocol.responses import ResponseRequest
from server.responses.output import ResponseOutput
from server.responses.run import ResponseRun
from server.service import Service
from server.states.session import CacheUse, Rescue, StateSession
from server.states.store import ResponseRecord, SnapshotRecord, Turn


async def plan_response(
    service: Service,
    info: EngineInfo,
    body: ResponseRequest,
    run: ResponseRun,
    *,
    prompt: tuple[int, ...],
    base: SnapshotRecord | None,
    base_of: ResponseRecord | None = None,
    cache_points: Sequence[int] = (),
    goes_on: bool = False,
) -> Generation:
    """Gives a run its output and its generation.

    Args:
        prompt: what comes after `base`.
        base: the conversation that it goes on from; None: it begins one.
        base_of: the response that this is of.
        cache_points: lengths of prefixes of the prompt that others are likely to share.
        goes_on: it was put off, at `run.snapshot`.

    Raises:
        InvalidRequestError: it can never be made.
    """
    use, fields = body.tool_use, body.generation
    fields = fields.model_copy(update={"seed": run.unfinished.seed})
    thinking = thinking_of(service, prompt)
    is_kept = body.store is not False and service.states is not None
    salt = "" if body.cache_salt is None else body.cache_salt
    session = StateSession(
        service.engine,
        owner=run.owner,
        store=service.states,
        layout=info.state_layout,
        base=base,
        base_of=base_of,
        keep=run.keep_state if is_kept else None,
        turn=Turn.OPEN,
        # The cache is for prompts, and what goes on has an answer behind its own.
        cache=None if body.cache_prompt is False or goes_on else CacheUse(run.owner, salt, tuple(cache_points)),
        rescue=Rescue(run.keep_state, is_own=body.background is True, in_any_form=True) if is_kept else None,
        cut_off_at=run.snapshot if goes_on else None,
    )
    shows_logprobs = fields.num_top_logprobs is not None
    run.output = ResponseOutput(answer_parser(service, thinking, use), with_logprobs=shows_logprobs)
    run.logprobs = logprob_format(service, fields) if shows_logprobs else None
    run.generation = plan_generation(
        service,
        info,
        fields,
        [prompt],
        param="input",
        max_tokens=None,
        session=session,
        grammar=await checked_form(service, info, body.wanted_grammar, use, thinking),
        shown_token_ids=shown_token_ids(service, thinking, use),
        thinking=thinking,
    )
    return run.generation
