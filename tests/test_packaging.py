"""What a wheel and a source distribution hold, and that nothing of it is called `kernels`."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"vit_kernels": ROOT / "kernels", "vit_engine": ROOT, "vit_bench": ROOT / "bench"}


def tracked() -> list[Path]:
    """Files under version control; in an unpacked source tree without it, the test cannot say what belongs."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(name) for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that the tree stays as it is and strays do not get in."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.mark.slow
def test_a_source_distribution_is_the_repository(source: Path, tmp_path: Path) -> None:
    """The tests run from it, and what the README names is in it."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted({str(name) for name in tracked() if (ROOT / name).is_file()} - names) == [".gitignore"]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_top_level_names_are_the_three_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.slow
def test_every_module_and_data_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    wanted = {
        str((ROOT / name).relative_to(root))
        for name in tracked()
        for package, root in PACKAGES.items()
        if (ROOT / name).is_relative_to(root / package) and (ROOT / name).is_file()
    }
    assert len(wanted) > 30
    assert sorted(wanted - names) == []


@pytest.mark.slow
def test_the_wheel_brings_the_checkpoint_and_all_held_out_digits(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    images = [name for name in names if name.startswith("vit_engine/digits/heldout/") and name.endswith(".png")]
    assert len(images) >= 360
    (checkpoint,) = (name for name in names if name.endswith(".safetensors"))
    assert wheel.getinfo(checkpoint).file_size < 1_000_000
    assert all(f"{package}/py.typed" in names for package in PACKAGES)


@pytest.mark.slow
def test_metadata_names_licence_command_and_dependencies(wheel: zipfile.ZipFile) -> None:
    files = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(files["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch<2.16,>=2.11" in metadata
    assert "vit-engine = vit_engine.cli.app:main" in wheel.read(files["entry_points.txt"]).decode()
    assert "Apache License" in wheel.read(files["licenses/LICENSE"]).decode()


@pytest.mark.slow
def test_transformers_imports_from_the_root_and_beside_a_package_called_kernels(tmp_path: Path) -> None:
    """The root holds a folder `kernels`: a real package of that name wins over it, and its absence does not hurt."""
    code = (
        "import importlib.util, transformers\n"
        "from transformers import ViTModel\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(found.origin if found else None)"
    )

    def where(path: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[1:1] = [{path!r}] if {path!r} else []\n{code}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("")
    assert where(str(tmp_path)) == str(real / "__init__.py")
    assert not where("").startswith(str(ROOT))


def test_no_folder_called_kernels_can_be_imported_as_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()
