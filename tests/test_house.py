"""The house rules: what may import what, how files read, copied blocks equal their origin, the
pages say what the code does.

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
import torch

import data
import eval as evaluation
import train
from tools import shapes, weights

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
CODE = [*sorted(ROOT.glob("*.py")), *TOOLS, *MODELS]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def imports(path):
    """The modules that a file imports, `from a import b` as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    """How a file is imported: "data", "tools.shapes"; "tools" is tools/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(path):
    """Which files of the project a file imports, as "data" or "tools.shapes"."""
    own = {module_name(p) for p in CODE}
    return {name for name in imports(path) if name in own}


# --------------------------------------------------------------------------------------------------
# Who may know whom

def test_model_files_import_nothing_of_the_project():
    allowed = {"torch", "torchvision", "safetensors"} | set(sys.stdlib_module_names)
    for path in MODELS:
        foreign = {name.split(".")[0] for name in imports(path)} - allowed
        assert not foreign, (path.name, foreign)


def test_records_are_read_without_torch():
    allowed = {"numpy", "PIL", "tqdm", "tools"} | set(sys.stdlib_module_names)
    for path in (ROOT / "formats.py", ROOT / "tools" / "__init__.py"):
        foreign = {name.split(".")[0] for name in imports(path)} - allowed
        assert not foreign, (path.name, foreign)


def test_the_others_import_no_model():
    """By the import and not by the name: a model may be called clip, as one of data.py's norms."""
    for path in CODE:
        models = [name for name in imports(path) if name.split(".")[0] == "models"]
        assert path in MODELS or not models, (path.name, models)


def test_arrows_run_downwards():
    """train -> tools.runs and eval -> data -> formats -> tools.shapes; nothing imports train, lait,
    regions or tables; no circle."""
    allowed = {"train": {"eval", "data", "tools.runs", "tools.shapes", "tools.weights"},
               "eval": {"data", "tools.shapes", "tools.weights"},
               "data": {"formats", "tools.shapes"}, "formats": {"tools.shapes"},
               "tools.shapes": set(), "tools.weights": set(),
               "tools.runs": {"data", "tools.weights"}, "tools.regions": {"data", "tools.weights"},
               "tools.lait": {"data", "tools.weights"},
               "tools.tables": {"tools.weights"}, "tools": set()}
    allowed = {name: theirs | {"tools"} for name, theirs in allowed.items()}    # the lowest
    found = {module_name(p): within(p) for p in CODE if p not in MODELS}
    assert set(found) == set(allowed)
    for name, theirs in found.items():
        assert theirs <= allowed[name], (name, theirs - allowed[name])


# --------------------------------------------------------------------------------------------------
# How files read

def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_no_name_is_defined_twice():
    for path in (*CODE, *TESTS):
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds)]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, (path.name, twice)


def test_no_line_is_longer_than_100_characters():
    """And lines that separate the parts of a file are as long as that."""
    wrong = []
    for path in (*CODE, *TESTS):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 100 or line.startswith("# ---") and len(line) != 100:
                wrong.append(f"{path.relative_to(ROOT)}:{n}")
    assert not wrong, wrong


def test_no_function_is_longer_than_60_lines_but_the_loop():
    for path in CODE:
        for node in functions(path):
            lines = node.end_lineno - node.lineno + 1
            if isinstance(node, ast.FunctionDef) and node.name != "run_loop":
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


def test_model_docstrings_index_their_equations_and_deviations():
    for path in MODELS:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert "Equations" in doc and "Deviations" in doc and "Run:" in doc, path.name
        names = {node.name for node in functions(path)}
        index = doc[doc.index("Equations"):doc.index("Deviations")]
        for name in re.findall(r"(\w+)\(\)", index):
            assert name in names, f"{path.name}: the index names {name}(), which is not there"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_file_runs_by_itself(path, capsys, tmp_path, monkeypatch):
    """Copied into an empty folder, `python X.py` prints a line a task, with a batch's losses."""
    monkeypatch.chdir(tmp_path)
    Path(path.name).write_text(path.read_text())
    module = runpy.run_path(path.name, run_name="__main__")
    printed = capsys.readouterr().out
    for task in module["TASKS"]:
        found = re.search(rf"^{task}\b.*\d", printed, re.M)
        assert found, f"{path.name} prints nothing of {task}: {printed}"
    assert "nan" not in printed


# --------------------------------------------------------------------------------------------------
# Copies

def blocks(path):
    """-> {name: source} of top-level classes and functions, {name: mark} of the marked copies."""
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
            pattern = r"# Copied from (\S+)::(\w+)(?: with (.*))?"
            origin, block, swaps = re.fullmatch(pattern, mark).groups()
            expected = everything[ROOT / origin][0][block]
            for swap in (swaps or "").split(","):
                if swap:
                    expected = expected.replace(*swap.strip().split("->"))
            yield path, name, sources[name], expected


ORIGINS = [*MODELS, ROOT / "tools" / "__init__.py"]


def fix():
    for path, name, found, expected in copies({path: blocks(path) for path in ORIGINS}):
        if found != expected:
            path.write_text(path.read_text().replace(found, expected))
            print(f"{path.relative_to(ROOT)}: {name} rewritten")


def test_copies_equal_their_origin_and_twins_are_marked():
    everything = {path: blocks(path) for path in ORIGINS}
    for path, name, found, expected in copies(everything):
        assert found == expected, (f"{path.name}: {name} is not its origin "
                                   "(python tests/test_house.py --fix)")
    seen = {}
    for path, (sources, marks) in everything.items():
        for name, source in sources.items():
            if len(source.splitlines()) >= 4 and name not in marks:
                body = "\n".join(source.splitlines()[1:])
                assert body not in seen, f"{path.name}: {name} stands in {seen.get(body)} too"
                seen[body] = path.name


# --------------------------------------------------------------------------------------------------
# models/README.md says what the code reads

READERS = [ROOT / name for name in ("train.py", "eval.py", "data.py", "formats.py",
                                    "tools/weights.py", "tools/lait.py", "tools/tables.py")]
OWNERS = {"module": "module", "model": "model", "raw": "model", "cfg": "config"}


def owner_of(node, path):
    """What a name stands for: `module`, `model` (also run.raw, self.model) or `config`."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    if name == "raw" and path.name != "train.py":                  # elsewhere, what a file holds
        return None
    return OWNERS.get(name)


def names_read():
    """The names that the loop, the evaluator, the data and the tools look for -> {kind: set}."""
    found = {"module": set(), "model": set(), "config": set(train.VOCAB_FIELDS)}
    for path in READERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and owner_of(node.value, path):
                found[owner_of(node.value, path)].add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                owner = owner_of(node.args[0], path)
                if node.func.id in ("getattr", "hasattr", "offers") and owner:
                    words = [a.value for a in node.args[1:] if isinstance(a, ast.Constant)]
                    found[owner].update(word for word in words if isinstance(word, str))

    # what eval.py asks for by tables, an f-string and offers(); torch's own names are none of ours
    for row in evaluation.TASKS.values():
        for way in row.ways:
            found["model"].update(way)
    found["model"] |= {"image_states", "text_states"}
    found["model"] -= {*dir(torch.nn.Module()), "no_sync"}          # no_sync is DDP's
    found["model"].add("forward")
    return {kind: {n for n in names if not n.startswith("_")} for kind, names in found.items()}


def page_tables():
    """The tables of models/README.md -> a list each of the names in the first cells of its rows."""
    tables, inside = [], False
    for line in (ROOT / "models" / "README.md").read_text().splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        names = re.findall(r"`([^`]+)`", line.split("|")[1])
        tables[-1].append([name.strip("[]") for name in names])
    return [[name for row in table for name in row] for table in tables]


def table_with(name):
    return next(set(table) for table in page_tables() if name in table)


@pytest.mark.parametrize("kind, first", [("module", "Config"), ("model", "cfg"),
                                         ("config", "max_text")])
def test_the_protocol_page_lists_the_names_that_the_code_reads(kind, first):
    page, code = table_with(first), names_read()[kind]
    assert page == code, (f"only on the page: {sorted(page - code)}; "
                          f"only in the code: {sorted(code - page)}")


def test_the_protocol_page_lists_sources_views_and_norms():
    text = (ROOT / "models" / "README.md").read_text()
    assert table_with("randaug") == set(data.VIEW_TABLE)
    row = next(line for line in text.splitlines() if line.startswith("| `source`"))
    assert set(data.SOURCES) <= set(re.findall(r"\w+", row))
    row = next(line for line in text.splitlines() if line.startswith("| `norm`"))
    assert set(data.NORMS) <= set(re.findall(r"\w+", row))
    for path in MODELS:
        module = weights.load_module(path.stem)
        for views in module.VIEWS.values():
            assert set(data.view_keys(views).values()) <= set(data.VIEW_TABLE), path.name


# --------------------------------------------------------------------------------------------------
# The README

def commands():
    """Every python or torchrun command of the README's bash blocks, without comments."""
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
    own = [word for word in files if not word.startswith(("out/", "datasets/"))]
    return bool(own) or "8" in words or "base" in words


def test_readme_commands_run_with_three_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.ensure("datasets/shapes", quiet=True, scale=0.05)
    ran = 0
    for words in commands():
        script = next(w for w in words if w.endswith(".py") or w.startswith("tools."))
        argv = words[words.index(script) + 1:]

        # what cannot run here: at least its flags exist
        if theirs(words) or "--help" in words:
            if script == "train.py":
                done = subprocess.run([sys.executable, str(ROOT / script), *argv, "--help"],
                                      capture_output=True, text=True)
                for flag in re.findall(r"(--\w+)", " ".join(argv)):
                    assert flag in done.stdout, (words, flag, done.stderr)
            continue

        # all else runs
        ran += 1
        if script == "train.py":
            train.main([*argv, "--steps", "3", "--eval_limit", "40"])
        elif script == "eval.py":
            evaluation.main(argv if "--image" in argv else [*argv, "--limit", "40"])
        else:
            program = ["-m", script] if script.startswith("tools.") else [str(ROOT / script)]
            subprocess.run([sys.executable, *program, *argv], check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran >= 4


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
