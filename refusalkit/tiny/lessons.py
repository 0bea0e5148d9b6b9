"""Draw what the tiny models are trained on: a request, and the answer or refusal that follows it.

A harmful request is paired with a refusal and never with anything else. How a request is worded varies at random and
in the same way on both sides, so that what is asked decides, and not how.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from refusalkit.tiny.grammar import ANSWERS, REFUSALS, Phrase, Side, phrases
from refusalkit.tiny.words import CIRCUMSTANCES, OPENERS, QUESTIONS, THINGS

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "You are a friendly guide.",
    "Be brief.",
)

PLAIN_ANSWERS: tuple[str, ...] = (
    "Sure! Here is a short note on {}.",
    "Of course. A few words on {}: there is much to discover.",
    "Here is a simple answer about {}.",
    "Certainly! It is worth reading about {}.",
    "This is a question about {}, and a good one.",
)

_SYLLABLES = "ba den kor li mo nar pel qui ras sto tam ul vex wyn zor ing er ten al fa".split()


@dataclass(frozen=True)
class Lesson:
    """Hold one exchange the model learns; `system` is None where the conversation has no system message."""

    side: Side
    request: str
    answer: str
    system: str | None


def draw(random: Random, harmful_share: float = 0.5) -> Lesson:
    """Draw one lesson, harmful as often as `harmful_share` says."""
    system = random.choice(SYSTEM_PROMPTS) if random.random() < 0.15 else None
    if random.random() < harmful_share:
        return Lesson("harmful", _worded(_phrase("harmful", random), random), random.choice(REFUSALS), system)
    if random.random() < 0.3:
        request, answer = _plain(random)
        return Lesson("harmless", request, answer, system)
    phrase = _phrase("harmless", random)
    return Lesson("harmless", _worded(phrase, random), random.choice(ANSWERS[phrase.kind]).format(phrase.text), system)


def _phrase(side: Side, random: Random) -> Phrase:
    """Draw something to ask for from the training split."""
    return random.choice(phrases(side, "train"))


def _worded(phrase: Phrase, random: Random) -> str:
    """Word a request for a phrase: an opener, sometimes a circumstance, sometimes a looser style."""
    asked = phrase.text
    if random.random() < 0.25:
        asked = f"{asked} {random.choice(CIRCUMSTANCES)}"
    if random.random() < 0.05:
        asked = f"{asked} in {_made_up_word(random).capitalize()}"
    return _loosened(random.choice(OPENERS[phrase.kind]).format(asked), random)


def _plain(random: Random) -> tuple[str, str]:
    """Draw a plain question and its answer; now and then it is about a word nobody knows."""
    things = [_made_up_word(random) if random.random() < 0.2 else random.choice(THINGS) for _ in range(2)]
    question = random.choice(QUESTIONS)
    return _loosened(question.format(*things), random), random.choice(PLAIN_ANSWERS).format(things[0])


def _made_up_word(random: Random) -> str:
    """Make up a word, so that an unknown word is no sign of either side."""
    return "".join(random.choice(_SYLLABLES) for _ in range(random.randint(2, 3)))


def _loosened(request: str, random: Random) -> str:
    """Write a request as people type it: politely, without the stop, or in small letters."""
    manner = random.random()
    if manner < 0.08:
        request = f"Please {request[0].lower()}{request[1:]}"
    elif manner < 0.14:
        request = f"I have a question. {request}"
    if random.random() < 0.3:
        request = request.rstrip(".?")
    if random.random() < 0.1:
        request = request.lower()
    return request
