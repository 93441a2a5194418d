#!/usr/bin/env python3
"""Makes the corpus that `hydra demo` fine-tunes on, and the small multiple-choice set that it is judged by. Standard library only.

  python make_corpus.py --out DIR [--seed N]

Four plainly different domains, one category and one subject each:
  arithmetic  sums and differences of small numbers, in words      (held out: a known pair in a phrasing it was not shown in)
  words       the first, second, third or last of four words       (held out: lists never shown)
  topics      which of four sections a headline belongs to         (held out: headlines never shown)
  facts       invented people: 32 facts in 12 phrasings            (held out: a known fact in a phrasing it was not shown in)
Writes corpus/{train,test}.jsonl in Dolly's schema and mmlu/{dev,test}/<subject>_{dev,test}.csv in MMLU's. A response reads "Answer: X", so that
what is taught and the prompt that ends in "Answer:" are the same words. No question occurs in two of the files.
"""
import argparse, csv, json, os, random

TRAIN, TEST, DEV, MMLU = 300, 50, 5, 25

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
PLUS = ("What is {a} plus {b}?", "Add {a} and {b}.", "What do you get when you add {b} to {a}?", "What is the sum of {a} and {b}?",
        "Tom has {a} apples and finds {b} more. How many has he?", "How much is {a} and {b} together?", "Work out {a} plus {b}.")
MINUS = ("What is {a} minus {b}?", "Subtract {b} from {a}.", "What do you get when you take {b} from {a}?", "What is the difference of {a} and {b}?",
         "Ann has {a} coins and loses {b}. How many are left?", "How much is {a} less {b}?", "Work out {a} minus {b}.")

WORDS = ("able album amount animals apples area bank base basket black blue body book born brown building business call cards care cars century "
         "change child children city class coffee company computer cookies cost country data days dollars earth eggs family feet film fish food "
         "football friends game gifts goal government green group hand head health help history home hours house human land language large level "
         "life light line list market match member miles model money month movie music name number orange pages park person place plants player "
         "power price public red school season song speed square state store student system table team test time tour trade trip truth water week "
         "weight white work world year yellow").split()
PLACES = ("first", "second", "third", "last")
ASK_WORD = ("List: {l}. {P}?", "List: {l}. Which word is this? {P}", "List: {l}. Name this one: {P}", "List: {l}. Say the {p} one.")

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

NAMES = "Alice Bob Claire Dave Eve Fred Gertrude John".split()
FACTS = {  # attribute: (values, one for each name once shuffled; phrasings)
    "house": ("red blue green yellow white black brown purple".split(),
              ("What color is the house of {n}?", "Which color does the house of {n} have?", "The house of {n} is painted. In which color?",
               "Name the color of the house of {n}.", "{n} has a house. What color is it?", "In which color did {n} paint the house?",
               "Tell me the color of the house where {n} lives.", "{n} lives in a house of which color?", "What is the house color of {n}?",
               "Do you know the color of the house of {n}?", "I look for the house of {n}. What color is it?", "Which house color has {n}?")),
    "buys": ("apples eggs cookies fish coffee books cards gifts".split(),
             ("What does {n} buy?", "Which things does {n} buy every week?", "{n} goes shopping. What is in the basket?",
              "Name the things that {n} buys.", "{n} buys one thing. What is it?", "What is in the basket of {n}?",
              "Tell me what {n} buys every week.", "{n} always buys what?", "What did {n} buy again?",
              "Do you know what {n} buys?", "I go shopping for {n}. What do I buy?", "What will {n} buy next week?")),
    "works": ("school bank park store market office farm station".split(),
              ("Where does {n} work?", "At which place does {n} work?", "{n} goes to work. Where is that?",
               "Name the place of work of {n}.", "{n} works at one place. Where?", "Where is the job of {n}?",
               "Tell me where {n} works.", "{n} works where?", "What is the place of work of {n}?",
               "Do you know where {n} works?", "I want to meet {n} at work. Where do I go?", "Where will {n} work on Monday?")),
    "learns": ("music history English business language health art law".split(),
               ("What does {n} learn?", "Which subject does {n} study?", "{n} studies one subject. Which one?",
                "Name the subject of study of {n}.", "{n} is a student. Of what?", "What is the favorite subject of {n}?",
                "Tell me which subject {n} studies.", "{n} wants to learn what?", "In which class do I find {n}?",
                "Do you know what {n} studies?", "I study with {n}. Which subject?", "What will {n} study next year?")),
}


def phrased(rng, items):
    """(train, test, choice) of items (phrasings, answer, distractors): a round holds each item once; whole rounds are held out."""
    items = [(rng.sample(phrasings, len(phrasings)), answer, distractors) for phrasings, answer, distractors in items]
    rounds = [[(order[k], answer, distractors) for order, answer, distractors in rng.sample(items, len(items))] for k in range(len(items[0][0]))]
    held = 1 + -(-TEST // len(items))
    return sum(rounds[held:], []), sum(rounds[1:held], []), rounds[0]


def drawn(rng, make):
    """(train, test, choice) of questions drawn at random, each about something (a list, a headline) that no other is about."""
    seen = {}
    while len(seen) < TRAIN + TEST + DEV + MMLU:
        about, question, answer, distractors = make()
        seen.setdefault(about, (question, answer, distractors))
    rows = list(seen.values())
    return rows[:TRAIN], rows[TRAIN:TRAIN + TEST], rows[TRAIN + TEST:]


def arithmetic(rng):
    items = []
    for a in range(1, 7):
        for b in range(1, 7):
            for phrasings, x, y, n in ((PLUS, a, b, a + b), (MINUS, a + b, b, a)):
                near = [k for k in range(max(0, n - 4), min(12, n + 4) + 1) if k != n]
                items.append(([p.format(a=NUMBERS[x], b=NUMBERS[y]) for p in phrasings], NUMBERS[n], [NUMBERS[k] for k in near]))
    return phrased(rng, items)


def words(rng):
    def make():
        four = rng.sample(WORDS, 4)
        place = rng.randrange(4)
        listed = ", ".join(four)
        return listed, rng.choice(ASK_WORD).format(p=PLACES[place], P=PLACES[place].capitalize(), l=listed), four[place], [w for w in four if w != four[place]]
    return drawn(rng, make)


def topics(rng):
    def make():
        topic = rng.choice(list(TOPICS))
        headline = " ".join(rng.choice(part) for part in (*TOPICS[topic], WHEN)) + "."
        return headline, rng.choice(ASK_TOPIC).format(h=headline), topic, [t for t in TOPICS if t != topic]
    return drawn(rng, make)


def facts(rng):
    items = []
    for values, phrasings in FACTS.values():
        for name, value in zip(NAMES, rng.sample(values, len(values))):
            items.append(([p.format(n=name) for p in phrasings], value, [v for v in values if v != value]))
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
