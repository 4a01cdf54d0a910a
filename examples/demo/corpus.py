"""The demo's text: the documentation and sources of this Python's own standard library, and questions about them."""

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from archwright.spec.files import atomic_folder

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "encodings"}
MAX_ANSWER = 400


def write_corpus(folder: Path) -> None:
    """Write `text.jsonl` (a documentation topic or a module a line) and `questions.jsonl` (a docstring a line)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = dict(_sources(library))
    with atomic_folder(folder) as temporary:
        _write(temporary / "text.jsonl", ({"name": name, "text": text} for name, text in _texts(sources)))
        _write(temporary / "questions.jsonl", _questions(sources))


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT.isdisjoint(place.parts) and place.name != "topics.py":
            try:
                yield ".".join(place.with_suffix("").parts).removesuffix(".__init__"), path.read_text("utf-8")
            except UnicodeDecodeError:
                continue  # a few old modules declare another encoding


def _texts(sources: dict[str, str]) -> list[tuple[str, str]]:
    """Topics of the language reference and modules, in an order that any machine gives."""
    from pydoc_data.topics import topics

    texts = [(f"topic {name}", text) for name, text in topics.items()] + list(sources.items())
    return sorted(texts, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _questions(sources: dict[str, str]) -> Iterator[dict[str, str]]:
    """A question for each public function, class and method whose docstring begins with a short paragraph."""
    for module, text in sources.items():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue  # templates that are not Python by themselves
        for name, node in _definitions(tree, module):
            answer = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].strip()
            if 20 <= len(answer) <= MAX_ANSWER:
                yield {"question": f"What is {name}?", "answer": " ".join(answer.split())}


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for sub in ast.iter_child_nodes(node):
        if isinstance(sub, ast.FunctionDef | ast.ClassDef) and not sub.name.startswith("_"):
            yield f"{prefix}.{sub.name}", sub
            if isinstance(sub, ast.ClassDef):
                yield from _definitions(sub, f"{prefix}.{sub.name}")


def _write(path: Path, records: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
