"""Trains the runs of a plan, several at a time, and keeps each result as soon as there is one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from tqdm import tqdm

from experiments.config import ConfigError
from experiments.measure import Result, Store, measure
from experiments.suite import Run


def _start_worker() -> None:
    """One thread, quiet on Ctrl-C, and gone when the parent is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run_here(run: Run) -> concurrent.futures.Future[Result]:
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    try:
        future.set_result(measure(run))
    except Exception as error:
        future.set_exception(error)
    return future


@contextlib.contextmanager
def _submitter(workers: int) -> Iterator[Callable[[Run], concurrent.futures.Future[Result]]]:
    """Gives the function that starts a run: in a process of a pool, or, with one worker, in this one."""
    if workers == 1:
        torch.set_num_threads(1)
        yield _run_here
        return
    # Read by the children when they import torch and tqdm.
    os.environ.update({"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield lambda run: pool.submit(measure, run)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class StoppedError(Exception):
    """A worker process died."""


Planner = Callable[[Collection[str]], tuple[Iterable[Run], int]]
"""Given the tasks to leave out: the runs that are wanted now, most urgent first, and how many will follow them."""


def train_missing(planner: Planner, store: Store, *, workers: int, description: str) -> Iterator[str]:
    """Makes the runs of a plan that have no result yet; each result is kept as soon as there is one.

    Args:
        planner: asked again whenever a run is done.
        store: the results.
        workers: runs at a time; one trains in this process.
        description: of the progress bar.

    Yields:
        Notes on tasks that are skipped because their data are absent.

    Raises:
        StoppedError: a worker process died; what is finished is kept.
    """
    skipped: set[str] = set()
    in_flight: dict[concurrent.futures.Future[Result], Run] = {}
    with _submitter(workers) as submit, tqdm(desc=description, unit="run", dynamic_ncols=True, smoothing=0.1) as bar:
        while True:
            wanted, num_to_come = planner(skipped)
            runs = {run.key: run for run in wanted}
            missing = {key: run for key, run in runs.items() if store.load(run) is None}
            if bar.total is None:
                bar.initial = bar.n = len(runs) - len(missing)  # the time left comes from the new runs only
            bar.total = len(runs) + num_to_come
            busy = {run.key for run in in_flight.values()}
            # Only as many as can run: what finishes may change the plan, and runs of one task stay together.
            for run in [run for key, run in missing.items() if key not in busy][: workers - len(in_flight)]:
                bar.set_postfix_str(f"{run.task} {run.optimizer} lr {run.lr:g} seed {run.seed}")
                in_flight[submit(run)] = run
            if not in_flight:
                return
            done, _ = concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                run = in_flight.pop(future)
                try:
                    store.save(run, future.result())
                    bar.update()
                except concurrent.futures.BrokenExecutor as error:
                    raise StoppedError(f"a worker process died while {run.key} was trained: {error}") from error
                except ConfigError as error:
                    if run.task not in skipped:
                        skipped.add(run.task)
                        yield f"Task {run.task} is skipped: {error}."
