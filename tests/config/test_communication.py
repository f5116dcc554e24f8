"""Chains of compression: how they are written, and what is refused in one line that names the place."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hetero_fl.config import dump
from hetero_fl.experiment.preparation import load_config
from hetero_fl.utils.errors import UserError
from tests.helpers.small_federations import config


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[topk: 0.01, quantize: 8]", ["topk", "quantize"]),
        ("[randk: 500, half]", ["randk", "half"]),
        (
            "[lowrank: 1, top_classes: 3, {quantize: 4, bucket: 512}]",
            ["lowrank", "top_classes", "quantize"],
        ),
        ("[]", []),
    ],
)
def test_a_chain_is_written_as_a_list_of_stages_and_comes_back_from_a_resolved_configuration(
    text: str, names: list[str]
) -> None:
    loaded = load_config(config(), [f"channel.compress={text}"])
    assert [stage.kind for stage in loaded.channel.compress] == names
    assert load_config(yaml.safe_load(dump(loaded))).channel == loaded.channel


@pytest.mark.parametrize(
    ("channel", "words"),
    [
        (
            {"compress": [{"topkk": 0.01}]},
            "channel.compress.0.topkk: unknown key; did you mean 'topk'?",
        ),
        (
            {"compress": [{"topk": 1.5}]},
            "channel.compress.0.topk: found 1.5; a share below 1, or a whole number",
        ),
        ({"compress": [{"topk": 0}]}, "channel.compress.0.topk: must be > 0, got 0"),
        ({"compress": [{"quantize": 17}]}, "channel.compress.0.quantize: must be <= 16, got 17"),
        (
            {"compress": [{"name": "topk"}]},
            "channel.compress: found the key 'name'; a stage is its own key, as in {topk: 0.01}; choose from topk, randk",
        ),
        (
            {"compress": [{"name": "halb"}]},
            "channel.compress: found the key 'name'; a stage is its own key, as in {topk: 0.01}; choose from topk, randk",
        ),
        ({"compress": ["halv"]}, "channel.compress: found 'halv'; did you mean 'half'?"),
        ({"compress": ["topk"]}, "channel.compress: found 'topk' alone; it takes a number"),
        (
            {"compress": "half"},
            "channel.compress: found 'half'; a list of stages was meant, as [topk: 0.01, quantize: 8], or [] for none",
        ),
        ({"preset": ["small"]}, "channel.preset: expected 'small', got ['small']"),
        ({"compress": [{}]}, "channel.compress.0: found no stage"),
        (
            {"compress": [{"topk": 2, "quantize": 3}]},
            "channel.compress.0: found topk and quantize; each stage has an entry",
        ),
        (
            {"compress": [{"topk": 2, "bucket": 3}]},
            "channel.compress.0: found bucket with topk; it is for quantize",
        ),
        (
            {"compress": [{"quantize": 8}, {"topk": 2}]},
            "channel.compress: found topk after quantize",
        ),
        ({"compress": ["half", {"quantize": 8}]}, "channel.compress: found half and quantize"),
        ({"compress": [{"topk": 2}, {"topk": 1}]}, "channel.compress: found topk twice"),
        (
            {"compress": [{"randk": 2}, {"lowrank": 0.5}]},
            "channel.compress: found randk and lowrank",
        ),
        ({"preset": "smal"}, "channel.preset: expected 'small', got 'smal'; did you mean 'small'?"),
        (
            {"preset": "small", "compress": [], "compress_down": [], "entropy": False},
            "channel: found preset small and compress, compress_down, entropy, which replace all of it; remove them",
        ),
        ({"compres": []}, "channel.compres: unknown key; did you mean 'compress'?"),
    ],
)
def test_mistakes_are_one_line(channel: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(config(channel=channel))
    assert str(error.value).removeprefix("configuration: ").startswith(words) and "\n" not in str(
        error.value
    )


def test_a_preset_stands_for_its_keys_and_others_replace_them() -> None:
    whole = load_config(config(channel={"preset": "small"})).channel
    assert [stage.kind for stage in whole.compress_down] == ["topk", "quantize"]
    assert whole.entropy

    part = load_config(config(channel={"preset": "small", "compress": ["half"]})).channel
    assert [stage.kind for stage in part.compress] == ["half"]
    assert part.compress_down == whole.compress_down

    again = load_config(config(channel=whole.model_dump())).channel
    assert again == whole
