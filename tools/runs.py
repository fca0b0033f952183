"""tools/runs.py: what a run directory is, and how nothing in it is lost.

    python -m tools.runs OUT            what a run directory holds, and whether it is whole

train.py trains, this file keeps: one command at a time in a directory, files that are whole at any
moment, the last two checkpoints, the best weights, and the way back to them with --resume. `run` is
train.py's Run everywhere, what one training has in hand on one process. An error is a `Stop`: one
line, exit status 1, on all processes together.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

import data
from tools import Parser, Stop, weights

# --------------------------------------------------------------------------------------------------
# All processes together

def stop_if(trouble):
    """Ends all processes together if one of them has a trouble (a line, else "").

    Called by every process. Rank 0 says the first one; the others end without a word.
    """
    troubles = [line for line in data.gather_objects(trouble) if line]
    if troubles:
        raise Stop(troubles[0] if data.ranks()[0] == 0 else 1)


def on_rank_0(what, fn, *args, run=None):
    """fn(*args) on rank 0, while the others wait. Its OSError ends all of them in one line: `what`,
    the reason and, with a run, what is on the disk. So does its Stop."""
    trouble = ""
    if data.ranks()[0] == 0:
        try:
            fn(*args)
        except OSError as e:
            trouble = f"train.py: {what}: {e}" + (f"; {standing(run)}" if run else "")
        except Stop as e:
            trouble = str(e)
    stop_if(trouble)


# --------------------------------------------------------------------------------------------------
# The run directory: one command at a time, and nothing lost

def check_start(given):
    """Refuses what a restart by torchrun would turn against the run."""
    if given.get("resume") and given.get("overwrite"):
        raise Stop("train.py: --resume keeps the run in --out, --overwrite replaces it: not both")
    if given.get("overwrite") and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise Stop("train.py: --overwrite with torchrun's --max_restarts: a restarted worker would "
                   "replace the run that it should go on with; give --resume, and another --out or "
                   "an empty one")


def holds_run(folder):
    """Is there a run, or a stage of one, that could be lost? Before its first checkpoint, none."""
    names = ("model.safetensors", "state*.pt", "stage-*/model.safetensors", "stage-*/state*.pt")
    return any(any(folder.glob(name)) for name in names)


# Files whose lock this process holds. A forked loader worker inherits them, and would keep a run
# locked for the seconds that it outlives a killed trainer: so every child closes them.
LOCKED = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in LOCKED])


def lock(folder):
    """Takes FOLDER/lock, which the system frees when this process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Stop(f"train.py: {folder} is in use by {file.read().strip() or 'another run'}: "
                   "wait for it, or give another --out") from None

    # a command that ended without a run has just taken this file away: another one is needed
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()
        return lock(folder)

    # who has it, for the message above
    LOCKED.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class Place:
    """Where this command keeps its run. A command that fails leaves an earlier run as it was.

    `out` is what --out says, `root` where files go now. With --overwrite that is a folder beside
    `out` until the first new checkpoint stands there; then the two change places (settle), and the
    old run is deleted. All processes have a Place, rank 0 alone touches files.
    """

    def __init__(self, out, resume, overwrite):
        self.out, self.root, self.locks = out, out, []
        self.real = out.resolve()                       # OUT may be a link to another disk
        self.new = self.real.with_name(self.real.name + ".overwriting")
        self.old = self.real.with_name(self.real.name + ".overwritten")
        try:
            on_rank_0(f"--out {out} cannot be written", self.open, resume, overwrite)
        except Stop:
            self.release()
            raise
        self.root = data.gather_objects(self.root)[0]

    def open(self, resume, overwrite):
        """Locks the directory and refuses what would lose a run, before anything is changed."""
        # an --overwrite was killed between the two renames of settle()
        if self.old.exists() and not self.real.exists():
            os.replace(self.new if holds_run(self.new) else self.old, self.real)

        self.locks.append(lock(self.out))
        if holds_run(self.out) and not resume and not overwrite:
            raise Stop(f"train.py: {self.out} holds a run: --resume goes on with it, another --out "
                       "leaves it alone, --overwrite replaces it")

        # what killed commands left half-done; both names are ours alone
        shutil.rmtree(self.new, ignore_errors=True)
        shutil.rmtree(self.old, ignore_errors=True)
        for part in ("", "stage-*/", "best/", "stage-*/best/"):
            for path in self.out.glob(part + "*.tmp"):
                path.unlink()
            for path in self.out.glob(part + "model-*.safetensors"):
                state = path.name.replace("model", "state").replace(".safetensors", ".pt")
                if not path.with_name(state).exists():
                    path.unlink()

        if holds_run(self.out) and overwrite:
            self.root = self.new
            self.locks.append(lock(self.new))

    def settle(self):
        """The first new checkpoint stands: it takes the place of the run that it replaces."""
        if self.root == self.new:
            os.replace(self.real, self.old)
            try:
                os.replace(self.new, self.real)
            except OSError:
                os.replace(self.old, self.real)
                raise
            sync(self.new.parent)
            shutil.rmtree(self.old)
            self.root = self.out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if data.ranks()[0] == 0:
            if self.root == self.new:
                shutil.rmtree(self.new)                 # no checkpoint came: the old run stands
            elif os.listdir(self.out) == ["lock"]:
                (self.out / "lock").unlink()            # refused: nothing is left behind
                self.out.rmdir()
        self.release()

    def release(self):
        for file in self.locks:
            LOCKED.discard(file)
            file.close()


def open_directory(run):
    """Makes the directory of a stage, or refuses it -> are there checkpoints to go on from?"""
    steps, root = checkpoints(run.out), run.place.root
    if not steps and holds_run(run.out):
        raise Stop(f"--resume: {run.out} has no state-STEP.pt to resume: --init {run.out} with "
                   "another --out starts from its weights, --overwrite replaces it")
    if run.part and (root / "model.safetensors").exists():
        raise Stop(f"--resume: {root} holds a run without stages, this command has stages")
    on_rank_0("the run cannot begin", prepare_directory, run, steps)
    return bool(steps)


def prepare_directory(run, steps):
    """Makes the folder, with the vocabulary and an empty log where a run begins."""
    run.out.mkdir(parents=True, exist_ok=True)
    check_space(run)

    # the run keeps its own vocabulary, so that it can be moved and evaluated alone
    copy, given = run.out / "vocab.txt", Path(run.loop.vocab)
    if not (copy.exists() and copy.read_bytes() == given.read_bytes()):
        if steps:
            print(f"{copy} was missing or another one: it is {given} again")
        shutil.copyfile(given, copy)
    if not steps:
        if run.loop.resume:
            print(f"nothing to resume in {run.out}: starting at step 0")
        (run.out / "log.jsonl").write_text("")          # of a run that died without a checkpoint


def check_space(run):
    """Stop where the disk has no room for three checkpoints: two that stand and one on its way."""
    moments = 1 if run.loop.optimizer == "sgd" else 2
    size = sum(t.nbytes for t in run.raw.state_dict().values())
    size += moments * sum(p.nbytes for p in run.raw.parameters() if p.requires_grad)
    needed = size * (3 - min(2, len(checkpoints(run.out))))
    free = shutil.disk_usage(run.out).free
    if free < needed:
        raise Stop(f"train.py: {run.out}: {free / 1e9:.1f} GB are free, checkpoints of "
                   f"{size / 1e9:.1f} GB need {needed / 1e9:.1f} GB")


# --------------------------------------------------------------------------------------------------
# Files

def sync(path):
    """Waits until a file, or the names in a folder, are on the disk and not on their way there."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def write(path, fn):
    """fn(temporary path), then rename: whoever opens `path` finds a whole file, old or new.

    OSError, which names the path, if it cannot be written; the temporary file is gone then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        fn(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        # torch.save hides the system's error behind one of its own, safetensors tells its words
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{path}: {reason}") from None


def write_config(folder, info, step):
    text = json.dumps({**info, "step": step}, indent=1)
    write(folder / "config.json", lambda path: path.write_text(text))


def log_line(run, line):
    """A line more of log.jsonl. Rank 0 writes; a full disk ends the run in one line."""
    try:
        with open(run.out / "log.jsonl", "a") as file:
            print(json.dumps(line), file=file)
    except OSError as e:
        raise Stop(f"train.py: {run.out / 'log.jsonl'}: {e.strerror}; {standing(run)}") from None


# --------------------------------------------------------------------------------------------------
# Checkpoints
#
# The last two are kept, a pair of files each: model-STEP.safetensors, the weights and buffers, and
# state-STEP.pt, all else that --resume needs. model.safetensors is the newest of the former under
# the name that other programs read: a second name of the same file, no second copy.

def checkpoints(folder):
    """The steps of the checkpoints in a run directory, newest first."""
    names = [re.fullmatch(r"state-(\d+)\.pt", path.name) for path in folder.glob("state-*.pt")]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def pair(folder, step):
    """The files of a checkpoint -> (state, weights)."""
    return folder / f"state-{step}.pt", folder / f"model-{step}.safetensors"


def standing(run):
    """What is on the disk when a run stops."""
    steps = checkpoints(run.out)
    if not steps:
        return f"{run.out} has no checkpoint of this run yet"
    return f"the checkpoint of step {steps[0]} in {run.out} is whole"


def drop(folder, step):
    for path in pair(folder, step):
        path.unlink(missing_ok=True)


def save_state(state, path):
    with open(path, "wb") as file:
        torch.save(state, file)


def name_newest(folder, step):
    """Makes model.safetensors another name of the checkpoint's weights; a copy where the file
    system has no such names."""
    (_, newest), name = pair(folder, step), folder / "model.safetensors"
    if name.exists() and name.samefile(newest):
        return

    def second_name(path):
        path.unlink(missing_ok=True)
        try:
            os.link(newest, path)
        except OSError:
            shutil.copyfile(newest, path)
    write(name, second_name)


def check_finite(run, step):
    """Ends all processes if there is an inf or a NaN in what a checkpoint holds, which would take
    the place of a good one: weights, buffers, the optimizer's moments. One answer, one wait."""
    moments = [t for state in run.optimizer.state.values() for t in state.values()]
    tensors = [*run.raw.state_dict().values(), *filter(torch.is_tensor, moments)]
    answers = [t.isfinite().all().to(run.device) for t in tensors if t.is_floating_point()]
    trouble = ""
    if not torch.stack(answers).all():
        trouble = (f"train.py: weights, buffers or optimizer moments are not finite after step "
                   f"{step}; {standing(run)}")
    stop_if(trouble)


def save(run, step):
    """Writes a checkpoint, unless one of its numbers is not finite, and drops all but the last two.

    Random states differ from process to process, so that each draws its own masks: all are kept.
    """
    check_finite(run, step)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    random_states = data.gather_objects([torch.get_rng_state(), cuda])

    # all else is equal on all processes: one writes, and nobody runs ahead of a half-written file
    on_rank_0(f"the checkpoint of step {step} cannot be written", write_checkpoint, run, step,
              random_states, run=run)
    run.place.root, run.saved = run.place.out, time.monotonic()


def write_checkpoint(run, step, random_states):
    """The files of one checkpoint. Each is whole at any moment; the state, without which the others
    are no checkpoint, comes last."""
    # state-STEP.pt holds tensors, numbers, strings, lists and dicts only, so that
    # torch.load(weights_only=True) can read it, which runs no code
    state = {"step": step, "optimizer": run.optimizer.state_dict(), "rng": random_states,
             "scaler": run.scaler.state_dict(), "best": run.info["best"]}
    state_file, weights_file = pair(run.out, step)
    write(weights_file, lambda path: weights.save_model(run.raw, path, step))
    write_config(run.out, run.info, step)
    write(state_file, lambda path: save_state(state, path))
    name_newest(run.out, step)
    run.place.settle()

    for older in checkpoints(run.out)[2:]:
        drop(run.out, older)


def save_best(run, step):
    """OUT/best: a run directory of its own, for eval.py and --init."""
    check_finite(run, step)
    on_rank_0("the best weights cannot be written", write_best, run, step, run=run)


def write_best(run, step):
    best = run.out / "best"
    best.mkdir(exist_ok=True)
    shutil.copyfile(run.out / "vocab.txt", best / "vocab.txt")
    write(best / "model.safetensors", lambda path: weights.save_model(run.raw, path, step))
    write_config(best, run.info, step)


# --------------------------------------------------------------------------------------------------
# Resume

# settings that a resumed run may change: they do not touch what is computed
FREE = ("resume", "overwrite", "out", "workers", "log_every", "save_every", "save_minutes", "evals",
        "eval_data", "eval_root", "eval_split", "eval_limit", "rerank", "rerank_k", "vocab")
LENGTH = ("steps", "epochs")                            # these, if the schedule allows it


def fingerprint(records, loop):
    """What a resumed run must find unchanged, whatever its files are called."""
    return {"records": records.fingerprint(),
            "vocabulary": hashlib.sha256(Path(loop.vocab).read_bytes()).hexdigest()[:16]}


def read_config(folder, asker="--resume"):
    """The config.json of a run -> dict; a Stop, which begins with `asker`, where it is damaged."""
    try:
        old = json.loads((folder / "config.json").read_text())
        if not all(isinstance(old[part], dict) for part in ("config", "loop", "fingerprint")):
            raise ValueError("not the settings of a run")
        return old
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Stop(f"{asker}: {folder / 'config.json'}: damaged ({type(e).__name__}: {e}): it "
                   "cannot be told what the run was trained with") from None


def check_same(out, info):
    """A resumed run must be the run that was stopped -> its config.json.

    The same model, task, settings, records and vocabulary.
    """
    old = read_config(out)
    new = json.loads(json.dumps(info))                  # tuples become lists, as in the file
    for part in ("model", "task"):
        if old.get(part) != new[part]:
            raise Stop(f"--resume: {out} holds {part} {old.get(part)}, not {new[part]}")
    for part in ("config", "loop"):
        for key in sorted(set(old[part]) | set(new[part])):
            if key not in FREE + LENGTH and old[part].get(key) != new[part].get(key):
                raise Stop(f"--resume: {out} was trained with {key} {old[part].get(key)}, "
                           f"this command says {new[part].get(key)}")

    # files may have changed under names that have not
    for what, mark in new["fingerprint"].items():
        if old["fingerprint"].get(what) != mark:
            raise Stop(f"--resume: {out} was trained with other {what} than these "
                       f"({old['fingerprint'].get(what)}, now {mark})")
    return old


def check_length(run, old, step, learning_rate):
    """--steps and --epochs may differ if every learning rate so far would have been the same."""
    before, now = old["total_steps"], run.info["total_steps"]
    if now == before:
        return

    # which of the two was changed, and whether so many steps are done already
    fields = [f"{key} {old['loop'][key]:g}" for key in LENGTH
              if old["loop"][key] != getattr(run.loop, key)]
    told = (f"--resume: {run.out} was trained to step {step} with {', '.join(fields)}, "
            f"{before} steps in all, this command says {now}")
    if now < step:
        raise Stop(told)

    # every step that was done must have had the rate that it would have now
    for s in range(step):
        if learning_rate(s, before, run.loop) != learning_rate(s, now, run.loop):
            raise Stop(f"{told}: the {run.loop.schedule} schedule would have given step {s} "
                       "another learning rate (a constant one can be prolonged)")
    if data.ranks()[0] == 0:
        print(f"{run.out}: {now} steps instead of {before}; the learning rates so far are the same")


def read_checkpoint(folder, step, read=weights.read_run):
    """The state of a checkpoint, whose weights `read` takes from their file; a Stop where one of
    the two is damaged, or of another step."""
    path, weights_file = pair(folder, step)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        known = saved["step"], len(saved["rng"]), saved["optimizer"], saved["scaler"], saved["best"]
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError,
            pickle.UnpicklingError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise Stop(f"{path}: damaged ({reason[:60]})") from None

    read(weights_file)
    with safe_open(weights_file, "pt") as file:
        marked = (file.metadata() or {}).get("step")
    if known[0] != step or marked != str(step):
        raise Stop(f"{weights_file}: weights of step {marked}, state of step {known[0]}")
    return saved


def load_checkpoint(run, learning_rate):
    """Puts everything back as it was at the last whole checkpoint -> the step to go on with.

    learning_rate(step, total, loop) is the schedule, which a change of --steps must not have bent.
    """
    out, (rank, world, _) = run.out, data.ranks()
    old = check_same(out, run.info)

    # the newest, or the one before it. Momentum networks, queues and their pointers are buffers:
    # they come with the weights
    damage = []
    for step in checkpoints(out):
        try:
            saved = read_checkpoint(out, step, lambda path: weights.load_weights(run.raw, path))
            break
        except Stop as e:
            damage.append(str(e))
    else:
        raise Stop(f"--resume: no checkpoint can be read: {'; '.join(damage)}")
    if len(saved["rng"]) != world:
        raise Stop(f"--resume: {out} was trained by {len(saved['rng'])} processes, "
                   f"these are {world}: the samples would differ")
    check_length(run, old, step, learning_rate)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.info["best"] = saved["best"]

    # masks, dropout and hard negatives are drawn as they would have been. Augmentations need no
    # state: data.py derives them from (seed, sample), and the stream starts at this step
    cpu, cuda = saved["rng"][rank]
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)

    # nobody deletes what another process has yet to read
    stop_if("")
    on_rank_0("--resume", tidy, out, step, damage)
    if rank == 0:
        done = ": it is finished" if step == run.info["total_steps"] else ""
        print(f"resuming {out} at step {step}{done}")
    return step


def tidy(out, step, damage):
    """Makes this step the newest of a run directory. damage: what was wrong with later ones."""
    for line in damage:
        print(f"{line}: going back to the checkpoint of step {step}")
    for later in checkpoints(out):
        if later > step:
            drop(out, later)
    name_newest(out, step)
    cut_log(out / "log.jsonl", step)


def cut_log(path, step):
    """Drops the lines of steps that will be done, and logged, again."""
    kept = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            # the last one may have been cut off when the run was killed
            if number < len(lines):
                raise Stop(f"{path}:{number}: not a line of a log; repair or delete the "
                           "file") from None
            print(f"{path}:{number}: cut off in the middle, dropped")
    write(path, lambda temporary: temporary.write_text("".join(kept)))


# --------------------------------------------------------------------------------------------------
# What stops a run: signals, and numbers that are not finite

GO_ON = 75                          # exit status of a run that was asked to stop: EX_TEMPFAIL


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask the loop to save and stop; a second Ctrl-C stops at
    once. A signal that was ignored when the run began, as nohup does, stays ignored.
    """

    def __init__(self):
        self.asked, self.old = "", {}

    def __enter__(self):
        with contextlib.suppress(ValueError):           # not the main thread: no handler to set
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


class Watch:
    """Remembers the first step whose loss or gradient norm was not finite.

    On the device: a step asks nothing, so that Python need not wait for the GPU. The answer is read
    where processes agree(), before each log line and each checkpoint. An overflow that the scaler
    of fp16 skips is none: its norm is not shown here. Without --clip no norm is computed; the next
    loss, or save()'s look at the weights, tells then.
    """

    def __init__(self, device):
        self.bad, self.first = torch.zeros((), dtype=torch.bool, device=device), {}

    def see(self, step, loss, logs, norm):
        """loss, logs ({name: 0-d}) and norm (0-d or None) of one step."""
        now = {"step": torch.full_like(loss, step, dtype=torch.float64), "loss": loss, **logs}
        if norm is not None:
            now["gradient norm"] = norm

        # the first bad step stays, others are replaced by the next
        for name, value in now.items():
            value = value.detach()
            self.first[name] = torch.where(self.bad, self.first.get(name, value), value)
        for value in (loss, norm):
            if value is not None:
                self.bad = self.bad | ~value.detach().isfinite()

    def trouble(self):
        """What was not finite, in words; "" if all was."""
        if not self.bad:
            return ""
        values = {name: value.item() for name, value in self.first.items()}
        step = int(values.pop("step"))
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        return f"train.py: not finite at step {step}: {told}"


def agree(run, watch, stop):
    """What all processes do after this step -> (stop?, checkpoint by time?), the same on all.

    One exchange of three numbers, at log lines: a signal may have reached one process alone, the
    clock is that of rank 0, and where any saw a number that is not finite, all stop.
    """
    rank, world, _ = data.ranks()
    minutes = (time.monotonic() - run.saved) / 60
    late = rank == 0 and 0 < run.loop.save_minutes <= minutes
    flags = torch.tensor([bool(watch.bad), bool(stop.asked), late], dtype=torch.int32)
    if world > 1:
        flags = flags.to(run.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    bad, asked, late = flags.tolist()
    if bad:
        trouble = watch.trouble()
        stop_if(trouble and f"{trouble}; {standing(run)}")
    return bool(asked), bool(late)


def end_stopped(run, step, stop):
    """Ends a run that was asked to stop, with an exit status that scripts can tell from errors."""
    names = [name for name in data.gather_objects(stop.asked) if name]
    if data.ranks()[0] == 0:
        print(f"stopped at step {step} of {run.info['total_steps']} by {names[0]}, saved in "
              f"{run.out}; the same command with --resume goes on", file=sys.stderr)
    raise SystemExit(GO_ON)


# --------------------------------------------------------------------------------------------------
# The command

SHOWN = ("model", "preset", "task", "step", "total_steps", "best")      # of config.json


def user_of(folder):
    """Which process is at work in a folder, as its lock says; "" for none."""
    try:
        file = open(folder / "lock")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    except OSError as e:
        raise Stop(f"tools.runs: {folder / 'lock'}: {e.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another run"
    return ""


def inventory(folder):
    """What the directory of a run, or of one stage, holds: its lines."""
    info = read_config(folder, "tools.runs")
    model, preset, task, step, total, best = map(info.get, SHOWN)
    yield f"{folder}: {model} ({preset}) {task}, step {step} of {total}"

    # checkpoints, read as --resume would; a run at work may drop one meanwhile
    for step in checkpoints(folder):
        size = sum(path.stat().st_size for path in pair(folder, step) if path.exists())
        told = "whole"
        try:
            read_checkpoint(folder, step)
        except Stop as e:
            told = str(e)
        if step in checkpoints(folder):
            yield f"  checkpoint of step {step}: {size / 1e6:.2f} MB, {told}"
    if best:
        yield "  best: {evaluation} {metric} {score:.2f} on {split}, step {step}".format(**best)

    # results, as eval.py wrote them; that of a figure may hold no number
    for path in sorted(folder.glob("eval-*.json")):
        try:
            metrics = json.loads(path.read_text())["metrics"].items()
            told = [f"{name} {x:.2f}" for name, x in metrics if x is not None] + ["no number"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            told = [f"damaged ({type(e).__name__}: {e})"]
        yield f"  {path.name}: {told[0]}"


def main(argv=None):
    parser = Parser(prog="python -m tools.runs", description=__doc__)
    parser.add_argument("out", type=Path, help="a run's directory, or that of one of its stages")
    out = parser.parse_args(argv).out

    # the lock of all stages, and of best/, is that of the run
    user = next(filter(None, map(user_of, (out, *out.resolve().parents[:2]))), "")
    state = f"in use by {user}" if user else "not in use"
    if not holds_run(out):
        raise Stop(f"tools.runs: {out}: no run here, {state}")
    stages = sorted(filter(holds_run, out.glob("stage-*")), key=lambda path: (len(path.name), path))
    for folder in stages or [out]:
        print(*inventory(folder), sep="\n")
    print(f"  {state}")


if __name__ == "__main__":
    main()
