"""JSON that somebody else may have written."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for which nesting beyond Python's stack is a ValueError as every other fault is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
