"""A net, photos and a recipe that take seconds; `small_recipe:net` names a factory."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import Dataset

SIDE = 16


class Net(nn.Module):
    """Stem with BN, depthwise, 1×1, head: three classes, the strongest colour."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(),
            nn.Conv2d(channels, 32, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Untraceable(nn.Module):
    """Runs, but not while a toolkit traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor or _get_current_function_mode_stack():
            raise ZeroDivisionError("of the model's own\nwith a second line")
        return self.head(x.mean((2, 3)))


class Several(nn.Module):
    """A net with an output that is not one tensor [N, …]."""

    def __init__(self, kind: str = "mapping") -> None:
        super().__init__()
        self.kind = kind
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> object:
        y = self.head(x.mean((2, 3)))
        kinds = {"mapping": {"y": y}, "pair": (y, x), "flat": y[:, 0], "one": y[:1]}
        return {**kinds, "classes": y.argmax(1)}[self.kind]


def images(count: int = 64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Smooth images [count, 3, SIDE, SIDE] and their strongest colour."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=random)
    x = nn.functional.interpolate(x, size=SIDE, mode="bilinear")
    return x, x.mean((2, 3)).argmax(1)


def unlabelled(count: int = 64) -> Tensor:
    return images(count, seed=2)[0]


def spoiled(count: int = 64, at: int = 9, value: float = float("nan")) -> Tensor:
    """Images one of which is not finite."""
    x = unlabelled(count)
    x[at, 0, 3, 3] = value
    return x


def labelled_below(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images with a label of -2."""
    x, y = images(count)
    y[5] = -2
    return x, y


def one_hot() -> tuple[Tensor, Tensor]:
    x, y = images()
    return x, nn.functional.one_hot(y)


def mixed() -> list[Tensor]:
    """Images of two sizes."""
    return [torch.zeros(3, SIDE + index % 2, SIDE) for index in range(64)]


def grey() -> Tensor:
    return unlabelled()[:, :1]


def as_bytes() -> Tensor:
    return unlabelled().to(torch.uint8)


class Raising(Dataset[Tensor]):
    """A data set that cannot read its ninth image."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            raise KeyError("the ninth\nis missing")
        return torch.zeros(3, SIDE, SIDE)


def overflowing() -> nn.Module:
    """A net whose outputs are not finite."""
    made = net().requires_grad_(False)
    made.head.weight.mul_(3e38)
    return made


def net(channels: int = 16) -> nn.Module:
    """A net that was taught in a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net(channels)
        x, y = images(256)
        optimizer = torch.optim.Adam(made.parameters(), 1e-2)
        for step in range(80):
            batch = slice(step * 32 % 256, step * 32 % 256 + 32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(x[batch]), y[batch]).backward()
            optimizer.step()
    return made.eval()


def photos(folder: Path, count: int, classes: int = 3, side: int = 20) -> Path:
    """Image files in a sub-folder a class, whose colour is the strongest."""
    random = np.random.default_rng(0)
    for index in range(count):
        label = index % classes
        pixels = random.integers(0, 120, (4, 4, 3), dtype=np.uint8)
        pixels[..., label % 3] += 120
        path = folder / f"class{label}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((side, side)).save(path)
    return folder


def written(path: Path, **sections: object) -> Path:
    """A recipe of the small net, with other sections if they are given."""
    whole: dict[str, object] = {
        "model": {"factory": "small_recipe:net"},
        "data": {"factory": "small_recipe:images", "images": 40},
        "toolkit": "brevitas",
        "ptq": {"weight_bits": 3, "first_last_bits": 3},
        "cora": {"budget": "0.3 params"},
        "output": str(path.parent / "out"),
    }
    path.write_text(yaml.safe_dump(whole | sections, sort_keys=False))
    return path
