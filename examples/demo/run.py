"""`make demo`: a YAML spec becomes a trained, finetuned, exported, verified model that writes text.

Every step is a command of the `archwright` program, printed before it runs. A step whose result is there is skipped, so
an interrupted demo goes on where it stopped. Exit status 1 unless all checks of the report pass.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from baselines import baselines
from corpus import write_corpus
from precision import faster_precision
from report import Check, Report

from archwright.spec.files import atomic_write
from archwright.trainers.dataset import open_data

HERE = Path(__file__).resolve().parent
STEPS = {"bfloat16": 1000, "float32": 600}
"""Pretraining steps: fixed for each precision, so that two runs on like machines give the same model."""
QUESTIONS = ("What is json.loads?", "What is threading.Lock.acquire?")
MUST_BEAT = ("add-one trigram", "gzip -9 per file")
COUNT_EVERY_S = 5
SAMPLE = "def read_lines(path):"


@dataclass
class Demo:
    """The demo's folder, the seconds of its steps, and the commands that make it."""

    folder: Path
    precision: str
    steps: int
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, name: str, *arguments: str, result: str | None = None) -> str:
        """Run `archwright ARGUMENTS` in the folder, unless `result` is there already. Returns its standard output."""
        if result is not None and (self.folder / result).exists():
            print(f"[{name}] done before: {result}")
            return ""
        print(f"\n[{name}] archwright {' '.join(arguments)}", flush=True)
        command = [str(Path(sys.executable).with_name("archwright")), *arguments]
        captured = subprocess.PIPE if "--output-format" in arguments else None
        with subprocess.Popen(command, cwd=self.folder, stdout=captured, text=True) as process:
            output = self._timed(name, process)
        if process.returncode:
            sys.exit(f"demo: `archwright {arguments[0]}` ended with exit status {process.returncode}")
        return output

    def _timed(self, name: str, process: subprocess.Popen[str]) -> str:
        """Wait for a step's end, and count its seconds as they pass: one that is killed has taken time as well."""
        while True:
            started = time.perf_counter()
            try:
                output, _ = process.communicate(timeout=COUNT_EVERY_S)
                return output or ""
            except subprocess.TimeoutExpired:
                continue
            finally:
                self._count(name, time.perf_counter() - started)

    def _count(self, name: str, seconds: float) -> None:
        """Add to the step's seconds, which are kept over interruptions."""
        kept = self.folder / "seconds.json"
        self.seconds = json.loads(kept.read_text()) if kept.exists() else {}
        self.seconds[name] = self.seconds.get(name, 0) + seconds
        atomic_write(kept, json.dumps(self.seconds))

    def prepare(self) -> None:
        """Specs, corpus, tokenizer, tokens."""
        for name in ("model.yaml", "finetune.yaml"):
            shutil.copyfile(HERE / name, self.folder / name)
        if not (self.folder / "corpus").exists():
            print("[corpus] reading this Python's standard library")
            write_corpus(self.folder / "corpus")
        self.run("spec", "validate", "model.yaml")
        self.run("plan", "plan", "model.yaml")
        self.run("tokenizer", "tokenizer", "train", "model.yaml", "-o", "tokenizer", result="tokenizer")
        self.run("data", "data", "build", "model.yaml", "-o", "data", result="data")
        self.run("data", "data", "build", "finetune.yaml", "-o", "chat-data", result="chat-data")

    def train(self) -> None:
        """Pretrain on one process, finetune on two."""
        precision = f"train.precision={self.precision}"
        pretrain = ["train", "model.yaml", "-o", "pretrained", "--resume"]
        pretrain += ["--set", precision, "--set", f"train.steps={self.steps}"]
        self.run("pretrain", *pretrain, result="pretrained/model")
        finetune = ["train", "finetune.yaml", "-o", "finetuned", "--resume", "--set", precision]
        self.run("finetune", *finetune, result="finetuned/model")

    def export(self) -> None:
        """One-rank and two-rank ONNX; two-rank engines where a TensorRT is installed."""
        for ranks in (1, 2):
            tensor = f"build.parallel.tensor={ranks}"
            out = f"onnx-{ranks}"
            self.run("export", "build", "finetuned", "--to", "onnx", "-o", out, "--set", tensor, result=out)
        if self.has_tensorrt():
            engine = ["build", "finetuned", "--to", "engine", "-o", "engine-2", "--set", "build.parallel.tensor=2"]
            self.run("engines", *engine, "--set", "build.precision=float16", result="engine-2")

    def has_tensorrt(self) -> bool:
        from archwright.compiler.targets.tensorrt_loader import load_tensorrt
        from archwright.spec import ArchwrightError

        try:
            load_tensorrt()
        except ArchwrightError as error:
            print(f"\n[engines] none: {error}")
            return False
        return True

    def generate(self, model: str, prompt: str, *options: str) -> dict[str, object]:
        arguments = ["generate", model, "--prompt", prompt, "--max-tokens", "48", "--output-format", "json", *options]
        return json.loads(self.run("generate", *arguments))

    def losses(self, run: str) -> list[tuple[int, float]]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]

    def report(self) -> Report:
        """Measure and compare."""
        measured = json.loads(self.run("eval", "eval", "pretrained", "--output-format", "json"))
        tokens = open_data(self.folder / "data")
        bits = {"model": measured["bits_per_byte"]} | baselines(tokens, self.folder / "tokenizer")
        verified = {
            out: json.loads(self.run("verify", "verify", out, "--output-format", "json"))
            for out in ("onnx-1", "onnx-2", "engine-2")
            if (self.folder / out).exists()
        }
        one, two = (self.generate(out, SAMPLE) for out in ("onnx-1", "onnx-2"))
        answers = {question: str(self.generate("onnx-1", question, "--chat")["text"]) for question in QUESTIONS}
        checks = [
            *(Check(f"held-out bits per byte beat {name}", bits["model"] < bits[name]) for name in MUST_BEAT),
            Check("two-rank greedy tokens equal one-rank tokens", one["tokens"] == two["tokens"]),
            *(Check(f"`archwright verify {out}` passes", result["ok"]) for out, result in verified.items()),
        ]
        return Report(
            folder=self.folder,
            recipe=f"Pretrained for {self.steps} steps in {self.precision}, the faster precision of this CPU.",
            seconds=self.seconds,
            bits_per_byte=bits,
            losses={"pretraining": self.losses("pretrained"), "finetuning": self.losses("finetuned")},
            plan=json.loads(self.run("plan", "plan", "finetune.yaml", "--output-format", "json")),
            verified=verified,
            samples={SAMPLE: str(one["text"]), **answers},
            checks=checks,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the demo; it goes on where an earlier run stopped.")
    parser.add_argument("-o", "--output", type=Path, default=HERE.parents[1] / "demo", help="folder (default: demo)")
    parser.add_argument("--steps", type=int, help=f"pretraining steps (default: {STEPS})")
    chosen = parser.parse_args()
    folder: Path = chosen.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    precision = faster_precision(folder)
    demo = Demo(folder, precision, chosen.steps or STEPS[precision])
    demo.prepare()
    demo.train()
    demo.export()
    report = demo.report()
    atomic_write(folder / "report.md", report.markdown())
    atomic_write(folder / "report.html", report.html())
    print("\n" + report.markdown())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
