"""The data report: what is unusual about the images and samples of a data set, counted and named before a dump.

Nothing in it is an error: a constant picture may be meant. But each line is something that a teacher sees and a
person does not, unless it is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.images.traits import read_traits
from storage.records.records import SampleError
from teacher_dump.data.conversation import NO_LABEL
from teacher_dump.data.image_loading import LoadedImage
from teacher_dump.prompts.preparation import Prepared

_NUM_NAMED = 3
_IMAGES = {
    "constant": "are of one colour",
    "identical": "are identical to another of a different name",
    "transparent": "are transparent in places",
    "turned": "are turned by their EXIF orientation",
}
_SAMPLES = {
    "unlabelled": "have no label",
    "cut": "are cut at the maximal length",
    "refused": "are refused",
}


@dataclass
class Finding:
    """How many images or samples something holds of, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.first) < _NUM_NAMED:
            self.first.append(name)


@dataclass
class DataReport:
    """Counts of what is unusual."""

    num_samples: int = 0  # looked at
    num_images: int = 0  # of different names
    findings: dict[str, Finding] = field(default_factory=lambda: {name: Finding() for name in (*_IMAGES, *_SAMPLES)})

    def lines(self) -> list[str]:
        """A line a finding, and one that says what was not found."""
        kinds = [(_IMAGES, self.num_images, "images"), (_SAMPLES, self.num_samples, "samples")]
        said, clean = [], []
        for texts, total, noun in kinds:
            found = [name for name in texts if self.findings[name].count]
            said += [self._line(name, f"{total:,} {noun} {texts[name]}") for name in found]
            clean += [f"no {noun[:-1]} is {name}" for name in texts if name not in found]
        if clean:
            said.append(f"data: {self.num_samples:,} samples, {self.num_images:,} images: {', '.join(clean)}")
        return said

    def _line(self, name: str, text: str) -> str:
        finding = self.findings[name]
        more = ", …" if finding.count > len(finding.first) else ""
        return f"data: {finding.count:,} of {text}: {', '.join(finding.first)}{more}"


class DataWatch:
    """Fills a report as samples are prepared."""

    def __init__(self) -> None:
        self.report = DataReport()
        self._names: dict[bytes, str] = {}  # of the first image of each content
        self._seen: set[str] = set()  # images by name

    def add(self, prepared: Prepared) -> None:
        """Looks at a sample that can be used."""
        self.report.num_samples += 1
        record = prepared.record
        if prepared.is_cut:
            self.report.findings["cut"].add(record.sample_id)
        if not record.response_mask.any():
            self.report.findings["unlabelled"].add(record.sample_id)
        for image in prepared.images:
            if image.path not in self._seen:
                self._seen.add(image.path)
                self._add_image(image)

    def add_errors(self, errors: Sequence[SampleError]) -> None:
        """Counts samples that cannot be used."""
        for error in errors:
            self.report.num_samples += 1
            name = "unlabelled" if error.reason.endswith(NO_LABEL) else "refused"
            self.report.findings[name].add(error.sample_id)

    def _add_image(self, image: LoadedImage) -> None:
        self.report.num_images += 1
        findings, sha256 = self.report.findings, bytes.fromhex(image.sha256)
        first = self._names.setdefault(sha256, image.path)
        if first != image.path:
            findings["identical"].add(f"{image.path} = {first}")
        traits = read_traits(image.content, image.pixels)
        for name in ("constant", "transparent", "turned"):
            if getattr(traits, f"is_{name}"):
                findings[name].add(image.path)
