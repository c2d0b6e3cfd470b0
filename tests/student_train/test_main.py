"""Complete trainings through the command line, each in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from storage.images.settings import PixelSettings, read_pixel_settings
from storage.reader.cache import Cache
from student_train import evaluate
from student_train.config import EvaluationSection, SourceSection
from student_train.evaluation.ask import answer_question
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.template_arguments import read_template_arguments
from tests.student_train.caches import make_cache
from tests.student_train.conftest import Outcome, Runner
from tests.student_train.courses import assert_same_course, metrics

LOSSES = {"response": {}, "visual": {"weight": 0.5}, "relation": {"weight": 0.5}}
WITHOUT = '''
import sys
class Without:
    """A finder that hides some packages, as if they were not installed."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "ray", "teacher_dump", "stillhouse", "torchvision", "torchaudio"):
            return None
        return self.finder.find_spec(name, path, target)
    def find_distributions(self, *arguments, **options):
        return getattr(self.finder, "find_distributions", lambda *a, **k: ())(*arguments, **options)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
'''
GIVEN = {"tokenisation": 2, "chat_template_arguments": {"enable_thinking": False}}
Make = Callable[..., Runner]


@dataclass(frozen=True)
class Alone:
    """What one process did that trained one stage after another, and the cache that `memory` learnt by heart."""

    runner: Runner
    outcomes: dict[str, Outcome]
    small_cache: Path

    def output(self, stage: str) -> Path:
        assert self.outcomes[stage].code == 0, self.outcomes[stage].stderr
        return self.runner.output(stage)


@pytest.fixture(scope="module")
def alone(make_runner: Make, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """One rank and one process without vllm, ray, the dump, the command and torchvision."""
    broken, small = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("small")
    tiny = {"num_images": 2, "splits": ("train",)}
    broken_cache = make_cache(broken, checkpoint, num_samples=4, **tiny)
    method = {"method": "threshold", "tau": 0.02}
    selection = {"response": method, "visual": method, "relation": {"centered": False}, "tokens": GIVEN}
    small_cache = make_cache(small, checkpoint, num_samples=6, k=None, tau=0.02, selection=selection, **tiny)
    Image.new("RGB", (32, 32)).save(broken / "images" / "train-1.png")
    memory = {
        "cache": str(small_cache), "steps": 120, "global_batch": 6, "micro_batch": 2, "zero_stage": 0,
        "lr": 5e-3, "losses": {"response": {"treatment": "unbiased"}},
    }  # fmt: skip
    runner = make_runner(
        broken={"cache": str(broken_cache), "global_batch": 4, "micro_batch": 4},
        hot={"lr": 1e30, "clip_norm": 1e30, "global_batch": 3, "micro_batch": 3},
        all={"losses": LOSSES},
        memory=memory,
        bf16={"precision": "bf16", "losses": LOSSES},
        misjudged={},
    )
    names = ("broken", "hot", "all", "memory", "bf16", "misjudged")
    splits = {"memory": "train", "misjudged": "nowhere"}
    evaluated = {name: ("--evaluate", f"evaluation.splits=[{split}]") for name, split in splits.items()}
    lines = [(name, *evaluated.get(name, ())) for name in names]
    return Alone(runner, dict(zip(names, runner.run_in_turn(*lines, prologue=WITHOUT), strict=True)), small_cache)


def test_a_student_trains_where_the_teacher_s_packages_are_absent(alone: Alone) -> None:
    folder = alone.output("all")
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
        "metrics.jsonl", "summary.json", "deepspeed.log",
    }  # fmt: skip
    assert read_pixel_settings(folder) == PixelSettings()  # those of the cache
    assert read_template_arguments(folder) == {}
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["samples_per_s"] > 0 for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "stage": "all", "seed": 0, "steps": 4, "num_processes": 1,
        "final": {name: lines[-1][name] for name in ("loss", "cross_entropy", "response", "visual", "relation")},
    }.items() <= summary.items()  # fmt: skip
    assert summary["num_trained_parameters"] < summary["num_parameters"]
    assert summary["seconds"] > 0
    assert summary["peak_memory_bytes"] > 10**7


def test_a_missing_evaluation_split_is_refused_before_training(alone: Alone) -> None:
    outcome = alone.outcomes["misjudged"]
    assert outcome.code == 2
    assert "no sample is in the splits nowhere" in outcome.stderr
    assert not (alone.runner.output("misjudged") / "model.safetensors").exists()


def test_bf16_follows_fp32(alone: Alone) -> None:
    for low, full in zip(metrics(alone.output("bf16")), metrics(alone.output("all")), strict=True):
        assert low["loss"] == pytest.approx(full["loss"], rel=0.05)
    weights = load_file(alone.output("bf16") / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("zero_stage", "micro_batch", "ranks", "nodes"),
    [(2, 4, 2, 2), pytest.param(3, 2, 4, 1, marks=[pytest.mark.ci, pytest.mark.slow])],
)
def test_any_number_of_ranks_and_nodes_gives_the_same_training(
    make_runner: Make, alone: Alone, zero_stage: int, micro_batch: int, ranks: int, nodes: int
) -> None:
    """Two nodes with one rank each, and one node with four ranks: micro-batches of other sizes, a chunked head."""
    fields = {"losses": LOSSES, "chunk_logits": 300 * 20, "zero_stage": zero_stage, "micro_batch": micro_batch}
    runner = make_runner(split=fields)
    (outcome,) = runner.run_in_turn(("split",), ranks=ranks, nodes=nodes)
    assert outcome.code == 0, outcome.stderr
    assert_same_course(runner.output("split"), alone.output("all"))
    assert json.loads((runner.output("split") / "summary.json").read_text())["num_processes"] == ranks


def test_a_trained_student_answers(alone: Alone) -> None:
    folder, path = alone.output("memory"), alone.small_cache
    assert read_template_arguments(folder) == GIVEN["chat_template_arguments"]  # those of its cache
    document = json.loads((folder / "evaluation.json").read_text())
    assert document["exact_match"] == 1.0
    cache = Cache.open(path, ())
    image = Path(cache.identity.image_root) / cache.read(0).tokens.images[0].path
    reference = document["samples"][0]["reference"]
    assert reference in ("red", "green", "blue", "white")
    assert answer_question(folder, image, "what colour is the left half?") == reference
    assert answer_question(folder, image, "describe the image.", max_new_tokens=2) != reference


def top_is_label(path: Path) -> float:
    """Return the fraction of response rows whose most probable token is the label (the teacher is random)."""
    cache, hits = Cache.open(path), []
    for index in range(cache.num_samples):
        record = cache.read(index)
        assert record.response is not None
        tops = record.response.ids[record.response.offsets[:-1]]
        hits += (tops == record.tokens.token_ids[record.tokens.response_mask]).tolist()
    return sum(hits) / len(hits)


def test_an_evaluation_has_all_promised_fields(alone: Alone) -> None:
    folder, path = alone.output("memory"), alone.small_cache
    document = evaluate_model(folder, [SourceSection(path=str(path))], EvaluationSection(splits=("train",), batch=4))
    written = json.loads((folder / "evaluation.json").read_text())
    assert written == document
    assert document["num_samples"] == 6
    assert set(document["by_category"]) == {"left", "right", "caption"}
    assert sum(category["num"] for category in document["by_category"].values()) == 6
    assert 0 < document["kl_to_teacher"] < 2
    assert 0 < document["cross_entropy"] < 1  # it answers every question rightly, as a teacher taught it who was unsure
    assert document["top1_agreement"] == pytest.approx(top_is_label(path))  # it gives each label the most
    assert set(document["samples"][0]) == {"sample_id", "turn", "category", "answer", "reference", "correct"}
    assert [sample["sample_id"] for sample in document["samples"]] == [f"train-{n:03d}" for n in range(6)]


def test_the_evaluation_s_command_line(alone: Alone, capsys: pytest.CaptureFixture[str]) -> None:
    config, model = str(alone.runner.config), str(alone.output("memory"))
    overrides = [f"cache.path={alone.small_cache}", "evaluation.splits=[train]"]
    assert evaluate.main([config, "--model", model, *overrides]) == 0
    assert capsys.readouterr().out == f"{model}: exact match 100.0% of 6\n"
    assert evaluate.main([config, "--model", model, overrides[0], "evaluation.splits=[nowhere]"]) == 2
    assert "no sample is in the splits nowhere" in capsys.readouterr().err
    assert evaluate.main([config, "--model", f"{model}-not", *overrides]) == 2


def test_a_cache_of_tokens_alone_gives_no_fidelity(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=3, families=())
    document = evaluate_model(checkpoint, [SourceSection(path=str(path))], EvaluationSection(max_new_tokens=3))
    assert document["cross_entropy"] > 0
    assert document["kl_to_teacher"] is None
    assert document["top1_agreement"] is None
    (checkpoint / "evaluation.json").unlink()


def test_a_user_s_mistake_gives_one_message_and_exit_code_2(make_runner: Make) -> None:
    runner = make_runner(run={})
    done = runner.run("rnu")
    assert done.code == 2
    assert done.stderr == f"error: {runner.config}: there is no stage 'rnu'; the file has run\n"
    done = runner.run("run", "stages.run.lr=fast")
    assert done.code == 2
    assert "stages.run.lr: got 'fast'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_image_stops_training_and_is_named(alone: Alone) -> None:
    done = alone.outcomes["broken"]
    assert done.code == 1
    assert "train-1.png: sha256 is" in done.stderr
    assert not (alone.runner.output("broken") / "summary.json").exists()


def test_a_loss_that_is_not_finite_stops_training_and_names_the_samples(alone: Alone) -> None:
    done = alone.outcomes["hot"]
    assert done.code == 1
    assert "lower stages.NAME.lr" in done.stderr
    assert "train-0" in done.stderr
    document = json.loads((alone.runner.output("hot") / "diverged-0.json").read_text())
    assert set(document["not_finite"].values()) <= {"nan", "inf", "-inf"}
    assert len(document["micro_batches"][0]["sample_ids"]) == 3
    assert not (alone.runner.output("hot") / "model.safetensors").exists()
