"""A small real net with every kind of layer, and Brevitas' own recipe for it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cora_plugin.integrations.checked import runs_all
from cora_plugin.testing import Net, images, trained

REFUSED = "tensor(int4)", "tensor(uint4)", "zero point of per-channel filter"
"""What an onnxruntime says of files that it is too old for."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip tests of files for which the onnxruntime, Python 3.10's last, is too old."""
    try:
        return (yield)
    except Exception as error:
        if not runs_all() and any(words in str(error) for words in REFUSED):
            pytest.skip(str(error))
        raise


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
