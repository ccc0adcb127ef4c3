//! Bar charts as inline SVG.
//!
//! plotters writes colours as attributes of the elements, before which a style sheet goes: the few colours used here are names
//! that the page's style sheet gives their look in light, in dark and in print.

use super::super::templates::markup;
use anyhow::{Result, anyhow};
use minijinja::Value;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Serialize;

/// Colours that stand for their roles in style.css.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
const SERIES: [RGBColor; 2] = [RGBColor(3, 3, 3), RGBColor(4, 4, 4)];
const BAD: RGBColor = RGBColor(5, 5, 5);

/// Twice the pixels of a chart on the page: plotters rounds places to whole units, and 80 bars want halves.
const WIDTH: u32 = 640;
const FONT: i32 = 30;

/// How long bars are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Axis {
    /// From 0 to the largest value.
    Linear(f64),
    /// From a power of ten to another, by their exponents.
    Log(i32, i32),
}

impl Axis {
    /// One for all `values`: logarithmic where they span more than a decade, and all are positive.
    pub(super) fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let largest = finite.clone().fold(0.0, f64::max);
        let smallest = finite.filter(|&value| value > 0.0).fold(f64::INFINITY, f64::min);
        if largest > 10.0 * smallest {
            return Self::Log(smallest.log10().floor() as i32, largest.log10().ceil() as i32);
        }
        Self::Linear(if largest > 0.0 { largest * 1.05 } else { 1.0 })
    }

    /// Where bars begin and where the axis ends.
    fn ends(self) -> (f64, f64) {
        match self {
            Self::Linear(largest) => (0.0, largest),
            Self::Log(low, high) => (f64::from(low), f64::from(high)),
        }
    }

    /// Where a value is on the axis: inside its ends.
    fn place(self, value: f64) -> f64 {
        let (low, high) = self.ends();
        match self {
            Self::Linear(_) => value.clamp(low, high),
            Self::Log(..) => value.max(0.0).log10().clamp(low, high),
        }
    }

    /// What is written at a place.
    fn label(self, place: f64) -> String {
        match self {
            Self::Linear(_) => short(place),
            Self::Log(..) if (place - place.round()).abs() < 1e-6 => format!("1e{place:.0}"),
            Self::Log(..) => String::new(),
        }
    }

    /// What a chart's description says of the axis.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Linear(_) => "linear scale from 0",
            Self::Log(..) => "logarithmic scale",
        }
    }
}

/// A number in few characters.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if !(0.001..100_000.0).contains(&size) => format!("{value:.1e}"),
        _ => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

/// Bars in a row, of one or two series side by side.
pub(super) struct Bars<'a> {
    /// Unique on the page.
    pub(super) id: String,
    /// What the chart shows.
    pub(super) title: String,
    /// The chart with its figures, for who does not see it.
    pub(super) description: String,
    /// Values; NaN and infinity are drawn as full bars in the colour of errors, and what is above 0 has some height.
    pub(super) series: &'a [Vec<f64>],
    /// How long the bars are.
    pub(super) axis: Axis,
    /// What is written below, at bars by number, or between them.
    pub(super) labels: Vec<(f64, String)>,
    /// Height in units.
    pub(super) height: u32,
}

/// A chart as templates show it, with its title.
#[derive(Serialize)]
pub(super) struct Chart {
    id: String,
    title: String,
    description: String,
    view_box: String,
    /// What stands inside the root element, whose beginning the template writes: with a size that follows the page, a name, and
    /// without the name space that only files of their own need.
    drawn: Value,
}

impl Bars<'_> {
    pub(super) fn chart(self) -> Result<Chart> {
        let drawn = self.draw().map_err(|error| anyhow!("cannot draw {}: {error}", self.title))?;
        let content = drawn.find("<svg").and_then(|start| Some(&drawn[start + drawn[start..].find('>')? + 1..]));
        let content = content.ok_or_else(|| anyhow!("no SVG came of {}", self.title))?;
        let Self { id, title, description, height, .. } = self;
        Ok(Chart { id, title, description, view_box: format!("0 0 {WIDTH} {height}"), drawn: markup(content) })
    }

    fn draw(&self) -> Result<String, Box<dyn std::error::Error>> {
        let mut out = String::new();
        {
            let root = SVGBackend::with_string(&mut out, (WIDTH, self.height)).into_drawing_area();
            let bars = self.series.iter().map(Vec::len).max().unwrap_or(0);
            let (low, high) = self.axis.ends();
            let mut chart = ChartBuilder::on(&root)
                .margin_top(FONT / 2)
                .margin_right(8)
                .x_label_area_size(FONT + 10)
                .y_label_area_size(FONT * 3)
                .build_cartesian_2d(-0.5..bars as f64 - 0.5, low..high)?;
            let font = || ("sans-serif", FONT).into_font().color(&INK);
            chart
                .configure_mesh()
                .disable_x_mesh()
                .disable_x_axis()
                .y_labels(4)
                .y_label_style(font())
                .y_label_formatter(&|&place| self.axis.label(place))
                .bold_line_style(GRID)
                .light_line_style(TRANSPARENT)
                .axis_style(GRID)
                .draw()?;
            // 3 units are a pixel and a half: what is as good as nothing still shows.
            let least = (high - low) * 3.0 / f64::from(self.height);
            let width = 0.84 / self.series.len() as f64;
            for (number, (values, &color)) in self.series.iter().zip(&SERIES).enumerate() {
                chart.draw_series(values.iter().enumerate().map(|(i, &value)| {
                    let (top, color) = match value.is_finite() {
                        true if value > 0.0 => (self.axis.place(value).max(low + least), color),
                        true => (low, color),
                        false => (high, BAD),
                    };
                    let left = i as f64 - 0.42 + number as f64 * width;
                    Rectangle::new([(left, low), (left + width, top)], color.filled())
                }))?;
            }
            let below = font().pos(Pos::new(HPos::Center, VPos::Top));
            for (place, label) in &self.labels {
                let (x, y) = chart.backend_coord(&(*place, low));
                root.draw(&plotters::element::Text::new(label.as_str(), (x, y + 6), below.clone()))?;
            }
            root.present()?;
        }
        Ok(out)
    }
}

/// Numbers of blocks to write below `count` bars: a handful, the first among them.
pub(super) fn block_labels(count: usize) -> Vec<(f64, String)> {
    let step = [1, 2, 5, 10, 20, 50, 100].into_iter().find(|step| count <= 9 * step).unwrap_or(count);
    (0..count).step_by(step).map(|i| (i as f64, i.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_follow_their_values() {
        assert_eq!(Axis::of([2.0, 4.0].into_iter()), Axis::Linear(4.2));
        assert_eq!(Axis::of([0.002, f64::NAN, 0.0, 4.0].into_iter()), Axis::Log(-3, 1));
        assert_eq!(Axis::of([0.0, f64::INFINITY].into_iter()), Axis::Linear(1.0));
        assert_eq!(Axis::of(std::iter::empty()), Axis::Linear(1.0));
        assert_eq!(Axis::Log(-3, 1).place(0.0), -3.0);
        assert_eq!((Axis::Log(-3, 1).label(-2.0), Axis::Log(-3, 1).label(-1.5)), ("1e-2".into(), String::new()));
        assert_eq!([0.0, 0.25, 1e-5, 12_345.0].map(short), ["0", "0.25", "1.0e-5", "12345"]);
    }

    #[test]
    fn every_value_is_a_bar() {
        let series = [vec![0.5, f64::NAN, 0.0, 1.0], vec![1e-9, 1.0, 1.0, 1.0]];
        let chart = Bars {
            id: "c".into(),
            title: "<errors>".into(),
            description: "four & four".into(),
            series: &series,
            axis: Axis::Linear(1.0),
            labels: block_labels(4),
            height: 280,
        };
        let figure = format!("<svg>{}", chart.chart().unwrap().drawn);
        let tree = roxmltree::Document::parse(&figure).unwrap();
        let bars: Vec<_> = tree.descendants().filter(|node| node.has_tag_name("rect")).collect();
        let count = |fill| bars.iter().filter(|bar| bar.attribute("fill") == Some(fill)).count();
        assert_eq!([count("#030303"), count("#040404"), count("#050505")], [3, 4, 1]);
        let height = |i: usize| bars[i].attribute("height").unwrap().parse::<f64>().unwrap();
        assert!((height(0) / height(1) - 0.5).abs() < 0.02, "{} {}", height(0), height(1));
        assert!((height(2), height(3)) == (0.0, height(1)) && height(4) > 0.0, "{figure}");
        assert!(!figure.contains("http"), "{figure}");
    }

    #[test]
    fn a_handful_of_blocks_is_named() {
        let names = |count| block_labels(count).into_iter().map(|(_, label)| label).collect::<Vec<_>>().join(" ");
        assert_eq!(names(6), "0 1 2 3 4 5");
        assert_eq!(names(28), "0 5 10 15 20 25");
        assert_eq!(names(80), "0 10 20 30 40 50 60 70");
    }
}
