"""``vit-engine run``: real files in, classes, accuracy, agreement, errors and exit codes out."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import time
from contextlib import closing
from importlib.metadata import version

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vit_engine
from tests.cli.support import fake_interpret, only_object
from vit_engine import digits, load_model, save_checkpoint
from vit_engine.cli import child, classify, pipeline, report
from vit_engine.cli.app import main

KEYS = {
    "predictions", "accuracy", "backend", "agreement", "images_per_second", "device", "dtype", "versions", "errors"
}  # fmt: skip


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
    assert found["versions"]["torch"] == version("torch")
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


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
@pytest.mark.usefixtures("interruptible")
def test_what_was_classified_is_kept_when_it_is_interrupted(run, some, monkeypatch, options):
    original, calls = classify.Timed.__call__, []

    def third(self, pixels):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, pixels)

    monkeypatch.setattr(classify.Timed, "__call__", third)
    (some / "00.png").write_text("no image")
    found = run(some, "--batch-size", 2, *options, code=130)
    assert found.stderr.splitlines()[-1] == (
        "vit-engine run: interrupted: 5 of 7 images done, kernels and PyTorch not compared"
    )
    if not options:
        assert sum(f"00{i}.png" in found.stdout for i in range(6)) == 4
        return
    result = only_object(found)
    assert [os.path.basename(p["file"]) for p in result["predictions"]] == [f"00{i}.png" for i in range(4)]
    assert [error["file"] for error in result["errors"]] == [str(some / "00.png"), None]
    assert result["agreement"] is None and result["images_per_second"] > 0


def test_an_interrupted_comparison_costs_no_prediction(run, some, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "agreement", interrupted)
    result = only_object(run(some, "--json", code=130))
    assert len(result["predictions"]) == 6 and "6 of 6 images done" in result["errors"][0]["reason"]


def test_nothing_that_has_not_begun_is_decoded_after_an_interruption(some):
    begun = []

    class Slow(classify.Preparation):
        def load(self, path):
            begun.append(path)
            time.sleep(0.02)
            raise KeyError

    paths, slow = [some / "000.png"] * 500, Slow((8, 8), 1, "crop", 1.0)
    with pytest.raises(KeyError), closing(classify.batches(paths, slow, 250, print)) as decoded:
        next(decoded)
    assert len(begun) < 100


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


def test_own_checkpoint_with_names_inside(run, some, tmp_path):
    model = load_model(digits.CHECKPOINT, backend="torch")
    names = [f"digit {label}" for label in digits.LABELS]
    save_checkpoint(model, tmp_path / "mine.safetensors", metadata={"labels": json.dumps(names)})
    found = only_object(run(some, "--checkpoint", tmp_path / "mine.safetensors", "--json"))
    assert {p["label"] for p in found["predictions"]} <= set(names)
    assert found["agreement"]["images"] == 1
    result = run("--checkpoint", tmp_path / "mine.safetensors", code=2)
    assert "--checkpoint needs images" in result.stderr


def test_checkpoints_that_do_not_describe_their_model(run, some, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    assert "name its architecture with --model" in run(some, "--checkpoint", path, code=2).stderr
    assert "missing from the file" in run(some, "--checkpoint", path, "--model", "vit_tiny_patch16_224", code=2).stderr
    assert "no preset 'vit_tinny'" in run(some, "--checkpoint", path, "--model", "vit_tinny", code=2).stderr
    (tmp_path / "w.npz").write_bytes(b"")
    assert "name its architecture with --model" in run(some, "--checkpoint", tmp_path / "w.npz", code=2).stderr
    for name in ("gone.safetensors", "gone.pth", "gone.npz"):
        for model in ([], ["--model", "vit_tiny_patch16_224"]):
            said = run(some, "--checkpoint", tmp_path / name, *model, code=2).stderr
            assert f"{name}: no such checkpoint" in said and "does not describe" not in said
    assert f"{tmp_path}: is no file" in run(some, "--checkpoint", tmp_path, code=2).stderr


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
    assert result["agreement"]["max_abs_error"] is None and result["agreement"]["top1"] == 0
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


def test_without_triton_there_is_nothing_to_compare(run, some, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    monkeypatch.setattr(classify, "interpret", None)
    monkeypatch.setattr(report, "version", _version_without_triton)
    found = run(some)
    assert found.stderr == "vit-engine run: no kernels to compare PyTorch with: triton is not installed\n"
    assert "triton not installed" in found.stdout
    assert "agreement" not in found.stdout
    assert only_object(run(some, "--json"))["errors"] == []


def _version_without_triton(name):
    if name == "triton":
        raise report.PackageNotFoundError(name)
    return "1.0"


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
        ([], "xpu", "--device xpu: "),
        ([], "meta", "--device meta: it computes no values; use auto, cpu"),
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


def test_names_that_the_terminal_cannot_show_are_escaped(some, monkeypatch):
    (some / "000.png").rename(some / "ü.png")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", ["vit-engine", "run", str(some), "--device", "cpu", "--check", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown.flush()
    assert ended.value.code == 0
    assert b"some/\\xfc.png" in shown.buffer.getvalue()  # type: ignore[attr-defined]
