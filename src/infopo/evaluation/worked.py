r"""Worked examples for few-shot prompts: problems with solutions in the form of GSM8K and of MATH. Imports no torch.

They are written for this package. None is taken from a data set, so that no test question can be among them.
"""

WORD_PROBLEMS = (
    (
        "A baker fills 6 trays with 12 rolls each and burns 9 rolls. How many rolls can she sell?",
        "She bakes 6 * 12 = 72 rolls.\nShe can sell 72 - 9 = 63 rolls.\n#### 63",
    ),
    (
        "Omar has 5 shelves with 14 books each. He gives 22 books to a school and buys 8 new ones. How many books does "
        "he have now?",
        "Omar begins with 5 * 14 = 70 books.\nAfter the gift he has 70 - 22 = 48 books.\n"
        "After buying new ones he has 48 + 8 = 56 books.\n#### 56",
    ),
    (
        "A train ticket costs $18. A family buys 4 tickets and gets 25% off the total. How much does the family pay?",
        "Without the discount the tickets cost 4 * 18 = $72.\nThe discount is 72 * 25 / 100 = $18.\n"
        "The family pays 72 - 18 = $54.\n#### 54",
    ),
    (
        "Lena runs 3 kilometres on each of 4 days and twice as far on the fifth day. How far does she run in total?",
        "On the first days she runs 3 * 4 = 12 kilometres.\nOn the fifth day she runs 3 * 2 = 6 kilometres.\n"
        "In total she runs 12 + 6 = 18 kilometres.\n#### 18",
    ),
    (
        "A tank holds 240 litres and is one third full. A pump adds 20 litres a minute. After how many minutes is the "
        "tank full?",
        "The tank contains 240 / 3 = 80 litres.\nThere is room for 240 - 80 = 160 litres.\n"
        "The pump takes 160 / 20 = 8 minutes.\n#### 8",
    ),
    (
        "Mia is 4 years older than Jun. In 6 years, their ages will add up to 40. How old is Jun now?",
        "In 6 years, each will be 6 years older, so their ages now add up to 40 - 12 = 28.\n"
        "Twice Jun's age is 28 - 4 = 24.\nJun is 24 / 2 = 12 years old.\n#### 12",
    ),
    (
        "A shop sells pens at $2 and pads at $5. Ravi buys 7 pens and some pads for $39 in total. How many pads does "
        "he buy?",
        "The pens cost 7 * 2 = $14.\nThe pads cost 39 - 14 = $25.\nHe buys 25 / 5 = 5 pads.\n#### 5",
    ),
    (
        "A garden has 9 rows of 8 tulips. Half of the tulips are red, and a quarter of the others are white. How many "
        "tulips are white?",
        "There are 9 * 8 = 72 tulips.\nThe others are 72 / 2 = 36 tulips.\nOf these, 36 / 4 = 9 are white.\n#### 9",
    ),
)
"""Problems whose answer is a number."""

MATHEMATICS = (
    (
        "Solve $3x - 7 = 11$ for $x$.",
        r"Adding $7$ to both sides gives $3x = 18$. Dividing by $3$ gives $x = \boxed{6}$.",
    ),
    (
        r"What is $\frac{2}{3} + \frac{1}{4}$?",
        r"With the common denominator $12$, this is $\frac{8}{12} + \frac{3}{12} = \boxed{\frac{11}{12}}$.",
    ),
    (
        "A fair die is rolled twice. What is the probability that both rolls are even?",
        r"Each roll is even with probability $\frac{1}{2}$, and the rolls are independent, so the probability is "
        r"$\frac{1}{2} \cdot \frac{1}{2} = \boxed{\frac{1}{4}}$.",
    ),
    (
        "Find all real solutions of $x^2 < 9$ as an interval.",
        r"The inequality holds if and only if $-3 < x < 3$, so the solutions are $\boxed{(-3, 3)}$.",
    ),
)
"""Problems whose answer is an expression."""
