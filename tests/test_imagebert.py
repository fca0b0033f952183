"""models/imagebert.py: each equation against loops in float64 written from the paper, masking, scores;
region files; stages."""
import base64
import copy
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
import data  # noqa: E402
import eval as ev  # noqa: E402
import train  # noqa: E402
from models import imagebert as ib  # noqa: E402

torch.set_num_threads(1)


def config(**changes):
    sizes = dict(width=16, layers=2, heads=2, mlp_ratio=2, dropout=0.0, max_text=8, max_regions=4, positions=12,
                 vocab_size=40, cls_id=2, sep_id=3, mask_id=4, first_word=5, region_dim=6, region_classes=5,
                 global_dim=3)
    return ib.Config(**sizes | changes)


def make_batch(b=6, t=8, r=4, f=6, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g)
    length = torch.randint(4, t + 1, (b, 1), generator=g)
    text = torch.randint(5, 40, (b, t), generator=g)
    text[:, 0] = 2
    text.scatter_(1, length - 1, 3)
    mask = (torch.arange(t) < length).long()
    corner = 40 * rand(b, r, 2)
    regions_mask = (torch.arange(r) < torch.randint(1, r + 1, (b, 1), generator=g)).long()
    boxes = torch.cat([corner, corner + 2 + 20 * rand(b, r, 2)], -1) * regions_mask[..., None]
    return {"text": text * mask, "text_mask": mask,
            "regions": torch.randn(b, r, f, generator=g) * regions_mask[..., None], "regions_box": boxes,
            "regions_size": torch.tensor([[64.0, 80.0]]).repeat(b, 1), "regions_mask": regions_mask,
            "regions_label": torch.randint(0, k, (b, r), generator=g).masked_fill(regions_mask == 0, -1),
            "regions_global": rand(b, 3),
            "image_id": torch.arange(b)}


def make_model(task="pretrain", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = ib.ImageBert(config(**changes), task)
    with torch.no_grad():                                           # no bias or norm at its neutral start
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------------------ equations

def test_imagebert_eq1():
    """e = LN(v + s + p_img + p_seq), number by number."""
    model, batch = (make_model(dtype=torch.float64),
                    {k: v.double() if v.is_floating_point() else v for k, v in make_batch().items()})
    got, _ = model.embed_images(batch["regions"], batch["regions_box"], batch["regions_size"], batch["regions_mask"])
    tables, embed = model.bert.embeddings, model.regions
    for b in range(2):
        for i in range(4):
            x0, y0, x1, y1 = batch["regions_box"][b, i].tolist()
            w, h = batch["regions_size"][b].tolist()
            c = [x0 / w, y0 / h, x1 / w, y1 / h, (x1 - x0) * (y1 - y0) / (w * h)]
            e = []
            for d in range(16):
                v = (sum(embed.feature.weight[d, j].item() * batch["regions"][b, i, j].item() for j in range(6))
                     + embed.feature.bias[d].item())
                p_img = sum(embed.box.weight[d, j].item() * c[j] for j in range(5)) + embed.box.bias[d].item()
                s = tables.token_type_embeddings.weight[1, d].item()
                p_seq = tables.position_embeddings.weight[11, d].item()         # the one dummy position of all regions
                e.append(v + s + p_img + p_seq)
            mean = sum(e) / 16
            var = sum((x - mean) ** 2 for x in e) / 16
            for d in range(16):
                want = ((e[d] - mean) / math.sqrt(var + 1e-12) * embed.LayerNorm.weight[d].item()
                        + embed.LayerNorm.bias[d].item())
                assert got[b, i, d].item() == pytest.approx(want, abs=1e-9)


def test_the_global_feature_is_one_more_token():
    """Eq. 1 with the CNN's feature in place of a region's and the whole image as its box;
    in every image, behind the regions."""
    model, batch = make_model(global_feature=True), make_batch()
    got, mask = model.images_of(batch)
    tables, embed = model.bert.embeddings, model.regions
    both = tables.token_type_embeddings.weight[1] + tables.position_embeddings.weight[11]
    code = ib.box_code(batch["regions_box"], batch["regions_size"])
    want = embed.LayerNorm(embed.image(batch["regions_global"]) + both + embed.box(torch.tensor([0.0, 0, 1, 1, 1])))
    assert got.shape[1] == 5 and torch.equal(mask, F.pad(batch["regions_mask"], (0, 1), value=1))
    torch.testing.assert_close(got[:, 4], want)
    torch.testing.assert_close(got[:, :4], embed.LayerNorm(embed.feature(batch["regions"]) + both + embed.box(code)))


def test_words_are_word_plus_segment_plus_position():
    model, batch = make_model(), make_batch()
    tables = model.bert.embeddings
    want = [[tables.word_embeddings.weight[w] + tables.token_type_embeddings.weight[0]
             + tables.position_embeddings.weight[n] for n, w in enumerate(row)] for row in batch["text"].tolist()]
    torch.testing.assert_close(tables(batch["text"]), tables.LayerNorm(torch.stack([torch.stack(row) for row in want])))


def check_masked_ce(loss):
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


def test_imagebert_eq2():
    check_masked_ce(ib.mlm_loss)


def test_imagebert_eq3():
    check_masked_ce(ib.moc_loss)


def test_imagebert_eq4():
    g = torch.Generator().manual_seed(2)
    h, r = (torch.randn(3, 4, 5, generator=g, dtype=torch.float64),
            torch.randn(3, 4, 5, generator=g, dtype=torch.float64))
    live = torch.tensor([[1, 0, 1, 1], [0] * 4, [0, 1, 0, 0]]).bool()
    terms = [sum((h[b, m, d].item() - r[b, m, d].item()) ** 2 for d in range(5))
             for b in range(3) for m in range(4) if live[b, m]]
    assert ib.mrfr_loss(h, r, live).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert ib.mrfr_loss(h, r, live & False).item() == 0


def test_imagebert_eq5():
    s, y = torch.tensor([2.0, -1.0, 0.3, 40.0, -200.0]), torch.tensor([1.0, 0, 1, 0, 1])
    want = -sum(y_ * math.log(max(sigmoid(s_), 1e-300)) + (1 - y_) * math.log(1 - sigmoid(s_))
                for s_, y_ in zip(s[:3].tolist(), y[:3].tolist())) / 3
    assert ib.itm_loss(s[:3], y[:3]).item() == pytest.approx(want, rel=1e-5)
    # saturated: finite, not log(0)
    assert ib.itm_loss(s, y).item() == pytest.approx((3 * want + 40 + 200) / 5, rel=1e-4)


def test_imagebert_eq6():
    c, y, live = (torch.tensor([0.5, -3.0, 1.0, 9.0]), torch.tensor([1.0, 0, 0, 1]),
                  torch.tensor([True, True, True, False]))
    want = -sum(b * math.log(sigmoid(a)) + (1 - b) * math.log(1 - sigmoid(a))
                for a, b, n in zip(c.tolist(), y.tolist(), live) if n) / 3
    assert ib.bce_loss(c, y, live).item() == pytest.approx(want, rel=1e-5)


def test_imagebert_eq7():
    s = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 9.0], [1.0, 7.0, 7.0]])
    live = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()           # the last row has no negative
    want = [-math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(-1.0) + math.exp(2.0))),
            -math.log(math.exp(3.0) / (math.exp(3.0) + 1))]
    assert ib.ce_loss(s, live).item() == pytest.approx(sum(want) / 2, rel=1e-5)
    assert ib.ce_loss(s[2:], live[2:]).item() == 0


def test_imagebert_eq8():
    s, live = torch.tensor([[1.0, 5, 3], [2, -1, -7]]), torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    for row in range(2):
        best = max((s[row, j].item(), j) for j in range(3) if live[row, j])[1]
        assert ib.hardest_negative(s, live)[row] == best


def test_imagebert_eq9():
    pos, neg, live = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.4, 0.8]), torch.tensor([True, True, False])
    want = [max(0, 0.2 - p + n) for p, n, ok in zip(pos.tolist(), neg.tolist(), live) if ok]
    assert ib.triplet_loss(pos, neg, live).item() == pytest.approx(sum(want) / 2, rel=1e-5) and want[0] == 0 < want[1]


# -------------------------------------------------------------------------------------------------------------- masking

def test_region_masking_rates():
    torch.manual_seed(0)
    b, r = 4000, 20
    mask = (torch.arange(r) < torch.randint(1, r + 1, (b, 1))).long()
    x0 = 10.0 * torch.arange(r).expand(b, r)                                # no two boxes touch
    boxes = torch.stack([x0, x0 * 0, x0 + 5, x0 * 0 + 5], -1)
    regions = torch.rand(b, r, 3) + 1
    out, places, live = ib.mask_regions(regions, boxes, mask)
    chosen = torch.zeros(b, r, dtype=torch.bool).scatter(1, places, live)
    gone = (out == 0).all(-1)
    assert not chosen[mask == 0].any() and not gone[~chosen].any() and torch.equal(out[~gone], regions[~gone])
    n = mask.sum().item()
    assert (chosen.sum() / n == pytest.approx(0.15, abs=0.01)
            and gone.sum() / chosen.sum() == pytest.approx(0.9, abs=0.01))
    assert places.shape[1] == math.ceil(3 + 4 * math.sqrt(2.55))
    assert [row.unique().numel() for row in places] == [places.shape[1]] * b
    for r, once_in in ((100, 24_000), (36, 9_600)):                 # how often Deviation 5's cap takes a region away
        cap = ib.mask_regions(torch.zeros(1, r, 1), torch.zeros(1, r, 4), torch.ones(1, r))[1].shape[1]
        more = sum(math.comb(r, k) * 0.15 ** k * 0.85 ** (r - k) for k in range(cap + 1, r + 1))
        assert 1 / more == pytest.approx(once_in, rel=0.02) and f"{once_in:,}" in ib.__doc__


def test_a_twin_gives_nothing_away():
    torch.manual_seed(0)
    box = (torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 10], [0, 0, 10, 40], [50, 50, 60, 60], [0, 0, 0, 0]])
           .expand(3000, 5, 4))
    regions, mask = torch.ones(3000, 5, 2), torch.tensor([1, 1, 1, 1, 0]).expand(3000, 5)
    iou = ib.box_iou(box[:1])[0]
    assert (iou[0, 1].item() == pytest.approx(0.9) and iou[0, 2].item() == pytest.approx(0.25)
            and iou[0, 3] == 0 and iou[4, 4] == 0)
    out, places, live = ib.mask_regions(regions, box, mask)
    chosen, gone = torch.zeros(3000, 5, dtype=torch.bool).scatter(1, places, live), (out == 0).all(-1)
    assert torch.equal(gone[:, 0], gone[:, 1])                              # 0 and 1 go together, 2 overlaps too little
    assert (gone[:, 1] & ~chosen[:, 1]).sum() > 50 and not (gone[:, 2:] & ~chosen[:, 2:]).any() and not gone[:, 4].any()
    out, places, live = ib.mask_regions(regions, box, mask, twin_iou=1.0)
    chosen = torch.zeros(3000, 5, dtype=torch.bool).scatter(1, places, live)
    assert not ((out == 0).all(-1) & ~chosen).any()


def test_word_masking_rates():
    torch.manual_seed(0)
    text, maskable = torch.randint(5, 4000, (4000, 20)), (torch.arange(20) > 0).expand(4000, 20).clone()
    maskable[:, 13:] = False
    out, places, labels = ib.mask_tokens(text, maskable, 4, 5, 4000)
    live = labels != -100
    assert (live.sum(1) == 2).all() and maskable.gather(1, places)[live].all()          # max(1, round(0.15 * 12))
    new, old = out.gather(1, places)[live], labels[live]
    assert ((new == 4).float().mean() == pytest.approx(0.8, abs=0.02)
            and (new == old).float().mean() == pytest.approx(0.1, abs=0.02))
    assert torch.equal(out.scatter(1, places, 0), text.scatter(1, places, 0))


def test_negatives_are_of_other_images():
    torch.manual_seed(0)
    ids = torch.tensor([7, 7, 3, 9, 3, 7])
    for _ in range(50):
        index, ok = ib.others(ids, 4)
        for i in range(6):
            allowed = [j for j in range(6) if ids[j] != ids[i]]
            got = index[i][ok[i]].tolist()
            assert len(got) == min(4, len(allowed)) == len(set(got)) and set(got) <= set(allowed)
        image, sentence, y = ib.mismatch(ids, 3)
        own = torch.arange(6)
        assert (y.tolist() == [1, 1, 1, 0, 0, 0] and torch.equal(image[:3], own[:3])
                and torch.equal(sentence[:3], own[:3]))
        assert (ids[image[3:]] != ids[sentence[3:]]).all() and ((image != own) ^ (sentence != own))[3:].all()
    kinds = torch.stack([ib.mismatch(torch.arange(8), 4)[0][4:] != torch.arange(4, 8) for _ in range(300)]).float()
    assert kinds.mean() == pytest.approx(0.5, abs=0.06)                     # image or sentence, evenly
    # nobody to swap with: still matched
    assert ib.mismatch(torch.zeros(4, dtype=torch.long), 2)[2].tolist() == [1, 1, 1, 1]


def test_masked_losses_are_of_matched_pairs_only(monkeypatch):
    model, batch = make_model(), make_batch()
    seen = {}
    for name in ("mlm_loss", "moc_loss", "mrfr_loss"):
        monkeypatch.setattr(ib, name, lambda *a, name=name, real=getattr(ib, name): seen.update({name: a}) or real(*a))
    torch.manual_seed(1)
    out = model(batch)
    assert all(a[0].shape[0] == 3 for a in seen.values())                   # half of six pairs
    torch.manual_seed(1)
    image, sentence, y = ib.mismatch(batch["image_id"], 3)
    assert y.tolist() == [1, 1, 1, 0, 0, 0]
    labels = seen["mlm_loss"][1]
    assert all(w in batch["text"][i].tolist() for i in range(3) for w in labels[i].tolist() if w != -100)
    target, live = seen["mrfr_loss"][1:]
    found = [(batch["regions"][i] == t).all(-1).any().item()
             for i in range(3) for t, ok in zip(target[i], live[i]) if ok]
    assert all(found)                                                       # the features as they were before masking
    assert set(out["logs"]) == {"mlm", "moc", "mrfr", "itm", "itm_acc"}
    want = sum(out["logs"][k] for k in ("mlm", "moc", "mrfr", "itm"))
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_mismatched_pairs_are_masked_too(monkeypatch):
    """What the transformer reads: hidden words and regions in every pair, but never [CLS], [SEP] or padding hidden."""
    model, batch = make_model(region_prob=1.0, region_zero=1.0, mlm_prob=0.5), make_batch()
    read = {}
    for module, name, key in ((model.bert.embeddings, "forward", "text"), (model.regions, "forward", "regions")):
        monkeypatch.setattr(module, name,
                            lambda x, *a, key=key, real=module.forward: read.update({key: x}) or real(x, *a))
    hidden = []
    for seed in range(20):
        torch.manual_seed(seed)
        model(batch)
        torch.manual_seed(seed)
        image, sentence, y = ib.mismatch(batch["image_id"], 3)
        text, mask = batch["text"][sentence], batch["text_mask"][sentence]
        special = (mask == 0) | (text == 2) | (text == 3)
        assert y.tolist() == [1, 1, 1, 0, 0, 0] and (read["regions"] == 0).all()
        assert torch.equal(read["text"][special], text[special])
        hidden.append((read["text"] == 4).any(1))
    assert (torch.stack(hidden).float().mean(0) > 0.5).all()                # each hidden word with 80 %


def test_a_hidden_region_is_not_in_the_sequence():
    """With every region zeroed, what the transformer says does not depend on the features."""
    model, batch = make_model(region_prob=1.0, region_zero=1.0).eval(), make_batch()
    own = torch.arange(6)
    outs = []
    for regions in (batch["regions"], 5 * torch.randn(6, 4, 6)):
        torch.manual_seed(3)
        cls, found = model.hidden({**batch, "regions": regions}, own, own, 6)
        live = found["mrfr"][2]
        assert live.sum() == batch["regions_mask"].sum()
        outs.append((cls, found["moc"][0][live], found["mrfr"][0][live]))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------- model

FLAGS = [("pretrain", {}), ("pretrain", dict(mrfr=0.0, global_feature=True)),
         ("pretrain", dict(mlm=0.0, moc=0.0, mrfr=0.0)), ("pretrain", dict(itm=0.0)), ("pretrain", dict(moc=0.0)),
         ("retrieval", {}), ("retrieval", dict(bce=0.0, ce=1.0)),
         ("retrieval", dict(bce=0.0, triplet=1.0, negatives="text")),
         ("retrieval", dict(ce=1.0, triplet=1.0, negatives="image", global_feature=True))]


@pytest.mark.parametrize("task,flags", FLAGS)
def test_every_parameter_learns(task, flags):
    model, batch = make_model(task, region_prob=0.9, margin=2.0, **flags).train(), make_batch()
    out = model(batch)
    out["loss"].backward()
    assert math.isfinite(out["loss"].item()) and all(not v.requires_grad for v in out["logs"].values())
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    loop = train.Loop(weight_decay=0.1)
    groups = model.param_groups(loop)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(p.ndim < 2 for g in groups if g["weight_decay"] == 0 for p in g["params"])
    assert not callable(model.match) if flags.get("itm") == 0 else callable(model.match)


def test_checkpointing_changes_nothing():
    a, b = make_model(), make_model(checkpointing=True)
    grads = []
    for model in (a, b):
        torch.manual_seed(0)
        model.train()(make_batch())["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("task", ib.TASKS)
def test_small_batches(task, n):
    """A batch of one has no negative, a batch of one image neither: losses of 0, no NaN, nothing called a mismatch."""
    for ids in (torch.arange(n), torch.zeros(n, dtype=torch.long)):
        out = make_model(task, ce=1.0, triplet=1.0)(make_batch(n) | {"image_id": ids})
        assert math.isfinite(out["loss"].item())
        if task == "retrieval" and ids.unique().numel() == 1:
            assert out["logs"]["ce"] == 0 and out["logs"]["triplet"] == 0


def test_half_precision():
    for task in ib.TASKS:
        model = make_model(task, ce=1.0, triplet=1.0)
        torch.manual_seed(0)
        want = model(make_batch())["loss"]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            got = model({k: v.half() if k == "regions" else v for k, v in make_batch().items()})["loss"]
        assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=0.03)


def test_retrieval_losses_against_loops():
    """loss_retrieval's pairs, one at a time through match()."""
    model = make_model("retrieval", ce=1.0, triplet=1.0, pool=3).eval()
    batch = make_batch() | {"image_id": torch.tensor([0, 1, 2, 2, 4, 5])}
    torch.manual_seed(5)
    logs = model(batch)["logs"]
    torch.manual_seed(5)
    draws = [ib.others(batch["image_id"], 2) for _ in range(2)]
    one = lambda image, text: model.match({k: v[[image if k.startswith("regions") else text]]
                                           for k, v in batch.items()}).item()
    bce, ce, triplet = [(one(i, i), 1.0) for i in range(6)], [], []
    for way, (index, ok) in enumerate(draws):
        assert ok.all()
        for i in range(6):
            s = [one(i, j) if way == 0 else one(j, i) for j in index[i].tolist()]
            bce += [(x, 0.0) for x in s]
            ce.append(-math.log(math.exp(one(i, i)) / sum(map(math.exp, [one(i, i)] + s))))
            triplet.append(max(0, 0.2 - sigmoid(one(i, i)) + sigmoid(max(s))))
    assert logs["bce"].item() == pytest.approx(-sum(y * math.log(sigmoid(x)) + (1 - y) * math.log(1 - sigmoid(x))
                                                    for x, y in bce) / len(bce), rel=1e-4)
    assert (logs["ce"].item() == pytest.approx(sum(ce) / 12, rel=1e-4)
            and logs["triplet"].item() == pytest.approx(sum(triplet) / 12, rel=1e-4))


def test_scores_do_not_depend_on_company():
    model, batch = make_model("retrieval", global_feature=True).eval(), make_batch()
    with torch.no_grad():
        all_ = model.match(batch)
        alone = torch.cat([model.match({k: v[i:i + 1] for k, v in batch.items()}) for i in range(6)])
        torch.testing.assert_close(all_, alone, rtol=1e-5, atol=1e-5)
        wide = dict(batch)                                                  # more padding, filled with rubbish
        for key in ("regions", "regions_box"):
            wide[key] = torch.cat([batch[key], torch.rand(6, 5, batch[key].shape[2])], 1)
        wide["regions_mask"] = F.pad(batch["regions_mask"], (0, 5))
        wide["text"], wide["text_mask"] = F.pad(batch["text"], (0, 3), value=9), F.pad(batch["text_mask"], (0, 3))
        torch.testing.assert_close(all_, model.match(wide), rtol=1e-5, atol=1e-5)
        states = model.image_states(batch) | model.text_states(batch)
        torch.testing.assert_close(all_, model.match(states))
        order = torch.tensor([2, 0, 3, 1])                                  # regions have no order
        mixed = batch | {k: batch[k][:, order] for k in ("regions", "regions_box", "regions_mask", "regions_label")}
        torch.testing.assert_close(all_, model.match(mixed), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(all_, model.match(batch | {"regions_global": batch["regions_global"] + 1}))


def test_only_what_is_read_is_computed():
    """The last layer at some places = the whole last layer, picked."""
    model, batch = make_model().eval(), make_batch()
    places = torch.tensor([[3, 9, 1]]).expand(6, 3)
    sequence = model.bert.embeddings(batch["text"]), batch["text_mask"], *model.images_of(batch)
    cls, some = model.encode(*sequence, places)
    _, everything = model.encode(*sequence, torch.arange(12).expand(6, 12))
    torch.testing.assert_close(some, ib.pick(everything, places))
    torch.testing.assert_close(cls, everything[:, 0])


def test_masked_predictions():
    model, batch = make_model().eval(), make_batch()
    found = model.masked_predictions(batch)
    assert set(found) == {"mlm", "moc"}
    for guess, truth in found.values():
        assert guess.shape == truth.shape and guess.dtype == truth.dtype == torch.long and len(guess) == 6
    assert set(make_model(moc=0.0).masked_predictions(batch)) == {"mlm"}


def test_recipe_is_the_papers():
    base = ib.Config()
    assert (base.max_text + base.max_regions == 144
            and (base.width, base.layers, base.heads, base.mlp_ratio * base.width) == (768, 12, 12, 3072))
    for stage in (0, 1):
        loop, cfg = train.settings(ib, "base", "pretrain", {}, stage)
        assert ((loop.optimizer, loop.lr, loop.batch_size, loop.epochs, loop.schedule)
                == ("adam", 1e-4, 48, 17, "constant"))
        assert loop.limit == (2_000_000, 0)[stage]
    loop, _ = train.settings(ib, "base", "retrieval", {})
    assert (loop.optimizer, loop.lr, loop.batch_size, loop.epochs) == ("adam", 5e-5, 24, 130)


def test_setup_reads_the_regions_file():
    cfg = config(global_feature=True)
    stats = {"region_dim": 77, "region_classes": 91, "global_dim": 5}
    ib.setup(cfg, "pretrain", stats)
    assert (cfg.region_dim, cfg.region_classes, cfg.global_dim) == (77, 91, 5)
    for change, words in (({"region_classes": 0}, "--moc 0"), ({"global_dim": 0}, "--global_feature")):
        with pytest.raises(SystemExit, match=words):
            ib.setup(config(global_feature=True), "pretrain", stats | change)
    with pytest.raises(SystemExit, match="every loss"):
        ib.setup(config(bce=0.0), "retrieval", stats)
    for change in (dict(negatives="texts"), dict(act="gleu"), dict(pool=1), dict(max_text=12), dict(heads=3)):
        with pytest.raises(SystemExit, match="--" + {"heads": "width"}.get(*change, *change)) as caught:
            ib.setup(config(**change), "retrieval", stats)
        assert "\n" not in str(caught.value)


def test_the_file_runs_alone(tmp_path):
    """Copied away, with nothing of the project beside it: one line a task, each with its losses."""
    shutil.copy(ib.__file__, tmp_path / "copied.py")
    done = subprocess.run([sys.executable, "-I", "copied.py"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ib.TASKS) and all("parameters" in line for line in lines)
    for line, names in zip(lines, (("mlm", "moc", "mrfr", "itm"), ("bce", "ce", "triplet"))):
        assert all(f"'{name}'" in line for name in names)


@pytest.mark.parametrize("heads", [True, False])
def test_bert_weights(tmp_path, heads):
    model, source = make_model(), make_model()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    state = {}
    for key, value in source.state_dict().items():                          # as bert-base-uncased names them
        key = (key.replace("mlm_head.transform.", "cls.predictions.transform.")
               .replace("mlm_head.bias", "cls.predictions.bias"))
        if key.startswith("bert.") or heads and key.startswith("cls."):
            key = (key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                   if heads else key[5:])
            state[key] = value.clone()
    state |= ({"bert.pooler.dense.weight": torch.zeros(2), "cls.seq_relationship.bias": torch.zeros(2)}
              if heads else {"pooler.dense.bias": torch.zeros(2)})
    save_file(state, tmp_path / "bert.safetensors")
    line = ib.load_pretrained(model, text=str(tmp_path / "bert.safetensors"))
    new = "itm_head, mlm_head, moc_head, mrfr_head, regions".replace("mlm_head, ", "" if heads else "mlm_head, ")
    count = sum(k.startswith(("bert.", "mlm_head.")[:1 + heads]) for k in model.state_dict())
    assert (f"which fill {count} here; missing 0; unexpected" in line and "pooler.dense" in line
            and line.endswith(f"not in this file: {new}"))
    for key, value in model.state_dict().items():
        loaded = key.startswith("bert.") or heads and key.startswith("mlm_head.")
        assert torch.equal(value, source.state_dict()[key]) == loaded, key
    torch.save({**state, "encoder.layer.7.output.dense.bias": torch.zeros(16)}, tmp_path / "deep.pt")
    with pytest.raises(SystemExit, match="layer.7"):
        ib.load_pretrained(make_model(), text=str(tmp_path / "deep.pt"))
    key = next(k for k in state if "word_emb" in k)
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "less.pt")
    with pytest.raises(SystemExit, match="1 of this tower's .* not filled: bert.embeddings.word"):
        ib.load_pretrained(make_model(), text=str(tmp_path / "less.pt"))
    torch.save({**state, key: torch.zeros(30, 16)}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="vocabulary"):
        ib.load_pretrained(make_model(), text=str(tmp_path / "other.pt"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "bert.safetensors").read_bytes()[:200])
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, words in (("cut.safetensors", "cannot be read as weights"), ("text.pt", "cannot be read as weights"),
                        ("list.pt", "not a state dict"), (".", "holds neither")):
        with pytest.raises(SystemExit, match=words):
            ib.load_pretrained(make_model(), text=str(tmp_path / name))
    (tmp_path / "hub").mkdir()                                  # as train.py fetches it: a folder with its config.json
    shutil.copy(tmp_path / "bert.safetensors", tmp_path / "hub" / "model.safetensors")
    for words, changes in (("", {}), ("num_attention_heads", {"num_attention_heads": 4}),
                           ("model_type", {"model_type": "roberta"})):
        (tmp_path / "hub" / "config.json").write_text(
            json.dumps({"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 2} | changes))
        if words:
            with pytest.raises(SystemExit, match=words):
                ib.load_pretrained(make_model(), text=str(tmp_path / "hub"))
        else:
            assert "missing 0" in ib.load_pretrained(make_model(), text=str(tmp_path / "hub"))


# --------------------------------------------------------------------------------------------------------- region files

def found(name, n, seed=0, dim=6):
    g = np.random.default_rng([seed, n])
    corner = g.random((n, 2)) * 20
    return {"name": name, "size": (64, 48), "boxes": np.concatenate([corner, corner + 9], 1),
            "labels": g.integers(0, 3, n), "scores": -np.sort(-g.random(n)),
            "features": g.standard_normal((n, dim))}


META = {"detector": "a test", "root": "/pictures", "label_names": '["a", "b", "c"]'}


def test_regions_file_round_trip(tmp_path):
    out = str(tmp_path / "r.safetensors")
    items = [(f"{n}.jpg", n % 5) for n in range(23)] + [None]
    bad = data.collect_regions(out, items, len(items), lambda i: i and found(*i), META, shard=4, quiet=True)
    assert bad == 1 and not Path(out + ".parts").exists()
    r = data.Regions([out])
    assert (len(r), r.dim, r.classes, r.most, r.global_dim, r.about) == (23, 6, 3, 4, 0, "a test")
    for n in range(23):
        want = found(*items[n])
        for key in ("boxes", "labels", "scores", "features"):
            np.testing.assert_allclose(r[n][key], want[key], atol=2e-3)
        assert r[n]["sizes"].tolist() == [64, 48]
    assert next(r.tables())["7.jpg"] == 7
    official = load_file(out)                                               # the format is what it says it is
    assert (official["features"].shape == (sum(n % 5 for n in range(23)), 6)
            and official["offsets"][-1] == len(official["labels"]))
    # mapped, not read
    assert isinstance(r.files[0][0]["features"].base, np.ndarray) and not r.files[0][0]["features"].flags.owndata
    assert len(pickle.dumps(r)) < 300 and np.array_equal(pickle.loads(pickle.dumps(r))[9]["features"], r[9]["features"])
    two = data.Regions([out, out])
    assert len(two) == 46 and np.array_equal(two[30]["features"], r[7]["features"])
    data.collect_regions(out + "2", items, len(items), lambda i: i and found(*i, dim=7), META, quiet=True)
    with pytest.raises(data.DataError, match="differ in feature size"):
        data.Regions([out, out + "2"])
    with pytest.raises(data.DataError, match="picture 1.jpg: .* not finite"):
        data.collect_regions(out + "3", items, len(items),
                             lambda i: i and {**found(*i), "features": np.full((i[1], 6), 1e6)}, META, quiet=True)
    Path(out).write_bytes(Path(out).read_bytes()[:300])
    with pytest.raises(data.DataError, match="not a whole"):
        data.Regions([out])


def test_regions_go_on_after_a_stop(tmp_path):
    items, looked = [(f"{n}.jpg", 2) for n in range(10)], []

    def look(item):
        looked.append(item[0])
        if len(looked) == 8:
            raise KeyboardInterrupt
        return found(*item)
    out = str(tmp_path / "r.safetensors")
    with pytest.raises(KeyboardInterrupt):
        data.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    for other in (dict(metadata={**META, "detector": "another"}),
                  dict(metadata=META, source="other pictures, as many")):
        with pytest.raises(data.DataError, match="begun with other settings or other pictures"):
            data.collect_regions(out, items, 10, look, **other, shard=3, quiet=True)
    data.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    assert looked[8:] == ["6.jpg", "7.jpg", "8.jpg", "9.jpg"]               # two parts of three were whole
    whole = str(tmp_path / "w.safetensors")
    data.collect_regions(whole, items, 10, lambda i: found(*i), META, shard=3, quiet=True)
    assert Path(out).read_bytes() == Path(whole).read_bytes()


def test_regions_survive_kill_9_at_every_point(tmp_path, monkeypatch):
    """A process that dies without a chance to tidy up, at each look, each renaming and each removal: the same command
    then makes the file that an undisturbed one makes, and another command is refused as long as a part of the first one
    lies there."""
    items, events = [(f"{n}.jpg", 2) for n in range(7)], []

    def at_last():
        events.append(0)
        if len(events) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(real):
        return lambda *args: (at_last(), real(*args), at_last())[1]
    look = lambda item: found(*item)
    collect = lambda out, look=look, meta=META: data.collect_regions(str(out), items, 7, look, meta,
                                                                     shard=3, quiet=True)
    collect(tmp_path / "whole")
    whole, last, deaths = (tmp_path / "whole").read_bytes(), 0, 0
    for last in range(1, 100):
        out = tmp_path / f"{last}"
        child = os.fork()
        if not child:
            for name in ("replace", "remove", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            collect(out, dying(look))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        deaths += 1
        if list(tmp_path.glob(f"{last}.parts/*.safetensors")):
            with pytest.raises(data.DataError, match="begun with other"):
                collect(out, meta={**META, "detector": "another"})
        collect(out)
        assert out.read_bytes() == whole and not Path(f"{out}.parts").exists()
    assert deaths == 2 * (7 + 5 + 4 + 1)                        # looks; plan, parts, whole; what is removed; the folder


def stub_detector(monkeypatch):
    """A detector that finds one box in every picture, at no cost."""
    model = SimpleNamespace(to=lambda device: None, transform=SimpleNamespace(min_size=(800,), max_size=1333))
    monkeypatch.setattr(data, "load_detector", lambda *a: (model, ["none", "thing"], "a stub"))
    monkeypatch.setattr(data, "detect",
                        lambda model, image: {"features": np.ones((1, 4)), "boxes": np.array([[0.0, 0, 2, 2]]),
                                              "labels": np.array([1]), "scores": np.ones(1)})


def test_extraction_goes_on_with_the_same_pictures_only(tmp_path, monkeypatch, capsys):
    stub_detector(monkeypatch)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"c.png", b"d.png"):            # a name from a disk that is not of UTF-8
        Image.new("RGB", (20, 10), (9, 9, 9)).save(os.path.join(os.fsencode(folder), name), format="png")
    (folder / "e.jpg").write_bytes(b"no picture")
    Image.new("RGB", (1, 3000)).save(folder / "f.png")                      # resized, it would have no width left
    args = ["regions", "--images", str(folder), "--out", str(tmp_path / "r.safetensors"),
            "--shard", "1", "--device", "cpu"]
    real, seen = data.detect, []

    def stops(model, image):
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(model, image)
    monkeypatch.setattr(data, "detect", stops)
    with pytest.raises(KeyboardInterrupt):
        data.main(args)
    (folder / "a.png").rename(folder / "z.png")                             # as many pictures, but others
    with pytest.raises(data.DataError, match="other pictures"):
        data.main(args)
    (folder / "z.png").rename(folder / "a.png")
    assert data.main(args) == 0 and len(seen) == 5
    out, err = capsys.readouterr()
    assert (re.search(r"unreadable, left out +2\n", out) and "e.jpg: no image format" in err
            and "1x3000 pixels, too narrow" in err)
    names = next(data.Regions([str(tmp_path / "r.safetensors")]).tables())
    assert set(names) == {"a.png", os.fsdecode(b"caf\xe9.png"), "c.png", "d.png"}


def test_a_file_larger_than_memory(tmp_path):
    """100,000 pictures of 36 regions, 15 GB: opened, listed and read here and there in less than 100 MB
    (the file has holes)."""
    n, path = 100_000, tmp_path / "r.safetensors"
    names = [f"{i}.jpg".encode() for i in range(n)]
    small = {"offsets": np.arange(0, 36 * n + 1, 36, dtype=np.int64), "names": np.frombuffer(b"".join(names), np.uint8),
             "name_ends": np.cumsum([len(x) for x in names], dtype=np.int64)}
    header, at = {"__metadata__": {"detector": "a test"}}, 0
    for key, dtype, shape in (("offsets", "I64", [n + 1]), ("name_ends", "I64", [n]), ("labels", "I64", [36 * n]),
                              ("sizes", "I64", [n, 2]), ("boxes", "F32", [36 * n, 4]), ("scores", "F32", [36 * n]),
                              ("features", "F16", [36 * n, 2048]), ("names", "U8", [len(small["names"])])):
        size = math.prod(shape) * {"I64": 8, "F32": 4, "F16": 2, "U8": 1}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
        for key, array in small.items():
            f.seek(8 + len(text) + header[key]["data_offsets"][0])
            f.write(array.tobytes())
    assert path.stat().st_size > 14e9
    statm = Path("/proc/self/statm")
    resident = lambda: int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if statm.exists() else 0.0
    before = resident()
    r = data.Regions([str(path)])
    table = next(r.tables())
    assert len(r) == len(table) == n and table["99999.jpg"] == 99_999
    assert all(r[i]["features"].sum() == 0 and r[i]["features"].shape == (36, 2048) for i in range(0, n, 5000))
    assert resident() - before < 100


def test_making_a_file_takes_the_memory_of_one_part(tmp_path):
    look = lambda n: {**found(f"{n}.jpg", 36), "features": np.ones((36, 2048), np.float16)}  # 150 kB each, 30 MB in all
    tracemalloc.start()
    data.collect_regions(str(tmp_path / "r"), range(200), 200, look, META, shard=5, quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "r").stat().st_size > 29e6 and peak < 6e6, peak


def test_pictures_are_found_by_name(tmp_path):
    def file(name, names, root):
        data.collect_regions(str(tmp_path / name), names, None, lambda n: found(n, 1, seed=len(n)),
                             {**META, "root": root}, quiet=True)
        return str(tmp_path / name)

    def records(*images):
        r = data.Records("pairs", None)
        for n, image in enumerate(images):
            r.append({"image": image, "image_id": n})
        return r
    a = file("a", ["train/1.jpg", "val/1.jpg", "val/2.jpg"], "/data/coco")
    get = lambda files, *images: [r["regions"] for r in data.Regions(files).attach(records(*images))]
    assert get([a], "/data/coco/val/1.jpg", "/elsewhere/coco/train/1.jpg", "/elsewhere/val/2.jpg") == [1, 0, 2]
    out = data.Regions([a]).attach(records("/data/coco/val/1.jpg", "/data/coco/val/9.jpg"))
    assert len(out) == 1 and out.notes["without_regions"] == 1 and out.regions.dim == 6
    with pytest.raises(data.DataError, match="none of the 1 records"):
        get([a], "/x/9.jpg")
    b = file("b", ["1.jpg"], "/data/one")
    with pytest.raises(data.DataError, match="another picture"):            # two folders, one name
        get([b], "/x/train/1.jpg", "/x/val/1.jpg")
    c = file("c", ["1.jpg"], "/data/two")
    assert get([b, c], "/data/two/1.jpg") == [1]
    with pytest.raises(data.DataError, match="2 pictures"):
        get([b, c], "/moved/1.jpg")
    ids = file("ids", ["391895", "1000092795"], "")
    assert get([ids], "/f/COCO_val2014_000000391895.jpg", "/f/1000092795.jpg", "/f/7.jpg") == [0, 1]
    tar = file("tar", ["0.tar@512"], "/shards")
    assert get([tar], ("/anywhere/0.tar", 512, 99)) == [0]
    with pytest.raises(data.DataError, match="--regions"):
        data.with_regions(open_nothing(tmp_path), ib.VIEWS["pretrain"])
    assert data.with_regions(records("x"), {"source": "pairs", "image": "plain"}, a).regions is None


def open_nothing(tmp_path):
    r = data.Records("pairs", "train", str(tmp_path))
    r.append({"image": "x.jpg", "image_id": 0})
    return r


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def tsv_row(image_id, n, labels=False, dim=8):
    g = np.random.default_rng(image_id)
    boxes, features, scores = (g.random((n, 4)).astype("f4"), g.standard_normal((n, dim)).astype("f4"),
                               g.random(n).astype("f4"))
    kinds = g.integers(0, 1600, n)
    if labels:
        cells = [image_id, 48, 64, b64(kinds), b64(scores), b64(kinds), b64(scores), n, b64(boxes), b64(features)]
    else:
        cells = [image_id, 64, 48, n, b64(boxes), b64(features)]
    return "\t".join(map(str, cells)) + "\n", boxes, features, scores, kinds


@pytest.mark.parametrize("labels", [False, True])
def test_bottom_up_attention_files(tmp_path, labels, capsys):
    rows = [tsv_row(n, c, labels) for n, c in ((7, 10), (391895, 36), (12, 100))]
    (tmp_path / "a.tsv").write_text("".join(r[0] for r in rows))
    out = str(tmp_path / "r.safetensors")
    assert data.main(["regions", "--tsv", str(tmp_path / "a.tsv"), "--out", out, "--shard", "2"]) == 0
    assert "10 to 100" in capsys.readouterr().out
    r = data.Regions([out])
    assert (len(r), r.dim, r.classes, r.most) == (3, 8, 1600 if labels else 0, 100)
    for n, (_, boxes, features, scores, kinds) in enumerate(rows):
        order = np.argsort(-scores, kind="stable") if labels else np.arange(len(boxes))
        np.testing.assert_array_equal(r[n]["boxes"], boxes[order])
        np.testing.assert_array_equal(r[n]["features"], features[order].astype("f2"))
        np.testing.assert_array_equal(r[n]["labels"], kinds[order] if labels else -1)
        assert r[n]["sizes"].tolist() == [64, 48]


@pytest.mark.parametrize("change,words",
                         [(lambda c: c[:4], "6 or 10 columns"), (lambda c: c[:5] + ["%%"], "features is not base64"),
                          (lambda c: c[:4] + [c[4][:16], c[5]], "boxes holds 3 numbers for 3 boxes"),
                          (lambda c: c[:3] + ["0"] + c[4:], "num_boxes is '0'"),
                          (lambda c: c[:5] + ["\u00e9" + c[5][1:]], "features is not base64")])
def test_damaged_tsv(tmp_path, change, words):
    """One line, with file and line."""
    good = tsv_row(1, 3)[0]
    (tmp_path / "a.tsv").write_text(good + "\t".join(change(good.rstrip("\n").split("\t"))) + "\n", encoding="utf-8")
    with pytest.raises(data.DataError, match=f"a.tsv line 2: {words}") as caught:
        data.main(["regions", "--tsv", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "o")])
    assert "\n" not in str(caught.value)


def test_tsv_files_that_do_not_belong_together(tmp_path, monkeypatch):
    one, two, three = tsv_row(1, 3), tsv_row(2, 3), tsv_row(2, 3, dim=7)
    for folder, rows in (("a", [one]), ("b", [one, two]), ("c", [one, three])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tsv").write_text("".join(r[0] for r in rows))
    file = lambda folder, name: str(tmp_path / folder / name)
    convert = lambda folder, *more: data.main(["regions", "--tsv", file(folder, "x.tsv"),
                                               "--out", file(folder, "o"), *more])
    for shard in ("1", "1000"):                                             # within a part, and from part to part
        with pytest.raises(data.DataError, match="features of 8 numbers and .* features of 7 numbers"):
            convert("c", "--shard", shard)
        shutil.rmtree(tmp_path / "c" / "o.parts")
    with pytest.raises(data.DataError, match="--global_feature looks at pictures"):
        convert("a", "--global_feature", "resnet50")
    with pytest.raises(data.DataError, match="--tsv .*nowhere.*: no such file"):
        data.main(["regions", "--tsv", str(tmp_path / "nowhere.tsv"), "--out", str(tmp_path / "o")])
    plans = []                                                  # the same name, another file: not to be gone on with
    monkeypatch.setattr(data, "collect_regions", lambda *args, source="", **more: plans.append(source) or sys.exit())
    for folder in "aba":
        with pytest.raises(SystemExit):
            convert(folder)
    assert plans[0] == plans[2] != plans[1]


def test_detector(tmp_path, monkeypatch, capsys):
    """Torchvision's Faster R-CNN with random weights on small pictures: boxes inside, features of the boxes,
    one picture unreadable."""
    folder = tmp_path / "pictures" / "sub"
    folder.mkdir(parents=True)
    for n in range(2):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
            folder / f"{n}.png")
    (folder / "2.jpg").write_bytes(b"no picture")
    real = data.load_detector

    def small(*args):
        model, names, about = real(*args)
        # a test's patience
        model.transform.min_size, model.rpn._post_nms_top_n = (64,), {"training": 30, "testing": 30}
        return model, names, about
    monkeypatch.setattr(data, "load_detector", small)
    out = str(tmp_path / "r.safetensors")
    args = ["regions", "--images", str(tmp_path / "pictures"), "--out", out, "--random_weights", "--top", "7",
            "--min_score", "0", "--device", "cpu"]
    assert data.main(args + ["--global_feature", "resnet50"]) == 0
    text = capsys.readouterr()
    assert "RANDOM" in text.out and "not the 1,600 of Visual Genome" in text.out and "2.jpg" in text.err
    r = data.Regions([out])
    assert ((len(r), r.dim, r.classes, r.most, r.global_dim) == (2, 1024, 91, 7, 2048)
            and r.label_names[1] == "person" and "RANDOM" in r.about)
    for n in range(2):
        boxes = r[n]["boxes"]
        assert len(boxes) == 7 and (boxes >= 0).all() and (boxes[:, 2] <= 60).all() and (boxes[:, 3] <= 40).all()
        assert (np.diff(r[n]["scores"]) <= 0).all() and (r[n]["labels"] > 0).all()
    model = small("", 7, 0.0, True)[0]
    picture = torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        want = model([picture])[0]                                          # torchvision's own way through
    for key in ("boxes", "labels", "scores"):
        np.testing.assert_allclose(r[1][key], want[key].numpy(), rtol=1e-4, atol=1e-4)
    again = data.detect(model, torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1).float() / 255)
    np.testing.assert_allclose(again["features"].astype("f2"), r[1]["features"], rtol=1e-2, atol=1e-3)
    none = data.detect(small("", 7, 0.99, True)[0], torch.rand(3, 40, 60))
    assert none["features"].shape == (0, 1024) and none["boxes"].shape == (0, 4)    # an image without regions is one
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    for weights, words in (("nowhere.pth", "no such file"), (str(tmp_path / "w.safetensors"), "no Faster R-CNN")):
        with pytest.raises(data.DataError, match=words):
            data.main(args[:5] + ["--weights", weights])
    state = model.state_dict()
    torch.save(state, tmp_path / "good.pth")
    loaded, names, about = real(str(tmp_path / "good.pth"), 5, 0.1)
    assert (torch.equal(loaded.state_dict()["rpn.head.cls_logits.weight"], state["rpn.head.cls_logits.weight"])
            and "RANDOM" not in about and len(names) == 91)


@pytest.mark.parametrize("name,dim", [("densenet121", 1024), ("googlenet", 1024)])
def test_global_features(tmp_path, name, dim):
    model, about = data.load_global(name, "", random=True)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, dim) and "RANDOM" in about


# ------------------------------------------------------------------------------------------------------- a little world

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue green white black and circle square".split()
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 pictures of two squares of different colors, their records with boxes, and a regions file made of these."""
    root = tmp_path_factory.mktemp("world")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    names, rows = list(COLORS), []
    for n in range(24):
        left, right = names[n % 5], names[(n % 5 + 1 + n % 4) % 5]
        image = Image.new("RGB", (40, 20), (128, 128, 128))
        image.paste(COLORS[left], (2, 2, 18, 18))
        image.paste(COLORS[right], (22, 2, 38, 18))
        image.save(root / f"{n}.png")
        rows.append({"image": f"{n}.png", "image_id": n,
                     "caption": [f"a {left} square and a {right} square", f"{right} and {left}"],
                     "boxes": [[2, 2, 18, 18], [22, 2, 38, 18]], "labels": [names.index(left), names.index(right)]})
    for name, part in (("pairs", rows), ("small", rows[:10])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    records = data.open_source("pairs", str(root / "pairs.jsonl"), "train")
    data.collect_regions(str(root / "r.safetensors"), records, 24, lambda r: data.box_regions(r, Path(r["image"]).name),
                         {"detector": data.STAND_IN, "root": str(root), "label_names": json.dumps(names)}, quiet=True)
    return root


def command(world, out, *more, model="imagebert"):
    return ["--model", model, "--data", str(world / "pairs.jsonl"), "--vocab", str(world / "vocab.txt"),
            "--out", str(out), "--batch_size", "8", "--steps", "3",
            "--workers", "0", "--device", "cpu", "--evals", "none", *map(str, more)]


def ours(world, out, *more):
    return command(world, out, "--regions", world / "r.safetensors", "--width", 16, "--layers", 1, "--heads", 2, *more)


def test_the_regions_view(world):
    records = data.with_regions(data.open_source("pairs", str(world / "small.jsonl"), "test"), ib.VIEWS["pretrain"],
                                str(world / "r.safetensors"))
    tok = data.get_tokenizer(world / "vocab.txt")
    ds = data.Views(records, ib.VIEWS["pretrain"], tok, None, 8, max_regions=3)
    s = ds[4, 0]
    assert (s["regions"].shape == (3, 128) and s["regions"].dtype == torch.float16
            and s["regions_mask"].tolist() == [1, 1, 0])
    assert (s["regions_box"].tolist() == [[2, 2, 18, 18], [22, 2, 38, 18], [0] * 4]
            and s["regions_size"].tolist() == [40, 20])
    assert s["regions_label"].tolist()[2] == -1 and not s["regions"][2].any() and s["regions"][:2].any()
    assert (data.Views(records, ib.VIEWS["pretrain"], tok, None, 8, max_regions=1)[4]["regions_box"].tolist()
            == [[2, 2, 18, 18]])
    batch = next(data.iter_eval(records, ib.VIEWS["pretrain"], tok, None, 8, what="image", batch_size=4))
    assert batch["regions"].shape == (4, 2, 128) and "text" not in batch
    batch = next(data.iter_eval(records, ib.VIEWS["pretrain"], tok, None, 8, what="text", batch_size=4))
    assert "regions" not in batch and batch["text"].shape == (4, 8)


def test_training_fine_tuning_and_evaluation(world, tmp_path, capsys):
    train.main(ours(world, tmp_path / "pre", "--evals", "default", "--eval_split", "train", "--eval_limit", "6"))
    text = capsys.readouterr().out
    assert "stand-in for a detector" in text and "match, all 72 pairs" in text and "moc" in text
    result = json.loads((tmp_path / "pre" / "eval-retrieval.json").read_text())
    assert result["protocol"]["images"] == 6 and result["protocol"]["regions"] == data.STAND_IN
    masked = json.loads((tmp_path / "pre" / "eval-masked.json").read_text())["metrics"]
    assert set(masked) == {"mlm", "mlm_baseline", "moc", "moc_baseline"}
    train.main(ours(world, tmp_path / "ft", "--task", "retrieval", "--init", tmp_path / "pre", "--ce", 1,
                    "--triplet", 1, "--steps", 0))
    assert "new: none; dropped: mlm_head, moc_head, mrfr_head" in capsys.readouterr().out   # the matching head stays
    model, info = ev.load_run(tmp_path / "ft")
    before = ev.load_run(tmp_path / "pre")[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(SystemExit, match="does not offer"):
        ev.main([str(tmp_path / "ft"), "--task", "masked"])
    with pytest.raises(SystemExit, match="name their files, --regions"):
        train.main(command(world, tmp_path / "no"))


def test_regions_stand_for_the_pictures(world, tmp_path, capsys):
    """Who has features has often no pictures: nothing opens them, nothing asks for them.
    A model that looks at them does."""
    shutil.copy(world / "pairs.jsonl", tmp_path / "pairs.jsonl")
    extra = json.dumps({"image": "unknown.png", "image_id": 99, "caption": ["a red square"]}) + "\n"
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + extra)
    train.main(ours(world, tmp_path / "run", "--data", tmp_path / "pairs.jsonl", "--steps", 1, "--evals", "retrieval",
                    "--eval_split", "train"))
    out, err = capsys.readouterr()
    assert "24 records of" in out and "without_regions 1" in out and "missing" not in out.split("parameters")[0]
    assert "1 of 25 records left out" in err
    result = json.loads((tmp_path / "run" / "eval-retrieval.json").read_text())
    assert result["protocol"]["images"] == 24 and result["protocol"]["unreadable_images"] == 0
    with pytest.raises(data.DataError, match="none of the 25 image files"):
        train.main(command(world, tmp_path / "no", "--data", tmp_path / "pairs.jsonl", model="codis"))
    with pytest.raises(data.DataError, match="--regions .*nowhere: no such file"):
        train.main(ours(world, tmp_path / "no", "--regions", tmp_path / "nowhere"))


def test_all_pairs_and_a_shortlist(world, tmp_path, capsys):
    """A shortlist of everything gives what scoring every pair gives; a short one is another run's, and says so."""
    train.main(ours(world, tmp_path / "run", "--steps", 0))
    train.main(command(world, tmp_path / "dual", "--steps", 0, "--image_size", 72, model="codis"))
    opts = [str(tmp_path / "run"), "--task", "retrieval", "--split", "train",
            "--data", str(world / "small.jsonl"), "--pairs", "7"]
    every = ev.main(opts)["retrieval"]
    model, info = ev.load_run(tmp_path / "run")
    records = data.with_regions(data.open_source("pairs", str(world / "small.jsonl"), "train"), ib.VIEWS["pretrain"],
                                str(world / "r.safetensors"))
    tok = data.get_tokenizer(world / "vocab.txt")
    ds = data.Views(records, ib.VIEWS["pretrain"], tok, None, model.cfg.max_text, train=False, max_regions=3)
    texts, owner = data.flat_captions(records)
    sim = torch.zeros(10, 20)
    with torch.no_grad():                                                   # one pair at a time
        for i in range(10):
            for c in range(20):
                image, sentence = ds.sample(i)[0], ds.sample(c // 2, caption=c % 2)[0]
                sim[i, c] = model.match(data.collate([image | {k: sentence[k] for k in ("text", "text_mask")}]))
    want = ev.recall(sim, owner)
    assert {k: every["metrics"][k] for k in want} == pytest.approx(want)
    full = ev.main(opts + ["--candidates", "99", "--candidates_from", str(tmp_path / "dual")])["retrieval"]
    assert full["metrics"] == pytest.approx(every["metrics"])
    some = ev.main(opts + ["--candidates", "2", "--candidates_from", str(tmp_path / "dual")])["retrieval"]
    assert some["protocol"]["candidates_from"] == str(tmp_path / "dual") and some["protocol"]["rerank_k"] == [2, 2]
    assert ([r["scores"] for r in some["rows"]]
            == ["chance", f"dual encoder of {tmp_path / 'dual'}", "re-ranked, itm, k=2"])
    with pytest.raises(SystemExit, match="--candidates_from"):
        ev.main(opts + ["--candidates", "2"])
    with pytest.raises(SystemExit, match="has no dual encoder"):
        ev.main(opts + ["--candidates", "2", "--candidates_from", str(tmp_path / "run")])


def test_two_processes(world, tmp_path):
    """No parameter goes unused under DDP; a shared evaluation has the numbers of one process."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(HERE / "train.py"),
                           *ours(world, tmp_path / "two", "--evals", "retrieval",
                                 "--eval_split", "train", "--log_every", 1)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes x 1 x 4" in done.stdout
    two = json.loads((tmp_path / "two" / "eval-retrieval.json").read_text())
    one = ev.main([str(tmp_path / "two"), "--task", "retrieval", "--split", "train"])["retrieval"]
    assert two["metrics"] == pytest.approx(one["metrics"]) and two["protocol"]["captions"] == 48


# --------------------------------------------------------------------------------------------------------------- stages

def states(out):
    return [{k: v for k, v in load_file(p).items()} for p in sorted(Path(out).glob("stage-*/model.safetensors"))]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_stages_by_data_are_separate_commands_with_init(world, tmp_path, capsys):
    a, b = world / "small.jsonl", world / "pairs.jsonl"
    train.main(ours(world, tmp_path / "two", "--stage_data", a, b))
    text = capsys.readouterr().out
    assert "10 records of" in text and "24 records of" in text and text.count("3 steps of 8") == 2
    infos = [json.loads((tmp_path / "two" / f"stage-{n}" / "config.json").read_text())["loop"] for n in (1, 2)]
    assert ([Path(i["data"]).name for i in infos] == ["small.jsonl", "pairs.jsonl"]
            and infos[1]["init"] == str(tmp_path / "two" / "stage-1"))
    one = ours(world, tmp_path / "one", "--stage_data", a)
    train.main(one)                                                     # one datum: one stage, in the run's own folder
    assert ((tmp_path / "one" / "model.safetensors").exists()
            and same(load_file(tmp_path / "one" / "model.safetensors"), states(tmp_path / "two")[0]))
    train.main(ours(world, tmp_path / "next", "--init", tmp_path / "one"))
    # optimizer and schedule began anew
    assert same(load_file(tmp_path / "next" / "model.safetensors"), states(tmp_path / "two")[1])
    assert ev.find_run(tmp_path / "two").name == "stage-2"
    train.main(ours(world, tmp_path / "three", "--stage_data", a, b, a, "--steps", 1))
    assert len(states(tmp_path / "three")) == 3


def test_resume_knows_the_stage(world, tmp_path, monkeypatch):
    a, b = world / "small.jsonl", world / "pairs.jsonl"
    args = lambda out, *more: ours(world, tmp_path / out, "--stage_data", a, b, "--save_every", 1, *more)
    train.main(args("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    real, steps = ib.ImageBert.forward, []

    def forward(self, batch):
        steps.append(0)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(ib.ImageBert, "forward", forward)
    for stop in (2, 5):                                                     # in the first stage, then in the second
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            train.main(args("cut"))                                 # what an earlier run left there is not this run's
        stop = 0
        steps.clear()
        train.main(args("cut", "--resume"))
        assert len(steps) in (5, 2)
        for x, y in zip(states(tmp_path / "whole"), states(tmp_path / "cut")):
            assert same(x, y)


def test_recipes_with_stages(world, tmp_path, monkeypatch):
    """A list of dicts = stages, each with its own settings; the preset's list, the command line's data and the recipe's
    agree on how many."""
    with pytest.raises(train.Stop, match="pretrain has 2 stages: name the data of each"):
        train.main(ours(world, tmp_path / "b", "--preset", "base"))
    with pytest.raises(train.Stop, match="1 --stage_root for 2 stages"):
        train.main(ours(world, tmp_path / "b", "--stage_data", "a", "b", "--stage_root", "c"))
    presets = copy.deepcopy(ib.PRESETS)
    presets["tiny"]["pretrain"] = [dict(lr=1e-3, moc=0.0), dict(lr=3e-4, schedule="constant", width=16)]
    monkeypatch.setattr(ib, "PRESETS", presets)
    got = [train.settings(ib, "tiny", "pretrain", {}, n) for n in (0, 1, 2)]
    assert ([(loop.lr, loop.schedule, cfg.moc) for loop, cfg in got]
            == [(1e-3, "constant", 0.0), (3e-4, "constant", 1.0), (3e-4, "constant", 1.0)])
    train.main(ours(world, tmp_path / "s", "--stage_data", world / "small.jsonl", world / "pairs.jsonl", "--steps", 1))
    first, second = states(tmp_path / "s")
    assert "moc_head.weight" not in first and "moc_head.weight" in second


def test_noisy_and_clean(world, tmp_path, capsys):
    assert data.main(["noisy", str(world / "pairs.jsonl"), "--out", str(tmp_path), "--clean", "6", "--share", "0.5",
                      "--seed", "3"]) == 0
    assert "18 records, 9 with captions of another" in capsys.readouterr().out
    true = {r["image_id"]: r for r in data.open_source("pairs", str(world / "pairs.jsonl"), "train")}
    clean, noisy = (data.open_source("pairs", str(tmp_path / f"{n}.jsonl"), "train") for n in ("clean", "noisy"))
    assert all(r["caption"] == true[r["image_id"]]["caption"] and r["image"] == true[r["image_id"]]["image"]
               for r in clean)
    ids = [{r["image_id"] for r in part} for part in (clean, noisy)]
    assert ids[0] | ids[1] == set(true) and not ids[0] & ids[1]
    moved = [r for r in noisy if r["caption"] != true[r["image_id"]]["caption"]]
    assert 5 <= len(moved) <= 9                                             # two pictures may say the same
    with pytest.raises(data.DataError, match="--clean 24"):
        data.split_noisy(str(world / "pairs.jsonl"), str(tmp_path), clean=24)
