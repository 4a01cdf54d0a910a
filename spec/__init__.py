"""The language: read a spec with `load`; mistakes in it come back as one `SpecError` with every diagnostic."""

from archwright.spec.errors import ArchwrightError, Diagnostic, SpecError
from archwright.spec.load import dump, load, spec_digest
from archwright.spec.models import Spec

__all__ = ["ArchwrightError", "Diagnostic", "Spec", "SpecError", "dump", "load", "spec_digest"]
