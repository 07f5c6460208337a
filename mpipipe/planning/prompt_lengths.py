"""How long the prompts of a job are, without torch and transformers.

The model's tokenizer says how many bytes a token has in a sample of the prompts, where its file is
not too large to read at once; else it is four. A chat's template is not applied: each message
counts as a few tokens more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpipipe.config.prompts import PromptLine
from mpipipe.planning.prefix_groups import prefix_groups
from mpipipe.planning.workload import SamplingUse, Workload

__all__ = ["PromptLengths", "prompt_lengths"]

_BYTES_PER_TOKEN = 4.0  # English text and current vocabularies
_MESSAGE_TOKENS = 5  # role and separators of a chat's message
_PAGE_TOKENS = 16  # of KV pages, unless they are set
_SPECIAL_TOKENS = 1  # a beginning-of-sequence token
_SAMPLE_BYTES = 256 * 1024  # a quarter of a second
# Read in 0.1 s a MB: Llama 3's vocabulary has 9 MB and would take the second that is left.
_MOST_TOKENIZER_BYTES = 5 * 10**6


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Of every prompt that can be run: its tokens, and those that it may generate."""

    lengths: tuple[tuple[int, int], ...]
    source: str  # how they were found, e.g. "estimated: 4 bytes a token"
    num_rejected: int = 0  # prompts that become error records
    sampling: SamplingUse | None = None  # of all of them; None: not known
    shared_ratio: float = 0.0  # of the prompt tokens, with which prompts begin as others do
    # Of every prompt its group, and the tokens with which all of the group begin; empty: none do.
    common: tuple[tuple[int, int], ...] = ()

    def workload(self, max_context_tokens: int) -> Workload:
        """What the plan is made for."""
        return Workload(
            num_requests=len(self.lengths),
            longest_request_tokens=min(max(map(sum, self.lengths)), max_context_tokens),
            num_prompt_tokens=sum(prompt for prompt, _ in self.lengths),
            num_output_tokens=sum(output for _, output in self.lengths),
            sampling=self.sampling,
            lengths=self.lengths,
            shared_ratio=self.shared_ratio,
        )


def prompt_lengths(
    lines: Sequence[PromptLine], tokenizer_folder: Path, max_context_tokens: int
) -> PromptLengths | None:
    """The lengths of a job's prompts; None: none of them can be run.

    Outputs are as long as they may be, cut where the context ends.
    """
    texts = [_text(line) for line in lines if line.error is None]
    per_token, source = _bytes_per_token([text for text in texts if text], tokenizer_folder)
    lengths: list[tuple[int, int]] = []
    samplings = []
    kept: list[PromptLine] = []
    for line in lines:
        if line.error is not None or line.sampling is None:
            continue
        prompt = _prompt_tokens(line, per_token)
        output = min(line.sampling.max_new_tokens, max_context_tokens - prompt)
        if output > 0:
            lengths.append((prompt, output))
            samplings.append(line.sampling)
            kept.append(line)
    if not lengths:
        return None
    if all(line.token_ids is not None for line in lines if line.error is None):
        source = "token ids"
    num_rejected = len(lines) - len(lengths)
    num_shared, common = _shared(kept, per_token)
    return PromptLengths(
        lengths=tuple(lengths),
        source=source,
        num_rejected=num_rejected,
        sampling=SamplingUse.of(samplings),
        shared_ratio=min(1.0, num_shared / sum(prompt for prompt, _ in lengths)),
        common=common,
    )


def _text(line: PromptLine) -> str:
    if line.messages is not None:
        return "\n".join(message["content"] for message in line.messages)
    return line.text or ""


def _shared(
    lines: Sequence[PromptLine], per_token: float
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """Tokens with which prompts begin as earlier ones do, and `PromptLengths.common`.

    Those given as ids by these, the others by their texts.
    """
    num_shared, common = 0.0, [(-1, 0)] * len(lines)
    for has_ids in (False, True):
        numbers = [n for n, line in enumerate(lines) if (line.token_ids is not None) is has_ids]
        size = 1.0 if has_ids else per_token
        contents = [lines[n].token_ids or _text(lines[n]).encode() for n in numbers]
        found = prefix_groups(contents, max(1, round(_PAGE_TOKENS * size)))
        num_shared += found.num_shared / size
        for members, num_common in zip(found.groups, found.num_common, strict=True):
            for member in members if num_common else ():
                common[numbers[member]] = numbers[members[0]], int(num_common / size)
    return num_shared, tuple(common) if num_shared else ()


def _prompt_tokens(line: PromptLine, per_token: float) -> int:
    if line.token_ids is not None:
        return len(line.token_ids)
    more = _SPECIAL_TOKENS
    if line.messages is not None:
        more += _MESSAGE_TOKENS * (len(line.messages) + 1)  # the answer has a role, too
    return more + max(1, round(len(_text(line).encode()) / per_token))


def _bytes_per_token(texts: Sequence[str], folder: Path) -> tuple[float, str]:
    """Mean over a sample of the texts, and how it was found."""
    encode = _encoder(folder)
    sample, num_bytes = [], 0
    stride = max(1, len(texts) * (sum(map(len, texts[:100])) // 100 + 1) // _SAMPLE_BYTES)
    for text in texts[::stride]:
        sample.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= _SAMPLE_BYTES:
            break
    if encode is None or not num_bytes:
        return _BYTES_PER_TOKEN, "estimated: 4 bytes a token"
    num_tokens = max(1, sum(map(encode, sample)))
    per_token = num_bytes / num_tokens
    return per_token, f"{per_token:.2g} bytes a token, by the model's tokenizer"


def _encoder(folder: Path) -> Callable[[str], int] | None:
    """Counts the tokens of a text; None: no tokenizer that is quick to read."""
    # Foreign code, which also raises plain Exception: an estimate does without it.
    with contextlib.suppress(Exception):
        if _is_quick(path := folder / "tokenizer.json"):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
        if _is_quick(path := folder / "tokenizer.model"):
            from sentencepiece import SentencePieceProcessor

            processor = SentencePieceProcessor(model_file=str(path))
            return lambda text: len(processor.encode(text))
    return None


def _is_quick(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _MOST_TOKENIZER_BYTES
