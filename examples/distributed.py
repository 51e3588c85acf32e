"""Private training on scikit-learn's handwritten digits by several processes, on CPUs or one GPU each.

The network and the data are those of ``digits.py``; what comes out is as good, and as private, as in one process. How a model
lies over the processes shows from the model itself, so `make_private_with_epsilon` is called as ever:

- ``--parallel ddp``: each rank has the whole model, and its part of each batch.
- ``--parallel fsdp``: each rank has a shard of every parameter, and its part of each batch.
- ``--parallel tensor``: each rank has a part of the linear layer, and the same whole batch.

    pip install "opacus_fgc[examples]"
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 examples/distributed.py --parallel fsdp
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from digits import accuracy, data, ignore_known_warnings, network, settings
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine


def parallel(model: nn.Sequential, way: str, mesh: DeviceMesh) -> nn.Module:
    """Lays a model out over the ranks, as without privacy, but for Opacus' own class in the place of torch's for "ddp".

    Args:
        model: the same on all ranks.
        way: "ddp", "fsdp" or "tensor".
        mesh: the ranks, along one axis.
    """
    if way == "ddp":
        return DifferentiallyPrivateDistributedDataParallel(model)
    if way == "fsdp":
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    # The linear layer, by its name; the others stay whole.
    return parallelize_module(model, mesh, {"9": ColwiseParallel(output_layouts=Replicate())})


def train(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Trains a network privately, together with the other ranks.

    Args:
        args: the settings from the command line.
        device: this rank's own.

    Returns:
        What came out, by what to call it.
    """
    ignore_known_warnings()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(args.seed)  # the same weights everywhere; each rank's noise is its own all the same
    train_set, test_set = data()
    # All the data and the batch size of all ranks together, without a DistributedSampler: make_private deals them out.
    loader = DataLoader(train_set, batch_size=args.batch_size)
    model = parallel(network().to(device), args.parallel, mesh)
    parameters = held_of_all(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    # Make it private
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        epochs=args.epochs,
        max_grad_norm=args.max_grad_norm,
        grad_sample_mode=args.mode,
    )

    start = time.perf_counter()
    for _ in range(args.epochs):
        for images, labels in loader:  # this rank's part of a random batch
            images, labels = images.to(device), labels.to(device)
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start

    # On all ranks: under FSDP they run every forward together.
    test_accuracy = accuracy(model, TensorDataset(*(tensor.to(device) for tensor in test_set.tensors)))
    return {
        "parallel": args.parallel,
        "mode": args.mode,
        "ranks": f"{dist.get_world_size()}",
        "test accuracy": f"{test_accuracy:.1%}",
        "epsilon": f"{engine.get_epsilon(args.delta):.2f}",
        "seconds": f"{seconds:.1f}",
        "parameters a rank": parameters,
    }


def held_of_all(model: nn.Module) -> str:
    """How many parameters this rank holds between two steps, of how many."""
    parameters = list(model.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return f"{held:,} of {sum(p.numel() for p in parameters):,}"


def main() -> None:
    """Starts this rank, trains, and prints a table on the first."""
    parser = settings("Private training on handwritten digits by several processes.", modes=("ghost_bk", "ghost"))
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tensor"), default="fsdp", help="how they share the work")
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun --standalone --nproc_per_node 2 examples/distributed.py")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    result = train(args, device)
    if dist.get_rank() == 0:
        print(tabulate([result], headers="keys", disable_numparse=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
