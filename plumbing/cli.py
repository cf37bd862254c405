"""Flags from a dataclass, and how a script begins and ends."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plumbing import several_devices
from plumbing.errors import UserError
from plumbing.memory import peak_memory
from plumbing.precision import set_up_torch
from plumbing.streams import lost_output, tolerant_streams

# Settings that do not decide the result: where the run lies, how it is saved, and whether a GPU is
# asked for every operation or for a recording of them.
NOT_SETTINGS = ("run", "resume", "save_every", "graphs")
# Settings that stood on the command line, even those that have the value of their default.
GIVEN: set[str] = set()


# 1. A dataclass becomes a command line.


def flag(default: Any, help: str, type: Callable | None = None) -> Any:
    """A dataclass field that becomes a flag. `type` is needed only where the default is None."""
    metadata = {"help": help, "type": type or default.__class__}
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_class: type, doc: str, argv: list[str] | None = None) -> Any:
    """The frozen dataclass `config_class`, filled from the command line; --help shows `doc`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(config_class):
        name = "--" + field.name.replace("_", "-")
        help = field.metadata["help"]
        type = field.metadata["type"]
        if type is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        if field.default not in (None, ""):
            help += f" [{field.default}]"
        help = help.replace("%", "%%")
        # What is not given is left to the dataclass: so we know what was given.
        parser.add_argument(name, type=type, default=argparse.SUPPRESS, help=help, metavar="")
    given = vars(parser.parse_args(argv))
    GIVEN.clear()
    GIVEN.update(given)
    return config_class(**given)


def settings(config: Any) -> dict:
    """The settings that decide the result."""
    values = dataclasses.asdict(config)
    return {key: value for key, value in values.items() if key not in NOT_SETTINGS}


def settle(config: Any, recipes: dict[str, dict], meta: dict) -> Any:
    """The settings, with those left open (None) taken from the recipe for the encoder.

    `meta` is the record of data.npz. Stage 1 has tried the encoder, and may say in "pooling" what
    suits it.
    """
    recipe = dict(recipes["tiny" if meta["encoder"] == "tiny" else "pretrained"])
    recipe["pooling"] = meta.get("pooling", recipe["pooling"])
    left_open = {}
    for key, value in recipe.items():
        if hasattr(config, key) and getattr(config, key) is None:
            left_open[key] = value
    return dataclasses.replace(config, **left_open)


# 2. Types of flags.


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def natural(text: str) -> int:
    """A flag's whole number of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def rate(text: str) -> float:
    """A flag's number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return float(text)


def int_list(text: str, what: str, n: int | None = None) -> list[int]:
    """'64,192' -> [64, 192]; exactly n of them where n is given."""
    parts = text.split(",")
    are_numbers = all(part.strip().isdigit() for part in parts)
    if not are_numbers or n not in (None, len(parts)):
        raise UserError(
            f"{what} {text!r}: expected {n or 'some'} whole numbers separated by commas, "
            "such as 64,192"
        )
    return [int(part) for part in parts]


def pair(text: str, what: str) -> tuple[float, float]:
    """'0.55,1.5' -> (0.55, 1.5)."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{what} {text}: expected two numbers such as 0.55,1.5") from None
    return first, second


# 3. Running a script.


def main(stage: Callable[[Any], Any], config_class: type, doc: str, several: bool = False) -> None:
    """Run a stage from the command line, and print the time and the memory that it took.

    `several`: whether it may run on several devices, by torchrun.

    A UserError ends it with exit code 2 and one line, Ctrl-C with 130. Nothing that is printed on
    the way can end it (plumbing/streams.py).
    """
    try:
        with tolerant_streams():
            run_stage(stage, config_class, doc, several)
    finally:
        GIVEN.clear()


def run_stage(stage: Callable[[Any], Any], config_class: type, doc: str, several: bool) -> None:
    """main, where nothing that is printed can fail."""
    start = time.perf_counter()
    name = Path(sys.argv[0]).name
    config = parse(config_class, doc)
    set_up_torch()
    try:
        several_devices.join(several)
        stage(config)
        several_devices.leave()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted{interrupt}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a disk that fails is no fault of the program
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"[{name} took {time.perf_counter() - start:.0f} s{peak_memory()}]")
    reason = lost_output()
    if reason:
        print(
            f"{name}: error: the work is done and its files are whole, but a part of what was "
            f"printed is lost ({reason})",
            file=sys.stderr,
        )
        sys.exit(2)
