"""Students of every architecture: forward passes in batches, parts, saved checkpoints, answers, training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.errors import ConfigError, IdentityError
from storage.identity import Identity
from storage.images.placeholders import get_placeholder
from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from storage.records.records import SampleRecord
from storage.records.sample_batch import SampleBatch
from storage.selection import Threshold, TopK
from storage.writer.cache_writer import CacheWriter
from student_train.config import EvaluationSection, SourceSection, StageSection
from student_train.data.collate import collate, collate_prompts, cut_prompt
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.evaluation.ask import answer_question
from student_train.evaluation.generation import generate_greedily
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.losses.config import LossesSection
from student_train.losses.relation import compute_head_gram, relation_loss, stack_relations
from student_train.losses.row_counts import RowCounts
from student_train.models.checkpoint import save_checkpoint
from student_train.models.huggingface import load_processor, load_weights
from student_train.models.loading import (
    Checkpoint,
    check_trained_parts,
    find_part,
    freeze,
    load_for_inference,
    load_student,
)
from student_train.models.loading import read_checkpoint as read
from student_train.models.parameter_groups import make_parameter_groups
from student_train.models.student import Student
from student_train.models.trained_parameters import count_model_parameters
from student_train.training.objective import Objective
from student_train.training.stage_data import list_loss_families, load_cached_teacher, prepare_stage_data
from teacher_dump.prompts import processor
from teacher_dump.prompts.image_tokens import VisualGrid, expand_image_tokens
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.student_train.caches import join_records
from tests.student_train.conftest import Runner
from tests.teacher_dump.architectures import ASKED, samples_of, write_samples
from tests.teacher_dump.scorers import NOTHING, make_scorer
from tests.tiny_architectures import ARCHITECTURES, REFUSED_STUDENTS, TEXT_ONLY, make_teacher
from tests.tiny_parts import VOCAB_SIZE

BLIND = TEXT_ONLY
GENERAL = [name for name in ARCHITECTURES if name != "llava" and name not in REFUSED_STUDENTS]
TOLERANCE = 2e-5  # of the largest logit, in float32
LOSSES = {"response": {}, "visual": {}, "relation": {"weight": 0.5}}


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny checkpoint, samples with images of several sizes, and batches of them."""

    folder: Path
    checkpoint: Checkpoint
    samples: dict[str, SampleRecord]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def vision(self) -> VisionGatherer:
        folder = ImageFolder(self.folder, self.checkpoint.image_processor, pixels=PixelSettings())
        return VisionGatherer(folder, features=None, pixels=TensorStore(0))

    def whole_logits(self, model: Any, sample_id: str) -> Tensor:
        """Run the model's own forward pass on one sample, with its own processor's image inputs."""
        tokens = self.samples[sample_id].tokens
        own = load_processor(self.folder / "teacher")
        pictures = [self.vision._folder.load_picture(image, sample_id=sample_id) for image in tokens.images]
        image_token_id = self.checkpoint.sequence_format.image_token_id
        ids = tokens.token_ids.astype(np.int64)
        inputs: dict[str, Tensor] = {}
        if pictures:
            sequence_format = VisualGrid(own, image_token_id)
            ids = expand_image_tokens(
                tokens.token_ids, [sequence_format.ids(picture) for picture in pictures], image_token_id
            ).token_ids
            image_token = own.tokenizer.convert_ids_to_tokens(image_token_id)
            marks = get_placeholder(own, image_token) * len(pictures)
            inputs = dict(own(images=pictures, text=[marks], return_tensors="pt"))
            del inputs["input_ids"], inputs["attention_mask"]
            for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
                inputs[name] = torch.from_numpy(ids == image_token_id).long()[None]
        return model(input_ids=torch.from_numpy(ids)[None], **inputs).logits[0, :, :VOCAB_SIZE]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Returns cases by architecture, each made once."""
    root, made = tmp_path_factory.mktemp("students"), {}

    def case(name: str) -> Case:
        if name not in made:
            folder = root / name
            make_teacher(folder / "teacher", name)
            write_samples(folder, with_images=name not in BLIND)
            scorer = make_scorer(folder / "teacher", folder, NOTHING, None, max_length=512)
            records = scorer.score(samples_of(folder)).records.tokens
            made[name] = Case(
                folder, read(folder / "teacher"), {each.sample_id: SampleRecord(each) for each in records}
            )
        return made[name]

    return case


@pytest.fixture(params=GENERAL)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


@torch.no_grad()
def test_logits_of_padded_batches_are_those_of_the_whole_model(case: Case) -> None:
    student = load_for_inference(case.checkpoint, vocab_size=VOCAB_SIZE)
    ids = list(case.samples)
    for chosen in (ids, ids[:2]):  # the second without any image
        records = [case.samples[sample_id] for sample_id in chosen]
        batch = collate(join_records(records), case.checkpoint.sequence_format, case.vision.gather)
        hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
        logits = student.compute_logits(hidden).view(*batch.input_ids.shape, -1)
        for row, record in enumerate(records):
            expected = case.whole_logits(student.model, record.tokens.sample_id)
            length = int(batch.lengths[row])
            assert len(expected) == length
            error = (logits[row, :length] - expected).abs().max() / expected.abs().max()
            assert error < TOLERANCE, (case.name, record.tokens.sample_id, float(error))
        flat = batch.input_ids.flatten()
        assert flat[batch.response_positions + 1].tolist() == batch.labels.tolist()
        assert set(flat[batch.visual_positions].tolist()) <= {case.checkpoint.sequence_format.image_token_id}


def test_a_batch_without_images_reaches_the_tower_with_no_effect(case: Case) -> None:
    model = load_student(case.checkpoint, precision="fp32", device=torch.device("cpu"))
    freeze(model, ("llm",) if case.name in BLIND else ("vision", "projector", "llm"))
    student = Student(
        model, vocab_size=VOCAB_SIZE, image_token_id=case.checkpoint.sequence_format.image_token_id, features=None
    )
    records = [case.samples["text"], case.samples["text-again"]]
    batch = collate(join_records(records), case.checkpoint.sequence_format, case.vision.gather)
    hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
    with torch.no_grad():
        expected = case.whole_logits(model, "text")
        torch.testing.assert_close(student.compute_logits(hidden)[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    hidden.square().sum().backward()
    gradients = dict.fromkeys(("vision", "projector", "llm"), 0.0)
    for name, parameter in model.named_parameters():
        part = find_part(name)
        assert part is not None
        if parameter.grad is not None:
            gradients[part] += float(parameter.grad.abs().sum())
    assert gradients["llm"] > 0
    assert gradients["vision"] == gradients["projector"] == 0
    if case.name not in BLIND:  # they have gradients, of 0: every rank's reduction has the same tensors
        assert all(p.grad is not None for name, p in model.named_parameters() if find_part(name) == "projector")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("llava_onevision", ("model.multi_modal_projector", "model.image_newline")),
        ("qwen2_vl", ("model.visual.merger",)),
        ("idefics3", ("model.connector",)),
        ("qwen3_vl", ("model.visual.merger", "model.visual.deepstack_merger_list")),
        ("internvl", ("model.multi_modal_projector",)),
    ],
)
def test_the_projector_alone_trains(part: str, expected: tuple[str, ...], case_of: Callable[[str], Case]) -> None:
    checkpoint = case_of(part).checkpoint
    model = load_student(checkpoint, precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector",))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith(expected) for name in trained)
    assert model.get_submodule(expected[0]).training
    assert {prefix for name in trained for prefix in expected if name.startswith(prefix)} == set(expected)
    assert not model.get_submodule("model.visual.blocks" if "qwen" in part else "lm_head").training
    counts = count_model_parameters(model, ("projector",))
    assert set(counts["projector"].names) == set(expected)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts["projector"].num_trained
    assert sum(count.num_all for count in counts.values()) == sum(p.numel() for p in model.parameters())
    freeze(model, ("vision", "projector", "llm"))
    groups = make_parameter_groups(model, lr=1.0, module_lr={"projector": 0.5}, weight_decay=0.0)
    own = [parameter for group in groups if group.lr_factor == 0.5 for parameter in group.parameters]
    assert sum(parameter.numel() for parameter in own) == counts["projector"].num_all
    freeze(model, ("vision", "llm"))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name.startswith(expected)]
    freeze(model, ("mlp",))
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"mlp"}
    freeze(model, ("layers",))
    for name, parameter in model.named_parameters():
        in_layer = re.match(r"model\.(language_model\.|text_model\.)?layers\.", name) is not None
        assert parameter.requires_grad == in_layer, name
    counts = count_model_parameters(model, ("layers",))
    assert counts["layers"].num_trained + counts["mlp"].num_trained == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert counts["llm"].num_trained == 0


@pytest.mark.parametrize("architecture", REFUSED_STUDENTS)
def test_a_student_that_the_losses_do_not_fit_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED_STUDENTS[architecture])):
        read(make_teacher(tmp_path, architecture))


def test_parts_that_an_architecture_lacks_are_refused_before_loading(case_of: Callable[[str], Case]) -> None:
    for name in GENERAL:
        known = ("llm", "layers", "mlp") if name in BLIND else ("vision", "projector", "llm", "layers", "mlp")
        check_trained_parts(case_of(name).checkpoint, known)
    with pytest.raises(ConfigError, match=r"train: .* a 'llama' has no projector; it has layers, llm, mlp"):
        check_trained_parts(case_of("llama").checkpoint, ("projector", "llm"))


def test_a_saved_student_gives_the_same_logits_to_anyone(case: Case, tmp_path: Path) -> None:
    model = load_student(case.checkpoint, precision="fp32", device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        expected = case.whole_logits(model, list(case.samples)[-1])
    save_checkpoint(model, tmp_path / "saved", case.folder / "teacher")
    saved = load_weights(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(case.whole_logits(saved, list(case.samples)[-1]), expected, rtol=0, atol=0)
    again = read(tmp_path / "saved")
    assert again.sequence_format == case.checkpoint.sequence_format


def test_answers_of_a_batch_are_those_of_each_prompt_alone(case: Case) -> None:
    student = load_for_inference(case.checkpoint, vocab_size=VOCAB_SIZE)
    sequence_format = case.checkpoint.sequence_format
    prompts = [
        cut_prompt(each.tokens, image_token_id=sequence_format.image_token_id)
        for each in list(case.samples.values())[:6]
    ]
    eos = (case.checkpoint.tokenizer.eos_token_id,)
    gather = case.vision.gather
    together = generate_greedily(
        student,
        collate_prompts(SampleBatch.of_tokens(prompts), sequence_format, gather),
        max_new_tokens=4,
        eos_token_ids=eos,
    )
    for prompt, got in zip(prompts, together, strict=True):
        alone = generate_greedily(
            student,
            collate_prompts(SampleBatch.of_tokens([prompt]), sequence_format, gather),
            max_new_tokens=4,
            eos_token_ids=eos,
        )
        assert [got] == alone
        assert all(token < VOCAB_SIZE for token in got)
    if case.name not in BLIND:
        assert isinstance(answer_question(case.folder / "teacher", case.folder / "wide.png", "what?", 3), str)


def dumped(case: Case, folder: Path) -> Path:
    """Dump a cache with the case's checkpoint as the teacher, through the transformers backend."""
    request = SignalRequest(
        response=RowRequest(TopK(16), 0), visual=RowRequest(Threshold(0.05), 0), relation_centered=False
    )
    teacher_folder = case.folder / "teacher"
    facts = fingerprint.read_processor_facts(teacher_folder, processor.load_processor(teacher_folder))
    engine = TransformersTeacher(teacher_folder, dtype="float32", image_token_id=facts.image_token_id, settings={})
    scored = make_scorer(teacher_folder, case.folder, request, engine, max_length=512).score(samples_of(case.folder))
    identity = Identity(
        teacher=str(teacher_folder), teacher_fingerprint="a", dtype="float32", engine="transformers",
        tokenizer_fingerprint=facts.tokenizer_fingerprint, vocab_size=facts.vocab_size,
        chat_template_fingerprint="a", image_preprocessing_fingerprint=facts.image_preprocessing_fingerprint,
        pixels=facts.pixels, image_processor=facts.image_processor,
        image_token_id=facts.image_token_id, eos_token_ids=facts.eos_token_ids, plan_fingerprint="a", num_parts=1,
        image_root=str(case.folder),
        selection={
            "response": {"method": "topk", "k": 16}, "visual": {"method": "threshold", "tau": 0.05},
            "relation": {"centered": False},
        },
    )  # fmt: skip
    writer = CacheWriter.open(folder, identity, ("response", "visual", "relation"))
    assert not scored.records.errors
    writer.write_part(0, scored.records)
    writer.seal()
    return folder


@pytest.fixture(scope="module")
def onevision_cache(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumped(case_of("llava_onevision"), tmp_path_factory.mktemp("dump") / "cache")


def test_losses_over_images_of_several_sizes_are_means_over_images(
    case_of: Callable[[str], Case], onevision_cache: Path
) -> None:
    """Compared with a slow reference: one sample and one image after another, through whole logits."""
    case = case_of("llava_onevision")
    stage = StageSection.model_validate({"init": str(case.folder / "teacher"), "steps": 1, "losses": LOSSES})
    stage_data = prepare_stage_data(stage, str(onevision_cache))
    model = load_student(stage_data.checkpoint, precision="fp32", device=torch.device("cpu"))
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight += 0.1 * noise  # another model than the teacher
    student = Student(model, vocab_size=VOCAB_SIZE, image_token_id=VOCAB_SIZE - 1, features=None)
    losses = LossesSection.model_validate(LOSSES)
    objective = Objective(student, losses, load_cached_teacher(stage_data, losses), chunk_logits=1 << 22)
    vision = VisionGatherer(
        stage_data.mixture.images(stage_data.checkpoint.image_processor), features=None, pixels=TensorStore(0)
    )
    rows = np.arange(len(stage_data.table))
    totals = stage_data.table.count_rows(rows)
    samples = stage_data.mixture.read_many(stage_data.table.indices)
    batch = collate(samples, stage_data.checkpoint.sequence_format, vision.gather, families=list_loss_families(losses))
    assert len(batch.image_runs) > 3
    assert totals.visual == sum(run.num_images * run.teacher for run in batch.image_runs)
    with torch.no_grad():
        parts = objective(batch, totals, totals)
        metric = compute_head_gram(model.lm_head.weight, vocab_size=VOCAB_SIZE)
        sums = {"visual": 0.0, "relation": 0.0, "rows": 0, "images": 0}
        for record in samples.records():
            one = collate(
                join_records([record]),
                stage_data.checkpoint.sequence_format,
                vision.gather,
                families=list_loss_families(losses),
            )
            states = student.compute_hidden(one.input_ids, one.visual_positions, one.vision)
            start = 0
            for image in record.tokens.images:
                places = one.visual_positions[start : start + image.num_visual_tokens]
                start += image.num_visual_tokens
                of_image = states[places]
                relation = record.relation[image.key]
                relations = stack_relations([relation], size=image.num_visual_tokens)
                sums["relation"] += relation_loss(of_image[None], metric, relations).item()
                sums["images"] += 1
            alone = RowCounts(response=1, visual=1, relation=1, samples=1)
            sums["visual"] += objective(one, alone, alone)["visual"].item()
            sums["rows"] += start
    assert sums["rows"] == totals.visual
    assert sums["images"] == totals.relation
    assert parts["relation"].item() == pytest.approx(sums["relation"] / sums["images"], rel=1e-4)
    assert parts["visual"].item() == pytest.approx(sums["visual"] / sums["rows"], rel=1e-4)
    assert parts["visual"].item() > 1e-3


def test_the_teacher_has_loss_0_on_its_own_cache(case_of: Callable[[str], Case], onevision_cache: Path) -> None:
    case = case_of("llava_onevision")
    stage = StageSection.model_validate({"init": str(case.folder / "teacher"), "steps": 1, "losses": LOSSES})
    stage_data = prepare_stage_data(stage, str(onevision_cache))
    losses = LossesSection.model_validate(LOSSES)
    model = load_student(stage_data.checkpoint, precision="fp32", device=torch.device("cpu"))
    student = Student(model, vocab_size=VOCAB_SIZE, image_token_id=VOCAB_SIZE - 1, features=None)
    objective = Objective(student, losses, load_cached_teacher(stage_data, losses), chunk_logits=1 << 22)
    vision = VisionGatherer(
        stage_data.mixture.images(stage_data.checkpoint.image_processor), features=None, pixels=TensorStore(0)
    )
    samples = stage_data.mixture.read_many(stage_data.table.indices)
    batch = collate(samples, stage_data.checkpoint.sequence_format, vision.gather, families=list_loss_families(losses))
    totals = stage_data.table.count_rows(np.arange(len(stage_data.table)))
    with torch.no_grad():
        parts = objective(batch, totals, totals)
    assert parts["response"].item() < 2e-3  # rounded rows
    assert parts["relation"].item() < 1e-2


def test_a_stage_trains_saves_and_evaluates(
    make_runner: Callable[..., Runner], case_of: Callable[[str], Case], onevision_cache: Path
) -> None:
    init = case_of("llava_onevision").folder / "teacher"
    stage = {
        "init": str(init), "cache": str(onevision_cache), "losses": LOSSES, "steps": 2, "global_batch": 4,
        "micro_batch": 2, "zero_stage": 2, "train": ["projector", "llm"],
    }  # fmt: skip
    runner = make_runner(dft=stage)
    (outcome,) = runner.run_in_turn(("dft",))
    assert outcome.code == 0, outcome.stderr
    lines = [json.loads(line) for line in (runner.output("dft") / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(np.isfinite(line["loss"]) for line in lines)
    section = EvaluationSection(splits=("train",), max_new_tokens=3, batch=4)
    document = evaluate_model(runner.output("dft"), [SourceSection(path=str(onevision_cache))], section)
    assert document["num_samples"] == len(ASKED)
    assert document["kl_to_teacher"] < 1


def test_a_student_that_tiles_images_differently_is_refused_for_visual_losses(
    case_of: Callable[[str], Case], onevision_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(case_of("llava_onevision").folder / "teacher", tmp_path / "other")
    path = tmp_path / "other" / "processor_config.json"
    document = json.loads(path.read_text())
    document["image_processor"]["image_grid_pinpoints"] = [[32, 32], [32, 64]]
    path.write_text(json.dumps(document))
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text()) | {"image_grid_pinpoints": [[32, 32], [32, 64]]}
    path.write_text(json.dumps(config))
    stage = {"init": str(tmp_path / "other"), "steps": 1, "losses": {"response": {}}}
    stage_data = prepare_stage_data(StageSection.model_validate(stage), str(onevision_cache))
    vision = VisionGatherer(
        stage_data.mixture.images(stage_data.checkpoint.image_processor), features=None, pixels=TensorStore(0)
    )
    samples = Cache.open(onevision_cache).read_many(stage_data.table.indices)
    collate(samples, stage_data.checkpoint.sequence_format, vision.gather, families=("response",))
    with pytest.raises(IdentityError, match=r"visual grid: the cache has \d+ visual tokens .* this student makes \d+"):
        collate(samples, stage_data.checkpoint.sequence_format, vision.gather, families=("response", "visual"))


def test_a_model_whose_logits_are_not_its_head_s_is_refused(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    folder = case_of("llama").folder / "teacher"
    shutil.copytree(folder, tmp_path / "capped")
    config = json.loads((folder / "config.json").read_text())
    config["final_logit_softcapping"] = 30.0
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"has final_logit_softcapping = 30\.0"):
        read(tmp_path / "capped")
