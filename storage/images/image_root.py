"""Where a cache's images lie: the folder that its identity names, or the one that was moved along with the cache.

An image root is a place. Every image is checked against its sha256 when it is read, so a wrong folder is an error
and never another picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.backends.folder import is_url


def find_image_root(recorded: Sequence[str], cache: str | Path, *, example: str | None) -> Path:
    """The folder of a cache's images; the first recorded one if none is here.

    `recorded`: the roots that segments name, the likeliest first. `example`: the path of an image below the root,
    which must be there; None: the folder alone must be.
    """
    for root in dict.fromkeys(map(Path, recorded)):
        if _has_example(root, example):
            return root
    for root in dict.fromkeys(map(Path, recorded)):
        for moved in _list_moved_roots(root, cache):
            if _has_example(moved, example):
                return moved
    return Path(recorded[0])


def may_follow_links(root: Path, recorded: Sequence[str]) -> bool:
    """Whether links below a cache's image root may lead out of it: not of one that came along with the cache."""
    return root in map(Path, recorded)


def is_moved_root(old: str, new: str, cache: str | Path) -> bool:
    """Whether `new` may be the folder `old` in another place: `old` is gone, or a project was copied with its cache.

    In a copied project the folder's path below the project, which holds the cache as well, is still the same.
    """
    if not Path(old).is_dir():
        return True
    if is_url(str(cache)):
        return False
    project = next((above for above in Path(cache).resolve().parents if Path(new).is_relative_to(above)), None)
    below = () if project is None else Path(new).relative_to(project).parts
    return bool(below) and Path(old).parts[-len(below) :] == below


def _has_example(root: Path, example: str | None) -> bool:
    return root.is_dir() if example is None else (root / example).is_file()


def _list_moved_roots(root: Path, cache: str | Path) -> Iterator[Path]:
    """Where a root may lie now: below a folder that holds the cache, most of its path kept first."""
    if is_url(str(cache)) or not root.is_absolute():
        return
    above = Path(cache).resolve().parents
    names = root.parts[1:]
    for start in range(len(names)):
        for folder in above:
            yield folder.joinpath(*names[start:])
