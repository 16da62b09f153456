"""The same job over many images, on several processes or on a Dask cluster given its address; can be interrupted and resumed.

Results are lines of JSON in a file, one a finished item, appended as they come; what the file holds is not computed again.
"""
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Job = Callable[[Any], dict]


def one_thread() -> None:
    """What a worker process does first: two torch threads on a busy two-core machine cost ten times the time."""
    import torch

    torch.set_num_threads(1)


def certify_one(name: str, eps: float, norm: float, time_limit: float | None, i: int) -> dict:
    """Is test digit i classified correctly on its whole ball? The status, lower and upper of `certify.verify`."""
    from advcourse import data, models
    from advcourse.certify.exact import verify

    x, y = data.mnist("test")
    c = verify(models.load(name), x[i], int(y[i]), eps=eps, norm=norm, time_limit=time_limit, progress=False)
    return {"status": c.status, "lower": c.lower, "upper": c.upper, "seconds": round(c.seconds, 3)}


def sweep(job: Job, items: Iterable, out: str | Path | None = None, *, processes: int = 2, scheduler: str | None = None,
          progress: bool = True) -> dict:
    """Run job(item) for every item and return {item: result}; with `out` a file of JSON lines, from which a run resumes.

    `job` must be importable by the workers (a function of a module, or functools.partial of one) and return a dictionary that
    JSON can hold. `scheduler`: the address of a Dask cluster to use instead of local processes. Ctrl-C loses nothing that
    is finished. ValueError for a number of processes below 1; an exception in a job is raised here.
    """
    from tqdm import tqdm

    if processes < 1:
        raise ValueError(f"processes={processes!r}: at least one")
    todo, done = list(dict.fromkeys(items)), {}
    if out is not None and Path(out).exists():
        lines = Path(out).read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n")]  # the last line of a killed run may be half written
        if len(kept) < len(lines):
            Path(out).write_text("".join(kept))
        known = {json.dumps(r["item"]): r["result"] for r in map(json.loads, kept)}
        done = {item: known[json.dumps(item)] for item in todo if json.dumps(item) in known}
    left = [item for item in todo if item not in done]
    bar = tqdm(total=len(todo), initial=len(done), disable=None if progress else True)
    for item, result in _dask(job, left, scheduler) if scheduler else _local(job, left, processes):
        done[item] = result
        if out is not None:
            with open(out, "a") as file:
                file.write(json.dumps({"item": item, "result": result}) + "\n")
        bar.update()
    bar.close()
    return {item: done[item] for item in todo}


def _local(job: Job, items: list, processes: int):
    if processes == 1 or len(items) < 2:
        yield from ((item, job(item)) for item in items)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        futures = {pool.submit(job, item): item for item in items}
        try:
            for f in as_completed(futures):
                yield futures[f], f.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _dask(job: Job, items: list, address: str):
    from dask.distributed import Client, as_completed

    with Client(address) as client:
        client.run(one_thread)
        futures = {client.submit(job, item, pure=False): item for item in items}
        for f in as_completed(list(futures)):
            yield futures[f], f.result()
