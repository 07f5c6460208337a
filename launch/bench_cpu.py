r"""One model on one process's CPU threads: mpipipe beside transformers, OpenVINO GenAI, llama.cpp.

    python launch/bench_cpu.py --threads 1 --gguf smollm2-f16.gguf

Every engine loads in a process of its own and then waits; the parent has each case timed by one
engine after the other, round by round, so that what disturbs the machine disturbs them alike.
Prefill: the time of prompts with one new token each. Decode: what more tokens take, per round of
all rows. The ids are random and the same for all. OpenVINO GenAI (`openvino_genai`) and llama.cpp
(`llama_cpp`) are timed where they are installed and a GGUF file of the model is given; they compute
in the types they choose, which is told. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

from mpipipe.demo.model import DEMO_MODEL, demo_model_folder

# What an engine makes of prompts, a list of ids each: so many new ids of each.
Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]

_VOCABULARY = range(100, 30_000)  # no special tokens in the models that this is for
_DECODE_PROMPT = 32  # tokens before the rows that decode steps are timed with


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="CPU engines beside each other.")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder")
    parser.add_argument("--gguf", default="", help="the same model for the other two engines")
    parser.add_argument("--dtype", default="float32", help="of mpipipe and transformers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", default="1x512,1x2048", help="prompts x tokens, with commas")
    parser.add_argument("--rows", default="1,4,16", help="of decode steps, with commas")
    parser.add_argument("--steps", type=int, default=16, help="decode steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", default=",".join(_ENGINES), help="with commas")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count seconds of CPU: for one thread on a machine that is not idle",
    )
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model == DEMO_MODEL:
        options.model = str(demo_model_folder())
    return options


# ---- engines -------------------------------------------------------------------------------------


def mpipipe_engine(options: argparse.Namespace) -> Generate:
    """One rank: the whole way of a request, scheduler included."""
    from mpipipe import Pipeline

    pipeline = Pipeline(
        options.model,
        f"model.dtype={options.dtype}",
        f"pipeline.threads_per_rank={options.threads}",
        "pipeline.device=cpu",
        "memory.max_context_tokens=4096",
    ).__enter__()

    def generate(prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
        lines = [{"prompt": ids} for ids in prompts]
        settings = {"max_new_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        return [completion.token_ids for completion in pipeline.generate_sync(lines, **settings)]

    return generate


def transformers_engine(options: argparse.Namespace) -> Generate:
    """`generate`, all prompts in one batch."""
    from pathlib import Path

    from mpipipe.bench.baseline import BaselinePlace, generate_rows, open_baseline

    place = BaselinePlace(num_threads=options.threads)
    model = open_baseline(Path(options.model), options.dtype, place, random=False)

    return partial(generate_rows, model, ignore_eos=True)


def openvino_engine(options: argparse.Namespace, precision: str) -> Generate:
    """`LLMPipeline` of the GGUF file, all prompts in one batch."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        options.gguf,
        "CPU",
        INFERENCE_NUM_THREADS=options.threads,
        INFERENCE_PRECISION_HINT=precision,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = num_tokens, False, True
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        return [list(row) for row in pipeline.generate(inputs, settings).tokens]

    return generate


def llama_cpp_engine(options: argparse.Namespace) -> Generate:
    """llama.cpp's own calls: one batch of all prompts, then one of a token of each, and so on."""
    import llama_cpp
    import numpy as np

    sizes = [int(word.split("x")[1]) for word in options.prompts.split(",")]
    counts = [int(word.split("x")[0]) for word in options.prompts.split(",")]
    rows = max(*counts, *map(int, options.rows.split(",")))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = options.threads
    settings.n_seq_max, settings.kv_unified = rows, True
    most = max(n * size for n, size in zip(counts, sizes, strict=True)) + rows * 64
    settings.n_ctx = settings.n_batch = most + rows * (_DECODE_PROMPT + options.steps)
    model = llama_cpp.llama_model_load_from_file(
        options.gguf.encode(), llama_cpp.llama_model_default_params()
    )
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def computed(prompts: Sequence[Sequence[int]], first: int) -> list[int]:
        """The most probable id behind each of `prompts`, which go on at position `first`."""
        ends = []
        place = 0
        for sequence, ids in enumerate(prompts):
            for offset, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, first + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = offset == len(ids) - 1
                place += 1
            ends.append(place - 1)
        batch.n_tokens = place
        assert llama_cpp.llama_decode(context, batch) == 0, "llama_decode failed"
        scores = (llama_cpp.llama_get_logits_ith(context, end) for end in ends)
        return [int(np.ctypeslib.as_array(row, (size,)).argmax()) for row in scores]

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [[token] for token in computed(prompts, 0)]
        for step in range(num_tokens - 1):
            latest = computed([row[-1:] for row in rows], len(prompts[0]) + step)
            for row, token in zip(rows, latest, strict=True):
                row.append(token)
        return rows

    return generate


_ENGINES: dict[str, Callable[[argparse.Namespace], Generate]] = {
    "mpipipe": mpipipe_engine,
    "transformers": transformers_engine,
    "openvino-f32": lambda options: openvino_engine(options, "f32"),
    "openvino-bf16": lambda options: openvino_engine(options, "bf16"),
    "llama.cpp": llama_cpp_engine,
}
_PACKAGES = {
    "openvino-f32": "openvino_genai",
    "openvino-bf16": "openvino_genai",
    "llama.cpp": "llama_cpp",
}


# ---- processes -----------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Load, then time what each line asks for; everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate = _ENGINES[options.serve](options)
    now_s = time.process_time if options.cpu_time else time.perf_counter
    print(json.dumps("loaded"), file=answers)
    for line in sys.stdin:
        num_prompts, length, num_tokens, seed = json.loads(line)
        draw = random.Random(seed)
        prompts = [draw.choices(_VOCABULARY, k=length) for _ in range(num_prompts)]
        started_s = now_s()
        rows = generate(prompts, num_tokens)
        elapsed_s = now_s() - started_s
        assert [len(row) for row in rows] == [num_tokens] * num_prompts, "not the tokens asked for"
        print(json.dumps(elapsed_s), file=answers)


class Engine:
    """A process that serves one engine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    def started(cls, name: str, threads: int) -> Engine:
        """With the words of this command line."""
        command = [sys.executable, __file__, *sys.argv[1:], f"--serve={name}"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        engine = cls(process)
        engine.answer()
        return engine

    def answer(self) -> float:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args} ended with exit code {self._process.wait()}")
        value: float = json.loads(line)
        return value

    def seconds(self, num_prompts: int, length: int, num_tokens: int, seed: int) -> float:
        """Seconds of this work."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([num_prompts, length, num_tokens, seed]) + "\n")
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def usable(options: argparse.Namespace) -> list[str]:
    """The engines that can be timed here."""
    names = []
    for name in options.engines.split(","):
        package = _PACKAGES.get(name)
        if package is None or (options.gguf and find_spec(package) is not None):
            names.append(name)
        else:
            print(f"{name}: not timed, it needs the package {package} and --gguf", flush=True)
    return names


def rate_of(engine: Engine, case: tuple[str, int, int], steps: int, seed: int) -> float:
    """Tokens per second of one repeat of one case; no prompt is given twice: it may be cached."""
    kind, count, length = case
    first_s = engine.seconds(count, length, 1, 2 * seed)
    if kind == "prefill":
        return count * length / first_s
    return count * steps / (engine.seconds(count, length, 1 + steps, 2 * seed + 1) - first_s)


def main() -> None:
    """Time all cases with all engines, and print a table: tokens/s, median and best."""
    options = parsed()
    if options.serve:
        serve(options)
        return
    engines = {name: Engine.started(name, options.threads) for name in usable(options)}
    cases = [("prefill", *map(int, word.split("x"))) for word in options.prompts.split(",")]
    cases += [("decode", int(word), _DECODE_PROMPT) for word in options.rows.split(",")]
    seconds = "second of CPU" if options.cpu_time else "second"
    print(f"{options.threads} threads, {options.dtype}; tokens a {seconds}: median (best)")
    print("| work |", " | ".join(engines), "|")
    print("|---|" + "---:|" * len(engines))
    for number, case in enumerate(cases):
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(options.repeats + 1):
            seed = number * (options.repeats + 1) + repeat
            for name, engine in engines.items():
                rate = rate_of(engine, case, options.steps, seed)
                rates[name] += [rate] if repeat else []  # the first warms up
        cells = [f"{statistics.median(some):.1f} ({max(some):.1f})" for some in rates.values()]
        print(f"| {case[0]} {case[1]}×{case[2]} |", " | ".join(cells), "|", flush=True)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
