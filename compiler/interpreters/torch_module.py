"""A Program as a tree of `nn.Module`s whose names are the canonical ones. B batch, S sequence, V vocabulary."""

import inspect
import zlib
from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from archwright.compiler.blocks import (
    Embedding,
    Experts,
    FusedAttention,
    GroupedQueryAttention,
    LanguageModelHead,
    PositionedEmbedding,
    Rope,
)
from archwright.compiler.distributed.checkpointing import Checkpointing
from archwright.compiler.distributed.collectives import join
from archwright.compiler.distributed.context import gathered_order, positions_of
from archwright.compiler.interpreters.torch_ops import TorchOps, make_step
from archwright.compiler.ir import Block, Param, Program, RopeTable, Storage

Cache = Mapping[str, Mapping[str, torch.Tensor]]
"""Path of a block → name of its state → tensor [batch, kv_heads, positions, head_dim]."""

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""

STORED: Mapping[Storage | None, torch.dtype] = {
    "int4": torch.int8,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
"""How torch holds quantized matrices."""

RECOMPILATIONS = 64
"""Of one kind of layer: with and without gradients, for batches and lengths of 1 and of more, with a window that hides
something and with one that does not."""


class TorchScope:
    """What a block's `forward` sees of its module: parameters as the values to compute with, children to call."""

    def __init__(self, module: "BlockModule") -> None:
        self._module = module

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)

    @property
    def path(self) -> str:
        return self._module.path

    @property
    def cache(self) -> Mapping[str, torch.Tensor]:
        return self._module.cache

    def __getattr__(self, name: str) -> Any:
        return self._module.read(name)


class BlockModule(nn.Module):
    """torch's module of a block. Its attributes are the Parameters themselves, as FSDP and others expect."""

    def __init__(self, block: Block, ops: TorchOps, path: str) -> None:
        super().__init__()
        self.block = block
        self.ops = ops
        self.path = path
        self.cache: Mapping[str, torch.Tensor] = {}
        self.checkpointing: Checkpointing | None = None
        self._borrowed: dict[str, tuple[nn.Module]] = {}  # in tuples, so that nn.Module does not register them

    def forward(self, *args: Any) -> Any:
        if self.checkpointing is not None and torch.is_grad_enabled():
            return self.checkpointing.run(self._run, *args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        if self.block.enter is not None:
            number = self.block.num_entering
            args = (*[self.ops.enter(x, self.block.enter) for x in args[:number]], *args[number:])
        return self.block.forward(self.ops, TorchScope(self), *args)

    def borrow(self, name: str, owner: nn.Module) -> None:
        """Read `name` (a child, or a parameter of that name) from `owner` at each use: a tie that nothing can undo."""
        self._borrowed[name] = (owner,)

    def read(self, name: str) -> Any:
        """What `m.name` is in the block's forward."""
        value = getattr(self, name)
        if isinstance(value, BlockModule):
            return TorchScope(value)
        return self.ops.param(value, getattr(self.block, name))

    def __getattr__(self, name: str) -> Any:
        borrowed = self.__dict__.get("_borrowed", {})
        if name in borrowed:
            owner = borrowed[name][0]
            return getattr(owner, name) if isinstance(getattr(self.block, name), Param) else owner
        return super().__getattr__(name)


def _spreads_experts(block: Block) -> bool:
    spreads = isinstance(block, Experts) and block.dispatch is not None
    return spreads or any(_spreads_experts(sub) for sub in block.children().values())


def _kind_of(block: Block) -> type[BlockModule]:
    """A class for the modules of a block, whose `forward` is the same under a name of its own."""
    plain = BlockModule.forward
    name = f"forward_{zlib.crc32(repr(block).encode()):08x}"  # torch remembers by file, line and name what varied
    own = FunctionType(plain.__code__.replace(co_name=name), plain.__globals__, name, plain.__defaults__)
    return type("BlockModule", (BlockModule,), {"forward": own})


class TorchProgram(nn.Module):
    """The trainable model. `state_dict` keys are the canonical (Hugging Face) names; a tied head has no key.

    module(ids_BS) → logits [B, S, V]; module(ids_BS, targets_BS) → (loss_sum, num_tokens), -100 not counted.
    In training mode (`train()`, torch's default) the loss includes the penalties of routers; `eval()` leaves them out.
    With `write_index_B` and `visible` the call reads and writes the cache bound by `bind_cache`.
    """

    def __init__(self, program: Program, ops: TorchOps, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """dtype: of the parameters, which are left uninitialised; `ops.dtype` is that of the computation."""
        super().__init__()
        self.program = program
        self.ops = ops
        self.follows_router = False  # whether stages before this one have routers, whose penalties are handed on
        self._segments: list[BlockModule] = []
        self._tables: dict[str, RopeTable] = {
            block.table.key: block.table for _, block in program.blocks() if isinstance(block, Rope)
        }
        attentions = [
            block for _, block in program.blocks() if isinstance(block, GroupedQueryAttention | FusedAttention)
        ]
        self._masks = {block.mask for block in attentions}
        self._by_path: dict[str, BlockModule] = {}
        owners: dict[str, BlockModule] = {}
        for segment in program.segments:
            self._segments.append(self._build(segment.block, segment.path, owners, dtype, device))

    def _build(
        self, block: Block, path: str, owners: dict[str, BlockModule], dtype: torch.dtype, device: torch.device | str
    ) -> BlockModule:
        module = BlockModule(block, self.ops, path)
        if path:
            self._attach(path, module)
        self._by_path[path] = module
        for name, param in block.params().items():
            owner = owners.setdefault(param.share, module) if param.share else module
            if owner is module:
                tensor = torch.empty(param.shape, dtype=STORED.get(param.storage, dtype), device=device)
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=param.storage is None))
            else:
                module.borrow(name, owner)
        for name, sub in block.children().items():
            sub_path = block.child_path(name, path)
            sub_module = self._build(sub, sub_path, owners, dtype, device)
            if name not in module._modules:
                module.borrow(name, sub_module)
        return module

    def _attach(self, path: str, module: nn.Module) -> None:
        """Register `module` under its dotted path, with plain containers above it where no block stands."""
        parent: nn.Module = self
        *above, name = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]  # pyright: ignore[reportAssignmentType]
        parent.add_module(name, module)

    def forward(
        self,
        x: Any,
        targets_BS: torch.Tensor | None = None,
        *,
        positions_BS: torch.Tensor | None = None,
        write_index_B: torch.Tensor | None = None,
        visible: int | None = None,
        logit_index_B: torch.Tensor | None = None,
    ) -> Any:
        """x: ids [B, S] of whole sequences, also where context ranks share them; what the stage before gave, in one
        that does not begin with the embedding. logit_index_B: the logits of one token a row, [B, 1, V], see `Step`."""
        x, penalty_B = x if isinstance(x, tuple) else (x, None)
        context, keys, length = self.ops.groups.get("context"), visible, x.shape[1]
        if not self.begins:
            length *= (1 if context is None else context.size()) * self._token_ranks(1)
        if context is not None:
            own_S, keys = positions_of(length, context.size(), context.rank(), x.device), length
            positions_BS = own_S[None]
            x = x[:, own_S] if self.begins else x
            targets_BS = None if targets_BS is None else targets_BS[:, own_S]
        elif positions_BS is None:
            positions_BS = torch.arange(length, device=x.device)[None]
        step = make_step(
            self._tables, [mask for mask in self._masks if self.ops.reads_mask(mask, x.device)], self.ops.dtype,
            positions_BS=positions_BS, keys=keys,
            write_index_B=write_index_B, targets_BS=targets_BS, penalized=self.training,
        )  # fmt: skip
        if logit_index_B is not None:
            step = replace(step, logit_index_B=logit_index_B)
        modules = iter(self._segments)
        y = self.program.run(lambda _: next(modules), x, step, penalty_B)
        if context is not None and self.ends and targets_BS is None:
            return join(y, context, 1)[:, gathered_order(length, context.size(), y.device)]
        return y

    def handed_on(self, ids_BS: torch.Tensor) -> list[Form]:
        """What the stage before gives to this one for these ids: hidden [B, S, D] of the tokens that this rank has,
        and once there has been a router the penalties [B]."""
        batch, length = ids_BS.shape
        context = self.ops.groups.get("context")
        own = length // (1 if context is None else context.size()) // self._token_ranks(1)
        hidden = ((batch // self._token_ranks(0), own, self.program.hidden_size), self.ops.dtype)
        if not (self.follows_router and self.training):
            return [hidden]
        return [hidden, ((batch,), torch.promote_types(self.ops.dtype, torch.float32))]

    def _token_ranks(self, dim: int) -> int:
        """Tensor ranks among which a dim of [B, S, D] is cut between two stages."""
        group = self.ops.groups.get("tensor")
        return group.size() if group is not None and self.ops.sequence and self.ops.token_dim == dim else 1

    @property
    def begins(self) -> bool:
        """Whether the Program begins with the embedding; a later pipeline stage does not."""
        return isinstance(self.program.segments[0].block, Embedding | PositionedEmbedding)

    @property
    def ends(self) -> bool:
        """Whether the Program ends with the head."""
        return isinstance(self.program.segments[-1].block, LanguageModelHead)

    def embedding(self) -> list[BlockModule]:
        """The modules of the first segment that have parameters."""
        return self._leaves(0) if self.begins else []

    def head(self) -> list[BlockModule]:
        """Final norm and output matrix."""
        return self._leaves(-1) if self.ends else []

    def _leaves(self, number: int) -> list[BlockModule]:
        segment = self.program.segments[number]
        children = segment.block.children()
        return [self._by_path[segment.block.child_path(name, segment.path)] for name in children] or [
            self._by_path[segment.path]
        ]

    def layers(self) -> list[BlockModule]:
        """The segments between embedding and head: what is compiled, checkpointed and sharded one by one."""
        return self._segments[int(self.begins) : len(self._segments) - int(self.ends)]

    def compile_layers(self, **options: Any) -> None:
        """torch.compile each layer in place. Equal layers share their code, layers of different kinds do not: torch
        counts recompilations by code, and gives up after RECOMPILATIONS (8 in versions that cannot be told). A layer
        is one graph, but for where its tokens travel to experts on other ranks.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": RECOMPILATIONS, **options}
        kinds: dict[Block, type[BlockModule]] = {}
        for layer in [*self.layers(), *self.head()[:1]]:  # the final norm stands alone before the loss
            if layer.block not in kinds:
                kinds[layer.block] = _kind_of(layer.block)
            layer.__class__ = kinds[layer.block]
            layer.compile(fullgraph=not _spreads_experts(layer.block), **options)

    def make_cache(self, *, batch: int, positions: int, dtype: torch.dtype | None = None) -> Cache:
        """Zeroed states for `batch` rows of `positions` tokens."""
        known = {"batch": batch, "positions": positions}
        device = next(self.parameters()).device
        return {
            path: {
                name: torch.zeros(
                    [known.get(axis, size) for axis, size in zip(state.axes, state.sizes, strict=True)],
                    dtype=dtype or self.ops.dtype,
                    device=device,
                )
                for name, state in states.items()
            }
            for path, states in self.program.states().items()
        }

    def bind_cache(self, cache: Cache) -> None:
        """Make `cache` the one that calls with `write_index_B` update in place."""
        for path, states in cache.items():
            self._by_path[path].cache = states
