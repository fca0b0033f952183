"""Evaluate a run: one table on the screen, one JSON with the protocol beside the numbers.

    python eval.py out/RUN                                        the evaluations that belong to the run's task
    python eval.py out/RUN --task retrieval --data dataset_flickr30k.json --image_root flickr30k-images
    python eval.py out/RUN --task gradcam --image a.jpg --text "a dog beside a tree"
    python eval.py out/RUN --task gallery --text "a dog beside a tree"
    torchrun --nproc_per_node 8 eval.py out/RUN --task vqa --split test

A task is a function of `Eval` (the model, its data, this rank's share) in the table TASKS; it asks the model for
methods, never for its name. The metrics above it are pure functions of tensors.

Legend: N images, M captions, B batch, P pairs of an image and a caption, k candidates re-ranked, d embedding, T tokens.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from tools import shapes
from tools.weights import Stop, find_run, load_run

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------
# Metrics

def ranks(sim, owner, chunk=1024):
    """Pessimistic ranks of image->text and text->image retrieval.

    sim: (N, M) scores, higher = better; owner: (M,) int64, the image of each caption, any number of captions an image.
    -> (N,), (M,) int64: 1 + the number of wrong candidates that score at least as much as the right one (for an image:
    its best caption), so that ties with a wrong candidate count against the model. SystemExit on NaN and on an image
    without caption.
    """
    n, m = sim.shape
    if not torch.equal(owner.unique().cpu(), torch.arange(n)) or len(owner) != m:
        raise Stop(f"retrieval: {n} images, {m} captions: each image must have a caption, "
                         "each caption one of the images")
    own = sim[owner, torch.arange(m, device=sim.device)]                                # (M,) score with its own image
    best = sim.new_full((n,), -math.inf).scatter_reduce(0, owner, own, "amax")              # (N,)
    tied = torch.zeros_like(best, dtype=torch.long).scatter_add(0, owner, (own >= best[owner]).long())
    i2t, t2i = [], torch.zeros(m, dtype=torch.long, device=sim.device)
    for rows, b in zip(sim.split(chunk), best.split(chunk)):
        if rows.isnan().any():
            raise Stop("retrieval: the scores contain NaN")
        i2t.append((rows >= b[:, None]).sum(1))
        t2i += (rows >= own).sum(0)                                                 # it counts itself: the 1 of 1 + ...
    return torch.cat(i2t) - tied + 1, t2i


def shortlist(sim, k):
    """The k (at most the gallery) best captions of each image, the k best images of each caption: (N, k),
    (M, k) int64."""
    n, m = sim.shape
    return sim.topk(min(k, m), dim=1).indices, sim.topk(min(k, n), dim=0).indices.T.contiguous()


def reranked(sim, owner, top_i, top_t, val_i, val_t):
    """Ranks after the shortlists are put in the order of new scores; all others stay below them, in the order of `sim`.

    sim: (N, M); top_i (N, k) captions, top_t (M, k) images; val_i, val_t: their new scores, any float.
    -> as ranks()."""
    if val_i.isnan().any() or val_t.isnan().any():
        raise Stop("retrieval: the matching scores contain NaN")
    base_i, base_t = ranks(sim, owner)
    out = []
    for base, own, val in ((base_i, owner[top_i] == torch.arange(len(sim), device=sim.device)[:, None], val_i),
                           (base_t, top_t == owner[:, None], val_t)):
        best = val.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        inside = 1 + ((val >= best) & ~own).sum(1)
        # base counts all of the shortlist: their sim >= the right one's
        out.append(torch.where(own.any(1), inside, base))
    return tuple(out)


def summary(i2t, t2i, ks=(1, 5, 10)):
    """Ranks (1-based) -> {i2t_r1 ... t2i_r10, mean, rsum in percent, i2t_medr, t2i_medr}."""
    out = {f"{way}_r{k}": 100 * (r <= k).double().mean().item() for way, r in (("i2t", i2t), ("t2i", t2i)) for k in ks}
    total = sum(out.values())
    return {**out, "mean": total / len(out), "rsum": total,
            "i2t_medr": float(np.median(i2t.cpu())), "t2i_medr": float(np.median(t2i.cpu()))}


def recall(sim, owner, ks=(1, 5, 10)):
    """sim (N, M), owner (M,) -> the summary() of its ranks()."""
    return summary(*ranks(sim, owner), ks)


def chance(owner, ks=(1, 5, 10)):
    """What a random order of this very gallery gets on average: text->image k/N; image->text 1 - C(M-c, k) / C(M, k)
    for an image of c captions. The median is the smallest rank that half of the queries reach. owner: (M,) -> the keys
    of summary()."""
    # {c: how many images have c captions}
    counts, m = Counter(owner.unique(return_counts=True)[1].tolist()), len(owner)
    n, r = sum(counts.values()), np.arange(m)
    miss = {c: np.cumprod(np.clip((m - c - r) / (m - r), 0, 1)) for c in counts}            # P(rank > r + 1)
    hit = sum(images * (1 - miss[c]) for c, images in counts.items()) / n
    out = {f"i2t_r{k}": 100 * float(hit[min(k, m) - 1]) for k in ks} | {f"t2i_r{k}": 100 * min(k, n) / n for k in ks}
    total = sum(out.values())
    return {**out, "mean": total / len(out), "rsum": total,
            "i2t_medr": float((hit < 0.5 - 1e-12).sum() + 1), "t2i_medr": float(math.ceil(n / 2))}


def average(results):
    """Mean of each key over a list of dicts with the same keys (the folds)."""
    return {k: sum(r[k] for r in results) / len(results) for k in results[0]}


def pearson(x, y):
    """Pearson's correlation of two sequences of n numbers, in [-1, 1]; NaN where one is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v) for v in (x, y))
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else math.nan


def average_ranks(x):
    """Ranks 1..n of n numbers, equal ones at the mean of their places -> (n,) float64."""
    _, place, count = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def spearman(x, y):
    """Spearman's correlation: Pearson's of the average_ranks()."""
    return pearson(average_ranks(x), average_ranks(y))


def map_at(query, database, query_labels, database_labels, r=5000, chunk=64):
    """MAP@r of hash codes, in percent, with both denominators. Codes: (Q, K), (N, K) of +1 and -1; labels: (Q, C),
    (N, C) 0/1; two images that share a label are relevant to each other. The database is ordered by Hamming distance,
    equal ones in its own order.

    -> (AP over the relevant within the top r, 0 if none [CSQ's], AP over the relevant in the whole database)."""
    within, whole = [], []
    for q, labels in zip(query.float().split(chunk), query_labels.float().split(chunk)):
        order = (q @ database.float().T).sort(dim=1, descending=True, stable=True).indices[:, :r]    # (q, r)
        relevant = labels @ database_labels.float().T > 0                                    # (q, N)
        hit = relevant.gather(1, order).double()
        gain = (hit * hit.cumsum(1) / torch.arange(1, order.shape[1] + 1, device=q.device)).sum(1)
        within.append(gain / hit.sum(1).clamp(min=1))
        whole.append(gain / relevant.sum(1).clamp(min=1))
    return 100 * torch.cat(within).mean().item(), 100 * torch.cat(whole).mean().item()


def vqa_accuracy(answer, answers):
    """The official VQA score in [0, 1]: over each leaving-out of one annotator, min(1, matches among the others / 3),
    averaged; answer and answers are normalized first (data.normalize_answer). With a single annotator: equal or not."""
    answer, answers = data.normalize_answer(answer), [data.normalize_answer(a) for a in answers]
    hits = [a == answer for a in answers]
    if len(hits) == 1:
        return float(hits[0])
    return sum(min(1.0, (sum(hits) - h) / 3) for h in hits) / len(hits)


def box_cover(boxes, size, grid):
    """How much of each cell of a grid over the picture lies in the boxes. boxes: xyxy in pixels; size: (width, height)
    of the picture; grid: (h, w) cells -> (h, w) float64 in [0, 1]. Exact for one box; of overlapping ones the larger
    share counts."""
    def overlap(a, b, length, cells):
        edges = np.arange(cells + 1) * length / cells
        return np.clip(np.minimum(b, edges[1:]) - np.maximum(a, edges[:-1]), 0, None) * cells / length
    return np.max([np.outer(overlap(y0, y1, size[1], grid[0]), overlap(x0, x1, size[0], grid[1]))
                   for x0, y0, x1, y1 in boxes], 0)


# --------------------------------------------------------------------------------------------------
# What a task is given

def offers(model, *names):
    """Does the model offer these methods? Its attribute `offers` lists those that its task has; without one, all."""
    listed = getattr(model, "offers", names)
    return all(name in listed and callable(getattr(model, name, None)) for name in names)


def offered(model):
    """The evaluation tasks whose methods the model offers."""
    return [task for task, (_, needs) in TASKS.items() if any(offers(model, *way) for way in needs)]


class Eval:
    """The model (with its `cfg`), its views, the data and this rank's share of them; `protocol` fills up on the way."""

    def __init__(self, model, info, task, opts, rank, world):
        self.model, self.info, self.task, self.opts, self.rank, self.world = model, info, task, opts, rank, world
        self.device, self.cfg, self.loop = next(model.parameters()).device, model.cfg, info.get("loop", {})
        module = sys.modules[type(model).__module__]
        self.views = module.VIEWS[task if task in module.VIEWS else info["task"]]
        self.spec = opts.data or self.loop.get("eval_data") or self.loop.get("data") or "shapes"
        self.root = (opts.image_root
                     or (None if opts.data else self.loop.get("eval_root") or self.loop.get("image_root")) or None)
        own = result_path(self, "vocab.txt")                                            # a run keeps a copy of its own
        vocab = opts.vocab or (own if own and own.is_file() else self.loop.get("vocab") or "shapes")
        self.tokenizer = data.get_tokenizer(vocab)
        if self.tokenizer.vocab_size != self.cfg.vocab_size:
            raise Stop(f"{vocab}: {self.tokenizer.vocab_size} tokens, "
                             f"the run has {self.cfg.vocab_size}; name its --vocab")
        self.bad, self.protocol = set(), {}

    def setting(self, name, default):
        """An option: the command line's, else the run's, else the default (a run writes 0 or "" for "not set")."""
        value = getattr(self.opts, name)
        return (self.loop.get(name) or default) if value is None else value

    def open(self, need=()):
        """The records of the split (test; without one, val), with what the checkpoint was trained on
        in the protocol."""
        split, module = self.opts.split or "test", sys.modules[type(self.model).__module__]
        own = module.VIEWS[self.info["task"]]["source"]
        if not self.opts.data and self.views["source"] != own and self.spec == self.loop.get("data") != "shapes":
            raise Stop(f"{self.task}: it reads {self.views['source']}, "
                             f"the run's data are {own}: name files with --data")
        read = lambda split: data.open_source(self.views["source"], self.spec, split, self.root,
                                              limit=self.opts.limit, need=need, missing=data.absent(self.views))
        try:
            records = read(split)
        except data.DataError as e:
            if self.opts.split or "no split" not in str(e):
                raise
            records, split = read("val"), "val"
        records = data.with_regions(records, self.views, self.opts.regions or self.loop.get("regions", ""))
        if records.regions:
            theirs, ours = data.stats(records), self.info.get("stats", {})
            wrong = [k for k in ("region_dim", "region_classes", "global_dim") if theirs[k] != ours.get(k, theirs[k])]
            if wrong:
                raise Stop(f"{', '.join(records.regions.paths)}: {wrong[0]} is {theirs[wrong[0]]}, "
                                 f"the run was trained with {ours[wrong[0]]}")
            self.protocol.update(regions=records.regions.about)
        seen, start = self.loop.get("data") or "shapes", f", from {self.loop['init']}" if self.loop.get("init") else ""
        task = self.info["task"]                                        # one that is no TASK is a stage of pre-training
        how = ("pre-trained only" if task == "pretrain" or task not in getattr(module, "TASKS", (task,))
               else f"fine-tuned ({task})")
        known = set(seen.split(",")) & set(self.spec.split(","))
        self.protocol.update(data=self.spec, split=split, records=len(records), limit=self.opts.limit,
                             protocol=f"{'in domain' if known else 'zero-shot'}, {how}, trained on {seen}{start}")
        if records.protocol:
            self.protocol.update(lists=records.protocol)
        return records

    def other(self, path):
        """Another run over this one's data, with its own views and vocabulary.
        SystemExit if it does not offer the task."""
        model, info = load_run(path, self.device)
        if self.task not in offered(model):
            raise Stop(f"{path}: {type(model).__name__} trained for {info['task']} does not offer {self.task}")
        opts = argparse.Namespace(**{**vars(self.opts), "data": self.spec, "image_root": self.root, "vocab": None})
        return Eval(model, info, self.task, opts, self.rank, self.world)

    def batches(self, records, what, views=None):
        """This rank's batches, on the device: images, flattened captions ("text") or whole records ("sample")."""
        for batch in data.iter_eval(records, views or self.views, self.tokenizer, getattr(self.cfg, "image_size", None),
                                    self.cfg.max_text, max_regions=getattr(self.cfg, "max_regions", None), what=what,
                                    batch_size=self.opts.batch_size, rank=self.rank, world=self.world,
                                    workers=max(0, self.setting("workers", 0))):
            self.bad.update(batch["index"][batch["bad"].bool()].tolist())
            yield data.move(batch, self.device)

    def progress(self, batches, total, text):
        steps = math.ceil(total / self.world / self.opts.batch_size)
        return tqdm(batches, text, steps, leave=False, delay=2, disable=self.rank > 0)

    def gather(self, index, parts, total):
        """Rows computed on all ranks, in the data's order and each once. index: (m,) of this rank's rows;
        parts: {name: (m, ...)} CPU -> {name: (total, ...)} CPU on every rank."""
        pieces = [(index, parts)]
        if self.world > 1:
            pieces = [None] * self.world
            dist.all_gather_object(pieces, (index, parts))
        pieces = [p for p in pieces if len(p[0])]
        index = torch.cat([i for i, _ in pieces])
        assert len(index.unique()) == total, f"{len(index.unique())} of {total} rows were evaluated"
        out = {}
        for name, first in pieces[0][1].items():
            out[name] = first.new_empty((total, *first.shape[1:]))
            out[name][index] = torch.cat([p[name] for _, p in pieces])
        return out

    def collect(self, records, what, total, fn, text=None):
        """fn(batch) -> {name: (B, ...)} over all batches of all ranks -> {name: (total, ...)} CPU."""
        index, parts = [], defaultdict(list)
        for batch in self.progress(self.batches(records, what), total, text or what):
            index.append(batch["index"].cpu())
            for name, t in fn(batch).items():
                parts[name].append(t.cpu())
        index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
        return self.gather(index, {name: torch.cat(t) for name, t in parts.items()}, total)

    def states(self, kind, batch):
        """What match() needs of the images or the captions of a batch; the batch's own tensors if the model makes
        no states."""
        if offers(self.model, f"{kind}_states"):
            return getattr(self.model, f"{kind}_states")(batch)
        return {k: v for k, v in batch.items() if k.startswith(kind)}


# --------------------------------------------------------------------------------------------------
# Tasks: Eval -> {"rows": table, "metrics": the numbers that count, ...}

def match_scores(ev, records, texts, keys=None):
    """match() of pairs -> (P,) float32 on every rank. texts: {name: (M, ...)} states of all captions; keys: (P,) int64,
    sorted and unique, image * M + caption; None = all N * M.

    Each rank scores all pairs of its own images; the captions' states are kept, the images' live for one batch only
    (5,000 images of 577 tokens would be 9 GB), a pair asked for in both directions is scored once.
    """
    m, n = len(next(iter(texts.values()))), len(data.unique_images(records)[0])
    out = torch.zeros(n * m if keys is None else len(keys))
    for batch in ev.progress(ev.batches(records, "image"), n, "matching"):
        images, ends = ev.states("image", batch), torch.stack([batch["index"], batch["index"] + 1]).cpu() * m   # (2, B)
        lo, hi = ends if keys is None else torch.searchsorted(keys, ends)
        where = torch.cat([torch.arange(a, b) for a, b in zip(lo.tolist(), hi.tolist())])  # (p,) into keys
        local = torch.repeat_interleave(torch.arange(len(lo)), hi - lo)                     # (p,) into the batch
        for w, i in zip(where.split(ev.opts.pairs), local.split(ev.opts.pairs)):
            caption = (w if keys is None else keys[w]) % m
            pair = ({k: v[i.to(v.device)] for k, v in images.items()}
                    | {k: v[caption].to(ev.device) for k, v in texts.items()})
            out[w] = ev.model.match(pair).float().cpu()
    if ev.world > 1:                                             # every pair was scored on one rank: the others add 0
        out = out.to(ev.device)
        dist.all_reduce(out)
    return out.cpu()


def visual_encoder(model):
    """The method that embeds what texts are matched with, pictures or clips; None if the model has neither."""
    return next((getattr(model, name) for name in ("encode_image", "encode_clip") if offers(model, name)), None)


def retrieval(ev):
    """Image->text and text->image over the whole split, in its order; 5,000 images also as five folds of 1,000.
    The dual encoder's scores, then its k best put in the order of match(). A model without encoders has every pair
    scored by match(), or, with --candidates, the k best of another run's dual encoder."""
    records = ev.open(need=("caption",))
    owner, order = data.flat_captions(records)[1].sort(stable=True)                     # captions in the images' order
    n, m, rule = int(owner[-1]) + 1, len(owner), ev.setting("rerank", "itm")
    first, k = (candidates_of(ev), ev.opts.candidates) if ev.opts.candidates else (ev, ev.setting("rerank_k", 128))
    dual = visual_encoder(first.model) is not None
    rerank = dual and rule != "none" and k > 0 and offers(ev.model, "match") and not ev.opts.ensemble
    texts = {}
    if rerank or not dual:
        texts = ev.collect(records, "text", m, lambda b: ev.states("text", b), "texts")
    if dual:
        base = "dual encoder" if first is ev else f"dual encoder of {first.info['path']}"
        image_emb = first.collect(records, "image", n,
                                  lambda b: {"e": visual_encoder(first.model)(b).float()}, "images")["e"]
        if first is not ev or "text_emb" not in texts:                              # states may come with the embedding
            texts["text_emb"] = first.collect(records, "text", m,
                                              lambda b: {"e": first.model.encode_text(b)}, "texts")["e"]
    texts = {name: t[order] for name, t in texts.items()}
    if dual:
        # (N, M) float32: 0.5 GB for COCO 5K
        sim = image_emb.to(ev.device) @ texts.pop("text_emb").float().to(ev.device).T
        if ev.opts.ensemble:
            sim, base = ensemble(ev, records, sim, order)
    elif ev.opts.ensemble:
        raise Stop(f"--ensemble averages similarities of dual encoders; {type(ev.model).__name__} has none")
    else:
        base, sim = f"match, all {n * m:,} pairs", match_scores(ev, records, texts).view(n, m)
    owner, how = owner.to(sim.device), f"re-ranked, {rule}, k={k}" if rerank else base

    folds = ev.opts.folds or (5 if n == 5000 else 1)
    size = n // folds
    if not size:
        raise Stop(f"--folds {folds}: there are only {n} images")
    galleries = {f"all {n:,}": [(0, n)]}
    if folds > 1:
        galleries[f"{size:,}, mean of {folds} folds"] = [(f * size, (f + 1) * size) for f in range(folds)]
    # captions of i: cut[i]:cut[i + 1]
    cut = torch.searchsorted(owner, torch.arange(n + 1, device=owner.device)).tolist()
    spans = {(a, b): (sim[a:b, cut[a]:cut[b]], owner[cut[a]:cut[b]] - a)
             for part in galleries.values() for a, b in part}
    if rerank:
        tops = {span: shortlist(s, k) for span, (s, _) in spans.items()}                    # indices within the fold
        pairs = {(a, b): (torch.arange(a, b)[:, None] * m + cut[a] + i.cpu(),               # keys image * M + caption
                          (a + t.cpu()) * m + torch.arange(cut[a], cut[b])[:, None]) for (a, b), (i, t) in tops.items()}
        keys = torch.cat([p.flatten() for both in pairs.values() for p in both]).unique()
        scores = match_scores(ev, records, texts, keys)
        if rule == "sum":
            scores += sim.flatten()[keys.to(sim.device)].cpu()
        scores = {span: [scores[torch.searchsorted(keys, p)].to(sim.device) for p in both]
                  for span, both in pairs.items()}

    rows, metrics = [], {}
    for name, part in galleries.items():
        found = {"chance": [chance(spans[span][1].cpu()) for span in part],
                 base: [recall(*spans[span]) for span in part]}
        if rerank:
            found[how] = [summary(*reranked(*spans[span], *tops[span], *scores[span])) for span in part]
        metrics = metrics or average(found[how])
        if ev.spec == "shapes" and records.name == "pairs" and part == [(0, n)] and ev.opts.limit is None:
            oracle = shapes.oracle_recall(records.root, records.split)                  # reads captions without a fault
            found["oracle ceiling"] = [{key: 100 * oracle[key] for key in ("i2t_r1", "t2i_r1")}]
        rows += [{"images": name, "scores": row, **average(results)} for row, results in found.items()]
    counts = owner.bincount()
    ev.protocol.update(images=n, captions=m, captions_per_image=[int(counts.min()), int(counts.max())],
                       ties="a wrong candidate with an equal score ranks first",
                       rerank=RULES[rule] if rerank else RULES["none"],
                       rerank_k=[min(k, m), min(k, n)] if rerank else None,
                       candidates_from=None if first is ev else first.info["path"])
    ev.bad |= first.bad
    return {"rows": rows, "metrics": metrics}


def candidates_of(ev):
    """The Eval of --candidates_from, which must have a dual encoder."""
    if not ev.opts.candidates_from:
        raise Stop("--candidates K: whose? name a run with a dual encoder: --candidates_from RUN")
    run = ev.other(ev.opts.candidates_from)
    if visual_encoder(run.model) is None:
        raise Stop(f"--candidates_from {run.info['path']}: {type(run.model).__name__} has no dual encoder")
    return run


def masked(ev):
    """Accuracy of the model's guesses at hidden places of matched pairs (each record with its first caption), beside
    that of the place's most frequent truth. The places are drawn at random, by a fixed seed."""
    records = ev.open(need=("caption",))
    with torch.random.fork_rng(devices=[ev.device] if ev.device.type == "cuda" else []):
        torch.manual_seed(ev.rank)
        found = ev.collect(records, "sample", len(records), lambda batch: {
            (name, part): t for name, both in ev.model.masked_predictions(batch).items()
            for part, t in zip(("guess", "truth"), both)})
    rows, metrics = [], {}
    for name in dict.fromkeys(name for name, _ in found):
        guess, truth = (found[name, part][found[name, "truth"] != -100] for part in ("guess", "truth"))
        metrics[name] = 100 * (guess == truth).double().mean().item()
        metrics[f"{name}_baseline"] = 100 * truth.bincount().max().item() / len(truth)
        rows.append({"hidden": name, "places": len(truth), "accuracy": metrics[name],
                     "most frequent": metrics[f"{name}_baseline"]})
    ev.protocol.update(masks="drawn as in training, seed 0")
    return {"rows": rows, "metrics": metrics}


def ensemble(ev, records, sim, order):
    """The mean of `sim` (N, M) and the similarities of the runs in --ensemble (this run itself counts once) -> (N, M),
    its name."""
    mine = Path(ev.info["path"]).resolve()
    others = {p.resolve(): p for p in map(find_run, ev.opts.ensemble)}
    others = [p for full, p in others.items() if full != mine]
    if not others:
        raise Stop("--ensemble: name at least one other run")
    n, m = sim.shape
    for path in others:
        run = ev.other(path)
        image_emb = run.collect(records, "image", n,
                                lambda b: {"e": visual_encoder(run.model)(b).float()}, "images")["e"]
        text_emb = run.collect(records, "text", m,
                               lambda b: {"e": run.model.encode_text(b).float()}, "texts")["e"][order]
        sim = sim + image_emb.to(ev.device) @ text_emb.to(ev.device).T
        ev.bad |= run.bad
    ev.protocol.update(ensemble=[str(mine)] + [str(p) for p in others])
    return sim / (1 + len(others)), f"mean similarity of {1 + len(others)} runs"


RULES = {"itm": "the k best by their match score alone (ALBEF), all others below",
         "sum": "the k best by match score + similarity (BLIP), all others below", "none": "no re-ranking"}


def vqa(ev):
    """Rank the answer list for every question; write the official result file; score it where there are annotations."""
    ev.views = {key: v for key, v in ev.views.items() if v != "answer"}                 # never given to the model here
    records, stats = ev.open(), ev.info.get("stats", {})
    answers = read_answers(ev.opts.answers) if ev.opts.answers else stats.get("answers")
    if not answers:
        raise Stop("vqa: the run has no answer list; name one with --answers FILE")
    ids = [ev.tokenizer.encode(a, ev.cfg.max_text) for a in answers]
    length = max(map(len, ids))
    answer_ids = torch.tensor([i + [ev.tokenizer.pad_id] * (length - len(i)) for i in ids], device=ev.device)   # (A, L)
    answer_mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in ids], device=ev.device)         # (A, L)
    k = min(ev.setting("shortlist", 128), len(answers))
    best = lambda batch: {"answer": ev.model.rank_answers(batch, answer_ids, answer_mask, k)}
    picks = ev.collect(records, "sample", len(records), best, "questions")["answer"]                             # (N,)
    result = {r["question_id"]: answers[a] for r, a in zip(records, picks.tolist())}        # every question once
    out = result_path(ev, f"vqa_{records.split}_results.json")
    if ev.rank == 0 and out:
        out.write_text(json.dumps([{"question_id": q, "answer": a} for q, a in result.items()]))
    ev.protocol.update(questions=len(result), answers=len(answers), shortlist=k, result_file=str(out))
    truth = {r["question_id"]: r for r in records if r.get("answers")}
    if not truth:
        return {"rows": [{"answers": "written, no annotations here", "questions": len(result)}], "metrics": {}}
    rows = []
    for name, guess in ((f"always '{answers[0]}' (most frequent in training)", lambda q: answers[0]),
                        ("model", result.get)):
        score = {q: 100 * vqa_accuracy(guess(q), r["answers"]) for q, r in truth.items()}
        kinds = defaultdict(list)
        for q, r in truth.items():
            kinds[r.get("answer_type") or "all"].append(score[q])
        rows.append({"answers": name, "questions": len(truth), "overall": sum(score.values()) / len(score),
                     **{kind: sum(v) / len(v) for kind, v in sorted(kinds.items()) if kind != "all"}})
    return {"rows": rows, "metrics": {"accuracy": rows[1]["overall"], "baseline": rows[0]["overall"]}}


def read_answers(path):
    """An answer list: a JSON list of strings, or one answer a line."""
    if not Path(path).is_file():
        raise Stop(f"--answers {path}: no such file")
    text = Path(path).read_text(encoding="utf-8")
    try:
        return (json.loads(text) if text.lstrip().startswith("[")
                else [line.strip() for line in text.splitlines() if line.strip()])
    except ValueError as e:
        raise Stop(f"--answers {path}: {e}")


CLASSES = {"ve": ("entailment", "neutral", "contradiction"), "nlvr2": ("False", "True")}


def classification(ev):
    """Accuracy of predict() against the labels, beside that of the split's most frequent class; for NLVR2 also the
    consistency: the share of sentences that are judged right on all their picture pairs (identifier
    split-set-pair-sentence)."""
    records = ev.open(need=("label",))
    names = CLASSES.get(ev.task) or records.label_names
    label = torch.tensor([r["label"] for r in records])
    logits = ev.collect(records, "sample", len(records), lambda b: {"y": ev.model.predict(b).float()})["y"]     # (N, C)
    if logits.shape[1] != len(names):
        raise Stop(f"{ev.task}: the model has {logits.shape[1]} classes, the task {len(names)}: "
                         f"{', '.join(names[:20])}")
    right = logits.argmax(1) == label
    share = torch.bincount(label, minlength=len(names)) / len(label)
    metrics = {"accuracy": 100 * right.double().mean().item(), "baseline": 100 * share.max().item()}
    rows = [{"classes": f"always '{names[share.argmax()]}'", "records": len(label), "accuracy": metrics["baseline"]},
            {"classes": "model", "records": len(label), "accuracy": metrics["accuracy"]}]
    for c, name in enumerate(names):
        if (label == c).any() and len(names) <= 20:
            rows.append({"classes": f"  {name}", "records": int((label == c).sum()),
                         "accuracy": 100 * right[label == c].double().mean().item()})
    parts = [str(r.get("identifier", "")).split("-") for r in records]
    if all(len(p) == 4 for p in parts):
        groups = defaultdict(list)
        for (split, group, _, sentence), ok in zip(parts, right.tolist()):
            groups[split, group, sentence].append(ok)
        metrics["consistency"] = 100 * sum(map(all, groups.values())) / len(groups)
        rows.append({"classes": "consistency", "records": len(groups), "accuracy": metrics["consistency"]})
    ev.protocol.update(classes=dict(enumerate(names)) if len(names) <= 20 else len(names))
    return {"rows": rows, "metrics": metrics}


def fit_linear(x, y, classes, lr=30.0, epochs=60, batch=256, seed=0):
    """A linear layer on fixed features: SGD, momentum 0.9, no weight decay, lr divided by 5 at 1/2, 2/3 and 5/6 of the
    epochs.
    x: (N, D) float32; y: (N,) int64 -> weight (classes, D), bias (classes,)."""
    generator = torch.Generator().manual_seed(seed)
    weight = (0.01 * torch.randn(classes, x.shape[1], generator=generator)).to(x.device).requires_grad_()
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer, batch = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9), min(batch, len(x))
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.2 ** sum(epoch >= share * epochs for share in (1 / 2, 2 / 3, 5 / 6))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for part in order[:len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(F.linear(x[part], weight, bias), y[part]).backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def fit_best(x, y, classes, lrs):
    """fit_linear() with the learning rate that does best on every tenth sample, held out for that
    -> (weight, bias, learning rate)."""
    held = torch.arange(len(x), device=x.device) % 10 == 9
    score = {}
    for lr in lrs if len(lrs) > 1 else ():
        weight, bias = fit_linear(x[~held], y[~held], classes, lr)
        score[lr] = (F.linear(x[held], weight, bias).argmax(1) == y[held]).double().mean().item()
    lr = max(score, key=score.get) if score else lrs[0]
    return *fit_linear(x, y, classes, lr), lr


def fit_probe(x, y, classes, lr=None):
    """A linear layer on fixed features -> its top-1 in percent on train and on test, its learning rate.

    x: {"train": (N, D), "test": (M, D)} float32; y: likewise (N,), (M,) int64. With `lr` the features are taken as they
    are. Without, each is brought to mean 0 and deviation 1 over the training split, and the rate is fit_best()'s. The
    layer can say no more for that, but it gets there in the few hundred steps of a small data set; averages of ReLUs,
    all positive, need thousands.
    """
    lrs = [lr] if lr else [3.0, 1.0, 0.3, 0.1, 0.03]
    if not lr:
        std, mean = torch.std_mean(x["train"], 0)
        std = std + 0.01 * std.mean() + 1e-12                               # what slept in train stays small in test
        x = {split: (v - mean) / std for split, v in x.items()}
    weight, bias, lr = fit_best(x["train"], y["train"], classes, lrs)
    return *(100 * (F.linear(x[s], weight, bias).argmax(1) == y[s]).double().mean().item()
             for s in ("train", "test")), lr


def probe(ev):
    """Linear probe: a layer trained on the frozen features of an ImageFolder's train split, top-1 on its val split;
    beside the same on a model of the same shape with random weights, and the most frequent class."""
    shown = ev.views.get("image_eval") or ev.views.get("features_eval", "resize")
    ev.views = {"source": "classes", "image": "resize", "image_eval": shown, "label": "label",
                "norm": ev.views.get("norm", "clip")}
    if ev.spec != "shapes" and not all(map(os.path.isdir, ev.spec.split(","))):
        hint = f"not measured, {ev.spec} is no ImageFolder: python eval.py RUN --task probe --data imagenet"
        if ev.opts.data:
            raise Stop(f"probe: {hint}")
        return {"rows": [{"linear probe": hint}], "metrics": {}}
    splits = {}
    for name, split in (("train", "train"), ("test", "val")):
        splits[name] = data.open_source("classes", ev.spec, split, ev.root, limit=ev.opts.limit, need=("label",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ev.loop.get("seed", 0))
        labels = ev.info.get("stats", {}).get("num_labels", 0)
        fresh = type(ev.model)(ev.cfg, ev.info["task"], num_labels=labels).to(ev.device).eval()
    classes, lr = len(splits["train"].label_names), ev.opts.probe_lr
    truth = {name: torch.tensor([r["label"] for r in records]).to(ev.device) for name, records in splits.items()}
    most = truth["test"].bincount(minlength=classes).argmax()
    baseline = {"train top-1": 100 * (truth["train"] == most).double().mean().item(),
                "top-1": 100 * (truth["test"] == most).double().mean().item()}
    found = {"always the most frequent class": baseline}
    for name, model in (("random weights", fresh), ("model", ev.model)):
        look = lambda batch: {"x": model.visual_features(batch).float()}
        x = {s: ev.collect(records, "sample", len(records), look, s)["x"].to(ev.device)
             for s, records in splits.items()}
        train_top1, top1, took = fit_probe(x, truth, classes, lr)
        found[name] = {"lr": took, "train top-1": train_top1, "top-1": top1}
    ev.protocol.update(data=ev.spec, train=len(truth["train"]), test=len(truth["test"]), classes=classes,
                       features="as they are" if lr else "mean 0 and deviation 1 over train",
                       lr=f"{lr:g}" if lr else "of 3, 1, 0.3, 0.1, 0.03 the best on a held-out tenth of train",
                       optimizer="SGD momentum 0.9, lr /5 at 30, 40, 50 of 60 epochs, batch 256, "
                                 "no weight decay, no augmentation")
    rows = [{"linear probe on": name, "images": len(truth["test"]), "lr": None, **row} for name, row in found.items()]
    return {"rows": rows, "metrics": {name: row["top-1"] for name, row in found.items()}}


def tag_overlap(top, truth, k):
    """mIOU@k: mean over images of |first k of top & truth| / |their union| in percent. top: (N, >= k) ids;
    truth: N sets."""
    both = [(set(row), gold) for row, gold in zip(top[:, :k].tolist(), truth)]
    return 100 * sum(len(a & b) / len(a | b) for a, b in both) / len(both)


def tagging(ev):
    """mIOU@5/10/15/20 of the k best tags of tag_scores() against an image's tags that are in the vocabulary, beside
    always predicting the most frequent tags of training."""
    words, names = ev.loop.get("tag_words"), ev.info["stats"]["tags"]
    records = ev.open(need=("caption" if words else "tags",))
    records = data.caption_tags(records, words) if words else records
    place = {name: n for n, name in enumerate(names)}
    truth = [{place[t] for t in r["tags"] if t in place} for r in records]
    most = min(20, len(names))
    top = ev.collect(records, "sample", len(records), lambda b: {"t": ev.model.tag_scores(b).topk(most).indices})["t"]
    ks = [k for k in (5, 10, 15, 20) if k <= most]
    often = torch.arange(most).expand(len(truth), -1)                               # the vocabulary goes by frequency
    guesses = {"the most frequent tags": often, "model": top}
    found = {name: {f"mIOU@{k}": tag_overlap(guess, truth, k) for k in ks} for name, guess in guesses.items()}
    ev.protocol.update(vocabulary=len(names), tags=f"caption words listed in {words}" if words else "the records'",
                       tags_per_image=round(sum(map(len, truth)) / len(truth), 2),
                       tags_outside_vocabulary=sum(t not in place for r in records for t in r["tags"]))
    return {"rows": [{"predicted": name, "images": len(truth), **row} for name, row in found.items()],
            "metrics": found["model"]}


def box_iou(boxes, others):
    """IoU of each of n boxes with each of m. (n, 4), (m, 4) xyxy, numpy -> (n, m)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others)]
    return both / (areas[0][:, None] + areas[1] - both)


def mask_iou(masks, others):
    """IoU of each of n masks with each of m. (n, H, W), (m, H, W) bool, numpy -> (n, m)."""
    flat = [m.reshape(len(m), math.prod(m.shape[1:])).astype(np.float32) for m in (masks, others)]
    both = flat[0] @ flat[1].T
    return both / (flat[0].sum(1)[:, None] + flat[1].sum(1) - both).clip(1)


def voc_ap(found, truth, threshold):
    """VOC07's 11-point average precision of one class, as VOC's devkit and Detectron2 have it, in 0..1;
    nan without objects.

    found: list of (score, image, IoU with each object of that image (n,)); truth: {image: difficult (n,)}.
    By falling score, a detection goes to the object it overlaps most: over the threshold right the first time
    and wrong thereafter, no matter if that object is difficult; at or under the threshold wrong."""
    total = sum((~difficult.astype(bool)).sum() for difficult in truth.values())
    if not total:
        return math.nan
    taken, right, wrong = set(), [], []
    for score, image, iou in sorted(found, key=lambda f: -f[0]):
        best = int(iou.argmax()) if len(iou) else -1
        hit = best >= 0 and iou[best] > threshold
        if hit and truth[image][best]:
            continue
        right.append(hit and (image, best) not in taken)
        wrong.append(not right[-1])
        if hit:
            taken.add((image, best))
    right, wrong = np.cumsum(right), np.cumsum(wrong)
    recall_, precision = right / total, right / np.maximum(right + wrong, 1)
    return sum(precision[recall_ >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)) / 11


def voc_scores(found, records, classes, key="iou"):
    """{AP, AP50, AP75} in percent by voc_ap(), mean over the classes that have objects;
    AP over IoU 0.50 to 0.95 by 0.05.

    found: {record: dict of labels (n,), scores (n,) and, under `key`, IoU with the record's objects (n, m)}."""
    table = np.full((classes, 10), math.nan)
    for c in range(classes):
        truth, mine = {}, []
        for i, record in enumerate(records):
            which = [k for k, label in enumerate(record["labels"]) if label == c]
            if which:
                truth[i] = np.array([record["difficult"][k] or record["crowd"][k] for k in which])
            d = found[i]
            mine += [(d["scores"][k], i, d[key][k][which]) for k in np.flatnonzero(d["labels"] == c)]
        if truth:
            table[c] = [voc_ap(mine, truth, (50 + 5 * n) / 100) for n in range(10)]
    mean = 100 * np.nanmean(table, 0) if np.isfinite(table).any() else np.zeros(10)
    return {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}


def coco_scores(found, records, kind):
    """{AP, AP50, AP75} in percent by pycocotools, which must be installed. kind: "bbox" or "segm".
    Difficult objects count as crowds: ignored."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    notes, results = [], []
    for i, r in enumerate(records):
        for k, (x0, y0, x1, y1) in enumerate(r["boxes"]):
            area = r["area"][k] if r.get("area") and r["area"][k] else (x1 - x0) * (y1 - y0)
            notes.append({"id": len(notes) + 1, "image_id": i, "category_id": r["labels"][k],
                          "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area,
                          "iscrowd": int(r["crowd"][k] or r["difficult"][k])})
            if kind == "segm":
                notes[-1]["segmentation"] = r["segmentation"][k]
        d = found[i]
        for k, (x0, y0, x1, y1) in enumerate(d["boxes"].tolist()):
            row = {"image_id": i, "category_id": int(d["labels"][k]), "score": float(d["scores"][k])}
            if kind == "segm":
                row["segmentation"] = coco_mask.frPyObjects(d["masks"][k], r["height"], r["width"])
            else:
                row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            results.append(row)
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):                                         # it prints its progress
        truth = COCO()
        truth.dataset = {"images": [{"id": i, "height": r["height"], "width": r["width"]}
                                    for i, r in enumerate(records)],
                         "annotations": notes,
                         "categories": [{"id": c, "name": n} for c, n in enumerate(records.label_names)]}
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: 100 * max(0.0, float(value)) for name, value in zip(("AP", "AP50", "AP75"), run.stats)}


def detections(ev, records):
    """detect() on this rank's pictures -> {record: dict of numpy arrays boxes, scores, labels, iou with the
    record's objects; with masks also mask_iou, and masks as COCO's run lengths}."""
    found = {}
    for batch in ev.progress(ev.batches(records, "sample"), len(records), "detecting"):
        for i, d in zip(batch["index"].tolist(), ev.model.detect(batch)):
            record, mine = records[i], {k: d[k].float().cpu().numpy() for k in ("boxes", "scores", "labels")}
            mine["iou"] = box_iou(mine["boxes"], np.array(record["boxes"]).reshape(-1, 4))
            if "masks" in d:
                masks, size = d["masks"].cpu().numpy(), (record["height"], record["width"])
                objects = [data.decode_mask(s, *size, record["image"]) for s in record["segmentation"]]
                mine["mask_iou"] = mask_iou(masks, np.stack(objects) if objects else np.zeros((0, *size)))
                mine["masks"] = [data.encode_mask(m) for m in masks]
            found[i] = mine
    return found


def detection(ev):
    """Average precision of detect() on every picture of the split, of boxes and masks: VOC's 11-point one, and
    COCO's own where pycocotools is installed. Beside it, what needs no model: in every picture a box of every class
    that is the whole picture."""
    ev.opts.batch_size = min(ev.opts.batch_size, 4)                                     # pictures of up to 1,333 pixels
    records = ev.open(need=("boxes",))
    mine = ev.info.get("stats", {}).get("label_names")
    if mine and mine != records.label_names:
        raise Stop(f"{ev.task}: the run's classes ({', '.join(mine[:5])}, ...) are not those of {ev.spec} "
                         f"({', '.join(records.label_names[:5])}, ...)")
    found = detections(ev, records)
    if ev.world > 1:
        pieces = [None] * ev.world
        dist.all_gather_object(pieces, found)
        found = {k: v for piece in pieces for k, v in piece.items()}

    # what needs no model
    classes, whole = len(records.label_names), {}
    for i, r in enumerate(records):
        boxes = np.array([[0.0, 0.0, r["width"], r["height"]]] * classes)
        whole[i] = {"boxes": boxes, "labels": np.arange(classes), "scores": np.ones(classes),
                    "iou": box_iou(boxes, np.array(r["boxes"]).reshape(-1, 4))}

    # one row a measure
    masks, coco = any("masks" in d for d in found.values()), importlib.util.find_spec("pycocotools")
    rows = [{"measure": "boxes, VOC07 11-point", **voc_scores(found, records, classes)}]
    rows += [{"measure": "boxes, pycocotools", **coco_scores(found, records, "bbox")}] if coco else []
    if masks:
        rows.append({"measure": "masks, VOC07 11-point", **voc_scores(found, records, classes, "mask_iou")})
        rows += [{"measure": "masks, pycocotools", **coco_scores(found, records, "segm")}] if coco else []
    rows.append({"measure": "whole picture, VOC07 11-point", **voc_scores(whole, records, classes)})
    rows += [{"measure": "whole picture, pycocotools", **coco_scores(whole, records, "bbox")}] if coco else []
    if not coco and ev.rank == 0:
        print(f"{ev.task}: COCO's own average precision needs pip install pycocotools; VOC's is computed here")

    ev.protocol.update(objects=sum(len(r["boxes"]) for r in records), classes=classes,
                       detections=sum(len(d["scores"]) for d in found.values()),
                       AP="mean over IoU 0.50:0.05:0.95 and the classes that occur; "
                          "difficult objects and crowds ignored")
    metrics = {f"{row['measure'].split(',')[0].replace(' ', '_')}_{'voc' if 'VOC' in row['measure'] else 'coco'}_{k}": v
               for row in rows for k, v in row.items() if k != "measure"}
    return {"rows": [{"pictures": len(records), **row} for row in rows], "metrics": metrics}


def word_maps(tokens, maps):
    """Wordpieces merged. tokens: T strings; maps: (T, h, w) -> [(word, (h, w) mean over its pieces)] without
    specials."""
    words = []
    for token, m in zip(tokens, maps):
        if token.startswith("##") and words:
            words[-1][0] += token[2:]
            words[-1][1].append(m)
        elif token not in ("[CLS]", "[SEP]", "[PAD]"):
            words.append([token, [m]])
    return [(word, torch.stack(m).mean(0)) for word, m in words]


def attention_maps(ev, batch):
    """model.gradcam() of a batch -> for each record (its words' maps, its sentence's map (h, w)), on the CPU."""
    with torch.enable_grad():
        maps = ev.model.gradcam(batch, block=ev.opts.block)
    for b, mask in enumerate(batch["text_mask"].bool()):
        tokens = ev.tokenizer.tokens(batch["text"][b][mask].tolist())
        yield (word_maps(tokens, maps["word"][b][mask].detach().float().cpu()),
               maps["sentence"][b].detach().float().cpu())


def heat(picture, m):
    """The picture under a map's heat colors. picture: PIL; m: (h, w), stretched over it;
    the map's own maximum is red."""
    x = F.interpolate(m[None, None], (picture.height, picture.width), mode="bilinear")[0, 0].clamp(min=0).numpy()
    x = x / max(x.max(), 1e-12)
    color = np.stack([np.clip(1.5 - np.abs(4 * x - c), 0, 1) for c in (3, 2, 1)], -1)       # blue, green, yellow, red
    return Image.fromarray(np.uint8(255 * (0.5 * color + 0.5 * np.asarray(picture) / 255)))


def draw_maps(picture, text, words, sentence, path, width=192, columns=6):
    """One PNG: the picture, the sentence's map and a map for each word, each with its caption.
    `width` of a tile in pixels."""
    picture = picture.resize((width, max(1, round(width * picture.height / picture.width))), Image.BICUBIC)
    tiles = [("picture", picture), ("sentence", heat(picture, sentence))] + [
        (w, heat(picture, m)) if m.max() > 0 else (f"{w}: zero", picture) for w, m in words]
    columns, font, line = min(columns, len(tiles)), ImageFont.load_default(14), 22
    height = line + math.ceil(len(tiles) / columns) * (picture.height + line) + 8
    sheet = Image.new("RGB", (columns * (width + 8) + 8, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), text, "black", font)
    for i, (caption, tile) in enumerate(tiles):
        x, y = 8 + i % columns * (width + 8), line + i // columns * (picture.height + line)
        sheet.paste(tile, (x, y + line))
        pen.text((x, y + 3), caption, "black", font)
    sheet.save(path)


def seen_by(views):
    """-> (the views of a picture, or its regions, and a caption, for gradcam() or speed(); does a center crop show
    the model less than the picture?)"""
    kept = {k: v for k, v in views.items() if k in ("image", "image_eval", "norm", "regions")}
    return {**kept, "source": "pairs", "text": "caption"}, kept.get("image_eval", "resize") == "center"


def gradcam(ev):
    """One PNG for --image and --text: where the model looks for each word and for the sentence."""
    if not (ev.opts.image and ev.opts.text):
        raise Stop('gradcam: name a picture and a text: --image a.jpg --text "..." '
                         '(--task pointing measures a split)')
    try:
        picture = data.load_image(ev.opts.image)
    except data.BadImage as e:
        raise Stop(f"--image {ev.opts.image}: {e}")
    ev.views, middle = seen_by(ev.views)
    rank, ev.rank, ev.world = ev.rank, 0, 1                     # one picture: every process looks at it
    records = data.Records("pairs", None)
    records.append({"image": ev.opts.image, "image_id": 0, "caption": [ev.opts.text]})
    words, sentence = next(attention_maps(ev, next(ev.batches(records, "sample"))))
    if middle:
        picture = data.center(picture, min(picture.size))
    out = Path(ev.opts.out) if ev.opts.out else result_path(ev, "gradcam.png")
    if rank == 0:
        draw_maps(picture, ev.opts.text, words, sentence, out)
    ev.protocol.update(image=ev.opts.image, text=ev.opts.text, block=ev.opts.block)
    silent = sum(m.max() <= 0 for _, m in words)
    if silent and rank == 0:
        print(f"{silent} of {len(words)} words have a map of zeros: in a last (or only) fusion layer "
              "[CLS] alone is heard; try another --block")
    return {"rows": [{"file": str(out), "words": len(words), "grid": "x".join(map(str, sentence.shape))}],
            "metrics": {}}


def pointing(ev):
    """On data with boxes: the share of a word's map that lies inside the boxes of the object it names, beside
    the boxes' share of the picture (what a uniform map gets). The words are those that equal a label's name;
    the caption is each record's first."""
    ev.views, middle = seen_by(ev.views)
    if middle:
        raise Stop("pointing: boxes and a center crop do not go together")
    records, found = ev.open(need=("caption", "boxes", "labels")), []               # (inside, uniform, peak) per word
    for batch in ev.progress(ev.batches(records, "sample"), len(records), "pointing"):
        for i, bad, (words, _) in zip(batch["index"].tolist(), batch["bad"].tolist(), attention_maps(ev, batch)):
            record, boxes = records[i], defaultdict(list)
            names = record.get("label_names") or [records.label_names[label] for label in record["labels"]]
            for name, box in zip(names, record["boxes"]):
                boxes[name].append(box)
            for word, m in words:
                if word in boxes and not bad and m.clamp(min=0).sum() > 0:
                    m = m.clamp(min=0).double().numpy()
                    cover = box_cover(boxes[word], data.load_image(record["image"]).size, m.shape)
                    found.append(((m * cover).sum() / m.sum(), cover.mean(), float(cover.flat[m.argmax()] >= 0.5)))
    if ev.world > 1:
        pieces = [None] * ev.world
        dist.all_gather_object(pieces, found)
        found = sum(pieces, [])
    if not found:
        raise Stop("pointing: no word of a caption that equals a label's name has a map: "
                         "in a last (or only) fusion layer the words' are zero")
    inside, uniform, peak = (100 * np.mean(found, 0)).tolist()
    row = {"inside the box": inside, "uniform": uniform, "ratio": round(inside / uniform, 2), "peak in the box": peak}
    return {"rows": [{"words": len(found), **row}], "metrics": row}


def cross_attention(ev):
    """How much a model's token-level heads look at the other side's [CLS] state, on the validation split, inputs masked
    with a fixed seed. A sample's mean and standard deviation over its tokens are averaged over the samples;
    "std of all" is that of all tokens together; "uniform" is what equal attention to all keys gives."""
    ev.opts.split = ev.opts.split or "val"
    records, seed = ev.open(need=("caption",)), ev.loop.get("seed", 0)

    def sums(batch):
        with torch.random.fork_rng([ev.device] if ev.device.type == "cuda" else []):
            torch.manual_seed(seed + int(batch["index"][0]))
            found = ev.model.cross_attention(batch)                                 # {name: (scores, where, uniform)}
        return {name: torch.stack([where.sum(1), (x := scores.double() * where).sum(1), (x * x).sum(1), uniform], 1)
                for name, (scores, where, uniform) in found.items()}

    rows, metrics = [], {}
    for name, parts in ev.collect(records, "sample", len(records), sums, "attention").items():
        n, total, squares, uniform = parts[parts[:, 0] > 0].T                       # (N,) each; empty captions drop out
        spread = lambda n, total, squares: (squares / n - (total / n) ** 2).clamp(min=0).sqrt()
        values = {"mean": (total / n).mean().item(), "std": spread(n, total, squares).mean().item(),
                  "std of all": spread(n.sum(), total.sum(), squares.sum()).item(), "uniform": uniform.mean().item()}
        rows.append({"attention": name, "tokens": int(n.sum()), **{k: f"{v:.3f}" for k, v in values.items()}})
        metrics.update({f"{name}, {k}": v for k, v in values.items()})
    ev.protocol.update(captions="the first of each record", masks=f"seed {seed} + number of a batch's first record",
                       batch_size=ev.opts.batch_size)
    return {"rows": rows, "metrics": metrics}


def gallery(ev, k=5):
    """One PNG: for --text the k nearest pictures of the split, for --image the k nearest captions, with their cosines.
    What belongs together in the data is framed: pictures that have the text as a caption; captions of the picture."""
    if not (ev.opts.text or ev.opts.image):
        raise Stop('gallery: ask with a text, a picture or both: --text "..." --image a.jpg')
    if ev.opts.image:
        try:
            data.load_image(ev.opts.image)
        except data.BadImage as e:
            raise Stop(f"--image {ev.opts.image}: {e}")
    records = ev.open(need=("caption",))
    (captions, owner), pictures = (data.flat_captions(records),
                                   [records[i]["image"] for i in data.unique_images(records)[0]])
    query = data.Records("pairs", None)
    query.append({"image": ev.opts.image or pictures[0], "image_id": 0, "caption": [ev.opts.text or captions[0]]})
    plain = lambda text: " ".join(text.lower().split())
    same_text = torch.tensor([plain(c) == plain(query[0]["caption"][0]) for c in captions])                      # (M,)
    file = ev.opts.image and os.path.realpath(ev.opts.image)
    same_image = torch.tensor([isinstance(p, str) and os.path.realpath(p) == file for p in pictures])            # (N,)
    true = {"text": torch.zeros_like(same_image).index_fill(0, owner[same_text], True), "image": same_image[owner]}
    rows, parts, metrics = [], [], {}
    for what, other, found in (("text", "image", pictures), ("image", "text", captions)):
        if not getattr(ev.opts, what):
            continue
        encode = {"image": ev.model.encode_image, "text": ev.model.encode_text}
        key = ev.collect(records, other, len(found), lambda b: {"e": encode[other](b).float()}, other + "s")["e"]
        scores = key @ ev.collect(query, what, 1, lambda b: {"e": encode[what](b).float()})["e"][0]     # (N,) or (M,)
        best = scores.topk(min(k, len(found))).indices.tolist()
        own = true[what]
        rank = int((scores[~own] >= scores[own].max()).sum()) + 1 if own.any() else None
        metrics[f"rank of the true {other}"] = rank
        rows += [{"query": getattr(ev.opts, what) if n == 0 else "", "rank": n + 1, "cosine": f"{scores[i]:.3f}",
                  "true": "yes" if own[i] else "" if rank else "unknown", "found": str(found[i])}
                 for n, i in enumerate(best)]
        parts.append((getattr(ev.opts, what), what, [(scores[i].item(), bool(own[i]), found[i]) for i in best]))
    out = Path(ev.opts.out) if ev.opts.out else result_path(ev, "gallery.png")
    if ev.rank == 0:
        draw_gallery(parts, out)
    ev.protocol.update(images=len(pictures), captions=len(captions), **metrics, file=str(out))
    return {"rows": rows, "metrics": metrics}


def draw_gallery(parts, path, width=192):
    """The PNG of gallery(). parts: list of (query, "text" or "image", [(score, true?, picture's place or caption)])."""
    font, line, green = ImageFont.load_default(14), 22, (0, 150, 0)
    most = max(len(found) for _, _, found in parts)
    sheet = Image.new("RGB", (8 + most * (width + 8), len(parts) * (width + 4 * line)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (query, what, found) in enumerate(parts):
        top = n * (width + 4 * line) + 6
        for i, (score, true, thing) in enumerate(found):
            if what == "text":
                x, y = 8 + i * (width + 8), top + line
                sheet.paste(data.center(data.load_image(thing), width), (x, y))
                frame = (x - 4, y - 4, x + width + 3, y + width + 3)
                pen.text((x, y + width + 6), f"{score:.3f}" + "  the true one" * true, green if true else "black", font)
            else:
                x, y = 24 + width, top + line + i * (width // len(found))
                text = textwrap.shorten(thing, (sheet.width - x) // 7 - 7, placeholder="...")
                frame = (x - 6, y - 2, sheet.width - 8, y + line - 2)
                pen.text((x, y), f"{score:.3f}  {text}", green if true else "black", font)
            if true:
                pen.rectangle(frame, outline=green, width=3 if what == "text" else 1)
        if what == "text":
            pen.text((8, top), textwrap.shorten(query, sheet.width // 7, placeholder="..."), "black", font)
        else:
            sheet.paste(data.center(data.load_image(query), width), (8, top + line))
    sheet.save(path)


def vtm(ev):
    """Video-text retrieval: retrieval() with clips for images; `lists` in the output names the split,
    "full" or "1k-A"."""
    records, width = ev.open(need=("caption",)), ev.cfg.frame_width
    found = data.read_frames(records[0]["feature"]).shape[1]
    if found != width:
        raise Stop(f"{records[0]['feature']}: {found} features a frame, the run was trained on {width}")
    result = retrieval(ev)
    ev.protocol.update(frames=f"at most {data.FRAMES} a clip, evenly spread")
    result["rows"] = [{"clips": row["images"], **{k: v for k, v in row.items() if k != "images"}}
                      for row in result["rows"]]
    return result


def bag_of_words(a, b):
    """Cosine of two sentences' word counts, in [0, 1]."""
    a, b = (Counter(re.findall(r"\w+", s.lower())) for s in (a, b))
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(a[w] * b[w] for w in a) / norm if norm else 0.0


def graded(score, gold, subsets):
    """Correlations in percent of n scores with n grades. `pearson`, `spearman` over all pairs at once, "P+S / 2" their
    mean; `mean` and `wmean`: Spearman within each subset, averaged plainly or by size (subsets of one pair are
    left out)."""
    p, s = 100 * pearson(score, gold), 100 * spearman(score, gold)
    groups = [[i for i, name in enumerate(subsets) if name == g] for g in dict.fromkeys(subsets)]
    groups = [g for g in groups if len(g) > 1]
    inner = [100 * spearman([score[i] for i in g], [gold[i] for i in g]) for g in groups]
    return {"P+S / 2": (p + s) / 2, "pearson": p, "spearman": s, "mean": sum(inner) / len(inner),
            "wmean": sum(v * len(g) for v, g in zip(inner, groups)) / sum(map(len, groups))}


def sts(ev):
    """Cosines of sentence vectors against graded pairs, without training, beside a bag of words; each dataset
    (STS12, ..., STSB) on its own, over all its subsets at once."""
    ev.views = {"source": "sts", "s1": "sentence", "s2": "sentence"}
    records = ev.open()
    if len(records) < 2:
        raise Stop("sts: a correlation needs two pairs of sentences")
    encode = lambda b, key: ev.model.encode_text({"text": b[key], "text_mask": b[key + "_mask"]}).float()
    cosine = ev.collect(records, "sample", len(records),
                        lambda b: {"c": (encode(b, "s1") * encode(b, "s2")).sum(1)})["c"].tolist()
    scores = {"bag of words": [bag_of_words(r["s1"], r["s2"]) for r in records], "model": cosine}
    rows, sets = [], defaultdict(list)
    for i, r in enumerate(records):
        sets[r["dataset"]].append(i)
    for name, at in sets.items():
        for who, score in scores.items():
            rows.append({"data": name, "pairs": len(at), "scores": who,
                         **graded([score[i] for i in at], [records[i]["score"] for i in at],
                                  [records[i]["subset"] for i in at])})
    kept = ("P+S / 2", "spearman", "pearson")
    metrics = {k: sum(r[k] for r in rows[1::2]) / len(sets) for k in kept}
    metrics["baseline"] = sum(r["spearman"] for r in rows[::2]) / len(sets)
    vector = ev.model.sentence_vector() if hasattr(ev.model, "sentence_vector") else None
    ev.protocol.update(similarity="cosine, no training", vector=vector, unscored=records.notes.get("unscored", 0))
    return {"rows": rows, "metrics": metrics}


def hashing(ev):
    """MAP@5000 of hash codes: the test list's pictures ask, the database list answers; beside random codes."""
    queries, opts = ev.open(need=("labels",)), ev.opts
    if not (opts.database or ev.spec == "shapes" or os.path.isdir(ev.spec)):
        raise Stop("hashing: --data names the queries' list; name the database's with --database "
                         "(or give the folder of both)")
    database = data.open_source("hashing", opts.database or ev.spec, "database", ev.root, need=("labels",))
    codes, labels, left_out = [], [], []
    for records, text in ((queries, "queries"), (database, "database")):
        y = torch.tensor([r["labels"] for r in records])
        labeled = y.any(1)
        codes.append(ev.collect(records, "sample", len(records),
                                lambda b: {"h": ev.model.hash_codes(b)}, text)["h"][labeled])
        labels.append(y[labeled])
        left_out.append(int((~labeled).sum()))
    if labels[0].shape[1] != labels[1].shape[1] or not min(map(len, codes)):
        raise Stop(f"hashing: {labels[0].shape[1]} labels in the queries' list, {labels[1].shape[1]} in the "
                         f"database's; {len(codes[0])} and {len(codes[1])} labeled images")
    r, g = min(opts.map_at, len(codes[1])), torch.Generator().manual_seed(0)
    chance = [torch.randint(0, 2, c.shape, generator=g) * 2.0 - 1 for c in codes]
    rows, name = [], f"MAP@{opts.map_at}"
    for who, (q, d) in (("random codes", chance), ("model", codes)):
        within, whole = map_at(q, d, *labels, r)
        rows.append({"codes": who, "bits": q.shape[1], "queries": len(q), "database": len(d), name: within,
                     f"{name}, all relevant": whole})
    ev.protocol.update(r=r, denominator=f"{name}: the relevant within the top {r} (CSQ); "
                                        "'all relevant': those in the whole database",
                       ties="equal distances in the database's order", left_out_without_label=left_out)
    return {"rows": rows, "metrics": {"map": rows[1][name], "map_all_relevant": rows[1][f"{name}, all relevant"],
                                      "baseline": rows[0][name]}}


def by_rank(picture, scores):
    """The picture, each area as bright as its score ranks: 20 % the lowest, 100 % the highest. scores: (h, w)."""
    order = scores.flatten().argsort().argsort().view(scores.shape).float()
    light = 0.2 + 0.8 * order / max(1, order.numel() - 1)
    light = F.interpolate(light[None, None], (picture.height, picture.width), mode="nearest")[0, 0].numpy()
    return Image.fromarray(np.uint8(np.asarray(picture) * light[..., None]))


def draw_ranks(picture, panels, path, width=256):
    """One PNG: the picture, then for each (title, scores (h, w), [(word, score)]) the picture by_rank() and the
    sentence, its five best words marked."""
    picture = picture.resize((width, max(1, round(width * picture.height / picture.width))), Image.BICUBIC)
    font = ImageFont.load_default(13)
    tiles, rows = len(panels) + 1, 1 + max(len(words) for _, _, words in panels) // 4
    sheet = Image.new("RGB", (tiles * (width + 10) + 10, picture.height + 40 + 20 * (rows + 1)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 6), "picture", "black", font)
    sheet.paste(picture, (10, 26))
    for n, (title, scores, words) in enumerate(panels, 1):
        left, x, y = 10 + n * (width + 10), 0, picture.height + 34
        pen.text((left, 6), title, "black", font)
        sheet.paste(by_rank(picture, scores), (left, 26))
        best = sorted(range(len(words)), key=lambda i: -words[i][1])[:5]
        for i, (word, _) in enumerate(words):
            length = pen.textlength(word, font)
            if x and x + length > width:
                x, y = 0, y + 20
            if i in best:
                pen.rectangle((left + x - 1, y - 1, left + x + length + 1, y + 17), fill=(255, 214, 102))
            pen.text((left + x, y), word, "black", font)
            x += length + 7
    sheet.save(path)
    return path


def attention(ev):
    """Figure 3: how near each area and each word lies to the final vector, by rank;
    with --beside, another run next to it."""
    runs = ([ev.other(ev.opts.beside)] if ev.opts.beside else []) + [ev]
    for run in runs:
        run.views, middle = seen_by(run.views)
        run.rank, run.world = 0, 1                                              # one picture: each process looks at it
    if bool(ev.opts.image) != bool(ev.opts.text):
        raise Stop("attention: --image and --text go together "
                         "(without them: the split's first picture and caption)")
    if ev.opts.image:
        records = data.Records("pairs", None)
        records.append({"image": ev.opts.image, "image_id": 0, "caption": [ev.opts.text]})
    else:
        records = ev.open(need=("caption",)).subset([0])
    text = records[0]["caption"][0]
    try:
        picture = data.load_image(records[0]["image"])
    except data.BadImage as e:
        raise Stop(f"{records[0]['image']}: {e}")
    panels, rows = [], []
    for run in runs:
        batch = next(run.batches(records, "sample"))
        scores, mask = run.model.token_scores(batch), batch["text_mask"][0].bool()
        tokens = run.tokenizer.tokens(batch["text"][0][mask].tolist())
        words = [(w, float(s)) for w, s in word_maps(tokens, scores["text"][0][mask].float().cpu())]
        areas, title = scores["image"][0].float().cpu(), str(run.info.get("path") or run.info["task"])
        panels.append((title if len(title) < 38 else "..." + title[-35:], areas, words))
        row, column = divmod(int(areas.argmax()), areas.shape[1])
        top = sorted(words, key=lambda w: -w[1])[:5]
        rows.append({"run": title, "grid": "x".join(map(str, areas.shape)),
                     "brightest": f"row {row + 1}, column {column + 1}", "top words": ", ".join(w for w, _ in top)})
    picture = data.center(picture, min(picture.size)) if middle else picture
    out = Path(ev.opts.out) if ev.opts.out else result_path(ev, "attention.png")
    draw_ranks(picture, panels, out)
    ev.protocol.update(text=text, image=records[0]["image"],
                       brightness="by rank of the cosine with the final vector", file=str(out))
    return {"rows": rows, "metrics": {}}


def timed(fn, device, repeats):
    """Seconds of the fastest of `repeats` calls, the device waited for."""
    best = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def score_dual(ev, images, texts):
    """Batches -> (N, M): every picture and every caption through its encoder once, then one matrix product."""
    image_emb, text_emb = (torch.cat([encode(b).float() for b in part]) for encode, part in
                           ((ev.model.encode_image, images), (ev.model.encode_text, texts)))
    return image_emb @ text_emb.T


def score_pairs(ev, images, texts):
    """Batches -> (N * M,): every picture with every caption through match()."""
    states = [ev.states("text", b) for b in texts]
    states = {k: torch.cat([s[k] for s in states]) for k in states[0]}
    m, out = len(next(iter(states.values()))), []
    for batch in images:
        image = ev.states("image", batch)
        n = len(next(iter(image.values())))
        for pair in torch.arange(n * m, device=ev.device).split(ev.opts.pairs):
            out.append(ev.model.match({**{k: v[pair // m] for k, v in image.items()},
                                       **{k: v[pair % m] for k, v in states.items()}}))
    return torch.cat(out)


def speed(ev):
    """Figure 4: seconds of embedding and scoring a gallery of n pictures and their captions, without those of reading
    files and of the detector behind stored regions; for a dual encoder, and for a model that scores pairs;
    with --beside, those of another run too. `growth` = log of the ratio of seconds over log of the ratio of pictures,
    from one size to the next: 1 is O(n), 2 is O(n^2)."""
    rows, metrics, sizes = [], {}, sorted({int(s) for s in ev.opts.sizes.split(",")})
    runs = [ev] + ([ev.other(ev.opts.beside)] if ev.opts.beside else [])
    for run in runs:
        run.rank, run.world, run.views = 0, 1, seen_by(run.views)[0]
        records = run.open(need=("caption",))
        if len(records) < sizes[-1]:
            raise Stop(f"--sizes {ev.opts.sizes}: the split has {len(records)} pictures")
        ways = {"dual encoder": score_dual} if offers(run.model, "encode_image", "encode_text") else {}
        ways |= {"match, every pair": score_pairs} if offers(run.model, "match") else {}
        for way, score in ways.items():
            seconds, name = [], str(run.info.get("path") or run.info["task"])
            for n in sizes:
                part = records.subset(range(n))
                images, texts = list(run.batches(part, "image")), list(run.batches(part, "text"))
                if not seconds:
                    score(run, images[:1], texts[:1])                                       # the first call is slower
                seconds.append(timed(lambda: score(run, images, texts), run.device, 3 if way == "dual encoder" else 1))
                growth = math.log(seconds[-1] / seconds[-2]) / math.log(n / last) if len(seconds) > 1 else None
                rows.append({"run": name, "way": way, "pictures": n,
                             "captions": sum(len(b["index"]) for b in texts), "seconds": f"{seconds[-1]:.4f}",
                             "growth": None if growth is None else f"{growth:.2f}"})
                last = n
            slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0] if len(sizes) > 1 else math.nan
            metrics[f"{name}, {way}: growth"] = float(slope)
    ev.protocol.update(sizes=sizes, threads=torch.get_num_threads(), batch_size=ev.opts.batch_size, pairs=ev.opts.pairs,
                       not_counted="reading files" + ", making regions" * any("regions" in run.views for run in runs))
    return {"rows": rows, "metrics": metrics}


# name -> (function, what the model must have: any of these sets of methods)
TASKS = {
    "retrieval": (retrieval, (("encode_image", "encode_text"), ("match",))),
    "masked": (masked, (("masked_predictions",),)),
    "vqa": (vqa, (("rank_answers",),)),
    "ve": (classification, (("predict",),)),
    "nlvr2": (classification, (("predict",),)),
    "gradcam": (gradcam, (("gradcam",),)),
    "pointing": (pointing, (("gradcam",),)),
    "cross_attention": (cross_attention, (("cross_attention",),)),
    "gallery": (gallery, (("encode_image", "encode_text"),)),
    "vtm": (vtm, (("encode_clip", "encode_text"),)),
    "sts": (sts, (("encode_text",),)),
    "hashing": (hashing, (("hash_codes",),)),
    "attention": (attention, (("token_scores",),)),
    "speed": (speed, (("encode_image", "encode_text"), ("match",))),
    "linear": (classification, (("predict",),)),
    "probe": (probe, (("visual_features",),)),
    "tagging": (tagging, (("tag_scores",),)),
    "detection": (detection, (("detect",),)),
    "segmentation": (detection, (("detect",),)),
}


# --------------------------------------------------------------------------------------------------
# Running them

def table(rows):
    """Rows (dicts; floats get one decimal, what a row lacks is a dash) -> a fixed-width table."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda v: "-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v)
    names = [h.replace("_r", " R@") if h[-1].isdigit() else h for h in heads]
    lines = [names] + [[show(row.get(h)) for h in heads] for row in rows]
    text, widths = ([any(isinstance(row.get(h), str) for row in rows) for h in heads],
                    [max(map(len, c)) for c in zip(*lines)])
    lines = ["  ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text)).rstrip()
             for line in lines]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def result_path(ev, name):
    """Where a result goes: in the run's directory. None for a model that is in no directory."""
    return Path(ev.info["path"]) / name if ev.info.get("path") else None


def provenance(ev):
    """What the numbers hang on: checkpoint hash, commit, versions, world size."""
    weights, commit = result_path(ev, "model.safetensors"), None
    if shutil.which("git"):
        done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = done.stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"checkpoint": ev.info.get("path"), "step": ev.info.get("step"), "git_commit": commit, "versions": versions,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights and weights.is_file() else None,
            "world_size": ev.world, "device": str(ev.device), "dtype": ev.opts.dtype}


def evaluate(model, info, task, opts=None, rank=0, world=1):
    """One evaluation, called on every rank with the bare model. -> {"task", "metrics", "rows", "protocol"}, equal on
    all ranks; rank 0 prints the table and writes eval-<task>.json into info["path"]. opts: a dict or namespace over
    the command line's defaults. The model is left as it was, in the mode it was in. SystemExit, one line, when it lacks
    what the task needs."""
    if task not in TASKS or task not in offered(model):
        known = "" if task in TASKS else f" (known: {', '.join(TASKS)})"
        raise Stop(f"task {task}: {type(model).__name__} trained for {info['task']} does not offer it{known}; "
                         f"it offers: {', '.join(offered(model)) or 'none'}")
    given = opts if isinstance(opts, dict) else vars(opts) if opts else {}
    opts = argparse.Namespace(**{**vars(parser().parse_args([info.get("path") or ""])), **given})
    ev, training = Eval(model, info, task, opts, rank, world), model.training
    model.eval()
    amp = (torch.autocast(ev.device.type, getattr(torch, opts.dtype)) if opts.dtype != "float32"
           else contextlib.nullcontext())
    with torch.no_grad(), amp:                          # no_grad, not inference_mode: what a model caches must live on
        result = TASKS[task][0](ev)
    model.train(training)
    if world > 1:
        bad = [None] * world
        dist.all_gather_object(bad, ev.bad)
        ev.bad = set().union(*bad)
    result = {"task": task, **result, "protocol": {**ev.protocol, "unreadable_images": len(ev.bad), **provenance(ev)}}
    if rank == 0:
        out = result_path(ev, f"eval-{task}.json")
        if out:
            out.write_text(json.dumps(result, indent=1, default=str))
        print("\n" + textwrap.fill(
            f"{task}: " + "; ".join(f"{k} {v}" for k, v in ev.protocol.items() if v is not None), 120))
        if ev.bad:
            print(f"{len(ev.bad)} images could not be read and were taken as grey ones")
        print(table(result["rows"]) + (f"\n-> {out}" if out else ""), flush=True)
    return result


def parser():
    p = argparse.ArgumentParser(prog="eval.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run's directory: config.json, model.safetensors")
    p.add_argument("--task", help=f"{', '.join(TASKS)}; default: those of the run's own task")
    p.add_argument("--data", help="files in the task's official format, or shapes; default: the run's")
    p.add_argument("--image_root", help="folder that the images' paths are relative to")
    p.add_argument("--split", help="train, val or test; default: test, or val where there is none")
    p.add_argument("--limit", type=int, help="only so many records, for a quick look")
    p.add_argument("--vocab", help="BERT vocabulary file; default: the run's")
    p.add_argument("--batch_size", type=int, default=64, help="records at a time (default: 64)")
    p.add_argument("--pairs", type=int, default=512,
                   help="image-text pairs that match() is given at a time (default: 512)")
    p.add_argument("--workers", type=int, help="loader processes per rank; default: the run's")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                   help="autocast (default: none)")
    p.add_argument("--rerank", choices=tuple(RULES),
                   help="; ".join(f"{k}: {v}" for k, v in RULES.items()) + " (default: itm)")
    p.add_argument("--rerank_k", type=int, help="candidates re-ranked, at most the gallery; default: the run's, or 128")
    p.add_argument("--candidates", type=int,
                   help="retrieval: score only the k best of another run's dual encoder; default: every pair")
    p.add_argument("--candidates_from", metavar="RUN", help="retrieval: that run's directory")
    p.add_argument("--regions", help="files of data.py regions, separated by commas; default: the run's")
    p.add_argument("--folds", type=int,
                   help="retrieval also as the mean over so many folds; default: 5 for 5,000 images")
    p.add_argument("--answers", help="vqa: the answer list, JSON or one a line; default: the run's")
    p.add_argument("--shortlist", type=int, help="vqa: answers kept by their first token (default: 128)")
    p.add_argument("--ensemble", nargs="+", metavar="RUN",
                   help="retrieval: average the similarities with those of these runs")
    p.add_argument("--beside", metavar="RUN", help="attention, speed: another run to show beside this one")
    p.add_argument("--sizes", default="16,32,64,128", help="speed: gallery sizes in pictures (default: 16,32,64,128)")
    p.add_argument("--database", help="hashing: the database's list; default: database.txt in the folder --data")
    p.add_argument("--map_at", type=int, default=5000, help="hashing: how many answers count (default: 5000)")
    p.add_argument("--image", help="gradcam, attention, gallery: the picture")
    p.add_argument("--text", help="gradcam, attention: what is said of it; gallery: the query")
    p.add_argument("--block", type=int, help="gradcam: which fusion layer, from 0; default: the model's")
    p.add_argument("--out", help="gradcam, attention, gallery: the PNG; default: RUN/<task>.png")
    p.add_argument("--probe_lr", type=float,
                   help="probe: learning rate, on the features as they are (MoCo's protocol: 30); default: on "
                        "features of mean 0 and deviation 1, the best of five rates on a held-out tenth")
    return p


def main(argv=None):
    """The command line. -> {task: result}."""
    opts = parser().parse_args(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model, info = load_run(opts.run, device)
    tasks = [opts.task] if opts.task else sys.modules[type(model).__module__].EVALS[info["task"]]
    results = {task: evaluate(model, info, task, opts, rank, world) for task in tasks}
    if world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
