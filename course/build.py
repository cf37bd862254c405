"""Render the lecture, the labs and the slides as web pages that need no network.

    pip install -r requirements.txt -r course/requirements.txt
    python -m course.build                          all pages
    python -m course.build lecture lab0_toy         some of them
    python -m course.build --no-run                 labs without what their cells print

Reads    course/*.md, course/lab*.py, course/pictures/; the run folder of a lab, runs/course or
         runs/pretrained, which the commands at its top make. Without it, the page shows the lab
         without what its cells print
Writes   course/html/index.html, lecture.html, lab0_toy.html, ..., slides.html

A page is one file, with its pictures in it, for a computer and for a phone. jupytext reads a lab
as a notebook, nbconvert runs its cells and renders Markdown, and latex2mathml turns formulas into
MathML, which browsers show by themselves.

A lab keeps its blanks on the page. To run, it takes the five stages' own functions in their place,
so the page shows what the last cells print when all steps pass. These functions stay hidden.

Left out: the pages of docs/, to which links lead as they are on disk.
"""

import argparse
import html
import os
import re
import sys
import time
from pathlib import Path

from course import check
from plumbing.errors import UserError
from plumbing.streams import tolerant_streams

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = HERE / "html"
MISSING = "pages need other packages: pip install -r course/requirements.txt"
SECONDS = 3600  # that a cell of a lab may take

# What a browser needs to know: letters, room for wide lines, a page for each slide.
STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 1rem;
       color: #1a1a1a; background: #fff; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; }
h1 .anchor-link, h2 .anchor-link, h3 .anchor-link { display: none; }
pre { font: 14px/1.45 ui-monospace, Consolas, Menlo, monospace; background: #f5f5f5;
      padding: .7rem; overflow-x: auto; border-radius: 4px; margin: .6rem 0; }
code { font-family: ui-monospace, Consolas, Menlo, monospace; font-size: .88em; }
pre code { font-size: 1em; }
.output pre { background: #fff; border-left: 4px solid #0072b2; max-height: 32rem;
              overflow-y: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
td, th { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left; }
img { max-width: 100%; height: auto; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 4px solid #ccc; }
math[display=block] { display: block; overflow-x: auto; overflow-y: hidden; padding: .4rem 0;
                      font-size: 1.15em; }
nav { font-size: .9rem; border-bottom: 1px solid #ccc; padding-bottom: .5rem; }
.slide { min-height: 100vh; box-sizing: border-box; padding: 3vh 0; font-size: 1.5rem;
         break-after: page; scroll-snap-align: start; border-bottom: 1px solid #ccc; }
.slide img { display: block; max-height: 62vh; margin: 0 auto; }
.slide pre { font-size: 1.4rem; }
body.slides { max-width: 75rem; }
@media (max-width: 600px) { body { font-size: 16px; } pre { font-size: 12px; }
  .slide { font-size: 1.1rem; min-height: 0; } .slide pre { font-size: .75rem; } }
"""


# The packages of course/requirements.txt are imported where they are used. So this module can be
# imported without them, and main can say in a sentence what is missing.

# 1. Markdown.


def formulas(text: str) -> str:
    """Text whose blocks ```math are MathML."""
    from latex2mathml.converter import convert

    def one(match: re.Match) -> str:
        latex = " ".join(match[1].split())
        return convert(latex, display="block")

    return re.sub(r"```math\n(.*?)\n```", one, text, flags=re.S)


def links(text: str, pages: list[str]) -> str:
    """Text whose links lead from course/html to where they led from course/."""

    def one(match: re.Match) -> str:
        before, target = match[1], match[2]
        path, mark, section = target.partition("#")
        # An address such as https://..., or a section of the same page.
        is_elsewhere = ":" in path or not path
        if is_elsewhere:
            return match[0]
        # Only what lies in course/ itself may be a page; all else is linked where it is on disk.
        name = Path(path).stem if Path(path).parent == Path(".") else ""
        if name == "README":
            name = "index"
        new = f"{name}.html" if name in pages else os.path.join("..", path)
        return f"{before}({new}{mark}{section})"

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", one, text)


def images(text: str) -> str:
    """A page with the pictures themselves in place of their file names."""
    from base64 import b64encode

    def one(match: re.Match) -> str:
        # links() has put ../ before the path, because pages lie one folder deeper.
        path = OUT / match[1]
        content = b64encode(path.read_bytes()).decode()
        return f'src="data:image/{path.suffix[1:]};base64,{content}"'

    return re.sub(r'src="(?!data:)([^"]+)"', one, text)


def rendered(text: str, pages: list[str]) -> str:
    """The HTML of a Markdown text."""
    from nbconvert.filters import markdown2html

    return markdown2html(formulas(links(text, pages)))


# 2. Labs.


def notebook_of(path: Path) -> "NotebookNode":  # noqa: F821
    """A lab as a notebook, with a heading for each cell that has a title."""
    import jupytext
    from nbformat.v4 import new_markdown_cell

    notebook = jupytext.reads(path.read_text(encoding="utf-8"), "py:percent")
    cells = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and number == 0:
            # The first cell is set by hand, in columns. Its first line is the title.
            title, _, rest = cell.source.partition("\n")
            cell.source = f"# {title.rstrip('.')}\n\n```text\n{rest.strip()}\n```"
        elif cell.cell_type == "markdown":
            title, _, rest = cell.source.partition("\n")
            cell.source = f"## {title}\n{rest}"
        # What stands behind a code cell's `# %%`.
        title = cell.metadata.get("title")
        if title:
            cells.append(new_markdown_cell(f"## {title}"))
        cells.append(cell)
    notebook.cells = cells
    return notebook


def run_lab(notebook: "NotebookNode", lab: int, constants: dict) -> None:  # noqa: F821
    """Run the cells. `constants` replace those of the lab, such as RUN.

    Behind every code cell comes a hidden one, with the stages' functions in place of the blanks.
    """
    from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor
    from nbformat.v4 import new_code_cell

    names = [step.name for step in check.steps_of(lab)]
    shown = []
    hidden = []
    for cell in notebook.cells:
        shown.append(cell)
        if cell.cell_type != "code":
            continue
        lines = ["from course import check as _check"]
        for number, name in enumerate(names):
            if f"def {name}(" in cell.source:
                lines.append(f"{name} = _check.steps_of({lab})[{number}].oracle")
        for name, value in constants.items():
            if re.search(rf"^{name} = ", cell.source, re.M):
                lines.append(f"{name} = {value!r}")
        hidden.append(new_code_cell("\n".join(lines)))
        shown.append(hidden[-1])
    notebook.cells = shown
    # A lab is started in the folder of the stages.
    resources = {"metadata": {"path": str(ROOT)}}
    try:
        ExecutePreprocessor(timeout=SECONDS, kernel_name="python3").preprocess(notebook, resources)
    except CellExecutionError as error:
        last = f"{error.ename}: {error.evalue}"
        raise UserError(
            f"lab {lab} does not run to its end: {last}; the commands at the top of the lab make "
            "what it needs (--no-run leaves its cells alone)"
        ) from None
    # `is`, not ==: a cell is left out because it is hidden, not because it looks like one that is.
    notebook.cells = [cell for cell in notebook.cells if not any(cell is one for one in hidden)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Bars of progress are nothing to read.
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]


def has_run(path: Path) -> bool:
    """Whether the run folder of a lab is there. Lab 0 needs none."""
    run = getattr(check.read(path), "RUN", None)
    return run is None or (ROOT / run / "data.npz").exists()


def lab_page(path: Path, pages: list[str], run: bool, constants: dict | None = None) -> str:
    """The HTML of a lab."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    lab = int(path.name[3])
    notebook = notebook_of(path)
    if run:
        run_lab(notebook, lab, constants or {})
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(rendered(cell.source, pages))
            continue
        parts.append(highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="highlight")))
        printed = "".join(one.get("text", "") for one in cell.get("outputs", []))
        if printed:
            parts.append(f'<div class="output"><pre>{html.escape(printed)}</pre></div>')
    return "\n".join(parts)


# 3. Slides, and the page around everything.


def slides_page(path: Path, pages: list[str]) -> str:
    """The HTML of the slides: a line --- stands between two of them."""
    slides = path.read_text(encoding="utf-8").split("\n---\n")
    parts = [f'<section class="slide">{rendered(slide, pages)}</section>' for slide in slides]
    return "\n".join(parts)


def page(name: str, body: str, pages: list[str]) -> str:
    """A whole HTML file."""
    from pygments.formatters import HtmlFormatter

    colors = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    menu = " · ".join(f'<a href="{one}.html">{one.split("_")[0]}</a>' for one in pages)
    # nbconvert ends a heading with a link to itself, which is no part of the title.
    title = re.search(r"<h1[^>]*>(.*?)(<a |</h1>)", body, re.S)
    title = re.sub(r"<[^>]+>", "", title[1]) if title else name
    kind = "slides" if name == "slides" else "page"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{colors}</style></head>\n"
        f'<body class="{kind}">\n<nav>{menu}</nav>\n{images(body)}\n</body></html>\n'
    )


def sources() -> dict[str, Path]:
    """{page: the file that it is made from}."""
    found = {"index": HERE / "README.md", "lecture": HERE / "lecture.md"}
    for path in sorted(HERE.glob("lab[0-9]_*.py")):
        found[path.stem] = path
    found["slides"] = HERE / "slides.md"
    found["answers"] = HERE / "answers.md"
    return found


def build(name: str, run: bool = True, constants: dict | None = None) -> Path:
    """Write a page; its file. UserError if a lab does not run."""
    all_pages = list(sources())
    path = sources()[name]
    OUT.mkdir(exist_ok=True)
    if path.suffix == ".py":
        body = lab_page(path, all_pages, run, constants)
    elif name == "slides":
        body = slides_page(path, all_pages)
    else:
        body = rendered(path.read_text(encoding="utf-8"), all_pages)
    file = OUT / f"{name}.html"
    file.write_text(page(name, body, all_pages), encoding="utf-8")
    return file


def main(words: list[str]) -> int:
    """Build the pages that the command names; the exit status."""
    names = list(sources())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help=f"some of: {', '.join(names)} (default: all)")
    parser.add_argument("--no-run", action="store_true", help="do not run the cells of labs")
    args = parser.parse_args(words)
    unknown = [name for name in args.pages if name not in names]
    if unknown:
        parser.error(f"no page {unknown[0]}; there are {', '.join(names)}")
    # Asked for now: without ipykernel a lab would fail only when it runs, pages later.
    try:
        import ipykernel  # noqa: F401
        import jupytext  # noqa: F401
        import latex2mathml  # noqa: F401
        import nbconvert  # noqa: F401
    except ImportError as error:
        print(f"{MISSING} ({error})", file=sys.stderr)
        return 2
    for name in args.pages or names:
        start = time.perf_counter()
        path = sources()[name]
        runs = not args.no_run
        if runs and path.suffix == ".py" and not has_run(path):
            print(f"{name}: its run folder is missing, so its cells do not run")
            runs = False
        try:
            file = build(name, runs)
        except UserError as error:
            print(f"build.py: {error}", file=sys.stderr)
            return 2
        size = file.stat().st_size / 1024
        print(f"{file.relative_to(ROOT)}: {size:,.0f} KiB, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    with tolerant_streams():  # whoever reads the output may have enough, as `head` has
        sys.exit(main(sys.argv[1:]))
