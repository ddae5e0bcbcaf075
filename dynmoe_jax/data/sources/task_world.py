"""Facts that small instruction tasks ask for, and their sentences as plain text."""

import itertools


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> list[tuple[str, str]]:
    """Words that a slash joins."""
    halves = (each.partition("/") for each in _words(text))
    return [(word, other) for word, _, other in halves]


KINDS = {
    "animal": _words("cow cat dog horse sheep duck goat lion frog owl bee mouse wolf pig bear fox"),
    "food": _words("bread cheese apple rice soup cake egg plum bean corn pie nut pear jam fig ham"),
    "tool": _words("hammer saw spoon knife rake axe broom brush needle drill pen fork hoe file"),
    "garment": _words("coat hat shoe sock shirt glove scarf belt boot dress cap skirt vest tie"),
}
OPPOSITES = _pairs(
    "hot/cold big/small wet/dry fast/slow old/young hard/soft high/low long/short rich/poor "
    "dark/light full/empty loud/quiet thick/thin near/far early/late clean/dirty deep/shallow "
    "open/closed strong/weak sweet/sour true/false happy/sad wide/narrow"
)
COLORS = _pairs(
    "banana/yellow snow/white grass/green coal/black sky/blue blood/red leaf/green lemon/yellow "
    "milk/white cherry/red sea/blue carrot/orange pumpkin/orange plum/purple night/black "
    "tomato/red salt/white emerald/green raven/black ruby/red canary/yellow frog/green"
)
YOUNG = _pairs(
    "cow/calf dog/puppy cat/kitten sheep/lamb horse/foal duck/duckling goat/kid lion/cub "
    "pig/piglet frog/tadpole owl/owlet hen/chick deer/fawn bear/cub goose/gosling swan/cygnet"
)
SOUNDS = _pairs(
    "cow/moos dog/barks cat/meows sheep/bleats horse/neighs duck/quacks lion/roars pig/grunts "
    "frog/croaks owl/hoots bee/buzzes mouse/squeaks wolf/howls bear/growls hen/clucks snake/hisses"
)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NEXT = list(itertools.pairwise(NUMBERS))
NOUNS = [noun for nouns in KINDS.values() for noun in nouns]


def with_article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentences() -> list[str]:
    """Every fact, each in several sentences."""
    found = []
    for kind, nouns in KINDS.items():
        for noun in nouns:
            one, of = with_article(noun), with_article(kind)
            found += [f"{one} is {of}.", f"The kind of {noun} is {kind}.", f"{of}: {noun}."]
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            found += [f"The opposite of {word} is {other}.", f"What is not {word} is {other}."]
    for thing, color in COLORS:
        found += [f"The color of {thing} is {color}.", f"{thing} looks {color}."]
    for animal, young in YOUNG:
        found += [f"A young {animal} is a {young}.", f"The {young} grows up to be a {animal}."]
    for animal, sound in SOUNDS:
        found += [f"The {animal} {sound}.", f"What {sound} is a {animal}."]
    for before, after in NEXT:
        found += [f"After {before} comes {after}.", f"Before {after} comes {before}."]
    return [sentence[0].upper() + sentence[1:] for sentence in found]
