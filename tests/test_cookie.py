"""models/cookie.py against the paper, written down a second time with explicit loops in float64;
the evaluations it brings."""

import importlib
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

import data
import eval as ev
import train
from models import cookie
from models.cookie import GPO, Config, Cookie

TASKS = ("ccl",) + cookie.TASKS


# --------------------------------------------------------------------------------------------- small models and batches

def small(**over):
    """A Config of which no two sizes are equal, so that a mixed-up axis is an error."""
    return Config(**{**dict(
        image_size=48, backbone="tiny", width=24, text_layers=1, heads=3, mlp_ratio=2, dropout=0.0, embed_dim=32,
        te_heads=4, te_ratio=2, max_text=11, positions=14, vocab_size=57, pad_id=0, cls_id=2, sep_id=3, mask_id=4,
        first_word=6, frame_width=18, bits=16, hash_dropout=0.0), **over})


def sentences(cfg, b):
    """[CLS], words, [SEP], padding; (b, max_text) ids and mask. The first one has a single word, the last is full."""
    text, mask = torch.full((b, cfg.max_text), cfg.pad_id), torch.zeros(b, cfg.max_text, dtype=torch.long)
    for i, n in enumerate(torch.linspace(1, cfg.max_text - 2, b).long().tolist()):
        text[i, :n + 2] = torch.tensor([cfg.cls_id,
                                        *torch.randint(cfg.first_word, cfg.vocab_size, (n,)).tolist(), cfg.sep_id])
        mask[i, :n + 2] = 1
    return text, mask


def make_batch(cfg, b=4, ids=None):
    text, mask = sentences(cfg, b)
    pictures = {k: torch.randn(b, 3, cfg.image_size, cfg.image_size) for k in ("image", "view1", "view2")}
    frames = (torch.arange(7) < torch.randint(1, 8, (b, 1))).long()
    return {**pictures, "text": text, "text_mask": mask,
            "image_id": torch.arange(b) + 7 if ids is None else torch.tensor(ids),
            "frames": torch.randn(b, 7, cfg.frame_width), "frames_mask": frames,
            "labels": (torch.rand(b, 5) < 0.4).float()}


def make_model(task="pretrain", **over):
    model = Cookie(small(**over), task, 5).train()
    with torch.no_grad():
        for p in model.parameters():                    # larger than at birth, else all embeddings are alike
            p.mul_(3.0 if p.ndim > 1 else 1.0).add_(torch.randn_like(p) * 0.02)
    return model


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def close(a, b, tol=1e-9):
    torch.testing.assert_close(torch.as_tensor(a),
                               torch.as_tensor(b, dtype=torch.as_tensor(a).dtype), rtol=tol, atol=tol)


def own(b):
    return torch.arange(b)


def loop_nce(q, k, ids, key_ids, temp, first=0):
    """Eq. 5, pair by pair: q_i's positive is key first + i, its negatives the keys of other images."""
    total = 0
    for i in range(len(q)):
        pos = torch.exp((q[i] * k[first + i]).sum() / temp)
        neg = sum(torch.exp((q[i] * k[j]).sum() / temp) for j in range(len(k)) if key_ids[j] != ids[i])
        total = total - torch.log(pos / (pos + neg))
    return total / len(q)


# ------------------------------------------------------------------------------------------------------------ equations

def test_cookie_eq1():
    v, w, b, p = (torch.randn(*s, dtype=torch.float64) for s in ((2, 6, 5), (4, 5), (4,), (1, 6, 4)))
    out = cookie.patch_features(v, w, b, p)
    for i, n, d in itertools.product(range(2), range(6), range(4)):
        close(out[i, n, d], sum(v[i, n, c] * w[d, c] for c in range(5)) + b[d] + p[0, n, d])


def test_cookie_eq1_positions_follow_the_grid():
    model = make_model("ccl").eval()
    assert model.image_tokens(torch.randn(1, 3, 64, 32)).shape == (1, 8, 32)                # 4 x 2 patches of 16 pixels
    pos = torch.randn(1, 9, 4)
    assert cookie.resize_grid(pos, 3, 3) is pos and cookie.resize_grid(pos, 5, 2).shape == (1, 10, 4)
    other = Cookie(small(image_size=80), "ccl")
    other.load_state_dict(other.adapt(model.state_dict()))                                  # 3 x 3 -> 5 x 5
    close(other.image_pos, cookie.resize_grid(model.image_pos, 5, 5))


def test_cookie_eq2():
    t, w, b, s = (torch.randn(*x, dtype=torch.float64) for x in ((2, 3, 5), (4, 5), (4,), (4,)))
    out = cookie.word_features(t, w, b, s)
    for i, m, d in itertools.product(range(2), range(3), range(4)):
        close(out[i, m, d], sum(t[i, m, c] * w[d, c] for c in range(5)) + b[d] + s[d])


def loop_layer(layer, x, mask):
    """A standard (post-norm) transformer layer on one sequence x: (S, D), head by head; mask: list of S 0/1."""
    a, heads = layer.attention, layer.attention.heads
    w = x.shape[1] // heads
    q, k, v = a.self.query(x), a.self.key(x), a.self.value(x)
    out = torch.zeros_like(x)
    for h, i in itertools.product(range(heads), range(len(x))):
        part = slice(h * w, h * w + w)
        s = [(q[i, part] * k[j, part]).sum() / math.sqrt(w) if mask[j] else torch.tensor(-math.inf)
             for j in range(len(x))]
        e = [torch.exp(value - max(s)) for value in s]
        out[i, part] = sum(e[j] / sum(e) * v[j, part] for j in range(len(x)))
    x = a.output.LayerNorm(a.output.dense(out) + x)
    return layer.output.LayerNorm(layer.output.dense(F.relu(layer.intermediate.dense(x))) + x)


def test_cookie_eq3():
    model = make_model("ccl").double()
    v_hat = torch.randn(2, 5, 32, dtype=torch.float64)
    out = cookie.visual_features(v_hat, model.tav, model.s_image)
    with torch.no_grad():
        for i in range(2):
            close(out[i], loop_layer(model.tav.layer[0], v_hat[i], [1] * 5) + model.s_image, 1e-7)


def test_cookie_eq4():
    """The same two layers for both, pooling over the real tokens, unit norm."""
    model = make_model("ccl").eval().double()
    batch = make_batch(model.cfg)
    emb = model.encode_text(batch)
    with torch.no_grad():
        t = model.text(batch["text"], batch["text_mask"])
        for i in range(4):
            n = int(batch["text_mask"][i].sum())
            x = t[i] @ model.text_fc.weight.T + model.text_fc.bias + model.s_text
            for layer in model.ws.layer:
                x = loop_layer(layer, x, batch["text_mask"][i].tolist())
            mean = sum(x[j] for j in range(n)) / n
            close(emb[i], mean / mean.norm(), 1e-6)
        image = batch["image"].double()
        x = model.vision(image)[0].flatten(1).T @ model.image_fc.weight.T + model.image_fc.bias + model.image_pos[0]
        x = loop_layer(model.tav.layer[0], x, [1] * 9) + model.s_image
        for layer in model.ws.layer:
            x = loop_layer(layer, x, [1] * 9)
        close(model.encode_image({"image": image})[0], x.mean(0) / x.mean(0).norm(), 1e-6)


def test_cookie_eq4_gpo():
    """Against one bidirectional GRU on each set alone, without padding."""
    gpo = GPO().double()
    gru = nn.GRU(32, 32, batch_first=True, bidirectional=True).double()
    gru.load_state_dict({**dict(gpo.ahead.state_dict()),
                         **{k + "_reverse": v for k, v in gpo.back.state_dict().items()}})
    x, lengths = torch.randn(3, 6, 5, dtype=torch.float64), [1, 4, 6]
    mask = torch.tensor([[int(j < n) for j in range(6)] for n in lengths])
    out = gpo(x, mask)
    for i, n in enumerate(lengths):
        pe = torch.tensor([[f(p * 10000 ** (-2 * k / 32)) for k in range(16) for f in (math.sin, math.cos)]
                           for p in range(n)],
                          dtype=torch.float64)
        h = gru(pe[None])[0][0]
        w = torch.softmax(gpo.score((h[:, :32] + h[:, 32:]) / 2)[:, 0] / 0.1, 0)
        for d in range(5):
            ranked = sorted(x[i, :n, d].tolist(), reverse=True)
            close(out[i, d], sum(w[j] * ranked[j] for j in range(n)))
    close(gpo(x[2:]), out[2:])                                                              # a full set needs no mask
    out.sum().backward()
    assert all(p.grad is not None for p in gpo.parameters())


def test_cookie_eq5():
    for ids in ([1, 2, 3, 4], [1, 2, 1, 1]):                                        # the second: captions of one image
        q, k = units(4, 6).requires_grad_(), units(4, 6).requires_grad_()
        i = torch.tensor(ids)
        loss, slow = cookie.info_nce(q, k, i, i, own(4), 0.07), loop_nce(q, k, ids, ids, 0.07)
        close(loss, slow)
        for a, b in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(slow, (q, k))):
            close(a, b)
    one = torch.tensor([3, 3])
    assert cookie.info_nce(units(2, 6), units(2, 6), one, one, own(2), 0.07) == 0           # no negative is left


def test_cookie_eq5_is_float32_under_autocast():
    q, ids = F.normalize(torch.randn(4, 6), dim=-1), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cookie.info_nce(q, q, ids, ids, own(4), 0.05)
    close(loss, cookie.info_nce(q, q, ids, ids, own(4), 0.05))


def pair_parts(**over):
    """A model's embeddings of a batch and loop_nce() with its settings."""
    model = make_model(**over).eval()
    batch = make_batch(model.cfg, 5, [1, 2, 3, 2, 9])
    ids = batch["image_id"].tolist()
    return model, batch, lambda q, k: loop_nce(q.double(), k.double(), ids, ids, model.cfg.temp)


def test_cookie_eq6():
    model, batch, nce = pair_parts(task="ccl")
    close(model(batch)["logs"]["i2t"].double(), nce(model.encode_image(batch), model.encode_text(batch)), 1e-5)


def test_cookie_eq7():
    model, batch, nce = pair_parts(task="ccl")
    out = model(batch)
    close(out["logs"]["t2i"].double(), nce(model.encode_text(batch), model.encode_image(batch)), 1e-5)
    close(out["loss"], out["logs"]["i2t"] + out["logs"]["t2i"])


def test_cookie_eq8():
    """data.py's view: crop, flip, colour jitter, blur, colour drop, two independent draws."""
    views = cookie.VIEWS["pretrain"]
    assert (views["view1"], views["view2"]) == ("simclr", "simclr") and views["image"] == "resize"
    picture = data.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    a, b = (np.asarray(data.IMAGE_VIEWS["simclr"](picture, 32, random.Random(s), (0.2, 1.0))) for s in (1, 2))
    assert a.shape == (32, 32, 3) and (a != b).any()
    model, batch, _ = pair_parts()
    other = {**batch, "view1": torch.randn_like(batch["view1"])}
    torch.manual_seed(1)
    first = model(batch)["logs"]
    torch.manual_seed(1)
    second = model(other)["logs"]
    assert first["i"] != second["i"] and all(first[k] == second[k] for k in ("i2t", "t2i", "t"))


def test_cookie_eq9():
    model, batch, nce = pair_parts()
    one, two = (model.encode_image({"image": batch[k]}) for k in ("view1", "view2"))
    close(model(batch)["logs"]["i"].double(), nce(one, two), 1e-5)                      # q = view 1, k = view 2 only


def test_cookie_eq10_rates():
    cfg = small(max_text=40, positions=40)
    text = torch.randint(cfg.first_word, cfg.vocab_size, (4000, 40))
    text[:, 0], text[:, 29], text[:, 30:] = cfg.cls_id, cfg.sep_id, 0
    mask = (torch.arange(40) < 30).long().expand(4000, 40)
    words = mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
    args = (cfg.pad_id, cfg.mask_id, cfg.first_word, cfg.vocab_size)
    new, new_mask = cookie.augment_tokens(text, mask, words, *args, prob=0.2, mask=0.5, substitute=0.1)
    n, lengths = 28, new_mask.sum(1)
    assert abs((30 - lengths).float().mean() / n - 0.2 * 0.4) < 0.004                      # deleted
    assert abs((new == cfg.mask_id).float().sum() / (4000 * n) - 0.2 * 0.5) < 0.004        # masked
    kept = lengths == 30
    changed = ((new != text) & (new != cfg.mask_id))[kept].float().sum() / (kept.sum() * n)
    assert abs(changed / (1 - 0.2 * 0.4) - 0.2 * 0.1) < 0.01                                # substituted
    assert (new[:, 0] == cfg.cls_id).all() and (new.gather(1, lengths[:, None] - 1) == cfg.sep_id).all()
    assert (new == cfg.sep_id).sum() == 4000 and ((new == 0) == (new_mask == 0)).all()
    assert (new_mask == (torch.arange(40) < lengths[:, None])).all()
    again, _ = cookie.augment_tokens(text, mask, words, *args, prob=0.2, mask=0.5, substitute=0.1)
    assert (again != new).any()                                                             # two draws differ


def test_cookie_eq10_order_and_emptiness():
    cfg = small()
    text, mask = sentences(cfg, 6)
    words = mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
    args = (cfg.pad_id, cfg.mask_id, cfg.first_word, cfg.vocab_size)
    for _ in range(50):
        # delete all
        new, new_mask = cookie.augment_tokens(text, mask, words, *args, prob=1.0, mask=0.0, substitute=0.0)
        assert (new_mask.sum(1) == 3).all()                                                 # [CLS] word [SEP]
        for row, old, ok in zip(new.tolist(), text.tolist(), words.tolist()):
            assert row[0] == cfg.cls_id and row[2] == cfg.sep_id and row[1] in [t for t, w in zip(old, ok) if w]
        new, new_mask = cookie.augment_tokens(text, mask, words, *args, prob=0.5, mask=0.0, substitute=0.0)
        for row, m, old in zip(new.tolist(), new_mask.tolist(), text.tolist()):
            rest = iter(old)
            assert all(t in rest for t in row[:sum(m)])                                     # a subsequence, in order
    bare = torch.tensor([[cfg.cls_id, cfg.sep_id] + [0] * 9])               # a caption without a word stays as it is
    new, new_mask = cookie.augment_tokens(bare, (bare > 0).long(), torch.zeros_like(bare, dtype=torch.bool), *args)
    assert (new == bare).all() and new_mask.sum() == 2
    new, new_mask = cookie.augment_tokens(text, mask, words, *args, prob=0.0)
    assert (new == text).all() and (new_mask == mask).all()


def test_cookie_eq11(monkeypatch):
    model, batch, nce = pair_parts()
    drawn, draw = [], model.text_view
    monkeypatch.setattr(model, "text_view", lambda b: drawn.append(draw(b)) or drawn[-1])
    out = model(batch)
    one, two = (model.embed_text(*view) for view in drawn)
    close(out["logs"]["t"].double(), nce(one, two), 1e-5)


@pytest.mark.parametrize("over, names",
                         [({}, "i2t t2i i t"), ({"vcl": False}, "i2t t2i t"), ({"tcl": False}, "i2t t2i i"),
                          ({"vcl": False, "tcl": False}, "i2t t2i"), ({"ccl_on": "view1"}, "i2t t2i i t"),
                          ({"ccl_on": "view1", "vcl": False}, "i2t t2i t")])
def test_cookie_eq12(over, names):
    model = make_model(**over)
    calls = {"image": 0, "text": 0}
    model.vision.register_forward_hook(lambda *a: calls.__setitem__("image", calls["image"] + 1))
    model.text.register_forward_hook(lambda *a: calls.__setitem__("text", calls["text"] + 1))
    out = model(make_batch(model.cfg))
    assert list(out["logs"]) == names.split() and calls == {"image": 1, "text": 1}          # one call a modality
    close(out["loss"], sum(out["logs"].values()))


def test_ccl_on_view1():
    model = make_model(ccl_on="view1", tcl=False, text_layers=1).eval()
    batch = make_batch(model.cfg)
    torch.manual_seed(5)
    text = model.embed_text(*model.text_view(batch))
    torch.manual_seed(5)
    out = model(batch)
    image = model.encode_image({"image": batch["view1"]})
    close(out["logs"]["i2t"].double(),
          loop_nce(image.double(), text.double(), range(4), range(4), model.cfg.temp), 1e-5)


# --------------------------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("task", ["ccl", "pretrain", "retrieval", "vtm", "hashing"])
def test_chunks_equal_the_whole_batch(task):
    """In eval mode of batch norm; values and gradients."""
    whole, results = make_model(task), []
    batch = make_batch(whole.cfg, 6)
    for chunk in (0, 4):
        model = Cookie(small(chunk=chunk), task, 5)
        model.load_state_dict(whole.state_dict())
        for norm in model.train().norms:
            norm.eval()
        torch.manual_seed(3)
        loss = model(batch)["loss"]
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    close(results[0][0], results[1][0], 1e-5)
    for a, b in zip(results[0][1], results[1][1]):
        close(a, b, 2e-4)


def test_chunks_update_running_statistics_once():
    model = make_model("ccl", chunk=2)
    batch = make_batch(model.cfg, 6)
    expected = Cookie(small(), "ccl")
    expected.load_state_dict(model.state_dict())
    expected.train()
    with torch.no_grad():
        for part in batch["image"].split(2):
            expected.embed_image(part)
    model(batch)["loss"].backward()
    assert int(model.vision.bn1.num_batches_tracked) == 3
    for (name, a), b in zip(model.vision.named_buffers(), expected.vision.buffers()):
        close(a, b, 1e-6)
    assert all(norm.momentum == 0.1 for norm in model.norms)


def worker(rank, path, task, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    state, batch, seeds = torch.load(f"{out}/{task}.pt")
    model = Cookie(small(tcl_prob=0.0), task, 5).double()
    model.load_state_dict(state)
    for norm in model.train().norms:
        norm.eval()
    half = {k: v[3 * rank:3 * rank + 3] for k, v in batch.items()}
    loss = model(half)["loss"]
    loss.backward()
    grads = [p.grad / 2 for p in model.parameters()]                                        # what DDP's mean does
    for g in grads + [loss.detach_()]:
        dist.all_reduce(g)
    if rank == 0:
        torch.save((loss / 2, grads), f"{out}/{task}-out.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    for task in ("ccl", "pretrain", "retrieval", "vtm"):
        model = make_model(task, tcl_prob=0.0).double()
        for norm in model.norms:
            norm.eval()
        batch = make_batch(model.cfg, 6, [1, 2, 3, 1, 4, 5])                            # an image with captions on both
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        torch.save((model.state_dict(), batch, 0), tmp_path / f"{task}.pt")
        loss = model(batch)["loss"]
        loss.backward()
        context = mp.get_context("fork")
        running = [context.Process(target=worker, args=(r, tmp_path / f"{task}.sync", task, tmp_path))
                   for r in range(2)]
        for p in running:
            p.start()
        for p in running:
            p.join()
            assert p.exitcode == 0
        other, grads = torch.load(tmp_path / f"{task}-out.pt")
        close(other, loss.detach())
        for (name, p), g in zip(model.named_parameters(), grads):
            torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=1e-9, msg=lambda m: f"{task} {name}: {m}")


# ------------------------------------------------------------------------------------------------------------- protocol

VARIANTS = [{}, {"pooling": "gpo"}, {"ws_shared": False}, {"ws": "fc"}, {"ws_layers": 0, "tav_layers": 0},
            {"ws_layers": 4}, {"checkpointing": True, "dropout": 0.1}]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("over", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(task, over):
    model = make_model(task, **over)
    out = model(make_batch(model.cfg))
    out["loss"].backward()
    assert (torch.isfinite(out["loss"]) and out["loss"].shape == ()
            and all(not v.requires_grad for v in out["logs"].values()))
    assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not [n for n, p in model.named_parameters() if not p.grad.any() and ".key.bias" not in n
                and "token_type" not in n and not n.endswith("fc1.bias") and "gpo" not in n]


def test_vtm_with_encoders():
    model = make_model("vtm", vtm_te=True)
    out = model(make_batch(model.cfg))
    out["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    plain = make_model("vtm")
    assert not hasattr(plain, "ws") and not hasattr(plain, "vision")                # section 4.2: FC and pooling alone


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("b", [1, 2])
def test_small_batches(task, b):
    model = make_model(task)
    assert torch.isfinite(model(make_batch(model.cfg, b))["loss"])


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16(task):
    model = make_model(task)
    batch = make_batch(model.cfg)
    torch.manual_seed(1)
    plain = model(batch)["loss"]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    assert loss.dtype == torch.float32 and abs(loss - plain) < 0.15 * abs(plain) + 0.05


def test_offers():
    kinds = {t: {m for m in ("encode_image", "encode_text", "encode_clip", "hash_codes", "token_scores")
                 if callable(getattr(make_model(t), m))}
             for t in TASKS}
    assert kinds["pretrain"] == kinds["ccl"] == kinds["retrieval"] == {"encode_image", "encode_text", "token_scores"}
    assert kinds["vtm"] == {"encode_clip", "encode_text"} and kinds["hashing"] == {"hash_codes"}
    assert ev.offered(make_model("hashing")) == ["hashing"]


def test_embeddings_do_not_depend_on_the_batch():
    model = make_model("ccl").eval()
    batch = make_batch(model.cfg)
    for encode in (model.encode_image, model.encode_text):
        close(encode(batch)[1:2], encode({k: v[1:2] for k, v in batch.items()}), 1e-5)
        close(encode(batch).norm(dim=-1), torch.ones(4), 1e-5)
    longer = {**batch, "text": F.pad(batch["text"], (0, 3)), "text_mask": F.pad(batch["text_mask"], (0, 3))}
    close(model.encode_text(longer), model.encode_text(batch), 1e-5)                        # padding does not count


def test_backbones_have_torchvisions_keys(tmp_path):
    for name in ("resnet50", "resnet101", "resnext101_32x8d"):
        with torch.device("meta"):
            theirs = {k: v.shape for k, v in getattr(torchvision.models, name)().state_dict().items()}
            mine = cookie.ResNet(name)
        assert ({k: v.shape for k, v in mine.state_dict().items()}
                == {k: v for k, v in theirs.items() if not k.startswith("fc.")})
        assert (mine.width, mine.stride) == (2048, 32)


def test_backbone_computes_what_torchvision_computes():
    theirs = torchvision.models.resnet50().eval()
    mine = cookie.ResNet("resnet50").eval()
    assert not mine.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(mine(x).mean((2, 3)), theirs(x), 1e-4)


def test_load_pretrained(tmp_path):
    """A ResNet of WSL's or torchvision's names, a BERT as file or as the folder that the hub gives."""
    model = make_model("ccl")
    state = {"module." + k: torch.randn_like(v) for k, v in model.vision.state_dict().items() if v.is_floating_point()}
    torch.save({"state_dict": {**state, "module.fc.weight": torch.zeros(3)}}, tmp_path / "v.pth")
    bert = {("bert." + k).replace("LayerNorm.weight", "LayerNorm.gamma"): torch.randn_like(v)
            for k, v in model.text.state_dict().items()}
    more = {"cls.predictions.bias": torch.zeros(2), "bert.pooler.dense.weight": torch.zeros(2),
            "bert.embeddings.position_ids": torch.zeros(2)}
    for folder in (False, True):
        place = tmp_path / "hub" if folder else tmp_path / "t.safetensors"
        if folder:
            place.mkdir()
            (place / "config.json").write_text(
                json.dumps({"model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu"}))
        save_file({**bert, **more}, place / "model.safetensors" if folder else place)
        for p in model.parameters():
            p.data.zero_()
        vision, text = cookie.load_pretrained(model, vision=tmp_path / "v.pth", text=place).splitlines()
        assert (f"matched {len(state)} of {len(state) + 1} tensors" in vision
                and "missing 0; unexpected 1: fc.weight" in vision)
        assert f"matched {len(bert)} of {len(bert) + 3}" in text
        assert "unexpected 2: cls.predictions.bias, pooler.dense.weight; ignored: embeddings.position_ids" in text
        assert ("the file does not tell" in text) != folder
        for name, v in state.items():
            close(model.vision.state_dict()[name[len("module."):]], v)
        for name, v in bert.items():
            close(model.text.state_dict()[name[len("bert."):].replace("gamma", "weight")], v)


def test_load_pretrained_refuses(tmp_path):
    model = make_model("ccl")
    bert, word = dict(model.text.state_dict()), "embeddings.word_embeddings.weight"
    for wrong, message in (({**bert, "encoder.layer.9.x": torch.zeros(2)}, "no place for encoder.layer.9.x"),
                           ({k: v for k, v in bert.items() if k != word},
                            "not filled: text.embeddings.word_embeddings.weight"),
                           ({**bert, word: torch.zeros(9, 24)},
                            r"word_embeddings.weight is \(9, 24\) there, .* \(57, 24\)")):
        save_file(wrong, tmp_path / "t.safetensors")
        with pytest.raises(SystemExit, match=message):
            cookie.load_pretrained(model, text=tmp_path / "t.safetensors")
    save_file(bert, tmp_path / "t.safetensors")
    with pytest.raises(SystemExit, match="hidden_act gelu, this model has relu"):           # a shape does not show it
        cookie.load_pretrained(make_model("ccl", act="relu"), text=tmp_path / "t.safetensors")
    for tower, task in (("vision", "vtm"), ("text", "hashing")):
        with pytest.raises(SystemExit, match=f"for {task} has no (image|text) tower"):
            cookie.load_pretrained(make_model(task), **{tower: tmp_path / "t.safetensors"})
    resnet = {k: v for k, v in model.vision.state_dict().items() if k != "layer2.0.bn1.running_var"}
    save_file(resnet, tmp_path / "v.safetensors")
    with pytest.raises(SystemExit, match="not filled: vision.layer2.0.bn1.running_var"):
        cookie.load_pretrained(model, vision=tmp_path / "v.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="cannot be read as weights"):
        cookie.load_pretrained(model, text=tmp_path / "t.safetensors")


def test_base_is_the_papers():
    """Section 4.1, read off the settings that `--preset base` gives and the model that they build."""
    for stage, (epochs, batch) in enumerate(((30, 576), (10, 288))):
        loop, cfg = train.settings(cookie, "base", "pretrain", {}, stage)
        assert (loop.optimizer, loop.lr, loop.epochs, loop.batch_size, loop.steps) == ("adamw", 2e-5, epochs, batch, 0)
        rates = [train.learning_rate(step, 100, loop) for step in range(100)]       # a tenth after half of the stage
        assert rates[:50] == [2e-5] * 50 and rates[50:] == pytest.approx([2e-6] * 50)
        assert loop.weight_decay == 0.01                                                # BERT's; the paper names none
    assert cookie.RECIPE["pretrain"][0]["task"] == "ccl" and "task" not in cookie.RECIPE["pretrain"][1]
    assert (cfg.vcl, cfg.tcl, cfg.ccl_on) == (True, True, "raw")
    with torch.device("meta"):
        model = Cookie(cfg, "pretrain")
    assert model.image_pos.shape == (1, 256, 1024) and cfg.max_text == 50
    assert (model.image_fc.in_features, model.text_fc.in_features, len(model.text.encoder.layer)) == (2048, 768, 12)
    assert (len(model.tav.layer), len(model.ws.layer)) == (1, 2) and not hasattr(model, "ws_text")
    for layer in (*model.tav.layer, *model.ws.layer):
        assert layer.attention.heads == 8 and layer.intermediate.dense.out_features == 1024
    assert {g["lr"] for g in model.param_groups(loop)} == {2e-5, 2e-5 * 0.1}                # the ResNeXt's a tenth
    loop, cfg = train.settings(cookie, "base", "hashing", {})
    assert (cfg.image_size, cfg.backbone) == (224, "resnet50")


def test_learning_rates():
    loop = train.Loop(lr=1.0, weight_decay=0.1)
    def rates(**over):
        model = make_model("ccl", **over)
        by = {id(p): g for g in model.param_groups(loop) for p in g["params"]}
        assert len(by) == len(list(model.parameters()))
        return {n: (by[id(p)]["lr"], by[id(p)]["weight_decay"]) for n, p in model.named_parameters()}
    r = rates(vision_lr=0.01, text_lr=0.1)
    assert (r["vision.conv1.weight"] == (0.01, 0.1) and r["vision.bn1.weight"] == (0.01, 0)
            and r["text_fc.weight"] == (1, 0.1))
    assert r["text.embeddings.LayerNorm.bias"] == (0.1, 0) and r["s_image"] == (1, 0)
    assert rates()["vision.conv1.weight"][0] == 1
    with torch.device("meta"):
        model = Cookie(small(backbone="resnext101_32x8d"), "ccl")
    assert {g["lr"] for g in model.param_groups(loop)} == {0.1, 1.0}                # section 4.1: a tenth for ResNeXt


def test_embed_bert(tmp_path):
    model = make_model("ccl", embed="bert", ws_layers=0)
    batch = make_batch(model.cfg)
    t = model.eval().text(batch["text"], batch["text_mask"])
    for i in range(4):
        mean = t[i, :int(batch["text_mask"][i].sum())].mean(0)
        close(model.encode_text(batch)[i], mean / mean.norm(), 1e-5)
    assert [n for n, _ in model.named_children()] == ["text"] and model.encode_image is None
    with pytest.raises(SystemExit, match="nothing to train"):
        model(batch)


# ---------------------------------------------------------------------------------------------------------- fine-tuning

def test_hinge():
    q, k, margin = units(4, 6).requires_grad_(), units(5, 6), 0.2
    ids, key_ids, at = [1, 2, 3, 2], [9, 1, 2, 3, 2], [1, 2, 3, 4]
    hard = mean = 0
    for i in range(4):
        costs = [F.relu(margin - q[i] @ k[at[i]] + q[i] @ k[j]) for j in range(5) if key_ids[j] != ids[i]]
        hard, mean = hard + max(costs) / 4, mean + sum(costs) / len(costs) / 4
    for slow, h in ((hard, 1.0), (mean, 0.0)):
        fast = cookie.hinge_triplet(q, k, torch.tensor(ids), torch.tensor(key_ids), torch.tensor(at),
                                    margin, torch.tensor(h))
        close(fast, slow)
        close(torch.autograd.grad(fast, q)[0], torch.autograd.grad(slow, q, retain_graph=True)[0])
    same = torch.ones(4, dtype=torch.long)
    assert cookie.hinge_triplet(q, q, same, same, own(4), margin, torch.tensor(1.0)) == 0   # no negative


def test_hinge_warmup():
    model = make_model("retrieval", warmup_epochs=2)
    assert model.hard == 0
    model.after_step(9, 100, 5)
    assert model.hard == 0
    model.after_step(10, 100, 5)
    assert model.hard == 1 and make_model("retrieval", warmup_epochs=0).hard == 1


@pytest.mark.parametrize("labels, bits", [(5, 16), (32, 16), (80, 64), (80, 16), (21, 12), (80, 32)])
def test_hash_centers(labels, bits):
    centers, tie = cookie.hash_centers(labels, bits)
    assert centers.shape == (labels, bits) and set(centers.flatten().tolist()) == {-1.0, 1.0} == set(tie.tolist())
    distance = (bits - centers @ centers.T) / 2
    off = distance[~torch.eye(labels, dtype=torch.bool)]
    if bits in (16, 64) and labels <= 2 * bits:
        assert set(off.tolist()) <= {bits / 2, float(bits)}
    else:
        assert (centers.sum(1) == 0).all() and off.min() >= bits / 4 and off.mean() >= bits / 2 - 0.5
    assert all(torch.equal(a, b) for a, b in zip(cookie.hash_centers(labels, bits), (centers, tie)))


def test_target_centers():
    centers, tie = torch.tensor([[1., 1, -1, -1], [1., -1, 1, -1], [1., -1, -1, 1]]), torch.tensor([-1., 1, 1, -1])
    labels = torch.tensor([[1., 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert (cookie.target_centers(labels, centers, tie).tolist()
            == [[1, 1, -1, -1], [1, 1, 1, -1], [1, -1, -1, -1], [-1, 1, 1, -1]])


def test_csq_loss():
    a, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[1., -1, 1, 1], [-1, -1, 1, -1], [1, 1, 1, 1]])
    weight = torch.tensor([1., 0, 1])
    central = quantization = 0
    for i in (0, 2):
        for k in range(4):
            y, c = math.tanh(a[i, k]), float(target[i, k])
            central -= ((c + 1) / 2 * math.log((y + 1) / 2) + (1 - (c + 1) / 2) * math.log(1 - (y + 1) / 2)) / 8
            quantization += (abs(y) - 1) ** 2 / 8
    for mine, theirs in zip(cookie.csq_loss(a, target, weight, 0.05), (central, quantization)):
        close(mine, theirs)
    # saturated, unlabelled
    assert all(torch.isfinite(x) for x in cookie.csq_loss(1e4 * a, target, torch.zeros(3), 0.05))


# ---------------------------------------------------------------------------------------------------------- evaluations

# pearsonr and spearmanr of scipy 1.17.1 for the 100 cases below, five cases a line
SCIPY = """
0.322094636 0.353479853 0.925079824 0.785221494 0.681184801 0.828571429 0.886698052 0.665964421 0.456455110 0.376676987
0.822122594 0.702562927 0.298538457 0.280566802 0.760873991 0.538424127 0.538803978 0.578431373 0.681300544 0.486719206
0.306299855 0.269838057 0.751912777 0.613419266 0.538456171 0.507018717 0.880253473 0.675294985 0.688261877 0.533333333
0.898524159 0.791013233 0.488123932 0.435897436 0.718338282 0.447831271 0.632816532 0.569230769 0.986356533 0.974679434
0.736543295 0.685314685 0.867668615 0.660535354 0.686828720 0.663636364 0.828285816 0.391631653 0.353629918 0.381562882
0.843299440 0.674822913 0.328385220 0.275000000 0.798912827 0.638767412 0.371098838 0.284848485 0.599719579 0.257839062
0.522712287 0.515173068 0.949947489 1.000000000 0.136268191 0.214285714 0.765948221 0.587139369 0.481732687 0.466151866
0.746791022 0.569050552 0.580326576 0.602608696 0.959531517 0.784729917 0.456738707 0.398522167 0.903070140 0.736405674
0.420690921 0.368035191 0.653505603 0.367519297 0.321677502 0.248484848 0.965068263 0.820782682 0.172871172 0.120689655
0.788195733 0.493816403 0.116611701 0.285714286 0.800089748 0.591239727 0.590797837 0.593828646 0.946028070 0.554545455
0.547322345 0.545912911 0.824842042 0.734147455 0.709772095 0.681203008 0.825383706 0.522271439 0.059886937 -0.018181818
0.858948869 0.757589671 0.624816078 0.524674472 0.978720238 0.974679434 0.247970613 0.221575985 0.873404338 0.777638805
0.475670400 0.427442123 0.615439686 0.281227975 0.474011583 0.501012146 0.793424030 0.615051593 0.557996148 0.530080214
0.778805123 0.564834334 0.389983262 0.571428571 0.941420201 0.675925926 0.586720337 0.528592375 0.991739594 0.900000000
0.043764093 0.212121212 0.747729727 0.416456335 0.660449719 0.678571429 0.620935254 0.054800776 0.409626659 0.407843137
0.820123311 0.598128317 0.530339652 0.463247863 0.705671889 0.268374455 0.391974515 0.378571429 0.922216181 0.652012863
0.517882964 0.515789474 0.685834811 0.436524002 0.579286473 0.608391608 0.760330269 0.615302831 0.360631297 0.429870130
0.781290228 0.482896341 0.222953246 0.400000000 0.914412212 0.707528736 0.465437802 0.440065681 0.908900628 0.636847175
0.590777599 0.602941176 0.946234836 0.896784797 0.557009589 0.508866995 0.749822067 0.526708018 0.360114567 0.356567093
0.674125041 0.370579457 0.390137474 0.325128205 0.775610954 0.579524680 0.156869511 0.128461538 0.757496474 0.562134958
"""


def test_sts_metrics_equal_scipys():
    want = iter(map(float, SCIPY.split()))
    for i in range(100):
        g = random.Random(i)
        n = g.randint(3, 40)
        x = [g.uniform(-1, 1) for _ in range(n)]
        y = [a * g.uniform(0, 1) + g.uniform(-1, 1) for a in x]
        if i % 2:
            x, y = [round(3 * a) for a in x], [round(3 * a) for a in y]                     # ties
            x[0], x[1], y[0], y[1] = 9, -9, 8, -7                                           # never constant
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
    ql, dl = (torch.randint(0, 4, (n, 3), generator=g) // 2 for n in (5, 11))       # 0 or 1, some rows without label
    within = whole = 0
    for q, labels in zip(query, ql):
        order = sorted(range(11), key=lambda j: (int((q != database[j]).sum()), j))         # ties: the database's order
        hits, total = [], 0
        for place, j in enumerate(order[:r], 1):
            if (labels & dl[j]).any():
                hits.append(place)
                total += len(hits) / place
        within += total / max(1, len(hits)) / 5
        whole += total / max(1, sum(bool((labels & d).any()) for d in dl)) / 5
    for mine, theirs in zip(ev.map_at(query, database, ql, dl, r, chunk=2), (within, whole)):
        close(mine, 100 * theirs)


@pytest.mark.parametrize("pooling, size", [("mean", 48), ("gpo", 48), ("mean", 40)])  # 40: no multiple of a patch's 16
def test_token_scores(pooling, size):
    """Figure 3: the final vector against each token behind the WS-TE."""
    model = make_model("ccl", pooling=pooling, image_size=size).eval()
    batch = make_batch(model.cfg)
    with torch.no_grad():
        scores, image, text = model.token_scores(batch), model.encode_image(batch), model.encode_text(batch)
        areas, words = model.image_tokens(batch["image"]), model.text_tokens(batch["text"], batch["text_mask"])
    assert scores["image"].shape == (4, 3, 3) and scores["text"].shape == batch["text"].shape
    for i, j in itertools.product(range(4), range(9)):
        close(scores["image"][i, j // 3, j % 3], areas[i, j] @ image[i] / areas[i, j].norm(), 1e-5)
        close(scores["text"][i, j], words[i, j] @ text[i] / words[i, j].norm(), 1e-5)


def test_by_rank():
    picture = data.Image.new("RGB", (4, 4), (200, 200, 200))
    out = np.asarray(ev.by_rank(picture, torch.tensor([[0.9, 0.1], [0.2, 0.3]])))
    assert out[0, 0, 0] == 200 and out[0, 3, 0] == 40 and out[3, 0, 0] < out[3, 3, 0] < 200  # by rank, not by value


# --------------------------------------------------------------------------------------------------- as a user calls it

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few pictures in the official formats, vocabulary and clips; no built-in world is drawn."""
    root, g = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]) + "\n")
    rows, lists, videos, sentences = [], [], [], []
    (root / "features").mkdir()
    for i in range(12):
        data.Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [" ".join(g.choice(list("abcdefgh"), 4)) for _ in range(2)]})
        lists.append(f"some/where/{i}.png " + " ".join(map(str, [1 - i % 2, i % 2, int(i % 3 == 0)])))
        np.save(root / "features" / f"v{i}.npy", g.normal(size=(3 + i * 4, 18)).astype(np.float32))     # 3 to 47 frames
        videos.append({"video_id": f"v{i}", "split": "train" if i < 8 else "test"})
        sentences += [{"video_id": f"v{i}", "caption": " ".join(g.choice(list("abcdefgh"), 4))} for _ in range(2)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "lists").mkdir()
    for name, part in (("train", lists), ("database", lists[4:] + ["11.png 0 0 0"]),
                       ("test", lists[:4] + ["10.png 0 0 0"])):
        (root / "lists" / f"{name}.txt").write_text("\n".join(part) + "\n")
    (root / "clips.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (root / "sts-test.csv").write_text("".join(
        f"news\tx\t1\t{i}\t{i % 6}\t{' '.join(g.choice(list('abcdefgh'), 4))}\t{' '.join('abcdefgh'[:1 + i % 6])}\n"
        for i in range(12)))
    return root


SMALL = ("--batch_size 4 --steps 2 --image_size 32 --width 16 --embed_dim 16 --te_heads 2 --heads 2 "
         "--text_layers 1 --log_every 1".split())


def run(world, out, *flags):
    return train.main(["--model", "cookie", "--vocab", str(world / "vocab.txt"), "--out", str(out),
                       *SMALL, *map(str, flags)])


def test_train_and_evaluate(world, tmp_path):
    pairs = ("--data", world / "pairs.jsonl")
    result = run(world, tmp_path / "a", *pairs)
    assert result["retrieval"]["metrics"]["rsum"] > 0
    one, two = (json.loads((tmp_path / "a" / f"stage-{s}" / "config.json").read_text()) for s in (1, 2))
    assert (one["task"], two["task"]) == ("ccl", "pretrain") and two["loop"]["init"].endswith("stage-1")
    assert "t" in json.loads((tmp_path / "a" / "stage-2" / "log.jsonl").read_text().splitlines()[-1])
    run(world, tmp_path / "b", *pairs, "--evals", "none", "--ws_layers", 0, "--tav_layers", 0,
        "--pooling", "gpo", "--seed", 1)
    run(world, tmp_path / "r", *pairs, "--task", "retrieval", "--init", tmp_path / "a")

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    alone = ev.main([a, "--task", "retrieval"])["retrieval"]
    there = ev.find_run(b) / "config.json"
    info = json.loads(there.read_text())
    # whatever b learnt from: one gallery
    there.write_text(json.dumps({**info, "loop": {**info["loop"], "data": "another.json"}}))
    both = ev.main([a, "--task", "retrieval", "--ensemble", a, b])["retrieval"]
    assert "mean similarity of 2 runs" in [r["scores"] for r in both["rows"]] and len(both["protocol"]["ensemble"]) == 2
    sims = []
    for path in (a, b):
        model, of_run = ev.load_run(path)
        one = ev.Eval(model, of_run, "retrieval", ev.argparse.Namespace(**{**vars(ev.parser().parse_args([path])),
                                                                           "data": str(world / "pairs.jsonl")}), 0, 1)
        records = one.open()
        with torch.no_grad():
            image, text = (torch.cat([encode(b) for b in one.batches(records, what)])
                           for encode, what in ((model.encode_image, "image"), (model.encode_text, "text")))
        sims.append(image @ text.T)
    owner = torch.arange(12).repeat_interleave(2)
    assert both["metrics"] == ev.recall(sum(sims) / 2, owner) and not torch.equal(sims[0].argsort(), sims[1].argsort())
    assert both["metrics"] != ev.recall(sims[0], owner)
    assert alone["protocol"]["protocol"].startswith("in domain, pre-trained only")
    with pytest.raises(SystemExit, match="at least one other"):
        ev.main([a, "--task", "retrieval", "--ensemble", a])

    shown = ev.main([a, "--task", "attention", "--beside", b])["attention"]
    picture = data.Image.open(shown["protocol"]["file"])
    assert len(shown["rows"]) == 2 and picture.width == 3 * 266 + 10
    assert len(shown["rows"][1]["top words"].split(", ")) <= 5
    ev.main([a, "--task", "attention", "--image", str(world / "3.png"), "--text", "a b c",
             "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()
    timed = ev.main([a, "--task", "speed", "--sizes", "2,4,8", "--beside", b])["speed"]
    assert (len(timed["rows"]) == 6 and len(timed["metrics"]) == 2
            and all(float(r["seconds"]) > 0 for r in timed["rows"]))

    with pytest.raises(SystemExit, match="name files with --data"):
        ev.main([a, "--task", "sts"])
    graded = ev.main([a, "--task", "sts", "--data", str(world / "sts-test.csv")])["sts"]
    assert [r["scores"] for r in graded["rows"]] == ["bag of words", "model"] and graded["rows"][0]["pairs"] == 12
    assert "pre-trained only" in graded["protocol"]["protocol"]
    assert graded["protocol"]["vector"] == "mean of layer 2 of the WS-TE over all tokens"


def test_speed_of_a_model_that_scores_pairs(world, tmp_path):
    """Any model with match(): here CODIS' own, of which both ways are timed."""
    train.main(["--model", "codis", "--data", str(world / "pairs.jsonl"), "--vocab", str(world / "vocab.txt"),
                "--out", str(tmp_path / "c"), "--steps", "0", "--batch_size", "4", "--evals", "none",
                "--image_size", "24", "--vision_layers", "1", "--queue_size", "8", "--codewords", "8"])
    rows = ev.main([str(tmp_path / "c"), "--task", "speed", "--sizes", "2,6"])["speed"]["rows"]
    assert [r["way"] for r in rows] == ["dual encoder"] * 2 + ["match, every pair"] * 2
    model, info = ev.load_run(tmp_path / "c")
    run = ev.Eval(model, info, "retrieval",
                  ev.argparse.Namespace(**{**vars(ev.parser().parse_args([""])), "pairs": 5}), 0, 1)
    records = run.open()
    images, texts = (list(run.batches(records.subset(range(3)), what)) for what in ("image", "text"))
    pairs = {**{k: torch.cat([b[k] for b in images])[torch.arange(18) // 6] for k in ("image",)},
             **{k: torch.cat([b[k] for b in texts])[torch.arange(18) % 6] for k in ("text", "text_mask")}}
    with torch.no_grad():
        close(ev.score_pairs(run, images, texts), model.match(pairs), 1e-4)                 # all 3 x 6 pairs, in order


def test_speed_beside_a_one_stream_model_of_regions(world, tmp_path):
    """Figure 4's other side: a model without encoders, which looks at stored regions (here ImageBERT),
    beside a dual encoder."""
    records, boxes = (data.open_source("pairs", str(world / "pairs.jsonl"), "test"),
                      {"boxes": [[0, 0, 16, 32], [16, 0, 32, 32]]})
    regions = str(tmp_path / "r.safetensors")
    data.collect_regions(regions, records, 12,
                         lambda r: data.box_regions({**r, **boxes, "labels": [0, 1]}, Path(r["image"]).name),
                         {"detector": data.STAND_IN, "root": str(world), "label_names": '["a", "b"]'}, quiet=True)
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none", "--steps", 0)
    train.main(["--model", "imagebert", "--data", str(world / "pairs.jsonl"), "--vocab", str(world / "vocab.txt"),
                "--regions", regions, "--out", str(tmp_path / "b"), "--steps", "0", "--batch_size", "4",
                "--evals", "none", "--width", "16", "--layers", "1", "--heads", "2"])
    result = ev.main([str(tmp_path / "a"), "--task", "speed", "--sizes", "2,4", "--beside", str(tmp_path / "b"),
                      "--regions", regions])
    rows = result["speed"]["rows"]
    assert [(r["way"], r["pictures"], r["captions"]) for r in rows] == [("dual encoder", 2, 4), ("dual encoder", 4, 8),
                                                                        ("match, every pair", 2, 4),
                                                                        ("match, every pair", 4, 8)]
    assert result["speed"]["protocol"]["not_counted"] == "reading files, making regions"


def test_growth(world, tmp_path, monkeypatch):
    """Of seconds that grow with n and with n^2, after a first call that is not counted."""
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none", "--steps", 0)
    for power in (1, 2):
        seconds = iter([0.5 * n ** power for n in (2, 4, 12)])
        monkeypatch.setattr(ev, "timed", lambda fn, device, repeats: next(seconds))
        result = ev.main([str(tmp_path / "a"), "--task", "speed", "--sizes", "2,12,4"])["speed"]
        assert [r["growth"] for r in result["rows"]] == [None] + [f"{power:.2f}"] * 2
        assert ([r["pictures"] for r in result["rows"]] == [2, 4, 12]
                and [r["captions"] for r in result["rows"]] == [4, 8, 24])
        close(list(result["metrics"].values())[0], float(power), 1e-6)


def test_vtm_and_hashing(world, tmp_path):
    clips = ("--data", world / "clips.json")
    for pooling in ("mean", "gpo"):
        result = run(world, tmp_path / pooling, "--task", "vtm", "--pooling", pooling, *clips)["vtm"]
        assert result["protocol"]["lists"] == "full" and "clips" in result["rows"][0]
    config = json.loads((tmp_path / "gpo" / "config.json").read_text())
    assert config["config"]["frame_width"] == 18
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none")
    run(world, tmp_path / "v", "--task", "vtm", "--init", tmp_path / "a", "--steps", 0, "--evals", "none", *clips)
    run(world, tmp_path / "i", "--task", "hashing", "--init", tmp_path / "a", "--steps", 0, "--evals", "none",
        "--image_root", world, "--data", world / "lists")
    state, clip, hashes = (ev.load_run(tmp_path / name)[0].state_dict() for name in "avi")
    # BERT alone, as section 4.2 has it
    assert all(torch.equal(v, state[k]) for k, v in clip.items() if k.startswith("text."))
    assert not torch.equal(clip["text_fc.weight"], state["text_fc.weight"])
    assert all(torch.equal(v, state[k]) for k, v in hashes.items() if k.startswith("vision."))
    np.save(world / "features" / "v8.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(SystemExit, match="5 features a frame"):
        ev.main([str(tmp_path / "gpo")])
    lists, folder = ("--task", "hashing", "--bits", 8, "--image_root", world), ("--data", world / "lists")
    result = run(world, tmp_path / "h", *lists, *folder)["hashing"]
    assert result["protocol"]["left_out_without_label"] == [1, 1] and result["rows"][0]["codes"] == "random codes"
    assert (result["rows"][1]["queries"] == 4 and result["rows"][1]["database"] == 8
            and 0 < result["metrics"]["map"] <= 100)
    again = ev.main([str(tmp_path / "h"), "--data", str(world / "lists" / "test.txt"),
                     "--database", str(world / "lists" / "database.txt"), "--image_root", str(world)])["hashing"]
    assert again["metrics"] == result["metrics"]
    with pytest.raises(SystemExit, match="--database"):
        ev.main([str(tmp_path / "h"), "--data", str(world / "lists" / "test.txt")])


def test_frames_view(world):
    records = data.open_source("clips", str(world / "clips.json"), None)
    views = data.Views(records, cookie.VIEWS["vtm"], data.get_tokenizer(str(world / "vocab.txt")), 32, 11, train=False)
    short, long = views[0], views[11]
    assert short["frames"].shape == long["frames"].shape == (data.FRAMES, 18)
    assert (short["frames_mask"].tolist() == [1] * 3 + [0] * (data.FRAMES - 3)
            and long["frames_mask"].sum() == data.FRAMES)
    x = np.load(world / "features" / "v11.npy")                                     # 47 frames: first and last are kept
    close(long["frames"][0], x[0]), close(long["frames"][-1], x[-1])


def test_embed_bert_run(world, tmp_path):
    """`train.py --steps 0 --init_text`: Table 4a's BERT row and foreign sentence encoders."""
    cfg = train.settings(cookie, "tiny", "pretrain", {"width": 16, "text_layers": 1, "heads": 2})[1]
    cfg.vocab_size = 13
    text = cookie.TextEncoder(cfg)
    save_file(text.state_dict(), tmp_path / "t.safetensors")
    result = run(world, tmp_path / "e", "--data", world / "pairs.jsonl", "--embed", "bert", "--ws_layers", 0,
                 "--act", "gelu", "--steps", 0, "--init_text", tmp_path / "t.safetensors", "--evals", "sts",
                 "--eval_data", world / "sts-test.csv")
    model, _ = ev.load_run(tmp_path / "e")
    for name, p in text.state_dict().items():
        close(model.text.state_dict()[name], p)
    assert (ev.main([str(tmp_path / "e"), "--task", "sts", "--data", str(world / "sts-test.csv")])["sts"]["metrics"]
            == result["sts"]["metrics"])


def test_questions_as_captions(tmp_path):
    for name in ("COCO_train2014_000000000009.jpg", "2354786.jpg"):
        data.Image.new("RGB", (8, 8)).save(tmp_path / name)
    vqa = {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "what?", "question_id": 1},
                                                      {"image_id": 9, "question": "who?", "question_id": 2}]}
    gqa = {"05515938": {"imageId": "2354786", "question": "is it a dog?", "answer": "no"},
           "05515939": {"imageId": "2354786", "question": "where?", "answer": "here"}}
    (tmp_path / "v.json").write_text(json.dumps(vqa))
    (tmp_path / "g.json").write_text(json.dumps(gqa))
    records = data.open_source("pairs", f"{tmp_path}/v.json,{tmp_path}/g.json", "train", str(tmp_path))
    assert [r["caption"] for r in records] == [["what?", "who?"], ["is it a dog?", "where?"]]
    assert len({r["image_id"] for r in records}) == 2
    del gqa["05515939"]["question"]
    (tmp_path / "g.json").write_text(json.dumps(gqa))
    with pytest.raises(SystemExit, match="question 05515939: no key 'question'"):
        data.open_source("pairs", f"{tmp_path}/g.json", "train", str(tmp_path))
