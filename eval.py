"""Evaluate a run: one table on the screen, one JSON with the protocol beside the numbers.

    python eval.py out/RUN                                  the evaluations of the run's own task
    python eval.py out/RUN --task retrieval --data dataset_flickr30k.json --image_root flickr30k
    python eval.py out/RUN --task gradcam --image a.jpg --text "a dog beside a tree"
    python eval.py out/RUN --task gallery --text "a dog beside a tree"
    torchrun --nproc_per_node 8 eval.py out/RUN --task vqa --split test

The file reads from the inside out: metrics, which are pure functions; drawings; what every
evaluation works with (`Eval`); the evaluations; the table TASKS, which is the only place where
one is added; the command line. An evaluation asks the model for methods, never for its name.

Legend: N images, M captions, B batch, P pairs of an image and a caption, k candidates that are
re-ranked, d width of an embedding, T tokens.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from tools import Parser, shapes
from tools.weights import Stop, find_run, load_run

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------
# Metrics: retrieval

def ranks(sim, owner, chunk=1024):
    """Pessimistic ranks of image->text and text->image retrieval.

    sim: (N, M) scores, higher = better; owner: (M,) int64, the image of each caption. An image
    may have any number of captions.
    -> (N,), (M,) int64: 1 + the number of wrong candidates that score at least as much as the
    right one (for an image: as its best caption), so that ties count against the model.
    Stop on NaN and on an image without a caption.
    """
    n, m = sim.shape
    if not torch.equal(owner.unique().cpu(), torch.arange(n)) or len(owner) != m:
        raise Stop(f"retrieval: {n} images, {m} captions: each image must have a caption, "
                   "each caption one of the images")

    # The score of each caption with its own image, and of each image with its best caption.
    own = sim[owner, torch.arange(m, device=sim.device)]                        # (M,)
    best = sim.new_full((n,), -math.inf)
    best = best.scatter_reduce(0, owner, own, "amax")                           # (N,)

    # An image's captions that tie with its best one are right, so they are not counted.
    tied = torch.zeros_like(best, dtype=torch.long)
    tied = tied.scatter_add(0, owner, (own >= best[owner]).long())              # (N,)

    # In slices of images, so that no second (N, M) matrix is needed.
    i2t, t2i = [], torch.zeros(m, dtype=torch.long, device=sim.device)
    for rows, best_of_rows in zip(sim.split(chunk), best.split(chunk)):
        if rows.isnan().any():
            raise Stop("retrieval: the scores contain NaN")
        i2t.append((rows >= best_of_rows[:, None]).sum(1))
        # The right image counts itself: that is the 1 of 1 + ...
        t2i += (rows >= own).sum(0)
    return torch.cat(i2t) - tied + 1, t2i


def shortlist(sim, k):
    """sim (N, M) -> the k best captions of each image (N, k), the k best images of each caption
    (M, k), int64. A k beyond the gallery is the gallery."""
    n, m = sim.shape
    captions = sim.topk(min(k, m), dim=1).indices
    images = sim.topk(min(k, n), dim=0).indices.T.contiguous()
    return captions, images


def reranked(sim, owner, top_i, top_t, val_i, val_t):
    """Ranks after the shortlists are sorted by new scores. All other candidates stay below the
    shortlist, in the order of `sim`.

    sim: (N, M); owner: (M,); top_i: (N, k) captions, top_t: (M, k) images, as of shortlist();
    val_i, val_t: their new scores, any float. -> as ranks(). Stop on NaN.
    """
    if val_i.isnan().any() or val_t.isnan().any():
        raise Stop("retrieval: the matching scores contain NaN")

    image = torch.arange(len(sim), device=sim.device)
    outside_i, outside_t = ranks(sim, owner)
    i2t = rank_in_shortlist(val_i, owner[top_i] == image[:, None], outside_i)
    t2i = rank_in_shortlist(val_t, top_t == owner[:, None], outside_t)
    return i2t, t2i


def rank_in_shortlist(scores, right, outside):
    """The rank of the best right candidate of each query -> (Q,) int64.

    scores: (Q, k) of the shortlist; right: (Q, k) bool; outside: (Q,) the rank where the shortlist
    holds no right candidate. That is the rank before: every candidate of the shortlist scored at
    least as much as the right one, so it is counted already.
    """
    best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    inside = 1 + ((scores >= best) & ~right).sum(1)
    return torch.where(right.any(1), inside, outside)


def summary(i2t, t2i, ks=(1, 5, 10)):
    """Ranks from 1, (N,) and (M,) -> {i2t_r1, ..., t2i_r10, mean and rsum in percent; i2t_medr,
    t2i_medr: median ranks}."""
    recalls = {}
    for way, places in (("i2t", i2t), ("t2i", t2i)):
        for k in ks:
            recalls[f"{way}_r{k}"] = 100 * (places <= k).double().mean().item()
    return with_totals(recalls, float(np.median(i2t.cpu())), float(np.median(t2i.cpu())))


def with_totals(recalls, i2t_median, t2i_median):
    """{i2t_r1: percent, ...} and two median ranks -> the keys of summary()."""
    total = sum(recalls.values())
    return {**recalls, "mean": total / len(recalls), "rsum": total,
            "i2t_medr": i2t_median, "t2i_medr": t2i_median}


def recall(sim, owner, ks=(1, 5, 10)):
    """sim (N, M), owner (M,) -> the summary() of its ranks()."""
    return summary(*ranks(sim, owner), ks)


def chance(owner, ks=(1, 5, 10)):
    """What a random order of this gallery gets on average: text->image k / N; image->text
    1 - C(M - c, k) / C(M, k) for an image of c captions. The median is the smallest rank that
    half of the queries reach.

    owner: (M,) int64 -> the keys of summary().
    """
    captions = owner.unique(return_counts=True)[1]                      # (N,) of each image
    n, m = len(captions), len(owner)

    # hit[r]: how likely one of the first r + 1 captions is right, for the average image.
    hit, r = 0, np.arange(m)
    for c, images in Counter(captions.tolist()).items():
        miss = np.cumprod(np.clip((m - c - r) / (m - r), 0, 1))
        hit = hit + images * (1 - miss)
    hit = hit / n

    recalls = {f"i2t_r{k}": 100 * float(hit[min(k, m) - 1]) for k in ks}
    recalls |= {f"t2i_r{k}": 100 * min(k, n) / n for k in ks}
    i2t_median = float((hit < 0.5 - 1e-12).sum() + 1)
    return with_totals(recalls, i2t_median, float(math.ceil(n / 2)))


def average(results):
    """The mean of each key over a list of dicts with the same keys (the folds)."""
    out = {}
    for key in results[0]:
        out[key] = sum(result[key] for result in results) / len(results)
    return out


# --------------------------------------------------------------------------------------------------
# Metrics: correlation, hash codes, answers, tags

def pearson(x, y):
    """Pearson's correlation of two times n numbers, in [-1, 1]; NaN where one side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else math.nan


def average_ranks(x):
    """Ranks 1..n of n numbers, equal numbers at the mean of their ranks -> (n,) float64."""
    _, group, size = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    return (last - (size - 1) / 2)[group]


def spearman(x, y):
    """Spearman's correlation: Pearson's of the average_ranks()."""
    return pearson(average_ranks(x), average_ranks(y))


def graded(score, gold, subsets):
    """How n scores correlate with n grades, in percent.

    score, gold: n numbers; subsets: n names. -> {`pearson` and `spearman` over all pairs at once,
    "P+S / 2": their mean, `mean` and `wmean`: Spearman within each subset, averaged plainly or by
    size}. A subset of one pair has no correlation and is left out.
    """
    # Over all pairs at once.
    score, gold, subsets = np.asarray(score), np.asarray(gold), np.asarray(subsets)
    p, s = 100 * pearson(score, gold), 100 * spearman(score, gold)

    # Within each subset of two pairs or more.
    inner, sizes = [], []
    for name in dict.fromkeys(subsets.tolist()):
        at = np.flatnonzero(subsets == name)
        if len(at) > 1:
            inner.append(100 * spearman(score[at], gold[at]))
            sizes.append(len(at))

    # Averaged plainly, and by the sizes of the subsets.
    mean = wmean = math.nan
    if inner:
        mean = sum(inner) / len(inner)
        wmean = sum(v * size for v, size in zip(inner, sizes)) / sum(sizes)
    return {"P+S / 2": (p + s) / 2, "pearson": p, "spearman": s, "mean": mean, "wmean": wmean}


def bag_of_words(a, b):
    """The cosine of two sentences' word counts, in [0, 1]; 0 for a sentence without words."""
    a = Counter(re.findall(r"\w+", a.lower()))
    b = Counter(re.findall(r"\w+", b.lower()))

    # A word that one sentence lacks counts 0 there.
    def dot(x, y):
        return sum(x[word] * y[word] for word in x)

    norm = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norm if norm else 0.0


def map_at(query, database, query_labels, database_labels, r=5000, chunk=64):
    """MAP@r of hash codes in percent, with both denominators that are in use.

    query: (Q, K), database: (N, K), codes of +1 and -1; their labels: (Q, C), (N, C) of 0 and 1.
    Two images that share a label are relevant to each other. The database is sorted by Hamming
    distance; images at equal distance keep their order.
    -> (AP over the relevant within the top r, 0 where there are none: CSQ's;
    AP over all relevant of the database).
    """
    database, database_labels = database.float(), database_labels.float()

    within, whole = [], []
    for codes, labels in zip(query.float().split(chunk), query_labels.float().split(chunk)):
        # The inner product falls as the Hamming distance grows.
        order = (codes @ database.T).sort(dim=1, descending=True, stable=True).indices[:, :r]
        relevant = labels @ database_labels.T > 0                               # (q, N)
        hit = relevant.gather(1, order).double()                                # (q, r)

        # Average precision: the precision at each hit, summed.
        place = torch.arange(1, order.shape[1] + 1, device=codes.device)
        gain = (hit * hit.cumsum(1) / place).sum(1)
        within.append(gain / hit.sum(1).clamp(min=1))
        whole.append(gain / relevant.sum(1).clamp(min=1))
    return 100 * torch.cat(within).mean().item(), 100 * torch.cat(whole).mean().item()


def vqa_accuracy(answer, answers):
    """The official VQA score in [0, 1]: min(1, matches / 3) among all annotators but one, averaged
    over the one left out. All answers are normalized first (data.normalize_answer). With a single
    annotator: equal or not."""
    answer = data.normalize_answer(answer)
    hits = [data.normalize_answer(other) == answer for other in answers]
    if len(hits) == 1:
        return float(hits[0])

    # Leaving out an annotator who agrees takes one match away.
    matches = sum(hits)
    return sum(min(1.0, (matches - hit) / 3) for hit in hits) / len(hits)


def tag_overlap(top, truth, k):
    """mIOU@k in percent: |first k of top & truth| / |their union|, averaged over the images.

    top: (N, at least k) ids; truth: N sets of ids.
    """
    # The union is never empty: k tags are predicted for every image.
    total = 0
    for row, gold in zip(top[:, :k].tolist(), truth):
        total += len(gold & set(row)) / len(gold | set(row))
    return 100 * total / len(truth)


# --------------------------------------------------------------------------------------------------
# Metrics: boxes and masks

def covered(low, high, length, cells):
    """The share of each of `cells` equal pieces of [0, length] that lies in [low, high]
    -> (cells,) float64 in [0, 1]."""
    edges = np.arange(cells + 1) * length / cells
    inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
    return np.clip(inside, 0, None) * cells / length


def box_cover(boxes, size, grid):
    """How much of each cell of a grid over the picture lies in the boxes.

    boxes: xyxy in pixels; size: (width, height) of the picture; grid: (h, w) cells
    -> (h, w) float64 in [0, 1]. Exact for one box; where boxes overlap, the larger share counts.
    """
    width, height = size
    cover = np.zeros(grid)
    for x0, y0, x1, y1 in boxes:
        # A box covers rows and columns independently.
        rows = covered(y0, y1, height, grid[0])
        columns = covered(x0, x1, width, grid[1])
        cover = np.maximum(cover, np.outer(rows, columns))
    return cover


def pointed(words, boxes, size):
    """Does a word's map lie on the object that the word names?

    words: [(word, map (h, w) tensor)], each named in `boxes`: {word: its boxes, xyxy in pixels};
    size: (width, height) of the picture. -> for each word (share of the map's mass in the boxes,
    share of the picture in the boxes, 1.0 if at least half of the brightest cell is in them).
    """
    out = []
    for word, m in words:
        # The positive part of a map is the evidence for its word.
        m = m.clamp(min=0).double().numpy()
        cover = box_cover(boxes[word], size, m.shape)
        peak = float(cover.flat[m.argmax()] >= 0.5)
        out.append(((m * cover).sum() / m.sum(), cover.mean(), peak))
    return out


def box_iou(boxes, others):
    """The IoU of each of n boxes with each of m. (n, 4), (m, 4) xyxy, numpy -> (n, m)."""
    # The corners of each overlap; where there is none, a side is negative.
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = (high - low).clip(0).prod(-1)

    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    other_areas = (others[:, 2:] - others[:, :2]).prod(-1)
    return both / (areas[:, None] + other_areas - both)


def mask_iou(masks, others):
    """The IoU of each of n masks with each of m. (n, H, W), (m, H, W) bool, numpy -> (n, m)."""
    # Common pixels as one matrix product of flat masks.
    pixels = math.prod(masks.shape[1:])
    masks = masks.reshape(len(masks), pixels).astype(np.float32)
    others = others.reshape(len(others), pixels).astype(np.float32)

    both = masks @ others.T
    union = masks.sum(1)[:, None] + others.sum(1) - both
    return both / union.clip(1)


def voc_ap(found, truth, threshold):
    """VOC07's 11-point average precision of one class, as in VOC's devkit and Detectron2, in 0..1;
    NaN without objects.

    found: list of (score, image, IoU with each object of that image (n,));
    truth: {image: difficult (n,)}.
    A detection belongs to the object that it overlaps most. Above the threshold, the object's
    first detection is right and further ones are wrong; those of a difficult object are ignored.
    At or below the threshold a detection is wrong.
    """
    # The objects that are to be found: the difficult ones are not.
    total = 0
    for difficult in truth.values():
        total += (~difficult.astype(bool)).sum()
    if not total:
        return math.nan

    # Each detection, the surest first: right, wrong or ignored.
    taken, right = set(), []
    for score, image, iou in sorted(found, key=lambda detection: -detection[0]):
        best = int(iou.argmax()) if len(iou) else -1
        hit = best >= 0 and iou[best] > threshold
        if hit and truth[image][best]:
            continue
        right.append(hit and (image, best) not in taken)
        if hit:
            taken.add((image, best))

    # The best precision from each of the recalls 0, 0.1, ..., 1 on.
    right = np.cumsum(right)
    recalls = right / total
    precision = right / np.arange(1, len(right) + 1)
    points = [precision[recalls >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)]
    return sum(points) / 11


def voc_scores(found, records, classes, key="iou"):
    """{AP, AP50, AP75} in percent by voc_ap(), the mean over the classes that have objects. AP is
    the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.

    found: {record: dict of labels (n,), scores (n,) and, under `key`, the IoU with the record's
    objects (n, m)}. Difficult objects and crowds are ignored.
    """
    # Read once: each access of a record unpacks it.
    labels, ignored = [], []
    for record in records:
        labels.append(np.array(record["labels"], int))
        ignored.append(np.array(record["difficult"], bool) | np.array(record["crowd"], bool))

    table = np.full((classes, 10), math.nan)
    for c in range(classes):
        # The objects of this class, and what was detected as this class.
        truth, mine = {}, []
        for i, own in enumerate(labels):
            objects = np.flatnonzero(own == c)
            if len(objects):
                truth[i] = ignored[i][objects]
            for k in np.flatnonzero(found[i]["labels"] == c):
                mine.append((found[i]["scores"][k], i, found[i][key][k][objects]))
        if truth:
            table[c] = [voc_ap(mine, truth, (50 + 5 * n) / 100) for n in range(10)]

    # The mean over the classes, for each threshold.
    mean = 100 * np.nanmean(table, 0) if np.isfinite(table).any() else np.zeros(10)
    return {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}


def coco_tables(found, records, kind):
    """-> (a dict in the format of COCO's instances file, the rows of COCO's result file); found and
    kind as in coco_scores(). Difficult objects count as crowds: COCO ignores them."""
    from pycocotools import mask as coco_mask

    images, notes, results = [], [], []
    for i, record in enumerate(records):
        size = (record["height"], record["width"])
        images.append({"id": i, "height": size[0], "width": size[1]})

        # The true objects.
        for k, (x0, y0, x1, y1) in enumerate(record["boxes"]):
            area = record["area"][k] if record.get("area") else 0
            notes.append({"id": len(notes) + 1, "image_id": i, "category_id": record["labels"][k],
                          "bbox": [x0, y0, x1 - x0, y1 - y0],
                          "area": area or (x1 - x0) * (y1 - y0),
                          "iscrowd": int(record["crowd"][k] or record["difficult"][k])})
            if kind == "segm":
                notes[-1]["segmentation"] = record["segmentation"][k]

        # The detections.
        detected = found[i]
        for k, (x0, y0, x1, y1) in enumerate(detected["boxes"].tolist()):
            results.append({"image_id": i, "category_id": int(detected["labels"][k]),
                            "score": float(detected["scores"][k])})
            if kind == "segm":
                results[-1]["segmentation"] = coco_mask.frPyObjects(detected["masks"][k], *size)
            else:
                results[-1]["bbox"] = [x0, y0, x1 - x0, y1 - y0]

    categories = [{"id": c, "name": name} for c, name in enumerate(records.label_names)]
    return {"images": images, "annotations": notes, "categories": categories}, results


def coco_scores(found, records, kind):
    """{AP, AP50, AP75} in percent by pycocotools, which must be installed.

    found: {record: dict of numpy boxes (n, 4) xyxy, labels (n,), scores (n,) and for kind "segm"
    masks, n of COCO's run lengths}; kind: "bbox" or "segm".
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    tables, results = coco_tables(found, records, kind)
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}

    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = tables
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()

    # It reports -1 where there is nothing to measure.
    scores = [100 * max(0.0, float(value)) for value in run.stats[:3]]
    return dict(zip(("AP", "AP50", "AP75"), scores))


# --------------------------------------------------------------------------------------------------
# A linear layer on fixed features

PROBE_RATES = (3.0, 1.0, 0.3, 0.1, 0.03)


def fit_linear(x, y, classes, lr=30.0, epochs=60, batch=256, seed=0):
    """Trains a linear layer: SGD, momentum 0.9, no weight decay, the rate divided by 5 after 1/2,
    2/3 and 5/6 of the epochs.

    x: (N, D) float32; y: (N,) int64 -> weight (classes, D), bias (classes,).
    """
    generator = torch.Generator().manual_seed(seed)

    # Small weights from a seed, the same on every device.
    weight = 0.01 * torch.randn(classes, x.shape[1], generator=generator)
    weight = weight.to(x.device).requires_grad_()
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)

    batch = min(batch, len(x))
    for epoch in range(epochs):
        drops = sum(epoch >= share * epochs for share in (1 / 2, 2 / 3, 5 / 6))
        optimizer.param_groups[0]["lr"] = lr * 0.2 ** drops

        # A new order each epoch; a last batch that is not full is left out.
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for part in order[:len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(F.linear(x[part], weight, bias), y[part]).backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def top1(x, y, weight, bias):
    """Accuracy of a linear layer in percent. x: (N, D); y: (N,); weight (C, D), bias (C,)."""
    return 100 * (F.linear(x, weight, bias).argmax(1) == y).double().mean().item()


def fit_best(x, y, classes, lrs):
    """fit_linear() with the best of several learning rates: each is tried with every tenth sample
    held out. -> (weight (classes, D), bias (classes,), learning rate)."""
    lr = lrs[0]
    if len(lrs) > 1:
        held = torch.arange(len(x), device=x.device) % 10 == 9
        accuracy = {}
        for rate in lrs:
            weight, bias = fit_linear(x[~held], y[~held], classes, rate)
            accuracy[rate] = top1(x[held], y[held], weight, bias)
        lr = max(accuracy, key=accuracy.get)

    weight, bias = fit_linear(x, y, classes, lr)
    return weight, bias, lr


def fit_probe(x, y, classes, lr=None):
    """A linear layer on fixed features -> (top-1 on train, top-1 on test, in percent; its rate).

    x: {"train": (N, D), "test": (M, D)} float32; y: {"train": (N,), "test": (M,)} int64.
    With `lr` the features are taken as they are. Without, each feature is brought to mean 0 and
    deviation 1 over train, and the rate is the best of PROBE_RATES. What the layer can express
    stays the same, but it gets there in the few hundred steps of a small data set; means of ReLUs,
    which are all positive, need thousands.
    """
    if lr:
        rates = (lr,)
    else:
        rates = PROBE_RATES
        # Statistics of train alone.
        std, mean = torch.std_mean(x["train"], 0)
        # A feature that is constant in train must not blow up in test.
        std = std + 0.01 * std.mean() + 1e-12
        x = {split: (features - mean) / std for split, features in x.items()}

    weight, bias, lr = fit_best(x["train"], y["train"], classes, rates)
    train = top1(x["train"], y["train"], weight, bias)
    test = top1(x["test"], y["test"], weight, bias)
    return train, test, lr


# --------------------------------------------------------------------------------------------------
# Drawing

GREEN, YELLOW = (0, 150, 0), (255, 214, 102)


def to_width(picture, width):
    """The picture scaled to a width in pixels."""
    height = max(1, round(width * picture.height / picture.width))
    return picture.resize((width, height), Image.BICUBIC)


def heat(picture, m):
    """The picture (PIL) under the heat colors of a map (h, w), stretched over it. The map's own
    maximum is red."""
    # The map stretched over the picture, from 0 to 1.
    size = (picture.height, picture.width)
    x = F.interpolate(m[None, None], size, mode="bilinear")[0, 0].clamp(min=0).numpy()
    x = x / max(x.max(), 1e-12)

    # From low to high: blue, green, yellow, red.
    color = np.stack([np.clip(1.5 - np.abs(4 * x - peak), 0, 1) for peak in (3, 2, 1)], -1)
    return Image.fromarray(np.uint8(255 * (0.5 * color + 0.5 * np.asarray(picture) / 255)))


def draw_maps(picture, text, words, sentence, path, width=192, columns=6):
    """One PNG: the picture, the sentence's map and a map for each word, each with its caption.

    words: [(word, map (h, w))]; sentence: (h, w); `width` of a tile in pixels.
    """
    # A map of zeros shows the bare picture.
    picture = to_width(picture, width)
    tiles = [("picture", picture), ("sentence", heat(picture, sentence))]
    for word, m in words:
        tiles.append((word, heat(picture, m)) if m.max() > 0 else (f"{word}: zero", picture))

    # A line of text above the page and above each row of tiles.
    line, gap, font = 22, 8, ImageFont.load_default(14)
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * (width + gap) + gap,
                             line + rows * (picture.height + line) + gap), "white")
    pen = ImageDraw.Draw(page)
    pen.text((gap, 4), text, "black", font)

    # From left to right, from top to bottom.
    for n, (caption, tile) in enumerate(tiles):
        row, column = divmod(n, columns)
        x, y = gap + column * (width + gap), line + row * (picture.height + line)
        page.paste(tile, (x, y + line))
        pen.text((x, y + 3), caption, "black", font)
    page.save(path)


def draw_gallery(parts, path, width=192):
    """The PNG of gallery(): a row for each query, right answers in green.

    parts: [(query, "text" or "image", [(score, right?, the picture's place or the caption)])];
    `width` of a picture in pixels.
    """
    # One page: a row for each query, a column for each picture.
    most = max(len(found) for _, _, found in parts)
    line, row, font = 22, width + 4 * 22, ImageFont.load_default(14)
    page = Image.new("RGB", (8 + most * (width + 8), len(parts) * row), "white")
    pen = ImageDraw.Draw(page)
    for n, (query, what, found) in enumerate(parts):
        top = n * row + 6

        # A text stands above the pictures that were found, a picture beside the captions.
        if what == "text":
            query = textwrap.shorten(query, page.width // 7, placeholder="...")
            pen.text((8, top), query, "black", font)
        else:
            page.paste(data.center(data.load_image(query), width), (8, top + line))

        for i, (score, right, thing) in enumerate(found):
            color = GREEN if right else "black"
            if what == "text":
                x, y = 8 + i * (width + 8), top + line
                page.paste(data.center(data.load_image(thing), width), (x, y))
                note = "  the true one" if right else ""
                pen.text((x, y + width + 6), f"{score:.3f}{note}", color, font)
                frame, thick = (x - 4, y - 4, x + width + 3, y + width + 3), 3
            else:
                x, y = 24 + width, top + line + i * (width // len(found))
                thing = textwrap.shorten(thing, (page.width - x) // 7 - 7, placeholder="...")
                pen.text((x, y), f"{score:.3f}  {thing}", color, font)
                frame, thick = (x - 6, y - 2, page.width - 8, y + line - 2), 1
            if right:
                pen.rectangle(frame, outline=GREEN, width=thick)
    page.save(path)


def by_rank(picture, scores):
    """The picture, each area as bright as its score ranks: 20 % the lowest, 100 % the highest.
    scores: (h, w)."""
    # argsort twice gives the rank of each score.
    order = scores.flatten().argsort().argsort().view(scores.shape).float()

    # A grid of light, laid over the picture without smoothing.
    light = 0.2 + 0.8 * order / max(1, order.numel() - 1)
    size = (picture.height, picture.width)
    light = F.interpolate(light[None, None], size, mode="nearest")[0, 0].numpy()
    return Image.fromarray(np.uint8(np.asarray(picture) * light[..., None]))


def draw_ranks(picture, panels, path, width=256):
    """One PNG: the picture, and for each panel the picture by_rank() above its sentence, whose five
    best words are marked.

    panels: [(title, scores (h, w), [(word, score)])]; `width` of a tile in pixels.
    """
    # The page: about four words a line below the pictures.
    picture = to_width(picture, width)
    lines = 2 + max(len(words) for _, _, words in panels) // 4
    gap, font = 10, ImageFont.load_default(13)
    page = Image.new("RGB", ((len(panels) + 1) * (width + gap) + gap,
                             picture.height + 40 + 20 * lines), "white")
    pen = ImageDraw.Draw(page)
    pen.text((gap, 6), "picture", "black", font)
    page.paste(picture, (gap, 26))

    for n, (title, scores, words) in enumerate(panels, 1):
        left = gap + n * (width + gap)
        pen.text((left, 6), title, "black", font)
        page.paste(by_rank(picture, scores), (left, 26))

        # The sentence, in lines of the tile's width.
        best = sorted(range(len(words)), key=lambda i: -words[i][1])[:5]
        x, y = 0, picture.height + 34
        for i, (word, _) in enumerate(words):
            length = pen.textlength(word, font)
            if x and x + length > width:
                x, y = 0, y + 20
            if i in best:
                frame = (left + x - 1, y - 1, left + x + length + 1, y + 17)
                pen.rectangle(frame, fill=YELLOW)
            pen.text((left + x, y), word, "black", font)
            x += length + 7
    page.save(path)


# --------------------------------------------------------------------------------------------------
# What every evaluation works with

def module_of(model):
    """The module of the model's class: the place of its VIEWS, TASKS and EVALS."""
    return sys.modules[type(model).__module__]


def offers(model, *names):
    """Does the model offer these methods? Its attribute `offers` lists those that its task has; a
    model without this attribute offers all the methods that it has."""
    # A task may leave a part of its model out, and with it some methods.
    listed = getattr(model, "offers", names)
    return all(name in listed and callable(getattr(model, name, None)) for name in names)


def offered(model, trained):
    """The evaluations whose methods the model offers: a list of keys of TASKS. Of classifiers the
    one that is about the kind of data of the task that it was `trained` for."""
    own, found = module_of(model).VIEWS[trained]["source"], []
    for name, (_, ways, source, _) in TASKS.items():
        if source in ("", own) and any(offers(model, *methods) for methods in ways):
            found.append(name)
    return found


def check_offer(model, info, task):
    """Stop, one line, if an evaluation is not known, or not offered by this model."""
    there = offered(model, info["task"])
    if task not in there:
        known = "" if task in TASKS else f" (known: {', '.join(TASKS)})"
        raise Stop(f"task {task}: {type(model).__name__} trained for {info['task']} "
                   f"does not offer it{known}; it offers: {', '.join(there) or 'none'}")


def everyone(ev, x):
    """Any Python object of each process that shares the work -> list of them, by rank."""
    return data.gather_objects(x) if ev.world > 1 else [x]


@contextlib.contextmanager
def seeded(seed, device):
    """Random numbers from a seed, on CPU and device; behind it the generators are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def real_files(spec, source, split=None, flag="--data"):
    """The files of a specification by their real paths, however it spells them: a set. A folder of
    tars is its tars; the built-in world has files of each split."""
    if spec == "shapes":
        spec = data.world_files(source, split)[0]
    files = set()
    for path in data.expand(spec, flag):
        tars = sorted(Path(path).glob("*.tar"))
        files |= {os.path.realpath(file) for file in tars or [path]}
    return files


def real(value):
    """An option as it is compared: a path, or each of several, as its real path."""
    if isinstance(value, (list, tuple)):
        return [real(item) for item in value]
    is_path = isinstance(value, (str, Path)) and os.path.exists(value)
    return os.path.realpath(value) if is_path else value


def slug(value):
    """An option as a part of a file's name: letters, digits and underscores, of a path its last
    name, at most 40 of them."""
    values = value if isinstance(value, list) else [value]
    words = " ".join(os.path.basename(str(item)) for item in values)
    return re.sub(r"[^\w.]+", "_", words).strip("._")[:40]


def settings_of(path):
    """The settings that a result file was measured with; None if it is damaged."""
    try:
        return json.loads(path.read_text())["protocol"]["settings"]
    except (ValueError, KeyError, TypeError):
        return None


@functools.lru_cache(maxsize=2)
def read_records(stamps, source, spec, split, **how):
    """data.open_source(source, spec, split, **how), of the split test, or val where there is none,
    if split is None. What closes a training is opened twice, to be checked at the start and to be
    evaluated at the end: the second time the records of the first are at hand.

    stamps: size and time of each file, so that a file that has changed is read again.
    """
    try:
        return data.open_source(source, spec, split or "test", **how)
    except data.DataError as error:
        if split or "no split" not in str(error):
            raise
        return data.open_source(source, spec, "val", **how)


def trained_on(info):
    """The settings of a run's training and of the runs that it started from, as far as their
    directories are there -> list of dicts, the run's own first."""
    found = []
    while len(found) < 20:                              # no circle is endless
        found.append({"hold_out": 0.0, "files": info.get("files", []), **info.get("loop", {})})
        try:
            start = find_run(found[-1].get("init") or "")
            info = json.loads((start / "config.json").read_text())
        except (Stop, OSError, ValueError):
            break
    return found


class Ready(Exception):
    """An evaluation that is only rehearsed has come to its first batch."""


class Eval:
    """The model with its settings, its views, the data and this process's share of them.

    model, cfg, info (config.json and `path`), loop (its part about training), device; task: a key
    of TASKS; opts: the command line; rank, world: the share; is_main: prints and writes files;
    views, spec, root, tokenizer: how the data are read. `protocol` grows on the way and is written
    beside the numbers; `bad` collects the numbers of unreadable pictures; `named` is [data, split]
    of what was opened, `settings` all that decides about the numbers; `files` is what report() will
    write, {path: function that writes there}. rehearsal: batches() raises Ready.
    """

    def __init__(self, model, info, task, opts, rank, world, rehearsal=False):
        # The run, and the part of the work that is this process's.
        self.model, self.cfg, self.info, self.task, self.opts = model, model.cfg, info, task, opts
        self.rank, self.world, self.is_main = rank, world, rank == 0
        self.device = next(model.parameters()).device
        self.loop = info.get("loop", {})
        self.bad, self.protocol, self.files, self.named = set(), {}, {}, []
        self.rehearsal = rehearsal

        # Autocast is for the model alone: batches and scores are made as they are.
        self.autocast = contextlib.nullcontext()
        if opts.dtype != "float32":
            self.autocast = torch.autocast(self.device.type, getattr(torch, opts.dtype))

        # What differs from the defaults and decides about the numbers.
        self.settings = {}
        for name in ("vocab", "dtype", *TASKS[task].flags):
            value = getattr(opts, name)
            if name not in ("data", "split", "out") and value != DEFAULTS[name]:
                self.settings[name] = real(value)

        # The views of this evaluation if the model has a task of that name, else the run's own.
        views = module_of(model).VIEWS
        self.views = views[task if task in views else info["task"]]

        # The data of the command line, else of the run: for evaluation, else for training.
        self.spec = opts.data or self.loop.get("eval_data") or self.loop.get("data") or "shapes"
        self.root = opts.image_root or None
        if not opts.data and not self.root:
            self.root = self.loop.get("eval_root") or self.loop.get("image_root") or None

        self.tokenizer = self.open_vocabulary()

    def open_vocabulary(self):
        """The command line's vocabulary, else the copy in the run's directory, else the file that
        the run was trained with. Stop if it has another size than the model."""
        vocab, copy = self.opts.vocab, result_path(self, "vocab.txt")
        if not vocab and copy and copy.is_file() and not self.rehearsal:
            vocab = copy
        vocab = vocab or self.loop.get("vocab") or "shapes"

        # Other ids would go unnoticed, and give numbers that mean nothing.
        tokenizer = data.get_tokenizer(vocab)
        if tokenizer.vocab_size != self.cfg.vocab_size:
            raise Stop(f"{vocab}: {tokenizer.vocab_size} tokens, "
                       f"the run has {self.cfg.vocab_size}; name its --vocab")
        return tokenizer

    def setting(self, name, default):
        """An option: the command line's, else the run's (which writes 0 or "" for "not set"), else
        the default."""
        value = getattr(self.opts, name)
        if value is None:
            value = self.loop.get(name) or default
        return value

    def alone(self):
        """From here on this process does all of the work itself: one picture, or seconds."""
        self.rank, self.world = 0, 1

    # Data

    def other_kind(self):
        """The kind of the run's own data, if they are what there is and this evaluation reads
        another kind; else None."""
        own = module_of(self.model).VIEWS[self.info["task"]]["source"]
        named = self.opts.data or self.spec != self.loop.get("data") or self.spec == "shapes"
        return None if named or self.views["source"] == own else own

    def open(self, need=(), split=None):
        """The data.Records of the split, which must have the keys in `need`: of `split` or --split,
        else of test, or of val where there is no test. What they are, and what the checkpoint was
        trained on, goes into the protocol."""
        if self.other_kind():
            raise Stop(f"{self.task}: it reads {self.views['source']}, "
                       f"the run's data are {self.other_kind()}: name files with --data")

        # Of files that the run, or one that it started from, was trained on: the part that it
        # held out.
        source, split = self.views["source"], split or self.opts.split
        files = real_files(self.spec, source)
        seen = [loop for loop in trained_on(self.info) if self.overlap(loop, files)]
        hold_out = max((loop["hold_out"] for loop in seen), default=0)
        stamps = tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files)
        records = read_records(stamps, source, self.spec, split, image_root=self.root,
                               limit=self.opts.limit, need=need, hold_out=hold_out,
                               missing=data.absent(self.views))

        # Regions must come from the detector of training.
        files = self.opts.regions or self.loop.get("regions", "")
        records = data.with_regions(records, self.views, files)
        if records.regions:
            found, trained = data.stats(records), self.info.get("stats", {})
            for name in ("region_dim", "region_classes", "global_dim"):
                if found[name] != trained.get(name, found[name]):
                    raise Stop(f"{', '.join(records.regions.paths)}: {name} is {found[name]}, "
                               f"the run was trained with {trained[name]}")
            self.protocol.update(regions=records.regions.about)

        # What was opened first is what the files of results are called by.
        if not self.named:
            spec = self.spec
            first = spec if spec == "shapes" else Path(data.expand(spec)[0]).stem
            self.named = [slug(first), records.split]
            files = ["shapes"] if spec == "shapes" else sorted(files)
            self.settings |= {"data": files, "split": records.split}
            self.protocol.update(data=spec, split=records.split, records=len(records),
                                 limit=self.opts.limit,
                                 protocol=self.training_words(records, seen, hold_out))
        if records.protocol:
            self.protocol.update(lists=records.protocol)
        return records

    def overlap(self, loop, files):
        """Was a run of these settings trained on one of the files, given by their real paths?"""
        own = set((loop.get("data") or "shapes").split(",")) | set(loop["files"])
        return bool(own & (set(self.spec.split(",")) | files))

    def training_words(self, records, seen, hold_out):
        """What the checkpoint was trained on, in words. "in domain": on one of these files too,
        as those trainings in `seen` were; whether on these very pictures is said."""
        domain = "in domain" if seen else "zero-shot"
        if records.held_out:
            others = [n for note, n in records.notes.items() if note.startswith("held_for_")]
            total = len(records) + sum(others)
            domain += f", held out: {len(records):,} of {total:,} records by hash of the picture"
        for loop in seen:
            apart = self.spec == "shapes" or not records.unsplit
            apart |= records.held_out and loop["hold_out"] == hold_out
            if loop.get("split", "train") == records.split or not apart:
                domain = "in domain, TRAINED ON THESE PICTURES"

        # A task that is not in the model's TASKS is a stage of pre-training.
        task = self.info["task"]
        tasks = getattr(module_of(self.model), "TASKS", (task,))
        tuned = task != "pretrain" and task in tasks
        how = f"fine-tuned ({task})" if tuned else "pre-trained only"

        start = f", from {self.loop['init']}" if self.loop.get("init") else ""
        return f"{domain}, {how}, trained on {self.loop.get('data') or 'shapes'}{start}"

    # Files of results

    def stem(self):
        """What this evaluation's files are called: the task, the data, the split, and each setting
        that is not at its default. Where a file of that name has other settings, for example
        another file of the same name as data, a digest of them is added."""
        words = [self.task, *self.named]
        for name, value in self.settings.items():
            if name not in ("data", "split", "image_root"):
                words.append(f"{name}_{slug(value)}")
        stem = "-".join(words)[:150]

        old = result_path(self, f"eval-{stem}.json")
        if old and old.is_file() and settings_of(old) != self.settings:
            text = json.dumps(self.settings, sort_keys=True)
            stem += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
        return stem

    def other(self, path):
        """The Eval of another run on the same data, with its own views and vocabulary. Stop if
        that run does not offer this evaluation."""
        model, info = load_run(path, self.device)
        if self.task not in offered(model, info["task"]):
            raise Stop(f"{path}: {type(model).__name__} trained for {info['task']} "
                       f"does not offer {self.task}")

        # The same command line, but the data of this run and the vocabulary of that one.
        given = {**vars(self.opts), "data": self.spec, "image_root": self.root, "vocab": None}
        return Eval(model, info, self.task, argparse.Namespace(**given), self.rank, self.world)

    # Batches, and results by the numbers of the data

    def batches(self, records, what):
        """This process's batches, on the device. what: "image" (each picture once), "text" (each
        caption) or "sample" (each record); `index` holds their numbers in the data."""
        if self.rehearsal:
            raise Ready
        workers = self.setting("workers", 0)
        batches = data.iter_eval(
            records, self.views, self.tokenizer, getattr(self.cfg, "image_size", None),
            self.cfg.max_text, max_regions=getattr(self.cfg, "max_regions", None), what=what,
            batch_size=self.opts.batch_size, rank=self.rank, world=self.world,
            workers=workers if workers >= 0 else (os.cpu_count() or 1) // 4)

        # An unreadable picture is a grey one: it is counted, not left out.
        for batch in batches:
            self.bad.update(batch["index"][batch["bad"].bool()].tolist())
            yield data.move(batch, self.device)

    def progress(self, batches, total, text):
        """The batches, under a progress bar of this process's share of `total` items."""
        steps = math.ceil(total / self.world / self.opts.batch_size)
        return tqdm(batches, text, steps, leave=False, delay=2, disable=self.rank > 0)

    def collect(self, records, what, total, fn, text=None):
        """fn(batch) -> (B, ...) over all batches of all processes -> (total, ...) on the CPU, in
        the data's order, the same on every process."""
        return self.collect_all(records, what, total, lambda b: {"x": fn(b)}, text)["x"]

    def collect_all(self, records, what, total, fn, text=None):
        """collect() of several tensors: fn(batch) -> {name: (B, ...)}; -> {name: (total, ...)}."""
        # This process's rows.
        numbers, parts = [torch.empty(0, dtype=torch.long)], defaultdict(list)
        for batch in self.progress(self.batches(records, what), total, text or what):
            numbers.append(batch["index"].cpu())
            with self.autocast:
                found = fn(batch)
            for name, t in found.items():
                parts[name].append(t.cpu())
        mine = (torch.cat(numbers), {name: torch.cat(pieces) for name, pieces in parts.items()})
        for name, t in mine[1].items():
            check_numbers(self, text or what, t)

        # The rows of all processes; one that had no rows has no names either.
        pieces = [piece for piece in everyone(self, mine) if len(piece[0])]
        index = torch.cat([piece[0] for piece in pieces])
        assert len(index.unique()) == total, f"{len(index)} of {total} rows were evaluated"

        # Brought into the order of the data.
        out = {}
        for name in pieces[0][1]:
            values = torch.cat([piece[1][name] for piece in pieces])
            out[name] = values.new_empty((total, *values.shape[1:]))
            out[name][index] = values
        return out

    # What several evaluations ask of the model

    def states(self, kind, batch):
        """What match() needs of the images or captions (kind: "image" or "text") of a batch: the
        model's states of them, or the batch's own tensors if the model makes no states."""
        if offers(self.model, f"{kind}_states"):
            return getattr(self.model, f"{kind}_states")(batch)
        return {name: t for name, t in batch.items() if name.startswith(kind)}

    def embed(self, records, what, total):
        """The vectors (total, d) float32, on the CPU, of all pictures or clips (what: "image") or
        of all captions ("text")."""
        encode = visual_encoder(self.model) if what == "image" else self.model.encode_text
        return self.collect(records, what, total, lambda b: encode(b).float(), f"{what}s")


def check_numbers(ev, what, t):
    """Stop if what the model gave holds NaN: a metric would take it for a low score."""
    if t.is_floating_point() and t.isnan().any():
        raise Stop(f"{ev.task}: the model gives NaN ({what}); its weights or --dtype "
                   f"{ev.opts.dtype} are at fault")


def visual_encoder(model):
    """The method that embeds pictures, or clips; None if the model has neither."""
    for name in ("encode_image", "encode_clip"):
        if offers(model, name):
            return getattr(model, name)
    return None


def run_name(ev):
    """What a table calls a run: its directory, or its task."""
    return str(ev.info.get("path") or ev.info["task"])


# --------------------------------------------------------------------------------------------------
# Retrieval: Eval -> {"rows": the table, "metrics": {name: number}}, as every evaluation

RULES = {"itm": "the k best by their match score alone (ALBEF), all others below",
         "sum": "the k best by match score + similarity (BLIP), all others below",
         "none": "no re-ranking"}


def retrieval(ev):
    """Image->text and text->image over the whole split, in its order; 5,000 images also as five
    folds of 1,000. The scores of the dual encoder, then its k best in the order of match(). For a
    model without encoders match() scores every pair, or, with --candidates, the k best of another
    run's dual encoder."""
    records = ev.open(need=("caption",))
    if ev.opts.captions is not None:
        records = data.first_captions(records, ev.opts.captions)
        ev.protocol.update(captions_kept=f"the first {ev.opts.captions} of each image")
    owner, order = data.flat_captions(records)[1].sort(stable=True)   # captions by their images
    n, m = len(owner.unique()), len(owner)
    gallery_spans(ev, owner)

    # Whose scores come first, and the rule by which match() sorts their k best anew.
    first = candidates_of(ev) if ev.opts.candidates else ev
    dual = visual_encoder(first.model) is not None
    rule, k = ev.setting("rerank", "itm"), ev.opts.candidates or ev.setting("rerank_k", 128)
    if k < 0:
        raise Stop(f"--rerank_k {k}: at least 0")
    if not dual or k <= 0 or ev.opts.ensemble or not offers(ev.model, "match"):
        if ev.opts.rerank in ("itm", "sum") or ev.opts.rerank_k:
            raise Stop(f"{ev.task}: --rerank needs match() and a dual encoder, alone: "
                       f"{type(ev.model).__name__} does not have both, or --ensemble was given")
        rule = "none"
    check_memory(ev, n, m, 4 + 4 * bool(ev.opts.ensemble) + 5 * (rule != "none"))
    runs = ensemble_runs(ev, dual) if ev.opts.ensemble else {}

    # What match() needs of the captions.
    texts = {}
    if rule != "none" or not dual:
        states = ev.collect_all(records, "text", m, lambda b: ev.states("text", b), "texts")
        texts = {name: t[order] for name, t in states.items()}

    # The scores of all pairs.
    if dual:
        text_emb = texts.pop("text_emb", None)                  # states may hold the embedding too
        sim = similarities(first, records, order, n, text_emb if first is ev else None)
        base = "dual encoder" if first is ev else f"dual encoder of {first.info['path']}"
    if runs:
        sim, base = ensemble(ev, runs, records, order, sim)
    elif not dual:
        sim, base = match_scores(ev, records, texts), f"match, all {n * m:,} pairs"

    rows, metrics = retrieval_rows(ev, records, texts, sim, owner.to(sim.device), base, rule, k)
    counts = owner.bincount()
    ev.protocol.update(images=n, captions=m,
                       captions_per_image=[int(counts.min()), int(counts.max())],
                       ties="a wrong candidate with an equal score ranks first", rerank=RULES[rule],
                       rerank_k=None if rule == "none" else [min(k, m), min(k, n)],
                       candidates_from=None if first is ev else first.info["path"])
    ev.bad |= first.bad
    return {"rows": rows, "metrics": metrics}


def free_memory():
    """Bytes of main memory that may still be used: of all of it, where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(ev, n, m, held):
    """Stop if the scores of n images and m captions, `held` bytes a pair at once, are more than
    fits: each process keeps all of them."""
    need, free = n * m * held, free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ev.device.type == "cuda":                        # similarities and new scores lie there
        free = min(free, torch.cuda.mem_get_info(ev.device)[0])
    if need > free:
        raise Stop(f"{ev.task}: {n:,} images x {m:,} captions x {held} bytes are "
                   f"{need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free for each process: a "
                   "smaller gallery by --limit or --data (in train.py --eval_limit, --eval_data)")


def candidates_of(ev):
    """The Eval of --candidates_from, which must have a dual encoder."""
    run = ev.other(ev.opts.candidates_from)
    if visual_encoder(run.model) is None:
        raise Stop(f"--candidates_from {run.info['path']}: "
                   f"{type(run.model).__name__} has no dual encoder")
    return run


def similarities(run, records, order, n, text_emb=None):
    """The inner products of a run's vectors -> (N, M) float32 on the device; 0.5 GB for the 5,000
    images of COCO. order: (M,) sorts the captions; text_emb: (M, d), if known, sorted already."""
    # Every picture and every caption goes through its encoder once.
    image_emb = run.embed(records, "image", n)
    if text_emb is None:
        text_emb = run.embed(records, "text", len(order))[order]
    return image_emb.to(run.device) @ text_emb.float().to(run.device).T


def ensemble_runs(ev, dual):
    """The Evals of --ensemble. A run that is named twice, or this one, counts once."""
    if not dual:
        raise Stop("--ensemble averages similarities of dual encoders; "
                   f"{type(ev.model).__name__} has none")

    # The same directory may be named in several ways.
    others = {path.resolve(): path for path in map(find_run, ev.opts.ensemble)}
    others.pop(Path(ev.info["path"]).resolve(), None)
    if not others:
        raise Stop("--ensemble: name at least one other run")
    return {path: ev.other(path) for path in others.values()}


def ensemble(ev, runs, records, order, sim):
    """The mean of this run's similarities (N, M) and those of others -> (N, M), its name. runs:
    {path: Eval}; order: (M,) sorts the captions. Each run encodes the same gallery with its own
    views and vocabulary."""
    for run in runs.values():
        sim += similarities(run, records, order, len(sim))
        ev.bad |= run.bad

    ev.protocol.update(ensemble=[str(Path(ev.info["path"]).resolve()), *map(str, runs)])
    total = 1 + len(runs)
    return sim.div_(total), f"mean similarity of {total} runs"


def match_scores(ev, records, texts, wanted=None):
    """match() of the pairs that are wanted -> (N, M) float32 on the CPU, 0 elsewhere, the same on
    every process.

    texts: {name: (M, ...)} states of all captions; wanted: (N, M) bool on the CPU; None = all.
    Each process scores the pairs of its own images. The states of the captions are kept, those of
    the images live for one batch: 5,000 images of 577 tokens would be 9 GB.
    """
    m, n = len(next(iter(texts.values()))), len(data.unique_images(records)[0])
    out = torch.zeros(n, m)
    for batch in ev.progress(ev.batches(records, "image"), n, "matching"):
        with ev.autocast:
            images, index = ev.states("image", batch), batch["index"].cpu()
        of_batch = torch.ones(len(index), m) if wanted is None else wanted[index]

        # Images with their captions: what match() makes of an image is made once for all of them.
        for i, captions in image_groups(of_batch, ev.opts.pairs):
            pairs = {name: t[i.to(t.device)] for name, t in images.items()}
            pairs |= {name: t[captions.flatten()].to(ev.device) for name, t in texts.items()}
            with ev.autocast:
                scores = ev.model.match(pairs).float().cpu()
            out[index[i, None], captions] = scores.view_as(captions)

    # A pair is scored by one process: the others add 0.
    if ev.world > 1:
        out = out.to(ev.device)
        dist.all_reduce(out)
    return out.cpu()


def image_groups(wanted, pairs):
    """The pairs that are wanted, images with about as many captions together -> list of (numbers of
    images (U,), numbers of their captions (U, C)), at most `pairs` pairs in each.

    wanted: (N, M), not 0 where a pair is wanted. An image of fewer than C captions repeats one.
    """
    # An image with its captions is a row, and several if they are more than `pairs`.
    rows = []
    for image, flags in enumerate(wanted):
        captions = flags.nonzero().flatten()
        rows += [(image, part) for part in captions.split(pairs) if len(part)]
    rows.sort(key=lambda row: len(row[1]), reverse=True)

    # The longest rows first; a group ends where a third of it would be repetitions.
    groups = []
    while rows:
        length = len(rows[0][1])
        group = [row for row in rows[:pairs // length] if 3 * len(row[1]) >= 2 * length]
        rows = rows[len(group):]
        filled = [torch.cat([part, part[:1].expand(length - len(part))]) for _, part in group]
        groups.append((torch.tensor([image for image, _ in group]), torch.stack(filled)))
    return groups


def gallery_spans(ev, owner):
    """What the images are searched in: all of them, and the folds, if there are any
    -> {name: [(its images, its captions), ...]}, each a slice.

    owner: (M,) int64 the image of each caption, sorted.
    """
    n = len(owner.unique())
    if not n:
        raise Stop(f"{ev.task}: no caption in {ev.spec}")

    # COCO's 1K numbers are means over five folds of its 5,000 test images.
    folds = ev.opts.folds or (5 if n == 5000 else 1)
    size = n // folds
    if not size:
        raise Stop(f"--folds {folds}: there are only {n} images")

    # The captions of neighbouring images stand together.
    def span(start, end):
        edges = torch.tensor([start, end], device=owner.device)
        return slice(start, end), slice(*torch.searchsorted(owner, edges).tolist())

    spans = {f"all {n:,}": [span(0, n)]}
    if folds > 1:
        parts = [span(fold * size, (fold + 1) * size) for fold in range(folds)]
        spans[f"{size:,}, mean of {folds} folds"] = parts
    return spans


def retrieval_rows(ev, records, texts, sim, owner, base, rule, k):
    """The table of retrieval(): chance, the scores `sim` (N, M) under the name `base`, and by the
    rule, a key of RULES, the k best in the order of match(), for each gallery -> rows, metrics.

    owner: (M,) int64, sorted, beside sim; texts: as in match_scores().
    """
    # The galleries, and what the last row of each is called.
    galleries = gallery_spans(ev, owner)
    how = base if rule == "none" else f"re-ranked, {rule}, k={k}"

    # match() once for every pair of a shortlist, in whatever gallery.
    if rule != "none":
        wanted = torch.zeros(sim.shape, dtype=torch.bool)
        for images, captions in sum(galleries.values(), []):
            top_i, top_t = shortlist(sim[images, captions], k)
            wanted[images, captions].scatter_(1, top_i.cpu(), True)
            wanted[images, captions].scatter_(0, top_t.T.cpu(), True)
        scores = match_scores(ev, records, texts, wanted).to(sim.device)
        if rule == "sum":
            scores += sim

    # Means over the folds of a gallery; the metrics are those of the whole split.
    rows, metrics = [], {}
    for name, spans in galleries.items():
        found = defaultdict(list)
        for images, captions in spans:
            part, part_owner = sim[images, captions], owner[captions] - images.start
            found["chance"].append(chance(part_owner.cpu()))
            found[base].append(recall(part, part_owner))
            if rule != "none":
                top_i, top_t = shortlist(part, k)
                new = scores[images, captions]
                places = reranked(part, part_owner, top_i, top_t,
                                  new.gather(1, top_i), new.T.gather(1, top_t))
                found[how].append(summary(*places))

        # In the whole built-in world: what a reader who understands every caption gets.
        metrics = metrics or average(found[how])
        world = ev.spec == "shapes" and records.name == "pairs" and ev.opts.limit is None
        if world and name == next(iter(galleries)):
            oracle = shapes.oracle_recall(records.root, records.split)
            found["oracle ceiling"] = [{key: 100 * oracle[key] for key in ("i2t_r1", "t2i_r1")}]
        rows += [{"images": name, "scores": row, **average(of)} for row, of in found.items()]
    return rows, metrics


def vtm(ev):
    """Video-text retrieval: retrieval() of clips. `lists` in the protocol names the split, "full"
    or "1k-A"."""
    # Features of another extractor do not fit.
    records, width = ev.open(need=("caption",)), ev.cfg.frame_width
    found = data.read_frames(records[0]["feature"]).shape[1]
    if found != width:
        raise Stop(f"{records[0]['feature']}: {found} features a frame, "
                   f"the run was trained on {width}")

    # Clips take the place of images.
    result = retrieval(ev)
    ev.protocol.update(frames=f"at most {data.FRAMES} a clip, evenly spread")
    rows = []
    for row in result["rows"]:
        clips = row.pop("images")
        rows.append({"clips": clips, **row})
    return {**result, "rows": rows}


# --------------------------------------------------------------------------------------------------
# Answers and classes

def masked(ev):
    """Accuracy of the model's guesses at hidden places of matched pairs (each record with its first
    caption), beside that of the most frequent truth. The places are drawn with a fixed seed
    for each batch, whose records are the same for any number of processes."""

    def predictions(batch):
        with seeded(int(batch["index"][0]), ev.device):
            guesses = ev.model.masked_predictions(batch)
        found = {}
        for name, (guess, truth) in guesses.items():
            found[name, "guess"], found[name, "truth"] = guess, truth
        return found

    records = ev.open(need=("caption",))
    found = ev.collect_all(records, "sample", len(records), predictions)

    # A row for each kind of hidden place.
    rows, metrics = [], {}
    for name in dict.fromkeys(name for name, _ in found):
        # -100 = a place that is not hidden.
        truth = found[name, "truth"]
        if not (truth != -100).any():                   # of very few records
            rows.append({"hidden": name, "places": 0})
            continue
        guess, truth = found[name, "guess"][truth != -100], truth[truth != -100]
        accuracy = 100 * (guess == truth).double().mean().item()
        baseline = 100 * truth.bincount().max().item() / len(truth)
        metrics |= {name: accuracy, f"{name}_baseline": baseline}
        rows.append({"hidden": name, "places": len(truth), "accuracy": accuracy,
                     "most frequent": baseline})
    ev.protocol.update(masks="drawn as in training, seed: number of a batch's first record",
                       batch_size=ev.opts.batch_size)
    return {"rows": rows, "metrics": metrics}


def vqa(ev):
    """Ranks the answer list for every question, writes the official result file, and scores it
    where there are annotations."""
    # The model must not see the answer.
    ev.views = {name: view for name, view in ev.views.items() if view != "answer"}
    records = ev.open()
    answers = ev.info.get("stats", {}).get("answers")
    if ev.opts.answers:
        answers = data.read_answers(ev.opts.answers)
    if not answers:
        raise Stop("vqa: the run has no answer list; name one with --answers FILE")

    # The answers as tokens, no longer than the longest.
    ids, mask = ev.tokenizer.batch(answers, ev.cfg.max_text)                    # (A, max_text)
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest].to(ev.device), mask[:, :longest].to(ev.device)

    # Every question gets one answer.
    k = min(ev.setting("shortlist", 128), len(answers))
    best = ev.collect(records, "sample", len(records),
                      lambda b: ev.model.rank_answers(b, ids, mask, k), "questions")     # (N,)
    result = {}
    for record, number in zip(records, best.tolist()):
        result[record["question_id"]] = answers[number]
    out = result_path(ev, f"{ev.stem()}_results.json")
    if out:
        lines = [{"question_id": question, "answer": answer} for question, answer in result.items()]
        ev.files[out] = lambda path: path.write_text(json.dumps(lines))
    ev.protocol.update(questions=len(result), answers=len(answers), shortlist=k,
                       result_file=out and str(out))

    truth = {record["question_id"]: record for record in records if record.get("answers")}
    if not truth:
        row = {"answers": "written, no annotations here", "questions": len(result)}
        return {"rows": [row], "metrics": {}}
    always = f"always '{answers[0]}' (most frequent in training)"
    rows = [vqa_row(always, dict.fromkeys(truth, answers[0]), truth),
            vqa_row("model", result, truth)]
    metrics = {"accuracy": rows[1]["overall"], "baseline": rows[0]["overall"]}
    return {"rows": rows, "metrics": metrics}


def vqa_row(name, result, truth):
    """A row: the accuracy in percent over all questions, and over each type of answer.

    result: {question_id: answer}; truth: {question_id: record with `answers`}.
    """
    # Each question counts once overall, and once in its type.
    overall, kinds = [], defaultdict(list)
    for question, record in truth.items():
        score = 100 * vqa_accuracy(result[question], record["answers"])
        overall.append(score)
        if record.get("answer_type"):
            kinds[record["answer_type"]].append(score)

    # The types in the order of the published tables, others behind them.
    row = {"answers": name, "questions": len(truth), "overall": sum(overall) / len(overall)}
    for kind in dict.fromkeys(["yes/no", "number", "other", *sorted(kinds)]):
        if kind in kinds:
            row[kind] = sum(kinds[kind]) / len(kinds[kind])
    return row


CLASSES = {"ve": ("entailment", "neutral", "contradiction"), "nlvr2": ("False", "True")}


def classification(ev):
    """Accuracy of predict() against the labels, beside that of the split's most frequent class;
    where sentences are judged on several pairs of pictures also their consistency()."""
    # The model must have been trained on as many classes.
    records = ev.open(need=("label",))
    names = CLASSES.get(ev.task) or records.label_names
    label = torch.tensor([record["label"] for record in records])                       # (N,)
    logits = ev.collect(records, "sample", len(records), lambda b: ev.model.predict(b).float())
    if logits.shape[1] != len(names):
        raise Stop(f"{ev.task}: the model has {logits.shape[1]} classes, "
                   f"the task {len(names)}: {', '.join(names[:20])}")

    # Over all records, beside the class that is most frequent.
    right = logits.argmax(1) == label
    share = torch.bincount(label, minlength=len(names)) / len(label)
    metrics = {"accuracy": 100 * right.double().mean().item(), "baseline": 100 * share.max().item()}
    rows = [{"classes": f"always '{names[share.argmax()]}'", "records": len(label),
             "accuracy": metrics["baseline"]},
            {"classes": "model", "records": len(label), "accuracy": metrics["accuracy"]}]

    # A row for each class that occurs, if there are few.
    few = len(names) <= 20
    for c, name in enumerate(names if few else ()):
        own = right[label == c]
        if len(own):
            rows.append({"classes": f"  {name}", "records": len(own),
                         "accuracy": 100 * own.double().mean().item()})

    # For NLVR2 alone.
    found = consistency(records, right.tolist())
    if found:
        metrics["consistency"], sentences = found
        rows.append({"classes": "consistency", "records": sentences,
                     "accuracy": metrics["consistency"]})
    ev.protocol.update(classes=dict(enumerate(names)) if few else len(names))
    return {"rows": rows, "metrics": metrics}


def consistency(records, right):
    """NLVR2's consistency: the share of sentences that are judged right on all their pairs of
    pictures -> (percent, number of sentences); None where the records' `identifier` is not of the
    form split-set-pair-sentence. right: a bool for each record."""
    groups = defaultdict(list)
    for record, ok in zip(records, right):
        parts = str(record.get("identifier", "")).split("-")
        if len(parts) != 4:
            return None
        # The pair of pictures is what changes between records of one sentence.
        split, group, _, sentence = parts
        groups[split, group, sentence].append(ok)
    return 100 * sum(map(all, groups.values())) / len(groups), len(groups)


def tagging(ev):
    """mIOU@5/10/15/20 of the best tags of tag_scores() against an image's tags that are in the
    vocabulary, beside always predicting the most frequent tags of training."""
    words, names = ev.loop.get("tag_words"), ev.info["stats"]["tags"]
    records = ev.open(need=("caption" if words else "tags",))
    if words:
        records = data.caption_tags(records, words)

    # The true tags, as numbers in the vocabulary.
    place = {name: n for n, name in enumerate(names)}
    truth, outside = [], 0
    for record in records:
        known = [place[tag] for tag in record["tags"] if tag in place]
        truth.append(set(known))
        outside += len(record["tags"]) - len(known)

    # The vocabulary is sorted by frequency: the most frequent tags are 0, 1, 2, ...
    most = min(20, len(names))
    often = torch.arange(most).expand(len(truth), -1)
    top = ev.collect(records, "sample", len(records),
                     lambda b: ev.model.tag_scores(b).topk(most).indices)               # (N, most)

    # A k beyond the vocabulary is left out.
    rows = []
    for name, guess in (("the most frequent tags", often), ("model", top)):
        scores = {f"mIOU@{k}": tag_overlap(guess, truth, k) for k in (5, 10, 15, 20) if k <= most}
        rows.append({"predicted": name, "images": len(truth), **scores})

    per_image = sum(map(len, truth)) / len(truth)
    ev.protocol.update(vocabulary=len(names),
                       tags=f"caption words listed in {words}" if words else "the records'",
                       tags_per_image=round(per_image, 2), tags_outside_vocabulary=outside)
    return {"rows": rows, "metrics": scores}


def probe(ev):
    """Linear probe: a layer trained on the frozen features of an ImageFolder's train split, top-1
    on its val split; beside it the same on a model of this shape with random weights, and the most
    frequent class."""
    # Pictures as the model sees them in evaluation, with their labels.
    shown = ev.views.get("image_eval") or ev.views.get("features_eval", "resize")
    ev.views = {"source": "classes", "image": "resize", "image_eval": shown, "label": "label",
                "norm": ev.views.get("norm", "clip")}

    # At the end of training on other data there is nothing to measure, and that is said.
    folders = ev.spec == "shapes" or all(map(os.path.isdir, ev.spec.split(",")))
    if ev.other_kind() or not folders:
        hint = (f"not measured, {ev.spec} is no ImageFolder: "
                "python eval.py RUN --task probe --data imagenet")
        if ev.opts.data:
            raise Stop(f"probe: {hint}")
        return {"rows": [{"linear probe": hint}], "metrics": {}}

    # Both splits and their labels.
    splits, truth = {}, {}
    for name, split in (("test", "val"), ("train", "train")):
        splits[name] = ev.open(need=("label",), split=split)
        labels = [record["label"] for record in splits[name]]
        truth[name] = torch.tensor(labels).to(ev.device)
    classes, lr = len(splits["train"].label_names), ev.opts.probe_lr

    # The most frequent class of the test split.
    most = truth["test"].bincount(minlength=classes).argmax()
    top1s = {name: 100 * (y == most).double().mean().item() for name, y in truth.items()}
    found = {"always the most frequent class": (top1s["train"], top1s["test"], None)}

    # The same layer on the features of both models.
    for name, model in (("random weights", random_twin(ev)), ("model", ev.model)):
        x = {}
        for split, records in splits.items():
            features = ev.collect(records, "sample", len(records),
                                  lambda b: model.visual_features(b).float(), split)
            x[split] = features.to(ev.device)
        found[name] = fit_probe(x, truth, classes, lr)

    # The table, and how it was made.
    rows, metrics = [], {}
    for name, (train, test, rate) in found.items():
        rows.append({"linear probe on": name, "images": len(truth["test"]), "lr": rate,
                     "train top-1": train, "top-1": test})
        metrics[name] = test
    tried = ", ".join(f"{rate:g}" for rate in PROBE_RATES)
    ev.protocol.update(train=len(truth["train"]), test=len(truth["test"]),
                       classes=classes,
                       features="as they are" if lr else "mean 0 and deviation 1 over train",
                       lr=f"{lr:g}" if lr else f"of {tried} the best on a held-out tenth of train",
                       optimizer="SGD momentum 0.9, lr /5 at 30, 40, 50 of 60 epochs, batch 256, "
                                 "no weight decay, no augmentation")
    return {"rows": rows, "metrics": metrics}


def random_twin(ev):
    """A model of the same class and settings with random weights, by the run's own seed."""
    labels = ev.info.get("stats", {}).get("num_labels", 0)
    with seeded(ev.loop.get("seed", 0), ev.device):
        twin = type(ev.model)(ev.cfg, ev.info["task"], num_labels=labels)
    return twin.to(ev.device).eval()


# --------------------------------------------------------------------------------------------------
# Detection

def detections(ev, records):
    """detect() on this process's pictures -> {record: with_overlaps()}."""
    found = {}
    for batch in ev.progress(ev.batches(records, "sample"), len(records), "detecting"):
        with ev.autocast:
            results = ev.model.detect(batch)
        for i, detected in zip(batch["index"].tolist(), results):
            check_numbers(ev, "scores", detected["scores"])
            found[i] = with_overlaps(detected, records[i])
    return found


def with_overlaps(detected, record):
    """A picture's detections as numpy arrays, with their IoU with the record's objects.

    detected: {boxes (n, 4) xyxy, scores (n,), labels (n,), perhaps masks (n, H, W) bool}
    -> {the same; iou (n, m); with masks also mask_iou (n, m), and masks as COCO's run lengths}.
    """
    # The boxes, and how they overlap with the true ones.
    mine = {name: detected[name].float().cpu().numpy() for name in ("boxes", "scores", "labels")}
    mine["iou"] = box_iou(mine["boxes"], np.array(record["boxes"]).reshape(-1, 4))

    # The masks are kept as run lengths: those of 5,000 pictures would not fit in memory.
    if "masks" in detected:
        size = (record["height"], record["width"])
        masks = detected["masks"].cpu().numpy()
        truth = [data.decode_mask(s, *size, record["image"]) for s in record["segmentation"]]
        mine["mask_iou"] = mask_iou(masks, np.array(truth).reshape(-1, *size))
        mine["masks"] = list(map(data.encode_mask, masks))
    return mine


def whole_pictures(records):
    """The baseline that needs no model: in each picture, a box of each class that is the whole
    picture -> {record: dict as of with_overlaps()}."""
    classes, found = len(records.label_names), {}
    for i, record in enumerate(records):
        box = [0.0, 0.0, record["width"], record["height"]]
        boxes, truth = np.array([box] * classes), np.array(record["boxes"]).reshape(-1, 4)
        found[i] = {"boxes": boxes, "labels": np.arange(classes), "scores": np.ones(classes),
                    "iou": box_iou(boxes, truth)}
    return found


def detection(ev):
    """Average precision of detect() on every picture of the split, of boxes and, if there are any,
    of masks: VOC's 11-point one, and COCO's where pycocotools is installed; beside it the baseline
    whole_pictures()."""
    # Pictures of up to 1,333 pixels.
    ev.opts.batch_size = min(ev.opts.batch_size, 4)

    # Classes are compared by name: their numbers depend on the file.
    records = ev.open(need=("boxes",))
    trained = ev.info.get("stats", {}).get("label_names")
    if trained and trained != records.label_names:
        raise Stop(f"{ev.task}: the run's classes ({', '.join(trained[:5])}, ...) are not those of "
                   f"{ev.spec} ({', '.join(records.label_names[:5])}, ...)")

    # Each process has looked at its share.
    found = {}
    for piece in everyone(ev, detections(ev, records)):
        found.update(piece)

    # What is measured: its name, the boxes, VOC's word for their overlap, COCO's for their kind.
    measured = [("boxes", found, "iou", "bbox")]
    if any("masks" in detected for detected in found.values()):
        measured.append(("masks", found, "mask_iou", "segm"))
    measured.append(("whole picture", whole_pictures(records), "iou", "bbox"))

    # A row for each of them and each way to measure.
    classes, coco = len(records.label_names), importlib.util.find_spec("pycocotools")
    rows, metrics = [], {}
    for name, boxes, overlap, kind in measured:
        scores = {"VOC07 11-point": voc_scores(boxes, records, classes, overlap)}
        if coco:
            scores["pycocotools"] = coco_scores(boxes, records, kind)
        for way, values in scores.items():
            rows.append({"pictures": len(records), "measure": f"{name}, {way}", **values})
            short = f"{name.replace(' ', '_')}_{'voc' if 'VOC' in way else 'coco'}"
            metrics |= {f"{short}_{key}": value for key, value in values.items()}
    if not coco and ev.is_main:
        print(f"{ev.task}: COCO's own average precision needs pip install pycocotools; "
              "VOC's is computed here")

    # How many objects there are, and how many boxes were found.
    objects = sum(len(record["boxes"]) for record in records)
    total = sum(len(detected["scores"]) for detected in found.values())
    ev.protocol.update(objects=objects, classes=classes, detections=total,
                       AP="mean over IoU 0.50:0.05:0.95 and the classes that occur; "
                          "difficult objects and crowds ignored")
    return {"rows": rows, "metrics": metrics}


# --------------------------------------------------------------------------------------------------
# Where a model looks, and what it finds

def picture_views(views):
    """-> (the views of a picture, or of its regions, and a caption; does a center crop hide a part
    of the picture from the model?)."""
    kept = {"source": "pairs", "text": "caption"}
    for name in ("image", "image_eval", "features", "features_eval", "norm", "regions"):
        if name in views:
            kept[name] = views[name]
    return kept, kept.get("image_eval") == "center"


def one_record(image, text):
    """data.Records of one picture (a path) and one caption."""
    records = data.Records("pairs", None)
    records.append({"image": image, "image_id": 0, "caption": [text]})
    return records


def seen_picture(where, cropped):
    """The picture that the model sees, in its own size. where: its place; cropped: the center."""
    picture = data.open_picture(where)
    return data.center(picture, min(picture.size)) if cropped else picture


def drawing_path(ev):
    """The file of a drawing: --out, else one in the run's directory."""
    path = ev.opts.out or result_path(ev, f"{ev.stem()}.png")
    if not path:
        raise Stop(f"{ev.task}: the model is in no directory: name the PNG with --out")
    return Path(path)


def word_maps(tokens, maps):
    """Joins wordpieces. tokens: T strings; maps: (T, ...) -> [(word, (...) mean over its pieces)],
    without the special tokens."""
    words = []
    for token, m in zip(tokens, maps):
        if token.startswith("##") and words:
            words[-1][0] += token[2:]
            words[-1][1].append(m)
        elif token not in ("[CLS]", "[SEP]", "[PAD]"):
            words.append([token, [m]])
    return [(word, torch.stack(pieces).mean(0)) for word, pieces in words]


def attention_maps(ev, batch):
    """model.gradcam() of a batch -> for each record ([(word, map (h, w))], the sentence's map
    (h, w)), float32 on the CPU."""
    # Grad-CAM needs gradients, and evaluation runs without.
    with torch.enable_grad(), ev.autocast:
        maps = ev.model.gradcam(batch, block=ev.opts.block)
    check_numbers(ev, "maps", maps["word"])

    # Padding has no map.
    for b, mask in enumerate(batch["text_mask"].bool()):
        tokens = ev.tokenizer.tokens(batch["text"][b][mask].tolist())
        words = maps["word"][b][mask].detach().float().cpu()
        yield word_maps(tokens, words), maps["sentence"][b].detach().float().cpu()


def gradcam(ev):
    """One PNG for --image and --text: where the model looks for each word and for the sentence."""
    if not (ev.opts.image and ev.opts.text):
        raise Stop('gradcam: name a picture and a text: --image a.jpg --text "..." '
                   "(--task pointing measures a split)")
    ev.views, cropped = picture_views(ev.views)
    picture = seen_picture(ev.opts.image, cropped)

    # One picture: every process looks at it, the main one draws.
    ev.alone()
    out = drawing_path(ev)
    batch = next(ev.batches(one_record(ev.opts.image, ev.opts.text), "sample"))
    words, sentence = next(attention_maps(ev, batch))
    ev.files[out] = lambda path: draw_maps(picture, ev.opts.text, words, sentence, path)
    ev.protocol.update(image=ev.opts.image, text=ev.opts.text, block=ev.opts.block)

    # A word whose state the score does not read has no gradient.
    silent = sum(m.max() <= 0 for _, m in words)
    if silent and ev.is_main:
        print(f"{silent} of {len(words)} words have a map of zeros: of the last (or only) fusion "
              "layer the match score reads [CLS] alone; try another --block")
    grid = "x".join(map(str, sentence.shape))
    return {"rows": [{"file": str(out), "words": len(words), "grid": grid}], "metrics": {}}


def pointing(ev):
    """On data with boxes: the share of a word's map that lies in the boxes of the object it names,
    beside the boxes' share of the picture (what a uniform map gets). The words are those that equal
    a label's name; the caption is each record's first."""
    ev.views, cropped = picture_views(ev.views)
    if cropped:
        raise Stop("pointing: boxes and a center crop do not go together")
    records = ev.open(need=("caption", "boxes", "labels"))

    mine = {}                                   # of a record: (inside, uniform, peak) of each word
    for batch in ev.progress(ev.batches(records, "sample"), len(records), "pointing"):
        maps = attention_maps(ev, batch)
        for i, bad, (words, _) in zip(batch["index"].tolist(), batch["bad"].tolist(), maps):
            boxes = named_boxes(records, records[i])
            named = [(word, m) for word, m in words if word in boxes and m.max() > 0]
            if named and not bad:
                size = data.load_image(records[i]["image"]).size
                mine[i] = pointed(named, boxes, size)

    # The words of all processes, in the data's order.
    of_record, found = {}, []
    for piece in everyone(ev, mine):
        of_record |= piece
    for i in sorted(of_record):
        found += of_record[i]
    if not found:
        raise Stop("pointing: no word that equals a label's name has a map other than zero: of the "
                   "last (or only) fusion layer the match score reads [CLS] alone")
    inside, uniform, peak = (100 * np.mean(found, 0)).tolist()
    row = {"inside the box": inside, "uniform": uniform, "ratio": round(inside / uniform, 2),
           "peak in the box": peak}
    return {"rows": [{"words": len(found), **row}], "metrics": row}


def named_boxes(records, record):
    """{a label's name: the boxes (xyxy, pixels) of the record's objects of that name}."""
    # A record may name its own labels; else the data set does.
    names = record.get("label_names")
    if not names:
        names = [records.label_names[label] for label in record["labels"]]
    boxes = defaultdict(list)
    for name, box in zip(names, record["boxes"]):
        boxes[name].append(box)
    return boxes


def cross_attention(ev):
    """How much a model's token-level heads look at the other side's [CLS] state, on the validation
    split, with inputs masked by a fixed seed. A sample's mean and standard deviation over its
    tokens are averaged over the samples; "std of all" is that of all tokens together; "uniform" is
    what equal attention to all keys gives."""
    ev.opts.split = ev.opts.split or "val"
    records, seed = ev.open(need=("caption",)), ev.loop.get("seed", 0)

    def sums(batch):
        """{name: (B, 4): number of tokens, sum of their scores, of the squares, uniform}."""
        with seeded(seed + int(batch["index"][0]), ev.device):
            found = ev.model.cross_attention(batch)
        out = {}
        for name, (scores, where, uniform) in found.items():
            scores = scores.double() * where
            columns = (where.sum(1), scores.sum(1), (scores * scores).sum(1), uniform)
            out[name] = torch.stack(columns, 1)
        return out

    def deviation(n, total, squares):
        return (squares / n - (total / n) ** 2).clamp(min=0).sqrt()

    # Sums are all that is kept of a sample: its mean and deviation follow.
    rows, metrics = [], {}
    found = ev.collect_all(records, "sample", len(records), sums, "attention")
    for name, parts in found.items():
        # Captions without a token drop out.
        n, total, squares, uniform = parts[parts[:, 0] > 0].T                           # (N,) each
        values = {"mean": (total / n).mean().item(),
                  "std": deviation(n, total, squares).mean().item(),
                  "std of all": deviation(n.sum(), total.sum(), squares.sum()).item(),
                  "uniform": uniform.mean().item()}
        shown = {key: f"{value:.3f}" for key, value in values.items()}
        rows.append({"attention": name, "tokens": int(n.sum()), **shown})
        metrics |= {f"{name}, {key}": value for key, value in values.items()}
    ev.protocol.update(captions="the first of each record",
                       masks=f"seed {seed} + number of a batch's first record",
                       batch_size=ev.opts.batch_size)
    return {"rows": rows, "metrics": metrics}


def gallery(ev, k=5):
    """One PNG: for --text the k nearest pictures of the split, for --image the k nearest captions,
    with their cosines. Framed is what belongs together in the data: pictures that have the text as
    a caption, captions of the picture."""
    if not (ev.opts.text or ev.opts.image):
        raise Stop('gallery: ask with a text, a picture or both: --text "..." --image a.jpg')

    # An unreadable picture is refused before the split is encoded.
    if ev.opts.image:
        data.open_picture(ev.opts.image)
    records = ev.open(need=("caption",))
    out = drawing_path(ev)
    captions, owner = data.flat_captions(records)
    pictures = [records[i]["image"] for i in data.unique_images(records)[0]]
    query = one_record(ev.opts.image or pictures[0], ev.opts.text or captions[0])
    right_pictures, right_captions = belonging(ev.opts.text, ev.opts.image, pictures, captions,
                                               owner)

    rows, parts, metrics = [], [], {}
    for what, other, things, right in (("text", "image", pictures, right_pictures),
                                       ("image", "text", captions, right_captions)):
        asked = getattr(ev.opts, what)
        if not asked:
            continue

        # The cosine of the question with everything on the other side.
        vectors = ev.embed(records, other, len(things))
        scores = vectors @ ev.embed(query, what, 1)[0]                          # (N,) or (M,)
        best = scores.topk(min(k, len(things))).indices.tolist()
        rank = None
        if right.any():
            rank = int((scores[~right] >= scores[right].max()).sum()) + 1
        metrics[f"rank of the true {other}"] = rank

        # For the drawing and for the table.
        parts.append((asked, what, [(scores[i].item(), bool(right[i]), things[i]) for i in best]))
        for n, i in enumerate(best):
            known = "unknown" if rank is None else ""
            rows.append({"query": "" if n else asked, "rank": n + 1, "cosine": f"{scores[i]:.3f}",
                         "true": "yes" if right[i] else known, "found": str(things[i])})

    ev.files[out] = lambda path: draw_gallery(parts, path)
    ev.protocol.update(images=len(pictures), captions=len(captions), **metrics, file=str(out))
    return {"rows": rows, "metrics": metrics}


def belonging(text, image, pictures, captions, owner):
    """What belongs to a question in the data -> bool (N,): the pictures that have the text as a
    caption; bool (M,): the captions of the picture.

    text: str or None; image: a path or None; pictures: N places; captions: M strings;
    owner: (M,) int64, the picture of each caption.
    """

    def plain(string):
        return " ".join(string.lower().split())

    right_pictures = torch.zeros(len(pictures), dtype=torch.bool)
    if text:
        same = torch.tensor([plain(caption) == plain(text) for caption in captions])
        right_pictures[owner[same]] = True

    # A picture in a tar has no path.
    place = os.path.realpath(image) if image else None
    same = [isinstance(p, str) and os.path.realpath(p) == place for p in pictures]
    return right_pictures, torch.tensor(same)[owner]


def attention(ev):
    """How near each area of a picture and each word lies to the final vector, by rank; with
    --beside another run next to it."""
    if bool(ev.opts.image) != bool(ev.opts.text):
        raise Stop("attention: --image and --text go together "
                   "(without them: the split's first picture and caption)")

    # One picture and one text for all runs, each with its own views of them.
    runs = [ev.other(ev.opts.beside)] if ev.opts.beside else []
    runs.append(ev)
    for run in runs:
        run.views, cropped = picture_views(run.views)
        run.alone()

    # The picture and the text.
    if ev.opts.image:
        records = one_record(ev.opts.image, ev.opts.text)
    else:
        records = ev.open(need=("caption",)).subset([0])
    image, text = records[0]["image"], records[0]["caption"][0]
    picture, out = seen_picture(image, cropped), drawing_path(ev)

    # Each run's scores of areas and words.
    panels, rows = [], []
    for run in runs:
        batch = next(run.batches(records, "sample"))
        with run.autocast:
            scores, mask = run.model.token_scores(batch), batch["text_mask"][0].bool()
        check_numbers(run, "scores of areas", scores["image"])
        tokens = run.tokenizer.tokens(batch["text"][0][mask].tolist())
        pieces = word_maps(tokens, scores["text"][0][mask].float().cpu())
        words = [(word, float(score)) for word, score in pieces]
        areas = scores["image"][0].float().cpu()                                        # (h, w)

        # A panel of the drawing, and a row of the table.
        title = run_name(run)
        panels.append((title if len(title) < 38 else "..." + title[-35:], areas, words))
        row, column = divmod(int(areas.argmax()), areas.shape[1])
        best = sorted(words, key=lambda word: -word[1])[:5]
        rows.append({"run": title, "grid": "x".join(map(str, areas.shape)),
                     "brightest": f"row {row + 1}, column {column + 1}",
                     "top words": ", ".join(word for word, _ in best)})

    ev.files[out] = lambda path: draw_ranks(picture, panels, path)
    ev.protocol.update(text=text, image=image,
                       brightness="by rank of the cosine with the final vector", file=str(out))
    return {"rows": rows, "metrics": {}}


# --------------------------------------------------------------------------------------------------
# Sentences and hash codes

def sts(ev):
    """Cosines of sentence vectors against graded pairs, without training, beside a bag of words;
    each dataset (STS12, ..., STSB) on its own, over all its subsets at once."""
    ev.views = {"source": "sts", "s1": "sentence", "s2": "sentence"}
    records = ev.open()
    if len(records) < 2:
        raise Stop("sts: a correlation needs two pairs of sentences")

    def cosine(batch):
        vectors = []
        for side in ("s1", "s2"):
            sentence = {"text": batch[side], "text_mask": batch[f"{side}_mask"]}
            vectors.append(ev.model.encode_text(sentence).float())
        return (vectors[0] * vectors[1]).sum(1)                                         # (B,)

    # Both scores of every pair.
    found = ev.collect(records, "sample", len(records), cosine).numpy()
    words = np.array([bag_of_words(record["s1"], record["s2"]) for record in records])

    # The pairs of each dataset, in the order of the files.
    sets = defaultdict(list)
    for i, record in enumerate(records):
        sets[record["dataset"]].append(i)

    # Two rows for each dataset.
    rows, models, bags = [], [], []
    for name, at in sets.items():
        part = [records[i] for i in at]
        gold = [record["score"] for record in part]
        subsets = [record["subset"] for record in part]
        bags.append(graded(words[at], gold, subsets))
        models.append(graded(found[at], gold, subsets))
        rows.append({"data": name, "pairs": len(at), "scores": "bag of words", **bags[-1]})
        rows.append({"data": name, "pairs": len(at), "scores": "model", **models[-1]})

    # The metrics are means over the datasets.
    mean = average(models)
    metrics = {key: mean[key] for key in ("P+S / 2", "spearman", "pearson")}
    metrics["baseline"] = average(bags)["spearman"]
    vector = ev.model.sentence_vector() if hasattr(ev.model, "sentence_vector") else None
    ev.protocol.update(similarity="cosine, no training", vector=vector,
                       unscored=records.notes.get("unscored", 0))
    return {"rows": rows, "metrics": metrics}


def hashing(ev):
    """MAP@5000 of hash codes: the test list's pictures are the queries, those of the database list
    are ranked; beside it random codes."""
    # The queries, and the database that they are looked up in.
    queries, opts = ev.open(need=("labels",)), ev.opts
    if not (opts.database or ev.spec == "shapes" or os.path.isdir(ev.spec)):
        raise Stop("hashing: --data names the queries' list; name the database's with --database "
                   "(or give the folder of both)")
    database = data.open_source("hashing", opts.database or ev.spec, "database", ev.root,
                                need=("labels",))

    # Images without a label have no relevant image, and are left out.
    codes, labels, left_out = [], [], []
    for records, text in ((queries, "queries"), (database, "database")):
        y = torch.tensor([record["labels"] for record in records])                      # (N, C)
        labeled = y.any(1)
        h = ev.collect(records, "sample", len(records), ev.model.hash_codes, text)      # (N, bits)
        codes.append(h[labeled])
        labels.append(y[labeled])
        left_out.append(int((~labeled).sum()))
    if labels[0].shape[1] != labels[1].shape[1] or not min(map(len, codes)):
        raise Stop(f"hashing: {labels[0].shape[1]} labels in the queries' list, "
                   f"{labels[1].shape[1]} in the database's; "
                   f"{len(codes[0])} and {len(codes[1])} labeled images")

    # The baseline: codes of the same size by coin flips.
    generator = torch.Generator().manual_seed(0)
    random_codes = []
    for h in codes:
        random_codes.append(torch.randint(0, 2, h.shape, generator=generator) * 2.0 - 1)

    # MAP of both.
    r, name = min(opts.map_at, len(codes[1])), f"MAP@{opts.map_at}"
    rows = []
    for who, (query, base) in (("random codes", random_codes), ("model", codes)):
        within, whole = map_at(query, base, *labels, r)
        rows.append({"codes": who, "bits": query.shape[1], "queries": len(query),
                     "database": len(base), name: within, f"{name}, all relevant": whole})
    ev.protocol.update(r=r, denominator=f"{name}: the relevant within the top {r} (CSQ); "
                                        "'all relevant': those in the whole database",
                       ties="equal distances in the database's order",
                       left_out_without_label=left_out)
    metrics = {"map": within, "map_all_relevant": whole, "baseline": rows[0][name]}
    return {"rows": rows, "metrics": metrics}


# --------------------------------------------------------------------------------------------------
# Seconds

def timed(fn, device, repeats):
    """The seconds of the fastest of `repeats` calls; a GPU is waited for."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # The fastest call is the one that was disturbed least.
    best = math.inf
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        fn()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def score_dual(ev, images, texts):
    """Scores by a dual encoder -> (N, M): every picture and every caption is encoded once, then
    one matrix product. images, texts: lists of batches."""
    image_emb = torch.cat([ev.model.encode_image(batch).float() for batch in images])
    text_emb = torch.cat([ev.model.encode_text(batch).float() for batch in texts])
    return image_emb @ text_emb.T


def score_pairs(ev, images, texts):
    """Scores by match() -> (N * M,): every picture with every caption. images, texts: lists of
    batches."""
    # The states of all captions, made once.
    states = [ev.states("text", batch) for batch in texts]
    captions = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    m = len(next(iter(captions.values())))

    # One picture with as many captions as go at once.
    out = []
    for batch in images:
        pictures = ev.states("image", batch)
        for n in range(len(next(iter(pictures.values())))):
            picture = {name: t[n:n + 1] for name, t in pictures.items()}
            for part in torch.arange(m, device=ev.device).split(ev.opts.pairs):
                texts_of_part = {name: t[part] for name, t in captions.items()}
                out.append(ev.model.match(picture | texts_of_part))
    return torch.cat(out)


def growth(sizes, seconds):
    """How seconds grow with the size: the slope in log-log scale from each size to the next (1 is
    O(n), 2 is O(n^2)) and over all of them -> [None, slope, ...], slope; NaN for a single size."""
    # From each size to the next: the first has none before it.
    steps = [None]
    for n in range(1, len(sizes)):
        ratio = math.log(seconds[n] / seconds[n - 1])
        steps.append(ratio / math.log(sizes[n] / sizes[n - 1]))

    # One straight line through all of them.
    if len(sizes) == 1:
        return steps, math.nan
    return steps, float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def speed(ev):
    """Seconds of embedding and scoring a gallery of n pictures and their captions, without those of
    reading files and of the detector behind stored regions; for a dual encoder and for a model that
    scores pairs; with --beside those of another run too. `growth` is as in growth()."""
    # The sizes, and the runs to compare.
    sizes, runs = sorted(set(map(int, ev.opts.sizes.split(",")))), [ev]
    if ev.opts.beside:
        runs.append(ev.other(ev.opts.beside))

    # Each run looks at pictures (or their regions) and captions, on this process alone.
    rows, metrics = [], {}
    for run in runs:
        run.alone()
        run.views = picture_views(run.views)[0]
        records = run.open(need=("caption",))
        if len(records) < sizes[-1]:
            raise Stop(f"--sizes {ev.opts.sizes}: the split has {len(records)} pictures")

        # The ways to score that the model has: name, function, how often it is timed.
        ways = []
        if offers(run.model, "encode_image", "encode_text"):
            ways.append(("dual encoder", score_dual, 3))
        if offers(run.model, "match"):
            ways.append(("match, every pair", score_pairs, 1))

        # A row for each way and size.
        for way, score, repeats in ways:
            captions, seconds = time_galleries(run, records, sizes, score, repeats)
            steps, slope = growth(sizes, seconds)
            for n, texts, second, step in zip(sizes, captions, seconds, steps):
                rows.append({"run": run_name(run), "way": way, "pictures": n, "captions": texts,
                             "seconds": f"{second:.4f}",
                             "growth": None if step is None else f"{step:.2f}"})
            metrics[f"{run_name(run)}, {way}: growth"] = slope

    # Regions are stored: the detector that made them takes its time elsewhere.
    left_out = "reading files"
    if any("regions" in run.views for run in runs):
        left_out += ", making regions"
    ev.protocol.update(sizes=sizes, threads=torch.get_num_threads(),
                       batch_size=ev.opts.batch_size, pairs=ev.opts.pairs, not_counted=left_out)
    return {"rows": rows, "metrics": metrics}


def time_galleries(run, records, sizes, score, repeats):
    """score(run, images, texts) of the first n pictures, for each n of `sizes` -> their numbers of
    captions, their seconds."""
    captions, seconds = [], []
    for n in sizes:
        part = records.subset(range(n))
        images, texts = list(run.batches(part, "image")), list(run.batches(part, "text"))
        captions.append(sum(len(batch["index"]) for batch in texts))

        # The first call of all is slower, and is not counted.
        with run.autocast:
            if not seconds:
                score(run, images[:1], texts[:1])
            seconds.append(timed(lambda: score(run, images, texts), run.device, repeats))
    return captions, seconds


# --------------------------------------------------------------------------------------------------
# The evaluations

class Task(NamedTuple):
    """A row of TASKS."""

    function: object            # Eval -> {"rows", "metrics"}
    ways: list                  # what the model must have: one of these sets of methods
    source: str = ""            # the kind of data of which it is the test, if only one is
    flags: tuple = ()           # what it reads of the command line beside ALWAYS


ALWAYS = ("run", "task", "vocab", "dtype", "batch_size", "workers")
SPLIT = ("data", "image_root", "split", "limit", "regions")
RANKED = (*SPLIT, "captions", "pairs", "rerank", "rerank_k", "candidates", "candidates_from",
          "folds", "ensemble")
DRAWN = ("image", "text", "out")

# batch_size stands among the flags of those whose numbers depend on it.
TASKS = {
    "retrieval": Task(retrieval, [("encode_image", "encode_text"), ("match",)], "", RANKED),
    "masked": Task(masked, [("masked_predictions",)], "", (*SPLIT, "batch_size")),
    "vqa": Task(vqa, [("rank_answers",)], "", (*SPLIT, "answers", "shortlist")),
    "ve": Task(classification, [("predict",)], "ve", SPLIT),
    "nlvr2": Task(classification, [("predict",)], "nlvr2", SPLIT),
    "gradcam": Task(gradcam, [("gradcam",)], "", (*DRAWN, "block")),
    "pointing": Task(pointing, [("gradcam",)], "", (*SPLIT, "block")),
    "cross_attention": Task(cross_attention, [("cross_attention",)], "", (*SPLIT, "batch_size")),
    "gallery": Task(gallery, [("encode_image", "encode_text")], "", (*SPLIT, *DRAWN)),
    "vtm": Task(vtm, [("encode_clip", "encode_text")], "", RANKED),
    "sts": Task(sts, [("encode_text",)], "", ("data", "split", "limit")),
    "hashing": Task(hashing, [("hash_codes",)], "", (*SPLIT, "database", "map_at")),
    "attention": Task(attention, [("token_scores",)], "", (*SPLIT, *DRAWN, "beside")),
    "speed": Task(speed, [("encode_image", "encode_text"), ("match",)], "",
                  (*SPLIT, "beside", "sizes", "batch_size", "pairs")),
    "linear": Task(classification, [("predict",)], "classes", SPLIT),
    "probe": Task(probe, [("visual_features",)], "", ("data", "image_root", "limit", "probe_lr")),
    "tagging": Task(tagging, [("tag_scores",)], "", SPLIT),
    "detection": Task(detection, [("detect",)], "", SPLIT),
    "segmentation": Task(detection, [("detect",)], "", SPLIT),
}


# --------------------------------------------------------------------------------------------------
# Running them

def table(rows, width=None):
    """Rows (dicts: text, floats with one decimal; a dash where a row has no value) -> a table. One
    that is wider than `width` (None: that of the terminal, or COLUMNS) goes on below, where its
    first columns are repeated; text longer than half the width loses its middle."""
    # Without a terminal and without COLUMNS there is no limit.
    width = width or shutil.get_terminal_size((10 ** 6, 0)).columns
    heads = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for head in heads:
        cells = [head.replace("_r", " R@") if head[-1].isdigit() else head]
        for row in rows:
            value = row.get(head)
            shown = f"{value:.1f}" if isinstance(value, float) else str(value)
            cells.append("-" if value is None else shortened(shown, width // 2 - 2))

        # Text stands on the left, numbers on the right.
        most = max(map(len, cells))
        text = any(isinstance(row.get(head), str) for row in rows)
        columns[head] = [cell.ljust(most) if text else cell.rjust(most) for cell in cells]

    # Columns of one thing (i2t_r1, i2t_r5, ...) stay together; each block begins with the text.
    first = len(list(itertools.takewhile(
        lambda head: any(isinstance(row.get(head), str) for row in rows), heads[:-1])))
    blocks = [heads[:first]]
    for _, group in itertools.groupby(heads[first:], lambda head: head.split("_")[0]):
        group = list(group)
        taken = sum(len(columns[head][0]) + 2 for head in blocks[-1] + group) - 2
        if taken > width and len(blocks[-1]) > first:
            blocks.append(heads[:first])
        blocks[-1] += group

    out = []
    for block in blocks:
        lines = ["  ".join(cells).rstrip() for cells in zip(*(columns[head] for head in block))]
        out.append("\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]))
    return "\n\n".join(out)


def shortened(text, most):
    """The text without its middle, if it is longer than `most`."""
    half = max(1, (most - 3) // 2)
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def result_path(ev, name):
    """The file `name` in the run's directory; None for a model that is in no directory."""
    return Path(ev.info["path"]) / name if ev.info.get("path") else None


def provenance(ev):
    """What the numbers depend on: checkpoint, commit, versions, number of processes, device."""
    # The file itself: a directory may be trained again.
    weights, sha256 = result_path(ev, "model.safetensors"), None
    if weights and weights.is_file():
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()

    # The code, if it lies in a git repository.
    commit = None
    if shutil.which("git"):
        done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True,
                              text=True)
        commit = done.stdout.strip() or None

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__}
    return {"checkpoint": ev.info.get("path"), "step": ev.info.get("step"), "git_commit": commit,
            "versions": versions, "sha256": sha256, "world_size": ev.world,
            "device": str(ev.device), "dtype": ev.opts.dtype}


def evaluate(model, info, task, opts=None, rank=0, world=1, quiet=False):
    """One evaluation, called on every process with the bare model.

    info: config.json and, if the results are to be written, `path`; task: a key of TASKS;
    opts: a dict or namespace over the command line's defaults.
    -> {"task", "metrics", "rows", "protocol"}, the same on all processes. Rank 0 prints the table
    and writes eval-<task>-<data>-<split>.json, unless `quiet`. The model is left in the mode it was
    in. Stop, one line, if it lacks what the task needs.
    """
    check_offer(model, info, task)
    ev = Eval(model, info, task, options_of(task, opts), rank, world)
    for name, t in model.named_parameters():
        if not t.isfinite().all():
            raise Stop(f"{info.get('path') or task}: weights are damaged, {name} is not finite")

    # no_grad, not inference_mode: a model may keep tensors for later training.
    training = model.training
    model.eval()
    with torch.no_grad():
        result = TASKS[task][0](ev)
    model.train(training)

    # Unreadable pictures of all processes.
    ev.bad = set().union(*everyone(ev, ev.bad))
    protocol = {**ev.protocol, "unreadable_images": len(ev.bad), **provenance(ev),
                "settings": ev.settings}
    result = {"task": task, **result, "protocol": protocol}
    if ev.is_main and not quiet:
        report(ev, result)
    return result


def check(model, info, names, options):
    """Stop, one line, for whatever evaluate() would stumble over: a training calls this before it
    begins. Each evaluation is rehearsed up to its first batch: its name, its options, its data and
    their size are looked at by the same lines that will be run at the end.

    names: evaluations; options: as opts of evaluate(), the same for all. The data are read here,
    and are at hand for the evaluation itself (see read_records).
    """
    for task in names:
        check_offer(model, info, task)
        try:
            TASKS[task].function(Eval(model, info, task, options_of(task, options), 0, 1, True))
        except Ready:
            continue
        except (Stop, data.DataError) as error:
            raise Stop(f"the evaluation at the end: {error}") from None


def write_whole(path, fn):
    """fn(temporary path), then rename: `path` is whole, old or new. Stop if that is impossible."""
    # The same ending: a drawing's format follows from it.
    part = path.with_name(f".part-{path.name}")
    try:
        fn(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Stop(f"{path}: not written: {error.strerror or error}") from None


def report(ev, result):
    """Prints an evaluation's result, and writes it into the run's directory: printed first, so that
    a full disk loses no numbers."""
    # The protocol stands above the table, without what does not apply.
    words = [f"{key} {value}" for key, value in ev.protocol.items() if value is not None]
    width = min(120, shutil.get_terminal_size((120, 0)).columns)
    print("\n" + textwrap.fill(f"{ev.task}: {'; '.join(words)}", width))
    if ev.bad:
        print(f"{len(ev.bad)} images could not be read and were taken as grey ones")
    print(table(result["rows"]))

    out = result_path(ev, f"eval-{ev.stem()}.json")
    if out:
        ev.files[out] = lambda path: path.write_text(json.dumps(result, indent=1, default=str))
    for path, fn in ev.files.items():
        write_whole(path, fn)
        print(f"-> {path}", flush=True)


def parser():
    p = Parser(prog="eval.py", description=__doc__)
    p.add_argument("run", help="a run's directory: config.json, model.safetensors")
    p.add_argument("--task", help=f"{', '.join(TASKS)}; default: those of the run's own task")

    # Every evaluation.
    p.add_argument("--data", help="files in the official format, or shapes; default: the run's")
    p.add_argument("--image_root", help="folder that the images' paths are relative to")
    p.add_argument("--split", help="train, val or test; default: test, or val where there is none")
    p.add_argument("--limit", type=int, help="only so many records, for a quick look")
    p.add_argument("--captions", type=int, help="retrieval: only the first so many captions of "
                   "each image; 5 is the published protocol of COCO (25,000 of 25,010)")
    p.add_argument("--vocab", help="BERT vocabulary file; default: the run's")
    p.add_argument("--regions", help="region files, separated by commas; default: the run's")
    p.add_argument("--batch_size", type=int, default=64, help="records at a time (default: 64)")
    p.add_argument("--pairs", type=int, default=512,
                   help="image-text pairs that match() is given at a time (default: 512)")
    p.add_argument("--workers", type=int, help="loader processes per rank; default: the run's")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                   help="autocast (default: none)")

    # Retrieval.
    rules = "; ".join(f"{name}: {words}" for name, words in RULES.items())
    p.add_argument("--rerank", choices=tuple(RULES), help=f"{rules} (default: itm)")
    p.add_argument("--rerank_k", type=int,
                   help="candidates re-ranked, at most the gallery; default: the run's, or 128")
    p.add_argument("--candidates", type=int, help="retrieval: match() only the k best of another "
                                                  "run's dual encoder; default: every pair")
    p.add_argument("--candidates_from", metavar="RUN", help="retrieval: that run's directory")
    p.add_argument("--folds", type=int,
                   help="retrieval also as the mean over these folds; default: 5 for 5,000 images")
    p.add_argument("--ensemble", nargs="+", metavar="RUN",
                   help="retrieval: average the similarities with those of these runs")

    # The others.
    p.add_argument("--answers", help="vqa: the answer list, JSON or one a line; default: the run's")
    p.add_argument("--shortlist", type=int, help="vqa: answers kept by first token (default: 128)")
    p.add_argument("--image", help="gradcam, attention, gallery: the picture")
    p.add_argument("--text", help="gradcam, attention: what is said of it; gallery: the query")
    p.add_argument("--block", type=int,
                   help="gradcam, pointing: fusion layer, from 0; default: the model's")
    p.add_argument("--out", help="gradcam, attention, gallery: the PNG; default: in the run's "
                                 "directory, named by task and options")
    p.add_argument("--beside", metavar="RUN", help="attention, speed: another run beside this one")
    p.add_argument("--sizes", default="16,32,64,128",
                   help="speed: gallery sizes in pictures (default: 16,32,64,128)")
    p.add_argument("--database", help="hashing: its list; default: database.txt in folder --data")
    p.add_argument("--map_at", type=int, default=5000,
                   help="hashing: how many answers count (default: 5000)")
    p.add_argument("--probe_lr", type=float,
                   help="probe: learning rate, on the features as they are (MoCo's protocol: 30); "
                        "default: the best of five on a held-out tenth, on features of mean 0 and "
                        "deviation 1")
    return p


DEFAULTS = vars(parser().parse_args([""]))

# The least and the most that a number may be.
RANGES = {"limit": (1, math.inf), "captions": (1, math.inf), "batch_size": (1, math.inf),
          "pairs": (1, math.inf), "workers": (-1, 1000), "rerank_k": (0, math.inf),
          "candidates": (1, math.inf), "folds": (1, math.inf), "shortlist": (1, math.inf),
          "block": (0, math.inf), "map_at": (1, math.inf), "probe_lr": (1e-9, 1e9)}

# What must be there: files, and the run directories of find_run().
FILES, RUNS = ("image", "answers", "database", "vocab"), ("candidates_from", "beside", "ensemble")


def options_of(task, opts):
    """All options of an evaluation, checked by themselves -> Namespace. opts: a dict or namespace
    of what differs from the defaults, or None; what the evaluation does not read is left out.
    Stop for a value that means nothing and for a file that is not there."""
    given = opts if isinstance(opts, dict) else vars(opts or argparse.Namespace())
    read = (*ALWAYS, *TASKS[task].flags)
    opts = {**DEFAULTS, **{name: value for name, value in given.items() if name in read}}

    # Numbers. NaN is in no range.
    for name, (least, most) in RANGES.items():
        if opts[name] is not None and not least <= opts[name] <= most:
            legal = f"at least {least:g}" + f", at most {most:g}" * (most < math.inf)
            raise Stop(f"--{name} {opts[name]}: {legal}")
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", opts["sizes"].replace(" ", "")):
        raise Stop(f"--sizes {opts['sizes']}: numbers of pictures, separated by commas")
    if bool(opts["candidates"]) != bool(opts["candidates_from"]):
        raise Stop("--candidates K and --candidates_from RUN go together")

    # Files and runs.
    for name in FILES:
        if opts[name] and opts[name] != "shapes" and not os.path.isfile(opts[name]):
            raise Stop(f"--{name} {opts[name]}: no such file")
    for name in RUNS:
        for run in [opts[name]] if isinstance(opts[name], str) else opts[name] or []:
            find_run(run)

    # Where a drawing goes, and its format.
    if opts["out"]:
        out = Path(opts["out"])
        if not out.parent.is_dir() or out.is_dir():
            raise Stop(f"--out {out}: a file in a folder that exists")
        if out.suffix.lower() not in Image.registered_extensions():
            raise Stop(f"--out {out}: a picture's name, such as {out.stem}.png")
    return argparse.Namespace(**opts)


def check_read(tasks, opts):
    """Stop for a flag that none of the evaluations reads."""
    read = set(ALWAYS).union(*(TASKS[task].flags for task in tasks))
    for name, value in vars(opts).items():
        if value != DEFAULTS[name] and name not in read:
            users = [task for task, row in TASKS.items() if name in row.flags]
            raise Stop(f"{', '.join(tasks)} does not use --{name}; it is for {', '.join(users)}")


def main(argv=None):
    """The command line. -> {task: result}."""
    opts = parser().parse_args(argv)

    # One process per GPU, as torchrun starts them.
    rank, world, local = data.ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Without --task: those that the model lists for the task it was trained on.
    model, info = load_run(opts.run, device)
    tasks = [opts.task] if opts.task else module_of(model).EVALS.get(info["task"])
    if not tasks:
        raise Stop(f"{opts.run}: {info['task']} has no evaluation of its own: name one with --task")
    for task in tasks:
        check_offer(model, info, task)
    check_read(tasks, opts)
    results = {task: evaluate(model, info, task, opts, rank, world) for task in tasks}
    if world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
