import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cora_plugin import Budget, CoRaConfig, CoRaError
from cora_plugin.adapters.errors import ConfigError, UnknownKeyError
from cora_plugin.config import METRICS, SEARCHES, ButterworthConfig, RefineConfig
from cora_plugin.config.budget import COSTS
from cora_plugin.config.declared import described
from cora_plugin.document import parse_value
from cora_plugin.recipe.schema import Recipe

SETTINGS = {
    "budget": "0.1 bits",
    "search": "uniform",
    "metric": "lqer",
    "adapter_bits": 4,
    "damping": 0.001,
    "held_out": 0.25,
    "sensitivity_images": 8,
    "positions": 0,
    "max_metric": 100,
    "seed": 7,
}

LEARNING = {
    "order": 2,
    "gamma": 0,
    "temperature": 4.0,
    "lr": 0.1,
    "initial_cutoff": 1,
    "iterations": 40,
    "images": 100,
    "batch_size": 8,
}

configs = st.builds(
    CoRaConfig,
    budget=st.builds(
        Budget,
        st.floats(min_value=1e-9, max_value=1e9, exclude_min=True),
        st.sampled_from(COSTS),
    ),
    search=st.sampled_from(SEARCHES),
    metric=st.sampled_from(METRICS),
    regression=st.booleans(),
    adapter_bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 32]),
    ranks=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    damping=st.floats(0, 1, exclude_max=True),
    held_out=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
    butterworth=st.builds(
        ButterworthConfig,
        order=st.floats(0.5, 20),
        initial_cutoff=st.floats(0, 1, exclude_min=True),
        iterations=st.integers(1, 999),
    ),
)


def test_all_forms_of_a_configuration_agree(tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    text = ", ".join(f"{key}={value}" for key, value in SETTINGS.items())
    expected = CoRaConfig(**SETTINGS)
    assert {name: getattr(expected, name) for name in SETTINGS if name != "budget"} == {
        name: value for name, value in SETTINGS.items() if name != "budget"
    }
    assert expected.budget == Budget(0.1, "bits")
    for form in (SETTINGS, file, str(file), text, expected):
        assert CoRaConfig.of(form) == expected


def test_pinned_ranks_come_from_mappings_and_yaml(tmp_path):
    file = tmp_path / "cora.yml"
    file.write_text("ranks:\n  'blocks.*': 4\n  head: 0\n")
    expected = CoRaConfig(ranks={"blocks.*": 4, "head": 0})
    assert CoRaConfig.of({"ranks": {"blocks.*": 4, "head": 0}}) == expected
    assert CoRaConfig.of(str(file)) == expected


def test_settings_of_a_search_come_nested_or_dotted(tmp_path):
    expected = ButterworthConfig(**LEARNING)
    file = tmp_path / "cora.yaml"
    file.write_text(yaml.safe_dump({"butterworth": LEARNING}))
    text = ",".join(f"butterworth.{key} = {value}" for key, value in LEARNING.items())
    for form in ({"butterworth": LEARNING}, {"butterworth": expected}, file, text):
        assert CoRaConfig.of(form).butterworth == expected
    some = CoRaConfig.of("search=butterworth,butterworth.iterations=40")
    assert some == CoRaConfig(
        search="butterworth", butterworth=ButterworthConfig(iterations=40)
    )


def test_pinned_ranks_can_be_dotted_too():
    assert CoRaConfig.of("ranks.blocks.*=4,ranks.head=0") == CoRaConfig(
        ranks={"blocks.*": 4, "head": 0}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, v)
            for name in ("order", "temperature", "lr", "initial_cutoff")
            for v in (0, -1, float("nan"), float("inf"), "high", None, True)
        ),
        *(("gamma", v) for v in (-0.1, float("nan"), float("inf"), "high", None)),
        ("initial_cutoff", 1.01),
        *(
            (name, v)
            for name in ("iterations", "images", "batch_size")
            for v in (0, -1, 2.5, "many", None, True)
        ),
    ],
)
def test_an_impossible_setting_of_a_search_is_refused_by_its_name(name, value):
    for make in (ButterworthConfig, lambda **k: CoRaConfig(butterworth=k)):
        with pytest.raises(CoRaError, match=rf"^butterworth\.{name}: "):
            make(**{name: value})


@pytest.mark.parametrize("form", ["mapping", "text", "yaml"])
def test_an_unknown_setting_of_a_search_is_refused_with_the_known_ones(form, tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text("butterworth:\n  steps: 40\n")
    value = {
        "mapping": {"butterworth": {"steps": 40}},
        "text": "butterworth.steps=40",
        "yaml": file,
    }[form]
    with pytest.raises(CoRaError, match=r"butterworth: unknown key 'steps'") as caught:
        CoRaConfig.of(value)
    assert all(name in str(caught.value) for name in LEARNING)


@pytest.mark.parametrize("value", [3, None, "fast", [], {1: 2}])
def test_settings_of_a_search_that_are_no_mapping_are_refused(value):
    with pytest.raises(CoRaError, match=r"^butterworth: .* is not a mapping"):
        CoRaConfig(butterworth=value)


def test_nothing_true_and_an_empty_file_mean_the_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# all defaults\n")
    for form in (None, True, {}, "", file):
        assert CoRaConfig.of(form) == CoRaConfig()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (0.05, Budget(0.05, "params")),
        (1, Budget(1.0, "params")),
        ("0.05", Budget(0.05, "params")),
        ("5%", Budget(0.05, "params")),
        ("5% macs", Budget(0.05, "macs")),
        ("0.2 bits", Budget(0.2, "bits")),
        ("  0.2   bits ", Budget(0.2, "bits")),
        ("0.2bits", Budget(0.2, "bits")),
        ("5%macs", Budget(0.05, "macs")),
        ("2e-3kl", Budget(0.002, "kl")),
        (Budget(0.3, "macs"), Budget(0.3, "macs")),
    ],
)
def test_a_budget_alone_is_a_configuration(text, budget):
    assert CoRaConfig.of(text) == CoRaConfig(budget=budget)
    assert CoRaConfig(budget=text).budget == budget


@given(configs)
def test_the_mapping_of_a_configuration_reads_back_the_same(config):
    plain = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert CoRaConfig.of(plain) == config


def test_a_configuration_cannot_be_changed():
    config = CoRaConfig()
    with pytest.raises(FrozenInstanceError):
        config.search = "uniform"


@pytest.fixture(params=["keyword", "mapping", "text", "file", "recipe"])
def given(request, tmp_path):
    """Gives a setting and its value in YAML to CoRa in one of all ways.

    Returns the error, its message, and the place that should be before it.
    """

    def give(name, text):
        file = tmp_path / "cora.yaml"
        outer, _, inner = name.partition(".")
        value = parse_value(text)
        mapping = {outer: {inner: value} if inner else value}
        nested = f"{outer}:\n  {inner}: {text}" if inner else f"{outer}: {text}"
        with pytest.raises(ConfigError) as caught:
            if request.param == "keyword":
                CoRaConfig(**mapping)
            elif request.param == "mapping":
                CoRaConfig.of(mapping)
            elif request.param == "text":
                CoRaConfig.of(f"positions=1,{name}={text}")
            elif request.param == "file":
                file.write_text(f"positions: 1\n{nested}\n")
                CoRaConfig.of(file)
            else:
                file.write_text(
                    "toolkit: nncf\nmodel: {timm: a}\ndata: {glob: a}\n"
                    "cora:\n  positions: 1\n  " + nested.replace("\n", "\n  ")
                )
                Recipe.read(file)
        place = {
            "text": f"{name}={text}: ",
            "file": f"{file}:{3 if inner else 2}: ",
            "recipe": f"{file}:{7 if inner else 6}: cora",
        }.get(request.param, "")
        return caught.value, place

    return give


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("damping", "2", "2 is out of range; use 0 or more and less than 1"),
        ("held_out", "some", "'some' is not a number"),
        ("seed", "true", "True is not a whole number"),
        ("adapter_bits", "9", "9 is out of range; use one of 2, 3, 4, 5, 6, 7, 8, 32"),
        ("metric", "qera", f"'qera' is unknown; use one of {', '.join(METRICS)}"),
        ("budget", "5", "5 is 500% of the weights' number; pass '5%', or '500%' if"),
        ("budget", "5 bytes", "unit 'bytes' is unknown; use one of params, bits, macs"),
        ("butterworth.lr", "0", "0 is out of range; use more than 0"),
        ("refine.scope", "both", "'both' is unknown; use one of model, layer"),
        ("ranks.conv", "-1", "-1 is out of range; use 0 or more"),
    ],
)
def test_the_same_mistake_has_the_same_message_in_every_form(
    given, name, text, problem
):
    error, place = given(name, text)
    dot = "." if place.endswith("cora") else ""
    assert str(error).startswith(f"{place}{dot}{name}: {problem}")
    assert error.key[-len(name.split(".")) :] == tuple(name.split("."))


@pytest.mark.parametrize(
    ("name", "kind", "close"),
    [("budgte", CoRaConfig, "budget"), ("butterworth.lrr", ButterworthConfig, "lr")],
)
def test_an_unknown_key_is_refused_with_the_known_ones(given, name, kind, close):
    error, place = given(name, "1")
    above, _, last = name.rpartition(".")
    middle = ".".join(filter(None, ["cora" if place.endswith("cora") else "", above]))
    keys = ", ".join(field.name for field in fields(kind))
    assert isinstance(error, UnknownKeyError)
    assert str(error) == (
        f"{place.removesuffix('cora')}{middle}{': ' if middle else ''}unknown key "
        f"{last!r}; did you mean {close}? The keys are {keys}"
    )


def test_numbers_are_read_as_the_readme_writes_them(tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text("damping: 1e-3\nbutterworth: {lr: 5E-2}\nbias_correction: off\n")
    expected = CoRaConfig(
        damping=0.001, butterworth={"lr": 0.05}, bias_correction="off"
    )
    assert CoRaConfig.of(file) == expected
    text = "damping=1e-3,butterworth.lr=5E-2,bias_correction=off"
    assert CoRaConfig.of(text) == expected


def test_settings_come_by_position_too():
    assert CoRaConfig("5%", "uniform") == CoRaConfig(budget=0.05, search="uniform")
    for arguments, more in ((("5%",), {"budget": 1}), (range(99), {})):
        with pytest.raises(TypeError):
            CoRaConfig(*arguments, **more)


def test_every_default_is_one_that_could_be_given():
    for kind in (CoRaConfig, ButterworthConfig, RefineConfig):
        assert replace(kind()) == kind()


def test_naming_a_metric_asks_for_its_closed_form_alone():
    default = CoRaConfig()
    assert (default.metric, default.regression) == ("qera-exact", True)
    for metric in METRICS:
        for form in ({"metric": metric}, f"metric={metric}"):
            config = CoRaConfig.of(form)
            assert (config.metric, config.regression) == (metric, False)
            assert CoRaConfig.of(config.to_dict()) == config
        both = CoRaConfig(metric=metric, regression=True)
        assert (both.metric, both.regression) == (metric, True)
        assert CoRaConfig.of(both.to_dict()) == both
    assert CoRaConfig(regression=None) == default
    assert replace(default, seed=1).regression
    assert not CoRaConfig(regression=False).regression


def test_old_spellings_are_read_with_a_warning(tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text("metric: rrr\n")
    for form in ({"metric": "rrr"}, "metric=rrr", file):
        with pytest.warns(FutureWarning, match="metric=qera-exact with regression=t"):
            assert CoRaConfig.of(form) == CoRaConfig()
    file.write_text("fit: {iterations: 3}\n")
    for form in ({"fit": {"iterations": 3}}, {"fit": 3}, "fit.iterations=3", file):
        with pytest.warns(FutureWarning, match="write refine") as warned:
            assert CoRaConfig.of(form).refine == RefineConfig(iterations=3)
        assert warned[0].filename == __file__
    with pytest.warns(FutureWarning) as warned:
        CoRaConfig(fit=3, metric="rrr")
    assert {warning.filename for warning in warned} == {__file__}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_error_in_an_old_spelling_finds_its_line(tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text("seed: 1\nfit:\n  lr: 0\n")
    with pytest.raises(CoRaError, match=rf"^{re.escape(str(file))}:3: fit\.lr: 0 is"):
        CoRaConfig.of(file)


def test_old_and_new_spellings_may_not_contradict_each_other():
    with pytest.raises(CoRaError, match=r"^fit: now called refine, which is given"):
        CoRaConfig(fit=3, refine=4)
    with pytest.raises(CoRaError, match=r"^metric: 'rrr' asks for the regression"):
        CoRaConfig(metric="rrr", regression=False)


def test_the_docs_have_every_setting_as_it_is_declared():
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    table = page.partition("| setting | default |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines()[2:] if line]
    assert rows == [
        f"| `{'.'.join(path)}` | {in_page(default)} | {text} |"
        for path, default, text in described(CoRaConfig)
    ]


def in_page(default):
    if default in ({}, (), None):
        return "none"
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"`{text}`" if isinstance(default, str | Budget) else text.lower()


@pytest.mark.parametrize(
    ("field", "allowed"),
    [("search", SEARCHES), ("metric", METRICS)],
)
@pytest.mark.parametrize("value", ["best", "", None, 3, ["svd"]])
def test_an_unknown_choice_is_refused_with_the_known_ones(field, value, allowed):
    with pytest.raises(CoRaError, match=f"^{field}: .* is unknown") as caught:
        CoRaConfig(**{field: value})
    assert all(name in str(caught.value) for name in allowed)


def test_an_unknown_unit_is_refused_with_the_known_ones():
    for value in ("0.05 bytes", "0.05 bytes extra"):
        with pytest.raises(CoRaError, match=r"^budget: "):
            CoRaConfig(budget=value)
    with pytest.raises(CoRaError, match="params, bits, macs"):
        Budget(0.05, "bytes")


@pytest.mark.parametrize(
    "value",
    [
        0, 0.0, -0.05, "0", "-5%", "0 bits", float("nan"), float("inf"), "nan", "inf",
        "lots", "", "bits", None, True, [], {}, {"amount": 0.1}, "5%%", "%",
    ],
)  # fmt: skip
def test_an_impossible_budget_is_refused_by_name(value):
    with pytest.raises(CoRaError, match=r"^budget: "):
        CoRaConfig(budget=value)


@pytest.mark.parametrize("amount", ["0.05", None, True, 1j, [0.05]])
def test_a_budget_whose_amount_is_not_a_number_is_refused(amount):
    with pytest.raises(CoRaError, match=r"^budget: "):
        Budget(amount)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("adapter_bits", v) for v in (0, 1, 9, 16, -8, 8.0, "8", True, None)),
        *(("damping", v) for v in (-1e-9, 1, float("nan"), "low", None, True)),
        *(("held_out", v) for v in (0, 1, -0.1, 1.5, float("nan"), "some", None)),
        *(("sensitivity_images", v) for v in (0, -1, 2.5, "all", None)),
        *(("positions", v) for v in (-1, 1.5, None)),
        *(("max_metric", v) for v in (0, -1, 1e3, None)),
        *(("seed", v) for v in (-1, 2**63, 10**400, 0.5, "x", None)),
        *(("ranks", v) for v in (3, None, ["a"], "conv", {1: 2})),
        *(("ranks", {"conv": v}) for v in (-1, 1.5, "2", None, True)),
        *(("regression", v) for v in (0, 1, "yes", [True])),
        *(("sweep", v) for v in (0, -1, [0.1, 0], [0.1, True], "0.1/x", {}, None)),
        *(("refine", v) for v in (-1, True, 2.5, None, {"scope": "both"}, {"x": 1})),
    ],
)
def test_an_impossible_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(CoRaError, match=rf"^{field}\b"):
        CoRaConfig(**{field: value})
    with pytest.raises(CoRaError, match=rf"^{field}\b"):
        CoRaConfig.of({field: value})


@pytest.mark.parametrize("value", [False, 3j, ["budget"], object(), b"0.05", {1: 2}])
def test_what_is_no_configuration_is_refused(value):
    with pytest.raises(CoRaError, match=r"^cora: "):
        CoRaConfig.of(value)


def test_a_key_given_twice_is_refused():
    with pytest.raises(CoRaError, match=r"^search: given twice"):
        CoRaConfig.of("search=uniform,search=spectral")
    with pytest.raises(CoRaError, match=r"^budget: given twice"):
        CoRaConfig.of("0.05,budget=0.1")
    with pytest.raises(CoRaError, match=r"^butterworth.lr: given twice"):
        CoRaConfig.of("butterworth.lr=1,butterworth.lr=2")
    with pytest.raises(CoRaError, match=r"^butterworth.lr: given twice"):
        CoRaConfig.of("butterworth=3,butterworth.lr=2")
    with pytest.raises(CoRaError, match=r"^butterworth: given twice"):
        CoRaConfig.of("butterworth.lr=2,butterworth=3")


@pytest.mark.parametrize("content", [b"- 1\n- 2\n", b"3", b"a: [", b"\xff\xfe\x00"])
def test_a_yaml_file_that_holds_no_mapping_is_refused_by_its_path(content, tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_bytes(content)
    with pytest.raises(CoRaError, match=r"cora\.yaml"):
        CoRaConfig.of(file)


def test_a_yaml_file_that_is_missing_is_refused_by_its_path(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CoRaError, match=str(path)):
            CoRaConfig.of(path)
