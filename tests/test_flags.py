"""Every flag with bad values: refused in one line that names it, or accepted because the value has
a meaning, and then the model is built with it and gives a loss.

No training runs here: train.py's settings are checked before anything is read."""

import argparse
import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import tools
import train
from tools import lait, regions, runs, shapes, weights

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.py"))
HUGE = "1000000000000"

# What a user may try, and what of it each kind of number takes
TRIED = ("-1", "0", "1", "0.5", "1.5", "nan", "inf", "-inf", "word", "", HUGE, "9" * 400)
TAKES = {"Size": {"1"}, "Few": {"1"}, "FewOrNone": {"0", "1"}, "Tokens": set(), "Seed": {"0", "1"},
         "Workers": {"-1", "0", "1"}, "Count": {"0", "1", HUGE}, "Share": {"0", "1", "0.5"},
         "Rate": {"0", "0.5"}, "Amount": {"0", "1", "0.5", "1.5", HUGE},
         "Positive": {"1", "0.5", "1.5", HUGE}, "bool": {"0", "1"}}


def refusal(call, *args):
    """The one line with which a call ends; None if it does not end."""
    try:
        call(*args)
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.strip(), f"exit status {stop.code}"
        assert "\n" not in stop.code, stop.code
        return stop.code
    return None


def kind_names(module):
    """{type: its name} of the kinds of numbers that a file writes down."""
    return {kind: name for name, kind in vars(module).items() if get_origin(kind) is Annotated}


def inner(field):
    return get_args(field.type)[0] if get_origin(field.type) is tuple else field.type


# --------------------------------------------------------------------------------------------------
# The types

def test_a_kind_means_the_same_in_every_file():
    """And is what TAKES says, which is written down here once more."""
    seen = {}
    for module in (tools, train, *map(weights.load_module, MODELS)):
        for kind, name in kind_names(module).items():
            number, told, legal = get_args(kind)
            takes = []
            for text in TRIED:
                with contextlib.suppress(ValueError):   # a word
                    takes += [text] * legal(number(text))
            assert seen.setdefault(name, (number, told)) == (number, told), (module.__name__, name)
            if name != "Finite":
                assert set(takes) == TAKES[name], (module.__name__, name)


@pytest.mark.parametrize("name", ["Loop", *MODELS])
def test_every_setting_says_what_is_legal(name):
    """A number by one of the kinds of tools/__init__.py, a word by a Literal. A plain int is left
    to what the data decide, a plain str to paths, names and lists."""
    module = train if name == "Loop" else weights.load_module(name)
    cls = train.Loop if name == "Loop" else module.Config
    free = ("data image_root vocab split regions tag_words paraphrase stage_data stage_root "
            "image_view milestones out init evals eval_data eval_root eval_split").split()
    for field, comment, _ in train.fields_of(cls):
        kind = inner(field)
        if not train.is_flag(comment) or field.name in free and name == "Loop":
            continue
        assert kind is bool or kind in kind_names(module) or get_origin(kind) is Literal, (
            f"{name}.{field.name}: write one of {', '.join(kind_names(tools).values())}, or a "
            f"Literal of its words, in place of {kind.__name__}")


# --------------------------------------------------------------------------------------------------
# train.py: flags and tables

@pytest.fixture(scope="module")
def parsers():
    """{model: train.py's parser for it}: it takes a second to make one."""
    made, old = {}, train.Parser.parse_args

    def keep(parser, model):
        made[model] = parser
        return argparse.Namespace()
    train.Parser.parse_args = lambda self, argv: keep(self, argv[1])
    for model in MODELS:
        train.parse(["--model", model])
    train.Parser.parse_args = old
    return made


def settings_of(parser, model, argv):
    """What parse() does once its parser stands."""
    module, given = weights.load_module(model), {}
    for name, value in vars(parser.parse_args(["--model", model, *argv])).items():
        if value is not None and name not in ("model", "preset", "task"):
            given[name] = tuple(value) if isinstance(value, list) else value
    return train.settings(module, "tiny", module.TASKS[0], given)


@pytest.mark.parametrize("model", MODELS)
def test_every_number_and_word_of_train_is_checked(model, parsers):
    module, walked = weights.load_module(model), 0
    names, at_odds = kind_names(module) | kind_names(train), set()
    shared = train.fields_of(train.Loop) if model == MODELS[0] else []
    for field, comment, _ in [*shared, *train.fields_of(module.Config)]:
        kind = inner(field)
        if not train.is_flag(comment) or kind is str:
            continue
        several = max(1, len(getattr(train.Loop(), field.name, ()) or getattr(
            module.Config(), field.name))) if get_origin(field.type) is tuple else 1
        for text in TRIED:
            words = get_args(kind) if get_origin(kind) is Literal else TAKES.get(
                names.get(kind, kind.__name__ if kind is bool else ""))
            said = refusal(settings_of, parsers[model], model,
                           [f"--{field.name}={text}"] if several == 1 else
                           [f"--{field.name}", *[text] * several])
            walked += 1

            # not of its kind: the line names it. Of its kind: taken, unless another flag is at odds
            if text not in words:
                assert said and f"--{field.name}" in said, (field.name, text, said)
            elif said:
                assert f"--{field.name}" in said, (field.name, text, said)
                at_odds.add(field.name)
    assert walked > 300

    # of the right kind, and yet refused: 1 with the others as they are, a crop of area 0
    assert at_odds <= {"crop_scale", "pool", "warmup_lr", "width", "patch", "image_size", "min_lr",
                       "embed_dim", "vision_width", "heads", "tcl_mask", "tcl_substitute", "gamma",
                       "warmup_steps", "hold_out"}


@pytest.mark.parametrize("flags, line", [
    ("--model codis --heads 5", "--heads 5: does not divide --width 128"),
    ("--model codis --vision_heads 3", "--vision_heads 3: does not divide --vision_width 128"),
    ("--model codis --max_text 600", "--max_text 600: more than --positions 512"),
    ("--model codis --max_answer 600", "--max_answer 600: more than --positions 512"),
    ("--model codis --patch 18", "--patch 18: --stem conv wants a multiple of 4"),
    ("--model conlip --width 1 --heads 1", "--width 1: --stem conv halves it"),
    ("--model cookie --image_size 8", "--image_size 8: --backbone tiny has a stride of 16"),
    ("--model conlip --patch 16", "--image_size 72: not a multiple of --patch 16 x --mask_unit 1"),
    ("--model conlip --heads 5", "--heads 5: does not divide --width 128"),
    ("--model conlip --max_text 600", "--max_text 600: more than --positions 512"),
    ("--model cookie --te_heads 3", "--te_heads 3: does not divide --embed_dim 128"),
    ("--model cookie --max_text 600", "--max_text 600: more than --positions 512"),
    ("--model cookie --tcl_mask 0.95", "--tcl_substitute 0.1: with --tcl_mask 0.95 more than all"),
    ("--model mct --text_heads 3", "--text_heads 3: does not divide --width 128"),
    ("--model mct --layers 1 1", "--layers (1, 1): 4 numbers"),
    ("--model mct --layers 1 1 0 1", "--layers 0: from 1 to 1000"),
    ("--model mct --task segmentation --anchors 8 16", "--anchors: 2 sides"),
    ("--model mct --heads unified", "--heads unified: --intra_dim 64 and --inter_dim 128 differ"),
    ("--model imagebert --pool 1", "--pool 1: the positive and at least one negative make 2"),
    ("--model imagebert --max_text 512", "--max_text 512: of 512 positions the last"),
    ("--model codis --crop_scale 0.5 0.2", "--crop_scale 0.5 0.2: the smallest share"),
    ("--model codis --crop_scale 0 1", "--crop_scale 0 1: the smallest share, above 0"),
    ("--model codis --crop_scale 0 2", "--crop_scale 2.0: from 0 to 1"),
    ("--model codis --crop_scale 0.5", "--crop_scale: expected 2 arguments"),
    ("--model codis --min_lr 1", "--min_lr 1: more than --lr 0.001"),
    ("--model codis --lr 1e-6", "--min_lr 1e-05: more than --lr 1e-06"),
    ("--model codis --gamma 2", "--gamma 2: a factor above 1"),
    ("--model codis --steps 10 --warmup_steps 11", "--warmup_steps 11: the run has 10 steps"),
    ("--model codis --device foo", "--device: invalid choice: 'foo'"),
    ("--model codis --schedule cosin", "--schedule: invalid choice: 'cosin'"),
    ("--model codis --optimizer lion", "--optimizer: invalid choice: 'lion'"),
    ("--model codis --amp bf17", "--amp: invalid choice: 'bf17'"),
    ("--model codis --lr", "--lr: expected one argument"),
    ("--model codis --resume maybe", "'maybe' is neither True nor False"),
])
def test_what_contradicts_is_one_line(flags, line):
    said = refusal(train.parse, flags.split())
    assert said and line in said


@pytest.mark.parametrize("shares", ["", "x", "0.5,", "0", "1", "0.5,0.5", "0.6,0.5", "nan", "-0.1",
                                    "1.5", "0.5;0.6", HUGE])
def test_milestones_are_rising_shares(shares):
    said = refusal(train.parse, ["--model", "codis", f"--milestones={shares}"])
    assert said and "--milestones" in said
    assert refusal(train.parse, ["--model", "codis", "--milestones=0.25,0.5"]) is None


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(train.parse, ["--model", "codis", "--device", "cuda"])
    assert said == "--device cuda: there is no CUDA device here"


@pytest.mark.parametrize("table, place, row", [
    ("RECIPE", "ve", {"clip": -1.0}), ("RECIPE", "ve", {"batch_size": 0}),
    ("PRESETS", "tiny", {"dropout": 1.5}), ("PRESETS", "tiny", {"act": "swish"}),
    ("PRESETS", "tiny", {"width": 12.5}), ("PRESETS", "tiny", {"width": "wide"}),
    ("PRESETS", "tiny", {"heads": 5}), ("PRESETS", "tiny", {"codebook": "no"}),
    ("RECIPE", "ve", {"crop_scale": 0.5}), ("RECIPE", "ve", {"schedule": "cosin"}),
    ("RECIPE", "ve", {"milestones": (0.5,)}), ("RECIPE", "ve", {"lr": float("nan")})])
def test_tables_are_checked_like_flags(table, place, row, monkeypatch):
    module = weights.load_module("codis")
    monkeypatch.setitem(getattr(module, table), place, {**getattr(module, table)[place], **row})
    monkeypatch.setitem(module.PRESETS["tiny"], "ve", {})
    said = refusal(train.parse, ["--model", "codis", "--task", "ve"])
    assert said and f"--{list(row)[0]}" in said


def test_the_warm_up_fits_into_the_run():
    """A share of all steps, or steps; what a shorter run inherits may be longer."""
    module = weights.load_module("codis")
    loop, _ = train.settings(module, "tiny", "pretrain", {"warmup_steps": 0.1, "steps": 50})
    assert train.warmup_length(50, loop) == 5
    loop, _ = train.settings(module, "tiny", "pretrain", {"steps": 3})
    assert loop.warmup_steps == 100
    train.check_warmup(5, 5)
    assert "3 steps" in refusal(train.check_warmup, 5, 3)


def test_what_memory_cannot_hold_is_refused_before_it_is_built():
    module = weights.load_module("codis")
    for given, what in (({"width": 10**6, "heads": 4}, "the weights"),
                        ({"image_size": 240_000}, "the weights")):
        _, cfg = train.settings(module, "tiny", "pretrain", given)
        said = refusal(train.check_memory, module, cfg, "pretrain", {}, 32)
        assert f"{what} would take" in said and "this machine has" in said
    module = weights.load_module("cookie")
    _, cfg = train.settings(module, "tiny", "hashing", {"image_size": 10**6})
    said = refusal(train.check_memory, module, cfg, "hashing", {"num_labels": 4}, 1)
    assert "a batch of pictures would take 12,000 GB" in said
    _, cfg = train.settings(module, "tiny", "hashing", {})
    assert refusal(train.check_memory, module, cfg, "hashing", {"num_labels": 4}, 32) is None


# --------------------------------------------------------------------------------------------------
# What is accepted is built

# so small that hundreds are built; one head, so that a width may be any number
SMALL = dict(image_size=4, patch=1, vision_width=8, width=8, vision_layers=1,
             text_layers=1, fusion_layers=1, layers=1, heads=1, vision_heads=1, text_heads=1,
             te_heads=1, mlp_ratio=1, embed_dim=8, queue_size=8, codewords=6, max_text=6,
             head_hidden=8, intra_dim=8, inter_dim=8, bn_groups=2, joint_dim=8, word_dim=8,
             region_dim=5, region_classes=4, tag_width=3, frame_width=5, positions=16)
IDS = dict(vocab_size=40, pad_id=0, cls_id=2, sep_id=3, mask_id=4, first_word=5)


def small_config(model, **over):
    """PRESETS["tiny"], and smaller still."""
    module = weights.load_module(model)
    tiny = {k: v for k, v in module.PRESETS["tiny"].items() if k not in module.VIEWS}
    own = {f.name: f.type for f in dataclasses.fields(module.Config)}
    sizes = {k: v for k, v in (SMALL | IDS).items() if k in own and own[k] in (
        int, module.Size, module.Few, module.Tokens)}   # mct's heads and layers are others
    if "patch" in own:
        sizes["stem"] = "patch"
    if model == "cookie":
        sizes["image_size"] = 16                        # the stride of its smallest CNN
    return module.Config(**{**tiny, **sizes, **over})


def batch_of(cfg, b=4):
    """Random numbers under every key that a first task reads."""
    side = getattr(cfg, "image_size", 8)
    batch = {"image_id": torch.arange(b), "tags": torch.randint(20, (b, 3))}
    for key in ("image", "image_key", "view1", "view2"):
        batch[key] = torch.randn(b, 3, side, side)
    for key in ("text", "text_key"):
        batch[key] = torch.randint(5, 40, (b, cfg.max_text))
        batch[key + "_mask"] = torch.ones(b, cfg.max_text, dtype=torch.long)
    batch["text_valid"] = torch.ones(b, dtype=torch.long)

    # two regions a picture
    corner = 30 * torch.rand(b, 2, 2)
    return batch | {"regions": torch.randn(b, 2, 5), "regions_global": torch.randn(b, 2048),
                    "regions_size": torch.full((b, 2), 64.0),
                    "regions_box": torch.cat([corner, corner + 20], -1),
                    "regions_mask": torch.ones(b, 2, dtype=torch.long),
                    "regions_label": torch.randint(4, (b, 2))}


# the ends of each range, and an odd number, which nothing divides
ENDS = {"Size": (1, 7), "Few": (1, 7), "FewOrNone": (0, 7), "Tokens": (3, 10), "Count": (0, 7),
        "Share": (0.0, 1.0), "Rate": (0.0, 0.999), "Amount": (0.0, 1e6), "Positive": (1e-3, 1e6)}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_accepted_is_built_and_gives_a_loss(model):
    module = weights.load_module(model)
    task, names, built = module.TASKS[0], kind_names(module), set()
    fields = [f for f, comment, _ in train.fields_of(module.Config) if train.is_flag(comment)]
    for field in fields:
        kind = inner(field)
        ends = {bool: (False, True)}.get(kind) or ENDS.get(names.get(kind)) or get_args(kind)
        for value in (16, *ends) if field.name == "image_size" else ends:
            if get_origin(field.type) is tuple:
                value = (value,) * len(getattr(module.Config(), field.name))
            cfg = small_config(model, **{field.name: value})
            if refusal(cfg.check, task):                # at odds with another setting, and said so
                continue
            built.add(field.name)
            with torch.device("meta"):                  # initial weights take most of the time
                network = module.Model(cfg, task, num_labels=20)
            network.to_empty(device="cpu")
            for tensor in network.state_dict().values():
                tensor.zero_()
            out = []
            said = refusal(lambda: out.append(network.train()(batch_of(cfg))))
            assert said and f"--{field.name}" in said or out[0]["loss"].ndim == 0, field.name
    assert built == {field.name for field in fields}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_checks_itself_when_it_is_built(model):
    """As in a file that was copied away: the same line, whoever calls."""
    module = weights.load_module(model)
    for task in module.TASKS:
        said = refusal(module.Model, small_config(model, dropout=1.0), task, 20)
        assert said == "--dropout 1.0: from 0 to below 1"
        assert refusal(module.Model, small_config(model, act="swish"), task, 20)
        assert refusal(module.Model, small_config(model, max_text=17), task, 20)


# --------------------------------------------------------------------------------------------------
# The tools, data.py and eval.py

def tool_lines(tmp):
    """{tool: (main, its parser's maker, words that end in one line before any work is done)}."""
    (tmp / "file").write_text("x")
    return {"regions": (regions.main, ["--images", f"{tmp}/nowhere", "--out", f"{tmp}/out"]),
            "lait": (lait.main, ["--in", f"{tmp}/nowhere", "--out", f"{tmp}/out"]),
            "shapes": (shapes.main, ["--root", f"{tmp}/file"])}


@pytest.fixture
def no_network(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def kept(monkeypatch):
    """The parsers that are made in a test."""
    made, old = [], tools.Parser.__init__

    def init(self, **options):
        old(self, **options)
        made.append(self)
    monkeypatch.setattr(tools.Parser, "__init__", init)
    return made


@pytest.mark.parametrize("tool", ["regions", "lait", "shapes"])
def test_every_flag_of_a_tool_is_checked(tool, tmp_path, kept):
    main, words = tool_lines(tmp_path)[tool]
    usual = refusal(main, words)
    assert usual and ("nowhere" in usual or "file" in usual)
    names, walked = kind_names(tools), 0
    for action in kept[0]._actions:
        flag = action.option_strings[-1]
        if action.nargs == 0 or tool == "shapes" and flag == "--root":      # any name is a folder's
            continue
        legal = set(action.choices or ()) or TAKES.get(names.get(action.type))
        legal = {"0.5", "1"} if flag == "--scale" else legal            # shapes.ensure() tells
        for text in TRIED:
            said = refusal(main, [*words, f"{flag}={text}"])
            walked += 1
            if legal is None:                           # a path: one line at least
                assert said, (flag, text)
            elif text in legal or names.get(action.type) == "Finite" and text in TAKES["Amount"]:
                assert said == usual or flag in said and said.count("--") > 1, (flag, text, said)
            elif names.get(action.type) != "Finite" or text != "-1":
                assert said and flag in said, (flag, text, said)
    assert walked >= 2 * len(TRIED)


@pytest.mark.parametrize("main, words, line", [
    (weights.main, "", "the following arguments are required: verb"),
    (weights.main, "sho x", "invalid choice: 'sho'"),
    (weights.main, "show", "the following arguments are required: path"),
    (weights.main, "show ./nowhere", "./nowhere: no such file"),
    (weights.main, "show TMP", "holds neither"),
    (weights.main, "show TMP/file", "cannot be read as weights"),
    (weights.main, "show TMP/file --out x", "unrecognized arguments: --out x"),
    (weights.main, "export TMP/nowhere --out TMP/x", "no run here"),
    (weights.main, "export TMP/nowhere", "required: --out"),
    (weights.main, "export TMP/nowhere --out TMP/file", "--out TMP/file: a file, not a folder"),
    (weights.main, "export TMP/nowhere --out TMP/file/x", "TMP/file is a file, not a folder"),
    (data.main, "", "the following arguments are required: task"),
    (data.main, "chek x", "invalid choice: 'chek'"),
    (data.main, "check", "the following arguments are required: path"),
    (data.main, "check TMP/nowhere", "TMP/nowhere: no such file"),
    (data.main, "check TMP/nowhere --source pear", "--source: invalid choice: 'pear'"),
    (data.main, "check TMP/nowhere --splitt val", "unrecognized arguments: --splitt val"),
    (runs.main, "", "the following arguments are required: out"),
    (runs.main, "TMP --outt x", "unrecognized arguments: --outt x"),
    (runs.main, "TMP/file", "TMP/file: no run here"),
    (regions.main, "--out TMP/x", "name the pictures (--images)"),
    (regions.main, "--images TMP --tsv TMP --out TMP/x", "name the pictures (--images) or"),
    (regions.main, "--images TMP --out TMP", "--out TMP: a folder, not a file"),
    (regions.main, "--images TMP --out TMP/file/x", "TMP/file is a file, not a folder"),
    (regions.main, "--images TMP --out TMP/x --device foo", "--device: invalid choice: 'foo'"),
    (lait.main, "--in TMP --out TMP/file", "--out TMP/file: a file, not a folder"),
    (lait.main, "--in TMP --out TMP/x --min_words 9 --max_words 8",
     "--min_words 9: more than --max_words 8"),
    (lait.main, "--in TMP --out TMP/x --shard 1/0", "I/N"),
    (shapes.main, "--root TMP/file/x", "TMP/file is a file, not a folder"),
    (shapes.main, "--root TMP/x --scale 0.001", "between 0.01 and 1"),
    (shapes.main, "--root TMP/x --sheet TMP/sheet.doc", "name a picture, as sheet.png"),
    (shapes.main, "--root TMP/x --sheet TMP", "--sheet TMP: a folder, not a file"),
    (evaluation.main, "", "the following arguments are required: run"),
    (evaluation.main, "TMP/nowhere", "no run here"),
    (evaluation.main, "TMP/nowhere --limit 1e3", "--limit: invalid int value: '1e3'"),
    (evaluation.main, "TMP/nowhere --dtype int8", "--dtype: invalid choice: 'int8'"),
    (evaluation.main, "TMP/nowhere --lim 3", "unrecognized arguments: --lim 3"),
])
def test_a_tools_bad_flag_is_one_line(main, words, line, tmp_path, no_network):
    (tmp_path / "file").write_text("x")
    (tmp_path / "page.html").write_text("<p>x</p>")
    said = refusal(main, words.replace("TMP", str(tmp_path)).split())
    assert said and line.replace("TMP", str(tmp_path)) in said, said


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.os, "access", lambda *_: False)       # root may write everywhere
    said = refusal(tools.check_out, tmp_path / "a" / "b", "--out")
    assert said == f"--out {tmp_path}/a/b: no permission to write in {tmp_path}"
    assert refusal(tools.check_out, "", "--out") and refusal(tools.check_out, "/", "--out")


# --------------------------------------------------------------------------------------------------
# Files that train.py's flags name, and words that are no numbers

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One picture with a caption, a vocabulary, and files that are none."""
    here = tmp_path_factory.mktemp("flags")
    Image.new("RGB", (80, 80)).save(here / "a.png")
    (here / "pairs.jsonl").write_text(
        '{"image": "a.png", "caption": "a red square", "split": "train"}\n')
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red square"
    (here / "vocab.txt").write_text("\n".join(words.split()) + "\n")

    (here / "empty").write_text("")
    (here / "binary").write_bytes(bytes(range(256)) * 8)
    (here / "utf16").write_text("[PAD]\n[UNK]\n", encoding="utf-16")
    (here / "folder").mkdir()
    return here


FILES = [(flag, path) for flag in ("--vocab", "--tag_words", "--paraphrase", "--data", "--init",
                                   "--init_vision", "--init_text", "--stage_data", "--regions")
         for path in ("nowhere", "empty", "binary", "utf16", "folder")]
WORDS = [("--image_root", "nowhere"), ("--image_root", "empty"), ("--stage_root", "nowhere"),
         ("--split", "nope"), ("--image_view", "nope"), ("--stage_data", ""), ("--data", "")]
AT_THE_END = [("--evals", "nope"), ("--eval_split", "nope"), ("--eval_data", "nowhere")]


def small_run(*more):
    """A run of the picture that is checked and never begun; later flags win."""
    return ["--workers", "0", "--device", "cpu", "--steps", "1", "--batch_size", "1",
            "--data", "pairs.jsonl", "--vocab", "vocab.txt", *more]


@pytest.mark.parametrize("flag, path", FILES + WORDS + AT_THE_END)
def test_a_file_that_is_none_is_one_line(flag, path, world, monkeypatch, no_network):
    """Named with its flag or its path, before a step is taken or a directory made."""
    if (flag, path) in AT_THE_END and not hasattr(evaluation, "check"):
        pytest.skip("eval.py's check of closing evaluations is not here yet")
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "run_loop", lambda *_: pytest.fail("it would have trained"))
    model = {"--regions": "imagebert", "--tag_words": "mct"}.get(flag, "codis")
    said = refusal(train.main, ["--model", model, *small_run(flag, path)])
    assert said and (flag in said or path and path in said or "--data is empty" in said), said
    assert not (world / "out" / f"{model}-pretrain").exists()


def test_the_built_in_world_has_its_own_pictures():
    said = refusal(train.parse, ["--model", "codis", "--image_root", "x"])
    assert said == "--image_root x: the built-in world has its own; name --data"


# --------------------------------------------------------------------------------------------------
# 80 columns

def test_the_start_of_a_run_fits_into_80_columns(world, monkeypatch, capsys, tmp_path):
    """Settings by group, each as one word; in a log file without a terminal the lines are whole."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "run_loop", lambda *_: None)
    words = ["--model", "mct", *small_run("--evals", "none", "--out", str(tmp_path / "out"))]
    for columns in ("80", None):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
        train.main([*words, "--out", str(tmp_path / f"out{columns}")])
        lines = capsys.readouterr().out.splitlines()
        start = next(n for n, line in enumerate(lines) if "1 records of pairs.jsonl" in line)
        lines = lines[start:next(n for n, line in enumerate(lines) if " s in all" in line) - 1]
        assert (max(map(len, lines)) <= 80) == (columns == "80"), max(lines, key=len)
        text = " ".join(" ".join(lines).split())
        for group in ("data: data=pairs.jsonl", "schedule: steps=1", "run: out=", "evaluation: ",
                      "model: image_size=64 block=basic layers=(1, 1, 1, 1)"):
            assert group in text, (group, text)


@pytest.mark.parametrize("columns, shown", [(80, ["loss", "i2t"]), (60, []),
                                            (160, ["loss", "i2t", "t2i", "i2i"])])
def test_the_bar_drops_losses_that_do_not_fit(columns, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = train.tqdm(total=1700, initial=200, desc="codis pretrain", file=io.StringIO())
    text = train.beside_bar(bar, dict(loss=9.5, i2t=3.25, t2i=3.5, i2i=2.75))
    assert re.findall(r"[a-z]\w+", text) == shown
    bare = bar.format_meter(**{**bar.format_dict, "ncols": None, "postfix": text})
    assert not text or len(bare) <= columns
    bar.close()
