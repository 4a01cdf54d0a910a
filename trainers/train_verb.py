"""`archwright train`: pretrain or finetune."""

import os
from pathlib import Path

from archwright.compiler.passes import degrees_of
from archwright.compiler.planning import check_plan
from archwright.spec import load
from archwright.spec.cli import add_set, parser
from archwright.trainers.launch import World, check_world, num_gpus, run_workers, watch_parent, world_of


def train(arguments: list[str]) -> int:
    """Trains in this process, as a worker of torchrun, or in processes that it starts."""
    args = parser("train", "Train the model of SPEC on its data; RUN receives checkpoints, metrics and the model.")
    args.add_argument("spec", metavar="SPEC", help="a YAML file with `train`, `data.path` and `tokenizer.path`")
    args.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="the run folder")
    args.add_argument("--resume", action="store_true", help="go on where RUN stopped, if it is there")
    args.add_argument("--plan", type=Path, metavar="FILE", help="refuse to train what this plan was not made for")
    add_set(args)
    chosen = args.parse_args(arguments)
    spec = load(chosen.spec, chosen.overrides)
    world = world_of(os.environ)
    degrees = degrees_of(spec.parallel, world.size if world else num_gpus())
    if chosen.plan is not None:
        check_plan(chosen.plan, spec, degrees)
    if world is None and degrees.world > 1:
        return run_workers(degrees.world, ["train", *arguments], os.environ)
    watch_parent(os.environ)
    world = world or World()
    check_world(world, spec)
    from archwright.trainers.training import train_in_world  # here, so that --help and the launcher load no torch

    train_in_world(spec, chosen.output, world, resume=chosen.resume)
    return 0
