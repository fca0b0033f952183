"""COOKIE: two separate encoders that end in one shared transformer, trained by three kinds of contrast.

Wen, Xia, Huang, Li, Xu, Shao, "COOKIE: Contrastive Cross-Modal Knowledge Sharing Pre-training for Vision-Language
Representation", ICCV 2021.

A picture and a sentence never meet inside the network, so that a gallery is embedded once and searched by a dot
product. What brings them together is the weight-sharing transformer (WS-TE): the same layers end both paths. Contrast
across modalities (CCL) aligns the two; contrast within images (VCL) and within sentences (TCL) keeps what each encoder
knew of its own.

    image --> ResNet --> FC + p --> TAV-TE --> + s_V --+                  +--> pooling --> I
              (grid)     Eq. 1      Eq. 3              +--> WS-TE (same --+                   CCL: I <-> T    Eq. 5-7
    text ---> BERT ----> FC + s_T ---------------------+    for both)     +--> pooling --> T  VCL: I_1 -> I_2 Eq. 8, 9
              (words)    Eq. 2                                   Eq. 4                        TCL: T_1 -> T_2 Eq. 10, 11

Shapes: B images, n patches, T text tokens, F frames, D = 1024 joint width, D_V, D_T widths of CNN and BERT, N global
batch, C labels, K bits.

Equations
    Eq. 1  -> patch_features()      Eq. 2  -> word_features()      Eq. 3  -> visual_features()
    Eq. 4  -> pool(), GPO           Eq. 5  -> info_nce()           Eq. 6, 7 -> cross_modal()
    Eq. 8  -> data.py's view "simclr" twice, Cookie.loss_pretrain()      Eq. 9  -> visual_contrast()
    Eq. 10 -> augment_tokens()      Eq. 11 -> textual_contrast()   Eq. 12 -> Cookie.loss_pretrain()

Deviations from the paper
     1. Eq. 5 prints k^- without index: it runs over the other samples of the *global* batch. Other captions of one
        image are no negatives; a row left without negatives has loss 0.
     2. tau is not given: 0.05 (SimCSE's). Neither are the rates of Eq. 10: a fifth of the words; of these half are
        masked, a tenth substituted, the rest deleted (VSE-infinity's code). [CLS] and [SEP] stay, and at least one
        word. Nor are the strengths of Eq. 8: SimCLR's, crops of 0.2 to 1 of the area (MoCo v2's); nor AdamW's weight
        decay: 0.01, BERT's, on matrices only.
     3. "ResNeXt101" cites the weakly supervised weights; 32x8d is our guess of the width. `--init_vision` takes
        torchvision's keys.
     4. Embeddings have unit norm; pooling is the mean, or GPO as VSE-infinity has it (`pooling="gpo"`, one for each
        modality). Transformers are post-norm with ReLU ("the standard definition"); their dropout is BERT's.
     5. The batch of stage 2 is one call per modality: raw, view 1 and view 2 stacked. Batch norm sees them together.
        `ccl_on="view1"` drops the raw ones. With `chunk`, batch norm's statistics are those of a chunk.
     6. Batch norm's statistics are each process's own; the saved ones are the first process's.
     7. Hinge margin, warm-up, learning rates and epochs of fine-tuning stood in an appendix that we lack: see RECIPE.
        Of VSE-infinity's recipe its CNN frozen for an epoch and its dropping of regions and words are left out;
        the hinge is a mean over rows (a sum there).
     8. Hashing adds CSQ's three-layer hash head and quantization weight 0.05, its pairwise loss is left out (weight 0
        in its commands). What is evaluated is the last checkpoint (there: the best on the test list), test pictures are
        the middle square (there: of 255 pixels the middle 224).
     9. Table 5b's "FC layers" are the WS-TE's feed-forward blocks without their attention (`ws="fc"`).
    10. `backbone="tiny"` (a ResNet of three basic blocks, 16 pixels a patch) exists for the CPU.

Run: python models/cookie.py      (2 s: shapes, parameters and every loss on a random batch)
"""

import contextlib
import json
import math
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


@dataclass
class Config:
    image_size: int = 512           # pixels a side
    backbone: str = "resnext101_32x8d"  # resnet50, resnet101, resnext101_32x8d or tiny
    width: int = 768                # D_T of the text encoder
    text_layers: int = 12           # its layers
    heads: int = 12                 # its attention heads
    mlp_ratio: int = 4              # hidden width of its feed-forward blocks over D_T
    act: str = "gelu"               # its activation, "gelu" or "relu"
    dropout: float = 0.1            # in text encoder, TAV-TE and WS-TE
    embed_dim: int = 1024           # D, of the joint space and its transformers
    te_heads: int = 8               # attention heads of TAV-TE and WS-TE
    te_ratio: int = 1               # their intermediate size over D
    tav_layers: int = 1             # layers of the TAV-TE; 0 = none (Table 5b)
    ws_layers: int = 2              # layers of the WS-TE; 0 = none (Tables 5b, 5c)
    ws: str = "te"                  # "te": transformer layers; "fc": feed-forward blocks only (Table 5b)
    ws_shared: bool = True          # the same WS-TE for images and texts (Table 5b)
    pooling: str = "mean"           # of tokens: "mean" or "gpo"
    embed: str = "joint"    # "bert": the sentence vector is the mean of BERT's last layer, no image tower (Table 4a)
    temp: float = 0.05              # tau of Eq. 5
    vcl: bool = True                # visual contrast in stage 2 (Table 5a)
    tcl: bool = True                # textual contrast in stage 2 (Table 5a)
    ccl_on: str = "raw"             # stage 2 contrasts modalities on "raw" or "view1" inputs
    tcl_prob: float = 0.2           # share of words that a text view changes
    tcl_mask: float = 0.5           # of these: share masked
    tcl_substitute: float = 0.1     # share substituted by a random word; the rest is deleted
    margin: float = 0.2             # of the hinge loss (retrieval)
    warmup_epochs: float = 1.0      # epochs of the mean hinge before the hardest negative alone counts
    frame_width: int = 2048         # D of a frame's features, taken from the files (vtm)
    vtm_te: bool = False            # let frames and words pass the WS-TE (vtm)
    bits: int = 64                  # K, length of a hash code (hashing)
    quantization: float = 0.05      # weight of CSQ's quantization loss
    hash_dropout: float = 0.5       # in the hash head
    vision_lr: float = 0.0          # learning rate of the CNN over the global one; 0 = 0.1 for a ResNeXt, 1 for others
    text_lr: float = 1.0            # the same for BERT
    chunk: int = 0      # encode so many rows at a time, recomputed in backward; 0 = all at once (not with --compile)
    max_text: int = 50              # m, tokens of a caption, [CLS] and [SEP] included
    positions: int = 512            # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # taken from the vocabulary file
    pad_id: int = 0                 # [PAD], taken from the vocabulary file
    cls_id: int = 101               # [CLS], likewise
    sep_id: int = 102               # [SEP], likewise
    mask_id: int = 103              # [MASK], likewise
    first_word: int = 999           # lowest id of an ordinary word, likewise
    checkpointing: bool = False     # recompute transformer layers in backward instead of keeping their activations


PRESETS = {
    "base": dict(),
    "tiny": dict(image_size=64, backbone="tiny", width=128, text_layers=2, heads=4, act="relu", dropout=0.0,
                 embed_dim=128, te_heads=4, te_ratio=2, max_text=22, vision_lr=1.0, text_lr=1.0, hash_dropout=0.0,
                 pretrain=[dict(batch_size=64, steps=1000, lr=1e-3, warmup_steps=50, weight_decay=0.02,
                                schedule="cosine", min_lr=1e-4),
                           dict(batch_size=32, steps=250, lr=2e-4, weight_decay=0.02, schedule="step",
                                crop_scale=(0.6, 1.0))],
                 retrieval=dict(image_view="plain", batch_size=64, steps=300, lr=2e-4, vision_lr=1.0,
                                text_lr=1.0, warmup_epochs=0.2),
                 vtm=dict(batch_size=40, steps=300, lr=5e-4, text_lr=0.2),
                 hashing=dict(image_size=64, backbone="tiny", batch_size=64, steps=400, lr=1e-3,
                              vision_lr=1.0, hash_dropout=0.0, image_view="plain")),
}

# Section 4.1 gives pre-training, all but the decay [B], BERT's; of Config, temp is SimCSE's and tcl_* are
# VSE-infinity's. Fine-tuning stood in an appendix that our copy lacks: [V] = VSE++ / VSE-infinity (GPO), also margin
# and warmup_epochs of Config; [C] = CSQ, also quantization and hash_dropout. Data (section 4.1): Conceptual Captions,
# SBU, COCO, Flickr30K, and the questions of VQA v2 and GQA as captions. Ablations (section 4.3): ITM with ResNeXt-101,
# image retrieval with ResNet-50, text with ResNet-101.
# Table 5b, rows from above (flags at pre-training and again at fine-tuning):
#   baseline  --ws_layers 0 --tav_layers 0        FC, shared   --ws fc --tav_layers 0
#   WS-TE, not shared  --ws_shared false --tav_layers 0        WS-TE, shared  --tav_layers 0
#   both again with the TAV-TE   --ws_shared false             (the default)
# Table 5c, 0 layers, prints the baseline of 5b: without the TAV-TE, too.
RECIPE = {
    "pretrain": [
        dict(task="ccl", optimizer="adamw", lr=2e-5, schedule="step", milestones="0.5", gamma=0.1, epochs=30,
             batch_size=576, weight_decay=0.01),                                                                # [B]
        dict(optimizer="adamw", lr=2e-5, schedule="step", milestones="0.5", gamma=0.1, epochs=10, batch_size=288,
             weight_decay=0.01),                                                                                # [B]
    ],
    "retrieval": dict(optimizer="adamw", lr=5e-4, schedule="step", milestones="0.6", gamma=0.1, epochs=25,
                      batch_size=128, clip=2.0, weight_decay=1e-4, vision_lr=0.01, text_lr=0.1,
                      crop_scale=(0.6, 1.0)),                                                                   # [V]
    "vtm": dict(optimizer="adamw", lr=5e-4, schedule="step", milestones="0.6", gamma=0.1, epochs=25,
                batch_size=128, clip=2.0, weight_decay=1e-4, text_lr=0.1),                                      # [V]
    "hashing": dict(image_size=224, backbone="resnet50", optimizer="adam", lr=1e-3, vision_lr=0.05, schedule="step",
                    gamma=0.7, milestones=",".join(f"{10 * i / 90:.4f}" for i in range(1, 9)), epochs=90, batch_size=64,
                    crop_scale=(0.08, 1.0)),                                                                    # [C]
}

TASKS = ("pretrain", "retrieval", "vtm", "hashing")
EVALS = {"ccl": ("retrieval",), "pretrain": ("retrieval",), "retrieval": ("retrieval",), "vtm": ("vtm",),
         "hashing": ("hashing",)}
INITS = ("vision", "text")
VIEWS = {
    "ccl": dict(source="pairs", image="resize", norm="imagenet", text="caption"),                       # stage 1
    "pretrain": dict(source="pairs", image="resize", view1="simclr", view2="simclr", norm="imagenet", text="caption"),
    "retrieval": dict(source="pairs", image="flip", norm="imagenet", text="caption"),
    "vtm": dict(source="clips", frames="frames", text="caption"),
    "hashing": dict(source="hashing", image="flip", image_eval="center", norm="imagenet", labels="labels"),
}
BACKBONE = ("vision.", "text.", "tav.", "ws.", "ws_text.")  # `--init` must fill every key that starts so


def setup(cfg, task, stats):
    if task == "vtm":
        cfg.frame_width = stats["frame_width"]


# --------------------------------------------------------------------------------------------------
# Blocks. Keys are named as in torchvision's ResNet and Hugging Face's BERT.

NETS = {  # name: block, blocks per stage, their planes, groups, width per group
    "resnet50": (Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), 1, 64),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), 32, 8),
    "tiny": (BasicBlock, (1, 1, 1), (32, 64, 128), 1, 64),
}


class ResNet(nn.Module):
    """torchvision's ResNet without its head: (B, 3, H, W) -> the features before pooling,
    (B, D_V, H/stride, W/stride)."""

    def __init__(self, name):
        super().__init__()
        if name not in NETS:
            raise SystemExit(f"--backbone {name}: it is one of {', '.join(NETS)}")
        block, depths, planes, groups, base_width = NETS[name]
        channels = planes[0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stages = []
        for n, (depth, plane) in enumerate(zip(depths, planes), 1):
            blocks, stride, out = [], 1 if n == 1 else 2, plane * block.expansion
            for i in range(depth):
                shortcut = None
                if i == 0 and (stride > 1 or channels != out):
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
                blocks.append(block(channels, plane, stride if i == 0 else 1, shortcut, groups, base_width))
                channels = out
            self.add_module(f"layer{n}", nn.Sequential(*blocks))
            self.stages.append(f"layer{n}")
        self.width, self.stride = channels, 2 ** (1 + len(depths))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image):
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x


# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


# Copied from models/codis.py::split_heads
def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, heads, S, D/heads)


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


# Copied from models/codis.py::BertIntermediate
class BertIntermediate(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dense = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.act = activation(cfg.act)

    def forward(self, x):
        return self.act(self.dense(x))


class SelfAttention(nn.Module):
    """x: (B, S, D); mask: bool (B, 1, 1, S), True = look, or None -> (B, S, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.p = cfg.heads, cfg.dropout
        self.self = QueryKeyValue(cfg.width, cfg.width)
        self.output = BertOutput(cfg, cfg.width)

    def forward(self, x, mask=None):
        q, k, v = (split_heads(f(x), self.heads) for f in (self.self.query, self.self.key, self.self.value))
        a = F.scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        return self.output(a.transpose(1, 2).flatten(2), x)


class EncoderLayer(nn.Module):
    """A post-norm transformer layer; without `attend`, its feed-forward block alone."""

    def __init__(self, cfg, attend=True):
        super().__init__()
        self.attention = SelfAttention(cfg) if attend else None
        self.intermediate = BertIntermediate(cfg)
        self.output = BertOutput(cfg, cfg.mlp_ratio * cfg.width)

    def forward(self, x, mask=None):
        if self.attention is not None:
            x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """(B, S, D), text_mask (B, S) or None -> (B, S, D). No layers: the identity."""

    def __init__(self, cfg, layers, attend=True):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.layer = nn.ModuleList(EncoderLayer(cfg, attend) for _ in range(layers))

    def forward(self, x, mask=None):
        mask = None if mask is None else mask[:, None, None].bool()                  # (B, 1, 1, S)
        for layer in self.layer:
            x = (checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointing and self.training
                 else layer(x, mask))
        return x


class TextEncoder(nn.Module):
    """BERT without pooler: (B, T) ids and mask -> (B, T, D_T) of the last layer."""

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = BertEmbeddings(cfg)
        self.encoder = Encoder(cfg, cfg.text_layers)

    def forward(self, text, text_mask):
        return self.encoder(self.embeddings(text), text_mask)


class GPO(nn.Module):
    """Generalized pooling operator: a learnt weight for the largest, second largest, ... value of each dimension.

    The weights w of a set of l tokens follow from l alone: sinusoid positions (l, 32) -> BiGRU, mean of both directions
    -> one score a position -> softmax(score / 0.1). The forward GRU's run is a prefix of the longest set's; the
    backward GRU starts at each set's own end, so every set's positions are turned around first. No packing, no lengths
    on the host.
    """

    def __init__(self, width=32, temp=0.1):
        super().__init__()
        self.width, self.temp = width, temp
        self.ahead = nn.GRU(width, width, batch_first=True)
        self.back = nn.GRU(width, width, batch_first=True)
        self.score = nn.Linear(width, 1, bias=False)

    def positions(self, length, like):
        """(length, width): sin and cos, interleaved, of p / 10000^(2i / width)."""
        p = torch.arange(length, device=like.device, dtype=like.dtype)
        rate = torch.exp(torch.arange(0, self.width, 2, device=like.device, dtype=like.dtype)
                         * (-math.log(10000.0) / self.width))
        return torch.stack([(p[:, None] * rate).sin(), (p[:, None] * rate).cos()], -1).flatten(1)

    def weights(self, mask):
        """mask: bool (B, S), the tokens first -> (B, S) weights that sum to 1 over each row's l tokens,
        0 behind them."""
        pe = self.positions(mask.shape[1], self.score.weight)
        # (B, S): l-1, ..., 0, then < 0
        behind = mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)
        turn = behind.clamp(min=0)
        ahead = self.ahead(pe[None])[0]                                              # (1, S, 32)
        back = self.back(pe[turn])[0]                                                # (B, S, 32), its own end first
        back = back.gather(1, turn[..., None].expand_as(back))                       # turned back
        score = self.score((ahead + back) / 2).squeeze(-1)                           # (B, S)
        return (score / self.temp).masked_fill(~mask, -torch.inf).softmax(-1)

    def forward(self, x, mask=None):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.score.weight.dtype)
            if mask is None:                                                    # all sets are full: one row of weights
                return (x.sort(1, descending=True)[0]
                        * self.weights(x.new_ones(1, x.shape[1], dtype=torch.bool))[..., None]).sum(1)
            mask = mask.bool()
            x = x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).sort(1, descending=True)[0]
            ranked = torch.arange(x.shape[1], device=x.device) < mask.sum(1, keepdim=True)    # the tokens are first now
            return (x.masked_fill(~ranked[..., None], 0.0) * self.weights(ranked)[..., None]).sum(1)


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


class GatherGrad(torch.autograd.Function):
    """gather() with gradient: a process's rows receive the sum of what every process's loss says of them.

    With a loss that is the mean over a process's own B rows, and DDP's mean over processes, the gradient is then that
    of the mean over all N rows, as one process would compute it.
    """

    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        b = len(grad) // world()
        return grad[rank() * b:rank() * b + b]


def gather_grad(x):
    return x if world() == 1 else GatherGrad.apply(x)


@contextlib.contextmanager
def frozen_statistics(norms):
    """Batch norm layers normalize by the batch, as in training, but leave their running statistics alone. (Without
    track_running_stats they would save other tensors for backward, which checkpoint() refuses.)"""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def in_chunks(fn, chunk, norms, *inputs):
    """fn(*inputs) row by row the same, `chunk` rows at a time: only inputs and outputs are kept, backward runs fn
    again, and that second time updates no running statistics. norms: the batch norm layers inside fn.
    inputs, output: (B, ...)."""
    if not chunk or chunk >= len(inputs[0]) or not torch.is_grad_enabled():
        return fn(*inputs)
    contexts = lambda: (contextlib.nullcontext(), frozen_statistics(norms))
    return torch.cat([checkpoint(fn, *part, use_reentrant=False, context_fn=contexts)
                      for part in zip(*(x.split(chunk) for x in inputs))])


# --------------------------------------------------------------------------------------------------
# The paper's equations

def patch_features(v, weight, bias, pos):
    """Eq. (1): v_i W_V + b_V + p_i.  v: (B, n, D_V); weight: (D, D_V); bias: (D,); pos: (1, n, D) -> (B, n, D)."""
    return F.linear(v, weight, bias) + pos


def word_features(t, weight, bias, s):
    """Eq. (2): f_i = t_i W_T + b_T + s_T.  t: (B, T, D_T); weight: (D, D_T); bias, s: (D,) -> (B, T, D)."""
    return F.linear(t, weight, bias) + s


def visual_features(v_hat, te_tav, s):
    """Eq. (3): F_V = TE_TAV(v^) + s_V.  v_hat: (B, n, D); te_tav: (B, n, D) -> (B, n, D); s: (D,)."""
    return te_tav(v_hat) + s


def full(x):
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(x, mask=None, gpo=None):
    """Eq. (4): Pooling(TE_WS(F)), to unit norm. x: (B, S, D); mask: (B, S) 1 = token, or None; gpo: a GPO, or None for
    the mean -> (B, D) float32."""
    x = full(x)
    if gpo is not None:
        x = gpo(x, mask)
    elif mask is None:
        x = x.mean(1)
    else:
        mask = mask.to(x.dtype)[..., None]
        x = (x * mask).sum(1) / mask.sum(1)
    return F.normalize(x, dim=-1)


def similarity(q, k):
    """q . k' in float32 (float64 stays) whatever autocast says. (B, d), (N, d) -> (B, N)."""
    with torch.autocast(q.device.type, enabled=False):
        return full(q) @ full(k).T


def other_views(ids, key_ids, own):
    """Keys that are neither a row's positive nor its negatives: those of the same image. ids: (B,); key_ids: (N,);
    own: (B,), the positive's column -> bool (B, N)."""
    return (ids[:, None] == key_ids).scatter(1, own[:, None], False)


def info_nce(q, k, ids, key_ids, own, temp):
    """Eq. (5): -1/N sum_i log [ exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_j exp(q.k_j- / tau)) ],
    j over the other images' keys.

    q: (B, d); k: (N, d), unit norm; ids, key_ids: image ids (B,), (N,); own: (B,) the column of k+ -> 0-d,
    the mean over B rows.
    """
    logits = (similarity(q, k) / temp).masked_fill(other_views(ids, key_ids, own), -torch.inf)    # (B, N)
    return F.cross_entropy(logits, own)


def cross_modal(image_emb, text_emb, all_image, all_text, ids, all_ids, own, temp):
    """Eq. (6), (7): L_i2t = L_InfoNCE(I, T), L_t2i = L_InfoNCE(T, I). (B, d) of this process,
    (N, d) of all -> two 0-d."""
    return (info_nce(image_emb, all_text, ids, all_ids, own, temp),
            info_nce(text_emb, all_image, ids, all_ids, own, temp))


def visual_contrast(view1, all_view2, ids, all_ids, own, temp):
    """Eq. (9): L_i = L_InfoNCE(I_1, I_2), this one direction. (B, d), (N, d) -> 0-d."""
    return info_nce(view1, all_view2, ids, all_ids, own, temp)


def textual_contrast(view1, all_view2, ids, all_ids, own, temp):
    """Eq. (11): L_t = L_InfoNCE(T_1, T_2), this one direction. (B, d), (N, d) -> 0-d."""
    return info_nce(view1, all_view2, ids, all_ids, own, temp)


@torch.no_grad()
def augment_tokens(text, text_mask, words, pad_id, mask_id, first_word, vocab_size, prob=0.2, mask=0.5, substitute=0.1):
    """Eq. (10), aug_t: each word is changed with probability `prob`: masked, substituted by a random word,
    or else deleted.

    text, text_mask: (B, T) int64; words: bool (B, T), the tokens that may change -> new text and mask, same shapes,
    what remains moved to the front. A row that would lose every word keeps one. Shares: mask, substitute,
    1 - mask - substitute.
    """
    noise = torch.rand(text.shape, device=text.device)
    changed = words & (noise < prob)
    dice = torch.rand(text.shape, device=text.device)
    deleted = changed & (dice >= mask + substitute)
    last = noise.masked_fill(~words, -1.0).argmax(1, keepdim=True)      # of the words, the one least inclined to change
    # (B, 1): nothing but [CLS] and [SEP] would remain
    bare = words.any(1, keepdim=True) & ~(words & ~deleted).any(1, keepdim=True)
    deleted = deleted & ~(bare & (torch.arange(text.shape[1], device=text.device) == last))
    random = torch.randint(first_word, vocab_size, text.shape, device=text.device)
    text = torch.where(changed & (dice < mask), mask_id,
                       torch.where(changed & (dice >= mask) & (dice < mask + substitute), random, text))
    keep = text_mask.bool() & ~deleted
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)                  # what stays, in order, then the rest
    keep = keep.gather(1, order)
    return text.gather(1, order).masked_fill(~keep, pad_id), keep.to(text_mask.dtype)


# --------------------------------------------------------------------------------------------------
# Fine-tuning's losses: VSE++ and CSQ

def hinge_triplet(q, k, ids, key_ids, own, margin, hard):
    """VSE++'s hinge, one direction: [margin - q.k+ + q.k-]_+, of the hardest negative (hard = 1) or the mean over
    negatives (0).

    q: (B, d); k: (N, d); own: (B,) the column of k+; hard: 0-d in [0, 1] -> 0-d, the mean over rows. Of N rows that all
    have the same vector each direction is exactly `margin`: 2 margin in all is what a collapsed model shows.
    """
    sim = similarity(q, k)                                                           # (B, N)
    cost = (margin - sim.gather(1, own[:, None]) + sim).clamp(min=0)
    negative = ids[:, None] != key_ids
    cost = cost * negative
    mean = cost.sum(1) / negative.sum(1).clamp(min=1)
    return (hard * cost.amax(1) + (1 - hard) * mean).mean()


def hash_centers(labels, bits, seed=0):
    """CSQ's hash centers (labels, bits), +1 or -1, as far apart as we find, and a vector (bits,) that breaks ties.

    Where bits is a power of two and labels <= 2 bits: rows of [H; -H], H the Hadamard matrix, bits/2 or bits apart.
    Otherwise balanced random rows: each new one must lie at least d from all before it, d sinking by 2 after 2,000
    draws in vain.
    """
    g = torch.Generator().manual_seed(seed)
    tie = torch.randint(0, 2, (bits,), generator=g) * 2.0 - 1
    if bits & (bits - 1) == 0 and labels <= 2 * bits:
        h = torch.ones(1, 1)
        while len(h) < bits:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return torch.cat([h, -h])[:labels], tie
    rows, distance = torch.empty(0, bits), bits // 2
    while len(rows) < labels:
        drawn = (torch.rand(2000, bits, generator=g).argsort(1) < bits // 2) * 2.0 - 1            # as many +1 as -1
        far = drawn[((bits - drawn @ rows.T) / 2 >= distance).all(1)]           # Hamming distance to each row there is
        rows, distance = torch.cat([rows, far[:1]]), distance - 2 * (len(far) == 0)
    return rows, tie


def target_centers(labels, centers, tie):
    """The center of each image: sign of the mean of its labels' centers, ties by `tie`.
    (B, C), (C, K), (K,) -> (B, K)."""
    s = labels @ centers
    return torch.where(s == 0, tie, s.sign())


def csq_loss(a, target, weight, quantization):
    """CSQ: L_C + quantization L_Q. L_C = BCE((y + 1) / 2, (c + 1) / 2), L_Q = (|y| - 1)^2, y = tanh(a),
    means over bits.

    a: (B, K) before tanh; target: (B, K) +-1; weight: (B,) 1, or 0 for an image without labels -> L_C, L_Q, 0-d.
    (tanh(a) + 1) / 2 is sigmoid(2 a), so that the logarithms are safe.
    """
    a = full(a)
    share = weight.to(a.dtype) / weight.sum().clamp(min=1)
    central = F.binary_cross_entropy_with_logits(2 * a, (target.to(a.dtype) + 1) / 2, reduction="none").mean(1)
    return (share * central).sum(), (share * (a.tanh().abs() - 1).square().mean(1)).sum()


# --------------------------------------------------------------------------------------------------
# The model

class Cookie(nn.Module):
    """All tasks of the paper. A batch is a dict: image (B, 3, H, W), text, text_mask (B, T), image_id (B,) and what
    the task adds.

    Tasks "ccl" (stage 1), "pretrain" (stage 2), "retrieval": the whole model. "vtm": frame features and text.
    "hashing": the CNN.
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.task = cfg, task
        choices = {"pooling": ("mean", "gpo"), "ws": ("te", "fc"), "ccl_on": ("raw", "view1"),
                   "embed": ("joint", "bert")}
        for field, values in choices.items():
            if getattr(cfg, field) not in values:
                raise SystemExit(f"--{field} {getattr(cfg, field)}: it is one of {', '.join(values)}")
        joint, clips, codes, d = cfg.embed == "joint", task == "vtm", task == "hashing", cfg.embed_dim
        sees = codes or joint and not clips                                          # does it look at pictures?
        if sees:
            self.vision = ResNet(cfg.backbone)
        if not codes:
            self.text = TextEncoder(cfg)
        if joint and not codes:
            self.text_fc = nn.Linear(cfg.width, d)
            self.image_fc = nn.Linear(cfg.frame_width if clips else self.vision.width, d)
            if not clips:
                self.image_pos = nn.Parameter(torch.zeros(1, (cfg.image_size // self.vision.stride) ** 2, d))
            te = replace(cfg, width=d, heads=cfg.te_heads, mlp_ratio=cfg.te_ratio, act="relu")
            if cfg.vtm_te or not clips:
                self.s_image, self.s_text = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
                self.tav = Encoder(te, cfg.tav_layers)
                self.ws = Encoder(te, cfg.ws_layers, cfg.ws == "te")
                if not cfg.ws_shared:
                    self.ws_text = Encoder(te, cfg.ws_layers, cfg.ws == "te")
            if cfg.pooling == "gpo":
                self.gpo_image, self.gpo_text = GPO(), GPO()
        self.init_weights()
        if codes:
            w = self.vision.width
            self.hash_layer = nn.Sequential(nn.Linear(w, w), nn.ReLU(), nn.Dropout(cfg.hash_dropout),
                                            nn.Linear(w, w), nn.ReLU(), nn.Linear(w, cfg.bits))
            centers, tie = hash_centers(num_labels, cfg.bits)
            self.register_buffer("centers", centers)
            self.register_buffer("tie", tie)
        if task == "retrieval":
            self.register_buffer("hard", torch.tensor(float(cfg.warmup_epochs == 0)))
        self.norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for method, there in (("hash_codes", codes), ("encode_text", not codes), ("encode_image", sees and not codes),
                              ("encode_clip", clips), ("token_scores", sees and not codes)):
            if not there:
                setattr(self, method, None)                                          # what this task does not offer

    def init_weights(self):
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name in ("image_pos", "s_image", "s_text"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def adapt(self, state):
        """Another run's state, its position embeddings interpolated to this one's grid. Of it, clips take the text
        encoder alone, with vtm_te all but the FC of images."""
        if self.task == "vtm" and "image_pos" in state:
            return {k: v for k, v in state.items()
                    if k.startswith("text.") or self.cfg.vtm_te and not k.startswith("image_fc.")}
        pos = state.get("image_pos")
        if pos is not None and hasattr(self, "image_pos"):
            side = math.isqrt(self.image_pos.shape[1])
            state = {**state, "image_pos": resize_grid(pos, side, side)}
        return state

    # -- encoders

    def image_tokens(self, image):
        """Eq. (1), (3) and TE_WS of Eq. (4): (B, 3, H, W) -> (B, n, D)."""
        grid = self.vision(image)                                                    # (B, D_V, h, w)
        pos = resize_grid(self.image_pos, *grid.shape[2:])
        v_hat = patch_features(grid.flatten(2).mT, self.image_fc.weight, self.image_fc.bias, pos)
        return self.ws(visual_features(v_hat, self.tav, self.s_image))

    def frame_tokens(self, frames, mask):
        """The frames of clips (section 4.2): (B, F, frame_width), (B, F) -> (B, F, D)."""
        x = self.image_fc(frames)
        return self.ws(self.tav(x, mask) + self.s_image, mask) if self.cfg.vtm_te else x

    def text_tokens(self, text, text_mask):
        """Eq. (2) and TE_WS of Eq. (4): (B, T) -> (B, T, D)."""
        t = self.text(text, text_mask)                                               # (B, T, D_T)
        if self.task == "vtm" and not self.cfg.vtm_te:
            return self.text_fc(t)
        x = word_features(t, self.text_fc.weight, self.text_fc.bias, self.s_text)
        return (self.ws if self.cfg.ws_shared else self.ws_text)(x, text_mask)

    def embed_image(self, image):
        return pool(self.image_tokens(image), None, getattr(self, "gpo_image", None))

    def embed_frames(self, frames, mask):
        return pool(self.frame_tokens(frames, mask), mask, getattr(self, "gpo_image", None))

    def embed_text(self, text, text_mask):
        tokens = self.text_tokens(text, text_mask) if self.cfg.embed == "joint" else self.text(text, text_mask)
        return pool(tokens, text_mask, getattr(self, "gpo_text", None))

    def encode_image(self, batch):
        """-> (B, D) unit norm."""
        return self.embed_image(batch["image"])

    def encode_clip(self, batch):
        """-> (B, D) unit norm, of the frames of clips."""
        return self.embed_frames(batch["frames"], batch["frames_mask"])

    def encode_text(self, batch):
        """-> (B, D) unit norm."""
        return self.embed_text(batch["text"], batch["text_mask"])

    def sentence_vector(self):
        """What encode_text() is made of, in words, for the protocol of an evaluation."""
        cfg = self.cfg
        if cfg.embed == "bert":
            return f"{cfg.pooling} of the last of BERT's {cfg.text_layers} layers over all tokens"
        return (f"{cfg.pooling} of layer {cfg.ws_layers} of the {'WS-TE' if cfg.ws == 'te' else 'shared FC'} "
                "over all tokens")

    def token_scores(self, batch):
        """Figure 3: cosine of the final vector with each token after the WS-TE -> image (B, h, w), text (B, T)."""
        image, text = self.image_tokens(batch["image"]), self.text_tokens(batch["text"], batch["text_mask"])
        image_emb = pool(image, None, getattr(self, "gpo_image", None))
        text_emb = pool(text, batch["text_mask"], getattr(self, "gpo_text", None))
        h, w = (-(-s // self.vision.stride) for s in batch["image"].shape[2:])       # a strided convolution rounds up
        score = lambda tokens, emb: (F.normalize(tokens.float(), dim=-1) @ emb[..., None]).squeeze(-1)
        return {"image": score(image, image_emb).unflatten(1, (h, w)), "text": score(text, text_emb)}

    def hash_logits(self, image):
        return self.hash_layer(self.vision(image).mean((2, 3)))                      # (B, K), before tanh

    def hash_codes(self, batch):
        """-> (B, K) of +1 and -1; 0 becomes +1."""
        return torch.where(self.hash_logits(batch["image"]) >= 0, 1.0, -1.0)

    # -- losses

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def encode(self, fn, *inputs):
        return in_chunks(fn, self.cfg.chunk, self.norms, *inputs)

    def everyone(self, keys, ids):
        """Keys (B, D) of this process -> the same of all processes (N, D), with gradient, their ids (N,),
        own columns (B,)."""
        own = rank() * len(ids) + torch.arange(len(ids), device=ids.device)
        return gather_grad(torch.stack(keys, 1)).unbind(1), gather(ids), own

    def total(self, losses):
        return {"loss": sum(losses.values()), "logs": {name: loss.detach() for name, loss in losses.items()}}

    def trainable(self):
        if self.cfg.embed == "bert":
            raise SystemExit("--embed bert has nothing to train: --steps 0")

    def loss_ccl(self, batch):
        """Stage 1: L_i2t + L_t2i, Eq. (6), (7)."""
        self.trainable()
        image_emb, text_emb = (self.encode(self.embed_image, batch["image"]),
                               self.encode(self.embed_text, batch["text"], batch["text_mask"]))
        return self.total(self.contrast(image_emb, text_emb, batch["image_id"]))

    def contrast(self, image_emb, text_emb, ids):
        (all_image, all_text), all_ids, own = self.everyone((image_emb, text_emb), ids)
        i2t, t2i = cross_modal(image_emb, text_emb, all_image, all_text, ids, all_ids, own, self.cfg.temp)
        return {"i2t": i2t, "t2i": t2i}

    def loss_pretrain(self, batch):
        """Eq. (12): L = L_i2t + L_t2i + L_i + L_t. Each modality's raw input and views are encoded in one call."""
        self.trainable()
        cfg, ids, temp = self.cfg, batch["image_id"], self.cfg.temp
        names = ["raw"] * (cfg.ccl_on == "raw") + ["view1"] * (cfg.vcl or cfg.ccl_on == "view1") + ["view2"] * cfg.vcl
        images = torch.cat([batch["image" if name == "raw" else name] for name in names])                # Eq. 8
        image = dict(zip(names, self.encode(self.embed_image, images).chunk(len(names))))
        names = ["raw"] * (cfg.ccl_on == "raw") + ["view1"] * (cfg.tcl or cfg.ccl_on == "view1") + ["view2"] * cfg.tcl
        texts = [(batch["text"], batch["text_mask"]) if name == "raw" else self.text_view(batch)           # Eq. 10
                 for name in names]
        text = dict(zip(names, self.encode(self.embed_text, *map(torch.cat, zip(*texts))).chunk(len(names))))

        queries = {"i2t": image[cfg.ccl_on], "t2i": text[cfg.ccl_on]}
        keys = ([image[cfg.ccl_on], text[cfg.ccl_on]] + ([image["view2"]] if cfg.vcl else [])
                + ([text["view2"]] if cfg.tcl else []))
        (all_image, all_text, *views), all_ids, own = self.everyone(keys, ids)
        losses = dict(zip(queries, cross_modal(*queries.values(), all_image, all_text, ids, all_ids, own, temp)))
        if cfg.vcl:
            losses["i"] = visual_contrast(image["view1"], views[0], ids, all_ids, own, temp)
        if cfg.tcl:
            losses["t"] = textual_contrast(text["view1"], views[-1], ids, all_ids, own, temp)
        return self.total(losses)

    def text_view(self, batch):
        cfg, text, text_mask = self.cfg, batch["text"], batch["text_mask"]
        words = text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
        return augment_tokens(text, text_mask, words, cfg.pad_id, cfg.mask_id, cfg.first_word, cfg.vocab_size,
                              cfg.tcl_prob, cfg.tcl_mask, cfg.tcl_substitute)

    def loss_retrieval(self, batch):
        """The hinge of VSE++ both ways (section 4.2)."""
        self.trainable()
        image_emb, text_emb = (self.encode(self.embed_image, batch["image"]),
                               self.encode(self.embed_text, batch["text"], batch["text_mask"]))
        ids = batch["image_id"]
        (all_image, all_text), all_ids, own = self.everyone((image_emb, text_emb), ids)
        hinge = lambda q, k: hinge_triplet(q, k, ids, all_ids, own, self.cfg.margin, self.hard)
        return self.total({"i2t": hinge(image_emb, all_text), "t2i": hinge(text_emb, all_image)})

    def loss_vtm(self, batch):
        """InfoNCE between clips and sentences (section 4.2)."""
        clip_emb = self.encode(self.embed_frames, batch["frames"], batch["frames_mask"])
        text_emb = self.encode(self.embed_text, batch["text"], batch["text_mask"])
        return self.total(self.contrast(clip_emb, text_emb, batch["image_id"]))

    def loss_hashing(self, batch):
        """CSQ on the CNN alone (section 4.2)."""
        labels = batch["labels"]
        a = self.encode(self.hash_logits, batch["image"])
        central, quantization = csq_loss(a, target_centers(labels, self.centers, self.tie), labels.any(1),
                                         self.cfg.quantization)
        logs = {"central": central.detach(), "quantization": quantization.detach()}
        return {"loss": central + self.cfg.quantization * quantization, "logs": logs}

    # -- hooks of the training loop

    def after_step(self, step, total_steps, epoch_steps=None):
        """The end of the mean hinge's warm-up."""
        if hasattr(self, "hard"):
            self.hard.fill_(float(step >= self.cfg.warmup_epochs * (epoch_steps or total_steps)))

    def param_groups(self, cfg):
        """CNN and BERT at their share of the learning rate; weight decay on matrices only."""
        own = self.cfg
        scale = {"vision": own.vision_lr or (0.1 if own.backbone.startswith("resnext") else 1.0), "text": own.text_lr}
        groups = {}
        for name, p in self.named_parameters():
            lr, decay = cfg.lr * scale.get(name.split(".")[0], 1.0), 0.0 if p.ndim < 2 else cfg.weight_decay
            groups.setdefault((lr, decay), []).append(p)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def resize_grid(pos, height, width):
    """Interpolates position embeddings (1, h*h, D) bicubically to a grid of height x width."""
    if pos.shape[1] == height * width:
        return pos
    side = math.isqrt(pos.shape[1])
    grid = pos.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)                # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.to(pos.dtype)                                          # (1, H*W, D)


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


def load_vision(model, path):
    """torchvision's ResNet or ResNeXt, also WSL's -> `vision.`, whose keys are theirs. The classifier is left out."""
    where = f"--init_vision {path}"
    if not hasattr(model, "vision"):
        raise SystemExit(f"{where}: a model for {model.task} has no image tower")
    state, _ = read_foreign(path, where)
    # WSL lacks it
    required = [k for k in model.state_dict() if k.startswith("vision.") and not k.endswith("num_batches_tracked")]
    return fill(model, state, where, lambda key: ["vision." + key], required,
                reads=lambda key: not key.startswith("fc."))[1]


def load_text(model, path):
    """Hugging Face's BERT -> `text.`. Keys with or without "bert.", LayerNorms as weight, bias or as gamma, beta. Its
    pooler and heads come after the last layer and are left out."""
    cfg, where = model.cfg, f"--init_text {path}"
    if not hasattr(model, "text"):
        raise SystemExit(f"{where}: a model for {model.task} has no text tower")
    state, config = read_foreign(path, where)
    agree(where, {"hidden_act": "gelu", **config},
          {"model_type": "bert", "hidden_act": cfg.act, "num_attention_heads": cfg.heads})
    state = {re.sub(r"^bert\.", "", k).replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in state.items()}
    required = [k for k in model.state_dict() if k.startswith("text.")]
    return fill(model, state, where, lambda key: ["text." + key], required, ignored=("embeddings.position_ids",),
                reads=lambda key: key.startswith(("embeddings.", "encoder.")))[1] + told(config, cfg.heads)


def load_pretrained(model, vision=None, text=None):
    """Fills the towers from foreign weight files or folders; paths, or None -> the report, a line per tower.
    SystemExit, one line, unless every tensor of the tower is filled and every tensor that the tower would need is
    taken."""
    return "\n  ".join(load(model, path) for load, path in ((load_vision, vision), (load_text, text)) if path)


Model = Cookie


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = Config(**{k: v for k, v in PRESETS["tiny"].items() if k not in TASKS},
                 vocab_size=200, mask_id=4, cls_id=2, sep_id=3, first_word=5)
    cfg.frame_width = 240
    image, text = torch.randn(4, 3, 64, 64), torch.randint(5, 200, (4, cfg.max_text))
    batch = {"image": image, "view1": image.flip(3), "view2": image + 0.1,
             "text": text, "text_mask": torch.ones_like(text), "image_id": torch.arange(4),
             "frames": torch.randn(4, 9, 240), "frames_mask": torch.ones(4, 9, dtype=torch.long),
             "labels": torch.eye(4)}
    for task in ("ccl",) + TASKS:
        model = Cookie(cfg, task, num_labels=4).train()
        out = model(batch)
        out["loss"].backward()
        print(task, f"{sum(p.numel() for p in model.parameters()):,} parameters",
              {k: round(v.item(), 3) for k, v in out["logs"].items()})
