"""The chat templates of both papers: their text to the letter, answers, stop token and the image's place.

The expected texts are written by hand after TinyLLaVA Factory's and MoE-LLaVA's templates, not rendered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from storage.errors import ConfigError, StillhouseError
from storage.processes import torchvision_shim
from storage.records.sample_key import SampleKey
from student_train.config import CompositionSection
from student_train.models.compose import check_composition, ensure_composed
from student_train.models.huggingface import load_processor, load_weights
from student_train.models.loading import read_checkpoint
from teacher_dump.config import SourceSection
from teacher_dump.data.dataset import read_samples
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn
from teacher_dump.prompts.chat_template import StopTokens, locate_answers
from teacher_dump.prompts.preprocessor import PromptBuilder, make_messages
from tests.tiny import CHAT_TEMPLATE, make_tiny_tokenizer

torchvision_shim.import_torch_companions()

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
END = "<|endoftext|>"
CASES = {  # turns, number of images, LLaVA-KD's text, LLaVA-MoD's text; {…} are the answers with their stop token
    "one turn": (
        ("<image>\nWhat is it?", "A cat."), 1,
        "USER: <image>\nWhat is it? ASSISTANT:{ A cat.$}",
        "USER: <image>\nWhat is it? ASSISTANT:{ A cat.$}",
    ),
    "two turns": (
        ("<image>\nWhat is it?", "7", "Sure?", "Yes"), 1,
        "USER: <image>\nWhat is it? ASSISTANT:{ 7$}USER: Sure? ASSISTANT:{ Yes$}",
        "USER: <image>\nWhat is it? ASSISTANT:{ 7$}USER: Sure? ASSISTANT:{ Yes$}",
    ),
    "image at the end": (
        ("What is it?\n<image>", "A cat."), 1,
        "USER: <image>\nWhat is it? ASSISTANT:{ A cat.$}",
        "USER: What is it?\n<image> ASSISTANT:{ A cat.$}",
    ),
    "image inside": (
        ("Is <image> a cat?", "No"), 1,
        "USER: <image>\nIs  a cat? ASSISTANT:{ No$}",
        "USER: Is <image> a cat? ASSISTANT:{ No$}",
    ),
    "no image": (
        (" Why? ", "Because."), 0,
        "USER:  Why?  ASSISTANT:{ Because.$}",
        "USER:  Why?  ASSISTANT:{ Because.$}",
    ),
    "image in the second question": (
        ("Ready?", "Yes", "<image>\nWhat?", "A dog"), 1,
        "USER: Ready? ASSISTANT:{ Yes$}USER: <image>\nWhat? ASSISTANT:{ A dog$}",
        "USER: Ready? ASSISTANT:{ Yes$}USER: <image>\nWhat? ASSISTANT:{ A dog$}",
    ),
    "two images": (
        ("<image>\n<image>\nSame?", "No"), 2,
        "USER: <image>\n<image>\nSame? ASSISTANT:{ No$}",
        "USER: <image>\n<image>\nSame? ASSISTANT:{ No$}",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tower as the Hub has SigLIP, one as it has CLIP, and a base decoder with Qwen's tokens and ChatML template."""
    import transformers

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    towers = {"image_size": 32, "patch_size": 8, **sizes}
    text = {**sizes, "vocab_size": 50}
    siglip = transformers.SiglipConfig(vision_config=towers, text_config=text)
    transformers.SiglipModel(siglip).save_pretrained(root / "siglip")
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    clip = transformers.CLIPConfig(vision_config=towers, text_config=text)
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(root / "clip")
    tokenizer = make_tiny_tokenizer((END, "<|im_start|>", "<|im_end|>"), image_token=None, template=CHAT_TEMPLATE)
    tokenizer.eos_token = END
    tokenizer.save_pretrained(root / "qwen")
    qwen = transformers.Qwen2Config(
        **sizes, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True, max_position_embeddings=256,
        eos_token_id=297, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(qwen).save_pretrained(root / "qwen")
    return {name: str(root / name) for name in ("siglip", "clip", "qwen")}


@pytest.fixture(scope="module")
def made(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A composition of each paper, without a processor that was there before."""
    root = tmp_path_factory.mktemp("made")
    sections = {
        "llava_kd": {"vision": parts["siglip"], "select": "full"},
        "llava_mod": {"vision": parts["clip"], "select": "default", "pad_to_square": True},
    }
    for name, fields in sections.items():
        section = CompositionSection.model_validate({"llm": parts["qwen"], "template": name, **fields})
        check_composition(section, name)
        ensure_composed(section, root / name, seed=0)
    return {name: root / name for name in sections}


def build(folder: Path) -> tuple[PromptBuilder, Any]:
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return PromptBuilder(processor, image_token_id=image_token_id, eos_token_ids=[tokenizer.eos_token_id]), processor


def make_sample(turns: tuple[str, ...], num_images: int) -> Sample:
    roles = ("user", "assistant")
    spoken = tuple(Turn(roles[number % 2], text) for number, text in enumerate(turns))  # type: ignore[arg-type]
    return Sample(SampleKey("x"), "train", "", tuple(f"{number}.png" for number in range(num_images)), spoken)


@pytest.mark.parametrize("paper", ["llava_kd", "llava_mod"])
@pytest.mark.parametrize("case", CASES)
def test_text_answers_and_ids_are_the_published_ones(made: dict[str, Path], paper: str, case: str) -> None:
    turns, num_images, kd, mod = CASES[case]
    expected = SYSTEM + (kd if paper == "llava_kd" else mod)
    builder, processor = build(made[paper])
    tokenizer = processor.tokenizer
    sample = make_sample(turns, num_images)
    messages = make_messages(sample.turns, num_images)
    stops = StopTokens.from_tokenizer(tokenizer, [tokenizer.eos_token_id], image_token="<image>")

    def render(some: list[Any], open_turn: bool) -> str:
        return processor.apply_chat_template(some, tokenize=False, add_generation_prompt=open_turn)

    rendered = locate_answers(messages, render, stops=stops)
    assert rendered.text == expected.replace("{", "").replace("}", "").replace("$", END)
    opened = [piece.rpartition("}")[2] for piece in expected.split("{")[:-1]]
    assert all(text.endswith("ASSISTANT:") for text in opened)  # without a space, which is the answer's first token
    assert [span.stop_token.text for span in rendered.spans] == [END] * len(opened)

    ids: list[int] = []
    mask: list[bool] = []
    for stretch in expected.replace("}", "{").split("{"):
        is_answer = stretch.endswith("$")
        for number, piece in enumerate(stretch.replace("$", "").split("<image>")):  # each tokenised apart, as published
            if number:
                ids.append(tokenizer.convert_tokens_to_ids("<image>"))
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * is_answer
        mask += [is_answer] * (len(ids) - len(mask))
    prompt = builder.build(sample)
    assert prompt.token_ids.tolist() == ids
    assert prompt.response_mask.tolist() == mask
    lone_space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    if turns[0].startswith("<image>") and num_images == 1:  # "USER: " ends in a token of its own
        place = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
        assert ids[place - len(lone_space) : place] == lone_space


@pytest.mark.parametrize("paper", ["llava_kd", "llava_mod"])
def test_a_caption_is_its_image_its_text_and_a_line_break(made: dict[str, Path], paper: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = {"from": "human", "value": "Write a caption.\n<image>"}
    rows = [
        {"id": "a", "image": "a.png", "conversations": [asked, {"from": "gpt", "value": "a red cat"}]},
        {"id": "none", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"id": "two", "image": "a.png", "conversations": [asked, {"from": "gpt", "value": "y"}] * 2},
    ]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    source = SourceSection(path=str(tmp_path / "captions.json"), images=str(tmp_path), template="caption")
    samples = read_samples([source], extracted=tmp_path / "extracted")
    assert [error.sample_id for error in samples.errors] == ["none", "two"]
    assert (
        "has 0 images and the turns user, assistant, but its source has template: caption" in samples.errors[0].reason
    )
    (sample,) = samples.samples
    builder, processor = build(made[paper])
    prompt = builder.build(sample)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    caption = processor.tokenizer("a red cat\n", add_special_tokens=False)["input_ids"]
    assert prompt.token_ids.tolist() == [image, *caption]
    assert prompt.response_mask.tolist() == [False] + [True] * len(caption)
    for text in ("an <image>", f"the end {END}", " "):
        with pytest.raises(SampleRefusedError):
            builder.build(Sample(SampleKey("x"), "train", "", ("a.png",), (Turn("assistant", text),)))


def test_captions_are_refused_where_the_image_tokens_have_a_frame() -> None:
    framed = CHAT_TEMPLATE.replace("<image>", "<|im_start|><image><|im_end|>")
    tokenizer = make_tiny_tokenizer(template=framed)
    builder = PromptBuilder(
        tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), eos_token_ids=[tokenizer.eos_token_id]
    )
    with pytest.raises(StillhouseError, match=r"template: caption writes image tokens alone, but .* by <\|im_start\|>"):
        builder.build(Sample(SampleKey("x"), "train", "", ("a.png",), (Turn("assistant", "red"),)))


def test_what_is_composed_without_a_processor_is_whole(made: dict[str, Path], parts: dict[str, str]) -> None:
    for name, folder in made.items():
        processor = load_processor(folder)
        assert (
            processor.tokenizer.convert_tokens_to_ids("<image>") == 300
        )  # the next free id, below the head's 320 rows
        checkpoint = read_checkpoint(folder)
        assert checkpoint.sequence_format.image_token_id == 300
        assert checkpoint.sequence_format.tokens_per_image == 16  # of CLIP without its class token
        model: Any = load_weights(folder)
        assert model.lm_head.weight.shape[0] == 320
        stops = model.generation_config.eos_token_id
        assert processor.tokenizer.eos_token_id in ([stops] if isinstance(stops, int) else stops)
        inputs = processor(images=[Image.new("RGB", (64, 16), "white")], text=["<image>"], return_tensors="pt")
        pixels = inputs["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        assert int((inputs["input_ids"] == 300).sum()) == 16
        with torch.no_grad():
            assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        if name == "llava_mod":  # above and below lies the mean colour, 0 after normalisation
            assert torch.allclose(pixels[0, :, 0], torch.zeros(3, 32), atol=0.02)
            assert float(pixels[0, :, 16].min()) > 1.5
    again = CompositionSection(vision=parts["siglip"], llm=parts["qwen"], template="llava_kd")
    ensure_composed(again, made["llava_kd"], seed=0)  # the same parts and template: it is kept
    with pytest.raises(ConfigError, match=r"compose\.processor\.template: was .*, is "):
        ensure_composed(again.model_copy(update={"template": "llava_mod"}), made["llava_kd"], seed=0)


def test_a_template_of_ones_own_and_mistakes(parts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    given = {"vision": parts["siglip"], "llm": parts["qwen"]}
    own = CompositionSection.model_validate({**given, "template": str(tmp_path / "own.jinja")})
    ensure_composed(own, tmp_path / "made", seed=0)
    assert load_processor(tmp_path / "made").chat_template == (tmp_path / "own.jinja").read_text()
    missing = CompositionSection.model_validate({**given, "template": str(tmp_path / "none.jinja")})
    with pytest.raises(ConfigError, match=r"stages\.a: compose\.template: .*none\.jinja cannot be read"):
        check_composition(missing, "stages.a")
    for fields, words in (
        ({}, "give either processor"),
        ({"template": "llava_kd", "processor": "x"}, "give either processor"),
        ({"template": "llava-kd"}, "template is 'llava-kd', expected llava_kd, llava_mod or a .jinja file"),
        ({"processor": "x", "pad_to_square": True}, "pad_to_square is for a processor that template makes"),
    ):
        with pytest.raises(ValueError, match=words):
            CompositionSection.model_validate({**given, **fields})
