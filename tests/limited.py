"""Work in a process of its own whose memory is limited: a claim about memory can fail there."""

import os
import subprocess
import sys
from pathlib import Path

PRELUDE = """
import resource, sys
import torch
import lightning_prune as lp

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def limit(extra):
    # of what a process can write to; files that it has mapped do not count
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(status("VmData") + extra), hard))

def refused(work):
    try:
        work()
    except (MemoryError, RuntimeError):
        return True
    return False

torch.set_num_threads(1)
"""


def in_a_process(code, *args):
    """Run the code after the prelude with `sys.argv[1:] = args`; its failure is one of the test."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is given back, and does not hide what is needed
    }
    command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
