"""What `zensical build --strict` does not look at: pictures and other files that are missing, requests to other hosts.

    python -m docs.check_site FOLDER

Zensical 0.0.73 reports links in Markdown to pages and headings that do not exist. It reports no missing picture, no
link that a snippet or raw HTML brings, and no script or style sheet of another host.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"img", "script", "link", "source", "iframe", "video", "audio", "embed", "object"}  # not `a`
_STYLE_URL = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


class _Page(HTMLParser):
    """The addresses and the ids of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str]] = []  # (tag, address)
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src", "data", "poster") and value:
                self.addresses.append((tag, value))
            if name == "srcset" and value:
                self.addresses += [(tag, part.split()[0]) for part in value.split(",")]


def find_problems(site: Path) -> Iterator[str]:
    """One line for each address on a page that leads nowhere or loads something from another host."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        place = path.relative_to(site.resolve())
        for tag, address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or parts.netloc:
                if tag in _LOADED:
                    yield f"{place}: <{tag}> loads {address}; put the file into docs/assets"
            elif not parts.scheme:
                yield from _local(site.resolve(), path, address, pages, place)
    for path in sorted(site.rglob("*.css")):
        for address in _STYLE_URL.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: loads {address}; put the file into docs/assets"


def _local(site: Path, path: Path, address: str, pages: dict[Path, _Page], place: Path) -> Iterator[str]:
    parts = urlsplit(address)
    name = unquote(parts.path)
    target = path if not name else (site / name.lstrip("/") if name.startswith("/") else path.parent / name).resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        yield f"{place}: {address} leads to no file of the site"
    elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
        yield f"{place}: {address}: there is no such heading"


def main(arguments: list[str]) -> int:
    """Prints the problems; returns the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("usage: python -m docs.check_site FOLDER, which `make docs` builds\n")
        return 2
    problems = list(find_problems(Path(arguments[0])))
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
