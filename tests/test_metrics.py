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


# ------------------------------------------------------------------------------------------------------------- retrieval

def brute_ranks(sim, owner):
    """The definition, with loops: in the worst order of the ties, where does the first right candidate stand?"""
    n, m = sim.shape
    i2t = [1 + min(sum(sim[i, c] >= sim[i, own] for c in range(m) if owner[c] != i) for own in range(m) if owner[own] == i)
           for i in range(n)]
    t2i = [1 + sum(sim[i, c] >= sim[owner[c], c] for i in range(n) if i != owner[c]) for c in range(m)]
    return [int(r) for r in i2t], [int(r) for r in t2i]


def brute_order(query, base, new, k):
    """Candidates of one query, best first: the k best of `base` sorted by `new`, then the others by `base`."""
    order = sorted(range(len(base)), key=lambda c: -base[c])
    return sorted(order[:k], key=lambda c: -new[c]) + order[k:]


def gallery(counts, seed=0, levels=None):
    """Random scores of len(counts) images with counts[i] captions; with `levels`, only so many different values (ties)."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sim = torch.rand(len(counts), len(owner), generator=g)
    return (sim if levels is None else (sim * levels).floor()), owner


def test_hand_matrix():
    sim = torch.tensor([[.9, .1, .8, .2],
                        [.3, .7, .6, .5]])                      # captions 0, 1 -> image 0; 2, 3 -> image 1
    owner = torch.tensor([0, 0, 1, 1])
    i2t, t2i = ev.ranks(sim, owner)
    assert i2t.tolist() == [1, 2]                               # image 1: its best, .6, is beaten by .7 of image 0's caption
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
        assert exact[f"i2t_r{k}"] == pytest.approx(100 * np.mean([1 - math.comb(m - c, k) / math.comb(m, k) for c in counts]))
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
    new = gallery(counts, seed=2)[0] * 20 - 10                  # negative scores too: nothing un-ranked may slip between
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


# ------------------------------------------------------------------------------------------------------------------- vqa

@pytest.mark.parametrize("answer, answers, score", [
    ("2", ["2"] * 10, 1.0),
    ("2", ["two"] * 5 + ["2"] * 5, 1.0),
    ("2", ["two", "2", "2"] + ["3"] * 7, (3 * 2 / 3 + 7 * 1) / 10),          # 3 matches: min(1, 2/3) when one of them is left out
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


# ----------------------------------------------------------------------------------------------------------------- boxes

def test_box_cover_is_exact():
    cover = ev.box_cover([[10, 0, 30, 20]], (40, 40), (4, 2))   # 4 rows of 10 pixels, 2 columns of 20
    assert cover.tolist() == [[.5, .5], [.5, .5], [0, 0], [0, 0]]
    assert ev.box_cover([[3, 5, 17, 29]], (40, 32), (4, 4)).mean() == pytest.approx(14 * 24 / (40 * 32))
    assert ev.box_cover([[0, 0, 20, 20], [0, 0, 40, 20]], (40, 40), (2, 2)).tolist() == [[1, 1], [0, 0]]


def test_wordpieces_become_words():
    maps = torch.arange(5.)[:, None, None].expand(5, 2, 2)
    words = ev.word_maps(["[CLS]", "snow", "##board", "##er", "[SEP]"], maps)
    assert [w for w, _ in words] == ["snowboarder"] and words[0][1].eq(2).all()
