//! Findings of a layer, or of the model, on their way into the log, or the end of a strict run.

use crate::quantize::{Finding, FindingKind};
use crate::report::LayerReport;
use crate::report::check::ModelCheck;
use anyhow::{Result, bail};

/// Logs what was found of `layer`; in a strict run it is an error, before the layer is written.
///
/// With too few tokens for a width every layer of it is the same story: it is told once, and the report keeps each.
/// `earlier`: the layers before it.
pub(super) fn tell(layer: &LayerReport, earlier: &[LayerReport], strict: bool) -> Result<()> {
    for finding in &layer.solve.findings {
        let (name, kind) = (&layer.name, finding.kind);
        if strict {
            bail!("{name}: {}", ends(finding));
        }
        let told = |other: &LayerReport| {
            other.cols == layer.cols && other.solve.findings.iter().any(|finding| finding.kind == kind)
        };
        if kind != FindingKind::FewTokens {
            log::warn!("{name}: {finding}");
        } else if !earlier.iter().any(told) {
            log::warn!("{name}: {finding} (not repeated for other layers of {} inputs)", layer.cols);
        }
    }
    Ok(())
}

/// What ends a strict run, in words.
fn ends(finding: &Finding) -> String {
    let Finding { kind, found, done } = finding;
    format!("{found}, and --strict is given; {}, or go on without --strict: {done}", kind.remedy())
}

/// Logs what was found of the model as a whole; in a strict run it is an error.
pub(super) fn tell_of_model(check: &ModelCheck, strict: bool) -> Result<()> {
    for finding in &check.findings {
        if strict {
            bail!("{}", ends(finding));
        }
        log::warn!("{finding}; {}", finding.kind.remedy());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_runs_end_with_a_destroyed_model() {
        let finding = Finding::new(FindingKind::ModelDestroyed, "it is gone", "written as it is");
        let check = ModelCheck { findings: vec![finding], ..ModelCheck::default() };
        let error = tell_of_model(&check, true).unwrap_err().to_string();
        assert!(error.starts_with("it is gone, and --strict is given; raise --bits"), "{error}");
        assert!(tell_of_model(&check, false).is_ok());
        assert!(tell_of_model(&ModelCheck::default(), true).is_ok());
    }
}
