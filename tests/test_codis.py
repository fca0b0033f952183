"""models/codis.py against the paper, written down a second time with explicit loops in float64.

The references below go pair by pair and letter by letter through equations 1-9 and Algorithms 1
and 2, read as the file's Deviations say. They are float64 tensors, so that autograd gives the
reference of every gradient as well. The towers are written a second time too (class Paper), from
the names of the weights alone, so that a whole step of every task can be done by hand.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train
from models import codis
from models.codis import (Codis, Config, QueueContrast, align_loss, attention_mask, enqueue_,
                          hard_negatives, ipot, mask_tokens)
from tools import weights

LABELS = {"ve": 3, "nlvr2": 2}  # num_labels of the tasks that classify


# --------------------------------------------------------------------------------------------------
# Small models and batches

def small(**over):
    """A Config of which no two sizes are equal, so that a mixed-up axis is an error."""
    sizes = dict(image_size=32, patch=16, vision_width=24, vision_layers=1, vision_heads=3,
                 width=32, text_layers=1, fusion_layers=2, heads=4, mlp_ratio=2, dropout=0.0,
                 embed_dim=16, max_text=11, positions=14, vocab_size=57, pad_id=0, cls_id=2,
                 sep_id=3, mask_id=4, first_word=6, queue_size=21, codewords=10, ot_iters=20)
    return Config(**{**sizes, **over})


# numbers that no default has, for steps by hand; the queue's pointer stands before its end
ODD = dict(pad_id=1, momentum=0.9, temp=0.11, distill=0.35, mlm_prob=0.6, mlm_distill=0.3,
           ot_eps=0.3, ot_iters=3, ot_inner=2, first_word=8, queue_chunk=5, max_answer=6)
IDS_BY_HAND = [3, 5, 3, 20, 21]         # two captions of image 3; images 3 and 5 are in the queue


def sentences(cfg, b):
    """[CLS], words, [SEP], padding; (b, max_text) ids and mask.

    The first sentence has a single word, the last is full.
    """
    text = torch.full((b, cfg.max_text), cfg.pad_id)
    mask = torch.zeros(b, cfg.max_text, dtype=torch.long)
    for i, n in enumerate(torch.linspace(1, cfg.max_text - 2, b).long().tolist()):
        words = torch.randint(cfg.first_word, cfg.vocab_size, (n,)).tolist()
        text[i, :n + 2] = torch.tensor([cfg.cls_id, *words, cfg.sep_id])
        mask[i, :n + 2] = 1
    return text, mask


def make_batch(cfg, task="pretrain", b=4, ids=None):
    """A random batch with the keys that VIEWS[task] asks for.

    A new view needs a line here, a new task none.
    """
    image_id = torch.arange(b) + 7 if ids is None else torch.tensor(ids)
    batch = {"image_id": image_id, "index": torch.arange(b)}
    for key, view in codis.VIEWS[task].items():
        if key in ("source", "norm") or key.endswith("_eval"):
            continue
        if key.startswith("image"):
            batch[key] = torch.randn(b, 3, cfg.image_size, cfg.image_size)
        elif view in ("caption", "paraphrase", "question", "answer"):
            batch[key], batch[key + "_mask"] = sentences(cfg, b)
            if view == "answer":
                batch[key + "_weight"] = torch.rand(b)
        elif view == "label":
            batch[key] = torch.arange(b) % LABELS[task]
        else:
            raise NotImplementedError(f"make_batch: no values for the view {view} of key {key}")
    return batch


def make_model(cfg=None, task="pretrain", fill=True, **over):
    """A model in training mode whose teachers and queues (ids 0..9 and -1) are not those of step 0,
    and whose ramps stand at 0.6 and 0.3."""
    cfg = cfg or small(**over)
    model = Codis(cfg, task, LABELS.get(task, 0)).train()
    with torch.no_grad():
        for p in model.parameters():  # larger than at birth, else all embeddings are alike
            p.mul_(8.0 if p.ndim > 1 else 1.0).add_(torch.randn_like(p) * 0.02)
        if fill and hasattr(model, "queue_ids"):
            for p in model.parameters():
                p.add_(0 if p.requires_grad else torch.randn_like(p) * 0.02)
            model.queue_ids.copy_(torch.arange(cfg.queue_size) % 11 - 1)
            model.distill.fill_(0.3)
            model.ramp.fill_(0.6)
            model.ptr.fill_(cfg.queue_size - 2)
            if hasattr(model, "codebook"):
                model.codebook.copy_(F.normalize(model.codebook, dim=-1))
    return model


def units(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def clusters(n, d, k=3, spread=0.02):
    """(n, d) unit vectors around k centres."""
    return F.normalize(units(k, d)[torch.arange(n) % k] + spread * torch.randn(n, d), dim=-1)


def close(a, b, tol=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------
# The paper, with loops, in float64

def log_softmax(scores):
    """A list of 0-d tensors -> a list of 0-d tensors. The largest score is taken out,
    or exp() overflows at gamma = 0.001."""
    top = max(s.item() for s in scores)
    log_total = top + torch.log(sum(torch.exp(s - top) for s in scores))
    return [s - log_total for s in scores]


def softmax(scores):
    return [torch.exp(x) for x in log_softmax(scores)]


def similarities(z, keys, temp):
    return [(z * k).sum() / temp for k in keys]


def cross_entropy(scores, t):
    """H(softmax(scores), t) of Algorithm 1, one row; no gradient through the target."""
    return -sum(torch.as_tensor(t_j).item() * log_p for log_p, t_j in zip(log_softmax(scores), t))


def mean(rows):
    return sum(rows) / len(rows)


def doubles(*tensors):
    return [x.double() for x in tensors]


def algorithm2(cost, eps, iters, inner=1):
    """Algorithm 2 as printed, mu = 1/N and nu = 1/K. Lists of floats.

    sigma = 1/K has length K, the inner loop runs `inner` times.
    """
    n, k = len(cost), len(cost[0])
    sigma, T = [1 / k] * k, [[1.0] * k for _ in range(n)]
    A = [[math.exp(-cost[i][j] / eps) for j in range(k)] for i in range(n)]
    for _ in range(iters):
        Q = [[A[i][j] * T[i][j] for j in range(k)] for i in range(n)]
        for _ in range(inner):
            delta = [1 / n / sum(Q[i][j] * sigma[j] for j in range(k)) for i in range(n)]
            sigma = [1 / k / sum(Q[i][j] * delta[i] for i in range(n)) for j in range(k)]
        T = [[delta[i] * Q[i][j] * sigma[j] for j in range(k)] for i in range(n)]
    return T


def cosine_cost(z, c):
    """D_ij = 1 - cos(z_i, c_j) of unit vectors: a list of lists of 0-d tensors."""
    return [[1 - (z_i * c_j).sum() for c_j in c] for z_i in z]


def plan_of(z, c, cfg):
    cost = [[x.item() for x in row] for row in cosine_cost(z, c)]
    return algorithm2(cost, cfg.ot_eps, cfg.ot_iters, cfg.ot_inner)


def eq1(T, D):
    return sum(T[i][j] * D[i][j] for i in range(len(T)) for j in range(len(T[0])))


def eq2(z, c, T, temp):
    rows = []
    for i in range(len(z)):
        total = sum(T[i])
        rows.append(cross_entropy(similarities(z[i], c, temp), [t / total for t in T[i]]))
    return mean(rows)


def eq5(z, z_m, ids, keys, key_ids, temp, distill):
    """One direction, the rows of Eq. 5.

    y = distill * the teacher's p + (1 - distill) * (1 / number of keys of the same image).
    """
    distill, rows = float(distill), []
    for i in range(len(z)):
        student, teacher = similarities(z[i], keys, temp), softmax(similarities(z_m[i], keys, temp))
        same = [int(key_id) == int(ids[i]) for key_id in key_ids]
        if all(same):
            rows.append(0 * z[i].sum())  # nothing to contrast with
        elif not any(same):
            rows.append(cross_entropy(student, teacher))
        else:
            share = (1 - distill) / sum(same)
            y = [distill * t + share * s for t, s in zip(teacher, same)]
            rows.append(cross_entropy(student, y))
    return rows


def picked(logits, labels):
    """Mean of -log softmax(logits)[label] where it is not -100; logits: (rows, classes)."""
    return mean([-log_softmax(list(row))[int(label)] for row, label in zip(logits, labels)
                 if label != -100])


# --------------------------------------------------------------------------------------------------
# The model a second time

class Paper:
    """The model from its weights alone, in float64: one picture, sentence, query and head a time.

    Sentences are lists of ids without padding. `drop` and `drop_attention` are factors, which stand
    where BERT has dropout: nowhere in image encoders and teachers.
    """

    def __init__(self, model, drop=1.0, drop_attention=1.0):
        self.cfg, self.drop, self.drop_attention = model.cfg, drop, drop_attention
        self.weights, self.maps = {}, {}
        for name, x in model.state_dict(keep_vars=True).items():
            self.weights[name] = x.double() if x.is_floating_point() else x

    def linear(self, name, x):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, name, x, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def act(self, x):
        if self.cfg.act == "relu":
            return x * (x > 0)
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def factor(self, name, value):
        return 1.0 if name.startswith("vision") or "_m." in name else value

    def attend(self, name, x, context=None, causal=False):
        """x (S, D) looks at itself, or at a context (L, C) -> (S, D). maps[name]: probabilities."""
        if context is None:
            query, key, value = self.linear(name + ".qkv", x).chunk(3, -1)
        else:
            query = self.linear(name + ".query", x)
            key, value = self.linear(name + ".key_value", context).chunk(2, -1)
        heads = self.cfg.vision_heads if name.startswith("vision") else self.cfg.heads
        size, rows, self.maps[name] = query.shape[1] // heads, [], []
        for s in range(len(query)):
            seen, parts = s + 1 if causal else len(key), []
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                scores = key[:seen, own] @ query[s, own] / math.sqrt(size)
                p = (scores - scores.detach().max()).exp()
                p = p / p.sum()
                self.maps[name].append(p)
                parts.append(p @ value[:seen, own])
            rows.append(torch.cat(parts))
        rows = torch.stack(rows) * self.factor(name, self.drop_attention)
        return self.linear(name + ".out", rows)

    def image(self, pixels, m=""):
        """(3, H, W) -> (P+1, D), the class token first."""
        cfg, size, stem = self.cfg, self.cfg.patch, f"vision{m}.patch_embed"
        pixels = pixels.double()
        if cfg.stem == "patch":
            corners = itertools.product(range(0, cfg.image_size, size), repeat=2)
            patches = [pixels[:, i:i + size, j:j + size].flatten() for i, j in corners]
            kernel = self.weights[stem + ".weight"].flatten(1)
            x = torch.stack(patches) @ kernel.T + self.weights[stem + ".bias"]
        else:
            x = pixels[None]
            for layer, stride, padding in ((0, size // 4, 0), (2, 2, 1), (4, 2, 1)):
                kernel, bias = (self.weights[f"{stem}.{layer}.{kind}"]
                                for kind in ("weight", "bias"))
                x = F.conv2d(x if layer == 0 else self.act(x), kernel, bias, stride, padding)
            x = x[0].flatten(1).T
        x = torch.cat([self.weights[f"vision{m}.cls_token"][0], x])
        x = x + self.weights[f"vision{m}.pos_embed"][0]
        for n in range(cfg.vision_layers):
            name = f"vision{m}.blocks.{n}"
            x = x + self.attend(name + ".attention", self.norm(name + ".attention_norm", x, 1e-6))
            hidden = self.act(self.linear(name + ".mlp.0", self.norm(name + ".mlp_norm", x, 1e-6)))
            x = x + self.linear(name + ".mlp.2", hidden)
        return self.norm(f"vision{m}.norm", x, 1e-6)

    def layer(self, name, x, context=None, causal=False):
        """A layer of BERT's: each part is added, then the sum is normalised."""
        drop = self.factor(name, self.drop)
        change = self.attend(name + ".attention", x, causal=causal)
        x = self.norm(name + ".attention_norm", x + drop * change, 1e-12)
        if context is not None:
            change = self.attend(name + ".cross", x, context)
            x = self.norm(name + ".cross_norm", x + drop * change, 1e-12)
        change = self.linear(name + ".mlp.2", self.act(self.linear(name + ".mlp.0", x)))
        return self.norm(name + ".mlp_norm", x + drop * change, 1e-12)

    def words(self, ids, m=""):
        """BERT's input: word + position + segment -> (T, D)."""
        name = f"text{m}.embeddings"
        words, positions, segments = (self.weights[f"{name}.{part}.weight"]
                                      for part in ("words", "positions", "segments"))
        x = torch.stack([words[i] + positions[n] + segments[0] for n, i in enumerate(ids)])
        return self.norm(name + ".norm", x, 1e-12) * self.factor(name + ".", self.drop)

    def text(self, ids, m=""):
        x = self.words(ids, m)
        for n in range(self.cfg.text_layers):
            x = self.layer(f"text{m}.blocks.{n}", x)
        return x

    def fuse(self, text, *images, m=""):
        """Tokens of a sentence -> (T, D). Of two images layers 0, 2, ... look at the first."""
        for n in range(self.cfg.fusion_layers * len(images)):
            text = self.layer(f"fusion{m}.blocks.{n}", text, images[n % len(images)])
        return text

    def word_logits(self, x, m=""):
        """BERT's prediction of words (..., D) -> (..., V), with the embeddings' weights."""
        x = self.act(self.linear(f"mlm_head{m}.transform.0", x))
        x = self.norm(f"mlm_head{m}.transform.2", x, 1e-12)
        words = self.weights[f"text{m}.embeddings.words.weight"]
        return x @ words.T + self.weights[f"mlm_head{m}.bias"]

    def emb(self, side, tokens, m=""):
        """[CLS], projected, at unit length."""
        z = self.linear(f"{side}_proj{m}", tokens[0])
        return z / z.square().sum().sqrt()

    def classes(self, fused):
        """The two-layer head of VE and NLVR2 on [CLS]."""
        hidden = self.linear("cls_head.0", fused[0])
        return self.linear("cls_head.2", hidden * (hidden > 0))

    def answer_logits(self, answer, question):
        """The decoder on the first tokens of an answer (L,) -> (L, V). question: fused (T, D)."""
        x = self.words(answer)
        for n in range(self.cfg.fusion_layers):
            x = self.layer(f"decoder.blocks.{n}", x, question, causal=True)
        return self.word_logits(x)

    def answer_logp(self, answer, question):
        """log p(answer | question), token by token."""
        logits = self.answer_logits(answer[:-1], question)
        return sum(log_softmax(list(row))[word] for row, word in zip(logits, answer[1:]))


def without_padding(batch, key="text"):
    """[ids of each sentence]"""
    return [[int(i) for i, real in zip(*row) if real] for row in zip(batch[key],
                                                                     batch[key + "_mask"])]


def embed(paper, batch):
    """Tokens of images and of sentences; embeddings (B, d) of students and teachers."""
    texts = without_padding(batch)
    image, text = [paper.image(x) for x in batch["image"]], [paper.text(ids) for ids in texts]
    z_v = torch.stack([paper.emb("vision", x) for x in image])
    z_t = torch.stack([paper.emb("text", x) for x in text])
    m_v = torch.stack([paper.emb("vision", paper.image(x, "_m"), "_m") for x in batch["image"]])
    m_t = torch.stack([paper.emb("text", paper.text(ids, "_m"), "_m") for ids in texts])
    return image, text, z_v, z_t, m_v.detach(), m_t.detach()


@contextlib.contextmanager
def recorded():
    """-> {function: [what it drew, call by call]}, for references that need the same dice."""
    draws = {name: [] for name in ("rand", "randint", "randperm", "exponential_")}

    def keep(owner, name):
        draw = getattr(owner, name)

        def run(*args, **kwargs):
            drawn = draw(*args, **kwargs)
            draws[name].append(drawn.clone())
            return drawn
        return mock.patch.object(owner, name, run)

    with contextlib.ExitStack() as stack:
        for name in draws:
            stack.enter_context(keep(torch.Tensor if name.endswith("_") else torch, name))
        yield draws


def drawn_stranger(sim, ids, noise):
    """For each row of sim (B, B) a column of another image, drawn with probability softmax(sim).

    p_j / E_j is the largest with probability p_j, where E_j are exponential. None: there is none.
    """
    found = []
    for i, row in enumerate(sim.tolist()):
        others = [j for j in range(len(row)) if ids[j] != ids[i]]
        race = {j: math.exp(row[j] - max(row)) / noise[i][j] for j in others}
        found.append(max(race, key=race.get, default=None))
    return found


def masked_by_hand(cfg, ids, order, dice, noise):
    """Section 3.3.2 for one sentence -> its ids with masked words, {position: the true word}.

    The words with the highest numbers in `order` are chosen; dice and noise: theirs, in that order.
    """
    places = [n for n, i in enumerate(ids) if i not in (cfg.cls_id, cfg.sep_id)]
    count = min(len(places), max(1, round(cfg.mlm_prob * len(places))))
    places = sorted(places, key=lambda n: -order[n])[:count]
    ids, truth = list(ids), {n: ids[n] for n in places}
    for n, number, word in zip(places, dice, noise):
        if cfg.mlm_mask_only or number < 0.8:
            ids[n] = cfg.mask_id
        elif number < 0.9:
            ids[n] = word
    return ids, truth


def itm_by_hand(paper, batch, draws, image, text, z_v, z_t):
    """Eq. 7: the pairs, each image with a text of another image, each text with another image."""
    ids, temp = batch["image_id"].tolist(), paper.weights["log_temp"].exp()
    sim = (z_v @ z_t.T / temp).detach()
    images = drawn_stranger(sim.T, ids, draws["exponential_"][0].tolist())
    texts = drawn_stranger(sim, ids, draws["exponential_"][1].tolist())
    pairs = [(i, i, 1) for i in range(len(ids))]
    pairs += [(i, j, 0) for i, j in enumerate(texts) if j is not None]
    pairs += [(i, j, 0) for j, i in enumerate(images) if i is not None]
    assert all(ids[i] != ids[j] for i, j, label in pairs if not label)
    logits = [paper.linear("itm_head", paper.fuse(text[j], image[i])[0]) for i, j, _ in pairs]
    return picked(torch.stack(logits), [label for _, _, label in pairs])


def mlm_by_hand(model, paper, batch, draws, image):
    """Eq. 8, and the teacher's share of it."""
    cfg, hard, soft_rows = paper.cfg, [], []
    rows = zip(without_padding(batch), *(draws["rand"][n].tolist() for n in (0, 1)),
               draws["randint"][0].tolist() if draws["randint"] else itertools.repeat([0] * 99))
    for i, (ids, order, dice, noise) in enumerate(rows):
        masked, truth = masked_by_hand(cfg, ids, order, dice, noise)
        logits = paper.word_logits(paper.fuse(paper.text(masked), image[i]))
        hard += [-log_softmax(list(logits[n]))[word] for n, word in truth.items()]
        if cfg.mlm_distill:
            x = paper.fuse(paper.text(masked, "_m"), paper.image(batch["image"][i], "_m"), m="_m")
            teacher = paper.word_logits(x, "_m").detach()
            soft_rows += [cross_entropy(list(logits[n]), softmax(list(teacher[n]))) for n in truth]
    assert len(hard) > len(image)                       # more than one word a sentence
    if not cfg.mlm_distill:
        return mean(hard)
    a = float(model.ramp) * cfg.mlm_distill
    return (1 - a) * mean(hard) + a * mean(soft_rows)


def directions(model, z_v, z_t, m_v, m_t):
    """Eq. 5's four directions: (name, student, its teacher, the batch's keys, the queue)."""
    image, text = model.queue_image, model.queue_text
    yield "i2t", z_v, m_v, m_t, text
    yield "t2i", z_t, m_t, m_v, image
    yield "i2i", z_v, m_v, m_v, image
    yield "t2t", z_t, m_t, m_t, text


def eq5_by_hand(model, batch, z_v, z_t, m_v, m_t):
    """{direction: Eq. 5}, with the keys of batch and queue."""
    cfg, ids, losses = model.cfg, batch["image_id"], {}
    for name, z, m, own, queue in directions(model, z_v, z_t, m_v, m_t):
        keys, key_ids = queue.double(), model.queue_ids
        if cfg.batch_keys:
            keys, key_ids = torch.cat([own, keys]), torch.cat([ids, key_ids])
        if cfg.intra or name in ("i2t", "t2i"):
            temp = model.log_temp.double().exp()
            losses[name] = mean(eq5(z, m, ids, keys, key_ids, temp, model.distill))
    return losses


def eq3_by_hand(model, paper, z_v, z_t, m_v, m_t):
    """The codebook's losses {"ot", "tp", "ip"}."""
    cfg, c, temp = model.cfg, paper.weights["codebook"], paper.weights["log_temp"].exp()
    f_v, f_t = m_v, m_t
    if cfg.codebook_features == "student":
        f_v, f_t = z_v.detach(), z_t.detach()
    T_v, T_t = plan_of(f_v, c, cfg), plan_of(f_t, c, cfg)
    guide_t, guide_v = (T_v, T_t) if cfg.codebook_target == "cross" else (T_t, T_v)
    return {"ot": eq1(T_v, cosine_cost(f_v, c)) + eq1(T_t, cosine_cost(f_t, c)),
            "tp": eq2(z_t, c, guide_t, temp), "ip": eq2(z_v, c, guide_v, temp)}


def eq9(model, batch, draws, paper=None):
    """Every term of Eq. 9 by the equations -> {name: 0-d}, the teachers' keys (image, text)."""
    paper = paper or Paper(model)
    image, text, *z = embed(paper, batch)
    losses = {"itm": itm_by_hand(paper, batch, draws, image, text, *z[:2]),
              "mlm": mlm_by_hand(model, paper, batch, draws, image)}
    losses |= eq5_by_hand(model, batch, *z)
    if model.cfg.codebook:
        losses |= eq3_by_hand(model, paper, *z)
    return losses, z[2:]


def gradients(loss, model):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values(), retain_graph=True)))


def same_losses(out, reference, model, tol=2e-5):
    """Each loss, what is optimized, and the gradient of every parameter."""
    for name in reference:
        close(out["logs"][name], reference[name], tol)
    assert set(out["logs"]) - set(reference) <= {"temp", "codebook_ppl"}
    total = sum(reference.values())
    close(out["loss"], total)
    same_gradients(gradients(out["loss"], model), gradients(total, model))


def nearest_stranger(sim, ids):
    """In place of hard_negatives(): the most similar column of another image, without dice."""
    best = sim.float().masked_fill(ids[:, None] == ids, -math.inf).argmax(1)
    return best, (ids[:, None] != ids).any(1)


def same_mask(*args, draw=mask_tokens, **kwargs):
    """mask_tokens(), the same dice each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return draw(*args, **kwargs)


no_dice = mock.patch.multiple(codis, hard_negatives=nearest_stranger, mask_tokens=same_mask)


def fuse(model, tokens, mask, image_tokens):
    """(B, T, D) sentences, each with its own image -> (B, T, D)."""
    return model.fusion(tokens, attention_mask(mask), model.fusion.contexts(image_tokens))


def same_gradients(a, b, tol=2e-4):
    assert a.keys() == b.keys() and a
    for name in a:
        scale = b[name].abs().max().clamp(min=1e-4)
        assert (a[name] - b[name]).abs().max() <= tol * scale, (name, a[name], b[name])


# --------------------------------------------------------------------------------------------------
# Equations 1-9

def test_codis_eq1():
    plan, cost = torch.rand(2, 5, 7).double(), torch.rand(2, 5, 7).double()
    expected = [float(eq1(T, D)) for T, D in zip(plan.tolist(), cost.tolist())]
    close(codis.ot_loss(plan, cost), expected, 1e-12)
    # The minimum over plans: with N = K it stands at a permutation.
    cost = (1 - units(5, 4) @ units(5, 4).T).double()
    best = min(sum(cost[i, j].item() for i, j in enumerate(order)) / 5
               for order in itertools.permutations(range(5)))
    found = codis.ot_loss(ipot(cost, eps=0.1, iters=200), cost).item()
    assert best - 1e-5 < found < best + 1e-3 and found < cost.mean()


def test_codis_eq2():
    z, c, plan, temp = (units(5, 4).requires_grad_(), units(7, 4).requires_grad_(),
                        torch.rand(5, 7) / 35, torch.tensor(0.2))
    temp.requires_grad_()
    ours = codis.codebook_loss(z, c, plan, temp)
    reference = eq2(*doubles(z, c), plan.double().tolist(), temp.double())
    close(ours, reference)
    expected = torch.autograd.grad(reference, (z, c, temp))
    for a, b in zip(torch.autograd.grad(ours, (z, c, temp)), expected):
        close(a, b, 1e-4)


def test_codis_codebook_perplexity():
    """1 where all choose one codeword, K where each is chosen as often as another."""
    codes, temp = torch.eye(6), torch.tensor(0.001)
    close(codis.codebook_perplexity(codes[:1].expand(9, -1), codes, temp), 1.0)
    close(codis.codebook_perplexity(codes, codes, temp), 6.0)
    close(codis.codebook_perplexity(codes[:3], codes, temp), 3.0)


@pytest.mark.parametrize("target", ["cross", "same"])
def test_codis_eq3(target):
    model = make_model(codebook_target=target)
    z_v, z_t, m_v, m_t = units(4, 6, 16)
    ours = model.code_losses(z_v, z_t, m_v, m_t)
    c, temp = model.codebook.double(), model.temp.double()
    T_v, T_t = plan_of(m_v.double(), c, model.cfg), plan_of(m_t.double(), c, model.cfg)
    ot = eq1(T_v, cosine_cost(m_v.double(), c)) + eq1(T_t, cosine_cost(m_t.double(), c))
    reference = {"ot": ot,
                 "tp": eq2(z_t.double(), c, T_v if target == "cross" else T_t, temp),
                 "ip": eq2(z_v.double(), c, T_t if target == "cross" else T_v, temp)}
    assert ours.keys() == reference.keys()
    for name in ours:
        close(ours[name], reference[name])
        close(torch.autograd.grad(ours[name], model.codebook)[0],
              torch.autograd.grad(reference[name], model.codebook)[0], 1e-4)


def test_codis_eq4():
    """Without a teacher, and with one key an image, a row's loss is -log p of its image's key."""
    z, keys, temp, none = units(5, 4), units(9, 4), torch.tensor(0.07), torch.tensor(0.0)
    blocks = [(keys, torch.arange(9))]
    losses = [align_loss(z, units(5, 4), torch.full((5,), j), blocks, temp, none) for j in range(9)]
    p = torch.stack(losses, 1).neg().exp()                                          # (5, 9)
    z, keys, temp = doubles(z, keys, temp)
    close(p, [[float(x) for x in softmax(similarities(row, keys, temp))] for row in z])
    close(p.sum(1), torch.ones(5))


def contrast_case(kind):
    """z, z_m, ids, temp, distill and the key blocks of one case: [(keys, key_ids), ...]."""
    r, d = 6, 5
    ids, own, queue = torch.arange(r), torch.arange(r), torch.randint(-1, 3, (17,))
    if kind == "repeats":
        ids = own = torch.tensor([0, 1, 0, 2, 2, 5])
    if kind == "no positive":
        # only images 1 and 2 are among the keys
        own, queue = torch.full((r,), -1), torch.where(queue == 0, -1, queue)
    if kind == "no negative":
        ids = own = torch.tensor([3, 3, 3, 3, 3, 4])
        queue = torch.full((17,), 3)  # image 4 has negatives and, in the first block, one positive
        own = torch.where(own == 4, 3, own)
    if kind == "one row":
        ids = own = torch.tensor([0])
    r = len(ids)
    blocks = [(units(r, d), own), (units(17, d), queue),
              (units(3, d), torch.full((3,), -1 if kind != "no negative" else 3))]
    return units(r, d), units(r, d), ids, torch.tensor(0.11), torch.tensor(0.4), blocks


@codis.full_precision
def plain_align_loss(z, z_m, ids, keys, key_ids, temp, distill):
    """Eq. 5 in one direction with whole matrices: what align_loss() computes in a stream."""
    same = (ids[:, None] == key_ids).float()                                        # (R, M)
    count = same.sum(-1, keepdim=True)
    a = torch.where(count > 0, distill, 1.0)
    teacher = (z_m.float() @ keys.float().T / temp).softmax(-1).detach()
    y = a * teacher + (1 - a) * same / count.clamp(min=1)
    loss = -(y * (z.float() @ keys.float().T / temp).log_softmax(-1)).sum(-1)
    return loss * (count.squeeze(-1) < len(keys))


KINDS = ["plain", "repeats", "no positive", "no negative", "one row"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distill", [0.0, 0.4, 1.0])
def test_codis_eq5(kind, distill):
    z, z_m, ids, temp, _, blocks = contrast_case(kind)
    keys, key_ids = (torch.cat(x) for x in zip(*blocks))
    z, temp = z.requires_grad_(), temp.requires_grad_()
    ours = align_loss(z, z_m, ids, blocks, temp, torch.tensor(distill))
    reference = torch.stack(eq5(*doubles(z, z_m), ids, keys.double(), key_ids,
                                temp.double(), distill))
    close(ours, reference)
    weights = torch.rand(len(z))
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), (z, temp)),
                    torch.autograd.grad((reference * weights).sum(), (z, temp))):
        close(a, b, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 5, 17, 100])
def test_codis_eq5_queue_contrast(kind, chunk):
    """The streamed form equals the plain one in values and gradients, for any chunks and blocks."""
    z, z_m, ids, temp, distill, blocks = contrast_case(kind)
    keys, key_ids = (torch.cat(x) for x in zip(*blocks))
    z, temp, weights = z.requires_grad_(), temp.requires_grad_(), torch.rand(len(z))
    for a in (distill, torch.tensor(0.0), torch.tensor(1.0)):
        plain = plain_align_loss(z, z_m, ids, keys, key_ids, temp, a)
        expected = torch.autograd.grad((plain * weights).sum(), (z, temp))
        for split in (blocks, blocks[::-1], [(keys, key_ids)]):
            ours = align_loss(z, z_m, ids, split, temp, a, chunk)
            close(ours, plain)
            for x, y in zip(torch.autograd.grad((ours * weights).sum(), (z, temp)), expected):
                close(x, y, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_codis_eq5_gradcheck(kind):
    """In float64. The target is a constant to the gradient, not to finite differences: temp needs a
    teacher that it leaves alone."""
    z, z_m, ids, temp, distill, blocks = contrast_case(kind)
    z, z_m, temp, distill = doubles(z, z_m, temp, distill)
    flat = [x.double() if x.is_floating_point() else x for block in blocks for x in block]

    def ours(z, temp, z_m):
        return QueueContrast.apply(z, z_m, ids, temp, distill, 4, *flat)

    assert ours(z, temp, z_m).dtype == torch.float64
    assert torch.autograd.gradcheck(ours, (z.requires_grad_(), temp, z_m))
    assert torch.autograd.gradcheck(ours, (z, temp.requires_grad_(), torch.zeros_like(z_m)))


def test_codis_eq6():
    teacher, student = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    expected = [[0.9 * t + 0.1 * s for t, s in zip(a.flatten().tolist(), b.flatten().tolist())]
                for a, b in zip(teacher, student)]
    kept = [s.clone() for s in student]
    codis.ema_(teacher, student, 0.9)
    for t, s, k, e in zip(teacher, student, kept, expected):
        close(t.flatten(), e, 1e-6)
        assert torch.equal(s, k)


def test_codis_eq7():
    logits, labels = torch.randn(8, 2).double(), torch.tensor([1, 1, 1, 0, 0, -100, 0, -100])
    close(codis.itm_loss(logits, labels), picked(logits, labels), 1e-6)
    assert codis.itm_loss(logits, torch.full((8,), -100)).isfinite()


def test_codis_eq8():
    logits, labels = (torch.randn(4, 3, 11).double(),
                      torch.tensor([[1, 2, 10], [0, -100, -100], [5, 5, -100], [-100, -100, -100]]))
    close(codis.mlm_loss(logits, labels), picked(logits.flatten(0, 1), labels.flatten()), 1e-6)
    assert codis.mlm_loss(logits, torch.full((4, 3), -100)).isfinite()


def same_memory(model, batch, out, keys, step=3, **length):
    """One step of training by hand: what goes into the queues, what the teachers become."""
    cfg, size = model.cfg, model.cfg.queue_size
    rings = {name: getattr(model, "queue_" + name).tolist() for name in ("image", "text", "ids")}
    start, teachers = int(model.ptr), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            teachers[name] = p.clone()

    # Algorithm 1: backward, update_queue, SGD, ema. The queues run over their end
    out["loss"].backward()
    model.after_backward(out)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, 0.1).step()
    model.after_step(step, 10, **length)

    new = {"image": keys[0].tolist(), "text": keys[1].tolist(), "ids": batch["image_id"].tolist()}
    for i in range(len(batch["image"])):
        for name in rings:
            rings[name][(start + i) % size] = new[name][i]
    for name in rings:
        close(getattr(model, "queue_" + name), rings[name])
    assert start + len(batch["image"]) > size
    assert model.ptr == (start + len(batch["image"])) % size

    # Eq. 6, of every parameter that has a teacher
    students = dict(model.named_parameters())
    parts = {name.split(".")[0].removesuffix("_m") for name in teachers}
    expected = {"vision", "text", "vision_proj", "text_proj"}
    assert parts == expected | ({"fusion", "mlm_head"} if hasattr(model, "fusion_m") else set())
    assert len(teachers) == sum(name.split(".")[0] in parts for name in students)
    a = cfg.momentum
    for name, old in teachers.items():
        close(students[name], a * old + (1 - a) * students[name.replace("_m.", ".", 1)], 1e-6)

    ramp = min(1, step / length.get("epoch_steps", 10))
    close([model.ramp, model.distill], [ramp, cfg.distill * ramp], 1e-6)
    if hasattr(model, "codebook"):
        close(model.codebook.norm(dim=-1), torch.ones(cfg.codewords), 1e-5)


@pytest.mark.parametrize("over", [
    dict(),
    dict(codebook_target="same", codebook_features="student", fusion_layers=1, batch_keys=False),
    dict(intra=False, mlm_mask_only=True, mlm_distill=0.0),
    dict(codebook=False, fusion_layers=3, vision_layers=2, text_layers=2, stem="conv",
         act="relu")])
def test_codis_eq9(over):
    """A step of pre-training by hand, with two captions of one image: each loss, the gradient of
    every parameter, the queues, the teachers."""
    model = make_model(**{**ODD, **over})
    batch = make_batch(model.cfg, b=5, ids=IDS_BY_HAND)
    with recorded() as draws:
        out = model(batch)
    reference, keys = eq9(model, batch, draws)
    same_losses(out, reference, model)
    same_memory(model, batch, out, keys, epoch_steps=4)


# --------------------------------------------------------------------------------------------------
# Algorithms 1, 2

def algorithm1(model, batch, draws):
    """Algorithm 1 line by line, with the readings of Eq. 1 for L_ot, of a softmaxed queue target
    and of N * T for a plan in H."""
    temp, n, paper = model.temp.double(), len(batch["image"]), Paper(model)
    image, text, img_s, txt_s, img_t, txt_t = embed(paper, batch)
    C, Qv, Qt = doubles(model.codebook, model.queue_image, model.queue_text)

    def H(s, t):
        return mean([cross_entropy(row, target) for row, target in zip(s, t)])

    def scores(z, keys):
        return [similarities(row, keys, temp) for row in z]

    def H_queue(student, teacher, queue):
        return H(scores(student, queue), [softmax(row) for row in scores(teacher, queue)])

    Tg, Tf = plan_of(img_t, C, model.cfg), plan_of(txt_t, C, model.cfg)
    L_ot = eq1(Tg, cosine_cost(img_t, C)) + eq1(Tf, cosine_cost(txt_t, C))
    L_code = L_ot
    for z, T in ((img_s, Tg), (txt_s, Tf)):
        L_code = L_code + H(scores(z, C), [[t / sum(row) for t in row] for row in T])
    L_cross = H_queue(img_s, img_t, Qt) + H_queue(txt_s, txt_t, Qv)
    L_unimo = H_queue(img_s, img_t, Qv) + H_queue(txt_s, txt_t, Qt)
    L_pretrain = itm_by_hand(paper, batch, draws, image, text, img_s, txt_s)
    L_pretrain = L_pretrain + mlm_by_hand(model, paper, batch, draws, image)
    # a plan far from its marginals would test nothing
    assert all(abs(sum(row) * n - 1) < 0.5 for row in Tg)
    return L_code + L_cross + L_unimo + L_pretrain, (img_t, txt_t)


def test_codis_alg1():
    """Loss, gradients, queues and teachers of one step in the printed form: same modality, teacher
    targets, queue only."""
    model = make_model(codebook_target="same", distill=1.0, batch_keys=False, momentum=0.9,
                       mlm_prob=0.5)
    model.distill.fill_(1.0)
    batch = make_batch(model.cfg)
    with recorded() as draws:
        out = model(batch)
    reference, keys = algorithm1(model, batch, draws)
    close(out["loss"], reference)
    same_gradients(gradients(out["loss"], model), gradients(reference, model))
    same_memory(model, batch, out, keys)


def soft(T):
    T = torch.as_tensor(T).double()
    return T / T.sum(1, keepdim=True)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("eps", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("features", [units, clusters])
def test_codis_alg2(features, eps, inner):
    for n, k, iters in ((13, 9, 50), (9, 13, 7), (40, 24, 50), (1, 6, 5), (6, 1, 5)):
        cost = 1 - features(n, 8) @ units(k, 8).T
        plan = ipot(cost, eps, iters, inner)
        expected = torch.tensor(algorithm2(cost.double().tolist(), eps, iters, inner))
        assert plan.shape == (n, k) and plan.dtype == torch.float32
        assert (soft(plan) - soft(expected)).abs().max() < 1e-4
        close(plan * n * k, expected * n * k, 1e-3)
        assert (plan.double().sum(0) * k - 1).abs().max() < 1e-5
    # codewords in the clusters' own places, so that whole groups of columns are tied
    z = features(24, 8)
    plan, cost = ipot(1 - z @ z[:12].T, eps, 50, inner), (1 - z @ z[:12].T).double().tolist()
    assert (soft(plan) - soft(algorithm2(cost, eps, 50, inner))).abs().max() < 1e-4


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5, 1.0])
def test_codis_alg2_is_finite(eps):
    for iters in (1, 2, 10, 50, 200):
        for z in (units(64, 16), clusters(64, 16, spread=1e-3), units(1, 16).expand(64, -1),
                  -clusters(64, 16, 1, 1e-4)):
            for c in (units(20, 16), clusters(20, 16, 2, 1e-3), z[:20]):
                plan = ipot(1 - z @ c.T, eps, iters)
                assert plan.isfinite().all() and (plan >= 0).all()
                assert (plan.double().sum(0) * 20 - 1).abs().max() < 1e-5
                labels = plan / plan.sum(1, keepdim=True)
                assert labels.isfinite().all(), "a row without mass has no soft label"
                assert codis.codebook_loss(z, c, plan, torch.tensor(0.07)).isfinite()


def test_codis_alg2_refuses_what_float32_cannot_hold():
    with pytest.raises(ValueError, match="eps is 0.04.*at least 0.05"):
        ipot(torch.ones(3, 4), eps=0.04)


def test_codis_alg2_batched_and_without_gradient():
    z, c = torch.stack([units(11, 8), clusters(11, 8)]), units(7, 8).requires_grad_()
    cost = 1 - z @ c.T
    plan = ipot(cost)
    assert not plan.requires_grad
    for both, one in zip(plan, cost):
        close(both, ipot(one), 1e-6)
    # d<T, D>/dC is -T'Z and nothing else
    expected = -sum(T.T @ x for T, x in zip(plan, z))
    close(torch.autograd.grad(codis.ot_loss(plan, cost).sum(), c)[0], expected, 1e-5)


# --------------------------------------------------------------------------------------------------
# Negatives

def test_codis_hard_negatives_never_the_same_image():
    ids = torch.tensor([0, 1, 0, 2, 1, 0])
    for sim in (torch.randn(6, 6), torch.eye(6) * 1e4, torch.randn(6, 6) * 1e4,
                torch.full((6, 6), -1e4), torch.randn(6, 6).bfloat16()):
        for _ in range(50):
            index, ok = hard_negatives(sim, ids)
            assert index.shape == (6,) and index.dtype == torch.long
            assert ok.dtype == torch.bool and ok.all()
            assert (ids[index] != ids).all()


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "assign"])
def test_codis_a_batch_of_one_is_refused(task):
    """It can have no negatives, now or later. (A batch of one image is chance, and counts.)"""
    model = make_model(task=task)
    with pytest.raises(SystemExit, match="--batch_size") as error:
        model(make_batch(model.cfg, task, b=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ids", [[5, 5], [5, 5, 5], [5, 5, 6]])
def test_codis_hard_negatives_without_candidates(ids):
    index, ok = hard_negatives(torch.randn(len(ids), len(ids)) * 100, torch.tensor(ids))
    assert ((0 <= index) & (index < len(ids))).all()
    assert ok.tolist() == [len(set(ids)) > 1] * len(ids)
    for autocast in (False, True):  # and the loss of such batches is a number
        model = make_model(fill=False, queue_size=5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(make_batch(model.cfg, b=len(ids), ids=ids))
        out["loss"].backward()
        assert all(x.isfinite() for x in out["logs"].values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_codis_hard_negatives_follow_the_softmax():
    sim, ids, n = (torch.tensor([[9.0, 1.0, 0.0, -1.0], [0.5, 9.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0],
                                 [0.0, -3.0, 1.0, 9.0]]),
                   torch.tensor([0, 1, 0, 2]), 4000)
    counts = sum(F.one_hot(hard_negatives(sim, ids)[0], 4) for _ in range(n))
    for i in range(4):
        weights = [math.exp(sim[i, j]) * (ids[i] != ids[j]).item() for j in range(4)]
        for j in range(4):
            p = weights[j] / sum(weights)
            assert abs(counts[i, j].item() / n - p) <= 4.5 * math.sqrt(p * (1 - p) / n)


def test_codis_itm_counts_only_pairs_that_exist():
    """In a batch with one image, Eq. 7 is the mean over the matched pairs."""
    model = make_model()
    batch = make_batch(model.cfg, b=3, ids=[4, 4, 4])
    out = model(batch)
    close(out["logs"]["itm"], mean([F.softplus(-s) for s in model.match(batch)]))


# --------------------------------------------------------------------------------------------------
# Masking

def masks(rows=6000, **over):
    """Random sentences of 1..20 words in 22 places: words are 30..1999, specials 0..4."""
    n = torch.randint(1, 21, (rows, 1))
    place = torch.arange(22)
    text = torch.where(place <= n, torch.randint(30, 2000, (rows, 22)), 0)
    text[:, 0] = 2
    text.scatter_(1, n + 1, 3)
    maskable = (place >= 1) & (place <= n)
    return n[:, 0], text, maskable, *mask_tokens(text, maskable, 4, 30, 2000, **over)


def test_codis_masking():
    n, text, maskable, masked, positions, labels = masks()
    assert positions.shape == labels.shape == (6000, 3)
    live = labels != -100
    chosen = torch.zeros_like(text)
    for i in range(len(text)):
        places = positions[i, live[i]].tolist()
        assert len(set(places)) == len(places) == max(1, round(0.15 * int(n[i])))
        assert labels[i, live[i]].tolist() == text[i, places].tolist()
        chosen[i, places] = 1
    chosen = chosen.bool()
    assert not (chosen & ~maskable).any()                           # neither specials nor pads
    assert torch.equal(masked[~chosen], text[~chosen])              # the rest untouched
    assert chosen.any(1).all()
    new, old = masked[chosen], text[chosen]
    count = len(new)
    random = (new != 4) & (new != old)
    assert ((new[random] >= 30) & (new[random] < 2000)).all()
    for share, p in (((new == 4), 0.8), (random, 0.1), ((new == old), 0.1)):
        assert abs(share.float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / count)
    words = new[random].float()                             # uniform over first_word..vocab_size-1
    assert (abs(words.mean() - 1014.5) < 4.5 * 1970 / math.sqrt(12 * len(words))
            and words.min() < 60 and words.max() > 1970)
    assert 0.13 < count / maskable.sum() < 0.18
    full = chosen[n == 20][:, 1:21].float().mean(0)         # every position as often as another
    assert (full - 0.15).abs().max() < 4.5 * math.sqrt(0.15 * 0.85 / (n == 20).sum())
    again = mask_tokens(text, maskable, 4, 30, 2000)[0]
    assert not torch.equal(masked, again)                   # drawn anew each time


def test_codis_masking_bounds_and_options():
    _, text, maskable, masked, positions, labels = masks(mask_only=True)
    assert (masked.gather(1, positions)[labels != -100] == 4).all()
    assert mask_tokens(text, maskable, 4, 30, 2000, prob=0.5)[1].shape == (6000, 11)
    assert (masks(mask_only=False, prob=1e-6)[5] != -100).sum(1).eq(1).all()    # at least one
    seen = set()
    for _ in range(40):  # a vocabulary with three words: each is drawn, nothing else is
        masked, positions, labels = mask_tokens(torch.full((50, 8), 90), torch.ones(50, 8).bool(),
                                                4, 97, 100)
        seen |= set(masked.flatten().tolist())
    assert seen == {4, 90, 97, 98, 99}
    text = torch.full((2, 8), 90)  # a caption without words: nothing is masked, no label counts
    maskable = torch.tensor([[False] * 8, [True] * 8])
    masked, positions, labels = mask_tokens(text, maskable, 4, 97, 100)
    assert torch.equal(masked[0], text[0])
    assert (labels[0] == -100).all() and (labels[1] != -100).any()


def test_codis_masks_no_special_of_the_vocabulary():
    model = make_model()
    text, mask = sentences(model.cfg, 300)
    masked, positions, labels = model.mask_text(text, mask)
    changed = masked != text
    special = (text == model.cfg.cls_id) | (text == model.cfg.sep_id) | (mask == 0)
    assert changed.any() and not (changed & special).any()
    live = labels != -100
    assert not special.gather(1, positions)[live].any()
    assert (masked[mask == 0] == model.cfg.pad_id).all()


# --------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.parametrize("size, b, steps", [(10, 4, 7), (10, 10, 3), (10, 13, 4), (10, 25, 3),
                                            (1, 3, 2)])
def test_codis_queue_equals_a_list(size, b, steps):
    queue, ids = torch.zeros(size, 3), torch.full((size,), -1)
    ptr = torch.zeros((), dtype=torch.long)
    ring, at = [([0.0] * 3, -1)] * size, 0
    for step in range(steps):
        keys, key_ids = torch.randn(b, 3), torch.arange(b) + 100 * step
        enqueue_(queue, ids, ptr, keys, key_ids)
        for key, key_id in zip(keys.tolist(), key_ids.tolist()):
            ring[at] = (key, key_id)
            at = (at + 1) % size
        assert queue.tolist() == [key for key, _ in ring]
        assert ids.tolist() == [key_id for _, key_id in ring]
        ptr.fill_(at)  # the caller moves it: two queues share it


def test_codis_memory_over_seven_steps():
    """K=10, B=4, 7 steps of training: queues, the ids of both, and the pointer equal lists."""
    model = make_model(fill=False, queue_size=10)
    assert (model.queue_ids == -1).all() and model.ptr == 0
    close(model.queue_image.norm(dim=-1), torch.ones(10))
    close(model.queue_text.norm(dim=-1), torch.ones(10))
    rings = {"image": model.queue_image.tolist(), "text": model.queue_text.tolist(),
             "ids": [-1] * 10}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for step in range(7):
        batch = make_batch(model.cfg, ids=[4 * step + i for i in range(4)])
        with torch.no_grad():
            image_m, text_m = embed(Paper(model), batch)[4:]
        before = model.queue_image.clone()
        out = model(batch)
        assert torch.equal(model.queue_image, before)               # the step reads the old queue
        out["loss"].backward()
        model.after_backward(out)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step + 1, 7)
        for i in range(4):
            at = (4 * step + i) % 10
            rings["image"][at], rings["text"][at], rings["ids"][at] = (
                image_m[i].tolist(), text_m[i].tolist(), 4 * step + i)
        close(model.queue_image, rings["image"], 1e-6)
        close(model.queue_text, rings["text"], 1e-6)
        assert model.queue_ids.tolist() == rings["ids"] and model.ptr.item() == 4 * (step + 1) % 10


def test_codis_teachers():
    """They start as copies, take no gradient, move by Eq. 6 alone, have no dropout in training."""
    model = Codis(small(dropout=0.5, momentum=0.75)).train()
    named = dict(model.named_parameters())
    teachers = {n: n.replace("_m.", ".", 1) for n, p in named.items() if not p.requires_grad}
    students = {"vision", "text", "vision_proj", "text_proj"}
    assert {n.split(".")[0] for n in teachers} == {name + "_m" for name in students}
    assert len(teachers) == sum(n.split(".")[0] in students for n in named)
    assert all(torch.equal(named[t], named[s]) for t, s in teachers.items())
    batch = make_batch(model.cfg)
    a, b = (model.encode("text", batch["text"], batch["text_mask"], teacher=True)[1]
            for _ in range(2))
    assert torch.equal(a, b)
    a, b = (model.encode("text", batch["text"], batch["text_mask"])[1] for _ in range(2))
    assert not torch.equal(a, b)

    before = {n: p.detach().clone() for n, p in named.items()}
    out = model(batch)
    out["loss"].backward()
    model.after_backward(out)
    assert all(named[t].grad is None and torch.equal(named[t], before[t]) for t in teachers)
    with torch.no_grad():
        for s in teachers.values():
            named[s].add_(1.0)
    model.after_step(1, 10)
    for t, s in teachers.items():
        close(named[t], 0.75 * before[t] + 0.25 * (before[s] + 1), 1e-6)


class NormedViT(codis.ViT):
    """A tower with running statistics, as a ResNet has them."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.batch_norm = torch.nn.BatchNorm2d(3)

    def forward(self, image):
        return super().forward(self.batch_norm(image))


def test_codis_teachers_follow_running_statistics(monkeypatch):
    """Eq. 6 moves parameters alone; a teacher in evaluation mode needs its batch norm's buffers."""
    monkeypatch.setattr(codis, "ViT", NormedViT)
    model = make_model(fill=False, momentum=0.75)
    teacher, student = model.vision_m.batch_norm, model.vision.batch_norm
    batch = make_batch(model.cfg)
    batch["image"] = 3 * batch["image"] + 2
    for step in range(3):
        old = {name: x.clone() for name, x in teacher.state_dict().items()}
        out = model(batch)
        out["loss"].backward()
        model.after_backward(out)
        assert all(torch.equal(x, old[name]) for name, x in teacher.state_dict().items())
        with torch.no_grad():
            student.weight.add_(0.5)
        model.after_step(step + 1, 3)

        assert teacher.num_batches_tracked == step + 1
        assert torch.equal(teacher.running_mean, student.running_mean)
        assert torch.equal(teacher.running_var, student.running_var)
        close(teacher.weight, 0.75 * old["weight"] + 0.25 * student.weight, 1e-6)
    assert student.running_mean.min() > 0.3


def test_codis_evaluation_leaves_the_memory_alone():
    model = make_model().eval()
    batch, before = make_batch(model.cfg), {n: x.clone() for n, x in model.state_dict().items()}
    with torch.no_grad():
        image, text, score = model.encode_image(batch), model.encode_text(batch), model.match(batch)
        model(batch)
        states = {**model.image_states(batch), **model.text_states(batch)}
        close(model.match(states), score)
    close(image.norm(dim=-1), torch.ones(4))
    close(text.norm(dim=-1), torch.ones(4))
    assert image.shape == text.shape == (4, 16) and score.shape == (4,)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_codis_match_of_images_with_several_texts():
    """Two images with two texts each, and an image alone: the scores of the pairs; its tokens are
    brought to keys and values once, and never copied."""
    model = make_model().eval()
    batch = make_batch(model.cfg)
    with torch.no_grad():
        images, texts = model.image_states(batch), model.text_states(batch)
        for own in ([2, 2, 0, 0], [3, 3, 3, 3], [0, 1, 2, 3]):
            pairs = model.match({name: x[own] for name, x in images.items()} | texts)
            few = list(dict.fromkeys(own))
            with mock.patch.object(codis.Attention, "context", autospec=True,
                                   side_effect=codis.Attention.context) as context:
                found = model.match({name: x[few] for name, x in images.items()} | texts)
            close(found, pairs, 1e-6)
            assert {len(call.args[1]) for call in context.call_args_list} == {len(few)}
    assert pairs.std() > 1e-3


def test_codis_after_step():
    model = Codis(small())
    close(model.codebook.norm(dim=-1), torch.ones(10), 1e-6)        # unit codewords from the start
    model = make_model(fill=False)
    with torch.no_grad():
        model.codebook.mul_(torch.rand(10, 1) * 5 + 0.1)
    direction = F.normalize(model.codebook.detach(), dim=-1)
    model.after_step(1, 10)
    close(model.codebook, direction, 1e-6)
    for raw, kept in ((3.0, 0.5), (-30.0, 0.001), (math.log(0.2), 0.2)):
        model.log_temp.data.fill_(raw)
        model.after_step(1, 10)
        close(model.temp, kept, 1e-6)
    assert Codis(small()).distill == 0
    close(Codis(small()).temp, 0.07, 1e-6)
    for step, expected in ((1, 0.1), (2, 0.2), (4, 0.4), (5, 0.4), (80, 0.4)):  # epochs of 4 steps
        model.after_step(step, 100, epoch_steps=4)
        close(model.distill, expected, 1e-6)


# --------------------------------------------------------------------------------------------------
# Fusion

@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mlm", [True, False])
def test_codis_pairs_equal_four_fusions(layers, mlm):
    model = make_model(fusion_layers=layers)
    cfg, b = model.cfg, 5
    _, mask = sentences(cfg, b)
    clean, masked = torch.randn(2, b, cfg.max_text, cfg.width).unbind()
    image = torch.randn(b, 5, cfg.vision_width)
    leaves = [x.requires_grad_() for x in ((clean, masked, image) if mlm else (clean, image))]
    leaves += list(model.fusion.parameters())
    positions = torch.randint(1, 4, (b, 2))
    neg_image, neg_text = torch.tensor([1, 0, 0, 2, 1]), torch.tensor([4, 2, 3, 0, 4])

    asked = dict(masked=masked, positions=positions) if mlm else {}
    cls, words = model.fusion.pairs(clean, mask, model.fusion.contexts(image), neg_image, neg_text,
                                    **asked)
    pairs = [fuse(model, clean, mask, image),
             fuse(model, clean[neg_text], mask[neg_text], image),
             fuse(model, clean, mask, image[neg_image])]
    expected = torch.cat([x[:, 0] for x in pairs])
    ours, reference = (cls * cls.detach().cos()).sum(), (expected * expected.detach().cos()).sum()
    close(cls, expected)
    if mlm:
        whole = fuse(model, masked, mask, image)
        expected = torch.stack([torch.stack([whole[i, p] for p in positions[i]]) for i in range(b)])
        close(words, expected)
        ours, reference = ours + (words ** 2).sum(), reference + (expected ** 2).sum()
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(reference, leaves)):
        close(a, b, 1e-4)


def test_codis_other_image_sizes():
    """Position embeddings follow the image; at the trained size they are as they were."""
    pos = torch.randn(1, 1 + 9, 8)
    assert torch.equal(codis.resize_pos_embed(pos, 3, 3), pos)
    larger = codis.resize_pos_embed(pos, 5, 4)
    assert larger.shape == (1, 21, 8) and torch.equal(larger[:, 0], pos[:, 0])
    flat = torch.cat([pos[:, :1], torch.full((1, 9, 8), 2.5)], 1)
    close(codis.resize_pos_embed(flat, 6, 2)[:, 1:], torch.full((1, 12, 8), 2.5))
    # embeddings that grow from row to row, not from column to column
    rows = torch.arange(3.0).repeat_interleave(3)[None, :, None]
    tall = codis.resize_pos_embed(torch.cat([rows[:, :1], rows], 1), 6, 4)[0, 1:, 0].view(6, 4)
    assert (tall.diff(dim=0) > 0).all() and tall.diff(dim=1).abs().max() < 1e-5
    # patches are areas: of twice as many, row i lies at (i + 1/2) / 2 - 1/2 of the old ones;
    # cubic convolution with a = -3/4 of the four rows around it
    old = torch.randn(6)
    fine = old.repeat_interleave(6)[None, :, None]
    fine = codis.resize_pos_embed(torch.cat([fine[:, :1], fine], 1), 12, 12)[0, 1:, 0].view(12, 12)
    for i in (4, 5, 6, 7):
        at, expected = (i + 0.5) / 2 - 0.5, 0.0
        for row in range(6):
            x = abs(at - row)
            if x <= 1:
                expected += float(old[row]) * (1.25 * x ** 3 - 2.25 * x ** 2 + 1)
            elif x < 2:
                expected += float(old[row]) * -0.75 * (x ** 3 - 5 * x ** 2 + 8 * x - 4)
        close(fine[i], torch.full((12,), expected))
    model = make_model().eval()
    tokens, emb = model.encode("vision", torch.randn(2, 3, 48, 80))
    assert tokens.shape == (2, 16, 24) and emb.isfinite().all()


def test_codis_padding_changes_nothing():
    """A sentence's embedding and match do not depend on what stands behind its end."""
    model = make_model().eval()
    batch = make_batch(model.cfg)
    other = {**batch, "text": torch.where(batch["text_mask"] == 1, batch["text"], 9)}
    short = {**batch, "text": batch["text"][:1, :5], "text_mask": batch["text_mask"][:1, :5],
             "image": batch["image"][:1]}
    with torch.no_grad():
        close(model.encode_text(batch), model.encode_text(other))
        close(model.match(batch), model.match(other))
        close(model.encode_text(batch)[:1], model.encode_text(short))
        close(model.match(batch)[:1], model.match(short))


# --------------------------------------------------------------------------------------------------
# Precision

def rounded(*tensors):
    """To values that bf16 holds: what an encoder under autocast hands on."""
    return [x.bfloat16().float() if x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize("temp", [0.07, 0.001])
def test_codis_contrast_in_bfloat16(temp):
    """Only inputs are rounded: scores, softmax and sums are fp32 under autocast, both ways."""
    z, z_m, ids, _, distill, blocks = contrast_case("repeats")
    z, z_m, *flat = rounded(z, z_m, *[x for block in blocks for x in block])
    keys, key_ids, temp = torch.cat(flat[::2]), torch.cat(flat[1::2]), torch.tensor(temp)
    wide = z.double().requires_grad_()
    expected = torch.stack(eq5(wide, z_m.double(), ids, keys.double(), key_ids,
                               temp.double(), distill))
    expected.sum().backward()
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = QueueContrast.apply(z, z_m, ids, temp, distill, 4, *flat)
        ours.sum().backward()
    close(ours, expected, 1e-4)
    assert (z.grad - wide.grad).abs().max() < 1e-3 * wide.grad.abs().max()


def test_codis_equations_in_bfloat16():
    """Eq. 2 and 5 as pure functions keep their scores in fp32 under autocast, also of bf16 tensors.

    Under Eq. 4 the loss without a teacher is -log p.
    """
    z, z_m, ids, temp, distill, blocks = contrast_case("repeats")
    keys, key_ids = torch.cat([k for k, _ in blocks]), torch.cat([i for _, i in blocks])
    plan = torch.rand(len(z), len(keys))
    z, z_m, keys = z.bfloat16(), z_m.bfloat16(), keys.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = align_loss(z, z_m, ids, [(keys, key_ids)], temp, distill)
        numbered = [(keys, torch.arange(len(keys)))]
        nll = align_loss(z, z_m, torch.arange(len(z)), numbered, temp, torch.tensor(0.0))
        code = codis.codebook_loss(z, keys, plan, temp)
    z, z_m, keys, temp, plan = doubles(z, z_m, keys, temp, plan)
    close(ours, torch.stack(eq5(z, z_m, ids, keys, key_ids, temp, distill)), 1e-4)
    probs = [softmax(similarities(row, keys, temp))[i].item() for i, row in enumerate(z)]
    close((-nll).exp(), probs, 1e-4)
    close(code, eq2(z, keys, plan.tolist(), temp), 1e-4)


def test_codis_full_precision_sees_tensors_passed_by_name():
    z, c, plan = units(5, 16).bfloat16(), units(7, 16).bfloat16(), torch.rand(5, 7)
    expected = codis.codebook_loss(z, c, plan, torch.tensor(0.02))
    with torch.autocast("cpu", torch.bfloat16):
        found = codis.codebook_loss(z=z, codebook=c, plan=plan, temp=torch.tensor(0.02))
    assert torch.equal(found, expected)


def test_codis_contrast_has_no_second_derivative():
    """It would be wrong without a word: backward's own products are not in a graph."""
    z, z_m, ids, temp, distill, blocks = contrast_case("plain")
    weights = torch.rand(len(z), requires_grad=True)
    rows = align_loss(z.requires_grad_(), z_m, ids, blocks, temp, distill)
    first, = torch.autograd.grad((rows * weights).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_codis_logs_build_no_graph():
    def watched(*tensors):
        assert not any(x.requires_grad for x in tensors)
        return torch.tensor(3.0)

    with mock.patch.object(codis, "codebook_perplexity", watched):
        model = make_model()
        out = model(make_batch(model.cfg))
    assert out["logs"]["codebook_ppl"] == 3 and out["logs"]["temp"] == model.temp
    assert not any(x.requires_grad for x in out["logs"].values())


def test_codis_codebook_in_bfloat16():
    """Plan, Eq. 1 and Eq. 2 under autocast equal float64."""
    model = make_model()
    z_v, z_t, m_v, m_t, model.codebook.data = rounded(*units(4, 6, 16), model.codebook.data)
    c, temp = model.codebook.double(), model.temp.double()
    T_v, T_t = plan_of(m_v.double(), c, model.cfg), plan_of(m_t.double(), c, model.cfg)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.code_losses(z_v, z_t, m_v, m_t)
    ot = eq1(T_v, cosine_cost(m_v.double(), c)) + eq1(T_t, cosine_cost(m_t.double(), c))
    close(ours["ot"], ot, 5e-5)
    close(ours["tp"], eq2(z_t.double(), c, T_v, temp), 1e-4)
    close(ours["ip"], eq2(z_v.double(), c, T_t, temp), 1e-4)


@pytest.mark.parametrize("temp", [0.5, 0.07, 0.001])
def test_codis_step_in_bfloat16(temp):
    model = make_model()
    model.log_temp.data.fill_(math.log(temp))
    batch = make_batch(model.cfg)
    with no_dice:
        exact = model(batch)["logs"]
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch)
    out["loss"].backward()
    assert out["loss"].isfinite() and out["loss"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if temp > 0.01:
        for name, value in exact.items():
            close(out["logs"][name], value, 0.1)


# --------------------------------------------------------------------------------------------------
# Parameters

def joined_parts(name, tensor):
    """The rows of queries, keys and values, where they are one matrix: {part: tensor}."""
    kind = name.rsplit(".", 1)[1] if "." in name else name
    if ".qkv." in name:
        return {f"{part}.{kind}": x for part, x in zip(("query", "key", "value"), tensor.chunk(3))}
    if ".key_value." in name:
        return {f"{part}.{kind}": x for part, x in zip(("key", "value"), tensor.chunk(2))}
    return {kind: tensor}


@pytest.mark.parametrize("task", codis.VIEWS)  # TASKS, and their first stages
def test_codis_every_parameter_learns(task):
    model = make_model(task=task)
    out = model(make_batch(model.cfg, task))
    out["loss"].backward()
    assert out["loss"].ndim == 0 and out["loss"].isfinite()
    assert all(x.ndim == 0 and not x.requires_grad and x.isfinite() for x in out["logs"].values())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, f"teacher {name} has a gradient"
            continue
        assert p.grad is not None and p.grad.isfinite().all(), f"{name} has no gradient"
        for part, grad in joined_parts(name, p.grad).items():
            if part != "key.bias":  # a bias on all keys alike does not change a softmax
                assert grad.abs().max() > 0, f"the gradient of {name} is zero ({part})"
    groups = model.param_groups(mock.Mock(lr=1e-3, weight_decay=0.02))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    # weight decay: of matrices, not of biases, norms, the temperature and the codebook
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or name == "codebook"
            assert decay[id(p)] == (0.0 if plain else 0.02), name
    assert all(group["lr"] == 1e-3 for group in groups)


def test_codis_no_patch_is_drowned_at_the_start():
    """Tiny before training: another patch changes its own token far more than most others.

    Less than twice as much where the blocks' outputs start at 0.08 too: what is seen was then not
    bound to its position.
    """
    torch.manual_seed(0)
    sizes = {k: v for k, v in codis.PRESETS["tiny"].items() if k not in codis.VIEWS}
    vit = Codis(Config(**{**sizes, "vocab_size": 57}), "retrieval").vision.eval()
    image = torch.randn(8, 3, 72, 72)
    other = image.clone()
    other[:, :, 24:48, 24:48] = torch.randn(8, 3, 24, 24)          # the middle one of 3 x 3 patches
    with torch.no_grad():
        change = (vit(image) - vit(other)).norm(dim=-1).mean(0)     # (10,), the class token first
    # the median: the convolutions of the stem see the edge of neighbouring patches
    assert change[5] > 5 * change[1:].median(), change


def test_codis_base_has_the_papers_size():
    with torch.device("meta"):
        model = Codis(Config())
    count = {name: sum(p.numel() for p in module.parameters())
             for name, module in model.named_children()}
    assert abs((count["text"] + count["fusion"] + count["mlm_head"]) / 1e6 - 123.7) < 0.05
    assert abs(count["vision"] / 1e6 - 85.8) < 0.05
    assert model.codebook.shape == (4000, 256)
    assert model.queue_image.shape == model.queue_text.shape == (65536, 256)


@pytest.mark.parametrize("task", codis.VIEWS)
def test_codis_offers_what_its_task_can(task):
    model, methods = make_model(task=task), set().union(*codis.OFFERS.values())
    assert all(callable(getattr(model, name)) for name in methods)
    assert ("match" in model.offers) == hasattr(model, "itm_head")
    assert ("rank_answers" in model.offers) == hasattr(model, "decoder")
    assert ("predict" in model.offers) == hasattr(model, "cls_head")


# --------------------------------------------------------------------------------------------------
# Fine-tuning

def test_codis_retrieval_is_eq5_and_eq7():
    """A step by hand: losses, gradients, queues and teachers, with two captions of one image."""
    model = make_model(task="retrieval", **ODD)
    batch = make_batch(model.cfg, b=5, ids=IDS_BY_HAND)
    with recorded() as draws:
        out = model(batch)
    paper = Paper(model)
    image, text, *z = embed(paper, batch)
    losses = {"itm": itm_by_hand(paper, batch, draws, image, text, *z[:2])}
    losses |= eq5_by_hand(model, batch, *z)
    same_losses(out, losses, model)
    same_memory(model, batch, out, z[2:])


@pytest.mark.parametrize("task", ["ve", "nlvr2"])
def test_codis_classes_by_hand(task):
    """A step by hand: cross-entropy on the fused [CLS]; of two images layers 0, 2, ... look at the
    first, layers 1, 3, ... at the second."""
    model = make_model(task=task, **ODD)
    batch, paper = make_batch(model.cfg, task, b=5), Paper(model)
    batch["label"] = torch.tensor([1, 0, 1, 1, 0]) + (task == "ve") 
    out, rows = model(batch), []
    for i, ids in enumerate(without_padding(batch)):
        images = [paper.image(batch[key][i]) for key in ("image", "image2") if key in batch]
        rows.append(paper.classes(paper.fuse(paper.text(ids), *images)))
    assert model.predict(batch).shape == (5, LABELS[task])
    close(model.predict(batch), torch.stack(rows), 2e-5)
    same_losses(out, {"ce": picked(torch.stack(rows), batch["label"])}, model)
    assert "keys" not in out and not model.students


def assigned(draws, sim, ids):
    """ALBEF's text assignment: (first image, second image, label) of each text.

    A third of the texts belongs to the first image, a third to the second, a third to none.
    """
    one, two = (drawn_stranger(sim, ids, noise.tolist()) for noise in draws["exponential_"])
    order, rows = draws["randperm"][0].tolist(), []
    for i in range(len(ids)):
        label = order[i] % 3
        rows.append(((i, two[i]), (one[i], i), (one[i], two[i]))[label] + (label,))
    return rows


def test_codis_text_assignment_by_hand():
    """A step by hand, with two texts of one image. In a batch of one image no row counts."""
    model = make_model(task="assign", **ODD)
    batch = make_batch(model.cfg, "assign", b=6, ids=[3, 5, 3, 20, 21, 5])
    with recorded() as draws, mock.patch.object(model.vision, "forward",
                                                wraps=model.vision.forward) as encoded:
        out = model(batch)
    assert encoded.call_count == 1                      # each picture is encoded once

    paper, ids = Paper(model), batch["image_id"].tolist()
    image = [paper.image(x) for x in batch["image"]]
    cls = F.normalize(torch.stack([x[0] for x in image]), dim=-1).detach()
    rows = assigned(draws, cls @ cls.T / 0.07, ids)
    assert sorted(label for *_, label in rows) == [0, 0, 1, 1, 2, 2]
    for i, (first, second, label) in enumerate(rows):
        assert [first == i, second == i] == [label == 0, label == 1]
        others = [j for j in (first, second) if j != i]
        assert all(ids[j] != ids[i] for j in others) and len(others) == (2 if label == 2 else 1)
    logits = [paper.classes(paper.fuse(paper.text(text), image[first], image[second]))
              for text, (first, second, _) in zip(without_padding(batch), rows)]
    same_losses(out, {"assign": picked(torch.stack(logits), [label for *_, label in rows])}, model)

    # no other image in the batch: nothing is asked, and nothing breaks
    alone = model(make_batch(model.cfg, "assign", b=3, ids=[4, 4, 4]))["loss"]
    assert alone == 0 and alone.requires_grad


def questions_by_hand(paper, batch):
    """The fused questions, as the decoder reads them: [(T, D), ...]"""
    return [paper.fuse(paper.text(ids), paper.image(image))
            for ids, image in zip(without_padding(batch), batch["image"])]


def test_codis_answers_by_hand():
    """A step of VQA by hand: weighted -log likelihood of the answers' first `max_answer` tokens."""
    model = make_model(task="vqa", **ODD)
    batch, paper = make_batch(model.cfg, "vqa", b=5), Paper(model)
    batch["answer_weight"] = torch.tensor([1.0, 0.3, 0.0, 1.7, 0.6])    # one has no answer
    out, answers = model(batch), without_padding(batch, "answer")
    assert max(map(len, answers)) > model.cfg.max_answer == 6
    nll = [-paper.answer_logp(answer[:6], question)
           for answer, question in zip(answers, questions_by_hand(paper, batch))]
    loss = sum(w * x for w, x in zip(batch["answer_weight"].tolist(), nll)) / 3.6
    same_losses(out, {"answer": loss}, model)
    nothing = model({**batch, "answer_weight": torch.zeros(5)})["loss"]
    assert nothing == 0 and nothing.requires_grad


def answer_list(candidates):
    """Lists of ids -> ids and mask (A, L), padding of zeros."""
    ids = torch.zeros(len(candidates), max(map(len, candidates)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, answer in enumerate(candidates):
        ids[row, :len(answer)], mask[row, :len(answer)] = torch.tensor(answer), 1
    return ids, mask


@pytest.mark.parametrize("at_once", [4, 128])
def test_codis_answers_are_ranked(at_once):
    """The k of the likeliest first token, of them the likeliest answer; a few at a time."""
    model = make_model(task="vqa").eval()
    batch, paper = make_batch(model.cfg, "vqa"), Paper(model)
    candidates = [[2, 9, 3], [2, 9, 11, 3], [2, 30, 3], [2, 31, 8, 40, 3], [2, 12, 3],
                  [2, 30, 31, 3]]
    ids, mask = answer_list(candidates)
    with torch.no_grad():
        questions = questions_by_hand(paper, batch)
        scores = [[float(paper.answer_logp(a, q)) for a in candidates] for q in questions]
        first = [[float(paper.answer_logp(a[:2], q)) for a in candidates] for q in questions]

    # -log likelihoods: of all answers, each beside its own question
    found, whole = [], model.answer_nll
    with mock.patch.object(codis, "ANSWERS_AT_ONCE", at_once), torch.no_grad(), \
            mock.patch.object(model, "answer_nll", lambda *x: found.append(whole(*x)) or found[-1]):
        model.rank_answers(batch, ids, mask, 6)
    close(torch.cat(found).view(4, 6).sort(-1).values, [sorted(-x for x in row) for row in scores])
    assert max(abs(a - b) for a, b in zip(scores[0], scores[3])) > 1e-3

    for k in (1, 3, 6, 50):
        with mock.patch.object(codis, "ANSWERS_AT_ONCE", at_once), torch.no_grad(), \
                mock.patch.object(model, "decode", wraps=model.decode) as decode:
            found = model.rank_answers(batch, ids, mask, k).tolist()
        assert max(len(call.args[0]) for call in decode.call_args_list) <= max(at_once, 4)
        for i, answer in enumerate(found):
            # of equal first tokens either may be on the list
            cut = sorted(first[i], reverse=True)[min(k, 6) - 1] - 1e-6
            listed = [a for a in range(6) if first[i][a] >= cut]
            assert answer in listed
            if len(listed) == min(k, 6):
                assert answer == max(listed, key=lambda a: scores[i][a])


def test_codis_answers_are_ranked_in_little_memory():
    """With the paper's 64 questions, 128 answers, 30,522 words no tensor takes more than 0.3 GB
    (all answers at once: 9 GB, several times)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            out = fn(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(x):
                    self.size = max(self.size, x.numel() * x.element_size())
            return out

    cfg = Config(image_size=64, vision_layers=1, text_layers=1, fusion_layers=1)
    with torch.device("meta"):
        model = Codis(cfg, "vqa").eval()
        batch = {"image": torch.empty(64, 3, 64, 64),
                 "text": torch.zeros(64, 25, dtype=torch.long),
                 "text_mask": torch.ones(64, 25, dtype=torch.long)}
        answers = torch.zeros(3192, 10, dtype=torch.long)
        with torch.no_grad(), Largest() as largest:
            assert model.rank_answers(batch, answers, torch.ones_like(answers), 128).shape == (64,)
    assert 1e8 < largest.size < 3e8


def test_codis_decoder_starts_from_the_fusion_layers():
    """Each of its layers, where the image is as wide as the question; else all but the keys and
    values. A decoder that a run has stays."""
    for width, shared in ((32, True), (24, False)):
        before = make_model(vision_width=width, vision_heads=4)
        model = make_model(vision_width=width, vision_heads=4, task="vqa")
        adapted = model.adapt(before.state_dict())
        for name, tensor in before.state_dict().items():
            if name.startswith("fusion.blocks."):
                copy = name.replace("fusion.", "decoder.", 1)
                assert (copy in adapted) == (shared or "cross.key_value.weight" not in name), name
                assert copy not in adapted or torch.equal(adapted[copy], tensor)
    kept = model.adapt(model.state_dict())
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


def test_codis_vqa_is_blind_to_padding():
    """Neither what stands behind a question nor behind an answer is seen."""
    model = make_model(task="vqa").eval()
    batch = make_batch(model.cfg, "vqa")
    other = dict(batch)
    for key in ("text", "answer"):
        other[key] = torch.where(batch[key + "_mask"] == 1, batch[key], 9)
        assert not torch.equal(other[key], batch[key])
    with torch.no_grad():
        close(model(batch)["loss"], model(other)["loss"], 1e-6)


def test_codis_two_images_share_keys_and_values():
    """NLVR2: two layers in a row make keys and values of their images with the same weights."""
    model = make_model(task="nlvr2").eval()
    batch, layers = make_batch(model.cfg, "nlvr2"), model.fusion.blocks
    assert len(layers) == 2 * model.cfg.fusion_layers
    for n, layer in enumerate(layers):
        shared, own = layers[n - n % 2].cross, layer.cross
        assert own.key_value.weight is shared.key_value.weight
        assert own.key_value.bias is shared.key_value.bias
        assert n % 2 == 0 or own.query.weight is not shared.query.weight
        assert n < 2 or own.key_value.weight is not layers[n - 2].cross.key_value.weight
    with torch.no_grad():
        swapped = model.predict({**batch, "image": batch["image2"], "image2": batch["image"]})
        assert (swapped - model.predict(batch)).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------
# What evaluation asks for

@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_codis_evaluation_by_hand(task):
    """Embeddings are the students', of unit length; a match is its logit minus that of "not"."""
    model = make_model(task=task).eval()
    batch, paper = make_batch(model.cfg), Paper(model)
    with torch.no_grad():
        image, text, z_v, z_t, m_v, m_t = embed(paper, batch)
        logits = [paper.linear("itm_head", paper.fuse(t, i)[0]) for t, i in zip(text, image)]
        close(model.encode_image(batch), z_v)
        close(model.encode_text(batch), z_t)
        states = {**model.image_states(batch), **model.text_states(batch)}
        for match in (model.match(batch), model.match(states)):
            close(match, [x[1] - x[0] for x in logits], 1e-4)
    close(states["image_emb"], z_v)
    close(states["text_emb"], z_t)
    close(z_v.norm(dim=-1), torch.ones(4))
    assert min((z_v - m_v).abs().max(), (z_t - m_t).abs().max()) > 1e-2


@pytest.mark.parametrize("block", [-1, 2, 99])
def test_codis_gradcam_of_a_layer_that_is_not_there(block):
    model = make_model(fusion_layers=2, task="retrieval").eval()
    with pytest.raises(SystemExit, match=f"--block {block}: the fusion has 2 layers, from 0 on"):
        model.gradcam(make_batch(model.cfg), block)


@pytest.mark.parametrize("layers, block, default", [(1, 0, True), (2, 0, True), (3, 1, True),
                                                    (4, 2, True), (5, 2, True), (3, 0, False)])
def test_codis_gradcam_by_hand(layers, block, default):
    """Attention times the positive part of the gradient of the "matched" logit, mean over heads."""
    model = make_model(fusion_layers=layers, task="retrieval").eval()
    batch, paper, heads = make_batch(model.cfg), Paper(model), model.cfg.heads
    found = model.gradcam(batch) if default else model.gradcam(batch, block)
    assert found["word"].shape == (4, model.cfg.max_text, 2, 2)
    assert found["sentence"].shape == (4, 2, 2)
    live = 0
    for i, ids in enumerate(without_padding(batch)):
        fused = paper.fuse(paper.text(ids), paper.image(batch["image"][i]))
        maps = paper.maps[f"fusion.blocks.{block}.cross"]
        grads = torch.autograd.grad(paper.linear("itm_head", fused[0])[1], maps, allow_unused=True)
        weighted = []
        for p, grad in zip(maps, grads):
            grad = torch.zeros_like(p) if grad is None else grad
            weighted.append((p * grad * (grad > 0))[1:])            # without the class token
        words = [mean(weighted[n * heads:(n + 1) * heads]).view(2, 2) for n in range(len(ids))]
        live += sum(x.max() > 0 for x in words)
        for n in range(len(ids)):
            close(found["word"][i, n], words[n].detach())
        close(found["sentence"][i], mean(words[:-1]).detach())      # [CLS] and words, not [SEP]
        assert (found["word"][i, len(ids):] == 0).all()
    assert live >= 4


# --------------------------------------------------------------------------------------------------
# Dropout, settings, recipe

@contextlib.contextmanager
def fixed_dropout(p, drop, drop_attention):
    """Dropout of rate p multiplies by a number instead, in training and nowhere else."""
    attend = F.scaled_dot_product_attention

    def dropout(x, rate=0.5, training=True, inplace=False):
        assert rate in (0.0, p)
        return x * drop if training and rate else x

    def attention(query, key, value, mask=None, rate=0.0):
        assert rate in (0.0, p)
        return attend(query, key, value, mask) * (drop_attention if rate else 1.0)

    with mock.patch.multiple(F, dropout=dropout, scaled_dot_product_attention=attention):
        yield


def test_codis_dropout_is_where_bert_has_it():
    """Behind the embeddings, on attention probabilities, behind each part of a layer of text and
    fusion encoder. Not in the image encoder, not in teachers, not in evaluation."""
    model = make_model(**ODD, dropout=0.2)
    batch = make_batch(model.cfg, b=5, ids=IDS_BY_HAND)
    with fixed_dropout(0.2, 1.3, 0.8):
        for training, factors in ((True, (1.3, 0.8)), (False, (1.0, 1.0))):
            model.train(training)
            with recorded() as draws:
                out = model(batch)
            reference, _ = eq9(model, batch, draws, Paper(model, *factors))
            same_losses(out, reference, model)

        # the answer decoder has it too
        model = make_model(task="vqa", **ODD, dropout=0.2)
        batch, paper = make_batch(model.cfg, "vqa", b=2), Paper(model, 1.3, 0.8)
        nll = [-paper.answer_logp(answer[:6], question) for answer, question in
               zip(without_padding(batch, "answer"), questions_by_hand(paper, batch))]
        weight = batch["answer_weight"].double()
        close(model(batch)["loss"], (torch.stack(nll) * weight).sum() / weight.sum().clamp(min=1))


ALIGN = {"i2t", "t2i", "i2i", "t2t"}
CODE = {"ot", "tp", "ip"}
ALL = ALIGN | CODE | {"itm", "mlm"}
# Each setting of Config with another legal value, and what that changes:
#   a pattern     the names, or shapes, of these weights and queues and of no others
#   a set         with the same weights and dice, these losses of a step and no others
#   "start"       the spread of these weights at the start (or their value, of a single number)
#   "memory"      what a step keeps for backward or computes at once, and nothing else
#   a word        see test_codis_every_setting_matters
SETTINGS = {
    "image_size": (48, r"vision(_m)?\.pos_embed"),
    "patch": (8, r"vision(_m)?\.(pos_embed|patch_embed\.weight)"),
    "stem": ("conv", r"vision(_m)?\.patch_embed\."),
    "vision_width": (36, r"vision|fusion(_m)?\.blocks\.\d\.cross\.key_value\.weight"),
    "vision_layers": (2, r"vision(_m)?\.blocks\.1\."),
    "vision_heads": (4, ALL - {"t2t"}),
    "width": (40, r"text|fusion|mlm_head|itm_head"),
    "text_layers": (2, r"text(_m)?\.blocks\.1\."),
    "fusion_layers": (3, r"fusion(_m)?\.blocks\.2\."),
    "heads": (8, ALL - {"i2i"}),
    "mlp_ratio": (3, r".*\.blocks\.\d\.mlp\."),
    "act": ("relu", ALL),
    "dropout": (0.2, {"mlm", "itm", "t2i", "t2t", "tp"}),
    "embed_dim": (12, r".*_proj|codebook|queue_(image|text)"),
    "max_text": (7, "sentence"),
    "positions": (12, r"text(_m)?\.embeddings\.positions"),
    "vocab_size": (61, r"text(_m)?\.embeddings\.words|mlm_head(_m)?\.bias"),
    "pad_id": (30, "padding"),
    "cls_id": (40, {"mlm"}),
    "sep_id": (40, {"mlm"}),
    "mask_id": (5, {"mlm"}),
    "first_word": (50, {"mlm"}),
    "queue_size": (16, r"queue_(image|text|ids)"),
    "momentum": (0.7, ALL - {"itm"}),
    "temp": (0.2, "start", "log_temp"),
    "distill": (0.8, ALIGN),
    "batch_keys": (False, ALIGN),
    "intra": (False, "i2i t2t"),
    "codebook": (False, r"codebook"),
    "codewords": (12, r"codebook"),
    "codebook_target": ("same", {"tp", "ip"}),
    "codebook_features": ("student", CODE),
    "ot_eps": (1.0, CODE),
    "ot_iters": (6, CODE),
    "ot_inner": (1, CODE),
    "mlm_prob": (0.3, {"mlm"}),
    "mlm_mask_only": (True, {"mlm"}),
    "mlm_distill": (0.7, {"mlm"}),
    "max_answer": (4, {"answer"}),
    "queue_chunk": (3, "memory"),
    "init_std": (0.2, "start", "fusion.blocks.0.mlp.0.weight"),
    "pos_std": (0.2, "start", "vision.pos_embed"),
    "checkpointing": (True, "memory"),
}


def step_of(cfg, state, task="pretrain"):
    """Losses and gradients with these weights, after a step that moved teachers and ramps."""
    model = Codis(cfg, task).train()
    model.load_state_dict(state)
    model.after_step(1, 4, epoch_steps=2)
    torch.manual_seed(1)
    batch = make_batch(small(**ODD), task, b=5, ids=IDS_BY_HAND)
    with mock.patch.object(codis, "hard_negatives", nearest_stranger):
        torch.manual_seed(4)
        out = model(batch)
    return out["logs"], gradients(out["loss"], model)


def memory_of(cfg, state):
    """Bytes that a step keeps for backward; the most keys that are scored at once."""
    kept, widest, scores = [], [], QueueContrast.scores

    def pack(x):
        kept.append(x.numel() * x.element_size())
        return x

    def counted(*args):
        for part in scores(*args):
            widest.append(part[1].shape[1])
            yield part

    with mock.patch.object(QueueContrast, "scores", counted), \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step_of(cfg, state)
    return sum(kept), max(widest)


def first_text(cfg, folder):
    """The words of a caption as data.py would hand them to a model of this Config."""
    from PIL import Image

    import data
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl"]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    record = {"image": "a.png", "caption": "a b c d e f g h i j k l"}
    (folder / "pairs.json").write_text(json.dumps([record]))
    tokenizer = data.get_tokenizer(str(folder / "vocab.txt"))
    records = data.open_source("pairs", str(folder / "pairs.json"), None)
    samples = data.Views(records, codis.VIEWS["pretrain"], tokenizer, cfg.image_size, cfg.max_text)
    return samples[0]["text"]


def test_codis_the_table_of_settings_is_complete():
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("field", SETTINGS)
def test_codis_every_setting_matters(field, tmp_path):
    value, kind, *weight = SETTINGS[field]
    task = "vqa" if kind == {"answer"} else "pretrain"
    cfg = small(**ODD, dropout=0.1 if field == "checkpointing" else 0.0)
    other = dataclasses.replace(cfg, **{field: value})
    assert getattr(cfg, field) != value
    torch.manual_seed(0)
    state = make_model(cfg, task).state_dict()

    if isinstance(kind, set):
        (a, grads), (b, other_grads) = step_of(cfg, state, task), step_of(other, state, task)
        changed = {name for name in a if (a[name] - b[name]).abs() > 3e-6}
        assert changed - {"codebook_ppl", "temp"} == kind
    elif kind == "memory":
        (a, grads), (b, other_grads) = step_of(cfg, state), step_of(other, state)
        for name in a:
            close(a[name], b[name], 1e-6)
        same_gradients(grads, other_grads, 1e-5)
        (kept, widest), (other_kept, other_widest) = memory_of(cfg, state), memory_of(other, state)
        if field == "checkpointing":
            assert other_kept < 0.85 * kept and other_widest == widest
        else:
            assert other_kept == kept and (widest, other_widest) == (5, 3)
    elif kind == "start":
        start = Codis(other).state_dict()[weight[0]]
        spread = start.exp() if start.ndim == 0 else start.std()
        assert 0.85 * value < spread < 1.15 * value
    elif kind == "sentence":
        for c in (cfg, other):
            text = first_text(c, tmp_path)
            assert len(text) == c.max_text and text[-1] == 3        # [SEP] closes what was cut
    elif kind == "padding":
        # the embedding of [PAD] takes no gradient from being read, that of any other word does
        for c, live in ((cfg, True), (other, False)):
            model = Codis(c)
            text = torch.full((1, 4), value)
            grad, = torch.autograd.grad(model.text(text, torch.ones_like(text)).square().sum(),
                                        model.text.embeddings.words.weight)
            assert (grad[value].abs().max() > 0) == live
    elif kind == "i2i t2t":
        a, b = step_of(cfg, state)[0], step_of(other, state)[0]
        assert set(a) - set(b) == {"i2i", "t2t"}
        assert all(torch.equal(a[name], b[name]) for name in b)
    else:
        a, b = ({name: x.shape for name, x in Codis(c).state_dict().items()} for c in (cfg, other))
        changed = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
        assert changed and all(re.match(kind, name) for name in changed), changed


@pytest.mark.parametrize("field", ["stem", "act", "codebook_target", "codebook_features"])
def test_codis_words_that_are_no_choice_are_refused(field):
    with pytest.raises(SystemExit, match=f"--{field}.*nonsense"):
        train.parse(["--model", "codis", f"--{field}", "nonsense"])


def test_codis_checkpointing_draws_the_same_masks():
    """Dropout and masked words with recomputed blocks: the same losses and gradients."""
    for task in ("pretrain", "nlvr2"):
        results = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = make_model(checkpointing=checkpointing, dropout=0.3, task=task)
            out = model(make_batch(model.cfg, task))
            results.append((out["loss"], gradients(out["loss"], model)))
        close(results[0][0], results[1][0], 1e-6)
        same_gradients(results[0][1], results[1][1], 1e-5)


# Every number of Config and RECIPE at the paper's size, and where it comes from. "section" and
# "table" are the paper's; [A] is ALBEF's code and configurations.
SIZES = {
    "image_size": (256, "section 4.2.1: 256 x 256"),
    "patch": (16, "section 4.2.1: ViT-B/16"),
    "stem": ("patch", "section 4.2.1: ViT-B/16"),
    "vision_width": (768, "section 4.2.1: ViT-B/16"),
    "vision_layers": (12, "section 4.2.1: ViT-B/16"),
    "vision_heads": (12, "section 4.2.1: ViT-B/16"),
    "width": (768, "section 4.2.1: BERT base"),
    "text_layers": (6, "[A]"),
    "fusion_layers": (6, "[A]"),
    "heads": (12, "section 4.2.1: BERT base"),
    "mlp_ratio": (4, "section 4.2.1: ViT-B/16, BERT base"),
    "act": ("gelu", "section 4.2.1: ViT-B/16, BERT base"),
    "dropout": (0.1, "section 4.2.1: BERT base"),
    "embed_dim": (256, "section 3.2: R^256"),
    "max_text": (25, "[A]"),
    "positions": (512, "section 4.2.1: BERT base"),
    "vocab_size": (30522, "bert-base-uncased, of which 123.7M parameters (section 4.2.1)"),
    "pad_id": (0, "bert-base-uncased"),
    "cls_id": (101, "bert-base-uncased"),
    "sep_id": (102, "bert-base-uncased"),
    "mask_id": (103, "bert-base-uncased"),
    "first_word": (999, "bert-base-uncased: '!', behind the unused words"),
    "queue_size": (65536, "section 4.2.1"),
    "momentum": (0.995, "section 4.2.1"),
    "temp": (0.07, "[A]"),
    "distill": (0.4, "[A]"),
    "batch_keys": (True, "[A]"),
    "intra": (True, "Table 4, last row"),
    "codebook": (True, "Table 4, last row"),
    "codewords": (4000, "section 4.2.1"),
    "codebook_target": ("cross", "Figure 3"),
    "codebook_features": ("teacher", "Table 4, last row"),
    "ot_eps": (0.5, "graph optimal transport, of the paper's second author"),
    "ot_iters": (50, "graph optimal transport"),
    "ot_inner": (1, "graph optimal transport"),
    "mlm_prob": (0.15, "section 3.3.2"),
    "mlm_mask_only": (False, "section 3.3.2: as BERT"),
    "mlm_distill": (0.0, "Algorithm 1"),
    "max_answer": (10, "ours: longer than the 3,192 answers"),
    "queue_chunk": (8192, "memory only"),
    "init_std": (0.02, "BERT base"),
    "pos_std": (0.02, "ViT-B/16"),
    "checkpointing": (False, "memory only"),
}
FINETUNED = {
    "optimizer": ("adamw", "[A]"), "schedule": ("cosine", "[A]"), "beta2": (0.999, "[A]"),
    "weight_decay": (0.02, "[A]"), "clip": (0.0, "[A]"), "accum": (1, "[A]"),
    "image_size": (384, "section 4.2.1"), "crop_scale": ((0.5, 1.0), "[A]"),
    "lr": (2e-5, "[A]"), "min_lr": (1e-6, "[A]"), "batch_size": (256, "[A]: 8 x 32")}
RECIPES = {
    ("pretrain", 0): {
        "optimizer": ("adamw", "section 4.2.1"), "schedule": ("cosine", "section 4.2.1"),
        "beta2": (0.999, "[A]"), "weight_decay": (0.02, "section 4.2.1"), "clip": (0.0, "[A]"),
        "accum": (1, "[A]"), "lr": (1e-4, "section 4.2.1"), "min_lr": (1e-5, "section 4.2.1"),
        "warmup_lr": (1e-5, "section 4.2.1"), "warmup_steps": (1000, "section 4.2.1"),
        "epochs": (30, "section 4.2.1"), "batch_size": (512, "section 4.2.1"),
        "epoch_of": ("images", "[?]: Deviation 12"),
        "crop_scale": ((0.2, 1.0), "[A]"), "rerank_k": (128, "[A]")},
    ("retrieval", 0): {**FINETUNED, "lr": (1e-5, "[A]"), "epochs": (10, "[A]: Flickr30K"),
                       "epoch_of": ("captions", "[A]: re_train_dataset walks over pairs"),
                       "max_text": (30, "[A]"), "rerank_k": (128, "[A]: Flickr30K"),
                       "warmup_steps": (0, "[A]: from 1e-5 to 1e-5")},
    ("vqa", 0): {**FINETUNED, "epochs": (8, "[A]"), "warmup_lr": (1e-5, "[A]"),
                 "warmup_steps": (400, "[A]: warmup_epochs 4, of 100 steps")},
    ("ve", 0): {**FINETUNED, "epochs": (5, "[A]"), "warmup_lr": (1e-5, "[A]"),
                "warmup_steps": (100, "[A]: warmup_epochs 1, of 100 steps")},
    ("nlvr2", 0): {**FINETUNED, "task": ("assign", "[A]"), "epochs": (1, "[A]"),
                   "epoch_of": ("images", "[A]: pretrain_dataset draws a caption of each image"),
                   "image_size": (256, "[A]"), "batch_size": (512, "[A]: 8 x 64"),
                   "min_lr": (1e-5, "[A]"), "crop_scale": ((0.2, 1.0), "[A]"),
                   "warmup_lr": (1e-5, "[A]"), "warmup_steps": (100, "[A]")},
    ("nlvr2", 1): {**FINETUNED, "epochs": (10, "[A]"), "batch_size": (128, "[A]: 8 x 16"),
                   "warmup_lr": (1e-5, "[A]"), "warmup_steps": (100, "[A]")},
}


@pytest.mark.parametrize("task, stage", RECIPES)
def test_codis_the_recipe_is_the_papers(task, stage):
    """What `--preset base` trains with: each number has a row above, each row is what is used."""
    rows, recipe = RECIPES[task, stage], codis.RECIPE[task]
    recipe = recipe[stage] if isinstance(recipe, list) else recipe
    assert recipe.keys() <= rows.keys()
    assert codis.PRESETS["base"] == {}
    loop, cfg = train.settings(codis, "base", task, {}, stage)
    for name, (value, source) in {**SIZES, **rows}.items():
        found = recipe[name] if name == "task" else getattr(loop, name, getattr(cfg, name, None))
        assert found == value and source, name


def test_codis_every_number_of_the_recipe_has_a_row():
    assert list(SIZES) == [field.name for field in dataclasses.fields(Config)]
    stages = {(task, n) for task, rows in codis.RECIPE.items()
              for n in range(len(rows) if isinstance(rows, list) else 1)}
    assert stages == set(RECIPES) and set(codis.TASKS) == {task for task, _ in stages}


def test_codis_views_are_the_papers():
    """RandAugment (section 4.2.1) in training, a plain resize in evaluation, CLIP's norm [A]."""
    image = dict(image="randaug", image_eval="resize", norm="clip")
    pairs = dict(source="pairs", text="caption", **image)
    assert codis.VIEWS == {
        "pretrain": pairs, "retrieval": pairs,
        "vqa": dict(source="vqa", text="question", answer="answer", **image),
        "ve": dict(source="ve", text="caption", label="label", **image),
        "nlvr2": dict(source="nlvr2", text="caption", label="label", image2="randaug",
                      image2_eval="resize", **image),
        "assign": dict(source="pairs", text="caption", image="randaug", norm="clip")}
    assert codis.EVALS == {"pretrain": ("retrieval",), "retrieval": ("retrieval",), "assign": (),
                           "vqa": ("vqa",), "ve": ("ve",), "nlvr2": ("nlvr2",)}


# --------------------------------------------------------------------------------------------------
# Another task, another data set

def test_codis_nlvr2_starts_with_every_fusion_layer_twice():
    """ALBEF's NLVR2: of three pre-trained fusion layers the new 0 1, 2 3, 4 5 are copies."""
    before, model = make_model(fusion_layers=3), make_model(fusion_layers=3, task="nlvr2")
    adapted = model.adapt(before.state_dict())
    for name in model.state_dict():
        if name.startswith("fusion.blocks."):
            n, rest = name.removeprefix("fusion.blocks.").split(".", 1)
            source = before.state_dict()[f"fusion.blocks.{int(n) // 2}.{rest}"]
            assert torch.equal(adapted[name], source), name
    assert not [k for k in adapted if k.startswith("fusion.") and k not in model.state_dict()]


def write_run(model, folder):
    """What --init reads."""
    weights.save_model(model, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_codis_init_forgets_the_ids_of_another_data_set(task, tmp_path):
    """Two data sets number their pictures alike: the old one's keys stay, as negatives of no image;
    pointer and ramps start anew. The report names them as new."""
    old, new = make_model(), make_model(task=task)
    assert {3, 5} < set(old.queue_ids.tolist()) and old.ptr > 0
    for name in codis.MEMORY:
        getattr(new, name).copy_(getattr(Codis(small(), task), name))
    told = weights.initialize(new, write_run(old, tmp_path), codis.BACKBONE)
    assert "new: distill, ptr, queue_ids, ramp;" in told
    assert torch.equal(new.queue_image, old.queue_image)
    assert torch.equal(new.queue_text, old.queue_text)
    assert (new.queue_ids == -1).all() and new.ptr == new.ramp == new.distill == 0
    for part in ("vision_m", "text_m", "vision_proj_m"):
        ours, theirs = (getattr(model, part).state_dict() for model in (new, old))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    # images 3 and 5 of the new data are no images of the old queue
    batch = make_batch(new.cfg, b=5, ids=IDS_BY_HAND)
    with torch.no_grad():
        z = embed(Paper(new), batch)[2:]
        out = new(batch)["logs"]
        nameless = eq5_by_hand(new, batch, *z)
        new.queue_ids.copy_(old.queue_ids)
        named = eq5_by_hand(new, batch, *z)
    for name in nameless:
        close(out[name], nameless[name], 2e-5)
        assert abs(named[name] - nameless[name]) > 1e-3


def test_codis_init_at_another_image_size(tmp_path):
    """The position embeddings of the student and of its teacher follow, each from its own."""
    old, new = make_model(), make_model(task="retrieval", image_size=48)
    weights.initialize(new, write_run(old, tmp_path), codis.BACKBONE)
    for part in ("vision", "vision_m"):
        before, after = (getattr(model, part).pos_embed for model in (old, new))
        assert torch.equal(after, codis.resize_pos_embed(before, 3, 3))
    assert not torch.equal(new.vision.pos_embed, new.vision_m.pos_embed)


@pytest.mark.parametrize("before, after, over", [("ve", "retrieval", {}), ("vqa", "pretrain", {}),
                                                 ("retrieval", "pretrain", dict(mlm_distill=0.4))])
def test_codis_init_gives_new_teachers_their_students(before, after, over, tmp_path):
    """A run without (all) teachers: those that are new are copies of what was loaded."""
    old, new = make_model(task=before), make_model(task=after, fill=False, **over)
    weights.initialize(new, write_run(old, tmp_path), codis.BACKBONE)
    state, kept = new.state_dict(), old.state_dict()
    parts = {"vision", "text"} | ({"fusion"} if over else set())
    for name, tensor in state.items():
        part = name.split(".")[0]
        if part.removesuffix("_m") in parts and part != "fusion":
            source = name if name in kept else name.replace("_m.", ".", 1)
            assert torch.equal(tensor, kept[source]), name
        if over and part == "fusion_m":
            assert torch.equal(tensor, kept[name.replace("_m.", ".", 1)]), name


# --------------------------------------------------------------------------------------------------
# Weights of other libraries

def shaken(module):
    """Random weights of ordinary size in place of a fresh model's, norms and biases included."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.eval()


def random_bert(layers):
    from transformers import BertConfig, BertForPreTraining
    return shaken(BertForPreTraining(BertConfig(
        vocab_size=57, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=14, attn_implementation="eager")))


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("task, upper", [("pretrain", 2), ("vqa", 2), ("nlvr2", 1), ("nlvr2", 2)])
def test_codis_text_tower_equals_transformers(task, upper):
    """Hidden states of BERT's first layer in the text tower, of the `upper` ones above it in the
    fusion layers and the decoder without a context, and the MLM logits; in float64."""
    bert, model = random_bert(1 + upper), make_model(task=task).eval()
    codis.load_pretrained(model, text=bert.state_dict())
    bert, model = bert.double(), model.double()
    text, mask = sentences(model.cfg, 5)
    with torch.no_grad():
        theirs = bert.bert(text, mask, output_hidden_states=True).hidden_states
        ours = [model.text.embeddings(text), model.text(text, mask)]
        towers = [model.fusion.blocks[::2 if task == "nlvr2" else 1]]
        towers += [model.decoder.blocks] if task == "vqa" else []
        differences = [(a - b)[mask.bool()].abs().max() for a, b in zip(ours, theirs)]
        for blocks in towers:
            x = ours[1]
            for block, expected in zip(blocks, theirs[2:]):
                x = block(x, attention_mask(mask))
                differences.append((x - expected)[mask.bool()].abs().max())
        if hasattr(model, "mlm_head"):
            logits = model.mlm_head(theirs[-1], model.text.embeddings.words.weight)
            differences.append((logits - bert.cls.predictions(theirs[-1])).abs().max())
    print(f"{task}: largest difference from transformers.BertModel {max(differences):.1e}")
    assert len(differences) >= 3 and max(differences) < 1e-6

    # both copies of NLVR2's layers, as far as the file goes
    if task == "nlvr2":
        first, second = (model.fusion.blocks[n].state_dict() for n in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first if "cross" not in name)


@pytest.mark.needs("timm")
@pytest.mark.parametrize("size", [32, 48])
def test_codis_vision_tower_equals_timm(size):
    """Tokens of timm's ViT; at another image size those of timm with resized embeddings."""
    from timm.models.vision_transformer import VisionTransformer
    sizes = dict(patch_size=16, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=5)
    theirs = shaken(VisionTransformer(img_size=32, **sizes))
    model = make_model(vision_layers=2, image_size=size).eval()
    codis.load_pretrained(model, vision=theirs.state_dict())
    if size != 32:
        position = codis.resize_pos_embed(theirs.pos_embed.detach(), size // 16, size // 16)
        theirs.set_input_size((size, size))
        theirs.pos_embed.data = position
    image = torch.randn(3, 3, size, size)
    with torch.no_grad():
        difference = (model.vision(image) - theirs.forward_features(image)).abs().max().item()
    print(f"largest difference from timm's ViT: {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.needs("transformers", "timm")
def test_codis_pretrained_weights_start_the_memory_anew():
    """Teachers are copies, queues hold no image; a file that lacks a tensor changes nothing."""
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3,
                            mlp_ratio=2)
    states = {"vision": vit.state_dict(), "text": random_bert(3).state_dict()}
    model = make_model(mlm_distill=0.4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for side, name in (("vision", "blocks.0.mlp.fc1.bias"),
                       ("text", "bert.encoder.layer.0.attention.self.key.weight")):
        hole = {**states, side: {n: x for n, x in states[side].items() if n != name}}
        with pytest.raises(KeyError, match=name.removeprefix("bert.")):
            codis.load_pretrained(model, **hole)
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())

    codis.load_pretrained(model, **states)
    for teacher, student in model.teachers():
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters()))
    assert torch.equal(model.vision.blocks[0].mlp[0].bias, vit.blocks[0].mlp.fc1.bias)
    assert (model.queue_ids == -1).all() and model.ptr == model.ramp == model.distill == 0


@pytest.mark.parametrize("side, over", [("vision", dict(stem="conv")), ("vision", dict(act="relu")),
                                        ("text", dict(act="relu"))])
def test_codis_towers_without_a_counterpart(side, over):
    with pytest.raises(SystemExit) as error:
        codis.foreign_names(make_model(**over), side)
    assert "\n" not in str(error.value) and side in str(error.value)


# --------------------------------------------------------------------------------------------------
# Distributed

CASES = [dict(), dict(codebook_features="student", codebook_target="same", intra=False,
                      batch_keys=False)]
IDS = [3, 5, 3, 20, 21, 20, 5, 3]  # images in both halves of the batch, and in the queue


def no_pairs(logits, labels):
    """In place of Eq. 7 and 8, whose dice differ between processes: nothing, with a gradient."""
    return logits.float().sum() * 0


def gathered_steps(case, rank=0, world=1):
    """Two steps on this process's share of a batch -> logs and gradients of each, the end state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    raw = make_model(**CASES[case])
    whole = make_batch(raw.cfg, b=8, ids=IDS)
    batch = {k: x.chunk(world)[rank] for k, x in whole.items()}
    model = raw
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False)
    params = {n: p for n, p in raw.named_parameters() if p.requires_grad}
    optimizer, steps = torch.optim.SGD(params.values(), 0.05), []
    with mock.patch.multiple(codis, itm_loss=no_pairs, mlm_loss=no_pairs):
        for step in range(2):
            out = model(batch)
            out["loss"].backward()
            raw.after_backward(out)
            logs = {n: x for n, x in out["logs"].items() if n not in ("itm", "mlm", "codebook_ppl")}
            steps.append((logs, {n: p.grad.clone() for n, p in params.items()}))
            optimizer.step()
            optimizer.zero_grad()
            raw.after_step(step + 1, 2)
    return steps, raw.state_dict()


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2)
    torch.save([gathered_steps(case, rank, 2) for case in range(len(CASES))], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_codis_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case in range(len(CASES)):
        one, state = gathered_steps(case)
        (first, state_0), (second, state_1) = ranks[0][case], ranks[1][case]
        assert {"i2t", "t2i", "ot", "tp", "ip"} <= one[0][0].keys()
        for (logs, grads), (logs_0, grads_0), (logs_1, grads_1) in zip(one, first, second):
            for name in logs:
                close((logs_0[name] + logs_1[name]) / 2, logs[name])
            same_gradients(grads_0, grads)
            assert all(torch.equal(grads_0[n], grads_1[n]) for n in grads_0)
        # queues, teachers and students of both ranks
        assert all(torch.equal(state_0[n], state_1[n]) for n in state)
        for name in state:
            close(state_0[name], state[name], 1e-4)


# --------------------------------------------------------------------------------------------------
# The right way downhill

def test_codis_eq1_attracts_codewords():
    """Algorithm 1 as printed would repel them."""
    model, z = make_model(), clusters(24, 16)

    def nearest():
        return (z @ model.codebook.detach().T).max(0).values.mean().item()

    start, ot = nearest(), []
    for _ in range(60):
        loss = model.code_losses(z, z, z, z)["ot"]
        ot.append(loss.item())
        grad, = torch.autograd.grad(loss, model.codebook)
        model.codebook.data = F.normalize(model.codebook.data - grad, dim=-1)
    assert nearest() > max(0.9, start) and ot[-1] < 0.3 * ot[0]


def test_codis_eq2_teaches_the_student_the_other_modalitys_plan():
    """Minimised over the students alone, L_tp and L_ip come near the entropy of the plans."""
    model = make_model(codebook_target="cross")
    m_v, m_t, z_v, z_t = units(4, 6, 16)
    labels = [soft(plan_of(m.double(), model.codebook.double(), model.cfg)) for m in (m_v, m_t)]
    bounds = [torch.special.entr(y).sum(1).mean().item() for y in labels]
    gaps = []
    for _ in range(150):
        z_v, z_t = z_v.requires_grad_(), z_t.requires_grad_()
        losses = model.code_losses(z_v, z_t, m_v, m_t)
        gaps.append([losses[name].item() - bound for name, bound in zip(("tp", "ip"), bounds)])
        g_v, g_t = torch.autograd.grad(losses["tp"] + losses["ip"], (z_v, z_t))
        z_v, z_t = (F.normalize(z - 0.03 * g, dim=-1).detach() for z, g in ((z_v, g_v), (z_t, g_t)))
    assert all(0 <= last < 0.05 * first for first, last in zip(gaps[0], gaps[-1]))


def test_codis_eq5_pulls_an_image_to_all_its_captions():
    ids, keys, queue = torch.tensor([0, 1, 0, 2]), units(4, 16), units(30, 16)
    z, z_m, none = units(4, 16), units(4, 16), torch.full((30,), -1)
    for _ in range(200):
        z.requires_grad_()
        rows = align_loss(z, z_m, ids, [(keys, ids), (queue, none)], torch.tensor(0.1),
                          torch.tensor(0.0), 8)
        z = F.normalize(z.detach() - 0.1 * torch.autograd.grad(rows.sum(), z)[0], dim=-1)
    sim = z @ torch.cat([keys, queue]).T
    same = torch.cat([ids, none]) == ids[:, None]
    assert all(row[ok].min() > row[~ok].max() for row, ok in zip(sim, same))


def test_codis_learns_one_batch_by_heart():
    """Every loss of Eq. 9 falls, and the heads say what they were taught."""
    model = make_model(fill=False, queue_size=8, momentum=0.8, distill=0.0)
    batch = make_batch(model.cfg, b=6)
    groups = model.param_groups(mock.Mock(lr=5e-3, weight_decay=0.0))
    optimizer, logs = torch.optim.AdamW(groups, lr=5e-3), []
    for step in range(160):
        out = model(batch)
        out["loss"].backward()
        model.after_backward(out)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step + 1, 160)
        logs.append(out["logs"])
    for name in ("mlm", "itm", "i2t", "t2i", "i2i", "t2t", "ot"):
        first, last = (mean([float(x[name]) for x in part]) for part in (logs[:3], logs[-10:]))
        assert last < first, (name, first, last)
    model.eval()
    with torch.no_grad():
        sim = model.encode_image(batch) @ model.encode_text(batch).T
        images = batch["image"][:, None].expand(-1, 6, -1, -1, -1)
        scores = torch.stack([model.match({**batch, "image": image}) for image in images])
    assert torch.equal(sim.argmax(1), torch.arange(6))
    assert scores.diag().min() > 0
    assert scores.diag().mean() > scores[~torch.eye(6).bool()].mean() + 2


def test_codis_gradcam_points_at_the_named_object():
    """Figure 4 on shapes: a small matcher learns whether a color is in the picture; then the share
    of the word's map in the box of the object of that color is at least 1.5 times the box's share
    of the picture."""
    import numpy as np

    from eval import box_cover
    from tools import shapes
    rng, cells, colors = np.random.default_rng(0), 4, list(shapes.COLORS)
    cfg = Config(image_size=64, stem="conv", vision_width=64, vision_layers=1, vision_heads=4,
                 width=64, text_layers=1, fusion_layers=2, heads=4, mlp_ratio=2, act="relu",
                 dropout=0.0, embed_dim=16, max_text=3, vocab_size=16, mask_id=4, cls_id=2,
                 sep_id=3, first_word=5, queue_size=4, codewords=4, init_std=0.08, pos_std=0.5)

    # pictures of a large object and a small one of another color
    pictures, present, boxes = [], [], []
    for _ in range(256):
        color, other = rng.choice(len(colors), 2, replace=False)
        cell, beside = rng.choice(9, 2, replace=False)
        shape, kind = rng.choice(shapes.SHAPES, 2)
        large = shapes.Obj(cell // 3, cell % 3, "large", colors[color], str(shape))
        small_one = shapes.Obj(beside // 3, beside % 3, "small", colors[other], str(kind))
        picture, masks = shapes.draw_scene((large, small_one), rng)
        ys, xs = masks[0].nonzero()
        pictures.append(torch.from_numpy(picture.copy()).permute(2, 0, 1) / 64 - 2)
        present.append((color, other))
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    pictures, present = torch.stack(pictures), torch.tensor(present)

    def ask(rows, color):
        text = torch.stack([torch.full_like(color, 2), 5 + color, torch.full_like(color, 3)], 1)
        return {"image": pictures[rows], "text": text, "text_mask": torch.ones_like(text)}

    # is there an object of this color? half of the answers are yes
    model = Codis(cfg, "retrieval").train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(600):
        rows = torch.randint(0, 192, (32,))
        absent = (present[rows].sum(1) + torch.randint(1, 7, (32,))) % 8
        truth = torch.arange(32) % 2 == 0
        color = torch.where(truth, present[rows, 0], absent)
        truth = (present[rows] == color[:, None]).any(1)
        loss = F.binary_cross_entropy_with_logits(model.match(ask(rows, color)), truth.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # the maps of the color's word, on pictures it has not seen
    rows = torch.arange(192, 256)
    word = model.gradcam(ask(rows, present[rows, 0]))["word"][:, 1].double().numpy()    # (64, 4, 4)
    cover = np.stack([box_cover([boxes[i]], (64, 64), (cells, cells)) for i in rows])
    inside, uniform = (word * cover).sum() / word.sum(), cover.mean()
    assert inside > 1.5 * uniform, (loss.item(), inside, uniform)
