"""Hand-made tokenizers, one of each family that teachers have, small enough to check ids by eye.

All know the tokens of ChatML, `</s>` and an image token, single letters, and `red` with and without a space before it,
in whole or in pieces.
"""

from __future__ import annotations

import string
from typing import Any

from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN

FAMILIES = ("byte_bpe", "sentencepiece_legacy", "sentencepiece", "unigram", "wordpiece", "python")
MARKS = ("<|im_start|>", END_OF_TURN, IMAGE_TOKEN)
_LETTERS = [*string.ascii_letters, *string.digits, *"?:!.,;-()[]/<>'\"\n"]


def make_tokenizer(family: str, *, template: str = CHAT_TEMPLATE, eos_token: str = END_OF_TURN) -> Any:
    """A transformers tokenizer of the family."""
    from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast

    if family == "python":  # one without offsets, a token a byte
        marks = [AddedToken(mark, normalized=False, special=True) for mark in ("</s>", *MARKS)]
        end: Any = AddedToken(eos_token, normalized=False, special=True)  # text would swallow white space
        tokenizer: Any = ByT5Tokenizer(extra_ids=0, eos_token=end, additional_special_tokens=marks)
    else:
        makers = {
            "byte_bpe": _byte_bpe,
            "sentencepiece_legacy": _sentencepiece_legacy,
            "sentencepiece": _sentencepiece,
            "unigram": _unigram,
            "wordpiece": _wordpiece,
        }
        made = makers[family]()
        made.add_special_tokens(["</s>", *MARKS])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos_token)
    tokenizer.chat_template = template
    return tokenizer


def _byte_bpe() -> Any:
    """GPT-2's kind, without its regular expression: two line breaks become one token, as in Qwen2's."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer(_bpe([*sorted(pre_tokenizers.ByteLevel.alphabet())], "Ġ", [("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece_legacy() -> Any:
    """LLaMA's kind: a space is put before the text and after every special token."""
    from tokenizers import Tokenizer, normalizers

    made = Tokenizer(_bpe(["<unk>", *_LETTERS, "▁"], "▁", unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def _sentencepiece() -> Any:
    """LLaMA's kind with `legacy: false`: a space is put before the whole text alone."""
    from tokenizers import Tokenizer, pre_tokenizers

    made = Tokenizer(_bpe(["<unk>", *_LETTERS, "▁"], "▁", unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def _unigram() -> Any:
    """T5's kind: words with a space before each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), *((letter, -10.0) for letter in [*_LETTERS, "▁"]), ("red", -12.0), ("▁red", -9.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return made


def _wordpiece() -> Any:
    """BERT's kind: lower case, no white space, [CLS] before the text and [SEP] after it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [letter for letter in _LETTERS if not letter.isspace()]
    tokens = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "red", "user", "assistant"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return made


def _bpe(alphabet: list[str], space: str, more: list[tuple[str, str]] | None = None, **settings: Any) -> Any:
    from tokenizers import models

    merges = [("r", "e"), (space, "re"), (f"{space}re", "d"), *(more or [])]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    return models.BPE({token: number for number, token in enumerate(tokens)}, merges, **settings)
