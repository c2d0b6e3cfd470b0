"""Small stand-ins for the npm packages of the emoji experiment, in their own format: made-up names, one-pixel files."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

GROUPS = {"0": "animals", "1": "objects", "2": "flags"}
KINDS = {  # Unicode's number of a kind: its key, its group, its number of families
    "0": ("animal-cat", "0", 12),
    "1": ("animal-fish", "0", 10),
    "2": ("tool", "1", 30),
    "3": ("toy", "1", 8),
    "4": ("rarity", "1", 7),  # too few families
    "5": ("country-flag", "2", 20),  # a group that is left out
}
LEFT_OUT_KINDS = ("rarity", "country-flag")
NUM_TWINS = 4  # families of tools that have five variants, of which the last is a toy


def list_records() -> list[dict[str, Any]]:
    """The records of emojibase-data's data.json."""
    records: list[dict[str, Any]] = []
    for number, (kind, group, num) in KINDS.items():
        for index in range(num):
            code = f"1F{int(number):X}{index:02X}"
            twins = [f"{code}-200D-{twin}" for twin in "ABCDE"] if kind == "tool" and index < NUM_TWINS else []
            for hexcode in [code, *twins]:
                own = "3" if hexcode.endswith("E") and twins else number
                record = {"label": f"{kind} {hexcode}", "hexcode": hexcode, "group": int(group), "subgroup": int(own)}
                records.append({**record, "order": len(records) + 1})
    records.append({"label": "regional indicator A", "hexcode": "1F1E6"})  # without group, as in the package
    return records[::-1]  # the order is in the records


def write_tarballs(folder: Path, *, undrawn: tuple[str, ...] = ()) -> None:
    """Writes the three tarballs; `undrawn` code points have no picture in Twemoji's style."""
    records = list_records()
    kinds = {number: kind for number, (kind, _, _) in KINDS.items()}
    names = {"en/data.json": records, "meta/groups.json": {"groups": GROUPS, "subgroups": kinds}}
    for language, prefix in (("en", ""), ("es", "español ")):
        messages = {
            "groups": [{"key": key, "message": prefix + key} for key in GROUPS.values()],
            "subgroups": [{"key": key, "message": prefix + key} for key in kinds.values()],
        }
        names[f"{language}/messages.json"] = messages
    members = {name: json.dumps(value, ensure_ascii=False).encode() for name, value in names.items()}
    _write_tarball(folder / "emojibase-data-17.0.0.tgz", members)
    for style, suffix in (("google", ""), ("twitter", "-fe0f")):  # the selector stands in one package only
        drawn = {
            f"img/{style}/64/{record['hexcode'].lower()}{suffix}.png": f"{style} {record['hexcode']}".encode()
            for record in records
            if style == "google" or record["hexcode"] not in undrawn
        }
        _write_tarball(folder / f"emoji-datasource-{style}-16.0.0.tgz", {**drawn, "img/sheet.png": b"big"})


def _write_tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
