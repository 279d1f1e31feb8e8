"""Gathers what tools/gpu_validate.sh left in a folder into docs/gpu/CHIP.json and a page of it.

    python tools/python/gpu_report.py runs/gpu build/gpu/ddpm
"""

import datetime
import glob
import json
import os
import re
import subprocess
import sys

PHASES = ("configure", "build", "ceilings", "test", "sanitize", "bench", "train")


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def figures(folder):
    """Every number of the JSON files that `ddpm bench` wrote, and the peer's last line."""
    rows = []
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path) as file:
            result = json.load(file)
        for row in result.get("figures", [result]):
            measured = row.get("measured", row.get("ms_per_step", {}).get("median"))
            rows.append({"name": row.get("name", name), "measured": measured,
                         "floor": row.get("floor"), "peer": None})
    log = os.path.join(folder, "bench.log")
    if os.path.exists(log):
        with open(log) as file:
            for line in file:
                for key, value in re.findall(r"(\w+)=([\d.e+-]+)", line) if line.startswith(
                    "ratio ") else ():
                    rows.append({"name": "ratio " + key, "measured": float(value), "floor": None,
                                 "peer": "pytorch"})
    return rows


def page(report):
    lines = [f"# {report['chip']}", "", f"Driver {report['driver']}, commit {report['commit']}, "
             f"{report['date']}. Made by `tools/gpu_validate.sh`.", "", "| phase | passed |",
             "|---|---|"]
    lines += [f"| {name} | {'yes' if ok else 'no'} |" for name, ok in report["phases"].items()]
    lines += ["", "| figure | measured | floor | peer |", "|---|---|---|---|"]
    show = lambda value: "" if value is None else f"{value:.4g}" if isinstance(
        value, float) else str(value)
    lines += [f"| {f['name']} | {show(f['measured'])} | {show(f['floor'])} | {show(f['peer'])} |"
              for f in report["figures"]]
    return "\n".join(lines) + "\n"


def main():
    folder, program = sys.argv[1:]
    gpu = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    chip, driver = (gpu.splitlines()[0].split(", ") if gpu else ["no GPU", "none"])
    report = {
        "chip": chip,
        "driver": driver,
        "versions": output(program, "--version").splitlines() + output(
            "nvcc", "--version").splitlines()[-1:],
        "commit": output("git", "describe", "--always", "--dirty"),
        "date": datetime.date.today().isoformat(),
        "phases": {p: os.path.exists(os.path.join(folder, p + ".passed")) for p in PHASES},
        "figures": figures(folder),
    }
    os.makedirs("docs/gpu", exist_ok=True)
    base = os.path.join("docs/gpu", re.sub(r"[^A-Za-z0-9]+", "-", chip).strip("-"))
    with open(base + ".json", "w") as file:
        json.dump(report, file, indent=1)
    with open(base + ".md", "w") as file:
        file.write(page(report))
    print(base + ".json")


if __name__ == "__main__":
    main()
