"""Addresses of tensors of any framework that speaks DLPack, without copying."""

import ctypes as c
from typing import Any, NamedTuple, Tuple

CPU, CUDA = 1, 2


class Tensor(NamedTuple):
    address: int
    device: int  # CPU or CUDA
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]  # in elements
    dtype: str  # "float32", "uint8", ...


class _DLDevice(c.Structure):
    _fields_ = [("type", c.c_int32), ("index", c.c_int32)]


class _DLDataType(c.Structure):
    _fields_ = [("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16)]


class _DLTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p), ("device", _DLDevice), ("ndim", c.c_int32), ("dtype", _DLDataType),
        ("shape", c.POINTER(c.c_int64)), ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat"}
_pointer_of = c.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = c.c_void_p, [c.py_object, c.c_char_p]


def dense_strides(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def look(tensor: Any, stream: Any = None) -> Tensor:
    """Where the tensor's data lies. The caller keeps the tensor alive while it uses the address.

    The capsule is not consumed: it frees its own when it goes. stream: for CUDA, as the protocol
    has it; -1 asks for no synchronisation."""
    device = tensor.__dlpack_device__()[0]
    if device == CUDA and stream is not None:
        capsule = tensor.__dlpack__(stream=stream)
    else:
        capsule = tensor.__dlpack__()
    t = c.cast(_pointer_of(capsule, b"dltensor"), c.POINTER(_DLTensor)).contents
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else dense_strides(shape)
    dtype = f"{_CODES.get(t.dtype.code, 'unknown')}{t.dtype.bits}"
    return Tensor((t.data or 0) + t.byte_offset, t.device.type, shape, strides, dtype)
