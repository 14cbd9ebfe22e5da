"""Systems that the benchmark compares, each a module with a subclass of `System`.

To add one, decorate its class with `register` and import its module in the list below.
"""

from slideredit_rt.evaluation.systems.base import SYSTEMS, System, register

# Importing a module registers its systems, so the order of these lines is the order of the tables.
# isort: off
from slideredit_rt.evaluation.systems import slideredit as slideredit
from slideredit_rt.evaluation.systems import pad_interpolation as pad_interpolation
from slideredit_rt.evaluation.systems import guidance as guidance
from slideredit_rt.evaluation.systems import merged_lora as merged_lora
from slideredit_rt.evaluation.systems import concept_sliders as concept_sliders
from slideredit_rt.evaluation.systems import attribute_offsets as attribute_offsets
# isort: on

__all__ = ["SYSTEMS", "System", "register"]
