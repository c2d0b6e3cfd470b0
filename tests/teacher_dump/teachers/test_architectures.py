"""Promise 8 for every architecture: vLLM, transformers and the model's own forward pass give the same signals."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.errors import StillhouseError
from storage.images.placeholders import get_placeholder, write_visual_tokens
from storage.records.records import PartRecords
from teacher_dump.prompts.image_tokens import VisualGrid
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.lm_head import read_head
from teacher_dump.signals.vision_check import check_vision, choose_check_samples
from teacher_dump.teachers.architectures import engine_support
from teacher_dump.teachers.teacher import TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.teacher_dump.architectures import (
    BATCHED_TOKENS,
    WAYS,
    RecordedTeacher,
    make_all,
    make_architecture_scorer,
    read_vision_check,
    samples_of,
)
from tests.tiny_architectures import ARCHITECTURES, TEXT_ONLY
from tests.tiny_parts import VOCAB_SIZE

REPOSITORY = Path(__file__).parents[3]
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
SEEING = [name for name in ARCHITECTURES if name not in TEXT_ONLY]
TOLERANCE = 5e-5  # of hidden states of size 1, in nats and in probability; measured: 6e-6

# An engine on a CPU runs these; the table says why not of the others.
SERVED = [name for name in ARCHITECTURES if engine_support(name).state == "tested"]
QUICK = ("llava_onevision",)  # an engine takes ten seconds to start: of the others the long tests have one


def in_engine(architectures: Sequence[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in architectures]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes teachers and samples, without any engine's answers."""
    folder = tmp_path_factory.mktemp("architectures")
    make_all(folder)
    return folder


@pytest.fixture(scope="module")
def asked(root: Path, request: pytest.FixtureRequest) -> Path:
    """Adds vLLM's answers to the folder, from one process for the architectures of all selected tests."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = {
        item.callspec.params["architecture"]
        for item in functions
        if item.path == request.path and "asked" in item.fixturenames
    }
    names = [name for name in ARCHITECTURES if name in chosen]
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher_dump.architectures", str(root), *names],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def reference(folder: Path) -> TransformersTeacher:
    sees = folder.name in SEEING
    image_token_id = IMAGE_TOKEN_ID if sees else -1
    return TransformersTeacher(folder / "teacher", dtype="float32", image_token_id=image_token_id, settings={})


def prepared(folder: Path) -> dict[str, PreparedSample]:
    ready = make_architecture_scorer(folder, BlindTeacher(reference(folder))).prepare(samples_of(folder).samples).ready
    return {sample.record.sample_id: sample for sample in ready}


@pytest.mark.parametrize("architecture", in_engine(SERVED))
def test_both_teachers_give_the_same_signals(architecture: str, asked: Path) -> None:
    folder = asked / architecture
    part = samples_of(folder)
    theirs = make_architecture_scorer(folder, reference(folder)).score(part)
    for way in WAYS:
        ours = make_architecture_scorer(folder, RecordedTeacher(folder / f"{way}.npz")).score(part)
        assert ours.records.errors == []
        assert [one.sample_id for one in ours.records.tokens] == [sample.id for sample in part.samples]
        assert ours.num_tokens == theirs.num_tokens
        assert_same(ours.records, theirs.records)
    longest = max(len(sample.expansion.token_ids) for sample in prepared(folder).values())
    assert longest > BATCHED_TOKENS


def assert_same(ours: PartRecords, theirs: PartRecords) -> None:
    for one, other in zip(ours.tokens, theirs.tokens, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.images == other.images
    pairs: list[tuple[Any, Any]] = [*zip(ours.response or [], theirs.response or [], strict=True)]
    assert len(pairs) == len(ours.tokens)
    for one, other in pairs:
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=TOLERANCE)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)  # all 300, the likeliest first
        np.testing.assert_allclose(one.log_sum_exp, other.log_sum_exp, atol=TOLERANCE)
    assert ours.visual is not None
    assert theirs.visual is not None
    assert ours.visual.keys() == theirs.visual.keys()
    for key, rows in ours.visual.items():
        np.testing.assert_allclose(rows.entropy, theirs.visual[key].entropy, atol=TOLERANCE)
    assert ours.relation is not None
    assert theirs.relation is not None
    for key, relation in ours.relation.items():
        np.testing.assert_allclose(relation.values, theirs.relation[key].values, atol=TOLERANCE)
    assert ours.sequence is not None
    assert theirs.sequence is not None
    for one, other in zip(ours.sequence, theirs.sequence, strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE * one.num_tokens)
    for one, other in zip(ours.hidden or [], theirs.hidden or [], strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", in_engine([name for name in SEEING if name in SERVED]))
def test_a_prefix_that_was_seen_before_changes_nothing(architecture: str, asked: Path) -> None:
    """Equal ids before the answer, equal pictures or others of their size: each prompt gets its own rows."""
    folder = asked / architecture
    samples = prepared(folder)
    for way in WAYS:
        engine = RecordedTeacher(folder / f"{way}.npz")
        names = ("square", "square-again", "other", "twice", "not-twice")
        square, again, other, twice, not_twice = engine.hidden_states([samples[name].prompt for name in names])
        (seen,) = samples["square"].expansion.visual
        answer = int(samples["square"].response_positions[0])
        np.testing.assert_allclose(square.hidden[: answer + 1], again.hidden[: answer + 1], atol=TOLERANCE)
        assert square.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(square.hidden[: seen[0]], other.hidden[: seen[0]], atol=TOLERANCE)
        assert differ_everywhere(square.hidden[seen], other.hidden[seen])
        assert float((square.hidden[answer] - other.hidden[answer]).abs().max()) > 0.05
        first, second = samples["twice"].expansion.visual
        assert samples["twice"].record.images[0].key == samples["square"].record.images[0].key
        np.testing.assert_allclose(twice.hidden[first], square.hidden[seen], atol=TOLERANCE)  # kept once for both
        np.testing.assert_allclose(twice.hidden[first], not_twice.hidden[first], atol=TOLERANCE)
        assert differ_everywhere(twice.hidden[second], not_twice.hidden[second])


def differ_everywhere(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one - other).abs().amax(dim=-1) > 0.01).all())


@pytest.mark.parametrize("architecture", SEEING)
def test_expansion_and_signals_are_those_of_the_whole_model(architecture: str, root: Path) -> None:
    """The processor's own ids and the model's own logits: nothing shifted, cut or expanded by us."""
    from transformers import AutoModelForImageTextToText

    folder = root / architecture
    teacher = reference(folder)
    scorer = make_architecture_scorer(folder, teacher)
    model = AutoModelForImageTextToText.from_pretrained(folder / "teacher").eval()
    processor = load_processor(folder / "teacher")
    part = samples_of(folder)
    records = scorer.score(part).records
    ready = {one.record.sample_id: one for one in scorer.prepare(part.samples).ready}
    for sample, tokens, rows in zip(part.samples, records.tokens, records.response or [], strict=True):
        if not sample.images:
            continue
        images = [Image.open(folder / path).convert("RGB") for path in sample.images]
        placeholder = get_placeholder(processor, processor.tokenizer.convert_ids_to_tokens(IMAGE_TOKEN_ID))
        written = write_visual_tokens(placeholder, processor)  # by which Gemma 3's ids replace what its template writes
        text = processor.tokenizer.decode(tokens.token_ids).replace(written, placeholder)
        inputs = processor(images=images, text=[text], return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"][0].numpy()
        assert ids.tolist() == ready[sample.id].expansion.token_ids.tolist()
        with torch.inference_mode():
            logits = model(**inputs).logits[0, :, :VOCAB_SIZE].double()
        logprobs = torch.log_softmax(logits, dim=-1).numpy()
        labels = tokens.token_ids[tokens.response_mask]
        predicting = ready[sample.id].response_positions
        assert ids[predicting + 1].tolist() == labels.tolist()
        assert rows.label_logprob is not None
        np.testing.assert_allclose(rows.label_logprob, logprobs[predicting, labels], atol=TOLERANCE)
        places = np.flatnonzero(ids == IMAGE_TOKEN_ID)
        counts = [image.num_visual_tokens for image in tokens.images]
        assert sum(counts) == len(places)
        for ref, where in zip(tokens.images, np.split(places, np.cumsum(counts)[:-1]), strict=True):
            seen = logits[where] - logits[where].mean(dim=0)
            gram = (seen @ seen.T).numpy()
            np.testing.assert_allclose(
                (records.relation or {})[ref.key].values, gram / np.linalg.norm(gram), atol=TOLERANCE
            )
            entropy = -(np.exp(logprobs[where]) * logprobs[where]).sum(axis=1)
            np.testing.assert_allclose((records.visual or {})[ref.key].entropy, entropy, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", SEEING)
def test_prompts_are_built_without_output(architecture: str, root: Path) -> None:
    """A warning a sample would bury everything else that a check or a dump prints."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert prepared(root / architecture)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in said if "processor_kwargs" in record.getMessage()] == []


BY_HAND = {  # visual tokens of 32 x 32, 64 x 32, 20 x 90 and 50 x 40 pixels
    "llava": [16, 16, 16, 16],  # patches of 8 pixels of a square
    # whole picture 4 x 4, then tiles of 4 x 4 with a newline after each row, without the rows that padding fills:
    # 4 x (4 + 1); 4 x (8 + 1); 12 rows of 2 + 1; 8 x 8 less one of its rows at the top and the bottom: 6 x (8 + 1)
    "llava_onevision": [16 + 20, 16 + 36, 16 + 36, 16 + 54],
    # blocks of 16 pixels: 2 x 2, 4 x 2, 1 x 6, 3 x 2 (of 2.5, the even)
    "qwen2_vl": [4, 8, 6, 6],
    "qwen2_5_vl": [4, 8, 6, 6],
    # 4 for each tile of 32 pixels, once the longer side has 64, and 4 for the whole picture
    "idefics3": [4 * 5, 4 * 3, 4 * 3, 4 * 5],
    "smolvlm": [4 * 5, 4 * 3, 4 * 3, 4 * 5],
    "qwen3_vl": [4, 8, 6, 6],  # as Qwen2-VL
    "qwen3_vl_moe": [4, 8, 6, 6],
    "qwen3_5": [4, 8, 6, 6],
    # 4 for each of 1, 2, 4 and 1 tiles of 32 pixels, and 4 for the whole picture where there are several
    "internvl": [4, 4 * 3, 4 * 5, 4],
    "gemma3": [4, 4, 4, 4],  # 16 patches of a square, pooled by 2 x 2
    # blocks of 12 pixels, at most 70 in an image's proportions: 8 x 8, 11 x 5, 3 x 17, 9 x 7
    "gemma4": [64, 55, 51, 63],
}
FIXED_GRIDS = ("llava", "gemma3")


@pytest.mark.parametrize("architecture", SEEING)
def test_visual_tokens_by_hand(architecture: str, root: Path) -> None:
    grid = VisualGrid(load_processor(root / architecture / "teacher"), IMAGE_TOKEN_ID)
    sizes = ((32, 32), (64, 32), (20, 90), (50, 40))
    counts = [int(np.count_nonzero(grid.ids(Image.new("RGB", size)) == IMAGE_TOKEN_ID)) for size in sizes]
    assert counts == BY_HAND[architecture]
    assert grid.is_fixed == (architecture in FIXED_GRIDS)


def test_separators_are_no_visual_tokens(root: Path) -> None:
    folder = root / "idefics3"
    processor = load_processor(folder / "teacher")
    ids = VisualGrid(processor, IMAGE_TOKEN_ID).ids(Image.new("RGB", (64, 32)))
    around, image = "<fake_token_around_image>", ["<image>"] * 4
    assert processor.tokenizer.convert_ids_to_tokens(ids.tolist()) == [
        around, "<row_1_col_1>", *image, around, "<row_1_col_2>", *image, "Ċ", "Ċ",
        around, "<global-img>", *image, around,
    ]  # fmt: skip
    three = prepared(folder)["three"]
    assert all((three.expansion.token_ids[places] == IMAGE_TOKEN_ID).all() for places in three.expansion.visual)
    assert sum(map(len, three.expansion.visual)) == np.count_nonzero(three.expansion.token_ids == IMAGE_TOKEN_ID)


class BlindTeacher:
    """Shows its teacher a grey picture of the right size in place of every image."""

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher = teacher

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        return self._teacher.hidden_states(
            [TeacherPrompt(p.token_ids, tuple(image.point(lambda _: 128) for image in p.images)) for p in prompts]
        )


@pytest.mark.parametrize("architecture", in_engine([name for name in SEEING if name in SERVED]))
def test_the_vision_check_tells_a_working_teacher_from_a_blind_one(architecture: str, asked: Path) -> None:
    folder = asked / architecture
    sight = read_vision_check(folder)  # in vLLM itself
    assert sight is not None
    assert sight.num_samples == 4
    assert sight.change > 0.01 > 1e-4 > sight.noise
    assert sight.marked is not None
    assert sight.turned is not None
    assert sight.turned > 0.01 > 1e-4 > sight.marked  # a file that lies upside down, and pixels that do
    head = read_head(folder / "teacher", vocab_size=VOCAB_SIZE)
    with pytest.raises(StillhouseError, match="the teacher is blind"):
        check_vision(
            make_architecture_scorer(folder, BlindTeacher(reference(folder))),
            head,
            choose_check_samples(samples_of(folder).samples, 4),
        )
