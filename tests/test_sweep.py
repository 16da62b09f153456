"""The sweep: each item once, a file to resume from, errors passed on."""
import json
import os
from functools import partial
from math import inf

import pytest

from advcourse.sweep import certify_one, sweep

RAN: list[int] = []


def square(offset: int, i: int) -> dict:
    RAN.append(i)
    if i < 0:
        raise RuntimeError(f"item {i} is negative")
    return {"value": i * i + offset, "process": os.getpid()}


def values(results):
    return {i: r["value"] for i, r in results.items()}


def test_every_item_once_in_the_order_asked_for():
    RAN.clear()
    assert list(values(sweep(partial(square, 1), [3, 1, 3, 2], processes=1, progress=False)).items()) == [(3, 10), (1, 2), (2, 5)]
    assert RAN == [3, 1, 2]


def test_two_processes_give_the_same(tmp_path):
    results = sweep(partial(square, 0), range(4), tmp_path / "out.jsonl", processes=2, progress=False)
    assert values(results) == {i: i * i for i in range(4)} and os.getpid() not in {r["process"] for r in results.values()}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


def test_resumes_and_distrusts_half_a_line(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="item -1"):
        sweep(partial(square, 0), [1, 2, -1, 3], out, processes=1, progress=False)
    assert [json.loads(line)["item"] for line in out.read_text().splitlines()] == [1, 2]    # what was finished is kept
    out.write_text(out.read_text()[:-5])                                                    # killed in the middle of a write
    RAN.clear()
    assert values(sweep(partial(square, 0), [1, 2, 3], out, processes=1, progress=False)) == {1: 1, 2: 4, 3: 9}
    assert RAN == [2, 3]
    RAN.clear()
    assert values(sweep(partial(square, 0), [1, 2, 3], out, processes=1, progress=False)) == {1: 1, 2: 4, 3: 9} and RAN == []


def test_certifies_a_digit():
    result = sweep(partial(certify_one, "mnist-mlp50-standard", 0.001, inf, 10.0), [0], processes=1, progress=False)[0]
    assert result["status"] == "robust" and 0 < result["lower"] <= result["upper"]


def test_bad_number_of_processes():
    with pytest.raises(ValueError, match="processes=0"):
        sweep(partial(square, 0), [1], processes=0)
