"""The table of mutants: what each changed and which test caught it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .forks import Outcome
from .mutant import Mutant


def survivors(content: dict[str, Any]) -> set[str]:
    """Ids of the mutants in the content of a report that no test caught and nobody proved equivalent."""
    return {entry["id"] for entry in content["mutants"] if entry["verdict"] == "survived"}


class Report:
    """Written anew after every mutant, so that a run that is stopped leaves what it found."""

    def __init__(self, out: Path, seed: int, sources: dict[str, bytes]) -> None:
        self.out, self.seed, self.sources = out, seed, sources
        self.control: Outcome | None = None
        self.entries: list[dict[str, Any]] = []
        out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, mutant: Mutant, outcome: Outcome, seconds: float) -> None:
        before, after = mutant.lines(self.sources[mutant.file])
        verdict = "survived" if outcome.verdict == "passed" else outcome.verdict
        entry = {"id": mutant.id, "file": mutant.file, "kind": mutant.kind, "before": before, "after": after}
        entry |= {"why": mutant.why} if mutant.why else {}
        entry |= {"verdict": verdict, "test": outcome.test, "how": outcome.how, "seconds": round(seconds, 1)}
        self.entries.append(entry)
        self.write()
        print(f"{len(self.entries)} {mutant.id}: {verdict} {outcome.test} [{seconds:.0f} s]", flush=True)

    def as_json(self) -> dict[str, Any]:
        control = None if self.control is None else {"passed": self.control.passed, "seconds": self.control.seconds}
        return {"seed": self.seed, "control": control, "mutants": self.entries}

    def write(self) -> None:
        self.out.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        self.out.with_suffix(".md").write_text(markdown(self.as_json()))

    def totals(self) -> str:
        return totals(self.entries)


def totals(entries: list[dict[str, Any]]) -> str:
    parts = []
    for label, chosen in (
        ("named", [e for e in entries if e["kind"] == "named"]),
        ("generated", [e for e in entries if e["kind"] != "named"]),
    ):
        if chosen:
            counts = Counter(entry["verdict"] for entry in chosen)
            parts.append(f"{len(chosen)} {label}: " + ", ".join(f"{n} {v}" for v, n in sorted(counts.items())))
    return "; ".join(parts)


def markdown(content: dict[str, Any]) -> str:
    control = content["control"]
    lines = ["# Mutants", "", totals(content["mutants"]) + f". Seed {content['seed']}.", ""]
    if control:
        lines += [f"Without a fault {control['passed']} default tests pass, in {control['seconds']} s.", ""]
    lines += ["| mutant | before | after | verdict | test, or reason |", "|---|---|---|---|---|"]
    for entry in content["mutants"]:
        proof = entry["how"] if entry["verdict"] == "equivalent" else f"`{entry['test']}`" if entry["test"] else ""
        cells = [f"`{entry['id']}`", _code(entry["before"]), _code(entry["after"]), entry["verdict"], proof]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
