"""The recording driver: real specialisation and compilation, no execution."""

from __future__ import annotations

import pytest

from tests.bench.child import run

pytestmark = pytest.mark.compiled


def test_launches_are_compiled_for_the_chosen_gpu_and_recorded_instead_of_executed() -> None:
    seen = run(
        """
        import json, torch, vit_kernels
        from triton.runtime import driver
        from vit_bench.recording import gpu, recording
        before = driver._active
        x, gamma = torch.full((5, 96), 7.0, dtype=torch.float16), torch.ones(96)
        with recording(gpu("sm_90")) as recorder:
            y = vit_kernels.layer_norm(x, gamma)
            marked = torch.full_like(x, 3.0)
            stats = vit_kernels.row_stats(marked)
            again = vit_kernels.layer_norm(x, gamma)
        first, second, third = recorder.launches
        print(json.dumps({
            "kernels": [launch.kernel for launch in recorder.launches],
            "grid": first.grid, "warps": first.num_warps, "stream": first.stream,
            "x": first.arguments["x_ptr"], "M": first.arguments["M"], "NORM": first.arguments["NORM"],
            "beta": first.arguments["beta_ptr"], "registers": first.binary.resources.registers,
            "stack": first.binary.resources.spilled_bytes, "elf": first.binary.cubin[:4].decode("latin1"),
            "one_compilation": third.binary is first.binary, "restored": driver._active is before,
        }))
        """
    )
    assert seen["kernels"] == ["layer_norm_kernel", "row_stats_kernel", "layer_norm_kernel"]
    assert seen["x"] == "float16[5, 96]" and seen["M"] == 5 and seen["NORM"] == "layer" and seen["beta"] is None
    assert seen["grid"][0] >= 1 and seen["grid"][1:] == [1, 1] and seen["warps"] >= 1 and seen["stream"] == 0
    assert seen["registers"] > 0 and seen["stack"] == 0 and seen["elf"] == "\x7fELF"
    assert seen["one_compilation"] and seen["restored"]


def test_the_result_is_never_written() -> None:
    seen = run(
        """
        import json, torch, vit_kernels
        from unittest import mock
        from vit_bench.recording import gpu, recording
        poisoned = lambda *shape, **options: torch.full(shape[0], 41.0, dtype=options["dtype"])
        with recording(gpu("sm_80")), mock.patch("vit_kernels.launch.torch.empty", poisoned):
            y = vit_kernels.layer_norm(torch.randn(3, 32))
        print(json.dumps(bool((y == 41.0).all())))
        """
    )
    assert seen is True


def test_two_gpus_in_one_process_get_their_own_code_and_limits() -> None:
    seen = run(
        """
        import json, torch, triton, triton.language as tl
        from triton.runtime.errors import OutOfResources
        from vit_bench import sass
        from vit_bench.recording import gpu, recording
        from vit_bench.plan import model_calls
        from vit_engine.config import ViTConfig
        kinds, limits = {}, {}
        for name in ("sm_80", "sm_90", "sm_86"):
            with recording(gpu(name), torch_device="meta") as recorder:
                calls = list(model_calls(ViTConfig.preset("vit_base_patch16_224"), 8, torch.float16))
                next(call for call in calls if call.label == "qkv").run()
                device = recorder.get_current_device()
            kinds[name] = sass.code_facts(recorder.launches[-1].binary.cubin).tensor
            limits[name] = recorder.utils.get_device_properties(device)["max_shared_mem"]
        print(json.dumps([kinds, limits]))
        """
    )
    kinds, limits = seen
    assert kinds == {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_86": "HMMA"}
    assert limits["sm_86"] < limits["sm_80"] < limits["sm_90"]


def test_without_a_compiler_the_launches_are_the_same() -> None:
    seen = run(
        """
        import json, torch
        from triton.runtime.jit import JITFunction
        from vit_bench.launch_plan import counted_compilations
        from vit_bench.recording import gpu, recording
        from vit_bench.plan import model_calls
        from vit_engine.config import ViTConfig

        calls = list(model_calls(ViTConfig.preset("vit_base_patch16_224"), 8, torch.float16))
        found, compilations, before = {}, {}, JITFunction._do_compile
        for compiles in (True, False):
            with recording(gpu("sm_90"), torch_device="meta", compiles=compiles) as recorder:
                with counted_compilations() as compilations[compiles]:
                    for call in calls:
                        if call.label in ("qkv", "attention"):
                            call.run()
            found[compiles] = [
                # Of warps that have roles, the compiler counts those that others ask for, too.
                [one.kernel, one.grid, 4 if "roles" in one.kernel else one.num_warps, one.num_stages, one.num_ctas,
                 repr(one.arguments)]
                for one in recorder.launches
            ]
        launch = recorder.launches[0]
        try:
            launch.binary.resources
        except AttributeError as error:
            refused = str(error)
        print(json.dumps({
            "same": found[True] == found[False], "count": len(found[False]), "shared": launch.shared,
            "compiled": [len(compilations[True]), len(compilations[False])],
            "refused": refused, "restored": JITFunction._do_compile is before,
        }))
        """
    )
    assert seen == {
        "same": True,
        "count": 2,
        "shared": 0,
        "compiled": [2, 0],
        "refused": "this launch was recorded without compiling its kernel, so it has no resources",
        "restored": True,
    }


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    seen = run(
        """
        import json
        from vit_bench.recording import gpu
        try:
            gpu("sm_75")
        except ValueError as error:
            print(json.dumps(str(error)))
        """
    )
    assert seen.startswith("gpu must be one of sm_80, ") and seen.endswith("got 'sm_75'")


def test_a_gpu_to_compile_for_is_a_capability_with_any_number_of_sms() -> None:
    seen = run(
        """
        import json
        from vit_bench.recording import gpu, target
        found = []
        for name in ("SM_89:58", "h100", "sm_75:40", "sm_89:0", "sm_89:", "h100:114", ":5", "v100"):
            try:
                found.append(vars(target(name)))
            except ValueError as error:
                found.append(str(error))
        l4 = vars(gpu("sm_89")) | {"name": "sm_89 with 58 SMs", "sm_count": 58}
        print(json.dumps([found[0] == l4, found[1] == vars(gpu("h100")), found[2:]]))
        """
    )
    known = "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"
    words = f"gpu must be a name, or {known} with a number of SMs behind it, as sm_89:58; got "
    refused = [words + repr(name) for name in ("sm_75:40", "sm_89:0", "sm_89:", "h100:114", ":5")]
    assert seen[:2] == [True, True] and seen[2][:-1] == refused and seen[2][-1].endswith("got 'v100'")


def test_folded_weights_are_rounded_to_the_nearest_meanwhile() -> None:
    seen = run(
        """
        import json, torch
        from vit_bench.recording import gpu, recording
        from vit_kernels import fold_norm
        weight = torch.randn(8, 256).half()
        fold = lambda: fold_norm(weight, None, None, sums=False)[0]
        nearest = fold_norm(weight, None, None)[0]
        with recording(gpu("sm_90")):
            inside = fold()
        print(json.dumps([torch.equal(inside, nearest), torch.equal(fold(), nearest)]))
        """
    )
    assert seen == [True, False]
