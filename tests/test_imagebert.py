"""models/imagebert.py: each equation against loops in float64 written from the paper, what is
hidden, which pairs are drawn, scores, BERT's weights."""

import math
import os
import shutil
import subprocess
import sys

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


def make_model(task="pretrain", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = ib.ImageBert(config(**changes), task)
    with torch.no_grad():                               # no bias or norm at its neutral start
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
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
    out, positions, live = ib.mask_regions(regions, boxes, mask)
    chosen, gone = chosen_of(positions, live, r), (out == 0).all(-1)
    assert not chosen[mask == 0].any() and not gone[~chosen].any()
    assert torch.equal(out[~gone], regions[~gone])
    assert chosen.sum() / mask.sum() == pytest.approx(0.15, abs=0.01)
    assert gone.sum() / chosen.sum() == pytest.approx(0.9, abs=0.01)
    assert positions.shape[1] == math.ceil(3 + 4 * math.sqrt(2.55))
    assert [row.unique().numel() for row in positions] == [positions.shape[1]] * b


@pytest.mark.parametrize("r,once_in", [(100, 24_000), (36, 9_600)])
def test_how_often_the_cap_of_deviation_5_shows_a_region(r, once_in):
    _, positions, _ = ib.mask_regions(torch.zeros(1, r, 1), torch.zeros(1, r, 4), torch.ones(1, r))
    cap = positions.shape[1]
    more = sum(math.comb(r, k) * 0.15 ** k * 0.85 ** (r - k) for k in range(cap + 1, r + 1))
    assert 1 / more == pytest.approx(once_in, rel=0.02) and f"{once_in:,}" in ib.__doc__


def test_a_twin_gives_nothing_away():
    torch.manual_seed(0)
    box = torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 10], [0, 0, 10, 40], [50, 50, 60, 60],
                        [0, 0, 0, 0]])
    box = box.expand(3000, 5, 4)
    regions, mask = torch.ones(3000, 5, 2), torch.tensor([1, 1, 1, 1, 0]).expand(3000, 5)
    iou = ib.box_iou(box[:1])[0]
    assert iou[0, 1].item() == pytest.approx(0.9) and iou[0, 2].item() == pytest.approx(0.25)
    assert iou[0, 3] == 0 and iou[4, 4] == 0

    # 0 and 1 go together, 2 overlaps too little
    out, positions, live = ib.mask_regions(regions, box, mask)
    chosen, gone = chosen_of(positions, live, 5), (out == 0).all(-1)
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert (gone[:, 1] & ~chosen[:, 1]).sum() > 50
    assert not (gone[:, 2:] & ~chosen[:, 2:]).any() and not gone[:, 4].any()

    # the print: no twins
    out, positions, live = ib.mask_regions(regions, box, mask, twin_iou=1.0)
    assert not ((out == 0).all(-1) & ~chosen_of(positions, live, 5)).any()


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
    assert set(out["logs"]) == {"mlm", "moc", "mrfr", "itm", "itm_acc"}
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
        read, positions, truth = model.hide({**batch, "regions": regions})
        cls, *hidden = model.encode(read, positions)
        predictions, live = model.predict_hidden(*hidden), truth["live"]
        assert live.sum() == batch["regions_mask"].sum()
        outs.append((cls, predictions["moc"][live], predictions["mrfr"][live]))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# The model

FLAGS = [("pretrain", {}),
         ("pretrain", dict(mrfr=0.0, global_feature=True)),
         ("pretrain", dict(mlm=0.0, moc=0.0, mrfr=0.0)),
         ("pretrain", dict(itm=0.0)),
         ("pretrain", dict(moc=0.0)),
         ("retrieval", {}),
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
    want = set() if flags.get("itm") == 0 else {"match", "image_states", "text_states"}
    if task == "pretrain" and "mlm" not in flags:
        want.add("masked_predictions")
    assert model.offers == want
    for name in want:
        getattr(model, name)(batch)


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
    """A batch of one has no negative, nor has a batch of one image: losses of 0, no NaN, nothing
    called a mismatch."""
    for ids in (torch.arange(n), torch.zeros(n, dtype=torch.long)):
        out = make_model(task, ce=1.0, triplet=1.0)(make_batch(n) | {"image_id": ids})
        assert math.isfinite(out["loss"].item())
        if task == "retrieval" and ids.unique().numel() == 1:
            assert out["logs"]["ce"] == 0 and out["logs"]["triplet"] == 0


@pytest.mark.parametrize("task", ib.TASKS)
def test_half_precision(task):
    model, batch = make_model(task, ce=1.0, triplet=1.0), make_batch()
    torch.manual_seed(0)
    want = model(batch)["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = model({**batch, "regions": batch["regions"].half()})["loss"]
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=0.03)


def test_retrieval_losses_against_loops():
    """loss_retrieval's pairs, one at a time through match()."""
    model = make_model("retrieval", ce=1.0, triplet=1.0, pool=3).eval()
    batch = make_batch() | {"image_id": torch.tensor([0, 1, 2, 2, 4, 5])}
    torch.manual_seed(5)
    logs = model(batch)["logs"]
    torch.manual_seed(5)
    draws = [ib.others(batch["image_id"], 2) for _ in range(2)]

    def one(image, text):
        pair = {}
        for name, tensor in batch.items():
            pair[name] = tensor[[image if name.startswith("regions") else text]]
        return model.match(pair).item()

    matched = [one(i, i) for i in range(6)]
    binary, ce, triplet = [bce(s, 1.0) for s in matched], [], []
    for direction, (index, found) in zip(("text", "image"), draws):
        assert found.all()
        for i in range(6):
            s = [one(i, j) if direction == "text" else one(j, i) for j in index[i].tolist()]
            binary += [bce(x, 0.0) for x in s]
            ce.append(-math.log(math.exp(matched[i]) / sum(map(math.exp, [matched[i], *s]))))
            triplet.append(max(0, 0.2 - sigmoid(matched[i]) + sigmoid(max(s))))
    assert logs["bce"].item() == pytest.approx(sum(binary) / len(binary), rel=1e-4)
    assert logs["ce"].item() == pytest.approx(sum(ce) / 12, rel=1e-4)
    assert logs["triplet"].item() == pytest.approx(sum(triplet) / 12, rel=1e-4)


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


def test_masked_predictions():
    model, batch = make_model().eval(), make_batch()
    found = model.masked_predictions(batch)
    assert set(found) == {"mlm", "moc"}
    for predicted, true in found.values():
        assert predicted.shape == true.shape and len(predicted) == 6
        assert predicted.dtype == true.dtype == torch.long
    assert set(make_model(moc=0.0).masked_predictions(batch)) == {"mlm"}


def test_recipe_is_the_papers():
    base = ib.Config()
    assert base.max_text + base.max_regions == 144
    sizes = (base.width, base.layers, base.heads, base.mlp_ratio * base.width)
    assert sizes == (768, 12, 12, 3072)
    for stage in (0, 1):
        loop, cfg = train.settings(ib, "base", "pretrain", {}, stage)
        got = (loop.optimizer, loop.lr, loop.batch_size, loop.epochs, loop.schedule)
        assert got == ("adam", 1e-4, 48, 17, "constant")
        assert loop.limit == (2_000_000, 0)[stage]
    loop, _ = train.settings(ib, "base", "retrieval", {})
    assert (loop.optimizer, loop.lr, loop.batch_size, loop.epochs) == ("adam", 5e-5, 24, 130)


STATS = {"region_dim": 77, "region_classes": 91, "global_dim": 5}


def test_setup_reads_the_regions_file():
    cfg = config(global_feature=True)
    ib.setup(cfg, "pretrain", STATS)
    assert (cfg.region_dim, cfg.region_classes, cfg.global_dim) == (77, 91, 5)


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
        ib.setup(config(**changes), task, STATS | stats)
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
