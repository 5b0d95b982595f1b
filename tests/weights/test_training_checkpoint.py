"""Test a training checkpoint with raw weights and EMA weights."""

import numpy as np
import pytest

from conftest import training_checkpoint
from fcvit.errors import UsageError
from fcvit.weights.reading import read_weights


def test_both_sets_are_read_and_args_are_not_executed(tmp_path, digits_tensors):
    path = training_checkpoint(tmp_path / "x.pth.tar", digits_tensors)
    with pytest.raises(UsageError, match="--ema or --no-ema"):
        read_weights(path)
    raw, ema_weights = read_weights(path, ema=False), read_weights(path, ema=True)
    np.testing.assert_array_equal(raw.tensors["head.bias"], digits_tensors["head.bias"])
    np.testing.assert_array_equal(ema_weights.tensors["head.bias"], digits_tensors["head.bias"] + np.float32(1))
    assert raw.skipped == ("epoch", "state_dict_ema", "args")
    assert ema_weights.skipped == ("epoch", "state_dict", "args")
