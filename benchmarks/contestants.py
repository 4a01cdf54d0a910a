"""The two that `bench_training.py` times, each a thing with `step()`; and the synthetic tokens that both learn from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

import handwritten
import numpy as np
import torch
from numpy.typing import NDArray

from archwright.compiler.ir import Degrees
from archwright.compiler.module import DTYPES
from archwright.spec import Spec
from archwright.spec.models import AdamW, Pretrain
from archwright.trainers.batches import Share, Windows, training_batch
from archwright.trainers.checkpoints import Progress
from archwright.trainers.dataset import Split
from archwright.trainers.loop import Launched, assemble_trainer, freeze_garbage, launch_step
from archwright.trainers.optimizer import schedule_factor
from archwright.trainers.run_folder import Start, master_precision

NUM_TOKENS = 1 << 21


@dataclass(frozen=True)
class SyntheticSplit:
    """Stands for a split of built data: token ids from memory, rare ones rare (P(id) falls as 1 / (id + 1))."""

    ids: NDArray[np.uint32]
    masked: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def tokens(self, start: int, stop: int) -> NDArray[np.uint32]:
        return self.ids[start:stop]


def synthetic_samples(vocab_size: int, sequence_length: int, seed: int) -> Windows:
    """Windows as pretraining cuts them; the same in every process."""
    uniform = np.random.default_rng(seed).random(max(NUM_TOKENS, 4 * sequence_length))
    ids = np.minimum(np.power(float(vocab_size + 1), uniform) - 1, vocab_size - 1).astype(np.uint32)
    return Windows(cast(Split, SyntheticSplit(ids)), sequence_length, seed)


def train_of(spec: Spec) -> Pretrain:
    assert isinstance(spec.train, Pretrain), "the harness pretrains"
    return spec.train


@dataclass(kw_only=True)
class Archwright:
    """The compiled spec, built and stepped as `archwright train` does."""

    spec: Spec
    samples: Windows
    device: torch.device
    degrees: Degrees = field(default_factory=Degrees)
    losses: list[float] = field(default_factory=list)
    name = "archwright"

    def __post_init__(self) -> None:
        start = Start(checkpoint=None, progress=Progress(step=0, tokens=0, data_digest=""))
        self.trainer = assemble_trainer(self.spec, train_of(self.spec), self.samples, start, self.degrees, self.device)
        self.waiting: Launched | None = None

    def step(self) -> None:
        """As in `run_steps`: a step is read when the next one is under way."""
        index = len(self.losses) + (self.waiting is not None)
        launched = launch_step(self.trainer, index)
        if index == 1:
            freeze_garbage()
        self._read()
        self.waiting = launched

    def _read(self) -> None:
        if self.waiting is not None:
            self.losses.append(self.waiting.read(0)["loss"])
        self.waiting = None

    def read_losses(self) -> list[float]:
        self._read()
        return self.losses

    def kept_bytes(self) -> int:
        """Of parameters and states, between two steps on one device."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        states = [
            optimizer.state(name, state)
            for name in model.parameters
            for state in optimizer.state_names(model.layouts[name].param)
        ]
        return num_bytes(*model.parameters.values(), *states)


@dataclass(kw_only=True)
class Handwritten:
    """The hand-written model. It reads its losses at the end only, so that a step never waits for the device."""

    spec: Spec
    samples: Windows
    device: torch.device
    chunk_tokens: int = 4096
    fused: bool = False
    losses: list[torch.Tensor] = field(default_factory=list)
    name = "handwritten"

    def __post_init__(self) -> None:
        train = self.train = train_of(self.spec)
        assert isinstance(train.optimizer, AdamW) and train.clip_norm == 1.0, "AdamW and clipping at 1.0 only"
        config = dataclasses.replace(config_of(self.spec), chunk_tokens=self.chunk_tokens, fused=self.fused)
        with torch.device("meta"):
            self.model = handwritten.Llama(config, DTYPES[train.precision])
        self.model.to(DTYPES[master_precision(train.precision)]).to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(train.seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1)
        if train.compile is True or (train.compile == "auto" and self.device.type == "cuda"):
            self.model.compile_layers()
        options = train.optimizer
        self.optimizer = handwritten.make_optimizer(
            self.model, options.learning_rate, options.betas, options.eps, options.weight_decay
        )

    def start_as(self, other: Archwright) -> None:
        """Begin with the parameters of `other`, so that the losses can be compared."""
        self.model.load_state_dict(other.trainer.model.module.state_dict())

    def step(self) -> None:
        train, index = self.train, len(self.losses)
        batch = training_batch(self.samples, train.seed, index, train.batch_size, Share())
        rate = schedule_factor(index, schedule=train.schedule, steps=train.steps) * train.optimizer.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids_BS, targets_BS = self._send(batch.ids_BS), self._send(batch.targets_BS)
        loss = handwritten.train_step(self.model, self.optimizer, ids_BS, targets_BS, train.micro_batches)
        self.losses.append(loss)

    def _send(self, values: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def read_losses(self) -> list[float]:
        return [loss.item() for loss in self.losses]

    def kept_bytes(self) -> int:
        """Of parameters and states, between two steps."""
        states = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return num_bytes(*self.model.parameters(), *states)


def num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


Contestant = Archwright | Handwritten


def config_of(spec: Spec) -> handwritten.Config:
    """The hand-written model of a spec; an assertion fails where it is no Llama."""
    model = spec.model
    (run,) = model.runs
    layer = run.layer
    attention, position, norm = layer.attention, layer.attention.position, layer.norm
    assert model.tied_embeddings and model.positions is None and layer.ffn.kind == "swiglu" and not layer.ffn.bias
    assert attention.bias == "none" and attention.mask.kind == "causal"
    assert position.kind == "rope" and norm.kind == "rmsnorm", "the hand-written model is a Llama"
    scaling: dict[str, Any] = {"rope_factor": None}
    if position.scaling is not None:
        scaling = {
            "rope_factor": position.scaling.factor,
            "rope_low": position.scaling.low_frequency_factor,
            "rope_high": position.scaling.high_frequency_factor,
            "rope_original": position.scaling.original_max_positions,
        }
    return handwritten.Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=attention.heads,
        num_kv_heads=attention.kv_heads or attention.heads,
        head_dim=model.head_dim(attention),
        ffn_size=layer.ffn.hidden_size,
        eps=norm.eps,
        theta=position.theta,
        **scaling,
    )
