"""What one rank sees of launch, software, host, GPU and links: plain values that travel as JSON.

`probes` read them, `checks` say what they mean. Every field has a default, so that a test states
only what matters to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.nvml import GpuProcess

__all__ = [
    "LaunchFacts",
    "Library",
    "LinkFigure",
    "NodeFacts",
    "RankFacts",
    "RankGpu",
    "SoftwareFacts",
    "Wheel",
]


@dataclass(frozen=True, slots=True)
class LaunchFacts:
    """How this rank was started, and the MPI it found."""

    launcher: str = "none"  # topology.launcher.Launcher
    world_size: int = 1
    srun_mpi: str = ""  # what srun's --mpi was
    mpi_library: str = ""  # name and version; empty without MPI
    mpi_abi: str = ""  # topology.mpi_abi.MpiAbi that mpi4py speaks; empty: not known
    mpi_path: str = ""  # of the libmpi that is loaded, the one of that ABI
    thread_level: str = ""
    slurm_job: str = ""
    wall_left_s: float | None = None  # None: unknown, or no limit
    idle_nodes: int = 0  # of the job, without a rank


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library by its short name, e.g. "libnccl"."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed package; `wanted`: the version that torch pins, empty when it pins none."""

    name: str
    version: str
    folder: str
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class SoftwareFacts:
    """The Python environment of this rank."""

    versions: dict[str, str] = field(default_factory=dict)  # package → version; "" not installed
    user_site: str = ""  # the folder, when this Python looks into it
    torch_path: str = ""  # folder of the package that is imported
    torch_copies: tuple[str, ...] = ()  # every torch on sys.path, the one that wins first
    torch_cuda: str = ""  # that torch was built for; empty: CPU only
    torch_problem: str = ""  # why it cannot be imported
    torch_import_s: float = 0.0
    nvidia_wheels: tuple[Wheel, ...] = ()
    bundled: tuple[str, ...] = ()  # library names that come with torch and its wheels
    loaded: tuple[Library, ...] = ()  # CUDA and MPI libraries of this process after import
    search_path: tuple[str, ...] = ()  # the folders of LD_LIBRARY_PATH
    on_search_path: tuple[Library, ...] = ()  # CUDA libraries in them
    hub_offline: bool = False


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The host of this rank. Sizes in bytes; -1: unlimited; None: not known."""

    num_cores: int = 1  # usable by this rank
    memory_available: int = 0  # within every limit
    memory_limit: int | None = None  # the tightest of the cgroups
    oom_kills: int = 0  # in the own cgroup, so far
    shm_free: int | None = None  # of /dev/shm; None: not there or not writable
    memlock: int = -1
    max_open_files: int = -1
    container: str = ""
    infiniband: bool = False
    default_route: bool = True
    profilers: tuple[str, ...] = ()
    sacct: bool = False


@dataclass(frozen=True, slots=True)
class RankGpu:
    """What can be seen of NVIDIA GPUs from here. `rank_gpu` is the one this rank would use."""

    wanted: str = "auto"  # pipeline.device
    kernel_driver: str = ""  # version that the kernel module states
    device_files: tuple[str, ...] = ()
    libcuda: str = ""  # real path of the driver library that loads
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    given_by_slurm: str = ""  # GPUs of the step or job, as Slurm names them
    # What says that this process is to have no GPU: "Slurm", or the name of a variable.
    declined_by: str = ""
    rank_gpu: GpuFacts = field(default_factory=GpuFacts)
    free_before_bytes: int | None = None  # of that GPU, before this rank touched it
    host_gpus: tuple[str, ...] = ()  # uuids of all GPUs that the driver lists
    processes: tuple[GpuProcess, ...] = ()  # of others, before this rank touched a GPU


@dataclass(frozen=True, slots=True)
class RankFacts:
    """Everything one rank tells the head."""

    rank: int = 0
    host: str = ""
    launch: LaunchFacts = field(default_factory=LaunchFacts)
    software: SoftwareFacts = field(default_factory=SoftwareFacts)
    node: NodeFacts = field(default_factory=NodeFacts)
    gpu: RankGpu = field(default_factory=RankGpu)
    config_hash: str = ""
    config_problem: str = ""  # why the configuration cannot be read here
    config_exit_code: int = 0  # of that


@dataclass(frozen=True, slots=True)
class LinkFigure:
    """One directed pair of ranks. Latency is half a round trip of 1 KiB."""

    source: int  # rank
    target: int
    source_host: str
    target_host: str
    transport: str  # "nccl" | "mpi" | "mpi through host memory"
    latency_us: float  # median
    bandwidth_gb_s: float  # 10⁹ bytes per second, of the fastest size
    route: str = ""  # that NCCL says it takes, e.g. "NET/Socket/0"
