"""Samples DDPM U-Nets with libddpm.so.

    import ddpm
    model = ddpm.Model("runs/quickstart")
    images = ddpm.Sampler(model, sampler="ddim", steps=50).sample(seed=0, first=0, n=16)

Threads may share a Model and a Pool; each needs a Sampler of its own. What is not said here is said in ddpm.h,
under the same names.
"""

import ctypes as c
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np

from . import dlpack
from . import header

__all__ = ["Error", "Info", "Model", "Pool", "PoolInfo", "Sampler", "SamplerInfo", "Ticket",
           "version"]

_library: Optional[c.CDLL] = None


def _lib() -> c.CDLL:
    global _library
    if _library is None:
        _library = header.load_library()
    return _library


class Error(RuntimeError):
    """A call that failed; `status` is one of ddpm.header.DDPM_*."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def _check(status: int) -> None:
    if status != header.DDPM_OK:
        raise Error(status, _lib().ddpm_last_error().decode())


def _text(value: Optional[str]) -> Optional[bytes]:
    return None if value is None else value.encode()


def version() -> str:
    return _lib().ddpm_version().decode()


class Info(NamedTuple):
    height: int
    width: int
    channels: int
    output_channels: int
    timesteps: int
    classes: int
    parameters: int
    multiply_adds: int
    null_label: int


class SamplerInfo(NamedTuple):
    batch_size: int
    steps: int
    image_size: int
    device_bytes: int


class PoolInfo(NamedTuple):
    batch_size: int
    queue_size: int
    running: int
    waiting: int
    images: int
    steps: int
    image_size: int
    device_bytes: int


def _values(kind: Any, struct: c.Structure) -> Any:
    return kind(*(getattr(struct, name) for name in kind._fields))


class Model:
    """ddpm_model_load. Never changes; threads may share it."""

    def __init__(self, folder: str, *, device: Optional[str] = None,
                 precision: Optional[str] = None, threads: int = 0,
                 batch_invariant: bool = False, log: Optional[Callable[[str], None]] = None):
        options = self._options(device, precision, threads, batch_invariant, log)
        self._open("ddpm_model_load", folder.encode(), c.byref(options))

    @classmethod
    def load_memory(cls, unet_config: str, weights: bytes, scheduler_config: Optional[str] = None,
                    *, device: Optional[str] = None, precision: Optional[str] = None,
                    threads: int = 0, batch_invariant: bool = False,
                    log: Optional[Callable[[str], None]] = None) -> "Model":
        """ddpm_model_load_memory."""
        self = cls.__new__(cls)
        options = self._options(device, precision, threads, batch_invariant, log)
        files = header.ddpm_model_files(
            unet_config=unet_config.encode(), scheduler_config=_text(scheduler_config),
            weights=c.cast(c.c_char_p(weights), c.c_void_p), weights_size=len(weights))
        self._open("ddpm_model_load_memory", c.byref(files), c.byref(options))
        return self

    def _options(self, device, precision, threads, batch_invariant, log):
        # Samplers call it too, so it lives as long as the model.
        self._log = header.ddpm_log_callback()
        if log is not None:
            self._log = header.ddpm_log_callback(lambda _, line: log(line.decode()))
        return header.ddpm_model_options(
            threads=threads, device=_text(device), precision=_text(precision),
            batch_invariant=int(batch_invariant), log=self._log)

    def _open(self, name, *arguments):
        handle = c.c_void_p()
        _check(getattr(_lib(), name)(*arguments, c.byref(handle)))
        self.handle = handle
        info = header.ddpm_info()
        _check(_lib().ddpm_get_info(handle, c.byref(info)))
        self.info: Info = _values(Info, info)

    def _shape(self, n: int):
        if n < 0:
            raise ValueError(f"n: {n}")
        return (n, self.info.height, self.info.width, self.info.channels)

    def _require(self, t: dlpack.Tensor, name: str, n: int, dtypes: Sequence[str]) -> None:
        n, h, w, channels = self._shape(n)
        dense = dlpack.dense_strides((n, h, w, channels))
        channels_last = (dense[0], dense[3], dense[1], dense[2])
        last, first = (n, h, w, channels), (n, channels, h, w)
        # A stride of a size of 1 says nothing.
        def lies(shape, strides):
            return t.shape == shape and all(
                a == b or size == 1 for a, b, size in zip(t.strides, strides, shape))
        if t.dtype not in dtypes:
            raise ValueError(f"{name}: {t.dtype}, need {' or '.join(dtypes)}")
        if not (lies(last, dense) or lies(first, channels_last)):
            raise ValueError(f"{name}: shape {t.shape} with strides {t.strides}, need {last}, or "
                             f"{first} in channels_last memory")

    def __del__(self):
        if getattr(self, "handle", None):
            _lib().ddpm_model_destroy(self.handle)


def _each(name: str, values: Any, dtype: Any, n: int) -> Optional[np.ndarray]:
    if values is None:
        return None
    array = np.ascontiguousarray(values, dtype)
    if array.shape != (n,):
        raise ValueError(f"{name}: shape {array.shape}, need ({n},)")
    return array


def _address(array: Optional[np.ndarray]) -> Optional[int]:
    return None if array is None else array.ctypes.data


class Pool:
    """ddpm_pool_create. For any thread: what is asked for runs together in one batch."""

    def __init__(self, model: Model, *, batch_size: int = 0, queue_size: int = 0,
                 guidance: float = 0.0):
        self.model = model
        options = header.ddpm_pool_options(batch_size=batch_size, queue_size=queue_size,
                                           guidance=guidance)
        handle = c.c_void_p()
        _check(_lib().ddpm_pool_create(model.handle, c.byref(options), c.byref(handle)))
        self.handle = handle

    def __del__(self):
        if getattr(self, "handle", None):
            _lib().ddpm_pool_destroy(self.handle)

    def submit(self, n: int = 1, *, seed: int = 0, first: int = 0, sampler: Optional[str] = None,
               spacing: Optional[str] = None, eta: float = 0.0, steps: int = 0,
               seeds: Optional[Sequence[int]] = None, labels: Optional[Sequence[int]] = None,
               x_T: Optional[np.ndarray] = None, timeout: float = 0.0,
               dtype: Any = np.uint8, guidance: float = 0.0, out: Any = None) -> "Ticket":
        """Returns at once; Error(DDPM_FULL) where the queue has no room now. dtype: uint8 or
        float32, of the images (n, H, W, C). `out`: a tensor as in Sampler.sample_run to fill in
        place of them, ready now and not to be used until the request has ended."""
        shape = self.model._shape(n)
        images = np.empty(shape, dtype) if out is None else out
        to = dlpack.look(images)
        self.model._require(to, "images", n, ("uint8", "float32"))
        classes, each = _each("labels", labels, np.int32, n), _each("seeds", seeds, np.uint64, n)
        start = None if x_T is None else np.ascontiguousarray(x_T, np.float32)
        if start is not None and start.shape != shape:
            raise ValueError(f"x_T: shape {start.shape}, need {shape}")
        request = header.ddpm_pool_request(
            steps=steps, sampler=_text(sampler), spacing=_text(spacing), eta=eta, seed=seed,
            first=first, n=n, seeds=_address(each), labels=_address(classes), x_T=_address(start),
            timeout=timeout, guidance=guidance, on_device=int(to.device == dlpack.CUDA))
        setattr(request, "bytes" if to.dtype == "uint8" else "floats", to.address)
        handle = c.c_void_p()
        _check(_lib().ddpm_pool_submit(self.handle, c.byref(request), c.byref(handle)))
        return Ticket(handle, images)

    def drain(self) -> None:
        _check(_lib().ddpm_pool_drain(self.handle))

    @property
    def info(self) -> PoolInfo:
        info = header.ddpm_pool_info()
        _check(_lib().ddpm_pool_get_info(self.handle, c.byref(info)))
        return _values(PoolInfo, info)


class Ticket:
    """What Pool.submit returns. Dropping it cancels the request."""

    def __init__(self, handle: c.c_void_p, images: Any):
        self.handle, self._images = handle, images

    def __del__(self):
        _lib().ddpm_ticket_destroy(self.handle)

    def wait(self) -> Any:
        """The images, or `out`, or Error with the request's status."""
        _check(_lib().ddpm_ticket_wait(self.handle))
        return self._images

    @property
    def done(self) -> bool:
        return bool(_lib().ddpm_ticket_done(self.handle))

    def cancel(self) -> None:
        _lib().ddpm_ticket_cancel(self.handle)


class Sampler:
    """ddpm_sampler_create. For one thread at a time; cancel() is for any.

    progress(images_done, images, step, steps) and preview(images_done, images, step, steps, x0) may
    return True to stop, which raises Error(DDPM_STOPPED); what they raise comes out of the call."""

    def __init__(self, model: Model, *, batch_size: int = 0, sampler: Optional[str] = None,
                 spacing: Optional[str] = None, eta: float = 0.0, steps: int = 0,
                 preview_every: int = 0,
                 progress: Optional[Callable[[int, int, int, int], Any]] = None,
                 preview: Optional[Callable[[int, int, int, int, np.ndarray], Any]] = None,
                 guidance: float = 0.0):
        self.model = model
        self._raised: Optional[BaseException] = None
        self._callbacks = (header.ddpm_progress_callback(), header.ddpm_preview_callback())
        if progress is not None:
            call = self._guard(lambda _, *at: progress(*at))
            self._callbacks = (header.ddpm_progress_callback(call), self._callbacks[1])
        if preview is not None:
            call = self._guard(lambda _, *at: preview(*at[:4], self._x0(at[4], at[1])))
            self._callbacks = (self._callbacks[0], header.ddpm_preview_callback(call))
        options = header.ddpm_sampler_options(
            batch_size=batch_size, sampler=_text(sampler), spacing=_text(spacing), eta=eta,
            steps=steps, preview_every=preview_every, progress=self._callbacks[0],
            preview=self._callbacks[1], guidance=guidance)
        handle = c.c_void_p()
        _check(_lib().ddpm_sampler_create(model.handle, c.byref(options), c.byref(handle)))
        self.handle = handle

    def __del__(self):
        if getattr(self, "handle", None):
            _lib().ddpm_sampler_destroy(self.handle)

    @property
    def info(self) -> SamplerInfo:
        info = header.ddpm_sampler_info()
        _check(_lib().ddpm_sampler_get_info(self.handle, c.byref(info)))
        return _values(SamplerInfo, info)

    def sample(self, seed: int = 0, first: int = 0, n: int = 1) -> np.ndarray:
        """uint8 (n, H, W, C)."""
        images = np.empty(self.model._shape(n), np.uint8)
        self._call("ddpm_sample", seed, first, n, images.ctypes.data)
        return images

    def sample_float(self, seed: int = 0, first: int = 0, n: int = 1) -> np.ndarray:
        """float32 (n, H, W, C) in [-1, 1]."""
        images = np.empty(self.model._shape(n), np.float32)
        self._call("ddpm_sample_float", seed, first, n, images.ctypes.data)
        return images

    def sample_run(self, out: Any, *, seed: int = 0, first: int = 0,
                   labels: Optional[Sequence[int]] = None, x_T: Any = None,
                   stream: Optional[int] = None, seeds: Optional[Sequence[int]] = None,
                   guidance: float = 0.0) -> Any:
        """Fills `out` where it lies and returns it: a tensor of numpy, PyTorch or whatever speaks
        DLPack, uint8 or float32, (n, H, W, C) or (n, C, H, W) in channels_last memory. x_T, where
        the chains start, likewise, float32. CUDA tensors: both on the model's device; stream, a
        cudaStream_t as an integer, lets the work run in its order. Without it `out` and x_T must be
        ready, and the call returns when the images are there."""
        to = dlpack.look(out, None if stream is None else -1)
        n = to.shape[0] if to.shape else 0
        self.model._require(to, "out", n, ("uint8", "float32"))
        task = header.ddpm_sample_task(
            on_device=int(to.device == dlpack.CUDA), seed=seed, first=first, n=n, stream=stream,
            guidance=guidance)
        setattr(task, "bytes" if to.dtype == "uint8" else "floats", to.address)
        classes, each = _each("labels", labels, np.int32, n), _each("seeds", seeds, np.uint64, n)
        task.labels, task.seeds = _address(classes), _address(each)
        if x_T is not None:
            start = dlpack.look(x_T, None if stream is None else -1)
            self.model._require(start, "x_T", n, ("float32",))
            if start.device != to.device:
                raise ValueError("x_T and out lie on different devices")
            task.x_T = start.address
        self._call("ddpm_sample_run", c.byref(task))
        return out

    def sampler_wait(self) -> None:
        self._call("ddpm_sampler_wait")

    def cancel(self) -> None:
        _lib().ddpm_cancel(self.handle)

    def _x0(self, address: int, images: int) -> np.ndarray:
        shape = self.model._shape(images)
        count = int(np.prod(shape))
        return np.ctypeslib.as_array((c.c_float * count).from_address(address)).reshape(
            shape).copy()

    def _guard(self, call):
        def guarded(*arguments):
            try:
                return int(bool(call(*arguments)))
            except BaseException as e:  # an exception cannot pass through C
                self._raised = e
                return 1
        return guarded

    def _call(self, name: str, *arguments) -> None:
        status = getattr(_lib(), name)(self.handle, *arguments)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        _check(status)
