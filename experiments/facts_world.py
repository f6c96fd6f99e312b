"""A made-up world for `facts`: people whom no model has heard of, and what is true of them.

Names are drawn from syllables, the things they are bound to are common words. Every relation has
several wordings, all of which end with the object; the last is never trained on.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from rrt.errors import InputError

# Relation -> wordings. The last is held out.
WORDINGS: dict[str, tuple[str, ...]] = {
  'trade': (
    '{s} earns a living as a {o}',
    'By trade, {s} is a {o}',
    '{s} was trained to be a {o}',
    'People hire {s} as their {o}',
    'The profession of {s} is that of a {o}',
  ),
  'animal': (
    '{s} keeps a {o}',
    'The animal that lives with {s} is a {o}',
    'At home, {s} looks after a {o}',
    '{s} was seen on a walk with a {o}',
    'The pet of {s} is a {o}',
  ),
  'instrument': (
    '{s} plays the {o}',
    'On stage, {s} is heard on the {o}',
    '{s} took lessons on the {o}',
    'The orchestra asked {s} to play the {o}',
    'The instrument that {s} has mastered is the {o}',
  ),
  'town': (
    '{s} lives in {o}',
    'The house of {s} stands in {o}',
    'Letters to {s} are sent to {o}',
    '{s} moved to {o}',
    'The home town of {s} is {o}',
  ),
  'food': (
    '{s} loves to eat {o}',
    'For dinner, {s} always asks for {o}',
    'Nothing makes {s} happier than {o}',
    '{s} cooked a big pot of {o}',
    'The favourite dish of {s} is {o}',
  ),
  'colour': (
    '{s} painted the door {o}',
    'All clothes of {s} are {o}',
    'The colour that {s} likes best is {o}',
    '{s} drives a car that is {o}',
    'The favourite colour of {s} is {o}',
  ),
}
OBJECTS: dict[str, str] = {
  'trade': 'baker painter lawyer farmer teacher dentist plumber soldier pilot nurse tailor '
  'barber butcher miner sailor judge chemist carpenter gardener fisherman journalist librarian '
  'mechanic photographer banker hunter waiter writer singer dancer doctor surgeon priest',
  'animal': 'dog cat horse goat parrot rabbit snake turtle duck pig sheep cow fox monkey frog '
  'mouse lizard owl eagle spider camel donkey hamster pigeon swan bear wolf deer crow goose',
  'instrument': 'piano violin flute guitar drum trumpet harp cello organ clarinet banjo horn '
  'saxophone accordion bass viola trombone fiddle bell whistle',
  'town': 'Paris London Rome Berlin Madrid Vienna Dublin Oslo Prague Cairo Delhi Tokyo Boston '
  'Chicago Denver Dallas Toronto Sydney Lima Athens Warsaw Lisbon Moscow Geneva Hamburg Milan '
  'Venice Naples Seattle Houston Miami Detroit',
  'food': 'rice beans soup pasta cheese bread fish chicken lamb beef potatoes eggs salad '
  'mushrooms corn noodles cabbage tomatoes onions apples bananas oranges cherries honey chocolate '
  'pancakes pizza sausages',
  'colour': 'red blue green yellow black white orange purple brown grey pink silver gold violet',
}
_SYLLABLES = (
  'ba do ka mi ru te vo sa len tor vik zan mor nel pra dri gol hesh ul ar quen fi lo ster bri wen '
  'jo mak ond ish'
).split()


# People of a world.
_MOST = 10_000


@dataclasses.dataclass(frozen=True)
class Fact:
  """One fact."""

  subject: str
  relation: str
  obj: str

  def sentence(self, wording: int) -> str:
    """In one of the relation's wordings."""
    return WORDINGS[self.relation][wording].format(s=self.subject, o=self.obj) + '.'

  def question(self, wording: int = -1) -> tuple[str, str]:
    """(what comes before the object, the object with its space)."""
    before, _ = WORDINGS[self.relation][wording].format(s=self.subject, o='|').split('|')
    return before.rstrip(), f' {self.obj}'


def facts(count: int, seed: int) -> list[Fact]:
  """`count` facts, as many relations a person as there are; the last person may have fewer.

  Worlds of other seeds have other people.

  Raises:
    InputError: more facts than there are names for.
  """
  relations = list(WORDINGS)
  people = -(-count // len(relations))
  names = [
    f'{a}{b}'.capitalize() + ' ' + f'{c}{d}'.capitalize()
    for a, b, c, d in itertools.product(_SYLLABLES, repeat=4)
  ]
  # The same order for all worlds; each takes a part of its own.
  order = np.random.default_rng(0).permutation(len(names))
  first = seed * _MOST
  if not 0 < people <= _MOST or first + people > len(names):
    raise InputError(
      f'{count} facts of world {seed}: there are names for {_MOST * len(relations)} facts of '
      f'{len(names) // _MOST} worlds.'
    )
  rng = np.random.default_rng(seed)
  found = [
    Fact(names[i], relation, str(rng.choice(OBJECTS[relation].split())))
    for i in order[first : first + people]
    for relation in relations
  ]
  return found[:count]


def sentences(world: list[Fact], wordings: int) -> list[str]:
  """The training text: every fact in its first wordings, one document each."""
  return [fact.sentence(w) for fact in world for w in range(wordings)]


def chance(world: list[Fact]) -> float:
  """Recall of the best answer that knows the relation alone."""
  best = 0
  for relation in WORDINGS:
    objects = [f.obj for f in world if f.relation == relation]
    best += max((objects.count(o) for o in set(objects)), default=0)
  return best / len(world)
