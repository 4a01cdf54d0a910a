"""The whole spec."""

from typing import Literal

from archwright.spec.models.architecture import Model
from archwright.spec.models.base import Node
from archwright.spec.models.deployment import Build, Parallel, Serve
from archwright.spec.models.text import Data, Tokenizer
from archwright.spec.models.training import Train


class Spec(Node):
    """A resolved spec: `extends` and `--set` are merged in. Each verb asks for the sections it needs."""

    version: Literal[1]
    name: str
    extends: str | None = None
    """`preset:NAME` or a path relative to this file; none once resolved."""
    model: Model
    tokenizer: Tokenizer | None = None
    data: Data | None = None
    parallel: Parallel = Parallel()
    train: Train | None = None
    build: Build = Build()
    serve: Serve = Serve()
