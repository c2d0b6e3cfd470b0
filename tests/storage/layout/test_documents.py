import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import CacheError, CorruptPartError
from storage.identity import FORMAT_VERSION
from storage.layout.documents import CacheDescription, parse_document
from tests.storage.synthetic_cache import make_identity

DESCRIPTION = CacheDescription(
    format_version=FORMAT_VERSION, families=("response",), identity=make_identity(teacher="größe \u2028")
)


def test_a_document_comes_back_and_is_ascii():
    content = DESCRIPTION.to_bytes()
    content.decode("ascii")
    assert content.endswith(b"}\n")
    assert parse_document(content, CacheDescription, "x") == DESCRIPTION


@given(st.data())
def test_any_changed_byte_is_refused(data):
    content = bytearray(DESCRIPTION.to_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255).filter(lambda value: value != content[position]))
    with pytest.raises(CacheError):
        parse_document(bytes(content), CacheDescription, "x")


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(CorruptPartError):
        parse_document(content, CacheDescription, "x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 10_000, b"null"])
def test_hostile_json_is_refused(content):
    with pytest.raises(CorruptPartError, match="x: "):
        parse_document(content, CacheDescription, "x")


def test_unknown_fields_are_refused_under_a_right_hash():
    class Wider(CacheDescription):
        extra: int = 1

    content = Wider(**dict(DESCRIPTION)).to_bytes()
    with pytest.raises(CorruptPartError, match="extra"):
        parse_document(content, CacheDescription, "x")


def test_another_spelling_of_the_same_content_is_refused():
    content = DESCRIPTION.to_bytes().replace(b'"families"', b' "families"')
    with pytest.raises(CorruptPartError, match="canonical JSON"):
        parse_document(content, CacheDescription, "x")
