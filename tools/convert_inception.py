"""Makes the weights file of `ddpm eval --metric fid|is` from PyTorch-FID's.

    python tools/convert_inception.py pt_inception-2015-12-05-6726825d.pth inception.safetensors

Needs torch and numpy, here and never again: ddpm reads the result by itself. Where to get the file
is written at https://github.com/mseitzer/pytorch-fid (its release fid_weights). It is Inception-v3 of
the TensorFlow graph that the score is defined by; torchvision's own weights are another network and
give other scores. Names and values stay as they are.
"""

import argparse
import hashlib
import json
import struct
import sys

import numpy as np
import torch

SHA256 = "6726825d"  # its first digits, as in the file's name
NORM = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def wanted(name):
    last = name.split(".", 1)[-1] if name.startswith("Conv2d") else name.split(".", 2)[-1]
    return name in ("fc.weight", "fc.bias") or last == "conv.weight" or last in NORM


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(values.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("out", help="FILE.safetensors")
    args = parser.parse_args()
    with open(args.source, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if not digest.startswith(SHA256):
        print(f"note: SHA-256 {digest} is not that of PyTorch-FID's file", file=sys.stderr)
    state = torch.load(args.source, map_location="cpu", weights_only=True)
    tensors = {
        name: np.ascontiguousarray(value.to(torch.float32).numpy())
        for name, value in sorted(state.items())
        if wanted(name)
    }
    if "fc.weight" not in tensors or "Mixed_7c.branch_pool.conv.weight" not in tensors:
        sys.exit(f"{args.source} is no Inception-v3 as PyTorch-FID has it")
    write_safetensors(args.out, tensors)
    print(f"{args.out}: {len(tensors)} tensors, {sum(v.size for v in tensors.values()):,} values")


if __name__ == "__main__":
    main()
