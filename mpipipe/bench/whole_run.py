"""A whole `mpipipe run` as a benchmark: the prompt file it reads, and a record of what it left.

The prompts are those of `bench throughput` for the same work, as token ids: both do the same, so
what a run makes less of it in its generate phase is what reading, recording and writing cost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpipipe.bench.workloads import BenchWork, bench_requests
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.config.load import load_config
from mpipipe.errors import ConfigError, OutputError
from mpipipe.plain_values import json_object
from mpipipe.planning.model_facts import read_model

__all__ = ["MEDIAN_PROMPT", "RUN_MODE", "KernelCache", "WholeRun"]

RUN_MODE = "run"  # the `mode` of these records
# Whose token `first_token_s` is (`first_token_of`).
FIRST_PROMPT, MEDIAN_PROMPT = "first prompt", "median prompt"
_SEED = 0  # as `bench throughput` has it by default

KernelCache = Literal["", "cold", "warm"]


@dataclass(frozen=True, slots=True)
class WholeRun:
    """One run, in a folder of its own.

    `kernels`: "cold": Triton's cache is a folder that is emptied before; "warm": the same folder,
    as it is; "": Triton's usual one.
    """

    work: str
    config: Path
    settings: tuple[str, ...]  # section.key=value
    folder: Path  # of the run
    kernels: KernelCache = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The command without the launcher, from `run` on."""
        own = (
            f"prompts.path={self._prompts}",
            f"output.dir={self.folder}",
            "output.overwrite=true",
            "generation.ignore_eos=true",  # as `bench throughput` does it
        )
        return ("run", str(self.config), *self.settings, *own)

    @property
    def environ(self) -> dict[str, str]:
        """What the ranks find in their environment beside what is there."""
        return {"TRITON_CACHE_DIR": str(self._kernel_folder)} if self.kernels else {}

    @property
    def _prompts(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.prompts.jsonl")

    @property
    def _kernel_folder(self) -> Path:
        return self.folder.with_name("kernels")

    def prepare(self) -> None:
        """Write the prompts; empty the kernel cache, where it is to be cold.

        Raises:
            MpipipeError: a wrong setting or model folder, a file that cannot be written, or no
                cold start before a warm one.
        """
        if self.kernels == "warm" and not self._kernel_folder.is_dir():
            raise ConfigError(
                f"there is no {self._kernel_folder}, so the kernel cache would be cold: let a cold "
                "start with the same --out go before"
            )
        model = read_model(load_config(self.config, self.settings))
        vocabulary = Vocabulary.of(model.folder, model.spec)
        lines = [
            {
                "id": request.request_id,
                "prompt": request.prompt_ids,
                "max_new_tokens": request.sampling.max_new_tokens,
            }
            for request in bench_requests(BenchWork.parse(self.work), vocabulary, _SEED)
        ]
        try:
            self._prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise OutputError(
                f"{self._prompts} cannot be written ({error.strerror}): choose another --out"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)  # its files are no results of this run
        if self.kernels == "cold":
            shutil.rmtree(self._kernel_folder, ignore_errors=True)
            self._kernel_folder.mkdir(parents=True)

    def failed(self) -> None:
        """Leave no warm kernel cache behind a cold start that did not come to its end."""
        if self.kernels == "cold":
            shutil.rmtree(self._kernel_folder, ignore_errors=True)

    def record(self, command_s: float) -> dict[str, Any]:
        """What the run was, by its files; `command_s`: from starting mpirun to its end.

        `first_token_s` counts from the start of rank 0's process, `start` are its parts (none
        before they were told); `first_token_of`: the first prompt to have one, or the median where
        the run tells no more. `merged_per_s`: prompts a second from the first step to the merged
        file. Null: not told.

        Raises:
            OutputError: the run has not completed every prompt with every token, or its files are
                not there.
        """
        metrics, manifest = self._object("metrics.json"), self._object("manifest.json")
        work = BenchWork.parse(self.work)
        self._check(work)
        phases, requests = metrics["phases"], metrics["requests"]
        told_s = requests.get("ttft_min_s")
        ttft_s = requests["ttft_p50_s"] if told_s is None else told_s
        predicted = metrics.get("predicted") or {}
        return {
            "mode": RUN_MODE,
            "work": work.name,
            "kernels": self.kernels,
            "tokens_per_s": metrics["output_tokens_per_s"],
            "first_token_s": phases["boot_s"] + phases["load_s"] + ttft_s,
            "first_token_of": MEDIAN_PROMPT if told_s is None else FIRST_PROMPT,
            "start": metrics.get("start") or {},
            "phases": phases,
            "command_s": command_s,
            "merged_per_s": work.num_prompts / (phases["generate_s"] + phases["shutdown_s"]),
            "predicted": {
                name: predicted.get(name) for name in ("tokens_per_s", "start_s", "generate_s")
            },
            "num_cached_kernels": self._num_cached(),
            "plan": {
                "split": [
                    stage["last_layer"] - stage["first_layer"]
                    for stage in manifest["plan"]["stages"]
                ],
                "hash": manifest["hashes"]["plan"],
            },
            "devices": list(self._devices()),
            "versions": manifest["versions"],
            "date": manifest["started"],
        }

    def _check(self, work: BenchWork) -> None:
        """Every prompt has its completion, in the order of the file and of the length asked for."""
        path = self.folder / "completions.jsonl"
        lengths = work.lengths(_SEED)
        number = 0
        for line in _lines(path):
            if number == len(lengths) or line.get("id") != str(number):
                break
            if line.get("num_output_tokens") != lengths[number][1]:
                break
            number += 1
        else:
            if number == len(lengths):
                return
        raise OutputError(
            f"line {number + 1} of {path} is not the completion that was asked for, of "
            f"{len(lengths)}: look at the run's errors there and in rank_0.log"
        )

    def _object(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json_object(path.read_bytes())
        except OSError as error:
            raise OutputError(
                f"the run left no {path} ({error.strerror}): see what it printed"
            ) from error
        if found is None:
            raise OutputError(f"{path} is no JSON object: was the run stopped?")
        return found

    def _devices(self) -> Iterator[str]:
        """Of each rank, as it has told in the handshake."""
        for event in _lines(self.folder / "rank_0.log"):
            if event.get("event") == "handshake":
                for rank in event.get("resources") or ():
                    yield (rank.get("gpu") or {}).get("name") or "cpu"
                return

    def _num_cached(self) -> int | None:
        """Entries of the kernel cache."""
        if not self.kernels:
            return None
        return len(list(self._kernel_folder.iterdir()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; none, if there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                yield json_object(line) or {}
