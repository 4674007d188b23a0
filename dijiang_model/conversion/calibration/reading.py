"""What a model is calibrated on: a text that ships with this package, or the user's own."""

from collections.abc import Sequence
from pathlib import Path

from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.contexts import Context, random_contexts, text_and_chats
from dijiang_model.conversion.calibration.facts import KINDS
from dijiang_model.conversion.training.chat_prompt import load_chat_template, plain_chat
from dijiang_model.conversion.training.documents import read_text, text_files
from dijiang_model.conversion.training.text_windows import load_tokenizer

TEXT = Path(__file__).with_name("text.txt")
"""Read where the user names none; `text.md` says where it comes from."""
NUM_CONTEXTS = 16
CONTEXT_TOKENS = 2048
MAX_CHARACTERS = 1_000_000
SEED = 0


def calibration_contexts(config: ModelConfig, tokenizer_folder: Path | None, text: Sequence[Path]) -> list[Context]:
    """Contexts of `CONTEXT_TOKENS`, or of the teacher's range where that is less; half of them chats with facts.

    Args:
        tokenizer_folder: holds `tokenizer.json` and the chat template; None: the model has no tokenizer, and reads
            random tokens.
        text: UTF-8 files or folders; none: `TEXT`.

    Raises:
        ConversionError: the text cannot be read or is too short, or the chat template fails.
    """
    length = min(CONTEXT_TOKENS, config.max_position_embeddings)
    if tokenizer_folder is None:
        return random_contexts(vocab_size=config.vocab_size, num=NUM_CONTEXTS, length=length, seed=SEED)
    render = load_chat_template(tokenizer_folder) or plain_chat
    texts = "\n\n".join(read_text(file, render=render) for file in text_files(text or [TEXT]))
    return text_and_chats(
        load_tokenizer(tokenizer_folder),
        texts[:MAX_CHARACTERS],
        render=render,
        kinds=KINDS,
        num=NUM_CONTEXTS,
        length=length,
        seed=SEED,
    )
