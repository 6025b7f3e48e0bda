from dataclasses import FrozenInstanceError, fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cora_plugin import Budget, CoRaConfig, CoRaError
from cora_plugin.config import METRICS, SEARCHES, ButterworthConfig
from cora_plugin.config.budget import COSTS

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
    with pytest.raises(CoRaError, match=r"^butterworth: unknown key 'steps'") as caught:
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


@pytest.mark.parametrize("form", ["mapping", "text", "yaml"])
def test_an_unknown_key_is_refused_with_the_known_ones(form, tmp_path):
    file = tmp_path / "cora.yaml"
    file.write_text("bugdet: 0.05\n")
    value = {"mapping": {"bugdet": 0.05}, "text": "bugdet=0.05", "yaml": file}[form]
    with pytest.raises(CoRaError) as caught:
        CoRaConfig.of(value)
    assert "'bugdet'" in str(caught.value)
    assert all(field.name in str(caught.value) for field in fields(CoRaConfig))


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
        *(("seed", v) for v in (-1, 2**63, 0.5, "x", None)),
        *(("ranks", v) for v in (3, None, ["a"], "conv", {1: 2})),
        *(("ranks", {"conv": v}) for v in (-1, 1.5, "2", None, True)),
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
