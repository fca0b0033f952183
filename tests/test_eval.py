"""eval.py: metrics against hand matrices and brute force; the evaluations around a model of a few
lines; runs of the real models as a user evaluates them."""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import eval as ev
import train
from tools import regions, weights



def close(a, b, tol=1e-9):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def write(path, value):
    """A text or something for JSON -> the path."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def write_lines(path, rows):
    """One JSON line a row -> the path."""
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Retrieval

def brute_ranks(sim, owner):
    """The definition in loops: in the worst order of the ties, where is the first right one?"""
    n, m = sim.shape
    i2t, t2i = [], []
    for i in range(n):
        above = []
        for own in range(m):
            if owner[own] == i:
                above.append(sum(sim[i, c] >= sim[i, own] for c in range(m) if owner[c] != i))
        i2t.append(int(1 + min(above)))
    for c in range(m):
        own = owner[c]
        t2i.append(int(1 + sum(sim[i, c] >= sim[own, c] for i in range(n) if i != own)))
    return i2t, t2i


def brute_order(base, new, k):
    """Candidates of one query, best first: the k best of `base` by `new`, the others by `base`."""
    order = sorted(range(len(base)), key=lambda c: -base[c])
    return sorted(order[:k], key=lambda c: -new[c]) + order[k:]


def gallery_of(counts, seed=0, levels=None):
    """Random scores of len(counts) images with counts[i] captions -> (N, M), (M,); with `levels`
    only so many different values (ties)."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sim = torch.rand(len(counts), len(owner), generator=g)
    return (sim if levels is None else (sim * levels).floor()), owner


def test_hand_matrix():
    sim = torch.tensor([[.9, .1, .8, .2],
                        [.3, .7, .6, .5]])                  # captions 0, 1 -> image 0; 2, 3 -> 1
    owner = torch.tensor([0, 0, 1, 1])
    i2t, t2i = ev.ranks(sim, owner)
    assert i2t.tolist() == [1, 2]               # image 1: .6 is beaten by .7 of image 0's caption
    assert t2i.tolist() == [1, 2, 2, 1]

    out = ev.recall(sim, owner, ks=(1, 2))
    assert out["i2t_r1"] == 50 and out["i2t_r2"] == 100
    assert out["t2i_r1"] == 50 and out["t2i_r2"] == 100
    assert out["rsum"] == 300 and out["mean"] == 75
    assert out["i2t_medr"] == 1.5 and out["t2i_medr"] == 1.5


@pytest.mark.parametrize("counts", [[1] * 9, [5] * 6, [6] * 5, [7] * 4, [1, 5, 6, 7, 2],
                                    [5, 5, 6, 5, 7, 5]])
@pytest.mark.parametrize("levels", [None, 4, 1])
def test_ranks_against_brute_force(counts, levels):
    sim, owner = gallery_of(counts, seed=len(counts), levels=levels)
    for chunk in (1, 3, 1024):
        i2t, t2i = ev.ranks(sim, owner, chunk)
        assert (i2t.tolist(), t2i.tolist()) == brute_ranks(sim, owner)


def test_a_constant_model_is_last_and_not_above_chance():
    sim, owner = gallery_of([5] * 8, levels=1)
    i2t, t2i = ev.ranks(sim, owner)
    assert set(i2t.tolist()) == {36} and set(t2i.tolist()) == {8}
    assert ev.recall(sim, owner)["i2t_r1"] == 0


def test_twin_captions_of_one_image_do_not_compete():
    sim = torch.tensor([[.9, .9, .1], [.2, .2, .5]])
    assert ev.ranks(sim, torch.tensor([0, 0, 1]))[0].tolist() == [1, 1]


def test_bad_matrices_are_refused():
    sim, owner = gallery_of([2, 2, 2])
    with pytest.raises(weights.Stop, match="caption"):
        ev.ranks(torch.cat([sim, sim[:1]]), owner)              # a fourth image without caption
    sim[1, 1] = math.nan
    with pytest.raises(weights.Stop, match="NaN"):
        ev.ranks(sim, owner)


@pytest.mark.parametrize("counts", [[5] * 12, [1, 5, 6, 7, 3, 2]])
def test_chance_is_the_mean_over_random_orders(counts):
    owner = gallery_of(counts)[1]
    n, m = len(counts), len(owner)
    exact = ev.chance(owner)
    for k in (1, 5, 10):
        assert exact[f"t2i_r{k}"] == pytest.approx(100 * min(k, n) / n)
        found = [1 - math.comb(m - c, k) / math.comb(m, k) for c in counts]
        assert exact[f"i2t_r{k}"] == pytest.approx(100 * np.mean(found))

    g = torch.Generator().manual_seed(0)
    seen = ev.average([ev.recall(torch.rand(n, m, generator=g), owner) for _ in range(400)])
    assert all(abs(seen[key] - exact[key]) < 4 for key in exact if "_r" in key)


def test_chance_of_a_thousand_images_with_five_captions():
    """As the random row of MCT's Table 7 should have it."""
    out = ev.chance(torch.arange(1000).repeat_interleave(5))
    assert out["i2t_r1"] == pytest.approx(0.1) and out["t2i_r10"] == pytest.approx(1)
    assert out["i2t_medr"] == 647 and out["t2i_medr"] == 500


@pytest.mark.parametrize("counts, k", [([5] * 6, 3), ([1, 5, 6, 7, 2], 4), ([2] * 5, 1),
                                       ([3] * 4, 1000)])
def test_reranking_against_brute_force(counts, k):
    sim, owner = gallery_of(counts, seed=1)
    # Negative scores too: nothing outside the shortlist may slip between.
    new = gallery_of(counts, seed=2)[0] * 20 - 10
    top_i, top_t = ev.shortlist(sim, k)
    assert top_i.shape[1] == min(k, len(owner)) and top_t.shape[1] == min(k, len(counts))

    i2t, t2i = ev.reranked(sim, owner, top_i, top_t, new.gather(1, top_i), new.T.gather(1, top_t))
    for i in range(len(counts)):
        order = brute_order(sim[i].tolist(), new[i].tolist(), k)
        assert i2t[i] == 1 + min(order.index(c) for c in range(len(owner)) if owner[c] == i)
    for c in range(len(owner)):
        order = brute_order(sim[:, c].tolist(), new[:, c].tolist(), k)
        assert t2i[c] == 1 + order.index(int(owner[c]))


def test_reranking_with_ties_is_pessimistic():
    sim, owner = gallery_of([5] * 6, seed=3)
    top_i, top_t = ev.shortlist(sim, 4)
    i2t, t2i = ev.reranked(sim, owner, top_i, top_t, torch.zeros(6, 4), torch.zeros(30, 4))

    base_i, base_t = ev.ranks(sim, owner)
    own_i, own_t = owner[top_i] == torch.arange(6)[:, None], top_t == owner[:, None]
    last_i, last_t = 5 - own_i.sum(1), torch.full((30,), 4)
    assert i2t.tolist() == torch.where(own_i.any(1), last_i, base_i).tolist()
    assert t2i.tolist() == torch.where(own_t.any(1), last_t, base_t).tolist()


def test_scores_that_agree_change_nothing():
    sim, owner = gallery_of([5] * 10, seed=4)
    top_i, top_t = ev.shortlist(sim, 7)
    again = ev.reranked(sim, owner, top_i, top_t, sim.gather(1, top_i), sim.T.gather(1, top_t))
    assert all(torch.equal(a, b) for a, b in zip(again, ev.ranks(sim, owner)))


# --------------------------------------------------------------------------------------------------
# Answers and tags

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
        each = []
        for i in range(10):
            others = answers[:i] + answers[i + 1:]
            each.append(min(1, others.count(answer) / 3))
        assert ev.vqa_accuracy(answer, answers) == pytest.approx(sum(each) / 10)


def test_vqa_rows_by_type_of_answer():
    truth = {1: {"answers": ["a"], "answer_type": "other"}, 2: {"answers": ["b"]},
             3: {"answers": ["yes"], "answer_type": "yes/no"}}
    row = ev.vqa_row("model", {1: "a", 2: "a", 3: "yes"}, truth)
    assert row == {"answers": "model", "questions": 3, "overall": pytest.approx(200 / 3),
                   "other": 100, "yes/no": 100}


def test_consistency_counts_sentences_with_all_pairs_right():
    names = ["a-1-0-0", "a-1-1-0", "a-2-0-0", "a-2-1-0", "a-2-0-1"]
    records = [{"identifier": name} for name in names]
    percent, sentences = ev.consistency(records, [True, True, True, False, True])
    assert sentences == 3 and percent == pytest.approx(200 / 3)
    assert ev.consistency([{"identifier": "a-1"}], [True]) is None
    assert ev.consistency([{}], [True]) is None


def test_miou():
    top, truth = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), [{0, 1, 9}, set()]
    close(ev.tag_overlap(top, truth, 2), 100 * (2 / 3 + 0) / 2)
    close(ev.tag_overlap(top, truth, 4), 100 * (2 / 5 + 0) / 2)


# --------------------------------------------------------------------------------------------------
# Graded sentence pairs and hash codes

# pearsonr and spearmanr of scipy 1.17.1 for the 100 cases below, four cases a line
SCIPY = """
0.322094636 0.353479853 0.925079824 0.785221494 0.681184801 0.828571429 0.886698052 0.665964421
0.456455110 0.376676987 0.822122594 0.702562927 0.298538457 0.280566802 0.760873991 0.538424127
0.538803978 0.578431373 0.681300544 0.486719206 0.306299855 0.269838057 0.751912777 0.613419266
0.538456171 0.507018717 0.880253473 0.675294985 0.688261877 0.533333333 0.898524159 0.791013233
0.488123932 0.435897436 0.718338282 0.447831271 0.632816532 0.569230769 0.986356533 0.974679434
0.736543295 0.685314685 0.867668615 0.660535354 0.686828720 0.663636364 0.828285816 0.391631653
0.353629918 0.381562882 0.843299440 0.674822913 0.328385220 0.275000000 0.798912827 0.638767412
0.371098838 0.284848485 0.599719579 0.257839062 0.522712287 0.515173068 0.949947489 1.000000000
0.136268191 0.214285714 0.765948221 0.587139369 0.481732687 0.466151866 0.746791022 0.569050552
0.580326576 0.602608696 0.959531517 0.784729917 0.456738707 0.398522167 0.903070140 0.736405674
0.420690921 0.368035191 0.653505603 0.367519297 0.321677502 0.248484848 0.965068263 0.820782682
0.172871172 0.120689655 0.788195733 0.493816403 0.116611701 0.285714286 0.800089748 0.591239727
0.590797837 0.593828646 0.946028070 0.554545455 0.547322345 0.545912911 0.824842042 0.734147455
0.709772095 0.681203008 0.825383706 0.522271439 0.059886937 -0.018181818 0.858948869 0.757589671
0.624816078 0.524674472 0.978720238 0.974679434 0.247970613 0.221575985 0.873404338 0.777638805
0.475670400 0.427442123 0.615439686 0.281227975 0.474011583 0.501012146 0.793424030 0.615051593
0.557996148 0.530080214 0.778805123 0.564834334 0.389983262 0.571428571 0.941420201 0.675925926
0.586720337 0.528592375 0.991739594 0.900000000 0.043764093 0.212121212 0.747729727 0.416456335
0.660449719 0.678571429 0.620935254 0.054800776 0.409626659 0.407843137 0.820123311 0.598128317
0.530339652 0.463247863 0.705671889 0.268374455 0.391974515 0.378571429 0.922216181 0.652012863
0.517882964 0.515789474 0.685834811 0.436524002 0.579286473 0.608391608 0.760330269 0.615302831
0.360631297 0.429870130 0.781290228 0.482896341 0.222953246 0.400000000 0.914412212 0.707528736
0.465437802 0.440065681 0.908900628 0.636847175 0.590777599 0.602941176 0.946234836 0.896784797
0.557009589 0.508866995 0.749822067 0.526708018 0.360114567 0.356567093 0.674125041 0.370579457
0.390137474 0.325128205 0.775610954 0.579524680 0.156869511 0.128461538 0.757496474 0.562134958
"""


def test_sts_metrics_equal_scipys():
    want = iter(map(float, SCIPY.split()))
    for i in range(100):
        g = random.Random(i)
        n = g.randint(3, 40)
        x = [g.uniform(-1, 1) for _ in range(n)]
        y = [a * g.uniform(0, 1) + g.uniform(-1, 1) for a in x]
        if i % 2:
            x, y = [round(3 * a) for a in x], [round(3 * a) for a in y]         # ties
            x[0], x[1], y[0], y[1] = 9, -9, 8, -7                               # never constant
        assert ev.pearson(x, y) == pytest.approx(next(want), abs=1e-8)
        assert ev.spearman(x, y) == pytest.approx(next(want), abs=1e-8)
    assert math.isnan(ev.pearson([1, 1, 1], [1, 2, 3]))


def test_sts_all_mean_wmean():
    """A crafted case where the three differ: two subsets, each perfect, at different levels."""
    score, gold = [1, 2, 3, 0.1, 0.2], [0, 1, 2, 4, 5]
    out = ev.graded(score, gold, ["a"] * 3 + ["b"] * 2)
    assert out["mean"] == out["wmean"] == 100 and out["spearman"] < 0
    close(out["P+S / 2"], (out["pearson"] + out["spearman"]) / 2)
    out = ev.graded([1, 2, 3, 2, 1], [1, 2, 3, 1, 2], ["a"] * 3 + ["b"] * 2)
    close(out["mean"], 0.0)
    close(out["wmean"], 100 * (3 - 2) / 5)


def test_bag_of_words():
    close(ev.bag_of_words("A red dog.", "a red, red cat"), (1 + 2) / math.sqrt(3 * 6))
    assert ev.bag_of_words("", "x") == 0


@pytest.mark.parametrize("r", [3, 7, 50])
def test_map_at(r):
    g = torch.Generator().manual_seed(r)
    query, database = (torch.randint(0, 2, (n, 6), generator=g) * 2.0 - 1 for n in (5, 11))
    # 0 or 1, some rows without label
    ql, dl = (torch.randint(0, 4, (n, 3), generator=g) // 2 for n in (5, 11))

    within = whole = 0
    for q, labels in zip(query, ql):
        # ties: the database's order
        order = sorted(range(11), key=lambda j: (int((q != database[j]).sum()), j))
        hits, total = [], 0
        for place, j in enumerate(order[:r], 1):
            if (labels & dl[j]).any():
                hits.append(place)
                total += len(hits) / place

        # over the hits among the first r, or over all relevant ones
        within += total / max(1, len(hits)) / 5
        whole += total / max(1, sum(bool((labels & d).any()) for d in dl)) / 5
    for mine, theirs in zip(ev.map_at(query, database, ql, dl, r, chunk=2), (within, whole)):
        close(mine, 100 * theirs)


def test_subsets_of_one_pair_have_no_correlation():
    out = ev.graded([1, 2, 3], [1, 2, 3], ["a", "b", "c"])
    assert out["pearson"] == 100 and math.isnan(out["mean"]) and math.isnan(out["wmean"])


# --------------------------------------------------------------------------------------------------
# Boxes and masks

def test_box_cover_is_exact():
    cover = ev.box_cover([[10, 0, 30, 20]], (40, 40), (4, 2))   # 4 rows of 10 pixels, 2 columns
    assert cover.tolist() == [[.5, .5], [.5, .5], [0, 0], [0, 0]]
    cover = ev.box_cover([[3, 5, 17, 29]], (40, 32), (4, 4))
    assert cover.mean() == pytest.approx(14 * 24 / (40 * 32))
    cover = ev.box_cover([[0, 0, 20, 20], [0, 0, 40, 20]], (40, 40), (2, 2))
    assert cover.tolist() == [[1, 1], [0, 0]]


def test_pointed_by_hand():
    """A box over the left half of a 2 x 2 map; negative values count as 0."""
    m = torch.tensor([[3., 1.], [-5., 0.]])
    (inside, uniform, peak), = ev.pointed([("dog", m)], {"dog": [[0, 0, 20, 40]]}, (40, 40))
    assert (inside, uniform, peak) == (0.75, 0.5, 1.0)


def test_wordpieces_become_words():
    maps = torch.arange(5.)[:, None, None].expand(5, 2, 2)
    words = ev.word_maps(["[CLS]", "snow", "##board", "##er", "[SEP]"], maps)
    assert [w for w, _ in words] == ["snowboarder"] and words[0][1].eq(2).all()


def test_voc_ap_by_hand():
    def box(x):
        return [x, 0.0, x + 10, 10]

    objects = {0: np.array([box(0), box(20)]), 1: np.array([box(0), box(50)]), 2: np.zeros((0, 4))}
    truth = {0: np.array([0, 0]), 1: np.array([0, 1])}
    found = []
    for score, image, x in ((0.9, 0, 0), (0.8, 0, 0), (0.7, 1, 50), (0.6, 1, 1), (0.5, 2, 0)):
        iou = ev.box_iou(np.array([box(x)]), objects[image])[0]
        found.append((score, image, iou))

    # right, wrong (second time), left out (difficult), right (IoU 9/11), wrong; three objects:
    # recall 1/3 at 1, 2/3 at 2/3
    wanted = (4 * 1 + 3 * (2 / 3) + 4 * 0) / 11                 # recall 0..0.3, 0.4..0.6, 0.7..1
    close(ev.voc_ap(found, truth, 0.5), wanted)
    close(ev.voc_ap(found, truth, 9 / 11), (4 * 1) / 11)    # at the threshold: not over
    assert math.isnan(ev.voc_ap(found, {}, 0.5))
    assert ev.voc_ap([], truth, 0.5) == 0


@pytest.fixture
def truth_found(tmp_path, rectangles):
    """Records, detections that are their first objects, as detections() gives them, and none."""
    file, _ = rectangles(tmp_path)
    records, found = data.open_source("detection", str(file), "train", str(tmp_path)), {}
    for i, r in enumerate(records):
        boxes = np.array(r["boxes"])
        masks = np.stack([data.decode_mask(s, 32, 40) for s in r["segmentation"]])
        found[i] = {"boxes": boxes[:1], "labels": np.array(r["labels"][:1]), "scores": np.ones(1),
                    "iou": ev.box_iou(boxes[:1], boxes),
                    "mask_iou": ev.mask_iou(masks[:1], masks),
                    "masks": [data.encode_mask(masks[0])]}
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    return records, found, {i: empty for i in found}


def test_ap_of_the_truth_is_100(truth_found):
    records, found, empty = truth_found
    for key in ("iou", "mask_iou"):
        scores = ev.voc_scores(found, records, 2, key)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert ev.voc_scores(empty, records, 2, key)["AP"] == 0


@pytest.mark.needs("pycocotools")
def test_ap_of_the_truth_is_100_by_pycocotools(truth_found):
    records, found, empty = truth_found
    for kind in ("bbox", "segm"):
        scores = ev.coco_scores(found, records, kind)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert ev.coco_scores(empty, records, kind)["AP"] == 0


def test_mask_iou_by_hand():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2, :3], masks[1, 1:3, 1:3] = True, True               # 6 and 4 pixels, 2 in common
    close(ev.mask_iou(masks, masks), [[1, 2 / 8], [2 / 8, 1]])
    assert ev.mask_iou(masks[:0], masks).shape == (0, 2)


def test_whole_picture_is_the_baseline_of_detection(tmp_path):
    """Of two classes, one whose only object fills its picture is found (AP 100), one whose object
    is small is not (AP 0)."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in (1, 2)]
    for i in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    notes = [{"id": i, "image_id": i, "category_id": i, "iscrowd": 0, "bbox": box,
              "area": box[2] * box[3], "segmentation": []}
             for i, box in ((1, [0, 0, 40, 30]), (2, [4, 4, 9, 9]))]
    categories = [{"id": 1, "name": "wide"}, {"id": 2, "name": "small"}]
    file = write(tmp_path / "instances.json",
                 {"images": images, "annotations": notes, "categories": categories})

    # a detector that finds nothing
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    model = SimpleNamespace(detect=lambda batch: [dict(nothing) for _ in batch["image"]])
    opts = ev.parser().parse_args(["x", "--data", str(file), "--image_root", str(tmp_path)])
    one = mock.Mock(opts=opts, task="detection", info={}, world=1, model=model, protocol={},
                    autocast=contextlib.nullcontext())
    one.open.return_value = data.open_source("detection", str(file), "train", str(tmp_path))
    one.progress.return_value = [{"index": torch.arange(2), "image": [None, None]}]
    rows = ev.detection(one)["rows"]
    table = {r["measure"]: (r["AP"], r["AP50"]) for r in rows}
    assert set(table) >= {"boxes, VOC07 11-point", "whole picture, VOC07 11-point"}
    for measure, value in table.items():
        wanted = [50.0, 50.0] if measure.startswith("whole picture") else [0.0, 0.0]
        close(torch.tensor(value), wanted)


# --------------------------------------------------------------------------------------------------
# A linear layer on fixed features

def test_fit_linear():
    x = torch.randn(400, 5)
    y = (x[:, 0] > x[:, 1]).long()
    weight, bias = ev.fit_linear(x, y, 2, lr=1.0, epochs=20, batch=64)
    assert (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95
    weight, bias, lr = ev.fit_best(x, y, 2, [1e-6, 1.0])
    assert lr == 1.0 and (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95


def test_probe_fits_features_of_any_scale():
    """Features that are all positive and unlike in size: as they are SGD does not get there,
    brought to one scale it does. A unit that is dead in train does no harm."""
    torch.manual_seed(0)
    z, way = torch.randn(400, 6), torch.randn(6, 4)
    y = (z @ way).argmax(1)
    scaled = 5 + z * torch.tensor([0.01, 0.1, 1, 0.02, 0.5, 0.05])
    x = torch.cat([scaled, torch.zeros(400, 1)], 1)
    x[300:, 6] = 1e-6

    x, y = {"train": x[:300], "test": x[300:]}, {"train": y[:300], "test": y[300:]}
    train, test, lr = ev.fit_probe(x, y, 4)
    assert min(train, test) > 90 and lr in (3.0, 1.0, 0.3, 0.1, 0.03)
    raw_train, raw_test, lr = ev.fit_probe(x, y, 4, 30.0)
    assert raw_train < 75 and lr == 30

    # features that say nothing
    for blind in (torch.zeros(400, 3), torch.full((400, 3), 7.0)):
        halves = {"train": blind[:300], "test": blind[300:]}
        train, test, _ = ev.fit_probe(halves, y, 4)
        assert train < 50 and test < 50


# --------------------------------------------------------------------------------------------------
# Drawings, tables, seconds

def test_by_rank():
    """By rank, not by value."""
    picture = data.Image.new("RGB", (4, 4), (200, 200, 200))
    out = np.asarray(ev.by_rank(picture, torch.tensor([[0.9, 0.1], [0.2, 0.3]])))
    assert out[0, 0, 0] == 200 and out[0, 3, 0] == 40
    assert out[3, 0, 0] < out[3, 3, 0] < 200


def test_drawings_have_their_sizes(tmp_path):
    picture, m = Image.new("RGB", (30, 60), "red"), torch.rand(2, 3)
    ev.draw_maps(picture, "a b", [("a", m), ("b", 0 * m)], m, tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").size == (4 * 200 + 8, 22 + (384 + 22) + 8)

    ev.draw_ranks(picture, [("run", m, [("a", .5), ("b", .1)])], tmp_path / "ranks.png")
    assert Image.open(tmp_path / "ranks.png").size == (2 * 266 + 10, 512 + 40 + 40)

    picture.save(tmp_path / "p.png")
    place = str(tmp_path / "p.png")
    parts = [("a b", "text", [(.9, True, place), (.8, False, place)]),
             (place, "image", [(.9, False, "a b"), (.8, True, "c d"), (.7, False, "e " * 200)])]
    ev.draw_gallery(parts, tmp_path / "gallery.png")
    assert Image.open(tmp_path / "gallery.png").size == (8 + 3 * 200, 2 * 280)


def test_table_aligns_text_left_and_numbers_right():
    rows = [{"scores": "chance", "i2t_r1": 0.123, "n": 10}, {"scores": "dual encoder", "n": 5}]
    assert ev.table(rows).splitlines() == ["scores        i2t R@1   n",
                                           "-------------------------",
                                           "chance            0.1  10",
                                           "dual encoder        -   5"]


@pytest.mark.parametrize("power", [1, 2])
def test_growth_is_the_power(power):
    sizes = [2, 4, 12]
    steps, slope = ev.growth(sizes, [0.5 * n ** power for n in sizes])
    assert steps == [None, pytest.approx(power), pytest.approx(power)]
    assert slope == pytest.approx(power)


def test_growth_of_one_size_is_not_known():
    steps, slope = ev.growth([8], [0.1])
    assert steps == [None] and math.isnan(slope)


def test_timed_is_the_fastest_call(monkeypatch):
    clock = iter([0, 5, 10, 12, 20, 29])
    monkeypatch.setattr(ev.time, "perf_counter", lambda: next(clock))
    assert ev.timed(lambda: None, torch.device("cpu"), 3) == 2


# --------------------------------------------------------------------------------------------------
# What a model offers

def test_offers_is_what_the_model_lists_else_what_it_has():
    model = Tables(Config())
    assert ev.offers(model, "encode_image", "match") and not ev.offers(model, "predict")
    assert ev.offered(model, "pretrain") == ["retrieval", "gallery", "sts", "speed"]

    model.offers = {"encode_image", "encode_text", "predict"}       # it has no predict()
    assert ev.offers(model, "encode_image") and not ev.offers(model, "match")
    assert ev.offered(model, "pretrain") == ["retrieval", "gallery", "sts", "speed"]
    model.offers = {"match"}
    assert ev.offered(model, "pretrain") == ["retrieval", "speed"]
    model.offers = set()
    assert ev.offered(model, "pretrain") == []

    # a classifier is asked about its own kind of data alone: NLVR2's reads two pictures
    assert ev.offered(Answerer(Config()), "nlvr2") == ["vqa", "nlvr2", "gradcam", "pointing"]
    assert "nlvr2" not in ev.offered(Answerer(Config()), "vqa")


def test_every_evaluation_has_its_row_in_tasks():
    """A function of Eval, and sets of method names, any of which is enough."""
    for task, (function, ways, _, _) in ev.TASKS.items():
        assert callable(function) and ways and all(isinstance(names, tuple) for names in ways), task


def test_seeded_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with ev.seeded(1, torch.device("cpu")):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with ev.seeded(1, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)


# --------------------------------------------------------------------------------------------------
# The evaluations around a tiny model
#
# Picture i is a grey square of level 10 * i, and the word of caption j says which row of the tables
# it is: what the model must find is known without it.

PIXELS = dict(image="plain", norm="half")
VIEWS = {"pretrain": dict(source="pairs", text="caption", **PIXELS),
         "vqa": dict(source="vqa", text="question", answer="answer", **PIXELS),
         "nlvr2": dict(source="nlvr2", image2="plain", text="caption", label="label", **PIXELS)}
WORDS = [f"word{i}" for i in range(60)]
CAPTIONS = [5, 1, 6, 7, 2, 5, 5, 3, 5, 5]           # of each of the ten pictures: 44 in all


@dataclass
class Config:
    vocab_size: int = 66
    image_size: int = 8
    max_text: int = 6
    size: int = 25


def level(image):
    """(B, 3, 8, 8) -> (B,) the picture's number."""
    return ((image.mean((1, 2, 3)) * 0.5 + 0.5) * 25.5).round().long()


class Tables(nn.Module):
    """Similarities and match scores are looked up."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.cfg, self.calls = cfg, {"image": 0, "text": 0, "match": 0}
        self.images = nn.Parameter(torch.randn(cfg.size, 8, generator=g))
        self.words = nn.Parameter(torch.randn(cfg.vocab_size, 8, generator=g))
        self.pairs = nn.Parameter(torch.randn(cfg.size, cfg.vocab_size, generator=g))
        self.dropout = nn.Dropout(0.5)

    def encode_image(self, batch):
        return self.dropout(F.normalize(self.images[level(batch["image"])], dim=-1))

    def encode_text(self, batch):
        assert not torch.is_grad_enabled()
        return F.normalize(self.words[batch["text"][:, 1]], dim=-1)

    def image_states(self, batch):
        self.calls["image"] += len(batch["image"])
        return {"image_number": level(batch["image"])}

    def text_states(self, batch):
        self.calls["text"] += len(batch["text"])
        return {"text_word": batch["text"][:, 1]}

    def match(self, batch):
        """Each of U images has B/U of the texts."""
        self.calls["match"] += len(batch["text_word"])
        each = len(batch["text_word"]) // len(batch["image_number"])
        return self.pairs[batch["image_number"].repeat_interleave(each), batch["text_word"]]


class Matcher(Tables):
    """Scores pairs and has no encoders: raw batches."""
    offers = {"match"}

    def match(self, batch):
        images = level(batch["image"])
        each = len(batch["text"]) // len(images)
        return self.pairs[images.repeat_interleave(each), batch["text"][:, 1]]


class Answerer(Tables):
    offers = {"rank_answers", "predict", "gradcam"}
    longest = 3                                         # tokens of an answer: [CLS] word [SEP]

    def rank_answers(self, batch, answer_ids, answer_mask, k):
        assert "answer" not in batch and k <= len(answer_ids)
        assert answer_ids.shape == answer_mask.shape == (len(answer_ids), self.longest)
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten pictures, and files of pairs, questions and NLVR2 about them."""
    root = tmp_path_factory.mktemp("world")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "square"]
    write(root / "vocab.txt", "\n".join(vocabulary))

    # An image a line, and one caption a line, the images' captions interleaved.
    word, rows = iter(WORDS), []
    for i, count in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(root / f"{i}.png")
        captions = list(itertools.islice(word, count))
        rows.append({"image": f"{i}.png", "caption": captions})
    write_lines(root / "pairs.jsonl", rows)
    lines = []
    for k in range(max(CAPTIONS)):
        lines += [{"image": r["image"], "caption": c} for r in rows for c in r["caption"][k:k + 1]]
    write_lines(root / "lines.jsonl", lines)

    # Six annotators say word0, four say word0, word1 or word2.
    questions, notes = [], []
    for i in range(10):
        questions.append({"question_id": 100 - i, "image_id": i, "image": f"{i}.png",
                          "question": "word1"})
        answers = [{"answer": "word0"}] * 6 + [{"answer": f"word{i % 3}"}] * 4
        notes.append({"question_id": 100 - i, "answers": answers})
    write(root / "questions.json", {"questions": questions, "data_subtype": "x"})
    write(root / "annotations.json", {"annotations": notes, "data_subtype": "x"})

    rows = []
    for left, right, label, name in ((0, 1, "True", "dev-1-0-0"), (3, 2, "True", "dev-1-1-0"),
                                     (5, 4, "False", "dev-2-0-0"), (6, 1, "False", "dev-2-1-0"),
                                     (7, 8, "True", "dev-2-0-1")):
        rows.append({"identifier": name, "sentence": "word3", "label": label,
                     "left_image": f"{left}.png", "right_image": f"{right}.png"})
    write_lines(root / "nlvr2.jsonl", rows)
    return root


def info_of(world, *files, task="pretrain", **stats):
    """What config.json says of a run on these files."""
    spec = ",".join(str(world / file) for file in files)
    loop = {"data": spec, "vocab": str(world / "vocab.txt"), "rerank_k": 4, "workers": -1}
    return {"model": "tables", "task": task, "config": asdict(Config()), "stats": stats, "step": 7,
            "loop": loop}


def questions_info(world, **more):
    answers = ["word0", "word1", "word2"]
    return info_of(world, "questions.json", "annotations.json", task="vqa", answers=answers) | more


def expected(model, rule="itm", k=4, images=slice(0, 10)):
    """The same retrieval from the tables -> of the dual encoder, re-ranked."""
    owner = torch.repeat_interleave(torch.arange(10), torch.tensor(CAPTIONS))
    word = 5 + torch.arange(len(owner))
    keep = (owner >= images.start) & (owner < images.stop)
    owner, word, rows = owner[keep] - images.start, word[keep], torch.arange(10)[images]
    with torch.no_grad():
        sim = F.normalize(model.images[rows], dim=-1) @ F.normalize(model.words[word], dim=-1).T
        new = model.pairs[rows][:, word] + (sim if rule == "sum" else 0)
    top_i, top_t = ev.shortlist(sim, k)
    places = ev.reranked(sim, owner, top_i, top_t, new.gather(1, top_i), new.T.gather(1, top_t))
    return ev.recall(sim, owner), ev.summary(*places)


@pytest.mark.parametrize("rule", ["itm", "sum"])
@pytest.mark.parametrize("file, pairs", [("pairs.jsonl", 7), ("lines.jsonl", 100)])
def test_retrieval_is_what_the_tables_say(world, file, pairs, rule, capsys):
    """With 100 pairs at a time several images are matched together."""
    model = Tables(Config()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = ev.evaluate(model, info_of(world, file), "retrieval",
                      {"rerank": rule, "batch_size": 3, "pairs": pairs})
    dual, reranked = expected(model, rule)
    names = [r["scores"] for r in out["rows"]]
    assert names == ["chance", "dual encoder", f"re-ranked, {rule}, k=4"]
    assert {k: out["rows"][1][k] for k in dual} == pytest.approx(dual)
    assert out["metrics"] == pytest.approx(reranked)

    # The model is left as it was.
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    # States are computed once, and a pair of both shortlists is scored once.
    assert model.calls["image"] == 10 and model.calls["text"] == 44
    assert model.calls["match"] <= 4 * 10 + 4 * 44

    protocol = out["protocol"]
    assert protocol["captions"] == 44 and protocol["images"] == 10 and protocol["split"] == "test"
    assert ev.RULES[rule] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("file", ["pairs.jsonl", "lines.jsonl"])
def test_the_first_captions_of_each_image(world, file):
    """--captions 2, whether an image's captions stand in one record or in several."""
    model = Tables(Config())
    out = ev.evaluate(model, info_of(world, file), "retrieval", {"captions": 2, "rerank": "none"})
    counts = torch.tensor(CAPTIONS)
    firsts = counts.cumsum(0) - counts
    kept = torch.cat([first + torch.arange(min(2, c)) for first, c in zip(firsts, CAPTIONS)])
    owner = torch.arange(10).repeat_interleave(counts.clamp(max=2))
    with torch.no_grad():
        sim = F.normalize(model.images[:10], dim=-1) @ F.normalize(model.words[5 + kept], dim=-1).T
    assert out["metrics"] == pytest.approx(ev.recall(sim, owner))
    assert out["protocol"]["captions"] == len(kept)
    assert out["protocol"]["captions_kept"] == "the first 2 of each image"
    with pytest.raises(SystemExit, match="--captions 0: at least 1"):
        ev.evaluate(model, info_of(world, file), "retrieval", {"captions": 0})


def test_folds_rerank_within_the_fold(world):
    model = Tables(Config())
    out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"folds": 5})
    folds = [expected(model, images=slice(2 * f, 2 * f + 2)) for f in range(5)]
    assert [r["images"] for r in out["rows"]] == ["all 10"] * 3 + ["2, mean of 5 folds"] * 3
    for way, row in enumerate(out["rows"][4:]):
        want = ev.average([fold[way] for fold in folds])
        assert {k: row[k] for k in want} == pytest.approx(want)
        assert want["rsum"] == pytest.approx(sum(want[k] for k in want if "_r" in k))


def test_a_pair_of_two_galleries_is_scored_once(world):
    """With k beyond every gallery all 440 pairs are wanted, those within a fold twice."""
    model = Tables(Config())
    ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"folds": 5, "rerank_k": 99})
    assert model.calls["match"] == 440


def test_k_beyond_the_gallery_and_no_reranking(world):
    model, info = Tables(Config()), info_of(world, "pairs.jsonl")
    out = ev.evaluate(model, info, "retrieval", {"rerank_k": 1000})
    assert out["metrics"] == pytest.approx(expected(model, k=1000)[1])
    assert out["protocol"]["rerank_k"] == [44, 10]
    for opts in ({"rerank": "none"}, {"rerank_k": 0}):
        out = ev.evaluate(model, info, "retrieval", opts)
        assert out["metrics"] == pytest.approx(expected(model)[0]) and len(out["rows"]) == 2


def test_a_model_without_encoders_scores_every_pair(world):
    model = Matcher(Config())
    out = ev.evaluate(model, info_of(world, "pairs.jsonl"), "retrieval", {"pairs": 13})
    owner = torch.repeat_interleave(torch.arange(10), torch.tensor(CAPTIONS))
    assert out["metrics"] == pytest.approx(ev.recall(model.pairs[:10, 5:49].detach(), owner))
    assert "all 440 pairs" in out["rows"][1]["scores"]


def test_vqa_writes_every_question_once_and_scores_it(world, tmp_path):
    info = questions_info(world, path=str(tmp_path))
    out = ev.evaluate(Answerer(Config()), info, "vqa", {"batch_size": 4})
    written = json.loads((tmp_path / "vqa-questions-test_results.json").read_text())
    assert sorted(r["question_id"] for r in written) == list(range(91, 101))
    answers = {r["question_id"]: r["answer"] for r in written}
    assert answers == {100 - i: f"word{i % 3}" for i in range(10)}
    # 6 or 4 annotators of 10 suffice.
    assert out["metrics"] == pytest.approx({"accuracy": 100.0, "baseline": 100.0})
    saved = json.loads((tmp_path / "eval-vqa-questions-test.json").read_text())
    assert saved["protocol"]["answers"] == 3


@pytest.mark.parametrize("text", ["word1\nword0\n", '["word1", "word0"]'])
def test_vqa_with_another_answer_list(world, tmp_path, text):
    few = write(tmp_path / "few.txt", text)
    out = ev.evaluate(Answerer(Config()), questions_info(world), "vqa", {"answers": str(few)})
    assert out["metrics"] == pytest.approx({"accuracy": 60, "baseline": 30})


def test_vqa_answers_are_padded_to_the_longest(world, tmp_path):
    model = Answerer(Config())
    model.longest = 4
    few = write(tmp_path / "few.txt", "word1\nword0 word2\n")
    ev.evaluate(model, questions_info(world), "vqa", {"answers": str(few)})


def test_vqa_without_annotations_has_no_metrics(world):
    """As the test split of VQA v2."""
    info = info_of(world, "questions.json", task="vqa", answers=["word0", "word1", "word2"])
    out = ev.evaluate(Answerer(Config()), info, "vqa")
    assert out["metrics"] == {} and out["rows"][0]["questions"] == 10


@pytest.mark.parametrize("text, message", [(None, "No such file"), ("[1, ", "few.txt")])
def test_answer_lists_that_cannot_be_read_are_one_line(tmp_path, text, message):
    if text:
        write(tmp_path / "few.txt", text)
    with pytest.raises(data.DataError, match=message) as error:
        data.read_answers(str(tmp_path / "few.txt"))
    assert "\n" not in str(error.value)


def test_nlvr2_accuracy_baseline_consistency(world):
    info = info_of(world, "nlvr2.jsonl", task="nlvr2")
    out = ev.evaluate(Answerer(Config()), info, "nlvr2", {"batch_size": 2})
    wanted = {"accuracy": 80, "baseline": 60, "consistency": 200 / 3}
    assert out["metrics"] == pytest.approx(wanted)
    assert out["protocol"]["classes"] == {0: "False", 1: "True"}


def test_gradcam_draws_any_picture(world, tmp_path):
    Image.new("RGB", (301, 157), "red").save(tmp_path / "a.jpg")
    opts = {"image": str(tmp_path / "a.jpg"), "text": "word1 word2",
            "out": str(tmp_path / "map.png")}
    out = ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "gradcam", opts)
    assert out["rows"][0]["words"] == 2 and out["rows"][0]["grid"] == "2x2"
    # The picture, the sentence, two words.
    assert Image.open(tmp_path / "map.png").size[0] == 4 * 200 + 8


@pytest.mark.parametrize("opts, message", [
    ({}, "--image"), ({"image": "no.jpg", "text": "word1"}, "no.jpg"),
    ({"image": "0.png", "text": "word1"}, "name the PNG with --out")])
def test_gradcam_without_a_readable_picture_is_one_line(world, opts, message, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match=message) as error:
        ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "gradcam", opts)
    assert "\n" not in str(error.value)


def test_pointing_measures_the_mass_in_the_box(world, tmp_path):
    row = {"image": str(world / "1.png"), "caption": "square word1",
           "boxes": [[0, 0, 4, 4], [4, 4, 8, 8]], "labels": [0, 1],
           "label_names": ["square", "other"]}
    file = write(tmp_path / "boxes.jsonl", row)
    out = ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "pointing",
                      {"data": str(file)})
    assert out["metrics"] == {"inside the box": 75, "uniform": 25, "ratio": 3,
                              "peak in the box": 100}


def distributed_job(rank, world, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=2)
    few = {"batch_size": 3}
    picture = {"image": str(world / "5.png"), "text": "word1", "out": str(results / f"{rank}.png")}
    jobs = {"retrieval": (Tables, "retrieval", info_of(world, "lines.jsonl"), few),
            "vqa": (Answerer, "vqa", questions_info(world, path=str(results)), few),
            "one": (Tables, "retrieval", info_of(world, "pairs.jsonl"), {"limit": 1}),
            "gradcam": (Answerer, "gradcam", info_of(world, "pairs.jsonl"), picture)}
    out = {}
    for name, (model, task, info, opts) in jobs.items():
        out[name] = ev.evaluate(model(Config()), info, task, opts, rank, 2)["metrics"]
    torch.save(out, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(world, tmp_path):
    port = 29400 + random.SystemRandom().randrange(1000)
    torch.multiprocessing.spawn(distributed_job, (world, port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    assert first["retrieval"] == pytest.approx(expected(Tables(Config()))[1])
    assert first["vqa"]["accuracy"] == pytest.approx(100)
    assert first["one"]["i2t_r1"] == 100                            # rank 1 had no picture

    # One process writes.
    written = json.loads((tmp_path / "vqa-questions-test_results.json").read_text())
    assert sorted(r["question_id"] for r in written) == list(range(91, 101))
    assert (tmp_path / "0.png").exists() and not (tmp_path / "1.png").exists()


# --------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize("task, opts, message", [
    ("vqa", {}, r"vqa.*offers: retrieval"), ("nope", {}, "nope.*known: retrieval"),
    ("retrieval", {"folds": 11}, "--folds 11"), ("speed", {"sizes": "4,x"}, "--sizes 4,x"),
    ("speed", {"sizes": "0,4"}, "--sizes 0,4"), ("speed", {"sizes": "99"}, "has 10 pictures"),
    ("retrieval", {"candidates": 3}, "--candidates_from RUN"),
    ("retrieval", {"data": "missing.json"}, "missing.json"),
    ("retrieval", {"vocab": "no.txt"}, "no.txt")])
def test_what_the_user_can_get_wrong_is_one_line(world, task, opts, message):
    with pytest.raises(SystemExit, match=message) as error:
        ev.evaluate(Tables(Config()), info_of(world, "pairs.jsonl"), task, opts)
    assert "\n" not in str(error.value)


def test_a_vocabulary_of_another_size_is_refused(world):
    with pytest.raises(weights.Stop, match="66 tokens, the run has 70"):
        ev.evaluate(Tables(Config(vocab_size=70)), info_of(world, "pairs.jsonl"), "retrieval")


def test_data_of_another_kind_must_be_named(world):
    """A run on pairs has no questions of its own."""
    with pytest.raises(weights.Stop, match="reads vqa, the run's data are pairs"):
        ev.evaluate(Answerer(Config()), info_of(world, "pairs.jsonl"), "vqa")


# --------------------------------------------------------------------------------------------------
# Runs: their files, and the command line

class Tied(nn.Module):
    def __init__(self, cfg=None, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.embed, self.out = cfg, nn.Embedding(5, 3), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("empty", torch.zeros(0))


def test_weights_survive_the_round_trip_and_stay_tied(tmp_path):
    model, other, file = Tied(), Tied(), tmp_path / "w.safetensors"
    model.ptr += 3
    weights.save_model(torch.nn.Sequential(), tmp_path / "none.safetensors")
    weights.save_model(torch.compile(model, backend="eager"), file)
    assert sorted(weights.read_run(file)) == ["embed.weight", "empty", "out.bias", "ptr"]
    weights.load_weights(other, file)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.out.weight is other.embed.weight and other.ptr == 3


def refused(match, call, *args):
    with pytest.raises(weights.Stop, match=match) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path):
    file = tmp_path / "w.safetensors"
    refused("no such file", weights.load_weights, Tied(), file)
    weights.save_model(Tied(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    refused("damaged|cannot be read|not a whole", weights.load_weights, Tied(), file)
    file.write_bytes(whole)
    refused("images is missing.*unknown", weights.load_weights, Tables(Config()), file)
    weights.save_model(nn.Linear(2, 2), file)
    refused(r"weight is \(2, 2\), not \(3, 3\)", weights.load_weights, nn.Linear(3, 3), file)


def test_damaged_runs_are_one_line(tmp_path):
    config = tmp_path / "config.json"
    refused("no config.json", weights.load_run, tmp_path)
    write(config, "{")
    refused("damaged", weights.load_run, tmp_path)
    write(config, {"model": "nope", "task": "pretrain", "config": {}})
    refused("no models/nope.py; there are: ", weights.load_run, tmp_path)


def test_a_run_is_loaded_and_evaluated_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    module = sys.modules[__name__]
    monkeypatch.setattr(weights, "load_module", lambda name: module)
    monkeypatch.setattr(module, "Model", Tables, raising=False)
    monkeypatch.setattr(module, "EVALS", {"pretrain": ("retrieval",)}, raising=False)
    run = tmp_path / "run" / "stage-2"
    run.mkdir(parents=True)
    write(run / "config.json", info_of(world, "pairs.jsonl"))
    weights.save_model(Tables(Config()), run / "model.safetensors")

    # The run's own evaluations, on its own data.
    out = ev.main([str(tmp_path / "run")])
    assert out["retrieval"]["metrics"] == pytest.approx(expected(Tables(Config()))[1])
    protocol = json.loads((run / "eval-retrieval-pairs-test.json").read_text())["protocol"]
    assert len(protocol["sha256"]) == 64 and protocol["step"] == 7 and protocol["world_size"] == 1
    assert "in domain, TRAINED ON THESE PICTURES, pre-trained only" in protocol["protocol"]
    assert "i2t R@1" in capsys.readouterr().out

    # Other data.
    out = ev.main([str(tmp_path / "run"), "--data", str(world / "lines.jsonl"), "--limit", "5"])
    protocol = out["retrieval"]["protocol"]
    assert protocol["records"] == 5 and "zero-shot" in protocol["protocol"]


# --------------------------------------------------------------------------------------------------
# Runs of the real models, as a user evaluates them

@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A few pictures in the official formats, vocabulary and clips; no built-in world is drawn."""
    root, g = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    (root / "features").mkdir()
    rows, lists, videos, clips, graded = [], [], [], [], []

    def sentence():
        return " ".join(g.choice(list("abcdefgh"), 4))

    for i in range(12):
        pixels = g.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        data.Image.fromarray(pixels).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [sentence(), sentence()]})
        lists.append(f"some/where/{i}.png {1 - i % 2} {i % 2} {int(i % 3 == 0)}")
        frames = g.normal(size=(3 + i * 4, 18)).astype(np.float32)              # 3 to 47 frames
        np.save(root / "features" / f"v{i}.npy", frames)
        videos.append({"video_id": f"v{i}", "split": "train" if i < 8 else "test"})
        clips += [{"video_id": f"v{i}", "caption": sentence()} for _ in range(2)]
        graded.append(f"news\tx\t1\t{i}\t{i % 6}\t{sentence()}\t{' '.join('abcdefgh'[:1 + i % 6])}")
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "clips.json").write_text(json.dumps({"videos": videos, "sentences": clips}))
    (root / "sts-test.csv").write_text("\n".join(graded) + "\n")

    # one picture without a label in database and test list
    (root / "lists").mkdir()
    for name, part in (("train", lists), ("database", [*lists[4:], "11.png 0 0 0"]),
                       ("test", [*lists[:4], "10.png 0 0 0"])):
        (root / "lists" / f"{name}.txt").write_text("\n".join(part) + "\n")
    return root


SMALL = ("--batch_size 4 --steps 2 --image_size 32 --width 16 --embed_dim 16 --te_heads 2 "
         "--heads 2 --text_layers 1 --log_every 1".split())


def trained(letters, out, *flags):
    return train.main(["--model", "cookie", "--vocab", str(letters / "vocab.txt"),
                       "--hold_out", "0", "--out", str(out), *SMALL, *map(str, flags)])


@pytest.fixture(scope="module")
def two_runs(letters, tmp_path_factory):
    """Directories of two different COOKIE models, trained for two steps a stage."""
    root = tmp_path_factory.mktemp("runs")
    pairs = ("--data", letters / "pairs.jsonl", "--evals", "none")
    trained(letters, root / "a", *pairs)
    trained(letters, root / "b", *pairs, "--ws_layers", 0, "--tav_layers", 0, "--pooling", "gpo",
            "--seed", 1)
    return str(root / "a"), str(root / "b")


def test_ensemble_is_the_mean_similarity(letters, two_runs):
    a, b = two_runs
    alone = ev.main([a, "--task", "retrieval"])["retrieval"]
    there = weights.find_run(b) / "config.json"
    info = json.loads(there.read_text())

    # Whatever b was trained on: one gallery.
    loop = {**info["loop"], "data": "another.json"}
    there.write_text(json.dumps({**info, "loop": loop}))
    both = ev.main([a, "--task", "retrieval", "--ensemble", a, b])["retrieval"]
    assert "mean similarity of 2 runs" in [r["scores"] for r in both["rows"]]
    assert len(both["protocol"]["ensemble"]) == 2

    # The same by hand.
    sims = []
    for path in (a, b):
        model, of_run = weights.load_run(path)
        opts = vars(ev.parser().parse_args([path])) | {"data": str(letters / "pairs.jsonl")}
        one = ev.Eval(model, of_run, "retrieval", argparse.Namespace(**opts), 0, 1)
        records = one.open()
        with torch.no_grad():
            image = torch.cat([model.encode_image(b) for b in one.batches(records, "image")])
            text = torch.cat([model.encode_text(b) for b in one.batches(records, "text")])
        sims.append(image @ text.T)

    owner = torch.arange(12).repeat_interleave(2)
    assert both["metrics"] == ev.recall(sum(sims) / 2, owner)
    assert not torch.equal(sims[0].argsort(), sims[1].argsort())
    assert both["metrics"] != ev.recall(sims[0], owner)
    assert alone["protocol"]["protocol"].startswith("in domain, TRAINED ON THESE PICTURES, pre")
    with pytest.raises(SystemExit, match="at least one other"):
        ev.main([a, "--task", "retrieval", "--ensemble", a])


def test_attention_pictures(letters, two_runs, tmp_path):
    a, b = two_runs
    shown = ev.main([a, "--task", "attention", "--beside", b, "--data",
                     str(letters / "pairs.jsonl")])["attention"]
    picture = data.Image.open(shown["protocol"]["file"])
    assert len(shown["rows"]) == 2 and picture.width == 3 * 266 + 10
    assert len(shown["rows"][1]["top words"].split(", ")) <= 5
    ev.main([a, "--task", "attention", "--image", str(letters / "3.png"), "--text", "a b c",
             "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()


def test_speed_of_two_dual_encoders(letters, two_runs):
    a, b = two_runs
    timed = ev.main([a, "--task", "speed", "--sizes", "2,4,8", "--beside", b])["speed"]
    assert len(timed["rows"]) == 6 and len(timed["metrics"]) == 2
    assert all(float(r["seconds"]) > 0 for r in timed["rows"])


def test_sts_of_a_run(letters, two_runs):
    a, _ = two_runs
    with pytest.raises(SystemExit, match="name files with --data"):
        ev.main([a, "--task", "sts"])
    graded = ev.main([a, "--task", "sts", "--data", str(letters / "sts-test.csv")])["sts"]
    assert [r["scores"] for r in graded["rows"]] == ["bag of words", "model"]
    assert graded["rows"][0]["pairs"] == 12
    assert "pre-trained only" in graded["protocol"]["protocol"]
    assert graded["protocol"]["vector"] == "mean of layer 2 of the WS-TE over all tokens"


def test_speed_of_a_model_that_scores_pairs(letters, tmp_path):
    """Any model with match(): here CODIS' own, of which both ways are timed."""
    train.main(["--model", "codis", "--data", str(letters / "pairs.jsonl"),
                "--vocab", str(letters / "vocab.txt"), "--out", str(tmp_path / "c"),
                "--hold_out", "0",
                "--steps", "0", "--batch_size", "4", "--evals", "none", "--image_size", "24",
                "--vision_layers", "1", "--queue_size", "8", "--codewords", "8"])
    rows = ev.main([str(tmp_path / "c"), "--task", "speed", "--sizes", "2,6"])["speed"]["rows"]
    assert [r["way"] for r in rows] == ["dual encoder"] * 2 + ["match, every pair"] * 2

    # all 3 x 6 pairs, in order
    model, info = weights.load_run(tmp_path / "c")
    opts = argparse.Namespace(**vars(ev.parser().parse_args([""])) | {"pairs": 5})
    one = ev.Eval(model, info, "retrieval", opts, 0, 1)
    records = one.open().subset(range(3))
    images, texts = (list(one.batches(records, what)) for what in ("image", "text"))
    row, column = torch.arange(18) // 6, torch.arange(18) % 6
    pairs = {"image": torch.cat([b["image"] for b in images])[row]}
    for key in ("text", "text_mask"):
        pairs[key] = torch.cat([b[key] for b in texts])[column]
    with torch.no_grad():
        close(ev.score_pairs(one, images, texts), model.match(pairs), 1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_growth(two_runs, power, monkeypatch):
    """Of seconds that grow with n and with n^2, after a first call that is not counted."""
    seconds = iter([0.5 * n ** power for n in (2, 4, 12)])
    monkeypatch.setattr(ev, "timed", lambda fn, device, repeats: next(seconds))
    result = ev.main([two_runs[0], "--task", "speed", "--sizes", "2,12,4"])["speed"]
    assert [r["growth"] for r in result["rows"]] == [None] + [f"{power:.2f}"] * 2
    assert [r["pictures"] for r in result["rows"]] == [2, 4, 12]
    assert [r["captions"] for r in result["rows"]] == [4, 8, 24]
    close(list(result["metrics"].values())[0], float(power), 1e-6)


def test_evaluation_of_clips(letters, tmp_path):
    clips = ("--data", letters / "clips.json")
    result = trained(letters, tmp_path / "gpo", "--task", "vtm", "--pooling", "gpo", *clips)["vtm"]
    assert result["protocol"]["lists"] == "full" and "clips" in result["rows"][0]

    np.save(letters / "features" / "v8.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(SystemExit, match="5 features a frame"):
        ev.main([str(tmp_path / "gpo")])


def test_evaluation_of_hash_codes(letters, tmp_path):
    lists = letters / "lists"
    result = trained(letters, tmp_path / "h", "--task", "hashing", "--bits", 8,
                     "--image_root", letters, "--data", lists)["hashing"]
    assert result["protocol"]["left_out_without_label"] == [1, 1]
    random_codes, model = result["rows"]
    assert random_codes["codes"] == "random codes"
    assert model["queries"] == 4 and model["database"] == 8
    assert 0 < result["metrics"]["map"] <= 100

    given = [str(tmp_path / "h"), "--data", str(lists / "test.txt")]
    again = ev.main([*given, "--database", str(lists / "database.txt"),
                     "--image_root", str(letters)])["hashing"]
    assert again["metrics"] == result["metrics"]
    with pytest.raises(SystemExit, match="--database"):
        ev.main(given)


# A model without encoders that looks at stored regions

@pytest.fixture(scope="module")
def region_file(letters, tmp_path_factory):
    """Two regions of each of the twelve pictures, with random features."""
    g = np.random.default_rng(0)

    def look(n):
        return {"name": f"{n}.png", "size": (32, 32), "boxes": [[0, 0, 16, 32], [16, 0, 32, 32]],
                "labels": g.integers(0, 2, 2), "scores": np.array([0.9, 0.8]),
                "features": g.standard_normal((2, 6))}

    file = str(tmp_path_factory.mktemp("regions") / "r.safetensors")
    about = {"detector": "a test", "root": str(letters), "label_names": '["a", "b"]'}
    regions.collect_regions(file, range(12), 12, look, about, quiet=True)
    return file


@pytest.fixture(scope="module")
def region_run(letters, region_file, tmp_path_factory):
    """The directory of an untrained ImageBERT."""
    out = str(tmp_path_factory.mktemp("runs") / "regions")
    train.main(["--model", "imagebert", "--data", str(letters / "pairs.jsonl"),
                "--vocab", str(letters / "vocab.txt"), "--regions", region_file, "--out", out,
                "--hold_out", "0",
                "--steps", "0", "--batch_size", "4", "--workers", "0", "--evals", "none",
                "--width", "16", "--layers", "1", "--heads", "2"])
    return out


def score_one_by_one(letters, region_file, model):
    """match() of every image and caption, one pair at a time -> (12, 24), owner."""
    views = ev.module_of(model).VIEWS["pretrain"]
    records = data.open_source("pairs", str(letters / "pairs.jsonl"), "test")
    records = data.with_regions(records, views, region_file)
    tokenizer, regions_ = data.get_tokenizer(letters / "vocab.txt"), model.cfg.max_regions
    samples = data.Views(records, views, tokenizer, None, model.cfg.max_text, train=False,
                         max_regions=regions_)
    sim = torch.zeros(12, 24)
    for i, c in itertools.product(range(12), range(24)):
        text = samples.sample(c // 2, caption=c % 2)[0]
        pair = samples.sample(i)[0] | {key: text[key] for key in ("text", "text_mask")}
        with torch.no_grad():
            sim[i, c] = model.match(data.collate([pair]))
    return sim, data.flat_captions(records)[1]


def test_all_pairs_of_a_region_model_are_scored(letters, region_file, region_run):
    every = ev.main([region_run, "--task", "retrieval", "--pairs", "7"])["retrieval"]
    want = ev.recall(*score_one_by_one(letters, region_file, weights.load_run(region_run)[0]))
    assert every["metrics"] == pytest.approx(want)
    assert every["protocol"]["regions"] == "a test"
    assert every["rows"][1]["scores"] == "match, all 288 pairs"


def test_a_shortlist_of_another_run(letters, two_runs, region_run):
    """A shortlist of everything gives what scoring every pair gives."""
    opts, dual = [region_run, "--task", "retrieval"], two_runs[0]
    every = ev.main(opts)["retrieval"]
    full = ev.main([*opts, "--candidates", "99", "--candidates_from", dual])["retrieval"]
    assert full["metrics"] == pytest.approx(every["metrics"])

    # A short one says whose it is.
    some = ev.main([*opts, "--candidates", "2", "--candidates_from", dual])["retrieval"]
    there = str(weights.find_run(dual))
    assert some["protocol"]["candidates_from"] == there
    assert some["protocol"]["rerank_k"] == [2, 2]
    names = [row["scores"] for row in some["rows"]]
    assert names == ["chance", f"dual encoder of {there}", "re-ranked, itm, k=2"]
    with pytest.raises(weights.Stop, match="has no dual encoder"):
        ev.main([*opts, "--candidates", "2", "--candidates_from", region_run])


@pytest.mark.parametrize("pairs", [1, 3, 7, 512])
def test_images_are_grouped_by_their_captions(pairs):
    """Every wanted pair and no other, few of them twice, at most `pairs` at a time."""
    g = torch.Generator().manual_seed(3)
    wanted = torch.rand(9, 20, generator=g) < torch.linspace(0, 1, 9)[:, None]
    found = []
    for images, captions in ev.image_groups(wanted, pairs):
        assert captions.numel() <= pairs and len(images) == len(captions)
        found += [(i, c) for i, row in zip(images.tolist(), captions.tolist()) for c in row]
    assert set(found) == {tuple(pair) for pair in wanted.nonzero().tolist()}
    assert len(found) <= 1.5 * int(wanted.sum())


def test_masked_without_a_hidden_place_is_a_row_of_none(world, monkeypatch):
    """The truth is -100 at every place: nothing to divide by."""
    class Guesser(Tables):
        offers = {"masked_predictions"}

        def masked_predictions(self, batch):
            places = torch.full((len(batch["text"]), 3), -100)
            return {"mlm": (places.clamp(min=0), places)}

    result = ev.evaluate(Guesser(Config()), info_of(world, "pairs.jsonl"), "masked", {})
    assert result["rows"] == [{"hidden": "mlm", "places": 0}] and result["metrics"] == {}


def test_masked_places_are_the_same_in_every_evaluation(region_run):
    first, again = (ev.main([region_run, "--task", "masked"])["masked"] for _ in range(2))
    assert first["metrics"] == again["metrics"]
    assert set(first["metrics"]) == {"mlm", "mlm_baseline", "moc", "moc_baseline"}


def test_regions_of_another_detector_are_refused(letters, region_run, tmp_path):
    def look(n):
        return {"name": f"{n}.png", "size": (32, 32), "boxes": [[0, 0, 9, 9]], "labels": [0],
                "scores": [1.0], "features": np.zeros((1, 5))}

    file = str(tmp_path / "r.safetensors")
    about = {"detector": "another", "root": str(letters), "label_names": '["a", "b"]'}
    regions.collect_regions(file, range(12), 12, look, about, quiet=True)
    with pytest.raises(weights.Stop, match="region_dim is 5, the run was trained with 6"):
        ev.main([region_run, "--task", "retrieval", "--regions", file])


def test_speed_beside_a_one_stream_model_of_regions(two_runs, region_run, region_file):
    """Figure 4's other side: a model without encoders beside a dual encoder."""
    result = ev.main([two_runs[0], "--task", "speed", "--sizes", "2,4", "--beside", region_run,
                      "--regions", region_file])["speed"]
    rows = [(row["way"], row["pictures"], row["captions"]) for row in result["rows"]]
    assert rows == [("dual encoder", 2, 4), ("dual encoder", 4, 8),
                    ("match, every pair", 2, 4), ("match, every pair", 4, 8)]
    assert result["protocol"]["not_counted"] == "reading files, making regions"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 24 little pictures, two captions each, 16 train, 8 val, and a vocabulary."""
    root = tmp_path_factory.mktemp("photos")
    words = "a red green blue grey square circle on top of the dark light one two three".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "vocab.txt").write_text("\n".join(tokens) + "\n")

    generator = torch.Generator().manual_seed(0)
    with open(root / "pairs.jsonl", "w") as f:
        for i in range(24):
            color = torch.randint(0, 255, (3,), generator=generator).tolist()
            Image.new("RGB", (40, 32), tuple(color)).save(root / f"{i}.png")
            drawn = torch.randint(0, len(words), (2, 5), generator=generator).tolist()
            captions = [" ".join(words[j] for j in row) for row in drawn]
            split = "train" if i < 16 else "val"
            print(json.dumps({"image": f"{i}.png", "split": split, "caption": captions}), file=f)
    return root


def untrained(name, photos, out):
    """`--steps 0` writes the run of an untrained model -> its directory."""
    train.main(["--model", name, "--data", str(photos / "pairs.jsonl"), "--image_root", str(photos),
                "--vocab", str(photos / "vocab.txt"), "--batch_size", "8", "--workers", "0",
                "--steps", "0", "--evals", "none", "--eval_split", "val", "--out", str(out)])
    return str(out)


def gallery(run, *flags):
    return ev.main([run, "--task", "gallery", "--split", "val", *flags])["gallery"]


@pytest.fixture(scope="module")
def conlip_run(photos, tmp_path_factory):
    return untrained("conlip", photos, tmp_path_factory.mktemp("runs") / "run")


def test_gallery_finds_what_belongs_together(conlip_run, photos):
    record = json.loads((photos / "pairs.jsonl").read_text().splitlines()[17])
    shown = gallery(conlip_run, "--text", record["caption"][1], "--image", str(photos / "20.png"))
    rank = shown["metrics"]["rank of the true image"]
    assert 1 <= rank <= 8 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert len(shown["rows"]) == 10 and Image.open(shown["protocol"]["file"]).width > 900

    # the five nearest pictures, with the true one among them where its rank allows
    true = [row["rank"] for row in shown["rows"][:5] if row["true"] == "yes"]
    assert true == ([rank] if rank <= 5 else [])


def test_gallery_of_a_query_that_is_not_in_the_data(conlip_run):
    shown = gallery(conlip_run, "--text", "no caption of theirs")
    assert shown["metrics"]["rank of the true image"] is None
    assert {row["true"] for row in shown["rows"]} == {"unknown"}


@pytest.mark.parametrize("flags, message", [([], "ask with a text"),
                                            (["--image", "nowhere.png"], "nowhere.png")])
def test_gallery_without_a_readable_query_is_one_line(conlip_run, flags, message):
    with pytest.raises(SystemExit, match=message):
        gallery(conlip_run, *flags)


@pytest.mark.parametrize("name", ["codis", "cookie", "mct"])
def test_gallery_of_the_other_two_tower_models(name, photos, tmp_path):
    run = untrained(name, photos, tmp_path / "run")
    shown = gallery(run, "--text", "a red square", "--image", str(photos / "20.png"))
    assert len(shown["rows"]) == 10 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert list(tmp_path.rglob("gallery-pairs-val-*.png"))


# --------------------------------------------------------------------------------------------------
# Names of results, and writing them

def stem_of(world, tmp_path, task="retrieval", file="pairs.jsonl", **opts):
    """What the results of an evaluation of the tables are called."""
    info = info_of(world, file) | {"path": str(tmp_path)}
    ev.evaluate(Tables(Config()), info, task, opts)
    return sorted(path.name for path in tmp_path.glob("eval-*.json"))


def test_no_result_replaces_another(world, tmp_path):
    """Every option that decides about the numbers is in the name; what was asked for twice is one
    file."""
    for opts in ({}, {}, {"limit": 5}, {"captions": 1}, {"rerank": "none"}, {"rerank_k": 2},
                 {"folds": 2}, {"vocab": str(world / "vocab.txt")}, {"dtype": "bfloat16"},
                 {"split": "val"}, {"workers": 0, "batch_size": 3}):
        stem_of(world, tmp_path, **opts)
    assert stem_of(world, tmp_path, data=str(world / "lines.jsonl")) == [
        "eval-retrieval-lines-test.json", "eval-retrieval-pairs-test-captions_1.json",
        "eval-retrieval-pairs-test-dtype_bfloat16.json", "eval-retrieval-pairs-test-folds_2.json",
        "eval-retrieval-pairs-test-limit_5.json", "eval-retrieval-pairs-test-rerank_k_2.json",
        "eval-retrieval-pairs-test-rerank_none.json",
        "eval-retrieval-pairs-test-vocab_vocab.txt.json", "eval-retrieval-pairs-test.json",
        "eval-retrieval-pairs-val.json"]


def test_another_file_of_the_same_name_is_another_result(world, tmp_path):
    """In any spelling the same file is the same result; one in another folder is not."""
    there = tmp_path / "there"
    there.mkdir()
    write(there / "pairs.jsonl", (world / "pairs.jsonl").read_text())
    (tmp_path / "link").symlink_to(world)
    out = tmp_path / "run"
    out.mkdir()
    stem_of(world, out)
    assert len(stem_of(world, out, data=str(tmp_path / "link" / "pairs.jsonl"))) == 1
    for _ in range(2):
        names = stem_of(world, out, data=str(there / "pairs.jsonl"), image_root=str(world))
    assert len(names) == 2 and re.fullmatch(r"eval-retrieval-pairs-test-\w{8}\.json", names[0])
    kept = json.loads((out / "eval-retrieval-pairs-test.json").read_text())
    assert kept["protocol"]["data"] != str(there / "pairs.jsonl")


def test_a_result_that_cannot_be_written_is_printed_first(world, tmp_path, capsys):
    info = info_of(world, "pairs.jsonl") | {"path": str(tmp_path / "gone")}
    with pytest.raises(weights.Stop, match="gone/eval-retrieval-pairs-test.json: not written"):
        ev.evaluate(Tables(Config()), info, "retrieval")
    assert "dual encoder" in capsys.readouterr().out


def test_a_result_is_whole_or_as_it_was(tmp_path):
    """A full disk in the middle leaves the old file, and nothing beside it."""
    def half(path):
        path.write_text("ha")
        raise OSError(28, "No space left on device")

    file = write(tmp_path / "eval-x.json", "old")
    with pytest.raises(weights.Stop, match="No space left"):
        ev.write_whole(file, half)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["eval-x.json"]
    ev.write_whole(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["eval-x.json"]


# --------------------------------------------------------------------------------------------------
# What a model was trained on is said

def said(world, spec, trained, **more):
    """The protocol's words on training, and the number of records, of a run trained on `trained`
    with a hold-out of a fifth and evaluated on `spec`."""
    info = info_of(world, "pairs.jsonl")
    loop = {**info["loop"], "data": trained, "hold_out": 0.2, "split": "train", **more}
    files = sorted(ev.real_files(trained, "pairs"))
    opts = {"data": spec, "image_root": str(world), "rerank": "none", "split": more.get("asked")}
    out = ev.evaluate(Tables(Config()), info | {"loop": loop, "files": files}, "retrieval", opts)
    return out["protocol"]["protocol"], out["protocol"]["records"]


def test_the_held_out_pictures_are_evaluated(world, tmp_path, monkeypatch):
    """The run's own files, in whatever spelling and order, alone or with others: the part that was
    held out. Other files: everything."""
    pairs, lines = str(world / "pairs.jsonl"), str(world / "lines.jsonl")
    words, held = said(world, pairs, pairs)
    assert 0 < held < 10 and words.startswith(f"in domain, held out: {held} of 10 records by hash")
    (tmp_path / "link.jsonl").symlink_to(pairs)
    monkeypatch.chdir(world)
    for spec in ("pairs.jsonl", str(tmp_path / "link.jsonl"), "./pairs.jsonl"):
        assert said(world, spec, pairs) == (words, held), spec
    assert said(world, f"{lines},{pairs}", f"{pairs},{lines}")[0].startswith("in domain, held out")
    assert said(world, f"{lines},{pairs}", pairs)[0].startswith("in domain, held out")
    assert said(world, lines, pairs) == (f"zero-shot, pre-trained only, trained on {pairs}", 44)


@pytest.mark.parametrize("more", [{"hold_out": 0.0}, {"asked": "train"}])
def test_training_pictures_are_called_that(world, more):
    pairs = str(world / "pairs.jsonl")
    words, records = said(world, pairs, pairs, **more)
    assert words.startswith("in domain, TRAINED ON THESE PICTURES") and records > 0


def test_the_runs_that_a_run_began_from_count(world, tmp_path):
    """Fine-tuned on other files: what the first run was trained on is not zero-shot."""
    pairs, lines = str(world / "pairs.jsonl"), str(world / "lines.jsonl")
    info = info_of(world, "pairs.jsonl") | {"files": sorted(ev.real_files(pairs, "pairs"))}
    write(tmp_path / "config.json", info)
    words, records = said(world, pairs, lines, init=str(tmp_path))
    assert words.startswith("in domain, TRAINED ON THESE PICTURES") and records == 10
    held = {**info["loop"], "hold_out": 0.2}
    write(tmp_path / "config.json", info | {"loop": held})
    assert said(world, pairs, lines, init=str(tmp_path))[0].startswith("in domain, held out")


# --------------------------------------------------------------------------------------------------
# Checked before a training

def small_conlip(photos, out, *flags):
    return ["--model", "conlip", "--data", str(photos / "pairs.jsonl"), "--batch_size", "8",
            "--vocab", str(photos / "vocab.txt"), "--workers", "0", "--steps", "1",
            "--out", str(out), *map(str, flags)]


@pytest.mark.parametrize("flags, message", [
    (["--evals", "retreival"], "task retreival: .*known: retrieval"),
    (["--evals", "vqa"], "does not offer it; it offers: retrieval"),
    (["--evals", "gallery"], "ask with a text"),
    (["--eval_split", "dev"], "no split 'dev'"),
    (["--eval_data", "no.json"], "--eval_data no.json: no such file"),
    (["--eval_root", "nowhere"], "nowhere: no such directory"),
    (["--rerank_k", "-1"], "--rerank_k -1"), (["--eval_limit", "-1"], "--eval_limit -1: from 0 to"),
    (["--evals", "hashing"], "does not offer it"),
    (["--evals", "sts", "--eval_split", "val"], "reads sts, the run's data are pairs"),
    (["--evals", "retrieval,sts", "--eval_split", "val", "--eval_data", "{vocab}"], "vocab.txt")])
def test_evaluations_are_checked_before_the_run_begins(photos, tmp_path, flags, message):
    """One line, and the directory is not touched."""
    flags = [flag.replace("{vocab}", str(photos / "vocab.txt")) for flag in flags]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("an earlier run\n")
    with pytest.raises(SystemExit, match=message) as error:
        train.main(small_conlip(photos, tmp_path / "run", *flags))
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path / "run")) - {"lock"} == {"log.jsonl"}


def test_a_gallery_beyond_memory_is_refused_before_the_run(photos, tmp_path, monkeypatch):
    """8 pictures, 16 captions, 4 bytes: 512 bytes; with 511 free it does not begin."""
    monkeypatch.setattr(ev, "free_memory", lambda: 511)
    with pytest.raises(SystemExit, match="8 images x 16 captions x 4 bytes.*--eval_limit"):
        train.main(small_conlip(photos, tmp_path / "run", "--eval_split", "val"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(ev, "free_memory", lambda: 512)
    assert train.main(small_conlip(photos, tmp_path / "run", "--eval_split", "val"))


def test_memory_counts_what_is_held_and_who_shares_it(monkeypatch):
    one = SimpleNamespace(task="retrieval", device=torch.device("cpu"))
    monkeypatch.setattr(ev, "free_memory", lambda: 9_000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    ev.check_memory(one, 10, 100, 9)
    refused("10 images x 101 captions", ev.check_memory, one, 10, 101, 9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refused("0.0 GB are free for each process", ev.check_memory, one, 10, 51, 9)


def test_free_memory_is_the_systems():
    assert 10 ** 7 < ev.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_data_are_read_once_for_the_check_and_the_evaluation(photos, tmp_path, monkeypatch):
    """The training's own records, then those of the evaluation: read at the start, at hand at the
    end; a file that has changed since is read again."""
    ev.read_records.cache_clear()
    real, opened = data.open_source, []
    monkeypatch.setattr(data, "open_source", lambda source, spec, split, *more, **how: (
        opened.append(split), real(source, spec, split, *more, **how))[1])
    out = train.main(small_conlip(photos, tmp_path / "run"))
    assert out["retrieval"]["protocol"]["split"] == "val"
    assert opened == ["train", "test", "val"]

    rows = (photos / "pairs.jsonl").read_text()
    other = write(tmp_path / "pairs.jsonl", rows)
    command = [str(tmp_path / "run"), "--data", str(other), "--image_root", str(photos)]
    assert ev.main(command)["retrieval"]["protocol"]["records"] == 8
    write(other, rows.rpartition("\n{")[0] + "\n")
    assert ev.main(command)["retrieval"]["protocol"]["records"] == 7


# --------------------------------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("flags, message", [
    ("--task retrieval --limit 0", "--limit 0: at least 1"),
    ("--task retrieval --limit -5", "--limit -5"), ("--task retrieval --captions 0", "--captions"),
    ("--task retrieval --batch_size 0", "--batch_size 0"),
    ("--task retrieval --pairs 0", "--pairs 0"),
    ("--task retrieval --workers -2", "--workers -2: at least -1, at most 1000"),
    ("--task retrieval --rerank_k -1", "--rerank_k -1"),
    ("--task retrieval --folds 0", "--folds 0"),
    ("--task retrieval --folds -3", "--folds -3"), ("--task retrieval --folds 99", "--folds 99"),
    ("--task retrieval --candidates 0 --candidates_from x", "--candidates 0"),
    ("--task retrieval --candidates 2", "go together"),
    ("--task retrieval --candidates_from x", "go together"),
    ("--task retrieval --candidates 2 --candidates_from nowhere", "nowhere: no run here"),
    ("--task retrieval --ensemble nowhere", "nowhere: no run here"),
    ("--task retrieval --rerank itm", "--rerank needs match"),
    ("--task retrieval --vocab nowhere", "--vocab nowhere: no such file"),
    ("--task retrieval --split nowhere", "no split 'nowhere'"),
    ("--task retrieval --image_root nowhere", "nowhere: no such directory"),
    ("--task retrieval --block 1", "retrieval does not use --block; it is for gradcam, pointing"),
    ("--task retrieval --out x.png", "retrieval does not use --out"),
    ("--task sts --folds 2", "sts does not use --folds; it is for retrieval"),
    ("--folds 2 --map_at 3", "retrieval does not use --map_at; it is for hashing"),
    ("--task speed --sizes a,b", "--sizes a,b"), ("--task speed --sizes 0", "--sizes 0"),
    ("--task speed --sizes 4,", "--sizes 4,"), ("--task speed --beside nowhere", "no run here"),
    ("--task gallery --text a --out nowhere/x.png", "--out nowhere/x.png: a file in a folder"),
    ("--task gallery --text a --out x.nope", "--out x.nope: a picture's name, such as x.png"),
    ("--task gallery --image nowhere.png", "--image nowhere.png: no such file"),
    ("--task nope", "task nope"), ("--task vqa", "does not offer it")])
def test_a_flag_without_meaning_is_one_line(conlip_run, flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        ev.main([conlip_run, *flags.split()])
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("task, name, value", [
    ("hashing", "map_at", 0), ("vqa", "shortlist", 0), ("gradcam", "block", -1),
    ("probe", "probe_lr", math.nan), ("probe", "probe_lr", 0.0), ("probe", "probe_lr", math.inf),
    ("vqa", "answers", "nowhere"), ("hashing", "database", "nowhere")])
def test_a_flag_of_other_evaluations_too(task, name, value):
    refused(f"--{name} {value}", ev.options_of, task, {name: value})
    assert vars(ev.options_of("retrieval", {name: value})) == ev.DEFAULTS       # not its flag


def test_every_number_has_its_range_and_every_flag_its_reader():
    """A flag that is added must be given both."""
    flags = {action.dest: action for action in ev.parser()._actions if action.dest != "help"}
    numbers = {name for name, action in flags.items() if action.type in (int, float)}
    assert numbers == set(ev.RANGES)
    read = set(ev.ALWAYS).union(*(row.flags for row in ev.TASKS.values()))
    assert read == set(flags)


@pytest.mark.parametrize("damage, message", [
    (lambda run: (run / "model.safetensors").unlink(), "model.safetensors: no such file"),
    (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), "cannot be read as weights"),
    (lambda run: (run / "config.json").write_text('{"mod'), "config.json: damaged"),
    (lambda run: (run / "config.json").write_text("[1]"), "config.json: damaged"),
    (lambda run: shutil.rmtree(run), "no run here")])
def test_a_run_that_is_not_whole_is_one_line(conlip_run, tmp_path, damage, message):
    run = tmp_path / "run"
    shutil.copytree(conlip_run, run)
    damage(run)
    refused(message, ev.main, [str(run)])


# --------------------------------------------------------------------------------------------------
# At 80 columns, and with bad numbers

def test_a_wide_table_goes_on_below(monkeypatch):
    row = {"images": "all 1,000", "scores": "re-ranked, itm, k=16", **dict.fromkeys(
        (f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)), 100.0),
        "mean": 99.9, "rsum": 599.9, "i2t_medr": 647.0, "t2i_medr": 500.0}
    monkeypatch.setenv("COLUMNS", "80")
    lines = ev.table([row]).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split("  ") for line in lines if line.startswith("images")]
    assert len(heads) > 1 and "i2t R@1  i2t R@5  i2t R@10" in lines[0]
    for head in ev.table([row], 1000).splitlines()[0].split("  "):
        assert sum(head.strip() in [cell.strip() for cell in line] for line in heads) >= 1
    monkeypatch.delenv("COLUMNS")
    assert len(ev.table([row]).splitlines()) == 3                   # no terminal: one line a row


def test_a_long_text_loses_its_middle():
    shown = ev.table([{"run": "a" * 70 + "/the-end", "n": 5}], 80)
    assert max(map(len, shown.splitlines())) <= 80 and "...aaaaa" in shown and "the-end" in shown
    assert ev.shortened("abcdef", 6) == "abcdef" and ev.shortened("abcdefgh", 7) == "ab...gh"


def test_nan_is_no_score(world):
    """Of the model's answers, and of its weights."""
    class Broken(Answerer):
        def predict(self, batch):
            return super().predict(batch) * math.nan

    info = info_of(world, "nlvr2.jsonl", task="nlvr2")
    refused("gives NaN", ev.evaluate, Broken(Config()), info, "nlvr2")
    model = Answerer(Config())
    model.words.data[3, 3] = math.inf
    refused("words is not finite", ev.evaluate, model, info, "nlvr2")


def test_unreadable_pictures_are_counted(world, tmp_path):
    for n in range(3):
        shutil.copy(world / f"{n}.png", tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    rows = [{"image": f"{n}.png", "caption": f"word{n}"} for n in range(3)]
    file = write_lines(tmp_path / "three.jsonl", rows)
    out = ev.evaluate(Tables(Config()), info_of(world, "pairs.jsonl"), "retrieval",
                      {"data": str(file)})
    assert out["protocol"]["unreadable_images"] == 1 and out["protocol"]["images"] == 3


def test_a_file_without_records_is_one_line(world, tmp_path):
    for text in ("", '{"image": "0.png", "caption": []}'):
        file = write(tmp_path / "none.jsonl", text)
        with pytest.raises(SystemExit, match="none.jsonl") as error:
            ev.evaluate(Tables(Config()), info_of(world, "pairs.jsonl"), "retrieval",
                        {"data": str(file), "image_root": str(world)})
        assert "\n" not in str(error.value)


def test_vqa_scores_each_type_of_answer(tmp_path):
    """On the built-in world, whose annotations have official types."""
    records = data.open_source("vqa", "shapes", "test", limit=200)
    truth = {record["question_id"]: record for record in records}
    row = ev.vqa_row("x", {question: "yes" for question in truth}, truth)
    assert list(row)[3:] == ["yes/no", "number", "other"]
    by_hand = [ev.vqa_accuracy("yes", r["answers"]) for r in records if r["answer_type"] == "other"]
    assert row["other"] == pytest.approx(100 * np.mean(by_hand)) and row["yes/no"] > 20


def test_workers_mean_what_they_mean_in_training(world, monkeypatch):
    """The run's number, --workers', and for -1 one for four cores."""
    monkeypatch.setattr(ev.os, "cpu_count", lambda: 13)
    seen = []
    monkeypatch.setattr(data, "iter_eval", lambda *args, **how: seen.append(how["workers"]) or [])
    for opts, run in (({}, 2), ({"workers": 5}, 2), ({"workers": -1}, 2), ({}, -1), ({}, 0)):
        info = info_of(world, "pairs.jsonl")
        info["loop"]["workers"] = run
        one = ev.Eval(Tables(Config()), info, "retrieval", ev.options_of("retrieval", opts), 0, 1)
        list(one.batches(None, "image"))
    assert seen == [2, 5, 3, 3, 0]


# --------------------------------------------------------------------------------------------------
# Every evaluation, of a model that offers it

TINY = {
    "codis": "--vision_layers 1 --text_layers 1 --fusion_layers 2 --queue_size 16 --codewords 8",
    "conlip": "--vision_layers 1 --text_layers 1 --queue_size 16",
    "cookie": "--image_size 32 --width 16 --embed_dim 16 --te_heads 2 --heads 2 --text_layers 1",
    "imagebert": "--layers 1 --width 16 --heads 2",
    "mct": "--image_size 32 --vision_width 4 --width 24 --text_layers 1 --text_heads 3 "
           "--head_hidden 20 --queue_size 16 --rois 8 --detect_max 48"}
PICTURE = "--image datasets/shapes/images/test/000003.jpg --text square"

# evaluation -> (model, the task it was trained for, flags)
EVERY = {
    "retrieval": ("codis", "pretrain", ""), "masked": ("imagebert", "pretrain", ""),
    "vqa": ("codis", "vqa", "--shortlist 5"), "ve": ("codis", "ve", ""),
    "nlvr2": ("codis", "nlvr2", ""), "gradcam": ("codis", "pretrain", PICTURE),
    "pointing": ("codis", "pretrain", ""), "cross_attention": ("conlip", "pretrain", ""),
    "gallery": ("conlip", "pretrain", PICTURE), "vtm": ("cookie", "vtm", ""),
    "sts": ("conlip", "pretrain", ""), "hashing": ("cookie", "hashing", "--map_at 5"),
    "attention": ("cookie", "pretrain", ""), "speed": ("mct", "retrieval_gru", "--sizes 2,3"),
    "linear": ("mct", "linear", ""), "probe": ("mct", "pretrain", "--probe_lr 1"),
    "tagging": ("mct", "tag_supervised", ""), "detection": ("mct", "detection", ""),
    "segmentation": ("mct", "segmentation", "")}


@pytest.fixture(scope="module")
def every_run(tmp_path_factory):
    """(model, task) -> the directory of a tiny model that was not trained; "hashing" -> flags for
    thirty pictures, for its evaluation reads a whole database."""
    root, runs = tmp_path_factory.mktemp("every"), {}
    world = data.world_files("pairs", "test")[1]
    for name in ("test", "database"):
        lines = data.text_lines(f"{world}/hashing/{name}.txt")
        write(root / f"{name}.txt", "\n".join(itertools.islice(lines, 30)))
    runs["hashing"] = ["--data", str(root), "--image_root", world]
    for model, task, _ in EVERY.values():
        if (model, task) in runs:
            continue
        runs[model, task] = str(root / f"{model}-{task}")
        train.main(["--model", model, "--task", task, "--out", runs[model, task], "--steps", "0",
                    "--evals", "none", "--workers", "0", "--batch_size", "4", "--limit", "40",
                    *TINY[model].split()])
    return runs


def evaluate_every(runs, *flags, but=()):
    """Every evaluation -> {its name: its metrics}."""
    out = {}
    for task, (model, trained, more) in EVERY.items():
        read = ev.TASKS[task].flags + ev.ALWAYS
        kept = []
        for name, value in flags:
            kept += [f"--{name}", value] if name in read else []
        if task not in but:
            argv = [runs[model, trained], "--task", task, *more.split(), *kept, *runs.get(task, [])]
            out[task] = ev.main(argv)[task]["metrics"]
    return out


def finite(metrics):
    return all(math.isfinite(x) for x in metrics.values() if x is not None)


def test_the_list_of_every_evaluation_is_whole():
    assert set(EVERY) == set(ev.TASKS)


@pytest.mark.parametrize("flags", [
    [("limit", "2"), ("batch_size", "1")], [("limit", "6"), ("dtype", "bfloat16")]])
def test_every_evaluation_of_few_records(every_run, flags):
    """No error and no NaN, in batches of one and under autocast. A gallery of six has no word with
    a map of zeros."""
    but = ("speed", "pointing") if flags[0][1] == "2" else ()
    for task, metrics in evaluate_every(every_run, *flags, but=but).items():
        assert finite(metrics), (task, metrics)


def every_job(rank, port, runs, file):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    with mock.patch.object(torch.distributed, "init_process_group"), \
            mock.patch.object(torch.distributed, "destroy_process_group"):
        found = evaluate_every(runs, *SHARED, but=("speed",))
    torch.save(found, f"{file}{rank}.pt")
    torch.distributed.destroy_process_group()


SHARED = [("limit", "23"), ("batch_size", "4")]             # six batches, the last one short


def test_two_processes_give_exactly_the_numbers_of_one(every_run, tmp_path):
    """Every evaluation but that of seconds."""
    one = evaluate_every(every_run, *SHARED, but=("speed",))
    port = 29400 + random.SystemRandom().randrange(1000)
    torch.multiprocessing.spawn(every_job, (port, every_run, str(tmp_path / "rank")), nprocs=2)
    for rank in range(2):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for task, metrics in one.items():
            assert two[task] == metrics, (rank, task)
