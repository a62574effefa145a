"""Class names and true labels from files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


class LabelError(ValueError):
    """A label file that cannot be used; the message names the file and says why in one line."""


def read_labels(path: Path) -> list[str]:
    """Class names in the order of the model's outputs.

    A text file has one name per line. A ``.json`` file holds a list of names, a mapping of output numbers to names
    ({"0": "cat"}; of a list as in {"0": ["n02123045", "tabby"]} the last entry counts), or of names to numbers.
    """
    text = _read(path)
    if path.suffix.lower() != ".json":
        return text.splitlines()
    return labels_from_json(text, str(path))


def labels_from_json(text: str, source: str) -> list[str]:
    """Class names from a JSON text; ``source`` is named in the LabelError raised for any other structure."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"{source}: not valid JSON: {error}") from error
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if not isinstance(content, dict) or not content:
        raise LabelError(f"{source}: must be a list of names, or map numbers to names or names to numbers")
    if all(isinstance(number, int) for number in content.values()):
        numbered = {number: name for name, number in content.items()}
    elif all(key.isdecimal() for key in content):
        numbered = {int(key): _last_name(value, source) for key, value in content.items()}
    else:
        raise LabelError(f"{source}: must map numbers to names or names to numbers")
    if sorted(numbered) != list(range(len(content))):
        raise LabelError(f"{source}: numbers must run from 0 to {len(content) - 1}, each once")
    return [numbered[number] for number in range(len(content))]


def _last_name(value: Any, source: str) -> str:
    name = value[-1] if isinstance(value, list) and value else value
    if not isinstance(name, str):
        raise LabelError(f"{source}: {value!r} is no class name")
    return name


def read_truth(path: Path) -> dict[Path, str]:
    """True labels from a CSV file with the columns ``file`` (relative to the CSV file's folder) and ``label``."""
    rows = csv.DictReader(_read(path).splitlines())
    try:
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise LabelError(f"{path}: must be a CSV file with the columns file and label")
        return {(path.parent / (row["file"] or "")).resolve(): row["label"] or "" for row in rows}
    except (csv.Error, OSError) as error:
        raise LabelError(f"{path}: behind line {rows.line_num}: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LabelError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LabelError(f"{path}: not UTF-8 text") from error
