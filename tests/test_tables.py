"""tools/tables.py and the TABLES of the model files: every row is a command that exists, and what
is said of a claim follows from the numbers of its runs. Trainings are played by a small script."""

import argparse
import json
import math
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from tools import tables, weights
from tools.weights import Stop

MODELS = ("codis", "conlip", "cookie", "mct", "imagebert")
ENTRIES = [(model, table) for model in MODELS for table in weights.load_module(model).TABLES]


def entry_of(model, table):
    return weights.load_module(model).TABLES[table]


# --------------------------------------------------------------------------------------------------
# What the model files say

def metrics_of(name):
    """The metrics that an evaluation gives, as its functions name them."""
    one, scores = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    ap = [f"{kind}_{way}_{key}" for kind in ("boxes", "masks") for way in ("voc", "coco")
          for key in ("AP", "AP50", "AP75")]
    recalls = list(evaluation.recall(one, scores))
    sides = ("text -> h_cls of the image", "image patches -> h_cls of the text")
    return {"retrieval": recalls + [f"{key}, folds" for key in recalls], "vtm": recalls,
            "sts": list(evaluation.graded([0.0, 1.0, 2.0], [0.0, 1.0, 3.0], ["a"] * 3)),
            "cross_attention": [f"{side}, {kind}" for side in sides for kind in ("mean", "std")],
            "detection": ap, "segmentation": ap, "hashing": ["map"],
            "tagging": [f"mIOU@{k}" for k in (5, 10, 15, 20)]}.get(name, ["accuracy"])


@pytest.mark.parametrize("model", MODELS)
def test_every_row_is_a_command_that_the_real_parsers_take(model):
    """All rows' flags of a task in one command: the parser looks at each of them."""
    module, commands = weights.load_module(model), {}
    for table, entry in module.TABLES.items():
        presets = [preset for preset in module.PRESETS if preset in entry]
        assert presets and entry["claim"].endswith("."), table
        for preset in presets:
            for row in entry["rows"]:
                for task, flags in tables.steps_of(entry, preset, row, []):
                    tables.as_dict(flags)
                    commands.setdefault((preset, task), []).extend(flags)
            for name, flags in tables.evaluations_of(entry, preset):
                evaluation.parser().parse_args(["RUN", "--task", name, *flags])
    for (preset, task), flags in commands.items():
        train.parse(["--model", model, "--preset", preset, "--task", task, *flags])


@pytest.mark.parametrize("flags", ["--mim nothing", "--no_such_flag 1", "--steps many"])
def test_a_row_with_a_wrong_flag_would_be_seen(flags):
    """The command above, with a mistake in the middle."""
    with pytest.raises(SystemExit):
        found = train.parse(["--model", "conlip", *flags.split(), "--mim", "con", "--steps", "3"])
        train.settings(found[0], "tiny", "pretrain", {"mim": flags.split()[1]})


@pytest.mark.parametrize("model, table", ENTRIES)
def test_what_a_table_compares_is_there(model, table):
    """Rows of its claims, its columns among the evaluation's metrics, and nothing but the words
    that models/README.md explains."""
    module, entry = weights.load_module(model), entry_of(model, table)
    assert set(entry) <= {"claim", "rows", "reference", "better", "evaluation", "columns",
                          *module.PRESETS}
    assert entry.get("reference") in (None, *entry["rows"])
    columns = {column for preset in module.PRESETS if preset in entry
               for column in tables.columns_of(entry, preset)}
    for better, than, *of in entry.get("better", ()):
        assert {better, than} <= set(entry["rows"]) and better != than
        assert set(of) <= columns
    assert entry["evaluation"] in evaluation.TASKS
    if columns:
        assert columns <= set(metrics_of(entry["evaluation"])), columns

    # the words of a preset: tasks of the rows, and four more
    for preset in set(module.PRESETS) & set(entry):
        tasks = {part.split()[0] for row in entry["rows"].values() for part in row.split(" -> ")}
        extra = {"eval", "start", "files", "columns"}
        assert tasks <= set(module.TASKS)
        assert set(entry[preset]) <= set(module.TASKS) | extra, (preset, entry[preset])


def test_the_papers_numbers_belong_to_rows():
    """Every table with columns has numbers for each of its rows, and nothing else has."""
    for model, table in ENTRIES:
        printed, entry = tables.PAPER[model].get(table), entry_of(model, table)
        assert (printed is None) == (not any(tables.columns_of(entry, preset) for preset in
                                             ("tiny", "base", "stock") if preset in entry))
        if printed:
            assert set(printed[1]) == set(entry["rows"]), (model, table)
            for numbers in printed[1].values():
                assert all(float(number) >= 0 for number in numbers.split())
    assert {(model, table) for model, printed in tables.PAPER.items() for table in printed} <= \
        set(ENTRIES)


@pytest.mark.parametrize("model", MODELS)
def test_every_table_of_the_paper_is_there_or_said_to_be_missing(model):
    """By the numbers of its tables: an entry, or a word in the comment above TABLES."""
    last = {"codis": 4, "conlip": 7, "cookie": 5, "mct": 7, "imagebert": 4}[model]
    source = (weights.ROOT / "models" / f"{model}.py").read_text()
    comment = source[source.index("# Every table and figure"):source.index("\nTABLES = {")]
    for n in range(1, last + 1):
        entries = [table for table in entry_of_all(model) if re.match(rf"Table {n}\b", table)
                   or re.match(rf"Table {n}[a-e]", table)]
        assert entries or re.search(rf"Tables?\b[^.]*\b{n}\b", comment), n


def entry_of_all(model):
    return list(weights.load_module(model).TABLES)


def test_the_word_list_of_the_protocol_page_names_every_word():
    page = (weights.ROOT / "models" / "README.md").read_text()
    part = page[page.index("## What a table is"):page.index("## How to add")]
    named = set(re.findall(r"`([a-z]+)`", part))
    assert {"claim", "rows", "reference", "better", "evaluation", "columns", "eval", "start",
            "files", "tiny", "base"} <= named


# --------------------------------------------------------------------------------------------------
# Which runs there are

TABLE = dict(claim="B is better than A.", rows={"A": "pretrain --temp 0.1", "B": "pretrain",
                                                "C": "pretrain -> retrieval --temp 0.2"},
             reference="A", better=[("B", "A"), ("C", "A", "i2t_r1")],
             evaluation="retrieval", columns=("i2t_r1", "t2i_r1"),
             tiny=dict(pretrain="--steps 5"), base=dict(eval=["--data a.json", "--data b.json"]))


@pytest.fixture
def conlip(monkeypatch):
    module = weights.load_module("conlip")
    monkeypatch.setitem(module.TABLES, "Test", TABLE)
    return module


def planned(module, seeds=2, more=(), entry=TABLE, preset="tiny"):
    return tables.plan(module, "conlip", entry, preset, range(seeds), list(more))


def test_a_pre_training_is_shared_and_every_seed_has_its_own(conlip):
    last, groups = planned(conlip)
    assert last["B", 0] is last["C", 0].begin and last["B", 1] is last["C", 1].begin
    names = [[run.name for run in group] for group in groups]
    assert [len(group) for group in names] == [1, 2, 1, 2]
    assert len({name for group in names for name in group}) == 6
    assert [group[0].seed for group in groups] == [0, 0, 1, 1]         # all rows of a seed first
    assert last["A", 0].digest == last["A", 1].digest != last["B", 0].digest
    assert last["C", 0].evaluations and last["B", 0].evaluations


def test_a_run_is_known_by_its_settings(conlip, monkeypatch):
    """Not by the order of its flags, nor by the table; a preset that changes makes another run."""
    def digest(*flags, task="pretrain"):
        return tables.digest_of(conlip, "tiny", [(task, list(flags))])

    first = digest("--temp", "0.1", "--mlm", "none")
    assert first == digest("--mlm", "none", "--temp", "0.1") == \
        digest("--mlm", "con", "--temp", "0.1", "--mlm", "none")
    assert len({first, digest("--temp", "0.1"), digest("--temp", "0.2", "--mlm", "none"),
                digest("--temp", "0.1", "--mlm", "none", task="retrieval")}) == 4
    two = tables.digest_of(conlip, "base", [("pretrain", ["--temp", "0.1", "--mlm", "none"])])
    assert two != first

    monkeypatch.setitem(conlip.PRESETS["tiny"], "retrieval", {"steps": 7})
    assert digest("--temp", "0.1", "--mlm", "none") == first
    monkeypatch.setitem(conlip.PRESETS["tiny"], "width", 64)
    assert digest("--temp", "0.1", "--mlm", "none") != first


def test_tables_of_one_model_share_runs():
    """ConLIP's Table 2 needs no run that Table 3 and Table 1 have not."""
    module, digests = weights.load_module("conlip"), {}
    for table in ("Table 1: Flickr30K", "Table 2", "Table 3"):
        last, _ = tables.plan(module, "conlip", module.TABLES[table], "tiny", [0], [])
        digests[table] = {run.digest for run in last.values()}
    both = digests["Table 1: Flickr30K"] | digests["Table 3"]
    assert digests["Table 2"] <= both
    assert len(digests["Table 1: Flickr30K"] & digests["Table 3"]) == 2


def test_flags_that_go_to_one_kind_of_run(conlip):
    """`start` to what starts from no other, `files` into names in braces, the command line last."""
    entry = dict(rows={"A": "pretrain --data {one} -> retrieval --steps 3"}, tiny=dict(
        pretrain="--data x --steps 1", start="--init_text b", files={"one": "a.json"}))
    assert tables.steps_of(entry, "tiny", "A", ["--lr", "1"]) == [
        ("pretrain", ["--data", "x", "--steps", "1", "--init_text", "b", "--data", "a.json",
                      "--lr", "1"]), ("retrieval", ["--steps", "3", "--lr", "1"])]


# --------------------------------------------------------------------------------------------------
# Statistics

def test_quantiles_of_t():
    """The density of Student's t, integrated up to each quantile, gives 97.5 %."""
    for df, quantile in enumerate(tables.T_QUANTILES, 1):
        norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        area = torch.trapezoid(norm * (1 + x * x / df) ** (-(df + 1) / 2), x).item()
        assert abs(0.5 + area - 0.975) < 5e-5, df


def test_differences_are_paired_by_seed():
    """Rows whose spread over the seeds is far larger than their difference in each of them."""
    a = {0: 51.0, 1: 21.0, 2: 81.5, 3: 9.0}
    b = {0: 50.0, 1: 20.0, 2: 80.0}
    found = tables.paired(a, b)
    deviation = math.sqrt(((1 - 3.5 / 3) ** 2 * 2 + (1.5 - 3.5 / 3) ** 2) / 2)
    half = 4.303 * deviation / math.sqrt(3)
    assert found["pairs"] == 3 and found["mean"] == pytest.approx(3.5 / 3)
    assert found["low"] == pytest.approx(3.5 / 3 - half)
    assert found["high"] == pytest.approx(3.5 / 3 + half)
    assert tables.paired({0: 1.0}, {0: 0.0}) == {"mean": 1.0, "low": None, "high": None, "pairs": 1}
    assert tables.paired({0: 1.0}, {1: 0.0})["mean"] is None


@pytest.mark.parametrize("differences, verdict", [
    ([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "contradicted"), ([1.0, 5.0, -3.0],
    "not separable"), ([1.0, 1.0], "not separable"), ([0.0, 0.0, 0.0], "not separable"),
    ([], "not separable")])
def test_verdicts(differences, verdict):
    found = tables.paired(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0))
    assert tables.judge(found) == verdict


# --------------------------------------------------------------------------------------------------
# Runs, played by a script that writes what train.py and eval.py write

FAKE = '''
import json, os, pathlib, signal, sys, time
script, args = os.path.basename(sys.argv[1]), sys.argv[2:]
value = lambda flag, default="": args[args.index(flag) + 1] if flag in args else default
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(script, *args, file=calls)
if script == "train.py":
    out, seed = pathlib.Path(value("--out")), int(value("--seed"))
    assert "--resume" in args and value("--evals") == "none"
    assert value("--init") == "" or (pathlib.Path(value("--init")) / "config.json").exists()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"step": 0, "total_steps": 4}))
    if (here / "slow").exists():
        (out / "log.jsonl").write_text(json.dumps({"step": 1}))
        def stop(*_):
            (here / "asked").touch()
            sys.exit("stopped at step 1 of 4")
        signal.signal(signal.SIGTERM, stop)
        (here / "ready").touch()
        time.sleep(60)
    if (here / f"broken-{seed}").exists():
        sys.exit("train.py: no more space")
    score = 40 + 10 * seed + (2 + seed / 10) * (value("--temp") == "") + 3 * ("--init" in args)
    (out / "score").write_text(str(score))
    (out / "model.safetensors").touch()
    (out / "config.json").write_text(json.dumps({"step": 4, "total_steps": 4}))
else:
    run, low = pathlib.Path(args[0]), (here / "plateau").exists()
    score = float((run / "score").read_text())
    score = 0.5 if low and score < 50 and int(args[0][-1]) == 0 else score
    data = pathlib.Path(value("--data", "shapes")).stem
    result = {"metrics": {"i2t_r1": score,
                          "t2i_r1": max(score - (30 if "retrieval" in run.name else 10), 0.4)},
              "rows": [{"scores": "chance", "i2t_r1": 0.1, "t2i_r1": 0.1}],
              "protocol": {"split": "test", "git_commit": "0123456789abcdef", "device": "cpu",
                           "versions": {"torch": "2"}}}
    (run / f"eval-{value('--task')}-{data}-test.json").write_text(json.dumps(result))
'''


@pytest.fixture
def lab(conlip, tmp_path):
    """A folder with the script; run(...) is the command line, calls() what it has called."""
    (tmp_path / "fake.py").write_text(FAKE)
    lab = argparse.Namespace(root=tmp_path, results=tmp_path / "results")

    def run(*more, seeds=3):
        return tables.main(["conlip", "Test", "--seeds", str(seeds), "--runs", str(tmp_path / "r"),
                            "--results", str(lab.results), "--launcher",
                            f"python {tmp_path}/fake.py", *more])

    def calls():
        path = tmp_path / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines
    lab.run, lab.calls = run, calls
    return lab


def test_a_table_is_run_judged_and_written(lab, capsys):
    """By hand: A 40, 50, 60, B two more plus a tenth a seed, C three; in the other column ten less,
    of C thirty: C is better than A in the column that its claim names, and worse on the mean."""
    summary = lab.run()[0]
    calls = lab.calls()
    assert sum(line.startswith("train.py") for line in calls) == 9
    assert sum(line.startswith("eval.py") for line in calls) == 9
    rows = summary["rows"]
    assert rows["A"]["values"] == {0: [40.0, 30.0], 1: [50.0, 40.0], 2: [60.0, 50.0]}
    assert rows["B"]["difference"]["mean"] == pytest.approx(2.1)
    assert rows["B"]["difference"]["high"] == pytest.approx(2.1 + 4.303 * 0.1 / math.sqrt(3))
    assert rows["C"]["difference"]["mean"] == pytest.approx((3 - 17) / 2)
    assert [claim["verdict"] for claim in summary["claims"]] == ["holds", "holds"]
    assert summary["claims"][1]["difference"]["mean"] == pytest.approx(3.0)

    # the page and its numbers
    page = (lab.results / "conlip-test.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "| A | 3 | 50.0 ± 10.0 | 40.0 ± 10.0 |" in page
    assert "+2.1 [+1.9, +2.3]" in page and "**holds**" in page and "B is better than A." in page
    assert "python -m tools.tables conlip Test --seeds 3" in page
    assert json.loads((lab.results / "conlip-test.json").read_text())[0]["claims"]
    lines = (lab.results / "conlip.jsonl").read_text().splitlines()
    assert len(lines) == 9 and all(len(line) < 700 for line in lines)


def test_what_is_finished_is_not_run_again(lab):
    lab.run(seeds=2)
    lab.calls()
    lab.run(seeds=2)
    assert not lab.calls()

    # another seed runs that seed alone; without the runs their numbers are enough
    for path in sorted((lab.root / "r").glob("**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    lab.run(seeds=3)
    calls = lab.calls()
    assert len(calls) == 6 and all("--seed 2" in line for line in calls if line[:5] == "train")

    # without the numbers, the results in the runs' directories are
    lines = (lab.results / "conlip.jsonl").read_text().splitlines()
    (lab.results / "conlip.jsonl").write_text("\n".join(lines[:6]) + "\n")
    lab.run(seeds=3)
    assert not lab.calls()
    assert len((lab.results / "conlip.jsonl").read_text().splitlines()) == 9


def test_a_result_that_is_not_of_the_finished_run_is_none(lab):
    """Older than the weights, or of a run that has not come to its end: it is measured anew."""
    lab.run(seeds=1)
    lab.calls()
    older, newer = (directory for directory in sorted((lab.root / "r").glob("conlip-pretrain*"))
                    if directory.is_dir())
    later = time.time() + 5
    os.utime(older / "model.safetensors", (later, later))
    (newer / "config.json").write_text(json.dumps({"step": 3, "total_steps": 4}))
    for directory in (older, newer):
        assert tables.result_file(directory, "retrieval", []) is None
    assert tables.result_file(next((lab.root / "r").glob("conlip-retrieval*0")), "retrieval", [])

    (lab.results / "conlip.jsonl").unlink()
    lab.run(seeds=1)
    assert sum(line.startswith("eval.py") for line in lab.calls()) == 2


def test_two_results_of_one_evaluation_are_not_guessed_between(lab):
    lab.run(seeds=1)
    directory = next(path for path in (lab.root / "r").glob("conlip-retrieval*0") if path.is_dir())
    (directory / "eval-retrieval-other-test.json").write_text("{}")
    with pytest.raises(Stop, match="2 results of retrieval"):
        tables.result_file(directory, "retrieval", [])
    assert tables.result_file(directory, "retrieval", ["--data", "x/other.json"]).name == \
        "eval-retrieval-other-test.json"


def test_a_failure_is_named_and_the_others_go_on(lab, capsys):
    (lab.root / "broken-1").touch()
    with pytest.raises(Stop, match="3 of 9 runs failed"):
        lab.run()
    printed = capsys.readouterr()
    assert printed.err.count("train.py: no more space") >= 2
    assert "which failed" in printed.err                                # C, which starts from B
    page = (lab.results / "conlip-test.md").read_text()
    assert "| A | 2 |" in page and "A, seed 1, train.py: no more space" in page
    assert "**not separable**" in page                                  # two pairs are left

    # the same command tries again, and runs what failed
    lab.calls()
    (lab.root / "broken-1").unlink()
    lab.run()
    assert len(lab.calls()) == 6


def test_where_everything_fails_the_rest_is_not_tried(lab, capsys):
    """A wrong flag would fail five times five runs."""
    for seed in range(9):
        (lab.root / f"broken-{seed}").touch()
    with pytest.raises(Stop, match=r"[34] of [34] runs failed"):
        lab.run("--jobs", "1", seeds=9)
    assert len(lab.calls()) <= 4
    assert "seed 8, not run" in (lab.results / "conlip-test.md").read_text()


def test_a_run_on_its_plateau_is_named_and_in_no_mean(lab):
    (lab.root / "plateau").touch()
    summary = lab.run(seeds=4)[0]
    assert set(summary["rows"]["A"]["values"]) == {1, 2, 3}
    assert any("A, seed 0, never left its plateau" in text for text in summary["left_out"])
    assert summary["rows"]["B"]["difference"]["pairs"] == 3
    assert "never left its plateau" in (lab.results / "conlip-test.md").read_text()


def test_ctrl_c_stops_the_trainings_once_and_says_how_to_go_on(lab, monkeypatch):
    (lab.root / "slow").touch()

    def interrupt(futures, timeout):
        while not (lab.root / "ready").exists():
            time.sleep(0.02)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        raise KeyboardInterrupt
    monkeypatch.setattr(tables, "wait", interrupt)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        lab.run("--jobs", "1")
    assert (lab.root / "asked").exists() and time.time() - began < 30
    assert len(lab.calls()) == 1 and not (lab.results / "conlip.jsonl").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_several_data_sets_are_measured_apart(lab):
    """The base preset of this table evaluates on two files: two tables on one page."""
    summaries = lab.run("--preset", "base", seeds=1)
    assert [s["flags"] for s in summaries] == ["--data a.json", "--data b.json"]
    page = (lab.results / "conlip-test-base.md").read_text()
    assert page.count("# conlip, Test") == 2
    assert sum(line.startswith("eval.py") for line in lab.calls()) == 6


def test_print_gives_lines_that_depend_on_no_other(lab, capsys):
    """A pre-training stands in one line with all that starts from it; the real parsers take all."""
    lab.run("--print", "--steps", "9", seeds=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not lab.calls()
    assert [line.count("train.py") for line in lines] == [1, 2, 1, 2]
    for line in lines:
        for command in line.split(" && "):
            words = shlex.split(command)
            at = words.index("train.py") if "train.py" in words else words.index("eval.py")
            if words[at] == "train.py":
                given = train.parse(words[at + 1:])[4]
                assert given["steps"] == 9 and given["resume"]
            else:
                evaluation.parser().parse_args(words[at + 1:])


@pytest.mark.parametrize("argv, text", [
    (["clip", "Table 3"], "there is no models/clip.py"),
    (["conlip", "Table 33"], "has no 'Table 33'; it has: Table 1"),
    (["conlip", "Table 1: COCO"], "has no settings for preset 'tiny'; it has: base"),
    (["conlip", "Table 3", "--seeds", "0"], "--seeds: 0: from 1 to 1000"),
    (["conlip", "Table 3", "--jobs", "0"], "--jobs: 0: from 1 to 1000"),
    (["conlip", "Table 3", "--seeds", "many"], "is no whole number"),
    (["conlip", "Table 3", "more"], "'more' is no flag")])
def test_mistakes_are_one_line(argv, text, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tables.main([*argv, "--runs", str(tmp_path), "--results", str(tmp_path)])
    assert text in str(stop.value) and "\n" not in str(stop.value)


def test_damaged_numbers_are_one_line(lab):
    lab.results.mkdir()
    (lab.results / "conlip.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(Stop, match="conlip.jsonl:1"):
        lab.run()


def test_without_a_table_all_are_listed(lab, capsys):
    lab.run()
    capsys.readouterr()
    tables.main(["conlip", "--results", str(lab.results)])
    printed = capsys.readouterr().out
    assert all(table in printed for table in entry_of_all("conlip"))
    assert "B > A: holds, +2.1" in printed


def test_signals_are_as_before(lab):
    """A handler of SIGTERM that stayed would keep the forked workers of other tools alive."""
    before = signal.getsignal(signal.SIGTERM)
    lab.run(seeds=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_table_with_the_real_scripts(squares, monkeypatch, tmp_path):
    """Two steps of one row on pictures of two squares: what train.py and eval.py write is read."""
    module = weights.load_module("conlip")
    entry = dict(claim="One row.", rows={"only": "pretrain"}, evaluation="retrieval",
                 columns=("i2t_r1", "t2i_r1"), tiny=dict(pretrain=""))
    monkeypatch.setitem(module.TABLES, "Real", entry)
    summary = tables.main(["conlip", "Real", "--seeds", "1", "--runs", str(tmp_path / "r"),
                           "--results", str(tmp_path), "--data", str(squares.small), "--vocab",
                           str(squares.vocab), "--steps", "2", "--batch_size", "8", "--workers",
                           "0", "--device", "cpu", "--hold_out", "0"])[0]
    found = list(summary["rows"]["only"]["values"].values()) or summary["left_out"]
    line = json.loads((tmp_path / "conlip.jsonl").read_text())
    assert found and line["trained"].startswith("pretrain --data")
    assert set(line["metrics"]) >= {"i2t_r1", "t2i_r1", "rsum"} and line["chance"]["i2t_r1"] > 0
    assert Path(tmp_path / "r" / f"conlip-pretrain-{line['run']}-seed0" / "log.jsonl").exists()
