"""The cases of parameters that belong to no layer, of inputs that the batch shares, and of modules that use both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from opacus_fgc._compat.checkpointing import TELLS_CHECKPOINTS
from tests.case import Apply, Case, Square, classes, floats, frozen, tokens
from tests.cases import LAYERS, OfTimeFirst, ScaleByOwn
from tests.changed_cases import CHANGED


class Own(nn.Module):
    """A module with parameters of its own, children, and a function of them and the inputs.

    Args:
        function: called with the module and the inputs.
        shapes: of the parameters, by name.
        children: by name.
    """

    def __init__(self, function: Callable, shapes: dict[str, tuple[int, ...]], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class HandWrittenRMSNorm(nn.Module):
    """As language models have it."""

    def __init__(self, features: int, one_plus: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.one_plus = one_plus

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight) if self.one_plus else self.weight * x


class Block(nn.Module):
    """Of a vision transformer, with LayerScale and a table of relative positions."""

    def __init__(self, positions: int, features: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.gamma = nn.Parameter(torch.randn(features))
        self.table = nn.Parameter(torch.randn(2 * positions - 1, heads))
        distance = torch.arange(positions)[:, None] - torch.arange(positions)
        self.register_buffer("index", distance + positions - 1)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        bias = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1).contiguous()
        attention = (q @ k.mT + bias.unsqueeze(0)).softmax(-1)
        return x + self.gamma * (attention @ v).transpose(1, 2).flatten(2)


def vision_transformer(checkpointing: bool = False) -> nn.Module:
    def forward(m: Own, x: Tensor) -> Tensor:
        patches = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), patches], dim=1) + m.positions
        x = checkpoint(m.block, x, use_reentrant=False) if checkpointing else m.block(x)
        return m.head(m.norm(x)[:, 0])

    shapes = {"token": (1, 1, 4), "positions": (1, 5, 4)}
    return Own(
        forward,
        shapes,
        patches=nn.Conv2d(1, 4, 2, stride=2),
        block=Block(5),
        norm=HandWrittenRMSNorm(4),
        head=nn.Linear(4, 3),
    )


def attention(self_attention: bool = True, call: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    options = {"embed_dim": 4, "num_heads": 2, "batch_first": True} | options

    def forward(m: Apply, x: Tensor, y: Tensor | None = None) -> Tensor:
        key = x if self_attention else y
        output, weights = m.a(x, key, key if "vdim" not in options else key[..., : options["vdim"]], **(call or {}))
        return output if weights is None else output.flatten(1).sum(1) + weights.flatten(1).square().sum(1)

    return Apply(forward, a=nn.MultiheadAttention(**options))


def attention_cases() -> list[Case]:
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True]])
    x, y = floats(3, 4), floats(5, 4)
    rows: dict[str, Callable[[], nn.Module]] = {
        "self": lambda: attention(),
        "no-weights": lambda: attention(call={"need_weights": False}),
        "weights-of-heads": lambda: attention(call={"average_attn_weights": False}),
        "causal": lambda: attention(call={"attn_mask": mask, "is_causal": True, "need_weights": False}),
        "float-mask": lambda: attention(call={"attn_mask": torch.randn(3, 3)}),
        "extra-keys": lambda: attention(call={"attn_mask": mask}, add_bias_kv=True, add_zero_attn=True),
        "no-bias": lambda: attention(bias=False),
    }
    other: dict[str, Callable[[], nn.Module]] = {
        "cross": lambda: attention(False),
        "cross-kdim": lambda: attention(False, kdim=4, vdim=2),
    }
    return [
        *(Case(f"attention-{name}", make, [x]) for name, make in rows.items()),
        *(Case(f"attention-{name}", make, [x, y]) for name, make in other.items()),
        Case(
            "attention-padded",
            lambda: Apply(
                lambda m, x: m.a(x, x, x, key_padding_mask=padding.expand(len(x), -1))[0],
                a=nn.MultiheadAttention(4, 2, batch_first=True),
            ),
            [x],
        ),
        Case(
            "attention-time-first",
            lambda: Apply(lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=nn.MultiheadAttention(4, 2)),
            [x],
            functorch=False,
        ),
        Case(
            "transformer-encoder",
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
            [x],
        ),
        Case(
            "transformer-decoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True), 1),
            [x, y],
        ),
    ]


def again(function: Callable, *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def scaled(m: Own, x: Tensor) -> Tensor:
    return x + m.p * m.a(m.norm(x))


class OfTwo(nn.Module):
    """Has no parameter of its own, but a list and a dict of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"first": nn.Parameter(torch.randn(3, 4))})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x.tanh() * scale + self.shifts["first"]
        return x


def biased(m: Own, x: Tensor, bias: Tensor) -> Tensor:
    return (x @ x.mT + bias).softmax(-1) @ m.a(x)


def checkpointed_cases() -> list[Case]:
    def with_bias(m: Own, x: Tensor) -> Tensor:
        bias = m.p[torch.arange(3)[:, None] - torch.arange(3) + 2]
        for _ in range(2):
            x = again(lambda x, bias: biased(m, x, bias), x, bias)
        return x

    def nested(m: Own, x: Tensor) -> Tensor:
        return again(lambda x: again(lambda y: scaled(m, y), x).tanh() * m.p, x)

    def parts() -> dict[str, nn.Module]:
        return {"norm": nn.LayerNorm(4), "a": nn.Linear(4, 4)}

    makes: dict[str, Callable[[], nn.Module]] = {
        "function": lambda: Own(lambda m, x: again(lambda x: scaled(m, x), x), {"p": (4,)}, **parts()),
        "twice": lambda: Own(
            lambda m, x: again(lambda x: scaled(m, x), again(lambda x: scaled(m, x), x)), {"p": (4,)}, **parts()
        ),
        "nested": lambda: Own(nested, {"p": (4,)}, **parts()),
        "with-what-the-batch-shares": lambda: Own(with_bias, {"p": (5,)}, a=nn.Linear(4, 4)),
        "lists-of-parameters": lambda: Apply(lambda m, x: m.b(again(m.a, x)), a=OfTwo(), b=nn.Linear(4, 2)),
        "parametrized": lambda: Apply(
            lambda m, x: again(m.a, m.b(x)), a=weight_norm(nn.Linear(4, 4, bias=False)), b=nn.Linear(4, 4)
        ),
        "some-positions": lambda: Own(
            lambda m, x: again(lambda x: m.a(x + m.b(torch.arange(3))) * m.p, x),
            {"p": (4,)},
            a=nn.Linear(4, 4),
            b=nn.Embedding(5, 4),
        ),
    }
    told = makes.items() if TELLS_CHECKPOINTS else ()
    return [Case(f"checkpointed-{name}", make, [floats(3, 4)], functorch=False) for name, make in told]


class Fourier(nn.Module):
    """Of a neural operator: the lowest modes of the spectrum, mixed over channels."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        weight = torch.randn(2, 3, 4, dtype=torch.complex128)
        self.pairs = pairs
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if pairs else weight)
        self.filter = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        modes = torch.einsum("nik,iok->nok", spectrum[..., :4], weight) * self.filter
        return torch.fft.irfft(modes, n=x.shape[-1])


def prompt_of_one_row(m: Apply, x: Tensor) -> Tensor:
    ids = m.ids["first"].unsqueeze(0).expand(len(x), -1)
    rows = m.project(m.prompt(ids[:1])).repeat(len(x), 1, 1)
    return m.head(torch.cat([rows, x], 1).tanh())


def first_row_of_a_prompt(m: Apply, x: Tensor) -> Tensor:
    return m.head(x + m.prompt(m.ids["first"][None])[0].mean(0))


def with_ids(model: nn.Module) -> nn.Module:
    model.ids = {"first": torch.arange(3)}
    return model


def scaled_by_the_norm_of_a_product(m: Own, x: Tensor) -> Tensor:
    update = m.up(m.down(torch.eye(4))).T
    scale = m.magnitude / (m.base.weight + update.detach()).norm(dim=1).detach()
    return scale * (m.base(x) + m.up(m.down(x)))


def merged(m: Apply, x: Tensor) -> Tensor:
    return F.linear(x, m.up.weight @ m.down.weight) + m.up(m.down(torch.eye(4))).square().mean()


def hyper(m: Own, x: Tensor) -> Tensor:
    weight = torch.zeros(3, 4)
    weight[0] = m.p
    weight[1:] = m.net(torch.ones(2, 2))
    return F.linear(x, weight)


def initial_state(m: Own, x: Tensor) -> Tensor:
    inputs = m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    state = m.p.expand(len(x), -1)
    for step in inputs.unbind(1):
        state = (step + m.b(state)).tanh()
    return state


class Relative(nn.Module):
    """An index of relative positions in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9))
        self.q = nn.Linear(4, 4)
        index = torch.arange(5)[:, None] - torch.arange(5) + 4
        self.cached = [{"index": index}]

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return (q @ q.mT + self.table[self.cached[0]["index"]]).softmax(-1) @ x


def queries(copies: Callable[[Tensor, int], Tensor], batch_first: bool = True) -> nn.Module:
    def forward(m: Own, x: Tensor) -> Tensor:
        keys = x if batch_first else x.transpose(0, 1)
        found = m.a(copies(m.p, len(x)), keys, keys)[0]
        return m.head(found if batch_first else found.transpose(0, 1))

    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    return Own(forward, {"p": (3, 4)}, a=attention, head=nn.Linear(4, 2))


def with_mask_token(m: Own, x: Tensor) -> Tensor:
    h = m.a(x)
    h[x[..., 0] > 0] = m.p
    return h


def with_time_first(m: Apply, x: Tensor) -> Tensor:
    return m.a(x.transpose(0, 1)).transpose(0, 1)


def shared_cases() -> list[Case]:
    makes: dict[str, Callable[[], nn.Module]] = {
        "prompt-of-one-row": lambda: with_ids(
            Apply(prompt_of_one_row, prompt=nn.Embedding(3, 4), project=nn.Linear(4, 4), head=nn.Linear(4, 2))
        ),
        "first-row-of-a-prompt": lambda: with_ids(
            Apply(first_row_of_a_prompt, prompt=nn.Embedding(3, 4), head=nn.Linear(4, 2))
        ),
        "scaled-by-a-norm": lambda: Own(
            scaled_by_the_norm_of_a_product,
            {"magnitude": (5,)},
            base=frozen(nn.Linear(4, 5), "weight", "bias"),
            down=nn.Linear(4, 2, bias=False),
            up=nn.Linear(2, 5, bias=False),
        ),
        "hypernetwork": lambda: Own(hyper, {"p": (4,)}, net=nn.Linear(2, 4)),
        "initial-state": lambda: Own(initial_state, {"p": (1, 4)}, a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "queries-repeated": lambda: queries(lambda p, n: p[:, None].repeat(1, n, 1), False),
        "queries-repeated-by-element": lambda: queries(lambda p, n: p[None].repeat_interleave(n, 0)),
        "queries-stacked": lambda: queries(lambda p, n: torch.stack([p] * n)),
        "queries-stacked-second": lambda: queries(lambda p, n: torch.stack([p] * n, dim=1), False),
        "queries-joined": lambda: queries(lambda p, n: torch.cat([p[None]] * n)),
        "mask-token": lambda: Own(with_mask_token, {"p": (4,)}, a=nn.Linear(4, 4)),
    }
    # Torch makes nothing of no tensors.
    of_lists = {"queries-stacked", "queries-stacked-second", "queries-joined"}
    return [
        *(
            Case(f"shared-{name}", make, [floats(6, 4)], functorch=False, empty=name not in of_lists)
            for name, make in makes.items()
        ),
        Case("shared-index", Relative, [floats(5, 4)]),
        Case(
            "merged",
            lambda: Apply(merged, down=nn.Linear(4, 2, bias=False), up=nn.Linear(2, 3, bias=False)),
            [floats(6, 4)],
            functorch=False,
        ),
        Case("columns", lambda: Own(lambda m, x: (m.p @ x.T).T, {"p": (3, 4)}), [floats(4)]),
        Case("column", lambda: Own(lambda m, x: torch.matmul(m.p, x.T)[:, None], {"p": (4,)}), [floats(4)]),
        Case(
            "transformer-with-time-first",
            lambda: Apply(
                with_time_first,
                a=nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(4, 2, 8, 0.0), 2, nn.LayerNorm(4), enable_nested_tensor=False
                ),
            ),
            [floats(3, 4)],
            functorch=False,
        ),
    ]


def complex_cases() -> list[Case]:
    return [
        Case("fourier-pairs", lambda: nn.Sequential(Fourier(True), nn.Linear(8, 2)), [floats(2, 8)], empty=False),
        Case("fourier-complex", lambda: nn.Sequential(Fourier(False), nn.Linear(8, 2)), [floats(2, 8)], empty=False),
        Case(
            "complex-linear",
            lambda: Apply(
                lambda m, x: torch.view_as_real(m.a(torch.complex(x, x.square()))).flatten(1),
                a=nn.Linear(4, 3, dtype=torch.complex128),
            ),
            [floats(4)],
        ),
    ]


class HiddenProduct(torch.autograd.Function):
    """An operation of somebody's own, which torch.func can do nothing with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


def looked_at(m: Own, x: Tensor) -> Tensor:
    return HiddenProduct.apply(x, m.p) if x.abs().max().item() != -1 else x


def repeated_token(m: Own, x: Tensor) -> Tensor:
    return m.a(torch.cat((x, m.p.repeat(x.shape[0], 1, 1)), 1))


def written_token(m: Own, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 0] = m.p
    h[:, 1:] += m.q
    return h


def masked(m: Own, x: Tensor) -> Tensor:
    return m.a(torch.where(x[..., :1] > 0, m.p, x) * m.q.exp()[None])


def position_ids(m: Apply, x: Tensor) -> Tensor:
    return m.head(m.tokens(x) + m.positions(torch.arange(x.shape[1])))


ROW = torch.arange(3)[None]


def one_row_of_position_ids(m: Apply, x: Tensor) -> Tensor:
    return m.head(m.tokens(x) + m.positions(ROW) + m.positions(torch.zeros_like(x[:1])))


def relative_positions(m: Apply, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    bias = m.table((positions[:, None] - positions).abs()).permute(2, 0, 1).unsqueeze(0)
    q = m.q(x).unflatten(2, (2, -1)).transpose(1, 2)
    return ((q @ q.mT + bias).softmax(-1) @ q).transpose(1, 2).flatten(2)


def positions_written_through_a_view(m: Own, x: Tensor) -> Tensor:
    places = torch.arange(4)
    index = torch.stack([places[:, None] - places, places[:, None] - places], 2)
    index[:, :, 0] += 3
    index[:, :, 1].add_(3).mul_(0)
    return m.head(x) * m.p[index.sum(2)]


def network_of_positions(m: Apply, x: Tensor) -> Tensor:
    distances = torch.linspace(-1, 1, x.shape[1])[None, :, None]
    return m.head(x + F.relu(m.a(distances)).view(-1, 4))


def prompt(m: Own, x: Tensor) -> Tensor:
    prompt = m.project(m.p).unsqueeze(0).expand(x.shape[0], -1, -1)
    return m.head(torch.cat([prompt, x], 1))


def functional_layers(m: Own, x: Tensor) -> Tensor:
    h = F.conv2d(x, m.kernel, m.shift, stride=2, padding=1)
    h = F.group_norm(h, 2, m.scale, m.shift)
    h = F.layer_norm(h.flatten(2), (4,), m.a, m.b)
    h = F.linear(h, m.weight, m.b) @ m.matrix
    return torch.matmul(h, m.matrix.T)


def adapted(m: Own, x: Tensor) -> Tensor:
    return F.linear(x, m.base.weight + m.up @ m.down, m.base.bias)


def two_uses(m: Own, x: Tensor) -> Tensor:
    return m.p * m.a(x + m.p) + m.a(m.p * x)


def conditional(m: Own, x: Tensor, y: Tensor) -> Tensor:
    return m.a(x + F.embedding(y, m.table)) + m.table[y]


def repeated_by_head(m: Own, x: Tensor) -> Tensor:
    """As models with disentangled attention do: positions are repeated for each sample, behind an axis of heads."""
    heads = m.a(x).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    positions = m.project(m.p).unflatten(1, (2, -1)).transpose(0, 1).repeat(len(x), 1, 1)
    return torch.bmm(heads, positions.mT).unflatten(0, (-1, 2))


OPERATIONS = [
    Case("vit", vision_transformer, [floats(1, 4, 4)], tokens(3), classes),
    Case("vit-checkpointed", lambda: vision_transformer(True), [floats(1, 4, 4)], tokens(3), classes, functorch=False),
    Case("rms-norm-by-hand", lambda: HandWrittenRMSNorm(4), [floats(3, 4)]),
    Case("rms-norm-by-hand-1+", lambda: nn.Sequential(nn.Linear(4, 4), HandWrittenRMSNorm(4, True)), [floats(3, 4)]),
    Case("own-repeat", lambda: Own(repeated_token, {"p": (1, 1, 4)}, a=nn.Linear(4, 4)), [floats(3, 4)]),
    Case(
        "own-repeated-by-head",
        lambda: Own(repeated_by_head, {"p": (5, 4)}, project=nn.Linear(4, 4), a=nn.Linear(4, 4)),
        [floats(3, 4)],
    ),
    Case(
        "own-written",
        lambda: Own(written_token, {"p": (4,), "q": (2, 4)}, a=nn.Linear(4, 4)),
        [floats(3, 4)],
    ),
    Case("own-where", lambda: Own(masked, {"p": (4,), "q": (3, 4)}, a=nn.Linear(4, 4)), [floats(3, 4)]),
    Case(
        "own-in-place",
        lambda: Own(lambda m, x: m.a(x).mul_(m.p).add_(m.q), {"p": (4,), "q": (1, 4)}, a=nn.Linear(4, 4)),
        [floats(3, 4)],
    ),
    Case("own-two-uses", lambda: Own(two_uses, {"p": (4,)}, a=nn.Linear(4, 4)), [floats(3, 4)]),
    Case(
        "own-scalar",
        lambda: Own(lambda m, x: m.a(x) * m.p + m.q / x, {"p": (), "q": (1,)}, a=nn.Linear(4, 4)),
        [floats(4)],
    ),
    Case(
        "own-einsum", lambda: Own(lambda m, x: torch.einsum("ntd,dhk->nhtk", x, m.p), {"p": (4, 2, 3)}), [floats(3, 4)]
    ),
    Case(
        "own-einsum-with-a-constant-of-as-many-rows-as-samples",
        lambda: Own(lambda m, x: torch.einsum("nd,dk,k->nk", x, m.p, torch.arange(5.0)), {"p": (4, 5)}),
        [floats(4)],
    ),
    Case(
        "own-mixed-positions", lambda: Own(lambda m, x: m.p @ m.a(x), {"p": (3, 3)}, a=nn.Linear(4, 2)), [floats(3, 4)]
    ),
    Case("own-addmm", lambda: Own(lambda m, x: torch.addmm(m.b, x, m.w), {"w": (4, 3), "b": (3,)}), [floats(4)]),
    Case(
        "own-functional-layers",
        lambda: Own(
            functional_layers,
            {
                "kernel": (4, 2, 3, 3),
                "shift": (4,),
                "scale": (4,),
                "a": (4,),
                "b": (4,),
                "weight": (4, 4),
                "matrix": (4, 3),
            },
        ),
        [floats(2, 4, 4)],
    ),
    Case(
        "tokens-made-one-with-the-batch",
        lambda: Own(
            lambda m, x: m.b(m.a(x.flatten(0, 1)).mul(m.p).relu()).unflatten(0, (-1, 3)),
            {"p": (4,)},
            a=nn.Linear(3, 4),
            b=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
        ),
        [floats(3, 3)],
    ),
    Case(
        "frames-made-one-with-the-batch",
        lambda: Apply(
            lambda m, x: m.b(m.a(x.flatten(0, 1)).flatten(1)).unflatten(0, (-1, 2)),
            a=nn.Conv2d(1, 2, 3),
            b=nn.Linear(8, 3),
        ),
        [floats(2, 1, 4, 4)],
    ),
    Case("own-conditional", lambda: Own(conditional, {"table": (7, 4)}, a=nn.Linear(4, 4)), [floats(4), tokens(7)]),
    Case("own-adapter", lambda: Own(adapted, {"up": (4, 2), "down": (2, 3)}, base=nn.Linear(3, 4)), [floats(5, 3)]),
    Case(
        "own-prompt",
        lambda: Own(prompt, {"p": (2, 4)}, project=nn.Linear(4, 4), head=nn.Linear(4, 2)),
        [floats(3, 4)],
    ),
    Case("own-unused", lambda: Own(lambda m, x: m.a(x), {"p": (4,)}, a=nn.Linear(4, 4)), [floats(4)]),
    Case(
        "own-only-in-a-scale",
        lambda: Own(lambda m, x: m.a(x) * m.p.softmax(0).sum(), {"p": (4,)}, a=nn.Linear(4, 4)),
        [floats(4)],
    ),
    Case(
        "own-time-first",
        lambda: Own(lambda m, x: m.a(x) * m.p + m.q, {"p": (4,), "q": (3, 1, 4)}, a=nn.Linear(4, 4)),
        [floats(3, 4)],
        tokens(4, 3),
        lambda reduction: OfTimeFirst(classes(reduction)),
        batch_first=False,
    ),
    Case(
        "functional-head",
        lambda: Apply(lambda m, x: F.linear(m.a(x), m.a.weight), a=nn.Linear(3, 3)),
        [floats(3)],
        functorch=False,
    ),
    Case(
        "functional-tied-head",
        lambda: Apply(lambda m, x: F.linear(m.b(m.a(x)), m.a.weight), a=nn.Embedding(7, 3), b=nn.Linear(3, 3)),
        [tokens(7, 4)],
        functorch=False,
    ),
    Case(
        "child-that-is-not-called",
        lambda: Apply(lambda m, x: F.linear(m.b(x), m.a.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 3)),
        [floats(3)],
        functorch=False,
    ),
    Case("part-of-two", lambda: (lambda a: nn.Sequential(ScaleByOwn(), a, nn.Tanh(), a))(nn.Linear(4, 4)), [floats(4)]),
    Case(
        "shared-mask",
        lambda: Own(lambda m, x: torch.einsum("st,ntd->nsd", torch.arange(25.0).view(5, 5), x) * m.p, {"p": (4,)}),
        [floats(5, 4)],
    ),
    Case(
        "own-expanded-over-as-many-positions-as-samples",
        lambda: Own(lambda m, x: m.a(x) + m.p.expand(x.shape[1], -1), {"p": (1, 4)}, a=nn.Linear(4, 4)),
        [floats(5, 4)],
    ),
    Case(
        "own-repeated-over-as-many-positions-as-samples",
        lambda: Own(lambda m, x: m.a(x) * m.p.repeat(x.shape[1], 1), {"p": (1, 4)}, a=nn.Linear(4, 4)),
        [floats(5, 4)],
    ),
    Case(
        "own-expanded-over-as-many-heads-as-samples",
        lambda: Own(lambda m, x: m.a(x) @ x.mT * m.p.expand(5, 1, 1), {"p": (1, 1, 1)}, a=nn.Linear(4, 4)),
        [floats(5, 3, 4)],
    ),
    Case(
        "own-expanded-over-samples-and-positions",
        lambda: Own(
            lambda m, x: torch.cat([m.p.expand(x.shape[0], -1, -1), m.a(x) + m.p[0].expand(x.shape[1], -1)], 1),
            {"p": (1, 1, 4)},
            a=nn.Linear(4, 4),
        ),
        [floats(5, 4)],
    ),
    Case(
        "own-expanded-over-several-samples",
        lambda: Own(
            lambda m, x: m.a(x) + (m.p.expand(len(x), -1, -1) if len(x) > 1 else m.p),
            {"p": (1, 1, 4)},
            a=nn.Linear(4, 4),
        ),
        [floats(3, 4)],
    ),
    Case(
        "own-with-an-expanded-constant",
        lambda: Own(
            lambda m, x: m.a(x) * (m.p * torch.arange(1.0, 5.0).expand(x.shape[1], -1)), {"p": (4,)}, a=nn.Linear(4, 4)
        ),
        [floats(5, 4)],
    ),
    Case(
        "own-with-positions",
        lambda: Own(
            lambda m, x: m.tokens(x) * m.p + m.positions(torch.arange(x.shape[1])) + m.shift(m.q),
            {"p": (4,), "q": (4,)},
            tokens=nn.Embedding(7, 4),
            positions=nn.Embedding(9, 4),
            shift=nn.Linear(4, 4),
        ),
        [tokens(7, 3)],
    ),
    Case(
        "out-of-sight-with-positions",
        lambda: Own(
            lambda m, x: Square.apply(m.tokens(x), m.p) + m.positions(torch.arange(x.shape[1])),
            {"p": (4,)},
            tokens=nn.Embedding(7, 4),
            positions=nn.Embedding(9, 4),
        ),
        [tokens(7, 3)],
    ),
    *(
        Case(
            f"position-ids-{name}",
            lambda function=function: Apply(
                function, tokens=nn.Embedding(7, 4), positions=nn.Embedding(9, 4), head=nn.Linear(4, 2)
            ),
            inputs,
        )
        for name, function, inputs in (
            ("made", position_ids, [tokens(7, 3)]),
            ("made-as-many-as-samples", position_ids, [tokens(7, 5)]),
            ("of-one-row", one_row_of_position_ids, [tokens(7, 3)]),
        )
    ),
    Case(
        "relative-positions",
        lambda: Apply(relative_positions, table=nn.Embedding(5, 2), q=nn.Linear(4, 4)),
        [floats(5, 4)],
    ),
    Case(
        "positions-written-through-a-view",
        lambda: Own(positions_written_through_a_view, {"p": (7,)}, head=nn.Linear(4, 4)),
        [floats(4, 4)],
    ),
    Case(
        "network-of-positions",
        lambda: Apply(network_of_positions, a=nn.Linear(1, 4), head=nn.Linear(4, 2)),
        [floats(5, 4)],
    ),
    *attention_cases(),
    *checkpointed_cases(),
    *shared_cases(),
    *complex_cases(),
    Case(
        "hidden",
        lambda: nn.Sequential(nn.Linear(4, 4), Own(looked_at, {"p": (4,)})),
        [floats(4)],
        functorch=False,
        empty=False,
    ),
]

CASES = LAYERS + OPERATIONS + CHANGED
"""All cases."""
