"""Chat that the teacher writes itself: the only text in which it is asked to answer, and the right one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.atomic_file import write_atomically
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.state import StateBuffer

ROWS = 24
ANSWER_TOKENS = 220
TEMPERATURE = 0.8
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the default model's own template adds; its answers depend on it."""
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


def write_answers(model: DiJiangForCausalLM, tokenizer: HfTokenizer, path: Path, *, num_tokens: int, seed: int) -> None:
    """Samples answers to many questions and writes the conversations, in ChatML, as one text.

    The teacher is the model with a window that reaches over the whole conversation.

    Args:
        num_tokens: of answers, about.

    Raises:
        ConversionError: the tokenizer has no ChatML tokens.
        CheckpointError: `path` cannot be written.
    """
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    if start is None or end is None:
        raise ConversionError("self-distillation asks in ChatML, and the tokenizer has no <|im_start|> and <|im_end|>")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    written, conversations = 0, []
    questions = _questions(generator)
    while written < num_tokens:
        prompts = [_prompt(next(questions)) for _ in range(ROWS)]
        answers = _answers(model, [tokenizer.encode(prompt).ids for prompt in prompts], end=end, generator=generator)
        written += sum(map(len, answers))
        texts = (tokenizer.decode(answer) for answer in answers)
        conversations += [f"{prompt}{text}<|im_end|>\n" for prompt, text in zip(prompts, texts, strict=True)]
    write_atomically(path, "".join(conversations).encode())


def _prompt(question: str) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _questions(generator: torch.Generator) -> Iterator[str]:
    cpu = torch.Generator().manual_seed(generator.initial_seed())

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=cpu))]

    while True:
        question = pick(FORMS)
        while "{}" in question:
            question = question.replace("{}", pick(TOPICS), 1)
        yield question


def _answers(
    model: DiJiangForCausalLM, prompts: list[list[int]], *, end: int, generator: torch.Generator
) -> list[list[int]]:
    """Sampled continuations, each up to `end` or `ANSWER_TOKENS`."""
    longest = max(map(len, prompts))
    teacher = _with_window(model, longest + ANSWER_TOKENS)
    state = StateBuffer(teacher.state_spec, len(prompts) + 1, teacher.device)
    state.storage.zero_()
    slots = torch.arange(1, len(prompts) + 1, device=teacher.device)
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=teacher.device)
    positions = torch.tensor(lengths, device=teacher.device)
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        logits = teacher.prefill(tokens, lengths=lengths, slots=slots, starts=torch.zeros_like(positions), state=state)
        logits = logits[positions.cumsum(0) - 1]
        live = list(range(len(prompts)))
        for _ in range(ANSWER_TOKENS):
            chosen = _sample(logits, generator)
            kept = [row for row, token in enumerate(chosen.tolist()) if token != end]
            for row in kept:
                answers[live[row]].append(int(chosen[row]))
            if not kept:
                break
            live = [live[row] for row in kept]
            index = torch.tensor(live, device=teacher.device)
            logits = teacher.decode(chosen[kept], slots=slots[index], positions=positions[index], state=state)
            positions[index] += 1
    return answers


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator).squeeze(1)


def _with_window(model: DiJiangForCausalLM, window: int) -> DiJiangForCausalLM:
    """The same weights with a window over everything: full softmax attention."""
    layers = tuple(replace(layer, window=window, sinks=0) for layer in model.config.layers)
    teacher = build_model(replace(model.config, layers=layers), dtype=model.dtype)
    missing = {name: torch.zeros(tensor.shape, device=model.device) for name, tensor in teacher.state_dict().items()
               if ".linear.mix_" in name}  # fmt: skip
    silent = {name: tensor - torch.inf if name.endswith("mix_bias") else tensor for name, tensor in missing.items()}
    teacher.load_state_dict({**model.state_dict(), **silent}, strict=True, assign=True)
    return teacher.prepare()
