"""Mixtures of experts: what their operations compute, cost and refuse. B batch, S sequence, E experts."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from archwright.compiler.blocks import MoeDecoderLayer
from archwright.compiler.distributed.apply import Options, apply_plan
from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.interpreters.grouped_linear import grouped_linear
from archwright.compiler.interpreters.numpy_ops import NumpyOps, run_numpy
from archwright.compiler.interpreters.sorting import permute, repeat_sorted, sort_by_expert
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Penalties, Plan, Program, Routing, Segment, Step
from archwright.compiler.ir.verifier import verify_plan
from archwright.compiler.passes import INFERENCE_TABLE, TRAINING_TABLE, lower, run_passes
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import ArchwrightError, Spec, load
from archwright.trainers.optimizer import make_optimizer
from tests.parity.cases import make_case
from tests.parity.comparisons import gradient_error, gradients_of
from tests.parity.targets import torch_module

MOE = {"kind": "moe", "experts": 6, "experts_per_token": 2, "hidden_size": 24, "balance_loss": 0.5, "z_loss": 0.25}
ATTENTION = {"kind": "gqa", "heads": 4, "kv_heads": 2}
ROUTING = Routing(experts_per_token=2, score="softmax", normalize=True, scale=1.0)
SPREAD = {**INFERENCE_TABLE, "tokens": "expert"}


def make_spec(*ffns: dict[str, object]) -> Spec:
    layers = [{"layer": {"attention": ATTENTION, "ffn": ffn}} for ffn in ffns or (MOE, MOE)]
    return load("preset:tiny", {"model.layer": None, "model.layers": layers})


@pytest.mark.parametrize("make", [lambda: NumpyOps({}), lambda: TorchOps(dtype=torch.float64)])
def test_the_penalty_by_hand(make: Any) -> None:
    """Even use of the experts costs `balance`, use of one costs E times its share; each sequence for itself."""
    logits_BSE = np.log(np.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], [[0.8, 0.1, 0.1]] * 3]))
    indices_BS1 = logits_BSE.argmax(axis=-1)[..., None]
    ops = make()
    values = (logits_BSE, indices_BS1)
    if isinstance(ops, TorchOps):
        values = (torch.from_numpy(logits_BSE), torch.from_numpy(indices_BS1))
    found_B = ops.router_penalty(*values, ROUTING, Penalties(balance=1, z=1), spread=None)
    np.testing.assert_allclose(np.asarray(found_B), [1.0, 3 * 0.8], rtol=1e-15)  # logsumexp is 0
    shifted_B = ops.router_penalty(values[0] + 2, values[1], ROUTING, Penalties(balance=0, z=1), spread=None)
    np.testing.assert_allclose(np.asarray(shifted_B), [4.0, 4.0], rtol=1e-14)
    weighed = ops.sum_over_targets(found_B, values[1][..., 0] * 0 - 100)
    assert float(weighed) == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_by_hand(score: str, normalize: bool) -> None:
    logits_BSE = np.array([[[3.0, -1.0, 2.0, 0.0]]])
    routing = Routing(experts_per_token=2, score=score, normalize=normalize, scale=2.5)
    ops = NumpyOps({})
    indices_BSX = ops.top_k(logits_BSE, 2)
    assert indices_BSX.tolist() == [[[0, 2]]]
    scores_E = 1 / (1 + np.exp(-logits_BSE[0, 0])) if score == "sigmoid" else np.exp(logits_BSE[0, 0])
    chosen = scores_E[[0, 2]] / (1 if score == "sigmoid" else scores_E.sum())
    expected = 2.5 * chosen / (chosen.sum() if normalize else 1)
    np.testing.assert_allclose(ops.routing_weights(logits_BSE, indices_BSX, routing)[0, 0], expected, rtol=1e-15)
    narrow = TorchOps(dtype=torch.bfloat16).routing_weights(
        torch.from_numpy(logits_BSE).bfloat16(), torch.from_numpy(indices_BSX), routing
    )
    np.testing.assert_allclose(narrow[0, 0].double().numpy(), expected, rtol=2**-8)  # one rounding


def test_groups_of_rows_and_their_gradients() -> None:
    """Empty groups among them, of which the gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_EOI = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ends_E = torch.tensor([0, 4, 4, 7])
    expected = torch.cat([x_NI[:4] @ weight_EOI[1].T, x_NI[4:] @ weight_EOI[3].T])
    torch.testing.assert_close(grouped_linear(x_NI, weight_EOI, ends_E), expected)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends_E), (x_NI, weight_EOI))
    torch.library.opcheck(torch.ops.archwright.grouped_linear, (x_NI, weight_EOI, ends_E))


def test_rows_are_sorted_and_come_back() -> None:
    expert_N = torch.tensor([2, 0, 3, 3, 0, 2])  # of three tokens, two each
    by_expert = sort_by_expert(expert_N, 5)
    assert by_expert.order_N.tolist() == [1, 4, 0, 5, 2, 3] and by_expert.ends_E.tolist() == [2, 2, 4, 6, 6]
    x_TD = torch.arange(6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    sorted_ND = repeat_sorted(x_TD, by_expert, 2)
    assert sorted_ND.tolist() == [x_TD[n // 2].tolist() for n in by_expert.order_N.tolist()]
    back_ND = permute(sorted_ND, by_expert.inverse_N, by_expert.order_N)
    torch.testing.assert_close(back_ND, x_TD.repeat_interleave(2, dim=0))
    assert torch.autograd.gradcheck(lambda x: repeat_sorted(x, by_expert, 2), x_TD)
    rows_ND = sorted_ND.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, by_expert.inverse_N, by_expert.order_N), rows_ND)


def test_evaluation_has_no_penalties() -> None:
    case = make_case(lower(make_spec()), 0)
    module = torch_module(case, torch.float64)
    ids_BS, targets_BS = torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS)
    trained, (evaluated, num_tokens) = module(ids_BS, targets_BS)[0], module.eval()(ids_BS, targets_BS)
    positions_BS = np.broadcast_to(np.arange(ids_BS.shape[1]), ids_BS.shape)
    step = Step(positions_BS=positions_BS, targets_BS=case.targets_BS)
    tensors = case.weights.tensors
    with_penalty, _ = run_numpy(case.program, tensors, case.ids_BS, step=step)
    without, _ = run_numpy(case.program, tensors, case.ids_BS, step=replace(step, penalized=False))
    np.testing.assert_allclose([trained.item(), evaluated.item()], [with_penalty, without], rtol=1e-13)
    assert with_penalty - without > 0.5 * num_tokens, "two layers whose balance is 0.5 at least, in sum 1 a target"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_recomputed_and_compiled_layers_give_the_same() -> None:
    """Equal layers are one graph, the first router's too; what is recomputed adds no second penalty."""
    case = make_case(lower(make_spec(MOE, MOE, MOE)), 0)
    ids_BS, targets_BS = torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS)
    plain, recomputed, compiled = (torch_module(case, torch.float64) for _ in range(3))
    for layer in recomputed.layers():
        run_once = layer.forward
        layer.forward = lambda *args, run=run_once: checkpoint(run, *args, use_reentrant=False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=counter)
    losses, gradients = [], []
    for module in (plain, recomputed, compiled):
        loss_sum, _ = module(ids_BS, targets_BS)
        loss_sum.backward()
        losses.append(loss_sum.item())
        gradients.append(gradients_of(module))
    assert counter.frame_count == 2, "the layers and the final norm"
    assert losses[1] == losses[0] and losses[2] == pytest.approx(losses[0], rel=1e-14)
    assert gradient_error(gradients[1], gradients[0]) == 0 and gradient_error(gradients[2], gradients[0]) < 1e-13


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_pipeline_stage_gives_the_penalty_on(cut: int) -> None:
    """Dense, experts, dense, experts: however the segments are cut, the loss is that of the whole."""
    dense: dict[str, object] = {"kind": "gelu", "hidden_size": 32}
    case = make_case(lower(make_spec(dense, MOE, dense, MOE)), 0)
    module = torch_module(case, torch.float64)
    ids_BS, targets_BS = torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS)
    expected, _ = module(ids_BS, targets_BS)
    steps: list[Any] = []
    module.layers()[0].register_forward_pre_hook(lambda _, args: steps.append(args[1]))
    module(ids_BS, targets_BS)
    modules = dict(zip([s.path for s in case.program.segments], module._segments, strict=True))

    def bind(segment: Segment) -> Any:
        return modules[segment.path]

    first, second = (replace(case.program, segments=part) for part in np.split(case.program.segments, [cut + 1]))
    handed = Program.run(first, bind, ids_BS, steps[0])
    assert isinstance(handed, tuple) == (cut >= 2), "from the first router on"
    given = handed if isinstance(handed, tuple) else (handed,)
    loss_sum, _ = second.run(bind, given[0], steps[0], *given[1:])
    torch.testing.assert_close(loss_sum, expected, rtol=1e-14, atol=0)


def test_only_the_chosen_experts_cost() -> None:
    """3 matrices of hidden x inner for each of 2 experts of a token, and the router."""
    few, many = (make_spec({**MOE, "experts": experts}) for experts in (6, 12))
    costs = [run_cost(lower(spec), batch=2, sequence=5) for spec in (few, many)]
    experts = [sum(cost.flops for cost in each.costs if cost.op == "experts") for each in costs]
    assert experts == [2 * 5 * 2 * 3 * 2 * 64 * 24] * 2
    assert costs[1].flops - costs[0].flops == 2 * 5 * 2 * 64 * 6, "twelve logits instead of six"


def test_collectives_of_experts() -> None:
    spec = make_spec(MOE)
    for degrees, table, expected in (
        (Degrees(expert=2), SPREAD, {("all_to_all", "expert"): 4}),
        (Degrees(tensor=2), INFERENCE_TABLE, {("all_reduce", "tensor"): 5}),  # twice forward; x (2), weights backward
        (
            Degrees(expert=2, tensor=2, sequence=True),
            TRAINING_TABLE,
            {
                ("all_to_all", "expert"): 4,
                ("reduce_scatter", "tensor"): 7,  # forward: table, attention, experts; backward: of what entered
                ("all_gather", "tensor"): 8,  # forward: attention, experts (3), head; backward: of what was scattered
                ("all_reduce", "tensor"): 2,  # the penalty and the loss
            },
        ),
    ):
        plan = run_passes(spec, degrees, table)
        cost = run_cost(plan.program, batch=2, sequence=6, targets=True)
        found = Counter((each.kind, each.mesh_axis) for each in cost.collectives)
        assert found == expected


def test_a_rank_holds_its_experts_and_the_whole_router() -> None:
    plan = run_passes(make_spec(MOE), Degrees(expert=3, tensor=2), SPREAD)
    local = plan.local.params()
    assert local["model.layers.0.mlp.experts.gate_proj"].shape == (2, 12, 64)
    assert local["model.layers.0.mlp.experts.down_proj"].shape == (2, 64, 12)
    assert local["model.layers.0.mlp.gate.weight"].shape == (6, 64)


def broken(plan: Plan, **changes: Any) -> Plan:
    """The plan with the experts of its only layer changed."""

    def change(program: Program) -> Program:
        layer = program.segments[1].block
        assert isinstance(layer, MoeDecoderLayer)
        mlp = layer.mlp
        experts = {key: value for key, value in changes.items() if hasattr(mlp.experts, key)}
        rest = {key: value for key, value in changes.items() if key not in experts}
        mlp = replace(mlp, experts=replace(mlp.experts, **experts), **rest)
        segments = (program.segments[0], replace(program.segments[1], block=replace(layer, mlp=mlp)))
        return replace(program, segments=(*segments, *program.segments[2:]))

    return replace(plan, program=change(plan.program), local=change(plan.local))


@pytest.mark.parametrize(
    "changes", [{"reduce": None}, {"enter": None}, {"dispatch": None}, {"dispatch": "tensor"}, {"spread": None}]
)
def test_the_verifier_finds_what_is_missing(changes: dict[str, Any]) -> None:
    plan = run_passes(make_spec(MOE), Degrees(expert=2, tensor=2, sequence=True), TRAINING_TABLE)
    with pytest.raises(ArchwrightError, match="IR009"):
        verify_plan(broken(plan, **changes))


def test_more_choices_than_experts_are_refused() -> None:
    plan = run_passes(make_spec(MOE), Degrees())
    with pytest.raises(ArchwrightError, match="IR008"):
        verify_plan(broken(plan, routing=replace(ROUTING, experts_per_token=7)))


def test_muon_leaves_stacks_to_adamw() -> None:
    plan = run_passes(make_spec(MOE), Degrees(), TRAINING_TABLE)
    train = load("preset:tiny", {"train.optimizer": {"kind": "muon"}}).train
    assert train is not None
    options = Options(dtype=torch.float64, compute_dtype=torch.float64, device=torch.device("cpu"))
    params = plan.program.params()
    model = apply_plan(plan, GeneratedWeights(params=params, seed=0), None, options)
    optimizers = make_optimizer(model, train.optimizer)
    kept = {name: optimizers.state_names(param) for name, param in params.items()}
    assert all(kept[f"model.layers.0.mlp.experts.{name}_proj"] != ("momentum",) for name in ("gate", "up", "down"))
    assert kept["model.layers.0.self_attn.q_proj.weight"] == ("momentum",)


def test_the_penalty_moves_routers_towards_even_use() -> None:
    """Gradient steps on the penalty alone lower it."""
    generator = torch.Generator().manual_seed(1)
    logits_BSE = 3 * torch.randn(2, 40, 6, generator=generator, dtype=torch.float64) + torch.arange(6)
    ops, found = TorchOps(dtype=torch.float64), []
    for _ in range(50):
        logits_BSE = logits_BSE.detach().requires_grad_()
        indices_BSX = ops.top_k(logits_BSE, 2)
        penalty = ops.router_penalty(logits_BSE, indices_BSX, ROUTING, Penalties(balance=1, z=0), spread=None).sum()
        penalty.backward()
        found.append(penalty.item())
        logits_BSE = logits_BSE - 20 * logits_BSE.grad
    assert found[0] > 2.5 and found[-1] < 2.1, "1 a sequence is even"
