"""Teacher and student that drop SigLIP's first patch, as TinyLLaVA's code does: a grid that is no square."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import ConfigError, IdentityError
from storage.records.records import ImageRef
from student_train.config import CompositionSection
from student_train.data.collate import check_visual_grid
from student_train.losses.relation import make_resampling_matrix
from student_train.models.compose import ensure_composed
from student_train.models.huggingface import import_transformers, load_processor
from student_train.models.loading import read_checkpoint


def test_a_student_is_composed_for_a_teacher_that_drops_the_first_patch(checkpoint: Path, tmp_path: Path) -> None:
    transformers = import_transformers()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
    tower = transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)
    transformers.SiglipVisionModel(tower).save_pretrained(tmp_path / "tower")
    decoder = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=300, max_position_embeddings=256)
    transformers.Qwen2ForCausalLM(decoder).save_pretrained(tmp_path / "decoder")
    processor = load_processor(checkpoint)
    processor.vision_feature_select_strategy = "default"
    processor.save_pretrained(tmp_path / "teacher")
    parts = {"vision": str(tmp_path / "tower"), "llm": str(tmp_path / "decoder"), "select": "default"}
    dropping = CompositionSection.model_validate({**parts, "processor": str(tmp_path / "teacher")})
    ensure_composed(dropping, tmp_path / "student", seed=0)
    sequence_format = read_checkpoint(tmp_path / "student").sequence_format
    assert sequence_format.tokens_per_image == 15
    check_visual_grid(ImageRef("a.png", "0" * 64, 15, "0" * 64), "sample", sequence_format)
    assert make_resampling_matrix(15, 15) is None
    with pytest.raises(IdentityError, match=r"the cache has 16 visual tokens .* but 15 for other images"):
        check_visual_grid(ImageRef("a.png", "0" * 64, 16, "0" * 64), "sample", sequence_format)
    whole = CompositionSection.model_validate({**parts, "processor": str(checkpoint)})
    with pytest.raises(ConfigError, match="has no known class token"):
        ensure_composed(whole, tmp_path / "other", seed=0)
