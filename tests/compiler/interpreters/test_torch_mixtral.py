"""Mixtral of `transformers`: the same mixture of experts, written by others. It keeps gate and up in one matrix."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from archwright.compiler.blocks import Rope
from archwright.compiler.passes import lower
from archwright.spec import Spec
from tests.compiler.interpreters.test_torch_transformers import TOLERANCE, widen
from tests.parity.cases import Array, Case, make_case
from tests.parity.strategies import family_tree, load_tree
from tests.parity.targets import torch_module


def mixtral_spec(seed: int, folder: Path) -> Spec:
    """A random Mistral whose feed-forwards are experts; a window in half of them."""
    tree = family_tree("mistral", seed)
    layer = tree["model"]["layer"]
    layer["attention"]["position"].pop("scaling", None)
    if seed % 2:
        del layer["attention"]["mask"]
    experts = 2 + seed % 5
    layer["ffn"] = {"kind": "moe", "experts": experts, "experts_per_token": 1 + seed % min(3, experts)} | {
        "hidden_size": layer["ffn"]["hidden_size"] // 2 * 2, "balance_loss": 0.0, "z_loss": 0.0,
    }  # fmt: skip
    return load_tree(tree, folder / f"mixtral{seed}.yaml")


def renamed(tensors: dict[str, Array]) -> dict[str, torch.Tensor]:
    """gate and up [E, F, D] each → gate_up [E, 2 · F, D]."""
    result = {name: torch.from_numpy(value) for name, value in tensors.items()}
    for name in [name for name in result if name.endswith("experts.gate_proj")]:
        up = name.replace("gate_proj", "up_proj")
        result[name.replace("gate_proj", "gate_up_proj")] = torch.cat([result.pop(name), result.pop(up)], dim=1)
    return result


def reference(spec: Spec, case: Case) -> MixtralForCausalLM:
    model = spec.model
    layer = model.runs[0].layer
    attention, ffn = layer.attention, layer.ffn
    assert ffn.kind == "moe" and attention.position.kind == "rope" and attention.position.scaling is None
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=ffn.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads or attention.heads,
        head_dim=model.head_dim(attention),
        max_position_embeddings=model.max_positions,
        rms_norm_eps=layer.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.position.theta},
        sliding_window=attention.mask.size if attention.mask.kind == "window" else None,
        num_local_experts=ffn.experts,
        num_experts_per_tok=ffn.experts_per_token,
        tie_word_embeddings=model.tied_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    theirs = MixtralForCausalLM(config).double()
    missing, unexpected = theirs.load_state_dict(renamed(case.weights.tensors), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("seed", range(20))
def test_logits_loss_and_gradients_equal_those_of_transformers(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = mixtral_spec(seed, tmp_path)
    program = lower(spec)
    case = make_case(program, seed)
    ours, theirs = torch_module(case, torch.float64), reference(spec, case)
    widen(theirs, next(block.table for _, block in program.blocks() if isinstance(block, Rope)), monkeypatch)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # its router rounds the logits
    ids_BS, targets_BS = torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS)
    logits_BSV = theirs(input_ids=ids_BS).logits
    torch.testing.assert_close(ours(ids_BS), logits_BSV, **TOLERANCE)

    their_loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=-100)
    loss_sum, num_tokens = ours(ids_BS, targets_BS)
    torch.testing.assert_close(loss_sum / num_tokens, their_loss, **TOLERANCE)

    (loss_sum / num_tokens).backward()
    their_loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in ours.named_parameters()}
    expected = dict(theirs.named_parameters())
    for name, gradient in renamed(gradients).items():
        torch.testing.assert_close(gradient, expected[name].grad, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}")
