"""The course: it runs as it is, is saved with what it came to, repeats nothing of grpo.py, and quotes no stray number."""

import ast
import base64
import inspect
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import grpo

ROOT = Path(grpo.__file__).resolve().parent
NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]


def shown(cell) -> str:
    """All text among the outputs of a cell."""
    parts = []
    for output in cell.outputs:
        parts += [output.get("text", "")]
        parts += [str(v) for kind, v in output.get("data", {}).items() if kind.startswith("text")]
    return "\n".join(parts)


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_NOTEBOOK", "fast")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = nbformat.from_dict(NOTEBOOK)
    NotebookClient(copy, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in copy.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    text = "\n".join(map(shown, cells))
    assert text.count("Not tried yet.") == len(re.findall(r"^### Exercise", "\n".join(TEXT), re.M)) >= 14
    drawn = lambda cells: [
        i for i, cell in enumerate(cells) if any("image/png" in o.get("data", {}) for o in cell.outputs)
    ]
    assert drawn(cells) == drawn(CODE)


def test_it_is_saved_with_its_outputs_and_without_an_error():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output.output_type for cell in CODE for output in cell.outputs]
    assert "error" not in kinds and len(kinds) > len(CODE) / 2
    pictures = [o.data["image/png"] for c in CODE for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 15 and all(len(base64.b64decode(picture)) > 5000 for picture in pictures)
    assert "Traceback" not in "\n".join(map(shown, CODE))
    assert not re.search(r"/(home|root|work|tmp|Users)/", "\n".join(map(shown, CODE)))


def test_every_part_is_there_and_has_its_exercise():
    text = "\n".join(TEXT)
    assert [int(n) for n in re.findall(r"^# Part (\d+)", text, re.M)] == list(range(17))
    exercises = [int(n) for n in re.findall(r"^### Exercise (\d+)", text, re.M)]
    assert exercises == list(range(16))
    assert [int(n) for n in re.findall(r"^\*\*Exercise (\d+)\.\*\*", text, re.M)] == exercises  # its solution


def test_cells_are_short():
    assert max(cell.source.count("\n") + 1 for cell in CODE) < 15
    assert max(len(line) for cell in CODE for line in cell.source.split("\n")) <= 110


def test_nothing_of_grpo_is_written_again():
    names = {
        name for name, thing in vars(grpo).items() if inspect.isfunction(thing) or inspect.isclass(thing)
    }
    for cell in CODE:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.name not in names, cell.source
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in names, cell.source
    used = set(re.findall(r"grpo\.(?!py\b)(\w+)", "\n".join(cell.source for cell in CODE)))
    assert {name for name in used if not hasattr(grpo, name)} == set()


# Of the paper, of other projects or of arithmetic done in the same sentence: sources stand beside them.
SOURCES = r"\[(?:R1|N|GRPO|DAPO|DrGRPO|PASS)\b|simpleRL|measured on an H200|arXiv"


def test_a_measured_number_in_the_text_is_one_that_was_computed():
    results = "\n".join([shown(cell) + "\n" + cell.source for cell in CODE])
    stray = []
    for text in TEXT:
        text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|```.*?```", " ", text, flags=re.S)
        for paragraph in re.split(r"\n\s*\n(?!\|)|\n\* ", text):
            for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d+(?= ?%)", paragraph):
                if number not in results and not re.search(SOURCES, paragraph):
                    stray.append((number, paragraph))
    assert stray == []


@pytest.mark.parametrize("word", ["TODO", "issue", "session"])
def test_it_speaks_of_itself_alone(word):
    assert word.lower() not in re.sub(r"[Tt]hree sessions", "", "\n".join(TEXT)).lower()
