"""What a step of a lab is, and how the answer to a student's function comes about.

A step has cases: arguments for one function of the lab. The oracle, which is a function of the five
stages, says what each case should give. Where the student's function gives something else, we look
for the reason: a step knows some typical mistakes as functions of their own. If such a function
gives what the student's function gave, its hint fits. Other mistakes show in a property of the
result, such as halves of unequal size. Otherwise the step's general hint is shown.

A check never ends in a traceback: what goes wrong in a student's function is an answer, too.
"""

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

BLANK = "a blank"


class Case(NamedTuple):
    """One call of a student's function."""

    what: str  # what the arguments are, for the answer
    arguments: tuple


class Mistake(NamedTuple):
    """A typical wrong solution, and the hint for whoever has written it."""

    function: Callable
    hint: str


class Sign(NamedTuple):
    """A property of a wrong result that says what is wrong, whatever its numbers are."""

    test: Callable[..., bool]  # test(result, *arguments of the case)
    hint: str


class Answer(NamedTuple):
    """Why a step does not pass. Of a blank the check shows the hint alone."""

    case: str
    expected: str
    found: str
    hint: str


def unchanged(result: Any) -> Any:
    """Compare the result as it is."""
    return result


@dataclass(frozen=True)
class Step:
    """A function of a lab that a student fills in."""

    name: str  # of the function
    oracle: Callable  # the same function, made of the stages
    cases: Sequence[Case]
    mistakes: Sequence[Mistake]
    hint: str  # where no typical mistake is recognised
    signs: Sequence[Sign] = ()
    tolerance: float = 1e-9
    view: Callable[[Any], Any] = unchanged  # the part of a result that counts, such as a sorted one
    # Where a student writes down the answer itself: {a part of the result: a hint for it}. The
    # check then says of each part whether it is right, and does not give the solution away.
    parts: Mapping[str, str] = field(default_factory=dict)
    uses: Sequence[str] = ()  # steps that this one calls: if they are wrong, so is this one

    def answer(self, function: Callable | None, file: str) -> Answer | None:
        """None if the student's function passes. `file` is the lab, whose lines errors name."""
        if not callable(function):
            return Answer(
                "the file", f"a function {self.name}", "none", f"put back: def {self.name}(...)"
            )
        for case in self.cases:
            answer = self.answer_to_case(function, case, file)
            if answer is not None:
                return answer
        return None

    def answer_to_case(self, function: Callable, case: Case, file: str) -> Answer | None:
        expected = values_of(self.view(result_of(self.oracle, case)))
        wanted = self.wanted(expected)
        # 1. Call the student's function.
        try:
            result = result_of(function, case)
            if result is None:
                return Answer(case.what, wanted, "None", "does your function return?")
            found = values_of(self.view(result))
        except NotImplementedError as error:
            return Answer(case.what, wanted, BLANK, str(error))
        except KeyboardInterrupt:
            return Answer(case.what, wanted, "no end: you interrupted it", "does your loop end?")
        except Exception as error:
            return Answer(case.what, wanted, where(error, file), self.hint)
        # 2. Is it right?
        if same(found, expected, self.tolerance):
            return None
        wanted = self.wanted(expected, found)
        given = self.given(expected, found)
        # 3. Is it a mistake that we know? A known mistake may fail on this case: then it is not it.
        for mistake in self.mistakes:
            try:
                wrong = values_of(self.view(result_of(mistake.function, case)))
            except Exception:
                continue
            is_number = not any(np.isnan(array).any() for array in wrong)  # nan has many reasons
            if is_number and same(found, wrong, max(self.tolerance, 1e-9)):
                return Answer(case.what, wanted, given, mistake.hint)
        # 4. Does the result have a property that no right one has?
        for sign in self.signs:
            try:
                shows = sign.test(result, *copy.deepcopy(case.arguments))
            except Exception:
                continue
            if shows:
                return Answer(case.what, wanted, given, sign.hint)
        # 5. Is the result made of parts? The later parts follow from the first wrong one.
        if self.parts:
            hint = self.parts[self.wrong_parts(expected, found)[0]]
            return Answer(case.what, wanted, given, hint)
        # 6. If not, the shape may say more than the numbers.
        hint = self.hint
        shapes = [values.shape for values in expected]
        found_shapes = [values.shape for values in found]
        if shapes != found_shapes:
            hint = f"the shape should be {listed(shapes)} and is {listed(found_shapes)}; {hint}"
        return Answer(case.what, wanted, given, hint)

    def wrong_parts(self, expected: list[np.ndarray], found: Sequence[np.ndarray]) -> list[str]:
        """The names of the parts that are not right."""
        wrong = []
        for name, ours, theirs in zip(self.parts, found, expected, strict=True):
            if not same([ours], [theirs], self.tolerance):
                wrong.append(name)
        return wrong

    def wanted(self, expected: list[np.ndarray], found: Sequence[np.ndarray] = ()) -> str:
        """What an answer says was expected: of a result in parts, only which of them are right."""
        if not self.parts:
            return shown(expected)
        if not found:
            return f"lists for: {', '.join(self.parts)}"
        wrong = self.wrong_parts(expected, found)
        judged = [f"{name} {'wrong' if name in wrong else 'right'}" for name in self.parts]
        return ", ".join(judged)

    def given(self, expected: list[np.ndarray], found: list[np.ndarray]) -> str:
        """What an answer says was found: of a result in parts, the first wrong one."""
        if not self.parts:
            return shown(found)
        first = self.wrong_parts(expected, found)[0]
        place = list(self.parts).index(first)
        return f"{first} {shown([found[place]])}"


def result_of(function: Callable, case: Case) -> Any:
    """Call a function. Its arguments are copies: it may change them. What it yields is a list."""
    result = function(*copy.deepcopy(case.arguments))
    if isinstance(result, Iterator):
        return list(result)
    return result


def values_of(result: Any) -> list[np.ndarray]:
    """A result as a list of arrays, whatever it is made of."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        # A list of numbers is an array; a list of anything else is several results.
        if all(isinstance(part, (int, float, bool, np.number)) for part in result):
            return [np.asarray(result, np.float64)]
        arrays = []
        for part in result:
            arrays.extend(values_of(part))
        return arrays
    if isinstance(result, torch.Tensor):
        return [result.detach().to(torch.float64).numpy()]
    if sparse.issparse(result):
        return [result.toarray().astype(np.float64)]
    return [np.asarray(result).astype(np.float64)]


def same(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> bool:
    """Whether all arrays have the same shapes and, up to the tolerance, the same numbers."""
    if len(found) != len(expected):
        return False
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return False
        if not np.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):
            return False
    return True


def shown(arrays: list[np.ndarray]) -> str:
    """Arrays on a line; of a large one the beginning."""
    parts = []
    for array in arrays[:6]:
        flat = array.ravel()
        numbers = " ".join(f"{number:.6g}" for number in flat[:10])
        more = " ..." if flat.size > 10 else ""
        parts.append(f"[{numbers}{more}]")
    if len(arrays) > 6:
        parts.append(f"... ({len(arrays)} in all)")
    return " ".join(parts)


def listed(shapes: list[tuple]) -> str:
    """Shapes as words: the only one without brackets around it."""
    if len(shapes) == 1:
        return str(shapes[0])
    return f"{len(shapes)} arrays {shapes[:6]}"


def where(error: Exception, file: str) -> str:
    """What was raised, and on which line of the lab."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == file]  # fmt: skip
    place = f" on line {lines[-1]} of the lab" if lines else ""
    return f"{type(error).__name__}{place}: {error}"
