"""How tensors lie in Arrow columns, and how much each way loses. Pure functions between numpy and Arrow.

A label `x` is the column `x`, whose field metadata gives dtype, shape and encoding, and for some encodings companions:

    fp32, fp16, raw   x: the values                        int8     x: codes; x.scale: float32, one a row
    topk:K            x: fp16 logit - logsumexp of the K largest; x.index: int32; x.logsumexp: float32
    jpeg:Q            x: one JPEG of the frames of a clip, one under the other

A ragged tensor (leading axis unknown) is variable-length binary, with its leading length in x.length.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image

from vkd.errors import ConfigError, TeacherError
from vkd.schema import TensorType

CHOICES = "fp32, fp16, int8, topk:K, jpeg:Q, raw"
STORED = {"fp32": "float32", "fp16": "float16", "int8": "int8", "topk": "float16"}  # the others keep the tensor's dtype
MAX_FP16 = 65504.0
MIN_REST = 1e-7  # the least mass that top-k leaves to the other classes, so that their log stays finite

Values = np.ndarray | Sequence[np.ndarray | None]
Encoded = list[tuple[pa.Field, pa.Array]]
Metadata = dict[str, str]


def default_encoding(tensor: TensorType) -> str:
    """fp16 for floats, raw for the rest."""
    return "fp16" if np.dtype(tensor.dtype).kind == "f" else "raw"


def check(name: str, tensor: TensorType, encoding: str) -> tuple[str, int]:
    """(kind, number) of an encoding, `topk:32` -> ("topk", 32). Raises ConfigError when it is unknown or cannot hold the tensor."""
    kind, colon, text = encoding.partition(":")
    number = int(text) if text.isdecimal() else 0
    known = kind in ("topk", "jpeg") if colon else kind in ("fp32", "fp16", "int8", "raw")
    if not known or (colon and not 1 <= number <= (100 if kind == "jpeg" else 2**31)):
        raise ConfigError(f"unknown encoding {encoding!r}", where=f"label {name!r}", action=f"use one of {CHOICES}")
    is_float = np.dtype(tensor.dtype).kind == "f"
    is_frames = tensor.dtype == "uint8" and len(tensor.shape) == 4 and tensor.shape[-1] == 3 and not tensor.ragged
    is_logits = is_float and len(tensor.shape) == 1 and not tensor.ragged and number <= tensor.num_values
    fits = {"raw": True, "jpeg": is_frames, "topk": is_logits}.get(kind, is_float)
    if not fits or tensor.num_values == 0 or None in tensor.shape[1:]:
        shape = f"{tensor.dtype} {list(tensor.shape)}"
        raise ConfigError(f"{encoding} cannot hold {shape}", where=f"label {name!r}", action=f"use another of {CHOICES}")
    return kind, number


def encode(name: str, values: Values, valid: Bool[np.ndarray, " n"], tensor: TensorType, encoding: str) -> Encoded:
    """Columns of n rows; rows that are not valid become null. Raises TeacherError when the values break the tensor type."""
    kind, number = check(name, tensor, encoding)
    if len(values) != len(valid):
        raise TeacherError(f"{len(values)} rows of values for {len(valid)}", where=f"label {name!r}", action="mend the teacher")
    if tensor.ragged:
        return _encode_ragged(name, values, valid, tensor, kind)
    rows = _rows(name, values, valid, tensor, kind)
    metadata = _metadata(tensor, encoding)
    if kind == "jpeg":
        return _encode_jpeg(name, rows.reshape(len(rows), *tensor.row_shape), valid, number, metadata)
    if kind == "topk":
        return _encode_topk(name, rows, valid, number, metadata)
    stored, scales = _pack(name, rows, kind)
    scale = [] if scales is None else [_column_of(f"{name}.scale", pa.array(scales, mask=~valid))]
    return [_column_of(name, _fixed_binary(stored, valid), metadata), *scale]


def decode(table: pa.Table, name: str, rows: Int[np.ndarray, " m"] | None = None) -> np.ndarray | list[np.ndarray]:
    """The label of all rows, or of the given ones: float32 for floats, otherwise the tensor's dtype; ragged ones as a list.

    Null rows are zeros (empty when ragged). top-k gives log-probabilities. The result may be a read-only view.
    """
    tensor, encoding = described(table.schema.field(name))
    kind, _ = check(name, tensor, encoding)
    array, chosen = _column(table, name), np.arange(table.num_rows) if rows is None else np.asarray(rows)
    if tensor.ragged:
        return _decode_ragged(table, name, chosen, tensor, kind)
    if kind == "jpeg":
        return _decode_jpeg(array, chosen, tensor)
    view = _view(array, np.dtype(STORED.get(kind, tensor.dtype)))
    valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False)) if array.null_count else None
    view, valid = (view, valid) if rows is None else (view[rows], None if valid is None else valid[rows])
    if kind == "topk":
        index = _view(_column(table, f"{name}.index"), np.dtype("int32"))
        view = _dense_log_probs(index if rows is None else index[rows], view, tensor.num_values)
    view = view.astype(np.float32, copy=False) if np.dtype(tensor.dtype).kind == "f" else view
    if kind == "int8":
        view = view * _column(table, f"{name}.scale").fill_null(0).to_numpy()[chosen][:, None]
    if valid is not None and not valid.all():
        view = np.where(valid[:, None], view, np.zeros((), view.dtype))
    return view.reshape(len(view), *tensor.row_shape)


def described(field: pa.Field) -> tuple[TensorType, str]:
    """The tensor type and encoding that a label's field metadata tells."""
    told = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    return TensorType(told["vkd.dtype"], tuple(json.loads(told["vkd.shape"]))), told["vkd.encoding"]


def fidelity(values: Values, tensor: TensorType, encoding: str) -> dict[str, float]:
    """What the encoding loses against fp32, and `bytes_per_row` before compression. psnr_db is at most 100 (exact).

    top-k is compared with the log-probabilities of the values; `kl_mean` (softmax KL, nats) is given for rows of one axis.
    """
    valid = np.array([row is not None for row in values], bool)
    columns = encode("x", values, valid, tensor, encoding)
    table = pa.table([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))
    got = decode(table, "x")
    pairs = [(np.float64(a).ravel(), np.float64(b).ravel()) for a, b in zip(values, got, strict=True) if a is not None]
    if encoding.startswith("topk"):
        pairs = [(_log_softmax(a), b) for a, b in pairs]
    pairs = [(a, b) for a, b in pairs if a.size]
    facts = {"bytes_per_row": table.nbytes / max(len(valid), 1)}
    if not pairs:
        return facts
    facts["max_abs_error"] = max(float(np.abs(a - b).max()) for a, b in pairs)
    if tensor.dtype == "uint8":
        mean_square = float(np.mean([np.mean((a - b) ** 2) for a, b in pairs]))
        facts["psnr_db"] = min(100.0, 20 * np.log10(255.0) - 10 * np.log10(max(mean_square, 1e-12)))
        return facts
    if np.dtype(tensor.dtype).kind != "f":
        return facts
    cosines = [cosine(a, b) for a, b in pairs]
    facts |= {"cosine_min": min(cosines), "cosine_mean": float(np.mean(cosines))}
    if len(tensor.shape) == 1 and not tensor.ragged:
        logs = [(_log_softmax(a), _log_softmax(b)) for a, b in pairs]
        facts["kl_mean"] = float(np.mean([np.sum(np.exp(p) * (p - q)) for p, q in logs]))
    return facts


def cosine(a: Float[np.ndarray, " d"], b: Float[np.ndarray, " d"]) -> float:
    """Cosine of the angle between two vectors; 1 when both are zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def _rows(name: str, values: Values, valid: Bool[np.ndarray, " n"], tensor: TensorType, kind: str) -> Shaped[np.ndarray, "n d"]:
    """Checked values, one flat row each, zero where not valid."""
    if not isinstance(values, np.ndarray) or values.dtype == object:
        empty = np.zeros(tensor.row_shape, tensor.dtype)
        full = [empty if value is None and not ok else value for value, ok in zip(values, valid, strict=True)]
        values = np.stack([_checked(name, value, tensor.shape, kind, tensor) for value in full]) if full else empty[None][:0]
    rows = _checked(name, values, (len(valid), *tensor.shape), kind, tensor).reshape(len(valid), tensor.num_values)
    if not valid.all():
        rows = rows.copy()
        rows[~valid] = 0
    return np.ascontiguousarray(rows)


def _checked(name: str, value: np.ndarray | None, shape: tuple[int | None, ...], kind: str, tensor: TensorType) -> np.ndarray:
    """The values as what the encoding works on: float32, or the tensor's own dtype for those that keep it."""
    got = None if value is None else value.shape
    if value is None or len(value.shape) != len(shape) or any(e not in (None, g) for g, e in zip(value.shape, shape, strict=True)):
        raise TeacherError(f"values have shape {got}, declared is {shape}", where=f"label {name!r}", action="mend the teacher")
    dtype = np.dtype("float32" if kind in STORED else tensor.dtype)
    if not np.can_cast(value.dtype, dtype, "same_kind"):
        raise TeacherError(f"values are {value.dtype}, declared is {tensor.dtype}", where=f"label {name!r}", action="mend the teacher")
    return value.astype(dtype, copy=False)


def _require_finite(name: str, rows: Float[np.ndarray, "n d"], kind: str) -> None:
    largest = float(np.abs(rows).max(initial=0.0))
    if not np.isfinite(largest):
        raise TeacherError("NaN or infinite values", where=f"label {name!r}", action="mend the teacher, or its precision")
    if kind == "fp16" and largest > MAX_FP16:
        raise ConfigError(f"fp16 cannot hold {largest:.4g}", where=f"label {name!r}", action="give this label the encoding fp32 or int8")


def _pack(name: str, rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What is stored of [n, d] values, and the scale of each row when there is one."""
    if kind in ("fp16", "int8"):
        _require_finite(name, rows, kind)
    if kind == "fp16":
        return rows.astype(np.float16), None
    if kind == "int8":
        scales = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
        codes = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
        return np.clip(codes, -127, 127).astype(np.int8), scales
    return rows, None


def _encode_ragged(name: str, values: Values, valid: np.ndarray, tensor: TensorType, kind: str) -> Encoded:
    blobs: list[bytes | None] = [None] * len(valid)
    lengths, scales = np.zeros(len(valid), np.int32), np.zeros(len(valid), np.float32)
    for i, (value, ok) in enumerate(zip(values, valid, strict=True)):
        if not ok:
            continue
        value = _checked(name, value, tensor.shape, kind, tensor)
        stored, scale = _pack(name, value.reshape(1, -1), kind)
        blobs[i] = stored.tobytes()
        lengths[i], scales[i] = len(value), 0 if scale is None else scale[0]
    columns = [_column_of(name, pa.array(blobs, pa.large_binary()), _metadata(tensor, kind))]
    columns.append(_column_of(f"{name}.length", pa.array(lengths, mask=~valid)))
    return [*columns, _column_of(f"{name}.scale", pa.array(scales, mask=~valid))] if kind == "int8" else columns


def _decode_ragged(table: pa.Table, name: str, rows: np.ndarray, tensor: TensorType, kind: str) -> list[np.ndarray]:
    array, is_float = _column(table, name), np.dtype(tensor.dtype).kind == "f"
    stored = STORED.get(kind, tensor.dtype)
    lengths = _column(table, f"{name}.length").fill_null(0).to_numpy()
    scales = _column(table, f"{name}.scale").fill_null(0).to_numpy() if kind == "int8" else None
    found = []
    for i in rows.tolist():
        flat = np.frombuffer(array[i].as_buffer(), stored) if lengths[i] else np.zeros(0, stored)
        flat = flat.astype(np.float32, copy=False) if is_float else flat
        found.append((flat if scales is None else flat * scales[i]).reshape(lengths[i], *tensor.row_shape))
    return found


def _encode_topk(name: str, rows: Float[np.ndarray, "n c"], valid: np.ndarray, k: int, metadata: Metadata) -> Encoded:
    _require_finite(name, rows, "topk")
    log_probs = _log_softmax(rows.astype(np.float64))
    index = np.argpartition(-rows, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(rows, index, 1), axis=1, kind="stable")
    index = np.take_along_axis(index, order, 1)
    top = np.maximum(np.take_along_axis(log_probs, index, 1), -MAX_FP16).astype(np.float16)
    logsumexp = (rows[:, 0] - log_probs[:, 0]).astype(np.float32)
    return [
        _column_of(name, _fixed_binary(top, valid), metadata),
        _column_of(f"{name}.index", _fixed_binary(index.astype(np.int32), valid)),
        _column_of(f"{name}.logsumexp", pa.array(logsumexp, mask=~valid)),
    ]


def _dense_log_probs(index: np.ndarray, top: np.ndarray, num_classes: int) -> Float[np.ndarray, "n c"]:
    """Log-probabilities of all classes: the mass that the top leaves is spread evenly over the others."""
    log_top = top.astype(np.float64)
    mass = np.exp(log_top).sum(axis=1, keepdims=True)
    num_others = num_classes - top.shape[1]
    rest = np.maximum(1 - mass, MIN_REST) if num_others else np.zeros_like(mass)
    dense: np.ndarray = np.repeat(np.log(np.maximum(rest, MIN_REST) / max(num_others, 1)), num_classes, axis=1)
    np.put_along_axis(dense, index, log_top, axis=1)
    dense -= np.log(mass + rest)
    return dense.astype(np.float32)


def _log_softmax(x: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
    shifted = x - x.max(axis=-1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probs


def _encode_jpeg(name: str, frames: UInt8[np.ndarray, "n t h w 3"], valid: np.ndarray, q: int, metadata: Metadata) -> Encoded:
    blobs = [_to_jpeg(clip, q) if ok else None for clip, ok in zip(frames, valid, strict=True)]
    return [_column_of(name, pa.array(blobs, pa.large_binary()), metadata)]


def _to_jpeg(clip: UInt8[np.ndarray, "t h w 3"], quality: int) -> bytes:
    """One image of all frames, one under the other: it decodes in half the time of as many small ones."""
    sink = io.BytesIO()
    Image.fromarray(clip.reshape(-1, *clip.shape[2:])).save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def _decode_jpeg(blobs: pa.Array, rows: np.ndarray, tensor: TensorType) -> UInt8[np.ndarray, "m t h w 3"]:
    frames = np.zeros((len(rows), *tensor.row_shape), np.uint8)
    for clip, i in zip(frames, rows.tolist(), strict=True):
        if blobs[i].is_valid:
            clip[:] = np.asarray(Image.open(io.BytesIO(memoryview(blobs[i].as_buffer())))).reshape(clip.shape)
    return frames


def _metadata(tensor: TensorType, encoding: str) -> Metadata:
    return {"vkd.dtype": tensor.dtype, "vkd.shape": json.dumps(list(tensor.shape)), "vkd.encoding": encoding}


def _column_of(name: str, array: pa.Array, metadata: Metadata | None = None) -> tuple[pa.Field, pa.Array]:
    return pa.field(name, array.type, metadata=metadata), array


def _fixed_binary(rows: Shaped[np.ndarray, "n d"], valid: np.ndarray) -> pa.Array:
    bitmap = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(rows))
    return pa.Array.from_buffers(pa.binary(rows.shape[1] * rows.itemsize), len(rows), [bitmap, data])


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _view(array: pa.Array, dtype: np.dtype) -> Shaped[np.ndarray, "n d"]:
    """The values of a fixed-size binary array, without a copy."""
    width = array.type.byte_width
    count = len(array) * width // dtype.itemsize
    data = np.frombuffer(array.buffers()[1], dtype, count, array.offset * width) if count else np.zeros(0, dtype)
    return data.reshape(len(array), width // dtype.itemsize)
