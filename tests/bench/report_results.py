"""Results as benchmarks and profiles write them, with every kind of row that a report shows. No figure is real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vit_bench.results import OURS, Ceilings, Results, Row, Run, Spread

BASE, TINY, GPU = "vit_base_patch16_224", "vit_tiny_patch16_224", "H100 SXM"
SHEET = {"bandwidth": 3.35e12, "half": 989.4e12, "single": 66.9e12}


def run(started: str = "2026-01-02T03:04:05+00:00", **changes: Any) -> Run:
    environment = {"device": GPU, "versions": {"torch": "2.14.1", "timm": None}, "cores": 2, "gpu": {"name": "NVIDIA"}}
    values: dict[str, Any] = {"command": "vit-engine bench <all>", "environment": environment, "datasheet": SHEET}
    return Run(started, **(values | changes))


def spread(median: float, half: float = 0.02) -> Spread:
    return Spread(median, median * (1 - half), median * (1 + half), 25)


def kernel(launch: str, times: int, modelled: float, flops: int = 10**9, nbytes: int = 10**7, **more: Any) -> Any:
    values = {"launch": launch, "times": times, "kernel": f"{launch}_kernel", "tile": {"m": 128, "n": 64}, "waves": 1.5}
    values |= {"flops": flops, "bytes": nbytes, "bound": "compute", "bound_s": modelled / 2, "modelled_s": modelled}
    return values | {"registers": 128} | more


def kernels(scale: float = 1.0) -> list[Any]:
    """stem with a bound alone, a block of five launches twice, head: 63 us by the model, times `scale`."""
    us = 1e-6 * scale
    block = [("qkv", 8), ("attention", 4), ("projection", 3), ("fc1", 9), ("fc2", 6)]
    return [
        kernel("stem", 1, 4 * us, modelled_s=None),
        *(kernel(name, 2, seconds * us, flops=seconds * 10**9) for name, seconds in block),
        kernel("head", 1, us, flops=10**7),
    ]


def row(contender: str = OURS, batch: int = 64, **changes: Any) -> Row:
    """A measured forward pass of 5 ms unless told otherwise."""
    model = changes.get("model", BASE)
    values: dict[str, Any] = {
        "run": 0, "suite": "model", "case": f"model/{model}/b{batch}", "label": "forward", "contender": contender,
        "device": GPU, "dtype": "bf16", "source": "gpu", "model": model, "shape": {"batch": batch, "tokens": 197},
        "images": batch, "flops": 10**12, "settings": {"torch": "2.14.1"},
    }  # fmt: skip
    values |= {"seconds": spread(5e-3)} if changes.get("source", "gpu") in ("gpu", "cpu") else {}
    return Row(**(values | changes))


def compiled(batch: int = 64, **changes: Any) -> Row:
    values: dict[str, Any] = {"source": "compiled", "modelled_s": 6e-3, "bound_s": 3e-3, "launches": 12}
    values |= {"code": {"kernels": kernels(batch)}} | changes
    return row(OURS, batch, **values)


def attention(tokens: int, heads: int = 12, batch: int | None = None, contender: str = OURS, **changes: Any) -> Row:
    batch = batch or max(16384 // tokens, 1)
    values: dict[str, Any] = {
        "suite": "attention", "case": f"attention/h{heads}d64/n{tokens}/b{batch}", "label": "attention", "images": 0,
        "shape": {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": 64}, "model": "",
        "flops": 4 * tokens**2 * heads * batch * 64, "seconds": spread(1e-4), "bound_s": 2e-5,
    }  # fmt: skip
    return row(contender, batch, **(values | changes))


def results() -> Results:
    """Two runs: measured on a GPU beside others, and modelled for another one; hostile names among them."""
    errors = {"row": 2e-3, "row_allowed": 8e-3, "largest": 0.01}
    rows = []
    for batch, ours in ((1, 4e-4), (64, 5e-3)):
        memory = batch * 2 * 10**6
        rows += [
            row(batch=batch, seconds=spread(ours), bound_s=ours / 2, peak_bytes=memory, launches=63, errors=errors),
            row("timm, eager", batch, seconds=spread(ours * 1.5), peak_bytes=2 * memory, errors=errors),
            row("<b>compiled</b>", batch, seconds=spread(ours * 1.01)),
        ]
    rows += [
        row(suite="kernels", case="kernels/x", label="qkv", flops=10**11, nbytes=10**8, seconds=spread(2e-4)),
        row(suite="kernels", case="kernels/y", label="fc1", flops=10**11, nbytes=10**9, seconds=spread(5e-4)),
        *(attention(tokens) for tokens in (64, 197, 512, 1024)),
        *(attention(tokens, contender="SDPA", seconds=spread(2e-4)) for tokens in (64, 197, 512, 1024)),
        *(attention(197, heads) for heads in (3, 6)),
        row("flash-attn", source="not run", reason="not installed: <script>alert(1)</script>"),
    ]
    measured = run(ceilings=Ceilings(3.0e12, {"bf16": 741e12}))
    other = [replace(compiled(batch), run=1, device="A100") for batch in (1, 8, 64)]
    return Results([measured, run("2026-02-03T00:00:00+00:00")], [*rows, *other])
