"""Use mpipipe as a library, in a script that every rank runs.

    mpirun -n 2 python launch/library_example.py demo:smollm2

Completions come out on rank 0; on the other ranks the loops run zero times while their stages work.
"""

import asyncio
import sys

from mpipipe import Pipeline
from mpipipe.progress import new_event_loop

PROMPTS = ["The capital of France is", "Water boils at", "One, two, three,"]


def synchronous(model: str) -> None:
    """A plain `for` loop; the pipeline stays loaded between calls of `generate_sync`."""
    with Pipeline(model) as pipeline:
        for completion in pipeline.generate_sync(PROMPTS, max_new_tokens=12):
            print("sync", completion.index, repr(completion.text), flush=True)


async def asynchronous(model: str) -> None:
    """The same with `async for`, for scripts that do something else meanwhile."""
    async with Pipeline(model) as pipeline:
        settings = {"max_new_tokens": 12, "temperature": 0.7, "seed": 1}
        async for completion in pipeline.generate(PROMPTS[:2], **settings):
            print("async", completion.index, repr(completion.text), flush=True)


if __name__ == "__main__":
    asked_for = sys.argv[1] if len(sys.argv) > 1 else "demo:smollm2"
    synchronous(asked_for)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(asynchronous(asked_for))
