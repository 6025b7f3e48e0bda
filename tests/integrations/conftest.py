"""A small real net with every kind of layer, and Brevitas' own recipe for it."""

import copy

import pytest
import torch
from torch import Tensor, nn


def images(count: int, seed: int = 0) -> Tensor:
    """Images with structure: smooth, with some noise, [count, 3, 16, 16]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, 16, 16, generator=random)


class Net(nn.Module):
    """BN, strides, reflection, an asymmetric pad, dilation, groups, depthwise, 1×1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.same = nn.Conv2d(32, 32, 2, padding="same", bias=False)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=4)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(self.reflect(x) + x)
        x = self.relu(self.depthwise_bn(self.depthwise(x)))
        x = self.relu(self.pointwise(x))
        x = self.relu(self.same(x))
        x = self.relu(self.dilated(x))
        return self.head(torch.flatten(self.pool(x), 1))


def trained(net: nn.Module) -> nn.Module:
    """Teach a net to tell mean colours, so that its outputs mean something."""
    torch.manual_seed(0)
    net.train()
    x = images(256, seed=1)
    y = x.mean((2, 3)) @ torch.randn(3, 10)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        batch = slice(step * 32 % 256, step * 32 % 256 + 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch].argmax(1)).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Calibration data as loaders yield it."""
    return [(x, torch.zeros(len(x))) for x in images(64, seed=2).split(16)]


@pytest.fixture(scope="session")
def unseen() -> Tensor:
    return images(64, seed=3)


@pytest.fixture(scope="session")
def float_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


@pytest.fixture(scope="session")
def quantize(float_net, batches):
    """Quantize a net, by default the small one, by Brevitas' own ConvNet recipe."""

    def quantize(
        backend="layerwise",
        net=None,
        calibrated=True,
        data=None,
        prepare=None,
        **options,
    ):
        # Here, since this file is read where Brevitas is not installed, too.
        from brevitas.graph.quantize import preprocess_for_quantize
        from brevitas.graph.target.flexml import preprocess_for_flexml_quantize
        from brevitas_examples.imagenet_classification.ptq.ptq_common import (
            calibrate,
            quantize_model,
        )

        data = batches if data is None else data
        torch.manual_seed(0)
        merging = {"equalize_iters": 3, "merge_bn": True}
        net = copy.deepcopy(net or float_net)
        if backend == "flexml":  # traces the net
            prepared = preprocess_for_flexml_quantize(net, data[0][0][:1], **merging)
        else:
            prepared = preprocess_for_quantize(net, **merging)
        if prepare is not None:
            prepare(prepared)
        model = quantize_model(
            prepared,
            backend=backend,
            weight_bit_width=options.pop("weight_bits", 4),
            act_bit_width=options.pop("act_bits", 8),
            bias_bit_width=options.pop("bias_bits", 32),
            act_quant_percentile=99.999,
            **{
                "weight_quant_granularity": "per_channel",
                "act_quant_type": "asym",
                "scale_factor_type": "float_scale",
                "quant_format": "int",
                "weight_param_method": "stats",
                **options,
            },
        )
        with torch.no_grad():
            model(data[0][0])
        if calibrated:
            calibrate(data, model)
        return model.eval()

    return quantize


@pytest.fixture(scope="session")
def prototypes(quantize):
    """The quantized net by backend; copy before use."""
    return {backend: quantize(backend) for backend in ("layerwise", "fx")}


@pytest.fixture(scope="session")
def exact_prototypes(quantize):
    """The same with float biases, so that only weights and activations round."""
    return {b: quantize(b, bias_bits=None) for b in ("layerwise", "fx")}
