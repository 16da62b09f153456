"""One program, many solvers: an MPS file handed to every mixed-integer solver found on this machine.

Open ones as Python packages (HiGHS, SCIP, GLPK and ECOS_BB) or as programs (CBC, lp_solve); commercial ones in the free,
size-limited form that their packages come with (Gurobi, CPLEX, Xpress, COPT), or with the reader's own licence (MOSEK).
Only what a solver says is returned: nothing here is a certificate.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Answer:
    """status "optimal", "infeasible", "out of time", "too large" (for a free licence), "needs a licence" or "failed"; the
    optimal value, nan without one; CPU seconds, those of a separate program included."""

    status: str
    value: float
    seconds: float
    note: str = ""


def _highs(path: Path, limit: float) -> tuple[str, float]:
    import highspy

    h = highspy.Highs()
    for option, v in (("output_flag", False), ("time_limit", float(limit)), ("threads", 1)):
        h.setOptionValue(option, v)
    h.readModel(str(path))
    h.run()
    status, s = h.getModelStatus(), highspy.HighsModelStatus
    known = {s.kOptimal: "optimal", s.kInfeasible: "infeasible", s.kTimeLimit: "out of time"}
    return known.get(status, "failed"), h.getInfo().objective_function_value


def _scip(path: Path, limit: float) -> tuple[str, float]:
    from pyscipopt import Model

    m = Model()
    m.hideOutput()
    m.readProblem(str(path))
    m.setParam("limits/time", limit)
    m.optimize()
    status = {"optimal": "optimal", "infeasible": "infeasible", "timelimit": "out of time"}.get(m.getStatus(), "failed")
    return status, m.getObjVal() if status == "optimal" else nan


@dataclass(frozen=True)
class Arrays:
    """min c v + offset, row_lower <= A v <= row_upper, lower <= v <= upper, v_j integer where `integer`."""

    c: np.ndarray
    A: np.ndarray
    row_lower: np.ndarray
    row_upper: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    integer: np.ndarray
    offset: float


def read(path: Path) -> Arrays:
    """The program in an MPS file as dense arrays, read by HiGHS."""
    import highspy

    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.readModel(str(path))
    lp = h.getLp()
    A = np.zeros((lp.num_row_, lp.num_col_))
    start, index, value = (np.array(v) for v in (lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_))
    line = np.repeat(np.arange(len(start) - 1), np.diff(start))
    A[(index, line) if lp.a_matrix_.format_ == highspy.MatrixFormat.kColwise else (line, index)] = value
    kinds = list(lp.integrality_) or [highspy.HighsVarType.kContinuous] * lp.num_col_
    integer = np.array([k == highspy.HighsVarType.kInteger for k in kinds])
    return Arrays(np.array(lp.col_cost_), A, np.array(lp.row_lower_), np.array(lp.row_upper_), np.array(lp.col_lower_),
                  np.array(lp.col_upper_), integer, lp.offset_)


def _glpk(path: Path, limit: float) -> tuple[str, float]:
    from cvxopt import glpk, matrix, sparse

    p = read(path)
    eye, equal = np.eye(len(p.c)), p.row_lower == p.row_upper
    parts = [(p.A, p.row_upper, ~equal), (-p.A, -p.row_lower, ~equal), (eye, p.upper, None), (-eye, -p.lower, None)]
    G, h = (np.concatenate(v) for v in zip(*[(M[keep], b[keep]) for M, b, on in parts
                                             for keep in [np.isfinite(b) & (True if on is None else on)]], strict=True))
    extra = (sparse(matrix(p.A[equal])), matrix(p.row_lower[equal])) if equal.any() else (
        matrix(0.0, (0, len(p.c))), matrix(0.0, (0, 1)))
    options = {"msg_lev": "GLP_MSG_OFF", "tm_lim": int(1000 * limit)}
    status, v = glpk.ilp(matrix(p.c), sparse(matrix(G)), matrix(h), *extra, I=set(np.flatnonzero(p.integer).tolist()),
                         B=set(), options=options)
    if "infeasible" in status:
        return "infeasible", nan
    if status != "optimal":
        return "out of time", nan
    return "optimal", float(p.c @ np.array(v)[:, 0]) + p.offset


def _ecos(path: Path, limit: float) -> tuple[str, float]:
    import cvxpy as cp

    p = read(path)
    v, b = cp.Variable(int((~p.integer).sum())), cp.Variable(int(p.integer.sum()), boolean=True)

    def times(M: np.ndarray):
        return (M[..., ~p.integer] @ v if v.size else 0) + (M[..., p.integer] @ b if b.size else 0)

    limits = [times(p.A[k]) <= p.row_upper[k] for k in [np.isfinite(p.row_upper)] if k.any()]
    limits += [times(p.A[k]) >= p.row_lower[k] for k in [np.isfinite(p.row_lower)] if k.any()]
    lower, upper = p.lower[~p.integer], p.upper[~p.integer]
    limits += [v[np.isfinite(lower)] >= lower[np.isfinite(lower)], v[np.isfinite(upper)] <= upper[np.isfinite(upper)]]
    problem = cp.Problem(cp.Minimize(times(p.c)), limits)
    problem.solve(solver=cp.ECOS_BB, mi_max_iters=int(4 * limit))
    known = {"optimal": "optimal", "infeasible": "infeasible", "user_limit": "out of time"}
    return known.get(problem.status, "failed"), float(problem.value or nan) + p.offset


def _program(command: list[str], value: str, infeasible: str) -> Callable[[Path, float], tuple[str, float]]:
    def run(path: Path, limit: float) -> tuple[str, float]:
        words = [w.format(path=path, limit=int(max(1, limit))) for w in command]
        said = subprocess.run(words, capture_output=True, text=True, timeout=limit + 30).stdout
        if re.search(infeasible, said):
            return "infeasible", nan
        found = re.search(value, said)
        return ("optimal", float(found[1])) if found and "topped on time" not in said else ("out of time", nan)
    return run


def _gurobi(path: Path, limit: float) -> tuple[str, float]:
    import gurobipy

    with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.read(str(path), env) as m:
        m.Params.TimeLimit, m.Params.Threads = limit, 1
        m.optimize()
        status = {2: "optimal", 3: "infeasible", 4: "infeasible", 9: "out of time"}.get(m.Status, "failed")
        return status, m.ObjVal if status == "optimal" else nan


def _cplex(path: Path, limit: float) -> tuple[str, float]:
    import cplex

    c = cplex.Cplex()
    for stream in (c.set_log_stream, c.set_results_stream, c.set_warning_stream, c.set_error_stream):
        stream(None)
    c.read(str(path))
    c.parameters.timelimit.set(float(limit))
    c.parameters.threads.set(1)
    c.solve()
    said = c.solution.get_status_string()
    status = "optimal" if "optimal" in said else "infeasible" if "infeasible" in said else "out of time"
    return status, c.solution.get_objective_value() if status == "optimal" else nan


def _xpress(path: Path, limit: float) -> tuple[str, float]:
    import xpress

    p = xpress.problem()
    p.controls.outputlog, p.controls.timelimit, p.controls.threads = 0, int(max(1, limit)), 1
    p.readProb(str(path), "")
    p.optimize()
    said = p.attributes.solstatus.name.lower()
    status = "optimal" if "optimal" in said else "infeasible" if "infeasible" in said else "out of time"
    return status, p.attributes.objval if status == "optimal" else nan


def _copt(path: Path, limit: float) -> tuple[str, float]:
    import coptpy

    settings = coptpy.EnvrConfig()
    settings.set("nobanner", "1")
    m = coptpy.Envr(settings).createModel("program")
    m.setParam("Logging", 0)
    m.setParam("TimeLimit", limit)
    m.read(str(path))
    m.solve()
    status = {1: "optimal", 2: "infeasible", 8: "out of time"}.get(m.status, "failed")
    return status, m.objval if status == "optimal" else nan


def _mosek(path: Path, limit: float) -> tuple[str, float]:
    import mosek

    with mosek.Env() as env, env.Task() as task:
        task.readdata(str(path))
        task.putdouparam(mosek.dparam.mio_max_time, limit)
        task.optimize()
        said = str(task.getsolsta(mosek.soltype.itg))
        return ("optimal", task.getprimalobj(mosek.soltype.itg)) if "optimal" in said else ("out of time", nan)


# name: (kind, what must be importable or on the path, how to run it)
SOLVERS: dict[str, tuple[str, str, Callable[[Path, float], tuple[str, float]]]] = {
    "HiGHS": ("open", "highspy", _highs),
    "SCIP": ("open", "pyscipopt", _scip),
    "GLPK": ("open", "cvxopt", _glpk),
    "ECOS_BB": ("open", "ecos", _ecos),
    "CBC": ("open", "cbc", _program(["cbc", "{path}", "-seconds", "{limit}", "-solve", "-quit"],
                                    r"Objective value:\s+(\S+)", r"(?i)problem is infeasible|proven infeasible")),
    "lp_solve": ("open", "lp_solve", _program(["lp_solve", "-fmps", "{path}", "-timeout", "{limit}", "-S3"],
                                              r"objective function:\s+(\S+)", r"infeasible")),
    "Gurobi": ("free form", "gurobipy", _gurobi),
    "CPLEX": ("free form", "cplex", _cplex),
    "Xpress": ("free form", "xpress", _xpress),
    "COPT": ("free form", "coptpy", _copt),
    "MOSEK": ("licence", "mosek", _mosek),
}


def _cpu() -> float:
    return sum(os.times()[:4])  # user and system, this process and the programs that it ran


@contextmanager
def _silent():
    """No banner of a solver reaches the reader, not even one printed by its C code."""
    kept, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(null)


def available(name: str) -> bool:
    """Is this solver installed here, as a Python package or as a program?"""
    needs = SOLVERS[name][1]
    return importlib.util.find_spec(needs) is not None or shutil.which(needs) is not None


def solve(name: str, path, seconds: float = 60.0) -> Answer:
    """Let one solver solve the minimisation in the MPS file `path`, with one thread and at most about `seconds`.

    A missing or refused licence, or a model beyond the free size, is an Answer, not an error. ValueError for an unknown
    name, a solver that is not installed, or a missing file.
    """
    if name not in SOLVERS:
        raise ValueError(f"name={name!r} is no solver known here: choose one of {', '.join(SOLVERS)}")
    if not available(name):
        raise ValueError(f"name={name!r}: {SOLVERS[name][1]} is not installed")
    if not Path(path).is_file():
        raise ValueError(f"path={str(path)!r} is no file")
    start = _cpu()
    try:
        with _silent():
            status, value = SOLVERS[name][2](Path(path), seconds)
    except Exception as error:  # each vendor has its own class
        said = str(error).lower()
        status = "too large" if re.search(r"size|1016|too large|community|limit|20[0-9]{2} (rows|col)", said) else \
            "needs a licence" if "licen" in said else "failed"
        return Answer(status, nan, _cpu() - start, str(error).strip().splitlines()[0][:90] if str(error) else "")
    return Answer(status, value if status == "optimal" else nan, _cpu() - start)
