"""The demo photos: real, disjoint, the same every time, and known to the network."""

import pytest
import torch
from PIL import Image

from cora_plugin.demo import data as demo_data
from cora_plugin.demo.model import efficientnet_lite0


def hashes(paths):
    """An 8x8 thumbnail each: equal where two photos are the same picture."""
    small = [Image.open(path).convert("L").resize((8, 8)) for path in paths]
    return torch.stack(
        [torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8) for s in small]
    )


def test_no_photo_is_in_both_sets():
    calibration = demo_data.calibration_photos()
    test = [path for path, _ in demo_data.test_photos()]
    assert len(test) == 20 and len(calibration) > 40
    assert all(path.is_file() for path in (*calibration, *test))
    distance = torch.cdist(hashes(calibration).float(), hashes(test).float(), p=1)
    assert distance.min() > 8 * 64 / 2  # gray levels, summed over 64 pixels


@pytest.mark.parametrize("count", [1, 7, 100])
def test_calibration_images(count):
    images = demo_data.calibration_images(count, size=64)
    assert images.shape == (count, 3, 64, 64)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, demo_data.calibration_images(count, size=64))
    assert not torch.equal(images, demo_data.calibration_images(count, 64, seed=1))
    # No crop is taken twice.
    assert len({image.numpy().tobytes() for image in images}) == count


def test_every_label_stands_beside_its_photo():
    one, labels = demo_data.test_images(crops_per_photo=1, size=64)
    assert labels.tolist() == [label for _, label in demo_data.test_photos()]
    assert one.shape == (20, 3, 64, 64)
    images, labels = demo_data.test_images(crops_per_photo=3, size=64)
    assert images.shape == (60, 3, 64, 64)
    assert labels.view(3, 20).unique(dim=0).shape == (1, 20)


def test_the_network_recognizes_the_test_photos():
    images, labels = demo_data.test_images(crops_per_photo=2)
    with torch.no_grad():
        guesses = efficientnet_lite0()(images).argmax(1)
    assert (guesses == labels).float().mean() >= 0.8


def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert demo_data.normalize(images).flatten().tolist() == [-1, 1]
