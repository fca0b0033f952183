r"""train.py: one loop for every model and every task.

    python train.py --model codis            # tiny, on the built-in shapes
    torchrun --nproc_per_node 8 train.py --model codis --preset base \
        --data coco.json,cc3m.tsv --image_root images --vocab vocab.txt
    python train.py --model codis --task vqa --init out/codis-pretrain
    python train.py --model codis --help     # every flag, with its default here

A setting's value, from weak to strong: the default below, RECIPE[task] (the
paper's), PRESETS[preset], the command line. Everything random follows from
--seed, and the learning rate and the data follow from the step. So a run that
was stopped goes on, with --resume, bit for bit as if it had not been: how its
directory is kept stands in tools/runs.py.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import inspect
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from tools import (Amount, Count, Parser, Positive, Rate, Share, Size, Stop, check_fields, runs,
                   weights)


# The settings that every model shares. A model's own are the fields of its Config. Both become
# flags of the command line, and the comment behind a field is its help: the file that is edited is
# the only place where a setting is written. Its type says what is legal: see tools/__init__.py.

Workers = Annotated[int, "from -1 to 1000", lambda n: -1 <= n <= 1000]
Seed = Annotated[int, "from 0 to below 2**32", lambda n: 0 <= n < 2**32]


@dataclass
class Loop:
    # -- data: what is read
    data: str = "shapes"            # "shapes", or files in official formats, comma-separated
    image_root: str = ""            # folder of the images (default: the data file's)
    image_id: Literal["file", "path"] = "file"  # same picture: by the files' ids, or by its path
    vocab: str = ""                 # BERT vocabulary file (default: of shapes, or of --init)
    split: str = "train"            # split to train on
    hold_out: Share = 0.025         # share kept for val, and for test, where files have no splits
    regions: str = ""               # files of tools.regions, comma-separated, for all images
    limit: Count = 0                # train on this many records, drawn by --seed; 0 = all
    tag_words: str = ""             # word list: a record's tags are its captions' words in it
    paraphrase: str = ""            # file of paraphrases (back-translations), joined by caption
    stage_data: tuple[str, ...] = ()    # data of each stage; their number is the number of stages
    stage_root: tuple[str, ...] = ()    # image folder of each stage (default: --image_root)
    image_view: str = ""            # augmentation in place of the task's own (see data.py)
    crop_scale: tuple[Share, Share] = (0.2, 1.0)            # area share of random crops
    workers: Workers = -1           # loader processes per rank; -1 = one per 4 cores

    # -- schedule: how long, how fast
    steps: Count = 0                # optimizer steps; 0 = by epochs
    epochs: Positive = 1.0          # passes over the data, where steps is 0
    epoch_of: Literal["images", "captions"] = "images"      # a pass over images draws a caption
    batch_size: Size = 32           # samples per optimizer step, over all processes
    accum: Size = 1                 # forward-backward passes per optimizer step
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"    # sgd has momentum 0.9
    lr: Positive = 1e-4             # peak learning rate
    beta2: Rate = 0.999             # second Adam coefficient; the first is 0.9
    weight_decay: Amount = 0.0      # as the optimizer defines it
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"    # after warm-up
    warmup_steps: Amount = 0.0      # steps from warmup_lr to lr; below 1: share of all steps
    warmup_lr: Amount = 0.0         # first learning rate of the warm-up
    min_lr: Amount = 0.0            # last learning rate of cosine and linear
    milestones: str = "0.5"         # schedule step: shares of all steps where lr drops
    gamma: Positive = 0.1           # schedule step: the factor by which it drops
    clip: Amount = 0.0              # largest gradient norm; 0 = no clipping
    seed: Seed = 0                  # of everything random

    # -- run: where, and on what
    out: str = ""                   # run directory (default: out/MODEL-TASK)
    init: str = ""                  # start from the weights of this run
    resume: bool = False            # go on from OUT's last checkpoint; safe to give always
    overwrite: bool = False         # replace the run in OUT, once the new one has a checkpoint
    device: Literal["", "cuda", "cpu"] = ""                 # (default: cuda where there is one)
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"   # auto = bf16 on CUDA, else fp32
    compile: bool = False           # torch.compile
    log_every: Size = 20            # steps per line of log.jsonl, where processes agree to save
    save_minutes: Amount = 10.0     # minutes per checkpoint; 0 = never by time
    save_every: Count = 0           # steps per checkpoint; 0 = by time alone

    # -- evaluation: what follows the training
    eval_every: Count = 0           # steps per validation on val, best kept in OUT/best; 0 = never
    evals: str = "default"          # evaluations, comma-separated; "none"
    eval_data: str = ""             # their data (default: --data)
    eval_root: str = ""             # their image folder (default: --image_root)
    eval_split: str = ""            # their split (default: test; without one, val)
    eval_limit: Count = 0           # their number of records; 0 = all
    rerank_k: Count = 0             # candidates that match() re-ranks; 0 = eval.py's default
    rerank: Literal["", "itm", "sum"] = ""                  # re-ranking (default: eval.py's)

    def check(self):
        """Stop, one line, for a value outside its type, and for values that contradict another."""
        check_fields(self)

        # data
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest:
            raise Stop(f"--crop_scale {smallest:g} {largest:g}: the smallest share, above 0, and "
                       "then the largest")
        if self.image_root and self.data == "shapes" and not self.stage_data:
            raise Stop(f"--image_root {self.image_root}: the built-in world has its own; name "
                       "--data")
        if self.hold_out >= 0.5:
            raise Stop(f"--hold_out {self.hold_out:g}: as much for val as for test leaves nothing")

        # the schedule
        if self.min_lr > self.lr:
            raise Stop(f"--min_lr {self.min_lr:g}: more than --lr {self.lr:g}")
        if self.gamma > 1:
            raise Stop(f"--gamma {self.gamma:g}: a factor above 1 raises the learning rate")
        try:
            shares = [0.0, *map(float, self.milestones.split(",")), 1.0]
        except ValueError:
            shares = []                                 # a word among them
        if not all(a < b for a, b in zip(shares, shares[1:])) or not shares:
            raise Stop(f"--milestones {self.milestones}: rising shares of the run between 0 and 1, "
                       "separated by commas")

        if self.device == "cuda" and not torch.cuda.is_available():
            raise Stop("--device cuda: there is no CUDA device here")


# --------------------------------------------------------------------------------------------------
# Settings

@functools.cache
def fields_of(cls):
    """The fields of a dataclass, from its source -> list of (field, its comment, its group).

    The comment behind a field is its --help. `# -- name: ...` on a line of its own begins a group.
    """
    known, group, found = {f.name: f for f in dataclasses.fields(cls)}, "", []
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.partition("#")
        name = code.split(":")[0].strip()
        if comment.startswith(" -- "):
            group = comment.removeprefix(" -- ")
        elif name in known and ":" in code:
            found.append((known.pop(name), comment.strip(), group))
    return found


def is_flag(comment):
    """Fields marked [data] are set from the vocabulary or the data, whatever a user would say."""
    return not comment.startswith("[data]")


def add_flags(parser, cls, shown, title=""):
    """One flag per field of a dataclass. shown: {field: the default that --help tells}."""
    groups = {}
    for field, comment, group in fields_of(cls):
        if not is_flag(comment):
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(title or group)

        # the help: the comment, and the default that this run would take
        told = show(shown[field.name])
        text = f"{comment} [{told}]" if told else comment
        options = {"help": text.replace("%", "%%")}

        # how a value is read follows from the field's type
        kind = field.type
        if get_origin(kind) is tuple:
            inner = get_args(kind)
            kind, options["nargs"] = inner[0], "+" if inner[-1] is ... else len(inner)
        if get_origin(kind) is Literal:
            options |= {"choices": get_args(kind), "metavar": "WORD"}
            options["help"] = f"{', '.join(filter(None, get_args(kind)))}: {options['help']}"
        else:
            kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": boolean}
        groups[group].add_argument(f"--{field.name}", **options)


def show(value):
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def parse(argv):
    """-> (model's module, name, preset, task, {setting: value} given on the command line)."""
    # which model, preset and task decides about flags and their defaults
    first = Parser(prog="train.py", add_help=False)
    for flag in ("--model", "--preset", "--task"):
        first.add_argument(flag)
    chosen = first.parse_known_args(argv)[0]
    parser = Parser(prog="train.py", description=__doc__,
                    usage="train.py --model MODEL [--preset P] [--task T] [flags]")
    parser.add_argument("--model", required=True, help="a file of models/, without .py")
    if chosen.model is None:
        add_flags(parser, Loop, vars(Loop()))
        parser.parse_args(argv)                         # prints the help, or misses --model

    module = weights.load_module(chosen.model)
    check_words(module, chosen.model)
    preset, task = chosen.preset or "tiny", chosen.task or module.TASKS[0]
    if preset not in module.PRESETS:
        raise Stop(f"train.py: models/{chosen.model}.py has no preset {preset!r}; it has: "
                   f"{', '.join(module.PRESETS)}")
    if task not in module.TASKS:
        raise Stop(f"train.py: models/{chosen.model}.py has no task {task!r}; it has: "
                   f"{', '.join(module.TASKS)}")

    # the flags: the loop's, the foreign weights', the model's own
    loop, cfg = settings(module, preset, task, {})
    parser.add_argument("--preset", help=f"{', '.join(module.PRESETS)} [tiny]")
    parser.add_argument("--task", help=f"{', '.join(module.TASKS)} [{module.TASKS[0]}]")
    add_flags(parser, Loop, vars(loop))
    towers = parser.add_argument_group("pre-trained weights")
    for side in module.INITS:
        towers.add_argument(f"--init_{side}", default="", metavar="PATH|HUB",
                            help=f"for the {side} tower: a file, a folder or a hub name")
    add_flags(parser, module.Config, vars(cfg), f"models/{chosen.model}.py ({preset}, {task})")

    given = {}
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None and name not in ("model", "preset", "task"):
            given[name] = tuple(value) if isinstance(value, list) else value
    for stage in range(count_stages(module, preset, task, given)):
        settings(module, preset, task, given, stage)    # a Stop for values that cannot be meant
    return module, chosen.model, preset, task, given


def check_words(module, name):
    """Refuses a word in RECIPE or PRESETS that no setting has, and one name for two settings."""
    loop = {field.name for field in dataclasses.fields(Loop)}
    cfg = {field.name for field in dataclasses.fields(module.Config)}
    if loop & cfg:
        both = ", ".join(sorted(loop & cfg))
        raise Stop(f"models/{name}.py: Config has {both}, and so has train.py's Loop")

    # a recipe's stages may also say which task they are, and that their data must be named
    tables = [(f"RECIPE[{task!r}]", rows) for task, rows in module.RECIPE.items()]
    for preset, sizes in module.PRESETS.items():
        own = {key: value for key, value in sizes.items() if key not in module.RECIPE}
        tables.append((f"PRESETS[{preset!r}]", own))
        tables += [(f"PRESETS[{preset!r}][{key!r}]", sizes[key]) for key in set(sizes) - set(own)]
    for place, rows in tables:
        for row in rows if isinstance(rows, list) else [rows]:
            unknown = set(row) - loop - cfg - {"task", "own_data"}
            if unknown:
                raise Stop(f"models/{name}.py: {place} has {', '.join(sorted(unknown))}, "
                           "which is no setting")


def of_stage(table, stage):
    """A stage's row of a recipe; a recipe that is no list has one for all."""
    return table[min(stage, len(table) - 1)] if isinstance(table, list) else table


def settings(module, preset, task, given, stage=0):
    """Loop and Config of one stage, by the precedence at the top of this file."""
    sizes = {key: value for key, value in module.PRESETS[preset].items()
             if key not in module.RECIPE}
    recipe = of_stage(module.RECIPE[task], stage)
    quick = of_stage(module.PRESETS[preset].get(task, {}), stage)
    chosen = {}
    for level in (recipe, sizes, quick, given):
        if "epochs" in level and "steps" not in level:  # the last word on the length counts
            chosen["steps"] = 0
        chosen.update(level)

        # a warm-up that is said together with the length must fit into it. A run made shorter than
        # its recipe, for a quick look, may end within the recipe's
        if "warmup_steps" in level:
            check_warmup(chosen["warmup_steps"], chosen.get("steps", 0))

    def fill(cls):
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in chosen.items() if name in names})
    loop, cfg = fill(Loop), fill(module.Config)
    loop.check()
    cfg.check(recipe.get("task", task))
    return loop, cfg


def check_warmup(warmup_steps, total):
    if 0 < total < warmup_steps:
        raise Stop(f"--warmup_steps {warmup_steps:g}: the run has {total:,} steps")


def check_memory(module, cfg, task, stats, micro):
    """Stop where weights and one batch of pictures exceed this machine's memory.

    The model is built on the device "meta", which knows sizes and holds no numbers: a width with a
    zero too many ends here, and not when the machine has been swapping for an hour.
    """
    with torch.device("meta"):
        model = module.Model(cfg, task, num_labels=stats.get("num_labels", 0))
    weights_size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    pictures_size = 4 * micro * 3 * getattr(cfg, "image_size", 0) ** 2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for what, size in (("the weights", weights_size), ("a batch of pictures", pictures_size)):
        if size > there:
            raise Stop(f"train.py: {what} would take {size / 1e9:,.0f} GB, this machine has "
                       f"{there / 1e9:,.0f} GB: check the flags of size")


def count_stages(module, preset, task, given):
    """How many stages a run has: as many as --stage_data names, else as the recipe lists."""
    table = module.PRESETS[preset].get(task)
    if not isinstance(table, list):
        table = module.RECIPE[task]
    rows = table if isinstance(table, list) else [table]
    stages = len(given.get("stage_data", rows))
    if stages > 1 and "stage_data" not in given and any("own_data" in row for row in rows):
        raise Stop(f"train.py: {task} has {stages} stages: name the data of each "
                   "(--stage_data A B), or of the only one (--stage_data A)")
    if "stage_root" in given and "stage_data" not in given:
        raise Stop("train.py: --stage_root goes with --stage_data")
    if len(given.get("stage_root", [0] * stages)) != stages:
        raise Stop(f"train.py: {len(given['stage_root'])} --stage_root for {stages} stages")
    return stages


# --------------------------------------------------------------------------------------------------
# Learning rate and optimizer

def warmup_length(total, loop):
    """In steps: --warmup_steps below 1 is a share of all."""
    return loop.warmup_steps if loop.warmup_steps >= 1 else loop.warmup_steps * total


def learning_rate(step, total, loop):
    """The learning rate of optimizer step 0..total-1.

    A pure function of the step, and not a scheduler object that counts calls: after a resume, and
    for any length of an epoch, it cannot be off by one.
    """
    # warm-up: Adam divides by an estimate of the squared gradient, which is rough after few steps;
    # at the full rate the first ones would throw the weights far away in directions of chance
    warmup = warmup_length(total, loop)
    if step < warmup:
        return loop.warmup_lr + (loop.lr - loop.warmup_lr) * step / warmup

    # then down again: large steps find the valley, small ones its floor
    t = (step - warmup) / max(1, total - warmup)        # 0 .. 1
    if loop.schedule == "cosine":
        return loop.min_lr + (loop.lr - loop.min_lr) * 0.5 * (1 + math.cos(math.pi * t))
    if loop.schedule == "linear":
        return loop.min_lr + (loop.lr - loop.min_lr) * (1 - t)
    if loop.schedule == "step":
        # milestones are shares of the run, so that a shorter run keeps its shape
        passed = sum(step >= float(m) * total for m in loop.milestones.split(","))
        return loop.lr * loop.gamma ** passed
    return loop.lr


def decay_matrices(model, loop):
    """Parameter groups of a model that does not ask for others: weight decay on matrices only.

    Biases, norms and single numbers are not what overfits; decay would only pull them towards zero.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "lr": loop.lr, "weight_decay": loop.weight_decay},
            {"params": others, "lr": loop.lr, "weight_decay": 0.0}]


def make_optimizer(model, loop):
    """fused=True updates all tensors of a group in a few kernels, instead of several each."""
    make_groups = getattr(model, "param_groups", None)
    groups = make_groups(loop) if make_groups else decay_matrices(model, loop)

    # a model may train its parts at different rates: each group keeps its own peak, and the
    # schedule scales all of them alike
    groups = [dict(group, peak=group["lr"]) for group in groups if group["params"]]
    if loop.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[loop.optimizer]
    return kind(groups, betas=(0.9, loop.beta2), fused=True)


# --------------------------------------------------------------------------------------------------
# Setting up: the device, the data, the model

def choose_device(loop):
    """This process's device, made ready for training."""
    local = data.ranks()[2]
    device = torch.device(loop.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # torchrun starts one process a GPU, and tells each its number in the environment
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return device

    # on a CPU, two threads would add up the gradient of x[index] in any order: not bit for bit
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def open_records(loop, views, untrained):
    """The records of --data, with the tags and regions that this task's views ask for.

    untrained: no picture will be opened, so that none needs to be there.
    """
    need = data.needs(views)
    if loop.tag_words:                                  # tags come from captions then
        need = tuple("caption" if key == "tags" else key for key in need)
    records = data.open_source(views["source"], loop.data, loop.split, loop.image_root or None,
                               limit=loop.limit or None, seed=loop.seed, need=need,
                               hold_out=loop.hold_out, image_id=loop.image_id,
                               missing="keep" if untrained else data.absent(views))
    if loop.tag_words:
        records = data.caption_tags(records, loop.tag_words)
    if loop.paraphrase:
        records = data.join_paraphrases(records, loop.paraphrase)
    return data.with_regions(records, views, loop.regions)


def default_vocab(loop):
    """The vocabulary of --init's run, else the built-in world's; real data must name one."""
    if loop.init:
        return str(weights.find_run(loop.init) / "vocab.txt")
    if loop.data != "shapes":
        raise Stop("train.py: --data other than shapes needs --vocab, "
                   "a BERT vocabulary file (bert-base-uncased's vocab.txt)")
    from tools import shapes                            # only here: real data needs no drawing code
    return str(shapes.ensure() / "vocab.txt")


# what a model's Config may want to know of the vocabulary
VOCAB_FIELDS = ("vocab_size", "pad_id", "cls_id", "sep_id", "mask_id", "first_word")


def fit_config(module, cfg, task, tokenizer, stats):
    """Sets what vocabulary and data decide: ids of special words, feature sizes, classes."""
    for field in VOCAB_FIELDS:
        if hasattr(cfg, field):
            setattr(cfg, field, getattr(tokenizer, field))
    if hasattr(module, "setup"):
        module.setup(cfg, task, stats)


def make_model(module, cfg, task, stats, loop, foreign):
    """The model, with its first weights -> (model, lines that say where they came from)."""
    # the same seed on every process: DDP averages gradients, never weights, so that all must begin
    # with the same weights to stay equal
    torch.manual_seed(loop.seed)
    raw, news = module.Model(cfg, task, num_labels=stats.get("num_labels", 0)), []
    if loop.init:
        news.append(weights.initialize(raw, loop.init, module.BACKBONE))
    if foreign:
        news += weights.load_towers(module, raw, foreign)
    return raw, news


def feature_key(raw, loop, views):
    """What stored features depend on: the data, the views, and all weights that are not trained."""
    digest, trained = hashlib.sha256(), {n for n, p in raw.named_parameters() if p.requires_grad}
    for name, value in raw.state_dict().items():
        if name not in trained:
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return {"data": loop.data, "split": loop.split, "limit": loop.limit, "root": loop.image_root,
            "seed": loop.seed, "views": views, "weights": digest.hexdigest()}


@torch.no_grad()
def store_features(run, cfg, samples, workers):
    """Features of a frozen model are computed once for all epochs, and kept beside the run."""
    rank, world, _ = data.ranks()
    views = run.info["views"]
    samples.features = data.store_features(
        run.out / "features.npy", feature_key(run.raw, run.loop, views), run.raw.visual_features,
        samples.records, views, samples.tokenizer, cfg.image_size, cfg.max_text, run.device,
        rank=rank, world=world, workers=workers)


def choose_precision(loop, device):
    """-> (its name, the autocast context of a forward pass, the gradient scaler).

    bf16 has the range of fp32 and needs no scaler. The gradients of fp16 underflow: the scaler
    multiplies the loss, divides the gradients before the step, and skips a step that overflowed.
    With any other precision it passes everything through.
    """
    name = loop.amp
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    return name, autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


def describe(run, records, module, news):
    """The lines before the first step, as wide as the terminal; in a log file, whole."""
    width = shutil.get_terminal_size(fallback=(10_000, 0)).columns
    for line in facts(run, records, module, news):
        yield textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False,
                            break_on_hyphens=False)


def facts(run, records, module, news):
    """Everything that the run depends on, a line each."""
    loop, info, total = run.loop, run.info, run.info["total_steps"]
    notes = ", ".join(f"{key} {n:,}" for key, n in records.notes.items())
    yield (f"{info['model']} ({info['preset']}) {info['task']}: {len(records):,} records of "
           f"{loop.data} [{loop.split}]" + (f" ({notes})" if notes else ""))
    if records.regions:
        yield f"  regions: {records.regions.about}"
    if data.twice_the_same(records, run.info["views"]):
        yield data.twice_the_same(records, run.info["views"])

    # parameters: all, trained, and by part
    trained = count(p for p in run.raw.parameters() if p.requires_grad)
    parts = ", ".join(f"{part} {count(m.parameters()):,}" for part, m in run.raw.named_children())
    yield f"  {count(run.raw.parameters()):,} parameters, {trained:,} trained: {parts}"
    for label, names in getattr(module, "COUNTS", {}).items():
        if all(hasattr(run.raw, part) for part in names):
            together = sum(count(getattr(run.raw, part).parameters()) for part in names)
            yield f"  {label}: {together / 1e6:.1f}M"

    # schedule, settings, and where the weights came from
    end = max(0, total - 1)
    steps = 0, min(end, math.ceil(warmup_length(total, loop))), end     # a quick look ends early
    first, peak, last = (learning_rate(step, total, loop) for step in steps)
    yield (f"  {total:,} steps of {loop.batch_size} = {data.ranks()[1]} processes x {loop.accum} x "
           f"{run.micro}, {total / run.epoch_steps:.2f} epochs of {loop.epoch_of}")
    yield (f"  {run.precision} on {run.device}; {loop.optimizer} lr {first:.2g} -> {peak:.2g} "
           f"-> {last:.2g} ({loop.schedule})")

    # the settings by group, but for what is left empty
    groups = {}
    for part, title in ((loop, ""), (run.raw.cfg, "model")):
        for field, _, group in fields_of(type(part)):
            value = getattr(part, field.name)
            if value not in ("", ()):
                words = groups.setdefault(title or group.split(":")[0], [])
                words.append(f"{field.name}={value}")
    for title, words in groups.items():
        yield f"  {title}: {' '.join(words)}"
    for line in news + getattr(run.raw, "remarks", []):
        yield "  " + line


def count(parameters):
    return sum(p.numel() for p in parameters)


def beside_bar(bar, values):
    """The losses that a progress bar's line has room for, beside a bar of ten characters."""
    bare = tqdm.format_meter(**{**bar.format_dict, "ncols": None, "postfix": None})
    room, text = shutil.get_terminal_size().columns - len(bare) - 1, ""
    for name, value in values.items():
        word = f" {name} {value:.2f}"
        if len(text) + len(word) > room:
            break
        text += word
    return text.strip()


# --------------------------------------------------------------------------------------------------
# A run

@dataclass
class Run:
    """What one training has in hand, on one process."""
    loop: Loop                      # this stage's settings
    info: dict                      # what config.json keeps
    place: runs.Place               # the directory of the command
    part: str                       # "stage-2" in it, or "" where there are no stages
    raw: torch.nn.Module            # the model as it was built, without compile and DDP
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str                  # bf16, fp16 or fp32
    autocast: contextlib.AbstractContextManager     # of a forward pass in that precision
    scaler: torch.amp.GradScaler
    micro: int                      # samples per process and forward pass
    epoch_steps: int                # optimizer steps that go over the data once
    saved: float = 0.0              # when the last checkpoint was written, by time.monotonic()

    @property
    def out(self):
        return self.place.root / self.part


def stage_settings(module, preset, task, given, out, stage, init):
    """Loop, Config and task of one stage. --stage_data and the stage before it have their say."""
    loop, cfg = settings(module, preset, task, given, stage)
    task = of_stage(module.RECIPE[task], stage).get("task", task)
    loop.init, loop.out = init or loop.init, str(out)
    if loop.stage_data:
        loop.data = loop.stage_data[stage]
    if loop.stage_root:
        loop.image_root = loop.stage_root[stage]
    loop.vocab = loop.vocab or default_vocab(loop)

    # nothing need be held out of the built-in world, nor where other files are evaluated
    if loop.data == "shapes":
        loop.hold_out = 0.0
    elif loop.eval_data:
        source = module.VIEWS[task]["source"]
        mine = evaluation.real_files(loop.data, source)
        if not mine & evaluation.real_files(loop.eval_data, source, flag="--eval_data"):
            loop.hold_out = 0.0
    return loop, cfg, task


def count_steps(loop, records, untrained):
    """-> (what an epoch goes over, None for records; optimizer steps of an epoch, of the run).

    The loop knows steps and no epochs: the stream of samples has no end, one permutation follows
    the other.
    """
    units = data.caption_units(records) if loop.epoch_of == "captions" else None
    epoch_steps = max(1, len(records if units is None else units) // loop.batch_size)
    total = loop.steps
    if not total and not untrained:
        total = math.ceil(loop.epochs * epoch_steps)
    return units, epoch_steps, total


def samples_per_pass(loop, world):
    """--batch_size is what one optimizer step sees, whatever the number of processes and of passes:
    rates and schedules of the recipe hold on one GPU as on eight."""
    if loop.batch_size % (world * loop.accum):
        raise Stop(f"train.py: --batch_size {loop.batch_size} is not a multiple of {world} "
                   f"processes x {loop.accum} accumulation steps")
    return loop.batch_size // (world * loop.accum)


def train(module, name, preset, task, given, place, part="", stage=0, init=""):
    """One stage of one task, on every process -> (the bare model, the run's info)."""
    main_task = task
    loop, cfg, task = stage_settings(module, preset, task, given, place.out / part, stage, init)
    rank, world, _ = data.ranks()
    device = choose_device(loop)
    micro = samples_per_pass(loop, world)

    # data, and what the model must know of it
    views = dict(module.VIEWS[task])
    untrained = "steps" in given and not loop.steps     # --steps 0 trains nothing, and saves
    records = open_records(loop, views, untrained)
    tokenizer = data.get_tokenizer(loop.vocab)
    stats = data.stats(records, views=views, tags=getattr(cfg, "tag_vocab", None))
    fit_config(module, cfg, task, tokenizer, stats)
    samples = data.Views(records, views, tokenizer, getattr(cfg, "image_size", None), cfg.max_text,
                         seed=loop.seed, crop_scale=loop.crop_scale,
                         image_view=loop.image_view or None, tag_names=stats.get("tags"),
                         max_regions=getattr(cfg, "max_regions", None))
    workers = loop.workers if loop.workers >= 0 else (os.cpu_count() or 1) // 4
    units, epoch_steps, total = count_steps(loop, records, untrained)
    check_warmup(given.get("warmup_steps", 0), total)
    check_memory(module, cfg, task, stats, micro)

    # model and optimizer; foreign weights are for the first stage, the others go on from it
    foreign = {side: given[f"init_{side}"] for side in module.INITS if given.get(f"init_{side}")}
    raw, news = make_model(module, cfg, task, stats, loop, {} if stage else foreign)
    raw.to(device).train()
    info = {"model": name, "preset": preset, "task": task,
            "config": dataclasses.asdict(cfg), "loop": dataclasses.asdict(loop),
            "files": sorted(evaluation.real_files(loop.data, views["source"], loop.split)),
            "stats": stats, "views": views, "total_steps": total, "data_notes": records.notes,
            "fingerprint": runs.fingerprint(records, loop), "best": None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    check_closing(module, preset, main_task, given, place.out, raw, info)
    run = Run(loop, info, place, part, raw, make_optimizer(raw, loop), device,
              *choose_precision(loop, device), micro, epoch_steps)

    # all that could be refused has been: the directory, and the first step
    start = begin(run, cfg, samples, workers)
    stream = data.batches(samples, micro, loop.seed, rank, world, start * loop.accum, workers,
                          units)
    if rank == 0:
        print("\n".join(describe(run, records, module, news)))
    with runs.Interrupt() as stop:
        run_loop(run, stream, start, stop)
    return raw, info


def begin(run, cfg, samples, workers):
    """The last checkpoint of the run's directory put back, or a new start -> the first step."""
    resuming = runs.open_directory(run)
    if "features" in data.view_keys(run.info["views"]).values():
        store_features(run, cfg, samples, workers)
    if resuming:
        return runs.load_checkpoint(run, learning_rate)

    # from here on every process draws its own masks
    if hasattr(run.raw, "prepare"):
        run.raw.prepare(samples)
    torch.manual_seed(run.loop.seed + data.ranks()[0])
    return 0


def run_loop(run, stream, start, stop):
    """Optimizer steps start..total-1: the loop itself, the same for every model and task.

    `raw` is the model as it was built. DDP wraps it, hides its hooks and puts a prefix before the
    names of its weights. So hooks, checkpoints and evaluation go through `raw`.
    """
    loop, raw, optimizer, scaler = run.loop, run.raw, run.optimizer, run.scaler
    rank, world, local = data.ranks()
    total, model, norm = run.info["total_steps"], raw, None

    # compile() in place keeps the names of weights, which torch.compile(model) would change
    if loop.compile:
        raw.compile()

    # DDP averages gradients over processes while backward runs. It would also copy the buffers of
    # process 0 to all others before every forward pass. That is wasted: queues are equal already,
    # since a model gathers the keys of all processes before it stores them
    if world > 1:
        devices = [local] if run.device.type == "cuda" else None
        model = DistributedDataParallel(raw, device_ids=devices, broadcast_buffers=False)

    if loop.eval_every and start == 0:
        validate(run, 0)
    bar = tqdm(total=total, initial=start, desc=f"{run.info['model']} {run.info['task']}",
               disable=rank > 0, mininterval=1.0, dynamic_ncols=True)
    watch, unreadable = runs.Watch(run.device), torch.zeros((), dtype=torch.long)
    since, since_step, run.saved = time.perf_counter(), start, time.monotonic()
    for step in range(start, total):
        # every group follows the schedule, from its own peak
        lr = learning_rate(step, total, loop)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr / loop.lr

        # forward and backward, `accum` times. Gradients add up until they are zeroed, and losses
        # are means: divided by `accum`, the sum is the gradient of the whole batch
        losses = 0
        for i in range(loop.accum):
            batch = next(stream)
            unreadable += batch.pop("bad").sum()
            batch = data.move(batch, run.device)

            # processes exchange gradients in backward. Of several passes only the last needs to:
            # no_sync() spares the traffic of the others
            last = i + 1 == loop.accum
            with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                # autocast is for forward alone: backward uses the types that forward chose
                with run.autocast:
                    result = model(batch)
                scaler.scale(result["loss"] / loop.accum).backward()
            losses = losses + result["loss"].detach()

            # queues take the new keys only now: the graph that read them is gone, so that they can
            # be written in place
            if hasattr(raw, "after_backward"):
                raw.after_backward(result)

        # the step. Clipping bounds the norm of all gradients together, and must see them at their
        # true size; with fp16 the scaler divides them back first
        if loop.clip:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), loop.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)           # frees the memory instead of writing zeros

        # momentum encoders follow the new weights, temperatures are clamped, weights of losses ramp
        if hasattr(raw, "after_step"):
            raw.after_step(step + 1, total, run.epoch_steps)
        done = step + 1
        watch.see(done, losses, result["logs"], None if scaler.is_enabled() else norm)
        bar.update()

        # most steps end here: with several processes all of them must know which
        logging, validating, saving = due(done, total, loop)
        if not (logging or validating or saving or stop.asked and world == 1):
            continue
        stopping, late = runs.agree(run, watch, stop)

        # a log line. A GPU works through a queue of kernels while Python runs ahead; .item() makes
        # Python wait until the queue is empty. So losses stay on the device until here
        if logging:
            values = {"loss": result["loss"], **result["logs"]}
            values = {name: value.item() for name, value in values.items()}
            if rank == 0:
                speed = loop.batch_size * (done - since_step) / (time.perf_counter() - since)
                runs.log_line(run, {"step": done, "lr": lr, **values, "samples_per_s": speed,
                                    "unreadable": int(unreadable)})
                bar.set_postfix_str(beside_bar(bar, values), refresh=False)
        if validating:
            validate(run, done)
        if saving or late or stopping:
            runs.save(run, done)
        since, since_step = time.perf_counter(), done   # their seconds do not count in the speed
        if stopping:
            bar.close()
            runs.end_stopped(run, done, stop)

    bar.close()
    share_buffers(raw)
    if not runs.checkpoints(run.out):                   # --steps 0
        runs.save(run, start)
    if unreadable:
        print(f"  {int(unreadable)} unreadable images on rank {rank} were replaced by others")


def due(done, total, loop):
    """What follows optimizer step number `done` -> (log line?, validation?, checkpoint?)."""
    last = done == total
    return (last or done % loop.log_every == 0,
            loop.eval_every > 0 and done % loop.eval_every == 0,
            last or loop.save_every > 0 and done % loop.save_every == 0)


# --------------------------------------------------------------------------------------------------
# Evaluation, while training and at the end

VALIDATION = 500                    # records of val, at most


def default_evaluations(module, task, model, trained):
    """The evaluations of a task; a loss left out may leave an encoder out, and them with it.

    trained: the task of the last stage, which the model was built for.
    """
    there = evaluation.offered(model, trained)
    return [name for name in module.EVALS[task] if name in there]


def share_buffers(raw):
    """All processes evaluate what is saved: the buffers of rank 0. The running means of batch norm
    differ from process to process, as each has seen its own samples."""
    if data.ranks()[1] > 1:
        for buffer in raw.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def validate(run, step):
    """The task's evaluations on split val -> a line of log.jsonl; the best weights go to OUT/best.

    `mean` of the first evaluation decides, or its first number. Random states are put back: the
    training goes on as if nobody had looked.
    """
    rank, world, _ = data.ranks()
    loop, info = run.loop, run.info
    limit = min(VALIDATION, loop.eval_limit or VALIDATION)
    module, task = evaluation.module_of(run.raw), info["task"]
    names = default_evaluations(module, task, run.raw, task)
    if not names:
        raise Stop(f"train.py: --eval_every: {info['task']} has no evaluation here")
    numbers = {}
    share_buffers(run.raw)
    with evaluation.seeded(loop.seed, run.device):
        for name in names:
            found = evaluation.evaluate(run.raw, info, name, {"split": "val", "limit": limit},
                                        rank, world, quiet=True)
            numbers[name] = found["metrics"]

    # which number decides
    first = numbers[names[0]]
    metric = "mean" if "mean" in first else next(iter(first))
    score, best = first[metric], info["best"]
    if rank == 0:
        runs.log_line(run, {"step": step, "split": "val", "limit": limit, **numbers})
        tqdm.write(f"step {step}, val (at most {limit:,} records): {names[0]} {metric} {score:.2f}")

    # the numbers before the first step show that it can be done, and what has to be beaten
    if step and (best is None or score > best["score"]):
        info["best"] = {"step": step, "evaluation": names[0], "metric": metric, "score": score,
                        "split": "val", "limit": limit}
        runs.save_best(run, step)


def closing(module, raw, task, trained, loop):
    """-> (the evaluations that end a run, their options). task: the run's; trained: the last
    stage's, whose settings are `loop`."""
    if loop.evals == "none":
        return [], {}
    names = loop.evals.split(",")
    if loop.evals == "default":
        names = default_evaluations(module, task, raw, trained)
    return names, {"split": loop.eval_split or None, "limit": loop.eval_limit or None}


def check_closing(module, preset, task, given, out, raw, info):
    """Finds what the evaluations at the end would stumble over before the run begins; before the
    first of several stages too, with the settings of the last."""
    stages = count_stages(module, preset, task, given)
    loop, _, trained = stage_settings(module, preset, task, given, out, stages - 1,
                                      info["loop"]["init"])
    info = {**info, "task": trained, "loop": dataclasses.asdict(loop), "path": str(out)}
    evaluation.check(raw, info, *closing(module, raw, task, trained, loop))


def closing_evaluations(module, raw, task, info, folder):
    """The evaluations that end a run -> {evaluation: result}.

    On all processes: each takes its share, and none sits at a barrier until it times out.
    """
    rank, world, _ = data.ranks()
    names, options = closing(module, raw, task, info["task"], Loop(**info["loop"]))
    info = {**info, "step": info["total_steps"], "path": str(folder)}
    return {name: evaluation.evaluate(raw, info, name, options, rank, world) for name in names}


# --------------------------------------------------------------------------------------------------
# The command

# how long a process waits for the others: one may be alone with an index, a save or a table
PATIENCE = datetime.timedelta(minutes=30)


def connect(device):
    """Joins the processes that torchrun started."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(data.ranks()[2])          # what NCCL sends goes through this GPU
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)


def main(argv=None):
    """The command line: trains every stage of the task, then evaluates -> {evaluation: result}."""
    began = time.time()
    module, name, preset, task, given = parse(sys.argv[1:] if argv is None else argv)
    rank, world, _ = data.ranks()
    stages = count_stages(module, preset, task, given)
    runs.check_start(given)
    if world > 1 and not dist.is_initialized():
        connect(given.get("device"))

    # a recipe may have stages: each starts from the weights of the one before, in its own
    # directory, with its own optimizer and schedule
    out, init = Path(given.get("out") or f"out/{name}-{task}"), ""
    with runs.Place(out, given.get("resume"), given.get("overwrite")) as place:
        for stage in range(stages):
            part = f"stage-{stage + 1}" if stages > 1 else ""
            raw, info = train(module, name, preset, task, given, place, part, stage, init)
            init = str(out / part)
        results = closing_evaluations(module, raw, task, info, out / part)

    if rank == 0:
        print(f"\n{time.time() - began:.0f} s in all. Checkpoint: "
              f"{out / part / 'model.safetensors'}")
        if info["best"]:
            print("Best while training: {evaluation} {metric} {score:.1f} on {split} (at most "
                  "{limit} records), step {step}: ".format(**info["best"]) + f"{out / part}/best")
        if task == module.TASKS[0] and len(module.TASKS) > 1:       # pre-trained: fine-tune it
            print(f"Next: python train.py --model {name} --task {module.TASKS[1]} --init {out}")
        else:
            measure = [*results, *module.EVALS[task]][0]
            print(f"Next: python eval.py {out} --task {measure}")
    if world > 1:
        dist.destroy_process_group()
    return results


# what torch's errors say when another process of the run has ended
LOST = r"Connection (closed|reset)|by peer|remote process|Broken pipe|NCCL|gloo|timed out"


def run_script():
    """main(), with the ends that a command can have in one line each."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the last checkpoint stands")
    except RuntimeError as e:
        if data.ranks()[1] == 1 or not re.search(LOST, str(e)):
            raise
        sys.exit(f"train.py: rank {data.ranks()[0]} lost another process, whose own message says "
                 f"why ({str(e).splitlines()[0][:80]}); the last checkpoint stands, --resume goes "
                 "on")


if __name__ == "__main__":
    run_script()
