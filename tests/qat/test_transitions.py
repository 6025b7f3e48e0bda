import pytest
import torch
from latent_net import STEP, Rounded, latents
from torch import nn

from cora_plugin.integrations.training import latent
from cora_plugin.qat.transitions import Transitions


@pytest.fixture
def layers():
    """Two layers of 8 and 4 weights, all in the middle of code 1."""
    net = nn.Sequential(Rounded(4, 2), Rounded(2, 2))
    for layer in net:
        layer.weight.data.fill_(STEP)
    return net


def move(layer, index, steps):
    with torch.no_grad():
        layer.weight.view(-1)[index] += steps * STEP


def test_counts_weights_that_change_their_code(layers):
    counted = Transitions(latents(layers))
    counted.begin()
    move(layers[0], 0, 0.4)  # not as far as the next
    move(layers[0], 1, 0.6)
    move(layers[0], 5, -2)
    move(layers[1], 3, 1)
    assert counted.count() == [2, 1]
    assert counted.count() == [0, 0]


def test_clipped_weights_do_not_change(layers):
    counted = Transitions(latents(layers))
    move(layers[0], 2, 10)
    counted.begin()
    move(layers[0], 2, 10)
    assert counted.count() == [0, 0]


def test_codes_take_a_byte():
    weight = nn.Parameter(torch.tensor([0.0, 3.4, 254.6, 300.0]))
    each = latent("unsigned", weight, lambda: weight.clamp(0, 255), 0, 255)
    assert each.levels().dtype == torch.int8
    assert (each.levels().int() + 128).tolist() == [0, 3, 255, 255]


def test_oscillation_is_back_within_the_window(layers):
    counted = Transitions(latents(layers), window=3)
    counted.begin()
    move(layers[0], 0, 1)  # goes back at once
    move(layers[0], 1, 1)  # goes on
    move(layers[1], 0, 1)  # goes back too late
    counted.count()
    move(layers[0], 0, -1)
    move(layers[0], 1, 1)
    counted.count()
    assert counted.oscillating() == [1, 0]
    for _ in range(3):
        counted.count()
    move(layers[1], 0, -1)
    counted.count()
    assert counted.oscillating() == [0, 0]  # the first was long ago by now


def test_near_is_at_the_border_of_codes(layers):
    counted = Transitions(latents(layers))
    assert counted.near() == [0, 0]
    move(layers[0], 0, 0.49)
    move(layers[0], 1, -0.53)
    move(layers[0], 2, 0.4)
    move(layers[0], 3, 6.5)  # clipped: no border above the last code
    assert counted.near() == [2, 0]
