"""train.py as a user calls it: every model, every task; settings and their --help; stages; exact
resume; errors of one line."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import train
from models import codis, imagebert
from tools import shapes, weights

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.py"))
SMALL = ["--batch_size", "8", "--workers", "0", "--warmup_steps", "1", "--evals", "none",
         "--queue_size", "64", "--codewords", "16", "--vision_layers", "1", "--text_layers", "1"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world in a directory of its own, in which the commands run."""
    here = tmp_path_factory.mktemp("user")
    shapes.ensure(here / "datasets" / "shapes", quiet=True, scale=0.05)
    return here


@pytest.fixture(autouse=True)
def inside(world, monkeypatch):
    monkeypatch.chdir(world)


def of_task(kind):
    """(model, task) of every model file."""
    return [(name, task) for name in MODELS for task in getattr(weights.load_module(name), kind)]


def small(model):
    """SMALL, as far as the model has these settings."""
    known = set(vars(weights.load_module(model).Config())) | set(vars(train.Loop()))
    words = []
    for flag, value in zip(SMALL[::2], SMALL[1::2]):
        if flag.removeprefix("--") in known:
            words += [flag, value]
    return words


def codis_run(out, *more, steps=1):
    return train.main(["--model", "codis", "--steps", str(steps), *SMALL, "--out", str(out), *more])


def state_of(path):
    return load_file(Path(path) / "model.safetensors")


def read_json(path):
    return json.loads(Path(path).read_text())


def log_of(path):
    return [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(words, call, *args):
    """The call must end in one line that holds all the words."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    message = str(error.value)
    words = [words] if isinstance(words, str) else words
    assert "\n" not in message and all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------
# Settings: where they come from, and what is none

@pytest.mark.parametrize("table, place", [
    ("RECIPE", "pretrain"), ("RECIPE", "nlvr2"), ("PRESETS", "tiny"), ("PRESETS", "tiny.pretrain")])
def test_an_unknown_word_in_a_recipe_or_preset_is_refused(table, place, monkeypatch):
    """In a stage of a recipe too; by any command of this model, even for another task."""
    changed = copy.deepcopy(getattr(codis, table))
    row = changed
    for key in place.split("."):
        row = row[key]
    row = row[-1] if isinstance(row, list) else row
    row["warmup_step"] = 7
    monkeypatch.setattr(codis, table, changed)
    words = ["models/codis.py", table, *place.split("."), "warmup_step, which is no setting"]
    refused(words, train.parse, ["--model", "codis", "--task", "ve"])


@pytest.mark.parametrize("change, words", [
    ({"nrom": "clip"}, "no view 'clip' for 'nrom'"), ({"image": "rand"}, "no view 'rand'"),
    ({"source": "pair"}, "no source 'pair'")])
def test_an_unknown_word_in_views_is_refused(change, words, monkeypatch):
    monkeypatch.setitem(codis.VIEWS, "pretrain", codis.VIEWS["pretrain"] | change)
    refused(words, codis_run, "out/views")


def test_a_setting_of_both_model_and_loop_is_refused(monkeypatch):
    both = dataclasses.make_dataclass("Config", [("lr", float, 1.0)], bases=(codis.Config,))
    monkeypatch.setattr(codis, "Config", both)
    refused("models/codis.py: Config has lr, and so has train.py's Loop",
            train.parse, ["--model", "codis"])


@pytest.mark.parametrize("model", MODELS)
def test_what_the_data_decide_is_no_flag(model, capsys):
    config = weights.load_module(model).Config
    decided = [f.name for f, comment, _ in train.fields_of(config) if comment.startswith("[data]")]
    assert "vocab_size" in decided
    with pytest.raises(SystemExit):
        train.main(["--model", model, "--help"])
    said = capsys.readouterr().out
    for name in decided:
        assert f"--{name} " not in said
        refused(f"--{name}", train.parse, ["--model", model, f"--{name}", "7"])


def help_of(capsys, *flags):
    """What --help prints -> (its lines, {flag: the default it tells}, its groups)."""
    with pytest.raises(SystemExit) as error:
        train.main([*flags, "--help"])
    assert error.value.code == 0
    said = capsys.readouterr().out
    told = {}
    for entry in re.split(r"\n  (?=--)", said)[1:]:
        text = " ".join(entry.split("\n\n")[0].split())
        default = re.search(r"\[([^\[\]]*)\]$", text)
        told[text.split()[0]] = default[1] if default else None
    return said.splitlines(), told, re.findall(r"^(\S.*):$", said, re.M)


@pytest.mark.parametrize("flags, defaults", [
    ("codis", {"steps": "1700", "lr": "0.001", "batch_size": "32", "image_size": "72",
               "stem": "conv", "task": "pretrain"}),
    ("codis --task ve", {"steps": "1800", "lr": "0.0005"}),
    ("codis --preset base", {"steps": "0", "epochs": "30", "batch_size": "512", "lr": "0.0001",
                             "image_size": "256", "weight_decay": "0.02", "stem": "patch"}),
    ("codis --preset base --task vqa", {"epochs": "8", "batch_size": "256", "image_size": "384"}),
    ("mct --preset stock", {"epochs": "60", "queue_size": "65536", "optimizer": "sgd"}),
    ("imagebert --preset base --task retrieval", {"epochs": "130", "batch_size": "24"}),
])
def test_help_shows_the_defaults_of_model_preset_and_task(flags, defaults, capsys):
    _, told, groups = help_of(capsys, "--model", *flags.split())
    assert {name: told[f"--{name}"] for name in defaults} == defaults
    order = ["data: ", "schedule: ", "run: ", "evaluation: ", "pre-trained weights", "models/"]
    assert [next(g for g in groups if g.startswith(word)) for word in order] == groups[-6:]


@pytest.mark.parametrize("model", MODELS)
def test_help_fits_a_terminal_of_80_columns(model, capsys):
    """And tells every flag of the loop and of the model, whatever preset and task."""
    module = weights.load_module(model)
    own = train.fields_of(module.Config)
    for preset in module.PRESETS:
        for task in module.TASKS:
            lines, told, _ = help_of(capsys, "--model", model, "--preset", preset, "--task", task)
            assert max(map(len, lines)) <= 80, max(lines, key=len)
            for field, comment, _ in [*train.fields_of(train.Loop), *own]:
                assert f"--{field.name}" in told or not train.is_flag(comment)
            assert {f"--init_{side}" for side in module.INITS} <= set(told)


def test_help_without_a_model_shows_the_loops_defaults(capsys):
    lines, told, _ = help_of(capsys)
    assert told["--lr"] == "0.0001" and told["--evals"] == "default" and "--codewords" not in told
    assert max(map(len, lines)) <= 80


def test_a_share_of_the_steps_can_be_the_warmup():
    given = train.parse(["--model", "codis", "--warmup_steps", "0.1"])[-1]
    assert given["warmup_steps"] == 0.1
    loop, _ = train.settings(codis, "tiny", "pretrain", {**given, "lr": 1.0, "warmup_lr": 0.0})
    assert [train.learning_rate(step, 100, loop) for step in (0, 5, 10)] == [0, 0.5, 1]


def test_the_learning_rate_is_a_function_of_the_step():
    loop = train.Loop(lr=1e-4, warmup_lr=1e-5, warmup_steps=1000, min_lr=1e-5, schedule="cosine")
    values = [train.learning_rate(step, 30000, loop) for step in range(0, 30001, 100)]
    assert [values[n] for n in (0, 10, -1)] == pytest.approx([1e-5, 1e-4, 1e-5])
    rising, falling = values[:11], values[10:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert len(set(rising)) == 11 and len(set(falling)) == len(falling)

    half = train.Loop(lr=1.0, schedule="step", milestones="0.5,0.75")
    rates = [train.learning_rate(step, 100, half) for step in (0, 49, 50, 75)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("task", imagebert.TASKS)
def test_a_model_without_param_groups_gets_decay_on_matrices_only(task):
    sizes = dict(width=16, layers=2, heads=2, mlp_ratio=2, max_text=11, positions=12,
                 vocab_size=40, cls_id=2, sep_id=3, mask_id=4, first_word=5, region_dim=6,
                 region_classes=5)
    model = imagebert.ImageBert(imagebert.Config(**sizes), task)
    assert not hasattr(model, "param_groups")
    groups = train.make_optimizer(model, train.Loop(weight_decay=0.1, lr=0.5)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert group["lr"] == group["peak"] == 0.5
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0)


def test_frozen_parameters_are_in_no_group():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    groups = train.make_optimizer(model, train.Loop(weight_decay=0.1)).param_groups
    found = [p for group in groups for p in group["params"]]
    assert found == [model[1].weight, model[1].bias]


# --------------------------------------------------------------------------------------------------
# Runs

@pytest.mark.parametrize("model, task", of_task("TASKS"))
def test_every_task_trains_a_few_steps_and_writes_its_run(model, task):
    out = f"out/{model}-{task}-few"
    train.main(["--model", model, "--task", task, "--steps", "2", "--log_every", "1", "--out", out,
                "--limit", "100", *small(model)])
    run = weights.find_run(out)
    files = {"config.json", "model.safetensors", "model-2.safetensors", "state-2.pt", "log.jsonl",
             "vocab.txt", "lock"}
    features = {"features.npy", "features.json", "lock"}
    assert files - {"lock"} == {path.name for path in run.iterdir()} - features
    assert read_json(run / "config.json")["step"] == 2
    assert [line["step"] for line in log_of(run)] == [1, 2]
    assert all(line["loss"] == line["loss"] for line in log_of(run)), "not a number"

    # the weights come back
    trained, _ = weights.load_run(run)
    state = trained.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(run).items())


@pytest.mark.parametrize("accum", ["1", "2"])
def test_resume_is_bit_for_bit(accum):
    command = ["--model", "codis", "--steps", "4", "--accum", accum, "--save_every", "2", *SMALL]
    whole, killed = f"out/whole{accum}", f"out/killed{accum}"
    train.main([*command, "--out", whole])

    # the same run, killed after step 3: its process dies without a chance to tidy up
    script = ("import os, train, models.codis as m\n"
              "old = m.Codis.after_step\n"
              "def after_step(self, step, *a):\n"
              "    old(self, step, *a)\n"
              "    step == 3 and os.kill(os.getpid(), 9)\n"
              "m.Codis.after_step = after_step\n"
              f"train.main({[*command, '--out', killed]!r})")
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]

    train.main([*command, "--out", killed, "--resume"])
    assert same(state_of(whole), state_of(killed))
    steps = [line["step"] for line in log_of(killed)]
    assert steps == sorted(set(steps))


def test_resume_refuses_another_command():
    codis_run("out/other")
    refused("lr", codis_run, "out/other", "--lr", "0.5", "--resume")


def test_init_lists_what_is_new_and_refuses_an_empty_backbone(capsys):
    codis_run("out/pre")
    for task in ("retrieval", "vqa", "ve", "nlvr2"):
        codis_run(f"out/{task}", "--task", task, "--init", "out/pre")
        assert "init from out/pre" in capsys.readouterr().out
    refused("backbone", codis_run, "out/deeper", "--task", "ve", "--init", "out/pre",
            "--text_layers", "2")

    # not the lower half of a fusion encoder
    codis_run("out/three", "--fusion_layers", "3")
    refused(["no place for fusion", "flags of size"], codis_run, "out/cut", "--task", "vqa",
            "--init", "out/three")


def test_a_run_of_old_weight_names_is_refused(tmp_path):
    """Blocks had other names before there was one Block for all towers."""
    name = "vision.blocks.0.attn.qkv.weight"
    save_file({name: torch.zeros(6, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    shutil.copy("datasets/shapes/vocab.txt", tmp_path)
    words = ["model.safetensors", "before the weights were renamed", name, "train this run again"]
    refused(words, weights.read_run, tmp_path / "model.safetensors")
    refused(words, codis_run, "out/renamed", "--task", "ve", "--init", str(tmp_path))


@pytest.mark.parametrize("flags, words", [
    ("--model nope", "nope"), ("--model codis --task nope", "nope"),
    ("--model codis --data missing.json --vocab x", "missing.json"),
    ("--model codis --lrr 1", "--lrr"), ("--model codis --preset huge", "huge"),
    ("--model codis --batch_size 7 --accum 2", "batch_size"),
    ("--model codis --image_size 64", "--patch 24"),
    ("--model codis --init_text nothing.safetensors", "nothing.safetensors"),
    ("--model codis --init nowhere", "nowhere")])
def test_what_the_user_gets_wrong_is_one_line(flags, words):
    refused(words, train.main, flags.split())


def test_an_error_is_one_line_of_stderr_and_an_exit_status():
    command = [sys.executable, str(ROOT / "train.py"), "--model", "codis", "--lrr", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "--lrr" in lines[0], done.stderr


def test_two_processes_end_with_equal_queues_and_weights():
    words = ["train.py", "--model", "codis", "--steps", "2", *SMALL, "--out", "out/two"]
    Path("two.py").write_text(
        "import os, sys, torch, train\n"
        f"sys.argv = {words!r}\n"
        "end = train.train\n"
        "def train_(*a, **k):\n"
        "    raw, info = end(*a, **k)\n"
        "    torch.save(raw.state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n"
        "    return raw, info\n"
        "train.train = train_\n"
        "train.main()\n")
    done = subprocess.run([*TORCHRUN, "two.py"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    assert (first["queue_ids"] >= 0).sum() == 16


# the others' tiny runs are not settled yet: the README says what was measured
@pytest.mark.parametrize("model", ["codis"])
def test_tiny_learns(model):
    """After 100 steps the right caption is among the first ten of 2,500 at least four times as
    often as by chance, and the right picture among the first ten of 500."""
    out = f"out/{model}-learns"
    train.main(["--model", model, "--steps", "100", "--evals", "none", "--out", out,
                "--workers", "0"])
    evaluation.main([out, "--task", "retrieval", "--split", "train", "--rerank_k", "0", "--limit",
                     "500"])
    result = read_json(f"{out}/eval-retrieval-shapes-train-limit_500-rerank_k_0.json")
    rows = {row["scores"]: row for row in result["rows"]}
    for key in ("i2t_r10", "t2i_r10"):
        assert rows["dual encoder"][key] >= 4 * rows["chance"][key], rows


# --------------------------------------------------------------------------------------------------
# Regions, and real detection data

def test_regions_pretraining_fine_tuning_and_evaluation(squares, tmp_path, capsys):
    train.main(squares.imagebert(tmp_path / "pre", "--evals", "default", "--eval_split", "train",
                                 "--eval_limit", "6"))
    text = capsys.readouterr().out
    assert squares.stand_in in text and "match, all 72 pairs" in text and "moc" in text
    protocol = read_json(tmp_path / "pre" / "eval-retrieval-pairs-train-limit_6.json")["protocol"]
    assert protocol["images"] == 6 and protocol["regions"] == squares.stand_in
    masked = read_json(tmp_path / "pre" / "eval-masked-pairs-train-limit_6.json")["metrics"]
    assert set(masked) == {"mlm", "mlm_baseline", "moc", "moc_baseline"}

    # fine-tuning starts from it, with the matching head
    train.main(squares.imagebert(tmp_path / "ft", "--task", "retrieval", "--init", tmp_path / "pre",
                                 "--ce", 1, "--triplet", 1, "--steps", 0))
    said = capsys.readouterr().out
    assert "new: none; dropped: mlm_head, moc_head, mrfr_head" in said
    model, _ = weights.load_run(tmp_path / "ft")
    before = weights.load_run(tmp_path / "pre")[0].state_dict()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())

    refused("does not offer", evaluation.main, [str(tmp_path / "ft"), "--task", "masked"])
    refused("name their files, --regions", train.main, squares.command(tmp_path / "no"))


def test_regions_stand_for_the_pictures(squares, tmp_path, capsys):
    """Where there are features, no picture is opened or asked for; a model that looks at pictures
    asks for them."""
    pairs = tmp_path / "pairs.jsonl"
    extra = {"image": "unknown.png", "image_id": 99, "caption": ["a red square"]}
    pairs.write_text(squares.pairs.read_text() + json.dumps(extra) + "\n")
    train.main(squares.imagebert(tmp_path / "run", "--data", pairs, "--steps", 1,
                                 "--evals", "retrieval", "--eval_split", "train"))
    out, err = capsys.readouterr()
    assert "24 records of" in out and "without_regions 1" in out
    assert "missing" not in out.split("parameters")[0]
    assert "1 of 25 records left out" in err
    protocol = read_json(tmp_path / "run" / "eval-retrieval-pairs-train-limit_100.json")["protocol"]
    assert protocol["images"] == 24 and protocol["unreadable_images"] == 0

    with pytest.raises(data.DataError, match="none of the 25 image files"):
        train.main(squares.command(tmp_path / "no", "--data", pairs, model="codis"))
    with pytest.raises(data.DataError, match="--regions .*nowhere: no such file"):
        train.main(squares.imagebert(tmp_path / "no", "--regions", tmp_path / "nowhere"))


def test_two_processes_of_regions(squares, tmp_path):
    """No parameter goes unused under DDP; a shared evaluation has the numbers of one process."""
    words = squares.imagebert(tmp_path / "two", "--evals", "retrieval", "--eval_split", "train",
                              "--log_every", 1)
    done = subprocess.run([*TORCHRUN, str(ROOT / "train.py"), *words], env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes x 1 x 4" in done.stdout
    two = read_json(tmp_path / "two" / "eval-retrieval-pairs-train-limit_100.json")
    one = evaluation.main([str(tmp_path / "two"), "--task", "retrieval", "--split", "train"])
    assert two["metrics"] == pytest.approx(one["retrieval"]["metrics"])
    assert two["protocol"]["captions"] == 48


DETECTORS = ("--image_size 32 --vision_width 4 --width 24 --text_layers 1 --text_heads 3 "
             "--head_hidden 20 --queue_size 16 --max_text 6 --rois 8 --batch_size 4 --steps 1 "
             "--workers 0 --detect_max 48 --eval_limit 5").split()


@pytest.mark.skipif(not SHARED.exists(), reason="the cuts of public data are not here")
@pytest.mark.parametrize("task, flags", [
    ("detection", f"--data {SHARED}/voc/VOCdevkit"),
    ("segmentation", f"--data {SHARED}/coco/annotations/instances_val2017.json --hold_out 0")])
def test_detectors_train_on_real_data(task, flags, tmp_path):
    """VOC's and COCO's files as they are published, crowds and truncated pictures among them: a
    step, and the table."""
    words = ["--model", "mct", "--task", task, "--vocab", "datasets/shapes/vocab.txt", *DETECTORS]
    rows = train.main([*words, *flags.split(), "--out", str(tmp_path / task)])[task]["rows"]
    by = 2 if importlib.util.find_spec("pycocotools") else 1        # VOC's rule, COCO's own tool
    assert len(rows) == by * (2 if task == "detection" else 3)
    assert all(0 <= r["AP"] <= r["AP50"] + 1e-6 < 101 for r in rows)


# --------------------------------------------------------------------------------------------------
# Stages

def states(out):
    return [load_file(path) for path in sorted(Path(out).glob("stage-*/model.safetensors"))]


def test_stages_by_data_are_separate_commands_with_init(squares, tmp_path, capsys):
    a, b = squares.small, squares.pairs
    train.main(squares.imagebert(tmp_path / "two", "--stage_data", a, b))
    text = capsys.readouterr().out
    assert "10 records of" in text and "24 records of" in text
    assert text.count("3 steps of 8") == 2
    first, second = (read_json(tmp_path / "two" / f"stage-{n}" / "config.json")["loop"]
                     for n in (1, 2))
    assert Path(first["data"]).name == "small.jsonl"
    assert Path(second["data"]).name == "pairs.jsonl"
    assert second["init"] == str(tmp_path / "two" / "stage-1")

    # data of one stage: in the run's own folder
    train.main(squares.imagebert(tmp_path / "one", "--stage_data", a))
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert same(one, states(tmp_path / "two")[0])

    # a stage is a run with --init: optimizer and schedule begin anew
    train.main(squares.imagebert(tmp_path / "next", "--init", tmp_path / "one"))
    following = load_file(tmp_path / "next" / "model.safetensors")
    assert same(following, states(tmp_path / "two")[1])
    assert weights.find_run(tmp_path / "two").name == "stage-2"
    train.main(squares.imagebert(tmp_path / "three", "--stage_data", a, b, a, "--steps", 1))
    assert len(states(tmp_path / "three")) == 3


def test_resume_knows_the_stage(squares, tmp_path, monkeypatch):
    def args(out, *more):
        return squares.imagebert(tmp_path / out, "--stage_data", squares.small, squares.pairs,
                                 "--save_every", 1, *more)

    train.main(args("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    real, steps = imagebert.ImageBert.forward, []

    def forward(self, batch):
        steps.append(0)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(imagebert.ImageBert, "forward", forward)

    # stopped in the first stage, then in the second, of a run that replaces another one: that one
    # is gone with the first checkpoint, its second stage too
    for stop, left in ((2, 5), (5, 2)):
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            train.main(args("cut", "--overwrite"))
        stop = 0
        assert (tmp_path / "cut" / "stage-2" / "model.safetensors").exists() == (left == 2)
        steps.clear()
        train.main(args("cut", "--resume"))
        assert len(steps) == left
        for whole, cut in zip(states(tmp_path / "whole"), states(tmp_path / "cut"), strict=True):
            assert same(whole, cut)


def test_recipes_with_stages(squares, tmp_path, monkeypatch):
    """A list of dicts = stages, each with its own settings; the preset's list, the command line's
    data and the recipe's agree on how many."""
    refused("pretrain has 2 stages: name the data of each",
            train.main, squares.imagebert(tmp_path / "b", "--preset", "base"))
    refused("1 --stage_root for 2 stages", train.main, squares.imagebert(
        tmp_path / "b", "--stage_data", "a", "b", "--stage_root", "c"))

    presets = copy.deepcopy(imagebert.PRESETS)
    presets["tiny"]["pretrain"] = [dict(lr=1e-3, moc=0.0),
                                   dict(lr=3e-4, schedule="constant", width=16)]
    monkeypatch.setattr(imagebert, "PRESETS", presets)
    found = []
    for stage in (0, 1, 2):
        loop, cfg = train.settings(imagebert, "tiny", "pretrain", {}, stage)
        found.append((loop.lr, loop.schedule, cfg.moc))
    last = (3e-4, "constant", 1.0)
    assert found == [(1e-3, "constant", 0.0), last, last]

    # a setting of the model too may differ from stage to stage
    train.main(squares.imagebert(tmp_path / "s", "--stage_data", squares.small, squares.pairs,
                                 "--steps", 1))
    first, second = states(tmp_path / "s")
    assert "moc_head.weight" not in first and "moc_head.weight" in second
