"""Facts told in chats and asked for at the end: how many are answered rightly, by how far back they were told."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.conversion.calibration.contexts import Context, cut_passages, fact_chat
from dijiang_model.conversion.evaluation.evaluate import Variant, token_scores
from dijiang_model.conversion.evaluation.facts import KINDS
from dijiang_model.conversion.training.chat_prompt import RenderChat

DISTANCES = (0, 64, 250, 500, 1000, 2000, 4000, 8000)
FAR_FROM = 500
SEED = 1


@dataclass(frozen=True, slots=True)
class _Form:
    """Chats of one length: tokens at most, facts told in a turn, and of each kind."""

    length: int
    per_turn: int
    per_kind: int


SHORT, LONG = _Form(2048, 2, 3), _Form(8192, 1, 4)


@dataclass(frozen=True, slots=True)
class Recall:
    """Answers to facts told at some distance.

    Attributes:
        low, high: tokens between the fact and its answer, [low, high).
        num: facts.
        right: share of answers whose every token is the most likely one, by variant.
        loss: mean negative log-likelihood of the answers' tokens, by variant.
    """

    low: int
    high: int
    num: int
    right: Mapping[str, float]
    loss: Mapping[str, float]

    @property
    def distance(self) -> str:
        return f"{self.low:,}-{self.high:,}"


def fact_chats(tokenizer: HfTokenizer, filler: Tensor, *, render: RenderChat, num: int, longest: int) -> list[Context]:
    """`num` chats of 2,048 tokens, and half as many of 8,192 where `longest` is not less.

    Args:
        filler: [T] int64, running text that the user pastes between the facts; each chat begins elsewhere in it.
        longest: the teacher's range in tokens; shorter ones have shorter chats.
    """
    rng = random.Random(SEED)  # noqa: S311  reproducible, nothing secret
    forms = [SHORT] * num + [LONG] * ((num + 1) // 2 if longest >= LONG.length else 0)
    chats = []
    for number, form in enumerate(forms):
        text = tokenizer.decode(filler.roll(-number * len(filler) // len(forms)).tolist())
        chat = fact_chat(
            tokenizer,
            cut_passages(text, rng),
            render=render,
            kinds=KINDS,
            length=min(form.length, longest),
            rng=rng,
            facts_per_kind=form.per_kind,
            facts_per_turn=form.per_turn,
        )
        chats += [] if chat is None else [chat]
    return chats


@torch.inference_mode()
def recall_probe(
    compared: Sequence[Variant], chats: Sequence[Context], *, on_chat: Callable[[], None] = lambda: None
) -> list[Recall]:
    """Reads the chats and looks at the answers in them; by distance, without distances that have no facts.

    Args:
        on_chat: called after each variant has read a chat.
    """
    distances = torch.tensor([fact.answered[0] - fact.told[1] for chat in chats for fact in chat.recalled])
    right: dict[str, Tensor] = {}
    loss: dict[str, Tensor] = {}
    for variant in compared:
        answers = []
        for chat in chats:
            losses, is_greedy = token_scores(variant, chat.token_ids.to(variant.model.device))
            for fact in chat.recalled:
                rows = slice(fact.answered[0] - 1, fact.answered[1] - 1)
                answers.append((float(is_greedy[rows].all()), float(losses[rows].mean())))
            on_chat()
        right[variant.name], loss[variant.name] = torch.tensor(answers).reshape(-1, 2).unbind(1)
    results = []
    for low, high in pairwise(DISTANCES):
        is_there = (distances >= low) & (distances < high)
        num = int(is_there.sum())
        if num > 0:
            shares = {name: float(values[is_there].mean()) for name, values in right.items()}
            results.append(Recall(low, high, num, shares, {name: float(loss[name][is_there].mean()) for name in loss}))
    return results


def far_recall(results: Sequence[Recall], name: str, teacher: str) -> float | None:
    """Facts from 500 tokens on that a variant answers rightly, over those that the teacher does; None: it does none."""
    far = [result for result in results if result.low >= FAR_FROM]
    own, wanted = (sum(result.num * result.right[each] for result in far) for each in (name, teacher))
    return own / wanted if wanted > 0 else None
