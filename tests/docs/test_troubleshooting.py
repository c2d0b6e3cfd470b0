"""Every message that docs/troubleshooting.md quotes is one that the code can print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^```text\n(.*?)\n```", PAGE, flags=re.DOTALL | re.MULTILINE)


def texts(node: ast.AST) -> str:
    """A string expression's literal text, with … for every value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    return "…"


def messages() -> Iterator[str]:
    for package in ("storage", "teacher_dump", "student_train", "stillhouse"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant | ast.JoinedStr):
                    yield texts(node)


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether one string of the code has the quoted pieces between … in their order."""
    pieces = [piece for piece in quoted.split("…") if piece.strip(" ;:,")]
    pattern = re.compile(".*".join(map(re.escape, pieces)), flags=re.DOTALL)
    return any(pattern.search(text) for text in said)


def test_every_quoted_message_is_in_the_code() -> None:
    said = list(messages())
    assert len(QUOTED) > 30
    assert [quoted for quoted in QUOTED if not is_said(quoted, said)] == []


def test_a_message_that_nobody_prints_is_found() -> None:
    said = ["a cache at … has … parts", "another"]
    assert is_said("a cache at … has … parts", said)
    assert not is_said("a cache at … has … samples", said)
    assert not is_said("parts … a cache", said)
