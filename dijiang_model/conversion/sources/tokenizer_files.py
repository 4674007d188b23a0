"""The tokenizer of a converted model: copied verbatim where the source has a `tokenizer.json`, else built.

A tokenizer that was built here is tried on text before it is kept: decoding must give the text back.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dijiang_model.checkpoints.default_sampling import read_default_sampling, write_default_sampling
from dijiang_model.checkpoints.outputs import TOKENIZER_FILES
from dijiang_model.conversion.sources.added_tokens import complete_tokenizer
from dijiang_model.conversion.sources.sentencepiece_rules import follow_sentencepiece
from dijiang_model.errors import ConversionError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.stub_files import stub_problem
from dijiang_model.text.folder import TOKENIZER_FILE, UnsupportedTokenizerError, read_tokenizer_files
from dijiang_model.text.template import Template, TemplateSyntaxFailure
from dijiang_model.text.vocabulary import build_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SENTENCEPIECE_FILE = "tokenizer.model"
_SLOW_FILES = (_SENTENCEPIECE_FILE, "vocab.json")
_SAMPLES = (
    "The capital of France is Paris.",
    "In 1789, 25% of  12,345 people\n\tdidn't agree; naïve café, 北京, Ω≈3.14 🙂",
    "def f(x):\n    return x ** 2  # two spaces\n",
)


@dataclass(frozen=True, slots=True)
class StagedTokenizer:
    """A tokenizer's files, ready before the model is written.

    Attributes:
        folder: holds them, and nothing else.
        is_there: False: the source has none.
    """

    folder: Path
    is_there: bool

    def copy_to(self, folder: Path) -> None:
        for file in self.folder.iterdir():
            shutil.copyfile(file, folder / file.name)

    @property
    def end_id(self) -> int | None:
        """Id of the token that the settings name as the end of a sequence; None: they name none that is known."""
        files = read_tokenizer_files(self.folder)
        text = None if files is None else files.special_tokens.get("eos_token")
        index: int | None = None if text is None else _read(self.folder).token_to_id(text)
        return index

    def described(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Tokens for people, e.g. `<|im_end|> (2)`."""
        if not self.is_there:
            return tuple(f"token {index}" for index in ids)
        tokenizer = _read(self.folder)
        return tuple(f"{tokenizer.id_to_token(index)} ({index})" for index in ids)


@contextmanager
def staged_tokenizer(write: Callable[[Path], bool]) -> Iterator[StagedTokenizer]:
    """Writes a tokenizer into a folder of its own, which is gone when the block ends.

    Args:
        write: as `write_tokenizer`, with its errors.

    Raises:
        ConversionError: a file cannot be read, or the disk of temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="dijiang-tokenizer-") as folder:
        try:
            is_there = write(Path(folder))
        except OSError as error:
            raise ConversionError(
                f"the tokenizer cannot be copied to {folder}: {error.strerror or error}; if its disk is full, make "
                "room, or name another place in the environment variable TMPDIR"
            ) from error
        yield StagedTokenizer(Path(folder), is_there)


def write_tokenizer(source: Path, folder: Path, *, vocab_size: int) -> bool:
    """Brings the tokenizer of an HF folder into a new one, and with it how the model is to be sampled.

    Returns:
        False where the source has no tokenizer: such a model serves token ids only.

    Raises:
        ConversionError: its tokens do not fit the model's vocabulary, or it cannot be built.
        ConfigError: `generation_config.json` names a value that is out of range.
    """
    if (source / TOKENIZER_FILE).is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                _refuse_stub(source / name)
                shutil.copyfile(source / name, folder / name)
        check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=False)
        complete_tokenizer(folder / TOKENIZER_FILE, vocab_size=vocab_size)
        check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=False)
    elif any((source / name).is_file() for name in _SLOW_FILES):
        _build(source, folder)
        check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=True)
    else:
        return False
    write_default_sampling(read_default_sampling(source), folder)
    return True


def _refuse_stub(file: Path) -> None:
    problem = stub_problem(file)
    if problem is not None:
        raise ConversionError(problem)


def check_tokenizer(folder: Path, *, vocab_size: int, must_round_trip: bool) -> None:
    """Encodes and decodes samples with the folder's `tokenizer.json`, and looks at all that a server reads.

    Raises:
        ConversionError: it does not load, gives ids outside the vocabulary, changes the text, or cannot be served.
    """
    tokenizer = _read(folder)
    check_served(folder)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ConversionError(
            f"the tokenizer has ids up to {largest}, the model's vocabulary only {vocab_size} tokens: it is another "
            "model's, or it was extended and the model was not (`model.resize_token_embeddings(len(tokenizer))`)"
        )
    if not must_round_trip:
        return
    for text in _SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if decoded.removeprefix(" ") != text:
            raise ConversionError(f"the tokenizer built from the source turns {text!r} into {decoded!r}")


def check_served(folder: Path) -> None:
    """Returns where a server can use the folder's tokenizer and chat template: it would say the same when it starts.

    Raises:
        ConversionError: it cannot.
    """
    try:
        files = read_tokenizer_files(folder)
        if files is None:
            return
        tokenizer = _read(folder)
        added = {index: (token.content, token.special) for index, token in tokenizer.get_added_tokens_decoder().items()}
        build_vocabulary(tokenizer.get_vocab(True), added, json.loads(tokenizer.to_str())["decoder"])
        if files.chat_template is not None:
            Template(files.chat_template)
    except (UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
        raise ConversionError(f"the source's tokenizer cannot be served: {error}") from error


def _read(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer  # kept out of the engine's imports

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more special
        raise ConversionError(f"{TOKENIZER_FILE} of the source cannot be read: {error}") from error


def _build(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer  # seconds to import, and rarely needed

    for name in _SLOW_FILES:
        if (source / name).is_file():
            _refuse_stub(source / name)
    config = source / "tokenizer_config.json"
    settings = read_json_object(config) if config.is_file() else {}
    # SentencePiece models of the LLaMA family were trained with a first token, whether the source says so or not.
    options = {"add_bos_token": True} if (source / _SENTENCEPIECE_FILE).is_file() else {}
    options = {name: value for name, value in options.items() if name not in settings}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, **options)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever transformers raises for files that it cannot use
        raise ConversionError(f"no tokenizer can be built from the source's files: {error}") from error
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConversionError("the source's tokenizer has no fast form, which serving needs")
    if (source / _SENTENCEPIECE_FILE).is_file():
        follow_sentencepiece(source / _SENTENCEPIECE_FILE, folder / TOKENIZER_FILE)
        shutil.copyfile(source / _SENTENCEPIECE_FILE, folder / _SENTENCEPIECE_FILE)
