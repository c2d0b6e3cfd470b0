"""The emoji teacher's parts that need no weights: names of tensors by their order, the image token, the template."""

from typing import Any

import pytest
import torch

from examples.emoji.models import (
    ARCHITECTURE,
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    REPLACED_TOKEN,
    TOWER_WIDTH,
    assemble,
    compute_features,
    make_processor_of,
    match_by_order,
)
from examples.emoji.projector import fit_ridges, reduce_rank, write_projector
from student_train.models.huggingface import import_transformers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", REPLACED_TOKEN)


@pytest.fixture(scope="module")
def processor():
    """A processor of a small byte-level tokenizer with SmolLM2's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["What kind of thing is this?", "mammals"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet),
    )
    return make_processor_of(import_transformers().PreTrainedTokenizerFast(tokenizer_object=bpe))


def test_the_image_token_takes_the_place_of_another_one(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == SPECIAL.index(REPLACED_TOKEN)
    assert REPLACED_TOKEN not in tokenizer.get_vocab()
    assert tokenizer(f"{IMAGE_TOKEN}mammals").input_ids[0] == SPECIAL.index(REPLACED_TOKEN)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_template_takes_images_and_a_picture_becomes_sixteen_tokens(processor):
    from PIL import Image

    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What kind?"}]}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "mammals"}]}
    text = processor.apply_chat_template([asked, answered], tokenize=False)
    assert text == (
        "<|im_start|>user\n<image>What kind?<|im_end|>\n<|im_start|>assistant\nmammals<|im_end|>\n"
    )  # no default system message
    prompt = processor.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    inputs = processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert (inputs["input_ids"] == image_token).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    assert processor.chat_template == CHAT_TEMPLATE


def test_a_tokenizer_without_that_token_is_refused():
    from tokenizers import Tokenizer, models

    other = import_transformers().PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match=f"no token {REPLACED_TOKEN}, which <image> replaces"):
        make_processor_of(other)


def test_tensors_are_matched_by_order_and_shape():
    source = {"a.w": torch.ones(2, 3), "a.b": torch.zeros(2), "classifier": torch.ones(5)}
    target = {"x.weight": torch.empty(2, 3), "x.bias": torch.empty(2)}
    matched = match_by_order(source, target)
    assert list(matched) == ["x.weight", "x.bias"]
    torch.testing.assert_close(matched["x.weight"], source["a.w"])
    with pytest.raises(ValueError, match=r"tensor x.bias: got \(2, 3\), expected \(2,\)"):
        match_by_order({"a.w": torch.zeros(2, 3), "a.b": torch.zeros(2, 3)}, target)
    with pytest.raises(ValueError, match=r"tensor x.bias: got no tensor"):
        match_by_order({"a.w": torch.ones(2, 3)}, target)


def test_the_assembled_models_visual_tokens_are_the_fitted_map(processor, tmp_path):
    """With a tower and a decoder of random weights: parts are copied, and what the decoder sees is linear."""
    pytest.importorskip("timm", reason="the tower is one of timm's")
    from PIL import Image

    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=ARCHITECTURE, do_pooling=False, hidden_size=TOWER_WIDTH)
    tower = transformers.AutoModel.from_config(config).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vocab_size = len(processor.tokenizer)
    decoder = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes)
    )
    model: Any = assemble(tower, decoder, processor)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.lm_head.weight, decoder.lm_head.weight)

    paths = []
    for index, colour in enumerate(("red", "green", "blue")):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGBA", (64, 64), colour).save(paths[-1])
    features = compute_features(tower, processor, paths, batch=2)
    assert features.shape == (3, 16, TOWER_WIDTH)
    rows = features.flatten(0, 1)
    targets = torch.randn(len(rows), 32)
    wanted = reduce_rank(*fit_ridges(rows, targets, [0.1])[0.1], rows, rank=16)
    projector = model.model.multi_modal_projector
    write_projector(projector.linear_1, projector.linear_2, wanted)

    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What kind?"}]}
    prompt = processor.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[Image.open(paths[0]).convert("RGB")], text=[prompt], return_tensors="pt")
    with torch.inference_mode():
        seen = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        logits = model(**inputs).logits
    torch.testing.assert_close(seen[0].double(), wanted(rows[:16].double()), rtol=1e-3, atol=1e-3)
    assert logits.shape == (1, inputs["input_ids"].shape[1], vocab_size)
