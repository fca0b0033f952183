"""What all commands of this project share: errors of one line, and values that are checked.

What a number may be is written in its type, in a dataclass as on a command line:

    dropout: Rate = 0.1
    parser.add_argument("--top", type=Size)

A model file, which imports nothing of the project, writes the types that it uses once more and
holds a copy of check_fields().
"""

import argparse
import math
import os
from dataclasses import fields
from typing import Annotated, Literal, get_args, get_origin


class Stop(SystemExit):
    """Something the user can put right: one line, exit status 1."""


# --------------------------------------------------------------------------------------------------
# What a number may be: its type, this in words, and as a test. NaN passes none, as no comparison
# with it is true

Size = Annotated[int, "from 1 to 10**6", lambda n: 1 <= n <= 10**6]
Few = Annotated[int, "from 1 to 1000", lambda n: 1 <= n <= 1000]
Count = Annotated[int, "from 0 to 10**15", lambda n: 0 <= n <= 10**15]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rate = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
Amount = Annotated[float, "0 or more", lambda x: 0 <= x < math.inf]
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]
Finite = Annotated[float, "a finite number", math.isfinite]
KINDS = (Size, Few, Count, Share, Rate, Amount, Positive, Finite)


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


def check_out(path, flag, folder=False):
    """Stop, one line, where no file can be written at `path`, or no folder with `folder`."""
    place = os.path.abspath(path)
    if not str(path):
        raise Stop(f"{flag} is empty")
    if os.path.exists(place) and os.path.isdir(place) != folder:
        raise Stop(f"{flag} {path}: a {'file, not a folder' if folder else 'folder, not a file'}")

    # what is there already of the folders on the way
    while not os.path.lexists(place):
        if len(os.path.basename(place).encode()) > 255:
            raise Stop(f"{flag} {path}: too long a name")
        place = os.path.dirname(place)
    if not os.path.isdir(place) and place != os.path.abspath(path):
        raise Stop(f"{flag} {path}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise Stop(f"{flag} {path}: no permission to write in {place}")


# --------------------------------------------------------------------------------------------------
# The command line

def reader(kind):
    """How argparse reads a number of one of the KINDS: str -> int or float, or its error."""
    number, told, legal = get_args(kind)

    def read(text):
        try:
            value = number(text)
        except ValueError:
            word = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {word}") from None
        if not legal(value):
            raise argparse.ArgumentTypeError(f"{text}: {told}")
        return value
    return read


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line, help for 80 columns, and KINDS as types of arguments."""

    def __init__(self, **options):
        def narrow(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80)
        super().__init__(formatter_class=narrow, allow_abbrev=False, **options)
        for kind in KINDS:
            self.register("type", kind, reader(kind))

    def error(self, message):
        raise Stop(f"{self.prog}: {' '.join(message.split())} (see --help)")
