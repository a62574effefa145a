"""One fault: which bytes of which file become what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Edit:
    """source[start:end] becomes `text`; offsets count bytes of the UTF-8 source."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Mutant:
    """A fault in one file. `kind` is the operator that made it, or "named"; `why` is what it stands for."""

    id: str
    file: str
    kind: str
    edits: tuple[Edit, ...]
    why: str = ""

    def apply(self, source: bytes) -> bytes:
        """The source with this fault; every byte outside the edits stays as it is."""
        for edit in sorted(self.edits, key=lambda e: e.start, reverse=True):
            source = source[: edit.start] + edit.text.encode() + source[edit.end :]
        return source

    def lines(self, source: bytes) -> tuple[str, str]:
        """The first line that differs, before and after, each on one line."""
        before, after = source.decode().splitlines(), self.apply(source).decode().splitlines()
        for number in range(max(len(before), len(after))):
            old = before[number] if number < len(before) else ""
            new = after[number] if number < len(after) else ""
            if old != new:
                return f"{number + 1}: {old.strip()}", new.strip()
        return "", ""


def digest(text: str, length: int = 8) -> str:
    """A short hash that stays the same from run to run and machine to machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]
