"""Our own branch and bound over linear programs, for what a MILP solver does not take: a Euclidean ball.

A node fixes the phases of some ReLUs; its linear program relaxes the others to triangles and the ball to tangents. The
child inherits its parent's basis, so that a node costs a few pivots. The unit to branch on is the one whose chord costs
most according to the program's own multipliers. Where a solution satisfies every ReLU but lies outside the ball, its
tangents are added (cutting planes) and the node is solved again: the relaxation always contains the true set, so every
bound on the way is valid.
"""
from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from math import inf

import numpy as np

from advcourse.certify.milp import Answer, Watch, highs, interrupts
from advcourse.certify.relu_program import ReluProgram

EXACT = 1e-7    # a ReLU is satisfied when h or s is below this


class LinearPrograms:
    """The program without integrality, kept in HiGHS from node to node: phases change, the basis stays."""

    def __init__(self, relu: ReluProgram) -> None:
        self.relu, self.solver = relu, relu.program.load({"presolve": "off"})
        hs = highs()
        self.states = hs.HighsModelStatus
        for column in relu.phase:
            self.solver.changeColIntegrality(int(column), hs.HighsVarType.kContinuous)
        self.fixed: dict[int, int] = {}
        l, u = -relu.program.upper[relu.s], relu.program.upper[relu.h]
        self.chord = u * -l / (u - l)

    def solve(self, phases: dict[int, int]) -> tuple[str, float, np.ndarray, np.ndarray]:
        """(status, value, solution, score of each unit [units]: how much its chord seems to cost, 0 if it is satisfied)."""
        for j in self.fixed.keys() | phases.keys():
            if self.fixed.get(j) != phases.get(j):
                low, high = (phases[j], phases[j]) if j in phases else (0, 1)
                self.solver.changeColBounds(int(self.relu.phase[j]), float(low), float(high))
        self.fixed = dict(phases)
        self.solver.run()
        status = self.solver.getModelStatus()
        if status not in (self.states.kOptimal, self.states.kInfeasible):       # once more, from scratch
            self.solver.clearSolver()
            self.solver.run()
            status = self.solver.getModelStatus()
        if status != self.states.kOptimal:
            return ("infeasible" if status == self.states.kInfeasible else "failed"), inf, np.zeros(0), np.zeros(0)
        solution = self.solver.getSolution()
        values = np.array(solution.col_value)
        price = np.abs(np.array(solution.row_dual)[self.relu.unit_rows])
        violated = np.minimum(values[self.relu.h], values[self.relu.s]) > EXACT
        score = np.where(violated, self.chord * price + 1e-9, 0.0)
        return "optimal", self.solver.getInfo().objective_function_value, values, score


def search(build: Callable[[], ReluProgram], refine: Callable[[ReluProgram, np.ndarray], bool], *, at_most: float,
           time_limit: float = inf, gap: float = 0.0, watch: Watch | None = None) -> tuple[Answer, ReluProgram]:
    """Minimise the margin over the program that `build` returns, as far as it may be below `at_most`; best node first.

    refine(program, values) is asked about a solution that satisfies every ReLU: True means that it is a solution of the true
    problem too; False means that it was cut off, and the program is built anew. The search ends when no open node is
    more than `gap` below the best solution, or `watch` says so. Returns the answer and the program it belongs to.
    """
    start, order, nodes, best, stop = time.perf_counter(), 0, 0, at_most, {"asked": False, "interrupted": False}
    programs = LinearPrograms(build())
    heap: list[tuple[float, int, dict[int, int]]] = [(-inf, 0, {})]
    found, failed = None, False
    with interrupts(stop):
        while heap and heap[0][0] < best - gap:
            bound, _, phases = heapq.heappop(heap)
            if time.perf_counter() - start > time_limit or stop["interrupted"] or \
                    (watch is not None and watch(min(bound, best), best if found is not None else inf, None)):
                heapq.heappush(heap, (bound, 0, phases))
                break
            nodes += 1
            status, value, values, score = programs.solve(phases)
            if status == "failed":
                failed = True
                break
            if status == "infeasible" or value >= best - gap:
                continue
            if score.any():
                unit = int(score.argmax())
                for phase in (1, 0):
                    order += 1
                    heapq.heappush(heap, (max(bound, value), order, {**phases, unit: phase}))
            elif refine(programs.relu, values):
                best, found = value, values
                if watch is not None and watch(min(bound, value), value, values):
                    break
            else:
                programs, order = LinearPrograms(build()), order + 1
                heapq.heappush(heap, (max(bound, value), order, phases))
    word = "failed" if failed else "stopped" if heap and heap[0][0] < best - gap else \
        "infeasible" if found is None else "optimal"
    lower = -inf if failed else min([best if found is not None else inf, *(b for b, _, _ in heap)])
    return Answer(word, lower, best if found is not None else inf, found, nodes, stop["interrupted"]), programs.relu
