"""datatrove's quality filters for texts without pictures, by name."""

from collections.abc import Callable, Iterable, Iterator

from megacm3.data.sources import Rejected, Sample
from megacm3.errors import ConfigError

NAMES = {
    "gopher-quality": "GopherQualityFilter",
    "gopher-repetition": "GopherRepetitionFilter",
    "c4-quality": "C4QualityFilter",
    "fineweb-quality": "FineWebQualityFilter",
}
"""Names on the command line -> datatrove's classes."""
PREFIX = "filter:"
"""Reasons that begin so are choices, not faults: they do not count against --max-reject-rate."""


def build_filters(names: Iterable[str]) -> list[Callable[[str], tuple[str, str]]]:
    """Functions from text to (text that is left, reason to drop it or ""). Raises ConfigError for an unknown name."""
    import importlib

    built = []
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--text-filter {name}; expected one of {', '.join(NAMES)}")
        step = getattr(importlib.import_module("datatrove.pipeline.filters"), NAMES[name])()
        built.append(_function(step, name))
    return built


def _function(step: object, name: str) -> Callable[[str], tuple[str, str]]:
    from datatrove.data import Document

    def apply(text: str) -> tuple[str, str]:
        document = Document(text=text, id="")
        try:
            answer = step.filter(document)  # type: ignore[attr-defined]
        except ImportError as fault:
            raise ConfigError(f"--text-filter {name}: {fault}") from fault
        kept, reason = answer if isinstance(answer, tuple) else (answer, name)
        return document.text, "" if kept else reason

    return apply


def filter_texts(items: Iterable[Sample | Rejected], names: Iterable[str]) -> Iterator[Sample | Rejected]:
    """`items` with the filters applied to samples that are one text; others pass."""
    filters = build_filters(names)
    for item in items:
        if isinstance(item, Sample) and len(item.parts) == 1 and isinstance(item.parts[0], str):
            item = _filtered(item, item.parts[0], filters)
        yield item


def _filtered(sample: Sample, text: str, filters: list[Callable[[str], tuple[str, str]]]) -> Sample | Rejected:
    for apply in filters:
        text, reason = apply(text)
        if reason or not text.strip():
            return Rejected(sample.key, sample.shard, sample.row, PREFIX + (reason or "empty_text"))
    return Sample(sample.key, sample.shard, sample.row, (text.strip(),), sample.meta)
