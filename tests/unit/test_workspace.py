"""The folder of a job: copies of what it reads, and a file that a shell can source."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import CheckpointError, ConfigError, OutputError
from mpipipe.run_folder.workspace import (
    JOB_FILE,
    how_to_go_on,
    job_workspace,
    prepare_workspace,
)
from mpipipe.topology.slurm import SlurmJob


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """`site/base.toml`, and `my work/exp.toml` on top of it, with a name that needs quotes."""
    work = tmp_path / "my work"
    work.mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site/base.toml").write_text("[generation]\nseed = 7\n")
    (work / "exp.toml").write_text(
        'extends = "../site/base.toml"\n[model]\npath = "model"\n[prompts]\npath = "p.jsonl"\n'
    )
    (work / "p.jsonl").write_text('{"prompt": "a"}\n')
    (work / "model").mkdir()
    return work


def sourced(job_file: Path) -> dict[str, list[str]]:
    """The variables that bash gets from the file."""
    script = f"source {shlex.quote(str(job_file))}\n" + "".join(
        f'printf "%s\\0" {name} "${{{name}[@]}}"; printf "\\n\\0"\n'
        for name in ("config", "models", "words", "profiler")
    )
    out = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    groups = out.stdout.removesuffix("\n\0").split("\n\0")
    return {name: words for name, *words in (group[:-1].split("\0") for group in groups)}


def test_a_run_from_the_copies_has_the_settings_of_the_originals(
    project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "the job"
    words = ["generation.stop=it's $HOME", "generation.max_new_tokens=3", "profile.tool=perf"]
    job = sourced(prepare_workspace(project / "exp.toml", words, folder))
    (project / "exp.toml").unlink()
    (tmp_path / "site/base.toml").unlink()
    (project / "p.jsonl").unlink()

    config = load_config(Path(job["config"][0]), job["words"]).config

    assert job["profiler"] == ["perf"]
    assert config.generation.seed == 7, "from the copy of the base"
    assert config.generation.stop == ("it's $HOME",)
    assert config.generation.max_new_tokens == 3
    assert Path(config.prompts.path).read_text() == '{"prompt": "a"}\n'
    assert config.model.path == str(project / "model")
    assert job["models"] == [str(project / "model")]
    assert config.output.dir == str(folder / "outputs")
    assert (folder / "outputs").is_dir()
    assert config.name == "exp"


def test_what_lies_beside_an_older_style_file_comes_with_it(tmp_path: Path) -> None:
    work = tmp_path / "old"
    work.mkdir()
    (work / "exp_config.json").write_text(json.dumps({"model_path": "/m", "prompts": ["a", "b"]}))
    (work / "ds_config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2}))

    job = sourced(prepare_workspace(work / "exp_config.json", [], tmp_path / "job"))
    loaded = load_config(Path(job["config"][0]), job["words"])

    assert loaded.inline_prompts, "prompts inside the file stay there"
    assert loaded.deepspeed is not None
    assert loaded.deepspeed.path.parent == tmp_path / "job/config"


def test_a_tokenizer_that_lies_apart_is_bound_too(project: Path, tmp_path: Path) -> None:
    words = [f"model.tokenizer_path={tmp_path / 'tokenizer'}"]
    job = sourced(prepare_workspace(project / "exp.toml", words, tmp_path / "job"))
    assert job["models"] == [str(project / "model"), str(tmp_path / "tokenizer")]


def test_prompts_that_are_missing_leave_no_job_file(project: Path, tmp_path: Path) -> None:
    (project / "p.jsonl").unlink()
    with pytest.raises(OutputError, match=r"p\.jsonl"):
        prepare_workspace(project / "exp.toml", [], tmp_path / "job")
    assert not (tmp_path / "job" / JOB_FILE).exists()


def test_a_wrong_setting_is_told_before_anything_is_copied(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_new_tokenz"):
        prepare_workspace(project / "exp.toml", ["generation.max_new_tokenz=3"], tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_demo_model_that_was_not_fetched_is_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="mpipipe demo-model"):
        prepare_workspace(project / "exp.toml", ["model.path=demo:smollm2"], tmp_path / "job")


# ---- which folder --------------------------------------------------------------------------------

FIRST, AGAIN, THIRD = (SlurmJob("4711_2", restarts, None) for restarts in range(3))


def folder_of(project: Path, job: SlurmJob, *words: str) -> str:
    scratch = project.parent / "scratch"
    return job_workspace(project / "exp.toml", words, scratch, job).parent.name


def test_each_command_of_a_job_has_its_own_folder(project: Path) -> None:
    seeds = [folder_of(project, FIRST, f"generation.seed={seed}") for seed in (1, 2, 2)]
    assert seeds == ["exp-4711_2", "exp.2-4711_2", "exp.3-4711_2"]


def test_a_job_that_starts_again_finds_the_folder_of_each_of_its_commands(project: Path) -> None:
    """In whatever order, and of two commands that are the same each its own."""
    one, two = "generation.seed=1", "generation.seed=2"
    first = [folder_of(project, FIRST, word) for word in (one, two, two)]
    (project / "p.jsonl").write_text('{"prompt": "edited"}\n')
    again = [folder_of(project, AGAIN, word) for word in (two, two, one)]
    assert again == [first[1], first[2], first[0]]
    copy = project.parent / "scratch" / first[0] / "prompts/p.jsonl"
    assert copy.read_text() == '{"prompt": "a"}\n', "as it was the first time"
    assert folder_of(project, THIRD, one) == first[0]
    assert folder_of(project, THIRD, "generation.seed=3") == "exp.4-4711_2"


def test_a_folder_without_a_request_is_found_by_the_job_that_starts_again(project: Path) -> None:
    """Made before there were any, or the node was lost between the two files."""
    first = folder_of(project, FIRST)
    (project.parent / "scratch" / first / "request.json").unlink()
    assert folder_of(project, AGAIN) == first
    assert folder_of(project, AGAIN) == "exp.2-4711_2", "another command of the same attempt"


def test_what_was_not_made_to_its_end_is_made_again(project: Path) -> None:
    folder = project.parent / "scratch/exp-4711_2"
    folder.mkdir(parents=True)
    (folder / "request.json").write_text("{")
    assert folder_of(project, AGAIN) == folder.name
    assert (folder / JOB_FILE).exists()


def test_another_run_folder_is_refused_and_how_to_go_on_is_told(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"sbatch launch/submit\.sbatch FOLDER"):
        folder_of(project, FIRST, "output.dir=/elsewhere/outputs")


def test_how_to_go_on_names_the_folder_of_a_job(project: Path, tmp_path: Path) -> None:
    scratch = project.parent / "scratch"
    job_file = job_workspace(project / "exp.toml", (), scratch, FIRST)
    assert how_to_go_on(job_file.parent / "outputs").endswith(
        f"sbatch launch/submit.sbatch {shlex.quote(str(job_file.parent))}"
    )
    assert "output.resume=true" in how_to_go_on(tmp_path / "runs/x/outputs")


def test_a_prompt_file_after_the_configuration_is_copied_and_the_copy_wins(
    project: Path, tmp_path: Path
) -> None:
    other = project / "other.jsonl"
    other.write_text('{"prompt": "b"}\n')
    job = sourced(prepare_workspace(project / "exp.toml", [str(other)], tmp_path / "job"))
    other.unlink()
    config = load_config(Path(job["config"][0]), job["words"]).config
    assert Path(config.prompts.path).read_text() == '{"prompt": "b"}\n'


def test_what_a_job_cannot_start_from_is_a_sentence(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="standard input"):
        prepare_workspace(project / "exp.toml", ["-"], tmp_path / "job")
    (project / "model/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="configuration file"):
        prepare_workspace(project / "model", [], tmp_path / "job")
