"""What a run will need, told before it starts: batch arithmetic, memory, traffic, data, time."""

from adaptive.planning.checks import CheckedPlan as CheckedPlan
from adaptive.planning.checks import check_plan as check_plan
