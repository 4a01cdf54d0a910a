import json
from collections.abc import Callable, Iterator
from typing import Any

from archwright.spec import models
from archwright.spec.models import Node, Spec
from archwright.spec.schema import json_schema


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def test_schema(golden: Callable[[str, str], None]):
    golden("schema.json", json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n")


def test_every_reference_leads_somewhere():
    schema = json_schema()
    for node in nodes(schema):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]


def test_every_class_is_described():
    schema = json_schema()
    classes = {value for name in models.__all__ if isinstance(value := getattr(models, name), type)}
    for cls in classes - {Node}:
        first_line = schema["$defs"][cls.__name__]["description"].partition("\n")[0]
        assert cls.__doc__ is not None and cls.__doc__.startswith(first_line)


def test_a_spec_that_extends_needs_version_name_and_extends_only():
    definitions = json_schema()["$defs"]
    assert definitions["SpecOverlay"]["required"] == ["version", "name", "extends"]
    assert definitions["Spec"]["required"] == ["version", "name", "model"]
    overlays = {name: node for name, node in definitions.items() if name.endswith("Overlay")}
    assert len(overlays) * 2 == len(definitions)
    assert all("required" not in node for name, node in overlays.items() if name != "SpecOverlay")
    assert overlays["SpecOverlay"]["properties"].keys() == Spec.model_fields.keys()
