"""PyTorch and ONNX Runtime run the same model: same tokens, caches in place, clear words about what is missing."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.runtime import build, open_model, verify
from archwright.runtime.backends.onnxruntime_backend import BUCKET, bucketed, open_graphs
from archwright.spec import ArchwrightError

PROMPTS = ["the stop", "naïve text of the model writes text", [5, 6, 7], "日本"]


def test_all_back_ends_say_the_same(model_folder: Path, artifact: Path, two_ranks: Path) -> None:
    """Greedily, in one batch of unequal prompts, from PyTorch, one rank, and two ranks joined."""
    answers = [open_model(path).generate(PROMPTS, max_tokens=40) for path in (model_folder, artifact, two_ranks)]
    tokens = [[answer.tokens for answer in each] for each in answers]
    assert tokens[0] == tokens[1] == tokens[2]
    assert all(len(row) == 40 for row in tokens[0]) or any(answer.finish_reason == "stop" for answer in answers[0])


def test_sampled_tokens_are_the_same_too(model_folder: Path, two_ranks: Path) -> None:
    first, second = (
        open_model(path).generate(PROMPTS, max_tokens=20, temperature=0.8, top_k=50, seed=5)
        for path in (model_folder, two_ranks)
    )
    assert [answer.tokens for answer in first] == [answer.tokens for answer in second]


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_replicated_and_single_heads(
    write_model: Callable[..., Path], build_artifact: Callable[..., Path], heads: tuple[int, int]
) -> None:
    """Multi-head and multi-query attention on four ranks, with a tied head."""
    model = write_model(
        {
            "model.layer.attention.heads": heads[0],
            "model.layer.attention.kv_heads": heads[1],
            "model.tied_embeddings": True,
        }
    )
    sharded = build_artifact(model, {"build.parallel.tensor": 4})
    ids_BS = np.random.default_rng(0).integers(0, 400, (2, 30))
    error = largest_error(open_model(sharded).logits(ids_BS), open_model(model).logits(ids_BS).astype(np.float64))
    assert error < 2 * TOLERANCES["onnxruntime", "float32"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_runs_as_float32_and_says_so(
    write_model: Callable[..., Path], build_artifact: Callable[..., Path], precision: str
) -> None:
    """The weights are rounded once and the rest is float32: equal to PyTorch on weights that are stored rounded."""
    exact, rounded = write_model(), write_model(precision=precision)
    half = open_model(build_artifact(exact, {"build.precision": precision, "build.parallel.tensor": 2}))
    assert f"{precision} weights computed in float32" in half.describe()
    ids_BS = np.random.default_rng(0).integers(0, 400, (2, 20))
    actual = half.logits(ids_BS)
    assert largest_error(actual, open_model(rounded).logits(ids_BS)) < TOLERANCES["onnxruntime", "float32"]
    assert largest_error(actual, open_model(exact).logits(ids_BS)) > 1e-4


def test_caches_stay_where_they_are(two_ranks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same memory is input and output of 100 steps, and ONNX Runtime has nothing to say about it."""
    onnxruntime.set_default_logger_severity(2)
    backend = open_graphs(two_ranks, ranks=2, precision="float32")
    cache = backend.new_cache(2, 96)
    before = cache.pointers()
    assert len(before) == 8, "two ranks, two layers, key and value"
    memory = {name: value.numpy() for name, value in cache.values.items()}
    for step in range(100):
        at_B = np.array([step % 96, (step * 7) % 96])
        backend.decode(cache, np.array([5, 6]), at_B)
    assert cache.pointers() == before
    for name, value in cache.values.items():
        assert value.numpy().any() and value.data_ptr() == before[name] and memory[name].shape == (2, 1, 96, 8)
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_a_copied_cache_would_be_reported(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other half of the test above: with two memories ONNX Runtime warns, and we would see it."""
    onnxruntime.set_default_logger_severity(2)
    backend = open_graphs(artifact, ranks=1, precision="float32")
    cache, other = backend.new_cache(1, 96), backend.new_cache(1, 96)
    backend.forward(cache, np.array([[5]]), np.array([[0]]), np.array([0]), 1)
    assert "in-place" not in capfd.readouterr().err.lower()
    cache.bindings[0].bind_ortvalue_output("present.0.key", other.values["past.0.key"])
    backend.forward(cache, np.array([[5]]), np.array([[0]]), np.array([0]), 1)
    assert "in-place" in capfd.readouterr().err.lower()


@pytest.mark.parametrize(
    ("visible", "handed"), [(1, BUCKET), (BUCKET, BUCKET), (BUCKET + 1, 2 * BUCKET), (3 * BUCKET, 200 - 8)]
)
def test_visible_positions_grow_in_buckets(visible: int, handed: int) -> None:
    assert bucketed(visible, capacity=200 - 8) == handed


def test_a_step_reads_no_row_beyond_its_bucket(
    write_model: Callable[..., Path], build_artifact: Callable[..., Path]
) -> None:
    """So its cost is that of L rows, not of the capacity: NaN in the rows behind would spoil the result."""
    path = build_artifact(write_model({"model.max_positions": 2 * BUCKET}))
    backend = open_graphs(path, ranks=1, precision="float32")
    at_B = np.array([BUCKET - 1])
    results: list[np.ndarray] = []
    for fill in (0.0, np.nan):
        cache = backend.new_cache(1, 2 * BUCKET)
        for value in cache.values.values():
            rows = np.zeros(value.shape(), np.float32)
            rows[:, :, BUCKET:] = fill
            value.update_inplace(rows)
        results.append(backend.decode(cache, np.array([5]), at_B))
    assert (results[0] == results[1]).all()
    assert np.isnan(backend.decode(cache, np.array([5]), at_B + 1)).any(), "the NaN is really there"


def test_without_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, artifact: Path
) -> None:
    """Artifacts, build and verify name the extra, before anything is written; PyTorch goes on working."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "out"
    for attempt in (lambda: open_model(artifact), lambda: build(model_folder, out), lambda: verify(artifact)):
        with pytest.raises(ArchwrightError, match="RUN023") as caught:
            attempt()
        assert "archwright[cpu]" in (caught.value.help or "")
    assert list(tmp_path.iterdir()) == []
    assert open_model(model_folder).generate([[5]], max_tokens=1)


@pytest.mark.parametrize(
    ("which", "arguments", "code"),
    [
        ("model", {"backend": "onnxruntime"}, "RUN022"),
        ("artifact", {"backend": "torch"}, "RUN022"),
        ("model", {"backend": "jax"}, "RUN022"),
        ("model", {"device": "tpu"}, "RUN021"),
        ("model", {"device": "cuda:99"}, "RUN021"),
        ("artifact", {"device": "cuda"}, "RUN021"),
        ("artifact", {"precision": "float16"}, "RUN022"),
        ("model", {"precision": "float8"}, "RUN022"),
    ],
)
def test_what_does_not_serve(
    model_folder: Path, artifact: Path, which: str, arguments: dict[str, str], code: str
) -> None:
    with pytest.raises(ArchwrightError, match=code) as caught:
        open_model(model_folder if which == "model" else artifact, **arguments)
    assert caught.value.help


def test_chosen_by_name_or_by_itself(model_folder: Path, artifact: Path) -> None:
    assert "PyTorch" in open_model(model_folder, backend="torch", device="cpu").describe()
    assert "ONNX Runtime" in open_model(artifact, backend="onnxruntime", device="cpu").describe()
    assert "float64" in open_model(model_folder, precision="float64").describe()


def test_a_folder_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArchwrightError, match="RUN011"):
        open_model(tmp_path)


def test_a_tokenizer_with_too_many_tokens(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    with pytest.raises(ArchwrightError, match="RUN024"):
        open_model(write_model({"model.vocab_size": 300}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "rank0" / "stage0.data").unlink(),
        lambda path: (path / "rank0" / "stage0.onnx").write_bytes(
            b"x" * (path / "rank0" / "stage0.onnx").stat().st_size
        ),
        lambda path: (path / "rank0" / "stage0.data").write_bytes(b""),
        lambda path: (path / "spec.yaml").write_text("version: 1\n"),
        lambda path: ((path / "keep").mkdir(), (path / "spec.yaml").rename(path / "keep" / "spec.yaml")),
    ],
)
def test_a_damaged_artifact_is_not_opened(tmp_path: Path, artifact: Path, damage: Callable[[Path], object]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    damage(copy)
    with pytest.raises(ArchwrightError, match="RUN014"):
        open_model(copy)


def test_a_linked_file_is_not_opened(tmp_path: Path, artifact: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = copy / "rank0" / "stage0.data"
    data.rename(tmp_path / "elsewhere.data")
    data.symlink_to(tmp_path / "elsewhere.data")
    with pytest.raises(ArchwrightError, match=r"RUN014 .*symbolic link"):
        open_model(copy)


def test_an_unknown_type_of_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "stage0.onnx").write_bytes(b"nothing")
    with pytest.raises(ArchwrightError, match="RUN016"):
        open_graphs(tmp_path, ranks=1, precision="float32")
