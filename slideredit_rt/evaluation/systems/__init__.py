"""The ways to scale an edit that the benchmark compares, one module each behind `System`.

A new one is a module with a class that `register` decorates, and a line in the list below.
"""

from slideredit_rt.evaluation.systems.base import SYSTEMS, System, register

# In the order of tables: a module registers its systems when it is imported.
# isort: off
from slideredit_rt.evaluation.systems import slideredit as slideredit
from slideredit_rt.evaluation.systems import pad_interpolation as pad_interpolation
from slideredit_rt.evaluation.systems import guidance as guidance
from slideredit_rt.evaluation.systems import merged_lora as merged_lora
from slideredit_rt.evaluation.systems import concept_sliders as concept_sliders
from slideredit_rt.evaluation.systems import attribute_offsets as attribute_offsets
# isort: on

__all__ = ["SYSTEMS", "System", "register"]
