"""Encoder blocks and norms of a library, on the kernels."""

from __future__ import annotations

import inspect
import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder_block import AttentionInputs, Norm, apply_norm, run_block
from .attached import Attached, State, any_requires_grad, counting_changes, differentiable, wants_gradient
from .describe import Block, Made, Unsupported, class_name, norm_of
from .described import Described
from .structure import foreign_code, only_listens
from .timm_blocks import REFUSED, TIMM_BLOCKS
from .torchvision_blocks import TORCHVISION_BLOCKS
from .transformers_blocks import TRANSFORMERS_BLOCKS, outputs_are_collected
from .transformers_more_blocks import MORE_TRANSFORMERS_BLOCKS

__all__ = [
    "BLOCKS", "CLASS_TOKEN_ALONE", "FusedBlock", "FusedNorm", "chain", "describe_block", "first_token_of", "is_block",
]  # fmt: skip

CLASS_TOKEN_ALONE = "class token alone behind the attention of the last block"
# The block of whose tokens nobody will read but the first of each image, while a classifier's forward() runs.
first_token_of: ContextVar[nn.Module | None] = ContextVar("first_token_of", default=None)

# Of the libraries whose older versions build the same classes otherwise.
_VERSIONS = {"timm": "1.0.24 or newer", "transformers": "version 5"}
BLOCKS = {**TIMM_BLOCKS, **TORCHVISION_BLOCKS, **TRANSFORMERS_BLOCKS, **MORE_TRANSFORMERS_BLOCKS}


def describe_block(block: nn.Module) -> Block:
    """How to run a library's block on the kernels; Unsupported says why not."""
    foreign = foreign_code(block)
    if foreign is not None:
        raise Unsupported(foreign, changed=True)
    kind = class_name(block)
    if kind in REFUSED:
        raise Unsupported(f"{kind} ({REFUSED[kind]})")
    if kind not in BLOCKS:
        raise Unsupported(f"it is {kind}, a class of its own", changed=True)
    library = kind.partition(".")[0]
    version = getattr(sys.modules.get(library), "__version__", "")
    if library == "transformers" and version.partition(".")[0] in ("3", "4"):
        # Some of its layers would be recognised, and return something else.
        raise Unsupported(f"{kind} of transformers {version}, needed is {_VERSIONS[library]}")
    try:
        return BLOCKS[kind](block)
    except AttributeError as missing:
        needed = _VERSIONS.get(library, "another version")
        raise Unsupported(f"{kind} of {library} {version}, needed is {needed}: {missing}") from missing


def is_block(module: nn.Module) -> bool:
    """Whether this is an encoder block of a library, one that has kernels or not, or of a class made from one."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return any(name in BLOCKS or name in REFUSED for name in names)


class FusedBlock(Described):
    """Stands in for the forward() of an encoder block."""

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        super().__init__(module, name, state)
        # What forward() calls its tokens: they may be given by name, behind others.
        self._tokens = list(inspect.signature(type(module).forward).parameters)[1]

    def describe(self) -> Block:
        return describe_block(self.module)

    def why_not(self, x: Tensor) -> str | None:
        """Why these tokens cannot go through the kernels, apart from what else forward() was given."""
        if not self.up_to_date():
            return self.refusal
        block: Block = self.description
        weight = block.plan.norm2.weight
        reason = self.unavailable(x, block.plan.qkv.weight() if weight is None else weight)
        if reason is not None:
            return reason
        if any(part.training for part in block.random):
            return "training mode with dropout or stochastic depth"
        if self.module.training and wants_gradient(self.module, x):
            return "training: gradients"
        return None

    def step(
        self, x: Tensor, stats: Tensor | None, inputs: AttentionInputs, first_token: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens x [B, N, D] and their row statistics, None if unknown, to those behind the block.

        first_token: only the first token of each image comes out, [B, 1, D].
        """
        batch, tokens, width = x.shape
        rows, stats = run_block(
            self.description.plan, x.reshape(batch * tokens, width), stats, (batch, tokens), self.state.derived,
            self.name, inputs, self.state.fold, first_token,
        )  # fmt: skip
        return rows.view(batch, 1 if first_token else tokens, width), stats

    def _repeated_step(
        self, x: Tensor, stats: Tensor | None, inputs: AttentionInputs, first_token: bool
    ) -> tuple[Tensor, Tensor]:
        """step(), the launches of shapes seen before made again without their host work."""
        given = (x, stats, inputs.mask, inputs.cos, inputs.sin)
        kind = f"{inputs.causal} {first_token} {[value is None for value in given]}"

        present = [value for value in given if value is not None]

        def run() -> tuple[Tensor, Tensor]:
            y, stats_out = self.replays.run(
                kind, self.module, present, lambda: self.step(x, stats, inputs, first_token)
            )
            return y, stats_out

        y, stats = counting_changes(run)
        return y.view(x.shape[0], 1 if first_token else x.shape[1], x.shape[2]), stats

    def _first_token_alone(self, inputs: AttentionInputs) -> bool:
        """Whether a classifier has said that it reads no other, and nobody else is going to."""
        if torch.compiler.is_compiling() or first_token_of.get() is not self.module:
            return False
        asked = inputs.mask is not None or inputs.causal or outputs_are_collected()
        return not asked and only_listens(self.module._forward_hooks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get(self._tokens)
        # Of none, too: some libraries' blocks cannot be given an empty batch, and say so.
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not tokens.numel():
            return self.instead("the tokens are no tensor of three dimensions that holds any", *args, **kwargs)
        why = self.why_not(tokens)
        if why is not None:
            return self.instead(why, *args, **kwargs)
        given = self.description.arguments(*args, **kwargs)
        if isinstance(given, str):
            return self.instead(given, *args, **kwargs)
        x, inputs = given[0], self._made(given[1])
        if not torch.compiler.is_compiling():
            self.why = None
        if torch.compiler.is_compiling() or not wants_gradient(self.module, x):
            y, stats = self._repeated_step(x, self._statistics_of(x), inputs, self._first_token_alone(inputs))
        elif any_requires_grad(args[1:], {k: v for k, v in kwargs.items() if v is not x}):
            return self.instead("another argument than the tokens asks for a gradient", *args, **kwargs)
        else:
            y, stats = self._with_gradient(x, inputs, args, kwargs)
        # A hook could write where no counter sees it.
        if stats is not None and only_listens(self.module._forward_hooks):
            self.state.hand_over(y, stats)
        return y

    def _made(self, inputs: AttentionInputs | Made) -> AttentionInputs:
        if isinstance(inputs, AttentionInputs):
            return inputs
        build = inputs.build
        key = f"{self.name}.{inputs.key}"
        return AttentionInputs(mask=self.state.derived.get(key, inputs.sources, lambda: (build(),), inputs.size)[0])

    def _statistics_of(self, x: Tensor) -> Tensor | None:
        return self.state.statistics_of(x) if only_listens(self.module._forward_pre_hooks) else None

    def _with_gradient(
        self, x: Tensor, inputs: AttentionInputs, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        stats_in, emitted, block = self._statistics_of(x), [], self.description

        def run(tokens: Tensor) -> Tensor:
            y, stats = self.step(tokens, stats_in, inputs)
            emitted.append(stats)
            return y

        def original(tokens: Tensor) -> Tensor:
            if block is not None and any(part.training for part in block.random):
                raise RuntimeError(
                    f"{self.name}: dropout or stochastic depth was switched on between forward and backward pass"
                )
            if args:
                return self.original(tokens, *args[1:], **kwargs)
            return self.original(**{k: tokens if v is x else v for k, v in kwargs.items()})

        y = differentiable(run, original, self.module, x)
        return y, emitted[0] if emitted else None

    def report(self) -> tuple[str, str | None]:
        self.up_to_date()
        if self.description is None:
            return "", self.refusal
        plan = self.description.plan
        weight: Tensor = plan.qkv.weight() if plan.norm2.weight is None else plan.norm2.weight
        rotated = ["qk_rope"] if plan.q_norm is not None or self.description.rotary else []
        kernels = ["linear (norm folded)" if self.state.fold else "layer_norm, linear", *rotated, "attention", "linear"]
        kernels.append("linear, linear" if plan.mlp_norm is not None else "mlp")
        with torch.no_grad():
            return ", ".join(kernels), self.why_not(weight) or self.why


class FusedNorm(Attached):
    """Stands in for the forward() of a LayerNorm or RMSNorm outside the blocks."""

    def _norm(self) -> Norm | str:
        try:
            return norm_of(self.module, "it") or "it is Identity"
        except Unsupported as refusal:
            return str(refusal)

    def why_not(self, x: Tensor) -> str | None:
        found = self._norm()
        if isinstance(found, str):
            return found
        if found.weight is None:
            return "it has no weight"
        foreign = foreign_code(self.module)
        if foreign is not None:
            return foreign
        return self.unavailable(x, found.weight)

    def step(self, x: Tensor) -> Tensor:
        found = self._norm()
        assert isinstance(found, Norm)
        return apply_norm(x.reshape(-1, x.shape[-1]), found).view(x.shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # PyTorch's norms call their argument "input", timm's "x".
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        why = self.why_not(x)
        if why is not None or (self.module.training and wants_gradient(self.module, x)):
            return self.instead(why or "training: gradients", *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.why = None
            if wants_gradient(self.module, x):
                return differentiable(self.step, self.original, self.module, x)
        return self.replays.run("norm", self.module, (x,), lambda: (self.step(x),))[0]

    def report(self) -> tuple[str, str | None]:
        found = self._norm()
        weight = None if isinstance(found, str) else found.weight
        # Without one to ask about, the reason is found before the tokens are looked at.
        asked = torch.empty(0) if weight is None else weight
        return "layer_norm", self.why_not(asked) or self.why


def chain(blocks: Any, x: Tensor, stats: Tensor | None, first_token: bool = False) -> tuple[Tensor, Tensor | None]:
    """Tokens x [B, N, D] through blocks one after the other, statistics handed on directly where nothing is between.

    first_token: only the first token of each image is wanted, [B, 1, D], and the last block computes no other if it
        runs on the kernels and nobody looks at what comes out of it.
    """
    last = len(blocks) - 1
    for number, block in enumerate(blocks):
        fused = vars(block).get("forward")
        hooked = block._forward_hooks or block._forward_pre_hooks
        if isinstance(fused, FusedBlock) and not hooked and fused.why_not(x) is None:
            if not torch.compiler.is_compiling():
                fused.why = None
            x, stats = fused.step(x, stats, AttentionInputs(), first_token and number == last)
        else:
            x, stats = block(x), None
    return (x[:, :1], None) if first_token and x.shape[1] != 1 else (x, stats)
