"""A case made ready: what its contenders are given, and how a result of theirs is judged before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vit_bench import tolerance
from vit_bench.cases import launcher_call, named_outputs
from vit_bench.draw import Draw
from vit_bench.full.parts import worst
from vit_bench.results import OURS
from vit_bench.timed import judged
from vit_bench.timed.attentions import ATTENTIONS
from vit_bench.timed.contenders import Contender, Run, taking_part
from vit_bench.timed.models import MODELS, ModelProblem
from vit_bench.timed.operators import OPERATORS, Operation
from vit_bench.timed.reference_model import reference_logits
from vit_bench.timed.shapes import Case
from vit_bench.timed.timing import single_kernels, whole_passes
from vit_bench.timed.work import launcher_calls
from vit_bench.tolerance import FACTOR
from vit_bench.tuning_cases import case_of
from vit_bench.tuning_gpu import exact_products
from vit_bench.whole_model import redraw
from vit_engine import ViT, ViTConfig

Figures = dict[str, float]

# Others' results are judged to see that they solve the same problem, not to hold them to our rule: libraries sum fp32
# products in other orders (oneDNN's convolution is 2.7 times as far off as its matrix product on a stem of 768 pixels),
# and a defect is further off by orders of magnitude.
OTHERS = 8.0


def _factor(contender: Contender) -> float:
    return FACTOR if contender.name.split(",")[0] == OURS else OTHERS


@dataclass(frozen=True)
class Problem:
    """contenders: who could take part on this device; given: what their `make` takes; judge: a contender and what it
    runs -> figures of its errors, AssertionError if it is wrong; times: how runs are timed side by side."""

    contenders: Sequence[Contender]
    given: Any
    judge: Callable[[Contender, Run], Figures]
    times: Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class _Truth:
    """Of one model and dtype: its weights, two images, and their logits in float64 and in the dtype."""

    config: ViTConfig
    dtype: torch.dtype
    state: dict[str, Tensor]
    images: Tensor
    truth: Tensor
    eager: Tensor


class Problems:
    """Makes problems on one device. What several batches of a model share is kept until another model comes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._truth: _Truth | None = None

    def of(self, case: Case, dtype: torch.dtype) -> Problem:
        return self._model(case, dtype) if case.suite == "model" else self._kernel(case, dtype)

    def _known(self, config: ViTConfig, dtype: torch.dtype) -> _Truth:
        known = self._truth
        if known is None or (known.config, known.dtype) != (config, dtype):
            self._truth = None  # two models never take memory at once
            self._truth = known = _truth(config, dtype, self.device)
        return known

    def _model(self, case: Case, dtype: torch.dtype) -> Problem:
        assert case.config is not None
        known = self._known(case.config, dtype)
        rows = torch.arange(case.batch, device=self.device) % 2
        # Two images in turn, so that every row of a batch can be judged and two are enough to compute in float64.
        problem = ModelProblem(case.config, known.state, known.images[rows])

        def judge(contender: Contender, run: Run) -> Figures:
            found = tolerance.check(
                run(),
                known.eager[rows],
                known.truth[rows],
                name=f"{contender.name}, {case}",
                on=self.device,
                factor=_factor(contender),
            )
            return worst({"logits": found})

        return Problem(taking_part(MODELS, self.device), problem, judge, whole_passes)

    def _kernel(self, case: Case, dtype: torch.dtype) -> Problem:
        ((call, _),) = launcher_calls(case, dtype)
        drawn = case_of(call.kernel, call.arguments, str(case))
        inputs = drawn.inputs(Draw(dtype, self.device))

        def judge(contender: Contender, run: Run) -> Figures:
            given = replace(drawn, name=f"{contender.name}, {drawn.name}")
            results = named_outputs(drawn, run()) if contender.name == OURS else {"y": run()}
            return worst(judged.judge(given, inputs, results, _factor(contender)))

        if call.kernel == "attention":
            return Problem(
                taking_part(ATTENTIONS, self.device), tuple(inputs[name] for name in "qkv"), judge, single_kernels
            )
        operation = Operation(call.kernel, inputs, drawn.options)
        ours = Contender(
            OURS, lambda _: launcher_call(drawn, inputs), ("vit-engine", "triton"), {"weights": "folded"}, ("cuda",)
        )
        return Problem(taking_part((ours, *OPERATORS), self.device), operation, judge, single_kernels)


@torch.no_grad()
def _truth(config: ViTConfig, dtype: torch.dtype, device: torch.device) -> _Truth:
    model = ViT(config, backend="torch").eval()
    redraw(model)
    # What is compared are models with weights of this dtype: the truth has the same rounded ones.
    state = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
    images = Draw(dtype, device, seed=1).normal(2, config.in_channels, *config.image_hw)
    with exact_products():
        truth, eager = (reference_logits(config, state, images, one) for one in (torch.float64, dtype))
    return _Truth(config, dtype, state, images, truth, eager)
