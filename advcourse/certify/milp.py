"""A mixed-integer linear program column by column and row by row, and HiGHS to solve it: no modelling layer between.

    minimise cost·v   subject to   row_lower <= A v <= row_upper,   lower <= v <= upper,   v_j integer for some j
"""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from types import ModuleType
from typing import Any

import numpy as np

TINY = 1e-9     # HiGHS drops smaller coefficients: `rows` does so first, and widens the row by what they could add up to
# Measured on verification programs: heuristics cost most of the time and find nothing that the attack has not found.
OPTIONS: dict[str, Any] = {
    "output_flag": False, "threads": 1, "mip_heuristic_effort": 0.0, "mip_heuristic_run_feasibility_jump": False,
    "mip_heuristic_run_rins": False, "mip_heuristic_run_rens": False, "mip_heuristic_run_root_reduced_cost": False,
    "mip_detect_symmetry": False, "mip_allow_restart": False, "mip_pscost_minreliable": 1,
}
Watch = Callable[[float, float, "np.ndarray | None"], bool]


def highs() -> ModuleType:
    """The module highspy; ImportError naming the extra to install where it is missing."""
    try:
        import highspy
    except ImportError as error:
        raise ImportError("exact verification needs the solver HiGHS: pip install 'advcourse[certify]'") from error
    return highspy


@dataclass(frozen=True)
class Answer:
    """What the solver says, nothing more: status "optimal", "infeasible", "stopped" (limit or interrupt) or "failed".

    bound <= optimal value <= objective, as far as the solver got; values [columns] belong to `objective`, or None.
    """

    status: str
    bound: float
    objective: float
    values: np.ndarray | None
    nodes: int
    interrupted: bool = False


class Program:
    """Build with `columns` and `rows`, then `solve` or `write`."""

    def __init__(self) -> None:
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._row_bounds: list[tuple[np.ndarray, np.ndarray]] = []
        self.width = self.height = 0

    def columns(self, lower, upper, cost: Any = 0.0, integer: bool = False) -> np.ndarray:
        """Add variables with these bounds (arrays of one length); returns their indices."""
        lower = np.atleast_1d(np.asarray(lower, dtype=float))
        new = np.arange(self.width, self.width + len(lower))
        self._columns.append((lower, np.broadcast_to(np.asarray(upper, dtype=float), lower.shape),
                              np.broadcast_to(np.asarray(cost, dtype=float), lower.shape), np.full(len(lower), integer)))
        self.width += len(new)
        return new

    def rows(self, terms: Sequence[tuple[np.ndarray, np.ndarray]], lower, upper) -> None:
        """Add rows lower <= Σ_terms M v[columns] <= upper. M is a matrix [rows, columns] or, for a diagonal, [rows]."""
        lower, upper = np.atleast_1d(lower).astype(float), np.atleast_1d(upper).astype(float)
        n = max(len(lower), len(upper), max((len(M) for _, M in terms), default=0))
        slack = np.zeros(n)
        for columns, M in terms:
            if not len(columns):
                continue
            if M.ndim == 1:
                i, j, value = np.arange(n), columns, M
            else:
                i, k = np.nonzero(M)
                j, value = columns[k], M[i, k]
            keep = np.abs(value) >= TINY
            if not keep.all():
                reach = np.maximum(np.abs(self.lower[j]), np.abs(self.upper[j]))[~keep]
                np.add.at(slack, i[~keep], np.abs(value[~keep]) * reach)
            self._entries.append((i[keep] + self.height, j[keep], value[keep]))
        self._row_bounds.append((np.broadcast_to(lower, n) - slack, np.broadcast_to(upper, n) + slack))
        self.height += n

    @property
    def lower(self) -> np.ndarray:
        return np.concatenate([c[0] for c in self._columns])

    @property
    def upper(self) -> np.ndarray:
        return np.concatenate([c[1] for c in self._columns])

    @property
    def binaries(self) -> int:
        """Number of integer variables."""
        return int(sum(c[3].sum() for c in self._columns))

    @property
    def largest(self) -> float:
        """The largest coefficient, finite bound or right-hand side in absolute value: big ones make tolerances untrustworthy."""
        numbers = np.concatenate([self.lower, self.upper, *(e[2] for e in self._entries),
                                  *(b for pair in self._row_bounds for b in pair)])
        return float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))

    def load(self, options: dict[str, Any] | None = None) -> Any:
        """The program inside a fresh `highspy.Highs`."""
        from scipy.sparse import csr_array

        hs = highs()
        rows, columns, values = (np.concatenate([np.zeros(0), *part]) for part in zip(*self._entries, strict=True)) \
            if self._entries else (np.zeros(0),) * 3
        matrix = csr_array((values, (rows.astype(np.int64), columns.astype(np.int64))), shape=(self.height, self.width))
        lp = hs.HighsLp()
        lp.num_col_, lp.num_row_ = self.width, self.height
        lp.col_lower_, lp.col_upper_ = self.lower, self.upper
        lp.col_cost_ = np.concatenate([c[2] for c in self._columns])
        lp.row_lower_ = np.concatenate([np.zeros(0), *(b[0] for b in self._row_bounds)])
        lp.row_upper_ = np.concatenate([np.zeros(0), *(b[1] for b in self._row_bounds)])
        lp.a_matrix_.format_ = hs.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
        if self.binaries:
            kind = np.concatenate([c[3] for c in self._columns])
            lp.integrality_ = [hs.HighsVarType.kInteger if k else hs.HighsVarType.kContinuous for k in kind]
        solver = hs.Highs()
        for key, value in (OPTIONS | (options or {})).items():
            if solver.setOptionValue(key, value) != hs.HighsStatus.kOk:
                raise ValueError(f"options: HiGHS refuses {key}={value!r}")
        if solver.passModel(lp) == hs.HighsStatus.kError:
            raise ValueError("HiGHS refuses the program: a bound or coefficient is not finite")
        return solver

    def write(self, path) -> None:
        """Write the program as an MPS or LP file, after the suffix of `path`."""
        self.load().writeModel(str(path))

    def solve(self, *, time_limit: float | None = None, watch: Watch | None = None, **options) -> Answer:
        """Solve to the options' gap, for at most `time_limit` seconds.

        watch(bound, objective, values) is called now and then, values None unless a better solution was just found;
        when it returns True the search stops. Ctrl-C stops it too: the answer then has interrupted=True.
        """
        hs = highs()
        solver = self.load(options | ({} if time_limit is None else {"time_limit": max(float(time_limit), 0.0)}))
        stop = {"asked": False, "interrupted": False}
        with interrupts(stop):
            self._listen(hs, solver, watch, stop)
            solver.run()
        info, status = solver.getInfo(), solver.getModelStatus()
        S = hs.HighsModelStatus
        word = {S.kOptimal: "optimal", S.kInfeasible: "infeasible", S.kTimeLimit: "stopped", S.kInterrupt: "stopped"}
        found = info.primal_solution_status == hs.SolutionStatus.kSolutionStatusFeasible
        values = np.array(solver.getSolution().col_value) if found else None
        objective = float(info.objective_function_value) if found else inf
        bound = float(info.mip_dual_bound) if self.binaries else (objective if status == S.kOptimal else -inf)
        answer = word.get(status, "failed")
        if answer == "failed" or np.isnan(bound):
            bound = -inf
        return Answer(answer, inf if answer == "infeasible" else bound, objective, values,
                      max(0, int(info.mip_node_count)), stop["interrupted"])

    def _listen(self, hs, solver, watch: Watch | None, stop: dict[str, bool]) -> None:
        kind = hs.cb.HighsCallbackType

        def event(which, message, out, into, data) -> None:
            better = which == kind.kCallbackMipImprovingSolution
            if watch is not None and watch(out.mip_dual_bound, out.mip_primal_bound,
                                           np.array(out.mip_solution) if better else None):
                stop["asked"] = True
            if not better and (stop["asked"] or stop["interrupted"]):
                into.user_interrupt = True

        solver.setCallback(event, None)
        solver.startCallback(kind.kCallbackMipInterrupt)
        if self.binaries:
            solver.startCallback(kind.kCallbackMipImprovingSolution)
        else:
            solver.startCallback(kind.kCallbackSimplexInterrupt)


@contextmanager
def interrupts(stop: dict[str, bool]):
    """Ctrl-C sets a flag that the solver's callback reads: an exception must not cross the solver's own code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number, frame) -> None:
        stop["interrupted"] = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
