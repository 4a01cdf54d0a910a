"""The JSON Schema of the language, for editors."""

from typing import Any

from archwright.spec.models import Spec

_REF = "#/$defs/"


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. Cross-field rules are not in it: `archwright validate` knows them.

    A spec that extends another may leave out anything but version, name and extends, at every level. So each object
    stands twice in `$defs`: complete, and as an overlay (`...Overlay`) of which nothing is required.
    """
    complete = _tidy(Spec.model_json_schema())
    definitions: dict[str, Any] = complete.pop("$defs")
    definitions["Spec"] = complete
    overlays = {f"{name}Overlay": _overlay(node) for name, node in definitions.items()}
    overlays["SpecOverlay"]["required"] = ["version", "name", "extends"]
    overlays["SpecOverlay"]["properties"]["extends"] = {
        "type": "string",
        "description": complete["properties"]["extends"]["description"],
    }
    complete["properties"]["extends"] = {"type": "null"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "archwright spec",
        "description": "The architecture, data, training and inference of one language model.",
        "if": {"required": ["extends"], "properties": {"extends": {"type": "string"}}},
        "then": {"$ref": _REF + "SpecOverlay"},
        "else": {"$ref": _REF + "Spec"},
        "$defs": definitions | overlays,
    }


def _tidy(node: Any) -> Any:
    """Without pydantic's titles of fields (the keys again) and its OpenAPI discriminators."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(node, dict):
        return node
    content: dict[str, Any] = {key: _tidy(value) for key, value in node.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(content.get("title"), str):
        del content["title"]
    if isinstance(content.get("discriminator"), dict):
        del content["discriminator"]
    return content


def _overlay(node: Any) -> Any:
    """The same with nothing required and no defaults; where `kind` is inherited, several kinds may fit."""
    if isinstance(node, list):
        return [_overlay(item) for item in node]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(node, dict):
        return node
    result: dict[str, Any] = {}
    for key, value in node.items():  # pyright: ignore[reportUnknownVariableType]
        if key == "$ref":
            result[key] = f"{value}Overlay"
        elif key == "properties":
            result[key] = {name: _overlay(schema) for name, schema in value.items()}  # pyright: ignore
        elif key == "oneOf":
            result["anyOf"] = _overlay(value)
        elif key == "items":
            result[key] = value  # a list replaces the parent's, so its items are complete
        elif key not in ("required", "default"):
            result[key] = _overlay(value)
    return result
