"""One of two processes that hold a term each: `abelian_process.py RANK FILE`."""

import sys

import torch
from torch import nn

from cora_plugin.adapters import isomorphic


def net():
    """A small float network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)
    )


def images():
    """What it is asked."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    group = torch.distributed.group.WORLD
    model = isomorphic(net(), 4, 2, mine=(rank,), group=group)
    torch.save(model(images()), f"{file}-{rank}")
    torch.distributed.destroy_process_group()
