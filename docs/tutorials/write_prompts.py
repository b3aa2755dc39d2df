"""Write prompts for the tutorial: tasks of several kinds, each about many topics.

    python docs/tutorials/write_prompts.py prompts.jsonl held-out.jsonl

A tenth is held out for evaluation, of each topic another task: no task and no topic is new there,
but each combination is.
"""

import json
import sys
from itertools import product
from pathlib import Path

TOPICS = (
    *("rain", "volcanoes", "bees", "bread", "the moon", "bicycles", "chess", "glaciers", "coffee"),
    *("whales", "maps", "clocks", "trains", "forests", "glass", "paper", "salt", "earthquakes"),
    *("rainbows", "honey", "libraries", "bridges", "lighthouses", "deserts", "penguins", "cheese"),
    *("radio", "telescopes", "vaccines", "batteries", "compasses", "windmills", "the heart"),
    *("sleep", "music", "soccer", "swimming", "gardening", "recycling", "electricity"),
    *("tigers", "owls", "ants", "sharks", "horses", "apples", "potatoes", "rice", "chocolate"),
    *("tea", "soup", "rivers", "islands", "mountains", "caves", "clouds", "lightning", "snow"),
    *("stars", "comets", "robots", "computers", "cameras", "bicycle brakes", "magnets", "mirrors"),
    *("money", "taxes", "elections", "schools", "museums", "newspapers", "letters", "languages"),
    *("alphabets", "numbers", "prime numbers", "triangles", "statistics", "puzzles", "kites"),
    *("boats", "airplanes", "elevators", "tunnels", "castles", "gardens", "shoes", "hats"),
    *("wool", "cotton", "dyes", "pottery", "violins", "drums", "theaters", "dreams", "memory"),
)
QUESTIONS = {
    "explain": (
        "Explain {} to a ten-year-old child.",
        "What are the three most important facts about {}?",
        "Why do {} matter to people? Answer in two sentences.",
        "Describe the history of {} in one paragraph.",
        "What is a common mistake people make about {}?",
    ),
    "list": (
        "List five words that are related to {}.",
        "Give me four questions for a quiz about {}, without the answers.",
        "Write a numbered list of six things to know about {}.",
        "Name three books one could write about {}, with a sentence on each.",
    ),
    "write": (
        "Write a short poem about {}.",
        "Write the first paragraph of a story in which {} play a part.",
        "Write a friendly email that invites a colleague to a talk about {}.",
        "Write a headline and a short news item about {}.",
        "Write a dialogue of four lines between two friends about {}.",
        "Summarize what you know about {} in exactly three sentences.",
    ),
    "code": (
        "Write a Python function that counts how often the word '{}' occurs in a text.",
        "Write a Python class that stores facts about {} and prints them.",
        "Write a SQL query that finds all rows of a table `articles` whose title contains '{}'.",
        "Write a JSON object with four keys that describes {}.",
    ),
    "reason": (
        "Compare {} with something similar. What is different?",
        "Give one argument for and one argument against learning more about {}.",
        "A class has 24 students, and a third of them like {}. How many do not? Explain the steps.",
        "If {} did not exist, what would be different?",
    ),
    "rewrite": (
        "Rewrite this sentence in a formal style: I really like {}, they are super cool.",
        "Turn this into a question: People know a lot about {}.",
        "Translate into French: I would like to learn about {}.",
    ),
}
TASKS = [(kind, task) for kind, tasks in QUESTIONS.items() for task in tasks]


def write_prompts() -> list[dict[str, str]]:
    """All prompts, with their category."""
    return [
        {"prompt": task.format(topic), "category": kind}
        for topic, (kind, task) in product(TOPICS, TASKS)
    ]


def main() -> None:
    """Write both files."""
    training: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for i, row in enumerate(write_prompts()):
        topic, task = divmod(i, len(TASKS))
        (training if (topic + task) % 10 else held_out).append(row)
    for name, rows in ((sys.argv[1], training), (sys.argv[2], held_out)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(f"{len(rows):,} prompts in {name}")


if __name__ == "__main__":
    main()
