"""The PyTorch side of pytorch_peer.py: one process, one work, one variant.

Builds the diffusers UNet2DModel of a pipeline folder, runs whole training or sampling steps and
writes the milliseconds of each with this process's peak resident memory. The weights are PyTorch's
own initial ones, which are nowhere zero, so no time is gained from them.
"""

import argparse
import contextlib
import json
import os
import time

import torch
from diffusers import UNet2DModel

VARIANTS = ("nchw", "channels_last", "compile", "compile_channels_last")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="pipeline folder; only its configs are read")
    parser.add_argument("--work", required=True, choices=("train", "sample"))
    parser.add_argument("--variant", required=True, choices=VARIANTS)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", required=True, help="where to write the result")
    return parser.parse_args()


def noise_schedule(folder):
    """beta and alpha-bar in float64, from the folder's scheduler config (linear schedules only)."""
    with open(os.path.join(folder, "scheduler", "scheduler_config.json")) as file:
        config = json.load(file)
    if config.get("beta_schedule", "linear") != "linear":
        raise SystemExit(f"{folder}: only the linear beta schedule is benchmarked")
    beta = torch.linspace(
        config["beta_start"], config["beta_end"], config["num_train_timesteps"], dtype=torch.float64
    )
    return beta, torch.cumprod(1 - beta, 0)


def hwm_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def training_step(model, forward, shape, batch, layout, folder):
    """gather, flip, t, noise, q_sample, forward, loss, backward, clip, Adam, EMA."""
    alpha_bar = noise_schedule(folder)[1]
    signal, spread = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    images = torch.randint(0, 256, (max(256, batch), *shape), dtype=torch.uint8)
    model.train()
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=2e-4, fused=True)

    def step():
        x0 = images[torch.randint(len(images), (batch,))].float().div_(127.5).sub_(1)
        flip = torch.rand(batch, 1, 1, 1) < 0.5
        x0 = torch.where(flip, x0.flip(3), x0)
        t = torch.randint(len(alpha_bar), (batch,))
        noise = torch.randn_like(x0)
        x = signal[t].view(-1, 1, 1, 1) * x0 + spread[t].view(-1, 1, 1, 1) * noise
        prediction = forward(x.contiguous(memory_format=layout), t, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)
        return loss.item()

    return step


def sampling_step(model, forward, shape, batch, layout, folder):
    """Forward, then the ancestral update: x0 clipped, posterior mean, noise of variance beta."""
    beta, alpha_bar = noise_schedule(folder)
    model.eval()
    x = torch.randn(batch, *shape).contiguous(memory_format=layout)
    t = len(beta) - 1

    def step():
        nonlocal x, t
        timestep = torch.full((batch,), t)
        prediction = forward(x, timestep, return_dict=False)[0]
        now, before = alpha_bar[t].item(), alpha_bar[t - 1].item()
        x0 = ((x - (1 - now) ** 0.5 * prediction) / now**0.5).clamp_(-1, 1)
        to_x0 = beta[t].item() * before**0.5 / (1 - now)
        to_x = (1 - before) * (1 - beta[t].item()) ** 0.5 / (1 - now)
        noise = torch.randn_like(x)
        x = x0.mul_(to_x0).add_(x, alpha=to_x).add_(noise, alpha=beta[t].item() ** 0.5)
        t = t - 1 if t > 1 else len(beta) - 1

    return step


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = UNet2DModel.load_config(os.path.join(arguments.model, "unet"))
    model = UNet2DModel.from_config(config)
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (config["in_channels"], height, width)

    last = arguments.variant.endswith("channels_last")
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.to(memory_format=layout)
    forward = model
    sampling = arguments.work == "sample"
    if arguments.variant.startswith("compile"):
        # Freezing lets Inductor prepack the weights of a network that no longer changes.
        torch._inductor.config.freezing = sampling
        if sampling:
            model.eval()
        forward = torch.compile(model, fullgraph=True)
    make = sampling_step if sampling else training_step
    step = make(model, forward, shape, arguments.batch_size, layout, arguments.model)

    milliseconds = []
    with torch.no_grad() if sampling else contextlib.nullcontext():
        for index in range(arguments.warmup + arguments.steps):
            start = time.perf_counter()
            step()
            if index >= arguments.warmup:
                milliseconds.append((time.perf_counter() - start) * 1e3)

    with open(arguments.json, "w") as file:
        json.dump({"ms": milliseconds, "peak_bytes": hwm_bytes()}, file)


if __name__ == "__main__":
    main()
