"""Hallucination scores: yes/no questions as in POPE, and answers with words that the reference lacks.

Source: POPE (arXiv 2305.10355), whose positive answer is "yes".
"""

from __future__ import annotations

from collections.abc import Iterable

PUNCTUATION = ".,;:!?\"'`*_()[]{}…“”‘’«»¿¡。，、；：！？"  # without signs of numbers: -5 is not 5, and 50% is not 50


def score_yes_no(answers: Iterable[tuple[str, str]]) -> dict[str, float | int | None] | None:
    """Score the pairs (answer, reference) whose reference is yes or no; return None without any.

    A text's verdict is its first word, or else its last one ("seven two so no"), ignoring case and punctuation; an
    answer without a verdict is wrong and not a yes. `hallucination_rate` is the share of yes among the questions
    whose reference is no (the false-positive rate), `yes_ratio` among all. A rate over no questions is None.
    """
    pairs = [(_find_yes_no(answer), truth) for answer, reference in answers if (truth := _find_yes_no(reference))]
    if not pairs:
        return None
    count = {pair: pairs.count(pair) for pair in set(pairs)}
    true_yes, false_yes = count.get(("yes", "yes"), 0), count.get(("yes", "no"), 0)
    num_yes = sum(reference == "yes" for _, reference in pairs)
    return {
        "num": len(pairs),
        "accuracy": (true_yes + count.get(("no", "no"), 0)) / len(pairs),
        "hallucination_rate": _divide(false_yes, len(pairs) - num_yes),
        "yes_ratio": (true_yes + false_yes) / len(pairs),
        "precision": _divide(true_yes, true_yes + false_yes),
        "recall": _divide(true_yes, num_yes),
        "num_neither": sum(verdict is None for verdict, _ in pairs),
    }


def compute_unsupported_rate(answers: Iterable[tuple[str, str]]) -> float | None:
    """Return the share of (answer, reference) whose answer has a word that its reference lacks; None without pairs.

    A simple form of CHAIR (arXiv 1809.02156), which counts by sentence: a correct word in the wrong place does not
    count. Ignores case, and punctuation at the ends of words.
    """
    found = [bool(set(_split_words(answer)) - set(_split_words(reference))) for answer, reference in answers]
    return _divide(sum(found), len(found))


def _find_yes_no(text: str) -> str | None:
    words = _split_words(text)
    return next((word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")), None)


def _split_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation at their ends; drop words of punctuation only."""
    return [bare for word in text.lower().split() if (bare := word.strip(PUNCTUATION))]


def _divide(part: int, whole: int) -> float | None:
    return part / whole if whole else None
