"""Quantized builds: what they lose, what they refuse, and that a killed calibration goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from archwright.compiler import export_graphs
from archwright.compiler.passes import build_program, lower
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.compiler.weights.folder import open_folder
from archwright.runtime import build, open_model, verify
from archwright.runtime.artifact import open_artifact
from archwright.runtime.backends.exposing import ExposingBackend
from archwright.runtime.bisection import bisect
from archwright.runtime.inspection import inspect_folder
from archwright.runtime.quantization import calibration, preparation
from archwright.runtime.quantization.calibration import calibrate, state_folder
from archwright.runtime.quantization.quality import Quality
from archwright.runtime.quantization.tokens import read_tokens
from archwright.runtime.rank_weights import RankWeights
from archwright.spec import ArchwrightError, load
from archwright.spec.models import Calibration
from tests.runtime.quantization_models import markov, trained_model

RTN = {"kind": "int4", "group_size": 32}
AWQ = {**RTN, "method": "awq"}
RULES: dict[str, list[dict[str, Any]]] = {
    "rtn": [RTN, {**RTN, "match": "lm_head"}],
    "awq": [AWQ, {**AWQ, "match": "lm_head"}],
    "int8": [{"kind": "int8", "match": "*"}],
    "fp8": [{"kind": "fp8"}, {"kind": "fp8", "match": "lm_head"}],
    "mixed": [{"kind": "fp8", "match": "*.o_proj"}, {"kind": "int8", "match": "*.down_proj"}, AWQ],
}

JOINED: dict[str, dict[str, Any]] = {
    "awq": {"build.target": "onnxruntime", "build.fuse": "all"},
    "mixed": {"build.fuse": "all"},
}
"""Builds with joined matrices."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with planted outlier channels. Beside it lie tokens.npy."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "tokens.npy", markov(64, 48, seed=5))
    return trained_model(folder, outliers=True)


def calibrated(model: Path) -> dict[str, Any]:
    return {"path": str(model.parent / "tokens.npy"), "samples": 32, "sequence_length": 48, "evaluation": 16}


@pytest.fixture(scope="module")
def built(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Quality]]:
    """`built("awq")`: the artifact in bfloat16, of two ranks, and its quality."""
    done: dict[str, tuple[Path, Quality]] = {}

    def one(name: str) -> tuple[Path, Quality]:
        if name not in done:
            out = tmp_path_factory.mktemp("quantized") / name
            quantize = {"rules": RULES[name], "calibration": calibrated(trained)}
            report = build(trained, out, overrides={
                "build.quantize": quantize, "build.parallel.tensor": 2, "build.precision": "bfloat16",
                **JOINED.get(name, {}),
            })  # fmt: skip
            assert report.ok and report.quality is not None
            done[name] = (out, report.quality)
        return done[name]

    return one


@pytest.mark.parametrize("name", RULES)
def test_an_artifact_proves_itself(built: Callable[[str], tuple[Path, Quality]], name: str) -> None:
    out, quality = built(name)
    report = verify(out)
    assert report.ok, report.as_text()
    assert (found := bisect(out)).ok, found.as_text()
    measured = json.loads((out / "manifest.json").read_text())["measured"]
    assert measured["quality"]["kl"] == quality.kl > 0
    assert not state_folder(out).exists()
    assert inspect_folder(out)["unfused_layers"] == {}
    assert "calibration: {" not in (out / "spec.yaml").read_text(), "no paths in an artifact"


def test_rounded_values_are_read_row_by_row(trained: Path, tmp_path: Path) -> None:
    """GroupQueryAttention takes later pieces of several rows apart: all that is rounded is found at its place."""
    quantize = {"rules": RULES["fp8"], "calibration": calibrated(trained)}
    assert build(trained, tmp_path / "out", overrides={"build.quantize": quantize, "build.target": "onnxruntime"}).ok
    artifact = open_artifact(tmp_path / "out")
    backend = ExposingBackend(artifact.path, artifact.plan, max_batch=None)
    ids_BS = markov(3, 24, seed=6)
    logits_BSV = backend.whole(ids_BS)
    once = backend.rounded.gathered(24)
    backend.begin()
    cache = backend.new_cache(3, 24)
    positions_BS = np.broadcast_to(np.arange(24), ids_BS.shape)
    pieces = [
        backend.forward(cache, ids_BS[:, part], positions_BS[:, part], np.full(3, part.start), part.stop)
        for part in (slice(0, 9), slice(9, 10), slice(10, 24))
    ]
    assert [len(call.positions_BS) for call in backend.rounded.calls] == [3, 3, 1, 1, 1]
    assert largest_error(np.concatenate(pieces, axis=1), logits_BSV) < TOLERANCES["onnxruntime", "float32"]
    for found, expected in zip(backend.rounded.gathered(24), once, strict=True):
        assert np.isfinite(found).all() and (found == expected).mean() > 0.999, "but for neighbours of a last bit"


@pytest.mark.parametrize("name", ["awq", "int8", "fp8"])
def test_each_method_beats_rounding_to_4_bits(built: Callable[[str], tuple[Path, Quality]], name: str) -> None:
    plain, other = built("rtn")[1], built(name)[1]
    assert other.kl < 0.7 * plain.kl
    assert other.ratio < plain.ratio < 1.2
    assert [layer.bits for layer in built("awq")[1].layers] == [None, 4.5, 4.5, 4.5]


def test_inspect_says_bytes_by_type_and_the_model_runs(built: Callable[[str], tuple[Path, Quality]]) -> None:
    out, _ = built("mixed")
    sizes = inspect_folder(out)["weight_bytes"]
    assert set(sizes) == {"int4", "int8", "bfloat16", "float8e4m3fn"}
    ranks = 2
    assert sizes["int8"] == ranks * 2 * 64 * 64 and sizes["float8e4m3fn"] == ranks * 2 * 64 * 32
    assert sizes["int4"] == ranks * 2 * (64 * 32 + 2 * 64 * 16 + 2 * 64 * 64) // 2
    assert len(open_model(out).generate([1, 2, 3], max_tokens=4)[0].tokens) == 4


def test_the_quality_is_that_of_what_the_artifact_computes(built: Callable[[str], tuple[Path, Quality]]) -> None:
    """ONNX Runtime's own perplexity of the artifact, beside what was measured layer by layer."""
    out, quality = built("awq")
    ids_NS = markov(64, 48, seed=5)[-16:]
    logits = open_model(out).logits(ids_NS).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p[:, :-1], ids_NS[:, 1:, None], axis=-1)
    assert np.exp(-picked.mean()) == pytest.approx(quality.perplexity, rel=3e-3)  # norms and tables are bfloat16 there


def test_a_damaged_nibble_is_found(built: Callable[[str], tuple[Path, Quality]], tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(built("awq")[0], out)
    data = out / "rank1" / "stage0.data"
    content = bytearray(data.read_bytes())
    content[4096] ^= 0x10
    data.write_bytes(content)
    assert not verify(out).ok


def test_too_much_loss_is_refused(trained: Path, tmp_path: Path) -> None:
    quantize = {"rules": RULES["awq"], "calibration": calibrated(trained), "limit": {"kl": 1e-5, "perplexity": 1.0}}
    with pytest.raises(ArchwrightError, match="BUILD063") as error:
        build(trained, tmp_path / "out", overrides={"build.quantize": quantize})
    assert "the perplexity grows" in error.value.message and "the KL divergence is" in error.value.message
    assert "model.layers.0" in error.value.message and error.value.help
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["awq", "fp8"])
def test_calibration_is_asked_for(trained: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchwrightError, match="BUILD060"):
        build(trained, tmp_path / "out", overrides={"build.quantize": {"rules": RULES[name]}})


def test_an_export_alone_rounds_and_does_not_calibrate(tmp_path: Path) -> None:
    sizes = {"model.layer.ffn.hidden_size": 64, "train": None, "tokenizer": None, "build.weights.kind": "generated"}
    plain, scaled = (load("preset:tiny", sizes | {"build.quantize": {"rules": [rule]}}) for rule in (RTN, AWQ))
    (graph,) = export_graphs(plain, tmp_path / "plain")
    assert any(
        t.data_type == onnx.TensorProto.INT4 for t in onnx.load(graph, load_external_data=False).graph.initializer
    )
    with pytest.raises(ArchwrightError, match="BUILD060"):
        export_graphs(scaled, tmp_path / "scaled")
    assert export_graphs(scaled, tmp_path / "scaled", write_weights=False)[0].is_file()


def test_a_killed_calibration_goes_on_and_gives_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = {"rules": [AWQ], "calibration": calibrated(trained)}
    assert build(trained, tmp_path / "whole", overrides={"build.quantize": quantize}).ok
    original, started = calibration.segment_module, list[int]()

    def killed(program: Any, weights: Any, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return original(program, weights, number)

    monkeypatch.setattr(calibration, "segment_module", killed)
    with pytest.raises(KeyboardInterrupt):  # as Ctrl-C is; of a killed process the same is left
        build(trained, tmp_path / "again", overrides={"build.quantize": quantize})
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".again.calibration"]

    def counted(program: Any, weights: Any, number: int) -> Any:
        started.append(number)
        return original(program, weights, number)

    monkeypatch.setattr(calibration, "segment_module", counted)
    assert build(trained, tmp_path / "again", overrides={"build.quantize": quantize}).ok
    assert started == [2]
    for file in ("rank0/stage0.data", "rank0/stage0.onnx"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not state_folder(tmp_path / "again").exists()


def test_a_state_of_something_else_is_not_used(trained: Path, tmp_path: Path) -> None:
    opened = open_folder(trained)
    paths, ids = ["model.layers.0.mlp.down_proj"], markov(3, 16, seed=1)
    first = calibrate(opened.program, opened.weights, ids, paths, tmp_path / "state")
    other = calibrate(opened.program, opened.weights, ids[:, ::-1].copy(), paths, tmp_path / "state")
    again = calibrate(opened.program, opened.weights, ids, paths, tmp_path / "state")
    assert (first[paths[0]].mean_D == again[paths[0]].mean_D).all()
    assert (first[paths[0]].mean_D != other[paths[0]].mean_D).any()


def test_statistics_are_those_of_the_oracle(trained: Path, tmp_path: Path) -> None:
    from archwright.compiler.interpreters.numpy_ops import NumpyOps, run_numpy

    opened = open_folder(trained)
    arrays = {name: opened.weights.read(name) for name in opened.program.params()}
    seen: list[np.ndarray] = []

    class Watching(NumpyOps):
        def linear(self, x: Any, weight: Any, bias: Any, **rest: Any) -> Any:
            seen.append(x)
            return super().linear(x, weight, bias, **rest)

    ids, path = markov(3, 20, seed=1), "model.layers.1.mlp.down_proj"
    run_numpy(opened.program, arrays, ids, ops=Watching(arrays))
    inputs = seen[-2].reshape(-1, seen[-2].shape[-1])  # the last matrix before the head
    found = calibrate(opened.program, opened.weights, ids, [path], tmp_path / "state")[path]
    np.testing.assert_allclose(found.mean_D, np.abs(inputs).mean(axis=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.largest_D, np.abs(inputs).max(axis=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sampled_TD, inputs, rtol=1e-3, atol=1e-5)


def test_tokens_of_every_form(tmp_path: Path, tokenizer_folder: Path) -> None:
    ids = markov(6, 10, seed=2)
    np.save(tmp_path / "tokens.npy", ids.astype(np.uint16))
    lines = [json.dumps(row.tolist()) for row in ids[:3]] + [json.dumps({"tokens": row.tolist()}) for row in ids[3:]]
    (tmp_path / "tokens.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("tokens.npy", "tokens.jsonl"):
        chosen = Calibration(path=str(tmp_path / name), samples=4, evaluation=2, sequence_length=10)
        found = read_tokens(chosen, vocab_size=96, tokenizer=None)
        assert (found.samples_NS == ids[:4]).all() and (found.evaluation_NS == ids[4:]).all()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the model writes text " * 9}) + "\n")
    chosen = Calibration(path=str(tmp_path / "text.jsonl"), samples=2, evaluation=1, sequence_length=8)
    assert read_tokens(chosen, vocab_size=400, tokenizer=tokenizer_folder).samples_NS.shape == (2, 8)


def npy_header(text: str) -> str:
    """A .npy without values, in Latin-1."""
    return f"\x93NUMPY\x01\x00{chr(len(text))}\x00{text}"


def test_a_text_that_is_no_unicode_is_told_with_its_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    chosen = Calibration(path=str(tmp_path / "text.jsonl"), samples=1, evaluation=1, sequence_length=8)
    with pytest.raises(ArchwrightError, match="BUILD062") as error:
        read_tokens(chosen, vocab_size=400, tokenizer=tokenizer_folder)
    assert "line 2: character 0 is U+D800" in error.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.jsonl", "[1, 2, 3]\n", "there are 0 sequences"),
        ("tokens.jsonl", '{"text": "a b c"}\n', "line 1 is a text, and the model has no tokenizer"),
        ("tokens.jsonl", '{"tokens": [1.5]}\n', "line 1 has neither"),
        ("tokens.jsonl", "[1, 2\n", "cannot be read"),
        ("tokens.jsonl", str([500] * 20), "token id 500 is outside"),
        ("tokens.txt", "1 2 3", "ends neither in"),
        ("missing.npy", None, "cannot be read"),
        ("tokens.jsonl", "[" * 100_000, "nested too deeply"),
        ("tokens.jsonl", f"[{10**30}]", "cannot be read"),
        ("tokens.jsonl", '{"text": "a\xff"}', "cannot be read"),
        ("tokens.npy", "", "cannot be read"),
        ("tokens.npy", "PK\x03\x04 an archive", "cannot be read"),
        ("tokens.npy", npy_header("(5, "), "cannot be read"),
        (
            "tokens.npy",
            npy_header("{'descr': '<i8', 'fortran_order': False, 'shape': (" + "9" * 30 + ",)}"),
            "cannot be",
        ),
        ("tokens.npy", npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"), "cannot be read"),
    ],
)
def test_tokens_that_do_not_serve(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin1")
    chosen = Calibration(path=str(tmp_path / name), samples=1, evaluation=1, sequence_length=8)
    with pytest.raises(ArchwrightError, match="BUILD062") as error:
        read_tokens(chosen, vocab_size=96, tokenizer=None)
    assert message in error.value.message and error.value.help


def test_graphs_hold_few_bits(built: Callable[[str], tuple[Path, Quality]]) -> None:
    out, _ = built("rtn")
    model = onnx.load(out / "rank0" / "stage0.onnx", load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.name == "model.layers.0.mlp.down_proj.weight.T")
    assert weight.data_type == onnx.TensorProto.INT4 and list(weight.dims) == [64, 64]
    assert {e.key: e.value for e in weight.external_data}["length"] == str(64 * 64 // 2)
    assert preparation._rounded_inputs(lower(load(out / "spec.yaml"))) == []


def test_weights_come_back_from_an_artifact(built: Callable[[str], tuple[Path, Quality]], trained: Path) -> None:
    """Joined from both ranks, and a window of packed values is what unpacking all of them gives."""
    from archwright.runtime.artifact import open_artifact

    out, _ = built("rtn")
    artifact = open_artifact(out)
    weights = RankWeights(artifact)
    source = preparation.built_weights(artifact.spec, open_folder(trained).weights)
    for name in build_program(artifact.spec).params():
        if name.endswith(("_proj.weight", "_proj.weight_scale", "lm_head.weight")):
            np.testing.assert_array_equal(weights.read(name), source.read(name))
    part = weights.part("model.layers.0.mlp.down_proj.weight", 1)
    whole = np.asarray(part)
    for rows, columns in ((slice(3, 4), slice(0, 5)), (slice(0, 64), slice(7, 8)), (slice(5, 12), slice(1, 64))):
        np.testing.assert_array_equal(part[(rows, columns)], whole[rows, columns])
