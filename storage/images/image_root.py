"""Finds the folder of a cache's images: the recorded one, or one that was moved along with the cache.

Every image is checked against its sha256 when it is read, so a wrong folder causes an error, never a
wrong image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.backends.folder import is_url


def find_image_root(recorded: Sequence[str], cache: str | Path, *, example: str | None) -> Path:
    """Returns the folder of a cache's images, or the first recorded one if none exists here.

    `recorded`: the roots that segments name, the likeliest first. `example`: the relative path of an image
    that must exist in the folder; None: only the folder must exist.
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
    """Returns True if links may lead out of a cache's image root: only if the root is a recorded one."""
    return root in map(Path, recorded)


def is_moved_root(old: str, new: str, cache: str | Path) -> bool:
    """Returns True if `new` may be a moved or copied `old`: `old` is gone, or was copied with its project.

    In a copied project, the path below the project's folder, which contains the cache, is unchanged.
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
    """Yields candidates for a moved root below the cache's parent folders, the longest kept path first."""
    if is_url(str(cache)) or not root.is_absolute():
        return
    above = Path(cache).resolve().parents
    names = root.parts[1:]
    for start in range(len(names)):
        for folder in above:
            yield folder.joinpath(*names[start:])
