"""The model's mathematics, written once. Every file here is plain Python: frozen values and their forward."""

from archwright.compiler.blocks.attention import GroupedQueryAttention
from archwright.compiler.blocks.decoder import DecoderLayer, LanguageModelHead
from archwright.compiler.blocks.embedding import Embedding
from archwright.compiler.blocks.ffn import SwiGLU
from archwright.compiler.blocks.linear import Linear
from archwright.compiler.blocks.norm import RMSNorm
from archwright.compiler.blocks.position import Rope

__all__ = [
    "DecoderLayer",
    "Embedding",
    "GroupedQueryAttention",
    "LanguageModelHead",
    "Linear",
    "RMSNorm",
    "Rope",
    "SwiGLU",
]
