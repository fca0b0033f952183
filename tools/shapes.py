"""The built-in world: small pictures of coloured shapes, in the files of the real data sets.

A scene is one to three objects on a 3x3 grid, drawn at 64x64 pixels. Everything follows from it:

    scene (1-3 objects: row, column, size, color, shape)
    |-- draw_scene() ----------> images/{train,val,test}/000000.jpg
    |                            instances_{split}.json         COCO instances, run-length masks
    |-- region_features() -----> regions_{split}.safetensors    boxes and features of data.py
    |-- draw_plan() -> say() --> pairs_{split}.jsonl            5 captions, 5 paraphrases, tags
    |                            clean.jsonl, noisy.jsonl       the training pairs, cut in two
    |-- ask() -----------------> vqa_{split}_questions.json, vqa_{split}_annotations.json    VQA v2
    |-- draw_plan(), edit() ---> ve_{split}.jsonl  SNLI-VE      sts_{split}.csv  STS-B, graded 0-5
    |-- NLVR_HAS, NLVR_COUNT --> nlvr2_{split}.jsonl            NLVR2
    |-- write_hashing() -------> hashing/{train,database,test}.txt                  CSQ's lists
    |-- write_classes() -------> classes/{train,val}/SIZE_COLOR/*.jpg               ImageFolder
    '-- write_clips() ---------> clips/videodatainfo.json       MSR-VTT
                                 clips/features/VIDEO_ID.npy    (frames, 240) float32

`ensure()` makes the world on first use (about 20 s on two cores), reuses it afterwards, and makes
it anew when this file has changed. data.py then reads it exactly as it reads COCO. No scene occurs
in two splits: train 10,000, val 1,000, test 1,000.

What a sentence says is a `Plan`: some objects, some of their attributes, at most one relation,
perhaps the number of objects. `say` puts a plan into words at random, `parse` reads the plan back,
and `holds` tells whether it is true of a scene. A paraphrase is the same plan in other words; a
wrong statement is a plan with one thing changed. `oracle_recall`, the best that image-text
retrieval can reach on this world, is parse and holds.

Image paths in the records are relative to the world's root. image_id is the picture's place in its
split plus 0 (train), 100,000 (val) or 200,000 (test).

    python -m tools.shapes                       # datasets/shapes; prints counts and the best R@1
    python -m tools.shapes --sheet sheet.png     # and a contact sheet to look at
"""

import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from random import Random
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import tools

ROOT = Path(__file__).resolve().parent.parent / "datasets" / "shapes"
COUNTS = {"train": 10000, "val": 1000, "test": 1000}                # pictures
FIRST_ID = {"train": 0, "val": 100000, "test": 200000}
CLEAN = 2000                        # training pictures in clean.jsonl; noisy.jsonl has the others
SIDE = 64                           # pixels; a cell of the 3x3 grid is 21.3 pixels wide
MAX_WORDS = 20                      # of a sentence, commas counted; with [CLS] and [SEP] 22 tokens

# --------------------------------------------------------------------------------------------------
# Words. All text is made from the tables of this section, so vocabulary() can read it off them.

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "bar")
COLORS = {
    "red": (214, 30, 36), "orange": (250, 142, 24), "yellow": (247, 232, 48),
    "green": (30, 150, 50), "blue": (36, 70, 226), "purple": (150, 40, 190),
    "white": (250, 250, 250), "black": (14, 14, 16),
}
SIZES = ("small", "large")
ROWS, COLS = ("top", "middle", "bottom"), ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SYNONYMS = {
    "circle": ("disk", "dot"), "square": ("box",), "triangle": ("wedge",), "cross": ("plus",),
    "ring": ("hoop",), "moon": ("crescent",), "bar": ("plank",), "red": ("scarlet",),
    "yellow": ("golden",), "green": ("emerald",), "purple": ("violet",),
    "small": ("little", "tiny"), "large": ("big",), "top": ("upper",), "bottom": ("lower",),
}
RELATIONS = {
    "above": ("above", "over"), "below": ("below", "under", "beneath"),
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
}
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}

# captions
THINGS = ("shape", "object", "thing", "figure")
LEADS = ("there is", "here is", "a picture of", "an image of", "a scene with", "we see")
COUNT_LEADS = ("{n},", "a picture of {n},", "we see {n},", "{n} including")
ALONE = ("only", "just", "nothing but", "a picture of only", "there is just")   # exactly one object
PLACES = ("in the", "at the")
VERBS = ("is", "sits", "lies", "there is")                  # "in the center sits a red ring"

# statements that no picture can confirm or deny
NEUTRAL = (
    "{x} was painted on a monday", "{x} was made by my sister", "someone paid ten coins for {x}",
    "{x} is a gift for a friend", "a child dreamed of {x} last night",
    "{x} used to be much more expensive", "the artist likes {x} best",
    "{x} was drawn before breakfast", "nobody will remember {x} next year",
    "{x} belongs to an old museum", "{x} reminds her of the summer",
    "{x} was moved here from another city", "the owner wants to sell {x} tomorrow",
    "it took an hour to paint {x}", "{x} smells of fresh paint",
    "my brother thinks that {x} is boring",
)

QUESTIONS = {
    "color": ("what color is the {}?", "which color does the {} have?"),
    "shape": ("what shape is the {}?", "which shape is the {}?"),
    "at": ("what shape is {}?", "which shape is {}?"),
    "where": ("where is the {}?", "where do you see the {}?"),
    "count": ("how many {} are there?", "how many {} do you see?"),
    "exist": ("is there {}?", "do you see {}?"),
    "size": ("is the {} large or small?", "what size is the {}?"),
    "relation": ("is the {} {} the {}?",),
}
QUESTION_MIX = {"color": 26, "shape": 24, "where": 20, "count": 12, "exist": 8,
                "size": 5, "relation": 5}                   # in percent

# sentences about two pictures, each with the (left, right) that make it true; 1 = shows {x}
NLVR_HAS = (
    ("the left image {v} {x}", {(1, 0), (1, 1)}),
    ("the right image {v} {x}", {(0, 1), (1, 1)}),
    ("both images {v} {x}", {(1, 1)}),
    ("neither image {v} {x}", {(0, 0)}),
    ("exactly one image {v} {x}", {(1, 0), (0, 1)}),
    ("at least one image {v} {x}", {(1, 0), (0, 1), (1, 1)}),
)
NLVR_VERBS = (("shows", "show"), ("contains", "contain"))   # of one image, of two
NLVR_COUNT = (
    ("the left image contains more {t} than the right image", lambda a, b: a > b),
    ("the left image contains fewer {t} than the right image", lambda a, b: a < b),
    ("the left image contains twice as many {t} as the right image", lambda a, b: a == 2 * b),
    ("both images contain the same number of {t}", lambda a, b: a == b),
    ("there are four {t} in total", lambda a, b: a + b == 4),
    ("there are five {t} in total", lambda a, b: a + b == 5),
)

# sentences about clips
MOVES = ("moves", "slides", "glides")
WAYS = {"right": ("to the right", "rightward"), "left": ("to the left", "leftward"),
        "up": ("up", "upward"), "down": ("down", "downward")}
SPEEDS = {"slow": ("slowly", "gently"), "fast": ("quickly", "fast")}
STILL = ("stays still", "does not move")

JOINS = ("and", "with", "while", "there are", "yes", "no", "an")    # words of no other table


def plural(word):
    """'circle' -> 'circles', 'box' -> 'boxes', 'plus' -> 'pluses'."""
    return word + ("es" if word.endswith(("s", "x", "ch")) else "s")


def words_of(table):
    """The set of words in a string, or in any nesting of dicts (keys too), tuples and lists."""
    if isinstance(table, str):
        text = re.sub(r"\{\w*\}", " ", table)               # without the {x} of a template
        return set(re.findall(r"[a-z]+|[,?]", text))

    # a collection has the words of its parts
    if isinstance(table, dict):
        parts = [*table.keys(), *table.values()]
    elif isinstance(table, (tuple, list)):
        parts = table
    else:
        parts = ()                                          # numbers and functions have no words
    found = set()
    for part in parts:
        found |= words_of(part)
    return found


def vocabulary():
    """The lines of vocab.txt: BERT's five special tokens, every word of the world, then single
    letters, digits and signs, and the ## forms of letters and digits."""
    tables = (SHAPES, COLORS, SIZES, ROWS, COLS, NUMBERS, SYNONYMS, RELATIONS, THINGS, LEADS,
              COUNT_LEADS, ALONE, PLACES, VERBS, NEUTRAL, tuple(QUESTIONS.values()), NLVR_HAS,
              NLVR_VERBS, NLVR_COUNT, MOVES, WAYS, SPEEDS, STILL, JOINS)
    found = words_of(tables)

    # what is counted also stands in the plural
    for shape in SHAPES:
        found |= {plural(word) for word in (shape, *SYNONYMS.get(shape, ()))}
    found |= {plural(word) for word in THINGS}

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    singles = letters + list(".,?!'-")
    return specials + sorted(found - set(singles)) + singles + ["##" + c for c in letters]


# --------------------------------------------------------------------------------------------------
# Scenes

class Obj(NamedTuple):
    """One object of a scene, or what a sentence says of it. There the size and the place (row and
    column) may be None: not mentioned."""
    row: Optional[int]                                      # 0 top .. 2 bottom
    col: Optional[int]                                      # 0 left .. 2 right
    size: Optional[str]
    color: str
    shape: str


def draw_objects(rng, n):
    """A scene: a tuple of n objects in different cells, in reading order. No two agree in both
    color and shape, so that these two words name an object."""
    names = []
    while len(names) < n:
        color = rng.choice(list(COLORS))
        shape = rng.choice(SHAPES)
        # some scenes show a color or a shape twice: something to count and to confuse
        if names and rng.random() < 0.3:
            first_color, first_shape = names[0]
            color, shape = rng.choice([(first_color, shape), (color, first_shape)])
        if (color, shape) not in names:
            names.append((color, shape))

    cells = sorted(rng.sample(range(9), n))
    rng.shuffle(names)

    scene = []
    for cell, (color, shape) in zip(cells, names):
        scene.append(Obj(cell // 3, cell % 3, rng.choice(SIZES), color, shape))
    return tuple(scene)


@functools.lru_cache(maxsize=2)
def all_scenes(seed=0, scale=1.0):
    """{split: list of scenes}, 8 % with one object, 72 % with two, 20 % with three.

    No scene occurs twice in the world. The single objects of val, and those of test, differ in
    more than their size, because not every caption tells the size.
    """
    rng = Random(f"scenes {seed}")
    scenes, seen = {}, set()
    for split in ("test", "val", "train"):
        count = round(COUNTS[split] * scale)
        numbers = [1] * round(0.08 * count) + [2] * round(0.72 * count)
        numbers += [3] * (count - len(numbers))
        rng.shuffle(numbers)

        scenes[split], singles = [], set()
        for n in numbers:
            # draw until the scene is new
            while True:
                scene = draw_objects(rng, n)
                sizeless = scene[0]._replace(size=None)
                confusable = n == 1 and split != "train" and sizeless in singles
                if scene not in seen and not confusable:
                    break

            seen.add(scene)
            if n == 1:
                singles.add(sizeless)
            scenes[split].append(scene)
    return scenes


# --------------------------------------------------------------------------------------------------
# Sentences: draw_plan -> say -> parse -> holds

class Plan(NamedTuple):
    """What a sentence says: the objects it mentions, at most one relation between two of them,
    and how many objects there are."""
    mentions: frozenset                                     # of Obj
    relation: frozenset = frozenset()                       # of (Obj a, "above" or "left", Obj b):
    count: Optional[int] = None                             # a is above b; two of them = diagonal


# What a caption of n objects says: in how many places they are, and whether there is a relation.
SAYS = {
    1: ((1, False),),
    2: ((2, False), (1, True), (2, True)),
    3: ((1, False), (2, False), (1, True)),
}


def draw_plan(scene, rng, brief=False):
    """Chooses what a caption says of `scene`: both of two objects, two or all of three, with so
    many places and relations that few other scenes fit.

    brief: a short statement instead, about one or two objects or only their number, which many
    scenes may fit.
    """
    if brief and rng.random() < 0.12:
        return Plan(frozenset(), count=len(scene))

    # how many objects, and how many of them with their place
    most = 2 if brief else 3
    fewer = max(most - 1, 1)
    mentioned = most if rng.random() < 0.5 else fewer
    picks = rng.sample(scene, min(len(scene), mentioned))
    if brief:
        places, relate = int(rng.random() < 0.5), len(picks) > 1
    else:
        places, relate = rng.choice(SAYS[len(picks)])

    # two names and one place would fit many scenes: mostly say the sizes too
    sized = 0.9 if len(picks) == 2 and places == 1 and not brief else 0.6
    said = []
    for i, o in enumerate(picks):
        if rng.random() >= sized:
            o = o._replace(size=None)
        if i >= places:
            o = o._replace(row=None, col=None)
        said.append(o)

    relation = draw_relation(picks, said, rng) if relate else []

    # the number tells a single object from one among others
    counted = not brief and (len(scene) == 1 or rng.random() < 0.2)
    return Plan(frozenset(said), frozenset(relation), len(scene) if counted else None)


def draw_relation(picks, said, rng):
    """How the first two objects of `picks` lie to each other: a list of one or two relations
    between their mentions, the first two of `said`."""
    rng.random()                # decides nothing, but without it a seed would give another world
    (one, two), (say_one, say_two) = picks[:2], said[:2]
    relation = []
    if one.row != two.row:
        upper, lower = (say_one, say_two) if one.row < two.row else (say_two, say_one)
        relation.append((upper, "above", lower))
    if one.col != two.col:
        left, right = (say_one, say_two) if one.col < two.col else (say_two, say_one)
        relation.append((left, "left", right))

    # a diagonal has two, of which most captions say one
    if len(relation) == 2 and rng.random() < 0.65:
        relation = [rng.choice(relation)]
    return relation


def wording(word, rng, synonyms):
    """`word` or, with probability `synonyms`, one of its synonyms."""
    if word in SYNONYMS and rng.random() < synonyms:
        return rng.choice(SYNONYMS[word])
    return word


def name(o, rng, synonyms, article="a"):
    """'a big red disk': the mentioned attributes of an object. article: "a" (then "an" before a
    vowel), "the", or "" for none."""
    mentioned = [word for word in (o.size, o.color, o.shape) if word]
    text = " ".join(wording(word, rng, synonyms) for word in mentioned)
    if article == "a" and text[0] in "aeiou":
        article = "an"
    return f"{article} {text}".strip()


def place(o, rng=None, synonyms=0.0):
    """'upper left', 'center': the cell of an object; without `rng` its one canonical name."""
    if (o.row, o.col) == (1, 1):
        return "middle" if rng and rng.random() < synonyms else "center"
    row = wording(ROWS[o.row], rng, synonyms) if rng else ROWS[o.row]
    return f"{row} {COLS[o.col]}"


def name_and_place(o, rng, synonyms):
    """'a red disk in the upper left', the place only if it is mentioned."""
    text = name(o, rng, synonyms)
    if o.row is None:
        return text
    return f"{text} {rng.choice(PLACES)} {place(o, rng, synonyms)}"


def relation_word(a, b, relation, rng):
    """How a lies to b: 'above', 'to the left of', 'below and right of'."""
    said = []
    for axis in ("above", "left"):
        if (a, axis, b) in relation:
            said.append(rng.choice(RELATIONS[axis]))
        elif (b, axis, a) in relation:
            said.append(rng.choice(RELATIONS[OPPOSITE[axis]]))
    return " and ".join(said)


def say_clauses(plan, rng, synonyms):
    """The clauses of a sentence, in random order: a list of (inverted, text). An inverted clause
    begins with a place or a relation: "in the center sits a red ring"."""
    objects = sorted(plan.mentions, key=repr)       # a set's own order differs between processes
    rng.shuffle(objects)
    in_relation = {o for a, _, b in plan.relation for o in (a, b)}
    related = [o for o in objects if o in in_relation]
    clauses = []

    # the two objects of the relation share a clause
    if related:
        a, b = related
        how = relation_word(a, b, plan.relation, rng)
        inverted = rng.random() >= 0.75
        if inverted:
            text = f"{how} {name_and_place(b, rng, synonyms)} "
            text += f"{rng.choice(VERBS)} {name_and_place(a, rng, synonyms)}"
        else:
            text = f"{name_and_place(a, rng, synonyms)} {how} {name_and_place(b, rng, synonyms)}"
        clauses.append((inverted, text))

    # each of the others has its own
    for o in objects:
        if o in related:
            continue
        inverted = o.row is not None and rng.random() < 0.2
        if inverted:
            text = f"{rng.choice(PLACES)} {place(o, rng, synonyms)} "
            text += f"{rng.choice(VERBS)} {name(o, rng, synonyms)}"
        else:
            text = name_and_place(o, rng, synonyms)
        clauses.append((inverted, text))

    rng.shuffle(clauses)
    return clauses


def say(plan, rng, synonyms=0.25):
    """Puts a Plan into words at random. caption := [lead] clause {("and" | "with") clause};
    clause := object | PLACE VERB object | object RELATION object | RELATION object VERB object;
    object := NAME [PLACE]."""
    # "three figures"
    number = None
    if plan.count is not None:
        things = rng.choice(THINGS)
        number = f"{NUMBERS[plan.count]} {things if plan.count == 1 else plural(things)}"
    if not plan.mentions:
        there = "there is" if plan.count == 1 else "there are"
        return f"{rng.choice((there, 'we see', 'a picture of'))} {number}"

    # "a red ring in the center and a blue star"
    clauses = say_clauses(plan, rng, synonyms)
    inverted, text = clauses[0]
    for other_inverted, clause in clauses[1:]:
        text += " and " if other_inverted or rng.random() < 0.7 else " with "
        text += clause

    # what stands before it: only some leads go with an inverted clause
    if plan.count == 1 and not inverted and rng.random() < 0.7:
        return f"{rng.choice(ALONE)} {text}"
    if plan.count is not None:
        leads = COUNT_LEADS[:-1] if inverted else COUNT_LEADS
        return f"{rng.choice(leads).format(n=number)} {text}"
    if inverted or rng.random() < 0.6:
        return text
    return f"{rng.choice(LEADS)} {text}"


# every word of an object, a place or a relation -> the word of the tables that it stands for
CANON = {word: word for word in (*SHAPES, *COLORS, *SIZES, *ROWS, *COLS)}
CANON |= {synonym: word for word, synonyms in SYNONYMS.items() for synonym in synonyms}
CANON |= dict.fromkeys(RELATIONS["above"], "above") | dict.fromkeys(RELATIONS["below"], "below")

LEAD = re.compile(
    rf"^(?:(?P<alone>{'|'.join(ALONE)}) )?(?:(?:{'|'.join(LEADS)}|there are) )?"
    rf"(?:(?P<count>{'|'.join(NUMBERS)}) (?:{'|'.join(THINGS)})s?(?:,| including|$) ?)?")


def parse(text):
    """The inverse of `say`: a caption -> its Plan. ValueError for text that say does not write."""
    return Parser(text).caption()


class Parser:
    """Reads a caption word by word: one method for each rule of say's grammar."""

    def __init__(self, text):
        self.text = text
        self.lead = LEAD.match(text)
        self.words = text[self.lead.end():].split() + ["."] * 3     # so one may look two ahead
        self.at = 0                                                 # the next word to be read
        self.mentions, self.relation = [], set()

    def caption(self):
        while self.words[self.at] != ".":
            self.clause()
            self.skip("and", "with")

        count = None
        if self.lead["alone"]:
            count = 1
        elif self.lead["count"]:
            count = NUMBERS.index(self.lead["count"])
        return Plan(frozenset(self.mentions), frozenset(self.relation), count)

    def clause(self):
        # PLACE VERB object
        if self.words[self.at] in ("in", "at"):
            where = self.place()
            self.skip("there", *VERBS)
            self.object(where)

        # RELATION object VERB object
        elif self.at_relation():
            relations, b = self.relations(), self.object()
            self.skip("there", *VERBS)
            self.relate(self.object(), relations, b)

        # object [RELATION object]
        else:
            a = self.object()
            if self.at_relation():
                self.relate(a, self.relations(), self.object())

    def object(self, where=None):
        self.skip("a", "an", "the")
        size, color, shape = self.read_if(SIZES), self.read(COLORS), self.read(SHAPES)
        if where is None:
            where = self.place() if self.words[self.at] in ("in", "at") else (None, None)
        self.mentions.append(Obj(*where, size, color, shape))
        return self.mentions[-1]

    def place(self):
        """'in the upper left', 'in the middle' -> (row, column)"""
        self.skip("in", "at", "the")
        _, second, third = self.words[self.at:self.at + 3]

        # "in the middle left" is a cell, "in the middle left of a star" is the middle
        two_words = second in COLS and third != "of"
        if self.words[self.at] in ("center", "middle") and not two_words:
            self.skip("center", "middle")
            return 1, 1
        return ROWS.index(self.read(ROWS)), COLS.index(self.read(COLS))

    def at_relation(self):
        word, second = self.words[self.at:self.at + 2]
        return CANON.get(word) in ("above", "below") or word == "to" or second == "of"

    def relations(self):
        """'above and to the left of' -> ["above", "left"]"""
        said = [self.read_if(("above", "below"))]
        if said[0] is None or self.words[self.at] == "and":
            self.skip("and", "to", "the")
            said.append(self.read(("left", "right")))
            self.skip("of")
        return [word for word in said if word]

    def relate(self, a, relations, b):
        for word in relations:
            if word in ("above", "left"):
                self.relation.add((a, word, b))
            else:
                self.relation.add((b, OPPOSITE[word], a))

    def skip(self, *words):
        """Passes all next words that are among `words`; some of a table's entries are two words."""
        while self.words[self.at] in words:
            self.at += 1

    def read_if(self, kinds):
        """The canonical form of the next word, which is passed, or None if it is not of `kinds`."""
        word = CANON.get(self.words[self.at])
        if word not in kinds:
            return None
        self.at += 1
        return word

    def read(self, kinds):
        word = self.read_if(kinds)
        if word is None:
            raise ValueError(f"shapes.parse: '{self.words[self.at]}' is no {'/'.join(kinds)} "
                             f"in: {self.text}")
        return word


def holds(plan, scene):
    """Whether all that a Plan says is true of a scene."""
    real = {(o.color, o.shape): o for o in scene}

    # each object is there, with the size and place that are said
    for said in plan.mentions:
        o = real.get((said.color, said.shape))
        if o is None:
            return False
        if said.size is not None and said.size != o.size:
            return False
        if said.row is not None and (said.row, said.col) != (o.row, o.col):
            return False

    # they lie to each other as is said
    for a, axis, b in plan.relation:
        a, b = real[a.color, a.shape], real[b.color, b.shape]
        true = a.row < b.row if axis == "above" else a.col < b.col
        if not true:
            return False

    return plan.count is None or plan.count == len(scene)


def edit(text, rng, synonyms=0.25):
    """The sentence with one word changed: a color, shape or size for another, above <-> below,
    left <-> right, top <-> bottom. A sentence without such a word comes back as it is."""
    words = text.split()
    swaps = {**OPPOSITE, "small": "large", "large": "small", "top": "bottom", "bottom": "top"}
    changeable = {*COLORS, *SHAPES, *swaps}
    spots = [i for i, word in enumerate(words) if CANON.get(word) in changeable]
    if not spots:
        return text

    # another word of the same kind
    spot = rng.choice(spots)
    old = CANON[words[spot]]
    if old in swaps:
        new = swaps[old]
    else:
        kind = COLORS if old in COLORS else SHAPES
        new = rng.choice([word for word in kind if word != old])

    # ... or one of its synonyms, with the article that it asks for
    if new in ("above", "below"):
        words[spot] = rng.choice(RELATIONS[new])
    else:
        words[spot] = wording(new, rng, synonyms)
    text = re.sub(r"\ban? (?=[aeiou])", "an ", " ".join(words))
    return re.sub(r"\ban? (?=[^aeiou\W])", "a ", text)


def short(text):
    """Whether a sentence keeps to MAX_WORDS."""
    return len(text.split()) + text.count(",") <= MAX_WORDS


def captions_of(scene, rng, n=5):
    """n captions of a scene, all different, and n paraphrases, each the same Plan as the caption
    at its position."""
    captions, paraphrases = [], []
    while len(captions) < n:
        plan = draw_plan(scene, rng)
        one, two = say(plan, rng), say(plan, rng, 0.6)
        if one != two and one not in captions and short(one) and short(two):
            captions.append(one)
            paraphrases.append(two)
    return captions, paraphrases


def oracle_recall(root=ROOT, split="test"):
    """R@1 of a reader who understands every caption and sees every picture without fault:
    {"i2t_r1": .., "t2i_r1": ..} in 0..1.

    `parse` and `holds` score a caption 1 for the scenes it is true of, and 0 for the others. Ties
    count as misses: text->image is a hit if the caption is true of its own scene alone,
    image->text if no other picture's caption is true of the scene.
    """
    scenes, texts = [], []                                  # texts: (index of the scene, caption)
    lines = (Path(root) / f"pairs_{split}.jsonl").read_text().splitlines()
    for i, line in enumerate(lines):
        record = json.loads(line)
        scenes.append(tuple(Obj(*o) for o in record["scene"]))
        texts += [(i, caption) for caption in record["caption"]]

    # (color, shape) -> the scenes with such an object: others need not be asked
    having = {}
    for i, scene in enumerate(scenes):
        for o in scene:
            having.setdefault((o.color, o.shape), []).append(i)

    hits, confused, described = 0, set(), set()
    for owner, text in texts:
        plan = parse(text)
        mention = next(iter(plan.mentions))                 # any one will do
        candidates = having.get((mention.color, mention.shape), ())
        fits = {i for i in candidates if holds(plan, scenes[i])}
        if fits == {owner}:
            hits += 1
        described |= fits & {owner}
        confused |= fits - {owner}
    return {"i2t_r1": len(described - confused) / len(scenes), "t2i_r1": hits / len(texts)}


# --------------------------------------------------------------------------------------------------
# Pictures

PIXEL_Y, PIXEL_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5        # pixel centers


def distance(shape, x, y):
    """Signed distance (roughly; < 0 inside) to a shape of radius about 1 around the origin, y
    pointing down. x, y and the result are arrays of one shape."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.84
    if shape == "triangle":                                 # three half-planes, apex up
        return np.maximum(y - 0.72, 0.866 * abs(x) - 0.5 * y - 0.52)
    if shape == "star":
        return star_distance(x, y, radius)
    if shape == "cross":
        horizontal = np.maximum(abs(x) - 0.98, abs(y) - 0.3)
        vertical = np.maximum(abs(x) - 0.3, abs(y) - 0.98)
        return np.minimum(horizontal, vertical)
    if shape == "ring":
        return abs(radius - 0.73) - 0.25
    if shape == "moon":                                     # a disk without another disk
        return np.maximum(radius - 1.0, 0.8 - np.hypot(x - 0.5, y))
    return np.maximum(abs(x) - 1.0, abs(y) - 0.34)          # bar


def star_distance(x, y, radius):
    # fold the plane onto one half of one of the five arms
    arm = 2 * math.pi / 5
    angle = abs((np.arctan2(x, -y) + arm / 2) % arm - arm / 2)
    px, py = radius * np.cos(angle), radius * np.sin(angle)

    # there the star has one edge: from its tip (1.08, 0) to a notch, 36 degrees on, at 0.45
    edge_x = 0.45 * math.cos(math.pi / 5) - 1.08
    edge_y = 0.45 * math.sin(math.pi / 5)
    return ((px - 1.08) * -edge_y + py * edge_x) / -math.hypot(edge_x, edge_y)


def background(rng):
    """A muted ground, (64, 64, 3) float32 in 0..255: greyish, a slope of light, faint stripes."""
    tint = rng.uniform(95, 150) + rng.uniform(-12, 12, 3)
    slope_angle, stripe_angle = rng.uniform(0, 2 * math.pi, 2)
    slope_height, stripe_height = rng.uniform(0, (20, 4))

    across = (PIXEL_X - 32) * math.cos(slope_angle) + (PIXEL_Y - 32) * math.sin(slope_angle)
    slope = slope_height * across / 32
    across = PIXEL_X * math.cos(stripe_angle) + PIXEL_Y * math.sin(stripe_angle)
    stripes = stripe_height * np.sin(across * rng.uniform(0.3, 1.2))
    return (tint + (slope + stripes)[..., None]).astype(np.float32)


def paint(ground, objects, rng):
    """Paints objects on a ground (64, 64, 3) float32, edges smoothed over one pixel.

    objects: (x, y, radius, turn, color, shape) each, in pixels and radians.
    -> picture (64, 64, 3) uint8 with noise, list of (64, 64) bool masks
    """
    picture, masks = ground, []
    for x, y, radius, turn, color, shape in objects:
        # pixel centers in the shape's own coordinates
        cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
        dx, dy = PIXEL_X - x, PIXEL_Y - y
        far = distance(shape, cos * dx + sin * dy, cos * dy - sin * dx)

        # each object has its own shade of its color
        cover = np.clip(0.5 - radius * far, 0, 1)
        shade = np.asarray(COLORS[color], np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
        picture = picture + cover[..., None] * (shade - picture)
        masks.append(cover > 0.5)

    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * 3
    return np.clip(picture + noise, 0, 255).astype(np.uint8), masks


def draw_scene(scene, rng):
    """Draws a scene on the grid -> what paint() returns. A large object has a radius of about 10
    pixels, a small one of 7. Nothing overlaps or leaves the picture."""
    objects = []
    for o in scene:
        if o.size == "large":
            radius, jitter = rng.uniform(9.6, 10.0), 0.5
        else:
            radius, jitter = rng.uniform(6.6, 7.2), 2.4
        cell_center = (np.array([o.col, o.row]) + 0.5) * SIDE / 3
        x, y = cell_center + rng.uniform(-jitter, jitter, 2)
        objects.append((x, y, radius, rng.uniform(-0.12, 0.12), o.color, o.shape))
    return paint(background(rng), objects, rng)


def save_jpeg(picture, path):
    Image.fromarray(picture).save(path, quality=95, subsampling=0)


def run_lengths(mask):
    """Mask (H, W) bool -> COCO's uncompressed run lengths, column by column. The first run is
    background, of length 0 if the first pixel is not."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat[0]:
        lengths = [0] + lengths
    return {"size": list(mask.shape), "counts": lengths}


def box_of(mask):
    """Mask (H, W) bool -> [x0, y0, x1, y1] in pixels, the far edges exclusive."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]


# --------------------------------------------------------------------------------------------------
# Regions: a stand-in for what a detector would find, in the format that data.py describes

CROP, REGION_SIZE = 8, 128
STAND_IN = ("a stand-in for a detector: the boxes and labels of the data itself, each crop at "
            f"{CROP}x{CROP} pixels times a fixed random matrix")
SAFE_TYPES = {"int64": "I64", "float32": "F32", "float16": "F16", "uint8": "U8"}


@functools.lru_cache(maxsize=1)
def crop_projection():
    """The fixed random matrix, (8 * 8 * 3, 128) float32."""
    matrix = np.random.default_rng(0).standard_normal((CROP * CROP * 3, REGION_SIZE))
    return matrix.astype(np.float32) / math.sqrt(CROP * CROP * 3)


def region_features(picture, boxes):
    """The features of n boxes (xyxy in pixels) of a PIL picture: (n, 128) float16."""
    crops = []
    for box in boxes:
        crop = picture.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)
        crops.append(np.asarray(crop, np.float32).ravel())
    crops = np.stack(crops) / 127.5 - 1                     # (n, 192), -1..1
    return (crops @ crop_projection()).astype(np.float16)


def write_regions(path, records, features, home):
    """Writes the regions file of a split.

    records: those of the pairs, in order; features: one (n, 128) float16 array for each.
    home: the folder that image paths start from once the world is in its place.
    """
    # boxes and labels of all pictures, one after the other, and how many each picture has
    boxes, labels, counts, names = [], [], [], []
    for record in records:
        boxes += record["boxes"]
        labels += record["labels"]
        counts.append(len(record["labels"]))
        names.append(record["image"].encode())

    tensors = {
        "labels": np.array(labels, np.int64),
        "offsets": np.cumsum([0] + counts, dtype=np.int64),
        "sizes": np.full((len(records), 2), SIDE, np.int64),
        "name_ends": np.cumsum([len(text) for text in names], dtype=np.int64),
        "boxes": np.array(boxes, np.float32),
        "scores": np.ones(len(labels), np.float32),
        "features": np.concatenate(features),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    metadata = {"detector": STAND_IN, "root": str(home), "label_names": json.dumps(SHAPES)}
    write_safetensors(path, tensors, metadata)


def write_safetensors(path, tensors, metadata):
    """{name: array} and {name: text} -> a safetensors file: the header's length in 8 bytes, the
    header in JSON, the arrays. The safetensors package writes metadata in an order that differs
    from call to call; here the same content has the same bytes.

    Name tensors with wide numbers first: then each begins at a multiple of its item size.
    """
    header, at = {"__metadata__": metadata}, 0
    for key, array in tensors.items():
        header[key] = {"dtype": SAFE_TYPES[array.dtype.name], "shape": list(array.shape),
                       "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            f.write(array.tobytes())


# --------------------------------------------------------------------------------------------------
# Files. Each function writes its own files under `root` and depends on nothing but its arguments,
# so that processes can share the work.

def write_jsonl(path, records):
    with open(path, "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


def picture_path(split, i):
    return f"images/{split}/{i:06d}.jpg"


def draw_pairs(root, seed, scale, split, start, stop):
    """Draws pictures [start, stop) of a split
    -> their records, their COCO annotations, the features of their regions (one array each)."""
    records, annotations, features = [], [], []
    scenes = all_scenes(seed, scale)[split]
    for i in range(start, stop):
        scene, image_id, path = scenes[i], FIRST_ID[split] + i, picture_path(split, i)
        picture, masks = draw_scene(scene, np.random.default_rng([seed, image_id]))
        save_jpeg(picture, root / path)

        boxes = [box_of(mask) for mask in masks]
        labels = [SHAPES.index(o.shape) for o in scene]
        for k, mask in enumerate(masks):
            annotations.append(annotation(image_id, k, labels[k], boxes[k], mask))

        # features of what a reader will see: the JPEG, not what was drawn
        with Image.open(root / path) as image:
            features.append(region_features(image.convert("RGB"), boxes))

        tags = set()
        for o in scene:
            tags |= {o.color, o.shape, f"{o.color} {o.shape}"}
        captions, paraphrases = captions_of(scene, Random(f"captions {seed} {image_id}"))
        records.append({
            "image": path, "image_id": image_id, "split": split, "caption": captions,
            "paraphrase": paraphrases, "tags": sorted(tags), "boxes": boxes, "labels": labels,
            "label_names": [o.shape for o in scene], "scene": scene,
        })
    return records, annotations, features


def annotation(image_id, k, label, box, mask):
    """COCO's annotation of the k-th object of a picture. Categories count from 1."""
    x0, y0, x1, y1 = box
    return {"id": image_id * 10 + k, "image_id": image_id, "category_id": label + 1, "iscrowd": 0,
            "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(mask.sum()),
            "segmentation": run_lengths(mask)}


def write_instances(path, records, annotations):
    images, categories = [], []
    for record in records:
        images.append({"id": record["image_id"], "file_name": record["image"],
                       "height": SIDE, "width": SIDE})
    for number, shape in enumerate(SHAPES, 1):
        categories.append({"id": number, "name": shape, "supercategory": "shape"})

    content = {"info": {"description": "nanovlp shapes"}, "images": images,
               "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content, separators=(",", ":")))


def write_noisy_and_clean(root, seed, scale, records):
    """Cuts the training pairs in two, for a study of pre-training in stages: clean.jsonl keeps
    2,000 pictures with their captions; of the others, in noisy.jsonl, half have the captions of
    another picture, as the pairs of a web crawl may."""
    order = Random(seed).sample(range(len(records)), len(records))
    cut = round(CLEAN * scale)
    clean, noisy = order[:cut], order[cut:]

    # the order is random, so it will do to give each the captions of the next
    wrong = noisy[:round(0.5 * len(noisy))]
    captions_from = dict(zip(wrong, wrong[1:] + wrong[:1]))

    for stem, chosen in (("clean", clean), ("noisy", noisy)):
        lines = []
        for i in sorted(chosen):
            teller = records[captions_from.get(i, i)]
            lines.append({"image": records[i]["image"], "image_id": records[i]["image_id"],
                          "caption": teller["caption"]})
        write_jsonl(root / f"{stem}.jsonl", lines)


def ask(scene, rng, kind):
    """One question of a kind of QUESTIONS -> (question, answer, answers that make sense, official
    answer type). An answer is a color, a shape, a place ("top left"), a digit, yes or no, large or
    small."""
    o = rng.choice(scene)
    shape, color = wording(o.shape, rng, 0.2), wording(o.color, rng, 0.2)
    text = rng.choice(QUESTIONS[kind])

    if kind == "color":
        # by its shape if no other object has it, else by its place
        known = shape
        if sum(other.shape == o.shape for other in scene) > 1:
            known = f"{rng.choice(THINGS)} {rng.choice(PLACES)} {place(o)}"
        return text.format(known), o.color, list(COLORS), "other"

    if kind == "shape":
        if sum(other.color == o.color for other in scene) > 1 or rng.random() < 0.3:
            text = rng.choice(QUESTIONS["at"])
            known = f"{rng.choice(PLACES)} {place(o)}"
        else:
            known = f"{color} {rng.choice(THINGS)}"
        return text.format(known), o.shape, list(SHAPES), "other"

    if kind == "where":
        cells = [o._replace(row=i // 3, col=i % 3) for i in range(9)]
        return text.format(f"{color} {shape}"), place(o), list(map(place, cells)), "other"
    if kind == "size":
        return text.format(f"{color} {shape}"), o.size, list(SIZES), "other"
    if kind == "count":
        return ask_count(scene, rng, o, text)
    if kind == "relation" and len(scene) > 1:
        return ask_relation(scene, rng, text)
    return ask_exist(scene, rng, o)                 # also the "relation" of a lonely object


def ask_count(scene, rng, o, text):
    what = rng.choice(("objects", "color", "shape"))
    if what == "objects":
        known, n = plural(rng.choice(THINGS)), len(scene)

    # twice in three times a color or shape that is there
    elif what == "color":
        color = rng.choice((o.color, o.color, rng.choice(list(COLORS))))
        known = f"{color} {plural(rng.choice(THINGS))}"
        n = sum(other.color == color for other in scene)
    else:
        shape = rng.choice((o.shape, o.shape, rng.choice(SHAPES)))
        known = plural(shape)
        n = sum(other.shape == shape for other in scene)
    return text.format(known), str(n), ["0", "1", "2", "3"], "number"


def ask_relation(scene, rng, text):
    a, b = rng.sample(scene, 2)
    axes = []                                       # (axis, is a on the side that it names?)
    if a.row != b.row:
        axes.append(("above", a.row < b.row))
    if a.col != b.col:
        axes.append(("left", a.col < b.col))
    axis, so = rng.choice(axes)

    # half of the questions say it as it is
    truth = rng.random() < 0.5
    how = rng.choice(RELATIONS[axis if so == truth else OPPOSITE[axis]])
    question = text.format(f"{a.color} {a.shape}", how, f"{b.color} {b.shape}")
    return question, "yes" if truth else "no", ["yes", "no"], "yes/no"


def ask_exist(scene, rng, o):
    present = [(other.color, other.shape) for other in scene]
    if rng.random() < 0.5:
        answer, asked = "yes", (o.color, o.shape)
    else:
        # one attribute of an object changed: whoever sees only the other takes it for present
        near = [(color, o.shape) for color in COLORS]
        near += [(o.color, shape) for shape in SHAPES]
        answer, asked = "no", rng.choice([names for names in near if names not in present])

    text = rng.choice(QUESTIONS["exist"])
    known = name(Obj(None, None, None, *asked), rng, 0.2)
    return text.format(known), answer, ["yes", "no"], "yes/no"


def write_vqa(root, seed, scale, split):
    """1.5 questions a training picture, 2 otherwise. Of ten annotators eight to ten agree; the
    others give a synonym or another answer."""
    rng = Random(f"vqa {seed} {split}")
    questions, annotations = [], []
    for i, scene in enumerate(all_scenes(seed, scale)[split]):
        # two questions of one picture are of different kinds
        image_id, kinds = FIRST_ID[split] + i, []
        wanted = 1 + i % 2 if split == "train" else 2
        while len(kinds) < wanted:
            kind = rng.choices(list(QUESTION_MIX), QUESTION_MIX.values())[0]
            if kind not in kinds:
                kinds.append(kind)

        for k, kind in enumerate(kinds):
            question, answer, others, answer_type = ask(scene, rng, kind)

            # what the ten annotators say
            said = [answer] * rng.choice((8, 9, 9, 10, 10))
            while len(said) < 10:
                said.append(rng.choice(SYNONYMS.get(answer, ()) + (rng.choice(others),)))
            rng.shuffle(said)
            answers = []
            for n, one in enumerate(said, 1):
                answers.append({"answer": one, "answer_confidence": "yes", "answer_id": n})

            # the two files are joined by question_id
            key = {"image_id": image_id, "question_id": image_id * 1000 + k}
            questions.append({**key, "image": picture_path(split, i), "question": question})
            annotations.append({**key, "question_type": " ".join(question.split()[:2]),
                                "answer_type": answer_type, "multiple_choice_answer": answer,
                                "answers": answers})

    head = {"info": {"description": "nanovlp shapes", "version": "1.0"}, "data_type": "shapes",
            "data_subtype": split}
    content = {**head, "task_type": "Open-Ended", "questions": questions}
    (root / f"vqa_{split}_questions.json").write_text(json.dumps(content))
    content = {**head, "annotations": annotations}
    (root / f"vqa_{split}_annotations.json").write_text(json.dumps(content))


def write_ve(root, seed, scale, split):
    """Visual entailment, three labels in equal parts.

    A contradiction is what is true of another picture, or a true sentence with one word changed:
    its words are those of an entailment, so only the picture tells. A neutral sentence is about an
    object of the picture, and says what no picture can show.
    """
    rng, scenes = Random(f"ve {seed} {split}"), all_scenes(seed, scale)[split]
    labels = ("entailment", "neutral", "contradiction")
    per_picture = 3 if split == "train" else 4
    records = []
    for n in range(3 * (len(scenes) * per_picture // 6)):
        i, label = rng.randrange(len(scenes)), labels[n % 3]

        # until it is short enough
        text = None
        while text is None or not short(text):
            text = statement(scenes[i], label, scenes, rng)

        stem = f"{FIRST_ID[split] + i:06d}"
        records.append({"Flickr30K_ID": stem, "captionID": f"{stem}.jpg#0", "gold_label": label,
                        "pairID": f"{stem}.jpg#{n}{label[0]}", "sentence2": text,
                        "image": picture_path(split, i)})
    rng.shuffle(records)
    write_jsonl(root / f"ve_{split}.jsonl", records)


def statement(scene, label, scenes, rng):
    """A sentence that a scene entails, contradicts or is neutral to."""
    if label == "neutral":
        text = rng.choice(NEUTRAL)
        o = rng.choice(scene)._replace(size=None)
        return text.format(x=name(o, rng, 0.25, "the"))

    text = say(draw_plan(scene, rng, brief=True), rng)
    if label == "entailment":
        return text

    # until it is false: a true sentence changed, or a sentence about any scene
    while holds(parse(text), scene):
        changed = rng.random() < 0.5
        about = scene if changed else rng.choice(scenes)
        text = say(draw_plan(about, rng, brief=True), rng)
        if changed:
            text = edit(text, rng)
    return text


@functools.lru_cache(maxsize=None)
def scenes_by(seed, scale, split, wanted):
    """wanted: a tuple of attributes of one object -> (indices of the scenes without such an
    object, of those with one)."""
    without, having = [], []
    for i, scene in enumerate(all_scenes(seed, scale)[split]):
        if any(set(wanted) <= {o.size, o.color, o.shape} for o in scene):
            having.append(i)
        else:
            without.append(i)
    return without, having


def write_nlvr2(root, seed, scale, split):
    """Sentences about two pictures, each with one pair it is true of and one it is false of: words
    alone tell nothing."""
    rng, scenes = Random(f"nlvr2 {seed} {split}"), all_scenes(seed, scale)[split]
    records, wanted = [], len(scenes) * (1 if split == "train" else 2)
    while len(records) < wanted:
        # two pairs, or none if what was drawn cannot be both true and false here
        if rng.random() < 0.75:
            text, pairs = say_which_has(scenes, rng, seed, scale, split)
        else:
            text, pairs = compare_counts(scenes, rng)

        # the first is the true one; both have the same group number
        group = len(records) // 2
        for k, (left, right) in enumerate(pairs):
            records.append({"identifier": f"{split}-{group}-{k}-0", "sentence": text,
                            "label": str(k == 0), "left_image": picture_path(split, left),
                            "right_image": picture_path(split, right)})
    rng.shuffle(records)
    write_jsonl(root / f"nlvr2_{split}.jsonl", records)


def say_which_has(scenes, rng, seed, scale, split):
    """A sentence of NLVR_HAS -> (text, [pair it is true of, pair it is false of]), pairs of scenes'
    indices; the list is empty if all scenes have such an object, or none."""
    text, true_when = rng.choice(NLVR_HAS)
    o = rng.choice(rng.choice(scenes))
    color, shape = rng.choice(((o.color, o.shape), (o.color, None), (None, o.shape)))
    wanted = tuple(word for word in (color, shape) if word)
    sides = scenes_by(seed, scale, split, wanted)
    if not sides[0] or not sides[1]:
        return text, []

    # "both images show a red shape"
    what = name(Obj(None, None, None, color, shape or "shape"), rng, 0.2)
    of_one, of_two = rng.choice(NLVR_VERBS)
    text = text.format(v=of_two if "both" in text else of_one, x=what)

    pairs = []
    cases = ((0, 0), (0, 1), (1, 0), (1, 1))
    for truth in (True, False):
        left, right = rng.choice([case for case in cases if (case in true_when) == truth])
        pairs.append((rng.choice(sides[left]), rng.choice(sides[right])))
    return text, pairs


def compare_counts(scenes, rng):
    """A sentence of NLVR_COUNT -> (text, [pair it is true of, pair it is false of])."""
    text, test = rng.choice(NLVR_COUNT)
    text, pairs = text.format(t=plural(rng.choice(THINGS))), []
    for truth in (True, False):
        while True:
            left, right = rng.randrange(len(scenes)), rng.randrange(len(scenes))
            if test(len(scenes[left]), len(scenes[right])) == truth:
                break
        pairs.append((left, right))
    return text, pairs


def write_sts(root, seed, scale, split):
    """Pairs of captions with the mean of five graders.

    5 the same in other words; 4 a detail left out; 3 one word changed, which leaves most words the
    same; 2 one object in common; 1 a color or a shape in common; 0 nothing in common.
    """
    rng, scenes = Random(f"sts {seed} {split}"), all_scenes(seed, scale)[split]
    wanted = (3000 if split == "train" else 600) * scale
    lines, used = [], set()
    while len(lines) < wanted:
        level = len(lines) % 6
        plan = draw_plan(rng.choice(scenes), rng)
        one = say(plan, rng)
        two = second_sentence(level, plan, one, scenes, rng)
        if two is None:
            continue

        pair = tuple(rng.sample((one, two), 2))
        if one == two or pair in used or not short(one) or not short(two):
            continue
        used.add(pair)

        # two graders in ten are off by one
        grades = []
        for _ in range(5):
            grade = level + rng.choice((-1, 0, 0, 0, 0, 0, 0, 0, 1))
            grades.append(min(5, max(0, grade)))
        lines.append(f"main-captions\tshapes\t{split}\t{len(lines):04d}\t{sum(grades) / 5:.3f}\t"
                     f"{pair[0]}\t{pair[1]}\n")
    (root / f"sts_{split}.csv").write_text("".join(lines))


def second_sentence(level, plan, one, scenes, rng):
    """A sentence that is as similar to `one`, the wording of `plan`, as `level` says, or None if
    what was drawn is not."""
    if level == 5:
        return say(plan, rng, 0.7)
    if level == 4:
        less = rng.choice((without_sizes(plan), plan._replace(relation=frozenset()),
                           plan._replace(count=None)))
        return one if less == plan else say(less, rng, 0.4)
    if level == 3:
        return edit(one, rng)

    mine = sorted(plan.mentions, key=repr)
    my_names = {(o.color, o.shape) for o in mine}

    # one of its objects among strangers
    if level == 2:
        keep = rng.choice(mine)
        other = draw_plan(rng.choice(scenes), rng)
        strangers = sorted(other.mentions, key=repr)[:2]
        two = say(Plan(frozenset([keep] + strangers)), rng)
        met = any((o.color, o.shape) in my_names for o in strangers)
        return None if met or len(mine) < 2 else two

    # another scene with so many colors and shapes in common, and no object
    other = draw_plan(rng.choice(scenes), rng)
    names = {(o.color, o.shape) for o in other.mentions}
    colors, shapes = map(set, zip(*names))
    my_colors, my_shapes = map(set, zip(*my_names))
    common = len(colors & my_colors) + len(shapes & my_shapes)
    if common != level or names & my_names:
        return None
    return say(other, rng)


def without_sizes(plan):
    mentions = [o._replace(size=None) for o in sorted(plan.mentions, key=repr)]
    relation = []
    for a, axis, b in plan.relation:
        relation.append((a._replace(size=None), axis, b._replace(size=None)))
    return plan._replace(mentions=frozenset(mentions), relation=frozenset(relation))


def write_hashing(root, seed, scale):
    """CSQ's lists 'path 0 1 ..' with 16 labels, the shapes and the colors, of the scenes with one
    or two objects (of three, nine pairs in ten share a label). test: the queries, of the test
    split; database: the training split; train: every second picture of the database."""
    # a line for each picture
    lines = {"train": [], "test": []}
    for split, found in lines.items():
        for i, scene in enumerate(all_scenes(seed, scale)[split]):
            if len(scene) == 3:
                continue
            _, _, _, colors, shapes = zip(*scene)
            shown = {*colors, *shapes}
            labels = [str(int(word in shown)) for word in (*SHAPES, *COLORS)]
            found.append(" ".join([picture_path(split, i), *labels]) + "\n")

    # ... in one or two lists
    (root / "hashing" / "database.txt").write_text("".join(lines["train"]))
    (root / "hashing" / "train.txt").write_text("".join(lines["train"][::2]))
    (root / "hashing" / "test.txt").write_text("".join(lines["test"]))


CLASSES = sorted(f"{size}_{color}" for size in SIZES for color in COLORS)


def write_classes(root, seed, scale, split):
    """Single objects at any place; the class is size and color. 2,000 pictures in train, 500 in
    val. The 1,152 combinations of cell, size, color and shape are split between the two; pictures
    of one combination differ in jitter, ground and noise."""
    combinations = list(itertools.product(range(9), SIZES, COLORS, SHAPES))
    Random(f"classes {seed}").shuffle(combinations)
    mine = combinations[:920] if split == "train" else combinations[920:]

    # the classes take turns
    by_class = {label: [] for label in CLASSES}
    for cell, size, color, shape in mine:
        o = Obj(cell // 3, cell % 3, size, color, shape)
        by_class[f"{size}_{color}"].append(o)
    ordered = []
    for turn in itertools.zip_longest(*by_class.values()):
        ordered += [o for o in turn if o is not None]

    count, first = (2000, 300000) if split == "train" else (500, 400000)
    for i in range(round(count * scale)):
        o = ordered[i % len(ordered)]
        picture, _ = draw_scene((o,), np.random.default_rng([seed, first, i]))
        save_jpeg(picture, root / "classes" / split / f"{o.size}_{o.color}" / f"{i:06d}.jpg")


# --------------------------------------------------------------------------------------------------
# Clips

def frame_features(frames):
    """The frame descriptor of the clips. frames (T, 64, 64, 3) uint8 -> (T, 240) float32:

    0-191    the color grid: mean R, G, B in -1..1 of each of 8x8 cells, row by row
    192-207  the motion grid: mean |I_t - I_(t-1)| of each of 4x4 cells, I = mean of R, G, B in
             0..1, times 10
    208-239  its direction: normal flow of the same cells, u then v for each,
             sum(-I_t * (I_x, I_y)) / (sum(I_x^2 + I_y^2) + 1): > 0 means rightward, downward.
             I_t = I_t - I_(t-1); I_x and I_y are central differences of the two frames' mean.

    The first frame has no motion: zeros.
    """
    x = frames.astype(np.float32) / 255
    t = len(x)
    colors = x.reshape(t, 8, 8, 8, 8, 3).mean((2, 4)).reshape(t, 192) * 2 - 1

    # change and slope of brightness, between each frame and the one before
    gray = x.mean(-1)                                       # (T, 64, 64)
    change, mean = gray[1:] - gray[:-1], (gray[1:] + gray[:-1]) / 2
    slope_y, slope_x = np.gradient(mean, axis=(1, 2))

    # both summed over each of the 4x4 cells
    energy = cell_sums(slope_x ** 2 + slope_y ** 2) + 1
    u, v = cell_sums(-change * slope_x) / energy, cell_sums(-change * slope_y) / energy
    flow = np.stack([u, v], -1).reshape(t - 1, 32)
    motion = np.concatenate([cell_sums(abs(change)) * (10 / 256), flow], 1)     # (T-1, 48)

    motion = np.pad(motion, ((1, 0), (0, 0)))
    return np.concatenate([colors, motion], 1).astype(np.float32)


def cell_sums(x):
    """(T, 64, 64) -> (T, 16): sums over 16x16 pixels."""
    return x.reshape(len(x), 4, 16, 4, 16).sum((2, 4)).reshape(len(x), 16)


def draw_motions(scene, rng):
    """(way, speed) of each object, or None if it stays still. The first one always moves."""
    motions = []
    for k in range(len(scene)):
        if k == 0 or rng.random() < 0.6:
            motions.append((rng.choice(list(WAYS)), rng.choice(list(SPEEDS))))
        else:
            motions.append(None)
    return motions


def draw_track(o, motion, length, rng):
    """What paint() needs of an object in each of `length` frames."""
    radius = 9.0 if o.size == "large" else 5.6
    speed = 3.2 if motion and motion[1] == "fast" else 1.2  # pixels a frame
    directions = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
    dx, dy = directions[motion[0]] if motion else (0, 0)
    way = (length - 1) * speed

    # where it is in the middle of the clip: anywhere that keeps its whole way in the picture
    half_x, half_y = abs(dx) * way / 2, abs(dy) * way / 2
    x = rng.uniform(radius + half_x, SIDE - radius - half_x)
    y = rng.uniform(radius + half_y, SIDE - radius - half_y)

    track = []
    for frame in range(length):
        passed = frame / (length - 1) - 0.5                 # -0.5 .. 0.5 of the way
        track.append((x + dx * way * passed, y + dy * way * passed, radius, 0.0, o.color, o.shape))
    return track


def say_motion(scene, motions, rng):
    """'a red disk slides quickly to the left while a small star stays still'"""
    parts = []
    for o, motion in zip(scene, motions):
        # who
        if rng.random() >= 0.6:
            o = o._replace(size=None)
        who = name(o, rng, 0.25)

        # does what
        if motion:
            way, speed = motion
            parts.append(f"{who} {rng.choice(MOVES)} {rng.choice(SPEEDS[speed])} "
                         f"{rng.choice(WAYS[way])}")
        else:
            parts.append(f"{who} {rng.choice(STILL)}")

    rng.shuffle(parts)
    return rng.choice((" and ", " while ")).join(parts)


def write_clips(root, seed, scale):
    """600 clips (train 400, validate 100, test 100) of 8 to 12 frames, with five captions each:
    one or two objects, of which at least the first moves."""
    rng, videos, sentences, used = Random(f"clips {seed}"), [], [], set()
    splits = []
    for split, count in (("train", 400), ("validate", 100), ("test", 100)):
        splits += [split] * round(count * scale)

    for n, split in enumerate(splits):
        # no two clips show the same objects in the same motion
        while True:
            scene = draw_objects(rng, rng.choice((1, 2)))
            motions = draw_motions(scene, rng)
            key = frozenset((o[2:], motion) for o, motion in zip(scene, motions))
            if key not in used:
                break
        used.add(key)

        length = rng.randint(8, 12)
        tracks = [draw_track(o, motion, length, rng) for o, motion in zip(scene, motions)]
        frames = paint_clip(tracks, np.random.default_rng([seed, 500000, n]))
        np.save(root / "clips" / "features" / f"video{n}.npy", frame_features(frames))
        if n % 20 == 0:                                     # some to look at
            strip = Image.fromarray(np.concatenate(list(frames), 1))
            strip.save(root / "clips" / "frames" / f"video{n}.png")

        videos.append({"video_id": f"video{n}", "id": n, "split": split, "category": 0, "url": "",
                       "start time": 0.0, "end time": length / 8})
        said = []
        while len(said) < 5:
            text = say_motion(scene, motions, rng)
            if text not in said:
                said.append(text)
        for text in said:
            sentences.append({"caption": text, "video_id": f"video{n}", "sen_id": len(sentences)})

    info = {"description": "nanovlp shapes clips, features: shapes.frame_features",
            "version": "1.0"}
    content = {"info": info, "videos": videos, "sentences": sentences}
    (root / "clips" / "videodatainfo.json").write_text(json.dumps(content))


def paint_clip(tracks, rng):
    """tracks: for each object what draw_track() returns -> frames (T, 64, 64, 3) uint8."""
    ground = background(rng)
    frames = [paint(ground, objects, rng)[0] for objects in zip(*tracks)]
    return np.stack(frames)


# --------------------------------------------------------------------------------------------------
# The whole world

CHUNK = 250                         # pictures that a process draws at a time


def run_job(job):
    """(function, its arguments ...) -> what it returns. Runs in a worker process."""
    function, *arguments = job
    return function(*arguments)


def make_folders(root):
    folders = ["hashing", "clips/features", "clips/frames"]
    folders += [f"images/{split}" for split in COUNTS]
    folders += [f"classes/{split}/{label}" for split in ("train", "val") for label in CLASSES]
    for folder in folders:
        (root / folder).mkdir(parents=True)


def write_world(root, home, seed=0, scale=1.0, quiet=False):
    """Writes every file of the world under the empty directory `root`, which will be moved to
    `home`, with as many processes as there are cores (2 to 8). scale, up to 1, shrinks all counts.

    The same seed and scale give the same bytes, whatever the number of processes; only the region
    files hold the name of `home`.
    """
    make_folders(root)
    (root / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")

    # what is to be done: pictures in chunks, the other files one by one
    drawing, writing = [], []
    for split, scenes in all_scenes(seed, scale).items():
        for start in range(0, len(scenes), CHUNK):
            stop = min(start + CHUNK, len(scenes))
            drawing.append((draw_pairs, root, seed, scale, split, start, stop))
    for function in (write_vqa, write_ve, write_nlvr2, write_sts):
        writing += [(function, root, seed, scale, split) for split in COUNTS]
    writing += [(write_clips, root, seed, scale), (write_hashing, root, seed, scale)]
    writing += [(write_classes, root, seed, scale, split) for split in ("train", "val")]

    workers = min(8, max(2, os.cpu_count()))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    bar = tqdm(total=len(drawing) * CHUNK + len(writing) * 100, desc="drawing shapes", unit="",
               disable=quiet, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}")
    with context.Pool(workers) as pool, bar:
        drawn = pool.imap(run_job, drawing)
        written = pool.imap(run_job, writing)

        # the chunks of a split come in order, and become its files here
        parts = {split: ([], [], []) for split in COUNTS}   # records, annotations, features
        for job, results in zip(drawing, drawn):
            for whole, part in zip(parts[job[4]], results):
                whole += part
            bar.update(CHUNK)
        for split, (records, annotations, features) in parts.items():
            write_jsonl(root / f"pairs_{split}.jsonl", records)
            write_instances(root / f"instances_{split}.json", records, annotations)
            write_regions(root / f"regions_{split}.safetensors", records, features, home)
        write_noisy_and_clean(root, seed, scale, parts["train"][0])

        for _ in written:
            bar.update(100)


def versions(root, seed, scale):
    """version.json of the world under `root` ({} if there is none), and what it should say. scale
    None: that of the world that is there, else 1."""
    try:
        found = json.loads((root / "version.json").read_text())
    except (OSError, ValueError):                       # none, or not written by this file
        found = {}
    if scale is None:
        scale = found.get("scale", 1.0)
    generator = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return found, {"generator": generator, "seed": seed, "scale": scale}


def ensure(root=ROOT, quiet=False, seed=0, scale=None):
    """Makes the world under `root` if it is not there, or was made by another version of this file
    or with another seed or scale -> Path. scale: 0.01 to 1, a share of every count; None for that
    of the world that is there, else 1.

    The world is written beside `root` and moved there whole. A lock lets one process write while
    others wait for it; what a killed process left is removed. SystemExit if `root` holds what this
    function did not write.
    """
    root = Path(root).absolute()
    if scale is not None and not 0.01 <= scale <= 1:
        raise SystemExit(f"tools.shapes: --scale {scale:g}: between 0.01 and 1")
    found, wanted = versions(root, seed, scale)
    if found == wanted:
        return root

    tools.check_out(root, "tools.shapes: --root", folder=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        # another process may have made it while this one waited
        found, wanted = versions(root, seed, scale)
        if found == wanted:
            return root
        if root.exists() and not found and any(root.iterdir()):
            raise SystemExit(f"tools.shapes: {root} is not empty and holds no shapes world: "
                             "name another place, or empty it")
        if not quiet:
            print(f"tools.shapes: making the built-in world in {root} (once, about 20 s on two "
                  "cores)", file=sys.stderr, flush=True)

        # the lock is ours, so whoever began these is dead
        for stale in root.parent.glob(f".{root.name}.tmp-*"):
            shutil.rmtree(stale)

        new = root.parent / f".{root.name}.tmp-{os.getpid()}-new"
        new.mkdir()
        write_world(new, root, seed, wanted["scale"], quiet)
        (new / "version.json").write_text(json.dumps(wanted))

        # a world of another version moves away before it is deleted
        old = root.parent / f".{root.name}.tmp-{os.getpid()}-old"
        if root.exists():
            root.rename(old)
        new.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    return root


def sheet(root, path, n=24):
    """A contact sheet: the first n test pictures, enlarged, each with two captions, and below them
    the frames of four clips."""
    lines = (Path(root) / "pairs_test.jsonl").read_text().splitlines()[:n]
    strips = sorted((Path(root) / "clips" / "frames").glob("*.png"))[:4]
    rows = math.ceil(len(lines) / 6)
    page = Image.new("RGB", (6 * 210, rows * 280 + 80 * len(strips)), "white")
    pen = ImageDraw.Draw(page)

    # pictures, six a row
    for i, line in enumerate(lines):
        record = json.loads(line)
        x, y = i % 6 * 210 + 5, i // 6 * 280 + 5
        with Image.open(Path(root) / record["image"]) as picture:
            page.paste(picture.resize((198, 198), Image.Resampling.NEAREST), (x, y))
        for k, caption in enumerate(record["caption"][:2]):
            text = "\n".join(textwrap.wrap(caption, 34)[:3])
            pen.text((x, y + 200 + 36 * k), text, fill="black", font_size=11, spacing=1)

    # clips, one a row
    for i, strip in enumerate(strips):
        with Image.open(strip) as frames:
            page.paste(frames, (5, page.height - 80 * (len(strips) - i)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def main(argv=None):
    parser = tools.Parser(prog="python -m tools.shapes",
                          description="Writes the built-in world of nanovlp.")
    parser.add_argument("--root", type=Path, default=ROOT, help="where it lies")
    parser.add_argument("--scale", type=float, help="a share of every count, for quick trials "
                        "(default: that of the world that is there, else 1)")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet into this file")
    args = parser.parse_args(argv)
    if args.sheet:
        tools.check_out(args.sheet, "tools.shapes: --sheet")
        if args.sheet.suffix.lower() not in Image.registered_extensions():
            raise tools.Stop(f"tools.shapes: --sheet {args.sheet}: name a picture, as sheet.png")

    # the world and what is in it
    root = ensure(args.root, scale=args.scale)
    for split in COUNTS:
        captions = objects = 0
        lines = (root / f"pairs_{split}.jsonl").read_text().splitlines()
        for line in lines:
            record = json.loads(line)
            captions += len(record["caption"])
            objects += len(record["boxes"])
        print(f"{split:5}  {len(lines):6,} pictures  {captions:6,} captions  {objects:6,} objects")

    # what is the best that a model can reach on it
    best = oracle_recall(root)
    print(f"a perfect reader's R@1 on test: image->text {best['i2t_r1']:.1%}, "
          f"text->image {best['t2i_r1']:.1%}")
    print(f"the world lies in {root}")
    if args.sheet:
        sheet(root, args.sheet)
        print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    main()
