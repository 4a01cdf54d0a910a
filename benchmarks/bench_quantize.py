"""How long `archwright build` takes to round a model to 4 bits, and what memory it needs.

The default is the 8B shape with generated weights, int4 in groups of 128, bfloat16 elsewhere. The aim is at most 5
minutes on 2 cores and at most 2 GiB beyond the page cache; the time is that of the whole build: drawing the weights,
rounding, packing, writing, and the checks. Memory is measured as `bench_build.py` does. Processor time stands
beside the time, since other work on the machine does not count there.

    python benchmarks/bench_quantize.py [--preset llama3.1-8b] [--tensor 1] [--group-size 128] [--folder PLACE]
"""

import argparse
import json
import platform
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path

from bench_build import RESULTS, build_once, build_settings, hardware


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="llama3.1-8b")
    arguments.add_argument("--tensor", type=int, default=1)
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--folder", type=Path, help="where to write")
    chosen = arguments.parse_args()
    rules = f"build.quantize={{rules: [{{kind: int4, group_size: {chosen.group_size}}}]}}"
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="archwright-quantize-", dir=chosen.folder) as name:
        run = build_once(Path(name), f"preset:{chosen.preset}", [*build_settings(chosen.tensor), "--set", rules])
    record = {
        "date": date.today().isoformat(),
        "command": f"bench_quantize.py --preset {chosen.preset} --tensor {chosen.tensor} "
        f"--group-size {chosen.group_size}",
        "hardware": machine,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("archwright", "numpy", "onnx", "onnx-ir", "onnxruntime")},
        "build": run,
    }
    RESULTS.mkdir(exist_ok=True)
    shape = chosen.preset.rpartition("-")[2]
    path = RESULTS / f"{record['date']}-quantize-{shape}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    peak = float(str(run["peak_anonymous_bytes"])) / (1 << 30)
    print(
        f"quantize: {run['build_s']} s (aim 300), {run['processor_s']} s of processors, {peak:.2f} GiB (aim 2); {path}"
    )


if __name__ == "__main__":
    main()
