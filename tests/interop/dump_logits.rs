//! Writes what this crate computes with a checkpoint, for `check.py` to compare with other people's loaders:
//!
//! ```sh
//! cargo run --release --example dump_logits -- MODEL_DIR DATA.jsonl OUT.safetensors [N]
//! ```
//!
//! of the first N conversations (default: all) token ids, positions, pixel values and the logits of every token; of a
//! packed checkpoint also codes, scales, zeros and groups of every layer. Names and shapes: the head of `check.py`.

use anyhow::{Context, Result, bail};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;
use std::sync::Arc;
use vlmq::checkpoint::Checkpoint;
use vlmq::codes::QuantizedLinear;
use vlmq::data::dataset;
use vlmq::data::sequence::{Sequence, SequenceBuilder};
use vlmq::device::cpu::Cpu;
use vlmq::model::decoder::{Projection, module_name};
use vlmq::model::families::{self, ImageOptions};
use vlmq::model::language_model::{LanguageModel, Residency};

/// Tensors of the file: name, dtype, shape, little-endian bytes.
#[derive(Default)]
struct Dump(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Dump {
    fn floats(&mut self, name: String, shape: &[usize], values: &[f32]) {
        self.0.push((name, Dtype::F32, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }

    fn longs(&mut self, name: String, shape: &[usize], values: impl Iterator<Item = usize>) {
        self.0.push((name, Dtype::I64, shape.to_vec(), values.flat_map(|v| (v as i64).to_le_bytes()).collect()));
    }

    fn bytes(&mut self, name: String, shape: &[usize], values: &[u8]) {
        self.0.push((name, Dtype::U8, shape.to_vec(), values.to_vec()));
    }

    fn write(&self, path: &Path) -> Result<()> {
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            view.map(|view| (name.as_str(), view)).with_context(|| format!("tensor {name}"))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, None, path).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, data, out, limit) = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [model, data, out] => (Path::new(model).to_owned(), Path::new(data).to_owned(), out.to_string(), usize::MAX),
        [model, data, out, limit] => {
            let limit = limit.parse().with_context(|| format!("{limit:?} is not a number of conversations"))?;
            (Path::new(model).to_owned(), Path::new(data).to_owned(), out.to_string(), limit)
        }
        _ => bail!("usage: dump_logits MODEL_DIR DATA.jsonl OUT.safetensors [N]"),
    };
    let checkpoint = Arc::new(Checkpoint::open(&model)?);
    let mut dump = Dump::default();
    dump_samples(&checkpoint, &data, limit, &mut dump)?;
    if checkpoint.is_quantized() {
        dump_layers(&checkpoint, &mut dump)?;
    }
    dump.write(Path::new(&out))
}

fn dump_samples(checkpoint: &Arc<Checkpoint>, data: &Path, limit: usize, dump: &mut Dump) -> Result<()> {
    let vision = families::of::<Cpu>(checkpoint)?.vision_input(checkpoint, ImageOptions::default())?;
    let builder = SequenceBuilder::new(checkpoint.folder(), vision)?;
    let model = LanguageModel::load(&Cpu, checkpoint, Residency::Resident)?;
    for (number, conversation) in dataset::read(data, None)?.iter().take(limit).enumerate() {
        dump_sample(&model, &builder.build(conversation)?, &format!("sample.{number}"), dump)?;
    }
    Ok(())
}

fn dump_sample(model: &LanguageModel<Cpu>, sequence: &Sequence, name: &str, dump: &mut Dump) -> Result<()> {
    let tokens = sequence.tokens.len();
    dump.longs(format!("{name}.input_ids"), &[tokens], sequence.tokens.iter().map(|&token| token as usize));
    let positions = (0..3).flat_map(|axis| sequence.positions.iter().map(move |at| at[axis] as usize));
    dump.longs(format!("{name}.positions"), &[3, tokens], positions);
    if sequence.images.iter().any(|image| image.merged_grid() == (image.grid_height, image.grid_width)) {
        dump_tiles(sequence, name, dump);
    } else if !sequence.images.is_empty() {
        let patches: Vec<_> = sequence.images.iter().map(|image| image.patches()).collect();
        let values: Vec<f32> = patches.iter().flat_map(|patches| patches.data()).copied().collect();
        let columns = patches[0].cols();
        dump.floats(format!("{name}.pixel_values"), &[values.len() / columns, columns], &values);
        let grids = sequence.images.iter().flat_map(|image| [1, image.grid_height, image.grid_width]);
        dump.longs(format!("{name}.image_grid_thw"), &[sequence.images.len(), 3], grids);
    }
    let features = model.embedder().image_features(&Cpu, &[sequence])?;
    let (x, layout) = model.embedder().embed(&Cpu, &[sequence], features.as_ref())?;
    let hidden = model.forward(&Cpu, x, layout)?;
    let logits = model.logits(&Cpu, &hidden, &(0..tokens as u32).collect::<Vec<_>>())?;
    dump.floats(format!("{name}.logits"), &[tokens, logits.cols()], logits.data());
    Ok(())
}

/// Images of a tower that merges no patches, as LLaVA-OneVision takes them: pixels of crops, [images, crops, 3, side, side].
/// What the patches leave out at the right and the bottom, which no tower sees, and crops that an image lacks, are 0.
fn dump_tiles(sequence: &Sequence, name: &str, dump: &mut Dump) {
    let images = &sequence.images;
    let side = images[0].crops()[0].width() as usize;
    let grid = images[0].grid_width;
    let most = images.iter().map(|image| image.crops().len()).max().unwrap_or_default();
    let mut values = vec![0.0; images.len() * most * 3 * side * side];
    for (index, image) in images.iter().enumerate() {
        for crop in 0..image.crops().len() {
            let patches = image.crop_patches(crop);
            let patch = (patches.cols() / 3).isqrt();
            for row in 0..patches.rows() {
                for (at, &value) in patches.row(row).iter().enumerate() {
                    let (channel, y, x) = (at / patch.pow(2), at / patch % patch, at % patch);
                    let (y, x) = (row / grid * patch + y, row % grid * patch + x);
                    values[(((index * most + crop) * 3 + channel) * side + y) * side + x] = value;
                }
            }
        }
    }
    dump.floats(format!("{name}.pixel_values"), &[images.len(), most, 3, side, side], &values);
    let sizes = images.iter().flat_map(|image| [image.original.0, image.original.1]);
    dump.longs(format!("{name}.image_sizes"), &[images.len(), 2], sizes);
    dump.longs(format!("{name}.batch_num_images"), &[1], std::iter::once(images.len()));
}

fn dump_layers(checkpoint: &Checkpoint, dump: &mut Dump) -> Result<()> {
    let config = families::of::<Cpu>(checkpoint)?.config(checkpoint)?;
    for block in 0..config.decoder.layers {
        for projection in Projection::ALL {
            let module = module_name(&config.names, block, projection);
            let (outputs, inputs) = projection.shape(&config.decoder);
            let layer: QuantizedLinear = checkpoint.packed(&module, outputs, inputs)?;
            let groups = layer.groups();
            dump.bytes(format!("codes.{module}"), &[outputs, inputs], &layer.codes);
            dump.floats(format!("scales.{module}"), &[outputs, groups], &layer.scales);
            dump.bytes(format!("zeros.{module}"), &[outputs, groups], &layer.zeros);
            let index = (0..inputs).flat_map(|column| (layer.group_of(column) as i32).to_le_bytes()).collect();
            dump.0.push((format!("groups.{module}"), Dtype::I32, vec![inputs], index));
        }
    }
    Ok(())
}
