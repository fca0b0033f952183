"""train.py: one loop for every model and every task.

    python train.py --model codis                             # tiny preset on the built-in shapes; ends with its table
    torchrun --nproc_per_node 8 train.py --model codis --preset base \
        --data coco.json,cc3m.tsv --image_root images --vocab vocab.txt
    python train.py --model codis --task vqa --init out/codis-pretrain
    python train.py --model codis --help                      # this loop's flags and the model's own

A flag's value: the default below < RECIPE[task] (the paper's) < PRESETS[preset] < the command line.
All randomness follows from --seed, the learning rate and the data from the step, so that `--resume` goes on bit
for bit after any stop.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from tools import weights
from tools.weights import Stop


@dataclass
class Loop:
    data: str = "shapes"            # "shapes", or files in official formats, separated by commas
    image_root: str = ""            # folder that image paths start from (default: the data file's)
    vocab: str = ""                 # BERT vocabulary file (default: that of shapes, or of --init)
    split: str = "train"            # which split to train on
    regions: str = ""       # region features of all images, also of --eval_data: files of data.py regions, by commas
    limit: int = 0                  # use so many records, drawn by --seed; 0 = all
    tag_words: str = ""  # word list, one a line: a record's tags are its captions' words in it, not those it came with
    eval_data: str = ""             # data of the evaluations at the end (default: --data)
    eval_root: str = ""             # its image folder (default: --image_root)
    eval_split: str = ""            # and its split (default: test, or val where there is no test)
    eval_limit: int = 0             # and how many of its records; 0 = all
    evals: str = "default"          # evaluations at the end, separated by commas; "none"
    out: str = ""                   # run directory (default: out/MODEL-TASK)
    init: str = ""                  # start from the weights of this run
    resume: bool = False            # go on from OUT/state.pt
    stage_data: tuple = ()          # data of each stage: there are as many stages as data here
    stage_root: tuple = ()          # image folder of each stage (default: --image_root)
    steps: int = 0                  # optimizer steps; 0 = by epochs
    epochs: float = 1.0             # passes over the data, where steps is 0
    batch_size: int = 32            # samples per optimizer step, over all processes
    accum: int = 1                  # forward-backward passes per optimizer step
    optimizer: str = "adamw"        # adamw, adam or sgd (momentum 0.9)
    lr: float = 1e-4                # peak learning rate
    beta2: float = 0.999            # second Adam coefficient; the first is 0.9
    weight_decay: float = 0.0       # as the optimizer defines it
    schedule: str = "cosine"        # after warm-up: cosine, linear, constant or step
    warmup_steps: float = 0         # steps from warmup_lr to lr; below 1: share of all steps
    warmup_lr: float = 0.0          # first learning rate of the warm-up
    min_lr: float = 0.0             # last learning rate of cosine and linear
    milestones: str = "0.5"         # schedule step: shares of all steps after which lr is multiplied by gamma
    gamma: float = 0.1              # see milestones
    clip: float = 0.0               # largest gradient norm; 0 = no clipping
    amp: str = "auto"               # bf16, fp16 (with a scaler) or fp32; auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = False           # torch.compile
    image_view: str = ""            # augmentation in place of the task's own (see data.py)
    crop_scale: tuple = (0.2, 1.0)  # area share of random crops
    rerank_k: int = 0               # candidates that match() re-ranks in retrieval; 0 = evaluation's own
    rerank: str = ""                # itm or sum (default: evaluation's own)
    seed: int = 0                   # of everything
    workers: int = -1               # loader processes per rank; -1 = 1 per 4 cores, none below
    device: str = ""                # cuda or cpu (default: cuda where there is one)
    log_every: int = 20             # steps per line of log.jsonl
    save_every: int = 500           # steps per checkpoint


# --------------------------------------------------------------------------------------------------
# Settings

def add_flags(parser, cls, title):
    """One flag per field of a dataclass; its trailing comment is the help text."""
    group = parser.add_argument_group(title)
    comments = field_comments(cls)
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        text = f"{comments[f.name]} [{default}]".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(f"--{f.name}", nargs="?", const=True, type=boolean, metavar="BOOL", help=text)
        elif isinstance(default, tuple):
            group.add_argument(f"--{f.name}", nargs=len(default) or "+",
                               type=type(default[0]) if default else str, help=text)
        else:
            group.add_argument(f"--{f.name}", type=type(default), metavar=type(default).__name__.upper(), help=text)


def field_comments(cls):
    """{field: the comment behind it} of a dataclass, read from its source."""
    import inspect
    lines = [line.split("#", 1) for line in inspect.getsource(cls).splitlines() if ":" in line.split("#")[0]]
    return {code.split(":")[0].strip(): "".join(comment).strip() for code, *comment in lines}


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Stop(f"train.py: {message} (see --help)")


def parse(argv):
    """-> (model's module, name, preset, task, {flag: value} given on the command line)."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    name = first.parse_known_args(argv)[0].model
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a file of models/, without .py")
    if name is None:
        add_flags(parser, Loop, "the loop")
        parser.parse_args(argv)                                    # prints the help, or says that --model is missing
    module = weights.load_module(name)
    parser.add_argument("--preset", default="tiny", choices=list(module.PRESETS), help="sizes [tiny]")
    parser.add_argument("--task", default=module.TASKS[0], help=f"{', '.join(module.TASKS)} [{module.TASKS[0]}]")
    for side in module.INITS:
        parser.add_argument(f"--init_{side}", default="", metavar="PATH|HUB",
                            help=f"pre-trained weights for the {side} tower: a file, or a hub name")
    add_flags(parser, Loop, "the loop (recipe and preset may change the defaults in brackets)")
    add_flags(parser, module.Config, f"models/{name}.py")
    args = vars(parser.parse_args(argv))
    args.pop("model")
    preset, task = args.pop("preset"), args.pop("task")
    if task not in module.TASKS:
        raise Stop(f"train.py: models/{name}.py has no task {task!r}; it has: {', '.join(module.TASKS)}")
    return module, name, preset, task, {k: tuple(v) if isinstance(v, list) else v
                                        for k, v in args.items() if v is not None}


def settings(module, preset, task, given, stage=0):
    """Loop and Config of a stage, by precedence: defaults < RECIPE[task] < PRESETS[preset] < the command line."""
    def of_stage(table):
        return table[min(stage, len(table) - 1)] if isinstance(table, list) else table
    sizes = {k: v for k, v in module.PRESETS[preset].items() if k not in module.TASKS}
    chosen = {}
    for level in (of_stage(module.RECIPE[task]), sizes, of_stage(module.PRESETS[preset].get(task, {})), given):
        if "epochs" in level and "steps" not in level:             # the last word on the length counts
            chosen["steps"] = 0
        chosen.update(level)
    return tuple(cls(**{f.name: chosen[f.name] for f in dataclasses.fields(cls) if f.name in chosen})
                 for cls in (Loop, module.Config))


# --------------------------------------------------------------------------------------------------
# Schedule and optimizer

def learning_rate(step, total, loop):
    """The learning rate of optimizer step 0..total-1, a pure function of it, for a group whose peak is loop.lr."""
    warmup = loop.warmup_steps if loop.warmup_steps >= 1 else loop.warmup_steps * total
    if step < warmup:
        return loop.warmup_lr + (loop.lr - loop.warmup_lr) * step / warmup
    t = (step - warmup) / max(1, total - warmup)                   # 0 .. 1
    if loop.schedule == "cosine":
        return loop.min_lr + (loop.lr - loop.min_lr) * 0.5 * (1 + math.cos(math.pi * t))
    if loop.schedule == "linear":
        return loop.min_lr + (loop.lr - loop.min_lr) * (1 - t)
    if loop.schedule == "step":
        return loop.lr * loop.gamma ** sum(step >= float(m) * total for m in loop.milestones.split(","))
    return loop.lr


def decay_matrices(model, loop):
    """Parameter groups of a model that does not ask for others: weight decay on matrices, none on biases, norms and
    single numbers, which it would only pull towards zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim >= 2], "lr": loop.lr, "weight_decay": loop.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "lr": loop.lr, "weight_decay": 0.0}]


def make_optimizer(groups, loop):
    groups = [dict(g, peak=g["lr"]) for g in groups if g["params"]]
    if loop.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[loop.optimizer](
        groups, betas=(0.9, loop.beta2), fused=True)


# --------------------------------------------------------------------------------------------------
# Checkpoints

def write(path, fn):
    """fn(temporary path), then rename: a file is whole or not there."""
    fn(path.with_name(path.name + ".tmp"))
    os.replace(path.with_name(path.name + ".tmp"), path)


def save(out, raw, optimizer, scaler, step, info, rank, world):
    """model.safetensors (to use), state.pt (to resume, complete in itself), config.json."""
    rng = [torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None]
    everyone = [rng]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, rng)
    if rank == 0:
        state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "step": step, "rng": everyone}
        write(out / "config.json", lambda p: p.write_text(json.dumps({**info, "step": step}, indent=1)))
        weights.save_model(raw, out / "model.safetensors")
        write(out / "state.pt", lambda p: torch.save(state, p))
    if world > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# A run

def train(module, name, preset, task, given, out, stage=0, init=""):
    """One stage of one task on every process -> the run's info. The loop itself is at the end."""
    loop, cfg = settings(module, preset, task, given, stage)
    recipe = module.RECIPE[task]
    recipe = recipe[min(stage, len(recipe) - 1)] if isinstance(recipe, list) else recipe
    task, loop.init, loop.out = recipe.get("task", task), init or loop.init, str(out)
    if loop.stage_data:
        loop.data = loop.stage_data[stage]
    if loop.stage_root:
        loop.image_root = loop.stage_root[stage]
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device(loop.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:                                               # or two threads add up the gradient of x[index] in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    say = print if rank == 0 else lambda *a, **k: None
    if loop.batch_size % (world * loop.accum):
        raise Stop(f"train.py: --batch_size {loop.batch_size} is not a multiple of {world} processes "
                   f"x {loop.accum} accumulation steps")
    micro = loop.batch_size // (world * loop.accum)

    # data
    views = {**module.VIEWS[task]}
    need = tuple("caption" if n == "tags" and loop.tag_words else n for n in data.needs(views))
    records = data.open_source(views["source"], loop.data, loop.split, loop.image_root or None,
                               limit=loop.limit or None, seed=loop.seed, need=need, missing=data.absent(views))
    if loop.tag_words:
        records = data.caption_tags(records, loop.tag_words)
    records = data.with_regions(records, views, loop.regions)
    loop.vocab = loop.vocab or default_vocab(loop)
    tokenizer = data.get_tokenizer(loop.vocab)
    for field in ("vocab_size", "pad_id", "cls_id", "sep_id", "mask_id", "first_word"):
        if hasattr(cfg, field):
            setattr(cfg, field, getattr(tokenizer, field))
    stats = data.stats(records, views=views, tags=getattr(cfg, "tag_vocab", None))
    if hasattr(module, "setup"):
        module.setup(cfg, task, stats)
    workers = loop.workers if loop.workers >= 0 else max(0, (os.cpu_count() or 1) // 4)
    samples = data.Views(records, views, tokenizer, getattr(cfg, "image_size", None), cfg.max_text, seed=loop.seed,
                         crop_scale=loop.crop_scale, image_view=loop.image_view or None, tag_names=stats.get("tags"),
                         max_regions=getattr(cfg, "max_regions", None))
    epoch_steps = max(1, len(records) // loop.batch_size)
    total = loop.steps or math.ceil(loop.epochs * epoch_steps)
    if "steps" in given:
        total = loop.steps

    # model
    torch.manual_seed(loop.seed)                                   # the same weights on every process
    raw = module.Model(cfg, task, num_labels=stats.get("num_labels", 0))
    news = [weights.initialize(raw, loop.init, module.BACKBONE)] if loop.init else []
    paths = {side: given[f"init_{side}"] for side in module.INITS if given.get(f"init_{side}")}
    if paths and not stage:
        news += weights.load_towers(module, raw, paths)
    raw.to(device).train()
    if "features" in data.view_keys(views).values():            # of a frozen model: computed once, kept beside the run
        out.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            samples.features = data.store_features(out / "features.npy", feature_key(raw, loop, views),
                                                   raw.visual_features, records, views, tokenizer, cfg.image_size,
                                                   cfg.max_text, device, rank=rank, world=world, workers=workers)
    if hasattr(raw, "prepare") and not (loop.resume and (out / "state.pt").exists()):
        raw.prepare(samples)
    groups = raw.param_groups(loop) if hasattr(raw, "param_groups") else decay_matrices(raw, loop)
    optimizer = make_optimizer(groups, loop)
    amp = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(loop.amp, loop.amp)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    if loop.compile:
        raw.compile()
    model = (DistributedDataParallel(raw, device_ids=[local] if device.type == "cuda" else None,
                                     broadcast_buffers=False) if world > 1 else raw)

    info = {"model": name, "preset": preset, "task": task,
            "config": dataclasses.asdict(cfg), "loop": dataclasses.asdict(loop),
            "stats": stats, "views": views, "total_steps": total, "data_notes": records.notes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    start = prepare(out, info, loop, raw, optimizer, scaler, rank, world)
    if start is None:
        torch.manual_seed(loop.seed + rank)                        # from here on every process draws its own
        start = 0
    say(f"{name} ({preset}) {task}: {len(records):,} records of {loop.data} [{loop.split}]"
        + (f" ({', '.join(f'{k} {v:,}' for k, v in records.notes.items())})" if records.notes else ""))
    if records.regions:
        say(f"  regions: {records.regions.about}")
    say(f"  {count(raw.parameters()):,} parameters, {count(p for p in raw.parameters() if p.requires_grad):,} trained: "
        + ", ".join(f"{n} {count(m.parameters()):,}" for n, m in raw.named_children()))
    for label, parts in getattr(module, "COUNTS", {}).items():
        if all(hasattr(raw, p) for p in parts):
            say(f"  {label}: {count(q for p in parts for q in getattr(raw, p).parameters()) / 1e6:.1f}M")
    say(f"  {total:,} steps of {loop.batch_size} = {world} processes x {loop.accum} x {micro}, "
        f"{total / epoch_steps:.2f} epochs; {amp} on {device}; "
        f"{loop.optimizer} lr {learning_rate(0, total, loop):.2g} -> {loop.lr:.2g} -> "
        f"{learning_rate(max(0, total - 1), total, loop):.2g} ({loop.schedule})")
    say("  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    for line in news + getattr(raw, "remarks", []):
        say("  " + line)

    # the loop
    stop = Interrupt(world)
    stream = data.batches(samples, micro, loop.seed, rank, world, start * loop.accum, workers)
    bar = tqdm(total=total, initial=start, desc=f"{name} {task}", disable=rank > 0, mininterval=1.0, dynamic_ncols=True)
    log = open(out / "log.jsonl", "a") if rank == 0 else None
    since, bad = time.perf_counter(), torch.zeros((), dtype=torch.long)
    for step in range(start, total):
        lr = learning_rate(step, total, loop)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr / loop.lr
        for i in range(loop.accum):
            batch = next(stream)
            bad += batch.pop("bad").sum()
            batch = data.move(batch, device)
            last = i + 1 == loop.accum
            with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                with autocast:
                    out_ = model(batch)
                scaler.scale(out_["loss"] / loop.accum).backward()
            if hasattr(raw, "after_backward"):
                raw.after_backward(out_)
        if loop.clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(raw.parameters(), loop.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(raw, "after_step"):
            raw.after_step(step + 1, total, epoch_steps)
        bar.update()

        done = step + 1
        if done % loop.log_every == 0 or done == total:
            # the only wait for the device
            values = {k: v.item() for k, v in {"loss": out_["loss"], **out_["logs"]}.items()}
            if not math.isfinite(values["loss"]):
                raise Stop(f"train.py: the loss is {values['loss']} at step {done} on rank {rank}: {values}; "
                           "the last checkpoint is whole")
            if rank == 0:
                speed = loop.batch_size * ((done - start - 1) % loop.log_every + 1) / (time.perf_counter() - since)
                print(json.dumps({"step": done, "lr": lr, **values, "samples_per_s": speed, "unreadable": int(bad)}),
                      file=log, flush=True)
                bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in values.items()), refresh=False)
            since = time.perf_counter()
        if done % loop.save_every == 0 or done == total or stop.asked:
            save(out, raw, optimizer, scaler, done, info, rank, world)
            since = time.perf_counter()
        if stop.asked:
            raise Stop(f"stopped at step {done} of {total}, saved in {out}; the same command with --resume goes on")
    bar.close()
    if start == total == 0 or not (out / "model.safetensors").exists():
        save(out, raw, optimizer, scaler, start, info, rank, world)
    stop.restore()
    if bad:
        say(f"  {int(bad)} unreadable images on this process were replaced by others")
    return raw, info


def count(parameters):
    return sum(p.numel() for p in parameters)


def feature_key(raw, loop, views):
    """What stored features hang on: the data, the views, all weights that are not trained."""
    digest, trained = hashlib.sha256(), {n for n, p in raw.named_parameters() if p.requires_grad}
    for name, value in raw.state_dict().items():
        if name not in trained:
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return {"data": loop.data, "split": loop.split, "limit": loop.limit, "root": loop.image_root, "seed": loop.seed,
            "views": views, "weights": digest.hexdigest()}


def default_vocab(loop):
    """The vocabulary of --init's run, else the built-in world's; real data must name one."""
    if loop.init:
        return str(weights.find_run(loop.init) / "vocab.txt")
    if loop.data != "shapes":
        raise Stop("train.py: --data other than shapes needs --vocab, "
                   "a BERT vocabulary file (bert-base-uncased's vocab.txt)")
    from tools import shapes
    return str(shapes.ensure() / "vocab.txt")


def prepare(out, info, loop, raw, optimizer, scaler, rank, world):
    """Makes the run directory, or loads the checkpoint there -> its step; None for a run that starts."""
    state = out / "state.pt"
    if loop.resume and state.exists():
        old = json.loads((out / "config.json").read_text())
        free = ("resume", "out", "workers", "log_every", "save_every", "evals", "eval_data", "eval_root",
                "eval_split", "vocab")
        for part in ("model", "task", "config", "loop"):
            theirs, ours = json.loads(json.dumps(old[part])), json.loads(json.dumps(info[part]))
            for key in (set(theirs) | set(ours) if isinstance(ours, dict) else ()):
                if key not in free and theirs.get(key) != ours.get(key):
                    raise Stop(f"--resume: {out} was trained with {key} {theirs.get(key)}, "
                               f"this command says {ours.get(key)}")
            if not isinstance(ours, dict) and theirs != ours:
                raise Stop(f"--resume: {out} holds {part} {theirs}, not {ours}")
        saved = torch.load(state, map_location="cpu", weights_only=True)
        if len(saved["rng"]) != world:
            raise Stop(f"--resume: {out} was trained by {len(saved['rng'])} processes, these are {world}: "
                       "the samples would differ")
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        cpu, cuda = saved["rng"][rank]
        torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
        if rank == 0:
            log = [line for line in (out / "log.jsonl").read_text().splitlines()
                   if json.loads(line)["step"] <= saved["step"]]
            (out / "log.jsonl").write_text("".join(line + "\n" for line in log))
            print(f"resuming {out} at step {saved['step']}")
        return saved["step"]
    if rank == 0:
        if loop.resume:
            print(f"{state} is not there: nothing to resume, starting at step 0")
        elif state.exists():
            print(f"{out} holds an earlier run: it is replaced")
        out.mkdir(parents=True, exist_ok=True)
        for name in ["state.pt", "log.jsonl", "model.safetensors"] + [p.name for p in out.glob("eval-*.json")]:
            (out / name).unlink(missing_ok=True)
        if Path(loop.vocab).resolve() != (out / "vocab.txt").resolve():
            shutil.copyfile(loop.vocab, out / "vocab.txt")
        (out / "config.json").write_text(json.dumps({**info, "step": 0}, indent=1))
    if world > 1:
        dist.barrier()
    return None


class Interrupt:
    """The first Ctrl-C asks the loop to save and stop after the step in hand, a second one stops at once. With several
    processes, whose steps it would tear apart, Ctrl-C stops at once and the last checkpoint stands."""

    def __init__(self, world):
        self.asked, self.old = False, None
        if world == 1:
            with contextlib.suppress(ValueError):                  # not the main thread: no handler to set
                self.old = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        self.asked = True
        self.restore()

    def restore(self):
        if self.old is not None:
            signal.signal(signal.SIGINT, self.old)


def count_stages(module, preset, task, given, out):
    """How many stages the run has: as many as there are --stage_data, else as the recipe lists. What a later stage left
    from an earlier run goes, so that --resume cannot take it for this run's."""
    tables = [t for t in (module.PRESETS[preset].get(task), module.RECIPE[task]) if isinstance(t, list)]
    stages = len(given.get("stage_data", ())) or len(tables[0] if tables else [0])
    if stages > 1 and "stage_data" not in given and any("own_data" in t for t in tables[0]):
        raise Stop(f"train.py: {task} has {stages} stages: name the data of each (--stage_data A B), "
                   "or of the only one (--stage_data A)")
    if len(given.get("stage_root", [0] * stages)) != stages:
        raise Stop(f"train.py: {len(given['stage_root'])} --stage_root for {stages} stages")
    if not given.get("resume") and int(os.environ.get("RANK", 0)) == 0:
        for state in out.glob("stage-*/state.pt"):
            state.unlink()
    return stages


def main(argv=None):
    """The command line: trains every stage of the task, then evaluates. -> {evaluation: result}."""
    argv = sys.argv[1:] if argv is None else argv
    module, name, preset, task, given = parse(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() and given.get("device") != "cpu" else "gloo")
    out = Path(given.get("out") or f"out/{name}-{task}")
    stages = count_stages(module, preset, task, given, out)
    began, init = time.time(), ""
    for stage in range(stages):
        folder = out / f"stage-{stage + 1}" if stages > 1 else out
        raw, info = train(module, name, preset, task, given, folder, stage, init)
        init = str(folder)
    loop = info["loop"]
    own = [e for e in module.EVALS[task] if e in evaluation.offered(raw)]   # a loss left out may leave an encoder out
    evals = {"default": own, "none": ()}.get(loop["evals"], loop["evals"].split(","))
    # --eval_data and --eval_root: from the run
    options = {"split": loop["eval_split"] or None, "limit": loop["eval_limit"] or None}
    results = {e: evaluation.evaluate(raw, {**info, "step": info["total_steps"], "path": str(folder)}, e, options,
                                      rank, world) for e in evals}
    if rank == 0:
        following = module.TASKS[1:] if task == module.TASKS[0] else ()             # after pre-training, a fine-tuning
        print(f"\n{time.time() - began:.0f} s in all. Checkpoint: {folder / 'model.safetensors'}\nNext: " + (
            f"python train.py --model {name} --task {following[0]} --init {out}" if following else
            f"python eval.py {out} --task {(evals or module.EVALS[task])[0]}"))
    if world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the last checkpoint stands")
