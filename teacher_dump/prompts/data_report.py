"""The data report: counts unusual images and samples of a data set before a dump, and names the first.

Findings are not errors: a constant image may be intended. But a user would not notice them otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.images.traits import read_traits
from storage.records.records import SampleError
from teacher_dump.data.conversation import NO_LABEL
from teacher_dump.data.image_loading import LoadedImage
from teacher_dump.prompts.preparation import PreparedSample

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
    """The count of unusual images or samples of one kind, and the first names."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more image or sample."""
        self.count += 1
        if len(self.first) < _NUM_NAMED:
            self.first.append(name)


@dataclass
class DataReport:
    """Counts of unusual images and samples."""

    num_samples: int = 0  # inspected
    num_images: int = 0  # of different names
    findings: dict[str, Finding] = field(default_factory=lambda: {name: Finding() for name in (*_IMAGES, *_SAMPLES)})

    def format_lines(self) -> list[str]:
        """Formats one line per finding, and a line that lists the kinds without a finding."""
        kinds = [(_IMAGES, self.num_images, "images"), (_SAMPLES, self.num_samples, "samples")]
        said, clean = [], []
        for texts, total, noun in kinds:
            found = [name for name in texts if self.findings[name].count]
            said += [self._format_line(name, f"{total:,} {noun} {texts[name]}") for name in found]
            clean += [f"no {noun[:-1]} is {name}" for name in texts if name not in found]
        if clean:
            said.append(f"data: {self.num_samples:,} samples, {self.num_images:,} images: {', '.join(clean)}")
        return said

    def _format_line(self, name: str, text: str) -> str:
        finding = self.findings[name]
        more = ", …" if finding.count > len(finding.first) else ""
        return f"data: {finding.count:,} of {text}: {', '.join(finding.first)}{more}"


class DataReporter:
    """Fills a report as samples are prepared."""

    def __init__(self) -> None:
        self.report = DataReport()
        self._names: dict[bytes, str] = {}  # of the first image of each content
        self._seen: set[str] = set()  # images by name

    def add(self, prepared: PreparedSample) -> None:
        """Inspects a usable sample."""
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
        """Counts unusable samples."""
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
