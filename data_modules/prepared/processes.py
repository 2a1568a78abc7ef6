"""Worker processes that do the units of a job, none of which outlives this process."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_modules.child_process import end_with_parent, end_without
from data_modules.prepared.work import Job
from memlm.errors import DataError

Task = Callable[[Job, int, Callable[[int], object]], None]
"""Does one unit of a job, and tells of the bytes of files consumed."""

POLL_SECONDS = 0.25


def run_units(
    job: Job, task: Task, units: list[int], processes: int, show: Callable[[int], object]
) -> Generator[int, None, None]:
    """Do units in worker processes.

    Args:
        job: What all workers know.
        task: Does one unit.
        units: Which.
        processes: How many at a time.
        show: Told now and then how many bytes of files were consumed in all.

    Yields:
        Each unit that is done.

    Raises:
        UserError: What the task raised, or a worker process died. The other workers are ended.
    """
    # Forked, a worker starts at once and shares the imported packages and the tokenizer's tables. The pool
    # starts its threads when the first unit is submitted, and by then all workers are forked.
    context = multiprocessing.get_context("fork")
    # A slot for each unit needs no lock, which a killed worker could hold for ever.
    consumed = context.RawArray("q", len(job.plan.units))
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _start, (job, task, consumed, os.getpid()))
    try:
        futures = {pool.submit(_do, unit): unit for unit in units}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            show(sum(consumed))
            for future in done:
                future.result()
                yield futures[future]
    except BaseException as error:
        # What they still do is not wanted: it has no final name yet.
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                job.folder,
                "a worker process died, perhaps for want of memory; finished shards are kept: run the same "
                "command again, with fewer workers if need be",
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Job, Task, Any]
"""What this process does, if it is a worker."""


def _start(job: Job, task: Task, consumed: Any, parent: int) -> None:
    global _worker
    _worker = (job, task, consumed)
    gc.freeze()  # looking through inherited objects would copy the pages that they are in
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the job says how many threads tokenize
    end_with_parent(parent)


def _do(unit: int) -> None:
    job, task, consumed = _worker
    parent = os.getppid()

    def progress(count: int) -> None:
        end_without(parent)
        consumed[unit] += count

    task(job, unit, progress)
