"""Which rung of the correctness ladder this test run stands on. Import it before anything that imports triton.

executed     a CUDA GPU is there: every launch runs on it.
sanitized    under `python -m ttsem.sanitize pytest`: the compiled IR of every launch is executed on the CPU, with
             bounds and races checked; torch is made to pretend that there is a GPU.
interpreted  otherwise: Triton's interpreter. It computes bfloat16 wrongly (Triton 3.7 to 3.9), so that dtype is left
             out.

Triton reads TRITON_INTERPRET when it is imported, and timm, transformers and torch's compiler import it. That is why
the root conftest imports this module first, and why this module does not import triton.
"""

from __future__ import annotations

import os
import sys

import torch

__test__ = False


def _sanitizing() -> bool:
    """A ttsem session is open: it replaces Tensor.is_cuda by a property that is always true."""
    return "ttsem" in sys.modules and isinstance(vars(torch.Tensor).get("is_cuda"), property)


def _decide() -> str:
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    if _sanitizing():
        return "sanitized"
    if torch.cuda.is_available() and not asked:
        return "executed"
    if "triton" in sys.modules and not asked:
        raise RuntimeError(
            "triton was imported before the tests could set TRITON_INTERPRET=1; a pytest plugin imports it. "
            "Set TRITON_INTERPRET=1 in the environment, or disable that plugin with -p no:NAME."
        )
    os.environ["TRITON_INTERPRET"] = "1"
    return "interpreted"


RUNG = _decide()

# Where test tensors live. Under the sanitizer "cuda" is the CPU under another name.
DEVICE = "cpu" if RUNG == "interpreted" else "cuda"

DTYPES = (torch.float32, torch.float16) if RUNG == "interpreted" else (torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = DTYPES[1:]

HEADER = f"kernels: {RUNG} (tensors on {DEVICE!r}; {', '.join(str(d).removeprefix('torch.') for d in DTYPES)})"


def child_environment() -> dict[str, str]:
    """The environment for a child process that must see Triton as a user has it, not as these tests set it up."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
