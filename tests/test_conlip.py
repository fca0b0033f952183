"""models/conlip.py against the paper, written down a second time with explicit loops in float64."""

import dataclasses
import json
import math
import os
import re
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
import train
from models import conlip
from models.conlip import Config, ConLIP, Keys, negatives_log_sum
from tools import weights

KINDS = ("con", "vanilla", "none")
CONTRASTS = {"dcl": conlip.dcl_loss, "infonce": conlip.infonce_loss}


# --------------------------------------------------------------------------------------------------
# Small models and batches

def small(**over):
    """A Config of which few sizes are equal, so that a mixed-up axis is an error."""
    sizes = dict(image_size=24, patch=8, width=24, vision_layers=2, text_layers=1, heads=3,
                 mlp_ratio=2, dropout=0.0, max_text=11, positions=14, vocab_size=57, pad_id=0,
                 cls_id=2, sep_id=3, mask_id=4, first_word=6, queue_size=21)
    return Config(**{**sizes, **over})


def make_batch(cfg, b=4, ids=None):
    """Sentences of 1 to max_text - 2 words, padded; random pictures."""
    text = torch.full((b, cfg.max_text), cfg.pad_id)
    mask = torch.zeros(b, cfg.max_text, dtype=torch.long)
    for i, n in enumerate(torch.linspace(1, cfg.max_text - 2, b).long().tolist()):
        words = torch.randint(cfg.first_word, cfg.vocab_size, (n,)).tolist()
        text[i, :n + 2] = torch.tensor([cfg.cls_id, *words, cfg.sep_id])
        mask[i, :n + 2] = 1
    return {"image": torch.randn(b, 3, cfg.image_size, cfg.image_size), "text": text,
            "text_mask": mask, "image_id": torch.tensor(ids or range(7, 7 + b))}


def shake(module):
    """No parameter stays zero, and momentum towers become unlike their students."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def make_model(task="pretrain", **over):
    return shake(ConLIP(small(**over), task)).train()


def doubled(model, batch):
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def named(model):
    """The weights and buffers by name, in the graph of autograd."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def real_words(batch, b):
    """Sentence b without its padding."""
    return batch["text"][b, :batch["text_mask"][b].sum()]


def close(a, b, tol=1e-9):
    """Tensors, numbers or lists of numbers."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------
# The paper, with loops

# They read the weights by name, w: {name: tensor}, and know nothing of the model's modules. One
# picture or one sentence at a time; a sentence comes without its padding.

def inside(w, prefix):
    """The weights of one part, without its name."""
    return {k.removeprefix(prefix + "."): t for k, t in w.items() if k.startswith(prefix + ".")}


def depth(w):
    """How many blocks a tower or a head stores."""
    return 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(w, name, x, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def active(x, act):
    return x * (x > 0) if act == "relu" else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def feed(w, x, act):
    return linear(w, "mlp.2", active(linear(w, "mlp.0", x), act))


def attention(queries, keys, values, heads):
    """One token after the other, one head after the other -> outputs (S, D), weights (S, heads, L).
    """
    d, out, weights = queries.shape[1] // heads, [], []
    for query in queries:
        parts, rows = [], []
        for h in range(heads):
            own = slice(h * d, h * d + d)
            e = (keys[:, own] @ query[own] / math.sqrt(d)).exp()                 # (L,)
            rows.append(e / e.sum())
            parts.append(rows[-1] @ values[:, own])
        out.append(torch.cat(parts))
        weights.append(torch.stack(rows))
    return torch.stack(out), torch.stack(weights)


def self_attention(w, x, heads):
    d, qkv = x.shape[1], linear(w, "attention.qkv", x)
    out, _ = attention(qkv[:, :d], qkv[:, d:2 * d], qkv[:, 2 * d:], heads)
    return linear(w, "attention.out", out)


def cross_attention(w, x, context, heads):
    d, key_value = x.shape[1], linear(w, "cross.key_value", context)
    query = linear(w, "cross.query", x)
    out, weights = attention(query, key_value[:, :d], key_value[:, d:], heads)
    return linear(w, "cross.out", out), weights


def ref_stem(w, image, cfg):
    """(3, H, W) -> (P, D), row by row."""
    if cfg.stem == "conv":
        x = F.conv2d(image, w["patch_embed.0.weight"], w["patch_embed.0.bias"], cfg.patch // 4)
        for n in (2, 4):
            weight, bias = w[f"patch_embed.{n}.weight"], w[f"patch_embed.{n}.bias"]
            x = F.conv2d(active(x, cfg.act), weight, bias, stride=2, padding=1)
        return x.flatten(1).T

    p, x = cfg.patch, []
    for top in range(0, image.shape[1], p):
        for left in range(0, image.shape[2], p):
            pixels = image[:, top:top + p, left:left + p]
            x.append((w["patch_embed.weight"] * pixels).sum((1, 2, 3)) + w["patch_embed.bias"])
    return torch.stack(x)


def ref_vit(w, image, cfg, hidden=(), mask_token=None):
    """Eq. 1, 3: (3, H, W) -> (P+1, D); hidden: the patches that are masked."""
    # what is hidden is black before any convolution, and the mask token behind it
    image, p = image.clone(), cfg.patch
    columns = image.shape[2] // p
    for n in hidden:
        top, left = n // columns * p, n % columns * p
        image[:, top:top + p, left:left + p] = 0
    x = list(ref_stem(w, image, cfg))
    for n in hidden:
        x[n] = mask_token[0, 0]
    x = torch.stack([w["cls_token"][0, 0], *x]) + w["pos_embed"][0]

    for n in range(depth(w)):
        block = inside(w, f"blocks.{n}")
        x = x + self_attention(block, norm(block, "attention_norm", x, 1e-6), cfg.heads)
        x = x + feed(block, norm(block, "mlp_norm", x, 1e-6), cfg.act)
    return norm(w, "norm", x, 1e-6)


def ref_bert_layer(w, x, cfg, context=None):
    """-> (S, D), weights of cross-attention (S, heads, L)."""
    weights = None
    x = norm(w, "attention_norm", x + self_attention(w, x, cfg.heads), 1e-12)
    if context is not None:
        change, weights = cross_attention(w, x, context, cfg.heads)
        x = norm(w, "cross_norm", x + change, 1e-12)
    return norm(w, "mlp_norm", x + feed(w, x, cfg.act), 1e-12), weights


def ref_bert(w, ids, cfg):
    """Eq. 1, 3: ids (T,) of a sentence -> (T, D)."""
    x = []
    for n, i in enumerate(ids.tolist()):
        x.append(w["embeddings.words.weight"][i] + w["embeddings.positions.weight"][n]
                 + w["embeddings.segments.weight"][0])
    x = norm(w, "embeddings.norm", torch.stack(x), 1e-12)
    for n in range(depth(w)):
        x, _ = ref_bert_layer(inside(w, f"blocks.{n}"), x, cfg)
    return x


def ref_head(w, x, context, cfg):
    """-> (S, D), weights (layers, S, heads, L)."""
    weights = []
    for n in range(cfg.head_layers):
        block = inside(w, f"blocks.{0 if cfg.head_shared else n}")
        x, found = ref_bert_layer(block, x, cfg, context)
        weights.append(found)
    return x, torch.stack(weights)


def ref_context(kind, complete, masked):
    """Section 3.2: [h_cls; h_1*, h_2*, ...]; section 3.1, vanilla: [h_cls, h_1, ...]."""
    return complete if kind == "vanilla" else torch.cat([complete[:1], masked[1:]])


def ref_word_loss(w, x, true, act="gelu"):
    """Eq. 5, one masked word: -log P(true) by BERT's head, its state x (D,)."""
    x = active(linear(w, "mlm_head.transform.0", x), act)
    x = norm(w, "mlm_head.transform.2", x, 1e-12)
    logits = w["text.embeddings.words.weight"] @ x + w["mlm_head.bias"]
    return logits.exp().sum().log() - logits[true]


def ref_pixel_losses(w, x, image, n, p):
    """Eq. 6, one masked patch n: |y - z| of its p * p * 3 values, its state x (D,)."""
    top, left = n // (image.shape[2] // p) * p, n % (image.shape[2] // p) * p
    true = [image[c, top + i, left + j] for i in range(p) for j in range(p) for c in range(3)]
    return (torch.stack(true) - linear(w, "mim_head", x)).abs()


def ref_sim(x, y):
    """Eq. 2."""
    return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())


def ref_contrast(kind, q, k, ids, queue, queue_ids, tau):
    """Eq. 9 or 10-11, row by row -> (R,)."""
    rows = []
    for query, key, own in zip(q, k, ids.tolist()):
        positive = (ref_sim(query, key) / tau).exp()
        others = [(ref_sim(query, other) / tau).exp()
                  for other, image in zip(queue, queue_ids.tolist()) if image != own]
        total = sum(others) + (positive if kind == "infonce" else 0)
        rows.append(-(positive / total).log() if others else torch.zeros_like(positive))
    return torch.stack(rows)


def contrast_data(r=5, d=6, q=13):
    """q, k, ids, queue, queue_ids: unit vectors in float64; some keys are of a row's own image."""
    x, k, queue = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1) for n in (r, r, q))
    queue_ids = torch.tensor([1, 0, -1, -1, 9, 3, 3, 1, -1, 5, 6, -1, 0])
    return x, k, torch.tensor([0, 1, 2, 3, 1]), queue, queue_ids


# --------------------------------------------------------------------------------------------------
# Equations

def test_conlip_eq1():
    model, batch = doubled(make_model(task="retrieval"), make_batch(small()))
    w, image, text = named(model), [], []
    for b in range(4):
        image.append(ref_vit(inside(w, "vision"), batch["image"][b], model.cfg))
        text.append(ref_bert(inside(w, "text"), real_words(batch, b), model.cfg))
    states = model.text(batch["text"], batch["text_mask"])
    close(model.vision(batch["image"]), torch.stack(image))
    for b in range(4):
        close(states[b, :len(text[b])], text[b])

    # float32 by design, of unit length, from the trained towers
    for encode, cls in ((model.encode_image, [x[0] for x in image]),
                        (model.encode_text, [x[0] for x in text])):
        close(encode(batch), torch.stack([x / (x * x).sum().sqrt() for x in cls]), 1e-6)


def test_conlip_eq2():
    """The cosine of the [CLS] states, and of nothing else."""
    x, y = torch.randn(4, 3, 5), torch.randn(4, 7, 5)
    sim = (conlip.unit_cls(x) * conlip.unit_cls(y)).sum(-1)
    close(sim, [ref_sim(a, b) for a, b in zip(x[:, 0], y[:, 0])], 1e-6)
    assert conlip.unit_cls(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_conlip_eq3_images(stem):
    """Masked and complete passes in one call are what they are alone, and what lies under a mask
    reaches no state."""
    model, batch = doubled(make_model(stem=stem, act="relu"), make_batch(small()))
    passes = model.image_passes(batch["image"])
    close(passes.complete, model.vision(batch["image"]))
    hidden = passes.places[1].tolist()
    masked = ref_vit(inside(named(model), "vision"), batch["image"][1], model.cfg, hidden,
                     model.mask_token)
    close(passes.masked[1], masked)

    # other pixels under the masks
    hidden = torch.zeros(4, 9, dtype=torch.bool).scatter(1, passes.places, True)
    other = batch["image"].clone()
    for b, n in hidden.nonzero().tolist():
        row, column = n // 3 * 8, n % 3 * 8
        other[b, :, row:row + 8, column:column + 8] = 9.0
    close(passes.masked, model.vision(other, hidden, model.mask_token), 0)
    assert not torch.equal(model.vision(other)[:, 1:], passes.complete[:, 1:])


def test_conlip_eq3_texts():
    """Masked words are words of the sentence, as many as stated."""
    model, batch = doubled(make_model(), make_batch(small()))
    text, text_mask = batch["text"], batch["text_mask"]
    passes = model.text_passes(text, text_mask)
    close(passes.complete, model.text(text, text_mask))
    for b in range(4):
        for place, word in zip(passes.places[b].tolist(), passes.labels[b].tolist()):
            assert word in (-100, text[b, place])
        words = text_mask[b].sum().item() - 2
        assert (passes.labels[b] != -100).sum() == max(1, round(0.15 * words))


def test_rates_of_masked_words():
    cfg = small(vocab_size=1000)
    text, maskable = torch.full((3000, 22), 900), torch.ones(3000, 22, dtype=torch.bool)
    text[:, 0], text[:, -1] = cfg.cls_id, cfg.sep_id
    maskable[:, 0], maskable[:, -1] = False, False
    masked, places, labels = conlip.mask_tokens(text, maskable, cfg.mask_id, cfg.first_word,
                                                cfg.vocab_size, 0.15)
    assert (labels == 900).sum() == 3 * 3000 and ((places > 0) & (places < 21)).all()

    # 80 % [MASK], 10 % as they were, 10 % any ordinary word
    shown = masked.gather(1, places)
    assert abs((shown == cfg.mask_id).double().mean() - 0.8) < 0.02
    assert abs((shown == 900).double().mean() - 0.1) < 0.02
    assert shown[shown != cfg.mask_id].min() >= cfg.first_word
    assert torch.equal(masked.scatter(1, places, 900), text)                 # the rest is untouched


@pytest.mark.parametrize("prob, unit, m", [(0.5, 1, 98), (0.5, 2, 4 * 24), (0.6, 1, 118),
                                           (0.6, 2, 4 * 29), (0.01, 1, 2)])
def test_rates_of_masked_patches(prob, unit, m):
    """Of 14 x 14 patches, in whole units, each as often as the others."""
    positions, hidden = conlip.mask_patches(500, 14, 14, prob, unit)
    assert positions.shape == (500, m) and (hidden.sum(1) == m).all()
    assert torch.equal(hidden, torch.zeros_like(hidden).scatter(1, positions, True))
    grid = hidden.view(500, 14 // unit, unit, 14 // unit, unit)
    assert (grid == grid[:, :, :1, :, :1]).all()
    assert abs(hidden.double().mean(0) - hidden.double().mean()).max() < 0.12


@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_conlip_eq5(kind):
    """The words under masks from [h_cls of the complete image; patches of the masked one],
    or from all of the complete one."""
    model, batch = doubled(make_model(mlm=kind, mim="none"), make_batch(small()))
    image = model.image_passes(batch["image"])
    text = model.text_passes(batch["text"], batch["text_mask"])
    loss = model.token_losses(batch, image, text)["mlm"]

    w, logs = named(model), []
    for b in range(4):
        masked = None if kind == "vanilla" else image.masked[b]
        seen = ref_context(kind, image.complete[b], masked)
        x, _ = ref_head(inside(w, "mlm_layers"), text.masked[b, :batch["text_mask"][b].sum()], seen,
                        model.cfg)
        for place, word in zip(text.places[b].tolist(), text.labels[b].tolist()):
            if word != -100:
                logs.append(ref_word_loss(w, x[place], word))
    close(loss, sum(logs) / len(logs), 1e-6)

    # nothing masked: 0, not NaN
    assert conlip.conmlm_loss(torch.randn(2, 3, 7), torch.full((2, 3), -100)) == 0


@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_conlip_eq6(kind):
    """The pixels under masks from [h_cls of the complete text; words of the masked text],
    or from all of the complete text."""
    model, batch = doubled(make_model(mlm="none", mim=kind), make_batch(small()))
    image = model.image_passes(batch["image"])
    text = model.text_passes(batch["text"], batch["text_mask"])
    loss = model.token_losses(batch, image, text)["mim"]

    w, found = named(model), []
    for b in range(4):
        real = batch["text_mask"][b].sum()
        masked = None if kind == "vanilla" else text.masked[b, :real]
        seen = ref_context(kind, text.complete[b, :real], masked)
        x, _ = ref_head(inside(w, "mim_layers"), image.masked[b], seen, model.cfg)
        for n in image.places[b].tolist():
            found.append(ref_pixel_losses(w, x[1 + n], batch["image"][b], n, 8))
    found = torch.cat(found)
    close(loss, found.mean(), 1e-6)
    assert len(found) == 4 * round(0.5 * 9) * 3 * 8 * 8


@pytest.mark.parametrize("mlm", KINDS)
@pytest.mark.parametrize("mim", KINDS)
def test_conlip_eq4(mlm, mim):
    """L = L_mim + L_mlm + L_i2t + L_t2i; every trained parameter has a gradient, momentum ones
    none."""
    model = make_model(mlm=mlm, mim=mim)
    out = model(make_batch(model.cfg))
    expected = {"i2t", "t2i"}
    expected |= {name for name, kind in (("mlm", mlm), ("mim", mim)) if kind != "none"}
    assert set(out["logs"]) == expected
    close(out["loss"], sum(out["logs"].values()), 1e-6)

    out["loss"].backward()
    for name, p in model.named_parameters():
        trained = not name.startswith(("vision_m.", "text_m."))
        assert p.requires_grad == trained, name
        assert (p.grad is not None and p.grad.abs().sum() > 0) == trained, name


@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_conlip_eq7(kind):
    """L_token = L_ConMIM + L_ConMLM, and con: of the complete input nothing but h_cls is seen.
    vanilla: all of it."""
    model = make_model(mlm=kind, mim=kind)
    batch = make_batch(model.cfg)
    image = model.image_passes(batch["image"])
    text = model.text_passes(batch["text"], batch["text_mask"])

    def losses(change=lambda x: x):
        return model.token_losses(batch, image._replace(complete=change(image.complete)),
                                  text._replace(complete=change(text.complete)))

    def other_states(x):
        return torch.cat([x[:, :1], torch.randn_like(x[:, 1:])], dim=1)

    def other_cls(x):
        return torch.cat([torch.randn_like(x[:, :1]), x[:, 1:]], dim=1)

    base, states, cls = losses(), losses(other_states), losses(other_cls)
    for name, tokens in (("mlm", image.complete), ("mim", text.complete)):
        assert torch.equal(base[name], states[name]) == (kind == "con")
        assert not torch.equal(base[name], cls[name])

        # h_cls learns from it: the paper's idea
        grad, = torch.autograd.grad(base[name], tokens, retain_graph=True)
        assert grad[:, 0].abs().sum(-1).min() > 0
        assert (grad[:, 1:].abs().sum() == 0) == (kind == "con")


def test_passes_of_a_step():
    """Complete and masked inputs of a modality in one call, keys in another; words and pixels are
    predicted at masked places only."""
    model, calls = make_model(), []

    def note(name):
        return lambda module, args, out: calls.append((name, *args[0].shape[:2]))

    for name in ("vision", "text", "vision_m", "text_m", "mlm_head", "mim_head"):
        getattr(model, name).register_forward_hook(note(name))
    model(make_batch(model.cfg))
    words, patches = round(0.15 * model.cfg.max_text), round(0.5 * 9)
    assert sorted(calls) == sorted([("vision", 8, 3), ("text", 8, 11), ("vision_m", 4, 3),
                                    ("text_m", 4, 11), ("mlm_head", 4, words),
                                    ("mim_head", 4, patches)])


def test_conlip_eq8():
    model, expected = make_model(momentum=0.9), {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, theta_m in before.items():
        if name.startswith(("vision_m.", "text_m.")):
            theta_o = before[name.replace("_m.", ".", 1)]
            expected[name] = 0.9 * theta_m + (1 - 0.9) * theta_o
    model.after_step(1, 10, 5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected.get(name, before[name]))
    assert len(expected) == sum(1 for name in before if name.startswith(("vision.", "text.")))


def test_momentum_towers_keep_up_with_batch_norm():
    """A teacher runs in evaluation mode, so its running statistics must come from the student."""
    model = make_model(task="retrieval", momentum=0.9)
    for tower in (model.vision, model.vision_m):
        tower.patch_embed = nn.Sequential(tower.patch_embed, nn.BatchNorm2d(24))
    model.train()
    batch = make_batch(model.cfg)
    for step in range(3):
        model(batch)
        model.after_step(step + 1, 3)
    ours, theirs = model.vision.patch_embed[1], model.vision_m.patch_embed[1]
    assert not torch.equal(ours.running_mean, torch.zeros(24)) and ours.num_batches_tracked == 3
    for name, value in ours.named_buffers():
        assert torch.equal(value, theirs.get_buffer(name)), name


def test_conlip_eq9():
    data = contrast_data()
    close(conlip.infonce_loss(*data, 0.05), ref_contrast("infonce", *data, 0.05))


def test_conlip_eq10():
    """Likewise; and the positive is not in the denominator: a negated one changes it alone."""
    q, k, *others = contrast_data()
    loss = conlip.dcl_loss(q, k, *others, 0.05)
    close(loss, ref_contrast("dcl", q, k, *others, 0.05))
    close(conlip.dcl_loss(q, -k, *others, 0.05) - loss, 2 * (q * k).sum(-1) / 0.05)


def test_conlip_eq11():
    """The same form with images as queries: symmetric in which modality asks."""
    model = make_model(mlm="none", mim="none")
    batch = make_batch(model.cfg)
    image, text, ids = model.encode_image(batch), model.encode_text(batch), batch["image_id"]
    loss = model.inst_losses(image, text, Keys(image, text, ids))["i2t"]
    rows = ref_contrast("dcl", image, text, ids, model.queue_text, model.queue_ids, 0.05)
    close(loss, rows.mean(), 1e-5)


@pytest.mark.parametrize("kind", ["dcl", "infonce"])
@pytest.mark.parametrize("positive", ["momentum", "online"])
def test_conlip_eq12(kind, positive):
    """L_inst = L_I2T + L_T2I: which key meets which query and which queue, values and gradients."""
    model = make_model(contrast=kind, positive=positive, mlm="none", mim="none")
    batch = make_batch(model.cfg, ids=[7, 7, 9, 10])
    model.queue_ids[:9] = torch.tensor([7, 9, 3, 4, 7, 10, 10, 10, 5])
    keys, ids = model.momentum_keys(batch), batch["image_id"]
    image = model.encode_image(batch).detach().requires_grad_()
    text = model.encode_text(batch).detach().requires_grad_()
    losses = model.inst_losses(image, text, keys)

    text_key, image_key = (text, image) if positive == "online" else (keys.text, keys.image)
    plain = 0
    for name, q, k, queue in (("i2t", image, text_key, model.queue_text),
                              ("t2i", text, image_key, model.queue_image)):
        rows = ref_contrast(kind, q, k, ids, queue, model.queue_ids, 0.05)
        close(losses[name], rows.mean(), 1e-5)
        plain = plain + rows.mean()
    close(model(batch)["loss"], losses["i2t"] + losses["t2i"], 1e-5)

    # the loops divide by lengths: their gradient has no part along the embedding
    found = torch.autograd.grad(sum(losses.values()), (image, text))
    for x, a, b in zip((image, text), found, torch.autograd.grad(plain, (image, text))):
        close(a - (a * x).sum(-1, keepdim=True) * x, b, 1e-5)


def log_sum_by_loops(q, ids, queue, queue_ids, tau):
    sums = []
    for row, own in zip(q.tolist(), ids.tolist()):
        scores = [sum(x * y for x, y in zip(row, key)) / tau
                  for key, of in zip(queue.tolist(), queue_ids.tolist()) if of != own]
        sums.append(math.log(sum(map(math.exp, scores))))
    return torch.tensor(sums, dtype=torch.float64)


def test_negatives_log_sum():
    q, _, ids, queue, queue_ids = contrast_data()
    close(negatives_log_sum(q, ids, queue, queue_ids, 0.05),
          log_sum_by_loops(q, ids, queue, queue_ids, 0.05))
    assert torch.autograd.gradcheck(
        lambda x: negatives_log_sum(x, ids, queue, queue_ids, 0.5), (q.requires_grad_(),))


@pytest.mark.parametrize("kind", ["dcl", "infonce"])
def test_a_row_without_negatives_has_loss_and_gradient_zero(kind):
    q, k, ids, queue, queue_ids = contrast_data()
    q.requires_grad_()
    loss = CONTRASTS[kind](q, k, ids, queue, torch.zeros_like(queue_ids), 0.05)
    grad, = torch.autograd.grad(loss.sum(), q)
    assert loss[0] == 0 and (grad[0] == 0).all()
    assert (loss[1:] != 0).all() and grad.isfinite().all()


def test_queue_scores_are_float32_under_autocast():
    """Forward and backward: sums of exponentials of scores over 0.05 need it."""
    q, _, ids, queue, queue_ids = (x.float() if x.is_floating_point() else x
                                   for x in contrast_data())
    q.requires_grad_()
    expected = negatives_log_sum(q, ids, queue, queue_ids, 0.05)
    grad, = torch.autograd.grad(expected.sum(), q)
    with torch.autocast("cpu", torch.bfloat16):
        found = negatives_log_sum(q, ids, queue, queue_ids, 0.05)
    grad_found, = torch.autograd.grad(found.sum(), q)       # train.py's backward is outside, too
    close(found, expected, 1e-5)
    close(grad_found, grad, 1e-5)


def test_token_losses_are_float32():
    logits, labels = torch.randn(2, 3, 7).bfloat16(), torch.randint(0, 7, (2, 3))
    y, z = torch.randn(2, 3, 12).bfloat16(), torch.randn(2, 3, 12).bfloat16()
    for loss, args in ((conlip.conmlm_loss, (logits, labels)), (conlip.conmim_loss, (y, z))):
        exact = [x.float() if x.is_floating_point() else x for x in args]
        assert loss(*args).dtype == torch.float32 and torch.equal(loss(*args), loss(*exact))


def test_one_pair_is_a_batch():
    """Negatives are the queue's, so that a batch of one trains."""
    model = make_model()
    batch = {name: x[3:] for name, x in make_batch(model.cfg).items()}
    out = model(batch)
    out["loss"].backward()
    model.after_backward(out)
    assert all(value.isfinite() and value != 0 for value in out["logs"].values())
    assert model.queue_ids[0] == 10 and model.ptr == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Under autocast every loss stays near its float32 value, and gradients are finite."""
    model, batch = make_model(), make_batch(small())
    torch.manual_seed(3)
    expected = model(batch)["logs"]
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        out = model(batch)
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32
    for name, value in expected.items():
        assert abs(out["logs"][name] - value) < 0.1 * abs(value), name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------
# A step by hand

def redraw(cfg, batch, images, texts):
    """The masks of a step, drawn once more from the same seed: patches first, then words.

    -> [the hidden patches of each image], [{place: (word shown, true word)} of each sentence];
    an empty list where that side is not masked.
    """
    b, t = batch["text"].shape
    side, unit, hidden, words = cfg.image_size // cfg.patch, cfg.mask_unit, [], []

    # units in a random order, and of each its patches
    if images:
        across = side // unit
        for row in torch.rand(b, across ** 2):
            patches = []
            for n in row.argsort(descending=True)[:round(cfg.mim_prob * across ** 2)].tolist():
                top, left = n // across * unit, n % across * unit
                patches += [(top + i) * side + left + j for i in range(unit) for j in range(unit)]
            hidden.append(patches)

    # words in a random order, and of each a die
    if texts:
        most = max(1, round(cfg.mlm_prob * t))
        order, dice = torch.rand(b, t), torch.rand(b, most)
        other = torch.randint(cfg.first_word, cfg.vocab_size, (b, most))
        for i in range(b):
            n = len(real_words(batch, i)) - 2
            places = sorted(range(1, n + 1), key=lambda place: -order[i, place])
            words.append({})
            for j, place in enumerate(places[:max(1, round(cfg.mlm_prob * n))]):
                true = batch["text"][i, place].item()
                shown = true if dice[i, j] >= 0.9 else other[i, j].item()
                words[i][place] = (cfg.mask_id if dice[i, j] < 0.8 else shown), true
    return hidden, words


def hand_losses(w, cfg, batch, kinds, hidden, words):
    """Eq. 1-12 of a batch from the weights w alone -> losses, momentum keys, terms of each loss."""
    mlm, mim = kinds
    cls = {side: [] for side in ("vision", "text", "vision_m", "text_m")}
    word_losses, pixel_losses = [], []
    for b, image in enumerate(batch["image"]):
        # complete inputs, in the trained and in the momentum towers
        ids = real_words(batch, b)
        states = ref_vit(inside(w, "vision"), image, cfg)
        words_states = ref_bert(inside(w, "text"), ids, cfg)
        cls["vision"].append(states[0])
        cls["text"].append(words_states[0])
        cls["vision_m"].append(ref_vit(inside(w, "vision_m"), image, cfg)[0])
        cls["text_m"].append(ref_bert(inside(w, "text_m"), ids, cfg)[0])

        # masked inputs
        masked = masked_words = None
        if hidden:
            masked = ref_vit(inside(w, "vision"), image, cfg, hidden[b], w["mask_token"])
        if words:
            shown = ids.clone()
            for place, (word, _) in words[b].items():
                shown[place] = word
            masked_words = ref_bert(inside(w, "text"), shown, cfg)

        # the heads
        if mlm != "none":
            seen = ref_context(mlm, states, masked)
            x, _ = ref_head(inside(w, "mlm_layers"), masked_words, seen, cfg)
            for place, (_, true) in words[b].items():
                word_losses.append(ref_word_loss(w, x[place], true, cfg.act))
        if mim != "none":
            seen = ref_context(mim, words_states, masked_words)
            x, _ = ref_head(inside(w, "mim_layers"), masked, seen, cfg)
            for n in hidden[b]:
                pixel_losses.append(ref_pixel_losses(w, x[1 + n], image, n, cfg.patch))

    # the contrasts: an image asks among texts, a text among images
    key = "_m" if cfg.positive == "momentum" else ""
    terms = {}
    for name, q, k, queue in (("i2t", "vision", "text", "queue_text"),
                              ("t2i", "text", "vision", "queue_image")):
        terms[name] = ref_contrast(cfg.contrast, cls[q], cls[k + key], batch["image_id"], w[queue],
                                   w["queue_ids"], cfg.temp)
    if mlm != "none":
        terms["mlm"] = torch.stack(word_losses)
    if mim != "none":
        terms["mim"] = torch.cat(pixel_losses)
    keys = [torch.stack(x) / torch.stack(x).norm(dim=-1, keepdim=True)
            for x in (cls["vision_m"], cls["text_m"])]
    return {name: x.mean() for name, x in terms.items()}, keys, terms


# No number is at its default, in none of the rows.
HAND = dict(temp=0.3, momentum=0.9, mlm_prob=0.45, mim_prob=0.35, queue_size=11)
STEPS = {
    "con": dict(),
    "conv stem": dict(stem="conv", act="relu"),
    "vanilla, online": dict(mlm="vanilla", mim="vanilla", positive="online", contrast="infonce",
                            head_layers=2, head_shared=True),
    "words": dict(mim="none", head_layers=2, contrast="infonce"),
    "patches in units": dict(mlm="none", image_size=32, mask_unit=2, positive="online"),
    "vanilla words": dict(mlm="vanilla", mim="none"),
    "vanilla patches": dict(mlm="none", mim="vanilla"),
    "retrieval": dict(task="retrieval"),
}


@pytest.mark.parametrize("row", STEPS)
def test_a_step_by_hand(row):
    """Losses, all gradients, what is enqueued and what the momentum towers become."""
    over = dict(STEPS[row])
    task = over.pop("task", "pretrain")
    model = make_model(task, **HAND, **over)
    batch = make_batch(model.cfg, b=5, ids=[7, 7, 9, 10, 12])
    model, batch = doubled(model, batch)

    # the queues stay float32; some of their keys are of the batch's own images, one wraps around
    for name in ("queue_image", "queue_text"):
        setattr(model, name, getattr(model, name).float())
    model.queue_ids.copy_(torch.tensor([7, -1, 10, 7, 3, -1, 9, 12, 4, 4, -1]))
    model.ptr.fill_(8)
    w = {name: t.detach().clone().double() if t.is_floating_point() else t.clone()
         for name, t in named(model).items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in trained:
        w[name].requires_grad_()

    # masks of which every kind is there: [MASK], another word, the word itself
    cfg, kinds = model.cfg, (model.mlm, model.mim)
    for seed in range(100):
        torch.manual_seed(seed)
        hidden, words = redraw(cfg, batch, kinds[1] != "none" or kinds[0] == "con",
                               kinds[0] != "none" or kinds[1] == "con")
        shown = [pair for sentence in words for pair in sentence.values()]
        found = {"[MASK]" if a == cfg.mask_id else a == b for a, b in shown}
        if len(found) == 3 or not words:
            break

    # the model's step
    torch.manual_seed(seed)
    out = model(batch)
    out["loss"].backward()
    model.after_backward(out)

    # ours; every loss is alive
    losses, keys, terms = hand_losses(w, cfg, batch, kinds, hidden, words)
    loss = sum(losses.values())
    loss.backward()
    assert all((x != 0).sum() == len(x) > 4 for x in terms.values())
    assert not words or len(found) == 3

    # values and gradients
    assert set(out["logs"]) == set(losses)
    for name, value in losses.items():
        close(out["logs"][name], value, 1e-5)
    close(out["loss"], loss, 1e-5)
    for name in trained:
        torch.testing.assert_close(model.get_parameter(name).grad, w[name].grad, rtol=1e-4,
                                   atol=1e-6, msg=lambda text: f"{row}, {name}: {text}")

    # the queues took in the momentum keys, from place 8 on
    for name, new in zip(("queue_image", "queue_text"), keys):
        expected = w[name].clone()
        for i, place in enumerate((8, 9, 10, 0, 1)):
            expected[place] = new[i]
        close(getattr(model, name), expected, 1e-6)
    assert model.queue_ids.tolist() == [10, 12, 10, 7, 3, -1, 9, 12, 7, 7, 9] and model.ptr == 2

    # an optimizer's step, then Eq. 8
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).sub_(0.3 * w[name].grad)
    model.after_step(1, 10)
    for name, p in model.named_parameters():
        if name.startswith(("vision_m.", "text_m.")):
            student = w[name.replace("_m.", ".", 1)]
            close(p, 0.9 * w[name] + 0.1 * (student - 0.3 * student.grad), 1e-6)


def test_pictures_that_are_no_squares():
    """Rows and columns are not mixed up: 16 x 40 pixels are 2 x 5 patches."""
    model, batch = doubled(make_model(mask_unit=1), make_batch(small()))
    image = torch.randn(4, 3, 16, 40, dtype=torch.float64)
    passes = model.image_passes(image)
    assert passes.places.shape == (4, 5) and passes.places.max() == 9
    w = inside(named(model), "vision")
    w = w | {"pos_embed": conlip.resize_pos_embed(model.vision.pos_embed, 2, 5)}
    for b in range(4):
        hidden = passes.places[b].tolist()
        close(passes.masked[b], ref_vit(w, image[b], model.cfg, hidden, model.mask_token))
    for n, pixels in enumerate(conlip.patchify(image, 8)[1]):
        top, left = n // 5 * 8, n % 5 * 8
        close(pixels, image[1, :, top:top + 8, left:left + 8].permute(1, 2, 0).flatten())


# --------------------------------------------------------------------------------------------------
# Every setting matters

# A field of Config, another legal value (in comparison with small() and `given`), and the first
# thing that changes: the names of weights whose shapes do, the start of weights, the losses, the
# gradients, the momentum towers; or nothing here, for fields that the tests behind look at.
BLOCKS = ("vision.blocks", "text.blocks", "mlm_layers.blocks", "mim_layers.blocks")
SETTINGS = [
    ("image_size", 48, ("vision.pos_embed",), {}),
    ("patch", 12, ("vision.pos_embed", "vision.patch_embed", "mim_head"), {}),
    ("stem", "conv", ("vision.patch_embed",), {}),
    ("width", 30, ("vision.", "text.", "mlm_", "mim_", "mask_token", "queue_"), {}),
    ("vision_layers", 3, ("vision.blocks.2",), {}),
    ("text_layers", 2, ("text.blocks.1",), {}),
    ("heads", 4, "losses", {}),
    ("mlp_ratio", 3, BLOCKS, {}),
    ("act", "relu", "losses", {}),
    ("dropout", 0.1, "losses", {}),
    ("max_text", 9, "nothing", {}),             # test_max_text_is_the_width_of_a_batch
    ("positions", 16, ("text.embeddings.positions",), {}),
    ("vocab_size", 60, ("text.embeddings.words", "mlm_head.bias"), {}),
    ("pad_id", 9, "gradients", {}),
    ("cls_id", 9, "losses", {}),
    ("sep_id", 9, "losses", {}),
    ("mask_id", 5, "losses", {}),
    ("first_word", 30, "losses", {"mlm_prob": 1.0}),
    ("queue_size", 25, ("queue_",), {}),
    ("momentum", 0.9, "teachers", {}),
    ("temp", 0.1, "losses", {}),
    ("contrast", "infonce", "losses", {"temp": 0.5}),
    ("positive", "online", "losses", {}),
    ("mlm", "vanilla", "losses", {}),
    ("mlm", "none", ("mlm_",), {}),
    ("mim", "vanilla", "losses", {}),
    ("mim", "none", ("mim_",), {}),
    ("mlm_prob", 0.4, "losses", {}),
    ("mim_prob", 0.7, "losses", {}),
    ("mask_unit", 2, "losses", {"image_size": 32}),
    ("head_layers", 2, ("mlm_layers.blocks.1", "mim_layers.blocks.1"), {}),
    ("head_shared", True, ("mlm_layers.blocks.1", "mim_layers.blocks.1"), {"head_layers": 2}),
    ("init_std", 0.08, "start", {}),
    ("pos_std", 0.5, "start", {}),
    ("checkpointing", True, "nothing", {}),     # test_checkpointing_is_memory_alone
]


def a_step(**settings):
    """What a step of pre-training makes of the same seeds -> {what: {name: tensor}}."""
    cfg = small(**settings)
    torch.manual_seed(0)
    model = ConLIP(cfg).train()
    seen = {"shapes": {}, "start": {name: t.clone() for name, t in model.state_dict().items()}}
    for name, t in seen["start"].items():
        seen["shapes"][name] = torch.tensor(t.shape)

    # momentum towers become unlike their students; ids are small()'s, whatever the settings say
    torch.manual_seed(1)
    shake(model)
    batch = make_batch(small(image_size=cfg.image_size))
    batch["text"][0, 1] = batch["text"][1, 1] = 9
    torch.manual_seed(2)
    out = model(batch)
    out["loss"].backward()
    seen["losses"] = out["logs"]
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    seen["gradients"] = {name: p.grad.clone() for name, p in trained.items()}
    with torch.no_grad():
        for p in trained.values():
            p.sub_(0.1 * p.grad)
    model.after_step(1, 10)
    seen["teachers"] = {name: t for name, t in model.state_dict().items() if "_m." in name}
    return seen


def different(a, b):
    """The names at which two dicts of tensors differ by more than rounding."""
    return {name for name in set(a) | set(b)
            if name not in a or name not in b or a[name].shape != b[name].shape
            or not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6)}


def test_the_table_of_settings_is_whole():
    assert {row[0] for row in SETTINGS} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field, value, what, given", SETTINGS)
def test_every_setting_matters(field, value, what, given):
    base, other = a_step(**given), a_step(**given, **{field: value})
    changed = {name: different(base[name], other[name]) for name in base}
    if isinstance(what, tuple):
        names = {name.replace("_m.", ".") for name in changed["shapes"]}
        assert all(name.startswith(what) for name in names)
        assert all(any(name.startswith(part) for name in names) for part in what)
        return

    # the first of them, and nothing before
    first = next((name for name in changed if changed[name]), "nothing")
    assert first == what
    if field == "pos_std":
        assert {name.replace("_m.", ".") for name in changed["start"]} == {
            "vision.pos_embed", "vision.cls_token"}


def saved_bytes(model, batch):
    """A step -> the shapes of what autograd keeps for backward, the bytes, losses, gradients."""
    kept = {}

    def note(t):
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        torch.manual_seed(4)
        out = model(batch)
        shapes = {tuple(t.shape) for t in kept.values()}
        total = sum(t.numel() * t.element_size() for t in kept.values())
    out["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return shapes, total, out["logs"], grads


def test_checkpointing_is_memory_alone():
    """Less is kept for backward; losses, gradients, masks and dropout are the same."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(checkpointing=checkpointing, dropout=0.3)
        found.append(saved_bytes(model, make_batch(model.cfg)))
    (_, much, logs, grads), (_, little, logs_again, grads_again) = found
    assert little < 0.75 * much
    assert not different(logs, logs_again) and not different(grads, grads_again)


def test_max_text_is_the_width_of_a_batch(photos, tmp_path, monkeypatch):
    widths, loss = [], ConLIP.loss_pretrain

    def noted(model, batch):
        widths.append(batch["text"].shape[1])
        return loss(model, batch)

    monkeypatch.setattr(ConLIP, "loss_pretrain", noted)
    train.main([*SMALL, *photos, "--max_text", "6", "--steps", "1", "--evals", "none",
                "--out", str(tmp_path)])
    assert widths == [6]


# --------------------------------------------------------------------------------------------------
# Dropout

def runs_differ(part, *inputs):
    torch.manual_seed(0)
    return not torch.equal(part(*inputs), part(*inputs))


def test_dropout_is_where_bert_has_it():
    """On embeddings, on attention probabilities and on what each part of a layer puts out; in the
    text tower and in the heads, in training alone."""
    model = ConLIP(small(dropout=0.4)).train()
    batch, x = make_batch(model.cfg), torch.randn(2, 5, 24)
    embeddings = model.text.embeddings
    blocks = [model.text.blocks[0], model.mlm_layers.blocks[0], model.mim_layers.blocks[0]]
    for training in (True, False):
        model.train(training)
        assert runs_differ(embeddings, batch["text"]) == training
        for block in blocks:
            assert block.drop.p == block.attention.dropout == 0.4
            assert runs_differ(block.attention, x) == training
            assert runs_differ(block.feed, x) == training
            if hasattr(block, "cross"):
                assert block.cross.dropout == 0.4
                context = block.cross.context(x)
                assert runs_differ(block.cross, x, context) == training

        # the ViT has none, nor have teachers
        assert not runs_differ(model.vision, batch["image"])
        assert not runs_differ(model.text_m, batch["text"], batch["text_mask"])
        assert runs_differ(model.encode_text, batch) == training
    assert embeddings.drop.p == 0.4

    # what self-attention and cross-attention put out, where probabilities stay whole
    model.train()
    for block in blocks:
        block.attention.dropout = 0.0
        assert runs_differ(block.self_attend, x)
        if hasattr(block, "cross"):
            block.cross.dropout = 0.0
            context = block.cross.context(x)
            assert runs_differ(block.cross_attend, x, context)


# --------------------------------------------------------------------------------------------------
# How weights start

def test_how_weights_start():
    """init_std for matrices, zero for biases; the image tower as init_vit() says; the pixel head
    and the mask token small: at tiny's 0.08 ConMIM ended in one guess for all patches."""
    model = ConLIP(small(image_size=96, width=96, stem="conv", init_std=0.08, pos_std=0.5))
    state, towers = model.state_dict(), ("vision_m.", "text_m.")
    stds = [(r"vision\.(pos_embed|cls_token)", 0.5), (r"vision\.blocks\.\d\.attention\.out", 0.02),
            (r"vision\.blocks\.\d\.mlp\.2", 0.02), (r"mim_head|mask_token", 0.02),
            (r"vision\.patch_embed\.0", math.sqrt(2 / (3 * 2 * 2))),
            (r"vision\.patch_embed\.[24]", math.sqrt(2 / (48 * 3 * 3))), (r"", 0.08)]
    for name, t in state.items():
        if name.startswith(("queue_", "ptr", *towers)):
            continue
        if "norm" in name or "transform.2" in name:
            assert torch.equal(t, torch.ones_like(t) * name.endswith("weight")), name
        elif name.endswith("bias"):
            assert (t == 0).all(), name
        else:
            expected = next(std for pattern, std in stds if re.match(pattern, name))
            assert abs(t.std() / expected - 1) < (0.3 if t.numel() < 300 else 0.1), name

    # momentum towers are copies
    for name, t in state.items():
        if name.startswith(towers):
            assert torch.equal(t, state[name.replace("_m.", ".", 1)]), name


# --------------------------------------------------------------------------------------------------
# Memory

def test_queue_is_a_ring():
    model = make_model(queue_size=10)
    kept, ptr = [(None, -1)] * 10, 0
    for step in range(7):
        keys, ids = torch.randn(4, 24), torch.arange(4) + 4 * step
        model.after_backward({"keys": Keys(keys, 2 * keys, ids)})
        for key, i in zip(keys, ids.tolist()):
            kept[ptr % 10] = key, i
            ptr += 1
        assert model.queue_ids.tolist() == [i for _, i in kept] and model.ptr == ptr % 10
        for n, (key, i) in enumerate(kept):
            assert i < 0 or torch.equal(model.queue_image[n], key)
            assert i < 0 or torch.equal(model.queue_text[n], 2 * key)

    # of more keys than places, the last
    many = torch.arange(12.0)[:, None].expand(12, 24)
    conlip.enqueue_(model.queue_text, model.queue_ids, model.ptr, many, torch.arange(12))
    assert set(model.queue_ids.tolist()) == set(range(2, 12))


def test_queues_start_with_unit_vectors_of_no_image():
    model = ConLIP(small())
    for queue in (model.queue_image, model.queue_text):
        close(queue.norm(dim=-1), torch.ones(21), 1e-5)
    assert not torch.equal(model.queue_image, model.queue_text)
    assert (model.queue_ids == -1).all() and model.ptr == 0


def test_keys_of_this_step_are_no_negatives():
    """The queue takes them in after backward; evaluation enqueues nothing."""
    model = make_model()
    batch, before = make_batch(model.cfg), model.queue_image.clone()
    out = model(batch)
    assert torch.equal(model.queue_image, before)
    out["loss"].backward()
    model.after_backward(out)
    keys = model.momentum_keys(batch)
    assert torch.equal(model.queue_image[:4], keys.image)
    assert torch.equal(model.queue_text[:4], keys.text)
    assert model.queue_ids[:4].tolist() == [7, 8, 9, 10]

    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    for ask in (model.encode_image, model.encode_text, model.cross_attention):
        ask(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_teachers_have_no_dropout():
    model = make_model(dropout=0.5).train()
    batch = make_batch(model.cfg)
    one, two = model.momentum_keys(batch), model.momentum_keys(batch)
    assert torch.equal(one.image, two.image) and torch.equal(one.text, two.text)
    assert not torch.equal(model.encode_text(batch), model.encode_text(batch))


# --------------------------------------------------------------------------------------------------
# Heads, tasks, weights

def test_head_layers():
    """Table 4: one layer, three, two that share their parameters."""
    def count(**over):
        return sum(p.numel() for p in make_model(**over).mlm_layers.parameters())

    assert count(head_layers=3) == 3 * count()
    assert count(head_layers=2, head_shared=True) == count()

    model = make_model(head_layers=2, head_shared=True).double()
    x, context = torch.randn(2, 5, 24).double(), torch.randn(2, 4, 24).double()
    at = torch.tensor([[3, 0], [1, 4]])
    out = model.mlm_layers(x, context, at=at)
    for b in range(2):
        y, _ = ref_head(inside(named(model), "mlm_layers"), x[b], context[b], model.cfg)
        close(out[b], y[at[b]], 1e-6)


@pytest.mark.parametrize("task", conlip.TASKS)
def test_protocol(task):
    model = make_model(task)
    batch = make_batch(model.cfg)
    out = model(batch)
    out["loss"].backward()
    assert out["loss"].ndim == 0
    assert all(v.ndim == 0 and not v.requires_grad for v in out["logs"].values())
    assert not any(key.requires_grad for key in out["keys"])
    for emb in (model.encode_image(batch), model.encode_text(batch)):
        close(emb.norm(dim=-1), torch.ones(4), 1e-5)
    offered = evaluation.offered(model, task)
    assert {"retrieval", "gallery", "speed"} <= set(offered)
    assert ("cross_attention" in offered) == (task == "pretrain")


def test_a_model_without_heads_offers_no_cross_attention():
    assert make_model(mlm="none", mim="none").offers == {"encode_image", "encode_text"}


@pytest.mark.parametrize("setting, words", [
    (dict(mlm="nope"), "--mlm nope: not one of con, vanilla, none"),
    (dict(mim="nope"), "--mim nope"), (dict(contrast="nope"), "--contrast nope"),
    (dict(positive="nope"), "--positive nope"), (dict(mask_unit=2), "multiple"),
    (dict(queue_size=0), "--queue_size 0: from 1 to"),
])
def test_bad_settings_are_one_line(setting, words):
    with pytest.raises(SystemExit, match=words):
        ConLIP(small(**setting))


# Every number of Config, and where it comes from.
CONFIG = {
    "image_size": (224, "Table 6, PT"),
    "patch": (16, "4.1: ViT-B/16"),
    "stem": ("patch", "4.1: ViT-B/16"),
    "width": (768, "4.1: ViT-B and BERT-base; 3.1: the [CLS] states themselves are compared"),
    "vision_layers": (12, "4.1: ViT-B"),
    "text_layers": (12, "4.1: BERT-base"),
    "heads": (12, "4.1: ViT-B and BERT-base"),
    "mlp_ratio": (4, "4.1: ViT-B and BERT-base"),
    "act": ("gelu", "4.1: ViT-B and BERT-base"),
    "dropout": (0.1, "Table 6"),
    "max_text": (50, "Table 6"),
    "positions": (512, "4.1: bert-base-uncased"),
    "vocab_size": (30522, "4.1: bert-base-uncased"),
    "pad_id": (0, "4.1: bert-base-uncased"),
    "cls_id": (101, "4.1: bert-base-uncased"),
    "sep_id": (102, "4.1: bert-base-uncased"),
    "mask_id": (103, "4.1: bert-base-uncased"),
    "first_word": (999, "4.1: bert-base-uncased, [unused*] and special tokens before it"),
    "queue_size": (12288, "Table 6"),
    "momentum": (0.99, "Table 6"),
    "temp": (0.05, "Table 6"),
    "contrast": ("dcl", "Eq. 10-12"),
    "positive": ("momentum", "MoCo, which 3.3 follows; Deviation 3"),
    "mlm": ("con", "Eq. 5"),
    "mim": ("con", "Eq. 6"),
    "mlm_prob": (0.15, "4.1"),
    "mim_prob": (0.5, "4.1"),
    "mask_unit": (1, "ours: Deviation 5"),
    "head_layers": (1, "3.1 and Table 4"),
    "head_shared": (False, "Table 4"),
    "init_std": (0.02, "BERT's and ViT's code"),
    "pos_std": (0.02, "ViT's code, as timm has it"),
    "checkpointing": (False, "ours: memory alone"),
}
# Every number of RECIPE, the same for both tasks: Table 6 says "Pretraining & Fine-tuning".
LOOP = {
    "optimizer": ("adamw", "4.1"),
    "lr": (5e-5, "Table 6"),
    "weight_decay": (0.01, "Table 6"),
    "schedule": ("linear", "Table 6"),
    "warmup_steps": (0.1, "Table 6: 10 % of all steps"),
    "epochs": (30, "Table 6"),
    "batch_size": (4096, "Table 6"),
    "amp": ("fp16", "4.1"),
}
# What fine-tuning has beside: the image size of its own, and what its epochs go over.
FINE_TUNING = {
    "image_size": (336, "Table 6, FT"),
    "epoch_of": ("captions", "[?], Deviation 9: 4.1 counts image-text pairs"),
}
# What the paper says nothing about: train.py's, which are AdamW's own and none.
SILENT = {"beta2": 0.999, "clip": 0.0, "min_lr": 0.0, "warmup_lr": 0.0, "steps": 0, "accum": 1,
          "image_view": "", "limit": 0}


def test_the_recipe_is_the_papers():
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert defaults == {name: value for name, (value, _) in CONFIG.items()}
    assert conlip.PRESETS["base"] == {}

    # Table 6 has one column for both, and the image size of each
    numbers = {name: value for name, (value, _) in LOOP.items()}
    more = {name: value for name, (value, _) in FINE_TUNING.items()}
    assert conlip.RECIPE == {"pretrain": numbers, "retrieval": numbers | more}
    for task, size, unit in (("pretrain", 224, "images"), ("retrieval", 336, "captions")):
        loop, cfg = train.settings(conlip, "base", task, {})
        assert loop.epoch_of == unit
        found = {name: getattr(loop, name) for name in numbers | SILENT}
        assert found == numbers | SILENT
        assert vars(cfg) == defaults | {"image_size": size}

    # section 4.1: "resized into the size of 224x224 with center-crop", nothing else; "half" is
    # the range [-1, 1] of google/vit-base-patch16-224-in21k
    view = dict(source="pairs", image="center", image_eval="center", norm="half", text="caption")
    assert conlip.VIEWS == {"pretrain": view, "retrieval": view}

    # Table 7 less the poolers
    with torch.device("meta"):
        towers = conlip.MaskedViT(Config()), conlip.Bert(Config())
    millions = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in towers]
    assert [round(m, 1) for m in millions] == [85.8, 108.9]


def test_weight_decay_is_for_matrices():
    """train.py's default: the model asks for no other."""
    model = make_model()
    assert not hasattr(model, "param_groups")
    groups = train.decay_matrices(model, train.Loop(lr=0.1, weight_decay=0.2))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert all(p.ndim <= 1 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


def test_heads_are_dropped_and_sizes_adapt():
    """Fine-tuning at 48 pixels from pre-training at 24: positions interpolated, queues anew, heads
    gone."""
    first = make_model()
    model = ConLIP(small(image_size=48), "retrieval")
    heads = ("mlm_layers", "mlm_head", "mim_layers", "mim_head", "mask_token")
    assert not any(k.startswith(heads) for k in model.state_dict())

    missing, extra = model.load_state_dict(model.adapt(first.state_dict()), strict=False)
    assert set(missing) == {"queue_image", "queue_text", "queue_ids", "ptr"}
    assert {k.split(".")[0] for k in extra} == set(heads)
    ours, theirs = model.vision.pos_embed, first.vision.pos_embed
    assert ours.shape == (1, 37, 24) and torch.equal(ours[:, 0], theirs[:, 0])
    assert model.vision(torch.randn(1, 3, 48, 48)).isfinite().all()


# --------------------------------------------------------------------------------------------------
# Foreign weights

def foreign(model):
    """The model's towers under timm's and Hugging Face's names, with tensors nobody needs."""
    vit = {"head.weight": torch.zeros(2, 2)}
    parts = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "attention_norm": "norm1",
             "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "mlp_norm": "norm2",
             "patch_embed": "patch_embed.proj"}
    for name, tensor in model.vision.state_dict().items():
        for ours, theirs in parts.items():
            name = name.replace(ours + ".", theirs + ".")
        vit[name] = tensor.clone()

    bert = {"cls.predictions.bias": torch.zeros(2), "bert.pooler.dense.bias": torch.zeros(2)}
    parts = {"blocks": "encoder.layer", "words": "word_embeddings",
             "positions": "position_embeddings", "segments": "token_type_embeddings",
             "embeddings.norm": "embeddings.LayerNorm", "attention.out": "attention.output.dense",
             "attention_norm": "attention.output.LayerNorm", "mlp.0": "intermediate.dense",
             "mlp.2": "output.dense", "mlp_norm": "output.LayerNorm"}
    for name, tensor in model.text.state_dict().items():
        for ours, theirs in parts.items():
            name = name.replace(ours + ".", theirs + ".")
        if "attention.qkv" not in name:
            bert["bert." + name] = tensor.clone()
            continue
        for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
            bert["bert." + name.replace("attention.qkv", f"attention.self.{part}")] = rows.clone()
    return vit, bert


def test_load_pretrained():
    source, model = make_model("retrieval"), make_model("retrieval")
    vit, bert = foreign(source)
    model.queue_ids.fill_(5), model.ptr.fill_(3)
    conlip.load_pretrained(model, vision=vit, text=bert)
    batch = make_batch(model.cfg)
    for encode in ("encode_image", "encode_text"):
        assert torch.equal(getattr(model, encode)(batch), getattr(source, encode)(batch))

    # momentum towers are copies, queues start anew
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith(("vision.", "text.")):
            assert torch.equal(state[name.replace(".", "_m.", 1)], tensor)
    assert (model.queue_ids == -1).all() and model.ptr == 0
    close(model.queue_text.norm(dim=-1), torch.ones(21), 1e-5)


def test_heads_start_at_random():
    """Section 4.1; and a side that is not given stays as it is."""
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    conlip.load_pretrained(model, text=foreign(make_model("retrieval"))[1])
    for name, tensor in model.state_dict().items():
        if name.startswith(("mlm_", "mim_", "vision.")):
            assert torch.equal(tensor, before[name]), name
    assert conlip.foreign_names(model, "text")[1] == {}


def test_position_embeddings_follow_the_image_size():
    source, bigger = make_model("retrieval"), ConLIP(small(image_size=48), "retrieval")
    conlip.load_pretrained(bigger, vision=foreign(source)[0])
    expected = conlip.resize_pos_embed(source.vision.pos_embed, 6, 6)
    assert torch.equal(bigger.vision.pos_embed, expected)
    assert torch.equal(bigger.vision_m.pos_embed, expected)


@pytest.mark.parametrize("side, name", [
    (0, "norm.bias"), (0, "blocks.1.attn.qkv.bias"),
    (1, "encoder.layer.0.attention.self.key.bias"), (1, "embeddings.LayerNorm.weight"),
])
def test_a_missing_tensor_is_named_and_nothing_changes(side, name):
    model, states = make_model("retrieval"), foreign(make_model("retrieval"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del states[side]["bert." * side + name]
    with pytest.raises(KeyError, match=name):
        conlip.load_pretrained(model, vision=states[0], text=states[1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("side, sizes", [("vision", dict(stem="conv")), ("text", dict(act="relu"))])
def test_towers_without_a_counterpart_are_one_line(side, sizes):
    with pytest.raises(SystemExit, match=f"{side}: .*need --stem patch --act gelu") as error:
        conlip.load_pretrained(make_model("retrieval", **sizes), **{side: {}})
    assert "\n" not in str(error.value)


@pytest.mark.needs("transformers")
@torch.no_grad()
def test_text_tower_is_transformers_bert():
    from transformers import BertConfig, BertModel
    cfg = small(text_layers=3)
    theirs = BertModel(BertConfig(vocab_size=57, hidden_size=24, num_hidden_layers=3,
                                  num_attention_heads=3, intermediate_size=48,
                                  max_position_embeddings=14))
    shake(theirs).eval()
    model, batch = ConLIP(cfg, "retrieval").eval(), make_batch(cfg)
    conlip.load_pretrained(model, text=theirs.state_dict())

    expected = theirs(batch["text"], batch["text_mask"]).last_hidden_state
    difference = (model.text(batch["text"], batch["text_mask"]) - expected).abs()
    difference = difference[batch["text_mask"].bool()].max().item()
    print(f"text tower - transformers.BertModel: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.needs("timm")
@torch.no_grad()
def test_image_tower_is_timms_vit():
    import timm
    cfg = small(vision_layers=3)
    theirs = timm.create_model("vit_base_patch16_224", img_size=24, patch_size=8, embed_dim=24,
                               depth=3, num_heads=3, mlp_ratio=2, num_classes=0)
    shake(theirs).eval()
    model, batch = ConLIP(cfg, "retrieval").eval(), make_batch(cfg)
    conlip.load_pretrained(model, vision=theirs.state_dict())

    expected = theirs.forward_features(batch["image"])
    difference = (model.vision(batch["image"]) - expected).abs().max().item()
    print(f"image tower - timm: {difference:.1e}")
    assert difference < 1e-5


# --------------------------------------------------------------------------------------------------
# Table 2

@torch.no_grad()
@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_cross_attention(kind):
    """The heads' attention to h_cls, token by token, against the loops: the mean over two layers
    and three attention heads."""
    model = make_model(mlm=kind, mim=kind, head_layers=2).eval()
    model, batch = doubled(model, make_batch(small()))
    torch.manual_seed(5)
    found = model.cross_attention(batch)
    torch.manual_seed(5)
    image = model.image_passes(batch["image"])
    text = model.text_passes(batch["text"], batch["text_mask"])
    scores, words, uniform = found["text -> h_cls of the image"]
    scores_i, patches, uniform_i = found["image patches -> h_cls of the text"]

    # words are all but [CLS], [SEP] and padding
    lengths = batch["text_mask"].sum(1)
    for b, length in enumerate(lengths.tolist()):
        assert words[b].nonzero()[:, 0].tolist() == list(range(1, length - 1))
    assert patches.shape == (4, 9) and patches.all()
    close(uniform, torch.full((4,), 1 / 10), 1e-6)
    close(uniform_i, 1 / lengths, 1e-6)

    w = named(model)
    for b, n in enumerate(lengths.tolist()):
        text_masked = text.masked[b, :n]
        _, weights = ref_head(inside(w, "mlm_layers"), text_masked,
                              ref_context(kind, image.complete[b], image.masked[b]), model.cfg)
        expected = weights[..., 0].mean((0, 2))              # (layers, S, heads, L) -> (S,)
        close(scores[b, 1:n - 1], expected[1:n - 1], 1e-6)

        _, weights = ref_head(inside(w, "mim_layers"), image.masked[b],
                              ref_context(kind, text.complete[b, :n], text_masked), model.cfg)
        close(scores_i[b], weights[..., 0].mean((0, 2))[1:], 1e-6)

    masked = found["masked patches -> h_cls of the text"][1]
    assert torch.equal(masked.nonzero()[:, 1].view(4, -1), image.places.sort().values)
    masked = found["masked words -> h_cls of the image"][1]
    for b in range(4):
        assert set(masked[b].nonzero()[:, 0].tolist()) == {
            place for place, word in zip(text.places[b].tolist(), text.labels[b].tolist())
            if word != -100}

    # a side without a head is not told of
    model = make_model(mlm=kind, mim="none").eval()
    assert {name.split(" h_cls")[0] for name in model.cross_attention(make_batch(model.cfg))} == {
        "text ->", "masked words ->"}


def test_both_heads_learn_through_h_cls():
    """Table 2's claim where nothing else can tell: a word names the color of a picture, both are
    masked whole. The words and the pixels come out better than by chance, and the heads' attention
    lies on h_cls."""
    torch.manual_seed(0)
    model = ConLIP(small(image_size=16, queue_size=32, mlm_prob=1.0, mim_prob=1.0, init_std=0.1))
    model.train()
    cfg, colors = model.cfg, torch.rand(20, 3) * 2 - 1
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(120):
        word = torch.randint(0, 20, (16,))
        ends = torch.full_like(word, cfg.cls_id), torch.full_like(word, cfg.sep_id)
        text = torch.stack([ends[0], word + 10, ends[1]], 1)
        batch = {"image": colors[word][:, :, None, None].expand(-1, -1, 16, 16), "text": text,
                 "text_mask": torch.ones_like(text), "image_id": word}
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        model.after_backward(out)
        model.after_step(step, 120)

    # better than any one guess for all
    assert out["logs"]["mlm"] < 0.7 * math.log(20)
    assert out["logs"]["mim"] < 0.7 * (colors - colors.median(0).values).abs().mean()
    with torch.no_grad():
        for name, (scores, where, uniform) in model.eval().cross_attention(batch).items():
            assert (scores * where).sum() / where.sum() > 1.5 * uniform.mean(), name


# --------------------------------------------------------------------------------------------------
# Processes

def three_steps(r=0, world=1):
    """Rank r's share of three steps -> losses, what is compared of the model."""
    torch.manual_seed(0)
    raw = make_model("pretrain", mlm="none", mim="none", queue_size=10, positive="online")
    batches = [make_batch(raw.cfg, 6, ids=[1, 2, 3, 4, 1, 6]) for _ in range(3)]
    model = raw
    if world > 1:
        model = nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False)

    losses, n = [], 6 // world
    for batch in batches:
        out = model({k: v[r * n:r * n + n] for k, v in batch.items()})
        out["loss"].backward()
        raw.after_backward(out)
        losses.append(out["loss"].item())
        with torch.no_grad():
            for p in raw.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad)
        raw.after_step(1, 3)
        raw.zero_grad()

    state = (raw.queue_image, raw.queue_text, raw.queue_ids, raw.vision.norm.weight,
             raw.text_m.embeddings.norm.bias)
    return losses, [v.tolist() for v in state]


def one_of_two(r, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(r), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=r, world_size=2)
    queue.put(three_steps(r, 2))
    dist.destroy_process_group()


def test_two_processes_are_one():
    """Losses, weights after three steps (hence gradients), momentum towers and queues."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=one_of_two, args=(r, port, queue)) for r in range(2)]
    for p in processes:
        p.start()
    whole, expected = three_steps()
    found = [queue.get(timeout=120) for _ in processes]
    for p in processes:
        p.join()

    halves = [losses for losses, _ in found]
    close([sum(pair) / 2 for pair in zip(*halves)], whole, 1e-5)
    for _, state in found:
        for a, b in zip(state, expected):
            close(a, b, 1e-5)


# --------------------------------------------------------------------------------------------------
# As a user would call it

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 little pictures in a jsonl, two captions each, 16 train, 8 val -> flags that name them."""
    root = tmp_path_factory.mktemp("photos")
    words = "a red green blue grey square circle on top of the dark light one two three".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "vocab.txt").write_text("\n".join(tokens) + "\n")

    generator = torch.Generator().manual_seed(0)
    with open(root / "pairs.jsonl", "w") as f:
        for i in range(24):
            color = torch.randint(0, 255, (3,), generator=generator).tolist()
            Image.new("RGB", (40, 32), tuple(color)).save(root / f"{i}.png")
            drawn = torch.randint(0, len(words), (2, 5), generator=generator).tolist()
            captions = [" ".join(words[j] for j in row) for row in drawn]
            split = "train" if i < 16 else "val"
            print(json.dumps({"image": f"{i}.png", "split": split, "caption": captions}), file=f)
    return ["--data", str(root / "pairs.jsonl"), "--image_root", str(root),
            "--vocab", str(root / "vocab.txt")]


SMALL = ("--model conlip --image_size 32 --patch 16 --width 24 --vision_layers 1 --text_layers 1 "
         "--heads 2 --max_text 8 --queue_size 16 --batch_size 4 --steps 3 --log_every 1 "
         "--workers 0 --eval_split val").split()


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A pre-trained model -> its directory, what train.main() returned."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train.main([*SMALL, *photos, "--out", str(folder), "--limit", "12"])


def test_pretrain_evaluate_and_fine_tune(run, photos, tmp_path):
    run, result = run
    tuned = tmp_path / "tuned"
    assert 0 <= result["retrieval"]["metrics"]["t2i_r10"] <= 100
    logs = [json.loads(line) for line in open(run / "log.jsonl")]
    assert len(logs) == 3 and all(math.isfinite(line["mim"]) for line in logs)
    assert json.loads((run / "config.json").read_text())["loop"]["limit"] == 12

    # Table 2, with the same masks each time; 32 pixels are 4 patches and h_cls
    found, again = (evaluation.main([str(run), "--task", "cross_attention"])["cross_attention"]
                    for _ in range(2))
    assert found["metrics"] == again["metrics"] and found["protocol"]["split"] == "val"
    assert abs(found["metrics"]["text -> h_cls of the image, uniform"] - 1 / 5) < 1e-6

    train.main([*SMALL, *photos, "--task", "retrieval", "--init", str(run), "--out", str(tuned),
                "--image_size", "48"])
    assert (tuned / "eval-retrieval-pairs-val.json").exists()
    with pytest.raises(SystemExit, match="does not offer it.*it offers: retrieval, gallery"):
        evaluation.main([str(tuned), "--task", "cross_attention"])


def test_init_leaves_the_other_datas_queue_behind(run, photos, tmp_path, capsys):
    """Two data sets number their pictures alike: the keys of one would pass for a picture's own in
    the other. Both tasks start with empty queues, and say so; towers and teachers come along."""
    old = weights.load_run(run[0])[0].state_dict()
    assert (old["queue_ids"] >= 0).any() and old["ptr"] != 0
    for task in conlip.TASKS:
        out = tmp_path / task
        train.main([*SMALL, *photos, "--task", task, "--init", str(run[0]), "--out", str(out),
                    "--steps", "0", "--evals", "none", "--seed", "1"])
        assert "new: ptr, queue_ids, queue_image, queue_text; dropped" in capsys.readouterr().out
        new = weights.load_run(out)[0].state_dict()
        assert (new["queue_ids"] == -1).all() and new["ptr"] == 0
        for name in ("queue_image", "queue_text"):
            close(new[name].norm(dim=-1), torch.ones(16), 1e-5)
            assert (new[name] @ old[name].T).max() < 0.99
        for name, t in old.items():
            if name.startswith(("vision", "text")):
                assert torch.equal(new[name], t), name


@pytest.mark.parametrize("flags", [
    "--mlm none --mim none --contrast infonce",
    "--mlm vanilla --mim vanilla --positive online",
    "--mask_unit 2 --head_layers 2 --head_shared --mim_prob 0.7 --mlm_prob 0.4 --checkpointing "
    "--accum 2",
])
def test_ablations_train(flags, photos, tmp_path):
    train.main([*SMALL, *photos, *flags.split(), "--evals", "none", "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(lines[-1])["loss"])
