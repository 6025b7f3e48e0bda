"""Real photos: some to calibrate with, unlabelled, and some to test with, labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.labels import LABELS
from zoo.root import fetched

# Of tuxpaint's stamps, what is drawn: words in the path, and names of files.
DRAWN_PATHS = (
    "symbols",
    "cartoon",
    "/seasonal/",
    "roadsigns",
    "flags",
    "/space/",
    "military",
    "/clothes/",
)
DRAWN = frozenset(
    "dumper_mirror echidna explosion eye fire grannysmith hedgehog inukshuk-outline "
    "key lightningbolt measuring_tape_mirror pizza rugby_goal_posts sedan_police "
    "sedan_police_mirror tooth".split()
)
SIZE = {"lite0": (224, 256), "squeezenet": (227, 256)}
"""Side of the centre crop, and what the photo's short side is resized to."""


@dataclass(frozen=True)
class Photo:
    """A photo and the ImageNet classes that are right for it; none: not known."""

    source: str
    path: Path
    labels: tuple[int, ...] = ()


def photos() -> list[Photo]:
    """Every photo that was fetched, near-duplicates dropped, in a fixed order."""
    found = [
        Photo("foolbox", path, (int(path.stem.rpartition("_")[2]),))
        for path in sorted(fetched("foolbox/data").glob("imagenet_*.jpg"))
    ]
    stamps = fetched("deb/usr/share/tuxpaint/stamps")
    for path in sorted(stamps.rglob("*.png")):
        place = f"/{path.relative_to(stamps)}"
        if path.stem not in DRAWN and not any(word in place for word in DRAWN_PATHS):
            found.append(Photo("tuxpaint", path, LABELS.get(path.stem, ())))
    found += [
        Photo("interior", path)
        for path in sorted(fetched("interior_photos/images").glob("*.jpg"))
    ]
    kept: list[Photo] = []
    hashes: list[np.ndarray] = []
    for photo in found:
        new = _difference_hash(photo.path)
        if all((new != old).sum() >= 12 for old in hashes):
            hashes.append(new)
            kept.append(photo)
    return kept


def split(found: Sequence[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Calibration photos (no labels known) and test photos (labelled): disjoint."""
    calibration = [photo for photo in found if not photo.labels]
    test = [photo for photo in found if photo.labels]
    return calibration, test


def images(found: Sequence[Photo], model: str) -> Tensor:
    """The photos as uint8 [N, 3, C, C] RGB at the model's size."""
    crop, resize = SIZE[model]
    crops = []
    for photo in found:
        image = open_rgb(photo.path)
        width, height = image.size
        scale = resize / min(width, height)
        width, height = (max(crop, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - crop) // 2, (height - crop) // 2
        crops.append(np.asarray(image.crop((left, top, left + crop, top + crop))))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # [N, C, C, 3]


def open_rgb(path: Path) -> Image.Image:
    """A photo in RGB; a cut-out is trimmed and put on a white square."""
    image: Image.Image = Image.open(path)
    if "transparency" in image.info or image.mode in ("P", "LA", "RGBA", "PA"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        low, _ = alpha.getextrema()
        if low < 255:  # type: ignore[operator]
            image = image.crop(alpha.getbbox())
            width, height = image.size
            side = int(max(width, height) * 1.2)
            square = Image.new("RGBA", (side, side), "white")
            square.alpha_composite(image, ((side - width) // 2, (side - height) // 2))
            image = square
    return image.convert("RGB")


def _difference_hash(path: Path) -> np.ndarray:
    """256 bits: where a 17x16 thumbnail gets brighter from left to right."""
    small = open_rgb(path).convert("L").resize((17, 16), Image.Resampling.BILINEAR)
    gray = np.asarray(small, int)  # [16, 17]
    return (gray[:, 1:] > gray[:, :-1]).ravel()
