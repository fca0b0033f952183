"""Metrics against hand matrices and brute force; the loops of eval.py around a model of a few lines."""

import itertools
import json
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as ev


# ------------------------------------------------------------------------------------------------------------ retrieval

def brute_ranks(sim, owner):
    """The definition, with loops: in the worst order of the ties, where does the first right candidate stand?"""
    n, m = sim.shape
    i2t = [1 + min(sum(sim[i, c] >= sim[i, own] for c in range(m) if owner[c] != i)
                   for own in range(m) if owner[own] == i)
           for i in range(n)]
    t2i = [1 + sum(sim[i, c] >= sim[owner[c], c] for i in range(n) if i != owner[c]) for c in range(m)]
    return [int(r) for r in i2t], [int(r) for r in t2i]


def brute_order(query, base, new, k):
    """Candidates of one query, best first: the k best of `base` sorted by `new`, then the others by `base`."""
    order = sorted(range(len(base)), key=lambda c: -base[c])
    return sorted(order[:k], key=lambda c: -new[c]) + order[k:]


def gallery(counts, seed=0, levels=None):
    """Random scores of len(counts) images with counts[i] captions;
    with `levels`, only so many different values (ties)."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sim = torch.rand(len(counts), len(owner), generator=g)
    return (sim if levels is None else (sim * levels).floor()), owner


def test_hand_matrix():
    sim = torch.tensor([[.9, .1, .8, .2],
                        [.3, .7, .6, .5]])                      # captions 0, 1 -> image 0; 2, 3 -> image 1
    owner = torch.tensor([0, 0, 1, 1])
    i2t, t2i = ev.ranks(sim, owner)
    assert i2t.tolist() == [1, 2]                       # image 1: its best, .6, is beaten by .7 of image 0's caption
    assert t2i.tolist() == [1, 2, 2, 1]
    out = ev.recall(sim, owner, ks=(1, 2))
    assert out["i2t_r1"] == 50 and out["i2t_r2"] == 100 and out["t2i_r1"] == 50 and out["t2i_r2"] == 100
    assert out["rsum"] == 300 and out["mean"] == 75 and out["i2t_medr"] == 1.5 and out["t2i_medr"] == 1.5


@pytest.mark.parametrize("counts", [[1] * 9, [5] * 6, [6] * 5, [7] * 4, [1, 5, 6, 7, 2], [5, 5, 6, 5, 7, 5]])
@pytest.mark.parametrize("levels", [None, 4, 1])
def test_ranks_against_brute_force(counts, levels):
    sim, owner = gallery(counts, seed=len(counts), levels=levels)
    for chunk in (1, 3, 1024):
        assert tuple(r.tolist() for r in ev.ranks(sim, owner, chunk)) == brute_ranks(sim, owner)


def test_a_constant_model_is_last_and_not_above_chance():
    sim, owner = gallery([5] * 8, levels=1)
    i2t, t2i = ev.ranks(sim, owner)
    assert set(i2t.tolist()) == {36} and set(t2i.tolist()) == {8}
    assert ev.recall(sim, owner)["i2t_r1"] == 0


def test_twin_captions_of_one_image_do_not_compete():
    sim = torch.tensor([[.9, .9, .1], [.2, .2, .5]])
    assert ev.ranks(sim, torch.tensor([0, 0, 1]))[0].tolist() == [1, 1]


def test_bad_matrices_are_refused():
    sim, owner = gallery([2, 2, 2])
    with pytest.raises(SystemExit, match="caption"):
        ev.ranks(torch.cat([sim, sim[:1]]), owner)              # a fourth image without caption
    sim[1, 1] = math.nan
    with pytest.raises(SystemExit, match="NaN"):
        ev.ranks(sim, owner)


@pytest.mark.parametrize("counts", [[5] * 12, [1, 5, 6, 7, 3, 2]])
def test_chance_is_the_mean_over_random_orders(counts):
    owner = gallery(counts)[1]
    n, m = len(counts), len(owner)
    exact = ev.chance(owner)
    for k in (1, 5, 10):
        assert exact[f"t2i_r{k}"] == pytest.approx(100 * min(k, n) / n)
        assert (exact[f"i2t_r{k}"]
                == pytest.approx(100 * np.mean([1 - math.comb(m - c, k) / math.comb(m, k) for c in counts])))
    g = torch.Generator().manual_seed(0)
    seen = ev.average([ev.recall(torch.rand(n, m, generator=g), owner) for _ in range(400)])
    assert all(abs(seen[key] - exact[key]) < 4 for key in exact if "_r" in key)


def test_chance_of_a_thousand_images_with_five_captions():
    out = ev.chance(torch.arange(1000).repeat_interleave(5))
    assert out["i2t_r1"] == pytest.approx(0.1) and out["t2i_r10"] == pytest.approx(1)
    assert out["i2t_medr"] == 647 and out["t2i_medr"] == 500    # as the random row of MCT's Table 7 should have it


@pytest.mark.parametrize("counts, k", [([5] * 6, 3), ([1, 5, 6, 7, 2], 4), ([2] * 5, 1), ([3] * 4, 1000)])
def test_reranking_against_brute_force(counts, k):
    sim, owner = gallery(counts, seed=1)
    new = gallery(counts, seed=2)[0] * 20 - 10              # negative scores too: nothing un-ranked may slip between
    top_i, top_t = ev.shortlist(sim, k)
    assert top_i.shape[1] == min(k, len(owner)) and top_t.shape[1] == min(k, len(counts))
    i2t, t2i = ev.reranked(sim, owner, top_i, top_t, new.gather(1, top_i), new.T.gather(1, top_t))
    for i in range(len(counts)):
        order = brute_order(i, sim[i].tolist(), new[i].tolist(), k)
        assert i2t[i] == 1 + min(order.index(c) for c in range(len(owner)) if owner[c] == i)
    for c in range(len(owner)):
        order = brute_order(c, sim[:, c].tolist(), new[:, c].tolist(), k)
        assert t2i[c] == 1 + order.index(int(owner[c]))


def test_reranking_with_ties_is_pessimistic():
    sim, owner = gallery([5] * 6, seed=3)
    top_i, top_t = ev.shortlist(sim, 4)
    i2t, t2i = ev.reranked(sim, owner, top_i, top_t, torch.zeros(6, 4), torch.zeros(30, 4))
    base_i, base_t = ev.ranks(sim, owner)
    own_i, own_t = (owner[top_i] == torch.arange(6)[:, None]), top_t == owner[:, None]
    assert i2t.tolist() == torch.where(own_i.any(1), 5 - own_i.sum(1), base_i).tolist()
    assert t2i.tolist() == torch.where(own_t.any(1), torch.full((30,), 4), base_t).tolist()


def test_scores_that_agree_change_nothing():
    sim, owner = gallery([5] * 10, seed=4)
    top_i, top_t = ev.shortlist(sim, 7)
    again = ev.reranked(sim, owner, top_i, top_t, sim.gather(1, top_i), sim.T.gather(1, top_t))
    assert all(torch.equal(a, b) for a, b in zip(again, ev.ranks(sim, owner)))


# ------------------------------------------------------------------------------------------------------------------ vqa

@pytest.mark.parametrize("answer, answers, score", [
    ("2", ["2"] * 10, 1.0),
    ("2", ["two"] * 5 + ["2"] * 5, 1.0),
    # 3 matches: min(1, 2/3) when one of them is left out
    ("2", ["two", "2", "2"] + ["3"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
    ("red", ["red"] + ["blue"] * 9, 9 / 30),
    ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
    ("green", ["red"] * 4 + ["blue"] * 6, 0.0),
    ("the dog", ["dog", "a dog", "Dog."] + ["cat"] * 7, 0.9),
    ("yes!", ["yes", "Yes", "YES", "yes,"] + ["no"] * 6, 1.0),
    ("red", ["a red"], 1.0), ("red", ["blue"], 0.0),
])
def test_vqa_accuracy_by_hand(answer, answers, score):
    assert ev.vqa_accuracy(answer, answers) == pytest.approx(score)


def test_vqa_accuracy_against_leave_one_out():
    rng = random.Random(0)
    for _ in range(200):
        answers, answer = [rng.choice("abc") + "x" for _ in range(10)], "ax"
        each = [min(1, sum(a == answer for a in answers[:i] + answers[i + 1:]) / 3) for i in range(10)]
        assert ev.vqa_accuracy(answer, answers) == pytest.approx(sum(each) / 10)


# ---------------------------------------------------------------------------------------------------------------- boxes

def test_box_cover_is_exact():
    cover = ev.box_cover([[10, 0, 30, 20]], (40, 40), (4, 2))   # 4 rows of 10 pixels, 2 columns of 20
    assert cover.tolist() == [[.5, .5], [.5, .5], [0, 0], [0, 0]]
    assert ev.box_cover([[3, 5, 17, 29]], (40, 32), (4, 4)).mean() == pytest.approx(14 * 24 / (40 * 32))
    assert ev.box_cover([[0, 0, 20, 20], [0, 0, 40, 20]], (40, 40), (2, 2)).tolist() == [[1, 1], [0, 0]]


def test_wordpieces_become_words():
    maps = torch.arange(5.)[:, None, None].expand(5, 2, 2)
    words = ev.word_maps(["[CLS]", "snow", "##board", "##er", "[SEP]"], maps)
    assert [w for w, _ in words] == ["snowboarder"] and words[0][1].eq(2).all()


# --------------------------------------------------------------------------------------- the loops, around a tiny model
# Picture i is a grey square of level 10 * i, and the word of caption j says which of the tables' rows it is: what the
# model must find is known without it.

VIEWS = {"pretrain": dict(source="pairs", image="plain", norm="half", text="caption"),
         "vqa": dict(source="vqa", image="plain", norm="half", text="question", answer="answer"),
         "nlvr2": dict(source="nlvr2", image="plain", image2="plain", norm="half", text="caption", label="label")}
WORDS = [f"word{i}" for i in range(60)]


@dataclass
class Config:
    vocab_size: int = 66
    image_size: int = 8
    max_text: int = 6
    size: int = 25


def level(image):
    return ((image.mean((1, 2, 3)) * 0.5 + 0.5) * 25.5).round().long()          # (B,) the picture's number


class Tables(nn.Module):
    """sim and match scores are looked up."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.cfg, self.calls = cfg, {"image": 0, "text": 0, "match": 0}
        self.images, self.words = (nn.Parameter(torch.randn(n, 8, generator=g)) for n in (cfg.size, cfg.vocab_size))
        self.pairs = nn.Parameter(torch.randn(cfg.size, cfg.vocab_size, generator=g))
        self.dropout = nn.Dropout(0.5)

    def encode_image(self, batch):
        return self.dropout(nn.functional.normalize(self.images[level(batch["image"])], dim=-1))

    def encode_text(self, batch):
        assert not torch.is_grad_enabled()
        return nn.functional.normalize(self.words[batch["text"][:, 1]], dim=-1)

    def image_states(self, batch):
        self.calls["image"] += len(batch["image"])
        return {"image_number": level(batch["image"])}

    def text_states(self, batch):
        self.calls["text"] += len(batch["text"])
        return {"text_word": batch["text"][:, 1]}

    def match(self, batch):
        self.calls["match"] += len(batch["image_number"])
        return self.pairs[batch["image_number"], batch["text_word"]]


class Matcher(Tables):
    """Scores pairs and has no encoders: raw batches."""
    encode_image = encode_text = image_states = text_states = None

    def match(self, batch):
        return self.pairs[level(batch["image"]), batch["text"][:, 1]]


class Answerer(Tables):
    encode_image = encode_text = match = None

    def rank_answers(self, batch, answer_ids, answer_mask, k):
        assert "answer" not in batch and k <= len(answer_ids) and answer_ids.shape == answer_mask.shape
        return level(batch["image"]) % len(answer_ids)

    def predict(self, batch):
        # True where the right one is lighter
        return torch.stack([level(batch["image"]), level(batch["image2"])], 1).float()

    def gradcam(self, batch, block=None):
        assert torch.is_grad_enabled()
        maps = torch.zeros(*batch["text"].shape, 2, 2)
        maps[:, :, 0, 0] = 3
        maps[:, :, 1, 1] = 1
        return {"word": maps, "sentence": maps[:, 0] + self.images.sum() * 0}


def picture(folder, i):
    Image.new("RGB", (8, 8), (10 * i,) * 3).save(folder / f"{i}.png")
    return f"{i}.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "square"]))
    counts, word = [5, 1, 6, 7, 2, 5, 5, 3, 5, 5], iter(range(60))
    rows = [{"image": picture(root, i), "caption": [WORDS[next(word)] for _ in range(c)]} for i, c in enumerate(counts)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = [{"image": r["image"], "caption": c} for k in range(7) for r in rows for c in r["caption"][k:k + 1]]
    (root / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))  # one caption a line, interleaved
    questions = [{"question_id": 100 - i, "image_id": i, "image": f"{i}.png", "question": "word1"} for i in range(10)]
    notes = [{"question_id": 100 - i, "answers": [{"answer": "word0"}] * 6 + [{"answer": f"word{i % 3}"}] * 4}
             for i in range(10)]
    (root / "questions.json").write_text(json.dumps({"questions": questions, "data_subtype": "x"}))
    (root / "annotations.json").write_text(json.dumps({"annotations": notes, "data_subtype": "x"}))
    pairs = [(0, 1, "True", "dev-1-0-0"), (3, 2, "True", "dev-1-1-0"), (5, 4, "False", "dev-2-0-0"),
             (6, 1, "False", "dev-2-1-0"),
             (7, 8, "True", "dev-2-0-1")]
    rows = [{"identifier": n, "sentence": "word3", "label": t, "left_image": f"{a}.png", "right_image": f"{b}.png"}
            for a, b, t, n in pairs]
    (root / "nlvr2.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def info_of(world, data_file, task="pretrain", **stats):
    return {"model": "tables", "task": task, "config": asdict(Config()), "stats": stats, "step": 7,
            "loop": {"data": str(world / data_file), "vocab": str(world / "vocab.txt"), "rerank_k": 4, "workers": -1}}


def expected(model, world, rule="itm", k=4, images=slice(0, 10)):
    """The same retrieval from the tables."""
    counts = [len(json.loads(line)["caption"]) for line in (world / "pairs.jsonl").read_text().splitlines()]
    owner = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    word = 5 + torch.arange(len(owner))
    keep = (owner >= images.start) & (owner < images.stop)
    owner, word, rows = owner[keep] - images.start, word[keep], torch.arange(10)[images]
    with torch.no_grad():
        sim = nn.functional.normalize(model.images[rows], dim=-1) @ nn.functional.normalize(model.words[word], dim=-1).T
        new = model.pairs[rows][:, word] + (sim if rule == "sum" else 0)
    top_i, top_t = ev.shortlist(sim, k)
    return (ev.recall(sim, owner),
            ev.summary(*ev.reranked(sim, owner, top_i, top_t, new.gather(1, top_i), new.T.gather(1, top_t))))


@pytest.mark.parametrize("rule", ["itm", "sum"])
@pytest.mark.parametrize("file", ["pairs.jsonl", "lines.jsonl"])
def test_retrieval_is_what_the_tables_say(world, file, rule, capsys):
    model = Tables(Config()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = ev.evaluate(model, info_of(world, file), "retrieval", {"rerank": rule, "batch_size": 3, "pairs": 7})
    dual, reranked = expected(model, world, rule)
    assert [r["scores"] for r in out["rows"]] == ["chance", "dual encoder", f"re-ranked, {rule}, k=4"]
    assert {k: out["rows"][1][k] for k in dual} == pytest.approx(dual)
    assert out["metrics"] == pytest.approx(reranked)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.calls["image"] == 10 and model.calls["text"] == 44             # states are computed once
    assert model.calls["match"] <= 4 * 10 + 4 * 44                      # and a pair of both shortlists is scored once
    assert out["protocol"]["captions"] == 44 and out["protocol"]["images"] == 10 and out["protocol"]["split"] == "test"
    assert ev.RULES[rule] in " ".join(capsys.readouterr().out.split())


def test_folds_rerank_within_the_fold(world):
    model = Tables(Config())
    out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"folds": 5})
    folds = [expected(model, world, images=slice(2 * f, 2 * f + 2)) for f in range(5)]
    assert [r["images"] for r in out["rows"]] == ["all 10"] * 3 + ["2, mean of 5 folds"] * 3
    for row, way in zip(out["rows"][4:], (0, 1)):
        want = ev.average([f[way] for f in folds])
        assert {k: row[k] for k in want} == pytest.approx(want)
        assert want["rsum"] == pytest.approx(sum(want[k] for k in want if "_r" in k))


def test_k_beyond_the_gallery_and_no_reranking(world):
    model = Tables(Config())
    out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"rerank_k": 1000})
    assert (out["metrics"] == pytest.approx(expected(model, world, k=1000)[1])
            and out["protocol"]["rerank_k"] == [44, 10])
    for opts in ({"rerank": "none"}, {"rerank_k": 0}):
        out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", opts)
        assert out["metrics"] == pytest.approx(expected(model, world)[0]) and len(out["rows"]) == 2


def test_a_model_without_encoders_scores_every_pair(world):
    model = Matcher(Config())
    out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"pairs": 13})
    owner = torch.repeat_interleave(torch.arange(10), torch.tensor([5, 1, 6, 7, 2, 5, 5, 3, 5, 5]))
    assert out["metrics"] == pytest.approx(ev.recall(model.pairs[:10, 5:49].detach(), owner))
    assert "all 440 pairs" in out["rows"][1]["scores"]


def test_vqa_writes_every_question_once_and_scores_it(world, tmp_path):
    info = {**info_of(world, "questions.json", "vqa", answers=["word0", "word1", "word2"]), "path": str(tmp_path)}
    info["loop"]["data"] += f",{world / 'annotations.json'}"
    out = ev.evaluate(Answerer(Config()), info, "vqa", {"batch_size": 4})
    written = json.loads((tmp_path / "vqa_test_results.json").read_text())
    assert sorted(r["question_id"] for r in written) == list(range(91, 101))
    assert {r["question_id"]: r["answer"] for r in written} == {100 - i: f"word{i % 3}" for i in range(10)}
    assert out["metrics"] == pytest.approx({"accuracy": 100.0, "baseline": 100.0})  # 6 or 4 annotators of 10 suffice
    assert json.loads((tmp_path / "eval-vqa.json").read_text())["protocol"]["answers"] == 3
    (tmp_path / "few.txt").write_text("word1\nword0\n")
    out = ev.evaluate(Answerer(Config()), info, "vqa", {"answers": str(tmp_path / "few.txt")})
    assert out["metrics"]["baseline"] == pytest.approx(30) and out["metrics"]["accuracy"] == pytest.approx(60)
    info["loop"]["data"] = str(world / "questions.json")                            # the test split has no annotations
    assert ev.evaluate(Answerer(Config()), info, "vqa")["metrics"] == {}


def test_nlvr2_accuracy_baseline_consistency(world):
    out = ev.evaluate(Answerer(Config()), info_of(world, "nlvr2.jsonl", "nlvr2"), "nlvr2", {"batch_size": 2})
    assert out["metrics"] == pytest.approx({"accuracy": 80, "baseline": 60, "consistency": 200 / 3})
    assert out["protocol"]["classes"] == {0: "False", 1: "True"}


def test_gradcam_draws_any_picture(world, tmp_path):
    Image.new("RGB", (301, 157), "red").save(tmp_path / "a.jpg")
    opts = {"image": str(tmp_path / "a.jpg"), "text": "word1 word2", "out": str(tmp_path / "map.png")}
    out = ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "gradcam", opts)
    assert out["rows"][0]["words"] == 2 and out["rows"][0]["grid"] == "2x2"
    assert Image.open(tmp_path / "map.png").size[0] == 4 * 200 + 8              # picture, sentence, two words
    for opts, message in (({}, "--image"), ({"image": "no.jpg", "text": "word1"}, "no.jpg")):
        with pytest.raises(SystemExit, match=message):
            ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "gradcam", opts)


def test_pointing_measures_the_mass_in_the_box(world, tmp_path):
    row = {"image": str(world / "1.png"), "caption": "square word1",
           "boxes": [[0, 0, 4, 4], [4, 4, 8, 8]], "labels": [0, 1],
           "label_names": ["square", "other"]}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(row))
    out = ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "pointing",
                      {"data": str(tmp_path / "boxes.jsonl")})
    assert out["metrics"] == {"inside the box": 75, "uniform": 25, "ratio": 3, "peak in the box": 100}


def distributed_job(rank, world, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    info = info_of(world, "questions.json", "vqa", answers=["word0", "word1", "word2"])
    info["loop"]["data"] += f",{world / 'annotations.json'}"
    out = {"retrieval": ev.evaluate(Tables(Config()), info_of(world, "lines.jsonl"), "retrieval",
                                    {"batch_size": 3}, rank, 2),
           "vqa": ev.evaluate(Answerer(Config()), {**info, "path": str(results)}, "vqa", {"batch_size": 3}, rank, 2),
           "one": ev.evaluate(Tables(Config()), info_of(world, "pairs.jsonl"), "retrieval", {"limit": 1}, rank, 2)}
    torch.save({k: v["metrics"] for k, v in out.items()}, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(world, tmp_path):
    torch.multiprocessing.spawn(distributed_job,
                                (world, 29400 + random.SystemRandom().randrange(1000), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second and first["retrieval"] == pytest.approx(expected(Tables(Config()), world)[1])
    assert first["vqa"]["accuracy"] == pytest.approx(100) and first["one"]["i2t_r1"] == 100    # rank 1 had no picture
    assert (sorted(r["question_id"] for r in json.loads((tmp_path / "vqa_test_results.json").read_text()))
            == list(range(91, 101)))


# --------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("task, opts, message", [
    ("vqa", {}, r"vqa.*offers: retrieval"), ("nope", {}, "nope.*known: retrieval"),
    ("retrieval", {"folds": 11}, "--folds 11"),
    ("retrieval", {"data": "missing.json"}, "missing.json"), ("retrieval", {"vocab": "no.txt"}, "no.txt")])
def test_what_the_user_can_get_wrong_is_one_line(world, task, opts, message):
    with pytest.raises(SystemExit, match=message) as e:
        ev.evaluate(Tables(Config()), info_of(world, "pairs.jsonl"), task, opts)
    assert "\n" not in str(e.value)


def test_a_vocabulary_of_another_size_is_refused(world):
    with pytest.raises(SystemExit, match="66 tokens, the run has 70"):
        ev.evaluate(Tables(Config(vocab_size=70)), info_of(world, "pairs.jsonl"), "retrieval")


# ----------------------------------------------------------------------------------------------------------------- runs

class Tied(nn.Module):
    def __init__(self, cfg=None, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.embed, self.out = cfg, nn.Embedding(5, 3), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("empty", torch.zeros(0))


def test_weights_survive_the_round_trip_and_stay_tied(tmp_path):
    model, other = Tied(), Tied()
    model.ptr += 3
    ev.save_model(torch.nn.Sequential(), tmp_path / "none.safetensors")
    ev.save_model(torch.compile(model, backend="eager"), tmp_path / "w.safetensors")
    assert sorted(ev.read_weights(tmp_path / "w.safetensors")) == ["embed.weight", "empty", "out.bias", "ptr"]
    ev.load_weights(other, tmp_path / "w.safetensors")
    assert (torch.equal(other.embed.weight, model.embed.weight)
            and other.out.weight is other.embed.weight and other.ptr == 3)


def test_damaged_runs_are_one_line(tmp_path, world, monkeypatch):
    def refused(match, call, *args):
        with pytest.raises(SystemExit, match=match) as e:
            call(*args)
        assert "\n" not in str(e.value)
    refused("no such file", ev.load_weights, Tied(), tmp_path / "w.safetensors")
    ev.save_model(Tied(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-8])
    refused("not a whole", ev.load_weights, Tied(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(whole)
    refused("images is missing.*unknown", ev.load_weights, Tables(Config()), tmp_path / "w.safetensors")
    ev.save_model(nn.Linear(2, 2), tmp_path / "w.safetensors")
    refused(r"weight is \(2, 2\), not \(3, 3\)", ev.load_weights, nn.Linear(3, 3), tmp_path / "w.safetensors")
    refused("no config.json", ev.load_run, tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("damaged", ev.load_run, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "nope", "task": "pretrain", "config": {}}))
    refused("no models/nope.py; there are: ", ev.load_run, tmp_path)


def test_a_run_is_loaded_and_evaluated_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    module = sys.modules[__name__]
    monkeypatch.setattr(ev, "load_module", lambda name: module)
    monkeypatch.setattr(module, "Model", Tables, raising=False)
    monkeypatch.setattr(module, "EVALS", {"pretrain": ("retrieval",)}, raising=False)
    run = tmp_path / "run" / "stage-2"
    run.mkdir(parents=True)
    info = info_of(world, "pairs.jsonl")
    (run / "config.json").write_text(json.dumps(info))
    ev.save_model(Tables(Config()), run / "model.safetensors")
    out = ev.main([str(tmp_path / "run")])
    assert out["retrieval"]["metrics"] == pytest.approx(expected(Tables(Config()), world)[1])
    saved = json.loads((run / "eval-retrieval.json").read_text())
    assert (len(saved["protocol"]["sha256"]) == 64 and saved["protocol"]["step"] == 7
            and saved["protocol"]["world_size"] == 1)
    assert "in domain, pre-trained only" in saved["protocol"]["protocol"] and "i2t R@1" in capsys.readouterr().out
    out = ev.main([str(tmp_path / "run"), "--data", str(world / "lines.jsonl"), "--limit", "5"])
    assert out["retrieval"]["protocol"]["records"] == 5 and "zero-shot" in out["retrieval"]["protocol"]["protocol"]
