"""CODIS: align image and text through a shared codebook, then fuse them.

Duan, Chen, Tran, Yang, Xu, Zeng, Chilimbi, "Multi-modal Alignment using Representation Codebook", CVPR 2022.

Two encoders embed an image and a sentence as unit vectors z_v, z_t. Each has a slow copy of itself, the teacher. A
codebook C of unit vectors bridges the two modalities: optimal transport assigns the teachers' features to codewords,
and the student of one modality must predict the assignment of the *other*. Students are also contrasted with queues
of teacher keys, across and within modalities, and a fusion transformer learns matching (ITM) and masked words (MLM).

    image ----> ViT ----> tokens ---------> keys, values -------------+
      |          : EMA      +--> z_v  --+                             v
      +------> ViT_m -----------> z_v^m |   Eq. 1-3 codebook    fusion layers --> [CLS]  --> Eq. 7 match?
                                        +-> Eq. 4-5 queues            ^      \\--> masked --> Eq. 8 words
      +------> BERT_m ----------> z_t^m |                             |
      |          : EMA      +--> z_t  --+                             |
    text -----> BERT ---> tokens ------------> queries ---------------+

Shapes: B images, T text tokens, P patches, D width, d = 256 embedding, N global batch, K codewords,
M masked tokens, Q queue.

Equations
    Eq. 1  -> ot_loss()             Eq. 2  -> codebook_loss()      Eq. 3  -> Codis.code_losses()
    Eq. 4  -> align_probs()         Eq. 5  -> align_loss(), QueueContrast
    Eq. 6  -> ema_()                Eq. 7  -> itm_loss(), hard_negatives()
    Eq. 8  -> mlm_loss(), mask_tokens()                            Eq. 9  -> Codis.loss_pretrain()
    Algorithm 1 -> Codis.loss_pretrain()                           Algorithm 2 -> ipot()

Deviations from the paper
     1. Algorithm 1 minimises Trace(similarity^T T), which repels; Eq. 1 has <T, 1 - cos>: Eq. 1 it is.
     2. Eq. 2 prints T_t2p in both lines, Eq. 3 and Algorithm 1 keep each modality to itself; text and Figure 3 "chain"
        the modalities. `codebook_target="cross"` (default) follows text and figure, "same" follows Eq. 3
        and Algorithm 1.
     3. A plan has total mass 1, so the soft label of a row is T / T.sum(1). H()'s target for the queues is softmaxed.
     4. Algorithm 2 leaves eps and the number of iterations open: 0.5 and 50, one inner step, as in the authors' own
        graph optimal transport. It runs in the log domain; sigma has length K (the print says n).
     5. The sum of Eq. 4 runs over the queue alone, so that p would be no distribution: here over the keys of the global
        batch and the queue (`batch_keys=False`: the own key and the queue). Keys of one image are all positives.
     6. Targets: distill * teacher + (1 - distill) * one-hot, 0.4, ramped from 0 over the first epoch (ALBEF's; the
        paper's alpha is the EMA's). `--distill 1 --batch_keys False` is Algorithm 1.
     7. MLM replaces 80 % by [MASK], 10 % by a random word, 10 % by themselves "following BERT"; section 3.3.2 speaks
        only of [MASK]: `mlm_mask_only=True`. Exactly max(1, round(0.15 n)) of a caption's n words are chosen,
        which keeps shapes static.
     8. Algorithm 1 has no distillation of MLM. Section 1 says "for each of the image, text and fusion encoders, there
        is a corresponding encoder that is updated through moving average", whose only use can be that:
        `mlm_distill=0.4` builds it.
     9. Teachers run without dropout. The temperature is learnt as its logarithm (as a raw parameter it hits its floor
        within 60 steps at tiny's learning rate), starts at 0.07 and is clamped to [0.001, 0.5] (ALBEF).
    10. Fine-tuning for retrieval uses the alignment (Eq. 5) and ITM losses, as ALBEF; the paper does not say.
        VQA, VE and NLVR2 use no teachers. The answer decoder shares the text encoder's embeddings.
    11. `stem="conv"` (three convolutions instead of one patch projection), `act="relu"` and `pos_std` exist for `tiny`.

Run: python train.py --model codis      (tiny on shapes, two CPU cores: 5.6 min; R@1 of 1,000 test images re-ranked
                                        89.5 / 82.8, chance 0.1)
     python models/codis.py             (2 s: shapes, parameters and every loss on a random batch)
"""

import functools
import json
import math
import pickle
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    image_size: int = 256           # pixels a side
    patch: int = 16                 # pixels a side of a patch
    stem: str = "patch"             # "patch": one projection (ViT); "conv": three convolutions (tiny)
    vision_width: int = 768         # D of the image encoder
    vision_layers: int = 12         # its blocks
    vision_heads: int = 12          # its attention heads
    width: int = 768                # D of text and fusion encoder
    text_layers: int = 6            # BERT's first layers: text only
    fusion_layers: int = 6          # BERT's last layers: with cross-attention to the image
    heads: int = 12                 # attention heads of text and fusion encoder
    mlp_ratio: int = 4              # hidden width of a feed-forward block over D
    act: str = "gelu"               # "gelu" or "relu"
    dropout: float = 0.1            # in the text and fusion encoders, as BERT
    embed_dim: int = 256            # d, of embeddings and codewords
    max_text: int = 25              # tokens of a caption, [CLS] and [SEP] included
    positions: int = 512            # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # taken from the vocabulary file
    pad_id: int = 0                 # [PAD], taken from the vocabulary file
    cls_id: int = 101               # [CLS], likewise
    sep_id: int = 102               # [SEP], likewise
    mask_id: int = 103              # [MASK], likewise
    first_word: int = 999           # lowest id of an ordinary word, likewise
    queue_size: int = 65536         # Q, teacher keys kept per modality
    momentum: float = 0.995         # alpha of Eq. 6
    temp: float = 0.07              # initial temperature gamma
    distill: float = 0.4            # weight of the teacher in the targets of Eq. 5
    batch_keys: bool = True         # the global batch's keys join the queue in Eq. 4
    intra: bool = True              # image-image and text-text alignment in Eq. 5
    codebook: bool = True           # the codebook losses, Eq. 3
    codewords: int = 4000           # K
    codebook_target: str = "cross"  # whose plan guides whom: "cross" or "same"
    codebook_features: str = "teacher"  # whose features are transported: "teacher" or "student"
    ot_eps: float = 0.5             # epsilon of Algorithm 2
    ot_iters: int = 50              # its outer iterations
    ot_inner: int = 1               # its inner iterations
    mlm_prob: float = 0.15          # share of words masked
    mlm_mask_only: bool = False     # replace every chosen word by [MASK]
    mlm_distill: float = 0.0        # weight of a fusion teacher in the MLM targets; 0 builds none
    max_answer: int = 10            # tokens of an answer, [CLS] and [SEP] included
    queue_chunk: int = 8192         # keys scored at a time
    init_std: float = 0.02          # standard deviation of initial weights
    pos_std: float = 0.02           # that of the image encoder's position embeddings and class token
    checkpointing: bool = False     # recompute encoder blocks in backward instead of keeping their activations

    def __post_init__(self):
        if self.image_size % self.patch:
            raise SystemExit(f"--image_size {self.image_size}: not a multiple of --patch {self.patch}")


TINY = dict(image_view="plain", batch_size=32, warmup_steps=100, warmup_lr=1e-5, min_lr=1e-5)     # minutes on two cores
PRESETS = {
    "base": dict(),
    # A patch is a cell of the built-in world's 3x3 grid: patches of 16 pixels cut most of its objects in two, and
    # shapes are then hardly learnt in minutes. For photos: --patch 16.
    "tiny": dict(image_size=72, patch=24, stem="conv", vision_width=128, vision_layers=4, vision_heads=4,
                 width=128, text_layers=2, fusion_layers=2, heads=4, mlp_ratio=4, act="relu", dropout=0.0,
                 embed_dim=128, queue_size=1024, momentum=0.98, codewords=256, max_text=22, mlm_prob=0.3,
                 init_std=0.08, pos_std=0.5,
                 pretrain=dict(TINY, steps=1700, lr=1e-3, rerank_k=16),
                 retrieval=dict(TINY, steps=1000, lr=3e-4, rerank_k=16),
                 vqa=dict(TINY, steps=1900, lr=3e-4),
                 ve=dict(TINY, steps=1800, lr=5e-4),
                 nlvr2=[dict(TINY, steps=200, lr=3e-4), dict(TINY, steps=1300, lr=3e-4)]),
}

# Values without a mark are the paper's, section 4.2.1. [A]: ALBEF's, which the paper follows without printing them.
# Data: COCO, Visual Genome (its captions), Conceptual Captions and SBU, 4.0M images with 5.1M captions (section 4.1).
# Table 1: `--task retrieval --data COCO` then eval.py on COCO (5K) and, "zero-shot", on Flickr30K.
#   Table 2: fine-tuned on each.
# Table 4, rows from above, all on `--task pretrain`, then eval.py on Flickr30K and COCO without fine-tuning:
#   1 cross alignment only              --codebook False --intra False
#   2 intra + cross                     --codebook False
#   3 cross + codebook (teacher)        --intra False
#   4 intra + cross + codebook (student) --codebook_features student
#   5 intra + cross + codebook (teacher) (the default)
FINETUNE = dict(optimizer="adamw", schedule="cosine", weight_decay=0.02, image_size=384, crop_scale=(0.5, 1.0),
                lr=2e-5, min_lr=1e-6, batch_size=256)                       # all but the size [A]
RECIPE = {
    "pretrain": dict(optimizer="adamw", lr=1e-4, min_lr=1e-5, warmup_lr=1e-5, warmup_steps=1000, schedule="cosine",
                     weight_decay=0.02, epochs=30, batch_size=512,
                     rerank_k=128),                                         # rerank_k [A]: 128 Flickr30K, 256 COCO
    "retrieval": dict(FINETUNE, lr=1e-5, epochs=10, max_text=30,
                      rerank_k=128),                                        # [A]: 10 epochs on Flickr30K, 5 on COCO
    "vqa": dict(FINETUNE, epochs=8),                                        # [A]
    "ve": dict(FINETUNE, epochs=5),                                         # [A]
    "nlvr2": [dict(FINETUNE, task="assign", epochs=1, batch_size=128),      # [A]: stage 1, text assignment on the
              dict(FINETUNE, epochs=10, batch_size=128)],                   # pre-training data (--stage_data)
}

TASKS = ("pretrain", "retrieval", "vqa", "ve", "nlvr2")
EVALS = {"pretrain": ("retrieval",), "retrieval": ("retrieval",), "vqa": ("vqa",), "ve": ("ve",),
         "nlvr2": ("nlvr2",), "assign": ()}
INITS = ("vision", "text")
VIEWS = {
    "pretrain": dict(source="pairs", image="randaug", image_eval="resize", norm="clip", text="caption"),
    "retrieval": dict(source="pairs", image="randaug", image_eval="resize", norm="clip", text="caption"),
    "vqa": dict(source="vqa", image="randaug", image_eval="resize", norm="clip", text="question", answer="answer"),
    "ve": dict(source="ve", image="randaug", image_eval="resize", norm="clip", text="caption", label="label"),
    "nlvr2": dict(source="nlvr2", image="randaug", image2="randaug", image_eval="resize", image2_eval="resize",
                  norm="clip", text="caption", label="label"),
    "assign": dict(source="pairs", image="randaug", norm="clip", text="caption"),
}
COUNTS = {"text + fusion + MLM head (the paper, with BERT's 30,522 words: 123.7M)": ("text", "fusion", "mlm_head")}
PAIR_TASKS = ("pretrain", "retrieval")  # those that embed and match pairs
BACKBONE = ("vision.", "text.", "fusion.")  # `--init` must fill every key that starts so


# --------------------------------------------------------------------------------------------------
# Blocks: one attention and one layer, of which both encoders and the fusion are built

def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


def pick(x, at):
    """The tokens of x (B, S, D) at positions `at` (B, A) -> (B, A, D)."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention: tokens x (B, S, D) look at one another, or at a context (B, L, C).

    context() makes keys and values apart from forward(), as one image serves many sentences.
    """

    def __init__(self, width, heads, context_width=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)                  # one product for all three
        else:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def context(self, tokens):
        """Keys and values of a context (B, L, C) -> 2 x (B, L, D)."""
        return self.key_value(tokens).chunk(2, dim=-1)

    def forward(self, x, context=None, mask=None, at=None, maps=None):
        """-> (B, S, D), or (B, A, D) where only positions `at` (B, A) are asked for.

        mask: bool, True = may look, broadcast to (B, heads, S or A, L).
        maps: a list that receives the attention probabilities (B, heads, S or A, L), in the graph.
        """
        if context is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
            query = query if at is None else pick(query, at)
        else:
            query, (key, value) = self.query(x), context
        query, key, value = self.split(query), self.split(key), self.split(value)

        if maps is None:
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        else:
            # the same written out, as a fused kernel does not show its probabilities
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            maps.append(scores.softmax(-1))
            x = maps[-1] @ value
        return self.out(x.transpose(1, 2).flatten(2))

    def split(self, x):
        # (B, S, D) -> (B, heads, S, D/heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A transformer layer: self-attention, cross-attention if it has a context, feed-forward.

    norm="pre": each part reads normalised tokens (ViT); "post": the sum is normalised (BERT).
    """

    def __init__(self, width, heads, norm, mlp_ratio=4, act="gelu", context_width=None,
                 dropout=0.0):
        super().__init__()
        eps = {"pre": 1e-6, "post": 1e-12}[norm]          # timm's ViT, Hugging Face's BERT
        self.pre, self.drop = norm == "pre", nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        if context_width is not None:
            self.cross = Attention(width, heads, context_width, dropout)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, eps)

    def before(self, x, norm):
        return norm(x) if self.pre else x

    def after(self, x, change, norm):
        x = x + self.drop(change)
        return x if self.pre else norm(x)

    def self_attend(self, x, mask=None, at=None):
        change = self.attention(self.before(x, self.attention_norm), mask=mask, at=at)
        return self.after(x if at is None else pick(x, at), change, self.attention_norm)

    def cross_attend(self, x, context, mask=None, maps=None):
        change = self.cross(self.before(x, self.cross_norm), context, mask, maps=maps)
        return self.after(x, change, self.cross_norm)

    def feed(self, x):
        return self.after(x, self.mlp(self.before(x, self.mlp_norm)), self.mlp_norm)

    def forward(self, x, mask=None, context=None, context_mask=None, at=None, maps=None):
        """x: (B, S, D); context: cross.context() of the other modality -> (B, S or A, D)."""
        x = self.self_attend(x, mask, at)
        if context is not None:
            x = self.cross_attend(x, context, context_mask, maps)
        return self.feed(x)


# --------------------------------------------------------------------------------------------------
# Encoders

def patch_stem(cfg):
    """(B, 3, H, W) -> (B, D, H/patch, W/patch): ViT's projection, or three convolutions instead."""
    width, patch = cfg.vision_width, cfg.patch
    if cfg.stem == "patch":
        return nn.Conv2d(3, width, patch, patch)
    return nn.Sequential(nn.Conv2d(3, width // 2, patch // 4, patch // 4), activation(cfg.act),
                         nn.Conv2d(width // 2, width // 2, 3, 2, 1), activation(cfg.act),
                         nn.Conv2d(width // 2, width, 3, 2, 1))


class ViT(nn.Module):
    """(B, 3, H, W) -> (B, P+1, D), the class token first. H and W: any multiples of `patch`."""

    def __init__(self, cfg):
        super().__init__()
        width, self.patch, self.checkpointing = cfg.vision_width, cfg.patch, cfg.checkpointing
        self.patch_embed = patch_stem(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (cfg.image_size // cfg.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, cfg.vision_heads, "pre", cfg.mlp_ratio, cfg.act)
                                    for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, image):
        x = self.patch_embed(image)                                              # (B, D, h, w)
        pos = resize_pos_embed(self.pos_embed, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                         # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + pos   # (B, P+1, D)

        for block in self.blocks:
            x = run_block(block, x, save_memory=self.checkpointing)
        return self.norm(x)


def init_vit(vit, pos_std):
    """Initial weights of an image encoder, where a model's `init_std` is not good: He's for the convolutions of a stem,
    `pos_std` for places and class token, 0.02 at all sizes for what a block adds to its tokens. With tiny's 0.08 for
    all three the first block drowned the patches: each knew the colours of the whole picture, few their own place."""
    for module in vit.patch_embed.children():  # of a conv stem; ViT's single projection has none
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    for token in (vit.pos_embed, vit.cls_token):
        nn.init.trunc_normal_(token, std=pos_std)
    for block in vit.blocks:
        for module in (block.attention.out, block.mlp[2]):
            nn.init.trunc_normal_(module.weight, std=0.02)


def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def resize_pos_embed(pos, height, width):
    """ViT's position embeddings (1, 1+h*h, D), interpolated bicubically to height x width patches.
    The class token's stays."""
    if pos.shape[1] == 1 + height * width:
        return pos
    side = math.isqrt(pos.shape[1] - 1)
    grid = pos[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)     # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).mT.to(pos.dtype)], dim=1)      # (1, 1+H*W, D)


class Embeddings(nn.Module):
    """BERT's input: ids (B, T) -> (B, T, D), word + position + segment embedding, normalised."""

    def __init__(self, cfg):
        super().__init__()
        self.words = nn.Embedding(cfg.vocab_size, cfg.width, padding_idx=cfg.pad_id)
        self.positions = nn.Embedding(cfg.positions, cfg.width)
        self.segments = nn.Embedding(2, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, 1e-12)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, text):
        x = self.words(text) + self.positions.weight[:text.shape[1]] + self.segments.weight[0]
        return self.drop(self.norm(x))


class Bert(nn.Module):
    """Ids and mask (B, T) -> (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = Embeddings(cfg)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, "post", cfg.mlp_ratio, cfg.act,
                                          dropout=cfg.dropout) for _ in range(cfg.text_layers))

    def forward(self, text, text_mask):
        x, mask = self.embeddings(text), text_mask[:, None, None].bool()
        for block in self.blocks:
            x = run_block(block, x, mask, save_memory=self.checkpointing)
        return x


class MLMHead(nn.Module):
    """BERT's prediction of words, (..., D) -> (..., vocabulary), by the word embeddings handed in."""

    def __init__(self, cfg):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(cfg.width, cfg.width), activation(cfg.act),
                                       nn.LayerNorm(cfg.width, 1e-12))
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.transform(x), word_embeddings, self.bias)


# --------------------------------------------------------------------------------------------------
# Processes and memory

def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world() > 1 else 0


@torch.no_grad()
def gather(x):
    """(B, ...) of every process -> (N, ...), by rank, without gradient. All processes must have the same B."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def enqueue_(queue, queue_ids, ptr, keys, ids):
    """Writes keys (N, d) and their image ids (N,) at `ptr` of a ring (Q, d), around its end; of more than Q keys,
    the last Q."""
    slots = ((ptr + torch.arange(len(keys), device=ptr.device)) % len(queue))[-len(queue):]
    keys, ids = keys[-len(queue):], ids[-len(queue):]
    queue.index_copy_(0, slots, keys.to(queue.dtype))
    queue_ids.index_copy_(0, slots, ids)


def full_precision(fn):
    """Autocast off inside: under it a product of float32 matrices would be bfloat16's."""
    @functools.wraps(fn)
    def run(*args, **kwargs):
        with torch.autocast(next(a for a in args if torch.is_tensor(a)).device.type, enabled=False):
            return fn(*args, **kwargs)
    return run


@torch.no_grad()
def ema_(teacher, student, alpha):
    """Eq. (6): f_t = alpha f_t + (1 - alpha) f_s, in place, over lists of parameters."""
    torch._foreach_lerp_(teacher, student, 1 - alpha)


# --------------------------------------------------------------------------------------------------
# The paper's equations

def ot_loss(plan, cost):
    """Eq. (1): L_ot = sum_ij T_ij d(z_i, c_j) = <T, D>.  plan, cost: (..., N, K) -> (...)."""
    return (plan * cost).sum((-2, -1))


@torch.no_grad()
def ipot(cost, eps=0.5, iters=50, inner=1):
    """Algorithm 2 (IPOT): the plan T of least <T, D> with uniform marginals, T 1 = 1/N, T' 1 = 1/K.

    cost: (..., N, K), d(z_i, c_j) = 1 - cos -> T (..., N, K) float32 of total mass 1. Per iteration,
    from T = 1 and sigma = 1/K:
        Q = exp(-D/eps) * T;  repeat inner times: delta = 1/(N Q sigma), sigma = 1/(K Q' delta);
        T = diag(delta) Q diag(sigma)
    Here everything is a logarithm: exp(-D/eps) underflows and Q sigma divides by zero for small eps. Columns sum to 1/K
    to rounding, rows approach 1/N as iterations go on.
    """
    n, k = cost.shape[-2:]
    with torch.autocast(cost.device.type, enabled=False):
        step = cost.float() / -eps
        log_plan = torch.zeros_like(step)
        log_sigma = step.new_full((*step.shape[:-2], 1, k), -math.log(k))
        for _ in range(iters):
            log_plan = log_plan + step                                                      # Q
            for _ in range(inner):
                log_delta = -math.log(n) - (log_plan + log_sigma).logsumexp(-1, keepdim=True)    # (..., N, 1)
                log_sigma = -math.log(k) - (log_plan + log_delta).logsumexp(-2, keepdim=True)    # (..., 1, K)
            log_plan = log_plan + log_delta + log_sigma
        return log_plan.exp()


@full_precision
def soft_cross_entropy(logits, target):
    """H of Algorithm 1: -sum_j t_j log softmax(logits)_j, mean over rows. logits, target: (N, K),
    target without gradient."""
    return -(target.detach() * logits.float().log_softmax(-1)).sum(-1).mean()


@full_precision
def codebook_loss(z, codebook, plan, temp):
    """Eq. (2): H(SoftMax(Z C / gamma), T), T's rows scaled to sum to one. z: (B, d); codebook: (K, d);
    plan: (B, K) -> 0-d."""
    return soft_cross_entropy(z.float() @ codebook.float().T / temp, plan / plan.sum(-1, keepdim=True))


@full_precision
def align_probs(z, keys, temp):
    """Eq. (4): p_j = exp(z.k_j / gamma) / sum_j' exp(z.k_j' / gamma). z: (B, d); keys: (M, d) -> (B, M)."""
    return (z.float() @ keys.float().T / temp).softmax(-1)


@full_precision
def align_loss(z, z_m, ids, keys, key_ids, temp, distill):
    """Eq. (5), one direction, row by row: H(p, y), y = distill p_teacher + (1 - distill) [same image] / count.
    Plain form.

    z, z_m: (R, d) student and teacher; ids: (R,); keys: (M, d), key_ids: (M,) -> (R,) float32. A row without a positive
    among the keys learns from the teacher alone, a row without a negative has loss 0.
    """
    same = (ids[:, None] == key_ids).float()                                         # (R, M)
    count = same.sum(-1, keepdim=True)
    a = torch.where(count > 0, distill, 1.0)
    y = a * align_probs(z_m, keys, temp).detach() + (1 - a) * same / count.clamp(min=1)
    loss = -(y * (z.float() @ keys.float().T / temp).log_softmax(-1)).sum(-1)
    return loss * (count.squeeze(-1) < len(keys))


class QueueContrast(torch.autograd.Function):
    """align_loss() over several blocks of keys, streamed: memory O(R * chunk) instead of several (R, M) matrices.

    The loss of a row is logsumexp(s) - sum_j y_j s_j with s = z.k/gamma, and sum_j y_j s_j = a E_teacher[s] + (1-a)
    mean s_pos: running sums per row suffice. Backward scores the keys again: dL/ds = p - y. Gradients go to z and temp;
    keys are constants.

    z, z_m: (R, d) float32; ids: (R,); temp, distill: 0-d; then blocks keys (M_i, d), key_ids (M_i,), ... -> (R,).
    """

    @staticmethod
    def scores(z, z_m, ids, temp, blocks, chunk):
        for keys, key_ids in zip(blocks[::2], blocks[1::2]):
            for k, k_ids in zip(keys.split(chunk), key_ids.split(chunk)):
                s, t = (torch.cat([z, z_m]) @ k.T / temp).chunk(2)                   # (R, chunk) each
                yield k, s, t, ids[:, None] == k_ids

    @staticmethod
    def forward(ctx, z, z_m, ids, temp, distill, chunk, *blocks):
        with torch.autocast(z.device.type, enabled=False):
            lse = lse_m = z.new_full((len(z),), -torch.inf)
            expected = pos = z.new_zeros(len(z))
            count = torch.zeros_like(ids)
            for _, s, t, same in QueueContrast.scores(z, z_m, ids, temp, blocks, chunk):
                lse = torch.logaddexp(lse, s.logsumexp(-1))
                new_m = torch.logaddexp(lse_m, t.logsumexp(-1))
                expected = expected * (lse_m - new_m).exp() + ((t - new_m[:, None]).exp() * s).sum(-1)
                lse_m = new_m
                pos = pos + (s * same).sum(-1)
                count = count + same.sum(-1)
            total = sum(len(keys) for keys in blocks[::2])
            a = torch.where(count > 0, distill, 1.0).to(z.dtype)
            live = (count < total).to(z.dtype)
            share = (1 - a) / count.clamp(min=1)                                     # weight of each positive
            ctx.save_for_backward(z, z_m, ids, temp, lse, lse_m, a, share, live, *blocks)
            ctx.chunk = chunk
            return live * (lse - a * expected - share * pos)

    @staticmethod
    def backward(ctx, grad):
        z, z_m, ids, temp, lse, lse_m, a, share, live, *blocks = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            grad = (grad * live)[:, None]
            grad_z, grad_temp = torch.zeros_like(z), torch.zeros_like(temp)
            for k, s, t, same in QueueContrast.scores(z, z_m, ids, temp, blocks, ctx.chunk):
                y = a[:, None] * (t - lse_m[:, None]).exp() + share[:, None] * same
                grad_s = grad * ((s - lse[:, None]).exp() - y)                       # (R, chunk)
                grad_z = grad_z + grad_s @ k / temp
                grad_temp = grad_temp - (grad_s * s).sum() / temp
        return grad_z, None, None, grad_temp, None, None, *[None] * len(blocks)


@torch.no_grad()
def hard_negatives(sim, ids):
    """For Eq. (7): one index per row, drawn with probability softmax(sim) among columns of another image.

    sim: (B, B), already divided by the temperature; ids: (B,) -> (B,) int64 indices, (B,) bool: the row had a
    candidate. argmax(log w - log Exp(1)) is a multinomial draw that no saturated softmax can break.
    """
    same = ids[:, None] == ids
    noise = torch.empty_like(sim, dtype=torch.float32).exponential_().log()
    return (sim.float() - noise).masked_fill(same, -torch.inf).argmax(-1), ~same.all(-1)


def itm_loss(logits, labels):
    """Eq. (7): H(p_itm, y_itm). logits: (R, 2); labels: (R,), 1 = matched, 0 = not, -100 = not counted -> 0-d."""
    return masked_cross_entropy(logits, labels)


def mlm_loss(logits, labels):
    """Eq. (8): H(p_mlm, y_mlm) at masked places. logits: (B, M, V);
    labels: (B, M), -100 = no masked token here -> 0-d."""
    return masked_cross_entropy(logits, labels)


def masked_cross_entropy(logits, labels):
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)  # 0, not NaN, where nothing counts


@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15, mask_only=False):
    """Section 3.3.2: chooses max(1, round(prob n)) of a row's n maskable tokens; 80 % become [MASK],
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


@torch.no_grad()
def perplexity(p):
    """exp of the entropy of the mean row. p: (N, K), rows sum to 1
    -> 0-d between 1 (collapsed) and K (every codeword used)."""
    return torch.special.entr(p.float().mean(0)).sum().exp()


# --------------------------------------------------------------------------------------------------
# The model

class Codis(nn.Module):
    """All tasks of the paper. A batch is a dict: image (B, 3, H, W), text, text_mask (B, T), image_id (B,) and what
    the task adds."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.task = cfg, task
        self.vision = ViT(cfg)
        self.text = Bert(cfg)
        self.fusion = BertLayers(cfg, cfg.fusion_layers, cfg.vision_width)
        if task in PAIR_TASKS:
            self.vision_proj = nn.Linear(cfg.vision_width, cfg.embed_dim)
            self.text_proj = nn.Linear(cfg.width, cfg.embed_dim)
            self.itm_head = nn.Linear(cfg.width, 2)
            self.log_temp = nn.Parameter(torch.tensor(math.log(cfg.temp)))
        if task in ("pretrain", "vqa"):
            self.mlm_head = MLMHead(cfg)
        if task == "pretrain" and cfg.codebook:
            self.codebook = nn.Parameter(torch.randn(cfg.codewords, cfg.embed_dim))
        if task == "vqa":
            self.decoder = BertLayers(cfg, cfg.fusion_layers, cfg.width)
        if task in ("ve", "nlvr2", "assign"):
            self.cls_head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.ReLU(),
                                          nn.Linear(cfg.width, num_labels or 3))
        # each fusion layer twice, for the first and the second image, keys and values shared
        if task in ("nlvr2", "assign"):
            self.fusion = BertLayers(cfg, 2 * cfg.fusion_layers, cfg.vision_width)
        self.init_weights()
        self.tie_weights()
        for name, tasks in {"encode_image": PAIR_TASKS, "encode_text": PAIR_TASKS, "match": PAIR_TASKS,
                            "gradcam": PAIR_TASKS, "rank_answers": ("vqa",),
                            "predict": ("ve", "nlvr2", "assign")}.items():
            if task not in tasks:
                setattr(self, name, None)  # eval.py asks what a model offers
        self.students = [n for n in ("vision", "text", "vision_proj", "text_proj") if task in PAIR_TASKS]
        if task == "pretrain" and cfg.mlm_distill:
            self.students += ["fusion", "mlm_head"]
        for name in self.students:  # the teachers
            self.add_module(name + "_m", deepcopy(getattr(self, name)).requires_grad_(False))
        if self.students:
            for name in ("image", "text"):
                self.register_buffer(f"queue_{name}", F.normalize(torch.randn(cfg.queue_size, cfg.embed_dim), dim=-1))
            self.register_buffer("queue_ids", torch.full((cfg.queue_size,), -1))
            self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
            # 0 to 1 over the first epoch: the teachers are worth little before
            self.register_buffer("ramp", torch.zeros(()))
            self.register_buffer("distill", torch.zeros(()))    # their weight in Eq. 5, cfg.distill * ramp

    def init_weights(self):
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        init_vit(self.vision, self.cfg.pos_std)
        if hasattr(self, "codebook"):
            self.codebook.data = F.normalize(self.codebook.data, dim=-1)

    def tie_weights(self):
        """ALBEF's NLVR2: the two copies of a fusion layer have one cross-attention key and one value projection."""
        if self.task in ("nlvr2", "assign"):
            for one, two in zip(self.fusion.layer[::2], self.fusion.layer[1::2]):
                two.crossattention.self.key, two.crossattention.self.value = (one.crossattention.self.key,
                                                                              one.crossattention.self.value)

    def adapt(self, state):
        """A checkpoint of another task or image size, as this model's: position embeddings resized, fusion layers
        doubled for NLVR2, the answer decoder started from the fusion layers where their shapes agree, a head for other
        classes left out. {key: tensor} -> {key: tensor}."""
        mine = self.state_dict()
        state = {k: v for k, v in state.items()
                 if not k.startswith("cls_head.") or k in mine and mine[k].shape == v.shape}
        for key in [k for k in state if k.endswith("pos_embed")]:
            grid = self.cfg.image_size // self.cfg.patch
            state[key] = resize_pos_embed(state[key], grid, grid)
        fusion = {k: v for k, v in state.items() if k.startswith("fusion.layer.")}
        depth = 1 + max((int(k.split(".")[2]) for k in fusion), default=-1)
        if len(self.fusion.layer) == 2 * depth:
            state = {k: v for k, v in state.items() if k not in fusion}
            for key in fusion:
                n, rest = key.removeprefix("fusion.layer.").split(".", 1)
                state |= {f"fusion.layer.{2 * int(n) + i}.{rest}": fusion[key] for i in range(2)}
        if hasattr(self, "decoder") and not any(k.startswith("decoder.") for k in state):
            decoder = {"decoder." + k.removeprefix("fusion."): v for k, v in fusion.items()}
            state |= {k: v for k, v in decoder.items() if k in mine and mine[k].shape == v.shape}
        return state

    def train(self, mode=True):
        super().train(mode)
        for name in self.students:
            getattr(self, name + "_m").eval()  # no dropout in a teacher
        return self

    @property
    def temp(self):
        return self.log_temp.exp()

    # -- encoders

    def encode(self, side, x, *mask, teacher=False):
        """side "vision" or "text" -> tokens (B, S, D) and unit [CLS] embeddings (B, d) float32,
        of the student or the teacher."""
        m = "_m" if teacher else ""
        tokens = getattr(self, side + m)(x, *mask)
        return tokens, F.normalize(getattr(self, f"{side}_proj{m}")(tokens[:, 0]).float(), dim=-1)

    def encode_image(self, batch):
        """-> (B, d) unit norm."""
        return self.encode("vision", batch["image"])[1]

    def encode_text(self, batch):
        """-> (B, d) unit norm."""
        return self.encode("text", batch["text"], batch["text_mask"])[1]

    def image_states(self, batch):
        """What match() needs of an image: `image_tokens` (B, P+1, D); with the embedding `image_emb` (B, d)."""
        tokens, emb = self.encode("vision", batch["image"])
        return {"image_tokens": tokens, "image_emb": emb}

    def text_states(self, batch):
        """What match() needs of a sentence: `text_tokens` (B, T, D) and `text_mask`;
        with the embedding `text_emb` (B, d)."""
        tokens, emb = self.encode("text", batch["text"], batch["text_mask"])
        return {"text_tokens": tokens, "text_emb": emb, "text_mask": batch["text_mask"]}

    def match(self, batch):
        """(B,) ITM logit of "matched" minus "not". Takes image_states() and text_states(), or a raw batch."""
        if "image_tokens" not in batch:
            batch = {**batch, **self.image_states(batch), **self.text_states(batch)}
        x = self.fuse(batch["text_tokens"], batch["text_mask"], self.image_keys(batch["image_tokens"]), cls_only=True)
        logits = self.itm_head(x[:, 0]).float()
        return logits[:, 1] - logits[:, 0]

    # -- fusion

    def image_keys(self, image_tokens, fusion=None):
        """Cross-attention keys and values of images, layer by layer: they do not depend on the text."""
        return [layer.crossattention.keys(image_tokens) for layer in (fusion or self.fusion).layer]

    def fuse(self, x, text_mask, keys, fusion=None, cls_only=False):
        """x: (B, T, D) -> (B, T, D), or (B, 1, D) with `cls_only`: the last layer then computes nothing that nobody
        reads."""
        mask, layers = text_mask[:, None, None].bool(), (fusion or self.fusion).layer
        for n, layer in enumerate(layers):
            at = torch.zeros_like(text_mask[:, :1]) if cls_only and n + 1 == len(layers) else None
            x = layer(x, mask, keys[n], at=at)
        return x

    def fuse_pretrain(self, clean, masked, text_mask, positions, keys, negative_image, negative_text):
        """The four fusions of a training step, exact and without waste -> [CLS] (3B, D) and masked places (B, M, D).

        [CLS] rows: the pairs, then (image i, negative_text i), then (negative_image i, text i). What is not done twice:
        self-attention of the first layer, the same for all uses of a sentence; keys of an image, which three sentences
        query together as one long row; in the last layer everything but [CLS] and the masked places.

        clean, masked: (B, T, D); positions: (B, M), or None without MLM; keys: image_keys(); negative_*: (B,) indices.
        """
        b, layers = len(clean), self.fusion.layer
        mask = text_mask[:, None, None].bool()                                       # (B, 1, 1, T)
        masks = torch.cat([mask, mask[negative_text], mask])                         # (3B, 1, 1, T)
        cls = torch.zeros_like(text_mask[:, :1])
        x = clean                                                                    # (B or 3B, T, D)
        for n, layer in enumerate(layers):
            last = n + 1 == len(layers)
            if n == 0:
                x = layer.self_attend(x, mask, cls if last else None)
                x = torch.cat([x, x[negative_text], x])                              # (3B, T or 1, D)
            else:
                x = layer.self_attend(x, masks, cls.repeat(3, 1) if last else None)
            if masked is not None:
                masked = layer.self_attend(masked, mask, positions if last else None)   # (B, T or M, D)
            queries = [x[:b], x[b:2 * b]] + ([masked] if masked is not None else [])
            sizes = [q.shape[1] for q in queries]
            k, v = keys[n]
            own = layer.crossattention(torch.cat(queries, 1), (k, v))                # (B, 2 T + T, D), one row an image
            other = layer.crossattention(x[2 * b:], (k[negative_image], v[negative_image]))
            positive, negative, *rest = own.split(sizes, 1)
            x = layer.feed(torch.cat([positive, negative, other]))
            masked = layer.feed(rest[0]) if rest else None
        return x[:, 0], masked

    # -- losses

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def contrast(self, image_emb, text_emb, image_m, text_m, ids, all_image_m, all_text_m, all_ids):
        """Eq. (5): the mean of each direction, i2t and t2t against text keys, t2i and i2i against image keys."""
        losses, b = {}, len(ids)
        for name, queries, teachers, keys, queue in (
                ("2t", (image_emb, text_emb), (image_m, text_m), all_text_m, self.queue_text),
                ("2i", (text_emb, image_emb), (text_m, image_m), all_image_m, self.queue_image)):
            rows = 2 if self.cfg.intra else 1
            blocks = ((keys, all_ids) if self.cfg.batch_keys else ()) + (queue, self.queue_ids)
            loss = QueueContrast.apply(torch.cat(queries[:rows]), torch.cat(teachers[:rows]),
                                       ids.repeat(rows), self.temp, self.distill, self.cfg.queue_chunk, *blocks)
            cross, same = ("i", "t") if name == "2t" else ("t", "i")
            for letter, part in zip((cross, same), loss.split(b)):
                losses[letter + name] = part.mean()
        return losses

    @full_precision
    def code_losses(self, image_emb, text_emb, all_image, all_text):
        """Eq. (3): L_ot of both modalities, L_tp and L_ip. The plan is that of the global batch;
        this process's rows count."""
        c = self.codebook
        features = torch.stack([all_image, all_text]).float()                        # (2, N, d)
        plan = ipot(1 - features @ c.detach().T, self.cfg.ot_eps, self.cfg.ot_iters, self.cfg.ot_inner)   # (2, N, K)
        b = len(image_emb)
        mine = slice(rank() * b, rank() * b + b)
        plan, features = plan[:, mine], features[:, mine]
        ot = ot_loss(plan, 1 - features @ c.T) * world()                        # DDP's mean is then the global <T, D>
        for_text, for_image = plan if self.cfg.codebook_target == "cross" else plan.flip(0)
        return {"ot": ot.sum(), "tp": codebook_loss(text_emb, c, for_text, self.temp),
                "ip": codebook_loss(image_emb, c, for_image, self.temp)}

    def pair_step(self, batch):
        """What pre-training and retrieval share: embeddings, teachers, Eq. 5 and the hard negatives of Eq. 7."""
        with torch.no_grad():
            _, image_m = self.encode("vision", batch["image"], teacher=True)
            _, text_m = self.encode("text", batch["text"], batch["text_mask"], teacher=True)
            all_image_m, all_text_m = gather(torch.stack([image_m, text_m], 1)).unbind(1)   # (N, d) each
            all_ids = gather(batch["image_id"])
        image_tokens, image_emb = self.encode("vision", batch["image"])
        return image_tokens, image_emb, (image_m, text_m), (all_image_m, all_text_m, all_ids)

    def match_loss(self, cls, image_ok, text_ok):
        """Eq. (7) from the (3B, D) rows of fuse_pretrain(); a row whose batch holds no other image does not count."""
        b = len(image_ok)
        labels = torch.ones(3 * b, dtype=torch.long, device=cls.device)
        labels[b:] = torch.cat([torch.where(text_ok, 0, -100), torch.where(image_ok, 0, -100)])
        return itm_loss(self.itm_head(cls), labels)

    @full_precision
    def negatives(self, image_emb, text_emb, ids):
        with torch.no_grad():
            sim = image_emb @ text_emb.T / self.temp                                  # (B, B), this process's batch
        return hard_negatives(sim.T, ids), hard_negatives(sim, ids)             # an image per text, a text per image

    def loss_pretrain(self, batch):
        """Eq. (9): L = L_mlm + L_itm + L_ica + L_code, as Algorithm 1 goes."""
        cfg, text, text_mask, ids = self.cfg, batch["text"], batch["text_mask"], batch["image_id"]
        image_tokens, image_emb, mine_m, all_m = self.pair_step(batch)
        masked, positions, labels = self.mask_text(text, text_mask)
        tokens = self.text(torch.cat([text, masked]), text_mask.repeat(2, 1))          # (2B, T, D)
        clean, masked_tokens = tokens.chunk(2)
        text_emb = F.normalize(self.text_proj(clean[:, 0]).float(), dim=-1)

        align = self.contrast(image_emb, text_emb, *mine_m, ids, *all_m)              # Eq. 5
        code = {}
        if cfg.codebook:                                                              # Eq. 3
            features = (all_m[:2] if cfg.codebook_features == "teacher"
                        else gather(torch.stack([image_emb, text_emb], 1)).unbind(1))
            code = self.code_losses(image_emb, text_emb, *features)
        (neg_image, image_ok), (neg_text, text_ok) = self.negatives(image_emb, text_emb, ids)
        cls, words = self.fuse_pretrain(clean, masked_tokens, text_mask, positions, self.image_keys(image_tokens),
                                        neg_image, neg_text)
        itm = self.match_loss(cls, image_ok, text_ok)                                 # Eq. 7
        logits = self.mlm_head(words, self.text.embeddings.word_embeddings.weight)    # (B, M, V)
        mlm = mlm_loss(logits, labels)                                                # Eq. 8
        if cfg.mlm_distill:
            mlm = mlm + self.ramp * cfg.mlm_distill * (self.mlm_teacher(batch, masked, positions, labels, logits) - mlm)

        losses = {"mlm": mlm, "itm": itm, **align, **code}
        logs = {name: loss.detach() for name, loss in losses.items()} | {"temp": self.temp.detach()}
        if cfg.codebook:
            logs["codebook_ppl"] = perplexity(align_probs(torch.cat([image_emb, text_emb]), self.codebook, self.temp))
        return {"loss": sum(losses.values()), "logs": logs, "keys": all_m}

    def loss_retrieval(self, batch):
        """Fine-tuning for retrieval: Eq. 5 and Eq. 7."""
        text_mask, ids = batch["text_mask"], batch["image_id"]
        image_tokens, image_emb, mine_m, all_m = self.pair_step(batch)
        clean, text_emb = self.encode("text", batch["text"], text_mask)
        align = self.contrast(image_emb, text_emb, *mine_m, ids, *all_m)
        (neg_image, image_ok), (neg_text, text_ok) = self.negatives(image_emb, text_emb, ids)
        cls, _ = self.fuse_pretrain(clean, None, text_mask, None, self.image_keys(image_tokens), neg_image, neg_text)
        losses = {"itm": self.match_loss(cls, image_ok, text_ok), **align}
        logs = {name: loss.detach() for name, loss in losses.items()} | {"temp": self.temp.detach()}
        return {"loss": sum(losses.values()), "logs": logs, "keys": all_m}

    def fused(self, batch, cls_only):
        """The batch's text fused with its image, or with `image` and `image2` in alternate layers -> (B, T or 1, D)."""
        keys = self.image_keys(self.vision(batch["image"]))
        if self.task in ("nlvr2", "assign"):
            second = self.image_keys(self.vision(batch["image2"]))
            keys = [(second if n % 2 else keys)[n] for n in range(len(keys))]
        return self.fuse(self.text(batch["text"], batch["text_mask"]), batch["text_mask"], keys, cls_only=cls_only)

    def predict(self, batch):
        """VE: (B, 3) logits of entailment, neutral, contradiction. NLVR2: (B, 2) of False, True."""
        return self.cls_head(self.fused(batch, cls_only=True)[:, 0]).float()

    def loss_ve(self, batch):
        """Section 4.2: cross-entropy of the classes on the fused [CLS]; NLVR2 likewise."""
        loss = F.cross_entropy(self.predict(batch), batch["label"])
        return {"loss": loss, "logs": {"ce": loss.detach()}}

    loss_nlvr2 = loss_ve

    def loss_assign(self, batch):
        """ALBEF's text assignment, before NLVR2: of two images, does the text belong to the first,
        the second, or neither?

        The other images are drawn as hard negatives by the similarity of image [CLS] tokens.
        A row without one does not count.
        """
        b, ids, pixels = len(batch["image"]), batch["image_id"], batch["image"]
        with torch.no_grad():
            z = F.normalize(self.vision(pixels)[:, 0].float(), dim=-1)
            (one, ok), (two, _) = (hard_negatives(z @ z.T / 0.07, ids) for _ in range(2))
        label = torch.arange(b, device=ids.device)[torch.randperm(b, device=ids.device)] % 3        # (B,) a third each
        first, second = pixels[torch.where(label == 0, torch.arange(b, device=ids.device), one)], pixels[torch.where(
            label == 1, torch.arange(b, device=ids.device), two)]
        logits = self.predict({**batch, "image": first, "image2": second})
        loss = masked_cross_entropy(logits, label.masked_fill(~ok, -100))
        return {"loss": loss, "logs": {"assign": loss.detach()}}

    def decode(self, answer, keys, context_mask):
        """Answer tokens (R, L) -> word logits (R, L, V) of what follows each.
        keys: per decoder layer those of the R contexts."""
        length = answer.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=answer.device).tril()[None, None]
        x = self.text.embeddings(answer)
        for layer, kv in zip(self.decoder.layer, keys):
            x = layer(x, causal, kv, context_mask)
        return self.mlm_head(x, self.text.embeddings.word_embeddings.weight)

    def question_keys(self, batch):
        context = self.fused(batch, cls_only=False)                                  # (B, T, D)
        return ([layer.crossattention.keys(context) for layer in self.decoder.layer],
                batch["text_mask"][:, None, None].bool())

    def loss_vqa(self, batch):
        """Section 4.2: the answer is generated from the fused question.
        Mean over questions of the answer's -log likelihood.

        `answer` is drawn from the annotators' ten by data.py, so that in expectation each weighs as often as it was
        given.
        """
        answer, mask = batch["answer"][:, :self.cfg.max_answer], batch["answer_mask"][:, :self.cfg.max_answer]
        logits = self.decode(answer[:, :-1], *self.question_keys(batch)).float()      # (B, L-1, V)
        labels = answer[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(-1)   # (B,)
        loss = (nll * batch["answer_weight"]).sum() / batch["answer_weight"].sum().clamp(min=1)
        return {"loss": loss, "logs": {"answer": loss.detach()}}

    def rank_answers(self, batch, answer_ids, answer_mask, k):
        """The best of A candidate answers for each question: the k of likeliest first token,
        then by the whole answer's likelihood.

        answer_ids, answer_mask: (A, L), [CLS] first -> (B,) int64 indices.
        """
        b, (keys, context_mask) = len(batch["text"]), self.question_keys(batch)
        start = answer_ids[:1, :1].expand(b, 1)                                       # [CLS]
        first = self.decode(start, keys, context_mask)[:, 0].float().log_softmax(-1)  # (B, V)
        top = first[:, answer_ids[:, 1]].topk(min(k, len(answer_ids)), -1).indices    # (B, k)
        k = top.shape[1]
        rows, mask = answer_ids[top].flatten(0, 1), answer_mask[top].flatten(0, 1)    # (B k, L)
        keys = [tuple(x.repeat_interleave(k, 0) for x in kv) for kv in keys]
        logp = self.decode(rows[:, :-1], keys, context_mask.repeat_interleave(k, 0)).float().log_softmax(-1)
        logp = logp.gather(-1, rows[:, 1:, None]).squeeze(-1) * mask[:, 1:]           # (B k, L-1)
        return top.gather(1, logp.sum(-1).view(b, k).argmax(-1, keepdim=True)).squeeze(1)

    def gradcam(self, batch, block=None):
        """Section 4.6: cross-attention of one fusion layer, weighted by the gradient of what the model says of the
        pair.

        block: fusion layer from 0 (default: the third; of fewer, the last but one). Its attention maps times their
        positive gradient, averaged over heads, [CLS] patch dropped -> {"word": (B, T, h, w) a map per token,
        "sentence": (B, h, w) their mean over [CLS] and words}. In the last layer only [CLS] is heard: there the words'
        maps are zero.
        """
        layers = self.fusion.layer
        block = min(2, max(len(layers) - 2, 0)) if block is None else block
        tokens, mask = self.text(batch["text"], batch["text_mask"]), batch["text_mask"][:, None, None].bool()
        keys, maps = self.image_keys(self.vision(batch["image"])), []
        x = tokens
        for n, layer in enumerate(layers):
            x = layer(x, mask, keys[n], maps=maps if n == block else None)
        attention, = maps
        grad, = torch.autograd.grad(self.itm_head(x[:, 0])[:, 1].sum(), attention)
        cam = (attention * grad.clamp(min=0)).mean(1)[:, :, 1:]                       # (B, T, P)
        height, width = (side // self.cfg.patch for side in batch["image"].shape[2:])
        word = cam.unflatten(-1, (height, width))
        real = (batch["text_mask"].bool() & (batch["text"] != self.cfg.sep_id)).float()
        sentence = torch.einsum("bthw,bt->bhw", word, real) / real.sum(-1)[:, None, None].clamp(min=1)
        return {"word": word.detach(), "sentence": sentence.detach()}

    def mask_text(self, text, text_mask):
        cfg = self.cfg
        maskable = text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
        return mask_tokens(text, maskable, cfg.mask_id, cfg.first_word, cfg.vocab_size, cfg.mlm_prob, cfg.mlm_mask_only)

    def mlm_teacher(self, batch, masked, positions, labels, logits):
        """ALBEF's soft MLM loss: cross-entropy against the momentum fusion encoder's word distribution,
        at masked places."""
        with torch.no_grad():
            x = self.text_m(masked, batch["text_mask"])
            x = self.fuse(x, batch["text_mask"],
                          self.image_keys(self.vision_m(batch["image"]), self.fusion_m), self.fusion_m)
            target = (self.mlm_head_m(pick(x, positions), self.text_m.embeddings.word_embeddings.weight)
                      .float().softmax(-1))
        live = labels != -100
        return -((target * logits.float().log_softmax(-1)).sum(-1) * live).sum() / live.sum().clamp(min=1)

    # -- hooks of the training loop

    def after_backward(self, out):
        """Algorithm 1's update_queue. Only now: the graph of Eq. 5 read the queues."""
        if "keys" in out:
            image_m, text_m, ids = out["keys"]
            enqueue_(self.queue_image, self.queue_ids, self.ptr, image_m, ids)
            enqueue_(self.queue_text, self.queue_ids, self.ptr, text_m, ids)
            self.ptr.add_(len(ids)).remainder_(len(self.queue_ids))

    @torch.no_grad()
    def after_step(self, step, total_steps, epoch_steps=None):
        """Eq. (6), codewords back to unit norm, the temperature's clamp, the ramp of the teacher's weight over one
        epoch."""
        if not self.students:
            return
        for name in self.students:
            ema_(list(getattr(self, name + "_m").parameters()), list(getattr(self, name).parameters()),
                 self.cfg.momentum)
        self.log_temp.clamp_(math.log(0.001), math.log(0.5))
        if hasattr(self, "codebook"):
            self.codebook.div_(self.codebook.norm(dim=-1, keepdim=True))
        self.ramp.fill_(min(1.0, step / (epoch_steps or total_steps)))
        self.distill.copy_(self.cfg.distill * self.ramp)

    @torch.no_grad()
    def reset_memory(self):
        """The start of a training: teachers equal to their students, queues of random unit vectors that are no
        image's."""
        for name in self.students:
            getattr(self, name + "_m").load_state_dict(getattr(self, name).state_dict())
        if self.students:
            for queue in (self.queue_image, self.queue_text):
                queue.copy_(F.normalize(torch.randn_like(queue), dim=-1))
            self.queue_ids.fill_(-1)
            for value in (self.ptr, self.ramp, self.distill):
                value.zero_()

    def param_groups(self, cfg):
        """Weight decay on matrices only: not on biases, norms, the temperature, or the codebook,
        whose length is fixed."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if p.ndim < 2 or n == "codebook"]
        return [{"params": [p for n, p in named if not (p.ndim < 2 or n == "codebook")],
                 "lr": cfg.lr, "weight_decay": cfg.weight_decay},
                {"params": plain, "lr": cfg.lr, "weight_decay": 0.0}]


# --------------------------------------------------------------------------------------------------
# Foreign weights

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


def timm_vit(state):
    """Hugging Face's ViT and DeiT -> timm's names, queries, keys and values as one matrix;
    timm's own state comes back as it is."""
    if not any("encoder.layer." in key for key in state):
        return state
    out = {}
    for key, value in state.items():
        name = re.sub(r"^(vit|deit)\.", "", key)
        for theirs, timm in (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
                             ("embeddings.distillation_token", "dist_token"),
                             ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
                             ("encoder.layer.", "blocks."), (".layernorm_before.", ".norm1."),
                             (".layernorm_after.", ".norm2."),
                             (".attention.output.dense.", ".attn.proj."), (".intermediate.dense.", ".mlp.fc1."),
                             (".output.dense.", ".mlp.fc2."), ("layernorm.", "norm."), ("classifier.", "head.")):
            name = name.replace(theirs, timm)
        if ".attention.attention.query." in name:
            qkv = [state.get(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            if all(x is not None for x in qkv):
                out[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(qkv)
        elif not re.search(r"\.attention\.attention\.(key|value)\.", name):
            out[name] = value
    return out


def load_vision(model, path):
    """DeiT, timm or Hugging Face ViT weights -> `vision.`, whose keys are timm's.
    Position embeddings follow the image size."""
    cfg, where = model.cfg, f"--init_vision {path}"
    if cfg.stem != "patch" or cfg.act != "gelu":
        raise SystemExit(f"{where}: a ViT has one patch projection and GELU: it needs --stem patch --act gelu,"
                         f" this model has {cfg.stem} and {cfg.act}")
    state, config = read_foreign(path, where)
    agree(where, config, {"num_attention_heads": cfg.vision_heads, "hidden_act": cfg.act})
    state = timm_vit(state)
    if "pos_embed" in state:
        pos, grid = state["pos_embed"], cfg.image_size // cfg.patch
        if "dist_token" in state or pos.ndim != 3 or pos.shape[1] != 1 + math.isqrt(max(0, pos.shape[1] - 1)) ** 2:
            raise SystemExit(f"{where}: pos_embed {tuple(pos.shape)} is not a class token and a square of patches"
                             + (": take the DeiT without distillation token" if "dist_token" in state else ""))
        state["pos_embed"] = resize_pos_embed(pos, grid, grid)

    def reads(key):
        return (key.startswith(("norm_pre.", "reg_token", "patch_embed."))
                or layer_of(key, "blocks.") < cfg.vision_layers)
    filled, line = fill(model, state, where, lambda key: ["vision." + key],
                        required=["vision." + key for key in model.vision.state_dict()], reads=reads)
    if pos.shape != state["pos_embed"].shape:
        side = math.isqrt(pos.shape[1] - 1)
        line += f"; pos_embed interpolated from {side}x{side} to {grid}x{grid}"
    return filled, line + told(config, cfg.vision_heads)


def layer_of(key, prefix):
    """The number behind `prefix`, inf for another key."""
    found = re.match(re.escape(prefix) + r"(\d+)\.", key)
    return int(found[1]) if found else math.inf


def agree(where, config, here):
    """What the shapes of weights do not tell, as far as their config.json does. SystemExit where it says otherwise."""
    for field, value in here.items():
        if config.get(field, value) != value:
            raise SystemExit(f"{where}: these weights have {field} {config[field]}, this model has {value}")


def told(config, heads):
    """The report's words where nothing confirms the number of heads, which no shape shows."""
    return "" if "num_attention_heads" in config else f"; how many heads it has the file does not tell, here {heads}"


def bert_names(key, text_layers, fusion_copies, decoder):
    """Where a tensor of Hugging Face's BERT goes -> list of our names.

    The first `text_layers` layers are the text encoder, those above are the fusion encoder, each `fusion_copies` times
    in a row (twice for NLVR2) and once more as the answer decoder where there is one. Their cross-attention has no
    counterpart in BERT.
    """
    n = layer_of(key, "encoder.layer.")
    if n < text_layers or key.startswith("embeddings."):
        return ["text." + key]
    if n < math.inf:
        rest, n = key.split(".", 3)[3], n - text_layers
        fusion = [f"fusion.layer.{fusion_copies * n + i}.{rest}" for i in range(fusion_copies)]
        return fusion + [f"decoder.layer.{n}.{rest}"] * decoder
    head = {"cls.predictions.bias": "mlm_head.bias", "cls.predictions.decoder.bias": "mlm_head.bias",
            "cls.predictions.decoder.weight": "text.embeddings.word_embeddings.weight"}    # tied
    return [head.get(key) or key.replace("cls.predictions.", "mlm_head.")]


def load_text(model, path):
    """Hugging Face BERT weights -> `text.`, self-attention and feed-forward of `fusion.` (and of the decoder),
    the MLM head.

    Keys with or without "bert.", LayerNorms as weight, bias or as gamma, beta. What must be filled: the text encoder,
    and of the fusion encoder and the head all that the file has a layer or a head for.
    """
    cfg, where = model.cfg, f"--init_text {path}"
    state, config = read_foreign(path, where)
    agree(where, {"hidden_act": "gelu", **config},
          {"model_type": "bert", "hidden_act": cfg.act, "num_attention_heads": cfg.heads})
    state = {re.sub(r"^bert\.", "", k).replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in state.items()}
    depth = 1 + max((n for n in (layer_of(k, "encoder.layer.") for k in state) if n < math.inf), default=-1)
    copies, decoder = len(model.fusion.layer) // cfg.fusion_layers, hasattr(model, "decoder")
    has_head = hasattr(model, "mlm_head") and any(k.startswith("cls.predictions.transform.") for k in state)

    def rename(key):
        return [] if key.startswith("cls.") and not has_head else bert_names(key, cfg.text_layers, copies, decoder)

    def expected(name):
        above = depth - cfg.text_layers                                         # layers that the file has for fusion
        return (name.startswith("text.") or name.startswith("mlm_head.") and has_head or ".crossattention." not in name
                and (layer_of(name, "fusion.layer.") < copies * above or layer_of(name, "decoder.layer.") < above))

    def reads(key):
        return key.startswith("embeddings.") or layer_of(key, "encoder.layer.") < cfg.text_layers + cfg.fusion_layers
    filled, line = fill(model, state, where, rename, required=[name for name in model.state_dict() if expected(name)],
                        reads=reads, ignored=("embeddings.position_ids",))
    return filled, line + told(config, cfg.heads)


def load_pretrained(model, vision=None, text=None):
    """Fills the towers from foreign weight files; paths, or None -> the report: a line per file, what is new,
    what was copied.

    Teachers become copies of the loaded students and the queues start anew: what they held was another encoder's.
    """
    filled, lines = set(), []
    for load, path in ((load_vision, vision), (load_text, text)):
        if path:
            names, line = load(model, path)
            filled, lines = filled | names, lines + [line]
    teachers = [name + "_m" for name in model.students]
    new = [name for name, _ in model.named_parameters(remove_duplicate=False)
           if name not in filled and name.split(".")[0] not in teachers]
    whole = [part for part, m in model.named_children()
             if all(f"{part}.{name}" in new for name, _ in m.named_parameters())]
    rest = [name for name in new if name.split(".")[0] not in whole]
    lines.append(f"new, in none of these files, {len(new)}: "
                 + ", ".join([part + ".*" for part in whole] + [short(rest)] * bool(rest)))
    if model.students:
        model.reset_memory()
        lines.append(f"teachers copied from their students: {', '.join(teachers)}; queues emptied")
    return "\n  ".join(lines)


Model = Codis


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = Config(**{k: v for k, v in PRESETS["tiny"].items() if k not in VIEWS}, vocab_size=200, mask_id=4, cls_id=2,
                 sep_id=3, first_word=5)
    words, image = torch.randint(5, 200, (4, cfg.max_text)), torch.randn(4, 3, cfg.image_size, cfg.image_size)
    batch = {"image": image, "image2": image.flip(0), "text": words, "text_mask": torch.ones_like(words),
             "image_id": torch.arange(4), "label": torch.arange(4) % 2, "answer": words[:, :5],
             "answer_mask": torch.ones_like(words[:, :5]), "answer_weight": torch.ones(4)}
    for task in VIEWS:
        model = Codis(cfg, task, num_labels=3).train()
        out = model(batch)
        out["loss"].backward()
        print(f"{task}: {sum(p.numel() for p in model.parameters()):,} parameters;",
              {k: round(v.item(), 3) for k, v in out["logs"].items()})
