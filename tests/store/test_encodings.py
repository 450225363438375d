"""Every encoding keeps what it promises, row by row, null rows included."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.errors import ConfigError, TeacherError
from vkd.schema import TensorType
from vkd.store import encodings


def round_trip(values, tensor, encoding, valid=None, rows=None):
    valid = np.ones(len(values), bool) if valid is None else valid
    columns = encodings.encode("x", values, valid, tensor, encoding)
    table = pa.table([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))
    return encodings.decode(table, "x", rows)


def logits(n=6, d=40, seed=0):
    return (np.random.default_rng(seed).normal(size=(n, d)) * 4).astype(np.float32)


floats = st.integers(0, 7).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=n, max_size=n)
)


@given(rows=floats, data=st.data())
@settings(max_examples=60, deadline=None)
def test_float_encodings_bound_the_error(rows, data):
    values = np.array(rows, np.float32).reshape(len(rows), 3)
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), bool)
    largest = np.abs(values).max(axis=1, initial=0.0, keepdims=True)
    bounds = {"fp32": 0 * values, "raw": 0 * values, "fp16": np.abs(values) * 2**-11 + 2**-24, "int8": largest / 253 + 1e-30}
    for encoding, bound in bounds.items():
        got = round_trip(values, TensorType("float32", (3,)), encoding, valid)
        assert got.dtype == np.float32 and got.shape == values.shape
        assert (np.abs(got - values)[valid] <= np.broadcast_to(bound, values.shape)[valid]).all()
        assert (got[~valid] == 0).all()


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8", "topk:5"])
def test_chosen_rows_are_those_of_the_whole(encoding):
    values, valid, rows = logits(), np.array([1, 1, 0, 1, 1, 1], bool), np.array([4, 2, 0, 4])
    whole = round_trip(values, TensorType("float32", (40,)), encoding, valid)
    assert np.array_equal(round_trip(values, TensorType("float32", (40,)), encoding, valid, rows), whole[rows])


def test_invalid_rows_may_hold_anything():
    values = logits(3)
    values[1] = np.nan
    valid = np.array([True, False, True])
    for encoding in ("fp16", "int8", "topk:4", "fp32"):
        assert np.isfinite(round_trip(values, TensorType("float32", (40,)), encoding, valid)).all()


def test_a_sliced_and_a_chunked_table_decode_alike():
    values, tensor = logits(), TensorType("float32", (40,))
    columns = encodings.encode("x", values, np.ones(6, bool), tensor, "int8")
    table = pa.table([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))
    whole = encodings.decode(table, "x")
    assert np.array_equal(encodings.decode(table.slice(2, 3), "x"), whole[2:5])
    assert np.array_equal(encodings.decode(pa.concat_tables([table.slice(0, 2), table.slice(2)]), "x"), whole)


def test_fp32_is_read_without_a_copy():
    columns = encodings.encode("x", logits(), np.ones(6, bool), TensorType("float32", (40,)), "fp32")
    table = pa.table([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))
    assert encodings.decode(table, "x").ctypes.data == table["x"].chunk(0).buffers()[1].address


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float64"])
def test_raw_keeps_its_own_dtype(dtype):
    values = (np.arange(12).reshape(3, 2, 2) % 2).astype(dtype)
    columns = encodings.encode("x", values, np.ones(3, bool), TensorType(dtype, (2, 2)), "raw")
    assert columns[0][1].type == pa.binary(4 * np.dtype(dtype).itemsize)
    got = round_trip(values, TensorType(dtype, (2, 2)), "raw")
    assert np.array_equal(got, values) and got.dtype == (np.float32 if np.dtype(dtype).kind == "f" else values.dtype)


def test_a_scalar_label_has_no_axis():
    assert round_trip(np.arange(4.0, dtype=np.float32), TensorType("float32", ()), "fp16").tolist() == [0, 1, 2, 3]


@given(seed=st.integers(0, 10**6), num_classes=st.integers(1, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_topk_gives_normalised_log_probabilities(seed, num_classes, data):
    k, values = data.draw(st.integers(1, num_classes)), logits(3, num_classes, seed)
    got = round_trip(values, TensorType("float32", (num_classes,)), f"topk:{k}")
    assert np.allclose(np.exp(got.astype(np.float64)).sum(1), 1, atol=1e-5)
    exact = values - np.log(np.exp(values.astype(np.float64)).sum(1, keepdims=True))
    for row, log_probs in zip(got, exact, strict=True):
        top = np.argsort(-log_probs)[:k]
        assert np.allclose(np.exp(row[top]), np.exp(log_probs[top]), atol=2e-3)
        others = np.delete(row, top)
        assert others.size == 0 or np.ptp(others) < 1e-5


def test_topk_of_a_certain_teacher_stays_finite():
    values = np.array([[1000.0, 0, 0, 0]], np.float32)
    got = round_trip(values, TensorType("float32", (4,)), "topk:1")
    assert np.isfinite(got).all() and got[0].argmax() == 0 and got[0, 0] > -1e-6


@pytest.mark.parametrize(("encoding", "bound"), [("fp32", 0.0), ("fp16", 2e-2), ("int8", 0.2), ("raw", 0.0)])
def test_ragged_rows_keep_their_lengths(encoding, bound):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(n, 3, 4)).astype(np.float32) * 5 for n in (2, 0, 5)] + [None]
    valid = np.array([True, True, True, False])
    got = round_trip(values, TensorType("float32", (None, 3, 4)), encoding, valid)
    assert [row.shape for row in got] == [(2, 3, 4), (0, 3, 4), (5, 3, 4), (0, 3, 4)]
    for row, value in zip(got[:3], values[:3], strict=True):
        assert row.dtype == np.float32 and np.abs(row - value).max(initial=0.0) <= bound
    two = round_trip(values, TensorType("float32", (None, 3, 4)), encoding, valid, np.array([2, 0]))
    assert np.array_equal(two[0], got[2]) and np.array_equal(two[1], got[0])


def frames(n=2, t=3, size=32):
    y, x = np.mgrid[:size, :size]
    wave = np.stack([np.stack([(x * 4 + 9 * i) % 256, (y * 3) % 256, (x + y) * 2], -1) for i in range(n * t)])
    return wave.astype(np.uint8).reshape(n, t, size, size, 3)


def test_jpeg_frames_come_back_close():
    clips, valid = frames(3), np.array([True, False, True])
    got = round_trip(clips, TensorType("uint8", clips.shape[1:]), "jpeg:95", valid)
    assert got.dtype == np.uint8 and got.shape == clips.shape and (got[1] == 0).all()
    assert np.abs(got[[0, 2]].astype(int) - clips[[0, 2]]).mean() < 6
    chosen = round_trip(clips, TensorType("uint8", clips.shape[1:]), "jpeg:95", valid, np.array([2]))
    assert np.array_equal(chosen[0], got[2])


def test_raw_frames_are_exact():
    assert np.array_equal(round_trip(frames(), TensorType("uint8", (3, 32, 32, 3)), "raw"), frames())


def test_fidelity_orders_the_encodings():
    values, tensor = logits(32, 200), TensorType("float32", (200,))
    told = {name: encodings.fidelity(values, tensor, name) for name in ("fp32", "fp16", "int8", "topk:20")}
    assert told["fp32"]["max_abs_error"] == 0 and told["fp32"]["bytes_per_row"] == 800
    assert told["fp16"]["cosine_min"] > 0.999999 and told["fp16"]["bytes_per_row"] == 400
    assert told["int8"]["cosine_mean"] > 0.999 and 200 < told["int8"]["bytes_per_row"] < 210
    assert 0 <= told["fp16"]["kl_mean"] < told["int8"]["kl_mean"] < told["topk:20"]["kl_mean"] < 1
    assert told["topk:20"]["bytes_per_row"] < 130


def test_fidelity_of_frames_and_ragged_rows():
    tensor = TensorType("uint8", (3, 32, 32, 3))
    low, high = (encodings.fidelity(frames(), tensor, f"jpeg:{q}") for q in (30, 95))
    assert low["psnr_db"] < high["psnr_db"] < 100 and low["bytes_per_row"] < high["bytes_per_row"]
    assert encodings.fidelity(frames(), tensor, "raw")["psnr_db"] == 100
    ragged = encodings.fidelity([np.ones((2, 3)), None, np.zeros((0, 3))], TensorType("float32", (None, 3)), "fp16")
    assert ragged["cosine_min"] == pytest.approx(1) and "kl_mean" not in ragged
    assert "cosine_min" not in encodings.fidelity([None], TensorType("float32", (3,)), "fp16")


@pytest.mark.parametrize("encoding", ["fp8", "topk", "topk:0", "topk:x", "jpeg:101", "fp16:2", ""])
def test_unknown_encodings_list_the_choices(encoding):
    with pytest.raises(ConfigError, match="fp32, fp16, int8, topk:K, jpeg:Q, raw"):
        encodings.check("x", TensorType("float32", (4,)), encoding)


@pytest.mark.parametrize(
    ("encoding", "tensor"),
    [
        ("topk:5", TensorType("float32", (4,))),
        ("topk:2", TensorType("float32", (4, 4))),
        ("jpeg:90", TensorType("float32", (4,))),
        ("fp16", TensorType("int64", (4,))),
        ("fp16", TensorType("float32", (4, None))),
        ("raw", TensorType("float32", (0,))),
    ],
)
def test_encodings_refuse_tensors_that_they_cannot_hold(encoding, tensor):
    with pytest.raises(ConfigError, match="cannot hold"):
        encodings.check("x", tensor, encoding)


def test_values_that_break_the_declared_type_are_refused():
    tensor, valid = TensorType("float32", (4,)), np.ones(2, bool)
    for values in (np.zeros((2, 5), np.float32), np.zeros((1, 4), np.float32), np.full((2, 4), np.nan, np.float32), [np.zeros(4), None]):
        with pytest.raises(TeacherError):
            encodings.encode("x", values, valid, tensor, "fp16")
    with pytest.raises(TeacherError, match="int32"):
        encodings.encode("x", np.zeros((2, 4), np.float32), valid, TensorType("int32", (4,)), "raw")
    with pytest.raises(TeacherError):
        encodings.encode("x", [np.zeros((1, 3)), np.zeros((1, 4))], valid, TensorType("float32", (None, 4)), "fp16")
    with pytest.raises(ConfigError, match="fp16 cannot hold"):
        encodings.encode("x", np.full((2, 4), 1e5, np.float32), valid, tensor, "fp16")
