//! Data files and images that are wrong, or name what is none of theirs: one line says so, and nothing is left behind.

#![cfg(feature = "run")]

mod support;

use serde_json::json;
use std::fs;
use support::golden;
use support::program::{Bench, IMAGE, question, succeed, text};

/// One file of bf16 weights.
const FLAT: &str = "flat-tied-bf16";

#[test]
fn data_files() {
    let good = question(IMAGE);
    let cases: &[(&str, &[&str])] = &[
        ("", &["holds no conversations"]),
        ("\n \n", &["holds no conversations"]),
        ("[]", &["holds no conversations"]),
        ("7", &["data.jsonl:1", "expected a JSON object"]),
        ("{\"text\":", &["data.jsonl:1", "not a JSON object"]),
        ("[{\"text\": \"a\"}, 7]", &["entry 2", "expected a JSON object"]),
        ("{}", &["none of `messages`"]),
        (r#"{"messages": []}"#, &["`messages` is empty"]),
        (r#"{"messages": {}}"#, &["must be a list"]),
        (
            r#"{"messages": [{"role": "robot", "content": "x"}]}"#,
            &["unknown `role` \"robot\"", "system, user, assistant"],
        ),
        (r#"{"messages": [{"role": "user"}]}"#, &["no `content`"]),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}"#,
            &["unknown part `type`", "text, image"],
        ),
        (r#"{"conversations": [{"from": "cat", "value": "x"}]}"#, &["unknown `from` \"cat\""]),
        (r#"{"text": "a", "metric": "luck"}"#, &["unknown `metric` \"luck\"", "exact, relaxed, anls"]),
        (r#"{"text": "a", "max_new_tokens": -1}"#, &["max_new_tokens"]),
        (r#"{"text": 1e308}"#, &["`text` must be a string"]),
        (r#"{"text": ""}"#, &["`text` is empty"]),
        (r#"{"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}]}"#, &["markers"]),
    ];
    for (content, says) in cases {
        let bench = Bench::new(FLAT);
        bench.write_data(&[content]);
        let says: Vec<&str> = says.iter().copied().chain(["data.jsonl"]).collect();
        bench.refused(&bench.quantize(&[]), &says);
        bench.refused(&bench.eval(&[]), &says);
    }
    let bench = Bench::new(FLAT);
    bench.write_data(&[&good, "", "{\"text\": [[["]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:3"]);
    bench.write_data(&["[".repeat(1 << 20).as_str()]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl", "recursion limit"]);
    fs::write(bench.data(), b"\xff\xfe\x00").unwrap();
    bench.refused(&bench.quantize(&[]), &["data.jsonl", "UTF-8"]);
    bench.refused(&bench.eval(&[]), &["data.jsonl", "UTF-8"]);
    bench.write_data(&[&good]);
    bench.refused(&bench.quantize(&["--image-root", "no/such/folder"]), &["no/such/folder", "not a folder"]);
    let says = ["--min-pixels and --max-pixels as given", "no image can be both"];
    bench.refused(&bench.quantize(&["--max-pixels", "1"]), &says);
    bench.refused(&bench.quantize(&["--max-tokens", "5"]), &["all 1", "longer than 5 tokens", "--max-tokens"]);
    bench.write_data(&[r#"{"text": "nothing to answer"}"#]);
    bench.refused(&bench.eval(&[]), &["data.jsonl:1", "no right answer is given"]);
    fs::remove_file(bench.data()).unwrap();
    bench.refused(&bench.quantize(&[]), &["cannot read the data file", "data.jsonl"]);
    bench.refused(&bench.eval(&[]), &["cannot read the data file", "data.jsonl"]);
}

#[test]
fn images() {
    let bench = Bench::new(FLAT);
    let png = fs::read(golden("model/images/gradient-70x42.png")).unwrap();
    let scratch = bench.data().parent().unwrap().to_path_buf();
    let at = |name: &str, bytes: &[u8]| {
        fs::write(scratch.join(name), bytes).unwrap();
        name.to_owned()
    };
    // A header that claims 60000 x 60000 pixels.
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let crc = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let cases = [
        ("missing.png".to_owned(), vec!["missing.png", "cannot be read", "--image-root"]),
        (at("cut.png", &png[..png.len() / 2]), vec!["cut.png", "broken"]),
        (at("text.png", b"words"), vec!["text.png", "neither PNG, JPEG"]),
        (at("empty.png", b""), vec!["empty.png", "neither PNG, JPEG"]),
        (at("cut.jpg", &[0xff, 0xd8, 0xff, 0xe0]), vec!["cut.jpg", "broken"]),
        (at("bomb.png", &bomb), vec!["bomb.png", "60000x60000", "limit is 89478485 pixels"]),
        (".".to_owned(), vec!["is not a file"]),
        ("https://example.org/a.png".to_owned(), vec!["not fetched", "download the image"]),
        ("file://server/a.png".to_owned(), vec!["machine"]),
        ("data:image/png;base64,@@@".to_owned(), vec!["data: URI", "base64"]),
        ("data:image/png".to_owned(), vec!["data: URI", "comma"]),
        ("data:image/png;base64,aGVsbG8=".to_owned(), vec!["data: URI", "neither PNG, JPEG"]),
    ];
    for (image, mut says) in cases {
        bench.write_data(&[r#"{"text": "fine"}"#, &question(&image)]);
        says.push("data.jsonl:2");
        bench.refused(&bench.quantize(&[]), &says);
        // Plain text has no answer to score.
        bench.write_data(&[&question(&image)]);
        *says.last_mut().unwrap() = "data.jsonl:1";
        bench.refused(&bench.eval(&[]), &says);
    }
    let long = image::RgbImage::new(2010, 10);
    long.save(scratch.join("long.png")).unwrap();
    bench.write_data(&[&question("long.png")]);
    bench.refused(&bench.quantize(&[]), &["2010x10", "200 times", "crop it"]);
}

/// CRC of PNG chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// Paths in a data file lead to files below its folder, or below `--image-root`, and nowhere else.
#[test]
fn images_outside_the_folder() {
    let bench = Bench::new(FLAT);
    let elsewhere = tempfile::tempdir().unwrap();
    fs::copy(golden("model/images").join(IMAGE), elsewhere.path().join(IMAGE)).unwrap();
    let absolute = text(elsewhere.path().join(IMAGE));
    let folder = bench.data().parent().unwrap().to_path_buf();
    let up = format!("../{}/{IMAGE}", elsewhere.path().file_name().unwrap().to_str().unwrap());
    for image in
        [absolute.clone(), format!("file://{absolute}"), up, "model/../../x.png".into(), "/etc/hostname".into()]
    {
        for line in [
            question(&image),
            json!({"image": image, "question": "q", "answers": ["a"]}).to_string(),
            json!({"images": [image], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]})
                .to_string(),
        ] {
            bench.write_data(&[&line]);
            let says = ["data.jsonl:1", image.as_str(), "must lie in the data file's folder", "--image-root DIR"];
            bench.refused(&bench.quantize(&[]), &says);
            bench.refused(&bench.eval(&[]), &says);
        }
    }
    // With the folder named, the same paths are right; what lies beside the data is then outside.
    bench.write_data(&[&question(&absolute), &question(IMAGE), &question(&format!("x/../{IMAGE}"))]);
    succeed(&bench.eval(&["--image-root", &text(elsewhere.path())]));
    fs::remove_file(bench.outputs().join("scores.json")).unwrap();
    bench.write_data(&[&question(&text(folder.join(IMAGE)))]);
    bench.refused(&bench.eval(&["--image-root", &text(elsewhere.path())]), &["data.jsonl:1", "--image-root"]);

    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        // A link out is found when the image is read; one that stays inside is as good as a file.
        symlink(elsewhere.path(), folder.join("linked")).unwrap();
        symlink(&absolute, folder.join("link.png")).unwrap();
        for image in [format!("linked/{IMAGE}"), "link.png".to_owned()] {
            bench.write_data(&[&question(&image)]);
            bench.refused(&bench.eval(&[]), &["data.jsonl:1", &image, "is a link to", "outside"]);
            bench.refused(&bench.quantize(&[]), &["data.jsonl:1", &image, "is a link to", "outside"]);
        }
        symlink(IMAGE, folder.join("inside.png")).unwrap();
        symlink(&folder, elsewhere.path().join("home")).unwrap();
        bench.write_data(&[&question("inside.png")]);
        succeed(&bench.eval(&["--image-root", &text(elsewhere.path().join("home"))]));
    }
}

/// Pipes and devices never end, and a sparse file costs nobody anything but its reader.
#[cfg(unix)]
#[test]
fn data_that_is_no_file_or_too_large() {
    let bench = Bench::new(FLAT);
    let folder = bench.data().parent().unwrap().to_path_buf();
    for (path, says) in [("/dev/zero", "a device"), (folder.to_str().unwrap(), "a folder")] {
        let mut arguments = bench.eval(&[]);
        arguments[2] = path.to_owned();
        bench.refused(&arguments, &["cannot read the data file", "is not a file", says]);
    }
    fs::remove_file(bench.data()).unwrap();
    support::program::pipe(&bench.data());
    bench.refused(&bench.quantize(&[]), &["data.jsonl", "is not a file, but a pipe"]);
    fs::remove_file(bench.data()).unwrap();
    fs::File::create(bench.data()).unwrap().set_len((4 << 30) + 1).unwrap();
    bench.refused(&bench.eval(&[]), &["data.jsonl", "has 4294967297 bytes", "the limit for such a file is 4294967296"]);

    support::program::pipe(&folder.join("pipe.png"));
    fs::File::create(folder.join("sparse.png")).unwrap().set_len((256 << 20) + 1).unwrap();
    for (image, says) in
        [("pipe.png", "is not a file, but a pipe"), ("sparse.png", "the limit for such a file is 268435456")]
    {
        fs::remove_file(bench.data()).unwrap();
        bench.write_data(&[&question(image)]);
        bench.refused(&bench.quantize(&[]), &["data.jsonl:1", image, says]);
    }
}

#[test]
fn texts_without_end() {
    let bench = Bench::new(FLAT);
    bench.write_data(&[&json!({"text": "a ".repeat(9 << 20)}).to_string()]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:1", "18874368 bytes of text; the limit is 8388608"]);
    bench.write_data(&[&json!({"text": "1".repeat(2 << 20)}).to_string()]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:1", "2097152 tokens; the limit is 1048576"]);
    bench.write_data(&[&json!({"question": "q", "answer": "a", "max_new_tokens": 1 << 17}).to_string()]);
    bench.refused(&bench.eval(&[]), &["data.jsonl:1", "max_new_tokens", "up to 65536"]);
}
