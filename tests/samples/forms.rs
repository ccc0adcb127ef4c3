//! The forms of calibration data, and everything that must be refused with a clear message.

use crate::support::picture::save_png;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use vlmq::data::dataset::{self, Conversation, ImageSource, Message, Part};
use vlmq::data::image::decode;
use vlmq::data::metric::Metric;
use vlmq::data::native_resolution::{NativeResolution, NativeVision};
use vlmq::data::sequence::SequenceBuilder;
use vlmq::data::template::ChatTemplate;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// Reads one file of the given content, in which `$` stands for the file's folder.
fn read(content: &str) -> Result<Vec<Conversation>, String> {
    let folder = folder();
    let path = folder.path().join("data.jsonl");
    fs::write(&path, content.replace('$', folder.path().to_str().unwrap())).unwrap();
    dataset::read(&path, None).map_err(|error| format!("{error:#}")).map(|mut all| {
        // Paths relative to the file, so that expectations can be written down.
        for part in all.iter_mut().flat_map(|one| &mut one.messages).flat_map(|message| &mut message.content) {
            if let Part::Image(ImageSource::Below { root, path }) = part {
                assert_eq!(**root, *folder.path());
                *part = image(path.strip_prefix(folder.path()).unwrap().to_str().unwrap());
            }
        }
        all
    })
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

fn image(path: &str) -> Part {
    Part::Image(ImageSource::File(path.into()))
}

fn turn(role: &str, content: Vec<Part>) -> Message {
    Message { role: role.into(), content, plain: false }
}

/// A turn that is one string.
fn plain(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: vec![text(content)], plain: true }
}

#[test]
fn messages_in_every_spelling() {
    let all = read(concat!(
        "\u{feff}{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":\"plain\"}]}\n\n",
        r#"{"id":7,"metric":"anls","max_new_tokens":5,"answers":["a","b"],"surplus":{},"group":null,"messages":[{"role":"user","content":[{"type":"image","image":"a.png"},{"type":"image","path":"$/b.png"},{"type":"image","url":"file://$/c%20d.png"},{"type":"image_url","image_url":{"url":"data:;base64,aGk="}},{"type":"text","text":"q"}]},{"role":"assistant","content":"answer"}]}"#,
    ))
    .unwrap();
    assert_eq!(all[0].messages, [plain("system", "s"), plain("user", "plain")]);
    assert_eq!((all[0].id.as_str(), all[0].answer()), ("data.jsonl:1", None));
    let two = &all[1];
    let bytes = Part::Image(ImageSource::Bytes(b"hi".into()));
    assert_eq!(
        two.question(),
        [turn("user", vec![image("a.png"), image("b.png"), image("c d.png"), bytes, text("q")])]
    );
    assert_eq!(two.answer().unwrap(), "answer");
    assert_eq!((two.id.as_str(), two.metric.map(Metric::name), two.max_new_tokens), ("7", Some("anls"), Some(5)));
    assert_eq!(two.answers, ["a", "b"]);
    assert!(two.origin.ends_with("data.jsonl:3"), "{}", two.origin);
}

#[test]
fn sharegpt_lists_and_lines() {
    let first = r#"{"id":"0","image":"coco/1.jpg","conversations":[{"from":"human","value":"<image>\nWhat?"},{"from":"gpt","value":"A cat."},{"from":"human","value":"Sure?"},{"from":"gpt","value":"Yes."}]}"#;
    let last =
        r#"{"image":"1.jpg","conversations":[{"from":"human","value":"What?\n<image>"},{"from":"gpt","value":"A."}]}"#;
    let several = r#"{"image":["1.jpg","2.jpg"],"conversations":[{"from":"system","value":"s"},{"from":"human","value":"first <image> second\n<image>\nend"},{"from":"gpt","value":"A."}]}"#;
    let unmarked =
        r#"{"images":["1.jpg"],"conversations":[{"from":"user","value":"What?"},{"from":"assistant","value":"A."}]}"#;
    let bare = r#"{"conversations":[{"from":"human","value":"Hi\n"},{"from":"gpt","value":"Ho"}]}"#;
    let lines = [first, last, several, unmarked, bare];
    let as_lines = read(&lines.join("\n")).unwrap();
    let as_list = read(&format!("[\n{}\n]", lines.join(",\n"))).unwrap();
    assert!(as_list[1].origin.ends_with("data.jsonl, entry 2"));
    for all in [as_lines, as_list] {
        assert_eq!(all[0].messages[0], turn("user", vec![image("coco/1.jpg"), text("What?")]));
        assert_eq!(all[0].question().len(), 3);
        assert_eq!(all[0].answer().unwrap(), "Yes.");
        assert_eq!(all[1].question(), [turn("user", vec![image("1.jpg"), text("What?")])]);
        let mixed = vec![text("first"), image("1.jpg"), text("second"), image("2.jpg"), text("end")];
        assert_eq!(all[2].question(), [plain("system", "s"), turn("user", mixed)]);
        assert_eq!(all[3].question(), [turn("user", vec![image("1.jpg"), text("What?")])]);
        assert_eq!(all[4].question(), [plain("user", "Hi\n")]);
    }
}

#[test]
fn questions_and_plain_text() {
    let all = read(concat!(
        r#"{"id":"a","image":"1.png","question":"q","answers":["x","y"]}"#,
        "\n",
        r#"{"images":["1.png","2.png"],"question":"q"}"#,
        "\n",
        r#"{"text":"plain words"}"#
    ))
    .unwrap();
    assert_eq!(all[0].question(), [turn("user", vec![image("1.png"), text("q")])]);
    assert_eq!(all[0].answer().unwrap(), "x");
    assert_eq!(all[1].messages, [turn("user", vec![image("1.png"), image("2.png"), text("q")])]);
    assert_eq!((all[2].text.as_deref(), all[2].messages.len()), (Some("plain words"), 0));
}

#[test]
fn image_root_replaces_the_files_folder_and_nothing_else() {
    let (here, other) = (folder(), folder());
    let path = here.path().join("data.jsonl");
    let within = other.path().join("c.png");
    fs::write(&path, format!(r#"{{"images":["a/b.png",{within:?}],"question":"q"}}"#)).unwrap();
    let all = dataset::read(&path, Some(other.path())).unwrap();
    let below = |path: PathBuf| Part::Image(ImageSource::Below { root: other.path().into(), path });
    assert_eq!(all[0].messages[0].content[..2], [below(other.path().join("a/b.png")), below(within)]);
    // Where the other folder is not given, its file lies outside.
    let error = format!("{:#}", dataset::read(&path, None).unwrap_err());
    assert!(error.contains("data.jsonl:1") && error.contains("--image-root"), "{error}");
    let error = dataset::read(&path, Some(&other.path().join("none"))).unwrap_err().to_string();
    assert!(error.contains("image root"), "{error}");
}

#[test]
fn bad_lines_are_refused_with_their_place() {
    let one = |message: &str| format!(r#"{{"messages":[{message}]}}"#);
    let part = |part: &str| one(&format!(r#"{{"role":"user","content":[{part}]}}"#));
    for (line, wanted) in [
        ("{\"a\"".to_string(), "not a JSON object"),
        ("3".into(), "a number"),
        ("{\"id\":\"x\"}".into(), "`messages`, `conversations`, `question`, `text`"),
        (r#"{"messages":[]}"#.into(), "`messages` is empty"),
        (r#"{"messages":{}}"#.into(), "must be a list"),
        (r#"{"id":[],"text":"a"}"#.into(), "`id`"),
        (r#"{"group":3,"text":"a"}"#.into(), "`group` must be a string"),
        (
            r#"{"metric":"bleu","text":"a"}"#.into(),
            "exact, relaxed, anls, vqa, substring, formula, choice, first_letter",
        ),
        (r#"{"max_new_tokens":0,"text":"a"}"#.into(), "positive"),
        (r#"{"answers":"a","question":"q"}"#.into(), "`answers` must be a list"),
        (r#"{"answers":[1],"question":"q"}"#.into(), "`answers` must hold strings"),
        (r#"{"text":""}"#.into(), "empty"),
        (r#"{"text":"a","image":"b.png"}"#.into(), "no images"),
        (r#"{"question":"q","image":"a","images":["b"]}"#.into(), "keep one"),
        (r#"{"question":"q","images":[4]}"#.into(), "must be a string"),
        (r#"{"image":"a.png","messages":[{"role":"user","content":"hi"}]}"#.into(), "no image part"),
        (one("3"), "must be an object"),
        (one(r#"{"content":"a"}"#), "no `role`"),
        (one(r#"{"role":"tool","content":"a"}"#), "known: system, user, assistant"),
        (one(r#"{"role":"user"}"#), "no `content`"),
        (one(r#"{"role":"user","content":3}"#), "must be a string or a list"),
        (part("3"), "must be an object"),
        (part(r#"{"text":"a"}"#), "no `type`"),
        (part(r#"{"type":"video","video":"a"}"#), "videos are not supported"),
        (part(r#"{"type":"audio","audio":"a"}"#), "known: text, image, image_url"),
        (part(r#"{"type":"text"}"#), "no `text`"),
        (part(r#"{"type":"image"}"#), "exactly one of"),
        (part(r#"{"type":"image","image":"a","url":"b"}"#), "exactly one of"),
        (part(r#"{"type":"image","image":"https://example.org/a.png"}"#), "not fetched"),
        (part(r#"{"type":"image_url","image_url":{}}"#), "no `url`"),
        (part(r#"{"type":"image","image":"data:image/png;base64,*"}"#), "base64"),
        (r#"{"conversations":[{"from":"bot","value":"a"}]}"#.into(), "known: human"),
        (r#"{"conversations":[{"from":"human"}]}"#.into(), "no `value`"),
        (r#"{"conversations":[{"from":"human","value":"<image> a"}]}"#.into(), "1 <image> markers but 0 images"),
        (r#"{"image":["a","b"],"conversations":[{"from":"human","value":"<image>"}]}"#.into(), "must agree"),
        (r#"{"image":"a","conversations":[{"from":"gpt","value":"b"}]}"#.into(), "no turn of the user"),
    ] {
        let error = read(&format!("{{\"text\":\"fine\"}}\n{line}")).unwrap_err();
        assert!(error.contains(wanted) && error.contains("data.jsonl:2"), "{line}: {error}");
    }
    for (content, wanted) in [("", "no conversations"), ("[]", "no conversations"), ("[{]", "not a JSON list")] {
        assert!(read(content).unwrap_err().contains(wanted));
    }
    let error = format!("{:#}", dataset::read(Path::new("absent.jsonl"), None).unwrap_err());
    assert!(error.contains("absent.jsonl"), "{error}");
}

fn decode_error(bytes: Vec<u8>) -> String {
    format!("{:#}", decode(&ImageSource::Bytes(bytes), "line 5").unwrap_err())
}

#[test]
fn bad_images_are_refused() {
    let images = root().join("golden/calibration/images");
    let png = fs::read(images.join("noise-56x56.png")).unwrap();
    let jpeg = fs::read(images.join("exif-6.jpg")).unwrap();
    let progressive = fs::read(images.join("progressive.jpg")).unwrap();
    for (bytes, wanted) in [
        (Vec::new(), "neither PNG, JPEG"),
        (b"%PDF-1.7\n".to_vec(), "neither PNG, JPEG"),
        (b"GIF89a\x01\0\x01\0".to_vec(), "is broken"),
        (b"RIFF\x10\0\0\0WEBPVP8 ".to_vec(), "is broken"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec(), "HEIC or AVIF"),
        (b"\0\0\0\x20ftypavif\0\0\0\0".to_vec(), "HEIC or AVIF"),
        (png[..png.len() / 2].to_vec(), "is broken"),
        (png[..20].to_vec(), "is broken"),
        (jpeg[..jpeg.len() - 40].to_vec(), "is broken"),
        (progressive[..progressive.len() - 20].to_vec(), "is broken"),
        (jpeg[..30].to_vec(), "is broken"),
    ] {
        let error = decode_error(bytes);
        assert!(error.contains(wanted) && error.contains("line 5"), "{error}");
    }
    let mut flipped = png.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xff;
    assert!(decode_error(flipped).contains("is broken"));
    let folder = folder();
    let missing = ImageSource::File(folder.path().join("no.png"));
    let error = format!("{:#}", decode(&missing, "data.jsonl:3").unwrap_err());
    assert!(error.contains("data.jsonl:3") && error.contains("no.png") && error.contains("--image-root"), "{error}");
    let directory = ImageSource::File(folder.path().into());
    assert!(format!("{:#}", decode(&directory, "").unwrap_err()).contains("not a file"));
}

/// A PNG that declares 100000x100000 pixels and holds none: refused by its header, without memory for the pixels.
#[test]
fn huge_declared_sizes_are_refused_before_decoding() {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], body: &[u8]| {
        png.extend((body.len() as u32).to_be_bytes());
        let start = png.len();
        png.extend(kind);
        png.extend(body);
        let crc = crc32(&png[start..]);
        png.extend(crc.to_be_bytes());
    };
    let side = 100_000u32.to_be_bytes();
    chunk(b"IHDR", &[&side[..], &side, &[8, 2, 0, 0, 0]].concat());
    chunk(b"IDAT", &[0x78, 0x9c, 3, 0, 0, 0, 0, 1]);
    chunk(b"IEND", &[]);
    let error = decode_error(png);
    assert!(error.contains("100000x100000") && error.contains("89478485"), "{error}");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

fn user(words: &str) -> Vec<Message> {
    vec![turn("user", vec![text(words)])]
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, Default::default(), "some.jinja".into()).unwrap()
}

#[test]
fn failing_and_endless_templates_end_with_an_error() {
    let nested = "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}";
    for (source, wanted) in [
        ("\n{{ raise_exception('roles must alternate') }}", "line 2: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "line 1"),
        (nested, "does not come to an end"),
        ("{% for a in range(5000) %}{{ 'x' * 4000 }}{% endfor %}", "20000000 bytes"),
        ("{% set x = 'a' * 4000000000 %}{{ x }}", "some.jinja"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "some.jinja"),
        ("{{ 'a' | no_such_filter }}", "some.jinja"),
    ] {
        let error = format!("{:#}", template(source).render(&user("hi"), false).unwrap_err());
        assert!(error.contains(wanted) && error.contains("some.jinja"), "{source}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let error = ChatTemplate::new("{% if %}", Default::default(), "some.jinja".into()).err().unwrap();
    assert!(format!("{error:#}").contains("some.jinja"));
}

/// A checkpoint folder with the small model's tokenizer and processor and whatever else a test writes.
fn checkpoint(files: &[(&str, &str)]) -> TempDir {
    let folder = folder();
    for name in ["tokenizer.json", "generation_config.json", "processor_config.json", "config.json"] {
        fs::copy(root().join("data/tiny-qwen2-vl").join(name), folder.path().join(name)).unwrap();
    }
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn builder(folder: &Path) -> Result<SequenceBuilder, String> {
    let vision = NativeVision::new(NativeResolution::read(folder, None, None).unwrap(), 613, Some(614));
    SequenceBuilder::new(folder, Box::new(vision)).map_err(|error| format!("{error:#}"))
}

const SIMPLE: &str = "{% for m in messages %}<|im_start|>{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";

#[test]
fn templates_are_found_in_the_order_of_transformers() {
    let json =
        |name: &str| serde_json::json!({"chat_template": format!("{name} {{{{ messages[0].content[0].text }}}}")});
    let list = serde_json::json!({"chat_template": [{"name": "tool_use", "template": "wrong"},
        {"name": "default", "template": "listed {{ messages[0].content[0].text }}{{ bos_token }}{{ eos_token }}"}],
        "bos_token": {"content": "[b]"}, "eos_token": "[e]", "pad_token": null});
    let folder = checkpoint(&[("tokenizer_config.json", &list.to_string())]);
    let render = || ChatTemplate::load(folder.path()).unwrap().render(&user("hi"), false).unwrap();
    assert_eq!(render(), "listed hi[b][e]");
    fs::write(folder.path().join("chat_template.json"), json("legacy").to_string()).unwrap();
    assert_eq!(render(), "legacy hi");
    fs::write(folder.path().join("chat_template.jinja"), "jinja {{ messages[0].content[0].text }}\n").unwrap();
    assert_eq!(render(), "jinja hi");

    let none = checkpoint(&[]);
    let error = format!("{:#}", ChatTemplate::load(none.path()).err().unwrap());
    assert!(error.contains("no chat template") && error.contains("tokenizer_config.json"), "{error}");
    for source in
        ["{{ messages[0].content }}", "{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}"]
    {
        let strings = checkpoint(&[("chat_template.jinja", source)]);
        let error = format!("{:#}", ChatTemplate::load(strings.path()).err().unwrap());
        assert!(error.contains("only plain strings"), "{error}");
    }
}

#[test]
fn tokenizers_that_other_tools_damaged_do_not_cut() {
    let folder = checkpoint(&[("chat_template.jinja", SIMPLE)]);
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let conversation = read(r#"{"text":"how many red shapes are there in the image?"}"#).unwrap().remove(0);
    let before = builder(folder.path()).unwrap().build(&conversation).unwrap().tokens;
    assert!(before.len() > 3);
    fs::write(&path, tokenizer.to_string()).unwrap();
    assert_eq!(builder(folder.path()).unwrap().build(&conversation).unwrap().tokens, before);
}

#[test]
fn bad_folders_are_refused() {
    let folder = checkpoint(&[("chat_template.jinja", SIMPLE)]);
    assert!(builder(folder.path()).is_ok());
    let settings = NativeResolution::read(folder.path(), None, None).unwrap();
    let error =
        SequenceBuilder::new(folder.path(), Box::new(NativeVision::new(settings.clone(), 99_999, None))).err().unwrap();
    assert!(error.to_string().contains("no token 99999"), "{error}");
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert!(builder(folder.path()).err().unwrap().contains("tokenizer.json"));
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(builder(folder.path()).err().unwrap().contains("tokenizer.json"));
}

#[test]
fn texts_and_templates_that_disagree_about_images_are_refused() {
    let png = "golden/calibration/images/noise-29x31.png";
    let with_image = format!(
        r#"{{"messages":[{{"role":"user","content":[{{"type":"image","image":{png:?}}},{{"type":"text","text":"q"}}]}},{{"role":"assistant","content":"a"}}]}}"#
    );
    let build_below = |source: &str, line: &str, images: &Path| {
        let folder = checkpoint(&[("chat_template.jinja", source)]);
        let path = folder.path().join("data.jsonl");
        fs::write(&path, line).unwrap();
        let conversation = dataset::read(&path, Some(images)).unwrap().remove(0);
        builder(folder.path()).unwrap().build_answered(&conversation).map_err(|error| format!("{error:#}"))
    };
    let build = |source: &str, line: &str| build_below(source, line, &root());
    let fine = build(SIMPLE, &with_image).unwrap();
    assert_eq!((fine.vision_tokens, fine.answer.len()), (6, 2));
    for (source, line, wanted) in [
        (SIMPLE, r#"{"messages":[{"role":"user","content":"see <|image_pad|>"}]}"#, "stands for an image"),
        (SIMPLE, r#"{"text":"see <|image_pad|>"}"#, "stands for an image"),
        ("{{ messages[0].content[-1].text }}", &with_image, "shows 0 images"),
        ("<|image_pad|><|image_pad|>{{ messages[0].content[-1].text }}", &with_image, "shows 2 images"),
        ("{{ messages | length }}{{ messages[0].content[-1].text }}<|image_pad|>", &with_image, "cannot be told"),
    ] {
        let error = build(source, line).unwrap_err();
        assert!(error.contains(wanted) && error.contains("data.jsonl:1"), "{source} {line}: {error}");
    }
    // What only calibrates needs no boundary.
    let unclear = checkpoint(&[(
        "chat_template.jinja",
        "{{ messages | length }}{{ messages[0].content[-1].text }}<|image_pad|>",
    )]);
    let path = unclear.path().join("data.jsonl");
    fs::write(&path, &with_image).unwrap();
    let conversation = dataset::read(&path, Some(&root())).unwrap().remove(0);
    let calibrated = builder(unclear.path()).unwrap().build(&conversation).unwrap();
    assert_eq!((calibrated.vision_tokens, calibrated.answer), (6, 0..0));
    let long = image::RgbImage::new(2, 402);
    let folder = folder();
    save_png(&long, folder.path().join("long.png"));
    let error = build_below(SIMPLE, &with_image.replace(png, "long.png"), folder.path()).unwrap_err();
    assert!(error.contains("200 times") && error.contains("data.jsonl:1"), "{error}");
}

/// LLaVA-OneVision's template asks for an answer with other white space than it writes before one.
#[test]
fn white_space_before_an_answer_may_differ_from_the_prompt() {
    let source = "{% for m in messages %}<|im_start|>{{ m.role }} \n{{ m.content[0].text }}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let folder = checkpoint(&[("chat_template.jinja", source)]);
    let line = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"yes  and no"}]}"#;
    let builder = builder(folder.path()).unwrap();
    let sequence = builder.build(&read(line).unwrap()[0]).unwrap();
    assert_eq!(builder.decode(&sequence.tokens[sequence.answer.clone()]).unwrap(), "yes  and no");
    assert_eq!(sequence.answer.end, sequence.tokens.len());
}

#[test]
fn every_generation_of_processor_files() {
    let read = |name: &str, content: &str, min: Option<usize>, max: Option<usize>| {
        let folder = folder();
        fs::write(folder.path().join(name), content).unwrap();
        NativeResolution::read(folder.path(), min, max).map_err(|error| format!("{error:#}"))
    };
    let limits = |settings: NativeResolution| (settings.min_pixels, settings.max_pixels);
    for (content, wanted) in [
        (r#"{"min_pixels":3136,"max_pixels":12845056}"#, (3136, 12845056)),
        (r#"{"size":{"min_pixels":3136,"max_pixels":9999}}"#, (3136, 9999)),
        (r#"{"size":{"shortest_edge":4000,"longest_edge":9000},"min_pixels":null}"#, (4000, 9000)),
        (r#"{"size":{"shortest_edge":4000,"longest_edge":9000},"max_pixels":8000}"#, (4000, 8000)),
        ("{}", (3136, 1003520)),
    ] {
        assert_eq!(limits(read("preprocessor_config.json", content, None, None).unwrap()), wanted, "{content}");
        let nested = format!(r#"{{"processor_class":"x","image_processor":{content}}}"#);
        assert_eq!(limits(read("processor_config.json", &nested, None, None).unwrap()), wanted, "{content}");
    }
    let both = folder();
    fs::write(both.path().join("preprocessor_config.json"), r#"{"patch_size":16}"#).unwrap();
    fs::write(both.path().join("processor_config.json"), r#"{"processor_class":"x"}"#).unwrap();
    assert_eq!(NativeResolution::read(both.path(), None, None).unwrap().patches.patch_size, 16);
    fs::write(both.path().join("processor_config.json"), r#"{"image_processor":{"patch_size":12}}"#).unwrap();
    assert_eq!(NativeResolution::read(both.path(), Some(5000), Some(6000)).unwrap().patches.patch_size, 12);
    assert_eq!(limits(NativeResolution::read(both.path(), Some(5000), Some(6000)).unwrap()), (5000, 6000));
    for (content, wanted) in [
        ("3", "not a JSON object"),
        ("{", "not JSON"),
        (r#"{"patch_size":"a"}"#, "`patch_size`"),
        (r#"{"merge_size":0}"#, "`merge_size`"),
        (r#"{"patch_size":4000}"#, "1 to 64"),
        (r#"{"image_mean":[1,2]}"#, "three numbers"),
        (r#"{"image_std":[0,1,1]}"#, "`image_std`"),
        (r#"{"resample":2}"#, "`resample` is 2"),
        (r#"{"do_resize":false}"#, "`do_resize`"),
        (r#"{"rescale_factor":0}"#, "`rescale_factor`"),
        (r#"{"min_pixels":500,"max_pixels":400}"#, "no image can be both"),
        (r#"{"max_pixels":99999999999}"#, "positive integer"),
        (r#"{"max_pixels":999999999}"#, "89478485"),
    ] {
        let error = read("preprocessor_config.json", content, None, None).unwrap_err();
        assert!(error.contains(wanted) && error.contains("preprocessor_config.json"), "{content}: {error}");
    }
    let error = format!("{:#}", NativeResolution::read(folder().path(), None, None).unwrap_err());
    assert!(error.contains("preprocessor_config.json"), "{error}");
}
