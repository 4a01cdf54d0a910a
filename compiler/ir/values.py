"""Values that blocks hold and interpreters lower: masks and rotary tables."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Causal:
    """A token at position p sees the positions ≤ p."""

    @property
    def key(self) -> str:
        """A name for this mask, equal for equal masks."""
        return "causal"


@dataclass(frozen=True)
class Window:
    """A token at position p sees the positions p - size < q ≤ p: itself and the size - 1 before it."""

    size: int

    @property
    def key(self) -> str:
        """A name for this mask, equal for equal masks."""
        return f"window_{self.size}"


Mask = Causal | Window


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How router logits become the weights of a token's experts.

    score: softmax over all experts, or each one's sigmoid. normalize: the weights of the chosen ones sum to `scale`.
    """

    experts_per_token: int
    score: str
    normalize: bool
    scale: float


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Factors of what a router adds to the loss: of an uneven use of the experts, and of large logits."""

    balance: float
    z: float


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """The angles of rotary position embedding: angle[p, i] = p · frequency[i], i < head_dim / 2.

    Frequencies are theta^(-2i / head_dim) (Su et al. 2021). With `factor` they are scaled as Llama 3.1 does:
    wavelengths over original_positions / low are divided by `factor`, those under original_positions / high are
    kept, and between the two the divisor moves linearly in the number of turns.

    key: a name for this table, equal for equal tables and for no others (17 digits tell any two floats apart). It is
    formed once: torch.compile cannot format the numbers of tables that differ between layers.
    """

    head_dim: int
    theta: float
    max_positions: int
    factor: float | None = None
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = f"rope_{self.head_dim}_{self.theta:.17g}_{self.max_positions}"
        if self.factor is not None:
            name += f"_{self.factor:.17g}_{self.low:.17g}_{self.high:.17g}_{self.original_positions}"
        object.__setattr__(self, "key", name)

    def frequencies(self) -> tuple[float, ...]:
        """head_dim / 2 angles per position, radians, fastest first."""
        plain = [self.theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        return tuple(plain if self.factor is None else [self._scaled(f, self.factor) for f in plain])

    def _scaled(self, frequency: float, factor: float) -> float:
        turns = self.original_positions * frequency / (2 * math.pi)
        if turns > self.high:
            return frequency
        if turns < self.low:
            return frequency / factor
        smooth = (turns - self.low) / (self.high - self.low)
        return (1 - smooth) * frequency / factor + smooth * frequency
