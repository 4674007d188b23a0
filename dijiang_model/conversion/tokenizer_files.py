"""The tokenizer of a converted model: copied verbatim where the source has a `tokenizer.json`, else built.

A tokenizer that was built here is tried on text before it is kept: decoding must give the text back.
"""

import shutil
from pathlib import Path

from dijiang_model.conversion.sentencepiece_rules import follow_sentencepiece
from dijiang_model.errors import ConversionError
from dijiang_model.json_fields import read_json_object
from dijiang_model.outputs import TOKENIZER_FILES

TOKENIZER_FILE = "tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"
_SLOW_FILES = (_SENTENCEPIECE_FILE, "vocab.json")
_SAMPLES = (
    "The capital of France is Paris.",
    "In 1789, 25% of  12,345 people\n\tdidn't agree; naïve café, 北京, Ω≈3.14 🙂",
    "def f(x):\n    return x ** 2  # two spaces\n",
)


def write_tokenizer(source: Path, folder: Path, *, vocab_size: int) -> bool:
    """Brings the tokenizer of an HF folder into a new one.

    Returns:
        False where the source has no tokenizer: such a model serves token ids only.

    Raises:
        ConversionError: its tokens do not fit the model's vocabulary, or it cannot be built.
    """
    if (source / TOKENIZER_FILE).is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=False)
        return True
    if any((source / name).is_file() for name in _SLOW_FILES):
        _build(source, folder)
        check_tokenizer(folder, vocab_size=vocab_size, must_round_trip=True)
        return True
    return False


def check_tokenizer(folder: Path, *, vocab_size: int, must_round_trip: bool) -> None:
    """Encodes and decodes samples with the folder's `tokenizer.json`.

    Raises:
        ConversionError: it does not load, gives ids outside the vocabulary, or changes the text.
    """
    from tokenizers import Tokenizer  # kept out of the engine's imports

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more special
        raise ConversionError(f"{TOKENIZER_FILE} of the source cannot be read: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ConversionError(f"the tokenizer has ids up to {largest}, the model's vocabulary only {vocab_size} tokens")
    if not must_round_trip:
        return
    for text in _SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if decoded.removeprefix(" ") != text:
            raise ConversionError(f"the tokenizer built from the source turns {text!r} into {decoded!r}")


def _build(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer  # seconds to import, and rarely needed

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
