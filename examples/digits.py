"""Private training on scikit-learn's handwritten digits, from data to picture, in under a minute on two CPU cores.

A small convolutional network learns 1,437 of the 1,797 images (8x8 pixels; the other 360 are for testing) with
differential privacy: ``make_private_with_epsilon`` finds the noise for the epsilon that you ask for, and
``grad_sample_mode="ghost"`` clips every image's gradient without storing it. Only the lines under "Make it private" in
`train` differ from training without privacy.

    pip install "opacus_fgc[examples]"
    python examples/digits.py                     # about 96 % test accuracy at epsilon 8, delta 1e-4
    python examples/digits.py --compare           # the same once more with Opacus' own ghost mode
    python examples/digits.py --plot digits.png   # accuracy against epsilon, and the gradient norms

Two things here are not private, as in most examples. The network and the default settings were found by trying some
seventy of them on a held-out part of the training images; epsilon does not account for that search. And the loss on the
progress bar and the gradient norms in the picture come straight from the training images: keep such numbers to
yourself. (The test images count as public.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import opacus
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import opacus_fgc

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Result:
    """What one training run gave.

    Attributes:
        name: which library in which mode.
        noise_multiplier: standard deviation of the noise as a multiple of C.
        accuracies: test accuracy after each epoch.
        epsilons: epsilon spent after each epoch; after the last alone where no picture is asked for.
        seconds: time for the training steps, without testing and accounting.
        peak_memory: bytes over the level before training; NaN where it cannot be measured.
        norms: per-sample gradient norms of the last epoch's steps; None if the mode computes none.
    """

    name: str
    noise_multiplier: float
    accuracies: list[float]
    epsilons: list[float]
    seconds: float
    peak_memory: float
    norms: np.ndarray | None


def data() -> tuple[TensorDataset, TensorDataset]:
    """Loads the digits, split into training and test images in the same way for every seed."""
    images, labels = load_digits(return_X_y=True)
    # Pixels are 0 to 16 by the format. The images' own mean and deviation would be computed from private data.
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


def network() -> nn.Module:
    """A small convolutional network. GroupNorm, since BatchNorm mixes the images of a batch and cannot be private."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def train(engine_type: type[opacus.PrivacyEngine], mode: str, args: argparse.Namespace) -> Result:
    """Trains a network privately.

    Args:
        engine_type: ``opacus_fgc.PrivacyEngine``, or Opacus' own.
        mode: the ``grad_sample_mode``.
        args: the settings from the command line.
    """
    ignore_known_warnings()
    torch.set_num_threads(1)  # so small a network gains nothing from more
    torch.manual_seed(args.seed)
    train_set, test_set = data()
    loader = DataLoader(train_set, batch_size=args.batch_size)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    # Make it private
    engine = engine_type()
    model, optimizer, *private_criterion, loader = engine.make_private_with_epsilon(
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
    # Modes without ghost clipping return no criterion: they go on with the one they were given.
    criterion = private_criterion[0] if private_criterion else criterion

    name = f"{engine_type.__module__.partition('.')[0]} {mode}"
    result = Result(name, optimizer.noise_multiplier, [], [], seconds=0.0, peak_memory=0.0, norms=None)
    memory_before = peak_memory()
    progress = tqdm(range(1, args.epochs + 1), desc=name, unit="epoch", dynamic_ncols=True, disable=None)
    for epoch in progress:
        losses, norms = [], []
        start = time.perf_counter()
        for images, labels in loader:  # random sizes: each image is in with the same chance, which the accounting needs
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if hasattr(model, "per_sample_gradient_norms"):
                norms.append(model.per_sample_gradient_norms)
        result.seconds += time.perf_counter() - start

        result.accuracies.append(accuracy(model, test_set))
        if args.plot or epoch == args.epochs:  # the accountant takes several times as long as the epoch did
            result.epsilons.append(engine.get_epsilon(args.delta))
        result.norms = torch.cat(norms).numpy() if norms else None
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", accuracy=f"{result.accuracies[-1]:.1%}")
    result.peak_memory = peak_memory() - memory_before
    return result


def ignore_known_warnings() -> None:
    """Turns off three warnings that are right, and mean nothing here."""
    # Good advice for real use: secure_mode=True draws noise that nobody can predict. It takes longer and allows
    # no seeds, so here we do without, knowingly.
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    # From Opacus' accountant: a bound that only decides how wide a grid it computes on is not the tightest.
    warnings.filterwarnings("ignore", message="Optimal order is the largest alpha")
    # From torch, on the hooks of Opacus' own modes (``--compare``): images have no gradient. Opacus asks for none of theirs.
    warnings.filterwarnings(
        "ignore", message="Full backward hook is firing when gradients are computed with respect to"
    )


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The share of images that the model names right."""
    images, labels = dataset.tensors
    model.eval()
    predictions = model(images).argmax(dim=1)
    model.train()
    return (predictions == labels).float().mean().item()


def peak_memory() -> float:
    """The most memory that this process ever held, in bytes; NaN where the system does not tell."""
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_in_fresh_process(engine_type: type[opacus.PrivacyEngine], mode: str, args: argparse.Namespace) -> Result:
    """`train` in a process of its own, because a process' peak memory never falls again."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, engine_type, mode, args).result()


def table(results: list[Result]) -> str:
    """One aligned row for each run."""
    rows = [("mode", "test accuracy", "epsilon", "seconds", "peak memory")]
    for result in results:
        percent = f"{result.accuracies[-1]:.1%}"
        memory = f"{result.peak_memory / 2**20:.1f} MiB"
        rows.append((result.name, percent, f"{result.epsilons[-1]:.2f}", f"{result.seconds:.1f}", memory))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def plot(results: list[Result], max_grad_norm: float, path: Path) -> None:
    """Draws accuracy against epsilon, and the gradient norms of the first run against C.

    Args:
        results: the runs.
        max_grad_norm: the clipping norm C.
        path: where the picture goes.
    """
    from matplotlib.figure import Figure  # here, since most runs draw nothing

    norms = results[0].norms
    figure = Figure(figsize=(5.5, 4) if norms is None else (10, 4), layout="constrained")
    panels = figure.subplots(1, 1 if norms is None else 2, squeeze=False)[0]
    draw_accuracies(panels[0], results)
    if norms is not None:
        draw_norms(panels[1], norms, max_grad_norm)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def draw_accuracies(axes: Axes, results: list[Result]) -> None:
    """Test accuracy against epsilon spent, one line a run and one point an epoch."""
    from matplotlib.ticker import PercentFormatter

    for result, style in zip(results, ("-o", "--x"), strict=False):
        label = f"{result.name}: {result.accuracies[-1]:.1%} at {result.epsilons[-1]:.2f}"
        axes.plot(result.epsilons, result.accuracies, style, markersize=4, linewidth=1.5, label=label)
    axes.set(title="Accuracy against epsilon", xlabel="epsilon spent", ylabel="test accuracy", xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(frameon=False)


def draw_norms(axes: Axes, norms: np.ndarray, max_grad_norm: float) -> None:
    """Histogram of per-sample gradient norms, with C in it. Nothing hides what a single training image adds to it."""
    shown = norms.clip(min=max(norms.max() / 1e6, 1e-12))  # a logarithmic axis has no place for 0
    axes.hist(shown, bins=list(np.geomspace(shown.min(), shown.max(), 50)), color="tab:blue", alpha=0.7)
    axes.axvline(max_grad_norm, color="tab:red", linewidth=1.5)
    axes.text(
        max_grad_norm,
        0.98,
        f"  C = {max_grad_norm:g}\n  {(norms > max_grad_norm).mean():.0%} are clipped",
        transform=axes.get_xaxis_transform(),
        verticalalignment="top",
        color="tab:red",
    )
    caption = "norm of one image's gradient\n(not private: for debugging, not for publication)"
    axes.set(title="Gradient norms in the last epoch", xscale="log", xlabel=caption, ylabel="images")


def settings(description: str, modes: Sequence[str]) -> argparse.ArgumentParser:
    """The part of a command line that says how to train.

    Args:
        description: what the example does.
        modes: the values of ``grad_sample_mode`` to choose from, the default first.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epsilon", type=positive_float, default=8.0, help="privacy budget to end at")
    parser.add_argument("--delta", type=probability, default=1e-4, help="well below 1 / 1,437, one by training images")
    parser.add_argument("--epochs", type=positive_int, default=30, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=480, help="expected size of the random batches")
    parser.add_argument("--lr", type=positive_float, default=0.2, help="learning rate of SGD with momentum")
    parser.add_argument("--max-grad-norm", type=positive_float, default=1.0, help="C: what each gradient is clipped to")
    parser.add_argument("--mode", choices=modes, default=modes[0], help="Opacus' grad_sample_mode")
    parser.add_argument("--seed", type=int, default=0, help="for initial weights, batches and noise")
    return parser


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    modes = ("ghost", "ghost_bk", "hooks", "functorch", "ew")
    parser = settings("Private training on scikit-learn's handwritten digits.", modes)
    parser.add_argument("--compare", action="store_true", help="train once more with Opacus' own ghost mode")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw accuracy against epsilon, and gradient norms")
    args = parser.parse_args()
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


def probability(text: str) -> float:
    """A number between 0 and 1 from the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
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
    # For each batch size that they meet, PyTorch's CPU kernels are generated anew and kept. Private batches have random
    # sizes, so the kernels would soon take more memory than the training, in every mode alike.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    if args.compare:
        # Nothing but the engine is another: the seed gives both the same weights, batches and noise.
        runs = [(opacus_fgc.PrivacyEngine, args.mode), (opacus.PrivacyEngine, "ghost")]
        results = [train_in_fresh_process(engine_type, mode, args) for engine_type, mode in runs]
    else:
        results = [train(opacus_fgc.PrivacyEngine, args.mode, args)]

    print(table(results))
    print(f"noise multiplier {results[0].noise_multiplier:.3f}; epsilon is for delta {args.delta:g}")
    print("seconds of the training steps alone; peak memory over the level before training")
    if args.plot:
        plot(results, args.max_grad_norm, args.plot)
        without = ", without a histogram: this mode keeps no gradient norms" if results[0].norms is None else ""
        print(f"picture in {args.plot}{without}")


if __name__ == "__main__":
    main()
