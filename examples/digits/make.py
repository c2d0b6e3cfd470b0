"""Makes the digits experiment: LLaVA-format data, PNG mosaics, a vision tower, untrained models.

    python examples/digits/make.py --out runs/digits

writes <out>/data/{teacher_train,train,train_clean,validation,test}.jsonl with their images, and
<out>/models/{teacher_init,student_init_0,…}. `train` and `train_clean` are the same questions about the
same mosaics; in `train` a stated share of the answers has one wrong number word, as answers of a crowd do.
`--yes-no` adds questions whether a digit is there to every mosaic, and a checklist of the digits to those that are
trained on. `--pairs` writes <out>/data/pairs.jsonl: a right answer and a plausible misreading. Neither changes
anything else that is drawn.
Nothing outside this folder knows what a digit is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from examples.digits.claims import CHECKLIST, KINDS, ask_whether, checklist, lookalikes, misread
from examples.digits.mosaics import CATEGORIES, WORDS, Originals, Split, ask, draw_mosaics, load_originals, miswrite
from storage.backends.disk import report_full_disk


@dataclass(frozen=True)
class Pair:
    """One question about one mosaic. `answer` is clean; `noisy` may hold one wrong word."""

    sample_id: str
    image: str
    category: str
    question: str
    answer: str
    noisy: str

    def line(self, *, noisy: bool, suffix: str = "") -> str:
        """The pair as a line of LLaVA-format JSONL."""
        conversation = [
            {"from": "human", "value": f"<image>\n{self.question}"},
            {"from": "gpt", "value": self.noisy if noisy else self.answer},
        ]
        record = {
            "id": self.sample_id + suffix,
            "image": self.image,
            "category": self.category,
            "conversations": conversation,
        }
        return json.dumps(record) + "\n"


def make_pairs(
    folder: Path,
    name: str,
    originals: Originals,
    *,
    num_mosaics: int,
    per_mosaic: int,
    seed: int,
    noise: float = 0.0,
    yes_no: int = 0,
    checked: bool = False,
) -> Iterator[Pair]:
    """Writes each mosaic as <folder>/images/<name>/00000.png and yields its questions.

    Every mosaic gets `per_mosaic` different categories, `yes_no` different kinds of questions whether a digit is
    there, and a checklist of all digits if they are to be `checked`. With probability `noise` a pair's noisy answer
    has one number word replaced, drawn uniformly from the other nine digits (eighteen sums), or one verdict is the
    other one.
    """
    rng, claims = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    alike = lookalikes(originals)
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    for index, (pixels, digits) in enumerate(islice(draw_mosaics(originals, rng), num_mosaics)):
        path = f"images/{name}/{index:05d}.png"
        Image.fromarray(pixels).save(folder / path)
        for category in rng.permutation(CATEGORIES)[:per_mosaic]:
            question, words, num_choices = ask(str(category), digits, rng)
            noisy = miswrite(words, num_choices, rng) if rng.random() < noise else words
            sample_id = f"{name}-{index:05d}-{category}"
            yield Pair(sample_id, path, str(category), question, " ".join(words), " ".join(noisy))
        for kind in claims.permutation(KINDS)[:yes_no]:
            claim = ask_whether(str(kind), digits, alike, claims)
            noisy = claim.misread(alike, claims) if claims.random() < noise else claim
            sample_id = f"{name}-{index:05d}-{kind}"
            yield Pair(sample_id, path, str(kind), claim.question, claim.answer, noisy.answer)
        if checked:
            question, answer, wrong = checklist(digits, claims)
            noisy_answer = wrong if claims.random() < noise else answer
            yield Pair(f"{name}-{index:05d}-{CHECKLIST}", path, CHECKLIST, question, answer, noisy_answer)


def write_data(
    folder: Path,
    *,
    teacher_mosaics: int,
    mosaics: int,
    test_mosaics: int,
    noise: float,
    seed: int,
    yes_no: int = 0,
    preferences: int = 0,
) -> None:
    """The JSONL files and their images; `test_mosaics` each for validation and test, of originals of their own."""
    train = load_originals("train")
    folder.mkdir(parents=True, exist_ok=True)
    asked_too = {"yes_no": yes_no, "checked": yes_no > 0}
    teacher = make_pairs(
        folder, "teacher_train", train, num_mosaics=teacher_mosaics, per_mosaic=4, seed=seed + 1, **asked_too
    )
    _write(folder / "teacher_train.jsonl", (pair.line(noisy=False) for pair in teacher))
    asked = make_pairs(
        folder, "train", train, num_mosaics=mosaics, per_mosaic=2, seed=seed + 2, noise=noise, **asked_too
    )
    pairs = list(asked)
    _write(folder / "train.jsonl", (pair.line(noisy=True) for pair in pairs))
    _write(folder / "train_clean.jsonl", (pair.line(noisy=False, suffix="-clean") for pair in pairs))
    held_out_seeds: dict[Split, int] = {"test": seed + 3, "validation": seed + 5}
    for name, own_seed in held_out_seeds.items():
        held_out = make_pairs(
            folder, name, load_originals(name), num_mosaics=test_mosaics, per_mosaic=2, seed=own_seed, yes_no=yes_no
        )
        _write(folder / f"{name}.jsonl", (pair.line(noisy=False) for pair in held_out))
    if preferences:
        _write(folder / "pairs.jsonl", preference_lines(folder, train, num=preferences, seed=seed + 4, yes_no=yes_no))


def preference_lines(folder: Path, originals: Originals, *, num: int, seed: int, yes_no: int) -> Iterator[str]:
    """Preference pairs as lines of JSONL, each about a mosaic of its own: the right answer and a misreading of it.

    With `yes_no` about half of them are such questions about a digit that is not there, which the misreading sees;
    none is for a sum.
    """
    alike, rng = lookalikes(originals), np.random.default_rng([seed, 2])
    asked = make_pairs(folder, "pairs", originals, num_mosaics=num, per_mosaic=4, seed=seed, noise=1.0, yes_no=yes_no)
    for _, group in groupby(asked, key=lambda pair: pair.image):
        asked_of_it = list(group)
        absent = [pair for pair in asked_of_it if pair.category in KINDS and pair.answer.endswith("no")]
        claims = bool(absent) and rng.random() < 2 / 3
        read = [pair for pair in asked_of_it if pair.category not in ("sum", *KINDS)]
        questions = absent if claims else read
        pair = questions[int(rng.integers(len(questions)))]
        record = {
            "id": pair.sample_id,
            "image": pair.image,
            "category": pair.category,
            "conversations": [{"from": "human", "value": f"<image>\n{pair.question}"}],
            "chosen": pair.answer,
            "rejected": pair.noisy if claims else " ".join(misread(pair.answer.split(), alike, rng)),
        }
        yield json.dumps(record) + "\n"


def write_models(
    folder: Path, *, tower_steps: int, num_students: int, min_tower_accuracy: float, seed: int, yes_no: bool = False
) -> None:
    """The untrained teacher and one untrained student a seed, all with the same pretrained vision tower.

    `yes_no`: their tokenizer has seen yes/no questions.
    """
    from examples.digits.models import (  # after the data: torch is slow
        STUDENT,
        TEACHER,
        make_llava,
        make_processor,
    )
    from examples.digits.tower import pretrain_tower
    from student_train.models.checkpoint import save_checkpoint

    train = load_originals("train")
    tower, accuracy = pretrain_tower(train, load_originals("validation"), steps=tower_steps, seed=seed)
    print(f"vision tower: {accuracy:.1%} of held-out digits read by its probe")
    if accuracy < min_tower_accuracy:
        raise SystemExit(f"the tower reads {accuracy:.1%}, expected {min_tower_accuracy:.1%}; raise --tower-steps")
    rng = np.random.default_rng(seed)
    texts = [text for _, digits in islice(draw_mosaics(train, rng), 200) for text in _texts(digits, rng)]
    if yes_no:
        alike = lookalikes(train)
        shown = [digits for _, digits in islice(draw_mosaics(train, rng), 200)]
        asked = [ask_whether(kind, digits, alike, rng) for digits in shown for kind in KINDS]
        texts += [f"{claim.question} {claim.answer}" for claim in asked]
        texts += [" ".join(checklist(digits, rng)[:2]) for digits in shown]
    processor = make_processor([*texts, *WORDS, "user\n", "assistant\n"])
    with tempfile.TemporaryDirectory() as source:
        processor.save_pretrained(source)
        save_checkpoint(make_llava(tower, processor, TEACHER, seed=seed), folder / "teacher_init", source)
        for student in range(num_students):
            model = make_llava(tower, processor, STUDENT, seed=seed + 1 + student)
            save_checkpoint(model, folder / f"student_init_{student}", source)


def _texts(digits: np.ndarray, rng: np.random.Generator) -> Iterator[str]:
    for category in CATEGORIES:
        question, words, _ = ask(category, digits, rng)
        yield f"{question} {' '.join(words)}"


def _write(path: Path, lines: Iterator[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Parses the arguments and makes everything."""
    parser = argparse.ArgumentParser(description="Makes the digits experiment's data and models.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets data/ and models/")
    parser.add_argument("--teacher-mosaics", type=int, default=4000, help="four questions each, clean answers")
    parser.add_argument("--mosaics", type=int, default=1000, help="of the students, two questions each")
    parser.add_argument("--test-mosaics", type=int, default=250, help="for validation and test each, clean")
    parser.add_argument("--noise", type=float, default=0.5, help="share of students' answers with a wrong word")
    parser.add_argument("--tower-steps", type=int, default=700)
    parser.add_argument("--min-tower-accuracy", type=float, default=0.95, help="below it making the models fails")
    parser.add_argument("--students", type=int, default=3, help="untrained students, one a seed")
    parser.add_argument("--yes-no", type=int, choices=range(len(KINDS) + 1), default=0, help="a mosaic, added to all")
    parser.add_argument("--pairs", type=int, default=0, help="preference pairs in pairs.jsonl; 0: no such file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_data(
        arguments.out / "data",
        teacher_mosaics=arguments.teacher_mosaics,
        mosaics=arguments.mosaics,
        test_mosaics=arguments.test_mosaics,
        noise=arguments.noise,
        seed=arguments.seed,
        yes_no=arguments.yes_no,
        preferences=arguments.pairs,
    )
    write_models(
        arguments.out / "models",
        tower_steps=arguments.tower_steps,
        num_students=arguments.students,
        min_tower_accuracy=arguments.min_tower_accuracy,
        seed=arguments.seed,
        yes_no=arguments.yes_no > 0,
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(report_full_disk(error))
