"""Valid inputs from which fuzzing starts: small ones of every form that a reader accepts."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from typing import Any

from mpipipe.control_plane.codec import encode
from mpipipe.control_plane.messages import (
    Broadcast,
    DecodeScheduled,
    GatherPart,
    Heartbeat,
    Hello,
    LogprobsSampled,
    PhaseReport,
    PhaseVerdict,
    RankLost,
    RequestOpened,
    ScheduledSequence,
    StepSampled,
    StepScheduled,
    StopRequested,
)
from mpipipe.planning.resources import RankResources
from mpipipe.run_folder.record_line import encode_line
from mpipipe.types import SamplingParams, TokenLogprobs


def _lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


# ---- prompts -------------------------------------------------------------------------------------

_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello 😀!"}]
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}},
}
PROMPTS = (
    _lines({"id": "a", "prompt": "The capital"}, {"id": 1, "prompt": "é"}, {"prompt": "x"}, "text"),
    _lines(
        {"id": "b", "messages": _CHAT},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]}]},
    ),
    _lines(
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": _CHAT,
                "max_tokens": 24,
                "n": 1,
                "stream": False,
                "tools": [_TOOL],
                "tool_choice": "auto",
                "response_format": {"type": "text"},
                "logit_bias": {},
                "chat_template_kwargs": {"thinking": True},
                "continue_final_message": False,
            },
        },
        {
            "custom_id": "d",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": ["x"], "max_tokens": 2},
        },
    ),
    _lines(
        {
            "id": "e",
            "prompt": "x",
            "max_new_tokens": 3,
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "seed": 7,
            "stop": ["a", "bc"],
            "stop_token_ids": [1, 2],
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
            "metadata": {"mine": [1]},
        },
        {"id": "f", "prompt": "y", "num_logprobs": 1, "stop": "z", "temperature": None},
    ),
    _lines(
        {
            "id": "t",
            "messages": [
                *_CHAT,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "add", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "3"},
                {"role": "assistant", "content": "It is"},
            ],
            "tools": [_TOOL],
        }
    ),
    (
        b'\xef\xbb\xbf{"id": "g", "prompt": "bom"}\r\n\r\n{"id": 3, "prompt": "a"}\n'
        b'{"id": "3", "prompt": "again"}\n{"prompt": \n2\n'
    ),
)

GZIPPED_PROMPTS = tuple(gzip.compress(content, mtime=0) for content in PROMPTS)
ZSTD_PROMPTS = (  # two short lines, as zstandard writes them; the library may not be there
    bytes.fromhex("28b52ffd201ff90000") + b'{"id": "a", "prompt": "x"}\n"y"\n',
)

# ---- configuration -------------------------------------------------------------------------------

TOML = (
    b"""extends = "base.toml"
name = "x"
[model]
path = "demo:smollm2"
dtype = "float32"
[prompts]
path = "prompts.jsonl"
limit = 3
[generation]
max_new_tokens = 48
temperature = 0.5
stop = ["a", "b"]
stop_token_ids = [1, 2]
seed = 7
[pipeline]
num_stages = "auto"
split = [14, 16]
handshake_timeout_s = 5
[memory]
kv_cache_bytes = 1000000
gpu_memory_fraction = 0.5
[output]
dir = "~/runs"
resume = "auto"
[log]
level = "info"
""",
    (
        b'model.path = "m"\nprompts.path = "p.jsonl"\ngeneration.top_p = 0.5\n'
        b"pipeline = {num_slots = 2}\n"
    ),
)
JSON = (
    _json(
        {
            "extends": "base.toml",
            "name": "x",
            "model": {"path": "m", "dtype": "auto", "trust_remote_code": False},
            "prompts": {"path": "p.jsonl", "limit": 2},
            "generation": {"temperature": 1, "stop": ["x"], "stop_token_ids": [3]},
            "pipeline": {"split": [1, 2], "num_stages": 2},
            "memory": {"num_kv_pages": 9, "page_size_tokens": 16},
            "output": {"dir": "auto", "overwrite": True},
            "log": {"progress": "none"},
        }
    ),
)
LEGACY = (
    _json(
        {
            "model_path": "m",
            "torch_dtype": "torch.float16",
            "prompts": ["a", {"prompt": "b"}],
            "output_path": "out/results.json",
            "max_length": 20,
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 5,
            "pipeline_parallel_size": 2,
            "batch_size": 4,
            "local_files_only": False,
            "num_beams": 1,
            "device_map": {"a": 0},
            "ds_config": "ds_config.json",
        }
    ),
    _json({"model_name": "m", "prompts_file": "p.jsonl", "max_new_tokens": 4, "seed": 1}),
    _json(
        {
            "model": {"name": "m", "dtype": "fp16"},
            "pipeline": {"stages": 2, "micro_batches": 4},
            "sampling": {"temperature": 0.1, "max_tokens": 5},
            "nodes": [{"host": "a", "gpus": 1}],
            "prompts": ["a"],
        }
    ),
)
DEEPSPEED = (
    _json(
        {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": "auto",
            "pipeline": {"stages": 2},
            "fp16": {"enabled": True},
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 0},
        }
    ),
    _json({"dtype": "fp16", "pipeline_parallel_size": 2, "tensor_parallel": {"tp_size": 1}}),
)
WORDS_OF_COMMAND = (
    b"generation.seed=7\nmodel.path=2024\ngeneration.stop=END\npipeline.split=14,16\noutput.dir=$HOME/x",
    b'generation.stop=["a", "b"]\ngeneration.stop=c\nmemory.num_kv_pages=auto\nname=\xe2\x82\xac',
    b"demo:smollm2\nprompts.jsonl\ngeneration.seed=7",
    b"exp.toml\noutput.dir=x\npipeline.num_stages=2",
    b"generation.temperature=0.5\nmodel.trust_remote_code=true\nlog.level=debug\noutput.resume=auto",
)

# ---- messages ------------------------------------------------------------------------------------

_HELLO = Hello(
    1,
    2,
    3,
    "0.1.0",
    "abc",
    RankResources(1, "node-b", 77, "srun", 4, 8 << 30, cores=((0, 2), (1, 3))),
)
_STEP = StepScheduled(
    7,
    1,
    (ScheduledSequence(3, 20, 1, (), True), ScheduledSequence(4, 0, 3, (5, 70_000), False)),
    True,
)
FRAMES = tuple(
    encode(message)
    for message in (
        _HELLO,
        PhaseReport("load", 1, "CheckpointError", "model\udcff.bin is gone", 3),
        PhaseVerdict("load"),
        Broadcast("x", b"\x00\xff"),
        GatherPart("x", b"{}"),
        RequestOpened(3, (1, 2, 49_000), SamplingParams(stop=("a",), stop_token_ids=(2,), seed=9)),
        _STEP,
        DecodeScheduled(7, 1, 2, (0,), (4,), (1,), (9,), True),
        StepSampled(7, (1, 2)),
        LogprobsSampled(7, (TokenLogprobs(1, -0.5, ((1, -0.5), (2, -1.0))), None)),
        StopRequested("SIGTERM on rank 1"),
        Heartbeat("node-b", 1, 7, "load", False, 0.5),
        RankLost(1, "rank 1 is silent"),
    )
)

# ---- model folders -------------------------------------------------------------------------------


def _safetensors(header: dict[str, Any], num_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


_TENSORS = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
HEADERS = (
    _safetensors(_TENSORS, 40),
    _safetensors({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, 8),
    _safetensors({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, 4),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
)
_SHARDS = {
    "model-00001-of-00002.safetensors": _safetensors(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8
    ),
    "model-00002-of-00002.safetensors": _safetensors(
        {"b": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, 4
    ),
}
_SHARD_OF = dict(zip(("a", "b"), _SHARDS, strict=True))
STAGED = (
    _json(
        {
            "source": "/models/a",
            "revision": "",
            "conversion": {"dtype": None, "shard_bytes": 7, "tokenizer": None},
            "read": {"config.json": {"num_bytes": 5, "mtime_ns": 7, "sha256": ""}},
            "num_files": 2,
            "command": "mpipipe stage-model /models/a /shared/a",
            "mpipipe_version": "1",
            "files": {"config.json": {"num_bytes": 5, "sha256": "0" * 64}},
            "finished_at": "2026-01-01T00:00:00+00:00",
            "format": 1,
        }
    ),
)
SUMS = (b"0" * 64 + b"  config.json\n", b"# made\r\n" + b"a" * 64 + b" *./model.safetensors\n")
INDEXES = (
    _json({"metadata": {"total_size": 12}, "weight_map": _SHARD_OF}),
    _json({"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
)


def _archive(*names: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"\x80\x02}q\x00.")
    return written.getvalue()


ARCHIVES = (_archive("archive/data.pkl", "archive/data/0", "archive/version"), b"\x80\x02}q\x00.")
MODEL_CONFIGS = (
    _json(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "max_position_embeddings": 128,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "eos_token_id": [1, 2],
        }
    ),
    _json(
        {
            "model_type": "opt",
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 300,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dtype": "auto",
        }
    ),
    _json(
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "head_dim": 16,
                "vocab_size": 300,
                "max_position_embeddings": 64,
                "num_local_experts": 4,
            },
            "quantization_config": None,
            "is_encoder_decoder": False,
        }
    ),
)
GENERATION_CONFIGS = (
    _json({"eos_token_id": [1, 2], "bos_token_id": 0, "do_sample": True, "temperature": 0.6}),
    _json(
        {"eos_token_id": 2, "repetition_penalty": 1.3, "top_k": None, "_from_model_config": True}
    ),
)


def model_files(but: str) -> dict[str, bytes]:
    """The other files of a folder in which `but` is the file of interest."""
    if but == "model.safetensors.index.json":
        return {**_SHARDS, "config.json": MODEL_CONFIGS[0]}
    if but in ("config.json", "generation_config.json"):
        return {"model.safetensors": HEADERS[0], "config.json": MODEL_CONFIGS[0]}
    return {"config.json": MODEL_CONFIGS[0]}


# ---- run folders ---------------------------------------------------------------------------------

RUN_PROMPTS = _lines(*({"id": name, "prompt": "x"} for name in ("a", "b", "c", "é")))
FINGERPRINT = {"model.path": "/models/a", "model.dtype": "float16", "generation.seed": 0}


def _record(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "text": "té 😀",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "num_prompt_tokens": 2,
        "num_output_tokens": 2,
        "queue_s": 0.1,
        "ttft_s": 0.2,
        "latency_s": 0.3,
        "tokens_per_s": 6.6,
        **more,
    }


def _journal(*records: dict[str, Any]) -> bytes:
    """Lines with their checksums."""
    return b"".join(
        encode_line(json.dumps(record, ensure_ascii=False)) + b"\n" for record in records
    )


_ERROR = {"kind": "invalid_json", "message": "line 2 is not valid JSON"}
JOURNALS = (
    _journal(_record("b"), _record("a", error=_ERROR), _record("é")),
    _journal(_record("b"), _record("b"), _record("unknown"))[:-20],
    _journal(_record("c", logprobs=[{"token_id": 1, "logprob": -0.5, "top": []}])) + bytes(40),
    _lines(_record("b"), _record("a", error=_ERROR), _record("c")),  # of a version without them
    b"",
)
_ATTEMPT = {
    "mpipipe": "0.1.0",
    "started": "2026-11-22T12:00:00+00:00",
    "job": "7",
    "hosts": ["a"],
    "num_kept": 0,
}
MANIFESTS = (
    _json(
        {
            "mpipipe": "0.1.0",
            "attempts": [_ATTEMPT],
            "basis": FINGERPRINT,
            "config": {},
            "hosts": [],
        }
    ),
    _json({"attempts": [_ATTEMPT, {**_ATTEMPT, "num_kept": 1}], "basis": FINGERPRINT}),
)
STATUS = (
    _json(
        {
            "state": "generating",
            "mpipipe": "0.1.0",
            "started_at": "2026-11-22T12:00:00+00:00",
            "hosts": ["a", "b"],
            "job_id": "7",
            "num_restarts": 0,
            "update_interval_s": 5.0,
            "num_prompts": 10,
            "num_kept": 2,
            "updated_at": "2026-11-22T12:00:05+00:00",
            "num_completed": 3,
            "num_failed": 1,
            "num_running": 2,
            "num_output_tokens": 40,
            "tokens_per_s": 5.5,
            "generating_s": 9.0,
            "stops_in_s": 100,
        }
    ),
    _json(
        {
            "state": "stopped",
            "started_at": "2026-11-22T12:00:00+00:00",
            "hosts": [],
            "job_id": None,
            "updated_at": "2026-11-22T12:00:05+00:00",
            "stop_reason": "SIGTERM",
            "exit_code": 75,
            "num_prompts": 1,
        }
    ),
    _json(
        {
            "state": "failed",
            "error": "a rank was lost",
            "job_id": "7",
            "num_restarts": 1,
            "hosts": ["a"],
            "updated_at": "2026-11-22T12:00:05+00:00",
        }
    ),
    _json(
        {
            "state": "done",
            "num_failed": 2,
            "num_prompts": 4,
            "updated_at": "2026-11-22T12:00:05+00:00",
        }
    ),
    _json({"state": "loading", "updated_at": "2026-11-22T12:00:05+00:00", "hosts": ["a"]}),
)
RUN_FILES = {
    "manifest.json": MANIFESTS[0],
    "completions_rank_0.jsonl": _journal(_record("b"), _record("a")),
    "status.json": STATUS[1],
}
SLURM_ANSWERS = (
    b"7|PENDING|Priority|2026-11-22T12:00:00|1:00:00||/home/a\n",
    b"7_1|RUNNING|None|2026-11-22T12:00:00|59:00|a[1-2]|/home/a|b\n7_2|PENDING|Resources|N/A|1:00||/home/a\n",
    b"7|COMPLETED|0:0|00:10:00|2026-11-22T12:00:00|/home/a\n7_2|FAILED|6:0|00:01:00|Unknown|/home/a\n",
)

_BY = {"run": "0123456789ab", "attempt": 1, "job": None, "replica": 0, "rank": 0, "stage": 0}
_PARTS = {f"{part}_s": 0.1 for part in ("idle", "wait", "transfer", "compute", "overhead", "send")}
# All kinds of lines in one file: each reader meets its own, and those of the others.
RUN_LINES = (
    _lines(
        {**_BY, "t_s": 1.0, "event": "boot", "name": "imports", "start_s": 0.0, "end_s": 1.0,
         "level": "info", "time": "2026-11-27T10:00:00Z", "host": "a", "bytes": 12},
        {**_BY, "t_s": 2.0, "event": "generating", "level": "info", "time": "", "host": "a"},
        {**_BY, "t_s": 3.0, "event": "held up", "level": "warning", "seconds": 1.0, "cpu_s": 0.0},
        {**_BY, "t_s": 4.0, "event": "ended early", "level": "error", "error": "e", "kind": "k"},
    ),
    _lines(
        *(
            {**_BY, "t_s": 2.6, "step": step, "slot": 0, "phase": "decode", "num_rows": 1,
             "num_tokens": 1, "start_s": 2.0 + step, **_PARTS, "bytes_in": 8, "bytes_out": 8}
            for step in range(2)
        ),
        {**_BY, "t_s": 9.0, "step": 3, "slot": 1, "phase": "mixed", "num_rows": 1,
         "num_tokens": 1, "start_s": 5.0, **_PARTS, "compute_s": 7.0, "bytes_in": 8,
         "bytes_out": 8},
    ),
    _lines(
        *(
            {**_BY, "t_s": t_s, "num_output_tokens": 5, "num_steps": 2, "cpu_percent": 50.0,
             "node_cpu_percent": 100.0, "rss_bytes": 5, "num_involuntary_switches": 500,
             "gpu": {"utilisation": 0.5, "power_w": 70.0}}
            for t_s in (2.0, 9.0)
        ),
    ),
    _lines(
        {**_BY, "t_s": 5.0, "id": "p", "index": 0, "slot": 0, "arrived_s": 1.0, "admitted_s": 2.0,
         "first_token_s": 3.0, "finished_s": 4.0, "latency_s": 3.0, "num_prompt_tokens": 1,
         "num_output_tokens": 9, "itl_p50_s": 0.1, "error_kind": None},
        {**_BY, "t_s": 5.0, "id": "q", "slot": 1, "arrived_s": 1.0, "admitted_s": 2.0,
         "finished_s": 9.0, "error_kind": None},
        {**_BY, "t_s": 1.0, "of_rank": 0, "offset_s": 0.5, "error_s": 0.1},
        {**_BY, "t_s": 5.0, "of_rank": 0, "offset_s": 0.6, "error_s": 0.1},
    ),
)  # fmt: skip
RUN_DOCUMENTS = (
    _json(
        {
            "schema": 1, "run": "0123456789ab", "attempt": 1, "attempts": [{"attempt": 1}],
            "plan": {"num_slots": 2, "device": "cpu"}, "config": {"name": "a", "list": [{"b": 1}]},
            "ranks": [{"rank": 0, "stage": {"num_steps": 3, "overall": {"compute_s": 7.2}}}],
            "state": "done", "time": {"io_read_s": 1.0}, "phases": {"generate_s": 7.0},
        }
    ),
)  # fmt: skip

# ---- generated tokens ----------------------------------------------------------------------------

WORDS = (b"", b" the", "é".encode(), "😀".encode()[:2], "😀".encode()[2:], b"\xe2", b"END", b"")
GENERATED = (
    b"\xfehello " + "é😀".encode(),
    b"END|stop\xfehello \xf9 END \xff more",
    b"\xfe" + b"\xf8" * 70 + "😀".encode()[:3] + b"\xf8" * 70 + "😀".encode()[3:] + b"a",
    b"\xfe\xfb\xfc\xf8\xfa\xfd\x82\xac ok \n" * 3,
    b"a\xfe" + b"\xf8" * 200 + b"\xfb\xf8\xfc\xf9",
)

TEXTS = ("  two  spaces, é 😀 漢字 <s> </s> <|im_end|>\n".encode(), b"the quick brown fox", b"")
