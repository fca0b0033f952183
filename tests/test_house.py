"""The house rules: what may import what, who may name whom, copied blocks equal their origin."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.py"))


def test_model_files_import_nothing_of_the_project():
    allowed = {"torch", "torchvision", "safetensors"} | set(sys.stdlib_module_names)
    for path in MODELS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in allowed for n in names), (path.name, names)


def test_the_loop_the_evaluation_and_the_data_name_no_model():
    for file in ("train.py", "eval.py", "data.py"):
        code = re.sub(r'"""[\s\S]*?"""', "", (ROOT / file).read_text())
        code = "\n".join(line.split("#")[0] for line in code.splitlines())
        for path in MODELS:
            assert not re.search(rf"\b{path.stem}\b", code), f"{file} names {path.stem}"


def test_model_docstrings_index_their_equations_and_deviations():
    for path in MODELS:
        text = path.read_text()
        doc, tree = ast.get_docstring(ast.parse(text)), ast.parse(text)
        assert "Equations" in doc and "Deviations" in doc and "Run:" in doc, path.name
        names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        index = doc[doc.index("Equations"):doc.index("Deviations")]
        for name in re.findall(r"(\w+)\(\)", index):
            assert name in names, f"{path.name}: the index names {name}(), which is not there"


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


def test_copies_equal_their_origin_and_twins_are_marked():
    everything = {path: blocks(path) for path in MODELS}
    for path, (sources, marks) in everything.items():
        for name, mark in marks.items():
            origin, block, *swaps = re.fullmatch(r"# Copied from (\S+)::(\w+)(?: with (.*))?", mark).groups()
            expected = everything[ROOT / origin][0][block]
            for swap in filter(None, (swaps[0] or "").split(",")):
                a, b = swap.strip().split("->")
                expected = expected.replace(a, b)
            assert sources[name] == expected, f"{path.name}: {name} is not its origin {origin}::{block}"
    seen = {}
    for path, (sources, marks) in everything.items():
        for name, source in sources.items():
            if len(source.splitlines()) >= 4 and name not in marks:
                body = "\n".join(source.splitlines()[1:])
                assert body not in seen, f"{path.name}: {name} stands unmarked in {seen.get(body)} too"
                seen[body] = path.name
