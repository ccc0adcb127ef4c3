"""Writes metrics.json: scores of many predictions by LMMs-Eval's own functions.

    pip install --no-deps lmms-eval==0.7.3
    python tests/golden/make_metrics.py

Where a task of the harness knows one right answer and a sample here lists several, the best
score counts, as it does in the tasks that know several.
"""

import json
import random
from pathlib import Path

import harness

chartqa = harness.load("tasks/chartqa/utils")
metrics = harness.load("api/metrics")
mme = harness.load("tasks/mme_realworld/utils")
ocrbench = harness.load("tasks/ocrbench/utils")
scienceqa = harness.load("tasks/scienceqa/utils")
seedbench = harness.load("tasks/seedbench_2_plus/utils")
textvqa = harness.load("tasks/textvqa/utils")
# The task's documents hold the number of the right option; here the answer itself is given.
scienceqa.sqa_doc_to_target = lambda doc: doc["answer"]


def exact(prediction, answer):
    return scienceqa.sqa_process_results({"answer": answer}, [prediction])["exact_match"]


def relaxed(prediction, answer):
    return chartqa.chartqa_process_results({"answer": answer, "type": "human_test"}, [prediction])["relaxed_overall"]


def choice(prediction, answer):
    document = {"answer": answer, "category": "Perception/Monitoring", "l2-category": "all", "index": 0}
    result = mme.mme_realworld_process_results(document, [prediction])["mme_realworld_score"]
    return mme.mme_realworld_aggregate_results([result])


def anls(prediction, answers):
    return metrics.anls(answers, [prediction])["anls"]


def substring(prediction, answers):
    document = {"answer": answers, "dataset": "TextVQA", "question_type": "all"}
    return ocrbench.ocrbench_process_results(document, [prediction])["ocrbench_accuracy"]["score"]


def formula(prediction, answers):
    document = {"answer": answers, "dataset": "HME100k", "question_type": "all"}
    return ocrbench.ocrbench_process_results(document, [prediction])["ocrbench_accuracy"]["score"]


def first_letter(prediction, answer):
    document = {"answer": answer, "question_image_type": "map", "question_id": 0}
    result = seedbench.seed_process_result(document, [prediction])["seedbench_2_plus_Map"]
    return seedbench.seed_aggregation_result([result])


def vqa(prediction, answers):
    return textvqa.textvqa_process_results({"answers": list(answers), "question_id": 0}, [prediction])["exact_match"]


def score(metric, prediction, answers):
    # api/task.py strips every output before a task's own rule sees it.
    prediction = prediction.strip()
    rule = globals()[metric]
    if metric in ("anls", "substring", "formula", "vqa"):
        return float(rule(prediction, answers))
    return float(max(rule(prediction, answer) for answer in answers))


def ten(*counted):
    return [answer for answer, count in counted for _ in range(count)]


CASES = {
    "exact": [
        ("yes", ["yes"]), (" Yes\n", ["yes"]), ("yes.", ["yes"]), ("5", ["5"]), ("5", ["five"]), ("", [""]), ("", ["a"]),
        ("triangle", ["TRIANGLE "]), ("B", ["B"]), ("b", ["B"]), ("B. blue", ["B"]), ("b. blue", ["B"]), ("B.", ["b"]),
        ("B) blue", ["B"]), ("(B)", ["B"]), ("B. blue", ["B. blue"]), ("A", ["B", "a"]), ("The answer is B.", ["B"]),
        ("ÉCOLE", ["école"]), ("Σ. x", ["σ"]), ("ΟΔΟΣ", ["οδος"]), ("\x1cyes\x1f", ["yes"]), ("5 0", ["5 0"]), ("50", ["5 0"]),
        ("İ. x", ["i̇"]), ("ǅ. x", ["ǆ"]), ("Ⅳ. x", ["ⅳ"]), ("\u00a0yes\u3000", ["yes"]), ("日本", ["日本"]),
    ],
    "relaxed": [
        ("100", ["100"]), ("104.9", ["100"]), ("105", ["100"]), ("105.1", ["100"]), ("95", ["100"]), ("94.99", ["100"]),
        ("12%", ["0.12"]), ("0.12", ["12%"]), ("12%", ["12%"]), ("12%%", ["12%"]), ("12 %", ["12%"]), ("%", ["%"]), ("12", ["12%"]),
        ("1,000", ["1000"]), ("1,000", ["1,000"]), ("$5", ["5"]), ("0", ["0"]), ("0.0", ["0"]), ("0.001", ["0"]), ("-5", ["-5.1"]),
        ("-5", ["5"]), ("Yes", ["yes"]), ("yes ", ["Yes"]), ("no", ["yes", "No"]), ("1e3", ["1000"]), (".5", ["0.5"]), ("5.", ["5"]),
        ("+7", ["7"]), ("1_000", ["1000"]), ("1__000", ["1000"]), ("_1", ["1"]), ("1_", ["1"]), ("nan", ["nan"]), ("inf", ["inf"]),
        ("Infinity", ["inf"]), ("5", ["inf"]), ("nan", ["5"]), ("1e999", ["5"]), ("５０", ["50"]), ("٣", ["3"]), ("²", ["2"]), ("", [""]),
        ("", ["5"]), ("0x10", ["16"]), ("2 000", ["2000"]), ("five", ["5"]), ("5", [" 5 "]), ("yes", [" yes"]), ("𝟓", ["5"]), ("1e", ["1"]),
        ("3", ["1", "2", "3.1"]), ("-0", ["0"]), ("1.e2", ["100"]), ("1_0.0_1", ["10"]), ("e5", ["5"]), ("-.5e-1", ["-0.05"]),
    ],
    "anls": [
        ("hello", ["hello"]), ("Hello ", ["hello"]), ("helo", ["hello"]), ("h", ["hello"]), ("hel", ["hello"]), ("he", ["hell"]),
        ("hexx", ["hell"]), ("", [""]), ("", ["a"]), ("a", [""]), ("a  b", ["a b"]), ("a\nb", ["a b"]), ("a b", ["a   b"]),
        ("a b", ["a" + " " * 9 + "b"]), ("straße", ["strasse"]), ("STRASSE", ["straße"]), ("ßß", ["ßx"]), ("ŒUVRE", ["œuvre"]),
        ("1,000", ["1000"]), ("cat", ["dog", "cart", "cast"]), ("kitten", ["sitting"]), ("日本語", ["日本"]), ("日本", ["中国"]),
        ("\u0130", ["i"]), ("é", ["e\u0301"]), ("12/03/2024", ["12/3/2024", "2024"]), (" x ", [" x "]), ("ﬁne", ["fine"]),
        ("university of california", ["University of California, San Diego"]), ("\x1fx\x1cy", ["x y"]),
    ],
    "vqa": [
        ("yes", ten(("yes", 10))), ("yes", ten(("yes", 1), ("no", 9))), ("yes", ten(("yes", 2), ("no", 8))),
        ("yes", ten(("yes", 3), ("no", 7))), ("yes", ten(("yes", 4), ("no", 6))), ("Yes.", ten(("yes", 5), ("no", 5))),
        ("yes", ["yes"]), ("yes", ["yes", "yes"]), ("yes", ["yes", "yes", "no"]), ("two", ten(("2", 10))), ("none", ten(("zero", 10))),
        ("ten", ten(("10", 4), ("nine", 6))), ("the cat", ten(("cat", 10))), ("a an the", ten(("", 10))), ("", ten(("", 10))),
        ("dont", ten(("don't", 10))), ("don't", ten(("dont", 10))), ("its", ten(("it's", 10))), ("cat's", ten(("cat s", 10))),
        ("let's", ten(("let 's", 10))), ("couldntve", ten(("couldn't've", 10))), ("couldnt've", ten(("couldn't've", 10))),
        ("couldn'tve", ten(("couldnt've", 10))), ("somebody'd", ten(("somebodyd", 10))), ("somebodyd've", ten(("somebody'd've", 10))),
        ("twas", ten(("'twas", 10))), ("shed", ten(("she'd", 10))), ("yallll", ten(("y'all'll", 10))), ("y'allll", ten(("yall'll", 10))),
        ("oclock", ten(("o'clock", 10))), ("ows'at", ten(("'ow's'at", 10))), ("whos", ten(("who's", 10))), ("im", ten(("i'm", 10))),
        ("1,000", ten(("1000", 10))), ("3.5", ten(("35", 10))), ("3.5", ten(("3.5", 10))), ("3. 5", ten(("3 5", 10))), ("3.5.", ten(("3.5", 10))),
        ("mr. x", ten(("mr x", 10))), ("a.b.c", ten(("abc", 10))), (".5", ten(("5", 10))), ("x.٣", ten(("x٣", 10))), ("x.²", ten(("x²", 10))),
        ("." * 32 + "x", ten(("x", 10))), ("." * 33 + "x", ten(("x", 10))), ("t-shirt", ten(("t shirt", 10))),
        ("t - shirt", ten(("t  shirt", 10))), ("t- shirt", ten(("t shirt", 10))), ("a-b - c-d", ten(("ab cd", 10))),
        ("a-b - c-d", ten(("a b c d", 10))), ("(red)", ten(("red", 10))), ("what?", ten(("what", 10))), ("and/or", ten(("and or", 10))),
        ("c++", ten(("c", 10))), ("\"quoted\"", ten(("quoted", 10))), ("e@mail", ten(("e mail", 10))), ("under_score!", ten(("under score", 10))),
        ("line\nbreak\tand", ten(("line break and", 10))), ("STOP", ten(("stop", 6), ("Stop.", 4))), ("x" * 3 + "; y", ten(("xxx y", 10))),
        ("école", ten(("ÉCOLE", 10))), ("\u3000x\u3000y", ten(("x y", 10))), ("<b>", ten(("b", 10))), ("`x` {y} [z]", ten(("x y z", 10))),
        ("ow'_s'at _", ten(("'ow's'at", 10))), ("the", ten(("a", 10))), ("Zero", ten(("0", 10))), ("once", ten(("1", 10))),
    ],
    "substring": [
        ("the word is HELLO", ["hello"]), ("hello", ["the word is hello"]), ("", [""]), ("x", [""]), ("", ["x"]), ("a\nb", ["a b"]),
        ("a b", ["a\nb"]), ("ＡＢＣ　１２３", ["abc 123"]), ("abc 123", ["ＡＢＣ　１２３"]), ("cat", ["dog", "at"]), ("Straße", ["STRASSE"]),
        ("1,234", ["1234"]), ("\nabc\n", [" abc "]), ("ab  c", ["ab c"]), ("日本語", ["本"]), ("x！", ["x!"]), ("~", ["～"]), ("\x1cab", ["ab"]),
        ("a\r\nb", ["a b"]), ("ΟΔΟΣ ΟΔΟΣ", ["οδος"]),
    ],
    "choice": [
        ("A", ["A"]), ("a", ["A"]), ("(B)", ["B"]), ("B. blue", ["b"]), ("The best answer is C", ["C"]), ("The answer is D.", ["D"]),
        ("Answer: B", ["A"]), ("Best option: E", ["E"]), ("The answer B", ["B"]), ("The correct option is (C) cat", ["C"]), ("", ["A"]),
        ("", ["B"]), ("b", ["B"]), ("(c", ["C"]), ("d)", ["D"]), (")", ["A"]), (" e ", ["E"]), ("f", ["F"]), ("blue", ["B"]),
        ("I think the correct one is probably the second one, blue", ["I"]), ("i think that it is the one on the left side of it", ["A"]),
        ("The best answer is", ["A"]), ("The best answer is: B", ["B"]), ("Both", ["B"]), ("Definitely A", ["A"]), ("the answer is b", ["B"]),
        ("C", ["A", "C"]), ("选项 B", ["B"]), ("B", ["(B)"]), ("B", ["B. blue"]), ("The answer is a", ["A"]), ("(A) (B)", ["B"]), ("x", [""]),
    ],
    "formula": [
        (r"x ^ { 2 }", ["x^{2}"]), ("x^2", ["x ^ 2"]), (r"\frac { 1 } { 2 } = y", [r"\frac{1}{2}"]), ("X", ["x"]), ("x", ["X"]),
        ("a\nb", ["ab"]), ("ab", ["a\nb"]), ("a\tb", ["ab"]), ("", [""]), ("x", [""]), ("", ["x"]), ("１＋１", ["1+1"]), ("1\u30002", ["12"]),
        ("y = 2 x", ["2x", "3x"]), ("y = 3 x", ["2x", "3x"]), ("\\alpha", ["\\Alpha"]), (" a b ", [" b "]), ("a\r\nb", ["ab"]),
        ("1,000", ["1 , 0 0 0"]), ("50 %", ["50%"]),
    ],
    "first_letter": [
        ("A", ["A"]), ("a", ["A"]), ("A", ["a "]), ("B. blue", ["B"]), ("(B)", ["B"]), ("Answer: A", ["A"]), ("The answer is B", ["B"]),
        ("The answer is B", ["T"]), ("", [""]), ("", ["A"]), ("A", [""]), ("\n C", ["C"]), ("D)", ["D"]), ("Ａ", ["A"]), ("Ａ", ["ａ"]),
        ("blue", ["B"]), ("B", ["B. blue"]), ("İx", ["i̇"]), ("Σ", ["ς"]), ("E", ["A", "E"]), ("\x1cA", ["A"]), ("A,B", ["A"]), ("1", ["1"]),
    ],
}

# Pieces from which random texts are joined; few enough that predictions and answers meet often.
PIECES = {
    "exact": ["A", "b", ".", " ", "B", "yes"],
    "relaxed": ["1", "0", ".", "%", "-", "_", "e", " ", "5"],
    "anls": ["a", "b", " ", "ß", "é", "A", "\n"],
    "vqa": ["a ", "the", "two", "2", "dont", "don't", "'s", "'", ".", "-", " ", ",", "?", "/", "x", "\n", "none", "!"],
    "substring": ["a", "B", "Ａ", "\n", " ", "\u3000", "b"],
    "formula": ["x", "X", " ", "\n", "{2}", "^", "\t"],
    "first_letter": ["A", "b", "B", " ", ".", "a", "\n"],
    "choice": ["A", "b", "(", ")", "The answer is", " ", "B", "e"],
}


def random_cases(metric, generator):
    text = lambda: "".join(generator.choices(PIECES[metric], k=generator.randint(0, 5)))
    found = {0: [], 1: []}
    while min(len(cases) for cases in found.values()) < 40:
        prediction = text()
        if metric == "vqa":
            answers = [generator.choice([prediction, text(), prediction.strip().upper()]) for _ in range(generator.randint(2, 10))]
        else:
            answers = [text() for _ in range(generator.randint(1, 3))]
        cases = found[score(metric, prediction, answers) > 0]
        if len(cases) < 40:
            cases.append((prediction, answers))
    return found[0] + found[1]


def main():
    generator = random.Random(0)
    rows = []
    for metric, cases in CASES.items():
        for prediction, answers in cases + random_cases(metric, generator):
            rows.append([metric, prediction, answers, score(metric, prediction, answers)])
    text = ",\n".join(json.dumps(row) for row in rows)
    (Path(__file__).parent / "metrics.json").write_text(f"[\n{text}\n]\n")
    for metric in CASES:
        scores = [row[3] for row in rows if row[0] == metric]
        print(f"{metric:10} {len(scores):4} cases, mean score {sum(scores) / len(scores):.3f}")


main()
