"""The Vision Transformer: equations 1 to 4 of arXiv 2010.11929, on a backend chosen by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .class_code import constant_in_graphs
from .config import ViTConfig
from .derived import DerivedCache
from .layers import Block, PatchEmbed, init_linear
from .plain_parts import PlainParts, changed_methods
from .pooling import AttentionPool
from .position import PositionCache
from .tangents import any_tangent
from .triton_needed import triton_needed

if TYPE_CHECKING:
    from .graphs import GraphCache
    from .replay import ReplayCache

__all__ = ["BACKENDS", "ViT"]

BACKENDS = ("auto", "torch", "triton", "interpret")


class ViT(nn.Module):
    """A Vision Transformer with timm's parameter names.

    z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos                    (1)
    z'_l = MSA(LN(z_{l-1})) + z_{l-1},  z_l = MLP(LN(z'_l)) + z'_l    (2, 3), l = 1 ... L
    y = LN(z_L^0)                                                     (4), or LN of the mean over the patches for "avg",
                                                                      or MAP(LN(z_L)) for "map" (AttentionPool)

    config: the architecture. Tokens are ordered class, registers, patches.
    backend: what forward_features() runs on.
        "torch": PyTorch's own operators, on any device; the only one that trains.
        "triton": this project's kernels on an NVIDIA GPU.
        "interpret": the same kernels in Triton's interpreter, on the CPU; slow, for checking.
        "auto": "triton" while the parameters are on a CUDA device, "torch" anywhere else.
    A backend that cannot run raises RuntimeError with the reason and the way out; none is replaced by another. The
    kernels call none of the model's parts, so they refuse by name whatever they would leave out: hooks, adapters, other
    layers, other code (see plain_parts.py). Hooks on the model itself run; global ones see the model alone. The
    kernels compute in the parameters' dtype, under torch.autocast too: convert the model instead. The mean over the
    patches is PyTorch's operator on every backend, and so is all of `forward_head()` when it is called alone.
    """

    def __init__(self, config: ViTConfig, backend: str = "auto") -> None:
        super().__init__()
        if not isinstance(config, ViTConfig):
            raise TypeError(f"ViT: config must be a ViTConfig, got {type(config).__name__}; see ViTConfig.preset(name)")
        self.config = config
        self.set_backend(backend)
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        registers = config.num_register_tokens
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_position_prefix + config.num_patches, dim))
        self.pos_drop = nn.Dropout(config.dropout)
        last = max(config.depth - 1, 1)
        self.blocks = nn.Sequential(*(Block(config, config.stochastic_depth * i / last) for i in range(config.depth)))

        after_pool = config.norm_after_pool
        self.norm = nn.Identity() if after_pool else nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn_pool = AttentionPool(config) if config.global_pool == "map" else None
        self.fc_norm = nn.LayerNorm(dim, eps=config.norm_eps) if after_pool else nn.Identity()
        width = dim
        self.pre_logits: nn.Module = nn.Identity()
        if config.head == "pretrain":
            width = config.representation_size or dim
            hidden = nn.Linear(dim, width)
            init_linear(hidden)
            self.pre_logits = nn.Sequential(OrderedDict([("fc", hidden), ("act", nn.Tanh())]))
        self.head_drop = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()

        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.04, b=0.04)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                # As timm: all but zero, so that the token starts out as its position embedding.
                nn.init.normal_(token, std=1e-6)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self._positions = PositionCache()
        self.derived = DerivedCache()
        self._replays: ReplayCache | None = None
        self._plain_parts = PlainParts()
        self.graphs: GraphCache | None = None

    @property
    def replays(self) -> ReplayCache:
        """Forward passes of shapes seen before. Made when first asked for: it loads the kernels."""
        if self._replays is None:
            from .replay import ReplayCache

            self._replays = ReplayCache()
        return self._replays

    # --- backend -------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The backend that forward() would run on now: "torch", "triton" or "interpret"; "auto" is resolved here."""
        if self._backend != "auto":
            return self._backend
        return "triton" if self.pos_embed.device.type == "cuda" else "torch"

    def set_backend(self, name: str) -> ViT:
        """Chooses "auto", "torch", "triton" or "interpret" and returns the model; ValueError for any other name.

        Whether that backend can run is asked by each forward(), because parameters may move to another device.
        """
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        self._backend = name
        return self

    def set_graphs(self, graphs: bool | int = True) -> ViT:
        """Whether forward() is captured in CUDA graphs, one per shape, and replayed; returns the model.

        graphs: True keeps 8 graphs, a number that many, the least recently used given up first; False none. For the
            kernels in eval mode on a GPU without gradients; any other pass runs as without, and `model.graphs.why` says
            why the last one did. See vit_engine/graphs.py and `accelerate`. TypeError or ValueError for anything else.
        """
        with triton_needed("set_graphs"):
            from .graphs import GraphCache, graph_limit

        limit = graph_limit(graphs, "set_graphs")
        self.graphs = GraphCache(limit) if limit else None
        return self

    def _require_backend(self, name: str, images: Tensor, head: bool) -> None:
        """Raises RuntimeError with the reason and the way out unless the kernels can run this forward pass.

        head: whether the classifier is part of it.
        """
        try:
            from vit_kernels import launch
            from vit_kernels.attention_checks import MAX_HEAD_DIM
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise RuntimeError(
                f"backend {name!r} needs Triton, which is not installed (it is published for Linux): install it, or "
                "use model.set_backend('torch')"
            ) from error

        device = self.pos_embed.device
        interpreting = launch.interpreting()
        if name == "interpret" and not interpreting:
            raise RuntimeError(
                "backend 'interpret' needs Triton's interpreter, which is chosen when triton is first imported: set "
                "the environment variable TRITON_INTERPRET=1 before the process imports triton (timm and transformers "
                "import it too), or use backend 'torch'"
            )
        if name == "triton" and interpreting:
            raise RuntimeError(
                "backend 'triton' cannot run: triton was imported with TRITON_INTERPRET=1, so its kernels would be "
                "interpreted; unset the variable and start again, or say so with backend 'interpret'"
            )
        if interpreting and torch.bfloat16 in (images.dtype, self.pos_embed.dtype):
            raise RuntimeError(
                f"backend {name!r} cannot run in bfloat16: Triton's interpreter computes bfloat16 wrongly; use "
                "model.float() or model.half(), or model.set_backend('torch')"
            )
        # A driver cannot be asked while a graph is traced; the launchers ask again whenever it runs.
        if not torch.compiler.is_compiling() and not launch.accepts(device):
            gpu = "an NVIDIA GPU of compute capability 8.0 or newer (10.x and 11.x: with Triton 3.7.1 or newer)"
            raise RuntimeError(
                f"backend {name!r} cannot run with the model on {str(device)!r}: it needs "
                f"{gpu if name == 'triton' else 'the CPU'}; move the model there with model.to(device), or use "
                "model.set_backend('torch')"
            )
        config = self.config
        if config.head_dim > MAX_HEAD_DIM:
            raise RuntimeError(
                f"backend {name!r} cannot run with attention heads {config.head_dim} wide: the kernels take up to "
                f"{MAX_HEAD_DIM}; use model.set_backend('torch')"
            )
        rates = (config.dropout, config.attention_dropout, config.stochastic_depth, config.head_dropout if head else 0)
        if self.training and any(rates):
            raise RuntimeError(
                f"backend {name!r} has no dropout or stochastic depth, and the model is in training mode with rates "
                "above 0: call model.eval() for inference, or train with model.set_backend('torch')"
            )
        if torch.is_grad_enabled() and (images.requires_grad or (self.training and self._needs_grad(head))):
            raise RuntimeError(
                f"backend {name!r} computes no gradients: call model.eval() and wrap the call in torch.no_grad() for "
                "inference, or train with model.set_backend('torch')"
            )
        if forward_ad._current_level >= 0 and any_tangent([images, *self._read(head)]):
            raise RuntimeError(
                f"backend {name!r} computes no gradients, in forward mode (torch.autograd.forward_ad, torch.func.jvp) "
                "neither: use model.set_backend('torch')"
            )

    def require_plain_parts(self, head: bool) -> None:
        """Raises RuntimeError that names the part if the kernels would leave out what is in the model, or the parameter
        that they cannot read.

        head: whether the pass goes on behind the final norm.
        """
        found = self._objection(head)
        if found is not None:
            raise RuntimeError(f"backend {self.backend!r} {found}")

    # A graph keeps the answer of the moment when it was traced.
    @constant_in_graphs
    def _objection(self, head: bool) -> str | None:
        return self._plain_parts.objection(self, head)

    def _needs_grad(self, head: bool) -> bool:
        return any(p.requires_grad for p in self._read(head))

    def _read(self, head: bool) -> Iterator[Tensor]:
        """The parameters of the whole model, or without head of what is in front of the classifier."""
        apart = () if head else ("attn_pool.", "fc_norm.", "pre_logits.", "head.")
        return (p for name, p in self.named_parameters() if not name.startswith(apart))

    # --- what every backend needs --------------------------------------------------------------------------------

    def prefix_tokens(self) -> Tensor | None:
        """Class token and register tokens [R, D] in this order, None if the model has neither."""
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return None
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [rows, D] for a grid of (rows, columns) patches, interpolated unless it is config.grid.

        With no_embed_class there is a row per patch, otherwise one per token. Interpolated tables are cached until
        pos_embed changes (see PositionCache).
        """
        config = self.config
        return self._positions.get(
            self.pos_embed,
            grid,
            config.grid,
            num_prefix=config.num_position_prefix,
            method=config.position_interpolation,
        )[0]

    def clear_cache(self) -> None:
        """Forgets what was derived from parameters. Needed only after writes that leave no trace: to a parameter
        through `.data`, and to one that was made under torch.inference_mode()."""
        self._positions.clear()
        self.derived.clear()
        if self._replays is not None:
            self._replays.clear()
        if self.graphs is not None:
            self.graphs.clear()

    # --- forward -------------------------------------------------------------------------------------------------

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, T, D] in the order class, registers, patches, after the final norm.

        images: the parameters' dtype, already normalised, or uint8 (normalised with config.mean and config.std here);
            any strides; H and W any multiples of the patch size.
        As in timm, the final norm is not applied here if it comes after pooling (config.norm_after_pool):
        forward_head() does it then.

        Raises ValueError or TypeError for images it cannot take, and RuntimeError for a backend that cannot run.
        """
        self.patch_embed.check(images)
        backend = self.backend
        if backend == "torch":
            return self._torch_features(images)
        self._require_backend(backend, images, head=False)
        from . import fused

        return fused.forward_features(self, images)

    def _torch_features(self, images: Tensor) -> Tensor:
        z = self.patch_embed(images)
        position = self.position_embedding(self.patch_embed.grid(images))
        prefix = self.prefix_tokens()
        if self.config.no_embed_class:
            z = z + position
        if prefix is not None:
            z = torch.cat([prefix.to(z.dtype).expand(z.shape[0], -1, -1), z], dim=1)
        if not self.config.no_embed_class:
            z = z + position
        return self.norm(self.blocks(self.pos_drop(z)))

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, D] -> [B, D]: the class token, or the patch tokens' mean or attention pooling.

        Raises ValueError for another number of dimensions: of pooled features one element would be taken for a token.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dim() != 3:
            raise ValueError(f"tokens must be [B, T, {self.config.embed_dim}], got {list(tokens.shape)}")
        if self.config.global_pool == "token":
            return tokens[:, 0]
        patches = tokens[:, self.config.num_prefix_tokens :]
        return patches.mean(dim=1) if self.attn_pool is None else self.attn_pool(patches)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """tokens [B, T, D] of forward_features() -> logits [B, num_classes].

        With pre_logits=True, or num_classes 0, the classifier's input instead: [B, D], or [B, representation_size]
        after the hidden tanh layer of the "pretrain" head.
        """
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(tokens))))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, num_classes]; see forward_features().

        With global_pool "token" the kernels compute the last block for the class token alone (equation 4).
        """
        if self.graphs is None or torch.compiler.is_compiling():
            return self._forward(images)
        if self.backend == "torch":
            self.graphs.why = "backend 'torch'"
            return self._forward(images)
        if (method := changed_methods(self, head=True)) is not None:
            self.graphs.why = method
            return self._forward(images)
        self.patch_embed.check(images)
        return self.graphs.run(self, self._forward, (images,), {})

    def _forward(self, images: Tensor) -> Tensor:
        if self.backend == "torch":
            return self.forward_head(self.forward_features(images))
        self.patch_embed.check(images)
        self._require_backend(self.backend, images, head=True)
        from . import fused

        return fused.forward(self, images)

    def extra_repr(self) -> str:
        return f"backend={self._backend!r}"
