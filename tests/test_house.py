"""The house rules: what may import what, who may name whom, copied blocks equal their origin, the README's commands
run.

`PYTHONPATH=. python tests/test_house.py --fix` rewrites every marked copy from its origin."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from tools import shapes

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.py"))


def test_model_files_import_nothing_of_the_project():
    allowed = {"torch", "torchvision", "safetensors"} | set(sys.stdlib_module_names)
    for path in MODELS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            assert all(n.split(".")[0] in allowed for n in names), (path.name, names)


def test_the_loop_the_evaluation_and_the_data_name_no_model():
    for file in ("train.py", "eval.py", "data.py"):
        code = re.sub(r'"""[\s\S]*?"""', "", (ROOT / file).read_text())
        code = "\n".join(line.split("#")[0] for line in code.splitlines())
        for path in MODELS:
            assert not re.search(rf"\b{path.stem}\b", code), f"{file} names {path.stem}"


def test_no_name_is_defined_twice():
    for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *MODELS, *(ROOT / "tests").glob("*.py")):
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert len(names) == len(set(names)), (path.name, [n for n in names if names.count(n) > 1])


def test_no_line_is_longer_than_120_characters():
    long = [f"{path.relative_to(ROOT)}:{n}" for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *MODELS, *(ROOT / "tests").glob("*.py"))
            for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, long


def test_model_docstrings_index_their_equations_and_deviations():
    for path in MODELS:
        text = path.read_text()
        doc, tree = ast.get_docstring(ast.parse(text)), ast.parse(text)
        assert "Equations" in doc and "Deviations" in doc and "Run:" in doc, path.name
        names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        index = doc[doc.index("Equations"):doc.index("Deviations")]
        for name in re.findall(r"(\w+)\(\)", index):
            assert name in names, f"{path.name}: the index names {name}(), which is not there"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_file_runs_by_itself(path, capsys):
    """`python models/X.py` prints a line for each of its tasks, with the losses of a random batch."""
    module = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    for task in module["TASKS"]:
        assert re.search(rf"^{task}\b.*\d", printed, re.M), f"{path.name} prints nothing of {task}: {printed}"
    assert "nan" not in printed


def blocks(path):
    """{name: source} of the top-level classes and functions, {name: mark} of those that are marked copies."""
    text = path.read_text()
    lines, sources, marks = text.splitlines(), {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            sources[node.name] = "\n".join(lines[first - 1:node.end_lineno])
            if lines[first - 2].startswith("# Copied from "):
                marks[node.name] = lines[first - 2]
    return sources, marks


def copies(everything):
    """Each marked copy as (path, name, its source, what its origin says it should be)."""
    for path, (sources, marks) in everything.items():
        for name, mark in marks.items():
            origin, block, *swaps = re.fullmatch(r"# Copied from (\S+)::(\w+)(?: with (.*))?", mark).groups()
            expected = everything[ROOT / origin][0][block]
            for swap in filter(None, (swaps[0] or "").split(",")):
                a, b = swap.strip().split("->")
                expected = expected.replace(a, b)
            yield path, name, sources[name], expected


def fix():
    for path, name, found, expected in copies({path: blocks(path) for path in MODELS}):
        if found != expected:
            path.write_text(path.read_text().replace(found, expected))
            print(f"{path.relative_to(ROOT)}: {name} rewritten")


def test_copies_equal_their_origin_and_twins_are_marked():
    everything = {path: blocks(path) for path in MODELS}
    for path, name, found, expected in copies(everything):
        assert found == expected, f"{path.name}: {name} is not its origin (python tests/test_house.py --fix)"
    seen = {}
    for path, (sources, marks) in everything.items():
        for name, source in sources.items():
            if len(source.splitlines()) >= 4 and name not in marks:
                body = "\n".join(source.splitlines()[1:])
                assert body not in seen, f"{path.name}: {name} stands unmarked in {seen.get(body)} too"
                seen[body] = path.name


# ---------------------------------------------------------------------------------------------------------------------
# The README

def commands():
    """Every python or torchrun command of the README's bash blocks, comments off, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"(?:^| )# ", line)[0].split("&&"):
                words = shlex.split(part)
                if words and words[0] in ("python", "torchrun"):
                    yield words


def theirs(words):
    """Does it need a file that only its user has, many GPUs, or the paper's sizes?"""
    files = [w for v in words for w in v.split(",")
             if re.search(r"\.(json|jsonl|tsv|txt|safetensors|pth|jpg|png|tar|csv)$", w)]
    return any(not w.startswith(("out/", "datasets/")) for w in files) or "8" in words or "base" in words


def test_readme_commands_run_with_three_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.ensure("datasets/shapes", quiet=True, scale=0.05)
    ran = 0
    for words in commands():
        script = next(w for w in words if w.endswith(".py") or w.startswith("tools."))
        argv = words[words.index(script) + 1:]
        if theirs(words) or "--help" in words:
            if script == "train.py":                                   # its flags exist
                done = subprocess.run([sys.executable, str(ROOT / script), *argv, "--help"],
                                      capture_output=True, text=True)
                for flag in re.findall(r"(--\w+)", " ".join(argv)):
                    assert flag in done.stdout, (words, flag, done.stderr)
            continue
        ran += 1
        if script == "train.py":
            train.main([*argv, "--steps", "3", "--eval_limit", "40"])
        elif script == "eval.py":
            evaluation.main(argv)
        else:
            program = ["-m", script] if script.startswith("tools.") else [str(ROOT / script)]
            subprocess.run([sys.executable, *program, *argv], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran >= 4


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
