"""What threads of Opacus on GitHub are about and no other test holds; the table of all is docs/opacus-issues.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import peak_memory
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from opacus_fgc import PrivacyError, check
from opacus_fgc.privacy_engine import MODES
from tests.test_loss import wrapped

N = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Unit(nn.Module):
    """A unit of exponential weights, as Neural Additive Models have it (issue 454)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(1, 5)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.bias) @ self.weight.exp()).clamp(0, 3)


class Additive(nn.Module):
    """One network a feature, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList(nn.Sequential(Unit(), nn.Linear(5, 1)) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [feature(column) for feature, column in zip(self.features, x.split(1, -1), strict=True)]
        return torch.cat(outputs, -1).sum(-1) + self.bias


def test_additive_model() -> None:
    check(Additive(), nn.BCEWithLogitsLoss(), torch.randn(N, 3), torch.rand(N)).raise_if_wrong()


class Decoder(nn.Module):
    """Its norm is used after each layer, for what the layers return, and at the end (issue 578)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            target = layer(target, memory)
            outputs.append(self.norm(target))
        return self.head(torch.stack([*outputs, self.norm(target)]).mean((0, 2)))


def test_norm_that_a_decoder_uses_in_two_places() -> None:
    inputs = torch.randn(N, 4, 8), torch.randn(N, 5, 8)
    check(Decoder(), nn.CrossEntropyLoss(), inputs, torch.randint(3, (N,))).raise_if_wrong()


class JoinedGraphs(nn.Module):
    """A convolution of graphs that are one large graph, and its mean over each (issue 588)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        hidden = self.convolution(nodes)
        hidden = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]]).relu()
        sizes = graph.bincount()
        return self.head(torch.zeros(len(sizes), 8).index_add(0, graph, hidden) / sizes[:, None])


class Isomorphism(nn.Module):
    """No layer is called on the nodes as they are (Xu et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.kinds = nn.Parameter(torch.zeros(1)), nn.Embedding(2, 8)
        self.update, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        around = torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])
        hidden = self.update((1 + self.eps) * nodes + around) + self.kinds((nodes[:, 0] > 0).long())
        return self.head(torch.zeros(int(graph.max()) + 1, 8).index_add(0, graph, hidden.relu()))


class LargestOfNodes(nn.Module):
    """The largest of each feature, so that most nodes have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.head = nn.Linear(4, 2), nn.Linear(2, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        hidden = self.update(nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]))
        largest = hidden.new_zeros(int(graph.max()) + 1, 2)
        return self.head(largest.scatter_reduce(0, graph[:, None].expand(-1, 2), hidden, "amax", include_self=False))


# Also as many nodes as graphs times three, or times four.
@pytest.mark.parametrize("sizes", [[3, 4, 5, 2], [3, 1, 5, 3], [5, 5, 4, 2, 4], [6, 6, 2, 2]])
@pytest.mark.parametrize("make", [JoinedGraphs, Isomorphism, LargestOfNodes])
@pytest.mark.parametrize("mode", MODES)
def test_joined_graphs(mode: str, make: type[nn.Module], sizes: list[int]) -> None:
    starts = [sum(sizes[:graph]) for graph in range(len(sizes))]
    rings = [torch.tensor([(i, (i + 1) % size) for i in range(size)]).mT for size in sizes]
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    nodes, y, loss = torch.randn(sum(sizes), 4), torch.randint(0, 3, (len(sizes),)), nn.CrossEntropyLoss()
    model = make()
    per_graph = []
    for start, size, ring, label in zip(starts, sizes, rings, y, strict=True):
        output = model(nodes[start : start + size], ring, torch.zeros(size, dtype=torch.long))
        per_graph.append(torch.autograd.grad(loss(output, label[None]), list(model.parameters())))
    norms = torch.stack([torch.cat([part.flatten() for part in gradient]).norm() for gradient in per_graph])
    module, criterion = wrapped(model, loss, backward=MODES[mode])
    module.max_grad_norm = norms.median().item()
    together = torch.cat([ring + start for ring, start in zip(rings, starts, strict=True)], 1)
    criterion(module(nodes, together, graph), y).backward()
    coef = (module.max_grad_norm / norms).clamp(max=1)
    for param, *parts in zip(model.parameters(), *per_graph, strict=True):
        wanted = sum(factor * part for factor, part in zip(coef, parts, strict=True))
        torch.testing.assert_close(param.summed_grad, wanted, rtol=1e-10, atol=1e-10)


class Nodes(nn.Module):
    """A convolution of one graph, whose nodes are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("adjacency", torch.rand(N, N).softmax(-1))

    def forward(self, nodes: Tensor) -> Tensor:
        return self.head((self.adjacency @ self.convolution(nodes)).relu())


@pytest.mark.parametrize("mode", MODES)
def test_nodes_as_samples_are_refused(mode: str) -> None:
    module, criterion = wrapped(Nodes(), nn.CrossEntropyLoss(), backward=MODES[mode])
    with pytest.raises(PrivacyError, match="mixes samples"):
        criterion(module(torch.randn(N, 4)), torch.randint(3, (N,))).backward()


class PaddedGraphs(nn.Module):
    """What to do instead: one row a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        hidden = (adjacency @ self.convolution(nodes)).relu() * mask[..., None]
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))


def test_padded_graphs() -> None:
    mask = (torch.arange(5) < torch.tensor([3, 4, 5, 2])[:, None]).double()
    inputs = torch.randn(4, 5, 4), torch.rand(4, 5, 5) * mask[:, None], mask
    check(PaddedGraphs(), nn.CrossEntropyLoss(), inputs, torch.randint(3, (4,))).raise_if_wrong()


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm], ids=["hook", "parametrization"])
def test_spectral_norm(norm: Callable) -> None:
    model = nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(64, 3)))
    check(model, nn.CrossEntropyLoss(), torch.randn(N, 1, 6, 6), torch.randint(3, (N,))).raise_if_wrong()


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_a_large_embedding(mode: str) -> None:
    """Pull request 694: a backward pass takes the room of the gradient, not of one for each sample."""
    rows, width, samples = 20_000, 4, 64
    table = 8 * rows * width  # bytes
    model = nn.Sequential(nn.EmbeddingBag(rows, width), nn.Linear(width, 3))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), backward=MODES[mode])
    tokens, target = torch.randint(rows, (samples, 5)), torch.randint(3, (samples,))
    step = lambda: criterion(module(tokens), target).backward()
    assert peak_memory(step, torch.device("cpu")) < 2 * table  # per-sample gradients are 64 tables
