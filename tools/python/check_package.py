"""The package `ddpm` against ddpm.h and a model: check_package.py HEADER MODEL; $DDPM_LIBRARY.

Every function, struct, field, callback and status of the header must stand in ddpm/header.py with
the same type, and nothing else.
"""

import ctypes as c
import re
import sys
import threading

import numpy as np

import ddpm
from ddpm import dlpack, header

SCALARS = {
    "int": c.c_int, "int32_t": c.c_int32, "uint32_t": c.c_uint32, "int64_t": c.c_int64,
    "uint64_t": c.c_uint64, "size_t": c.c_size_t, "float": c.c_float, "double": c.c_double,
    "ddpm_status": c.c_int, "void": None, "char *": c.c_char_p,
}
HANDLES = {"ddpm_model", "ddpm_sampler", "ddpm_session", "ddpm_pool", "ddpm_ticket"}


def type_of(text, argument=False):
    """The ctypes type of a C declaration without its name."""
    text = " ".join(text.replace("const", " ").replace("*", " * ").split())
    if text in SCALARS:
        return SCALARS[text]
    base, stars = text.split(" ")[0], text.count("*")
    if stars == 0:
        return getattr(header, base)
    if base in HANDLES:
        return c.c_void_p if stars == 1 else c.POINTER(c.c_void_p)
    if base.startswith("ddpm_"):
        return c.POINTER(getattr(header, base))
    # Scalars that come out, and arrays.
    return c.POINTER(SCALARS[base]) if argument and base in ("size_t", "int") else c.c_void_p


def split_name(declaration):
    """'const float* x' -> ('const float*', 'x')"""
    return re.fullmatch(r"\s*(.*?)(\w+)\s*", declaration, re.S).groups()


def check_header(path):
    text = re.sub(r"/\*.*?\*/", "", open(path).read(), flags=re.S)
    text = re.sub(r"^#.*$", "", text, flags=re.M)

    functions = {}
    for result, name, arguments in re.findall(r"DDPM_API ([^;(]*?)(\w+)\(([^)]*)\);", text):
        types = [] if arguments.strip() == "void" else [
            type_of(split_name(a)[0], True) for a in arguments.split(",")]
        functions[name] = (type_of(result), types)
    assert functions.keys() == header.FUNCTIONS.keys(), functions.keys() ^ header.FUNCTIONS.keys()
    for name, prototype in functions.items():
        assert prototype == header.FUNCTIONS[name], (name, prototype, header.FUNCTIONS[name])

    structs = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.S):
        fields = []
        for line in body.split(";")[:-1]:
            first, *more = line.split(",")
            kind, field = split_name(first)
            fields += [(f.strip(), type_of(kind)) for f in [field, *more]]
        structs[name] = fields
    ours = {n: v for n, v in vars(header).items()
            if isinstance(v, type) and issubclass(v, header.Sized) and v is not header.Sized}
    assert structs.keys() == ours.keys(), structs.keys() ^ ours.keys()
    for name, fields in structs.items():
        assert fields == ours[name]._fields_, (name, fields, ours[name]._fields_)

    for result, name, arguments in re.findall(
            r"typedef (\w+) \(\*(\w+)\)\(([^)]*)\);", text):
        kinds = [type_of(split_name(a)[0]) for a in arguments.split(",")]
        callback = getattr(header, name)
        assert callback._restype_ == type_of(result), name
        assert list(callback._argtypes_) == kinds, (name, kinds)

    statuses = {n: int(v) for n, v in re.findall(r"(DDPM_\w+) = (\d+)", text)}
    assert statuses == {n: v for n, v in vars(header).items() if n.startswith("DDPM_")}
    print(f"header: {len(functions)} functions, {len(structs)} structs, {len(statuses)} statuses")


def fails(status, part, call):
    try:
        call()
    except ddpm.Error as e:
        assert e.status == status and part in str(e), (e.status, e)
    else:
        raise AssertionError(f"no error: {part}")


def check_model(folder):
    lines = []
    model = ddpm.Model(folder, device="cpu", threads=1, log=lines.append)
    shape = (3, model.info.height, model.info.width, model.info.channels)
    sampler = ddpm.Sampler(model, batch_size=2, sampler="ddim", steps=4)
    assert len(lines) == 2 and "4 steps" in lines[1], lines
    assert sampler.info.steps == 4 and sampler.info.image_size == np.prod(shape[1:])
    floats, bytes_ = sampler.sample_float(5, 7, 3), sampler.sample(5, 7, 3)
    assert floats.shape == shape and floats.dtype == np.float32 and floats.std() > 0.1
    expected = np.floor(np.clip((floats + np.float32(1)) * np.float32(127.5), 0, 255) +
                        np.float32(0.5)).astype(np.uint8)
    assert (bytes_ == expected).all()
    print("arrays: ok")

    # Tensors of others: in place, whichever of the two layouts they say.
    out = np.full(shape, -7, np.float32)
    assert sampler.sample_run(out, seed=5, first=7) is out and (out == floats).all()
    memory = np.full(shape, 7, np.uint8)
    sampler.sample_run(memory.transpose(0, 3, 1, 2), seed=5, first=7)
    assert (memory == bytes_).all()
    at = dlpack.look(memory[1:])
    assert at.address == memory.ctypes.data + memory[0].size and at.dtype == "uint8"
    for bad in (np.empty(shape, np.float64), np.empty(shape[1:], np.float32),
                np.empty((3, shape[3], *shape[1:3]), np.float32),
                np.empty((6, *shape[1:]), np.float32)[::2]):
        try:
            sampler.sample_run(bad)
        except ValueError:
            continue
        raise AssertionError(f"accepted: {bad.shape} {bad.strides} {bad.dtype}")
    start = np.random.default_rng(0).standard_normal(shape, np.float32)
    first = sampler.sample_run(np.empty(shape, np.float32), seed=1, x_T=start)
    assert (first == sampler.sample_run(np.empty(shape, np.float32), seed=2, x_T=start)).all()
    print("dlpack: ok")

    seeds = sampler.sample_run(np.empty(shape, np.uint8), first=7, seeds=[5, 6, 5])
    assert (seeds[0] == bytes_[0]).all() and (seeds[2] == bytes_[0]).all()
    assert (seeds[1] == sampler.sample(6, 7, 1)[0]).all()
    pool = ddpm.Pool(model, batch_size=2, queue_size=4)
    tickets = [pool.submit(3, seed=5, first=7, sampler="ddim", steps=4),
               pool.submit(1, seed=6, first=7, sampler="ddim", steps=4, dtype=np.float32)]
    fails(header.DDPM_USAGE, "queue_size 4", lambda: pool.submit(5))
    assert (tickets[0].wait() == bytes_).all()
    assert (tickets[1].wait() == sampler.sample_float(6, 7, 1)).all() and tickets[1].done
    own = np.full(shape, 7, np.uint8).transpose(0, 3, 1, 2)  # as PyTorch says channels_last
    assert pool.submit(3, seed=5, first=7, sampler="ddim", steps=4, out=own).wait() is own
    assert (own.transpose(0, 2, 3, 1) == bytes_).all()
    for bad in (np.empty(shape, np.float64), np.empty(shape[1:], np.uint8)):
        try:
            pool.submit(3, out=bad)
        except ValueError:
            continue
        raise AssertionError(f"accepted: {bad.shape} {bad.dtype}")
    late = pool.submit(1, steps=1000, timeout=1e-9)
    fails(header.DDPM_TIMEOUT, "timeout", late.wait)
    endless = pool.submit(1, steps=1000)
    endless.cancel()
    fails(header.DDPM_STOPPED, "ddpm_ticket_cancel", endless.wait)
    pool.drain()
    assert pool.info.images == 7 and pool.info.running == 0, pool.info
    fails(header.DDPM_STOPPED, "no more requests", lambda: pool.submit(1))
    print("pool: ok")

    fails(header.DDPM_CONFIG, "does not exist", lambda: ddpm.Model(folder + "/nowhere"))
    fails(header.DDPM_USAGE, "euler", lambda: ddpm.Sampler(model, sampler="euler"))
    fails(header.DDPM_USAGE, "no classes", lambda: sampler.sample_run(out, labels=[0, 0, 0]))
    guided = "guidance 2: the model has no classes"
    fails(header.DDPM_USAGE, guided, lambda: ddpm.Sampler(model, guidance=2))
    fails(header.DDPM_USAGE, guided, lambda: ddpm.Pool(model, guidance=2))
    fails(header.DDPM_USAGE, "not guided", lambda: sampler.sample_run(out, guidance=2))
    fails(header.DDPM_USAGE, "not guided", lambda: ddpm.Pool(model).submit(guidance=2))
    assert model.info.null_label == -1
    sampler.cancel()
    fails(header.DDPM_STOPPED, "ddpm_cancel", lambda: sampler.sample(0, 0, 1))

    seen = []
    watched = ddpm.Sampler(model, batch_size=3, sampler="ddim", steps=4, preview_every=2,
                           progress=lambda *at: seen.append(at),
                           preview=lambda *at: seen.append(at))
    again = watched.sample_float(5, 7, 3)
    assert [at[2] for at in seen] == [1, 2, 2, 3, 4, 4], seen
    assert (np.clip(seen[-1][4], -1, 1) == again).all()

    def stop(*at):
        raise KeyError(at[2])
    try:
        ddpm.Sampler(model, steps=4, progress=stop).sample(0, 0, 1)
        raise AssertionError("the callback's exception is lost")
    except KeyError as e:
        assert e.args == (1,)
    print("errors and callbacks: ok")

    results = [None] * 4

    def work(k):
        results[k] = ddpm.Sampler(model, batch_size=2, sampler="ddim", steps=4).sample(5, 7, 3)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((r == bytes_).all() for r in results)
    print("threads: ok")


check_header(sys.argv[1])
check_model(sys.argv[2])
assert ddpm.version() == re.search(r'DDPM_VERSION "(.*)"', open(sys.argv[1]).read())[1]
