"""The demo network stays the published one, in layers that any toolkit can trace."""

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d

from cora_plugin.adapters.errors import FileError
from cora_plugin.demo.files import package_folder
from cora_plugin.demo.model import efficientnet_lite0
from cora_plugin.recipe.plain import plain_norms, static_padding


@pytest.fixture(scope="module")
def lite0():
    return efficientnet_lite0()


def kinds(model):
    return {type(module) for module in model.modules()}


def images(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size, generator=generator)


def test_lite0_is_the_published_network(lite0):
    assert not lite0.training
    assert sum(p.numel() for p in lite0.parameters()) == 4_652_008


@pytest.mark.parametrize("size", [224, 225])
@torch.no_grad()
def test_plain_lite0_computes_the_same(lite0, size):
    x = images(size)
    plain = plain_norms(static_padding(lite0, x))
    assert not kinds(plain) & {Conv2dSame, BatchNormAct2d}
    torch.testing.assert_close(plain(x), lite0(x), rtol=0, atol=1e-5)
    # At even sizes the same kernels run on the same numbers.
    if size == 224:
        assert torch.equal(plain(x), lite0(x))


def test_plain_lite0_is_traced(lite0):
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(lite0)
    plain = plain_norms(static_padding(lite0, images(224)))
    traced = torch.fx.symbolic_trace(plain)
    assert torch.equal(traced(images(224)), plain(images(224)))


def test_the_given_model_stays_as_it_was(lite0):
    before = {name: value.clone() for name, value in lite0.state_dict().items()}
    modules = [type(module) for module in lite0.modules()]
    plain = plain_norms(static_padding(lite0.train(), images(224)))
    assert plain.training and all(module.training for module in plain.modules())
    lite0.eval()
    assert modules == [type(module) for module in lite0.modules()]
    assert not {p.data_ptr() for p in lite0.parameters()} & {
        p.data_ptr() for p in plain.parameters()
    }
    for name, value in lite0.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_foreign_weights_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(FileError, match=r"foreign\.pth"):
        efficientnet_lite0(tmp_path / "foreign.pth")


def test_an_absent_package_is_named_with_the_way_out():
    with pytest.raises(ModuleNotFoundError, match=r"cora-plugin\[demo\]"):
        package_folder("no_such_package_of_photos")
