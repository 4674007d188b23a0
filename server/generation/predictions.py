"""A predicted answer, as tokens to draft from."""

from server.engine.speculation.index import MAX_PREDICTED
from server.errors import InvalidRequestError
from server.generation.planning import require_tokenizer, run_if_long
from server.protocol.prediction import Prediction
from server.service import Service


async def predicted_tokens(service: Service, prediction: Prediction | None) -> tuple[int, ...] | None:
    """The tokens that the answer may well have; None: nothing is predicted.

    Raises:
        InvalidRequestError: the prediction is too long.
    """
    if prediction is None:
        return None
    tokenizer = require_tokenizer(service, param="prediction")
    text = prediction.content
    token_ids = await run_if_long(len(text), lambda: tokenizer.encode_plain(text, continues=True))
    if len(token_ids) > MAX_PREDICTED:
        raise InvalidRequestError(
            f"the prediction has {len(token_ids):,} tokens, the limit is {MAX_PREDICTED:,}",
            param="prediction",
            code="invalid_value",
        )
    return tuple(token_ids)
