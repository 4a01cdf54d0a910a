"""What quantization costs, on tokens that calibration never saw, and how much of it a spec allows. Without PyTorch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from archwright.spec import ArchwrightError
from archwright.spec.models import QualityLimit


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """One segment. bits: a weight of its matrices on average, scales included, None where nothing is quantized.

    own_error: of its output for the unquantized model's input, relative: ‖q(h) - f(h)‖ / ‖f(h)‖. error: of what comes
    out of it in the quantized model, with all that the layers before lost.
    """

    path: str
    bits: float | None
    own_error: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """kl: mean over tokens of Σ p log(p / q) in nats, p the unquantized model's. agreement: share of the tokens for
    which both think the same token likeliest.
    """

    tokens: int
    perplexity_before: float
    perplexity: float
    kl: float
    agreement: float
    layers: tuple[LayerQuality, ...]

    @property
    def ratio(self) -> float:
        return self.perplexity / self.perplexity_before

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity_ratio": self.ratio}

    def as_text(self) -> str:
        """The whole model, then a line a layer."""
        width = max(len(layer.path) for layer in self.layers)
        lines = [
            f"quality on {self.tokens:,} tokens: perplexity {self.perplexity:.4f}, unquantized "
            f"{self.perplexity_before:.4f} (x {self.ratio:.4f})",
            f"KL divergence {self.kl:.5f} nats; same likeliest token {self.agreement:.2%}",
            f"{'layer':<{width}}  {'bits':>5}  {'own error':>9}  {'error':>9}",
        ]
        for layer in self.layers:
            bits = "" if layer.bits is None else f"{layer.bits:.2f}"
            lines.append(f"{layer.path:<{width}}  {bits:>5}  {layer.own_error:>9.2e}  {layer.error:>9.2e}")
        return "\n".join(lines)


def check_quality(quality: Quality, limit: QualityLimit | None) -> None:
    """Raises ArchwrightError BUILD063 where more is lost than the spec allows."""
    if limit is None:
        return
    problems = list(_beyond(quality, limit))
    if problems:
        worst = max(quality.layers, key=lambda layer: layer.own_error)
        raise ArchwrightError(
            "BUILD063",
            f"{' and '.join(problems)}\n{quality.as_text()}",
            where="build.quantize.limit",
            help=f"keep `{worst.path}` first, which loses most; or use smaller groups, method: awq, or another limit",
        )


def _beyond(quality: Quality, limit: QualityLimit) -> Iterator[str]:
    # Written so that NaN, of a model that the quantization broke altogether, is beyond every limit.
    if limit.perplexity is not None and not quality.ratio <= limit.perplexity:
        yield f"the perplexity grows by the factor {quality.ratio:.4f}, allowed is {limit.perplexity:g}"
    if limit.kl is not None and not quality.kl <= limit.kl:
        yield f"the KL divergence is {quality.kl:.5f} nats, allowed is {limit.kl:g}"
