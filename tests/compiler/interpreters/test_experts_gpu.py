"""Mixtures of experts on a GPU: the grouped product in bfloat16, and a step that the host does not wait for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from archwright.compiler import compile_module
from archwright.compiler.interpreters.grouped_linear import grouped_linear
from archwright.spec import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
MOE = {"kind": "moe", "experts": 8, "experts_per_token": 2, "hidden_size": 256, "shared": {"hidden_size": 128}}


@pytest.mark.parametrize("counts", [[3, 0, 17, 1, 0, 40, 5, 8], [0] * 7 + [64], [64] + [0] * 7, [8] * 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 512), (520, 264), (36, 20)])
def test_groups_of_rows_in_bfloat16(counts: list[int], inputs: int, outputs: int) -> None:
    """Groups that are empty or of odd size, and rows (of 36) that the grouped kernel cannot read."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((sum(counts), inputs), (8, outputs, inputs), (sum(counts), outputs))
    x_NI, weight_EOI, grad_NO = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes)
    ends_E = torch.tensor(counts, device="cuda").cumsum(0)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = (value.to(dtype, copy=True).requires_grad_() for value in (x_NI, weight_EOI))
        y_NO = grouped_linear(x, weight, ends_E)
        y_NO.backward(grad_NO.to(dtype))
        results.append([value.double() for value in (y_NO.detach(), x.grad, weight.grad)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < 6e-3 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile of 2.11 looks at it in what a layer is given
@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_does_not_wait_for_counts(compiled: bool) -> None:
    module = compile_module(load("preset:tiny", {"model.layer.ffn": MOE}), "cuda", dtype="bfloat16")
    if compiled:
        module.compile_layers()
    ids_BS = torch.randint(0, 512, (4, 64), device="cuda")
    module(ids_BS, ids_BS)[0].backward()
    torch.cuda.synchronize()
    layers, passed = module.layers(), list[torch.nn.Module]()

    def watched(layer: torch.nn.Module) -> Callable[..., Any]:  # not by hooks, which are compiled with their layer
        def call(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                passed.append(layer)
                return layer(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    module._segments[1:-1] = map(watched, layers)  # pyright: ignore[reportArgumentType, reportCallIssue]
    loss_sum, _ = module(ids_BS, ids_BS)
    assert passed == layers and torch.isfinite(loss_sum)


def test_bfloat16_loss_is_near_float64s() -> None:
    spec = load("preset:tiny", {"model.layer.ffn": MOE})
    ids_BS = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    losses = []
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float64")):
        module = compile_module(spec, device, dtype=dtype)
        loss_sum, num_tokens = module(ids_BS.to(device), ids_BS.to(device))
        losses.append(loss_sum.item() / num_tokens.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
