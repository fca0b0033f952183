"""ConLIP: two towers for retrieval, taught by masked modelling that must go through their [CLS] states.

Luo, Xi, Zhang, Li, Zeng, Zhao, Jing Ma, "Conditioned Masked Language and Image Modeling for Image-Text Dense
Retrieval", Findings of EMNLP 2022.

An image and a sentence are compared by the cosine of their final [CLS] states. Ordinary masked modelling across
modalities (the vanilla of Table 1) lets a masked word look at every complete patch, and so never needs the [CLS] state.
Here both inputs are masked, and the *other* modality's [CLS] state of the complete input, h_cls, is the only place
where the answer can be found.

    image --------> ViT ---> h_cls image ----+---- Eq. 9-12 cosine, queues ----+---- h_cls text <--- BERT <-------- text
      |              : EMA                   |                                 |                  : EMA              |
      |            ViT_m --> keys, queue     |                                 |    queue, keys <-- BERT_m            |
      v                                      v                                 v                                     v
    masked image -> ViT ---> patches -> [h_cls image; patches]    [h_cls text; words] <- words <--- BERT <- masked text
                               |             ^  keys, values        keys, values  ^       |
                               |             +-- Eq. 5 ConMLM head <--------------|-------+ queries
                               +---------------- Eq. 6 ConMIM head ---------------+

Shapes: B images, T text tokens, P patches, D width, M masked places, Q queue, R rows of a contrast,
p pixels a side of a patch.

Equations
    Eq. 1  -> ConLIP.image_passes(), ConLIP.text_passes()      Eq. 2  -> sim()
    Eq. 3  -> mask_tokens(), mask_patches(), MaskedViT         Eq. 4  -> ConLIP.loss_pretrain()
    Eq. 5  -> conmlm_loss(), TokenHead                         Eq. 6  -> conmim_loss(), TokenHead
    Eq. 7  -> ConLIP.token_losses()                            Eq. 8  -> ema_()
    Eq. 9  -> infonce_loss()      Eq. 10, 11 -> dcl_loss()     Eq. 12 -> ConLIP.inst_losses(), QueueLogSum

Deviations from the paper
     1. Eq. 5 lacks its minus sign, and Eq. 5, 6 are plain sums: here the mean over masked words, and over masked pixels
        and channels as in SimMIM, which the paper follows. With sums, one image's 75,264 masked values drown every
        other loss.
     2. The targets of Eq. 6 are pixels normalised as the encoder's input is, as in SimMIM;
        the paper says "true RGB values".
     3. Eq. 9-11 print h without the mark of a momentum encoder for the positive too. MoCo, which they follow, takes the
        momentum encoder's key: `positive="momentum"` (default); `positive="online"` is the print, with gradient to both
        sides.
     4. A key in a queue that stems from the query's own image (another caption of it, or an earlier epoch) is no
        negative: it is left out of the sum by its image id. The paper does not speak of them. Queues start with random
        unit vectors, which count as negatives (MoCo); a row left without any negative has loss 0.
     5. Exactly max(1, round(0.15 n)) of a sentence's n words and round(0.5 n) of an image's n units are masked, which
        keeps shapes static. Words: 80 % [MASK], 10 % a random word, 10 % unchanged, as in BERT. A unit is one patch;
        SimMIM's 32 pixels are `mask_unit=2`.
     6. "One-layer transformer with cross-attention" is BERT's layer: self-attention over the masked side,
        cross-attention to the other, feed-forward. Words are predicted by BERT's head with its word embeddings as
        output matrix, pixels by one linear layer. In the last layer only masked places are computed: nothing else is
        read. Table 4's row with shared parameters is read as the layers of one head sharing theirs (`head_shared`),
        not as one head for both modalities.
     7. h_cls of the masked input is among the queries of its head but not among the keys of the other (section 3.2:
        "[h_cls; h_1*, h_2*, ...]"). In `vanilla` the keys are all states of the complete input, h_cls included.
     8. Dropout 0.1 (Table 6) is BERT's, in the text tower and both heads; the ViT has none, as its published weights
        were trained and configured. Teachers run without dropout. Weight decay spares biases and norms.
     9. Fine-tuning drops the heads and uses Eq. 12 alone with pre-training's settings (Table 6 heads its column
        "Pretraining & Fine-tuning"); the paper does not name the loss. Its queues start anew, for the image ids are
        those of other data.
    10. `stem="conv"` (three convolutions instead of one 16x16 patch projection) and `act="relu"` exist for `tiny`.
        Pixels under a mask are blanked before the stem, so that no convolution carries them to a neighbour.

Run: python models/conlip.py      (2 s: shapes, parameters and every loss on a random batch)
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
    image_size: int = 224           # pixels a side
    patch: int = 16                 # pixels a side of a patch
    stem: str = "patch"             # "patch": one projection (ViT); "conv": three convolutions (tiny)
    width: int = 768                # D of both towers, whose [CLS] states are compared as they are
    vision_layers: int = 12         # blocks of the image tower
    text_layers: int = 12           # layers of the text tower
    heads: int = 12                 # attention heads, everywhere
    mlp_ratio: int = 4              # hidden width of a feed-forward block over D
    act: str = "gelu"               # "gelu" or "relu"
    dropout: float = 0.1            # in the text tower and the token-level heads
    max_text: int = 50              # tokens of a caption, [CLS] and [SEP] included
    positions: int = 512            # position embeddings of the text tower, as BERT
    vocab_size: int = 30522         # taken from the vocabulary file
    pad_id: int = 0                 # [PAD], taken from the vocabulary file
    cls_id: int = 101               # [CLS], likewise
    sep_id: int = 102               # [SEP], likewise
    mask_id: int = 103              # [MASK], likewise
    first_word: int = 999           # lowest id of an ordinary word, likewise
    queue_size: int = 12288         # Q, momentum keys kept per modality
    momentum: float = 0.99          # m of Eq. 8
    temp: float = 0.05              # tau, fixed
    contrast: str = "dcl"           # "dcl" (Eq. 10-11) or "infonce" (Eq. 9)
    positive: str = "momentum"      # whose key is the positive: "momentum" (MoCo) or "online" (as printed)
    mlm: str = "con"                # "con" (Eq. 5), "vanilla" (complete image) or "none"
    mim: str = "con"                # "con" (Eq. 6), "vanilla" (complete text) or "none"
    mlm_prob: float = 0.15          # share of words masked
    mim_prob: float = 0.5           # share of patches masked
    mask_unit: int = 1              # patches a side of what is masked as one
    head_layers: int = 1            # layers of a token-level head
    head_shared: bool = False       # its layers share their parameters
    queue_chunk: int = 4096         # keys scored at a time
    init_std: float = 0.02          # standard deviation of initial weights and position embeddings
    checkpointing: bool = False     # recompute encoder blocks in backward instead of keeping their activations

    @property
    def vision_width(self):
        return self.width

    @property
    def vision_heads(self):
        return self.heads

    def __post_init__(self):
        for field, values in (("contrast", ("dcl", "infonce")), ("positive", ("momentum", "online")),
                              ("mlm", ("con", "vanilla", "none")), ("mim", ("con", "vanilla", "none"))):
            if getattr(self, field) not in values:
                raise SystemExit(f"--{field} {getattr(self, field)}: it is one of {', '.join(values)}")
        if self.image_size % (self.patch * self.mask_unit):
            raise SystemExit(f"--image_size {self.image_size}: not a multiple of patch {self.patch} "
                             f"x mask_unit {self.mask_unit}")


# Values are Table 6's and section 4.1's; AdamW's betas, no clipping and decay to zero,
# of which they are silent, train.py's.
# Data: CC3M + CC12M, "randomly collect 200k, 5.3M and 9.5M": --limit 200000 --seed 0.
# Towers: --init_vision google/vit-base-patch16-224-in21k --init_text bert-base-uncased; the heads start at random.
# Table 1  CL: --mlm none --mim none; Vanilla: --mlm vanilla --mim vanilla; ConLIP: the default; then eval.py on
#          Flickr30K and COCO ("zs"), or --task retrieval --init RUN --data KARPATHY first.
# Table 2  eval.py RUN --task cross_attention
# Table 3  rows from above, the first two and --mlm, --mim of each:
#   1 InfoNCE        --contrast infonce --mlm none --mim none   2 DCL            --mlm none --mim none
#   3 DCL + ConMLM   --mim none                                 4 DCL + ConMIM   --mlm none   5 both  the default
# Table 4  --head_layers 3; --head_layers 2; --head_layers 2 --head_shared; the default
# Table 5  --mim_prob 0.4 | 0.5 | 0.6 | 0.7, --mlm_prob 0.15 | 0.25 | 0.3 | 0.4
# Figure 4  eval.py RUN --task speed --beside RUN_OF_A_SINGLE_STREAM_MODEL --data COCO --sizes 1000,5000
# Figure 5  eval.py RUN --task gallery --text "..." --image FILE
PAPER = dict(optimizer="adamw", lr=5e-5, weight_decay=0.01, schedule="linear", warmup_steps=0.1,
             epochs=30, batch_size=4096, amp="fp16")
RECIPE = {
    "pretrain": PAPER,
    "retrieval": PAPER | dict(image_size=336),  # Karpathy's COCO (113,287 images) or Flickr30K (29,783)
}

PRESETS = {
    "base": dict(),
    # As in the paper, a queue of three batches. One of many batches is easily told from the new key by its age:
    # with 1,024 keys, batch 32 and m 0.98 both losses fell below 3 (log 1024 = 6.9) while recall stayed at chance.
    "tiny": dict(image_size=64, stem="conv", width=128, vision_layers=4, text_layers=2, heads=4, mlp_ratio=2,
                 act="relu", dropout=0.0, max_text=22, queue_size=192, init_std=0.08,
                 pretrain=dict(batch_size=64, steps=1300, lr=1e-3, warmup_steps=100, amp="auto"),
                 retrieval=dict(image_size=64, batch_size=64, steps=500, lr=3e-4, warmup_steps=50, amp="auto")),
}

TASKS = ("pretrain", "retrieval")
EVALS = {"pretrain": ("retrieval",), "retrieval": ("retrieval",)}
INITS = ("vision", "text")
VIEWS = {task: dict(source="pairs", image="center", image_eval="center", norm="half", text="caption") for task in TASKS}
BACKBONE = ("vision.", "text.")  # `--init` must fill every key that starts so
COUNTS = {"image tower": ("vision",), "text tower": ("text",), "MLM head": ("mlm_layers", "mlm_head"),
          "MIM head": ("mim_layers", "mim_head")}


# --------------------------------------------------------------------------------------------------
# Blocks. Keys are named as in timm's ViT and Hugging Face's BERT.

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


# Copied from models/codis.py::Attention
class Attention(nn.Module):
    """timm's self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads))


# Copied from models/codis.py::MLP
class MLP(nn.Module):
    def __init__(self, width, hidden, act):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


# Copied from models/codis.py::ViTBlock
class ViTBlock(nn.Module):
    """A pre-norm transformer block, timm's names."""

    def __init__(self, width, heads, mlp_ratio, act):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, mlp_ratio * width, act)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# Copied from models/codis.py::PatchEmbed
class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, p = cfg.vision_width, cfg.patch
        if cfg.stem == "patch":
            self.proj = nn.Conv2d(3, w, p, p)
        else:  # the same stride p in three steps
            self.proj = nn.Sequential(nn.Conv2d(3, w // 2, p // 4, p // 4), activation(cfg.act),
                                      nn.Conv2d(w // 2, w // 2, 3, 2, 1), activation(cfg.act),
                                      nn.Conv2d(w // 2, w, 3, 2, 1))

    def forward(self, image):
        return self.proj(image).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, P, D)


class MaskedViT(nn.Module):
    """(B, 3, H, W) -> (B, P+1, D), the class token first; of patches under a mask only the place is known. H and W: any
    multiples of `patch`; position embeddings follow."""

    def __init__(self, cfg):
        super().__init__()
        w, self.patch, self.checkpointing = cfg.vision_width, cfg.patch, cfg.checkpointing
        self.patch_embed = PatchEmbed(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, w))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (cfg.image_size // cfg.patch) ** 2, w))
        self.blocks = nn.ModuleList(ViTBlock(w, cfg.vision_heads, cfg.mlp_ratio, cfg.act)
                                    for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(w, eps=1e-6)

    def forward(self, image, masked=None, mask_token=None):
        """masked: bool (B, P), True = replace the patch by mask_token (1, 1, D)."""
        height, width = image.shape[2] // self.patch, image.shape[3] // self.patch
        if masked is None:
            x = self.patch_embed(image)                                              # (B, P, D)
        else:
            hidden = masked.unflatten(1, (1, height, 1, width, 1)).expand(-1, 3, -1, self.patch, -1, self.patch)
            x = self.patch_embed(image.masked_fill(hidden.reshape(image.shape), 0))
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
        pos = resize_pos_embed(self.pos_embed, height, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + pos           # (B, P+1, D)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x)


# Copied from models/codis.py::resize_pos_embed
def resize_pos_embed(pos, height, width):
    """Interpolates ViT position embeddings (1, 1+h*h, D) bicubically to a grid of height x width;
    the class token's stays."""
    if pos.shape[1] == 1 + height * width:
        return pos
    side = math.isqrt(pos.shape[1] - 1)
    grid = pos[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)          # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).mT.to(pos.dtype)], 1)               # (1, 1+H*W, D)


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


# Copied from models/codis.py::BertLayer
class BertLayer(nn.Module):
    """A post-norm BERT layer; with `context_width`, cross-attention stands between self-attention and feed-forward."""

    def __init__(self, cfg, context_width=None):
        super().__init__()
        self.attention = BertAttention(cfg, cfg.width)
        if context_width:
            self.crossattention = BertAttention(cfg, context_width)
        self.intermediate = BertIntermediate(cfg)
        self.output = BertOutput(cfg, cfg.mlp_ratio * cfg.width)

    def self_attend(self, x, mask, at=None):
        """x: (B, T, D); mask: bool (B, 1, 1 or T, T); at: (B, S) positions to compute,
        all where None -> (B, T or S, D)."""
        keys = self.attention.keys(x)
        return self.attention(x if at is None else pick(x, at), keys, mask)

    def feed(self, x):
        return self.output(self.intermediate(x), x)

    def forward(self, x, mask, keys=None, context_mask=None, at=None, maps=None):
        x = self.self_attend(x, mask, at)
        if keys is not None:
            x = self.crossattention(x, keys, context_mask, maps)
        return self.feed(x)


# Copied from models/codis.py::pick
def pick(x, at):
    """x: (B, T, D), at: (B, S) -> (B, S, D), the tokens at these positions."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# Copied from models/codis.py::BertLayers
class BertLayers(nn.Module):
    def __init__(self, cfg, layers, context_width=None):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(cfg, context_width) for _ in range(layers))


# Copied from models/codis.py::Bert
class Bert(nn.Module):
    """(B, T) ids and mask -> (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = BertEmbeddings(cfg)
        self.encoder = BertLayers(cfg, cfg.text_layers)

    def forward(self, text, text_mask):
        x, mask = self.embeddings(text), text_mask[:, None, None].bool()             # (B, T, D), (B, 1, 1, T)
        for layer in self.encoder.layer:
            x = (checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointing and self.training
                 else layer(x, mask))
        return x


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


class TokenHead(nn.Module):
    """A token-level head: layers in which the masked side's tokens attend to one another and to the other side's."""

    def __init__(self, cfg):
        super().__init__()
        self.depth = cfg.head_layers
        self.layer = nn.ModuleList(BertLayer(cfg, cfg.width) for _ in range(1 if cfg.head_shared else cfg.head_layers))

    def forward(self, x, mask, context, context_mask, at=None, maps=None):
        """x: (B, S, D); context: (B, L, D); masks: bool (B, 1, 1, S or L) or None; at: (B, M) places of x to compute,
        None: all -> (B, M or S, D). A list given as `maps` receives each layer's attention to the context,
        (B, heads, S, L)."""
        for n in range(self.depth):
            layer = self.layer[n % len(self.layer)]
            x = layer(x, mask, layer.crossattention.keys(context), context_mask,
                      at if n + 1 == self.depth else None, maps)
        return x


# --------------------------------------------------------------------------------------------------
# Processes and memory

# Copied from models/codis.py::world
def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Copied from models/codis.py::rank
def rank():
    return dist.get_rank() if world() > 1 else 0


# Copied from models/codis.py::gather
@torch.no_grad()
def gather(x):
    """(B, ...) of every process -> (N, ...), by rank, without gradient. All processes must have the same B."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# Copied from models/codis.py::enqueue_
@torch.no_grad()
def enqueue_(queue, queue_ids, ptr, keys, ids):
    """Writes keys (N, d) and their image ids (N,) at `ptr` of a ring (Q, d), around its end; of more than Q keys,
    the last Q."""
    slots = ((ptr + torch.arange(len(keys), device=ptr.device)) % len(queue))[-len(queue):]
    keys, ids = keys[-len(queue):], ids[-len(queue):]
    queue.index_copy_(0, slots, keys.to(queue.dtype))
    queue_ids.index_copy_(0, slots, ids)


# Copied from models/codis.py::full_precision
def full_precision(fn):
    """Autocast off inside: under it a product of float32 matrices would be bfloat16's."""
    @functools.wraps(fn)
    def run(*args, **kwargs):
        with torch.autocast(next(a for a in args if torch.is_tensor(a)).device.type, enabled=False):
            return fn(*args, **kwargs)
    return run


# Copied from models/codis.py::ema_ with Eq. (6)->Eq. (8), alpha->m, f_t->theta_m, f_s->theta_o
@torch.no_grad()
def ema_(teacher, student, m):
    """Eq. (8): theta_m = m theta_m + (1 - m) theta_o, in place, over lists of parameters."""
    torch._foreach_lerp_(teacher, student, 1 - m)


# --------------------------------------------------------------------------------------------------
# The paper's equations

def sim(x, y):
    """Eq. (2): sim(x, y) = h_x'h_y / (|h_x| |h_y|).  x, y: (..., D) [CLS] states -> (...) float32."""
    return (F.normalize(x.float(), dim=-1) * F.normalize(y.float(), dim=-1)).sum(-1)


# Copied from models/codis.py::mask_tokens with Section 3.3.2->Eq. (3)
@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15, mask_only=False):
    """Eq. (3): chooses max(1, round(prob n)) of a row's n maskable tokens; 80 % become [MASK],
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
def mask_patches(b, height, width, prob=0.5, unit=1, device=None):
    """Eq. (3)'s y*: chooses round(prob n) of an image's n units of unit x unit patches, each set equally likely.

    height, width: patches, multiples of `unit` -> positions (b, M) int64, their mask (b, height * width) bool.
    """
    rows, columns = height // unit, width // unit
    m = min(max(1, round(prob * rows * columns)), rows * columns)
    units = torch.rand(b, rows * columns, device=device).topk(m, -1).indices         # (b, m)
    corner = units // columns * unit * width + units % columns * unit                # each unit's first patch
    inside = torch.arange(unit, device=device)
    # (b, M), M = m * unit * unit
    positions = (corner[..., None] + (inside[:, None] * width + inside).flatten()).flatten(1)
    return positions, torch.zeros(b, height * width, dtype=torch.bool, device=device).scatter_(1, positions, True)


def patchify(image, patch):
    """(B, 3, H, W) -> (B, P, patch * patch * 3), the pixels of each patch row by row, the channels of a pixel
    side by side."""
    x = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))                    # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def conmlm_loss(logits, labels):
    """Eq. (5): L = -mean_i log P(x_i* | x*, y*, h_cls of the image).  logits: (B, M, V);
    labels: (B, M), -100 = none -> 0-d."""
    log_p = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return log_p / (labels != -100).sum().clamp(min=1)  # 0, not NaN, in a batch of empty sentences


def conmim_loss(y, z):
    """Eq. (6): L = mean_i |y_i - z_i|.  y, z: (B, M, p * p * 3), true and predicted pixels of the masked patches
    -> 0-d."""
    return (y.float() - z.float()).abs().mean()


@full_precision
def infonce_loss(q, k, ids, queue, queue_ids, tau):
    """Eq. (9): L = -log e^(q.k/tau) / (e^(q.k/tau) + sum_j e^(q.q_j/tau)), row by row;
    0 for a row without any q_j. Plain form.

    q, k: (R, D) unit norm, k the positive; ids: (R,); queue: (Q, D) unit norm, queue_ids (Q,): j runs over other ids
    -> (R,).
    """
    pos = (q.float() * k.float()).sum(-1) / tau
    return torch.logaddexp(pos, queue_log_sum(q, ids, queue, queue_ids, tau)) - pos


@full_precision
def dcl_loss(q, k, ids, queue, queue_ids, tau):
    """Eq. (10), (11): L = -q.k/tau + log sum_j e^(q.q_j/tau): the positive is not in the denominator.
    As infonce_loss()."""
    return drop_empty(queue_log_sum(q, ids, queue, queue_ids, tau), (q.float() * k.float()).sum(-1) / tau)


def drop_empty(lse, pos):
    """lse - pos, and 0, without gradient, for rows whose sum has no term (lse = -inf)."""
    live = lse > -torch.inf
    return torch.where(live, lse.masked_fill(~live, 0) - pos, 0)


@full_precision
def queue_log_sum(q, ids, queue, queue_ids, tau):
    """log sum_j e^(q.q_j/tau) over the queue's keys of other images -> (R,) float32; -inf where there are none.
    Plain form."""
    s = q.float() @ queue.float().T / tau                                            # (R, Q)
    return s.masked_fill(ids[:, None] == queue_ids, -torch.inf).logsumexp(-1)


class QueueLogSum(torch.autograd.Function):
    """queue_log_sum() streamed over chunks of the queue, which backward scores again: no (R, Q) matrix is ever kept.

    d/dq = sum_j softmax_j q_j / tau. q: (R, D) float32; ids: (R,); queue: (Q, D), queue_ids: (Q,), constants -> (R,).
    """

    @staticmethod
    def scores(q, ids, queue, queue_ids, tau, chunk):
        for k, k_ids in zip(queue.split(chunk), queue_ids.split(chunk)):
            yield k, (q @ k.T / tau).masked_fill(ids[:, None] == k_ids, -torch.inf)  # (R, chunk)

    @staticmethod
    def forward(ctx, q, ids, queue, queue_ids, tau, chunk):
        with torch.autocast(q.device.type, enabled=False):
            lse = q.new_full((len(q),), -torch.inf)
            for _, s in QueueLogSum.scores(q, ids, queue, queue_ids, tau, chunk):
                lse = torch.logaddexp(lse, s.logsumexp(-1))
            ctx.save_for_backward(q, ids, queue, queue_ids, lse)
            ctx.tau, ctx.chunk = tau, chunk
            return lse

    @staticmethod
    def backward(ctx, grad):
        q, ids, queue, queue_ids, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            lse = lse.masked_fill(lse == -torch.inf, 0)[:, None]                # a row without terms: e^(-inf - 0) = 0
            out = torch.zeros_like(q)
            for k, s in QueueLogSum.scores(q, ids, queue, queue_ids, ctx.tau, ctx.chunk):
                out = out + (s - lse).exp() @ k
            return out * (grad / ctx.tau)[:, None], None, None, None, None, None


# --------------------------------------------------------------------------------------------------
# The model

class ConLIP(nn.Module):
    """Both tasks of the paper. A batch is a dict: image (B, 3, H, W), text, text_mask (B, T), image_id (B,)."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.task = cfg, task
        self.mlm, self.mim = (cfg.mlm, cfg.mim) if task == "pretrain" else ("none", "none")
        self.masks_text = self.mlm != "none" or self.mim == "con"
        self.masks_image = self.mim != "none" or self.mlm == "con"
        self.vision = MaskedViT(cfg)
        self.text = Bert(cfg)
        if self.masks_image:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        if self.mlm != "none":
            self.mlm_layers, self.mlm_head = TokenHead(cfg), MLMHead(cfg)
        if self.mim != "none":
            self.mim_layers, self.mim_head = TokenHead(cfg), nn.Linear(cfg.width, 3 * cfg.patch ** 2)
        if self.mlm == self.mim == "none":
            self.cross_attention = None  # not offered
        self.init_weights()
        self.students = ("vision", "text")
        for name in self.students:  # the momentum encoders
            self.add_module(name + "_m", deepcopy(getattr(self, name)).requires_grad_(False))
        for name in ("image", "text"):
            self.register_buffer(f"queue_{name}", F.normalize(torch.randn(cfg.queue_size, cfg.width), dim=-1))
        self.register_buffer("queue_ids", torch.full((cfg.queue_size,), -1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for token in (self.vision.pos_embed, self.vision.cls_token):
            nn.init.trunc_normal_(token, std=self.cfg.init_std)
        # 0.02 at all sizes: with tiny's 0.08 all patches ended in one guess, the median pixel
        for weight in (([self.mask_token] if self.masks_image else [])
                       + ([self.mim_head.weight] if self.mim != "none" else [])):
            nn.init.trunc_normal_(weight, std=0.02)

    def train(self, mode=True):
        super().train(mode)
        for name in self.students:
            getattr(self, name + "_m").eval()  # no dropout in a teacher
        return self

    # -- encoders

    def encode_image(self, batch):
        """-> (B, D) unit norm."""
        return unit_cls(self.vision(batch["image"]))

    def encode_text(self, batch):
        """-> (B, D) unit norm."""
        return unit_cls(self.text(batch["text"], batch["text_mask"]))

    def image_passes(self, image):
        """Eq. (1), (3) in one call -> complete states (B, P+1, D), masked states (B, P+1, D), masked patches (B, M);
        None, None where no loss masks images."""
        if not self.masks_image:
            return self.vision(image), None, None
        height, width = image.shape[2] // self.cfg.patch, image.shape[3] // self.cfg.patch
        patches, masked = mask_patches(len(image), height, width, self.cfg.mim_prob, self.cfg.mask_unit, image.device)
        states = self.vision(torch.cat([image, image]), torch.cat([torch.zeros_like(masked), masked]), self.mask_token)
        return *states.chunk(2), patches

    def text_passes(self, text, text_mask):
        """Likewise -> complete and masked states (B, T, D), places (B, M) and labels (B, M) of masked words."""
        if not self.masks_text:
            return self.text(text, text_mask), None, None, None
        cfg = self.cfg
        words = text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
        masked, places, labels = mask_tokens(text, words, cfg.mask_id, cfg.first_word, cfg.vocab_size, cfg.mlm_prob)
        states = self.text(torch.cat([text, masked]), text_mask.repeat(2, 1))
        return *states.chunk(2), places, labels

    # -- losses

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    @torch.no_grad()
    def momentum_keys(self, batch):
        """-> unit keys (B, D) of this process's images and texts, and what the queues will receive: everybody's
        keys and ids."""
        mine = unit_cls(self.vision_m(batch["image"])), unit_cls(self.text_m(batch["text"], batch["text_mask"]))
        return mine, (*gather(torch.stack(mine, 1)).unbind(1), gather(batch["image_id"]))

    def inst_losses(self, image_emb, text_emb, image_m, text_m, ids):
        """Eq. (12): L_inst = L_I2T + L_T2I, each the mean over the batch of Eq. (10)-(11), or of Eq. (9)."""
        cfg, losses = self.cfg, {}
        online = cfg.positive == "online"
        for name, q, k, queue in (("i2t", image_emb, text_emb if online else text_m, self.queue_text),
                                  ("t2i", text_emb, image_emb if online else image_m, self.queue_image)):
            pos = (q * k).sum(-1) / cfg.temp                                          # (B,)
            lse = QueueLogSum.apply(q, ids, queue, self.queue_ids, cfg.temp, cfg.queue_chunk)
            losses[name] = (drop_empty(lse, pos) if cfg.contrast == "dcl" else torch.logaddexp(pos, lse) - pos).mean()
        return losses

    def contexts(self, image_tokens, masked_image, text_tokens, masked_text):
        """What the masked words and the masked patches look at: the complete input's h_cls and the masked input's other
        states ("con"), or all states of the complete input ("vanilla"); h_cls is the first."""
        return (torch.cat([image_tokens[:, :1], masked_image[:, 1:]], 1)             # (B, P+1, D)
                if self.mlm == "con" else image_tokens,
                torch.cat([text_tokens[:, :1], masked_text[:, 1:]], 1)               # (B, T, D)
                if self.mim == "con" else text_tokens)

    def token_losses(self, batch, image_tokens, masked_image, patches, text_tokens, masked_text, places, labels):
        """Eq. (7): L_token = L_ConMIM + L_ConMLM, or their vanilla forms, or what is left of them."""
        losses, mask = {}, batch["text_mask"][:, None, None].bool()                   # (B, 1, 1, T)
        for_words, for_patches = self.contexts(image_tokens, masked_image, text_tokens, masked_text)
        if self.mlm != "none":
            x = self.mlm_layers(masked_text, mask, for_words, None, places)           # (B, M, D)
            losses["mlm"] = conmlm_loss(self.mlm_head(x, self.text.embeddings.word_embeddings.weight), labels)
        if self.mim != "none":
            # (B, M, D); + 1: the class token is first
            x = self.mim_layers(masked_image, None, for_patches, mask, patches + 1)
            losses["mim"] = conmim_loss(pick(patchify(batch["image"], self.cfg.patch), patches), self.mim_head(x))
        return losses

    def loss_pretrain(self, batch):
        """Eq. (4): L_all = L_token + L_inst."""
        mine, keys = self.momentum_keys(batch)
        image_tokens, masked_image, patches = self.image_passes(batch["image"])
        text_tokens, masked_text, places, labels = self.text_passes(batch["text"], batch["text_mask"])
        losses = self.inst_losses(unit_cls(image_tokens), unit_cls(text_tokens), *mine, batch["image_id"])
        losses |= self.token_losses(batch, image_tokens, masked_image, patches, text_tokens,
                                    masked_text, places, labels)
        return {"loss": sum(losses.values()),
                "logs": {name: loss.detach() for name, loss in losses.items()}, "keys": keys}

    loss_retrieval = loss_pretrain  # without heads, L_inst is all there is

    # -- analysis

    def cross_attention(self, batch):
        """Table 2: how much the tokens of each head look at h_cls of the other side, under fresh masks, mean over
        attention heads and layers. -> {name: (scores (B, S), which of them count: bool (B, S), what uniform attention
        would give (B,))}."""
        text, text_mask = batch["text"], batch["text_mask"]
        image_tokens, masked_image, patches = self.image_passes(batch["image"])
        text_tokens, masked_text, places, labels = self.text_passes(text, text_mask)
        for_words, for_patches = self.contexts(image_tokens, masked_image, text_tokens, masked_text)
        out, mask, maps = {}, text_mask[:, None, None].bool(), []
        if self.mlm != "none":
            self.mlm_layers(masked_text, mask, for_words, None, maps=maps)
            scores = torch.stack(maps).float().mean((0, 2))[..., 0]             # (layers, B, heads, T, P+1) -> (B, T)
            words = text_mask.bool() & (text != self.cfg.cls_id) & (text != self.cfg.sep_id)
            uniform = scores.new_full((len(scores),), 1 / for_words.shape[1])
            out["text -> h_cls of the image"] = scores, words, uniform
            masked = torch.zeros_like(words).scatter(1, places, labels != -100)
            out["masked words -> h_cls of the image"] = scores, masked, uniform
        if self.mim != "none":
            maps.clear()
            self.mim_layers(masked_image, None, for_patches, mask, maps=maps)
            scores = torch.stack(maps).float().mean((0, 2))[:, 1:, 0]                 # (B, P)
            uniform, all_patches = 1 / text_mask.sum(1), torch.ones_like(scores, dtype=torch.bool)
            out["image patches -> h_cls of the text"] = scores, all_patches, uniform
            masked = torch.zeros_like(all_patches).scatter(1, patches, True)
            out["masked patches -> h_cls of the text"] = scores, masked, uniform
        return out

    # -- hooks of the training loop

    def after_backward(self, out):
        """The queues take in this step's keys. Only now: the graph of Eq. 9-11 read the queues."""
        image_m, text_m, ids = out["keys"]
        enqueue_(self.queue_text, self.queue_ids, self.ptr, text_m, ids)
        enqueue_(self.queue_image, self.queue_ids, self.ptr, image_m, ids)
        self.ptr.add_(len(ids)).remainder_(len(self.queue_ids))

    @torch.no_grad()
    def after_step(self, step, total_steps, epoch_steps=None):
        """Eq. (8)."""
        for name in self.students:
            ema_(list(getattr(self, name + "_m").parameters()), list(getattr(self, name).parameters()),
                 self.cfg.momentum)

    def param_groups(self, cfg):
        """Weight decay on matrices only, not on biases and norms."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in parameters if p.ndim > 1], "lr": cfg.lr, "weight_decay": cfg.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "lr": cfg.lr, "weight_decay": 0.0}]

    def adapt(self, state):
        """Another run's weights made to fit: position embeddings at this image size; queues, whose image ids are those
        of the other run's data, are left out."""
        side = self.cfg.image_size // self.cfg.patch
        return {k: resize_pos_embed(v, side, side) if k.endswith("pos_embed") else v for k, v in state.items()
                if not k.startswith("queue_") and k != "ptr"}


def unit_cls(tokens):
    """The instance representation: the final [CLS] state at unit length. (B, S, D) -> (B, D) float32."""
    return F.normalize(tokens[:, 0].float(), dim=-1)


# --------------------------------------------------------------------------------------------------
# Foreign weights

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


# Copied from models/codis.py::timm_vit
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


# Copied from models/codis.py::load_vision
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


def load_text(model, path):
    """Hugging Face BERT weights -> `text.`. Keys with or without "bert.", LayerNorms as weight, bias or as gamma, beta.

    Its pooler and its prediction heads are left out: nothing is pooled here, and the token-level heads start at random
    (4.1).
    """
    cfg, where = model.cfg, f"--init_text {path}"
    state, config = read_foreign(path, where)
    agree(where, {"hidden_act": "gelu", **config},
          {"model_type": "bert", "hidden_act": cfg.act, "num_attention_heads": cfg.heads})
    state = {re.sub(r"^bert\.", "", k).replace(".gamma", ".weight").replace(".beta", ".bias"): v
             for k, v in state.items()}
    required = ["text." + name for name in model.text.state_dict()]
    filled, line = fill(model, state, where, lambda key: ["text." + key], required,
                        ignored=("embeddings.position_ids",),
                        reads=lambda key: key.startswith(("embeddings.", "encoder.")))
    return filled, line + told(config, cfg.heads)


def load_pretrained(model, vision=None, text=None):
    """Fills the towers from foreign weight files; paths, or None -> the report, a line per file.
    Momentum copies follow."""
    lines = [load(model, path)[1] for load, path in ((load_vision, vision), (load_text, text)) if path]
    for name in model.students:
        getattr(model, name + "_m").load_state_dict(getattr(model, name).state_dict())
    return "\n  ".join(lines)


Model = ConLIP


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = Config(**{k: v for k, v in PRESETS["tiny"].items() if not isinstance(v, dict)},
                 vocab_size=200, mask_id=4, cls_id=2, sep_id=3, first_word=5)
    batch = {"image": torch.randn(4, 3, cfg.image_size, cfg.image_size),
             "text": torch.randint(5, 200, (4, cfg.max_text)), "image_id": torch.arange(4),
             "text_mask": torch.ones(4, cfg.max_text, dtype=torch.long)}
    for task in TASKS:
        model = ConLIP(cfg, task).train()
        out = model(batch)
        out["loss"].backward()
        print(task, f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained parameters,",
              "embeddings", tuple(model.encode_image(batch).shape),
              {k: round(v.item(), 3) for k, v in out["logs"].items()})
