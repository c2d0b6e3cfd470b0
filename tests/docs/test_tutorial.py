"""The tutorial's script for the processor of a composed teacher, with tiny parts in place of the Hub's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from student_train.config import CompositionSection
from student_train.models.compose import compose
from student_train.models.huggingface import import_transformers, load_processor
from tests.tiny import SPECIAL_TOKENS, make_tiny_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def make_parts(folder: Path) -> dict[str, str]:
    """A SigLIP with its image processor and a Qwen2 with a tokenizer that has no image token."""
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.SiglipConfig(
        vision_config={**sizes, "image_size": 28, "patch_size": 14}, text_config={**sizes, "vocab_size": 50}
    )
    transformers.SiglipModel(config).save_pretrained(folder / "siglip")
    transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder / "siglip")
    tokenizer = make_tiny_tokenizer(SPECIAL_TOKENS[:-1], image_token=None)
    tokenizer.save_pretrained(folder / "qwen")
    qwen = transformers.Qwen2Config(
        **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=None
    )
    transformers.Qwen2ForCausalLM(qwen).save_pretrained(folder / "qwen")
    return {
        "google/siglip-so400m-patch14-384": str(folder / "siglip"),
        "Qwen/Qwen2.5-3B-Instruct": str(folder / "qwen"),
    }


def test_the_processor_of_the_tutorial_composes_a_teacher(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    names = {**make_parts(tmp_path), "/models/processor": str(tmp_path / "processor")}
    for name, folder in names.items():
        assert name in script
        script = script.replace(name, folder)
    exec(compile(script, "docs/tutorial.md", "exec"), {})
    section = CompositionSection(
        vision=str(tmp_path / "siglip"), llm=str(tmp_path / "qwen"), processor=str(tmp_path / "processor")
    )
    model = compose(section, seed=0)
    processor = load_processor(str(tmp_path / "processor"))
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\n<image>what is it?<|im_end|>\n<|im_start|>assistant\n"
