"""Test that files of every format are read as weights that fit, or all problems are reported."""

import argparse
import collections
import dataclasses
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from conftest import DIGITS, needs_torch, write_pdparams, write_pth
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.spec import is_counter, paddle_name, tensor_specs
from fcvit.models.variants import VARIANTS
from fcvit.weights import safetensors_file
from fcvit.weights.checkpoint import LEGACY, PDPARAMS, SAFETENSORS, ZIP
from fcvit.weights.reading import WeightsDoNotFit, cast, read_weights


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], strict=True)


def in_paddle_layout(tensors):
    table = tensor_specs(DIGITS)
    return {
        paddle_name(n): t.T if table[n].transposed_in_paddle else t for n, t in tensors.items() if not is_counter(n)
    }


def test_a_plain_state_dict_is_read(digits_pth, digits_tensors):
    weights = read_weights(digits_pth)
    assert weights.spec == DIGITS
    assert (weights.source.format, weights.layout, weights.dtypes) == (ZIP, "torch", ["float32"])
    assert_same(weights.tensors, digits_tensors)
    assert weights.skipped == weights.notes == ()
    assert not any(t.flags.writeable for n, t in weights.tensors.items() if t.size > 1)  # views into the file


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model.module."])
def test_nested_prefixes_are_removed(tmp_path, digits_tensors, prefix):
    path = write_pth(tmp_path / "x.pth", {prefix + n: t for n, t in digits_tensors.items()})
    weights = read_weights(path)
    assert_same(weights.tensors, digits_tensors)
    (note,) = weights.notes
    assert note.endswith(f": {prefix}")


def test_another_network_with_a_known_prefix_is_rejected(tmp_path):
    path = write_pth(tmp_path / "x.pth", {"module.conv.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(DoesNotFit, match="not an FCViT"):
        read_weights(path)


def test_paddle_layout_is_detected_from_the_names(tmp_path, digits_tensors):
    path = write_pdparams(tmp_path / "x.pdparams", in_paddle_layout(digits_tensors))
    weights = read_weights(path)
    assert (weights.source.format, weights.layout) == (PDPARAMS, "paddle")
    without = {n: t for n, t in digits_tensors.items() if not is_counter(n)}
    assert_same({n: t for n, t in weights.tensors.items() if not is_counter(n)}, without)
    assert [n for n in weights.tensors if is_counter(n)] == [n for n in digits_tensors if is_counter(n)]
    assert "no BatchNorm counters (4 num_batches_tracked)" in weights.notes[0]


def test_the_format_is_detected_from_the_content(tmp_path, digits_tensors, digits_pth):
    disguised = tmp_path / "really_torch.pdparams"
    disguised.write_bytes(digits_pth.read_bytes())
    assert read_weights(disguised).source.format == ZIP
    safetensors_file.write(tmp_path / "x.bin", digits_tensors, {})
    weights = read_weights(tmp_path / "x.bin")
    assert weights.source.format == SAFETENSORS
    assert_same(weights.tensors, digits_tensors)


def test_every_problem_is_reported_together(tmp_path, digits_tensors):
    broken = dict(digits_tensors)
    del broken["norm.weight"]
    broken["head.bias"] = np.zeros(9, np.float32)
    broken["network.0.0.layer_scale_1"] = np.full(16, np.nan, np.float32)
    broken["network.0.0.layer_scale_2"] = np.ones(16, np.int64)
    broken["surprise"] = np.ones(3, np.float32)
    with pytest.raises(WeightsDoNotFit, match=r"does not fit fcvit_digits \(10 classes\): .* \(and 4 more\)") as caught:
        read_weights(write_pth(tmp_path / "x.pth", broken))
    found = {p.name: (p.expected, p.found) for p in caught.value.problems}
    assert found == {
        "norm.weight": ("shape [48]", "nothing"),
        "head.bias": ("shape [10]", "[9]"),
        "network.0.0.layer_scale_1": ("finite numbers", "16 infinite or NaN"),
        "network.0.0.layer_scale_2": ("floating-point numbers", "int64"),
        "surprise": ("no such tensor", "shape [3]"),
    }
    assert all(p.remedy for p in caught.value.problems)


def test_a_square_linear_is_transposed(tmp_path):
    """If the head has as many classes as the last width, its shape does not show the layout."""
    from fcvit.weights.synthetic import synthetic_tensors

    spec = dataclasses.replace(DIGITS, num_classes=48)
    tensors = synthetic_tensors(spec)
    table = tensor_specs(spec)
    stored = {
        paddle_name(n): t.T if table[n].transposed_in_paddle else t for n, t in tensors.items() if not is_counter(n)
    }
    weights = read_weights(write_pdparams(tmp_path / "x.pdparams", stored))
    np.testing.assert_array_equal(weights.tensors["head.weight"], tensors["head.weight"])
    assert not np.array_equal(stored["head.weight"], tensors["head.weight"])


def test_a_custom_variant_is_recognized(tmp_path):
    from fcvit.weights.synthetic import synthetic_tensors

    own = dataclasses.replace(VARIANTS["fcvit_digits"], name="mine", competition=False, kernel_sizes=(5, 7), heads=4)
    spec = dataclasses.replace(DIGITS, variant=own)
    read = read_weights(write_pth(tmp_path / "x.pth", synthetic_tensors(spec))).spec
    assert dataclasses.replace(read.variant, name="mine", preprocessing=own.preprocessing) == own


@pytest.mark.slow
def test_an_assumed_preprocessing_is_reported(tmp_path):
    """Tensors do not contain the preprocessing. An ablation is not described by the variant's name only."""
    from fcvit.weights.synthetic import synthetic_tensors

    own = dataclasses.replace(VARIANTS["fcvit_digits"], heads=4)
    spec = dataclasses.replace(DIGITS, variant=own)
    assert str(spec) == "fcvit_digits with heads=4 (10 classes)"
    weights = read_weights(write_pth(tmp_path / "x.pth", synthetic_tensors(spec)))
    assert "resize 248 bicubic, crop 224" in weights.notes[0] and "--input-size" in weights.notes[0]


def test_a_negative_variance_is_rejected(tmp_path, digits_tensors):
    broken = {**digits_tensors, "patch_embed.norm.running_var": np.full(16, -1, np.float32)}
    with pytest.raises(DoesNotFit, match=r"running_var: .*negative variances"):
        read_weights(write_pth(tmp_path / "x.pth", broken))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floating_point_types_are_read(tmp_path, digits_tensors, dtype):
    kinds = {"bfloat16": ml_dtypes.bfloat16}
    narrow = {n: t if is_counter(n) else t.astype(kinds.get(dtype, dtype)) for n, t in digits_tensors.items()}
    weights = read_weights(write_pth(tmp_path / "x.pth", narrow))
    assert weights.dtypes == [dtype]
    assert_same(weights.tensors, narrow)


def test_casting_rejects_numbers_that_are_too_large(digits_pth):
    weights = read_weights(digits_pth)
    big = dataclasses.replace(weights, tensors={**weights.tensors, "head.bias": np.full(10, 1e6, np.float32)})
    with pytest.raises(DoesNotFit, match=r"head\.bias: .*float16.*larger numbers"):
        cast(big, "float16")
    assert cast(big, "bfloat16").tensors["head.bias"].dtype == ml_dtypes.bfloat16
    with pytest.raises(UsageError):
        cast(big, "int8")


class TestFilesOfPyTorch:
    """Test that files saved by PyTorch itself are read correctly."""

    pytestmark = needs_torch

    @pytest.fixture
    def torch(self):
        return import_framework("torch")

    @pytest.fixture
    def training_file(self, torch, tmp_path, digits_tensors):
        """Return a function that writes a file like the authors' training script."""
        state = collections.OrderedDict((n, torch.from_numpy(t.copy())) for n, t in digits_tensors.items())
        ema = collections.OrderedDict(
            (n, torch.from_numpy(t.copy()) if is_counter(n) else torch.from_numpy(t + 1))
            for n, t in digits_tensors.items()
        )

        def save(name, with_ema, legacy):
            content = {
                "epoch": 309,
                "arch": "fcvit_tiny",
                "state_dict": state,
                "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]},
                "version": 2,
                "args": argparse.Namespace(lr=1e-3, output=pathlib.Path("out"), best=np.float64(0.5)),
                "metric": 74.9,
                "amp_scaler": {"scale": 65536.0},
            }
            if with_ema:
                content["state_dict_ema"] = ema
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
            return tmp_path / name

        return save

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_training_checkpoint_is_read(self, training_file, digits_tensors, legacy):
        weights = read_weights(training_file("x.pth.tar", False, legacy))
        assert weights.source.format == (LEGACY if legacy else ZIP)
        assert_same(weights.tensors, digits_tensors)
        assert weights.skipped == ("epoch", "arch", "optimizer", "version", "args", "metric", "amp_scaler")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_ema_weights_are_selected_by_the_user(self, training_file, digits_tensors, legacy):
        path = training_file("x.pth.tar", True, legacy)
        with pytest.raises(UsageError, match="--ema or --no-ema"):
            read_weights(path)
        assert_same(read_weights(path, ema=False).tensors, digits_tensors)
        ema = read_weights(path, ema=True)
        np.testing.assert_array_equal(ema.tensors["head.bias"], digits_tensors["head.bias"] + 1)
        assert "state_dict" in ema.skipped
        with pytest.raises(UsageError, match="no EMA weights; remove --ema"):
            read_weights(training_file("y.pth.tar", False, legacy), ema=True)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_all_kinds_of_views_are_read(self, torch, tmp_path, legacy):
        from fcvit.weights.checkpoint import read_checkpoint

        base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
        tensors = {
            "strided": base[:, ::2, 1::2],
            "transposed": base.permute(2, 0, 1),
            "sliced": base[1],
            "shared": base,
            "expanded": torch.ones(1).expand(5, 3),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "half": base.half(),
            "bfloat": base.bfloat16(),
            "double": base.double(),
            "int64": base.long(),
            "int32": base.int(),
            "int16": base.short(),
            "int8": base.char(),
            "uint8": base.byte(),
            "bool": base > 3,
        }
        torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        read = read_checkpoint(tmp_path / "x.pth").select().tensors
        assert list(read) == list(tensors)
        for name, tensor in tensors.items():
            expected = tensor.detach()
            exact = expected.float().numpy() if name == "bfloat" else expected.numpy()
            got = read[name].astype(np.float32) if name == "bfloat" else read[name]
            np.testing.assert_array_equal(got, exact, strict=True, err_msg=name)
        assert read["bfloat"].dtype == ml_dtypes.bfloat16

    def test_the_safe_loader_accepts_written_files(self, torch, digits_pth, digits_tensors):
        state = torch.load(digits_pth, weights_only=True)
        assert_same({n: t.numpy() for n, t in state.items()}, digits_tensors)

    @pytest.mark.parametrize("make", ["sparse", "quantized", "meta"])
    def test_unsupported_kinds_of_tensors_are_rejected(self, torch, tmp_path, make):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of PyTorch
            tensor = {
                "sparse": lambda: torch.eye(3).to_sparse(),
                "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                "meta": lambda: torch.ones(3, device="meta"),
            }[make]()
            torch.save({"patch_embed.proj.weight": tensor}, tmp_path / "x.pth")
        with pytest.raises(UnreadableFile, match=f"x.pth.*{make}.*save it again"):
            read_weights(tmp_path / "x.pth")

    def test_a_pickled_model_is_rejected_with_a_remedy(self, torch, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
        with pytest.raises(UnreadableFile, match=re.escape("torch.save(model.state_dict(), FILE)")):
            read_weights(tmp_path / "x.pth")

    def test_files_without_checksums_are_read(self, torch, tmp_path, digits_tensors):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({n: torch.from_numpy(t.copy()) for n, t in digits_tensors.items()}, tmp_path / "x.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        assert_same(read_weights(tmp_path / "x.pth").tensors, digits_tensors)
