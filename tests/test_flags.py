"""Every flag with bad values: refused in one line that names it, or accepted because the value has a
meaning, and then the model is built with it and gives a loss.

No training runs here: train.py's settings are checked before anything is read."""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch

import data
import eval as evaluation
import tools
import train
from tools import lait, regions, shapes, weights

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
                try:
                    takes.append(text) if legal(number(text)) else None
                except ValueError:
                    continue
            assert seen.setdefault(name, (number, told)) == (number, told), (module.__name__, name)
            if name != "Finite":
                assert set(takes) == TAKES[name], (module.__name__, name)


@pytest.mark.parametrize("name", ["Loop", *MODELS])
def test_every_setting_says_what_is_legal(name):
    """A number by one of the kinds of tools/__init__.py, a word by a Literal. A plain int is left to
    what the data decide, a plain str to paths, names and lists."""
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
            "Literal of its words, in place of {kind.__name__}")


# --------------------------------------------------------------------------------------------------
# train.py: flags and tables

@pytest.fixture(scope="module")
def parsers():
    """{model: train.py's parser for it}: it takes a second to make one."""
    made, old = {}, train.Parser.parse_args
    train.Parser.parse_args = lambda self, argv: made.update({argv[1]: self}) or argparse.Namespace()
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
    names = kind_names(module) | kind_names(train)
    for field, comment, _ in [*train.fields_of(train.Loop), *train.fields_of(module.Config)]:
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
                assert f"--{field.name}" in said and said.count("--") >= 2, (field.name, text, said)
    assert walked > 500


@pytest.mark.parametrize("flags, line", [
    ("--model codis --heads 5", "--heads 5: does not divide --width 128"),
    ("--model codis --vision_heads 3", "--vision_heads 3: does not divide --vision_width 128"),
    ("--model codis --max_text 600", "--max_text 600: more than --positions 512"),
    ("--model codis --max_answer 600", "--max_answer 600: more than --positions 512"),
    ("--model codis --patch 18", "--patch 18: --stem conv wants a multiple of 4"),
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
SMALL = dict(image_size=8, patch=4, stem=None, vision_width=8, width=8, vision_layers=1,
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
    sizes = {k: v for k, v in (SMALL | IDS).items()
             if k in own and v is not None and get_origin(own[k]) is not tuple}
    if model == "mct":
        sizes.pop("heads")                              # a word there
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
ENDS = {"Size": (1, 7, 28), "Few": (1, 7), "FewOrNone": (0, 7), "Tokens": (3, 10), "Count": (0, 7),
        "Share": (0.0, 1.0), "Rate": (0.0, 0.999), "Amount": (0.0, 1e6), "Positive": (1e-3, 1e6)}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_accepted_is_built_and_gives_a_loss(model):
    module = weights.load_module(model)
    task, names, built = module.TASKS[0], kind_names(module), set()
    fields = [f for f, comment, _ in train.fields_of(module.Config) if train.is_flag(comment)]
    for field in fields:
        kind = inner(field)
        for value in {bool: (False, True)}.get(kind) or ENDS.get(names.get(kind)) or get_args(kind):
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
