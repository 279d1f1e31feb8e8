#!/usr/bin/env python3
"""Writes philox_known_answers.txt: Philox4x32-10 and what kernels/philox.h makes of it, computed
here from the definitions, independently of the C++.

    python make_philox_known_answers.py > philox_known_answers.txt
"""

import math
import struct

PURPOSES = ["weights", "permutation", "timestep", "noise", "flip", "dropout", "sample_start",
            "sample_noise", "shapes"]
NUMBER = {name: i for i, name in enumerate(PURPOSES)}
MASK = 0xFFFFFFFF

# counter, key, words: the published vectors of Random123 (Salmon et al. 2011).
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# seed, sample, layer, step
ADDRESSES = [
    (0, 0, 0, 0),
    (1, 0, 0, 1),
    (0x123456789ABCDEF0, 127, 0, 799999),
    (0xFFFFFFFFFFFFFFFF, 2**40 - 1, 65535, 2**32 - 1),
    (42, 5_000_000_000, 3, 999),
]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def words(purpose, seed, sample, layer, step, block):
    high = (sample >> 32 & 0xFF) << 24 | NUMBER[purpose] << 16 | layer
    return philox([block, sample & MASK, high, step], [seed & MASK, seed >> 32])


def normals(w):
    u = [f32(f32(x) * 2.0**-32 + 2.0**-33) for x in w]
    out = []
    for u0, u1 in (u[0:2], u[2:4]):
        radius = math.sqrt(-2 * math.log(u0))
        out += [radius * math.cos(2 * math.pi * u1), radius * math.sin(2 * math.pi * u1)]
    return out


def permute(index, count, seed, epoch):
    if count <= 1:
        return 0
    bits = 1
    while 4**bits < count:
        bits += 1
    while True:
        left, right = index >> bits, index % 2**bits
        for layer in range(12):
            f = words("permutation", seed, 0, layer, epoch, right)[0] % 2**bits
            left, right = right, left ^ f
        index = left << bits | right
        if index < count:
            return index


def hexes(w):
    return " ".join(f"{x:08x}" for x in w)


def main():
    print("# Made by make_philox_known_answers.py. An address is: seed sample layer step, decimal.")
    print("# philox: 4 counter words, 2 key words, 4 words")
    for counter, key, expected in PUBLISHED:
        split = [[int(x, 16) for x in text.split()] for text in (counter, key, expected)]
        assert philox(*split[:2]) == split[2]
        print("philox", counter, key, expected)
    print("# block: purpose number, address, block, 4 words")
    for purpose in PURPOSES:
        for address in ADDRESSES:
            for block in (0, 767, MASK):
                w = words(purpose, *address, block)
                print("block", NUMBER[purpose], *address, block, hexes(w))
    print("# normal: purpose number, address, block, 4 normals")
    for purpose in ("weights", "noise", "sample_start", "sample_noise"):
        for address in ADDRESSES:
            for block in range(4):
                z = normals(words(purpose, *address, block))
                print("normal", NUMBER[purpose], *address, block, *(f"{v:.12g}" for v in z))
    print("# dropout: address, block, 8 x 16 bits")
    for address in ADDRESSES:
        w = words("dropout", *address, 9)
        bits = [x >> 16 * half & 0xFFFF for x in w for half in (0, 1)]
        print("dropout", *address, 9, *(f"{x:04x}" for x in bits))
    print("# timestep: address, timesteps, t        flip: address, 0 or 1")
    for address in ADDRESSES:
        for timesteps in (1, 7, 1000, 4000):
            t = words("timestep", *address, 0)[0] * timesteps >> 32
            print("timestep", *address, timesteps, t)
        print("flip", *address, words("flip", *address, 0)[0] & 1)
    print("# permute: count, seed, epoch, index, place")
    for count in (1, 2, 3, 5, 17, 1000, 50000, 2**40):
        for seed, epoch in ((0, 0), (0, 1), (2**63 + 7, 4000000000)):
            for index in sorted({0, count // 2, count - 1}):
                print("permute", count, seed, epoch, index, permute(index, count, seed, epoch))


main()
