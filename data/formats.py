"""How a corpus lies on disk, and how it is read: line by line, with the line's number in every complaint."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from artifacts import UserError

LONGEST = 2**28  # bytes of a line: more than that is no document


def read_jsonl(path: Path, *keys: str) -> Iterator[tuple]:
    """Yield (line number, value of each key); UserError with file and line when one is missing or no JSON."""
    number, line = 0, b""
    try:
        with gzip.open(path) as file:
            while line := file.readline(LONGEST):
                number += 1
                if len(line) == LONGEST:
                    raise UserError(f"{path} line {number}: longer than {LONGEST >> 20} MiB")
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                yield (number, *(row[key] for key in keys))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: no JSON in UTF-8 ({error})") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} line {number}: expected an object with {', '.join(keys)}: {line[:80]!r}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot say, half a surrogate pair, as question marks."""
    return text.encode("utf-8", "replace").decode()
