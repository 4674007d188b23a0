"""The recall probe: a number planted in running text, asked for some tokens later."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor
from torch.nn import functional

from dijiang_model.conversion.evaluation.evaluate import Variant
from dijiang_model.segments import run_segments

PROBE_DISTANCES = (50, 200, 500, 1000, 2000)
NAMES = ("Alma", "Boris", "Clara", "Dmitri", "Edith", "Felix", "Greta", "Hugo")
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Recall:
    """Answers to planted facts.

    Attributes:
        distance: tokens between fact and question.
        right: share of answers whose every token is the likeliest one, by variant.
        loss: mean negative log-likelihood per token of the answer, by variant.
    """

    distance: int
    right: Mapping[str, float]
    loss: Mapping[str, float]


@torch.inference_mode()
def recall_probe(
    compared: Sequence[Variant],
    filler: Tensor,
    tokenizer: HfTokenizer,
    *,
    num_facts: int,
    distances: Sequence[int] = PROBE_DISTANCES,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Recall]:
    """Plants a number in running text and asks for it some tokens later.

    Args:
        filler: [T] int64, running text that is longer than the distances.
        num_facts: questions for each distance.
        on_answer: called after each variant's answer to a question.
    """
    results = []
    for distance in distances_within(len(filler), distances):
        right = {variant.name: 0.0 for variant in compared}
        loss = {variant.name: 0.0 for variant in compared}
        for index in range(num_facts):
            text, num_answer = _planted(filler, tokenizer, distance=distance, index=index)
            for variant in compared:
                is_right, answer_loss = _answer(variant, text, num_answer)
                right[variant.name] += is_right / num_facts
                loss[variant.name] += answer_loss / num_facts
                on_answer()
        results.append(Recall(distance, right, loss))
    return results


def distances_within(num_tokens: int, distances: Sequence[int] = PROBE_DISTANCES) -> list[int]:
    """Those that running text of so many tokens can fill."""
    return [distance for distance in distances if distance + 64 < num_tokens]


def _answer(variant: Variant, text: Tensor, num_answer: int) -> tuple[bool, float]:
    """Whether every token of the answer at the end is the likeliest, and their mean loss."""
    ids = text.to(variant.model.device)
    logits = variant.model.logits(run_segments(variant.model, ids[None], variant.op)[-num_answer - 1 : -1])
    wanted = ids[-num_answer:]
    return bool((logits.argmax(-1) == wanted).all()), float(functional.cross_entropy(logits, wanted))


def _planted(filler: Tensor, tokenizer: HfTokenizer, *, distance: int, index: int) -> tuple[Tensor, int]:
    """The token ids of text, fact, text, question and answer; and the answer's length in tokens."""
    generator = torch.Generator().manual_seed(1000 * distance + index)
    number = "".join(str(int(digit)) for digit in torch.randint(0, 10, (DIGITS,), generator=generator))
    name = NAMES[index % len(NAMES)]
    statement = f"\n\nRemember: the secret number of {name} is"
    fact = tokenizer.encode(f"{statement} {number}.\n\n", add_special_tokens=False).ids
    question = tokenizer.encode(f"\n\nThe secret number of {name} is", add_special_tokens=False).ids
    answer = tokenizer.encode(f" {number}", add_special_tokens=False).ids
    offset = (index * 997) % max(len(filler) - distance - 32, 1)
    before, between = filler[offset : offset + 32], filler[offset + 32 : offset + 32 + distance]
    return torch.cat([before, torch.tensor(fact), between, torch.tensor(question + answer)]), len(answer)
