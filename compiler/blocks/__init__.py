"""The model's mathematics, written once. Every file here is plain Python: frozen values and their forward."""

from archwright.compiler.blocks.attention import Attention, FusedAttention, GroupedQueryAttention
from archwright.compiler.blocks.decoder import DecoderLayer, Head, LanguageModelHead, MoeDecoderLayer
from archwright.compiler.blocks.embedding import Embedding, PositionedEmbedding
from archwright.compiler.blocks.ffn import GELU, FeedForward, FusedSwiGLU, SwiGLU
from archwright.compiler.blocks.linear import Linear
from archwright.compiler.blocks.moe import Experts, MixtureOfExperts
from archwright.compiler.blocks.norm import LayerNorm, Norm, RMSNorm
from archwright.compiler.blocks.position import NoPosition, Position, Rope

__all__ = [
    "GELU",
    "Attention",
    "DecoderLayer",
    "Embedding",
    "Experts",
    "FeedForward",
    "FusedAttention",
    "FusedSwiGLU",
    "GroupedQueryAttention",
    "Head",
    "LanguageModelHead",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "MoeDecoderLayer",
    "NoPosition",
    "Norm",
    "Position",
    "PositionedEmbedding",
    "RMSNorm",
    "Rope",
    "SwiGLU",
]
