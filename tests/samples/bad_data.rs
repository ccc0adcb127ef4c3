//! Data files and images that are wrong, or name what is none of theirs: one line says so, and nothing is left behind.

use crate::support::golden;
use crate::support::picture::save_png;
use crate::support::program::{Bench, IMAGE, limited_run, question, stderr, succeed, text};
use image::codecs::webp::WebPEncoder;
use serde_json::json;
use std::fs;

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
    save_png(&long, scratch.join("long.png"));
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
    crate::support::program::pipe(&bench.data());
    bench.refused(&bench.quantize(&[]), &["data.jsonl", "is not a file, but a pipe"]);
    fs::remove_file(bench.data()).unwrap();
    fs::File::create(bench.data()).unwrap().set_len((4 << 30) + 1).unwrap();
    bench.refused(&bench.eval(&[]), &["data.jsonl", "has 4294967297 bytes", "the limit for such a file is 4294967296"]);

    crate::support::program::pipe(&folder.join("pipe.png"));
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
    bench.refused(&bench.quantize(&[]), &["data.jsonl:1", "more than 1048576 tokens, the limit"]);
    bench.write_data(&[&json!({"question": "q", "answer": "a", "max_new_tokens": 1 << 17}).to_string()]);
    bench.refused(&bench.eval(&[]), &["data.jsonl:1", "max_new_tokens", "up to 65536"]);
}

/// Whatever a row holds, no more is kept of it than is used, and what is used has bounds.
#[cfg(unix)]
#[test]
fn data_of_any_shape_takes_little_memory() {
    let bench = Bench::new(FLAT);
    let run = |content: String| {
        fs::write(bench.data(), content).unwrap();
        limited_run(1280, 120, &bench.quantize(&["--dry-run", "--threads", "2"]))
    };
    let many = |one: &str| one.repeat((48 << 20) / one.len());
    for (content, says) in [
        (format!("[{}0]", many("0,")), ["data.jsonl, entry 1: expected", "found a number"]),
        (format!("[{}", many("[],")), ["data.jsonl, entry 1: expected", "found a list"]),
        (format!("[[{}0]]", many("0,")), ["data.jsonl, entry 1: it holds more", "262144 values"]),
        (format!("[{{\"messages\":[{}0]}}]", many("[],")), ["data.jsonl, entry 1: it holds more", "262144 values"]),
        (
            format!("{{\"text\":\"a\"}}\n{{\"messages\":[{}0]}}", many("{},")),
            ["data.jsonl:2: it holds", "262144 values"],
        ),
    ] {
        bench.check_refusal(&run(content), &says.concat(), &says);
    }
    for content in [
        format!("{{\"text\":\"a\",\"x\":[{}0]}}", many("[],")),
        format!("[{{\"text\":\"a\",\"x\":{{{}\"b\":0}}}}]", many("\"\":{},")),
        format!("[{{\"text\":\"a\",\"x\":[{}\"a.png\",0]}}]", many("\"a.png\",")),
    ] {
        let output = run(content);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}

/// A PNG file of 8x8 pixels with `count` times the same chunk in front of its own.
fn png_with(kind: &[u8; 4], data: &[u8], count: usize) -> Vec<u8> {
    let mut png = vlmq_picture::write_png(&image::RgbImage::from_pixel(8, 8, image::Rgb([100; 3]))).unwrap();
    // Signature and header.
    let rest = png.split_off(33);
    let body = [&kind[..], data].concat();
    let chunk = [&(data.len() as u32).to_be_bytes()[..], &body, &crc32(&body).to_be_bytes()].concat();
    png.extend(chunk.repeat(count));
    [png, rest].concat()
}

/// So many MiB of zeros, compressed as PNG files have it (RFC 1950): one of them over and over.
fn packed_zeros(mebibytes: u32) -> Vec<u8> {
    let mut packer = flate2::Compress::new(flate2::Compression::best(), false);
    let mut one = Vec::with_capacity(1 << 16);
    packer.compress_vec(&[0; 1 << 20], &mut one, flate2::FlushCompress::Full).unwrap();
    assert_eq!(packer.total_in(), 1 << 20);
    // An empty last block, and the checksum of zeros.
    let sum = (((mebibytes << 20) % 65521) << 16 | 1).to_be_bytes();
    [&[0x78, 0xda][..], &one.repeat(mebibytes as usize), &[1, 0, 0, 0xff, 0xff], &sum].concat()
}

/// What stands in a picture's file beside the picture is neither unpacked nor kept.
#[cfg(unix)]
#[test]
fn images_with_much_beside_the_pixels() {
    let bench = Bench::new(FLAT);
    let named = |name: &[u8], data: &[u8]| [name, &[0, 0], data].concat();
    let profile = png_with(b"iCCP", &named(b"p", &packed_zeros(1024)), 1);
    // Each is unpacked where it may say how to turn the picture.
    let text = named(b"Raw profile type exif", &packed_zeros(1));
    let texts = png_with(b"zTXt", &text, 50_000);
    // Parts of XMP, of which the last is missing: looked through anew behind every single one.
    let jpeg = vlmq_picture::write_jpeg(&image::RgbImage::new(8, 8), 75).unwrap();
    let xmp = (0..100_000u32).flat_map(|part| {
        let head: &[u8] = &[0xff, 0xe1, 0, 2 + 35 + 32 + 8 + 1];
        let name = b"http://ns.adobe.com/xmp/extension/\0";
        [head, name, &[b'7'; 32], &(1u32 << 30).to_be_bytes(), &part.to_be_bytes(), b"x"].concat()
    });
    let xmp = [&jpeg[..2], &xmp.collect::<Vec<u8>>(), &jpeg[2..]].concat();
    // EXIF data of 4 GB, as its chunk says.
    let mut webp = Vec::new();
    image::RgbImage::new(8, 8).write_with_encoder(WebPEncoder::new_lossless(&mut webp)).unwrap();
    let extended = [b"VP8X\x0a\0\0\0\x08\0\0\0\x07\0\0\x07\0\0", &webp[12..], b"EXIF\xf0\xff\xff\xffII*\0"].concat();
    let size = (extended.len() as u32 + 4).to_le_bytes();
    let webp = [b"RIFF", &size[..], b"WEBP", &extended].concat();
    for (name, bytes) in [("i.png", profile), ("t.png", texts), ("x.jpg", xmp), ("e.webp", webp)] {
        fs::write(bench.data().with_file_name(name), bytes).unwrap();
        bench.write_data(&[&question(name)]);
        let output = limited_run(1024, 20, &bench.quantize(&["--dry-run", "--threads", "2"]));
        assert_eq!(output.status.code(), Some(0), "{name}: {}", stderr(&output));
    }
}
