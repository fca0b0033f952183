"""Runs under a hard user's hands: nothing is deleted by a command that fails, no checkpoint holds
NaN, a killed run goes on bit for bit, whatever killed it."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import traceback

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import data
import eval as evaluation
import train
from models import imagebert
from tests import kill
from tools import runs

REAL = imagebert.ImageBert.forward


@pytest.fixture(scope="module")
def here(squares, tmp_path_factory):
    """A folder with an undisturbed run of six steps, and records with the splits train and val."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in squares.pairs.read_text().splitlines()]
    for row in rows:
        row["split"] = "val" if row["image_id"] < 6 else "train"
        row["image"] = str(squares.root / row["image"])
    (folder / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(squares.imagebert(folder / "whole", *OFTEN))
    return folder


OFTEN = ("--steps", 6, "--save_every", 1, "--log_every", 1, "--schedule", "constant")


@pytest.fixture
def run(squares, here, tmp_path):
    """run(folder, *flags): six steps of the tiny ImageBERT, a checkpoint a step."""
    def start(out, *flags):
        return train.main(squares.imagebert(tmp_path / out, *OFTEN, *flags))
    return start


@pytest.fixture
def copy(here, tmp_path):
    """A copy of the undisturbed run, to be damaged."""
    shutil.copytree(here / "whole", tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    """{name: bytes} of all files of a run but its lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"}


def refused(words, call, *args):
    """The call must end in one line that holds all the words."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    message = str(error.value)
    words = [words] if isinstance(words, str) else words
    assert "\n" not in message and all(word in message for word in words), message
    return message


def disturb(monkeypatch, step, action):
    """action(result) in the forward pass of step number `step`, counted from the next one on."""
    seen = []

    def forward(self, batch):
        out = REAL(self, batch)
        seen.append(0)
        return action(out) if len(seen) == step else out
    monkeypatch.setattr(imagebert.ImageBert, "forward", forward)


def die(*_):
    raise KeyboardInterrupt


def equal_runs(a, b):
    """The same weights bit for bit, and the same numbers in the log."""
    assert kill.result(a) == kill.result(b)


# --------------------------------------------------------------------------------------------------
# A command that fails deletes nothing

def test_a_directory_with_a_run_is_refused(run, copy):
    before = contents(copy)
    words = [f"{copy} holds a run", "--resume", "another --out", "--overwrite"]
    for flags in ((), ("--batch_size", 300), ("--steps", 7), ("--task", "retrieval")):
        refused(words, run, "run", *flags)
    refused("--overwrite replaces it: not both", run, "run", "--resume", "--overwrite")

    # what is left of a run is one too: its weights alone, a stage of it, a state of older versions
    for left in ("model.safetensors", "stage-1/state-3.pt", "state.pt"):
        folder = copy.parent / left.replace("/", "-")
        (folder / left).parent.mkdir(parents=True)
        (folder / left).write_text("x")
        refused("holds a run", run, folder.name)
    refused(["no state-STEP.pt", "--init", "--overwrite"], run, "state.pt", "--resume")
    assert contents(copy) == before


@pytest.mark.parametrize("flags, words", [
    (("--batch_size", 300), "fewer than one global batch"),
    (("--accum", 3), "not a multiple of 1 processes x 3"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl"), (("--width", 15), "--width 15"),
    (("--task", "retrieval", "--batch_size", 2, "--ce", 1), "pairs in a forward pass"),
    (("--regions", "nowhere"), "nowhere"), (("--init_text", "nowhere.bin"), "nowhere.bin"),
    (("--eval_every", 1, "--eval_data", "later.jsonl"), "later.jsonl")], ids=str)
def test_overwrite_deletes_nothing_where_the_command_fails(flags, words, run, copy):
    """Whatever it is that fails, the model's refusal of the first batch among them."""
    before = contents(copy)
    refused(words, run, "run", "--overwrite", *flags)
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["run"]


def test_overwrite_replaces_the_run_with_its_first_checkpoint(run, copy, monkeypatch):
    (copy / "eval-retrieval.json").write_text("{}")
    (copy / "best").mkdir()
    before = contents(copy)

    # until then the old run stands, and is whole: here the new one dies with its third batch
    disturb(monkeypatch, 3, lambda out: die() if contents(copy) == before else out)
    with pytest.raises(KeyboardInterrupt):
        run("run", "--overwrite", "--seed", 1, "--save_every", 3, "--schedule", "cosine")
    assert contents(copy) == before

    # afterwards nothing of it is left
    monkeypatch.setattr(imagebert.ImageBert, "forward", REAL)
    run("run", "--overwrite", "--seed", 1, "--steps", 2)
    left = {"config.json", "log.jsonl", "vocab.txt", "model.safetensors", "model-1.safetensors",
            "model-2.safetensors", "state-1.pt", "state-2.pt"}
    assert set(contents(copy)) == left
    assert json.loads((copy / "config.json").read_text())["loop"]["seed"] == 1
    assert [path.name for path in copy.parent.iterdir()] == ["run"]


def test_overwrite_killed_between_its_two_renames(run, copy, here):
    """The new run had its first checkpoint: it is the one that goes on."""
    aside = copy.with_name("run.overwriting")
    copy.rename(aside)
    shutil.copytree(aside, copy.with_name("run.overwritten"))
    run("run", "--resume")
    equal_runs(copy, here / "whole")
    assert [path.name for path in copy.parent.iterdir()] == ["run"]

    # killed earlier: what it had is no run, and goes with the next command
    aside.mkdir()
    (aside / "log.jsonl").write_text("")
    run("run", "--resume")
    assert [path.name for path in copy.parent.iterdir()] == ["run"]


def test_overwrite_that_cannot_rename_leaves_the_old_run(run, copy, monkeypatch):
    before, replace = contents(copy), os.replace

    def fail(source, target):
        if str(source).endswith(".overwriting"):
            raise OSError("no second name")
        replace(source, target)
    monkeypatch.setattr(os, "replace", fail)
    refused("no second name", run, "run", "--overwrite")
    assert contents(copy) == before

    # killed there, with no new run to take its place, it comes back
    monkeypatch.setattr(os, "replace", replace)
    copy.rename(copy.with_name("run.overwritten"))
    refused("holds a run", run, "run")
    assert contents(copy) == before


def test_a_run_that_died_without_a_checkpoint_is_no_run(run, tmp_path, monkeypatch):
    disturb(monkeypatch, 2, die)
    with pytest.raises(KeyboardInterrupt):
        run("dead", "--save_every", 0)
    assert "config.json" not in contents(tmp_path / "dead")
    run("dead", "--steps", 1)
    assert len((tmp_path / "dead" / "log.jsonl").read_text().splitlines()) == 1


def test_overwrite_under_restarts_is_refused(run, copy, monkeypatch):
    """A restarted worker runs the same command: it would replace what it should go on with."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    refused(["--overwrite", "--max_restarts", "--resume"], run, "run", "--overwrite")
    refused("holds a run", run, "run")
    run("run", "--resume")


def test_directories_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["file/x", "cannot be written"], run, "file/x")
    refused(["/proc/x", "cannot be written"], run, "/proc/x")


def test_space_for_three_checkpoints_is_checked(run, copy, tmp_path, monkeypatch):
    size = sum((copy / f"{kind}-6.{end}").stat().st_size
               for kind, end in (("model", "safetensors"), ("state", "pt")))
    real, free = shutil.disk_usage(tmp_path), size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=free))
    refused(["new", "GB are free", "GB need"], run, "new")
    run("run", "--resume")                              # two are there: there is room for one more
    free = 3 * size
    run("new", "--steps", 1)


# --------------------------------------------------------------------------------------------------
# A checkpoint is never poisoned

def bad_loss(out):
    return {**out, "loss": out["loss"] * float("nan")}


def bad_gradient(out):
    """A finite loss whose gradient is not: 0 * the derivative of sqrt at 0, which is inf."""
    return {**out, "loss": out["loss"] + (out["loss"] * 0).sqrt()}


@pytest.mark.parametrize("action, flags, words", [
    (bad_loss, (), ["not finite at step 3", "loss nan", "mlm "]),
    (bad_loss, ("--accum", 2), ["not finite at step 2", "loss nan"]),
    (bad_loss, ("--log_every", 4, "--save_every", 0), ["not finite at step 3", "no checkpoint"]),
    (bad_gradient, ("--clip", 1), ["not finite at step 3", "gradient norm nan", "loss 7"]),
    (bad_gradient, ("--clip", 0), ["not finite after step 3", "weights"])], ids=str)
def test_nothing_that_is_not_finite_is_saved(action, flags, words, run, tmp_path, monkeypatch):
    """The first bad step is named, wherever it is noticed, and the checkpoint before it stands."""
    disturb(monkeypatch, 3, action)
    message = refused(words, run, "run", *flags)
    out = tmp_path / "run"
    steps = runs.checkpoints(out)
    last = 0 if "no checkpoint" in message else 1 if "--accum" in flags else 2
    assert steps == [2, 1][2 - last:]
    for step in steps:
        held = load_file(out / f"model-{step}.safetensors")
        assert all(t.isfinite().all() for t in held.values() if t.is_floating_point())
    for line in (out / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["step"] <= 3


def test_what_becomes_inf_in_the_optimizer_is_not_saved(run, tmp_path, monkeypatch):
    """A gradient whose square overflows leaves the weights finite, and its moment inf for good."""
    def huge(out):
        return {**out, "loss": out["loss"] * 1e25}
    disturb(monkeypatch, 3, huge)
    refused(["moments are not finite after step 3", "step 2", "is whole"], run, "run", "--clip", 0)


def test_an_overflow_that_the_scaler_skips_is_no_error(run, tmp_path, monkeypatch):
    def overflow(out):
        return {**out, "loss": out["loss"] * 1e36}      # times the scale: inf
    disturb(monkeypatch, 2, overflow)
    run("run", "--amp", "fp16", "--clip", 1, "--evals", "none")
    assert runs.checkpoints(tmp_path / "run") == [6, 5]
    disturb(monkeypatch, 2, bad_loss)
    refused("not finite at step 2", run, "other", "--amp", "fp16", "--clip", 1)


def test_the_watch_never_waits_for_the_device():
    """On the meta device, where any question for a value is an error."""
    watch, number = runs.Watch("meta"), torch.zeros((), device="meta")
    for step in range(3):
        watch.see(step, number, {"mlm": number}, number)
    with pytest.raises(RuntimeError):
        watch.trouble()


def test_the_watch_keeps_the_first_bad_step():
    watch, one, bad = runs.Watch("cpu"), torch.tensor(1.0), torch.tensor(float("inf"))
    watch.see(1, one, {"a": one}, None)
    assert watch.trouble() == ""
    watch.see(2, one, {"a": bad}, bad)                  # a log alone is no reason to stop
    watch.see(3, bad, {"b": bad}, one)
    assert watch.trouble() == ("train.py: not finite at step 2: loss 1, a inf, gradient norm inf, "
                               "b inf")


# --------------------------------------------------------------------------------------------------
# The last two checkpoints

def test_the_last_two_are_kept_and_weights_are_written_once(copy):
    assert runs.checkpoints(copy) == [6, 5]
    for step in (6, 5):
        with safe_open(copy / f"model-{step}.safetensors", "pt") as file:
            assert file.metadata()["step"] == str(step)
        state = torch.load(copy / f"state-{step}.pt", weights_only=True)
        assert set(state) == {"step", "optimizer", "scaler", "rng", "best"}
        assert state["step"] == step
    same = (copy / "model.safetensors").read_bytes()
    assert same == (copy / "model-6.safetensors").read_bytes()


def test_model_safetensors_is_a_second_name_or_a_copy(here, run, tmp_path, monkeypatch):
    whole = here / "whole"
    assert (whole / "model.safetensors").samefile(whole / "model-6.safetensors")

    def no_links(*_):
        raise OSError("this file system has no links")
    monkeypatch.setattr(os, "link", no_links)
    run("run")
    assert not (tmp_path / "run/model.safetensors").samefile(tmp_path / "run/model-6.safetensors")
    equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("minutes, every, steps", [(1, 0, [4, 6]), (0, 0, [6]), (1, 3, [3, 6])])
def test_checkpoints_by_time(minutes, every, steps, run, monkeypatch):
    """At log lines, a minute or more after the last one; a step takes 25 seconds here."""
    now, saved, save = [0.0], [], runs.save
    disturb(monkeypatch, 0, None)
    seconds = 25

    class Clock:
        monotonic = staticmethod(lambda: now[0])
        time, perf_counter = train.time.time, train.time.perf_counter

    def forward(self, batch):
        now[0] += seconds
        return REAL(self, batch)

    def counted(run, step):
        saved.append(step)
        save(run, step)
    monkeypatch.setattr(imagebert.ImageBert, "forward", forward)
    for module in (train, runs):
        monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(runs, "save", counted)
    run("run", "--save_minutes", minutes, "--save_every", every, "--log_every", 2)
    assert saved == steps


def damage_state(out):
    path = out / "state-6.pt"
    path.write_bytes(path.read_bytes()[:-2000])


def empty_state(out):
    (out / "state-6.pt").write_bytes(b"")


def damage_weights(out):
    data = (out / "model-6.safetensors").read_bytes()
    (out / "model-6.safetensors").unlink()
    (out / "model-6.safetensors").write_bytes(data[:-1])


def lose_weights(out):
    (out / "model-6.safetensors").unlink()


def mix_steps(out):
    (out / "model-6.safetensors").unlink()
    shutil.copy(out / "model-5.safetensors", out / "model-6.safetensors")


def foreign_state(out):
    torch.save({"weights": 1}, out / "state-6.pt")


@pytest.mark.parametrize("how, word", [
    (damage_state, "state-6.pt: damaged"), (empty_state, "state-6.pt: damaged"),
    (damage_weights, "model-6.safetensors"), (lose_weights, "model-6.safetensors: no such file"),
    (mix_steps, "weights of step 5, state of step 6"), (foreign_state, "state-6.pt: damaged")])
def test_a_torn_checkpoint_falls_back_to_the_one_before(how, word, run, copy, here, capsys):
    how(copy)
    (copy / "model-7.safetensors.tmp").write_text("left")
    run("run", "--resume")
    said = capsys.readouterr().out
    assert word in said and "going back to the checkpoint of step 5" in said
    equal_runs(copy, here / "whole")
    assert runs.checkpoints(copy) == [6, 5] and not list(copy.glob("*.tmp"))


def test_going_back_leaves_nothing_newer(copy):
    """Else the next resume would find the torn one again, and would keep it for one of two."""
    runs.tidy(copy, 5, ["state-6.pt is torn"])
    assert runs.checkpoints(copy) == [5] and not (copy / "model-6.safetensors").exists()
    assert (copy / "model.safetensors").samefile(copy / "model-5.safetensors")
    assert len((copy / "log.jsonl").read_text().splitlines()) == 5


def test_where_none_can_be_read_one_line_says_so(run, copy):
    for path in copy.glob("state-*.pt"):
        path.write_bytes(b"PK")
    before = contents(copy)
    refused(["no checkpoint can be read", "state-6.pt", "state-5.pt"], run, "run", "--resume")
    assert contents(copy) == before


def test_killed_at_any_moment_of_a_save(squares, here, tmp_path, monkeypatch):
    """Before and after each rename and each deletion of two checkpoints: the run goes on, bit for
    bit, and eval.py's file is there."""
    real = {name: getattr(os, name) for name in ("replace", "link")}
    command = squares.imagebert(tmp_path / "run", *OFTEN)
    command[command.index("--save_every") + 1] = "2"
    for moment in range(40):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        calls = []

        def deadly(name):
            def call(*args):
                calls.append(name)
                if len(calls) == moment + 1:
                    raise KeyboardInterrupt
                return real[name](*args)
            return call
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, deadly(name))
            try:
                train.main(command)
            except KeyboardInterrupt:
                pass
            else:
                break
        if "config.json" in contents(tmp_path / "run") and runs.checkpoints(tmp_path / "run"):
            name = tmp_path / "run" / "model.safetensors"
            assert name.exists() or runs.checkpoints(tmp_path / "run") == [2]
        train.main([*command, "--resume"])
        equal_runs(tmp_path / "run", here / "whole")
    assert moment > 12


# --------------------------------------------------------------------------------------------------
# Signals

@pytest.fixture
def heard():
    """Signals as in a terminal: what a shell starts in the background is deaf to some."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_stops_after_the_step(name, run, here, heard, tmp_path, monkeypatch,
                                                 capsys):
    number = getattr(signal, name)
    handler = signal.getsignal(number)

    def send(out):
        os.kill(os.getpid(), number)
        return out
    disturb(monkeypatch, 3, send)
    with pytest.raises(SystemExit) as error:
        run("run", "--save_every", 0, "--log_every", 20)
    said = capsys.readouterr().err
    assert error.value.code == runs.GO_ON == 75
    assert f"stopped at step 3 of 6 by {name}" in said and "--resume goes on" in said
    assert runs.checkpoints(tmp_path / "run") == [3]
    assert signal.getsignal(number) is handler
    run("run", "--resume")
    assert kill.result(tmp_path / "run")[0] == kill.result(here / "whole")[0]


def test_a_second_ctrl_c_stops_at_once(run, heard, tmp_path, monkeypatch):
    def twice(out):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)            # no second Ctrl-C: no haste
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")
    disturb(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run("run")
    assert runs.checkpoints(tmp_path / "run") == [2, 1]


def test_what_nohup_ignores_stays_ignored(run, tmp_path, monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    disturb(monkeypatch, 2, lambda out: os.kill(os.getpid(), signal.SIGHUP) or out)
    run("run")
    signal.signal(signal.SIGHUP, old)
    assert runs.checkpoints(tmp_path / "run") == [6, 5]


# --------------------------------------------------------------------------------------------------
# One run per directory

def test_a_second_run_in_the_same_directory_is_refused(run, copy):
    before = contents(copy)
    with runs.Place(copy, True, False):
        for flags in ((), ("--resume",), ("--overwrite",)):
            refused([f"{copy} is in use by process {os.getpid()}", "--out"], run, "run", *flags)
    assert contents(copy) == before
    run("run", "--resume")


def test_the_lock_dies_with_its_process(tmp_path):
    """Even while a forked child, as loader workers are, outlives it."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        runs.lock(tmp_path)
        child = os.fork()
        if child:
            os.write(writing, str(child).encode())
        signal.pause()
    child = int(os.read(reading, 20))
    try:
        refused(f"is in use by process {holder} on", runs.lock, tmp_path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(child, 0)                               # it lives
        runs.lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_loader_workers_leave_the_trainers_group(tmp_path):
    """A signal to the group, as torchrun and a terminal send it, must not kill them: the run could
    not finish its step."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(data.one_thread, (0,))
        assert pool.apply(os.getpgrp) == pool.apply(os.getpid) != os.getpgrp()


# --------------------------------------------------------------------------------------------------
# Resume

def test_resume_is_safe_to_give_always(run, here, tmp_path, capsys):
    run("run", "--resume")
    assert f"nothing to resume in {tmp_path / 'run'}: starting at step 0" in capsys.readouterr().out
    before = contents(tmp_path / "run")
    run("run", "--resume")
    assert "at step 6: it is finished" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
    equal_runs(tmp_path / "run", here / "whole")


def changed(lines, how):
    rows = [json.loads(line) for line in lines]
    if how == "order":
        rows[10], rows[11] = rows[11], rows[10]
    if how == "count":
        rows.pop()
    if how == "caption":
        rows[15]["caption"][0] += " and"
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("how", ["order", "count", "caption"])
def test_resume_refuses_other_records_of_the_same_name(how, squares, here, run, tmp_path):
    path = tmp_path / "mine.jsonl"
    text = (here / "parts.jsonl").read_text()
    path.write_text(text)
    run("run", "--data", path, "--steps", 1)
    path.write_text(changed(text.splitlines(), how))
    refused(["--resume", "other records", "records"], run, "run", "--data", path, "--resume")
    path.write_text(text)
    run("run", "--data", path, "--resume")


def test_resume_refuses_another_vocabulary(squares, run, copy, tmp_path, capsys):
    words = squares.vocab.read_text().split()
    words[6], words[7] = words[7], words[6]
    (tmp_path / "other.txt").write_text("\n".join(words) + "\n")
    refused("other vocabulary", run, "run", "--vocab", tmp_path / "other.txt", "--resume")

    # the same words in another file are the same; the run's copy comes back where it is lost
    shutil.copy(squares.vocab, tmp_path / "same.txt")
    (copy / "vocab.txt").unlink()
    run("run", "--vocab", tmp_path / "same.txt", "--resume")
    assert "vocab.txt was missing or another one" in capsys.readouterr().out
    assert (copy / "vocab.txt").read_bytes() == squares.vocab.read_bytes()
    refused("vocab", run, "run", "--vocab", tmp_path / "nowhere.txt", "--resume")


def test_steps_may_be_raised_where_the_schedule_allows_it(run, squares, here, tmp_path, capsys):
    run("run", "--steps", 4)
    run("run", "--steps", 6, "--resume")
    assert "6 steps instead of 4; the learning rates so far are the same" in capsys.readouterr().out
    equal_runs(tmp_path / "run", here / "whole")
    refused(["step 6", "steps 6", "this command says 3"], run, "run", "--steps", 3, "--resume")

    # --epochs likewise: three steps make one
    words = squares.imagebert(tmp_path / "epochs", *OFTEN)
    for _ in range(2):
        at = words.index("--steps")
        del words[at:at + 2]
    train.main([*words, "--epochs", "1"])
    train.main([*words, "--epochs", "2", "--resume"])
    assert kill.result(tmp_path / "epochs")[0] == kill.result(here / "whole")[0]

    # a cosine would have begun otherwise, unless it has not begun
    flags = ("--schedule", "cosine", "--warmup_steps", 0)
    run("cosine", "--steps", 4, *flags)
    refused(["steps 4", "cosine", "step 1"], run, "cosine", "--steps", 6, *flags, "--resume")
    flags = ("--schedule", "cosine", "--warmup_steps", 4)
    run("warm", "--steps", 4, *flags)
    run("warm", "--steps", 6, *flags, "--resume")
    run("at_once", "--steps", 6, *flags)
    equal_runs(tmp_path / "warm", tmp_path / "at_once")


@pytest.mark.parametrize("flags, words", [
    (("--lr", 0.5), "lr 0.001, this command says 0.5"), (("--moc", 0), "moc 1.0"),
    (("--batch_size", 4), "batch_size 8"), (("--task", "retrieval"), "holds task pretrain")])
def test_resume_names_the_field_that_differs(flags, words, run, copy):
    before = contents(copy)
    refused(["--resume", *words.split(", ")], run, "run", "--resume", *flags)
    assert contents(copy) == before


def test_settings_that_change_no_number_may_differ(run, copy, here):
    run("run", "--resume", "--log_every", 3, "--save_minutes", 1, "--save_every", 0,
        "--eval_every", 0, "--evals", "masked", "--eval_split", "train", "--eval_limit", 4)
    assert kill.result(copy)[0] == kill.result(here / "whole")[0]


def test_another_number_of_processes_is_refused(run, copy):
    for step in (5, 6):
        path = copy / f"state-{step}.pt"
        state = torch.load(path, weights_only=True)
        torch.save({**state, "rng": state["rng"] * 2}, path)
    refused(["2 processes", "these are 1"], run, "run", "--resume")


@pytest.mark.parametrize("name, text, words", [
    ("config.json", '{"model": ', "config.json: damaged"), ("config.json", "[]", "damaged"),
    ("config.json", "{}", "damaged"), ("config.json", None, "config.json: damaged"),
    ("log.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n', "log.jsonl:2: not a line of a log"),
    ("log.jsonl", '3\n{"step": 3}\n', "log.jsonl:1: not a line")])
def test_damaged_files_of_a_run_are_one_line(name, text, words, run, copy):
    (copy / name).unlink()
    if text is not None:
        (copy / name).write_text(text)
    refused(words, run, "run", "--resume")


def test_a_log_that_was_cut_off_loses_its_last_line(run, copy, here, capsys):
    lose_weights(copy)
    log = (copy / "log.jsonl").read_text()
    (copy / "log.jsonl").write_text(log[:-20])
    run("run", "--resume")
    assert "log.jsonl:6: cut off in the middle, dropped" in capsys.readouterr().out
    equal_runs(copy, here / "whole")


# --------------------------------------------------------------------------------------------------
# Full disks

@pytest.fixture
def small_files():
    """small_files(n): until the test ends (conftest.py) no file may be larger than n bytes, as on a
    full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    return lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, most))


@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_whole(kind, run, here, tmp_path,
                                                               small_files, monkeypatch):
    whole = here / "whole"
    sizes = {"model": (whole / "model-6.safetensors").stat().st_size,
             "state": (whole / "state-6.pt").stat().st_size}
    assert sizes["model"] < sizes["state"]

    def full(out):
        small_files(sizes[kind] - 1000)
        return out
    disturb(monkeypatch, 3, full)
    message = refused(["checkpoint of step 3 cannot be written", f"run/{kind}-3", "File too large",
                       "the checkpoint of step 2", "is whole"], run, "run")
    small_files(sizes["state"] * 10)
    assert not list((tmp_path / "run").glob("*.tmp")), message
    run("run", "--resume")
    equal_runs(tmp_path / "run", whole)


def test_a_log_that_cannot_be_written_is_one_line(run, tmp_path, small_files, monkeypatch):
    disturb(monkeypatch, 3, lambda out: small_files(300) or out)
    refused(["log.jsonl: File too large", "checkpoint of step 2"], run, "run")


def test_a_full_disk_in_overwrite_leaves_the_old_run(run, copy, small_files):
    before = contents(copy)
    small_files(len(before["state-6.pt"]) - 1000)
    refused(["state-1.pt", "File too large", "no checkpoint of this run"], run, "run",
            "--overwrite")
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["run"]


# --------------------------------------------------------------------------------------------------
# Validation while training

def validated(out):
    """The lines of validations in a log -> {step: the numbers}."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "split" in line}


def test_validation_disturbs_nothing(run, here, tmp_path, capsys, monkeypatch):
    data_of = ("--data", here / "parts.jsonl", "--eval_every", 2)
    run("plain", "--data", here / "parts.jsonl")
    capsys.readouterr()
    run("seen", *data_of)
    said = capsys.readouterr().out
    seen, plain = tmp_path / "seen", tmp_path / "plain"
    assert kill.result(seen)[0] == kill.result(plain)[0]
    assert "val (at most 100 records): retrieval mean" in said and "chance" not in said
    assert not list(seen.glob("eval-*.json"))

    # what it measured, and the best of it, in a directory that eval.py and --init take
    found = validated(seen)
    assert list(found) == [0, 2, 4, 6]
    means = {step: found[step]["retrieval"]["mean"] for step in (2, 4, 6)}
    best = max(means, key=lambda step: (means[step], -step))
    info = json.loads((seen / "best" / "config.json").read_text())
    assert info["step"] == best and info["best"]["score"] == means[best]
    assert f"Best while training: retrieval mean {means[best]:.1f} on val" in said
    assert f"step {best}: {seen}/best" in said
    again = evaluation.main([str(seen / "best"), "--task", "retrieval", "--split", "val"])
    assert again["retrieval"]["metrics"] == found[best]["retrieval"]

    # killed at any step, it goes on with the same numbers and the same best
    for step in (3, 4, 6):
        disturb(monkeypatch, step, die)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            run("cut", *data_of)
        monkeypatch.setattr(imagebert.ImageBert, "forward", REAL)
        run("cut", *data_of, "--resume")
        equal_runs(tmp_path / "cut", seen)
        assert ((tmp_path / "cut/best/model.safetensors").read_bytes()
                == (seen / "best/model.safetensors").read_bytes())
        assert json.loads((tmp_path / "cut/config.json").read_text())["best"] == info["best"]


def test_the_best_is_remembered_over_a_stop(run, here, tmp_path, monkeypatch):
    """By its score: a worse one after the stop does not replace it."""
    scores = iter([0.0, 9.0, 5.0, 7.0, 8.0])

    def evaluate(model, info, name, options, *_, **__):
        assert options == {"split": "val", "limit": 3} and "path" not in info
        return {"metrics": {"first": 1.0, "mean": next(scores)}}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    flags = ("--data", here / "parts.jsonl", "--eval_every", 1, "--eval_limit", 3)
    monkeypatch.setattr(evaluation, "offered", lambda *_: ["retrieval"])
    run("run", *flags, "--steps", 2)
    run("run", *flags, "--steps", 4, "--resume")
    assert json.loads((tmp_path / "run/config.json").read_text())["best"]["step"] == 1
    with safe_open(tmp_path / "run/best/model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "1"


# --------------------------------------------------------------------------------------------------
# What a directory holds: python -m tools.runs

def shown(capsys, out):
    """What the command prints, as it names the directory."""
    runs.main([str(out)])
    return capsys.readouterr().out.replace(str(out), "OUT").splitlines()


def test_the_command_shows_what_a_directory_holds(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    best = {"step": 5, "evaluation": "retrieval", "metric": "mean", "score": 1.239, "split": "val"}
    (copy / "config.json").write_text(json.dumps({**config, "best": best}))
    (copy / "eval-a.json").write_text('{"metrics": {"mean": 2.345, "sum": 3}}')
    (copy / "eval-b.json").write_text('{"metrics": {"growth": null}}')
    (copy / "eval-c.json").write_text('{"metr')
    damage_state(copy)
    before = contents(copy)
    sizes = {step: sum(path.stat().st_size for path in runs.pair(copy, step)) for step in (5, 6)}
    lines = shown(capsys, copy)
    damage = lines.pop(1)
    size = f"{sizes[6] / 1e6:.2f} MB"
    assert damage.startswith(f"  checkpoint of step 6: {size}, OUT/state-6.pt: damaged (")
    assert lines[-2].startswith("  eval-c.json: damaged (")
    assert lines[:-2] + lines[-1:] == [
        "OUT: imagebert (tiny) pretrain, step 6 of 6",
        f"  checkpoint of step 5: {sizes[5] / 1e6:.2f} MB, whole",
        "  best: retrieval mean 1.24 on val, step 5", "  eval-a.json: mean 2.35",
        "  eval-b.json: no number", "  not in use"]

    # it asks for the lock, and neither takes nor changes it
    with runs.Place(copy, True, False):
        assert shown(capsys, copy)[-1].startswith(f"  in use by process {os.getpid()} on ")
    assert contents(copy) == before

    # whole weights of another step are none of this checkpoint
    mix_steps(copy)
    shutil.copy(copy / "state-5.pt", copy / "state-6.pt")
    assert "weights of step 5, state of step 5" in shown(capsys, copy)[1]


def test_the_command_shows_stages_and_refuses_what_is_no_run(copy, tmp_path, capsys):
    for stage in (10, 2):
        shutil.copytree(copy, tmp_path / f"stages/stage-{stage}")
    (tmp_path / "stages/stage-11").mkdir()
    with runs.Place(tmp_path / "stages", True, False):
        lines = shown(capsys, tmp_path / "stages")
        assert shown(capsys, tmp_path / "stages/stage-2")[-1] == lines[-1] != "  not in use"
    heads = [line.split(":")[0] for line in lines if line.startswith("OUT")]
    assert heads == ["OUT/stage-2", "OUT/stage-10"] and len(lines) == 7

    refused(["tools.runs", "nowhere: no run here, not in use"], runs.main, [f"{tmp_path}/nowhere"])
    with runs.Place(tmp_path / "begun", False, False):
        refused("begun: no run here, in use by process", runs.main, [f"{tmp_path}/begun"])
    refused(["tools.runs", "File name too long"], runs.main, ["x" * 300])
    (copy / "config.json").write_text("{}")
    refused(["tools.runs", "config.json: damaged"], runs.main, [str(copy)])


# --------------------------------------------------------------------------------------------------
# Several processes, and kills

class Fork:
    """Trainings in forked processes, which need not import torch again: as kill.start()."""

    def __init__(self, world, words, folder):
        port, self.pids = kill.free_port(), []
        for rank in range(world):
            pid = os.fork()
            if not pid:
                os.chdir(folder)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                                  MASTER_ADDR="localhost", MASTER_PORT=str(port))
                self.train(words, folder / f"said{rank}.txt")
            self.pids.append(pid)
        self.pid, self.codes = self.pids[0], {}

    def train(self, words, said):
        """In the child: as `python train.py`, with its exit status."""
        sys.argv, code = ["train.py", *words], 70
        with open(said, "w") as sys.stdout:
            sys.stderr = sys.stdout
            try:
                train.run_script()
                code = 0
            except SystemExit as e:
                code = e.code
                if isinstance(code, str):
                    print(code)
                    code = 1
            except BaseException:
                traceback.print_exc()
        os._exit(code)

    def poll(self, options=os.WNOHANG):
        for pid in self.pids:
            if pid not in self.codes:
                got, status = os.waitpid(pid, options)
                if got:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if len(self.codes) == len(self.pids):
            return max(self.codes.values(), key=abs)
        return None

    def wait(self):
        return self.poll(0)


@pytest.mark.parametrize("case", [kill.Case("codis", 1, seed=1), kill.Case("cookie", 2, seed=15)],
                         ids=lambda case: case.model)
def test_killed_runs_end_bit_equal(case, tmp_path):
    """Two cases of tests/kill.py, of which the whole is run by hand."""
    row = kill.try_case(case, tmp_path, kills=2, start=Fork)
    assert row["equal"] and row["kills"] == 2, row


@pytest.fixture
def two(squares, tmp_path, monkeypatch):
    """two(what): a training by two processes; in rank 1's second step `what` happens -> the exit
    statuses, and what each said."""
    def start(what, *more):
        def act(out):
            if os.environ["RANK"] == "1":
                what(out)
            return out
        disturb(monkeypatch, 2, act)
        words = squares.imagebert(tmp_path / "run", *OFTEN, *more)
        process = Fork(2, words, tmp_path)
        process.wait()
        said = [(tmp_path / f"said{rank}.txt").read_text() for rank in (0, 1)]
        return [process.codes[pid] for pid in process.pids], said
    return start


def test_a_signal_to_one_process_stops_both(two, tmp_path):
    codes, said = two(lambda out: os.kill(os.getpid(), signal.SIGUSR1))
    assert codes == [75, 75], said
    assert "stopped at step 2 of 6 by SIGUSR1" in said[0] and "stopped" not in said[1]
    assert runs.checkpoints(tmp_path / "run") == [2, 1]

    # at the next log line, where checkpoints are not due at every step
    codes, said = two(lambda out: os.kill(os.getpid(), signal.SIGTERM), "--resume", "--save_every",
                      0, "--log_every", 5)
    assert "stopped at step 5 of 6 by SIGTERM" in said[0], said
    codes, said = two(lambda out: None, "--resume")
    assert codes == [0, 0] and runs.checkpoints(tmp_path / "run") == [6, 5], said


def test_what_one_process_finds_not_finite_stops_both(two, tmp_path):
    codes, said = two(lambda out: out.update(bad_loss(out)))
    assert codes == [1, 1] and "not finite at step 2: loss nan" in said[0], said
    assert "not finite" not in said[1] and "Traceback" not in said[0] + said[1]
    assert runs.checkpoints(tmp_path / "run") == [1]


def test_a_killed_process_ends_the_other_with_a_line(two, tmp_path):
    codes, said = two(lambda out: os.kill(os.getpid(), signal.SIGKILL))
    assert codes == [1, -9], said
    assert "rank 0 lost another process" in said[0] and "Traceback" not in said[0]
    assert runs.checkpoints(tmp_path / "run") == [1]


def test_a_full_disk_ends_both(two, tmp_path, here, small_files):
    size = (here / "whole/state-6.pt").stat().st_size
    small_files(size - 1000)
    codes, said = two(lambda out: None)
    assert codes == [1, 1], said
    assert "state-1.pt: File too large" in said[0] and "Traceback" not in said[0] + said[1]


def test_a_refusal_ends_both(two, copy):
    before = contents(copy)
    codes, said = two(lambda out: None)
    assert codes == [1, 1] and "holds a run" in said[0] and said[1] == "", said
    codes, said = two(lambda out: None, "--resume")
    assert codes == [1, 1] and "was trained by 1 processes" in said[0], said
    assert contents(copy) == before


def test_every_model_trains_with_two_processes(tmp_path):
    """One task of each model, through torchrun; `tests.kill two` runs all tasks."""
    cases = [(model, kill.TASK[model]) for model in kill.MODELS]
    done = kill.run_two(cases, tmp_path)
    assert done == {case: "ok" for case in cases}, done
