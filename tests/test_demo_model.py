"""The demo network stays the published one, in layers that any toolkit can trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from cora_plugin.demo_files import package_folder
from cora_plugin.demo_model import efficientnet_lite0, plain_norms, static_padding


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


side = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


@given(side, side, st.integers(5, 14), st.integers(5, 14), st.booleans())
@settings(deadline=None)
@torch.no_grad()
def test_static_padding_of_any_convolution(height, width, h, w, bias):
    (kh, sh, dh), (kw, sw, dw) = height, width
    conv = Conv2dSame(2, 4, (kh, kw), (sh, sw), dilation=(dh, dw), groups=2, bias=bias)
    x = torch.randn(1, 2, h, w)
    static = static_padding(nn.Sequential(conv), x)
    assert Conv2dSame not in kinds(static)
    torch.testing.assert_close(static(x), conv(x), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """One convolution, called on inputs of two sizes, and one that is never called."""

    def __init__(self, unused):
        super().__init__()
        self.conv = Conv2dSame(3, 3, 3, 2)
        if unused:
            self.unused = Conv2dSame(3, 3, 3, 2)

    def forward(self, x):
        return self.conv(x) if hasattr(self, "unused") else self.conv(self.conv(x))


@pytest.mark.parametrize(("unused", "name"), [(True, "unused"), (False, "conv")])
def test_static_padding_names_a_layer_without_one_size(unused, name):
    with pytest.raises(ValueError, match=rf"^{name}: .* exactly one"):
        static_padding(Twice(unused), images(16))


def test_foreign_weights_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth"):
        efficientnet_lite0(tmp_path / "foreign.pth")


def test_an_absent_package_is_named_with_the_way_out():
    with pytest.raises(ModuleNotFoundError, match=r"cora-plugin\[demo\]"):
        package_folder("no_such_package_of_photos")
