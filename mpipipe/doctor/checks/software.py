"""Checks the Python environment of one rank: which torch, which CUDA libraries. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpipipe.doctor.checks.gpu import wants_gpu
from mpipipe.doctor.facts import Library, RankFacts, SoftwareFacts
from mpipipe.doctor.finding import Finding, fatal, ok, warning

__all__ = ["check_software"]

_REQUIRED = ("transformers", "safetensors")
_SLOW_IMPORT_S = 30.0  # 2–5 s from a local disk
_NV_FOLDER = "/.singularity.d/"  # where apptainer --nv binds the host's driver
_CUDA_MAJOR = re.compile(r"(nvidia-.+)-cu(\d+)")
# What the loader says, e.g. "libgomp.so.1: cannot open shared object file: No such file …" and
# "/lib64/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by …)".
_MISSING = re.compile(r"(lib[\w+.-]+\.so[\w.]*): cannot open shared object file")
_TOO_OLD = re.compile(r"(\S+\.so[\w.]*): version [`'\"]?([\w.]+)['\"]? not found")
# Libraries that come in the wheels of torch and NVIDIA.
_OF_TORCH = re.compile(
    r"lib(torch|c10|shm|caffe2|cu(da|pti|blas|dnn|fft|file|rand|solver|sparse)|nccl|nv)"
)
_DEBIAN = {
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libgomp.so.1": "libgomp1",
    "libnuma.so.1": "libnuma1",
    "libz.so.1": "zlib1g",
}
_NO_USER_SITE = (
    "export PYTHONNOUSERSITE=1 (apptainer: --env PYTHONNOUSERSITE=1, or --no-home), or pip "
    "uninstall it there"
)


def check_software(rank: RankFacts) -> Iterator[Finding]:
    """Findings of one rank."""
    software = rank.software
    # Whether what is odd has done harm: then it is the likely cause, and the job is lost.
    no_gpu = bool(rank.gpu.rank_gpu.problem) and wants_gpu(rank.gpu)
    harmed = bool(software.torch_problem) or no_gpu
    yield from _shadowed_torch(software, container=rank.node.container, harmed=harmed)
    yield from _stray_wheels(software, harmed=harmed)
    yield from _foreign_libraries(software, harmed=harmed)
    yield _torch(software)
    missing = [name for name in _REQUIRED if not software.versions.get(name)]
    if missing:
        yield fatal(
            "software.packages",
            f"{' and '.join(missing)} not installed in this Python",
            "another environment is active than the one mpipipe was installed into",
            f"activate it in the batch script, or pip install {' '.join(missing)}",
        )
    yield _offline(rank)


def _torch(software: SoftwareFacts) -> Finding:
    version = software.versions.get("torch", "")
    if not version and not software.torch_path:
        return fatal(
            "software.torch",
            "torch is not installed in this Python",
            "another environment is active than the one mpipipe was installed into",
            "activate it in the batch script, or install torch; MPIPIPE_VENV or MPIPIPE_IMAGE in "
            "launch/site.env name it",
        )
    if software.torch_problem:
        return _unimportable(software, version)
    built = f"CUDA {software.torch_cuda}" if software.torch_cuda else "CPUs"
    what = f"torch {version} for {built} from {software.torch_path}"
    values = {"import_s": software.torch_import_s}
    if software.torch_import_s > _SLOW_IMPORT_S:
        return warning(
            "software.torch",
            f"{what} took {software.torch_import_s:.0f} s to import",
            "thousands of small files on a busy parallel file system",
            "use the Apptainer image (one file), or put the environment on a local disk",
            **values,
        )
    return ok("software.torch", what, **values)


def _unimportable(software: SoftwareFacts, version: str) -> Finding:
    """Installing torch again helps only where what is missing came with torch."""
    problem = software.torch_problem
    missing, old = _MISSING.search(problem), _TOO_OLD.search(problem)
    if missing and not _OF_TORCH.match(missing[1]):
        package = _DEBIAN.get(missing[1], "")
        named = f" (Debian and Ubuntu: {package})" if package else ""
        cause = f"{missing[1]} is a library of the system, and is not there for torch to load"
        remedy = (
            f"have {missing[1]}{named} installed on the host or in the image, or load the module "
            "that has it; torch itself need not be installed again"
        )
    elif old and not _OF_TORCH.match(Path(old[1]).name):
        cause = f"{old[1]} is older than torch or one of its packages needs: it lacks {old[2]}"
        remedy = (
            "use a newer system (the Apptainer image), load a newer compiler's module, or take the "
            "folder of the old library out of LD_LIBRARY_PATH"
        )
    else:
        cause = "a library or package that it needs is missing, or one of another build wins"
        remedy = "see the other findings of this group; else install torch again"
    what = f"torch {version} cannot be imported from {software.torch_path}: {problem}"
    return fatal("software.torch", what, cause, remedy)


def _shadowed_torch(software: SoftwareFacts, *, container: str, harmed: bool) -> Iterator[Finding]:
    """A torch in the user's site folder that wins over the environment's or the image's."""
    taken, *others = software.torch_copies or ("",)
    if not software.user_site or not _inside(taken, software.user_site):
        return
    others = [path for path in others if not _inside(path, software.user_site)]
    if not others and not container:
        return  # the user's site is where it was installed on purpose
    whose = f"the {container} image's" if container else "this environment's"
    instead = f" ({others[0]})" if others else ""
    level = fatal if harmed else warning
    yield level(
        "software.user_site",
        f"torch is taken from {taken} and not {whose}{instead}",
        "a `pip install --user` some time ago; Python looks there first, and containers see "
        "the home folder",
        _NO_USER_SITE,
    )


def _stray_wheels(software: SoftwareFacts, *, harmed: bool) -> Iterator[Finding]:
    """NVIDIA wheels of another CUDA, of another version than torch pins, or of another folder."""
    level = fatal if harmed else warning
    for stem, names in _doubled_majors(software).items():
        yield level(
            "software.wheels",
            f"{' and '.join(names)} are both installed",
            f"both put their files into nvidia/{stem.removeprefix('nvidia-')}; the last one "
            "installed has overwritten the other",
            "pip uninstall the one that is not of torch's CUDA, then pip install "
            "--force-reinstall the other",
        )
    for wheel in software.nvidia_wheels:
        strayed = software.user_site and _inside(wheel.folder, software.user_site)
        if strayed and not _inside(software.torch_path, software.user_site):
            what = f"{wheel.name} {wheel.version} lies in {wheel.folder}, torch does not"
            cause, remedy = "a `pip install --user` some time ago", _NO_USER_SITE
        elif wheel.wanted and wheel.wanted != wheel.version:
            what = f"{wheel.name} is {wheel.version}, but torch was built with {wheel.wanted}"
            cause = "another package has replaced it"
            remedy = f"pip install {wheel.name}=={wheel.wanted}"
        else:
            continue
        yield level("software.wheels", what, cause, remedy)


def _doubled_majors(software: SoftwareFacts) -> dict[str, list[str]]:
    """Wheels that are installed for two CUDA majors, by their name without it."""
    found: dict[str, list[str]] = {}
    for wheel in software.nvidia_wheels:
        if match := _CUDA_MAJOR.fullmatch(wheel.name):
            found.setdefault(match[1], []).append(wheel.name)
    return {stem: names for stem, names in found.items() if len(set(names)) > 1}


def _foreign_libraries(software: SoftwareFacts, *, harmed: bool) -> Iterator[Finding]:
    """CUDA libraries that LD_LIBRARY_PATH puts before those that torch brings along."""
    taken = [
        library
        for library in software.loaded
        if library.name in software.bundled and _in_any(library.path, software.search_path)
    ]
    if not taken and software.torch_problem:
        taken = [lib for lib in software.on_search_path if lib.name in software.bundled]
    if not taken and harmed:
        taken = [library for library in software.on_search_path if _is_stray_driver(library)]
    if not taken:
        return
    names = ", ".join(dict.fromkeys(library.path for library in taken[:3]))
    folders = " and ".join(dict.fromkeys(str(Path(library.path).parent) for library in taken))
    level = fatal if harmed else warning
    yield level(
        "software.libraries",
        f"LD_LIBRARY_PATH puts {names} before torch's own",
        "a CUDA or NCCL module is loaded, or the host's LD_LIBRARY_PATH leaks into the container",
        f"unset LD_LIBRARY_PATH, or take {folders} out of it (module unload cuda; "
        "apptainer --cleanenv)",
    )


def _is_stray_driver(library: Library) -> bool:
    """A libcuda that `--nv` has not put there."""
    return library.name == "libcuda" and not library.path.startswith(_NV_FOLDER)


def _in_any(path: str, folders: Sequence[str]) -> bool:
    return any(str(Path(path).parent) == folder.rstrip("/") for folder in folders)


def _inside(path: str, folder: str) -> bool:
    return bool(path) and Path(path).is_relative_to(folder)


def _offline(rank: RankFacts) -> Finding:
    """Whether something could wait for a network that is not there."""
    node = rank.node
    if rank.software.hub_offline:
        return ok("software.network", "HF_HUB_OFFLINE is set: nothing is looked for on a hub")
    if node.default_route and not (rank.launch.slurm_job or node.container):
        return ok("software.network", "there is a route out; mpipipe fetches nothing through it")
    what = "compute nodes seldom reach the internet"
    if not node.default_route:
        what = "there is no route out of this host"
    return warning(
        "software.network",
        f"{what}, and HF_HUB_OFFLINE is not set",
        "a library that looks for something on a model hub would wait for its timeouts",
        "export HF_HUB_OFFLINE=1 in the batch script; the model must be a folder that is there",
    )
