"""The conversation of pytorch_peer.py with the processes that it times.

A worker prepares its work, warms up and says that it is ready. Then, for each number of steps that
it is sent, it runs them and answers with the milliseconds per step. All in lines of JSON.
"""

import json
import os
import select
import subprocess
import sys
import time

WARM_UP_STEPS = 3  # at least: the first are prepared one by one, or recorded
WARM_UP_SECONDS = {"cpu": 0.0, "cuda": 1.0}
LEAD_IN_SECONDS = {"cpu": 0.0, "cuda": 0.2}  # untimed, before each round: clocks rise again


def hwm_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def read_json(path):
    with open(path) as file:
        return json.load(file)


def serve(device, run, peak_bytes, about, warm=lambda: None):
    """run(n) does n steps, waits for them and returns the milliseconds per step of each part that
    was timed; peak_bytes() is what the process has needed; about goes with the first answer; warm()
    is called before it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(value):
        out.write(json.dumps(value) + "\n")
        out.flush()

    def go_on_for(seconds):
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            run(1)

    for _ in range(WARM_UP_STEPS):
        run(1)
    go_on_for(WARM_UP_SECONDS[device])
    warm()
    answer(about)
    for line in sys.stdin:
        run(1)
        go_on_for(LEAD_IN_SECONDS[device])
        ms = run(int(line))
        answer({"ms": ms, "peak_bytes": peak_bytes()})


class Worker:
    """The parent's end. None instead of an answer means that the worker failed or was too slow."""

    def __init__(self, command, log):
        self.log = log
        self.started = time.monotonic()
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0)
        self.buffer = b""

    def ready(self, seconds):
        return self.receive(seconds)

    def run(self, steps, seconds):
        try:
            self.process.stdin.write(b"%d\n" % steps)
        except BrokenPipeError:
            return None
        return self.receive(seconds)

    def receive(self, seconds):
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def why(self):
        """The last lines of its log, or that it was too slow."""
        if self.process.poll() is None:
            return f"not ready after {time.monotonic() - self.started:.0f} s"
        with open(self.log, errors="replace") as file:
            return f"exit {self.process.returncode}: " + "".join(file.readlines()[-12:]).rstrip()

    def close(self):
        if self.process.poll() is None:
            self.process.stdin.close()  # the end of its input ends it
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
