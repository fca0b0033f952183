"""models/mct.py against the paper, written down a second time with explicit loops in float64; its tasks, its data,
its metrics."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import eval as evaluation
from models import mct
from tools import weights
from models.mct import (Config, Mct, QueueHinge, QueueLSE, SplitBatchNorm, demo_batch, hinge, info_nce,
                        pmi_vectors, push_, shuffle, tag_nce, tag_positives, tag_sums, unshuffle, vse_loss)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TAU, ALPHA, EPS = 0.07, 0.2, 2


# --------------------------------------------------------------------------------------------- small models and batches

def small(**over):
    return Config(**{**dict(
        image_size=32, block="basic", layers=(1, 1, 1, 1), stem="small", vision_width=4, width=24,
        text_layers=1, text_heads=3, mlp_ratio=2, act="relu", dropout=0.0, max_text=9, positions=12, vocab_size=57,
        head_hidden=20, intra_dim=16, inter_dim=14, queue_size=21, momentum=0.9, lambda_ic=0.1, lambda_ci=0.2,
        bn_groups=1, tag_width=6, queue_chunk=8, word_dim=10, joint_dim=18, tag_dim=16, tag_hidden=12,
        detect_sizes=(64,), detect_max=80, anchors=(8, 16, 24, 32, 48), rois=16, fpn_width=16,
        proposals=(30, 20)), **over})


def make_model(task="pretrain", fill=True, **over):
    """In training mode; momentum copies unlike the students, queues full of ids 0..9 and -1, tags,
    and some missing captions."""
    model = Mct(small(**over), task, 20).train()
    if task == "pretrain" and fill:
        with torch.no_grad():
            for name, p in model.named_parameters():
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
    assert torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tol, atol=tol), (a, b)


def problem(b=5, k=13, d=6):
    """Queries, keys, a queue with ids of which some are the batch's own, and absent keys."""
    ids, queue_ids = torch.arange(b), torch.arange(k) % 9 - 1
    present = torch.arange(k) % 6 != 5
    hidden = (ids[:, None] == queue_ids) | ~present
    return units(b, d), units(b, d), units(k, d), ids, queue_ids, present, hidden


# -------------------------------------------------------------------------------------------------------- the equations

def embed_loops(encoder, head, x):
    """f(x) of the paper: an encoder's feature, Linear, ReLU, Linear, unit norm; number by number in float64."""
    out = []
    for feature in encoder(*x).double():
        w1, b1, w2, b2 = (head[n].get_parameter(p).double() for n in (0, 2) for p in ("weight", "bias"))
        h = [max(0.0, sum(w * f for w, f in zip(row, feature.tolist())) + b)
             for row, b in zip(w1.tolist(), b1.tolist())]
        z = [sum(w * f for w, f in zip(row, h)) + b for row, b in zip(w2.tolist(), b2.tolist())]
        out.append([v / math.sqrt(sum(u * u for u in z)) for v in z])
    return torch.tensor(out)


def check_embedding(method, side, space, key):
    """Query views through the student, key views through the copy, a head of its own for each space."""
    model, batch = make_model().eval(), make_batch(b=3)
    m = "_m" if method == "keys" else ""
    with torch.no_grad():
        x = (batch[key],) if side == "vision" else (batch[key], batch[key + "_mask"])
        wanted = embed_loops(getattr(model, side + m), getattr(model, f"{side}_heads{m}")[space], x)
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


def nce_loops(q, k, queue, hidden, positives=None):
    """Eq. 3 (positives None), Eq. 5."""
    rows = []
    for j in range(len(q)):
        s = [sum(a * b for a, b in zip(q[j], k[j])) / TAU] + [sum(a * b for a, b in zip(q[j], x)) / TAU for x in queue]
        keep = [True] + [not h for h in hidden[j].tolist()]
        total = sum(s_.exp() for s_, ok in zip(s, keep) if ok)
        p = [0] + [n + 1 for n in range(len(queue)) if positives is not None and positives[j, n] and keep[n + 1]]
        rows.append(-sum((s[n].exp() / total).log() for n in p) / len(p))
    return torch.stack(rows)


def fast_nce(q, k, queue, ids, queue_ids, present, chunk=4):
    own = (q * k).sum(-1) / TAU
    return torch.logaddexp(QueueLSE.apply(q, queue, ids, queue_ids, present, TAU, chunk), own), own


def test_mct_eq3():
    q, k, queue, ids, queue_ids, present, hidden = problem()
    q.requires_grad_()
    wanted = nce_loops(q, k, queue, hidden)
    lse, own = fast_nce(q, k, queue, ids, queue_ids, present)
    close(info_nce(q, k, queue, TAU, hidden), wanted)
    close(lse - own, wanted)
    weight = torch.randn(len(q), dtype=torch.float64)
    close(torch.autograd.grad((weight * (lse - own)).sum(), q)[0], torch.autograd.grad((weight * wanted).sum(), q)[0])
    assert torch.autograd.gradcheck(lambda x: QueueLSE.apply(x, queue, ids, queue_ids, present, TAU, 4), q)


test_mct_eq8 = test_mct_eq3  # the same loss, on captions


def overlap_loops(tags, queue_tags):
    return torch.tensor([[len({t for t in a if t >= 0} & set(b)) > EPS for b in queue_tags.tolist()]
                         for a in tags.tolist()])


def test_mct_eq4():
    tags, queue_tags, (q, k, queue, ids, queue_ids, present, hidden) = tag_rows(5), tag_rows(13), problem()
    p = overlap_loops(tags, queue_tags)
    assert p.any() and not p.all()
    assert torch.equal(tag_positives(tags, queue_tags, EPS), p)
    total, count = tag_sums(queue, ids, queue_ids, tags, queue_tags, 20, EPS, 4)
    p &= ids[:, None] != queue_ids
    close(total, torch.stack([sum((queue[n] for n in range(13) if row[n]), torch.zeros(6)) for row in p]))
    assert count.tolist() == p.sum(1).tolist()
    exactly = torch.tensor([[1, 2, -1]]), torch.tensor([[2, 1, -1], [1, 2, 3]])
    assert not tag_positives(*exactly, 2).any(), "eps = 2 is strict"


def test_mct_eq5():
    tags, queue_tags, (q, k, queue, ids, queue_ids, _, _) = tag_rows(5), tag_rows(13), problem()
    q.requires_grad_()
    hidden, p = ids[:, None] == queue_ids, overlap_loops(tags, queue_tags)
    wanted = nce_loops(q, k, queue, hidden, p)
    close(tag_nce(q, k, queue, p, TAU, hidden), wanted)
    lse, own = fast_nce(q, k, queue, ids, queue_ids, None)
    total, count = tag_sums(queue, ids, queue_ids, tags, queue_tags, 20, EPS, 4)
    rows = lse - (own + (q * total).sum(-1) / TAU) / (1 + count)
    close(rows, wanted)
    close(torch.autograd.grad(rows.sum(), q)[0], torch.autograd.grad(wanted.sum(), q)[0])
    nobody = torch.zeros_like(p)
    close(tag_nce(q, k, queue, nobody, TAU, hidden), info_nce(q, k, queue, TAU, hidden))       # "degenerates to J_ii"


def test_mct_eq11():
    q, k, queue, ids, queue_ids, present, hidden = problem()
    q.requires_grad_()
    wanted = torch.stack([sum((ALPHA - q[j] @ k[j] + q[j] @ queue[n]).clamp(min=0)
                              for n in range(13) if not hidden[j, n])
                          for j in range(5)])
    rows = QueueHinge.apply(q, (q * k).sum(-1), queue, ids, queue_ids, present, ALPHA, 4)
    close(hinge(q, k, queue, ALPHA, hidden), wanted)
    close(rows, wanted)
    close(torch.autograd.grad(rows.pow(2).sum(), q)[0], torch.autograd.grad(wanted.pow(2).sum(), q)[0])


test_mct_eq14 = test_mct_eq11


def test_mct_eq15():
    """The loss of a batch from the plain forms, float64 loops over its parts, and the masks of records without
    caption or tags."""
    model, batch = make_model(), make_batch()
    state = copy.deepcopy(model.state_dict())
    out = model(batch)
    model.load_state_dict(state)
    q, k = model.queries(batch), model.keys(batch)
    model.load_state_dict(state)
    hid = batch["image_id"][:, None] == model.queue_ids
    hid_text, has_text = hid | ~model.queue_captioned, batch["text_valid"].double()
    has_tags = (batch["tags"] >= 0).any(1).double()
    v, t, kv, kt = q["vision"], q["text"], k["vision"], k["text"]
    p = overlap_loops(batch["tags"], model.queue_tags)
    rows = {"ii": nce_loops(v["intra"].double(), kv["intra"].double(), model.queue_vision_intra.double(), hid),
            "tag": has_tags * nce_loops(v["intra"].double(), kv["intra"].double(),
                                        model.queue_vision_intra.double(), hid, p),
            "cc": has_text * nce_loops(t["intra"].double(), kt["intra"].double(),
                                       model.queue_text_intra.double(), hid_text),
            "ic": has_text * hinge(v["inter"], kt["inter"], model.queue_text_inter, ALPHA, hid_text).double(),
            "ci": has_text * hinge(t["inter"], kv["inter"], model.queue_vision_inter, ALPHA, hid).double()}
    for name, row in rows.items():
        close(out["logs"][name], row.mean(), 1e-4)
    weights = {"ii": 1.0, "tag": 1.0, "cc": 1.0, "ic": 0.1, "ci": 0.2}
    close(out["loss"], sum(weights[n] * row.mean() for n, row in rows.items()), 1e-4)
    close(out["logs"]["paraphrased"], 4 / 6)
    assert has_text.tolist() == [1, 0, 1, 1, 1, 1] and has_tags.tolist() == [0, 1, 1, 1, 1, 1]


def test_mct_rows_without_a_negative_or_without_a_modality():
    """All queue entries the own image or absent: loss 0, gradient finite; no caption and no tag in a batch:
    gradients all there, 0."""
    q, queue = units(2, 6).requires_grad_(), units(4, 6)
    ids, same = torch.tensor([3, 3]), torch.full((4,), 3)
    lse, own = fast_nce(q, units(2, 6), queue, ids, same, None)
    close(lse - own, torch.zeros(2))
    assert torch.isfinite(torch.autograd.grad((lse - own).sum(), q)[0]).all()
    assert QueueHinge.apply(q, (q * q).sum(-1), queue, ids, same, None, ALPHA, 4).tolist() == [0, 0]
    model, batch = make_model(), make_batch()
    batch |= {"text_valid": torch.zeros(6, dtype=torch.long), "tags": torch.full((6, 6), -1)}
    out = model(batch)
    out["loss"].backward()
    assert out["logs"]["cc"] == out["logs"]["ic"] == out["logs"]["ci"] == out["logs"]["tag"] == 0 < out["logs"]["ii"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.text.parameters())
    model.after_backward(out)
    assert (not model.queue_captioned[:6].any() and (model.queue_tags[:6] == -1).all()
            and model.queue_captioned[6:].sum() == 12)


def test_mct_low_precision():
    """bf16 queries: the scores are made in float32 under autocast."""
    q, k, queue, ids, queue_ids, present, hidden = (x.float() if x.is_floating_point() else x for x in problem())
    with torch.autocast("cpu", torch.bfloat16):
        lse, own = fast_nce(q, k, queue, ids, queue_ids, present)
    close(lse, nce_loops(q.double(), k.double(), queue.double(), hidden) + own, 1e-4)


# ---------------------------------------------------------------------------------------------------- memory and copies

def test_mct_push_is_a_list_that_forgets():
    rings, ptr, kept = [torch.zeros(10, 2), torch.zeros(10, dtype=torch.long)], torch.zeros((), dtype=torch.long), []
    for n, b in enumerate((4, 4, 4, 4, 13, 3)):
        rows = torch.arange(b).float()[:, None] + 100 * n + torch.zeros(b, 2)
        push_(rings, ptr, [rows, rows[:, 0].long()])
        kept = (kept + rows[:, 0].tolist())[-10:]
    start = int(ptr)
    assert rings[1].roll(-start).tolist() == kept and rings[0][:, 1].roll(-start).tolist() == kept


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
    assert int(model.ptr) == 6 and model.queue_ids.tolist() == [*range(6)] + [-1] * 15
    for side, keys in out["keys"].items():
        for space, z in keys.items():
            close(getattr(model, f"queue_{side}_{space}")[:6], z)
    assert (torch.equal(model.queue_tags[:6], batch["tags"])
            and model.queue_captioned[:6].tolist() == [True, False] + [True] * 4)
    ptr = int(model.ptr)
    model.eval().encode_image(batch), model.encode_text(batch)
    assert int(model.ptr) == ptr
    model.train()
    assert model.vision_m.training and not model.text_m.training


def test_mct_split_batch_norm():
    """Groups are normalised apart; evaluation is plain; parameters as torchvision names them."""
    norm, plain, x = SplitBatchNorm(3, 2).train(), torch.nn.BatchNorm2d(3).train(), torch.randn(8, 3, 5, 4)
    y = norm(x)
    for group in (slice(0, None, 2), slice(1, None, 2)):
        close(y[group], plain(x[group]))
        plain.reset_running_stats()
    var = torch.stack([x[g::2].transpose(0, 1).flatten(1).var(1) for g in (0, 1)]).mean(0)
    close(norm.running_var, 0.9 + 0.1 * var)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    norm.eval()
    close(norm(x), F.batch_norm(x, norm.running_mean, norm.running_var, eps=1e-5))
    with pytest.raises(SystemExit, match="virtual groups"):
        make_model(bn_groups=4)(make_batch())


def test_mct_one_process_shuffles_its_keys():
    """Keys come back in their order, from other company: with two virtual groups a key's batch norm hangs on the draw.
    """
    model, batch = make_model(bn_groups=2), make_batch()
    z, restore = shuffle(batch["image_key"])
    assert torch.equal(unshuffle(z, restore), batch["image_key"])
    keys = lambda seed: (torch.manual_seed(seed), model.keys(batch)["vision"]["intra"])[1]
    assert any(not torch.allclose(keys(0), keys(seed), atol=1e-3) for seed in range(1, 6))
    for m in model.modules():
        if isinstance(m, SplitBatchNorm):
            m.groups = 1
    close(keys(0), keys(1))


# -------------------------------------------------------------------------------------------------------- all the tasks

@pytest.mark.parametrize("task", mct.TASKS)
def test_mct_every_parameter_learns(task):
    model = make_model(task)
    if task == "tagging":
        model.tag_vectors.copy_(pmi_vectors(tag_rows(200), *model.tag_vectors.shape))
    out = model(make_batch(task, b=2 if task in ("detection", "segmentation") else 6))
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and all(v.ndim == 0 and not v.requires_grad for v in out["logs"].values())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        frozen = name.split(".")[0].endswith("_m") or (model.frozen and name.startswith("vision."))
        assert p.requires_grad != frozen, name
    loop = mock.Mock(lr=1.0, weight_decay=0.1)
    grouped = [p for g in model.param_groups(loop) for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())


def test_mct_param_groups():
    image, text, plain = make_model().param_groups(mock.Mock(lr=0.03, weight_decay=1e-4))
    assert (image["lr"], text["lr"], len(plain["params"])) == (0.03, 4e-5, 0) and text["params"]
    _, _, norms = make_model("detection").param_groups(mock.Mock(lr=0.03, weight_decay=1e-4))
    assert norms["weight_decay"] == 0 and all(p.ndim == 1 for p in norms["params"])


@pytest.mark.parametrize("over, spaces", [
    (dict(lambda_tag=0.0, lambda_cc=0.0, lambda_ic=0.0, lambda_ci=0.0), {"vision": ["intra"], "text": []}),  # MoCo-v2
    (dict(lambda_cc=0.0, lambda_ic=0.0, lambda_ci=0.0), {"vision": ["intra"], "text": []}),                 # + J_tag
    (dict(lambda_ii=0.0, lambda_tag=0.0, lambda_cc=0.0), {"vision": ["inter"], "text": ["inter"]}),         # Table 7
    (dict(heads="unified", intra_dim=14), {"vision": ["intra", "inter"], "text": ["intra", "inter"]})])
def test_mct_ablations_build_only_what_they_use(over, spaces):
    model = make_model(**over)
    out = model(make_batch())
    out["loss"].backward()
    assert model.spaces == spaces and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert callable(model.encode_image) == ("inter" in spaces["text"])
    if over.get("heads"):
        assert list(model.vision_heads) == ["both"]
    model.after_backward(out)
    model.after_step(1, 2)


def test_mct_refuses():
    for over in (dict(lambda_ii=0.0, lambda_tag=0.0, lambda_ic=0.0, lambda_ci=0.0), dict(heads="unified"),
                 dict(heads="none")):
        with pytest.raises(SystemExit, match="models/mct.py"):
            make_model(**over)


def test_mct_frozen_backbone_stays_bit_equal():
    """Running averages too."""
    model, batch = make_model("linear"), make_batch("linear")
    assert not model.vision.training and model.fc.training
    before = copy.deepcopy(model.vision.state_dict())
    batch.pop("features")
    batch["image"] = torch.randn(6, 3, 32, 32)
    optimizer = torch.optim.SGD([p for g in model.param_groups(mock.Mock(lr=30.0, weight_decay=0.0))
                                 for p in g["params"]], 30.0, 0.9)
    for _ in range(3):
        model(batch)["loss"].backward()
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.vision.state_dict().items())


def test_mct_vse_loss():
    im, tx, ids = units(5, 7), units(5, 7), torch.tensor([0, 1, 1, 2, 3])
    wanted = 0.0
    for i in range(5):
        others = [j for j in range(5) if ids[j] != ids[i]]
        wanted += max(0.0, ALPHA - float(im[i] @ tx[i]) + max(float(im[i] @ tx[j]) for j in others))
        wanted += max(0.0, ALPHA - float(im[i] @ tx[i]) + max(float(im[j] @ tx[i]) for j in others))
    close(vse_loss(im, tx, ids, ALPHA), wanted)
    assert vse_loss(im, tx, torch.zeros(5), ALPHA) == 0


def test_mct_gru_reads_to_the_last_token():
    model, batch = make_model("retrieval_gru").eval(), make_batch("retrieval_gru")
    batch["text_mask"][:, 4:] = 0
    whole = model.encode_text(batch)
    close(whole, model.encode_text({"text": batch["text"][:, :4], "text_mask": batch["text_mask"][:, :4]}))


def test_mct_pmi():
    rows = tag_rows(300, vocab=12)
    vectors = pmi_vectors(rows, 12, 12)
    sets, n = [{t for t in r if t >= 0} for r in rows.tolist()], len(rows)
    count = lambda *tags: sum(all(t in s for t in tags) for s in sets)
    pmi = torch.tensor([[max(0.0, math.log(count(i, j) * n / (count(i) * count(j)))) if count(i, j) else 0.0
                         for j in range(12)]
                        for i in range(12)])
    u, s, _ = torch.linalg.svd(pmi)
    wanted = F.normalize(u * s.sqrt(), dim=-1)
    close(vectors @ vectors.T, wanted @ wanted.T, 1e-4)                     # a basis is free up to signs
    assert pmi_vectors(rows, 12, 5).shape == (12, 5)
    assert (pmi_vectors(torch.tensor([[0, 1], [2, -1]]), 4, 4)[3] == 0).all()


def test_mct_backbone_is_torchvisions(tmp_path):
    """The exported file loads in torchvision's resnet50 and gives the same features;
    and the way back, with the momentum copy."""
    model = Mct(Config(width=24, text_layers=1, text_heads=3, vocab_size=50, queue_size=8, bn_groups=1),
                "pretrain", 5).eval()
    weights.save_model(model, tmp_path / "model.safetensors")
    mct.export_backbone(tmp_path / "model.safetensors", tmp_path / "resnet50.pth")
    theirs = torchvision.models.resnet50()
    missing, unexpected = theirs.load_state_dict(torch.load(tmp_path / "resnet50.pth", weights_only=True), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    theirs.fc, image = torch.nn.Identity(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(theirs.eval()(image), model.vision(image))
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "foreign.pth")
    said = mct.load_pretrained(model, vision=tmp_path / "foreign.pth")
    assert "matched 318 of 320 tensors" in said and "missing 0; unexpected 2: fc.{weight,bias}" in said
    assert all(torch.equal(v, model.vision_m.state_dict()[n]) for n, v in model.vision.state_dict().items())
    detector = Mct(Config(), "detection", 20)
    assert "matched 318 of 320" in mct.load_pretrained(detector, vision=tmp_path / "foreign.pth")
    assert torch.equal(detector.detector.roi_heads.box_head.layer4[0].conv1.weight, model.vision.layer4[0].conv1.weight)
    spoiled = torchvision.models.resnet50().state_dict()
    torch.save({k: v for k, v in spoiled.items() if k != "layer1.0.conv1.weight"}, tmp_path / "bad.pth")
    with pytest.raises(SystemExit, match="not filled: vision.layer1.0.conv1.weight"):
        mct.load_pretrained(model, vision=tmp_path / "bad.pth")
    state = {f"vision.{n}": v for n, v in model.vision.state_dict().items()}
    adapted = detector.adapt(state)
    mine = {n for n in detector.state_dict() if n.startswith(mct.BACKBONE)}
    assert mine == set(adapted), "the detector's ResNet is filled, and by nothing else"
    mine = {n for n in Mct(Config(), "segmentation", 80).state_dict() if n.startswith(mct.BACKBONE)}
    assert mine == set(Mct.adapt(mock.Mock(task="segmentation"), state))


def test_mct_bert_weights(tmp_path):
    """Hugging Face's names, with and without `bert.`, old LayerNorm names, heads left out;
    what does not fit is one line."""
    model = make_model(act="gelu")
    mine = {n.removeprefix("text."): torch.randn_like(v) for n, v in model.state_dict().items()
            if n.startswith("text.")}
    foreign = {"bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma"): v for n, v in mine.items()}
    foreign |= {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(3)}
    torch.save(foreign, tmp_path / "b.pth")
    said = mct.load_pretrained(model, text=tmp_path / "b.pth")
    assert (f"matched {len(mine)} of {len(foreign)} tensors" in said
            and "missing 0; unexpected 1: cls.predictions.bias" in said)
    assert all(torch.equal(v, mine[n]) and torch.equal(model.text_m.state_dict()[n], v)
               for n, v in model.text.state_dict().items())
    (tmp_path / "hub").mkdir()
    torch.save(mine, tmp_path / "hub" / "pytorch_model.bin")
    write(tmp_path / "hub" / "config.json", {"model_type": "bert", "num_attention_heads": 3})
    assert "unexpected 0" in mct.load_pretrained(model, text=tmp_path / "hub")
    for spoil, words in ((lambda s: s.pop("bert.pooler.dense.bias"), "not filled: text.pooler.dense.bias"),
                         (lambda s: s.update({"encoder.layer.1.x": torch.ones(1)}), "no place for encoder.layer.1.x"),
                         (lambda s: s.update({"bert.pooler.dense.bias": torch.ones(1)}), r"is \(24,\) here")):
        bad = dict(foreign)
        spoil(bad)
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(SystemExit, match=words):
            mct.load_pretrained(model, text=tmp_path / "bad.pth")
    write(tmp_path / "hub" / "config.json", {"model_type": "bert", "num_attention_heads": 4})
    for task, path, words in (("linear", "b.pth", "trains no BERT"), ("pretrain", "hub", "num_attention_heads")):
        with pytest.raises(SystemExit, match=words):
            mct.load_pretrained(make_model(task, act="gelu"), text=tmp_path / path)


# -------------------------------------------------------------------------------------------------------- two processes

def two_steps(rank=0, world=1):
    """Losses, gradients and the state after two steps; batch norm in evaluation mode,
    as its statistics are per process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    raw = make_model()
    whole = make_batch(b=8)
    batch = {k: v.chunk(world)[rank] for k, v in whole.items()}
    raw.vision.eval(), raw.vision_m.eval()
    model = torch.nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False) if world > 1 else raw
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.arange(3)[:, None] + 10 * rank
    mixed, restore = shuffle(x)
    seen = [torch.empty_like(mixed) for _ in range(2)]
    dist.all_gather(seen, mixed)
    assert sorted(torch.cat(seen).flatten().tolist()) == [0, 1, 2, 10, 11, 12]
    assert unshuffle(mixed, restore).flatten().tolist() == [0, 1, 2, 10, 11, 12]
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
    (steps, state), ranks = two_steps(), [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for (logs, grads), (logs_0, grads_0), (logs_1, grads_1) in zip(steps, ranks[0][0], ranks[1][0]):
        for name in logs:
            close((logs_0[name] + logs_1[name]) / 2, logs[name], 1e-4)
        for name in grads:
            close(grads_0[name], grads[name], 1e-4)
            assert torch.equal(grads_0[name], grads_1[name])
    for name in state:
        close(ranks[0][1][name], state[name], 1e-4)
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), name


# ----------------------------------------------------------------------------------------------------- data and metrics

@pytest.fixture
def tok(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square left of".split()) + "\n")
    return path


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def photos(root, n=12, size=(40, 32)):
    """Pictures with one bright rectangle each, COCO instances for them, records with tags and captions,
    and an ImageFolder."""
    images, notes, rows = [], [], []
    for i in range(n):
        x, y, w, h = 4 + i % 5, 3 + i % 7, 14, 12
        picture = Image.new("RGB", size, (20, 20, 20))
        picture.paste((250, 30, 30) if i % 2 else (30, 30, 250), (x, y, x + w, y + h))
        for path in (root / "im" / f"{i}.png",
                     root / "classes" / ("val" if i > 7 else "train") / ("red" if i % 2 else "blue") / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        images.append({"id": i, "file_name": f"im/{i}.png", "height": size[1], "width": size[0]})
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        notes.append({"id": i + 1, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0,
                      "bbox": [x, y, w, h], "area": w * h,
                      "segmentation": polygon})
        color = "red" if i % 2 else "blue"
        rows.append({"image": f"im/{i}.png", "image_id": i, "caption": [f"a {color} square"] if i else [],
                     "tags": [color, "square", "a"][:i % 4]})
    crowd = {"size": [size[1], size[0]], "counts": [0, 32, size[0] * size[1] - 32]}
    notes.append({"id": 99, "image_id": 0, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 1, 32], "area": 32,
                  "segmentation": crowd})
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
    return (write(root / "instances.json", {"images": images, "annotations": notes, "categories": categories}),
            write(root / "pairs.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))


def test_mct_detection_source(tmp_path):
    file, _ = photos(tmp_path)
    records = data.open_source("detection", str(file), "train", str(tmp_path), need=("boxes", "segmentation"))
    assert records.label_names == ["blue", "red"] and data.stats(records)["num_labels"] == 2
    assert records[0]["crowd"] == [0, 1] and records[1]["boxes"] == [[5, 4, 19, 16]] and records[1]["labels"] == [1]
    views = data.Views(records, mct.VIEWS["segmentation"], None, None, None, seed=3)
    flips = set()
    for draw in range(8):
        s = views[0, draw]
        (image,), (boxes,), (labels,), (masks,) = (s[k] for k in ("image", "boxes", "labels", "masks"))
        assert (image.shape == (3, 32, 40) and 0 <= image.min() and image.max() <= 1
                and labels.tolist() == [0]), "crowds are no targets"
        x0, y0, x1, y1 = boxes[0].int().tolist()
        assert masks.shape == (1, 32, 40) and masks[0, y0:y1, x0:x1].all() and masks.sum() == 14 * 12
        assert image[2, y0:y1, x0:x1].min() > 0.9 > image[2].flatten().sort().values[-14 * 12 - 1]
        flips.add(x0)
    assert flips == {4, 22}
    batch = next(data.batches(views, 4, seed=0))
    assert isinstance(batch["image"], list) and len(batch["masks"]) == 4 and batch["image_id"].shape == (4,)
    assert data.move(batch, "cpu")["boxes"][3].shape == (1, 4)
    (tmp_path / "im" / "3.png").write_bytes(b"no picture")
    sample = data.Views(records, mct.VIEWS["detection"], None, None, None, train=False)[3]
    assert sample["bad"] == 1 and (sample["image"][0] == 0.5).all() and sample["image"][0].shape == (3, 32, 40)
    assert views[3, 0]["bad"] == 1 and views[3, 0]["index"] != 3


XML = ("<annotation><filename>{0}.jpg</filename>"
       "<size><width>40</width><height>32</height><depth>3</depth></size>{1}</annotation>")
OBJECT = ("<object><name>{}</name><difficult>{}</difficult>"
          "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")


def test_mct_voc_source(tmp_path):
    for year, part, names in (("2007", "trainval", "1 2"), ("2012", "trainval", "3"), ("2007", "test", "4")):
        home = tmp_path / "VOCdevkit" / f"VOC{year}"
        write(home / "ImageSets" / "Main" / f"{part}.txt", "\n".join(names.split()) + "\n")
        for n in names.split():
            write(home / "Annotations" / f"{n}.xml",
                  XML.format(n, OBJECT.format("dog", 0, 1, 1, 10, 20) + OBJECT.format("car", 1, 5, 5, 5, 9)))
            (home / "JPEGImages").mkdir(exist_ok=True)
            Image.new("RGB", (40, 32)).save(home / "JPEGImages" / f"{n}.jpg")
    records = data.open_source("detection", str(tmp_path / "VOCdevkit"), "train")
    assert len(records) == 3 and len(data.open_source("detection", str(tmp_path), "test")) == 1
    first = records[0]
    assert (first["boxes"] == [[0, 0, 10, 20], [4, 4, 5, 9]] and first["difficult"] == [0, 1]
            and len(records.label_names) == 20)
    assert [records.label_names[n] for n in first["labels"]] == ["dog", "car"]
    write(tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "4.xml",
          XML.format(4, OBJECT.format("unicorn", 0, 1, 1, 3, 3)))
    with pytest.raises(data.DataError, match="4.xml"):
        data.open_source("detection", str(tmp_path), "test")


@pytest.mark.skipif(not SHARED.exists(), reason="the cuts of public data are not here")
def test_mct_real_detection_data():
    voc = data.open_source("detection", str(SHARED / "voc" / "VOCdevkit"), "train")
    views = data.Views(voc, mct.VIEWS["detection"], None, None, None, train=False)
    assert len(voc) == 10 and sum(int(views[i]["bad"]) for i in range(10)) == 2  # two JPEGs are truncated at the source
    coco = data.open_source("detection", str(SHARED / "coco" / "annotations" / "instances_val2017.json"), "val")
    assert len(coco) == 80 and len(coco.label_names) == 80 and any(sum(r["crowd"]) for r in coco)
    crowded = next(i for i, r in enumerate(coco) if sum(r["crowd"]))
    sample = data.Views(coco, mct.VIEWS["segmentation"], None, None, None, seed=1)[crowded, 0]
    assert (len(sample["masks"][0]) == len(sample["boxes"][0]) == len(coco[crowded]["boxes"])
            - sum(coco[crowded]["crowd"]))


@pytest.mark.skipif(not SHARED.exists(), reason="the cuts of public data are not here")
@pytest.mark.parametrize("task, flags", [("detection", f"--data {SHARED}/voc/VOCdevkit"),
                                         ("segmentation",
                                          f"--data {SHARED}/coco/annotations/instances_val2017.json --split val")])
def test_mct_detectors_train_on_real_data(task, flags, tmp_path, tok):
    """VOC's and COCO's files as they are published, crowds and truncated pictures among them: a step, and the table."""
    import train
    argv = ["--model", "mct", "--task", task, *flags.split(), "--vocab", str(tok), "--out", str(tmp_path / task), *TINY]
    rows = train.main(argv + ["--steps", "1", "--eval_limit", "5"])[task]["rows"]
    by = 2 if importlib.util.find_spec("pycocotools") else 1                       # VOC's rule, and COCO's own tool
    assert len(rows) == by * (2 if task == "detection" else 3)
    assert all(0 <= r["AP"] <= r["AP50"] + 1e-6 < 101 for r in rows)


def test_mct_whole_picture_is_the_baseline_of_detection(tmp_path):
    """Of two classes, one whose only object fills its picture is found (AP 100), one whose object is small is not
    (AP 0)."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in (1, 2)]
    for i in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    notes = [{"id": i, "image_id": i, "category_id": i, "iscrowd": 0, "bbox": box,
              "area": box[2] * box[3], "segmentation": []}
             for i, box in ((1, [0, 0, 40, 30]), (2, [4, 4, 9, 9]))]
    file = write(tmp_path / "instances.json", {"images": images, "annotations": notes,
                                               "categories": [{"id": 1, "name": "wide"}, {"id": 2, "name": "small"}]})
    model = make_model("detection")
    model.detect = lambda batch: [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
                                  for _ in batch["image"]]
    opts = evaluation.parser().parse_args(["x", "--data", str(file), "--image_root", str(tmp_path)])
    ev = mock.Mock(opts=opts, task="detection", info={}, world=1, model=model, protocol={})
    ev.open.return_value = data.open_source("detection", str(file), "train", str(tmp_path))
    ev.progress.return_value = [{"index": torch.arange(2), "image": [None, None]}]
    table = {r["measure"]: (r["AP"], r["AP50"]) for r in evaluation.detection(ev)["rows"]}
    assert set(table) >= {"boxes, VOC07 11-point", "whole picture, VOC07 11-point"}
    for measure, value in table.items():
        close(torch.tensor(value), [50.0, 50.0] if measure.startswith("whole picture") else [0.0, 0.0])


def test_mct_optional_views(tmp_path, tok):
    """Records without caption, tags or paraphrase are samples as all others."""
    _, pairs = photos(tmp_path)
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path), need=data.needs(mct.VIEWS["pretrain"]))
    assert records.notes["no_caption_left"] == 1
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0].pop("caption"), rows[5].pop("tags")
    rows[1] |= {"paraphrase": ["red square left"], "tags": ["red", "red", "a"]}
    write(pairs, "".join(json.dumps(r) + "\n" for r in rows))
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path), need=data.needs(mct.VIEWS["pretrain"]))
    stats = data.stats(records, views=mct.VIEWS["pretrain"], tags=2)
    assert stats["num_labels"] == 2 and stats["tag_width"] == 3 and "red" in stats["tags"]
    views = data.Views(records, mct.VIEWS["pretrain"], data.get_tokenizer(tok), 32, 6, tag_names=stats["tags"])
    first, second, sixth = views[0], views[1], views[5]
    assert ((first["text_valid"], second["text_valid"], second["text_key_is_copy"], sixth["text_key_is_copy"])
            == (0, 1, 0, 1))
    assert first["text_mask"].sum() == 2 and not torch.equal(second["text"], second["text_key"])
    assert torch.equal(sixth["text"], sixth["text_key"]) and (sixth["tags"] == -1).all()
    assert (sorted(t for t in second["tags"].tolist() if t >= 0) == [stats["tags"].index("red")]
            or len(set(second["tags"].tolist())) == 3)
    assert torch.equal(views.tag_rows()[1], second["tags"])
    shown = data.Views(records, mct.VIEWS["pretrain"], data.get_tokenizer(tok), 32, 6, train=False)
    assert set(shown.keys) == {"image", "text"}                     # the key views and the tags are training's alone
    cfg = small()
    mct.setup(cfg, "pretrain", {})
    assert cfg.lambda_tag == 0 and not Mct(cfg, "pretrain", 0).tagged


def test_mct_tags_from_captions(tmp_path, tok):
    """A word list makes tags of captions, whatever tags the records had."""
    _, pairs = photos(tmp_path)
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path))
    made = data.caption_tags(records, write(tmp_path / "nouns.txt", "Square\n\nred\ncircle\n"))
    assert made[0]["tags"] == ["red", "square"] and made[1]["tags"] == ["square"]
    # photo 0 has an empty caption: left out
    assert (len(made), made.notes["with_tags"], records[0]["tags"]) == (11, 11, ["red"])
    assert data.tag_list(made) == ["square", "red"]
    for bad in ("missing.txt", write(tmp_path / "empty.txt", "\n")):
        with pytest.raises(data.DataError, match=Path(bad).name):
            data.caption_tags(records, tmp_path / bad)


def test_mct_miou():
    top, truth = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), [{0, 1, 9}, set()]
    close(evaluation.tag_overlap(top, truth, 2), 100 * (2 / 3 + 0) / 2)
    close(evaluation.tag_overlap(top, truth, 4), 100 * (2 / 5 + 0) / 2)


def test_mct_voc_ap_by_hand():
    box = lambda x: [x, 0.0, x + 10, 10]
    objects = {0: np.array([box(0), box(20)]), 1: np.array([box(0), box(50)]), 2: np.zeros((0, 4))}
    truth = {0: np.array([0, 0]), 1: np.array([0, 1])}
    found = [(score, image, evaluation.box_iou(np.array([box(x)]), objects[image])[0])
             for score, image, x in ((0.9, 0, 0), (0.8, 0, 0), (0.7, 1, 50), (0.6, 1, 1), (0.5, 2, 0))]
    # right, wrong (second time), left out (difficult), right (IoU 9/11), wrong; three objects:
    # recall 1/3 at 1, 2/3 at 2/3
    wanted = (4 * 1 + 3 * (2 / 3) + 4 * 0) / 11                            # recall 0..0.3, 0.4..0.6, 0.7..1
    close(evaluation.voc_ap(found, truth, 0.5), wanted)
    close(evaluation.voc_ap(found, truth, 9 / 11), (4 * 1) / 11)           # at the threshold is not over it
    assert math.isnan(evaluation.voc_ap(found, {}, 0.5)) and evaluation.voc_ap([], truth, 0.5) == 0


def truth_found(tmp_path):
    """Records, and detections that are their first objects, as detections() gives them."""
    file, _ = photos(tmp_path)
    records, found = data.open_source("detection", str(file), "train", str(tmp_path)), {}
    for i, r in enumerate(records):
        boxes, masks = np.array(r["boxes"]), np.stack([data.decode_mask(s, 32, 40) for s in r["segmentation"]])
        found[i] = {"boxes": boxes[:1], "labels": np.array(r["labels"][:1]), "scores": np.ones(1),
                    "iou": evaluation.box_iou(boxes[:1], boxes), "mask_iou": evaluation.mask_iou(masks[:1], masks),
                    "masks": [data.encode_mask(masks[0])]}
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    return records, found, {i: empty for i in found}


def test_mct_ap_of_the_truth_is_100(tmp_path):
    records, found, empty = truth_found(tmp_path)
    for key in ("iou", "mask_iou"):
        scores = evaluation.voc_scores(found, records, 2, key)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert evaluation.voc_scores(empty, records, 2, key)["AP"] == 0


@pytest.mark.needs("pycocotools")
def test_mct_ap_of_the_truth_is_100_by_pycocotools(tmp_path):
    records, found, empty = truth_found(tmp_path)
    for kind in ("bbox", "segm"):
        scores = evaluation.coco_scores(found, records, kind)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert evaluation.coco_scores(empty, records, kind)["AP"] == 0


def test_mct_mask_iou_by_hand():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2, :3], masks[1, 1:3, 1:3] = True, True                          # 6 and 4 pixels, 2 in common
    close(evaluation.mask_iou(masks, masks), [[1, 2 / 8], [2 / 8, 1]])
    assert evaluation.mask_iou(masks[:0], masks).shape == (0, 2)


def test_mct_random_pairs_row():
    """Table 7's RS row: 5 captions for each of 1,000 images."""
    row = evaluation.chance(torch.arange(1000).repeat_interleave(5))
    assert abs(row["i2t_r1"] - 0.1) < 0.01 and abs(row["t2i_r10"] - 1.0) < 0.01
    assert abs(row["i2t_medr"] - 647) <= 1 and row["t2i_medr"] == 500


def test_mct_fit_linear():
    x = torch.randn(400, 5)
    y = (x[:, 0] > x[:, 1]).long()
    weight, bias = evaluation.fit_linear(x, y, 2, lr=1.0, epochs=20, batch=64)
    assert (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95
    weight, bias, lr = evaluation.fit_best(x, y, 2, [1e-6, 1.0])
    assert lr == 1.0 and (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95


def test_mct_probe_fits_features_of_any_scale():
    """Features that are all positive and unlike in size: as they are SGD does not get there, brought to one scale it
    does. A unit that is dead in train does no harm."""
    torch.manual_seed(0)
    z, way = torch.randn(400, 6), torch.randn(6, 4)
    y = (z @ way).argmax(1)
    x = torch.cat([5 + z * torch.tensor([0.01, 0.1, 1, 0.02, 0.5, 0.05]), torch.zeros(400, 1)], 1)
    x[300:, 6] = 1e-6
    x, y = {"train": x[:300], "test": x[300:]}, {"train": y[:300], "test": y[300:]}
    train, test, lr = evaluation.fit_probe(x, y, 4)
    assert min(train, test) > 90 and lr in (3.0, 1.0, 0.3, 0.1, 0.03)
    raw_train, raw_test, lr = evaluation.fit_probe(x, y, 4, 30.0)
    assert raw_train < 75 and lr == 30
    for blind in (torch.zeros(400, 3), torch.full((400, 3), 7.0)):
        train, test, _ = evaluation.fit_probe({"train": blind[:300], "test": blind[300:]}, y, 4)
        assert train < 50 and test < 50


# ---------------------------------------------------------------------------------------------- as a user would call it

TINY = ("--image_size 32 --vision_width 4 --width 24 --text_layers 1 --text_heads 3 --head_hidden 20 "
        "--queue_size 16 --max_text 6 --rois 8 --batch_size 4 --steps 2 --workers 0 --detect_max 48").split()


def test_mct_every_task_trains(tmp_path, tok, monkeypatch, capsys):
    """train.py on a dozen pictures: pre-training, every task from it, its evaluation; stored features are made once."""
    import train
    instances, pairs = photos(tmp_path)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][1:]
    write(pairs, "".join(json.dumps(r) + "\n" for r in rows))
    sources = {"pairs": pairs, "classes": tmp_path / "classes", "detection": instances}
    results = {}
    for task in mct.TASKS:
        argv = ["--model", "mct", "--task", task, "--data", str(sources[mct.VIEWS[task]["source"]]),
                "--image_root", str(tmp_path), "--vocab", str(tok), "--out", str(tmp_path / task), *TINY]
        if task != "pretrain":
            argv += ["--init", str(tmp_path / "pretrain")]
        if task == "linear":
            argv += ["--lr", "1.0", "--steps", "30"]
        results[task] = train.main(argv)
        assert set(results[task]) == set(mct.EVALS[task])
    said = capsys.readouterr().out
    assert "not measured" in said and "batch norm: plain" in said
    top1 = results["linear"]["linear"]["metrics"]
    assert top1["accuracy"] >= top1["baseline"]
    assert set(results["tagging"]["tagging"]["metrics"]) <= {"mIOU@5", "mIOU@10", "mIOU@15", "mIOU@20"}
    assert results["detection"]["detection"]["rows"][0]["measure"].startswith("boxes, VOC07")
    measured = [r["measure"] for r in results["segmentation"]["segmentation"]["rows"]]
    assert {"boxes, VOC07 11-point", "masks, VOC07 11-point", "whole picture, VOC07 11-point"} <= set(measured)
    coco = bool(importlib.util.find_spec("pycocotools"))
    assert coco == ("masks, pycocotools" in measured) == ("boxes, pycocotools" in measured)
    assert coco != ("needs pip install pycocotools" in said)
    probe = evaluation.main([str(tmp_path / "pretrain"), "--task", "probe",
                             "--data", str(tmp_path / "classes"), "--probe_lr", "1"])
    assert ({"random weights", "model"} < set(probe["probe"]["metrics"])
            and set(probe["probe"]["rows"][2]) > {"train top-1", "top-1"})
    first = (tmp_path / "linear" / "features.npy").stat().st_mtime_ns
    train.main(["--model", "mct", "--task", "linear", "--data", str(tmp_path / "classes"), "--vocab", str(tok),
                "--image_root", str(tmp_path), "--out", str(tmp_path / "linear"), "--init", str(tmp_path / "pretrain"),
                *TINY, "--lr", "1.0", "--evals", "none"])
    assert (tmp_path / "linear" / "features.npy").stat().st_mtime_ns == first
    train.main(["--model", "mct", "--task", "linear", "--data", str(tmp_path / "classes"), "--vocab", str(tok),
                "--image_root", str(tmp_path),
                # other weights: other features
                "--out", str(tmp_path / "linear"), *TINY, "--lr", "1.0", "--evals", "none"])
    assert (tmp_path / "linear" / "features.npy").stat().st_mtime_ns != first
