"""What every language model is asked beside its stream: questions on general knowledge, and plain English to read.

Written for this laboratory and part of no other set, so that no stream trains on it. It never changes: numbers of one
report can be held against those of another. Small as it is (one question is 2.5 points), it shows what breaks, not who is
a little better.
"""

from __future__ import annotations

from collections.abc import Mapping

QUESTIONS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "capitals": (
        ("What is the capital of France?", ("Paris", "Lyon", "Rome", "Nice")),
        ("What is the capital of Japan?", ("Tokyo", "Osaka", "Kyoto", "Seoul")),
        ("What is the capital of Italy?", ("Rome", "Milan", "Venice", "Turin")),
        ("What is the capital of Germany?", ("Berlin", "Munich", "Vienna", "Bonn")),
        ("What is the capital of Spain?", ("Madrid", "Seville", "Lisbon", "Malaga")),
        ("What is the capital of Egypt?", ("Cairo", "Luxor", "Tunis", "Aswan")),
        ("What is the capital of Russia?", ("Moscow", "Kazan", "Warsaw", "Minsk")),
        ("What is the capital of Greece?", ("Athens", "Sparta", "Sofia", "Patras")),
        ("What is the capital of England?", ("London", "Dublin", "Leeds", "Oxford")),
        ("What is the capital of China?", ("Beijing", "Shanghai", "Wuhan", "Taipei")),
    ),
    "arithmetic": (
        ("What is 2 plus 3?", ("5", "4", "6", "7")),
        ("What is 4 plus 4?", ("8", "6", "7", "9")),
        ("What is 9 minus 6?", ("3", "2", "4", "5")),
        ("What is 7 minus 5?", ("2", "1", "3", "4")),
        ("What is 3 times 3?", ("9", "6", "7", "8")),
        ("What is 2 times 4?", ("8", "6", "7", "9")),
        ("What is 8 divided by 2?", ("4", "2", "3", "6")),
        ("What is 6 divided by 3?", ("2", "1", "3", "4")),
        ("What number comes after 6?", ("7", "5", "8", "9")),
        ("What number comes before 5?", ("4", "2", "3", "6")),
    ),
    "opposites": (
        ("What is the opposite of hot?", ("cold", "warm", "soft", "bright")),
        ("What is the opposite of big?", ("small", "large", "green", "heavy")),
        ("What is the opposite of up?", ("down", "over", "high", "left")),
        ("What is the opposite of open?", ("closed", "wide", "free", "ready")),
        ("What is the opposite of happy?", ("sad", "glad", "fast", "calm")),
        ("What is the opposite of old?", ("young", "slow", "tall", "grey")),
        ("What is the opposite of full?", ("empty", "whole", "round", "deep")),
        ("What is the opposite of early?", ("late", "soon", "often", "first")),
        ("What is the opposite of dark?", ("light", "black", "night", "quiet")),
        ("What is the opposite of wet?", ("dry", "cool", "rain", "thin")),
    ),
    "everyday": (
        ("What do people use to cut bread?", ("a knife", "a spoon", "a pillow", "a towel")),
        ("What falls from the clouds when it rains?", ("water", "sand", "leaves", "glass")),
        ("Where do fish live?", ("in water", "in trees", "in books", "in fire")),
        ("What do cows eat?", ("grass", "stones", "meat", "paper")),
        ("What does a person wear on the feet?", ("shoes", "gloves", "a hat", "a ring")),
        ("What happens to ice in the sun?", ("it melts", "it burns", "it grows", "it sings")),
        ("What do you need to see in a dark room?", ("a lamp", "a fork", "a shoe", "a song")),
        ("Which animal barks?", ("a dog", "a cat", "a fish", "a hen")),
        ("What do people read?", ("books", "chairs", "apples", "clouds")),
        ("When do most people sleep?", ("at night", "at noon", "at work", "at sea")),
    ),
}
"""By topic: each question with its options, the right one first."""

PARAGRAPHS: tuple[str, ...] = (
    "The baker gets up long before the sun. He lights the oven, mixes flour, water and salt, and waits for the dough to "
    "rise. When the first people come to work, the whole street smells of bread.",
    "A river begins as a small stream in the hills. On its way to the sea it takes in other streams, grows wide and slow, "
    "and carries sand and stones with it. Where it meets the sea, the sand sinks and makes new land.",
    "My sister learnt to ride a bicycle last summer. At first she fell at every corner, and our father ran beside her with "
    "one hand on the saddle. One morning he let go and told her only at the end of the road.",
    "In winter the days are short and the nights are long. Many birds fly to warmer places, and some animals sleep until "
    "spring. The trees have lost their leaves, but small buds already wait on the branches.",
    "The train was late again. An old woman shared her sandwiches with two students, and a man in a grey coat told them "
    "how he had once crossed the country on foot. When the train came at last, nobody wanted to get on.",
    "To grow tomatoes you need sun, water and patience. Put the seeds into a pot in early spring and keep it near a window. "
    "When the nights are no longer cold, plant them in the garden and tie them to a stick.",
    "The library is open every day except Sunday. You may keep a book for four weeks, and if nobody else has asked for it, "
    "for another four. Children get their first card free and may choose its colour.",
    "Iron rusts when air and water reach it. A coat of paint keeps both away, but a single scratch is enough to let them "
    "in. That is why bridges are painted again and again, from one end to the other.",
    "She opened the letter with care. It was written in blue ink, in a hand she did not know, and it asked her to come to "
    "the harbour on Friday at noon. There was no name at the end, only a small drawing of a ship.",
    "A good map leaves things out. It shows the roads and the rivers, but not every tree and every stone, because a map "
    "with everything on it would be as large as the land and as hard to read.",
)
"""To be read, for the perplexity."""
