"""Token ids become texts by the right tokenizer only, and texts cannot steer a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.inspection.token_texts import (
    TokenTexts,
    _describe_bytes,
    _load_by_tokenizers,
    _load_by_transformers,
    escape_unprintable,
    load_token_texts,
    mark_spaces,
)
from storage.errors import ConfigError
from storage.identity import Identity, compute_tokenizer_fingerprint
from tests.stillhouse.hostile_cache import import_transformers
from tests.storage.synthetic_cache import make_identity
from tests.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_transformers()
    path = tmp_path_factory.mktemp("teacher")
    make_tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def identity(folder: Path) -> Identity:
    fingerprint = compute_tokenizer_fingerprint(make_tiny_tokenizer().get_vocab())
    return make_identity(teacher=str(folder), tokenizer_fingerprint=fingerprint)


def test_the_teachers_own_folder_is_read(folder: Path, identity: Identity) -> None:
    ids = make_tiny_tokenizer().encode("the left\nhalf")
    texts = load_token_texts(identity, None)
    assert texts.has_decoder
    assert str(folder) in texts.note
    assert texts.decode(ids) == "the left\nhalf"
    assert "".join(texts.describe_token(token_id) for token_id in ids) == "the·left⏎half"


def test_tokenizer_json_alone_says_the_same_as_transformers(folder: Path, identity: Identity) -> None:
    plain, slow = _load_by_tokenizers(folder, identity), _load_by_transformers(folder, identity)
    assert plain is not None
    ids = list(range(identity.vocab_size))
    assert [plain.get_spelling(token_id) for token_id in ids] == [slow.get_spelling(token_id) for token_id in ids]
    assert [plain.decode([token_id]) for token_id in ids] == [slow.decode([token_id]) for token_id in ids]
    sentence = make_tiny_tokenizer().encode("<|im_start|>user\nthe left , half .<image>größe<|im_end|>")
    assert plain.decode(sentence) == slow.decode(sentence)
    assert _load_by_tokenizers(folder, identity.model_copy(update={"tokenizer_fingerprint": "0"})) is None
    assert _load_by_tokenizers(folder.parent, identity) is None


def test_a_piece_of_a_character_is_shown_as_bytes_and_an_answer_as_characters(identity: Identity) -> None:
    texts = load_token_texts(identity, None)
    ids = make_tiny_tokenizer().encode("größe 连")
    assert "".join(texts.describe_token(token_id) for token_id in ids) == "gr‹C3›‹B6›‹C3›‹9F›e·‹E8›‹BF›‹9E›"
    assert "".join(texts.describe_tokens(ids)) == "gr⋯ö⋯ße·⋯⋯连"
    assert texts.decode(ids) == "größe 连"
    for cut in range(len(ids) + 1):  # an answer may end within a character, and begin within one
        assert len(texts.describe_tokens(ids[:cut])) == cut
        assert len(texts.describe_tokens(ids[cut:])) == len(ids) - cut
    assert texts.describe_tokens(ids[-3:-1]) == ["‹E8›", "‹BF›"]
    assert TokenTexts(None, "").describe_tokens([5, 6]) == ["#5", "#6"]


@pytest.mark.parametrize(
    ("spelling", "shown"),
    [("è¿", "‹E8 BF›"), ("Ġè¿", " ‹E8 BF›"), ("<0xe8>", "‹E8›"), ("ŀè", "‹9E›‹E8›"), ("▁�", "▁�")],
)
def test_spellings_of_both_kinds_of_vocabulary_become_bytes(spelling: str, shown: str) -> None:
    assert _describe_bytes(spelling) == shown


def test_a_folder_elsewhere_is_read_when_it_is_given(folder: Path, identity: Identity) -> None:
    moved = identity.model_copy(update={"teacher": "/nowhere/teacher"})
    assert load_token_texts(moved, folder).decode([*make_tiny_tokenizer().encode("red")]) == "red"
    texts = load_token_texts(moved, None)
    assert not texts.has_decoder
    assert "'/nowhere/teacher' is not here; give the teacher's tokenizer as --tokenizer DIR" in texts.note
    assert (texts.describe_token(5), texts.decode([5, 6])) == ("#5", "#5 #6")


def test_another_tokenizer_is_refused_if_given_and_not_used_if_found(folder: Path, identity: Identity) -> None:
    other = identity.model_copy(update={"tokenizer_fingerprint": "0123456789abcdef"})
    with pytest.raises(
        ConfigError, match=rf"{identity.tokenizer_fingerprint[:12]}…, the cache was made with 0123456789ab"
    ):
        load_token_texts(other, folder)
    texts = load_token_texts(other, None)
    assert not texts.has_decoder
    assert "fingerprint" in texts.note


def test_a_folder_without_a_tokenizer_is_the_users_mistake(tmp_path: Path, identity: Identity) -> None:
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        load_token_texts(identity, tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        load_token_texts(identity, tmp_path / "nowhere")


def test_control_and_direction_characters_are_escaped() -> None:
    assert escape_unprintable("a\x1b[2Jb\u202ec\x00\n\td") == "a\\x1b[2Jb\\u202ec\\x00\n\td"
    assert mark_spaces(" a\tb\r\n\x07") == "·a⇥b␍⏎\\x07"
