"""ImageBERT: one transformer over the words of a sentence and the regions of an image.

Qi, Su, Song, Cui, Bharti, Sacheti, "ImageBERT: Cross-modal Pre-training with Large-scale Weak-supervised Image-Text
Data", 2020.

A detector has turned the image into regions: feature, box and label. BERT reads sentence and regions as one sequence.
Pre-training hides words (MLM) and regions (label: MOC, feature: MRFR) and asks whether the two belong together (ITM),
first on much noisy web data, then on less and cleaner data: stages. Fine-tuning keeps the matching score alone and
trains it against negatives. There is no embedding of one side: retrieval scores every pair of an image and a sentence.

    words ---> word + segment + position, LN --------------+
                                                           +--> [CLS] w .. w [SEP] v .. v --> BERT
                                                           |        +--------------------------+
                                                           |        +--> [CLS]    --> Eq. 5-9 match?
    regions -> feature + box + segment + dummy pos., LN ---+        +--> hidden w --> Eq. 2 word
    (image --> one more token, with global_feature) -------+        +--> hidden v --> Eq. 3 label, Eq. 4 feature

Shapes: B pairs, T text tokens, R regions, F feature of a region, D width, S = T + R (+ 1), M hidden places,
P candidates, K labels.

Equations (the paper numbers none; ours, in its order)
    Eq. 1 -> box_code(), embed_region()     Eq. 2 -> mlm_loss(), mask_tokens()      Eq. 3 -> moc_loss(), mask_regions()
    Eq. 4 -> mrfr_loss()                    Eq. 5 -> itm_loss(), mismatch()         Eq. 6 -> bce_loss()
    Eq. 7 -> ce_loss()                      Eq. 8 -> hardest_negative()             Eq. 9 -> triplet_loss()

Deviations from the paper
     1. Signs: MOC, MRFR, CE and triplet are printed with a leading minus, which would maximise them: left out. The
        triplet lacks minus and margin: max(0, 0.2 - s+ + s_h-), once (its sum over N is idle).
     2. p_img = PositionEmbed(c), the 5-d box; the paper prints PositionEmbed(e), the sum that p_img is a part of.
     3. MRFR is printed as a sum over a feature's F numbers; with F in the thousands it drowns the other losses. Here it
        is their mean; `--mrfr F` gives the print. Losses over hidden places are means over the places, not sums.
     4. s and c are sigmoids of one logit; all losses but the triplet compute with logits. CE is a softmax over the P
        logits.
     5. Of a sentence's n words exactly max(1, round(0.15 n)) are chosen, as BERT's own code does; of regions each with
        probability 0.15 as printed, up to a count that one image of 24,000 exceeds (100 regions; one of 9,600 with 36),
        so that shapes do not depend on data.
     6. A region whose twin stays visible would give nothing to learn: every region that overlaps a zeroed one with IoU
        above `twin_iou` is zeroed too, without a loss of its own. `twin_iou=1` is the print.
     7. The global feature comes from a CNN that saw the whole image, hidden regions included.
     8. Half of a batch are mismatched pairs: another sentence or another image, at random, of another image id, from
        the same batch. They are masked as well, without the masked losses. Fine-tuning's P - 1 negatives a direction
        come from the batch too. P is not printed: 4.
     9. Adam without schedule, warm-up, decay or clipping, as nothing else is printed. The dummy position is the last
        row of BERT's position table. The MLM head is BERT's ("the same with the MLM task in BERT"); the other heads are
        one linear layer.
    10. The paper's detector knows 1,600 Visual Genome classes; `data.py regions` uses torchvision's with 91 COCO ids,
        up to 100 regions over score 0.05, or converts bottom-up-attention files. Boxes without label have no part in
        MOC.
    11. `act="relu"` exists for `tiny`.

Run: python models/imagebert.py      (2 s: shapes, parameters and every loss on a random batch)
"""

import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    width: int = 768                # D
    layers: int = 12                # transformer layers
    heads: int = 12                 # attention heads
    mlp_ratio: int = 4              # hidden width of a feed-forward block over D
    act: str = "gelu"               # "gelu" or "relu"
    dropout: float = 0.1            # everywhere, as BERT
    max_text: int = 44              # tokens of a sentence, [CLS] and [SEP] included; with 100 regions 144
    max_regions: int = 100          # regions of an image, the detector's surest (Table 4, part 3: 36 or 100)
    positions: int = 512            # position embeddings, as BERT; the last one is that of all regions
    vocab_size: int = 30522         # taken from the vocabulary file
    pad_id: int = 0                 # [PAD], taken from the vocabulary file
    cls_id: int = 101               # [CLS], likewise
    sep_id: int = 102               # [SEP], likewise
    mask_id: int = 103              # [MASK], likewise
    first_word: int = 999           # lowest id of an ordinary word, likewise
    region_dim: int = 1024          # F, taken from the regions file
    region_classes: int = 91        # K labels of the detector, taken from the regions file
    global_feature: bool = False    # the whole image as one more token (Table 4, part 1)
    global_dim: int = 2048          # its size, taken from the regions file
    mlm: float = 1.0                # weight of Eq. 2; 0 leaves the task out
    moc: float = 1.0                # weight of Eq. 3; 0 leaves the task out
    mrfr: float = 1.0               # weight of Eq. 4 (Table 4, part 2); 0 leaves the task out
    itm: float = 1.0                # weight of Eq. 5; 0 leaves the task out
    mlm_prob: float = 0.15          # share of words hidden
    region_prob: float = 0.15       # probability that a region is hidden
    region_zero: float = 0.9        # of these, the share whose feature becomes zero; the others stay as they are
    twin_iou: float = 0.4           # a region that overlaps a zeroed one more than this is zeroed too
    bce: float = 1.0                # fine-tuning: weight of Eq. 6, the paper's best alone (Table 4, part 4)
    ce: float = 0.0                 # weight of Eq. 7
    triplet: float = 0.0            # weight of Eq. 9
    margin: float = 0.2             # of Eq. 9
    pool: int = 4                   # P: the positive and P - 1 negatives a direction, fewer where the batch has fewer
    negatives: str = "both"         # "text": sentences for each image; "image": images for each sentence; "both"
    init_std: float = 0.02          # standard deviation of initial weights, BERT's
    checkpointing: bool = False     # recompute layers in backward instead of keeping their activations


PRESETS = {
    "base": dict(),
    "tiny": dict(width=128, layers=3, heads=4, mlp_ratio=4, act="relu", dropout=0.0, max_text=24, max_regions=3,
                 init_std=0.05, itm=3.0,            # matching is learnt last: so it starts after 600 steps, not 1,400
                 pretrain=[dict(optimizer="adamw", batch_size=64, steps=3000, lr=1e-3,
                                warmup_steps=100, schedule="cosine", min_lr=1e-5, eval_limit=100)],
                 retrieval=dict(optimizer="adamw", batch_size=24, steps=400, lr=2e-4,
                                schedule="cosine", eval_limit=100)),
}

# Sections 5.1 (pre-training, both stages alike, from BERT's weights: --init_text bert-base-uncased)
# and 5.2 (fine-tuning).
# Stage 1 is LAIT, stage 2 CC + SBU: --stage_data LAIT CC,SBU.
# Table 1: pre-trained only; Table 2: `--task retrieval --init RUN --data FLICKR|COCO`.
#   COCO is evaluated on 5,000 images and 5 x 1,000.
# Table 3, all on `--task pretrain`, evaluated on Flickr30K without fine-tuning:
#   LAIT                                --stage_data LAIT
#   CC; CC+SBU                          --stage_data CC --limit 0; --stage_data CC,SBU --limit 0
#   LAIT+CC+SBU, one stage              --stage_data LAIT,CC,SBU --limit 0           (LAIT being the 2M)
#   LAIT -> (CC+SBU)                    --stage_data LAIT CC,SBU
# Table 4, part 1: --global_feature (regions made with data.py regions --global_feature NAME); 2: --mrfr 0 and --mrfr 1;
#   3: --max_regions 36 and 100; 4: --ce 1 --triplet 1; --bce 0 --ce 1; --bce 0 --triplet 1; the default.
STAGE = dict(optimizer="adam", lr=1e-4, schedule="constant", epochs=17, batch_size=48)
RECIPE = {
    "pretrain": [dict(STAGE, limit=2_000_000, own_data=True), STAGE],  # "we only sampled 2M from LAIT"
    "retrieval": dict(optimizer="adam", lr=5e-5, schedule="constant", epochs=130, batch_size=24),
}

TASKS = ("pretrain", "retrieval")
EVALS = {"pretrain": ("retrieval", "masked"), "retrieval": ("retrieval",)}
INITS = ("text",)
VIEWS = {task: dict(source="pairs", regions="regions", text="caption") for task in TASKS}
BACKBONE = ("bert.", "regions.")  # `--init` must fill every key that starts so


def setup(cfg, task, stats):
    """Sizes that the regions file decides, and settings that cannot be. stats: data.stats() of the training records."""
    for field, values in (("negatives", ("both", "text", "image")), ("act", ("gelu", "relu"))):
        if getattr(cfg, field) not in values:
            raise SystemExit(f"--{field} {getattr(cfg, field)}: it is one of {', '.join(values)}")
    if cfg.pool < 2:
        raise SystemExit(f"--pool {cfg.pool}: the positive and at least one negative make 2")
    if cfg.max_text >= cfg.positions:
        raise SystemExit(f"--max_text {cfg.max_text}: of {cfg.positions} positions the last is that of the regions")
    if cfg.width % cfg.heads:
        raise SystemExit(f"--width {cfg.width}: not a multiple of {cfg.heads} heads")
    cfg.region_dim, cfg.region_classes = stats["region_dim"], stats["region_classes"]
    if not any((cfg.mlm, cfg.moc, cfg.mrfr, cfg.itm) if task == "pretrain" else (cfg.bce, cfg.ce, cfg.triplet)):
        raise SystemExit("every loss has weight 0: nothing to train")
    if task == "pretrain" and cfg.moc and not cfg.region_classes:
        raise SystemExit("the regions carry no labels, which MOC learns from: use --moc 0, "
                         "or regions of a detector with labels")
    if cfg.global_feature:
        cfg.global_dim = stats["global_dim"]
        if not cfg.global_dim:
            raise SystemExit("--global_feature: the regions file has none: "
                             "make it with data.py regions --global_feature NAME")


# --------------------------------------------------------------------------------------------------
# Blocks. Keys are named as in Hugging Face's BERT.

# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


# Copied from models/codis.py::split_heads
def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, heads, S, D/heads)


# Copied from models/codis.py::attend
def attend(q, k, v, heads, mask=None, dropout=0.0, maps=None):
    """Multi-head attention. q: (B, S, D); k, v: (B, L, D); mask: bool, broadcastable to (B, heads, S, L), True = look.

    A list given as `maps` receives the attention probabilities (B, heads, S, L), still in the graph (Grad-CAM).
    """
    q, k, v = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    if maps is None:
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    else:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        maps.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1))
        x = maps[-1] @ v
    return x.transpose(1, 2).flatten(2)  # (B, S, D)


# Copied from models/codis.py::BertEmbeddings
class BertEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.width, padding_idx=cfg.pad_id)
        self.position_embeddings = nn.Embedding(cfg.positions, cfg.width)
        self.token_type_embeddings = nn.Embedding(2, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=1e-12)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, text):
        x = (self.word_embeddings(text) + self.position_embeddings.weight[:text.shape[1]]
             + self.token_type_embeddings.weight[0])
        return self.dropout(self.LayerNorm(x))                                       # (B, T, D)


# Copied from models/codis.py::QueryKeyValue
class QueryKeyValue(nn.Module):
    def __init__(self, width, context_width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)


# Copied from models/codis.py::BertOutput
class BertOutput(nn.Module):
    def __init__(self, cfg, width):
        super().__init__()
        self.dense = nn.Linear(width, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=1e-12)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


# Copied from models/codis.py::BertAttention
class BertAttention(nn.Module):
    """Attention to a context of any width. keys() is apart, so that one context's keys and values can serve many
    queries."""

    def __init__(self, cfg, context_width):
        super().__init__()
        self.heads, self.p = cfg.heads, cfg.dropout
        self.self = QueryKeyValue(cfg.width, context_width)
        self.output = BertOutput(cfg, cfg.width)

    def keys(self, context):
        return self.self.key(context), self.self.value(context)                      # 2 x (B, L, D)

    def forward(self, x, keys, mask=None, maps=None):
        dropout = self.p if self.training else 0.0
        return self.output(attend(self.self.query(x), *keys, self.heads, mask, dropout, maps), x)


# Copied from models/codis.py::BertIntermediate
class BertIntermediate(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dense = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.act = activation(cfg.act)

    def forward(self, x):
        return self.act(self.dense(x))


# Copied from models/codis.py::pick
def pick(x, at):
    """x: (B, T, D), at: (B, S) -> (B, S, D), the tokens at these positions."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# Copied from models/codis.py::MLMHead
class MLMHead(nn.Module):
    """BERT's prediction head; the decoder's weight is the word embedding, handed in."""

    def __init__(self, cfg):
        super().__init__()
        self.transform = nn.Sequential()
        self.transform.dense = nn.Linear(cfg.width, cfg.width)
        self.transform.act = activation(cfg.act)
        self.transform.LayerNorm = nn.LayerNorm(cfg.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.transform(x), word_embeddings, self.bias)               # (..., D) -> (..., vocabulary)


class Layer(nn.Module):
    """A post-norm BERT layer. `at`: (B, A) places to compute, all where None: keys and values still come from
    everywhere."""

    def __init__(self, cfg):
        super().__init__()
        self.attention = BertAttention(cfg, cfg.width)
        self.intermediate = BertIntermediate(cfg)
        self.output = BertOutput(cfg, cfg.mlp_ratio * cfg.width)

    def forward(self, x, mask, at=None):
        x = self.attention(x if at is None else pick(x, at), self.attention.keys(x), mask)
        return self.output(self.intermediate(x), x)                                  # (B, S or A, D)


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.checkpointing = cfg.checkpointing

    def forward(self, x, mask, at):
        """x: (B, S, D); mask: (B, S), 1 = a token; at: (B, A) -> (B, A, D): the last layer computes only what somebody
        reads."""
        mask = mask[:, None, None].bool()                                            # (B, 1, 1, S)
        for n, layer in enumerate(self.layer):
            places = at if n + 1 == len(self.layer) else None
            save = self.checkpointing and self.training
            x = checkpoint(layer, x, mask, places, use_reentrant=False) if save else layer(x, mask, places)
        return x


class Bert(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embeddings = BertEmbeddings(cfg)
        self.encoder = Encoder(cfg)


class RegionEmbeddings(nn.Module):
    """Section 4.1, image embedding: regions (B, R, F), their boxes and the image's size -> tokens (B, R, D),
    one more with `image`."""

    def __init__(self, cfg):
        super().__init__()
        self.feature = nn.Linear(cfg.region_dim, cfg.width)                          # ImageEmbed
        self.box = nn.Linear(5, cfg.width)                                           # PositionEmbed of a box
        if cfg.global_feature:
            self.image = nn.Linear(cfg.global_dim, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=1e-12)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, regions, boxes, size, segment, position, image=None):
        v, c = self.feature(regions), box_code(boxes, size)                          # (B, R, D), (B, R, 5)
        if image is not None:                                                        # its box is the image
            whole = torch.cat([torch.zeros_like(size), size], -1)[:, None]           # (B, 1, 4)
            v, c = torch.cat([v, self.image(image)[:, None]], 1), torch.cat([c, box_code(whole, size)], 1)
        return self.dropout(embed_region(v, segment, self.box(c), position, self.LayerNorm))


# --------------------------------------------------------------------------------------------------
# The paper's equations

def box_code(boxes, size):
    """Section 4.1: c = (x_tl/W, y_tl/H, x_br/W, y_br/H, (x_br - x_tl)(y_br - y_tl) / (W H)).

    boxes: (..., R, 4) xyxy in pixels; size: (..., 2) width and height of the image in pixels
    -> (..., R, 5) in [0, 1]."""
    c = boxes / size.repeat(*[1] * (size.ndim - 1), 2).unsqueeze(-2)
    return torch.cat([c, (c[..., 2:3] - c[..., 0:1]) * (c[..., 3:4] - c[..., 1:2])], -1)


def embed_region(v, s, p_img, p_seq, norm):
    """Eq. (1): e^(i) = LN(v^(i) + s^(i) + p_img^(i) + p_seq^(i)).  v, p_img: (B, R, D); s, p_seq: (D,);
    norm: LN -> (B, R, D)."""
    return norm(v + s + p_img + p_seq)


def mlm_loss(logits, labels):
    """Eq. (2): L_MLM = -E log P(w_m | w_\\m, v). logits: (B, M, V);
    labels: (B, M), -100 = no hidden word here -> 0-d."""
    return masked_cross_entropy(logits, labels)


def moc_loss(logits, labels):
    """Eq. (3): L_MOC = E sum_i CE(l(v_m^(i)), f(v_m^(i))), as a mean. logits: (B, M, K);
    labels: (B, M), -100 = none -> 0-d."""
    return masked_cross_entropy(logits, labels)


# Copied from models/codis.py::masked_cross_entropy
def masked_cross_entropy(logits, labels):
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)  # 0, not NaN, where nothing counts


def mrfr_loss(h, r, live):
    """Eq. (4): L_MRFR = E sum_i ||h(v_m^(i)) - r(v_m^(i))||^2, as a mean over i. h, r: (B, M, F);
    live: (B, M) bool -> 0-d."""
    return ((h.float() - r.float()).square().sum(-1) * live).sum() / live.sum().clamp(min=1)


def itm_loss(s, y):
    """Eq. (5): L_ITM = -E [y log s + (1 - y) log(1 - s)].  s: (B,) logits; y: (B,), 1 = matched -> 0-d."""
    return F.binary_cross_entropy_with_logits(s.float(), y.float())


def bce_loss(c, y, live):
    """Eq. (6): L_BCE = -E [y log c + (1 - y) log(1 - c)].  c: (R,) logits; y: (R,);
    live: (R,) bool, 1 = counts -> 0-d."""
    loss = F.binary_cross_entropy_with_logits(c.float(), y.float(), reduction="none")
    return (loss * live).sum() / live.sum().clamp(min=1)


def ce_loss(s, live):
    """Eq. (7): L_CE = E CE(s, l): softmax over P candidates, the positive first.

    s: (..., P) logits; live: (..., P) bool, 0 = not another image; a row without a negative does not count -> 0-d."""
    loss = s[..., 0].float() - s.float().masked_fill(~live, -torch.inf).logsumexp(-1)
    rows = live[..., 1:].any(-1)
    return -(loss * rows).sum() / rows.sum().clamp(min=1)


def hardest_negative(s, live):
    """Eq. (8): n_h = arg max over the negatives of s. s: (..., P-1); live: (..., P-1) bool -> (...,) index;
    any where none lives."""
    return s.masked_fill(~live, -torch.inf).argmax(-1)


def triplet_loss(s_pos, s_neg, live, margin=0.2):
    """Eq. (9): L_Triplet = E max[0, margin - s(+) + s(n_h)].  s_pos, s_neg: (...,) in [0, 1];
    live: (...,) bool -> 0-d."""
    return ((margin - s_pos + s_neg).clamp(min=0) * live).sum() / live.sum().clamp(min=1)


# Copied from models/codis.py::mask_tokens with 3.3.2->4.3
@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15, mask_only=False):
    """Section 4.3: chooses max(1, round(prob n)) of a row's n maskable tokens; 80 % become [MASK],
    10 % a random word, 10 % stay.

    text: (B, T) int64; maskable: (B, T) bool -> masked text (B, T), positions (B, M), labels (B, M) with -100 where
    a row has fewer than M = max(1, round(prob T)) chosen. Shapes depend on T alone. Random words come from
    first_word..vocab_size-1.
    """
    n = maskable.sum(-1, keepdim=True)
    m = max(1, round(prob * text.shape[1]))
    chosen = (n * prob).round().clamp(min=1).minimum(n)                              # (B, 1) how many
    order = torch.rand(text.shape, device=text.device).masked_fill(~maskable, -1.0)
    positions = order.topk(m, -1).indices                                            # (B, M)
    live = torch.arange(m, device=text.device) < chosen
    words = text.gather(1, positions)
    labels = words.masked_fill(~live, -100)
    dice = torch.rand(positions.shape, device=text.device)
    if not mask_only:
        noise = torch.randint(first_word, vocab_size, positions.shape, device=text.device)
        words = torch.where(live & (dice >= 0.8) & (dice < 0.9), noise, words)
    words = words.masked_fill(live & ((dice < 0.8) | mask_only), mask_id)
    return text.scatter(1, positions, words), positions, labels


def box_iou(boxes):
    """(B, R, 4) xyxy -> (B, R, R) intersection over union of every two boxes of an image; empty boxes have 0."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)                                        # (B, R, R)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)                   # (B, R)
    return both / (area[:, :, None] + area[:, None] - both).clamp(min=1e-6)


@torch.no_grad()
def mask_regions(regions, boxes, region_mask, prob=0.15, zero=0.9, twin_iou=0.4):
    """Section 4.3, task 2: each region is chosen with probability prob; of the chosen, `zero` get the feature 0, the
    others keep it. Regions that overlap a zeroed one by more than twin_iou are zeroed too: they show what is to be
    guessed.

    regions: (B, R, F); boxes: (B, R, 4); region_mask: (B, R), 1 = a region -> regions (B, R, F), positions (B, M),
    live (B, M) bool. M, the most that can be chosen, depends on R alone: the mean and four standard deviations."""
    r = regions.shape[1]
    m = min(r, math.ceil(prob * r + 4 * math.sqrt(prob * (1 - prob) * r)))
    dice = torch.rand(region_mask.shape, device=regions.device).masked_fill(region_mask == 0, 1.0)
    value, positions = dice.topk(m, -1, largest=False)                               # (B, M); below prob = chosen
    live = value < prob
    gone = torch.zeros_like(region_mask, dtype=torch.bool).scatter(1, positions, value < prob * zero)      # (B, R)
    twins = ((box_iou(boxes) > twin_iou) & gone[:, None]).any(-1)
    return regions.masked_fill((gone | twins)[..., None], 0), positions, live


@torch.no_grad()
def others(ids, n):
    """n different samples of other images for each sample of a batch, at random. ids: (B,) image ids
    -> (B, n) indices, (B, n) bool: is it of another image? (a batch may hold fewer than n). n: at most B."""
    same = ids[:, None] == ids
    noise, index = torch.rand(same.shape, device=ids.device).masked_fill(same, -1.0).topk(n, -1)
    return index, noise >= 0


@torch.no_grad()
def mismatch(ids, n):
    """Pairs for Eq. (5): the last n of the batch (its order is random) get another sentence or another image,
    where it has one.
    ids: (B,) -> (B,) index of the image, (B,) index of the sentence, (B,) y: 1 = they belong together."""
    own = torch.arange(len(ids), device=ids.device)
    index, found = (x.squeeze(-1) for x in others(ids, 1))
    swap = found & (own >= len(ids) - n)
    coin = torch.rand(len(ids), device=ids.device) < 0.5
    return torch.where(swap & coin, index, own), torch.where(swap & ~coin, index, own), (~swap).float()


# --------------------------------------------------------------------------------------------------
# The model

class ImageBert(nn.Module):
    """A batch is a dict: text, text_mask (B, T); regions (B, R, F), regions_box (B, R, 4) xyxy pixels,
    regions_size (B, 2) width and height, regions_mask (B, R), regions_label (B, R) with -1 = none;
    regions_global (B, G) with global_feature; image_id (B,)."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.task = cfg, task
        self.bert = Bert(cfg)
        self.regions = RegionEmbeddings(cfg)
        if task == "pretrain" and cfg.mlm:
            self.mlm_head = MLMHead(cfg)
        if task == "pretrain" and cfg.moc:
            self.moc_head = nn.Linear(cfg.width, cfg.region_classes)
        if task == "pretrain" and cfg.mrfr:
            self.mrfr_head = nn.Linear(cfg.width, cfg.region_dim)
        if task != "pretrain" or cfg.itm:
            self.itm_head = nn.Linear(cfg.width, 1)
        else:
            self.match = None                                        # eval.py asks
        if task != "pretrain":
            self.masked_predictions = None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=cfg.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    # -- the sequence

    def embed_images(self, regions, boxes, size, region_mask, image=None):
        """Eq. (1) -> image tokens (B, R, D), with the global feature (B, R+1, D), and their mask.
        Regions share one position."""
        tables = self.bert.embeddings
        x = self.regions(regions, boxes, size, tables.token_type_embeddings.weight[1],
                         tables.position_embeddings.weight[-1], image)
        return x, F.pad(region_mask, (0, x.shape[1] - region_mask.shape[1]), value=1)

    def images_of(self, batch, index=None, regions=None):
        """embed_images() of a batch's images, or of those at `index`; `regions` in place of their features,
        where masked."""
        keys = ["regions_box", "regions_size", "regions_mask"] + ["regions_global"] * self.cfg.global_feature
        box, size, mask, *image = [batch[k] if index is None else batch[k][index] for k in keys]
        regions = batch["regions"] if regions is None else regions
        return self.embed_images(regions.float(), box.float(), size.float(), mask, *[x.float() for x in image])

    def encode(self, words, text_mask, image_tokens, image_mask, *places):
        """[CLS] text [SEP] regions through the transformer. words: (R, T, D), image_tokens: (R, S-T, D), both embedded,
        with masks -> [CLS] (R, D) and, for each (R, M) of places in the sequence, (R, M, D)."""
        at = torch.cat([torch.zeros_like(text_mask[:, :1]), *places], 1)             # (R, 1 + M + ..)
        x = self.bert.encoder(torch.cat([words, image_tokens], 1), torch.cat([text_mask, image_mask], 1), at)
        cls, *rest = x.split([1] + [p.shape[1] for p in places], 1)
        return cls.squeeze(1), *rest

    def score(self, *sequence):
        """(R,) float32 logits of s = c = "this sentence belongs to this image", from encode()'s arguments."""
        return self.itm_head(self.encode(*sequence)[0]).squeeze(-1).float()

    def image_states(self, batch):
        """What match() needs of an image: `image_tokens` (B, R, D), `image_mask` (B, R)."""
        return dict(zip(("image_tokens", "image_mask"), self.images_of(batch)))

    def text_states(self, batch):
        """What match() needs of a sentence: its ids, `text` and `text_mask` (B, T)."""
        return {"text": batch["text"], "text_mask": batch["text_mask"]}

    def match(self, batch):
        """(B,) logits of "matched". Takes image_states() and text_states(), or a raw batch.
        Rows do not depend on each other."""
        if "image_tokens" not in batch:
            batch = {**batch, **self.image_states(batch)}
        return self.score(self.bert.embeddings(batch["text"]), batch["text_mask"], batch["image_tokens"],
                          batch["image_mask"])

    # -- losses

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def hidden(self, batch, image, sentence, m):
        """Masks pairs (image, sentence), both (B,) indices into the batch, and runs them -> [CLS] (B, D), and of the
        first m pairs {task: (what its head says, what is true)}: logits (m, M, V or K) and labels (m, M);
        for mrfr also which count."""
        cfg = self.cfg
        text, text_mask = batch["text"][sentence], batch["text_mask"][sentence]
        box, mask, regions = (batch["regions_box"][image].float(), batch["regions_mask"][image],
                              batch["regions"][image].float())
        masked, words, word_labels = text, text[:, :0], None
        if cfg.mlm:
            maskable = text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
            masked, words, word_labels = mask_tokens(text, maskable, cfg.mask_id, cfg.first_word,
                                                     cfg.vocab_size, cfg.mlm_prob)
        zeroed, places = regions, text[:, :0]
        if cfg.moc or cfg.mrfr:
            zeroed, places, live = mask_regions(regions, box, mask, cfg.region_prob, cfg.region_zero, cfg.twin_iou)
        cls, word_tokens, region_tokens = self.encode(self.bert.embeddings(masked), text_mask,
                                                      *self.images_of(batch, image, zeroed), words,
                                                      text.shape[1] + places)
        found, region_tokens = {}, region_tokens[:m]
        if cfg.mlm:
            found["mlm"] = self.mlm_head(word_tokens[:m], self.bert.embeddings.word_embeddings.weight), word_labels[:m]
        if cfg.moc:
            labels = batch["regions_label"][image].gather(1, places)[:m]
            found["moc"] = self.moc_head(region_tokens), labels.masked_fill(~live[:m] | (labels < 0), -100)
        if cfg.mrfr:
            found["mrfr"] = self.mrfr_head(region_tokens), pick(regions, places)[:m], live[:m]
        return cls, found

    def loss_pretrain(self, batch):
        """Section 4.3: the sum of the four tasks, the masked ones on matched pairs only (conditional mask)."""
        cfg, b = self.cfg, len(batch["image_id"])
        image, sentence, y = mismatch(batch["image_id"], b // 2 if cfg.itm else 0)
        cls, found = self.hidden(batch, image, sentence, b - b // 2 if cfg.itm else b)
        losses, logs = {}, {}
        if cfg.mlm:
            losses["mlm"] = mlm_loss(*found["mlm"])                                   # Eq. 2
        if cfg.moc:
            losses["moc"] = moc_loss(*found["moc"])                                   # Eq. 3
        if cfg.mrfr:
            losses["mrfr"] = mrfr_loss(*found["mrfr"]) / cfg.region_dim               # Eq. 4
        if cfg.itm:
            s = self.itm_head(cls).squeeze(-1)
            losses["itm"] = itm_loss(s, y)                                            # Eq. 5
            logs["itm_acc"] = ((s > 0) == y.bool()).float().mean()
        loss = sum(getattr(cfg, name) * value for name, value in losses.items())
        return {"loss": loss, "logs": {k: v.detach() for k, v in losses.items()} | logs}

    def loss_retrieval(self, batch):
        """Section 4.4: any weighted sum of Eq. 6, 7 and 9, against P - 1 negatives in one or both directions,
        without masks."""
        cfg, ids = self.cfg, batch["image_id"]
        b, n = len(ids), max(1, min(cfg.pool, len(ids)) - 1)         # others() says which are none
        ways = ("text", "image") if cfg.negatives == "both" else (cfg.negatives,)
        own = torch.arange(b, device=ids.device)
        image, sentence, live = [own], [own], []
        for way in ways:                                # other sentences for each image, other images for each sentence
            index, found = others(ids, n)                            # (B, P-1)
            same = own.repeat_interleave(n)
            image.append(same if way == "text" else index.flatten())
            sentence.append(index.flatten() if way == "text" else same)
            live.append(found)
        image, sentence, live = torch.cat(image), torch.cat(sentence), torch.stack(live)    # live: (ways, B, P-1)
        words, (tokens, mask) = self.bert.embeddings(batch["text"]), self.images_of(batch)  # each embedded once
        s = self.score(words[sentence], batch["text_mask"][sentence],
                       tokens[image], mask[image])                                          # (B + ways * B * (P-1),)
        positive, negative = s[:b], s[b:].view(len(ways), b, n)

        losses = {}
        if cfg.bce:
            y = torch.cat([torch.ones_like(positive), torch.zeros_like(s[b:])])
            losses["bce"] = bce_loss(s, y, F.pad(live.flatten(), (b, 0), value=True))                # Eq. 6
        if cfg.ce:
            rows = torch.cat([positive.expand(len(ways), -1)[..., None], negative], -1)              # (ways, B, P)
            losses["ce"] = ce_loss(rows, F.pad(live, (1, 0), value=True))                            # Eq. 7
        if cfg.triplet:
            hardest = negative.gather(-1, hardest_negative(negative, live)[..., None]).squeeze(-1)   # Eq. 8, (ways, B)
            losses["triplet"] = triplet_loss(positive.sigmoid(), hardest.sigmoid(), live.any(-1), cfg.margin)    # Eq. 9
        loss = sum(getattr(cfg, name) * value for name, value in losses.items())
        right = (positive > negative.masked_fill(~live, -torch.inf).amax(-1)).float().mean()         # over the P - 1
        return {"loss": loss, "logs": {k: v.detach() for k, v in losses.items()} | {"first": right}}

    def masked_predictions(self, batch):
        """Matched pairs, masked as in training -> {"mlm": (guess, truth), "moc": ...}, both (B, M) int64,
        truth -100 = none there."""
        own = torch.arange(len(batch["image_id"]), device=batch["text"].device)
        _, found = self.hidden(batch, own, own, len(own))
        return {name: (found[name][0].argmax(-1), found[name][1]) for name in ("mlm", "moc") if name in found}

    def param_groups(self, cfg):
        """Weight decay, if any, on matrices only."""
        groups = [[p for p in self.parameters() if p.ndim > 1], [p for p in self.parameters() if p.ndim < 2]]
        return [{"params": p, "lr": cfg.lr, "weight_decay": d} for p, d in zip(groups, (cfg.weight_decay, 0.0))]


# --------------------------------------------------------------------------------------------------
# BERT's weights

# Copied from models/codis.py::read_foreign
def read_foreign(path, where):
    """A weight file, or a folder with model.safetensors or pytorch_model.bin
    -> ({key: tensor}, the folder's config.json or {}).

    Takes .safetensors, and what torch.load(weights_only=True) takes: a state dict, or one under "model" (DeiT) or
    "state_dict". `where` begins each error, which is a SystemExit of one line.
    """
    path, config = Path(path), {}
    if path.is_dir():
        if (path / "config.json").exists():
            config = json.loads((path / "config.json").read_text())
        folder, found = path, [path / name for name in ("model.safetensors", "pytorch_model.bin")
                               if (path / name).exists()]
        if not found:
            raise SystemExit(f"{where}: this folder holds neither model.safetensors nor pytorch_model.bin")
        path = found[0]
    try:
        state = (load_file(path) if path.suffix == ".safetensors"
                 else torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        raise SystemExit(f"{where}: {path.name} cannot be read as weights: {str(e).strip().splitlines()[0]}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise SystemExit(f"{where}: {path.name} is not a state dict, names and tensors and nothing else")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}, config


# Copied from models/codis.py::short
def short(names):
    """Names of tensors for people, layer numbers as ranges, weight and bias together:
    ["a.0.weight", "a.1.weight"] -> "a.0-1.weight"."""
    number, layers = r"(?<=\.)\d+(?=\.)", {}
    for name in sorted(names):
        layers.setdefault(re.sub(number, "#", name), []).append([int(n) for n in re.findall(number, name)])
    out = []
    for name, numbers in layers.items():
        for column in zip(*numbers):
            low, high, some = min(column), max(column), sorted(set(column))
            name = name.replace("#", f"{low}-{high}" if len(some) == high - low + 1 > 1
                                else ",".join(map(str, some)), 1)
        out.append(name)
    both = [name.removesuffix(".bias") for name in out
            if name.endswith(".bias") and name.removesuffix("bias") + "weight" in out]
    out = [name for name in out if name.removesuffix(".bias") not in both]
    return ", ".join(name.removesuffix("weight") + "{weight,bias}" if name.removesuffix(".weight") in both else name
                     for name in out) or "none"


# Copied from models/codis.py::fill
def fill(model, state, where, rename, required, reads, ignored=()):
    """Copies foreign tensors into `model`; every tensor on both sides is accounted for,
    or it raises before anything is changed.

    rename(key) -> our names for it (several: copies of one; none: nothing here takes it).
    required: our names that must be filled.
    reads(key): the source model computes with it where our tower stands, so that leaving it out would change what the
    tower says.
    ignored: keys to leave out without a word.
    -> (our names that are filled, the report's line). SystemExit of one line, beginning with `where`: a tensor of
    another shape, two that claim one place and differ, one left out that counts, one left unfilled.
    """
    mine, source, unexpected = model.state_dict(), {}, []
    for key, value in state.items():
        names = [name for name in rename(key) if name in mine]
        for name in names:
            if value.shape != mine[name].shape:
                hint = (", another vocabulary: see --vocab"
                        if value.shape[1:] == mine[name].shape[1:] and "word" in name else "")
                raise SystemExit(f"{where}: {key} is {tuple(value.shape)} there, "
                                 f"{name} is {tuple(mine[name].shape)} here{hint}")
            if not torch.equal(state[source.setdefault(name, key)], value):
                raise SystemExit(f"{where}: {key} differs from {source[name]}, and here both are {name}")
        if not names and key not in ignored:
            unexpected.append(key)
    counts = [key for key in unexpected if reads(key)]
    missing = [name for name in required if name not in source]
    if len(missing) == len(required):
        raise SystemExit(f"{where}: none of its names fits this tower (its first: {', '.join(list(state)[:3])})")
    if missing:
        raise SystemExit(f"{where}: {len(missing)} of this tower's {len(required)} tensors are not filled: "
                         f"{short(missing)}")
    if counts:
        raise SystemExit(f"{where}: this tower has no place for {short(counts)}")
    with torch.no_grad():
        for name, key in source.items():
            mine[name].copy_(state[key])                                    # state_dict() shares the parameters' memory
    left = [key for key in state if key in ignored]
    matched = len(state) - len(unexpected) - len(left)
    return set(source), (f"{where}: matched {matched} of {len(state)} tensors, which fill {len(source)} here; "
                         f"missing 0; unexpected {len(unexpected)}: {short(unexpected)}"
                         + f"; ignored: {short(left)}" * bool(left))


# Copied from models/codis.py::layer_of
def layer_of(key, prefix):
    """The number behind `prefix`, inf for another key."""
    found = re.match(re.escape(prefix) + r"(\d+)\.", key)
    return int(found[1]) if found else math.inf


# Copied from models/codis.py::agree
def agree(where, config, here):
    """What the shapes of weights do not tell, as far as their config.json does. SystemExit where it says otherwise."""
    for field, value in here.items():
        if config.get(field, value) != value:
            raise SystemExit(f"{where}: these weights have {field} {config[field]}, this model has {value}")


# Copied from models/codis.py::told
def told(config, heads):
    """The report's words where nothing confirms the number of heads, which no shape shows."""
    return "" if "num_attention_heads" in config else f"; how many heads it has the file does not tell, here {heads}"


def load_pretrained(model, text):
    """Hugging Face BERT weights -> all of `bert.`, and the MLM head where both have one -> the report: what matched,
    what is new.

    Keys with or without "bert.", LayerNorms as weight, bias or as gamma, beta. SystemExit if a tensor of `bert.` stays
    unfilled, has another shape, or the file has a layer that this model has not.
    """
    cfg, where = model.cfg, f"--init_text {text}"
    state, config = read_foreign(text, where)
    agree(where, {"hidden_act": "gelu", **config},
          {"model_type": "bert", "hidden_act": cfg.act, "num_attention_heads": cfg.heads})
    state = {re.sub(r"^bert\.", "", k).replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in state.items()}
    has_head = hasattr(model, "mlm_head") and any(k.startswith("cls.predictions.transform.") for k in state)
    head = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",                  # tied
            "cls.predictions.decoder.bias": "mlm_head.bias"}

    def rename(key):
        if not key.startswith("cls."):
            return ["bert." + key]
        return [head.get(key) or key.replace("cls.predictions.", "mlm_head.")] if has_head else []

    def reads(key):
        return key.startswith("embeddings.") or layer_of(key, "encoder.layer.") < math.inf
    required = [name for name in model.state_dict()
                if name.startswith("bert.") or name.startswith("mlm_head.") and has_head]
    filled, line = fill(model, state, where, rename, required, reads, ignored=("embeddings.position_ids",))
    new = sorted({name.split(".")[0] for name in model.state_dict() if name not in filled})
    return line + told(config, cfg.heads) + f"\n  new, not in this file: {', '.join(new)}"


Model = ImageBert


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = Config(**{k: v for k, v in PRESETS["tiny"].items() if k not in TASKS},
                 vocab_size=200, mask_id=4, cls_id=2, sep_id=3, first_word=5, region_dim=32, region_classes=8)
    corner = 30 * torch.rand(4, 3, 2)
    batch = {"text": torch.randint(5, 200, (4, cfg.max_text)),
             "text_mask": torch.ones(4, cfg.max_text, dtype=torch.long),
             "regions": torch.randn(4, 3, 32), "regions_box": torch.cat([corner, corner + 20], -1),
             "regions_size": torch.full((4, 2), 64.0), "regions_mask": torch.ones(4, 3, dtype=torch.long),
             "regions_label": torch.randint(8, (4, 3)), "image_id": torch.arange(4)}
    for task in TASKS:
        cfg.ce = cfg.triplet = 1.0
        model = ImageBert(cfg, task).train()
        out = model(batch)
        out["loss"].backward()
        print(task, f"{sum(p.numel() for p in model.parameters()):,} parameters",
              {k: round(v.item(), 3) for k, v in out["logs"].items()})
