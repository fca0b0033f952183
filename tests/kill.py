"""Kills trainings at random moments and compares what becomes of them with undisturbed ones.

    python -m tests.kill [FOLDER]           20 SIGKILLs, five models, one and two processes
    python -m tests.kill two [FOLDER]       every model and task by two processes, through torchrun
    python -m tests.kill agents [FOLDER]    two agents, as on two machines, whose workers are killed

Run by hand, from the repository's root; two of the cases are in tests/test_runs.py. The moments
follow from a seed: in training, inside a save, inside a validation or the closing evaluation.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools import weights

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.py"))

# two agents restart together only where each round has a store of its own: in the shared one torch
# finds the addresses of dead workers, and hangs or gives up
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
               "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TASK = {"codis": "ve", "conlip": "retrieval", "cookie": "retrieval", "imagebert": "retrieval",
        "mct": "retrieval_gru"}
SMALL = {"queue_size": 32, "codewords": 16, "vision_layers": 1, "text_layers": 1, "layers": 1,
         "fusion_layers": 1, "mim_layers": 1, "head_layers": 1}
STEPS = 8


@dataclass
class Case:
    model: str
    world: int
    seed: int


def small(model):
    """Flags of tiny sizes, as far as the model has them."""
    known, words = vars(weights.load_module(model).Config()), []
    for name, value in SMALL.items():
        if isinstance(known.get(name), int):
            words += [f"--{name}", str(value)]
    return words


def command(model, task, out, *more):
    """The flags of a training of a few steps."""
    return ["--model", model, "--task", task, *small(model), "--batch_size", "8", "--steps",
            str(STEPS), "--warmup_steps", "2", "--limit", "64", "--eval_limit", "16", "--log_every",
            "1", "--out", str(out), "--device", "cpu", *more]


def result(folder):
    """What must be equal -> (the bytes of the weights, the numbers of the log but the speed)."""
    folder = weights.find_run(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("samples_per_s", None)
    return (folder / "model.safetensors").read_bytes(), lines


# --------------------------------------------------------------------------------------------------
# Kills

def spawn(words, folder):
    """A program, whose words go to said.txt."""
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(words, env=ENVIRONMENT, cwd=folder, stdout=said, stderr=said)


def start(world, words, folder):
    """A training, as a user starts it."""
    program = [sys.executable]
    if world > 1:
        program = [*TORCHRUN, "--standalone", "--nproc_per_node", str(world)]
    return spawn([*program, str(ROOT / "train.py"), *words], folder)


def moment_of(out, kind):
    """Is the run at a moment of this kind?"""
    if kind == "save":
        return any(out.rglob("*.tmp"))
    if kind == "evaluation":
        log = out / "log.jsonl"
        return log.exists() and log.read_text().count("\n") >= STEPS
    return (out / "log.jsonl").exists()


def kill_at(process, out, kind, rng):
    """SIGKILL to all its processes at a random moment of this kind -> was it still alive?"""
    deadline, delay = time.monotonic() + 300, rng.uniform(0, 1.5 if kind == "training" else 0.02)
    while process.poll() is None and not moment_of(out, kind):
        assert time.monotonic() < deadline, f"{out}: no {kind}"
        time.sleep(0.0005)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        own = getattr(process, "pids", [process.pid])
        below = [child for pid in own for child in descendants(pid)]
        for pid in [*own, *below]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    return alive


def descendants(pid):
    """The processes below one, by ps."""
    text = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    below = {}
    for line in text.splitlines():
        child, parent = map(int, line.split())
        below.setdefault(parent, []).append(child)
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in below.get(parent, [])]
        found += new
    return found


def finish(process, folder):
    assert process.wait() == 0, (folder / "said.txt").read_text()[-3000:]


def try_case(case, folder, kills, start=start):
    """Kills a run `kills` times, each at a moment of another kind -> a row of the table."""
    rng, model, world = random.Random(case.seed), case.model, case.world
    folder = Path(folder) / f"{model}-{world}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("--save_every", "2", "--eval_every", "3", "--workers", str(case.seed % 2))
    finish(start(world, command(model, TASK[model], folder / "whole", *flags), folder), folder)

    # kinds of moments: which of them comes first is chance
    words = command(model, TASK[model], folder / "cut", *flags, "--resume")
    kinds, happened = ["save", "training", "evaluation", "save"], []
    offset = rng.randrange(len(kinds))
    for n in range(10 * kills):
        if len(happened) == kills:
            break
        kind = kinds[(n + offset) % len(kinds)]
        if kill_at(start(world, words, folder), folder / "cut", kind, rng):
            happened.append(kind)
        else:                                           # it ended first: once more from the start
            shutil.rmtree(folder / "cut")
            happened = []
    finish(start(world, words, folder), folder)
    return {"model": model, "task": TASK[model], "processes": world,
            "loader workers": case.seed % 2, "kills": len(happened), "moments": " ".join(happened),
            "equal": result(folder / "whole") == result(folder / "cut")}


def kill_all(folder):
    """Ten cases, two kills each."""
    rows = []
    for n, model in enumerate(MODELS):
        for world in (1, 2):
            rows.append(try_case(Case(model, world, seed=7 * n + world), folder, kills=2))
            print(rows[-1], flush=True)
    equal = sum(row["equal"] for row in rows)
    print(f"{sum(row['kills'] for row in rows)} kills, {equal} of {len(rows)} runs bit-equal")


# --------------------------------------------------------------------------------------------------
# Two processes, and two machines

DRIVER = """
import json, os, sys
import torch.distributed as dist
import train
dist.init_process_group("gloo")
real, dist.destroy_process_group = dist.destroy_process_group, lambda: None
done = {}
for key, words in json.loads(sys.argv[1]):
    try:
        train.main(words)
        done[" ".join(key)] = "ok"
    except (Exception, SystemExit) as e:
        done[" ".join(key)] = f"{type(e).__name__}: {e}"
        break
if os.environ["RANK"] == "0":
    open("done.json", "w").write(json.dumps(done))
real()
"""


def run_two(cases, folder):
    """Each (model, task) by two processes, all under one torchrun -> {case: "ok" or its error}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    jobs = []
    for model, task in cases:
        words = command(model, task, folder / f"{model}-{task}", "--steps", "2", "--workers", "0",
                        "--evals", "none")
        jobs.append(((model, task), words))
    words = ["--standalone", "--nproc_per_node", "2", "driver.py", json.dumps(jobs)]
    finish(spawn([*TORCHRUN, *words], folder), folder)
    done = json.loads((folder / "done.json").read_text())
    return {case: done.get(" ".join(case), "not reached") for case in cases}


def all_tasks(folder):
    """Every task of every model by two processes."""
    for model in MODELS:
        cases = [(model, task) for task in weights.load_module(model).TASKS]
        done = run_two(cases, Path(folder) / model)
        print(done, flush=True)
        assert set(done.values()) == {"ok"}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def two_agents(folder, model="codis", kills=2):
    """torchrun of two nodes as two agents of this machine; a worker is killed, torchrun restarts
    all, and --resume goes on -> were the results equal?"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("--save_every", "2", "--workers", "0", "--evals", "none", "--resume")

    def agents(out):
        words = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
                 "--rdzv_endpoint", f"localhost:{port}", "--max_restarts", "3",
                 str(ROOT / "train.py"), *command(model, TASK[model], out, *flags)]
        return [spawn(words, folder) for _ in range(2)]

    port = free_port()
    for process in agents(folder / "whole"):
        finish(process, folder)

    # a worker is the only child of an agent; it dies once a checkpoint stands
    processes, died = agents(folder / "cut"), 0
    while died < kills:
        steps = [int(p.stem.split("-")[1]) for p in (folder / "cut").glob("state-*.pt")]
        below = [pid for process in processes for pid in descendants(process.pid)]
        if steps and max(steps) >= 2 * (died + 1) and below:
            os.kill(below[died % len(below)], signal.SIGKILL)
            died += 1
        time.sleep(0.05)
        assert any(process.poll() is None for process in processes), "ended too early"
    for process in processes:
        finish(process, folder)
    equal = result(folder / "whole") == result(folder / "cut")
    print({"agents": 2, "kills": died, "equal": equal})
    return equal


if __name__ == "__main__":
    what = {"two": all_tasks, "agents": two_agents}.get((sys.argv + [""])[1], kill_all)
    place = Path(sys.argv[-1]) if len(sys.argv) > (2 if what is not kill_all else 1) else None
    with tempfile.TemporaryDirectory() as scratch:
        what(place or Path(scratch))
