//! Values of flags, and how they are read.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use std::str::FromStr;
use vlmq::device::WIDTHS;
use vlmq::evaluate::presets::{PRESETS, Preset};

/// A device by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(index))) => Ok(Self::Cuda(index)),
            _ => Err("must be auto, cpu, cuda or cuda:N with a whole number N".into()),
        }
    }
}

/// `none` or a number of columns; clap gives `Option` another meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupSize(pub(crate) Option<usize>);

impl FromStr for GroupSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse().map(|size| Self(Some(size))).map_err(|_| "must be a positive multiple of 8, or `none`".into())
    }
}

/// A parser of the library's enumerations by the names under which they are serialised, so that flags and `report.json`
/// use the same words.
pub(crate) fn named<T>(names: &'static [(&'static str, &'static str)]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    let values = names.iter().map(|(name, help)| PossibleValue::new(*name).help(*help));
    PossibleValuesParser::new(values).try_map(|name| serde_json::from_value(name.into()))
}

/// A width of codes.
pub(crate) fn widths() -> impl TypedValueParser<Value = u32> {
    // Names that live as long as the program are what clap takes.
    PossibleValuesParser::new(WIDTHS.map(|bits| &*bits.to_string().leak())).try_map(|text| text.parse())
}

pub(crate) fn log_level() -> impl TypedValueParser<Value = log::LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"]).try_map(|name| name.parse())
}

pub(crate) fn presets() -> impl TypedValueParser<Value = &'static Preset> {
    let names = PRESETS.iter().map(|preset| PossibleValue::new(preset.name).aliases(preset.tasks));
    PossibleValuesParser::new(names).try_map(|name| Preset::named(&name))
}

pub(crate) fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "must be a whole number of at least 1".into())
}

/// More than any machine has, fewer than a system refuses to start.
pub(crate) const MAX_THREADS: usize = 1024;

pub(crate) fn threads(text: &str) -> Result<usize, String> {
    let number = positive(text).ok().filter(|&number| number <= MAX_THREADS);
    number.ok_or_else(|| format!("must be from 1 to {MAX_THREADS}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cuda:x", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }
}
