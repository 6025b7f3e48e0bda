"""A teacher's outputs are what is to be reached, in place of the float weights'."""

import copy

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.objective import KL, measure
from cora_plugin.teacher import teaching


def taught(host, teacher, config, data=None):
    with teaching(teacher, host.model) as teach:
        return CoRa(config).apply(host, data or batches(), teacher=teach)


def apart(teacher, host):
    x = torch.cat(batches(seed=9))
    with torch.no_grad():
        return measure(KL(), {"": teacher(x)}, host.run(x)).kl


def moved(model):
    """A float copy whose last layers say something else."""
    teacher = copy.deepcopy(model)
    torch.manual_seed(3)
    for weight in (teacher[4].weight, teacher[-1].weight):
        weight.data += weight.std() * torch.randn(len(weight), 1, 1, 1).view(
            -1, *[1] * (weight.ndim - 1)
        )
    return teacher


def test_what_float_weights_say_is_undone_where_it_leads_away():
    host = PlainHost(net(), bits=2)
    teacher = copy.deepcopy(host.model)
    report = taught(host, teacher, "budget=0.3")
    assert report.before.value < 1e-6
    assert not any(step.kept for step in report.steps)
    assert apart(teacher, host) < 1e-6


def test_distances_are_from_the_teacher():
    host = PlainHost(net())
    teacher = moved(host.float_net)
    before = apart(teacher, host)
    report = taught(host, teacher, "budget=0.3")
    assert report.before.value == pytest.approx(before, rel=0.2)
    assert report.notes[-1].startswith("distances are those from the teacher")
    assert report.after.value <= report.before.value


def test_refinement_trains_adapters_to_the_teacher():
    host = PlainHost(net())
    teacher = moved(host.float_net)
    before = apart(teacher, host)
    config = "budget=0.6,refine.iterations=80,refine.lr=0.05,held_out=0.2"
    report = taught(host, teacher, config, batches(12))
    assert report.steps[-1].name == "refinement" and report.steps[-1].kept
    assert host.branches
    assert apart(teacher, host) < 0.5 * before


def test_learned_ranks_follow_the_teacher():
    host = PlainHost(net())
    teacher = copy.deepcopy(host.float_net)
    config = "budget=0.2,search=butterworth,butterworth.iterations=10"
    report = taught(host, teacher, config)
    assert report.after.value < 0.7 * report.before.value


def test_a_teacher_of_other_outputs_is_refused_and_left_as_it_was():
    host = PlainHost(net())
    teacher = nn.Sequential(net(), nn.Linear(10, 4), nn.Dropout()).train()
    with pytest.raises(CoRaError, match=r"teacher: .* are \[\d+, 4\], and .* 10\]"):
        taught(host, teacher, "budget=0.2")
    assert teacher[2].training


def test_a_model_does_not_teach_itself():
    host = PlainHost(net())
    with pytest.raises(CoRaError, match="pass another model"):
        taught(host, host.model, "budget=0.2")
