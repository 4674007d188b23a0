"""Facts told in chats and asked for at the end: how many are answered rightly, by how far back they were told."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

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
class ChatForm:
    """Chats of one length.

    Attributes:
        length: tokens at most.
        per_turn, per_kind: facts told in a turn, and of each kind.
        share: chats of this form for each that was asked for.
        turns: in whose first ones alone facts are told; None: in all.
    """

    length: int
    per_turn: int
    per_kind: int
    share: float
    turns: int | None = None


SPREAD = (ChatForm(2048, 2, 2, 1.0), ChatForm(4096, 1, 3, 0.25), ChatForm(8192, 1, 4, 0.125))
"""Facts told all along."""
FIRST_TURN = (ChatForm(1100, 3, 1, 1.0, turns=1),)
"""Facts told in the first turn, then some turns about something else."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Answers to facts told at some distance.

    Attributes:
        low, high: tokens between the fact and its answer, [low, high).
        num: facts.
        right: share of answers whose every token is the most likely one, by variant.
        shared: share of the answers that the first variant has right which this one has right too; None: it has none.
        loss: mean negative log-likelihood of the answers' tokens, by variant.
    """

    low: int
    high: int
    num: int
    right: Mapping[str, float]
    shared: Mapping[str, float | None]
    loss: Mapping[str, float]

    @property
    def distance(self) -> str:
        return f"{self.low:,}-{self.high:,}"


def fact_chats(
    tokenizer: HfTokenizer,
    filler: Tensor,
    *,
    render: RenderChat,
    num: int,
    longest: int,
    forms: Sequence[ChatForm] = SPREAD,
) -> list[Context]:
    """`num` chats of the first form, and fewer of the longer ones where `longest` is not less.

    Args:
        filler: [T] int64, running text that the user pastes between the facts; each chat begins elsewhere in it.
        longest: the teacher's range in tokens; shorter ones have shorter chats.
    """
    rng = random.Random(SEED)  # noqa: S311  reproducible, nothing secret
    usable = [form for form in forms if form is forms[0] or longest >= form.length]
    each = [form for form in usable for _ in range(ceil(num * form.share))]
    chats = []
    for number, form in enumerate(each):
        text = tokenizer.decode(filler.roll(-number * len(filler) // len(each)).tolist())
        chat = fact_chat(
            tokenizer,
            cut_passages(text, rng),
            render=render,
            kinds=KINDS,
            length=min(form.length, longest),
            rng=rng,
            facts_per_kind=form.per_kind,
            facts_per_turn=form.per_turn,
            told_in=form.turns,
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
            reference = next(iter(right.values()))[is_there] > 0
            shared = {
                name: float(values[is_there][reference].mean()) if reference.any() else None
                for name, values in right.items()
            }
            means = {name: float(values[is_there].mean()) for name, values in loss.items()}
            results.append(Recall(low, high, num, shares, shared, means))
    return results


def far_recall(results: Sequence[Recall], name: str, teacher: str) -> float | None:
    """Facts from 500 tokens on that a variant answers rightly, over those that the teacher does; None: it does none."""
    far = [result for result in results if result.low >= FAR_FROM]
    own, wanted = (sum(result.num * result.right[each] for result in far) for each in (name, teacher))
    return own / wanted if wanted > 0 else None
