"""Published peaks of GPUs (hardware.yaml), and the text that names some of them: h100x8."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from storage.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """Some GPUs of one kind."""

    name: str
    count: int
    tflops: float  # of one, dense bf16
    memory_gb: float  # of one
    source: str


def parse_hardware(text: str) -> Hardware:
    """Parses NAME or NAMExCOUNT. ConfigError for an unknown name, with the known ones, and for a count below 1."""
    kinds = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
    match = re.fullmatch(r"(.+?)(?:x(\d+))?", text.lower())
    name, count = (match[1], int(match[2] or 1)) if match else (text, 1)
    if name not in kinds or count < 1:
        raise ConfigError(
            f"--hardware is {text!r}, expected one of {', '.join(kinds)}, with the number of GPUs as in h100x8"
        )
    return Hardware(name, count, **kinds[name])
