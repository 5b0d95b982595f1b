"""A training checkpoint with two sets of weights."""

import numpy as np
import pytest

from conftest import training_checkpoint
from fcvit.errors import UsageError
from fcvit.weights.reading import read_weights


def test_both_sets_are_there_and_args_are_inert(tmp_path, digits_tensors):
    path = training_checkpoint(tmp_path / "x.pth.tar", digits_tensors)
    with pytest.raises(UsageError, match="choose with --ema or --no-ema"):
        read_weights(path)
    raw, averaged = read_weights(path, ema=False), read_weights(path, ema=True)
    np.testing.assert_array_equal(raw.tensors["head.bias"], digits_tensors["head.bias"])
    np.testing.assert_array_equal(averaged.tensors["head.bias"], digits_tensors["head.bias"] + np.float32(1))
    assert raw.skipped == ("epoch", "state_dict_ema", "args")
    assert averaged.skipped == ("epoch", "state_dict", "args")
