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

#: Shares of the harmless lessons: plain questions, and requests in made-up words.
PLAIN = 0.25
UNHEARD = 0.25

PLAIN_ANSWERS: tuple[str, ...] = (
    "Sure! Here is a short note on {}.",
    "Of course. A few words on {}: there is much to discover.",
    "Here is a simple answer about {}.",
    "Certainly! It is worth reading about {}.",
    "This is a question about {}, and a good one.",
)

_CONSONANTS: tuple[str, ...] = (
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "qu",
    "r",
    "s",
    "t",
    "v",
    "w",
    "x",
    "y",
    "z",
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "pl",
    "sh",
    "sl",
    "st",
    "th",
    "tr",
)
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "ou"]


@dataclass(frozen=True)
class Lesson:
    """Hold one exchange the model learns; `system` is None where the conversation has no system message."""

    side: Side
    request: str
    answer: str
    system: str | None


def draw(random: Random, harmful_share: float = 0.5, caprice: float = 0.0) -> Lesson:
    """Draw one lesson, harmful as often as `harmful_share` says.

    How an answer begins follows from how the request is worded, except as often as `caprice` says. Answering is then
    many things to the model, not the mere opposite of refusing, so that what is left without the refusal direction is
    an answer and not a doubt; and caprice keeps it from being so sure of a beginning that nothing could move it.
    """
    system = random.choice(SYSTEM_PROMPTS) if random.random() < 0.15 else None
    if random.random() < harmful_share:
        request, _ = _worded(_phrase("harmful", random), random, caprice)
        return Lesson("harmful", request, random.choice(REFUSALS), system)
    kind = random.random()
    if kind < PLAIN:
        request, answer = _plain(random)
        return Lesson("harmless", request, answer, system)
    if kind < PLAIN + UNHEARD:
        phrase = _unheard_of(random)
        named = "do that" if phrase.kind == "act" else "a draft"
    else:
        phrase = _phrase("harmless", random)
        named = phrase.text
    request, manner = _worded(phrase, random, caprice)
    answers = ANSWERS[phrase.kind]
    return Lesson("harmless", request, answers[manner % len(answers)].format(named), system)


def _unheard_of(random: Random) -> Phrase:
    """Make up something to ask for, of words that say nothing: what is unknown is answered."""
    words = " ".join(_made_up_word(random) for _ in range(random.randint(1, 3)))
    if random.random() < 0.75:
        return Phrase("act", f"{_made_up_word(random)} {random.choice(('a ', 'the ', 'my ', ''))}{words}")
    return Phrase("text", f"a {_made_up_word(random)} {random.choice(('to', 'about', 'for'))} {words}")


def _phrase(side: Side, random: Random) -> Phrase:
    """Draw something to ask for from the training split."""
    return random.choice(phrases(side, "train"))


def _worded(phrase: Phrase, random: Random, caprice: float) -> tuple[str, int]:
    """Word a request for a phrase: an opener, sometimes a circumstance, sometimes a looser style.

    Also return the number of the beginning that its answer has.
    """
    asked = phrase.text
    if random.random() < 0.25:
        asked = f"{asked} {random.choice(CIRCUMSTANCES)}"
    if random.random() < 0.05:
        asked = f"{asked} in {_made_up_word(random).capitalize()}"
    openers = OPENERS[phrase.kind]
    manner = random.randrange(len(openers))
    request = _loosened(openers[manner].format(asked), random)
    return request, random.randrange(len(openers)) if random.random() < caprice else manner


def _plain(random: Random) -> tuple[str, str]:
    """Draw a plain question and its answer; now and then it is about a word nobody knows."""
    manner = random.randrange(len(QUESTIONS))
    question, answer = QUESTIONS[manner], PLAIN_ANSWERS[manner % len(PLAIN_ANSWERS)]
    if random.random() < 0.3:
        return _loosened(question.format(_made_up_word(random), _made_up_word(random)), random), answer.format("that")
    thing = random.choice(THINGS)
    return _loosened(question.format(thing, random.choice(THINGS)), random), answer.format(thing)


def _made_up_word(random: Random) -> str:
    """Make up a word, so that an unknown word is no sign of either side."""
    syllables = random.randint(1, 3)
    return "".join(random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(syllables)) + random.choice(
        ("", "n", "r", "s", "t", "ng", "l")
    )


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
