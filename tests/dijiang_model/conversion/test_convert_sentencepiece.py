"""SentencePiece vocabularies, as LLaMA-2 has them: from `tokenizer.model` alone, and inside GGUF files."""

import json
import random
import shutil
from pathlib import Path

import gguf
import pytest
import sentencepiece
from tokenizers import Tokenizer

from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.sources.gguf_source import GgufSource
from dijiang_model.conversion.sources.tokenizer_files import write_tokenizer
from dijiang_model.errors import ConversionError
from dijiang_model.families import FAMILIES
from tests.dijiang_model.teachers import llama_teacher, save_teacher, write_gguf

TEXT = [
    "The capital of France is Paris.",
    "In 1789 many people did not agree with the king.",
    "def function(x): return x ** 2",
    "the cat sat on the mat, and the dog ran after it",
]
SAMPLES = ["The cat is not in Paris.", "12,345  spaces\n\tand naïve 北京 🙂", "the"]
VOCAB_SIZE = 350
REAL_VOCABULARY = Path(__file__).parents[2] / "fixtures" / "sentencepiece" / "tokenizer.model"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-fallback BPE vocabulary, trained here."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def source(tmp_path: Path, sentencepiece_model: Path) -> Path:
    folder = save_teacher(llama_teacher(vocab_size=VOCAB_SIZE), tmp_path / "teacher")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_sentencepiece_model_becomes_a_tokenizer_json(
    source: Path, tmp_path: Path, sentencepiece_model: Path
) -> None:
    assert convert(source, tmp_path / "out").has_tokenizer
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the").ids[0] == reference.bos_id()


@pytest.mark.parametrize("settings", [None, {"add_bos_token": False, "bos_token": "<s>"}])
def test_the_first_token_is_added_unless_the_source_says_no(
    source: Path, tmp_path: Path, settings: dict[str, object] | None
) -> None:
    path = source / "tokenizer_config.json"
    path.unlink() if settings is None else path.write_text(json.dumps(settings))
    convert(source, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (tokenizer.encode("the").ids[0] == 1) == (settings is None)


def test_a_real_vocabulary_reads_random_text_as_sentencepiece_does(tmp_path: Path) -> None:
    """Runs of spaces above all, whose pieces have the lowest score of all while their ids are the first."""
    folder = save_teacher(llama_teacher(vocab_size=32_000, hidden_size=16), tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    shutil.copyfile(REAL_VOCABULARY, folder / "tokenizer.model")
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == REAL_VOCABULARY.read_bytes()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(REAL_VOCABULARY))
    parts = ["  ", " ", " ", "a", "b", "the", "in", "\n", "\t", "é", "北", "🙂", "ing", "1", ".", "S"]
    random_ = random.Random(0)
    for _ in range(2_000):
        text = "".join(random_.choices(parts, k=random_.randint(1, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_damaged_sentencepiece_model_is_a_clear_error(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"\x0a\xff not a model")
    with pytest.raises(ConversionError, match="no tokenizer can be built"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_larger_than_the_models_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="only 300 tokens"):
        write_tokenizer(source, tmp_path / "out", vocab_size=300)


def test_a_gguf_with_a_sentencepiece_vocabulary_keeps_it(tmp_path: Path, sentencepiece_model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))

    def add_vocabulary(writer: gguf.GGUFWriter) -> None:
        ids = range(VOCAB_SIZE)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([reference.id_to_piece(index) for index in ids])
        writer.add_token_scores([reference.get_score(index) for index in ids])
        writer.add_token_types([_token_type(reference, index) for index in ids])
        writer.add_bos_token_id(reference.bos_id())
        writer.add_eos_token_id(reference.eos_id())
        writer.add_unk_token_id(reference.unk_id())

    teacher = llama_teacher(vocab_size=VOCAB_SIZE, eos_token_id=2, bos_token_id=1)
    path = write_gguf(teacher, tmp_path / "t.gguf", pre_tokenizer=None, add_vocabulary=add_vocabulary)
    assert GgufSource(path, FAMILIES.values()).eos_token_ids() == (2,)
    assert convert(path, tmp_path / "out").has_tokenizer
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def _token_type(reference: sentencepiece.SentencePieceProcessor, index: int) -> int:
    if reference.is_unknown(index):
        return 2
    if reference.is_control(index):
        return 3
    return 6 if reference.is_byte(index) else 1
