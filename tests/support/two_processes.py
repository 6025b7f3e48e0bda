"""Trains the small latent net in two processes: `two_processes.py RANK FILE`.

Each writes its rates beside the file at which they meet.
"""

import json
import sys
from pathlib import Path

import torch
from latent_net import batches, groups, latents, net
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cora_plugin.qat import TransitionRateScheduler


def rates(part):
    """The rates of 20 steps on a part of each batch."""
    model = net()
    wrapped: nn.Module = model
    if torch.distributed.is_initialized():
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(groups(model), 0.1)
    scheduler = TransitionRateScheduler(optimizer, latents(model), 0.02, steps=20)
    for x, labels in batches(20):
        functional.cross_entropy(wrapped(x[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return [(each.rate, each.lr) for each in scheduler.transitions().steps]


if __name__ == "__main__":
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    found = rates(slice(rank * 16, rank * 16 + 16))
    Path(f"{file}-{rank}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
