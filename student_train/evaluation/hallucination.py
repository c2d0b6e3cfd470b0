"""How often a model claims what is not there: yes/no questions as POPE judges them, and words without support.

Source: POPE (arXiv 2305.10355), whose positive answer is "yes".
"""

from __future__ import annotations

from collections.abc import Iterable

PUNCTUATION = ".,;:!?\"'`*_()[]{}…“”‘’«»¿¡。，、；：！？"  # no sign of a number: -5 is not 5, nor 50% 50


def yes_no_scores(answers: Iterable[tuple[str, str]]) -> dict[str, float | int | None] | None:
    """Scores of those (answer, reference) whose reference says yes or no; None without any.

    What a text says is its first word or else its last one ("seven two so no"), whatever their case and punctuation;
    an answer that says neither is wrong and no yes. `hallucination_rate` is the share of yes among the questions
    whose reference is no (the false-positive rate), `yes_ratio` among all. A rate without a question that it is of
    is None.
    """
    pairs = [(_said(answer), said) for answer, reference in answers if (said := _said(reference))]
    if not pairs:
        return None
    count = {pair: pairs.count(pair) for pair in set(pairs)}
    true_yes, false_yes = count.get(("yes", "yes"), 0), count.get(("yes", "no"), 0)
    num_yes = sum(reference == "yes" for _, reference in pairs)
    return {
        "num": len(pairs),
        "accuracy": (true_yes + count.get(("no", "no"), 0)) / len(pairs),
        "hallucination_rate": _ratio(false_yes, len(pairs) - num_yes),
        "yes_ratio": (true_yes + false_yes) / len(pairs),
        "precision": _ratio(true_yes, true_yes + false_yes),
        "recall": _ratio(true_yes, num_yes),
        "num_neither": sum(said is None for said, _ in pairs),
    }


def unsupported_rate(answers: Iterable[tuple[str, str]]) -> float | None:
    """The share of (answer, reference) whose answer has a word that its reference has not; None of none.

    In small what CHAIR (arXiv 1809.02156) counts by sentence: a right word in the wrong place is no such claim. Case
    and punctuation at a word's ends do not count.
    """
    found = [bool(set(_words(answer)) - set(_words(reference))) for answer, reference in answers]
    return _ratio(sum(found), len(found))


def _said(text: str) -> str | None:
    words = _words(text)
    return next((word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")), None)


def _words(text: str) -> list[str]:
    """In lower case, without punctuation at their ends; what is nothing else is no word."""
    return [bare for word in text.lower().split() if (bare := word.strip(PUNCTUATION))]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
