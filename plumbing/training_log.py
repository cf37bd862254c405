"""The log of a training: JSON lines for programs, one line of text for a person."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plumbing.errors import UserError
from plumbing.store import write_whole


def logger(folder: Path, config: Any) -> Callable[[dict], None]:
    """A function that appends a record to RUN/log.jsonl, to be followed while it grows, and prints it for a person."""

    def log(record: dict) -> None:
        try:
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{folder / 'log.jsonl'} cannot be written ({error.strerror}); make room") from error
        print(progress(record, config), flush=True)

    return log


def progress(record: dict, config: Any) -> str:
    """The line that a person reads for a record of the log."""
    phase = "heads, epoch" if record.get("phase") == "heads" else "epoch"
    if "validation" in record:
        precision, recall = record["validation"]["P"][record["ranking"]], record["validation"]["recall"]
        return (f"{phase} {record['epoch']} validation P@1/3/5 {'/'.join(f'{p:.1f}' for p in precision)} ranked by "
                f"{record['ranking']}; shortlist recall {' '.join(f'{r:.1f}' for r in recall)}")
    rate = record["batches_per_s"]
    left = (record["total"] - record["step"]) * config.accumulate / rate
    return (f"{phase} {record['epoch']}/{record['epochs']} step {record['step']}/{record['total']}"
            f"  loss {' '.join(f'{loss:.2f}' for loss in record['loss'])}  lr {record['lr']:.1e}"
            f"  {rate * config.batch_size:,.0f} documents/s  {left / 60:.1f} min left"
            + (f"  ({record['surplus']} positive nodes beyond k)" if record["surplus"] else "")
            + (f"  ({record['skipped']} steps skipped so far: fp16 overflow)" if record.get("skipped") else ""))


def keep_log(path: Path, step: int) -> None:
    """Cut a log of JSON lines back to what was known after `step`."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run stopped
    write_whole(path, lambda file: file.write("".join(kept).encode()))
