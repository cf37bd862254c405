"""Check a lab: which steps pass, and of the others what was expected, what was found, and a hint.

    python -m course.check 1                    the lab course/lab1_metrics.py
    python -m course.check my/copy_of_lab1.py   a copy of it elsewhere

The solutions are the five stages: your functions are compared with theirs, on small random data.
The command ends with 0 if all steps pass, and with 1 if not.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

from course.steps import BLANK, Answer, Step, where
from plumbing.streams import tolerant_streams

HERE = Path(__file__).resolve().parent
TITLES = {
    0: "a toy tree, by hand",
    1: "the long tail and the metrics",
    2: "the label tree",
    3: "the cascade",
    4: "negatives and losses",
    5: "a pretrained encoder",
}
STEPS = {
    0: "course.steps_toy",
    1: "course.steps_metrics",
    2: "course.steps_tree",
    3: "course.steps_cascade",
    4: "course.steps_negatives",
    5: "course.steps_pretrained",
}


class CannotCheck(Exception):
    """The lab cannot even be read; the message says why."""


def steps_of(lab: int) -> Sequence[Step]:
    """The steps of a lab, in its order."""
    return import_module(STEPS[lab]).STEPS


def file_of(word: str) -> Path:
    """The lab that a command names: by its number, or by its file. CannotCheck if there is none."""
    if word.isdigit():
        found = sorted(HERE.glob(f"lab{word}_*.py"))
        if not found:
            raise CannotCheck(f"there is no lab {word}; there are {', '.join(map(str, TITLES))}")
        return found[0]
    path = Path(word)
    if not path.is_file():
        raise CannotCheck(f"there is no file {word}; name a lab by its number, or by its file")
    return path


def read(path: Path) -> ModuleType:
    """The lab as a module. Its computing cells do not run. CannotCheck if Python cannot read it."""
    # Its name is "lab" and not "__main__", so its computing cells do not run.
    spec = importlib.util.spec_from_file_location("lab", path)
    if spec is None:
        raise CannotCheck(f"{path} is no Python file: its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise CannotCheck(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise CannotCheck(f"{path}: {where(error, str(path))}, before any step ran") from None
    return module


def number_of(module: ModuleType, path: Path) -> int:
    """Which lab a file is: its line LAB = 1 says so. CannotCheck if it does not."""
    lab = getattr(module, "LAB", None)
    if lab not in STEPS:
        raise CannotCheck(f"{path} has no line such as LAB = 1, which says which lab it is")
    return lab


def answers(module: ModuleType | SimpleNamespace, lab: int, path: Path) -> dict[str, Answer | None]:
    """{step: None if it passes, or what is wrong}."""
    found = {}
    for step in steps_of(lab):
        answer = step.answer(getattr(module, step.name, None), str(path))
        # A step that calls another one cannot be right before it. Any other hint would mislead.
        faulty = [name for name in step.uses if found[name] is not None]
        if answer is not None and answer.found != BLANK and faulty:
            hint = f"it calls {faulty[0]}, which does not pass yet: mend that step first"
            answer = answer._replace(hint=hint)
        found[step.name] = answer
    return found


def need_all_steps(lab: int, functions: dict) -> None:
    """Ends the computing cells of a lab with a sentence unless all of its steps pass.

    Computing with a wrong function would take minutes, and end in numbers that mean nothing.
    """
    found = answers(SimpleNamespace(**functions), lab, HERE)
    open_steps = [name for name, answer in found.items() if answer is not None]
    if open_steps:
        names = ", ".join(open_steps)
        sys.exit(f"first these steps have to pass: {names}; run: python -m course.check {lab}")


def print_answers(lab: int, found: dict[str, Answer | None]) -> None:
    """A line for each step, and four more for each that is filled in and does not pass."""
    print(f"lab {lab}: {TITLES[lab]}")
    for number, (name, answer) in enumerate(found.items(), 1):
        if answer is None:
            print(f"step {number}, {name}: passes")
            continue
        # Not begun: nothing is wrong yet, so nothing was expected.
        if answer.found == BLANK:
            print(f"step {number}, {name}: still a blank ({answer.hint})")
            continue
        print(f"step {number}, {name}: not yet")
        print(f"    case       {answer.case}")
        print(f"    expected   {answer.expected}")
        print(f"    found      {answer.found}")
        print(f"    hint       {answer.hint}")
    passed = sum(answer is None for answer in found.values())
    print(f"{passed} of {len(found)} steps pass")


def main(words: list[str]) -> int:
    """Check the lab that the command names; the exit status."""
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        path = file_of(words[0])
        module = read(path)
        lab = number_of(module, path)
    except CannotCheck as error:
        print(error)
        return 2
    found = answers(module, lab, path)
    print_answers(lab, found)
    return 0 if all(answer is None for answer in found.values()) else 1


if __name__ == "__main__":
    with tolerant_streams():  # whoever reads the output may have enough, as `head` has
        sys.exit(main(sys.argv[1:]))
