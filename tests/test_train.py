"""train.py as a user calls it: every model, every task; exact resume; errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tools import shapes

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(p.stem for p in (ROOT / "models").glob("*.py"))
SMALL = ["--batch_size", "8", "--workers", "0", "--warmup_steps", "2", "--evals", "none", "--queue_size", "64",
         "--codewords", "16", "--vision_layers", "1", "--text_layers", "1"]


def pairs():
    return [(m, t) for m in MODELS for t in train.weights.load_module(m).TASKS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world in a directory of its own, in which the commands run."""
    here = tmp_path_factory.mktemp("user")
    shapes.ensure(here / "datasets" / "shapes", quiet=True, scale=0.05)
    return here


@pytest.fixture(autouse=True)
def inside(world, monkeypatch):
    monkeypatch.chdir(world)


def weights(path):
    return torch.load(Path(path) / "state.pt", weights_only=True)["model"]


@pytest.mark.parametrize("model,task", pairs())
def test_every_task_trains_a_few_steps_and_writes_its_run(model, task):
    out = f"out/{model}-{task}-few"
    train.main(["--model", model, "--task", task, "--steps", "2", "--log_every", "1", "--out", out,
                *small(model, task)])
    run = train.weights.find_run(out)
    assert {"config.json", "model.safetensors", "state.pt", "log.jsonl", "vocab.txt"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "config.json").read_text())["step"] == 2
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] == line["loss"] for line in lines)
    trained, _ = train.weights.load_run(run)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, weights(run)[name]), name


def small(model, task):
    """SMALL, as far as the model has these settings."""
    known = set(vars(train.weights.load_module(model).Config())) | set(vars(train.Loop()))
    return [x for flag, value in zip(SMALL[::2], SMALL[1::2]) if flag[2:] in known for x in (flag, value)]


@pytest.mark.parametrize("accum", ["1", "2"])
def test_resume_is_bit_for_bit(accum):
    command = ["--model", "codis", "--steps", "4", "--accum", accum, "--save_every", "2", *SMALL]
    train.main([*command, "--out", "out/whole"])
    # the same run, killed after step 3: its process dies without a chance to tidy up
    code = ("import os, train, models.codis as m\nold = m.Codis.after_step\n"
            "def after_step(self, step, *a):\n    old(self, step, *a)\n    step == 3 and os.kill(os.getpid(), 9)\n"
            f"m.Codis.after_step = after_step\ntrain.main({[*command, '--out', 'out/killed']!r})")
    done = subprocess.run([sys.executable, "-c", code],
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    train.main([*command, "--out", "out/killed", "--resume"])
    a, b = weights("out/whole"), weights("out/killed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in Path("out/killed/log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_resume_refuses_another_command():
    train.main(["--model", "codis", "--steps", "1", *SMALL, "--out", "out/other"])
    with pytest.raises(SystemExit, match="lr"):
        train.main(["--model", "codis", "--steps", "1", *SMALL, "--lr", "0.5", "--out", "out/other", "--resume"])


def test_init_lists_what_is_new_and_refuses_an_empty_backbone(capsys):
    train.main(["--model", "codis", "--steps", "1", *SMALL, "--out", "out/pre"])
    for task in ("retrieval", "vqa", "ve", "nlvr2"):
        train.main(["--model", "codis", "--task", task, "--init", "out/pre", "--steps", "1", *SMALL,
                    "--out", f"out/{task}"])
        assert "init from out/pre" in capsys.readouterr().out
    deeper = [x if x != "1" or SMALL[i - 1] != "--text_layers" else "2" for i, x in enumerate(SMALL)]
    with pytest.raises(SystemExit, match="backbone"):
        train.main(["--model", "codis", "--task", "ve", "--init", "out/pre", "--steps", "1", *deeper,
                    "--out", "out/deeper"])
    train.main(["--model", "codis", "--steps", "1", *SMALL, "--fusion_layers", "3", "--out", "out/three"])
    # not the lower half of a fusion encoder
    with pytest.raises(SystemExit, match="no place for fusion.*flags of size"):
        train.main(["--model", "codis", "--task", "vqa", "--init", "out/three", "--steps", "1", *SMALL,
                    "--out", "out/cut"])


@pytest.mark.parametrize("flags,words", [
    (["--model", "nope"], "nope"), (["--model", "codis", "--task", "nope"], "nope"),
    (["--model", "codis", "--data", "missing.json", "--vocab", "x"], "missing.json"),
    (["--model", "codis", "--lrr", "1"], "--lrr"),
    (["--model", "codis", "--batch_size", "7", "--accum", "2"], "batch_size"),
    (["--model", "codis", "--preset", "huge"], "huge"), (["--model", "codis", "--image_size", "64"], "--patch 24"),
    (["--model", "codis", "--init_text", "nothing.safetensors"], "nothing.safetensors"),
    (["--model", "codis", "--init", "nowhere"], "nowhere")])
def test_what_the_user_gets_wrong_is_one_line(flags, words):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode and len(lines) == 1 and words in lines[0], done.stderr


def test_help_lists_the_models_own_flags(capsys):
    with pytest.raises(SystemExit):
        train.main(["--model", "codis", "--help"])
    text = capsys.readouterr().out
    assert "--codewords" in text and "--warmup_steps" in text and "--init_vision" in text


def test_the_learning_rate_is_a_function_of_the_step():
    loop = train.Loop(lr=1e-4, warmup_lr=1e-5, warmup_steps=1000, min_lr=1e-5, schedule="cosine")
    values = [train.learning_rate(s, 30000, loop) for s in range(0, 30001, 100)]
    assert values[0] == pytest.approx(1e-5) and values[10] == pytest.approx(1e-4) and values[-1] == pytest.approx(1e-5)
    assert (all(a < b for a, b in zip(values[:10], values[1:11]))
            and all(a > b for a, b in zip(values[10:], values[11:])))
    half = train.Loop(lr=1.0, schedule="step", milestones="0.5,0.75")
    assert [train.learning_rate(s, 100, half) for s in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])


def test_two_processes_end_with_equal_queues_and_weights():
    code = ("import sys, os, torch, train\ntrain.torch.distributed\n"
            f"sys.argv = ['train.py'] + {['--model', 'codis', '--steps', '2', *SMALL, '--out', 'out/two']!r}\n"
            "end = train.train\n"
            "def train_(*a, **k):\n    raw, info = end(*a, **k)\n"
            "    torch.save(raw.state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n    return raw, info\n"
            "train.train = train_\ntrain.main()")
    Path("two.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", "two.py"],
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(f"rank{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (a["queue_ids"] >= 0).sum() == 16


# the others' tiny runs are not settled yet: the README says what was measured
@pytest.mark.parametrize("model", ["codis"])
def test_tiny_learns(model):
    """150 steps on 500 pictures: the right caption among the first ten of 2,500 at least four times as often as by
    chance, both ways."""
    train.main(["--model", model, "--steps", "150", "--evals", "none",
                "--out", f"out/{model}-learns", "--workers", "0"])
    train.evaluation.main([f"out/{model}-learns", "--task", "retrieval", "--split", "train", "--rerank_k", "0"])
    rows = json.loads(Path(f"out/{model}-learns/eval-retrieval.json").read_text())["rows"]
    chance, model_row = (next(r for r in rows if r["scores"] == s) for s in ("chance", "dual encoder"))
    for k in ("i2t_r10", "t2i_r10"):
        assert model_row[k] >= 4 * chance[k], rows
