"""Synthetic pictures: colored shapes, digits and words on plain ground. For each merged token, the word that names what lies under it.

The small tower was trained on this look (train_tower.py), so that colors, shapes and lettering stay as they are.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pixels of a merged token: two patches of 14 each way.
TOKEN = 28
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 215),
    "orange": (245, 140, 20),
    "purple": (130, 50, 170),
    "black": (25, 25, 25),
    "brown": (125, 75, 40),
    "pink": (245, 105, 180),
}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart"]
WORDS = "apple river stone tiger bread ocean piano chair horse dream music water".split()
GROUNDS = {"white": (248, 248, 248), "gray": (190, 190, 190), "sky": (180, 215, 245), "sand": (240, 225, 180)}
# What the tower tells apart: it is too small to read digits and words.
VOCABULARY = [*GROUNDS, *COLORS, *SHAPES, "number", "word"]
# Tokens across and down, and how often.
SIZES = [(8, 8), (9, 8), (8, 9), (9, 9), (10, 9), (10, 10), (12, 10), (12, 12)]
SHARES = [0.3, 0.15, 0.15, 0.14, 0.1, 0.08, 0.05, 0.03]
# One thing in a cell of three by three tokens.
CELL = 3 * TOKEN
MOST = 6
_fonts = {}


def font(size):
    """Pillow's own, so that no machine brings another."""
    if size not in _fonts:
        _fonts[size] = ImageFont.load_default(size=size)
    return _fonts[size]


def shape(draw, name, x, y, s, color):
    """A shape in the square of side `s` at (x, y)."""

    def points(pairs):
        return [(x + s * a, y + s * b) for a, b in pairs]

    if name == "circle":
        draw.ellipse([x, y, x + s, y + s], fill=color)
    elif name == "square":
        draw.rectangle([x, y, x + s, y + s], fill=color)
    elif name == "triangle":
        draw.polygon(points([(0.5, 0), (0, 1), (1, 1)]), fill=color)
    elif name == "diamond":
        draw.polygon(points([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]), fill=color)
    elif name == "cross":
        draw.rectangle([x + s / 3, y, x + s * 2 / 3, y + s], fill=color)
        draw.rectangle([x, y + s / 3, x + s, y + s * 2 / 3], fill=color)
    elif name == "ring":
        draw.ellipse([x, y, x + s, y + s], outline=color, width=int(s / 5))
    elif name == "star":
        turns = [(i * np.pi / 5, 0.5 if i % 2 == 0 else 0.2) for i in range(10)]
        draw.polygon(points([(0.5 + r * np.sin(t), 0.5 - r * np.cos(t)) for t, r in turns]), fill=color)
    else:
        assert name == "heart", name
        draw.ellipse([x, y, x + s * 0.55, y + s * 0.55], fill=color)
        draw.ellipse([x + s * 0.45, y, x + s, y + s * 0.55], fill=color)
        draw.polygon(points([(0.04, 0.4), (0.96, 0.4), (0.5, 1)]), fill=color)


def ground(r, width, height):
    """A plain picture with a slight slope of color, and the name of its color."""
    name = list(GROUNDS)[r.randint(len(GROUNDS))]
    base = np.array(GROUNDS[name], np.float64) + r.uniform(-7, 7, 3)
    slope = r.uniform(-0.04, 0.04, (2, 3))
    y, x = np.mgrid[0:height, 0:width]
    pixels = base + (x - width / 2)[..., None] * slope[0] + (y - height / 2)[..., None] * slope[1]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), name


def thing(r, draw, i, j):
    """Draws a thing into cell (i, j): its color, its name, and the box that it fills."""
    color = list(COLORS)[r.randint(len(COLORS))]
    fill = tuple(int(np.clip(c + r.randint(-14, 15), 0, 255)) for c in COLORS[color])
    kind = r.choice(3, p=[0.55, 0.25, 0.2])
    s = r.randint(50, 64)
    left, top = i * CELL + r.randint(0, CELL - s + 1), j * CELL + r.randint(0, CELL - s + 1)
    if kind == 0:
        name = SHAPES[r.randint(len(SHAPES))]
        shape(draw, name, left, top, s, fill)
        return color, name, (left, top, left + s, top + s)
    if kind == 1:
        name, text, at, letters = "number", str(r.randint(10)), (left + 4, top), font(int(s * 1.05))
    else:
        name, text, at, letters = "word", WORDS[r.randint(len(WORDS))], (i * CELL + r.randint(0, 6), top), font(29)
    draw.text(at, text, fill=fill, font=letters)
    return color, name, draw.textbbox(at, text, font=letters)


def picture(r, size=None):
    """A picture, its tokens' words as indices into VOCABULARY `[down * across]`, and color and name of what is on it, in reading order.

    `r` is a numpy.random.RandomState, whose numbers no version of numpy changes.
    """
    across, down = SIZES[r.choice(len(SIZES), p=SHARES)] if size is None else size
    width, height = across * TOKEN, down * TOKEN
    image, name = ground(r, width, height)
    draw = ImageDraw.Draw(image)
    labels = np.full((down, across), VOCABULARY.index(name))
    cells = [(i, j) for j in range(down // 3) for i in range(across // 3)]
    count = r.randint(1, min(MOST, len(cells)) + 1)
    things = []
    for k in sorted(r.choice(len(cells), count, replace=False)):
        color, name, box = thing(r, draw, *cells[k])
        things.append((color, name))
        middle = (box[0] + box[2]) / 2
        for v in range(down):
            for u in range(across):
                w = min(box[2], (u + 1) * TOKEN) - max(box[0], u * TOKEN)
                h = min(box[3], (v + 1) * TOKEN) - max(box[1], v * TOKEN)
                # The color on the left, the name on the right.
                if w > 7 and h > 7:
                    labels[v, u] = VOCABULARY.index(color if (u + 0.5) * TOKEN < middle else name)
    noisy = np.asarray(image, np.float64) + r.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), labels.reshape(-1), things
