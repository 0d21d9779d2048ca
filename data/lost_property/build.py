"""Write the lost-property task: messages of passengers, and the slips of the desk.

    python data/lost_property/build.py [FOLDER]

A slip is one line: item; train; day. Where a passenger leaves out the train or the day,
the desk asks for it. train.jsonl and train.csv hold a few rows that are broken on
purpose, as data of one's own are.
"""

import csv
import io
import json
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).parent
SEED, TRAINING, TEST = 7, 100, 40
SYSTEM = (
    "Lost property desk. Write the slip: item; train; day. Ask for what is missing."
)
INSTRUCTION = "Write the slip for this message: item; train; day."
THINGS = (
    "umbrella suitcase scarf hat violin camera notebook lantern teapot kite "
    "telescope chessboard cello parcel walking_stick"
).split()
COLOURS = "red green blue black white yellow".split()
TRAINS = "Raven Owl Venus Lynx Comet Heron Wolf Aurora Bat Fox".split()
MONTHS = "January March May July September November".split()
WORDINGS = [  # to train on
    "I left my {item} on the {train} on {day}.",
    "On {day} I forgot a {item} in my compartment of the {train}.",
    "My {item} is gone! It was on the {train}, the night of {day}.",
    "Has anybody handed in a {item}? I rode the {train} on {day}.",
    "The {train} of {day} took my {item} along without me.",
    "Good morning, I am missing a {item} since {day}, when I took the {train}.",
]
NEW_WORDINGS = [  # to test
    "I got off the {train} on {day} and my {item} did not.",
    "Could you look for a {item}? It was the {train}, {day}.",
    "Somewhere on the {train} there must be a {item} of mine, lost on {day}.",
]
OPENINGS = [  # what is missing, what the passenger says, what the desk asks
    ("{train}", "I lost a {item} on {day}.", "On which train?"),
    ("{train}", "It was {day} when I last saw my {item}.", "On which train?"),
    ("{day}", "My {item} is still on the {train}, I think.", "On which day?"),
    ("{day}", "I have left a {item} in the {train}.", "On which day?"),
]
REPLIES = ["{}.", "It was {}.", "{}, I am sure."]


def loss(rng: random.Random) -> dict[str, str]:
    """An item that somebody lost, the train and the day."""
    thing = rng.choice(THINGS).replace("_", " ")
    return {
        "item": f"{rng.choice(COLOURS)} {thing}",
        "train": rng.choice(TRAINS),
        "day": f"{1 + rng.choice(range(28))} {rng.choice(MONTHS)}",
    }


def slip(lost: dict[str, str]) -> str:
    return "{item}; {train}; {day}".format(**lost)


def chat(*texts: str) -> dict:
    """A record with a chat: the system message, then passenger and desk in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": SYSTEM}, *turns]}


def records(rng: random.Random, wordings: list[str], count: int) -> list[dict]:
    """Chats about different losses; every third one has two turns of each side."""
    made, seen = [], set()
    while len(made) < count:
        lost = loss(rng)
        if slip(lost) in seen:
            continue
        seen.add(slip(lost))
        if len(made) % 3 == 2:
            missing, opening, question = rng.choice(OPENINGS)
            reply = rng.choice(REPLIES).format(missing.format(**lost))
            reply = f"The {reply}" if missing == "{train}" else reply
            reply = reply.replace("The It was ", "It was the ")
            made.append(chat(opening.format(**lost), question, reply, slip(lost)))
        else:
            made.append(chat(rng.choice(wordings).format(**lost), slip(lost)))
    return made


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict]) -> str:
    file = io.StringIO()
    columns = ["instruction", "input", "output"]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        message, answer = (turn["content"] for turn in row["messages"][1:])
        writer.writerow(dict(zip(columns, (INSTRUCTION, message, answer), strict=True)))
    return file.getvalue()


def files() -> dict[str, str]:
    rng = random.Random(SEED)
    training = records(rng, WORDINGS, TRAINING)
    test = records(rng, NEW_WORDINGS, TEST)
    said = "I walked up and down the corridor, and it was nowhere. "
    broken = {  # row: what is put there
        17: chat(WORDINGS[0].format(**loss(rng)), ""),
        41: chat("I lost a red hat on the Owl on 3 May. " + 60 * said, "red hat; Owl"),
        66: chat("I lost a kite.", "On which train?", "I do not remember."),
    }
    for row, record in broken.items():
        training.insert(row, record)
    single = [row for row in training if len(row["messages"]) == 3]
    return {
        "train.jsonl": lines(training),
        "train.csv": table(single),
        "test.jsonl": lines(test),
    }


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else HERE)
