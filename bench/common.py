"""What the benchmarks share: the stages as modules, synthetic corpora, and a record of where figures come from."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
stages = SimpleNamespace(
    data=import_module("01_data"),
    tree=import_module("02_label_tree"),
    model=import_module("03_model"),
    train=import_module("04_train"),
    eval=import_module("05_eval"),
)


def machine(device: str = "cpu") -> dict:
    """Commit, processor, versions and date of a measurement."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {
        "commit": commit.stdout.strip() or "unknown", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {cpu}", "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__, "numpy": np.__version__,
    }


def report(out: str, config: object, rows: list[dict], device: str = "cpu") -> None:
    """Print rows (what, value, target) as a table and write them, with their origin, to the JSON file `out`."""
    origin = machine(device)
    print()
    for row in rows:
        print(f"{row['what']:76} {row['value']:>12}   {row.get('target', '')}".rstrip())
    print("\n" + ", ".join(f"{key} {value}" for key, value in origin.items() if value is not None))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({"machine": origin, "settings": vars(config), "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")
