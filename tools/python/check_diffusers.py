"""Checks that model folders go both ways between ddpm and diffusers, and compute the same.

    python tools/python/check_diffusers.py build/ddpm

Prints a PASS or FAIL line per check; exits with 1 if any failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

# Relative L2 error of a network's output: `fp32` is direct convolution, where both sides round at
# 1e-7 per layer; `auto` may use Winograd, which loses a digit.
LIMITS = {"fp32": 1e-5, "auto": 5e-5}

PAPER = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
# All the rest at diffusers' defaults: heads of 8, symmetric padding, cosine first.
RECTANGLE = {
    "sample_size": (16, 24),
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}


class Checker:
    def __init__(self, program, folder):
        self.program, self.folder, self.failures = program, folder, 0

    def path(self, name):
        return os.path.join(self.folder, name)

    def report(self, passed, text):
        print("PASS" if passed else "FAIL", text, flush=True)
        self.failures += not passed

    def run(self, *arguments):
        """Whether the program succeeded; if not, its last words are a failure."""
        result = subprocess.run([self.program, *arguments], capture_output=True, text=True)
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            self.report(False, f"ddpm {' '.join(arguments)}: exit {result.returncode}: {last}")
        return result.returncode == 0

    def compare_output(self, label, model, unet):
        """The program's output for the folder `model` against diffusers' `unet`."""
        size = unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, unet.config.in_channels, *size, generator=generator)
        timestep = torch.tensor([0, 500, 999])
        save_file({"sample": x, "timestep": timestep}, self.path("in.safetensors"))
        with torch.no_grad():
            truth = unet.double().eval()(x.double(), timestep, return_dict=False)[0]
        unet.float()
        for precision, limit in LIMITS.items():
            files = ("--input", self.path("in.safetensors"), "--out", self.path("out.safetensors"))
            if not self.run("probe", "forward", "--model", model, *files, "--device", "cpu",
                            "--precision", precision):
                continue
            y = load_file(self.path("out.safetensors"))["model_output"]
            same_shape = y.shape == truth.shape
            error = ((y - truth).norm() / truth.norm()).item() if same_shape else float("inf")
            self.report(error <= limit,
                        f"{label}: --precision {precision} relative error {error:.1e}, "
                        f"at most {limit:.0e}")

    def compare_samples(self, label, model, unet):
        """Ten DDIM steps from the same x_T; images in [-1, 1]."""
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10)
        size = unet.config.sample_size
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
        save_file({"x_T": x}, self.path("init.safetensors"))
        for t in scheduler.timesteps:
            with torch.no_grad():
                eps = unet.eval()(x, t, return_dict=False)[0]
            x = scheduler.step(eps, t, x).prev_sample
        out = self.path("images.safetensors")
        if not self.run("sample", "--model", model, "--init", self.path("init.safetensors"),
                        "--sampler", "ddim", "--steps", "10", "--out", out, "--device", "cpu"):
            return
        images = load_file(out)["images"]
        error = (images - x.clamp(-1, 1)).abs().max().item() if images.shape == x.shape else 9
        self.report(error <= 1 / 127.5,
                    f"{label}: ten DDIM steps differ by at most {error * 127.5:.3f} of 1/255")

    def our_checkpoint(self):
        run = self.path("run")
        # Large steps, an EMA that follows: layers that start at zero must take part.
        settings = ("--learning-rate", "0.02", "--set", "train.warmup_steps=1",
                    "--set", "train.ema_decay=0.5")
        if not self.run("train", "--data", "shapes", "--preset", "tiny", "--steps", "4",
                        "--batch-size", "8", "--out", run, "--device", "cpu", *settings):
            return
        folder = os.path.join(run, "checkpoints", "step-00000004")
        unet, info = UNet2DModel.from_pretrained(folder, subfolder="unet", output_loading_info=True)
        problems = {k: v for k, v in info.items() if v}
        self.report(not problems, "our checkpoint: diffusers finds every weight and no other: "
                    f"{problems or len(unet.state_dict())}")
        spread = unet.state_dict()["mid_block.resnets.0.conv2.weight"].std().item()
        self.report(spread > 1e-3, f"our checkpoint: conv2 has left zero, deviation {spread:.1e}")
        pipeline = DDPMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        scheduler = pipeline.scheduler.config
        known = (scheduler.beta_schedule, scheduler.variance_type, scheduler.clip_sample)
        self.report(isinstance(pipeline.scheduler, DDPMScheduler)
                    and known == ("linear", "fixed_large", True),
                    f"our checkpoint: scheduler {known}")
        images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
        self.report(images.shape == (2, 16, 16, 3), "our checkpoint: DDPMPipeline draws images")
        self.compare_output("our checkpoint, run folder", run, pipeline.unet)
        self.compare_samples("our checkpoint", folder, pipeline.unet)

    def their_folders(self):
        torch.manual_seed(0)
        unet = UNet2DModel(**PAPER)
        new, old, root = self.path("new"), self.path("old"), self.path("root")
        DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(new)
        self.compare_output("diffusers' folder", new, unet)
        self.compare_samples("diffusers' folder", new, unet)

        shutil.copytree(new, old)
        save_file({old_name(k): v for k, v in unet.state_dict().items()},
                  os.path.join(old, "unet", WEIGHTS), metadata={"format": "pt"})
        self.compare_output("attention's old names", old, unet)

        shutil.copytree(os.path.join(new, "unet"), root)
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            shutil.copy(os.path.join(new, name), root)
        self.compare_output("files at the root", root, unet)

        rectangle = UNet2DModel(**RECTANGLE)
        folder = self.path("rectangle")
        DDPMPipeline(rectangle, DDPMScheduler()).save_pretrained(folder)
        self.compare_output("16x24, 4 channels, defaults", folder, rectangle)


def old_name(key):
    for new, old in OLD_NAMES.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    program = os.path.abspath(parser.parse_args().program)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="ddpm-diffusers-") as folder:
        checker = Checker(program, folder)
        checker.our_checkpoint()
        checker.their_folders()
    if checker.failures:
        print(f"{checker.failures} checks failed")
    sys.exit(1 if checker.failures else 0)


if __name__ == "__main__":
    main()
