"""What the kernels take for a GPU that they run on, asked of drivers that stand in for Triton's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import triton

from vit_kernels import UnsupportedDeviceError, device


class Driver:
    """Of one GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: SimpleNamespace(backend="cuda", arch=capability)
        properties = {"multiprocessor_count": 148, "max_shared_mem": 232_448}
        self.utils = SimpleNamespace(get_device_properties=lambda index: properties)


def described(capability: int) -> device.Device:
    return device._describe(Driver(capability), 0)


@pytest.mark.parametrize("capability", [100, 103, 110])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.0+git1234567"])
def test_tensor_memory_needs_a_triton_that_fences_copies(
    capability: int, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    number = f"{capability // 10}.{capability % 10}"
    with pytest.raises(
        UnsupportedDeviceError, match=rf"needs Triton 3.7.1 or newer .* {number}; this is {version[:5]}"
    ):
        described(capability)


@pytest.mark.parametrize(
    ("capability", "version"),
    [(100, "3.7.1"), (100, "3.8.0"), (103, "3.10.0"), (100, "4.0"), (90, "3.6.0"), (120, "3.6.0"), (80, "3.6.0")],
)
def test_the_others_take_any_that_is_supported(capability: int, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    found = described(capability)
    assert (found.name, found.capability, found.sm_count) == (f"sm_{capability}", capability, 148)


def test_older_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"needs compute capability 8\.0 or newer; this GPU has 7\.5"):
        described(75)
