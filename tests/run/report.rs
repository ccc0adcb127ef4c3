//! report.html: well-formed, self-contained, and true: its pictures show what its figures say, cell by cell.

use crate::support::golden;
use crate::support::picture::{decode_jpeg, decode_png, open_png, save_png};
use crate::support::program::{Bench, IMAGE, files_of, question, read_json, succeed, text};
use base64::Engine;
use image::RgbImage;
use roxmltree::{Document, Node, ParsingOptions};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use vlmq::checkpoint::Checkpoint;
use vlmq::checkpoint::formats::Loader;
use vlmq::data::dataset;
use vlmq::data::sequence::{Sequence, SequenceBuilder};
use vlmq::data::template::TemplateChoice;
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::{ComparedAnswer, ComparedScores, Comparison};
use vlmq::model::families::{self, ImageOptions};
use vlmq::model::language_model::Embedder;
use vlmq::plan::{Entry, StagePlan};
use vlmq::progress::{Stage, StageTime};
use vlmq::quantize::importance::ImportanceSpread;
use vlmq::quantize::settings::{Solver, SolverSettings};
use vlmq::quantize::{Finding, FindingKind, SolveReport};
use vlmq::report::check::ModelCheck;
use vlmq::report::samples::{self, Picture, ReportSample, TextToken};
use vlmq::report::spread::{BINS, BlockImportance, bin_edges};
use vlmq::report::{BlockReport, LayerReport, RunReport};

const HOSTILE: &str =
    "</td><script>alert('1')</script><img src=\"http://example.org/x\" onerror=\"alert(2)\"/>&amp;\u{0}";

fn parse(html: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(html, options).unwrap_or_else(|error| panic!("{error}"))
}

fn html_of(report: &RunReport) -> String {
    let files = report.files().unwrap();
    let (_, bytes) = files.into_iter().find(|(name, _)| *name == "report.html").unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Asserts that a page is well-formed, runs nothing and asks for nothing.
fn check_alone(document: &Document<'_>) {
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        assert!(!["script", "iframe", "object", "embed", "link", "base", "form"].contains(&name), "a {name}");
        for attribute in node.attributes() {
            let (key, value) = (attribute.name(), attribute.value());
            assert!(!key.starts_with("on"), "{name} {key}={value}");
            match key {
                "src" => assert!(value.starts_with("data:image/"), "{value}"),
                "href" => assert!(value.starts_with('#'), "{value}"),
                "style" => {
                    let urls: Vec<&str> = value.split("url(").skip(1).collect();
                    assert!(urls.iter().all(|url| url.starts_with("data:image/")), "{value}");
                }
                _ => {}
            }
        }
    }
    let style = document.descendants().find(|node| node.has_tag_name("style")).unwrap().text().unwrap();
    assert!(!style.contains("url(") && !style.contains("@import"));
    let policy = document.descendants().find(|n| n.attribute("http-equiv") == Some("Content-Security-Policy")).unwrap();
    assert!(
        policy
            .attribute("content")
            .unwrap()
            .starts_with("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    );
}

fn layer(name: &str, block: usize, relative_error: f64, findings: Vec<Finding>) -> LayerReport {
    let solve =
        SolveReport { relative_error, damp: Some(0.01), tokens: 9, seconds: 0.1, findings, ..SolveReport::default() };
    LayerReport {
        name: format!("model.layers.{block}.{name}"),
        block,
        rows: 4,
        cols: 8,
        bits: 3,
        group_columns: 8,
        weight_error: 0.5,
        solve,
        importance: None,
    }
}

/// A sample of a token of text, two rows of three cells with a token at each row's end, and text again.
fn planted() -> (ReportSample, Vec<f32>) {
    let token = |index, text: &str| TextToken { index, text: text.into() };
    let picture = Picture {
        image: 0,
        first_token: 1,
        rows: 2,
        columns: 3,
        row_ends: true,
        width: 30,
        height: 20,
        data: "data:image/png;base64,AAAA".into(),
    };
    let sample = ReportSample {
        id: HOSTILE.into(),
        span: 0..10,
        text: vec![token(0, "<script>"), token(9, "\u{fffd}\n")],
        pictures: vec![picture],
        pictures_left_out: 0,
    };
    // No order in them but that of the tokens.
    (sample, vec![1.0, 0.25, 8.0, 0.5, 3.0, 2.0, 0.125, 6.0, 0.75, 4.0])
}

fn report() -> RunReport {
    let (sample, g) = planted();
    let found = Finding { kind: FindingKind::DampingRaised, found: HOSTILE.into(), done: HOSTILE.into() };
    let answer = |id: &str, float: &str, quantized: &str| ComparedAnswer {
        id: id.into(),
        group: Some(HOSTILE.into()),
        question: HOSTILE.into(),
        expected: vec![HOSTILE.into()],
        answer_float: float.into(),
        answer_quantized: quantized.into(),
        ..ComparedAnswer::default()
    };
    let answers = vec![answer("alike", "x", "x"), answer(HOSTILE, HOSTILE, "y")];
    let mut report = RunReport {
        family: HOSTILE.into(),
        layers: vec![
            layer("self_attn.q_proj", 0, 0.25, vec![found]),
            layer("mlp.down_proj", 0, 1e-4, Vec::new()),
            layer("self_attn.q_proj", 1, f64::NAN, Vec::new()),
        ],
        blocks: vec![BlockReport {
            block: 1,
            seconds: 1.0,
            path_error: Some(0.1),
            importance: Some(BlockImportance { text: vec![1; BINS], vision: vec![2; BINS], samples: Some(vec![g]) }),
        }],
        importance_edges: bin_edges(),
        samples: vec![sample],
        evaluation: Some(Comparison { answers, ..Comparison::default() }),
        ..RunReport::default()
    };
    report.provenance.model = HOSTILE.into();
    report.provenance.settings.out = HOSTILE.into();
    report.provenance.settings.calib = Some(HOSTILE.into());
    report.provenance.settings.chat_template = TemplateChoice::File(HOSTILE.into());
    report.provenance.inputs.model.insert(HOSTILE.into(), HOSTILE.into());
    report
}

/// A report with something to say everywhere.
fn whole() -> RunReport {
    let mut report = report();
    let found = Finding { kind: FindingKind::ModelDestroyed, found: HOSTILE.into(), done: HOSTILE.into() };
    report.check =
        Some(ModelCheck { tokens: 70, kl: 2.5, agreement: 0.25, findings: vec![found], ..Default::default() });
    let spread = ImportanceSpread { text_mean: 0.5, vision_mean: 1.5, largest: 20.0, power: 0.5 };
    report.layers.extend((2..70).map(|block| LayerReport {
        importance: Some(spread.clone()),
        ..layer("self_attn.v_proj", block, 0.5, Vec::new())
    }));
    report.layers[0].solve.effective_tokens = Some(6.0);
    report.layers[1].solve.damp = Some(0.02);
    report.quantized_bytes = 1000;
    report.samples[0].pictures_left_out = 3;
    let second = Picture { image: 1, row_ends: false, ..report.samples[0].pictures[0].clone() };
    report.samples[0].pictures.push(second);
    let text = ReportSample { pictures: Vec::new(), ..report.samples[0].clone() };
    report.samples.push(text);
    let kept = report.blocks[0].importance.as_mut().unwrap().samples.as_mut().unwrap();
    kept.push(kept[0].clone());
    report.stages =
        vec![StageTime { stage: Stage::Data, seconds: 1.0 }, StageTime { stage: Stage::Blocks, seconds: 3.0 }];
    let stage = StagePlan {
        stage: Stage::Blocks,
        step: HOSTILE.into(),
        entries: vec![Entry { name: "codes".into(), bytes: 1 << 20 }],
        bytes: 3 << 20,
        measured_bytes: Some(3 << 19),
    };
    report.memory_plan.stages = vec![stage.clone()];
    report.memory_plan.host.stages = vec![StagePlan { measured_bytes: None, ..stage }];
    report.peak_memory_bytes = Some(2 << 20);
    report.loaders = vec![Loader { name: "vlmq", command: HOSTILE.into() }];
    let compared = report.evaluation.as_mut().unwrap();
    compared.groups.insert(HOSTILE.into(), ComparedScores { n: 4, nll_float: Some(1.25), ..Default::default() });
    let answer = compared.answers[1].clone();
    compared.answers.extend((0..1000).map(|_| ComparedAnswer { score_float: 0.5, group: None, ..answer.clone() }));
    report
}

/// The page's texts, with a bar between those of different elements.
fn texts(html: &str) -> String {
    let document = parse(html);
    let texts = document.descendants().filter(Node::is_text).map(|node| node.text().unwrap());
    texts.collect::<Vec<_>>().join("|").replace('\n', " ")
}

#[test]
fn every_part_is_shown_where_there_is_something_to_show() {
    let html = html_of(&whole());
    check_alone(&parse(&html));
    let shown = texts(&html);
    let hostile = HOSTILE.replace('\u{0}', "\u{fffd}");
    for part in [
        "1 of 71|",
        "effective tokens an input, at least|0.75|",
        "|2.5000|",
        "the whole model|model destroyed|",
        "How the float path and the quantized path hold 70 tokens of the calibration samples",
        "bits per quantized weight|",
        "In use: 0.01 in 70 layers, 0.02 in 1 layers.",
        "Distance of the quantized path's activations",
        "All 71 layers|",
        "|0.500|1.500|20.000|0.500|",
        "|–|–|–|–|",
        "reading data|1.00 s|",
        &format!("quantizing, at {hostile}|3.00 MiB|1.50 MiB|"),
        &format!("quantizing, at {hostile}|3.00 MiB|–|"),
        "\u{2003}codes|1.00 MiB|",
        "most that the process holds, mapped files included|0 B|2.00 MiB|",
        "most at once|0 B|–|",
        "Mean of g by projection|",
        "2 text and 8 vision tokens; the first 2 of 5 pictures|",
        "image 1: 30 × 20 pixels, 2 rows of 3 tokens, and one at each row's end|",
        "image 2: 30 × 20 pixels, 2 rows of 3 tokens|",
        "[8 image tokens]",
        "|4|0.00%|0.00%|1.2500|–|–|",
        "1001 of 1002 answers differ; 1000 score less after quantization, 0 more.",
        "Answers that differ: the first 1000 of 1001; report.json has all|",
        "1 answers that do not differ|",
        "How to load the result|",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    let document = parse(&html);
    let class = |class| document.descendants().filter(|node| node.attribute("class") == Some(class)).count();
    assert_eq!((class("scroll long"), class("heat"), class("picture")), (2, 2, 2));
    // Two stages; planned and measured where they are.
    assert_eq!((class("bar series-0"), class("bar series-1")), (2 + 4, 2));
}

#[test]
fn what_a_run_did_not_do_is_left_out() {
    let page = |solver| {
        let mut report = RunReport::default();
        report.provenance.settings.solver = SolverSettings { solver, group_size: None, ..SolverSettings::default() };
        report.memory_plan.device_is_host = true;
        html_of(&report)
    };
    for (solver, reason) in [(Solver::Rtn, "rounding to nearest runs no samples"), (Solver::Gptq, "no sample has text")]
    {
        let html = page(solver);
        check_alone(&parse(&html));
        let shown = texts(&html);
        for part in ["3 bits, one scale a row · ", "None: the numbers of all layers are sound.", reason, "calib|–|"]
        {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
        for id in ["layers", "importance", "samples", "evaluation", "figure-kl", "figure-score", "figure-mean-error"] {
            assert!(!html.contains(&format!("id=\"{id}\"")), "{id}");
        }
        assert!(!shown.contains("How to load") && !shown.contains("Memory of the GPU"), "{shown}");
    }
    // Layers, and nothing that was factored.
    let layers = vec![LayerReport { solve: SolveReport::default(), ..layer("q_proj", 0, 0.5, Vec::new()) }];
    let shown = texts(&html_of(&RunReport { layers, ..RunReport::default() }));
    assert!(shown.contains("No damping: nothing was factored.") && !shown.contains("Distance of"), "{shown}");
}

#[test]
fn what_strangers_write_stays_text() {
    let html = html_of(&report());
    let document = parse(&html);
    check_alone(&document);
    let shown = HOSTILE.replace('\u{0}', "\u{fffd}");
    let texts = document.descendants().filter(|node| node.is_text() && node.text().unwrap().contains(&shown)).count();
    // Title, heading, family, settings, checksums, finding, sample, answers.
    assert!(texts >= 12, "{texts}");
    assert!(!html.to_lowercase().contains("<script"));
}

/// Pixels of a picture in a `data:` URI.
fn pixels(uri: &str) -> RgbImage {
    let encoded = uri.split_once("base64,").unwrap().1;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap();
    if uri.starts_with("data:image/png;") { decode_png(&bytes) } else { decode_jpeg(&bytes) }
}

#[test]
fn a_cell_has_the_colour_of_its_token() {
    let html = html_of(&report());
    let document = parse(&html);
    let image = |class| document.descendants().find(|node| node.attribute("class") == Some(class)).unwrap();
    let heat = pixels(image("heat").attribute("src").unwrap());
    let ends = document.descendants().find(|n| n.has_tag_name("img") && n.attribute("class") == Some("ends")).unwrap();
    let ends = pixels(ends.attribute("src").unwrap());
    assert_eq!((heat.dimensions(), ends.dimensions()), ((3, 2), (1, 2)));

    let (_, g) = planted();
    // Row by row, each with its end; the sample's image begins at token 1.
    let cells = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 5), (1, 1, 6), (1, 2, 7)];
    let drawn = cells.map(|(row, column, token)| (g[token], heat.get_pixel(column, row).0));
    let at_ends = [(0, 4), (1, 8)].map(|(row, token): (u32, usize)| (g[token], ends.get_pixel(0, row).0));
    let mut all: Vec<(f32, [u8; 3])> = drawn.into_iter().chain(at_ends).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    // viridis grows brighter all along, from matplotlib's first colour to its last.
    let luminance = |[r, g, b]: [u8; 3]| 0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b);
    assert!(all.is_sorted_by(|a, b| luminance(a.1) < luminance(b.1)), "{all:?}");
    let near = |a: [u8; 3], b: [u8; 3]| a.iter().zip(b).all(|(a, b)| a.abs_diff(b) <= 1);
    assert!(near(all[0].1, [68, 1, 84]) && near(all[7].1, [253, 231, 37]), "{all:?}");

    // The text has the same scale: its classes' colours are those of cells of the same importance.
    let spans = document.descendants().filter(|node| node.has_tag_name("span") && node.attribute("title").is_some());
    let spans: Vec<_> = spans.map(|node| (node.text().unwrap(), node.attribute("title").unwrap())).collect();
    assert_eq!(spans, [("<script>", "1"), ("\u{fffd}⏎\n", "4")]);
}

#[test]
fn bars_are_as_many_as_layers() {
    let report = report();
    let html = html_of(&report);
    let document = parse(&html);
    let bars = |id: &str| {
        let names = format!("{id}-t {id}-d");
        let chart = document.descendants().find(|node| node.attribute("aria-labelledby") == Some(names.as_str()));
        let rects = chart.unwrap().descendants().filter(|node| node.has_tag_name("rect"));
        rects.filter(|node| ["#030303", "#040404", "#050505"].contains(&node.attribute("fill").unwrap())).count()
    };
    assert_eq!((bars("error-q_proj"), bars("error-down_proj"), bars("damp-q_proj")), (2, 1, 2));
    assert_eq!((bars("histogram-1"), bars("block-seconds")), (2 * BINS, 1));
    let ids: Vec<&str> = document.descendants().filter_map(|node| node.attribute("id")).collect();
    let different: std::collections::HashSet<&str> = ids.iter().copied().collect();
    assert_eq!(ids.len(), different.len());
}

#[test]
fn json_is_the_same_with_lists_in_lines() {
    let report = report();
    let files = report.files().unwrap();
    let (_, bytes) = files.iter().find(|(name, _)| *name == "report.json").unwrap();
    let value: Value = serde_json::from_slice(bytes).unwrap();
    assert_eq!(value, serde_json::to_value(&report).unwrap());
    let lists = std::str::from_utf8(bytes).unwrap();
    assert!(lists.contains("\"text\": [1, 1, 1,") && lists.contains("[1.0, 0.25, 8.0,"), "{lists}");
}

/// The sequences of two conversations that differ in their picture only, what the report shows of the second, and what the
/// decoder takes of both.
fn seen(checkpoint: &str, folder: &Path, [before, after]: [&RgbImage; 2]) -> (ReportSample, [RgbImage; 2], Vec<f32>) {
    let files = [before, after].map(|picture| {
        let path = folder.join(format!("{}.png", std::ptr::from_ref(picture) as usize));
        save_png(picture, &path);
        question(&text(path))
    });
    fs::write(folder.join("data.jsonl"), files.join("\n")).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&golden("model").join(checkpoint)).unwrap());
    let family = families::of::<Cpu>(&checkpoint).unwrap();
    let vision = family.vision_input(&checkpoint, ImageOptions::default()).unwrap();
    let builder = SequenceBuilder::new(checkpoint.folder(), vision).unwrap();
    let conversations = dataset::read(&folder.join("data.jsonl"), None).unwrap();
    let sequences: Vec<Sequence> = conversations.iter().map(|c| builder.build(c).unwrap()).collect();
    let embedder = Embedder::load(&Cpu, &checkpoint, &family.config(&checkpoint).unwrap(), true).unwrap();
    let [x, y] = [0, 1].map(|i| {
        let one = [&sequences[i]];
        let features = embedder.image_features(&Cpu, &one).unwrap();
        embedder.embed(&Cpu, &one, features.as_ref()).unwrap().0
    });
    let change = |row: usize| {
        let (x, y) = (x.row(row), y.row(row));
        x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f32>().sqrt()
    };
    let changes = (0..sequences[0].tokens.len()).map(change).collect();
    // The last view: of tiles where there are any.
    let pictures = [0, 1].map(|i| builder.views(&sequences[i].images[0]).1.pop().unwrap().picture);
    (samples::choose(&builder, &sequences).unwrap().remove(1), pictures, changes)
}

/// Where a picture is painted over, that cell's token is the one whose input to the decoder changes most, compared with what
/// other paint does to it: in a tower every token sees all others.
#[test]
fn cells_are_where_their_tokens_look() {
    let original = open_png(golden("model/images/tall-200x330.png"));
    for checkpoint in ["flat-tied-bf16", "qwen3_vl-tied-bf16", "llava-hub-tied-f16"] {
        let folder = tempfile::tempdir().unwrap();
        let (sample, ..) = seen(checkpoint, folder.path(), [&original, &original.clone()]);
        let picture = sample.pictures.last().unwrap();
        let (rows, columns) = (picture.rows, picture.columns);
        assert!(rows > 1 && columns > 1, "{checkpoint}");
        let mut all_changes: Vec<Vec<f32>> = Vec::new();
        for cell in 0..rows * columns {
            let (high, wide) = (original.height() as usize / rows, original.width() as usize / columns);
            let mut painted = original.clone();
            for (dx, dy) in (0..wide).flat_map(|dx| (0..high).map(move |dy| (dx, dy))) {
                let (x, y) = ((cell % columns) * wide + dx, (cell / columns) * high + dy);
                let pixel = painted.get_pixel_mut(x as u32, y as u32);
                pixel.0 = pixel.0.map(|value| value.wrapping_add(128));
            }
            let (sample, [before, after], changes) = seen(checkpoint, folder.path(), [&original, &painted]);
            assert!(sample.text.iter().all(|token| changes[token.index] == 0.0));
            let mut change = vec![0u32; rows * columns];
            for (px, py, pixel) in after.enumerate_pixels() {
                let cell = (py as usize * rows / after.height() as usize) * columns
                    + px as usize * columns / after.width() as usize;
                let differs = pixel.0.iter().zip(before.get_pixel(px, py).0).map(|(a, b)| u32::from(a.abs_diff(b)));
                change[cell] += differs.sum::<u32>();
            }
            let shown = (0..change.len()).max_by_key(|&cell| change[cell]);
            assert_eq!(shown, Some(cell), "{checkpoint}: the picture shows the paint elsewhere");
            let token = |cell: usize| picture.token(cell / columns, cell % columns);
            all_changes.push((0..rows * columns).map(|cell| changes[token(cell)]).collect());
        }
        let means: Vec<f32> =
            (0..all_changes[0].len()).map(|cell| all_changes.iter().map(|changes| changes[cell]).sum()).collect();
        for (cell, changes) in all_changes.iter().enumerate() {
            let share = |cell: usize| changes[cell] / means[cell];
            let most = (0..means.len()).max_by(|&a, &b| share(a).total_cmp(&share(b)));
            assert_eq!(most, Some(cell), "{checkpoint}: {rows} x {columns} cells");
        }
    }
}

#[test]
fn a_run_leaves_a_page_that_says_what_the_json_says() {
    let bench = Bench::new("llava-hub-tied-f16");
    let (picture, beside) = ("tall-200x330.png", bench.outputs().parent().unwrap().to_owned());
    fs::copy(golden("model/images").join(picture), beside.join(picture)).unwrap();
    let mut line: Value = serde_json::from_str(&question(picture)).unwrap();
    line["id"] = HOSTILE.replace('\u{0}', "").into();
    bench.write_data(&[&line.to_string(), r#"{"text": "nothing but <b>text</b> 京"}"#]);
    let questions = beside.join("questions.jsonl");
    fs::write(&questions, line.to_string()).unwrap();
    let printed = succeed(&bench.quantize(&["--eval", &text(&questions), "--quiet"]));
    assert!(printed.lines().any(|line| line.starts_with("total")), "{printed}");

    let out = bench.outputs().join("out");
    let (json, html) = (read_json(out.join("report.json")), fs::read_to_string(out.join("report.html")).unwrap());
    let document = parse(&html);
    check_alone(&document);
    let answer = &json["evaluation"]["answers"][0];
    assert_eq!((&answer["id"], &answer["expected"]), (&line["id"], &json!(["square"])));
    assert_eq!(answer["question"], "[image] what shape?");
    assert_eq!(json["evaluation"]["total"]["n"], 1);

    // The whole image, then its tiles with a token at the end of each row, then a sample of text.
    let samples = json["samples"].as_array().unwrap();
    let [first, second] =
        [0, 1].map(|i| samples.iter().find(|s| s["pictures"].as_array().unwrap().is_empty() == (i == 1)));
    let (first, second) = (first.unwrap(), second.unwrap());
    let pictures = first["pictures"].as_array().unwrap();
    assert_eq!((pictures.len(), &pictures[1]["row_ends"]), (2, &json!(true)));
    let count = |picture: &Value, key: &str| picture[key].as_u64().unwrap();
    let whole = count(&pictures[0], "rows") * count(&pictures[0], "columns");
    assert_eq!(count(&pictures[1], "first_token"), count(&pictures[0], "first_token") + whole);
    let texts: Vec<&str> = second["text"].as_array().unwrap().iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert!(texts.concat().starts_with("nothing but <b>text</b>"), "{texts:?}");

    // Histograms count every token once; kept values are those of the samples.
    let counts = ["text", "vision"].map(|kind| {
        let bins = json["blocks"][1]["importance"][kind].as_array().unwrap();
        bins.iter().map(|n| n.as_u64().unwrap()).sum::<u64>()
    });
    let calibration = &json["calibration"];
    assert_eq!(json!(counts), json!([calibration["text_tokens"], calibration["vision_tokens"]]));
    assert_eq!(json["blocks"][0]["importance"], Value::Null);
    for (sample, g) in samples.iter().zip(json["blocks"][1]["importance"]["samples"].as_array().unwrap()) {
        let length = sample["span"]["end"].as_u64().unwrap() - sample["span"]["start"].as_u64().unwrap();
        assert_eq!(g.as_array().unwrap().len() as u64, length);
    }
    let images = document.descendants().filter(|node| node.has_tag_name("img")).count();
    assert_eq!(images, 3, "two pictures and the ends of rows, in one block");
}

#[test]
fn questions_are_checked_before_hours_of_quantizing() {
    let bench = Bench::new("flat-tied-bf16");
    let questions = bench.outputs().parent().unwrap().join("questions.jsonl");
    let line = question(IMAGE);
    for (fault, says) in [
        (line.replace("gradient", "missing"), "missing-70x42.png"),
        (line.replace("\"id\"", "\"metric\": \"best\", \"id\""), "best"),
        ("{".into(), "questions.jsonl:2"),
    ] {
        fs::write(&questions, format!("{line}\n{fault}")).unwrap();
        bench.refused(&bench.quantize(&["--eval", &text(&questions)]), &[says]);
    }
}

#[test]
fn rounding_to_nearest_has_a_page_too() {
    let bench = Bench::new("flat-tied-bf16");
    succeed(&bench.quantize(&["--solver", "rtn", "--quiet"]));
    let files = files_of(&bench.outputs().join("out"));
    let (_, html) = files.iter().find(|(name, _)| name == "report.html").unwrap();
    let html = std::str::from_utf8(html).unwrap();
    check_alone(&parse(html));
    assert!(html.contains("No damping") && !html.contains("id=\"samples\""));
}
