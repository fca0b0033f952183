"""Evaluate a run: one table on the screen, one JSON with the protocol beside the numbers.

    python eval.py out/RUN                                        the evaluations that belong to the run's task
    python eval.py out/RUN --task retrieval --data dataset_flickr30k.json --image_root flickr30k-images
    python eval.py out/RUN --task gradcam --image a.jpg --text "a dog beside a tree"
    torchrun --nproc_per_node 8 eval.py out/RUN --task vqa --split test

A task is a function of `Eval` (the model, its data, this rank's share) in the table TASKS; it asks the model for methods, never
for its name. The metrics above it are pure functions of tensors.

Legend: N images, M captions, B batch, P pairs of an image and a caption, k candidates re-ranked, d embedding, T tokens.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import shapes

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------------------
# Runs on disk

def load_module(name):
    """The module models/<name>.py. SystemExit that lists the files there when it is none of them."""
    names = sorted(p.stem for p in (HERE / "models").glob("*.py"))
    if name not in names:
        raise SystemExit(f"there is no models/{name}.py; there are: {', '.join(names)}")
    return importlib.import_module(f"models.{name}")


def bare_name(name):
    """A parameter's name without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def tied_names(model):
    """The names of model.state_dict() grouped by the memory they share: a list of lists, in order; mostly of one name."""
    groups = defaultdict(list)
    for name, t in model.state_dict().items():
        groups[(t.device, t.data_ptr(), t.shape, t.stride()) if t.numel() else name].append(name)
    return list(groups.values())


def save_model(model, path):
    """Write parameters and buffers as safetensors, whole or not at all. Of tied tensors only the first is kept, for the format
    refuses shared memory; names carry no `module.` or `_orig_mod.`."""
    state, path = model.state_dict(), Path(path)
    tensors = {bare_name(g[0]): state[g[0]].detach().to("cpu", copy=True).contiguous() for g in tied_names(model)}
    save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)


def read_weights(path):
    """{name: CPU tensor} of a safetensors file. SystemExit if it is missing or damaged."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file")
    try:
        return {bare_name(k): v for k, v in load_file(path).items()}
    except safetensors.SafetensorError as e:
        raise SystemExit(f"{path}: not a whole safetensors file ({e})")


def load_weights(model, path):
    """Fill every parameter and buffer of `model` from a file of save_model(), tied ones again tied. SystemExit that names the
    first keys that are missing, unknown or of another shape."""
    state, mine, full = read_weights(path), model.state_dict(), {}
    for group in tied_names(model):
        found = [state[bare_name(n)] for n in group if bare_name(n) in state]
        full.update({n: found[0] for n in group if found})
    wrong = [f"{n} is missing" for n in mine if n not in full]
    wrong += [f"{n} is {tuple(full[n].shape)}, not {tuple(mine[n].shape)}" for n in full if full[n].shape != mine[n].shape]
    wrong += [f"{n} is unknown" for n in sorted(set(state) - {bare_name(n) for n in mine})]
    if wrong:
        more = f"; {len(wrong) - 4} more" * (len(wrong) > 4)
        raise SystemExit(f"{path}: does not fit the model: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(full)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def find_run(path):
    """The directory that holds the run: `path`, or the last of its stage-1, stage-2, ... SystemExit when there is none."""
    path = Path(path)
    stages = sorted(path.glob("stage-*/config.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not (path / "config.json").is_file() and not stages:
        raise SystemExit(f"{path}: no run here (no config.json)")
    return path if (path / "config.json").is_file() else stages[-1].parent


def load_run(path, device="cpu"):
    """A run directory -> (model in eval mode on `device`, info). info is config.json {model, preset, task, config, loop, stats,
    step, ...} and `path`. SystemExit, one line, for a directory that is no run, an unknown model or field, damaged weights."""
    path = find_run(path)
    try:
        info = json.loads((path / "config.json").read_text())
        name, task, config = info["model"], info["task"], info["config"]
    except (ValueError, KeyError) as e:
        raise SystemExit(f"{path / 'config.json'}: damaged ({type(e).__name__}: {e})")
    module = load_module(name)
    unknown = set(config) - {f.name for f in dataclasses.fields(module.Config)}
    if unknown:
        raise SystemExit(f"{path / 'config.json'}: models/{name}.py has no setting {', '.join(sorted(unknown))}")
    model = module.Model(module.Config(**config), task, num_labels=info.get("stats", {}).get("num_labels", 0))
    load_weights(model, path / "model.safetensors")
    return model.to(device).eval(), {**info, "path": str(path)}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics

def ranks(sim, owner, chunk=1024):
    """Pessimistic ranks of image->text and text->image retrieval.

    sim: (N, M) scores, higher = better; owner: (M,) int64, the image of each caption, any number of captions an image. -> (N,),
    (M,) int64: 1 + the number of wrong candidates that score at least as much as the right one (for an image: its best caption),
    so that ties with a wrong candidate count against the model. SystemExit on NaN and on an image without caption.
    """
    n, m = sim.shape
    if not torch.equal(owner.unique().cpu(), torch.arange(n)) or len(owner) != m:
        raise SystemExit(f"retrieval: {n} images, {m} captions: each image must have a caption, each caption one of the images")
    own = sim[owner, torch.arange(m, device=sim.device)]                                    # (M,) score with its own image
    best = sim.new_full((n,), -math.inf).scatter_reduce(0, owner, own, "amax")              # (N,)
    tied = torch.zeros_like(best, dtype=torch.long).scatter_add(0, owner, (own >= best[owner]).long())
    i2t, t2i = [], torch.zeros(m, dtype=torch.long, device=sim.device)
    for rows, b in zip(sim.split(chunk), best.split(chunk)):
        if rows.isnan().any():
            raise SystemExit("retrieval: the scores contain NaN")
        i2t.append((rows >= b[:, None]).sum(1))
        t2i += (rows >= own).sum(0)                                                         # it counts itself: the 1 of 1 + ...
    return torch.cat(i2t) - tied + 1, t2i


def shortlist(sim, k):
    """The k (at most the gallery) best captions of each image, the k best images of each caption: (N, k), (M, k) int64."""
    n, m = sim.shape
    return sim.topk(min(k, m), dim=1).indices, sim.topk(min(k, n), dim=0).indices.T.contiguous()


def reranked(sim, owner, top_i, top_t, val_i, val_t):
    """Ranks after the shortlists are put in the order of new scores; all others stay below them, in the order of `sim`.

    sim: (N, M); top_i (N, k) captions, top_t (M, k) images; val_i, val_t: their new scores, any float. -> as ranks()."""
    if val_i.isnan().any() or val_t.isnan().any():
        raise SystemExit("retrieval: the matching scores contain NaN")
    base_i, base_t = ranks(sim, owner)
    out = []
    for base, own, val in ((base_i, owner[top_i] == torch.arange(len(sim), device=sim.device)[:, None], val_i),
                           (base_t, top_t == owner[:, None], val_t)):
        best = val.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        inside = 1 + ((val >= best) & ~own).sum(1)
        out.append(torch.where(own.any(1), inside, base))        # base counts all of the shortlist: their sim >= the right one's
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
    """What a random order of this very gallery gets on average: text->image k/N; image->text 1 - C(M-c, k) / C(M, k) for an image
    of c captions. The median is the smallest rank that half of the queries reach. owner: (M,) -> the keys of summary()."""
    counts, m = Counter(owner.unique(return_counts=True)[1].tolist()), len(owner)           # {c: how many images have c captions}
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


def vqa_accuracy(answer, answers):
    """The official VQA score in [0, 1]: over each leaving-out of one annotator, min(1, matches among the others / 3), averaged;
    answer and answers are normalized first (data.normalize_answer). With a single annotator: equal or not."""
    answer, answers = data.normalize_answer(answer), [data.normalize_answer(a) for a in answers]
    hits = [a == answer for a in answers]
    if len(hits) == 1:
        return float(hits[0])
    return sum(min(1.0, (sum(hits) - h) / 3) for h in hits) / len(hits)


def box_cover(boxes, size, grid):
    """How much of each cell of a grid over the picture lies in the boxes. boxes: xyxy in pixels; size: (width, height) of the
    picture; grid: (h, w) cells -> (h, w) float64 in [0, 1]. Exact for one box; of overlapping ones the larger share counts."""
    def overlap(a, b, length, cells):
        edges = np.arange(cells + 1) * length / cells
        return np.clip(np.minimum(b, edges[1:]) - np.maximum(a, edges[:-1]), 0, None) * cells / length
    return np.max([np.outer(overlap(y0, y1, size[1], grid[0]), overlap(x0, x1, size[0], grid[1])) for x0, y0, x1, y1 in boxes], 0)


# ----------------------------------------------------------------------------------------------------------------------
# What a task is given

def offered(model):
    """The evaluation tasks whose methods the model has. One that it did not build for its task is None on the instance."""
    return [t for t, (_, needs) in TASKS.items() if any(all(callable(getattr(model, m, None)) for m in way) for way in needs)]


class Eval:
    """The model (with its `cfg`), its views, the data and this rank's share of them; `protocol` fills up on the way."""

    def __init__(self, model, info, task, opts, rank, world):
        self.model, self.info, self.task, self.opts, self.rank, self.world = model, info, task, opts, rank, world
        self.device, self.cfg, self.loop = next(model.parameters()).device, model.cfg, info.get("loop", {})
        module = sys.modules[type(model).__module__]
        self.views = module.VIEWS[task if task in module.VIEWS else info["task"]]
        self.spec = opts.data or self.loop.get("eval_data") or self.loop.get("data") or "shapes"
        self.root = opts.image_root or (None if opts.data else self.loop.get("eval_root") or self.loop.get("image_root")) or None
        own = result_path(self, "vocab.txt")                                                # a run keeps a copy of its own
        vocab = opts.vocab or (own if own and own.is_file() else self.loop.get("vocab") or "shapes")
        self.tokenizer = data.get_tokenizer(vocab)
        if self.tokenizer.vocab_size != self.cfg.vocab_size:
            raise SystemExit(f"{vocab}: {self.tokenizer.vocab_size} tokens, the run has {self.cfg.vocab_size}; name its --vocab")
        self.bad, self.protocol = set(), {}

    def setting(self, name, default):
        """An option: the command line's, else the run's, else the default (a run writes 0 or "" for "not set")."""
        value = getattr(self.opts, name)
        return (self.loop.get(name) or default) if value is None else value

    def open(self, need=()):
        """The records of the split (test; without one, val), with what the checkpoint was trained on in the protocol."""
        split = self.opts.split or "test"
        read = lambda split: data.open_source(self.views["source"], self.spec, split, self.root, limit=self.opts.limit, need=need)
        try:
            records = read(split)
        except data.DataError as e:
            if self.opts.split or "no split" not in str(e):
                raise
            records, split = read("val"), "val"
        seen, start = self.loop.get("data") or "shapes", f", from {self.loop['init']}" if self.loop.get("init") else ""
        how = "pre-trained only" if self.info["task"] == "pretrain" else f"fine-tuned ({self.info['task']})"
        known = set(seen.split(",")) & set(self.spec.split(","))
        self.protocol.update(data=self.spec, split=split, records=len(records), limit=self.opts.limit,
                             protocol=f"{'in domain' if known else 'zero-shot'}, {how}, trained on {seen}{start}")
        return records

    def batches(self, records, what, views=None):
        """This rank's batches, on the device: images, flattened captions ("text") or whole records ("sample")."""
        for batch in data.iter_eval(records, views or self.views, self.tokenizer, self.cfg.image_size, self.cfg.max_text,
                                    what=what, batch_size=self.opts.batch_size, rank=self.rank, world=self.world,
                                    workers=max(0, self.setting("workers", 0))):
            self.bad.update(batch["index"][batch["bad"].bool()].tolist())
            yield {k: v.to(self.device) for k, v in batch.items()}

    def progress(self, batches, total, text):
        steps = math.ceil(total / self.world / self.opts.batch_size)
        return tqdm(batches, text, steps, leave=False, delay=2, disable=self.rank > 0)

    def gather(self, index, parts, total):
        """Rows computed on all ranks, in the data's order and each once. index: (m,) of this rank's rows; parts: {name: (m, ...)}
        CPU -> {name: (total, ...)} CPU on every rank."""
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
        """What match() needs of the images or the captions of a batch; the batch's own tensors if the model makes no states."""
        if callable(getattr(self.model, f"{kind}_states", None)):
            return getattr(self.model, f"{kind}_states")(batch)
        return {k: v for k, v in batch.items() if k.startswith(kind)}


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: Eval -> {"rows": table, "metrics": the numbers that count, ...}

def match_scores(ev, records, texts, keys=None):
    """match() of pairs -> (P,) float32 on every rank. texts: {name: (M, ...)} states of all captions; keys: (P,) int64, sorted
    and unique, image * M + caption; None = all N * M.

    Each rank scores all pairs of its own images; the captions' states are kept, the images' live for one batch only
    (5,000 images of 577 tokens would be 9 GB), a pair asked for in both directions is scored once.
    """
    m, n = len(next(iter(texts.values()))), len(data.unique_images(records)[0])
    out = torch.zeros(n * m if keys is None else len(keys))
    for batch in ev.progress(ev.batches(records, "image"), n, "matching"):
        images, ends = ev.states("image", batch), torch.stack([batch["index"], batch["index"] + 1]).cpu() * m    # (2, B)
        lo, hi = ends if keys is None else torch.searchsorted(keys, ends)
        where = torch.cat([torch.arange(a, b) for a, b in zip(lo.tolist(), hi.tolist())])  # (p,) into keys
        local = torch.repeat_interleave(torch.arange(len(lo)), hi - lo)                     # (p,) into the batch
        for w, i in zip(where.split(ev.opts.pairs), local.split(ev.opts.pairs)):
            caption = (w if keys is None else keys[w]) % m
            pair = {k: v[i.to(v.device)] for k, v in images.items()} | {k: v[caption].to(ev.device) for k, v in texts.items()}
            out[w] = ev.model.match(pair).float().cpu()
    if ev.world > 1:                                             # every pair was scored on one rank: the others add 0
        out = out.to(ev.device)
        dist.all_reduce(out)
    return out.cpu()


def retrieval(ev):
    """Image->text and text->image over the whole split, in its order; 5,000 images also as five folds of 1,000. The dual
    encoder's scores, then its k best put in the order of match(); a model without encoders has every pair scored by match()."""
    records = ev.open(need=("caption",))
    owner, order = data.flat_captions(records)[1].sort(stable=True)                         # captions in the images' order
    n, m, rule, k = int(owner[-1]) + 1, len(owner), ev.setting("rerank", "itm"), ev.setting("rerank_k", 128)
    dual = callable(getattr(ev.model, "encode_image", None))
    rerank = dual and rule != "none" and k > 0 and callable(getattr(ev.model, "match", None))
    texts = {}
    if rerank or not dual:
        texts = ev.collect(records, "text", m, lambda b: ev.states("text", b), "texts")
    if dual:
        base = "dual encoder"
        image_emb = ev.collect(records, "image", n, lambda b: {"e": ev.model.encode_image(b).float()}, "images")["e"]
        if "text_emb" not in texts:                                                         # states may come with the embedding
            texts["text_emb"] = ev.collect(records, "text", m, lambda b: {"e": ev.model.encode_text(b)}, "texts")["e"]
    texts = {name: t[order] for name, t in texts.items()}
    if dual:
        sim = image_emb.to(ev.device) @ texts.pop("text_emb").float().to(ev.device).T       # (N, M) float32: 0.5 GB for COCO 5K
    else:
        base, sim = f"match, all {n * m:,} pairs", match_scores(ev, records, texts).view(n, m)
    owner, how = owner.to(sim.device), f"re-ranked, {rule}, k={k}" if rerank else base

    folds = ev.opts.folds or (5 if n == 5000 else 1)
    size = n // folds
    if not size:
        raise SystemExit(f"--folds {folds}: there are only {n} images")
    galleries = {f"all {n:,}": [(0, n)]}
    if folds > 1:
        galleries[f"{size:,}, mean of {folds} folds"] = [(f * size, (f + 1) * size) for f in range(folds)]
    cut = torch.searchsorted(owner, torch.arange(n + 1, device=owner.device)).tolist()      # captions of i: cut[i]:cut[i + 1]
    spans = {(a, b): (sim[a:b, cut[a]:cut[b]], owner[cut[a]:cut[b]] - a) for part in galleries.values() for a, b in part}
    if rerank:
        tops = {span: shortlist(s, k) for span, (s, _) in spans.items()}                    # indices within the fold
        pairs = {(a, b): (torch.arange(a, b)[:, None] * m + cut[a] + i.cpu(),               # keys image * M + caption
                          (a + t.cpu()) * m + torch.arange(cut[a], cut[b])[:, None]) for (a, b), (i, t) in tops.items()}
        keys = torch.cat([p.flatten() for both in pairs.values() for p in both]).unique()
        scores = match_scores(ev, records, texts, keys)
        if rule == "sum":
            scores += sim.flatten()[keys.to(sim.device)].cpu()
        scores = {span: [scores[torch.searchsorted(keys, p)].to(sim.device) for p in both] for span, both in pairs.items()}

    rows, metrics = [], {}
    for name, part in galleries.items():
        found = {"chance": [chance(spans[span][1].cpu()) for span in part], base: [recall(*spans[span]) for span in part]}
        if rerank:
            found[how] = [summary(*reranked(*spans[span], *tops[span], *scores[span])) for span in part]
        metrics = metrics or average(found[how])
        if ev.spec == "shapes" and part == [(0, n)] and ev.opts.limit is None:
            oracle = shapes.oracle_recall(records.root, records.split)                      # reads captions without a fault
            found["oracle ceiling"] = [{key: 100 * oracle[key] for key in ("i2t_r1", "t2i_r1")}]
        rows += [{"images": name, "scores": row, **average(results)} for row, results in found.items()]
    counts = owner.bincount()
    ev.protocol.update(images=n, captions=m, captions_per_image=[int(counts.min()), int(counts.max())],
                       ties="a wrong candidate with an equal score ranks first", rerank=RULES[rule] if rerank else RULES["none"],
                       rerank_k=[min(k, m), min(k, n)] if rerank else None)
    return {"rows": rows, "metrics": metrics}


RULES = {"itm": "the k best by their match score alone (ALBEF), all others below",
         "sum": "the k best by match score + similarity (BLIP), all others below", "none": "no re-ranking"}


def vqa(ev):
    """Rank the answer list for every question; write the official result file; score it where there are annotations."""
    ev.views = {key: v for key, v in ev.views.items() if v != "answer"}                     # never given to the model here
    records, stats = ev.open(), ev.info.get("stats", {})
    answers = read_answers(ev.opts.answers) if ev.opts.answers else stats.get("answers")
    if not answers:
        raise SystemExit("vqa: the run has no answer list; name one with --answers FILE")
    ids = [ev.tokenizer.encode(a, ev.cfg.max_text) for a in answers]
    length = max(map(len, ids))
    answer_ids = torch.tensor([i + [ev.tokenizer.pad_id] * (length - len(i)) for i in ids], device=ev.device)    # (A, L)
    answer_mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in ids], device=ev.device)          # (A, L)
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
    for name, guess in ((f"always '{answers[0]}' (most frequent in training)", lambda q: answers[0]), ("model", result.get)):
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
        raise SystemExit(f"--answers {path}: no such file")
    text = Path(path).read_text(encoding="utf-8")
    try:
        return json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines() if line.strip()]
    except ValueError as e:
        raise SystemExit(f"--answers {path}: {e}")


CLASSES = {"ve": ("entailment", "neutral", "contradiction"), "nlvr2": ("False", "True")}


def classification(ev):
    """Accuracy of predict() against the labels, beside that of the split's most frequent class; for NLVR2 also the consistency:
    the share of sentences that are judged right on all their picture pairs (identifier split-set-pair-sentence)."""
    records, names = ev.open(need=("label",)), CLASSES[ev.task]
    label = torch.tensor([r["label"] for r in records])
    logits = ev.collect(records, "sample", len(records), lambda b: {"y": ev.model.predict(b).float()})["y"]      # (N, C)
    if logits.shape[1] != len(names):
        raise SystemExit(f"{ev.task}: the model has {logits.shape[1]} classes, the task {len(names)}: {', '.join(names)}")
    right = logits.argmax(1) == label
    share = torch.bincount(label, minlength=len(names)) / len(label)
    metrics = {"accuracy": 100 * right.double().mean().item(), "baseline": 100 * share.max().item()}
    rows = [{"classes": f"always '{names[share.argmax()]}'", "records": len(label), "accuracy": metrics["baseline"]},
            {"classes": "model", "records": len(label), "accuracy": metrics["accuracy"]}]
    for c, name in enumerate(names):
        if (label == c).any():
            rows.append({"classes": f"  {name}", "records": int((label == c).sum()),
                         "accuracy": 100 * right[label == c].double().mean().item()})
    parts = [str(r.get("identifier", "")).split("-") for r in records]
    if all(len(p) == 4 for p in parts):
        groups = defaultdict(list)
        for (split, group, _, sentence), ok in zip(parts, right.tolist()):
            groups[split, group, sentence].append(ok)
        metrics["consistency"] = 100 * sum(map(all, groups.values())) / len(groups)
        rows.append({"classes": "consistency", "records": len(groups), "accuracy": metrics["consistency"]})
    ev.protocol.update(classes=dict(enumerate(names)))
    return {"rows": rows, "metrics": metrics}


def word_maps(tokens, maps):
    """Wordpieces merged. tokens: T strings; maps: (T, h, w) -> [(word, (h, w) mean over its pieces)] without specials."""
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
        yield word_maps(tokens, maps["word"][b][mask].detach().float().cpu()), maps["sentence"][b].detach().float().cpu()


def heat(picture, m):
    """The picture under a map's heat colors. picture: PIL; m: (h, w), stretched over it; the map's own maximum is red."""
    x = F.interpolate(m[None, None], (picture.height, picture.width), mode="bilinear")[0, 0].clamp(min=0).numpy()
    x = x / max(x.max(), 1e-12)
    color = np.stack([np.clip(1.5 - np.abs(4 * x - c), 0, 1) for c in (3, 2, 1)], -1)       # blue, green, yellow, red
    return Image.fromarray(np.uint8(255 * (0.5 * color + 0.5 * np.asarray(picture) / 255)))


def draw_maps(picture, text, words, sentence, path, width=192, columns=6):
    """One PNG: the picture, the sentence's map and a map for each word, each with its caption. `width` of a tile in pixels."""
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
    """-> (the views of a picture and a caption, for gradcam(); does a center crop show the model less than the picture?)"""
    kept = {k: v for k, v in views.items() if k in ("image", "image_eval", "norm")}
    return {**kept, "source": "pairs", "text": "caption"}, kept.get("image_eval", "resize") == "center"


def gradcam(ev):
    """One PNG for --image and --text: where the model looks for each word and for the sentence."""
    if not (ev.opts.image and ev.opts.text):
        raise SystemExit('gradcam: name a picture and a text: --image a.jpg --text "..." (--task pointing measures a split)')
    try:
        picture = data.load_image(ev.opts.image)
    except data.BadImage as e:
        raise SystemExit(f"--image {ev.opts.image}: {e}")
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
        print(f"{silent} of {len(words)} words have a map of zeros: in a last (or only) fusion layer [CLS] alone is heard; try another --block")
    return {"rows": [{"file": str(out), "words": len(words), "grid": "x".join(map(str, sentence.shape))}], "metrics": {}}


def pointing(ev):
    """On data with boxes: the share of a word's map that lies inside the boxes of the object it names, beside the boxes' share of
    the picture (what a uniform map gets). The words are those that equal a label's name; the caption is each record's first."""
    ev.views, middle = seen_by(ev.views)
    if middle:
        raise SystemExit("pointing: boxes and a center crop do not go together")
    records, found = ev.open(need=("caption", "boxes", "labels")), []                       # (inside, uniform, peak) per word
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
        raise SystemExit("pointing: no word of a caption that equals a label's name has a map: in a last (or only) fusion layer the words' are zero")
    inside, uniform, peak = (100 * np.mean(found, 0)).tolist()
    row = {"inside the box": inside, "uniform": uniform, "ratio": round(inside / uniform, 2), "peak in the box": peak}
    return {"rows": [{"words": len(found), **row}], "metrics": row}


# name -> (function, what the model must have: any of these sets of methods)
TASKS = {
    "retrieval": (retrieval, (("encode_image", "encode_text"), ("match",))),
    "vqa": (vqa, (("rank_answers",),)),
    "ve": (classification, (("predict",),)),
    "nlvr2": (classification, (("predict",),)),
    "gradcam": (gradcam, (("gradcam",),)),
    "pointing": (pointing, (("gradcam",),)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Running them

def table(rows):
    """Rows (dicts; floats get one decimal, what a row lacks is a dash) -> a fixed-width table."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda v: "-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v)
    names = [h.replace("_r", " R@") if h[-1].isdigit() else h for h in heads]
    lines = [names] + [[show(row.get(h)) for h in heads] for row in rows]
    text, widths = [any(isinstance(row.get(h), str) for row in rows) for h in heads], [max(map(len, c)) for c in zip(*lines)]
    lines = ["  ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text)).rstrip() for line in lines]
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
    """One evaluation, called on every rank with the bare model. -> {"task", "metrics", "rows", "protocol"}, equal on all ranks;
    rank 0 prints the table and writes eval-<task>.json into info["path"]. opts: a dict or namespace over the command line's
    defaults. The model is left as it was, in the mode it was in. SystemExit, one line, when it lacks what the task needs."""
    if task not in TASKS or task not in offered(model):
        known = "" if task in TASKS else f" (known: {', '.join(TASKS)})"
        raise SystemExit(f"task {task}: {type(model).__name__} trained for {info['task']} does not offer it{known}; "
                         f"it offers: {', '.join(offered(model)) or 'none'}")
    given = opts if isinstance(opts, dict) else vars(opts) if opts else {}
    opts = argparse.Namespace(**{**vars(parser().parse_args([info.get("path") or ""])), **given})
    ev, training = Eval(model, info, task, opts, rank, world), model.training
    model.eval()
    amp = torch.autocast(ev.device.type, getattr(torch, opts.dtype)) if opts.dtype != "float32" else contextlib.nullcontext()
    with torch.no_grad(), amp:                                   # no_grad, not inference_mode: what a model caches must live on
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
        print("\n" + textwrap.fill(f"{task}: " + "; ".join(f"{k} {v}" for k, v in ev.protocol.items() if v is not None), 120))
        if ev.bad:
            print(f"{len(ev.bad)} images could not be read and were taken as grey ones")
        print(table(result["rows"]) + (f"\n-> {out}" if out else ""), flush=True)
    return result


def parser():
    p = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run's directory: config.json, model.safetensors")
    p.add_argument("--task", help=f"{', '.join(TASKS)}; default: those of the run's own task")
    p.add_argument("--data", help="files in the task's official format, or shapes; default: the run's")
    p.add_argument("--image_root", help="folder that the images' paths are relative to")
    p.add_argument("--split", help="train, val or test; default: test, or val where there is none")
    p.add_argument("--limit", type=int, help="only so many records, for a quick look")
    p.add_argument("--vocab", help="BERT vocabulary file; default: the run's")
    p.add_argument("--batch_size", type=int, default=64, help="records at a time (default: 64)")
    p.add_argument("--pairs", type=int, default=512, help="image-text pairs that match() is given at a time (default: 512)")
    p.add_argument("--workers", type=int, help="loader processes per rank; default: the run's")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="autocast (default: none)")
    p.add_argument("--rerank", choices=tuple(RULES), help="; ".join(f"{k}: {v}" for k, v in RULES.items()) + " (default: itm)")
    p.add_argument("--rerank_k", type=int, help="candidates re-ranked, at most the gallery; default: the run's, or 128")
    p.add_argument("--folds", type=int, help="retrieval also as the mean over so many folds; default: 5 for 5,000 images")
    p.add_argument("--answers", help="vqa: the answer list, JSON or one a line; default: the run's")
    p.add_argument("--shortlist", type=int, help="vqa: answers kept by their first token (default: 128)")
    p.add_argument("--image", help="gradcam: the picture")
    p.add_argument("--text", help="gradcam: what is said of it")
    p.add_argument("--block", type=int, help="gradcam: which fusion layer, from 0; default: the model's")
    p.add_argument("--out", help="gradcam: the PNG; default: RUN/gradcam.png")
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
