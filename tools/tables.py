r"""tools/tables.py: re-runs a table of a paper with seeds, and says whether its claim holds here.

    python -m tools.tables conlip                       # the tables that there are
    python -m tools.tables conlip "Table 3"             # runs what is missing, then the table
    python -m tools.tables conlip "Table 3" --data my.json --image_root images --vocab vocab.txt
    python -m tools.tables conlip "Table 3" --preset base --print       # the commands alone

What a table is stands in the model file, as data (TABLES; models/README.md says what its words
mean). Every row is trained with the same seeds. A run is known by its settings: rows that several
tables share, and a pre-training that several rows start from, are trained once. A run that was
stopped goes on where it was, and a finished one is never run again: its numbers are a line of
models/results/MODEL.jsonl. Flags that are not listed below go to every training.

How a claim is judged. A run's score is the mean of the table's columns. Two rows are compared seed
by seed, as both saw the same data in the same order: the mean of the differences, with a 95 %
interval by Student's t. "holds": the whole interval is on the claimed side of 0; "contradicted": on
the other side; "not separable": 0 lies inside, or fewer than three pairs are left. A run whose
score is below ten times chance never left its plateau: it is named, and is in no mean.

On a cluster, --print writes one line for each run that starts from nothing, with all that start
from it, so that lines depend on no other:

    python -m tools.tables conlip "Table 3" --preset base --print > jobs.txt
    sbatch --array=1-$(wc -l < jobs.txt) --wrap 'eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt)"'

and the first command without --print then finds the finished runs and makes the table.
"""

import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tools import Few, Parser
from tools.weights import ROOT, Stop, find_run, load_module

# --------------------------------------------------------------------------------------------------
# What the papers print, of their own rows: {table: (columns, {row: numbers})}. Read from our copies
# by eye; numbers that are damaged there are left out, and the rows of other people's methods.

PAPER = {
    "codis": {
        "Table 1: Flickr30K": ("i2t R@1 5 10, t2i R@1 5 10", {
            "Ours": "91.7 99.0 99.6  78.1 94.1 96.6"}),
        "Table 1: COCO": ("i2t R@1 5 10, t2i R@1 5 10", {"Ours": "71.1 90.6 95.1  52.1 78.0 85.9"}),
        "Table 2: Flickr30K": ("i2t R@1 5 10, t2i R@1 5 10", {
            "Ours": "95.1 99.4 99.9  83.3 96.1 97.8"}),
        "Table 2: COCO": ("i2t R@1 5 10, t2i R@1 5 10", {"Ours": "75.3 92.6 96.6  58.7 82.8 89.7"}),
        "Table 3: VQA": ("test-dev, test-std", {"Ours": "74.86 74.97"}),
        "Table 3: NLVR2": ("dev, test-P", {"Ours": "80.50 80.84"}),
        "Table 3: SNLI-VE": ("val, test", {"Ours": "80.47 80.40"}),
        "Table 4": ("R@1 of Flickr30K i2t, t2i, COCO i2t, t2i", {
            "cross": "84.90 68.18  68.6 50.10", "intra + cross": "85.80 69.70  69.86 50.52",
            "cross + codebook (teacher)": "86.00 70.18  70.74 51.39",
            "intra + cross + codebook (student)": "86.30 70.34  71.12 51.40",
            "intra + cross + codebook (teacher)": "86.70 71.40  71.10 52.10"}),
    },
    "conlip": {
        "Table 1: Flickr30K": ("t2i R@1 5 10, i2t R@1 5 10", {
            "CL (zs)": "51.5 78.6 86.6  67.7 88.5 94.6",
            "Vanilla (zs)": "51.0 79.0 86.6  66.5 87.9 92.7",
            "ConLIP (zs)": "52.8 79.8 87.0  68.8 90.0 94.7",
            "CL": "70.7 90.9 94.4  86.9 97.2 98.8", "Vanilla": "70.8 90.8 94.8  86.4 97.4 99.6",
            "ConLIP": "71.8 91.3 95.0  87.2 97.3 98.9"}),
        "Table 1: COCO": ("t2i R@1 5 10, i2t R@1 5 10", {
            "CL (zs)": "27.0 51.5 62.7  39.8 64.5 74.6",
            "Vanilla (zs)": "27.0 51.7 62.9  39.4 64.5 74.6",
            "ConLIP (zs)": "28.0 52.6 63.7  40.3 65.2 75.8",
            "CL": "46.8 74.7 83.6  62.7 85.8 92.4", "Vanilla": "46.3 74.6 83.6  62.3 86.5 92.4",
            "ConLIP": "47.5 75.0 83.9  63.4 86.9 92.9"}),
        "Table 1: pairs": ("COCO t2i R@1 5 10, i2t R@1 5 10", {
            "ConLIP (zs), 5.3M": "28.0 52.6 63.7  40.3 65.2 75.8",
            "ConLIP (zs), 9.5M": "31.4 56.5 67.4  42.7 67.7 77.2",
            "ConLIP, 5.3M": "47.5 75.0 83.9  63.4 86.9 92.9",
            "ConLIP, 9.5M": "49.1 76.1 84.6  64.7 87.9 93.4"}),
        "Table 2": ("text to image, image to text", {"Vanilla": "0.06 0.00",
                                                     "ConLIP": "0.17 0.18"}),
        "Table 2: deviation": ("text to image, image to text", {"Vanilla": "0.09 0.00",
                                                                "ConLIP": "0.13 0.09"}),
        "Table 3": ("COCO t2i R@1, i2t R@1", {
            "InfoNCE": "16.83 21.68", "DCL": "17.09 22.24", "DCL + ConMLM": "17.26 22.44",
            "DCL + ConMIM": "17.37 22.60", "DCL + ConMLM + ConMIM": "17.25 22.80"}),
        "Table 4": ("COCO t2i R@1, i2t R@1", {
            "3": "16.73 24.42", "2": "16.73 23.94", "2*": "17.24 22.50", "1": "17.25 22.80"}),
        "Table 5": ("COCO t2i R@1, i2t R@1", {
            "50 %, 15 %": "17.25 22.80", "50 %, 25 %": "17.23 22.80", "50 %, 30 %": "17.17 22.72",
            "50 %, 40 %": "17.23 22.76", "40 %, 15 %": "17.03 22.82", "60 %, 15 %": "17.14 22.80",
            "70 %, 15 %": "17.17 22.78"}),
    },
    "cookie": {
        "Table 1": ("5K i2t R@1 5 10, t2i R@1 5 10", {
            "COOKIE R101": "61.7 86.7 92.3  46.6 75.2 84.1",
            "COOKIE X101": "69.2 89.6 94.4  52.4 79.6 87.1"}),
        "Table 2": ("i2t R@1 5 10, t2i R@1 5 10", {
            "COOKIE R101": "84.7 96.9 98.3  68.3 91.1 95.2",
            "COOKIE X101": "89.0 98.9 99.8  75.6 94.5 97.1"}),
        "Table 3": ("Rsum", {"COOKIE (mean)": "187.6", "COOKIE (gpo)": "194.6"}),
        "Table 4a": ("STS12 to STS16, STSB", {"BERT": "28.8 50.8 43.9 57.6 58.7 46.1",
                                              "COOKIE": "63.2 68.0 68.0 72.4 68.1 75.3"}),
        "Table 4b: MSCOCO": ("MAP@5000", {
            "CSQ, 16": "0.796", "CSQ, 32": "0.838", "CSQ, 64": "0.861",
            "COOKIE, 16": "0.811", "COOKIE, 32": "0.884", "COOKIE, 64": "0.910"}),
        "Table 4b: NUS-WIDE": ("MAP@5000", {
            "CSQ, 16": "0.810", "CSQ, 32": "0.825", "CSQ, 64": "0.839",
            "COOKIE, 16": "0.822", "COOKIE, 32": "0.852", "COOKIE, 64": "0.855"}),
        "Table 5a: ITM": ("Rsum, 1K", {"none": "526.9", "CCL": "545.4", "CCL + VCL": "547.8",
                                       "CCL + TCL": "548.1", "CCL + VCL + TCL": "550.0"}),
        "Table 5a: IR": ("MAP@5000", {"none": "0.861", "CCL": "0.898", "CCL + VCL": "0.909",
                                      "CCL + TCL": "0.899", "CCL + VCL + TCL": "0.910"}),
        "Table 5a: TM": ("(P+S)/2", {"CCL": "72.4", "CCL + VCL": "72.1", "CCL + TCL": "75.1",
                                     "CCL + VCL + TCL": "75.3"}),
        "Table 5b": ("Rsum, 1K", {
            "baseline": "536.6", "FC, shared": "536.8", "WS-TE, not shared": "541.6",
            "WS-TE, shared": "547.5", "WS-TE, not shared, TAV-TE": "543.8",
            "WS-TE, shared, TAV-TE": "550.0"}),
        "Table 5c: pre-trained": ("Rsum, 1K", {"0": "536.6", "1": "547.8", "2": "550.0",
                                               "4": "539.8", "8": "500.7"}),
        "Table 5c: without": ("Rsum, 1K", {"0": "528.7", "1": "534.6", "2": "526.9", "4": "510.4",
                                           "8": "250.8"}),
        "Table 5d: ITM": ("Rsum, 1K", {"MSCOCO": "530.4", "Flickr30K": "531.7", "CC": "540.5",
                                       "CC+SBU": "544.3"}),
        "Table 5d: IR": ("MAP@5000", {"MSCOCO": "0.895", "Flickr30K": "0.886", "CC": "0.902",
                                      "CC+SBU": "0.905"}),
        "Table 5d: TM": ("(P+S)/2", {"MSCOCO": "71.9", "Flickr30K": "69.5", "CC": "74.4",
                                     "CC+SBU": "75.3"}),
        "Table 5e: ITM": ("Rsum, 1K", {
            "ResNet50": "526.4", "ResNet101": "531.3", "ResNeXt101": "550.0",
            "ResNet50, w/o": "512.8", "ResNet101, w/o": "516.5", "ResNeXt101, w/o": "526.9"}),
        "Table 5e: IR": ("MAP@5000", {
            "ResNet50": "0.910", "ResNet101": "0.911", "ResNeXt101": "0.932",
            "ResNet50, w/o": "0.861", "ResNet101, w/o": "0.872", "ResNeXt101, w/o": "0.911"}),
        "Table 5e: TM": ("(P+S)/2", {"ResNet50": "74.8", "ResNet101": "75.3",
                                     "ResNeXt101": "75.0"}),
    },
    "mct": {
        "Table 1": ("top-1", {"MoCo-v2": "49.3", "Ours": "54.9", "Ours (with tag)": "55.3"}),
        "Table 2": ("AP50, AP, AP75", {
            "Random Init": "60.2 33.8 33.1", "MoCo-v2": "75.5 48.4 52.1", "Ours": "80.8 55.6 61.9",
            "Ours (with tag)": "81.8 55.8 61.7"}),
        "Table 2: scratch": ("AP50, AP, AP75", {
            "Ours": "80.8 55.6 61.9", "Ours (scratch)": "80.7 55.4 61.5",
            "Ours (scratch), 1,000 epochs": "82.1 56.1 62.4"}),
        "Table 3": ("box AP, AP50, AP75, mask AP, AP50, AP75", {
            "Random Init": "36.7 56.7 40.0  33.7 53.8 35.9",
            "MoCo-v2": "39.8 59.6 43.1  35.8 56.9 38.8", "Ours": "41.1 61.8 44.9  36.9 58.2 40.0",
            "Ours (with tag)": "41.2 61.9 44.9  37.1 58.9 40.1"}),
        "Table 4": ("i2t R@1, R@10, t2i R@1, R@10", {"MoCo-v2": "51.6 90.0  39.0 84.8",
                                                     "Ours": "58.4 93.4  45.1 90.0"}),
        "Table 5": ("mIOU@5, 10, 15, 20", {"Stock-sup": "12.86 13.93 14.88 15.74",
                                           "Ours": "13.81 14.69 15.55 16.42"}),
        "Table 6": ("i2t R@1, R@10, t2i R@1, R@10", {"Stock-sup": "33.76 71.22  30.64 68.18",
                                                     "Ours": "36.98 74.02  33.83 70.76"}),
        "Table 7": ("i2t R@1, R@10, t2i R@1, R@10", {"Inter-modal": "13.2 42.2  9.5 36.7",
                                                     "Multimodal": "24.1 66.0  18.6 58.4"}),
        "Section 4.4: heads": ("top-1", {
            "unified 128": "49.6", "unified 1024": "50.2", "unified 1152": "52.3",
            "distinct 128": "53.6", "distinct 1024": "53.8", "distinct 1152": "53.9",
            "distinct 128, 1024": "54.9"}),
        "Section 4.4: tags": ("top-1", {"J_ii": "49.3", "J_ii + J_tag": "50.2",
                                        "all five": "55.3"}),
        "Section 4.4: tags of captions": ("top-1", {"tags": "55.3", "nouns": "54.5"}),
        "Table 1: scratch": ("top-1", {"Ours": "54.9", "Ours (scratch)": "54.6"}),
    },
    "imagebert": {
        "Table 1: Flickr30K": ("t2i R@1 5 10, i2t R@1 5 10", {
            "ImageBERT": "54.3 79.6 87.5  70.7 90.2 94.0"}),
        "Table 1: COCO": ("5K t2i R@1 5 10, i2t R@1 5 10; 1K the same", {
            "ImageBERT": "32.3 59.0 70.2  44.0 71.2 80.4  53.6 83.2 91.7  67.0 90.3 96.1"}),
        "Table 2: Flickr30K": ("t2i R@1 5 10, i2t R@1 5 10", {
            "ImageBERT": "73.1 92.6 96.0  87.0 97.6 99.2"}),
        "Table 2: COCO": ("5K t2i R@1 5 10, i2t R@1 5 10; 1K the same", {
            "ImageBERT": "50.5 78.7 87.1  66.4 89.8 94.4  73.6 94.3 97.2  85.4 98.7 99.8"}),
        "Table 3": ("t2i R@1, i2t R@1", {
            "LAIT": "21.4 31.6", "CC+SBU": "48.4 64.3", "LAIT+CC+SBU": "46.4 63.4",
            "LAIT -> (CC+SBU)": "54.3 70.7"}),
        "Table 4: global feature": ("t2i R@1 5 10, i2t R@1 5 10", {
            "CC+SBU": "48.4 76.0 85.2  64.3 85.8 92.3",
            "CC+SBU (w global feature)": "49.2 75.9 84.9  64.0 87.4 92.4"}),
        "Table 4: MRFR": ("t2i R@1, i2t R@1", {"CC": "33.0 43.8", "CC (w MRFR loss)": "34.7 45.3"}),
        "Table 4: regions": ("t2i R@1, i2t R@1", {"RoI(36)": "68.7 84.3", "RoI(100)": "73.0 87.3"}),
        "Table 4: losses": ("t2i R@1, i2t R@1", {
            "Binary+CE+Triplet": "71.9 86.6", "CE only": "70.6 85.6", "Triplet only": "70.6 86.8",
            "Binary only": "73.1 87.0"}),
    },
}


# --------------------------------------------------------------------------------------------------
# Which runs a table needs

@dataclass
class Run:
    """One training: a step of a row, with one seed."""
    name: str                       # MODEL-TASK-DIGEST-seedN, its directory
    seed: int
    steps: list                     # (task, its flags) of all trainings up to this one
    digest: str                     # of all settings but the seed
    begin: "Run" = None             # the run it starts from
    evaluations: list = field(default_factory=list)     # (evaluation, flags of eval.py)


def entry_of(module, model, table):
    """TABLES[table] of a model file, or a Stop that lists what there is."""
    if table not in module.TABLES:
        raise Stop(f"tools.tables: models/{model}.py has no {table!r}; it has: "
                   f"{', '.join(module.TABLES)}")
    return module.TABLES[table]


def steps_of(entry, preset, row, more):
    """A row's trainings -> list of (task, flags). `more`: flags of the command line, for all.

    "pretrain --a 1 -> retrieval": the second starts from the first. Of a flag that is said twice
    the last one counts: the command line's, then the row's, then what all rows share.
    """
    shared, steps = entry[preset], []
    for part in entry["rows"][row].split(" -> "):
        task, *own = shlex.split(part.format(**shared.get("files", {})))
        common = [shared.get(task, "")] + ([] if steps else [shared.get("start", "")])
        steps.append((task, shlex.split(" ".join(common)) + own + more))
    return steps


def evaluations_of(entry, preset):
    """What a table measures of each run -> list of (evaluation, flags): several where the paper
    reports several data sets."""
    flags = entry[preset].get("eval", "")
    several = [flags] if isinstance(flags, str) else flags
    return [(entry["evaluation"], shlex.split(one)) for one in several]


def as_dict(flags):
    """["--a", "1", "--b"] -> {"--a": ["1"], "--b": []}; of a flag said twice the last."""
    found, name = {}, None
    for word in flags:
        if word.startswith("--"):
            name = word
            found[name] = []
        elif name is None:
            raise Stop(f"tools.tables: {word!r} is no flag (see --help)")
        else:
            found[name].append(word)
    return found


def digest_of(module, preset, steps):
    """Ten letters that change when a setting of one of the steps does: the flags, and what the
    model file's RECIPE and PRESETS say of the task."""
    parts = []
    for task, flags in steps:
        sizes = module.PRESETS[preset]
        own = {key: value for key, value in sizes.items() if key not in module.RECIPE}
        parts.append([task, as_dict(flags), module.RECIPE[task], own, sizes.get(task)])
    text = json.dumps([preset, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def plan(module, model, entry, preset, seeds, more):
    """-> ({(row, seed): Run}, [[runs that start from the first of them], ...]), all rows of one
    seed before the next seed, so that whatever is finished is paired."""
    runs, last, groups = {}, {}, {}
    for seed in seeds:
        for row in entry["rows"]:
            # a chain of trainings, whose first ones other rows may share
            steps, before = steps_of(entry, preset, row, more), None
            for n in range(1, len(steps) + 1):
                digest = digest_of(module, preset, steps[:n])
                name = f"{model}-{steps[n - 1][0]}-{digest}-seed{seed}"
                if name not in runs:
                    runs[name] = Run(name, seed, steps[:n], digest, before)
                    root = groups[before.name] if before else []
                    root.append(runs[name])
                    groups[name] = root
                before = runs[name]
            last[row, seed] = before
            before.evaluations = evaluations_of(entry, preset)
    groups = {id(group): group for group in groups.values()}
    return last, list(groups.values())


def training(run, model, preset, folder, launcher):
    """The command of one run, as words. --resume: begins, or goes on where it was stopped."""
    task, flags = run.steps[-1]
    words = [*shlex.split(launcher), "train.py", "--model", model, "--preset", preset, "--task",
             task, *flags, "--seed", str(run.seed), "--evals", "none"]
    if run.begin:
        words += ["--init", str(folder / run.begin.name)]
    return [*words, "--out", str(folder / run.name), "--resume"]


def evaluating(run, evaluation, flags, folder, launcher):
    return [*shlex.split(launcher), "eval.py", str(folder / run.name), "--task", evaluation, *flags]


# --------------------------------------------------------------------------------------------------
# Their numbers

class Results:
    """models/results/MODEL.jsonl: a line for each evaluation of each finished run."""

    def __init__(self, path):
        self.path, self.lines, self.lock = path, {}, threading.Lock()
        if path.exists():
            for n, text in enumerate(path.read_text().splitlines(), 1):
                try:
                    line = json.loads(text)
                    self.lines[self.key(line)] = line
                except (ValueError, KeyError):
                    raise Stop(f"{path}:{n}: no line of results: {text[:60]}") from None

    def key(self, line):
        return line["run"], line["seed"], line["evaluation"], line["flags"]

    def find(self, run, evaluation, flags):
        return self.lines.get((run.digest, run.seed, evaluation, shlex.join(flags)))

    def add(self, line):
        """One write of less than a page, so that two of these programs cannot mix their lines."""
        with self.lock:
            self.lines[self.key(line)] = line
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def result_file(directory, evaluation, flags):
    """The evaluation's result in a run's directory, if it is of these weights -> path or None."""
    if not list(directory.glob("**/config.json")):
        return None
    directory = find_run(directory)
    files = list(directory.glob(f"eval-{evaluation}*.json"))

    # evaluated on several data sets: the name says on which
    data = as_dict(flags).get("--data")
    if data and len(files) > 1:
        files = [file for file in files if Path(data[0].split(",")[0]).stem in file.name]
    if len(files) > 1:
        raise Stop(f"{directory} has {len(files)} results of {evaluation}: "
                   f"{', '.join(sorted(file.name for file in files))}; delete all but one")

    # of the finished run, and not older than its weights
    info = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    if not files or info["step"] < info["total_steps"] or not weights.exists():
        return None
    return files[0] if files[0].stat().st_mtime >= weights.stat().st_mtime else None


def line_of(run, evaluation, flags, file):
    """What is kept of one evaluation: what was trained, its metrics, chance, which code."""
    result = json.loads(file.read_text())
    protocol = result["protocol"]
    trained = "; ".join(f"{task} {shlex.join(words)}".strip() for task, words in run.steps)
    line = {"run": run.digest, "seed": run.seed, "trained": trained, "evaluation": evaluation,
            "flags": shlex.join(flags)}
    line["metrics"] = rounded(result["metrics"])

    # what the table of the evaluation says besides: chance, and the mean over COCO's five folds
    for row in result["rows"]:
        if "chance" in row.values():
            line.setdefault("chance", rounded({key: row.get(key) for key in line["metrics"]}))
        elif "folds" in str(row.get("images")):
            line["metrics"] |= {f"{key}, folds": v for key, v in rounded(row).items()}
    line |= {"split": protocol.get("split"), "commit": (protocol.get("git_commit") or "")[:12]}
    return line | {"torch": protocol["versions"]["torch"], "device": protocol["device"]}


def rounded(metrics):
    return {key: round(v, 4) for key, v in metrics.items() if isinstance(v, (int, float))}


# --------------------------------------------------------------------------------------------------
# Running

class Driver:
    """Runs what is missing, several trainings at a time, one thread each."""

    def __init__(self, opts, results, keep):
        """keep: there are numbers to be kept, and not only a drawing in the run's directory."""
        self.opts, self.results, self.keep, self.folder = opts, results, keep, Path(opts.runs)
        self.failed, self.processes, self.done = {}, set(), set()
        self.stopped = False

    def missing(self, run):
        """The evaluations of a run whose numbers are not known."""
        return [one for one in run.evaluations if not self.results.find(run, *one)]

    def needed(self, group):
        """The runs of a group that must be trained: those without numbers, and what they start
        from."""
        names = set()
        for run in group:
            before = run if self.missing(run) else None
            while before:
                names.add(before.name)
                before = before.begin
        return [run for run in group if run.name in names]

    def call(self, words, log):
        """A command, its output in a file -> None, or the last line of what it printed.

        In a session of its own: Ctrl-C reaches this program alone, which then asks its trainings
        to save and stop, once.
        """
        scripts = {"train.py": str(ROOT / "train.py"), "eval.py": str(ROOT / "eval.py")}
        words = [scripts.get(word, sys.executable if word == "python" else word) for word in words]
        env = {"OMP_NUM_THREADS": "1"} | os.environ
        with open(log, "a") as output:
            process = subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            self.processes.add(process)
            process.wait()
            self.processes.discard(process)
        if process.returncode:
            printed = log.read_text(errors="replace").strip().splitlines()
            return printed[-1] if printed else f"exit status {process.returncode}"
        return None

    def run(self, run):
        """Trains a run and measures it -> None, or what went wrong."""
        if run.begin and run.begin.name in self.failed:
            return f"it starts from {run.begin.name}, which failed"
        opts, log = self.opts, self.folder / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)

        # evaluated elsewhere, by a line of --print, or here before a stop: only its numbers
        todo = [(one, result_file(self.folder / run.name, *one)) for one in self.missing(run)]
        if not todo or not all(file for _, file in todo):
            words = training(run, opts.model, opts.preset, self.folder, opts.launcher)
            wrong = self.call(words, log)
            if wrong:
                return wrong
        for (evaluation, flags), file in todo:
            if file is None:
                words = evaluating(run, evaluation, flags, self.folder, opts.launcher)
                wrong = self.call(words, log)
                if wrong:
                    return wrong
                file = result_file(self.folder / run.name, evaluation, flags)
            if file is None:
                return f"eval.py left no result of {evaluation} (see {log})"
            if self.keep:
                self.results.add(line_of(run, evaluation, flags, file))
        return None

    def run_group(self, group):
        for run in group:
            if self.stopped:
                return
            wrong = self.run(run)
            if wrong and not self.stopped:
                self.failed[run.name] = wrong
            self.done.add(run.name)

            # a wrong flag, a missing file: the others would fail as well
            if len(self.failed) == len(self.done) >= 3:
                self.stopped = True

    def progress(self, runs):
        """How many of the runs are done, counting the share of those that train now."""
        total = float(len(self.done))
        for run in runs:
            directory = self.folder / run.name
            # a run has its settings from its first checkpoint on
            if run.name not in self.done and list(directory.glob("**/config.json")):
                total += share_done(directory)
        return total

    def run_all(self, groups):
        """All groups, with a progress bar. Stopped by Ctrl-C or SIGTERM, it stops its trainings,
        which save."""
        groups = [needed for needed in map(self.needed, groups) if needed]
        runs = [run for group in groups for run in group]
        if not runs:
            return
        bar = tqdm(total=len(runs), desc=f"{self.opts.model} {self.opts.table}", dynamic_ncols=True,
                   bar_format="{l_bar}{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}{postfix}]")
        pool = ThreadPoolExecutor(self.opts.jobs)
        try:
            futures = [pool.submit(self.run_group, group) for group in groups]
            while wait(futures, timeout=1 if sys.stderr.isatty() else 60).not_done:
                bar.n = self.progress(runs)
                bar.set_postfix_str(f"{len(self.failed)} failed" if self.failed else "")
            bar.n = len(self.done)
            bar.refresh()
            for future in futures:
                future.result()                         # what went wrong in here, not in a run
        finally:
            self.stopped = True
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)
            pool.shutdown(cancel_futures=True)
            bar.close()


def share_done(directory):
    """Steps done of all steps, by the log of the stage that trains now."""
    where = find_run(directory)
    lines = (where / "log.jsonl").read_text().splitlines() if (where / "log.jsonl").exists() else []
    total = json.loads((where / "config.json").read_text())["total_steps"]
    return json.loads(lines[-1])["step"] / total if lines and total else 0.0


# --------------------------------------------------------------------------------------------------
# Statistics

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
               2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
               2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    """Standard deviation of a sample; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


def paired(a, b):
    """Row a minus row b, seed by seed. a, b: {seed: score} -> {mean, low, high, pairs}; low and
    high, the ends of the 95 % interval, are None below two pairs, and so is mean without any."""
    differences = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    n = len(differences)
    found = {"mean": mean(differences) if n else None, "low": None, "high": None, "pairs": n}
    if n >= 2:
        quantile = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
        half = quantile * deviation(differences) / math.sqrt(n)
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def judge(difference):
    """The verdict on "a is better than b", from paired(a, b)."""
    if difference["pairs"] >= 3 and difference["low"] > 0:
        return "holds"
    if difference["pairs"] >= 3 and difference["high"] < 0:
        return "contradicted"
    return "not separable"


# --------------------------------------------------------------------------------------------------
# The table

def columns_of(entry, preset):
    """The metrics that make the score; none for a figure. A preset may name its own."""
    return list(entry[preset].get("columns", entry.get("columns", ())))


def scores_of(opts, entry, row, evaluation, flags, last, results, failed):
    """The numbers of a row -> {seed: values of the columns}, [what was left out, and why]."""
    columns, values, left_out = columns_of(entry, opts.preset), {}, []
    for (name, seed), run in last.items():
        if name != row:
            continue
        line = results.find(run, evaluation, flags)
        if line is None:
            left_out.append(f"{row}, seed {seed}, {failed.get(run.name, 'not run')}")
            continue

        lacking = [column for column in columns if column not in line["metrics"]]
        if lacking:
            raise Stop(f"tools.tables: {evaluation} of {run.name} has no {', '.join(lacking)}; it "
                       f"has: {', '.join(line['metrics'])}")

        # a run that learnt next to nothing says when it would have begun, not how well it does
        found = [line["metrics"][column] for column in columns]
        floor = 10 * mean([line.get("chance", {}).get(column, 0.0) for column in columns])
        if mean(found) < floor:
            left_out.append(f"{row}, seed {seed}, never left its plateau: {mean(found):.1f} is "
                            f"below {floor:.1f}, ten times chance")
        else:
            values[seed] = found
    return values, left_out


def pick(values, columns, of):
    """{seed: values of the columns} -> {seed: mean of some of them; of all where none is named}."""
    places = [n for n, column in enumerate(columns) if not of or column in of]
    return {seed: mean([found[n] for n in places]) for seed, found in values.items()}


def summarize(opts, entry, evaluation, flags, last, results, failed):
    """Everything that a table says, as data: its rows, the verdicts, what was left out."""
    columns, rows, left_out = columns_of(entry, opts.preset), {}, []
    for name, command in entry["rows"].items():
        values, out = scores_of(opts, entry, name, evaluation, flags, last, results,
                                failed)
        rows[name], left_out = {"trained": command, "values": values}, left_out + out

    # every row beside the reference
    reference = entry.get("reference")
    for name, row in rows.items():
        if reference and name != reference:
            row["difference"] = paired(pick(row["values"], columns, ()),
                                       pick(rows[reference]["values"], columns, ()))

    # the pairs of rows that the paper's claim is about
    claims = []
    for better, than, *of in entry.get("better", ()):
        found = paired(*(pick(rows[name]["values"], columns, of) for name in (better, than)))
        claims.append({"better": better, "than": than, "columns": of or columns,
                       "difference": found, "verdict": judge(found)})
    return {"model": opts.model, "table": opts.table, "claim": entry["claim"],
            "preset": opts.preset, "evaluation": evaluation, "flags": shlex.join(flags),
            "columns": columns, "reference": reference, "rows": rows, "claims": claims,
            "left_out": left_out, "shared": entry[opts.preset],
            "paper": PAPER.get(opts.model, {}).get(opts.table)}


def shown(value):
    """Percentages with one decimal, shares with three."""
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def interval(found):
    """+1.2 [+0.3, +2.1], or less where there is less."""
    if found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.1f} (one pair)"
    places = 3 if max(abs(found["low"]), abs(found["high"])) < 1 else 1
    middle, low, high = (f"{found[key]:+.{places}f}" for key in ("mean", "low", "high"))
    return f"{middle} [{low}, {high}]"


def row_cells(name, row, summary):
    """The cells of a row: its name, its seeds, mean ± deviation a column, difference, paper."""
    found = list(row["values"].values())
    cells = [name, str(len(found))]
    for n in range(len(summary["columns"])):
        column = [values[n] for values in found]
        cells.append(f"{shown(mean(column))} ± {shown(deviation(column))}" if found else "-")
    if summary["reference"]:
        cells.append(interval(row["difference"]) if "difference" in row else "")
    if summary["paper"]:
        cells.append(summary["paper"][1].get(name, "-"))
    return cells


def markdown(summary, command):
    """The table as a page: claim, rows, verdicts, what was left out, and how it was made."""
    s = summary
    lines = [f"# {s['model']}, {s['table']}", "", s["claim"], "",
             f"Preset {s['preset']}, `eval.py --task {s['evaluation']} {s['flags']}`".rstrip("` ")
             + "`; mean ± standard deviation over the seeds.", ""]

    # the rows
    heads = ["row", "seeds", *s["columns"]]
    if s["reference"]:
        heads.append(f"minus {s['reference']}, paired [95 %]")
    if s["paper"]:
        heads.append(f"the paper: {s['paper'][0]}")
    lines += as_table(heads, [row_cells(name, row, s) for name, row in s["rows"].items()])

    # the claims
    rows = []
    for claim in s["claims"]:
        rows.append([f"{claim['better']} > {claim['than']}", ", ".join(claim["columns"]),
                     interval(claim["difference"]), str(claim["difference"]["pairs"]),
                     f"**{claim['verdict']}**"])
    if rows:
        heads = ["claim", "on the mean of", "difference, paired [95 %]", "pairs", "here"]
        lines += ["", *as_table(heads, rows)]
    for text in s["left_out"]:
        lines += ["", f"Left out: {text}."]

    # what was run
    lines += ["", f"Made by `{command}`:", ""]
    lines += [f"    {name}: {row['trained']}" for name, row in s["rows"].items()]
    lines += [f"    every {part}: {flags}" for part, flags in s["shared"].items()]
    return "\n".join(lines) + "\n"


def as_table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


# --------------------------------------------------------------------------------------------------
# The command line

def slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def list_tables(module, opts):
    """What `python -m tools.tables MODEL` prints: every table, its claim, the verdicts so far."""
    for table, entry in module.TABLES.items():
        presets = [preset for preset in module.PRESETS if preset in entry]
        print(f"{table}  ({len(entry['rows'])} rows; {', '.join(presets)})\n    {entry['claim']}")
        path = Path(opts.results) / f"{slug(opts.model + ' ' + table)}.json"
        if path.exists():
            for summary in json.loads(path.read_text()):
                for claim in summary["claims"]:
                    print(f"    {claim['better']} > {claim['than']}: {claim['verdict']}, "
                          f"{interval(claim['difference'])}")


def print_commands(groups, opts):
    """--print: a line for each run that starts from nothing, with what starts from it."""
    for group in groups:
        words = []
        for run in group:
            words.append(training(run, opts.model, opts.preset, Path(opts.runs), opts.launcher))
            for evaluation, flags in run.evaluations:
                words.append(evaluating(run, evaluation, flags, Path(opts.runs), opts.launcher))
        print(" && ".join(map(shlex.join, words)))


def write_tables(summaries, opts, command):
    """Prints the tables and writes them as MODEL-TABLE.md and .json; another preset or other flags
    are in the name."""
    preset = "" if opts.preset == "tiny" else opts.preset
    name = slug(" ".join([opts.model, opts.table, preset, *opts.more]))
    page = "\n".join(markdown(summary, command) for summary in summaries)
    path = Path(opts.results) / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    path.with_suffix(".json").write_text(json.dumps(summaries, indent=1) + "\n")
    print(f"\n{page}\n-> {path}")


def parse(argv):
    p = Parser(prog="tools.tables", description=__doc__)
    p.add_argument("model", metavar="MODEL", help="a file of models/, without .py")
    p.add_argument("table", metavar="TABLE", nargs="?", help="a key of its TABLES; none lists all")
    p.add_argument("--seeds", type=Few, default=5, help="how many: 0, 1, 2, ... (default: 5)")
    p.add_argument("--preset", default="tiny", help="tiny, or base: the paper's sizes and data")
    p.add_argument("--jobs", type=Few, default=2, help="trainings at a time (default: 2)")
    p.add_argument("--runs", default="out/tables", help="where the runs lie (default: out/tables)")
    p.add_argument("--results", default=str(ROOT / "models" / "results"),
                   help="where numbers and tables are written (default: models/results)")
    p.add_argument("--launcher", default="python", metavar="COMMAND",
                   help='before train.py: "torchrun --nproc_per_node 8" (default: python)')
    p.add_argument("--print", action="store_true", help="only print the commands, a job a line")

    # what is unknown here goes to every training
    opts, opts.more = p.parse_known_args(argv)
    as_dict(opts.more)
    return opts


def main(argv=None):
    """The command line -> the summaries that were written."""
    argv = sys.argv[1:] if argv is None else argv
    opts = parse(argv)
    module = load_module(opts.model)
    if opts.table is None:
        return list_tables(module, opts)
    entry = entry_of(module, opts.model, opts.table)
    if opts.preset not in entry:
        there = ", ".join(preset for preset in module.PRESETS if preset in entry)
        raise Stop(f"tools.tables: {opts.table} of {opts.model} has no settings for preset "
                   f"{opts.preset!r}; it has: {there}")

    # which runs there must be
    last, groups = plan(module, opts.model, entry, opts.preset, range(opts.seeds), opts.more)
    if opts.print:
        return print_commands(groups, opts)

    # make those that are missing; the table is of all that could be made
    results = Results(Path(opts.results) / f"{opts.model}.jsonl")
    driver, summaries = Driver(opts, results, bool(columns_of(entry, opts.preset))), []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("tools.tables: stopped by SIGTERM"))
    try:
        driver.run_all(groups)
    finally:
        signal.signal(signal.SIGTERM, before)
    if driver.keep:
        for evaluation, flags in evaluations_of(entry, opts.preset):
            summaries.append(summarize(opts, entry, evaluation, flags, last, results,
                                       driver.failed))
        write_tables(summaries, opts, "python -m tools.tables " + shlex.join(argv))
    else:
        print(f"{entry['evaluation']} wrote into:",
              *(f"\n  {row}: {Path(opts.runs) / run.name}" for (row, _), run in last.items()))
    for name, wrong in driver.failed.items():
        print(f"failed: {Path(opts.runs) / name}: {wrong}", file=sys.stderr)
    if driver.failed:
        raise Stop(f"tools.tables: {len(driver.failed)} of {len(driver.done)} runs failed; "
                   "the same command tries again")
    return summaries


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
