"""NNCF's models on a GPU, and on what behaves like one."""

import copy

import nncf
import pytest
import torch
from toolkit_devices import OnDevices

from cora_plugin.integrations.nncf import apply_cora, extension, load_cora, private
from cora_plugin.integrations.nncf.fast import fused_quantizers
from cora_plugin.integrations.nncf.toolkit import TOOLKIT


class TestNNCF(OnDevices):
    """NNCF serves models where they are."""

    toolkit = TOOLKIT

    @pytest.fixture(autouse=True)
    def plain_torch(self, request, monkeypatch):
        """The extension takes tensors' memory, which those in disguise lack."""
        if request.node.get_closest_marker("cuda") is None:
            monkeypatch.setattr(
                private.QuantizedFunctionsCPU, "_loaded_namespace", None
            )
            private.load_reference(private.CPU)

    def apply(self, model, batches):
        apply_cora(model, batches, "budget=0.3")

    def load(self, path, model, example):
        load_cora(path, model, example)


def test_without_a_cuda_compiler_plain_torch_quantizes(monkeypatch, caplog):
    class Loader:
        @staticmethod
        def get_build_dir():
            return "/nowhere"

        @staticmethod
        def name():
            return "none"

        @staticmethod
        def load():
            raise nncf.InstallationError("no nvcc")

    functions = type(private.QuantizedFunctionsCPU)(Loader)
    monkeypatch.setattr(private, "QuantizedFunctionsCUDA", functions)
    device = torch.device("cuda")
    extension.load_extension(device)
    assert "no nvcc" in caplog.text
    assert private.is_loaded(device)
    quantize = functions.get("Quantize_forward")
    x = torch.tensor([0.2, 0.6, 7.0])
    low, span = torch.tensor([0.0]), torch.tensor([3.0])
    assert quantize(x, low, span, 4).tolist() == [0.0, 1.0, 3.0]


@pytest.mark.cuda
def test_activations_are_fast_on_a_gpu(cuda, float_net, batches):
    one = TOOLKIT.quantize(float_net, batches, TOOLKIT.options()).model
    other = copy.deepcopy(one).to(cuda)
    extension.load_extension(cuda)
    counts = [len(list(fused_quantizers(model))) for model in (one, other)]
    # On a GPU halves are rounded as the fast form does, and more of them fit.
    assert counts[1] >= counts[0] > 0
