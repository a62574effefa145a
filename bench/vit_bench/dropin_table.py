"""The README's table of models that `accelerate` takes, made from bench/evidence/dropin.json and from nothing else.

    python -m vit_bench.dropin_table measure     # compare and count every family, and write the file; minutes
    python -m vit_bench.dropin_table measure --driver MODULE:CONTEXTMANAGER      # in bf16, too, on an emulator
    python -m vit_bench.dropin_table             # rewrite the table in README.md
    python -m vit_bench.dropin_table --check     # fail when README.md says something else

The file holds the hash of the code that it was made with (without comments and docstrings). Figures of other code count
for nothing: the table says "not measured" until the runs are repeated. A driver is one as for `vit_bench.evidence`;
without one nothing is said of bf16, which the interpreter computes wrongly.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import vit_engine
from vit_bench.arguments import command
from vit_bench.evidence import Driver, load_driver
from vit_bench.records import CAPABILITIES
from vit_bench.support_table import replaced
from vit_bench.trees import tree_text, without_docstrings

BEGIN = "<!-- drop-in table: written by `python -m vit_bench.dropin_table`; do not edit -->"
END = "<!-- end of drop-in table -->"
_BESIDE = ("derived", "encoder_block", "fingerprint", "launches", "noted", "ops", "passes", "reads", "replay")
_COLUMNS = (
    "library", "family", "models", "fp32 error", "fp16 error (eager's)", "bf16 error (eager's)",
    "launches, and operators left", "eager",
)  # fmt: skip
GPUS = ("sm_90", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")


def source_hash() -> str:
    """Of vit_engine's drop-in code: what stands between a library's module and the operators."""
    engine = Path(vit_engine.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*(engine / "dropin").glob("*.py"), *(engine / f"{name}.py" for name in _BESIDE)]):
        digest.update(path.name.encode())
        digest.update(tree_text(without_docstrings(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()[:16]


def _covered(library: str, name: str, covers: Sequence[str]) -> list[str]:
    from vit_bench.dropin_families import TIMM_MODULES, timm_names

    if library != "timm":
        return list(covers)
    return [model for module in TIMM_MODULES for model in timm_names(module, name)]


def _parity() -> list[dict[str, Any]]:
    """One entry per family: errors in float32 and float16. Needs Triton's interpreter, or a GPU."""
    from vit_bench.dropin_families import FAMILIES
    from vit_bench.dropin_parity import compare_float32, compare_half

    entries = []
    for family in FAMILIES:
        half = compare_half(family)
        entry = {
            "library": family.library,
            "family": family.name,
            "names": _covered(family.library, family.name, family.covers),
            "float32": compare_float32(family),
            "float16": {"ours": half.ours, "eager": half.eager, "allowed": half.allowed},
        }
        print(f"{family}: float32 {entry['float32']:.1e}, float16 {half.ours:.1e} (eager {half.eager:.1e})", flush=True)
        entries.append(entry)
    return entries


def _emulated(driver: Driver, capabilities: Sequence[int]) -> list[dict[str, dict[str, float]]]:
    """For each family the errors in bfloat16 of what is compiled for these GPU generations."""
    from vit_bench.dropin_families import FAMILIES
    from vit_bench.dropin_parity import compare_half

    found: list[dict[str, dict[str, float]]] = []
    for family in FAMILIES:
        found.append({})
        for capability in capabilities:
            with driver(capability=capability, races=True):
                half = compare_half(family, torch.bfloat16)
            found[-1][f"sm_{capability}"] = asdict(half)
        print(f"{family}: bfloat16 {found[-1]}", flush=True)
    return found


def _launches(entries: list[dict[str, Any]]) -> None:
    """Adds the counts of launches. Needs Triton's compiler: not in the process that interprets."""
    from vit_bench.dropin_families import FAMILIES
    from vit_bench.dropin_launches import count_launches

    by_name = {(family.library, family.name): family for family in FAMILIES}
    for entry in entries:
        family = by_name[entry["library"], entry["family"]]
        counted, compiled = count_launches(family, GPUS)
        entry["launches"] = {"model": family.full_name, **asdict(counted)}
        entry["compiled"] = {name: asdict(found) for name, found in compiled.items()}
        print(f"{family}: {entry['launches']}, {entry['compiled']}", flush=True)


def _refused() -> dict[str, list[str]]:
    from vit_bench.dropin_families import TIMM_MODULES, timm_names

    return {module: list(timm_names(module, "refused")) for module in TIMM_MODULES}


def _process(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    """What this module prints when it is run in a process of its own, one entry per family."""
    command = [sys.executable, "-m", "vit_bench.dropin_table", *arguments]
    run = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{run.stdout[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(file: Path, driver: str | None, capabilities: Sequence[int]) -> None:
    """Runs everything and writes the file."""
    entries = _process("parity", TRITON_INTERPRET="1")
    if driver is not None:
        options = ("--driver", driver, "--capability", *map(str, capabilities))
        for entry, found in zip(entries, _process("emulated", *options), strict=True):
            entry["emulated"] = found
    _launches(entries)
    libraries = {name: importlib.metadata.version(name) for name in ("timm", "torchvision", "transformers")}
    content = {"source": source_hash(), "versions": libraries, "families": entries, "refused": _refused()}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _worst(found: Iterable[dict[str, float]]) -> str:
    """Of several GPU generations the one with the largest error of ours, and what is eager's there."""
    worst = max(found, key=lambda half: half["ours"], default=None)
    return "not measured" if worst is None else f"{worst['ours']:.1e} ({worst['eager']:.1e})"


def table(content: dict[str, Any]) -> str:
    """The table in Markdown, and the names behind it."""
    fresh = content["source"] == source_hash()
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for entry in content["families"]:
        names, launches = entry["names"], entry["launches"]
        covered = f"{len(names)} names" if entry["library"] == "timm" else ", ".join(f"`{name}`" for name in names)
        figures = ["not measured"] * 5
        if fresh:
            figures = [
                f"{entry['float32']:.0e}",
                _worst([entry["float16"]]),
                _worst(entry.get("emulated", {}).values()),
                f"`{launches['model']}`: {launches['ours']} + {launches['left']}",
                str(launches["eager"]),
            ]
        lines.append(f"| {entry['library']} | {entry['family']} | {covered} | {' | '.join(figures)} |")
    refused = [f"`{name}`" for names in content["refused"].values() for name in names]
    accepted = sum(len(e["names"]) for e in content["families"] if e["library"] == "timm")
    sentence = (
        f"Of timm {content['versions']['timm']}'s {accepted + len(refused)} names in vision_transformer, deit, eva and "
        f"beit {accepted} are accelerated; `bench/evidence/dropin.json` lists them by family. Refused, because their "
        f"blocks are built otherwise: {', '.join(refused)}."
    )
    return "\n".join([*lines, "", sentence])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("dropin_table", __doc__)
    parser.add_argument("what", nargs="?", choices=("table", "measure", "parity", "emulated"), default="table")
    parser.add_argument("--driver", help="MODULE:CONTEXTMANAGER of a Triton driver that executes compiled code")
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=[80, 90, 100, 120])
    parser.add_argument("--check", action="store_true", help="compare with README.md instead of writing it")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--evidence", type=Path, default=Path("bench/evidence/dropin.json"))
    options = parser.parse_args(arguments)
    if options.what == "parity":
        print(json.dumps(_parity()))
        return 0
    try:
        driver = load_driver(options.driver) if options.driver else None
    except ValueError as error:
        parser.error(f"argument --driver: {error}")
    if options.what == "emulated":
        if driver is None:
            parser.error("emulated: name the driver, --driver MODULE:CONTEXTMANAGER")
        print(json.dumps(_emulated(driver, options.capability)))
        return 0
    try:
        before = options.readme.read_text(encoding="utf-8")
        replaced(before, "", BEGIN, END)
    except (OSError, ValueError) as error:
        parser.error(str(error))  # before minutes of measuring
    if options.what == "measure":
        measure(options.evidence, options.driver, options.capability)
        before = options.readme.read_text(encoding="utf-8")  # it may have been edited meanwhile
    try:
        content = json.loads(options.evidence.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--evidence: {options.evidence} cannot be read: {error}")
    after = replaced(before, table(content), BEGIN, END)
    if not options.check:
        options.readme.write_text(after, encoding="utf-8")
        return 0
    if before == after:
        return 0
    print(f"{options.readme} is stale: run `python -m vit_bench.dropin_table`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
