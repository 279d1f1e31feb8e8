"""Writes sampler_steps.json: what diffusers' schedulers make of a model that needs no weights.

The schedulers' own step() runs, with its alpha-bar tables replaced by float64 ones, since the
stock float32 tables carry relative errors of 1e-3 where 1 - alpha_bar is small; the stock result
is computed as well and must lie nearby. DDIMScheduler takes t - T // N for the previous timestep
whatever the spacing; it is made to take the next entry of its list.

    pip install diffusers==0.42.1 torch numpy && python make_sampler_steps.py
"""

import json
import pathlib

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

T = 1000
START = [(i - 7.5) / 4 for i in range(16)]
STEPS = [1, 2, 3, 7, 10, 14, 15, 20, 50, 1000]
SPACINGS = ["leading", "trailing", "linspace"]
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp2m": diffusers.DPMSolverMultistepScheduler,
}


def noise(t, dtype):
    return torch.tensor([((31 * t + 17 * i) % 64 - 31.5) / 32 for i in range(16)], dtype=dtype)


def alpha_bar(config):
    """Float64 alpha-bar, independent of both diffusers and the program under test."""
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = np.linspace(start, end, T)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, T) ** 2
    else:
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return torch.from_numpy(np.cumprod(1 - betas))


class Gap:
    """Stands in for num_inference_steps so that T // it is the distance to the list's next entry."""

    def __init__(self, gap):
        self.gap = gap

    def __rfloordiv__(self, _):
        return self.gap


def run(sampler, steps, config, eta, dtype):
    scheduler = CLASSES[sampler](**config)
    exact = dtype == torch.float64
    if exact:
        scheduler.alphas_cumprod = alpha_bar(config)
    scheduler.set_timesteps(steps)
    # numpy's arange can append a step at -1 to trailing lists.
    timesteps = scheduler.timesteps.tolist()[:steps]
    if len(set(timesteps)) != steps:
        return None
    if exact and sampler == "dpmpp2m":
        ab = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - ab) / ab) ** 0.5, torch.zeros(1, dtype=dtype)])
    x = torch.tensor(START, dtype=dtype)[None]
    for i, t in enumerate(timesteps):
        following = timesteps[i + 1] if i + 1 < steps else -1
        out = x * t / (t + 1)
        if sampler == "ddpm":
            scheduling_ddpm.randn_tensor = lambda *a, **k: noise(t, dtype)[None]
            x = scheduler.step(out, t, x).prev_sample
        elif sampler == "ddim":
            scheduler.num_inference_steps = Gap(t - following)
            x = scheduler.step(out, t, x, eta=eta, variance_noise=noise(t, dtype)[None]).prev_sample
        else:
            x = scheduler.step(out, t, x).prev_sample
        x = x.to(dtype)
    return x[0].tolist()


def timestep_hash(sampler, spacing):
    """FNV-1a over the lists of every number of steps that makes a strictly descending one."""
    h = 0xCBF29CE484222325
    for steps in range(1, T + 1):
        scheduler = CLASSES[sampler](timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()[:steps]
        if len(set(timesteps)) != steps:
            continue
        for t in timesteps:
            h = ((h ^ t) * 0x100000001B3) % 2**64
    return f"{h:016x}"


def cases():
    """Sampler, steps, diffusers keys, eta."""
    for steps in STEPS:
        for spacing in SPACINGS:
            for prediction in ["epsilon", "sample", "v_prediction"]:
                base = {"timestep_spacing": spacing, "prediction_type": prediction}
                yield "ddpm", steps, base | {"variance_type": "fixed_large"}, 0
                yield "ddim", steps, base, 0
                yield "dpmpp2m", steps, base, 0
            base = {"timestep_spacing": spacing}
            yield "ddpm", steps, base | {"variance_type": "fixed_small"}, 0
            yield "ddim", steps, base, 1
    for extra in [
        {"clip_sample": False},
        {"clip_sample_range": 0.5},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
    ]:
        yield "ddpm", 20, extra, 0
        yield "ddim", 20, extra, 0.5
        if "beta_schedule" in extra:
            yield "dpmpp2m", 20, extra, 0


def main():
    rows = []
    for sampler, steps, config, eta in cases():
        exact = run(sampler, steps, config, eta, torch.float64)
        if exact is None:
            continue
        stock = run(sampler, steps, config, eta, torch.float32)
        worst = np.abs(np.array(exact) - np.array(stock)).max()
        assert worst < 5e-3, (sampler, steps, config, eta, worst)
        row = {"sampler": sampler, "steps": steps, "eta": eta, "config": config}
        rows.append(row | {"x": [float(f"{v:.8g}") for v in exact]})
    hashes = {s: {p: timestep_hash(s, p) for p in SPACINGS} for s in CLASSES}
    with open(pathlib.Path(__file__).with_name("sampler_steps.json"), "w") as f:
        head = {"diffusers": diffusers.__version__, "timestep_hashes": hashes}
        f.write(json.dumps(head, separators=(",", ":"))[:-1] + ',"cases":[\n')
        f.write(",\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n]}\n")


if __name__ == "__main__":
    main()
