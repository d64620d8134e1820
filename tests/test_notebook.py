"""The course: it runs, accepts solutions, refuses mistakes, is saved with outputs, quotes what it found."""

import ast
import base64
import inspect
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import grpo

ROOT = Path(grpo.__file__).resolve().parent
NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
CHECKS = dict(re.findall(r"^check\((test_\w+), (\w+)\)$", "\n".join(cell.source for cell in CODE), re.M))
WRONG = """
wrong = ((test_2, lambda ids, p, c: ids[ids != 0]), (test_2, "text"), (test_6, 5), (test_12, 0.7),
         (test_13, lambda own, all, n: own + all // n), (test_B, sum), (test_5, lambda p: 1), (test_14, "a"))
print([attempt(*pair).startswith("Not yet.") for pair in wrong])
"""


def shown(cell) -> str:
    """All text among the outputs of a cell."""
    parts = []
    for output in cell.outputs:
        parts += [output.get("text", "")]
        parts += [str(v) for kind, v in output.get("data", {}).items() if kind.startswith("text")]
    return "\n".join(parts)


def is_solution(cell) -> bool:
    return "solution" in cell.metadata.get("tags", [])


def solved() -> nbformat.NotebookNode:
    """The notebook as a student leaves it who has solved every exercise."""
    copy, solutions = nbformat.from_dict(NOTEBOOK), {}
    for cell in filter(is_solution, copy.cells):
        for test in re.findall(r"^settle\((\w+),", cell.source, re.M):
            source = cell.source.partition("\nsettle(")[0]
            solutions[test] = f"{source}\n\n{CHECKS[test]} = solution_{test.removeprefix('test_')}\n"
    assert solutions.keys() == CHECKS.keys()
    for cell in copy.cells:
        for test in re.findall(r"^check\((\w+),", cell.source, re.M):
            cell.source = cell.source.replace(f"check({test},", f"{solutions[test]}check({test},")
    return copy


def test_it_runs_and_the_solutions_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_NOTEBOOK", "fast")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = solved()
    copy.cells.append(nbformat.v4.new_code_cell(WRONG))
    NotebookClient(copy, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(shown(cell) for cell in copy.cells if cell.cell_type == "code")
    assert text.count("Right!") == len(CHECKS) >= 21 and "Not tried yet" not in text
    assert text.count("The mistake is refused.") >= len(CHECKS)
    assert shown(copy.cells[-1]).split() == str([True] * 8).split()


def test_it_is_saved_with_its_outputs_and_without_an_error():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    text = "\n".join(map(shown, CODE))
    assert "error" not in [output.output_type for cell in CODE for output in cell.outputs]
    assert text.count("Not tried yet.") == len(CHECKS) and "Traceback" not in text
    pictures = [o.data["image/png"] for c in CODE for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 20 and all(len(base64.b64decode(picture)) > 5000 for picture in pictures)
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


def test_every_part_is_there_and_the_solutions_can_be_cut_off():
    text = "\n".join(TEXT)
    assert [int(n) for n in re.findall(r"^# Part (\d+)", text, re.M)] == list(range(17))
    assert [int(n) for n in re.findall(r"^### Exercise (\d+)", text, re.M)] == list(range(1, 17))
    assert len(re.findall(r"^\*\*Predict\.", text, re.M)) >= 12
    left = [cell.source for cell in NOTEBOOK.cells if not is_solution(cell)]
    assert not re.search(r"solution_|mistake_", "\n".join(left))


def test_cells_are_short():
    assert max(cell.source.count("\n") + 1 for cell in CODE) < 15
    assert max(len(line) for cell in CODE for line in cell.source.split("\n")) <= 110


def test_it_repeats_nothing_of_grpo():
    own = {n for n, thing in vars(grpo).items() if inspect.isfunction(thing) or inspect.isclass(thing)}
    for cell in CODE:
        assert own.isdisjoint(getattr(node, "name", "") for node in ast.parse(cell.source).body)
    used = set(re.findall(r"grpo\.(?!py\b)(\w+)", "\n".join(cell.source for cell in CODE)))
    assert {name for name in used if not hasattr(grpo, name)} == set()


def test_a_measured_number_in_the_text_is_one_that_was_computed():
    results = "\n".join(shown(cell) + "\n" + cell.source for cell in CODE)
    sources = r"\[(R1|N|S|GRPO|DAPO|PASS)\b|simpleRL|measured on an H200"
    for text in TEXT:
        text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|```.*?```", " ", text, flags=re.S)
        for paragraph in re.split(r"\n\s*\n(?!\|)|\n\* ", text):
            for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d+(?= ?%)", paragraph):
                assert number in results or re.search(sources, paragraph), (number, paragraph)


def test_it_speaks_of_itself_alone():
    assert not re.search("todo|issue|session", "\n".join(TEXT), re.I)
