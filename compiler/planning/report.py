"""The answer of `plan`, as a value and as JSON."""

from dataclasses import asdict, dataclass

from archwright.compiler.planning.changes import Change
from archwright.compiler.planning.inference import Inference
from archwright.compiler.planning.machines import Cluster
from archwright.compiler.planning.memory import InferenceMemory, TrainingMemory, parts, total_bytes
from archwright.compiler.planning.step_time import Exchange
from archwright.compiler.planning.training import Estimate

CONVENTION = (
    "FLOPs per token = 6 x (parameters that multiply, head included, embedding table excluded) + 12 x layers x heads x "
    "head_dim x sequence (causal: 6 x); recomputation excluded; dense published peak"
)


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Of the whole model, for each token of a sequence of `sequence` tokens.

    training = 6 · (parameters that multiply, head included, embedding table excluded)
             + 12 · layers · heads · head_dim · sequence

    2 a multiply-add, the backward twice the forward; every query meets every key. `_causal`: 6 in place of 12.
    Recomputed activations do not count. forward: a third of each.
    """

    sequence: int
    training: int
    training_causal: int
    forward: int
    forward_causal: int


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The answer of `plan`. kind: training with `train:` in the spec, inference without.

    memory: of each rank of the mesh. degrees: the mesh. replicas: meshes that run side by side. num_params_per_rank: of
    the rank that has most. step_s: expected; bound_s: no step can take less. Both None without a machine, and so is
    `fits`. precision: of the computation. change: what makes it fit, where it does not and something does.
    """

    name: str
    kind: str
    degrees: dict[str, int]
    replicas: int
    num_params: int
    num_params_per_rank: int
    flops: TokenFlops
    kv_precision: str
    kv_bytes_per_token: int
    memory: tuple[TrainingMemory | InferenceMemory, ...]
    cluster: Cluster | None
    step: str
    tokens_per_step: int
    training: Estimate | None
    inference: Inference | None
    fits: bool | None
    change: Change | None
    notes: tuple[str, ...]
    precision: str

    @property
    def step_s(self) -> float | None:
        if self.training is not None:
            return self.training.time and self.training.time.step_s
        return self.inference and self.inference.decode_s

    @property
    def bound_s(self) -> float | None:
        return self.training.bound_s if self.training else self.inference and self.inference.decode_bound_s

    @property
    def world(self) -> int:
        return len(self.memory)

    @property
    def kinds(self) -> tuple[TrainingMemory | InferenceMemory, ...]:
        """The memory of a rank of each pipeline position: all ranks of one are alike."""
        if self.training is not None:
            return self.training.memory
        return self.memory[:1] if self.inference is None else self.inference.memory

    def mfu(self, flops_per_token: int) -> float | None:
        """Model FLOPs utilization of the expected step (Chowdhery et al. 2022)."""
        if self.cluster is None or self.step_s is None or self.training is None:
            return None
        peak = self.cluster.gpu.flops_per_s[self.precision] * self.world
        return flops_per_token * self.tokens_per_step / (self.step_s * peak)

    def to_json(self) -> dict[str, object]:
        """The form that `plan --output-format json` prints."""
        cluster = self.cluster
        return {
            "name": self.name,
            "kind": self.kind,
            "degrees": self.degrees,
            "replicas": self.replicas,
            "gpus": cluster
            and {
                "count": cluster.count, "name": cluster.name, "memory_bytes": cluster.capacity_bytes,
                "node_size": cluster.gpu.node_size,
            },
            "parameters": {"total": self.num_params, "per_rank": self.num_params_per_rank},
            "memory": self._memory_json(),
            "flops": self._flops_json(),
            "kv_cache": {"precision": self.kv_precision, "bytes_per_token": self.kv_bytes_per_token},
            "time": self._time_json(),
            "communication": self._communication_json(),
            "pipeline": self._pipeline_json(),
            "inference": self.inference and self.inference.to_json(),
            "fits": self.fits,
            "change": self.change and self.change.to_json(),
            "constants": cluster and dict(cluster.constants),
            "notes": list(self.notes),
        }  # fmt: skip

    def _memory_json(self) -> dict[str, object]:
        """Ranks of one pipeline position are alike: `kinds` has each once, with the whole states."""
        estimate = self.training
        listed = [
            {
                "rank": rank,
                "pipeline": estimate.position(rank) if estimate else rank * len(self.kinds) // self.world,
                **parts(memory),
                "total_bytes": total_bytes(memory),
            }
            for rank, memory in enumerate(self.memory)
        ]
        if estimate is None:
            return {"per_rank": listed}
        kinds = [
            {"pipeline": position, "moment": memory.moment, "states": asdict(estimate.states[position])}
            for position, memory in enumerate(estimate.memory)
        ]
        return {"kinds": kinds, "per_rank": listed}

    def _flops_json(self) -> dict[str, object]:
        flops = self.flops
        content: dict[str, object] = {
            "sequence": flops.sequence,
            "per_token": flops.training,
            "per_token_causal": flops.training_causal,
            "forward_per_token": flops.forward,
            "forward_per_token_causal": flops.forward_causal,
        }
        if self.training is not None:
            content["per_step"] = flops.training * self.tokens_per_step
            content["per_rank_step"] = self.training.flops
            content["bytes_per_rank_step"] = self.training.moved_bytes
        return content

    def _time_json(self) -> dict[str, object]:
        estimate = self.training
        content: dict[str, object] = {"step_s": self.step_s, "lower_bound_s": self.bound_s, "step": self.step}
        if estimate is not None and estimate.time is not None and self.step_s is not None:
            content |= {
                "pipeline_s": estimate.time.pipeline_s,
                "optimizer_s": estimate.time.optimizer_s,
                "tokens_per_s": self.tokens_per_step / self.step_s,
                "mfu": self.mfu(self.flops.training),
                "mfu_causal": self.mfu(self.flops.training_causal),
                "convention": CONVENTION,
            }
        return content

    def exchanges(self) -> dict[str, Exchange]:
        """By axis, those that are used, outermost first."""
        if self.training is None or self.training.time is None:
            return {}
        found = self.training.time.exchanges
        return {axis: found[axis] for axis in self.degrees if axis in found and found[axis].bytes}

    def _communication_json(self) -> list[dict[str, object]]:
        return [
            {
                "axis": axis, "degree": self.degrees[axis], "bytes_per_step": round(each.bytes),
                "time_s": each.total_s, "exposed_s": each.exposed_s,
            }
            for axis, each in self.exchanges().items()
        ]  # fmt: skip

    def _pipeline_json(self) -> dict[str, object] | None:
        estimate = self.training
        if self.inference is not None:
            return self.inference.pipeline_json()
        if estimate is None or estimate.degrees.pipeline == 1:
            return None
        time = estimate.time
        return {
            "bubble": time and time.bubble,
            "stages": [
                {
                    "stage": stage, "rank": stage % estimate.degrees.pipeline, "segments": [start, stop],
                    "forward_s": time and time.stages[stage].forward_s,
                    "backward_s": time and time.stages[stage].backward_s,
                }
                for stage, (start, stop) in enumerate(estimate.layout.stages)
            ],
        }  # fmt: skip
