"""Writes presets/: the paper's benchmarks as LMMs-Eval asks and scores them, on invented questions.

    pip install --no-deps lmms-eval==0.7.3
    python tests/golden/make_presets.py

presets/<preset>.jsonl is what tests/interop/export_benchmark.py makes of the documents below, without the images.
presets/expected.json holds for each preset the task's split, limit and end of answer from its YAML file; the question as
the task's doc_to_text words it; a prediction with its score by the task's own functions; the overall score and those of
groups by its aggregation.
"""

import base64
import copy
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

import harness

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "interop"))
import export_benchmark

# fewshot_delimiter of api/task.py, the `until` of tasks that name none.
DELIMITER = "\n\n"


def chartqa(question, answer, type):
    return {"question": question, "answer": answer, "type": type}


def realworld(question, options, answer, category, kind="count"):
    return {"question": question, "multi-choice options": options, "answer": answer, "category": category,
            "l2-category": kind, "index": 0}


def ocr(question, answer, question_type, dataset="TextVQA"):
    return {"question": question, "answer": answer, "question_type": question_type, "dataset": dataset}


def science(question, choices, answer, hint=""):
    return {"question": question, "choices": choices, "answer": answer, "hint": hint}


def seed(question, choices, answer, kind):
    return {"question": question, **{f"choice_{letter}": choice for letter, choice in zip("ABCD", choices)},
            "answer": answer, "question_image_type": kind, "question_id": 0}


def textvqa(question, answers):
    return {"question": question, "answers": answers, "question_id": 0}


EN = ["(A) Red", "(B) Blue", "(C) Green", "(D) Black", "(E) The image does not feature it."]
CN = ["（A） 红色", "（B） 蓝色", "（C） 绿色", "（D） 黑色", "（E） 图像中没有。"]
FORMULAS = "Handwritten Mathematical Expression Recognition"

# Documents with the columns of the data sets, each with a prediction.
CASES = {
    "chartqa": [
        (chartqa("What is the value of \"Yes\"?", "12", "human_test"), "11.5"),
        (chartqa("How many percent?  ", "0.5", "human_test"), "50%"),
        (chartqa("Which country\nleads?", "Türkiye", "human_test"), "türkiye"),
        (chartqa("How many in 2019?", "1,234", "augmented_test"), "1234"),
        (chartqa("How many in <image> 2020?", "2020", "augmented_test"), " 2021\n"),
    ],
    "docvqa": [
        ({"question": "What is the date?", "answers": ["12/03/1999", "March 12, 1999"]}, "12/3/1999"),
        ({"question": " who signed ?", "answers": ["J. Doe"]}, "j.  doe"),
        ({"question": "What is the total?", "answers": ["$ 1,000"]}, ""),
        ({"question": "Où ?", "answers": ["à la page 3"]}, "a la page 3"),
    ],
    "mme-realworld": [
        (realworld("What color is the car?", EN, "A", "Perception/Monitoring"), "A"),
        (realworld("What color is the bus?", EN, "B", "Perception/Monitoring"), "(b"),
        (realworld("What does the sign say?", EN, "C", "Perception/OCR with Complex Context"), "The best answer is D."),
        (realworld("Where will it go?", EN, "D", "Reasoning/Autonomous_Driving", "attention/Attribute"), "D. Black"),
        (realworld("Which row?", EN, "E", "Reasoning/Diagram and Table"), "blue"),
        (realworld("Which roof? ", EN, "E", "perception/Remote Sensing"), "The answer is E"),
    ],
    "mme-realworld-cn": [
        (realworld("车是什么颜色？", CN, "A", "Perception/Monitoring"), "A"),
        (realworld("牌子上写的是什么？", CN, "B", "Perception/OCR with Complex Context"), "（B） 蓝色"),
        (realworld("它会去哪里？", CN, "C", "Reasoning/Autonomous_Driving"), "红色"),
    ],
    "ocrbench": [
        (ocr("what is written in the image?", ["HELLO"], "Regular Text Recognition"), "The word is \"Hello\"."),
        (ocr("what is written in the image?", ["CENTRE"], "Irregular Text Recognition"), "center"),
        (ocr("what is written?", "STOP", "Artistic Text Recognition"), "stop"),
        (ocr("what is written?", "STOP", "Handwriting Recognition"), "slop"),
        (ocr("what is written?", "qzx", "Non-Semantic Text Recognition"), "QZX"),
        (ocr(" what is the number? ", "１２３", "Digit String Recognition"), "123"),
        (ocr("What is the brand?\n", ["coca cola", "coke"], "Scene Text-centric VQA"), "Coca\nCola"),
        (ocr("What is the total?", ["4.50"], "Doc-oriented VQA", "docVQA"), ""),
        (ocr("what is the company?", ["ABC PTE LTD"], "Key Information Extraction", "SROIE"), "abc pte ltd."),
        (ocr("Write the formula in LaTeX.", ["x ^ { 2 } + y"], FORMULAS, "HME100k"), "\\[ x^{2} + y \\]"),
        (ocr("Write the formula in LaTeX.", ["X _ 1"], FORMULAS, "HME100k"), "x_1"),
    ],
    "scienceqa": [
        (science("Which is a mammal?", ["cat", "ant"], 0), "A"),
        (science("What follows?", ["yes", "no", "maybe"], 2, "It rained.\nThe ground is wet."), "c"),
        (science("Which state?", ["Ohio", "Utah", "Iowa", "Maine", "Texas"], 4), "E. Texas"),
        (science("Which one is larger?", ["the first", "the second"], 1), "The answer is B."),
    ],
    "seedbench-2-plus": [
        (seed("What is the trend?", ["up", "down", "flat", "none"], "A", "chart"), "A. up"),
        (seed("Which <img> is it?", ["a.jpg", "png file", "third", "fourth"], "B", "web"), "b"),
        (seed("Where is the station?", ["north", "south", "east", "west"], "C", "map"), "The east"),
        (seed("Where is the park?", ["north", "south", "east", "west"], "D", "Map"), "D"),
    ],
    "textvqa": [
        (textvqa("what is the BRAND of this camera?", ["dakota"] * 3 + ["Dakota digital"] * 5 + ["dakota."] * 2), "Dakota"),
        (textvqa("IS it ÉCOLE or ΟΔΟΣ?", ["ecole", "école", "École"] + ["unanswerable"] * 7), "École"),
        (textvqa("\"QUOTED\" Text?", ["don't walk"] * 9 + ["walk"]), "dont walk"),
        (textvqa("ßA Straße", ["1,000"] * 2 + ["1000"] * 3 + ["ten"] * 5), "1,000"),
        (textvqa("éa", ["ten"] * 10), ""),
        (textvqa("ﬁNE PRINT", ["three", "3"] * 5), "The 3"),
    ],
}

SOURCES = {
    "chartqa": ("tasks/chartqa/utils", "tasks/chartqa/chartqa.yaml", "chartqa_doc_to_text"),
    "docvqa": ("tasks/docvqa/utils", "tasks/docvqa/docvqa_val.yaml", "docvqa_doc_to_text"),
    "mme-realworld": ("tasks/mme_realworld/utils", "tasks/mme_realworld/mme_realworld.yaml", "mme_realworld_doc_to_text"),
    "mme-realworld-cn": ("tasks/mme_realworld/utils", "tasks/mme_realworld/mme_realworld_cn.yaml",
                         "mme_realworld_cn_doc_to_text"),
    "ocrbench": ("tasks/ocrbench/utils", "tasks/ocrbench/ocrbench.yaml", "ocrbench_doc_to_text"),
    "scienceqa": ("tasks/scienceqa/utils", "tasks/scienceqa/scienceqa.yaml", "sqa_doc_to_text"),
    "seedbench-2-plus": ("tasks/seedbench_2_plus/utils", "tasks/seedbench_2_plus/seedbench_2_plus.yaml", "seed_doc_to_text"),
    "textvqa": ("tasks/textvqa/utils", "tasks/textvqa/textvqa_val.yaml", "textvqa_doc_to_text"),
}

anls = harness.load("api/metrics").anls


def mean(scores):
    return sum(scores) / len(scores)


def score_chartqa(module, cases):
    results = [module.chartqa_process_results(*case) for case in cases]
    column = lambda key: [result[key] for result in results if key in result]
    groups = {"human": mean(column("relaxed_human_split")), "augmented": mean(column("relaxed_augmented_split"))}
    scores = column("relaxed_overall")
    return scores, mean(scores), groups


def score_docvqa(module, cases):
    scores = [anls(document["answers"], prediction)["anls"] for document, prediction in cases]
    return scores, mean(scores), {}


def score_realworld(module, cases):
    results = [module.mme_realworld_process_results(*case)["mme_realworld_score"] for case in cases]
    scores = [module.mme_realworld_aggregate_results([result]) for result in results]
    groups = {}
    for result in results:
        groups.setdefault(result["category"], []).append(result)
        groups.setdefault(f"{result['category']}/{result['sub_category']}", []).append(result)
    groups = {name: module.mme_realworld_aggregate_results(members) for name, members in groups.items()}
    return scores, module.mme_realworld_aggregate_results(results), groups


def score_ocrbench(module, cases):
    results = [module.ocrbench_process_results(*case)["ocrbench_accuracy"] for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        module.generate_submission_file = lambda *arguments, **options: report
        final = module.ocrbench_aggregate_accuracy(results, None)
        text = report.read_text()
    # The harness prints points; a group's score is its points for each of its questions.
    points = {name: int(count) for name, count in re.findall(r"^(.+)\(Total \d+\): (\d+)$", text, re.M)}
    members = {}
    for result in results:
        members[result["question_type"]] = members.get(result["question_type"], 0) + 1
    others = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)
    recognition = [name for name in members if name not in others]
    groups = {name: module.OCRBench_score[name] / count for name, count in members.items()}
    groups["Text Recognition"] = points["Text Recognition"] / sum(members[name] for name in recognition)
    assert points["Final Score"] == round(1000 * final)
    scores = [result["score"] for result in results]
    return scores, mean(scores), groups, points["Final Score"]


def score_scienceqa(module, cases):
    scores = [module.sqa_process_results(*case)["exact_match"] for case in cases]
    return scores, mean(scores), {}


def score_seedbench(module, cases):
    results = [module.seed_process_result(*case) for case in cases]
    column = lambda key: [result[key] for result in results if key in result]
    scores = [module.seed_aggregation_result([result]) for result in column("seedbench_2_plus_all")]
    groups = {name: module.seed_aggregation_result(column(f"seedbench_2_plus_{name}")) for name in ("Chart", "Map", "Web")}
    return scores, module.seed_aggregation_result(column("seedbench_2_plus_all")), groups


def score_textvqa(module, cases):
    # The function changes the answers it is given.
    results = [module.textvqa_process_results(copy.deepcopy(document), answer) for document, answer in cases]
    scores = [result["exact_match"] for result in results]
    return scores, mean(scores), {}


SCORES = {"chartqa": score_chartqa, "docvqa": score_docvqa, "mme-realworld": score_realworld,
          "mme-realworld-cn": score_realworld, "ocrbench": score_ocrbench, "scienceqa": score_scienceqa,
          "seedbench-2-plus": score_seedbench, "textvqa": score_textvqa}


def export(name, documents):
    """Writes <name>.jsonl; the images must come out as they went in."""
    pictures = [Image.new("RGB", (8 + number, 9), (number, 50, 7)) for number, _ in enumerate(documents)]
    if name == "scienceqa":
        pictures[1] = None
    documents = [dict(document) for document in documents]
    for document, picture in zip(documents, pictures):
        if name.startswith("mme"):
            file = io.BytesIO()
            picture.save(file, "PNG")
            document["bytes"] = base64.b64encode(file.getvalue()).decode()
        else:
            document["image"] = picture
    with tempfile.TemporaryDirectory() as folder:
        export_benchmark.export(name, documents, Path(folder))
        text = (Path(folder) / "questions.jsonl").read_text(encoding="utf-8")
        for line, picture in zip(text.splitlines(), pictures):
            row = json.loads(line)
            assert (picture is None) == ("image" not in row)
            assert picture is None or Image.open(Path(folder) / row["image"]).tobytes() == picture.tobytes()
        shown = [picture for picture in pictures if picture is not None]
        assert len(os.listdir(Path(folder) / "images")) == len(shown)
    (FOLDER / "presets" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main():
    (FOLDER / "presets").mkdir(exist_ok=True)
    expected = {}
    for name, (module, yaml, doc_to_text) in SOURCES.items():
        module, task = harness.load(module), harness.task(yaml)
        exported = export_benchmark.BENCHMARKS[name]
        assert exported[:3] == (task["dataset_path"], task.get("dataset_name"), task["test_split"]), (name, exported)
        cases = CASES[name]
        documents = [document for document, _ in cases]
        export(name, documents)
        options = task["lmms_eval_specific_kwargs"]["default"]
        # The class for Qwen2-VL takes the image marker out of every question.
        prompts = [getattr(module, doc_to_text)(document, options).replace("<image>", "") for document in documents]
        # api/task.py strips every output.
        scores, overall, groups, *points = SCORES[name](module, [(document, [answer.strip()]) for document, answer in cases])
        generation = task["generation_kwargs"]
        expected[name] = {
            "task": task["task"], "split": task["test_split"], "max_new_tokens": generation.get("max_new_tokens"),
            "stop": generation.get("until", [DELIMITER])[0], "prompts": prompts, "predictions": [answer for _, answer in cases],
            "scores": [float(score) for score in scores], "overall": overall, "groups": groups,
            "points": points[0] if points else None,
        }
        print(f"{name:17} {len(cases)} questions, overall {overall:.3f}, {groups}")
    text = json.dumps(expected, indent=1, ensure_ascii=False)
    (FOLDER / "presets" / "expected.json").write_text(text + "\n", encoding="utf-8")


main()
