"""A record counts while its source is the one at hand and it has run every tile that is chosen now."""

from __future__ import annotations

from typing import Any

import pytest

from vit_bench import current, records
from vit_bench.tile_choices import Choice
from vit_kernels.mlp_tiles import MlpTile
from vit_kernels.tiles import RowsTile

SMALL, LARGE = (Choice(RowsTile(rows, 64, 4), 0, False) for rows in (1, 4))


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Choice]]:
    """What presets get, and may be changed: two tiles of layer_norm."""
    tiles = {"layer_norm": [SMALL, LARGE]}
    monkeypatch.setattr(current, "_choices", lambda dtype, capability: tiles)
    return tiles


def record(detail: dict[str, Any], capability: int | None = 90, **changes: Any) -> records.Record:
    fields: dict[str, Any] = {"source": records.source_hash("layer_norm"), "passed": True, **changes}
    return records.Record("layer_norm", "float16", capability, versions={}, date="2026-01-01", detail=detail, **fields)


def ran(*choices: Choice) -> dict[str, Any]:
    return {"passed": {str(choice): {} for choice in choices} | {"width 80": {}}, "failed": {}}


@pytest.mark.parametrize("rung", ["executed", "emulated", "sanitized"])
def test_a_run_of_all_tiles_counts(rung: str) -> None:
    assert current.counts(rung, record(ran(SMALL, LARGE)))


def test_a_run_without_one_of_the_tiles_does_not() -> None:
    assert not current.counts("executed", record(ran(SMALL)))


def test_a_tile_that_is_chosen_no_more_takes_nothing_from_it(chosen: dict[str, list[Choice]]) -> None:
    chosen["layer_norm"].remove(SMALL)
    assert current.counts("executed", record(ran(SMALL, LARGE)))


def test_compiled_records_name_their_tiles() -> None:
    assert current.counts("compiled", record({"tiles": [str(SMALL), str(LARGE)]}))
    assert not current.counts("compiled", record({"tiles": [str(LARGE)]}))
    assert not current.counts("compiled", record({}))


def test_the_interpreter_has_no_tiles() -> None:
    assert current.counts("interpreted", record(ran(), None))


@pytest.mark.parametrize("changes", [{"source": "older"}, {"passed": False}])
def test_other_source_and_failed_runs_do_not_count(changes: dict[str, Any]) -> None:
    assert not current.counts("executed", record(ran(SMALL, LARGE), **changes))


def test_the_name_of_a_tile_tells_apart_what_is_compiled_apart() -> None:
    tile = MlpTile(64, 32, 4, 2)
    names = {str(Choice(tile, width, gated)) for width in (96, 192) for gated in (False, True)}
    assert len(names) == 4
