"""Work for benchmarks: a number of prompts of random tokens, and the tokens to make of each.

Seeded: the same work, seed and model give the same requests on every machine. `throughput` runs
them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpipipe.errors import ConfigError
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.types import Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.checkpoint.vocabulary import Vocabulary

__all__ = [
    "BenchWork",
    "bench_requests",
    "bench_workload",
    "least_warm_up_requests",
    "quick_work",
    "warm_up_requests",
]

_MIXED_INPUT = (64, 1024)  # tokens, both ends included
_MIXED_OUTPUT = (16, 256)
# A heavy tail: one output in so many is so many times longer than the others.
_TAIL_PART, _TAIL_FACTOR = 100, 20
_PASSAGE_TOKENS = 32  # which a prompt of `repeat` says again and again
_FORM = re.compile(
    r"(\d+)[x×](?:(?:(\d+)\+)?(\d+)[x×](\d+)([x×]tail)?|mixed)([x×]even)?(?P<repeat>[x×]repeat)?"
)

# What a warm-up may cost: enough tokens for several full chunks of prompts, not a whole prefill.
_WARM_UP_PROMPT_TOKENS = 65_536
_WARM_UP_OUTPUT_TOKENS = 8
_LEAST_PROMPT_TOKENS = 64  # one step, with any limit


@dataclass(frozen=True, slots=True)
class BenchWork:
    """Prompts × input × output, or lengths that differ.

    `common_tokens` of the input are the same in all prompts: they begin with them. `mixed`: drawn
    from fixed ranges. `tail`: one output in a hundred, at least one, is 20 times longer. `even`: as
    many tokens in all, with lengths that differ by one at most: what the same mix takes at fixed
    lengths. `repeats`: every prompt is one passage again and again, which a trained model goes on
    copying: text for drafts (`pipeline.num_speculative_tokens`).
    """

    num_prompts: int
    input_tokens: int = 0
    output_tokens: int = 0
    mixed: bool = False
    tail: bool = False
    even: bool = False
    repeats: bool = False
    common_tokens: int = 0

    @staticmethod
    def parse(text: str) -> BenchWork:
        """From `512x512x128`, `512x1024+128x128`, `512xmixed` or `2000x512x64xtail`.

        With `xeven` behind one of these also the same at fixed lengths, with `xrepeat` of repeated
        passages.

        Raises:
            ConfigError: it has another form, or a count is zero.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                f"the work {text!r} is not of the form PROMPTSxINPUTxOUTPUT: write 512x512x128, "
                "512x1024+128x128 for prompts that begin with 1,024 common tokens, 512xmixed for "
                "mixed lengths, 2000x512x64xtail for a few outputs 20 times longer, either with "
                "xeven behind it for the same tokens at fixed lengths, any of them "
                "with xrepeat for prompts that repeat a passage"
            )
        prompts, common, own, output = (int(part or 0) for part in found.groups()[:4])
        work = BenchWork(
            *(prompts, common + own, output),
            mixed=found[3] is None,
            tail=found[5] is not None,
            even=found[6] is not None,
            repeats=found["repeat"] is not None,
            common_tokens=common,
        )
        if not prompts or not (work.mixed or (own and output)) or found[2] == "0":
            raise ConfigError(f"the work {text!r} has a zero: all counts must be at least 1")
        return work

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        common = f"{self.common_tokens}+" if self.common_tokens else ""
        lengths = f"{common}{self.input_tokens - self.common_tokens}x{self.output_tokens}"
        lengths = "mixed" if self.mixed else lengths
        kinds = f"{'xtail' * self.tail}{'xeven' * self.even}{'xrepeat' * self.repeats}"
        return f"{self.num_prompts}x{lengths}{kinds}"

    @property
    def is_fixed(self) -> bool:
        """Whether all lengths are equal, to a token."""
        return self.even or not (self.mixed or self.tail)

    @property
    def longest_tokens(self) -> int:
        """Most tokens that one of its sequences can come to."""
        if self.mixed:
            return _MIXED_INPUT[1] + _MIXED_OUTPUT[1]
        return self.input_tokens + self.output_tokens * (_TAIL_FACTOR if self.tail else 1)

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of every sequence."""
        draw = random.Random(f"lengths {seed}")
        if self.mixed:
            lengths = [
                (draw.randint(*_MIXED_INPUT), draw.randint(*_MIXED_OUTPUT))
                for _ in range(self.num_prompts)
            ]
        else:
            lengths = [(self.input_tokens, self.output_tokens)] * self.num_prompts
        if self.tail:
            longer = (self.input_tokens, self.output_tokens * _TAIL_FACTOR)
            for index in draw.sample(range(len(lengths)), max(1, len(lengths) // _TAIL_PART)):
                lengths[index] = longer
        if self.even:
            prompts, outputs = zip(*lengths, strict=True)
            lengths = list(zip(_evened(prompts), _evened(outputs), strict=True))
        return lengths

    @property
    def shared_ratio(self) -> float:
        """Of all prompt tokens, those with which prompts begin as the first does."""
        if not self.common_tokens:
            return 0.0
        return self.common_tokens / self.input_tokens * (1 - 1 / self.num_prompts)

    def prompt_lengths(self, seed: int, source: str) -> PromptLengths:
        """As those of a file of prompts; `source` says where they come from."""
        lengths = tuple(self.lengths(seed))
        common = ((0, self.common_tokens),) * len(lengths) if self.common_tokens else ()
        return PromptLengths(lengths, source, shared_ratio=self.shared_ratio, common=common)


def quick_work(work: BenchWork) -> BenchWork:
    """The same kind of work with few tokens, to try what runs it; text that repeats has more."""
    if work.mixed:
        return replace(work, num_prompts=1)
    own = min(work.input_tokens - work.common_tokens, 16)
    common = min(work.common_tokens, 32)
    return replace(
        work,
        num_prompts=min(work.num_prompts, 4),
        input_tokens=common + own,
        output_tokens=min(work.output_tokens, 64 if work.repeats else 8),
        common_tokens=common,
    )


def bench_requests(work: BenchWork, vocabulary: Vocabulary, seed: int) -> list[Request]:
    """The requests of `work`: greedy, past any end-of-sequence token."""
    common = vocabulary.draw(random.Random(f"common {seed}"), work.common_tokens)
    return _requests(work.lengths(seed), vocabulary, seed, common, repeats=work.repeats)


def bench_workload(works: Sequence[BenchWork], seed: int) -> Workload:
    """What one plan for all works is made for: it must hold each, and is balanced for the largest.

    The requests of `bench_requests` and `warm_up_requests` ask nothing but greedy tokens.
    """
    largest = max(works, key=lambda work: _num_tokens(work.lengths(seed)))
    lengths = largest.lengths(seed)
    return Workload(
        num_requests=max(work.num_prompts for work in works),
        longest_request_tokens=max(work.longest_tokens for work in works),
        num_prompt_tokens=sum(prompt for prompt, _ in lengths),
        num_output_tokens=sum(output for _, output in lengths),
        sampling=SamplingUse(),
        lengths=tuple(lengths),
        shared_ratio=largest.shared_ratio,
    )


def _evened(counts: Sequence[int]) -> list[int]:
    """As many counts with the same sum, which differ by one at most, spread evenly."""
    total, number = sum(counts), len(counts)
    return [(index + 1) * total // number - index * total // number for index in range(number)]


def _num_tokens(lengths: Sequence[tuple[int, int]]) -> int:
    return sum(prompt + output for prompt, output in lengths)


def warm_up_requests(
    work: BenchWork, vocabulary: Vocabulary, seed: int, *, num_running: int
) -> list[Request]:
    """A short job with as many rows as `work`, of which `num_running` run at once.

    The first prompt is as long as the work's longest, the others shorter where there are many.
    """
    lengths = work.lengths(seed)[:num_running]
    limit = max(1, _WARM_UP_PROMPT_TOKENS // len(lengths))
    shorter = [
        (min(tokens_in, limit), min(tokens_out, _WARM_UP_OUTPUT_TOKENS))
        for tokens_in, tokens_out in lengths
    ]
    shorter[0] = (max(tokens_in for tokens_in, _ in lengths), shorter[0][1])
    return _requests(shorter, vocabulary, seed + 1, repeats=work.repeats)


def least_warm_up_requests(work: BenchWork, vocabulary: Vocabulary, seed: int) -> list[Request]:
    """One request of two steps, where all weights come from a disk for each step.

    What kernels a later step has to load is little beside that.
    """
    tokens_in, tokens_out = work.lengths(seed)[0]
    lengths = [(min(tokens_in, _LEAST_PROMPT_TOKENS), min(tokens_out, 2))]
    return _requests(lengths, vocabulary, seed + 1)


def _requests(
    lengths: list[tuple[int, int]],
    vocabulary: Vocabulary,
    seed: int,
    common: tuple[int, ...] = (),
    *,
    repeats: bool = False,
) -> list[Request]:
    generator = random.Random(f"prompts {seed}")
    return [
        Request(
            request_id=str(index),
            index=index,
            prompt_ids=common
            + _prompt(vocabulary, generator, tokens_in - len(common), repeats=repeats),
            sampling=SamplingParams(max_new_tokens=tokens_out, ignore_eos=True),
        )
        for index, (tokens_in, tokens_out) in enumerate(lengths)
    ]


def _prompt(
    vocabulary: Vocabulary, generator: random.Random, num_tokens: int, *, repeats: bool
) -> tuple[int, ...]:
    if not repeats:
        return vocabulary.draw(generator, num_tokens)
    passage = vocabulary.draw(generator, min(num_tokens, _PASSAGE_TOKENS))
    return (passage * -(-num_tokens // len(passage)))[:num_tokens]
