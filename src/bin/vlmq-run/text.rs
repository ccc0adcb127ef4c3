//! Numbers and tables as people read them.

/// Bytes in binary units.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// A duration: `0.42 s`, `12.3 s`, `3m05s`, `2h07m`.
pub(crate) fn seconds(seconds: f64) -> String {
    if seconds < 9.995 {
        return format!("{seconds:.2} s");
    }
    if seconds < 99.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole / 3600 {
        0 => format!("{}m{:02}s", whole / 60, whole % 60),
        hours => format!("{hours}h{:02}m", whole % 3600 / 60),
    }
}

/// A number that a run may lack.
pub(crate) fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}

/// Lines of columns: the first flush left, the others flush right.
pub(crate) fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| rows.iter().filter_map(|row| row.get(column)).map(|cell: &String| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let cases = [
            (0.004, "0.00 s"),
            (9.996, "10.0 s"),
            (99.96, "1m40s"),
            (185.2, "3m05s"),
            (3599.6, "1h00m"),
            (7624.0, "2h07m"),
        ];
        for (value, expected) in cases {
            assert_eq!(seconds(value), expected);
        }
    }

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["group".to_owned(), "n".to_owned()], vec!["é".to_owned(), "100".to_owned()], vec!["x".to_owned()]];
        assert_eq!(table(&rows), ["group    n", "é      100", "x"]);
        assert!(table(&[]).is_empty());
    }
}
