"""Text that the teacher writes itself: chat, where it has a template; the only text in which it is asked to answer."""

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.batch import decode, prefill
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.formats.atomic_file import write_atomically
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer

ROWS = 24
ANSWER_TOKENS = 220
TEMPERATURE = 0.8
FORMS = (
    "What is {}?",
    "Explain {} to a ten-year-old.",
    "Write a short paragraph about {}.",
    "Give me three interesting facts about {}.",
    "Why is {} important?",
    "Write a short poem about {}.",
    "Tell me a story in which {} plays a part.",
    "What are the advantages and disadvantages of {}?",
    "How does {} work?",
    "I have to give a talk about {}. What should I say?",
    "Compare {} with {}.",
    "Write an e-mail to a friend about {}.",
)
TOPICS = (
    "the capital of France", "photosynthesis", "the Roman Empire", "black holes", "democracy", "bread",
    "the Python programming language", "chess", "the water cycle", "electric cars", "jazz", "vaccination",
    "gravity", "the Great Wall of China", "machine learning", "coffee", "the French Revolution", "whales",
    "volcanoes", "money", "the Olympic Games", "sleep", "recycling", "Shakespeare", "the Moon", "glass",
    "the internet", "bees", "bridges", "the number pi", "friendship", "the capital of Japan", "tea", "football",
    "DNA", "solar power", "the Amazon river", "libraries", "dinosaurs", "the human heart", "clouds", "maps",
    "antibiotics", "the piano", "deserts", "steam engines", "honesty", "computers", "winter", "the Eiffel Tower",
)  # fmt: skip


def write_answers(
    model: DiJiangForCausalLM,
    tokenizer: HfTokenizer,
    path: Path,
    *,
    num_tokens: int,
    seed: int,
    chat_prompt: Callable[[str], str] | None,
    openings: Callable[[int], Tensor],
) -> None:
    """Lets the teacher write, and keeps its prompts and what it samples as one text.

    A model with a chat template answers many questions, another one goes on from the openings of texts. The teacher
    is the model with a window that reaches over all of it.

    Args:
        num_tokens: of answers, about.
        chat_prompt: see `load_chat_prompt`.
        openings: the first tokens of a text by number, [T] int64; asked only without a chat template.

    Raises:
        ConversionError: the model has no end of sequence to stop at.
        CheckpointError: `path` cannot be written.
    """
    ends = set(model.config.eos_token_ids)
    if not ends:
        raise ConversionError("self-distillation needs a model that names an end of sequence in its config")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    prompts = _chat_prompts(tokenizer, chat_prompt, seed) if chat_prompt is not None else _openings(openings)
    written, texts = 0, []
    while written < num_tokens:
        rows = [next(prompts) for _ in range(ROWS)]
        answers = _answers(model, rows, ends=ends, generator=generator)
        written += sum(map(len, answers))
        texts += [
            tokenizer.decode(prompt + answer, skip_special_tokens=False)
            for prompt, answer in zip(rows, answers, strict=True)
        ]
    write_atomically(path, "".join(f"{text}\n" for text in texts).encode())


def _chat_prompts(tokenizer: HfTokenizer, chat_prompt: Callable[[str], str], seed: int) -> Iterator[list[int]]:
    for question in _questions(seed):
        # The template writes special tokens itself; nothing is added to it.
        ids: list[int] = tokenizer.encode(chat_prompt(question), add_special_tokens=False).ids
        yield ids


def _openings(openings: Callable[[int], Tensor]) -> Iterator[list[int]]:
    for number in count():
        yield openings(number).tolist()


def _questions(seed: int) -> Iterator[str]:
    cpu = torch.Generator().manual_seed(seed)

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=cpu))]

    while True:
        question = pick(FORMS)
        while "{}" in question:
            question = question.replace("{}", pick(TOPICS), 1)
        yield question


def _answers(
    model: DiJiangForCausalLM, prompts: list[list[int]], *, ends: Set[int], generator: torch.Generator
) -> list[list[int]]:
    """Sampled continuations, each through one of `ends` or up to `ANSWER_TOKENS`."""
    longest = max(map(len, prompts))
    teacher = freeze(_with_window(model, longest + ANSWER_TOKENS))
    state = StateBuffer(teacher.state_spec, len(prompts) + 1, teacher.device)
    state.storage.zero_()
    slots = torch.arange(1, len(prompts) + 1, device=teacher.device)
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=teacher.device)
    positions = torch.tensor(lengths, device=teacher.device)
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        logits = prefill(teacher, tokens, lengths=lengths, slots=slots, starts=torch.zeros_like(positions), state=state)
        logits = logits[positions.cumsum(0) - 1]
        live = list(range(len(prompts)))
        for _ in range(ANSWER_TOKENS):
            chosen = _sample(logits, generator)
            for row, token in zip(live, chosen.tolist(), strict=True):
                answers[row].append(token)
            kept = [row for row, token in enumerate(chosen.tolist()) if token not in ends]
            if not kept:
                break
            live = [live[row] for row in kept]
            index = torch.tensor(live, device=teacher.device)
            logits = decode(teacher, chosen[kept], slots=slots[index], positions=positions[index], state=state)
            positions[index] += 1
    return answers


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator).squeeze(1)


def _with_window(model: DiJiangForCausalLM, window: int) -> DiJiangForCausalLM:
    """The same weights with a window over everything that the teacher sees: its softmax attention."""
    config = model.config
    seen = (min(window, config.seen_by_teacher(layer) or window) for layer in range(config.num_layers))
    layers = tuple(replace(layer, window=own, sinks=0) for layer, own in zip(config.layers, seen, strict=True))
    teacher = build_model(replace(model.config, layers=layers), dtype=model.dtype)
    missing = {name: torch.zeros(tensor.shape, device=model.device) for name, tensor in teacher.state_dict().items()
               if ".linear.mix_" in name}  # fmt: skip
    silent = {name: tensor - torch.inf if name.endswith("mix_bias") else tensor for name, tensor in missing.items()}
    teacher.load_state_dict({**model.state_dict(), **silent}, strict=True, assign=True)
    return teacher.prepare()
