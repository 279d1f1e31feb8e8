"""Samples images into an array file: sample.py MODEL OUT.npy [--num N] [--steps K]

The package: pip install tools/python; it finds libddpm.so by $DDPM_LIBRARY or where it is installed.
"""

import argparse
import sys

import numpy as np

import ddpm

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--num", type=int, default=4)
parser.add_argument("--steps", type=int, default=50)
arguments = parser.parse_args()


def progress(done, images, step, steps):
    print(f"images {done} to {done + images - 1}: step {step} of {steps}", file=sys.stderr)


model = ddpm.Model(arguments.model)
sampler = ddpm.Sampler(model, sampler="ddim", steps=arguments.steps, progress=progress)
images = sampler.sample(seed=0, first=0, n=arguments.num)  # uint8 (N, H, W, C)
np.save(arguments.out, images)
# A PyTorch tensor over the same memory would be torch.from_dlpack(images).
