"""The cheapest change: what is proposed is legal, fits, and none cheaper of its kind does."""

from typing import Any

import pytest

from archwright.compiler import plan
from archwright.compiler.planning.memory import total_bytes
from archwright.spec import load

TRAIN = {"kind": "pretrain", "precision": "bfloat16", "sequence_length": 4096}


def overrides(**settings: Any) -> dict[str, Any]:
    return {"train": {**TRAIN, **settings.pop("train", {})}, **settings}


CASES = [
    ("llama3.2-1b", "1xH100", overrides(train={"batch_size": 32})),
    ("llama3.1-8b", "8xH100", overrides(train={"batch_size": 64})),
    ("llama3.1-8b", "8xH100", overrides(train={"batch_size": 8, "sequence_length": 32768})),
    ("llama3.1-8b", "8xH100", overrides(train={"batch_size": 8}, parallel={"data_shard": 1, "data_replicate": 8})),
    ("llama3.1-8b", "1xH100", overrides(train={"batch_size": 1})),
    ("llama3.1-70b", "16xH100", overrides(train={"batch_size": 64}, parallel={"tensor": 8, "data_shard": 2})),
    ("llama3.1-405b", "1024xH100", overrides(train={"batch_size": 2048}, parallel={"tensor": 8})),
]


@pytest.mark.parametrize(("preset", "gpus", "settings"), CASES)
def test_the_change_is_legal_and_fits(preset: str, gpus: str, settings: dict[str, Any]) -> None:
    report = plan(load(f"preset:{preset}", settings), gpus=gpus)
    assert report.fits is False and report.change is not None
    change = report.change
    from archwright.spec.cli import parse_overrides

    texts = parse_overrides([f"{path}={value}" for path, value in change.settings.items()])
    after = plan(load(f"preset:{preset}", {**settings, **texts}), gpus=f"{change.count}x{change.name}")
    assert after.fits is True and after.change is None
    assert max(map(total_bytes, after.memory)) == change.total_bytes
    assert after.step_s == pytest.approx(change.step_s)


def test_smaller_micro_batches_come_before_recomputation() -> None:
    """Both make it fit; recomputing costs a third of the forward, accumulating little."""
    report = plan(load("preset:llama3.2-1b", overrides(train={"batch_size": 32})), gpus="1xH100")
    assert report.change is not None and report.change.settings.keys() == {"train.micro_batches"}


def test_states_that_fit_nowhere_need_more_gpus() -> None:
    report = plan(load("preset:llama3.1-8b", overrides(train={"batch_size": 1})), gpus="1xH100")
    assert report.change is not None and report.change.count in (2, 4)
    count = report.change.count
    assert f"--gpus {count}xH100" in report.change.command and f"train.batch_size={count}" in report.change.command


def test_none_is_said_where_none_fits() -> None:
    settings = overrides(train={"batch_size": 1, "micro_batches": 1}, parallel={"data_shard": 1})
    assert plan(load("preset:llama3.1-405b", settings), gpus="1xA10").change is None


def test_gathered_weights_are_freed_before_anything_is_computed_again() -> None:
    train = {"batch_size": 32, "activation_checkpointing": {"kind": "selective"}}
    settings = overrides(train=train, parallel={"reshard": False})
    report = plan(load("preset:llama3.1-8b", settings), gpus="8xH100")
    assert report.change is not None and report.change.settings == {"parallel.reshard": "true"}
