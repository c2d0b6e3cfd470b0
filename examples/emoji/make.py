"""Makes the emoji experiment: LLaVA-format data, pictures in two drawing styles, the untrained teacher.

    python -m examples.emoji.make --out runs/emoji

writes <out>/data/{teacher_train,train,validation,test}.jsonl with their images, and <out>/models/teacher_init.
Everything comes from packages that `make emoji` installs; README.md names their licences. The order of everything is
drawn by `--seed`, so a second call writes the same files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from examples.emoji.concepts import Concept, read_concepts, read_pictures, split_by_family
from examples.emoji.packages import NAMES, STYLES, TARBALLS, check_loaders, open_tarball
from examples.emoji.questions import (
    Picture,
    PictureSplit,
    Question,
    ask_held_out,
    ask_in_training,
    select_for_students,
    split_pictures,
)
from storage.backends.disk import report_full_disk
from storage.errors import ConfigError

if TYPE_CHECKING:
    import torch


def write_data(
    folder: Path,
    concepts: Sequence[Concept],
    drawings: Mapping[str, Mapping[str, bytes]],
    *,
    train: int,
    validation: int,
    test: int,
    teacher: int | None = None,
    seed: int,
) -> PictureSplit:
    """Writes the JSONL files and all pictures; returns which picture is for what.

    `drawings`: PNGs by style and code points. `train`: questions of the students; `teacher`: of the teacher, None for
    all that there are; `validation` and `test`: held-out questions a task.
    """
    split = split_pictures(concepts, split_by_family(concepts, seed=seed), seed=seed)
    asked = ask_in_training(split, seed=seed)
    files = {
        "teacher_train": asked[:teacher],
        "train": select_for_students(asked, split, num=train),
        "validation": ask_held_out(split, "validation", num_per_task=validation, seed=seed),
        "test": ask_held_out(split, "test", num_per_task=test, seed=seed),
    }
    for picture in split.pictures:
        path = folder / picture.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawings[picture.style][picture.concept.hexcode])
    for name, questions in files.items():
        _write(folder / f"{name}.jsonl", questions)
        print(f"{name}: {len(questions)} questions about {len({each.picture for each in questions})} pictures")
    return split


def write_teacher(data: Path, folder: Path, split: PictureSplit, *, seed: int) -> None:
    """The untrained teacher's checkpoint. Its projector is fitted on training's pictures alone."""
    import torch  # after the data: torch is slow

    from examples.emoji.models import assemble, compute_features, load_decoder, load_tower, make_processor
    from examples.emoji.projector import fit_projector, write_projector
    from student_train.models.checkpoint import save_checkpoint

    torch.manual_seed(seed)
    processor, tower, decoder = make_processor(), load_tower(), load_decoder()
    model = assemble(tower, decoder, processor)
    embeddings = decoder.get_input_embeddings().weight.detach()

    def make_rows(pictures: Sequence[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
        features = compute_features(tower, processor, [data / picture.path for picture in pictures])
        targets = torch.stack([embed_answers(picture.concept, processor.tokenizer, embeddings) for picture in pictures])
        num_tokens = features.shape[1]
        return features.flatten(0, 1), targets.repeat_interleave(num_tokens, dim=0)

    projector = model.model.multi_modal_projector
    wanted, ridge = fit_projector(
        *make_rows([*split.seen, *split.one_style]),
        held_out=make_rows(split.unseen["validation"]),
        rank=projector.linear_1.out_features // 2,
        norm=float((embeddings - embeddings.mean(0)).square().sum(1).mean().sqrt()),
    )
    write_projector(projector.linear_1, projector.linear_2, wanted)
    print(f"projector: ridge regression of rank {len(wanted.down)}, ridge {ridge:g}")
    with tempfile.TemporaryDirectory() as source:
        processor.save_pretrained(source)
        save_checkpoint(model, folder, source)


def embed_answers(concept: Concept, tokenizer: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """What a concept's visual tokens start as, (d,): the mean of its name, kind and group, each a mean of its tokens.

    `embeddings`: of the vocabulary, (v, d).
    """
    import torch

    means = [
        embeddings[tokenizer(f" {text}", add_special_tokens=False).input_ids].mean(0)
        for text in (concept.name, concept.kind, concept.group)
    ]
    return torch.stack(means).mean(0)


def _write(path: Path, questions: Iterable[Question]) -> None:
    path.write_text("".join(question.to_line() for question in questions), encoding="utf-8")


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def main() -> None:
    """Parses the arguments and makes everything."""
    parser = argparse.ArgumentParser(description="Makes the emoji experiment's data and untrained teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets data/ and models/")
    parser.add_argument("--tarballs", type=Path, default=TARBALLS, help="folder where `npm pack` wrote the packages")
    parser.add_argument(
        "--train", type=_parse_count, default=4000, help="questions of the students, beside those of names"
    )
    parser.add_argument(
        "--teacher", type=_parse_count, help="questions of the teacher; default: all, about ten thousand"
    )
    parser.add_argument("--validation", type=_parse_count, default=40, help="questions of each of the five tasks")
    parser.add_argument("--test", type=_parse_count, default=100, help="questions of each of the five tasks")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the questions and their order")
    arguments = parser.parse_args()
    names = open_tarball(arguments.tarballs, NAMES)
    tarballs = {style: open_tarball(arguments.tarballs, package) for style, package in STYLES.items()}
    check_loaders()
    drawings = {style: read_pictures(tarball, style) for style, tarball in tarballs.items()}
    concepts = read_concepts(names, set.intersection(*(set(pictures) for pictures in drawings.values())))
    data = arguments.out / "data"
    split = write_data(
        data,
        concepts,
        drawings,
        train=arguments.train,
        teacher=arguments.teacher,
        validation=arguments.validation,
        test=arguments.test,
        seed=arguments.seed,
    )
    write_teacher(data, arguments.out / "models" / "teacher_init", split, seed=arguments.seed)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        sys.exit(report_full_disk(error))
