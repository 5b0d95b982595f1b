"""Test how the sets of weights in a checkpoint are found, and raw weights are distinguished from EMA weights."""

import pickle

import numpy as np
import pytest

from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.models.spec import is_counter
from fcvit.weights.reading import read_weights


@pytest.fixture
def write(tmp_path):
    """Return a function that writes any object to a file. A pickle of arrays is read as Paddle's format."""

    def save(content):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps(content, 4))
        return path

    return save


@pytest.fixture
def raw(digits_tensors):
    return digits_tensors


@pytest.fixture
def ema(digits_tensors):
    """Return the raw weights with 1 added to every number."""
    return {name: t if is_counter(name) else t + np.float32(1) for name, t in digits_tensors.items()}


def add_prefix(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def kind_of(weights, raw):
    difference = weights.tensors["head.bias"] - raw["head.bias"]
    return {0: "raw", 1: "ema"}[round(float(difference.mean()))]


# Layouts that programs use for a single set of weights. `t` is the dictionary of tensors.
SINGLE = {
    "the tutorial": lambda t: {"model_state_dict": t, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "a network": lambda t: {"net": t, "acc": 0.5},
    "DeepSpeed": lambda t: {"module": t, "optimizer": None, "ds_version": "0.14"},
    "a teacher": lambda t: {"teacher": add_prefix("module.", t), "epoch": 3},
    "two levels": lambda t: {"model": {"state_dict": t}, "epoch": 3},
    "three levels": lambda t: {"checkpoint": {"model": {"weights": add_prefix("module.", t)}}},
    "Lightning": lambda t: {"state_dict": add_prefix("model.", t) | {"loss.weight": np.ones(3)}, "callbacks": {}},
    "a compiled module in parallel": lambda t: {"model": add_prefix("module._orig_mod.", t)},
    "a module in parallel, compiled": lambda t: {"model": add_prefix("_orig_mod.module.", t)},
    "FSDP": lambda t: add_prefix("_forward_module.", t),
    "PEFT": lambda t: add_prefix("base_model.model.", t),
    "Paddle's parallel": lambda t: add_prefix("_layers.", t),
    "an encoder": lambda t: {"state_dict": add_prefix("encoder.", t)},
    "a prefix like the network's own": lambda t: add_prefix("network.", t),
    "a prefix on all names except the head": lambda t: {
        ("" if n.startswith("head") else "backbone.") + n: a for n, a in t.items()
    },
    "a compiled layer": lambda t: {n.replace("network.0.", "network._orig_mod.0."): a for n, a in t.items()},
    "a head next to the backbone, both in a network": lambda t: {
        f"net.{'' if n.startswith('head.') else 'backbone.'}{n}": a for n, a in t.items()
    },
    "counters as plain numbers": lambda t: {n: int(a) if is_counter(n) else a for n, a in t.items()},
    "counters as NumPy numbers": lambda t: {n: np.int64(a) if is_counter(n) else a for n, a in t.items()},
    "other numbers at the top level": lambda t: {**t, "epoch": 3, "best": 0.5, "args": None, "steps": np.array(900)},
    "EMA weights only": lambda t: {**add_prefix("module.", t), "n_averaged": np.array(17)},
    "an optimizer with names": lambda t: {"net": t, "optimizer": {"exp_avg": t, "exp_avg_sq": t}, "exp_avg": t},
    "one object twice": lambda t: {"state_dict": t, "model": t},
    "another network": lambda t: {
        "student": t,
        "teacher": {"patch_embed.proj.weight": np.ones((4, 3, 16, 16)), "blocks.0.attn.qkv.weight": np.ones((4, 4))},
    },
    "an incomplete copy": lambda t: {"best": dict(list(t.items())[:50]), "last": t},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", SINGLE)
def test_the_only_set_of_weights_is_used(layout, write, raw):
    weights = read_weights(write(SINGLE[layout](raw)))
    assert list(weights.tensors) == list(raw)
    for name, tensor in raw.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)


def test_used_and_skipped_entries_are_reported(write, raw):
    weights = read_weights(
        write({"a": {"b": add_prefix("net.", raw) | {"net.steps": 3, "loss.weight": np.ones(3)}}, "c": 1})
    )
    source, prefix, skipped = weights.notes[:3]
    assert source.endswith(": a.b") and prefix.endswith(": net.") and skipped.endswith(": steps, loss.weight")
    assert set(weights.skipped) == {"c", "steps", "loss.weight"}


# Layouts that programs use for raw weights `r` and EMA weights `e`.
BOTH = {
    "timm": lambda r, e: {"state_dict": r, "state_dict_ema": e},
    "torchvision": lambda r, e: {"model": r, "model_ema": add_prefix("module.", e) | {"n_averaged": np.array(17)}},
    "mmengine": lambda r, e: {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": e,
        "ema_state_dict": add_prefix("module.", r) | {"steps": np.array(900)},
    },
    "mmengine without its meta": lambda r, e: {
        "state_dict": add_prefix("backbone.", e),
        "ema_state_dict": add_prefix("module.backbone.", r) | {"steps": np.array(900)},
    },
    "Lightning's averaging": lambda r, e: {
        "state_dict": add_prefix("model.", e),
        "current_model_state": add_prefix("model.", r),
        "averaging_state": {"n_averaged": np.array(17)},
    },
    "two prefixes": lambda r, e: {"state_dict": add_prefix("model.", r) | add_prefix("model_ema.module.", e)},
    "ema-pytorch": lambda r, e: (
        add_prefix("online_model.", r) | add_prefix("ema_model.", e) | {"initted": np.array(True), "step": np.array(3)}
    ),
    "ema with raw weights without a prefix": lambda r, e: r | add_prefix("ema.", e) | {"ema.num_updates": np.array(4)},
    "YOLO's": lambda r, e: {"model": r, "ema": e, "updates": 300},
    "RT-DETR's": lambda r, e: {"model": r, "ema": {"module": e, "updates": 300, "warmups": 2000}},
    "BasicSR's": lambda r, e: {"params": r, "params_ema": e},
    "stochastic averaging": lambda r, e: {"net": r, "swa_state_dict": add_prefix("module.", e)},
    "EMA weights recognized by their counter": lambda r, e: {
        "first": r,
        "second": add_prefix("module.", e) | {"n_averaged": np.array(17)},
    },
    "ema-pytorch below a key": lambda r, e: {
        "ema": add_prefix("online_model.", r) | add_prefix("ema_model.", e) | {"initted": np.array([True])}
    },
    "EMA without buffers": lambda r, e: {
        "model": r,
        "shadow": {name: a for name, a in e.items() if "running_" not in name and not is_counter(name)},
    },
    "EMA without buffers, by prefix": lambda r, e: (
        add_prefix("model.", r)
        | {"ema." + name: a for name, a in e.items() if "running_" not in name and not is_counter(name)}
    ),
    "EMA stored in buffers, without dots": lambda r, e: {
        "state_dict": add_prefix("model.", r)
        | {"model_ema." + n.replace(".", ""): a for n, a in e.items() if "running_" not in n and not is_counter(n)}
        | {"model_ema.decay": np.array(0.99, np.float32), "model_ema.num_updates": np.array(3)}
    },
}


@pytest.mark.parametrize(
    "ema_list",
    [
        lambda e: {"ema": {"decay": 0.99, "shadow_params": list(e.values()), "collected_params": []}},
        lambda e: {"ema_models": [e, e]},
    ],
)
def test_ema_weights_without_names_are_rejected_with_a_remedy(ema_list, write, raw, ema):
    path = write({"model": raw, **ema_list(ema)})
    for choice in (None, True):
        with pytest.raises(UsageError, match=r"list.*--no-ema"):
            read_weights(path, ema=choice)
    assert kind_of(read_weights(path, ema=False), raw) == "raw"


def test_a_list_of_averaged_metrics_is_not_used_as_weights(write, raw):
    path = write({"model": raw, "average_accuracy": [np.array(0.5), 0.6], "ema_history": [{"epoch": 1}]})
    assert kind_of(read_weights(path), raw) == "raw"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", np.array(1, np.float32)),
        ("logit_scale", np.array([4.6], np.float32)),
        ("network.0.0.token_mixer.offset", np.array(2)),
        ("model.temperature", np.array(2, np.float32)),
    ],
)
def test_a_possible_parameter_of_another_network_is_not_skipped(name, value, write, raw):
    tensors = add_prefix("model.", raw) if name.startswith("model.") else raw
    with pytest.raises(DoesNotFit, match="expected no such tensor"):
        read_weights(write({**tensors, name: value}))


@pytest.mark.parametrize("key", [0, ("a",), b"x", None])
def test_a_tensor_name_that_is_not_text_is_rejected(key, write, raw):
    for tensors in (raw, add_prefix("model.", raw)):
        with pytest.raises(UnreadableFile, match=r"name .*not text"):
            read_weights(write({**tensors, key: np.ones(3)}))


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
def test_raw_and_ema_weights_are_distinguished(program, write, raw, ema):
    path = write(BOTH[program](raw, ema))
    with pytest.raises(UsageError, match=r"EMA weights .* raw weights.*--ema or --no-ema"):
        read_weights(path)
    assert kind_of(read_weights(path, ema=False), raw) == "raw"
    assert kind_of(read_weights(path, ema=True), raw) == "ema"


def test_ema_weights_without_statistics_use_the_raw_statistics(write, raw, ema):
    weights = read_weights(write(BOTH["EMA without buffers"](raw, ema)), ema=True)
    name = "patch_embed.norm.running_mean"
    np.testing.assert_array_equal(weights.tensors[name], raw[name])
    assert any("BatchNorm statistics" in note for note in weights.notes)


def test_ema_state_dict_contains_the_ema_weights_in_files_of_other_programs(write, raw, ema):
    path = write({"state_dict": raw, "ema_state_dict": ema})
    assert kind_of(read_weights(path, ema=True), raw) == "ema"


def test_a_file_with_only_ema_weights_requires_the_option(write, ema):
    path = write({"model_ema": ema})
    for choice in (None, False):
        with pytest.raises(UsageError, match=r"only EMA weights.*--ema"):
            read_weights(path, ema=choice)
    assert read_weights(path, ema=True)


SEVERAL = {
    "two dictionaries": (lambda r, e: {"student": r, "teacher": e}, "teacher"),
    "two prefixes": (lambda r, e: add_prefix("student.", r) | add_prefix("teacher.", e), "teacher"),
    "two prefixes in a dictionary": (
        lambda r, e: {"state_dict": add_prefix("module.student.", r) | add_prefix("module.teacher.", e)},
        "state_dict.module.teacher",
    ),
    "two levels": (lambda r, e: {"last": {"state_dict": r}, "best": {"state_dict": e}}, "best.state_dict"),
    "with and without a prefix": (lambda r, e: add_prefix("copy.", r) | e, "."),
    "two sets of EMA weights": (lambda r, e: {"model_ema": r, "swa": e}, "swa"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", SEVERAL)
def test_several_sets_are_listed_and_selected_by_key(layout, write, raw, ema):
    make, key = SEVERAL[layout]
    path = write(make(raw, ema))
    with pytest.raises(UsageError, match=r"several sets of weights|only EMA weights"):
        read_weights(path)
    with pytest.raises(UsageError, match=r"several sets of weights.*--key") as caught:
        read_weights(path, ema=True if layout == "two sets of EMA weights" else None)
    assert key in str(caught.value)
    assert kind_of(read_weights(path, key=key), raw) == "ema"
    with pytest.raises(UsageError, match="no set of weights 'nothing'; expected one of: "):
        read_weights(path, key="nothing")


def test_a_head_without_the_prefix_is_not_skipped(write, raw):
    """The backbone without a head would be an FCViT, but another entry of the file may be the head."""
    headless = {name: a for name, a in raw.items() if not name.startswith("head.")}
    with pytest.raises(DoesNotFit, match=r"classifier.weight"):
        read_weights(write(add_prefix("backbone.", headless) | {"classifier.weight": np.ones((10, 48), np.float32)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.astype(np.float16),
        lambda t: t.astype(np.float32),
        lambda t: t.astype(np.int32),
        lambda t: t.reshape(1),
        lambda t: t.astype(np.float64).reshape(1, 1),
    ],
)
def test_counters_of_other_types_and_shapes_are_read(write, raw, change):
    changed = {name: change(t) if is_counter(name) else t for name, t in raw.items()}
    weights = read_weights(write(changed))
    assert {name: (t.dtype, t.shape, int(t)) for name, t in weights.tensors.items() if is_counter(name)} == {
        name: (np.int64, (), int(t)) for name, t in raw.items() if is_counter(name)
    }


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (np.array(-1), "expected a whole number.*, found -1"),
        (np.array(np.nan), "found nan"),
        (np.array(np.inf, np.float16), "found inf"),
        (np.array([1, 2]), r"expected shape \[\], found \[2\]"),
        (np.array(True), "expected a whole number, found bool"),
        (np.array(1 << 63, np.uint64), "expected a whole number.*, found 9.22"),
    ],
)
def test_invalid_counters_are_rejected(write, raw, value, fault):
    with pytest.raises(DoesNotFit, match=fault):
        read_weights(write({**raw, "patch_embed.norm.num_batches_tracked": value}))


def test_dictionaries_that_contain_each_other_are_searched_quickly(write, raw):
    """A small file can contain one dictionary on a very large number of paths."""
    deep = {"state_dict": raw}
    for _ in range(30):
        deep = {f"a{i}": deep for i in range(30)}
    deep["itself"] = deep
    with pytest.raises((UsageError, DoesNotFit, UnreadableFile)):
        read_weights(write(deep))


def test_paddles_table_of_names_needs_no_note(write, raw):
    weights = read_weights(write({**raw, "StructuredToParameterName@@": {name: name for name in raw}}))
    assert weights.notes == () and weights.skipped == ("StructuredToParameterName@@",)
