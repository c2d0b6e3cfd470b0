"""Tiny stand-ins of what the recipes for GPUs name: models of the same architectures, data of the same file shapes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stillhouse.config import Experiment
from storage.processes import torchvision_shim
from student_train.models.loading import is_hub_id
from teacher_dump.config import SourceSection
from tests.tiny import CHAT_TEMPLATE, make_tiny_dataset, make_tiny_tokenizer
from tests.tiny_architectures import make_teacher

_END = "<|endoftext|>"
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
_ARCHITECTURES = {  # of whole models of the Hub, by a part of their name
    "llava-onevision": "llava_onevision",
    "Qwen2.5-VL": "qwen2_5_vl",
    "SmolVLM2": "smolvlm",
}


def make_hub_model(name: str, root: Path) -> Path:
    """The stand-in of a Hub id, made once."""
    folder = root / name.replace("/", "--")
    if folder.is_dir():
        return folder
    torchvision_shim.import_torch_companions()
    if "siglip" in name or "clip" in name:
        return _make_tower(folder, is_clip="clip-vit" in name)
    if "Qwen3-VL" in name:
        return make_teacher(folder, "qwen3_vl")
    for part, architecture in _ARCHITECTURES.items():
        if part in name:
            return make_teacher(folder, architecture)
    return _make_decoder(folder)


def _make_tower(folder: Path, *, is_clip: bool) -> Path:
    """A whole SigLIP or CLIP, as on the Hub, of 4 x 4 patches."""
    import torch
    import transformers

    torch.manual_seed(0)
    vision, text = {"image_size": 32, "patch_size": 8, **_SIZES}, {**_SIZES, "vocab_size": 50}
    if is_clip:
        model: Any = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
        size = {"height": 32, "width": 32}
        images: Any = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def _make_decoder(folder: Path) -> Path:
    """A base Qwen2: ChatML in its template, `<|endoftext|>` as its end, weights that carry an image to the answer."""
    import torch
    import transformers

    tokenizer = make_tiny_tokenizer((_END, "<|im_start|>", "<|im_end|>"), image_token=None, template=CHAT_TEMPLATE)
    tokenizer.eos_token = _END
    config = transformers.Qwen2Config(
        **_SIZES, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15 if "layers" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(source: SourceSection, root: Path) -> Path:
    """A source's file, of the shape that its name promises; its images lie below `root`."""
    path = root / f"{source.split}-{Path(source.path).name}"
    if path.exists():
        return path
    made = make_tiny_dataset(root, num_samples=8, num_images=8, turns=1 if source.template == "caption" else 2)
    rows = [json.loads(line) for line in made["train"].read_text().splitlines()]
    if path.suffix == ".parquet":
        _write_pairs(path, rows, root)
        return path
    if source.template == "chat":
        asked = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "it is so."}]
        rows.append({"id": "text", "conversations": asked})  # mix665k has samples without an image
    path.write_text(json.dumps(rows))
    return path


def _write_pairs(path: Path, rows: list[dict[str, Any]], root: Path) -> None:
    """RLAIF-V's columns: the image's bytes, a question, two answers."""
    table = []
    for row in rows:
        content = io.BytesIO()
        Image.open(root / row["image"]).save(content, format="JPEG")
        table.append(
            {
                "image": {"bytes": content.getvalue(), "path": None},
                "question": row["conversations"][0]["value"].replace("<image>\n", ""),
                "chosen": row["conversations"][1]["value"],
                "rejected": "it is white.",
            }
        )
    pq.write_table(pa.Table.from_pylist(table), path)


def make_overrides(experiment: Experiment, root: Path, *, teacher: Path | None) -> list[str]:
    """Overrides of paths, sizes and steps, by which a recipe runs whole on a CPU; nothing else but the backend.

    `teacher`: stands in for a teacher that another recipe makes.
    """
    given: dict[str, Any] = {"runs_dir": str(root / "runs"), "dump.samples_per_part": 16, "dump.actors": 1}
    for number, source in enumerate(experiment.data.sources):
        given[f"data.sources.{number}.path"] = str(make_data(source, root))
        if source.images is not None:
            given[f"data.sources.{number}.images"] = str(root)
    if experiment.data.extracted is not None:
        given["data.extracted"] = str(root / "extracted")
    model = experiment.teacher.model
    if teacher is not None:
        given["teacher.model"] = str(teacher)
    elif is_hub_id(model) and not model.startswith("runs/"):
        given["teacher.model"] = str(make_hub_model(model, root))
    if experiment.cache.families:
        given |= {"teacher.backend": "transformers", "dump.gpus_per_actor": 0}
    for name, changes in _read_more_caches(experiment).items():
        (fields,) = changes["data.sources"]
        path = str(make_data(SourceSection(**fields), root))
        given[f"more_caches.{name}.set"] = {**changes, "data.sources": [{**fields, "path": path, "images": str(root)}]}
    made = {stage.output.replace("{stage}", name) for name, stage in experiment.stages.items()}
    for name, stage in experiment.stages.items():
        place = f"stages.{name}"
        given |= {f"{place}.epochs": None, f"{place}.steps": 2, f"{place}.global_batch": 4, f"{place}.micro_batch": 2}
        given[f"{place}.output"] = str(root / "made" / experiment.name / name)
        if stage.init in made:
            given[f"{place}.init"] = str(root / "made" / experiment.name / Path(stage.init).name)
        elif stage.compose is None:
            given[f"{place}.init"] = str(make_hub_model(stage.init, root))
        else:
            given[f"{place}.compose.vision"] = str(make_hub_model(stage.compose.vision, root))
            given[f"{place}.compose.llm"] = str(make_hub_model(stage.compose.llm, root))
            if stage.compose.processor is not None:
                given[f"{place}.compose.processor"] = str(teacher)
    return [f"{field}={json.dumps(value)}" for field, value in given.items()]


def _read_more_caches(experiment: Experiment) -> dict[str, dict[str, Any]]:
    import yaml

    document = yaml.safe_load(experiment.path.read_text().replace("{run}", "runs"))
    return {name: section["set"] for name, section in document.get("more_caches", {}).items()}
