"""MCT: a ResNet learns from images, captions and tags at once, each modality within itself and against the other.

Yuan, Lin, Kuen, Zhang, Wang, Maire, Kale, Faieta, "Multimodal Contrastive Training for Visual Representation Learning",
CVPR 2021.

Every image and caption is seen twice, as a query and as a key; keys come from slow copies of the encoders and live on
in queues. Each encoder ends in two heads: an intra-modal one (MoCo-v2 within a modality, and supervised contrast where
images share tags) and an inter-modal one (a margin between an image's own caption and all captions in the queue,
and the reverse).

    image view 1 ---> ResNet ----+--> intra head --> q_ii --- Eq. 3 J_ii, Eq. 5 J_tag --> queue of image keys, with tags
                        : EMA    +--> inter head --> q_ic ------------- Eq. 11 J_ic ----> queue of caption keys
    image view 2 ---> ResNet_m --+--> k_ii, k_ci  = tomorrow's image queues
    caption --------> BERT ------+--> intra head --> q_cc ------------- Eq. 8 J_cc -----> queue of caption keys
                        : EMA    +--> inter head --> q_ci ------------- Eq. 14 J_ci ----> queue of image keys
    back-translation -> BERT_m --+--> k_cc, k_ic  = tomorrow's caption queues

What is wanted is the ResNet: `linear`, `detection`, `segmentation`, `retrieval_gru` and `tagging` start from it alone.

Shapes: B images, T text tokens, D width of an encoder, d of an embedding, K keys in a queue, N global batch, L tags
of a record, V tag vocabulary.

Equations
    Eq. 1, 2, 6, 7, 9, 10, 12, 13 -> Mct.queries(), Mct.keys(), Mct.project()
    Eq. 3, 8  -> info_nce(), QueueLSE         Eq. 4  -> tag_positives(), tag_sums()       Eq. 5 -> tag_nce()
    Eq. 11, 14 -> hinge(), QueueHinge         Eq. 15 -> Mct.loss_pretrain()
    Section 4.2: VSE++ loss -> vse_loss()     Section 4.3: PMI embedding -> pmi_vectors()

Deviations from the paper
     1. Eq. 6 prints c^+, Eq. 7 and 10 the same head: read as the query view and as two heads
        (the line after Eq. 10 says so).
     2. A picture is never its own negative: queue entries with its id leave every sum, in Eq. 3, 5, 8 too. The own key
        is always in P (the text; by Eq. 4 alone an image with two tags would have none). Queues start with random unit
        vectors: negatives.
     3. J_ii and J_tag are both summed, as Eq. 15 stands. A record's J holds the losses it can take part in; J is
        the mean over all records of the batch, so that a record without caption or tags adds nothing there.
     4. Keys are shuffled over processes before their batch norm, and put back (MoCo; not in the paper). One process
        splits its batch norm into `bn_groups` virtual groups and shuffles too. BN buffers of the momentum copy are its
        own running averages, not an EMA; all are averaged over processes after each step.
        The text copy runs without dropout.
     5. tau is 0.07 as printed (MoCo-v2 has 0.2). Captions are cut at 30 tokens. Key and query sides of a caption are
        the caption and its back-translation, made offline (`paraphrase`); where there is none, the caption twice.
     6. lambda_ic and lambda_ci go with K, for their losses are sums over the queue: `tiny` keeps lambda K = 3.3.
     7. Detection: torchvision's Faster R-CNN (R50-C4 of its parts: conv4 features, RoIAlign 14x14, conv5 and MoCo's
        extra norm as box head) where the paper has Detectron2. Other than there: torchvision's anchors, RoIAlign
        without the shift of half a pixel, smooth L1 with beta 1/9 (not 0) for boxes, no precise BN, images without
        objects are kept; weight decay 0 on norms as there. Segmentation: torchvision's Mask R-CNN R50-FPN, batch norm
        in FPN. Batch norm is synchronised over processes on CUDA, plain on a CPU.
     8. GRU retrieval draws one of an image's captions per pass over images (5 passes = 1 epoch of the paper), reads
        word pieces, clips gradients at 2 and takes the hardest negative of its own process' batch (VSE++).
     9. Tagging: PMI is clipped at 0, tags count as co-occurring with themselves, SVD vectors U sqrt(S) of at most V
        dimensions. The paper names neither optimizer nor length (here Adam 1e-3, 30 epochs), nor Stock-sup's loss
        (here BCE, SGD).
    10. Frozen features and evaluations see the middle square of the picture, its short side resized to `image_size`
        (MoCo: 256, then the middle 224; the paper is silent).
    11. For `tiny` alone: `block`, `layers`, `vision_width`, `stem` (3x3 with stride 2; torchvision's max pool follows
        it as it does the 7x7), `act`, `init_std` (BERT's 0.02 is for 768 channels: 128 of it make all captions one
        point, cosine 0.9999), `fpn_width`, smaller anchors and fewer RoIs; its pre-training has AdamW.

Run: python models/mct.py      (5 s: parameters and every loss of every task on a random batch)
     python models/mct.py export out/mct-pretrain/model.safetensors resnet50.pth  (the backbone for other people's code)
"""

import json
import math
import pickle
import re
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign


@dataclass
class Config:
    image_size: int = 224           # pixels a side
    block: str = "bottleneck"       # residual block: "bottleneck" (ResNet-50) or "basic"
    layers: tuple = (3, 4, 6, 3)    # blocks in the four stages
    stem: str = "imagenet"          # convolution before the max pool, "imagenet": 7x7 or "small": 3x3 (tiny)
    vision_width: int = 64          # channels of the first stage, with the small stem
    width: int = 768                # D of the text encoder
    text_layers: int = 12           # its layers
    text_heads: int = 12            # its attention heads
    mlp_ratio: int = 4              # hidden width of a feed-forward block over D
    act: str = "gelu"               # "gelu" or "relu", of the text encoder
    dropout: float = 0.1            # in the text encoder, as BERT
    init_std: float = 0.02      # standard deviation of the text encoder's initial weights, where it starts from scratch
    max_text: int = 30              # tokens of a caption, [CLS] and [SEP] included
    positions: int = 512            # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # taken from the vocabulary file
    pad_id: int = 0                 # [PAD], taken from the vocabulary file
    heads: str = "distinct"         # "distinct" intra- and inter-modal heads, or "unified": one for both (section 4.4)
    head_hidden: int = 2048         # hidden width of a head
    intra_dim: int = 128            # d of the intra-modal embeddings
    inter_dim: int = 1024           # d of the inter-modal embeddings
    queue_size: int = 32768         # K, keys kept per queue (Stock: 65536)
    momentum: float = 0.999         # m
    tau: float = 0.07               # temperature of Eq. 3, 5, 8
    margin: float = 0.2             # alpha of Eq. 11, 14
    tag_eps: int = 2                # epsilon of Eq. 4: more than so many tags in common
    lambda_ii: float = 1.0          # weight of J_ii; a loss of weight 0 is not built
    lambda_tag: float = 1.0         # weight of J_tag; 0 where the data have no tags
    lambda_cc: float = 1.0          # weight of J_cc
    lambda_ic: float = 1e-4         # weight of J_ic, a sum over the queue
    lambda_ci: float = 1e-4         # weight of J_ci, likewise
    text_lr: float = 4e-5           # peak learning rate of the text side; the image side has --lr
    bn_groups: int = 8              # virtual batch norm groups where one process trains
    tag_vocab: int = 18157          # V, the most frequent tags that count
    tag_width: int = 0              # L, most tags a record has; taken from the data
    queue_chunk: int = 8192         # keys scored at a time
    checkpointing: bool = False     # recompute text layers in backward instead of keeping their activations
    word_dim: int = 300             # retrieval_gru: word embeddings
    joint_dim: int = 1024           # retrieval_gru: d of the joint space
    tag_dim: int = 4096             # tagging: d of the PMI embeddings, at most V
    tag_hidden: int = 2048          # tagging: hidden width of the MLP
    detect_sizes: tuple = (480, 512, 544, 576, 608, 640,  # short sides: drawn; the last in evaluation
                           672, 704, 736, 768, 800)
    detect_max: int = 1333          # longest side
    anchors: tuple = (32, 64, 128, 256, 512)  # anchor sides in pixels; with FPN one per level
    fpn_width: int = 256            # segmentation: channels of the feature pyramid and of the mask head
    rois: int = 512                 # RoIs sampled per image in training
    proposals: tuple = (2000, 1000)  # RPN's boxes kept, in training and evaluation


PRESETS = {
    "base": dict(),                                                # COCO
    "stock": dict(queue_size=65536, pretrain=dict(epochs=60)),
    "tiny": dict(image_size=64, block="basic", layers=(1, 1, 1, 1), stem="small", vision_width=32, width=128,
                 text_layers=2, text_heads=4, act="relu", dropout=0.0, init_std=0.08, max_text=24,
                 head_hidden=256, intra_dim=64, inter_dim=128,
                 queue_size=128, momentum=0.99, lambda_ic=0.0256, lambda_ci=0.0256, bn_groups=2,
                 joint_dim=256, word_dim=64, tag_hidden=256,
                 detect_sizes=(128,), detect_max=128, anchors=(16, 24, 32, 48, 64), rois=16, proposals=(50, 20),
                 fpn_width=64,
                 # AdamW: in minutes, SGD does not bring a BERT of random weights off the ground
                 pretrain=dict(optimizer="adamw", batch_size=64, steps=1000, lr=1e-3, text_lr=1e-3, warmup_steps=50,
                               crop_scale=(0.4, 1.0), workers=1),
                 linear=dict(lr=3.0),                                      # 2,000 pictures are 480 steps
                 detection=dict(batch_size=4, steps=250, lr=0.01, warmup_steps=20),
                 segmentation=dict(batch_size=4, steps=250, lr=0.01, warmup_steps=20),
                 retrieval_gru=dict(epochs=6), tag_supervised=dict(batch_size=64, steps=600, lr=0.1, workers=1)),
}

# Values without a mark are the paper's section 4. [M] = MoCo's code, [D] = Detectron2's defaults, [V] = VSE++'s code,
# [-] = ours.
# Data: COCO 2017, --data captions_train2017.json,instances_train2017.json (tags: its 80 objects), or Stock with
# --preset stock (caption = title). Below, pre-training is
# `train.py --model mct --preset base --init_text bert.safetensors`, R = its directory.
# Table 1: `--task linear --init R --data imagenet`. Its rows, of the pre-training:
#   Ours                --lambda_tag 0                             Ours (scratch)    --lambda_tag 0, without --init_text
#   MoCo-v2             --lambda_tag 0 --lambda_cc 0 --lambda_ic 0 --lambda_ci 0      Ours (with tag)   (the default)
# Table 2: `--task detection --init R --data VOCdevkit`; Random Init: without --init. 1,000 epochs: --epochs 1000.
# Table 3: `--task segmentation --init R --data instances_train2017.json --eval_data instances_val2017.json`
# Table 4: `--task retrieval_gru --init R --data dataset_coco.json`. Table 6: on Stock;
#   Stock-sup: --init out/mct-tag_supervised
# Table 5: `--task tagging --init R`, beside `--task tag_supervised` (Stock-sup).
# Table 7: `eval.py R --task retrieval`; RS = its row "chance"; Inter-modal: --lambda_ii 0 --lambda_tag 0 --lambda_cc 0.
# IN-Sup of Tables 1 to 4: --init_vision resnet50.pth (torchvision's, IMAGENET1K_V1: 76.1) where --init R stands.
# Section 4.4: --heads unified|distinct with --intra_dim and --inter_dim both 128, 1024 or 1152;
#   J_ii alone is MoCo-v2 above; J_ii + J_tag: --lambda_cc 0 --lambda_ic 0 --lambda_ci 0;
#   tags from captions: --tag_words nouns.txt.
RECIPE = {
    "pretrain": dict(optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", epochs=200, batch_size=512),
    "linear": dict(optimizer="sgd", lr=30.0, weight_decay=0.0, schedule="step",
                   milestones="0.5,0.6666666,0.8333333", gamma=0.2, epochs=60, batch_size=256),
    "detection": dict(optimizer="sgd", lr=0.02, weight_decay=1e-4,                 # weight decay [D]
                      warmup_steps=100, warmup_lr=2e-5, schedule="step",           # warm-up from lr/1000 [D]
                      milestones="0.75,0.9166666", steps=24000, batch_size=16),
    "segmentation": dict(optimizer="sgd", lr=0.02, weight_decay=1e-4, warmup_steps=1000, warmup_lr=2e-5,
                         schedule="step",                                          # [D]
                         milestones="0.6666666,0.8888888", steps=180000, batch_size=16,
                         proposals=(1000, 1000),                                   # [D]
                         detect_sizes=(640, 672, 704, 736, 768, 800)),             # [M]
    "retrieval_gru": dict(optimizer="adam", lr=2e-4, schedule="step", milestones="0.5", gamma=0.1, clip=2.0,  # clip [V]
                          epochs=150, batch_size=128),                             # 30 epochs of 5 captions an image
    "tagging": dict(optimizer="adam", lr=1e-3, schedule="cosine", epochs=30, batch_size=256),                   # [-]
    "tag_supervised": dict(optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", epochs=60,
                           batch_size=512),                                                                     # [-]
}

TASKS = tuple(RECIPE)
EVALS = {"pretrain": ("retrieval", "probe"), "linear": ("linear",), "detection": ("detection",),
         "segmentation": ("segmentation",), "retrieval_gru": ("retrieval",), "tagging": ("tagging",),
         "tag_supervised": ("tagging",)}
INITS = ("vision", "text")
FEATURES = dict(features="features", features_eval="center", norm="imagenet")      # of the frozen ResNet, computed once
VIEWS = {
    "pretrain": dict(source="pairs", image="moco", image_eval="center", image_key="moco", image_key_eval=None,
                     norm="imagenet", text="any_caption", text_eval="caption", text_key="any_paraphrase",
                     text_key_eval=None, tags="any_tags", tags_eval=None),
    "linear": dict(source="classes", label="label", **FEATURES),
    "detection": dict(source="detection", image="objects", norm="none"),
    "segmentation": dict(source="detection", image="masks", image_eval="objects", norm="none"),
    "retrieval_gru": dict(source="pairs", text="caption", **FEATURES),
    "tagging": dict(source="pairs", tags="tags", tags_eval=None, **FEATURES),
    "tag_supervised": dict(source="pairs", image="flip", image_eval="center", tags="tags", tags_eval=None,
                           norm="imagenet"),
}
BACKBONE = ("vision.", "detector.backbone.conv1", "detector.backbone.bn1",
            "detector.backbone.layer", "detector.backbone.body.",
            "detector.roi_heads.box_head.layer4.")  # `--init` must fill every key that starts so
# what the detectors subtract and divide by
PIXELS = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))


def setup(cfg, task, stats):
    """Sets what follows from the data: without tags there is no J_tag."""
    cfg.tag_width = stats.get("tag_width", 0)
    if not stats.get("tags"):
        cfg.lambda_tag = 0.0


# --------------------------------------------------------------------------------------------------
# The text encoder. Keys are named as in Hugging Face's BERT.

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


# Copied from models/codis.py::BertAttention with cfg.heads->cfg.text_heads
class BertAttention(nn.Module):
    """Attention to a context of any width. keys() is apart, so that one context's keys and values can serve many
    queries."""

    def __init__(self, cfg, context_width):
        super().__init__()
        self.heads, self.p = cfg.text_heads, cfg.dropout
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


class BertPooled(Bert):
    """(B, T) ids and mask -> (B, D): BERT's pooled output, tanh of a layer on [CLS]."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.pooler = nn.Sequential()
        self.pooler.dense = nn.Linear(cfg.width, cfg.width)
        self.apply(partial(bert_init, std=cfg.init_std))

    def forward(self, text, text_mask):
        return self.pooler(super().forward(text, text_mask)[:, 0]).tanh()


def bert_init(module, std):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# The image encoder. Keys are torchvision's.

class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over `groups` virtual batches: with statistics of the whole batch a query could tell its key by them.

    Samples n, n + groups, n + 2 groups, ... form a group. Running averages take the mean over groups;
    evaluation is plain.
    """

    def __init__(self, channels, groups=1):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        g = self.groups
        if not self.training or g == 1:
            return super().forward(x)
        b, c, h, w = x.shape
        mean, var = self.running_mean.repeat(g), self.running_var.repeat(g)          # (gC,)
        y = F.batch_norm(x.reshape(b // g, g * c, h, w), mean, var, self.weight.repeat(g), self.bias.repeat(g), True,
                         self.momentum, self.eps)
        self.running_mean.copy_(mean.view(g, c).mean(0))
        self.running_var.copy_(var.view(g, c).mean(0))
        self.num_batches_tracked += 1
        return y.reshape(b, c, h, w)


def resnet(cfg, norm=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> (B, D), the average of the last layer."""
    block = {"bottleneck": torchvision.models.resnet.Bottleneck,
             "basic": torchvision.models.resnet.BasicBlock}[cfg.block]
    net = torchvision.models.ResNet(block, list(cfg.layers), norm_layer=norm)
    if cfg.stem == "small":
        w = net.inplanes = cfg.vision_width
        net.conv1, net.bn1 = nn.Conv2d(3, w, 3, 2, 1, bias=False), norm(w)
        for n, blocks in enumerate(cfg.layers):
            setattr(net, f"layer{n + 1}", net._make_layer(block, w << n, blocks, stride=1 if n == 0 else 2))
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    return net


def feature_dim(cfg):
    """D of the image encoder: 2048 for ResNet-50."""
    return (cfg.vision_width if cfg.stem == "small" else 64) * 8 * {"bottleneck": 4, "basic": 1}[cfg.block]


def mlp(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


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


# Copied from models/codis.py::ema_ with Eq. (6)->Section 3.1
@torch.no_grad()
def ema_(teacher, student, alpha):
    """Section 3.1: f_t = alpha f_t + (1 - alpha) f_s, in place, over lists of parameters."""
    torch._foreach_lerp_(teacher, student, 1 - alpha)


@torch.no_grad()
def shuffle(x):
    """(B, ...) of every process -> (B, ...) drawn from all of them, and the order (N,) that unshuffles:
    MoCo's shuffling BN."""
    everyone = gather(x)
    order = torch.randperm(len(everyone), device=x.device)
    if world() > 1:
        dist.broadcast(order, 0)
    return everyone[order.chunk(world())[rank()]], order.argsort()


@torch.no_grad()
def unshuffle(x, restore):
    """(B, ...) of every process, shuffled -> (N, ...) on every process, in the order before shuffle()."""
    return gather(x)[restore]


@torch.no_grad()
def push_(rings, ptr, rows):
    """Writes rows (N, ...) at `ptr` of rings (K, ...), two lists of tensors, around their end (of more, the last K);
    moves ptr."""
    size = len(rings[0])
    count = len(rows[0])
    slots = (ptr + count - min(count, size) + torch.arange(min(count, size), device=ptr.device)) % size
    for ring, row in zip(rings, rows):
        ring.index_copy_(0, slots, row[-size:].to(ring.dtype))
    ptr.add_(count).remainder_(size)


# --------------------------------------------------------------------------------------------------
# The paper's equations. `hidden` (B, K) bool marks queue entries that do not count: the own image, and keys that
# are not there.

def info_nce(q, k, queue, tau, hidden=None):
    """Eq. (3), (8): J = -log exp(q.k+/tau) / sum_{j=0..K} exp(q.k_j/tau), k_0 = k+. Plain form.

    q, k: (B, d) unit norm; queue: (K, d) -> (B,) float32.
    """
    s = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], 1).float() / tau     # (B, 1+K)
    if hidden is not None:
        s = s.masked_fill(F.pad(hidden, (1, 0)), -torch.inf)
    return s.logsumexp(-1) - s[:, 0]


def tag_positives(tags, queue_tags, eps):
    """Eq. (4): P = {k_p : t_p . t_j > eps}. Plain form. tags: (B, L), queue_tags: (K, L') ids padded with -1
    -> (B, K) bool."""
    same = (tags[:, None, :, None] == queue_tags[None, :, None, :]) & (tags >= 0)[:, None, :, None]
    return same.flatten(2).sum(-1) > eps


def tag_nce(q, k, queue, positives, tau, hidden=None):
    """Eq. (5): J_tag = -1/|P| sum_{p in P} log exp(q.k_p/tau) / sum_j exp(q.k_j/tau), k+ always in P. Plain form.

    q, k: (B, d) unit norm; queue: (K, d); positives: (B, K) bool -> (B,) float32.
    """
    s = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], 1).float() / tau     # (B, 1+K)
    keep = torch.ones_like(s, dtype=torch.bool) if hidden is None else ~F.pad(hidden, (1, 0))
    p = (F.pad(positives, (1, 0), value=True) & keep).to(s.dtype)
    return s.masked_fill(~keep, -torch.inf).logsumexp(-1) - (p * s).sum(-1) / p.sum(-1)


def hinge(q, k, queue, alpha, hidden=None):
    """Eq. (11), (14): J = sum_{j=1..K} [alpha - q.k+ + q.k_j]_+. Plain form. q, k: (B, d);
    queue: (K, d) -> (B,) float32."""
    x = (alpha - (q * k).sum(-1, keepdim=True) + q @ queue.T).float().clamp(min=0)    # (B, K)
    return (x if hidden is None else x.masked_fill(hidden, 0)).sum(-1)


def blocks(queue, ids, queue_ids, present, chunk):
    """The queue in pieces: keys (C, d) and `hidden` (B, C). present: (K,) bool, or None where every key is there."""
    for n, k in enumerate(queue.split(chunk)):
        part = slice(n * chunk, n * chunk + len(k))
        hidden = ids[:, None] == queue_ids[part]
        yield part, k, hidden if present is None else hidden | ~present[part]


class QueueLSE(torch.autograd.Function):
    """log sum_j exp(q.k_j/tau) over a queue, streamed: nothing of size (B, K) is kept.
    info_nce() = logaddexp(this, s_0) - s_0.

    Its gradient is the softmax mean of the keys over tau, which the forward pass sums up as attention does its values.
    q: (B, d) float32; queue: (K, d); ids: (B,), queue_ids: (K,) int64 -> (B,); -inf where no key counts.
    """

    @staticmethod
    def forward(ctx, q, queue, ids, queue_ids, present, tau, chunk):
        with torch.autocast(q.device.type, enabled=False):
            lse, mean = q.new_full((len(q),), -torch.inf), torch.zeros_like(q)
            for _, k, hidden in blocks(queue, ids, queue_ids, present, chunk):
                s = (q @ k.T / tau).masked_fill(hidden, -torch.inf)                  # (B, C)
                new = torch.logaddexp(lse, s.logsumexp(-1))
                base = new.masked_fill(new == -torch.inf, 0)                         # -inf - -inf is no number
                mean = mean * (lse - base).exp()[:, None] + (s - base[:, None]).exp() @ k
                lse = new
        ctx.save_for_backward(mean)
        ctx.tau = tau
        return lse

    @staticmethod
    def backward(ctx, grad):
        mean, = ctx.saved_tensors
        return grad[:, None] * mean / ctx.tau, None, None, None, None, None, None


class QueueHinge(torch.autograd.Function):
    """hinge() over a queue, streamed. Its gradient: the sum of the keys inside the margin (to q),
    minus their number (to pos).

    q: (B, d) float32; pos: (B,) = q.k+; queue: (K, d); ids: (B,), queue_ids: (K,) int64 -> (B,).
    """

    @staticmethod
    def forward(ctx, q, pos, queue, ids, queue_ids, present, alpha, chunk):
        with torch.autocast(q.device.type, enabled=False):
            loss, count, keys = torch.zeros_like(pos), torch.zeros_like(pos), torch.zeros_like(q)
            for _, k, hidden in blocks(queue, ids, queue_ids, present, chunk):
                x = (alpha - pos[:, None] + q @ k.T).clamp(min=0).masked_fill(hidden, 0)    # (B, C)
                active = (x > 0).to(q.dtype)
                loss, count, keys = loss + x.sum(-1), count + active.sum(-1), keys + active @ k
        ctx.save_for_backward(count, keys)
        return loss

    @staticmethod
    def backward(ctx, grad):
        count, keys = ctx.saved_tensors
        return grad[:, None] * keys, -grad * count, None, None, None, None, None, None


@torch.no_grad()
def tag_sums(queue, ids, queue_ids, tags, queue_tags, vocab, eps, chunk):
    """Eq. (4), streamed: the sum (B, d) of the queue's keys in P, and their number (B,).

    t_p . t_j of all pairs is a bag of rows of the batch's tag table: exact, and without a (K, V) matrix,
    4.8 GB for Stock.
    queue: (K, d); tags: (B, L), queue_tags: (K, L) ids below `vocab`, each at most once in a row, padded with -1.
    """
    table = queue.new_zeros(vocab + 1, len(tags))
    table[tags.T + 1, torch.arange(len(tags), device=tags.device)] = 1
    table[0] = 0                                                                     # the padding
    total, count = queue.new_zeros(len(tags), queue.shape[1]), queue.new_zeros(len(tags))
    with torch.autocast(queue.device.type, enabled=False):
        for part, k, hidden in blocks(queue, ids, queue_ids, None, chunk):
            overlap = F.embedding_bag(queue_tags[part] + 1, table, mode="sum").T      # (B, C)
            p = ((overlap > eps) & ~hidden).to(queue.dtype)
            total, count = total + p @ k, count + p.sum(-1)
    return total, count


def vse_loss(image_emb, text_emb, ids, margin):
    """VSE++: sum over pairs of [margin - s_ii + max_j s_ij]_+ both ways, j over other images. *_emb: (B, d) unit norm
    -> 0-d."""
    s = image_emb.float() @ text_emb.float().T                                       # (B, B)
    other = s.masked_fill(ids[:, None] == ids, -torch.inf)
    own = s.diagonal()
    return sum((margin - own + other.amax(d)).clamp(min=0).sum() for d in (0, 1))


@torch.no_grad()
def pmi_vectors(rows, vocab, dim):
    """Tag embeddings from co-occurrence: M = log(n_ij N / (n_i n_j)), clipped at 0, SVD U S V', unit rows of U sqrt(S).

    rows: (N, L) ids below `vocab`, each at most once in a row, padded with -1 -> (vocab, dim) float32;
    a tag nobody has: 0.
    """
    counts = torch.zeros(vocab * vocab)
    for part in rows.split(4096):
        i, j = part[:, :, None], part[:, None, :]
        at = torch.where((i >= 0) & (j >= 0), i * vocab + j, -1).flatten()
        at = at[at >= 0]
        counts.index_add_(0, at, torch.ones(len(at)))
    counts = counts.view(vocab, vocab)
    single = counts.diagonal().clamp(min=1)
    pmi = (counts * (len(rows) / single[:, None]) / single).log().clamp(min=0)       # log 0 = -inf: never together
    u, s, _ = torch.linalg.svd(pmi) if dim == vocab else torch.svd_lowrank(pmi, dim, niter=4)
    return F.normalize(u[:, :dim] * s[:dim].sqrt(), dim=-1) * (counts.diagonal() > 0)[:, None]


# --------------------------------------------------------------------------------------------------
# Detectors: torchvision's, around our ResNet

class C4Head(nn.Module):
    """conv5 as the box head of R50-C4, with MoCo's extra norm: (R, 1024, 14, 14) -> (R, 2048)."""

    def __init__(self, layer4, width):
        super().__init__()
        self.layer4, self.norm = layer4, nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.layer4(x)).mean((2, 3))


def c4_detector(cfg, classes, common):
    """Faster R-CNN on conv4 features of stride 16."""
    net, width = resnet(cfg), feature_dim(cfg)
    body = IntermediateLayerGetter(net, {"layer3": "0"})
    body.out_channels = width // 2
    anchors = AnchorGenerator((tuple(cfg.anchors),), ((0.5, 1.0, 2.0),))
    return FasterRCNN(body, rpn_anchor_generator=anchors, rpn_head=RPNHead(width // 2, 3 * len(cfg.anchors)),
                      box_roi_pool=MultiScaleRoIAlign(["0"], 14, 0), box_head=C4Head(net.layer4, width),
                      box_predictor=FastRCNNPredictor(width, classes + 1), **common)


def fpn_detector(cfg, classes, common):
    """Mask R-CNN on a feature pyramid. With fpn_width 256 its heads are torchvision's."""
    net, width, c = resnet(cfg), feature_dim(cfg), cfg.fpn_width
    body = BackboneWithFPN(net, {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}, [width >> n for n in (3, 2, 1, 0)], c,
                           norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(tuple((a,) for a in cfg.anchors), ((0.5, 1.0, 2.0),) * len(cfg.anchors))
    return MaskRCNN(body, rpn_anchor_generator=anchors, box_head=TwoMLPHead(49 * c, 4 * c),
                    box_predictor=FastRCNNPredictor(4 * c, classes + 1), mask_head=MaskRCNNHeads(c, (c,) * 4, 1),
                    mask_predictor=MaskRCNNPredictor(c, c, classes + 1), **common)


# --------------------------------------------------------------------------------------------------
# The model

class Mct(nn.Module):
    """All tasks of the paper. num_labels: classes of linear, detection and segmentation, tags of the others."""

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        self.cfg, self.task, self.students, self.frozen, self.remarks = cfg, task, [], False, []
        width = feature_dim(cfg)
        if task in ("detection", "segmentation"):
            self.build_detector(num_labels)
        elif task == "pretrain":
            self.build_pretrain(width, num_labels)
        else:
            self.vision = resnet(cfg)
            self.frozen = task != "tag_supervised"
            self.vision.requires_grad_(not self.frozen)
        if task in ("linear", "tag_supervised"):
            self.fc = nn.Linear(width, num_labels)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        if task == "retrieval_gru":
            self.image_fc = nn.Linear(width, cfg.joint_dim)
            self.words = nn.Embedding(cfg.vocab_size, cfg.word_dim, padding_idx=cfg.pad_id)
            self.gru = nn.GRU(cfg.word_dim, cfg.joint_dim, batch_first=True)
            nn.init.xavier_uniform_(self.image_fc.weight)
            nn.init.uniform_(self.words.weight, -0.1, 0.1)
        if task == "tagging":
            dim = min(cfg.tag_dim, num_labels)
            self.tag_mlp = mlp(width, cfg.tag_hidden, dim)
            self.register_buffer("tag_vectors", torch.zeros(num_labels, dim))
        self.withhold()

    def build_pretrain(self, width, num_tags):
        cfg = self.cfg
        cross = cfg.lambda_ic > 0 or cfg.lambda_ci > 0
        self.tagged = cfg.lambda_tag > 0 and num_tags > 0
        self.spaces = {"vision": ["intra"] * (cfg.lambda_ii > 0 or self.tagged) + ["inter"] * cross,
                       "text": ["intra"] * (cfg.lambda_cc > 0) + ["inter"] * cross}
        if not self.spaces["vision"]:
            raise SystemExit("models/mct.py: lambda_ii, _tag, _ic and _ci are all 0: nothing trains the image encoder")
        if cfg.heads not in ("distinct", "unified"):
            raise SystemExit(f"models/mct.py: --heads {cfg.heads}: distinct or unified")
        if cfg.heads == "unified" and cfg.intra_dim != cfg.inter_dim:
            raise SystemExit(f"models/mct.py: --heads unified: --intra_dim ({cfg.intra_dim}) "
                             f"and --inter_dim ({cfg.inter_dim}) differ")
        groups = cfg.bn_groups if world() == 1 else 1
        self.vision = resnet(cfg, partial(SplitBatchNorm, groups=groups))
        self.vision_heads = self.make_heads(width, self.spaces["vision"])
        self.students = ["vision", "vision_heads"]
        if self.spaces["text"]:
            self.text = BertPooled(cfg)
            self.text_heads = self.make_heads(cfg.width, self.spaces["text"])
            self.students += ["text", "text_heads"]
        for name in self.students:  # the momentum copies
            self.add_module(name + "_m", deepcopy(getattr(self, name)).requires_grad_(False))
        for side, spaces in self.spaces.items():
            for space in spaces:
                dim = getattr(cfg, f"{space}_dim")
                self.register_buffer(f"queue_{side}_{space}", F.normalize(torch.randn(cfg.queue_size, dim), dim=-1))
        self.register_buffer("queue_ids", torch.full((cfg.queue_size,), -1))
        self.register_buffer("queue_captioned", torch.ones(cfg.queue_size, dtype=torch.bool))
        if self.tagged:
            self.num_tags = num_tags
            self.register_buffer("queue_tags", torch.full((cfg.queue_size, max(1, cfg.tag_width)), -1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.remarks.append(f"batch norm: {groups} virtual groups in this one process" if world() == 1 else
                            "batch norm: per process, keys shuffled over processes")
        self.remarks += [] if self.tagged else ["no J_tag: lambda_tag is 0, or the data have no tags"]

    def make_heads(self, width, spaces):
        cfg = self.cfg
        dims = ({"both": cfg.inter_dim} if cfg.heads == "unified"
                else {space: getattr(cfg, f"{space}_dim") for space in spaces})
        return nn.ModuleDict({name: mlp(width, cfg.head_hidden, dim) for name, dim in dims.items()})

    def build_detector(self, classes):
        cfg = self.cfg
        common = dict(min_size=tuple(cfg.detect_sizes), max_size=cfg.detect_max, box_batch_size_per_image=cfg.rois,
                      rpn_pre_nms_top_n_train=12000 if self.task == "detection" else 2000,  # Detectron2's C4 and FPN
                      rpn_pre_nms_top_n_test=6000 if self.task == "detection" else 1000,
                      rpn_post_nms_top_n_train=cfg.proposals[0], rpn_post_nms_top_n_test=cfg.proposals[1], **PIXELS)
        self.detector = (c4_detector if self.task == "detection" else fpn_detector)(cfg, classes, common)
        if world() > 1 and dist.get_backend() == "nccl":
            self.detector = nn.SyncBatchNorm.convert_sync_batchnorm(self.detector)
            self.remarks.append(f"batch norm: synchronised over {world()} processes")
        else:
            self.remarks.append("batch norm: plain, per process (SyncBatchNorm is for several CUDA processes)")

    def withhold(self):
        """Methods that this task did not build are None, which is how an evaluation knows."""
        task = self.task
        kept = {"encode_image": task == "retrieval_gru" or (task == "pretrain" and "inter" in self.spaces["text"]),
                "visual_features": task not in ("detection", "segmentation"), "predict": task == "linear",
                "tag_scores": task in ("tagging", "tag_supervised"), "detect": task in ("detection", "segmentation")}
        kept["encode_text"] = kept["encode_image"]
        for name in [n for n, k in kept.items() if not k]:
            setattr(self, name, None)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.vision.eval()
        if "text" in self.students:
            self.text_m.eval()  # no dropout in the copy; vision_m stays: its batch norm uses the batch, as MoCo's
        return self

    # -- encoders

    def visual_features(self, batch):
        """(B, D): the ResNet's average pool of `image`, or the stored `features`."""
        return batch["features"] if "features" in batch else self.vision(batch["image"])

    def project(self, side, features, m=""):
        """Pooled features (B, D) of side "vision" or "text" -> {"intra", "inter": (B, d) unit norm}.
        m="_m": by the copy's heads."""
        out = {name: F.normalize(head(features).float(), dim=-1)
               for name, head in getattr(self, f"{side}_heads{m}").items()}
        return {space: out.get(space, out.get("both")) for space in self.spaces[side]}

    def encode_image(self, batch):
        """-> (B, d) unit norm."""
        features = self.visual_features(batch)
        if self.task == "retrieval_gru":
            return F.normalize(self.image_fc(features).float(), dim=-1)
        return self.project("vision", features)["inter"]

    def encode_text(self, batch):
        """-> (B, d) unit norm."""
        text, mask = batch["text"], batch["text_mask"]
        if self.task == "retrieval_gru":
            states = self.gru(self.words(text))[0]                                       # (B, T, d)
            last = (mask.sum(-1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[-1])
            return F.normalize(states.gather(1, last)[:, 0].float(), dim=-1)             # after the last real token
        return self.project("text", self.text(text, mask))["inter"]

    def predict(self, batch):
        """(B, C) logits."""
        return self.fc(self.visual_features(batch))

    def tag_scores(self, batch):
        """(B, V), higher = likelier: cosine with the tags' PMI vectors, or the logits of the supervised tagger."""
        features = self.visual_features(batch)
        if self.task == "tag_supervised":
            return self.fc(features)
        return F.normalize(self.tag_mlp(features).float(), dim=-1) @ self.tag_vectors.T

    def detect(self, batch):
        """A list of B dicts: boxes (n, 4) xyxy in pixels of `image`, labels (n,) from 0,
        scores (n,) [, masks (n, H, W) bool]."""
        found = self.detector(batch["image"])
        return [{**d, "labels": d["labels"] - 1, **({"masks": d["masks"][:, 0] >= 0.5} if "masks" in d else {})}
                for d in found]

    # -- losses

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def queries(self, batch):
        """Eq. (1), (9): q_ii = f_iq(I'; theta_q, phi_iq), and q_ic with the head phi_cq.
        Eq. (6), (12): q_cc = f_cq(c'; Theta_q, Phi_cq), and q_ci with Phi_iq. -> {side: {space: (B, d)}}.
        """
        q = {"vision": self.project("vision", self.vision(batch["image"]))}
        if self.spaces["text"]:
            q["text"] = self.project("text", self.text(batch["text"], batch["text_mask"]))
        return q

    @torch.no_grad()
    def keys(self, batch):
        """Eq. (2), (13): k_ii = f_ik(I*; theta_k, phi_ik), and k_ci with the head phi_ck.
        Eq. (7), (10): k_cc = f_ck(c*; Theta_k, Phi_ck), and k_ic with Phi_ik. -> those of all processes,
        {side: {space: (N, d)}}.
        """
        image, restore = shuffle(batch["image_key"])
        z = self.project("vision", self.vision_m(image), "_m")
        k = {"vision": {space: unshuffle(x, restore) for space, x in z.items()}}
        if self.spaces["text"]:
            z = self.project("text", self.text_m(batch["text_key"], batch["text_key_mask"]), "_m")
            k["text"] = {space: gather(x) for space, x in z.items()}
        return k

    def nce(self, q, k, side, ids):
        """Eq. (3), (8): log-sum-exp (B,) over own key and queue, and the own key's score (B,);
        the loss is their difference."""
        cfg = self.cfg
        present = self.queue_captioned if side == "text" else None
        own = (q * k).sum(-1) / cfg.tau
        lse = QueueLSE.apply(q, getattr(self, f"queue_{side}_intra"), ids, self.queue_ids, present,
                             cfg.tau, cfg.queue_chunk)
        return torch.logaddexp(lse, own), own

    def cross(self, q, k, side, ids):
        """Eq. (11), (14) over the queue of the other modality's keys -> (B,)."""
        cfg = self.cfg
        present = self.queue_captioned if side == "text" else None
        queue = getattr(self, f"queue_{side}_inter")
        return QueueHinge.apply(q, (q * k).sum(-1), queue, ids, self.queue_ids, present, cfg.margin, cfg.queue_chunk)

    def loss_pretrain(self, batch):
        """Eq. (15): J = lambda_ii J_ii + lambda_tag J_tag + lambda_cc J_cc + lambda_ic J_ic + lambda_ci J_ci."""
        cfg, ids = self.cfg, batch["image_id"]
        b = len(ids)
        if self.training and world() == 1 and (b % cfg.bn_groups or b == cfg.bn_groups):
            raise SystemExit(f"models/mct.py: a batch of {b} is not {cfg.bn_groups} virtual groups of 2 or more: "
                             "set --bn_groups")
        captioned = batch.get("text_valid", torch.ones_like(ids)).bool()
        q, all_keys = self.queries(batch), self.keys(batch)
        k = {side: {space: z[rank() * b:rank() * b + b] for space, z in keys.items()}
             for side, keys in all_keys.items()}
        rows, logs = {}, {}                                                 # losses (B,), 0 where a record has no part
        if "intra" in self.spaces["vision"]:
            lse, own = self.nce(q["vision"]["intra"], k["vision"]["intra"], "vision", ids)
            rows["ii"] = lse - own                                                    # Eq. 3
            if self.tagged:                                                           # Eq. 4, 5
                tags = batch["tags"]
                total, count = tag_sums(self.queue_vision_intra, ids, self.queue_ids, tags,
                                        self.queue_tags, self.num_tags, cfg.tag_eps, cfg.queue_chunk)
                mean = (own + (q["vision"]["intra"] * total).sum(-1) / cfg.tau) / (1 + count)
                rows["tag"] = (lse - mean) * (tags >= 0).any(-1)
                logs["positives"] = 1 + count.mean()
        if "intra" in self.spaces["text"]:
            lse, own = self.nce(q["text"]["intra"], k["text"]["intra"], "text", ids)
            rows["cc"] = (lse - own) * captioned                                      # Eq. 8
        if "inter" in self.spaces["text"]:
            rows["ic"] = self.cross(q["vision"]["inter"], k["text"]["inter"], "text", ids) * captioned      # Eq. 11
            rows["ci"] = self.cross(q["text"]["inter"], k["vision"]["inter"], "vision", ids) * captioned    # Eq. 14
        losses = {name: row.mean() for name, row in rows.items()}
        if "text_key_is_copy" in batch:
            logs["paraphrased"] = ((1 - batch["text_key_is_copy"].float()) * captioned).mean()
        facts = [ids[:, None], captioned[:, None]] + ([batch["tags"]] if self.tagged else [])
        return {"loss": sum(getattr(cfg, f"lambda_{name}") * loss for name, loss in losses.items()),
                "logs": {name: loss.detach() for name, loss in losses.items()} | logs,
                "keys": all_keys, "facts": gather(torch.cat(facts, 1))}

    def loss_linear(self, batch):
        return self.plain(F.cross_entropy(self.predict(batch).float(), batch["label"]), "cross_entropy")

    def loss_retrieval_gru(self, batch):
        loss = vse_loss(self.encode_image(batch), self.encode_text(batch), batch["image_id"], self.cfg.margin)
        return self.plain(loss, "vse")

    def loss_tagging(self, batch):
        """1 - cosine with the unit mean of the image's tag vectors, mean over the images that have tags."""
        tags = batch["tags"]
        known = (tags >= 0).float()
        target = F.normalize((self.tag_vectors[tags.clamp(min=0)] * known[..., None]).sum(1), dim=-1)   # (B, d)
        has = known.amax(-1)
        loss = 1 - (F.normalize(self.tag_mlp(self.visual_features(batch)).float(), dim=-1) * target).sum(-1)
        return self.plain((loss * has).sum() / has.sum().clamp(min=1), "cosine")

    def loss_tag_supervised(self, batch):
        tags, logits = batch["tags"], self.tag_scores(batch).float()
        truth = logits.new_zeros(len(tags), logits.shape[1] + 1).scatter_(1, tags + 1, 1.0)[:, 1:]      # (B, V)
        return self.plain(F.binary_cross_entropy_with_logits(logits, truth), "bce")

    def loss_detection(self, batch):
        """torchvision's losses. image: list of (3, H, W) in 0..1; boxes: list of (n, 4) xyxy;
        labels: list of (n,) [; masks]."""
        names = [n for n in ("boxes", "labels", "masks") if n in batch]
        # class 0: background
        targets = [{n: batch[n][i] + (n == "labels") for n in names} for i in range(len(batch["image"]))]
        losses = self.detector(batch["image"], targets)
        return {"loss": sum(losses.values()), "logs": {k.removeprefix("loss_"): v.detach() for k, v in losses.items()}}

    loss_segmentation = loss_detection

    @staticmethod
    def plain(loss, name):
        return {"loss": loss, "logs": {name: loss.detach()}}

    # -- hooks of the training loop

    def prepare(self, samples):
        """Before the first step. Tagging: the tags' vectors, from the training records' co-occurrences."""
        if self.task == "tagging":
            self.tag_vectors.copy_(pmi_vectors(samples.tag_rows(), *self.tag_vectors.shape))
            if world() > 1:
                dist.broadcast(self.tag_vectors, 0)  # a vector's sign is the library's whim

    def after_backward(self, out):
        """Enqueues the keys of all processes, with their image ids, tags and whether there was a caption."""
        if "keys" in out:
            facts = out["facts"]
            rings, rows = [self.queue_ids, self.queue_captioned], [facts[:, 0], facts[:, 1].bool()]
            if self.tagged:
                rings, rows = rings + [self.queue_tags], rows + [facts[:, 2:]]
            for side, keys in out["keys"].items():
                rings, rows = (rings + [getattr(self, f"queue_{side}_{space}") for space in keys],
                               rows + list(keys.values()))
            push_(rings, self.ptr, rows)

    @torch.no_grad()
    def after_step(self, step, total_steps, epoch_steps=None):
        """theta_k <- m theta_k + (1 - m) theta_q, and the running averages of batch norm made equal on all processes.
        """
        if self.students:
            ema_([p for n in self.students for p in getattr(self, n + "_m").parameters()],
                 [p for n in self.students for p in getattr(self, n).parameters()], self.cfg.momentum)
        if world() > 1 and not self.frozen:
            stats = [b for n, b in self.named_buffers() if n.endswith(("running_mean", "running_var"))]
            flat = torch.cat([b.flatten() for b in stats])
            dist.all_reduce(flat)
            for b, mean in zip(stats, (flat / world()).split([b.numel() for b in stats])):
                b.copy_(mean.view_as(b))

    def param_groups(self, cfg):
        """The image side at --lr, BERT at text_lr, weight decay on everything (MoCo); in detectors none on norms."""
        norms = {p for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
        norms = norms if self.task in ("detection", "segmentation") else set()
        image, text, plain = [], [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                (text if name.startswith("text") else plain if p in norms else image).append(p)
        return [{"params": image, "lr": cfg.lr, "weight_decay": cfg.weight_decay},
                {"params": text, "lr": self.cfg.text_lr, "weight_decay": cfg.weight_decay},
                {"params": plain, "lr": cfg.lr, "weight_decay": 0.0}]

    def adapt(self, state):
        """The weights of another task of this file in this model's names: a detector takes the ResNet apart."""
        if self.task not in ("detection", "segmentation") or any(k.startswith("detector.") for k in state):
            return state
        def rename(name):
            if self.task == "segmentation":
                return "detector.backbone.body." + name
            return ("detector.roi_heads.box_head." if name.startswith("layer4.") else "detector.backbone.") + name
        return {rename(k.removeprefix("vision.")) if k.startswith("vision.") else k: v for k, v in state.items()}


# --------------------------------------------------------------------------------------------------
# Weights from and for elsewhere

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
    """torchvision's ResNet -> `vision.`, or the places that a detector has for its parts.
    Its classifier is left out."""
    where = f"--init_vision {path}"
    state, _ = read_foreign(path, where)
    required = [name for name in model.state_dict() if name.startswith(BACKBONE)
                and not name.endswith("num_batches_tracked")]
    return fill(model, state, where, lambda key: list(model.adapt({"vision." + key: None})), required,
                reads=lambda key: not key.startswith("fc."))[1]


def load_text(model, path):
    """Hugging Face's BERT -> `text.`, pooler included. Keys with or without "bert.", LayerNorms as weight, bias or as
    gamma, beta."""
    cfg, where = model.cfg, f"--init_text {path}"
    if not hasattr(model, "text"):
        raise SystemExit(f"{where}: task {model.task} trains no BERT")
    state, config = read_foreign(path, where)
    agree(where, {"hidden_act": "gelu", **config},
          {"model_type": "bert", "hidden_act": cfg.act, "num_attention_heads": cfg.text_heads})
    state = {re.sub(r"^bert\.", "", k).replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in state.items()}
    required = [name for name in model.state_dict() if name.startswith("text.")]
    return (fill(model, state, where, lambda key: ["text." + key], required, ignored=("embeddings.position_ids",),
                 reads=lambda key: key.startswith(("embeddings.", "encoder.", "pooler.")))[1]
            + told(config, cfg.text_heads))


def load_pretrained(model, vision=None, text=None):
    """Fills the towers from foreign weight files; paths, or None -> the report, a line per file.
    A momentum copy follows its tower."""
    lines = [load(model, path) for load, path in ((load_vision, vision), (load_text, text)) if path]
    for name in model.students:
        getattr(model, name + "_m").load_state_dict(getattr(model, name).state_dict())
    return "\n  ".join(lines)


def export_backbone(source, target):
    """Writes the ResNet of a run's model.safetensors as a torchvision state dict,
    which lacks fc.weight and fc.bias alone."""
    state = {k.removeprefix("vision."): v for k, v in load_file(source).items() if k.startswith("vision.")}
    if not state:
        raise SystemExit(f"{source}: no weights named vision.* (a detector's ResNet is part of the detector)")
    torch.save(state, target)
    print(f"{target}: {len(state)} tensors")


Model = Mct


def demo_batch(cfg, task, b=4):
    """A random batch of what VIEWS[task] asks for."""
    text, mask = torch.randint(5, cfg.vocab_size, (b, cfg.max_text)), torch.ones(b, cfg.max_text, dtype=torch.long)
    batch = {"image_id": torch.arange(b), "tags": torch.stack([torch.randperm(20)[:6] for _ in range(b)]),
             "label": torch.arange(b) % 3, "text": text, "text_mask": mask}
    if task in ("detection", "segmentation"):
        boxes = torch.tensor([[8.0, 8.0, 40.0, 30.0], [20.0, 24.0, 50.0, 60.0]])
        masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
        masks[0, 8:30, 8:40] = masks[1, 24:60, 20:50] = 1
        batch = {"image": list(torch.rand(b, 3, 64, 80)), "boxes": [boxes] * b, "labels": [torch.tensor([0, 2])] * b}
        return batch | ({"masks": [masks] * b} if task == "segmentation" else {})
    if "features" in VIEWS[task]:
        return batch | {"features": torch.rand(b, feature_dim(cfg))}
    pixels = {k: torch.randn(b, 3, cfg.image_size, cfg.image_size) for k in ("image", "image_key")}
    return batch | pixels | {"text_key": text.flip(1), "text_key_mask": mask,
                             "text_valid": torch.ones(b, dtype=torch.long)}


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "export":
        export_backbone(*sys.argv[2:])
        sys.exit()
    torch.manual_seed(0)
    cfg = Config(**{k: v for k, v in PRESETS["tiny"].items() if k not in TASKS}, vocab_size=200, tag_width=6)
    for task in TASKS:
        model = Mct(cfg, task, num_labels=20).train()
        out = model(demo_batch(cfg, task))
        out["loss"].backward()
        logs = {k: round(v.item(), 3) for k, v in out["logs"].items()}
        print(f"{task:<15}{sum(p.numel() for p in model.parameters()):>10,} parameters ", logs)
