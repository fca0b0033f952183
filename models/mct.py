"""MCT: a ResNet learns from images, captions and tags at once, within each modality and across.

Yuan, Lin, Kuen, Zhang, Wang, Maire, Kale, Faieta, "Multimodal Contrastive Training for Visual
Representation Learning", CVPR 2021.

Every image and every caption is seen twice, as a query and as a key. Keys come from slow copies of
the encoders (momentum encoders) and stay in queues as negatives for later batches. Each encoder
ends in two heads. The intra-modal head compares images with images and captions with captions:
MoCo-v2 within a modality, and supervised contrast where images share tags. The inter-modal head
pulls an image to its own caption, by a margin over all captions in the queue, and the reverse.

    image view 1 ---> ResNet ----+--> intra head --> q_ii --- Eq. 3 J_ii, Eq. 5 J_tag, image keys
                        : EMA    +--> inter head --> q_ic --- Eq. 11 J_ic, caption keys
    image view 2 ---> ResNet_m --+--> k_ii, k_ci, then into the queues of image keys
    caption --------> BERT ------+--> intra head --> q_cc --- Eq. 8 J_cc, caption keys
                        : EMA    +--> inter head --> q_ci --- Eq. 14 J_ci, image keys
    back-translation -> BERT_m --+--> k_cc, k_ic, then into the queues of caption keys

The paper is after the ResNet: `linear`, `detection`, `segmentation`, `retrieval_gru` and `tagging`
start from it alone.

Shapes: B images, T text tokens, D width of an encoder, d of an embedding, K keys in a queue,
N global batch, L tags of a record, V tag vocabulary, C keys of a queue that are scored at a time.

Equations
    Eq. 1, 6, 9, 12 -> Mct.queries()          Eq. 2, 7, 10, 13 -> Mct.keys()
    Eq. 3, 8  -> info_nce(), QueueLSE         Eq. 4  -> tag_positives()     Eq. 5 -> tag_nce()
    Eq. 11, 14 -> hinge(), QueueHinge         Eq. 15 -> Mct.loss_pretrain()
    Section 4.2: VSE++ loss -> vse_loss()     Section 4.3: PMI embedding -> pmi_vectors()

Deviations from the paper
     1. Eq. 6 prints c^+, Eq. 7 and 10 the same head: read as the query view and as two heads
        (the line after Eq. 10 says so).
     2. A picture is never its own negative: queue entries with its id leave every sum, those of
        Eq. 3, 5 and 8 too. The own key is always in P (as in the text; by Eq. 4 alone an image with
        two tags would have no positive). Queues start with random unit vectors, which count as
        negatives.
     3. J_ii and J_tag are both summed, as Eq. 15 stands. A record takes part in the losses that it
        has the data for; J is the mean over all records of the batch, so that a record without
        caption or tags adds 0 there.
     4. Keys are shuffled over processes before their batch norm, and put back (MoCo; not in the
        paper). A single process splits its batch norm into `bn_groups` virtual groups and shuffles
        too. Batch norm buffers of the momentum copy are its own running averages, not an EMA; all
        are averaged over processes after each step. The text copy runs without dropout.
     5. tau is 0.07 as printed (MoCo-v2 has 0.2). Captions are cut at 30 tokens. Query and key of a
        caption are the caption and one of its back-translations, drawn anew each time. They are
        made offline (`paraphrase` of a record, or `--paraphrase FILE`), while the paper translates
        both views during training. A caption without any is used twice as it is.
     6. lambda_ic and lambda_ci depend on K, as their losses are sums over the queue: `tiny` keeps
        lambda K = 3.3.
     7. Detection: torchvision's Faster R-CNN (R50-C4 of its parts: conv4 features, RoIAlign 14x14,
        conv5 and MoCo's extra norm as box head) where the paper has Detectron2. Segmentation:
        torchvision's Mask R-CNN R50-FPN, batch norm in FPN. As in Detectron2: numbers of anchors,
        proposals and RoIs, thresholds, RoIAlign with as many samples as a box needs, first weights
        of the heads, weight decay 0 on norms. Other than there: RoIAlign without the shift of half
        a pixel; smooth L1 with beta 1/9 (not 0) for boxes; RPN losses are means over the anchors
        drawn (not over 256 a picture); mask targets are interpolated (not cut at 0.5); pictures are
        resized by torch (not PIL) and padded to multiples of 32 for C4 too; no precise BN; images
        without objects are kept. Autocast is for the backbone alone: boxes need float32. Batch norm
        is synchronised over processes on CUDA, plain on a CPU.
     8. GRU retrieval reads word pieces, clips gradients at 2 and takes the hardest negative of its
        own process' batch (VSE++). Its epochs go over captions, as VSE++'s. Those of pre-training
        go over images and draw one of the captions [?]: the paper says neither, and compares its
        200 epochs with MoCo's.
     9. Tagging: PMI is clipped at 0, tags count as co-occurring with themselves, SVD vectors
        U sqrt(S) have at most V dimensions. The paper names neither optimizer nor length (here Adam
        1e-3, 30 epochs), nor the loss of Stock-sup (here binary cross-entropy summed over the tags,
        SGD; at first each tag has odds 1 to V).
    10. Frozen features and evaluations see the middle square of the picture, its short side resized
        to `image_size` (MoCo: 256, then the middle 224; the paper does not say). All crops are
        resized bicubically, MoCo's bilinearly.
    11. For `tiny` alone: `block`, `layers`, `vision_width`, `stem` (3x3 with stride 2, then
        torchvision's max pool as after the 7x7), `act`, `init_std` (BERT's 0.02 is for 768
        channels: with 128 channels it maps all captions to one point, cosine 0.9999), `fpn_width`,
        smaller anchors and fewer RoIs; its pre-training uses AdamW.

Run: python models/mct.py      (5 s: parameters and every loss of every task on a random batch)
"""

import math
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

# what a number of Config may be: its type, this in words, and as a test
Size = Annotated[int, "from 1 to 10**6", lambda n: 1 <= n <= 10**6]
Few = Annotated[int, "from 1 to 1000", lambda n: 1 <= n <= 1000]
FewOrNone = Annotated[int, "from 0 to 1000", lambda n: 0 <= n <= 1000]
Tokens = Annotated[int, "from 3 to 10**4", lambda n: 3 <= n <= 10**4]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rate = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
Amount = Annotated[float, "0 or more", lambda x: 0 <= x < math.inf]
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]


@dataclass
class Config:
    image_size: Size = 224          # pixels a side
    block: Literal["bottleneck", "basic"] = "bottleneck"    # residual block, as in ResNet-50
    layers: tuple[Few, ...] = (3, 4, 6, 3)                  # blocks in the four stages
    stem: Literal["imagenet", "small"] = "imagenet"         # first convolution: 7x7, or 3x3
    vision_width: Size = 64         # channels of the first stage, with the small stem
    width: Size = 768               # D of the text encoder
    text_layers: Few = 12           # its layers
    text_heads: Few = 12            # its attention heads
    mlp_ratio: Few = 4              # hidden width of a feed-forward block over D
    act: Literal["gelu", "relu"] = "gelu"                   # activation of the text encoder
    dropout: Rate = 0.1             # in the text encoder, as BERT
    init_std: Positive = 0.02       # standard deviation of the text encoder's initial weights
    max_text: Tokens = 30           # tokens of a caption, [CLS] and [SEP] included
    positions: Tokens = 512         # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # [data] words in the vocabulary file
    pad_id: int = 0                 # [data] [PAD] in the vocabulary file
    heads: Literal["distinct", "unified"] = "distinct"      # one head a space, or one for both
    head_hidden: Size = 2048        # hidden width of a head
    intra_dim: Size = 128           # d of the intra-modal embeddings
    inter_dim: Size = 1024          # d of the inter-modal embeddings
    queue_size: Size = 32768        # K, keys kept per queue (Stock: 65536)
    momentum: Share = 0.999         # m, how slowly the key encoders follow
    tau: Positive = 0.07            # temperature of Eq. 3, 5, 8
    margin: Amount = 0.2            # alpha of Eq. 11, 14
    tag_eps: FewOrNone = 2          # epsilon of Eq. 4: positives share more tags than this
    lambda_ii: Amount = 1.0         # weight of J_ii; a loss of weight 0 is not built
    lambda_tag: Amount = 1.0        # weight of J_tag; 0 where the data have no tags
    lambda_cc: Amount = 1.0         # weight of J_cc
    lambda_ic: Amount = 1e-4        # weight of J_ic, a sum over the queue
    lambda_ci: Amount = 1e-4        # weight of J_ci, a sum over the queue
    text_lr: Amount = 4e-5          # peak learning rate of the text side; the image side has --lr
    bn_groups: Few = 8              # virtual batch norm groups where one process trains
    tag_vocab: Size = 18157         # V, the most frequent tags that count
    tag_width: int = 0              # [data] L, most tags of a record
    queue_chunk: Size = 8192        # keys scored at a time
    checkpointing: bool = False     # recompute text layers in backward, to save memory
    word_dim: Size = 300            # retrieval_gru: word embeddings
    joint_dim: Size = 1024          # retrieval_gru: d of the joint space
    tag_dim: Size = 4096            # tagging: d of the PMI embeddings, at most V
    tag_hidden: Size = 2048         # tagging: hidden width of the MLP
    detect_sizes: tuple[Size, ...] = (480, 512, 544, 576, 608,  # short sides, last: evaluation's
                                      640, 672, 704, 736, 768, 800)
    detect_max: Size = 1333         # longest side
    anchors: tuple[Size, ...] = (32, 64, 128, 256, 512)     # sides, in pixels; FPN: one a level
    fpn_width: Size = 256           # segmentation: channels of the feature pyramid and mask head
    rois: Size = 512                # RoIs sampled per image in training
    proposals: tuple[Size, Size] = (2000, 1000)     # RPN's boxes, in training and evaluation

    def check(self, task):
        """SystemExit, one line, for a value that its type or another value forbids."""
        check_fields(self)

        # sizes that go together
        for name, number in (("layers", 4), ("proposals", 2)):
            if len(getattr(self, name)) != number:
                raise SystemExit(f"--{name} {getattr(self, name)}: {number} numbers")
        if self.width % self.text_heads:
            raise SystemExit(f"--text_heads {self.text_heads}: does not divide "
                             f"--width {self.width}")
        if self.max_text > self.positions:
            raise SystemExit(f"--max_text {self.max_text}: more than --positions {self.positions}")

        # heads of both spaces in one, and the levels of the detector's pyramid
        if self.heads == "unified" and self.intra_dim != self.inter_dim:
            raise SystemExit(f"--heads unified: --intra_dim {self.intra_dim} and --inter_dim "
                             f"{self.inter_dim} differ")
        if task == "segmentation" and len(self.anchors) != 5:
            raise SystemExit(f"--anchors: {len(self.anchors)} sides, one for each of the pyramid's "
                             "five levels are wanted")


PRESETS = {
    "base": dict(),                                                             # COCO
    "stock": dict(queue_size=65536, pretrain=dict(epochs=60)),
    "tiny": dict(
        # the image encoder, the text encoder, heads and queues, the downstream heads, the detectors
        image_size=64, block="basic", layers=(1, 1, 1, 1), stem="small", vision_width=32,
        width=128, text_layers=2, text_heads=4, act="relu", dropout=0.0, init_std=0.08, max_text=24,
        head_hidden=256, intra_dim=64, inter_dim=128, queue_size=128, momentum=0.99,
        lambda_ic=0.0256, lambda_ci=0.0256, bn_groups=2,
        joint_dim=256, word_dim=64, tag_hidden=256,
        detect_sizes=(128,), detect_max=128, anchors=(16, 24, 32, 48, 64), rois=16,
        proposals=(50, 20), fpn_width=64,

        # AdamW: within minutes SGD does not train a BERT from random weights. Mild crops: after
        # 400 steps, one seed, mean recall on val is 36 (crops from 0.4: 31). The changes of colour
        # stay: a probe of objects' shapes on layer 3 has 88 % at either crop, 84 without them, and
        # 83 on random weights
        pretrain=dict(optimizer="adamw", batch_size=64, steps=1000, lr=1e-3, text_lr=1e-3,
                      warmup_steps=50, crop_scale=(0.8, 1.0), workers=1),
        linear=dict(lr=3.0),                                        # 2,000 pictures are 480 steps
        detection=dict(batch_size=4, steps=250, lr=0.01, warmup_steps=20),
        segmentation=dict(batch_size=4, steps=250, lr=0.01, warmup_steps=20),
        retrieval_gru=dict(epochs=1.2),
        tag_supervised=dict(batch_size=64, steps=600, lr=0.02, workers=1)),
}

# Values without a mark are the paper's section 4. [M] = MoCo's code, [D] = Detectron2's defaults,
# [V] = VSE++'s code, [-] = ours, [?] = a reading where the paper says nothing.
# Data: COCO 2017, --data captions_train2017.json,instances_train2017.json (tags: its 80 objects),
# or Stock with --preset stock (caption = title). Below, pre-training is
# `train.py --model mct --preset base --init_text bert.safetensors`.
RECIPE = {
    "pretrain": dict(optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", epochs=200,
                     batch_size=512, epoch_of="images"),    # [?] MoCo's are, beside which it stands
    "linear": dict(optimizer="sgd", lr=30.0, weight_decay=0.0, schedule="step",
                   milestones="0.5,0.6666666,0.8333333", gamma=0.2, epochs=60, batch_size=256),
    "detection": dict(optimizer="sgd", lr=0.02, batch_size=16, steps=24000,
                      schedule="step", milestones="0.75,0.9166666",
                      weight_decay=1e-4,                            # [D]
                      warmup_steps=100, warmup_lr=2e-5),            # from lr/1000 [D]
    "segmentation": dict(optimizer="sgd", lr=0.02, batch_size=16, steps=180000,
                         schedule="step", milestones="0.6666666,0.8888888",
                         weight_decay=1e-4, warmup_steps=1000, warmup_lr=2e-5,          # [D]
                         proposals=(1000, 1000),                                        # [D]
                         detect_sizes=(640, 672, 704, 736, 768, 800)),                  # [M]
    "retrieval_gru": dict(optimizer="adam", lr=2e-4, schedule="step", milestones="0.5", gamma=0.1,
                          clip=2.0,                         # [V]
                          epochs=30, batch_size=128,        # 15 at each rate
                          epoch_of="captions"),             # 113K x 5 pairs; so does [V]
    "tagging": dict(optimizer="adam", lr=1e-3, schedule="cosine", epochs=30,
                    batch_size=256),                        # [-]
    "tag_supervised": dict(optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine",
                           epochs=60, batch_size=512),      # [-]
}

# Every table and figure with results, as data for tools/tables.py; models/README.md says what its
# words mean. Figures are drawings. Not here: other people's rows but MoCo-v2, which is this code
# with J_ii alone; IN-Sup (--init_vision resnet50.pth, torchvision's IMAGENET1K_V1, at downstream
# tasks without pre-training); Table 7's RS, which is the row "chance" of eval.py; 4.4's heads at
# widths other than these. Scratch = without BERT's weights, as every tiny run is.
BERT = "--vocab vocab.txt --init_text bert-base-uncased"
CAPTIONS = ("--data captions_train2017.json,instances_train2017.json --image_root train2017 "
            + BERT)
STOCK = "--data stock.jsonl --image_root stock"
NO_TAG = "pretrain --lambda_tag 0"
MOCO = "pretrain --lambda_tag 0 --lambda_cc 0 --lambda_ic 0 --lambda_ci 0"
QUICK = dict(pretrain="--workers 0", tag_supervised="--workers 0")
VOC = "--data VOCdevkit --vocab vocab.txt"
SEGMENTS = "--data instances_train2017.json --image_root train2017 --vocab vocab.txt"
SHOWN = "--data instances_val2017.json --image_root val2017"
PROBE = dict(evaluation="linear", columns=("accuracy",), tiny=QUICK,
             base=dict(pretrain=CAPTIONS, linear="--data imagenet", eval="--data imagenet"))
SEARCH = dict(evaluation="retrieval", columns=("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10"),
              tiny=QUICK)


def downstream(task):
    """The rows of a downstream table that start from a pre-training."""
    starts = {"MoCo-v2": MOCO, "Ours": NO_TAG, "Ours (with tag)": "pretrain"}
    return {name: f"{start} -> {task}" for name, start in starts.items()}


TABLES = {
    "Table 1": dict(
        PROBE, claim="Captions teach a ResNet more than pictures alone do, and tags still more.",
        rows=downstream("linear"), reference="MoCo-v2",
        better=[("Ours", "MoCo-v2"), ("Ours (with tag)", "Ours")]),
    "Table 1: scratch": dict(
        claim="BERT's weights matter little.", evaluation="linear", columns=("accuracy",),
        rows={"Ours": NO_TAG + " -> linear",
              "Ours (scratch)": NO_TAG + " --init_text '' -> linear"},
        base=PROBE["base"]),
    "Table 2": dict(
        claim="Pre-training helps detection, and ours more than MoCo-v2's on the same pictures.",
        rows={"Random Init": "detection", **downstream("detection")}, reference="Random Init",
        better=[("MoCo-v2", "Random Init"), ("Ours", "MoCo-v2"), ("Ours (with tag)", "Ours")],
        evaluation="detection", columns=("boxes_voc_AP50", "boxes_voc_AP", "boxes_voc_AP75"),
        tiny=QUICK,
        base=dict(pretrain=CAPTIONS, detection=VOC, eval="--data VOCdevkit")),
    "Table 2: scratch": dict(
        claim="Neither BERT's weights nor, from scratch, 1,000 epochs are needed.",
        rows={"Ours": NO_TAG + " -> detection",
              "Ours (scratch)": NO_TAG + " --init_text '' -> detection",
              "Ours (scratch), 1,000 epochs":
                  NO_TAG + " --init_text '' --epochs 1000 -> detection"},
        better=[("Ours (scratch), 1,000 epochs", "Ours (scratch)")],
        evaluation="detection", columns=("boxes_voc_AP50", "boxes_voc_AP", "boxes_voc_AP75"),
        base=dict(pretrain=CAPTIONS, detection=VOC, eval="--data VOCdevkit")),
    "Table 3": dict(
        claim="The same of boxes and masks on COCO.",
        rows={"Random Init": "segmentation", **downstream("segmentation")},
        reference="Random Init",
        better=[("MoCo-v2", "Random Init"), ("Ours", "MoCo-v2"), ("Ours (with tag)", "Ours")],
        evaluation="segmentation",
        columns=("boxes_coco_AP", "boxes_coco_AP50", "boxes_coco_AP75", "masks_coco_AP",
                 "masks_coco_AP50", "masks_coco_AP75"),
        tiny=QUICK,
        base=dict(pretrain=CAPTIONS, segmentation=SEGMENTS, eval=SHOWN)),
    "Table 4": dict(
        SEARCH, claim="Frozen, ours serves retrieval by a GRU better than MoCo-v2 does.",
        rows={"MoCo-v2": MOCO + " -> retrieval_gru", "Ours": NO_TAG + " -> retrieval_gru"},
        reference="MoCo-v2", better=[("Ours", "MoCo-v2")],
        base=dict(pretrain=CAPTIONS, retrieval_gru="--data dataset_coco.json --image_root coco",
                  eval="--data dataset_coco.json --image_root coco --limit 1000")),
    "Table 5": dict(
        claim="Tags are told better from frozen features of ours than by training on the tags.",
        rows={"Stock-sup": "tag_supervised", "Ours": "pretrain -> tagging"},
        reference="Stock-sup", better=[("Ours", "Stock-sup")],
        evaluation="tagging", columns=("mIOU@5", "mIOU@10", "mIOU@15", "mIOU@20"), tiny=QUICK,
        stock=dict(pretrain=f"{STOCK} {BERT}", tag_supervised=STOCK + " --vocab vocab.txt",
                   tagging=STOCK)),
    "Table 6": dict(
        SEARCH, claim="And they serve retrieval by a GRU better.",
        rows={"Stock-sup": "tag_supervised -> retrieval_gru", "Ours": "pretrain -> retrieval_gru"},
        reference="Stock-sup", better=[("Ours", "Stock-sup")],
        stock=dict(pretrain=f"{STOCK} {BERT}", tag_supervised=STOCK + " --vocab vocab.txt",
                   retrieval_gru=STOCK)),
    "Table 7": dict(
        SEARCH, claim="The losses within modalities help retrieval without fine-tuning.",
        rows={"Inter-modal": "pretrain --lambda_ii 0 --lambda_tag 0 --lambda_cc 0",
              "Multimodal": "pretrain"},
        reference="Inter-modal", better=[("Multimodal", "Inter-modal")],
        base=dict(pretrain=CAPTIONS,
                  eval="--data dataset_coco.json --image_root coco --limit 1000")),
    "Section 4.4: heads": dict(
        PROBE, claim="Heads of their own for each space are better than unified ones.",
        rows={f"{kind} {d}": f"{NO_TAG} --heads {kind} --intra_dim {d} --inter_dim {d} -> linear"
              for kind in ("unified", "distinct") for d in (128, 1024, 1152)}
             | {"distinct 128, 1024": NO_TAG + " -> linear"},
        better=[("distinct 128", "unified 128"), ("distinct 1024", "unified 1024"),
                ("distinct 1152", "unified 1152"), ("distinct 128, 1024", "distinct 1152")]),
    "Section 4.4: tags": dict(
        PROBE, claim="Tags help pictures alone, all five losses more.",
        rows={"J_ii": MOCO + " -> linear",
              "J_ii + J_tag": "pretrain --lambda_cc 0 --lambda_ic 0 --lambda_ci 0 -> linear",
              "all five": "pretrain -> linear"},
        reference="J_ii", better=[("J_ii + J_tag", "J_ii"), ("all five", "J_ii + J_tag")]),
    "Section 4.4: tags of captions": dict(
        claim="Nouns of the captions are worse tags than the annotations.", evaluation="linear",
        rows={"tags": "pretrain -> linear", "nouns": "pretrain --tag_words nouns.txt -> linear"},
        better=[("tags", "nouns")], columns=("accuracy",), base=PROBE["base"]),
}

TASKS = tuple(RECIPE)
EVALS = {"pretrain": ("retrieval", "probe"), "linear": ("linear",), "detection": ("detection",),
         "segmentation": ("segmentation",), "retrieval_gru": ("retrieval",),
         "tagging": ("tagging",), "tag_supervised": ("tagging",)}
INITS = ("vision", "text")

FEATURES = dict(features="features", features_eval="center", norm="imagenet")   # of a frozen ResNet
VIEWS = {
    "pretrain": dict(source="pairs", norm="imagenet",
                     image="moco", image_eval="center", image_key="moco", image_key_eval=None,
                     text="any_caption", text_eval="caption",
                     text_key="any_paraphrase", text_key_eval=None,
                     tags="any_tags", tags_eval=None),
    "linear": dict(source="classes", label="label", **FEATURES),
    "detection": dict(source="detection", image="objects", norm="none"),
    "segmentation": dict(source="detection", image="masks", image_eval="objects", norm="none"),
    "retrieval_gru": dict(source="pairs", text="caption", **FEATURES),
    "tagging": dict(source="pairs", tags="tags", tags_eval=None, **FEATURES),
    "tag_supervised": dict(source="pairs", image="flip", image_eval="center", tags="tags",
                           tags_eval=None, norm="imagenet"),
}

# `--init` must fill every tensor whose name starts so: the ResNet, wherever a task keeps it
BACKBONE = ("vision.", "detector.backbone.conv1", "detector.backbone.bn1",
            "detector.backbone.layer", "detector.backbone.body.",
            "detector.roi_heads.box_head.layer4.")

# what a task offers to eval.py; pre-training without inter-modal losses lacks the encoders
OFFERS = {
    "pretrain": ("visual_features", "encode_image", "encode_text"),
    "linear": ("visual_features", "predict"),
    "detection": ("detect",),
    "segmentation": ("detect",),
    "retrieval_gru": ("visual_features", "encode_image", "encode_text"),
    "tagging": ("visual_features", "tag_scores"),
    "tag_supervised": ("visual_features", "tag_scores"),
}

# what the detectors subtract from a picture and divide it by
PIXELS = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))


def setup(cfg, task, stats):
    """Sets what follows from the data: without tags there is no J_tag."""
    cfg.tag_width = stats.get("tag_width", 0)
    if not stats.get("tags"):
        cfg.lambda_tag = 0.0


# Copied from tools/__init__.py::check_fields
def check_fields(settings):
    """SystemExit, one line, for a field of a dataclass whose value its type does not allow."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), field.type
        several = get_origin(kind) is tuple
        if several:
            kind = get_args(kind)[0]

        # what the type says: one of some words, a number in a range, or no more than the type
        told, legal = f"not a {getattr(kind, '__name__', kind)}", lambda _: True
        if get_origin(kind) is Literal:
            words = get_args(kind)
            told, legal = f"not one of {', '.join(filter(None, words))}", words.count
        elif get_origin(kind) is Annotated:
            kind, told, legal = get_args(kind)

        # a whole number may stand for a float; JSON makes a list of a tuple
        types = {float: (int, float), int: int, str: str, bool: bool}.get(kind, object)
        alike = isinstance(value, (tuple, list)) == several
        for one in value if several and alike else [value]:
            if not alike or not isinstance(one, types) or not legal(one):
                raise SystemExit(f"--{field.name} {one}: {told}")


# --------------------------------------------------------------------------------------------------
# The text encoder: BERT

# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


class Attention(nn.Module):
    """Multi-head self-attention of tokens x (B, S, D)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)                      # one product for all three
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """mask: bool, True = may look, broadcast to (B, heads, S, S) -> (B, S, D)."""
        query, key, value = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out(x.transpose(1, 2).flatten(2))

    def split(self, x):
        # (B, S, D) -> (B, heads, S, D/heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """BERT's layer: self-attention, then feed-forward; the sum behind each is normalised."""

    def __init__(self, width, heads, mlp_ratio=4, act="gelu", dropout=0.0):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, 1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x, mask=None):
        x = self.attention_norm(x + self.drop(self.attention(x, mask)))
        return self.mlp_norm(x + self.drop(self.mlp(x)))


# Copied from models/codis.py::run_block
def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# Copied from models/codis.py::Embeddings
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


class PooledBert(nn.Module):
    """Ids and mask (B, T) -> (B, D), BERT's pooled output: tanh of a linear layer on [CLS]."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = Embeddings(cfg)
        self.blocks = nn.ModuleList(
            Block(cfg.width, cfg.text_heads, cfg.mlp_ratio, cfg.act, cfg.dropout)
            for _ in range(cfg.text_layers))
        self.pooler = nn.Linear(cfg.width, cfg.width)
        self.apply(partial(init_bert, std=cfg.init_std))

    def forward(self, text, text_mask):
        x = self.embeddings(text)                                   # (B, T, D)
        mask = text_mask[:, None, None].bool()                      # (B, 1, 1, T)
        for block in self.blocks:
            x = run_block(block, x, mask, save_memory=self.checkpointing)
        return self.pooler(x[:, 0]).tanh()                          # (B, D)


def init_bert(module, std):
    """BERT's initial weights, for nn.Module.apply(). LayerNorms stay at 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# The image encoder: a ResNet, its weights named as torchvision's

class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over `groups` virtual batches, as on as many GPUs.

    With statistics of the whole batch a query could recognise its key by them (MoCo).
    Samples n, n + groups, n + 2 groups, ... form a group. Running averages take the mean over
    groups; evaluation is plain batch norm.
    """

    def __init__(self, channels, groups=1):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        groups = self.groups
        if not self.training or groups == 1:
            return super().forward(x)

        # the groups become channels of a smaller batch: (B, C, H, W) -> (B/groups, groups C, H, W)
        batch, channels, height, width = x.shape
        mean, var = self.running_mean.repeat(groups), self.running_var.repeat(groups)
        y = F.batch_norm(x.reshape(batch // groups, groups * channels, height, width), mean, var,
                         self.weight.repeat(groups), self.bias.repeat(groups),
                         True, self.momentum, self.eps)

        # batch_norm has updated the copies of the running averages, one per group
        self.running_mean.copy_(mean.view(groups, channels).mean(0))
        self.running_var.copy_(var.view(groups, channels).mean(0))
        self.num_batches_tracked += 1

        # behind a view, the network's in-place ReLUs and sums would have autograd copy whole
        # gradients; nobody else holds y, so that this is none
        return torch.ops.aten._unsafe_view(y, x.shape)


def resnet(cfg, groups=1):
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> (B, D), averaged over places.

    groups: virtual batches of its batch norms.
    """
    norm = nn.BatchNorm2d if groups == 1 else partial(SplitBatchNorm, groups=groups)
    blocks = torchvision.models.resnet
    block = {"bottleneck": blocks.Bottleneck, "basic": blocks.BasicBlock}[cfg.block]
    net = torchvision.models.ResNet(block, list(cfg.layers), norm_layer=norm)

    # tiny: a smaller first convolution, and stages of another width
    if cfg.stem == "small":
        net.inplanes = cfg.vision_width
        net.conv1 = nn.Conv2d(3, cfg.vision_width, 3, 2, 1, bias=False)
        net.bn1 = norm(cfg.vision_width)
        for n, depth in enumerate(cfg.layers):
            stride = 1 if n == 0 else 2
            stage = net._make_layer(block, cfg.vision_width * 2 ** n, depth, stride=stride)
            setattr(net, f"layer{n + 1}", stage)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    net.fc = nn.Identity()
    return net


def feature_dim(cfg):
    """D of the image encoder: 2048 for ResNet-50."""
    first = cfg.vision_width if cfg.stem == "small" else 64
    expansion = {"bottleneck": 4, "basic": 1}[cfg.block]
    return first * 8 * expansion                                    # the width doubles three times


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
    """(B, ...) of every process -> (N, ...), in the order of ranks, without gradient.

    All processes must have the same B.
    """
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# Copied from models/codis.py::own_rows
def own_rows(x, b):
    """The B rows that this process gave to gather()."""
    return x[rank() * b:(rank() + 1) * b]


@torch.no_grad()
def shuffle(x):
    """MoCo's shuffling BN: (B, ...) of every process -> (B, ...) drawn from all of them.

    Also returns the order (N,) by which unshuffle() undoes it.
    """
    everyone = gather(x)
    order = torch.randperm(len(everyone), device=x.device)
    if world() > 1:
        dist.broadcast(order, 0)                                    # the same draw on all processes
    return everyone[own_rows(order, len(x))], order.argsort()


@torch.no_grad()
def unshuffle(x, restore):
    """Shuffled (B, ...) of every process -> (N, ...) on every process, in the order before."""
    return gather(x)[restore]


@torch.no_grad()
def enqueue_(queues, ptr, rows):
    """Writes rows (N, ...) into queues (K, ...), a list of each, in place, and moves `ptr`.

    They begin at `ptr` and go on at the start after the end; of more than K rows the last K stay.
    """
    size, count = len(queues[0]), len(rows[0])
    kept = min(count, size)
    slots = (ptr + count - kept + torch.arange(kept, device=ptr.device)) % size
    for queue, new in zip(queues, rows):
        queue.index_copy_(0, slots, new[-size:].to(queue.dtype))
    ptr.add_(count).remainder_(size)


@torch.no_grad()
def momentum_update_(copies, students, momentum):
    """Section 3.1: theta_k <- m theta_k + (1 - m) theta_q, in place, over lists of parameters."""
    torch._foreach_lerp_(copies, students, 1 - momentum)


@torch.no_grad()
def average_running_stats_(module):
    """Makes the running averages of batch norm equal on all processes: their mean, in place."""
    stats = [buffer for name, buffer in module.named_buffers()
             if name.endswith(("running_mean", "running_var"))]

    # one message for all of them
    flat = torch.cat([buffer.flatten() for buffer in stats])
    dist.all_reduce(flat)
    means = (flat / world()).split([buffer.numel() for buffer in stats])
    for buffer, mean in zip(stats, means):
        buffer.copy_(mean.view_as(buffer))


# --------------------------------------------------------------------------------------------------
# The paper's equations. q and k are queries and their own keys k+, (B, d) of unit norm; `ids` (B,)
# are their images. A loss has one value per query, (B,) float32.

class Queue(NamedTuple):
    """The keys k_1 ... k_K that a loss compares its queries with."""

    keys: torch.Tensor              # (K, d) unit norm
    ids: torch.Tensor               # (K,) the image of each key; -1 = still a random vector
    chunk: int                      # C, keys scored at a time
    present: torch.Tensor = None    # (K,) bool, False = that record had no caption; None = all had
    tags: torch.Tensor = None       # (K, L) tags of the images, padded with -1

    def chunks(self, ids):
        """Yields pieces of the queue: a slice, its keys (C, d), and `hidden` (B, C), True where a
        key does not count: it is of the query's own image, or there was no caption."""
        for start in range(0, len(self.keys), self.chunk):
            part = slice(start, start + self.chunk)
            hidden = ids[:, None] == self.ids[part]
            if self.present is not None:
                hidden = hidden | ~self.present[part]
            yield part, self.keys[part], hidden


def info_nce(q, k, queue, ids, tau):
    """Eq. (3), (8): J = -log exp(q.k+/tau) / sum_{j=0..K} exp(q.k_j/tau), where k_0 = k+.

    Keys that do not count (see Queue.chunks) are left out of the sum.
    """
    own = (q * k).sum(-1) / tau                                     # (B,)
    others = QueueLSE.apply(q, queue, ids, tau)                     # (B,), the sum over j = 1..K
    return torch.logaddexp(own, others) - own


class QueueLSE(torch.autograd.Function):
    """log sum_{j=1..K} exp(q.k_j/tau), streamed: nothing of size (B, K) is kept for backward.

    q: (B, d) float32, queue: Queue, ids: (B,) -> (B,); -inf where no key counts.
    Its gradient is the softmax mean of the keys over tau. forward() sums up that mean as attention
    sums up its values, so that backward() only multiplies.
    """

    @staticmethod
    def forward(ctx, q, queue, ids, tau):
        lse, mean = q.new_full((len(q),), -torch.inf), torch.zeros_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for _, keys, hidden in queue.chunks(ids):
                scores = (q @ keys.T / tau).masked_fill(hidden, -torch.inf)             # (B, C)
                new = torch.logaddexp(lse, scores.logsumexp(-1))

                # the old mean shrinks to its share of the new sum; where no key has counted yet,
                # 0 stands for -inf, as -inf - -inf is nan
                base = new.masked_fill(new == -torch.inf, 0)
                share, weights = (lse - base).exp(), (scores - base[:, None]).exp()
                mean = mean * share[:, None] + weights @ keys                           # (B, d)
                lse = new
        ctx.save_for_backward(mean)
        ctx.tau = tau
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mean, = ctx.saved_tensors
        return grad[:, None] * mean / ctx.tau, None, None, None


@torch.no_grad()
def tag_positives(k, queue, ids, tags, eps, vocab):
    """Eq. (4): P = {k_p : t_p . t_j > eps}, and k+ always -> the mean (B, d) of its keys, |P| (B,).

    tags: (B, L) and queue.tags (K, L): ids below `vocab`, each at most once in a row, padded
    with -1. t_p . t_j is the number of tags in common. It is looked up: each key adds up the rows
    of its tags in a table of the batch. This is exact and needs no (K, V) matrix, which would take
    4.8 GB for Stock.
    """
    # table[tag + 1, j] = 1 where query j has the tag; row 0 is the padding
    table = k.new_zeros(vocab + 1, len(tags))
    table[tags.T + 1, torch.arange(len(tags), device=tags.device)] = 1
    table[0] = 0

    # sum of the keys in P, and their number; k+ is the first
    total, number = k.clone(), k.new_ones(len(k))
    with torch.autocast(k.device.type, enabled=False):
        for part, keys, hidden in queue.chunks(ids):
            common = F.embedding_bag(queue.tags[part] + 1, table, mode="sum").T         # (B, C)
            positive = ((common > eps) & ~hidden).to(k.dtype)
            total, number = total + positive @ keys, number + positive.sum(-1)
    return total / number[:, None], number


def tag_nce(j_ii, q, k, mean_key, tau):
    """Eq. (5): J_tag = -1/|P| sum_{p in P} log exp(q.k_p/tau) / sum_{j=0..K} exp(q.k_j/tau).

    The denominator is that of Eq. 3, so that J_tag = J_ii + (q.k+ - mean_{p in P} q.k_p) / tau.
    j_ii: info_nce() of the same q and k; mean_key: of tag_positives().
    """
    return j_ii + (q * (k - mean_key)).sum(-1) / tau


def hinge(q, k, queue, ids, margin):
    """Eq. (11), (14): J = sum_{j=1..K} [alpha - q.k+ + q.k_j]_+, alpha = margin.

    Keys that do not count (see Queue.chunks) are left out of the sum.
    """
    return QueueHinge.apply(q, (q * k).sum(-1), queue, ids, margin)


class QueueHinge(torch.autograd.Function):
    """sum_{j=1..K} [alpha - own + q.k_j]_+, streamed: nothing of size (B, K) is kept for backward.

    q: (B, d) float32, own: (B,) = q.k+, queue: Queue, ids: (B,) -> (B,).
    Its gradient to q is the sum of the keys inside the margin, that to own minus their number.
    """

    @staticmethod
    def forward(ctx, q, own, queue, ids, margin):
        loss, number, total = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for _, keys, hidden in queue.chunks(ids):
                excess = (margin - own[:, None] + q @ keys.T).clamp(min=0)              # (B, C)
                excess = excess.masked_fill(hidden, 0)
                inside = (excess > 0).to(q.dtype)
                loss, number = loss + excess.sum(-1), number + inside.sum(-1)
                total = total + inside @ keys                                           # (B, d)
        ctx.save_for_backward(total, number)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total, number = ctx.saved_tensors
        return grad[:, None] * total, -grad * number, None, None, None


def vse_loss(image_emb, text_emb, ids, margin):
    """VSE++: sum over pairs of [margin - s_ii + max_j s_ij]_+, and the same with max_j s_ji.

    image_emb, text_emb: (B, d) unit norm -> 0-d. j runs over other images than i.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        scores = image_emb.float() @ text_emb.float().T             # (B, B), not in bf16
    own = scores.diagonal()
    others = scores.masked_fill(ids[:, None] == ids, -torch.inf)

    # for each text the hardest image, for each image the hardest text
    of_texts = (margin - own + others.amax(0)).clamp(min=0).sum()
    of_images = (margin - own + others.amax(1)).clamp(min=0).sum()
    return of_texts + of_images


@torch.no_grad()
def pmi_vectors(rows, vocab, dim):
    """Tag embeddings from co-occurrence: SVD U S V' of M_ij = max(0, log(n_ij N / (n_i n_j))).

    rows: (N, L) ids below `vocab`, each at most once in a row, padded with -1.
    -> (vocab, dim) float32, unit rows of U sqrt(S); 0 for a tag that no row has.
    """
    # n_ij, counted over flat indices i * vocab + j of all pairs of tags in a row
    counts = torch.zeros(vocab * vocab, device=rows.device)
    for part in rows.split(4096):
        first, second = part[:, :, None], part[:, None, :]
        both = (first >= 0) & (second >= 0)                         # (rows, L, L)
        pairs = (first * vocab + second)[both]
        counts.index_add_(0, pairs, counts.new_ones(len(pairs)))
    counts = counts.view(vocab, vocab)

    # tags that never meet: log 0 = -inf, clipped to 0
    single = counts.diagonal().clamp(min=1)
    pmi = (counts * (len(rows) / single[:, None]) / single).log().clamp(min=0)

    # the first `dim` vectors; a random method is enough where they are few
    if dim == vocab:
        u, s, _ = torch.linalg.svd(pmi)
    else:
        u, s, _ = torch.svd_lowrank(pmi, dim, niter=4)
    vectors = F.normalize(u[:, :dim] * s[:dim].sqrt(), dim=-1)
    return vectors * (counts.diagonal() > 0)[:, None]


# --------------------------------------------------------------------------------------------------
# Detectors: torchvision's, around our ResNet

class Float32Boxes:
    """What torchvision's detectors do with pictures; everything behind the backbone in float32.

    torchvision makes anchors in the type of the features, and proposals and true boxes follow. In
    bf16 that rounds coordinates above 128 to whole pixels, and those above 512 to fours.
    """

    def forward(self, images, targets=None):
        """Lists, as torchvision documents -> a dict of losses; in evaluation a list of dicts."""
        # normalised, resized, in one batch
        sizes = [tuple(image.shape[-2:]) for image in images]
        images, targets = self.transform(images, targets)

        # autocast is for the backbone alone
        features = self.backbone(images.tensors)
        with torch.autocast(images.tensors.device.type, enabled=False):
            features = {level: x.float() for level, x in features.items()}
            proposals, rpn_losses = self.rpn(images, features, targets)
            found, losses = self.roi_heads(features, proposals, images.image_sizes, targets)

        if self.training:
            return losses | rpn_losses
        return self.transform.postprocess(found, images.image_sizes, sizes)


class C4(Float32Boxes, FasterRCNN):
    """Faster R-CNN on the features of one stage."""


class FPN(Float32Boxes, MaskRCNN):
    """Mask R-CNN on a feature pyramid."""


class C4Head(nn.Module):
    """conv5 as the box head of R50-C4, with MoCo's extra norm: (R, 1024, 14, 14) -> (R, 2048)."""

    def __init__(self, layer4, width):
        super().__init__()
        self.layer4, self.norm = layer4, nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.layer4(x)).mean((2, 3))


def c4_detector(cfg, classes, **settings):
    """Faster R-CNN on conv4 features of stride 16."""
    net, width = resnet(cfg), feature_dim(cfg)
    body = IntermediateLayerGetter(net, {"layer3": "0"})
    body.out_channels = width // 2

    # all anchor sizes at every place of the one feature map
    ratios = (0.5, 1.0, 2.0)
    anchors = AnchorGenerator((tuple(cfg.anchors),), (ratios,))
    rpn_head = RPNHead(width // 2, len(ratios) * len(cfg.anchors))

    return C4(body, rpn_anchor_generator=anchors, rpn_head=rpn_head,
              box_roi_pool=MultiScaleRoIAlign(["0"], 14, 0),        # 0: samples as the box needs
              box_head=C4Head(net.layer4, width),
              box_predictor=FastRCNNPredictor(width, classes + 1), **settings)


def fpn_detector(cfg, classes, **settings):
    """Mask R-CNN on four stages of the ResNet and a fifth level above them."""
    width, channels = feature_dim(cfg), cfg.fpn_width
    stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    widths = [width // 8, width // 4, width // 2, width]
    body = BackboneWithFPN(resnet(cfg), stages, widths, channels, norm_layer=nn.BatchNorm2d)

    # one anchor size per level
    sizes = tuple((side,) for side in cfg.anchors)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))

    levels = list(stages.values())                                  # the fifth is the RPN's alone
    return FPN(body, rpn_anchor_generator=anchors,
               box_roi_pool=MultiScaleRoIAlign(levels, 7, 0),
               box_head=TwoMLPHead(7 * 7 * channels, 4 * channels),
               box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
               mask_roi_pool=MultiScaleRoIAlign(levels, 14, 0),
               mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
               mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1), **settings)


@torch.no_grad()
def init_heads(heads):
    """Detectron2's initial weights of the RoI heads, where torchvision's differ."""
    box, mask = heads.box_predictor, heads.mask_predictor
    spreads = {box.cls_score: 0.01, box.bbox_pred: 0.001}
    if mask is not None:
        spreads[mask.mask_fcn_logits] = 0.001
    for layer, std in spreads.items():
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)

    # the pyramid's box head, and the bias before the mask's logits
    if mask is not None:
        for layer in (heads.box_head.fc6, heads.box_head.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(mask.conv5_mask.bias)


# --------------------------------------------------------------------------------------------------
# The model

class Mct(nn.Module):
    """All tasks of the paper.

    num_labels: classes of linear, detection and segmentation, tags of the other tasks.
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        cfg.check(task)
        self.cfg, self.task = cfg, task
        self.students = []                      # names of the parts that have a momentum copy
        self.frozen = task in ("linear", "retrieval_gru", "tagging")    # the ResNet is not trained
        self.offers = set(OFFERS[task])         # methods that eval.py may call
        self.remarks = []                       # lines for the start of the training report

        if task == "pretrain":
            self.build_pretrain(num_labels)
        elif task in ("detection", "segmentation"):
            self.build_detector(num_labels)
        else:
            self.vision = resnet(cfg).requires_grad_(not self.frozen)
            self.build_head(feature_dim(cfg), num_labels)

    def build_pretrain(self, num_tags):
        """Encoders, heads, their momentum copies and the queues, as far as the losses need them."""
        cfg = self.cfg
        self.tagged, self.num_tags = cfg.lambda_tag > 0 and num_tags > 0, num_tags
        self.spaces = self.needed_spaces()

        # students: encoders and heads
        groups = cfg.bn_groups if world() == 1 else 1
        self.vision = resnet(cfg, groups)
        if groups == 1:     # a pixel's channels side by side: what convolutions are fastest in
            self.vision.to(memory_format=torch.channels_last)
        self.vision_heads = self.make_heads(feature_dim(cfg), self.spaces["vision"])
        self.students = ["vision", "vision_heads"]
        if self.spaces["text"]:
            self.text = PooledBert(cfg)
            self.text_heads = self.make_heads(cfg.width, self.spaces["text"])
            self.students += ["text", "text_heads"]

        # their momentum copies
        for name in self.students:
            copy = deepcopy(getattr(self, name))
            self.add_module(name + "_m", copy.requires_grad_(False))

        # a queue of keys for each side and space; ids, captions and tags belong to all of them
        for side, spaces in self.spaces.items():
            for space in spaces:
                keys = torch.empty(cfg.queue_size, getattr(cfg, f"{space}_dim"))
                self.register_buffer(f"queue_{side}_{space}", keys)
        self.register_buffer("queue_ids", torch.empty(cfg.queue_size, dtype=torch.long))
        self.register_buffer("queue_captioned", torch.empty(cfg.queue_size, dtype=torch.bool))
        if self.tagged:
            shape = cfg.queue_size, max(1, cfg.tag_width)
            self.register_buffer("queue_tags", torch.empty(shape, dtype=torch.long))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.reset_memory()

        # what is offered and said follows from the losses
        if "inter" not in self.spaces["text"]:
            self.offers -= {"encode_image", "encode_text"}
        if world() == 1:
            self.remarks.append(f"batch norm: {groups} virtual groups in this one process")
        else:
            self.remarks.append("batch norm: per process, keys shuffled over processes")
        if not self.tagged:
            self.remarks.append("no J_tag: lambda_tag is 0, or the data have no tags")

    def needed_spaces(self):
        """{side: list of "intra", "inter"}: the embeddings that losses of a weight above 0 need."""
        cfg = self.cfg
        spaces = {"vision": [], "text": []}
        if cfg.lambda_ii > 0 or self.tagged:
            spaces["vision"].append("intra")
        if cfg.lambda_cc > 0:
            spaces["text"].append("intra")
        if cfg.lambda_ic > 0 or cfg.lambda_ci > 0:
            spaces["vision"].append("inter")
            spaces["text"].append("inter")

        if not spaces["vision"]:
            raise SystemExit("models/mct.py: lambda_ii, _tag, _ic and _ci are all 0: "
                             "nothing trains the image encoder")
        return spaces

    def make_heads(self, width, spaces):
        """Two-layer MLPs on pooled features: one for each space, or one for both (section 4.4)."""
        cfg = self.cfg
        dims = {"intra": cfg.intra_dim, "inter": cfg.inter_dim}
        if cfg.heads == "unified":
            return nn.ModuleDict({"both": mlp(width, cfg.head_hidden, cfg.inter_dim)})
        return nn.ModuleDict({space: mlp(width, cfg.head_hidden, dims[space]) for space in spaces})

    def build_head(self, width, num_labels):
        """What a downstream task puts on the ResNet's features."""
        cfg = self.cfg
        if self.task in ("linear", "tag_supervised"):
            self.fc = nn.Linear(width, num_labels)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
            if self.task == "tag_supervised":
                # at first a picture is expected to have one tag, not half of all of them
                nn.init.constant_(self.fc.bias, -math.log(num_labels))

        elif self.task == "retrieval_gru":
            self.image_fc = nn.Linear(width, cfg.joint_dim)
            self.words = nn.Embedding(cfg.vocab_size, cfg.word_dim, padding_idx=cfg.pad_id)
            self.gru = nn.GRU(cfg.word_dim, cfg.joint_dim, batch_first=True)
            nn.init.xavier_uniform_(self.image_fc.weight)
            nn.init.uniform_(self.words.weight, -0.1, 0.1)

        elif self.task == "tagging":
            dim = min(cfg.tag_dim, num_labels)
            self.tag_mlp = mlp(width, cfg.tag_hidden, dim)
            self.register_buffer("tag_vectors", torch.zeros(num_labels, dim))

    def build_detector(self, classes):
        """torchvision's detector, with as many boxes before NMS as Detectron2 has in C4 and FPN."""
        cfg = self.cfg
        if self.task == "detection":
            make, before_train, before_test = c4_detector, 12000, 6000
        else:
            make, before_train, before_test = fpn_detector, 2000, 1000
        kept_train, kept_test = cfg.proposals
        self.detector = make(
            cfg, classes, min_size=tuple(cfg.detect_sizes), max_size=cfg.detect_max, **PIXELS,
            box_batch_size_per_image=cfg.rois,
            rpn_pre_nms_top_n_train=before_train, rpn_pre_nms_top_n_test=before_test,
            rpn_post_nms_top_n_train=kept_train, rpn_post_nms_top_n_test=kept_test)
        init_heads(self.detector.roi_heads)

        # statistics of all processes, where that is possible
        if world() > 1 and dist.get_backend() == "nccl":
            self.detector = nn.SyncBatchNorm.convert_sync_batchnorm(self.detector)
            self.remarks.append(f"batch norm: synchronised over {world()} processes")
        else:
            self.remarks.append("batch norm: plain, per process "
                                "(SyncBatchNorm is for several CUDA processes)")

    def train(self, mode=True):
        """A frozen ResNet keeps its running averages, the text copy has no dropout. The image copy
        trains: its batch norm uses the batch, as MoCo's."""
        super().train(mode)
        if self.frozen:
            self.vision.eval()
        if "text" in self.students:
            self.text_m.eval()
        return self

    # -- encoders

    def visual_features(self, batch):
        """(B, D): the ResNet's average pool of `image`, or the stored `features`."""
        return batch["features"] if "features" in batch else self.vision(batch["image"])

    def project(self, side, features, momentum=False):
        """Pooled features (B, D) -> {"intra", "inter": (B, d) unit norm}, those that are needed.

        side: "vision" or "text", whose heads it takes, or their momentum copies.
        """
        heads = getattr(self, f"{side}_heads_m" if momentum else f"{side}_heads")
        z = {name: F.normalize(head(features).float(), dim=-1) for name, head in heads.items()}
        if "both" in z:
            return {space: z["both"] for space in self.spaces[side]}
        return z

    def queries(self, batch):
        """Encodes the query views -> {side: {space: (B, d)}}.

        Eq. (1), (9): q_ii = f_iq(I'; theta_q, phi_iq), and q_ic with the head phi_cq.
        Eq. (6), (12): q_cc = f_cq(c'; Theta_q, Phi_cq), and q_ci with the head Phi_iq.
        """
        q = {"vision": self.project("vision", self.vision(batch["image"]))}
        if self.spaces["text"]:
            q["text"] = self.project("text", self.text(batch["text"], batch["text_mask"]))
        return q

    @torch.no_grad()
    def keys(self, batch):
        """Encodes the key views by the momentum copies -> {side: {space: (N, d)}}, all processes'.

        Eq. (2), (13): k_ii = f_ik(I*; theta_k, phi_ik), and k_ci with the head phi_ck.
        Eq. (7), (10): k_cc = f_ck(c*; Theta_k, Phi_ck), and k_ic with the head Phi_ik.
        """
        image, restore = shuffle(batch["image_key"])
        z = self.project("vision", self.vision_m(image), momentum=True)
        k = {"vision": {space: unshuffle(x, restore) for space, x in z.items()}}

        if self.spaces["text"]:
            features = self.text_m(batch["text_key"], batch["text_key_mask"])
            z = self.project("text", features, momentum=True)
            k["text"] = {space: gather(x) for space, x in z.items()}
        return k

    # -- pre-training

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def loss_pretrain(self, batch):
        """Eq. (15): J = lambda_ii J_ii + lambda_tag J_tag + lambda_cc J_cc + lambda_ic J_ic
        + lambda_ci J_ci.

        Each J is a mean over all records; those that cannot take part count as 0.
        """
        cfg, ids = self.cfg, batch["image_id"]
        self.check_batch_size(len(ids))
        captioned = batch.get("text_valid", torch.ones_like(ids)).bool()

        # queries of this process, keys of all processes; the own ones are the positives
        queries, all_keys, keys = self.queries(batch), self.keys(batch), {}
        for side, spaces in all_keys.items():
            keys[side] = {space: own_rows(k, len(ids)) for space, k in spaces.items()}

        # images with images: Eq. 3, then Eq. 4 and 5
        rows, logs = {}, {}                                         # J of each record, (B,)
        if "intra" in self.spaces["vision"]:
            q, k = queries["vision"]["intra"], keys["vision"]["intra"]
            queue = self.queue("vision", "intra")
            rows["ii"] = info_nce(q, k, queue, ids, cfg.tau)
            if self.tagged:
                tags = batch["tags"]
                mean_key, number = tag_positives(k, queue, ids, tags, cfg.tag_eps, self.num_tags)
                rows["tag"] = tag_nce(rows["ii"], q, k, mean_key, cfg.tau) * (tags >= 0).any(-1)
                logs["positives"] = number.mean()

        # captions with captions: Eq. 8
        if "intra" in self.spaces["text"]:
            q, k = queries["text"]["intra"], keys["text"]["intra"]
            rows["cc"] = info_nce(q, k, self.queue("text", "intra"), ids, cfg.tau) * captioned

        # images with captions: Eq. 11, and captions with images: Eq. 14
        if "inter" in self.spaces["text"]:
            q, k = queries["vision"]["inter"], keys["text"]["inter"]
            rows["ic"] = hinge(q, k, self.queue("text", "inter"), ids, cfg.margin) * captioned
            q, k = queries["text"]["inter"], keys["vision"]["inter"]
            rows["ci"] = hinge(q, k, self.queue("vision", "inter"), ids, cfg.margin) * captioned

        # J
        losses = {name: row.mean() for name, row in rows.items()}
        loss = sum(getattr(cfg, f"lambda_{name}") * losses[name] for name in losses)
        logs |= {name: value.detach() for name, value in losses.items()}
        if "text_key_is_copy" in batch:
            paraphrased = 1 - batch["text_key_is_copy"].float()
            logs["paraphrased"] = (paraphrased * captioned).mean()
        return {"loss": loss, "logs": logs, "keys": all_keys, "facts": self.facts(batch, captioned)}

    def check_batch_size(self, size):
        """A group of batch norm needs two samples: of one alone the statistics are the sample."""
        groups = self.cfg.bn_groups if world() == 1 else 1
        if self.training and (size % groups or size == groups):
            raise SystemExit(f"models/mct.py: a batch of {size} is not {groups} virtual groups of "
                             "2 or more: set --bn_groups or --batch_size")

    def queue(self, side, space):
        """The keys of one side in one space, as a loss takes them."""
        return Queue(getattr(self, f"queue_{side}_{space}"), self.queue_ids, self.cfg.queue_chunk,
                     present=self.queue_captioned if side == "text" else None,
                     tags=self.queue_tags if self.tagged else None)

    def facts(self, batch, captioned):
        """What is queued beside the keys: image id, captioned or not, tags -> (N, 2 + L) int64, of
        all processes in one message."""
        columns = [batch["image_id"][:, None], captioned[:, None].long()]
        if self.tagged:
            columns.append(batch["tags"])
        return gather(torch.cat(columns, dim=1))

    def after_backward(self, out):
        """Enqueues the keys of all processes, and what is known of their records."""
        if "keys" not in out:
            return

        # the columns of facts()
        facts = out["facts"]
        rows = {"queue_ids": facts[:, 0], "queue_captioned": facts[:, 1].bool()}
        if self.tagged:
            rows["queue_tags"] = facts[:, 2:]

        # the keys of each side and space
        for side, spaces in out["keys"].items():
            for space, keys in spaces.items():
                rows[f"queue_{side}_{space}"] = keys
        enqueue_([getattr(self, name) for name in rows], self.ptr, list(rows.values()))

    @torch.no_grad()
    def after_step(self, step, total_steps, epoch_steps=None):
        """The momentum copies follow; running averages of batch norm become equal on all processes.

        The copies' own running averages are not an EMA (deviation 4).
        """
        # one fused operation for all parameters
        copies, students = [], []
        for name in self.students:
            copies += getattr(self, name + "_m").parameters()
            students += getattr(self, name).parameters()
        if students:
            momentum_update_(copies, students, self.cfg.momentum)

        if world() > 1 and not self.frozen:
            average_running_stats_(self)

    @torch.no_grad()
    def reset_memory(self):
        """As at the start of training: copies equal their students; queues hold random unit vectors
        that belong to no image, and count as captions without tags."""
        for name in self.students:
            getattr(self, name + "_m").load_state_dict(getattr(self, name).state_dict())

        # keys first, then what is known of their records
        for side, spaces in self.spaces.items():
            for space in spaces:
                keys = getattr(self, f"queue_{side}_{space}")
                keys.copy_(F.normalize(torch.randn_like(keys), dim=-1))
        self.queue_ids.fill_(-1)
        self.queue_captioned.fill_(True)
        if self.tagged:
            self.queue_tags.fill_(-1)
        self.ptr.zero_()

    def param_groups(self, loop):
        """The image side at --lr, BERT at text_lr. Weight decay on everything, as MoCo; detectors
        have none on norms, as Detectron2."""
        # detectors: the parameters of batch norm
        norms = set()
        if self.task in ("detection", "segmentation"):
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    norms |= set(module.parameters())

        # everything that is trained, in one of three groups
        image, text, undecayed = [], [], []
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("text"):
                text.append(parameter)
            elif parameter in norms:
                undecayed.append(parameter)
            else:
                image.append(parameter)
        return [{"params": image, "lr": loop.lr, "weight_decay": loop.weight_decay},
                {"params": text, "lr": self.cfg.text_lr, "weight_decay": loop.weight_decay},
                {"params": undecayed, "lr": loop.lr, "weight_decay": 0.0}]

    # -- downstream tasks

    @staticmethod
    def one_loss(loss, name):
        """What forward() returns for a loss without parts."""
        return {"loss": loss, "logs": {name: loss.detach()}}

    def loss_linear(self, batch):
        loss = F.cross_entropy(self.predict(batch).float(), batch["label"])
        return self.one_loss(loss, "cross_entropy")

    def loss_retrieval_gru(self, batch):
        if self.training and len(batch["image_id"]) < 2:
            raise SystemExit("models/mct.py: VSE++ finds its negatives in the batch of a process, "
                             "and this one has one picture: set --batch_size")
        loss = vse_loss(self.encode_image(batch), self.encode_text(batch), batch["image_id"],
                        self.cfg.margin)
        return self.one_loss(loss, "vse")

    def prepare(self, samples):
        """Before the first step of tagging: vectors of the tags, from the training records."""
        if self.task != "tagging":
            return

        # one process computes: V x V counts take memory, and the sign of a vector is left open
        if rank() == 0:
            vocab, dim = self.tag_vectors.shape
            rows = samples.tag_rows().to(self.tag_vectors.device)
            self.tag_vectors.copy_(pmi_vectors(rows, vocab, dim))
        if world() > 1:
            dist.broadcast(self.tag_vectors, 0)

    def embed_tags(self, batch):
        """An image in the space of the tags' vectors -> (B, d) unit norm."""
        return F.normalize(self.tag_mlp(self.visual_features(batch)).float(), dim=-1)

    def loss_tagging(self, batch):
        """1 - cosine with the unit mean of the image's tag vectors, mean over images with tags."""
        tags = batch["tags"]
        valid = (tags >= 0).float()                                                 # (B, L)
        vectors = self.tag_vectors[tags.clamp(min=0)] * valid[..., None]            # (B, L, d)
        target = F.normalize(vectors.sum(1), dim=-1)                                # (B, d)

        # images without tags have no target
        has_tags = valid.amax(-1)                                                   # (B,) 1 or 0
        distance = 1 - (self.embed_tags(batch) * target).sum(-1)
        loss = (distance * has_tags).sum() / has_tags.sum().clamp(min=1)
        return self.one_loss(loss, "cosine")

    def loss_tag_supervised(self, batch):
        """Binary cross-entropy, summed over the tags, mean over images.

        A mean over 18,157 tags would leave gradients that weight decay outweighs.
        """
        tags, logits = batch["tags"], self.tag_scores(batch).float()                # (B, V)

        # 1 where the image has the tag; the first column takes the padding (-1) and is dropped
        truth = logits.new_zeros(len(tags), 1 + logits.shape[1])
        truth = truth.scatter_(1, tags + 1, 1.0)[:, 1:]
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(tags)
        return self.one_loss(loss, "bce")

    def loss_detection(self, batch):
        """torchvision's losses, summed. image: list of (3, H, W) in 0..1; boxes: list of (n, 4)
        xyxy; labels: list of (n,) from 0; segmentation: masks, list of (n, H, W)."""
        targets = []
        for i in range(len(batch["image"])):
            labels = batch["labels"][i] + 1                         # torchvision's 0 is background
            targets.append({"boxes": batch["boxes"][i], "labels": labels})
            if "masks" in batch:
                targets[i]["masks"] = batch["masks"][i]

        losses = self.detector(batch["image"], targets)
        logs = {name.removeprefix("loss_"): value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), "logs": logs}

    loss_segmentation = loss_detection

    # -- evaluation

    def encode_image(self, batch):
        """-> (B, d) unit norm, in the space of encode_text()."""
        features = self.visual_features(batch)
        if self.task == "retrieval_gru":
            return F.normalize(self.image_fc(features).float(), dim=-1)
        return self.project("vision", features)["inter"]

    def encode_text(self, batch):
        """-> (B, d) unit norm, in the space of encode_image()."""
        text, mask = batch["text"], batch["text_mask"]
        if self.task == "pretrain":
            return self.project("text", self.text(text, mask))["inter"]

        # the GRU's state after the last real token
        states, _ = self.gru(self.words(text))                                      # (B, T, d)
        last = (mask.sum(-1) - 1).clamp(min=0)                                      # (B,)
        state = states[torch.arange(len(text), device=text.device), last]           # (B, d)
        return F.normalize(state.float(), dim=-1)

    def predict(self, batch):
        """Logits of the classes (B, C)."""
        return self.fc(self.visual_features(batch))

    def tag_scores(self, batch):
        """(B, V), higher = likelier: cosine with the tags' PMI vectors, or the logits of the
        supervised tagger."""
        if self.task == "tag_supervised":
            return self.fc(self.visual_features(batch))
        embedded = self.embed_tags(batch)
        with torch.autocast(embedded.device.type, enabled=False):
            return embedded @ self.tag_vectors.T

    def detect(self, batch):
        """A list of B dicts: boxes (n, 4) xyxy in pixels of `image`, labels (n,) from 0, scores
        (n,); segmentation: masks (n, H, W) bool."""
        found = self.detector(batch["image"])
        for objects in found:
            objects["labels"] = objects["labels"] - 1               # torchvision's 0 is background
            if "masks" in objects:
                objects["masks"] = objects["masks"][:, 0] >= 0.5
        return found

    def adapt(self, state):
        """Weights of another run -> under this task's names: the ResNet is elsewhere in a detector.

        The queues stay behind, and begin anew: their image ids and tags are those of the data of
        that run, where other pictures may have the same numbers.
        """
        memory = ("queue_", "ptr")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(memory)}
        if any(name.startswith("detector.") for name in state):
            return state
        adapted = {}
        for name, tensor in state.items():
            if name.startswith("vision."):
                name = resnet_place(self.task, name.removeprefix("vision."))
            adapted[name] = tensor
        return adapted


# --------------------------------------------------------------------------------------------------
# Foreign weights: torchvision's ResNet and Hugging Face's BertModel

# Our names of a layer's parts -> those of Hugging Face's BERT
BERT_BLOCK = {
    "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.out": ["attention.output.dense"], "attention_norm": ["attention.output.LayerNorm"],
    "mlp.0": ["intermediate.dense"], "mlp.2": ["output.dense"], "mlp_norm": ["output.LayerNorm"]}


def resnet_place(task, name):
    """Our name for a tensor of torchvision's ResNet: a detector takes the ResNet apart."""
    if task == "segmentation":
        return "detector.backbone.body." + name
    if task == "detection" and name.startswith("layer4."):
        return "detector.roi_heads.box_head." + name
    return ("detector.backbone." if task == "detection" else "vision.") + name


def foreign_names(model, side):
    """Which tensors of other libraries are ours: {our name: [their names, rows joined in order]}.

    side: "vision", torchvision's ResNet, or "text", Hugging Face's BertModel -> two such dicts: the
    tensors that a file must have, and those that it may have. SystemExit: there is no such tower.
    """
    cfg, needed, extra = model.cfg, {}, {}
    if side == "vision":
        if cfg.stem == "small":
            raise SystemExit("models/mct.py: --stem small: torchvision's ResNets have a 7x7 stem")
        with torch.device("meta"):                                  # names without numbers
            names = list(resnet(cfg).state_dict())
        for name in names:
            counter = name.endswith("num_batches_tracked")          # old files lack it
            kind = extra if counter else needed
            kind[resnet_place(model.task, name)] = [name]
        return needed, extra

    # BERT: embeddings, then what has weight and bias
    if not hasattr(model, "text"):
        raise SystemExit(f"models/mct.py: task {model.task} with these losses trains no BERT")
    if cfg.act != "gelu":
        raise SystemExit(f"models/mct.py: --act {cfg.act}: published BERTs have gelu")
    for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type")):
        needed[f"text.embeddings.{ours}.weight"] = [f"embeddings.{theirs}_embeddings.weight"]
    parts = {"embeddings.norm": ["embeddings.LayerNorm"], "pooler": ["pooler.dense"]}
    for n in range(cfg.text_layers):
        for ours, theirs in BERT_BLOCK.items():
            parts[f"blocks.{n}.{ours}"] = [f"encoder.layer.{n}.{part}" for part in theirs]
    for ours, theirs in parts.items():
        for kind in ("weight", "bias"):
            needed[f"text.{ours}.{kind}"] = [f"{part}.{kind}" for part in theirs]
    return needed, extra


def load_pretrained(model, **states):
    """Fills towers from foreign state dicts, {side: state dict}. KeyError: a tensor is missing.

    Momentum copies become their students, queues start anew. Files: tools/weights.py.
    """
    ours = {}
    for side, state in states.items():
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        needed, optional = foreign_names(model, side)
        found = {name: theirs for name, theirs in optional.items() if theirs[0] in state}
        for name, theirs in {**needed, **found}.items():
            parts = [state[part] for part in theirs]
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]

    model.load_state_dict(model.adapt(ours), strict=False)
    if model.students:
        model.reset_memory()


Model = Mct


def demo_batch(cfg, task, b=4):
    """A random batch of what VIEWS[task] asks for."""
    if task in ("detection", "segmentation"):
        boxes = torch.tensor([[8.0, 8.0, 40.0, 30.0], [20.0, 24.0, 50.0, 60.0]])
        masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
        masks[0, 8:30, 8:40] = 1
        masks[1, 24:60, 20:50] = 1
        batch = {"image": list(torch.rand(b, 3, 64, 80)), "boxes": [boxes] * b,
                 "labels": [torch.tensor([0, 2])] * b}
        if task == "segmentation":
            batch["masks"] = [masks] * b
        return batch

    # records: ids, tags, classes, captions
    text, mask = torch.randint(5, cfg.vocab_size, (b, cfg.max_text)), torch.ones(b, cfg.max_text)
    batch = {"image_id": torch.arange(b), "label": torch.arange(b) % 3,
             "tags": torch.stack([torch.randperm(20)[:6] for _ in range(b)]),
             "text": text, "text_mask": mask.long()}
    if "features" in VIEWS[task]:
        return batch | {"features": torch.rand(b, feature_dim(cfg))}

    # images, and the key views of pre-training
    for name in ("image", "image_key"):
        batch[name] = torch.randn(b, 3, cfg.image_size, cfg.image_size)
    return batch | {"text_key": text.flip(1), "text_key_mask": mask.long(),
                    "text_valid": torch.ones(b, dtype=torch.long)}


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {name: value for name, value in PRESETS["tiny"].items() if name not in TASKS}
    cfg = Config(**sizes, vocab_size=200, tag_width=6)
    for task in TASKS:
        model = Mct(cfg, task, num_labels=20).train()
        out = model(demo_batch(cfg, task))
        out["loss"].backward()
        size = sum(p.numel() for p in model.parameters())
        logs = {name: round(value.item(), 3) for name, value in out["logs"].items()}
        print(f"{task:<15}{size:>10,} parameters ", logs)
