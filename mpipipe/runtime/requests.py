"""From prompt lines to tokenised requests; a prompt that cannot be run becomes an error record.

The boundary between what a user wrote and what the model computes: past it, every id is one of the
model's embeddings, and stop strings that are a special token have become stop ids. The command line
and the library both come through `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpipipe.config.schema import AUTO
from mpipipe.errors import CheckpointError, PromptError
from mpipipe.garbage import no_garbage_collection
from mpipipe.planning.prefix_groups import prefix_groups
from mpipipe.planning.prompt_lengths import prompt_lengths
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpipipe.config.prompts import PromptLine
    from mpipipe.models.tokenizer_base import Tokenizer
    from mpipipe.planning.model_facts import ModelFacts

__all__ = [
    "Prepared",
    "PreparedPrompts",
    "expected_workload",
    "prepare",
    "prepare_text",
    "tokenize",
    "tokenizer_of",
    "workload_of",
]


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """The prompts of a run: those that can be tried, and those that already failed.

    `warnings`: what many prompts have in common and the user may not expect, a sentence each.
    """

    requests: tuple[Request, ...] = ()
    rejected: tuple[Completion, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_prompts(self) -> int:
        """All of them."""
        return len(self.requests) + len(self.rejected)

    def longest_tokens(self, max_context_tokens: int) -> int:
        """Most tokens that one request can come to occupy; those that can never run left out."""
        wanted = (
            min(len(request.prompt_ids) + request.sampling.max_new_tokens, max_context_tokens)
            for request in self.requests
            if len(request.prompt_ids) < max_context_tokens
        )
        return max(wanted, default=1)

    def lengths(self, max_context_tokens: int) -> tuple[tuple[int, int], ...]:
        """Prompt and most output tokens of each request that can run."""
        return tuple(
            (known, min(request.sampling.max_new_tokens, max_context_tokens - known))
            for request in self.requests
            if (known := len(request.prompt_ids)) < max_context_tokens
        )


def prepare(
    lines: Sequence[PromptLine],
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool,
    vocab_size: int | None = None,
) -> PreparedPrompts:
    """Tokenise every line that has no error yet.

    Args:
        lines: as `config.prompts` reads them.
        tokenizer: the model's.
        add_special_tokens: round prompts that are no conversations.
        vocab_size: rows of the model's embedding; a prompt with an id beyond them is rejected.
            None: every id is taken.
    """
    preparation = _Preparation(tokenizer, add_special_tokens, vocab_size)
    with no_garbage_collection():
        for first in range(0, len(lines), _LINES_AT_ONCE):
            preparation.take(lines[first : first + _LINES_AT_ONCE])
        return preparation.result()


_NO_PROMPTS, _UNKNOWN = PreparedPrompts(), Workload()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the head has ready for a session; on other ranks nothing.

    `prompts`: those that are known before the session. `decode`, ids to text, replaces the
    tokenizer's: a benchmark needs no text and no tokenizer.
    """

    workload: Workload = _UNKNOWN
    tokenizer: Tokenizer | None = None
    prompts: PreparedPrompts = _NO_PROMPTS
    decode: Callable[[Sequence[int]], str] | None = None


def tokenizer_of(model: ModelFacts) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        CheckpointError: it is missing or of a kind that is not known.
    """
    from mpipipe.models.tokenizer import open_tokenizer

    return open_tokenizer(model.tokenizer_folder, model.loaded.config.model.trust_remote_code)


def tokenize(
    model: ModelFacts,
    lines: Sequence[PromptLine],
    *,
    tokenizing: Callable[[], object] = lambda: None,
) -> Prepared:
    """The tokenizer and the requests of a run; `tokenizing` is told between the two.

    A folder with random weights may have no tokenizer, where all prompts are token ids: then the
    completions have ids only.

    Raises:
        CheckpointError: the tokenizer is missing or of a kind that is not known.
    """
    tokenizer = _tokenizer_or_none(model, needs_text=not all(map(_needs_no_text, lines)))
    tokenizing()
    special, size = model.loaded.config.prompts.add_special_tokens, model.spec.vocab_size
    prompts = prepare(lines, tokenizer, add_special_tokens=special, vocab_size=size)
    return Prepared(workload_of(model, prompts), tokenizer, prompts)


def prepare_text(model: ModelFacts) -> Prepared:
    """What the head of a further replica needs: the tokenizer, if the model has one.

    Raises:
        CheckpointError: as `tokenize`.
    """
    return Prepared(tokenizer=_tokenizer_or_none(model, needs_text=False))


def _tokenizer_or_none(model: ModelFacts, *, needs_text: bool) -> Tokenizer:
    try:
        return tokenizer_of(model)
    except CheckpointError:
        if model.loaded.config.model.weights != "random" or needs_text:
            raise
        from mpipipe.models.tokenizer_base import NoTokenizer

        return NoTokenizer()


def expected_workload(model: ModelFacts, lines: Sequence[PromptLine]) -> Workload:
    """About how much a file of prompts is to do, before it is tokenised."""
    limit = model.loaded.config.memory.max_context_tokens
    context = model.spec.max_context_tokens if limit == AUTO else int(limit)
    found = prompt_lengths(lines, model.tokenizer_folder, context)
    return Workload() if found is None else found.workload(context)


def _needs_no_text(line: PromptLine) -> bool:
    return line.token_ids is not None and line.sampling is not None and not line.sampling.stop


def workload_of(model: ModelFacts, prompts: PreparedPrompts) -> Workload:
    """How much there is to do, for the plan."""
    memory = model.loaded.config.memory
    limit = memory.max_context_tokens
    context = model.spec.max_context_tokens if limit == AUTO else int(limit)
    num_prompt_tokens = sum(len(request.prompt_ids) for request in prompts.requests)
    ids, page_size = [r.prompt_ids for r in prompts.requests], memory.page_size_tokens
    num_shared = prefix_groups(ids, page_size).num_shared if memory.share_prefixes else 0
    return Workload(
        num_requests=len(prompts.requests),
        longest_request_tokens=prompts.longest_tokens(context),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=sum(request.sampling.max_new_tokens for request in prompts.requests),
        sampling=SamplingUse.of(request.sampling for request in prompts.requests),
        lengths=prompts.lengths(context),
        shared_ratio=num_shared / max(1, num_prompt_tokens),
    )


# Lines whose texts are tokenised in one call: enough to be fast, few enough to stay small.
_LINES_AT_ONCE = 512


@dataclass(slots=True)
class _Preparation:
    """The lines tokenised so far, and what is worth a warning."""

    tokenizer: Tokenizer
    add_special_tokens: bool
    vocab_size: int | None
    requests: list[Request] = field(default_factory=list)
    rejected: list[Completion] = field(default_factory=list)
    num_chats: int = 0
    num_unrendered: int = 0
    first_unrendered: str = ""
    num_double_bos: int = 0
    num_unreachable: int = 0  # requests with stop ids that cannot come
    first_unreachable: int = 0

    def take(self, lines: Sequence[PromptLine]) -> None:
        """Tokenise `lines`, in one call where that can be."""
        texts = [self._content(line) for line in lines]
        ids: dict[int, tuple[int, ...] | PromptError] = {}
        for is_chat in (False, True):
            places = [
                place
                for place, text in enumerate(texts)
                if isinstance(text, str) and (lines[place].messages is not None) is is_chat
            ]
            chosen = [text for place in places if isinstance(text := texts[place], str)]
            special = self.add_special_tokens and not is_chat
            ids.update(zip(places, self.tokenizer.encode_all(chosen, special), strict=True))
        for place, line in enumerate(lines):
            outcome = ids.get(place, texts[place])
            try:
                self.requests.append(self._request(line, outcome))
            except PromptError as error:
                self.rejected.append(Completion.rejected(line.prompt_id, line.index, error))

    def result(self) -> PreparedPrompts:
        """What came of all lines."""
        return PreparedPrompts(tuple(self.requests), tuple(self.rejected), tuple(self._warnings()))

    def _content(self, line: PromptLine) -> str | PromptError | tuple[int, ...]:
        """The line's text, its error, or the ids that need no tokenizer."""
        if line.error is not None:
            return line.error
        if line.token_ids is not None:
            return line.token_ids
        if line.messages is None:
            assert line.text is not None, "a line without an error has a content"
            return line.text
        self.num_chats += 1
        try:
            return self.tokenizer.render(line.messages, line.chat_options)
        except PromptError as error:
            self.num_unrendered += 1
            self.first_unrendered = self.first_unrendered or str(error)
            return error

    def _request(self, line: PromptLine, outcome: str | PromptError | tuple[int, ...]) -> Request:
        if isinstance(outcome, PromptError):
            raise outcome
        assert not isinstance(outcome, str), "every text has been tokenised"
        assert line.sampling is not None, "a line without an error has its sampling settings"
        if not outcome:
            raise PromptError(
                "empty_prompt",
                f"the prompt {line.prompt_id!r} (line {line.line_number}) has no tokens: write "
                "some text, or let the tokenizer add its special tokens "
                "(prompts.add_special_tokens)",
            )
        self._require_embeddings(line, outcome)
        bos = self.tokenizer.bos_token_id
        if line.text is not None and self.add_special_tokens and outcome[:2] == (bos, bos):
            self.num_double_bos += 1
        return Request(line.prompt_id, line.index, outcome, self._resolve_stops(line.sampling))

    def _require_embeddings(self, line: PromptLine, ids: Sequence[int]) -> None:
        """Raises PromptError when the model has no embedding for one of the ids."""
        size = self.vocab_size
        if size is None or (max(ids) < size and min(ids) >= 0):
            return
        number = next(number for number in ids if not 0 <= number < size)
        if line.token_ids is not None:
            raise PromptError(
                "unknown_token",
                f"the prompt {line.prompt_id!r} (line {line.line_number}) gives the token id "
                f"{number}, but the model has embeddings for the ids 0 to {size - 1} only: the "
                "ids are of another model's tokenizer",
            )
        raise PromptError(
            "unknown_token",
            f"the prompt {line.prompt_id!r} (line {line.line_number}) has the token "
            f"{self.tokenizer.token_text(number)!r} with the id {number}, but the model has "
            f"embeddings for the ids 0 to {size - 1} only: the tokenizer is of another model, or "
            "the token is not for texts; take it out of the prompt, or copy the tokenizer again",
        )

    def _resolve_stops(self, sampling: SamplingParams) -> SamplingParams:
        """Stop strings that are a special token become stop ids; ids that cannot come are left out.

        Special tokens are no text, so a stop string that is one would never be met.
        """
        if not sampling.stop and not sampling.stop_token_ids:
            return sampling
        special = self.tokenizer.special_tokens
        stop = tuple(text for text in sampling.stop if text not in special)
        named = [special[text] for text in sampling.stop if text in special]
        wanted = tuple(dict.fromkeys((*sampling.stop_token_ids, *named)))
        size = self.vocab_size
        ids = tuple(number for number in wanted if size is None or 0 <= number < size)
        if len(ids) < len(wanted):
            self.first_unreachable = self.first_unreachable or max(wanted)
            self.num_unreachable += 1
        if (stop, ids) == (sampling.stop, sampling.stop_token_ids):
            return sampling
        return sampling.replace(stop=stop, stop_token_ids=ids)

    def _warnings(self) -> Iterator[str]:
        if self.num_chats and self.num_unrendered == self.num_chats:
            yield (
                f"none of the {self.num_chats} prompts with messages can be rendered, they are "
                f"error records; the first one: {self.first_unrendered}"
            )
        if self.num_double_bos:
            bos = self.tokenizer.token_text(self.tokenizer.bos_token_id or 0)
            yield (
                f"{self.num_double_bos} prompts begin with {bos} and get a second one from the "
                "tokenizer, as in transformers: take it out of the prompts, or set "
                "prompts.add_special_tokens=false"
            )
        if self.num_unreachable:
            yield (
                f"{self.num_unreachable} prompts have stop tokens beyond the model's vocabulary of "
                f"{self.vocab_size}, such as {self.first_unreachable}, which can never come: check "
                "stop and stop_token_ids, and whether the tokenizer is the model's"
            )
