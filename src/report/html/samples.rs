//! Importance drawn over the pictures and behind the text of some calibration samples.
//!
//! A cell of the heat map is a pixel of a PNG, which the page stretches over the picture without smoothing: cells are exactly
//! tokens, and a page of many stays small.

use super::super::RunReport;
use super::super::samples::{Picture, ReportSample};
use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use plotters::style::colors::colormaps::{ColorMap, ViridisRGB};
use serde::{Serialize, Serializer};
use vlmq_picture::{Rgb, RgbImage, write_png};

/// Steps of the scale, as many as eyes tell apart in a row.
const STEPS: usize = 32;

/// Share of the values beyond each end of the scale: a few extremes would leave all others alike.
const BEYOND: f64 = 0.02;

/// The colour of a step: viridis, which colour-blind eyes and grey paper read as well.
fn color(step: usize) -> [u8; 3] {
    let color = ViridisRGB.get_color(step as f64 / (STEPS - 1) as f64);
    [color.0, color.1, color.2]
}

/// A step of the scale behind text.
#[derive(Serialize)]
pub(super) struct ScaleStep {
    color: String,
    /// The text's own colour.
    ink: &'static str,
}

pub(super) fn scale_steps() -> Vec<ScaleStep> {
    let of = |step: usize| {
        let [r, g, b] = color(step);
        // Relative luminance, roughly: black on the bright half.
        let bright = 0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b) > 110.0;
        ScaleStep { color: format!("#{r:02x}{g:02x}{b:02x}"), ink: if bright { "#000" } else { "#fff" } }
    };
    (0..STEPS).map(of).collect()
}

/// From importance to colour: logarithmic, between two powers of 2^½.
#[derive(Clone, Copy, Debug)]
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// For these values, all of them: one scale for the whole page.
    fn of(values: impl Iterator<Item = f32>) -> Self {
        let mut logs: Vec<f64> = values.map(|g| f64::from(g).log2()).filter(|log| log.is_finite()).collect();
        logs.sort_by(f64::total_cmp);
        let Some(last) = logs.len().checked_sub(1) else { return Self { low: -1.0, high: 1.0 } };
        let quantile = |share: f64| logs[(share * last as f64).round() as usize];
        let low = (2.0 * quantile(BEYOND)).floor() / 2.0;
        Self { low, high: ((2.0 * quantile(1.0 - BEYOND)).ceil() / 2.0).max(low + 1.0) }
    }

    fn step(self, g: f32) -> usize {
        let share = (f64::from(g).log2() - self.low) / (self.high - self.low);
        ((share * STEPS as f64).floor().clamp(0.0, (STEPS - 1) as f64)) as usize
    }

    /// The importance at a share of its length, as it is written there.
    fn at(self, share: f64) -> String {
        let g = (self.low + share * (self.high - self.low)).exp2();
        if g < 10.0 { format!("{g:.2}") } else { format!("{g:.0}") }
    }
}

#[derive(Serialize)]
pub(super) struct SamplesView<'a> {
    /// What is written at the beginning, in the middle and at the end of the scale.
    low: String,
    middle: String,
    high: String,
    steps: usize,
    samples: Vec<SampleView<'a>>,
}

#[derive(Serialize)]
struct SampleView<'a> {
    id: &'a str,
    text_tokens: usize,
    vision_tokens: usize,
    pictures: Vec<PictureView<'a>>,
    /// Pictures without a place here.
    left_out: usize,
    blocks: Vec<BlockView<'a>>,
}

/// A picture, which stands on the page once for all blocks, as a property of the sample's element.
#[derive(Serialize)]
struct PictureView<'a> {
    #[serde(flatten)]
    picture: &'a Picture,
    data: &'a str,
    /// Most pixels from left to right: small pictures are enlarged to be seen, large ones share a row.
    widest: u32,
}

/// One block's importance of a sample.
#[derive(Serialize)]
struct BlockView<'a> {
    block: usize,
    heats: Vec<HeatView>,
    pieces: Vec<PieceView<'a>>,
    /// Image tokens behind the last piece.
    images_behind: usize,
}

/// Importance over a picture, as `data:` URIs.
#[derive(Serialize)]
struct HeatView {
    cells: String,
    /// Cells of the tokens that end rows, where there are any.
    ends: Option<String>,
}

/// A token of text.
#[derive(Serialize)]
struct PieceView<'a> {
    /// Image tokens before it.
    images: usize,
    step: usize,
    value: String,
    #[serde(serialize_with = "visible")]
    text: &'a str,
}

/// White space shows, and a line break still breaks.
fn visible<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text.replace('\n', "⏎\n").replace('\t', "⇥"))
}

/// Every sample in every block that holds its tokens; `None` where there is nothing to show.
pub(super) fn view(report: &RunReport) -> Result<Option<SamplesView<'_>>> {
    let blocks: Vec<(usize, &Vec<Vec<f32>>)> = report
        .blocks
        .iter()
        .filter_map(|block| Some((block.block, block.importance.as_ref()?.samples.as_ref()?)))
        .collect();
    if blocks.is_empty() || report.samples.is_empty() {
        return Ok(None);
    }
    let scale = Scale::of(blocks.iter().flat_map(|(_, samples)| samples.iter().flatten().copied()));
    let of_sample = |(index, sample): (usize, _)| {
        let in_block = |&(block, samples): &(usize, &Vec<Vec<f32>>)| {
            samples.get(index).map(|g| block_view(sample, block, g, scale))
        };
        let blocks = blocks.iter().filter_map(in_block).collect::<Result<_>>()?;
        Ok(sample_view(sample, blocks))
    };
    Ok(Some(SamplesView {
        low: scale.at(0.0),
        middle: scale.at(0.5),
        high: scale.at(1.0),
        steps: STEPS,
        samples: report.samples.iter().enumerate().map(of_sample).collect::<Result<_>>()?,
    }))
}

fn sample_view<'a>(sample: &'a ReportSample, blocks: Vec<BlockView<'a>>) -> SampleView<'a> {
    let picture = |picture: &'a Picture| {
        let (width, height) = (picture.width.max(1), picture.height.max(1));
        let widest = if width >= height { 320 } else { (320 * width / height).max(40) };
        PictureView { picture, data: &picture.data, widest }
    };
    SampleView {
        id: &sample.id,
        text_tokens: sample.text.len(),
        vision_tokens: sample.span.len() - sample.text.len(),
        pictures: sample.pictures.iter().map(picture).collect(),
        left_out: sample.pictures_left_out,
        blocks,
    }
}

fn block_view<'a>(sample: &'a ReportSample, block: usize, g: &[f32], scale: Scale) -> Result<BlockView<'a>> {
    let heat = |picture: &Picture| {
        let of = |columns| cells(picture, g, scale, columns);
        let ends = picture.row_ends.then(|| of(picture.columns..picture.columns + 1)).transpose()?;
        Ok(HeatView { cells: of(0..picture.columns)?, ends })
    };
    let mut next = 0;
    let pieces = sample.text.iter().map(|token| {
        let images = token.index.saturating_sub(next);
        next = token.index + 1;
        let value = g.get(token.index).copied().unwrap_or(f32::NAN);
        PieceView { images, step: scale.step(value), value: value.to_string(), text: &token.text }
    });
    let pieces = pieces.collect();
    let heats = sample.pictures.iter().map(heat).collect::<Result<_>>()?;
    Ok(BlockView { block, heats, pieces, images_behind: sample.span.len().saturating_sub(next) })
}

/// A pixel for each cell in `columns` of a picture's grid, as a `data:` URI.
fn cells(picture: &Picture, g: &[f32], scale: Scale, columns: std::ops::Range<usize>) -> Result<String> {
    let pixel = |x: u32, y: u32| {
        let token = picture.token(y as usize, columns.start + x as usize);
        Rgb(g.get(token).map_or([128; 3], |&g| color(scale.step(g))))
    };
    let cells = RgbImage::from_fn(columns.len() as u32, picture.rows as u32, pixel);
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(write_png(&cells)?)))
}
