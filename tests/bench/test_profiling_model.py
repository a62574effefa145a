"""A forward pass kernel by kernel: the plan against what the engine launches, a profiler's events, traces."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vit_bench.profiling import model_gpu
from vit_bench.profiling.model import Known, Step, in_order, ranges, row, shares
from vit_bench.profiling.model_gpu import NamedLaunches, steps_of
from vit_bench.profiling.recorded import Recorded
from vit_bench.profiling.trace import Range, trace, write_trace
from vit_bench.roofline import Roofline


def figures(modelled: float | None = 4e-6, bound: float = 1e-6) -> Recorded:
    roof = Roofline(8_000_000, 3_000, bound, bound / 2)
    return Recorded("linear_kernel", {"m": 128, "n": 64}, 4, 3, 168, 0, 98_304, 264, 2, 1.0, None, roof, modelled)


STEM, QKV, ATTENTION, HEAD = (
    Known("stem", "patch_embed_kernel", figures(None, 2e-6)),
    Known("qkv", "linear_kernel", figures(), block=0, times=2),
    Known("attention", "attention_kernel", figures(2e-6, 3e-6), block=0, times=2),
    Known("head", "linear_kernel", figures(1e-6)),
)
PASS = in_order([STEM, QKV, ATTENTION, HEAD])


def steps() -> list[Step]:
    found, at = [], 0.0
    for label, kernel, known, block, _ in PASS:
        assert known is not None
        found.append(Step(label, kernel, block, at, known.seconds, known))
        at += known.seconds
    return found


def test_blocks_stand_between_stem_and_tail():
    assert [(one.label, one.block) for one in PASS] == [
        ("stem", None), ("qkv", 0), ("attention", 0), ("qkv", 1), ("attention", 1), ("head", None),
    ]  # fmt: skip


def test_a_last_block_of_its_own_is_the_one_behind_the_others():
    last = Known("last qkv", "linear_kernel", figures(), block=2), Known("last mlp", "mlp_kernel", None, block=2)
    found = in_order([STEM, QKV, ATTENTION, *last, HEAD])
    assert [(one.label, one.block, one.times) for one in found[3:]] == [
        ("qkv", 1, 1), ("attention", 1, 1), ("last qkv", 2, 1), ("last mlp", 2, 1), ("head", None, 1),
    ]  # fmt: skip


def test_shares_are_of_the_whole_by_label():
    found = {one.label: one for one in shares(steps())}
    assert list(found) == ["stem", "qkv", "attention", "head"]
    assert found["qkv"].launches == 2 and found["qkv"].seconds == pytest.approx(8e-6)
    assert found["qkv"].bound_s == pytest.approx(2e-6)
    assert found["stem"].seconds == 2e-6, "no model: its bound"
    assert found["attention"].seconds == pytest.approx(6e-6), "modelled below its bound: the bound"
    assert sum(one.share for one in found.values()) == pytest.approx(1)
    assert found["qkv"].share == pytest.approx(8 / 17)


def test_the_row_of_a_plan_has_no_time_and_that_of_a_profile_has():
    forward = row(steps(), "H100 SXM", "vit_tiny_patch16_224", 8, "bf16")
    assert (forward.case, forward.source, forward.launches, forward.images) == (
        "model/vit_tiny_patch16_224/b8", "compiled", 6, 8,
    )  # fmt: skip
    assert forward.seconds is None and forward.modelled_s == pytest.approx(17e-6)
    assert forward.bound_s == pytest.approx(2e-6 + 2 * 1e-6 + 2 * 3e-6 + 1e-6) and forward.flops == 6 * 8_000_000
    kernels = forward.code["kernels"]
    assert [(one["launch"], one["times"]) for one in kernels] == [
        ("stem", 1), ("qkv", 2), ("attention", 2), ("head", 1),
    ]  # fmt: skip
    assert kernels[1]["kernel"] == "linear_kernel" and kernels[1]["modelled_s"] == 4e-6 and "seconds" not in kernels[1]
    assert forward.shape == {"batch": 8, "tokens": 197, "heads": 3, "head_dim": 64}
    timed = row(steps(), "H100", "vit_tiny_patch16_224", 8, "bf16", forward=20e-6)
    assert timed.source == "gpu" and timed.seconds is not None and timed.seconds.median == 20e-6
    assert [one["seconds"] for one in timed.code["kernels"]] == pytest.approx([2e-6, 4e-6, 3e-6, 1e-6])


# --- measured -------------------------------------------------------------------------------------------------------


def event(name: str, start: float, end: float, device: str = "CUDA", **more: Any) -> Any:
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=times, **more)


def events(passes: int = 3, slower: float = 10.0) -> list[Any]:
    """Passes of the six kernels, 10 us each, the first pass slower; around them what else a profiler reports."""
    found = []
    for number in range(passes):
        begin, length = 1000.0 * number, slower if number == 0 else 10.0
        for place, known in enumerate(PASS):
            found.append(event(known.kernel, begin + length * place, begin + length * (place + 1)))
        found.append(event("aten::copy_", begin, begin + 500, "CPU"))
        found.append(event("Memset (Device)", begin + 70, begin + 71))
        found.append(event("block 0", begin, begin + 60, is_user_annotation=True))
    return found


def test_a_profile_has_the_plans_labels_and_medians():
    found = steps_of(events(slower=50.0), 3, PASS)
    assert [(s.label, s.block, s.kernel) for s in found] == [(k.label, k.block, k.kernel) for k in PASS]
    assert [s.start for s in found] == pytest.approx([n * 10e-6 for n in range(6)])
    assert [s.seconds for s in found] == pytest.approx([10e-6] * 6)
    assert found[0].figures is STEM.figures


def test_a_kernel_that_begins_early_counts_from_the_end_of_the_one_in_front():
    early = [event("a", 0, 10), event("b", 6, 18), event("c", 12, 17)]
    found = steps_of(early, 1, [])
    assert [(s.label, s.start, s.seconds) for s in found] == [
        ("a", 0.0, pytest.approx(10e-6)),
        ("b", pytest.approx(10e-6), pytest.approx(8e-6)),
        ("c", pytest.approx(18e-6), 0.0),
    ]


def test_kernels_that_the_plan_does_not_know_keep_their_names():
    found = steps_of(events(), 3, PASS[:-1])
    assert [s.label for s in found] == [known.kernel for known in PASS] and not any(s.figures for s in found)
    made = row(found, "H100", "vit_tiny_patch16_224", 8, "bf16", forward=1.0)
    assert made.flops is None and made.bound_s is None and made.launches == 6


def test_passes_that_differ_are_refused():
    with pytest.raises(RuntimeError, match="17 kernels in 3 passes"):
        steps_of(events()[1:], 3, PASS)
    with pytest.raises(RuntimeError, match="0 kernels"):
        steps_of([], 3, PASS)


def launched(*kernels: str) -> list[str]:
    said: list[str] = []
    names = NamedLaunches(PASS, said.append, lambda: said.append(")"))
    for kernel in kernels:
        metadata = SimpleNamespace(get=lambda name=kernel: {"name": name})
        names.enter(metadata)
        names.leave(metadata)
    names.close()
    return said


def test_ranges_open_and_close_for_blocks_and_kernels():
    said = launched(*(known.kernel for known in PASS), "patch_embed_kernel")
    block = ["qkv: linear_kernel", ")", "attention: attention_kernel", ")", ")"]
    stem = ["stem: patch_embed_kernel", ")"]
    assert said == [*stem, "block 0", *block, "block 1", *block, "head: linear_kernel", ")", *stem]
    assert launched("patch_embed_kernel", "linear_kernel") == [*stem, "block 0", "qkv: linear_kernel", ")", ")"]
    assert launched("other_kernel") == ["other_kernel", ")"]


def test_measuring_runs_the_model_and_profiles_it(monkeypatch):
    """torch.profiler and the clock are stood in for; the interpreter is the GPU."""
    import torch

    passes: list[torch.Tensor] = []

    class Profiler:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> Profiler:
            passes.clear()
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Any]:
            return [one for one in events(passes=len(passes)) if one.name != "Memset (Device)"]

    class Model(torch.nn.Linear):
        def __init__(self, config: Any, backend: str) -> None:
            super().__init__(1, 1)

        def set_backend(self, name: str) -> Model:
            assert name == "triton"
            return self

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            passes.append(images)
            return images

    def timed(run: Any, count: int) -> float:
        run()
        return 123e-6

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X1")
    for name, value in {
        "ViT": Model,
        "timed": timed,
        "known_gpu": lambda _: None,
        "distinct": lambda *_: [],
    }.items():
        monkeypatch.setattr(model_gpu, name, value)
    monkeypatch.setattr(model_gpu, "in_order", lambda *_: PASS)
    monkeypatch.setattr(model_gpu, "device_of", lambda _: None)
    found, seconds = model_gpu.measured("vit_tiny_patch16_224", torch.device("cpu"), 2, "fp16")
    assert seconds == 123e-6 and len(passes) == model_gpu.PASSES
    assert passes[0].shape == (2, 3, 224, 224) and passes[0].dtype == torch.float16
    assert [s.label for s in found] == [known.label for known in PASS]


# --- traces ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_what_viewers_read(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(ranges(steps()), path, "modelled, not measured: H100 SXM", {"model": "any"})
    found = json.loads(path.read_text())
    assert found["otherData"] == {"times": "modelled, not measured: H100 SXM", "model": "any"}
    events = found["traceEvents"]
    names = {(e["name"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert names["process_name", 0] == {"name": "modelled, not measured: H100 SXM"}
    assert names["thread_name", 1] == {"name": "blocks"} and names["thread_name", 2] == {"name": "kernels"}
    timed = [e for e in events if e["ph"] == "X"]
    assert len(timed) + len(names) == len(events)
    assert all(set(e) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} for e in timed)
    assert {e["pid"] for e in events} == {1}
    blocks = [(e["name"], e["ts"], e["dur"]) for e in timed if e["tid"] == 1]
    assert blocks == [("stem", 0.0, 2.0), ("block 0", 2.0, 7.0), ("block 1", 9.0, 7.0), ("head", 16.0, 1.0)]
    kernels = [e for e in timed if e["tid"] == 2]
    assert [e["name"] for e in kernels] == [known.label for known in PASS]
    assert kernels[1]["args"]["tile"] == {"m": 128, "n": 64} and kernels[1]["args"]["bound_us"] == 1.0


def test_ranges_of_one_lane_do_not_cross():
    """Viewers nest what lies inside and drop what crosses: whatever begins first and ends last comes first."""
    inner, outer = Range("a", "inner", 0.0, 1e-6), Range("a", "outer", 0.0, 5e-6)
    assert [e["name"] for e in trace([inner, outer], "p", {})["traceEvents"] if e["ph"] == "X"] == ["outer", "inner"]
