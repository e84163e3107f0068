"""A run's name fits into a folder's name, and its tags can be listed."""

from __future__ import annotations

import pytest

from tests.fixtures.configs.configurations import composed
from vitscope.config.validation import validate_plain_values
from vitscope.runtime.errors import ConfigError


@pytest.mark.parametrize(
    "overrides", [["name=vit_baseline-2.1", "tags=[a,seed sweep]"], ["name=null", "tags=[]"], ["name='2024'"]]
)
def test_words_that_pass(overrides: list[str]) -> None:
    for command in ("train", "analyze"):
        validate_plain_values(composed(command, "model=vit", *overrides))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("name='my run'", "name='my run': not 1 to 60 letters, .*; write name=my-run"),
        ("name=../a", "write name=a$"),
        ("name=''", "write name=vit-baseline"),
        ("name=3", "name=3: not a text or null; "),
        ("tags=a", r"tags=a: not a list; write tags=\[a\]"),
        ("tags=['a,b']", "tags='a,b': a tag is empty or holds a comma"),
        ("tags=['']", "tags='': a tag is empty"),
        ("tags=[1]", "tags=...: not a list of texts"),
    ],
)
def test_words_that_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        validate_plain_values(composed("train", "model=vit", override))
