"""A fixed text of several kinds, some 1,000 tokens, by which it is measured what shortcuts cost a model."""

TEXT = """\
The river rises in the hills to the north of the town and runs for about sixty miles before it reaches the sea. In \
the spring, when the snow melts, the water is high and cold, and the fields along its banks are often flooded for \
several days. Farmers have learned to live with this: they build their houses on the higher ground, keep their \
animals away from the water until May, and plant their crops late. In return the river leaves a layer of dark, rich \
soil on the land every year, so that nobody needs to buy fertilizer. A hundred years ago, a mill stood at the bend \
below the church. It ground wheat for the whole valley, and its owner was one of the richest men in the county. When \
the railway came, flour could be brought from the city at half the price, and the mill was closed. Today it is a \
small museum, where children can see how the great wheel turned the stones and how much work it took to make a loaf \
of bread.

"Where have you been?" asked Anna when her brother came in. His coat was wet and his shoes were full of mud.

"At the lake," he said. "There was a man with a boat who wanted to know the way to the old quarry. I told him that \
nobody had gone there since the fire, but he laughed and said that this was exactly why he had to see it."

"And you went with him?"

"Only as far as the bridge. Then it began to rain, and I turned back. But listen, he gave me this." He put a small, \
heavy thing on the table. It was a key, nearly black, with a number on it that neither of them could read.

How to make a simple vegetable soup for four people:

1. Wash two carrots, two potatoes, one onion and a piece of celery, and cut them into small cubes.
2. Heat two spoons of oil in a large pot, and fry the onion until it is soft and golden.
3. Add the other vegetables, a liter of water, a little salt and pepper, and bring everything to the boil.
4. Let it cook on a low heat for about twenty minutes, until the potatoes are soft.
5. Sprinkle some fresh parsley over the soup, and serve it hot with bread.

The function below returns the largest number of a list, and the place where it stands. If the list is empty, it \
raises a ValueError.

def largest(numbers):
    if not numbers:
        raise ValueError("the list is empty")
    best = 0
    for index in range(1, len(numbers)):
        if numbers[index] > numbers[best]:
            best = index
    return numbers[best], best

Water boils at 100 degrees Celsius at sea level, but at a lower temperature in the mountains, because the pressure of \
the air is lower there. On the top of Mount Everest it boils at about 71 degrees. This is why it takes longer to cook \
rice or potatoes at high altitude: the water cannot become hot enough. A pressure cooker solves this problem. Its lid \
closes tightly, so that steam cannot escape, the pressure inside rises, and the water boils at about 120 degrees \
instead.

Dear Mr. Harris,

Thank you for your letter of March 3. I am sorry to hear that the lamp which you ordered from us arrived broken. \
Please keep the box, since the carrier may want to see it. We have sent a new lamp to you today, and you should \
receive it within a week. There is no need to pay anything. If you have any further questions, please do not hesitate \
to contact us.

Yours sincerely,
Mary Coleman

The three largest cities of the country are on the coast. The capital has about two million inhabitants and is known \
for its university, which was founded in 1477 and is the oldest in this part of Europe. In the summer many tourists \
come to see the castle, the harbor and the botanical garden. The second city lives from its port and its shipyards; \
the third is a quiet place, except for the week in August when the whole town dances in the streets.
"""
