"""Makes inception.safetensors and inception.json with PyTorch and numpy, in float64.

    python tests/golden/make_inception.py

Needs torch and numpy. The Inception-v3 of the FID (Szegedy et al. 2015, with the pooling of the
TensorFlow graph that the score is defined by) at 1/16 of its width, written down here once more;
weights and images come from the integer hash of README.md.
"""

import json
import os
import struct

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
DIVISOR = 16
CLASSES = 1008 // DIVISOR
SETS = {"a": 24, "b": 16}  # images of each
SPLITS = 10

layers = {}  # the shape of each convolution's weight, as it is used


def hash_uniform(name, count):
    h = 0x811C9DC5
    for byte in name.encode():
        h = (h ^ byte) * 0x01000193 & 0xFFFFFFFF
    z = (np.arange(count, dtype=np.uint64) * 0x9E3779B9 + h) & 0xFFFFFFFF
    z ^= z >> 16
    z = z * 0x85EBCA6B & 0xFFFFFFFF
    z ^= z >> 13
    z = z * 0xC2B2AE35 & 0xFFFFFFFF
    z ^= z >> 16
    return z.astype(np.float64) / 4294967296.0 - 0.5


def weight(name, shape, scale, offset=0.0):
    values = offset + hash_uniform(name, int(np.prod(shape))) * scale
    return torch.from_numpy(values.astype(np.float32).astype(np.float64)).reshape(shape)


def conv(x, name, out, kernel, stride=1, pad=(0, 0)):
    """Convolution without bias, batch norm with the stored statistics, ReLU."""
    out //= DIVISOR
    shape = (out, x.shape[1], *kernel)
    layers[name] = list(shape)
    fan_in = int(np.prod(shape[1:]))
    w = weight(name + ".conv.weight", shape, 2 * np.sqrt(6 / fan_in))
    y = F.conv2d(x, w, stride=stride, padding=pad)
    gamma = weight(name + ".bn.weight", (out,), 0.2, 1)
    beta = weight(name + ".bn.bias", (out,), 0.2)
    mean = weight(name + ".bn.running_mean", (out,), 0.2)
    var = weight(name + ".bn.running_var", (out,), 0.4, 1)
    y = (y - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 0.001)
    return F.relu(y * gamma[:, None, None] + beta[:, None, None])


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def block_a(x, m, pool):
    b1 = conv(x, m + ".branch1x1", 64, (1, 1))
    b5 = conv(x, m + ".branch5x5_1", 48, (1, 1))
    b5 = conv(b5, m + ".branch5x5_2", 64, (5, 5), pad=(2, 2))
    b3 = conv(x, m + ".branch3x3dbl_1", 64, (1, 1))
    b3 = conv(b3, m + ".branch3x3dbl_2", 96, (3, 3), pad=(1, 1))
    b3 = conv(b3, m + ".branch3x3dbl_3", 96, (3, 3), pad=(1, 1))
    bp = conv(average(x), m + ".branch_pool", pool, (1, 1))
    return torch.cat([b1, b5, b3, bp], 1)


def block_b(x, m):
    b3 = conv(x, m + ".branch3x3", 384, (3, 3), stride=2)
    bd = conv(x, m + ".branch3x3dbl_1", 64, (1, 1))
    bd = conv(bd, m + ".branch3x3dbl_2", 96, (3, 3), pad=(1, 1))
    bd = conv(bd, m + ".branch3x3dbl_3", 96, (3, 3), stride=2)
    return torch.cat([b3, bd, F.max_pool2d(x, 3, stride=2)], 1)


def block_c(x, m, c7):
    b1 = conv(x, m + ".branch1x1", 192, (1, 1))
    b7 = conv(x, m + ".branch7x7_1", c7, (1, 1))
    b7 = conv(b7, m + ".branch7x7_2", c7, (1, 7), pad=(0, 3))
    b7 = conv(b7, m + ".branch7x7_3", 192, (7, 1), pad=(3, 0))
    bd = conv(x, m + ".branch7x7dbl_1", c7, (1, 1))
    bd = conv(bd, m + ".branch7x7dbl_2", c7, (7, 1), pad=(3, 0))
    bd = conv(bd, m + ".branch7x7dbl_3", c7, (1, 7), pad=(0, 3))
    bd = conv(bd, m + ".branch7x7dbl_4", c7, (7, 1), pad=(3, 0))
    bd = conv(bd, m + ".branch7x7dbl_5", 192, (1, 7), pad=(0, 3))
    bp = conv(average(x), m + ".branch_pool", 192, (1, 1))
    return torch.cat([b1, b7, bd, bp], 1)


def block_d(x, m):
    b3 = conv(x, m + ".branch3x3_1", 192, (1, 1))
    b3 = conv(b3, m + ".branch3x3_2", 320, (3, 3), stride=2)
    b7 = conv(x, m + ".branch7x7x3_1", 192, (1, 1))
    b7 = conv(b7, m + ".branch7x7x3_2", 192, (1, 7), pad=(0, 3))
    b7 = conv(b7, m + ".branch7x7x3_3", 192, (7, 1), pad=(3, 0))
    b7 = conv(b7, m + ".branch7x7x3_4", 192, (3, 3), stride=2)
    return torch.cat([b3, b7, F.max_pool2d(x, 3, stride=2)], 1)


def block_e(x, m, pooled):
    b1 = conv(x, m + ".branch1x1", 320, (1, 1))
    b3 = conv(x, m + ".branch3x3_1", 384, (1, 1))
    b3a = conv(b3, m + ".branch3x3_2a", 384, (1, 3), pad=(0, 1))
    b3b = conv(b3, m + ".branch3x3_2b", 384, (3, 1), pad=(1, 0))
    bd = conv(x, m + ".branch3x3dbl_1", 448, (1, 1))
    bd = conv(bd, m + ".branch3x3dbl_2", 384, (3, 3), pad=(1, 1))
    bda = conv(bd, m + ".branch3x3dbl_3a", 384, (1, 3), pad=(0, 1))
    bdb = conv(bd, m + ".branch3x3dbl_3b", 384, (3, 1), pad=(1, 0))
    bp = conv(pooled, m + ".branch_pool", 192, (1, 1))
    return torch.cat([b1, b3a, b3b, bda, bdb, bp], 1)


def features(images, size):
    """Of uint8 images [N,H,W,3]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    x = 2 * x - 1
    x = conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
    x = conv(x, "Conv2d_2a_3x3", 32, (3, 3))
    x = conv(x, "Conv2d_2b_3x3", 64, (3, 3), pad=(1, 1))
    x = F.max_pool2d(x, 3, stride=2)
    x = conv(x, "Conv2d_3b_1x1", 80, (1, 1))
    x = conv(x, "Conv2d_4a_3x3", 192, (3, 3))
    x = F.max_pool2d(x, 3, stride=2)
    x = block_a(x, "Mixed_5b", 32)
    x = block_a(x, "Mixed_5c", 64)
    x = block_a(x, "Mixed_5d", 64)
    x = block_b(x, "Mixed_6a")
    x = block_c(x, "Mixed_6b", 128)
    x = block_c(x, "Mixed_6c", 160)
    x = block_c(x, "Mixed_6d", 160)
    x = block_c(x, "Mixed_6e", 192)
    x = block_d(x, "Mixed_7a")
    x = block_e(x, "Mixed_7b", average(x))
    x = block_e(x, "Mixed_7c", F.max_pool2d(x, 3, stride=1, padding=1))
    return x.mean(dim=(2, 3)).numpy()


def images_of(name, count):
    """Noise around a colour of each image's own."""
    noise = hash_uniform("input:" + name, count * 32 * 32 * 3).reshape(count, 32, 32, 3) + 0.5
    colour = hash_uniform("input:" + name + ".colour", count * 3).reshape(count, 1, 1, 3) + 0.5
    return np.floor(256 * (0.5 * noise + 0.5 * colour)).astype(np.uint8)


def frechet_distance(a, b):
    """By the eigenvalues of S1 S2, which is not symmetric."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    d = a.mean(axis=0) - b.mean(axis=0)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, 0))
    return d @ d + np.trace(s1) + np.trace(s2) - 2 * roots.sum()


def inception_score(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    scores = []
    for i in range(SPLITS):
        part = p[i * len(p) // SPLITS : (i + 1) * len(p) // SPLITS]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return np.array([np.mean(scores), np.std(scores)])


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], dtype=np.float32)
        begin = len(data)
        data += values.tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def main():
    images = {name: images_of("inception." + name, count) for name, count in SETS.items()}
    of = {name: features(x, 299) for name, x in images.items()}
    # Scaled so that the classes are told apart: the score is 1 where they are not.
    matrix = weight("fc.weight", (CLASSES, 2048 // DIVISOR), 64.0).numpy()
    logits = {name: f @ matrix.T for name, f in of.items()}
    result = {
        "a.features": of["a"],
        "b.features": of["b"],
        "a.logits": logits["a"],
        "a.inception_score": inception_score(logits["a"]),
        "fid": np.array([frechet_distance(of["a"], of["b"])]),
        "small.features": features(images["a"][:2], 75),
    }
    for name, x in images.items():
        print(name, "pixels", x[0, 0, 0], x[-1, -1, -1], "features", of[name].std(axis=0).mean())
    print("fid", result["fid"], "inception score", result["a.inception_score"])
    write_safetensors(os.path.join(HERE, "inception.safetensors"), result)
    with open(os.path.join(HERE, "inception.json"), "w") as file:
        json.dump({"classes": CLASSES, "layers": layers}, file, separators=(",", ":"), sort_keys=True)
        file.write("\n")


if __name__ == "__main__":
    main()
