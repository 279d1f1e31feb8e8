"""Writes scikit-learn's 1,797 handwritten digits, real 8x8 scans, as a packed file of 32x32 images.

    pip install scikit-learn safetensors && python tools/paper/digits.py digits.safetensors

Scaled up linearly; the last 297 go to OUT-test.safetensors instead, for evaluation.
"""
import sys

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits


def scaled(images, size):
    """Linear interpolation between pixel centres, along both axes."""
    n = images.shape[1]
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), n - 2)
    part = at - low
    rows = images[:, low] * (1 - part)[:, None] + images[:, low + 1] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part


def main():
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".safetensors"):
        sys.exit("usage: digits.py OUT.safetensors")
    digits = load_digits()
    pixels = np.rint(scaled(digits.images, 32) * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    test = sys.argv[1].replace(".safetensors", "-test.safetensors")
    for path, part in ((sys.argv[1], slice(0, 1500)), (test, slice(1500, None))):
        save_file({"images": np.ascontiguousarray(pixels[part]),
                   "labels": np.ascontiguousarray(labels[part])}, path)


if __name__ == "__main__":
    main()
