"""Compares ddpm with PyTorch and diffusers on this machine: parity first, then time and memory.

    python tools/bench/pytorch_peer.py --ddpm build/ddpm --device cpu [--preset P] [--batch-size B]

Needs the packages of requirements.txt beside this file. Both sides run interleaved, each round of
each work in a process of its own, with all threads and in float32. PyTorch's fastest variant is the
denominator. The last line is `ratio sample=.. train=.. memory=.. parity=.. variant=..`: PyTorch's
time by ours, our peak memory by PyTorch's in training, the relative error of the network's output.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

# Nothing heavy is imported here: a child's peak, as wait4 reports it, starts from its parent's.

HERE = os.path.dirname(os.path.abspath(__file__))
WORKS = ("sample", "train")
VARIANTS = ("nchw", "channels_last", "compile", "compile_channels_last")
STEPS = {"tiny": 40, "cifar10": 5, "celebahq256": 2}
WARMUP = 2  # as ddpm bench
FORWARD_LIMIT = 5e-5
GRADIENT_LIMIT = 1e-4
HOPELESS = 1.5  # a variant whose fastest step of two rounds is so far behind is left out


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddpm", required=True, help="the program")
    parser.add_argument("--device", required=True, choices=("cpu",))
    parser.add_argument("--preset", default="cifar10", choices=STEPS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed steps of a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--variants", default="nchw,channels_last,compile", help="of " + ", ".join(VARIANTS)
    )
    arguments = parser.parse_args()
    arguments.variants = arguments.variants.split(",")
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"unknown variant {name}; known: {', '.join(VARIANTS)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not os.access(arguments.ddpm, os.X_OK):
        parser.error(f"{arguments.ddpm} is not a program; build it with tools/build.sh")
    arguments.ddpm = os.path.abspath(arguments.ddpm)
    arguments.steps = arguments.steps or STEPS[arguments.preset]
    return arguments


def run_child(command, log):
    """Runs to the end; peak resident bytes, or None if it failed."""
    with open(log, "w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024 if child.returncode == 0 else None


def tail(path, lines=15):
    with open(path, errors="replace") as file:
        return "".join(file.readlines()[-lines:])


def read_json(path):
    with open(path) as file:
        return json.load(file)


def cpu_model():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Bench:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.model = os.path.join(folder, "model")
        self.json, self.log = os.path.join(folder, "result.json"), os.path.join(folder, "log")

    def parity(self):
        a = self.arguments
        command = [sys.executable, os.path.join(HERE, "pytorch_parity.py"), "--ddpm", a.ddpm]
        command += ["--preset", a.preset, "--folder", self.model, "--json", self.json]
        command += ["--threads", str(a.threads)]
        if run_child(command, self.log) is None:
            raise SystemExit(f"the parity check did not run:\n{tail(self.log)}")
        return read_json(self.json)

    def ours(self, work):
        """(median milliseconds per step, peak bytes, fastest step)"""
        a = self.arguments
        command = [a.ddpm, "bench", work, "--model", self.model, "--device", a.device]
        command += ["--batch-size", str(a.batch_size), "--steps", str(a.steps)]
        command += ["--threads", str(a.threads), "--json", self.json]
        peak = run_child(command, self.log)
        if peak is None:
            raise SystemExit(f"ddpm bench {work} failed:\n{tail(self.log)}")
        ms = read_json(self.json)["ms_per_step"]
        return ms["median"], peak, ms["min"]

    def theirs(self, work, variant):
        """As ours; None if this variant does not run here."""
        a = self.arguments
        command = [sys.executable, os.path.join(HERE, "pytorch_work.py"), "--model", self.model]
        command += ["--work", work, "--variant", variant, "--batch-size", str(a.batch_size)]
        command += ["--threads", str(a.threads), "--warmup", str(WARMUP)]
        command += ["--steps", str(a.steps), "--json", self.json]
        if run_child(command, self.log) is None:
            print(f"{work}: variant {variant} does not run here:\n{tail(self.log, 3)}")
            return None
        result = read_json(self.json)
        # Its own reading: wait4's would include the compilers that torch.compile starts.
        return statistics.median(result["ms"]), result["peak_bytes"], min(result["ms"])


def measure(bench, rounds):
    """{work: {side: [(ms, peak, fastest) per round]}}; side "ddpm" or a variant."""
    sides = {work: ["ddpm", *bench.arguments.variants] for work in WORKS}
    results = {work: {side: [] for side in sides[work]} for work in WORKS}
    for index in range(rounds):
        for work in WORKS:
            for side in list(sides[work]):
                value = bench.ours(work) if side == "ddpm" else bench.theirs(work, side)
                if value is None:
                    sides[work].remove(side)
                    del results[work][side]
                else:
                    results[work][side].append(value)
            times = {side: results[work][side][-1][0] for side in sides[work]}
            print(f"round {index + 1}/{rounds} {work}, load {os.getloadavg()[0]:.1f}, ms per step: "
                  + ", ".join(f"{side} {ms:.1f}" for side, ms in times.items()), flush=True)
            fastest = {side: min(value[2] for value in results[work][side])
                       for side in sides[work] if side != "ddpm"}
            if not fastest:
                raise SystemExit(f"{work}: no PyTorch variant runs here")
            if index == 1:
                for side, ms in fastest.items():
                    if ms > HOPELESS * min(fastest.values()):
                        print(f"{work}: {side} is left out of the other rounds")
                        sides[work].remove(side)
    return results


def summarise(results, batch):
    """Prints a table; {work: (variant, time ratio, memory ratio)}."""
    print(f"\n{'work':8}{'side':24}{'ms/image':>10}{'min':>9}{'max':>9}{'peak MB':>10}")
    summary = {}
    for work, sides in results.items():
        for side, rounds in sides.items():
            ms = [median / batch for median, _, _ in rounds]
            peak = max(peak for _, peak, _ in rounds) / 1e6
            print(f"{work:8}{side:24}{statistics.median(ms):10.2f}{min(ms):9.2f}{max(ms):9.2f}"
                  f"{peak:10.0f}")
        ours = sides.pop("ddpm")
        full = {side: rounds for side, rounds in sides.items() if len(rounds) == len(ours)}
        best = min(full, key=lambda side: statistics.median(ms for ms, _, _ in full[side]))
        ratios = [theirs[0] / mine[0] for theirs, mine in zip(full[best], ours)]
        memory = max(peak for _, peak, _ in ours) / max(peak for _, peak, _ in full[best])
        summary[work] = (best, statistics.median(ratios), memory)
        print(f"{work:8}ratio to {best}: time {summary[work][1]:.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f} by round), memory {memory:.2f}")
    return summary


def main():
    arguments = parse_arguments()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ddpm-peer-") as folder:
        # One compilation serves every round.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
        bench = Bench(arguments, folder)
        parity = bench.parity()
        version = subprocess.run([arguments.ddpm, "--version"], capture_output=True, text=True)
        print(version.stdout.strip())
        print(parity["versions"])
        print(f"{cpu_model()}, {arguments.threads} threads; preset {arguments.preset}, batch "
              f"{arguments.batch_size}, float32")
        print("relative error against diffusers in float64, ours (PyTorch's float32): "
              f"output {parity['forward']:.1e} ({parity['pytorch_forward']:.1e}), "
              f"loss {parity['loss']:.1e} ({parity['pytorch_loss']:.1e}), "
              f"worst gradient {parity['gradient']:.1e} ({parity['pytorch_gradient']:.1e}), "
              f"of {parity['gradient_weight']}", flush=True)
        # "not <=" so that a NaN fails.
        if not (parity["forward"] <= FORWARD_LIMIT and parity["gradient"] <= GRADIENT_LIMIT):
            raise SystemExit(
                f"parity failed: at most {FORWARD_LIMIT:.0e} is allowed for the output, "
                f"{GRADIENT_LIMIT:.0e} for a gradient; nothing was timed"
            )
        results = measure(bench, arguments.rounds)
    summary = summarise(results, arguments.batch_size)
    if busy > 0.5:
        print(f"the machine was busy at the start (load {busy:.1f}): do not report these times")
    print(f"PyTorch's peaks include {parity['library_bytes'] / 1e6:.0f} MB for its libraries alone")
    variants = list(dict.fromkeys(summary[work][0] for work in WORKS))
    print(f"ratio sample={summary['sample'][1]:.2f} train={summary['train'][1]:.2f} "
          f"memory={summary['train'][2]:.2f} parity={parity['forward']:.1e} "
          f"variant={','.join(variants)}")


if __name__ == "__main__":
    main()
