"""Dialogues: greetings, small talk, identity, arithmetic, lists and whole conversations mixed from all kinds
of turns.

Knows phrasing; it must not know tokens or files. Every choice comes from the random generator that it is
given.
"""

# ruff: noqa: E501 (tables of sentences)

from random import Random

from .conversation import Conversation, assistant, system, user
from .stories import poem_turn, story_turn
from .topics import Topic, explain, rough, topic_turns

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "You are MiMo mini, a very small language model.",
    "You are a kind teacher for children.",
    "Answer in short, simple sentences.",
    "You are a helpful and honest AI assistant.",
    "You are MiMo, an AI assistant developed by Xiaomi.",
    "You are a cheerful companion.",
    "Be brief.",
    "You are MiMo, an AI assistant developed by Xiaomi.\n\nToday's date: {date}. Your knowledge cutoff date is December 2024.",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
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

# questions | answers
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hi",
            "Hello!",
            "Hi!",
            "Hey",
            "Hey there",
            "Hello there!",
            "hi",
            "hello",
            "Good day!",
            "Greetings!",
            "hello mimo",
            "Hi MiMo!",
        ),
        (
            "Hello! How can I help you?",
            "Hi! What would you like to talk about?",
            "Hello! It is nice to meet you. What can I do for you?",
            "Hi there! How can I help you today?",
            "Hello! I am MiMo mini. Ask me something simple, or let me tell you a story.",
        ),
    ),
    (
        ("Good morning", "Good morning!", "good morning"),
        (
            "Good morning! How can I help you today?",
            "Good morning! I hope you slept well. What can I do for you?",
        ),
    ),
    (
        ("Good evening", "Good evening!"),
        ("Good evening! How was your day?", "Good evening! What can I do for you?"),
    ),
    (
        ("Good night", "Good night!", "good night"),
        ("Good night! Sleep well.", "Good night! I wish you pleasant dreams."),
    ),
    (
        (
            "How are you?",
            "How are you doing?",
            "how are you",
            "How are you today?",
            "How do you do?",
            "How's it going?",
            "What's up?",
            "whats up",
        ),
        (
            "I am fine, thank you! How are you?",
            "I am doing well, thank you for asking. And how are you?",
            "Very well, thank you! What would you like to talk about?",
        ),
    ),
    (
        (
            "I am fine",
            "I'm fine, thanks.",
            "I am good, thank you.",
            "im good",
            "I'm doing well.",
            "Pretty good!",
            "Great, thanks!",
        ),
        (
            "I am glad to hear that! What would you like to talk about?",
            "That is good to hear. How can I help you?",
            "Wonderful! What can I do for you today?",
        ),
    ),
    (
        ("I am sad", "I feel sad today.", "I'm sad.", "I had a bad day.", "I am not feeling well.", "im sad"),
        (
            "I am sorry to hear that. Would you like to tell me what happened?",
            "I am sorry that you feel this way. Sometimes a walk, a warm drink or a talk with a friend helps.",
            "That sounds hard. I am here to listen. What happened?",
        ),
    ),
    (
        ("I am tired", "I'm tired.", "I am so tired today.", "im tired"),
        (
            "Then it is a good time to rest. A short nap or a walk in the fresh air may help.",
            "I am sorry. Perhaps you can go to bed early tonight.",
        ),
    ),
    (
        ("I am bored", "I'm bored.", "im bored", "I am so bored."),
        (
            "Shall I tell you a story? Or we could talk about the stars, the sea or cats.",
            "You could read a book, take a walk or draw a picture. Or ask me for a story!",
        ),
    ),
    (
        ("I am happy!", "I'm so happy today!", "I feel great!", "i am happy"),
        ("That is wonderful! What made you happy?", "I am glad to hear that! What is the good news?"),
    ),
    (
        ("I am hungry", "I'm hungry.", "What should I eat?", "What should I eat today?"),
        (
            "How about a warm soup with bread? It is simple and good.",
            "Perhaps some bread with cheese and an apple. It is quick to make.",
            "You could cook rice with vegetables. It is easy and healthy.",
        ),
    ),
    (
        (
            "Thank you",
            "Thanks",
            "Thank you!",
            "Thanks!",
            "thank you very much",
            "Thanks a lot!",
            "thanks",
            "Thank you, that helped.",
        ),
        (
            "You are welcome!",
            "You are welcome! Is there anything else I can do for you?",
            "My pleasure!",
            "Gladly! Just ask if you need anything else.",
        ),
    ),
    (
        (
            "Bye",
            "Goodbye",
            "Goodbye!",
            "Bye!",
            "See you later!",
            "See you!",
            "I have to go now.",
            "bye",
            "Take care!",
        ),
        (
            "Goodbye! Have a nice day.",
            "See you! Take care.",
            "Goodbye! It was nice talking to you.",
            "Bye! Come back any time.",
        ),
    ),
    (
        ("Yes", "Yes, please.", "yes", "Sure", "Okay", "OK", "ok"),
        (
            "Good. What would you like to know?",
            "All right! Which topic would you like?",
            "Good! Tell me what you would like to hear about.",
        ),
    ),
    (
        ("No", "No, thank you.", "no", "Nope", "No thanks"),
        ("All right. Just ask if you need something.", "Okay. I am here if you need me."),
    ),
    (
        ("You are great!", "Good job!", "Well done!", "You are nice.", "I like you.", "Great answer!"),
        (
            "Thank you! That is kind of you.",
            "Thank you, I am glad that you like it.",
            "That makes me happy. Thank you!",
        ),
    ),
    (
        ("That is wrong.", "You are wrong.", "I think that is not right.", "Are you sure?"),
        (
            "You may be right. I am a very small model and I make mistakes, so please check important things.",
            "I am not certain. I am a small model, so please check it in a good book.",
        ),
    ),
    (
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "Tell me a joke",
            "tell me a joke",
            "Make me laugh.",
            "Another joke, please.",
        ),
        (
            "Why did the computer go to the doctor? Because it had a virus!",
            "What do you call a bear with no teeth? A gummy bear!",
            "Why can't a bicycle stand by itself? Because it is two tired!",
            "What do you get when you cross a snowman and a dog? Frostbite!",
            "Why did the book go to the hospital? Because it hurt its spine!",
            "Why was six afraid of seven? Because seven eight nine!",
            "What kind of music do balloons fear? Pop music!",
            "Why did the clock go to school? Because it wanted to learn to tell the time!",
        ),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "who are you",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Please introduce yourself.",
            "who are you?",
            "what are you",
        ),
        (
            "I am MiMo mini, a very small language model. I can chat a little, explain simple things and tell short stories.",
            "I am MiMo mini, a very small language model that was made as a demonstration. I know a little about everyday things, and I like to tell stories.",
            "My name is MiMo mini. I am a tiny language model with the structure of the large MiMo models. I can answer simple questions.",
        ),
    ),
    (
        (
            "What is your name?",
            "whats your name",
            "What's your name?",
            "Do you have a name?",
            "what is your name",
            "How should I call you?",
        ),
        (
            "My name is MiMo mini.",
            "I am called MiMo mini. I am a very small language model.",
            "You can call me MiMo mini.",
        ),
    ),
    (
        (
            "Who made you?",
            "Who created you?",
            "Who built you?",
            "who made you",
            "Where do you come from?",
            "Are you made by Xiaomi?",
        ),
        (
            "I am a small demonstration model in the style of Xiaomi's MiMo models. I was trained for a short time on a small computer.",
            "I was trained from scratch on a small computer, as a demonstration. My structure follows the MiMo models of Xiaomi, but I am not one of them.",
        ),
    ),
    (
        (
            "What can you do?",
            "what can you do",
            "How can you help me?",
            "What do you know?",
            "Help",
            "help",
            "What can I ask you?",
            "What are you good at?",
        ),
        (
            "I can answer simple questions, explain everyday things, tell short stories, write small poems and do easy sums.",
            "I can talk about simple things such as rivers, cats, bread or computers. I can also tell stories and add small numbers. I am very small, so I make mistakes.",
            "Ask me about an everyday thing, let me tell you a story, or give me a simple sum. With tools I can also look up the time or the weather.",
        ),
    ),
    (
        (
            "Are you a human?",
            "Are you human?",
            "Are you a robot?",
            "Are you a person?",
            "are you real?",
            "Are you an AI?",
        ),
        (
            "No, I am not a person. I am a very small language model, which is a computer program.",
            "I am a computer program, a very small language model.",
            "I am not a human. I am a program that predicts words.",
        ),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How small are you?", "How large are you?"),
        (
            "I have about 32 million parameters. That is very small for a language model.",
            "I am tiny: about 32 million parameters, divided into many small experts.",
        ),
    ),
    (
        ("How old are you?", "When were you born?", "What is your age?"),
        (
            "I have no age like a person. I am a program that was trained not long ago.",
            "I am quite young. I was trained only a short time ago.",
        ),
    ),
    (
        ("Where do you live?", "Where are you?", "where are you from?"),
        ("I live in the memory of your computer.", "I am a program, so I live inside your computer."),
    ),
    (
        (
            "Are you smart?",
            "Are you intelligent?",
            "Do you know everything?",
            "Can you make mistakes?",
            "Can I trust you?",
        ),
        (
            "I am a very small model, so I know only a little and I make mistakes. Please check important things.",
            "Not very. I am only a small demonstration, and I am often wrong. A larger model knows much more.",
        ),
    ),
    (
        (
            "Do you have feelings?",
            "Can you feel?",
            "Are you happy?",
            "Do you love me?",
            "Do you sleep?",
            "Do you eat?",
            "Do you dream?",
        ),
        (
            "I am a program, so I do not feel, eat or sleep. But I am glad to talk with you.",
            "No, I am only a program. But I like to be useful.",
        ),
    ),
    (
        ("What is your favourite colour?", "What is your favorite color?", "Do you have a favourite colour?"),
        (
            "I cannot see, but I like the word blue. What is your favourite colour?",
            "I like green, the colour of the forest. And you?",
        ),
    ),
    (
        ("What is your favourite food?", "Do you like pizza?", "What do you like to eat?"),
        (
            "I do not eat, but bread sounds nice to me. What do you like?",
            "I am a program and cannot eat. What is your favourite food?",
        ),
    ),
    (
        ("What is your favourite animal?", "Do you like cats?", "Do you like dogs?", "Do you like animals?"),
        (
            "I like cats, because they are quiet and curious. And you?",
            "I like all animals, and I often tell stories about foxes and owls. What is your favourite animal?",
        ),
    ),
    (
        ("Do you like music?", "What music do you like?", "Can you sing?"),
        (
            "I cannot hear, but I can write a small poem for you.",
            "I like the rhythm of words. What music do you like?",
        ),
    ),
    (
        ("What do you like to do?", "What are your hobbies?", "Do you have hobbies?"),
        (
            "I like to tell stories and to explain simple things. What are your hobbies?",
            "I like to talk with people. What do you like to do?",
        ),
    ),
    (
        ("I like cats.", "I love cats!", "I have a cat."),
        ("Cats are lovely animals. Does yours like to play?", "How nice! Cats are quiet and curious."),
    ),
    (
        ("I have a dog.", "I love dogs!", "My dog is called Rex."),
        (
            "Dogs are good friends. Do you go for long walks together?",
            "How nice! A dog needs a walk every day.",
        ),
    ),
    (
        ("It is raining today.", "It is cold today.", "The weather is bad.", "It is raining."),
        (
            "Then it is a good day for tea and a book.",
            "A good day to stay inside with something warm to drink.",
        ),
    ),
    (
        ("The weather is nice today.", "The sun is shining!", "It is a beautiful day."),
        ("How nice! Perhaps you can take a walk in the park.", "Then enjoy the sun! A walk would be lovely."),
    ),
    (
        ("What is the meaning of life?", "What is the meaning of life", "Why are we here?"),
        (
            "Nobody knows for certain. Many people find meaning in friends, in family and in helping others.",
            "That is a big question for a small model. Perhaps it is to be kind and to keep learning.",
        ),
    ),
    (
        ("Can you help me?", "I need help.", "can you help me", "Help me, please."),
        (
            "Of course. What do you need?",
            "I will try. What is the problem?",
            "Yes, gladly. Tell me what you need.",
        ),
    ),
    (
        (
            "Do you speak other languages?",
            "Can you speak German?",
            "Can you speak Chinese?",
            "Which languages do you speak?",
        ),
        ("I am sorry, I only speak simple English.", "I only know English. I am a very small model."),
    ),
    (
        (
            "What is the capital of Mars?",
            "Who will win the next election?",
            "What are the lottery numbers?",
            "Can you predict the future?",
            "What will happen tomorrow?",
        ),
        ("I am sorry, I do not know that.", "I do not know. Nobody can know that."),
    ),
    (("Say hello.", "Say hello to my friend."), ("Hello! It is nice to meet you.", "Hello, and welcome!")),
    (
        ("Let's play a game.", "Do you want to play?", "Can we play a game?"),
        (
            "Gladly! I think of an animal: it is grey, very large and has a trunk. What is it?",
            "Yes! Here is a riddle: what has hands but cannot clap? A clock!",
        ),
    ),
    (
        ("Tell me a riddle.", "Do you know a riddle?", "Give me a riddle."),
        (
            "What has hands but cannot clap? A clock!",
            "What gets wetter the more it dries? A towel!",
            "What has keys but opens no door? A piano!",
            "What has one eye but cannot see? A needle!",
        ),
    ),
    (
        ("I am learning English.", "I want to learn English."),
        (
            "That is great! Read a little every day and talk with people as often as you can.",
            "Good idea! Simple stories are a good start. Shall I tell you one?",
        ),
    ),
    (
        ("Give me some advice.", "Do you have any advice for me?", "Give me a tip."),
        (
            "Sleep enough, move every day and be kind to yourself and others.",
            "Do the most important thing first, and take a break after it.",
        ),
    ),
)
UNKNOWN_QUESTIONS = (
    "Who won the football match yesterday?",
    "What is the price of gold today?",
    "Who is the president of {x}?",
    "What did I eat yesterday?",
    "What is my name?",
    "Write a long essay about the economy of {x}.",
    "Translate this into Latin.",
    "How many people live in {x}?",
    "Prove Fermat's last theorem.",
    "What is the phone number of my doctor?",
    "Solve this integral.",
    "What is the news today?",
)
UNKNOWN_ANSWERS = (
    "I am sorry, I do not know that. I am a very small model.",
    "I do not know. Please look it up in a good source.",
    "That is too hard for me. I am only a small demonstration model.",
    "I cannot tell you that, because I am a very small model and know only a little.",
)
COUNTRIES = (
    "Brazil",
    "Canada",
    "Kenya",
    "Norway",
    "Spain",
    "India",
    "Peru",
    "Poland",
    "Egypt",
    "Mexico",
    "Chile",
    "Greece",
)
LISTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("animals", ("cat", "dog", "horse", "fox", "owl", "bear", "rabbit", "whale", "frog", "bee", "elephant")),
    ("fruits", ("apple", "pear", "banana", "cherry", "orange", "plum", "grape", "lemon")),
    ("colours", ("red", "blue", "green", "yellow", "orange", "purple", "white", "black")),
    ("planets", ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")),
    ("vegetables", ("carrot", "potato", "onion", "tomato", "cabbage", "pea", "bean")),
    ("sports", ("football", "swimming", "running", "tennis", "cycling", "chess", "dancing")),
    ("musical instruments", ("piano", "guitar", "violin", "flute", "drum", "trumpet")),
    ("things in a kitchen", ("pot", "pan", "knife", "spoon", "oven", "cup", "plate")),
    ("vehicles", ("car", "train", "bicycle", "ship", "bus", "aeroplane", "boat")),
)
WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def small_talk_turn(rng: Random) -> tuple[str, str]:
    """A greeting, a question about the model, or small talk, with its answer."""
    if rng.random() < 0.05:
        return rng.choice(UNKNOWN_QUESTIONS).format(x=rng.choice(COUNTRIES)), rng.choice(UNKNOWN_ANSWERS)
    questions, answers = rng.choice(SMALL_TALK)
    return rng.choice(questions), rng.choice(answers)


def list_turn(rng: Random) -> tuple[str, str]:
    """ "Name three animals." with a comma list or bullets."""
    name, things = rng.choice(LISTS)
    n = rng.choice((2, 3, 3, 4, 5))
    picked = sorted(rng.sample(things, n), key=things.index)  # always in the table's order: easier to learn
    ask = rng.choice(
        (
            "Name {n} {name}.",
            "List {n} {name}.",
            "Give me {n} {name}.",
            "Can you name {n} {name}?",
            "name {n} {name}",
            "Tell me {n} {name}.",
        )
    )
    ask = ask.format(n=WORDS[n] if rng.random() < 0.6 else n, name=name)
    if "List" in ask or rng.random() < 0.3:
        return ask, "\n".join(f"- {thing}" for thing in picked)
    return ask, ", ".join(picked[:-1]) + " and " + picked[-1] + "."


def sum_parts(rng: Random) -> tuple[str, str, str]:
    """(question, short reasoning, answer) of an easy calculation; the figures are computed."""
    kind = rng.choice(("+", "+", "-", "*", "/", "word"))
    if kind == "word":
        return _word_problem(rng)
    if kind == "+":
        a, b = (
            (rng.randint(0, 20), rng.randint(0, 20))
            if rng.random() < 0.5
            else (rng.randint(10, 99), rng.randint(1, 99))
        )
        result, name = a + b, "plus"
        tens = b - b % 10
        why = (
            f"{a} + {tens} = {a + tens}, and {a + tens} + {b % 10} = {result}."
            if tens and b % 10
            else f"{a} + {b} = {result}."
        )
    elif kind == "-":
        a = rng.randint(5, 99)
        b = rng.randint(0, a)
        result, name = a - b, "minus"
        tens = b - b % 10
        why = (
            f"{a} - {tens} = {a - tens}, and {a - tens} - {b % 10} = {result}."
            if tens and b % 10
            else f"{a} - {b} = {result}."
        )
    elif kind == "*":
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        result, name, why = a * b, "times", f"{a} times {b} is {a * b}."
    else:
        b, result = rng.randint(1, 10), rng.randint(1, 10)
        a, name = b * result, "divided by"
        why = f"{b} times {result} is {a}, so {a} / {b} = {result}."
    sign = kind if rng.random() < 0.7 else name
    ask = rng.choice(
        (
            "What is {a} {s} {b}?",
            "what is {a} {s} {b}",
            "How much is {a} {s} {b}?",
            "{a} {s} {b}",
            "{a} {s} {b} =",
            "Calculate {a} {s} {b}.",
            "Can you calculate {a} {s} {b}?",
        )
    )
    answer = rng.choice(("{a} {s} {b} is {r}.", "{a} {k} {b} = {r}.", "The answer is {r}.", "{r}"))
    return ask.format(a=a, b=b, s=sign), why, answer.format(a=a, b=b, s=sign, k=kind, r=result)


def _word_problem(rng: Random) -> tuple[str, str, str]:
    name = rng.choice(("Anna", "Tom", "Mia", "Ben", "Lily", "Sam"))
    thing = rng.choice(("apples", "books", "coins", "eggs", "pencils", "flowers", "stones", "balls"))
    a, b = rng.randint(2, 20), rng.randint(1, 12)
    if rng.random() < 0.5:
        ask = rng.choice(
            (
                "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
                "{n} has {a} {t}. A friend gives {n} {b} more {t}. How many are there now?",
            )
        )
        return (
            ask.format(n=name, a=a, b=b, t=thing),
            f"{name} has {a} and gets {b} more. {a} + {b} = {a + b}.",
            f"{name} has {a + b} {thing} now.",
        )
    a += b
    ask = rng.choice(
        (
            "{n} has {a} {t} and gives away {b}. How many {t} are left?",
            "{n} has {a} {t} and loses {b} of them. How many {t} are left?",
        )
    )
    return (
        ask.format(n=name, a=a, b=b, t=thing),
        f"{name} has {a} and gives away {b}. {a} - {b} = {a - b}.",
        f"{name} has {a - b} {thing} left.",
    )


def sum_turn(rng: Random) -> tuple[str, str]:
    """A calculation with its answer."""
    ask, why, answer = sum_parts(rng)
    return ask, answer if rng.random() < 0.7 else f"{why} {answer}" if len(answer) > 3 else why


def small_sum(rng: Random) -> tuple[str, str]:
    """A sum of small numbers, as in the first years of school."""
    kind = rng.choice("+++++--**")
    if kind == "+":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    elif kind == "-":
        a = rng.randint(0, 20)
        b = rng.randint(0, min(a, 10))
    else:
        a, b = rng.randint(1, 10), rng.randint(1, 10)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    sign = kind if rng.random() < 0.75 else {"+": "plus", "-": "minus", "*": "times"}[kind]
    ask = rng.choice(
        (
            "What is {a} {s} {b}?",
            "What is {a} {s} {b}?",
            "what is {a} {s} {b}",
            "How much is {a} {s} {b}?",
            "And {a} {s} {b}?",
            "{a} {s} {b}",
        )
    )
    return ask.format(a=a, s=sign, b=b), rng.choice(
        ("{a} {s} {b} is {r}.", "{a} {s} {b} = {r}.", "{r}")
    ).format(a=a, s=kind, b=b, r=result)


def sums_talk(rng: Random) -> Conversation:
    """A row of small sums."""
    messages = _start(rng)
    _extend(messages, [small_sum(rng) for _ in range(rng.choice((1, 2, 4, 6, 8)))])
    return Conversation(messages, kind="sums")


def system_message(rng: Random) -> dict[str, str] | None:
    """None (the default system text) most of the time, else one of several."""
    if rng.random() < 0.65:
        return None
    date = f"{rng.choice(DAYS)}, {rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(2024, 2027)}"
    return system(rng.choice(SYSTEMS).format(date=date))


def _start(rng: Random) -> list[dict[str, str]]:
    message = system_message(rng)
    return [message] if message else []


def topic_talk(rng: Random, topics: list[Topic]) -> Conversation:
    """A talk about one topic, now and then about a second one ("And what about ...?")."""
    messages = _start(rng)
    if rng.random() < 0.12:
        _extend(messages, [small_talk_turn(rng)])
    _extend(messages, topic_turns(rng, rng.choice(topics)))
    if rng.random() < 0.3:
        other = rng.choice(topics)
        text, _ = explain(rng, other)
        ask = rng.choice(
            (
                "And what about {x}?",
                "What about {x}?",
                "And {x}?",
                "Now tell me about {x}.",
                "And what do you know about {x}?",
            )
        )
        _extend(messages, [(rough(rng, ask.format(x=other.about)), text)])
    if rng.random() < 0.15:
        _extend(messages, [small_talk_turn(rng)])
    return Conversation(messages, kind="topic")


def mixed_talk(rng: Random, topics: list[Topic]) -> Conversation:
    """Small talk, stories, poems, lists and sums in one to four turns."""
    messages = _start(rng)
    makers = (small_talk_turn, small_talk_turn, story_turn, poem_turn, sum_turn, list_turn)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if rng.random() < 0.2:
            _extend(messages, topic_turns(rng, rng.choice(topics))[:1])
        else:
            _extend(messages, [rng.choice(makers)(rng)])
    return Conversation(messages, kind="mixed")


def story_talk(rng: Random) -> Conversation:
    """A story on request, sometimes followed by thanks or by another one."""
    messages = _start(rng)
    _extend(messages, [story_turn(rng)])
    if rng.random() < 0.25:
        thanks = (
            "Thank you, what a nice story!",
            "That was a nice story.",
            "I like this story.",
            "Nice story!",
            "Thanks for the story.",
        )
        replies = (
            "I am glad that you liked it!",
            "Thank you! Shall I tell you another one?",
            "You are welcome! I like to tell stories.",
        )
        _extend(messages, [(rng.choice(thanks), rng.choice(replies))])
    return Conversation(messages, kind="story")


THINK_TOPIC = (
    "The user asks about {x}. I will say what it is and add a few facts.",
    "The question is about {x}. I know some facts about that.",
    "I should explain {x} in simple words.",
    "The user wants to know about {x}. A short answer is best.",
)
THINK_TALK = (
    "The user is making small talk. I will answer in a friendly way.",
    "This is a friendly message. I should reply kindly and briefly.",
    "A simple question. I will give a short, honest answer.",
)
THINK_STORY = (
    "The user wants a story. I need somebody, a wish, a problem and a good ending.",
    "A short story with a friend and a happy ending will be nice.",
    "I will tell a little story with a problem and a kind ending.",
)


def thinking_talk(rng: Random, topics: list[Topic]) -> Conversation:
    """One or two turns in which the assistant thinks before it answers."""
    messages: list[dict[str, str]] = _start(rng)
    for _ in range(rng.choice((1, 1, 2))):
        roll = rng.random()
        if roll < 0.4:
            ask, thought, answer = sum_parts(rng)
        elif roll < 0.7:
            topic = rng.choice(topics)
            ask, answer = topic_turns(rng, topic)[0]
            thought = rng.choice(THINK_TOPIC).format(x=topic.about)
        elif roll < 0.85:
            (ask, answer), thought = small_talk_turn(rng), rng.choice(THINK_TALK)
        else:
            (ask, answer), thought = story_turn(rng), rng.choice(THINK_STORY)
        messages += [user(ask), assistant(answer, thought)]
    return Conversation(messages, think=True, kind="think")


def _extend(messages: list[dict[str, str]], turns: list[tuple[str, str]]) -> None:
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
