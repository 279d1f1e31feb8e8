"""ddpm.h in ctypes: its structs, callbacks and functions under their own names.

tools/python/check_package.py compares every line with the header.
"""

import ctypes as c
import ctypes.util
import os
from typing import Optional

DDPM_OK = 0
DDPM_USAGE = 2
DDPM_CONFIG = 3
DDPM_FILE = 4
DDPM_MEMORY = 5
DDPM_DEVICE = 6
DDPM_NONFINITE = 7
DDPM_PEER = 8
DDPM_FULL = 9
DDPM_TIMEOUT = 10
DDPM_BUG = 70
DDPM_STOPPED = 75

ddpm_log_callback = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p)
ddpm_allocate_callback = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_size_t)
ddpm_release_callback = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_size_t)
ddpm_progress_callback = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_size_t, c.c_size_t, c.c_int32,
                                     c.c_int32)
ddpm_preview_callback = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_size_t, c.c_size_t, c.c_int32,
                                    c.c_int32, c.c_void_p)
ddpm_done_callback = c.CFUNCTYPE(None, c.c_void_p, c.c_int, c.c_char_p)


class Sized(c.Structure):
    """Sets struct_size; other fields are 0 unless given."""

    def __init__(self, **fields):
        super().__init__(struct_size=c.sizeof(type(self)), **fields)


class ddpm_model_options(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("threads", c.c_int32), ("device", c.c_char_p),
        ("precision", c.c_char_p), ("batch_invariant", c.c_int32), ("log", ddpm_log_callback),
        ("user", c.c_void_p), ("allocate", ddpm_allocate_callback),
        ("release", ddpm_release_callback),
    ]


class ddpm_model_files(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("unet_config", c.c_char_p),
        ("scheduler_config", c.c_char_p), ("weights", c.c_void_p), ("weights_size", c.c_size_t),
    ]


class ddpm_info(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("height", c.c_int32), ("width", c.c_int32),
        ("channels", c.c_int32), ("output_channels", c.c_int32), ("timesteps", c.c_int32),
        ("classes", c.c_int32), ("parameters", c.c_int64), ("multiply_adds", c.c_int64),
        ("null_label", c.c_int32),
    ]


class ddpm_sampler_options(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("sampler", c.c_char_p),
        ("spacing", c.c_char_p), ("eta", c.c_double), ("steps", c.c_int32),
        ("preview_every", c.c_int32), ("progress", ddpm_progress_callback),
        ("preview", ddpm_preview_callback), ("user", c.c_void_p), ("guidance", c.c_double),
    ]


class ddpm_sampler_info(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("steps", c.c_int32),
        ("image_size", c.c_size_t), ("device_bytes", c.c_size_t),
    ]


class ddpm_sample_task(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("on_device", c.c_int32), ("seed", c.c_uint64),
        ("first", c.c_uint64), ("n", c.c_size_t), ("labels", c.c_void_p), ("x_T", c.c_void_p),
        ("bytes", c.c_void_p), ("floats", c.c_void_p), ("stream", c.c_void_p),
        ("seeds", c.c_void_p), ("guidance", c.c_double),
    ]


class ddpm_pool_options(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("queue_size", c.c_size_t),
        ("guidance", c.c_double),
    ]


class ddpm_pool_request(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("steps", c.c_int32), ("sampler", c.c_char_p),
        ("spacing", c.c_char_p), ("eta", c.c_double), ("seed", c.c_uint64),
        ("first", c.c_uint64), ("n", c.c_size_t), ("seeds", c.c_void_p),
        ("labels", c.c_void_p), ("x_T", c.c_void_p), ("bytes", c.c_void_p),
        ("floats", c.c_void_p), ("timeout", c.c_double), ("done", ddpm_done_callback),
        ("user", c.c_void_p), ("guidance", c.c_double), ("on_device", c.c_int32),
    ]


class ddpm_pool_info(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("queue_size", c.c_size_t),
        ("running", c.c_size_t), ("waiting", c.c_size_t), ("images", c.c_uint64),
        ("steps", c.c_uint64), ("image_size", c.c_size_t), ("device_bytes", c.c_size_t),
    ]


class ddpm_train_options(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("flip", c.c_int32),
        ("learning_rate", c.c_float), ("warmup_steps", c.c_int64), ("grad_clip", c.c_float),
        ("ema_decay", c.c_double), ("seed", c.c_uint64),
    ]


class ddpm_train_state(Sized):
    _fields_ = [
        ("struct_size", c.c_uint32), ("nonfinite", c.c_uint32), ("step", c.c_uint64),
        ("loss_sum", c.c_double), ("loss", c.c_float), ("grad_norm", c.c_float),
        ("learning_rate", c.c_float),
    ]


_HANDLE, _POINTER, _TEXT, _STATUS = c.c_void_p, c.c_void_p, c.c_char_p, c.c_int
_OUT = c.POINTER(c.c_void_p)

# name: (result, arguments)
FUNCTIONS = {
    "ddpm_version": (_TEXT, []),
    "ddpm_status_string": (_TEXT, [_STATUS]),
    "ddpm_last_error": (_TEXT, []),
    "ddpm_sampler_last_error": (_TEXT, [_HANDLE]),
    "ddpm_session_last_error": (_TEXT, [_HANDLE]),
    "ddpm_model_load": (_STATUS, [_TEXT, c.POINTER(ddpm_model_options), _OUT]),
    "ddpm_model_load_memory": (_STATUS, [c.POINTER(ddpm_model_files),
                                         c.POINTER(ddpm_model_options), _OUT]),
    "ddpm_model_destroy": (None, [_HANDLE]),
    "ddpm_get_info": (_STATUS, [_HANDLE, c.POINTER(ddpm_info)]),
    "ddpm_sampler_create": (_STATUS, [_HANDLE, c.POINTER(ddpm_sampler_options), _OUT]),
    "ddpm_sampler_destroy": (None, [_HANDLE]),
    "ddpm_sampler_get_info": (_STATUS, [_HANDLE, c.POINTER(ddpm_sampler_info)]),
    "ddpm_sample": (_STATUS, [_HANDLE, c.c_uint64, c.c_uint64, c.c_size_t, _POINTER]),
    "ddpm_sample_float": (_STATUS, [_HANDLE, c.c_uint64, c.c_uint64, c.c_size_t, _POINTER]),
    "ddpm_sample_device": (_STATUS, [_HANDLE, c.c_uint64, c.c_uint64, c.c_size_t, _POINTER,
                                     _POINTER]),
    "ddpm_sample_run": (_STATUS, [_HANDLE, c.POINTER(ddpm_sample_task)]),
    "ddpm_sampler_wait": (_STATUS, [_HANDLE]),
    "ddpm_cancel": (None, [_HANDLE]),
    "ddpm_pool_create": (_STATUS, [_HANDLE, c.POINTER(ddpm_pool_options), _OUT]),
    "ddpm_pool_destroy": (None, [_HANDLE]),
    "ddpm_pool_submit": (_STATUS, [_HANDLE, c.POINTER(ddpm_pool_request), _OUT]),
    "ddpm_ticket_wait": (_STATUS, [_HANDLE]),
    "ddpm_ticket_done": (c.c_int, [_HANDLE]),
    "ddpm_ticket_cancel": (None, [_HANDLE]),
    "ddpm_ticket_destroy": (None, [_HANDLE]),
    "ddpm_pool_drain": (_STATUS, [_HANDLE]),
    "ddpm_pool_get_info": (_STATUS, [_HANDLE, c.POINTER(ddpm_pool_info)]),
    "ddpm_session_destroy": (None, [_HANDLE]),
    "ddpm_session_bytes": (_STATUS, [_HANDLE, c.POINTER(c.c_size_t)]),
    "ddpm_wait": (_STATUS, [_HANDLE]),
    "ddpm_forward_open": (_STATUS, [_HANDLE, c.c_int, _OUT]),
    "ddpm_forward": (_STATUS, [_HANDLE, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "ddpm_train_open": (_STATUS, [_HANDLE, c.POINTER(ddpm_train_options), _POINTER, _POINTER,
                                  c.c_int64, _OUT]),
    "ddpm_train_steps": (_STATUS, [_HANDLE, c.c_int, _POINTER]),
    "ddpm_train_get_state": (_STATUS, [_HANDLE, c.POINTER(ddpm_train_state)]),
    "ddpm_train_save": (_STATUS, [_HANDLE, _TEXT]),
    "ddpm_sample_open": (_STATUS, [_HANDLE, c.c_int, _TEXT, c.c_int, c.c_double, _OUT]),
    "ddpm_sample_chain": (_STATUS, [_HANDLE, c.POINTER(c.c_int)]),
    "ddpm_sample_start": (_STATUS, [_HANDLE, c.c_uint64, c.c_uint64, _POINTER, _POINTER]),
    "ddpm_sample_steps": (_STATUS, [_HANDLE, c.c_int, _POINTER, _POINTER]),
}


def load_library(path: Optional[str] = None) -> c.CDLL:
    """libddpm.so with the prototypes set: `path`, $DDPM_LIBRARY, or the system's."""
    name = path or os.environ.get("DDPM_LIBRARY") or ctypes.util.find_library("ddpm")
    if name is None:
        raise OSError("libddpm.so is not installed where the loader looks: set DDPM_LIBRARY to "
                      "its path, e.g. build/libddpm.so")
    library = c.CDLL(name)
    for function, (result, arguments) in FUNCTIONS.items():
        f = getattr(library, function)
        f.restype, f.argtypes = result, arguments
    return library
