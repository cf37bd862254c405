"""The course's web pages and pictures: what they show, that they need no network, and that a phone
can show them.
"""

import ast
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, stages

from course import build, pictures
from plumbing.errors import UserError

for package in ("jupytext", "nbconvert", "ipykernel", "latex2mathml"):
    pytest.importorskip(package, reason=build.MISSING)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder for pages as far from the pictures as course/html is."""
    monkeypatch.setattr(build, "OUT", tmp_path / "html")
    (tmp_path / "pictures").symlink_to(build.HERE / "pictures")
    return tmp_path / "html"


@pytest.fixture
def all_pages(out, capsys, monkeypatch):
    monkeypatch.setattr(build, "ROOT", out.parent)
    assert build.main(["--no-run"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(build.sources())
    return {name: (out / f"{name}.html").read_text() for name in build.sources()}


# 1. Pages.


def test_pages_need_nothing_but_themselves(all_pages):
    for name, page in all_pages.items():
        assert "<script" not in page and "<link" not in page, name
        sources = re.findall(r'src="([^"]*)"', page)
        assert all(source.startswith("data:image/") for source in sources), name
    assert len(re.findall(r'src="data:image/gif', all_pages["lecture"])) == 1
    assert len(re.findall(r'src="data:image/', all_pages["slides"])) == 4


def test_every_formula_is_mathml(all_pages):
    for name in ("lecture", "slides"):
        blocks = build.sources()[name].read_text().count("```math")
        assert all_pages[name].count("<math") == blocks > 0
        assert "\\frac" not in all_pages[name] and "```" not in all_pages[name]


def test_links_lead_somewhere(all_pages, out):
    for name, page in all_pages.items():
        for target in re.findall(r'<a href="([^"#][^"]*)"', page):
            path = target.partition("#")[0]
            if path.startswith("http"):
                continue
            if path in {f"{one}.html" for one in all_pages}:
                continue
            # The pages of docs/, and other files of the project, as seen from course/html.
            assert (build.HERE / "html" / path).resolve().exists(), f"{name}: {target}"


def test_slides_are_eight(all_pages):
    assert all_pages["slides"].count('<section class="slide">') == 8


@pytest.mark.parametrize("lab", sorted((ROOT / "course").glob("lab*.py")), ids=lambda lab: lab.stem)
def test_a_notebook_of_a_lab_has_all_of_its_code_in_cells_of_code(lab):
    """Without a line `# %%` before them, imports would be a part of the text above."""
    notebook = build.notebook_of(lab)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = ast.parse("\n\n".join(cells))
    imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
    everything = ast.walk(ast.parse(lab.read_text()))
    expected = [node for node in everything if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) == len(expected) > 0


def test_a_lab_runs_and_keeps_its_blanks(out):
    page = build.build("lab0_toy").read_text()
    printed = re.findall(r'<div class="output"><pre>(.*?)</pre>', page, re.S)
    assert len(printed) == 1 and "labels scored        [1, 2, 6, 7]" in printed[0]
    assert page.count("NotImplementedError") == 5  # four blanks, and the sentence about them
    assert "oracle" not in page and "_check" not in page


def test_a_lab_with_a_run_folder_shows_its_table(out, done):
    page = build.build("lab1_metrics", constants={"RUN": str(done)}).read_text()
    assert "20 neighbours" in re.findall(r'<div class="output"><pre>(.*?)</pre>', page, re.S)[-1]


def test_a_lab_whose_run_is_missing_says_so(out, tmp_path, capsys):
    with pytest.raises(UserError, match="lab 1 does not run.*data.npz is missing.*--no-run"):
        build.build("lab1_metrics", constants={"RUN": str(tmp_path / "none")})


def test_a_lab_without_its_run_folder_is_shown_without_output(out, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", out.parent)  # no runs/ in there
    assert build.main(["lab2_tree"]) == 0
    assert "lab2_tree: its run folder is missing" in capsys.readouterr().out
    page = (out / "lab2_tree.html").read_text()
    assert "NotImplementedError" in page and 'class="output"' not in page
    assert build.has_run(build.sources()["lab0_toy"])


def test_packages_that_are_missing_and_pages_that_are_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        build.main(["lab9"])
    assert "no page lab9; there are index, lecture, lab0_toy" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jupytext", None)
    assert build.main([]) == 2
    assert "pip install -r course/requirements.txt" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which looks at the pages")
def test_a_phone_shows_every_page(all_pages, out, tmp_path):
    """A wide block scrolls within itself: the page is as wide as the phone."""
    ask = "<script>document.title = 'width ' + document.documentElement.scrollWidth</script>"
    for name, page in all_pages.items():
        asking = out / "asking.html"
        asking.write_text(page.replace("</body>", ask + "</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--window-size=390,800", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run(
            [CHROMIUM, *flags, "--dump-dom", asking.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        width = int(re.search(r"<title>width (\d+)", done.stdout)[1])
        # A browser without a screen may not go below 500.
        assert width <= 500, name


# 2. Pictures.


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory, done):
    """A run whose tree has enough clusters for the map."""
    run = tmp_path_factory.mktemp("wide")
    (run / "data.npz").write_bytes((done / "data.npz").read_bytes())
    stages.tree.run(stages.tree.Config(run=str(run), levels="16,32"))
    settings = SMALL | {"topk": "4,8", "epochs": 1}
    stages.train.run(stages.train.Config(run=str(run), **settings))
    return run


def test_the_pictures_of_a_run(wide_run, tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image", reason="comes with matplotlib")
    pictures.run(pictures.Config(run=str(wide_run), out=str(tmp_path)))
    names = ["funnel.gif", "recall-cost.png", "tail.png", "tree.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    funnel = Image.open(tmp_path / "funnel.gif")
    assert funnel.n_frames == 4  # the document alone, two cluster levels, the labels
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 300_000


def test_a_tree_that_is_too_small_for_the_map(done, tmp_path):
    with pytest.raises(UserError, match=r"\[8\].*--levels 16,128"):
        pictures.run(pictures.Config(run=str(done), out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_what_is_lost_on_the_way(wide_run):
    """Against a loop over the labels of a document."""
    data = stages.data.load(wide_run)
    model, trained, ranking = stages.train.load(wide_run, data)
    model.eval()
    for document in range(20):
        found = pictures.descent_of(model, data, trained.max_len, document, ranking)
        split = data.splits["test"]
        labels = split.labels[split.label_offsets[document] : split.label_offsets[document + 1]]
        slots = []
        for label in labels:
            slots.append(int(np.flatnonzero(model.slot_to_label.numpy() == label)[0]))
        assert found.slots.tolist() == slots
        assert found.correct == [data.names[label] for label in labels]
        for t, kept in enumerate(found.kept):
            width = model.counts[-1] // model.counts[t + 1]
            lost = [slot for slot in slots if slot // width not in set(kept.tolist())]
            assert found.n_lost[t] == len(lost)


def test_a_beam_that_keeps_everything_loses_nothing(wide_run):
    data = stages.data.load(wide_run)
    model, trained, ranking = stages.train.load(wide_run, data)
    model.eval()
    assert pictures.beams_of([1, 16, 32, 64]) == [[4, 8], [8, 16], [16, 32]]
    points = pictures.measure_beams(model, data, trained, ranking)
    scored = [point[0] for point in points]
    assert scored == [16 + 4 * 2 + 8 * model.counts[-1] // 32, *scored[1:]]
    assert scored[-1] == sum(model.counts[1:]) and points[-1][1] == 100
    assert scored == sorted(scored) and model.topk == [4, 8]


def test_a_strip_shows_every_node():
    """Also nodes that are narrower than a place."""
    state = pictures.strip(10 * pictures.PLACES, np.array([5, 17]), np.array([17]))
    assert state[0] == 1 and state[1] == 2 and state[2:].sum() == 0
    wide = pictures.strip(3, np.array([0, 2]), None)
    assert wide.tolist() == [1] * 300 + [0] * 300 + [1] * 300
