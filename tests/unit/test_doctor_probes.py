"""What the doctor reads of a host, from fake roots and environments; and what it leaves behind."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest

from mpipipe.config.load import LoadedConfig
from mpipipe.config.schema import Config, MemoryConfig, ModelConfig, OutputConfig
from mpipipe.doctor.facts import (
    LaunchFacts,
    Library,
    RankFacts,
    RankGpu,
    SoftwareFacts,
    Wheel,
)
from mpipipe.doctor.probes import folders
from mpipipe.doctor.probes.folders import (
    claim_marker,
    file_system,
    output_folder,
    probe_folders,
    read_bytes_per_s,
    write_bytes_per_s,
)
from mpipipe.doctor.probes.gpu import kernel_driver, probe_before_torch
from mpipipe.doctor.probes.process import (
    cuda_libraries_in,
    loaded_libraries,
    nccl_routes,
    nvidia_wheels,
    probe_launch,
    probe_node,
    probe_software,
    recorded_nccl,
)
from mpipipe.plain_values import from_json, to_json
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.host import memory_limit_bytes, num_oom_kills
from mpipipe.topology.nvml import GpuProcess


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def nothing(_: str) -> None:
    return None


# ---- host ----------------------------------------------------------------------------------------


def test_the_limit_of_a_cgroup_and_its_kills_are_read_in_both_versions(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 900000 kB\n"}
    v2 = write(
        tmp_path / "v2",
        meminfo
        | {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": "500000000\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.events": "low 0\noom 3\noom_kill 2\n",
        },
    )
    v1 = write(
        tmp_path / "v1",
        meminfo
        | {
            "proc/self/cgroup": "4:memory:/slurm/job_7\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "500000000\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.oom_control": "under_oom 0\noom_kill 2\n",
        },
    )
    for root in (v1, v2):
        assert memory_limit_bytes(root) == 500_000_000
        assert num_oom_kills(root) == 2


def test_a_limit_above_the_hosts_memory_is_none(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 1000 kB\n",
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert memory_limit_bytes(root) is None
    assert num_oom_kills(root) == 0


def test_a_bare_host_is_read_without_complaint(tmp_path: Path) -> None:
    node = probe_node({}, tmp_path, nothing)
    assert node.shm_free is None
    assert node.profilers == ()
    assert not node.sacct
    assert not node.infiniband
    assert node.default_route  # the kernel does not say: no reason to worry anybody


def test_tools_container_and_shared_memory_are_found(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    there = {"nsys": "/bin/nsys", "sacct": "/bin/sacct"}
    node = probe_node({"APPTAINER_NAME": "x.sif"}, tmp_path, there.get)
    assert node.shm_free is not None
    assert node.profilers == ("nsys",)
    assert node.sacct
    assert node.infiniband
    assert node.container == "apptainer"


_ROUTES = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
_LOCAL = "eth0 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"
_DEFAULT = "eth0 00000000 0100A8C0 0003 0 0 0 00000000 0 0 0\n"
_V6_NONE = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200 lo\n"
_V6_DEFAULT = f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 00000400 00000001 00000000 00000003 eth0\n"


@pytest.mark.parametrize(
    ("v4", "v6", "expected"),
    [
        (_ROUTES + _LOCAL, _V6_NONE, False),
        (_ROUTES + _LOCAL + _DEFAULT, _V6_NONE, True),
        (_ROUTES, _V6_NONE, False),
        (_ROUTES, _V6_DEFAULT, True),
    ],
)
def test_a_default_route_is_found(tmp_path: Path, v4: str, v6: str, expected: bool) -> None:
    root = write(tmp_path, {"proc/net/route": v4, "proc/net/ipv6_route": v6})
    assert probe_node({}, root, nothing).default_route is expected


# ---- launch and software -------------------------------------------------------------------------


def test_libraries_in_use_are_found_by_name_once(tmp_path: Path) -> None:
    lines = [
        "7f00-7f01 r-xp 0000 08:01 1 /venv/lib/libmpi.so.12.3.4",
        "7f01-7f02 r--p 0000 08:01 1 /venv/lib/libmpi.so.12.3.4",
        "7f02-7f03 r-xp 0000 08:01 2 /opt/my cuda/libcudart-1a2b.so.13",
        "7f03-7f04 r-xp 0000 08:01 3 /usr/lib/libcudart_static_helper",
        "7f03-7f04 r-xp 0000 08:01 3 /usr/lib/libmpich.so.12",
        "7f04-7f05 rw-p 0000 00:00 0 [heap]",
        "7f05-7f06 rw-p 0000 00:00 0",
    ]
    root = write(tmp_path, {"proc/self/maps": "\n".join(lines)})
    assert loaded_libraries(root) == (
        Library("libcudart", "/opt/my cuda/libcudart-1a2b.so.13"),
        Library("libmpi", "/usr/lib/libmpich.so.12"),
        Library("libmpi", "/venv/lib/libmpi.so.12.3.4"),
    )


def test_the_launch_names_srun_and_its_job(tmp_path: Path) -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_MPI_TYPE": "pmi2",
    }
    joined = LaunchFacts(world_size=2, mpi_library="MPICH", thread_level="funneled")
    launch = probe_launch(environ, joined, is_head=False, root=tmp_path)
    assert (launch.world_size, launch.mpi_library) == (2, "MPICH")
    assert (launch.launcher, launch.srun_mpi, launch.slurm_job) == ("srun", "pmi2", "5_2")
    assert launch.wall_left_s is None  # rank 1 does not ask Slurm


@pytest.mark.parametrize(
    ("module", "abi", "path"),
    [
        ("/x/MPI.mpich.cpython-311-x86_64-linux-gnu.so", "MPICH", "/site/lib/libmpi.so.12.5"),
        ("/x/MPI.openmpi.cpython-311-x86_64-linux-gnu.so", "Open MPI", "/lib/libmpi.so.40.30.6"),
        ("/x/MPI.mpiabi.abi3.so", "MPI 5", "/lib/libmpi.so.40.30.6"),  # a library of both
        ("/x/MPI.cpython-311-x86_64-linux-gnu.so", "Open MPI", "/lib/libmpi.so.40.30.6"),
        ("", "Open MPI", "/lib/libmpi.so.40.30.6"),
    ],
)
def test_the_abi_and_its_library_are_told_by_the_names_of_the_files(
    tmp_path: Path, module: str, abi: str, path: str
) -> None:
    files = ("/lib/libmpi.so.40.30.6", "/site/lib/libmpi.so.12.5")
    maps = "\n".join(f"7f00-7f01 r-xp 0000 08:01 1 {file}" for file in files)
    root = write(tmp_path, {"proc/self/maps": maps})
    launch = probe_launch({}, LaunchFacts(), is_head=True, mpi_module=module, root=root)
    assert (launch.mpi_abi, launch.mpi_path) == (abi, path)


def test_cuda_libraries_on_a_search_path_are_found(tmp_path: Path) -> None:
    for name in ("libcudart.so.11.8.89", "libnccl.so.2", "libcudart.so", "libcurl.so.4"):
        (tmp_path / name).touch()
    found = cuda_libraries_in([str(tmp_path), str(tmp_path / "absent")])
    assert [library.name for library in found] == ["libcudart", "libnccl"]


def test_offline_is_read_as_huggingface_reads_it() -> None:
    for word, expected in (("1", True), ("ON", True), ("0", False), ("", False)):
        facts = probe_software({"HF_HUB_OFFLINE": word}, SoftwareFacts(torch_problem="no"))
        assert facts.hub_offline is expected
    assert facts.torch_problem == "no"
    assert facts.versions["mpipipe"]


def test_every_torch_on_the_path_is_listed_the_one_that_wins_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("user", "image"):
        write(tmp_path, {f"{name}/torch/__init__.py": ""})
    search = [str(tmp_path / name) for name in ("user", "empty", "image", "user")]
    monkeypatch.setattr("sys.path", search)
    copies = probe_software({}, SoftwareFacts(torch_problem="broken")).torch_copies
    assert copies == (str(tmp_path / "user/torch"), str(tmp_path / "image/torch"))


class Installed(importlib.metadata.Distribution):
    """A package that is nowhere."""

    def __init__(self, name: str, version: str, folder: str, requires: Sequence[str] = ()) -> None:
        self._message = Message()
        self._message["Name"], self._message["Version"] = name, version
        self._folder, self._requires = Path(folder), list(requires)

    @property
    def metadata(self) -> Message:  # type: ignore[override]
        return self._message

    @property
    def requires(self) -> list[str]:
        return self._requires

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: object) -> Path:
        return self._folder


def test_nvidia_wheels_are_listed_with_the_version_that_torch_pins() -> None:
    pin = 'nvidia-nccl-cu13==2.28.9; platform_system == "Linux"'
    found = nvidia_wheels(
        [
            Installed("torch", "2.11", "/image", [pin, "sympy"]),
            Installed("nvidia-nccl-cu13", "2.27.1", "/user"),
            Installed("nvidia_nccl_cu13", "2.28.9", "/image"),
            Installed("numpy", "2", "/image"),
        ]
    )
    assert found == (
        Wheel("nvidia-nccl-cu13", "2.28.9", "/image", "2.28.9"),
        Wheel("nvidia-nccl-cu13", "2.27.1", "/user", "2.28.9"),
    )


# ---- GPUs ----------------------------------------------------------------------------------------

_NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
_OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"


@pytest.mark.parametrize(("text", "version"), [(_NVRM, "550.54.15"), (_OPEN, "580.65.06")])
def test_the_kernel_module_tells_its_version(tmp_path: Path, text: str, version: str) -> None:
    assert kernel_driver(write(tmp_path, {"proc/driver/nvidia/version": text})) == version


def refuse() -> tuple[tuple[GpuFacts, ...], tuple[GpuProcess, ...]]:
    raise AssertionError("the driver need not be asked")


def test_a_container_without_nv_shows_module_and_device_but_no_library(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"proc/driver/nvidia/version": _NVRM, "dev/nvidia0": "", "dev/nvidiactl": ""},
    )
    look, gpus = probe_before_torch(
        {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "3"},
        wanted="auto",
        root=root,
        query=refuse,
    )
    assert gpus == ()
    assert look == RankGpu(
        kernel_driver="550.54.15",
        device_files=("/dev/nvidia0",),
        visible="0",
        given_by_slurm="3",
    )


_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
_BATCH = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environ", "given", "declined_by"),
    [
        ({}, "", ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, "", "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "", ""),
        (_BATCH, "", "Slurm"),
        (_BATCH | {"SLURM_GPUS_ON_NODE": "0"}, "", "Slurm"),
        (_BATCH | {"SLURM_JOB_GPUS": "0"}, "0", ""),
        (_STEP, "", "Slurm"),
        (_STEP | {"SLURM_STEP_GPUS": "0,1"}, "0,1", ""),
        (_STEP | {"SLURM_JOB_GPUS": "0", "SLURM_GPUS_ON_NODE": "1"}, "", "Slurm"),
        (_STEP | {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}, "1", ""),
        (_STEP | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "", "Slurm"),
        ({"MPIPIPE_NV": "off"}, "", ""),  # outside of a container it says nothing
        ({"MPIPIPE_NV": "off", "APPTAINER_NAME": "x.sif"}, "", "MPIPIPE_NV"),
    ],
)
def test_whether_a_gpu_was_given_is_read_of_the_step_before_the_job(
    tmp_path: Path, environ: dict[str, str], given: str, declined_by: str
) -> None:
    look, _ = probe_before_torch(environ, wanted="auto", root=tmp_path, query=refuse)
    assert (look.given_by_slurm, look.declined_by) == (given, declined_by)


def test_with_the_library_its_real_version_and_the_others_show(tmp_path: Path) -> None:
    root = write(tmp_path, {"usr/lib/x/libcuda.so.550.54.15": ""})
    process = GpuProcess(12, "/opt/a, b/python", "GPU-1")
    look, gpus = probe_before_torch(
        {},
        wanted="cuda",
        root=root,
        query=lambda: ((GpuFacts(uuid="GPU-1"),), (process,)),
    )
    assert look.libcuda == "/usr/lib/x/libcuda.so.550.54.15"
    assert look.host_gpus == ("GPU-1",)
    assert look.processes == (process,)
    assert len(gpus) == 1


def test_a_job_for_cpus_is_not_asked_about_gpus(tmp_path: Path) -> None:
    look, gpus = probe_before_torch({}, wanted="cpu", root=tmp_path, query=refuse)
    assert (look, gpus) == (RankGpu(wanted="cpu"), ())


_NCCL = """\
n0:7:7 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so.
n0:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n0:7:9 [0] NCCL INFO Channel 00 : 1[5e000] -> 2[b000] [send] via NET/Socket/0
n0:7:9 [0] NCCL INFO Connected all rings
"""


def test_nccls_log_tells_the_way_of_each_pair(tmp_path: Path) -> None:
    path = tmp_path / "nccl.log"
    assert nccl_routes(path) == {}
    path.write_text(_NCCL)
    assert nccl_routes(path) == {(0, 1): "P2P/CUMEM/read", (1, 2): "NET/Socket/0"}


def test_nccls_log_is_asked_for_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    with recorded_nccl() as path:
        assert os.environ["NCCL_DEBUG_FILE"] == str(path)
    assert "NCCL_DEBUG" not in os.environ
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with recorded_nccl():
        assert os.environ["NCCL_DEBUG"] == "WARN"
        assert "NCCL_DEBUG_FILE" not in os.environ
    assert os.environ["NCCL_DEBUG"] == "WARN"


def test_facts_survive_the_way_to_the_head() -> None:
    facts = RankFacts(
        3,
        "n1",
        software=probe_software({}, SoftwareFacts()),
        node=probe_node({}),
        gpu=RankGpu(rank_gpu=GpuFacts(name="T4"), processes=(GpuProcess(1, "x", "u"),)),
    )
    assert from_json(RankFacts, to_json(facts)) == facts


# ---- folders -------------------------------------------------------------------------------------


def loaded(output: Path, model: Path) -> LoadedConfig:
    return LoadedConfig(
        Config(model=ModelConfig(path=str(model)), output=OutputConfig(dir=str(output)))
    )


def test_looking_at_the_folders_leaves_nothing_behind(tmp_path: Path) -> None:
    job = loaded(tmp_path / "a/b/out", tmp_path / "model")
    with claim_marker(output_folder(job)) as marker:
        assert Path(marker).parent == tmp_path
        facts, model = probe_folders(job, marker, "n0", quick=False)
    assert model is None
    assert "model" in facts.model_problem
    assert facts.model_exit_code == 3
    assert facts.output_problem == ""
    assert facts.output_shared
    assert facts.output_free_bytes
    assert facts.write_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_marker_that_this_host_does_not_see_means_another_folder(tmp_path: Path) -> None:
    job = loaded(tmp_path / "out", tmp_path / "model")
    facts, _ = probe_folders(job, str(tmp_path / "elsewhere"), "n1", quick=True)
    assert not facts.output_shared


def test_an_output_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = loaded(tmp_path / "file/out", tmp_path / "model")
    with claim_marker(output_folder(job)) as marker:
        assert marker == ""
        facts, _ = probe_folders(job, marker, "n0", quick=True)
    assert facts.output_problem == "Not a directory"


def test_the_folder_for_offloaded_weights_is_looked_at_where_it_is_or_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "disk_bytes_per_s", len)
    job = loaded(tmp_path / "out", tmp_path / "model")

    def probed(offload_dir: str) -> folders.FolderFacts:
        config = replace(job.config, memory=MemoryConfig(offload_dir=offload_dir))
        return probe_folders(replace(job, config=config), "", "n0", quick=False)[0]

    assert probed("").offload == ""
    facts = probed(str(tmp_path / "not/yet/there"))
    assert (facts.offload, facts.offload_problem) == (str(tmp_path / "not/yet/there"), "")
    assert facts.offload_free_bytes
    assert facts.offload_bytes_per_s == len(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert probed(str(tmp_path / "file")).offload_problem == "Not a directory"


def test_a_file_system_without_blocks_has_an_unknown_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096) + 9 * (0,)))
    facts, _ = probe_folders(loaded(tmp_path / "out", tmp_path), str(tmp_path), "n", quick=True)
    assert facts.output_free_bytes is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert probe_node({}, tmp_path, nothing).shm_free == -1


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = "none / overlay rw 0 0\nfs /my\\040disk ext4 rw 0 0\nx /my\\040disk lustre rw 0 0\n"
    root = write(tmp_path, {"proc/self/mounts": mounts})
    assert file_system(Path("/my disk/models"), root) == "lustre"
    assert file_system(Path("/my"), root) == "overlay"


def test_speeds_are_measured_in_bytes_per_second(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(2**20))
    assert read_bytes_per_s(path) > 0
    new = tmp_path / "new"
    assert write_bytes_per_s(new, 2**20) > 0
    assert not new.exists()
