"""The direction of imports, read from the source, and what importing the packages does and does not do."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from .bench.child import run

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "vit_kernels": ROOT / "kernels" / "vit_kernels",
    "vit_engine": ROOT / "vit_engine",
    "vit_bench": ROOT / "bench" / "vit_bench",
}
SOURCES = [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]

# Who may import whom; the command line alone may also start the benchmarks.
ALLOWED = {"vit_kernels": {"vit_kernels"}, "vit_engine": {"vit_engine", "vit_kernels"}, "vit_bench": set(PACKAGES)}
COMMAND_LINE = PACKAGES["vit_engine"] / "cli"


def imported_names(source: str) -> set[str]:
    """Top-level names of every absolute import, wherever in the file, also by importlib.import_module("...")."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            names |= {str(a.value).split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


def climbs_out(path: Path, package: Path, source: str) -> bool:
    """A relative import with more dots than there are packages above the file."""
    depth = len(path.relative_to(package).parts)
    return any(isinstance(node, ast.ImportFrom) and node.level > depth for node in ast.walk(ast.parse(source)))


def test_imported_names_are_found():
    source = """
        import a.b, c as d
        from e.f import g
        from . import sibling
        from .h import i
        def late():
            import j
            importlib.import_module("k.l")
    """
    assert imported_names(textwrap.dedent(source)) == {"a", "c", "e", "j", "k"}


def test_every_package_has_sources():
    assert {package for package, _ in SOURCES} == set(PACKAGES)


def offenders(breaks_the_rule: Callable[[str, Path, str], bool]) -> list[str]:
    return [str(p.relative_to(ROOT)) for package, p in SOURCES if breaks_the_rule(package, p, p.read_text())]


def test_imports_run_one_way():
    def wrong_way(package: str, path: Path, source: str) -> bool:
        allowed = ALLOWED[package] | ({"vit_bench"} if path.is_relative_to(COMMAND_LINE) else set())
        return not imported_names(source) & set(PACKAGES) <= allowed or climbs_out(path, PACKAGES[package], source)

    assert offenders(wrong_way) == []


def test_the_engine_does_not_import_triton():
    """It runs where triton is not installed. The benchmarks may: they compile kernels and read the machine code."""
    assert offenders(lambda package, path, source: package == "vit_engine" and "triton" in imported_names(source)) == []


def test_references_stay_out_of_the_kernels():
    """`vit_kernels.reference` serves tests and verification; a naive formula in a forward pass would be slow and
    silent.
    """
    folder = PACKAGES["vit_kernels"] / "reference"

    def borrows(package: str, path: Path, source: str) -> bool:
        names = {
            name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom)
            for name in [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
        }
        return package == "vit_kernels" and not path.is_relative_to(folder) and "reference" in names

    assert offenders(borrows) == []


def test_nothing_here_imports_a_package_called_kernels():
    """`kernels` belongs to another project, which transformers imports whenever it can be found."""
    assert offenders(lambda package, path, source: "kernels" in imported_names(source)) == []


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


TOUCHES = """
    import torch, triton
    touched = []

    def trap(name):
        def call(*args, **kwargs):
            touched.append(name)
            raise RuntimeError(name + " was called while importing")
        return call

    for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties", "init"):
        setattr(torch.cuda, name, trap("torch.cuda." + name))

    class Trap:
        def __getattr__(self, name):
            return trap("triton's driver." + name)()

    triton.runtime.driver.set_active(Trap())
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_touches_no_gpu(package: str) -> None:
    """Not even when all modules of the package are imported."""
    code = f"""{TOUCHES}
    import importlib, json, pkgutil
    import {package}
    names = [found.name for found in pkgutil.walk_packages({package}.__path__, "{package}.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    print(json.dumps([len(names), touched]))
    """
    count, touched = run(code)
    assert count > 10 and touched == []


def test_the_trap_for_gpus_works() -> None:
    """What the test above relies on: a look at the GPU while importing does raise."""
    code = f"""{TOUCHES}
    import json

    caught = 0
    for look in (
        torch.cuda.is_available,
        torch.zeros(1).cuda,
        lambda: triton.runtime.driver.active.get_current_target(),
    ):
        try:
            look()
        except (RuntimeError, AssertionError):
            caught += 1
    print(json.dumps(caught))
    """
    assert run(code) == 3


def test_transformers_can_be_imported_from_the_root_of_the_repository() -> None:
    """It looks for a package named `kernels` from the current directory, and finds our folder of that name."""
    code = f"""
        import json, os, sys
        os.chdir({str(ROOT)!r})
        sys.path.insert(0, "")
        from transformers import ViTConfig, ViTModel
        print(json.dumps(ViTModel.__name__))
    """
    assert run(code) == "ViTModel"


def test_asking_for_the_interpreter_too_late_is_refused() -> None:
    """triton is imported without TRITON_INTERPRET; setting it afterwards would mix compiled and interpreted
    functions.
    """
    code = """
        import json, os, triton
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            import vit_kernels
        except RuntimeError as error:
            print(json.dumps(str(error)))
    """
    assert "TRITON_INTERPRET was changed after triton had been imported" in run(code)


def test_without_triton_what_stands_on_the_kernels_says_so():
    """As on systems that Triton is not published for; what needs no kernels is there."""
    code = """
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        import vit_engine

        model = vit_engine.ViT(vit_engine.ViTConfig(embed_dim=64, depth=1, num_heads=1, image_size=32, patch_size=16))
        asked = [lambda name=name: getattr(vit_engine, name)("folder") for name in vit_engine.__all__]
        for ask in [*asked, model.set_graphs]:
            try:
                ask()
            except ModuleNotFoundError as error:
                print(error.name, error)
            except Exception:
                pass
    """
    # A Python of its own: whatever forks for run() has imported Triton.
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    said = child.stdout.splitlines()
    assert [line.partition(" needs ")[0] for line in said] == [
        f"triton {name}"
        for name in (
            "vit_engine.accelerate",
            "vit_engine.explain",
            "load_kernels",
            "vit_engine.refresh",
            "vit_engine.register_attention",
            "vit_engine.restore",
            "vit_engine.use_tuned",
            "set_graphs",
        )
    ]
    for line in said:
        assert "which is not installed" in line and "pip install triton" in line and "backend 'torch'" in line
