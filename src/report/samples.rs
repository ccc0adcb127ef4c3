//! Calibration samples that the report shows: their pictures as the vision tower saw them, and their text token by token.

use crate::data::sequence::{Sequence, SequenceBuilder};
use crate::data::view::View;
use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use vlmq_picture::{RgbImage, imageops, write_jpeg, write_png};

/// Samples with images that are shown, and pictures of one of them.
const WITH_IMAGES: usize = 4;
const PICTURES: usize = 8;

/// Longest side of a picture in the report, in pixels.
const LONGEST_SIDE: u32 = 448;

/// JPEG's usual quality for pictures to be looked at.
const QUALITY: u8 = 85;

/// A calibration sample that the report shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReportSample {
    /// Id of the sample in the data.
    pub id: String,
    /// Tokens of the sample among those of all samples used, in order.
    pub span: Range<usize>,
    /// The tokens that stand for no image.
    pub text: Vec<TextToken>,
    /// What the others show, of several images one behind the other.
    pub pictures: Vec<Picture>,
    /// Pictures beyond the first ones that the report has no room for.
    pub pictures_left_out: usize,
}

/// A token of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextToken {
    /// Number of the token in the sample, from 0.
    pub index: usize,
    /// Text of the token.
    pub text: String,
}

/// A picture under a grid of tokens, as the vision tower saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// Number of the image in the sample, from 0.
    pub image: usize,
    /// Number of the token that stands for the cell at the upper left.
    pub first_token: usize,
    /// Cells from top to bottom; tokens go through them row by row.
    pub rows: usize,
    /// Cells from left to right.
    pub columns: usize,
    /// Whether each row ends with one more token, which stands for no place.
    pub row_ends: bool,
    /// Pixels from left to right, before it was made smaller for the report.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// As a `data:` URI, its longest side at most 448 pixels; not in report.json.
    #[serde(skip)]
    pub data: String,
}

impl Picture {
    /// Number of the token that stands for the cell in `row` and `column`; `column == columns` is the row's end.
    pub fn token(&self, row: usize, column: usize) -> usize {
        self.first_token + row * (self.columns + usize::from(self.row_ends)) + column
    }
}

/// The samples to show: the first few with images, in the order drawn, then the first without.
pub fn choose(builder: &SequenceBuilder, sequences: &[Sequence]) -> Result<Vec<ReportSample>> {
    let mut first = 0;
    let (mut with_images, mut without) = (0, 0);
    let mut chosen = Vec::new();
    for sequence in sequences {
        let span = first..first + sequence.tokens.len();
        first = span.end;
        let (count, most) =
            if sequence.images.is_empty() { (&mut without, 1) } else { (&mut with_images, WITH_IMAGES) };
        if *count < most {
            *count += 1;
            let sample = describe(builder, sequence, span);
            chosen.push(sample.with_context(|| format!("sample {}", sequence.id))?);
        }
    }
    chosen.sort_by_key(|sample: &ReportSample| sample.pictures.is_empty());
    Ok(chosen)
}

fn describe(builder: &SequenceBuilder, sequence: &Sequence, span: Range<usize>) -> Result<ReportSample> {
    let text = sequence.tokens.iter().enumerate().filter(|&(_, &token)| !builder.is_vision(token));
    let text = text.map(|(index, &token)| Ok(TextToken { index, text: builder.piece(token)? }));
    let mut sample =
        ReportSample { id: sequence.id.clone(), span, text: text.collect::<Result<_>>()?, ..ReportSample::default() };
    let vision: Vec<usize> = (0..sequence.tokens.len()).filter(|&i| builder.is_vision(sequence.tokens[i])).collect();
    let mut image_start = 0;
    for (index, image) in sequence.images.iter().enumerate() {
        let (tokens, views) = builder.views(image);
        let mut start = image_start;
        for view in views {
            let first_token = vision.get(start).copied();
            start += view.tokens();
            // Of a very long or narrow image no cell of the tiles may be left.
            let Some(first_token) = first_token.filter(|_| view.rows * view.columns > 0) else { continue };
            if sample.pictures.len() == PICTURES {
                sample.pictures_left_out += 1;
                continue;
            }
            sample.pictures.push(picture(view, index, first_token)?);
        }
        image_start += tokens;
    }
    Ok(sample)
}

fn picture(view: View, image: usize, first_token: usize) -> Result<Picture> {
    let View { picture, rows, columns, row_ends } = view;
    let (width, height) = picture.dimensions();
    let long = width.max(height);
    let small = if long > LONGEST_SIDE {
        let side = |n: u32| (u64::from(n) * u64::from(LONGEST_SIDE)).div_ceil(u64::from(long)) as u32;
        imageops::thumbnail(&picture, side(width), side(height))
    } else {
        picture
    };
    Ok(Picture { image, first_token, rows, columns, row_ends, width, height, data: data_uri(&small)? })
}

/// PNG or JPEG, whichever is shorter.
fn data_uri(picture: &RgbImage) -> Result<String> {
    let (jpeg, png) = (write_jpeg(picture, QUALITY)?, write_png(picture)?);
    let (kind, bytes) = if png.len() <= jpeg.len() { ("png", png) } else { ("jpeg", jpeg) };
    Ok(format!("data:image/{kind};base64,{}", STANDARD.encode(bytes)))
}
