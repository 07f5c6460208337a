"""What a run writes down of where it runs: nodes, the code's commit, the environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mpipipe.plain_values import from_json, to_json
from mpipipe.topology.command import Runner
from mpipipe.topology.environment import recorded_environment
from mpipipe.topology.node import NodeGpu, NodeRecord, read_node
from mpipipe.topology.source import installed_commit, source_commit, tree_commit

INTEL = "processor\t: 0\nmodel name\t: Xeon 8480\n\nprocessor\t: 1\nmodel name\t: other\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [(INTEL, "Xeon 8480"), ("cpu\t\t: POWER9\n", "POWER9"),
     (ARM, "Arm implementer 0x41 part 0xd4f"), ("", "")],
)  # fmt: skip
def test_a_node_tells_its_processor_memory_and_container(
    tmp_path: Path, cpuinfo: str, model: str
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1024 kB\nMemFree: 7 kB\n")
    node = read_node({"APPTAINER_NAME": "x.sif"}, tmp_path)
    assert (node.cpu_model, node.memory_bytes, node.container) == (model, 2**20, "apptainer")
    assert node.num_cores >= 1
    assert node.kernel
    assert read_node({}, tmp_path / "empty").memory_bytes == 0


def test_a_node_travels_as_json() -> None:
    node = NodeRecord("n1", "Xeon", 8, 2**34, "6.1", (NodeGpu("T4", 2**34, "550", "GPU-1"),), "")
    assert from_json(NodeRecord, to_json(node)) == node


def test_the_environment_is_what_decides_without_secrets() -> None:
    kept = {
        "SLURM_JOB_ID": "7",
        "UCX_TLS": "rc",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    left_out = {
        "HOME": "/root", "PATH": "/bin", "HF_TOKEN": "x", "SLURM_JWT": "x", "MPIPIPE_API_KEY": "x",
        "OMPI_MCA_orte_precondition_transports": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "SLURM_EXPORT_ENV": "ALL,HF_TOKEN=x", "OMPI_MCA_mca_base_env_list": "HF_TOKEN=x",
        "SLURM_SPANK_OPTION": "a=1,HF_TOKEN=x", "MPIPIPE_INDEX": "https://user:x@host/simple",
    }  # fmt: skip
    assert recorded_environment({**left_out, **kept}) == kept


def answers(*outputs: str | None) -> tuple[list[Sequence[str]], Runner]:
    """A runner that prints one of `outputs` after another; None: it fails."""
    asked: list[Sequence[str]] = []
    left = list(outputs)

    def run(command: Sequence[str], _: float) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        output = left.pop(0)
        return subprocess.CompletedProcess(command, int(output is None), output or "", "")

    return asked, run


def test_a_source_tree_tells_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    asked, run = answers("abc123\n", " M mpipipe/a.py\n")
    assert tree_commit(tmp_path, run) is None
    assert asked == []
    (tmp_path / ".git").write_text("gitdir: elsewhere")
    assert tree_commit(tmp_path, run) == {"commit": "abc123", "dirty": True}
    assert [command[3] for command in asked] == ["rev-parse", "status"]
    _, run = answers("abc123\n", "")
    assert tree_commit(tmp_path, run) == {"commit": "abc123", "dirty": False}
    _, run = answers("abc123\n", None)
    assert tree_commit(tmp_path, run) == {"commit": "abc123", "dirty": None}
    _, run = answers(None)
    assert tree_commit(tmp_path, run) is None


def test_an_installed_package_tells_the_commit_it_was_made_from() -> None:
    git = {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert installed_commit(json.dumps(git)) == {"commit": "abc", "dirty": False}
    for other in ('{"url": "file:///x", "dir_info": {"editable": true}}', "", "[]", "null"):
        assert installed_commit(other) is None


def test_the_commit_of_what_runs_here_is_the_trees_own() -> None:
    found = source_commit()
    tree = Path(__file__).parents[2]
    if not (tree / ".git").exists():
        assert found is None or found["dirty"] is False
        return
    head = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert (found or {}).get("commit") == (head.stdout.strip() or None)
