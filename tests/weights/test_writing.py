"""Test the contents of converted files, that both frameworks load them, and that no partial file is left."""

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DIGITS, needs_paddle, needs_torch, write_pth
from fcvit.commands.convert import convert
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit, NumbersDisagree, UnreadableFile, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.weights import safetensors_file
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.header import Header, sidecar
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.writing import differing_tensors, staged, write_weights

TEN = tuple(ClassName(f"n{i}", "same name" if i > 7 else f"class {i}") for i in range(10))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("ending", "layout"), [(".safetensors", None), (".safetensors", "torch"), (".pdparams", None), (".pth", None)]
)
@pytest.mark.slow
def test_round_trip_gives_back_every_bit(tmp_path, digits_pth, digits_tensors, ending, layout, dtype):
    """Convert to a format and back. Counters and header are preserved, too."""
    converted = tmp_path / f"converted{ending}"
    convert(digits_pth, converted, layout=layout, dtype=dtype, classes=TEN, verify=False)
    weights = read_weights(converted)
    assert weights.layout == (layout or {".pth": "torch"}.get(ending, "paddle"))
    assert weights.classes == TEN
    assert weights.preprocessing == DIGITS.variant.preprocessing
    assert weights.source.header.source_sha256 == read_checkpoint(digits_pth).sha256
    assert all(weights.tensors[n] == t for n, t in digits_tensors.items() if is_counter(n))
    convert(converted, tmp_path / "back.pth", verify=False)
    back = read_weights(tmp_path / "back.pth")
    assert not differing_tensors(back, weights)
    if dtype is None:
        assert not differing_tensors(back, read_weights(digits_pth))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pdparams", ".pth"])
def test_writing_is_deterministic(tmp_path, digits_pth, ending):
    one, two = tmp_path / f"1{ending}", tmp_path / f"2{ending}"
    for path in (one, two):
        convert(digits_pth, path, verify=False)
    assert one.read_bytes() == two.read_bytes()


def test_the_header_contains_every_field_of_the_variant(tmp_path, digits_pth):
    convert(digits_pth, tmp_path / "x.safetensors", verify=False)
    _, text = safetensors_file.read((tmp_path / "x.safetensors").read_bytes())
    header = json.loads(text["fcvit"])
    assert set(header["variant"]) == {field.name for field in dataclasses.fields(DIGITS.variant)}
    assert header["layout"] == "paddle" and header["format_version"] == 2
    assert header["preprocessing"]["input_size"] == 32


@pytest.mark.slow
@pytest.mark.parametrize(("dense", "head"), [(False, "classifier"), (True, "backbone")])
def test_a_header_of_the_first_version_is_read(tmp_path, digits_tensors, dense, head):
    """Version 1 has a flag `dense` instead of task and head. The file gives the same weights as a current file."""
    spec = ModelSpec(VARIANTS["fcvit_digits"], 0 if dense else 10, head)
    tensors = synthetic_tensors(spec) if dense else digits_tensors
    convert(write_pth(tmp_path / "source.pth", tensors), tmp_path / "new.safetensors", verify=False)
    stored, text = safetensors_file.read((tmp_path / "new.safetensors").read_bytes())
    fields = json.loads(text["fcvit"])
    assert (fields.pop("task"), fields.pop("head")) == (spec.task, head)
    fields |= {"format_version": 1, "dense": dense}
    safetensors_file.write(tmp_path / "old.safetensors", stored, {"fcvit": json.dumps(fields)})
    old, new = (read_weights(tmp_path / f"{age}.safetensors") for age in ("old", "new"))
    assert old.spec == new.spec == spec and not differing_tensors(old, new)
    fields["dense"] = "yes"
    with pytest.raises(UnreadableFile, match="header is damaged"):
        Header.from_json(json.dumps(fields))


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    competition=st.booleans(),
    kernels=st.tuples(st.sampled_from([1, 3, 11]), st.sampled_from([3, 5])),
    layer_scale=st.one_of(st.none(), st.floats(1e-8, 1)),
    crop=st.floats(0.05, 1),
    classes=st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True),
    counter=st.integers(0, 2**63 - 1),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_header_survives_json(heads, competition, kernels, layer_scale, crop, classes, counter):
    variant = dataclasses.replace(
        VARIANTS["fcvit_digits"],
        name="a name",
        heads=heads,
        competition=competition,
        kernel_sizes=kernels,
        layer_scale=layer_scale,
    )
    header = Header(
        ModelSpec(variant, len(classes)),
        "torch",
        Preprocessing(crop_fraction=crop),
        tuple(ClassName(name, name) for name in classes),
        {"network.1.norm.num_batches_tracked": counter},
        "ab",
        "cd",
    )
    assert Header.from_json(header.to_json()) == header


@needs_paddle
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.slow
def test_plain_paddle_loads_a_pdparams(tmp_path, digits_pth, dtype):
    import fcvit

    paddle = import_framework("paddle")
    convert(digits_pth, tmp_path / "x.pdparams", dtype=dtype, verify=False)
    model = fcvit.create_model("fcvit_digits", num_classes=10)
    model.to(dtype=dtype)  # Paddle requires equal types
    assert model.set_state_dict(paddle.load(str(tmp_path / "x.pdparams"))) == ([], [])
    expected = fcvit.create_model("fcvit_digits", tmp_path / "x.pdparams")
    for name, tensor in expected.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name].astype("float32").numpy(), tensor.numpy())


@needs_torch
def test_the_reference_loads_a_pth_strictly(tmp_path, digits_pth):
    torch = import_framework("torch")
    from fcvit.reference.classifier import FCViT

    convert(digits_pth, tmp_path / "a.safetensors", verify=False)
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth", verify=False)
    FCViT(DIGITS.variant, 10).load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=True)


def test_a_header_of_other_weights_is_rejected(tmp_path, digits_pth):
    convert(digits_pth, tmp_path / "a.pdparams", verify=False)
    convert(digits_pth, tmp_path / "b.pdparams", dtype="float64", verify=False)
    os.replace(tmp_path / "b.pdparams", tmp_path / "a.pdparams")
    with pytest.raises(UnreadableFile, match=r"a\.pdparams\.json describes other weights"):
        read_weights(tmp_path / "a.pdparams")


@pytest.mark.parametrize(("ending", "code"), [(".safetensors", 0), (".pth", 2), (".pdparams", 2)])
def test_a_users_file_with_the_name_of_the_header_is_kept(tmp_path, digits_pth, ending, code):
    """A user's own FILE.json is ignored for safetensors, and an error for formats with a separate header."""
    own = sidecar(tmp_path / f"x{ending}")
    own.write_text("mine")
    if code:
        with pytest.raises(UsageError, match=rf"x{ending}\.json already exists.*--overwrite"):
            convert(digits_pth, tmp_path / f"x{ending}", verify=False)
    else:
        convert(digits_pth, tmp_path / f"x{ending}", verify=False)
        assert read_weights(tmp_path / f"x{ending}").spec == DIGITS
    assert own.read_text() == "mine"


def test_the_source_is_never_overwritten(tmp_path, digits_pth):
    """A training checkpoint would lose its optimizer."""
    before = digits_pth.read_bytes()
    (tmp_path / "link.pth").symlink_to(digits_pth)
    for target in (digits_pth, tmp_path / "link.pth"):
        with pytest.raises(UsageError, match="is the source file"):
            convert(digits_pth, target, verify=False, overwrite=True)
    assert digits_pth.read_bytes() == before


def test_a_folder_is_not_overwritten(tmp_path, digits_pth):
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(UsageError, match="is not a file"):
        convert(digits_pth, tmp_path / "x.pth", verify=False, overwrite=True)
    assert files_in(tmp_path) == ["digits.pth", "x.pth"]


def test_the_old_header_is_restored_if_the_weights_cannot_be_replaced(tmp_path, digits_pth, monkeypatch):
    target = tmp_path / "x.pdparams"
    convert(digits_pth, target, verify=False)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    replace = os.replace

    def failing_replace(source, destination):
        if destination == target:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        convert(digits_pth, target, verify=False, dtype="float64", overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


@pytest.mark.slow
def test_a_full_disk_leaves_no_partial_file(tmp_path, digits_pth):
    """The conversion runs in a process that cannot write files of more than 100 kB."""
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from fcvit.cli import main
sys.exit(main(["convert", {str(digits_pth)!r}, "-o", sys.argv[1], "--no-verify"]))
"""
    for ending in (".safetensors", ".pdparams", ".pth"):
        words = [sys.executable, "-c", script, str(tmp_path / f"x{ending}")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 3 and "cannot be written" in done.stderr, done.stderr
    assert files_in(tmp_path) == ["digits.pth"]


def test_numbers_too_small_for_the_type_are_counted(tmp_path, digits_tensors):
    tiny = {**digits_tensors, "network.0.0.layer_scale_1": np.full(16, 1e-9, np.float32)}
    done = convert(write_pth(tmp_path / "a.pth", tiny), tmp_path / "a.safetensors", dtype="float16", verify=False)
    assert "16 numbers are too small for float16 and became 0" in done.notes
    flat = {**digits_tensors, "patch_embed.norm.running_var": np.full(16, 1e-9, np.float32)}
    with pytest.raises(DoesNotFit, match=r"running_var: .*variances that become 0"):
        convert(write_pth(tmp_path / "b.pth", flat), tmp_path / "b.safetensors", dtype="float16", verify=False)


def test_class_lists_are_stored_and_checked(tmp_path, digits_pth):
    listed = tmp_path / "classes.csv"
    listed.write_text("index,id,name\n" + "".join(f"{i},n{i},{'same' if i < 2 else i}\n" for i in range(10)))
    convert(digits_pth, tmp_path / "x.safetensors", classes=listed, verify=False)
    assert read_weights(tmp_path / "x.safetensors").classes[1] == ClassName("n1", "same")
    with pytest.raises(DoesNotFit, match=r"3 classes, but .* has 10 outputs.*--new-head"):
        convert(digits_pth, tmp_path / "y.safetensors", classes=TEN[:3], verify=False)
    assert not (tmp_path / "y.safetensors").exists()


def test_a_new_head_requires_the_option(tmp_path, digits_pth):
    convert(digits_pth, tmp_path / "kept.safetensors", verify=False)
    assert read_weights(tmp_path / "kept.safetensors").spec.num_classes == 10
    done = convert(digits_pth, tmp_path / "new.safetensors", new_head=3, verify=False)
    assert any("head for 3 classes" in note for note in done.notes)
    assert read_weights(tmp_path / "new.safetensors").tensors["head.weight"].shape == (3, 48)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.onnx", {}, "expected one of .safetensors, .pdparams, .pth"),
        ("x.pth", {"layout": "paddle"}, "always has torch layout; use .safetensors"),
        ("x.pdparams", {"layout": "torch"}, "always has paddle layout; use .safetensors"),
        ("x.safetensors", {"layout": "jax"}, "expected paddle or torch"),
        ("x.safetensors", {"dtype": "int8"}, "expected one of"),
        ("x.safetensors", {"new_head": 0}, "at least 1"),
        ("x.safetensors", {"variant": "fcvit_nope"}, "unknown variant 'fcvit_nope'"),
    ],
)
def test_invalid_requests_leave_no_file(tmp_path, digits_pth, name, options, message):
    before = files_in(tmp_path)
    with pytest.raises(UsageError, match=message):
        convert(digits_pth, tmp_path / name, verify=False, **options)
    assert files_in(tmp_path) == before


def test_an_existing_file_is_kept(tmp_path, digits_pth):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"already exists.*--overwrite"):
        convert(digits_pth, target, verify=False)
    assert target.read_bytes() == b"precious"
    convert(digits_pth, target, verify=False, overwrite=True)
    assert read_weights(target).spec == DIGITS


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pdparams"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, digits_pth, ending, monkeypatch):
    target = tmp_path / f"x{ending}"
    convert(digits_pth, target, verify=False)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UnreadableFile, match="No space left on device"):
        convert(digits_pth, target, verify=False, dtype="float16", overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


def test_a_source_that_does_not_fit_leaves_no_file(tmp_path, digits_pth):
    with pytest.raises(DoesNotFit):
        convert(digits_pth, tmp_path / "x.safetensors", variant="fcvit_tiny", verify=False)
    assert files_in(tmp_path) == ["digits.pth"]


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, digits_pth, monkeypatch):
    """The test flips one bit after the file is written."""
    weights = read_weights(digits_pth)
    write = safetensors_file.write

    def faulty_write(path, tensors, metadata):
        write(path, tensors, metadata)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors_file, "write", faulty_write)
    with (
        pytest.raises(NumbersDisagree, match=r"x\.safetensors: 1 tensor.*read back"),
        staged(tmp_path / "x.safetensors") as path,
    ):
        write_weights(path, weights)
    assert files_in(tmp_path) == ["digits.pth"]


def test_the_result_has_default_permissions(tmp_path, digits_pth):
    convert(digits_pth, tmp_path / "x.safetensors", verify=False)
    reference = tmp_path / "plain"
    reference.touch()
    mode = stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE(reference.stat().st_mode)
