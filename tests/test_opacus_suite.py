"""Opacus' own unit tests, with this package's classes in place of Opacus'.

The tests come with Opacus and stay as they are: `load` swaps the classes that a test module has imported. What was written
for the modes with per-sample gradients is run in ghost mode by a mixin. `LEFT_OUT` says what is not run, and why.
"""

from __future__ import annotations

import math
import sys
import unittest
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from itertools import islice, product
from pkgutil import iter_modules
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import opacus
import pytest
import torch
from hypothesis import Phase, settings
from opacus import grad_sample, optimizers
from opacus.utils import fast_gradient_clipping_utils
from opacus.utils.module_utils import trainable_parameters
from opacus.utils.per_sample_gradients_utils import (
    ModelWithLoss,
    clone_module,
    compute_microbatch_grad_sample,
    is_batch_empty,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_fgc import (
    NORM_SAMPLERS,
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    DPTensorFastGradientClipping,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    PrivacyEngine,
)
from tests import torchvision_stand_in

# Opacus' tests give warnings of their own: softmax without a dim, pinned memory without a GPU, hooks that fire early.
pytestmark = pytest.mark.filterwarnings("ignore")

LEFT_OUT = {
    "GradSampleModuleTest": {
        "test_standard_module_validation": "looks for the attribute in which Opacus keeps functorch's function",
    },
    "GradSampleHooksTest": {
        "test_grad_sample_computation": "there are no per-sample gradients in ghost mode",
        "test_standard_module_validation": "looks for the attribute in which Opacus keeps functorch's function",
    },
    "GradSampleModuleFastGradientClippingEmbeddingLayerTest": {
        "test_gradient_calculation": "takes a mean for a sum, right only by Opacus' error with losses of shape (N, 1)",
    },
    "BasePrivacyEngineTest": {
        "test_per_layer_clipping": "ghost mode clips flat, by one norm over all parameters",
        "test_sample_grad_aggregation": "there are no per-sample gradients in ghost mode",
    },
    "GhostGradientAccumulationTest": {
        "test_batch_splitter_zero_grad": "wants an error on per-sample gradients that were not cleared; there are none",
        "test_grad_sample_accumulation": "there are no per-sample gradients in ghost mode",
        "test_privacy_engine_no_poisson_accumulation": "there are no per-sample gradients in ghost mode",
    },
    "Conv2d_test": {
        "test_asymetric_dilation_and_kernel_size": "tests per-sample gradients of Opacus",
        "test_unfold2d": "tests a function of Opacus",
    },
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Instead of the fixture of that name in conftest: Opacus' tests are for float32, and one leaves float64 behind."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    # The models are so small that threads only wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


# Opacus' test modules

SWAP = {
    opacus.PrivacyEngine: PrivacyEngine,
    grad_sample.GradSampleHooksFastGradientClipping: GradSampleHooksFastGradientClipping,
    grad_sample.GradSampleModuleFastGradientClipping: GradSampleModuleFastGradientClipping,
    optimizers.DPOptimizerFastGradientClipping: DPOptimizerFastGradientClipping,
    fast_gradient_clipping_utils.DPLossFastGradientClipping: DPLossFastGradientClipping,
    fast_gradient_clipping_utils.DPTensorFastGradientClipping: DPTensorFastGradientClipping,
}
MODULES: list[ModuleType] = []


def load(name: str, swap: dict[Any, Any] | None = None) -> ModuleType:
    """Imports one of Opacus' test modules and swaps what it has imported, in its namespace and nowhere else.

    Args:
        name: its name in ``opacus.tests``.
        swap: what to swap in it besides `SWAP`.
    """
    module = import_module(f"opacus.tests.{name}")
    for theirs, ours in (SWAP | (swap or {})).items():
        keys = [key for key, value in vars(module).items() if value is theirs]
        assert keys or theirs in SWAP, f"{name} does not use {theirs}"
        vars(module).update(dict.fromkeys(keys, ours))
    MODULES.append(module)
    return module


@contextmanager
def few_examples() -> Iterator[None]:
    """A context in which hypothesis tests are defined so that they try few examples, the same in every run."""
    settings.register_profile("before", settings.default)
    # No shrinking: one example may take a second.
    settings.register_profile("few", max_examples=16, derandomize=True, database=None, phases=[Phase.generate])
    settings.load_profile("few")
    try:
        yield
    finally:
        settings.load_profile("before")


def embedding_norms(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Our sampler for embeddings, called as Opacus' is."""
    return {param: form.norm() for param, form in NORM_SAMPLERS[nn.Embedding](layer, activations, backprops).items()}


with torchvision_stand_in.installed(), few_examples():
    # Here some models are wrapped by name and not by `CLS`.
    load("grad_sample_module_test", {grad_sample.GradSampleModule: GradSampleModuleFastGradientClipping})
    hooks = load("grad_sample_hooks_test", {grad_sample.GradSampleHooks: GradSampleHooksFastGradientClipping})
    ghost_module = load("grad_sample_module_fast_gradient_clipping_test")
    ghost_hooks = load("grad_sample_hooks_fast_gradient_clipping_test")
    embedding = load(
        "grad_samples.embedding_norm_sample_test",
        {grad_sample.embedding_norm_sample: SimpleNamespace(compute_embedding_norm_sample=embedding_norms)},
    )
    engine = load("privacy_engine_test")
    engine_validation = load("privacy_engine_validation_test")
    randomness = load("randomness_test")
    memory_manager = load("batch_memory_manager_test")
    accumulation = load("gradient_accumulation_test")
    noise_scheduler = load("schedulers.noise_scheduler_test")
    clip_scheduler = load("schedulers.grad_clip_scheduler_test")
    mixed_precision = load("mixed_precision_test")
    common = load("grad_samples.common")
    for info in iter_modules(import_module("opacus.tests.grad_samples").__path__, "grad_samples."):
        if info.name.endswith("_test"):
            load(info.name)


def expose(case: type[unittest.TestCase], *mixins: type, **attributes: Any) -> None:
    """Puts a class of Opacus' tests into this module, where pytest finds it, without those in `LEFT_OUT`.

    Args:
        case: the class.
        *mixins: what is to override its methods; their names go in front of its own.
        **attributes: what is to override its attributes.
    """
    name = "".join(cls.__name__ for cls in (*mixins, case))
    for owner in (name, *(cls.__name__ for cls in case.__mro__)):
        for test, reason in LEFT_OUT.get(owner, {}).items():
            attributes[test] = unittest.skip(reason)(getattr(case, test))
    globals()[name] = type(name, (*mixins, case), {"__module__": __name__, **attributes})


# Tests of ghost mode

expose(ghost_module.GradSampleModuleFastGradientClippingTest, CLS=GradSampleModuleFastGradientClipping)
expose(ghost_module.GradSampleModuleFastGradientClippingEmbeddingLayerTest)
expose(ghost_module.DPTensorArithmeticTest)
expose(ghost_hooks.GradSampleHooksFastGradientClippingTest)
expose(hooks.GradSampleHooksTest, CLS=GradSampleHooksFastGradientClipping)
expose(embedding.TestComputeEmbeddingNormSample)


class Float32Norms:
    def _train_low_precision(self, *args, grad_sample_mode, **kwargs):
        if grad_sample_mode == "ghost":
            self.skipTest("norms of half precision are float32")
        super()._train_low_precision(*args, grad_sample_mode=grad_sample_mode, **kwargs)


expose(mixed_precision.MixedPrecisionTest, Float32Norms)


# Tests of other modes, with our engine

expose(engine_validation.PrivacyEngineValidationTest)
expose(randomness.PrivacyEngineSecureModeTest)
expose(memory_manager.BatchMemoryManagerTest)
expose(accumulation.GradientAccumulationTest)


# Tests of other modes, in ghost mode


class Ghost:
    """Brings tests to ghost mode: the engine returns three values, as in other modes, and gives the test the criterion."""

    tested: ModuleType

    def setUp(self):
        test = self
        self.criteria = {}

        class Engine(PrivacyEngine):
            def make_private(self, **kwargs):
                # `test_make_private_with_epsilon` does not say where the batch is.
                kwargs["batch_first"] = getattr(test, "BATCH_FIRST", True)
                kwargs |= {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
                module, optimizer, test.criterion, data_loader = super().make_private(**kwargs)
                test.criteria[optimizer] = test.criterion
                return module, optimizer, data_loader

        engine = patch.object(self.tested, "PrivacyEngine", Engine)
        engine.start()
        self.addCleanup(engine.stop)
        super().setUp()
        self.GRAD_SAMPLE_MODE = "ghost"


class GhostTraining(Ghost):
    """Brings tests to ghost mode that train several models, private ones and others."""

    def _train_steps(self, model, optimizer, *args, **kwargs):
        self.criterion = self.criteria.get(optimizer, nn.CrossEntropyLoss())
        super()._train_steps(model, optimizer, *args, **kwargs)

    def _train_steps_with_closure(self, model, optimizer, *args, **kwargs):
        self.criterion = self.criteria.get(optimizer, nn.CrossEntropyLoss())
        super()._train_steps_with_closure(model, optimizer, *args, **kwargs)

    def _compare_to_vanilla(self, **options):
        # Noise with a standard deviation of 1e20 makes the next step's gradients infinite, and those are refused.
        diverges = options["do_noise"] and not options["do_clip"] and options["max_steps"] > 1
        with pytest.raises(ValueError, match="inf or NaN") if diverges else nullcontext():
            super()._compare_to_vanilla(**options)

    def test_noise_level(self):
        """Opacus' test of this name calls ``backward()`` on a loss that is not the criterion's."""
        steps, noise_multiplier = 4, 2.0
        model, optimizer, loader, _ = self._init_private_training(noise_multiplier=noise_multiplier)
        for param in model.parameters():
            param.data.zero_()
        for x, y in islice(loader, steps):
            optimizer.zero_grad()
            (0 * self.criterion(model(x), y)).backward()
            optimizer.step()

        weights = torch.cat([param.detach().flatten() for param in model.parameters() if param.requires_grad])
        variance = steps * (self.LR * noise_multiplier / optimizer.expected_batch_size) ** 2
        # Within five standard deviations of what is a chi-squared variable.
        assert abs(weights.square().mean().item() / variance - 1) < 5 * math.sqrt(2 / len(weights))


for model in ("ConvNet", "ConvNetFrozen", "Text", "TiedWeights", "CustomLayer"):
    expose(getattr(engine, f"PrivacyEngine{model}Test"), GhostTraining, tested=engine)
    # Without a wrapper, one model says enough in the default run.
    marks = [] if model == "Text" else [pytest.mark.slow]
    expose(getattr(engine, f"PrivacyEngine{model}HooksTest"), GhostTraining, tested=engine, pytestmark=marks)
expose(accumulation.GradientAccumulationTest, Ghost, tested=accumulation)
expose(noise_scheduler.NoiseSchedulerTest, Ghost, tested=noise_scheduler)
expose(clip_scheduler.GradClipSchedulerTest, Ghost, tested=clip_scheduler)


# Tests of per-sample gradients, layer by layer


class Norms:
    """Brings tests to norms: the reference are those of Opacus' microbatch gradients."""

    def run_test(self, x, module, batch_first=True, atol=10e-6, rtol=10e-5, ew_compatible=True, chunk_method=iter):
        ways = [{}, {"use_ghost_clipping": False}, {"force_functorch": True}]
        if isinstance(module, nn.EmbeddingBag):
            # As in Opacus: the samples of a bag with offsets cannot be taken apart by functorch.
            ways.pop()
        for way, loss_reduction in product(ways, ("sum", "mean")):
            with self.subTest(loss_reduction=loss_reduction, **way):
                model = GradSampleModuleFastGradientClipping(
                    clone_module(module), batch_first=batch_first, loss_reduction=loss_reduction, **way
                )
                with_loss = ModelWithLoss(model, loss_reduction)
                with_loss(x).backward()
                model.get_norm_sample()
                # Opacus' reference does not take packed sequences apart; ours does (tests/cases.py).
                if isinstance(x, PackedSequence) or is_batch_empty(x):
                    continue
                expected = compute_microbatch_grad_sample(x, module, batch_first, loss_reduction, chunk_method)
                for name, param in trainable_parameters(model._module):
                    norms = expected[name].flatten(1).norm(dim=1)
                    torch.testing.assert_close(param._norm_sample, norms, atol=atol, rtol=rtol)


for layer_test in common.GradSampleHooks_test.__subclasses__():
    expose(layer_test, Norms)
# Or pytest would find the last one, too.
del layer_test


# The swap


def test_swap() -> None:
    held = [value for module in MODULES for value in vars(module).values()]
    for theirs, ours in SWAP.items():
        assert not any(value is theirs for value in held), theirs
        assert any(value is ours for value in held), ours
    assert sys.modules.get("torchvision") is not torchvision_stand_in


@pytest.mark.parametrize(
    "case, test",
    [
        ("GradSampleModuleFastGradientClippingEmbeddingLayerTest", "test_norm_calculation"),
        ("GradSampleHooksFastGradientClippingTest", "test_hooks_vs_wrapped_equivalence"),
        ("GhostTrainingPrivacyEngineTextTest", "test_flat_clipping"),
        ("GhostTrainingPrivacyEngineTextHooksTest", "test_flat_clipping"),
        ("GhostGradientAccumulationTest", "test_privacy_engine_zero_grad"),
    ],
)
def test_opacus_tests_run_our_code(case: str, test: str) -> None:
    norms = GradSampleHooksFastGradientClipping.get_norm_sample
    with patch.object(GradSampleHooksFastGradientClipping, "get_norm_sample", autospec=True, side_effect=norms) as ours:
        assert globals()[case](test).run().wasSuccessful()
    assert ours.called
