"""The demo's photos: real ones that ship inside installed packages.

Twenty labelled ImageNet photos (foolbox) to test with; unlabelled photos (of rooms, and
the pictures of scikit-image and scikit-learn) to calibrate with. No photo is in both.
Random crops make many images of few photos: enough to see what quantization does, not
to measure a model's accuracy.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cora_plugin.demo.files import package_folder

SKIMAGE_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
# Measured on Lite0 W4A8 with adapters: smaller or larger crops, or more photos of
# scikit-image, change the KL to float by 0.003 at most.
CALIBRATION_SCALES = (0.4, 1.0)
TEST_SCALES = (0.75, 1.0)


def normalize(images: Tensor) -> Tensor:
    """EfficientNet-Lite's input: uint8 [N, 3, H, W] -> float in [-1, 1]."""
    return (images.float() / 255 - 0.5) / 0.5


def calibration_images(count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Random crops of the unlabelled photos, normalized, float [count, 3, size, size].

    Every photo gives as many crops as any other, give or take one.
    """
    images = _crops(calibration_photos(), count, size, seed, CALIBRATION_SCALES)
    return normalize(images)


def test_images(
    crops_per_photo: int = 10, size: int = 224, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random crops of the labelled photos, normalized, and their ImageNet classes.

    Returns:
        Images, float [20 * crops_per_photo, 3, size, size], and labels, int64.
    """
    photos = test_photos()
    count = crops_per_photo * len(photos)
    images = _crops([path for path, _ in photos], count, size, seed, TEST_SCALES)
    labels = torch.tensor([label for _, label in photos])
    return normalize(images), labels.repeat(crops_per_photo)


def calibration_photos() -> list[Path]:
    """Files of the unlabelled photos."""
    rooms = package_folder("interior_photos") / "images"
    skimage = package_folder("skimage") / "data"
    sklearn = package_folder("sklearn") / "datasets" / "images"
    return [
        *sorted(rooms.glob("*.jpg")),
        *(skimage / name for name in SKIMAGE_PHOTOS),
        *sorted(sklearn.glob("*.jpg")),
    ]


def test_photos() -> list[tuple[Path, int]]:
    """Files of the labelled photos, each with its ImageNet class."""
    folder = package_folder("foolbox") / "data"
    return [
        (path, int(path.stem.rpartition("_")[2]))
        for path in sorted(folder.glob("imagenet_*.jpg"))
    ]


def _crops(
    photos: Sequence[Path],
    count: int,
    size: int,
    seed: int,
    scales: tuple[float, float],
) -> Tensor:
    """Square crops, the photos in turn, uint8 [count, 3, size, size].

    `scales` bounds a crop's side, as a fraction of its photo's short side.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    crops: list[np.ndarray] = [np.empty(0)] * count
    for first, path in enumerate(photos[:count]):
        photo = Image.open(path).convert("RGB")
        width, height = photo.size
        for index in range(first, count, len(photos)):
            side = min(width, height) * generator.uniform(*scales)
            left = generator.uniform(0, width - side)
            top = generator.uniform(0, height - side)
            crop = photo.resize(
                (size, size),
                Image.Resampling.BICUBIC,
                box=(left, top, left + side, top + side),
            )
            if generator.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crops[index] = np.asarray(crop)  # [size, size, 3]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
