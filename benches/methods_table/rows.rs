//! What a row of the table is: a method by its name, or the defaults with some settings changed.

use anyhow::{Context, Error, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::str::FromStr;
use vlmq::quantize::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use vlmq::run::RunSettings;

/// One row's way to quantize.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// At whatever width and group size.
    pub(crate) solver: SolverSettings,
    pub(crate) importance: Importance,
    pub(crate) importance_power: ImportancePower,
    /// `None`: as is usual at the width.
    pub(crate) refit: Option<Refit>,
}

/// What is drawn of the calibration data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    pub(crate) samples: usize,
    pub(crate) seed: u64,
}

impl Row {
    /// A run its way, with a draw out of `calib`.
    pub(crate) fn run(&self, model: PathBuf, calib: PathBuf, out: PathBuf, draw: Draw) -> RunSettings {
        RunSettings {
            solver: self.solver.clone(),
            importance: self.importance,
            importance_power: self.importance_power,
            refit: self.refit,
            samples: draw.samples,
            seed: draw.seed,
            // A run is too short to be gone on with.
            save_every: u64::MAX,
            ..RunSettings::new(model, Some(calib), out)
        }
    }
}

/// Methods by their names on the command line and in the table.
const METHODS: [(&str, &str, Solver, Importance); 5] = [
    ("rtn", "round to nearest", Solver::Rtn, Importance::None),
    ("gptq", "GPTQ", Solver::Gptq, Importance::None),
    ("gptaq", "GPTAQ", Solver::Gptaq, Importance::None),
    ("vlmq-gptq", "VLMQ on GPTQ", Solver::Gptq, Importance::Vlmq),
    ("vlmq-gptaq", "VLMQ on GPTAQ", Solver::Gptaq, Importance::Vlmq),
];

/// Of the defaults.
const DEFAULT: &str = "vlmq-gptaq";

/// Settings that flags of their own give, or that the run itself chooses.
const OTHERWISE: [&str; 4] = ["bits", "group_size", "scale_type", "smallest_zero"];

/// The key of [`Row::importance_power`].
const IMPORTANCE_POWER: &str = "importance_power";

/// The key of [`Row::refit`].
const REFIT: &str = "refit";

/// The rows in the table's order: methods, then variations of the default. `all`: changes of every row. No methods and no
/// variations: all methods; variations alone are shown below the default.
pub(crate) fn rows(methods: &[String], variations: &[String], all: &[String]) -> Result<Vec<Row>> {
    let every: Vec<String> = METHODS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    let methods = match (methods, variations) {
        ([], []) => &every,
        ([], _) => &every[every.len() - 1..],
        _ => methods,
    };
    let mut rows = methods.iter().map(|name| method(name)).collect::<Result<Vec<_>>>()?;
    for changes in variations {
        rows.push(Row { name: changes.clone(), ..changed(&default()?, changes)? });
    }
    for row in &mut rows {
        for changes in all {
            *row = changed(row, changes)?;
        }
    }
    for (i, row) in rows.iter().enumerate() {
        ensure!(rows[..i].iter().all(|other| other.name != row.name), "the row `{}` is asked for twice", row.name);
    }
    Ok(rows)
}

/// The default method.
pub(crate) fn default() -> Result<Row> {
    method(DEFAULT)
}

fn method(name: &str) -> Result<Row> {
    let Some((_, title, solver, importance)) = METHODS.iter().find(|(known, ..)| *known == name) else {
        let known: Vec<&str> = METHODS.iter().map(|(name, ..)| *name).collect();
        bail!("no method `{name}`; there are {}", known.join(", "));
    };
    let solver = SolverSettings { solver: *solver, ..SolverSettings::default() };
    let importance_power = ImportancePower::default();
    Ok(Row { name: (*title).to_owned(), solver, importance: *importance, importance_power, refit: None })
}

/// `row` with `changes` such as `grid=mse alpha=0.5`: settings as report.json names them, a `-` for a `_` allowed.
fn changed(row: &Row, changes: &str) -> Result<Row> {
    let wrong = || format!("`{changes}`");
    let mut settings = settings(row);
    // As it is asked for: what is usual is known once the width is.
    settings.insert(REFIT.into(), json!(row.refit));
    ensure!(!changes.trim().is_empty(), "a variation without a change, such as grid=mse");
    for change in changes.split_whitespace() {
        let (key, value) = change.split_once('=').with_context(|| format!("`{change}` is not KEY=VALUE"))?;
        let key = key.replace('-', "_");
        ensure!(!OTHERWISE.contains(&key.as_str()), "`{change}`: {key} is no setting of a row");
        let Some(old) = settings.get_mut(&key) else {
            let keys = settings.keys().filter(|key| !OTHERWISE.contains(&key.as_str()));
            bail!("`{change}`: no setting `{key}`; there are {}", keys.cloned().collect::<Vec<_>>().join(", "));
        };
        *old = match old {
            _ if key == IMPORTANCE_POWER => {
                json!(ImportancePower::from_str(value).map_err(Error::msg).with_context(|| format!("`{change}`"))?)
            }
            Value::String(_) | Value::Null => value.into(),
            _ => serde_json::from_str(value)
                .with_context(|| format!("`{change}`: neither a number nor true or false"))?,
        };
    }
    let importance = serde_json::from_value(settings["importance"].take()).with_context(wrong)?;
    settings.remove("importance");
    let refit = serde_json::from_value(settings[REFIT].take()).with_context(wrong)?;
    settings.remove(REFIT);
    let power = settings.remove(IMPORTANCE_POWER).map(|power| power.to_string()).unwrap_or_default();
    let importance_power =
        ImportancePower::from_str(power.trim_matches('"')).map_err(Error::msg).with_context(wrong)?;
    let solver: SolverSettings = serde_json::from_value(Value::Object(settings)).with_context(wrong)?;
    solver.validate().with_context(wrong)?;
    Ok(Row { name: row.name.clone(), solver, importance, importance_power, refit })
}

/// All that decides what a row computes.
pub(crate) fn settings(row: &Row) -> Map<String, Value> {
    let mut settings = match json!(row.solver) {
        Value::Object(settings) => settings,
        other => unreachable!("settings are an object, not {other}"),
    };
    settings.insert("importance".into(), json!(row.importance));
    settings.insert(IMPORTANCE_POWER.into(), json!(row.importance_power));
    settings.insert(REFIT.into(), json!(row.refit.unwrap_or_else(|| Refit::usual(&row.solver))));
    settings
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::quantize::settings::Grid;

    fn texts(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn methods_come_before_variations() {
        let names = |methods: &[&str], variations: &[&str]| -> Vec<String> {
            rows(&texts(methods), &texts(variations), &[]).unwrap().into_iter().map(|row| row.name).collect()
        };
        assert_eq!(names(&[], &[]).len(), METHODS.len());
        assert_eq!(names(&["gptq", "rtn"], &[]), ["GPTQ", "round to nearest"]);
        assert_eq!(names(&[], &["grid=mse"]), ["VLMQ on GPTAQ", "grid=mse"]);
        assert_eq!(names(&["gptq"], &["grid=mse", "alpha=0"]), ["GPTQ", "grid=mse", "alpha=0"]);
    }

    #[test]
    fn variations_change_the_defaults_and_nothing_else() {
        let changes = texts(&["grid=mse alpha=1 cross-term=quantized symmetric=true importance=none"]);
        let found = &rows(&[], &changes, &texts(&["damp=0.05"])).unwrap()[1];
        let default = SolverSettings::default();
        let expected = SolverSettings { grid: Grid::Mse, alpha: 1.0, symmetric: true, damp: 0.05, ..default.clone() };
        assert_eq!(SolverSettings { cross_term: default.cross_term, ..found.solver.clone() }, expected);
        assert_ne!(found.solver.cross_term, default.cross_term);
        assert_eq!(found.importance, Importance::None);
    }

    #[test]
    fn a_refit_is_the_widths_unless_it_is_asked_for() {
        let refit = |changes: &[&str], bits: u32| {
            let row = &rows(&[], &texts(&["grid=mse"]), &texts(changes)).unwrap()[1];
            let solver = SolverSettings { bits, ..row.solver.clone() };
            settings(&Row { solver, ..row.clone() })[REFIT].clone()
        };
        assert_eq!([2, 3, 4].map(|bits| refit(&[], bits)), ["residual", "none", "none"]);
        assert_eq!([2, 3].map(|bits| refit(&["refit=residual"], bits)), ["residual", "residual"]);
        assert_eq!(refit(&["refit=none"], 2), "none");
    }

    #[test]
    fn what_no_row_can_be_is_refused() {
        for (changes, word) in [
            ("grid", "KEY=VALUE"),
            ("grid=mes", "minmax"),
            ("gird=mse", "there are"),
            ("bits=3", "no setting of a row"),
            ("alpha=much", "neither a number"),
            ("refit=much", "residual"),
            ("alpha=2", "from 0 to 1"),
            (" ", "without a change"),
        ] {
            let error = format!("{:#}", rows(&[], &texts(&[changes]), &[]).unwrap_err());
            assert!(error.contains(word), "{changes}: {error}");
        }
        assert!(rows(&texts(&["gtpq"]), &[], &[]).unwrap_err().to_string().contains("vlmq-gptq"));
        assert!(rows(&texts(&["rtn", "rtn"]), &[], &[]).is_err());
    }
}
