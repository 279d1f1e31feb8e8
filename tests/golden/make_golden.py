"""Makes the golden values of this folder with PyTorch and diffusers, in float64.

    python tests/golden/make_golden.py [--check-float32]

Needs the packages of tools/bench/requirements.txt. Weights and inputs come from an integer hash
(README.md), so that no file carries them. --check-float32 writes nothing: it prints how far
PyTorch's own float32 is from these values.
"""

import argparse
import json
import math
import os

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import logging
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
WHOLE = 512  # a tensor of at most so many elements is stored whole

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_large",
    "clip_sample": True,
}
# Random weights predict no noise, so that DPM-Solver++, which does not clip, divides by the
# standard schedule's last alpha of 0.006 and ends at an rms of 193. This one ends at 2.
SHORT_BETA_END = 0.002
TRAIN = {
    "steps": 20,
    "batch_size": 4,
    "learning_rate": 2e-4,
    "warmup_steps": 5,
    "grad_clip": 1.0,
    "ema_decay": 0.99,
}

# The network of the paper at a quarter of its width; three levels on a rectangle, every key that
# has diffusers' default left out; classes, three heads of 16 and groups of 9 of 48 + 24 channels.
CASES = {
    "cifar_small": {
        "stride": 37,
        "unet": {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": [32, 64, 64, 64],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 8,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
        },
    },
    "rectangle": {
        "stride": 11,
        "unet": {
            "sample_size": [16, 24],
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
        },
    },
    "classes": {
        "stride": 13,
        "unet": {
            "sample_size": 12,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": [24, 48, 48],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 8,
            "norm_eps": 1e-6,
            "attention_head_dim": 16,
            "flip_sin_to_cos": True,
            "freq_shift": 1,
            "downsample_padding": 0,
            "num_class_embeds": 5,
        },
    },
}


# --- the hash -----------------------------------------------------------------------------------


def fnv1a(name):
    h = 0x811C9DC5
    for byte in name.encode("utf-8"):
        h = ((h ^ byte) * 0x01000193) & 0xFFFFFFFF
    return h


def hash_bits(name, count):
    """uint32[count]: murmur3's finaliser of fnv1a(name) + i * 0x9E3779B9."""
    i = np.arange(count, dtype=np.uint64)
    z = (np.uint64(fnv1a(name)) + i * np.uint64(0x9E3779B9)).astype(np.uint32)
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x85EBCA6B)
    z ^= z >> np.uint32(13)
    z *= np.uint32(0xC2B2AE35)
    z ^= z >> np.uint32(16)
    return z


def uniform(name, shape):
    """float64 in [-0.5, 0.5)."""
    return hash_bits(name, math.prod(shape)).reshape(shape) / 2.0**32 - 0.5


def weight_value(name, shape):
    u = uniform(name, shape)
    if name == "class_embedding.weight":
        value = u
    elif len(shape) >= 2:
        value = u * 2 * math.sqrt(3 / math.prod(shape[1:]))
    elif name.endswith(".bias"):
        value = 0.2 * u
    else:
        value = 1 + 0.2 * u
    return torch.from_numpy(value.astype(np.float32))


def input_value(name, shape, dtype):
    value = uniform("input:" + name, shape) * math.sqrt(12)
    return torch.from_numpy(value.astype(np.float32)).to(dtype)


def subsample(name, tensor, stride):
    flat = tensor.detach().reshape(-1)
    return flat if flat.numel() <= WHOLE else flat[fnv1a(name) % stride :: stride]


# --- network and schedule -----------------------------------------------------------------------


class ExactTimesteps(torch.nn.Module):
    """diffusers' sinusoidal embedding in float64; its own is float32 whatever the model's type."""

    def __init__(self, channels, flip_sin_to_cos, freq_shift):
        super().__init__()
        self.half, self.flip, self.shift = channels // 2, flip_sin_to_cos, freq_shift

    def forward(self, timesteps):
        i = torch.arange(self.half, dtype=torch.float64)
        frequency = torch.exp(-math.log(10000) * i / (self.half - self.shift))
        phase = timesteps.double()[:, None] * frequency
        parts = [torch.sin(phase), torch.cos(phase)]
        return torch.cat(parts[::-1] if self.flip else parts, dim=1)


def make_network(case, dtype, exact=True):
    model = UNet2DModel(**case["unet"]).train()
    model.load_state_dict({k: weight_value(k, v.shape) for k, v in model.state_dict().items()})
    if exact:
        config = model.config
        model.time_proj = ExactTimesteps(
            config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
    return model.to(dtype)


def call(model, x, timestep, labels):
    return model(x, timestep, class_labels=labels, return_dict=False)[0]


def alpha_bar(beta_end=SCHEDULER["beta_end"]):
    beta = np.linspace(SCHEDULER["beta_start"], beta_end, 1000)
    return np.cumprod(1 - beta)


def labels_of(case, batch, shift=0):
    classes = case["unet"].get("num_class_embeds")
    return None if classes is None else (torch.arange(batch) + shift) % classes


def image_shape(case, batch):
    size = case["unet"]["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    return (batch, case["unet"]["in_channels"], height, width)


def noise_loss(model, x0, timestep, noise, labels):
    ab = torch.from_numpy(alpha_bar())[timestep].view(-1, 1, 1, 1)
    x = (ab.sqrt() * x0.double() + (1 - ab).sqrt() * noise.double()).to(x0.dtype)
    return ((call(model, x, timestep, labels) - noise) ** 2).mean()


# --- what is stored -----------------------------------------------------------------------------


def forward_values(case, dtype, exact=True):
    timestep = torch.tensor([0, 500, 999])
    x = input_value("forward.sample", image_shape(case, len(timestep)), dtype)
    labels = labels_of(case, len(timestep), 2)
    with torch.no_grad():
        y = call(make_network(case, dtype, exact), x, timestep, labels)
    values = {"forward.timestep": timestep, "forward.model_output": y}
    return values if labels is None else {**values, "forward.class_labels": labels}


def gradient_values(case, dtype, exact=True):
    timestep = torch.tensor([999, 0, 137])
    model = make_network(case, dtype, exact)
    shape = image_shape(case, len(timestep))
    labels = labels_of(case, len(timestep), 1)
    x0 = input_value("gradient.x0", shape, dtype)
    noise = input_value("gradient.noise", shape, dtype)
    loss = noise_loss(model, x0, timestep, noise, labels)
    loss.backward()
    gradients = {k: w.grad for k, w in model.named_parameters()}
    norms = [gradients[k].norm() for k in sorted(gradients)]
    values = {
        "gradient.timestep": timestep,
        "gradient.loss": loss.detach().reshape(1),
        "gradient.norms": torch.stack(norms),
    }
    values |= {"gradient.weight." + k: g for k, g in gradients.items()}
    return values if labels is None else {**values, "gradient.class_labels": labels}


def train_values(case, dtype, exact=True):
    steps, batch = TRAIN["steps"], TRAIN["batch_size"]
    model = make_network(case, dtype, exact)
    shape = image_shape(case, batch)
    weights = dict(model.named_parameters())
    average = {k: w.detach().clone() for k, w in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=TRAIN["learning_rate"])
    bits = hash_bits("input:train.timestep", steps * batch) % 1000
    timestep = torch.from_numpy(bits.astype(np.int64).reshape(steps, batch))
    losses, norms = [], []
    for n in range(steps):
        x0 = input_value(f"train.x0.{n}", shape, dtype)
        noise = input_value(f"train.noise.{n}", shape, dtype)
        optimizer.zero_grad()
        loss = noise_loss(model, x0, timestep[n], noise, labels_of(case, batch, n))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), TRAIN["grad_clip"])
        warmup = min(n / TRAIN["warmup_steps"], 1)
        optimizer.param_groups[0]["lr"] = TRAIN["learning_rate"] * warmup
        optimizer.step()
        for k, w in weights.items():
            average[k].lerp_(w.detach(), 1 - TRAIN["ema_decay"])
        losses.append(loss.detach())
        norms.append(norm)
    values = {
        "train.timestep": timestep,
        "train.loss": torch.stack(losses),
        "train.grad_norm": torch.stack(norms),
    }
    values |= {"train.weight." + k: w.detach() for k, w in weights.items()}
    values |= {"train.ema." + k: w for k, w in average.items()}
    return values


def ddim(network, x, ab, timesteps):
    """eta 0; the predicted image is clipped, the network's own eps is kept."""
    for k, t in enumerate(timesteps):
        eps = network(x, t)
        x0 = ((x - math.sqrt(1 - ab[t]) * eps) / math.sqrt(ab[t])).clamp(-1, 1)
        before = ab[timesteps[k + 1]] if k + 1 < len(timesteps) else 1.0
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    return x


def dpmpp2m(network, x, ab, timesteps):
    """DPM-Solver++ of order 2, midpoint; first and last step of order 1; ends at sigma 0."""
    alpha = [math.sqrt(ab[t]) for t in timesteps]
    sigma = [math.sqrt(1 - ab[t]) for t in timesteps]
    log_snr = [math.log(a / s) for a, s in zip(alpha, sigma)]
    last = None
    for k, t in enumerate(timesteps):
        now = (x - sigma[k] * network(x, t)) / alpha[k]
        if k + 1 == len(timesteps):
            return now
        h = log_snr[k + 1] - log_snr[k]
        slope = now
        if k > 0:
            slope = now + (now - last) * (h / (2 * (log_snr[k] - log_snr[k - 1])))
        x = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * math.expm1(-h) * slope
        last = now


def sampled_network(case, dtype, exact):
    model = make_network(case, dtype, exact)

    def network(x, t):
        with torch.no_grad():
            return call(model, x, torch.full((len(x),), int(t)), labels_of(case, len(x)))

    return network


def sample_values(case, dtype, exact=True):
    network = sampled_network(case, dtype, exact)
    x = input_value("sample.x_T", image_shape(case, 2), dtype)
    leading = [900 - 100 * k for k in range(10)]
    linspace = [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    return {
        "sample.ddim": ddim(network, x, alpha_bar(), leading),
        "sample.dpmpp2m": dpmpp2m(network, x, alpha_bar(), linspace),
        "sample.dpmpp2m_short": dpmpp2m(network, x, alpha_bar(SHORT_BETA_END), linspace),
    }


def peer_samples(case):
    """The same chains by diffusers' own schedulers, which compute in float32."""
    network = sampled_network(case, torch.float32, exact=False)
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    config = {k: SCHEDULER[k] for k in keys}
    short = config | {"beta_end": SHORT_BETA_END}
    result = {}
    for name, scheduler in (
        ("sample.ddim", DDIMScheduler(**config)),
        ("sample.dpmpp2m", DPMSolverMultistepScheduler(**config)),
        ("sample.dpmpp2m_short", DPMSolverMultistepScheduler(**short)),
    ):
        scheduler.set_timesteps(10)
        x = input_value("sample.x_T", image_shape(case, 2), torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        result[name] = x
    return result


def values_of(name, case, dtype, exact=True):
    values = {}
    for part in (forward_values, gradient_values, train_values):
        values |= part(case, dtype, exact)
    if name == "cifar_small":
        values |= sample_values(case, dtype, exact)
    return values


# --- output -------------------------------------------------------------------------------------


def relative(value, truth):
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm()).item()


def difference(value, truth, prefix):
    """All tensors under the prefix as one vector."""
    keys = [k for k in truth if k.startswith(prefix)]
    joined = [torch.cat([v[k].double().reshape(-1) for k in keys]) for v in (value, truth)]
    return relative(*joined)


def check_float32(name, case):
    truth = values_of(name, case, torch.float64)
    start = make_network(case, torch.float64).state_dict()
    for exact, label in ((True, "exact embedding"), (False, "diffusers' embedding")):
        value = values_of(name, case, torch.float32, exact)
        print(f"{name}, float32, {label}")
        for key in ("forward.model_output", "gradient.loss", "gradient.weight.", "train.loss",
                    "train.grad_norm", "train.weight.", "train.ema.", "sample.ddim",
                    "sample.dpmpp2m", "sample.dpmpp2m_short"):
            if any(k.startswith(key) for k in truth):
                print(f"  {key:22} {difference(value, truth, key):.2e}")
        for kind in ("train.weight.", "train.ema."):
            for skipped in ("", "to_k.bias"):
                steps = [{k: v[kind + k].double() - w for k, w in start.items()
                          if not (skipped and k.endswith(skipped))} for v in (value, truth)]
                print(f"  {kind} minus start, without '{skipped}'  {difference(*steps, ''):.2e}")
        prefix = "gradient.weight."
        gradients = {k: v for k, v in truth.items() if k.startswith(prefix)}
        total = math.sqrt(sum(g.norm().item() ** 2 for g in gradients.values()))
        worst = max(
            ((value[k].double() - g).norm().item() / (g.norm().item() + 1e-3 * total), k)
            for k, g in gradients.items()
        )
        print(f"  |dg_k| / (|g_k| + 0.001 |g|)  {worst[0]:.2e}  {worst[1]}")
    print(f"  norms: gradient {total:.3f}, steps {truth['train.grad_norm'].min():.3f} to "
          f"{truth['train.grad_norm'].max():.3f}; output rms "
          f"{truth['forward.model_output'].square().mean().sqrt():.3f}")
    if name == "cifar_small":
        for key, value in peer_samples(case).items():
            x = truth[key]
            inside = (x.abs() < 1).double().mean()
            print(f"  {key}: diffusers' scheduler {relative(value, x):.2e}, rms "
                  f"{x.square().mean().sqrt():.3f}, {inside:.0%} inside (-1, 1)")


def write(name, case):
    values = values_of(name, case, torch.float64)
    if name == "cifar_small":
        for key, value in peer_samples(case).items():
            if relative(value, values[key]) > 1e-3:
                raise SystemExit(f"{key}: diffusers' scheduler disagrees")
    tensors = {}
    for key, value in values.items():
        if value.dtype == torch.float64:
            for prefix in ("gradient.weight.", "train.weight.", "train.ema."):
                if key.startswith(prefix):
                    value = subsample(key.removeprefix(prefix), value, case["stride"])
            value = value.float()
        tensors[key] = value.contiguous().numpy()
    path = os.path.join(HERE, name + ".safetensors")
    save_file(tensors, path)
    os.chmod(path, 0o644)
    text = {
        "unet": {"_class_name": "UNet2DModel", **case["unet"]},
        "scheduler": SCHEDULER,
        "short_beta_end": SHORT_BETA_END,
        "train": TRAIN,
        "stride": case["stride"],
    }
    with open(os.path.join(HERE, name + ".json"), "w") as file:
        json.dump(text, file, indent=2)
        file.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check-float32", action="store_true")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    for name, case in CASES.items():
        (check_float32 if arguments.check_float32 else write)(name, case)


if __name__ == "__main__":
    main()
