"""Tool conversations: clock, weather, calculator and files, called in MiMo's format, with results and final
answers.

Knows a handful of tool schemas; it must not know how they are rendered.
"""

import json
from random import Random
from typing import Any

from .conversation import Conversation, assistant, user
from .dialogues import DAYS, small_talk_turn, system_message
from .topics import Topic, rough, topic_turns

CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Tokyo",
    "Beijing",
    "Rome",
    "Madrid",
    "Oslo",
    "Vienna",
    "Cairo",
    "Lima",
    "Delhi",
    "Sydney",
    "Boston",
    "Prague",
    "Dublin",
    "Athens",
    "Lisbon",
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear")
FILES = (
    "notes.txt",
    "todo.txt",
    "readme.md",
    "letter.txt",
    "shopping.txt",
    "plan.md",
    "poem.txt",
    "config.txt",
    "diary.txt",
    "recipe.txt",
)
CONTENTS = (
    ("milk, bread, apples and cheese", "It is a shopping list: milk, bread, apples and cheese."),
    ("Water the flowers on Monday.", "It says: Water the flowers on Monday."),
    ("Call Anna at five.", "It says that you should call Anna at five."),
    ("The train leaves at nine.", "It says that the train leaves at nine."),
    ("Buy a present for Tom.", "It says: Buy a present for Tom."),
    ("Meeting on Tuesday at ten.", "There is a meeting on Tuesday at ten."),
    ("The key is under the red pot.", "It says that the key is under the red pot."),
    ("Dear Lily, thank you for the book.", "It is a letter: Dear Lily, thank you for the book."),
    ("flour, eggs, sugar and butter", "It is a list: flour, eggs, sugar and butter."),
    ("Feed the cat twice a day.", "It says: Feed the cat twice a day."),
)


USUAL = 0.85  # how often all tools have their usual names


def _schema(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _variants(rng: Random) -> dict[str, dict[str, Any]]:
    """The four tools under names that vary, so that the model reads the names from the prompt."""
    city = {
        "type": "string",
        "description": rng.choice(("The name of the city.", "City name", "The city to look up")),
    }
    usual = rng.random() < USUAL
    where = "city" if usual else rng.choice(("city", "location", "place"))
    text = "expression" if usual else rng.choice(("expression", "formula"))
    path = "path" if usual else rng.choice(("path", "file", "filename"))
    return {
        "weather": _schema(
            "get_weather" if usual else rng.choice(("get_weather", "weather", "current_weather")),
            rng.choice(
                ("Get the current weather of a city.", "Returns the weather for a place.", "Get the weather.")
            ),
            {where: city},
            [where],
        ),
        "clock": _schema(
            "get_time" if usual else rng.choice(("get_time", "clock", "current_time")),
            rng.choice(
                ("Get the current time in a city.", "Returns the local time of a place.", "Get the time.")
            ),
            {where: city},
            [where],
        ),
        "sum": _schema(
            "calculator" if usual else rng.choice(("calculator", "calculate", "compute")),
            rng.choice(("Evaluate an arithmetic expression.", "Calculate the value of an expression.")),
            {text: {"type": "string", "description": "The expression, such as 2 + 3"}},
            [text],
        ),
        "file": _schema(
            "read_file" if usual else rng.choice(("read_file", "open_file", "get_file")),
            rng.choice(("Read a text file.", "Returns the content of a file.")),
            {path: {"type": "string", "description": "The path of the file."}},
            [path],
        ),
    }


def _argument(tool: dict[str, Any]) -> str:
    return next(iter(tool["function"]["parameters"]["properties"]))


def _call(tool: dict[str, Any], value: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool["function"]["name"], "arguments": {_argument(tool): value}},
    }


def _weather(rng: Random) -> tuple[str, str, str, str]:
    city, sky, degrees = rng.choice(CITIES), rng.choice(SKIES), rng.randint(-5, 34)
    ask = rng.choice(
        (
            "What is the weather in {c}?",
            "How is the weather in {c}?",
            "What's the weather like in {c} today?",
            "Is it cold in {c}?",
            "weather in {c}",
            "Do I need an umbrella in {c}?",
            "Tell me the weather in {c}.",
        )
    )
    style = rng.random()
    result = (
        json.dumps({"city": city, "weather": sky, "temperature": degrees})
        if style < 0.5
        else f"{sky}, {degrees} degrees"
    )
    answer = rng.choice(
        (
            "It is {s} in {c}, with {d} degrees.",
            "The weather in {c} is {s}, and the temperature is {d} degrees.",
            "In {c} it is {s} at {d} degrees.",
        )
    )
    return ask.format(c=city), city, result, answer.format(c=city, s=sky, d=degrees)


def _clock(rng: Random) -> tuple[str, str, str, str]:
    city, time = rng.choice(CITIES), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    ask = rng.choice(
        (
            "What time is it in {c}?",
            "What is the time in {c}?",
            "what time is it in {c}",
            "How late is it in {c}?",
            "Tell me the time in {c}.",
        )
    )
    day = rng.choice(DAYS)
    result = json.dumps({"city": city, "time": time}) if rng.random() < 0.5 else f"{time}, {day}"
    answer = rng.choice(("It is {t} in {c}.", "The time in {c} is {t}.", "In {c} it is {t} now."))
    return ask.format(c=city), city, result, answer.format(c=city, t=time)


def _sum(rng: Random) -> tuple[str, str, str, str]:
    a, b, sign = rng.randint(2, 999), rng.randint(2, 999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    words = {"+": "plus", "-": "minus", "*": "times"}[sign]
    ask = rng.choice(
        (
            "What is {a} {w} {b}?",
            "Calculate {a} {s} {b}.",
            "How much is {a} {s} {b}?",
            "what is {a} {s} {b}",
            "Please compute {a} {s} {b}.",
        )
    )
    answer = rng.choice(("{a} {s} {b} is {v}.", "The result is {v}.", "{a} {s} {b} = {v}."))
    return (
        ask.format(a=a, b=b, w=words, s=sign),
        f"{a} {sign} {b}",
        str(value),
        answer.format(a=a, b=b, s=sign, v=value),
    )


def _file(rng: Random) -> tuple[str, str, str, str]:
    name, (content, answer) = rng.choice(FILES), rng.choice(CONTENTS)
    ask = rng.choice(
        (
            "What is in {f}?",
            "Read the file {f}.",
            "Can you read {f} for me?",
            "Open {f} and tell me what it says.",
            "What does {f} say?",
            "Please read {f}.",
        )
    )
    return ask.format(f=name), name, content, answer


MAKERS = {"weather": _weather, "clock": _clock, "sum": _sum, "file": _file}
THOUGHTS = {
    "weather": (
        "The user asks about the weather. I should call {n}.",
        "I do not know the weather, so I will use {n} with {v}.",
    ),
    "clock": (
        "The user wants to know the time. I should call {n}.",
        "I cannot know the time, so I will use {n} with {v}.",
    ),
    "sum": ("This is a calculation. I will use {n}.", "I should use {n} for {v}."),
    "file": (
        "I have to read {v}. I will use {n}.",
        "The user wants to know what is in a file. I should call {n}.",
    ),
}
AFTER = (
    "The tool has answered. I can tell the user now.",
    "Now I have the result.",
    "I have what I need for the answer.",
)


def tool_talk(rng: Random, topics: list[Topic]) -> Conversation:
    """One or two questions that need a tool, or one that does not, with one to four tools on offer."""
    offered = _variants(rng)
    kinds = rng.sample(sorted(offered), rng.choice((1, 2, 2, 3, 4)))
    think = rng.random() < 0.35
    first = system_message(rng)
    messages: list[dict[str, Any]] = [first] if first else []
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15:
            question, answer = (
                topic_turns(rng, rng.choice(topics))[0] if rng.random() < 0.5 else small_talk_turn(rng)
            )
            messages += [user(question), assistant(answer, "No tool is needed for this." if think else "")]
            continue
        kind = rng.choice(kinds)
        tool = offered[kind]
        question, value, result, answer = MAKERS[kind](rng)
        thought = rng.choice(THOUGHTS[kind]).format(n=tool["function"]["name"], v=value) if think else ""
        before = rng.choice(("", "", "", "Let me check.", "One moment."))
        messages += [
            user(rough(rng, question) if kind in ("weather", "clock") and value.islower() else question),
            assistant(before, thought, [_call(tool, value)]),
            {"role": "tool", "content": result},
            assistant(answer, rng.choice(AFTER) if think else ""),
        ]
    return Conversation(messages, tools=[offered[k] for k in kinds], think=think, kind="tools")
