"""Writes losses.safetensors beside it: training losses and their gradients, by PyTorch's autograd in
float64 from the definitions (Ho et al. 2020, eq. 5, 7, 13, 14; Nichol and Dhariwal 2021, eq. 15, 16),
for test_diffusion_loss.cpp.

    pip install torch numpy safetensors && python tests/golden/make_losses.py
"""
import math
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file

T = 1000
STEPS = [0, 1, 17, 500, 999]
SHAPE = (len(STEPS), 2, 2, 3)  # N, H, W, C
torch.set_default_dtype(torch.float64)

beta = torch.linspace(1e-4, 0.02, T)
ab = torch.cumprod(1 - beta, 0)
ab_before = torch.cat([torch.ones(1), ab[:-1]])
posterior = beta * (1 - ab_before) / (1 - ab)
small = torch.log(torch.cat([posterior[1:2], posterior[1:]]))
large = torch.log(torch.cat([posterior[1:2], beta[1:]]))
c1 = beta * ab_before.sqrt() / (1 - ab)
c2 = (1 - ab_before) * (1 - beta).sqrt() / (1 - ab)
t = torch.tensor(STEPS)


def at(table):
    return table[t].reshape(-1, 1, 1, 1)


def model_mean(kind, out, x_t):
    if kind == "previous_mean":
        return out
    if kind == "sample":
        x0 = out
    elif kind == "epsilon":
        x0 = (x_t - at((1 - ab).sqrt()) * out) / at(ab.sqrt())
    else:
        x0 = at(ab.sqrt()) * x_t - at((1 - ab).sqrt()) * out
    return at(c1) * x0 + at(c2) * x_t


def goal(kind, x0, noise, x_t):
    return {"previous_mean": at(c1) * x0 + at(c2) * x_t, "sample": x0, "epsilon": noise,
            "v_prediction": at(ab.sqrt()) * noise - at((1 - ab).sqrt()) * x0}[kind]


def log_variance(kind, raw):
    if kind == "fixed_small":
        return at(small).expand(SHAPE)
    if kind == "fixed_large":
        return at(large).expand(SHAPE)
    if kind == "learned":
        return raw
    part = (raw + 1) / 2
    return part * at(torch.log(beta)) + (1 - part) * at(small)


def normal_kl(m1, lv1, m2, lv2):
    return 0.5 * (-1 + lv2 - lv1 + torch.exp(lv1 - lv2) + (m1 - m2) ** 2 * torch.exp(-lv2))


def cdf(z):  # the authors' approximation
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def decoder(x, mean, lv):
    inverse = torch.exp(-0.5 * lv)
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -torch.log(p.clamp(min=1e-12))


def bound(x0, true_mean, mean, lv):
    kl = normal_kl(true_mean, at(small), mean, lv)
    nats = torch.where((t == 0).reshape(-1, 1, 1, 1), decoder(x0, mean, lv), kl)
    return nats.mean((1, 2, 3)) / math.log(2)


def main():
    torch.manual_seed(0)
    levels = (torch.randn(SHAPE) * 90 + 127).round().clamp(0, 255)
    x0 = (levels / 127.5 - 1).float().double()
    noise = torch.randn(SHAPE).float().double()
    x_t = at(ab.sqrt()) * x0 + at((1 - ab).sqrt()) * noise
    true_mean = at(c1) * x0 + at(c2) * x_t
    tensors = {"x0": x0, "noise": noise}
    for kind in ("epsilon", "sample", "v_prediction", "previous_mean"):
        target = goal(kind, x0, noise, x_t)
        probe = torch.zeros(SHAPE, requires_grad=True)
        model_mean(kind, probe, x_t).sum().backward()
        miss = torch.exp(0.5 * at(small)) / probe.grad.abs() * torch.randn(SHAPE)
        tensors[f"{kind}.target"] = target
        for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
            learned = variance.startswith("learned")
            raw = torch.randn(SHAPE) * 0.8 + (at(small) if variance == "learned" else 0)
            parts = [(target + miss).float().double()] + [raw.float().double()] * learned
            out = torch.cat(parts, -1).requires_grad_()
            for loss in ("simple", "kl", "hybrid"):
                if loss == "simple" and learned or loss == "hybrid" and variance != "learned_range":
                    continue
                head, v = out[..., :3], out[..., 3:]
                squared = ((head - target) ** 2).mean((1, 2, 3))
                mean = model_mean(kind, head, x_t)
                lv = log_variance(variance, v)
                if loss == "simple":
                    each = squared
                elif loss == "kl":
                    each = bound(x0, true_mean, mean, lv)
                else:
                    each = squared + bound(x0, true_mean, mean.detach(), lv) * (T / 1000)
                (gradient,) = torch.autograd.grad(each.mean(), out)
                name = f"{loss}.{variance}.{kind}"
                tensors[name + ".prediction"] = out.detach()
                tensors[name + ".loss"] = each.detach()
                tensors[name + ".gradient"] = gradient
    path = pathlib.Path(__file__).with_name("losses.safetensors")
    save_file({k: np.ascontiguousarray(v.numpy().astype(np.float32)) for k, v in tensors.items()},
              path)


if __name__ == "__main__":
    main()
