"""Refusals of a ``_target_``: the line names the key that the callee speaks of."""

from __future__ import annotations

import pytest

from vitscope.config.instantiate import instantiate
from vitscope.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"_target_": "vitscope.models.convnet", "depth": 19}, "model.depth=19: Expected depth of ResNet"),
        ({"_target_": "vitscope.models.alternet", "width": 20}, "model.width=20: Expected width a multiple of 8"),
        # of several arguments none is named
        ({"_target_": "vitscope.models.pit", "depths": [1, 1], "stage_heads": [1]}, "model: Expected three stages"),
    ],
)
def test_the_argument_that_is_refused_is_the_key_of_the_error(node: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        instantiate(node, "model")
    assert str(refusal.value).startswith(key)
