"""Prints the float accuracy of the zoo's models, the reference of every benchmark."""

import torch
from torch import Tensor
from zoo import MODELS, PREPROCESS, fashion_mnist, images, photos, split

from cora_plugin.compare.rows import top1


@torch.no_grad()
def logits(name: str, pixels: Tensor) -> Tensor:
    """Logits [N, classes] of a model for uint8 images."""
    model, preprocess = MODELS[name](), PREPROCESS[name]
    return torch.cat([model(preprocess(batch)) for batch in pixels.split(64)])


def main() -> None:
    """Print one line a model."""
    calibration, test = split(photos())
    print(f"{len(calibration)} calibration photos, {len(test)} labelled test photos")
    right = [photo.labels for photo in test]
    for name in ("lite0", "squeezenet"):
        accuracy = top1(logits(name, images(test, name)), right)
        print(f"{name:<10} top-1 {accuracy:.4f}")
    pixels, labels = fashion_mnist()
    accuracy = top1(logits("fashion", pixels), labels)
    print(f"{'fashion':<10} top-1 {accuracy:.4f}")


if __name__ == "__main__":
    main()
