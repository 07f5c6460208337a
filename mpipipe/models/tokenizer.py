"""Text to token ids and back, for the three forms in which models ship their tokenizers.

| files in the folder | read by |
|---|---|
| `tokenizer.json` | transformers (`AutoTokenizer`), then `tokenizers` alone |
| `vocab.json` + `merges.txt` | the same |
| `tokenizer.model` alone | sentencepiece (`sentencepiece_tokenizer`) |

Why not transformers for the third: 5.17–5.23 rebuild a sentencepiece model as a different one. With
`tokenizer.model` alone they add neither BOS nor the leading space; with a `LlamaTokenizer`
configuration they drop its normaliser and one leading space. sentencepiece is what the model was
trained with.

What transformers makes of a folder is kept for the next start (`fast_tokenizer`), which then
imports no transformers. `scheduler/detokenize.py` makes text as tokens come.

Invariants: nothing is downloaded; encoding and decoding are pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.errors import CheckpointError, PromptError
from mpipipe.models.chat import ChatRenderer, ChatTemplates, chat_templates_of, read_chat_templates
from mpipipe.models.fast_tokenizer import (
    FastTokenizer,
    TokenizerFacts,
    is_plain,
    kept_tokenizer,
    known_ids,
)
from mpipipe.models.foreign import ENCODE_FAILED, foreign_code, in_short
from mpipipe.models.tokenizer_base import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TransformersTokenizer", "open_tokenizer"]

# OPT's published settings, for a folder with nothing but vocab.json and merges.txt: every text
# begins with </s>, which transformers' bare GPT-2 tokenizer would not add.
_OPT_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_NO_LIMIT = 1 << 60


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
    try:
        with foreign_code("tokenizer", "it cannot be opened", "copy it again"):
            return _open(folder, trust_remote_code)
    except PromptError as caught:  # a broken file shows in any exception, a bare one included
        error = caught.__cause__ or caught
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be opened ({in_short(error)}): its files are broken "
            "or of different models; copy them again"
        ) from error


def _open(folder: Path, trust_remote_code: bool) -> Tokenizer:
    templates = read_chat_templates(folder)
    if trust_remote_code and _brings_code(folder):
        return _open_with_transformers(folder, trust_remote_code, templates, {})
    if (folder / "tokenizer.json").exists():
        return _open_kept(folder, templates, {})
    if (folder / "tokenizer.model").exists():
        from mpipipe.models.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.open(folder, templates)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _open_kept(folder, templates, _unsaid(folder))
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


def _open_kept(
    folder: Path, templates: ChatTemplates, settings: Mapping[str, str | bool]
) -> Tokenizer:
    """As transformers does, by what it made of the folder in an earlier start, if there was one."""
    kept = kept_tokenizer(folder, settings)
    found = kept.read(templates)
    if found is not None:
        return found
    if (folder / "tokenizer.json").exists():
        read_json_object(folder / "tokenizer.json")
    else:
        read_json_object(folder / "vocab.json")
        require_content(folder / "merges.txt")
    opened = _open_with_transformers(folder, False, templates, settings)
    plain = opened.plain()
    if plain is None:
        return opened
    fast = FastTokenizer.of(*plain, templates)
    if not _agree_on(opened.added_tokens, opened, fast):
        return opened
    kept.write(*plain)
    return fast


def _agree_on(added: Mapping[int, str], opened: Tokenizer, fast: Tokenizer) -> bool:
    """Whether both treat the tokens that were `added` to the vocabulary alike.

    `tokenizers` writes down how a token was added last. That it was special before, in another of
    the folder's files, still counts in the tokenizer that transformers made, not in its copy.
    """
    alone = [(number,) for number in added]
    texts = [f"a{token} {token} a" for token in added.values()]
    return opened.decode_all(alone) == fast.decode_all(alone) and (
        opened.encode_all(texts, False) == fast.encode_all(texts, False)
    )


def _open_with_transformers(
    folder: Path,
    trust_remote_code: bool,
    templates: ChatTemplates,
    settings: Mapping[str, str | bool],
) -> TransformersTokenizer:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        chat_template=None,  # ours to read: a broken one is no reason to refuse the folder
        **settings,
    )
    if backend.chat_template:  # set by the folder's own code
        templates = chat_templates_of(backend.chat_template, type(backend).__name__)
    return TransformersTokenizer(backend, templates)


class TransformersTokenizer(Tokenizer):
    """A tokenizer of the transformers library."""

    def __init__(self, backend: PreTrainedTokenizerBase, templates: ChatTemplates) -> None:
        super().__init__(ChatRenderer(templates, backend.special_tokens_map))
        self._backend = backend
        self._backend.model_max_length = _NO_LIMIT  # the context is checked by the scheduler
        bos, eos = backend.bos_token_id, backend.eos_token_id
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.bos_token_id = bos if isinstance(bos, int) else None
        self.eos_token_ids = (eos,) if isinstance(eos, int) else ()
        self.special_tokens = _special_tokens(backend)

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...] | PromptError]:
        """`encode` of every text: in one go, unless one of them fails."""
        if not texts:
            return []
        try:
            with foreign_code(*ENCODE_FAILED):
                found = self._backend(list(texts), add_special_tokens=add_special_tokens)
                return [tuple(ids) for ids in found["input_ids"]]
        except PromptError:
            return super().encode_all(texts, add_special_tokens)

    @property
    def added_tokens(self) -> dict[int, str]:
        """Those beside the vocabulary of the model, or taken out of it: ids and texts."""
        added = self._backend.added_tokens_decoder
        return {number: token.content for number, token in added.items()}

    def plain(self) -> tuple[str, TokenizerFacts] | None:
        """What `tokenizers` alone needs to compute the same; None: it cannot."""
        backend: Any = self._backend
        if not is_plain(backend):
            return None
        facts = TokenizerFacts(
            vocab_size=self.vocab_size,
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
            roles=dict(backend.special_tokens_map),
            special_tokens=dict(self.special_tokens),
            splits_special_tokens=bool(backend.split_special_tokens),
        )
        try:
            return backend.backend_tokenizer.to_str(), facts
        except Exception:  # noqa: BLE001 - `tokenizers` raises it bare: parts written in Python
            return None

    def _token_text(self, token_id: int) -> str:
        return str(self._backend.convert_ids_to_tokens(token_id))

    def _encode(self, text: str, add_special_tokens: bool) -> Iterable[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._backend.decode(
            known_ids(ids, self.vocab_size),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str), "one list of ids decodes to one text"
        return text


def _special_tokens(backend: PreTrainedTokenizerBase) -> dict[str, int]:
    added = backend.added_tokens_decoder.items()
    found = {token.content: number for number, token in added if token.special}
    named = zip(backend.all_special_tokens, backend.all_special_ids, strict=True)
    found |= {token: number for token, number in named if isinstance(number, int)}
    return {token: number for token, number in found.items() if token}
