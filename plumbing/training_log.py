"""The log of a training: JSON lines for programs, one line of text for a person."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plumbing import several_devices
from plumbing.errors import UserError
from plumbing.store import write_whole


def logger(folder: Path, config: Any) -> Callable[[dict], None]:
    """A function that appends a record to RUN/log.jsonl and prints it for a person."""
    path = folder / "log.jsonl"

    def log(record: dict) -> None:
        if not several_devices.is_first():
            return
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); make room") from error
        print(progress(record, config), flush=True)

    return log


def progress(record: dict, config: Any) -> str:
    """The line that a person reads for a record of the log."""
    phase = "heads, epoch" if record.get("phase") == "heads" else "epoch"
    if "validation" in record:
        return f"{phase} {record['epoch']} {validation_text(record)}"
    rate = record["batches_per_s"]
    steps_left = record["total"] - record["step"]
    seconds_left = steps_left * config.accumulate / rate
    losses = " ".join(f"{loss:.2f}" for loss in record["loss"])
    line = (
        f"{phase} {record['epoch']}/{record['epochs']} step {record['step']}/{record['total']}"
        f"  loss {losses}  lr {record['lr']:.1e}"
        f"  {rate * config.batch_size:,.0f} documents/s  {seconds_left / 60:.1f} min left"
    )
    if record["surplus"]:
        line += f"  ({record['surplus']} positive nodes beyond k)"
    if record.get("skipped"):
        line += f"  ({record['skipped']} steps skipped so far: fp16 overflow)"
    return line


def validation_text(record: dict) -> str:
    """What a validation found, by the ranking that was best."""
    result = record["validation"]
    precision = "/".join(f"{p:.1f}" for p in result["P"][record["ranking"]])
    recall = " ".join(f"{r:.1f}" for r in result["recall"])
    return (
        f"validation P@1/3/5 {precision} ranked by {record['ranking']}; shortlist recall {recall}"
    )


def keep_log(path: Path, step: int) -> None:
    """Cut a log back to what was known after `step`."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run stopped
    text = "".join(kept).encode()
    write_whole(path, lambda file: file.write(text))
