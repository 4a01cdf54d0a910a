"""Ranks of fake engines give the oracle's tokens, and any wrong binding gives others, or an error.

The engines read and write at the bound addresses (`fake.py`). No TensorRT engine has been executed by these tests.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from archwright.compiler.tolerances import largest_error
from archwright.runtime.engines import rank as rank_module
from archwright.runtime.engines.device import Place
from archwright.runtime.engines.rank import Rank, StepInputs, choose_profile
from archwright.spec import ArchwrightError
from tests.runtime.engines.conftest import Rig
from tests.runtime.engines.models import CAPACITY

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 2, 60, 1]]
OTHERS = [[9, 1, 4], [50, 51, 52, 53], [2, 2]]
TOKENS = 8


def tokens(rig: Rig) -> list[list[list[int]]]:
    """Of two batches, one after the other: a second one's caches lie elsewhere."""
    model = rig.open()
    return [[a.tokens for a in model.generate(prompts, max_tokens=TOKENS)] for prompts in (PROMPTS, OTHERS)]


def expected(rig: Rig) -> list[list[list[int]]]:
    return [[rig.greedy(prompt, TOKENS) for prompt in prompts] for prompts in (PROMPTS, OTHERS)]


@pytest.mark.parametrize(
    ("stages", "tensor", "layers", "precision"),
    [(1, 1, 2, "float32"), (1, 2, 2, "float32"), (2, 1, 2, "float32"), (3, 2, 3, "float32")],
)
def test_every_mesh_gives_the_oracles_tokens(
    rig: Callable[..., Rig], stages: int, tensor: int, layers: int, precision: str
) -> None:
    """Prompts of uneven lengths in one batch, then decode steps, captured and replayed."""
    made = rig(stages=stages, tensor=tensor, layers=layers, precision=precision)
    assert tokens(made) == expected(made)
    assert all(engine.device.replays > 0 for engine in made.world.engines)


@pytest.mark.parametrize("stages", [1, 2])
def test_engines_that_give_the_logits_of_one_token_a_row(rig: Callable[..., Rig], stages: int) -> None:
    """A prefill asks for each prompt's last token in one call; whole sequences go token by token."""
    made = rig(stages=stages, tensor=2, logits="last")
    model, ids_BS = made.open(), np.array([[5, 6, 7], [9, 10, 11]])
    assert largest_error(model.logits(ids_BS), made.oracle(ids_BS)) < 1e-5
    found = [[answer.tokens for answer in model.generate(prompts, max_tokens=TOKENS)] for prompts in (PROMPTS, OTHERS)]
    assert found == expected(made)


def test_half_precision_is_bound_as_such(rig: Callable[..., Rig]) -> None:
    made = rig(stages=2, precision="bfloat16")
    ids_BS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    model = made.open()
    assert largest_error(model.logits(ids_BS), made.oracle(ids_BS)) < 2e-2
    assert "TensorRT 11.2, bfloat16, 2 ranks on host memory" == model.describe()


def test_two_conversations_and_the_end_of_the_cache(rig: Callable[..., Rig]) -> None:
    """A second cache lies elsewhere; the last row of a cache is written, and none after it."""
    made = rig(tensor=2)
    model = made.open()
    backend = model.backend
    first, second = backend.new_cache(1, CAPACITY), backend.new_cache(1, CAPACITY)
    ids_BS = np.random.default_rng(0).integers(0, 61, (2, CAPACITY))
    wanted_BSV = made.oracle(ids_BS)
    for number, cache in enumerate((first, second)):
        backend.prefill(cache, ids_BS[number : number + 1, : CAPACITY - 6], np.array([CAPACITY - 6]))
    for at in range(CAPACITY - 6, CAPACITY):
        for number, cache in enumerate((first, second)):
            logits_BV = backend.decode(cache, ids_BS[number : number + 1, at], np.array([at]))
            assert largest_error(logits_BV[0], wanted_BSV[number, at]) < 2e-5
    with pytest.raises(ArchwrightError, match="RUN049"):
        backend.decode(first, np.array([1]), np.array([CAPACITY]))


def test_a_cache_that_is_dropped_is_freed_on_every_rank(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    free = Rank.free_cache
    monkeypatch.setattr(Rank, "free_cache", lambda self, number: freed.append(number) or free(self, number))
    backend = rig(tensor=2).open().backend
    for _ in range(3):
        backend.new_cache(1, 8)
    assert sorted(freed) == [0, 0, 1, 1]


def _swap(name: str, other: str) -> Callable[..., Any]:
    """Two tensors get each other's addresses."""
    feed = Rank._feed

    def swapped(self: Rank, *args: Any) -> dict[str, int]:
        addresses = feed(self, *args)
        addresses[name], addresses[other] = addresses[other], addresses[name]
        return addresses

    return swapped


def _apart(self: Rank, number: int, inputs: StepInputs, sizes: Any) -> dict[str, int]:
    """Past and present of a cache get an address each, as if TensorRT copied them."""
    addresses = FEED(self, number, inputs, sizes)
    binding = self.table.bindings["present.0.key"]
    addresses["present.0.key"] = self._buffer("present.0.key", binding.num_bytes(sizes)).address
    return addresses


FEED = Rank._feed


def _keyed_by_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph is replayed for another cache too."""
    step = Rank.step

    def forgetful(self: Rank, number: int, inputs: StepInputs) -> None:
        for each in self._contexts:
            if each.seen is not None and each.replay is not None:
                each.seen = (number, each.seen[1], tuple(self._feed(number, inputs, inputs.sizes).values()))
        step(self, number, inputs)

    monkeypatch.setattr(Rank, "step", forgetful)
    monkeypatch.setattr(Rank, "free_cache", lambda self, number: None)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the new keys are written into the values": lambda patch: patch.setattr(
        Rank, "_feed", _swap("present.0.key", "present.0.value")
    ),
    "keys are read from the values": lambda patch: patch.setattr(Rank, "_feed", _swap("past.1.key", "past.1.value")),
    "past and present lie apart": lambda patch: patch.setattr(Rank, "_feed", _apart),
    "positions and tokens are swapped": lambda patch: patch.setattr(Rank, "_feed", _swap("input_ids", "position_ids")),
    "a graph is replayed for another cache": _keyed_by_shape_alone,
    "logits are read as another type": lambda patch: patch.setattr(
        Rank,
        "output",
        lambda self, inputs: self._device.read(
            self._buffers["logits"], self.table.given.shape(inputs.sizes), np.dtype(np.int16)
        ).astype(np.float32),
    ),
    "new rows go to the first row": lambda patch: patch.setattr(
        StepInputs,
        "arrays",
        lambda self, arrays=StepInputs.arrays: arrays(self) | {"write_index": 0 * self.write_index_B},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_binding_gives_wrong_tokens(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    made = rig()
    wanted = expected(made)
    MISTAKES[mistake](monkeypatch)
    assert tokens(made)[1] != wanted[1]


def test_the_wrong_profile_is_refused(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "choose_profile", lambda profiles, sizes: 1)
    with pytest.raises(ArchwrightError, match=r"RUN048 TensorRT refuses: shape \[3, 7\] of `input_ids`"):
        tokens(rig())


def test_stages_in_another_order_give_wrong_tokens(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """0 → 2 → 1 → 3: every hand-off fits, and the layers stand in the wrong order."""
    made = rig(stages=4, layers=4)
    wanted = expected(made)
    after, before = {0: 2, 2: 1, 1: 3, 3: None}, {2: 0, 1: 2, 3: 1, 0: None}
    monkeypatch.setattr(Place, "after", property(lambda self: after[self.rank]))
    monkeypatch.setattr(Place, "before", property(lambda self: before[self.rank]))
    assert tokens(made) != wanted


def test_a_rank_without_a_communicator_is_an_error_and_no_hang(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.runtime.engines.fake import FakeContext

    made = rig(tensor=2, step_timeout_s=1.0)
    original = FakeContext.set_communicator

    def forgotten(self: FakeContext, communicator: Any) -> bool:
        original(self, communicator)
        if communicator.place.rank == 1:
            self.communicator = None
        return True

    monkeypatch.setattr(FakeContext, "set_communicator", forgotten)
    model = made.open()
    with pytest.raises(ArchwrightError, match=r"RUN048 rank 0, rank 1 did not answer `step` within 1 s") as caught:
        model.generate(PROMPTS, max_tokens=2)
    assert "communicator" in (caught.value.help or "")
    with pytest.raises(ArchwrightError, match="ended after an earlier failure"):
        model.generate(PROMPTS, max_tokens=2)


def test_a_rank_that_fails_ends_the_others_wait(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank of its stage waits in an all-reduce; the failure is told at once."""
    made = rig(tensor=2, step_timeout_s=60.0)
    model = made.open()
    made.world.engines[1].stage = None  # type: ignore[assignment]
    with pytest.raises(ArchwrightError, match="rank1: RUN048 AttributeError"):
        model.generate([[1, 2]], max_tokens=2)


def test_an_engine_of_another_graph_is_not_bound(rig: Callable[..., Rig]) -> None:
    made = rig()
    table = made.world.engines[0].table
    changed = dict(table.bindings)
    changed["logits"] = replace(changed["logits"], engine_type="HALF", dims=("batch", "sequence", 62))
    del changed["past.1.value"]
    made.world.engines[0].table = replace(table, bindings=changed)
    with pytest.raises(ArchwrightError) as caught:
        made.open()
    assert caught.value.code == "RUN046"
    for problem in ("`past.1.value` is missing", "`logits` is HALF in the engine", "`logits` is [-1, -1, 62]"):
        assert problem in caught.value.message


def test_a_single_token_takes_the_decode_profile_and_other_steps_another(rig: Callable[..., Rig]) -> None:
    profiles = rig().engines.profiles
    sizes = {"batch": 3, "sequence": 1, "positions": 12}
    assert choose_profile(profiles, sizes) == 1
    assert choose_profile(profiles, sizes | {"sequence": 2}) == 0
    with pytest.raises(ArchwrightError, match=r"RUN047 no profile .* batch 4, sequence 1, positions 12"):
        choose_profile(profiles, sizes | {"batch": 4})
