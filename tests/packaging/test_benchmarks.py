"""The training benchmark: both contestants compute the same, records hold what was measured, sessions end in time."""

import importlib
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from archwright.spec import Spec, load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LLAMA3 = {"kind": "llama3", "factor": 32, "low_frequency_factor": 1, "high_frequency_factor": 4,
          "original_max_positions": 64}  # fmt: skip


def script(name: str) -> Any:
    """A module of benchmarks/, which are scripts that import each other by name."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def tiny(precision: str) -> Spec:
    train = {"batch_size": 4, "micro_batches": 2, "sequence_length": 48, "precision": precision, "clip_norm": 1.0}
    overrides = {"model.layer.attention.position.scaling": LLAMA3, "model.max_positions": 512}
    return load("preset:tiny", overrides | {f"train.{name}": value for name, value in train.items()})


@pytest.mark.parametrize(("precision", "fused", "tolerance"), [("float64", False, 1e-11), ("bfloat16", True, 2e-3)])
def test_the_contestants_compute_the_same(precision: str, fused: bool, tolerance: float) -> None:
    """Losses of four steps of rising rate: forward, gradients, clipping and optimizer agree."""
    contestants = script("contestants")
    spec = tiny(precision)
    samples = contestants.synthetic_samples(spec.model.vocab_size, 48, 0)
    common = {"spec": spec, "samples": samples, "device": torch.device("cpu")}
    ours, theirs = contestants.Archwright(**common), contestants.Handwritten(**common, chunk_tokens=40, fused=fused)
    theirs.start_as(ours)
    for _ in range(4):
        ours.step()
        theirs.step()
    losses = ours.read_losses()
    assert losses[-1] < losses[0] - 0.01
    assert theirs.read_losses() == pytest.approx(losses, rel=tolerance)
    assert ours.kept_bytes() == theirs.kept_bytes() == 3 * (8 if precision == "float64" else 4) * 125_248


def test_the_default_is_the_preset() -> None:
    handwritten, contestants = script("handwritten"), script("contestants")
    spec = load("preset:llama3.2-1b")
    assert contestants.config_of(spec) == handwritten.Config()
    with torch.device("meta"):
        model = handwritten.Llama(handwritten.Config(), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400


def test_the_hand_written_loss_ignores_what_it_should() -> None:
    handwritten = script("handwritten")
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_VD = (torch.randn(rows, 8, dtype=torch.float64, generator=generator) for rows in (21, 32))
    targets_T = torch.randint(0, 32, (21,), generator=generator)
    targets_T[3:9] = handwritten.IGNORED
    found = []
    for plain in (True, False):
        x, weight = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if plain:
            loss = torch.nn.functional.cross_entropy(x @ weight.T, targets_T)
        else:
            scale = torch.tensor(1 / 15, dtype=torch.float64)
            loss = handwritten.LinearCrossEntropy.apply(x, weight, targets_T, scale, 5)
        loss.backward()
        found.append((loss.detach(), x.grad, weight.grad))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*found, strict=True))


def test_a_pair_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--warmup", "1", "--steps", "2", "--blocks", "3", "--precision", "float32", "--sequence", "32"]
    script("bench_training").main([*arguments, "--preset", "tiny", "--mode", "pair", "--output", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["command"] == "bench_training.py " + " ".join([*arguments, "--preset tiny --mode pair"])
    assert record["pair"]["largest_loss_difference"] < 1e-4
    assert len(record["pair"]["speed_ratio_of_each_pair"]) == 3
    for name in ("archwright", "handwritten"):
        found = record[name]
        assert len(found["losses"]) == 7 and len(found["step_s"]) == 6 and len(found["block_step_s"]) == 3
        assert sum(found["step_s"]) == pytest.approx(2 * sum(found["block_step_s"]), abs=1e-4)
        speed = record["batch"]["sequences"] * 32 / found["median_step_s"]
        assert found["tokens_per_s_per_gpu"] == pytest.approx(speed, rel=1e-3)
    assert record["plan"]["parameters"]["total"] == 125_248


def test_dialects_leave_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rounds", "2", "--hidden", "64", "--layers", "1", "--batch", "2", "--prompt", "8", "--weights", "int4"]
    script("bench_dialects").main([*sizes, "--output", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert record["command"] == " ".join(["bench_dialects.py", *sizes])
    forms = {f"{target}, {fused}" for target in ("portable", "onnxruntime")
             for fused in ("none", "scale", "qkv", "gate_up", "all")}  # fmt: skip
    assert record["forms"].keys() == forms
    base = record["forms"]["portable, none"]["decode"]
    assert base["median_ms"] > 0 and base["speed_ratios"] == [1.0, 1.0]
    for found in record["forms"].values():
        assert len(found["decode"]["speed_ratios"]) == len(found["prefill"]["speed_ratios"]) == 2


def test_experiments_are_what_the_harness_takes() -> None:
    session, harness = script("gpu_session"), script("bench_training")
    for group in tomllib.loads((BENCHMARKS / "experiments.toml").read_text()):
        for experiment in session.read_experiments(group, []):
            command = experiment.command(Path("out"), experiment.limit_s)
            harness.make_parser().parse_args(command[command.index(str(BENCHMARKS / "bench_training.py")) + 1 :])


def test_settings_of_inductor_are_known() -> None:
    config: Any = importlib.import_module("torch._inductor.config")
    harness = script("bench_training")
    with config.patch(reorder_for_compute_comm_overlap=False):
        harness.set_inductor(["reorder_for_compute_comm_overlap=true"])
        assert config.reorder_for_compute_comm_overlap is True
    for wrong in ("no_such_setting=1", "reorder_for_compute_comm_overlap=yes"):
        with pytest.raises(SystemExit, match="--inductor"):
            harness.set_inductor([wrong])


def test_nothing_outlives_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a session of its own that ignores SIGTERM, as a worker that hangs in a collective."""
    gpu_session = script("gpu_session")
    monkeypatch.setattr(gpu_session, "GRACE_S", 0.5)
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); "
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf + 'time.sleep(60)'!r}], "
    session = gpu_session.Session(tmp_path / "out", 60)
    started = time.monotonic()
    status = session.run("hang", [sys.executable, "-c", parent + "start_new_session=True)"], 1.5)
    assert status == "timeout" and time.monotonic() - started < 10
    stat = Path("/proc", (tmp_path / "out" / "log.txt").read_text().splitlines()[2], "stat")
    while is_running(stat) and time.monotonic() - started < 50:  # on busy cores it takes a while to die
        time.sleep(0.05)
    assert not is_running(stat)


def is_running(stat: Path) -> bool:
    """A process that has ended and that nobody asked how counts as ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_table_has_a_row_for_all_that_ran(tmp_path: Path) -> None:
    gpu_session = script("gpu_session")
    memory = {"peak_allocated_bytes": 3 << 30, "peak_reserved_bytes": 4 << 30}
    found = {"median_step_s": 0.25, "tokens_per_s_per_gpu": 100.0, "mfu_full": 0.5, "mfu_causal": 0.4, "losses": [3, 2],
             "memory": {}, "ranks": [memory, {}]}  # fmt: skip
    record = {"archwright": found, "plan": {"memory_of_a_rank_bytes": 5 << 30}}
    lines = [
        {"experiment": "two-a", "status": "ok", "file": "a.json", "record": record},
        {"experiment": "two-b", "status": "timeout"},
    ]
    rows = [row.split() for row in gpu_session.table(lines).splitlines()]
    expected = "two-a archwright 250.00 100 50.00% 40.00% 3.0 4.0 5.0 3.0000 2.0000 -"
    assert rows[1:] == [expected.split(), ["two-b", "timeout"]]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpu_session.main(["--unpack", str(tmp_path / "records.jsonl"), "--output", str(tmp_path / "results")])
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == record
