"""The dispatch benchmark in one process: rank 0 and replicas as virtual ranks."""

from __future__ import annotations

import asyncio
import gc
import time

from mpipipe.bench.dispatch import DispatchOptions, DispatchRates, measure_in_process
from mpipipe.clock import Clock, MonotonicClock
from mpipipe.progress import ProgressEngine, new_event_loop

LIMIT_S = 60


class ProcessorTime:
    """A clock that stands still while other processes have the cores."""

    def now_s(self) -> float:
        return time.process_time()


def measured(options: DispatchOptions, clock: Clock) -> DispatchRates:
    async def main() -> DispatchRates:
        engine = ProgressEngine()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            rates = await measure_in_process(engine, clock, options)
            running.cancel()
        return rates

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def test_every_prompt_is_handed_out_and_told_once() -> None:
    options = DispatchOptions(
        num_prompts=300, input_tokens=4, output_tokens=2, capacity=16, num_virtual=3
    )
    rates = measured(options, MonotonicClock())
    assert (rates.num_replicas, rates.num_prompts) == (3, 300)
    assert 0 < rates.handed_to_told_p50_s < rates.elapsed_s
    # Three heads ask and are told the end, and 300 prompts do not fit what they ask for at once.
    assert rates.messages_per_s * rates.elapsed_s > 3 * 4
    assert rates.bytes_per_s * rates.elapsed_s > 300 * 4


def test_a_fast_rank_0_is_hardly_busy_with_a_prompt() -> None:
    """20,000 prompts/s leave rank 0 50 µs for each; a loaded machine is given ten times as long."""
    rates = measured(DispatchOptions(num_prompts=4000), ProcessorTime())
    assert gc.get_freeze_count() == 0, "what comes after in this process is as it was"
    assert 0 < rates.handling_us + rates.decoding_us < 500
    assert rates.busy_share < 1
