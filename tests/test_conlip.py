"""models/conlip.py against the paper, written down a second time with explicit loops in float64."""

import json
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import train
from models import conlip
from models.conlip import (Config, ConLIP, QueueLogSum, dcl_loss, enqueue_, infonce_loss, mask_patches, mask_tokens,
                           patchify, sim)

KINDS = ("con", "vanilla", "none")


# --------------------------------------------------------------------------------------------- small models and batches

def small(**over):
    """A Config of which few sizes are equal, so that a mixed-up axis is an error."""
    return Config(**{**dict(
        image_size=48, patch=16, width=24, vision_layers=2, text_layers=1, heads=3, mlp_ratio=2, dropout=0.0,
        max_text=11, positions=14, vocab_size=57, pad_id=0, cls_id=2, sep_id=3, mask_id=4, first_word=6,
        queue_size=21, queue_chunk=8), **over})


def make_batch(cfg, b=4, ids=None):
    """Sentences of 1 to max_text - 2 words, padded; random pictures."""
    text, mask = torch.full((b, cfg.max_text), cfg.pad_id), torch.zeros(b, cfg.max_text, dtype=torch.long)
    for i, n in enumerate(torch.linspace(1, cfg.max_text - 2, b).long().tolist()):
        text[i, :n + 2] = torch.tensor([cfg.cls_id,
                                        *torch.randint(cfg.first_word, cfg.vocab_size, (n,)).tolist(), cfg.sep_id])
        mask[i, :n + 2] = 1
    return {"image": torch.randn(b, 3, cfg.image_size, cfg.image_size), "text": text, "text_mask": mask,
            "image_id": torch.arange(b) + 7 if ids is None else torch.tensor(ids)}


def make_model(task="pretrain", **over):
    """A model with no zero left in it (biases, momentum towers unlike their students)."""
    model = ConLIP(small(**over), task).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def doubled(model, batch):
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def close(a, b, tol=1e-9):
    a, b = (x.detach().double() if isinstance(x, torch.Tensor) else torch.tensor(x).double() for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ------------------------------------------------------------------------------------------------ the paper, with loops

def linear(layer, x):
    return torch.stack([(layer.weight[o] * x).sum() + layer.bias[o] for o in range(len(layer.bias))])


def norm(layer, x):
    mean = x.sum() / len(x)
    return (x - mean) / (((x - mean) ** 2).sum() / len(x) + layer.eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(queries, keys, values, heads, live=None):
    """One token after the other, one head after the other. live: which keys count.
    -> outputs, [token][head] -> weights."""
    d, out, weights = len(queries[0]) // heads, [], []
    for q in queries:
        parts, row = [], []
        for h in range(heads):
            s = slice(h * d, h * d + d)
            e = [((q[s] * k[s]).sum() / math.sqrt(d)).exp() * (live is None or live[j]) for j, k in enumerate(keys)]
            row.append([x / sum(e) for x in e])
            parts.append(sum(w * v[s] for w, v in zip(row[-1], values)))
        out.append(torch.cat(parts))
        weights.append(row)
    return out, weights


def ref_vit(vit, image, masked=(), mask_token=None):
    """Eq. 1, 3: one image (3, H, W) -> list of P+1 states."""
    p, w = vit.patch, vit.patch_embed.proj.weight
    x = [vit.cls_token[0, 0]]
    for i in range(image.shape[1] // p):
        for j in range(image.shape[2] // p):
            if len(x) - 1 in masked:
                x.append(mask_token[0, 0])
                continue
            pixels = image[:, i * p:i * p + p, j * p:j * p + p]
            x.append(torch.stack([(w[o] * pixels).sum() for o in range(len(w))]) + vit.patch_embed.proj.bias)
    x = [t + vit.pos_embed[0, n] for n, t in enumerate(x)]
    for block in vit.blocks:
        d = len(x[0])
        qkv = [linear(block.attn.qkv, norm(block.norm1, t)) for t in x]
        a, _ = attention([t[:d] for t in qkv], [t[d:2 * d] for t in qkv], [t[2 * d:] for t in qkv], block.attn.heads)
        x = [t + linear(block.attn.proj, o) for t, o in zip(x, a)]
        x = [t + linear(block.mlp.fc2, gelu(linear(block.mlp.fc1, norm(block.norm2, t)))) for t in x]
    return [norm(vit.norm, t) for t in x]


def ref_bert_attention(layer, x, context, live=None):
    q, k, v = ([linear(getattr(layer.self, n), t) for t in y]
               for n, y in (("query", x), ("key", context), ("value", context)))
    out, weights = attention(q, k, v, layer.heads, live)
    return [norm(layer.output.LayerNorm, linear(layer.output.dense, o) + t) for o, t in zip(out, x)], weights


def ref_bert_layer(layer, x, live=None, context=None, context_live=None):
    x, weights = ref_bert_attention(layer.attention, x, x, live)
    if context is not None:
        x, weights = ref_bert_attention(layer.crossattention, x, context, context_live)
    feed = [linear(layer.output.dense, gelu(linear(layer.intermediate.dense, t))) for t in x]
    return [norm(layer.output.LayerNorm, f + t) for f, t in zip(feed, x)], weights


def ref_bert(bert, ids, live):
    """Eq. 1, 3: one sentence (T,) -> list of T states."""
    e = bert.embeddings
    x = [norm(e.LayerNorm,
              e.word_embeddings.weight[i] + e.position_embeddings.weight[n] + e.token_type_embeddings.weight[0])
         for n, i in enumerate(ids.tolist())]
    for layer in bert.encoder.layer:
        x, _ = ref_bert_layer(layer, x, live)
    return x


def ref_sim(x, y):
    dot = sum(a * b for a, b in zip(x, y))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def ref_contrast(kind, q, k, ids, queue, queue_ids, tau):
    """Eq. 9 or 10-11 of each row, from plain numbers."""
    out = []
    for i in range(len(q)):
        pos = math.exp(ref_sim(q[i], k[i]) / tau)
        total = sum(math.exp(ref_sim(q[i], queue[j]) / tau) for j in range(len(queue)) if queue_ids[j] != ids[i])
        loss = -math.log(pos / (pos + total)) if kind == "infonce" else -math.log(pos) + math.log(total or 1)
        out.append(loss if total else 0.0)
    return out


def contrast_data(r=5, d=6, q=13):
    """Unit vectors in float64; ids such that some keys are excluded, in row 2 all of them."""
    x, k, queue = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1) for n in (r, r, q))
    return x, k, torch.tensor([0, 1, 2, 3, 1]), queue, torch.tensor([1, 0, -1, -1, 9, 3, 3, 1, -1, 5, 6, -1, 0])


# ---------------------------------------------------------------------------------------------------- equations

def test_conlip_eq1():
    model, batch = doubled(make_model(task="retrieval"), make_batch(small()))
    image, text = model.vision(batch["image"]), model.text(batch["text"], batch["text_mask"])
    for b in (0, 2):
        close(image[b], torch.stack(ref_vit(model.vision, batch["image"][b])))
        live = batch["text_mask"][b].tolist()
        close(text[b][:sum(live)], torch.stack(ref_bert(model.text, batch["text"][b], live))[:sum(live)])
    close(model.encode_image(batch), F.normalize(image[:, 0], dim=-1), 1e-6)              # float32 by design
    close(model.encode_text(batch), F.normalize(text[:, 0], dim=-1), 1e-6)


def test_conlip_eq2():
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    close(sim(x, y), [ref_sim(a, b) for a, b in zip(x.tolist(), y.tolist())], 1e-6)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_conlip_eq3(stem):
    """Masked and complete passes in one call are what they are alone, and what lies under a mask reaches no state."""
    model, batch = doubled(make_model(stem=stem), make_batch(small()))
    complete, masked, patches = model.image_passes(batch["image"])
    close(complete, model.vision(batch["image"]))
    if stem == "patch":
        close(masked[1], torch.stack(ref_vit(model.vision, batch["image"][1], patches[1].tolist(), model.mask_token)))
    flags = torch.zeros(4, 9, dtype=torch.bool).scatter(1, patches, True)
    other = batch["image"].clone()
    for b, n in flags.nonzero().tolist():
        other[b, :, n // 3 * 16:n // 3 * 16 + 16, n % 3 * 16:n % 3 * 16 + 16] = 9.0
    close(masked, model.vision(other, flags, model.mask_token), 0)
    assert not torch.equal(model.vision(other)[:, 1:], complete[:, 1:])
    text, text_mask = batch["text"], batch["text_mask"]
    complete, masked, places, labels = model.text_passes(text, text_mask)
    close(complete, model.text(text, text_mask))
    for b in range(4):                                                          # masked words are words of the sentence
        assert all(w in (-100, text[b, p]) for p, w in zip(places[b].tolist(), labels[b].tolist()))
        assert (labels[b] != -100).sum() == max(1, round(0.15 * (text_mask[b].sum().item() - 2)))


def test_mask_rates():
    cfg = small(vocab_size=1000)
    text, live = torch.full((3000, 22), 900), torch.ones(3000, 22, dtype=torch.bool)
    text[:, 0], text[:, -1], live[:, 0], live[:, -1] = cfg.cls_id, cfg.sep_id, False, False
    masked, places, labels = mask_tokens(text, live, cfg.mask_id, cfg.first_word, cfg.vocab_size, 0.15)
    assert (labels == 900).sum() == 3 * 3000 and ((places > 0) & (places < 21)).all()
    chosen = masked.gather(1, places)
    rates = [(chosen == cfg.mask_id).double().mean().item(), (chosen == 900).double().mean().item()]
    assert (abs(rates[0] - 0.8) < 0.02 and abs(rates[1] - 0.1) < 0.02
            and chosen[chosen != cfg.mask_id].min() >= cfg.first_word)
    assert torch.equal(masked.scatter(1, places, 900), text)                              # the rest is untouched
    for prob, unit, m in ((0.5, 1, 98), (0.5, 2, 96), (0.6, 1, 118), (0.01, 1, 2)):
        positions, flags = mask_patches(500, 14, 14, prob, unit)
        assert (positions.shape == (500, m if unit == 1 else 4 * round(prob * 49))
                and (flags.sum(1) == positions.shape[1]).all())
        grid = flags.view(500, 14 // unit, unit, 14 // unit, unit)
        assert (grid == grid[:, :, :1, :, :1]).all()                                      # units are masked whole
        assert abs(flags.double().mean(0) - flags.double().mean()).max() < 0.12           # each as often as the others


@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_conlip_eq5(kind):
    """The words under masks from [h_cls of the complete image; patches of the masked one],
    or from all of the complete one."""
    model, batch = doubled(make_model(mlm=kind, mim="none"), make_batch(small()))
    image, masked_image, _ = model.image_passes(batch["image"])
    text, masked_text, places, labels = model.text_passes(batch["text"], batch["text_mask"])
    loss = model.token_losses(batch, image, masked_image, None, text, masked_text, places, labels)["mlm"]
    head, weight, logs = model.mlm_head, model.text.embeddings.word_embeddings.weight, []
    for b in range(4):
        live = batch["text_mask"][b].tolist()
        context = [image[b, 0], *masked_image[b, 1:]] if kind == "con" else list(image[b])
        x, _ = ref_bert_layer(model.mlm_layers.layer[0], list(masked_text[b]), live, context)
        for place, word in zip(places[b].tolist(), labels[b].tolist()):
            if word != -100:
                t = norm(head.transform.LayerNorm, gelu(linear(head.transform.dense, x[place])))
                e = [((weight[v] * t).sum() + head.bias[v]).exp() for v in range(len(weight))]
                logs.append((e[word] / sum(e)).log())
    close(loss, -sum(logs) / len(logs), 1e-6)
    assert conlip.conmlm_loss(torch.randn(2, 3, 7), torch.full((2, 3), -100)) == 0        # nothing masked: 0, not NaN


@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_conlip_eq6(kind):
    """The pixels under masks from [h_cls of the complete text; words of the masked text],
    or from all of the complete text."""
    model, batch = doubled(make_model(mlm="none", mim=kind), make_batch(small()))
    image, masked_image, patches = model.image_passes(batch["image"])
    text, masked_text, places, labels = model.text_passes(batch["text"], batch["text_mask"])
    loss = model.token_losses(batch, image, masked_image, patches, text, masked_text, places, labels)["mim"]
    total, count = 0.0, 0
    for b in range(4):
        live = batch["text_mask"][b].tolist()
        context = [text[b, 0], *masked_text[b, 1:]] if kind == "con" else list(text[b])
        x, _ = ref_bert_layer(model.mim_layers.layer[0], list(masked_image[b]), None, context, live)
        for n in patches[b].tolist():
            z = linear(model.mim_head, x[1 + n])
            for i in range(16):
                for j in range(16):
                    for c in range(3):
                        y = batch["image"][b, c, n // 3 * 16 + i, n % 3 * 16 + j]
                        total, count = total + (y - z[(i * 16 + j) * 3 + c]).abs().item(), count + 1
    close(loss, total / count, 1e-6)
    assert count == 4 * round(0.5 * 9) * 768


@pytest.mark.parametrize("mlm", KINDS)
@pytest.mark.parametrize("mim", KINDS)
def test_conlip_eq4(mlm, mim):
    """L = L_mim + L_mlm + L_i2t + L_t2i; every trained parameter has a gradient, momentum ones none."""
    model = make_model(mlm=mlm, mim=mim)
    out = model(make_batch(model.cfg))
    assert (set(out["logs"]) == {"i2t", "t2i"} | ({"mlm"} if mlm != "none" else set())
            | ({"mim"} if mim != "none" else set()))
    close(out["loss"], sum(out["logs"].values()), 1e-6)
    out["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (not name.startswith(("vision_m.", "text_m."))), name
        assert p.requires_grad == (p.grad is not None), name


def test_conlip_eq7():
    """L_token = L_ConMIM + L_ConMLM, and con: of the complete input nothing but h_cls is seen. vanilla: all of it."""
    for kind in ("con", "vanilla"):
        model = make_model(mlm=kind, mim=kind)
        batch = make_batch(model.cfg)
        states = *model.image_passes(batch["image"]), *model.text_passes(batch["text"], batch["text_mask"])
        image, masked_image, patches, text, masked_text, places, labels = states
        def losses(image, text):
            return model.token_losses(batch, image, masked_image, patches, text, masked_text, places, labels)

        def noisy(x, h_cls):
            first = (torch.arange(x.shape[1]) == 0)[:, None]
            return torch.where(first == h_cls, x + torch.randn_like(x), x)

        base, rest, head = (losses(*states) for states in ((image, text), (noisy(image, False), noisy(text, False)),
                                                           (noisy(image, True), noisy(text, True))))
        for name, tokens in (("mlm", image), ("mim", text)):
            assert torch.equal(base[name], rest[name]) == (kind == "con")
            assert not torch.equal(base[name], head[name])
            grad, = torch.autograd.grad(base[name], tokens, retain_graph=True)          # h_cls learns from it: the idea
            assert grad[:, 0].abs().sum(-1).min() > 0 and (grad[:, 1:].abs().sum() == 0) == (kind == "con")


def test_passes_of_a_step():
    """Complete and masked inputs of a modality in one call, keys in another;
    words and pixels predicted at masked places only."""
    model, calls = make_model(), []
    for name in ("vision", "text", "vision_m", "text_m", "mlm_head", "mim_head"):
        getattr(model, name).register_forward_hook(
            lambda module, args, out, name=name: calls.append((name, *args[0].shape[:2])))
    model(make_batch(model.cfg))
    m = round(0.15 * model.cfg.max_text)
    assert sorted(calls) == sorted([("vision", 8, 3), ("text", 8, 11), ("vision_m", 4, 3), ("text_m", 4, 11),
                                    ("mlm_head", 4, m), ("mim_head", 4, round(0.5 * 9))])


def test_conlip_eq8():
    model = make_model(momentum=0.9)
    expected = {}
    for name in ("vision", "text"):
        ours = dict(getattr(model, name).named_parameters())
        for key, theta_m in getattr(model, name + "_m").named_parameters():
            expected[name, key] = 0.9 * theta_m.detach() + (1 - 0.9) * ours[key].detach()
    model.after_step(1, 10, 5)
    for (name, key), value in expected.items():
        torch.testing.assert_close(dict(getattr(model, name + "_m").named_parameters())[key].detach(), value)


def check_contrast(kind, plain):
    q, k, ids, queue, queue_ids = contrast_data()
    tau = 0.05
    expected = ref_contrast(kind, q.tolist(), k.tolist(), ids.tolist(), queue.tolist(), queue_ids.tolist(), tau)
    close(plain(q, k, ids, queue, queue_ids, tau), expected, 1e-5)                         # scores are float32
    for i in range(5):                                                        # the positive is not in DCL's denominator
        row = slice(i, i + 1)
        lone = ref_contrast(kind, q[row].tolist(), (-k[row]).tolist(), ids[row].tolist(), queue.tolist(),
                            queue_ids.tolist(), tau)
        if kind == "dcl":
            close(lone[0] - expected[i], 2 * ref_sim(q[i].tolist(), k[i].tolist()) / tau, 1e-6)


def test_conlip_eq9():
    check_contrast("infonce", infonce_loss)


def test_conlip_eq10():
    check_contrast("dcl", dcl_loss)


def test_conlip_eq11():
    """The same form with texts as keys: symmetric in which modality asks."""
    check_contrast("dcl", dcl_loss)
    model = make_model(mlm="none", mim="none")
    batch = make_batch(model.cfg)
    image, text = model.encode_image(batch), model.encode_text(batch)
    loss = model.inst_losses(image, text, image, text, batch["image_id"])["i2t"]
    close(loss, sum(ref_contrast("dcl", image.tolist(), text.tolist(), batch["image_id"].tolist(),
                                 model.queue_text.tolist(), model.queue_ids.tolist(), 0.05)) / 4, 1e-5)


@pytest.mark.parametrize("kind", ["dcl", "infonce"])
@pytest.mark.parametrize("positive", ["momentum", "online"])
def test_conlip_eq12(kind, positive):
    model = make_model(contrast=kind, positive=positive, mlm="none", mim="none")
    batch = make_batch(model.cfg, ids=[7, 7, 9, 10])
    model.queue_ids[:9] = torch.tensor([7, 9, 3, 4, 7, 10, 10, 10, 5])
    mine, keys = model.momentum_keys(batch)
    image = model.encode_image(batch).detach().requires_grad_()
    text = model.encode_text(batch).detach().requires_grad_()
    losses = model.inst_losses(image, text, *mine, batch["image_id"])
    k_text, k_image = (text, image) if positive == "online" else (mine[1], mine[0])
    ids, queue_ids = batch["image_id"].tolist(), model.queue_ids.tolist()
    for name, q, k, queue in (("i2t", image, k_text, model.queue_text), ("t2i", text, k_image, model.queue_image)):
        close(losses[name],
              sum(ref_contrast(kind, q.tolist(), k.tolist(), ids, queue.tolist(), queue_ids, 0.05)) / 4, 1e-5)
    close(model(batch)["loss"], losses["i2t"] + losses["t2i"], 1e-5)
    plain = {"dcl": dcl_loss, "infonce": infonce_loss}[kind]
    expected = sum(plain(q, k, batch["image_id"], queue, model.queue_ids, 0.05).mean()
                   for q, k, queue in ((image, k_text, model.queue_text), (text, k_image, model.queue_image)))
    for a, b in zip(torch.autograd.grad(sum(losses.values()), (image, text)),
                    torch.autograd.grad(expected, (image, text))):
        close(a, b, 1e-5)


# --------------------------------------------------------------------------------------------- the streamed sum, memory

@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_queue_log_sum(chunk):
    """Values and gradients are those of the plain form for any chunk;
    a row without a negative has loss 0 and gradient 0."""
    q, k, ids, queue, queue_ids = contrast_data()
    queue_ids = torch.where(torch.arange(13) < 13, queue_ids, 0)
    q.requires_grad_()
    fast = QueueLogSum.apply(q, ids, queue, queue_ids, 0.05, chunk)
    close(fast, conlip.queue_log_sum(q, ids, queue, queue_ids, 0.05), 1e-5)
    assert torch.autograd.gradcheck(lambda x: QueueLogSum.apply(x, ids, queue, queue_ids, 0.5, chunk), (q,))
    same = torch.zeros_like(queue_ids)
    for loss in (conlip.drop_empty(QueueLogSum.apply(q, ids, queue, same, 0.05, chunk), (q * k).sum(-1)),
                 dcl_loss(q, k, ids, queue, same, 0.05), infonce_loss(q, k, ids, queue, same, 0.05)):
        grad, = torch.autograd.grad(loss.sum(), q)
        assert loss[0] == 0 and (grad[0] == 0).all() and (loss[1:] != 0).all() and grad.isfinite().all()


def test_half_precision():
    """Under autocast every loss stays near its float32 value, and finite with values of any size."""
    model, torch_batch = make_model(), make_batch(small())
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(3)
        expected = model(torch_batch)["logs"]
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype):
            out = model(torch_batch)
        out["loss"].backward()
        assert out["loss"].dtype == torch.float32
        for name, value in expected.items():
            assert abs(out["logs"][name] - value) < 0.1 * abs(value), (dtype, name)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_queue_is_a_ring():
    model = make_model(queue_size=10)
    kept = [[tuple(v), -1] for v in torch.zeros(10, 1).tolist()]
    ptr = 0
    for step in range(7):
        keys, ids = torch.randn(4, 24), torch.arange(4) + 4 * step
        model.after_backward({"keys": (keys, 2 * keys, ids)})
        for key, i in zip(keys, ids.tolist()):
            kept[ptr % 10] = [key, i]
            ptr += 1
        assert model.queue_ids.tolist() == [i for _, i in kept] and model.ptr == ptr % 10
        for n, (key, i) in enumerate(kept):
            assert i < 0 or (torch.equal(model.queue_image[n], key) and torch.equal(model.queue_text[n], 2 * key))
    enqueue_(model.queue_text, model.queue_ids, model.ptr, torch.arange(12.0)[:, None].expand(12, 24), torch.arange(12))
    assert set(model.queue_ids.tolist()) == set(range(2, 12))                       # of more keys than places, the last


def test_keys_of_this_step_are_no_negatives():
    """The queue takes them in after backward; evaluation enqueues nothing."""
    model = make_model()
    batch, before = make_batch(model.cfg), model.queue_image.clone()
    out = model(batch)
    assert torch.equal(model.queue_image, before)
    out["loss"].backward()
    model.after_backward(out)
    assert (torch.equal(model.queue_image[:4], model.momentum_keys(batch)[0][0])
            and model.queue_ids[:4].tolist() == [7, 8, 9, 10])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    model.encode_image(batch), model.encode_text(batch), model.cross_attention(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_teachers_have_no_dropout():
    model = make_model(dropout=0.5).train()
    batch = make_batch(model.cfg)
    (a, b), _ = model.momentum_keys(batch)
    (c, d), _ = model.momentum_keys(batch)
    assert (torch.equal(a, c) and torch.equal(b, d)
            and not torch.equal(model.encode_text(batch), model.encode_text(batch)))


# ------------------------------------------------------------------------------------------------ heads, tasks, weights

def test_head_layers():
    """Table 4: one layer, three, two that share their parameters."""
    count = lambda **over: sum(p.numel() for p in make_model(**over).mlm_layers.parameters())
    one = count()
    assert count(head_layers=3) == 3 * one and count(head_layers=2, head_shared=True) == one
    model = make_model(head_layers=2, head_shared=True).double()
    x, context = torch.randn(2, 5, 24).double(), torch.randn(2, 4, 24).double()
    at, layer = torch.tensor([[3, 0], [1, 4]]), model.mlm_layers.layer[0]
    out = model.mlm_layers(x, None, context, None, at)
    for b in range(2):
        y = list(x[b])
        for _ in range(2):
            y, _ = ref_bert_layer(layer, y, None, list(context[b]))
        close(out[b], torch.stack([y[i] for i in at[b].tolist()]), 1e-6)


def test_protocol():
    for task in conlip.TASKS:
        model = make_model(task)
        batch = make_batch(model.cfg)
        out = model(batch)
        out["loss"].backward()
        assert out["loss"].ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in out["logs"].values())
        for emb in (model.encode_image(batch), model.encode_text(batch)):
            close(emb.norm(dim=-1), torch.ones(4), 1e-5)
        groups = model.param_groups(train.Loop(lr=0.1, weight_decay=0.2))
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
        assert all(p.ndim <= 1 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0
        offered = evaluation.offered(model)
        assert ({"retrieval", "gallery", "speed"} <= set(offered)
                and ("cross_attention" in offered) == (task == "pretrain"))
    for field in ("mlm", "contrast", "positive"):
        with pytest.raises(SystemExit, match=f"--{field} nope"):
            small(**{field: "nope"})
    with pytest.raises(SystemExit, match="multiple"):
        small(mask_unit=2)


def test_base_is_the_papers():
    cfg = Config()
    assert ((cfg.queue_size, cfg.momentum, cfg.temp, cfg.max_text, cfg.dropout, cfg.image_size, cfg.mim_prob,
             cfg.mlm_prob) == (12288, 0.99, 0.05, 50, 0.1, 224, 0.5, 0.15))
    for task, size in (("pretrain", 224), ("retrieval", 336)):
        loop, cfg = train.settings(conlip, "base", task, {})
        assert ((loop.epochs, loop.batch_size, loop.lr, loop.schedule, loop.warmup_steps)
                == (30, 4096, 5e-5, "linear", 0.1))
        assert (loop.weight_decay, loop.amp, loop.optimizer, cfg.image_size) == (0.01, "fp16", "adamw", size)
    with torch.device("meta"):
        vision, text = conlip.MaskedViT(Config()), conlip.Bert(Config())
    millions = [round(sum(p.numel() for p in tower.parameters()) / 1e6, 1) for tower in (vision, text)]
    assert millions == [85.8, 108.9]                                                      # Table 7 less the poolers


def test_heads_are_dropped_and_sizes_adapt():
    """Fine-tuning at 96 pixels from pre-training at 48: positions interpolated, queues anew, heads gone."""
    first = make_model()
    model = ConLIP(small(image_size=96), "retrieval")
    state = model.adapt(first.state_dict())
    assert not any(k.startswith(("mlm_", "mim_", "mask_token")) for k in model.state_dict())
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) == {"queue_image", "queue_text", "queue_ids", "ptr"}
    assert {k.split(".")[0] for k in extra} == {"mlm_layers", "mlm_head", "mim_layers", "mim_head", "mask_token"}
    assert (model.vision.pos_embed.shape == (1, 37, 24)
            and torch.equal(model.vision.pos_embed[:, 0], first.vision.pos_embed[:, 0]))
    close(model.vision(torch.randn(1, 3, 96, 96)).isfinite().all(), True)


def hf_files(folder, model):
    """The towers' weights under Hugging Face's names, with what their files hold besides."""
    vit, bert = {}, {}
    for k, v in model.vision.state_dict().items():
        k = (k.replace("blocks.", "encoder.layer.").replace("norm1", "layernorm_before")
             .replace("norm2", "layernorm_after"))
        k = (k.replace("attn.proj", "attention.output.dense")
             .replace("patch_embed.proj", "embeddings.patch_embeddings.projection"))
        k = k.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        k = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "norm.weight": "layernorm.weight",
             "norm.bias": "layernorm.bias"}.get(k, k)
        if "attn.qkv" in k:
            for name, part in zip(("query", "key", "value"), v.chunk(3)):
                vit[k.replace("attn.qkv", f"attention.attention.{name}")] = part.clone()
        else:
            vit[k] = v.clone()
    vit["pooler.dense.weight"] = torch.zeros(2, 2)
    for k, v in model.text.state_dict().items():
        bert["bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma")
             .replace("LayerNorm.bias", "LayerNorm.beta")] = v.clone()
    bert |= {k: torch.zeros(2) for k in ("cls.predictions.bias", "bert.pooler.dense.bias", "cls.seq_relationship.bias")}
    bert["bert.embeddings.position_ids"] = torch.arange(2)
    save_file(vit, folder / "vit.safetensors")
    torch.save(bert, folder / "bert.bin")
    return vit, bert


def test_load_pretrained(tmp_path):
    source, model = make_model("retrieval"), make_model("retrieval")
    vit, bert = hf_files(tmp_path, source)
    queues = [b.clone() for b in (model.queue_image, model.queue_text)]
    vision, text = conlip.load_pretrained(model, tmp_path / "vit.safetensors", tmp_path / "bert.bin").split("\n  ")
    # qkv is one
    assert "matched 30 of 31 tensors, which fill 30 here; missing 0; unexpected 1: pooler.dense.weight" in vision
    n = len(model.text.state_dict())
    assert (f"matched {n} of {n + 4} tensors, which fill {n} here; missing 0; unexpected 3: " in text
            and "position_ids" in text)
    batch = make_batch(model.cfg)
    for encode in ("encode_image", "encode_text"):
        assert torch.equal(getattr(model, encode)(batch), getattr(source, encode)(batch))
    state = model.state_dict()
    assert all(torch.equal(state[k.replace(".", "_m.", 1)], v)
               for k, v in state.items() if k.startswith(("vision.", "text.")))
    assert all(torch.equal(a, b) for a, b in zip(queues, (model.queue_image, model.queue_text)))
    heads = make_model()                                                                # section 4.1: they stay random
    before = {k: v.clone() for k, v in heads.state_dict().items() if k.startswith(("mlm_", "mim_"))}
    conlip.load_pretrained(heads, text=tmp_path / "bert.bin")
    assert before and all(torch.equal(v, heads.state_dict()[k]) for k, v in before.items())
    bigger = ConLIP(small(image_size=96), "retrieval")
    assert ("pos_embed interpolated from 3x3 to 6x6"
            in conlip.load_pretrained(bigger, vision=tmp_path / "vit.safetensors"))
    close(bigger.vision.pos_embed[:, 0], source.vision.pos_embed[:, 0])

    hub = tmp_path / "hub"                                                              # what a hub name is resolved to
    hub.mkdir()
    key = "encoder.layer.{}.attention.attention.key.bias"
    for side, good, change, config, message in (
            ("vision", vit, {}, {"num_attention_heads": 3}, None),
            ("text", bert, {}, {"model_type": "bert", "num_attention_heads": 3}, None),
            ("vision", vit, {}, {"num_attention_heads": 4}, "num_attention_heads 4, this model has 3"),
            ("text", bert, {}, {"model_type": "roberta"}, "model_type roberta"),
            ("vision", vit, {"layernorm.bias": None}, {},
             "1 of this tower's 30 tensors are not filled: vision.norm.bias"),
            ("vision", vit, {key.format(1): None}, {}, "not filled: vision.blocks.1.attn.qkv.bias"),
            ("vision", vit, {"layernorm.bias": torch.zeros(5)}, {}, r"norm.bias is \(5,\) there"),
            ("text", bert, {"bert.embeddings.LayerNorm.gamma": None}, {},
             "not filled: text.embeddings.LayerNorm.weight"),
            ("text", bert, {"bert.encoder.layer.1.x": torch.zeros(1)}, {}, "no place for encoder.layer.1.x"),
            ("text", bert, {"bert.embeddings.word_embeddings.weight": torch.zeros(58, 24)}, {}, "another vocabulary")):
        state = {k: v for k, v in {**good, **change}.items() if v is not None}
        torch.save(state, hub / "pytorch_model.bin")
        (hub / "config.json").write_text(json.dumps(config))
        if message is None:
            assert "missing 0" in conlip.load_pretrained(model, **{side: hub})
            continue
        with pytest.raises(SystemExit, match=message) as error:
            conlip.load_pretrained(model, **{side: hub})
        assert str(error.value).startswith(f"--init_{side} {hub}: ") and "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="--init_vision .*needs --stem patch --act gelu"):
        conlip.load_pretrained(make_model("retrieval", stem="conv"), vision=tmp_path / "vit.safetensors")


# ---------------------------------------------------------------------------------------------------- Table 2

@torch.no_grad()
@pytest.mark.parametrize("kind", ["con", "vanilla"])
def test_cross_attention(kind):
    """The heads' attention to h_cls, token by token, against the loops."""
    model, batch = doubled(make_model(mlm=kind, mim=kind).eval(), make_batch(small()))
    torch.manual_seed(5)
    found = model.cross_attention(batch)
    torch.manual_seed(5)
    image, masked_image, patches = model.image_passes(batch["image"])
    text, masked_text, places, labels = model.text_passes(batch["text"], batch["text_mask"])
    scores, words, uniform = found["text -> h_cls of the image"]
    scores_i, all_patches, uniform_i = found["image patches -> h_cls of the text"]
    assert words.sum(1).tolist() == (batch["text_mask"].sum(1) - 2).tolist() and all_patches.all()
    close(uniform, torch.full((4,), 1 / 10), 1e-6)
    close(uniform_i, 1 / batch["text_mask"].sum(1), 1e-6)
    for b in (0, 3):
        live = batch["text_mask"][b].tolist()
        context = [image[b, 0], *masked_image[b, 1:]] if kind == "con" else list(image[b])
        _, weights = ref_bert_layer(model.mlm_layers.layer[0], list(masked_text[b]), live, context)
        close(scores[b][words[b]], [sum(h[0] for h in weights[t]) / 3 for t in range(sum(live)) if words[b, t]], 1e-6)
        context = [text[b, 0], *masked_text[b, 1:]] if kind == "con" else list(text[b])
        _, weights = ref_bert_layer(model.mim_layers.layer[0], list(masked_image[b]), None, context, live)
        close(scores_i[b], [sum(h[0] for h in weights[1 + n]) / 3 for n in range(9)], 1e-6)
    assert torch.equal(found["masked patches -> h_cls of the text"][1].nonzero()[:, 1].view(4, -1),
                       patches.sort().values)
    assert found["masked words -> h_cls of the image"][1].sum() == (labels != -100).sum()


def test_both_heads_learn_through_h_cls():
    """Table 2's claim where nothing else can tell: a word names the color of a picture, both are masked whole. The
    words and the pixels come out better than by chance, and the heads' attention lies on h_cls."""
    torch.manual_seed(0)
    model = ConLIP(small(image_size=32, queue_size=32, mlm_prob=1.0, mim_prob=1.0, init_std=0.1)).train()
    cfg, colors = model.cfg, torch.rand(20, 3) * 2 - 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(120):
        word = torch.randint(0, 20, (16,))
        text = torch.stack([torch.full_like(word, cfg.cls_id), word + 10, torch.full_like(word, cfg.sep_id)], 1)
        batch = {"image": colors[word][:, :, None, None].expand(-1, -1, 32, 32), "text": text,
                 "text_mask": torch.ones_like(text),
                 "image_id": word}
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        model.after_backward(out)
        model.after_step(step, 120)
    assert out["logs"]["mlm"] < 0.7 * math.log(20)
    # the best L1 of one guess for all
    assert out["logs"]["mim"] < 0.7 * (colors - colors.median(0).values).abs().mean()
    with torch.no_grad():
        for name, (scores, where, uniform) in model.eval().cross_attention(batch).items():
            assert (scores * where).sum() / where.sum() > 1.5 * uniform.mean(), name


# ---------------------------------------------------------------------------------------------------- processes

def one_of_two(r, world, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(r), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=r, world_size=world)
    torch.manual_seed(0)
    raw = make_model("pretrain", mlm="none", mim="none", queue_size=10, positive="online")
    batches = [make_batch(raw.cfg, 6, ids=[1, 2, 3, 4, 1, 6]) for _ in range(3)]
    model = torch.nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False) if world > 1 else raw
    losses = []
    for batch in batches:
        n = 6 // world
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
             raw.text_m.embeddings.LayerNorm.bias)
    queue.put((r, losses, [v.tolist() for v in state]))
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_are_one():
    """Losses, weights after three steps (hence gradients), momentum towers and queues."""
    context = torch.multiprocessing.get_context("spawn")
    results = {}
    for world in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        queue = context.Queue()
        processes = [context.Process(target=one_of_two, args=(r, world, port, queue)) for r in range(world)]
        for p in processes:
            p.start()
        results[world] = sorted(queue.get(timeout=120) for _ in processes)
        for p in processes:
            p.join()
    (_, whole, expected), = results[1]
    close([sum(pair) / 2 for pair in zip(*(losses for _, losses, _ in results[2]))], whole, 1e-5)
    for _, _, state in results[2]:
        for a, b in zip(state, expected):
            close(a, b, 1e-5)


# ---------------------------------------------------------------------------------------------- as a user would call it

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 little pictures in a jsonl, two captions each, 16 train, 8 val, and a vocabulary."""
    root = tmp_path_factory.mktemp("photos")
    words = "a red green blue grey square circle on top of the dark light one two three".split()
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    generator = torch.Generator().manual_seed(0)
    with open(root / "pairs.jsonl", "w") as f:
        for i in range(24):
            color = torch.randint(0, 255, (3,), generator=generator).tolist()
            Image.new("RGB", (40, 32), tuple(color)).save(root / f"{i}.png")
            captions = [" ".join(words[j] for j in torch.randint(0, len(words), (5,), generator=generator))
                        for _ in range(2)]
            f.write(json.dumps({"image": f"{i}.png", "split": "train" if i < 16 else "val", "caption": captions})
                    + "\n")
    return root


SMALL = ("--image_size 32 --width 24 --vision_layers 1 --text_layers 1 --heads 2 --max_text 8 --queue_size 16 "
         "--batch_size 4 --steps 3 --log_every 1 --workers 0 --eval_split val").split()


def test_train_and_evaluate(photos, tmp_path):
    data = ["--data", str(photos / "pairs.jsonl"), "--image_root", str(photos), "--vocab", str(photos / "vocab.txt")]
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    result = train.main(["--model", "conlip", *SMALL, *data, "--out", str(run), "--limit", "12"])
    assert 0 <= result["retrieval"]["metrics"]["t2i_r10"] <= 100
    logs = [json.loads(line) for line in open(run / "log.jsonl")]
    assert len(logs) == 3 and all(math.isfinite(line["mim"]) for line in logs)
    assert json.loads((run / "config.json").read_text())["loop"]["limit"] == 12

    found = evaluation.main([str(run), "--task", "cross_attention"])["cross_attention"]
    again = evaluation.main([str(run), "--task", "cross_attention"])["cross_attention"]
    assert found["metrics"] == again["metrics"] and found["protocol"]["split"] == "val"
    assert abs(found["metrics"]["text -> h_cls of the image, uniform"] - 1 / 5) < 1e-6  # 32 pixels: 4 patches and h_cls

    caption = json.loads(open(photos / "pairs.jsonl").read().splitlines()[17])["caption"][1]
    shown = evaluation.main([str(run), "--task", "gallery", "--text", caption,
                             "--image", str(photos / "20.png")])["gallery"]
    assert 1 <= shown["metrics"]["rank of the true image"] <= 8 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert len(shown["rows"]) == 10 and Image.open(run / "gallery.png").width > 900
    top = [row["rank"] for row in shown["rows"][:5] if row["true"] == "yes"]
    assert top == ([shown["metrics"]["rank of the true image"]]
                   if shown["metrics"]["rank of the true image"] <= 5 else [])
    shown = evaluation.main([str(run), "--task", "gallery", "--text", "no caption of theirs"])["gallery"]
    assert shown["metrics"]["rank of the true image"] is None and {row["true"] for row in shown["rows"]} == {"unknown"}
    for args, message in (([], "ask with a text"), (["--image", "nowhere.png"], "nowhere.png")):
        with pytest.raises(SystemExit, match=message):
            evaluation.main([str(run), "--task", "gallery", *args])

    train.main(["--model", "conlip", "--task", "retrieval", *SMALL, *data, "--init", str(run), "--out", str(tuned),
                "--image_size", "48"])
    assert (tuned / "eval-retrieval.json").exists()
    with pytest.raises(SystemExit, match="does not offer it.*it offers: retrieval, gallery"):
        evaluation.main([str(tuned), "--task", "cross_attention"])


@pytest.mark.parametrize("name", ["codis", "cookie", "mct"])
def test_gallery_of_the_other_two_tower_models(name, photos, tmp_path):
    """`--steps 0` writes the run of an untrained model."""
    train.main(["--model", name, "--data", str(photos / "pairs.jsonl"), "--image_root", str(photos),
                "--vocab", str(photos / "vocab.txt"), "--batch_size", "8", "--workers", "0", "--steps", "0",
                "--evals", "none", "--out", str(tmp_path / "run")])
    shown = evaluation.main([str(tmp_path / "run"), "--task", "gallery", "--split", "val",
                             "--text", "a red square", "--image", str(photos / "20.png")])["gallery"]
    assert len(shown["rows"]) == 10 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert list(tmp_path.rglob("gallery.png"))


def test_ablations_train(photos, tmp_path):
    data = ["--data", str(photos / "pairs.jsonl"), "--image_root", str(photos), "--vocab", str(photos / "vocab.txt")]
    for flags in ("--mlm none --mim none --contrast infonce", "--mlm vanilla --mim vanilla --positive online",
                  "--mask_unit 2 --head_layers 2 --head_shared --mim_prob 0.7 --mlm_prob 0.4 "
                  "--checkpointing --accum 2"):
        train.main(["--model", "conlip", *SMALL, *data, *flags.split(), "--evals", "none",
                    "--out", str(tmp_path / "run")])
        assert math.isfinite(json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["loss"])


def test_pixel_head_and_mask_token_start_small():
    """Whatever the towers start with: at tiny's 0.08 ConMIM ended in one guess for all patches."""
    torch.manual_seed(0)
    model = ConLIP(small(init_std=0.08), "pretrain")
    assert model.mim_head.weight.std() < 0.03 and model.mask_token.std() < 0.03 < model.vision.pos_embed.std()
