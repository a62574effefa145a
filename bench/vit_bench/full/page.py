"""The report as one HTML page that needs nothing but itself: no network, no script, no font."""

from __future__ import annotations

from html import escape
from typing import Any

from vit_bench.full.headline import headline
from vit_bench.report.style import BASE

MARKS = {"passed": "\u2713", "failed": "\u2717", "crashed": "\u2717", "timed out": "\u2717", "not run": "\u2013"}
MEANINGS = {
    "executed": "executed on this GPU, results compared with float64",
    "interpreted": "run in Triton's interpreter on the CPU, results compared with float64",
    "compiled only": "compiled to machine code, not executed",
    "PyTorch": "the torch backend on the CPU: no kernel takes part",
}
BAD = ("failed", "crashed", "timed out")

STYLE = (
    BASE
    + """
.counts { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.counts li { background: var(--box); border: 1px solid var(--line); border-radius: .4rem; padding: .35rem .8rem; }
.counts b { font-size: 1.3rem; margin-right: .35rem; }
.passed { color: var(--good); } .failed, .crashed, .timed-out { color: var(--bad); font-weight: 600; }
.not-run { color: var(--dim); }
td.number { text-align: right; padding-right: 0; white-space: nowrap; } td.status { white-space: nowrap; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: .4rem 0;
  white-space: pre-wrap; max-height: 28rem; overflow: auto; }
.bar { display: grid; grid-template-columns: 6rem 1fr max-content; gap: .6rem; align-items: center; font-size: .88rem; }
.bar span:last-child { min-width: 8.5rem; text-align: right; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: .8rem; border-radius: 2px; background: var(--theirs); min-width: 2px; }
.bar.ours i { background: var(--ours); }
@media (max-width: 40rem) {
  thead { display: none; } tr, td { display: block; } tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { border: 0; padding: .05rem 0; } td.number { text-align: left; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; } }
@media print { pre { max-height: none; } }
"""
)


def page(report: dict[str, Any]) -> str:
    """The HTML of a report as `vit_bench.full.report.build` makes it."""
    sections = [_summary(report), _environment(report["environment"]), _failures(report), _times(report)]
    body = "\n".join(section for section in (*sections, _checks(report)) if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vit-engine verification: {escape(report['verdict'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _status(status: str, count: int = 1) -> str:
    """The status as a word: its colour and its mark only repeat it, and a count of 0 alarms nobody."""
    look = status.replace(" ", "-") if count else "not-run"
    return f'<span class="{look}">{MARKS[status]}&nbsp;{escape(status)}</span>'


def _summary(report: dict[str, Any]) -> str:
    counts = "".join(f"<li><b>{count}</b>{_status(status, count)}</li>" for status, count in report["summary"].items())
    lines = [f"started {report['started']}" + (f", ended {report['ended']}" if report["ended"] else "")]
    if not report["complete"]:
        lines.insert(0, "Incomplete: this verification has not come to its end.")
    if report["only"]:
        lines.append("Only a part was asked for: " + ", ".join(report["only"]))
    if report["summary"]["not run"]:
        lines.append("What was not run is not known here to work: it is neither passed nor failed.")
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    title = f"<h1>vit-engine verification: {escape(report['verdict'])}</h1>"
    return f'{title}\n<ul class="counts">{counts}</ul>\n{paragraphs}'


def _environment(environment: dict[str, Any]) -> str:
    gpu, cuda, git = environment["gpu"], environment["cuda"], environment["git"]
    rows = {
        "GPU": _gpu(gpu) if gpu else "none that PyTorch can use",
        "driver": cuda.get("driver") or "not found",
        "CUDA of PyTorch": cuda.get("pytorch_built_for") or "none",
        "versions": ", ".join(
            f"{name} {number or 'not installed'}" for name, number in environment["versions"].items()
        ),
        "system": f"{environment['system']}, {environment['processor']}, {environment['cores']} cores",
        "compute-sanitizer": environment["compute_sanitizer"] or "not found",
        "git commit": f"{git['commit']}{', with changes' if git['changed'] else ''}" if git else "not a checkout",
    }
    if len(environment["gpus"]) > 1:
        rows["GPUs"] = f"{len(environment['gpus'])}; the first one was used"
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    sources = "".join(
        f"<li>{escape(kernel)} <code>{escape(digest)}</code></li>"
        for kernel, digest in environment["kernel_sources"].items()
    )
    hashes = f"<details><summary>Hashes of the kernels' source</summary><ul>{sources}</ul></details>"
    return f"<h2>Environment</h2>\n<dl>{entries}</dl>\n{hashes}"


def _gpu(gpu: dict[str, Any]) -> str:
    refused = f"; the kernels do not run on it: {gpu['refused']}" if gpu["refused"] else ""
    return (
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['memory_gib']} GiB{refused}"
    )


def _failures(report: dict[str, Any]) -> str:
    blocks = []
    for check in report["checks"]:
        if check["status"] not in BAD:
            continue
        output = f"<pre>{escape(check['output'])}</pre>" if check["output"] else ""
        parts = "".join(
            f"<li>{_status(p['status'])} {escape(p['name'])}: {escape(p['reason'])}</li>"
            for p in check["parts"]
            if p["status"] in BAD
        )
        listed = f"<ul>{parts}</ul>" if parts else f"<p>{escape(check['reason'])}</p>"
        blocks.append(f"<h3><code>{escape(check['name'])}</code> {_status(check['status'])}</h3>{listed}{output}")
    return "<h2>Failures</h2>\n" + "\n".join(blocks) if blocks else ""


def _times(report: dict[str, Any]) -> str:
    """Bars per model and batch; all bars of one model and batch share a scale that starts at 0."""
    blocks = []
    for figures in (part["figures"] for check in report["checks"] for part in check["parts"]):
        if "throughput" not in figures:
            continue
        rates = figures["throughput"]
        most = max(rate["images_per_second"] for rate in rates.values()) or 1.0
        bars = "".join(
            f'<div class="bar{" ours" * (number == 0)}"><span>{escape(name)}</span>'
            f'<span><i style="width:{100 * rate["images_per_second"] / most:.1f}%"></i></span>'
            f"<span>{rate['images_per_second']:,.0f} images/s</span></div>"
            for number, (name, rate) in enumerate(rates.items())
        )
        details = "; ".join(
            f"{name}: median {rate['median_ms']:.3f} ms of {rate['timings']} timings, "
            f"{rate['fastest_ms']:.3f} to {rate['slowest_ms']:.3f}"
            for name, rate in rates.items()
        )
        state = ", ".join(f"{key} {value}" for key, value in figures["nvidia_smi_under_load"].items())
        title = f"{figures['model']}, batch {figures['batch']}, {figures['dtype']}"
        notes = f"<small>{escape(details)}{'; under load: ' + escape(state) if state else ''}</small>"
        blocks.append(f"<h3>{escape(title)}</h3>{bars}{notes}")
    gpu = report["environment"]["gpu"]
    where = f" on {escape(gpu['name'])}" if gpu else ""
    return f"<h2>Throughput{where}</h2>\n" + "\n".join(blocks) if blocks else ""


def _checks(report: dict[str, Any]) -> str:
    rungs = {check["rung"] for check in report["checks"] if check["status"] != "not run"}
    meanings = "".join(
        f"<dt>{escape(rung)}</dt><dd>{escape(MEANINGS[rung])}</dd>" for rung in MEANINGS if rung in rungs
    )
    rows = "\n".join(
        f'<tr><td><code>{escape(check["name"])}</code></td><td class="status">{_status(check["status"])}</td>'
        f"<td>{_rung(check)}</td><td>{_details(check)}</td>"
        f'<td class="number">{check["seconds"]:.1f} s</td></tr>'
        for check in report["checks"]
    )
    heads = "<tr><th>check</th><th>status</th><th>rung</th><th>what was seen</th><th>time</th></tr>"
    return (
        f"<h2>Checks</h2>\n<dl>{meanings}</dl>\n<table><thead>{heads}</thead><tbody>\n{rows}\n</tbody></table>\n"
        "<p><small>To run one again: <code>vit-engine verify --full --only NAME</code></small></p>"
    )


def _rung(check: dict[str, Any]) -> str:
    """What the check shows; nothing for one that did not run, which shows nothing."""
    return "" if check["status"] == "not run" else escape(check["rung"])


def _details(check: dict[str, Any]) -> str:
    line = escape(headline(check))
    if len(check["parts"]) < 2:
        return line
    parts = "".join(f"<li>{_status(p['status'])} {escape(_part(p))}</li>" for p in check["parts"])
    return f"<details><summary>{line}</summary><ul>{parts}</ul></details>"


def _part(part: dict[str, Any]) -> str:
    as_check = {"status": part["status"], "reason": part["reason"], "parts": [part]}
    line = headline(as_check)
    return part["name"] if line == part["name"] else f"{part['name']}: {line}"
