"""The sections of a report, in their order."""

from __future__ import annotations

from vit_bench.report import facts, kernels, models
from vit_bench.report.data import Book, Section
from vit_bench.report.figures import Figure


def sections(book: Book) -> list[Section]:
    made = (
        models.throughput(book),
        kernels.attention(book),
        kernels.roofline(book),
        models.breakdown(book),
        models.timeline(book),
        models.memory(book),
        facts.accuracy(book),
        facts.not_run(book),
        facts.environment(book),
    )
    return [one for one in made if one is not None]


def figures(book: Book) -> list[Figure]:
    """All of them, for plots."""
    made = (models.throughput, kernels.attention, kernels.roofline, models.breakdown, models.timeline, models.memory)
    found = [section for make in made if (section := make(book)) is not None]
    return [item.figure for section in found for item in section.items if item.figure is not None]
