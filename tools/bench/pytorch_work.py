"""The PyTorch side of pytorch_peer.py: one process, one work, one variant.

Whole training or sampling steps of a model folder's network, on the same weights and images as our
side. On the CPU each step is timed; on a GPU a whole round, by CUDA events.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass

import torch
from peer_worker import hwm_bytes, serve
from pytorch_unet import caller, load_network


@dataclass
class Variant:
    last: bool = False  # channels_last
    bf16: bool = False  # autocast in training, bf16 weights in sampling
    mode: str = ""  # torch.compile's; "" is eager
    graph: bool = False  # the whole step as one CUDA graph


VARIANTS = {
    "cpu": {
        "nchw": Variant(),
        "channels_last": Variant(last=True),
        "compile": Variant(mode="default"),
        "compile_channels_last": Variant(last=True, mode="default"),
    },
    "cuda": {
        "eager_tf32": Variant(),
        "eager_bf16": Variant(last=True, bf16=True),
        "graph_bf16": Variant(last=True, bf16=True, graph=True),
        "compile_bf16": Variant(last=True, bf16=True, mode="default"),
        "compile_graph_bf16": Variant(last=True, bf16=True, mode="default", graph=True),
        "autotune_bf16": Variant(last=True, bf16=True, mode="max-autotune"),
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, with images.u8 in it")
    parser.add_argument("--network", required=True, choices=("plain", "diffusers"))
    parser.add_argument("--work", required=True, choices=("train", "sample"))
    parser.add_argument("--variant", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--device", required=True, choices=VARIANTS)
    parser.add_argument("--threads", type=int, required=True)
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


def training_step(network, v, device, batch, folder, shape):
    """gather, flip, t, noise, q_sample, forward, loss, backward, clip, Adam, EMA."""
    layout = torch.channels_last if v.last else torch.contiguous_format
    alpha_bar = noise_schedule(folder)[1]
    signal, spread = alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)
    with open(os.path.join(folder, "images.u8"), "rb") as file:
        pixels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    images = pixels.view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2).to(device).contiguous(
        memory_format=layout)
    network.train()
    weights = list(network.parameters())
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=2e-4, fused=True, capturable=v.graph)
    forward = caller(network)
    if v.mode:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, mode=v.mode)

    def step():
        optimizer.zero_grad(set_to_none=True)
        x0 = images[torch.randint(len(images), (batch,), device=device)].float().div_(127.5).sub_(1)
        flip = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        x0 = torch.where(flip, x0.flip(3), x0)
        t = torch.randint(len(alpha_bar), (batch,), device=device)
        noise = torch.randn_like(x0)
        x = signal[t].view(-1, 1, 1, 1) * x0 + spread[t].view(-1, 1, 1, 1) * noise
        # Each weight is cast once per step, so a cache of casts would only hold memory.
        with torch.autocast(device, torch.bfloat16, enabled=v.bf16, cache_enabled=False):
            prediction = forward(x.contiguous(memory_format=layout), t)
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)

    return step


def sampling_step(network, v, device, batch, folder, shape):
    """Forward, then the ancestral update: x0 clipped, posterior mean, noise of variance beta."""
    layout = torch.channels_last if v.last else torch.contiguous_format
    beta, alpha_bar = noise_schedule(folder)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    table = torch.stack([
        alpha_bar.rsqrt(), (1 / alpha_bar - 1).sqrt(),  # x0 from x and the network's output
        beta * before.sqrt() / (1 - alpha_bar), (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
        beta.sqrt(),
    ], 1).float().to(device)
    dtype = torch.bfloat16 if v.bf16 else torch.float32
    network.eval().requires_grad_(False).to(dtype)
    forward = caller(network)

    def denoise(x, t):
        output = forward(x.to(dtype), t.expand(batch)).float()
        x0_x, x0_out, to_x0, to_x, sigma = table[t].unbind(1)  # a 0-d index would wait for the GPU
        x0 = (x0_x * x - x0_out * output).clamp(-1, 1)
        return to_x0 * x0 + to_x * x + sigma * torch.randn_like(x)

    if v.mode:
        # Freezing lets Inductor prepack the weights of a network that no longer changes.
        torch._inductor.config.freezing = device == "cpu"
        denoise = torch.compile(denoise, fullgraph=True, dynamic=False, mode=v.mode)
    x = torch.randn(batch, *shape, device=device).contiguous(memory_format=layout)
    t = torch.full((1,), len(beta) - 1, device=device)

    def step():
        with torch.no_grad():
            x.copy_(denoise(x, t))
            t.sub_(1).remainder_(len(beta))

    return step


def captured(step):
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_cpu(step, steps):
    ms = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        ms.append((time.perf_counter() - start) * 1e3)
    return ms


def run_cuda(step, steps):
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(steps):
        step()
    last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / steps]


def main():
    a = parse_arguments()
    v = VARIANTS[a.device][a.variant]
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    network = load_network(a.model, a.network).to(a.device)
    if v.last:
        network.to(memory_format=torch.channels_last)
    with open(os.path.join(a.model, "unet", "config.json")) as file:
        config = json.load(file)
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    make = training_step if a.work == "train" else sampling_step
    step = make(network, v, a.device, a.batch_size, a.model, shape)
    if v.graph:
        step = captured(step)
    run = run_cuda if a.device == "cuda" else run_cpu
    peak = torch.cuda.max_memory_allocated if a.device == "cuda" else hwm_bytes

    def warm():
        # What the choice of algorithms took is not counted. A graph's memory shows at its capture
        # alone.
        if a.device == "cuda" and not v.graph and v.mode != "max-autotune":
            torch.cuda.reset_peak_memory_stats()

    serve(a.device, lambda steps: run(step, steps), peak, {}, warm)


if __name__ == "__main__":
    main()
