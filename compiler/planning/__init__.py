"""What a spec will take, before anything runs. Neither torch nor numpy."""

from archwright.compiler.planning.plan_file import check_plan, write_plan
from archwright.compiler.planning.planner import plan
from archwright.compiler.planning.report import PlanReport

__all__ = ["PlanReport", "check_plan", "plan", "write_plan"]
