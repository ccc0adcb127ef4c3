//! Importance drawn over the pictures and behind the text of some calibration samples.
//!
//! A cell of the heat map is a pixel of a PNG, which the page stretches over the picture without smoothing: cells are exactly
//! tokens, and a page of many stays small.

use super::super::RunReport;
use super::super::samples::{Picture, ReportSample, png};
use super::markup::Text;
use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{Rgb, RgbImage};
use plotters::style::colors::colormaps::{ColorMap, ViridisRGB};

/// Steps of the scale, as many as eyes tell apart in a row.
const STEPS: usize = 32;

/// Share of the values beyond each end of the scale: a few extremes would leave all others alike.
const BEYOND: f64 = 0.02;

/// The colour of a step: viridis, which colour-blind eyes and grey paper read as well.
fn color(step: usize) -> [u8; 3] {
    let color = ViridisRGB.get_color(step as f64 / (STEPS - 1) as f64);
    [color.0, color.1, color.2]
}

/// Classes for text in the colours of the scale.
pub(super) fn heat_style() -> String {
    let rule = |step: usize| {
        let [r, g, b] = color(step);
        // Relative luminance, roughly: black on the bright half.
        let bright = 0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b) > 110.0;
        format!(".h{step}{{background:#{r:02x}{g:02x}{b:02x};color:{}}}\n", if bright { "#000" } else { "#fff" })
    };
    (0..STEPS).map(rule).collect()
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

    fn legend(self) -> String {
        let steps: String = (0..STEPS).map(|step| format!("<i class=\"h{step}\"></i>")).collect();
        let at = |share: f64| {
            let g = (self.low + share * (self.high - self.low)).exp2();
            if g < 10.0 { format!("{g:.2}") } else { format!("{g:.0}") }
        };
        format!(
            "<div class=\"scale\" role=\"img\" aria-label=\"Colour scale of importance, logarithmic, from {low} to {high}\">\
             <div class=\"steps\">{steps}</div><div class=\"ends\"><span>g ≤ {low}</span><span>{middle}</span><span>≥ {high}\
             </span></div></div>\n",
            low = at(0.0),
            middle = at(0.5),
            high = at(1.0)
        )
    }
}

/// Every sample in every block that holds its tokens; `None` where there is nothing to show.
pub(super) fn section(report: &RunReport) -> Result<Option<String>> {
    let blocks: Vec<(usize, &Vec<Vec<f32>>)> = report
        .blocks
        .iter()
        .filter_map(|block| Some((block.block, block.importance.as_ref()?.samples.as_ref()?)))
        .collect();
    if blocks.is_empty() || report.samples.is_empty() {
        return Ok(None);
    }
    let values = blocks.iter().flat_map(|(_, samples)| samples.iter().flatten().copied());
    let scale = Scale::of(values);
    let mut out = format!(
        "<p>The first calibration samples in the order drawn: the pictures as the vision tower saw them (resized by the \
         model's own rules; at most 448 pixels of a side are kept here), under the importance g of the token that stands for each \
         cell, beside the text. One scale for all samples and blocks; the strip at a tiled picture's right is the tokens that \
         end its rows.</p>\n{}\
         <fieldset class=\"show\"><legend>Show</legend>\
         <span><input type=\"radio\" name=\"show\" id=\"show-both\" checked=\"checked\"/><label for=\"show-both\">importance \
         over the picture, in grey</label></span>\
         <span><input type=\"radio\" name=\"show\" id=\"show-heat\"/><label for=\"show-heat\">importance alone, in the \
         scale's own colours</label></span></fieldset>\n",
        scale.legend()
    );
    for (index, sample) in report.samples.iter().enumerate() {
        out += &format!("<article class=\"sample\" style=\"{}\">\n<h3>{}</h3>\n", pictures(sample), Text(&sample.id));
        let (text, pictures) = (sample.text.len(), sample.pictures.len());
        let vision = sample.span.len() - text;
        out += &format!("<p>{text} text and {vision} vision tokens");
        if sample.pictures_left_out > 0 {
            out += &format!("; the first {pictures} of {} pictures", pictures + sample.pictures_left_out);
        }
        out += "</p>\n<div class=\"blocks\">\n";
        out += &plain(sample, index);
        for &(block, samples) in &blocks {
            if let Some(g) = samples.get(index) {
                out += &figure(sample, index, block, g, scale)?;
            }
        }
        out += "</div>\n</article>\n";
    }
    Ok(Some(out))
}

/// The pictures, each once for all blocks, as properties of the sample's element.
fn pictures(sample: &ReportSample) -> String {
    let property = |(i, picture): (usize, &Picture)| format!("--picture-{i}:url({});", Text(&picture.data));
    sample.pictures.iter().enumerate().map(property).collect()
}

/// The pictures alone; nothing for a sample of text.
fn plain(sample: &ReportSample, index: usize) -> String {
    if sample.pictures.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "<figure class=\"block\" data-sample=\"{index}\"><figcaption>as the vision tower saw it</figcaption>\n"
    );
    let mut sizes = String::new();
    for (i, picture) in sample.pictures.iter().enumerate() {
        let Picture { width, height, rows, columns, image, .. } = picture;
        let name = format!("picture {} of sample {}", i + 1, sample.id);
        out += &format!(
            "{open}<div class=\"picture\" role=\"img\" aria-label=\"{name}\" style=\"--picture:var(--picture-{i})\"></div></div>\n",
            open = frame(picture),
            name = Text(&name),
        );
        let end = if picture.row_ends { ", and one at each row's end" } else { "" };
        sizes +=
            &format!("<li>image {}: {width} × {height} pixels, {rows} rows of {columns} tokens{end}</li>\n", image + 1);
    }
    out + "<ul class=\"sizes\">\n" + &sizes + "</ul>\n</figure>\n"
}

/// The beginning of what holds a picture: small ones are enlarged to be seen, large ones share a row.
fn frame(picture: &Picture) -> String {
    let (width, height) = (picture.width.max(1), picture.height.max(1));
    let limit = if width >= height { 320 } else { (320 * width / height).max(40) };
    format!("<div class=\"tokens\" style=\"aspect-ratio:{width}/{height};max-width:{limit}px\">")
}

/// One block's importance of a sample.
fn figure(sample: &ReportSample, index: usize, block: usize, g: &[f32], scale: Scale) -> Result<String> {
    let mut out = format!(
        "<figure class=\"block\" data-sample=\"{index}\" data-block=\"{block}\"><figcaption>block {block}</figcaption>\n"
    );
    for (i, picture) in sample.pictures.iter().enumerate() {
        let name = format!("importance over picture {} of sample {} in block {block}", i + 1, sample.id);
        out += &format!(
            "{open}<div class=\"picture heated\" style=\"--picture:var(--picture-{i})\"><img class=\"heat\" alt=\"{name}\" \
             src=\"{src}\"/></div>",
            open = frame(picture),
            name = Text(&name),
            src = cells(picture, g, scale, 0..picture.columns)?,
        );
        if picture.row_ends {
            let src = cells(picture, g, scale, picture.columns..picture.columns + 1)?;
            out += &format!("<img class=\"ends\" alt=\"importance of the tokens that end rows\" src=\"{src}\"/>");
        }
        out += "</div>\n";
    }
    out += "<p class=\"text\">";
    let mut next = 0;
    for token in &sample.text {
        if token.index > next {
            out += &format!("<b>[{} image tokens]</b>", token.index - next);
        }
        next = token.index + 1;
        let value = g.get(token.index).copied().unwrap_or(f32::NAN);
        // White space shows, and a line break still breaks.
        let text = token.text.replace('\n', "⏎\n").replace('\t', "⇥");
        out += &format!("<span class=\"h{}\" title=\"{value}\">{}</span>", scale.step(value), Text(&text));
    }
    if sample.span.len() > next {
        out += &format!("<b>[{} image tokens]</b>", sample.span.len() - next);
    }
    Ok(out + "</p>\n</figure>\n")
}

/// A pixel for each cell in `columns` of a picture's grid, as a `data:` URI.
fn cells(picture: &Picture, g: &[f32], scale: Scale, columns: std::ops::Range<usize>) -> Result<String> {
    let pixel = |x: u32, y: u32| {
        let token = picture.token(y as usize, columns.start + x as usize);
        Rgb(g.get(token).map_or([128; 3], |&g| color(scale.step(g))))
    };
    let cells = RgbImage::from_fn(columns.len() as u32, picture.rows as u32, pixel);
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(png(&cells)?)))
}
