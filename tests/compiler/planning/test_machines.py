"""Machines: the table's sanity, and files that add to it."""

from pathlib import Path

import pytest

from archwright.compiler.planning import machines
from archwright.compiler.planning.constants import DEFAULTS, TABLE
from archwright.compiler.planning.machine_file import read_machines
from archwright.compiler.planning.machines import GPUS, parse_cluster
from archwright.spec import SpecError
from archwright.spec.cli import main

FILE = """\
gpus:
  H100-PCIe:
    memory_gib: 79.6
    bandwidth_tb_per_s: 2.0
    tflops: {half: 756, single: 51, double: 26}
    link_gb_per_s: 64
constants: {matmul_fraction: 0.7}
"""


@pytest.mark.parametrize("name", GPUS)
def test_the_table_has_no_slip_of_a_power(name: str) -> None:
    gpu = GPUS[name]
    assert 16e9 < gpu.memory_bytes < 300e9 and 0.2e12 < gpu.bandwidth_bytes_per_s < 10e12
    assert 1e14 < gpu.flops_per_s["bfloat16"] < 3e15 and gpu.flops_per_s["float32"] < gpu.flops_per_s["bfloat16"]
    assert gpu.network_bytes_per_s < gpu.link_bytes_per_s < gpu.bandwidth_bytes_per_s


def test_names_are_read_in_any_case() -> None:
    assert parse_cluster("8xh100").name == "H100" and parse_cluster("rtx4090").count == 1


def test_every_constant_says_where_it_is_from() -> None:
    assert all(each.source and each.unit and each.value > 0 for each in TABLE.values())
    assert any(each.status == "measured" for each in TABLE.values())


def test_a_file_adds_gpus_and_changes_constants(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "machines.yaml").write_text(FILE)
    gpus, constants = read_machines(Path("machines.yaml"))
    assert gpus["H100-PCIe"].flops_per_s["bfloat16"] == 756e12 and gpus["H100"] == GPUS["H100"]
    assert constants == {**DEFAULTS, "matmul_fraction": 0.7}
    assert main(["plan", "preset:tiny", "--gpus", "2xH100-PCIe", "--machines", "machines.yaml"]) == 0
    assert "H100-PCIe" in capsys.readouterr().out
    assert main(["plan", "preset:tiny", "--gpus", "2xH100-PCIe"]) == 1


@pytest.mark.parametrize(
    ("change", "place", "told"),
    [
        (("memory_gib: 79.6", "memory_gib: -1"), "3:17", "greater than"),
        (("memory_gib: 79.6", "memory_gib: 1e308"), "3:17", "less than"),
        (("half: 756", "half: 1e-300"), "5:20", "greater than"),
        (("link_gb_per_s: 64", "link_gb_per_s: 64\n    node_size: 9223372036854775807"), "7:16", "less than"),
        (("matmul_fraction: 0.7", "reserved_bytes: 1e308"), "7:", "less than"),
        (("matmul_fraction: 0.7", "matmul_fraction: 1e-320"), "7:", "greater than"),
        (("memory_gib", "memory_gb"), "3:16", "memory_gb"),
        (("matmul_fraction", "matmul_fractoin"), "7:", "did you mean `matmul_fraction`?"),
        (("half: 756", "half: fast"), "5:20", "valid number"),
    ],
)
def test_faults_of_a_file_are_located(folder: Path, change: tuple[str, str], place: str, told: str) -> None:
    (folder / "machines.yaml").write_text(FILE.replace(*change))
    with pytest.raises(SpecError) as caught:
        read_machines(Path("machines.yaml"))
    text = str(caught.value)
    assert "PLAN003" in text and told in text and f"machines.yaml:{place}" in text


def test_every_constant_is_used() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(machines.__file__).parent.glob("*.py")]
    uses = "\n".join(text for text in sources if "TABLE: Mapping" not in text)
    assert all(f'"{name}"' in uses for name in TABLE), [name for name in TABLE if f'"{name}"' not in uses]
