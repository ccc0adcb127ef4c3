//! Checkpoints for tests: the small trained one, hand-made ones, and a plain round-to-nearest to fill files with.

use std::path::Path;
use vlmq::checkpoint::{Checkpoint, Format, LinearSpec, QuantizedCopy, WorkFolder, Writer};
use vlmq::codes::QuantizedLinear;
use vlmq::quantize::settings::{Order, SolverSettings};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// All linear layers of the decoder.
pub fn decoder_linears(checkpoint: &Checkpoint) -> Vec<LinearSpec> {
    checkpoint
        .names()
        .filter_map(|name| {
            let module = name.strip_suffix(".weight")?;
            let shape = checkpoint.tensor(name).ok()?.shape;
            (name.starts_with("model.layers.") && shape.len() == 2).then(|| LinearSpec {
                module: module.to_owned(),
                out_features: shape[0],
                in_features: shape[1],
            })
        })
        .collect()
}

/// Settings as a pipeline would complete them for `format` and a bf16 checkpoint.
pub fn settings(format: Format, bits: u32, group_size: Option<usize>, symmetric: bool, order: Order) -> SolverSettings {
    SolverSettings {
        bits,
        group_size,
        symmetric,
        order,
        scale_type: format.scale_type(Float::Bf16),
        smallest_zero: format.smallest_zero(),
        ..SolverSettings::default()
    }
}

/// Round to nearest by the book, with an arbitrary assignment of columns to groups when the order asks for an index.
pub fn round_to_nearest(weight: &Matrix, settings: &SolverSettings) -> QuantizedLinear {
    let (rows, cols) = (weight.rows(), weight.cols());
    let group_columns = settings.group_columns(cols);
    let groups = cols / group_columns;
    let group_index = (settings.order == Order::Act && settings.group_size.is_some())
        .then(|| (0..cols).map(|column| (column * 7 % cols / group_columns) as u32).collect::<Vec<u32>>());
    let mut quantized = QuantizedLinear {
        out_features: rows,
        in_features: cols,
        bits: settings.bits,
        group_columns,
        symmetric: settings.symmetric,
        codes: vec![0; rows * cols],
        scales: vec![0.0; rows * groups],
        zeros: vec![0; rows * groups],
        group_index,
    };
    let top = f32::from(settings.largest_code());
    let mut members = vec![Vec::new(); groups];
    for column in 0..cols {
        members[quantized.group_of(column)].push(column);
    }
    for row in 0..rows {
        for (group, columns) in members.iter().enumerate() {
            let values = columns.iter().map(|&column| weight.row(row)[column]);
            let (low, high) = values.fold((0f32, 0f32), |(low, high), value| (low.min(value), high.max(value)));
            let (scale, zero) = if settings.symmetric {
                (2.0 * high.max(-low) / top, (top + 1.0) / 2.0)
            } else {
                let scale = (high - low) / top;
                (scale, (-low / scale).round())
            };
            let scale = settings.scale_type.round(scale).max(settings.scale_type.round(1e-6));
            let zero = zero.clamp(f32::from(settings.smallest_zero), top);
            quantized.scales[row * groups + group] = scale;
            quantized.zeros[row * groups + group] = zero as u8;
            for &column in columns {
                let code = (weight.row(row)[column] / scale + zero).round().clamp(0.0, top);
                quantized.codes[row * cols + column] = code as u8;
            }
        }
    }
    quantized
}

/// Quantizes every decoder layer of `source` by round to nearest and writes it to `target`; returns what was written.
pub fn write_rounded(
    source: &Checkpoint,
    target: &Path,
    format: Format,
    settings: &SolverSettings,
) -> anyhow::Result<Vec<(LinearSpec, QuantizedLinear)>> {
    let linears = decoder_linears(source);
    let mut work = WorkFolder::open(target)?;
    let layout = settings.layout();
    let copy = QuantizedCopy { checkpoint: source, linears: &linears, format, layout: &layout };
    let mut writer = Writer::create(&work.checkpoint(), &copy)?;
    writer.copy_tensors(source, &mut |_| Ok(()))?;
    let mut written = Vec::new();
    for linear in linears {
        let weight = source.linear(&linear.module, linear.out_features, linear.in_features)?;
        let quantized = round_to_nearest(&weight, settings);
        writer.write(&linear.module, &quantized)?;
        written.push((linear, quantized));
    }
    writer.finish()?;
    work.finish()?;
    Ok(written)
}

/// A tensor of a hand-made file.
pub struct Made {
    pub name: &'static str,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A float32 tensor.
pub fn made(name: &'static str, shape: &[usize], values: &[f32]) -> Made {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Made { name, dtype: "F32", shape: shape.to_vec(), bytes }
}

/// Bytes of a safetensors file.
pub fn safetensors(tensors: &[Made]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt", "origin": "test"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes.len();
        let entry = serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.to_owned(), entry);
        start = end;
    }
    with_header(&serde_json::to_string(&header).unwrap(), tensors.iter().flat_map(|t| t.bytes.clone()).collect())
}

/// A file with this header, right or wrong.
pub fn with_header(header: &str, data: Vec<u8>) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A checkpoint folder with these files.
pub fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}
