"""Draws the `images` of a safetensors file (F32 [N,C,H,W] in [-1,1]) as one PNG, eight in a row.

    python tools/python/draw_grid.py samples.safetensors samples.png

For machines where the program was built without PNG; needs numpy and Pillow.
"""

import json
import sys

import numpy
from PIL import Image

SCALE, GAP, COLUMNS = 4, 2, 8


def read_images(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        info, data = header["images"], file.read()
    begin, end = info["data_offsets"]
    return numpy.frombuffer(data[begin:end], "<f4").reshape(info["shape"])


def main():
    images = read_images(sys.argv[1])
    pixels = numpy.floor(numpy.clip((images + 1) * 127.5, 0, 255) + 0.5).astype(numpy.uint8)
    pixels = pixels.transpose(0, 2, 3, 1)[..., :3].repeat(SCALE, 1).repeat(SCALE, 2)
    count, height, width, channels = pixels.shape
    rows = -(-count // COLUMNS)
    size = (rows * (height + GAP) + GAP, COLUMNS * (width + GAP) + GAP, channels)
    grid = numpy.full(size, 255, numpy.uint8)
    for i, image in enumerate(pixels):
        y = GAP + i // COLUMNS * (height + GAP)
        x = GAP + i % COLUMNS * (width + GAP)
        grid[y : y + height, x : x + width] = image
    Image.fromarray(grid.squeeze()).save(sys.argv[2])


if __name__ == "__main__":
    main()
