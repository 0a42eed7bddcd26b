"""Stories from a grammar (somebody, a place, a wish, an obstacle, a friend, an ending), and short poems.

Knows only words; every choice comes from the random generator that it is given.
"""

# ruff: noqa: E501 (tables of sentences)

from random import Random

CHILDREN = (
    "Mia",
    "Tom",
    "Lily",
    "Ben",
    "Anna",
    "Leo",
    "Nora",
    "Max",
    "Ella",
    "Sam",
    "Lucy",
    "Finn",
    "Ruby",
    "Jack",
    "Emma",
)
ANIMALS = (
    ("fox", "Rusty"),
    ("rabbit", "Hazel"),
    ("mouse", "Pip"),
    ("bear", "Bruno"),
    ("owl", "Olga"),
    ("cat", "Misty"),
    ("dog", "Rex"),
    ("frog", "Fred"),
    ("hedgehog", "Hugo"),
    ("squirrel", "Nutty"),
    ("duck", "Dora"),
    ("turtle", "Tilly"),
    ("penguin", "Pablo"),
    ("elephant", "Ella"),
    ("robot", "Bolt"),
    ("bee", "Bella"),
    ("whale", "Wanda"),
    ("horse", "Star"),
)
PLACES = (
    "in a small village by the sea",
    "at the edge of a green forest",
    "in a house on a hill",
    "near a quiet river",
    "in a lighthouse by the sea",
    "on a little farm",
    "in an old garden",
    "in a big city",
    "in a valley between two mountains",
    "on a small island",
    "beside a clear lake",
    "in a castle with a tall tower",
)
ADJECTIVES = ("little", "young", "brave", "curious", "shy", "cheerful", "clever", "quiet", "kind", "small")
# wish, the way towards it, what goes wrong, how a friend helps, how it ends
PLOTS = (
    (
        "wanted to see the sea",
        "set out early in the morning with some bread in a bag",
        "After an hour the path came to a wide river, and there was no bridge",
        "{friend} knew where some flat stones lay in the water, and together they jumped from one to the next",
        "In the evening they stood on the beach and listened to the waves",
    ),
    (
        "wanted to learn how to fly a kite",
        "built a kite from paper and thin sticks",
        "But each time the kite went up, it fell down again",
        '{friend} tied a long tail to it and said, "Now it will be steady in the wind"',
        "The kite rose higher and higher, until it was only a red dot in the sky",
    ),
    (
        "had lost a favourite hat",
        "looked under the bed, behind the door and in the garden",
        "The hat was nowhere, and it was getting dark",
        "{friend} came with a lantern and looked up into the old apple tree",
        "There was the hat, and a small bird was sleeping in it. They let the bird keep it until spring",
    ),
    (
        "wanted to bake a cake for grandmother's birthday",
        "mixed flour, eggs and sugar in a large bowl",
        "Then it turned out that there was no honey left",
        "{friend} ran to the bees and asked politely, and the bees gave a full jar",
        "The cake was a little crooked, but grandmother said that it was the best cake of her life",
    ),
    (
        "was afraid of the dark",
        "tried to sleep with the blanket over the ears",
        "One night the lamp went out, and everything was black",
        "{friend} opened the window and showed the stars, one after another",
        "From that night on the dark was no longer frightening, because it was full of stars",
    ),
    (
        "dreamed of finding a treasure",
        "found an old map in a box and followed it",
        "The map led to a deep cave, and inside it was cold and wet",
        "{friend} held one end of a rope, so that nobody could get lost",
        "At the end of the cave they found no gold, but a warm spring with clear blue water, and they came back every summer",
    ),
    (
        "wanted to grow the largest pumpkin in the land",
        "planted a seed and watered it every day",
        "Then came a hot summer, and the well ran dry",
        "{friend} helped to carry water from the river, bucket by bucket",
        "In autumn the pumpkin was so large that the whole village ate soup from it",
    ),
    (
        "wished for a friend",
        "walked through the fields and said hello to everyone",
        "But everyone was busy, and nobody had time",
        "{friend} was sitting alone under a tree and was wishing for the same thing",
        "They shared an apple, and from that day on they were never lonely again",
    ),
    (
        "wanted to sing in the spring concert",
        "practised every morning",
        "On the day of the concert the voice was suddenly gone",
        '{friend} brought hot tea with honey and said, "Drink this slowly"',
        "In the evening the song sounded clear and bright, and everybody clapped",
    ),
    (
        "found a small bird that could not fly",
        "made a soft nest in a box",
        "The bird would not eat, and it grew weak",
        "{friend} knew that young birds like worms and seeds, and brought both",
        "After two weeks the bird spread its wings, flew once around the house and sang its thanks",
    ),
    (
        "wanted to build a boat",
        "collected wood and nails for many days",
        "But when the boat touched the water, it began to leak",
        "{friend} filled the gaps with wax, and the boat stayed dry",
        "They sailed across the lake, and the evening sun made the water golden",
    ),
    (
        "wanted to know where the rainbow ends",
        "followed it across the fields",
        "The rainbow always moved away, and soon the way home was lost",
        "{friend} knew how to find the way by the sun and led the way back",
        "At home there was hot soup, and they agreed that the end of the rainbow must be in the kitchen",
    ),
    (
        "had to bring a letter to the other side of the mountain",
        "walked up the steep path",
        "Near the top it began to snow, and the path could not be seen",
        "{friend} rang a bell again and again, so that the sound showed the way",
        'The letter arrived in time, and it said: "Come to my party, and bring a friend"',
    ),
    (
        "wanted to win the big race",
        "ran around the pond each day",
        "In the middle of the race another runner fell and hurt a foot",
        '{friend} called out, "Stop and help!", and that was the right thing to do',
        "They came in last, hand in hand, and the crowd cheered louder than for anybody else",
    ),
    (
        "could not sleep because the clock was too loud",
        "put the clock under a pillow",
        "But then it was too quiet, and that was even worse",
        "{friend} said that a clock only counts the good moments of the night",
        "Since then the ticking has sounded like a soft song, and sleep comes quickly",
    ),
    (
        "wanted to cheer up the old lighthouse keeper",
        "picked a bunch of yellow flowers",
        "But the sea was wild, and the path to the lighthouse was under water",
        "{friend} waited with a small boat behind the rocks, where the water was calm",
        "The old keeper smiled, put the flowers by the lamp and told stories until midnight",
    ),
)
OPENINGS = (
    "Once upon a time there was a {adj} {what} named {name} who lived {place}.",
    "Once there was a {adj} {what} called {name}. {name} lived {place}.",
    "A {adj} {what} named {name} lived {place}.",
    "Long ago a {adj} {what} called {name} lived {place}.",
    "There once was a {what} named {name} who lived {place}. Everybody said that {name} was {adj}.",
)
WEATHER = (
    "It was a sunny day.",
    "The morning was cool and clear.",
    "A soft wind was blowing.",
    "The air smelled of flowers.",
    "Snow lay on the roofs.",
    "It had rained in the night.",
    "",
    "",
    "The first leaves were turning yellow.",
)
FEELINGS = (
    "{name} was sad and did not know what to do.",
    "{name} sat down and sighed.",
    "For a moment {name} wanted to give up.",
    "{name} began to worry.",
    '"What shall I do now?" said {name}.',
    '"Oh no!" cried {name}.',
)
MEETINGS = (
    "Then {friend} came along.",
    "Just then {friend} appeared.",
    "Luckily, {friend} was near.",
    "Soon {friend} heard of it and came at once.",
)
THANKS = (
    '"Thank you!" said {name}.',
    "{name} was very happy.",
    '"You are a true friend," said {name}.',
    "{name} laughed with joy.",
)
MORALS = (
    "And {name} learned that things are easier with a friend.",
    "And so {name} learned that it is good to ask for help.",
    "The end.",
    "And they stayed friends for the rest of their lives.",
    "And that night {name} slept very well.",
    "",
    "",
)
ASK_STORY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
    "Write a short story.",
    "Please tell me a story.",
    "tell me a story",
    "I would like to hear a story.",
    "Write a little story for children.",
    "Tell me a bedtime story.",
    "Do you know a story?",
    "Tell me a nice story, please.",
)
ASK_STORY_ABOUT = (
    "Tell me a story about {x}.",
    "Write a short story about {x}.",
    "Can you write a story about {x}?",
    "tell me a story about {x}",
    "Tell me a short story about {x}.",
    "I want a story about {x}.",
    "Please write a little story about {x}.",
    "Write a story about {x}.",
)


def _hero(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.35:
        return rng.choice(("girl", "boy", "child")), rng.choice(CHILDREN)
    kind, name = rng.choice(ANIMALS)
    return kind, name if rng.random() < 0.7 else rng.choice(CHILDREN)


def story(rng: Random) -> tuple[str, str]:
    """A story and what it is about ("a fox", "a fox named Rusty", ...)."""
    what, name = _hero(rng)
    kind, other = rng.choice([a for a in ANIMALS if a[0] != what and a[1] != name])
    friend = f"{other} the {kind}"
    adjective = rng.choice(ADJECTIVES)
    wish, way, trouble, help_, end = rng.choice(PLOTS)
    fill = {"name": name, "what": what, "adj": adjective, "place": rng.choice(PLACES), "friend": friend}
    short = {**fill, "friend": other}
    parts = [
        rng.choice(OPENINGS).format(**fill),
        f"{name} {wish}.",
        rng.choice(WEATHER),
        f"So {name} {way}.",
        f"{trouble}.",
        rng.choice(FEELINGS).format(**fill),
        rng.choice(MEETINGS).format(**fill),
        help_.format(**short) + ".",
        rng.choice(THANKS).format(**fill),
        f"{end}.",
        rng.choice(MORALS).format(**fill),
    ]
    text = " ".join(part for part in parts if part).replace("A adventurous", "An adventurous")
    article = "an" if what[0] in "aeiou" else "a"
    return text, rng.choice(
        (
            f"{article} {what}",
            f"{article} {adjective} {what}",
            f"{article} {what} named {name}",
            f"{article} {what} and a friend",
        )
    )


def story_turn(rng: Random) -> tuple[str, str]:
    """A request for a story and the story."""
    text, about = story(rng)
    if rng.random() < 0.4:
        return rng.choice(ASK_STORY), text
    return rng.choice(ASK_STORY_ABOUT).format(x=about), text


HAIKU: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "the moon": (
        ("The moon is rising", "Silver light above"),
        ("over the quiet rooftops", "resting on the sleeping sea"),
        ("the night holds its breath.", "no one says a word."),
    ),
    "rain": (
        ("Rain on the window", "Soft rain in the night"),
        ("small drops are telling stories", "a thousand tiny drummers"),
        ("the garden listens.", "then the clouds move on."),
    ),
    "autumn": (
        ("Yellow leaves falling", "Cool wind in the trees"),
        ("one by one they leave the branch", "the path is covered with gold"),
        ("winter waits outside.", "geese fly to the south."),
    ),
    "spring": (
        ("First flowers open", "Snow melts on the hill"),
        ("a bee wakes up and stretches", "the river is loud again"),
        ("the world is green now.", "birds come back and sing."),
    ),
    "winter": (
        ("White and silent fields", "Snow on every branch"),
        ("my footsteps are the first ones", "the fox leaves a line of tracks"),
        ("smoke above the roof.", "warm light calls me home."),
    ),
    "the sea": (
        ("Waves come and waves go", "Salt wind on my face"),
        ("the shells remember their song", "a white sail far, far away"),
        ("the tide turns again.", "the sand keeps no name."),
    ),
    "a cat": (
        ("The cat in the sun", "Soft paws on the stairs"),
        ("dreams of a slow, heavy mouse", "two green lamps look from the dark"),
        ("its tail moves a bit.", "then it starts to purr."),
    ),
    "a river": (
        ("The river moves on", "Water over stones"),
        ("it carries a yellow leaf", "it never asks for the way"),
        ("down to the wide sea.", "and still it arrives."),
    ),
    "a computer": (
        ("The fan hums softly", "A small light blinks twice"),
        ("numbers run through the silence", "a thousand gates open, close"),
        ("the answer appears.", "the cursor is still."),
    ),
    "a lighthouse": (
        ("A light turns at night", "Alone on the rocks"),
        ("it counts the ships in the dark", "it speaks to all who pass by"),
        ("and sends them all home.", "with one word of light."),
    ),
    "a tree": (
        ("An old tree stands still", "Roots deep in the dark"),
        ("it has known a hundred springs", "green hands that reach for the sun"),
        ("birds live in its arms.", "rings that count the years."),
    ),
    "the stars": (
        ("Stars above the hill", "So many small lights"),
        ("old light that travelled so far", "I try to count them and sleep"),
        ("only for my eyes.", "before I reach ten."),
    ),
}
RHYMES: dict[str, tuple[str, ...]] = {
    "a cat": (
        "A little cat with coat of grey\nsleeps in the sun for half the day.\nAnd when the moon is round and white,\nit walks the garden through the night.",
    ),
    "the sea": (
        "The sea is wide, the sea is blue,\nit sings an old song, just for you.\nThe waves roll in, the waves roll out,\nand gulls fly high and cry about.",
    ),
    "a friend": (
        "A friend is like a lamp at night,\na small and warm and steady light.\nThe road is long, the wind is cold,\na friend is better far than gold.",
    ),
    "rain": (
        "The rain falls softly on the street\nand makes a song with little feet.\nIt fills the pond, it wakes the seed,\nand gives each flower what they need.",
    ),
    "the moon": (
        "The moon looks down on hill and town\nand wears a cloud just like a crown.\nIt lends us light the whole night through\nand keeps a silver beam for you.",
    ),
    "winter": (
        "The snow is deep, the night is long,\nthe wind outside sings its old song.\nWe light a candle, drink our tea,\nas warm and snug as we can be.",
    ),
    "spring": (
        "The spring has come, the sky is clear,\nthe birds are back from far to near.\nThe meadow wears its brightest green,\nthe prettiest dress you've ever seen.",
    ),
    "a dog": (
        "My dog runs fast, my dog runs far,\nhe barks at bird and cat and car.\nBut when the day comes to its end,\nhe sleeps beside me as my friend.",
    ),
    "a robot": (
        "A robot made of tin and wire\nsat in the evening by the fire.\nIt could not eat, it could not sleep,\nso it told stories to the sheep.",
    ),
    "a bee": (
        "A busy bee flew here and there,\nwith golden dust upon her hair.\nShe drank from every flower's cup\nand filled her little honey up.",
    ),
}


def poem_turn(rng: Random) -> tuple[str, str]:
    """A request for a haiku or a rhyme and the poem."""
    if rng.random() < 0.6:
        about = rng.choice(list(HAIKU))
        text = ",\n".join(rng.choice(line) for line in HAIKU[about])
        asks = (
            "Write a haiku about {x}.",
            "Can you write a haiku about {x}?",
            "write a haiku about {x}",
            "Please write me a haiku about {x}.",
            "A haiku about {x}, please.",
        )
    else:
        about = rng.choice(list(RHYMES))
        text = rng.choice(RHYMES[about])
        asks = (
            "Write a poem about {x}.",
            "Can you write a short poem about {x}?",
            "write a poem about {x}",
            "Please write a little poem about {x}.",
            "Write a rhyme about {x}.",
        )
    return rng.choice(asks).format(x=about), text
