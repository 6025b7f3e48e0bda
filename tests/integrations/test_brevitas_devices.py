"""Brevitas models on a GPU, and on what behaves like one."""

import copy

import pytest
import torch
from other_device import DEVICE
from toolkit_devices import OnDevices

from cora_plugin.integrations.brevitas import apply_cora, load_cora
from cora_plugin.integrations.brevitas.fast import fused_activations
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT


def refuses_names():
    """Whether this torch has named tensors, which Brevitas uses, on some devices."""
    if not hasattr(torch.Tensor, "rename"):
        return False
    try:
        torch.empty(1, device=DEVICE).rename(None)
    except RuntimeError:
        return True
    return False


class TestBrevitas(OnDevices):
    """Brevitas serves models where they are."""

    toolkit = TOOLKIT

    @pytest.fixture(autouse=True)
    def with_names(self, request):
        """A device in disguise is none of those that older versions of torch know."""
        if request.node.get_closest_marker("cuda") is None and refuses_names():
            pytest.skip("this version of torch has names on other devices only")

    def apply(self, model, batches):
        apply_cora(batches, model, "budget=0.3")

    def load(self, path, model, example):
        load_cora(path, model)


def test_alternated_weights_move_with_the_model(prototypes, batches):
    model = copy.deepcopy(prototypes["layerwise"])
    apply_cora(batches, model, {"budget": 0.3, "alternations": 1})
    kept = {name for name in model.state_dict() if "cora_float_weight" in name}
    assert not kept  # Files stay as they were.
    model.to(torch.float64)
    held = [
        layer.cora_float_weight
        for layer in model.modules()
        if getattr(layer, "cora_float_weight", None) is not None
    ]
    assert held
    assert all(weight.dtype is torch.float64 for weight in held)


@pytest.mark.cuda
def test_activations_are_fast_on_a_gpu(cuda, prototypes):
    one = copy.deepcopy(prototypes["layerwise"])
    other = copy.deepcopy(one).to(cuda)
    counts = [len(list(fused_activations(model))) for model in (one, other)]
    assert counts[0] == counts[1] > 0
