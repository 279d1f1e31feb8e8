"""libddpm.so by ctypes: as much of model/ddpm.h as the comparison needs."""

import ctypes as c


class ModelOptions(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32), ("threads", c.c_int32), ("device", c.c_char_p),
        ("precision", c.c_char_p), ("batch_invariant", c.c_int32), ("log", c.c_void_p),
        ("user", c.c_void_p),
    ]


class TrainOptions(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32), ("batch_size", c.c_int32), ("flip", c.c_int32),
        ("learning_rate", c.c_float), ("warmup_steps", c.c_int64), ("grad_clip", c.c_float),
        ("ema_decay", c.c_double), ("seed", c.c_uint64),
    ]


class Info(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32), ("height", c.c_int32), ("width", c.c_int32),
        ("channels", c.c_int32), ("output_channels", c.c_int32), ("timesteps", c.c_int32),
        ("classes", c.c_int32), ("parameters", c.c_int64), ("multiply_adds", c.c_int64),
    ]


class Model:
    """Methods raise RuntimeError with the library's text."""

    def __init__(self, library, folder, device, precision, threads):
        self.library = c.CDLL(library)
        self.library.ddpm_last_error.restype = c.c_char_p
        self.handle = c.c_void_p()
        options = ModelOptions(c.sizeof(ModelOptions), threads, device.encode(),
                               precision.encode())
        self.call("ddpm_model_load", folder.encode(), c.byref(options), c.byref(self.handle))

    def call(self, name, *arguments):
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(f"{name}: {self.library.ddpm_last_error().decode()}")

    def info(self):
        info = Info(struct_size=c.sizeof(Info))
        self.call("ddpm_get_info", self.handle, c.byref(info))
        return info

    def open_forward(self, batch):
        return self.session("ddpm_forward_open", c.c_int(batch))

    def open_training(self, batch, images, count):
        """From the folder's weights, by the paper's recipe; images: bytes (count, H, W, C)."""
        options = TrainOptions(c.sizeof(TrainOptions), batch, 1, 2e-4, 0, 1.0, 0.9999, 0)
        return self.session("ddpm_train_open", c.byref(options), images, None, c.c_int64(count))

    def open_sampling(self, batch):
        return self.session("ddpm_sample_open", c.c_int(batch), b"ddpm", c.c_int(0), c.c_double(0))

    def session(self, name, *arguments):
        handle = c.c_void_p()
        self.call(name, self.handle, *arguments, c.byref(handle))
        return handle

    def forward(self, session, sample, timestep, output, stream):
        """Addresses as integers; stream 0: the call returns when the output is there."""
        self.call("ddpm_forward", session, c.c_void_p(sample), c.c_void_p(timestep), None,
                  c.c_void_p(output), c.c_void_p(stream))

    def train(self, session, steps):
        self.call("ddpm_train_steps", session, c.c_int(steps), None)

    def start_chain(self, session):
        self.call("ddpm_sample_start", session, c.c_uint64(0), c.c_uint64(0), None, None)

    def sample(self, session, steps):
        self.call("ddpm_sample_steps", session, c.c_int(steps), None, None)

    def wait(self, session):
        self.call("ddpm_wait", session)

    def bytes(self, session):
        size = c.c_size_t()
        self.call("ddpm_session_bytes", session, c.byref(size))
        return size.value
