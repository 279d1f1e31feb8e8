"""Compares ddpm with PyTorch on this machine: parity first, then time and memory.

    python tools/bench/pytorch_peer.py --ddpm build/ddpm --device cpu|cuda [--preset P] ...

On the CPU: float32, against diffusers (requirements.txt beside this file). On a GPU: bf16, against
the same network in plain PyTorch (pytorch_unet.py), which alone is needed. Each side is a process
of its own (ddpm_work.py through libddpm.so, and pytorch_work.py per variant) that does whole steps
on the same weights and images; rounds are interleaved. PyTorch's fastest variant is the
denominator. The last line is `ratio sample=.. train=.. memory=.. parity=.. variant=..`: PyTorch's
time by ours, our peak memory by PyTorch's in training, the relative error of the network's output.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from peer_worker import Worker, read_json

# Nothing heavy is imported here: this process stays beside those that are timed.

HERE = os.path.dirname(os.path.abspath(__file__))
PRESETS = ("tiny", "cifar10", "celebahq256")
VARIANTS = {
    "cpu": ("nchw", "channels_last", "compile", "compile_channels_last"),
    "cuda": ("eager_tf32", "eager_bf16", "graph_bf16", "compile_bf16", "compile_graph_bf16",
             "autotune_bf16"),
}
DEFAULT_VARIANTS = {"cpu": "nchw,channels_last,compile", "cuda": ",".join(VARIANTS["cuda"])}
STEPS = {"cpu": {"tiny": 40, "cifar10": 5, "celebahq256": 2},
         "cuda": {"tiny": 50, "cifar10": 50, "celebahq256": 10}}
BATCH = {"cpu": 8, "cuda": 128}
ROUNDS = {"cpu": 5, "cuda": 7}
BUDGET = {"cpu": 24 * 3600.0, "cuda": 540.0}
# A GPU samples at its own batches; celebahq256 is 64 times as large.
CUDA_SAMPLE_BATCH = {"tiny": 256, "cifar10": 256, "celebahq256": 16}
FORWARD_LIMIT = 5e-5  # float32
GRADIENT_LIMIT = 1e-4
BF16_SHARE = 1.1  # of what PyTorch's autocast loses
C_ENTRY_LIMIT = 1e-6
HOPELESS = 1.5  # a variant whose fastest of two rounds is so far behind is left out
PEAK_TFLOPS = 790  # bf16, measured on an H100 under its power limit


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddpm", required=True, help="the program; libddpm.so lies beside it")
    parser.add_argument("--device", required=True, choices=VARIANTS)
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, help="8 on the CPU, 128 on a GPU")
    parser.add_argument("--precision", default="auto", help="ours")
    parser.add_argument("--rounds", type=int, help="5 on the CPU, 7 on a GPU")
    parser.add_argument("--steps", type=int, help="timed steps of a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--variants", help="comma-separated; cpu: " + ", ".join(VARIANTS["cpu"])
                        + "; cuda: " + ", ".join(VARIANTS["cuda"]))
    parser.add_argument("--work", default="sample,train,sample1",
                        help="of sample, train and, on a GPU, sample1: a batch of one")
    parser.add_argument("--network", choices=("plain", "diffusers"),
                        help="PyTorch's; diffusers on the CPU, plain on a GPU")
    parser.add_argument("--budget", type=float, help="seconds after which no round begins")
    parser.add_argument("--prepare", action="store_true",
                        help="only start each variant, which fills the cache of compiled kernels")
    parser.add_argument("--cache", default=os.path.join(HERE, "..", "..", ".cache", "inductor"),
                        help="folder of compiled kernels")
    a = parser.parse_args()
    a.variants = (a.variants or DEFAULT_VARIANTS[a.device]).split(",")
    for name in a.variants:
        if name not in VARIANTS[a.device]:
            parser.error(f"unknown variant {name}; known: {', '.join(VARIANTS[a.device])}")
    a.batch_size = a.batch_size or BATCH[a.device]
    a.rounds = ROUNDS[a.device] if a.rounds is None else a.rounds
    a.steps = a.steps or STEPS[a.device][a.preset]
    a.budget = a.budget or BUDGET[a.device]
    a.network = a.network or ("diffusers" if a.device == "cpu" else "plain")
    sizes = {"sample": a.batch_size, "train": a.batch_size}
    if a.device == "cuda":
        sizes.update(sample=CUDA_SAMPLE_BATCH[a.preset], sample1=1)
    wanted = [w for w in a.work.split(",") if w in sizes or w != "sample1"]
    if not wanted or set(wanted) - sizes.keys():
        parser.error(f"--work {a.work}: known are sample, train, sample1")
    a.works = {work: sizes[work] for work in wanted}
    if a.rounds < 1:
        parser.error("--rounds must be at least 1")
    a.ddpm = os.path.abspath(a.ddpm)
    a.library = os.path.join(os.path.dirname(a.ddpm), "libddpm.so")
    for path in (a.ddpm, a.library):
        if not os.access(path, os.X_OK):
            parser.error(f"{path} is not there; build it with tools/build.sh")
    return a


def tail(path, lines=15):
    with open(path, errors="replace") as file:
        return "".join(file.readlines()[-lines:])


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Monitor:
    """Clock, power and temperature of the GPU, sampled while rounds run."""

    QUERY = "clocks.sm,power.draw,temperature.gpu,memory.used"

    def __init__(self, folder):
        self.path = os.path.join(folder, "gpu.csv")
        try:
            with open(self.path, "w") as file:
                self.process = subprocess.Popen(
                    ["nvidia-smi", "--query-gpu=" + self.QUERY, "--format=csv,noheader,nounits",
                     "-lms", "200"], stdout=file, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            self.process = None
        self.at = 0

    def since_last(self):
        """What was seen since this was last asked, in words."""
        if self.process is None:
            return "no nvidia-smi"
        with open(self.path) as file:
            lines = file.read().splitlines()
        rows = []
        for line in lines[self.at:]:
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError:
                continue  # a line half written, or a reading that the GPU does not give
        self.at = len(lines)
        if not rows:
            return "no reading"
        names = ("MHz", "W", "C", "MiB in use")
        return ", ".join(f"{min(column):.0f}-{max(column):.0f} {name}"
                         for name, column in zip(names, zip(*rows)))

    def close(self):
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


class Bench:
    def __init__(self, arguments, folder):
        self.a, self.folder = arguments, folder
        self.model = os.path.join(folder, "model")
        self.started = time.monotonic()
        self.monitor = Monitor(folder) if arguments.device == "cuda" else None
        self.gflop = None  # of a forward pass, per image

    def left(self):
        return self.a.budget - (time.monotonic() - self.started)

    def common(self):
        return ["--device", self.a.device, "--threads", str(self.a.threads)]

    def parity(self):
        a, path, log = self.a, os.path.join(self.folder, "parity.json"), self.folder + "/parity.log"
        command = [sys.executable, os.path.join(HERE, "pytorch_parity.py"), "--ddpm", a.ddpm,
                   "--library", a.library, "--preset", a.preset, "--precision", a.precision,
                   "--batch-size", str(a.batch_size), "--folder", self.model, "--json", path]
        with open(log, "w") as file:
            status = subprocess.run(command + self.common(), stdout=file, stderr=file).returncode
        if not os.path.exists(path):
            raise SystemExit(f"the parity check did not run:\n{tail(log)}")
        if status != 0:
            print(f"the C entry failed on PyTorch's tensors (exit {status}):\n{tail(log)}")
        return read_json(path)

    def start(self, work, side):
        """A worker that is ready, or None."""
        a, batch = self.a, self.a.works[work]
        kind = "train" if work == "train" else "sample"
        if side == "ddpm":
            command = [os.path.join(HERE, "ddpm_work.py"), "--library", a.library]
            command += ["--precision", a.precision]
        else:
            command = [os.path.join(HERE, "pytorch_work.py"), "--variant", side]
            command += ["--network", a.network]
        command += ["--model", self.model, "--work", kind, "--batch-size", str(batch)]
        worker = Worker([sys.executable, *command, *self.common()],
                        os.path.join(self.folder, f"{work}-{side}.log"))
        about = worker.ready(max(self.left(), 1))
        if about is None:
            self.report_loss(work, side, worker)
            return None
        self.gflop = self.gflop or about.get("multiply_adds", 0) * 2e-9
        return worker

    def report_loss(self, work, side, worker):
        why = worker.why()
        worker.close()
        if side == "ddpm":
            raise SystemExit(f"{work}: our side failed:\n{why}")
        print(f"{work}: variant {side} is left out: {why}", flush=True)

    def prepare(self):
        for work in self.a.works:
            for side in self.a.variants:
                start = time.monotonic()
                worker = self.start(work, side)
                if worker is not None:
                    worker.close()
                    print(f"{work}: {side} was ready after {time.monotonic() - start:.0f} s",
                          flush=True)

    def measure(self, work):
        """{side: [(ms, peak) per round]}; side "ddpm" or a variant."""
        workers, results = {}, {}
        try:
            for side in ("ddpm", *self.a.variants):
                worker = self.start(work, side)
                if worker is not None:
                    workers[side], results[side] = worker, []
            if self.monitor is not None:
                self.monitor.since_last()
            for index in range(self.a.rounds):
                if index > 0 and self.left() < 0:
                    print(f"{work}: no time for more than {index} rounds")
                    break
                self.run_round(work, index, workers, results)
        finally:
            for worker in workers.values():
                worker.close()
        return results

    def run_round(self, work, index, workers, results):
        for side in list(workers):
            value = workers[side].run(self.a.steps, 600)
            if value is None:
                self.report_loss(work, side, workers.pop(side))
                del results[side]
            else:
                results[side].append((statistics.median(value["ms"]), value["peak_bytes"]))
        state = f"load {os.getloadavg()[0]:.1f}" if self.monitor is None else \
            self.monitor.since_last()
        print(f"round {index + 1}/{self.a.rounds} {work}, {state}, ms per step: "
              + ", ".join(f"{side} {results[side][-1][0]:.3f}" for side in workers), flush=True)
        if len(workers) < 2:
            raise SystemExit(f"{work}: no PyTorch variant runs here")
        if index == 1:
            fastest = {side: min(ms for ms, _ in results[side])
                       for side in workers if side != "ddpm"}
            for side, ms in fastest.items():
                if ms > HOPELESS * min(fastest.values()):
                    print(f"{work}: {side} is left out of the other rounds")
                    workers.pop(side).close()


def print_parity(a, parity):
    """True if it holds."""
    ours, theirs = parity["ours"], parity["pytorch"]
    precision = "float32" if a.device == "cpu" else "bf16 autocast"
    if parity["plain_error"] is not None:
        print(f"pytorch_unet.py against diffusers in float64: {parity['plain_error']:.1e}")
    print(f"relative error against {parity['reference']} PyTorch in float64, ours (PyTorch's in "
          f"{precision}): output {ours['forward']:.1e} ({theirs['forward']:.1e}), loss "
          f"{ours['loss']:.1e} ({theirs['loss']:.1e}), all gradients {ours['gradient']:.1e} "
          f"({theirs['gradient']:.1e}), worst gradient {ours['worst']:.1e} of "
          f"{ours['worst_weight']} ({theirs['worst']:.1e} of {theirs['worst_weight']})")
    c_entry = parity.get("c_entry", math.nan)
    print(f"the C entry on PyTorch's tensors: {c_entry:.1e} from the program's output", flush=True)
    # "<=" and not ">", so that a NaN fails.
    holds = parity["plain_error"] is None or parity["plain_error"] <= 1e-6
    if a.device == "cpu" or a.precision == "fp32":
        return holds and ours["forward"] <= FORWARD_LIMIT and ours["worst"] <= GRADIENT_LIMIT
    return (holds and ours["forward"] <= BF16_SHARE * theirs["forward"]
            and ours["gradient"] <= BF16_SHARE * theirs["gradient"])


def summarise(a, gflop, work, sides):
    """Prints the work's rows; (variant, time ratio, memory ratio)."""
    batch = a.works[work]
    passes = 3 if work == "train" else 1
    for side, rounds in sides.items():
        ms = [value for value, _ in rounds]
        median = statistics.median(ms)
        tflops = gflop * passes * batch / median
        share = f"{100 * tflops / PEAK_TFLOPS:7.1f}%" if a.device == "cuda" else ""
        print(f"{work:8}{batch:6} {side:22}{median:11.3f}{min(ms):11.3f}{max(ms):11.3f}"
              f"{1e3 / median:10.2f}{1e3 * batch / median:11.1f}{tflops:10.3f}{share}"
              f"{max(peak for _, peak in rounds) / 1e6:10.0f}{len(rounds):4}")
    ours = sides["ddpm"]
    full = {side: rounds for side, rounds in sides.items()
            if side != "ddpm" and len(rounds) == len(ours)}
    best = min(full, key=lambda side: statistics.median(ms for ms, _ in full[side]))
    ratios = [theirs[0] / mine[0] for theirs, mine in zip(full[best], ours)]
    memory = max(peak for _, peak in ours) / max(peak for _, peak in full[best])
    print(f"{work:8}ratio to {best}: time {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f} by round), memory {memory:.2f}")
    return best, statistics.median(ratios), memory


def print_machine(a, parity):
    version = subprocess.run([a.ddpm, "--version"], capture_output=True, text=True)
    print(version.stdout.strip())
    print(parity["versions"])
    if a.device == "cuda":
        query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
        try:
            print(subprocess.run(["nvidia-smi", query, "--format=csv,noheader"],
                                 capture_output=True, text=True).stdout.strip())
        except FileNotFoundError:
            print("no nvidia-smi")
    print(f"{machine()}, {a.threads} threads; preset {a.preset}, {a.steps} steps a round; batch "
          + ", ".join(f"{batch} ({work})" for work, batch in a.works.items()), flush=True)


def compare(a, folder):
    bench = Bench(a, folder)
    busy = os.getloadavg()[0]
    try:
        parity = bench.parity()
        print_machine(a, parity)
        if not print_parity(a, parity):
            raise SystemExit(
                f"parity failed: allowed are {FORWARD_LIMIT:.0e} for the output and "
                f"{GRADIENT_LIMIT:.0e} for a gradient in float32, {BF16_SHARE} of PyTorch's own "
                "error in bf16; nothing was timed")
        if a.prepare:
            return bench.prepare()
        results = {work: bench.measure(work) for work in a.works}
    finally:
        if bench.monitor is not None:
            bench.monitor.close()
    print(f"\n{'work':8}{'batch':>6} {'side':22}{'ms/step':>11}{'min':>11}{'max':>11}"
          f"{'steps/s':>10}{'images/s':>11}{'TFLOP/s':>10}"
          + (f"{'of ' + str(PEAK_TFLOPS):>8}" if a.device == "cuda" else "")
          + f"{'peak MB':>10}{'n':>4}")
    summary = {work: summarise(a, bench.gflop, work, results[work]) for work in a.works}
    if a.device == "cpu":
        print(f"PyTorch's peaks include {parity['library_bytes'] / 1e6:.0f} MB of its libraries")
        if busy > 0.5:
            print(f"the machine was busy at the start (load {busy:.1f}): do not report these times")
    else:
        print("peaks are what each side allocated on the device, without context and libraries")
    missing = (None, math.nan, math.nan)  # of work that was not asked for
    sample, train = summary.get("sample", missing), summary.get("train", missing)
    names = dict.fromkeys(name for name, _, _ in (sample, train) if name)
    print(f"ratio sample={sample[1]:.2f} train={train[1]:.2f} memory={train[2]:.2f} "
          f"parity={parity['ours']['forward']:.1e} variant={','.join(names)}", flush=True)
    if not parity.get("c_entry", math.nan) <= C_ENTRY_LIMIT:
        sys.exit("the C entry did not give the program's output")


def main():
    a = parse_arguments()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.abspath(a.cache))
    with tempfile.TemporaryDirectory(prefix="ddpm-peer-") as folder:
        compare(a, folder)


if __name__ == "__main__":
    main()
