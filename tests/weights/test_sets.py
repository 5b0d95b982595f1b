"""The sets of weights in a checkpoint: by dictionary, by prefix, raw and averaged."""

import pickle

import numpy as np
import pytest

from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.models.spec import is_counter
from fcvit.weights.reading import read_weights


@pytest.fixture
def write(tmp_path):
    """Any object as a file; a pickle of arrays is read as Paddle's."""

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
    """The raw weights, every number of which is one higher."""
    return {name: t if is_counter(name) else t + np.float32(1) for name, t in digits_tensors.items()}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def which(weights, raw):
    difference = weights.tensors["head.bias"] - raw["head.bias"]
    return {0: "raw", 1: "averaged"}[round(float(difference.mean()))]


# How programs nest and prefix one set of weights; T stands for the tensors.
SINGLE = {
    "the tutorial": lambda t: {"model_state_dict": t, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "a network": lambda t: {"net": t, "acc": 0.5},
    "DeepSpeed": lambda t: {"module": t, "optimizer": None, "ds_version": "0.14"},
    "a teacher": lambda t: {"teacher": under("module.", t), "epoch": 3},
    "two levels": lambda t: {"model": {"state_dict": t}, "epoch": 3},
    "three levels": lambda t: {"checkpoint": {"model": {"weights": under("module.", t)}}},
    "Lightning": lambda t: {"state_dict": under("model.", t) | {"loss.weight": np.ones(3)}, "callbacks": {}},
    "a compiled module in parallel": lambda t: {"model": under("module._orig_mod.", t)},
    "another way round": lambda t: {"model": under("_orig_mod.module.", t)},
    "FSDP": lambda t: under("_forward_module.", t),
    "PEFT": lambda t: under("base_model.model.", t),
    "Paddle's parallel": lambda t: under("_layers.", t),
    "an encoder": lambda t: {"state_dict": under("encoder.", t)},
    "a prefix like the network's own": lambda t: under("network.", t),
    "no head's backbone": lambda t: {("" if n.startswith("head") else "backbone.") + n: a for n, a in t.items()},
    "a compiled layer": lambda t: {n.replace("network.0.", "network._orig_mod.0."): a for n, a in t.items()},
    "a head beside the backbone, both in a network": lambda t: {
        f"net.{'' if n.startswith('head.') else 'backbone.'}{n}": a for n, a in t.items()
    },
    "counters as plain numbers": lambda t: {n: int(a) if is_counter(n) else a for n, a in t.items()},
    "counters as NumPy's numbers": lambda t: {n: np.int64(a) if is_counter(n) else a for n, a in t.items()},
    "numbers beside": lambda t: {**t, "epoch": 3, "best": 0.5, "args": None, "steps": np.array(900)},
    "an average alone": lambda t: {**under("module.", t), "n_averaged": np.array(17)},
    "an optimizer with names": lambda t: {"net": t, "optimizer": {"exp_avg": t, "exp_avg_sq": t}, "exp_avg": t},
    "one object twice": lambda t: {"state_dict": t, "model": t},
    "another network beside": lambda t: {
        "student": t,
        "teacher": {"patch_embed.proj.weight": np.ones((4, 3, 16, 16)), "blocks.0.attn.qkv.weight": np.ones((4, 4))},
    },
    "an incomplete copy beside": lambda t: {"best": dict(list(t.items())[:50]), "last": t},
}


@pytest.mark.parametrize("layout", SINGLE)
def test_the_only_set_of_weights_is_used(layout, write, raw):
    weights = read_weights(write(SINGLE[layout](raw)))
    assert list(weights.tensors) == list(raw)
    for name, tensor in raw.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)


def test_what_was_taken_and_left_out_is_reported(write, raw):
    weights = read_weights(
        write({"a": {"b": under("net.", raw) | {"net.steps": 3, "loss.weight": np.ones(3)}}, "c": 1})
    )
    assert weights.notes[:2] == ("weights taken from: a.b", "prefix stripped from the names: net.")
    assert weights.notes[2] == "entries that are no weights of the network were left out: steps, loss.weight"
    assert set(weights.skipped) == {"c", "steps", "loss.weight"}


# How programs store averaged weights beside the raw ones.
BOTH = {
    "timm": lambda r, e: {"state_dict": r, "state_dict_ema": e},
    "torchvision": lambda r, e: {"model": r, "model_ema": under("module.", e) | {"n_averaged": np.array(17)}},
    "mmengine": lambda r, e: {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": e,
        "ema_state_dict": under("module.", r) | {"steps": np.array(900)},
    },
    "mmengine without its meta": lambda r, e: {
        "state_dict": under("backbone.", e),
        "ema_state_dict": under("module.backbone.", r) | {"steps": np.array(900)},
    },
    "Lightning's averaging": lambda r, e: {
        "state_dict": under("model.", e),
        "current_model_state": under("model.", r),
        "averaging_state": {"n_averaged": np.array(17)},
    },
    "two prefixes": lambda r, e: {"state_dict": under("model.", r) | under("model_ema.module.", e)},
    "ema-pytorch": lambda r, e: (
        under("online_model.", r) | under("ema_model.", e) | {"initted": np.array(True), "step": np.array(3)}
    ),
    "ema with raw weights without a prefix": lambda r, e: r | under("ema.", e) | {"ema.num_updates": np.array(4)},
    "YOLO's": lambda r, e: {"model": r, "ema": e, "updates": 300},
    "RT-DETR's": lambda r, e: {"model": r, "ema": {"module": e, "updates": 300, "warmups": 2000}},
    "BasicSR's": lambda r, e: {"params": r, "params_ema": e},
    "stochastic averaging": lambda r, e: {"net": r, "swa_state_dict": under("module.", e)},
    "an averaged model told by its counter": lambda r, e: {
        "first": r,
        "second": under("module.", e) | {"n_averaged": np.array(17)},
    },
    "ema-pytorch below a key": lambda r, e: {
        "ema": under("online_model.", r) | under("ema_model.", e) | {"initted": np.array([True])}
    },
    "averaged parameters alone": lambda r, e: {
        "model": r,
        "shadow": {name: a for name, a in e.items() if "running_" not in name and not is_counter(name)},
    },
    "averaged parameters alone, by prefix": lambda r, e: (
        under("model.", r)
        | {"ema." + name: a for name, a in e.items() if "running_" not in name and not is_counter(name)}
    ),
    "averaged parameters in buffers, without dots": lambda r, e: {
        "state_dict": under("model.", r)
        | {"model_ema." + n.replace(".", ""): a for n, a in e.items() if "running_" not in n and not is_counter(n)}
        | {"model_ema.decay": np.array(0.99, np.float32), "model_ema.num_updates": np.array(3)}
    },
}


@pytest.mark.parametrize(
    "averaged",
    [
        lambda e: {"ema": {"decay": 0.99, "shadow_params": list(e.values()), "collected_params": []}},
        lambda e: {"ema_models": [e, e]},
    ],
)
def test_averaged_weights_without_names_ask_for_the_raw_ones(averaged, write, raw, ema):
    path = write({"model": raw, **averaged(ema)})
    for choice in (None, True):
        with pytest.raises(UsageError, match=r"as a list.*--no-ema"):
            read_weights(path, ema=choice)
    assert which(read_weights(path, ema=False), raw) == "raw"


def test_a_list_of_averaged_figures_is_no_weights(write, raw):
    path = write({"model": raw, "average_accuracy": [np.array(0.5), 0.6], "ema_history": [{"epoch": 1}]})
    assert which(read_weights(path), raw) == "raw"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", np.array(1, np.float32)),
        ("logit_scale", np.array([4.6], np.float32)),
        ("network.0.0.token_mixer.offset", np.array(2)),
        ("model.temperature", np.array(2, np.float32)),
    ],
)
def test_what_may_be_a_parameter_of_another_network_is_never_left_out(name, value, write, raw):
    tensors = under("model.", raw) if name.startswith("model.") else raw
    with pytest.raises(DoesNotFit, match="expected no such tensor"):
        read_weights(write({**tensors, name: value}))


@pytest.mark.parametrize("key", [0, ("a",), b"x", None])
def test_a_tensor_whose_name_is_no_text_is_refused(key, write, raw):
    for tensors in (raw, under("model.", raw)):
        with pytest.raises(UnreadableFile, match="an entry whose name is not text"):
            read_weights(write({**tensors, key: np.ones(3)}))


@pytest.mark.parametrize("program", BOTH)
def test_raw_and_averaged_weights_are_told_apart(program, write, raw, ema):
    path = write(BOTH[program](raw, ema))
    with pytest.raises(UsageError, match=r"averaged weights .* beside the raw ones: choose with --ema or --no-ema"):
        read_weights(path)
    assert which(read_weights(path, ema=False), raw) == "raw"
    assert which(read_weights(path, ema=True), raw) == "averaged"


def test_an_average_without_statistics_takes_those_of_the_raw_weights(write, raw, ema):
    weights = read_weights(write(BOTH["averaged parameters alone"](raw, ema)), ema=True)
    name = "patch_embed.norm.running_mean"
    np.testing.assert_array_equal(weights.tensors[name], raw[name])
    assert any("without BatchNorm's statistics" in note for note in weights.notes)


def test_other_programs_mean_by_ema_state_dict_what_it_says(write, raw, ema):
    path = write({"state_dict": raw, "ema_state_dict": ema})
    assert which(read_weights(path, ema=True), raw) == "averaged"


def test_averaged_weights_alone_are_named_so(write, ema):
    path = write({"model_ema": ema})
    for choice in (None, False):
        with pytest.raises(UsageError, match=r"averaged weights only.*--ema"):
            read_weights(path, ema=choice)
    assert read_weights(path, ema=True)


SEVERAL = {
    "two dictionaries": (lambda r, e: {"student": r, "teacher": e}, "teacher"),
    "two prefixes": (lambda r, e: under("student.", r) | under("teacher.", e), "teacher"),
    "two prefixes in a dictionary": (
        lambda r, e: {"state_dict": under("module.student.", r) | under("module.teacher.", e)},
        "state_dict.module.teacher",
    ),
    "two levels": (lambda r, e: {"last": {"state_dict": r}, "best": {"state_dict": e}}, "best.state_dict"),
    "with and without a prefix": (lambda r, e: under("twin.", r) | e, "."),
    "two averages": (lambda r, e: {"model_ema": r, "swa": e}, "swa"),
}


@pytest.mark.parametrize("layout", SEVERAL)
def test_several_sets_are_named_and_chosen_by_key(layout, write, raw, ema):
    make, key = SEVERAL[layout]
    path = write(make(raw, ema))
    with pytest.raises(UsageError, match=r"several sets of weights|averaged weights only") as caught:
        read_weights(path)
    with pytest.raises(UsageError, match=r"several sets of weights.*--key") as caught:
        read_weights(path, ema=True if layout == "two averages" else None)
    assert key in str(caught.value)
    assert which(read_weights(path, key=key), raw) == "averaged"
    with pytest.raises(UsageError, match="no set of weights 'nothing'; expected one of: "):
        read_weights(path, key="nothing")


def test_a_head_is_never_lost_with_a_prefix(write, raw):
    """The backbone alone would be an FCViT, but another part of the file may be its head."""
    headless = {name: a for name, a in raw.items() if not name.startswith("head.")}
    with pytest.raises(DoesNotFit, match=r"classifier.weight"):
        read_weights(write(under("backbone.", headless) | {"classifier.weight": np.ones((10, 48), np.float32)}))


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
        (np.array(-1), "expected a whole number from 0 up, found -1"),
        (np.array(np.nan), "found nan"),
        (np.array(np.inf, np.float16), "found inf"),
        (np.array([1, 2]), r"expected shape \[\], found \[2\]"),
        (np.array(True), "expected a whole number, found bool"),
        (np.array(1 << 63, np.uint64), "expected a whole number from 0 up"),
    ],
)
def test_counters_that_are_none_are_refused(write, raw, value, fault):
    with pytest.raises(DoesNotFit, match=fault):
        read_weights(write({**raw, "patch_embed.norm.num_batches_tracked": value}))


def test_dictionaries_that_share_and_contain_each_other_cost_little(write, raw):
    """A small file can name one dictionary on a great many paths."""
    deep = {"state_dict": raw}
    for _ in range(30):
        deep = {f"a{i}": deep for i in range(30)}
    deep["itself"] = deep
    with pytest.raises((UsageError, DoesNotFit, UnreadableFile)):
        read_weights(write(deep))


def test_paddles_table_of_names_needs_no_note(write, raw):
    weights = read_weights(write({**raw, "StructuredToParameterName@@": {name: name for name in raw}}))
    assert weights.notes == () and weights.skipped == ("StructuredToParameterName@@",)
