"""models/cookie.py against the paper, written down a second time with explicit loops in float64."""

import dataclasses
import itertools
import json
import math
import random
from collections import Counter

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


# --------------------------------------------------------------------------------------------------
# Small models and batches

def small(**over):
    """A Config of which no two sizes are equal, so that a mixed-up axis is an error."""
    sizes = dict(image_size=48, backbone="tiny", width=24, text_layers=1, heads=3, mlp_ratio=2,
                 dropout=0.0, embed_dim=32, te_heads=4, te_ratio=2, max_text=11, positions=14,
                 vocab_size=57, pad_id=0, cls_id=2, sep_id=3, mask_id=4, first_word=6,
                 frame_width=18, bits=16, hash_dropout=0.0)
    return Config(**{**sizes, **over})


def sentences(cfg, b):
    """[CLS], words, [SEP], padding: (b, max_text) ids and mask.

    The first one has a single word, the last is full.
    """
    text = torch.full((b, cfg.max_text), cfg.pad_id)
    mask = torch.zeros(b, cfg.max_text, dtype=torch.long)
    for i, n in enumerate(torch.linspace(1, cfg.max_text - 2, b).long().tolist()):
        words = torch.randint(cfg.first_word, cfg.vocab_size, (n,)).tolist()
        text[i, :n + 2] = torch.tensor([cfg.cls_id, *words, cfg.sep_id])
        mask[i, :n + 2] = 1
    return text, mask


def make_batch(cfg, b=4, ids=None):
    text, mask = sentences(cfg, b)
    size = cfg.image_size
    pictures = {k: torch.randn(b, 3, size, size) for k in ("image", "view1", "view2")}
    frames = (torch.arange(7) < torch.randint(1, 8, (b, 1))).long()
    return {**pictures, "text": text, "text_mask": mask,
            "image_id": torch.arange(b) + 7 if ids is None else torch.tensor(ids),
            "frames": torch.randn(b, 7, cfg.frame_width), "frames_mask": frames,
            "labels": (torch.rand(b, 5) < 0.4).float()}


def make_model(task="pretrain", **over):
    model = Cookie(small(**over), task, 5).train()
    with torch.no_grad():
        for p in model.parameters():                # larger than at birth, where all look alike
            p.mul_(3.0 if p.ndim > 1 else 1.0).add_(torch.randn_like(p) * 0.02)
    return model


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def close(a, b, tol=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def pairs(ids, key_ids=None, own=None):
    """Pairs of rows with image ids `ids`; by default the rows themselves are the keys."""
    key_ids = ids if key_ids is None else key_ids
    own = range(len(ids)) if own is None else own
    return cookie.find_pairs(*(torch.tensor(list(x)) for x in (ids, key_ids, own)))


def loop_nce(q, k, ids, key_ids, temp, first=0):
    """Eq. 5, pair by pair: q_i's positive is key first + i, its negatives other images' keys."""
    total = 0
    for i in range(len(q)):
        pos = torch.exp((q[i] * k[first + i]).sum() / temp)
        neg = 0
        for j in range(len(k)):
            if key_ids[j] != ids[i]:
                neg = neg + torch.exp((q[i] * k[j]).sum() / temp)
        total = total - torch.log(pos / (pos + neg))
    return total / len(q)


def loop_layer(weights, heads, x, mask, act=F.relu):
    """A standard (post-norm) transformer layer on one sequence x: (S, D), head by head.

    weights: {part: (weight, bias)}; mask: list of S 0/1.
    """
    def linear(x, part):
        weight, bias = weights[part]
        return x @ weight.T + bias

    def norm(x, part):
        return F.layer_norm(x, x.shape[-1:], *weights[part], 1e-12)

    w = x.shape[1] // heads
    q, k, v = linear(x, "query"), linear(x, "key"), linear(x, "value")
    out = torch.zeros_like(x)
    for h, i in itertools.product(range(heads), range(len(x))):
        part = slice(h * w, h * w + w)
        scores = [(q[i, part] * k[j, part]).sum() / math.sqrt(w) for j in range(len(x))]
        top = max(s for s, look in zip(scores, mask) if look)
        e = [torch.exp(s - top) if look else 0.0 for s, look in zip(scores, mask)]
        out[i, part] = sum(e[j] / sum(e) * v[j, part] for j in range(len(x)))
    x = norm(linear(out, "out") + x, "norm")
    return norm(linear(act(linear(x, "up")), "down") + x, "last norm")


def of_block(block):
    """The weights of a Block, for loop_layer()."""
    weight, bias = (p.chunk(3) for p in (block.attention.qkv.weight, block.attention.qkv.bias))
    out = dict(zip(("query", "key", "value"), zip(weight, bias)))
    for part, module in (("out", block.attention.out), ("norm", block.attention_norm),
                         ("up", block.mlp[0]), ("down", block.mlp[2]),
                         ("last norm", block.mlp_norm)):
        out[part] = (module.weight, module.bias)
    return out


def of_bert(state, n):
    """Those of layer n of a state dict with Hugging Face's names."""
    names = {"query": "attention.self.query", "key": "attention.self.key",
             "value": "attention.self.value", "out": "attention.output.dense",
             "norm": "attention.output.LayerNorm", "up": "intermediate.dense",
             "down": "output.dense", "last norm": "output.LayerNorm"}
    at = f"encoder.layer.{n}."
    return {part: (state[f"{at}{name}.weight"], state[f"{at}{name}.bias"])
            for part, name in names.items()}


def bert_state(cfg, prefix=""):
    """A random state dict with Hugging Face's names."""
    wide = cfg.mlp_ratio * cfg.width
    shapes = {"embeddings.word_embeddings.weight": (cfg.vocab_size, cfg.width),
              "embeddings.position_embeddings.weight": (cfg.positions, cfg.width),
              "embeddings.token_type_embeddings.weight": (2, cfg.width),
              "embeddings.LayerNorm.weight": (cfg.width,),
              "embeddings.LayerNorm.bias": (cfg.width,)}
    for n in range(cfg.text_layers):
        at = f"encoder.layer.{n}."
        for name, rows, columns in (("attention.self.query", cfg.width, cfg.width),
                                    ("attention.self.key", cfg.width, cfg.width),
                                    ("attention.self.value", cfg.width, cfg.width),
                                    ("attention.output.dense", cfg.width, cfg.width),
                                    ("intermediate.dense", wide, cfg.width),
                                    ("output.dense", cfg.width, wide)):
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}{name}.weight": (cfg.width,), f"{at}{name}.bias": (cfg.width,)}
    return {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


# --------------------------------------------------------------------------------------------------
# Equations

def test_cookie_eq1():
    sizes = ((2, 6, 5), (4, 5), (4,), (1, 6, 4))
    v, w, b, p = (torch.randn(*s, dtype=torch.float64) for s in sizes)
    out = cookie.patch_features(v, w, b, p)
    for i, n, d in itertools.product(range(2), range(6), range(4)):
        close(out[i, n, d], sum(v[i, n, c] * w[d, c] for c in range(5)) + b[d] + p[0, n, d])


def test_cookie_eq1_positions_follow_the_grid():
    model = make_model("ccl").eval()
    # 4 x 2 patches of 16 pixels
    assert model.image_tokens(torch.randn(1, 3, 64, 32)).shape == (1, 8, 32)
    pos = torch.randn(1, 9, 4)
    assert cookie.resize_grid(pos, 3, 3) is pos
    out = cookie.resize_grid(pos, 5, 2)
    assert out.shape == (1, 10, 4)
    for d in range(4):                                  # row by row, bicubic
        grid = F.interpolate(pos[:, :, d].view(1, 1, 3, 3), (5, 2), mode="bicubic")
        close(out[0, :, d], grid.flatten(), 1e-6)
    other = Cookie(small(image_size=80), "ccl")
    other.load_state_dict(other.adapt(model.state_dict()))                      # 3 x 3 -> 5 x 5
    close(other.image_pos, cookie.resize_grid(model.image_pos, 5, 5))


def test_cookie_eq2():
    sizes = ((2, 3, 5), (4, 5), (4,), (4,))
    t, w, b, s = (torch.randn(*x, dtype=torch.float64) for x in sizes)
    out = cookie.word_features(t, w, b, s)
    for i, m, d in itertools.product(range(2), range(3), range(4)):
        close(out[i, m, d], sum(t[i, m, c] * w[d, c] for c in range(5)) + b[d] + s[d])


def test_cookie_eq3():
    model = make_model("ccl").double()
    v_hat = torch.randn(2, 5, 32, dtype=torch.float64)
    out = cookie.visual_features(v_hat, model.tav, model.s_image)
    with torch.no_grad():
        weights = of_block(model.tav.blocks[0])
        for i in range(2):
            close(out[i], loop_layer(weights, 4, v_hat[i], [1] * 5) + model.s_image, 1e-7)


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
            for block in model.ws.blocks:
                x = loop_layer(of_block(block), 4, x, batch["text_mask"][i].tolist())
            mean = sum(x[j] for j in range(n)) / n
            close(emb[i], mean / mean.norm(), 1e-6)

        image = batch["image"].double()
        grid = model.vision(image)[0].flatten(1).T
        x = grid @ model.image_fc.weight.T + model.image_fc.bias + model.image_pos[0]
        x = loop_layer(of_block(model.tav.blocks[0]), 4, x, [1] * 9) + model.s_image
        for block in model.ws.blocks:
            x = loop_layer(of_block(block), 4, x, [1] * 9)
        close(model.encode_image({"image": image})[0], x.mean(0) / x.mean(0).norm(), 1e-6)


def test_cookie_eq4_gpo():
    """Against one bidirectional GRU on each set alone, without padding."""
    gpo = GPO().double()
    gru = nn.GRU(32, 32, batch_first=True, bidirectional=True).double()
    back = {k + "_reverse": v for k, v in gpo.back.state_dict().items()}
    gru.load_state_dict({**gpo.ahead.state_dict(), **back})
    x, lengths = torch.randn(3, 6, 5, dtype=torch.float64), [1, 4, 6]
    mask = torch.tensor([[int(j < n) for j in range(6)] for n in lengths])
    out = gpo(x, mask)
    for i, n in enumerate(lengths):
        pe = [[f(p * 10000 ** (-2 * k / 32)) for k in range(16) for f in (math.sin, math.cos)]
              for p in range(n)]
        h = gru(torch.tensor(pe, dtype=torch.float64)[None])[0][0]
        w = torch.softmax(gpo.score((h[:, :32] + h[:, 32:]) / 2)[:, 0] / 0.1, 0)
        for d in range(5):
            ranked = sorted(x[i, :n, d].tolist(), reverse=True)
            close(out[i, d], sum(w[j] * ranked[j] for j in range(n)))
    close(gpo(x[2:]), out[2:])                                          # a full set needs no mask
    out.sum().backward()
    assert all(p.grad is not None for p in gpo.parameters())


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [1, 2, 1, 1]])           # captions of one image
def test_cookie_eq5(ids):
    q, k = units(4, 6).requires_grad_(), units(4, 6).requires_grad_()
    loss, slow = cookie.info_nce(q, k, pairs(ids), 0.07), loop_nce(q, k, ids, ids, 0.07)
    close(loss, slow)
    for a, b in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(slow, (q, k))):
        close(a, b)


def test_cookie_eq5_without_negatives_is_zero():
    assert cookie.info_nce(units(2, 6), units(2, 6), pairs([3, 3]), 0.07) == 0


def test_cookie_eq5_is_float32_under_autocast():
    q, who = F.normalize(torch.randn(4, 6), dim=-1), pairs(range(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cookie.info_nce(q, q, who, 0.05)
    close(loss, cookie.info_nce(q, q, who, 0.05))


def pair_parts(**over):
    """A model, a batch, and loop_nce() with their settings."""
    model = make_model(**over).eval()
    batch = make_batch(model.cfg, 5, [1, 2, 3, 2, 9])
    ids = batch["image_id"].tolist()
    return model, batch, lambda q, k: loop_nce(q.double(), k.double(), ids, ids, model.cfg.temp)


def test_cookie_eq6():
    model, batch, nce = pair_parts(task="ccl")
    i2t = model(batch)["logs"]["i2t"].double()
    close(i2t, nce(model.encode_image(batch), model.encode_text(batch)), 1e-5)


def test_cookie_eq7():
    model, batch, nce = pair_parts(task="ccl")
    out = model(batch)
    t2i = out["logs"]["t2i"].double()
    close(t2i, nce(model.encode_text(batch), model.encode_image(batch)), 1e-5)
    close(out["loss"], out["logs"]["i2t"] + out["logs"]["t2i"])


def test_cookie_eq8():
    """data.py's view: crop, flip, colour jitter, blur, colour drop, two independent draws."""
    views = cookie.VIEWS["pretrain"]
    assert (views["view1"], views["view2"]) == ("simclr", "simclr") and views["image"] == "resize"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    picture, simclr = data.Image.fromarray(pixels), data.IMAGE_VIEWS["simclr"]
    a, b = (np.asarray(simclr(picture, 32, random.Random(s), (0.2, 1.0))) for s in (1, 2))
    assert a.shape == (32, 32, 3) and (a != b).any()

    model, batch, _ = pair_parts()
    other = {**batch, "view1": torch.randn_like(batch["view1"])}
    torch.manual_seed(1)
    first = model(batch)["logs"]
    torch.manual_seed(1)
    second = model(other)["logs"]
    assert first["i"] != second["i"] and all(first[k] == second[k] for k in ("i2t", "t2i", "t"))


def test_cookie_eq8_each_augmentation_acts():
    """Crop, flip, colour jitter, colour drop and blur, at SimCLR's rates, of 300 draws each."""
    def draws(pixels, crop_scale):
        picture = data.Image.fromarray(pixels.astype(np.uint8))
        views = [data.IMAGE_VIEWS["simclr"](picture, 64, random.Random(seed), crop_scale)
                 for seed in range(300)]
        return np.stack([np.asarray(view) for view in views]).astype(float)

    # dark red on the left, light red on the right
    ramp = np.zeros((64, 64, 3)) + np.linspace(60, 200, 64)[None, :, None] * [1, 0.5, 0.5]
    out = draws(ramp, (0.9, 1.0))
    flipped = out[:, :, :8].mean((1, 2, 3)) > out[:, :, -8:].mean((1, 2, 3))
    assert abs(flipped.mean() - 0.5) < 0.1
    spread = out.max(3) - out.min(3)
    assert abs((spread.max((1, 2)) == 0).mean() - 0.2) < 0.08           # grey
    redness = (out[..., 0] / out[..., 1].clip(1)).mean((1, 2))
    assert abs((abs(redness - 2) < 0.02).mean() - (1 - 0.8) * 0.8) < 0.1        # untouched colour

    # crops: the range of a ramp that is left
    width = np.ptp(draws(ramp, (0.04, 0.04))[:, :, :, 0].mean(1), axis=1)
    assert np.median(width) < 0.4 * 140

    # blur: neighbours in a picture of noise become alike, in half of the draws; at 64 pixels its
    # sigma is 0.03 to 0.57, of which the smaller half cannot be seen
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 1)) * np.ones(3)
    grey = draws(noise, (1.0, 1.0)).mean(3)
    grey = grey - grey.mean((1, 2), keepdims=True)
    alike = (grey[:, :, 1:] * grey[:, :, :-1]).mean((1, 2)) / grey.var((1, 2))
    assert abs((alike > 0.04).mean() - 0.3) < 0.1


def test_cookie_eq9():
    model, batch, nce = pair_parts()
    one, two = (model.encode_image({"image": batch[k]}) for k in ("view1", "view2"))
    close(model(batch)["logs"]["i"].double(), nce(one, two), 1e-5)      # view 1 -> view 2 only


def test_cookie_eq10_rates():
    cfg = small(max_text=40, positions=40, tcl_prob=0.2, tcl_mask=0.5, tcl_substitute=0.1)
    text = torch.randint(cfg.first_word, cfg.vocab_size, (4000, 40))
    text[:, 0], text[:, 29], text[:, 30:] = cfg.cls_id, cfg.sep_id, 0
    mask = (torch.arange(40) < 30).long().expand(4000, 40)
    new, new_mask = cookie.augment_tokens(text, mask, cfg)
    n, lengths = 28, new_mask.sum(1)

    # deleted, masked, substituted
    assert abs((30 - lengths).float().mean() / n - 0.2 * 0.4) < 0.004
    assert abs((new == cfg.mask_id).float().sum() / (4000 * n) - 0.2 * 0.5) < 0.004
    kept = lengths == 30
    changed = ((new != text) & (new != cfg.mask_id))[kept].float().sum() / (kept.sum() * n)
    assert abs(changed / (1 - 0.2 * 0.4) - 0.2 * 0.1) < 0.01

    # [CLS] and [SEP] stay where a sentence begins and ends
    assert (new[:, 0] == cfg.cls_id).all()
    assert (new.gather(1, lengths[:, None] - 1) == cfg.sep_id).all()
    assert (new == cfg.sep_id).sum() == 4000 and ((new == 0) == (new_mask == 0)).all()
    assert (new_mask == (torch.arange(40) < lengths[:, None])).all()

    again, _ = cookie.augment_tokens(text, mask, cfg)
    assert (again != new).any()                                                 # two draws differ


def test_cookie_eq10_draws_whole_words():
    """All pieces of a word share its fate; a row that would lose all words keeps a whole one."""
    continues = torch.arange(57) >= 32
    cfg = small(tcl_prob=0.7, tcl_mask=0.3, tcl_substitute=0.3)
    one = torch.tensor([2, 10, 40, 41, 3, 0, 0, 0, 0, 0, 0]).expand(500, 11)
    two = torch.tensor([2, 10, 40, 41, 11, 3, 0, 0, 0, 0, 0]).expand(500, 11)
    new, mask = cookie.augment_tokens(one, (one > 0).long(), cfg, continues)
    assert (mask.sum(1) == 5).all()                         # never deleted: it is the only word
    assert ((new[:, 1:4] == 4).sum(1) % 3 == 0).all()       # all of it masked, or nothing
    kept = (new[:, 1:4] == one[:, 1:4]).all(1).float().mean()
    masked = (new[:, 1] == 4).float().mean()
    assert abs(kept - (0.3 + 0.7 * 0.4)) < 0.07 and abs(masked - 0.7 * 0.3) < 0.06

    new, mask = cookie.augment_tokens(two, (two > 0).long(), cfg, continues)
    assert set(mask.sum(1).tolist()) == {6, 5, 3}           # all, without "11", without the other

    # of words that would all be deleted the one that was nearest to staying stays
    delete_all = small(tcl_prob=1.0, tcl_mask=0.0, tcl_substitute=0.0)
    torch.manual_seed(8)
    new, mask = cookie.augment_tokens(two, (two > 0).long(), delete_all, continues)
    torch.manual_seed(8)
    noise = torch.rand(two.shape)
    assert torch.equal(mask.sum(1) == 5, noise[:, 1] > noise[:, 4])

    # without a vocabulary each token is a word
    new, mask = cookie.augment_tokens(two, (two > 0).long(), cfg)
    assert set(mask.sum(1).tolist()) == {6, 5, 4, 3}


def test_cookie_eq10_order_and_emptiness():
    text, mask = sentences(small(), 6)
    words = mask.bool() & (text != 2) & (text != 3)
    assert torch.equal(cookie.maskable(text, mask, small()), words)
    delete_all = small(tcl_prob=1.0, tcl_mask=0.0, tcl_substitute=0.0)
    delete_half = small(tcl_prob=0.5, tcl_mask=0.0, tcl_substitute=0.0)
    for _ in range(50):
        new, new_mask = cookie.augment_tokens(text, mask, delete_all)
        assert (new_mask.sum(1) == 3).all()                                     # [CLS] word [SEP]
        for row, old, ok in zip(new.tolist(), text.tolist(), words.tolist()):
            assert row[0] == 2 and row[2] == 3
            assert row[1] in [t for t, w in zip(old, ok) if w]

        new, new_mask = cookie.augment_tokens(text, mask, delete_half)
        for row, m, old in zip(new.tolist(), new_mask.tolist(), text.tolist()):
            rest = iter(old)
            assert all(t in rest for t in row[:sum(m)])                         # in order

    # a caption without a word stays as it is, and so does any at probability 0
    bare = torch.tensor([[2, 3] + [0] * 9])
    new, new_mask = cookie.augment_tokens(bare, (bare > 0).long(), small(tcl_prob=1.0))
    assert (new == bare).all() and new_mask.sum() == 2
    new, new_mask = cookie.augment_tokens(text, mask, small(tcl_prob=0.0))
    assert (new == text).all() and (new_mask == mask).all()


def test_cookie_eq11(monkeypatch):
    model, batch, nce = pair_parts()
    drawn, draw = [], model.text_view
    monkeypatch.setattr(model, "text_view", lambda b: drawn.append(draw(b)) or drawn[-1])
    out = model(batch)
    one, two = (model.embed_text(*view) for view in drawn)
    close(out["logs"]["t"].double(), nce(one, two), 1e-5)


@pytest.mark.parametrize("over, names", [
    ({}, "i2t t2i i t"), ({"vcl": False}, "i2t t2i t"), ({"tcl": False}, "i2t t2i i"),
    ({"vcl": False, "tcl": False}, "i2t t2i"), ({"ccl_on": "view1"}, "i2t t2i i t"),
    ({"ccl_on": "view1", "vcl": False}, "i2t t2i t")])
def test_cookie_eq12(over, names):
    model = make_model(**over)
    calls = {"image": 0, "text": 0}
    model.vision.register_forward_hook(
        lambda *a: calls.__setitem__("image", calls["image"] + 1))
    model.text.register_forward_hook(lambda *a: calls.__setitem__("text", calls["text"] + 1))
    out = model(make_batch(model.cfg))
    assert list(out["logs"]) == names.split()
    assert calls == {"image": 1, "text": 1}                             # one call a modality
    close(out["loss"], sum(out["logs"].values()))


def test_ccl_on_view1():
    model = make_model(ccl_on="view1", tcl=False, text_layers=1).eval()
    batch = make_batch(model.cfg)
    torch.manual_seed(5)
    text = model.embed_text(*model.text_view(batch)).double()
    torch.manual_seed(5)
    out = model(batch)
    image = model.encode_image({"image": batch["view1"]}).double()
    want = loop_nce(image, text, range(4), range(4), model.cfg.temp)
    close(out["logs"]["i2t"].double(), want, 1e-5)


# --------------------------------------------------------------------------------------------------
# A step by hand: the model a second time, plain operations on its state dict in float64

CONTINUES = 32                  # in these tests ids from here on continue the word before them


def hand_linear(w, at, x):
    return x @ w[at + ".weight"].T + w[at + ".bias"]


def hand_norm(w, at, x):
    x = x - x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True)
    return x / (variance + 1e-12).sqrt() * w[at + ".weight"] + w[at + ".bias"]


def hand_blocks(w, at, x, heads, act):
    """Layers at.0, at.1, ... on the real tokens of one sequence, (S, D)."""
    n, d = 0, x.shape[1] // heads
    while f"{at}.{n}.mlp.0.weight" in w:
        layer = f"{at}.{n}."
        if layer + "attention.qkv.weight" in w:                     # ws="fc" has none
            q, k, v = hand_linear(w, layer + "attention.qkv", x).split(x.shape[1], dim=1)
            looked = []
            for h in range(heads):
                part = slice(h * d, h * d + d)
                e = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
                looked.append(e / e.sum(1, keepdim=True) @ v[:, part])
            x = x + hand_linear(w, layer + "attention.out", torch.cat(looked, 1))
            x = hand_norm(w, layer + "attention_norm", x)
        hidden = act(hand_linear(w, layer + "mlp.0", x))
        x = hand_norm(w, layer + "mlp_norm", x + hand_linear(w, layer + "mlp.2", hidden))
        n += 1
    return x


def hand_batch_norm(w, at, x, seen):
    """Over the batch and all pixels; seen[at]: the mean and the unbiased variance."""
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    n = x.numel() // x.shape[1]
    seen[at] = (mean, variance * n / (n - 1))
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * w[at + ".weight"][:, None, None] + w[at + ".bias"][:, None, None]


def hand_resnet(w, x, seen):
    """backbone="tiny": a stem and three basic blocks, (B, 3, H, W) -> (B, 128, H/16, W/16)."""
    def conv(at, x, stride, padding):
        return F.conv2d(x, w[f"vision.{at}.weight"], None, stride, padding)

    def norm(at, x):
        return hand_batch_norm(w, "vision." + at, x, seen)

    x = F.max_pool2d(F.relu(norm("bn1", conv("conv1", x, 2, 3))), 3, 2, 1)
    for stage, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        y = F.relu(norm(stage + ".bn1", conv(stage + ".conv1", x, stride, 1)))
        y = norm(stage + ".bn2", conv(stage + ".conv2", y, 1, 1))
        if stride == 2:
            x = norm(stage + ".downsample.1", conv(stage + ".downsample.0", x, stride, 0))
        x = F.relu(x + y)
    return x


def hand_gru(w, at, inputs):
    """The states of a GRU on a list of vectors, in its order."""
    h, states = torch.zeros(32, dtype=torch.float64), []
    for x in inputs:
        gates = w[at + ".weight_ih_l0"] @ x + w[at + ".bias_ih_l0"]
        old = w[at + ".weight_hh_l0"] @ h + w[at + ".bias_hh_l0"]
        r = torch.sigmoid(gates[:32] + old[:32])
        z = torch.sigmoid(gates[32:64] + old[32:64])
        h = (1 - z) * torch.tanh(gates[64:] + r * old[64:]) + z * h
        states.append(h)
    return states


def hand_pool(w, cfg, side, x):
    """Eq. 4 of the real tokens of one sequence: (S, D) -> (D,) of unit norm."""
    if cfg.pooling == "mean":
        x = sum(x) / len(x)
    else:
        places = []
        for p in range(len(x)):
            angles = [p / 10000 ** (k / 16) for k in range(16)]
            both = [f(a) for a in angles for f in (math.sin, math.cos)]
            places.append(torch.tensor(both, dtype=torch.float64))
        ahead = hand_gru(w, f"gpo_{side}.ahead", places)
        back = hand_gru(w, f"gpo_{side}.back", places[::-1])[::-1]
        scores = [(a + b) / 2 @ w[f"gpo_{side}.score.weight"][0] for a, b in zip(ahead, back)]
        e = torch.exp(torch.stack(scores) / 0.1)
        x = (e / e.sum()) @ torch.sort(x, dim=0, descending=True)[0]
    return x / x.square().sum().sqrt()


def hand_images(w, cfg, images, seen):
    """Eq. 1, 3, 4: (B, 3, H, W) -> (B, D)."""
    out = []
    for grid in hand_resnet(w, images, seen):
        v = torch.stack([grid[:, i, j] for i in range(3) for j in range(3)])
        x = hand_linear(w, "image_fc", v) + w["image_pos"][0]
        x = hand_blocks(w, "tav.blocks", x, cfg.te_heads, F.relu) + w["s_image"]
        x = hand_blocks(w, "ws.blocks", x, cfg.te_heads, F.relu)
        out.append(hand_pool(w, cfg, "image", x))
    return torch.stack(out)


def hand_texts(w, cfg, texts):
    """Eq. 2, 4: lists of ids without padding -> (B, D)."""
    out = []
    for ids in texts:
        x = w["text.embeddings.words.weight"][ids] + w["text.embeddings.segments.weight"][0]
        x = x + w["text.embeddings.positions.weight"][:len(ids)]
        x = hand_norm(w, "text.embeddings.norm", x)
        x = hand_linear(w, "text_fc", hand_blocks(w, "text.blocks", x, cfg.heads, F.gelu))
        if "s_text" in w:
            x = x + w["s_text"]
        ws = "ws.blocks" if cfg.ws_shared else "ws_text.blocks"
        out.append(hand_pool(w, cfg, "text", hand_blocks(w, ws, x, cfg.te_heads, F.relu)))
    return torch.stack(out)


def hand_clips(w, cfg, batch):
    """Section 4.2: the real frames -> FC -> pooling, with vtm_te also TAV-TE and WS-TE."""
    out = []
    for frames, n in zip(batch["frames"], batch["frames_mask"].sum(1).tolist()):
        x = hand_linear(w, "image_fc", frames[:n])
        if cfg.vtm_te:
            x = hand_blocks(w, "tav.blocks", x, cfg.te_heads, F.relu) + w["s_image"]
            x = hand_blocks(w, "ws.blocks", x, cfg.te_heads, F.relu)
        out.append(hand_pool(w, cfg, "image", x))
    return torch.stack(out)


def real_tokens(batch):
    return [row[:n].tolist() for row, n in zip(batch["text"], batch["text_mask"].sum(1).tolist())]


def hand_view(cfg, batch, fates):
    """Eq. 10 word by word, of the numbers that torch draws next -> lists of ids.

    fates: a list to which (fate, number of the word's pieces) are added.
    """
    shape = batch["text"].shape
    noise, dice = torch.rand(shape), torch.rand(shape)
    random_ids = torch.randint(cfg.first_word, cfg.vocab_size, shape)
    out = []
    for i, ids in enumerate(real_tokens(batch)):
        # positions of each word
        words = []
        for j in range(1, len(ids) - 1):
            if ids[j] >= CONTINUES:
                words[-1].append(j)
            else:
                words.append([j])

        fate = {}
        for word in words:
            first = word[0]
            fate[first] = "kept"
            if noise[i, first] < cfg.tcl_prob:
                fate[first] = "deleted"
                if dice[i, first] < cfg.tcl_mask + cfg.tcl_substitute:
                    fate[first] = "substituted"
                if dice[i, first] < cfg.tcl_mask:
                    fate[first] = "masked"
        if all(f == "deleted" for f in fate.values()):
            fate[max(fate, key=lambda first: noise[i, first])] = "spared"

        row = [ids[0]]
        for word in words:
            what = fate[word[0]]
            fates.append((what, len(word)))
            if what == "masked":
                row += [cfg.mask_id] * len(word)
            elif what == "substituted":
                row += random_ids[i, word].tolist()
            elif what != "deleted":
                row += [ids[j] for j in word]
        out.append(row + [ids[-1]])
    return out


def hand_hinge(q, k, ids, margin, hard, costs):
    """VSE++, one direction; costs: a list to which each pair's is added."""
    total = 0
    for i in range(len(q)):
        row = []
        for j in range(len(k)):
            if ids[j] != ids[i]:
                row.append((margin - q[i] @ k[i] + q[i] @ k[j]).clamp(min=0))
        costs += row
        total = total + (max(row) if hard else sum(row) / len(row))
    return total / len(q)


def hand_step(task, cfg, w, batch, model, live):
    """loss_<task> by hand -> (its loss, its logs, statistics of batch norm).

    live: a dict for what must have occurred in the batch.
    """
    ids, seen = batch["image_id"].tolist(), {}
    if task == "hashing":
        return (*hand_hashing(cfg, w, batch, model, live, seen), seen)
    if task == "vtm":
        image = hand_clips(w, cfg, batch)
    elif task != "pretrain":
        image = hand_images(w, cfg, batch["image"], seen)
    if task != "pretrain":
        text = hand_texts(w, cfg, real_tokens(batch))
    if task == "retrieval":
        costs = live["costs"] = []
        logs = {"i2t": hand_hinge(image, text, ids, cfg.margin, live["hard"], costs),
                "t2i": hand_hinge(text, image, ids, cfg.margin, live["hard"], costs)}
        return sum(logs.values()), logs, seen

    # stage 2: batch norm sees the views together, in whatever order
    if task == "pretrain":
        fates = live["fates"] = []
        names = ["view1"] if cfg.ccl_on == "view1" else ["image"]
        if cfg.vcl:
            names += [name for name in ("view1", "view2") if name not in names]
        images = torch.cat([batch[name] for name in names])
        images = dict(zip(names, hand_images(w, cfg, images, seen).split(len(ids))))
        texts = {"image": hand_texts(w, cfg, real_tokens(batch))}
        if cfg.tcl or cfg.ccl_on == "view1":
            texts["view1"] = hand_texts(w, cfg, hand_view(cfg, batch, fates))
        if cfg.tcl:
            texts["view2"] = hand_texts(w, cfg, hand_view(cfg, batch, fates))
        image, text = images[names[0]], texts[names[0]]

    logs = {"i2t": loop_nce(image, text, ids, ids, cfg.temp),
            "t2i": loop_nce(text, image, ids, ids, cfg.temp)}
    if task == "pretrain" and cfg.vcl:
        logs["i"] = loop_nce(images["view1"], images["view2"], ids, ids, cfg.temp)
    if task == "pretrain" and cfg.tcl:
        logs["t"] = loop_nce(texts["view1"], texts["view2"], ids, ids, cfg.temp)
    return sum(logs.values()), logs, seen


def hand_hashing(cfg, w, batch, model, live, seen):
    """CSQ: the loss and its logs; a label's center is model.centers, a tie is model.tie."""
    live["ties"], live["bare"] = 0, 0
    central = quantization = labeled = 0
    for grid, labels in zip(hand_resnet(w, batch["image"], seen), batch["labels"]):
        x = grid.sum((1, 2)) / 9
        x = F.relu(hand_linear(w, "hash_layer.0", x))
        x = F.relu(hand_linear(w, "hash_layer.3", x))
        y = torch.tanh(hand_linear(w, "hash_layer.5", x))
        own = [model.centers[n] for n in range(5) if labels[n]]
        if not own:
            live["bare"] += 1
            continue
        labeled += 1
        for k in range(cfg.bits):
            total = sum(center[k] for center in own)
            live["ties"] += int(total == 0)
            bit = total > 0 if total != 0 else model.tie[k] > 0
            p = (y[k] + 1) / 2
            central = central - torch.log(p if bit else 1 - p) / cfg.bits
            quantization = quantization + (y[k].abs() - 1) ** 2 / cfg.bits
    logs = {"central": central / labeled, "quantization": quantization / labeled}
    return logs["central"] + cfg.quantization * logs["quantization"], logs


STEPS = [
    ("ccl", dict(temp=0.3, tav_layers=2)),
    ("ccl", dict(temp=0.4, ws="fc", ws_shared=False, pooling="gpo")),
    ("pretrain", dict(temp=0.3)),
    ("pretrain", dict(temp=0.6, ccl_on="view1", ws_shared=False, ws_layers=1)),
    ("pretrain", dict(temp=0.2, vcl=False)),
    ("pretrain", dict(temp=0.7, tcl=False, ccl_on="view1", tav_layers=0)),
    ("retrieval", dict(margin=0.06, hard=False)),
    ("retrieval", dict(margin=0.11, hard=True, pooling="gpo")),
    ("vtm", dict(temp=0.3)),
    ("vtm", dict(temp=0.4, vtm_te=True, pooling="gpo", tav_layers=2)),
    ("hashing", dict(quantization=0.35)),
]


@pytest.mark.parametrize("task, over", STEPS, ids=str)
def test_a_step_by_hand(task, over):
    """Loss, logs, every gradient and the running statistics, dropout 0 and no number at its
    default."""
    live = {"hard": over.get("hard")}
    over = {"tcl_prob": 0.7, "tcl_mask": 0.35, "tcl_substitute": 0.3, "text_layers": 2,
            **{name: value for name, value in over.items() if name != "hard"}}
    model = make_model(task, **over).double()
    torch.manual_seed(1)                        # the same batch, whatever numbers the weights drew
    cfg, batch = model.cfg, make_batch(model.cfg, 5, [1, 2, 3, 2, 9])
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    batch["text"][:, 1] = batch["text"][:, 1].clamp(max=CONTINUES - 1)  # a word begins with a head
    batch["labels"] = torch.tensor([[1., 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0],
                                    [1, 0, 0, 1, 0], [0, 1, 0, 1, 1]]).double()
    if task == "retrieval":
        model.after_step(9 if live["hard"] else 2, 20, 5)
    if task == "pretrain":
        model.continues.copy_(torch.arange(cfg.vocab_size) >= CONTINUES)

    # the reference begins with the same weights, and draws the same numbers
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(4)
    loss, logs, seen = hand_step(task, cfg, w, batch, model, live)
    loss.backward()
    torch.manual_seed(4)
    out = model(batch)
    out["loss"].backward()

    close(out["loss"].detach(), loss.detach())
    assert list(out["logs"]) == list(logs)
    for name, value in logs.items():
        close(out["logs"][name], value.detach())
        assert value > 0.01, name
    for name, p in model.named_parameters():
        assert w[name].grad is not None, name
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-6, atol=1e-9,
                                   msg=lambda m: f"{name}: {m}")

    # batch norm's statistics: a tenth of this batch, nine tenths of what was there
    fresh = make_model(task, **over)
    for name, (mean, variance) in seen.items():
        norm = model.get_submodule(name)
        close(norm.running_mean, 0.1 * mean.detach())
        close(norm.running_var, 0.9 + 0.1 * variance.detach())
    assert len(seen) == len(fresh.norms)

    # whatever the losses distinguish has occurred
    if "costs" in live:
        costs = torch.stack(live["costs"])
        assert (costs > 0).any() and (costs == 0).any()
    if live.get("fates") and cfg.tcl:
        for fate in ("kept", "masked", "substituted", "deleted", "spared"):
            assert fate in dict(live["fates"]), fate
        assert {f for f, pieces in live["fates"] if pieces > 1} >= {"masked", "deleted"}
    if task == "hashing":
        assert live["ties"] and live["bare"] == 1


# --------------------------------------------------------------------------------------------------
# Memory and processes

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
    state, batch = torch.load(f"{out}/{task}.pt")
    model = Cookie(small(tcl_prob=0.0), task, 5).double()
    model.load_state_dict(state)
    for norm in model.train().norms:
        norm.eval()
    half = {k: v[3 * rank:3 * rank + 3] for k, v in batch.items()}
    loss = model(half)["loss"]
    loss.backward()
    grads = [p.grad / 2 for p in model.parameters()]                            # DDP's mean
    for g in grads + [loss.detach_()]:
        dist.all_reduce(g)
    if rank == 0:
        torch.save((loss / 2, grads), f"{out}/{task}-out.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("task", ["ccl", "pretrain", "retrieval", "vtm"])
def test_two_processes_equal_one(task, tmp_path):
    model = make_model(task, tcl_prob=0.0).double()
    for norm in model.norms:
        norm.eval()
    batch = make_batch(model.cfg, 6, [1, 2, 3, 1, 4, 5])        # an image with captions on both
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    torch.save((model.state_dict(), batch), tmp_path / f"{task}.pt")
    loss = model(batch)["loss"]
    loss.backward()

    context, sync = mp.get_context("fork"), tmp_path / f"{task}.sync"
    running = [context.Process(target=worker, args=(r, sync, task, tmp_path)) for r in range(2)]
    for p in running:
        p.start()
    for p in running:
        p.join()
        assert p.exitcode == 0
    other, grads = torch.load(tmp_path / f"{task}-out.pt")
    close(other, loss.detach())
    for (name, p), g in zip(model.named_parameters(), grads):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")


# --------------------------------------------------------------------------------------------------
# Protocol

VARIANTS = [{}, {"pooling": "gpo"}, {"ws_shared": False}, {"ws": "fc"},
            {"ws_layers": 0, "tav_layers": 0}, {"ws_layers": 4},
            {"checkpointing": True, "dropout": 0.1}]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("over", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(task, over):
    model = make_model(task, **over)
    out = model(make_batch(model.cfg))
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and out["loss"].shape == ()
    assert all(not v.requires_grad for v in out["logs"].values())
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any() or "segments" in name or "gpo" in name, name


def test_vtm_with_encoders():
    model = make_model("vtm", vtm_te=True)
    out = model(make_batch(model.cfg))
    out["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    plain = make_model("vtm")                                   # section 4.2: FC and pooling alone
    assert not hasattr(plain, "ws") and not hasattr(plain, "vision")


@pytest.mark.parametrize("task", TASKS)
def test_small_batches(task):
    """Two samples are enough. One has no negatives, and is refused by all but hashing."""
    model = make_model(task)
    assert torch.isfinite(model(make_batch(model.cfg, 2))["loss"])
    if task == "hashing":
        assert torch.isfinite(model(make_batch(model.cfg, 1))["loss"])
        return
    with pytest.raises(SystemExit, match=f"{task}: a batch of 1 has no negatives"):
        model(make_batch(model.cfg, 1))
    model.eval()
    for name in model.offers - {"sentence_vector"}:
        getattr(model, name)(make_batch(model.cfg, 1))


def test_one_sample_a_process_is_enough(monkeypatch):
    """Negatives come from all processes."""
    monkeypatch.setattr(cookie, "world", lambda: 2)
    monkeypatch.setattr(cookie, "rank", lambda: 0)
    monkeypatch.setattr(cookie, "gather", lambda x: torch.cat([x, x + 1]))
    model = make_model("ccl")
    assert model(make_batch(model.cfg, 1))["loss"] > 0


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
    offers = {task: make_model(task).offers - {"sentence_vector"} for task in TASKS}
    whole = {"encode_image", "encode_text", "token_scores"}
    assert offers["pretrain"] == offers["ccl"] == offers["retrieval"] == whole
    assert offers["vtm"] == {"encode_clip", "encode_text"} and offers["hashing"] == {"hash_codes"}
    assert ev.offered(make_model("hashing"), "hashing") == ["hashing"]

    # what is offered runs
    for task in TASKS:
        model = make_model(task).eval()
        batch = make_batch(model.cfg)
        for name in offers[task]:
            getattr(model, name)(batch)


@pytest.mark.parametrize("task, over, words", [
    ("ccl", {}, "mean of layer 2 of the WS-TE over all tokens"),
    ("ccl", {"pooling": "gpo", "ws_layers": 1}, "gpo of layer 1 of the WS-TE over all tokens"),
    ("ccl", {"ws_shared": False},
     "mean of layer 2 of the WS-TE of texts alone (not shared) over all tokens"),
    ("ccl", {"ws": "fc"}, "mean of layer 2 of the FC layers over all tokens"),
    ("ccl", {"ws_layers": 0, "text_layers": 3},
     "mean of the FC layer behind the last of BERT's 3 layers over all tokens"),
    ("vtm", {"pooling": "gpo"},
     "gpo of the FC layer behind the last of BERT's 1 layers over all tokens"),
    ("vtm", {"vtm_te": True}, "mean of layer 2 of the WS-TE over all tokens"),
    ("ccl", {"embed": "bert", "pooling": "gpo"},
     "mean of the last of BERT's 1 layers over all tokens"),
    ("vtm", {"embed": "bert"}, "mean of the last of BERT's 1 layers over all tokens")])
def test_sentence_vector(task, over, words):
    """The protocol of an evaluation says what was computed: no GPO and no WS-TE that is not
    there."""
    model = make_model(task, **over)
    assert model.sentence_vector() == words
    assert ("gpo" in words) == (model.gpo_text is not None)
    assert ("WS-TE" in words) == (hasattr(model, "ws") and len(model.ws.blocks) > 0
                                  and model.cfg.ws == "te")


def test_clips_do_not_see_padding():
    for over in ({}, {"vtm_te": True}, {"pooling": "gpo"}):
        model = make_model("vtm", **over).eval()
        batch = make_batch(model.cfg)
        batch["frames_mask"][0, 4:] = 0
        emb = model.encode_clip(batch)
        other = batch["frames"] + 9 * (1 - batch["frames_mask"][..., None])
        close(model.encode_clip({**batch, "frames": other}), emb, 1e-6)
        close(emb.norm(dim=-1), torch.ones(4), 1e-6)


def test_hash_codes():
    """The sign of each logit, of the mean over all patches; 0 becomes +1."""
    model = make_model("hashing").eval()
    batch = make_batch(model.cfg)
    with torch.no_grad():
        logits = model.hash_layer(model.vision(batch["image"]).flatten(2).mean(2))
        codes = model.hash_codes(batch)
        assert set(codes.flatten().tolist()) == {-1.0, 1.0}
        assert torch.equal(codes, logits.sign())
        model.hash_layer[-1].weight.zero_()
        model.hash_layer[-1].bias.zero_()
        assert (model.hash_codes(batch) == 1).all()


def test_embeddings_do_not_depend_on_the_batch():
    model = make_model("ccl").eval()
    batch = make_batch(model.cfg)
    for encode in (model.encode_image, model.encode_text):
        close(encode(batch)[1:2], encode({k: v[1:2] for k, v in batch.items()}), 1e-5)
        close(encode(batch).norm(dim=-1), torch.ones(4), 1e-5)
    longer = {k: F.pad(batch[k], (0, 3)) for k in ("text", "text_mask")}
    close(model.encode_text(longer), model.encode_text(batch), 1e-5)    # padding does not count


@pytest.mark.parametrize("pooling, size", [("mean", 48), ("gpo", 48), ("mean", 40)])
def test_token_scores(pooling, size):
    """Figure 3: the final vector against each token behind the WS-TE. 40 pixels are no multiple of
    a patch's 16."""
    model = make_model("ccl", pooling=pooling, image_size=size).eval()
    batch = make_batch(model.cfg)
    with torch.no_grad():
        scores = model.token_scores(batch)
        image, text = model.encode_image(batch), model.encode_text(batch)
        areas = model.image_tokens(batch["image"])
        words = model.text_tokens(batch["text"], batch["text_mask"])
    assert scores["image"].shape == (4, 3, 3) and scores["text"].shape == batch["text"].shape
    for i, j in itertools.product(range(4), range(9)):
        area, word = areas[i, j], words[i, j]
        close(scores["image"][i, j // 3, j % 3], area @ image[i] / area.norm(), 1e-5)
        close(scores["text"][i, j], word @ text[i] / word.norm(), 1e-5)


def test_base_is_the_papers():
    """Section 4.1, read off the settings that `--preset base` gives and the model they build."""
    for stage, (epochs, batch) in enumerate(((30, 576), (10, 288))):
        loop, cfg = train.settings(cookie, "base", "pretrain", {}, stage)
        assert (loop.optimizer, loop.lr, loop.epochs) == ("adamw", 2e-5, epochs)
        assert (loop.batch_size, loop.steps) == (batch, 0)
        # a tenth after half of the stage
        rates = [train.learning_rate(step, 100, loop) for step in range(100)]
        assert rates[:50] == [2e-5] * 50 and rates[50:] == pytest.approx([2e-6] * 50)
        assert loop.weight_decay == 0.01                        # BERT's; the paper names none
    assert cookie.RECIPE["pretrain"][0]["task"] == "ccl"
    assert "task" not in cookie.RECIPE["pretrain"][1]
    assert (cfg.vcl, cfg.tcl, cfg.ccl_on) == (True, True, "raw")

    with torch.device("meta"):
        model = Cookie(cfg, "pretrain")
    assert model.image_pos.shape == (1, 256, 1024) and cfg.max_text == 50
    assert (model.image_fc.in_features, model.text_fc.in_features) == (2048, 768)
    assert (len(model.text.blocks), len(model.tav.blocks), len(model.ws.blocks)) == (12, 1, 2)
    assert not hasattr(model, "ws_text")
    for block in (*model.tav.blocks, *model.ws.blocks):
        assert block.attention.heads == 8 and block.mlp[0].out_features == 1024
        assert isinstance(block.mlp[1], nn.ReLU)
    assert {g["lr"] for g in model.param_groups(loop)} == {2e-5, 2e-5 * 0.1}    # ResNeXt: a tenth

    loop, cfg = train.settings(cookie, "base", "hashing", {})
    assert (cfg.image_size, cfg.backbone) == (224, "resnet50")
    drops = [f"{10 * i / 90:.4f}" for i in range(1, 9)]                 # every 10 of 90 epochs
    assert loop.milestones == ",".join(drops)


def test_learning_rates():
    loop = train.Loop(lr=1.0, weight_decay=0.1)

    def rates(**over):
        model = make_model("ccl", **over)
        by = {id(p): g for g in model.param_groups(loop) for p in g["params"]}
        assert len(by) == len(list(model.parameters()))
        return {n: (by[id(p)]["lr"], by[id(p)]["weight_decay"])
                for n, p in model.named_parameters()}

    r = rates(vision_lr=0.01, text_lr=0.1)
    assert r["vision.conv1.weight"] == (0.01, 0.1) and r["vision.bn1.weight"] == (0.01, 0)
    assert r["text_fc.weight"] == (1, 0.1) and r["s_image"] == (1, 0)
    assert r["text.embeddings.norm.bias"] == (0.1, 0)
    assert rates()["vision.conv1.weight"][0] == 1
    with torch.device("meta"):
        model = Cookie(small(backbone="resnext101_32x8d"), "ccl")
    assert {g["lr"] for g in model.param_groups(loop)} == {0.1, 1.0}    # section 4.1: ResNeXt


def test_embed_bert():
    model = make_model("ccl", embed="bert", ws_layers=0)
    batch = make_batch(model.cfg)
    t = model.eval().text(batch["text"], batch["text_mask"])
    for i in range(4):
        mean = t[i, :int(batch["text_mask"][i].sum())].mean(0)
        close(model.encode_text(batch)[i], mean / mean.norm(), 1e-5)
    assert [n for n, _ in model.named_children()] == ["text"]
    assert "encode_image" not in model.offers
    with pytest.raises(SystemExit, match="nothing to train"):
        model(batch)


# --------------------------------------------------------------------------------------------------
# Every setting matters

def show(task, **over):
    """What a model of these settings shows of itself: sizes, a step, rates, schedule, memory."""
    cfg = small(**over)
    torch.manual_seed(0)
    model = Cookie(cfg, task, 5).train()
    for norm in model.norms:
        norm.eval()                                     # chunks have statistics of their own
    batch = make_batch(small(image_size=cfg.image_size, frame_width=cfg.frame_width))
    out = {"parameters": {name: p.shape for name, p in model.named_parameters()},
           "rates": sorted(g["lr"] for g in model.param_groups(train.Loop(lr=1.0)))}
    if cfg.embed == "bert":
        return out

    # what backward keeps, and what comes out of it
    kept = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(batch)
    loss["loss"].backward()
    own = {p.data_ptr() for p in model.parameters()}
    out |= {"loss": {name: value.item() for name, value in loss["logs"].items()},
            "total": loss["loss"].item(), "gradient": [p.grad for p in model.parameters()],
            "bytes": sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own)}
    if task == "pretrain":
        torch.manual_seed(2)
        out["view"] = model.text_view(batch)[0].tolist()
    if task == "retrieval":
        model.after_step(7, 20, 5)
        out["hard"] = model.hard.item()
    return out


# field: (task, other settings, another legal value, what differs then). "loss" and what follows it
# differ although the parameters are the same; "bytes" differ and nothing else does.
SETTINGS = {
    "image_size": ("ccl", {}, 64, "parameters"),
    "backbone": ("ccl", {"image_size": 64}, "resnet50", "parameters"),
    "width": ("ccl", {}, 36, "parameters"),
    "text_layers": ("ccl", {}, 2, "parameters"),
    "heads": ("ccl", {}, 4, "loss"),
    "mlp_ratio": ("ccl", {}, 3, "parameters"),
    "act": ("ccl", {}, "relu", "loss"),
    "dropout": ("ccl", {}, 0.3, "loss"),
    "embed_dim": ("ccl", {}, 40, "parameters"),
    "te_heads": ("ccl", {}, 2, "loss"),
    "te_ratio": ("ccl", {}, 3, "parameters"),
    "tav_layers": ("ccl", {}, 2, "parameters"),
    "ws_layers": ("ccl", {}, 1, "parameters"),
    "ws": ("ccl", {}, "fc", "parameters"),
    "ws_shared": ("ccl", {}, False, "parameters"),
    "pooling": ("ccl", {}, "gpo", "parameters"),
    "embed": ("ccl", {}, "bert", "parameters"),
    "temp": ("ccl", {}, 0.3, "loss"),
    "vcl": ("pretrain", {}, False, "loss"),
    "tcl": ("pretrain", {}, False, "loss"),
    "ccl_on": ("pretrain", {}, "view1", "loss"),
    "tcl_prob": ("pretrain", {}, 0.9, "view"),
    "tcl_mask": ("pretrain", {"tcl_prob": 0.9}, 0.1, "view"),
    "tcl_substitute": ("pretrain", {"tcl_prob": 0.9}, 0.4, "view"),
    "margin": ("retrieval", {}, 0.4, "loss"),
    "warmup_epochs": ("retrieval", {}, 1.5, "hard"),
    "frame_width": ("vtm", {}, 20, "parameters"),
    "vtm_te": ("vtm", {}, True, "parameters"),
    "bits": ("hashing", {}, 32, "parameters"),
    "quantization": ("hashing", {}, 0.3, "total"),
    "hash_dropout": ("hashing", {}, 0.5, "loss"),
    "vision_lr": ("ccl", {}, 0.3, "rates"),
    "text_lr": ("ccl", {}, 0.3, "rates"),
    "chunk": ("ccl", {}, 2, "bytes"),
    "max_text": None,               # test_max_text()
    "positions": ("ccl", {}, 15, "parameters"),
    "vocab_size": ("ccl", {}, 60, "parameters"),
    "pad_id": ("pretrain", {"tcl_prob": 0.9}, 1, "view"),
    "cls_id": ("pretrain", {"tcl_prob": 0.9}, 1, "view"),
    "sep_id": ("pretrain", {"tcl_prob": 0.9}, 1, "view"),
    "mask_id": ("pretrain", {"tcl_prob": 0.9}, 1, "view"),
    "first_word": ("pretrain", {"tcl_prob": 0.9, "tcl_mask": 0.0}, 40, "view"),
    "checkpointing": ("vtm", {"dropout": 0.3, "vtm_te": True}, True, "bytes"),
}


def test_every_setting_has_a_row():
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("field", [field for field, row in SETTINGS.items() if row])
def test_every_setting_matters(field):
    task, over, value, what = SETTINGS[field]
    before, after = show(task, **over), show(task, **over, **{field: value})
    assert getattr(small(**over), field) != value
    if what == "bytes":
        assert after["bytes"] < 0.8 * before["bytes"]
        assert before["parameters"] == after["parameters"]
        close(after["total"], before["total"], 1e-6)
        for a, b in zip(after["gradient"], before["gradient"]):
            close(a, b, 1e-5)
        return
    assert before[what] != after[what]
    assert what == "parameters" or before["parameters"] == after["parameters"]
    if what == "view":
        assert before["loss"]["t"] != after["loss"]["t"] or field == "pad_id"


def test_max_text(world, tmp_path, monkeypatch):
    """As many tokens as a run feeds; more than there are positions are refused."""
    for width in (5, 9):
        widths = []
        monkeypatch.setattr(Cookie, "prepare", lambda self, samples: widths.append(
            samples[0]["text"].shape))
        run(world, tmp_path / str(width), "--data", world / "pairs.jsonl", "--evals", "none",
            "--max_text", width, "--steps", 0)
        assert widths == [(width,)] * 2                                 # two stages
    with pytest.raises(SystemExit, match="--max_text 15: more than --positions 14"):
        run(world, tmp_path / "x", "--data", world / "pairs.jsonl", "--max_text", 15,
            "--positions", 14)


# --------------------------------------------------------------------------------------------------
# The recipe is the paper's

# every number of Config, with the section of the paper it stands in or whose it is
CONFIG = {
    "image_size": (512, "section 4.1: 512 x 512"),
    "backbone": ("resnext101_32x8d", "sections 4.1, 4.3; 32x8d is a guess, deviation 3"),
    "width": (768, "section 4.1: D_T"),
    "text_layers": (12, "section 3.1: BERT-base"),
    "heads": (12, "section 3.1: BERT-base"),
    "mlp_ratio": (4, "section 3.1: BERT-base, 3072"),
    "act": ("gelu", "section 3.1: BERT-base"),
    "dropout": (0.1, "BERT's, deviation 4"),
    "embed_dim": (1024, "section 4.1: D"),
    "te_heads": (8, "section 4.1: multi-head number"),
    "te_ratio": (1, "section 4.1: intermediate size 1024"),
    "tav_layers": (1, "section 4.1"),
    "ws_layers": (2, "section 4.1, Table 5c"),
    "ws": ("te", "section 3.1"),
    "ws_shared": (True, "section 3.1"),
    "pooling": ("mean", "Eq. 4 does not say; Table 3 has both"),
    "embed": ("joint", "Eq. 4"),
    "temp": (0.05, "SimCSE's, deviation 2"),
    "vcl": (True, "Eq. 12"),
    "tcl": (True, "Eq. 12"),
    "ccl_on": ("raw", "Eq. 6, 7: I and T of the raw input"),
    "tcl_prob": (0.2, "VSE-infinity's, deviation 2"),
    "tcl_mask": (0.5, "VSE-infinity's, deviation 2"),
    "tcl_substitute": (0.1, "VSE-infinity's, deviation 2"),
    "margin": (0.2, "VSE++'s"),
    "warmup_epochs": (1.0, "VSE-infinity's"),
    "frame_width": (2048, "section 4.2: ResNet152's features"),
    "vtm_te": (False, "section 4.2: FC and pooling"),
    "bits": (64, "Table 5: COCO, 64 bit"),
    "quantization": (0.05, "CSQ's commands"),
    "hash_dropout": (0.5, "CSQ's code"),
    "vision_lr": (0.0, "section 4.1: one-tenth for ResNeXt101, see param_groups()"),
    "text_lr": (1.0, "section 4.1: the global rate"),
    "chunk": (0, "the whole batch"),
    "max_text": (50, "section 4.1: m"),
    "positions": (512, "BERT's"),
    "vocab_size": (30522, "bert-base-uncased's vocab.txt"),
    "pad_id": (0, "bert-base-uncased's vocab.txt"),
    "cls_id": (101, "bert-base-uncased's vocab.txt"),
    "sep_id": (102, "bert-base-uncased's vocab.txt"),
    "mask_id": (103, "bert-base-uncased's vocab.txt"),
    "first_word": (999, "bert-base-uncased's vocab.txt"),
    "checkpointing": (False, "memory"),
}

# what `--preset base` trains with. Loop's fields that are not of the schedule are left out
SILENT = "the paper names none"
OPTIMIZER = {
    "optimizer": ("adamw", "section 4.1"), "beta2": (0.999, "AdamW's"),
    "weight_decay": (0.01, "BERT's, deviation 2"), "clip": (0.0, SILENT),
    "lr": (2e-5, "section 4.1"), "schedule": ("step", "section 4.1"),
    "milestones": ("0.5", "section 4.1: after half"), "gamma": (0.1, "section 4.1: by 10 times"),
    "warmup_steps": (0.0, SILENT), "accum": (1, "the whole batch"), "steps": (0, "by epochs"),
    "epoch_of": ("captions", "section 4.1 counts 5.9M pairs"),
    "image_view": ("", "as VIEWS has it"),
}
VSE = {
    **OPTIMIZER, "lr": (5e-4, "VSE-infinity's"), "weight_decay": (1e-4, "VSE-infinity's"),
    "clip": (2.0, "VSE-infinity's"), "schedule": ("step", "VSE-infinity's"),
    "milestones": ("0.6", "VSE-infinity's: epoch 15 of 25"), "gamma": (0.1, "VSE-infinity's"),
    "epochs": (25, "VSE-infinity's"), "batch_size": (128, "VSE-infinity's"),
    "epoch_of": ("captions", "VSE-infinity's"),
    "text_lr": (0.1, "VSE-infinity's"),
}
BASE = {
    ("pretrain", 0): {
        **OPTIMIZER, "epochs": (30, "section 4.1"), "batch_size": (576, "section 4.1"),
        "crop_scale": ((0.2, 1.0), "no crop in stage 1")},
    ("pretrain", 1): {
        **OPTIMIZER, "epochs": (10, "section 4.1"), "batch_size": (288, "section 4.1"),
        "crop_scale": ((0.2, 1.0), "MoCo v2's, deviation 2")},
    ("retrieval", 0): {
        **VSE, "vision_lr": (0.01, "VSE-infinity's"),
        "crop_scale": ((0.6, 1.0), "VSE-infinity's")},
    ("vtm", 0): {**VSE, "crop_scale": ((0.2, 1.0), "no pictures")},
    ("hashing", 0): {
        **OPTIMIZER, "optimizer": ("adam", "CSQ's"), "lr": (1e-3, "CSQ's"),
        "weight_decay": (0.0, "CSQ's"), "vision_lr": (0.05, "CSQ's"),
        "gamma": (0.7, "CSQ's"), "epochs": (90, "CSQ's"), "batch_size": (64, "CSQ's"),
        "epoch_of": ("images", "CSQ's"),
        "crop_scale": ((0.08, 1.0), "CSQ's: RandomResizedCrop"),
        "milestones": ("0.1111,0.2222,0.3333,0.4444,0.5556,0.6667,0.7778,0.8889",
                       "CSQ's: every 10 of 90 epochs"),
        "image_size": (224, "section 4.2"), "backbone": ("resnet50", "section 4.2")},
}
NOT_THE_SCHEDULE = {
    "data", "image_root", "image_id", "vocab", "split", "hold_out", "regions", "limit", "tag_words",
    "paraphrase", "stage_data", "stage_root", "workers", "warmup_lr", "min_lr", "seed", "out",
    "init", "resume", "overwrite", "device", "amp", "compile", "log_every", "save_minutes",
    "save_every", "eval_every", "evals", "eval_data", "eval_root", "eval_split", "eval_limit",
    "rerank_k", "rerank"}


def test_the_defaults_are_the_papers():
    assert dataclasses.asdict(Config()) == {field: value for field, (value, _) in CONFIG.items()}
    assert cookie.PRESETS["base"] == {}
    assert all(source for _, source in CONFIG.values())


@pytest.mark.parametrize("task, stage", BASE, ids=str)
def test_the_recipe_is_the_papers(task, stage):
    """All that `--preset base` sets, of Loop and Config, is a row of BASE or CONFIG."""
    rows = BASE[task, stage]
    loop, cfg = train.settings(cookie, "base", task, {}, stage)
    schedule = {f.name for f in dataclasses.fields(loop)} - NOT_THE_SCHEDULE
    assert schedule <= set(rows)
    for field, (value, source) in {**CONFIG, **rows}.items():
        assert getattr(loop if field in schedule else cfg, field) == value, (field, source)
    recipe = train.of_stage(cookie.RECIPE[task], stage)
    assert set(recipe) <= {*rows, "task"}
    assert recipe.get("task") == ("ccl" if (task, stage) == ("pretrain", 0) else None)


def test_views_are_the_papers():
    norm = "imagenet"                                   # what the backbones were trained with
    assert cookie.VIEWS == {
        # section 4.1: all images are reshaped to 512 x 512
        "ccl": {"source": "pairs", "image": "resize", "norm": norm, "text": "caption"},
        # Eq. 8: two augmentations of the raw image; Eq. 10 draws its own
        "pretrain": {"source": "pairs", "image": "resize", "view1": "simclr", "view2": "simclr",
                     "norm": norm, "text": "caption"},
        # VSE-infinity: a crop and a flip
        "retrieval": {"source": "pairs", "image": "flip", "norm": norm, "text": "caption"},
        # section 4.2: features of frames
        "vtm": {"source": "clips", "frames": "frames", "text": "caption"},
        # CSQ: a crop and a flip; the middle in evaluation
        "hashing": {"source": "hashing", "image": "flip", "image_eval": "center", "norm": norm,
                    "labels": "labels"}}
    assert cookie.TASKS == ("pretrain", "retrieval", "vtm", "hashing")
    assert cookie.EVALS == {"ccl": ("retrieval",), "pretrain": ("retrieval",),
                            "retrieval": ("retrieval",), "vtm": ("vtm",), "hashing": ("hashing",)}


# --------------------------------------------------------------------------------------------------
# Dropout, checkpointing, first weights

def test_dropout_is_where_bert_has_it():
    """One layer with the masks redrawn: on the attention's weights, behind it, behind the MLP."""
    b, s, heads, width, p = 2, 5, 3, 24, 0.4
    block = cookie.Block(width, heads, 2, "gelu", p).double().train()
    x = torch.randn(b, s, width, dtype=torch.float64)
    torch.manual_seed(6)
    out = block(x)

    torch.manual_seed(6)
    on_weights = F.dropout(torch.ones(b, heads, s, s, dtype=torch.float64), p)
    behind, last = (F.dropout(torch.ones_like(x), p) for _ in range(2))
    qkv = block.attention.qkv(x).view(b, s, 3, heads, 8)
    looked = torch.zeros(b, s, heads, 8, dtype=torch.float64)
    for i, h in itertools.product(range(b), range(heads)):
        q, k, v = (qkv[i, :, part, h] for part in range(3))
        looked[i, :, h] = (torch.softmax(q @ k.T / math.sqrt(8), 1) * on_weights[i, h]) @ v
    y = block.attention_norm(x + behind * block.attention.out(looked.flatten(2)))
    close(out, block.mlp_norm(y + last * block.mlp(y)))
    assert (on_weights == 0).any() and (behind == 0).any() and (last == 0).any()

    layer = cookie.FeedForward(width, 2, "relu", p).double().train()
    torch.manual_seed(6)
    out = layer(x)
    torch.manual_seed(6)
    close(out, layer.mlp_norm(x + F.dropout(layer.mlp(x), p)))


def test_dropout_is_on_in_training_alone():
    over = {"dropout": 0.3, "hash_dropout": 0.6, "text_layers": 2}
    for task in TASKS:
        model = make_model(task, vtm_te=True, **over)
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                assert module.p == (0.6 if name.startswith("hash") else 0.3), name
            if isinstance(module, cookie.Attention):
                assert module.dropout == 0.3, name
        count = sum(isinstance(m, nn.Dropout) for m in model.modules())
        assert count == (1 if task == "hashing" else 1 + 2 + 1 + 2)     # words, BERT, TAV-TE, WS-TE

        # BERT's input
        if task != "hashing":
            text, mask = sentences(model.cfg, 3)
            embeddings = model.text.embeddings
            torch.manual_seed(7)
            dropped = embeddings(text)
            torch.manual_seed(7)
            close(dropped, F.dropout(embeddings.eval()(text), 0.3))
            embeddings.train()

        # off in evaluation
        batch = make_batch(model.cfg)
        for name in sorted(model.offers - {"sentence_vector"}):
            encode = getattr(model.eval(), name)
            assert repr(encode(batch)) == repr(encode(batch))
        assert isinstance(model.train()(batch)["loss"].item(), float)
        for norm in model.norms:
            norm.eval()
        torch.manual_seed(1)
        first = model({**batch, "labels": torch.ones(4, 5)})["loss"]
        torch.manual_seed(2)
        assert first != model({**batch, "labels": torch.ones(4, 5)})["loss"]


@pytest.mark.parametrize("task", ["ccl", "pretrain", "retrieval", "vtm"])
def test_checkpointing_changes_memory_alone(task):
    """Every tower's layers are run again in backward, with the same masks."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = make_model(task, checkpointing=checkpointing, dropout=0.3, vtm_te=True)
        batch, runs = make_batch(model.cfg), Counter()
        for name, module in model.named_modules():
            if isinstance(module, cookie.Block):
                module.attention.register_forward_hook(
                    lambda *_, name=name: runs.update([name]))
        torch.manual_seed(3)
        loss = model(batch)["loss"]
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()], runs))
    (plain, grads, once), (again, others, twice) = results
    assert plain == again
    for a, b in zip(grads, others):
        close(a, b, 1e-6)
    assert set(once) == {"text.blocks.0", "tav.blocks.0", "ws.blocks.0", "ws.blocks.1"}
    assert twice == {name: 2 * n for name, n in once.items()}


def test_first_weights():
    """BERT's: a truncated normal of 0.02, biases zero; He's for convolutions; CSQ's head apart."""
    model = Cookie(small(width=48, pooling="gpo", ws="fc", ws_shared=False), "ccl")
    for name, p in model.named_parameters():
        if name.startswith("vision.") and p.ndim == 4:
            fan_out = p.shape[0] * p.shape[2] * p.shape[3]
            assert p.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), name
        elif ".ahead." in name or ".back." in name:
            assert p.abs().max() <= 1 / math.sqrt(32)                           # PyTorch's GRU
        elif "norm" in name or "bn" in name or "downsample.1" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.35), name
            assert p.abs().max() < 2.0
    head = Cookie(small(), "hashing", 5).hash_layer
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU,
                                               nn.Linear]
    assert head[0].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.1)
    assert [layer.out_features for layer in head if hasattr(layer, "out_features")] == [128, 128,
                                                                                        16]


# --------------------------------------------------------------------------------------------------
# From one run to the next

def test_a_start_from_another_run_takes_weights_alone():
    """Pictures are numbered anew in each data set: no id may be kept. The hinge's warm-up begins
    again, and pieces of words are those of the new run's vocabulary."""
    expected = {"ccl": set(), "pretrain": {"continues"}, "retrieval": {"hard"}, "vtm": set(),
                "hashing": {"centers", "tie"}}
    for task in TASKS:
        buffers = {name for name, _ in make_model(task).named_buffers()}
        assert {name for name in buffers if not name.startswith("vision.")} == expected[task]

    old = make_model("retrieval")
    old.after_step(20, 20, 5)
    assert old.hard == 1
    new = Cookie(small(), "retrieval")
    new.load_state_dict(new.adapt(old.state_dict()), strict=False)
    assert new.hard == 0 and torch.equal(new.image_fc.weight, old.image_fc.weight)

    old = make_model("pretrain")
    old.continues.fill_(True)
    new = Cookie(small(), "pretrain")
    new.load_state_dict(new.adapt(old.state_dict()), strict=False)
    assert not new.continues.any()


def test_gradients_through_gather_are_not_differentiated_twice(monkeypatch):
    monkeypatch.setattr(cookie.dist, "all_reduce", lambda x: None)
    x = torch.randn(3, 2, requires_grad=True)
    y = cookie.GatherGrad.apply(x)
    grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --------------------------------------------------------------------------------------------------
# Foreign weights

def test_backbones_have_torchvisions_keys():
    for name in ("resnet50", "resnet101", "resnext101_32x8d"):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, name)().state_dict()
            mine = cookie.ResNet(name)
        theirs = {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
        assert {k: v.shape for k, v in mine.state_dict().items()} == theirs
        assert (mine.width, mine.stride) == (2048, 32)


def test_vision_tower_is_torchvisions_resnet():
    """Random weights and running statistics through load_pretrained()."""
    theirs = torchvision.models.resnet50().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    model = Cookie(small(backbone="resnet50", image_size=64), "ccl").eval()
    cookie.load_pretrained(model, vision=theirs.state_dict())

    theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(model.vision(x).mean((2, 3)), theirs(x), 1e-6)


def test_text_tower_takes_berts_names():
    """The last layer by plain loops from a state dict with Hugging Face's names, in float64."""
    cfg = small(text_layers=2)
    model, state = Cookie(cfg, "ccl").eval(), bert_state(cfg, prefix="bert.")
    cookie.load_pretrained(model, text={**state, "bert.pooler.dense.weight": torch.zeros(2)})
    text, mask = sentences(cfg, 3)
    out = model.double().text(text, mask)

    state = {k.removeprefix("bert."): v.double() for k, v in state.items()}
    words = state["embeddings.word_embeddings.weight"]
    places = state["embeddings.position_embeddings.weight"]
    for i in range(3):
        x = words[text[i]] + places[:11] + state["embeddings.token_type_embeddings.weight"][0]
        x = F.layer_norm(x, (24,), state["embeddings.LayerNorm.weight"],
                         state["embeddings.LayerNorm.bias"], 1e-12)
        for n in range(2):
            x = loop_layer(of_bert(state, n), 3, x, mask[i].tolist(), F.gelu)
        close(out[i], x)


@pytest.mark.needs("transformers")
def test_text_tower_is_transformers_bert():
    import transformers
    config = transformers.BertConfig(
        vocab_size=57, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=14)
    theirs = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = Cookie(small(text_layers=3), "ccl").eval()
    cookie.load_pretrained(model, text=theirs.state_dict())

    text, mask = sentences(model.cfg, 5)
    with torch.no_grad():
        expected = theirs(text, attention_mask=mask).last_hidden_state
        out = model.text(text, mask)
    close(out[mask.bool()], expected[mask.bool()], 1e-6)


@pytest.mark.parametrize("side", ["vision", "text"])
def test_foreign_names_cover_a_tower(side):
    model = make_model("ccl", text_layers=3)
    needed, optional = cookie.foreign_names(model, side)
    tower = {name for name in model.state_dict() if name.startswith(side + ".")}
    assert needed.keys() | optional.keys() == tower and not needed.keys() & optional.keys()
    assert all(name.endswith("num_batches_tracked") for name in optional)       # WSL lacks them
    assert bool(optional) == (side == "vision")
    theirs = [name for names in needed.values() for name in names]
    assert len(theirs) == len(set(theirs))


def test_load_pretrained_refuses():
    """A KeyError names what is missing, and nothing has changed."""
    model = make_model("ccl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resnet, bert = make_model("ccl").vision.state_dict(), bert_state(model.cfg)
    del resnet["layer2.0.bn1.running_var"]
    with pytest.raises(KeyError, match="layer2.0.bn1.running_var"):
        cookie.load_pretrained(model, text=bert, vision=resnet)
    del bert["encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(KeyError, match="encoder.layer.0.attention.self.key.bias"):
        cookie.load_pretrained(model, text=bert)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    for side, task in (("vision", "vtm"), ("text", "hashing")):
        with pytest.raises(SystemExit, match=f"for {task} has no {side} tower"):
            cookie.foreign_names(make_model(task), side)
    with pytest.raises(SystemExit, match="has gelu, this model has relu"):
        cookie.foreign_names(make_model("ccl", act="relu"), "text")


# --------------------------------------------------------------------------------------------------
# Fine-tuning

def test_hinge():
    q, k, margin = units(4, 6).requires_grad_(), units(5, 6), 0.2
    ids, key_ids, at = [1, 2, 3, 2], [9, 1, 2, 3, 2], [1, 2, 3, 4]
    hard = mean = 0
    for i in range(4):
        costs = [F.relu(margin - q[i] @ k[at[i]] + q[i] @ k[j])
                 for j in range(5) if key_ids[j] != ids[i]]
        hard, mean = hard + max(costs) / 4, mean + sum(costs) / len(costs) / 4
    for slow, h in ((hard, 1.0), (mean, 0.0)):
        fast = cookie.hinge_triplet(q, k, pairs(ids, key_ids, at), margin, torch.tensor(h))
        close(fast, slow)
        close(torch.autograd.grad(fast, q)[0], torch.autograd.grad(slow, q, retain_graph=True)[0])
    alone = cookie.hinge_triplet(q, q, pairs([1, 1, 1, 1]), margin, torch.tensor(1.0))
    assert alone == 0                                                           # no negative


def test_hinge_warmup():
    model = make_model("retrieval", warmup_epochs=2)
    assert model.hard == 0
    model.after_step(9, 100, 5)
    assert model.hard == 0
    model.after_step(10, 100, 5)
    assert model.hard == 1 and make_model("retrieval", warmup_epochs=0).hard == 1


@pytest.mark.parametrize("labels, bits",
                         [(5, 16), (32, 16), (80, 64), (80, 16), (21, 12), (80, 32)])
def test_hash_centers(labels, bits):
    centers, tie = cookie.hash_centers(labels, bits)
    assert centers.shape == (labels, bits)
    assert set(centers.flatten().tolist()) == {-1.0, 1.0} == set(tie.tolist())
    distance = (bits - centers @ centers.T) / 2
    off = distance[~torch.eye(labels, dtype=torch.bool)]
    if bits in (16, 64) and labels <= 2 * bits:
        assert set(off.tolist()) <= {bits / 2, float(bits)}
    else:
        assert (centers.sum(1) == 0).all()
        assert off.min() >= bits / 4 and off.mean() >= bits / 2 - 0.5
    again = cookie.hash_centers(labels, bits)
    assert all(torch.equal(a, b) for a, b in zip(again, (centers, tie)))


def test_target_centers():
    centers = torch.tensor([[1., 1, -1, -1], [1., -1, 1, -1], [1., -1, -1, 1]])
    tie = torch.tensor([-1., 1, 1, -1])
    labels = torch.tensor([[1., 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert (cookie.target_centers(labels, centers, tie).tolist()
            == [[1, 1, -1, -1], [1, 1, 1, -1], [1, -1, -1, -1], [-1, 1, 1, -1]])


def test_csq_losses():
    a = torch.randn(3, 4, dtype=torch.float64)
    target = torch.tensor([[1., -1, 1, 1], [-1, -1, 1, -1], [1, 1, 1, 1]])
    weight = torch.tensor([1., 0, 1])
    central = quantization = 0
    for i, k in itertools.product((0, 2), range(4)):
        y, c = math.tanh(a[i, k]), (float(target[i, k]) + 1) / 2
        p = (y + 1) / 2
        central -= (c * math.log(p) + (1 - c) * math.log(1 - p)) / 8
        quantization += (abs(y) - 1) ** 2 / 8
    for mine, theirs in zip(cookie.csq_losses(a, target, weight), (central, quantization)):
        close(mine, theirs)
    # saturated, unlabelled
    assert all(torch.isfinite(x) for x in cookie.csq_losses(1e4 * a, target, torch.zeros(3)))


# --------------------------------------------------------------------------------------------------
# As a user calls it

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few pictures in the official formats, vocabulary and clips; no built-in world is drawn."""
    root, g = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    (root / "features").mkdir()
    rows, lists, videos, clips, graded = [], [], [], [], []

    def sentence():
        return " ".join(g.choice(list("abcdefgh"), 4))

    for i in range(12):
        pixels = g.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        data.Image.fromarray(pixels).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [sentence(), sentence()]})
        lists.append(f"some/where/{i}.png {1 - i % 2} {i % 2} {int(i % 3 == 0)}")
        frames = g.normal(size=(3 + i * 4, 18)).astype(np.float32)
        np.save(root / "features" / f"v{i}.npy", frames)
        videos.append({"video_id": f"v{i}", "split": "train" if i < 8 else "test"})
        clips += [{"video_id": f"v{i}", "caption": sentence()} for _ in range(2)]
        graded.append(f"news\tx\t1\t{i}\t{i % 6}\t{sentence()}\t{' '.join('abcdefgh'[:1 + i % 6])}")
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "clips.json").write_text(json.dumps({"videos": videos, "sentences": clips}))
    (root / "sts-test.csv").write_text("\n".join(graded) + "\n")
    (root / "lists").mkdir()
    for name, part in (("train", lists), ("database", lists[4:]), ("test", lists[:4])):
        (root / "lists" / f"{name}.txt").write_text("\n".join(part) + "\n")
    return root


SMALL = ("--batch_size 4 --steps 2 --image_size 32 --width 16 --embed_dim 16 --te_heads 2 "
         "--heads 2 --text_layers 1 --log_every 1".split())


def run(world, out, *flags):
    return train.main(["--model", "cookie", "--vocab", str(world / "vocab.txt"), "--out", str(out),
                       *SMALL, *map(str, flags)])


def test_both_stages_and_fine_tuning(world, tmp_path):
    pairs_ = ("--data", world / "pairs.jsonl", "--hold_out", 0)
    result = run(world, tmp_path / "a", *pairs_)
    assert result["retrieval"]["metrics"]["rsum"] > 0
    one, two = (json.loads((tmp_path / "a" / f"stage-{s}" / "config.json").read_text())
                for s in (1, 2))
    assert (one["task"], two["task"]) == ("ccl", "pretrain")
    assert two["loop"]["init"].endswith("stage-1")
    log = (tmp_path / "a" / "stage-2" / "log.jsonl").read_text().splitlines()
    assert "t" in json.loads(log[-1])
    run(world, tmp_path / "r", *pairs_, "--task", "retrieval", "--init", tmp_path / "a")
    run(world, tmp_path / "b", *pairs_, "--evals", "none", "--ws_layers", 0, "--tav_layers", 0,
        "--pooling", "gpo")


def test_clips_and_hashing_take_their_tower_of_a_run(world, tmp_path):
    clips = ("--data", world / "clips.json")
    for pooling in ("mean", "gpo"):
        run(world, tmp_path / pooling, "--task", "vtm", "--pooling", pooling, "--evals", "none",
            *clips)
        config = json.loads((tmp_path / pooling / "config.json").read_text())
        assert config["config"]["frame_width"] == 18

    start = ("--init", tmp_path / "a", "--steps", 0, "--evals", "none")
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none")
    run(world, tmp_path / "v", "--task", "vtm", *start, *clips)
    run(world, tmp_path / "w", "--task", "vtm", "--vtm_te", *start, *clips)
    run(world, tmp_path / "i", "--task", "hashing", *start, "--image_root", world,
        "--data", world / "lists")
    state, clip, whole, hashes = (ev.load_run(tmp_path / name)[0].state_dict() for name in "avwi")

    # clips: BERT alone, as section 4.2 has it, or all but the FC of images
    assert all(torch.equal(v, state[k]) for k, v in clip.items() if k.startswith("text."))
    assert not torch.equal(clip["text_fc.weight"], state["text_fc.weight"])
    for name, tensor in whole.items():
        assert name.startswith("image_fc.") or torch.equal(tensor, state[name]), name
    assert all(torch.equal(v, state[k]) for k, v in hashes.items() if k.startswith("vision."))


def test_embed_bert_run(world, tmp_path):
    """`train.py --steps 0 --init_text`: Table 4a's BERT row and foreign sentence encoders."""
    sizes = {"width": 16, "text_layers": 1, "heads": 2}
    cfg = train.settings(cookie, "tiny", "pretrain", sizes)[1]
    cfg.vocab_size = 13
    state = bert_state(cfg)
    save_file(state, tmp_path / "t.safetensors")
    result = run(world, tmp_path / "e", "--data", world / "pairs.jsonl", "--embed", "bert",
                 "--ws_layers", 0, "--act", "gelu", "--steps", 0, "--evals", "sts",
                 "--init_text", tmp_path / "t.safetensors", "--eval_data", world / "sts-test.csv")

    text = ev.load_run(tmp_path / "e")[0].text
    close(text.embeddings.words.weight, state["embeddings.word_embeddings.weight"])
    for part, (weight, bias) in of_block(text.blocks[0]).items():
        close(weight, of_bert(state, 0)[part][0])
        close(bias, of_bert(state, 0)[part][1])
    again = ev.main([str(tmp_path / "e"), "--task", "sts", "--data", str(world / "sts-test.csv")])
    assert again["sts"]["metrics"] == result["sts"]["metrics"]


def test_pieces_of_words_come_from_the_vocabulary(world, tmp_path):
    """Stage 2 learns which ids continue a word, before its first step; a stopped run keeps it."""
    vocab = tmp_path / "vocab.txt"
    vocab.write_text((world / "vocab.txt").read_text() + "##b\ni\n##ing\n")
    flags = ("--data", world / "pairs.jsonl", "--vocab", vocab, "--evals", "none", "--steps", 1)
    run(world, tmp_path / "a", *flags)
    continues = ev.load_run(tmp_path / "a")[0].continues
    assert continues.nonzero().flatten().tolist() == [13, 15] and len(continues) == 16
