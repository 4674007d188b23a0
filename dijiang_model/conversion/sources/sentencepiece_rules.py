"""What SentencePiece does and converters of its models miss: the order of merges, and the space before every text.

It joins the pair whose piece has the best score, of equal ones the leftmost. A converter that ranks pieces by their
ids instead goes wrong where scores do not follow ids: pieces of several spaces often have the lowest score of all.
And it puts a space before a text also where one is there already.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dijiang_model.errors import ConversionError

_NORMAL_PIECE, _USER_DEFINED_PIECE = 1, 4
"""Values of `ModelProto.SentencePiece.type`; others take part in no merge."""
_SPACE = "▁"
_PROBES = (
    "two  spaces,   three, and      six",
    "    if x:\n        return  y\n\n\n",
    "tabs\t\tand\r\nlines",
    "Ünïcödé, 北京 🙂 नमस्ते  1,234.50",
)


def follow_sentencepiece(model_file: Path, tokenizer_file: Path) -> None:
    """Gives a `tokenizer.json` that was built from a SentencePiece BPE model that model's own rules, in place.

    Vocabularies other than BPE are left as they are. The ids of some texts are compared with SentencePiece's.

    Raises:
        ConversionError: the model cannot be read, or the two still differ.
    """
    from sentencepiece import SentencePieceProcessor  # rarely needed
    from tokenizers import Tokenizer

    try:
        reference = SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{model_file.name} of the source is no SentencePiece model: {error}") from error
    document = json.loads(tokenizer_file.read_text("utf-8"))
    if document["model"]["type"] == "BPE":
        _apply(_proto(reference.serialized_model_proto()), document)
        tokenizer_file.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise ConversionError(f"the tokenizer built from {model_file.name} reads {text!r} differently than it does")


def merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first.

    Of equal scores the longer left piece comes first: runs of spaces then grow from the left, as they do there.
    """
    ranked = sorted(
        (-score, -cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    return [(piece[:-negative], piece[-negative:]) for _, negative, piece in ranked]


def _apply(proto: Any, document: dict[str, Any]) -> None:
    kinds = (_NORMAL_PIECE, _USER_DEFINED_PIECE)
    document["model"]["merges"] = merges({piece.piece: piece.score for piece in proto.pieces if piece.type in kinds})
    rules = proto.normalizer_spec
    if rules.name == "identity" and rules.add_dummy_prefix and not rules.remove_extra_whitespaces:
        document["normalizer"] = _sequence("normalizers", {"type": "Prepend", "prepend": _SPACE}, _replace(" ", _SPACE))
        document["pre_tokenizer"] = None
        first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        bytes_to_text = ({"type": "ByteFallback"}, {"type": "Fuse"})
        document["decoder"] = _sequence("decoders", _replace(_SPACE, " "), *bytes_to_text, first_space)


def _sequence(kind: str, *steps: Mapping[str, object]) -> Mapping[str, object]:
    return {"type": "Sequence", kind: steps}


def _replace(old: str, new: str) -> Mapping[str, object]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _proto(data: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    return proto
