"""What every section shares: frozen, strict, no unknown keys."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["float64", "float32", "bfloat16", "float16"]


class Node(BaseModel):
    """One mapping of the YAML. Strict: `"8"` is not 8; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
