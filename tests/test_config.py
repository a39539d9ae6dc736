import json

import pytest

from oats.config import OatsConfig, parse_n_m
from oats.errors import ConfigError, OatsError


def test_defaults_are_the_papers_budget_on_the_fast_path():
    config = OatsConfig()
    assert (config.compression, config.rank_ratio, config.pattern, config.svd) == (0.5, 0.25, "row", "fast")
    assert (config.resolved_iterations, config.resolved_momentum) == (40, 0.9)


def test_exact_defaults_are_the_papers():
    config = OatsConfig(svd="exact")
    assert (config.resolved_iterations, config.resolved_momentum) == (80, 0.0)


def test_explicit_values_win_over_defaults():
    config = OatsConfig(iterations=7, momentum=0)
    assert (config.resolved_iterations, config.resolved_momentum) == (7, 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("compression", v) for v in (-0.1, 1, 1.5, float("nan"), float("inf"), "0.5", None, True)],
        *[("rank_ratio", v) for v in (-0.1, 1.01, float("nan"), "0.25", None)],
        *[("pattern", v) for v in ("rows", "4:2", "0:4", "2:4:8", "", None, 2)],
        *[("method", v) for v in ("hessian", "OATS", "", None)],
        *[("block_matching", v) for v in (-1, 1.5, "2", None, True)],
        *[("budget", v) for v in ("even", "", None)],
        *[("rank_ratios", v) for v in (None, 0.25, (0.1, 1.5), ("0.1",), (True,))],
        *[("svd", v) for v in ("full", "", None)],
        *[("iterations", v) for v in (0, -1, 2.5, "40", True)],
        *[("momentum", v) for v in (-0.1, 1, float("nan"), "0.9")],
        *[("seed", v) for v in (-1, 0.5, "0", None, True)],
        *[("skip", v) for v in (None, 3, [3])],
        *[("dtype", v) for v in ("fp16", "float32", "")],
    ],
)
def test_bad_settings_are_named_with_the_value(setting, value):
    with pytest.raises(ConfigError) as caught:
        OatsConfig(**{setting: value})
    assert str(caught.value).startswith(f"{setting} must be")
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("pattern", ["row", "layer", "1:1", "2:4", "16:32"])
def test_patterns(pattern):
    assert OatsConfig(pattern=pattern).pattern == pattern


@pytest.mark.parametrize(
    ("pattern", "expected"), [("2:4", (2, 4)), ("row", None), (" 2:4", None), ("2:4 ", None), ("-2:4", None)]
)
def test_parse_n_m(pattern, expected):
    assert parse_n_m(pattern) == expected


def test_to_dict_is_json_and_rebuilds_the_config():
    config = OatsConfig(compression=0.4, skip=["*.down_proj"], pattern="2:4", seed=3)
    assert config.skip == ("*.down_proj",)
    assert OatsConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_settings_past_the_published_method_are_named_only_where_they_are_used():
    assert not {"method", "block_matching"} & OatsConfig().to_dict().keys()
    config = OatsConfig(method="oats-hessian", block_matching=2)
    assert config.to_dict()["method"] == "oats-hessian" and config.to_dict()["block_matching"] == 2
    assert OatsConfig(**config.to_dict()) == config


def test_one_pattern_to_skip():
    assert OatsConfig(skip="*.down_proj").skip == ("*.down_proj",)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, OatsError)


def test_a_budget_and_an_n_m_pattern_contradict_each_other():
    with pytest.raises(ConfigError, match=r"an N:M pattern fixes .* with 2:4, got 'owl'"):
        OatsConfig(pattern="2:4", budget="owl")


def test_settings_beyond_the_published_method_are_only_named_where_they_are_used():
    assert not {"method", "block_matching", "budget", "rank_ratios"} & OatsConfig().to_dict().keys()
    config = OatsConfig(budget="error", rank_ratios=[0.1, 0.4])
    assert OatsConfig(**json.loads(json.dumps(config.to_dict()))) == config
