"""A `tokenizer.json` from the vocabulary, merges and token types in a GGUF file's metadata.

Byte-level BPE is rebuilt here with the pre-tokenizer that the file names: how text is split before the
merges apply (digits one by one, say) is part of the vocabulary, and an unknown name is refused rather
than replaced by a similar one. SentencePiece vocabularies are left to transformers' reader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dijiang_model.conversion.sources.tokenizer_files import check_tokenizer
from dijiang_model.errors import ConversionError
from dijiang_model.text.folder import TOKENIZER_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
"""Values of `tokenizer.ggml.token_type`."""

_SPLIT_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_QWEN_2 = _SPLIT_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
    "llama-bpe": _SPLIT_LLAMA_3,
    "llama3": _SPLIT_LLAMA_3,
    "llama-v3": _SPLIT_LLAMA_3,
    "dbrx": _SPLIT_LLAMA_3,
    "qwen2": _SPLIT_QWEN_2,
}
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
_PLAIN = frozenset({"gpt-2"})
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3"})
"""A word that is in the vocabulary is taken without merging."""
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_gguf_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path, *, vocab_size: int) -> bool:
    """Writes tokenizer.json, tokenizer_config.json and the chat template of a GGUF file.

    Args:
        path: the GGUF file.
        metadata: its values by key.
        folder: gets the files.
        vocab_size: ids must be below it.

    Returns:
        False where the file has no tokenizer.

    Raises:
        ConversionError: an unknown kind of tokenizer, or one that does not give text back.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none"):
        return False
    if kind not in ("gpt2", "llama"):
        raise ConversionError(f"the GGUF file's tokenizer is of kind {kind!r}; gpt2 and llama are supported")
    tokenizer = byte_level_tokenizer(metadata) if kind == "gpt2" else _sentencepiece_tokenizer(path)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(metadata), indent=2) + "\n", "utf-8")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=True)
    return True


def byte_level_tokenizer(metadata: Mapping[str, Any]) -> "Tokenizer":
    """Byte-level BPE over the metadata's vocabulary.

    Raises:
        ConversionError: no merges, or an unknown pre-tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models  # kept out of the engine's imports

    name = metadata.get("tokenizer.ggml.pre")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise ConversionError("the GGUF file's tokenizer has no tokens or no merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=name in _WHOLE_WORDS_FIRST)
    except Exception as error:  # tokenizers raises nothing more special
        raise ConversionError(f"the GGUF file's merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, metadata, tokens)
    _add_bos(tokenizer, metadata, tokens, default=name in _WHOLE_WORDS_FIRST)
    return tokenizer


def _pre_tokenizer(name: object) -> "pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    if name in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[str(name)]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted(_PLAIN | _SINGLE_DIGITS | _SPLITS.keys()))
    raise ConversionError(f"the GGUF file's tokenizer splits text by {name!r}; known are {known}")


def _add_tokens(tokenizer: "Tokenizer", metadata: Mapping[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    pairs = list(zip(tokens, types, strict=False))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in pairs if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == USER_DEFINED_TOKEN])


def _add_bos(tokenizer: "Tokenizer", metadata: Mapping[str, Any], tokens: list[str], *, default: bool) -> None:
    from tokenizers import processors

    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if bos_id is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


def _sentencepiece_tokenizer(path: Path) -> "Tokenizer":
    from transformers import AutoTokenizer  # seconds to import, and rarely needed

    try:
        wrapper = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # whatever transformers raises for files that it cannot use
        raise ConversionError(f"no tokenizer can be built from the GGUF file: {error}") from error
    tokenizer: Tokenizer = wrapper.backend_tokenizer
    return tokenizer


def _settings(metadata: Mapping[str, Any]) -> dict[str, object]:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    }
