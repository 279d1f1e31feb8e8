"""Counts how many sampled images are whole discs, squares or triangles in two plain colours.

    build/ddpm sample --model runs/quickstart --out samples.npz --num 256
    python tools/python/count_shapes.py samples.npz
    python tools/python/count_shapes.py --calibrate

Each image is fitted by each kind over place, size and two colours (least squares on covered parts
of pixels). Its error is the fit's RMSE over the contrast of the two colours: about the square root
of the part of the image that is filled wrongly, so LIMIT allows 2.5 pixels of 256, noise included.
--calibrate shows the errors of drawn shapes and of bent ones. Needs numpy.
"""

import argparse

import numpy as np

KINDS = ("disc", "square", "triangle")
LIMIT = 0.1
STRIPS = 8  # per row of pixels, each as wide as at its middle


def cover(kind, x0, y0, size, n, shear=0.0):
    """Covered part of the pixels of n x n images, as (..., n, n); arguments broadcast.

    (x0, y0) is the middle of the bounding box. The sizes of one value look equally large: the
    radius of a disc, half a side of the others times 0.9 and 1.15, as in engine/shapes.cpp.
    """
    x0, y0, size, shear = (np.asarray(v, float)[..., None] for v in (x0, y0, size, shear))
    radius = size * (1.0, 0.9, 1.15)[kind]
    half_height = radius * (1.0, 1.0, np.sqrt(0.75))[kind]
    edges = np.arange(n * STRIPS + 1) / STRIPS
    low = np.maximum(edges[:-1], y0 - half_height)
    high = np.minimum(edges[1:], y0 + half_height)
    y = ((low + high) / 2 - y0) / half_height  # -1 at the top, 1 at the bottom
    half = radius * (np.sqrt(np.maximum(0, 1 - y * y)), np.ones_like(y), (1 + y) / 2)[kind]
    middle = x0 - shear * y
    pixels = np.arange(n)
    left, right = (middle - half)[..., None], (middle + half)[..., None]
    width = np.clip(right - pixels, 0, 1) - np.clip(left - pixels, 0, 1)
    strips = np.maximum(0, high - low)[..., None] * width
    return strips.reshape(*strips.shape[:-2], n, STRIPS, n).sum(-2)


def errors(image, covers):
    """The relative error of the best two colours for each of the covers, (K,) from (K, n, n)."""
    c = covers.reshape(len(covers), -1)
    x = image.reshape(-1, image.shape[-1])
    c = c - c.mean(1, keepdims=True)
    x = x - x.mean(0)
    energy = np.maximum((c * c).sum(1), 1e-9)
    contrast2 = ((c @ x / energy[:, None]) ** 2).sum(1)
    residual2 = np.maximum(0, (x * x).sum() - contrast2 * energy)
    return np.sqrt(residual2 / c.shape[1] / np.maximum(contrast2, 1e-9))


def product(*axes):
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def grid(n):
    """Places and sizes to start from, in columns."""
    unit = n / 16
    places = np.arange(4 * unit, 12.1 * unit, 0.75 * unit)
    return product(places, places, np.arange(4, 7) * unit)


def fit(image, starts, covers):
    """(error, kind) of the best fit."""
    n = len(image)
    around = product(*[(-1, 0, 1)] * 3)
    best = []
    for kind in range(len(KINDS)):
        error = errors(image, covers[kind])
        at, lowest, step = starts[np.argmin(error)], error.min(), n / 32
        while step > n / 1000:
            near = np.maximum(at + step * around, n / 8)
            error = errors(image, cover(kind, *near.T, n))
            if error.min() < lowest:
                at, lowest = near[np.argmin(error)], error.min()
            else:
                step /= 2
        best.append((lowest, kind))
    return min(best)


def fit_all(images):
    starts = grid(images.shape[1])
    covers = [cover(kind, *starts.T, images.shape[1]) for kind in range(len(KINDS))]
    error, kind = zip(*(fit(image.astype(float), starts, covers) for image in images))
    return np.array(error), np.array(kind)


def calibrate(count=100, n=16):
    """Errors of drawn shapes, and of bent ones that an eye sees as wrong."""
    random = np.random.default_rng(0)

    def draw(bend):
        images = []
        for i in range(count):
            kind, size = i % 3, random.uniform(4.5, 6.3)
            place = random.uniform(7.2, 8.8, 2)
            c = bend(kind, *place, size)
            dark, light = random.uniform(0, 100, 3), random.uniform(155, 255, 3)
            back, front = (dark, light) if i % 2 else (light, dark)
            images.append(np.floor(back + (front - back) * c[..., None] + 0.5))
        return np.stack(images)

    def notch(*a):
        c = cover(*a, n)
        y = int(a[2]) + 1
        x = np.flatnonzero(c[y] > 0.5)[0]
        c[y : y + 3, x : x + 3] = 0
        return c

    bends = {
        "drawn": lambda *a: cover(*a, n),
        "sheared by 1.5 pixels a half height": lambda *a: cover(*a, n, shear=1.5),
        # Not disc to square: at this size that is still one or the other.
        "half way to a triangle, or a disc": lambda k, *a: (
            (cover(k, *a, n) + cover(0 if k == 2 else 2, *a, n)) / 2
        ),
        "a notch of 3x3 pixels": notch,
        "lower half 2.5 pixels smaller": lambda k, x, y, s: np.where(
            np.arange(n)[:, None] < int(y), cover(k, x, y, s, n), cover(k, x, y, s - 2.5, n)
        ),
    }
    for name, bend in bends.items():
        e, _ = fit_all(draw(bend))
        right = np.sum(e < LIMIT)
        print(f"{name:36} error {e.min():.3f} to {e.max():.3f}, {right} of {count} right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", nargs="?", help=".npz of `ddpm sample`")
    parser.add_argument("--calibrate", action="store_true", help="show what LIMIT separates")
    a = parser.parse_args()
    if a.calibrate:
        return calibrate()
    if a.samples is None:
        parser.error("samples or --calibrate")
    error, kind = fit_all(np.load(a.samples)["arr_0"])
    right = error < LIMIT
    kinds = ", ".join(f"{np.sum(right & (kind == k))} {name}s" for k, name in enumerate(KINDS))
    print(f"{right.sum()} of {len(right)} right: {kinds}; median error {np.median(error):.3f}")
    print("wrong:", *np.flatnonzero(~right)[:64])


if __name__ == "__main__":
    main()
