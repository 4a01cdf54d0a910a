import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from archwright.spec import SpecError, checks, engine_checks, load, mesh_checks, moe_checks, quantize_checks

ATTENTION = "model.layer.attention"


@dataclass(frozen=True)
class Case:
    """Overrides of preset tiny that break one rule, and the fix that its help proposes."""

    code: str
    overrides: dict[str, Any]
    fix: dict[str, Any]


LLAMA3 = {"kind": "llama3"}
MOE = {"kind": "moe", "experts": 6, "hidden_size": 96}
LAYER = {"attention": {"kind": "gqa", "heads": 4}, "ffn": {"kind": "gelu", "hidden_size": 96}}
SECOND_RUN = "model.layers[1].layer.attention"
RULES = "build.quantize.rules"
WIDE = {"model.layer.ffn.hidden_size": 192, "build.parallel.tensor": 2}


def quantize(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"build.quantize": {"rules": list(rules), **more}}


CASES: dict[str, Case] = {
    "kv_heads_divide_heads": Case("SPEC020", {f"{ATTENTION}.kv_heads": 3}, {f"{ATTENTION}.kv_heads": 2}),
    "tensor_splits_heads": Case(
        "SPEC021",
        {f"{ATTENTION}.heads": 2, "parallel.tensor": 4, f"{ATTENTION}.kv_heads": 1},
        {"parallel.tensor": 2},
    ),
    "build_tensor_splits_heads": Case(
        "SPEC021", {f"{ATTENTION}.heads": 2, "build.parallel.tensor": 4}, {"build.parallel.tensor": 2}
    ),
    "tensor_splits_kv_heads": Case(
        "SPEC022",
        {f"{ATTENTION}.heads": 12, f"{ATTENTION}.kv_heads": 3, f"{ATTENTION}.head_dim": 8, "parallel.tensor": 4},
        {"parallel.tensor": 3, "model.layer.ffn.hidden_size": 177},
    ),
    "tensor_splits_ffn": Case(
        "SPEC023", {"model.layer.ffn.hidden_size": 174, "parallel.tensor": 4}, {"model.layer.ffn.hidden_size": 176}
    ),
    "heads_divide_hidden_size": Case(
        "SPEC024", {"model.hidden_size": 66}, {f"{ATTENTION}.heads": 2, f"{ATTENTION}.head_dim": 16}
    ),
    "head_dim_is_even": Case("SPEC025", {f"{ATTENTION}.head_dim": 15}, {f"{ATTENTION}.head_dim": 16}),
    "default_head_dim_is_even": Case("SPEC025", {"model.hidden_size": 60}, {f"{ATTENTION}.head_dim": 16}),
    "stack_lacks_its_layer": Case(
        "SPEC012", {"model.layer": None}, {"model.layers": [{"repeat": 2, "layer": LAYER}, {"layer": LAYER}]}
    ),
    "layers_are_a_stack": Case("SPEC014", {"model.layers": 10_001}, {"model.layers": 2}),
    "stack_has_two_layers": Case("SPEC038", {"model.layers": [{"repeat": 2, "layer": LAYER}]}, {"model.layer": None}),
    "a_run_is_judged_like_the_layer": Case(
        "SPEC020",
        {"model.layer": None, "model.layers": [{"layer": LAYER}, {"layer": LAYER}], f"{SECOND_RUN}.kv_heads": 3},
        {f"{SECOND_RUN}.kv_heads": 2},
    ),
    "one_degree_is_auto": Case("SPEC040", {"parallel.tensor": "auto"}, {"parallel.data_shard": 1}),
    "sequence_needs_tensor": Case("SPEC041", {"parallel.sequence": True}, {"parallel.sequence": False}),
    "symmetric_memory_needs_sequence": Case(
        "SPEC050", {"parallel.symmetric_memory": True}, {"parallel.symmetric_memory": "auto"}
    ),
    "ring_needs_context": Case("SPEC049", {"parallel.ring": True}, {"parallel.ring": False}),
    "ring_attends_causally": Case(
        "SPEC049",
        {
            "parallel.ring": True,
            "parallel.context": 2,
            "model.layer.attention.mask": {"kind": "window", "size": 64},
        },
        {"parallel.ring": False},
    ),
    "tokens_are_spread_evenly": Case(
        "SPEC042",
        {"parallel.context": 2, "parallel.tensor": 4, "parallel.sequence": True, "train.sequence_length": 120},
        {"train.sequence_length": 128},
    ),
    "pipeline_has_layers": Case(
        "SPEC043", {"parallel.pipeline": 4, "train.micro_batches": 4}, {"parallel.pipeline": 2}
    ),
    "build_pipeline_has_layers": Case("SPEC043", {"build.parallel.pipeline": 3}, {"build.parallel.pipeline": 2}),
    "interleaved_pipeline_has_layers": Case(
        "SPEC043",
        {"parallel.pipeline": 2, "parallel.schedule": {"kind": "interleaved"}, "train.micro_batches": 2},
        {"parallel.pipeline": 1},
    ),
    "pipeline_is_filled": Case("SPEC044", {"parallel.pipeline": 2}, {"train.micro_batches": 2}),
    "interleaved_pipeline_is_filled": Case(
        "SPEC044",
        {
            "model.layers": 4,
            "parallel.pipeline": 2,
            "parallel.schedule": {"kind": "interleaved"},
            "train.batch_size": 15,
            "train.micro_batches": 3,
        },
        {"train.batch_size": 16, "train.micro_batches": 4},
    ),
    "batch_fills_data_ranks": Case(
        "SPEC045",
        {"parallel.data_shard": 3, "parallel.data_replicate": 2, "train.micro_batches": 2},
        {"train.batch_size": 12},
    ),
    "experts_per_token_exist": Case(
        "SPEC046", {"model.layer.ffn": {**MOE, "experts_per_token": 7}}, {"model.layer.ffn.experts_per_token": 6}
    ),
    "expert_needs_moe": Case("SPEC047", {"parallel.expert": 2}, {"parallel.expert": 1}),
    "build_expert_needs_moe": Case("SPEC047", {"build.parallel.expert": 2}, {"build.parallel.expert": 1}),
    "build_expert_splits_experts": Case(
        "SPEC048", {"model.layer.ffn": MOE, "build.parallel.expert": 4}, {"build.parallel.expert": 3}
    ),
    "expert_splits_experts": Case(
        "SPEC048", {"model.layer.ffn": MOE, "parallel.expert": 4}, {"model.layer.ffn.experts": 8}
    ),
    "tensor_splits_expert": Case(
        "SPEC023",
        {"model.layer.ffn": {**MOE, "hidden_size": 46}, "parallel.tensor": 4},
        {"model.layer.ffn.hidden_size": 48},
    ),
    "tensor_splits_shared_expert": Case(
        "SPEC023",
        {"model.layer.ffn": {**MOE, "shared": {"hidden_size": 42}}, "build.parallel.tensor": 4},
        {"model.layer.ffn.shared.hidden_size": 44},
    ),
    "sequence_fits_positions": Case("SPEC030", {"train.sequence_length": 513}, {"train.sequence_length": 512}),
    "micro_batches_divide_batch": Case("SPEC031", {"train.micro_batches": 3}, {"train.batch_size": 9}),
    "warmup_fits_steps": Case("SPEC032", {"train.steps": 4}, {"train.schedule.warmup_steps": 1}),
    "tokens_fit_vocabulary": Case("SPEC033", {"tokenizer.vocab_size": 513}, {"tokenizer.vocab_size": 512}),
    "cache_fits_positions": Case("SPEC034", {"build.max_positions": 513}, {"build.max_positions": 512}),
    "ranges_are_ordered": Case(
        "SPEC035",
        {"build.profiles": [{name: {"min": 1, "opt": 4, "max": 2} for name in ("batch", "sequence", "positions")}]},
        {"build.profiles": [{name: {"min": 1, "opt": 2, "max": 4} for name in ("batch", "sequence", "positions")}]},
    ),
    "ranges_fit_limits": Case(
        "SPEC036",
        {"build.profiles": [{name: {"min": 1, "opt": 4, "max": 257} for name in ("batch", "sequence", "positions")}]},
        {"build.profiles": [{name: {"min": 1, "opt": 4, "max": 4} for name in ("batch", "sequence", "positions")}]},
    ),
    "ranges_fit_the_model": Case(
        "SPEC036",
        {
            "build.max_positions": None,
            "build.profiles": [{name: {"min": 1, "opt": 1, "max": 4} for name in ("batch", "sequence", "positions")}],
            "build.profiles[0].positions.max": 513,
        },
        {"build.profiles[0].positions.max": 512},
    ),
    "capabilities_are_served": Case(
        "SPEC055", {"build.engine.compute_capabilities": [8.9, 9.0]}, {"build.engine.compute_capabilities[1]": 8.6}
    ),
    "capabilities_differ": Case(
        "SPEC056", {"build.engine.compute_capabilities": [8.9, 12.0, 8.9]}, {"build.engine.compute_capabilities": [8.9]}
    ),
    "rope_ramp": Case(
        "SPEC037",
        {f"{ATTENTION}.position.scaling": {**LLAMA3, "low_frequency_factor": 4}},
        {f"{ATTENTION}.position.scaling.low_frequency_factor": 1},
    ),
    "rope_factor": Case(
        "SPEC037",
        {f"{ATTENTION}.position.scaling": {**LLAMA3, "factor": 0.5}},
        {f"{ATTENTION}.position.scaling.factor": 1},
    ),
    "rules_match": Case("SPEC060", quantize({"kind": "int8", "match": "*.fc1"}), {f"{RULES}[0].match": "*.up_proj"}),
    "rules_match_the_tied_head": Case(
        "SPEC060", quantize({"kind": "int8", "match": "lm_head"}), {f"{RULES}[0].match": "model.embed_tokens"}
    ),
    "narrow_rules_come_first": Case(
        "SPEC060",
        quantize({"kind": "int8"}, {"kind": "keep", "match": "*.o_proj"}),
        {RULES: [{"kind": "keep", "match": "*.o_proj"}, {"kind": "int8"}]},
    ),
    "groups_divide_columns": Case(
        "SPEC061", {**WIDE, **quantize({"kind": "int4", "group_size": 64})}, {f"{RULES}[0].group_size": 32}
    ),
    "groups_divide_no_columns": Case(
        "SPEC061",
        quantize({"kind": "int4", "group_size": 32, "match": "*.down_proj"}),
        {f"{RULES}[0]": {"kind": "int8", "match": "*.down_proj"}},
    ),
    "awq_has_a_place": Case(
        "SPEC062",
        {"model.layer.ffn": {"kind": "gelu", "hidden_size": 192}}
        | quantize({"kind": "int4", "group_size": 64, "method": "awq"}),
        {
            RULES: [
                {"kind": "int4", "group_size": 64, "match": "*.mlp.fc2"},
                {"kind": "int4", "group_size": 64, "method": "awq"},
            ]
        },
    ),
    "fp8_is_linear": Case(
        "SPEC063",
        quantize({"kind": "fp8", "match": "*"}),
        {RULES: [{"kind": "int8", "match": "model.embed_tokens"}, {"kind": "fp8", "match": "*"}]},
    ),
    "limit_is_measured": Case(
        "SPEC064",
        quantize({"kind": "int8"}, limit={"kl": 0.1}),
        {"build.quantize.calibration": {"path": "tokens.npy"}},
    ),
    "samples_fit_positions": Case(
        "SPEC065",
        quantize({"kind": "int8"}, calibration={"path": "tokens.npy", "sequence_length": 513}),
        {"build.quantize.calibration.sequence_length": 512},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, golden: Callable[[str, str], None]):
    case = CASES[name]
    with pytest.raises(SpecError) as error:
        load("preset:tiny", case.overrides)
    assert {diagnostic.code for diagnostic in error.value.diagnostics} == {case.code}
    assert all(diagnostic.help and diagnostic.label and diagnostic.path for diagnostic in error.value.diagnostics)
    golden(f"{case.code}_{name}.txt", f"{error.value}\n")
    load("preset:tiny", {**case.overrides, **case.fix})


def test_runs_of_layers_are_counted_together():
    runs = [{"repeat": 5_000, "layer": LAYER}, {"repeat": 5_001, "layer": LAYER}]
    with pytest.raises(SpecError, match="SPEC014"):
        load("preset:tiny", {"model.layer": None, "model.layers": runs})


def test_more_workspace_than_a_machine_has_is_refused():
    with pytest.raises(SpecError, match="SPEC014"):
        load("preset:tiny", {"build.engine.workspace_gib": 1e30})


def test_every_rule_has_a_case():
    files = (checks, mesh_checks, moe_checks, engine_checks, quantize_checks)
    written = {code for file in files for code in re.findall(r"SPEC\d{3}", Path(file.__file__).read_text())}
    assert written == {case.code for case in CASES.values()}


def test_the_place_is_the_value_and_the_note_says_where_the_other_is(folder: Path):
    Path("base.yaml").write_text("version: 1\nname: base\nextends: preset:tiny\nparallel: {tensor: 4}\n")
    Path("wide.yaml").write_text(
        "version: 1\nname: wide\nextends: base.yaml\nmodel: {layer: {attention: {kind: gqa, heads: 6, kv_heads: 2}}}\n"
    )
    with pytest.raises(SpecError) as error:
        load("wide.yaml", {"model.hidden_size": 96})
    (diagnostic,) = error.value.diagnostics
    assert (diagnostic.code, diagnostic.where) == ("SPEC021", "wide.yaml:4:47")
    assert diagnostic.notes == ("`parallel.tensor` is 4, set at base.yaml:4:20",)


def test_a_value_by_default_is_shown_at_its_section():
    with pytest.raises(SpecError) as error:
        load("preset:tiny", {"train": {"kind": "sft"}, "model.max_positions": 256})
    (diagnostic,) = error.value.diagnostics
    assert (diagnostic.code, diagnostic.path) == ("SPEC030", "train.sequence_length")
    assert diagnostic.where == "preset:tiny:38:1"


def test_large_sizes_are_judged_quickly():
    with pytest.raises(SpecError, match="SPEC061"):
        load("preset:tiny", {"model.layers": 10**12} | quantize({"kind": "int4"}))
    with pytest.raises(SpecError, match="SPEC024"):
        load("preset:tiny", {"model.hidden_size": 2**62 + 1, f"{ATTENTION}.heads": 10**6, f"{ATTENTION}.kv_heads": 1})
