"""The parity check of pytorch_peer.py: the same weights in PyTorch and in the program.

Makes a model folder with weights that are nowhere zero, has the program compute the network's
output and the gradient of every weight, and compares both with PyTorch in float64. What PyTorch
itself loses in the precision that is timed is measured beside it: float32 on the CPU, autocast to
bf16 on a GPU. Last, the C entry computes the output on PyTorch's own tensors and stream.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess

import torch
from ddpm_library import Model
from peer_worker import hwm_bytes
from pytorch_unet import PRESETS, caller, load_network, make_pipeline
from pytorch_unet import read_safetensors, write_safetensors

BATCH = {"cpu": 2, "cuda": 4}


def relative(value, truth):
    value, truth = value.double().cpu(), truth.double().cpu()
    return ((value - truth).norm() / truth.norm()).item()


def gradient_errors(gradients, truth):
    """{weight: |dg_k| / (|g_k| + 0.001 |g|)}, since some are zero but for rounding, and |dg| / |g|
    over all weights together."""
    if missing := truth.keys() ^ gradients.keys():
        raise SystemExit(f"gradients differ in their names: {sorted(missing)[:3]}")
    total = torch.stack([g.norm() for g in truth.values()]).norm()
    off = {k: (gradients[k].double().cpu() - g).norm() for k, g in truth.items()}
    each = {k: (off[k] / (g.norm() + 1e-3 * total)).item() for k, g in truth.items()}
    return each, (torch.stack(list(off.values())).norm() / total).item()


def compute(network, inputs, dtype=torch.float32, autocast=None):
    """Output, loss and gradients; dropout off."""
    network = network.to(dtype).eval()
    device = next(network.parameters()).device
    if autocast:
        network.to(memory_format=torch.channels_last)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    sample, x0, noise = (inputs[k].to(dtype) for k in ("sample", "x0", "noise"))
    t = inputs["timestep"]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    ab = alpha_bar.to(device)[t].view(-1, 1, 1, 1)
    x = ab.sqrt().to(dtype) * x0 + (1 - ab).sqrt().to(dtype) * noise
    forward = caller(network)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        with torch.no_grad():
            output = forward(sample, t)
        prediction = forward(x, t)
    loss = torch.nn.functional.mse_loss(prediction.to(dtype), noise)
    loss.backward()
    return output, loss.detach(), {k: w.grad.clone() for k, w in network.named_parameters()}


def program(a, what, inputs):
    """The tensors that `ddpm probe` makes of these."""
    source, result = (os.path.join(a.folder, name) for name in ("in.safetensors", "out.safetensors"))
    write_safetensors(source, inputs)
    command = [a.ddpm, "probe", what, "--model", a.folder, "--input", source, "--out", result,
               "--device", a.device, "--precision", a.precision, "--threads", str(a.threads)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_safetensors(result)


def through_c_entry(a, inputs):
    """The output by libddpm.so on tensors of PyTorch's, in channels_last memory."""
    sample = inputs["sample"].to(a.device).contiguous(memory_format=torch.channels_last)
    timestep = inputs["timestep"].to(a.device, torch.int32)
    output = torch.full_like(sample, float("nan"))
    stream = 0
    if a.device == "cuda":
        stream = torch.cuda.current_stream().cuda_stream or 1  # 1: the legacy default stream
    model = Model(a.library, a.folder, a.device, a.precision, a.threads)
    session = model.open_forward(len(sample))
    for _ in range(3):  # the first runs step by step, the second is recorded
        model.forward(session, sample.data_ptr(), timestep.data_ptr(), output.data_ptr(), stream)
    return output.cpu()


def write_images(a, shape):
    """Random bytes (count, H, W, C) for both sides to train on, at most 64 MB or a batch."""
    count = max(a.batch_size, min(2048, (64 << 20) // shape.numel()))
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    with open(os.path.join(a.folder, "images.u8"), "wb") as file:
        file.write(pixels.numpy().tobytes())


def network_kinds(a):
    """Reference and, where diffusers is there, how far the plain network is from it in float64."""
    if importlib.util.find_spec("diffusers") is None:
        return "plain", None
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    size = PRESETS[a.preset]["sample_size"]
    x, t = torch.randn(1, 3, size, size, dtype=torch.float64), torch.tensor([500])
    with torch.no_grad():
        plain, other = (caller(load_network(a.folder, kind).double().eval())(x, t)
                        for kind in ("plain", "diffusers"))
    return "diffusers", relative(plain, other)


def versions(device):
    found = [f"Python {platform.python_version()}", f"PyTorch {torch.__version__}"]
    if importlib.util.find_spec("diffusers"):
        import diffusers

        found.append(f"diffusers {diffusers.__version__}")
    if device == "cuda":
        found += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}",
                  torch.cuda.get_device_name()]
    else:
        lines = [line for line in torch.__config__.show().splitlines() if "MKL-DNN" in line]
        found += ["oneDNN in PyTorch: " + line.split("MKL-DNN")[1].split("(")[0].strip()
                  for line in lines]
    return ", ".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddpm", required=True)
    parser.add_argument("--library", required=True)
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--device", required=True, choices=BATCH)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="of the training to come")
    parser.add_argument("--folder", required=True, help="the model folder to make")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--json", required=True, help="where to write the result")
    a = parser.parse_args()
    library_bytes = hwm_bytes()
    torch.set_num_threads(a.threads)

    make_pipeline(a.preset, a.folder)
    size = PRESETS[a.preset]["sample_size"]
    write_images(a, torch.Size((size, size, 3)))
    reference, plain_error = network_kinds(a)
    inputs = {k: torch.randn(BATCH[a.device], 3, size, size) for k in ("sample", "x0", "noise")}
    inputs["timestep"] = torch.tensor([17, 940, 3, 500][: BATCH[a.device]])
    output = program(a, "forward", {k: inputs[k] for k in ("sample", "timestep")})["model_output"]
    gradient = program(a, "gradient", {k: inputs[k] for k in ("x0", "noise", "timestep")})
    loss = gradient.pop("loss").reshape(())

    truth = compute(load_network(a.folder, reference), inputs, torch.float64)
    theirs = compute(load_network(a.folder, reference if a.device == "cpu" else "plain").to(a.device),
                     inputs, autocast=torch.bfloat16 if a.device == "cuda" else None)
    result = {"versions": versions(a.device), "library_bytes": library_bytes,
              "reference": reference, "plain_error": plain_error}
    for name, y, value, g in (("ours", output, loss, gradient), ("pytorch", *theirs)):
        each, total = gradient_errors(g, truth[2])
        worst = max(each, key=each.get)
        result[name] = {"forward": relative(y, truth[0]), "loss": relative(value, truth[1]),
                        "gradient": total, "worst": each[worst], "worst_weight": worst}

    def save():
        with open(a.json, "w") as file:
            json.dump(result, file)

    save()  # should the C entry end this process, the rest is known
    result["c_entry"] = relative(through_c_entry(a, inputs), output)
    save()


if __name__ == "__main__":
    main()
