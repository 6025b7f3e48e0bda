import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.quant_tensor import QuantTensor
from torch import nn

from cora_plugin.adapters import Kind
from cora_plugin.integrations.brevitas import apply_cora, export_onnx_qcdq


class Shallow(nn.Module):
    """Few layers: rounding flips no activation on the way to the output."""

    def __init__(self, groups):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1, groups=groups)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def torch_output(model, x):
    with torch.no_grad():
        y = model(x)
    return (y.value if isinstance(y, QuantTensor) else y).numpy()


def onnx_output(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    return session.run(None, {name: x.numpy()})[0]


def assert_parity(got, expected):
    """Equal, but for the rare image where one activation rounds the other way."""
    apart = np.abs(got - expected).max(1)
    assert (apart < 1e-4).mean() > 0.9
    assert apart.max() < 0.02 * np.ptp(expected)


def stored(path):
    """Number of stored values by type, in initialisers and constants."""
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    tensors += [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
    ]
    count = Counter()
    for tensor in tensors:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        count[kind] += int(np.prod(tensor.dims))
    return count


@pytest.fixture(
    params=[(1, "layerwise"), (2, "layerwise"), (24, "layerwise"), (1, "fx")]
)
def shallow(request, quantize, batches):
    """A net with adapters beside all its layers, and the report."""
    groups, backend = request.param
    torch.manual_seed(1)
    model = quantize(backend, net=Shallow(groups).eval())
    report = apply_cora(
        batches,
        model,
        {"ranks": {"conv": 4, "second": 3, "head": 3}, "budget": 1},
    )
    assert all(row.rank for row in report.layers)
    return model, report


def test_onnxruntime_gives_the_answers_of_torch(shallow, unseen, tmp_path):
    model, _ = shallow
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path)
    onnx.checker.check_model(path)
    assert_parity(onnx_output(path, unseen), torch_output(model, unseen))


def test_weights_and_adapters_are_stored_as_integers(shallow, unseen, tmp_path):
    model, report = shallow
    export_onnx_qcdq(model, unseen[:1], tmp_path / "model.onnx")
    count = stored(tmp_path / "model.onnx")
    weights = sum(row.weights for row in report.layers)
    adapters = sum(row.parameters for row in report.layers)
    assert count["INT8"] >= weights + adapters
    scales = sum(row.adapter_bits - 8 * row.parameters for row in report.layers) / 32
    assert count["FLOAT"] < scales + 600  # identities, scales of the weights
    clips = [
        n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "Clip"
    ]
    assert clips


def test_a_depthwise_layer_carries_a_shared_basis(quantize, batches, unseen, tmp_path):
    torch.manual_seed(1)
    model = quantize(net=Shallow(24).eval())
    report = apply_cora(batches, model, {"ranks": {"second": 3}, "budget": 0.9})
    kinds = {row.name: row.kind for row in report.layers}
    assert kinds["second"] == Kind.SHARED_BASIS.value
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path)
    assert_parity(onnx_output(path, unseen), torch_output(model, unseen))


@pytest.mark.parametrize("backend", ["layerwise", "fx"])
def test_a_deeper_net_decides_as_torch_does(
    prototypes, batches, unseen, tmp_path, backend
):
    model = copy.deepcopy(prototypes[backend])
    apply_cora(batches, model, 0.3)
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path)
    got, expected = onnx_output(path, unseen), torch_output(model, unseen)
    # Here and there an activation rounds the other way.
    assert np.median(np.abs(got - expected)) < 1e-4
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_exporting_does_not_touch_the_model(shallow, unseen, tmp_path):
    model, _ = shallow
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = {n: (type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()}
    export_onnx_qcdq(model, unseen[:1], tmp_path / "model.onnx")
    assert seen == {
        n: (type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()
    }
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_failed_export_leaves_the_old_file_and_no_other(prototypes, unseen, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(RuntimeError):
        export_onnx_qcdq(prototypes["layerwise"], unseen[:, :2], path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        export_onnx_qcdq(prototypes["layerwise"], unseen[:, :2], path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        export_onnx_qcdq(
            prototypes["layerwise"], unseen, tmp_path / "nowhere" / "m.onnx"
        )
