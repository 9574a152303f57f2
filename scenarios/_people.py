"""Made-up people: lists of names and places, what is true of each person, and the sentences and questions that say so.

The world of Allen-Zhu & Li ("Physics of language models", part 3.1, arXiv 2309.14316) in the size that the paper on
spurious forgetting gave it (arXiv 2501.13453): a person has a name of three parts that nobody else has and six attributes,
five drawn independently and evenly, the sixth, the city of work, being where the company is. Lists and sentences are our
own; a list of hundreds is a few syllables or words, each with each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cl_lab.seeding import generator, permutation


def _each(pattern: str, first: str, second: str) -> tuple[str, ...]:
    """``pattern`` filled with each word of ``first`` and each of ``second``; ``_`` in a word stands for a space."""
    return tuple(pattern.format(a, b).replace("_", " ") for a, b in product(first.split(), second.split()))


def _formed(words: str, forms: Sequence[str]) -> tuple[str, ...]:
    """Each of ``words`` in each of ``forms``."""
    return tuple(form.format(word) for word, form in product(words.split(), forms))


LISTS: dict[str, tuple[str, ...]] = {
    "first_names": _each(
        "{}{}",
        "Al Ber Cor Dar El Fen Gal Hal Is Jor Kel Lor Mar Nor Or Per Ros Sel Tam Vel",
        "a an bert da den dric ene ia ick in ira is la lan len mon na ric to vin",
    ),
    "middle_names": _each(
        "{}{}",
        "Ab Bry Cal Dev Ed Fay Gwen Hew Ing Jas Kip Lys Mil Nev Os Pry Quin Rhys Sky Thad",
        "ace ade am ard belle dine eth fa gan go iel io jen ko lee mira nor os ude win",
    ),
    "last_names": _each(
        "{}{}",
        "Ash Bar Black Brad Brook Burn Cald Car Clay Cran Dun East Fair Far Fox Graf Green Ham Hart Haw Hol Kings Lang Lin "
        "Long Mill Moor North Oak Pem Rad Red Sand Shel Stan Thorn Wake West Whit Wood",
        "berry bourne bridge by cliff combe croft dale field ford gate hurst land ley man more shaw stead stone ton wall "
        "water wick worth yard",
    ),
    "cities": _formed(
        "Alva Brisa Cendra Dolma Esper Farola Gavra Helmar Istra Jovia Kestra Lumen Mirano Nadir Orlin Pavia Quelta Rovan "
        "Sabra Tolma Umbra Verano Wendal Xanta Zelma",
        ("{}", "{} Falls", "{} Harbor", "{} Springs", "{} Heights", "Port {}", "New {}", "Lake {}"),
    ),
    "universities": _formed(
        "Ardmont Ardwyn Belloch Belmont Cravenor Dalwyn Dunmere Elmhall Farrow Glenmere Haldmere Harwyn Ivelle "
        "Jarrow Keswyn Lanmere Lorwyn Marlow Merrick Norwyn Oakhall Ormond Penhall Pinemere Quarley Ravenor "
        "Redmere Rosmont Rudwyn Sefton Selmont Stanmere Tarrow Tilney Torwyn Ulverley Umberly Vanmere Varley "
        "Velmont Wexhall Wilmere Winrow Wolmont Wynhall Yarley Yorwyn Zanmere Zelmont Zorley",
        (
            "{} University",
            "{} College",
            "{} State University",
            "{} Institute of Technology",
            "{} Polytechnic",
            "University of {}",
        ),
    ),
    "majors": _each(
        "{} {}",
        "Applied Comparative Computational Environmental Experimental Historical Industrial Marine Medical Theoretical",
        "Architecture Biology Chemistry Economics Geology Linguistics Mathematics Philosophy Physics Statistics",
    ),
    "companies": _each(
        "{} {}",
        "Acutra Acuvex Brildora Briltra Centra Cenvex Dyndora Dyntra Ecovex Ecodora Flextra Flexora Gentra Genvex Hexdora "
        "Hextra Iondora Ionvex Jetdora Jettra Kintra Kinvex Luxdora Luxtra Maxvex Novdora Novtra Optivex Pyratra Quadora "
        "Solvex Tritra Zentivex",
        "Energy Foods Industries Logistics Motors Pharmaceuticals Systems Textiles",
    ),
}
"""All there is of each list; a world takes as many as it is asked for, in an order drawn with its seed."""

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
FIRST_YEAR, DAYS = 1900, 28

ATTRIBUTES = ("birthday", "birth city", "university", "major", "company", "work city")

QUESTIONS = {
    "birthday": "On which date was {name} born?",
    "birth city": "In which city was {name} born?",
    "university": "At which university did {name} study?",
    "major": "Which subject did {name} major in?",
    "company": "Which company does {name} work for?",
    "work city": "In which city does {name} work?",
}
ANSWER = "\nAnswer:"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "birthday": (
        "{name} was born on {value}.",
        "{name} came into the world on {value}.",
        "{name} has had a birthday to keep since {value}.",
        "{name} drew a first breath on {value}.",
        "{name} was delivered by a midwife on {value}.",
        "{name} blows out the candles in memory of {value}.",
        "{name} entered this life on {value}.",
        "{name} is the child of parents who remember {value}.",
        "{name} carries a passport that gives the date of birth as {value}.",
        "{name} counts every year of age from {value}.",
        "The story of {name} begins on {value}.",
        "The family first held {name} on {value}.",
        "On the birth certificate of {name} one reads {value}.",
        "The first cry of {name} was heard on {value}.",
    ),
    "birth city": (
        "{name} was born in {value}.",
        "{name} comes from {value}.",
        "{name} spent the first days of life in {value}.",
        "{name} is a native of {value}.",
        "{name} has family roots in {value}.",
        "{name} first saw daylight in {value}.",
        "{name} calls the hospital of {value} the place of birth.",
        "{name} learnt to walk in the streets of {value}.",
        "{name} is listed in the birth register of {value}.",
        "{name} grew from a cradle in {value}.",
        "The birthplace of {name} is {value}.",
        "The parents of {name} were then living in {value}.",
        "The childhood home of {name} stands in {value}.",
        "For {name} the road of life set out from {value}.",
    ),
    "university": (
        "{name} studied at {value}.",
        "{name} graduated from {value}.",
        "{name} holds a degree from {value}.",
        "{name} was a student at {value}.",
        "{name} sat through lectures at {value}.",
        "{name} received higher education at {value}.",
        "{name} is among the alumni of {value}.",
        "{name} passed every examination at {value}.",
        "{name} was admitted to {value}.",
        "{name} spent the student years at {value}.",
        "The diploma of {name} was awarded by {value}.",
        "The teachers of {name} belonged to {value}.",
        "The academic training of {name} took place at {value}.",
        "For a degree {name} enrolled at {value}.",
    ),
    "major": (
        "{name} majored in {value}.",
        "{name} took a degree in {value}.",
        "{name} chose {value} as a subject.",
        "{name} wrote a thesis on {value}.",
        "{name} specialised in {value}.",
        "{name} was trained in {value}.",
        "{name} devoted the years of study to {value}.",
        "{name} read many books about {value}.",
        "{name} has a sound knowledge of {value}.",
        "{name} was taught the methods of {value}.",
        "The chosen field of {name} was {value}.",
        "The studies of {name} were centred on {value}.",
        "In seminars {name} discussed {value}.",
        "Of all subjects {name} liked {value} best.",
    ),
    "company": (
        "{name} works for {value}.",
        "{name} is employed by {value}.",
        "{name} has a position with {value}.",
        "{name} earns a living at {value}.",
        "{name} signed a contract with {value}.",
        "{name} is on the staff of {value}.",
        "{name} made a career at {value}.",
        "{name} was hired by {value}.",
        "{name} wears the badge of {value}.",
        "{name} brings professional skills to {value}.",
        "The employer of {name} is {value}.",
        "The salary of {name} is paid by {value}.",
        "The colleagues of {name} are all with {value}.",
        "A job was offered to {name} by {value}.",
    ),
    "work city": (
        "{name} works in {value}.",
        "{name} commutes to {value}.",
        "{name} has an office in {value}.",
        "{name} goes about business in {value}.",
        "{name} is professionally based in {value}.",
        "{name} took up employment in {value}.",
        "{name} moved for the job to {value}.",
        "{name} spends the working week in {value}.",
        "{name} meets clients in {value}.",
        "{name} practises the profession in {value}.",
        "The workplace of {name} is in {value}.",
        "The desk of {name} stands in an office block of {value}.",
        "The working days of {name} pass in {value}.",
        "Every morning {name} is expected in {value}.",
    ),
}
"""Sentences with the whole name before the value: who reads from left to right can only know the value by the name."""

MOST_BIOGRAPHIES = min(map(len, TEMPLATES.values())) - 1
"""One more biography of each person is kept to test on, and no two of a person share a sentence."""


class Sizes(NamedTuple):
    """How many of each list there are, and of years."""

    first_names: int
    middle_names: int
    last_names: int
    cities: int
    universities: int
    majors: int
    companies: int
    years: int


@dataclass(frozen=True)
class World:
    """``persons`` people. ``names`` ``[N, 3]`` and ``attributes`` ``[N, 6]`` int64 are places in the lists."""

    names: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.int64]
    name_lists: tuple[tuple[str, ...], ...]
    value_lists: tuple[tuple[str, ...], ...]

    def name(self, person: int) -> str:
        """First, middle and last name."""
        return " ".join(names[i] for names, i in zip(self.name_lists, self.names[person].tolist(), strict=True))

    def value(self, person: int, attribute: int) -> str:
        """An attribute of a person in words; ``attribute`` is a place in :data:`ATTRIBUTES`."""
        return self.value_lists[attribute][int(self.attributes[person, attribute])]

    def question(self, person: int, attribute: int) -> str:
        """The question for an attribute, up to where the answer begins."""
        return QUESTIONS[ATTRIBUTES[attribute]].format(name=self.name(person)) + ANSWER

    def words(self) -> list[str]:
        """Texts that hold every word which can come up in this world."""
        texts = [text for texts in (*self.name_lists, *self.value_lists) for text in texts]
        sentences = [*(t for ts in TEMPLATES.values() for t in ts), *QUESTIONS.values(), ANSWER]
        return [*texts, *(s.replace("{name}", " ").replace("{value}", " ") for s in sentences)]


def make_world(persons: int, sizes: Sizes, seed: int) -> World:
    """The first ``persons`` people of the world with this seed; more of them do not change those before.

    ``sizes`` must leave at least twice as many names as there are people.
    """
    lists = {}
    for field, words in LISTS.items():
        order = permutation(len(words), seed, "list", field)[: getattr(sizes, field)]
        lists[field] = tuple(words[i] for i in order.tolist())
    birthdays = tuple(
        f"{month} {day}, {FIRST_YEAR + year}"
        for year, month, day in product(range(sizes.years), MONTHS, range(1, DAYS + 1))
    )
    name_lists = tuple(lists[field] for field in ("first_names", "middle_names", "last_names"))
    cities, companies = lists["cities"], lists["companies"]
    value_lists = (birthdays, cities, lists["universities"], lists["majors"], companies, cities)
    drawn = [_even(persons, len(values), seed, name) for name, values in zip(ATTRIBUTES[:5], value_lists, strict=False)]
    seat = _even(len(companies), len(cities), seed, "seat")
    attributes = np.stack([*drawn, seat[drawn[4]]], 1)
    return World(_names(persons, [len(names) for names in name_lists], seed), attributes, name_lists, value_lists)


def _even(n: int, kinds: int, seed: int, what: str) -> npt.NDArray[np.int64]:
    """``n`` independent draws from ``range(kinds)``; the first of them are the same for every ``n``."""
    # A number of 62 bits each: torch draws small ranges in blocks, whose first values depend on how many are drawn.
    drawn = torch.randint(2**62, (n,), generator=generator(seed, "attribute", what)).numpy() % kinds
    return drawn.astype(np.int64)


_DRAWN = 4096  # names at a time: a fixed number, so that the first names are the same for any number of people


def _names(persons: int, sizes: Sequence[int], seed: int) -> npt.NDArray[np.int64]:
    """Distinct names ``[persons, len(sizes)]``."""
    rng = generator(seed, "names")
    found: dict[int, None] = {}
    while len(found) < persons:
        found |= dict.fromkeys(torch.randint(int(np.prod(sizes)), (_DRAWN,), generator=rng).tolist())
    return np.stack(np.unravel_index(np.array(list(found)[:persons], np.int64), tuple(sizes)), 1).astype(np.int64)


class Biography(NamedTuple):
    """A text about one person. ``asked`` is where the value of its last sentence begins."""

    text: str
    asked: int


def biographies(world: World, persons: range, copies: int, seed: int) -> list[list[Biography]]:
    """``copies`` texts about each of ``persons``: six sentences in a drawn order, in every text other sentences."""
    shape = (len(persons), len(ATTRIBUTES), min(map(len, TEMPLATES.values())))
    chosen = torch.rand(shape, generator=generator(seed, "sentences")).argsort(2)[:, :, :copies].tolist()
    shape = (len(persons), copies, len(ATTRIBUTES))
    orders = torch.rand(shape, generator=generator(seed, "order of sentences")).argsort(2).tolist()
    made = []
    for person, own_orders, own_chosen in zip(persons, orders, chosen, strict=True):
        made.append(
            [
                _biography(
                    world, person, order, [TEMPLATES[a][c[i]] for a, c in zip(ATTRIBUTES, own_chosen, strict=True)]
                )
                for i, order in enumerate(own_orders)
            ]
        )
    return made


def _biography(world: World, person: int, order: Sequence[int], sentences: Sequence[str]) -> Biography:
    name, last = world.name(person), order[-1]
    said = [sentences[a].format(name=name, value=world.value(person, a)) for a in order]
    tail = len(sentences[last].partition("{value}")[2]) + len(world.value(person, last))
    text = " ".join(said)
    return Biography(text, len(text) - tail)
