//! LLaVA-OneVision's images against transformers (tests/golden/make_anyres.py), and what is refused of them.

use crate::support::{golden, message};
use image::RgbImage;
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;
use vlmq::data::anyres::{Anyres, ImageMode, TileLayout};
use vlmq::data::dataset::ImageSource;
use vlmq::data::image::decode;
use vlmq::data::sequence::VisionInput;

fn cases() -> Value {
    serde_json::from_slice(&fs::read(golden("anyres.json")).unwrap()).unwrap()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn pair(value: &Value) -> (usize, usize) {
    (number(&value[0]), number(&value[1]))
}

fn layout(cases: &Value, name: &Value) -> TileLayout {
    let layout = &cases["layouts"][name.as_str().unwrap()];
    TileLayout {
        side: number(&layout["side"]),
        patch: number(&layout["patch"]),
        resolutions: layout["resolutions"].as_array().unwrap().iter().map(pair).collect(),
        most_tiles: number(&layout["most"]),
    }
}

/// A folder with the image processor of a layout.
fn processor(layout: &TileLayout) -> Value {
    json!({
        "image_grid_pinpoints": layout.resolutions, "size": {"height": layout.side, "width": layout.side},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })
}

fn written(processor: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("preprocessor_config.json"), processor.to_string()).unwrap();
    folder
}

fn input(layout: &TileLayout, mode: Option<ImageMode>) -> Anyres {
    let folder = written(&processor(layout));
    Anyres::read(folder.path(), layout.clone(), mode, (613, None)).unwrap()
}

#[test]
fn resolutions_and_token_counts_equal_transformers() {
    let cases = cases();
    let sizes = cases["sizes"].as_array().unwrap();
    assert!(sizes.len() > 600);
    let mut reduced = 0;
    for case in sizes {
        let layout = layout(&cases, &case["layout"]);
        let (height, width) = pair(&case["in"]);
        let best = layout.best_resolution(height, width);
        assert_eq!(best, pair(&case["best"]), "{case}");
        let kept = layout.kept((height, width), (best.0 / layout.side, best.1 / layout.side));
        let kept = kept.unwrap();
        reduced += usize::from(kept.reduced.is_some());
        assert_eq!(layout.grid().pow(2) + kept.tokens(), number(&case["tokens"]), "{case}");
    }
    assert!(reduced > 100, "{reduced}");
    assert_eq!(layout(&cases, &json!("real")).resolutions, TileLayout::default_resolutions());
}

/// Crops to the bit: the sums weigh every byte by its place. Normalised values within 1e-6.
#[test]
fn crops_equal_transformers() {
    let cases = cases();
    let images = cases["images"].as_array().unwrap();
    assert!(images.len() >= 27);
    for case in images {
        let layout = layout(&cases, &case["layout"]);
        let path = golden(case["file"].as_str().unwrap());
        let image = decode(&ImageSource::File(path), "test").unwrap();
        let input = input(&layout, None);
        for (of, key) in [(1, "tiled"), (2, "square")] {
            let prepared = input.prepare(&image, of).unwrap();
            let sums: Vec<u64> = prepared.crops().iter().map(weighted_sum).collect();
            let expected: Vec<u64> = case[key].as_array().unwrap().iter().map(|sum| sum.as_u64().unwrap()).collect();
            assert_eq!(sums, expected, "{} {key} {}", case["layout"], case["file"]);
            let grid = layout.grid();
            let rows = expected.len() * grid * grid;
            assert_eq!((prepared.patches().rows(), prepared.patches().cols()), (rows, 3 * layout.patch.pow(2)));
            let tokens = input.image_tokens(&prepared);
            assert!(if of == 1 { tokens > grid * grid + 1 } else { tokens == grid * grid + 1 });
        }
        // Of the one crop of the second: channels, rows, columns; a patch holds the same in that order.
        let patches = input.prepare(&image, 2).unwrap().patches();
        let mut inside = 0;
        for pick in case["picks"].as_array().unwrap() {
            let (at, value) = (number(&pick[0]), pick[1].as_f64().unwrap());
            let (side, patch, grid) = (layout.side, layout.patch, layout.grid());
            let (channel, y, x) = (at / (side * side), at / side % side, at % side);
            // What does not fill a patch is left out.
            if y < grid * patch && x < grid * patch {
                let row = patches.row(y / patch * grid + x / patch);
                let ours = f64::from(row[channel * patch * patch + y % patch * patch + x % patch]);
                assert!((ours - value).abs() <= 1e-6, "{case} at {at}: {ours}");
                inside += 1;
            }
        }
        assert!(inside >= 8, "{inside}");
    }
}

fn weighted_sum(crop: &RgbImage) -> u64 {
    crop.as_raw().iter().enumerate().map(|(i, &byte)| (i % 65521 + 1) as u64 * u64::from(byte)).sum()
}

#[test]
fn modes_override_what_the_number_of_images_says() {
    let cases = cases();
    let layout = layout(&cases, &json!("small"));
    let image = RgbImage::from_fn(90, 40, |x, y| image::Rgb([x as u8, y as u8, (x + y) as u8]));
    let crops = |mode, of| input(&layout, mode).prepare(&image, of).unwrap().crops().to_vec();
    let (tiled, square) = (crops(None, 1), crops(None, 2));
    assert_eq!((tiled.len(), square.len()), (3, 1));
    assert_ne!(tiled[0], square[0], "the one is squeezed, the other padded");
    for of in [1, 2, 3] {
        assert_eq!(crops(Some(ImageMode::Anyres), of), tiled);
        assert_eq!(crops(Some(ImageMode::Single), of), square);
    }
}

#[test]
fn images_that_cannot_be_shown_are_refused() {
    let cases = cases();
    let real = layout(&cases, &json!("real"));
    let refused = |mode, width, height| message(input(&real, mode).prepare(&RgbImage::new(width, height), 1));
    assert!(refused(None, 402, 2).contains("402x2: one side is more than 200 times the other"));
    // 89 million pixels are an image; 134 million, which the square around it has, are not.
    let error = refused(Some(ImageMode::Single), 11_600, 7_000);
    assert!(error.contains("11600x7000: padded to a square") && error.contains("scale it down"), "{error}");
    // Room for one tile's features and a list with nothing but a very long resolution.
    let small = layout(&cases, &json!("small"));
    let long = TileLayout { resolutions: vec![(48, 4800)], most_tiles: 1, ..small };
    let error = message(input(&long, None).prepare(&RgbImage::new(190, 1), 1));
    assert!(error.contains("190x1: so long and narrow"), "{error}");
}

#[test]
fn processor_files() {
    let layout = layout(&cases(), &json!("small"));
    let read = |processor: &Value| {
        let folder = written(processor);
        message(Anyres::read(folder.path(), layout.clone(), None, (613, None)))
    };
    let with = |key: &str, value: Value| {
        let mut processor = processor(&layout);
        processor[key] = value;
        processor
    };
    for (key, value) in [
        ("size", json!({"shortest_edge": 48})),
        ("crop_size", json!({"height": 48, "width": 48})),
        ("crop_size", Value::Null),
        ("do_center_crop", json!(true)),
        ("do_pad", json!(false)),
    ] {
        assert_eq!(read(&with(key, value)), "no error", "{key}");
    }
    for (key, value, says) in [
        ("size", json!({"height": 48, "width": 56}), "`size` is {\"height\":48,\"width\":56}"),
        ("size", json!({"height": 384, "width": 384}), "vision_config.image_size of config.json is 48"),
        ("size", Value::Null, "`size` is missing"),
        ("crop_size", json!({"height": 40, "width": 40}), "`crop_size`"),
        ("do_center_crop", json!(3), "`do_center_crop` is 3"),
        ("do_resize", json!(false), "`do_resize` is false"),
        ("resample", json!(2), "`resample` is 2"),
        ("image_grid_pinpoints", json!([[48, 48]]), "not that of config.json"),
        ("image_grid_pinpoints", json!([[48, 50]]), "[48,50]"),
        ("image_grid_pinpoints", json!([[48]]), "[48]"),
        ("image_grid_pinpoints", json!([]), "not a list of 1 to 4096"),
        ("image_grid_pinpoints", json!([[48_000, 48_000]]), "at most 89478485 pixels"),
        ("image_grid_pinpoints", Value::Null, "not that of config.json"),
    ] {
        let error = read(&with(key, value.clone()));
        assert!(error.contains(says) && error.contains("preprocessor_config.json"), "{key} {value}: {error}");
    }
    for (key, value) in [
        ("num_image_tokens", json!(729)),
        ("vision_feature_select_strategy", json!("default")),
        ("vision_aspect_ratio", json!("anyres_max_4")),
    ] {
        let folder = written(&processor(&layout));
        fs::write(folder.path().join("processor_config.json"), json!({ key: value }).to_string()).unwrap();
        let error = message(Anyres::read(folder.path(), layout.clone(), None, (613, None)));
        assert!(error.contains(key) && error.contains("processor_config.json"), "{error}");
    }
}
