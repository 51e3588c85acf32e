"""Private names of torch and Opacus: `opacus_fgc/_compat` has them all, and each does what is relied on.

A test has the name of what it holds, in small letters. Where one fails with a new torch, all that has to change is its function.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleHooks, GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping as OpacusModule
from opacus.optimizers import DPOptimizerFastGradientClipping as OpacusOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import opacus_fgc
from opacus_fgc._compat import (
    autograd,
    backends,
    checkpointing,
    compiler,
    distributed,
    foreach,
    functorch,
    modules,
    opacus,
    overrides,
    pytree,
)
from opacus_fgc.distributed.topology import Layout
from tests.distributed_cases import needs_fsdp

ROOT = Path(opacus_fgc.__file__).parent
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
NESTED = {"a": (1, [2.5, None]), "b": torch.ones(2)}


# foreach


def test_foreach_div_() -> None:
    tensors = [torch.full((2,), 6.0), torch.full((3, 1), 9.0)]
    foreach.foreach_div_(tensors, 3)
    assert [tensor.unique().tolist() for tensor in tensors] == [[2.0], [3.0]]


# pytree


def test_tree_flatten() -> None:
    leaves, spec = pytree.tree_flatten(NESTED)
    assert leaves[:3] == [1, 2.5, None] and leaves[3] is NESTED["b"] and len(leaves) == 4
    assert isinstance(spec, pytree.TreeSpec)


def test_tree_unflatten() -> None:
    _, spec = pytree.tree_flatten(NESTED)
    assert pytree.tree_unflatten(list("wxyz"), spec) == {"a": ("w", ["x", "y"]), "b": "z"}


def test_treespec() -> None:
    """Tells nestings apart, and is the same for the same."""
    specs = [pytree.tree_flatten(tree)[1] for tree in ((1, [2]), (3, [4]), (1, 2), [1, [2]])]
    assert specs[0] == specs[1] and specs[0] != specs[2] and specs[0] != specs[3]


def test_tree_leaves() -> None:
    assert pytree.tree_leaves({"a": (1, [2, 3]), "b": 4}) == [1, 2, 3, 4]
    assert pytree.tree_leaves("ab") == ["ab"]


def test_tree_map_only() -> None:
    mapped = pytree.tree_map_only(Tensor, lambda tensor: tensor + 1, NESTED)
    assert mapped["a"] == (1, [2.5, None]) and mapped["b"].tolist() == [2, 2]


# autograd


def test_version_of() -> None:
    tensor = torch.ones(4)
    before = autograd.version_of(tensor)
    tensor[:2].add_(1)
    assert autograd.version_of(tensor) == before + 1
    assert autograd.version_of(tensor + 1) == 0
    assert autograd.version_of(tensor) == before + 1


def test_base_of() -> None:
    tensor = torch.ones(4)
    assert autograd.base_of(tensor) is None
    assert autograd.base_of(tensor[:2][1:]) is tensor
    assert autograd.base_of(tensor + 1) is None


def test_preserve_version_counter() -> None:
    tensor = torch.ones(3, requires_grad=True) * 2
    squared = tensor.square()
    with autograd.preserve_version_counter(tensor), torch.no_grad():
        kept = tensor.clone()
        tensor.zero_()
        tensor.copy_(kept)
    squared.sum().backward()  # autograd would refuse a tensor that was written to


def test_in_backward() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(autograd.in_backward())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(run, x, use_reentrant=False)
    y.register_hook(lambda gradient: seen.append(autograd.in_backward()))
    y.sum().backward()
    assert seen == [False, True, True]
    assert not autograd.in_backward()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_node_type() -> None:
    y = Double.apply(torch.ones(2, requires_grad=True))
    assert type(y.grad_fn) is autograd.node_type(Double)
    assert type(y.sin().grad_fn) is not autograd.node_type(Double)


INDEX = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "operation, name, wanted",
    [
        (lambda x: x.index_select(0, INDEX), "index", INDEX),
        (lambda x: x.index_select(1, INDEX), "dim", 1),
        (lambda x: x.index_select(-1, INDEX), "dim", 2**64 - 1),
        (lambda x: x.gather(0, INDEX[None].expand(2, 2)), "index", INDEX[None].expand(2, 2)),
        (lambda x: x[:, INDEX], "indices", (None, INDEX)),
        (lambda x: x[x > 1], "indices", (torch.tensor([[False, False], [True, True]]),)),
        (lambda x: x.masked_select(torch.eye(2) > 0), "mask", torch.eye(2) > 0),
        (lambda x: x.split([1, 1])[0], "split_sizes", (1, 1)),
        (lambda x: x.sort(0, descending=True)[0], "indices", torch.tensor([[1, 1], [0, 0]])),
        (lambda x: x.topk(2, 0)[0], "indices", torch.tensor([[1, 1], [0, 0]])),
        (lambda x: F.embedding(INDEX, x), "indices", INDEX),
    ],
)
def test_saved(operation: Callable[[Tensor], Tensor], name: str, wanted: Any) -> None:
    values = autograd.saved(operation(torch.arange(4.0).view(2, 2).requires_grad_()).grad_fn, name)
    for value, expected in zip(
        *((each if isinstance(each, (tuple, list)) else (each,)) for each in (values, wanted)), strict=True
    ):
        if isinstance(expected, Tensor):
            assert torch.equal(value, expected)
        else:
            assert value == expected


def test_is_kept() -> None:
    runs = []

    def run(x: Tensor) -> Tensor:
        runs.append(x)
        return x[:, INDEX + 0].index_select(0, INDEX + 0)

    x = torch.ones(2, 2, requires_grad=True)
    node = run(x).grad_fn
    assert autograd.is_kept(node, "index") == (TORCH >= (2, 8))
    assert autograd.is_kept(node.next_functions[0][0], "indices") == (TORCH >= (2, 8))
    node = checkpoint(run, x, use_reentrant=False).grad_fn
    assert autograd.is_kept(node, "dim")
    assert not autograd.is_kept(node, "index")
    assert not autograd.is_kept(node.next_functions[0][0], "indices")
    assert len(runs) == 2
    # That it runs again is what `is_kept` is there for.
    assert torch.equal(autograd.saved(node, "index"), INDEX)
    assert len(runs) == 3


def test_gradient_dtypes() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.half(), x.clone()

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
            return first.float() + second

    x = torch.ones(2, dtype=torch.float32, requires_grad=True)
    outputs = Halved.apply(x)
    node = outputs[0].grad_fn
    assert autograd.gradient_dtypes(node) == [torch.float16, torch.float32]
    assert autograd.gradient_dtypes(node.next_functions[0][0]) == [torch.float32]
    for output in (x.bfloat16(), torch.zeros(2, dtype=torch.bfloat16).add_(x)):
        assert autograd.gradient_dtypes(output.grad_fn) == [torch.bfloat16]


def test_gradient_hooks() -> None:
    param = nn.Parameter(torch.ones(2))
    assert autograd.gradient_hooks(param) == []
    first, second = lambda gradient: None, lambda gradient: None
    handle = param.register_hook(first)
    param.register_hook(second)
    assert autograd.gradient_hooks(param) == [first, second]
    handle.remove()
    param.register_post_accumulate_grad_hook(first)
    assert autograd.gradient_hooks(param) == [second]


def test_post_accumulate_grad_hooks() -> None:
    param = nn.Parameter(torch.ones(2))
    assert autograd.post_accumulate_grad_hooks(param) == []
    hook = lambda param: None
    handle = param.register_post_accumulate_grad_hook(hook)
    param.register_hook(lambda gradient: None)
    assert autograd.post_accumulate_grad_hooks(param) == [hook]
    handle.remove()
    assert autograd.post_accumulate_grad_hooks(param) == []


# checkpointing


def test_tells_checkpoints() -> None:
    assert TORCH < (2, 9) or checkpointing.TELLS_CHECKPOINTS


def test_innermost_checkpoint() -> None:
    frames: list[Any] = []
    again: list[int] = []

    def run(x: Tensor) -> Tensor:
        frames.append(checkpointing.innermost_checkpoint())
        return x.sin().exp()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(run, x, use_reentrant=False)
    if not checkpointing.TELLS_CHECKPOINTS:
        assert frames == [None]
        return
    before = frames[0].recompute_fn
    frames[0].recompute_fn = lambda *args: (again.append(len(frames)), before(*args))[1]
    y.sum().backward()
    assert again == [1] and len(frames) == 2
    assert checkpointing.innermost_checkpoint() is None
    with torch.autograd.graph.save_on_cpu():
        assert checkpointing.innermost_checkpoint() is None


# overrides


class Counted(Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_disabletorchfunctionsubclass() -> None:
    tensor = torch.ones(2).as_subclass(Counted)
    assert type(tensor + 1) is Counted and Counted.calls == 1
    with overrides.DisableTorchFunctionSubclass():
        assert type(tensor + 1) is Tensor
        assert type(tensor.as_subclass(Tensor)) is Tensor
    assert Counted.calls == 1


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_mm() -> None:
    names = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    rows, weight = torch.ones(4, 8, dtype=torch.float32), torch.ones(2, 8, 4, dtype=torch.float32)
    ends = torch.tensor([1, 4], dtype=torch.int32)
    with Noting():
        torch.nn.functional.grouped_mm(rows, weight, offs=ends)
    assert overrides.GROUPED_MM.intersection(names)


def test_current_function_mode() -> None:
    outermost = overrides.current_function_mode()  # of a default device
    with Mode() as outer:
        assert overrides.current_function_mode() is outer
        with Mode() as inner:
            assert overrides.current_function_mode() is inner
        assert overrides.current_function_mode() is outer
    assert overrides.current_function_mode() is outermost


# functorch


def test_innermost_transform() -> None:
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(functorch.innermost_transform() is not None)
        return x.square().sum()

    x = torch.ones(3)
    for run in (square, vmap(square), grad(square), partial(torch.autograd.functional.vjp, square)):
        run(x)
    assert seen == [False, True, True, False]
    assert functorch.innermost_transform() is None


def test_is_functorch_tensor() -> None:
    seen, x = [], torch.ones(3)

    def run(row: Tensor) -> Tensor:
        seen.extend((row, row.sin(), x))
        assert [functorch.is_functorch_tensor(tensor) for tensor in seen] == [True, True, False]
        return row.sum()

    vmap(run)(x)
    assert not functorch.is_functorch_tensor(x)
    assert functorch.is_functorch_tensor(seen[0])  # kept, as a criterion may keep it


def test_runs_in_one_vmap() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(functorch.runs_in_one_vmap())
        return x.sum()

    x = torch.ones(3, 3)
    for run in (note, vmap(note), vmap(vmap(note)), vmap(grad(note))):
        run(x)
    assert seen == [False, True, False, False]


def test_physical() -> None:
    x, shared = torch.randn(4, 3), torch.randn(3)

    def note(row: Tensor) -> Tensor:
        assert functorch.physical(shared) is None
        found = functorch.physical(row)
        assert found is not None
        tensor, axis, level = found
        assert tensor.shape == x.T.shape and axis == 1 and level == 1
        return row

    vmap(note, in_dims=1)(x.T)
    assert functorch.physical(x) is None


def test_outside_of_transforms() -> None:
    def note(row: Tensor) -> Tensor:
        assert functorch.innermost_transform() is not None
        with functorch.outside_of_transforms():
            assert functorch.innermost_transform() is None
        assert functorch.innermost_transform() is not None
        return row

    vmap(note)(torch.ones(2))


def test_batched() -> None:
    """With the two above, an operation on all rows at once, with its gradient."""
    x = torch.randn(4, 3, requires_grad=True)

    def doubled(row: Tensor) -> Tensor:
        tensor, axis, level = functorch.physical(row)
        with functorch.outside_of_transforms():
            assert functorch.innermost_transform() is None
            result = Double.apply(tensor.movedim(axis, 0))
        return functorch.batched(result, level).sin()

    output = vmap(doubled)(x)
    torch.testing.assert_close(output, (2 * x).sin())
    output.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x).detach().cos())


# compiler


def of_eager(graphs: list[Any]) -> Callable[..., Any]:
    """A backend for `torch.compile` that runs graphs as they are, and notes them."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return compile_graph


def test_disable_dynamo() -> None:
    torch.compiler.reset()
    graphs, seen = [], []

    @compiler.disable_dynamo
    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x.exp()

    compiled = torch.compile(lambda x: inner(x.sin()).cos(), backend=of_eager(graphs))
    x = torch.ones(3)
    for _ in range(2):
        assert torch.equal(compiled(x), x.sin().exp().cos())
    assert seen == [False, False]
    assert len(graphs) == 2 and not any("exp" in graph.code for graph in graphs)


def test_is_compiled() -> None:
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner)
    assert not compiler.is_compiled(inner)
    assert compiler.is_compiled(torch.compile(inner, backend="eager"))
    assert not compiler.is_compiled(inner)
    inner.compile(backend="eager")
    assert compiler.is_compiled(inner)
    assert not compiler.is_compiled(outer)


def test_uncompiled() -> None:
    module = nn.Linear(2, 2)
    assert compiler.uncompiled(module) is module
    assert compiler.uncompiled(torch.compile(module, backend="eager")) is module
    module.compile(backend="eager")
    assert compiler.uncompiled(module) is module


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().exp()


def test_call_uncompiled() -> None:
    torch.compiler.reset()
    graphs, seen = [], []
    module = Wave()
    module.compile(backend=of_eager(graphs))
    x = torch.ones(3, 2)
    module(x)
    assert graphs
    graphs.clear()
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    assert torch.equal(compiler.call_uncompiled(module, x=x), x.sin().exp())
    assert seen == ["before", "after"] and not graphs


@pytest.fixture
def trained_once() -> Iterator[Callable[[bool], Callable[[Tensor], Tensor]]]:
    """Makes a compiled function, given what `donates_buffers` is to be, of which a backward pass has run."""
    before = compiler.donates_buffers()

    def make(donates: bool) -> Callable[[Tensor], Tensor]:
        torch.compiler.reset()
        compiler.set_donates_buffers(donates)
        assert compiler.donates_buffers() == donates
        function = torch.compile(lambda x: x.sin().exp().sin().sum(), backend="aot_eager")
        function(torch.ones(3, requires_grad=True)).backward()
        return function

    yield make
    compiler.set_donates_buffers(before)


def test_donates_buffers(trained_once: Any) -> None:
    """What is given up in one backward pass is not there for another."""
    loss = trained_once(True)(torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="donated"):
        loss.backward(retain_graph=True)


def test_set_donates_buffers(trained_once: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    loss = trained_once(False)(x)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)


# modules


def kinds(*names: str) -> list[type]:
    return [getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3)]


def test_convnd() -> None:
    assert all(issubclass(kind, modules.ConvNd) for kind in kinds("Conv", "ConvTranspose", "LazyConv"))
    assert not issubclass(nn.Linear, modules.ConvNd)


def test_instancenorm() -> None:
    assert all(issubclass(kind, modules.InstanceNorm) for kind in kinds("InstanceNorm", "LazyInstanceNorm"))
    assert not any(issubclass(kind, modules.InstanceNorm) for kind in (nn.BatchNorm2d, nn.GroupNorm))


def test_normbase() -> None:
    """All layers of torch with running statistics."""
    assert all(issubclass(kind, modules.NormBase) for kind in kinds("BatchNorm", "InstanceNorm", "LazyBatchNorm"))
    assert issubclass(nn.SyncBatchNorm, modules.NormBase)
    of_torch = {value for value in vars(nn).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    with_statistics = {kind for kind in of_torch if "track_running_stats" in getattr(kind, "__constants__", ())}
    assert with_statistics and all(issubclass(kind, modules.NormBase) for kind in with_statistics)


def test_private_names_beside_forward() -> None:
    names = modules.PRIVATE_NAMES_BESIDE_FORWARD
    assert names <= set(dir(nn.Module))
    # A subclass that has others of these is called as before, with its hooks, and does the same.
    called = {name for function in (nn.Module._call_impl, nn.Linear.forward) for name in function.__code__.co_names}
    assert not names & called


def test_parameters_by_name() -> None:
    layer = nn.Linear(2, 2, bias=False)
    assert modules.parameters_by_name(layer) == {"weight": layer.weight, "bias": None}
    other, seen = torch.ones(2, 2), []
    layer.register_forward_hook(lambda layer, *_: seen.append(modules.parameters_by_name(layer)["weight"]))
    functional_call(layer, {"weight": other}, torch.ones(3, 2))
    assert seen[0] is other and modules.parameters_by_name(layer)["weight"] is layer.weight
    assert modules.parameters_by_name(nn.Sequential(layer)) == {}


def test_buffers_by_name() -> None:
    layer = nn.BatchNorm1d(2)
    table = modules.buffers_by_name(layer)
    assert table.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    before, layer.running_mean = dict(table), torch.ones(2)
    layer.register_buffer("new", None)
    assert table["running_mean"] is layer.running_mean and table["new"] is None
    table.clear()
    table.update(before)
    assert not hasattr(layer, "new") and layer.running_mean.tolist() == [0, 0]


def test_every_module() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.ModuleList([nn.Identity()]))
    model.add_module("none", None)
    assert modules.every_module(model) == list(model.modules())


def test_remove_forward_hooks() -> None:
    calls = []
    hook, other = lambda *_, **__: calls.append("hook"), lambda *_, **__: calls.append("other")
    layer = nn.Linear(2, 2)
    before = {name: dict(table) for name, table in vars(layer).items() if "hooks" in name}
    for one in (hook, other):
        handles = [
            layer.register_forward_pre_hook(one, with_kwargs=True),
            layer.register_forward_hook(one, with_kwargs=True, always_call=True),
        ]
    modules.remove_forward_hooks(layer, hook)
    layer(torch.ones(1, 2))
    assert calls == ["other", "other"]
    for handle in handles:
        handle.remove()
    # Nothing is left of any.
    assert {name: dict(table) for name, table in vars(layer).items() if "hooks" in name} == before


def test_with_parameters() -> None:
    layer, weight = nn.Linear(2, 2).eval(), torch.ones(3, 2)
    other = modules.with_parameters(layer, nn.Linear, {"weight": weight, "bias": None}, {"out_features": 3})
    assert type(other) is nn.Linear and other.out_features == 3 and not other.training
    x = torch.randn(4, 2)
    assert torch.equal(other(x), F.linear(x, weight)) and other.weight is weight
    assert layer.weight.shape == (2, 2) and layer.bias is not None and layer.out_features == 2


def test_dims_without_batch() -> None:
    for layer, dims in ((nn.InstanceNorm1d(2), 2), (nn.InstanceNorm2d(2), 3), (nn.InstanceNorm3d(2), 4)):
        assert modules.dims_without_batch(layer) == dims
        assert layer(torch.randn(2, *[2] * (dims - 1))).dim() == dims


# backends


def test_fp32_precision_getter() -> None:
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):
        before, get = settings.fp32_precision, backends.fp32_precision_getter(settings, "matmul")
        try:
            for precision in ("tf32", "ieee"):
                settings.fp32_precision = precision
                assert get() == settings.fp32_precision == precision
        finally:
            settings.fp32_precision = before
        assert get() == before
    assert backends.fp32_precision_getter(SimpleNamespace(fp32_precision="own"), "matmul")() == "own"


# distributed


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def node_types(tensor: Tensor) -> set[type]:
    todo, found = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        found.add(type(node))
        todo.extend(edge for edge, _ in node.next_functions if edge is not None)
    return found


on_cpu = pytest.mark.skipif(TORCH < (2, 7), reason="the FSDP2 of torch 2.6 does not run on CPUs")


@on_cpu
@pytest.mark.usefixtures("one_process")
def test_fsdp_node() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.FSDP_NODE in node_types(sharded(nn.Linear(2, 2))(x))
    assert distributed.FSDP_NODE not in node_types(nn.Linear(2, 2)(x))


@pytest.mark.usefixtures("one_process")
def test_require_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.require_fsdp()
    model = sharded(nn.Linear(2, 2))
    monkeypatch.setattr(distributed, "FSDP_NODE", None)
    with pytest.raises(NotImplementedError, match=r"fully_shard of torch .* is not one that is known here"):
        Layout(model)
    Layout(nn.Linear(2, 2))


@pytest.mark.usefixtures("one_process")
def test_meshes_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded(nn.Sequential(nn.Linear(2, 2), sharded(nn.Linear(2, 2)), sharded(nn.ReLU())))
    for module, count in ((model, 1), (model[1], 1), (model[2], 0)):
        meshes = distributed.meshes_of(module)
        assert len(meshes) == count
        assert all(mesh == model[1].weight.device_mesh for mesh in meshes)
    monkeypatch.setattr(type(model), "_get_fsdp_state", lambda self: object())
    with pytest.raises(NotImplementedError, match="fully_shard of torch"):
        distributed.meshes_of(model)


@pytest.mark.usefixtures("one_process")
def test_gradient_divisors() -> None:
    model = sharded(nn.Sequential(nn.Linear(2, 2), sharded(nn.ReLU())))
    assert distributed.gradient_divisors(model, 7) in ([7], [1])
    assert distributed.gradient_divisors(model[1], 7) == []
    setter = getattr(model, "set_gradient_divide_factor", None) or model.set_reduce_scatter_divide_factor
    setter(3.0)
    try:
        assert distributed.gradient_divisors(model, 7) == [3]
    except NotImplementedError as error:
        assert "set_reduce_scatter_divide_factor" in str(error)  # noqa: PT017


@needs_fsdp
@pytest.mark.usefixtures("one_process")
def test_gather_for_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded(nn.Sequential(nn.Linear(2, 2), sharded(nn.Linear(2, 2))))
    distributed.gather_for_loss(model[1])
    assert isinstance(model[0].weight, DTensor)
    assert not isinstance(model[1].weight, DTensor)
    model(torch.randn(3, 2))
    assert not isinstance(model[1].weight, DTensor)
    monkeypatch.setattr(type(model), "set_reshard_after_forward", property(lambda self: self.no_such_name))
    with pytest.raises(NotImplementedError, match="fully_shard of torch"):
        distributed.gather_for_loss(model)


@pytest.mark.usefixtures("one_process")
def test_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._composable import replicate

    module = nn.Linear(2, 2)
    assert not distributed.is_replicated(module)
    assert not distributed.is_replicated(sharded(nn.Linear(2, 2)))
    replicate(module)
    assert distributed.is_replicated(module)
    # Its name in the package is that of a function in it.
    monkeypatch.delattr(sys.modules["torch.distributed._composable.contract"], "_get_registry")
    with pytest.raises(NotImplementedError, match="does not tell whether replicate was called"):
        distributed.is_replicated(nn.Linear(2, 2))


WITHOUT_FSDP = """
    import sys
    import torch
    from torch import nn
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    del _fsdp_param_group.RegisterPostBackwardFunction
    del sys.modules["torch.distributed._composable.contract"]._get_registry
    loaded = "torch._dynamo" in sys.modules
    import opacus_fgc
    from opacus_fgc._compat import distributed

    assert ("torch._dynamo" in sys.modules) == loaded  # `disable_dynamo` does not load it
    assert distributed.FSDP_NODE is None
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.randint(2, (8,)))
    model, optimizer, criterion, loader = opacus_fgc.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    for x, y in loader:
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    layer = nn.Linear(2, 2)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    try:
        opacus_fgc.GradSampleModuleFastGradientClipping(layer)
    except NotImplementedError as error:
        print(error)
"""


def test_all_but_fsdp_works_without_it() -> None:
    """A torch whose FSDP2 has another inside: the package is imported, and trains; a model in `fully_shard` is refused."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WITHOUT_FSDP)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"fully_shard of torch {torch.__version__} is not one that is known here" in done.stdout


# Opacus


def test_generate_noise() -> None:
    reference = torch.zeros(100, 100)
    noise = [
        opacus.generate_noise(std=3.0, reference=reference, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert noise[0].shape == reference.shape and noise[0].dtype == reference.dtype
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert abs(noise[0].mean()) < 0.2 and abs(noise[0].std() - 3) < 0.2
    assert not opacus.generate_noise(std=0.0, reference=reference, generator=None).any()


def test_mark_as_processed() -> None:
    """Opacus' own optimizer takes no gradient that is marked so."""
    layer = nn.Linear(2, 2)
    optimizer = OpacusOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2
    )
    for param in layer.parameters():
        param.summed_grad = torch.ones_like(param)
        opacus.mark_as_processed(param.summed_grad)
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.add_noise()


def test_check_processed_flag() -> None:
    gradient = torch.ones(2)
    opacus.check_processed_flag(gradient)
    opacus.mark_as_processed(gradient)
    with pytest.raises(ValueError, match="zero_grad"):
        opacus.check_processed_flag(gradient)
    opacus.check_processed_flag(gradient.clone())


def test_wrapped_model() -> None:
    for kind in (GradSampleModule, OpacusModule, GradSampleHooks):
        model = nn.Linear(2, 2)
        assert opacus.wrapped_model(kind(model)) is model


def test_norm_sample() -> None:
    """Opacus' own norms are there."""
    model = OpacusModule(nn.Linear(2, 2))
    params = list(model.parameters())
    assert [opacus.norm_sample(param) for param in params] == [None, None]
    model(torch.randn(3, 2, requires_grad=True)).square().sum().backward()
    assert all(opacus.norm_sample(param).shape == (3,) for param in params)
    model.zero_grad()
    total = torch.stack([opacus.norm_sample(param) for param in params]).norm(dim=0)
    torch.testing.assert_close(model.get_norm_sample(), total)


def test_set_norm_sample() -> None:
    """Opacus finds it."""
    model = OpacusModule(nn.Linear(2, 2))
    for param, norm in zip(model.parameters(), (3.0, 4.0), strict=True):
        opacus.set_norm_sample(param, torch.full((2,), norm))
    assert model.get_norm_sample().tolist() == [5, 5]
    for param in model.parameters():
        opacus.set_norm_sample(param, None)
        assert opacus.norm_sample(param) is None


# The one place

COMPAT = {path: path.read_text() for path in sorted((ROOT / "_compat").glob("*.py"))}
OTHERS = {path: path.read_text() for path in sorted(ROOT.rglob("*.py")) if path not in COMPAT}


def public_names(source: str) -> list[str]:
    """What a file of `_compat` offers."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.extend(target.id for target in targets if isinstance(target, ast.Name))
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize("path", COMPAT, ids=lambda path: path.stem)
def test_each_name_has_a_test_and_is_used(path: Path) -> None:
    used = {
        alias.name
        for source in (*OTHERS.values(), (Path(__file__).parent / "operation_cases.py").read_text())
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == f"opacus_fgc._compat.{path.stem}"
        for alias in node.names
    }
    for name in public_names(COMPAT[path]):
        assert f"test_{name.lower()}" in globals(), name
        assert name in used or f"{name}()" in COMPAT[path].partition(f"def {name}")[2], name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def private_names_of_torch() -> set[str]:
    """Those of the objects of torch and Opacus that the package meets, of this version, and those that come and go."""
    weight = torch.ones(2, requires_grad=True)
    owners = [
        *(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.InstanceNorm1d(1), nn.Conv1d(1, 1, 1), nn.LSTM(1, 1), weight),
        *(weight.sin().grad_fn, Double, TorchFunctionMode, torch, torch._C, torch.autograd, torch.overrides, dist),
        *(OpacusModule(nn.Linear(1, 1)), OpacusOptimizer, PrivacyEngine),
    ]
    ours = {name for name in vars(Counted) if is_private(name)}
    fixed = {"_fsdp_param_group", "_fsdp_param_groups", "_get_fsdp_state", "_local_tensor", "_norm_sample"}
    fixed |= {"_orig_mod", "_post_accumulate_grad_hooks", "_processed", "_raw_saved_", "_saved_", "_spec"}
    return fixed | {name for owner in owners for name in dir(owner) if is_private(name)} - ours


def own_names(sources: list[str]) -> set[str]:
    """The private names that the package gives itself: functions, classes, attributes, and what it writes on tensors."""
    names = {"_shared_version", "_copied_version", "_finite_version"}
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Assign) and "__slots__" in map(ast.unparse, node.targets):
            names.update(ast.literal_eval(node.value))
    return {name for name in names if is_private(name)}


def is_self(node: ast.AST) -> bool:
    """Whether it is the object itself, or its base class: overriding is not reading."""
    return ast.unparse(node) in ("self", "cls", "super()")


OF_PYTHON = {"_abc_impl", "_fields", "_getframe", "_replace"}
OF_TORCH = private_names_of_torch()
OWN = own_names(list(OTHERS.values())) - OF_TORCH


def private_uses(source: str) -> list[str]:
    """Where a file imports or reads a name that torch or Opacus has for itself, by an attribute or by a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "opacus"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            names = [name for name in names if is_private(name)]
        elif isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            names = [name for path in paths if path[0] in ("torch", "opacus") for name in path if is_private(name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"_[a-zA-Z]\w*", node.value):
                names = [node.value]
            elif re.fullmatch(r"(torch|opacus)(\.\w+)+", node.value):
                names = [name for name in node.value.split(".") if is_private(name)]
        imported = isinstance(node, (ast.Import, ast.ImportFrom))
        found += [f"line {node.lineno}: {name}" for name in names if imported or name not in OWN | OF_PYTHON]
    return found


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_are_in_compat_alone(path: Path) -> None:
    assert private_uses(OTHERS[path]) == []


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map_only",
        "from torch.utils import _pytree as pytree",
        "from torch.nn.modules.conv import _ConvNd",
        "from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction",
        "from opacus.optimizers.optimizer import _generate_noise",
        "import torch._dynamo",
        "def inside():\n    from torch.distributed._composable.contract import _get_registry",
        "importlib.import_module('torch._dynamo')",
        "torch._C._current_graph_task_id()",
        "@torch._disable_dynamo\ndef function(): ...",
        "torch.autograd._unsafe_preserve_version_counter(tensor)",
        "tensor._version",
        "tensor._base is None",
        "tensor.grad_fn._saved_dim",
        "getattr(node, f'_saved_{name}')",
        "getattr(torch._C, '_get_fp32_precision_getter', None)",
        "getattr(module, '_orig_mod', module)",
        "attrgetter('_version')",
        "vars(module)['_parameters']",
        "module._parameters",
        "module._buffers.clear()",
        "module._call_impl()",
        "module._compiled_call_impl",
        "module._forward_hooks_with_kwargs",
        "param._backward_hooks",
        "param._norm_sample = norm",
        "self.module._module",
        "Tap._backward_cls",
        "state._fsdp_param_group",
        "dtensor._local_tensor",
        "tensor._a_name_that_torch_has_not_yet",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert private_uses(code)


@pytest.mark.parametrize(
    "code",
    [
        "from opacus_fgc._compat.pytree import tree_map_only",
        "from torch.utils.checkpoint import checkpoint",
        "self._module(x)",
        "super()._prepare_model(x)",
        "tensor._shared_version = 3",
        "measured._replace(norm=norm)",
        "other._summed",
        "'a text that says _version'",
        "tensor.__dict__",
    ],
)
def test_the_search_leaves(code: str) -> None:
    assert private_uses(code) == []
