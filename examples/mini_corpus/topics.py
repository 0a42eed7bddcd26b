"""Topics: the table of everyday facts (topics.txt) and the questions and answers made from it.

Knows facts and phrasing; it must not know the chat format beyond user and assistant turns.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

TABLE = Path(__file__).with_name("topics.txt")

ASK_ABOUT = (
    "Tell me about {about}.",
    "Tell me something about {about}.",
    "tell me about {about}",
    "What do you know about {about}?",
    "Can you tell me about {about}?",
    "Can you tell me something about {about}?",
    "Could you tell me a little about {about}?",
    "I want to know more about {about}.",
    "Please tell me about {about}.",
    "Talk to me about {about}.",
    "what can you tell me about {about}?",
    "Say something about {about}.",
    "Explain {about}.",
    "Explain {about} to me.",
    "Please explain {about}.",
    "Write a few sentences about {about}.",
    "Give me some facts about {about}.",
    "I would like to learn about {about}.",
    "Do you know anything about {about}?",
    "Let's talk about {about}.",
    "Teach me about {about}.",
    "Describe {about}.",
    "Write a short text about {about}.",
)
ASK_WHAT = (
    "What is {what}?",
    "what is {what}?",
    "What is {what}",
    "Can you explain what {what} is?",
    "What's {what}?",
    "Do you know what {what} is?",
    "Explain what {what} is.",
    "Please tell me what {what} is.",
    "what is {what}",
    "Could you explain what {what} is?",
    "Tell me what {what} is.",
    "Define {what}.",
    "whats {what}?",
    "What exactly is {what}?",
    "What is {what}? Explain it simply.",
    "In one sentence, what is {what}?",
)
ASK_FACT = (
    "Tell me a fact about {about}.",
    "Tell me one interesting thing about {about}.",
    "Give me one fact about {about}.",
    "What is interesting about {about}?",
    "Do you know a fun fact about {about}?",
)
MORE = (
    "Tell me more.",
    "Can you tell me more?",
    "What else?",
    "Go on.",
    "More, please.",
    "Anything else?",
    "tell me more",
    "Interesting! What else do you know?",
    "And what else?",
    "Please continue.",
)
NO_MORE = (
    "That is all I know about {about}. I am only a very small model.",
    "I am afraid that is everything I know about {about}.",
    "I do not know more than that about {about}. I am a small model, so my knowledge is short.",
)
OPENERS = ("", "", "", "", "", "Sure. ", "Of course. ", "Gladly. ", "Yes. ", "With pleasure. ")
LINKS = ("", "", "", "", "Also, ", "Besides, ", "What is more, ")
CLOSERS = ("", "", "", "", "", "", " Would you like to know more?", " Do you want to hear more?")
POLITE = (
    "",
    "",
    "",
    "",
    "Hi! ",
    "Hello! ",
    "Hello, ",
    "Please: ",
    "Quick question: ",
    "I have a question. ",
    "Hey, ",
)


@dataclass(frozen=True)
class Topic:
    """One subject: how it is named after "about", after "what is", its room, its facts and fixed questions."""

    about: str
    what: str
    group: str
    facts: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def load_topics(path: Path = TABLE) -> list[Topic]:
    """All topics of the table, in its order."""
    topics: list[Topic] = []
    for block in path.read_text(encoding="utf-8").split("\n# "):
        head, *lines = block.removeprefix("# ").strip().split("\n")
        about, what, group = (part.strip() for part in head.split("|"))
        facts = tuple(line for line in lines if not line.startswith("?"))
        pairs = tuple(_pair(line) for line in lines if line.startswith("?"))
        topics.append(Topic(about, what, group, facts, pairs))
    return topics


def _pair(line: str) -> tuple[str, str]:
    question, answer = line[1:].split(" = ", 1)
    return question.strip(), answer.strip()


def lower_first(sentence: str) -> str:
    """The sentence with a small first letter, where its first word is not a name."""
    keep = (
        "I ",
        "Paris",
        "London",
        "Tokyo",
        "Berlin",
        "Rome",
        "Beijing",
        "Mars",
        "Python",
        "Xiaomi",
        "Sailors",
    )
    return sentence if sentence.startswith(keep) else sentence[0].lower() + sentence[1:]


def rough(rng: Random, text: str) -> str:
    """The question as a hurried person types it: small letters, no full stop, a letter too few."""
    roll = rng.random()
    if roll < 0.72:
        return text
    if roll < 0.86:
        return text.lower()
    if roll < 0.94:
        return text.lower().rstrip(".?!")
    at = rng.randrange(1, max(2, len(text) - 2))
    return text[:at] + text[at + 1 :]


def join_facts(rng: Random, facts: list[str] | tuple[str, ...]) -> str:
    """Several facts as running text; now and then a later one is linked with a small word."""
    out = [facts[0]]
    for n, fact in enumerate(facts[1:]):
        link = rng.choice(LINKS) if n else ""
        out.append(link + (lower_first(fact) if link else fact))
    return " ".join(out)


def explain(rng: Random, topic: Topic, count: int | None = None) -> tuple[str, list[str]]:
    """An answer of `count` facts in their natural order, and the facts that were left out."""
    count = min(len(topic.facts), count or rng.choice((1, 2, 3, 3, 4, 5)))
    others = list(range(1, len(topic.facts)))
    if rng.random() < 0.3:
        rng.shuffle(others)
    chosen = [0, *sorted(others[: count - 1])]
    left = [fact for n, fact in enumerate(topic.facts) if n not in chosen]
    return join_facts(rng, [topic.facts[n] for n in chosen]), left


def topic_turns(rng: Random, topic: Topic) -> list[tuple[str, str]]:
    """One to four question and answer turns about one topic, with follow-ups."""
    turns: list[tuple[str, str]] = []
    roll, left = rng.random(), list(topic.facts)
    if topic.pairs and roll < 0.33:
        question, answer = rng.choice(topic.pairs)
        turns.append((rng.choice(POLITE) + rough(rng, question), answer))
        left = list(topic.facts)
    elif roll < 0.4:
        fact = rng.choice(topic.facts)
        turns.append((rough(rng, rng.choice(ASK_FACT).format(about=topic.about)), _alone(topic, fact)))
        left = [f for f in topic.facts if f != fact]
    elif roll < 0.75:
        text, left = explain(rng, topic)
        turns.append(
            (
                rng.choice(POLITE) + rough(rng, rng.choice(ASK_ABOUT).format(about=topic.about)),
                rng.choice(OPENERS) + text + (rng.choice(CLOSERS) if left else ""),
            )
        )
    else:
        text, left = explain(rng, topic, rng.choice((1, 2, 2, 3)))
        turns.append((rng.choice(POLITE) + rough(rng, rng.choice(ASK_WHAT).format(what=topic.what)), text))
    while rng.random() < 0.4 and len(turns) < 4:
        if rng.random() < 0.5 and topic.pairs:
            question, answer = rng.choice(topic.pairs)
            turns.append((rough(rng, question), answer))
        elif left:
            take = left[: rng.choice((1, 2))]
            left = left[len(take) :]
            turns.append((rng.choice(MORE), join_facts(rng, [_alone(topic, take[0]), *take[1:]])))
        else:
            turns.append((rng.choice(MORE), rng.choice(NO_MORE).format(about=topic.about)))
    return turns


def _alone(topic: Topic, fact: str) -> str:
    """A fact that may begin with "It" made to stand alone: the pronoun becomes the topic's name."""
    name = topic.what[0].upper() + topic.what[1:]
    for pronoun in ("It ", "Its "):
        if fact.startswith(pronoun) and topic.what not in fact.lower():
            return name + ("'s " if pronoun == "Its " else " ") + fact[len(pronoun) :]
    return fact
