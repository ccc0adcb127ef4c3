//! Findings of a layer on their way into the log, or the end of a strict run.

use crate::quantize::FindingKind;
use crate::quantize::report::LayerReport;
use anyhow::{Result, bail};

/// Logs what was found of `layer`; in a strict run it is an error, before the layer is written.
///
/// With too few tokens for a width every layer of it is the same story: it is told once, and the report keeps each.
/// `earlier`: the layers before it.
pub(super) fn tell(layer: &LayerReport, earlier: &[LayerReport], strict: bool) -> Result<()> {
    for finding in &layer.solve.findings {
        let (name, kind) = (&layer.name, finding.kind);
        if strict {
            bail!(
                "{name}: {}, and --strict is given; {}, or go on without --strict: {}",
                finding.found,
                kind.remedy(),
                finding.done
            );
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
