"""From prompt lines to tokenised requests; a prompt that cannot be run becomes an error record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.config.schema import AUTO
from mpipipe.errors import PromptError
from mpipipe.planning.sampling_use import SamplingUse
from mpipipe.planning.workload import Workload
from mpipipe.types import Completion, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.models.tokenizer import Tokenizer
    from mpipipe.runtime.inputs import ModelFacts

__all__ = ["PreparedPrompts", "prepare", "tokenize", "workload_of"]


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """The prompts of a run: those that can be tried, and those that already failed."""

    requests: tuple[Request, ...]
    refused: tuple[Completion, ...]

    @property
    def num_prompts(self) -> int:
        """All of them."""
        return len(self.requests) + len(self.refused)

    def longest_tokens(self, max_context_tokens: int) -> int:
        """Most tokens that one request can come to occupy; those that can never run left out."""
        wanted = (
            min(len(request.prompt_ids) + request.sampling.max_new_tokens, max_context_tokens)
            for request in self.requests
            if len(request.prompt_ids) < max_context_tokens
        )
        return max(wanted, default=1)


def prepare(
    lines: Sequence[PromptLine], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> PreparedPrompts:
    """Tokenise every line that has no error yet."""
    requests: list[Request] = []
    refused: list[Completion] = []
    for line in lines:
        try:
            requests.append(_request(line, tokenizer, add_special_tokens))
        except PromptError as error:
            refused.append(Completion.refused(line.prompt_id, line.index, error))
    return PreparedPrompts(tuple(requests), tuple(refused))


def tokenize(
    loaded: LoadedConfig, model: ModelFacts | None, lines: Sequence[PromptLine]
) -> tuple[Tokenizer | None, PreparedPrompts | None]:
    """The tokenizer and the requests of a run, on the head; nothing elsewhere (`model` is None).

    Raises:
        CheckpointError: the tokenizer is missing or of a kind that is not known.
    """
    if model is None:
        return None, None
    from mpipipe.models.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model.tokenizer_folder, loaded.config.model.trust_remote_code)
    special = loaded.config.prompts.add_special_tokens
    return tokenizer, prepare(lines, tokenizer, add_special_tokens=special)


def workload_of(
    loaded: LoadedConfig, model: ModelFacts | None, prompts: PreparedPrompts | None
) -> Workload:
    """How much there is to do, for the plan; nothing is known on other ranks than the head."""
    if model is None or prompts is None:
        return Workload()
    limit = loaded.config.memory.max_context_tokens
    context = model.spec.max_context_tokens if limit == AUTO else int(limit)
    return Workload(
        num_requests=len(prompts.requests),
        longest_request_tokens=prompts.longest_tokens(context),
        num_prompt_tokens=sum(len(request.prompt_ids) for request in prompts.requests),
        num_output_tokens=sum(request.sampling.max_new_tokens for request in prompts.requests),
        sampling=SamplingUse.of(request.sampling for request in prompts.requests),
    )


def _request(line: PromptLine, tokenizer: Tokenizer, add_special_tokens: bool) -> Request:
    if line.error is not None:
        raise line.error
    assert line.sampling is not None, "a line without an error has its sampling settings"
    if line.messages is not None:
        prompt_ids = tokenizer.chat(line.messages)
    else:
        assert line.text is not None, "a line without an error has a text or messages"
        prompt_ids = tokenizer.encode(line.text, add_special_tokens)
    if not prompt_ids:
        raise PromptError(
            "empty_prompt",
            f"the prompt {line.prompt_id!r} (line {line.line_number}) has no tokens: write some "
            "text, or let the tokenizer add its special tokens (prompts.add_special_tokens)",
        )
    return Request(line.prompt_id, line.index, tuple(prompt_ids), line.sampling)
