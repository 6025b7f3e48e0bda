"""Inputs and outputs of any kind, through both hosts and their files."""

import copy
import dataclasses
from importlib.util import find_spec

import onnxruntime
import pytest
import torch
from any_net import adapt, call, export, quantized
from torch import nn

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]
pytestmark = pytest.mark.parametrize("host", HOSTS)


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    boxes: torch.Tensor
    ids: torch.Tensor


class Fusion(nn.Module):
    """Two images in, several tensors out."""

    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        self.answer = answer
        self.rgb = nn.Conv2d(3, 16, 3, 2, 1)
        self.depth = nn.Conv2d(1, 16, 3, 2, 1)
        self.both = nn.Conv2d(32, 16, 3, 2, 1)
        self.scores = nn.Linear(16, 5)
        self.boxes = nn.Linear(16, 4)
        self.unused = nn.Linear(16, 3)

    def forward(self, rgb, depth, scale=4.0):
        y = torch.cat([self.rgb(rgb), self.depth(depth)], 1).relu()
        y = self.both(y).relu().mean((2, 3))
        self.unused(y)
        scores, boxes = self.scores(y) * scale, 9 * self.boxes(y)
        answers = {
            "tensor": lambda: scores,
            "tuple": lambda: (scores, boxes),
            "dict": lambda: {"scores": scores, "boxes": boxes},
            "nested": lambda: {"heads": [scores, {"boxes": boxes}]},
            "dataclass": lambda: Answer(scores, boxes, scores.argmax(1)),
        }
        return answers[self.answer]()


torch.manual_seed(1)
PAIRS = [(torch.randn(8, 3, 16, 16), torch.randn(8, 1, 16, 16)) for _ in range(6)]
DICTS = [{"rgb": rgb, "depth": depth} for rgb, depth in PAIRS]
LABELS = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize("search", ["uniform", "butterworth", "series"])
def test_no_search_spends_on_layers_that_no_output_depends_on(host, search):
    model = quantized(host, Fusion("tensor"), PAIRS)
    config = {"search": search, "butterworth": {"iterations": 4}}
    config |= {} if search == "series" else {"budget": 0.2}
    report = adapt(host, model, PAIRS, config)
    assert "not depend on it" in report.skipped["unused"]
    assert report.after.value < report.before.value
    assert not any("no gradient reaches" in note for note in report.notes)


def test_every_way_to_yield_two_inputs_gives_the_same(host):
    prototype = quantized(host, Fusion("tensor"), PAIRS)
    found = []
    for loader in (
        PAIRS,
        [(pair, LABELS) for pair in PAIRS],
        [(*pair, LABELS) for pair in PAIRS],
        DICTS,
        [{**each, "labels": LABELS} for each in DICTS],
    ):
        report = adapt(host, copy.deepcopy(prototype), loader)
        assert report.after.value < 0.6 * report.before.value
        assert "not depend on it" in report.skipped["unused"]
        found.append([row.rank for row in report.layers])
    assert all(each == found[0] for each in found)
    items = [{"all": pair} for pair in PAIRS]
    unpacked = adapt(host, prototype, items, unpack=lambda item: item["all"])
    assert [row.rank for row in unpacked.layers] == found[0]


@pytest.mark.parametrize("answer", ["tuple", "dict", "nested", "dataclass"])
def test_every_output_counts_and_is_written(host, answer, tmp_path):
    model = quantized(host, Fusion(answer), PAIRS)
    names = {
        "tuple": ("0", "1"),
        "nested": ("heads.0", "heads.1.boxes"),
    }.get(answer, ("scores", "boxes"))
    objective = dict(zip(names, ("kl", "mse"), strict=True))
    report = adapt(host, model, PAIRS, {"budget": 0.3, "objective": objective})
    assert report.after.objective == "weighted"
    assert report.after.value < 0.5 * report.before.value
    assert report.after.agreement is not None
    assert ("output 'ids' is left out" in report.notes) == (answer == "dataclass")
    for example in (PAIRS[0], DICTS[0]):
        path = tmp_path / f"{answer}.onnx"
        assert export(host, model, example, path) < 0.02
        session = onnxruntime.InferenceSession(path)
        assert [each.name for each in session.get_inputs()] == ["rgb", "depth"]
        assert len(session.get_outputs()) == 2 + (answer == "dataclass")


@pytest.mark.parametrize("kind", ["int8_kernels", "named"])
def test_several_inputs_in_every_form_of_the_file(host, kind, tmp_path):
    model = quantized(host, Fusion("dict"), PAIRS)
    adapt(host, model, PAIRS)
    names = {
        "input_names": ["a", "b"],
        "output_names": ["c", "d"],
        "dynamic_axes": {"a": {0: "n"}, "b": {0: "n"}},
    }
    options = names if kind == "named" else {"int8_kernels": True}
    path = tmp_path / "net.onnx"
    off = export(host, model, PAIRS[0], path, **options)
    assert off < (0.1 if kind == "int8_kernels" else 0.02)
    session = onnxruntime.InferenceSession(path)
    if kind == "named":
        assert [e.name for e in session.get_inputs()] == ["a", "b"]
        few = {"a": PAIRS[0][0][:3].numpy(), "b": PAIRS[0][1][:3].numpy()}
        expected = call(model, tuple(e[:3] for e in PAIRS[0]))["boxes"].detach()
        answer = torch.tensor(session.run(["d"], few)[0])
        torch.testing.assert_close(answer, expected, atol=0.02, rtol=0.02)


class Tokens(nn.Module):
    """Integers in, a softmax over the last axis out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 24)
        self.one = nn.Linear(24, 48)
        self.two = nn.Linear(48, 24)
        self.head = nn.Linear(24, 20)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return {"loss": None, "logits": 6 * self.head(x + self.two(self.one(x).relu()))}


def test_integer_tokens_are_inputs(host):
    torch.manual_seed(0)
    mask = torch.ones(8, 12)
    calls = [
        {"input_ids": torch.randint(20, (8, 12)), "attention_mask": mask}
        for _ in range(6)
    ]
    model = quantized(host, Tokens(), calls)
    report = adapt(host, model, calls, "budget=0.2")
    assert report.after.objective == "kl" and "along axis 2" in report.notes[0]
    assert report.after.value < 0.5 * report.before.value


class Bound(nn.Module):
    """A batch size in a reshape, or clips of frames in the batch."""

    def __init__(self, kind, size):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.size = kind, size
        self.one = nn.Conv2d(3, 16, 3, 2, 1)
        self.two = nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        y = self.one(x).relu()
        if self.kind == "clips":
            clips = y.view(-1, self.size, *y.shape[1:])
            y = (clips + clips.roll(1, 1)).flatten(0, 1) / 2
        y = self.two(y).relu().mean((2, 3))
        y = y.reshape(self.size if self.kind == "fixed" else -1, 16)
        y = 8 * self.head(y)
        return y.view(-1, self.size, 10).mean(1) if self.kind == "clips" else y


@pytest.mark.parametrize(
    ("kind", "size", "batch", "search"),
    [
        ("fixed", 8, 8, "butterworth"),
        ("fixed", 1, 1, "spectral"),
        ("clips", 4, 8, "spectral"),
    ],
)
def test_a_model_bound_to_its_batch_is_run_as_it_is(host, kind, size, batch, search):
    torch.manual_seed(1)
    data = [torch.randn(batch, 3, 16, 16) for _ in range(10)]
    model = quantized(host, Bound(kind, size), data, 3)
    config = {
        "budget": 0.3,
        "search": search,
        "butterworth": {"iterations": 4},
        "refine": {"iterations": 2, "every": 1},
    }
    report = adapt(host, model, data, config)
    assert report.after.value < 0.7 * report.before.value
    assert report.held_out % batch == 0 and report.images % batch == 0


class Stopped(nn.Module):
    """A forward that cuts gradients off."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.one = nn.Conv2d(3, 16, 3, 2, 1)
        self.two = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24, 10)

    def body(self, x):
        return self.two(self.one(x).relu()).relu().mean((2, 3))

    def forward(self, x):
        if self.how == "all":
            with torch.no_grad():
                return 20 * self.head(self.body(x))
        if self.how == "frozen":
            with torch.no_grad():
                y = self.body(x)
        else:
            y = self.body(x).detach()
        return 20 * self.head(y)


@pytest.mark.parametrize(
    ("how", "search"),
    [
        ("frozen", "spectral"),
        ("detached", "butterworth"),
        ("all", "spectral"),
        ("all", "butterworth"),
    ],
)
def test_layers_that_no_gradient_reaches_are_named_and_served(host, how, search):
    torch.manual_seed(1)
    data = [torch.randn(8, 3, 16, 16) for _ in range(8)]
    model = quantized(host, Stopped(how), data, 3)
    config = {"budget": 0.2, "search": search, "butterworth": {"iterations": 4}}
    report = adapt(host, model, data, config)
    names = "one, two, head" if how == "all" else "one, two,"
    assert any(f"no gradient reaches {names}" in note for note in report.notes)
    assert all(row.rank for row in report.layers)
    assert report.after.value < 0.5 * report.before.value
