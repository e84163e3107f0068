from __future__ import annotations

import pickle

import pytest

from vitscope.runtime import errors

CODES = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.NumericalError: 5,
    errors.StorageError: 6,
    errors.DistributedError: 7,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_error_has_its_code_its_parts_and_one_line(kind, code):
    error = kind("data.root", "/there", "missing\n  as it was", "put it there")
    assert error.exit_code == code
    assert (error.key, error.value, error.fix) == ("data.root", "/there", "put it there")
    assert str(error) == "data.root=/there: missing as it was; put it there"
    assert isinstance(error, errors.VitscopeError)


def test_a_value_can_be_left_out_and_zero_is_a_value():
    assert str(errors.DataError("data.root", None, "why", "fix")) == "data.root: why; fix"
    assert str(errors.ConfigError("epochs", 0, "why", "fix")) == "epochs=0: why; fix"


@pytest.mark.parametrize("kind", CODES)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("key", 3, "why", "fix")))
    assert type(error) is kind
    assert str(error) == "key=3: why; fix"
