"""Chooses the held-out samples on which students and teacher disagree most, and collects what each of them said.

The rule is stated on the page, see `choose_samples`. Texts and pictures come from the caches that the students were
judged on; what is missing on this machine is said to be.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from stillhouse.inspection.image_previews import ImagePreview, embed_image
from stillhouse.inspection.sample_view import AnswerToken, build_sample_view
from stillhouse.inspection.token_texts import TokenTexts, load_token_texts
from stillhouse.reporting.results import Results
from storage.errors import StillhouseError
from storage.identity import stored_pixels
from storage.reader.cache import Cache
from storage.records.records import TokensRecord

NUM_SHOWN = 8
MAX_OF_CATEGORY = 3
MAX_IMAGES = 4  # of a sample
MAX_SIDE = 224  # pixels of a picture
MAX_LOSSLESS_SIDE = 96
_ROLES = r"(?:system|user|human|assistant|model|gpt)"

Place = tuple[str, str]  # a cache's path, a sample's id there


@dataclass(frozen=True)
class Choice:
    """Samples, the worst first, and the rule that chose them in words."""

    places: Sequence[tuple[Place, float]]  # with the value that the rule sorts by
    rule: str
    unit: str  # of that value, such as "nats"


@dataclass(frozen=True)
class GivenAnswer:
    """One text that a run's seeds answered."""

    text: str
    correct: bool
    num_seeds: int


@dataclass(frozen=True)
class JudgedTurn:
    """One question with the reference and all answers."""

    question: str
    reference: str
    answers: Mapping[str, Sequence[GivenAnswer]]  # by run; a run that was not asked is missing
    teacher: GivenAnswer | None


@dataclass(frozen=True)
class Disagreement:
    """One sample of the gallery."""

    sample_id: str
    category: str
    value: float
    turns: Sequence[JudgedTurn]
    pictures: Sequence[ImagePreview] = ()
    num_hidden_pictures: int = 0
    tokens: Sequence[AnswerToken] = ()  # the teacher's rows along the reference
    missing: str = ""  # why question, pictures and rows are not here


@dataclass(frozen=True)
class Gallery:
    """What the page shows; without items, `note` says why."""

    items: Sequence[Disagreement] = ()
    rule: str = ""
    unit: str = ""
    note: str = ""
    no_answer: str = "gave no answer of its own"  # said of the teacher where it has none


@dataclass
class OpenCaches:
    """The caches that samples lie in, each opened once."""

    _opened: dict[str, tuple[Cache, TokenTexts]] = field(default_factory=dict)

    def open(self, path: str) -> tuple[Cache, TokenTexts]:
        """A cache and the texts of its tokens. StillhouseError if it is gone."""
        if path not in self._opened:
            cache = Cache.open(path, checksums=False)
            self._opened[path] = cache, load_token_texts(cache.identity, None)
        return self._opened[path]


def build_gallery(results: Results, run: str | None) -> Gallery:
    """The gallery of a run, with the answers of all runs."""
    if run is None:
        return Gallery(note="No distilled run was compared with a control, so there is none to ask about.")
    caches = OpenCaches()
    choice = choose_samples(results, run, caches)
    if not choice.places:
        return Gallery(note=choice.rule)
    answers = {name: _collect_answers(entries, results.cache_path) for name, entries in results.runs.items()}
    of_teacher = _collect_answers([results.teacher] if results.teacher else [], results.cache_path)
    categories = {place: {turn["category"] for turn in turns.values()} for place, turns in answers[run].items()}
    items: list[Disagreement] = []
    shown_images: set[str] = set()
    num_shown: Counter[str] = Counter()
    for place, value in choice.places:
        if any(num_shown[category] == MAX_OF_CATEGORY for category in categories.get(place, ())):
            continue
        item, image_keys = _build_item(place, value, run, answers, of_teacher, caches)
        if shown_images.isdisjoint(image_keys):
            shown_images |= image_keys
            num_shown.update(categories.get(place, ()))
            items.append(item)
        if len(items) == NUM_SHOWN:
            break
    judged = results.teacher.get("caches") or []
    elsewhere = judged and not {path for (path, _), _ in choice.places} & set(judged)
    no_answer = f"was judged on {', '.join(judged)}, not on this cache" if elsewhere else Gallery.no_answer
    return Gallery(items, choice.rule, choice.unit, no_answer=no_answer)


def locate_sample(sample_id: str, entry: Mapping[str, Any], shared: str | None) -> Place:
    """Where a sample of an evaluation lies; evaluations of several caches name samples NUMBER:ID."""
    caches = entry.get("caches") or [shared]
    number, colon, bare = sample_id.partition(":")
    if len(caches) > 1 and colon and number.isdigit() and int(number) < len(caches):
        return str(caches[int(number)]), bare
    return str(caches[0]), sample_id


def choose_samples(results: Results, run: str, caches: OpenCaches) -> Choice:
    """Samples by the run's KL to the teacher, over all its rows, or by its errors where the teacher was sure.

    The latter is for evaluations of an earlier version, which kept no KL of single samples.
    """
    entries = results.runs[run]
    once = f"At most one sample of a picture and {MAX_OF_CATEGORY} of a question type."
    sums: dict[Place, list[float]] = defaultdict(list)
    for entry in entries:
        for each in entry.get("fidelity_by_sample", []):
            if each.get("num_rows"):
                sums[locate_sample(each["sample_id"], entry, results.cache_path)].append(each["kl_sum"])
    if sums:
        means = {place: fmean(values) for place, values in sums.items() if len(values) == len(entries)}
        rule = (
            f"The held-out samples with the largest KL of {run} to the teacher, summed over a sample's rows, mean of "
            f"{len(entries)} seeds. {once}"
        )
        return Choice(sorted(means.items(), key=lambda pair: -pair[1]), rule, "nats from the teacher")
    wrong: Counter[Place] = Counter()
    for entry in entries:
        places = {
            locate_sample(each["sample_id"], entry, results.cache_path)
            for each in entry.get("samples", [])
            if not each["correct"]
        }
        wrong.update(places)
    always = [place for place, count in wrong.items() if count == len(entries)]
    surprises = _measure_surprise(always, caches)
    if not surprises:
        return Choice([], f"The evaluations of {run} name no sample that could be shown.", "")
    rule = (
        f"The evaluations of {run} are of an earlier version and keep no KL of single samples. Shown are questions "
        f"that all its seeds answered wrongly, by the teacher's surprise at the reference, the smallest first. {once}"
    )
    return Choice(sorted(surprises.items(), key=lambda pair: pair[1]), rule, "nats of the teacher's surprise a token")


def _measure_surprise(places: Sequence[Place], caches: OpenCaches) -> dict[Place, float]:
    """The mean of the teacher's -log p(label) over each sample's rows, of samples that have rows."""
    found: dict[Place, float] = {}
    for path in {path for path, _ in places}:
        wanted = {name for other, name in places if other == path}
        try:
            cache, _ = caches.open(path)
            if "response" not in cache.families:
                continue
            for table in cache.tables("response", ["sample_id", "label_logprob"]):
                columns = (table[name].to_pylist() for name in ("sample_id", "label_logprob"))
                for name, logprobs in zip(*columns, strict=True):
                    if name in wanted and logprobs:
                        found[path, name] = -float(np.mean(logprobs))
        except StillhouseError:
            continue
    return found


Answers = dict[Place, dict[int, dict[str, Any]]]  # by place and turn: reference, category, counts of (text, correct)


def _collect_answers(entries: Sequence[Mapping[str, Any]], shared: str | None) -> Answers:
    found: Answers = defaultdict(dict)
    for entry in entries:
        for sample in entry.get("samples", []):
            of_place = found[locate_sample(sample["sample_id"], entry, shared)]
            turn = of_place.setdefault(
                sample.get("turn", 0),
                {"reference": sample["reference"], "category": sample["category"], "texts": Counter()},
            )
            turn["texts"][sample["answer"], sample["correct"]] += 1
    return found


def _list_given(turn: Mapping[str, Any] | None) -> list[GivenAnswer]:
    if turn is None:
        return []
    return [GivenAnswer(text, correct, count) for (text, correct), count in turn["texts"].most_common()]


def _build_item(
    place: Place, value: float, run: str, answers: Mapping[str, Answers], of_teacher: Answers, caches: OpenCaches
) -> tuple[Disagreement, set[str]]:
    """The item, and the keys of its images."""
    path, sample_id = place
    judged = answers[run].get(place, {})
    questions: dict[int, str] = {}
    shown: dict[str, Any] = {}
    keys: set[str] = set()
    try:
        cache, texts = caches.open(path)
        index = cache.index_of(sample_id)
        tokens = cache.read(index).tokens
        keys = {image.key for image in tokens.images}
        questions = dict(enumerate(list_questions(tokens, texts, cache.identity.image_token_id)))
        root, follows = cache.image_root, cache.follows_image_links
        shown = {
            "tokens": [token for token in build_sample_view(cache, index, texts).tokens if token.signal],
            "num_hidden_pictures": max(0, len(tokens.images) - MAX_IMAGES),
            "pictures": [
                embed_image(
                    root, image, pixels=stored_pixels(cache.identity), max_side=MAX_SIDE,
                    max_lossless_side=MAX_LOSSLESS_SIDE, follows_links=follows,
                )
                for image in tokens.images[:MAX_IMAGES]
            ],
            "missing": "" if texts.has_decoder else f"Questions and tokens are shown as {texts.note}.",
        }  # fmt: skip
    except KeyError:
        shown = {"missing": f"{path} holds no sample of this id any more."}
    except (StillhouseError, OSError) as error:
        shown = {"missing": f"The cache cannot be read here: {error}"}
    turns = [
        JudgedTurn(
            question=questions.get(turn, ""),
            reference=facts["reference"],
            answers={
                name: given
                for name, of_run in answers.items()
                if (given := _list_given(of_run.get(place, {}).get(turn)))
            },
            teacher=next(iter(_list_given(of_teacher.get(place, {}).get(turn))), None),
        )
        for turn, facts in sorted(judged.items())
    ]
    category = next((facts["category"] for facts in judged.values()), "")
    return Disagreement(sample_id, category, value, turns, **shown), keys


def list_questions(tokens: TokensRecord, texts: TokenTexts, image_token_id: int) -> Iterator[str]:
    """The prompt before each answer of a conversation, without special tokens, images and marks of roles."""
    is_answer = tokens.response_mask
    starts = np.flatnonzero(np.diff(is_answer.astype(np.int8), prepend=0) == 1)
    begin = 0
    for start in starts.tolist():
        prompt = tokens.token_ids[begin:start]
        kept = prompt[(prompt != image_token_id) & ~is_answer[begin:start]]
        yield strip_roles(texts.decode_plain(kept.tolist()))
        begin = start


def strip_roles(text: str) -> str:
    """The text of a turn without the marks of roles that chat templates write around it; all of it if none is left."""
    bare = re.sub(rf"\s*\b{_ROLES}\s*:?\s*$", "", text.strip(), flags=re.IGNORECASE)
    bare = re.sub(rf"^(?:{_ROLES}\s*(?::|\n)\s*)+", "", bare, flags=re.IGNORECASE)
    return bare.strip() or text.strip()
