"""Names of things of many kinds, and those among them that a model takes for the most like a subject.

What an edit of "The capital of Nigeria is" moves by mistake is the capital of Ghana sooner than anything else, so that is
what is asked before an edit is made.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_lab.subjects import SIGNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cl_lab.editable import EditableModel

_KINDS = """
Egypt|Norway|Chile|Thailand|Kenya|Portugal|Iran|Cuba|Finland|Nepal|Ghana|Peru|Ukraine|Iceland|Mongolia|Algeria|Bulgaria|Laos
Uruguay|Ireland|Ethiopia|Malaysia|Honduras|Armenia|Zambia|South Korea|Saudi Arabia|Sri Lanka|Costa Rica|the Netherlands
Greece|Colombia|Senegal|Jordan|Cambodia|Romania|Jamaica|Uzbekistan|Mozambique|Denmark
Chicago|Lyon|Osaka|Barcelona|Mumbai|Hamburg|Melbourne|Naples|Kyiv|Casablanca|São Paulo|Glasgow
Texas|Bavaria|Ohio|Hokkaido|Catalonia|Queensland
Marie Curie|Isaac Newton|Abraham Lincoln|Napoleon|Beethoven|Frida Kahlo|Nelson Mandela|Charles Darwin|Cleopatra
Virginia Woolf|Muhammad Ali
Serena Williams|David Bowie|Akira Kurosawa|Angela Merkel|John Smith|Maria Garcia|James Wilson|Anna Petrova
Robert Brown|Michael Johnson|Giovanni Rossi
Hamlet|Pride and Prejudice|The Odyssey|Frankenstein|Moby-Dick|The Great Gatsby|War and Peace|Oliver Twist|Star Wars
The Godfather|Swan Lake|Carmen|Thriller|The Last Supper|The Starry Night|The Simpsons|Bohemian Rhapsody|The Hobbit
Toyota|Siemens|IBM|Nokia|Boeing|Nestlé|Sony|Heinz|Volkswagen|Shell
NASA|the Red Cross|the United Nations|Harvard University|FC Barcelona|the Boston Celtics|the Beatles
the Nile|the Danube|the Amazon|Mount Everest|the Alps|Lake Superior|the Sahara|the Baltic Sea|the Pacific Ocean
Greenland|Madagascar|Asia|South America
the Eiffel Tower|the Colosseum|the Taj Mahal|Big Ben|the Louvre|the Golden Gate Bridge|the White House|the Great Wall
gold|oxygen|iron|carbon|helium|copper|sodium|aspirin|insulin|penicillin
the horse|the eagle|the salmon|the oak|the rose|wheat|the whale|the spider
the guitar|the bicycle|the telescope|the radio|the computer|the steam engine|the camera|the airplane
Jupiter|Venus|the Moon|the Sun|the Milky Way
pizza|sushi|bread|coffee|cheese
malaria|influenza|cancer|diabetes
English|Spanish|Swahili|Hindi|Latin
football|chess|tennis|swimming
World War II|the French Revolution|the Cold War|the Olympic Games|the Middle Ages
USS Enterprise|HMS Victory|the Titanic|Boeing 747|Apollo 11|Ford Mustang
house number 7|room 12|version 2.0|chapter 5
"""
NAMES = tuple(name for line in _KINDS.split("\n") for name in line.split("|") if name)

_CARRIER = "A word about"


def _each(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPENERS = _each(
    "a an the what who whom whose which where when why how is are was were do does did has have had in on at of for "
    "from to by with as and or but if it its this that these those there here please tell name question my our your his her "
    "their"
)
_NEVER = _each(
    "i january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday"
)
_JOINING = _each("of the and de la le du von van der den di da del al el & in on for to a an")

_WORD = re.compile(rf"(?:\w[\w’'.-]*\w|\w)(?:{SIGNS})?|&")
_OWNER = re.compile(r"['’]s$")
_RUN = re.compile("C(?:j*[CN])*(?:j*P)?|P")  # of the signs of :func:`_sign`


def guessed(prompt: str) -> str | None:
    """What a prompt is about, by its capital letters: the longest run of capitalised words, or what stands in quotes.

    A prompt's first word counts unless it is an article, a question word or the like; months and days never do. None where
    nothing is found.
    """
    if quoted := re.findall(r"[“\"«]([^”\"»]{2,80})[”\"»]", prompt):
        return str(max(quoted, key=len))
    words = list(_WORD.finditer(prompt))
    signs = "".join(_sign(word[0], first=n == 0) for n, word in enumerate(words))
    runs = [prompt[words[run.start()].start() : words[run.end() - 1].end()] for run in _RUN.finditer(signs)]
    return max((_OWNER.sub("", run) for run in runs), key=len, default=None)


def _sign(word: str, *, first: bool) -> str:
    """What a word is to a run: Capitalised, Possessive (which ends it), a Number, joining, or x, which breaks it off."""
    bare = _OWNER.sub("", word)
    plain = bare.casefold()
    if plain in _NEVER or (first and plain in _OPENERS):
        return "x"
    if bare[:1].isupper():
        return "C" if bare == word else "P"
    if bare[:1].isdigit():
        return "N"
    return "j" if plain in _JOINING else "x"


@torch.no_grad()
def alike(model: EditableModel, subject: str, number: int, names: Sequence[str] = NAMES) -> list[str]:
    """The ``number`` of ``names`` most like ``subject``, the nearest first: by what they are to the model's lower layers.

    Compared are the mean directions of a name's tokens a quarter up, less that of all names, by their cosine. The subject
    itself is not among them, nor what it is a part of.
    """
    key = ("names", tuple(names))
    if key not in model.origin:
        model.origin[key] = _directions(model, names)
    known: Tensor = model.origin[key]
    centre = known.mean(0)
    ours, theirs = (torch.nn.functional.normalize(d - centre, dim=1) for d in (_directions(model, [subject]), known))
    own = subject.casefold()
    order = (theirs @ ours[0]).sort(descending=True, stable=True).indices.tolist()
    return [n for n in (names[i] for i in order) if own not in n.casefold() and n.casefold() not in own][:number]


def _directions(model: EditableModel, names: Sequence[str]) -> Tensor:
    before = len(model.tokenizer.encode(_CARRIER))
    place = model.layer(round(0.25 * len(model.layers)))
    texts = [model.tokenizer.encode(f"{_CARRIER} {name}") for name in names]
    with model.unpatched():
        heard = model.inputs(model.rows([(ids, []) for ids in texts]), [place])[place.path]
    found = [torch.nn.functional.normalize(h[min(before, len(h) - 1) :], dim=1).mean(0) for h in heard]
    return torch.stack(found)
