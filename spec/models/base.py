"""What every section shares: frozen, strict, no unknown keys."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["float64", "float32", "bfloat16", "float16"]


class Node(BaseModel):
    """One mapping of the YAML. Strict: `"8"` is not 8; an unknown key is an error; numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
