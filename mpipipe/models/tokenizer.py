"""Text to token ids and back, for the three forms in which models ship their tokenizers.

| files in the folder | read by |
|---|---|
| `tokenizer.json` | transformers (`AutoTokenizer`) |
| `vocab.json` + `merges.txt` | transformers (`AutoTokenizer`) |
| `tokenizer.model` alone | sentencepiece (`sentencepiece_tokenizer`) |

Why not transformers for the third: 5.17–5.23 rebuild a sentencepiece model as a different one. With
`tokenizer.model` alone they add neither BOS nor the leading space; with a `LlamaTokenizer`
configuration they drop its normaliser and one leading space. sentencepiece is what the model was
trained with. Non-purpose: incremental text (`scheduler/detokenize.py`).

Invariants: nothing is downloaded; encoding and decoding are pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.errors import CheckpointError
from mpipipe.models.chat import Message, no_chat_template, refused_by_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenizer", "TransformersTokenizer", "open_tokenizer"]

# OPT's published settings, for a folder with nothing but vocab.json and merges.txt: every text
# begins with </s>, which transformers' bare GPT-2 tokenizer would not add.
_OPT_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_NO_LIMIT = 1 << 60


class Tokenizer(Protocol):
    """What the runtime needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can return."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Beginning of sequence."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of sequence, as the tokenizer's files say; the model's own list has precedence."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of `text`; special tokens written out in it are recognised.

        With `add_special_tokens`, those that the model expects round a text are added (BOS).
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens and ids beyond the vocabulary are skipped."""
        ...

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation and of the cue for the model's answer.

        Raises:
            PromptError: the model has no chat template, or its template refuses the messages.
        """
        ...


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of `folder`.

    Args:
        folder: holds the tokenizer's files, and `config.json` where the form needs it.
        trust_remote_code: run a tokenizer class that comes with the folder as Python code.

    Raises:
        CheckpointError: no tokenizer files, or broken ones.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no tokenizer folder {folder}: check model.tokenizer_path or model.path"
        )
    if trust_remote_code and _brings_code(folder):
        return _open_with_transformers(folder, trust_remote_code, {})
    if (folder / "tokenizer.json").exists():
        read_json_object(folder / "tokenizer.json")
        return _open_with_transformers(folder, trust_remote_code, {})
    if (folder / "tokenizer.model").exists():
        from mpipipe.models.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.open(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        read_json_object(folder / "vocab.json")
        require_content(folder / "merges.txt")
        return _open_with_transformers(folder, trust_remote_code, _unsaid(folder))
    raise CheckpointError(_missing(folder))


def _missing(folder: Path) -> str:
    half = [name for name in ("vocab.json", "merges.txt") if (folder / name).exists()]
    found = f" (only {half[0]} is there)" if half else ""
    code = "; its own Python code needs model.trust_remote_code" if _brings_code(folder) else ""
    return (
        f"{folder} has no tokenizer{found}: tokenizer.json, tokenizer.model, or vocab.json with "
        "merges.txt is needed; copy it from where the model comes from, or set "
        f"model.tokenizer_path{code}"
    )


def _brings_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.exists() and "AutoTokenizer" in (read_json_object(path).get("auto_map") or {})


def _unsaid(folder: Path) -> dict[str, str | bool]:
    """Settings of OPT's tokenizer that its folder leaves out."""
    if any(
        (folder / name).exists() for name in ("tokenizer_config.json", "special_tokens_map.json")
    ):
        return {}
    config = folder / "config.json"
    is_opt = config.exists() and read_json_object(config).get("model_type") == "opt"
    return {**_OPT_SPECIAL, "add_bos_token": True} if is_opt else {}


def _open_with_transformers(
    folder: Path, trust_remote_code: bool, settings: Mapping[str, str | bool]
) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **settings
        )
    except Exception as error:  # the tokenizers library raises bare Exception for broken files
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be opened ({type(error).__name__}: {error}): its "
            "files are broken or of different models; copy them again"
        ) from error
    return TransformersTokenizer(backend)


class TransformersTokenizer:
    """A tokenizer of the transformers library."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        self._backend = backend
        self._backend.model_max_length = _NO_LIMIT  # the context is checked by the scheduler
        self._num_ids = max(backend.get_vocab().values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._num_ids

    @property
    def bos_token_id(self) -> int | None:
        """Beginning of sequence."""
        found = self._backend.bos_token_id
        return found if isinstance(found, int) else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of sequence."""
        found = self._backend.eos_token_id
        return (found,) if isinstance(found, int) else ()

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of `text`."""
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        known = [number for number in ids if 0 <= number < self._num_ids]
        text = self._backend.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one list of ids decodes to one text"
        return text

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation."""
        from jinja2 import TemplateError

        if not self._backend.chat_template:
            raise no_chat_template()
        try:
            text = self._backend.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise refused_by_template(error) from error
        assert isinstance(text, str), "one conversation renders to one text"
        return self.encode(text, add_special_tokens=False)
