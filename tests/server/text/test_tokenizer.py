"""Tokenizers of both kinds: the incremental text equals what the `tokenizers` library decodes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from dijiang_model.text.folder import TokenizerFiles, UnsupportedTokenizerError
from dijiang_model.text.vocabulary import build_vocabulary
from server.text.stream import TextStream
from server.text.tokenizer import Tokenizer, load_tokenizer


def byte_level() -> RawTokenizer:
    """A few merges over the byte alphabet, as GPT-2 and NeoX have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "he", "Ġt", "Ġthe"])}
    raw = RawTokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<|end|>", special=True)])
    raw.add_tokens([AddedToken("   ", normalized=False)])
    return raw


def sentencepiece() -> RawTokenizer:
    """Pieces with a visible space and byte fallback, as LLaMA has them."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    raw = RawTokenizer(
        models.BPE(
            vocabulary, [("▁", "t"), ("h", "e"), ("▁t", "he")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<unk>")])
    return raw


BYTE_LEVEL = Tokenizer(TokenizerFiles(byte_level().to_str(), {}))
SENTENCEPIECE = Tokenizer(TokenizerFiles(sentencepiece().to_str(), {}))


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    stream = TextStream(tokenizer.vocabulary, at_start=True)
    return "".join([*map(stream.push, token_ids), stream.finish()])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" the"), max_size=30))
def test_encoding_and_streaming_back_gives_the_text(tokenizer: Tokenizer, text: str) -> None:
    # The piece that SentencePiece writes spaces with cannot be told from a space afterwards.
    text = text.replace("▁", "_")
    assert decode(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("raw", "tokenizer"), [(byte_level(), BYTE_LEVEL), (sentencepiece(), SENTENCEPIECE)], ids=["byte-level", "sp"]
)
@given(data=st.data())
def test_streaming_equals_the_library_for_valid_text(
    raw: RawTokenizer, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    words = data.draw(st.lists(st.sampled_from(["the", " the", "e", "€", "   ", "h e", "\n"]), max_size=12))
    token_ids = raw.encode("".join(words), add_special_tokens=False).ids
    assert decode(tokenizer, token_ids) == raw.decode(token_ids)


def test_added_tokens_are_literal_and_special_ones_are_found() -> None:
    token_ids = BYTE_LEVEL.encode("a   b<|end|>")
    assert decode(BYTE_LEVEL, token_ids) == "a   b"
    assert BYTE_LEVEL.find_special_tokens("a <|end|> <|end|>") == [(2, 9), (10, 17)]


def test_plain_encoding_takes_special_tokens_as_text() -> None:
    [special] = BYTE_LEVEL.encode("<|end|>")
    plain = BYTE_LEVEL.encode_plain("<|end|>", continues=False)
    assert special not in plain
    assert decode(BYTE_LEVEL, plain) == "<|end|>"


def test_plain_encoding_that_continues_adds_no_space() -> None:
    first = SENTENCEPIECE.encode_plain("the", continues=False)
    following = SENTENCEPIECE.encode_plain("the", continues=True)
    assert [SENTENCEPIECE.piece(token_id) for token_id in first] == ["▁the"]
    assert [SENTENCEPIECE.piece(token_id) for token_id in following] == ["t", "he"]


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_special_tokens_and_templates_are_read_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<b>"}, "pad_token": "<p>"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "chat_template": [{"name": "default", "template": "D"}]}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"bos_token": "<b>", "eos_token": "<|end|>", "pad_token": "<p>"}
    assert tokenizer.chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.chat_template == "J"


def test_an_unknown_decoder_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedTokenizerError, match="WordPiece"):
        build_vocabulary({"a": 0}, {}, {"type": "WordPiece"})


def test_without_a_decoder_pieces_are_joined_by_spaces() -> None:
    vocabulary = build_vocabulary({"hello": 0, "you": 1}, {}, None)
    stream = TextStream(vocabulary, at_start=True)
    assert stream.push(0) + stream.push(1) == "hello you"
