"""Compare one spec with the oracle, as the differential suite does, and print the errors.

python -m tests.parity.reproduce SPEC.yaml [--seed N] [--only COMPARISON]...
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from archwright.spec import load
from tests.parity.comparisons import COMPARISONS, Subject, beyond_tolerance, measure
from tests.parity.ranks import Ranks


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("spec", help="a YAML file or preset:NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--only", action="append", choices=list(COMPARISONS), help="a comparison; all by default")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = args.only or [name for name in COMPARISONS if name != "compiled, inductor"]
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(2, Path(folder))
        try:
            subject = Subject(spec=load(args.spec), seed=args.seed, folder=Path(folder))
            errors = measure(subject, names, ranks)
        finally:
            ranks.close()
    wrong = beyond_tolerance(errors)
    for name, error in errors.items():
        verdict = "WRONG" if name in wrong else "ok"
        print(f"{name:<34} {error:8.1e}  allowed {COMPARISONS[name].tolerance:8.1e}  {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
