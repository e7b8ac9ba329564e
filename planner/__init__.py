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

from planner.ahead import Ahead as Ahead
from planner.check import PlanRefusedError as PlanRefusedError
from planner.check import check as check
from planner.explain import InfeasibleError as InfeasibleError
from planner.files import costs_from_json as costs_from_json
from planner.files import costs_to_json as costs_to_json
from planner.files import read_costs as read_costs
from planner.models import Decoder as Decoder
from planner.models import Gpu as Gpu
from planner.models import analytic_cluster as analytic_cluster
from planner.models import analytic_costs as analytic_costs
from planner.named import named_problem as named_problem
from planner.plan import Baseline as Baseline
from planner.plan import Plan as Plan
from planner.plan import PlannedGroup as PlannedGroup
from planner.plan import PlannedMicroBatch as PlannedMicroBatch
from planner.plan import from_json as from_json
from planner.problem import Cluster as Cluster
from planner.problem import CostModel as CostModel
from planner.problem import GroupKind as GroupKind
from planner.problem import Problem as Problem
from planner.problem import problem_of as problem_of
from planner.published import published_cluster as published_cluster
from planner.published import published_costs as published_costs
from planner.published import published_models as published_models
from planner.report import text as text
from planner.solve import Options as Options
from planner.solve import plan_batch as plan_batch
from planner.solve import static_plan as static_plan
