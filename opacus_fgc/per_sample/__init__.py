"""The forms that a layer's per-sample gradients take, and all arithmetic on them.

A sampler says *which* form the gradients of a parameter have; everything else (norms, weighted
sums, parameters that are used several times or by several layers) follows here, once for all layers.

Shapes: ``N`` samples; ``T`` positions of a sample (tokens, pixels) at which the layer was applied.
"""

from opacus_fgc.per_sample.base import Dense, Measured, PerSampleGradient
from opacus_fgc.per_sample.convolution import Convolution
from opacus_fgc.per_sample.grouped import Grouped
from opacus_fgc.per_sample.logit_gradients import LogitGradients
from opacus_fgc.per_sample.norm_only import NormOnly, NormsOnlyError
from opacus_fgc.per_sample.outer import Outer
from opacus_fgc.per_sample.parts import Parts
from opacus_fgc.per_sample.ragged import Ragged, sum_over_runs
from opacus_fgc.per_sample.routed import Routed
from opacus_fgc.per_sample.rows import Rows
from opacus_fgc.per_sample.sum import Sum, add
from opacus_fgc.per_sample.sum_over_positions import SumOverPositions
from opacus_fgc.per_sample.tiled_outer import TiledOuter

__all__ = [
    "Convolution",
    "Dense",
    "Grouped",
    "LogitGradients",
    "Measured",
    "NormOnly",
    "NormsOnlyError",
    "Outer",
    "Parts",
    "PerSampleGradient",
    "Ragged",
    "Routed",
    "Rows",
    "Sum",
    "SumOverPositions",
    "TiledOuter",
    "add",
    "sum_over_runs",
]
