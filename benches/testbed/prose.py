"""English prose: paragraphs of the docstrings of a few Python packages under free licences, fetched from the package index.

None of it is kept in the project. Packages are pure Python at fixed versions, so that every machine reads the same sources; what
becomes of them is checked by make.py.
"""

import ast
import hashlib
import re
import warnings
import zipfile

# Where people explain things at length. Licences: SQLAlchemy MIT, Twisted MIT, NetworkX BSD-3-Clause, NLTK Apache-2.0.
WHEELS = {
    "sqlalchemy==2.0.43": "sqlalchemy-2.0.43-py3-none-any.whl",
    "twisted==25.5.0": "twisted-25.5.0-py3-none-any.whl",
    "networkx==3.5": "networkx-3.5-py3-none-any.whl",
    "nltk==3.9.1": "nltk-3.9.1-py3-none-any.whl",
}
# Words of a paragraph: enough to be continued, few enough to stay one sample among many.
SHORTEST, LONGEST = 45, 130
# Letters and the marks of plain sentences; markup, formulas, code and doctests have others.
PLAIN = re.compile(r"[A-Za-z0-9 ,.;:'\"()!?-]+")
# A list, a heading or a field; a sentence starts with a capital.
START = re.compile(r"[A-Z][A-Za-z']* [a-z]")
# Of ten parts of the files.
SPLIT = {"calib": range(0, 5), "choose": range(5, 7), "report": range(7, 10)}


def docstrings(source):
    """Docstrings of a module, in the order in which they stand."""
    with warnings.catch_warnings():
        # Of escapes in other people's strings.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in nodes:
        text = ast.get_docstring(node)
        if text:
            yield text


def is_prose(paragraph):
    words = paragraph.split(" ")
    return (
        SHORTEST <= len(words) <= LONGEST
        and PLAIN.fullmatch(paragraph) is not None
        and START.match(paragraph) is not None
        and paragraph.endswith(".")
        and sum(word.strip(",.;:()\"'!?").isalpha() for word in words) >= 0.93 * len(words)
        and sum(word.islower() for word in words) >= 0.75 * len(words)
    )


def paragraphs(source):
    """Paragraphs of prose in a module."""
    for text in docstrings(source):
        for block in re.split(r"\n[ \t]*\n", text):
            lines = block.split("\n")
            # What is set in from the line above it is a list or code.
            if len({len(line) - len(line.lstrip()) for line in lines}) > 1:
                continue
            paragraph = re.sub(r"\s+", " ", without_markup(block)).strip()
            if is_prose(paragraph):
                yield paragraph


def without_markup(text):
    """The words that reStructuredText and Epytext set in other letters, as they are read."""
    text = re.sub(r":(?:\w+:)*\w+:`[.~!]*([\w.]+)`", r"\1", text)
    text = re.sub(r"\b[LCIB]\{([^{}]*)\}", r"\1", text)
    return re.sub(r"``?([^`\n]+)``?", r"\1", text)


def part(path):
    """The set that a file's paragraphs belong to: neighbours stay together."""
    number = hashlib.sha256(path.encode()).digest()[0] % 10
    return next(name for name, numbers in SPLIT.items() if number in numbers)


def of_wheels(paths):
    """All paragraphs by set, in an order that only the texts decide."""
    found, seen = {name: [] for name in SPLIT}, set()
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if not name.endswith(".py") or "/test" in name:
                    continue
                for paragraph in paragraphs(wheel.read(name).decode()):
                    # Methods of a kind are described alike.
                    opening = " ".join(paragraph.split(" ")[:4])
                    if opening not in seen:
                        seen.add(opening)
                        found[part(name)].append(paragraph)
    return {name: sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()) for name, texts in found.items()}
