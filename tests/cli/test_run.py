"""``vit-engine run``: real files in, classes, accuracy, agreement, errors and exit codes out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import vit_engine
from tests.rung import child_environment
from vit_engine import digits, load_model, save_checkpoint
from vit_engine.cli import child, classify, pipeline
from vit_engine.cli.app import app

KEYS = {
    "predictions", "accuracy", "backend", "agreement", "images_per_second", "device", "dtype", "versions", "errors"
}  # fmt: skip


def fake_interpret(error=0.0, calls=None):
    """What the child would answer, computed here by the torch backend, and as wrong as asked for."""

    def interpret(model, images, *, dtype, batch_size=8):
        if calls is not None:
            calls.append((dtype, len(images)))
        with torch.inference_mode():
            logits = model.float()(images)
        return child.Interpreted(logits + error, "interpret", 0.25)

    return interpret


@pytest.fixture
def run(monkeypatch):
    """Run ``vit-engine run`` on the CPU in this process, with a child that answers at once."""
    monkeypatch.setattr(classify, "interpret", fake_interpret())

    def invoke(*arguments, code=0, device="cpu"):
        result = CliRunner().invoke(app, ["run", *map(str, arguments), "--device", device])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.stdout + result.stderr
        return result

    return invoke


def only_object(result):
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture
def some(tmp_path):
    """A folder with six held-out digits under their own names."""
    folder = tmp_path / "some"
    folder.mkdir()
    for path in list(digits.heldout())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_without_arguments_the_bundled_digits_are_classified(run):
    found = only_object(run("--json"))
    assert set(found) == KEYS
    assert len(found["predictions"]) == len(digits.heldout())
    right = sum(p["label"] == p["truth"] for p in found["predictions"])
    assert found["accuracy"] == pytest.approx(right / len(found["predictions"]), abs=1e-6)
    assert found["accuracy"] >= 0.975
    assert (found["backend"], found["device"], found["dtype"], found["errors"]) == ("torch", "cpu", "fp32", [])
    assert found["images_per_second"] > 0
    agreement = found["agreement"]
    assert (agreement["kernels"], agreement["images"], agreement["top1"]) == ("interpret", 8, 1.0)
    assert agreement["max_abs_error"] < 1e-5
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert found["versions"]["vit_engine"] == vit_engine.__version__
    first = found["predictions"][0]
    assert first["file"] == str(next(iter(digits.heldout())))
    assert first["top"][0] == {key: first[key] for key in ("index", "label", "probability")}
    assert len(first["top"]) == 3


def test_the_same_for_people(run):
    result = run()
    words = " ".join(result.stdout.split())
    accuracy = digits.training()["heldout"]
    right = accuracy["images"] - accuracy["wrong"]
    assert "heldout/000.png" in words
    assert f"and {accuracy['images'] - 10} more" in words
    assert any(f"({right + off} of {accuracy['images']} images)" in words for off in (-1, 0, 1))
    assert "backend torch on cpu, fp32" in words
    assert "images/s" in words
    assert "same class for 8 of 8 images" in words
    assert result.stderr == ""


def test_logits_are_those_of_the_model(run, some):
    found = only_object(run(some, "--json", "--top-k", 99))
    known = digits.heldout()
    model = load_model(digits.CHECKPOINT, backend="torch")
    for prediction in found["predictions"]:
        path = some / prediction["file"]
        pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(1, 1, 8, 8)
        with torch.inference_mode():
            expected = model(pixels)[0].softmax(0)
        assert len(prediction["top"]) == 10
        for entry in prediction["top"]:
            assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), abs=1e-5)
        assert prediction["label"] == known[digits.HELDOUT / path.name]
        assert "truth" not in prediction
    assert found["accuracy"] is None


@pytest.mark.parametrize("size", [1, 4, 64])
def test_batch_size_changes_nothing_but_the_batches(run, some, size):
    one = only_object(run(some, "--json"))["predictions"]
    other = only_object(run(some, "--json", "--batch-size", size))["predictions"]
    assert [p["file"] for p in one] == [p["file"] for p in other] == sorted(p["file"] for p in one)
    assert [p["label"] for p in one] == [p["label"] for p in other]
    assert [p["probability"] for p in one] == pytest.approx([p["probability"] for p in other], abs=1e-5)


def test_files_that_fail_are_named_and_the_others_go_on(run, some):
    (some / "a_text.png").write_text("no image")
    whole = (some / "000.png").read_bytes()
    (some / "b_half.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    frames[0].save(some / "c_moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (20, 30)).save(some / "d_print.jpg")
    Image.new("RGBA", (9, 9)).save(some / "e_ünï ☃.webp")
    missing = some.parent / "missing.png"
    found = run(missing, some, "--json", code=1)
    result = only_object(found)
    names = [os.path.basename(p["file"]) for p in result["predictions"]]
    assert names == [f"00{i}.png" for i in range(6)] + ["c_moving.gif", "d_print.jpg", "e_ünï ☃.webp"]
    failed = [str(missing), str(some / "a_text.png"), str(some / "b_half.png")]
    assert [error["file"] for error in result["errors"]] == failed
    lines = found.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line, file in zip(lines, failed, strict=True))
    assert lines[0] == f"{missing}: No such file or directory"
    notes = {os.path.basename(p["file"]): p.get("note") for p in result["predictions"]}
    assert notes["c_moving.gif"] == "animated, only frame 1 is used"
    assert notes["000.png"] is None
    assert run(some, code=1).stdout.count("ünï ☃") == 1


def test_nothing_usable(run, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    found = run(tmp_path, "--json", code=2)
    result = only_object(found)
    assert (result["predictions"], result["accuracy"], result["agreement"]) == ([], None, None)
    assert result["images_per_second"] is None
    assert len(result["errors"]) == 1
    found = run(tmp_path / "none", code=2)
    assert found.stdout == ""
    assert found.stderr == f"{tmp_path / 'none'}: No such file or directory\n"


def test_file_names_with_line_breaks_and_markup_stay_one_line(run, tmp_path):
    (tmp_path / "x\n[bold]y.png").write_text("no image")
    lines = run(tmp_path, code=2).stderr.splitlines()
    assert len(lines) == 1
    assert "x\\n[bold]y.png: not an image" in lines[0]


def test_true_labels_from_a_file(run, some):
    known = {path.name: label for path, label in digits.heldout().items()}
    names = sorted(path.name for path in some.iterdir())
    wrong = {names[0]: str((int(known[names[0]]) + 1) % 10)}
    rows = [f"{name},{wrong.get(name, known[name])}" for name in names[:4]]
    (some / "truth.csv").write_text("\n".join(["file,label", *rows]))
    found = only_object(run(some, "--truth", some / "truth.csv", "--json"))
    assert found["accuracy"] == 0.75
    assert [p.get("truth") is None for p in found["predictions"]] == [False] * 4 + [True] * 2
    assert f"{wrong[names[0]]} (wrong)" in run(some, "--truth", some / "truth.csv").stdout
    (some / "truth.csv").write_text("a,b\n")
    assert (
        "must be a CSV file with the columns file and label" in run(some, "--truth", some / "truth.csv", code=2).stderr
    )


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nïne"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "\n".join(NAMES) + "\n"),
        ("l.json", json.dumps(NAMES)),
        ("l.json", json.dumps({str(i): name for i, name in enumerate(NAMES)})),
        ("l.json", json.dumps({str(i): [f"n{i:08}", name] for i, name in enumerate(NAMES)})),
        ("l.json", json.dumps({name: i for i, name in enumerate(NAMES)})),
    ],
)
def test_class_names(run, some, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    plain = only_object(run(some, "--json"))["predictions"]
    named = only_object(run(some, "--json", "--labels", tmp_path / name))["predictions"]
    assert [p["label"] for p in named] == [NAMES[p["index"]] for p in plain]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("l.txt", "a\nb\n", "2 class names for a model with 10 classes"),
        ("l.json", "{", "not valid JSON"),
        ("l.json", "[1]", "must be a list of names"),
        ("l.json", '{"0": "a", "2": "b"}', "numbers must run from 0 to 1"),
        ("l.json", '{"a": 0, "b": "c"}', "must map numbers to names or names to numbers"),
        ("l.json", '{"0": 1.5}', "1.5 is no class name"),
        ("l.txt", b"\xff\xfe\xfa", "not UTF-8 text"),
        ("gone.txt", None, "No such file or directory"),
    ],
)
def test_unusable_class_names(run, some, tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = run(some, "--labels", tmp_path / name, code=2)
    assert text in result.stderr
    assert result.stderr.startswith("vit-engine run: ")
    assert result.stdout == ""


def test_own_checkpoint_with_names_inside(run, some, tmp_path):
    model = load_model(digits.CHECKPOINT, backend="torch")
    save_checkpoint(model, tmp_path / "mine.safetensors", metadata={"labels": json.dumps(NAMES)})
    found = only_object(run(some, "--checkpoint", tmp_path / "mine.safetensors", "--json"))
    assert {p["label"] for p in found["predictions"]} <= set(NAMES)
    assert found["agreement"]["images"] == 1
    result = run("--checkpoint", tmp_path / "mine.safetensors", code=2)
    assert "--checkpoint needs images" in result.stderr


def test_checkpoints_that_do_not_describe_their_model(run, some, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    assert "holds no model description" in run(some, "--checkpoint", path, code=2).stderr
    assert "missing from the file" in run(some, "--checkpoint", path, "--model", "vit_tiny_patch16_224", code=2).stderr
    assert "no preset 'vit_tinny'" in run(some, "--checkpoint", path, "--model", "vit_tinny", code=2).stderr
    (tmp_path / "w.npz").write_bytes(b"")
    assert "name its architecture with --model" in run(some, "--checkpoint", tmp_path / "w.npz", code=2).stderr
    assert "no such checkpoint" in run(some, "--checkpoint", tmp_path / "gone.safetensors", code=2).stderr


def test_preset_with_a_bare_checkpoint_takes_its_classes_from_the_labels(run, some, tmp_path):
    config = vit_engine.ViTConfig.preset("vit_tiny_patch16_224", num_classes=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = vit_engine.ViT(config, backend="torch").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "bare.safetensors")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    found = only_object(
        run(
            some, "--checkpoint", tmp_path / "bare.safetensors", "--model", "vit_tiny_patch16_224",
            "--labels", tmp_path / "two.txt", "--check", 0, "--json",
        )
    )  # fmt: skip
    assert all(sorted(t["label"] for t in p["top"]) == ["cat", "dog"] for p in found["predictions"])
    assert found["agreement"] is None


def test_outputs_that_are_not_finite_are_errors(run, some, tmp_path):
    model = load_model(digits.CHECKPOINT, backend="torch")
    with torch.no_grad():
        model.get_parameter("head.bias")[3] = math.nan
    save_checkpoint(model, tmp_path / "nan.safetensors")
    found = run(some, "--checkpoint", tmp_path / "nan.safetensors", "--json", code=2)
    result = only_object(found)
    assert [e["reason"] for e in result["errors"][:6]] == ["the model's output is not finite"] * 6
    assert result["agreement"]["max_abs_error"] is None
    assert "not finite" in result["errors"][-1]["reason"]


def test_disagreement_is_an_error(run, some, monkeypatch):
    monkeypatch.setattr(classify, "interpret", fake_interpret(error=0.5))
    found = run(some, "--json", code=1)
    result = only_object(found)
    assert result["agreement"]["max_abs_error"] == pytest.approx(0.5, rel=1e-3)
    assert result["errors"][-1]["file"] is None
    assert "the kernels disagree with PyTorch" in result["errors"][-1]["reason"]
    assert found.stderr.count("the kernels disagree with PyTorch: largest logit error 0.5") == 1


def test_a_failing_child_costs_the_comparison_alone(run, some, monkeypatch):
    def broken(*_, **__):
        raise child.ChildError("ended by signal 9")

    monkeypatch.setattr(classify, "interpret", broken)
    found = run(some, "--json", code=1)
    result = only_object(found)
    assert len(result["predictions"]) == 6
    assert result["agreement"] is None
    assert result["errors"] == [
        {"file": None, "reason": "kernels and PyTorch could not be compared: ended by signal 9"}
    ]
    assert "ended by signal 9" in run(some, "--backend", "interpret", code=2).stderr


def test_everything_in_the_interpreter(run, some, monkeypatch):
    calls = []
    monkeypatch.setattr(classify, "interpret", fake_interpret(calls=calls))
    found = only_object(run(some, "--backend", "interpret", "--dtype", "fp16", "--json"))
    assert calls == [(torch.float16, 6)]
    assert (found["backend"], found["dtype"]) == ("interpret", "fp16")
    assert found["images_per_second"] == pytest.approx(24)
    assert (found["agreement"]["kernels"], found["agreement"]["dtype"]) == ("interpret", "fp16")


@pytest.mark.parametrize(("dtype", "checked"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp32")])
def test_precisions_of_the_run_and_of_the_comparison(run, some, monkeypatch, dtype, checked):
    calls = []
    monkeypatch.setattr(classify, "interpret", fake_interpret(calls=calls))
    found = only_object(run(some, "--dtype", dtype, "--check", 2, "--json"))
    assert (found["dtype"], found["agreement"]["dtype"]) == (dtype, checked)
    assert calls == [(classify.DTYPES[checked], 2)]
    assert all(
        p["label"] == digits.heldout()[digits.HELDOUT / os.path.basename(p["file"])] for p in found["predictions"]
    )


@pytest.mark.parametrize(
    ("arguments", "device", "text"),
    [
        (["--backend", "interpret", "--dtype", "bf16"], "cpu", "Triton's interpreter computes bfloat16 wrongly"),
        (["--backend", "interpret"], "meta", "the interpreter runs on the CPU, not on meta"),
        (["--backend", "triton"], "cpu", "backend 'triton' cannot run"),
        ([], "gpu", "--device gpu: no such kind of device"),
        ([], "cuda:7", "--device cuda:7: PyTorch sees 0 GPUs here"),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(run, some, monkeypatch, arguments, device, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(some, *arguments, code=2, device=device)
    assert text in result.stderr
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pipeline._device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pipeline._device("auto") == torch.device("cpu")


def test_a_child_that_dies_is_reported(monkeypatch, tmp_path):
    model = load_model(digits.CHECKPOINT, backend="torch")
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(child.ChildError, match="was ended by signal 9"):
        child.interpret(model, images, dtype=torch.float32)
    program.write_text("#!/bin/sh\necho first >&2; echo last words >&2; exit 3\n")
    with pytest.raises(child.ChildError, match="ended with code 3: last words"):
        child.interpret(model, images, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"fp32 and fp16, not torch\.bfloat16"):
        child.interpret(model, images, dtype=torch.bfloat16)


def test_the_child_says_what_went_wrong(tmp_path, monkeypatch):
    (tmp_path / "request.json").write_text(json.dumps({"dtype": "float32", "batch_size": 8}))
    monkeypatch.setattr(sys, "argv", ["child", str(tmp_path)])
    assert child.main() == 1
    assert "request.safetensors" in json.loads((tmp_path / "reply.json").read_text())["error"]


def environment():
    return {**child_environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_the_real_command_with_the_real_interpreter(some, tmp_path):
    """In a folder with a module that would break every child that imports from where it stands."""
    (tmp_path / "random.py").write_text("raise RuntimeError('imported from the current folder')")
    command = [
        sys.executable,
        "-m",
        "vit_engine.cli.app",
        "run",
        str(some),
        "--device",
        "cpu",
        "--json",
        "--check",
        "2",
    ]
    (some / "broken.png").write_text("no image")
    done = subprocess.run(
        command, env={**environment(), "PYTHONSAFEPATH": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{some / 'broken.png'}: not an image, damaged, or not one of JPEG, PNG")
    found = json.loads(done.stdout)
    assert set(found) == KEYS
    assert len(found["predictions"]) == 6
    assert (found["agreement"]["kernels"], found["agreement"]["images"]) == ("interpret", 2)
    assert found["agreement"]["top1"] == 1.0
    assert 0 < found["agreement"]["max_abs_error"] < 1e-4


def test_the_command_line_starts_without_heavy_imports():
    program = (
        "import sys, vit_engine.cli.app as a; "
        "print([m for m in ('torch', 'triton', 'numpy', 'PIL', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version_and_help():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, vit_engine.__version__)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("run", "verify", "info"))


def test_verify_passes_its_options_on(monkeypatch):
    seen = []

    def verify_command(model: str = "none", as_json: bool = False) -> None:
        seen.append((model, as_json))
        raise SystemExit(5)

    module = types.ModuleType("vit_engine.cli.verify")
    vars(module)["verify_command"] = verify_command
    monkeypatch.setitem(sys.modules, "vit_engine.cli.verify", module)
    result = CliRunner().invoke(app, ["verify", "--model", "vit_tiny", "--as-json"])
    assert (result.exit_code, seen) == (5, [("vit_tiny", True)])
    assert "--model" in CliRunner().invoke(app, ["verify", "--help"]).stdout
