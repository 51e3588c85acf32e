"""Peak memory and time of a step of a language model with a large vocabulary, as ratios to the step without privacy on logits.

Three ways to the loss: logits of all tokens and `CausalLMLoss`; logits in chunks of tokens, each with its part of the loss under
activation checkpointing inside of the model; hidden states and `ChunkedCausalLMLoss`.

    python benchmarks/head.py                                   # 32,768 tokens, 4 sequences of 1,024
    python benchmarks/head.py --tied --only ChunkedCausalLMLoss
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import BASELINE, ENGINES, Step, peak_memory
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from workloads import Transformer

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss

CHUNK = 256
WAYS = [BASELINE, *(way for way, (_, mode) in ENGINES.items() if way == mode)]
Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


class LanguageModel(Transformer):
    """Tokens to hidden states; its head may be called by itself."""

    def hidden(self, x: Tensor) -> Tensor:
        """Maps tokens ``(N, T)`` to ``(N, T, width)``."""
        return self.norm(self.blocks(self.positions(self.embedding(x))))

    def forward(self, x: Tensor) -> Tensor:
        """As `hidden`."""
        return self.hidden(x)


class Logits(LanguageModel):
    """Tokens to logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(N, T)`` to ``(N, T, vocabulary)``."""
        return self.head(self.hidden(x))


class Checkpointed(LanguageModel):
    """Tokens to the loss of each sequence, in chunks that are computed again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(N, T)`` to losses ``(N,)``."""
        hidden, labels = self.hidden(x)[:, :-1], x[:, 1:]
        chunks = zip(hidden.split(CHUNK, 1), labels.split(CHUNK, 1), strict=True)
        losses = [checkpoint(self.part, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum(0) / labels.shape[1]

    def part(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of some tokens of each sequence."""
        return F.cross_entropy(self.head(hidden).mT, labels, reduction="none").sum(1)


LOSSES: dict[str, tuple[type[LanguageModel], nn.Module | Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "logits": (Logits, CausalLMLoss(), lambda criterion, model, x: criterion(model(x), x)),
    "checkpointed chunks": (Checkpointed, lambda losses: losses, lambda criterion, model, x: criterion(model(x))),
    "ChunkedCausalLMLoss": (
        LanguageModel,
        ChunkedCausalLMLoss(),
        lambda criterion, model, x: criterion(model(x), model.head, x),
    ),
}


def make_step(loss: str, way: str, args: argparse.Namespace) -> Step:
    """A freshly made model, and the function that makes one step of it: forward, backward, clip."""
    torch.manual_seed(0)
    kind, criterion, evaluate = LOSSES[loss]
    model = kind(args.vocabulary, args.length, args.width, args.depth, tied=args.tied)
    x = torch.randint(args.vocabulary, (args.batch, args.length))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if way != BASELINE:
        engine, mode = ENGINES[way]
        model, optimizer, criterion, _ = engine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(x), batch_size=args.batch),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )

    def step() -> None:
        value = evaluate(criterion, model, x)
        (value.mean() if way == BASELINE else value).backward()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Step, rounds: int) -> float:
    """The least that a step took in some rounds, after one for the first certificates."""
    step()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return min(taken, default=float("nan"))


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=2**15)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--tied", action="store_true", help="the head has the weight of the embedding")
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=list(LOSSES), help="some of the ways to the loss")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed of each; 0 for memory alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[tuple[str, ...]] = []
    base: tuple[float, float] | None = None
    first = next(iter(LOSSES)), BASELINE
    for loss, way in itertools.product(LOSSES, WAYS):
        if loss not in args.only and (loss, way) != first:
            continue
        # The first step of a model, so that what it keeps from step to step counts.
        peak = peak_memory(make_step(loss, way, args), torch.device("cpu"))
        taken = seconds(make_step(loss, way, args), args.rounds)
        base = base or (peak, taken)
        rows.append((loss, way, f"{peak / 2**20:,.0f}", f"{peak / base[0]:.2f}", f"{taken / base[1]:.2f}"))
        print(*rows[-1], flush=True)
    headers = ("loss", "step", "peak, MiB", "peak memory, ratio", "time, ratio")
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; {vars(args)}\n")
    print(tabulate(rows, headers, disable_numparse=True, tablefmt="github"))


if __name__ == "__main__":
    main()
