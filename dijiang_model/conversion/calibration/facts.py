"""Small facts that a user tells and asks for later: kinds, wordings and names from a seeded generator.

Evaluation has kinds and names of its own (`conversion.evaluation_facts`), so that no measurement asks for what
calibration saw.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Pick = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class FactKind:
    """One kind of fact, with `{subject}` and `{value}` to fill in.

    Attributes:
        statements: how a user says it.
        questions: how a user asks for it; `{subject}` only.
        answers: the beginning of an assistant's answer, up to the value.
        subject, value: what is filled in.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    subject: Pick
    value: Pick


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact in words.

    Attributes:
        statement: what the user says; has `value` in it.
        question: what the user asks later.
        answer: what comes before the value in the assistant's answer.
        value: what has to be remembered.
    """

    statement: str
    question: str
    answer: str
    value: str


def one_of(*choices: str) -> Pick:
    """Picks one of some words."""
    return lambda rng: rng.choice(choices)


def digits(num: int) -> Pick:
    """Picks a number of `num` digits."""
    return lambda rng: "".join(rng.choice("0123456789") for _ in range(num))


def draw_facts(kinds: Sequence[FactKind], num: int, rng: random.Random) -> list[Fact]:
    """Facts about different subjects, each kind as often as the others; no value appears twice."""
    facts: list[Fact] = []
    used: set[str] = set()
    order = rng.sample(range(len(kinds)), len(kinds))
    while len(facts) < num:
        kind = kinds[order[len(facts) % len(kinds)]]
        subject, value = _fresh(kind.subject, used, rng), _fresh(kind.value, used, rng)
        used |= {subject, value}
        words: Mapping[str, str] = {"subject": subject, "value": value}
        statement, question, answer = (
            rng.choice(forms).format(**words) for forms in (kind.statements, kind.questions, kind.answers)
        )
        facts.append(Fact(statement, question, answer, value))
    return facts


def _fresh(pick: Pick, used: set[str], rng: random.Random) -> str:
    value = pick(rng)
    for _ in range(20):
        if value not in used:
            break
        value = pick(rng)
    return value


KINDS = (
    FactKind(
        ("The access code of the {subject} is {value}.", "Please note the code of the {subject}: {value}."),
        ("What is the access code of the {subject}?", "Which code opens the {subject}?"),
        ("The access code of the {subject} is ", "The code of the {subject} is "),
        one_of("garage", "archive", "boat house", "north gate", "wine cellar", "laboratory", "attic", "server room"),
        digits(4),
    ),
    FactKind(
        ("My {subject} is called {value}.", "The name of my {subject} is {value}."),
        ("What is my {subject} called?", "Do you remember the name of my {subject}?"),
        ("Your {subject} is called ", "The name of your {subject} is "),
        one_of("sister", "uncle", "neighbour", "boss", "dog", "grandmother", "teacher", "cousin", "dentist"),
        one_of("Marta", "Oliver", "Priya", "Tomas", "Ingrid", "Samuel", "Yusuf", "Helena", "Bruno", "Kimiko", "Nadia"),
    ),
    FactKind(
        ("The {subject} is on {value}.", "Don't let me forget: the {subject} is on {value}."),
        ("When is the {subject}?", "On which day is the {subject}?"),
        ("The {subject} is on ",),
        one_of("concert", "inspection", "wedding", "exam", "board meeting", "parade", "delivery", "hearing"),
        one_of(
            "Tuesday", "Saturday", "the 14th of March", "the 3rd of October", "the 27th of June", "Thursday evening",
            "the 9th of May", "Monday morning",
        ),
    ),
    FactKind(
        ("I put the {subject} {value}.", "By the way, the {subject} is {value}."),
        ("Where is the {subject}?", "Where did I put the {subject}?"),
        ("The {subject} is ", "You put the {subject} "),
        one_of("passport", "spare key", "violin", "telescope", "blue folder", "ladder", "charger", "umbrella"),
        one_of(
            "under the stairs", "in the kitchen drawer", "behind the piano", "on the top shelf", "in the red suitcase",
            "next to the boiler", "in the glove compartment", "beneath the workbench",
        ),
    ),
    FactKind(
        ("The {subject} costs {value} dollars.", "They want {value} dollars for the {subject}."),
        ("How much does the {subject} cost?", "What is the price of the {subject}?"),
        ("The {subject} costs ", "The price of the {subject} is "),
        one_of("camera", "sofa", "bicycle", "painting", "guitar", "oven", "tractor", "carpet"),
        digits(3),
    ),
    FactKind(
        ("My friend {subject} lives in {value}.", "{subject} has just moved to {value}."),
        ("Where does {subject} live?", "In which city does {subject} live now?"),
        ("{subject} lives in ", "{subject} now lives in "),
        one_of("Anton", "Beatrix", "Carlos", "Dagny", "Emil", "Fatima", "Gustav", "Hanna"),
        one_of("Lisbon", "Toronto", "Nairobi", "Kyoto", "Oslo", "Lima", "Prague", "Dublin", "Mumbai", "Santiago"),
    ),
)  # fmt: skip
