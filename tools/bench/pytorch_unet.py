"""The network of diffusers' UNet2DModel in plain PyTorch, for machines that have only PyTorch.

Same modules, names and arithmetic (pytorch_parity.py compares both where diffusers is there), in
operations that keep channels_last memory. Also the presets, and model folders in and out.
"""

import json
import math
import os
import struct

import torch
import torch.nn.functional as F
from torch import nn

PAPER = {
    "in_channels": 3,
    "out_channels": 3,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "dropout": 0.0,
}
PRESETS = {
    "tiny": {
        **PAPER,
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
    },
    "cifar10": {
        **PAPER,
        "sample_size": 32,
        "layers_per_block": 2,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "dropout": 0.1,
    },
    "celebahq256": {
        **PAPER,
        "sample_size": 256,
        "layers_per_block": 2,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}


class ResnetBlock(nn.Module):
    def __init__(self, c, inputs, outputs):
        super().__init__()
        groups, eps = c["norm_num_groups"], c["norm_eps"]
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * c["block_out_channels"][0], outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.dropout = nn.Dropout(c["dropout"])
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    def __init__(self, c, channels):
        super().__init__()
        self.heads = channels // (c["attention_head_dim"] or channels)
        self.group_norm = nn.GroupNorm(c["norm_num_groups"], channels, c["norm_eps"])
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)  # a view if NHWC
        q, k, v = (
            layer(tokens).view(n, h * w, self.heads, -1).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.to_out[0](y).view(n, h, w, c).permute(0, 3, 1, 2)


class Sampler(nn.Module):
    """A strided convolution, or one behind a nearest upsampling."""

    def __init__(self, channels, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x):
        if self.conv.stride[0] == 1:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.conv.padding[0] == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Block(nn.Module):
    """Residual blocks, each with its attention where the block has any."""

    def __init__(self, c, widths, outputs, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, width, outputs) for width in widths)
        if attention:
            self.attentions = nn.ModuleList(Attention(c, outputs) for _ in widths)

    def layer(self, index, x, emb):
        x = self.resnets[index](x, emb)
        return self.attentions[index](x) if hasattr(self, "attentions") else x


class UNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        if c.get("num_class_embeds") is not None:
            raise SystemExit("class-conditional networks are not benchmarked")
        widths, layers = c["block_out_channels"], c["layers_per_block"]
        last = len(widths) - 1
        self.dim, self.flip, self.shift = widths[0], c["flip_sin_to_cos"], c["freq_shift"]
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(widths[0], 4 * widths[0])
        self.time_embedding.linear_2 = nn.Linear(4 * widths[0], 4 * widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, now = [widths[0]], widths[0]
        for i, width in enumerate(widths):
            block = Block(c, [now] + [width] * (layers - 1), width,
                          c["down_block_types"][i].startswith("Attn"))
            skips, now = skips + [width] * layers, width
            if i < last:
                block.downsamplers = nn.ModuleList([Sampler(width, 2, c["downsample_padding"])])
                skips.append(width)
            self.down_blocks.append(block)
        self.mid_block = Block(c, [now], now, True)
        self.mid_block.resnets.append(ResnetBlock(c, now, now))
        for i, width in enumerate(reversed(widths)):
            inputs = [(now if j == 0 else width) + skips.pop() for j in range(layers + 1)]
            now = width
            block = Block(c, inputs, width, c["up_block_types"][i].startswith("Attn"))
            if i < last:
                block.upsamplers = nn.ModuleList([Sampler(width, 1, 1)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], now, c["norm_eps"])
        self.conv_out = nn.Conv2d(now, c["out_channels"], 3, padding=1)

    def embed(self, timestep):
        half = self.dim // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32,
                                                   device=timestep.device)
        angle = timestep[:, None].float() * torch.exp(exponent / (half - self.shift))[None, :]
        halves = [torch.sin(angle), torch.cos(angle)]
        emb = torch.cat(halves[::-1] if self.flip else halves, dim=-1)
        emb = self.time_embedding.linear_1(emb.to(self.conv_in.weight.dtype))
        return self.time_embedding.linear_2(F.silu(emb))

    def forward(self, x, timestep):
        emb = self.embed(timestep)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                x = block.layer(j, x, emb)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.resnets[1](self.mid_block.layer(0, x, emb), emb)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                x = block.layer(j, torch.cat([x, skips.pop()], dim=1), emb)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def read_safetensors(path):
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        flat = torch.frombuffer(data, dtype=torch.uint8)[begin:end].clone()  # aligned
        tensors[name] = flat.view(DTYPES[t["dtype"]]).reshape(t["shape"])
    return tensors


def write_safetensors(path, tensors):
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, chunks, at = {}, [], 0
    for name, tensor in tensors.items():
        chunks.append(tensor.detach().cpu().contiguous().numpy().tobytes())
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + len(chunks[-1])]}
        at += len(chunks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def write_json(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(value, file, indent=2)


def make_pipeline(preset, folder):
    """A model folder with PyTorch's initial weights, nowhere zero; the norms' are moved too."""
    torch.manual_seed(0)
    config = {"_class_name": "UNet2DModel", **PRESETS[preset]}
    network = UNet(config)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000,
                 "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
                 "variance_type": "fixed_large", "clip_sample": True}
    write_json(os.path.join(folder, "unet", "config.json"), config)
    write_json(os.path.join(folder, "scheduler", "scheduler_config.json"), scheduler)
    write_json(os.path.join(folder, "model_index.json"), {
        "_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"]})
    write_safetensors(os.path.join(folder, "unet", WEIGHTS), network.state_dict())


def load_network(folder, kind):
    """The folder's network: "plain", this file's, or "diffusers"."""
    folder = os.path.join(folder, "unet")
    if kind == "diffusers":
        from diffusers import UNet2DModel

        return UNet2DModel.from_pretrained(folder, local_files_only=True)
    with open(os.path.join(folder, "config.json")) as file:
        network = UNet(json.load(file))
    network.load_state_dict(read_safetensors(os.path.join(folder, WEIGHTS)))
    return network


def caller(network):
    """f(x, timestep) -> the output, whichever network it is."""
    if isinstance(network, UNet):
        return network
    return lambda x, timestep: network(x, timestep, return_dict=False)[0]
