//! `vlmq-run inspect`.

use crate::args::InspectArgs;
use crate::{print_json, print_lines, text};
use anyhow::Result;
use vlmq::report::split;
use vlmq::run::Runs;
use vlmq::run::inspect::{self, Inspection};

pub(crate) fn run<D: Runs>(device: &D, args: &InspectArgs) -> Result<()> {
    let inspection = inspect::inspect(device, &args.model)?;
    if args.json {
        return print_json(&inspection);
    }
    print_lines(&describe(&inspection))
}

fn describe(inspection: &Inspection) -> Vec<String> {
    let state = inspection.quantization.as_deref().unwrap_or("not quantized");
    let size = text::bytes(inspection.bytes);
    let mut lines = vec![format!("{}: {}, {size}, {state}", inspection.model, inspection.family)];
    let decoder = &inspection.decoder;
    lines.push(format!(
        "decoder: {} blocks, width {}, MLP {}, {} heads and {} key/value heads of {}",
        decoder.blocks, decoder.hidden, decoder.intermediate, decoder.heads, decoder.kv_heads, decoder.head_dim
    ));

    lines.push(String::new());
    let mut rows = vec![["part", "tensors", "type", "size"].map(str::to_owned).to_vec()];
    for part in &inspection.parts {
        rows.push(vec![part.name.clone(), part.tensors.to_string(), part.types.join(","), text::bytes(part.bytes)]);
    }
    lines.extend(text::table(&rows));

    lines.push(String::new());
    let what = if inspection.quantization.is_some() { "quantized" } else { "would be quantized" };
    let mut rows = vec![[what, "layers", "out x in", "size of all", "group sizes"].map(str::to_owned).to_vec()];
    for kind in &inspection.quantizable {
        let sizes: Vec<String> = kind.group_sizes.iter().map(usize::to_string).chain(["none".into()]).collect();
        rows.push(vec![
            kind.name.clone(),
            kind.count.to_string(),
            format!("{} x {}", kind.rows, kind.cols),
            text::bytes(kind.bytes * kind.count as u64),
            sizes.join(" "),
        ]);
    }
    lines.extend(text::table(&rows));

    lines.push(String::new());
    let splits = inspection.splits.iter().map(|split| {
        let group = split.group_size.map_or_else(|| "whole rows".to_owned(), |size| format!("groups of {size}"));
        format!("{group}: {}", split::told(split.gpus))
    });
    lines.push(format!("tensor parallelism in servers: {}", splits.collect::<Vec<_>>().join("; ")));

    if let Some(estimate) = &inspection.estimate {
        lines.push(String::new());
        lines.push(format!(
            "estimate for {} samples of {} tokens with the default method: {} of memory beside the vision tower, {} at \
             the {:.0} GFLOP/s measured here",
            estimate.workload.samples,
            estimate.workload.tokens,
            text::bytes(estimate.peak_memory_bytes),
            text::seconds(estimate.seconds),
            estimate.flops_per_second / 1e9
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::plan::DecoderShape;
    use vlmq::quantize::settings::{Importance, Solver};
    use vlmq::run::inspect::{Estimate, LinearKind, Part, Split, Workload, group_sizes};

    #[test]
    fn descriptions_are_tables() {
        let decoder = DecoderShape { blocks: 6, hidden: 256, intermediate: 768, heads: 4, kv_heads: 2, head_dim: 64 };
        let (solver, importance) = (Solver::Gptaq, Importance::Vlmq);
        let workload = Workload { samples: 512, tokens: 512, solver, importance };
        let estimate =
            Estimate { workload, peak_memory_bytes: 1 << 30, flops: 1e13, seconds: 100.0, flops_per_second: 1e11 };
        let vision = Part { name: "vision tower".into(), tensors: 54, bytes: 2048, types: vec!["BF16".into()] };
        let (rows, cols) = (256, 768);
        let down = LinearKind {
            name: "mlp.down_proj".into(),
            count: 6,
            rows,
            cols,
            bytes: 393_216,
            group_sizes: group_sizes(cols),
        };
        let inspection = Inspection {
            model: "m".into(),
            family: "a_family".into(),
            quantization: None,
            decoder,
            bytes: 15_600_000,
            parts: vec![vision],
            quantizable: vec![down],
            splits: vec![Split { group_size: Some(128), gpus: 2 }, Split { group_size: None, gpus: 1 }],
            estimate: Some(estimate),
        };
        let lines = describe(&inspection);
        assert_eq!(lines[0], "m: a_family, 14.88 MiB, not quantized");
        assert_eq!(lines[1], "decoder: 6 blocks, width 256, MLP 768, 4 heads and 2 key/value heads of 64");
        assert_eq!(lines[4], "vision tower       54  BF16  2.00 KiB");
        let row: Vec<&str> = lines[7].split_whitespace().collect();
        assert_eq!(row.join(" "), "mlp.down_proj 6 256 x 768 2.25 MiB 32 64 128 256 none");
        assert_eq!(lines[9], "tensor parallelism in servers: groups of 128: up to 2 GPUs; whole rows: one GPU alone");
        assert!(lines[11].starts_with("estimate for 512 samples of 512 tokens"), "{}", lines[11]);
        assert!(lines[11].ends_with("at the 100 GFLOP/s measured here"), "{}", lines[11]);
    }
}
