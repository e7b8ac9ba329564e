"""Who shares which sequence: for every batch a plan of micro-batches, groups of ranks, and their documents.

    problem = named_problem(lengths, "gpt-7b-384k", "64xA100-40G")
    plan = plan_batch(problem, Options(seconds=1.0))
    print(plan.step_seconds, plan.gap, plan.active_bound)

A ``Problem`` is documents, a ``Cluster``, and a ``CostModel``. A ``Plan`` is frozen, hashable, and goes to JSON and
back; it names its lower bound, its gap, and the baselines that it beats, and ``check``, which shares no code with the
solver, accepts or refuses it. Stages: static plans, a heuristic that packs documents under deadlines, a bound, and an
exact program for small problems (PuLP, and HiGHS, CBC or SCIP; all optional). Nothing here imports torch, and nothing
needs a GPU.

Papers: FlexSP (arXiv 2412.01523) for the problem and its constants; Hochbaum and Shmoys (1987) for packing under
deadlines; Lenstra, Shmoys and Tardos (1990) for the relaxation.
"""

if __name__ != "seqpar.planner":
    raise ImportError("import it as seqpar.planner: under two names there would be two of everything in it")

from seqpar.planner.ahead import Ahead as Ahead
from seqpar.planner.check import PlanRefusedError as PlanRefusedError
from seqpar.planner.check import check as check
from seqpar.planner.plan import Baseline as Baseline
from seqpar.planner.plan import Plan as Plan
from seqpar.planner.plan import PlannedGroup as PlannedGroup
from seqpar.planner.plan import PlannedMicroBatch as PlannedMicroBatch
from seqpar.planner.plan import from_json as from_json
from seqpar.planner.problem.explain import InfeasibleError as InfeasibleError
from seqpar.planner.problem.files import costs_from_json as costs_from_json
from seqpar.planner.problem.files import costs_to_json as costs_to_json
from seqpar.planner.problem.files import read_costs as read_costs
from seqpar.planner.problem.models import Decoder as Decoder
from seqpar.planner.problem.models import Gpu as Gpu
from seqpar.planner.problem.models import analytic_cluster as analytic_cluster
from seqpar.planner.problem.models import analytic_costs as analytic_costs
from seqpar.planner.problem.named import named_problem as named_problem
from seqpar.planner.problem.problem import Cluster as Cluster
from seqpar.planner.problem.problem import CostModel as CostModel
from seqpar.planner.problem.problem import GroupKind as GroupKind
from seqpar.planner.problem.problem import Problem as Problem
from seqpar.planner.problem.problem import problem_of as problem_of
from seqpar.planner.problem.published import published_cluster as published_cluster
from seqpar.planner.problem.published import published_costs as published_costs
from seqpar.planner.problem.published import published_models as published_models
from seqpar.planner.show.report import text as text
from seqpar.planner.solve import Options as Options
from seqpar.planner.solve import plan_batch as plan_batch
from seqpar.planner.solve import static_plan as static_plan
