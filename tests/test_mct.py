"""models/mct.py against the paper, written down a second time with explicit loops in float64."""

import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import eval as evaluation
import train
from models import mct
from models.mct import (Config, Mct, Queue, QueueHinge, QueueLSE, SplitBatchNorm, demo_batch,
                        enqueue_, hinge, info_nce, pmi_vectors, shuffle, tag_nce, tag_positives,
                        unshuffle, vse_loss)
from tools import weights

TAU, ALPHA, EPS = 0.07, 0.2, 2


# --------------------------------------------------------------------------------------------------
# Small models and batches

def small(**over):
    sizes = dict(
        image_size=32, block="basic", layers=(1, 1, 1, 1), stem="small", vision_width=4,
        width=24, text_layers=1, text_heads=3, mlp_ratio=2, act="relu", dropout=0.0, max_text=9,
        positions=12, vocab_size=57, head_hidden=20, intra_dim=16, inter_dim=14, queue_size=21,
        momentum=0.9, lambda_ic=0.1, lambda_ci=0.2, bn_groups=1, tag_width=6, queue_chunk=8,
        word_dim=10, joint_dim=18, tag_dim=16, tag_hidden=12, detect_sizes=(64,), detect_max=80,
        anchors=(8, 16, 24, 32, 48), rois=16, fpn_width=16, proposals=(30, 20))
    return Config(**{**sizes, **over})


def make_model(task="pretrain", fill=True, **over):
    """In training mode; momentum copies unlike the students, queues full of ids 0..9 and -1, tags,
    and some missing captions."""
    model = Mct(small(**over), task, 20).train()
    if task == "pretrain" and fill:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2.0 if p.ndim == 2 else 1.0).add_(torch.randn_like(p) * 0.02)
            model.queue_ids.copy_(torch.arange(21) % 11 - 1)
            model.queue_captioned.copy_(torch.arange(21) % 5 != 0)
            if model.tagged:
                model.queue_tags.copy_(tag_rows(21))
    return model


def tag_rows(n, vocab=20, width=6):
    """(n, width) distinct ids padded with -1; the first row has none."""
    rows = torch.full((n, width), -1)
    for i in range(1, n):
        k = 3 + i % (width - 2)
        rows[i, :k] = torch.randperm(8 if i % 2 else vocab)[:k]
    return rows


def make_batch(task="pretrain", b=6, cfg=None):
    batch = demo_batch(cfg or small(), task, b)
    if "tags" in batch:
        batch["tags"] = tag_rows(b)
    if "text_valid" in batch:
        batch["text_valid"][1] = 0
        batch["text_mask"][2:, 5:] = 0
        batch["text_key_mask"][3:, 4:] = 0
        batch["text_key_is_copy"] = torch.tensor([1] + [0] * (b - 1))
    return batch


def units(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def close(a, b, tol=1e-5):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert torch.allclose(a, b, rtol=tol, atol=tol), (a, b)


def problem(present=True, b=5, k=13, d=6):
    """Queries, their keys, a queue with keys of the batch's own images and absent ones, image ids,
    and which keys of the queue do not count (B, K)."""
    ids, queue_ids = torch.arange(b), torch.arange(k) % 9 - 1
    there = torch.arange(k) % 6 != 5 if present else None
    q, own, keys = units(b, d), units(b, d), units(k, d)
    queue = Queue(keys, queue_ids, 4, present=there, tags=tag_rows(k))
    hidden = ids[:, None] == queue_ids
    if present:
        hidden = hidden | ~there
    return q.requires_grad_(), own, queue, ids, hidden


# --------------------------------------------------------------------------------------------------
# The equations

def embed_loops(encoder, head, x):
    """f(x) of the paper: an encoder's feature, Linear, ReLU, Linear, unit norm; number by number in
    float64."""
    out = []
    for feature in encoder(*x).double():
        w1, b1, w2, b2 = (head[n].get_parameter(p).double()
                          for n in (0, 2) for p in ("weight", "bias"))
        h = [max(0.0, sum(w * f for w, f in zip(row, feature.tolist())) + b)
             for row, b in zip(w1.tolist(), b1.tolist())]
        z = [sum(w * f for w, f in zip(row, h)) + b for row, b in zip(w2.tolist(), b2.tolist())]
        out.append([v / math.sqrt(sum(u * u for u in z)) for v in z])
    return torch.tensor(out)


def check_embedding(method, side, space, key):
    """Query views through the student, key views through the copy, each space with its own head."""
    model, batch = make_model().eval(), make_batch(b=3)
    m = "_m" if method == "keys" else ""
    with torch.no_grad():
        x = (batch[key],) if side == "vision" else (batch[key], batch[key + "_mask"])
        head = getattr(model, f"{side}_heads{m}")[space]
        wanted = embed_loops(getattr(model, side + m), head, x)
        close(getattr(model, method)(batch)[side][space], wanted)


def test_mct_eq1():
    check_embedding("queries", "vision", "intra", "image")


def test_mct_eq2():
    check_embedding("keys", "vision", "intra", "image_key")


def test_mct_eq6():
    check_embedding("queries", "text", "intra", "text")


def test_mct_eq7():
    check_embedding("keys", "text", "intra", "text_key")


def test_mct_eq9():
    check_embedding("queries", "vision", "inter", "image")


def test_mct_eq10():
    check_embedding("keys", "text", "inter", "text_key")


def test_mct_eq12():
    check_embedding("queries", "text", "inter", "text")


def test_mct_eq13():
    check_embedding("keys", "vision", "inter", "image_key")


def nce_loops(q, k, keys, hidden, positives=None, tau=TAU):
    """Eq. 3 (positives None), Eq. 5."""
    rows = []
    for j in range(len(q)):
        s = [q[j] @ x / tau for x in (k[j], *keys)]
        keep = [True] + [not h for h in hidden[j].tolist()]
        total = sum(s_.exp() for s_, ok in zip(s, keep) if ok)
        p = [0]
        if positives is not None:
            p += [n + 1 for n in range(len(keys)) if positives[j, n] and keep[n + 1]]
        rows.append(-sum((s[n].exp() / total).log() for n in p) / len(p))
    return torch.stack(rows)


def hinge_loops(q, k, keys, hidden, margin=ALPHA):
    """Eq. 11, 14."""
    rows = []
    for j in range(len(q)):
        terms = [margin - q[j] @ k[j] + q[j] @ x for x, h in zip(keys, hidden[j]) if not h]
        rows.append(sum(term.clamp(min=0) for term in terms))
    return torch.stack(rows)


def overlap_loops(tags, queue_tags, eps=EPS):
    """Eq. 4: (B, K) bool."""
    return torch.tensor([[len({t for t in a if t >= 0} & set(b)) > eps for b in queue_tags.tolist()]
                         for a in tags.tolist()])


def same_gradients(rows, wanted, q):
    """Of a weighted sum, so that no row can stand for another."""
    weight = torch.randn(len(q), dtype=torch.float64)
    ours, = torch.autograd.grad((weight * rows).sum(), q)
    theirs, = torch.autograd.grad((weight * wanted).sum(), q)
    close(ours, theirs)


def test_mct_eq3():
    q, k, queue, ids, hidden = problem()
    wanted = nce_loops(q, k, queue.keys, hidden)
    rows = info_nce(q, k, queue, ids, TAU)
    close(rows, wanted)
    same_gradients(rows, wanted, q)
    assert torch.autograd.gradcheck(lambda x: QueueLSE.apply(x, queue, ids, TAU), q)
    assert torch.autograd.gradcheck(lambda x: info_nce(x, k, queue, ids, TAU), q)


test_mct_eq8 = test_mct_eq3  # the same loss, on captions


def test_mct_eq4():
    q, k, queue, ids, hidden = problem(present=False)
    tags = tag_rows(5)
    shared = overlap_loops(tags, queue.tags)
    assert shared.any() and not shared.all()
    positives = shared & ~hidden
    mean_key, number = tag_positives(k, queue, ids, tags, EPS, 20)
    assert number.tolist() == [1 + n for n in positives.sum(1).tolist()]
    for j, row in enumerate(positives):
        close(mean_key[j], torch.stack([k[j], *queue.keys[row]]).mean(0))

    # eps = 2 is strict
    queue = Queue(units(2, 6), torch.tensor([-1, -1]), 4,
                  tags=torch.tensor([[2, 1, -1], [1, 2, 3]]))
    tags, ids = torch.tensor([[1, 2, -1]]), torch.tensor([0])
    assert tag_positives(k[:1], queue, ids, tags, 2, 20)[1].tolist() == [1]
    assert tag_positives(k[:1], queue, ids, tags, 1, 20)[1].tolist() == [3]


def test_mct_eq5():
    q, k, queue, ids, hidden = problem(present=False)
    tags = tag_rows(5)
    wanted = nce_loops(q, k, queue.keys, hidden, overlap_loops(tags, queue.tags))
    j_ii = info_nce(q, k, queue, ids, TAU)
    mean_key, _ = tag_positives(k, queue, ids, tags, EPS, 20)
    rows = tag_nce(j_ii, q, k, mean_key, TAU)
    close(rows, wanted)
    same_gradients(rows, wanted, q)

    # "degenerates to J_ii" where nobody shares tags
    alone, _ = tag_positives(k, queue, ids, tags, 99, 20)
    close(tag_nce(j_ii, q, k, alone, TAU), j_ii)


def test_mct_eq11():
    q, k, queue, ids, hidden = problem()
    wanted = hinge_loops(q, k, queue.keys, hidden)
    rows = hinge(q, k, queue, ids, ALPHA)
    close(rows, wanted)
    same_gradients(rows, wanted, q)

    # by both of its inputs, q and q.k+
    own = (q * k).sum(-1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: QueueHinge.apply(x, s, queue, ids, ALPHA),
                                    (q, own))


test_mct_eq14 = test_mct_eq11


def test_mct_training_calls_the_equations():
    """The functions that bear the paper's numbers, and no copies of them."""
    names = ("info_nce", "tag_positives", "tag_nce", "hinge")
    with mock.patch.multiple(mct, **{n: mock.Mock(wraps=getattr(mct, n)) for n in names}):
        make_model()(make_batch())
        assert [getattr(mct, n).call_count for n in names] == [2, 1, 1, 2]


def test_mct_rows_without_a_negative_or_without_a_modality():
    """All queue entries the own image or absent: loss 0, gradient finite; no caption and no tag in
    a batch: gradients all there, 0."""
    q, k, ids = units(2, 6).requires_grad_(), units(2, 6), torch.tensor([3, 3])
    queue = Queue(units(4, 6), torch.full((4,), 3), 4)
    rows = info_nce(q, k, queue, ids, TAU)
    close(rows, torch.zeros(2))
    assert torch.isfinite(torch.autograd.grad(rows.sum(), q)[0]).all()
    assert hinge(q, k, queue, ids, ALPHA).tolist() == [0, 0]

    model, batch = make_model(), make_batch()
    batch |= {"text_valid": torch.zeros(6, dtype=torch.long), "tags": torch.full((6, 6), -1)}
    out = model(batch)
    out["loss"].backward()
    logs = out["logs"]
    assert logs["cc"] == logs["ic"] == logs["ci"] == logs["tag"] == 0 < logs["ii"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.text.parameters())
    model.after_backward(out)
    assert not model.queue_captioned[:6].any() and model.queue_captioned[6:].sum() == 12
    assert (model.queue_tags[:6] == -1).all()


def test_mct_low_precision():
    """bf16 queries: the scores are made in float32 under autocast."""
    q, k, queue, ids, hidden = problem()
    queue = queue._replace(keys=queue.keys.float())
    q, k = q.detach().float(), k.float()
    with torch.autocast("cpu", torch.bfloat16):
        rows, margins = info_nce(q, k, queue, ids, TAU), hinge(q, k, queue, ids, ALPHA)
        close(vse_loss(q, k, ids, ALPHA), vse_loops(q.double(), k.double(), ids, ALPHA), 1e-5)
    close(rows, nce_loops(q.double(), k.double(), queue.keys.double(), hidden), 1e-4)
    close(margins, hinge_loops(q.double(), k.double(), queue.keys.double(), hidden), 1e-4)

    tagger, batch = make_model("tagging").eval(), make_batch("tagging")
    tagger.tag_vectors.copy_(units(*tagger.tag_vectors.shape))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with mock.patch.object(tagger, "embed_tags", lambda batch: q):
            tagger.tag_vectors = units(20, 6, dtype=torch.float32)
            close(tagger.tag_scores(batch), q.double() @ tagger.tag_vectors.double().T, 1e-6)


def test_mct_gradients_are_once_differentiable():
    """Backward is written by hand: a second derivative is an error and not a wrong number."""
    q, k, queue, ids, _ = problem()
    for rows in (info_nce(q, k, queue, ids, TAU), hinge(q, k, queue, ids, ALPHA)):
        first, = torch.autograd.grad(rows.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


# --------------------------------------------------------------------------------------------------
# A step by hand. The towers again, in float64, from the numbers of a state dict alone

def numbers(model):
    """{name: float64 copy} of all weights and buffers; those that are trained want gradients."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().clone().double().requires_grad_(name in trained)
            for name, value in model.state_dict().items()}


def same_step(out, wanted, model, state, tol=1e-4):
    """Loss and the gradients of all trained weights, ours in float32 and those by hand."""
    close(out["loss"], wanted.detach(), tol)
    out["loss"].backward()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(wanted, [state[name] for name in names])
    largest = max(g.abs().max() for g in gradients)
    for name, gradient in zip(names, gradients):
        assert gradient.any(), f"{name} gets no gradient: nothing is compared"
        close(model.get_parameter(name).grad / largest, gradient / largest, tol)


def linear(state, name, x):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def mlp_by_hand(state, name, x):
    return linear(state, name + ".2", linear(state, name + ".0", x).clamp(min=0))


def batch_norm(state, name, x, groups):
    """Groups n, n + groups, ... apart; groups = 0: by the running averages."""
    weight, bias = state[name + ".weight"], state[name + ".bias"]
    parts = [None] * len(x)
    for g in range(max(1, groups)):
        part = x[g::groups] if groups else x
        mean, var = part.mean((0, 2, 3)), part.var((0, 2, 3), unbiased=False)
        if not groups:
            mean, var = state[name + ".running_mean"], state[name + ".running_var"]
        y = (part - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        parts[g::max(1, groups)] = y * weight[:, None, None] + bias[:, None, None]
    return torch.stack(parts)


def conv(state, name, x, stride=1, padding=0):
    return F.conv2d(x, state[name + ".weight"], state.get(name + ".bias"), stride, padding)


def basic_block(state, name, x, groups, stride):
    y = batch_norm(state, name + ".bn1", conv(state, name + ".conv1", x, stride, 1), groups)
    y = batch_norm(state, name + ".bn2", conv(state, name + ".conv2", y.relu(), 1, 1), groups)
    if name + ".downsample.0.weight" in state:
        x = conv(state, name + ".downsample.0", x, stride)
        x = batch_norm(state, name + ".downsample.1", x, groups)
    return (x + y).relu()


def resnet_by_hand(state, name, x, groups=1, stages=4):
    """The small ResNet of these tests: the maps of its stages, strides 4, 8, 16 and 32."""
    x = batch_norm(state, name + "bn1", conv(state, name + "conv1", x, 2, 1), groups)
    maps = [F.max_pool2d(x.relu(), 3, 2, 1)]
    for n in range(1, stages + 1):
        maps.append(basic_block(state, f"{name}layer{n}.0", maps[-1], groups, 2 if n > 1 else 1))
    return maps[1:]


def features_by_hand(state, name, x, groups=1):
    return resnet_by_hand(state, name, x.double(), groups)[-1].mean((2, 3))


def layer_norm(state, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-12).sqrt() * state[name + ".weight"] + state[name + ".bias"]


def bert_by_hand(state, name, text, mask, heads=3, drop=lambda x: x):
    """BERT's pooled output, sentence by sentence and head by head, with gelu. drop: what dropout
    does, in BERT's three places."""
    rows, layers = [], 1 + max(int(n.split(".")[2]) for n in state if n.startswith(name + "blocks"))
    for ids, real in zip(text, mask.bool()):
        x = state[name + "embeddings.words.weight"][ids]
        x = x + state[name + "embeddings.positions.weight"][:len(ids)]
        x = x + state[name + "embeddings.segments.weight"][0]
        x = drop(layer_norm(state, name + "embeddings.norm", x))
        for n in range(layers):
            block, looks = f"{name}blocks.{n}.", []
            width = x.shape[1] // heads
            query, key, value = linear(state, block + "attention.qkv", x).split(x.shape[1], 1)
            for h in range(0, x.shape[1], width):
                scores = query[:, h:h + width] @ key[:, h:h + width].T / math.sqrt(width)
                chances = scores.masked_fill(~real, -torch.inf).softmax(-1)
                looks.append(drop(chances) @ value[:, h:h + width])
            y = linear(state, block + "attention.out", torch.cat(looks, 1))
            x = layer_norm(state, block + "attention_norm", x + drop(y))
            y = linear(state, block + "mlp.0", x)
            y = linear(state, block + "mlp.2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
            x = layer_norm(state, block + "mlp_norm", x + drop(y))
        rows.append(linear(state, name + "pooler", x[0]).tanh())
    return torch.stack(rows)


# all numbers away from their defaults, all weights of losses different
ODD = dict(act="gelu", tau=0.11, margin=0.3, tag_eps=1, lambda_ii=0.7, lambda_tag=0.6,
           lambda_cc=1.3, lambda_ic=0.05, lambda_ci=0.09, momentum=0.85, bn_groups=2, text_layers=2)


def test_mct_eq15():
    """A step of pre-training: loss, all gradients, what is queued, what the copies become."""
    model, batch = make_model(**ODD), make_batch()
    batch["image_id"] += 3                                      # ids 3 to 8; the queue has 0 to 9
    model.ptr.fill_(18)                                         # of 21: the keys wrap round
    state, queue = numbers(model), dict(model.state_dict(keep_vars=False))
    queue = {name: value.clone() for name, value in queue.items() if name.startswith("queue")}
    torch.manual_seed(3)
    out = model(batch)

    # queries through the students, shuffled key pictures and key captions through the copies
    torch.manual_seed(3)
    order = torch.randperm(6)
    pictures = {"": features_by_hand(state, "vision.", batch["image"], 2),
                "_m": torch.empty(6, 32, dtype=torch.float64)}
    pictures["_m"][order] = features_by_hand(state, "vision_m.", batch["image_key"][order], 2)
    captions = {"": bert_by_hand(state, "text.", batch["text"], batch["text_mask"]),
                "_m": bert_by_hand(state, "text_m.", batch["text_key"], batch["text_key_mask"])}
    z = {(side, space, m): unit(mlp_by_hand(state, f"{side}_heads{m}.{space}", x))
         for side, both in (("vision", pictures), ("text", captions)) for m, x in both.items()
         for space in ("intra", "inter")}

    # which keys count, for whom
    hidden = batch["image_id"][:, None] == queue["queue_ids"]
    silent = hidden | ~queue["queue_captioned"]
    positives = overlap_loops(batch["tags"], queue["queue_tags"], eps=1)
    has_text, has_tags = batch["text_valid"].double(), (batch["tags"] >= 0).any(1).double()
    keys = {name.removeprefix("queue_"): value.double() for name, value in queue.items()}
    pair = z["vision", "intra", ""], z["vision", "intra", "_m"], keys["vision_intra"], hidden
    rows = {
        "ii": nce_loops(*pair, tau=0.11), "tag": has_tags * nce_loops(*pair, positives, tau=0.11),
        "cc": has_text * nce_loops(z["text", "intra", ""], z["text", "intra", "_m"],
                                   keys["text_intra"], silent, tau=0.11),
        "ic": has_text * hinge_loops(z["vision", "inter", ""], z["text", "inter", "_m"],
                                     keys["text_inter"], silent, 0.3),
        "ci": has_text * hinge_loops(z["text", "inter", ""], z["vision", "inter", "_m"],
                                     keys["vision_inter"], hidden, 0.3)}
    wanted = sum(weight * rows[name].mean() for name, weight in (
        ("ii", 0.7), ("tag", 0.6), ("cc", 1.3), ("ic", 0.05), ("ci", 0.09)))

    # every loss is alive, and something is left out of each
    counted = (positives & ~hidden).sum(1)
    assert hidden.any() and (silent != hidden).any() and 0 < has_text.sum() < 6 > has_tags.sum()
    assert counted.max() > 1 and (positives & hidden).any()
    assert all((row > 0).sum() > 3 for row in rows.values())
    for name, row in rows.items():
        close(out["logs"][name], row.mean().detach(), 1e-4)
    close(out["logs"]["positives"], 1 + counted.double().mean())
    close(out["logs"]["paraphrased"], 4 / 6)                    # 0 has a copy, 1 no caption
    same_step(out, wanted, model, state)

    # the queues, from place 18 round to 2
    model.after_backward(out)
    places = [18, 19, 20, 0, 1, 2]
    for side, space in (("vision", "intra"), ("vision", "inter"), ("text", "intra"),
                        ("text", "inter")):
        name = f"queue_{side}_{space}"
        queue[name][places] = z[side, space, "_m"].float()
        close(getattr(model, name), queue[name], 1e-4)
    for name, new in (("queue_ids", batch["image_id"]), ("queue_captioned", has_text.bool()),
                      ("queue_tags", batch["tags"])):
        queue[name][places] = new
        assert torch.equal(getattr(model, name), queue[name]), name
    assert model.ptr == 3

    # the copies follow what the optimizer has made of the students
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) if p.requires_grad else 0.0)
    model.after_step(1, 10)
    for name, p in model.named_parameters():
        side, _, rest = name.partition(".")
        if side.endswith("_m"):
            student = model.get_parameter(f"{side[:-2]}.{rest}")
            close(p, 0.85 * state[name] + 0.15 * student.double(), 1e-5)
            assert p.grad is None


@pytest.mark.parametrize("picture", [False, True])
def test_mct_linear_by_hand(picture):
    """Cross-entropy of stored features, or of the frozen ResNet's by its running averages."""
    model, batch = make_model("linear"), make_batch("linear")
    if picture:
        del batch["features"]
        batch["image"] = torch.randn(6, 3, 32, 32)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, std=0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = numbers(model)
    x = features_by_hand(state, "vision.", batch["image"], 0) if picture else batch["features"]
    logits = linear(state, "fc", x.double())
    close(model.predict(batch).detach(), logits.detach())
    chances = logits.exp() / logits.exp().sum(1, keepdim=True)
    wanted = -sum(row[label].log() for row, label in zip(chances, batch["label"])) / 6
    same_step(model(batch), wanted, model, state)


def vse_loops(im, tx, ids, margin):
    """VSE++: the hardest caption of each image and the hardest image of each caption."""
    total = 0.0
    for i in range(len(im)):
        others = [j for j in range(len(im)) if ids[j] != ids[i]]
        own = im[i] @ tx[i]
        total += (margin - own + max(im[i] @ tx[j] for j in others)).clamp(min=0)
        total += (margin - own + max(im[j] @ tx[i] for j in others)).clamp(min=0)
    return total


def gru_by_hand(state, ids, length):
    """h_t = (1 - u) n + u h_{t-1}, after `length` tokens; torch's order of gates r, u, n."""
    h = torch.zeros(18, dtype=torch.float64)
    for x in state["words.weight"][ids[:length]]:
        from_word = state["gru.weight_ih_l0"] @ x + state["gru.bias_ih_l0"]
        from_state = state["gru.weight_hh_l0"] @ h + state["gru.bias_hh_l0"]
        r, u = (from_word + from_state)[:36].sigmoid().split(18)
        n = (from_word[36:] + r * from_state[36:]).tanh()
        h = (1 - u) * n + u * h
    return h


def test_mct_retrieval_gru_by_hand():
    model, batch = make_model("retrieval_gru", margin=0.37), make_batch("retrieval_gru")
    batch["image_id"] = torch.tensor([4, 4, 5, 6, 7, 8])
    lengths = [9, 7, 5, 5, 4, 1]
    for row, length in zip(batch["text_mask"], lengths):
        row[length:] = 0
    state = numbers(model)
    im = unit(linear(state, "image_fc", batch["features"].double()))
    tx = torch.stack([gru_by_hand(state, t, n) for t, n in zip(batch["text"], lengths)])
    close(model.encode_image(batch).detach(), im.detach())
    close(model.encode_text(batch).detach(), unit(tx).detach())
    same_step(model(batch), vse_loops(im, unit(tx), batch["image_id"], 0.37), model, state)


def test_mct_tagging_by_hand():
    """1 - cosine with the direction of the sum of the tags' vectors, mean over images with tags;
    scores are cosines with each tag's vector."""
    model, batch = make_model("tagging"), make_batch("tagging")
    model.tag_vectors.copy_(units(*model.tag_vectors.shape))
    state, rows = numbers(model), []
    x = unit(mlp_by_hand(state, "tag_mlp", batch["features"].double()))
    for picture, tags in zip(x, batch["tags"].tolist()):
        known = [state["tag_vectors"][tag] for tag in tags if tag >= 0]
        if known:
            rows.append(1 - picture @ unit(sum(known)))
    assert len(rows) == 5
    close(model.tag_scores(batch).detach(), (x @ state["tag_vectors"].T).detach())
    same_step(model(batch), sum(rows) / len(rows), model, state)


def test_mct_tag_supervised_by_hand():
    """Binary cross-entropy, summed over tags: tag t is column t, higher is likelier."""
    model, batch = make_model("tag_supervised"), make_batch("tag_supervised")
    close(model.fc.bias.detach().sigmoid(), torch.full((20,), 1 / 21))  # odds 1 to 20
    with torch.no_grad():
        model.fc.weight.add_(torch.randn_like(model.fc.weight))
    state, total = numbers(model), 0.0
    logits = linear(state, "fc", features_by_hand(state, "vision.", batch["image"]))
    for row, tags in zip(logits.sigmoid(), batch["tags"].tolist()):
        for tag in range(20):
            total = total - (row[tag] if tag in tags else 1 - row[tag]).log()
    close(model.tag_scores(batch).detach(), logits.detach())
    same_step(model(batch), total / 6, model, state)


# -- detectors

def overlap(a, b):
    """IoU of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def offsets(box, start, weights):
    """What a detector learns: centre and log of size of a box, seen from `start`."""
    w, h = start[2] - start[0], start[3] - start[1]
    width, height = box[2] - box[0], box[3] - box[1]
    dx = (box[0] + box[2] - start[0] - start[2]) / 2 / w
    dy = (box[1] + box[3] - start[1] - start[3]) / 2 / h
    out = dx, dy, math.log(width / w), math.log(height / h)
    return torch.tensor([weight * x for weight, x in zip(weights, out)])


def smooth_l1(x):
    """Quadratic within 1/9."""
    x = x.abs()
    return torch.where(x < 1 / 9, 4.5 * x * x, x - 0.5 / 9).sum()


def anchors_by_hand(size, stride, sides):
    """Boxes around the corner of each cell, tall to wide within a side."""
    boxes = []
    for y in range(size):
        for x in range(size):
            for ratio in (0.5, 1.0, 2.0):
                for side in sides:
                    w, h = round(side / math.sqrt(ratio) / 2), round(side * math.sqrt(ratio) / 2)
                    boxes.append([x * stride - w, y * stride - h, x * stride + w, y * stride + h])
    return boxes


def rpn_by_hand(state, maps, strides, sides, truths):
    """Objectness and boxes of all anchors, over all pictures -> two losses."""
    logits, deltas, anchors = [[], []], [[], []], []
    for x, stride, own in zip(maps, strides, sides):
        anchors += anchors_by_hand(x.shape[-1], stride, own)
        x = conv(state, "detector.rpn.head.conv.0.0", x, 1, 1).relu()
        for head, out, n in (("cls_logits", logits, 1), ("bbox_pred", deltas, 4)):
            y = conv(state, "detector.rpn.head." + head, x)     # (B, A n, H, W)
            for i in range(2):
                out[i].append(y[i].permute(1, 2, 0).reshape(-1, n))

    number, objectness, distance = 0, 0.0, 0.0
    for i, truth in enumerate(truths):
        chance, delta = torch.cat(logits[i])[:, 0].sigmoid(), torch.cat(deltas[i])
        quality = torch.tensor([[overlap(box, anchor) for anchor in anchors] for box in truth])
        best, which = quality.max(0)
        found = best >= 0.7                                     # or the best of its box
        found |= (quality == quality.max(1, keepdim=True)[0]).any(0)
        assert 0 < found.sum() < 60
        number += int((found | (best < 0.3)).sum())
        objectness = objectness - chance[found].log().sum()
        objectness = objectness - (1 - chance[~found & (best < 0.3)]).log().sum()
        for n in found.nonzero()[:, 0].tolist():
            goal = offsets(truth[which[n]], anchors[n], (1, 1, 1, 1))
            distance = distance + smooth_l1(delta[n] - goal)
    return objectness / number, distance / number


def take_all(labels):
    """In the place of the random choice of 256 anchors or `rois` proposals."""
    return [(x >= 1).byte() for x in labels], [(x == 0).byte() for x in labels]


def detector_step(task):
    """A detector in training, proposals in place of the RPN's random ones, and its losses by hand
    up to the RoI heads -> (model, batch, state, {name: loss}, feature maps, proposals, truths)."""
    model = make_model(task, detect_sizes=(128,), detect_max=200)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rpn" in name or "predictor" in name:
                p.add_(torch.randn_like(p) * 0.03)
    batch = make_batch(task, b=2)
    batch["image"] = [x[:, :, :64] for x in batch["image"]]     # 64 x 64, shown at 128 x 128
    batch["masks"] = [x[:, :, :64] for x in batch.get("masks", [])]
    if task == "detection":
        del batch["masks"]
    batch["labels"] = [torch.tensor([0, 2]), torch.tensor([4, 1])]
    state = numbers(model)

    # what is random, handed in
    heads, rpn = model.detector.roi_heads, model.detector.rpn
    given = [[10.0, 12.0, 84.0, 66.0], [30.0, 50.0, 108.0, 128.0], [0.0, 0.0, 40.0, 40.0],
             [2.0, 3.0, 120.0, 118.0], [44.0, 40.0, 96.0, 114.0]]
    rpn.fg_bg_sampler = heads.fg_bg_sampler = take_all
    rpn.filter_proposals = lambda *_: ([torch.tensor(given)] * 2, None)
    truths = [(box * 2).tolist() for box in batch["boxes"]]
    proposals = [given + truth for truth in truths]

    # red, green, blue as in ImageNet, twice as large
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.stack(batch["image"]) - mean[:, None, None]) / std[:, None, None]
    x = F.interpolate(x, size=(128, 128), mode="bilinear").double()
    if task == "detection":
        maps = resnet_by_hand(state, "detector.backbone.", x, stages=3)[2:]
        strides, sides = [16], [small().anchors]
    else:
        maps = pyramid(state, resnet_by_hand(state, "detector.backbone.body.", x))
        strides, sides = [4, 8, 16, 32, 64], [[side] for side in small().anchors]
    objectness, boxes = rpn_by_hand(state, maps, strides, sides, truths)
    losses = {"objectness": objectness, "rpn_box_reg": boxes}
    return model, batch, state, losses, maps, proposals, truths


def pyramid(state, maps):
    """Each stage plus the one above, twice as large; a fifth level, every second place."""
    name, out, above = "detector.backbone.fpn.", [], None
    for n in (3, 2, 1, 0):
        x = conv(state, f"{name}inner_blocks.{n}.0", maps[n])
        x = batch_norm(state, f"{name}inner_blocks.{n}.1", x, 1)
        above = x if above is None else x + F.interpolate(above, scale_factor=2)
        x = conv(state, f"{name}layer_blocks.{n}.0", above, 1, 1)
        out.insert(0, batch_norm(state, f"{name}layer_blocks.{n}.1", x, 1))
    return out + [out[-1][:, :, ::2, ::2]]


def matches(proposals, truths, labels):
    """-> rows (picture, box, class from 1 or 0, its true box or None), half an overlap counts."""
    rows = []
    for i, boxes in enumerate(proposals):
        for box in boxes:
            quality = [overlap(box, truth) for truth in truths[i]]
            n = quality.index(max(quality))
            good = quality[n] >= 0.5
            rows.append((i, box, int(labels[i][n]) + 1 if good else 0, n if good else None))
    assert 0 < sum(row[2] > 0 for row in rows) < len(rows)
    return rows


def box_losses(state, x, rows, truths):
    """Cross-entropy over classes and background; offsets of the true class, by 10, 10, 5, 5."""
    name, total, distance = "detector.roi_heads.box_predictor.", 0.0, 0.0
    logits, deltas = linear(state, name + "cls_score", x), linear(state, name + "bbox_pred", x)
    for (i, box, label, n), row, delta in zip(rows, logits.log_softmax(-1), deltas):
        total = total - row[label]
        if label:
            goal = offsets(truths[i][n], box, (10, 10, 5, 5))
            distance = distance + smooth_l1(delta[4 * label:4 * label + 4] - goal)
    return {"classifier": total / len(rows), "box_reg": distance / len(rows)}


def crops(maps, rows, size, of_level):
    """RoIAlign: as many samples a bin as it has places, from the level that fits the box."""
    out = []
    for i, box, *_ in rows:
        level = of_level(box)
        roi = torch.tensor([[i, *box]], dtype=torch.float64)
        out.append(torchvision.ops.roi_align(maps[level], roi, size, maps[level].shape[-1] / 128))
    return torch.cat(out)


def test_mct_detection_by_hand():
    """R50-C4: 14 x 14 places of conv4, then conv5 and MoCo's norm."""
    model, batch, state, losses, maps, proposals, truths = detector_step("detection")
    rows = matches(proposals, truths, batch["labels"])
    x = crops(maps, rows, 14, lambda box: 0)
    x = basic_block(state, "detector.roi_heads.box_head.layer4.0", x, 1, 2)
    x = batch_norm(state, "detector.roi_heads.box_head.norm", x, 1).mean((2, 3))
    losses |= box_losses(state, x, rows, truths)
    out = model(batch)
    for name, loss in losses.items():
        close(out["logs"][name], loss.detach(), 1e-4)
    assert out["logs"].keys() == losses.keys()
    same_step(out, sum(losses.values()), model, state, 1e-3)


def test_mct_segmentation_by_hand():
    """R50-FPN: boxes from 7 x 7 places, masks from 14 x 14, of the level by the size of the box."""
    model, batch, state, losses, maps, proposals, truths = detector_step("segmentation")
    rows, name = matches(proposals, truths, batch["labels"]), "detector.roi_heads."

    def level(box):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        return max(2, math.floor(4 + math.log2(side / 224))) - 2

    assert {level(row[1]) for row in rows} == {0, 1}
    x = crops(maps, rows, 7, level).flatten(1)
    x = linear(state, name + "box_head.fc6", x).relu()
    x = linear(state, name + "box_head.fc7", x).relu()
    losses |= box_losses(state, x, rows, truths)

    # masks of the proposals that have found an object, of its class
    found = [row for row in rows if row[2]]
    x = crops(maps, found, 14, level)
    for n in range(4):
        x = conv(state, f"{name}mask_head.{n}.0", x, 1, 1).relu()
    part = name + "mask_predictor."
    x = F.conv_transpose2d(x, state[part + "conv5_mask.weight"], state[part + "conv5_mask.bias"], 2)
    x = conv(state, part + "mask_fcn_logits", x.relu())
    total = 0.0
    for (i, box, label, n), logits in zip(found, x):
        mask = F.interpolate(batch["masks"][i][None, n:n + 1].double(), size=(128, 128))
        roi = torch.tensor([[0, *box]], dtype=torch.float64)
        goal = torchvision.ops.roi_align(mask, roi, 28)[0, 0]
        chance = logits[label].sigmoid()
        total = total - (goal * chance.log() + (1 - goal) * (1 - chance).log()).mean()
    losses["mask"] = total / len(found)

    out = model(batch)
    for name, loss in losses.items():
        close(out["logs"][name], loss.detach(), 1e-4)
    assert out["logs"].keys() == losses.keys()
    same_step(out, sum(losses.values()), model, state, 1e-3)


# --------------------------------------------------------------------------------------------------
# Every setting matters

@functools.cache
def unchanged(what, task, **base):
    """The same at the settings of these tests, once for all fields."""
    first = changed(what, task, base)
    assert first == changed(what, task, base), "other numbers without any change"
    return first


def changed(what, task, over):
    """One number or list that a setting should move."""
    torch.manual_seed(0)
    model = make_model(task, **over)
    if what == "size":
        return sum(p.numel() for p in model.parameters())
    if what == "memory":
        return {name: x.shape for name, x in model.named_buffers() if "queue" in name}
    if what == "spread":
        return round(Mct(small(**over), task, 20).text.pooler.weight.std().item(), 2)
    if what == "rates":
        return [group["lr"] for group in model.param_groups(mock.Mock(lr=1.0, weight_decay=0.1))]
    if what == "copies":
        model.after_step(1, 10)
        return model.vision_m.conv1.weight.sum().item()

    # what needs a batch
    torch.manual_seed(1)
    batch = make_batch(task, b=2 if task in ("detection", "segmentation") else 6)
    if what == "padding":                                       # words 0 and 7 stand in a caption
        batch["text"][0, :2] = torch.tensor([0, 7])
        model(batch)["loss"].backward()
        return [bool(model.text.embeddings.words.weight.grad[word].any()) for word in (0, 7)]
    if what == "found":
        model.detector.roi_heads.box_predictor.cls_score.bias.data[3] = 3.0
        return [len(objects["boxes"]) for objects in model.eval().detect(batch)]
    return model(batch)["loss"].item()


# field: the task where it counts, other values, and what they move
SETTINGS = {
    "block": ("linear", dict(block="bottleneck"), "size"),
    "layers": ("linear", dict(layers=(1, 2, 1, 1)), "size"),
    "stem": ("linear", dict(stem="imagenet"), "size"),
    "vision_width": ("linear", dict(vision_width=6), "size"),
    "width": ("pretrain", dict(width=30), "size"),
    "text_layers": ("pretrain", dict(text_layers=2), "size"),
    "text_heads": ("pretrain", dict(text_heads=2), "loss"),
    "mlp_ratio": ("pretrain", dict(mlp_ratio=3), "size"),
    "act": ("pretrain", dict(act="gelu"), "loss"),
    "dropout": ("pretrain", dict(dropout=0.3), "loss"),
    "init_std": ("pretrain", dict(init_std=0.3), "spread"),
    "positions": ("pretrain", dict(positions=16), "size"),
    "vocab_size": ("retrieval_gru", dict(vocab_size=60), "size"),
    "pad_id": ("pretrain", dict(pad_id=7), "padding"),
    "heads": ("pretrain", dict(heads="unified", intra_dim=14), "size"),
    "head_hidden": ("pretrain", dict(head_hidden=21), "size"),
    "intra_dim": ("pretrain", dict(intra_dim=17), "size"),
    "inter_dim": ("pretrain", dict(inter_dim=17), "size"),
    "queue_size": ("pretrain", dict(queue_size=22, lambda_tag=0.0, fill=False), "memory"),
    "momentum": ("pretrain", dict(momentum=0.8), "copies"),
    "tau": ("pretrain", dict(tau=0.1), "loss"),
    "margin": ("retrieval_gru", dict(margin=0.3), "loss"),
    "tag_eps": ("pretrain", dict(tag_eps=0), "loss"),
    "lambda_ii": ("pretrain", dict(lambda_ii=0.5), "loss"),
    "lambda_tag": ("pretrain", dict(lambda_tag=0.5), "loss"),
    "lambda_cc": ("pretrain", dict(lambda_cc=0.5), "loss"),
    "lambda_ic": ("pretrain", dict(lambda_ic=0.5), "loss"),
    "lambda_ci": ("pretrain", dict(lambda_ci=0.5), "loss"),
    "text_lr": ("pretrain", dict(text_lr=0.5), "rates"),
    "bn_groups": ("pretrain", dict(bn_groups=2), "loss"),
    "tag_width": ("pretrain", dict(tag_width=7, fill=False), "memory"),
    "word_dim": ("retrieval_gru", dict(word_dim=11), "size"),
    "joint_dim": ("retrieval_gru", dict(joint_dim=19), "size"),
    "tag_dim": ("tagging", dict(tag_dim=15), "size"),
    "tag_hidden": ("tagging", dict(tag_hidden=13), "size"),
    "detect_sizes": ("detection", dict(detect_sizes=(56,)), "loss"),
    "detect_max": ("detection", dict(detect_max=60), "loss"),
    "anchors": ("detection", dict(anchors=(8, 12, 24, 32, 48)), "loss"),
    "fpn_width": ("segmentation", dict(fpn_width=17), "size"),
    "rois": ("detection", dict(rois=8), "loss"),
    "proposals": ("detection", dict(proposals=(3, 20)), "loss"),
}
MEMORY_ONLY = ("checkpointing", "queue_chunk")                  # the next test
OF_DATA = ("image_size", "max_text", "tag_vocab")               # the one after it


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_mct_every_setting_matters(field):
    """A field without a row here has no test that it does anything."""
    if field in MEMORY_ONLY + OF_DATA:
        return
    assert len(SETTINGS) + 5 == len(dataclasses.fields(Config))
    task, over, what = SETTINGS[field]
    base = {name: value for name, value in over.items() if name != field}
    assert field in over
    assert unchanged(what, task, **base) != changed(what, task, over)
    if field == "proposals":                                    # its second number: evaluation
        assert max(changed("found", task, dict(proposals=(30, 3)))) == 3
        assert max(changed("found", task, {})) > 3


def saved(model, batch):
    """-> (loss, gradients, the bytes kept for backward, shapes of what is kept)."""
    shapes = []

    def keep(x):
        shapes.append((x.numel() * x.element_size(), tuple(x.shape)))
        return x

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(batch)["loss"]
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return loss, gradients, sum(size for size, _ in shapes), {shape for _, shape in shapes}


def test_mct_settings_of_memory_change_nothing_else():
    """--checkpointing keeps fewer bytes, --queue_chunk scores so many keys at a time; losses,
    gradients and dropout's masks stay."""
    batch, results = make_batch(), {}
    for over in ({}, {"checkpointing": True}, {"queue_chunk": 50}):
        torch.manual_seed(0)
        model, seen, chunks = make_model(dropout=0.2, text_layers=2, **over), [], Queue.chunks

        def count(queue, ids):
            for part in chunks(queue, ids):
                seen.append(len(part[1]))
                yield part

        with mock.patch.object(Queue, "chunks", count):
            results[tuple(over)] = saved(model, batch)
        assert set(seen) == ({21} if "queue_chunk" in over else {8, 5})

    loss, gradients, size, shapes = results[()]
    assert not {(6, 21), (6, 8), (6, 5)} & shapes, "a matrix of queries and keys is kept"
    for name, (other, others, other_size, _) in results.items():
        close(other, loss, 1e-6)
        for a, b in zip(gradients, others):
            close(a, b, 1e-5)
        if name == ("checkpointing",):
            assert torch.equal(loss, other) and other_size < 0.8 * size


class Seen(Exception):
    """Training need not go on."""


def test_mct_settings_of_data_reach_data(tmp_path, tok):
    """image_size and max_text are those of the views, tag_vocab is that of the tags' list."""
    pairs = photos(tmp_path)["pairs"]
    flags = "--image_size 40 --max_text 7 --tag_vocab 2 --workers 0 --batch_size 4".split()
    with (mock.patch.object(train.data, "Views", side_effect=Seen) as views,
          mock.patch.object(train.data, "stats", wraps=data.stats) as stats,
          pytest.raises(Seen)):
        train.main(["--model", "mct", "--data", str(pairs), "--image_root", str(tmp_path),
                    "--vocab", str(tok), "--out", str(tmp_path / "run"), *flags])
    wanted = inspect.signature(data.Views.__init__)
    asked = wanted.bind(None, *views.call_args.args, **views.call_args.kwargs).arguments
    assert (asked["image_size"], asked["max_text"]) == (40, 7)
    assert stats.call_args.kwargs["tags"] == 2 and len(asked["tag_names"]) == 2


# --------------------------------------------------------------------------------------------------
# The recipe is the paper's

# [A] the table above RECIPE, [B] BERT base, [M] MoCo's code, [D] Detectron2, [V] VSE++, [-] ours
PAPER = {
    "image_size": (224, "4.1: 224 x 224 crops"), "block": ("bottleneck", "4.1: ResNet-50"),
    "layers": ((3, 4, 6, 3), "4.1: ResNet-50"), "stem": ("imagenet", "4.1: ResNet-50"),
    "vision_width": (64, "of the small stem alone"), "width": (768, "4.1: 768-d pooled output"),
    "text_layers": (12, "B"), "text_heads": (12, "B"), "mlp_ratio": (4, "B"), "act": ("gelu", "B"),
    "dropout": (0.1, "B"), "init_std": (0.02, "B"), "max_text": (30, "-, deviation 5"),
    "positions": (512, "B"), "vocab_size": (30522, "B"), "pad_id": (0, "B"),
    "heads": ("distinct", "4.1, 4.4"), "head_hidden": (2048, "4.1"), "intra_dim": (128, "4.1"),
    "inter_dim": (1024, "4.1"), "queue_size": (32768, "4.1: COCO"), "momentum": (0.999, "4.1"),
    "tau": (0.07, "4.1"), "margin": (0.2, "4.1: alpha"), "tag_eps": (2, "4.1: epsilon"),
    "lambda_ii": (1.0, "4.1"), "lambda_tag": (1.0, "4.1: with tag"), "lambda_cc": (1.0, "4.1"),
    "lambda_ic": (1e-4, "4.1"), "lambda_ci": (1e-4, "4.1"), "text_lr": (4e-5, "4.1"),
    "bn_groups": (8, "4.1: 8 V100"), "tag_vocab": (18157, "4.1: Stock"),
    "tag_width": (0, "from the data"), "queue_chunk": (8192, "memory alone"),
    "checkpointing": (False, "memory alone"), "word_dim": (300, "4.2: retrieval"),
    "joint_dim": (1024, "4.2: retrieval"), "tag_dim": (4096, "4.3"), "tag_hidden": (2048, "4.3"),
    "detect_sizes": (tuple(range(480, 801, 32)), "D, VOC"), "detect_max": (1333, "D"),
    "anchors": ((32, 64, 128, 256, 512), "D"), "fpn_width": (256, "D"), "rois": (512, "D"),
    "proposals": ((2000, 1000), "D, C4"),
}
PAPER_RECIPE = {
    "pretrain": {"optimizer": ("sgd", "4.1"), "lr": (0.03, "4.1"), "weight_decay": (1e-4, "4.1"),
                 "schedule": ("cosine", "4.1"), "epochs": (200, "4.1: COCO"),
                 "batch_size": (512, "4.1"), "epoch_of": ("images", "?, deviation 8")},
    "linear": {"optimizer": ("sgd", "4.2"), "lr": (30.0, "4.2"), "weight_decay": (0.0, "4.2"),
               "schedule": ("step", "4.2"), "gamma": (0.2, "4.2: divided by 5"),
               "milestones": ("0.5,0.6666666,0.8333333", "4.2: epochs 30, 40, 50"),
               "epochs": (60, "4.2"), "batch_size": (256, "4.2")},
    "detection": {"optimizer": ("sgd", "D"), "lr": (0.02, "4.2"), "batch_size": (16, "4.2"),
                  "steps": (24000, "4.2"), "schedule": ("step", "4.2"),
                  "milestones": ("0.75,0.9166666", "4.2: 18K, 22K"), "weight_decay": (1e-4, "D"),
                  "warmup_steps": (100, "4.2"), "warmup_lr": (2e-5, "D: a thousandth")},
    "segmentation": {"optimizer": ("sgd", "D"), "lr": (0.02, "4.2"), "batch_size": (16, "4.2"),
                     "steps": (180000, "4.2"), "schedule": ("step", "4.2"),
                     "milestones": ("0.6666666,0.8888888", "4.2: 120K, 160K"),
                     "weight_decay": (1e-4, "D"), "warmup_steps": (1000, "D"),
                     "warmup_lr": (2e-5, "D"), "proposals": ((1000, 1000), "D, FPN"),
                     "detect_sizes": ((640, 672, 704, 736, 768, 800), "M, D")},
    "retrieval_gru": {"optimizer": ("adam", "4.2"), "lr": (2e-4, "4.2"),
                      "schedule": ("step", "4.2"), "milestones": ("0.5", "4.2: epoch 15 of 30"),
                      "gamma": (0.1, "4.2: 2e-5"), "clip": (2.0, "V"), "epochs": (30, "4.2"),
                      "epoch_of": ("captions", "4.2, V: 113K x 5"), "batch_size": (128, "4.2")},
    "tagging": {"optimizer": ("adam", "-"), "lr": (1e-3, "-"), "schedule": ("cosine", "-"),
                "epochs": (30, "-"), "batch_size": (256, "-")},
    "tag_supervised": {"optimizer": ("sgd", "-"), "lr": (0.03, "-"), "weight_decay": (1e-4, "-"),
                       "schedule": ("cosine", "-"), "epochs": (60, "-"), "batch_size": (512, "-")},
}


def test_mct_config_and_recipe_are_the_papers():
    """Each number with its source; a number without a row fails."""
    assert dataclasses.asdict(Config()) == {name: value for name, (value, _) in PAPER.items()}
    printed = {task: {name: value for name, (value, _) in rows.items()}
               for task, rows in PAPER_RECIPE.items()}
    assert mct.RECIPE == printed
    assert mct.PRESETS["base"] == {}
    assert mct.PRESETS["stock"] == dict(queue_size=65536, pretrain=dict(epochs=60))     # 4.1
    tiny = mct.PRESETS["tiny"]                                  # deviation 6
    assert tiny["lambda_ic"] * tiny["queue_size"] == pytest.approx(1e-4 * 32768)
    assert tiny["lambda_ci"] == tiny["lambda_ic"]


@pytest.mark.parametrize("task, steps, drops, factor", [
    ("linear", 60 * 5004, (30 * 5004, 40 * 5004, 50 * 5004), 0.2),
    ("detection", 24000, (18000, 22000), 0.1), ("segmentation", 180000, (120000, 160000), 0.1),
    ("retrieval_gru", 30 * 885, (15 * 885,), 0.1)])
def test_mct_rates_drop_where_the_paper_says(task, steps, drops, factor):
    loop, _ = train.settings(mct, "base", task, {})
    for n, drop in enumerate(drops):
        close(train.learning_rate(drop - 1, steps, loop) / loop.lr, factor ** n, 1e-9)
        close(train.learning_rate(drop, steps, loop) / loop.lr, factor ** (n + 1), 1e-9)
    if loop.warmup_steps:
        close(train.learning_rate(0, steps, loop), 2e-5)
        close(train.learning_rate(loop.warmup_steps // 2, steps, loop), 0.01001)


def test_mct_optimizer_and_views_are_the_papers():
    """SGD of momentum 0.9; MoCo-v2's augmentations for both views, ImageNet's colours."""
    loop, _ = train.settings(mct, "base", "pretrain", {})
    optimizer = train.make_optimizer(make_model(), loop)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]        # 4.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 4e-5]            # 4.1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}        # 4.1, M
    assert loop.crop_scale == (0.2, 1.0) and not loop.image_view                        # M
    frozen = dict(features="features", features_eval="center", norm="imagenet")         # 4.2
    assert mct.VIEWS == {
        "pretrain": dict(source="pairs", image="moco", image_eval="center", image_key="moco",
                         image_key_eval=None, text="any_caption", text_eval="caption",
                         text_key="any_paraphrase", text_key_eval=None, tags="any_tags",
                         tags_eval=None, norm="imagenet"),                              # 4.1
        "linear": dict(source="classes", label="label", **frozen),
        "detection": dict(source="detection", image="objects", norm="none"),
        "segmentation": dict(source="detection", image="masks", image_eval="objects",
                             norm="none"),
        "retrieval_gru": dict(source="pairs", text="caption", **frozen),
        "tagging": dict(source="pairs", tags="tags", tags_eval=None, **frozen),
        "tag_supervised": dict(source="pairs", image="flip", image_eval="center", tags="tags",
                               tags_eval=None, norm="imagenet")}                        # -
    assert mct.PIXELS == dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
    assert mct.EVALS == {"pretrain": ("retrieval", "probe"), "linear": ("linear",),
                         "detection": ("detection",), "segmentation": ("segmentation",),
                         "retrieval_gru": ("retrieval",), "tagging": ("tagging",),
                         "tag_supervised": ("tagging",)}


def base_model(task, classes):
    """The paper's sizes, without memory."""
    _, cfg = train.settings(mct, "base", task, {})
    with torch.device("meta"):
        return Mct(cfg, task, classes)


def test_mct_towers_have_the_papers_sizes():
    model = base_model("pretrain", 80)
    count = {name: sum(p.numel() for p in part.parameters())
             for name, part in model.named_children()}
    assert count["vision"] == count["vision_m"] == 23508032     # ResNet-50 without fc
    assert count["text"] == count["text_m"] == 109482240        # BERT base with its pooler
    heads = {space: [layer.weight.shape for layer in (head[0], head[2])]
             for space, head in model.vision_heads.items()}
    assert heads == {"intra": [(2048, 2048), (128, 2048)], "inter": [(2048, 2048), (1024, 2048)]}
    assert isinstance(model.text_heads["inter"][1], torch.nn.ReLU)
    assert [model.text_heads[space][0].in_features for space in ("intra", "inter")] == [768, 768]


def test_mct_the_pyramid_names_its_levels_by_their_size():
    """Level "0" comes of layer1 and has a quarter of the side, each further one half of that: what
    picks a level for a region (MultiScaleRoIAlign) goes by these names."""
    detector = make_model("segmentation", stem="imagenet").detector.eval()
    with torch.no_grad():
        levels = detector.backbone(torch.zeros(1, 3, 128, 128))
    sides = {name: level.shape[-1] for name, level in levels.items()}
    assert [sides[name] for name in ("0", "1", "2", "3")] == [32, 16, 8, 4]
    assert detector.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("task, classes, before, kept, pool", [
    ("detection", 20, (12000, 6000), (2000, 1000), 14),
    ("segmentation", 80, (2000, 1000), (1000, 1000), 7)])
def test_mct_detectors_have_detectron2s_numbers(task, classes, before, kept, pool):
    """Of the Faster R-CNN that torchvision and Detectron2 share."""
    detector = base_model(task, classes).detector
    rpn, heads = detector.rpn, detector.roi_heads

    def drawn(sampler):
        return sampler.batch_size_per_image, sampler.positive_fraction

    assert tuple(rpn._pre_nms_top_n.values()) == before
    assert tuple(rpn._post_nms_top_n.values()) == kept
    assert (rpn.nms_thresh, rpn.score_thresh) == (0.7, 0.0)
    assert drawn(rpn.fg_bg_sampler) == (256, 0.5) and drawn(heads.fg_bg_sampler) == (512, 0.25)
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert (heads.proposal_matcher.high_threshold, heads.score_thresh, heads.nms_thresh,
            heads.detections_per_img) == (0.5, 0.05, 0.5, 100)
    assert (heads.box_roi_pool.output_size[0], heads.box_roi_pool.sampling_ratio) == (pool, 0)
    if task == "segmentation":
        assert (heads.mask_roi_pool.output_size[0], heads.mask_roi_pool.sampling_ratio) == (14, 0)
    sizes = (((32, 64, 128, 256, 512),) if task == "detection"
             else ((32,), (64,), (128,), (256,), (512,)))
    assert rpn.anchor_generator.sizes == sizes
    assert set(rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}
    assert heads.box_predictor.cls_score.out_features == classes + 1
    assert detector.transform.min_size == train.settings(mct, "base", task, {})[1].detect_sizes
    assert detector.transform.max_size == 1333
    wide = 2048 if task == "detection" else 1024                # res5, or two layers of 1024
    assert heads.box_predictor.cls_score.in_features == wide


def test_mct_heads_start_as_detectron2s():
    """Spread 0.01 for classes, 0.001 for boxes and masks, Caffe2's uniform for the pyramid's box
    head, no biases; RPN and mask layers are as in torchvision."""
    heads = make_model("segmentation", fpn_width=64).detector.roi_heads
    first = heads.box_predictor, heads.mask_predictor, heads.box_head
    spread = {first[0].cls_score: 0.01, first[0].bbox_pred: 0.001, first[1].mask_fcn_logits: 0.001,
              first[2].fc6: math.sqrt(1 / (64 * 49)), first[2].fc7: math.sqrt(1 / 256)}
    for layer, std in spread.items():
        close(layer.weight.std() / std, 1.0, 0.1)
        assert not layer.bias.any()
    bound = math.sqrt(3 / 256)                                  # uniform, not normal
    assert 0.99 * bound < first[2].fc7.weight.max() <= bound
    assert not first[1].conv5_mask.bias.any()
    c4 = make_model("detection").detector.roi_heads.box_predictor
    close(c4.cls_score.weight.std() / 0.01, 1.0, 0.1)
    close(c4.bbox_pred.weight.std() / 0.001, 1.0, 0.1)


def test_mct_other_heads_start_as_in_their_sources():
    """MoCo's linear probe: normal 0.01, no bias; VSE++: uniform words, Xavier's image layer."""
    probe, gru = make_model("linear").fc, make_model("retrieval_gru")
    close(probe.weight.std() / 0.01, 1.0, 0.1)
    assert not probe.bias.any()
    assert 0.095 < gru.words.weight.max() <= 0.1 and -0.1 <= gru.words.weight.min() < -0.095
    bound = math.sqrt(6 / (32 + 18))
    assert 0.95 * bound < gru.image_fc.weight.max() <= bound


# --------------------------------------------------------------------------------------------------
# Memory and copies

def test_mct_enqueue_is_a_list_that_forgets():
    rings, kept = [torch.zeros(10, 2), torch.zeros(10, dtype=torch.long)], []
    ptr = torch.zeros((), dtype=torch.long)
    for n, b in enumerate((4, 4, 4, 4, 13, 3)):
        rows = torch.arange(b).float()[:, None] + 100 * n + torch.zeros(b, 2)
        enqueue_(rings, ptr, [rows, rows[:, 0].long()])
        kept = (kept + rows[:, 0].tolist())[-10:]
    start = int(ptr)
    assert rings[1].roll(-start).tolist() == kept
    assert rings[0][:, 1].roll(-start).tolist() == kept


def test_mct_queues_and_momentum():
    model, batch = make_model(fill=False), make_batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    out = model(batch)
    out["loss"].backward()
    model.after_backward(out)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    model.after_step(1, 10)
    for name, p in model.named_parameters():
        side, _, rest = name.partition(".")
        if side.endswith("_m"):
            student = f"{side[:-2]}.{rest}"
            close(p, 0.9 * before[name] + 0.1 * (before[student] + 0.1))
            assert p.grad is None

    # the queues
    assert int(model.ptr) == 6 and model.queue_ids.tolist() == [*range(6)] + [-1] * 15
    for side, keys in out["keys"].items():
        for space, z in keys.items():
            close(getattr(model, f"queue_{side}_{space}")[:6], z)
    assert torch.equal(model.queue_tags[:6], batch["tags"])
    assert model.queue_captioned[:6].tolist() == [True, False] + [True] * 4

    # evaluation enqueues nothing
    ptr = int(model.ptr)
    model.eval().encode_image(batch), model.encode_text(batch)
    assert int(model.ptr) == ptr
    model.train()
    assert model.vision_m.training and not model.text_m.training


def test_mct_reset_memory():
    """Copies equal their students; queues hold unit vectors that are no image's."""
    model = make_model()
    before = model.queue_text_inter.clone()
    model.ptr.fill_(5)
    model.reset_memory()
    for name in model.students:
        student, copied = getattr(model, name), getattr(model, name + "_m").state_dict()
        assert all(torch.equal(v, copied[n]) for n, v in student.state_dict().items())
    for side, spaces in model.spaces.items():
        for space in spaces:
            close(getattr(model, f"queue_{side}_{space}").norm(dim=-1), torch.ones(21))
    assert not torch.equal(before, model.queue_text_inter)
    assert (model.queue_ids == -1).all() and model.queue_captioned.all()
    assert (model.queue_tags == -1).all() and model.ptr == 0


def test_mct_split_batch_norm():
    """Groups are normalised apart; evaluation is plain; parameters as torchvision names them."""
    norm, plain = SplitBatchNorm(3, 2).train(), torch.nn.BatchNorm2d(3).train()
    x = torch.randn(8, 3, 5, 4) + torch.arange(8)[:, None, None, None] % 2
    y = norm(x)
    for group in (slice(0, None, 2), slice(1, None, 2)):
        close(y[group], plain(x[group]))
        plain.reset_running_stats()
    var = torch.stack([x[g::2].transpose(0, 1).flatten(1).var(1) for g in (0, 1)]).mean(0)
    close(norm.running_var, 0.9 + 0.1 * var)
    close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert norm.state_dict().keys() == plain.state_dict().keys()
    norm.eval()
    close(norm(x), F.batch_norm(x, norm.running_mean, norm.running_var, eps=1e-5))
    for groups in (4, 6):                                       # of 6: no whole groups, groups of 1
        with pytest.raises(SystemExit, match="virtual groups"):
            make_model(bn_groups=groups)(make_batch())


def test_mct_one_process_shuffles_its_keys():
    """Keys come back in their order, from other company: with two virtual groups a key's batch norm
    depends on the draw."""
    model, batch = make_model(bn_groups=2), make_batch()
    z, restore = shuffle(batch["image_key"])
    assert torch.equal(unshuffle(z, restore), batch["image_key"])

    def keys(seed):
        torch.manual_seed(seed)
        return model.keys(batch)["vision"]["intra"]

    assert any(not torch.allclose(keys(0), keys(seed), atol=1e-3) for seed in range(1, 6))
    for m in model.modules():
        if isinstance(m, SplitBatchNorm):
            m.groups = 1
    close(keys(0), keys(1))


# --------------------------------------------------------------------------------------------------
# All tasks

@pytest.mark.parametrize("task", mct.TASKS)
def test_mct_every_parameter_learns(task):
    model = make_model(task)
    if task == "tagging":
        model.tag_vectors.copy_(pmi_vectors(tag_rows(200), *model.tag_vectors.shape))
    out = model(make_batch(task, b=2 if task in ("detection", "segmentation") else 6))
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert all(v.ndim == 0 and not v.requires_grad for v in out["logs"].values())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        copied = name.split(".")[0].endswith("_m")
        frozen = model.frozen and name.startswith("vision.")
        assert p.requires_grad != (copied or frozen), name

    # each trained parameter is in one group
    loop = mock.Mock(lr=1.0, weight_decay=0.1)
    grouped = [id(p) for g in model.param_groups(loop) for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("task, methods", [
    ("pretrain", "visual_features encode_image encode_text"),
    ("linear", "visual_features predict"), ("detection", "detect"), ("segmentation", "detect"),
    ("retrieval_gru", "visual_features encode_image encode_text"),
    ("tagging", "visual_features tag_scores"), ("tag_supervised", "visual_features tag_scores")])
def test_mct_offers(task, methods):
    """Each offered method runs on a batch of its task, and the task's own evaluations are there."""
    model, batch = make_model(task).eval(), make_batch(task)
    assert model.offers == set(methods.split())
    with torch.no_grad():
        for name in model.offers:
            assert len(getattr(model, name)(batch)) == 6
    assert set(mct.EVALS[task]) <= set(evaluation.offered(model, task))


def test_mct_param_groups():
    image, text, plain = make_model().param_groups(mock.Mock(lr=0.03, weight_decay=1e-4))
    assert (image["lr"], text["lr"], len(plain["params"])) == (0.03, 4e-5, 0) and text["params"]
    detector = make_model("detection")
    _, _, norms = detector.param_groups(mock.Mock(lr=0.03, weight_decay=1e-4))
    assert norms["weight_decay"] == 0 and all(p.ndim == 1 for p in norms["params"])


@pytest.mark.parametrize("over, spaces", [
    # MoCo-v2
    (dict(lambda_tag=0.0, lambda_cc=0.0, lambda_ic=0.0, lambda_ci=0.0),
     {"vision": ["intra"], "text": []}),
    # + J_tag
    (dict(lambda_cc=0.0, lambda_ic=0.0, lambda_ci=0.0), {"vision": ["intra"], "text": []}),
    # Table 7
    (dict(lambda_ii=0.0, lambda_tag=0.0, lambda_cc=0.0), {"vision": ["inter"], "text": ["inter"]}),
    (dict(heads="unified", intra_dim=14),
     {"vision": ["intra", "inter"], "text": ["intra", "inter"]})])
def test_mct_ablations_build_only_what_they_use(over, spaces):
    model = make_model(**over)
    out = model(make_batch())
    out["loss"].backward()
    assert model.spaces == spaces
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert evaluation.offers(model, "encode_image", "encode_text") == ("inter" in spaces["text"])
    if over.get("heads"):
        assert list(model.vision_heads) == ["both"]
    model.after_backward(out)
    model.after_step(1, 2)


def test_mct_setup_without_tags():
    cfg = small()
    mct.setup(cfg, "pretrain", {})
    assert cfg.lambda_tag == 0 and not Mct(cfg, "pretrain", 0).tagged


def test_mct_refuses():
    for over, words in ((dict(lambda_ii=0.0, lambda_tag=0.0, lambda_ic=0.0, lambda_ci=0.0),
                         "models/mct.py: lambda_ii"),
                        (dict(heads="unified"), "--heads unified: --intra_dim"),
                        (dict(heads="none"), "--heads none: not one of distinct, unified")):
        with pytest.raises(SystemExit, match=words):
            make_model(**over)


def test_mct_frozen_backbone_stays_bit_equal():
    """Running averages too."""
    model, batch = make_model("linear"), make_batch("linear")
    assert not model.vision.training and model.fc.training
    before = copy.deepcopy(model.vision.state_dict())
    batch.pop("features")
    batch["image"] = torch.randn(6, 3, 32, 32)
    groups = model.param_groups(mock.Mock(lr=30.0, weight_decay=0.0))
    optimizer = torch.optim.SGD([p for g in groups for p in g["params"]], 30.0, 0.9)
    for _ in range(3):
        model(batch)["loss"].backward()
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.vision.state_dict().items())


def test_mct_vse_loss():
    im, tx, ids = units(5, 7), units(5, 7), torch.tensor([0, 1, 1, 2, 3])
    close(vse_loss(im, tx, ids, ALPHA), vse_loops(im, tx, ids, ALPHA))
    assert vse_loss(im, tx, torch.zeros(5), ALPHA) == 0
    with pytest.raises(SystemExit, match="one picture"):
        make_model("retrieval_gru")(make_batch("retrieval_gru", b=1))


def test_mct_gru_reads_to_the_last_token():
    model, batch = make_model("retrieval_gru").eval(), make_batch("retrieval_gru")
    batch["text_mask"][:, 4:] = 0
    whole = model.encode_text(batch)
    cut = {"text": batch["text"][:, :4], "text_mask": batch["text_mask"][:, :4]}
    close(whole, model.encode_text(cut))


def test_mct_pmi():
    rows = tag_rows(300, vocab=12)
    vectors = pmi_vectors(rows, 12, 12)
    sets, n = [{t for t in r if t >= 0} for r in rows.tolist()], len(rows)

    def count(*tags):
        return sum(all(t in s for t in tags) for s in sets)

    pmi = torch.zeros(12, 12)
    for i in range(12):
        for j in range(12):
            if count(i, j):
                pmi[i, j] = max(0.0, math.log(count(i, j) * n / (count(i) * count(j))))
    u, s, _ = torch.linalg.svd(pmi)
    wanted = F.normalize(u * s.sqrt(), dim=-1)
    close(vectors @ vectors.T, wanted @ wanted.T, 1e-4)             # a basis is free up to signs
    assert pmi_vectors(rows, 12, 5).shape == (12, 5)
    assert (pmi_vectors(torch.tensor([[0, 1], [2, -1]]), 4, 4)[3] == 0).all()


# --------------------------------------------------------------------------------------------------
# What evaluation is given

def test_mct_encoders_are_the_students():
    """By running averages, without dropout, in the inter-modal space of the student's heads."""
    model, batch = make_model(**ODD, dropout=0.3).eval(), make_batch()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    state = numbers(model)
    features = features_by_hand(state, "vision.", batch["image"], 0)
    pooled = bert_by_hand(state, "text.", batch["text"], batch["text_mask"])
    with torch.no_grad():
        close(model.visual_features(batch), features)
        close(model.encode_image(batch), unit(mlp_by_hand(state, "vision_heads.inter", features)))
        close(model.encode_text(batch), unit(mlp_by_hand(state, "text_heads.inter", pooled)))


def test_mct_detections_have_the_datas_classes():
    """torchvision's class 1 is the data's 0; a mask is where the chance is a half or more."""
    model, found = make_model("segmentation").eval(), [{
        "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 3.0, 4.0]]),
        "labels": torch.tensor([1, 7]), "scores": torch.tensor([0.9, 0.4]),
        "masks": torch.tensor([[[[0.49, 0.5]]], [[[0.51, 0.1]]]])}]
    with mock.patch.object(model.detector, "forward", lambda images: found):
        objects, = model.detect({"image": [torch.zeros(3, 1, 2)]})
    assert objects["labels"].tolist() == [0, 6] and objects["scores"].tolist() == found[0][
        "scores"].tolist()
    assert objects["masks"].tolist() == [[[False, True]], [[True, False]]]
    assert objects["boxes"].shape == (2, 4)


def test_mct_detected_boxes_are_in_pixels_of_the_picture():
    """Shown at twice its size, found at its own; scores and boxes are float32 also under bf16."""
    model = make_model("detection", detect_sizes=(128,), detect_max=160).eval()
    heads = model.detector.roi_heads
    box = torch.tensor([[20.0, 40.0, 100.0, 80.0]])
    with torch.no_grad():
        heads.box_predictor.cls_score.bias[3] = 9.0
        heads.box_predictor.bbox_pred.weight.zero_()
    with mock.patch.object(model.detector.rpn, "filter_proposals", lambda *_: ([box], None)):
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                objects, = model.detect({"image": [torch.rand(3, 64, 80)]})
            assert objects["boxes"].dtype == objects["scores"].dtype == torch.float32
            close(objects["boxes"], box / 2)
            assert objects["labels"].tolist() == [2]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_mct_boxes_are_float32_under_bf16(task):
    """A picture of 320 pixels and a box of 32: at 290.3 the numbers of bf16 are 2 apart."""
    model = make_model(task, detect_sizes=(320,), detect_max=320)
    truth = torch.tensor([[283.3, 274.9, 315.3, 306.9]])
    batch = {"image": [torch.rand(3, 320, 320)], "boxes": [truth], "labels": [torch.tensor([1])]}
    if task == "segmentation":
        batch["masks"] = [torch.ones(1, 320, 320, dtype=torch.uint8)]
    seen, rpn, heads = {}, model.detector.rpn, model.detector.roi_heads

    def spy(owner, name):
        call = getattr(owner, name)

        def run(*args):
            seen[name] = args, call(*args)
            return seen[name][1]
        return mock.patch.object(owner, name, run)

    with (spy(rpn.anchor_generator, "forward"), spy(rpn, "assign_targets_to_anchors"),
          spy(heads, "select_training_samples"), spy(model.detector.backbone, "forward"),
          spy(heads.box_predictor, "forward"), torch.autocast("cpu", torch.bfloat16)):
        out = model(batch)
    out["loss"].backward()

    features = seen.pop("forward")                              # the last one: the box predictor
    assert features[1][0].dtype == torch.float32
    labels, goals = seen["assign_targets_to_anchors"][1]
    proposals, matched, classes, offsets_ = seen["select_training_samples"][1]
    anchors = seen["assign_targets_to_anchors"][0][0]
    for x in (*anchors, *labels, *goals, *proposals, *offsets_):
        assert x.dtype == torch.float32
    own = [n for n, box in enumerate(proposals[0]) if torch.equal(box, truth[0])]
    assert own and classes[0][own[0]] == 2 and not offsets_[0][own[0]].any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_mct_backbone_of_a_detector_follows_autocast():
    model, seen = make_model("detection"), []
    model.detector.backbone.register_forward_hook(
        lambda module, args, out: seen.append(out["0"].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(make_batch("detection", b=2))
    assert seen == [torch.bfloat16]


# --------------------------------------------------------------------------------------------------
# Dropout, and starting from another run

def some(x):
    """In the place of dropout: every third feature goes, the rest grows."""
    return x * (torch.arange(x.shape[-1]) % 3 != 1) * 1.5


def test_mct_dropout_is_where_bert_has_it():
    """Embeddings, chances of attention, and the outputs of both halves of a layer; in training
    alone, and not in the momentum copy."""
    model, batch = make_model(**ODD, dropout=0.3), make_batch()
    inputs, state = (batch["text"], batch["text_mask"]), numbers(model)

    def drop(x, p, training, inplace):
        assert p == 0.3
        return some(x) if training else x

    def attend(query, key, value, mask, p):
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        chances = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        assert p in (0.0, 0.3)
        return (some(chances) if p else chances) @ value

    with (mock.patch.object(F, "dropout", drop), torch.no_grad(),
          mock.patch.object(F, "scaled_dot_product_attention", attend)):
        dropped, kept = bert_by_hand(state, "text.", *inputs, drop=some), {}
        for name in ("text.", "text_m."):
            kept[name] = bert_by_hand(state, name, *inputs)
        close(model.text(*inputs), dropped)
        close(model.text_m(*inputs), kept["text_m."])
        close(model.eval().text(*inputs), kept["text."])
    assert (dropped - kept["text."]).abs().max() > 0.05


def test_mct_init_leaves_the_queues_behind(tmp_path):
    """Two data sets that number their pictures alike, and whose tags have other meanings: nothing
    of the new data meets a name of the old."""
    old, new = make_model(), Mct(small(tag_width=4), "pretrain", 20)
    old.ptr.fill_(5)
    (tmp_path / "config.json").write_text("{}")
    weights.save_model(old, tmp_path / "model.safetensors")
    fresh = {name: x.clone() for name, x in new.named_buffers() if name.startswith("queue")}
    said = weights.initialize(new, tmp_path, mct.BACKBONE)
    assert "new: ptr, queue_captioned, queue_ids, queue_tags, queue_text_inter" in said
    assert (new.queue_ids == -1).all() and (new.queue_tags == -1).all() and new.ptr == 0
    assert all(torch.equal(x, new.get_buffer(name)) for name, x in fresh.items())
    for name, x in old.named_parameters():
        assert torch.equal(x, new.get_parameter(name)), name

    # picture 3 of the old data is no picture of the new: all keys count
    batch = make_batch()
    batch["tags"] = batch["tags"][:, :4]
    for _, _, hidden in new.queue("vision", "intra").chunks(batch["image_id"]):
        assert not hidden.any()
    assert new(batch)["logs"]["positives"] == 1


def test_mct_prepare_embeds_the_tags_of_the_training_records():
    model, rows = make_model("tagging", tag_dim=20), tag_rows(100)
    torch.manual_seed(2)
    model.prepare(mock.Mock(tag_rows=lambda: rows))
    close(model.tag_vectors @ model.tag_vectors.T, pmi_vectors(rows, 20, 20) @ pmi_vectors(
        rows, 20, 20).T, 1e-4)
    make_model("linear").prepare(None)


# --------------------------------------------------------------------------------------------------
# Foreign weights

def resnet50(seed=1):
    """torchvision's ResNet-50, also its batch norm unlike a fresh one."""
    torch.manual_seed(seed)
    net = torchvision.models.resnet50().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return net


def full_size(task="pretrain", **over):
    """A ResNet-50 beside a small text encoder."""
    sizes = dict(width=24, text_layers=2, text_heads=3, mlp_ratio=2, vocab_size=50, positions=32,
                 queue_size=8, bn_groups=1)
    return Mct(Config(**{**sizes, **over}), task, 5).eval()


@torch.no_grad()
def test_mct_vision_is_torchvisions_resnet50():
    """load_pretrained() takes its state dict; same features; the momentum copy follows."""
    theirs, model, image = resnet50(), full_size(), torch.randn(2, 3, 64, 64)
    model.ptr.fill_(3)
    mct.load_pretrained(model, vision=theirs.state_dict())
    theirs.fc = torch.nn.Identity()
    theirs.to(memory_format=torch.channels_last)        # the same sums in the same order
    difference = (theirs(image) - model.vision(image)).abs().max().item()
    print(f"image tower - torchvision.models.resnet50: {difference:.1e}")
    assert difference < 1e-6
    copied = model.vision_m.state_dict()
    assert all(torch.equal(v, copied[n]) for n, v in model.vision.state_dict().items())
    assert model.ptr == 0 and model.vision.bn1.num_batches_tracked == 7

    # files of old torchvision count no batches
    state = {n: v for n, v in theirs.state_dict().items() if "num_batches" not in n}
    mct.load_pretrained(model, vision=state)
    model.vision.conv1.weight.zero_()
    state.pop("layer3.2.bn2.bias")
    with pytest.raises(KeyError, match="layer3.2.bn2.bias"):
        mct.load_pretrained(model, vision=state)
    assert not model.vision.conv1.weight.any(), "nothing has changed"


@torch.no_grad()
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_mct_detectors_take_torchvisions_resnet50(task):
    """The ResNet's parts find their places in a detector, from a foreign file and from a run."""
    theirs, detector, image = resnet50(), full_size(task), torch.randn(1, 3, 64, 64)
    mct.load_pretrained(detector, vision=theirs.state_dict())
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    conv4 = theirs.layer3(theirs.layer2(theirs.layer1(x)))
    if task == "detection":
        close(detector.detector.backbone(image)["0"], conv4, 1e-6)
        close(detector.detector.roi_heads.box_head.layer4(conv4), theirs.layer4(conv4), 1e-6)
    else:
        close(detector.detector.backbone.body(image)["3"], theirs.layer4(conv4), 1e-6)

    needed, optional = mct.foreign_names(detector, "vision")
    mine = {n for n in detector.state_dict() if n.startswith(mct.BACKBONE)}
    assert mine == set(needed) | set(optional)
    run = {f"vision.{n}": v for n, v in theirs.state_dict().items() if not n.startswith("fc.")}
    adapted = detector.adapt(run)
    assert mine == set(adapted), "the detector's ResNet is filled, and by nothing else"
    assert all(torch.equal(detector.state_dict()[n], v) for n, v in adapted.items())


@torch.no_grad()
@pytest.mark.needs("transformers")
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_mct_text_tower_is_transformers_bert(prefix):
    """load_pretrained() takes its state dict; same pooled output; the momentum copy follows."""
    from transformers import BertConfig, BertModel
    model = full_size(layers=(1, 1, 1, 1), stem="small", block="basic", vision_width=4)
    theirs = BertModel(BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=32, initializer_range=0.3)).eval()
    for p in theirs.parameters():
        if p.ndim == 1:
            p.add_(0.1 * torch.randn_like(p))
    mct.load_pretrained(model, text={prefix + n: v for n, v in theirs.state_dict().items()})

    ids = torch.randint(5, 50, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    difference = (model.text(ids, mask) - theirs(ids, mask).pooler_output).abs().max().item()
    print(f"text tower - transformers.BertModel: {difference:.1e}")
    assert difference < 1e-6
    copied = model.text_m.state_dict()
    assert all(torch.equal(v, copied[n]) for n, v in model.text.state_dict().items())


def test_mct_towers_from_files(tmp_path):
    """tools/weights.py accounts for every tensor; what does not fit is one line."""
    path, model = tmp_path / "resnet50.pth", full_size()
    state = torchvision.models.resnet50().state_dict()
    torch.save(state, path)
    for one in (model, full_size("detection"), full_size("segmentation")):
        said, new = weights.load_towers(mct, one, {"vision": str(path)})
        assert "matched 318 of 320 tensors" in said
        assert "missing 0; unexpected 2: fc.{weight,bias}" in said
        assert "vision." not in new
    state.pop("layer1.0.conv1.weight")
    torch.save(state, path)
    with pytest.raises(SystemExit, match="not filled: vision.layer1.0.conv1.weight"):
        weights.load_towers(mct, model, {"vision": str(path)})


def bert_state(model):
    """Random weights under Hugging Face's names, for the text tower of `model`."""
    state, mine = {}, model.state_dict()
    for ours, theirs in mct.foreign_names(model, "text")[0].items():
        for name, rows in zip(theirs, mine[ours].chunk(len(theirs))):
            state[name] = torch.randn_like(rows)
    return state


def test_mct_bert_files(tmp_path):
    """Hugging Face's names, with and without `bert.`, old LayerNorm names, heads left out; what
    does not fit is one line."""
    model = make_model(act="gelu")
    state = bert_state(model)
    foreign = {"bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma"): v
               for n, v in state.items()}
    foreign |= {"cls.predictions.bias": torch.zeros(3)}
    path, hub = tmp_path / "b.pth", tmp_path / "hub"
    torch.save(foreign, path)
    said, _ = weights.load_towers(mct, model, {"text": str(path)})
    assert f"matched {len(state)} of {len(foreign)} tensors" in said
    assert "missing 0; unexpected 1: cls.predictions.bias" in said
    rows = [state[f"encoder.layer.0.attention.self.{part}.weight"]
            for part in ("query", "key", "value")]
    for tower in (model.text, model.text_m):
        assert torch.equal(tower.blocks[0].attention.qkv.weight, torch.cat(rows))
        assert torch.equal(tower.pooler.bias, state["pooler.dense.bias"])

    # a folder with its config.json
    hub.mkdir()
    torch.save(state, hub / "pytorch_model.bin")
    write(hub / "config.json", {"model_type": "bert", "num_attention_heads": 3})
    assert "unexpected 0" in weights.load_towers(mct, model, {"text": str(hub)})[0]
    write(hub / "config.json", {"model_type": "bert", "num_attention_heads": 4})
    with pytest.raises(SystemExit, match="num_attention_heads"):
        weights.load_towers(mct, model, {"text": str(hub)})

    # a tensor too few, one too many, one of another shape
    for change, words in (
            ({"bert.pooler.dense.bias": None}, "not filled: text.pooler.bias"),
            ({"encoder.layer.1.x": torch.ones(1)}, "no place for encoder.layer.1.x"),
            ({"bert.pooler.dense.bias": torch.ones(1)}, r"is \(24,\) here")):
        bad = {n: v for n, v in {**foreign, **change}.items() if v is not None}
        torch.save(bad, path)
        with pytest.raises(SystemExit, match=words):
            weights.load_towers(mct, model, {"text": str(path)})


@pytest.mark.parametrize("task, side, over, words", [
    ("linear", "text", {}, "trains no BERT"), ("pretrain", "text", {"act": "relu"}, "gelu"),
    ("pretrain", "vision", {}, "--stem small"), ("detection", "vision", {}, "--stem small")])
def test_mct_towers_without_counterpart(task, side, over, words):
    with pytest.raises(SystemExit, match=words) as e:
        mct.load_pretrained(make_model(task, **over), **{side: {}})
    assert "\n" not in str(e.value)


def exported(model, root):
    """A run of these weights, and tools/weights.py's export of it -> its folder."""
    info = {"model": "mct", "task": model.task, "stats": {"num_labels": 5},
            "config": dataclasses.asdict(model.cfg)}
    write(root / "run" / "config.json", info)
    weights.save_model(model, root / "run" / "model.safetensors")
    weights.export(root / "run", root / "out")
    return root / "out"


@torch.no_grad()
def test_mct_exported_resnet_is_torchvisions(tmp_path):
    """It lacks fc alone, and gives the same features."""
    model, theirs = full_size(), torchvision.models.resnet50()
    state = torch.load(exported(model, tmp_path) / "vision.pth", weights_only=True)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    theirs.fc, image = torch.nn.Identity(), torch.randn(1, 3, 64, 64)
    theirs.to(memory_format=torch.channels_last)
    close(theirs.eval()(image), model.vision(image))


@torch.no_grad()
@pytest.mark.needs("transformers")
def test_mct_exported_bert_is_transformers(tmp_path):
    from transformers import BertModel
    model, ids = full_size(), torch.randint(5, 50, (2, 7))
    theirs = BertModel.from_pretrained(exported(model, tmp_path) / "text").eval()
    mask = torch.ones_like(ids)
    close(theirs(ids, mask).pooler_output, model.text(ids, mask), 1e-6)


# --------------------------------------------------------------------------------------------------
# Two processes

def two_steps(rank=0, world=1):
    """Losses, gradients and the state after two steps; batch norm in evaluation mode, as its
    statistics are per process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    raw = make_model()
    whole = make_batch(b=8)
    batch = {k: v.chunk(world)[rank] for k, v in whole.items()}
    raw.vision.eval(), raw.vision_m.eval()
    model = raw
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False)
    params = {n: p for n, p in raw.named_parameters() if p.requires_grad}
    optimizer, steps = torch.optim.SGD(params.values(), 0.05), []
    for step in range(2):
        out = model(batch)
        out["loss"].backward()
        raw.after_backward(out)
        steps.append((out["logs"], {n: p.grad.clone() for n, p in params.items()}))
        optimizer.step()
        optimizer.zero_grad()
        raw.after_step(step + 1, 2)
    return steps, raw.state_dict()


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2)
    x = torch.arange(3)[:, None] + 10 * rank
    mixed, restore = shuffle(x)
    seen = [torch.empty_like(mixed) for _ in range(2)]
    dist.all_gather(seen, mixed)
    assert sorted(torch.cat(seen).flatten().tolist()) == [0, 1, 2, 10, 11, 12]
    assert unshuffle(mixed, restore).flatten().tolist() == [0, 1, 2, 10, 11, 12]

    # the tags' vectors: the first process alone counts
    tagger, samples = make_model("tagging"), mock.Mock(tag_rows=lambda: tag_rows(50))
    if rank:
        samples.tag_rows = mct.pmi_vectors = None
    tagger.prepare(samples)
    everyone = [torch.empty_like(tagger.tag_vectors) for _ in range(2)]
    dist.all_gather(everyone, tagger.tag_vectors)
    assert torch.equal(*everyone) and everyone[0].any()

    # one picture is no batch for batch norm
    try:
        make_model().check_batch_size(1)
    except SystemExit as e:
        assert "virtual groups" in str(e)
    else:
        raise AssertionError("a batch of one was taken")

    result = two_steps(rank, 2)
    model = make_model()
    with torch.no_grad():
        model.vision.bn1.running_mean.fill_(rank)
    model.after_step(1, 2)
    assert (model.vision.bn1.running_mean == 0.5).all()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_mct_two_processes_equal_one(tmp_path):
    """Losses, gradients, queues; the keys' shuffle over processes is undone."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    steps, state = two_steps()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, first, second in zip(steps, ranks[0][0], ranks[1][0]):
        for name in one[0]:
            close((first[0][name] + second[0][name]) / 2, one[0][name], 1e-4)
        for name in one[1]:
            close(first[1][name], one[1][name], 1e-4)
            assert torch.equal(first[1][name], second[1][name])
    for name in state:
        close(ranks[0][1][name], state[name], 1e-4)
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), name


# --------------------------------------------------------------------------------------------------
# As a user would call it

TINY = ("--image_size 32 --vision_width 4 --width 24 --text_layers 1 --text_heads 3 "
        "--head_hidden 20 --queue_size 16 --max_text 6 --rois 8 --batch_size 4 --steps 2 "
        "--workers 0 --detect_max 48").split()


@pytest.fixture
def tok(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square left of".split()
    return write(tmp_path / "vocab.txt", "\n".join(words) + "\n")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def photos(root, n=12, size=(40, 32)):
    """Pictures with one bright rectangle each, COCO instances for them, records with tags and
    captions, and an ImageFolder -> {source: its data}."""
    images, notes, rows = [], [], []
    for i in range(n):
        x, y, w, h = 4 + i % 5, 3 + i % 7, 14, 12
        color = "red" if i % 2 else "blue"
        picture = Image.new("RGB", size, (20, 20, 20))
        picture.paste((250, 30, 30) if i % 2 else (30, 30, 250), (x, y, x + w, y + h))
        part = "val" if i > 7 else "train"
        for path in (root / "im" / f"{i}.png", root / "classes" / part / color / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        images.append({"id": i, "file_name": f"im/{i}.png", "height": size[1], "width": size[0]})
        notes.append({"id": i + 1, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0,
                      "bbox": [x, y, w, h], "area": w * h,
                      "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        rows.append({"image": f"im/{i}.png", "image_id": i, "caption": [f"a {color} square"],
                     "tags": [color, "square", "a"][:i % 4]})
    crowd = {"size": [size[1], size[0]], "counts": [0, 32, size[0] * size[1] - 32]}
    notes.append({"id": 99, "image_id": 0, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 1, 32],
                  "area": 32, "segmentation": crowd})
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
    instances = {"images": images, "annotations": notes, "categories": categories}
    lines = [json.dumps(row) + "\n" for row in rows[1:]]
    return {"detection": write(root / "instances.json", instances), "classes": root / "classes",
            "pairs": write(root / "pairs.jsonl", "".join(lines))}


def test_mct_every_task_trains(tmp_path, tok, capsys):
    """train.py on a dozen pictures: pre-training, every task from it, its evaluation; stored
    features are made once."""
    sources, results = photos(tmp_path), {}

    def run(task, *flags):
        data = sources[mct.VIEWS[task]["source"]]
        return train.main(["--model", "mct", "--task", task, "--data", str(data),
                           "--image_root", str(tmp_path), "--vocab", str(tok),
                           "--out", str(tmp_path / task), "--hold_out", "0", *TINY, *flags])

    init = ("--init", str(tmp_path / "pretrain"))
    for task in mct.TASKS:
        flags = () if task == "pretrain" else init
        if task == "linear":
            flags += ("--lr", "1.0", "--steps", "30")
        results[task] = run(task, *flags)
        assert set(results[task]) == set(mct.EVALS[task])
    said = capsys.readouterr().out
    assert "not measured" in said and "batch norm: plain" in said
    assert "NO CAPTION HAS A PARAPHRASE" in said
    top1 = results["linear"]["linear"]["metrics"]
    assert top1["accuracy"] >= top1["baseline"]
    measured = set(results["tagging"]["tagging"]["metrics"])
    assert measured <= {"mIOU@5", "mIOU@10", "mIOU@15", "mIOU@20"}

    # detectors
    rows = results["detection"]["detection"]["rows"]
    assert rows[0]["measure"].startswith("boxes, VOC07")
    measured = [r["measure"] for r in results["segmentation"]["segmentation"]["rows"]]
    kinds = ("boxes", "masks", "whole picture")
    assert {f"{kind}, VOC07 11-point" for kind in kinds} <= set(measured)
    coco = bool(importlib.util.find_spec("pycocotools"))
    assert coco == ("masks, pycocotools" in measured) == ("boxes, pycocotools" in measured)
    assert coco != ("needs pip install pycocotools" in said)

    # the probe of the pre-trained ResNet
    probe = evaluation.main([str(tmp_path / "pretrain"), "--task", "probe",
                             "--data", str(sources["classes"]), "--probe_lr", "1"])["probe"]
    assert {"random weights", "model"} < set(probe["metrics"])
    assert set(probe["rows"][2]) > {"train top-1", "top-1"}

    # stored features stay where weights stay, and are made anew for other weights
    stored = tmp_path / "linear" / "features.npy"
    first = stored.stat().st_mtime_ns
    run("linear", *init, "--lr", "1.0", "--steps", "30", "--evals", "none", "--resume")
    assert stored.stat().st_mtime_ns == first
    run("linear", "--lr", "1.0", "--evals", "none", "--overwrite")
    assert stored.stat().st_mtime_ns != first


def test_mct_paraphrases_of_a_file(tmp_path, tok, capsys):
    """train.py --paraphrase: the key captions are its wordings."""
    pairs = photos(tmp_path)["pairs"]
    wordings = write(tmp_path / "back.tsv", "a red square\tred square\tsquare red\n")
    train.main(["--model", "mct", "--data", str(pairs), "--image_root", str(tmp_path),
                "--vocab", str(tok), "--out", str(tmp_path / "run"), "--evals", "none",
                "--paraphrase", str(wordings), *TINY])
    said = capsys.readouterr().out
    assert "paraphrased_captions 6" in said and "NO CAPTION" not in said
    log, = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert 0 < json.loads(log)["paraphrased"] < 1
