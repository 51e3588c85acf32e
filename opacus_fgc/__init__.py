"""Differentially private training with the memory of ordinary training: fast ghost clipping for Opacus."""

from opacus_fgc.criterion.causal_lm import CausalLMLoss
from opacus_fgc.criterion.chunked_causal_lm import ChunkedCausalLMLoss
from opacus_fgc.errors import PrivacyError
from opacus_fgc.grad_sample_module import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    create_norm_sample,
)
from opacus_fgc.grad_scaler import GradScaler
from opacus_fgc.loss import DPLossFastGradientClipping, DPTensorFastGradientClipping
from opacus_fgc.model_check.check import check
from opacus_fgc.model_check.report import CheckReport
from opacus_fgc.norm_samplers import NORM_SAMPLERS, register_norm_sampler
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.privacy_engine import PrivacyEngine

__version__ = "0.2.0"

__all__ = [
    "NORM_SAMPLERS",
    "CausalLMLoss",
    "CheckReport",
    "ChunkedCausalLMLoss",
    "DPLossFastGradientClipping",
    "DPOptimizerFastGradientClipping",
    "DPTensorFastGradientClipping",
    "GradSampleHooksFastGradientClipping",
    "GradSampleModuleFastGradientClipping",
    "GradScaler",
    "PrivacyEngine",
    "PrivacyError",
    "check",
    "create_norm_sample",
    "register_norm_sampler",
]
