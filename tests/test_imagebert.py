"""models/imagebert.py: each equation and each training step against loops in float64 written from
the paper; every setting and every number of the recipe; what is hidden, which pairs are drawn,
scores, BERT's weights."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from models import imagebert as ib


def config(**changes):
    sizes = dict(width=16, layers=2, heads=2, mlp_ratio=2, dropout=0.0, max_text=8, max_regions=4,
                 positions=12, vocab_size=40, cls_id=2, sep_id=3, mask_id=4, first_word=5,
                 region_dim=6, region_classes=5, global_dim=3)
    return ib.Config(**sizes | changes)


def make_batch(b=6, t=8, r=4, f=6, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    # sentences of 4 to t tokens
    length = torch.randint(4, t + 1, (b, 1), generator=g)
    text = torch.randint(5, 40, (b, t), generator=g)
    text[:, 0] = 2
    text.scatter_(1, length - 1, 3)
    mask = (torch.arange(t) < length).long()

    # images of 1 to r regions
    corner = 40 * torch.rand(b, r, 2, generator=g)
    regions_mask = (torch.arange(r) < torch.randint(1, r + 1, (b, 1), generator=g)).long()
    boxes = torch.cat([corner, corner + 2 + 20 * torch.rand(b, r, 2, generator=g)], -1)
    regions = torch.randn(b, r, f, generator=g)
    labels = torch.randint(0, k, (b, r), generator=g)
    return {"text": text * mask, "text_mask": mask,
            "regions": regions * regions_mask[..., None],
            "regions_box": boxes * regions_mask[..., None],
            "regions_size": torch.tensor([[64.0, 80.0]]).repeat(b, 1),
            "regions_mask": regions_mask,
            "regions_label": labels.masked_fill(regions_mask == 0, -1),
            "regions_global": torch.rand(b, 3, generator=g),
            "image_id": torch.arange(b)}


def make_model(task="pretrain", dtype=torch.float32, spread=0.1, **changes):
    torch.manual_seed(0)
    model = ib.ImageBert(config(**changes), task)
    with torch.no_grad():                               # no bias or norm at its neutral start
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model.to(dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(score, y):
    """Binary cross-entropy of one logit."""
    return -(y * math.log(sigmoid(score)) + (1 - y) * math.log(1 - sigmoid(score)))


# --------------------------------------------------------------------------------------------------
# Equations

def reference_eq1(model, batch, b, i):
    """e = LN(v + s + p_img + p_seq) of region i of image b, number by number -> list of D."""
    tables, embed = model.bert.embeddings, model.regions
    x0, y0, x1, y1 = batch["regions_box"][b, i].tolist()
    w, h = batch["regions_size"][b].tolist()
    c = [x0 / w, y0 / h, x1 / w, y1 / h, (x1 - x0) * (y1 - y0) / (w * h)]
    r = batch["regions"][b, i].tolist()
    e = []
    for d in range(16):
        v, p_img = embed.feature.bias[d].item(), embed.box.bias[d].item()
        for j in range(6):
            v += embed.feature.weight[d, j].item() * r[j]
        for j in range(5):
            p_img += embed.box.weight[d, j].item() * c[j]
        s = tables.segments.weight[1, d].item()
        p_seq = tables.positions.weight[11, d].item()   # the one dummy position of all regions
        e.append(v + s + p_img + p_seq)

    mean = sum(e) / 16
    var = sum((x - mean) ** 2 for x in e) / 16
    weight, bias = embed.norm.weight.tolist(), embed.norm.bias.tolist()
    return [(e[d] - mean) / math.sqrt(var + 1e-12) * weight[d] + bias[d] for d in range(16)]


def test_imagebert_eq1():
    model, batch = make_model(dtype=torch.float64), make_batch()
    for name in ("regions", "regions_box", "regions_size"):
        batch[name] = batch[name].double()
    got, _ = model.regions(batch, model.bert.embeddings)
    for b in range(2):
        for i in range(4):
            want = reference_eq1(model, batch, b, i)
            assert got[b, i].tolist() == pytest.approx(want, abs=1e-9)


def test_the_global_feature_is_one_more_token():
    """Eq. 1 with the CNN's feature in place of a region's and the whole image as its box;
    in every image, behind the regions."""
    model, batch = make_model(global_feature=True), make_batch()
    got, mask = model.regions(batch, model.bert.embeddings)
    tables, embed = model.bert.embeddings, model.regions
    both = tables.segments.weight[1] + tables.positions.weight[11]
    code = ib.box_code(batch["regions_box"], batch["regions_size"])
    whole = embed.box(torch.tensor([0.0, 0, 1, 1, 1]))
    want = embed.norm(embed.image(batch["regions_global"]) + both + whole)
    assert got.shape[1] == 5
    assert torch.equal(mask, F.pad(batch["regions_mask"], (0, 1), value=1))
    torch.testing.assert_close(got[:, 4], want)
    want = embed.norm(embed.feature(batch["regions"]) + both + embed.box(code))
    torch.testing.assert_close(got[:, :4], want)


def test_words_are_word_plus_segment_plus_position():
    model, batch = make_model(), make_batch()
    tables, want = model.bert.embeddings, []
    for row in batch["text"].tolist():
        for n, word in enumerate(row):
            want.append(tables.words.weight[word] + tables.segments.weight[0]
                        + tables.positions.weight[n])
    want = tables.norm(torch.stack(want).view(6, 8, 16))
    torch.testing.assert_close(tables(batch["text"]), want)


@pytest.mark.parametrize("loss", [ib.mlm_loss, ib.moc_loss])
def test_imagebert_eq2_eq3(loss):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -100, 6, 0], [-100] * 4, [2, 2, -100, 5]])
    total, count, grad = 0.0, 0, torch.zeros(3, 4, 7, dtype=torch.float64)
    for b in range(3):
        for m in range(4):
            if labels[b, m] != -100:
                z = sum(math.exp(x) for x in logits[b, m].tolist())
                total -= math.log(math.exp(logits[b, m, labels[b, m]].item()) / z)
                for k in range(7):
                    grad[b, m, k] = math.exp(logits[b, m, k].item()) / z - float(k == labels[b, m])
                count += 1
    out = loss(logits, labels)
    out.backward()
    assert out.item() == pytest.approx(total / count, rel=1e-5)
    torch.testing.assert_close(logits.grad, grad / count, rtol=1e-4, atol=1e-6)
    assert loss(logits, torch.full_like(labels, -100)).item() == 0


def test_imagebert_eq4():
    g = torch.Generator().manual_seed(2)
    h = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    r = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    live = torch.tensor([[1, 0, 1, 1], [0] * 4, [0, 1, 0, 0]]).bool()
    terms = []
    for b in range(3):
        for m in range(4):
            if live[b, m]:
                terms.append(sum((h[b, m, d].item() - r[b, m, d].item()) ** 2 for d in range(5)))
    assert ib.mrfr_loss(h, r, live).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert ib.mrfr_loss(h, r, live & False).item() == 0


def test_imagebert_eq5():
    s, y = torch.tensor([2.0, -1.0, 0.3, 40.0, -200.0]), torch.tensor([1.0, 0, 1, 0, 1])
    want = sum(map(bce, s[:3].tolist(), y[:3].tolist())) / 3
    assert ib.itm_loss(s[:3], y[:3]).item() == pytest.approx(want, rel=1e-5)
    # saturated: finite, not log(0)
    assert ib.itm_loss(s, y).item() == pytest.approx((3 * want + 40 + 200) / 5, rel=1e-4)


def test_imagebert_eq6():
    c, y = torch.tensor([0.5, -3.0, 1.0, 9.0]), torch.tensor([1.0, 0, 0, 1])
    live = torch.tensor([True, True, True, False])
    want = sum(map(bce, c[:3].tolist(), y[:3].tolist())) / 3
    assert ib.bce_loss(c, y, live).item() == pytest.approx(want, rel=1e-5)


def test_imagebert_eq7():
    s = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 9.0], [1.0, 7.0, 7.0]])
    live = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()   # the last row has no negative
    want = [-math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(-1.0) + math.exp(2.0))),
            -math.log(math.exp(3.0) / (math.exp(3.0) + 1))]
    assert ib.ce_loss(s, live).item() == pytest.approx(sum(want) / 2, rel=1e-5)
    assert ib.ce_loss(s[2:], live[2:]).item() == 0


def test_imagebert_eq8():
    s = torch.tensor([[1.0, 5, 3], [2, -1, -7]])
    live = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    for row in range(2):
        best = max((s[row, j].item(), j) for j in range(3) if live[row, j])[1]
        assert ib.hardest_negative(s, live)[row] == best


def test_imagebert_eq9():
    pos, neg = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.4, 0.8])
    live = torch.tensor([True, True, False])
    want = [max(0, 0.2 - p + n) for p, n in zip(pos[:2].tolist(), neg[:2].tolist())]
    assert want[0] == 0 < want[1]
    assert ib.triplet_loss(pos, neg, live).item() == pytest.approx(sum(want) / 2, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# What is hidden, which pairs are drawn

def chosen_of(positions, live, regions):
    """Positions (B, M) and which of them count -> (B, R) bool."""
    return torch.zeros(len(positions), regions, dtype=torch.bool).scatter(1, positions, live)


def test_region_masking_rates():
    torch.manual_seed(0)
    b, r = 4000, 20
    mask = (torch.arange(r) < torch.randint(1, r + 1, (b, 1))).long()
    x0 = 10.0 * torch.arange(r).expand(b, r)            # no two boxes touch
    boxes = torch.stack([x0, x0 * 0, x0 + 5, x0 * 0 + 5], -1)
    regions = torch.rand(b, r, 3) + 1
    out, positions, live, zeroed = ib.mask_regions(regions, boxes, mask)
    chosen, gone = chosen_of(positions, live, r), (out == 0).all(-1)
    assert not chosen[mask == 0].any() and not gone[~chosen].any()
    assert torch.equal(gone, zeroed)                    # no feature here is 0 of itself
    assert torch.equal(out[~gone], regions[~gone])
    assert chosen.sum() / mask.sum() == pytest.approx(0.15, abs=0.01)
    assert gone.sum() / chosen.sum() == pytest.approx(0.9, abs=0.01)
    assert positions.shape[1] == math.ceil(3 + 4 * math.sqrt(2.55))
    assert [row.unique().numel() for row in positions] == [positions.shape[1]] * b


@pytest.mark.parametrize("r,once_in", [(100, 24_000), (36, 9_600)])
def test_how_often_the_cap_of_deviation_5_shows_a_region(r, once_in):
    boxes = torch.zeros(1, r, 4)
    _, positions, _, _ = ib.mask_regions(torch.zeros(1, r, 1), boxes, torch.ones(1, r))
    cap = positions.shape[1]
    more = sum(math.comb(r, k) * 0.15 ** k * 0.85 ** (r - k) for k in range(cap + 1, r + 1))
    assert 1 / more == pytest.approx(once_in, rel=0.02) and f"{once_in:,}" in ib.__doc__


def test_a_twin_gives_nothing_away():
    torch.manual_seed(0)
    box = torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 10], [0, 0, 10, 40], [50, 50, 60, 60],
                        [0, 0, 0, 0], [0, 0, 10, 10]])
    box = box.expand(3000, 6, 4)
    regions, mask = torch.ones(3000, 6, 2), torch.tensor([1, 1, 1, 1, 0, 0]).expand(3000, 6)
    iou = ib.box_iou(box[:1])[0]
    assert iou[0, 1].item() == pytest.approx(0.9) and iou[0, 2].item() == pytest.approx(0.25)
    assert iou[0, 3] == 0 and iou[4, 4] == 0

    # 0 and 1 go together, 2 overlaps too little
    out, positions, live, zeroed = ib.mask_regions(regions, box, mask)
    chosen, gone = chosen_of(positions, live, 6), (out == 0).all(-1)
    assert torch.equal(gone[:, 0], gone[:, 1]) and torch.equal(gone, zeroed)
    assert (gone[:, 1] & ~chosen[:, 1]).sum() > 50
    assert not (gone[:, 2:] & ~chosen[:, 2:]).any()
    assert not gone[:, 4:].any()                        # padding, whatever its box

    # the print: no twins
    out, positions, live, _ = ib.mask_regions(regions, box, mask, twin_iou=1.0)
    assert not ((out == 0).all(-1) & ~chosen_of(positions, live, 6)).any()


def test_word_masking_rates():
    torch.manual_seed(0)
    text = torch.randint(5, 4000, (4000, 20))
    maskable = (torch.arange(20) > 0).expand(4000, 20).clone()
    maskable[:, 13:] = False
    out, positions, labels = ib.mask_tokens(text, maskable, 4, 5, 4000)
    live = labels != -100
    assert (live.sum(1) == 2).all()                     # max(1, round(0.15 * 12))
    assert maskable.gather(1, positions)[live].all()
    new, old = out.gather(1, positions)[live], labels[live]
    assert (new == 4).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (new == old).float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(out.scatter(1, positions, 0), text.scatter(1, positions, 0))


def test_how_many_words_are_hidden():
    """Deviation 5: max(1, round(0.15 n)) of n words, none of none."""
    torch.manual_seed(0)
    maskable = torch.arange(40) < torch.arange(41)[:, None]
    text = torch.randint(5, 4000, (41, 40))
    _, _, labels = ib.mask_tokens(text, maskable, 4, 5, 4000)
    want = [0] + [max(1, round(0.15 * n)) for n in range(1, 41)]
    assert (labels != -100).sum(1).tolist() == want and want[10] == want[16] == 2


def test_negatives_are_of_other_images():
    torch.manual_seed(0)
    ids = torch.tensor([7, 7, 3, 9, 3, 7])
    for _ in range(50):
        index, found = ib.others(ids, 4)
        for i in range(6):
            allowed = {j for j in range(6) if ids[j] != ids[i]}
            got = index[i][found[i]].tolist()
            assert len(got) == min(4, len(allowed)) == len(set(got)) and set(got) <= allowed


def test_the_second_half_of_a_batch_is_mismatched():
    torch.manual_seed(0)
    ids, own = torch.tensor([7, 7, 3, 9, 3, 7]), torch.arange(6)
    for _ in range(50):
        image, sentence, y = ib.mismatch(ids, 3)
        assert y.tolist() == [1, 1, 1, 0, 0, 0]
        assert torch.equal(image[:3], own[:3]) and torch.equal(sentence[:3], own[:3])
        assert (ids[image[3:]] != ids[sentence[3:]]).all()
        assert ((image != own) ^ (sentence != own))[3:].all()

    # another image or another sentence, evenly
    other, eight = [], torch.arange(8)
    for _ in range(300):
        other.append(ib.mismatch(eight, 4)[0][4:] != eight[4:])
    assert torch.stack(other).float().mean() == pytest.approx(0.5, abs=0.06)

    # nobody to swap with: still matched
    assert ib.mismatch(torch.zeros(4, dtype=torch.long), 2)[2].tolist() == [1, 1, 1, 1]


def test_masked_losses_are_of_matched_pairs_only(monkeypatch):
    model, batch, seen = make_model(region_prob=0.7, mlm_prob=0.5), make_batch(), {}

    def watch(name):
        real = getattr(ib, name)

        def loss(*args):
            seen[name] = args
            return real(*args)
        monkeypatch.setattr(ib, name, loss)
    for name in ("mlm_loss", "moc_loss", "mrfr_loss"):
        watch(name)

    # half of six pairs, and the mismatched ones are the last
    torch.manual_seed(1)
    out = model(batch)
    assert all(args[0].shape[0] == 3 for args in seen.values())
    torch.manual_seed(1)
    assert ib.mismatch(batch["image_id"], 3)[2].tolist() == [1, 1, 1, 0, 0, 0]

    # what is true: the words, labels and features of these pairs as they were before masking
    words, labels = seen["mlm_loss"][1], seen["moc_loss"][1]
    features, live = seen["mrfr_loss"][1:]
    for i in range(3):
        assert (words[i] != -100).any() and (labels[i] != -100).any() and live[i].any()
        assert set(words[i].tolist()) - {-100} <= set(batch["text"][i].tolist())
        assert set(labels[i].tolist()) - {-100} <= set(batch["regions_label"][i].tolist())
        for feature in features[i][live[i]]:
            assert (batch["regions"][i] == feature).all(-1).any()
    assert set(out["logs"]) == {"mlm", "moc", "mrfr", "itm", "itm_acc", "zeroed"}
    want = sum(out["logs"][k] for k in ("mlm", "moc", "mrfr", "itm"))
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_mismatched_pairs_are_masked_too(monkeypatch):
    """What the transformer reads: hidden words and regions in every pair, but never a hidden
    [CLS], [SEP] or padding."""
    model, batch = make_model(region_prob=1.0, region_zero=1.0, mlm_prob=0.5), make_batch()
    read, real = {}, model.encode

    def encode(pairs, positions):
        read.update(pairs)
        return real(pairs, positions)
    monkeypatch.setattr(model, "encode", encode)
    hidden = []
    for seed in range(20):
        torch.manual_seed(seed)
        model(batch)
        torch.manual_seed(seed)
        image, sentence, y = ib.mismatch(batch["image_id"], 3)
        text, mask = batch["text"][sentence], batch["text_mask"][sentence]
        special = (mask == 0) | (text == 2) | (text == 3)
        assert y.tolist() == [1, 1, 1, 0, 0, 0] and (read["regions"] == 0).all()
        assert torch.equal(read["regions_box"], batch["regions_box"][image])
        assert torch.equal(read["text"][special], text[special])
        hidden.append((read["text"] == 4).any(1))
    assert (torch.stack(hidden).float().mean(0) > 0.5).all()    # each hidden word with 80 %


def test_a_hidden_region_is_not_in_the_sequence():
    """With every region zeroed, predictions do not depend on the features."""
    model, batch = make_model(region_prob=1.0, region_zero=1.0).eval(), make_batch()
    outs = []
    for regions in (batch["regions"], 5 * torch.randn(6, 4, 6)):
        torch.manual_seed(3)
        read, positions, truth, _ = model.hide({**batch, "regions": regions})
        cls, *hidden = model.encode(read, positions)
        predictions, live = model.predict_hidden(*hidden), truth["live"]
        assert live.sum() == batch["regions_mask"].sum()
        outs.append((cls, predictions["moc"][live], predictions["mrfr"][live]))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# A step by hand: the model written again, for one pair without padding, one head at a time

def leaves(model):
    """{name: the model's weight as float64, with a gradient of its own}."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach().double().requires_grad_()
    return found


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / deviation * w[name + ".weight"] + w[name + ".bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(x, w, name, heads, factor):
    """Every token looks at every token: softmax(q k / sqrt(size)) v. factor: of the softmax."""
    query, key, value = linear(x, w, name + ".qkv").chunk(3, dim=-1)
    size, seen = x.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        energy = (query[:, part] @ key[:, part].T / math.sqrt(size)).exp()
        seen.append(factor * energy / energy.sum(-1, keepdim=True) @ value[:, part])
    return linear(torch.cat(seen, -1), w, name + ".out")


def sentence_of(batch, n):
    """The ids of sentence n, without padding."""
    return batch["text"][n, :batch["text_mask"][n].sum()].tolist()


def picture_of(batch, n):
    """The regions of image n, without padding."""
    real = batch["regions_mask"][n].sum()
    return {"features": batch["regions"][n, :real].double(),
            "boxes": batch["regions_box"][n, :real].tolist(),
            "labels": batch["regions_label"][n, :real].tolist(),
            "size": batch["regions_size"][n].tolist(), "whole": batch["regions_global"][n].double()}


def read_pair(w, cfg, words, picture, drop=None):
    """The transformer's output at all tokens of one pair -> (words + regions (+ 1), D).

    drop: {name of a dropout: a factor in its place}, for "probabilities" too.
    """
    drop = drop or {}
    tables = "bert.embeddings."
    positions, segments = w[tables + "positions.weight"], w[tables + "segments.weight"]
    tokens = []
    for n, word in enumerate(words):
        e = w[tables + "words.weight"][word] + positions[n] + segments[0]
        tokens.append(norm(e, w, tables + "norm") * drop.get("bert.embeddings.drop", 1))

    # regions, then the whole image
    (width, height), seen = picture["size"], []
    for feature, (x0, y0, x1, y1) in zip(picture["features"], picture["boxes"]):
        area = (x1 - x0) * (y1 - y0) / (width * height)
        c = [x0 / width, y0 / height, x1 / width, y1 / height, area]
        seen.append((linear(feature, w, "regions.feature"), c))
    if cfg.global_feature:
        seen.append((linear(picture["whole"], w, "regions.image"), [0, 0, 1, 1, 1]))
    for v, c in seen:
        c = torch.tensor(c, dtype=torch.float64)
        e = v + segments[1] + linear(c, w, "regions.box") + positions[cfg.positions - 1]
        tokens.append(norm(e, w, "regions.norm") * drop.get("regions.drop", 1))

    # BERT's layers
    x = torch.stack(tokens)
    for n in range(cfg.layers):
        name = f"bert.blocks.{n}"
        factor = drop.get(name + ".drop", 1)
        seen = attend(x, w, name + ".attention", cfg.heads, drop.get("probabilities", 1))
        x = norm(x + factor * seen, w, name + ".attention_norm")
        thought = linear(gelu(linear(x, w, name + ".mlp.0")), w, name + ".mlp.2")
        x = norm(x + factor * thought, w, name + ".mlp_norm")
    return x


def matching_score(w, tokens):
    return linear(tokens[0], w, "itm_head")[0]


def word_logits(w, token):
    x = norm(gelu(linear(token, w, "mlm_head.transform.0")), w, "mlm_head.transform.2")
    return x @ w["bert.embeddings.words.weight"].T + w["mlm_head.bias"]


def surprise(logits, truth):
    """-log softmax(logits)[truth]."""
    return logits.exp().sum().log() - logits[truth]


def binary(score, y):
    share = 1 / (1 + (-score).exp())
    return -(share if y else 1 - share).log()


def mean(terms):
    return sum(terms) / len(terms)


def overlap(a, b):
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return both / (areas - both)


def hide_words(cfg, words, order, dice, noise):
    """-> the words as they are read, {position of a hidden one: the true word}."""
    candidates = [n for n, word in enumerate(words) if word not in (cfg.cls_id, cfg.sep_id)]
    count = min(len(candidates), max(1, round(cfg.mlm_prob * len(candidates))))
    candidates.sort(key=lambda n: -order[n])
    read, hidden = list(words), {}
    for m, n in enumerate(candidates[:count]):
        hidden[n] = words[n]
        if dice[m] < 0.8:
            read[n] = cfg.mask_id
        elif dice[m] < 0.9:
            read[n] = noise[m]
    return read, hidden


def hide_regions(cfg, picture, dice):
    """-> the picture as it is read, the hidden regions, those that are zero."""
    boxes, hidden, zero = picture["boxes"], [], set()
    for i in range(len(boxes)):
        if dice[i] < cfg.region_prob:
            hidden.append(i)
        if dice[i] < cfg.region_prob * cfg.region_zero:
            zero.add(i)
    twins = set()
    for i in zero:
        twins |= {j for j in range(len(boxes)) if overlap(boxes[i], boxes[j]) > cfg.twin_iou}

    features = picture["features"].clone()
    features[sorted(zero | twins)] = 0
    return {**picture, "features": features}, hidden, zero | twins


def hand_in(monkeypatch, *tables):
    """torch.rand gives these numbers instead of its own, by shape; randint the last table's."""
    uniform, whole = list(tables[:-1]), tables[-1]

    def rand(*shape, device=None):
        shape = torch.empty(*shape).shape
        at = next(n for n, table in enumerate(uniform) if table.shape == shape)
        return uniform.pop(at)

    def randint(low, high, shape, device=None):
        assert whole.shape == shape
        return low + whole % (high - low)
    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randint", randint)


IDS = torch.tensor([7, 7, 3, 9, 5, 7])                  # six pairs of four images
# no number at its default, no two weights alike
NUMBERS = dict(positions=14, pad_id=1, mask_id=6, first_word=9, mlm=0.7, moc=1.3, mrfr=0.4, itm=2.1,
               mlm_prob=0.45, region_prob=0.6, region_zero=0.7, twin_iou=0.3, bce=0.7, ce=1.3,
               triplet=0.4, margin=0.02, pool=5)


def hand_batch():
    """Six pairs, 9 tokens and 5 regions at most; the second region is a twin of the first."""
    batch = make_batch(t=9, r=5, seed=2)
    g = torch.Generator().manual_seed(3)
    text, mask = batch["text"], batch["text_mask"].bool()
    ordinary = mask & (text != 2) & (text != 3)
    text = torch.where(ordinary, torch.randint(9, 40, text.shape, generator=g), text)
    batch["text"] = text.masked_fill(~mask, 1)

    # moved by half its width, it has an intersection over union of 1/3
    box = batch["regions_box"]
    moved = box[:, 0].clone()
    moved[:, [0, 2]] += (box[:, 0, 2:3] - box[:, 0, 0:1]) / 2
    box[:, 1] = moved * batch["regions_mask"][:, 1:2]
    batch["regions_label"][:, 3] = -1                   # the detector does not say
    return batch | {"image_id": IDS}


def draws_of_pretraining():
    """What torch.rand and randint are to give: which other pair; image or sentence; which words,
    and what becomes of them; which regions; which random word."""
    g = torch.Generator().manual_seed(0)
    sizes = ((6, 6), (6,), (6, 9), (6, 4), (6, 5))
    uniform = [torch.rand(size, generator=g) for size in sizes]
    return *uniform, torch.randint(1000, (6, 4), generator=g)


def pairs_by_hand(others, coin):
    """The last three of six pairs get another image's sentence, or another image."""
    pairs, kinds = [], []
    for n in range(6):
        image, sentence, kind = n, n, "matched"
        if n >= 3:
            allowed = [j for j in range(6) if IDS[j] != IDS[n]]
            other = max(allowed, key=lambda j: others[n, j])
            if coin[n] < 0.5:
                image, kind = other, "image"
            else:
                sentence, kind = other, "sentence"
        pairs.append((image, sentence))
        kinds.append(kind)
    return pairs, kinds


def hidden_by_hand(w, cfg, batch, pairs, draws):
    """What the transformer says of these pairs, words and regions hidden -> one dict a pair."""
    _, _, order, word_dice, region_dice, whole = draws
    noise = cfg.first_word + whole % (cfg.vocab_size - cfg.first_word)
    found = []
    for n, (image, sentence) in enumerate(pairs):
        words, picture = sentence_of(batch, sentence), picture_of(batch, image)
        read, hidden_words = hide_words(cfg, words, order[n], word_dice[n], noise[n].tolist())
        seen, hidden_regions, zero = hide_regions(cfg, picture, region_dice[n])
        tokens = read_pair(w, cfg, read, seen)
        found.append({"tokens": tokens, "words": hidden_words, "regions": hidden_regions,
                      "picture": picture, "zero": zero, "read": read,
                      "at": lambda i, first=len(words), tokens=tokens: tokens[first + i]})
    return found


def assert_gradients(model, w):
    """The model's gradients are those of the leaves w."""
    for name, p in model.named_parameters():
        assert p.grad.any(), f"{name} has no gradient"
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("global_feature", [False, True])
def test_a_step_of_pretraining_by_hand(monkeypatch, global_feature):
    model = make_model("pretrain", torch.float64, 0.4, global_feature=global_feature, **NUMBERS)
    with torch.no_grad():
        model.itm_head.bias -= 0.75                     # scores on both sides of 0
    cfg, w, batch, draws = model.cfg, leaves(model), hand_batch(), draws_of_pretraining()
    pairs, kinds = pairs_by_hand(*draws[:2])
    read = hidden_by_hand(w, cfg, batch, pairs, draws)
    assert set(kinds) == {"matched", "image", "sentence"}

    # the masked losses, of the three matched pairs; what is true is from before the masking
    mlm, moc, mrfr, fates = [], [], [], set()
    for pair in read[:3]:
        for n, word in pair["words"].items():
            mlm.append(surprise(word_logits(w, pair["tokens"][n]), word))
            now = pair["read"][n]
            fates.add("mask" if now == cfg.mask_id else "same" if now == word else "another word")
        picture = pair["picture"]
        for i in pair["regions"]:
            if picture["labels"][i] >= 0:
                moc.append(surprise(linear(pair["at"](i), w, "moc_head"), picture["labels"][i]))
            distance = linear(pair["at"](i), w, "mrfr_head") - picture["features"][i]
            mrfr.append(distance.square().sum() / cfg.region_dim)
            fates.add("zero" if i in pair["zero"] else "visible")
        if pair["zero"] - set(pair["regions"]):
            fates.add("twin")
    assert fates == {"mask", "same", "another word", "zero", "visible", "twin"}
    assert len(mrfr) > len(moc) > 1 and len(mlm) > 3

    # matching, of all six
    scores = [matching_score(w, pair["tokens"]) for pair in read]
    itm = [binary(score, kind == "matched") for score, kind in zip(scores, kinds)]
    right = [(score > 0) == (kind == "matched") for score, kind in zip(scores, kinds)]
    want = {"mlm": mean(mlm), "moc": mean(moc), "mrfr": mean(mrfr), "itm": mean(itm)}
    total = 0.7 * want["mlm"] + 1.3 * want["moc"] + 0.4 * want["mrfr"] + 2.1 * want["itm"]
    want["itm_acc"] = sum(right) / 6
    regions = sum(len(pair["picture"]["boxes"]) for pair in read)
    want["zeroed"] = sum(len(pair["zero"]) for pair in read) / regions
    total.backward()

    hand_in(monkeypatch, *draws)
    out = model.train()(batch)
    out["loss"].backward()
    assert {name: value.item() for name, value in out["logs"].items()} == pytest.approx(
        {name: torch.as_tensor(value).item() for name, value in want.items()}, rel=1e-5)
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert_gradients(model, w)


@pytest.mark.parametrize("negatives", ["both", "text", "image"])
def test_a_step_of_fine_tuning_by_hand(monkeypatch, negatives):
    model = make_model("retrieval", torch.float64, 0.4, negatives=negatives, **NUMBERS)
    w, batch = leaves(model), hand_batch()
    g = torch.Generator().manual_seed(1)
    draws = [torch.rand(6, 6, generator=g), torch.rand(6, 6, generator=g)]
    directions = ("text", "image") if negatives == "both" else (negatives,)

    def score(image, sentence):
        words, picture = sentence_of(batch, sentence), picture_of(batch, image)
        return matching_score(w, read_pair(w, model.cfg, words, picture))

    # four negatives of each pair in each direction; the image that three pairs show has but three
    matched = [score(n, n) for n in range(6)]
    bce, ce, triplet, first = [binary(s, True) for s in matched], [], [], []
    for direction, noise in zip(directions, draws):
        for n in range(6):
            allowed = [j for j in range(6) if IDS[j] != IDS[n]]
            drawn = sorted(allowed, key=lambda j: -noise[n, j])[:4]
            assert len(drawn) == (3 if IDS[n] == 7 else 4)
            if direction == "text":
                others = [score(n, j) for j in drawn]
            else:
                others = [score(j, n) for j in drawn]
            bce += [binary(s, False) for s in others]
            ce.append(surprise(torch.stack([matched[n], *others]), 0))
            triplet.append((0.02 - matched[n].sigmoid() + max(others).sigmoid()).clamp(min=0))
            first.append(matched[n] > max(others))
    assert any(triplet) and not all(triplet) and any(first) and not all(first)
    want = {"bce": mean(bce), "ce": mean(ce), "triplet": mean(triplet), "first": mean(first)}
    total = 0.7 * want["bce"] + 1.3 * want["ce"] + 0.4 * want["triplet"]
    total.backward()

    hand_in(monkeypatch, *draws, None)
    out = model.train()(batch)
    out["loss"].backward()
    assert {name: value.item() for name, value in out["logs"].items()} == pytest.approx(
        {name: torch.as_tensor(value).item() for name, value in want.items()}, rel=1e-5)
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert_gradients(model, w)


def test_masked_predictions_by_hand(monkeypatch):
    """What evaluation asks for: of matched pairs, all of them; the likeliest word and label at
    each hidden place."""
    model = make_model("pretrain", torch.float64, 0.4, **NUMBERS).eval()
    w, batch, draws = leaves(model), hand_batch(), draws_of_pretraining()
    want = {"mlm": [], "moc": []}
    for pair in hidden_by_hand(w, model.cfg, batch, [(n, n) for n in range(6)], draws):
        places = [(word_logits(w, pair["tokens"][n]), word) for n, word in pair["words"].items()]
        want["mlm"].append(sorted((logits.argmax().item(), word) for logits, word in places))
        labels, places = pair["picture"]["labels"], []
        for i in pair["regions"]:
            if labels[i] >= 0:
                places.append((linear(pair["at"](i), w, "moc_head").argmax().item(), labels[i]))
        want["moc"].append(sorted(places))

    assert set(make_model(moc=0.0).masked_predictions(batch)) == {"mlm"}
    hand_in(monkeypatch, *draws)
    found = model.masked_predictions(batch)
    assert set(found) == {"mlm", "moc"}
    for name, (predicted, true) in found.items():
        assert predicted.dtype == true.dtype == torch.long
        for n in range(6):
            live = true[n] != -100
            got = sorted(zip(predicted[n][live].tolist(), true[n][live].tolist()))
            assert got == want[name][n]
    assert sum(map(len, want["mlm"])) > 10 and sum(map(len, want["moc"])) > 5


class Factor(torch.nn.Module):
    """Stands where a dropout stood: a number in training, nothing in evaluation."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x if self.training else x


@torch.no_grad()
def test_dropout_is_where_bert_has_it(monkeypatch):
    """On the embeddings, on attention's probabilities, on what each part of a layer adds, at the
    rate of the Config; on in training, off in evaluation."""
    model = make_model("retrieval", torch.float64, 0.4, dropout=0.3, global_feature=True)
    batch, w, drop = hand_batch(), leaves(model), {"probabilities": 1.3}
    for n, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.3
            drop[name] = 1 + n / 10
            model.set_submodule(name, Factor(drop[name]))
    assert len(drop) == 5                               # words, regions, one a layer, probabilities

    # attention's own: the factor is 1 + its rate
    real = F.scaled_dot_product_attention

    def attention(query, key, value, mask, dropout):
        return real(query, key, value, mask) * (1 + dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for factors in (drop, {}):
        got = model.train(bool(factors)).match(batch)
        for n in range(6):
            pair = sentence_of(batch, n), picture_of(batch, n)
            want = matching_score(w, read_pair(w, model.cfg, *pair, factors))
            assert got[n].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Every setting matters

def look_at_parameters(task, **changes):
    model = ib.ImageBert(config(**changes), task)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def look_at_scores(task, **changes):
    return make_model(task, spread=0.4, **changes).eval().match(make_batch()).tolist()


def step(task, **changes):
    """A training step, the same random numbers whatever is changed -> (model, what it returns)."""
    model = make_model(task, spread=0.4, **changes).train()
    torch.manual_seed(1)
    out = model(make_batch())
    out["loss"].backward()
    return model, out


def look_at_loss(task, **changes):
    return step(task, **changes)[1]["loss"].item()


def look_at_logs(task, **changes):
    return {name: value.item() for name, value in step(task, **changes)[1]["logs"].items()}


def look_at_gradients(task, **changes):
    return [p.grad.tolist() for p in step(task, **changes)[0].parameters()]


def hidden(name, task, **changes):
    model, batch = make_model(task, **changes), make_batch(60)
    batch["regions_box"][:, 1] = batch["regions_box"][:, 0] + 0.5 * batch["regions_mask"][:, 1:2]
    torch.manual_seed(1)
    return model.hide(batch)[0][name].tolist()


def look_at_words_read(task, **changes):
    return hidden("text", task, **changes)


def look_at_regions_read(task, **changes):
    return hidden("regions", task, **changes)


def look_at_pairs_read(task, **changes):
    """How many pairs go through the transformer, and which images and sentences they are."""
    model, sizes = make_model(task, **changes), []
    model.bert.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    torch.manual_seed(1)
    model(make_batch())
    return sizes


def look_at_first_weights(task, **changes):
    torch.manual_seed(0)
    return ib.ImageBert(config(**changes), task).bert.embeddings.words.weight.std().item()


def look_at_trained_words(task, **changes):
    """Ids whose embedding learns from being read: not that of [PAD]."""
    words = make_model(task, **changes).bert.embeddings
    words(torch.arange(40)[:, None])[..., 0].sum().backward()
    return words.words.weight.grad.any(-1).tolist()


def look_at_saved_numbers(task, **changes):
    """How many numbers forward keeps for backward."""
    model, saved = make_model(task, **changes).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        model(make_batch())
    return sum(saved)


class FewRegions:
    """Three regions, the same for every picture."""
    dim, classes, global_dim, most, about, label_names = 6, 5, 0, 3, "a test", []

    def __getitem__(self, n):
        corner = 10.0 * np.arange(6, dtype=np.float32).reshape(3, 2)
        return {"features": np.ones((3, 6), np.float16), "labels": np.arange(3),
                "boxes": np.concatenate([corner, corner + 5], 1), "sizes": np.array([64, 64])}


def look_at_batches(task, **changes):
    """The shapes that train.py's batches have."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        folder, shapes = Path(folder), {}
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
        (folder / "vocab.txt").write_text("\n".join(words))
        lines = [{"image": f"{n}.png", "image_id": n, "caption": "a red square"} for n in range(8)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))

        # a detector's file is another test's: here are regions without one
        def with_regions(records, views, files=""):
            found = records.subset([])
            found.regions = FewRegions()
            for record in records:
                found.append({**record, "regions": 0})
            return found

        def forward(self, batch):
            shapes.update({name: tuple(tensor.shape) for name, tensor in batch.items()})
            raise SystemExit
        patch.setattr(train.data, "with_regions", with_regions)
        patch.setattr(ib.ImageBert, "forward", forward)
        flags = dict(model="imagebert", task=task, data=folder / "pairs.jsonl", batch_size=4,
                     vocab=folder / "vocab.txt", out=folder / "run", workers=0, device="cpu",
                     evals="none", steps=1) | changes
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            train.main(argv)
    return shapes


# Of each field of Config: the task, settings beside it, another value, what that changes, and what
# it leaves as it is.
SETTINGS = {
    "width": ("pretrain", {}, 24, "parameters", ""),
    "layers": ("retrieval", {}, 3, "parameters", ""),
    "heads": ("retrieval", {}, 4, "scores", "parameters"),
    "mlp_ratio": ("retrieval", {}, 3, "parameters", ""),
    "act": ("retrieval", {}, "relu", "scores", "parameters"),
    "dropout": ("retrieval", {}, 0.5, "loss", "scores"),
    "max_text": ("retrieval", {}, 4, "batches", ""),
    "max_regions": ("retrieval", {}, 2, "batches", ""),
    "positions": ("retrieval", {}, 14, "parameters", ""),
    "vocab_size": ("retrieval", {}, 44, "parameters", ""),
    "pad_id": ("retrieval", {}, 7, "trained_words", "scores"),
    "cls_id": ("pretrain", dict(mlm_prob=0.9), 39, "words_read", "regions_read"),
    "sep_id": ("pretrain", dict(mlm_prob=0.9), 39, "words_read", "regions_read"),
    "mask_id": ("pretrain", {}, 39, "words_read", "regions_read"),
    "first_word": ("pretrain", {}, 30, "words_read", "regions_read"),
    "region_dim": ("pretrain", {}, 9, "parameters", ""),
    "region_classes": ("pretrain", {}, 9, "parameters", ""),
    "global_feature": ("retrieval", {}, True, "parameters", ""),
    "global_dim": ("retrieval", dict(global_feature=True), 9, "parameters", ""),
    "mlm": ("pretrain", {}, 3.0, "loss", "logs"),
    "moc": ("pretrain", dict(region_prob=0.7), 3.0, "loss", "logs"),
    "mrfr": ("pretrain", dict(region_prob=0.7), 3.0, "loss", "logs"),
    "itm": ("pretrain", {}, 3.0, "loss", "logs"),
    "mlm_prob": ("pretrain", {}, 0.5, "words_read", "scores"),
    "region_prob": ("pretrain", {}, 0.5, "regions_read", "words_read"),
    "region_zero": ("pretrain", {}, 0.5, "regions_read", "words_read"),
    "twin_iou": ("pretrain", {}, 0.99, "regions_read", "words_read"),
    "bce": ("retrieval", dict(ce=1.0), 3.0, "loss", "logs"),
    "ce": ("retrieval", dict(ce=1.0), 3.0, "loss", "logs"),
    "triplet": ("retrieval", dict(triplet=1.0), 3.0, "loss", "logs"),
    "margin": ("retrieval", dict(triplet=1.0), 0.9, "logs", "pairs_read"),
    "pool": ("retrieval", {}, 5, "pairs_read", "scores"),
    "negatives": ("retrieval", {}, "text", "pairs_read", "scores"),
    "init_std": ("retrieval", {}, 0.5, "first_weights", "parameters"),
    "checkpointing": ("pretrain", dict(dropout=0.3), True, "saved_numbers", "loss gradients"),
}
# what belongs to the data and stands in no command line
DATA_FIELDS = {"vocab_size", "pad_id", "cls_id", "sep_id", "mask_id", "first_word", "region_dim",
               "region_classes", "global_dim"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ib.Config)])
def test_every_setting_matters(name):
    task, beside, value, changed, kept = SETTINGS[name]
    assert value != getattr(config(**beside), name)
    for part in changed.split() + kept.split():
        look = globals()["look_at_" + part]
        before, after = look(task, **beside), look(task, **beside | {name: value})
        assert (before == after) == (part in kept.split()), part


def test_what_settings_change_is_what_they_say():
    """The numbers behind SETTINGS' words."""
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(ib.Config)}
    fields = train.fields_of(ib.Config)
    assert {field.name for field, comment, _ in fields if not train.is_flag(comment)} == DATA_FIELDS

    batches = look_at_batches("pretrain", max_text=6, max_regions=2)
    assert batches["text"] == (4, 6) and batches["regions"] == (4, 2, 6)
    learnt = look_at_trained_words("retrieval", pad_id=7)
    assert [n for n in range(40) if not learnt[n]] == [7]

    # 6 pairs and their negatives: P - 1 a direction
    assert look_at_pairs_read("retrieval", pool=5) == [6 + 2 * 6 * 4]
    assert look_at_pairs_read("retrieval", pool=2, negatives="image") == [6 + 6]
    assert look_at_first_weights("retrieval", init_std=0.1) == pytest.approx(0.1, rel=0.15)
    shapes = look_at_parameters("pretrain", mlp_ratio=3)
    assert shapes["bert.blocks.0.mlp.0.weight"] == (48, 16)
    assert shapes["mrfr_head.weight"] == (6, 16) and shapes["moc_head.weight"] == (5, 16)
    assert shapes["bert.embeddings.positions.weight"] == (12, 16)

    # recomputing is for the layers: less than half of what is kept without
    kept = [look_at_saved_numbers("pretrain", checkpointing=on) for on in (True, False)]
    assert kept[0] < 0.5 * kept[1]


def test_a_log_value_builds_no_graph():
    """Logs are detached, and what only they need keeps nothing for backward."""
    model, kept = make_model("retrieval").train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        out = model(make_batch())
    assert (2, 6, 3) not in kept                        # negatives, of which `first` takes the best
    for logs in (out["logs"], make_model().train()(make_batch())["logs"]):
        assert all(value.grad_fn is None and value.ndim == 0 for value in logs.values())


def test_a_tie_is_not_a_first_place():
    model = make_model("retrieval")
    torch.nn.init.zeros_(model.itm_head.weight)
    assert model(make_batch())["logs"]["first"] == 0


# --------------------------------------------------------------------------------------------------
# The recipe is the paper's

CONFIG = {
    "width": (768, "5.1: 768 hidden units"),
    "layers": (12, "5.1: 12-layer Transformer"),
    "heads": (12, "5.1: 12 attention heads"),
    "mlp_ratio": (4, "5.1: 3072 intermediate units"),
    "act": ("gelu", "5.1: GELU"),
    "dropout": (0.1, "5.1: dropout probability 0.1"),
    "max_text": (44, "5.1: 144 tokens, 100 of them visual"),
    "max_regions": (100, "5.1: 100 visual tokens"),
    "positions": (512, "BERT-base, which 5.1 starts from"),
    "vocab_size": (30522, "bert-base-uncased's vocab.txt"),
    "pad_id": (0, "bert-base-uncased's vocab.txt"),
    "cls_id": (101, "bert-base-uncased's vocab.txt"),
    "sep_id": (102, "bert-base-uncased's vocab.txt"),
    "mask_id": (103, "bert-base-uncased's vocab.txt"),
    "first_word": (999, "bert-base-uncased's vocab.txt: the first line after [unused993]"),
    "region_dim": (1024, "torchvision's Faster R-CNN; the paper does not say"),
    "region_classes": (91, "torchvision's; the paper's detector has 1600: Deviation 11"),
    "global_feature": (False, "4.1: in the ablation only"),
    "global_dim": (2048, "ResNet-50's, one of Table 4's three networks"),
    "mlm": (1.0, "4.3: the four tasks, without weights"),
    "moc": (1.0, "4.3: the four tasks, without weights"),
    "mrfr": (1.0, "4.3: the four tasks, without weights; of a mean over F: Deviation 3"),
    "itm": (1.0, "4.3: the four tasks, without weights"),
    "mlm_prob": (0.15, "4.3, task 1: 15%"),
    "region_prob": (0.15, "4.3, task 2: 15%"),
    "region_zero": (0.9, "4.3, task 2: zeroed 90%, kept 10%"),
    "twin_iou": (0.4, "ours: Deviation 6"),
    "bce": (1.0, "5.3, fine-tune loss: binary cross-entropy by itself is best"),
    "ce": (0.0, "5.3, fine-tune loss"),
    "triplet": (0.0, "5.3, fine-tune loss"),
    "margin": (0.2, "not printed: Deviation 1"),
    "pool": (4, "not printed: Deviation 8"),
    "negatives": ("both", "4.4: negative sentences for each image, negative images for each text"),
    "init_std": (0.02, "BERT"),
    "checkpointing": (False, "ours: memory only"),
}
STAGE = {"optimizer": ("adam", "5.1: Adam"), "lr": (1e-4, "5.1: 1e-4"),
         "schedule": ("constant", "none is printed: Deviation 9"), "epochs": (17, "5.1: 17 epochs"),
         "batch_size": (48, "5.1: 48"), "epoch_of": ("images", "they have one caption each")}
RECIPE = {
    ("pretrain", 0): {**STAGE, "limit": (2_000_000, "5.1: only sampled 2M from LAIT"),
                      "own_data": (True, "4.2: LAIT, then other data")},
    ("pretrain", 1): STAGE,
    ("retrieval", 0): {"optimizer": ("adam", "5.1: Adam"), "lr": (5e-5, "5.2: 5e-5"),
                       "schedule": ("constant", "none is printed: Deviation 9"),
                       "epochs": (130, "5.2: 130 epochs"), "batch_size": (24, "5.2: 24"),
                       "epoch_of": ("images", "not printed: Deviation 10")},
}
# Deviation 9: nothing else is printed
PLAIN = dict(weight_decay=0.0, warmup_steps=0.0, clip=0.0, accum=1, steps=0, beta2=0.999)


def test_every_number_of_the_recipe_has_its_place_in_the_paper():
    assert dataclasses.asdict(ib.Config()) == {name: value for name, (value, _) in CONFIG.items()}
    assert ib.PRESETS["base"] == {}
    stages = {}
    for task, table in ib.RECIPE.items():
        for n, row in enumerate(table if isinstance(table, list) else [table]):
            stages[task, n] = row
    assert set(stages) == set(RECIPE)
    for key, row in stages.items():
        assert row == {name: value for name, (value, _) in RECIPE[key].items()}, key


@pytest.mark.parametrize("task,stage,lr,limit", [
    ("pretrain", 0, 1e-4, 2_000_000), ("pretrain", 1, 1e-4, 0), ("retrieval", 0, 5e-5, 0)])
def test_the_optimizer_is_plain_adam(task, stage, lr, limit):
    """What reaches the optimizer with --preset base: one rate from the first step to the last,
    for every parameter, no decay."""
    loop, cfg = train.settings(ib, "base", task, {}, stage)
    assert cfg == ib.Config() and loop.limit == limit
    assert {name: getattr(loop, name) for name in PLAIN} == PLAIN
    assert {train.learning_rate(n, 1000, loop) for n in (0, 1, 500, 999)} == {lr}

    model = make_model(task)
    optimizer = train.make_optimizer(model, loop)
    assert type(optimizer) is torch.optim.Adam
    trained = 0
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"]) == (lr, (0.9, 0.999), 0.0)
        trained += len(group["params"])
    assert trained == len(list(model.parameters()))


@pytest.mark.parametrize("task", ib.TASKS)
def test_norms_and_first_weights_are_berts(task):
    """LayerNorm's epsilon; biases 0, weights of standard deviation init_std."""
    model = ib.ImageBert(config(width=64, init_std=0.3), task)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-12, name
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any(), name
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(0.3, rel=0.1), name


def test_what_runs_around_the_model():
    """Tasks, evaluations, foreign weights, and what a sample is: regions and a caption as they
    are, without augmentation."""
    assert ib.TASKS == ("pretrain", "retrieval") and ib.INITS == ("text",)
    assert ib.BACKBONE == ("bert.", "regions.")
    assert ib.EVALS == {"pretrain": ("retrieval", "masked"), "retrieval": ("retrieval",)}
    assert ib.VIEWS == dict.fromkeys(ib.TASKS, dict(source="pairs", regions="regions",
                                                    text="caption"))
    assert train.count_stages(ib, "base", "pretrain", {"stage_data": ("a", "b")}) == 2
    assert not list(make_model().buffers())             # no memory that --init would carry over


def test_the_rows_of_tables_3_and_4():
    """What distinguishes them. Table 3's CC is Table 4's, without MRFR; one stage reads all of
    LAIT's cut, which the recipe limits in two."""
    stages = ib.TABLES["Table 3"]["rows"]
    assert "{lait},{clean} --limit 0" in stages["LAIT+CC+SBU"]
    assert "{lait} {clean}" in stages["LAIT -> (CC+SBU)"]
    assert ib.TABLES["Table 4: MRFR"]["rows"] == {"CC": "pretrain --mrfr 0",
                                                  "CC (w MRFR loss)": "pretrain --mrfr 1"}
    flags = set(re.findall(r"--(\w+)", str(ib.TABLES)))
    assert {"global_feature", "max_regions", "bce", "ce", "triplet"} <= flags


# --------------------------------------------------------------------------------------------------
# The model

FLAGS = [("pretrain", {}),
         ("pretrain", dict(mrfr=0.0, global_feature=True)),
         ("pretrain", dict(mlm=0.0, moc=0.0, mrfr=0.0)),
         ("pretrain", dict(itm=0.0)),
         ("pretrain", dict(moc=0.0)),
         ("retrieval", {}),
         ("retrieval", dict(itm=0.0)),
         ("retrieval", dict(bce=0.0, ce=1.0)),
         ("retrieval", dict(bce=0.0, triplet=1.0, negatives="text")),
         ("retrieval", dict(ce=1.0, triplet=1.0, negatives="image", global_feature=True))]


@pytest.mark.parametrize("task,flags", FLAGS)
def test_every_parameter_learns(task, flags):
    model, batch = make_model(task, region_prob=0.9, margin=2.0, **flags).train(), make_batch()
    out = model(batch)
    out["loss"].backward()
    assert math.isfinite(out["loss"].item())
    assert all(not v.requires_grad for v in out["logs"].values())
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("task,flags", FLAGS)
def test_a_model_offers_what_it_can_do(task, flags):
    model, batch = make_model(task, **flags).eval(), make_batch()
    unmatched = task == "pretrain" and flags.get("itm") == 0
    want = set() if unmatched else {"match", "image_states", "text_states"}
    if task == "pretrain" and "mlm" not in flags:
        want.add("masked_predictions")
    assert model.offers == want
    for name in want:
        getattr(model, name)(batch)


@pytest.mark.parametrize("task,n,changes,words", [
    ("pretrain", 1, {}, "--itm needs 2 pairs .* not 1"),
    ("retrieval", 1, dict(pool=2), "--pool 2 needs 2 pairs .* not 1"),
    ("retrieval", 3, {}, "--pool 4 needs 4 pairs .* not 3")])
def test_a_forward_pass_too_small_for_negatives_is_one_line(task, n, changes, words):
    with pytest.raises(SystemExit, match=words) as caught:
        make_model(task, **changes)(make_batch(n))
    assert "\n" not in str(caught.value) and "--batch_size" in str(caught.value)


def test_the_smallest_batches():
    """One pair without ITM; two with it; P pairs. A batch of one image only has no negative:
    losses of 0, no NaN, nothing called a mismatch."""
    assert make_model(itm=0.0)(make_batch(1))["loss"].item() > 0
    assert "itm" in make_model()(make_batch(2))["logs"]
    for ids in (torch.arange(4), torch.zeros(4, dtype=torch.long)):
        batch = make_batch(4) | {"image_id": ids}
        assert math.isfinite(make_model()(batch)["loss"].item())
        logs = make_model("retrieval", ce=1.0, triplet=1.0, margin=2.0)(batch)["logs"]
        assert all(math.isfinite(value) for value in logs.values())
        assert (logs["ce"] > 0 and logs["triplet"] > 0) == bool(ids.any())


@pytest.mark.parametrize("task", ib.TASKS)
def test_half_precision(task):
    model, batch = make_model(task, ce=1.0, triplet=1.0), make_batch()
    torch.manual_seed(0)
    want = model(batch)["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = model({**batch, "regions": batch["regions"].half()})["loss"]
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=0.03)


@torch.no_grad()
def test_scores_do_not_depend_on_company():
    model, batch = make_model("retrieval", global_feature=True).eval(), make_batch()
    scores = model.match(batch)

    # alone
    alone = [model.match({k: v[i:i + 1] for k, v in batch.items()}) for i in range(6)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-5, atol=1e-5)

    # with more padding, filled with rubbish
    wide = dict(batch)
    for key in ("regions", "regions_box"):
        wide[key] = torch.cat([batch[key], torch.rand(6, 5, batch[key].shape[2])], 1)
    wide["regions_mask"] = F.pad(batch["regions_mask"], (0, 5))
    wide["text"] = F.pad(batch["text"], (0, 3), value=9)
    wide["text_mask"] = F.pad(batch["text_mask"], (0, 3))
    torch.testing.assert_close(scores, model.match(wide), rtol=1e-5, atol=1e-5)

    # from states, and with the regions in another order
    states = model.image_states(batch) | model.text_states(batch)
    torch.testing.assert_close(scores, model.match(states))
    images, texts = model.image_states(batch), model.text_states(batch)
    few = model.match({name: x[[4, 1]] for name, x in images.items()} | texts)
    each = model.match({name: x[[4, 4, 4, 1, 1, 1]] for name, x in images.items()} | texts)
    torch.testing.assert_close(few, each)               # two images with three texts each
    mixed = dict(batch)
    for key in ("regions", "regions_box", "regions_mask", "regions_label"):
        mixed[key] = batch[key][:, [2, 0, 3, 1]]
    torch.testing.assert_close(scores, model.match(mixed), rtol=1e-5, atol=1e-5)

    other = batch | {"regions_global": batch["regions_global"] + 1}
    assert not torch.allclose(scores, model.match(other))


def test_the_last_layer_computes_only_what_is_read():
    """The last layer at some positions = the whole last layer, picked."""
    model, batch, shapes = make_model().eval(), make_batch(), []
    model.bert.blocks[-1].mlp.register_forward_hook(lambda *a: shapes.append(a[2].shape[1]))
    words, regions = torch.tensor([[3, 1]]).expand(6, 2), torch.tensor([[2]]).expand(6, 1)
    cls, some, some_regions = model.encode(batch, {"words": words, "regions": regions})
    everything = {"words": torch.arange(8).expand(6, 8), "regions": torch.arange(4).expand(6, 4)}
    _, text, image = model.encode(batch, everything)
    torch.testing.assert_close(some, ib.pick(text, words))
    torch.testing.assert_close(some_regions, ib.pick(image, regions))
    torch.testing.assert_close(cls, text[:, 0])
    assert shapes == [4, 13]                            # [CLS] and those asked for


STATS = {"region_dim": 77, "region_classes": 91, "global_dim": 5}


def test_setup_reads_the_regions_file():
    cfg = config(global_feature=True)
    ib.setup(cfg, "pretrain", STATS)
    assert (cfg.region_dim, cfg.region_classes, cfg.global_dim) == (77, 91, 5)


@pytest.mark.parametrize("task,weights", [("pretrain", ("mlm", "moc", "mrfr", "itm")),
                                          ("retrieval", ("bce", "ce", "triplet"))])
def test_one_loss_is_enough(task, weights):
    """The others at 0 are left out; only MOC needs regions with labels."""
    for only in weights:
        cfg = config(**dict.fromkeys(weights, 0.0) | {only: 1.0})
        classes = 91 if only == "moc" else 0
        ib.setup(cfg, task, STATS | {"region_classes": classes})
        logs = ib.ImageBert(cfg, task)(make_batch(f=77))["logs"]
        assert set(logs) & set(weights) == {only}


@pytest.mark.parametrize("flag,task,changes,stats", [
    ("--moc 0", "pretrain", dict(global_feature=True), {"region_classes": 0}),
    ("--global_feature", "pretrain", dict(global_feature=True), {"global_dim": 0}),
    ("every loss", "retrieval", dict(bce=0.0), {}),
    ("every loss", "pretrain", dict(mlm=0.0, moc=0.0, mrfr=0.0, itm=0.0), {}),
    ("--negatives", "retrieval", dict(negatives="texts"), {}),
    ("--act", "retrieval", dict(act="gleu"), {}),
    ("--pool", "retrieval", dict(pool=1), {}),
    ("--max_text", "retrieval", dict(max_text=12), {}),
    ("--width", "retrieval", dict(heads=3), {})])
def test_settings_that_cannot_work_are_one_line(flag, task, changes, stats):
    with pytest.raises(SystemExit, match=flag) as caught:
        cfg = config(**changes)
        ib.setup(cfg, task, STATS | stats)
        ib.ImageBert(cfg, task)
    assert "\n" not in str(caught.value)


def test_the_file_runs_alone(tmp_path):
    """Copied away, with nothing of the project beside it: one line a task, each with its losses."""
    shutil.copy(ib.__file__, tmp_path / "copied.py")
    done = subprocess.run([sys.executable, "-I", "copied.py"], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ib.TASKS)
    assert all("parameters" in line for line in lines)
    for line, names in zip(lines, (("mlm", "moc", "mrfr", "itm"), ("bce", "ce", "triplet"))):
        assert all(f"'{name}'" in line for name in names)


# --------------------------------------------------------------------------------------------------
# BERT's weights

def bert_state(model, head=True):
    """The weights of a model under Hugging Face's names, as BertForPreTraining has them."""
    needed, extra = ib.foreign_names(model, "text")
    state, mine = {}, model.state_dict()
    for ours, theirs in (needed | extra if head else needed).items():
        for name, rows in zip(theirs, mine[ours].chunk(len(theirs))):
            state[name if name.startswith("cls.") else "bert." + name] = rows.clone()
    state["bert.pooler.dense.weight"] = torch.zeros(2)
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    return state


def test_foreign_names_are_of_the_whole_tower():
    model = make_model()
    needed, extra = ib.foreign_names(model, "text")
    names = list(model.state_dict())
    assert set(needed) == {name for name in names if name.startswith("bert.")}
    assert set(extra) == {name for name in names if name.startswith("mlm_head.")}
    assert not ib.foreign_names(make_model("retrieval"), "text")[1]
    layer = "encoder.layer.1.attention.self."
    rows = [layer + "query.bias", layer + "key.bias", layer + "value.bias"]
    assert needed["bert.blocks.1.attention.qkv.bias"] == rows
    assert extra["mlm_head.bias"] == ["cls.predictions.bias"]
    for model, side, words in ((make_model(), "vision", "no vision tower"),
                               (make_model(act="relu"), "text", "gelu.*relu")):
        with pytest.raises(SystemExit, match=words) as caught:
            ib.foreign_names(model, side)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", [True, False])
def test_bert_weights(head):
    model, source = make_model(), make_model()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ib.load_pretrained(model, text=bert_state(source, head))
    for name, tensor in model.state_dict().items():
        loaded = name.startswith(("bert.", "mlm_head.") if head else "bert.")
        assert torch.equal(tensor, source.state_dict()[name] if loaded else before[name]), name


def test_bert_weights_that_lack_a_tensor_change_nothing():
    model, state = make_model(), bert_state(make_model())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["bert.encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(KeyError, match="encoder.layer.1.attention.self.key.bias"):
        ib.load_pretrained(model, text=state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.needs("transformers")
@torch.no_grad()
def test_the_transformer_is_transformers_bert():
    """Words alone, no regions: our layers say what transformers.BertModel says."""
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12)).eval()
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    model, batch = make_model().eval(), make_batch()
    ib.load_pretrained(model, text=theirs.state_dict())

    everywhere = torch.arange(8).expand(6, 8)
    got = model.bert(model.bert.embeddings(batch["text"]), batch["text_mask"], everywhere)
    want = theirs(batch["text"], batch["text_mask"]).last_hidden_state
    real = batch["text_mask"].bool()
    difference = (got - want)[real].abs().max().item()
    print(f"transformer - transformers.BertModel: {difference:.1e}")
    assert difference < 1e-5
