"""One MPS file through every solver that is installed: the same answer from each, worked out by hand or by enumeration."""
from itertools import product

import numpy as np
import pytest

from advcourse.certify import solvers
from advcourse.certify.milp import Program

HERE = [name for name in solvers.SOLVERS if solvers.available(name)]


@pytest.fixture(scope="module")
def knapsack(tmp_path_factory):
    """Twelve things to pack, two weights, one continuous remainder; the optimum by trying all 4,096 packings."""
    r = np.random.default_rng(0)
    worth, weight = r.integers(5, 30, 12).astype(float), r.integers(3, 20, (2, 12)).astype(float)
    program = Program()
    packed = program.columns(np.zeros(12), np.ones(12), cost=-worth, integer=True)
    rest = program.columns([0.0], [1.5], cost=-2.0)
    program.rows([(packed, weight), (rest, np.ones((2, 1)))], [-np.inf, -np.inf], [40.0, 45.0])
    path = tmp_path_factory.mktemp("mps") / "knapsack.mps"
    program.write(path)
    value = min(-worth @ b - 2 * min(1.5, *(np.array([40.0, 45.0]) - weight @ b))
                for b in map(np.array, product((0, 1), repeat=12)) if (weight @ b <= [40, 45]).all())
    return path, value


def infeasible(path):
    program = Program()
    two = program.columns(np.zeros(2), np.ones(2), cost=1.0, integer=True)
    program.rows([(two, np.ones((1, 2)))], [2.5], [np.inf])
    program.write(path)
    return path


def test_the_open_solvers_of_the_tested_set_are_here():
    assert {"HiGHS", "SCIP", "GLPK", "ECOS_BB"} <= set(HERE)


@pytest.mark.parametrize("name", HERE)
def test_every_solver_finds_the_enumerated_optimum(name, knapsack):
    path, value = knapsack
    answer = solvers.solve(name, path, 20)
    if solvers.SOLVERS[name][0] != "open" and answer.status in ("needs a licence", "too large"):
        pytest.skip(f"{name}: {answer.status}")
    assert answer.status == "optimal" and answer.value == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", HERE)
def test_every_solver_sees_infeasibility(name, tmp_path):
    answer = solvers.solve(name, infeasible(tmp_path / "p.mps"), 20)
    if solvers.SOLVERS[name][0] != "open" and answer.status in ("needs a licence", "too large"):
        pytest.skip(f"{name}: {answer.status}")
    assert answer.status == "infeasible" and np.isnan(answer.value)


def test_the_arrays_are_the_program(knapsack):
    p = solvers.read(knapsack[0])
    assert p.A.shape == (2, 13) and p.integer.tolist() == [True] * 12 + [False]
    assert p.row_upper.tolist() == [40, 45] and (p.row_lower == -np.inf).all()
    assert p.upper[-1] == 1.5 and p.c[-1] == -2


def test_solvers_print_nothing(knapsack, capfd):
    for name in HERE:
        solvers.solve(name, knapsack[0], 20)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name, path, word", [("Simplex99", "a", "Simplex99"), ("HiGHS", "no-such-file.mps", "no-such-file")])
def test_bad_input_is_named(name, path, word):
    with pytest.raises(ValueError, match=word):
        solvers.solve(name, path)


def test_a_missing_solver_is_named(monkeypatch, knapsack):
    monkeypatch.setitem(solvers.SOLVERS, "None", ("open", "no_such_package", solvers.SOLVERS["HiGHS"][2]))
    with pytest.raises(ValueError, match="no_such_package is not installed"):
        solvers.solve("None", knapsack[0])
