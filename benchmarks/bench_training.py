"""How fast a compiled spec trains: against the hand-written model on one device, or alone in a world of any size.

    python benchmarks/bench_training.py                                   # pair: blocks of steps A B A B ... in one run
    torchrun --nproc-per-node 2 benchmarks/bench_training.py --batch 4 --set parallel.tensor=2

`--batch` counts the sequences of one micro-batch on one data rank: an optimizer step takes batch x micro-batches x data
degree of them, and every GPU is charged its share, whatever the mesh. The model is built and stepped by the code of
`archwright train`; only the tokens are synthetic. The last line on stdout is the result as JSON (rank 0), which also
goes to a file; what `archwright plan` predicts stands in it beside what was measured. FLOPs a token are the plan's:

    6 · (parameters that multiply, head included, embedding table excluded) + 12 · layers · heads · head_dim · sequence

(`full`; `causal` has 6 in place of 12). MFU = tokens/s per GPU · FLOPs a token / published dense peak; recomputation
does not count.
"""

import argparse
import faulthandler
import json
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from contestants import Archwright, Contestant, Handwritten, synthetic_samples, train_of
from measuring import Timing, environment, gather_from_ranks, profile, summary, time_in_turns, time_steps

from archwright.compiler import plan
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import degrees_of
from archwright.compiler.planning.machines import GPUS
from archwright.compiler.planning.memory import total_bytes
from archwright.compiler.planning.report import PlanReport
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.cli import add_set
from archwright.trainers.launch import World, check_world, join, leave, world_of
from archwright.trainers.training import device_of

RESULTS = Path(__file__).resolve().parent / "results"
WARMUP_LABEL = "the steps before the timed ones, compilation among them"


def make_parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--mode", choices=("pair", "archwright", "handwritten"), help="default: pair in one process, else archwright")
    add("--preset", help="default: llama3.2-1b on a GPU, tiny on a CPU")
    add("--batch", type=int, default=2, help="sequences of a micro-batch on a data rank")
    add("--micro-batches", type=int, default=1)
    add("--sequence", type=int, help="default: 4096 on a GPU, 128 on a CPU")
    add("--precision", choices=("bfloat16", "float32", "float64"), default="bfloat16")
    add("--warmup", type=int, default=5, help=WARMUP_LABEL)
    add("--steps", type=int, default=5, help="timed steps; of one block in a pair")
    add("--blocks", type=int, default=6, help="blocks of each in a pair")
    add("--sdpa", choices=("default", "flash", "cudnn"), default="default", help="of all contestants")
    add("--chunk-tokens", type=int, default=4096, help="tokens of a chunk of the hand-written loss")
    add("--fused", action="store_true", help="the hand-written model joins q, k, v and gate, up")
    add("--machine", choices=tuple(GPUS), help="for the plan and the peak; default: the GPU found, else H100")
    add(
        "--inductor",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of torch._inductor.config, its value as JSON; may be repeated",
    )
    add("--profile", action="store_true", help="add the kernels of one more step to the result")
    add("--output", type=Path, default=RESULTS, help="folder of the result")
    add("--label", help="in the name of the result's file")
    add("--dump-stacks-after", type=float, metavar="S", help="print where every thread stands, should it hang")
    add_set(result)
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure; rank 0 prints and returns the record."""
    chosen = make_parser().parse_args(arguments)
    if chosen.dump_stacks_after:
        faulthandler.dump_traceback_later(chosen.dump_stacks_after)
    world = world_of(os.environ) or World()
    chosen.mode = chosen.mode or ("pair" if world.size == 1 else "archwright")
    device = device_of(world)
    prefer(chosen.sdpa)
    set_inductor(chosen.inductor)
    join(world, device.type)
    try:
        record = measure(chosen, world, device)
    finally:
        leave(world)
        faulthandler.cancel_dump_traceback_later()
    if not world.main:
        return None
    record["command"] = command(sys.argv[1:] if arguments is None else arguments)
    write(record, chosen)
    print(json.dumps(record))
    return record


def measure(chosen: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    spec, report = planned(chosen, world, device)
    contestants = make_contestants(chosen, spec, degrees_of(spec.parallel, world.size), device)
    timings = run(chosen, world, device, contestants)
    per_token = report.flops
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "mode": chosen.mode,
        "spec": spec.name,
        "parallel": spec.parallel.model_dump(mode="json"),
        "world": world.size,
        "batch": {
            "sequences": train_of(spec).batch_size,
            "per_micro_batch_and_data_rank": chosen.batch,
            "micro_batches": chosen.micro_batches,
            "sequence_length": train_of(spec).sequence_length,
        },
        "precision": chosen.precision,
        "sdpa": chosen.sdpa,
        "inductor": chosen.inductor,
        "environment": environment(device),
        "flops_per_token": {"full": per_token.training, "causal": per_token.training_causal},
    }
    for contestant, timing in zip(contestants, timings, strict=True):
        if "peak_added_bytes" in timing.memory:
            timing.memory["peak_allocated_bytes"] = timing.memory["peak_added_bytes"] + contestant.kept_bytes()
        record[contestant.name] = measured(chosen, spec, report, world, timing) | {"losses": contestant.read_losses()}
    if chosen.mode == "pair":
        record["pair"] = compared(record, timings)
        record["handwritten"] |= {"fused": chosen.fused, "chunk_tokens": chosen.chunk_tokens}
    if chosen.profile:
        for contestant in contestants:
            try:
                record[contestant.name]["profile"] = profile(contestant.step, device)
            except RuntimeError as error:  # the profiler needs counters that not every machine gives
                record[contestant.name]["profile"] = {"error": str(error)}
    if chosen.mode == "archwright":
        record["run"] = as_run(chosen, spec, report, world, timings[0])
    record["plan"] = report.to_json() | {"memory_of_a_rank_bytes": max(map(total_bytes, report.memory))}
    return record


def as_run(chosen: argparse.Namespace, spec: Spec, report: PlanReport, world: World, timing: Timing) -> dict[str, Any]:
    """The line that `fit_plan.py` reads: what was run, the slowest rank's step and the fullest rank's memory."""
    assert report.cluster is not None
    ranks = timing.ranks or [timing.own]
    memory = {
        name: max(rank[found] for rank in ranks)
        for name, found in (("peak_allocated_bytes", "peak_allocated_bytes"), ("peak_device_bytes", "device_bytes"))
        if found in ranks[0]
    }
    return {
        "name": chosen.label or spec.name,
        "spec": f"preset:{chosen.preset or spec.name}",
        "set": {name: getattr(spec, name).model_dump(mode="json") for name in ("model", "train", "parallel")},
        "gpus": f"{world.size}x{report.cluster.name}",
        "step_s": max(rank["median_step_s"] for rank in ranks),
        **memory,
    }


def planned(chosen: argparse.Namespace, world: World, device: torch.device) -> tuple[Spec, PlanReport]:
    """The spec to train and its plan; the batch is multiplied by the data degree that the plan finds."""
    found = torch.cuda.get_device_name() if device.type == "cuda" else ""
    machine = chosen.machine or next((name for name in GPUS if name in found), "H100")
    gpus = f"{world.size}x{machine}"
    # A data rank's batch is given; the whole one depends on the degrees, which any batch for `world.size` tells.
    degrees = check_world(world, make_spec(chosen, device, world.size))
    spec = make_spec(chosen, device, degrees.data)
    return spec, plan(spec, gpus=gpus)


def make_spec(chosen: argparse.Namespace, device: torch.device, data_degree: int) -> Spec:
    on_gpu = device.type == "cuda"
    train = {
        "kind": "pretrain",
        "steps": 1000,
        "batch_size": chosen.batch * chosen.micro_batches * data_degree,
        "micro_batches": chosen.micro_batches,
        "sequence_length": chosen.sequence or (4096 if on_gpu else 128),
        "precision": chosen.precision,
    }
    preset = chosen.preset or ("llama3.2-1b" if on_gpu else "tiny")
    try:
        return load(f"preset:{preset}", {"train": train, **chosen.overrides})
    except ArchwrightError as error:
        raise SystemExit(f"bench_training: {error}") from None


def prefer(backend: str) -> None:
    """Leave one attention: where it cannot run there is an error, not another one in its place."""
    if backend != "default":
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(backend == "flash")
        torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")


def set_inductor(settings: Sequence[str]) -> None:
    """Settings that torch.compile reads, for all that is compiled in this process."""
    import torch._inductor.config

    for setting in settings:
        key, _, value = setting.partition("=")
        *path, name = key.split(".")
        target: Any = torch._inductor.config
        try:
            for each in path:
                target = getattr(target, each)
            getattr(target, name)  # an unknown one would be taken without a word in some versions
            setattr(target, name, json.loads(value))
        except (AttributeError, ValueError) as error:
            raise SystemExit(f"bench_training: --inductor {setting}: {error}") from None


def make_contestants(
    chosen: argparse.Namespace, spec: Spec, degrees: Degrees, device: torch.device
) -> list[Contestant]:
    train = train_of(spec)
    samples = synthetic_samples(spec.model.vocab_size, train.sequence_length, train.seed)
    common = {"spec": spec, "samples": samples, "device": device}
    compiled = None if chosen.mode == "handwritten" else Archwright(**common, degrees=degrees)
    if compiled is not None and chosen.mode == "archwright":
        return [compiled]
    other = Handwritten(**common, chunk_tokens=chosen.chunk_tokens, fused=chosen.fused)
    if compiled is None:
        return [other]
    other.start_as(compiled)
    return [compiled, other]


def run(chosen: argparse.Namespace, world: World, device: torch.device, contestants: list[Contestant]) -> list[Timing]:
    steps = [contestant.step for contestant in contestants]
    if chosen.mode == "pair":
        return time_in_turns(steps, device, warmup=chosen.warmup, steps=chosen.steps, blocks=chosen.blocks)
    timing = time_steps(steps[0], device, warmup=chosen.warmup, steps=chosen.steps)
    timing.ranks = gather_from_ranks(world, timing.own)
    return [timing]


def measured(
    chosen: argparse.Namespace, spec: Spec, report: PlanReport, world: World, timing: Timing
) -> dict[str, Any]:
    """What a contestant did, and its speed; every GPU counts."""
    train = train_of(spec)
    step_s = timing.median_s
    per_gpu = train.batch_size * train.sequence_length / step_s / world.size
    assert report.cluster is not None
    peak = report.cluster.gpu.flops_per_s[train.precision]
    return summary(timing) | {
        "tokens_per_s_per_gpu": round(per_gpu, 2),
        "mfu_full": round(per_gpu * report.flops.training / peak, 5),
        "mfu_causal": round(per_gpu * report.flops.training_causal / peak, 5),
        "peak_flops_per_s": peak,
    }


def compared(record: dict[str, Any], timings: list[Timing]) -> dict[str, Any]:
    """Speed of archwright over that of the hand-written model, of each pair of blocks that ran one after the other."""
    ours, theirs = timings
    ratios = [b / a for a, b in zip(ours.blocks_s, theirs.blocks_s, strict=True)]
    losses = zip(record["archwright"]["losses"], record["handwritten"]["losses"], strict=True)
    return {
        "speed_ratio": round(statistics.median(ratios), 4),
        "speed_ratio_of_each_pair": [round(ratio, 4) for ratio in ratios],
        "largest_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
    }


def command(arguments: Sequence[str]) -> str:
    """As it can be repeated elsewhere: without the folder of the result."""
    words = list(arguments)
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return " ".join(["bench_training.py", *words])


def write(record: dict[str, Any], chosen: argparse.Namespace) -> None:
    mesh = "-".join(f"{axis}{degree}" for axis, degree in record["plan"]["degrees"].items() if degree > 1)
    label = chosen.label or "-".join(filter(None, [record["spec"], record["mode"], mesh, f"batch{chosen.batch}"]))
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / f"{record['date']}-training-{label}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for name in ("archwright", "handwritten"):
        if name in record:
            found = record[name]
            print(
                f"{name}: {found['median_step_s'] * 1e3:.1f} ms a step, {found['tokens_per_s_per_gpu']:,.0f} tokens/s "
                f"per GPU, MFU {found['mfu_full']:.1%} full, {found['mfu_causal']:.1%} causal"
            )
    if "pair" in record:
        print(f"archwright runs at {record['pair']['speed_ratio']} of the speed of the hand-written model")
    print(path)


if __name__ == "__main__":
    main()
