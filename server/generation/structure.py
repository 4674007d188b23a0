"""Has the grammar of a request compiled before anything is answered."""

from server.engine.types.requests import EngineInfo, GrammarSpec
from server.errors import InvalidRequestError, OverloadedError
from server.grammar_check.checker import GrammarRefusedError, GrammarsBusyError
from server.protocol.structure import WantedGrammar
from server.service import Service


async def checked_grammar(service: Service, info: EngineInfo, wanted: WantedGrammar | None) -> GrammarSpec | None:
    """What the engine is given; None if any text will do.

    Raises:
        InvalidRequestError: the grammar is refused, or the model has no text.
        OverloadedError: too many grammars wait to be compiled.
    """
    if wanted is None:
        return None
    if service.grammars is None:
        raise InvalidRequestError(
            f"`{wanted.param}` needs text, and this model has no tokenizer", param=wanted.param, code="no_tokenizer"
        )
    try:
        return await service.grammars.check(wanted.source, info)
    except GrammarRefusedError as error:
        raise InvalidRequestError(f"{wanted.param}: {error}", param=wanted.param, code="invalid_value") from error
    except GrammarsBusyError as error:
        raise OverloadedError("too many grammars wait to be compiled") from error
