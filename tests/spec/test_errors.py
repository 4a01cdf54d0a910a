import pickle
import re
from pathlib import Path

from archwright.spec import ArchwrightError, Diagnostic, SpecError, errors


def test_an_error_reads_as_place_code_message_help():
    assert str(ArchwrightError("RUN001", "no such thing")) == "RUN001 no such thing"
    error = ArchwrightError("RUN001", "no such thing", where="out/model", help="build it")
    assert str(error) == "out/model: RUN001 no such thing\n  help: build it"


def test_diagnostics_are_sorted_and_told_once():
    late = Diagnostic(code="SPEC011", message="late", file="a.yaml", line=9)
    early = Diagnostic(code="SPEC010", message="early", file="a.yaml", line=2)
    override = Diagnostic(code="SPEC007", message="override", file="--set x")
    error = SpecError([override, late, early, late])
    assert [diagnostic.message for diagnostic in error.diagnostics] == ["early", "late", "override"]
    assert (error.code, error.where) == ("SPEC010", "a.yaml:2:1")


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(SpecError([Diagnostic(code="SPEC010", message="x", help="y")])))
    assert error.diagnostics[0].help == "y"
    error = pickle.loads(pickle.dumps(ArchwrightError("RUN001", "x", where="y", help="z")))
    assert (error.where, error.help) == ("y", "z")


def test_a_long_line_is_cut_around_the_caret():
    line = "a" * 200 + "HERE" + "b" * 200
    text = str(Diagnostic(code="SPEC010", message="x", column=201, length=4, source_line=line))
    shown, caret = text.splitlines()[1:]
    assert len(shown) < 140
    assert shown[caret.index("^") : caret.rindex("^") + 1] == "HERE"


def test_every_code_has_its_section_and_every_section_its_code():
    sources = Path(errors.__file__).parent.glob("*.py")
    codes = {code for path in sources for code in re.findall(r'"(SPEC\d{3})"', path.read_text(encoding="utf-8"))}
    page = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    assert codes == set(re.findall(r"^### (SPEC\d{3})$", page, re.MULTILINE))
