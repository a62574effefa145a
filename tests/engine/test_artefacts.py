"""Folders of compiled kernels: loaded without compiling anything, and never where something differs or is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vit_kernels
from tests.bench.child import run
from vit_engine import artefacts, load_kernels
from vit_engine.artefacts import ArtefactError, save_kernels
from vit_kernels import kernel_cache

H100 = {"capability": 90, "sm_count": 132, "shared_memory": 232_448}
VERSIONS = {"triton": "3.8.0", "torch": "2.14.1", "vit_kernels": "abc"}
FILES = {"KEY1/a_kernel.cubin": b"code", "KEY1/a_kernel.json": b"{}", "KEY2/b_kernel.cubin": b"more"}


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """What was handed to Triton's cache, on a machine with an H100."""
    handed: list[dict[str, bytes]] = []
    monkeypatch.setattr(kernel_cache, "gpu_here", lambda: H100)
    monkeypatch.setattr(kernel_cache, "put", lambda files: handed.append(dict(files)))
    monkeypatch.setattr(artefacts, "versions_here", lambda capability: VERSIONS)
    monkeypatch.setattr(vit_kernels, "interpreting", lambda: False)
    return handed


@pytest.fixture
def folder(tmp_path: Path, put: list[dict[str, bytes]]) -> Path:
    made = tmp_path / "made"
    saved = save_kernels(made, FILES, model="vit", dtype="bf16", shapes=[(1, 3, 224, 224)], gpu=H100)
    assert saved.kernels == 2
    return made


def test_what_was_saved_is_loaded(folder: Path, put: list[dict[str, bytes]]) -> None:
    loaded = load_kernels(folder)
    assert put == [FILES]
    assert (loaded.model, loaded.dtype, loaded.kernels, loaded.gpu) == ("vit", "bf16", 2, H100)


def remove_a_file(folder: Path) -> None:
    (folder / "kernels/KEY1/a_kernel.cubin").unlink()


def corrupt_a_file(folder: Path) -> None:
    (folder / "kernels/KEY2/b_kernel.cubin").write_bytes(b"mora")


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 200_000)


def whole_manifest(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def in_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        found = json.loads(path.read_text())
        for name, value in changes.items():
            if value is None:
                del found[name]
            else:
                found[name] = found[name] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(found))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_a_file, r"KEY1/a_kernel.cubin is in the manifest and cannot be read: No such file"),
        (corrupt_a_file, r"KEY2/b_kernel.cubin was changed: its SHA-256 is [0-9a-f]{64}, the manifest says"),
        (remove_the_manifest, r"manifest.json is missing: .* was not written by `vit-engine warmup`"),
        (cut_the_manifest, "manifest.json is no JSON file"),
        (in_manifest(format=2), "must have format 1"),
        (in_manifest(versions={"triton": "3.7.0"}), "triton is 3.7.0 there and 3.8.0 here"),
        (
            in_manifest(versions={"torch": "2.9.0", "vit_kernels": "x"}),
            "torch is 2.9.0.*vit_kernels is x there and abc",
        ),
        (in_manifest(versions={"new": "1"}), "new is 1 there and missing here"),
        (in_manifest(gpu={"sm_count": 114}), "sm_count is 114 there and 132 here"),
        (in_manifest(gpu={"capability": 80}), "capability is 80 there and 90 here"),
        (whole_manifest(gpu=[90]), r"gpu must be an object, got \[90\]"),
        (whole_manifest(gpu=None), "gpu must be an object, got None"),
        (whole_manifest(versions=None), "versions must be an object, got None"),
        (whole_manifest(files=["KEY1/a.cubin"]), "files must be an object, got "),
        (deep_manifest, "manifest.json is no JSON file: maximum recursion depth"),
        (in_manifest(shapes=None), "does not have the fields of a manifest"),
        (in_manifest(files={"../../KEY3/c.json": "0"}), r"must list files KEY/NAME.*\.\./\.\./KEY3"),
        (in_manifest(files={"KEY3/c_kernel.json": "0"}), "KEY3/c_kernel.json is in the manifest and cannot be read"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_whole(
    change: Callable[[Path], None], message: str, folder: Path, put: list[dict[str, bytes]]
) -> None:
    change(folder)
    with pytest.raises(ArtefactError, match=message):
        load_kernels(folder)
    assert not put, "nothing may be loaded of a folder with anything wrong in it"


def test_interpreted_kernels_have_no_machine_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit_kernels, "interpreting", lambda: True)
    with pytest.raises(ArtefactError, match="unset TRITON_INTERPRET"):
        load_kernels(folder)


def test_a_folder_with_something_in_it_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made must be an empty folder"):
        save_kernels(folder, FILES, model="vit", dtype="bf16", shapes=[], gpu=H100)
    with pytest.raises(ValueError, match="files is empty"):
        save_kernels(tmp_path / "new", {}, model="vit", dtype="bf16", shapes=[], gpu=H100)


# --- the real thing: compiled for a GPU that is not here, loaded in a process with an empty cache ---------------------

PREPARE = """
import json, os, tempfile
os.environ["TRITON_CACHE_DIR"] = {cache!r}  # before Triton looks
import timm, torch
from vit_bench import warmup
from vit_bench.recording import gpu, recording
from vit_engine import load_kernels
from vit_engine.artefacts import save_kernels
from vit_kernels.kernel_cache import compilations, gpu_facts

if {transformers!r}:
    from transformers import ViTConfig
    ViTConfig(num_hidden_layers=2).save_pretrained({transformers!r})

def model(name):
    if name != "small":
        return warmup.find(name)(torch.bfloat16)
    build = lambda: timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=10
    )
    return warmup.Warmed((3, 32, 32), (warmup.blank(build, torch.bfloat16),))
"""
COMPILE = """
for name in {names!r}:
    found = model(name)
    files = warmup.kernels_of(found, "h100", [1, 2], torch.bfloat16)
    save_kernels(
        os.path.join({folder!r}, name.partition(":")[0]), files, model=name, dtype="bf16", shapes=[],
        gpu=gpu_facts(gpu("h100")),
    )
print(json.dumps(os.listdir({cache!r})))
"""
SERVE = """
seen = {{}}
for name in {names!r}:
    found = model(name)
    with recording(gpu("h100")) as recorder:
        loaded = load_kernels(os.path.join({folder!r}, name.partition(":")[0]))
        with compilations() as compiled, torch.inference_mode():
            for batch in (1, 2) * 3:
                for run in found.runs:
                    run(torch.empty(batch, *found.size, dtype=torch.bfloat16))
    seen[name] = [loaded.kernels, compiled, len(recorder.launches)]
print(json.dumps(seen))
"""
# The counter does count, and another GPU is refused.
CONTROL = """
with recording(gpu("h100")), compilations() as compiled:
    import vit_kernels
    vit_kernels.layer_norm(torch.empty(3, 64, dtype=torch.bfloat16))
with recording(gpu("a100")):
    try:
        load_kernels(os.path.join({folder!r}, "small"))
    except RuntimeError as error:
        print(json.dumps([seen["small"], compiled, str(error)]))
"""
# A final norm of four warps is one of eight where that was measured to be faster.
TUNED = """
from vit_kernels.tuned import Entry, Gpu, Tuned

def norms(table):
    files = warmup.kernels_of(model("small"), "h100", [1], torch.bfloat16, table)
    found = [json.loads(text) for name, text in files.items() if name.endswith("/layer_norm_kernel.json")]
    return [kernel["num_warps"] for kernel in found]

problem = dict(kernel="layer_norm", dtype="bfloat16", kind="layer", weight=True, bias=True, row_stride=64, m=1, n=64)
winner = dict(block_m=1, block_n=64, num_warps=8)
table = Tuned(Gpu("H100", 90, 132), {{}}, "", (Entry(problem, winner),))
print(json.dumps([norms(None), norms(table), norms(None)]))
"""


def prepared(tmp_path: Path, names: list[str], transformers: str = "") -> dict[str, Any]:
    found = {"folder": str(tmp_path / "kernels"), "names": names, "transformers": transformers}
    for machine in ("build", "server"):
        (tmp_path / machine).mkdir()
    build = found | {"cache": str(tmp_path / "build")}
    assert run((PREPARE + COMPILE).format(**build)) == [], "kernels were compiled into the machine's own cache"
    return found | {"cache": str(tmp_path / "server")}


@pytest.mark.compiled
def test_a_server_compiles_nothing(tmp_path: Path) -> None:
    server = prepared(tmp_path, ["small"])
    (kernels, compiled, launches), others, refusal = run((PREPARE + SERVE + CONTROL).format(**server))
    assert compiled == [] and kernels >= 5 and launches >= 6 * 10
    assert others == ["layer_norm_kernel"], "what the folder has no kernel for is compiled as ever"
    assert "capability is 90 there and 80 here" in refusal
    assert refusal.endswith("Make it anew with warmup --gpu sm_80:108")


@pytest.mark.compiled
def test_winners_of_a_tuned_file_are_compiled_and_left_behind_nowhere(tmp_path: Path) -> None:
    assert run((PREPARE + TUNED).format(cache=str(tmp_path), transformers="")) == [[4], [8], [4]]


@pytest.mark.compiled
@pytest.mark.slow
def test_models_of_every_library(tmp_path: Path) -> None:
    local = str(tmp_path / "hub")
    names = ["vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", "torchvision:vit_b_32", f"transformers:{local}"]
    for name, (kernels, compiled, _) in run((PREPARE + SERVE).format(**prepared(tmp_path, names, local))).items():
        assert compiled == [] and kernels >= 5, name


def test_a_file_is_no_folder_of_kernels(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"file/manifest\.json cannot be read: Not a directory"):
        load_kernels(tmp_path / "file")
