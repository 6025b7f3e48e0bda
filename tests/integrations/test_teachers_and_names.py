"""Teachers, and models inside torch's wrappers, through both hosts."""

import copy
from importlib.util import find_spec

import pytest
import torch
from any_net import adapt, export, quantized
from torch import nn

from cora_plugin.adapters import load_adapters, save_adapters
from cora_plugin.adapters.errors import ModelError
from cora_plugin.testing import images, net_of

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]
each_host = pytest.mark.parametrize("host", HOSTS)

CALLS = list(images(64, seed=2).split(16))
UNSEEN = images(32, seed=3)


@pytest.fixture(scope="module")
def prototypes():
    return {host: quantized(host, net_of("conv2d"), CALLS) for host in HOSTS}


def functions(host):
    if host == "brevitas":
        from cora_plugin.integrations import brevitas

        return brevitas.save_cora, brevitas.load_cora, brevitas.remove_cora
    from cora_plugin.integrations import nncf

    def load(path, model):
        return nncf.load_cora(path, model, CALLS[0])

    return nncf.save_cora, load, nncf.remove_cora


@torch.no_grad()
def answer(model):
    y = model(UNSEEN)
    return getattr(y, "value", y)


@each_host
def test_a_teacher_is_what_distances_are_from(host, prototypes):
    model = copy.deepcopy(prototypes[host])
    teacher = nn.Sequential(net_of("conv2d"), nn.Dropout(0.9)).train()
    report = adapt(host, model, CALLS, teacher=teacher)
    assert report.notes[-1].startswith("distances are those from the teacher")
    assert report.after.value < 0.6 * report.before.value
    assert teacher.training and teacher[1].training
    # The quantized model's own copy: nothing is nearer to it.
    same = copy.deepcopy(prototypes[host])
    report = adapt(host, same, CALLS, teacher=copy.deepcopy(prototypes[host]))
    assert not any(step.kept for step in report.steps)
    assert torch.equal(answer(same), answer(prototypes[host]))


@pytest.mark.skipif("nncf" not in HOSTS, reason="NNCF is not installed")
def test_the_flag_takes_a_teacher():
    import nncf

    from cora_plugin.integrations.nncf import CoRaQuantizationParameters, allow_bits

    net = net_of("conv2d")
    with allow_bits(4, 8):
        model = nncf.quantize(
            net,
            nncf.Dataset(CALLS),
            advanced_parameters=CoRaQuantizationParameters(
                cora="budget=0.2", teacher=copy.deepcopy(net)
            ),
        )
    assert model.cora_report.notes[-1].startswith("distances are those from")


@each_host
def test_files_know_no_wrapper(host, prototypes, tmp_path):
    save, load, remove = functions(host)
    wrapped = nn.DataParallel(copy.deepcopy(prototypes[host]))
    report = adapt(host, wrapped, CALLS)
    assert report.after.value < 0.6 * report.before.value
    save(tmp_path / "wrapped", wrapped)
    adapters, shifts, _ = load_adapters(tmp_path / "wrapped")
    assert {*adapters} <= {"stem", "layer", "head"}
    assert export(host, wrapped, CALLS[0], tmp_path / "wrapped.onnx") < 0.02
    expected = answer(wrapped.module)
    bare = copy.deepcopy(prototypes[host])
    load(tmp_path / "wrapped", bare)
    torch.testing.assert_close(answer(bare), expected)
    # Written with the prefix, by a wrapper that is not torch's.
    named = {f"module.{name}": each for name, each in adapters.items()}
    others = {f"module.{name}": each for name, each in shifts.items()}
    save_adapters(tmp_path / "named", named, others)
    for model in (bare, nn.DataParallel(bare)):
        remove(model)
        assert torch.equal(answer(bare), answer(prototypes[host]))
        load(tmp_path / "named", model)
        torch.testing.assert_close(answer(bare), expected)


@pytest.mark.skipif("brevitas" not in HOSTS, reason="Brevitas is not installed")
def test_a_bare_file_fits_a_wrapper_of_ones_own(prototypes, tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    save, load, _ = functions("brevitas")
    model = copy.deepcopy(prototypes["brevitas"])
    adapt("brevitas", model, CALLS)
    save(tmp_path / "bare", model)
    wrapped = Wrapper(copy.deepcopy(prototypes["brevitas"]))
    load(tmp_path / "bare", wrapped)
    torch.testing.assert_close(answer(wrapped), answer(model))
    with pytest.raises(ModelError, match=r"^layer|^stem|^head"):
        load(tmp_path / "bare", nn.Sequential(nn.Flatten()))
