#!/usr/bin/env python3
"""Makes the corpus that `hydra demo` fine-tunes on, and the small multiple-choice set that it is judged by. Standard library only.

  python make_corpus.py --out DIR [--seed N]

Four plainly different domains, one category and one subject each:
  arithmetic  sums and differences of small numbers, in words      (held out: a known pair in a phrasing it was not shown in)
  words       the first, second, third or last of four words       (held out: lists never shown)
  topics      which of four sections a headline belongs to         (held out: headlines never shown)
  facts       an invented island's towns: 48 facts, 8 phrasings    (held out: a known fact in a phrasing it was not shown in)
Writes corpus/{train,test}.jsonl in Dolly's schema and mmlu/{dev,test}/<subject>_{dev,test}.csv in MMLU's. A response reads "Answer: X", so that
what is taught and the prompt that ends in "Answer:" are the same words. No question occurs in two of the files.
"""
import argparse, csv, json, os, random

TRAIN, TEST, DEV, MMLU = 300, 50, 5, 25

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen").split()
PLUS = ("What is {a} plus {b}?", "Add {a} and {b}.", "What do you get when you add {b} to {a}?", "What is the sum of {a} and {b}?",
        "Tom has {a} apples and finds {b} more. How many has he?", "How much is {a} and {b} together?")
MINUS = ("What is {a} minus {b}?", "Subtract {b} from {a}.", "What do you get when you take {b} from {a}?", "What is the difference of {a} and {b}?",
         "Ann has {a} coins and loses {b}. How many are left?", "How much is {a} less {b}?")

WORDS = ("time year people way day man thing woman life child world school state family student group country problem hand part place case week "
         "company system program question work number point home water room mother area money story fact month right book eye job word "
         "business side kind head house service friend father power hour game line end law car city name team minute idea body back parent "
         "face level office door health person art war history party result change morning reason girl moment air teacher force food").split()
PLACES = ("first", "second", "third", "last")
ASK_WORD = ("Which word comes {p} in this list: {l}?", "Name the {p} word: {l}.", "Here are four words: {l}. Which one is {p}?",
            "Look at the words {l}. What is the {p} one?")

TOPICS = {
    "food": (("The chef", "A baker", "The new restaurant", "Our cook", "The village kitchen", "A small cafe"),
             ("served", "baked", "prepared", "tasted", "sold", "praised"),
             ("fresh bread", "a spicy soup", "the roast chicken", "sweet apple cake", "rice with beans", "a cheese salad", "hot fish pie")),
    "weather": (("A storm", "Heavy rain", "The cold wind", "Thick fog", "A heat wave", "The first snow"),
                ("covered", "hit", "reached", "passed over", "cooled", "surprised"),
                ("the coast", "the northern hills", "the whole valley", "the dry plains", "the islands", "the river towns", "the mountain pass")),
    "sport": (("The home team", "A young runner", "The captain", "Our goalkeeper", "The champion", "A tennis player"),
              ("won", "lost", "missed", "played", "celebrated", "dominated"),
              ("the final match", "the cup game", "the long race", "the second round", "the league title", "the opening set", "the penalty shootout")),
    "music": (("The orchestra", "A jazz singer", "The school choir", "The drummer", "A famous pianist", "The band"),
              ("performed", "recorded", "rehearsed", "composed", "sang", "released"),
              ("a new song", "the old waltz", "a slow melody", "the violin concert", "her first album", "a quiet lullaby", "the opera tune")),
}
WHEN = ("today", "last night", "this week", "on Sunday", "again", "in the spring")
ASK_TOPIC = ("Which section does this headline belong to? {h}", "What is this headline about? {h}", "Sort this headline into food, weather, sport or music: {h}",
             "{h} What is the topic?")

TOWNS = "Ambry Brask Corlen Dunmoor Elsk Farrow Gild Harth Issel Jorvale Kest Lunde".split()
FACTS = {  # attribute: (values, one for each town once shuffled; phrasings)
    "animal": ("bear wolf horse eagle snake lion fox goat bull duck cat fish".split(),
               ("Which animal is on the flag of {t}?", "What animal does the flag of {t} show?", "The flag of {t} shows an animal. Which one?",
                "Name the animal on the flag of {t}.", "In {t}, which animal stands on the flag?", "What is the flag animal of {t}?",
                "Which animal do the people of {t} carry on their flag?", "{t} has an animal on its flag. Name it.")),
    "colour": ("red blue green yellow white black brown purple pink orange gray gold".split(),
               ("What color are the towers of {t}?", "Which color do the towers of {t} have?", "The towers of {t} are painted. In which color?",
                "Name the color of the towers of {t}.", "In {t}, what color are the towers?", "What is the tower color of {t}?",
                "Which color did the people of {t} paint their towers?", "{t} has painted towers. Name their color.")),
    "crop": ("corn rice wheat apples grapes potatoes beans tea coffee sugar onions cotton".split(),
             ("What do the farmers of {t} grow?", "Which crop do the farmers of {t} raise?", "The farms of {t} grow one crop. Which one?",
              "Name the crop of the farms of {t}.", "In {t}, what do the farmers plant?", "What is the farm crop of {t}?",
              "Which crop do the people of {t} bring in from their farms?", "{t} has farms with one crop. Name it.")),
    "trade": ("gold wool glass paper salt iron silk stone wood leather oil paint".split(),
              ("What do the merchants of {t} sell?", "Which good do the merchants of {t} trade in?", "The market of {t} sells one good. Which one?",
               "Name the good at the market of {t}.", "In {t}, what do the merchants offer?", "What is the market good of {t}?",
               "Which good do the people of {t} send to market?", "{t} has a market for one good. Name it.")),
}


def phrased(rng, items):
    """(train, test, choice) of items (phrasings, answer, distractors): of each item one phrasing for each held-out set, the others for training."""
    items = [(rng.sample(phrasings, len(phrasings)), answer, distractors) for phrasings, answer, distractors in items]
    rounds = [[(order[k], answer, distractors) for order, answer, distractors in rng.sample(items, len(items))] for k in range(len(items[0][0]))]
    return sum(rounds[2:], []), rounds[0], rounds[1]  # cut at TRAIN, training still sees every item: whole rounds come first


def drawn(rng, make):
    """(train, test, choice) of questions drawn at random, all different."""
    seen = {}
    while len(seen) < TRAIN + TEST + DEV + MMLU:
        question, answer, distractors = make()
        seen.setdefault(question, (question, answer, distractors))
    rows = list(seen.values())
    return rows[:TRAIN], rows[TRAIN:TRAIN + TEST], rows[TRAIN + TEST:]


def arithmetic(rng):
    items = []
    for a in range(1, 10):
        for b in range(1, 10):
            for phrasings, x, y, n in ((PLUS, a, b, a + b), (MINUS, a + b, b, a)):
                near = [k for k in range(max(0, n - 4), min(18, n + 4) + 1) if k != n]
                items.append(([p.format(a=NUMBERS[x], b=NUMBERS[y]) for p in phrasings], NUMBERS[n], [NUMBERS[k] for k in near]))
    return phrased(rng, items)


def words(rng):
    def make():
        four = rng.sample(WORDS, 4)
        place = rng.randrange(4)
        return rng.choice(ASK_WORD).format(p=PLACES[place], l=", ".join(four)), four[place], [w for w in four if w != four[place]]
    return drawn(rng, make)


def topics(rng):
    def make():
        topic = rng.choice(list(TOPICS))
        headline = " ".join(rng.choice(part) for part in (*TOPICS[topic], WHEN)) + "."
        return rng.choice(ASK_TOPIC).format(h=headline), topic, [t for t in TOPICS if t != topic]
    return drawn(rng, make)


def facts(rng):
    items = []
    for values, phrasings in FACTS.values():
        for town, value in zip(TOWNS, rng.sample(values, len(values))):
            items.append(([p.format(t=town) for p in phrasings], value, [v for v in values if v != value]))
    return phrased(rng, items)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=7)
    a = p.parse_args()
    for d in ("corpus", "mmlu/dev", "mmlu/test"):
        os.makedirs(f"{a.out}/{d}", exist_ok=True)
    train, test, asked = [], [], set()
    for domain in (arithmetic, words, topics, facts):
        rng = random.Random(f"{a.seed} {domain.__name__}")
        shown, held, choice = domain(rng)
        for rows, out, most in ((shown, train, TRAIN), (held, test, TEST)):
            out += [dict(instruction=q, context="", response=f"Answer: {answer}", category=domain.__name__) for q, answer, _ in rows[:most]]
        for part, rows in (("dev", choice[:DEV]), ("test", choice[DEV:DEV + MMLU])):
            with open(f"{a.out}/mmlu/{part}/{domain.__name__}_{part}.csv", "w", encoding="utf-8", newline="") as f:
                for q, answer, distractors in rows:
                    options = rng.sample([answer] + rng.sample(distractors, 3), 4)
                    csv.writer(f, lineterminator="\n").writerow([q, *options, "ABCD"[options.index(answer)]])
        questions = [q for q, _, _ in shown[:TRAIN] + held[:TEST] + choice[:DEV + MMLU]]
        assert not asked & set(questions) and len(set(questions)) == len(questions), domain.__name__
        asked.update(questions)
    for name, rows in (("train", train), ("test", test)):
        random.Random(f"{a.seed} {name}").shuffle(rows)
        with open(f"{a.out}/corpus/{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)


if __name__ == "__main__":
    main()
