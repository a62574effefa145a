"""Times without a pause: the clock is that of the SMs, and what is timed is what runs between the stamps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.child import run
from vit_bench.timed import sustained as timed

CPU = torch.device("cpu")


def test_the_clock_is_that_of_most_sms_between_stamps_of_the_same():
    before = {0: (1000, 50), 1: (9_000_000, 50), 2: (0, 60), 7: (5, 5)}
    after = {0: (1000 + 1500, 50 + 1000), 1: (9_000_000 + 1400, 50 + 1000), 2: (2 * 1700, 60 + 2000), 9: (1, 1)}
    assert timed.between(before, after) == (1000, pytest.approx(1.5))
    with pytest.raises(ValueError, match="an SM in common"):
        timed.between({0: (1, 1)}, {1: (2, 2)})


class _Gpu:
    """A GPU of four SMs whose clock is 1.25 GHz. A call takes 2 us; graphs are what is called while they are captured,
    and `passed` are the nanoseconds since it was switched on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0
        self.capturing: list[Any] | None = None
        self.replays = 0
        monkeypatch.setattr(timed, "stamp_kernel", self)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=4),
            "synchronize": lambda device: None,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda one: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay, calls=[]),
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        moments = iter([0.0, 0.1, 0.3, 0.5, 0.7])
        monkeypatch.setattr(timed.time, "perf_counter", moments.__next__)

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.capturing = self.calls = []
        yield
        self.capturing = None

    def do(self, what: Any) -> None:
        what() if self.capturing is None else self.capturing.append(what)

    def replay(self) -> None:
        self.replays += 1
        self.passed += 5_000_000
        for what in self.calls:
            what()

    def __getitem__(self, grid: tuple[int]) -> Any:
        assert grid == (4,)

        def launch(out: torch.Tensor) -> None:
            def stamp() -> None:
                now = [(sm, 10**9 * sm + self.passed * 5 // 4, self.passed) for sm in range(4)]
                out.copy_(torch.tensor(now))

            self.do(stamp)

        return launch

    def call(self) -> None:
        def run() -> None:
            self.passed += 2000

        self.do(run)


def test_a_call_among_many_without_a_pause(monkeypatch):
    gpu = _Gpu(monkeypatch)
    found = timed.sustained(gpu.call, CPU)
    assert found.seconds == pytest.approx(2e-6) and found.clock == pytest.approx(1.25e9)
    assert gpu.replays == 2, "until the clock has settled"


@pytest.mark.compiled
def test_the_stamp_is_compiled_for_every_generation():
    seen = run(
        """
        import json, torch
        from vit_bench.recording import gpu, recording
        from vit_bench.sass import instructions
        from vit_bench.timed.sustained import stamp_kernel
        found = {}
        for name in ("sm_80", "sm_90", "sm_120"):
            with recording(gpu(name)) as recorder:
                stamp_kernel[(8,)](torch.empty(8, 3, dtype=torch.int64))
            code = str(instructions(recorder.launches[0].binary.cubin))
            found[name] = [word in code for word in ("SR_VIRTUALSMID", "SR_CLOCKLO", "SR_GLOBALTIMERLO")]
        print(json.dumps(found))
        """
    )
    assert seen == {name: [True, True, True] for name in ("sm_80", "sm_90", "sm_120")}
