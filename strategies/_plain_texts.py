"""Plain texts that editors may train on: what an edit must leave alone is shown to them by these.

Written for this laboratory, and no part of what an edited model is asked later (:mod:`cl_lab.probe_texts`): a score on texts
that an editor was trained to keep would flatter it.
"""

from __future__ import annotations

QUESTIONS: tuple[str, ...] = (
    "Why do leaves fall in autumn?",
    "How many minutes are in an hour?",
    "What is bread made from?",
    "Which season comes after summer?",
    "What do bees collect from flowers?",
    "How long does it take to boil an egg?",
    "Why is the sky blue?",
    "What is the plural of mouse?",
    "Which hand do most people write with?",
    "What does a thermometer measure?",
    "Who mends broken pipes?",
    "How many legs does a spider have?",
    "What is the past tense of go?",
    "Where can I buy stamps?",
    "Which metal is a magnet drawn to?",
    "What colour do blue and yellow make?",
    "What do you call a baby dog?",
    "How many sides does a triangle have?",
    "What is kept in a wallet?",
    "Which tool drives a nail into wood?",
    "What should I do when a child has a cold?",
    "How do I take a coffee stain out of a shirt?",
    "What is the difference between jam and honey?",
    "How many letters are in the alphabet?",
    "What is the shape of a wheel?",
    "Which meal do people eat in the morning?",
    "What do plants take in from the air?",
    "How do ships stay in one place?",
    "What is half of a dozen?",
    "Why do we see lightning before we hear thunder?",
    "What rhymes with moon?",
    "Which month has the fewest days?",
    "What is wool made of?",
    "How often should one water a cactus?",
    "What do you call the top of a house?",
    "How does a candle go out under a glass?",
    "What does a carpenter work with?",
    "Which word means the same as quick?",
    "What is a calendar for?",
    "How can I learn to swim?",
)
"""Forty questions of everyday life."""

PARAGRAPHS: tuple[str, ...] = (
    "The market opens at six in the morning. Farmers put their boxes of apples and cabbages on long wooden tables, and the "
    "first customers are cooks who want the best of everything. By noon most of it is gone.",
    "A clock with a pendulum loses time when it is warm. The rod grows a little longer, and each swing takes a little more "
    "time than before. Clockmakers once hung jars of mercury on the rod to make up for it.",
    "Our neighbour keeps two goats behind her house. They have eaten the roses, the washing and half of a garden chair. She "
    "says that they are better company than most people she has met.",
    "Rice needs a lot of water while it grows. The fields are flooded on purpose, and small walls of earth keep the water "
    "where it is wanted. Before the harvest the farmers let it run off again.",
    "When you paint a wall, begin at the top. Drops that run down can then be painted over, and no line is left where you "
    "stopped for lunch. Two thin coats are better than a thick one.",
    "He had lived in the lighthouse for thirty years. Ships that passed at night never knew his name, but some of them blew "
    "their horns as a greeting. When the lamp was made to work by itself, he moved into a flat with no view at all.",
    "Glass is made of sand, soda and lime. They are melted together in a furnace so hot that it is never allowed to go out. "
    "A good worker can blow a bottle from a drop of it in less than a minute.",
    "The school play was a great success. The king forgot his words, the forest fell over, and the audience clapped longer "
    "than it had ever done before. Nobody spoke of the dragon, who had a fever and stayed at home.",
    "Cats sleep for more than half of the day. They hunt at dusk and at dawn, when mice come out, and rest in between. A "
    "cat that lives with people soon learns to change its hours.",
    "Before there were refrigerators, ice was cut from lakes in winter. It was packed in straw and kept in deep cellars "
    "until summer. Some of it was sent across the sea, and much of it arrived.",
    "To fold a paper boat you need a sheet that is longer than it is wide. Fold it in half, turn the corners down, and lift "
    "the edges on both sides. If the paper is thick, press each fold with a spoon.",
    "The two brothers had not spoken for years. Neither of them could say how it had started, though each was sure that it "
    "was not his fault. It took a flooded cellar to bring them together again.",
    "Wind is air that moves from a place where there is much of it to one where there is less. The sun warms the land "
    "sooner than the sea. That is why, on a hot day, a cool breeze blows in from the water.",
    "Please leave your shoes at the door. The floor was polished last week and must not get wet for another month. There "
    "are slippers in all sizes in the basket under the stairs.",
    "Every village along the road had its own bell. From the sound of it a traveller could tell in the dark how far he had "
    "come. Two of the bells were made from the same old cannon.",
    "A loaf that is cut too early tastes of dough. Let it stand on a rack until it is no warmer than your hand. The crust "
    "will crack as it cools, and you can hear it if the kitchen is quiet.",
    "The museum has a room that is always dark. In it stands a single chair from which one can hear recordings of streets "
    "that have since been torn down. Most visitors sit for a minute, and some for an hour.",
    "Ants leave a trail of scent wherever they go. Others follow it and make it stronger, so that the shortest way to the "
    "food soon has the strongest smell. When the food is gone, the trail fades.",
    "I was taught to swim by an uncle who could not. He stood on the bank with a book in his hand and read aloud what to do "
    "with my arms and legs. It worked, but I still breathe on the wrong side.",
    "The orchestra tunes to the oboe. Its pitch can hardly be changed, so everybody else must follow. The player is said to "
    "be the only one who arrives early.",
)
"""Sixty sentences about nothing in particular."""
