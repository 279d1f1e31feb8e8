"""Our side of pytorch_peer.py: a process without PyTorch that runs one work by libddpm.so.

On the CPU each step is timed; on a GPU a whole round, from its first launch until it is done.
"""

import argparse
import os
import time

from ddpm_library import Model
from peer_worker import hwm_bytes, serve


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--model", required=True, help="model folder, with images.u8 in it")
    parser.add_argument("--work", required=True, choices=("train", "sample"))
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def make_training(model, info, folder, batch):
    with open(os.path.join(folder, "images.u8"), "rb") as file:
        images = file.read()
    count = len(images) // (info.height * info.width * info.channels)
    session = model.open_training(batch, images, count)
    return session, lambda steps: model.train(session, steps)


def make_sampling(model, info, batch):
    session = model.open_sampling(batch)
    left = 0

    def advance(steps):
        nonlocal left
        if steps > left:
            model.start_chain(session)
            left = info.timesteps
        model.sample(session, steps)
        left -= steps

    return session, advance


def main():
    a = parse_arguments()
    model = Model(a.library, a.model, a.device, a.precision, a.threads)
    info = model.info()
    if a.work == "train":
        session, advance = make_training(model, info, a.model, a.batch_size)
    else:
        session, advance = make_sampling(model, info, a.batch_size)

    def run(steps):
        at_once = steps if a.device == "cuda" else 1
        ms = []
        for _ in range(steps // at_once):
            start = time.perf_counter()
            advance(at_once)  # returns when it is done
            ms.append((time.perf_counter() - start) * 1e3 / at_once)
        return ms

    def peak_bytes():
        model.wait(session)  # fails if something was not finite
        return model.bytes(session) if a.device == "cuda" else hwm_bytes()

    serve(a.device, run, peak_bytes, {"multiply_adds": info.multiply_adds})


if __name__ == "__main__":
    main()
