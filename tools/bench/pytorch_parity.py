"""The parity check of pytorch_peer.py: the same weights in diffusers and in the program.

Saves a UNet2DModel with PyTorch's initial weights (nowhere zero) as a pipeline folder, has the
program compute the network's output and the gradient of every weight, and compares both with
diffusers in float64. PyTorch's own float32 is measured beside it.
"""

import argparse
import json
import os
import platform
import subprocess

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pytorch_work import hwm_bytes
from safetensors.torch import load_file, save_file

PAPER = {
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
PRESETS = {
    "tiny": {
        **PAPER,
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    },
    "cifar10": {
        **PAPER,
        "sample_size": 32,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
    },
    "celebahq256": {
        **PAPER,
        "sample_size": 256,
        "layers_per_block": 2,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
}


def make_pipeline(preset, folder):
    torch.manual_seed(0)
    unet = UNet2DModel(**PRESETS[preset])
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return unet


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def gradient_error(gradients, truth):
    """The largest |dg_k| / (|g_k| + 0.001 |g|), and its weight: some are zero but for rounding."""
    total = torch.stack([g.norm() for g in truth.values()]).norm()
    if missing := truth.keys() ^ (gradients.keys() - {"loss"}):
        raise SystemExit(f"gradients differ in their names: {sorted(missing)[:3]}")
    return max(
        (((gradients[k].double() - g).norm() / (g.norm() + 1e-3 * total)).item(), k)
        for k, g in truth.items()
    )


def compute(unet, inputs, dtype):
    """Output and gradients of diffusers' network; dropout off."""
    unet = unet.to(dtype).eval()
    unet.zero_grad()
    sample, timestep = inputs["sample"].to(dtype), inputs["timestep"]
    with torch.no_grad():
        output = unet(sample, timestep, return_dict=False)[0]
    x0, noise = inputs["x0"].to(dtype), inputs["noise"].to(dtype)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    ab = alpha_bar[timestep].view(-1, 1, 1, 1)
    x = ab.sqrt().to(dtype) * x0 + (1 - ab).sqrt().to(dtype) * noise
    loss = torch.nn.functional.mse_loss(unet(x, timestep, return_dict=False)[0], noise)
    loss.backward()
    return output, loss.detach(), {k: w.grad.clone() for k, w in unet.named_parameters()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddpm", required=True)
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--folder", required=True, help="the pipeline folder to make")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--json", required=True, help="where to write the result")
    arguments = parser.parse_args()
    library_bytes = hwm_bytes()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)

    unet = make_pipeline(arguments.preset, arguments.folder)
    size = unet.config.sample_size
    shape = (2, 3, size, size)
    inputs = {name: torch.randn(shape) for name in ("sample", "x0", "noise")}
    inputs["timestep"] = torch.tensor([17, 940])
    names = ("in", "forward", "gradient")
    paths = {k: os.path.join(arguments.folder, k + ".safetensors") for k in names}
    ours = {}
    for what, names in (("forward", ("sample",)), ("gradient", ("x0", "noise"))):
        save_file({k: inputs[k] for k in (*names, "timestep")}, paths["in"])
        command = [arguments.ddpm, "probe", what, "--model", arguments.folder, "--device", "cpu"]
        command += ["--threads", str(arguments.threads)]
        command += ["--input", paths["in"], "--out", paths[what]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours[what] = load_file(paths[what])

    single = compute(unet, inputs, torch.float32)
    double = compute(unet, inputs, torch.float64)
    error, weight = gradient_error(ours["gradient"], double[2])
    result = {
        "forward": relative(ours["forward"]["model_output"], double[0]),
        "loss": relative(ours["gradient"]["loss"].reshape(()), double[1]),
        "gradient": error,
        "gradient_weight": weight,
        "pytorch_forward": relative(single[0], double[0]),
        "pytorch_loss": relative(single[1], double[1]),
        "pytorch_gradient": gradient_error(single[2], double[2])[0],
        "library_bytes": library_bytes,
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, oneDNN in PyTorch: {onednn_version()}",
    }
    with open(arguments.json, "w") as file:
        json.dump(result, file)


def onednn_version():
    for line in torch.__config__.show().splitlines():
        if "MKL-DNN" in line:
            return line.split("MKL-DNN")[1].split("(")[0].strip()
    return "none"


if __name__ == "__main__":
    main()
