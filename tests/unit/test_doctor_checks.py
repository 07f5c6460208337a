"""The doctor's verdicts: every way in which a job was lost before is named, and health is quiet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from mpipipe.control_plane.probe import ControlProbe, RoundTrips
from mpipipe.doctor.checks.job import HostDemand, check_folders, check_memory
from mpipipe.doctor.checks.measured import check_clocks, check_control, check_links
from mpipipe.doctor.checks.offload import check_offload
from mpipipe.doctor.checks.ranks import check_ranks, not_joined
from mpipipe.doctor.facts import (
    LaunchFacts,
    Library,
    LinkFigure,
    NodeFacts,
    RankFacts,
    RankGpu,
    SoftwareFacts,
    Wheel,
)
from mpipipe.doctor.finding import Finding, Severity
from mpipipe.doctor.probes.folders import FolderFacts
from mpipipe.errors import EXIT_ENVIRONMENT, EnvironmentSetupError
from mpipipe.runtime.clock_offsets import ClockOffsets
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.launcher import Launcher, LaunchInfo, check_world_size
from mpipipe.topology.nvml import GpuProcess

GIB = 2**30
IMAGE_TORCH = "/usr/local/lib/python3.12/site-packages/torch"
USER_SITE = "/home/ada/.local/lib/python3.12/site-packages"
USER_TORCH = f"{USER_SITE}/torch"

T4 = GpuFacts(
    index=0,
    name="Tesla T4",
    uuid="GPU-1",
    capability=75,
    memory_bytes=16 * GIB,
    free_bytes=15 * GIB + GIB // 2,
    nccl_version="2.28.9",
)
HEALTHY_NODE = NodeFacts(
    num_cores=8,
    memory_available=64 * GIB,
    shm_free=32 * GIB,
    max_open_files=4096,
    profilers=("nsys", "py-spy"),
    sacct=True,
)
HEALTHY_SOFTWARE = SoftwareFacts(
    versions={"python": "3.12.3", "mpipipe": "1", "torch": "2.11.0", "mpi4py": "4.1.2"}
    | {"transformers": "5.17.0", "safetensors": "0.8.0"},
    torch_path=IMAGE_TORCH,
    torch_copies=(IMAGE_TORCH,),
    torch_cuda="13.0",
    bundled=("libcudart", "libnccl"),
    hub_offline=True,
)
HEALTHY_GPU = RankGpu(
    kernel_driver="580.65.06",
    device_files=("/dev/nvidia0",),
    libcuda="/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06",
    rank_gpu=T4,
    host_gpus=("GPU-1",),
)


def healthy(rank: int = 0, world_size: int = 1, host: str = "n0") -> RankFacts:
    launch = LaunchFacts(launcher="srun", world_size=world_size, mpi_library="MPICH Version: 5")
    gpu = replace(HEALTHY_GPU, rank_gpu=replace(T4, uuid=f"GPU-{rank}"), host_gpus=(f"GPU-{rank}",))
    return RankFacts(
        rank, host, launch=launch, software=HEALTHY_SOFTWARE, node=HEALTHY_NODE, gpu=gpu
    )


def bad(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is not Severity.OK]


def only_bad(rank: RankFacts) -> Finding:
    (finding,) = bad(check_ranks([rank]))
    return finding


def gpu_of(rank: RankFacts, **changes: object) -> RankFacts:
    return replace(rank, gpu=replace(rank.gpu, **changes))  # type: ignore[arg-type]


def software_of(rank: RankFacts, **changes: object) -> RankFacts:
    return replace(rank, software=replace(rank.software, **changes))  # type: ignore[arg-type]


def node_of(rank: RankFacts, **changes: object) -> RankFacts:
    return replace(rank, node=replace(rank.node, **changes))  # type: ignore[arg-type]


def test_healthy_ranks_on_two_hosts_have_nothing_but_ok() -> None:
    ranks = [healthy(0, 2, "n0"), healthy(1, 2, "n1")]
    findings = list(check_ranks(ranks))
    assert not bad(findings)
    assert {finding.group for finding in findings} == {"launch", "software", "node", "gpu"}


def test_a_healthy_host_without_gpus_has_nothing_but_ok() -> None:
    rank = replace(healthy(), gpu=RankGpu())
    assert not bad(check_ranks([rank]))


def test_every_bad_finding_has_a_cause_and_a_remedy() -> None:
    for rank in [case.values[0] for case in CASES]:
        assert isinstance(rank, RankFacts)
        for finding in bad(check_ranks([rank])):
            assert finding.cause, finding
            assert finding.remedy, finding


# ---- the failures of the original report ---------------------------------------------------------


def in_container(rank: RankFacts) -> RankFacts:
    return node_of(rank, container="apptainer")


def test_a_container_without_nv_is_named_by_the_kernel_module_it_can_see() -> None:
    rank = gpu_of(in_container(healthy()), libcuda="", rank_gpu=GpuFacts())
    finding = only_bad(rank)
    assert finding.check == "gpu.driver"
    assert finding.severity is Severity.FATAL
    assert "580.65.06" in finding.what
    assert "--nv" in finding.remedy


def test_no_nv_is_asked_for_where_the_host_has_no_gpu() -> None:
    rank = in_container(replace(healthy(), gpu=RankGpu()))
    assert not bad(check_ranks([rank]))


def test_a_missing_nv_does_not_matter_to_a_job_for_cpus() -> None:
    rank = replace(in_container(healthy()), gpu=RankGpu(wanted="cpu"))
    assert not bad(check_ranks([rank]))


def test_cuda_libraries_on_ld_library_path_are_named_with_their_folder() -> None:
    library = Library("libnccl", "/opt/cuda-11/lib64/libnccl.so.2.18.1")
    rank = software_of(healthy(), loaded=(library,), search_path=("/opt/cuda-11/lib64",))
    finding = only_bad(rank)
    assert finding.check == "software.libraries"
    assert finding.severity is Severity.WARNING  # torch works on it so far
    assert "/opt/cuda-11/lib64/libnccl" in finding.what
    assert "unset LD_LIBRARY_PATH" in finding.remedy


def test_ld_library_path_is_the_cause_when_torch_cannot_be_imported() -> None:
    library = Library("libcudart", "/opt/cuda-11/lib64/libcudart.so.11")
    rank = software_of(
        gpu_of(healthy(), rank_gpu=GpuFacts()),
        torch_problem="libcudart.so.13: undefined symbol",
        search_path=("/opt/cuda-11/lib64",),
        on_search_path=(library,),
    )
    found = {finding.check: finding for finding in bad(check_ranks([rank]))}
    assert found["software.libraries"].severity is Severity.FATAL
    assert found["software.torch"].severity is Severity.FATAL
    assert "undefined symbol" in found["software.torch"].what


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (
            "libstdc++.so.6: cannot open shared object file: No such file or directory",
            "libstdc++6",
        ),
        ("libodd.so.3: cannot open shared object file: No such file or directory", "libodd.so.3"),
        ("/lib64/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by x)", "newer"),
    ],
)
def test_a_library_of_the_system_that_torch_lacks_is_named(problem: str, word: str) -> None:
    finding = only_bad(software_of(healthy(), torch_problem=problem))
    assert finding.check == "software.torch"
    assert word in finding.remedy
    assert "install torch again" not in finding.remedy


def test_a_library_that_comes_with_torch_is_had_by_installing_it_again() -> None:
    problem = "libcudnn.so.9: cannot open shared object file: No such file or directory"
    finding = only_bad(software_of(healthy(), torch_problem=problem))
    assert "install torch again" in finding.remedy


def test_a_harmless_ld_library_path_is_not_reported() -> None:
    own = Library("libnccl", "/venv/nvidia/nccl/lib/libnccl.so.2")
    other = Library("libcudart", "/opt/cuda/lib64/libcudart.so.13")
    rank = software_of(
        healthy(), loaded=(own,), search_path=("/opt/cuda/lib64",), on_search_path=(other,)
    )
    assert not bad(check_ranks([rank]))


def test_what_nv_binds_is_no_stray_driver() -> None:
    bound = Library("libcuda", "/.singularity.d/libs/libcuda.so.1")
    problem = GpuFacts(problem="CUDA could not be started (boo): see whether nvidia-smi works")
    rank = software_of(
        gpu_of(in_container(healthy()), rank_gpu=problem),
        search_path=("/.singularity.d/libs",),
        on_search_path=(bound,),
    )
    assert only_bad(rank).check == "gpu.torch"


def test_a_libcuda_of_another_driver_is_fatal_where_torch_does_not_compute() -> None:
    other = gpu_of(healthy(), libcuda="/opt/old/libcuda.so.535.54.03")
    problem = GpuFacts(problem="CUDA could not be started (boo): see whether nvidia-smi works")
    found = {f.check: f for f in bad(check_ranks([gpu_of(other, rank_gpu=problem)]))}
    assert found["gpu.library"].severity is Severity.FATAL
    assert "535.54.03" in found["gpu.library"].what
    assert "580.65.06" in found["gpu.library"].what
    works = only_bad(other)  # CUDA's forward compatibility
    assert (works.check, works.severity) == ("gpu.library", Severity.WARNING)


def test_a_driver_whose_version_is_unknown_is_not_compared() -> None:
    assert not bad(check_ranks([gpu_of(healthy(), kernel_driver="unknown")]))


def test_a_stub_of_libcuda_is_fatal() -> None:
    rank = gpu_of(healthy(), libcuda="/usr/local/cuda/lib64/stubs/libcuda.so")
    assert "stub" in only_bad(rank).what


def user_torch(rank: RankFacts) -> RankFacts:
    return software_of(
        in_container(rank),
        user_site=USER_SITE,
        torch_path=USER_TORCH,
        torch_copies=(USER_TORCH, IMAGE_TORCH),
    )


def test_a_torch_in_the_user_site_that_shadows_the_containers_is_named() -> None:
    finding = only_bad(user_torch(healthy()))
    assert finding.check == "software.user_site"
    assert finding.severity is Severity.WARNING
    assert USER_TORCH in finding.what
    assert IMAGE_TORCH in finding.what
    assert "PYTHONNOUSERSITE=1" in finding.remedy


def test_a_shadowing_torch_is_fatal_once_the_gpu_cannot_be_used() -> None:
    problem = GpuFacts(problem="torch 2.1+cpu was built without CUDA: install a torch with CUDA")
    rank = gpu_of(user_torch(healthy()), rank_gpu=problem)
    found = {finding.check: finding.severity for finding in bad(check_ranks([rank]))}
    assert found == {"software.user_site": Severity.FATAL, "gpu.torch": Severity.FATAL}


def test_a_torch_that_lives_in_the_user_site_on_purpose_is_not_reported() -> None:
    rank = software_of(
        healthy(), user_site=USER_SITE, torch_path=USER_TORCH, torch_copies=(USER_TORCH,)
    )
    assert not bad(check_ranks([rank]))


@pytest.mark.parametrize(
    ("wheels", "word"),
    [
        (
            [
                Wheel("nvidia-nccl-cu12", "2.27", "/venv"),
                Wheel("nvidia-nccl-cu13", "2.28", "/venv"),
            ],
            "both installed",
        ),
        ([Wheel("nvidia-nccl-cu13", "2.27", "/venv", wanted="2.28.9")], "2.28.9"),
        ([Wheel("nvidia-cudnn-cu13", "9.1", USER_SITE)], USER_SITE),
    ],
)
def test_stray_cuda_wheels_are_named(wheels: list[Wheel], word: str) -> None:
    rank = software_of(healthy(), nvidia_wheels=tuple(wheels), user_site=USER_SITE)
    finding = only_bad(rank)
    assert finding.check == "software.wheels"
    assert word in finding.what


def test_a_compute_node_without_a_way_out_is_told_to_stay_offline() -> None:
    rank = node_of(software_of(healthy(), hub_offline=False), default_route=False)
    finding = only_bad(rank)
    assert finding.check == "software.network"
    assert "HF_HUB_OFFLINE=1" in finding.remedy


def test_a_plan_that_the_cgroup_would_kill_is_fatal_before_it_is_loaded() -> None:
    demand = HostDemand(
        "n0",
        weight_bytes=13 * GIB,
        kv_bytes=2 * GIB,
        library_bytes=GIB,
        available_bytes=8 * GIB,
        limit_bytes=8 * GIB,
    )
    finding = check_memory(demand)
    assert finding.severity is Severity.FATAL
    assert "16.00 GiB needed" in finding.what
    assert "cgroup's limit is 8.00 GiB" in finding.what
    assert "--mem=21G" in finding.remedy


@pytest.mark.parametrize(
    ("available", "severity"), [(18, Severity.OK), (15, Severity.WARNING), (13, Severity.FATAL)]
)
def test_memory_is_judged_with_a_margin(available: int, severity: Severity) -> None:
    demand = HostDemand("n0", 13 * GIB, 2 * GIB, GIB, available * GIB)
    assert check_memory(demand).severity is severity


def test_too_little_for_the_kv_cache_alone_is_a_warning() -> None:
    """It fills with the sequences; only what is loaded at once is certain to be too much."""
    demand = HostDemand("n0", 13 * GIB, 8 * GIB, GIB, 15 * GIB, 15 * GIB)
    assert check_memory(demand).severity is Severity.WARNING
    assert check_memory(replace(demand, weight_bytes=15 * GIB)).severity is Severity.FATAL


def test_a_guess_of_what_gpu_libraries_take_is_never_fatal() -> None:
    assert check_memory(HostDemand("n0", 0, 0, 7 * GIB, 4 * GIB)).severity is Severity.WARNING


def test_earlier_oom_kills_of_the_job_are_told() -> None:
    finding = only_bad(node_of(healthy(), oom_kills=2))
    assert finding.check == "node.oom"
    assert "2 processes" in finding.what


def test_absent_profilers_are_told_with_what_works_without_them() -> None:
    finding = only_bad(node_of(healthy(), profilers=()))
    assert finding.check == "launch.profilers"
    assert finding.severity is Severity.WARNING
    assert "--profile" in finding.remedy


def test_singletons_of_a_wrong_mpi_are_named_with_the_right_flag() -> None:
    info = LaunchInfo(Launcher.SRUN, rank=0, world_size=2, mpi_expected=True, detail="none")
    with pytest.raises(EnvironmentSetupError) as raised:
        check_world_size(info, 1, "MPICH Version: 5.0.2")
    finding = not_joined(raised.value, mpi_loaded=True)
    assert finding.severity is Severity.FATAL
    assert "srun started 2 ranks" in finding.what
    assert "--mpi=pmi2" in finding.remedy
    # Under srun the host's MPI does not matter, in a container or not.
    assert "container" not in finding.cause + finding.remedy


def test_nodes_without_a_rank_are_told() -> None:
    finding = only_bad(replace(healthy(), launch=replace(healthy().launch, idle_nodes=1)))
    assert finding.check == "launch.nodes"
    assert finding.severity is Severity.WARNING
    assert "--ntasks-per-node=1" in finding.remedy


def test_a_missing_mpi_is_not_taken_for_a_wrong_flag() -> None:
    error = EnvironmentSetupError("MPI could not be loaded (no libmpi): install one with pip")
    finding = not_joined(error, mpi_loaded=False)
    assert "no MPI library" in finding.cause
    assert finding.remedy == "install one with pip"


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("libmpi.so.40: cannot open shared object file: No such file or directory", "Open MPI"),
        ("libmpi.so.12: cannot open shared object file: No such file or directory", "MPICH"),
        ("libmpich.so.12: cannot open shared object file: No such file or directory", "MPICH"),
        ("/x/MPI.so: undefined symbol: ompi_mpi_comm_null", "Open MPI"),
    ],
)
@pytest.mark.parametrize("mpi_loaded", [True, False])
def test_an_mpi4py_for_another_abi_is_named_as_such(
    problem: str, kind: str, mpi_loaded: bool
) -> None:
    error = EnvironmentSetupError(f"MPI could not be loaded ({problem}): install one with pip")
    finding = not_joined(error, mpi_loaded=mpi_loaded)
    assert f"built for the ABI of {kind}," in finding.cause


def with_abi(library: str, abi: str, *loaded: str, launcher: str = "srun") -> RankFacts:
    rank = software_of(healthy(), loaded=tuple(Library("libmpi", path) for path in loaded))
    launch = replace(rank.launch, mpi_library=library, mpi_abi=abi, launcher=launcher)
    return replace(rank, launch=launch)


def test_the_abi_is_told_with_the_library_and_the_thread_level() -> None:
    path = "/usr/lib/libmpi.so.40.30.6"
    rank = with_abi("Open MPI v4.1.6, package: x", "Open MPI", path)
    rank = replace(rank, launch=replace(rank.launch, mpi_path=path, thread_level="funneled"))
    (finding,) = (found for found in check_ranks([rank]) if found.check == "launch.mpi")
    assert finding.severity is Severity.OK
    assert finding.what == f"Open MPI v4.1.6, Open MPI ABI, threads: funneled, {path}"


@pytest.mark.parametrize(
    ("rank", "word"),
    [
        (with_abi("Open MPI v5.0.8, package: x", "MPICH"), "through the ABI of MPICH"),
        (with_abi("MPICH Version: 5.0.2", "Open MPI"), "the library is MPICH Version: 5.0.2"),
        (
            with_abi("MPICH Version: 5.0.2", "MPICH", "/a/libmpi.so.12", "/b/libmpi.so.40.30.6"),
            "/a/libmpi.so.12, /b/libmpi.so.40.30.6",
        ),
        (
            with_abi("MPICH Version: 5.0.2", "MPICH", launcher="mpirun (Open MPI)"),
            "started by mpirun (Open MPI)",
        ),
        (
            with_abi("Open MPI v5.0.8, package: x", "Open MPI", launcher="mpiexec (hydra)"),
            "started by mpiexec (hydra)",
        ),
    ],
)
def test_two_kinds_of_mpi_in_one_rank_are_told(rank: RankFacts, word: str) -> None:
    finding = only_bad(rank)
    assert (finding.check, finding.severity, finding.rank) == ("launch.mpi", Severity.WARNING, 0)
    assert word in finding.what


@pytest.mark.parametrize(
    "rank",
    [
        with_abi("Intel(R) MPI Library 2021.11 for Linux* OS", "MPICH", "/a/libmpi.so.12.0.0"),
        with_abi("MPI VERSION    : CRAY MPICH version 8.1.25.17", "MPICH"),
        with_abi("Open MPI v6.0.0, package: x", "MPI 5", "/a/libmpi_abi.so.1", "/a/libmpi.so.40"),
        with_abi("MPICH Version: 5.0.2", "MPICH", "/a/libmpi.so.12", "/a/libmpi_abi.so.1"),
        with_abi("Somebody's MPI 1.0", "Open MPI", launcher="mpiexec (hydra)"),
        with_abi("Open MPI v4.1.6, package: x", "", launcher="mpirun (Open MPI)"),
    ],
)
def test_mpis_that_fit_each_other_are_no_finding(rank: RankFacts) -> None:
    assert not bad(check_ranks([rank]))


# ---- launch, host and GPU ------------------------------------------------------------------------


def test_a_gpu_that_others_use_is_told_with_their_names() -> None:
    process = GpuProcess(77, "python3, other", "GPU-0")
    rank = gpu_of(healthy(), free_before_bytes=11 * GIB, processes=(process,))
    finding = only_bad(rank)
    assert finding.check == "gpu.memory"
    assert "pid 77" in finding.cause


def test_a_t4_is_said_to_compute_in_float16_only() -> None:
    (finding,) = [f for f in check_ranks([healthy()]) if f.check == "gpu.torch"]
    assert "7.5" in finding.what
    assert "float16 only" in finding.what


def two_on_one_gpu() -> list[RankFacts]:
    return [gpu_of(healthy(rank, 2), rank_gpu=T4, host_gpus=("GPU-1",)) for rank in (0, 1)]


def test_two_ranks_on_one_gpu_are_refused_unless_sharing_is_allowed() -> None:
    ranks = two_on_one_gpu()
    (finding,) = bad(check_ranks(ranks))
    assert (finding.check, finding.severity) == ("gpu.ranks", Severity.FATAL)
    assert "ranks 0, 1" in finding.what
    assert "--gpus-per-node=N" in finding.remedy
    assert not bad(check_ranks(ranks, share_gpus=True))


def test_a_gpu_given_by_slurm_but_not_to_be_seen_is_fatal() -> None:
    rank = replace(healthy(), gpu=RankGpu(given_by_slurm="0"))
    assert "Slurm gave this step GPU 0" in only_bad(rank).what


def without_gpu(by: str, problem: str = "hidden: unset it") -> RankFacts:
    rank = gpu_of(healthy(), declined_by=by, rank_gpu=GpuFacts(problem=problem))
    return replace(rank, launch=replace(rank.launch, slurm_job="7"))


@pytest.mark.parametrize("by", ["CUDA_VISIBLE_DEVICES", "MPIPIPE_NV"])
def test_gpus_hidden_on_purpose_are_no_finding(by: str) -> None:
    assert not bad(check_ranks([without_gpu(by)]))


def test_a_slurm_job_without_gpus_runs_on_cpus_and_is_not_lost() -> None:
    finding = only_bad(without_gpu("Slurm", "the NVIDIA driver is there but shows no GPU: ask"))
    assert (finding.check, finding.severity) == ("gpu.driver", Severity.WARNING)
    assert "no GPU was asked for" in finding.what
    assert "--gpus-per-node=N" in finding.remedy
    no_driver = replace(healthy(), gpu=RankGpu(declined_by="Slurm"))
    assert not bad(check_ranks([no_driver]))


def test_without_a_gpu_on_purpose_odd_packages_do_no_harm() -> None:
    wheel = Wheel("nvidia-nccl-cu13", "2.27", "/venv", wanted="2.28.9")
    rank = software_of(without_gpu("MPIPIPE_NV"), nvidia_wheels=(wheel,))
    assert only_bad(rank).severity is Severity.WARNING


def test_a_container_without_nv_in_a_job_without_gpus_is_no_more_than_a_warning() -> None:
    rank = gpu_of(in_container(without_gpu("Slurm", "")), libcuda="")
    finding = only_bad(rank)
    assert finding.severity is Severity.WARNING
    assert "--nv" in finding.cause


def test_a_gpu_that_was_not_asked_for_but_works_is_judged_as_any() -> None:
    shared = [gpu_of(rank, declined_by="Slurm") for rank in two_on_one_gpu()]
    assert [finding.check for finding in bad(check_ranks(shared))] == ["gpu.ranks"]
    assert not bad(check_ranks(shared[:1]))


def test_cuda_asked_for_by_name_is_missed_in_a_job_without_gpus() -> None:
    rank = gpu_of(without_gpu("Slurm"), wanted="cuda")
    assert only_bad(rank).severity is Severity.FATAL


def test_a_full_gpu_is_told_with_who_fills_it() -> None:
    rank = gpu_of(
        healthy(),
        rank_gpu=GpuFacts(problem="CUDA could not be started (out of memory): see nvidia-smi"),
        processes=(GpuProcess(77, "other", "GPU-0"),),
    )
    finding = only_bad(rank)
    assert "other (pid 77)" in finding.cause
    assert "--exclusive" in finding.remedy


def test_gpus_without_a_uuid_are_told_apart_by_their_index() -> None:
    ranks = [gpu_of(healthy(rank, 2), rank_gpu=replace(T4, uuid="", index=rank)) for rank in (0, 1)]
    assert not bad(check_ranks(ranks))
    (finding,) = bad(check_ranks([ranks[0], replace(ranks[0], rank=1)]))
    assert finding.check == "gpu.ranks"


def test_a_rank_without_a_gpu_among_ranks_with_one_is_fatal() -> None:
    ranks = [healthy(0, 2, "n0"), replace(healthy(1, 2, "n1"), gpu=RankGpu())]
    (finding,) = bad(check_ranks(ranks))
    assert finding.severity is Severity.FATAL
    assert "rank 1 on n1" in finding.what


@pytest.mark.parametrize(
    ("name", "version", "severity"),
    [
        ("mpipipe", "0.0.1", Severity.FATAL),
        ("mpi4py", "3.1.2", Severity.FATAL),
        ("mpi4py", "4.1.0", Severity.WARNING),
        ("torch", "0.0.1", Severity.WARNING),
    ],
)
def test_versions_that_differ_between_hosts_are_told(
    name: str, version: str, severity: Severity
) -> None:
    other = healthy(1, 2, "n1")
    other = software_of(other, versions=other.software.versions | {name: version})
    (finding,) = bad(check_ranks([healthy(0, 2), other]))
    assert (finding.check, finding.severity) == ("launch.versions", severity)
    assert f"{name} differs" in finding.what
    assert f"{version} on n1 (rank 1)" in finding.what


def with_mpi(first: str, second: str) -> list[RankFacts]:
    ranks = [healthy(0, 2), healthy(1, 2, "n1")]
    return [
        replace(rank, launch=replace(rank.launch, mpi_library=text))
        for rank, text in zip(ranks, (first, second), strict=True)
    ]


@pytest.mark.parametrize(
    ("other", "severity"),
    [
        ("MPICH Version:      4.1.6", Severity.FATAL),
        ("Open MPI v5.0.8, package: Open MPI root@a", Severity.FATAL),
        ("Open MPI v4.1.5, package: Open MPI root@a", Severity.WARNING),
    ],
)
def test_different_mpi_libraries_are_told(other: str, severity: Severity) -> None:
    (finding,) = bad(check_ranks(with_mpi("Open MPI v4.1.6, package: Open MPI root@a", other)))
    assert (finding.check, finding.severity) == ("launch.mpi", severity)


def test_where_an_mpi_library_was_built_does_not_matter() -> None:
    told = "Open MPI v4.1.6, package: Open MPI root@{}, ident: 4.1.6, repo rev: v4.1.6"
    assert not bad(check_ranks(with_mpi(told.format("build-1"), told.format("build-2"))))


def test_more_ranks_than_cores_are_told() -> None:
    ranks = [node_of(replace(healthy(r, 2), gpu=RankGpu()), num_cores=1) for r in (0, 1)]
    (finding,) = bad(check_ranks(ranks))
    assert finding.check == "launch.cores"
    assert finding.host == "n0"


def test_configurations_that_differ_are_fatal() -> None:
    ranks = [
        replace(healthy(0, 2), config_hash="a"),
        replace(healthy(1, 2, "n1"), config_hash="b"),
    ]
    (finding,) = bad(check_ranks(ranks))
    assert (finding.check, finding.severity) == ("job.config", Severity.FATAL)


def test_a_configuration_error_is_told_once_with_its_exit_code() -> None:
    ranks = [
        replace(healthy(r, 2, f"n{r}"), config_problem="no x: write y z", config_exit_code=2)
        for r in (0, 1)
    ]
    (finding,) = bad(check_ranks(ranks))
    assert (finding.what, finding.remedy, finding.exit_code) == ("no x", "write y z", 2)


CASES = [
    pytest.param(healthy(), id="healthy"),
    pytest.param(node_of(healthy(), shm_free=None), id="no shm"),
    pytest.param(node_of(healthy(), memory_available=GIB, memory_limit=GIB), id="memory"),
    pytest.param(node_of(healthy(), infiniband=True, memlock=65536), id="memlock"),
    pytest.param(node_of(healthy(), max_open_files=256), id="files"),
    pytest.param(replace(healthy(), launch=replace(healthy().launch, wall_left_s=60.0)), id="time"),
    pytest.param(
        replace(node_of(healthy(), sacct=False), launch=replace(healthy().launch, slurm_job="7")),
        id="sacct",
    ),
    pytest.param(software_of(healthy(), torch_import_s=90.0), id="slow"),
    pytest.param(software_of(healthy(), versions={"torch": "1"}), id="packages"),
]


@pytest.mark.parametrize("rank", CASES[1:])
def test_each_of_these_is_one_finding(rank: RankFacts) -> None:
    assert len(bad(check_ranks([rank]))) == 1


# ---- measured ------------------------------------------------------------------------------------


def probe(p50_us: float, idle: float = 0.01, raw_us: float | None = 2.0) -> ControlProbe:
    trip = RoundTrips(64, p50_us, 2 * p50_us, raw_us, raw_us)
    return ControlProbe((trip,), 1e5, 1e6, (0.0, idle))


def test_messages_and_idling_are_judged_by_their_figures() -> None:
    assert not bad(check_control(probe(20.0)))
    (slow,) = bad(check_control(probe(5000.0, raw_us=4000.0)))
    assert "network" in slow.cause
    (crowded,) = bad(check_control(probe(5000.0)))
    assert "cores" in crowded.cause
    (busy,) = bad(check_control(probe(20.0, idle=0.9)))
    assert busy.check == "links.idle"


def test_clocks_are_compared_between_hosts_only() -> None:
    hosts = {0: "n0", 1: "n0", 2: "n1"}
    assert check_clocks(ClockOffsets({0: 0.0, 1: 5.0}, 0.001), {0: "n0", 1: "n0"}) == []
    (fine,) = check_clocks(ClockOffsets({0: 0.0, 1: 0.0, 2: -0.02}, 0.001), hosts)
    assert fine.severity is Severity.OK
    assert "n1 is 20.0 ms behind" in fine.what
    (apart,) = check_clocks(ClockOffsets({0: 0.0, 1: 0.0, 2: 61.0}, 0.001), hosts)
    assert apart.severity is Severity.WARNING


# ---- folders -------------------------------------------------------------------------------------


def folder(host: str = "n0", /, **changes: object) -> FolderFacts:
    facts = FolderFacts(
        host,
        model_bytes=7 * GIB,
        model_system="lustre",
        read_bytes_per_s=2e9,
        output="/scratch/x",
        output_system="lustre",
        output_free_bytes=100 * GIB,
        write_bytes_per_s=1e8,
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


def test_folders_that_all_hosts_share_are_ok() -> None:
    assert not bad(check_folders([folder("n0"), folder("n1")]))


def offload_folder(**changes: object) -> FolderFacts:
    return folder(
        offload="/local/x",
        offload_system="ext4",
        offload_free_bytes=100 * GIB,
        offload_bytes_per_s=3e9,
        **changes,
    )


def test_a_folder_for_offloaded_weights_is_told_with_its_rate() -> None:
    assert check_offload([folder()], {}) == []  # none is configured
    (finding,) = check_offload([offload_folder()], {"n0": 5 * GIB})
    assert finding.severity is Severity.OK
    assert (finding.check, finding.host) == ("job.offload", "n0")
    assert "5.00 GiB of weights are to stand there, read at 3 GB/s" in finding.what
    assert finding.values["read_bytes_per_s"] == 3e9


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"offload_system": "tmpfs"}, "it is memory"),
        ({"offload_system": "nfs4"}, "it is on a network"),
        ({"offload_bytes_per_s": 0.1e9}, "a slow or busy disk"),
    ],
)
def test_a_folder_that_makes_offloading_slow_or_dear_is_a_warning(
    changes: dict[str, object], cause: str
) -> None:
    (finding,) = check_offload([replace(offload_folder(), **changes)], {"n0": GIB})  # type: ignore[arg-type]
    assert finding.severity is Severity.WARNING
    assert finding.cause.startswith(cause)
    assert "$TMPDIR" in finding.remedy


@pytest.mark.parametrize(
    "changes", [{"offload_problem": "Permission denied"}, {"offload_free_bytes": GIB}]
)
def test_a_folder_that_takes_no_weights_is_fatal_where_some_are_to_go_there(
    changes: dict[str, object],
) -> None:
    unfit = replace(offload_folder(), **changes)  # type: ignore[arg-type]
    (finding,) = check_offload([unfit], {"n0": 5 * GIB})
    assert (finding.severity, finding.exit_code) == (Severity.FATAL, EXIT_ENVIRONMENT)
    (finding,) = check_offload([unfit], {"n0": 0})
    assert finding.severity is not Severity.FATAL


def test_a_model_that_only_one_host_sees_is_fatal_there_with_its_exit_code() -> None:
    missing = folder("n1", model_problem="there is no folder /data/m: copy it", model_exit_code=3)
    (finding,) = bad(check_folders([folder("n0"), missing]))
    assert (finding.host, finding.severity, finding.exit_code) == ("n1", Severity.FATAL, 3)
    assert "others do" in finding.cause


def test_a_half_copied_model_is_fatal() -> None:
    sentence = "2 of the 3 weight files are not in /data/m: copy the missing files"
    (finding,) = bad(check_folders([folder(model_problem=sentence, model_exit_code=3)]))
    assert finding.what == "2 of the 3 weight files are not in /data/m"
    assert finding.remedy == "copy the missing files"


@pytest.mark.parametrize(
    ("changes", "word", "severity"),
    [
        ({"output_problem": "Read-only file system"}, "Read-only", Severity.FATAL),
        ({"output_shared": False}, "another folder", Severity.FATAL),
        ({"output_free_bytes": 2**20}, "1.0 MiB", Severity.FATAL),
        ({"output_free_bytes": 0}, "0.0 MiB", Severity.FATAL),
        ({"output_free_bytes": 2**28}, "0.25 GiB", Severity.WARNING),
        ({"write_bytes_per_s": 1e4}, "0 MB/s", Severity.WARNING),
    ],
)
def test_output_folders_that_would_lose_the_results(
    changes: dict[str, object], word: str, severity: Severity
) -> None:
    (finding,) = bad(check_folders([folder("n0", **changes)]))
    assert (finding.check, finding.severity) == ("job.output", severity)
    assert word in finding.what


def test_a_file_system_that_counts_no_blocks_is_not_taken_for_full() -> None:
    (_, finding) = check_folders([folder(output_free_bytes=None)])
    assert finding.severity is Severity.OK
    assert "unknown" in finding.what


def test_shared_memory_without_a_limit_is_ok() -> None:
    assert not bad(check_ranks([node_of(healthy(r, 2), shm_free=-1) for r in (0, 1)]))


def test_an_output_folder_inside_the_container_is_told() -> None:
    inside = folder(output_system="overlay")
    assert not bad(check_folders([inside]))
    (finding,) = bad(check_folders([inside], container="apptainer"))
    assert "--bind" in finding.remedy


def test_a_model_that_takes_minutes_to_read_is_told() -> None:
    (finding,) = bad(check_folders([folder(read_bytes_per_s=1e7)], largest_stage_bytes=7 * GIB))
    assert "13 minutes" in finding.what


def link(
    source: int, target: int, hosts: tuple[str, str] = ("n0", "n1"), **figures: Any
) -> LinkFigure:
    usual = {"latency_us": 30.0, "bandwidth_gb_s": 10.0}
    return LinkFigure(source, target, *hosts, transport="nccl", **(usual | figures))


def test_every_edge_is_told_with_the_way_it_goes() -> None:
    near = link(1, 2, ("n1", "n1"), bandwidth_gb_s=200.0, route="P2P/CUMEM")
    findings = check_links([link(0, 1, route="NET/IB/0"), near], infiniband=True)
    assert not bad(findings)
    assert "rank 0 on n0 → rank 1 on n1: nccl via NET/IB/0, 30 µs, 10.00 GB/s" in findings[0].what
    assert "P2P/CUMEM" in findings[1].what


def test_a_slow_edge_is_told_and_one_slower_than_its_like_too() -> None:
    (slow,) = bad(check_links([link(0, 1, bandwidth_gb_s=0.01)]))
    assert "slow network" in slow.cause
    (odd,) = bad(check_links([link(0, 1), link(1, 2), link(2, 3, bandwidth_gb_s=2.0)]))
    assert "others of its kind reach 10.00 GB/s" in odd.cause


def test_a_way_that_nccl_should_not_go_is_told() -> None:
    socket = link(0, 1, route="NET/Socket/0")
    assert not bad(check_links([socket]))
    (missed,) = bad(check_links([socket], infiniband=True))
    assert "InfiniBand" in missed.cause
    (inside,) = bad(check_links([replace(socket, target_host="n0")]))
    assert "inside one host" in inside.cause
