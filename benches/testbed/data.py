"""Calibration and evaluation data: pictures with questions and true answers, and prose to be continued."""

import hashlib
import json

import numpy as np
import pictures

# Seed, pictures, texts. Defaults are chosen on `choose` and figures are taken on `report`: whoever chose by the figures reported
# would report luck. Seeds and sources differ, and the tower was trained on others (7, 17; 8 held out).
SETS = {"calib": (101, 450, 150), "choose": (202, 100, 50), "report": (303, 200, 100)}
COUNTS = "no one two three four five six".split()
CONTINUE = "Continue this text:\n"
# Words of a continuation that are scored.
CONTINUED = 40


def listing(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def once(items):
    return list(dict.fromkeys(items))


def ask(r, things):
    """A question about a picture, and its answer."""
    kind = r.randint(6)
    color, name = things[r.randint(len(things))]
    if kind == 0:
        shown = listing([article(f"{c} {n}") for c, n in things])
        return "Describe this picture in one sentence.", f"This picture shows {shown}."
    if kind == 1:
        return "Which colors are in this picture?", f"The colors in this picture are {listing(once(c for c, _ in things))}."
    if kind == 2:
        return "What can you see in this picture?", f"I can see {listing([article(n) for _, n in things])} in this picture."
    if kind == 3:
        shown = listing(once(article(f"{c} {n}") for c, n in things if c == color))
        return f"What is {color} in this picture?", f"There is {shown} in this picture."
    if kind == 4:
        shown = listing(once(c for c, n in things if n == name))
        return f"What color is the {name} in this picture?", f"The {name} in this picture is {shown}."
    shown = listing([article(n) for _, n in things])
    count = "is one thing" if len(things) == 1 else f"are {COUNTS[len(things)]} things"
    return "How many things are in this picture?", f"There {count} in this picture: {shown}."


def question(ident, group, user, answer):
    # One token is decoded at most: what counts is what the model makes of the answer that is given.
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return dict(id=ident, group=group, max_new_tokens=1, messages=messages)


def continuation(ident, text):
    words = text.split(" ")
    cut = len(words) // 2
    return question(ident, "text", CONTINUE + " ".join(words[:cut]), " ".join(words[cut : cut + CONTINUED]))


def write(folder, name, texts, counts=None):
    """NAME.jsonl and its pictures in images/, which must be there. Returns the SHA-256 of the pixels.

    `counts`: pictures and texts, where they are not those of SETS.
    """
    seed, count, prose = SETS[name] if counts is None else (SETS[name][0], *counts)
    if len(texts) < prose:
        raise ValueError(f"{name}: {len(texts)} texts are too few, {prose} are needed")
    r, pixels = np.random.RandomState(seed), hashlib.sha256()
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for i in range(count + prose):
            # One text behind so many pictures, so that the first lines are a fair part of the whole.
            k = i * prose // (count + prose)
            if (i + 1) * prose // (count + prose) > k:
                ident = f"{name}-text-{k:03d}"
                # In calibration, half of them as they are, without a chat around them.
                bare = name == "calib" and k % 2 == 0
                line = dict(id=ident, group="text", text=texts[k]) if bare else continuation(ident, texts[k])
            else:
                image, _, things = pictures.picture(r)
                user, answer = ask(r, things)
                pixels.update(np.asarray(image).tobytes())
                ident = f"{name}-{i:03d}"
                path = f"images/{ident}.png"
                image.save(folder / path)
                line = question(ident, "image", [{"type": "image", "image": path}, {"type": "text", "text": user}], answer)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return pixels.hexdigest()
