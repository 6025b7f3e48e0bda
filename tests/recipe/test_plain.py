"""Convolutions of timm become plain ones that compute the same, or say why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.recipe.plain import static_padding

side = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


@given(side, side, st.integers(5, 14), st.integers(5, 14), st.booleans())
@settings(deadline=None)
@torch.no_grad()
def test_static_padding_of_any_convolution(height, width, h, w, bias):
    (kh, sh, dh), (kw, sw, dw) = height, width
    conv = Conv2dSame(2, 4, (kh, kw), (sh, sw), dilation=(dh, dw), groups=2, bias=bias)
    x = torch.randn(1, 2, h, w)
    static = static_padding(nn.Sequential(conv), x)
    assert Conv2dSame not in {type(module) for module in static.modules()}
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
    with pytest.raises(ModelError, match=rf"^{name}: .* exactly one"):
        static_padding(Twice(unused), torch.zeros(2, 3, 16, 16))
