from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.errors import ConfigError
from mpipipe.planning.gpu_table import known_gpus, read_gpu_table


@pytest.mark.parametrize(
    ("driver_name", "key"),
    [
        ("Tesla T4", "t4"),
        ("Tesla P100-PCIE-16GB", "p100"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_card_is_found_by_the_drivers_name(driver_name: str, key: str) -> None:
    found = known_gpus().find(driver_name)
    assert found is not None
    assert found.key == key


def test_other_cards_are_not_taken_for_one_that_is_known() -> None:
    for name in ("NVIDIA A30", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GH200 480GB", ""):
        assert known_gpus().find(name) is None


def test_keys_are_found_however_they_are_written() -> None:
    table = known_gpus()
    assert table.of_key("T4") is table.of_key(" t4 ") is table.gpus["t4"]
    assert table.of_key("A100 80") is table.gpus["a100-80"]
    assert table.of_key("RTX 4090") is table.gpus["rtx4090"]
    with pytest.raises(
        ConfigError, match=r"no GPU 'b300' in the table: it knows t4, .*--gpu-table"
    ):
        table.of_key("b300")


def test_every_card_has_figures_and_their_source() -> None:
    for gpu in known_gpus().gpus.values():
        assert gpu.source
        assert gpu.watts > 0
        assert gpu.ceilings.bytes_per_s < gpu.memory_gb_per_s * 1e9
        assert gpu.ceilings.flops_per_s < gpu.fp16 * 1e12
        assert (gpu.bf16 > 0) == (gpu.capability >= 80)
        assert gpu.ceilings.source.startswith("measured" if gpu.measured else "published")


def test_measured_ceilings_are_preferred() -> None:
    h100, h200, t4 = (known_gpus().gpus[key].ceilings for key in ("h100", "h200", "t4"))
    assert h100.bytes_per_s == pytest.approx(3.0e12, rel=0.01)
    assert h200.bytes_per_s == pytest.approx(4.25e12, rel=0.01)
    assert h200.flops_per_s == pytest.approx(790e12, rel=0.01)
    assert t4.bytes_per_s == pytest.approx(250e9, rel=0.01)


def test_a_file_adds_cards_and_changes_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(
        "[gpus.h100]\ncopy_share = 0.5\n"
        "[gpus.b9]\ncapability = 100\nmemory_mib = 1000\nmemory_gb_per_s = 10\nfp16 = 1\n"
        "bf16 = 1\nint8 = 2\nfp8 = 2\ncopy_share = 1\nproduct_share = 1\npcie = [6, 16]\n"
        "nvlink_gb_per_s = 0\n"
        'watts = 9\nsource = "mine"\n'
    )
    table = read_gpu_table(path)
    assert table.of_key("b9").free_bytes == 488 * 2**20
    changed = table.of_key("h100")
    assert changed.ceilings.bytes_per_s == pytest.approx(1.675e12)
    assert changed.ceilings.source.startswith("published, 50% of 3,350 GB/s")
    assert changed.capability == 90
    assert table.of_key("t4") == known_gpus().of_key("t4")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[gpu.x]\na = 1\n", r"expected tables \[gpus.NAME\]"),
        ("[gpus.x]\ncapability = 80\n", r"gpus.x: GpuModel cannot be made of"),
        ("[gpus.t4]\nmemory = 16\n", r"gpus.t4: GpuModel cannot be made of"),
        ('[gpus.t4]\nwatts = "70"\n', r"gpus.t4: GpuModel.watts: '70' is not of type float"),
        ("[gpus.t4]\ncopy_share = 1.5\n", r"copy_share and product_share above 0 and at most 1"),
        ("[gpus]\nt4 = 3\n", r"gpus.t4 is no table"),
        ("[gpus.t4\n", r"not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_gpu_table(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_gpu_table(tmp_path / "none.toml")


def test_an_unknown_card_counts_as_the_slowest_of_the_generation_before() -> None:
    assert known_gpus().like(89).key == "l4"
    assert known_gpus().like(100).key == "h100-pcie"
    assert known_gpus().like(50).key == "l4" or known_gpus().like(50).capability > 50
