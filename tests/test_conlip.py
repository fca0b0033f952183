"""models/conlip.py against the paper, written down a second time with explicit loops in float64."""

import json
import math
import os
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
from models.conlip import Config, ConLIP, Keys, QueueLogSum

KINDS = ("con", "vanilla", "none")
CONTRASTS = {"dcl": conlip.dcl_loss, "infonce": conlip.infonce_loss}


# --------------------------------------------------------------------------------------------------
# Small models and batches

def small(**over):
    """A Config of which few sizes are equal, so that a mixed-up axis is an error."""
    sizes = dict(image_size=48, patch=16, width=24, vision_layers=2, text_layers=1, heads=3,
                 mlp_ratio=2, dropout=0.0, max_text=11, positions=14, vocab_size=57, pad_id=0,
                 cls_id=2, sep_id=3, mask_id=4, first_word=6, queue_size=21, queue_chunk=8)
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


def close(a, b, tol=1e-9):
    """Tensors, numbers or lists of numbers."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------
# The paper, with loops

def linear(layer, x):
    return torch.stack([(layer.weight[o] * x).sum() + layer.bias[o]
                        for o in range(len(layer.bias))])


def norm(layer, x):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def feed(mlp, x):
    return linear(mlp[2], gelu(linear(mlp[0], x)))


def attention(queries, keys, values, heads, valid=None):
    """One token after the other, one head after the other; valid: which keys count.

    -> outputs, [token][head] -> weights.
    """
    d, out, weights = len(queries[0]) // heads, [], []
    for q in queries:
        parts, row = [], []
        for h in range(heads):
            s = slice(h * d, h * d + d)
            e = [((q[s] * k[s]).sum() / math.sqrt(d)).exp() for k in keys]
            e = [x * (valid is None or valid[j]) for j, x in enumerate(e)]
            row.append([x / sum(e) for x in e])
            parts.append(sum(w * v[s] for w, v in zip(row[-1], values)))
        out.append(torch.cat(parts))
        weights.append(row)
    return out, weights


def self_attention(layer, x, valid=None):
    """x: list of states -> what the layer makes of them, weights."""
    d = len(x[0])
    qkv = [linear(layer.qkv, t) for t in x]
    q, k, v = ([t[n * d:n * d + d] for t in qkv] for n in range(3))
    out, weights = attention(q, k, v, layer.heads, valid)
    return [linear(layer.out, o) for o in out], weights


def cross_attention(layer, x, context, valid=None):
    d = len(x[0])
    q = [linear(layer.query, t) for t in x]
    kv = [linear(layer.key_value, t) for t in context]
    out, weights = attention(q, [t[:d] for t in kv], [t[d:] for t in kv], layer.heads, valid)
    return [linear(layer.out, o) for o in out], weights


def ref_vit(vit, image, masked=(), mask_token=None):
    """Eq. 1, 3: one image (3, H, W) -> list of P+1 states."""
    p, w = vit.patch, vit.patch_embed.weight
    x = [vit.cls_token[0, 0]]
    for i in range(image.shape[1] // p):
        for j in range(image.shape[2] // p):
            if len(x) - 1 in masked:
                x.append(mask_token[0, 0])
                continue
            pixels = image[:, i * p:i * p + p, j * p:j * p + p]
            x.append(torch.stack([(row * pixels).sum() for row in w]) + vit.patch_embed.bias)

    x = [t + vit.pos_embed[0, n] for n, t in enumerate(x)]
    for block in vit.blocks:
        a, _ = self_attention(block.attention, [norm(block.attention_norm, t) for t in x])
        x = [t + o for t, o in zip(x, a)]
        x = [t + feed(block.mlp, norm(block.mlp_norm, t)) for t in x]
    return [norm(vit.norm, t) for t in x]


def ref_bert_layer(block, x, valid=None, context=None, context_valid=None):
    """Post-norm; with a context the weights are those of cross-attention."""
    a, weights = self_attention(block.attention, x, valid)
    x = [norm(block.attention_norm, t + o) for t, o in zip(x, a)]
    if context is not None:
        a, weights = cross_attention(block.cross, x, context, context_valid)
        x = [norm(block.cross_norm, t + o) for t, o in zip(x, a)]
    return [norm(block.mlp_norm, t + feed(block.mlp, t)) for t in x], weights


def ref_bert(bert, ids, valid):
    """Eq. 1, 3: one sentence (T,) -> list of T states."""
    e, x = bert.embeddings, []
    for n, i in enumerate(ids.tolist()):
        x.append(norm(e.norm, e.words.weight[i] + e.positions.weight[n] + e.segments.weight[0]))
    for block in bert.blocks:
        x, _ = ref_bert_layer(block, x, valid)
    return x


def ref_sim(x, y):
    """Eq. 2."""
    dot = sum(a * b for a, b in zip(x, y))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def ref_contrast(kind, q, k, ids, queue, queue_ids, tau):
    """Eq. 9 or 10-11 of each row; tensors in, a list of plain numbers out."""
    q, k, ids, queue, queue_ids = (x.tolist() for x in (q, k, ids, queue, queue_ids))
    out = []
    for i in range(len(q)):
        positive = math.exp(ref_sim(q[i], k[i]) / tau)
        others = [key for key, image in zip(queue, queue_ids) if image != ids[i]]
        total = sum(math.exp(ref_sim(q[i], key) / tau) for key in others)

        if not others:
            out.append(0.0)
        elif kind == "infonce":
            out.append(-math.log(positive / (positive + total)))
        else:
            out.append(-math.log(positive) + math.log(total))
    return out


def contrast_data(r=5, d=6, q=13):
    """q, k, ids, queue, queue_ids: unit vectors in float64; some keys are of a row's own image."""
    x, k, queue = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1) for n in (r, r, q))
    queue_ids = torch.tensor([1, 0, -1, -1, 9, 3, 3, 1, -1, 5, 6, -1, 0])
    return x, k, torch.tensor([0, 1, 2, 3, 1]), queue, queue_ids


# --------------------------------------------------------------------------------------------------
# Equations

def test_conlip_eq1():
    model, batch = doubled(make_model(task="retrieval"), make_batch(small()))
    image, text = model.vision(batch["image"]), model.text(batch["text"], batch["text_mask"])
    for b in (0, 2):
        close(image[b], torch.stack(ref_vit(model.vision, batch["image"][b])))
        valid = batch["text_mask"][b].tolist()
        n = sum(valid)
        close(text[b][:n], torch.stack(ref_bert(model.text, batch["text"][b], valid))[:n])

    # float32 by design
    close(model.encode_image(batch), F.normalize(image[:, 0], dim=-1), 1e-6)
    close(model.encode_text(batch), F.normalize(text[:, 0], dim=-1), 1e-6)


def test_conlip_eq2():
    """The cosine of the [CLS] states, and of nothing else."""
    x, y = torch.randn(4, 3, 5), torch.randn(4, 7, 5)
    sim = (conlip.unit_cls(x) * conlip.unit_cls(y)).sum(-1)
    close(sim, [ref_sim(a, b) for a, b in zip(x[:, 0].tolist(), y[:, 0].tolist())], 1e-6)
    assert conlip.unit_cls(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_conlip_eq3_images(stem):
    """Masked and complete passes in one call are what they are alone, and what lies under a mask
    reaches no state."""
    model, batch = doubled(make_model(stem=stem), make_batch(small()))
    passes = model.image_passes(batch["image"])
    close(passes.complete, model.vision(batch["image"]))
    if stem == "patch":
        hidden = passes.places[1].tolist()
        masked = ref_vit(model.vision, batch["image"][1], hidden, model.mask_token)
        close(passes.masked[1], torch.stack(masked))

    # other pixels under the masks
    hidden = torch.zeros(4, 9, dtype=torch.bool).scatter(1, passes.places, True)
    other = batch["image"].clone()
    for b, n in hidden.nonzero().tolist():
        row, column = n // 3 * 16, n % 3 * 16
        other[b, :, row:row + 16, column:column + 16] = 9.0
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

    head, weight, logs = model.mlm_head, model.text.embeddings.words.weight, []
    dense, _, layer_norm = head.transform
    for b in range(4):
        context = list(image.complete[b])
        if kind == "con":
            context = [image.complete[b, 0], *image.masked[b, 1:]]
        x, _ = ref_bert_layer(model.mlm_layers.blocks[0], list(text.masked[b]),
                              batch["text_mask"][b].tolist(), context)
        for place, word in zip(text.places[b].tolist(), text.labels[b].tolist()):
            if word == -100:
                continue
            t = norm(layer_norm, gelu(linear(dense, x[place])))
            e = [((weight[v] * t).sum() + head.bias[v]).exp() for v in range(len(weight))]
            logs.append((e[word] / sum(e)).log())
    close(loss, -sum(logs) / len(logs), 1e-6)

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

    total, count = 0.0, 0
    for b in range(4):
        context = list(text.complete[b])
        if kind == "con":
            context = [text.complete[b, 0], *text.masked[b, 1:]]
        x, _ = ref_bert_layer(model.mim_layers.blocks[0], list(image.masked[b]), None, context,
                              batch["text_mask"][b].tolist())
        for n in image.places[b].tolist():
            z = linear(model.mim_head, x[1 + n])
            for i in range(16):
                for j in range(16):
                    for c in range(3):
                        y = batch["image"][b, c, n // 3 * 16 + i, n % 3 * 16 + j]
                        total += (y - z[(i * 16 + j) * 3 + c]).abs().item()
                        count += 1
    close(loss, total / count, 1e-6)
    assert count == 4 * round(0.5 * 9) * 768


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


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_conlip_eq9(chunk):
    """Row by row, whatever the chunk."""
    data = contrast_data()
    close(conlip.infonce_loss(*data, 0.05, chunk), ref_contrast("infonce", *data, 0.05))


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_conlip_eq10(chunk):
    """Likewise; and the positive is not in the denominator: a negated one changes it alone."""
    q, k, *others = contrast_data()
    loss = conlip.dcl_loss(q, k, *others, 0.05, chunk)
    close(loss, ref_contrast("dcl", q, k, *others, 0.05))
    close(conlip.dcl_loss(q, -k, *others, 0.05, chunk) - loss, 2 * (q * k).sum(-1) / 0.05)


def test_conlip_eq11():
    """The same form with images as queries: symmetric in which modality asks."""
    model = make_model(mlm="none", mim="none")
    batch = make_batch(model.cfg)
    image, text, ids = model.encode_image(batch), model.encode_text(batch), batch["image_id"]
    loss = model.inst_losses(image, text, Keys(image, text, ids))["i2t"]
    rows = ref_contrast("dcl", image, text, ids, model.queue_text, model.queue_ids, 0.05)
    close(loss, sum(rows) / 4, 1e-5)


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
        close(losses[name], sum(rows) / 4, 1e-5)
        plain += plain_contrast(kind, q, k, ids, queue, model.queue_ids, 0.05).mean()
    close(model(batch)["loss"], losses["i2t"] + losses["t2i"], 1e-5)

    found = torch.autograd.grad(sum(losses.values()), (image, text))
    for a, b in zip(found, torch.autograd.grad(plain, (image, text))):
        close(a, b, 1e-5)


def plain_sum(q, ids, queue, queue_ids, tau):
    """QueueLogSum with the whole (R, Q) matrix."""
    scores = q @ queue.T / tau
    return scores.masked_fill(ids[:, None] == queue_ids, -torch.inf).logsumexp(-1)


def plain_contrast(kind, q, k, ids, queue, queue_ids, tau):
    """Eq. 9 or 10-11 in three lines, for rows with negatives."""
    positive = (q * k).sum(-1) / tau
    negatives = plain_sum(q, ids, queue, queue_ids, tau)
    return (negatives if kind == "dcl" else torch.logaddexp(positive, negatives)) - positive


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_queue_log_sum(chunk):
    """Values and gradients are those of the plain form for any chunk."""
    q, _, ids, queue, queue_ids = contrast_data()
    q.requires_grad_()
    close(QueueLogSum.apply(q, ids, queue, queue_ids, 0.05, chunk),
          plain_sum(q, ids, queue, queue_ids, 0.05))
    assert torch.autograd.gradcheck(
        lambda x: QueueLogSum.apply(x, ids, queue, queue_ids, 0.5, chunk), (q,))


@pytest.mark.parametrize("kind", ["dcl", "infonce"])
def test_a_row_without_negatives_has_loss_and_gradient_zero(kind):
    q, k, ids, queue, queue_ids = contrast_data()
    q.requires_grad_()
    loss = CONTRASTS[kind](q, k, ids, queue, torch.zeros_like(queue_ids), 0.05, 4)
    grad, = torch.autograd.grad(loss.sum(), q)
    assert loss[0] == 0 and (grad[0] == 0).all()
    assert (loss[1:] != 0).all() and grad.isfinite().all()


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

    head = make_model(head_layers=2, head_shared=True).double().mlm_layers
    x, context = torch.randn(2, 5, 24).double(), torch.randn(2, 4, 24).double()
    at = torch.tensor([[3, 0], [1, 4]])
    out = head(x, context, at=at)
    for b in range(2):
        y = list(x[b])
        for _ in range(2):
            y, _ = ref_bert_layer(head.blocks[0], y, None, list(context[b]))
        close(out[b], torch.stack([y[i] for i in at[b].tolist()]), 1e-6)


@pytest.mark.parametrize("task", conlip.TASKS)
def test_protocol(task):
    model = make_model(task)
    batch = make_batch(model.cfg)
    out = model(batch)
    out["loss"].backward()
    assert out["loss"].ndim == 0
    assert all(v.ndim == 0 and not v.requires_grad for v in out["logs"].values())
    for emb in (model.encode_image(batch), model.encode_text(batch)):
        close(emb.norm(dim=-1), torch.ones(4), 1e-5)
    offered = evaluation.offered(model)
    assert {"retrieval", "gallery", "speed"} <= set(offered)
    assert ("cross_attention" in offered) == (task == "pretrain")


def test_a_model_without_heads_offers_no_cross_attention():
    assert make_model(mlm="none", mim="none").offers == {"encode_image", "encode_text"}


@pytest.mark.parametrize("setting, words", [
    (dict(mlm="nope"), "--mlm nope: it is one of con, vanilla, none"),
    (dict(mim="nope"), "--mim nope"), (dict(contrast="nope"), "--contrast nope"),
    (dict(positive="nope"), "--positive nope"), (dict(mask_unit=2), "multiple"),
])
def test_bad_settings_are_one_line(setting, words):
    with pytest.raises(SystemExit, match=words):
        small(**setting)


def test_base_is_the_papers():
    cfg = Config()
    assert (cfg.queue_size, cfg.momentum, cfg.temp, cfg.max_text) == (12288, 0.99, 0.05, 50)
    assert (cfg.dropout, cfg.image_size, cfg.mim_prob, cfg.mlm_prob) == (0.1, 224, 0.5, 0.15)
    for task, size in (("pretrain", 224), ("retrieval", 336)):
        loop, cfg = train.settings(conlip, "base", task, {})
        assert (loop.epochs, loop.batch_size, loop.lr) == (30, 4096, 5e-5)
        assert (loop.schedule, loop.warmup_steps, loop.weight_decay) == ("linear", 0.1, 0.01)
        assert (loop.amp, loop.optimizer, cfg.image_size) == ("fp16", "adamw", size)

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
    """Fine-tuning at 96 pixels from pre-training at 48: positions interpolated, queues anew, heads
    gone."""
    first = make_model()
    model = ConLIP(small(image_size=96), "retrieval")
    heads = ("mlm_layers", "mlm_head", "mim_layers", "mim_head", "mask_token")
    assert not any(k.startswith(heads) for k in model.state_dict())

    missing, extra = model.load_state_dict(model.adapt(first.state_dict()), strict=False)
    assert set(missing) == {"queue_image", "queue_text", "queue_ids", "ptr"}
    assert {k.split(".")[0] for k in extra} == set(heads)
    ours, theirs = model.vision.pos_embed, first.vision.pos_embed
    assert ours.shape == (1, 37, 24) and torch.equal(ours[:, 0], theirs[:, 0])
    assert model.vision(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_pixel_head_and_mask_token_start_small():
    """Whatever the towers start with: at tiny's 0.08 ConMIM ended in one guess for all patches."""
    model = ConLIP(small(init_std=0.08), "pretrain")
    assert model.mim_head.weight.std() < 0.03 and model.mask_token.std() < 0.03
    assert model.vision.pos_embed.std() > 0.03


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
    source, bigger = make_model("retrieval"), ConLIP(small(image_size=96), "retrieval")
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
    theirs = timm.create_model("vit_base_patch16_224", img_size=48, patch_size=16, embed_dim=24,
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
    """The heads' attention to h_cls, token by token, against the loops."""
    model, batch = doubled(make_model(mlm=kind, mim=kind).eval(), make_batch(small()))
    torch.manual_seed(5)
    found = model.cross_attention(batch)
    torch.manual_seed(5)
    image = model.image_passes(batch["image"])
    text = model.text_passes(batch["text"], batch["text_mask"])
    scores, words, uniform = found["text -> h_cls of the image"]
    scores_i, patches, uniform_i = found["image patches -> h_cls of the text"]

    lengths = batch["text_mask"].sum(1)
    assert words.sum(1).tolist() == (lengths - 2).tolist() and patches.all()
    close(uniform, torch.full((4,), 1 / 10), 1e-6)
    close(uniform_i, 1 / lengths, 1e-6)

    for b in (0, 3):
        valid = batch["text_mask"][b].tolist()
        context, context_i = list(image.complete[b]), list(text.complete[b])
        if kind == "con":
            context = [image.complete[b, 0], *image.masked[b, 1:]]
            context_i = [text.complete[b, 0], *text.masked[b, 1:]]

        # [token][head][key], key 0 is h_cls
        _, weights = ref_bert_layer(model.mlm_layers.blocks[0], list(text.masked[b]), valid,
                                    context)
        expected = [sum(head[0] for head in weights[t]) / 3 for t in words[b].nonzero()[:, 0]]
        close(scores[b][words[b]], torch.stack(expected), 1e-6)
        _, weights = ref_bert_layer(model.mim_layers.blocks[0], list(image.masked[b]), None,
                                    context_i, valid)
        expected = [sum(head[0] for head in weights[1 + n]) / 3 for n in range(9)]
        close(scores_i[b], torch.stack(expected), 1e-6)

    masked = found["masked patches -> h_cls of the text"][1]
    assert torch.equal(masked.nonzero()[:, 1].view(4, -1), image.places.sort().values)
    masked = found["masked words -> h_cls of the image"][1]
    assert masked.sum() == (text.labels != -100).sum()


def test_both_heads_learn_through_h_cls():
    """Table 2's claim where nothing else can tell: a word names the color of a picture, both are
    masked whole. The words and the pixels come out better than by chance, and the heads' attention
    lies on h_cls."""
    torch.manual_seed(0)
    model = ConLIP(small(image_size=32, queue_size=32, mlm_prob=1.0, mim_prob=1.0, init_std=0.1))
    model.train()
    cfg, colors = model.cfg, torch.rand(20, 3) * 2 - 1
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(120):
        word = torch.randint(0, 20, (16,))
        ends = torch.full_like(word, cfg.cls_id), torch.full_like(word, cfg.sep_id)
        text = torch.stack([ends[0], word + 10, ends[1]], 1)
        batch = {"image": colors[word][:, :, None, None].expand(-1, -1, 32, 32), "text": text,
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

def one_of_two(r, world, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(r),
                      WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=r, world_size=world)
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
    queue.put((r, losses, [v.tolist() for v in state]))
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_are_one():
    """Losses, weights after three steps (hence gradients), momentum towers and queues."""
    context, results = torch.multiprocessing.get_context("spawn"), {}
    for world in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        queue = context.Queue()
        processes = [context.Process(target=one_of_two, args=(r, world, port, queue))
                     for r in range(world)]
        for p in processes:
            p.start()
        results[world] = sorted(queue.get(timeout=120) for _ in processes)
        for p in processes:
            p.join()

    (_, whole, expected), = results[1]
    halves = [losses for _, losses, _ in results[2]]
    close([sum(pair) / 2 for pair in zip(*halves)], whole, 1e-5)
    for _, _, state in results[2]:
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


SMALL = ("--model conlip --image_size 32 --width 24 --vision_layers 1 --text_layers 1 --heads 2 "
         "--max_text 8 --queue_size 16 --batch_size 4 --steps 3 --log_every 1 --workers 0 "
         "--eval_split val").split()


def test_pretrain_evaluate_and_fine_tune(photos, tmp_path):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    result = train.main([*SMALL, *photos, "--out", str(run), "--limit", "12"])
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
    assert (tuned / "eval-retrieval.json").exists()
    with pytest.raises(SystemExit, match="does not offer it.*it offers: retrieval, gallery"):
        evaluation.main([str(tuned), "--task", "cross_attention"])


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
