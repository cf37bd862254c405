"""Flags from a dataclass, and how a script begins and ends."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plumbing.errors import UserError
from plumbing.memory import peak_memory
from plumbing.precision import set_up_torch


def flag(default: Any, help: str, type: Callable | None = None) -> Any:
    """A dataclass field that becomes a command-line flag; `type` is needed only where the default is None."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type or default.__class__})


def parse(config_class: type, doc: str, argv: list[str] | None = None) -> Any:
    """The frozen dataclass `config_class`, filled from the command line. --help shows `doc` and every flag."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(config_class):
        name = "--" + field.name.replace("_", "-")
        if field.metadata["type"] is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
        else:
            shown = "" if field.default in (None, "") else f" [{field.default}]"
            text = (field.metadata["help"] + shown).replace("%", "%%")
            parser.add_argument(name, type=field.metadata["type"], default=field.default, help=text, metavar="")
    return config_class(**vars(parser.parse_args(argv)))


def settings(config: Any) -> dict:
    """What decides the result: all but where the run lies, whether it goes on and how often it is saved."""
    others = ("run", "resume", "save_every")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in others}


def settle(config: Any, recipes: dict[str, dict], encoder: str) -> Any:
    """The settings, with those left open (None) taken from the recipe for 'tiny' or for 'pretrained' encoders."""
    recipe = recipes["tiny" if encoder == "tiny" else "pretrained"]
    left_open = {key: value for key, value in recipe.items() if getattr(config, key, "no such setting") is None}
    return dataclasses.replace(config, **left_open)


def main(stage: Callable[[Any], Any], config_class: type, doc: str) -> None:
    """Run a stage from the command line and print the time and the memory it took. A UserError ends it with exit code
    2, Ctrl-C with 130."""
    start, name = time.perf_counter(), Path(sys.argv[0]).name
    config = parse(config_class, doc)
    set_up_torch()
    try:
        stage(config)
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted{interrupt}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a screen or a disk that fails is no fault of the program
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"[{name} took {time.perf_counter() - start:.0f} s{peak_memory()}]")


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
    numbers = text.split(",")
    if not all(part.strip().isdigit() for part in numbers) or n not in (None, len(numbers)):
        raise UserError(f"{what} {text!r}: expected {n or 'some'} whole numbers separated by commas, such as 64,192")
    return [int(part) for part in numbers]


def pair(text: str, what: str) -> tuple[float, float]:
    """'0.55,1.5' -> (0.55, 1.5)."""
    try:
        first, second = (float(part) for part in text.split(","))
        return first, second
    except ValueError:
        raise UserError(f"{what} {text}: expected two numbers such as 0.55,1.5") from None
